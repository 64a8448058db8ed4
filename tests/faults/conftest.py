"""What all tests of faults share: the seed, the size, a fast folder, and the tally from which the table in the docs is made.

`make test` runs them in a size that fits, `make torture` in full. FAULT_SEED repeats a run; without it `make test` takes 1234.
"""

import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `runs`

FULL = os.environ.get("TORTURE") == "1"
SEED = int(os.environ.get("FAULT_SEED", "1234"))
ROWS: list[dict] = []


def pytest_report_header() -> str:
    return f"faults: FAULT_SEED={SEED} TORTURE={int(FULL)}"


@pytest.fixture
def full() -> bool:
    return FULL


@pytest.fixture
def rng(request) -> random.Random:
    """Random choices of one test, repeatable on their own."""
    print(f"FAULT_SEED={SEED}")
    return random.Random(f"{SEED} {request.node.nodeid.rpartition('/')[2]}")


@pytest.fixture
def scratch():
    """A folder in memory where there is one: what is tried here does not depend on a disk, and is tried many thousand times."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=memory if os.access(memory, os.W_OK) else None))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def tally():
    """`tally(section, what, outcome=count, …)`: what was tried, and what came of it."""
    def add(section: str, what: str, **came: int) -> None:
        ROWS.append({"section": section, "what": what, "came": {k: v for k, v in came.items() if v}})

    return add


def pytest_sessionfinish() -> None:
    place = os.environ.get("FAULT_TALLY")
    if place and ROWS:
        Path(place, f"{os.getpid()}.json").write_text(json.dumps(ROWS))
