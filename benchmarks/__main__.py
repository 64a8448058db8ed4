"""Figures of this machine, each beside its rival in the same run: `python -m benchmarks [names] [--quick] [--json PATH]`.

Rivals take turns (A B A B …) and medians are compared, so that a noisy neighbour slows both. Absolute times belong to the
machine; ratios are what counts.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from codex_ml.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from codex_ml.data import Order, TokenWindows
from codex_ml.durable import sha256_file
from codex_ml.models import GPT
from codex_ml.telemetry.ndjson import NdjsonWriter
from codex_ml.telemetry.record import scalar_record
from codex_ml.train_loop import run_training

Row = tuple[str, str, float, str, float, str]  # what, ours, figure, rival, figure, target
PLACE = {"epoch": 1, "global_step": 10}


def interleaved(rounds: int, *rivals: Callable[[], float]) -> list[float]:
    """The median of what each rival returns, over rounds in which each has its turn; a first round warms up."""
    seen: list[list[float]] = [[] for _ in rivals]
    for n in range(rounds + 1):
        for mine, rival in zip(seen, rivals, strict=True):
            value = rival()
            if n:
                mine.append(value)
    return [statistics.median(mine) for mine in seen]


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


class StepTimes:
    """A callback that keeps the time from step to step."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.last: float | None = None

    def on_epoch_start(self, epoch: int, state: object) -> None:
        self.last = None

    def on_step_end(self, step: int, state: object) -> None:
        now = time.perf_counter()
        if self.last is not None:
            self.times.append(now - self.last)
        self.last = now


def step_of(folder: Path, **keywords: object) -> float:
    """The median step of a real run, in seconds."""
    watch = StepTimes()
    run_training(callbacks=[watch], progress="off", metrics_out=str(folder / "metrics.ndjson"), **keywords)
    return statistics.median(watch.times)


def mlp_step(folder: Path, quick: bool) -> list[Row]:
    """MLP 64-64-10, batch 32, AdamW, one thread, NDJSON on, against the loop of every tutorial."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6400, 64, generator=generator), torch.randint(0, 10, (6400,), generator=generator)

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def bare() -> float:
        torch.set_num_threads(1)
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32, shuffle=True)
        times, last = [], None
        for a, b in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(a), b).backward()
            optimizer.step()
            now = time.perf_counter()
            times += [now - last] if last else []
            last = now
        return statistics.median(times)

    ours, theirs = interleaved(3 if quick else 9, lambda: step_of(folder, model=net, data=(x, y), batch_size=32, epochs=1, threads=1), bare)
    return [("a step, MLP 64-64-10 (µs)", "run_training", ours * 1e6, "bare loop over DataLoader", theirs * 1e6, "<= 0.80")]


def gpt_step(folder: Path, quick: bool) -> list[Row]:
    """The default GPT against the same model, data and fused AdamW in a loop written by hand."""
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 400_000, dtype=np.uint8))
    windows, steps = TokenWindows(tokens, 128, 256), 15 if quick else 40

    def net() -> nn.Module:
        return GPT(vocab_size=256, block_size=128)

    def bare() -> float:
        model, times = net(), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        order = torch.randperm(len(windows))
        last = None
        for step in range(steps):
            a, b = windows.gather(order[step * 16:step * 16 + 16])
            F.cross_entropy(model(a).flatten(0, 1), b.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            now = time.perf_counter()
            times += [now - last] if last else []
            last = now
        return statistics.median(times)

    ours, theirs = interleaved(2 if quick else 7, lambda: step_of(folder, model=net, data=windows, epochs=1, steps_per_epoch=steps), bare)
    return [("a step, default GPT (ms)", "run_training", ours * 1e3, "loop written by hand", theirs * 1e3, "<= 1.02")]


def state_of(megabytes: int) -> dict[str, object]:
    """A state of about so many megabytes in 16 tensors."""
    return {"model": {str(i): torch.randn(megabytes * 1_000_000 // 64) for i in range(16)}, **PLACE}


def save(folder: Path, quick: bool) -> list[Row]:
    """One pass (serialise, hash, write, fsync, rename) against torch.save, then hashing, then fsync."""
    state, count = state_of(64 if quick else 256), iter(range(1000))

    def ours() -> float:
        name = f"epoch-{next(count) + 1:04d}"
        seconds = timed(lambda: save_checkpoint(folder, name, state, dict(PLACE), {}))
        (folder / name / "checkpoint.pt").unlink()
        return seconds

    def by_hand() -> None:
        path = folder / "by-hand.pt"
        torch.save(state, path)
        with open(path, "rb") as file:
            hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())

    mine, theirs = interleaved(3 if quick else 7, ours, lambda: timed(by_hand))
    return [("a save (ms)", "save_checkpoint", mine * 1e3, "torch.save, then hash, then fsync", theirs * 1e3, "<= 1.00")]


def load(folder: Path, quick: bool) -> list[Row]:
    """A verified load against the hash alone, and against torch.load, which checks nothing."""
    facts = dict(PLACE)
    saved = save_checkpoint(folder, "epoch-0001", state_of(64 if quick else 256), facts, {})
    checkpoint, path = Checkpoint(saved.folder, saved.metadata), saved.folder / "checkpoint.pt"
    mine, hashed, plain = interleaved(3 if quick else 7, lambda: timed(lambda: load_checkpoint(checkpoint)),
                                      lambda: timed(lambda: sha256_file(path)), lambda: timed(lambda: torch.load(path, weights_only=True)))
    return [("a verified load (ms)", "load_checkpoint", mine * 1e3, "the hash alone", hashed * 1e3, "the hash's speed"),
            ("a verified load (ms)", "load_checkpoint", mine * 1e3, "torch.load, unverified, after the hash", (plain + hashed) * 1e3, "")]


MEMORY = """
import resource, sys, torch
from codex_ml.checkpoint import save_checkpoint
state = {"model": {str(i): torch.ones(int(sys.argv[2]) * 1_000_000 // 64) for i in range(16)}, "epoch": 1, "global_step": 10}
save_checkpoint(sys.argv[1], "epoch-0001", {"w": torch.ones(10), "epoch": 1, "global_step": 10}, {"epoch": 1, "global_step": 10}, {})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
save_checkpoint(sys.argv[1], "epoch-0002", state, {"epoch": 1, "global_step": 10}, {})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000)
"""


def memory(folder: Path, quick: bool) -> list[Row]:
    """How far a save raises the peak of the process."""
    size = 64 if quick else 256
    done = subprocess.run([sys.executable, "-c", MEMORY, str(folder), str(size)], capture_output=True, text=True, check=True)
    return [("peak memory of a save (MB)", "above the state", float(done.stdout), "the state itself", size, "<= 0.10")]


def place(folder: Path, quick: bool) -> list[Row]:
    """The first batch of an epoch of two thousand million samples, at its start and far into it."""
    order = Order(2 * 10**9, 32, seed=1234)
    far = 10**9 // 32
    late, early = interleaved(21, lambda: timed(lambda: next(order.steps(1, far))), lambda: timed(lambda: next(order.steps(1, 0))))
    return [("the first batch (ms)", "at sample 10^9", late * 1e3, "at sample 0", early * 1e3, "about 1")]


def start(folder: Path, quick: bool) -> list[Row]:
    """`import codex_ml` against `import torch`, each in a fresh process."""
    def fresh(code: str) -> float:
        return float(subprocess.run([sys.executable, "-c", f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"],
                                    capture_output=True, text=True, check=True).stdout)

    mine, theirs = interleaved(3, lambda: fresh("import codex_ml, sys; assert 'torch' not in sys.modules"), lambda: fresh("import torch"))
    return [("an import (ms)", "import codex_ml", mine * 1e3, "import torch", theirs * 1e3, "loads no torch")]


def record(folder: Path, quick: bool) -> list[Row]:
    """A metric built, encoded and written, against a bare write of a line of that length."""
    writer, n = NdjsonWriter(folder / "metrics.ndjson"), 5_000
    fd = os.open(folder / "bare", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def ours() -> float:
        return timed(lambda: [writer.emit(scalar_record("run", step, "train", "loss", 0.25)) for step in range(n)]) / n

    mine, theirs = interleaved(5, ours, lambda: timed(lambda: [os.write(fd, b"x" * 199 + b"\n") for _ in range(n)]) / n)
    writer.close()
    os.close(fd)
    return [("a metric (µs)", "record, encode, write", mine * 1e6, "os.write of as many bytes", theirs * 1e6, "<= 10 µs")]


BENCHMARKS = {f.__name__: f for f in (mlp_step, gpt_step, save, load, memory, place, start, record)}


def main() -> None:
    """Run the benchmarks asked for and print their table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}; all where none is given")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller states")
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    args = parser.parse_args()
    if unknown := set(args.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}; medians of turns\n")
    print(f"{'':28}{'codex_ml':>34}{'beside it':>52}{'ratio':>8}  target")
    rows: list[Row] = []
    for name in args.names or BENCHMARKS:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            for row in BENCHMARKS[name](Path(folder), args.quick):
                what, ours, mine, rival, theirs, target = row
                print(f"{what:28}{ours:>24}{mine:10.2f}{rival:>40}{theirs:12.2f}{mine / theirs:8.2f}  {target}", flush=True)
                rows.append(row)
    if args.json:
        args.json.write_text(json.dumps([dict(zip(("what", "ours", "figure", "rival", "rival_figure", "target"), r, strict=True))
                                         for r in rows], indent=2) + "\n")
    print(f"\npeak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000:.0f} MB")


if __name__ == "__main__":
    main()
