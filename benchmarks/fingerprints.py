"""What the fingerprints of its steps cost a run."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.measure import WARM_UP, Figure
from codex_ml.data import TokenWindows
from codex_ml.models import GPT
from codex_ml.train_loop import run_training

TARGET = 1.01


class _Turns:
    """A callback that turns fingerprints on and off, a block of steps each, in one run. CPU time is taken: neighbours do not count."""

    def __init__(self, block: int):
        self.block, self.mark, self.prints = block, 0.0, None
        self.times: list[list[float]] = [[], []]
        self.run: Any = None

    def on_epoch_start(self, epoch: int, state: object) -> None:
        self.mark = time.process_time()

    def on_step_end(self, step: int, state: object) -> None:
        if step % self.block == 0:
            now = time.process_time()
            self.times[step // self.block % 2 == 0].append((now - self.mark) / self.block)
            self.run.prints, self.prints = self.prints, self.run.prints
            self.mark = time.process_time()


def _cost(folder: Path, block: int, turns: int, **job: Any) -> Iterator[list[float]]:
    import codex_ml.train_loop as room

    watch, assemble = _Turns(block), room.assemble

    def assembled(*parts: Any) -> Any:
        watch.run = assemble(*parts)
        return watch.run

    room.assemble = assembled
    try:
        result = run_training(**job, epochs=1, steps_per_epoch=2 * block * (WARM_UP + turns), callbacks=[watch], progress="off",
                              metrics_out=str(folder / "metrics.ndjson"), system_metrics_interval=0)
    finally:
        room.assemble = assemble
    if result["callback_errors"] or result["sink_errors"]:
        raise RuntimeError(f"the measurement failed: {result['callback_errors']} {result['sink_errors']}")
    return (times[WARM_UP:] for times in watch.times)


def fingerprints(folder: Path, quick: bool) -> Iterator[Figure]:
    """A step with fingerprints beside one without, of MLP 64-64-10 at batch 32 as it is by default, and of the default GPT."""
    x, y = torch.randn(8192, 64), torch.randint(0, 10, (8192,))

    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    windows = TokenWindows(torch.from_numpy(np.random.default_rng(0).integers(0, 256, 2_000_000, dtype=np.uint8)), 128, 256)
    on, off = _cost(folder, 500, 6 if quick else 30, model=mlp, data=(x, y), batch_size=32, threads=1)
    yield Figure("fingerprinted step of the MLP", "µs", "tensors every 500 steps", on, "no fingerprints", off, TARGET)
    on, off = _cost(folder, 10, 3 if quick else 11, model=lambda: GPT(256, 128), data=windows, threads=1, fingerprint_every_steps=10)
    yield Figure("fingerprinted step of the GPT", "ms", "tensors every 10 steps", on, "no fingerprints", off, TARGET)
