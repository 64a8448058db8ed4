import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from codex_ml.utils import determinism as d

VARIABLE = d.WORKSPACE_VARIABLE


@pytest.fixture(autouse=True)
def unchanged(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(d, "_started_fixed", False)
    before = d.determinism_flags()
    yield
    d.restore_flags(before)


ODD_SETTINGS = [
    lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    lambda: torch.use_deterministic_algorithms(False, warn_only=True),
    lambda: setattr(torch.backends.cudnn, "benchmark", True),
    lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    lambda: torch.set_float32_matmul_precision("medium"),
    lambda: setattr(torch.utils.deterministic, "fill_uninitialized_memory", False),
    lambda: torch.backends.cuda.enable_flash_sdp(False),
]


@pytest.mark.parametrize("setting", range(len(ODD_SETTINGS)))
@pytest.mark.parametrize("raises", [False, True])
def test_strict_mode_puts_back_what_it_found(setting, raises):
    matmul, allow, memory = (
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    try:
        ODD_SETTINGS[setting]()
        before = d.determinism_flags()
        legacy = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        try:
            with d.strict_mode():
                assert {k: v for k, v in d.determinism_flags().items() if k in d._STRICT} == d._STRICT
                if raises:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert d.determinism_flags() == before
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == legacy
        assert VARIABLE not in os.environ
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cuda.matmul.allow_tf32 = allow
        torch.backends.cudnn.allow_tf32 = True
        torch.utils.deterministic.fill_uninitialized_memory = memory


@pytest.mark.parametrize("value,inside", [(":16:8", ":16:8"), (":4096:8", ":4096:8"), (":0:0", ":4096:8")])
def test_a_workspace_of_the_user_is_kept_or_put_back(monkeypatch, value, inside):
    monkeypatch.setenv(VARIABLE, value)
    with d.strict_mode():
        assert os.environ[VARIABLE] == inside
    assert os.environ[VARIABLE] == value


def test_nested_and_disabled():
    before = d.determinism_flags()
    with d.strict_mode(False):
        assert d.determinism_flags() == before and VARIABLE not in os.environ
    with d.strict_mode():
        outer = d.determinism_flags()
        with d.strict_mode():
            pass
        assert d.determinism_flags() == outer and os.environ[VARIABLE] == ":4096:8"
    assert d.determinism_flags() == before


def test_too_late_for_cuda_is_refused_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    before = d.determinism_flags()
    with pytest.raises(d.DeterminismError, match=f"{VARIABLE}=:4096:8"):
        with d.strict_mode():
            raise AssertionError("the block must not run")
    assert d.determinism_flags() == before and VARIABLE not in os.environ
    monkeypatch.setenv(VARIABLE, ":4096:8")
    with d.strict_mode():
        assert d.determinism_level("cuda") == "L1"


def test_cuda_started_inside_a_strict_block_may_be_strict_again(monkeypatch):
    with d.strict_mode():
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with d.strict_mode():
        pass
    assert d.determinism_level("cuda") == "none"


def test_levels_are_not_promised_beyond_their_conditions(monkeypatch):
    assert d.determinism_level("cpu") == "L1"
    assert d.determinism_level("mps") == d.determinism_level("cuda:0") == "none"
    d.set_cudnn_deterministic(True)
    assert d.determinism_level("cuda") == "none"
    for i, name in enumerate(d._INSTRUCTION_CAPS):
        assert d.determinism_level(thread_independent=True) == "L2", i
        monkeypatch.setenv(name, "AVX2")
    assert d.determinism_level(thread_independent=True) == "L3"
    assert d.determinism_level() == "L1"


def test_one_switch_off_loses_the_level():
    for name, value in [("cudnn.benchmark", True), ("fp32.cuda.matmul", "tf32"), ("warn_only", True)]:
        with d.strict_mode():
            assert d.determinism_level("cuda") == "L1"
            d.restore_flags({"deterministic_algorithms": True, name: value})
            assert d.determinism_level("cuda") == "none", name


def test_fingerprint_sees_threads_and_reads_no_other_variable(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    before = d.environment_fingerprint()
    assert "hunter2" not in json.dumps(before)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert d.environment_fingerprint() == before | {"threads": threads + 1}
    finally:
        torch.set_num_threads(threads)


def test_fingerprint_without_proc(monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("no /proc here")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    assert d.environment_fingerprint()["device"]["name"]


def test_nothing_draws_a_random_number():
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    with d.strict_mode():
        d.environment_fingerprint("cpu"), d.environment_fingerprint("cuda"), d.determinism_level()
    d.set_cudnn_deterministic(False)
    assert random.getstate() == before[0] and np.random.get_state()[1].tobytes() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_cudnn_deterministic_takes_the_benchmark_off():
    d.restore_flags({"cudnn.benchmark": True, "cudnn.deterministic": False})
    previous = d.set_cudnn_deterministic(True)
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    d.set_cudnn_deterministic(False)
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.deterministic
    d.restore_flags({"cudnn.benchmark": False})
    d.restore_flags(previous)
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.deterministic


def test_two_processes_have_one_fingerprint():
    code = "import json; from codex_ml.utils.determinism import environment_fingerprint as f; print(json.dumps(f()))"
    first, second = (subprocess.check_output([sys.executable, "-c", code]) for _ in range(2))
    assert first == second
