"""A training step beside the loop that one would write by hand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measure import WARM_UP, Figure, TakeTurns
from codex_ml.data import TensorSamples, TokenWindows
from codex_ml.models import GPT
from codex_ml.train_loop import run_training


def run_beside(folder: Path, block: int, turns: int, *rivals: Any, **run: Any) -> list[list[float]]:
    """Seconds a step of `run_training` as it is by default (metrics are written), then of each rival."""
    watch = TakeTurns(block, *rivals)
    result = run_training(**run, epochs=1, steps_per_epoch=block * (WARM_UP + turns), callbacks=[watch], progress="off",
                          metrics_out=str(folder / "metrics.ndjson"))
    if result["callback_errors"] or result["sink_errors"]:
        raise RuntimeError(f"the measurement failed: {result['callback_errors']} {result['sink_errors']}")
    return watch.times()


def mlp_step(folder: Path, quick: bool) -> list[Figure]:
    """MLP 64-64-10, batch 32, AdamW, one thread."""
    block, turns = 50, 10 if quick else 60
    samples = 32 * block * (WARM_UP + turns)
    x, y = torch.randn(samples, 64), torch.randint(0, 10, (samples,))

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def bare() -> Iterator[None]:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for a, b in DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(a), b).backward()
            optimizer.step()
            yield

    ours, theirs, best = run_beside(folder, block, turns, bare(), gathered(net(), TensorSamples(x, y), 32), model=net, data=(x, y),
                                    batch_size=32, threads=1)
    return [Figure("step of MLP 64-64-10", "µs", "run_training", ours, "loop over DataLoader, AdamW", theirs, target=0.8),
            Figure("step of MLP 64-64-10", "µs", "run_training", ours, "loop with gather, fused AdamW", best)]


def gpt_step(folder: Path, quick: bool) -> list[Figure]:
    """The default GPT, batch 16, torch's own number of threads."""
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 2_000_000, dtype=np.uint8))
    windows, turns = TokenWindows(tokens, 128, 256), 10 if quick else 50
    ours, theirs = run_beside(folder, 2, turns, gathered(GPT(256, 128), windows, 16), model=lambda: GPT(256, 128), data=windows)
    return [Figure("step of the default GPT", "ms", "run_training", ours, "loop with gather, fused AdamW", theirs, target=1.02)]


def gathered(model: nn.Module, samples: Any, batch_size: int) -> Iterator[None]:
    """The fastest loop that is as short: batches gathered by index, the fused optimizer, and nothing else."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for indices in torch.randperm(len(samples)).split(batch_size):
        x, y = samples.gather(indices)
        logits = model(x)
        F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield
