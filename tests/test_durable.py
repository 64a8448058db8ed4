"""Full disks, I/O errors at every operation, odd files in the place of good ones, and who holds a folder."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager

import pytest

from codex_ml import durable, run_folder
from codex_ml.durable import (
    CorruptFile,
    StorageError,
    publish_folder,
    remove_folder,
    sha256_file,
    sweep,
    verified_copy,
    write_atomic,
    write_file,
)
from codex_ml.run_folder import FolderInUse, FolderLock
from codex_ml.strict_json import read_json, write_json

WRITING = ("open", "write", "fsync", "close", "replace", "rename", "unlink", "mkdir")


class Spy:
    """Stands for the module `os`: records the calls that change a disk, and fails at the one told."""

    def __init__(self, fail_at=None, error=errno.EIO, short=None):
        self.calls, self.fail_at, self.error, self.short = [], fail_at, error, short
        self.names = {}  # descriptor → name

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in WRITING:
            return real

        def call(*args, **kwargs):
            what = self.names.get(args[0], args[0]) if name in ("write", "fsync", "close") else args[0]
            self.calls.append((name, os.path.basename(what)))
            if self.fail_at == len(self.calls) and name != "close":
                raise OSError(self.error, os.strerror(self.error))
            if name == "write" and self.short:
                args = (args[0], memoryview(args[1])[: self.short])
            result = real(*args, **kwargs)
            if name == "open":
                self.names[result] = os.fspath(args[0])
            return result

        return call


@contextmanager
def spying(monkeypatch, **options):
    spy = Spy(**options)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "os", spy)
        yield spy


def listing(folder):
    return sorted(p.name for p in folder.iterdir())


# ---- order and completeness


def positions(calls, *wanted):
    """The index of each wanted call; a failure if one is missing."""
    return [next(i for i, (name, target) in enumerate(calls) if name == n and t(target)) for n, t in wanted]


def test_a_file_is_synced_then_renamed_then_its_folder_is_synced(tmp_path, monkeypatch):
    with spying(monkeypatch) as spy:
        write_atomic(tmp_path / "latest.json", b"content")
    tmp, folder = (lambda name: name.startswith(".tmp-")), (lambda name: name == tmp_path.name)
    write, fsync, rename, last = positions(spy.calls, ("write", tmp), ("fsync", tmp), ("replace", tmp), ("fsync", folder))
    assert write < fsync < rename < last


def test_a_folder_is_synced_then_renamed_then_its_parent_is_synced(tmp_path, monkeypatch):
    (tmp_path / ".tmp-1-0-e").mkdir()
    with spying(monkeypatch) as spy:
        publish_folder(tmp_path / ".tmp-1-0-e", tmp_path / "e")
    tmp, parent = (lambda name: name == ".tmp-1-0-e"), (lambda name: name == tmp_path.name)
    inner, rename, outer = positions(spy.calls, ("fsync", tmp), ("rename", tmp), ("fsync", parent))
    assert inner < rename < outer


def test_a_folder_loses_its_name_durably_before_it_loses_its_files(tmp_path, monkeypatch):
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "checkpoint.pt").write_bytes(b"x")
    with spying(monkeypatch) as spy:
        monkeypatch.setattr(durable.shutil, "rmtree", lambda path: spy.calls.append(("rmtree", path.name)))
        remove_folder(tmp_path / "e")
    trash, parent = (lambda name: name.startswith(".trash-")), (lambda name: name == tmp_path.name)
    rename, sync, delete = positions(spy.calls, ("rename", lambda n: n == "e"), ("fsync", parent), ("rmtree", trash))
    assert rename < sync < delete


def test_short_writes_are_looped(tmp_path, monkeypatch):
    content = os.urandom(1000)
    with spying(monkeypatch, short=7) as spy:
        written = write_atomic(tmp_path / "f", content)
    assert (tmp_path / "f").read_bytes() == content and written.sha256 == sha256_file(tmp_path / "f")
    assert sum(name == "write" for name, _ in spy.calls) == 143


# ---- errors at every operation


@pytest.mark.parametrize("code", (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS))
@pytest.mark.parametrize("content", ("text", lambda file: [file.write(b"part") for _ in range(3)]), ids=("text", "parts"))
def test_an_error_at_any_operation_leaves_the_old_or_the_new(tmp_path, monkeypatch, code, content):
    target, k, failures = tmp_path / "latest.json", 0, 0
    while True:
        k += 1
        target.write_text("old")
        with spying(monkeypatch, fail_at=k, error=code) as spy:
            try:
                write_atomic(target, content)
            except StorageError as error:
                failures += 1
                assert error.errno == code and str(target.parent) in str(error)
                assert "needed" in str(error) and "bytes are free" in str(error) and "run the same command again" in str(error)
                # only the very last operation, the folder's fsync, comes after the rename
                renamed = ("replace",) in [c[:1] for c in spy.calls[:k - 1]]
                assert target.read_text() == ("old" if not renamed else "text" if content == "text" else "part" * 3)
            else:
                if len(spy.calls) < k:
                    break
        assert listing(tmp_path) == ["latest.json"], f"leftover after a failure at {spy.calls[k - 1]}"
    assert failures >= 6  # open, write, fsync, rename, open and fsync of the folder


def test_a_full_disk_names_what_was_needed(tmp_path, monkeypatch):
    with spying(monkeypatch, fail_at=2, error=errno.ENOSPC), pytest.raises(StorageError, match="needed 12,345 bytes or more"):
        write_atomic(tmp_path / "f", bytes(12_345))


@pytest.mark.parametrize("first", (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()))
def test_the_first_error_is_told_though_the_writer_raises_another(tmp_path, monkeypatch, first):
    """torch.save, once a write failed, tries to finish its archive and then complains of positions."""
    def write(fd, data):
        raise first

    def content(file):
        try:
            file.write(b"x")
        except BaseException:
            pass
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "write", write)
        with pytest.raises(StorageError if isinstance(first, OSError) else type(first)):
            write_file(tmp_path / "f", content)
    assert listing(tmp_path) == []


def test_signals_during_a_write_are_not_seen(tmp_path):
    assert fork(lambda: interrupted_write(tmp_path)) == 0
    assert (tmp_path / "f").stat().st_size == 50 << 20


def interrupted_write(folder):
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    write_atomic(folder / "f", bytes(50 << 20))
    signal.setitimer(signal.ITIMER_REAL, 0)


def fork(function):
    """The exit status of `function` in a child: 0, or 1 where it raised."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_file_size_limit_gives_short_writes_and_then_an_error(tmp_path):
    target = tmp_path / "f"
    target.write_text("old")

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        write_atomic(target, bytes(10_000))  # just fits
        assert target.stat().st_size == 10_000
        try:
            write_atomic(target, bytes(10_001))
        except StorageError as error:
            assert error.errno == errno.EFBIG and "needed 10,001 bytes" in str(error)
        else:
            raise AssertionError

    assert fork(limited) == 0
    assert target.read_bytes() == bytes(10_000) and listing(tmp_path) == ["f"]


def test_no_descriptors_left_is_a_storage_error(tmp_path):
    def starved():
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        try:
            write_atomic(tmp_path / "f", b"x")
        except StorageError as error:
            assert error.errno == errno.EMFILE
        else:
            raise AssertionError

    assert fork(starved) == 0 and listing(tmp_path) == []


def test_no_descriptor_is_lost(tmp_path, monkeypatch):
    before = len(os.listdir("/proc/self/fd"))
    for k in range(1, 12):
        with spying(monkeypatch, fail_at=k):
            try:
                write_atomic(tmp_path / "f", b"x")
            except StorageError:
                continue
    for odd in ("absent", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        for read in (read_json, sha256_file, lambda p: verified_copy(p, "0" * 64)):
            with pytest.raises(CorruptFile):
                read(tmp_path / odd)
    assert len(os.listdir("/proc/self/fd")) == before


FULL = """
    import os, subprocess, sys
    from pathlib import Path
    from codex_ml.durable import StorageError, write_atomic
    from codex_ml.strict_json import write_json
    from codex_ml.run_folder import FolderLock
    place = Path(sys.argv[1])
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place]).returncode:
        sys.exit(77)
    write_atomic(place/"old", bytes(100_000))
    for size in (200_000, 160_000):
        try: write_atomic(place/"old", bytes(size))
        except StorageError as error: print(error)
        else: sys.exit("it did fit")
        assert (place/"old").read_bytes() == bytes(100_000) and os.listdir(place) == ["old"], os.listdir(place)
    with open(place/"ballast", "wb", 0) as file:
        try:
            while True: file.write(bytes(4096))
        except OSError: pass
    with FolderLock(place): pass  # a lock needs no byte
"""


def test_a_disk_that_is_really_full(tmp_path):
    command = ["unshare", "-rm", sys.executable, "-c", textwrap.dedent(FULL), str(tmp_path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("there is no `unshare` here to mount a small disk with")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"this system lets nobody mount a small disk: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert "No space left on device (needed 200,000 bytes or more; " in done.stdout


# ---- odd things in the place of a file


def fifo(path):
    os.mkfifo(path)


def link(path):
    path.with_name("target").write_text('{"a": 1}')
    path.symlink_to("target")


def device(path):
    path.symlink_to("/dev/zero")


ODD = {"fifo": fifo, "link": link, "device": device, "folder": os.mkdir, "absent": lambda path: None}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("read", (read_json, sha256_file, lambda path: verified_copy(path, "0" * 64)), ids=("json", "hash", "copy"))
def test_what_is_no_regular_file_is_not_read(tmp_path, odd, read):
    def too_long(*_):
        raise AssertionError("it blocks")

    ODD[odd](tmp_path / "f")
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(5)  # a named pipe would block for ever
    try:
        with pytest.raises(CorruptFile, match=str(tmp_path / "f")):
            read(tmp_path / "f")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("odd", ("fifo", "link", "device", "absent"))
def test_writing_replaces_what_is_no_file_and_follows_no_link(tmp_path, odd):
    ODD[odd](tmp_path / "f")
    write_json(tmp_path / "f", {"b": 2})
    assert read_json(tmp_path / "f") == {"b": 2}
    if odd == "link":
        assert (tmp_path / "target").read_text() == '{"a": 1}'


def test_a_folder_in_the_way_is_an_error_and_stays(tmp_path):
    (tmp_path / "f" / "inner").mkdir(parents=True)
    with pytest.raises(StorageError, match=str(tmp_path / "f")):
        write_json(tmp_path / "f", {})
    assert listing(tmp_path) == ["f"] and listing(tmp_path / "f") == ["inner"]


@pytest.mark.parametrize("name", ("x" * 300, "a\0b", "absent/f"))
def test_impossible_paths(tmp_path, name):
    with pytest.raises((StorageError, ValueError)):
        write_json(tmp_path / name, {})
    with pytest.raises(CorruptFile):
        read_json(tmp_path / name)


HOSTILE = {
    "empty": b"", "blank": b" \n", "list": b"[]", "number": b"3", "twice": b'{"a": 1, "a": 1}', "deep twice": b'{"x": [{"a": 1, "a": 2}]}',
    "nan": b'{"a": NaN}', "infinity": b'{"a": [-Infinity]}', "overflow": b'{"a": 1e999}', "lone surrogate": b'{"a": "\\udc00"}',
    "surrogate key": b'{"\\ud800": 1}', "open": b'{"a": 1', "rest": b'{"a": 1}{', "not utf-8": b'{"a": "\xff"}', "zeros": bytes(64),
    "utf-16": '{"a": 1}'.encode("utf-16"), "bom": b'\xef\xbb\xbf{"a": 1}', "depth": b'{"a":' * 100_000,
    "deep lists": b'{"a":' + b"[" * 10**6,
    "long number": b'{"a": ' + b"9" * 10_000 + b"}", "single quotes": b"{'a': 1}", "comment": b'{"a": 1} // x',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_json(tmp_path, content):
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(CorruptFile) as caught:
        read_json(tmp_path / "f.json")
    assert str(tmp_path / "f.json") in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_large_file_is_not_read_whole(tmp_path):
    with open(tmp_path / "f.json", "wb") as file:
        file.truncate(1 << 40)  # a terabyte of zeros that takes no room
    with pytest.raises(CorruptFile, match="more than the 16,777,216 bytes"):
        read_json(tmp_path / "f.json")


def test_a_value_that_json_lacks_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "f", {"a": 1})
    for bad in ({"a": float("nan")}, {"a": {1, 2}}, {"a": "\ud800"}):
        with pytest.raises((ValueError, TypeError)):
            write_json(tmp_path / "f", bad)
        assert listing(tmp_path) == ["f"] and read_json(tmp_path / "f") == {"a": 1}


def test_a_copy_is_of_the_bytes_that_were_hashed(tmp_path):
    content = os.urandom(3 << 20)
    written = write_file(tmp_path / "f", content)
    for i in (0, 1 << 20, len(content) - 1):
        spoilt = bytearray(content)
        spoilt[i] ^= 128
        (tmp_path / "f").write_bytes(spoilt)
        with pytest.raises(CorruptFile, match=f"has SHA-256 .*{written.sha256}"):
            verified_copy(tmp_path / "f", written.sha256)
    (tmp_path / "f").write_bytes(content)
    with verified_copy(tmp_path / "f", written.sha256) as copy:
        (tmp_path / "f").write_bytes(bytes(10))
        assert copy.read() == content


def test_an_error_while_reading_is_a_corrupt_file(tmp_path, monkeypatch):
    written = write_file(tmp_path / "f", b"x" * 100)

    class Failing:
        def __enter__(self): return self
        def __exit__(self, *_): pass
        def readinto(self, buffer): raise OSError(errno.EIO, "Input/output error")

    real = os.fdopen

    def fdopen(fd, mode="r", *args):
        if "w" in mode:
            return real(fd, mode, *args)
        os.close(fd)
        return Failing()

    monkeypatch.setattr(durable.os, "fdopen", fdopen)
    with pytest.raises(CorruptFile, match="Input/output error"):
        verified_copy(tmp_path / "f", written.sha256)


# ---- leftovers


def dead_pid():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_sweep_takes_leftovers_of_the_dead_and_nothing_else(tmp_path):
    dead, alive = dead_pid(), os.getppid()
    folder = tmp_path / f".tmp-{dead}-3-epoch-0001"
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(b"half")
    (tmp_path / f".trash-{dead}-4-epoch-0002").mkdir()
    (tmp_path / f".tmp-{dead}-0-latest.json").touch()
    (tmp_path / f".tmp-{os.getpid()}-0-latest.json").touch()  # of an earlier process of this number
    precious = tmp_path.parent / "precious"
    precious.mkdir()
    (precious / "file").touch()
    (tmp_path / f".tmp-{dead}-5-link").symlink_to(precious)
    swept = listing(tmp_path)
    kept = [f".tmp-{alive}-0-latest.json", f".tmp-{dead}-0-", f".tmp-{dead}-x-a", ".tmp--0-a", f"tmp-{dead}-0-a", ".hidden", "epoch-0001",
            f".tmp-٣{dead}-0-a", ".tmp-1234567890123-0-a"]
    for name in kept:
        (tmp_path / name).touch()
    assert sorted(sweep(tmp_path)) == swept
    assert listing(tmp_path) == sorted(kept) and listing(precious) == ["file"]


# ---- the lock

HOLD = """
    import os, sys, time
    from codex_ml.run_folder import FolderLock
    with FolderLock(sys.argv[1]):
        if "fork" in sys.argv and os.fork() == 0:
            os.write(1, f"{os.getpid()}\\n".encode())  # one write, so that two processes' lines do not mix
            time.sleep(60)
            os._exit(0)
        os.write(1, b"held\\n")
        time.sleep(60)
"""


@contextmanager
def holder(folder, *words):
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(HOLD), str(folder), *words], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_process_is_refused_and_told_whom_by(tmp_path):
    with holder(tmp_path) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(FolderInUse, match=f"pid {process.pid}"), FolderLock(tmp_path):
            raise AssertionError
        process.kill()
        process.wait()
        with FolderLock(tmp_path):
            assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_children_of_a_killed_holder_do_not_keep_its_lock(tmp_path):
    with holder(tmp_path, "fork") as process:
        lines = sorted([process.stdout.readline().strip(), process.stdout.readline().strip()])
        child = int(lines[0])
        try:
            process.kill()
            process.wait()
            os.kill(child, 0)  # it lives
            with FolderLock(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_forked_child_can_not_take_the_lock_and_its_end_does_not_free_it(tmp_path):
    with FolderLock(tmp_path):
        def second():
            try:
                with FolderLock(tmp_path):
                    raise AssertionError
            except FolderInUse:
                pass

        assert fork(second) == 0
        assert fork(second) == 0  # still held, though a child with a copy of the descriptor has ended


def test_the_lock_is_freed_when_the_block_raises(tmp_path):
    with pytest.raises(ZeroDivisionError), FolderLock(tmp_path):
        raise ZeroDivisionError
    with FolderLock(tmp_path):
        pass
    assert not run_folder._locked


@pytest.mark.parametrize("odd", ("link", "device", "folder"))
def test_odd_things_in_the_place_of_the_lock(tmp_path, odd):
    ODD[odd](tmp_path / ".lock")
    with pytest.raises(StorageError), FolderLock(tmp_path):
        raise AssertionError


def test_garbage_in_the_lock_file_harms_nobody(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff" * 100)
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text()) == os.getpid()
