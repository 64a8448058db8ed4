"""TensorBoard's files, read as TensorBoard reads them: by its accumulator, and by its server, with either of its loaders."""

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from codex_ml.config import TrainConfig
from codex_ml.telemetry.record import event_record, scalar_record, snapshot_record, structured_records
from codex_ml.telemetry.tensorboard import TBWriter, open_tensorboard, read_scalars, table

pytest.importorskip("tensorboard")
ON = TrainConfig(tensorboard=True)
HISTOGRAM = {"edges": [-1.0, 0.0, 0.5, 1.0], "counts": [2, 0, 3], "min": -0.75, "max": 1.0, "num": 5, "sum": 1.0, "sum_squares": 3.5}


def session(folder, begin, end, value, kill=False, run_id="0f3a"):
    sink = open_tensorboard(ON, folder, run_id)
    data = {"config": {"epochs": 5, "data": "a|b"}, "environment": {"torch": {"version": "2.13"}},
            "manifest": {"git_sha": "ab12"}, "resumed_from": None}
    sink.emit(event_record(run_id, begin, "run_start", data=data))
    for step in range(begin + 10, end + 1, 10):
        sink.emit(scalar_record(run_id, step, "train", "loss", value))
        sink.emit(scalar_record(run_id, step, "train", "lr", 1e-3))
        for record in structured_records(run_id, step, "train", "weights/head", "histogram", HISTOGRAM):
            sink.emit(record)
        sink.emit(snapshot_record(run_id, step, {"system.cpu.utilization": value / 10, "gpu_name": "none"}))
    if not kill:
        sink.emit(event_record(run_id, end, "run_end", data={"status": "completed"}))
        sink.close()


RESUMED = [(step, 2.0) for step in range(10, 101, 10)] + [(110, 1.0), (120, 1.0)]


@pytest.fixture
def resumed(tmp_path):
    session(tmp_path, 0, 150, 2.0, kill=True)
    session(tmp_path, 100, 120, 1.0)
    return tmp_path / "tensorboard"


def test_a_resumed_curve_has_no_saw_tooth(resumed):
    assert len(list(resumed.glob("events.out.tfevents.*"))) == 2
    found = read_scalars(resumed)
    assert found["train/loss"] == RESUMED
    assert [step for step, _ in found["system/system.cpu.utilization"]] == [step for step, _ in RESUMED]


def test_without_the_mark_there_is_one(tmp_path, monkeypatch):
    "What the test above relies on."
    monkeypatch.setattr(TBWriter, "start", lambda self, step: None)
    session(tmp_path, 0, 150, 2.0)
    session(tmp_path, 100, 120, 1.0)
    assert len(read_scalars(tmp_path / "tensorboard")["train/loss"]) == 17


def test_what_a_page_gets(resumed):
    "As the pages load it without the fast loader, histograms and texts included."
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    found = EventAccumulator(str(resumed), tensor_size_guidance={"scalars": 0, "histograms": 0, "text": 0}).Reload()

    def values(tag):
        return [(e.step, tensor_util.make_ndarray(e.tensor_proto)) for e in found.Tensors(tag)]

    assert [(step, value.item()) for step, value in values("train/loss")] == RESUMED
    step, histogram = values("train/weights/head")[-1]
    assert step == 120
    np.testing.assert_allclose(histogram, [[-0.75, 0, 2], [0, 0.5, 0], [0.5, 1, 3]])
    [(zero, first), (hundred, _)] = values("run/config")
    assert (zero, hundred) == (0, 100)
    assert first[0].decode().splitlines() == ["| key | value |", "| --- | --- |", "| epochs | 5 |", "| data | a\\|b |"]
    assert "torch.version | 2.13" in values("run/environment")[0][1][0].decode()
    assert "git_sha | ab12" in values("run/manifest")[0][1][0].decode()


def server(logdir, *arguments):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "tensorboard.main", "--logdir", logdir, "--host", "127.0.0.1", "--port", str(port),
                                *arguments], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    asked = urllib.parse.urlencode({"run": "tensorboard", "tag": "train/loss"})
    return process, f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?{asked}"


@pytest.mark.parametrize("fast", ["true", "false"])
def test_the_server_shows_it_so(resumed, fast):
    process, question = server(resumed.parent, f"--load_fast={fast}")
    try:
        deadline, found = time.monotonic() + 60, []
        while len(found) < len(RESUMED) and time.monotonic() < deadline:
            time.sleep(0.2)
            try:
                with urllib.request.urlopen(question, timeout=5) as answer:
                    found = [(step, value) for _, step, value in json.load(answer)]
            except OSError:
                pass
        assert found == RESUMED
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def test_a_clock_that_goes_back_does_not_change_the_order(tmp_path, monkeypatch):
    session(tmp_path, 0, 150, 2.0)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    session(tmp_path, 100, 120, 1.0)
    assert read_scalars(tmp_path / "tensorboard")["train/loss"] == RESUMED


def test_twenty_processes_within_a_second_keep_their_order(tmp_path):
    for i in range(20):
        session(tmp_path, 10 * i, 10 * i + 50, float(i))
    assert read_scalars(tmp_path / "tensorboard")["train/loss"][:20] == [(10 * (i + 1), float(i)) for i in range(20)]


def test_a_run_that_starts_anew_in_the_same_folder_replaces_the_other(tmp_path):
    session(tmp_path, 0, 150, 2.0)
    session(tmp_path, 0, 50, 1.0, run_id="bbbb")
    assert read_scalars(tmp_path / "tensorboard")["train/loss"] == [(step, 1.0) for step in range(10, 51, 10)]


def test_runs_that_share_a_folder_stay_apart(tmp_path):
    shared = TrainConfig(tensorboard=True, tensorboard_dir=str(tmp_path / "all"))
    for run_id in ("a" * 32, "b" * 32):
        sink = open_tensorboard(shared, tmp_path / run_id, run_id)
        sink.emit(scalar_record(run_id, 1, "train", "loss", 1.0))
        sink.close()
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == ["a" * 12, "b" * 12]


def test_values_that_are_no_ordinary_numbers(tmp_path):
    sink = open_tensorboard(ON, tmp_path, "0f3a")
    for step, value in enumerate([math.nan, math.inf, -math.inf, 1e300, 5e-324, "good"]):
        sink.emit(scalar_record("0f3a", step, "train", "loss", value))
    sink.emit({**scalar_record("0f3a", 9, "train", "loss", 1.0), "value": None, "tags": {"manifest": "unknown", "kind": "histogram"}})
    sink.close()
    values = [value for _, value in read_scalars(tmp_path / "tensorboard")["train/loss"]]
    assert math.isnan(values[0]) and values[1:] == [math.inf, -math.inf, math.inf, 0.0]


def test_histograms_of_nothing_and_of_one_value(tmp_path):
    with TBWriter(logdir=tmp_path) as writer:
        writer.add_histogram("empty", [], 1)
        writer.add_histogram("nan", [math.nan], 1)
        writer.add_histogram("one", np.full(7, 3.0), 1)
        writer.add_histogram("strings", {**HISTOGRAM, "max": "Infinity"}, 1)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(found.Tags()["histograms"]) == ["one", "strings"] and found.Histograms("one")[0].histogram_value.num == 7


def test_a_confusion_matrix_is_a_table(tmp_path):
    sink = open_tensorboard(ON, tmp_path, "0f3a")
    data = {"labels": ["a", "b"], "counts": [[8, 2], [1, 9]]}
    for record in structured_records("0f3a", 3, "validation", "confusion", "confusion_matrix", data):
        sink.emit(record)
    sink.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [event] = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tensors("validation/confusion")
    assert event.tensor_proto.string_val[0].decode().splitlines()[2] == "| a | 8 | 2 |"


def test_tables_cannot_be_broken():
    assert table(["a"], [["x|y\nz\\"]]).splitlines() == ["| a |", "| --- |", "| x\\|y z\\\\ |"]


def test_many_threads(tmp_path):
    with TBWriter(logdir=tmp_path) as writer:
        threads = [threading.Thread(target=lambda n=n: [writer.add_scalar(f"t{n}", step, step) for step in range(200)]) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = read_scalars(tmp_path)
    assert len(found) == 8 and all(points == [(step, step) for step in range(200)] for points in found.values())


KILLED = """
import os, signal, sys
from pathlib import Path
from codex_ml.telemetry.tensorboard import TBWriter
writer = TBWriter(logdir=sys.argv[1])
for step in range(1, 10**9):
    writer.add_scalar("train/loss", step, step)
    os.write(1, b"%d\\n" % step)
"""


def test_a_kill_loses_nothing_that_was_added(tmp_path):
    for i in range(5):
        child = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / str(i)], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(0.013 * (i + 1))
        child.kill()
        last = int(child.communicate()[0].split()[-1])
        points = read_scalars(tmp_path / str(i))["train/loss"]
        assert [step for step, _ in points[:last]] == list(range(1, last + 1)) and len(points) in (last, last + 1)


def test_a_forked_worker_writes_nothing_twice(tmp_path):
    writer = TBWriter(logdir=tmp_path)
    for step in range(50):
        writer.add_scalar("train/loss", step, step)
        pid = os.fork()
        if pid == 0:
            del writer
            os._exit(0)
        os.waitpid(pid, 0)
    writer.close()
    assert [step for step, _ in read_scalars(tmp_path)["train/loss"]] == list(range(50))


@pytest.mark.parametrize("why", ["absent", "broken"])
def test_without_tensorboard_one_warning_and_no_files(why, tmp_path, caplog, monkeypatch):
    if why == "absent":
        monkeypatch.setitem(sys.modules, "tensorboard", None)
    else:
        monkeypatch.setattr("codex_ml.telemetry.tensorboard._load", lambda: (_ for _ in ()).throw(TypeError("protobuf is too old")))
    with caplog.at_level(logging.WARNING, logger="codex_ml"):
        assert open_tensorboard(ON, tmp_path, "0f3a") is None
    [told] = [r.getMessage() for r in caplog.records]
    assert 'pip install "codex_ml[tensorboard]"' in told and list(tmp_path.iterdir()) == []
    with TBWriter(True, tmp_path / "x") as writer:
        writer.add_scalar("a", 1, 1), writer.add_text("a", "b"), writer.add_histogram("a", [1], 1), writer.start(3), writer.flush()
    assert list(tmp_path.iterdir()) == []


def test_not_asked_for(tmp_path, caplog):
    assert open_tensorboard(TrainConfig(), tmp_path, "0f3a") is None
    TBWriter(False, tmp_path / "x").add_scalar("a", 1, 1)
    assert list(tmp_path.iterdir()) == [] and caplog.records == []


def test_nothing_heavy_is_loaded(tmp_path):
    "Neither torch nor TensorFlow, and no thread is started."
    code = f"""
import sys, threading
from codex_ml.telemetry.tensorboard import TBWriter
before = threading.active_count()
with TBWriter(logdir={str(tmp_path)!r}) as writer: writer.add_scalar("a", 1, 1)
print(sorted({{"torch", "tensorflow", "pandas"}} & set(sys.modules)), threading.active_count() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[] 0", done.stderr


def test_a_full_disk_raises_and_the_file_stays_readable(tmp_path):
    import resource

    writer = TBWriter(logdir=tmp_path)
    for step in range(100):
        writer.add_scalar("train/loss", step, step)
    size, before = next(Path(tmp_path).iterdir()).stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
    try:
        with pytest.raises(OSError):
            writer.add_scalar("train/loss", 100, 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    writer.add_scalar("train/loss", 101, 101)
    writer.close()
    assert [step for step, _ in read_scalars(tmp_path)["train/loss"]] == list(range(102))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
def test_a_histogram_of_a_parameter_as_it_is(dtype, tmp_path):
    torch = pytest.importorskip("torch")
    values = torch.arange(6.0).reshape(2, 3).to(getattr(torch, dtype))
    with TBWriter(True, tmp_path) as writer:
        writer.add_histogram("w", torch.nn.Parameter(values, requires_grad=values.is_floating_point()), 1)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [event] = EventAccumulator(str(tmp_path)).Reload().Histograms("w")
    assert (event.histogram_value.num, event.histogram_value.sum, event.histogram_value.max) == (6, 15, 5)
