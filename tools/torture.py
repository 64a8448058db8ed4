"""Run the fault suite in full, and make the table of what was tried and what came of it.

    python -m tools.torture --write            all of it; the table goes into nbs/guides/faults.json
    python -m tools.torture -k power_cuts      a part of it
    python -m tools.torture --seed 7           with other random choices; the seed is printed, and repeats them
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tools.pages import ROOT

TABLE = ROOT / "nbs/guides/faults.json"
ORDER = ["crash points", "errors", "power cuts", "mutants", "kills", "damage", "surroundings", "formats"]


def run(seed: int, jobs: int, kills: int, words: list[str]) -> tuple[int, list[dict[str, Any]]]:
    """pytest's exit status, and the rows that its tests told."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORTURE": "1", "FAULT_SEED": str(seed), "FAULT_TALLY": folder, "KILLS": str(kills),
                       "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "pytest", "tests/faults", "-n", str(jobs), "--dist", "worksteal", "-q", "--durations=10", *words]
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        rows = [row for path in sorted(Path(folder).glob("*.json")) for row in json.loads(path.read_text())]
    return status, rows


def added(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the same thing as one, in the order of the table."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    for row in rows:
        came = found.setdefault((row["section"], row["what"]), {})
        for outcome, count in row["came"].items():
            came[outcome] = came.get(outcome, 0) + count
    return [{"section": section, "what": what, "came": came}
            for (section, what), came in sorted(found.items(), key=lambda item: (ORDER.index(item[0][0]), item[0][1]))]


def total(rows: list[dict[str, Any]], section: str, *outcomes: str) -> int:
    return sum(row["came"].get(outcome, 0) for row in rows if row["section"] == section for outcome in outcomes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "big"), help="of all random choices")
    parser.add_argument("--jobs", type=int, default=2, help="tests at a time")
    parser.add_argument("--kills", type=int, default=1000, help="SIGKILLs of training, and as many of saves and prunes")
    parser.add_argument("--write", action="store_true", help=f"put the table into {TABLE.relative_to(ROOT)}")
    given, words = parser.parse_known_args()
    print(f"torture: seed {given.seed}; to repeat it: python -m tools.torture --seed {given.seed} {' '.join(words)}".rstrip(), flush=True)
    begun = time.monotonic()
    status, rows = run(given.seed, given.jobs, given.kills, words)
    rows, minutes = added(rows), (time.monotonic() - begun) / 60
    for row in rows:
        came = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in row["came"].items())
        print(f"{row['section']:13} {row['what']:60} {came}")
    print(f"torture: {minutes:.0f} minutes, seed {given.seed}, {'all held' if status == 0 else 'SOMETHING DID NOT HOLD: see above'}")
    if given.write and status == 0:
        faults = runpy.run_path(str(ROOT / "tests/faults/test_table.py"))["FAULTS"]
        facts = {"command": "make torture", "seed": given.seed, "minutes": round(minutes), "jobs": given.jobs, "rows": rows,
                 "faults": faults}
        TABLE.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    sys.exit(status)


if __name__ == "__main__":
    main()
