"""What comes before the first step, and the cost of a record."""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.measure import Figure, in_turn, timed
from codex_ml.data import TensorSamples, make_batches
from codex_ml.telemetry.ndjson import NdjsonWriter
from codex_ml.telemetry.sinks import Sinks


def first_batch(folder: Path, quick: bool) -> list[Figure]:
    """The first batch of an epoch of two thousand million samples: where a resume goes on after half of them, and at the start."""
    samples = TensorSamples(torch.zeros(1).expand(2 * 10**9))  # one number seen from everywhere: nothing so long is in memory
    batches = make_batches(samples, 32, seed=1234)
    half = 10**9 // 32
    far, near = in_turn(10 if quick else 50, lambda: timed(lambda: next(batches.epoch(1, half))),
                        lambda: timed(lambda: next(batches.epoch(1))))
    return [Figure("first batch", "ms", "from sample 10^9 on", far, "from sample 0 on", near)]


def imports(folder: Path, quick: bool) -> list[Figure]:
    """`import codex_ml`, which must not load torch, in fresh processes."""
    def fresh(module: str) -> float:
        code = f"import sys, time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t, 'torch' in sys.modules)"
        seconds, torch_loaded = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
        if module == "codex_ml" and torch_loaded == "True":
            raise RuntimeError("import codex_ml has loaded torch")
        return float(seconds)

    ours, theirs = in_turn(1 if quick else 5, lambda: fresh("codex_ml"), lambda: fresh("torch"))
    return [Figure("import", "ms", "import codex_ml (no torch)", ours, "import torch", theirs)]


def record(folder: Path, quick: bool) -> list[Figure]:
    """One metric logged to the file of metrics, through the door that the loop uses."""
    count, run_id = 2000, "0" * 32

    def ours() -> None:
        for step in range(count):
            sinks.log(step, "train", {"loss": 0.25})

    def by_hand() -> None:
        for step in range(count):
            file.write(json.dumps({"timestamp": time.time(), "run_id": run_id, "step": step, "split": "train", "metric": "loss",
                                   "value": 0.25}) + "\n")
            file.flush()

    with Sinks({"ndjson": NdjsonWriter(folder / "metrics.ndjson")}, run_id) as sinks, open(folder / "by-hand", "a") as file:
        logged, written = in_turn(5 if quick else 25, lambda: timed(ours) / count, lambda: timed(by_hand) / count)
    return [Figure("record", "µs", "Sinks.log to NDJSON", logged, "json.dumps, write, flush", written)]
