"""Forty-five bad inputs, each by its number: one line that names file, field, value and mending, and nothing written.

Where a bad file is a cache (`latest.json`), the run says so in one line and goes on from what verifies; `checkpoint.strict=true` stops
where a checkpoint itself is bad. A canary lies where every escape would lead; a clock ends what hangs.
"""

import collections
import json
import os
import pickle
import re
import shutil
import stat
import struct
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from commands import Shell

from codex_ml.archive import canonical
from codex_ml.checkpoint import list_checkpoints, load_checkpoint, newest_verified
from codex_ml.durable import CorruptFile, sha256_file
from codex_ml.strict_json import read_resolved

TEXT = "".join(f"{i} times {i % 7} is {i * (i % 7)}\n" for i in range(400))
TINY = ("data=text.txt", "model_name=tiny", "block_size=16", "batch_size=4", "checkpoint.dir=run", "eval_steps=1", "steps_per_epoch=2",
        "threads=1", "system_metrics_interval=0", "log_every_steps=1")
MORE = (*TINY, "epochs=3", "checkpoint.resume=true")
PATIENCE = 30  # seconds that a command may take before it counts as hanging

# ---- the table: number → the tests that show it. Rows about signatures are shown where signatures are.

INPUTS = {
    1: ["test_a_name_that_is_none[absolute]"], 2: ["test_a_name_that_is_none[parent]"], 3: ["test_a_name_that_is_none[nul]", "test_a_path"],
    4: ["test_a_name_that_is_none[empty]", "test_a_path"], 5: ["test_a_link_out"], 6: ["test_a_fifo_or_a_device"],
    7: ["test_a_name_that_is_none[5000 characters]", "test_a_path"], 8: ["test_a_name_that_is_none[look-alike digits]",
                                                                         "test_folders_that_only_look_like_epochs"],
    9: ["test_a_number_that_is_none[epoch--1]", "test_a_key"], 10: ["test_a_number_that_is_none", "test_a_key"],
    11: ["test_a_number_that_is_none[epoch-10^400]", "test_a_key"],
    12: ["test_json_that_is_none[latest.json-key twice]"], 13: ["test_json_that_is_none[latest.json-NaN]"],
    14: ["test_json_that_is_none[latest.json-depth]"],
    15: ["test_a_pointer_of_100_megabytes"], 16: ["test_json_that_is_none[latest.json-BOM]", "test_json_that_is_none[latest.json-UTF-16]"],
    17: ["test_json_that_is_none[latest.json-empty]"], 18: ["test_json_that_is_none[latest.json-garbage behind]"],
    19: ["test_json_that_is_none[latest.json-lone surrogate]"],
    20: ["test_a_schema_version_of_the_future"], 21: ["test_a_hash_that_is_none"], 22: ["test_a_hash_that_is_none[missing]"],
    23: ["test_a_pickle_that_would_run_a_program"], 24: ["test_an_archive_that_swells"], 25: ["test_an_archive_with_compressed_entries"],
    26: ["test_an_archive_with_doubled_names"], 27: ["test_an_archive_that_lies_about_sizes"],
    # The library reads no safetensors: what stands here is the same defect in its own archive.
    28: ["test_a_header_of_a_length_beyond_the_file"], 29: ["test_entries_that_overlap"], 30: ["test_an_archive_with_doubled_names"],
    31: ["test_a_shape_that_overflows"], 32: ["test_tensors_that_are_missing_or_extra"],
    33: ["test_another_shape_or_type"], 34: ["test_another_optimizer"],
    **{number: ["test_signing.py"] for number in range(35, 41)},
    41: ["test_a_key"], 42: ["test_a_key"], 43: ["test_a_key"], 44: ["test_data_that_changed"],
    45: ["test_another_number_of_threads", "test_another_version_of_torch"],
}


def test_every_row_is_shown(request) -> None:
    assert sorted(INPUTS) == list(range(1, 46))
    here = {item.name for item in request.session.items if item.path.name == Path(__file__).name}
    if len(here) < 40:
        pytest.skip("only a part of this file was asked for")
    bare = {name.partition("[")[0] for name in here}
    assert [name for names in INPUTS.values() for name in names if name not in here | bare | {"test_signing.py"}] == []
    assert (Path(__file__).parent / "test_signing.py").exists()


# ---- a finished run of two epochs, copied for each test


@pytest.fixture(scope="module")
def shell():
    with Shell() as shell:
        yield shell


@pytest.fixture(scope="module")
def finished(shell, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "work"
    folder.mkdir()
    (folder / "text.txt").write_text(TEXT)
    (folder / "settings.ini").write_text("[codex_ml]\n")
    code, _, err = shell.run(folder, *TINY, "epochs=2")
    assert code == 0, err
    return folder


@pytest.fixture
def work(finished, tmp_path):
    """The run in `work/run`; outside of it lies a canary, which must never sing."""
    shutil.copytree(finished, tmp_path / "work")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "canary").write_text("silent")
    yield tmp_path / "work"
    assert (tmp_path / "outside" / "canary").read_text() == "silent"
    assert [p.name for p in (tmp_path / "outside").iterdir()] == ["canary"]


def contents(folder):
    """Everything below: kinds, and the bytes of files; but for the lock, which every process takes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if path.name != ".lock":
            found[str(path.relative_to(folder))] = (path.read_bytes() if stat.S_ISREG(mode) and path.stat().st_size < 1 << 24
                                                    else (stat.S_IFMT(mode), path.lstat().st_size))
    return found


def ended(command):
    """The exit code of a command that has PATIENCE seconds."""
    clock = threading.Timer(PATIENCE, command.signal, [9])
    clock.start()
    code = command.wait()
    clock.cancel()
    assert code != -9, "it hangs"
    return code


def refused(shell, work, *words, says=(), code=2, script=None, lines=1):
    """The command says one typed line with all of `says`, no traceback, and leaves everything as it was."""
    before = contents(work)
    command = shell.start(work, *words, script=script)
    assert ended(command) == code, command.stderr
    err = command.stderr
    assert "Traceback" not in err and command.stdout == "" and err.startswith(("codex_ml: ", "codex-ml ")), err
    assert (err.count("\n") == 1 if lines == 1 else lines is None) and len(err) < 1500, err
    for word in says:
        assert word in err, (word, err)
    assert contents(work) == before
    return err


def stopped(shell, work, *says, words=()):
    """A strict resume refuses."""
    return refused(shell, work, *MORE, "checkpoint.strict=true", *words, says=says, code=4)


def falls_back(work, *says):
    """Without `strict` the checkpoint before is taken, and one line has all of `says`."""
    checkpoint, state, problems = newest_verified(work / "run")
    assert checkpoint.name == "epoch-0001" and state["epoch"] == 1
    assert any(all(word in problem for word in says) and "\n" not in problem and len(problem) < 900 for problem in problems), problems


def passed_over(work, *says):
    """A pointer that cannot be used costs one line that has all of `says`, and no epoch."""
    checkpoint, state, problems = newest_verified(work / "run", strict=True)
    assert checkpoint.name == "epoch-0002" and state["epoch"] == 2
    assert all(word in problems[0] for word in (*says, "latest.json", "the newest checkpoint that verifies is taken")), problems
    assert "\n" not in problems[0] and len(problems[0]) < 900


def goes_on(shell, work, *says, strict=True):
    """The run says what was wrong in one line that has all of `says`, and comes to the hash of the run that nobody harmed."""
    command = shell.start(work, *MORE, f"checkpoint.strict={str(strict).lower()}")
    assert ended(command) == 0, command.stderr
    err = command.stderr
    assert "Traceback" not in err
    line = [row for row in err.splitlines() if all(word in row for word in says)]
    assert line and len(line[0]) < 1500, err
    return re.search(r"^checkpoint_sha256 +(\w+)$", command.stdout, re.MULTILINE)[1]


@pytest.fixture(scope="module")
def third(shell, finished, tmp_path_factory):
    """The hash of the third epoch."""
    folder = tmp_path_factory.mktemp("third") / "work"
    shutil.copytree(finished, folder)
    code, out, err = shell.run(folder, *MORE)
    assert code == 0, err
    return re.search(r"^checkpoint_sha256 +(\w+)$", out, re.MULTILINE)[1]


def evaluate(work, name):
    return f"import sys\nfrom codex_ml.cli.main import main\nsys.exit(main(['evaluate', 'run', 'checkpoint=' + {name!r}]))"


# ---- 1 to 8: names and paths

NAMES = {"absolute": "/etc/passwd", "parent": "../../outside/canary", "nul": "epoch-0002\0", "empty": "", "5000 characters": "e" * 5000,
         "look-alike digits": "epoch-٠٠٠٢", "parent inside": "epoch-0002/../../outside", "line": "epoch-0002\n"}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_that_is_none(shell, work, third, name):
    """In `latest.json` it costs a line; where a person names a checkpoint, it is refused."""
    if len(name) < 1000:
        refused(shell, work, script=evaluate(work, name), says=["run", repr(name)[1:-1], "epoch-0002, epoch-0001"], code=4)
    path = work / "run" / "latest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"path": name}))
    passed_over(work, "path=", repr(name)[1:20].rstrip("'"))
    if name.startswith("..") or len(name) > 1000:
        assert goes_on(shell, work, "latest.json", "path=", "the newest checkpoint that verifies is taken") == third


PATHS = {"nul": "a\0b", "empty": "", "blank": "  ", "5000 characters": "a" * 5000}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("key", ("checkpoint.dir", "data", "metrics_out", "tensorboard_dir"))
def test_a_path(shell, work, key, path):
    script = (f"import sys\nfrom codex_ml.cli.train import main\n"
              f"sys.exit(main([*{MORE!r}, {key!r} + '=\"' + {path!r} + '\"']))")
    refused(shell, work, script=script, says=[key, "a path"] if "\0" not in path else [key])


def test_a_path_of_too_long_a_name(shell, work):
    refused(shell, work, *TINY, "epochs=3", f"checkpoint.dir={'b' * 300}", code=5, says=["bbb", "too long",
                                                                                         "Choose another checkpoint.dir"])


@pytest.mark.parametrize("what", ("epoch-0002", "epoch-0002/checkpoint.pt", "epoch-0002/metadata.json", "latest.json"))
def test_a_link_out(shell, work, third, what):
    """It is neither followed nor deleted, although good bytes lie behind it."""
    behind = work / "behind"
    (work / "run" / what).rename(behind)
    (work / "run" / what).symlink_to(behind)
    before = contents(behind) if behind.is_dir() else behind.read_bytes()
    if what == "latest.json":
        assert goes_on(shell, work, "latest.json", "symbolic link") == third
    else:
        stopped(shell, work, "epoch-0002", "epoch-0001", "checkpoint.strict=false")
        assert goes_on(shell, work, "epoch-0002", strict=False) == third
    assert (contents(behind) if behind.is_dir() else behind.read_bytes()) == before


FIFOS = ("latest.json", "latest.json.bak", "epoch-0002/checkpoint.pt", "epoch-0002/metadata.json", "epoch-0002/run_manifest.json",
         "config.resolved.json", "config.snapshot.json", ".codex/metrics.ndjson", "metrics_history.jsonl")


@pytest.mark.parametrize("what", FIFOS)
def test_a_fifo_or_a_device(shell, work, third, what):
    path = work / "run" / what
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    if what in ("epoch-0002/checkpoint.pt", "epoch-0002/metadata.json"):
        stopped(shell, work, str(Path("run") / what), "not a regular file", "epoch-0001")
    assert goes_on(shell, work, *(["latest.json", "not a regular file"] if what == "latest.json" else []), strict=False) == third


@pytest.mark.parametrize("kind", ("fifo", "device"))
@pytest.mark.parametrize("key", ("data", "checkpoint.dir"))
def test_a_fifo_or_a_device_that_a_key_names(shell, work, key, kind):
    os.mkfifo(work / "pipe")
    value = "pipe" if kind == "fifo" else "/dev/zero"
    refused(shell, work, *TINY, "epochs=3", f"{key}={value}", code=2 if key == "data" else 5, says=[value])


def test_folders_that_only_look_like_epochs(shell, work, third):
    for name in ("epoch-٠٠٠٩", "epoch-９９９９", "epoch-+009", "epoch-9", "epoch-0009 ", "epoch-00x9", "Epoch-0009"):
        shutil.copytree(work / "run" / "epoch-0002", work / "run" / name)
    assert [c.name for c in list_checkpoints(work / "run")] == ["epoch-0002", "epoch-0001"]
    assert goes_on(shell, work) == third


# ---- 9 to 11, 20 to 22: metadata.json field by field


def edit(path, **changes):
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content[key] = value
        if value is Ellipsis:
            del content[key]
    path.write_text(json.dumps(content))


ODD = {"-1": -1, "2.0": 2.0, "text": "2", "true": True, "null": None, "list": [2], "10^400": 10**400, "missing": ...}


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
@pytest.mark.parametrize("field", ("epoch", "global_step"))
def test_a_number_that_is_none(shell, work, third, field, value):
    edit(work / "run" / "epoch-0002" / "metadata.json", **{field: value})
    shown = [] if value is ... else [repr(value)[:12]]
    if value == 10**400 and field == "global_step":
        shown = []  # a number of steps may be large: what is saved under it tells that it is not the place
    stopped(shell, work, "epoch-0002/metadata.json" if shown else "epoch-0002", *(f"{field}={s}" for s in shown), "epoch-0001",
            "checkpoint.strict=false")
    falls_back(work, "epoch-0002")


SHA = {"63": "0" * 63, "65": "0" * 65, "upper case": "A" * 64, "not hexadecimal": "g" * 64, "line": "0" * 64 + "\n", "number": 5,
       "null": None,
       "missing": ..., "another": "0" * 64}


@pytest.mark.parametrize("sha", SHA.values(), ids=SHA)
def test_a_hash_that_is_none(shell, work, third, sha):
    edit(work / "run" / "epoch-0002" / "metadata.json", checkpoint_sha256=sha)
    shown = ["SHA-256", sha] if sha == "0" * 64 else ["metadata.json", "checkpoint_sha256=", "64 hexadecimal digits"]
    stopped(shell, work, "epoch-0002", *shown, "epoch-0001", "checkpoint.strict=false")
    falls_back(work, "epoch-0002")


@pytest.mark.parametrize("version", ("v99", 2, None, ["v1"]))
def test_a_schema_version_of_the_future(shell, work, third, version):
    edit(work / "run" / "epoch-0002" / "metadata.json", schema_version=version)
    stopped(shell, work, "epoch-0002/metadata.json", f"schema_version={version!r}", "codex_ml", "epoch-0001")
    falls_back(work, "epoch-0002")


def test_a_pointer_of_the_future(shell, work, third):
    edit(work / "run" / "latest.json", schema_version="v99")
    passed_over(work, "schema_version='v99'", "'v1'")


# ---- 12 to 19: JSON

GOOD = b'{"epoch": 2, "global_step": 4}'
JSON = {"key twice": (b'{"epoch": 2, "epoch": 2}', "twice"), "NaN": (b'{"epoch": NaN}', "NaN"), "infinity": (b'{"epoch": -Infinity}',
                                                                                                             "Infinity"),
        "too large": (b'{"epoch": 1e999}', "1e999"), "depth": (b'{"epoch": ' + b"[" * 100_000, "nested too deeply"),
        "BOM": (b"\xef\xbb\xbf" + GOOD, "BOM"), "UTF-16": (GOOD.decode().encode("utf-16"), "no UTF-8"), "empty": (b"", "it is empty"),
        "garbage behind": (GOOD + b" x", "something stands behind its end"), "lone surrogate": (b'{"epoch": "\\ud800"}', "surrogate"),
        "a list": (b"[2]", "not an object"), "huge number": (b'{"epoch": ' + b"9" * 5000 + b"}", "digits"), "latin": (b'{"a": "\xe9"}',
                                                                                                                      "UTF-8")}


@pytest.mark.parametrize(("content", "why"), JSON.values(), ids=JSON)
@pytest.mark.parametrize("file", ("latest.json", "epoch-0002/metadata.json"))
def test_json_that_is_none(shell, work, third, file, content, why):
    (work / "run" / file).write_bytes(content)
    if file == "latest.json":
        passed_over(work, why)
    else:
        stopped(shell, work, "epoch-0002/metadata.json", why, "epoch-0001", "checkpoint.strict=false")
        falls_back(work, "epoch-0002/metadata.json", why)


def test_a_pointer_of_100_megabytes(shell, work, third):
    with open(work / "run" / "latest.json", "r+b") as file:
        file.truncate(100 << 20)
    begun = time.monotonic()
    tracemalloc.start()
    _, _, problems = newest_verified(work / "run")
    assert tracemalloc.get_traced_memory()[1] < 40 << 20 and time.monotonic() - begun < 5
    tracemalloc.stop()
    assert "latest.json" in problems[0] and "more than the 1,048,576 bytes" in problems[0]
    assert goes_on(shell, work, "latest.json", "more than the 1,048,576 bytes") == third


# ---- 23 to 32: archives, each forged together with its hash


def forge(work, content):
    """Put an archive in the place of the newest checkpoint, its hash recorded as right."""
    folder = work / "run" / "epoch-0002"
    if isinstance(content, bytes):
        (folder / "checkpoint.pt").write_bytes(content)
    else:
        content(folder / "checkpoint.pt")
    edit(folder / "metadata.json", checkpoint_sha256=sha256_file(folder / "checkpoint.pt"))


def never_used(shell, work, *says):
    """The archive is refused in one line, quickly, and no memory is spent on it; the one before is taken."""
    tracemalloc.start()
    begun = time.monotonic()
    with pytest.raises(CorruptFile) as caught:
        load_checkpoint(list_checkpoints(work / "run")[0])
    assert tracemalloc.get_traced_memory()[1] < 64 << 20 and time.monotonic() - begun < 10
    tracemalloc.stop()
    assert "epoch-0002" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 700
    falls_back(work, "epoch-0002/checkpoint.pt", *says)
    stopped(shell, work, "epoch-0002/checkpoint.pt", *says, "epoch-0001", "checkpoint.strict=false")


def entries(path):
    """Name → content; zipfile itself would miss the sums that a checkpoint does without."""
    content, found = path.read_bytes(), {}
    for entry in zipfile.ZipFile(path).infolist():
        begins = entry.header_offset + 30 + sum(struct.unpack_from("<HH", content, entry.header_offset + 26))
        found[entry.filename] = content[begins:begins + entry.file_size]
    return found


def archive(entries, compression=zipfile.ZIP_STORED):
    def write(path):
        with zipfile.ZipFile(path, "w", compression) as out:
            for name, content in entries:
                out.writestr(name, content)
    return write


class Sings:
    """A pickle of it is a call of the shell."""

    def __init__(self, command, function=os.system):
        self.command, self.function = command, function

    def __reduce__(self):
        return self.function, (self.command,)


PROGRAMS = {"os.system": os.system, "eval": eval, "os.unlink": os.unlink, "torch.load": torch.load, "getattr": getattr}


@pytest.mark.parametrize("function", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("form", ("archive", "bare pickle"))
def test_a_pickle_that_would_run_a_program(shell, work, third, function, form):
    canary = work.parent / "outside" / "canary"
    argument = {os.system: f"echo sings > {canary}", eval: f"open({str(canary)!r}, 'w').write('sings')"}.get(function, str(canary))
    content = pickle.dumps({"epoch": 2, "global_step": 4, "model": Sings(argument, function)}, protocol=2)
    if form == "archive":
        good = entries(work / "run" / "epoch-0002" / "checkpoint.pt")
        forge(work, archive([(name, content if name.endswith("data.pkl") else value) for name, value in good.items()]))
    else:
        forge(work, content)
    never_used(shell, work, "never run" if form == "archive" else "not a checkpoint archive")


def test_an_archive_that_swells(shell, work, third):
    good = entries(work / "run" / "epoch-0002" / "checkpoint.pt")
    forge(work, archive([*good.items(), ("checkpoint/data/99", bytes(1 << 30))], zipfile.ZIP_DEFLATED))
    assert (work / "run" / "epoch-0002" / "checkpoint.pt").stat().st_size < 4 << 20
    never_used(shell, work, "compressed")


def test_an_archive_with_compressed_entries(shell, work, third):
    forge(work, archive(entries(work / "run" / "epoch-0002" / "checkpoint.pt").items(), zipfile.ZIP_DEFLATED))
    never_used(shell, work, "compressed")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("which", ("data.pkl", "data/0"))
def test_an_archive_with_doubled_names(shell, work, third, which):
    good = entries(work / "run" / "epoch-0002" / "checkpoint.pt")
    again = next((name, value) for name, value in good.items() if name.endswith(which))
    forge(work, archive([*good.items(), again]))
    never_used(shell, work, "doubled")


def directory(content):
    """Where the entries of the central directory begin."""
    at = content.index(b"PK\x01\x02")
    while at >= 0 and content[at:at + 4] == b"PK\x01\x02":
        yield at
        at += 46 + sum(struct.unpack_from("<HHH", content, at + 28))


@pytest.mark.parametrize("size", (0xFFFFFFFF, 0xFFFFFFF0, 1 << 30))
def test_an_archive_that_lies_about_sizes(shell, work, third, size):
    """Also as zip64: 0xFFFFFFFF sends a reader to a field of 64 bits."""
    content = bytearray((work / "run" / "epoch-0002" / "checkpoint.pt").read_bytes())
    at = list(directory(content))[1]
    struct.pack_into("<II", content, at + 20, size, size)
    forge(work, bytes(content))
    never_used(shell, work)


@pytest.mark.parametrize("offset", (20, 36, 40, 48))
def test_a_zip64_record_that_lies(shell, work, third, offset):
    content = bytearray((work / "run" / "epoch-0002" / "checkpoint.pt").read_bytes())
    at = content.find(b"PK\x06\x06")
    if at < 0:  # add one, as a large archive has
        end = content.rindex(b"PK\x05\x06")
        count, size, start = struct.unpack_from("<HII", content, end + 10)
        record = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
        locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
        content[end:end] = record + locator
        at = end
        struct.pack_into("<HHII", content, at + len(record) + len(locator) + 8, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<Q", content, at + offset, 1 << 62)
    forge(work, bytes(content))
    never_used(shell, work)


def test_a_header_of_a_length_beyond_the_file(shell, work, third):
    """For safetensors a header longer than allowed; here an index of tensors that claims 2^60 bytes of text."""
    good = entries(work / "run" / "epoch-0002" / "checkpoint.pt")
    claims = b"\x80\x02" + b"X" + struct.pack("<I", 0xFFFFFFF0) + b"short"
    long = b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"short"
    for index in (long, claims):
        forge(work, archive([(name, index if name.endswith("data.pkl") else value) for name, value in good.items()]))
        with pytest.raises(CorruptFile):
            load_checkpoint(list_checkpoints(work / "run")[0])
    never_used(shell, work)


def test_entries_that_overlap(shell, work, third):
    """For safetensors offsets that overlap; here two entries of the archive that share their bytes."""
    content = bytearray((work / "run" / "epoch-0002" / "checkpoint.pt").read_bytes())
    found = list(directory(content))
    names = [content[at + 46:at + 46 + struct.unpack_from("<H", content, at + 28)[0]].decode() for at in found]
    tensors = [at for at, name in zip(found, names, strict=True) if "/data/" in name]
    small, large = sorted(tensors, key=lambda at: struct.unpack_from("<I", content, at + 24)[0])[::len(tensors) - 1]
    struct.pack_into("<I", content, small + 42, struct.unpack_from("<I", content, large + 42)[0])
    forge(work, bytes(content))
    never_used(shell, work, "overlapping")


class Lie:
    """A tensor that says it is larger than what is stored."""

    def __init__(self, storage, offset, size, stride):
        self.arguments = (storage, offset, size, stride, False, collections.OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


@pytest.mark.parametrize(("offset", "size", "stride"), ((0, (1 << 40, 1 << 40), (1 << 40, 1)), (0, (1 << 62, 4), (4, 1)), (1 << 62, (2,),
                                                                                                                           (1,)),
                                                        (0, (-1,), (1,)), (0, (4,), (1 << 61,)), (0, (9,), (1,))))
def test_a_shape_that_overflows(shell, work, third, offset, size, stride):
    state = load_checkpoint(list_checkpoints(work / "run")[0])
    name = next(iter(state["model"]))
    storage = torch.zeros(8)._typed_storage()
    forged = canonical(state) | {"model": canonical(state["model"]) | {name: Lie(storage, offset, size, stride)}}
    forge(work, lambda path: torch.save(forged, path))
    folder = list_checkpoints(work / "run")[0]
    try:
        load_checkpoint(folder)
    except CorruptFile:
        never_used(shell, work)
    else:  # it stays within what is stored, so it is a tensor, of another shape
        stopped(shell, work, "epoch-0002", name, "in the checkpoint", words=())


@pytest.mark.parametrize("how", ("missing", "extra", "no model", "no optimizer", "no gradients", "a number for a tensor"))
def test_tensors_that_are_missing_or_extra(shell, work, how):
    state = canonical(load_checkpoint(list_checkpoints(work / "run")[0]))
    model = state["model"]
    name = next(iter(model))
    if how == "missing":
        state["model"] = {key: value for key, value in model.items() if key != name}
    elif how == "extra":
        name = "added.weight"
        state["model"] = model | {name: torch.zeros(2)}
    elif how == "a number for a tensor":
        state["model"] = model | {name: 5}
    else:
        name = how[3:]
        del state[name]
    forge(work, lambda path: torch.save(state, path))
    stopped(shell, work, "epoch-0002", name, "checkpoint.resume=false")


# ---- 33, 34: another model, another optimizer


def test_another_shape_or_type(shell, work):
    stopped(shell, work, "epoch-0002", "(16, 32) float32 in the checkpoint, (8, 32) float32 now", "checkpoint.resume=false",
            words=["block_size=8"])
    state = canonical(load_checkpoint(list_checkpoints(work / "run")[0]))
    name = next(iter(state["model"]))
    state["model"][name] = state["model"][name].double()
    forge(work, lambda path: torch.save(state, path))
    stopped(shell, work, "epoch-0002", name, "float64 in the checkpoint", "float32 now", "checkpoint.resume=false")


@pytest.mark.parametrize("other", ("sgd", "adam"))
def test_another_optimizer(shell, work, other):
    stopped(shell, work, "epoch-0002", "AdamW in the checkpoint", {"sgd": "SGD now", "adam": "Adam now"}[other], "checkpoint.resume=false",
            words=[f"optimizer={other}"])


# ---- 41 to 43: keys

KEYS = {
    "checkpoint.retention.keep_last=0": "above 0", "checkpoint.retention.keep_last=-1": "above 0",
    "checkpoint.retention.keep_every=0": "above 0",
    "checkpoint.retention.max_bytes=-5": "above 0", "seed=x": "a whole number", "seed=1.5": "a whole number",
    "seed=4294967296": "4294967295",
    "seed=-1": "from 0 on", f"seed={10**400}": "4294967295", "epochs=-1": "from 0 on", "epochs=2.5": "a whole number",
    "epochs=true": "a whole number",
    f"epochs={10**400}": "up to", "ebochs=3": "did you mean 'epochs'?",
    "checkpoint.retention.keep_lats=3": "did you mean 'checkpoint.retention.keep_last'?", "model_args.dimm=3": "dim",
    "nothing.like.it=3": "the keys are",
}


@pytest.mark.parametrize("word", KEYS, ids=lambda word: word[:40])
def test_a_key(shell, work, word):
    refused(shell, work, *MORE, word, says=[word.partition("=")[0], KEYS[word]])


@pytest.mark.parametrize("word", ("checkpoint.retention.keep_last = 0", "seed = 5000000000", "ebochs = 3", "epochs = 3\nepochs = 4",
                                  "epochs = -3"))
def test_a_key_of_settings_ini(shell, work, word):
    (work / "settings.ini").write_text(f"[codex_ml]\n{word}\n")
    refused(shell, work, *TINY, "checkpoint.resume=true", says=["settings.ini", word.partition(" ")[0]])


# ---- 44, 45: what the run was made with


def test_data_that_changed(shell, work):
    """A table of what differs, no more: each row has the key, the run's value and the one asked for now."""
    (work / "text.txt").write_text(TEXT.replace("5 times 5", "5 times 6"))
    err = refused(shell, work, *MORE, code=4, lines=None, says=["epoch-0002", "the run has", "checkpoint.allow_drift=true"])
    assert [row.split()[0] for row in err.splitlines()[2:-1]] == ["data"] and err.count("sha256:") == 2


def test_another_number_of_threads(shell, work):
    err = refused(shell, work, *MORE, "threads=2", code=4, lines=None, says=["epoch-0002", "checkpoint.allow_drift=true"])
    assert [row.split() for row in err.splitlines()[2:-1]] == [["threads", "1", "2"]]


def test_another_version_of_torch(shell, work):
    """It may be meant, as after an update: the run goes on, says so in one line, and keeps it with the result."""
    path = work / "run" / "epoch-0002" / "run_manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"environment": manifest["environment"] | {"torch": "2.10.0"}}))
    goes_on(shell, work, "environment", "torch: 2.10.0 then", "bits may differ")


# ---- good JSON that says what cannot be: every field of every record of a run, every command

FILES = ("config.resolved.json", "epoch-0002/run_manifest.json", "epoch-0002/metadata.json", "latest.json")
WRONG = ("5", "-1", '"x"', "[]", "{}", "null", "true", "1e400")
COMMANDS = {
    "resume": ["train", *MORE], "evaluate": ["evaluate", "run", "bootstrap=0"], "replay": ["replay", "run"],
    "diff": ["diff", "run", "good"], "compare": ["compare", "run", "good"], "watch": ["watch", "run", "--once"],
    "verify": ["verify", "run"], "export": ["export", "run", "--to", "csv", "--dest", "numbers.csv"]}
EVERY = """
import contextlib, io, json, os, shutil, signal, sys, traceback
from pathlib import Path
import codex_ml.cli.train
from codex_ml.cli.main import main

codex_ml.cli.train._sample = lambda result: ""  # a second of generating, which proves nothing here
signal.signal(signal.SIGALRM, lambda *_: os._exit(99))
shutil.copytree("run", "good")
found = {}
for case, change in CASES:
    shutil.rmtree("run")
    shutil.copytree("good", "run")
    change(Path("run"))
    for name, words in COMMANDS.items():  # the resume is the last: it mends what it finds
        out, code = io.StringIO(), 1
        signal.alarm(20)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                code = main(words)
            except BaseException:
                traceback.print_exc()
        signal.alarm(0)
        found[f"{case}: {name}"] = code, out.getvalue()[-3000:]
sys.stdout.write(json.dumps(found))
"""


def every_command(shell, work, cases, commands=COMMANDS):
    """What each command says of each case: its exit code and its output. `cases` is Python that makes (name, function of the folder)s."""
    last = {name: words for name, words in commands.items() if name != "resume"}
    script = f"COMMANDS = {last | {n: w for n, w in commands.items() if n == 'resume'}!r}\n{cases}\n{EVERY}"
    command = shell.start(work, script=script)
    clock = threading.Timer(400, command.signal, [9])
    clock.start()
    code = command.wait()
    clock.cancel()
    assert code == 0, "it hangs" if code in (99, -9) else command.stderr
    found = json.loads(command.stdout)
    wrong = {case: (code, said[-400:]) for case, (code, said) in found.items() if "Traceback" in said or code not in (0, 2, 4, 5, 6)}
    assert not wrong, wrong
    return found


FIELD = """
def put(field, text):
    def change(run):
        file = run / FILE
        content = json.loads(file.read_text())
        content[field] = "@@"
        file.write_text(json.dumps(content).replace('"@@"', text))
    return change
CASES = [(f"{field}={text}", put(field, text)) for field, text in FIELDS]
"""


@pytest.mark.parametrize("some", [True, False] if os.environ.get("TORTURE") == "1" else [True], ids=lambda some: "some" if some else "all")
@pytest.mark.parametrize("file", FILES)
def test_a_field_of_another_type(shell, work, file, some):
    """Every field, with one wrong value; with TORTURE=1 also with each of them. No command ends in a traceback or hangs."""
    fields = list(json.loads((work / "run" / file).read_text()))
    cases = [(field, WRONG[n % len(WRONG)]) for n, field in enumerate(fields)] if some else [(f, w) for f in fields for w in WRONG]
    every_command(shell, work, f"FILE, FIELDS = {file!r}, {cases!r}\nimport json\n{FIELD}")


INSIDE = {"values=5": {"values": 5}, "objects=4": {"objects": 4}, "identity=[]": {"identity": []}, "run_id=7": {"run_id": 7},
          "values.epochs=5": {"values": {"epochs": 5}}, "values: metrics_out=7": {"values": {"metrics_out": {"value": 7}}},
          "values: seed=-1": {"values": {"seed": {"value": -1}}}, "identity.threads='x'": {"identity": {"threads": "x"}}}


@pytest.mark.parametrize("field", INSIDE)
def test_a_resolved_configuration_is_read_in_one_way(work, field):
    """The reader that all commands share names file, field, value and mending."""
    path = work / "run" / "config.resolved.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | INSIDE[field]))
    with pytest.raises(CorruptFile) as caught:
        read_resolved(path)
    wanted = "it takes" if ": " in field else "it has to be"
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in (str(path), field, wanted, "a resume writes it anew"))


def test_a_resume_says_that_a_record_cannot_be_used(shell, work, third):
    edit(work / "run" / "config.resolved.json", values=5)
    edit(work / "run" / "epoch-0002" / "run_manifest.json", environment=5)
    assert goes_on(shell, work, "config.resolved.json cannot be used: values=5: it has to be an object") == third
    assert json.loads((work / "run" / "config.resolved.json").read_text())["values"]["epochs"]["value"] == 3


CONTENT = {"step=-4": {"step": -4}, "loss_history='abc'": {"loss_history": "abc"}, "scheduler=5": {"scheduler": 5}, "model=5": {"model": 5},
           "learning_rate_history=5": {"learning_rate_history": 5}, "optimizer=None": {"optimizer": None},
           "loss_sum=True": {"loss_sum": True},
           "steps_per_epoch='x'": {"steps_per_epoch": "x"}, "gradients={'a': 5}": {"gradients": {"a": 5}},
           "optimizer.state=5": {"state": 5}, "optimizer.param_groups=[5]": {"param_groups": [5]},
           "optimizer.state=99": {"state": {99: {}}}}


@pytest.mark.parametrize("what", CONTENT)
def test_content_of_another_type(shell, work, what):
    """The hash is right, and a field holds what no run writes: as for a broken one, the checkpoint before is taken."""
    state = canonical(load_checkpoint(list_checkpoints(work / "run")[0]))
    inside = what.startswith("optimizer.")
    forge(work, lambda path: torch.save(state | ({"optimizer": state["optimizer"] | CONTENT[what]} if inside else CONTENT[what]), path))
    refused(shell, work, script=evaluate(work, "epoch-0002"), says=["epoch-0002/checkpoint.pt cannot be used", what], code=4)
    stopped(shell, work, "epoch-0002/checkpoint.pt cannot be used", what, "epoch-0001", "checkpoint.strict=false")
    assert goes_on(shell, work, "epoch-0002/checkpoint.pt cannot be used", what, strict=False)


def test_what_only_the_optimizer_can_tell(shell, work):
    """Its own settings have types that no check here knows: one line all the same."""
    state = canonical(load_checkpoint(list_checkpoints(work / "run")[0]))
    state["optimizer"]["state"][0]["step"] = "x"
    state["optimizer"]["state"][0]["exp_avg"] = 5
    forge(work, lambda path: torch.save(state, path))
    found = every_command(shell, work, "CASES = [('as it is', lambda run: None)]", {"resume": COMMANDS["resume"]})
    assert found["as it is: resume"][0] in (0, 4)


# ---- pipes and devices where the metrics should be


STREAM = """
def named(place):
    def change(run):
        file = run / "config.resolved.json"
        content = json.loads(file.read_text())
        content["values"]["metrics_out"]["value"] = place
        file.write_text(json.dumps(content))
    return change
def pipe(name):
    def change(run):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
    return change
os.mkfifo("pipe")
CASES = [("a pipe", pipe(".codex/metrics.ndjson")), ("a segment", pipe(".codex/metrics.ndjson.00001")),
         ("a packed segment", pipe(".codex/metrics.ndjson.00001.gz")), ("a history", pipe("metrics_history.jsonl")),
         ("a device", named("/dev/zero")), ("a named pipe", named(os.path.abspath("pipe"))), ("a folder", named("/"))]
"""


def test_a_pipe_or_a_device_where_the_metrics_should_be(shell, work):
    found = every_command(shell, work, f"import json, os\n{STREAM}")
    for case in ("a pipe", "a segment", "a device", "a named pipe"):
        for name in ("diff", "replay", "export"):
            code, said = found[f"{case}: {name}"]
            assert code == 2 and said.count("\n") == 1 and "it is not a regular file" in said, (case, name, said)


def test_a_link_where_the_metrics_should_be(shell, work, third):
    """Nothing is written through it, also where nothing is at its end; the run goes on and says so once."""
    for target in (work.parent / "outside" / "canary", work.parent / "outside" / "new"):
        shutil.rmtree(work / "again", ignore_errors=True)
        shutil.copytree(work / "run", work / "again")
        metrics = work / "again" / ".codex" / "metrics.ndjson"
        metrics.unlink()
        metrics.symlink_to(target)
        command = shell.start(work, *MORE, "checkpoint.dir=again")
        assert ended(command) == 0 and third in command.stdout
        assert command.stderr.count("is a symbolic link") == 1 and "Training goes on" in command.stderr
        found = every_command(shell, work, f"CASES = [('a link', lambda run: ((run/'.codex'/'metrics.ndjson').unlink(), "
                                           f"(run/'.codex'/'metrics.ndjson').symlink_to({str(target)!r})))]")
        shutil.rmtree(work / "good")
        assert "is a symbolic link" in found["a link: resume"][1]


def test_a_linked_folder_of_metrics(shell, work, third):
    shutil.rmtree(work / "run" / ".codex")
    (work / "run" / ".codex").symlink_to(work.parent / "outside")
    assert goes_on(shell, work, ".codex is a symbolic link") == third


def test_a_link_that_is_meant(shell, work, third):
    """Whoever names a path has meant it."""
    (work / "there").mkdir()
    (work / "metrics.ndjson").symlink_to(work / "there" / "metrics.ndjson")
    command = shell.start(work, *MORE, f"metrics_out={work / 'metrics.ndjson'}")
    assert ended(command) == 0 and "symbolic link" not in command.stderr
    assert (work / "there" / "metrics.ndjson").stat().st_size


# ---- what is typed

LONG = "x" * 5000
TYPED = {"diff": ["diff", LONG, "run"], "replay": ["replay", LONG], "compare": ["compare", "run", LONG], "watch": ["watch", LONG, "--once"],
         "export": ["export", LONG, "--to", "csv"], "export --dest": ["export", "run", "--to", "csv", "--dest", LONG],
         "evaluate": ["evaluate", LONG], "verify": ["verify", LONG], "doctor": ["doctor", "--secrets", LONG],
         "keys": ["keys", "list", "--keys", LONG], "train": ["train", *TINY[:4], f"checkpoint.dir={LONG}"],
         "verify --keys": ["verify", "run", "--keys", LONG]}


@pytest.mark.parametrize("name", TYPED)
def test_a_path_of_5000_characters(shell, work, name):
    command = shell.start(work, script=f"import sys\nfrom codex_ml.cli.main import main\nsys.exit(main({TYPED[name]!r}))")
    assert ended(command) in (2, 5)
    assert command.stderr.count("\n") == 1 and len(command.stderr) < 400 and "Traceback" not in command.stderr, command.stderr
    assert "too long" in command.stderr or "5,000" in command.stderr


PIPED = {"verify": ["verify", "run"], "verify --json": ["verify", "run", "--json"], "train --help": ["train", "--help"],
         "evaluate --help": ["evaluate", "--help"], "help": ["--help"], "diff": ["diff", "run", "run"], "replay": ["replay", "run"],
         "compare": ["compare", "run", "run"], "watch": ["watch", "run", "--once"], "keys": ["keys", "list", "--keys", "run"],
         "export": ["export", "run", "--to", "csv", "--dest", "a.csv"], "evaluate": ["evaluate", "run", "bootstrap=0"]}


@pytest.mark.parametrize("name", PIPED)
def test_a_reader_that_has_read_enough(shell, work, name):
    """As in `codex-ml verify run | true`: the code of what was done, and not a word."""
    command = shell.start(work, script=f"""
import os, sys
source, out = os.pipe()
os.dup2(out, 1)
os.close(source), os.close(out)
from codex_ml.cli.main import main
code = main({PIPED[name]!r})
sys.stdout.flush()
sys.exit(code)""")
    assert ended(command) == 0 and command.stderr == "", command.stderr


def test_a_reader_that_went_away_before_it_was_done(shell, work):
    command = shell.start(work, script="""
import os, sys
source, out = os.pipe()
os.dup2(out, 1)
os.close(source), os.close(out)
from codex_ml.words import ended
sys.exit(ended("mix", lambda: print("line\\n" * 100_000)))""")
    assert ended(command) == 141 and command.stderr == "", command.stderr


# ---- messages

def test_a_tokenizer_that_is_none(shell, work, third):
    (work / "run" / "tokenizer.json").write_text('{"nmae": "byte"}')
    assert goes_on(shell, work, "run/tokenizer.json is not a tokenizer that can be used", "It is trained anew") == third


def test_a_lock_that_is_a_link(shell, work):
    (work / "run" / ".lock").unlink()
    (work / "run" / ".lock").symlink_to(work / "text.txt")
    refused(shell, work, *MORE, says=["run/.lock is a symbolic link", "delete the link"], code=5)
    assert (work / "text.txt").read_text() == TEXT


def test_a_start_that_is_refused_leaves_nothing(shell, work):
    refused(shell, work, code=5, says=["a checkpoint of this run needs about"], script=f"""
import collections, shutil, sys
shutil.disk_usage = lambda path: collections.namedtuple("usage", "total used free")(1 << 30, 1 << 30, 1000)
from codex_ml.cli.train import main
sys.exit(main([*{TINY!r}, "checkpoint.dir=new/run"]))""")
    assert not (work / "new").exists()
