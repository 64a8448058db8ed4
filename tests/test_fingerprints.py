"""Fingerprints: what they see, that they change nothing, and that nothing depends on them."""

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from runs import Augmented, StopAt, make_model
from torch import nn

from codex_ml.fingerprints import ROW, Fingerprints, bits, content, fold, from_bits, gradient_norm, hashes
from codex_ml.recorded_steps import RecordedSteps, differences_by_step, read_steps, ulps
from codex_ml.telemetry.ndjson import read_ndjson
from codex_ml.telemetry.schema import STEPS, problems
from codex_ml.train_loop import run_training


def run(folder: Path, **change: Any) -> dict[str, Any]:
    job = {"epochs": 2, "batch_size": 8, "threads": 1, "progress": "off", "learning_rate": 0.01, "system_metrics_interval": 0.0,
           "fingerprint_every_steps": 4}
    return run_training(**{"model": lambda: make_model("plain"), "data": Augmented("plain"), "checkpoint_dir": folder, **job, **change})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_ndjson(folder / ".codex/metrics.ndjson")[0] if record["$schema"] == STEPS]


# ---- the hash

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("size", [0, 1, 3, 5, ROW - 1, ROW, ROW + 1, 3 * ROW + 7])
def test_every_bit_counts(dtype: torch.dtype, size: int) -> None:
    tensor = torch.zeros(size, dtype=dtype)
    first = fold(tensor)
    raw = tensor.view(torch.uint8)
    places = {0, len(raw) // 2, len(raw) - 1} if len(raw) else set()
    for place in places:
        for bit in (0, 7) if dtype != torch.bool else (0,):
            raw[place] ^= 1 << bit
            assert fold(tensor) != first
            raw[place] ^= 1 << bit
    assert fold(tensor) == first


def test_place_and_length_count() -> None:
    x = torch.randn(5 * ROW)
    assert len({fold(t).item() for t in (x, x.roll(1), x.roll(ROW), x.flip(0), x[:-1], -x)}) == 6
    assert fold(x.view(torch.int32)) == fold(x.view(5, ROW)) == fold(x)  # the same bytes
    assert fold(x.view(5, ROW).t()) == fold(x.view(5, ROW).t().contiguous()) != fold(x)
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -2.0])
    assert fold(a) != fold(b)  # two sign bits must not cancel


def test_the_hash_is_the_documented_sum() -> None:
    """Written down once more, in whole numbers without a limit: the format of `weights` in the stream."""
    def number(i: int) -> int:
        z, mask = (i + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1, (1 << 64) - 1
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return (z ^ z >> 31) | 1

    def expected(data: bytes) -> int:
        size = len(data)
        words = struct.unpack(f"<{-(-size // 4)}i", data + bytes(-size % 4))
        while len(words) > ROW:
            rows = [words[i:i + ROW] for i in range(0, len(words), ROW)]
            rows += [()] if len(words) % ROW == 0 else []
            sums = [sum(w * number(i) for i, w in enumerate(row)) & (1 << 64) - 1 for row in rows]
            words = struct.unpack(f"<{2 * len(sums)}i", struct.pack(f"<{len(sums)}Q", *sums))
        return (sum(w * number(i) for i, w in enumerate(words)) + size) & (1 << 64) - 1

    for size in (1, 1000, ROW, 2 * ROW, 2 * ROW + 3):
        x = torch.randn(size)
        assert fold(x).item() & (1 << 64) - 1 == expected(x.numpy().tobytes())


def test_neither_threads_nor_memory_change_it() -> None:
    x, before, found = torch.randn(1200, 700), torch.get_num_threads(), []
    net = nn.Linear(700, 1200)
    net(x[:, :700]).square().sum().backward()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append((fold(x).item(), fold(x.t().contiguous().t()).item(), gradient_norm(net.parameters()).item()))
    finally:
        torch.set_num_threads(before)
    assert len(set(found)) == 1 and found[0][0] == found[0][1]


def test_odd_tensors_are_left_out() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lazy, self.plain = nn.LazyLinear(3), nn.Linear(2, 2)
            self.register_buffer("sparse", torch.eye(3).to_sparse())
            self.register_buffer("nothing", None)
    assert hashes(Odd())[0] == ["plain.weight", "plain.bias"]
    assert hashes(nn.Sequential()) == ([], None)


# ---- bits, contents, norms

def test_bits_come_back() -> None:
    values = [0.0, -0.0, 1.5, float("inf"), float("-inf"), 2.0**-149, 3.4028234663852886e38]
    assert [len(text) for text in bits(values)] == [8] * 7
    assert [struct.pack(">d", from_bits(text)) for text in bits(values)] == [struct.pack(">d", value) for value in values]
    assert [from_bits(text) for text in bits([0.1, 1e300])] == [0.1, 1e300] and from_bits(bits([float("nan")])[0]) != 0


def test_the_content_of_a_batch() -> None:
    x = torch.arange(12.0).view(3, 4)
    same = [{"a": x, "b": ["q", 1]}, {"a": x.clone(), "b": ["q", 1]}, {"a": x.numpy(), "b": ("q", 1)}]
    assert len({content(batch) for batch in same}) == 1
    others = [{"a": x + 1, "b": ["q", 1]}, {"a": x, "b": ["q", 2]}, [x, x], x, x.half(), None, object(), "q"]
    assert len({content(batch) for batch in [same[0], *others]}) >= len(others)
    images = torch.zeros(64, 3, 64, 64)
    for i in (0, 31, 63):
        assert content(images) != content(images.index_fill(0, torch.tensor([i]), 1.0))


def test_ulps() -> None:
    a = np.float32([1, -1, 0, -0.0, 1e-45])
    b = np.nextafter(a, np.float32(2))
    assert ulps(a.view(np.int32), b.view(np.int32)).tolist() == [1.0] * 5
    one = np.float64([1e308]).view(np.int64), np.float64([-1e308]).view(np.int64)
    assert ulps(*one)[0] > 1e18


# ---- in a run

def test_a_line_is_as_its_schema_says_and_says_what_happened(tmp_path: Path) -> None:
    losses: list[float] = []

    class Watch:
        def on_step_end(self, step: int, state: Any) -> None:
            losses.append(state.loss)

    run(tmp_path, callbacks=[Watch()], scheduler_cfg={"type": "linear"})
    found = lines(tmp_path)
    assert [problems(line) for line in found] == [[]] * len(found)
    assert [(line["first"], line["step"]) for line in found] == [(1, 0), (1, 4), (5, 6), (7, 8), (9, 12)]
    assert [from_bits(text) for line in found for text in line["losses"]] == losses and len(losses) == 12
    assert [len(line["batches"]) for line in found] == [len(line["losses"]) for line in found] == [len(line["contents"]) for line in found]
    assert [at for line in found for at, _ in line["weights"]] == [0, 4, 8, 12]
    assert [at for line in found for at, _ in line["gradients"]] == [*range(1, 13)]  # every 4 // 4 steps
    steps = read_steps(tmp_path / ".codex/metrics.ndjson")
    assert steps.rate(6) == [0.01] and steps.rate(7) == [0.005] and steps.count == steps.last == 12 and steps.rate(13) is None


@pytest.mark.parametrize("change", [{}, {"grad_clip": 0.1}, {"grad_accum": 4}, {"num_workers": 2},
                                    {"data": [(torch.ones(8, 6), torch.zeros(8).long())] * 3}],
                         ids=["plain", "clip", "accumulation", "workers", "iterable"])
def test_they_change_no_bit(tmp_path: Path, change: dict[str, Any]) -> None:
    hashes = {run(tmp_path / str(every), fingerprint_every_steps=every, **change)["checkpoint_sha256_last"] for every in (None, 0, 1, 5)}
    assert len(hashes) == 1
    assert lines(tmp_path / "0") == lines(tmp_path / "None") == [] != lines(tmp_path / "1")


def test_workers_change_no_fingerprint(tmp_path: Path) -> None:
    steps = []
    for workers in (0, 2):
        run(tmp_path / str(workers), num_workers=workers, data=Augmented("numpy"))
        steps.append(read_steps(tmp_path / str(workers) / ".codex/metrics.ndjson"))
    assert differences_by_step(*steps) == [] and steps[0].count == steps[1].count == 12


@pytest.mark.parametrize("at", [1, 4, 5, 6, 7])
def test_a_stop_loses_none_and_doubles_none(tmp_path: Path, at: int) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "parts", callbacks=[StopAt(at)])
    assert lines(tmp_path / "parts")[-1]["step"] == at  # what a checkpoint holds is in the stream
    run(tmp_path / "parts", resume=True)
    whole, parts = (read_steps(tmp_path / name / ".codex/metrics.ndjson") for name in ("whole", "parts"))
    assert parts.count == 12 and differences_by_step(whole, parts) == []


def test_what_was_trained_again_counts_once(tmp_path: Path) -> None:
    """A run that goes on from an older checkpoint, with other bits, has left the steps that it had made beyond."""
    run(tmp_path, epochs=3)
    last = tmp_path / "epoch-0003/checkpoint.pt"
    last.write_bytes(b"broken")
    (tmp_path / "epoch-0002/checkpoint.pt").write_bytes(b"broken")
    run(tmp_path, epochs=2, resume=True)
    steps = read_steps(tmp_path / ".codex/metrics.ndjson")
    assert steps.last == steps.count == 12 and max(steps.weights) == 12


def test_a_loss_that_is_not_finite_is_there(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        calls.append(1)
        return model(batch[0]).mean() * (float("nan") if len(calls) == 3 else 1.0)

    calls: list[int] = []
    with pytest.raises(ArithmeticError):
        run(tmp_path, loss_fn=loss)
    steps = read_steps(tmp_path / ".codex/metrics.ndjson")
    assert steps.last == 3 and steps.loss(3) != steps.loss(3) and steps.loss(2) == steps.loss(2)


def test_what_cannot_be_looked_at_is_told_once_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    import codex_ml.fingerprints as room

    def broken(*arguments: Any) -> None:
        raise ValueError("no such tensor")

    whole = run(tmp_path / "whole")
    for name in ("content", "gradient_norm", "hashes"):
        monkeypatch.setattr(room, name, broken)
    caplog.clear()
    result = run(tmp_path / "run")
    assert result["checkpoint_sha256_last"] == whole["checkpoint_sha256_last"]
    told = [record.message for record in caplog.records if "go without" in record.message]
    assert len(told) == 3 and all("no such tensor" in text for text in told)
    assert [len(line["losses"]) for line in lines(tmp_path / "run")] == [0, 4, 2, 2, 4]


def test_a_broken_line_is_passed_over(tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / ".codex/metrics.ndjson"
    text = path.read_text().splitlines()
    wrong = [json.dumps(json.loads(line) | {"first": "y"}) if STEPS in line and '"first":5' in line else line for line in text]
    path.write_text("\n".join(wrong) + "\nnonsense\n")
    with pytest.warns(UserWarning, match="^skipped .*metrics.ndjson:"):
        steps = read_steps(path)
    assert steps.count == 10 and steps.last == 12


def test_a_gpu_is_asked_when_the_log_asks() -> None:
    """Losses that are not read yet hold the line back, and with it every value that lies on the device."""
    sent: list[dict[str, Any]] = []
    prints, net = Fingerprints(2, sent.append, known=True), nn.Linear(2, 2)
    state = SimpleNamespace(global_step=0, model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    for state.global_step in (1, 2, 3):
        prints.step(state, np.array([state.global_step]), False)
    assert sent == []
    prints.losses += [1.0, 2.0, 3.0, 4.0]
    state.global_step = 4
    prints.step(state, np.array([4]), False)
    assert [(line["first"], line["step"], len(line["losses"]), line["weights"][0][0]) for line in sent] == [(1, 4, 4, 2)]


def test_only_gradients_are_no_difference() -> None:
    """Norms that clipping found depend on the number of threads; the bits of the run need not."""
    a, b = RecordedSteps(), RecordedSteps()
    for steps, norm in ((a, "3f800000"), (b, "3f800001")):
        steps.take({"$schema": STEPS, "first": 1, "losses": ["3f800000"], "batches": ["00000001"], "contents": [], "rates": [[1, [0.1]]],
                    "gradients": [[1, norm]], "weights": []})
    assert differences_by_step(a, b) == []
