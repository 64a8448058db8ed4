"""What a run does to its folder, piece by piece: something to begin with, something done, and what must hold wherever it was cut off.

A scenario's `act` calls `ack(name)` when something was promised: from then on no fault may take it away. `check` goes on from whatever
state the folder is in, as a resumed run does, and raises `AssertionError` where a promise is broken.
"""

import importlib.util
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from disk_model import DEAD

from codex_ml.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, read_pointer, save_checkpoint, write_pointer
from codex_ml.durable import CorruptFile, sha256_file, write_atomic
from codex_ml.run_folder import RunFolder
from codex_ml.telemetry.appender import Appender
from codex_ml.telemetry.ndjson import NdjsonWriter, _sync_and_close, read_ndjson
from codex_ml.telemetry.record import encode, scalar_record
from codex_ml.telemetry.segments import pack
from codex_ml.utils.retention import prune_checkpoints

Ack = Callable[[str], None]
LEFT = re.compile(r"\.(tmp|trash)-")
MANIFEST = {"python": "3", "model_params": 60}


def place(name: str) -> tuple[int, int]:
    """Epoch and step: ten steps an epoch."""
    number = int(name.rpartition("-")[2])
    return (number, 10 * number) if name.startswith("epoch-") else (number // 10, number)


def state_of(name: str, version: str = "") -> dict[str, Any]:
    epoch, step = place(name)
    generator = torch.Generator().manual_seed(sum(map(ord, name + version)))
    return {"epoch": epoch, "global_step": step, "note": name + version, "model": {"w": torch.randn(12, 5, generator=generator)}}


def facts_of(name: str, loss: float = 1.0) -> dict[str, Any]:
    epoch, step = place(name)
    return {"epoch": epoch, "created_at": "2026-01-01T00:00:00Z", "avg_loss": loss, "checkpoint_sha256": None, "global_step": step,
            "schema_version": "v1"}


def is_whole(state: dict[str, Any], name: str, versions: Sequence[str] = ("",)) -> bool:
    """The very state that was saved under a name, and not one bit of another."""
    for version in versions:
        wanted = state_of(name, version)
        if {**state, "model": 0} == {**wanted, "model": 0}:
            return state["model"]["w"].equal(wanted["model"]["w"])
    return False


def put(run: Path, name: str, loss: float = 1.0, version: str = "") -> None:
    run.mkdir(parents=True, exist_ok=True)
    checkpoint = save_checkpoint(run, name, state_of(name, version), facts_of(name, loss), MANIFEST)
    write_pointer(run, {"epoch": checkpoint.epoch, "path": name, "checkpoint_sha256": checkpoint.sha256, "schema_version": "v1"})


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@contextmanager
def opened(run: Path, signing: Any = None) -> Iterator[RunFolder]:
    """A run's folder, which signs and asks for signatures where it is told how."""
    with RunFolder(run) as folder:
        if signing is not None:
            folder.signing = signing
        yield folder


def resume(run: Path, *, strict: bool = True, versions: Sequence[str] = ("",), signing: Any = None) -> str | None:
    """What a resumed run does with its folder before its first step; the name that it goes on from."""
    with opened(run, signing) as folder:
        checkpoint, state, _ = folder.newest(strict=strict)  # a fault that is no damage leaves nothing to complain of
        if checkpoint is None:
            folder.begin()
            return None
        assert is_whole(state, checkpoint.name, versions), f"{checkpoint.name} holds another state than was saved"
        folder.go_on(checkpoint)
        pointer, wrong = read_pointer(run)
        assert pointer is not None and pointer["path"] == checkpoint.name and not wrong, wrong
        left = [p.name for p in run.iterdir() if LEFT.match(p.name)]
        assert not left, f"left over: {left}"
        for other in list_checkpoints(run):
            try:
                assert is_whole(load_checkpoint(other), other.name, versions)
            except CorruptFile as error:
                assert other.place < checkpoint.place and not strict, f"a broken checkpoint under a good name: {error}"
        return checkpoint.name


def go_on(run: Path, promised: Sequence[str], *, strict: bool = True, versions: Sequence[str] = ("",), signing: Any = None) -> str | None:
    """`resume`, then once more with a save; each comes to what was promised last, or to what was saved after it."""
    name = resume(run, strict=strict, versions=versions, signing=signing)
    if promised:
        assert name is not None, f"{promised[-1]} was acknowledged, and nothing was found"
        assert place(name) >= place(promised[-1]), f"{promised[-1]} was acknowledged, and {name} was found"
    following = f"epoch-{place(name)[0] + 1 if name else 1:04d}"
    with opened(run, signing) as folder:
        checkpoint, _, _ = folder.newest()
        assert (checkpoint and checkpoint.name) == name, "a second resume finds another checkpoint"
        if checkpoint:
            folder.go_on(checkpoint)
        folder.save(following, state_of(following), facts_of(following), MANIFEST)
        checkpoint, state, problems = folder.newest(strict=strict)
    assert checkpoint is not None and checkpoint.name == following and is_whole(state, following) and not problems
    return name


class Scenario:
    """`run` is the run's folder below the folder that is watched."""

    repeatable = True  # whether it writes the same bytes twice
    raw_errors = False  # whether an `OSError` may leave it as it is; else it must be a `StorageError` or a `CheckpointError`

    @property
    def name(self) -> str:
        return type(self).__name__

    def run(self, base: Path) -> Path:
        return base / "run"

    def prepare(self, base: Path) -> None:
        raise NotImplementedError

    def act(self, base: Path, ack: Ack) -> None:
        raise NotImplementedError

    def check(self, base: Path, acked: Sequence[str]) -> None:
        raise NotImplementedError


class Write(Scenario):
    """One file is replaced."""

    def prepare(self, base):
        (base / "run").mkdir()
        (base / "run" / "file").write_bytes(b"old" * 300)

    def act(self, base, ack):
        write_atomic(base / "run" / "file", lambda out: [out.write(b"new" * 150) for _ in range(3)])
        ack("new")

    def check(self, base, acked):
        content = (base / "run" / "file").read_bytes()
        assert content in ((b"new" * 450,) if acked else (b"old" * 300, b"new" * 450)), f"{len(content)} bytes, neither old nor new"


class Save(Scenario):
    """A mid-epoch checkpoint, then an epoch's; each drops the mid-epoch ones before it."""

    def signing(self) -> Any:
        return None

    def prepare(self, base):
        for name in ("epoch-0001", "epoch-0002", "step-00000025"):
            put(base / "run", name)

    def act(self, base, ack):
        with opened(base / "run", self.signing()) as folder:
            checkpoint, _, _ = folder.newest()
            if checkpoint is None:
                raise CheckpointError("nothing can be read")
            folder.go_on(checkpoint)
            for name in ("step-00000028", "epoch-0003"):
                if place(name) > place(checkpoint.name):
                    folder.save(name, state_of(name), facts_of(name), MANIFEST)
                ack(name)

    def check(self, base, acked):
        go_on(base / "run", ["step-00000025", *acked])
        assert {"epoch-0001", "epoch-0002"} <= {c.name for c in list_checkpoints(base / "run")}


class First(Scenario):
    """A new run: its folder and the folders above it, its configuration, its first checkpoint."""

    def run(self, base):
        return base / "results" / "run"

    def prepare(self, base):
        pass

    def act(self, base, ack):
        with RunFolder(self.run(base)) as folder:
            folder.begin()
            folder.keep_config({"identity": {"seed": 1}}, {"seed": 1})
            folder.save("epoch-0001", state_of("epoch-0001"), facts_of("epoch-0001"), MANIFEST)
            ack("epoch-0001")

    def check(self, base, acked):
        go_on(self.run(base), acked)


class Recover(Scenario):
    """The newest checkpoint and the pointer are damaged, others left things lying about: the run goes on from the one before."""

    def prepare(self, base):
        run = base / "run"
        for name in ("epoch-0001", "step-00000015", "epoch-0002", "step-00000025", "epoch-0003"):
            put(run, name)
        spoil(run / "epoch-0003" / "checkpoint.pt")
        spoil(run / "step-00000025" / "metadata.json")
        (run / "latest.json").write_bytes(b"{")
        shutil.copytree(run / "epoch-0001", run / f".tmp-{DEAD}-0-epoch-0004")
        shutil.copytree(run / "epoch-0001", run / f".trash-{DEAD}-1-epoch-0000")
        (run / f".tmp-{DEAD}-2-latest.json").write_bytes(b"half")

    def act(self, base, ack):
        with RunFolder(base / "run") as folder:
            checkpoint, _, _ = folder.newest()
            if checkpoint is None:
                raise CheckpointError("nothing can be read")
            folder.go_on(checkpoint)
            ack(checkpoint.name)
            folder.save("epoch-0003", state_of("epoch-0003", "b"), facts_of("epoch-0003"), MANIFEST)
            ack("epoch-0003")

    def check(self, base, acked):
        run = base / "run"
        if acked == ["epoch-0002"]:
            assert not any((run / name).exists() for name in ("step-00000025",)), "it was moved aside, and is back"
        name = go_on(run, ["epoch-0002", *acked], strict=False, versions=("", "b"))
        assert name in ("epoch-0002", "epoch-0003")


class InTheWay(Scenario):
    """A checkpoint is saved under a name that a broken one has: what was there is moved, not lost."""

    def prepare(self, base):
        put(base / "run", "epoch-0001")
        put(base / "run", "epoch-0002")
        spoil(base / "run" / "epoch-0002" / "checkpoint.pt")
        shutil.copy(base / "run" / "epoch-0002" / "checkpoint.pt", base / "broken")

    def act(self, base, ack):
        put(base / "run", "epoch-0002", version="b")
        ack("epoch-0002")

    def check(self, base, acked):
        run, broken = base / "run", (base / "broken").read_bytes()
        found = [p.read_bytes() for p in run.glob("**/epoch-0002/checkpoint.pt")]
        assert broken in found, "what was in the way is lost"
        name = go_on(run, ["epoch-0001", *acked], strict=False, versions=("", "b"))
        assert name in ("epoch-0001", "epoch-0002")


def load(folder: Path) -> dict[str, Any] | None:
    """The state in a checkpoint's folder, wherever it lies; None where there is none that is whole."""
    found = [c for c in list_checkpoints(folder.parent) if c.name == folder.name]
    try:
        return load_checkpoint(found[0]) if found else None
    except CorruptFile:
        return None


class Prune(Scenario):
    """Six epochs, of which the last two and the best stay."""

    losses = (3.0, 1.0, 2.5, 2.4, 2.3, 2.2)

    def prepare(self, base):
        for epoch, loss in enumerate(self.losses, 1):
            put(base / "run", f"epoch-{epoch:04d}", loss)

    def act(self, base, ack):
        report = prune_checkpoints(base / "run", keep_last=2)
        if not report["failed"]:
            ack("pruned")

    def check(self, base, acked):
        there = {c.name for c in list_checkpoints(base / "run")}
        assert {"epoch-0002", "epoch-0005", "epoch-0006"} <= there, f"of those that stay, only {sorted(there)} are there"
        if acked:
            assert len(there) == 3, "what was deleted is back"
        go_on(base / "run", ["epoch-0006"])
        prune_checkpoints(base / "run", keep_last=2)
        assert {c.name for c in list_checkpoints(base / "run")} == {"epoch-0002", "epoch-0006", "epoch-0007"}


class Begin(Scenario):
    """A new run in a folder that holds another: the other is moved aside, whole."""

    files = ("config.resolved.json", "config.snapshot.json", "tokenizer.json")

    def prepare(self, base):
        for name in ("epoch-0001", "epoch-0002", "epoch-0003"):
            put(base / "run", name)
        for file in self.files:
            (base / "run" / file).write_text(json.dumps({"file": file}))

    def act(self, base, ack):
        with RunFolder(base / "run") as folder:
            folder.begin()
            ack("moved")
            folder.save("epoch-0001", state_of("epoch-0001", "b"), facts_of("epoch-0001"), MANIFEST)
            ack("epoch-0001")

    def check(self, base, acked):
        run = base / "run"
        for name in ("epoch-0001", "epoch-0002", "epoch-0003"):
            found = [load(p) for p in (run / name, *run.glob(f"aside-*/{name}"))]
            assert any(state and state["note"] == name for state in found), f"{name} of the earlier run is lost"
        for file in self.files:
            found = [json.loads(p.read_bytes()) for p in (run / file, *run.glob(f"aside-*/{file}")) if p.exists()]
            assert {"file": file} in found, f"{file} of the earlier run is lost"
        if acked:
            assert not {"epoch-0002", "epoch-0003"} & {c.name for c in list_checkpoints(run)}, "the earlier run is back"
        name = go_on(run, acked[1:], strict=False, versions=("", "b"))  # the pointer may name what was moved
        assert len(acked) < 2 or name == "epoch-0001"


class Configuration(Scenario):
    """Snapshots of the configuration: a different one that was there is kept."""

    notes = ("first", "second", "third")

    def prepare(self, base):
        put(base / "run", "epoch-0001")
        (base / "run" / "config.snapshot.json").write_text(json.dumps({"note": "first"}))

    def act(self, base, ack):
        with RunFolder(base / "run") as folder:
            for note in self.notes[1:]:
                folder.keep_config({"note": note}, {"note": note})
                ack(note)

    def check(self, base, acked):
        run = base / "run"
        kept = [json.loads(p.read_bytes())["note"] for p in run.glob("config.snapshot*.json")]
        assert {"first", *acked} <= set(kept), f"of {['first', *acked]} only {kept} are kept"
        if acked:
            assert json.loads((run / "config.resolved.json").read_bytes())["note"] in self.notes[self.notes.index(acked[-1]):]
        with RunFolder(run) as folder:
            folder.keep_config({"note": "last"}, {"note": "last"})
        assert json.loads((run / "config.snapshot.json").read_bytes()) == {"note": "last"}
        go_on(run, ["epoch-0001"])


class Rotate(Scenario):
    """Metrics whose file is cut every few lines, compressed, and waited for now and then."""

    raw_errors = True  # the door in front of the sinks catches them, and counts
    rounds, each = 6, 2

    def run(self, base):
        return base / "run" / ".codex"

    def prepare(self, base):
        pass

    def line(self, step: int) -> dict[str, Any]:
        return scalar_record("r", step, "train", "loss", 0.5, tags={"pad": "x" * 300}, timestamp="2026-11-24T08:30:00.000000Z")

    def act(self, base, ack):
        writer = NdjsonWriter(self.run(base) / "metrics.ndjson", max_bytes=1600, backups=9, fsync_seconds=None)
        try:
            for step in range(self.rounds * self.each):
                writer.emit(self.line(step))
                if step % self.each == self.each - 1:
                    writer.flush()
                    ack(str(step))
        finally:
            writer.close()

    def check(self, base, acked):
        path = self.run(base) / "metrics.ndjson"
        found = self.steps(path)
        wanted = list(range(int(acked[-1]) + 1 if acked else 0))
        assert found[:len(wanted)] == wanted and found == sorted(set(found)), f"up to {len(wanted)} were flushed, found {found}"
        writer = NdjsonWriter(path, max_bytes=1600, backups=99)
        writer.emit(self.line(1000))
        writer.flush()
        writer.close()
        assert self.steps(path) == [*found, 1000]
        assert not [p.name for p in path.parent.iterdir() if LEFT.match(p.name)]

    def steps(self, path: Path) -> list[int]:
        import warnings

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                records, _ = read_ndjson(path)
        except FileNotFoundError:
            return []
        for record in records:
            assert record == json.loads(json.dumps(self.line(record["step"]))), "a line that nobody wrote"
        return [record["step"] for record in records]


class Pack(Rotate):
    """The same step by step in one thread: cut, compress at once or after the next sync, sync now and then."""

    def act(self, base, ack):
        cuts: list[int] = []
        path = self.run(base) / "metrics.ndjson"
        appender = Appender(path, max_bytes=1600, on_cut=lambda: cuts.append(len(cuts)))
        try:
            for step in range(self.rounds * self.each):
                before = len(cuts)
                appender.append(encode(self.line(step)))
                if len(cuts) > before and len(cuts) % 2 == 0:
                    pack(path, 9)
                if step % self.each == self.each - 1:
                    for fd in appender.unsynced():
                        _sync_and_close(fd)
                    ack(str(step))
                    pack(path, 9)
        finally:
            appender.close()


class History(Scenario):
    """What runs do to one folder over their lives, in an order drawn from a seed: save, prune, stop and go on, change their configuration.
    What is promised at each step is acknowledged: the last place, the names that must be there, the configurations that must be kept.
    """

    def __init__(self, seed: int, length: int = 14):
        self.seed, self.length = seed, length

    def prepare(self, base):
        put(base / "run", "epoch-0001", 5.0)

    def act(self, base, ack):
        rng, run, at, notes = random.Random(self.seed), base / "run", 10, 0
        must, saved = {"epoch-0001"}, "epoch-0001"
        loss = {"epoch-0001": 5.0}
        for _ in range(self.length):
            what = rng.choice(("step", "step", "epoch", "epoch", "epoch", "prune", "prune", "note"))
            with RunFolder(run) as folder:  # each as a process of its own
                checkpoint, _, _ = folder.newest()
                if checkpoint is None:
                    raise CheckpointError("nothing can be read")
                folder.go_on(checkpoint)
                if what in ("step", "epoch"):
                    at = at // 10 * 10 + 10 if what == "epoch" else min(at + rng.randint(1, 4), at // 10 * 10 + 9)
                    name = f"epoch-{at // 10:04d}" if what == "epoch" else f"step-{at:08d}"
                    if place(name) <= place(saved):
                        continue
                    loss[name] = rng.uniform(1, 9)
                    folder.save(name, state_of(name), facts_of(name, loss[name]), MANIFEST)
                    saved, must = name, {n for n in must if n.startswith("epoch-")} | {name}
                    ack(f"must {saved} {' '.join(sorted(must))}")
                elif what == "note":
                    notes += 1
                    folder.keep_config({"note": str(notes)}, {"note": str(notes)})
                    ack(f"note {notes}")
            epochs = sorted((n for n in must if n.startswith("epoch-")), key=place)
            if what == "prune":
                keep = {*epochs[-2:], saved, min(epochs, key=lambda n: (loss[n], n))}
                must = must & keep
                ack(f"must {saved} {' '.join(sorted(must))}")  # from here on no more is promised
                prune_checkpoints(run, keep_last=2)

    def check(self, base, acked):
        run = base / "run"
        last = [line.split()[1:] for line in acked if line.startswith("must ")]
        saved, *must = last[-1] if last else ("epoch-0001", "epoch-0001")
        there = {c.name for c in list_checkpoints(run)}  # `go_on` verifies each
        newest = max(map(place, there), default=(0, 0))
        for name in must:
            if name.startswith("step-") and newest > place(name):  # replaced by one after it
                continue
            assert name in there, f"{name} was promised, and is gone"
        kept = {json.loads(p.read_bytes())["note"] for p in run.glob("config.snapshot*.json")}
        assert {line.split()[1] for line in acked if line.startswith("note ")} <= kept, f"of the configurations only {kept} are kept"
        go_on(run, [saved])


@lru_cache
def signing() -> Any:
    """A key of these tests, and a demand for its signature."""
    from codex_ml.keys import load_private, new_key
    from codex_ml.signing import Signing

    path = Path(tempfile.mkdtemp()) / "key.pem"
    new_key(path, "password")
    key = load_private(path, "password")
    shutil.rmtree(path.parent)
    return Signing("required", (key.public,), key)


class Sign(Save):
    """A signed run saves, and its signatures are required: a checkpoint is never there without one."""

    repeatable = False

    def signing(self) -> Any:
        return signing()

    def prepare(self, base):
        with opened(base / "run", self.signing()) as folder:
            folder.keep_config({}, {})
            for name in ("epoch-0001", "epoch-0002", "step-00000025"):
                folder.save(name, state_of(name), facts_of(name), MANIFEST)

    def check(self, base, acked):
        run = base / "run"
        go_on(run, ["step-00000025", *acked], signing=self.signing())
        for checkpoint in list_checkpoints(run):
            assert self.signing().problem(checkpoint, RunFolder(run).recorded()["run_id"]) is None


class Keys(Scenario):
    """A key is made and trusted: once that is said, both its halves are there."""

    repeatable = False

    def prepare(self, base):
        pass

    def act(self, base, ack):
        from codex_ml.keys import new_key, trust

        new_key(base / "config" / "mine.pem", "password")
        ack("made")
        trust(base / "config" / "mine.pub.pem", base / "config" / "trusted")
        ack("trusted")

    def check(self, base, acked):
        from codex_ml.keys import load_private, load_public, trusted_keys

        if "made" in acked:
            made = load_private(base / "config" / "mine.pem", "password")
            assert made.public == load_public(base / "config" / "mine.pub.pem")
            assert "trusted" not in acked or made.public in trusted_keys(base / "config" / "trusted")


SCENARIOS: list[Scenario] = [Write(), Save(), First(), Recover(), InTheWay(), Prune(), Begin(), Configuration(), Rotate(), Pack()]
if importlib.util.find_spec("cryptography"):
    SCENARIOS += [Sign(), Keys()]


def digest(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


def prepared(scenario: Scenario, folder: Path) -> Path:
    """A folder in the state that a scenario begins with."""
    folder.mkdir()
    scenario.prepare(folder)
    return folder


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
