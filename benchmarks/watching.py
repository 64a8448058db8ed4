"""What it costs a run to be watched."""

import time
from pathlib import Path

import torch

from benchmarks.measure import Figure, in_turn, timed
from codex_ml.config import TrainConfig
from codex_ml.telemetry.record import encode, snapshot_record
from codex_ml.telemetry.sinks import Background, open_sinks
from codex_ml.telemetry.system import SystemSampler


def work() -> None:
    """About ten milliseconds of arithmetic on one core."""
    left = torch.ones(560, 560)
    for _ in range(2):
        left = left @ left * 1e-3


def sinks(folder: Path, quick: bool) -> list[Figure]:
    """Steps of ten milliseconds on one core, with every local sink on, beside the bare steps: with a record of each metric at every
    tenth step, as is usual, and at every one. A turn ends with a flush, as an epoch does, and when the threads have nothing left to do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    repeats = max(1, round(0.01 / min(timed(work) for _ in range(20))))
    config = TrainConfig(tensorboard=True, wandb_enable=True, mlflow_enable=True, mlflow_dir=str(folder.resolve() / "mlflow"),
                         system_metrics_interval=10.0)
    config.monitoring.alerts |= {"nan": True, "spike": True}
    steps, count = 50 if quick else 100, 0

    def bare() -> None:
        for _ in range(repeats):
            work()

    def watched(every: int) -> float:
        nonlocal count
        begun = time.perf_counter()
        for _ in range(steps):
            bare()
            count += 1
            if count % every == 0:
                door.log(count, "train", {"loss": 0.25, "lr": 1e-3, "step_time": 0.01, "data_time": 1e-4})
        door.flush()
        while any(sink.calls.qsize() for sink in door.sinks.values() if isinstance(sink, Background)):
            time.sleep(1e-4)
        return (time.perf_counter() - begun) / steps

    with open_sinks(config, folder, "0" * 32) as door:
        door.event("run_start", config={}, environment={}, global_step=0, epochs=1)
        watched(10)  # until all have come up
        time.sleep(3)
        often, usual, theirs = in_turn(5 if quick else 41, lambda: watched(1), lambda: watched(10),
                                       lambda: timed(lambda: [bare() for _ in range(steps)]) / steps)
        failed = dict(door.errors)
    torch.set_num_threads(threads)
    if failed:
        raise RuntimeError(f"the figure is worth nothing: {failed}")
    return [Figure("a watched step", "ms", "all sinks, every 10th step", usual, "the bare step", theirs, target=1.01),
            Figure("a watched step", "ms", "all sinks, every step", often, "the bare step", theirs)]


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
