"""Learning-rate factors at their edges."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codex_ml import registry
from codex_ml.config import SchedulerConfig
from codex_ml.registry import UnknownName, register
from codex_ml.schedules import lr_factor

KINDS = st.sampled_from(["constant", "linear", "step", "cosine"])


@pytest.mark.parametrize(("t", "total", "final", "factor"), [
    (0, 6, 0.0, 1.0), (1, 6, 0.0, 5 / 6), (2, 6, 0.0, 4 / 6), (4, 10, 0.3, 0.72), (10, 10, 0.3, 0.3), (99, 10, 0.3, 0.3)])
def test_linear(t, total, final, factor):
    assert lr_factor(t, total, SchedulerConfig(type="linear", final_lr_scale=final)) == pytest.approx(factor, abs=1e-7)


def test_the_shape_has_what_the_warm_up_leaves_of_the_run():
    config = SchedulerConfig(type="linear", final_lr_scale=0.2, warmup=4)
    assert [lr_factor(t, 12, config) for t in (3, 4, 8, 12)] == pytest.approx([0.8, 1.0, 0.6, 0.2], abs=1e-12)


def test_step_and_cosine():
    stairs = SchedulerConfig(type="step", step_size=2, gamma=0.1)
    assert [lr_factor(t, 6, stairs) for t in range(6)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01], abs=1e-12)
    wave = SchedulerConfig(type="cosine", final_lr_scale=0.2)
    assert [lr_factor(t, 4, wave) for t in (0, 2, 4, 5)] == pytest.approx([1.0, 0.6, 0.2, 0.2], abs=1e-12)


@given(kind=KINDS, t=st.integers(0, 300), total=st.integers(1, 200), warmup=st.integers(0, 250),
       final=st.floats(0, 1), gamma=st.floats(0.01, 1), size=st.integers(1, 50))
def test_every_factor_is_finite_between_zero_and_one_and_the_peak_is_one(kind, t, total, warmup, final, gamma, size):
    config = SchedulerConfig(type=kind, final_lr_scale=final, gamma=gamma, step_size=size, warmup=warmup)
    assert 0.0 <= lr_factor(t, total, config) <= 1.0
    assert lr_factor(warmup, total, config) == 1.0
    rising = [lr_factor(u, total, config) for u in range(warmup + 1)]
    assert rising == sorted(rising) and rising[0] > 0


def test_names_are_case_insensitive_and_unknown_ones_get_a_hint():
    assert lr_factor(5, 10, SchedulerConfig(type="Linear")) == 0.5
    with pytest.raises(UnknownName, match="did you mean 'cosine'"):
        lr_factor(1, 10, SchedulerConfig(type="cosin"))


@pytest.mark.parametrize("bad", [-0.5, math.nan, math.inf])
def test_a_schedule_that_gives_nonsense_is_named(monkeypatch, bad):
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    register("schedulers", "odd", lambda t, total, config: bad)
    with pytest.raises(ValueError, match="'odd' gives the factor"):
        lr_factor(1, 10, SchedulerConfig(type="odd"))
