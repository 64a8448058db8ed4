"""Real runs for the tests, each in a process of its own.

`Zygote` is a process that has imported everything and trained nothing; it forks a child for each job, so that a run
starts in a few milliseconds and in a clean state: no thread pool, no draw, no cache from another run. A job is a dict
of keywords of `train`; its answer is the result of `run_training`, or the error.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

VARIATIONS = ("plain", "dropout", "numpy", "random", "torch", "channels_last")
SAMPLES, FEATURES = 46, 6  # 6 batches of 8, the last one of 6


class Augmented(Dataset):
    """Noise on every sample, from the generator named (none for `plain`, `dropout` and `channels_last`)."""

    def __init__(self, variation: str):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(SAMPLES, FEATURES, generator=generator)
        self.y = torch.randint(0, 3, (SAMPLES,), generator=generator)
        self.variation = variation

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = {"numpy": lambda: float(np.random.randn()), "random": random.random, "torch": lambda: torch.rand(1)}
        return self.x[i] + noise.get(self.variation, lambda: 0.0)(), self.y[i]


class Net(nn.Module):
    """With batch normalisation, whose statistics change in the forward pass, and dropout."""

    def __init__(self, dropout: float):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class ConvNet(nn.Module):
    """Over weights whose strides are not those of their shape: their gradients have to come back as they were."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 8, 2), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(8, 3))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.view(-1, 2, 1, 3).repeat(1, 1, 2, 1).contiguous(memory_format=torch.channels_last))


def make_model(variation: str) -> nn.Module:
    """The network of a variation."""
    return ConvNet() if variation == "channels_last" else Net(0.3 if variation == "dropout" else 0.0)


class StopAt:
    """Ends a run after a step, or (a negative number) after an epoch."""

    def __init__(self, at: int):
        self.at = at

    def on_step_end(self, step: int, state: Any) -> None:
        if step == self.at:
            state.request_stop()

    def on_epoch_end(self, epoch: int, metrics: dict, state: Any) -> None:
        if epoch == -self.at:
            state.request_stop()


def train(folder: str, variation: str = "plain", stop_at: int | None = None, **keywords: Any) -> dict[str, Any]:
    """One run of a small network on random data; every keyword of `run_training` may be given."""
    from codex_ml.train_loop import run_training

    torch.set_num_threads(1)
    options = {"epochs": 3, "batch_size": 8, "grad_accum": 2, "learning_rate": 0.01, "progress": "off", "threads": 1, "resume": True}
    callbacks = [] if stop_at is None else [StopAt(stop_at)]
    return run_training(model=lambda: make_model(variation), data=Augmented(variation), checkpoint_dir=folder,
                        callbacks=callbacks, **options | keywords)


class Zygote:
    """Runs jobs in forked children of a fresh process; usable as a context manager."""

    def __enter__(self) -> "Zygote":
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=20)
        self.process.stdout.close()

    def run(self, **job: Any) -> dict[str, Any]:
        """The job's result; `RuntimeError` with the child's error where it failed, `{"killed": …}` where it was killed."""
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


def _child(job: dict[str, Any], out: int) -> None:
    try:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            answer = dict(train(**job))
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    os.write(out, json.dumps(answer, default=str).encode())
    os._exit(0)


def serve() -> None:
    """Answer jobs from standard input until it closes."""
    import torch._dynamo  # noqa: F401  (torch's optimizers import it when the first is made: 0.8 s)

    import codex_ml.train_loop  # noqa: F401  (everything that a run needs, before the first fork)

    for line in sys.stdin:
        job = json.loads(line)
        kill_after = job.pop("kill_after", None)
        source, out = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(source)
            _child(job, out)
        os.close(out)
        killed = kill_after is not None and kill(pid, kill_after)
        with os.fdopen(source) as answers:
            text = answers.read()
        if kill_after is None:
            os.waitpid(pid, 0)
        print(json.dumps({"killed": True}) if killed else text or json.dumps({"error": "the child died"}), flush=True)


def kill(pid: int, after: float) -> bool:
    """SIGKILL the child after so many seconds; False where it had ended by itself."""
    import signal
    import time

    time.sleep(after)
    ended, _ = os.waitpid(pid, os.WNOHANG)
    if ended:
        return False
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


if __name__ == "__main__":
    serve()
