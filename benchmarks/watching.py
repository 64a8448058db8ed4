"""What it costs a run to be watched."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.measure import Figure, in_turn, timed
from codex_ml.config import TrainConfig
from codex_ml.telemetry.mlflow import open_store, store_uri
from codex_ml.telemetry.record import encode, snapshot_record
from codex_ml.telemetry.sink_process import SinkProcess
from codex_ml.telemetry.sinks import Sinks, open_sinks
from codex_ml.telemetry.system import SystemSampler


def work() -> None:
    """About ten milliseconds of arithmetic on one core."""
    left = torch.ones(560, 560)
    for _ in range(2):
        left = left @ left * 1e-3


def sinks(folder: Path, quick: bool) -> list[Figure]:
    """What all local sinks add to a step of ten milliseconds on one core, where four metrics are logged at every tenth step, as is usual,
    or at every second; and such steps beside the bare step and beside the same libraries called from the loop."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    repeats = max(1, round(0.01 / min(timed(work) for _ in range(20))))
    config = TrainConfig(tensorboard=True, wandb_enable=True, mlflow_enable=True, mlflow_dir=str(folder.resolve() / "mlflow"),
                         system_metrics_interval=10.0)
    config.monitoring.alerts |= {"nan": True, "spike": True}
    metrics, count = {"loss": 0.25, "lr": 1e-3, "step_time": 0.01, "data_time": 1e-4}, 0
    steps = 100 if quick else 1500

    def step() -> None:
        for _ in range(repeats):
            work()

    def turn(log: Callable[[int], Any]) -> float:
        def some(tens: int) -> None:
            nonlocal count
            for _ in range(tens):
                count += 1
                log(count)
                for _ in range(10):
                    step()
        some(6)  # what the sinks' processes do now was logged in the turn before
        return timed(lambda: some(10)) / 100

    def log(count: int) -> None:
        door.log(count, "train", metrics)

    with open_sinks(config, folder, "0" * 32) as door, by_hand(folder / "by-hand", config.mlflow_dir) as libraries:
        door.event("run_start", config={}, environment={}, global_step=0, epochs=1)
        turn(log)
        time.sleep(10)  # until all have come up
        usual = added(door, step, log, every=10, turns=2 if quick else 12, steps=steps)
        often = added(door, step, log, every=2, turns=2 if quick else 4, steps=steps)
        theirs, ours, bare = in_turn(2 if quick else 30, lambda: turn(lambda count: libraries(count, metrics)),
                                     lambda: turn(log), lambda: turn(lambda count: None))
        failed = dict(door.errors)
    torch.set_num_threads(threads)
    if failed:
        raise RuntimeError(f"the figure is worth nothing: {failed}")
    return [Figure("sinks add", "% of a step", "all sinks, every 10th step", usual, "what they may take", [1.0] * len(usual), target=1.0),
            Figure("sinks add", "% of a step", "all sinks, every 2nd step", often, "what they may take", [1.0] * len(often)),
            Figure("a watched step", "ms", "all sinks, every 10th step", ours, "the bare step", bare),
            Figure("a watched step", "ms", "all sinks, every 10th step", ours, "the libraries, called", theirs)]


def added(door: Sinks, step: Callable[[], None], log: Callable[[int], Any], every: int, turns: int, steps: int) -> list[float]:
    """What the sinks add to a step, in percent of ten milliseconds, in each of `turns` turns.

    A machine's speed varies by more than that from one second to the next, and the sinks' processes work half a second after they were
    told to. So it is put together: the time in `log`, and by least squares how much longer a step takes per second of work that the
    processes and the threads of sinks do beside it, and after a `log`, which leaves cold caches.
    What sinks do for a second at a stretch is taken for the machine's speed; the longest, MLflow's batch, takes
    a quarter of that."""
    processes = [psutil.Process(sink.process.pid) for sink in door.sinks.values() if isinstance(sink, SinkProcess)]
    clocks = [~process.pid << 3 | 2 for one in processes for process in (one, *one.children(recursive=True))]  # Linux: of all its threads

    def spent() -> tuple[float, float]:
        return sum(map(time.clock_gettime, clocks)), time.process_time() - time.thread_time()

    def measured(count: int) -> tuple[float, ...]:
        logs, before = count % every == 0, spent()
        took = timed(lambda: log(count)) if logs else 0.0
        return took, timed(step), logs, *(now - then for now, then in zip(spent(), before, strict=True))

    found = []
    for number in range(turns):
        took, stepped, *causes = np.array([measured(number * steps + index) for index in range(steps)]).T
        longer = stepped - np.array([np.median(stepped[max(0, at - 100):at + 101]) for at in range(steps)])  # than those around it
        causes = [cause for cause in causes if cause.min() < cause.max()]
        weights = np.linalg.lstsq(np.stack([np.ones(steps), *causes], 1), longer, rcond=None)[0][1:]
        found.append(float(100 * (took.mean() + sum(weight * cause.mean() for weight, cause in zip(weights, causes, strict=True))) / 0.01))
    return found


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
