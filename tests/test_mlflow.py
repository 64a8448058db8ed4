"""MLflow's store on this machine: exact, resumed, shared by processes; its pages, and what is left when they are closed."""

import json
import logging
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from codex_ml.config import TrainConfig
from codex_ml.telemetry import mlflow_ui
from codex_ml.telemetry.mlflow import MlflowSink, metric_key, open_mlflow, read_run
from codex_ml.telemetry.record import event_record, scalar_record, snapshot_record, structured_records

pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "One store for the tests that do not need their own: making one takes seconds."
    return tmp_path_factory.mktemp("with a space, ünd %41") / "mlflow"


def session(store, run_id, begin, end, value, epochs=5, status="completed", **options):
    sink = MlflowSink(store, run_id, "a run", **options)
    data = {"config": {"epochs": epochs, "data": "x" * 7000, "grad_clip": None}, "environment": {"torch": {"version": "2.13"}}}
    sink.emit(event_record(run_id, begin, "run_start", data=data))
    for step in range(begin + 10, end + 1, 10):
        sink.emit(scalar_record(run_id, step, "train", "loss", value / 3))
    sink.emit(snapshot_record(run_id, end, {"system.cpu.utilization": 0.1}))
    sink.emit(event_record(run_id, end, "checkpoint", data={"path": "epoch-0001", "sha256": "ab" * 32}))
    if status:
        sink.emit(event_record(run_id, end, "run_end", data={"status": status}))
    sink.close(), sink.close()


def test_everything_is_in_the_store(store):
    session(store, "everything", 0, 130, 2.0)
    found = read_run("everything", store)
    assert found["metrics"]["train/loss"] == [(step, 2.0 / 3) for step in range(10, 131, 10)]
    assert found["metrics"]["system/system.cpu.utilization"] == [(130, 0.1)]
    assert found["params"]["epochs"] == "5" and len(found["params"]["data"]) == 6000
    assert found["tags"]["codex_ml.checkpoint_sha256"] == "ab" * 32 and found["tags"]["environment.torch.version"] == "2.13"
    assert found["status"] == "FINISHED"
    assert sorted(p.name for p in store.iterdir()) == ["mlflow.db"]


def test_a_resumed_run_is_the_same_one_without_a_saw_tooth(store):
    session(store, "resumed", 0, 150, 2.0, status=None)
    assert read_run("resumed", store)["status"] == "FAILED"  # it did not say how it ended
    session(store, "resumed", 100, 120, 1.0, epochs=8, status="interrupted")
    found = read_run("resumed", store)
    assert found["metrics"]["train/loss"] == [(step, 2.0 / 3) for step in range(10, 101, 10)] + [(110, 1.0 / 3), (120, 1.0 / 3)]
    assert found["params"]["epochs"] == "5" and found["tags"]["resumed.epochs"] == "8" and found["status"] == "KILLED"
    with sqlite3.connect(store / "mlflow.db") as database:  # what the table of runs shows is the last that counts
        latest = database.execute("SELECT l.step, l.value FROM latest_metrics l JOIN tags t ON t.run_uuid = l.run_uuid "
                                  "WHERE t.value = 'resumed' AND l.key = 'train/loss'").fetchall()
        runs = database.execute("SELECT count(*) FROM tags WHERE value = 'resumed'").fetchone()
    assert latest == [(120, 1.0 / 3)] and runs == (1,)


def test_many_metrics_go_in_batches(store, monkeypatch):
    sink = MlflowSink(store, "many", every=1e9)
    sink.emit(event_record("many", 0, "run_start", data={"config": {f"k{i}": i for i in range(250)}}))
    calls, real = [], sink._client.log_batch
    def log_batch(run_id, metrics):
        calls.append(len(metrics))
        real(run_id, metrics=metrics)

    monkeypatch.setattr(sink._client, "log_batch", log_batch)
    for step in range(2500):
        sink.emit(scalar_record("many", step, "train", "loss", step / 7))
    sink.close()
    assert calls == [1000, 1000, 500]
    found = read_run("many", store)
    assert found["metrics"]["train/loss"] == [(step, step / 7) for step in range(2500)] and len(found["params"]) == 250


def test_a_slow_stream_does_not_wait_for_a_full_batch(store):
    sink = MlflowSink(store, "slow", every=0.05)
    sink.emit(scalar_record("slow", 1, "train", "loss", 1.0))
    time.sleep(0.1)
    sink.emit(scalar_record("slow", 2, "train", "loss", 2.0))
    assert read_run("slow", store)["metrics"]["train/loss"] == [(1, 1.0), (2, 2.0)]
    sink.close()


def test_values_that_are_no_ordinary_numbers(store):
    sink = MlflowSink(store, "odd")
    for step, value in enumerate([math.nan, math.inf, -math.inf, 1.7976931348623157e308, 5e-324, 0.1 + 0.2]):
        sink.emit(scalar_record("odd", step, "train", "loss@home", value))
    sink.emit(scalar_record("odd", 7, "validation", "grade", "good"))
    for record in structured_records("odd", 8, "validation", "confusion", "confusion_matrix", {"labels": ["a"], "counts": [[3]]}):
        sink.emit(record)
    sink.emit(event_record("odd", 9, "gpu.lost", "error", {"gpu": 0}))
    sink.close()
    found = read_run("odd", store)
    values = [value for _, value in found["metrics"]["train/loss_home"]]
    largest = sys.float_info.max
    assert math.isnan(values[0]) and values[1:] == [largest, -largest, largest, 5e-324, 0.1 + 0.2]
    assert found["tags"]["validation/grade"] == "good" and found["tags"]["event.gpu.lost"].startswith("step 9:")
    [kept] = (store / "artifacts").rglob("step-00000008.json")
    assert json.loads(kept.read_text())["counts"] == [[3]]


def test_names_that_mlflow_refuses():
    for name, taken in {"a//b": "a/b", "/data/a.txt": "data/a.txt", "a/../b": "a/__/b", "..": "__", ".": "_", "a/": "a", "/": "_"}.items():
        assert metric_key(name) == taken
    assert metric_key("a b/c-d.e:f") == "a b/c-d.e:f" and metric_key("loss@ü\n(x)") == "loss_ü__x_" and len(metric_key("x" * 999)) == 250


def test_a_metric_that_is_refused_costs_itself_only(store, monkeypatch):
    monkeypatch.setattr("codex_ml.telemetry.mlflow.metric_key", lambda name: name)
    sink = MlflowSink(store, "refused", "refused")
    for step in range(1, 101):
        sink.emit(scalar_record("refused", step, "train", "loss", 1.0))
        if step == 50:
            sink.emit(scalar_record("refused", step, "train", "../..", 1.0))
    with pytest.raises(Exception, match="Invalid"):
        sink.flush()
    sink.close()
    assert [step for step, _ in read_run("refused", store)["metrics"]["train/loss"]] == [*range(1, 101)]


BEGIN = """
import sys
sys.path.insert(0, {here!r})
from test_mlflow import session
session(sys.argv[1], sys.argv[2], 0, 300, 1.0)
"""


def child(code, *arguments, **options):
    return subprocess.Popen([sys.executable, "-c", code.format(here=os.path.dirname(__file__)), *map(str, arguments)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_runs_that_begin_together_share_one_store(tmp_path):
    children = [child(BEGIN, tmp_path / "m", f"run-{i}", cwd=tmp_path) for i in range(3)]
    outputs = [(c.communicate(timeout=120), c.returncode) for c in children]
    assert outputs == [(("", ""), 0)] * 3  # and nothing was printed
    for i in range(3):
        assert len(read_run(f"run-{i}", tmp_path / "m")["metrics"]["train/loss"]) == 30
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["mlflow.db"] and [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_kill_while_the_store_is_made_leaves_none_or_a_whole_one(tmp_path):
    for wait in (2.0, 2.6):
        begun = child(BEGIN, tmp_path / "m", "killed")
        time.sleep(wait)
        begun.kill()
        begun.communicate()
    session(tmp_path / "m", "after", 0, 30, 1.0)
    assert len(read_run("after", tmp_path / "m")["metrics"]["train/loss"]) == 3


def test_the_environment_alone_makes_nothing_remote(tmp_path, store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://127.0.0.1:9")
    session(store, "local", 0, 20, 1.0)
    assert read_run("local", store)["status"] == "FINISHED"


def test_a_server_that_does_not_answer_fails_once(tmp_path):
    "Each record would otherwise wait for it anew."
    config = TrainConfig(mlflow_enable=True, mlflow_tracking_uri="http://127.0.0.1:9")
    code = f"""
import time
from codex_ml.telemetry.mlflow import MlflowSink
from codex_ml.telemetry.record import scalar_record
sink, failed, begun = MlflowSink({str(tmp_path)!r}, "r", uri={config.mlflow_tracking_uri!r}), 0, time.monotonic()
for step in range(50):
    try: sink.emit(scalar_record("r", step, "train", "loss", 1.0))
    except Exception: failed += 1
sink.flush(); sink.close()
print(failed)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90,
                          env={**os.environ, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"})
    assert done.stdout.strip() == "1", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_mlflow_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with caplog.at_level(logging.WARNING, logger="codex_ml"):
        session(tmp_path / "m", "none", 0, 50, 1.0)
    [told] = [r.getMessage() for r in caplog.records if r.name == "codex_ml"]
    assert 'pip install "codex_ml[mlflow]"' in told


def test_only_where_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_mlflow(TrainConfig(), tmp_path, "r") is None
    assert open_mlflow(TrainConfig(mlflow_enable=True), tmp_path / "run", "r").folder == Path(".codex/mlflow")
    assert list(tmp_path.iterdir()) == []  # nothing before the first record


@pytest.mark.skipif(not Path("/usr/bin/strace").exists(), reason="needs strace")
def test_no_connection_and_no_look_up(tmp_path):
    trace = tmp_path / "trace"
    subprocess.run(["strace", "-f", "-o", trace, "-e", "trace=connect,sendto,sendmsg,sendmmsg,socket", sys.executable, "-c",
                    BEGIN.format(here=os.path.dirname(__file__)), tmp_path / "m", "traced"], timeout=180, check=True, capture_output=True)
    assert [line for line in trace.read_text(errors="replace").splitlines() if "connect(" in line and "AF_UNIX" not in line] == []
    assert "sin_port=htons(53)" not in trace.read_text(errors="replace")


# ---- the pages

def of_group(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == pid and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def test_the_smoke_test(tmp_path):
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "codex_ml.telemetry.mlflow_ui", "smoke"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "101 values read back, all equal; no process is left" in done.stdout and time.monotonic() - begun < 60
    assert of_group(int(done.stdout.split("(pid ")[1].split(")")[0])) == []


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_pages_end_with_the_command(sign, store):
    session(store, "shown", 0, 20, 1.0)
    process = subprocess.Popen([sys.executable, "-m", "codex_ml.telemetry.mlflow_ui", "--dir", store], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        process.stdout.readline()
        said = process.stdout.readline()
        assert said.startswith("MLflow is at http://127.0.0.1:")
        address = said.split()[3].split("/#")[0]
        assert mlflow_ui.served_metrics(address, "shown")["train/loss"] == [(10, 1.0 / 3), (20, 1.0 / 3)]
        servers = [int(Path(p).parent.name) for p in map(str, Path("/proc").glob("[0-9]*/stat"))
                   if Path(p).read_text().rpartition(")")[2].split()[1] == str(process.pid)]
        assert len(servers) == 1 and len(of_group(servers[0])) >= 2
    finally:
        process.send_signal(sign)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and "stopped" in output and errors == ""
    assert of_group(servers[0]) == []


def test_no_pages_without_a_store_or_on_a_port_that_is_taken(tmp_path, store, capsys):
    import socket

    assert mlflow_ui.main(["--dir", str(tmp_path)]) == 2
    assert "train with mlflow_enable=true first" in capsys.readouterr().err
    session(store, "there", 0, 10, 1.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert mlflow_ui.main(["--dir", str(store), "--port", str(taken.getsockname()[1])]) == 2
    assert "Address already in use" in capsys.readouterr().err


def test_a_server_that_does_not_come_up_says_why(store, monkeypatch, capsys):
    session(store, "why", 0, 10, 1.0)
    monkeypatch.setattr(mlflow_ui, "store_uri", lambda folder: "sqlite:////proc/nothing/mlflow.db")
    assert mlflow_ui.main(["--dir", str(store)]) == 2
    assert "MLflow's server did not come up" in capsys.readouterr().err
