"""The golden run: a refactoring leaves its hash as it is, or the changelog says why not.

It trains a small GPT with dropout, accumulation, clipping and a warmed-up cosine on text that is made here, on one thread, with the
instruction set capped, so that one hash holds on every x86-64 machine with the same torch. For another torch, or after a change of bits
that is meant: `python tests/test_golden.py --write`, and an entry in CHANGELOG.md.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

GOLDEN = Path(__file__).with_name("golden.json")
CAPPED = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "1"}
WORDS = "model_name=tiny model_args.dropout=0.1 block_size=32 batch_size=8 epochs=3 steps_per_epoch=10 grad_accum=3 grad_clip=0.5 " \
        "threads=1 learning_rate=0.003 scheduler.type=cosine scheduler.warmup=3 scheduler.interval=step progress=off device=cpu"


def key() -> str:
    """What a golden hash holds for."""
    import torch

    return f"torch {torch.__version__.partition('+')[0]}, {platform.machine()}"


def golden_run(folder: Path) -> str:
    """The hash of the run, made in a process of its own."""
    text = "".join(f"{i} times {i % 7} is {i * (i % 7)}\n" for i in range(800))
    (folder / "text.txt").write_text(text)
    words = [f"data={folder / 'text.txt'}", f"checkpoint.dir={folder / 'run'}", *WORDS.split()]
    command = [sys.executable, "-m", "codex_ml.cli.train", *words]
    subprocess.run(command, check=True, cwd=folder, env={**os.environ, **CAPPED}, stdout=subprocess.DEVNULL, timeout=120)
    return json.loads((folder / "run" / "latest.json").read_text())["checkpoint_sha256"]


def test_golden_run(tmp_path):
    golden = json.loads(GOLDEN.read_text())
    if key() not in golden:
        pytest.skip(f"no golden hash for {key()} yet: python tests/test_golden.py --write")
    assert golden_run(tmp_path) == golden[key()]


if __name__ == "__main__" and "--write" in sys.argv:
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    golden[key()] = golden_run(Path(tempfile.mkdtemp()))
    GOLDEN.write_text(json.dumps(golden, indent=2) + "\n")
    print(key(), golden[key()])
