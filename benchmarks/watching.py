"""What it costs a run to be watched."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Figure, in_turn, timed
from codex_ml.config import TrainConfig
from codex_ml.telemetry.mlflow import open_store, store_uri
from codex_ml.telemetry.record import encode, snapshot_record
from codex_ml.telemetry.sinks import open_sinks
from codex_ml.telemetry.system import SystemSampler


def work() -> None:
    """About ten milliseconds of arithmetic on one core."""
    left = torch.ones(560, 560)
    for _ in range(2):
        left = left @ left * 1e-3


def sinks(folder: Path, quick: bool) -> list[Figure]:
    """Steps of ten milliseconds on one core, with every local sink on, beside the bare steps and beside the same libraries called
    from the loop. A turn is ten steps: four metrics are logged at the first of them, as is usual, or at each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    repeats = max(1, round(0.01 / min(timed(work) for _ in range(20))))
    config = TrainConfig(tensorboard=True, wandb_enable=True, mlflow_enable=True, mlflow_dir=str(folder.resolve() / "mlflow"),
                         system_metrics_interval=10.0)
    config.monitoring.alerts |= {"nan": True, "spike": True}
    metrics, count = {"loss": 0.25, "lr": 1e-3, "step_time": 0.01, "data_time": 1e-4}, 0

    def steps(every: int, log: Callable[[int], Any]) -> float:
        def turn() -> None:
            nonlocal count
            for index in range(10):
                count += 1
                if index % every == 0:
                    log(count)
                for _ in range(repeats):
                    work()
        return timed(turn) / 10

    def ours(step: int) -> None:
        door.log(step, "train", metrics)

    with open_sinks(config, folder, "0" * 32) as door, by_hand(folder / "by-hand", config.mlflow_dir) as libraries:
        door.event("run_start", config={}, environment={}, global_step=0, epochs=1)
        turns: list[Callable[[], float]] = [
            lambda: steps(10, ours), lambda: steps(1, ours),
            lambda: steps(10, lambda step: libraries(step, metrics)), lambda: steps(10, lambda step: None)]
        for turn in turns:
            turn()
        time.sleep(10)  # until all have come up
        usual, often, theirs, bare = in_turn(10 if quick else 400, *turns)
        failed = dict(door.errors)
    torch.set_num_threads(threads)
    if failed:
        raise RuntimeError(f"the figure is worth nothing: {failed}")
    return [Figure("a watched step", "ms", "all sinks, every 10th step", usual, "the bare step", bare, target=1.01),
            Figure("a watched step", "ms", "all sinks, every step", often, "the bare step", bare),
            Figure("a watched step", "ms", "all sinks, every 10th step", usual, "the libraries, called", theirs)]


@contextmanager
def by_hand(folder: Path, store: str) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """What a loop calls that logs to TensorBoard, W&B (offline) and MLflow (SQLite) itself."""
    import mlflow
    import wandb
    from torch.utils.tensorboard import SummaryWriter

    folder.mkdir()
    open_store(store)
    mlflow.set_tracking_uri(store_uri(store))
    writer = SummaryWriter(str(folder))
    run = wandb.init(dir=folder, mode="offline", settings=wandb.Settings(silent=True, console="off", x_disable_stats=True))

    def log(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        run.log(metrics, step=step)
        mlflow.log_metrics(metrics, step=step)

    with mlflow.start_run(), run, writer:
        yield log


def sampler(folder: Path, quick: bool) -> list[Figure]:
    """The share of a core that a look at the machine each second takes, its record included."""
    file = (folder / "snapshots.ndjson").open("wb", buffering=0)
    with SystemSampler(1.0, lambda values: file.write(encode(snapshot_record("0" * 32, 1, values)))):
        time.sleep(2.5)
        cpu, begun = time.process_time(), time.perf_counter()
        time.sleep(5 if quick else 20)
        share = (time.process_time() - cpu) / (time.perf_counter() - begun)
    file.close()
    return [Figure("system metrics at 1 Hz", "% of a core", "SystemSampler", [100 * share], "what it may take", [0.5], target=1.0)]
