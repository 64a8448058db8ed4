"""W&B's shim: offline, bounded in time, out of the way; and what it writes is taken by `wandb sync` and a server."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from wandb_server import wandb_server

from codex_ml.config import TrainConfig
from codex_ml.telemetry import wandb as room
from codex_ml.telemetry.record import event_record, scalar_record, snapshot_record, structured_records
from codex_ml.telemetry.wandb import WandbLogger, last_records, log_records, open_wandb, read_run

wandb = pytest.importorskip("wandb")
ON = TrainConfig(wandb_enable=True)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in [n for n in os.environ if n.startswith("WANDB_") and n != "WANDB_SERVICE"]:
        monkeypatch.delenv(name)


def session(folder, begin, end, value, run_id="0f3a", status="completed"):
    sink = open_wandb(ON, folder, run_id)
    data = {"config": {"epochs": 5, "checkpoint.dir": "runs/a", "grad_clip": None}, "environment": {"torch": {"version": "2.13"}}}
    sink.emit(event_record(run_id, begin, "run_start", data=data))
    for step in range(begin + 10, end + 1, 10):
        sink.emit(scalar_record(run_id, step, "train", "loss", value / 3))
    sink.emit(snapshot_record(run_id, end, {"system.cpu.utilization": 0.1}))
    sink.emit(event_record(run_id, end, "checkpoint", data={"path": "epoch-0001", "sha256": "ab" * 32}))
    if status:
        sink.emit(event_record(run_id, end, "run_end", data={"status": status, "metrics": {"val_loss": 0.25}}))
    sink.close()


def folders(place):
    return sorted((place / "wandb").glob("offline-run-*"))


def test_everything_is_in_the_file(tmp_path):
    session(tmp_path, 0, 130, 2.0)
    [folder] = folders(tmp_path)
    found = read_run(folder)
    assert [(r["step"], r["train/loss"]) for r in found["rows"] if "train/loss" in r] == [(step, 2.0 / 3) for step in range(10, 131, 10)]
    assert found["rows"][-1]["system/system.cpu.utilization"] == 0.1
    assert found["run_id"] == "0f3a" and found["exit_code"] == 0
    assert found["config"]["checkpoint.dir"] == "runs/a" and found["config"]["environment"] == {"torch": {"version": "2.13"}}
    summary = found["summary"]
    assert summary["checkpoint_sha256"] == "ab" * 32 and summary["val_loss"] == 0.25 and summary["status"] == "completed"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["wandb"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-320, 1.7976931348623157e308, 0.1 + 0.2, "good"])
def test_values_read_back_exactly(value, tmp_path):
    with WandbLogger(folder=tmp_path) as logger:
        logger.log({"train/x": value}, 7, 1.5e9)
    [row] = read_run(folders(tmp_path)[0])["rows"]
    back = float(row["train/x"]) if isinstance(value, float) else row["train/x"]
    assert back == value or (value != value and back != back)
    assert row["step"] == 7 and row["_timestamp"] == 1.5e9


def sync(folder, server):
    return subprocess.run([sys.executable, "-m", "wandb", "sync", folder], env={**os.environ, **server.environment}, timeout=90, cwd=folder,
                          capture_output=True, text=True)


def test_sync_sends_a_run_and_its_resumption(tmp_path):
    "To a server that keeps history by line and answers what W&B's does when it is asked about a run that is resumed."
    run_id = "0f3a" * 8
    session(tmp_path, 0, 130, 2.0, run_id)
    session(tmp_path, 100, 120, 1.0, run_id)  # also where both begin in one second
    assert len(folders(tmp_path)) == 2
    with wandb_server() as server:
        for folder in folders(tmp_path):
            done = sync(folder, server)
            assert done.returncode == 0 and "Finished syncing" in done.stderr, done.stderr
        assert {"RunResumeStatus", "UpsertBucket"} <= set(server.asked)
        [run] = server.runs.values()
    rows = [json.loads(line) for line in run["history"]]
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(step, 2.0 / 3) for step in range(10, 131, 10)] + [(110, 1.0 / 3), (120, 1.0 / 3)]  # none was dropped
    assert [row["_step"] for row in rows] == list(range(len(rows)))  # W&B's own step goes on
    assert run["config"]["epochs"]["value"] == 5 and run["summary"]["val_loss"] == 0.25 and run["exitcode"] == 0


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("enabled", [True, False])
def test_an_exception_in_the_body_passes_unchanged(error, enabled, tmp_path):
    raised = error("mine")
    with pytest.raises(error) as caught:
        with WandbLogger(enabled, tmp_path) as logger:
            logger.log({"a": 1}, 1)
            raise raised
    assert caught.value is raised and caught.value.__cause__ is None
    assert [read_run(f)["exit_code"] for f in folders(tmp_path)] == ([1] if enabled else [])


def test_a_run_that_does_not_say_how_it_ended_has_failed(tmp_path):
    session(tmp_path, 0, 20, 1.0, status=None)
    assert read_run(folders(tmp_path)[0])["exit_code"] == 1


def told(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "codex_ml"]


def use(sink):
    for step in range(1, 50):
        sink.emit(scalar_record("0f3a", step, "train", "loss", 1.0))
    sink.emit(event_record("0f3a", 50, "gpu.lost", "error", {"a": 1}))
    sink.emit(event_record("0f3a", 50, "run_end", data={"status": "completed"}))
    sink.flush(), sink.close(), sink.close()


def test_without_the_sdk_a_dummy_and_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    use(open_wandb(ON, tmp_path, "0f3a"))
    [message] = told(caplog)
    assert "Metrics continue in NDJSON and TensorBoard" in message and 'pip install "codex_ml[wandb]"' in message
    assert folders(tmp_path) == []


@pytest.mark.parametrize("failure", [RuntimeError("service died"), SystemExit(3), wandb.errors.CommError("no route")])
def test_an_sdk_that_fails_is_a_dummy(failure, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(failure))
    use(open_wandb(ON, tmp_path, "0f3a"))
    [message] = told(caplog)
    assert type(failure).__name__ in message and "Metrics continue" in message


def test_an_sdk_that_is_too_slow_is_left_and_its_run_ended(tmp_path, monkeypatch, caplog):
    ended, go = threading.Event(), threading.Event()

    class Late:
        def define_metric(self, *_, **__):
            pass

        def finish(self, exit_code):
            ended.set()

    monkeypatch.setattr(wandb, "init", lambda **_: go.wait(20) and Late())
    logger = WandbLogger(folder=tmp_path, time_limit=0.3)
    begun = time.monotonic()
    use(room.WandbSink(logger))
    assert time.monotonic() - begun < 2 and not logger.active
    [message] = told(caplog)
    assert "did not start in time" in message
    go.set()
    assert ended.wait(5)


def test_starting_does_not_wait(tmp_path):
    begun = time.monotonic()
    logger = WandbLogger(folder=tmp_path)
    assert time.monotonic() - begun < 0.2
    logger.close()


@pytest.mark.parametrize("mode, kind", [(None, "offline-run"), ("offline", "offline-run"), ("disabled", None)])
def test_the_environment_decides_the_mode(mode, kind, tmp_path, monkeypatch):
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    with WandbLogger(folder=tmp_path) as logger:
        assert logger.active
        logger.log({"a": 1}, 1)
    assert bool(folders(tmp_path)) == (kind == "offline-run")
    assert os.environ.get("WANDB_MODE") == mode and os.environ["WANDB_ERROR_REPORTING"] == "false"


def test_a_run_of_the_users_own_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    own = wandb.init(dir=tmp_path, project="mine", settings=wandb.Settings(silent=True, console="off"))
    session(tmp_path / "ours", 0, 20, 1.0)
    own.log({"b": 1})
    own.finish()
    assert len(folders(tmp_path)) == 1 and len(read_run(folders(tmp_path / "ours")[0])["rows"]) == 3


def test_structured_values_and_alerts_are_taken(tmp_path):
    sink = open_wandb(ON, tmp_path, "0f3a")
    histogram = {"edges": [-1.0, 0.0, 1.0], "counts": [2, 3], "min": -0.75, "max": 1.0, "num": 5, "sum": 1.0, "sum_squares": 3.5}
    confusion = {"labels": ["a", "b"], "counts": [[8, 2], [1, 9]]}
    for kind, data in (("histogram", histogram), ("confusion_matrix", confusion), ("unheard of", {})):
        for record in structured_records("0f3a", 3, "train", kind.replace(" ", "_"), kind, data):
            sink.emit(record)
    sink.emit(event_record("0f3a", 3, "alert", "warning", {"rule": "nan"}))
    sink.close()
    rows = {name: value for row in read_run(folders(tmp_path)[0])["rows"] for name, value in row.items()}
    assert rows["train/histogram.values"] == [2, 3] and rows["train/histogram.bins"] == [-1, 0, 1]
    assert rows["train/confusion_matrix.counts"] == [[8, 2], [1, 9]]


WHOLE = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_wandb import session
session(Path(sys.argv[1]), 0, 200, 2.0)
"""


def child(code, *arguments, **options):
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return subprocess.run([sys.executable, "-c", code.format(here=os.path.dirname(__file__)), *arguments], env=env, capture_output=True,
                          text=True, timeout=90, **options)


def test_nothing_is_printed_and_no_process_is_left(tmp_path):
    done = child(WHOLE, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    marked = str(tmp_path).encode()
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if b"wandb-core" in p.read_bytes() and marked in environ(p)]
    assert left == []


def environ(cmdline):
    try:
        return (cmdline.parent / "environ").read_bytes()
    except OSError:
        return b""


HANGING = """
import os, signal, sys, threading
from pathlib import Path
from wandb.sdk import wandb_setup
sys.path.insert(0, {here!r})
from codex_ml.telemetry.wandb import WandbLogger
logger = WandbLogger(folder=Path(sys.argv[1]))
logger.log({{"a": 1}}, 1)
os.kill(wandb_setup.singleton()._connection._proc._process.pid, signal.SIGSTOP)
threading.Thread(target=logger.close, daemon=True).start()
print("the end", flush=True)
"""


def test_a_service_that_hangs_does_not_hold_the_interpreter(tmp_path):
    begun = time.monotonic()
    done = child(HANGING, tmp_path)
    assert "the end" in done.stdout and time.monotonic() - begun < 25


def test_a_kill_leaves_a_log_that_can_be_read(tmp_path):
    code = WHOLE.replace("session(", "import os, signal, threading\nthreading.Timer(2.5, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
                                     "import codex_ml.telemetry.wandb as w\nw.WandbLogger.close = lambda *a: time.sleep(30)\nsession(", 1)
    done = child("import time" + code, tmp_path)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while not (rows := read_run(folders(tmp_path)[0])["rows"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert rows and rows[0]["step"] == 10


@pytest.mark.skipif(not Path("/usr/bin/strace").exists(), reason="needs strace")
def test_no_connection_and_no_look_up(tmp_path):
    trace = tmp_path / "trace"
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    subprocess.run(["strace", "-f", "-o", trace, "-e", "trace=connect,sendto,sendmsg,sendmmsg", sys.executable, "-c",
                    WHOLE.format(here=os.path.dirname(__file__)), tmp_path / "run"], env=env, timeout=120, check=True, capture_output=True)
    lines = trace.read_text(errors="replace").splitlines()
    assert len(lines) > 10
    assert [line for line in lines if "AF_INET" in line and "127.0.0.1" not in line] == []


def test_the_end_of_a_long_log(tmp_path):
    session(tmp_path, 0, 20_000, 1.0)
    [path] = folders(tmp_path)[0].glob("*.wandb")
    data = path.read_bytes()
    assert len(data) > 3 * 32768
    every = list(log_records(data, 7))
    assert every[-len(last_records(path, 7)):] == last_records(path, 7)
    assert 5 < len(last_records(path, 7)) < len(every)
    assert list(log_records(data[:-3], 7)) == every[:-1]  # torn
