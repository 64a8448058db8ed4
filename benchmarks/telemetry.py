"""What it costs to log a value, and to look at a million of them."""

import math
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import Figure, in_turn, timed
from codex_ml.telemetry.ndjson import NdjsonWriter
from codex_ml.telemetry.record import encode, scalar_record
from codex_ml.telemetry.summary import summarize

RUN = "0" * 32


def scalar(folder: Path, quick: bool) -> list[Figure]:
    """One value to the file, from the call to the kernel: the record, its line, the write. Beside it, ten microseconds."""
    count, writer = 2000, NdjsonWriter(folder / "metrics.ndjson")

    def ours() -> None:
        for step in range(count):
            writer.emit(scalar_record(RUN, step, "train", "loss", 0.25, tags={"phase": "train"}))

    [seconds] = in_turn(5 if quick else 25, lambda: timed(ours) / count)
    writer.close()
    return [Figure("a scalar", "µs", "NdjsonWriter.emit", seconds, "what it may cost", [1e-5] * len(seconds), target=1.0)]


def write_stream(path: Path, count: int) -> Path:
    """A stream as a run leaves it, of `count` records: 98 % of a training run, the rest of its evaluations. 255 bytes a record."""
    with path.open("wb") as file:
        for i in range(count):
            evaluation, value = i % 50 == 49, 2.5 + math.sin(i) / 3
            split, metric, phase = ("validation", "val_loss", "eval") if evaluation else ("train", ("loss", "lr")[i % 2], "train")
            time = f"2026-11-24T{i // 360_000 % 24:02}:{i // 6000 % 60:02}:{i // 100 % 60:02}.{i % 100:02}0000Z"
            file.write(encode(scalar_record(RUN, i // 2, split, metric, value, "wiki" if evaluation else None, {"phase": phase}, time)))
    return path


# The leanest summary that polars alone makes: only the columns that it needs, their types told, so that nothing is guessed.
SCAN = """
import sys
from pathlib import Path

import polars as pl
from codex_ml.telemetry.summary import summarize

def scan(path):
    texts, value = ("run_id", "split", "metric", "dataset"), pl.col("value")
    lines = pl.scan_ndjson(path, schema={**{name: pl.String for name in (*texts, "timestamp")}, "step": pl.Int64, "value": pl.Float64})
    ends = pl.col("value", "step", "timestamp")
    return lines.group_by(texts).agg(pl.len(), value.min().alias("min"), value.max().alias("max"), value.mean().alias("mean"),
                                     ends.first().name.prefix("first_"), ends.last().name.prefix("last_")).collect()
"""
PEAK = """
def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e6

before = peak()
WORK
print(peak(), peak() - before)
"""


def summary(folder: Path, quick: bool) -> list[Figure]:
    """`summarize` beside a scan of the same file by polars: the time in turns, the memory in a process of its own each (on Linux)."""
    path, names = write_stream(folder / "metrics.ndjson", 100_000 if quick else 1_000_000), {}
    exec(SCAN, names)  # the same text that the processes below run
    ours, theirs = in_turn(3 if quick else 15, lambda: timed(lambda: summarize([path], lambda text: None)),
                           lambda: timed(lambda: names["scan"](path)))
    figures = [Figure("summary", "ms", "summarize", ours, "polars.scan_ndjson", theirs, target=1.5)]
    if not Path("/proc/self/status").exists():
        return figures
    mine, other = _peak("summarize([Path(sys.argv[1])])", path), _peak("scan(sys.argv[1])", path)
    return [*figures, Figure("memory of a summary", "MB", "peak of the process", [mine[0]], "what it may be", [300], target=1.0),
            Figure("memory of a summary", "MB", "peak above the imports", [mine[1]], "polars.scan_ndjson", [other[1]])]


def _peak(work: str, path: Path) -> list[float]:
    done = subprocess.run([sys.executable, "-c", SCAN + PEAK.replace("WORK", work), path], capture_output=True, text=True, check=True)
    return [float(text) for text in done.stdout.split()]
