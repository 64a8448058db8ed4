"""Checkpoints that were damaged, swapped, forged or never finished; and bytes that depend on the state alone."""

import errno
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from codex_ml import durable
from codex_ml.archive import canonical, deserialize, serialize
from codex_ml.checkpoint import (
    CheckpointError,
    drop_older_steps,
    list_checkpoints,
    load_checkpoint,
    move_aside,
    newest_verified,
    read_pointer,
    save_checkpoint,
    verify_checkpoint,
    write_pointer,
)
from codex_ml.durable import CorruptFile, StorageError, sha256_file, verified_copy, write_file


def state_of(epoch):
    generator = torch.Generator().manual_seed(epoch)
    return {"epoch": epoch, "global_step": 10 * epoch, "model": {"w": torch.randn(12, 5, generator=generator)}, "note": f"epoch {epoch}"}


def save(folder, epoch, name=None, **changes):
    metadata = {"epoch": epoch, "created_at": "2026-01-01T00:00:00Z", "avg_loss": 1.5, "checkpoint_sha256": None, "global_step": 10 * epoch}
    checkpoint = save_checkpoint(folder, name or f"epoch-{epoch:04d}", state_of(epoch) | changes, metadata | changes, {"python": "3"})
    write_pointer(folder, {"epoch": epoch, "path": checkpoint.name, "checkpoint_sha256": checkpoint.sha256})
    return checkpoint


@pytest.fixture
def three(tmp_path):
    for epoch in (1, 2, 3):
        save(tmp_path, epoch)
    return tmp_path


def same(a, b):
    return a.keys() == b.keys() and a["model"]["w"].equal(b["model"]["w"]) and {**a, "model": 0} == {**b, "model": 0}


def listing(folder):
    return sorted(p.name for p in folder.iterdir())


# ---- damage


def damages(content, step):
    """(what, content) for flipped bits and truncations, `step` bytes apart, and for other ways to spoil a file."""
    for i in [*range(0, len(content), step), len(content) - 1]:
        flipped = bytearray(content)
        flipped[i] ^= 1 << (i % 8)
        yield f"bit {i % 8} of byte {i}", bytes(flipped)
        yield f"cut at {i}", content[:i]
    yield "zeros", bytes(len(content))
    yield "one byte more", content + b"\0"
    yield "twice", content * 2


def test_any_damage_to_a_checkpoint_sends_the_run_to_the_one_before(three):
    path = three / "epoch-0003" / "checkpoint.pt"
    good = path.read_bytes()
    for what, content in damages(good, 7):
        path.write_bytes(content)
        checkpoint, state, problems = newest_verified(three)
        assert checkpoint.name == "epoch-0002" and same(state, state_of(2)), what
        assert len(problems) == 1 and str(path) in problems[0], what
        with pytest.raises(CorruptFile):
            verify_checkpoint(list_checkpoints(three)[0])
    path.write_bytes(good)
    assert newest_verified(three)[0].name == "epoch-0003" and newest_verified(three)[2] == []


def test_damaged_metadata_never_brings_in_another_state(three):
    """A flipped digit of a loss does no harm and cannot be seen; what names the state is checked, and the state is one that was saved."""
    path = three / "epoch-0003" / "metadata.json"
    good = path.read_bytes()
    fallen_back = 0
    for what, content in damages(good, 1):
        path.write_bytes(content)
        checkpoint, state, problems = newest_verified(three)
        assert checkpoint.name in ("epoch-0002", "epoch-0003"), what
        assert same(state, state_of(checkpoint.epoch)), what
        if checkpoint.name == "epoch-0002":
            fallen_back += 1
            assert problems, what
    assert fallen_back > len(good)  # all that are cut, and more


def test_a_damaged_pointer_costs_a_warning_and_no_epoch(three):
    path = three / "latest.json"
    good = path.read_bytes()
    for what, content in damages(good, 1):
        path.write_bytes(content)
        checkpoint, state, _ = newest_verified(three, strict=False)
        assert checkpoint.name == "epoch-0003" and same(state, state_of(3)), what
    for content in (b"", b"{", good[:-10], bytes(100)):
        path.write_bytes(content)
        assert any("latest.json" in problem for problem in newest_verified(three, strict=True)[2])


@pytest.mark.parametrize("pointer", (
    {"path": "../epoch-0003"}, {"path": "/etc/passwd"}, {"path": ""}, {"path": None}, {}, {"path": "epoch-0003\0"}, {"path": "e" * 5000},
    {"path": "epoch-٠٠٠٣"}, {"path": "epoch-0003/../epoch-0001"}, {"path": ["epoch-0003"]}, {"path": "epoch-0003\n"}))
def test_a_pointer_leads_nowhere_else(three, pointer):
    for name in ("latest.json", "latest.json.bak"):
        (three / name).write_text(json.dumps(pointer))
    found, problems = read_pointer(three)
    assert found is None and len(problems) == 2
    assert newest_verified(three)[0].name == "epoch-0003"


def test_the_backup_serves_where_the_pointer_is_broken(three):
    (three / "latest.json").write_text("{")
    found, problems = read_pointer(three)
    assert found["path"] == "epoch-0002" and len(problems) == 1
    shutil.rmtree(three / "epoch-0002")  # as a step checkpoint that was replaced: no reason to complain of it
    assert newest_verified(three, strict=True)[0].name == "epoch-0003"


@pytest.mark.parametrize("file", ("checkpoint.pt", "metadata.json", "both"))
def test_files_of_another_epoch(three, file):
    for name in ("checkpoint.pt", "metadata.json") if file == "both" else (file,):
        shutil.copy(three / "epoch-0001" / name, three / "epoch-0003" / name)
    checkpoint, state, problems = newest_verified(three)
    assert checkpoint.name == "epoch-0002" and same(state, state_of(2))
    assert any("epoch-0003" in problem for problem in problems)


def test_an_older_state_that_is_recorded_as_the_newer(three):
    """The hash is right, and the content is of another place: a rollback."""
    forge(three / "epoch-0003", (three / "epoch-0001" / "checkpoint.pt").read_bytes())
    checkpoint, state, problems = newest_verified(three)
    assert checkpoint.name == "epoch-0002" and same(state, state_of(2)) and "another place" in problems[0]


def test_a_step_folder_with_the_files_of_another(tmp_path):
    for step in (5, 8):
        save(tmp_path, 0, f"step-{step:08d}", global_step=step)
    for name in ("checkpoint.pt", "metadata.json"):
        shutil.copy(tmp_path / "step-00000005" / name, tmp_path / "step-00000008" / name)
    checkpoint, state, problems = newest_verified(tmp_path)
    assert checkpoint.name == "step-00000005" and state["global_step"] == 5 and "step-00000008" in problems[0]


def forge(folder, content):
    """Put `content` in the place of a checkpoint, with its hash recorded as right."""
    (folder / "checkpoint.pt").write_bytes(content)
    path = folder / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checkpoint_sha256": sha256_file(folder / "checkpoint.pt")}))


@pytest.mark.parametrize("sha", ("A" * 64, "0" * 63, "0" * 65, "g" * 64, None, 5, "", ["0" * 64], "0" * 64 + "\n"))
def test_odd_hashes_in_metadata(three, sha):
    path = three / "epoch-0003" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checkpoint_sha256": sha}))
    assert newest_verified(three)[0].name == "epoch-0002"


@pytest.mark.parametrize("epoch", (-1, 3.0, "3", True, None, 10**400, [3]))
@pytest.mark.parametrize("key", ("epoch", "global_step"))
def test_odd_numbers_in_metadata(three, key, epoch):
    path = three / "epoch-0003" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: epoch}))
    checkpoint, state, _ = newest_verified(three)
    assert same(state, state_of(checkpoint.epoch))


@pytest.mark.parametrize("missing", ("checkpoint.pt", "metadata.json", "run_manifest.json"))
def test_a_file_is_missing(three, missing):
    (three / "epoch-0003" / missing).unlink()
    assert newest_verified(three)[0].name == ("epoch-0003" if missing == "run_manifest.json" else "epoch-0002")


@pytest.mark.parametrize("make", (os.mkfifo, lambda p: p.symlink_to("../epoch-0002/checkpoint.pt"), os.mkdir),
                         ids=("fifo", "link", "folder"))
@pytest.mark.parametrize("file", ("checkpoint.pt", "metadata.json"))
def test_an_odd_thing_in_the_place_of_a_file(three, file, make):
    (three / "epoch-0003" / file).unlink()
    make(three / "epoch-0003" / file)
    assert newest_verified(three)[0].name == "epoch-0002"


# ---- forged archives: the hash is right, the content hostile


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def archive(entries, compression=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for name, content in entries:
            file.writestr(name, content)
    return out.getvalue()


def rezip(path, *, drop=(), add=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as file:
        entries = [(name, unchecked(file, name)) for name in file.namelist() if name not in drop]
    return archive([*entries, *add], compression)


def unchecked(file, name):
    """An entry of an archive that carries no CRC."""
    with file.open(name) as entry:
        entry._expected_crc = None
        return entry.read()


@pytest.fixture
def real(three):
    return three / "epoch-0003" / "checkpoint.pt"


def lies_about_sizes(path):
    """The central directory claims an entry of 4 GB."""
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 20:at + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    return bytes(content)


FORGED = {
    "a pickle": lambda real, canary: pickle.dumps(Canary(canary)),
    "an old pickle with a canary": lambda real, canary: old_style(canary),
    "a canary in an archive": lambda real, canary: rezip(real, drop=["archive/data.pkl"],
                                                        add=[("archive/data.pkl", pickle.dumps(Canary(canary), 2))]),
    "a canary beside the state": lambda real, canary: saved({**state_of(3), "x": Canary(canary)}),
    "a script": lambda real, canary: rezip(real, add=[("archive/constants.pkl", b"\x80\x02)."), ("archive/code/x.py", b"")]),
    "deflated": lambda real, canary: rezip(real, compression=zipfile.ZIP_DEFLATED),
    "a bomb": lambda real, canary: rezip(real, add=[("archive/data/9", bytes(1 << 26))], compression=zipfile.ZIP_DEFLATED),
    "bzip2": lambda real, canary: rezip(real, compression=zipfile.ZIP_BZIP2),
    "an entry twice": lambda real, canary: twice(real),
    "lies about sizes": lambda real, canary: lies_about_sizes(real),
    "no state": lambda real, canary: saved([1, 2]),
    "a bare tensor": lambda real, canary: saved(torch.ones(3)),
    "a zip": lambda real, canary: archive([("hello.txt", b"hello")]),
    "an empty zip": lambda real, canary: archive([]),
    "nothing": lambda real, canary: b"",
    "text": lambda real, canary: b"hello" * 100,
    "no tensors": lambda real, canary: rezip(real, drop=["archive/data/0"]),
    "a tensor beyond the file": lambda real, canary: cut_tensor(real),
}


def saved(value):
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def old_style(canary):
    out = io.BytesIO()
    torch.save({**state_of(3), "x": Canary(canary)}, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def cut_tensor(path):
    path.write_bytes(saved(state_of(3) | {"model": {"w": torch.ones(1_000_000)}}))
    return rezip(path, drop=["archive/data/0"], add=[("archive/data/0", b"1234")])


def twice(path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        return rezip(path, add=[("archive/data.pkl", b"x")])


@pytest.mark.filterwarnings("ignore:.*TorchScript archive")
@pytest.mark.parametrize("what", FORGED)
def test_a_forged_archive_runs_no_code_and_is_passed_over(three, real, tmp_path, what):
    canary = tmp_path / "canary"
    forge(real.parent, FORGED[what](real, canary))
    checkpoint, state, problems = newest_verified(three)
    assert not canary.exists()
    assert checkpoint.name == "epoch-0002" and same(state, state_of(2))
    assert str(real) in problems[0] and "\n" not in problems[0]


def test_the_canary_would_sing(real, tmp_path):
    """The forgeries above are worth something: an ordinary load runs them."""
    torch.load(io.BytesIO(FORGED["a canary in an archive"](real, tmp_path / "canary")), weights_only=False)
    assert (tmp_path / "canary").exists()


def test_a_bomb_is_refused_before_it_swells(real):
    forge(real.parent, rezip(real, add=[("archive/data/9", bytes(300 << 20))], compression=zipfile.ZIP_DEFLATED))
    script = """
        import resource, sys
        from codex_ml.checkpoint import CorruptFile, list_checkpoints, load_checkpoint
        newest = list_checkpoints(sys.argv[1])[0]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try: load_checkpoint(newest)
        except CorruptFile as error: assert "compressed" in str(error)
        else: raise AssertionError
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), real.parents[1]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- names


def test_names_are_read_strictly(tmp_path):
    save(tmp_path, 1)
    for name in ("epoch-1", "epoch-001", "epoch-0001 ", "epoch-٠٠٠٢", "epoch--0002", "epoch-0002.tmp", "Epoch-0002", "step-12",
                 "step-0000001", "epoch-" + "9" * 13, "aside-0001", ".tmp-1-0-epoch-0002", "epoch-0002\n"):
        shutil.copytree(tmp_path / "epoch-0001", tmp_path / name)
    (tmp_path / "epoch-0003").write_text("a file")
    (tmp_path / "epoch-0004").symlink_to("epoch-0001")
    (tmp_path / "epoch-0005").symlink_to("/nowhere")
    assert [c.name for c in list_checkpoints(tmp_path)] == ["epoch-0001"]


def test_five_digits_come_after_four(tmp_path):
    for epoch in (9998, 9999, 10_000, 10_001):
        save(tmp_path, epoch)
    assert [c.epoch for c in list_checkpoints(tmp_path)] == [10_001, 10_000, 9999, 9998]
    assert newest_verified(tmp_path)[0].name == "epoch-10001" and read_pointer(tmp_path)[0]["path"] == "epoch-10001"


def test_order_is_by_place_not_by_clock(tmp_path):
    save(tmp_path, 2)
    save(tmp_path, 1)  # written later
    save(tmp_path, 2, "step-00000025", global_step=25)
    assert [c.name for c in list_checkpoints(tmp_path)] == ["step-00000025", "epoch-0002", "epoch-0001"]


def test_a_linked_checkpoint_is_neither_followed_nor_deleted(tmp_path):
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir()
    run.mkdir()
    save(elsewhere, 1, "step-00000010")
    newest = save(run, 2)
    (run / "step-00000010").symlink_to(elsewhere / "step-00000010")
    assert drop_older_steps(run, newest) == []
    assert (run / "step-00000010").is_symlink() and (elsewhere / "step-00000010" / "checkpoint.pt").exists()


def test_a_checkpoint_in_the_way_is_moved_not_overwritten(three):
    before = (three / "epoch-0003" / "checkpoint.pt").read_bytes()
    save(three, 3, note="another")
    assert (three / "aside-0001" / "epoch-0003" / "checkpoint.pt").read_bytes() == before
    assert load_checkpoint(list_checkpoints(three)[0])["note"] == "another"
    (three / "aside-0007").mkdir()
    (three / "aside-x").mkdir()
    assert move_aside(three, ["epoch-0001"]).name == "aside-0008"


def test_strict_tells_the_next_good_one_and_how_to_take_it(three):
    (three / "epoch-0003" / "checkpoint.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"SHA-256 .*The newest good checkpoint is epoch-0002.*checkpoint\.strict=false"):
        newest_verified(three, strict=True)
    shutil.rmtree(three / "epoch-0003")
    with pytest.raises(CheckpointError, match=r"names epoch-0003, which is not there.*epoch-0002"):
        newest_verified(three, strict=True)
    assert newest_verified(three)[0].name == "epoch-0002" and "is not there" in newest_verified(three)[2][0]
    shutil.rmtree(three / "epoch-0002")
    shutil.rmtree(three / "epoch-0001")
    with pytest.raises(CheckpointError, match="checkpoint.resume=false"):
        newest_verified(three, strict=True)
    assert newest_verified(three)[0] is None and newest_verified(three)[2]


def test_a_new_folder_has_nothing_wrong_with_it(tmp_path):
    assert newest_verified(tmp_path / "absent", strict=True) == newest_verified(tmp_path, strict=True) == (None, {}, [])


# ---- failures while saving


class FailingOs:
    """`os` with the k-th call to one of its writing functions failing."""

    def __init__(self, fail_at, code):
        self.count, self.fail_at, self.code = 0, fail_at, code

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in ("open", "write", "fsync", "rename", "replace"):
            return real

        def call(*args, **kwargs):
            self.count += 1
            if self.count == self.fail_at:
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize("code", (errno.ENOSPC, errno.EIO))
def test_a_failure_at_any_operation_of_a_save(tmp_path, monkeypatch, code):
    first = save(tmp_path, 1)
    k, published = 0, 0
    while True:
        k += 1
        failing = FailingOs(k, code)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(durable, "os", failing)
                save(tmp_path, 2)
            if failing.count < k:
                break
        except StorageError as error:
            assert error.errno == code and ("bytes are free" in str(error) or "cannot read" in str(error))
        assert not [name for name in listing(tmp_path) if name.startswith(".")], f"a leftover after operation {k}"
        checkpoint, state, problems = newest_verified(tmp_path)
        assert same(state, state_of(checkpoint.epoch)) and not problems
        if checkpoint.epoch == 2:  # it was published, and the pointer could not be written
            published += 1
            shutil.rmtree(tmp_path / "epoch-0002")
        write_pointer(tmp_path, {"epoch": 1, "path": first.name, "checkpoint_sha256": first.sha256})
    assert k > 50 and 10 < published < 20


def test_a_folder_that_cannot_be_made_is_a_storage_error(three, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.mkdir", fail)
    with pytest.raises(StorageError):
        save(three, 4)
    with pytest.raises(StorageError):
        move_aside(three, ["epoch-0001"])
    assert newest_verified(three)[0].name == "epoch-0003"


def test_a_second_interrupt_inside_a_save_leaves_the_old(three, monkeypatch):
    calls, real = [], os.write

    def write(fd, data):
        calls.append(fd)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(KeyboardInterrupt):
            save(three, 4)
    assert listing(three) == ["epoch-0001", "epoch-0002", "epoch-0003", "latest.json", "latest.json.bak"]


def test_a_state_that_cannot_be_saved_leaves_the_old(three):
    with pytest.raises(CheckpointError, match=r"state\['note'\]\[1\] is a builtins\.set"):
        save(three, 4, note=[1, {2}])
    assert listing(three) == ["epoch-0001", "epoch-0002", "epoch-0003", "latest.json", "latest.json.bak"]


@pytest.mark.parametrize("slip", [
    {"epoch": -3}, {"epoch": 3.0}, {"epoch": "3"}, {"epoch": True}, {"epoch": None}, {"epoch": 2}, {"checkpoint_sha256": "ab"},
    {"checkpoint_sha256": None}, {"checkpoint_sha256": 5}, {"checkpoint_sha256": "ab" * 32},
    {"global_step": 30.0}, {"checkpoint_bytes": 1},
    {"model_params": 5}], ids=str)
@pytest.mark.parametrize("strict", [False, True])
def test_a_field_of_the_pointer_that_cannot_be_costs_a_line(three, slip, strict):
    manifest = three / "epoch-0003/run_manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"model_params": 60}))
    path, [field] = three / "latest.json", slip
    facts = json.loads((three / "epoch-0003/metadata.json").read_text()) | {"model_params": 60}
    whole = {name: facts[name] for name in ("created_at", "global_step", "checkpoint_bytes", "model_params")}
    pointer = json.loads(path.read_text()) | whole
    path.write_text(json.dumps(pointer))
    assert read_pointer(three) == (pointer, [])
    pointer |= slip
    if slip == {"checkpoint_sha256": None}:  # and where it is missing
        del pointer["checkpoint_sha256"]
    path.write_text(json.dumps(pointer))
    found, [problem] = read_pointer(three)
    assert found and found["path"] == "epoch-0002", "the backup"
    assert f"{path} cannot be used: {field}=" in problem and "only a shortcut" in problem and "\n" not in problem
    checkpoint, _, problems = newest_verified(three, strict=strict)
    assert checkpoint and checkpoint.name == "epoch-0003" and problems == [problem]


def test_a_folder_stands_for_its_checkpoint(three, monkeypatch):
    """As it does for `verify_run`: a path is what a person has."""
    known = list_checkpoints(three)[0]
    monkeypatch.chdir(known.folder)
    for path in (known.folder, str(known.folder), f"{known.folder}/", "."):
        assert verify_checkpoint(path) == known.sha256 and same(load_checkpoint(path), state_of(3))
    with pytest.raises(CorruptFile, match="nowhere is no checkpoint: give a folder that is called like epoch-0003"):
        verify_checkpoint(three / "nowhere")
    with pytest.raises(CorruptFile, match="is no checkpoint"):
        load_checkpoint(three)
    (known.folder / "metadata.json").write_text("{")
    with pytest.raises(CorruptFile, match="epoch-0003 cannot be verified"):
        verify_checkpoint(known.folder)


# ---- canonical bytes


def digest(folder, state):
    (folder / "state.pt").unlink(missing_ok=True)
    return write_file(folder / "state.pt", lambda file: serialize(state, file))


def load(written):
    with verified_copy(written.path, written.sha256) as copy:
        return deserialize(copy)


TENSORS = {
    "float": torch.arange(6.0).reshape(2, 3), "bfloat16": torch.arange(5).bfloat16(), "half": torch.ones(3).half(),
    "bool": torch.tensor([True, False]), "uint8": torch.arange(5, dtype=torch.uint8), "complex": torch.tensor([1 + 2j]),
    "0-d": torch.tensor(3.5), "empty": torch.zeros(0), "empty matrix": torch.zeros(0, 3), "one": torch.ones(1, 1, 1),
    "transposed": torch.arange(6.0).reshape(2, 3).t(), "slice": torch.arange(100.0)[10:20], "every second": torch.arange(10.0)[::2],
    "expanded": torch.ones(1).expand(4), "channels last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    "parameter": nn.Parameter(torch.ones(2)), "conjugate": torch.tensor([1 + 2j]).conj(), "empty slice": torch.arange(10.0)[3:3],
    "float8": torch.ones(3).to(torch.float8_e4m3fn), "nan": torch.tensor([float("nan"), float("inf")]), "column": torch.zeros(1, 5).t(),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_come_back_and_save_to_the_same_bytes(tmp_path, name):
    tensor = TENSORS[name]
    first = digest(tmp_path, {"t": tensor})
    loaded = load(first)["t"].clone()
    assert loaded.dtype == tensor.dtype and loaded.shape == tensor.shape and not loaded.requires_grad
    torch.testing.assert_close(loaded, tensor.detach().resolve_conj(), rtol=0, atol=0, equal_nan=True)
    assert digest(tmp_path, {"t": loaded}).sha256 == first.sha256
    contiguous = tensor.detach().resolve_conj().clone(memory_format=torch.contiguous_format)
    assert digest(tmp_path, {"t": contiguous}).sha256 == first.sha256  # equal tensors, equal bytes, however they lie in memory


def test_tied_weights_are_saved_once_and_come_back_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(500, 64)
            self.head = nn.Linear(64, 500, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    first = digest(tmp_path, {"model": model.state_dict()})
    assert first.bytes < 1.1 * 500 * 64 * 4
    loaded = load(first)["model"]
    assert loaded["head.weight"].data_ptr() == loaded["embedding.weight"].data_ptr()
    other = Tied()
    other.load_state_dict(loaded)
    assert other.head.weight is other.embedding.weight
    assert digest(tmp_path, {"model": other.state_dict()}).sha256 == first.sha256


def test_values_of_other_libraries_become_plain(tmp_path):
    state = {"a": np.float64(1.5), "b": np.int64(3), "c": np.bool_(True), "d": np.array(2.5), "e": torch.Size([2, 3]), "f": float("inf")}
    assert load(digest(tmp_path, state)) == {"a": 1.5, "b": 3, "c": True, "d": 2.5, "e": (2, 3), "f": float("inf")}


@pytest.mark.parametrize("bad", ({1}, b"bytes", object(), torch.float32, torch.device("cpu"), np.zeros(3), lambda: 0, 3j, range(3),
                                 torch.zeros(3, 3).to_sparse(), torch.zeros(3, device="meta"), os.environ, torch.Generator()),
                         ids=lambda bad: type(bad).__name__)
def test_what_a_checkpoint_cannot_hold_is_named_with_its_path(tmp_path, bad):
    with pytest.raises(CheckpointError, match=r"^state\['optimizer'\]\['groups'\]\[1\]"):
        digest(tmp_path, {"optimizer": {"groups": [0, bad]}})
    assert listing(tmp_path) == []


def test_sharing_does_not_show(tmp_path):
    """pickle refers back to objects it met before; equal states must not differ in that."""
    text, pair, numbers = "".join(["be", "tas"]), (1, 2), [0.9, 0.999]
    shared = {"a": text, "b": text, "c": pair, "d": pair, "e": numbers, "f": numbers, text: 1}
    apart = {"a": "".join(["beta", "s"]), "b": "betas", "c": (1, 2), "d": (*[1, 2],), "e": [0.9, 0.999], "f": [0.9, 0.999], "betas": 1}
    assert shared == apart and digest(tmp_path, shared).sha256 == digest(tmp_path, apart).sha256


def test_the_order_of_optimizer_entries_does_not_show(tmp_path):
    assert digest(tmp_path, {"state": {0: 1, 1: 2}}).sha256 == digest(tmp_path, {"state": {1: 2, 0: 1}}).sha256


def test_any_value_shows(tmp_path):
    states = [{"a": 1}, {"a": 1.0}, {"a": True}, {"b": 1}, {"a": [1]}, {"a": (1,)}, {"a": "1"}, {"a": None}, {"a": torch.ones(1)},
              {"a": torch.ones(1, 1)}, {"a": torch.ones(1).double()}, {"a": -0.0}, {"a": 0.0}, {"a": torch.tensor([-0.0])},
              {"a": torch.tensor([0.0])}, {"a": 1, "b": 2}, {"b": 2, "a": 1}]
    assert len({digest(tmp_path, state).sha256 for state in states}) == len(states)


def test_canonical_leaves_the_live_state_alone():
    weight = nn.Parameter(torch.ones(3))
    state = {"w": weight, "groups": [{"lr": 0.1}]}
    copy = canonical(state)
    assert state["w"] is weight and weight.requires_grad and copy["groups"] is not state["groups"]
    assert copy["w"].data_ptr() == weight.data_ptr()  # nothing is copied that need not be


def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(1, 2, 3), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model[0].parameters(), betas=(0.8, 0.9), amsgrad=True)
    model[0](torch.ones(2, 8)).sum().backward()
    optimizer.step()
    return model, optimizer


def write(path, model, optimizer):
    write_file(path, lambda file: serialize({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, file))


def go_on(source, target):
    model, optimizer = trained()
    model[0](torch.randn(2, 8)).sum().backward()
    optimizer.step()  # elsewhere
    state = deserialize(verified_copy(source, sha256_file(source)))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    write(target, model, optimizer)


def test_a_process_that_loads_and_one_that_trained_write_the_same_bytes(tmp_path):
    write(tmp_path / "first", *trained())
    script = "from pathlib import Path; import test_checkpoint; test_checkpoint.go_on(Path('first'), Path('a name of another length'))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=environment, cwd=tmp_path)
    assert sha256_file(tmp_path / "first") == sha256_file(tmp_path / "a name of another length")
