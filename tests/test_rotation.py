"""A file that is cut while it is written: whatever happens at whatever instant, every line is in the stream once, and in order."""

import errno
import fcntl
import gzip
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import contextmanager

import pytest

from codex_ml.telemetry import appender, segments
from codex_ml.telemetry.ndjson import NdjsonReader, NdjsonWriter, read_ndjson
from codex_ml.telemetry.record import encode, scalar_record
from codex_ml.telemetry.segments import Lines, find_streams, pack, stream_files

STAMP = "2026-11-24T08:30:00.000000Z"


def record(step, run="r", timestamp=STAMP, **tags):
    return scalar_record(run, step, "train", "loss", 0.5, tags=tags, timestamp=timestamp)


LINE = len(encode(record(10)))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.ndjson"


def steps(path):
    records, torn = read_ndjson(path, strict=True)
    return [r["step"] for r in records], torn


def names(path):
    return sorted(p.name.removeprefix(path.name) for p in path.parent.iterdir())


def emit(path, numbers, **options):
    writer = NdjsonWriter(path, **options)
    for number in numbers:
        writer.emit(record(number))
    writer.close()


def wait_for(condition):
    until = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


# ---- when it is cut

def test_no_file_is_larger_than_it_may_be(path):
    emit(path, range(10, 70), max_bytes=5 * LINE, backups=99)
    assert steps(path) == (list(range(10, 70)), 0)
    assert path.stat().st_size == 5 * LINE
    sizes = {len(gzip.decompress(p.read_bytes())) for p in stream_files(path)[:-1]}
    assert sizes == {5 * LINE} and len(stream_files(path)) == 12


def test_a_line_larger_than_a_file_may_be_has_one_of_its_own(path):
    writer = NdjsonWriter(path, max_bytes=300, backups=9)
    for step in range(3):
        writer.emit(record(step, pad="x" * 1000))
    writer.close()
    assert steps(path) == ([0, 1, 2], 0) and len(stream_files(path)) == 3


def test_age_is_counted_from_the_first_line(path, monkeypatch):
    now = time.time()
    monkeypatch.setattr(appender.time, "time", lambda: now)
    writer = NdjsonWriter(path, max_age=60)
    now += 1000  # an empty file has no age
    for step in range(3):
        writer.emit(record(step))
        now += 40
    writer.close()
    assert [p.name for p in stream_files(path)] == [f"{path.name}.00001.gz", path.name]
    assert len(path.read_bytes().splitlines()) == 1 and steps(path)[0] == [0, 1, 2]


@pytest.mark.parametrize("first,cut", [(STAMP, True), (None, False)])
def test_a_resumed_file_is_as_old_as_its_first_line(path, first, cut):
    writer = NdjsonWriter(path)
    writer.emit(record(1, timestamp=first))
    writer.close()
    emit(path, [2], max_age=3600)
    assert steps(path) == ([1, 2], 0) and len(stream_files(path)) == 1 + cut


@pytest.mark.parametrize("first", [b"no record\n", b"\n", b"[" * 100_000, b'{"timestamp": 3}\n', b"\xff"])
def test_a_first_line_without_a_time_is_as_old_as_the_file(path, first):
    path.write_bytes(first)
    os.utime(path, (1e9, 1e9))
    emit(path, [1], max_age=3600)
    assert names(path) == ["", ".00001.gz"]


def test_only_the_newest_segments_are_kept_and_nothing_else_is_touched(path):
    others = ["metrics.ndjson.old", "metrics.ndjson.1", "metrics.ndjson.20260101", "xmetrics.ndjson.00001", "metrics.ndjson.00001.gz.bak"]
    for name in others:
        (path.parent / name).write_text("mine")
    emit(path, range(10, 40), max_bytes=LINE, backups=3)
    assert steps(path) == ([36, 37, 38, 39], 0)
    assert all((path.parent / name).read_text() == "mine" for name in others)
    assert sorted(set(names(path)) - {n.removeprefix(path.name) for n in others}) == ["", ".00027.gz", ".00028.gz", ".00029.gz"]


def test_without_backups_only_the_file_stays(path):
    emit(path, range(10, 20), max_bytes=3 * LINE, backups=0)
    assert names(path) == [""] and steps(path) == ([19], 0)


@pytest.mark.parametrize("options", [{"max_bytes": 0}, {"max_age": -1}, {"backups": -1}, {"fsync_seconds": -1}, {"max_age": float("nan")}])
def test_limits_that_cannot_be(path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        NdjsonWriter(path, **options)


def test_compressed_segments_do_not_depend_on_the_time(tmp_path):
    for name in "ab":
        emit(tmp_path / name, range(10, 13), max_bytes=2 * LINE)
    packed = (tmp_path / "a.00001.gz").read_bytes()
    assert packed == (tmp_path / "b.00001.gz").read_bytes() and packed[4:8] == b"\0\0\0\0"  # where gzip has the time


# ---- a crash at every operation

OPERATIONS = ["open", "write", "rename", "replace", "unlink", "fsync", "close", "dup", "fstat"]


@contextmanager
def crash_at(k, half):
    "The process ends before its k-th operation on files, in whatever thread; where that is a write, with half of it done."
    real, count, lock = {name: getattr(os, name) for name in OPERATIONS}, [0], threading.Lock()

    def shim(name):
        def call(*args, **kwargs):
            with lock:
                count[0] += 1
                if count[0] == k:
                    if name == "write" and half:
                        real["write"](args[0], args[1][: len(args[1]) // 2])
                    os._exit(9)
            return real[name](*args, **kwargs)
        return call

    for name in OPERATIONS:
        setattr(os, name, shim(name))
    try:
        yield
    finally:
        for name in OPERATIONS:
            setattr(os, name, real[name])


def crashing_child(path, k, half, numbers, **options):
    "What a child had acknowledged when it crashed, and whether it did."
    read, told = os.pipe()
    tell = os.write
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with crash_at(k, half):
                writer = NdjsonWriter(path, **options)
                for number in numbers:
                    writer.emit(record(number))
                    tell(told, struct.pack("<i", number))
                writer.close()
            status = 0
        finally:
            os._exit(status)
    os.close(told)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9)
    return [n for n, in struct.iter_unpack("<i", answer)], status == 9


def check_after_crash(path, acknowledged, numbers):
    found, torn = steps(path)
    assert found == numbers[: len(found)] and len(found) - len(acknowledged) in (0, 1) and torn <= 1
    return found


@pytest.mark.parametrize("half", [False, True])
def test_crashed_at_every_operation(tmp_path, half):
    k, crashed, numbers = 0, True, list(range(10, 22))
    while crashed:
        k += 1
        path = tmp_path / str(k) / "metrics.ndjson"
        acknowledged, crashed = crashing_child(path, k, half, numbers, max_bytes=3 * LINE, backups=99, fsync_seconds=0.001)
        if not path.parent.exists() or not stream_files(path):
            assert acknowledged == []
            continue
        found = check_after_crash(path, acknowledged, numbers)
        emit(path, [*numbers[len(found):], 98, 99], max_bytes=3 * LINE, backups=99)
        again, _ = steps(path)
        assert again == [*numbers, 98, 99], k
        left = names(path)
        assert left[0] == "" and left[1:] == [f".{n:05d}.gz" for n in range(1, len(left))], (k, left)
    assert k > 40  # that many operations there are


def test_crashed_twice(tmp_path):
    numbers, chance = list(range(10, 22)), random.Random(5)
    for trial in range(60):
        path = tmp_path / str(trial) / "metrics.ndjson"
        path.parent.mkdir()
        path.touch()
        found: list[int] = []
        for _ in range(3):
            acknowledged, _ = crashing_child(path, chance.randint(1, 90), trial % 2, numbers[len(found):], max_bytes=2 * LINE, backups=99)
            found = check_after_crash_again(path, found, acknowledged, numbers)
        emit(path, [*numbers[len(found):], 99], max_bytes=2 * LINE, backups=99)
        assert steps(path)[0] == [*numbers, 99] and not any(name.startswith(".tmp") for name in names(path))


def check_after_crash_again(path, before, acknowledged, numbers):
    found = steps(path)[0]
    assert found == numbers[: len(found)] and len(found) - len(before) - len(acknowledged) in (0, 1)
    return found


def test_the_disk_has_a_compressed_segment_before_the_other_form_goes(path, monkeypatch):
    "A kill does not show a missing fsync, since the page cache survives it: so the order itself is what is tested."
    done = []
    for name in ("fsync", "replace", "unlink"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real, **k: (done.append(name), real(*a, **k))[1])
    path.with_name(path.name + ".00001").write_bytes(encode(record(10)))
    pack(path, 5)
    # the folder, in which it got its name; the file, its name, the folder; and then the other
    assert done == ["fsync", "fsync", "replace", "fsync", "unlink"]


# ---- killed

def log_until_killed(path, first, told):
    writer = NdjsonWriter(path, max_bytes=100 * LINE, backups=999, fsync_seconds=0.002)
    for step in range(first, first + 15_000):  # so many acknowledgements fit into the pipe
        writer.emit(record(step))
        os.write(told, struct.pack("<i", step))
    time.sleep(60)


def test_killed_200_times_no_acknowledged_record_is_lost(tmp_path):
    chance = random.Random(os.environ.get("KILL_SEED", "3"))
    for kill in range(200):
        if kill % 5 == 0:
            path, count, torn = tmp_path / str(kill) / "metrics.ndjson", 0, 0
        read, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                log_until_killed(path, count, told)
            finally:
                os._exit(1)
        os.close(told)
        with os.fdopen(read, "rb") as pipe:
            first = pipe.read(4)
            time.sleep(chance.uniform(0, 0.006))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            acknowledged, = struct.unpack("<i", (first + pipe.read())[-4:])
        found, now = steps(path)
        assert found == list(range(len(found))) and len(found) in (acknowledged + 1, acknowledged + 2)
        assert torn <= now <= torn + 1
        count, torn = len(found), now


# ---- several writers

WRITER = """
import sys, time
from codex_ml.telemetry.ndjson import NdjsonWriter
from codex_ml.telemetry.record import scalar_record
for part in range(4):
    writer = NdjsonWriter(sys.argv[1], max_bytes=20_000, backups=999, fsync_seconds=0.01)
    for step in range(part * 250, part * 250 + 250):
        writer.emit(scalar_record(sys.argv[2], step, "train", "loss", 1.0, tags={"pad": "x" * (step % 7 * 30)}))
        if step % 50 == 0: time.sleep(0.002)
    writer.close()
"""


def test_four_processes_that_all_cut(path):
    children = [subprocess.Popen([sys.executable, "-c", WRITER, path, name]) for name in "abcd"]
    assert [child.wait() for child in children] == [0] * 4
    pack(path, 999)
    records, torn = read_ndjson(path, strict=True)
    assert torn == 0 and len(records) == 4000
    for name in "abcd":
        assert [r["step"] for r in records if r["run_id"] == name] == list(range(1000))
    assert not any(".tmp" in name for name in names(path))


def test_a_file_is_not_cut_under_another_writer(path):
    first, second = NdjsonWriter(path, max_bytes=2 * LINE), NdjsonWriter(path)
    for step in range(10, 20):
        (first if step % 2 else second).emit(record(step))
    assert len(stream_files(path)) == 1
    second.close()
    first.emit(record(20))
    first.close()
    assert steps(path) == (list(range(10, 21)), 0) and len(stream_files(path)) == 2


def test_a_file_that_somebody_took_away_is_made_anew(path):
    writer = NdjsonWriter(path, max_bytes=2 * LINE)
    writer.emit(record(10))
    os.rename(path, path.with_name("mine"))
    for step in (11, 12, 13, 14):
        writer.emit(record(step))
    writer.close()
    assert steps(path.with_name("mine"))[0] + steps(path)[0] == [10, 11, 12, 13, 14]


def test_a_lock_that_nobody_lets_go_costs_no_line(path):
    holder = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(holder, fcntl.LOCK_EX)
    writer = NdjsonWriter(path, max_bytes=LINE)
    for step in (10, 11, 12):
        writer.emit(record(step))
    assert steps(path) == ([10, 11, 12], 0) and len(stream_files(path)) == 1
    os.close(holder)
    writer.emit(record(13))
    writer.close()
    assert steps(path) == ([10, 11, 12, 13], 0) and len(stream_files(path)) == 2


def test_a_file_system_without_locks(path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(appender.fcntl, "flock", no_locks)
    emit(path, range(10, 15), max_bytes=2 * LINE)
    assert steps(path) == (list(range(10, 15)), 0) and len(stream_files(path)) == 3


def in_a_child(work):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(5)
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def ends_well(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_forked_process_goes_on_with_its_copy(path):
    writer = NdjsonWriter(path, max_bytes=3 * LINE, backups=99)
    writer.emit(record(10))
    read, go = os.pipe()

    def child():
        for step in range(20, 30):
            writer.emit(record(step))
        os.read(read, 1)
        writer.emit(record(30))
        writer.close()

    pid = in_a_child(child)
    wait_for(lambda: 29 in steps(path)[0])
    for step in range(11, 16):
        writer.emit(record(step))
    os.write(go, b".")
    assert ends_well(pid)
    for step in range(16, 20):
        writer.emit(record(step))
    writer.close()
    found, torn = steps(path)
    assert torn == 0 and [s for s in found if s < 20] == list(range(10, 20)) and [s for s in found if s >= 20] == list(range(20, 31))


def test_a_fork_while_another_thread_holds_the_lock(path):
    writer, held, done = NdjsonWriter(path), threading.Event(), threading.Event()
    writer.emit(record(10))

    def hold():
        with writer._lock, writer._syncing:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    pid = in_a_child(lambda: (writer.emit(record(11)), writer.flush(), writer.close()))
    assert ends_well(pid)
    done.set()
    thread.join()
    writer.close()
    assert steps(path) == ([10, 11], 0)


def test_threads_share_a_writer(path):
    writer = NdjsonWriter(path, max_bytes=10 * LINE, backups=999)
    threads = [threading.Thread(target=lambda n=n: [writer.emit(record(s, run=n)) for s in range(300)]) for n in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    records, torn = read_ndjson(path, strict=True)
    assert torn == 0
    for name in "abcd":
        assert [r["step"] for r in records if r["run_id"] == name] == list(range(300))


# ---- the thread

def running():
    return [t for t in threading.enumerate() if t.name == "codex_ml-ndjson"]


def test_the_thread_begins_with_the_first_record_and_ends_at_close(path):
    writer = NdjsonWriter(path)
    assert running() == []
    writer.emit(record(1))
    assert len(running()) == 1
    writer.close()
    assert running() == []


def test_no_thread_where_nothing_is_left_to_it(path):
    writer = NdjsonWriter(path, fsync_seconds=None)
    writer.emit(record(1))
    assert running() == []
    writer.close()


def test_the_disk_is_waited_for_in_the_background(path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(threading.current_thread().name), real(fd)))
    writer = NdjsonWriter(path, fsync_seconds=0.01)
    writer.emit(record(1))
    wait_for(lambda: len(synced) == 2)  # the file and, once, the folder
    time.sleep(0.05)
    assert len(synced) == 2  # nothing was written, nothing is synced
    writer.emit(record(2))
    wait_for(lambda: len(synced) == 3)
    writer.emit(record(3))
    writer.close()
    assert synced == ["codex_ml-ndjson"] * len(synced) and len(synced) == 4


def test_a_slow_disk_holds_up_no_record_but_flush_waits(path, monkeypatch):
    busy, free = threading.Event(), threading.Event()
    monkeypatch.setattr(os, "fsync", lambda fd: (busy.set(), free.wait()))
    writer = NdjsonWriter(path, fsync_seconds=0.01)
    writer.emit(record(10))
    busy.wait(5)
    flushed = threading.Thread(target=writer.flush)
    flushed.start()
    flushed.join(0.05)
    assert flushed.is_alive()  # though the thread has taken all that is to be synced
    begun = time.monotonic()
    for step in range(11, 100):
        writer.emit(record(step))
    assert time.monotonic() - begun < 1 and len(steps(path)[0]) == 90
    free.set()
    flushed.join(5)
    assert not flushed.is_alive()
    writer.close()


def test_a_disk_that_hangs_does_not_hold_up_the_end_for_ever(path, monkeypatch):
    free = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda fd: free.wait())
    monkeypatch.setattr(NdjsonWriter, "patience", 0.1)
    writer = NdjsonWriter(path, fsync_seconds=0.01)
    writer.emit(record(1))
    begun = time.monotonic()
    writer.close()
    assert time.monotonic() - begun < 1 and steps(path) == ([1], 0)
    free.set()
    wait_for(lambda: not running())


def test_what_fails_in_the_background_is_raised_once(path, monkeypatch):
    failing, real = [True], os.fsync

    def broken(fd):
        if failing.pop() if failing else False:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd)

    monkeypatch.setattr(os, "fsync", broken)
    writer = NdjsonWriter(path, fsync_seconds=0.01)
    writer.emit(record(1))
    wait_for(lambda: writer._error)
    with pytest.raises(OSError, match="Input/output error"):
        writer.emit(record(2))
    writer.emit(record(3))
    writer.flush()
    writer.close()
    assert steps(path) == ([1, 2, 3], 0)


# ---- a disk that is full

@contextmanager
def file_size_limit(size):
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_segment_that_cannot_be_compressed_stays_and_is_compressed_later(path):
    with path.with_name(path.name + ".00001").open("wb") as file:
        for step in range(10, 500):
            file.write(encode(record(step, noise=os.urandom(50).hex())))
    writer = NdjsonWriter(path, max_bytes=10**6, fsync_seconds=0.01)
    with file_size_limit(10_000):
        writer.emit(record(500))
        wait_for(lambda: writer._error)
        with pytest.raises(OSError, match=r"cannot write .*00001\.gz"):
            writer.emit(record(501))
    assert names(path) == ["", ".00001"]
    writer._error = None
    writer.emit(record(502))
    writer.close()
    assert names(path) == ["", ".00001.gz"] and steps(path) == (list(range(10, 503)), 0)


def test_a_cut_that_fails_costs_no_record(path, monkeypatch):
    writer, real, full = NdjsonWriter(path, max_bytes=2 * LINE), os.rename, [True]

    def rename(*names):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*names)

    monkeypatch.setattr(os, "rename", rename)
    for step in (10, 11):
        writer.emit(record(step))
    for step in (12, 13):
        with pytest.raises(OSError, match="No space left"):
            writer.emit(record(step))
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)  # the lock is shared again
    full.clear()
    writer.emit(record(14))
    writer.close()
    assert steps(path) == ([10, 11, 12, 13, 14], 0) and len(stream_files(path)) == 2


def test_a_new_file_that_cannot_be_opened_is_tried_again(path, monkeypatch):
    writer, real, full = NdjsonWriter(path, max_bytes=LINE), appender.open_shared, [True]

    def opened(path):
        if full:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path)

    monkeypatch.setattr(appender, "open_shared", opened)
    writer.emit(record(10))
    for step in (11, 12):
        with pytest.raises(OSError, match="Too many open files"):
            writer.emit(record(step))
    full.clear()
    writer.emit(record(13))
    writer.flush()
    writer.close()
    assert steps(path) == ([10, 13], 0)


def test_half_a_line_at_the_end_of_a_file_that_is_cut(path):
    path.write_bytes(encode(record(10)) + encode(record(11))[:20])
    emit(path, [12, 13], max_bytes=LINE + 20)
    assert steps(path) == ([10, 12, 13], 1)


# ---- reading

def test_where_a_segment_is_in_both_forms_it_counts_once(path):
    emit(path, [10, 11, 12], max_bytes=LINE)
    packed = path.with_name(path.name + ".00001.gz")
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    path.with_name(f".tmp-{2**22 + 1}-0-{packed.name}").write_bytes(b"half")
    assert steps(path) == ([10, 11, 12], 0)
    assert find_streams(path.parent) == [path]
    emit(path, [13], max_bytes=10**6)
    assert names(path) == ["", ".00001.gz", ".00002.gz"]


def test_what_a_dead_process_left_is_mended_with_the_first_record(path):
    path.with_name(path.name + ".00001").write_bytes(encode(record(10)))
    writer = NdjsonWriter(path, max_bytes=10**6, fsync_seconds=None)
    writer.emit(record(11))
    wait_for(lambda: names(path) == ["", ".00001.gz"])
    writer.close()
    assert steps(path) == ([10, 11], 0)


def test_the_temporary_file_of_a_process_that_lives_is_left(path):
    names = {who: path.with_name(f".tmp-{pid}-{n}-{path.name}.00001.gz") for n, (who, pid) in enumerate(
        [("another", os.getppid()), ("this one", os.getpid()), ("an earlier one of this number", os.getpid()), ("a dead one", 2**22 + 1)])}
    for file in names.values():
        file.touch()
    os.utime(names["an earlier one of this number"], (1e9, 1e9))
    pack(path, 5)
    assert [who for who, file in names.items() if file.exists()] == ["another", "this one"]


def follow_all(path, count, found):
    reader = NdjsonReader(path, strict=True)
    for r in reader.follow(poll=0.001, stop=lambda: len(found) >= count):
        found.append(r["step"])
    reader.close()


@pytest.mark.parametrize("backups", [5, 99])
def test_followed_over_cuts(path, backups):
    found: list[int] = []
    writer = NdjsonWriter(path, max_bytes=40 * LINE, backups=backups)
    writer.emit(record(0))
    thread = threading.Thread(target=follow_all, args=(path, 3000, found))
    thread.start()
    for step in range(1, 3000):
        writer.emit(record(step))
        if step % 100 == 0:
            time.sleep(0.003)
    thread.join(10)
    writer.close()
    assert not thread.is_alive() and found == list(range(3000)) and len(stream_files(path)) > 5


def test_followed_a_byte_at_a_time(path):
    path.touch()
    reader, data, found = NdjsonReader(path, strict=True), encode(record(10)) + encode(record(11)), []
    with path.open("ab", buffering=0) as file:
        for n, byte in enumerate(data, 1):
            file.write(bytes([byte]))
            found += [r["step"] for r in reader.new()]
            assert len(found) == (n >= LINE) + (n == len(data)) and reader.torn == 0


def test_many_cuts_between_two_looks(path):
    writer = NdjsonWriter(path, max_bytes=3 * LINE, backups=99)
    writer.emit(record(10))
    reader, found = NdjsonReader(path, strict=True), []
    chance = random.Random(1)
    step = 11
    while step < 400:
        found += [r["step"] for r in reader.new()]
        for _ in range(chance.randrange(20)):
            writer.emit(record(step))
            step += 1
        if chance.random() < 0.3:
            pack(path, 99)
    writer.close()
    found += [r["step"] for r in reader.new()]
    assert found == list(range(10, step))


def test_a_segment_that_another_one_compresses_at_the_same_time(path, monkeypatch):
    "It goes away between the look at the folder and the look at the file: nothing is left to do, and nothing is lost."
    from codex_ml.telemetry import segments

    writer = NdjsonWriter(path, max_bytes=3 * LINE, backups=99)
    for step in range(8):
        writer.emit(record(step))
    writer.close()
    real, raced = segments.open_part, []

    def late(place, *args):
        if str(place).endswith(".00001") and not raced:
            raced.append(place)
            pack(path, 99)
        return real(place, *args)

    for packed in path.parent.glob("*.gz"):  # as it was before any was compressed
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    monkeypatch.setattr(segments, "open_part", late)
    pack(path, 99)
    assert raced and steps(path) == (list(range(8)), 0)
    assert not [p.name for p in path.parent.iterdir() if p.suffix[1:].isdigit()]


def test_read_while_it_is_cut_and_compressed(path):
    "Whoever reads a stream from its beginning, at any instant, finds a whole beginning of it."
    writer, ended = NdjsonWriter(path, max_bytes=20 * LINE, backups=999), threading.Event()
    writer.emit(record(0))

    def write():
        for step in range(1, 4000):
            writer.emit(record(step))
        ended.set()

    thread, reads = threading.Thread(target=write), 0
    thread.start()
    while not ended.is_set() or not reads:
        found, torn = steps(path)
        assert found == list(range(len(found))) and torn == 0
        reads += 1
    thread.join()
    writer.close()
    assert steps(path)[0] == list(range(4000))


@pytest.mark.parametrize("moment", ["cut", "packed", "deleted"])
def test_what_happens_right_after_the_look_at_the_folder(path, monkeypatch, moment):
    emit(path, range(10, 14), max_bytes=2 * LINE)
    packed = path.with_name(path.name + ".00001.gz")
    if moment != "cut":
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    real, calls = segments.segments, []

    def look(stream):
        found = real(stream)
        calls.append(stream)
        if len(calls) == (2 if moment == "cut" else 1):  # at the second, what is next is the file itself
            if moment == "cut":
                os.rename(path, path.with_name(path.name + ".00002"))
                path.write_bytes(encode(record(14)))
            else:
                monkeypatch.undo()
                pack(path, 5 if moment == "packed" else 0)
        return found

    lines = Lines(path)
    monkeypatch.setattr(segments, "segments", look)
    found = [line.data for line in lines] + [line.data for line in lines]
    assert found == [encode(record(n)) for n in (range(10, 15) if moment == "cut" else range(10, 14) if moment == "packed" else (12, 13))]


def test_a_reader_that_stops_in_the_middle_goes_on_there(path):
    emit(path, range(10, 30), max_bytes=4 * LINE, backups=99)
    reader, found = NdjsonReader(path), []
    while one := next(reader.new(), None):
        found.append(one["step"])
    assert found == list(range(10, 30))


@pytest.mark.parametrize("count", [0, 1, 3, 7, 50])
def test_tail_finds_the_last_from_the_end(path, count):
    emit(path, range(10, 30), max_bytes=6 * LINE, backups=99)
    reader = NdjsonReader(path)
    assert [r["step"] for r in reader.tail(count)] == list(range(10, 30))[max(0, 20 - count):]
    emit(path, [30, 31], max_bytes=10**6)
    assert [r["step"] for r in reader.new()] == [30, 31]


def test_tail_reads_no_segment_that_it_does_not_need(path):
    emit(path, range(10, 30), max_bytes=6 * LINE, backups=99)
    path.with_name(path.name + ".00001.gz").write_bytes(b"unreadable")
    reader = NdjsonReader(path, strict=True)
    assert [r["step"] for r in reader.tail(2)] == [28, 29]
    with pytest.raises(ValueError, match="00001"):
        reader.tail(3)


def test_tail_of_a_large_file_reads_its_end_and_knows_its_lines(path, monkeypatch):
    with path.open("wb") as file:
        for step in range(20_000):
            file.write(encode(record(step)) if step != 19_990 else b"bad\n")
    reader, read = NdjsonReader(path), []
    with pytest.warns(UserWarning, match="19991"):
        found = reader.tail(5, lambda r: read.append(r["step"]) or r["step"] % 2 == 0)
    assert [r["step"] for r in found] == [19_988, 19_992, 19_994, 19_996, 19_998]
    assert len(read) < 3000 and reader.bad[0].startswith(f"{path}:19991: ")


def test_memory_does_not_grow_with_the_stream(path):
    emit(path, range(20_000), max_bytes=10**6, backups=99)
    peaks = []
    for count in (2_000, 20_000):
        tracemalloc.start()
        for n, _ in enumerate(NdjsonReader(path)):
            if n == count:
                break
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000


def test_a_file_without_line_breaks_is_no_line(path, monkeypatch):
    monkeypatch.setattr(segments, "LINE_LIMIT", 1000)
    path.write_bytes(b"\0" * 3500 + b"\n" + encode(record(10)))
    reader = NdjsonReader(path)
    with pytest.warns(UserWarning, match=r"metrics\.ndjson:1: "):
        assert [r["step"] for r in reader] == [10]
    assert all(f"{path}:1: " in reason for reason in reader.bad)


@pytest.mark.parametrize("damage", ["truncate", "flip", "not gzip"])
def test_a_damaged_segment_is_told_and_takes_no_other_with_it(path, damage):
    emit(path, range(10, 40), max_bytes=10 * LINE)
    packed = path.with_name(path.name + ".00001.gz")
    data = bytearray(packed.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 0xFF
    packed.write_bytes(data[:-12] if damage == "truncate" else data if damage == "flip" else b"no gzip")
    reader = NdjsonReader(path)
    with pytest.warns(UserWarning, match=r"metrics\.ndjson\.00001\.gz:"):
        found = [r["step"] for r in reader]
    assert found[-20:] == list(range(20, 40)) and reader.skipped >= 1
    with pytest.raises(ValueError, match=r"metrics\.ndjson\.00001\.gz:"):
        read_ndjson(path, strict=True)


def test_lines_say_where_they_stand(path):
    emit(path, range(10, 15), max_bytes=2 * LINE)
    found = [str(line).removeprefix(str(path)) for line in Lines(path)]
    assert found == [".00001.gz:1", ".00001.gz:2", ".00002.gz:1", ".00002.gz:2", ":1"]
