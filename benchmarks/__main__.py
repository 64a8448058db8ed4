"""Figures of this machine, each beside what one would write by hand, measured in turns in the same run.

Absolute times belong to the machine and to whoever else uses it. The ratio is the median over the pairs of turns; half of the
pairs lie in the range behind it. A target is a ratio to stay under.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.checkpoints import load, memory, save, verify
from benchmarks.fingerprints import fingerprints
from benchmarks.measure import Figure
from benchmarks.starts import first_batch, imports, record
from benchmarks.steps import gpt_step, mlp_step
from benchmarks.telemetry import scalar, summary
from benchmarks.watching import sampler, sinks

BENCHMARKS = {f.__name__: f for f in (mlp_step, gpt_step, save, load, verify, memory, first_batch, imports, record, scalar, summary, sinks,
                                     sampler, fingerprints)}
SCALE = {"ms": 1e3, "µs": 1e6}  # times are kept in seconds
COLUMNS = "{:29}{:27}{:>8}   {:33}{:>9}{:>9}  {:16}{}"


def row(figure: Figure) -> str:
    """A line of the table."""
    scale, (low, ratio, high) = SCALE.get(figure.unit, 1), figure.quartiles
    ours, theirs = (f"{statistics.median(values) * scale:.2f}" for values in (figure.ours, figure.theirs))
    target = f"<= {figure.target:g}{'' if ratio <= figure.target else '  missed'}" if figure.target else ""
    spread = f"{low:.3g} - {high:.3g}" if len(figure.ours) > 1 else ""
    what = f"{figure.what} ({figure.unit})"
    return COLUMNS.format(what, figure.name, ours, figure.rival, theirs, f"{ratio:.4g}", spread, target).rstrip()


def main() -> None:
    """Run the benchmarks asked for and print their table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}; all where none is given")
    parser.add_argument("--quick", action="store_true", help="fewer turns and smaller states")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch where a benchmark does not say; else its own choice")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file as well")
    args = parser.parse_args()
    if unknown := set(args.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(),
               "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    print(", ".join(f"{name} {value}" for name, value in machine.items()) + "\n")
    print(COLUMNS.format("", "codex_ml", "median", "beside it", "median", "ratio", "half of pairs", "target"))
    figures: list[Figure] = []
    for name in args.names or BENCHMARKS:
        with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as folder:  # here, since /tmp may lie in memory
            for figure in BENCHMARKS[name](Path(folder), args.quick):
                print(row(figure), flush=True)
                figures.append(figure)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "figures": [figure.as_dict() for figure in figures]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
