"""The exactness grid: wherever a run stops, the resumed one comes to the bits of the uninterrupted one.

Six steps to an epoch, two to an update, the last batch short. Each run is in a process of its own.
"""

import itertools

import pytest
from runs import VARIATIONS, Zygote

SCHEDULERS = {
    "linear": {"type": "linear", "final_lr_scale": 0.1},
    "step": {"type": "step", "step_size": 2, "gamma": 0.5, "interval": "step"},
    "cosine": {"type": "cosine", "warmup": 2, "interval": "step"},
}
STOPS = (6, 7, 8, 9, 10, 11, 12, -1, -2)  # every step around the second epoch, also inside an accumulation window; the ends of epochs


@pytest.fixture(scope="module")
def zygote():
    with Zygote() as zygote:
        yield zygote


@pytest.fixture(scope="module")
def whole(zygote, tmp_path_factory):
    """The hash of the uninterrupted run, by variation and scheduler."""
    known = {}

    def run(variation, scheduler):
        if (variation, scheduler) not in known:
            folder = tmp_path_factory.mktemp("whole")
            result = zygote.run(folder=str(folder), variation=variation, scheduler_cfg=SCHEDULERS[scheduler])
            assert result["status"] == "completed" and result["optimizer_steps"] == 9
            known[variation, scheduler] = result["checkpoint_sha256_last"]
        return known[variation, scheduler]

    return run


@pytest.mark.parametrize("workers", (0, 1, 2))
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("variation", VARIATIONS)
def test_stop_and_resume(zygote, whole, tmp_path, variation, scheduler, workers):
    expected = whole(variation, scheduler)
    for stop in STOPS:
        job = {"folder": str(tmp_path / f"stop{stop}"), "variation": variation, "scheduler_cfg": SCHEDULERS[scheduler],
               "num_workers": workers}
        stopped = zygote.run(stop_at=stop, **job)
        assert stopped["status"] == "stopped"
        resumed = zygote.run(**job)
        assert resumed["resumed"] and resumed["total_steps"] == 18 - stopped["global_step"]
        assert resumed["checkpoint_sha256_last"] == expected, f"stopped at {stop}"


@pytest.mark.parametrize("workers", (0, 1, 2))
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("variation", VARIATIONS)
def test_second_and_third_resume(zygote, whole, tmp_path, variation, scheduler, workers):
    for first, second, third in ((5, 9, 13), (-1, 7, 8), (6, 12, 17)):
        job = {"folder": str(tmp_path / f"from{first}"), "variation": variation, "scheduler_cfg": SCHEDULERS[scheduler],
               "num_workers": workers}
        for stop in (first, second, third):
            assert zygote.run(stop_at=stop, **job)["status"] == "stopped"
        assert zygote.run(**job)["checkpoint_sha256_last"] == whole(variation, scheduler)


def test_hashes_tell_runs_apart(whole):
    """The comparison above would be worth nothing if every run had the same hash."""
    hashes = {whole(v, s) for v, s in itertools.product(VARIATIONS, SCHEDULERS)}
    assert len(hashes) == len(VARIATIONS) * len(SCHEDULERS)


def test_step_checkpoints_change_nothing(zygote, whole, tmp_path):
    result = zygote.run(folder=str(tmp_path), variation="dropout", scheduler_cfg=SCHEDULERS["linear"], checkpoint_every_steps=1)
    assert result["checkpoint_sha256_last"] == whole("dropout", "linear")
