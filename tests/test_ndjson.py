import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

from codex_ml.telemetry import ndjson
from codex_ml.telemetry.ndjson import NdjsonReader, NdjsonWriter, read_ndjson
from codex_ml.telemetry.record import encode, scalar_record


def record(step, **tags):
    return scalar_record("r", step, "train", "loss", step / 3, tags=tags, timestamp="2026-11-24T08:30:00.000000Z")


def steps(path):
    records, torn = read_ndjson(path)
    return [r["step"] for r in records], torn


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".codex" / "metrics.ndjson"


@pytest.fixture
def in_time():
    "A hang is a failure within five seconds."
    def late(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def write(path, *numbers):
    writer = NdjsonWriter(path)
    for number in numbers:
        writer.emit(record(number))
    writer.close()


def test_torn_at_every_byte_loses_the_last_record_only(path):
    write(path, 1, 2)
    whole = path.read_bytes()
    last = len(encode(record(2)))
    for cut in range(1, last + 1):
        path.write_bytes(whole[:-cut])
        expected = ([1, 2], 0) if cut == 1 else ([1], 0) if cut == last else ([1], 1)
        assert steps(path) == expected, cut
        write(path, 3)
        assert steps(path) == ([*expected[0], 3], expected[1]), cut


def test_a_flipped_bit_in_the_middle_is_told_with_its_place(path):
    "What is damaged is not passed off as cut short: at most the last byte of a line can be told from neither."
    line = encode(record(2, note="text"))
    path.parent.mkdir(parents=True)
    torn = 0
    for place in range(len(line) - 1):
        for bit in range(7):
            damaged = line[:place] + bytes([line[place] ^ 1 << bit]) + line[place + 1:]
            if b"\n" in damaged[:-1]:
                continue
            path.write_bytes(encode(record(1)) + damaged + encode(record(3)))
            told = []
            reader = NdjsonReader(path, on_bad=told.append)
            found = [r.get("step") for r in reader]
            assert found[0] == 1 and found[-1] == 3
            assert all(f"{path.name}:2: " in reason for reason in told) and len(found) + len(told) + reader.torn == 3
            torn += reader.torn
    assert torn <= 2, torn


def test_two_records_run_into_each_other_are_told(path):
    path.parent.mkdir(parents=True)
    path.write_bytes(encode(record(1)) + encode(record(2))[:60] + encode(record(3)) + encode(record(4)))
    told = []
    reader = NdjsonReader(path, on_bad=told.append)
    assert [r["step"] for r in reader] == [1, 4] and len(told) == 1 and ":2: " in told[0] and reader.torn == 0


def test_zeros_where_a_power_cut_left_them_are_told(path):
    write(path, 1)
    with path.open("ab") as file:
        file.write(b"\0" * 300)
    write(path, 2)
    with pytest.warns(UserWarning, match=r"metrics\.ndjson:2: "):
        assert steps(path) == ([1, 2], 0)
    with path.open("ab") as file:
        file.write(b'{"$schema":' + b"\0" * 20 + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.ndjson:2: .*strict=False"):
        read_ndjson(path, strict=True)


@pytest.mark.parametrize("line", [b"text", b'{"a": 1}', b"[1]", b"{}", b'{"schema_version": "v9"}', b'{"x": nul}', b"\xff\xfe"])
def test_a_bad_line_is_told_with_its_number_and_takes_no_other_with_it(path, line):
    write(path, 1)
    with path.open("ab") as file:
        file.write(line + b"\n\n")
    write(path, 2)
    reader = NdjsonReader(path)
    with pytest.warns(UserWarning, match=r"metrics\.ndjson:2: "):
        assert [r["step"] for r in reader] == [1, 2]
    assert len(reader.bad) == 1 and reader.torn == 0


def test_each_record_is_one_write_and_there_at_once(path, monkeypatch):
    calls, real = [], os.write
    monkeypatch.setattr(ndjson.os, "write", lambda fd, data: calls.append(data) or real(fd, data))
    writer = NdjsonWriter(path)
    for step in range(5):
        writer.emit(record(step, note="ü" * 5000))
        assert path.read_bytes() == b"".join(calls) and len(calls) == step + 1
    writer.close()


def test_a_short_write_is_finished(path, monkeypatch):
    real = os.write
    monkeypatch.setattr(ndjson.os, "write", lambda fd, data: real(fd, data[: max(1, len(data) // 3)]))
    write(path, 1, 2, 3)
    assert path.read_bytes() == b"".join(encode(record(n)) for n in (1, 2, 3))


def test_a_disk_that_fills_up_raises_each_time_and_recovers(path, monkeypatch):
    writer, real, room = NdjsonWriter(path), os.write, [100]

    def full(fd, data):
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = real(fd, data[: room[0]])
        room[0] -= taken
        return taken

    monkeypatch.setattr(ndjson.os, "write", full)
    for number in (1, 2):
        with pytest.raises(OSError, match="No space left"):
            writer.emit(record(number))
    room[0] = 10**6
    writer.emit(record(3))
    writer.emit(record(4))
    writer.close()
    assert steps(path) == ([3, 4], 1)


def test_a_real_file_size_limit(path):
    code = f"""
import resource, signal
from codex_ml.telemetry.ndjson import NdjsonWriter
from codex_ml.telemetry.record import scalar_record
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = NdjsonWriter({str(path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
failed = 0
for step in range(20):
    try: writer.emit(scalar_record("r", step, "train", "loss", 1.0))
    except OSError: failed += 1
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
writer.emit(scalar_record("r", 20, "train", "loss", 1.0))
print(failed)
"""
    failed = int(subprocess.check_output([sys.executable, "-c", code]))
    found, torn = steps(path)
    assert failed > 10 and len(found) == 21 - failed and found[-1] == 20 and torn == 1
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


WRITER = """
import sys
from codex_ml.telemetry.ndjson import NdjsonWriter
from codex_ml.telemetry.record import scalar_record
writer = NdjsonWriter(sys.argv[1])
for step in range(int(sys.argv[3])):
    writer.emit(scalar_record(sys.argv[2], step, "train", "loss", 1.0, tags={"pad": "x" * (step % 7 * 300)}))
    if len(sys.argv) > 4: print(step, flush=True)
"""


def test_four_processes_share_a_file(path):
    children = [subprocess.Popen([sys.executable, "-c", WRITER, path, name, "500"]) for name in "abcd"]
    assert [child.wait() for child in children] == [0] * 4
    records, torn = read_ndjson(path)
    assert torn == 0 and len(records) == 2000
    for name in "abcd":
        assert [r["step"] for r in records if r["run_id"] == name] == list(range(500))


@pytest.mark.parametrize("seed", range(3))
def test_killed_no_acknowledged_record_is_lost(path, seed):
    child = subprocess.Popen([sys.executable, "-c", WRITER, path, "a", "1000000", "tell"], stdout=subprocess.PIPE)
    assert child.stdout
    told = child.stdout.readline()
    time.sleep(random.Random(seed).uniform(0.01, 0.1))
    child.send_signal(signal.SIGKILL)
    lines = (told + child.stdout.read()).split(b"\n")
    child.wait()
    acknowledged = int(lines[-2])
    found, torn = steps(path)
    assert found == list(range(len(found))) and len(found) > acknowledged and torn <= 1


def test_a_forked_worker_neither_doubles_nor_ends_what_its_parent_writes(path):
    writer = NdjsonWriter(path)
    writer.emit(record(1))
    pid = os.fork()
    if pid == 0:
        writer.flush()
        writer.close()
        os._exit(0)
    os.waitpid(pid, 0)
    writer.emit(record(2))
    writer.close()
    assert steps(path) == ([1, 2], 0)


def test_a_pipe_is_not_waited_for(tmp_path, in_time):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, check=lambda error: error.errno == errno.ENXIO):
        NdjsonWriter(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    writer = NdjsonWriter(tmp_path / "pipe")
    writer.emit(record(1))
    writer.flush()
    with pytest.raises(BlockingIOError):
        for step in range(10_000):
            writer.emit(record(step))
    assert json.loads(os.read(reader, 10**6).split(b"\n")[0])["step"] == 1
    os.close(reader)
    writer.close()


@pytest.mark.parametrize("device,fails", [("/dev/full", True), ("/dev/null", False)])
def test_devices(device, fails):
    writer = NdjsonWriter(device)
    if fails:
        with pytest.raises(OSError, match="No space left"):
            writer.emit(record(1))
    else:
        writer.emit(record(1))
    writer.flush()
    writer.close()


def test_flush_waits_for_the_disk(path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(ndjson.os, "fsync", lambda fd: synced.append(fd) or real(fd))
    writer = NdjsonWriter(path)
    writer.emit(record(1))
    assert not synced
    writer.flush()
    assert len(synced) == 3  # the file, and once the folder, whose entry is new, and the one in which that was made
    writer.emit(record(2))
    writer.flush()
    assert len(synced) == 4
    writer.close()
    writer.close()
    with pytest.raises(OSError):
        writer.emit(record(3))


def test_the_descriptor_is_not_inherited_by_programs(path):
    writer = NdjsonWriter(path)
    writer.emit(record(1))
    child = subprocess.run(["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, text=True)
    assert str(path) not in child.stdout
    writer.close()


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_ndjson(tmp_path / "no.ndjson")
    with pytest.raises(OSError):
        NdjsonWriter(tmp_path)
