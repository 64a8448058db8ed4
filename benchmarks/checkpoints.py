"""Saving and loading beside torch.save, torch.load and a hash."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.measure import Figure, in_turn, timed
from codex_ml.checkpoint import load_checkpoint, save_checkpoint
from codex_ml.durable import sha256_file
from codex_ml.integrity import verify_run

PLACE = {"epoch": 1, "global_step": 10}


def state_of(megabytes: int) -> dict[str, object]:
    """A state of so many megabytes in 16 tensors."""
    return {"model": {str(i): torch.randn(megabytes * 1_000_000 // 64) for i in range(16)}, **PLACE}


def save(folder: Path, quick: bool) -> list[Figure]:
    """One pass (serialise, hash, write, fsync, rename) against three."""
    state = state_of(64 if quick else 256)

    def by_hand() -> None:
        torch.save(state, folder / "by-hand.pt")
        with open(folder / "by-hand.pt", "rb") as file:
            hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())

    def ours() -> float:
        seconds = timed(lambda: save_checkpoint(folder, "epoch-0001", state, dict(PLACE), {}))
        shutil.rmtree(folder / "epoch-0001")
        return seconds

    def theirs() -> float:
        seconds = timed(by_hand)
        (folder / "by-hand.pt").unlink()
        return seconds

    figures = in_turn(3 if quick else 11, ours, theirs)
    return [Figure("save", "ms", "save_checkpoint", figures[0], "torch.save, hash, fsync", figures[1], target=1.0)]


def load(folder: Path, quick: bool) -> list[Figure]:
    """A verified load: it cannot be faster than the hash, and should be hardly slower."""
    checkpoint = save_checkpoint(folder, "epoch-0001", state_of(64 if quick else 256), dict(PLACE), {})
    path = checkpoint.folder / "checkpoint.pt"

    def loading(load: Callable[[], object]) -> float:
        state = []  # held until the clock has stopped: to give the memory back is no part of a load
        return timed(lambda: state.append(load()))

    ours, hashed, plain = in_turn(3 if quick else 11, lambda: loading(lambda: load_checkpoint(checkpoint)),
                                  lambda: timed(lambda: sha256_file(path)), lambda: loading(lambda: torch.load(path, weights_only=True)))
    both = [h + p for h, p in zip(hashed, plain, strict=True)]
    rivals = (("sha256_file", hashed, 1.1), ("torch.load, unverified", plain), ("sha256_file, then torch.load", both))
    return [Figure("verified load", "ms", "load_checkpoint", ours, *rival) for rival in rivals]


def verify(folder: Path, quick: bool) -> list[Figure]:
    """`codex-ml verify` of a run of four checkpoints, beside the hashes of the same files one after the other."""
    for epoch in range(1, 5):
        save_checkpoint(folder, f"epoch-{epoch:04d}", state_of(16 if quick else 64) | {"epoch": epoch}, {**PLACE, "epoch": epoch}, {})
    paths = sorted(folder.glob("epoch-*/checkpoint.pt"))
    assert len(paths) == 4
    ours, hashed = in_turn(3 if quick else 11, lambda: timed(lambda: verify_run(folder)), lambda: timed(lambda: [*map(sha256_file, paths)]))
    return [Figure("a run verified", "ms", "verify_run", ours, "sha256_file, in turn", hashed, target=1.0)]


# VmHWM is the peak of this process alone, set anew by a 5 in clear_refs; ru_maxrss would begin with that of the process that started it.
PEAK = """
import sys
from collections.abc import Callable
from pathlib import Path
from benchmarks.checkpoints import PLACE, save_checkpoint, state_of

def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e6

folder, megabytes = Path(sys.argv[1]), int(sys.argv[2])
state = state_of(megabytes)
save_checkpoint(folder, "epoch-0001", state_of(1), PLACE, {})
Path("/proc/self/clear_refs").write_text("5")
before = peak()
save_checkpoint(folder, "epoch-0002", state, PLACE, {})
print(peak() - before)
"""


def memory(folder: Path, quick: bool) -> list[Figure]:
    """How far a save raises the peak of a process that holds the state, and has saved a small one before. On Linux only."""
    if not Path("/proc/self/clear_refs").exists():
        return []
    megabytes = 64 if quick else 256
    done = subprocess.run([sys.executable, "-c", PEAK, folder, str(megabytes)], stdout=subprocess.PIPE, text=True, check=True)
    return [Figure("memory of a save", "MB", "peak above the state", [float(done.stdout)], "the state itself", [megabytes], target=0.1)]
