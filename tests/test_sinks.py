import logging
import os
import random
import re
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from codex_ml import registry
from codex_ml.config import MonitoringConfig, TrainConfig
from codex_ml.telemetry import ndjson
from codex_ml.telemetry.ndjson import read_ndjson
from codex_ml.telemetry.sink_thread import SinkThread, wait_for
from codex_ml.telemetry.sinks import Sinks, open_sinks


class Recorder:
    def __init__(self, fail=()):
        self.calls, self.fail = [], fail

    def _call(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name in self.fail:
            raise self.fail[name]

    def emit(self, record):
        self._call("emit", record["metric"], record["value"])

    def flush(self):
        self._call("flush")

    def close(self):
        self._call("close")


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))


ERRORS = [OSError("disk"), RecursionError("deep"), AssertionError(), MemoryError(), UnicodeEncodeError("utf-8", "\ud800", 0, 1, "bad")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("method", ["emit", "flush", "close"])
def test_a_failing_sink_is_counted_told_once_and_stops_nobody(method, error, caplog):
    bad, good = Recorder({method: error}), Recorder()
    with caplog.at_level(logging.WARNING), Sinks({"bad": bad, "good": good}, "r") as sinks:
        for step in range(3):
            sinks.log(step, "train", {"loss": 1.0})
            sinks.flush()
    assert [call[0] for call in good.calls] == ["emit", "flush"] * 3 + ["close"] == [call[0] for call in bad.calls]
    assert sinks.errors == {"bad": 1 if method == "close" else 3}
    assert len(caplog.records) == 1 and "'bad'" in caplog.text and ("Training goes on" in caplog.text) == (method != "close")


def test_an_interrupt_is_not_swallowed():
    sinks = Sinks({"a": Recorder({"emit": KeyboardInterrupt()})}, "r")
    with pytest.raises(KeyboardInterrupt):
        sinks.log(1, "train", {"loss": 1.0})


def test_values_that_are_no_numbers_cost_themselves_only(caplog):
    good = Recorder()
    sinks = Sinks({"good": good}, "r")
    with caplog.at_level(logging.WARNING):
        for step in range(2):
            sinks.log(step, "v", {"a": 1, "bytes": b"x", "many": torch.ones(3), "none": None, "b": torch.tensor(2.0), 3: np.float32(4)})
    assert [call[1:] for call in good.calls[:3]] == [("a", 1.0), ("b", 2.0), ("3", 4.0)] and len(good.calls) == 6
    assert sinks.errors == {"metrics": 6} and len(caplog.records) == 3  # once for each name


def test_a_forked_worker_touches_no_sink(tmp_path):
    recorder = Recorder()
    sinks = Sinks({"a": recorder}, "r")
    pid = os.fork()
    if pid == 0:
        sinks.log(1, "train", {"loss": 1.0})
        sinks.flush()
        sinks.close()
        os._exit(len(recorder.calls))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    sinks.log(1, "train", {"loss": 1.0})
    assert recorder.calls == [("emit", "loss", 1.0)]


def test_closed_twice_and_used_after():
    recorder = Recorder()
    sinks = Sinks({"a": recorder}, "r")
    sinks.close(), sinks.close(), sinks.log(1, "train", {"loss": 1.0}), sinks.flush()
    assert recorder.calls == [("close",)] and sinks.errors == {}


def test_a_metrics_file_that_cannot_be_opened(tmp_path, caplog):
    (tmp_path / ".codex").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING), open_sinks(TrainConfig(), tmp_path, "r") as sinks:
        sinks.log(1, "train", {"loss": 1.0})
    assert sinks.errors == {"ndjson": 1} and "cannot be opened" in caplog.text


def test_a_full_disk_is_counted_for_each_record(tmp_path, caplog):
    config = TrainConfig(metrics_out="/dev/full", system_metrics_interval=0)
    with caplog.at_level(logging.WARNING), open_sinks(config, tmp_path, "r") as sinks:
        for step in range(5):
            sinks.log(step, "train", {"loss": 1.0, "lr": 0.1})
    assert sinks.errors == {"ndjson": 10} and len(caplog.records) == 1
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_pipe_that_nobody_reads_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with open_sinks(TrainConfig(metrics_out=str(tmp_path / "pipe")), None, "r") as sinks:
        sinks.log(1, "train", {"loss": 1.0})
    assert sinks.errors == {"ndjson": 1}


def test_relative_to_the_working_folder_where_there_is_no_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_sinks(TrainConfig(metrics_out="m.ndjson"), None, "r") as sinks:
        sinks.log(1, "train", {"loss": float("inf")})
    assert read_ndjson(Path("m.ndjson"))[0][0]["value"] == float("inf")


def test_off_makes_no_file_and_costs_no_record(tmp_path, monkeypatch):
    monkeypatch.setattr("codex_ml.telemetry.sinks.scalar_record", None)
    with open_sinks(TrainConfig(metrics_out=None), tmp_path, "r") as sinks:
        sinks.log(1, "train", {"loss": 1.0})
    assert list(tmp_path.iterdir()) == [] and sinks.errors == {}


def asking(*names):
    return TrainConfig(system_metrics_interval=0, monitoring=MonitoringConfig(sinks=dict.fromkeys(names, True)))


def test_a_broken_plugin_is_left_out(tmp_path):
    def refuses(config, folder, run_id):
        raise ImportError("no such library")

    registry.register("sinks", "plugin", refuses)
    registry.register("sinks", "absent", lambda config, folder, run_id: None)
    with open_sinks(asking("plugin", "nowhere", "absent"), tmp_path, "r") as sinks:
        sinks.log(1, "train", {"loss": 1.0})
    assert sinks.errors == {"plugin": 1, "nowhere": 1} and len(read_ndjson(tmp_path / ".codex" / "metrics.ndjson")[0]) == 1


def test_a_registered_sink_is_not_opened_unless_it_is_named(tmp_path):
    opened = []
    registry.register("sinks", "mine", lambda config, folder, run_id: opened.append(Recorder()) or opened[-1])
    for config in (TrainConfig(), asking("Mine")):
        with open_sinks(config, tmp_path, "r") as sinks:
            sinks.log(1, "train", {"loss": 1.0})
    assert [recorder.calls for recorder in opened] == [[("emit", "loss", 1.0), ("close",)]]


class Hangs(Recorder):
    """Hangs for ever at the k-th call, opening included (0)."""

    def __init__(self, at, method=None):
        super().__init__()
        self.at, self.method, self.released = at, method, threading.Event()

    def _call(self, name, *arguments):
        super()._call(name, *arguments)
        if len(self.calls) == self.at or name == self.method:
            self.released.wait(60)


@pytest.mark.parametrize("at, method", [(0, None), (1, None), (5, None), (0, "flush"), (0, "close")])
def test_a_sink_that_hangs_holds_nobody_up(tmp_path, at, method, caplog):
    hangs, good = Hangs(at, method), Recorder()
    registry.register("sinks", "good", lambda config, folder, run_id: good)
    registry.register("sinks", "hangs", lambda config, folder, run_id: hangs if at or method else hangs.released.wait(60))
    door = open_sinks(asking("hangs", "good"), tmp_path, "r")
    begun = time.monotonic()
    for step in range(20):
        door.log(step, "train", {"loss": float(step)})
    door.flush()
    assert time.monotonic() - begun < 1
    door.close()
    assert time.monotonic() - begun < 5
    hangs.released.set()
    assert [call[0] for call in good.calls] == ["emit"] * 20 + ["flush", "close"]
    assert door.errors == {"hangs": 1} and "'hangs' was given up" in caplog.text


def test_a_slow_sink_gets_everything_as_long_as_it_moves(tmp_path):
    class Slow(Recorder):
        def _call(self, name, *arguments):
            time.sleep(0.05)
            super()._call(name, *arguments)

    slow = Slow()
    door = Sinks({"slow": SinkThread(lambda: slow, lambda *_: None)}, "r")
    for step in range(20):
        door.log(step, "train", {"loss": float(step)})
    door.close()
    assert len(slow.calls) == 21 and door.errors == {}


def test_a_queue_that_is_full_drops_and_counts(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(SinkThread, "most", 10)
    hangs = Hangs(1)
    door = Sinks({"hangs": SinkThread(lambda: hangs, lambda *_: None)}, "r")
    for step in range(100):
        door.log(step, "train", {"loss": float(step)})
    hangs.released.set()
    door.close()
    assert door.errors["hangs"] + sum(call[0] == "emit" for call in hangs.calls) == 100 and door.errors["hangs"] >= 88
    assert "it is too slow" in caplog.text


def test_a_sink_that_ticks_is_told_the_time(tmp_path):
    class Ticks(Recorder):
        def tick(self, now):
            self._call("tick", now)

    ticks = Ticks()
    background = SinkThread(lambda: ticks, lambda *_: None)
    time.sleep(1.2)
    background.close()
    background.thread.join(5)
    assert ticks.calls[0][0] == "tick" and abs(ticks.calls[0][1] - time.time()) < 5


def test_a_flush_makes_the_records_durable(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(ndjson.os, "fsync", synced.append)
    with open_sinks(TrainConfig(), tmp_path, "r") as sinks:
        sinks.log(1, "train", {"loss": 1.0})
        sinks.flush()
    assert synced


def test_nothing_draws_a_random_number(tmp_path):
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    with open_sinks(TrainConfig(), tmp_path, "r") as sinks:
        sinks.log(1, "train", {"loss": torch.tensor(1.0)})
        sinks.flush()
    assert random.getstate() == before[0] and np.random.get_state()[1].tobytes() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_slow_sink_is_told_of_while_it_is_waited_for(caplog):
    class Slow:
        def emit(self, record):
            time.sleep(0.05)

        def close(self):
            pass

    thread = SinkThread(Slow, lambda what, why: None, "slow")
    for step in range(80):
        thread.emit(step)
    thread.close()
    assert wait_for([thread], patience=2.0) == []
    [told] = [r.getMessage() for r in caplog.records]
    assert re.fullmatch(r"the run is done, but for the sink 'slow', for which \d+ calls wait: as long as it goes on, it has a minute", told)
