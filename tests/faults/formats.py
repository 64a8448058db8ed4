"""The same tensors in other formats, and what each makes of one flipped bit. Run in a child: a parser may crash on what it is given."""

import io
import json
import os
import resource
import shutil
import signal
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from codex_ml.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint

State = dict[str, torch.Tensor]
OUTCOMES = ("refused", "unchanged", "silent", "crashed")


def tensors() -> State:
    generator = torch.Generator().manual_seed(1)
    shapes = {"layers.0.weight": (16, 6), "layers.0.bias": (16,), "layers.2.weight": (3, 16), "layers.2.bias": (3,)}
    return {f"{kind}.{name}": torch.randn(*shape, generator=generator) for kind in ("model", "exp_avg", "exp_avg_sq")
            for name, shape in shapes.items()}


class Format:
    """Where the bytes are, and how they are read."""

    def __init__(self, name: str, save: Callable[[Path, State], None], load: Callable[[Path], Any], files: str):
        self.name, self.save, self.load, self.files = name, save, load, files

    def spoil(self, folder: Path, wanted: Iterable[tuple[int, int, int]]) -> dict[str, int]:
        """Outcomes of flips, each (file, byte, bit); the files in their order by name."""
        paths = sorted(folder.glob(self.files))
        good, expected = [p.read_bytes() for p in paths], tensors()
        counts = dict.fromkeys(OUTCOMES, 0)
        for file, at, bit in wanted:
            spoilt = bytearray(good[file])
            spoilt[at] ^= 1 << bit
            paths[file].write_bytes(spoilt)
            counts[_outcome(self, folder, expected)] += 1
            paths[file].write_bytes(good[file])
        return counts

    def flips(self, folder: Path, step: int = 1) -> list[tuple[int, int, int]]:
        """One bit of every `step`-th byte of every file."""
        sizes = [p.stat().st_size for p in sorted(folder.glob(self.files))]
        places = [(file, at) for file, size in enumerate(sizes) for at in range(size)]
        return [(file, at, i % 8) for i, (file, at) in enumerate(places[::step])]


def _outcome(how: Format, folder: Path, expected: State) -> str:
    signal.alarm(20)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = how.load(folder)
        same = isinstance(found, dict) and found.keys() == expected.keys() and all(
            isinstance(found[k], torch.Tensor) and found[k].dtype == v.dtype and found[k].shape == v.shape
            and found[k].view(torch.int32).equal(v.view(torch.int32)) for k, v in expected.items())
    except BaseException:
        return "refused"
    finally:
        signal.alarm(0)
    return "unchanged" if same else "silent"


def tried(how: Format, folder: Path, wanted: list[tuple[int, int, int]]) -> dict[str, int]:
    """`spoil` in children with limited memory; one that dies counts as a crash of the flip that it was at."""
    total = dict.fromkeys(OUTCOMES, 0)
    good = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    while wanted:
        source, told = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                resource.setrlimit(resource.RLIMIT_AS, (1 << 36, 1 << 36))
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                os.dup2(null, 2)
                for flip in wanted:
                    counts = how.spoil(folder, [flip])
                    os.write(told, json.dumps(next(k for k, v in counts.items() if v)).encode() + b"\n")
            finally:
                os._exit(0)
        os.close(told)
        with os.fdopen(source) as pipe:
            outcomes = [json.loads(line) for line in pipe if line.endswith("\n")]
        os.waitpid(pid, 0)
        for outcome in outcomes:
            total[outcome] += 1
        if len(outcomes) < len(wanted):
            total["crashed"] += 1
            for path, content in good.items():
                path.write_bytes(content)
        wanted = wanted[len(outcomes) + 1:]
    return total


def _codex_save(folder: Path, state: State) -> None:
    facts = {"epoch": 1, "global_step": 10, "checkpoint_sha256": None, "schema_version": "v1"}
    save_checkpoint(folder, "epoch-0001", {"epoch": 1, "global_step": 10, "tensors": state}, facts, {})


def _codex_load(folder: Path) -> Any:
    return load_checkpoint(list_checkpoints(folder)[0])["tensors"]


def _torch_load(folder: Path) -> Any:
    return torch.load(io.BytesIO((folder / "state.pt").read_bytes()), weights_only=True)


def _safetensors_save(folder: Path, state: State) -> None:
    from safetensors.torch import save_file

    save_file(state, folder / "state.safetensors")


def _safetensors_load(folder: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(folder / "state.safetensors")


def _dcp_save(folder: Path, state: State) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)


def _dcp_load(folder: Path) -> Any:
    import torch.distributed.checkpoint as dcp

    found = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    dcp.load(found, checkpoint_id=folder / "dcp", no_dist=True)
    return found


def formats() -> list[Format]:
    """Those that are installed."""
    import importlib.util

    found = [Format("codex_ml", _codex_save, _codex_load, "epoch-0001/checkpoint.pt"),
             Format("torch.save, torch.load", lambda folder, state: torch.save(state, folder / "state.pt"), _torch_load, "state.pt")]
    if importlib.util.find_spec("safetensors"):
        found.append(Format("safetensors", _safetensors_save, _safetensors_load, "state.safetensors"))
    return [*found, Format("torch.distributed.checkpoint", _dcp_save, _dcp_load, "dcp/*.distcp"),
            Format("torch.distributed.checkpoint, its .metadata", _dcp_save, _dcp_load, "dcp/.metadata")]


def made(how: Format, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how.save(folder, tensors())
    return folder
