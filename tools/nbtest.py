"""Run notebooks as tests, each in a process of its own: what one registers, seeds or imports must not help the next.

`nbdev-test` itself runs several notebooks in one process, in an order that depends on the number of workers.
"""

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.pages import NBS, ROOT, notebooks


def run(notebook: Path, save: bool) -> str:
    """What went wrong, or nothing."""
    command = [Path(sys.executable).parent / "nbdev-test", notebook, *(["--save"] if save else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 and "Success." in done.stdout else done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, default=[NBS], help="notebooks or folders; all of nbs/ if none")
    parser.add_argument("--save", action="store_true", help="keep what they print; make sync afterwards")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at a time")
    given = parser.parse_args()
    wanted = [p.resolve() for p in given.paths]
    missing = [str(p) for p in wanted if not p.exists()]
    if missing:
        sys.exit(f"nbtest: there is no {', '.join(missing)}")
    found = [n for n in notebooks() if any(n == p or p in n.parents for p in wanted)]
    found = [n for n in found if not (n.parent / ".notest").exists()]  # papermill runs these, in tests/
    with ThreadPoolExecutor(given.jobs) as pool:
        faults = dict(zip(found, pool.map(lambda n: run(n, given.save), found), strict=True))
    failed = [n.relative_to(ROOT).as_posix() for n in found if faults[n]]
    print(*(f"---- {n.relative_to(ROOT)}\n{faults[n]}" for n in found if faults[n]), sep="\n", end="")
    if failed or not found:
        sys.exit(f"nbtest: {len(failed)} of {len(found)} notebooks failed: {', '.join(failed)}")
    print(f"nbtest: {len(found)} notebooks passed")


if __name__ == "__main__":
    main()
