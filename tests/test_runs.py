"""Looking at runs: live, torn, rotated, resumed, broken, hostile. Whatever is there, it is read without harm and counted."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from codex_ml.telemetry import recorded, runs
from codex_ml.telemetry.ndjson import NdjsonWriter
from codex_ml.telemetry.record import encode, event_record, scalar_record, snapshot_record, structured_records
from codex_ml.telemetry.runs import NoRun, RunView, open_run
from codex_ml.telemetry.segments import next_segment, pack

LOSS = ("train", "loss", None)


def at(step: int) -> str:
    return time.strftime("2026-11-24T%H:%M:%S.000000Z", time.gmtime(step))


def loss(step: int, value: float = 0.5, run_id: str = "run", **more) -> bytes:
    return encode(scalar_record(run_id, step, "train", "loss", value, timestamp=at(step), **more))


def event(step: int, name: str, run_id: str = "run", **data) -> bytes:
    return encode(event_record(run_id, step, name, data=data, timestamp=at(step)))


def metrics(folder: Path, *lines: bytes) -> Path:
    path = folder / ".codex/metrics.ndjson"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(b"".join(lines))
    return path


def values(view: RunView) -> dict[int, float]:
    series = view.series.get(LOSS)
    return dict(zip(series.steps, series.values, strict=True)) if series else {}


def checkpoint(folder: Path, name: str, **facts) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "metadata.json").write_text(json.dumps(facts))


# ---- tails

def test_every_torn_tail_costs_itself_only(tmp_path: Path) -> None:
    whole, last = loss(1) + loss(2), loss(3)
    for cut in range(1, len(last) - 1):
        path = tmp_path / f"{cut}.ndjson"
        path.write_bytes(whole + last[:cut])
        view = open_run(path)
        assert list(values(view)) == [1, 2] and (view.torn, view.unreadable) == (1, 0), cut
        view.close()


def test_a_line_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    path = metrics(tmp_path, loss(1), loss(2)[:50])
    view = open_run(path)
    assert list(values(view)) == [1]
    metrics(tmp_path, loss(2)[50:])
    assert view.refresh() and list(values(view)) == [1, 2] and view.torn == 0
    view.close()


def test_a_resume_after_a_torn_line(tmp_path: Path) -> None:
    metrics(tmp_path, loss(1), loss(2)[:50])
    writer = NdjsonWriter(tmp_path / ".codex/metrics.ndjson")
    writer.emit(scalar_record("run", 2, "train", "loss", 0.25, timestamp=at(2)))
    writer.close()
    view = open_run(tmp_path)
    assert values(view) == {1: 0.5, 2: 0.25} and view.torn == 1
    view.close()


@pytest.mark.parametrize("bad", [
    b"loss was fine here\n", b"\0\0\0\0\n", b"[1,2]\n", b"{}\n", b'{"schema_version":"v1"}\n', b"\xff\xfe{}\n",
    loss(2).replace(b'"step":2', b'"step":"2"'), loss(2).replace(b'"step":2', b'"step":2.5'), loss(2).replace(b'"step":2', b'"step":null'),
    loss(2).replace(b'"step":2', b'"step":1' + b"0" * 30), loss(2).replace(b'"value":0.5', b'"value":1' + b"0" * 400),
    loss(2).replace(b'"timestamp":"2026', b'"timestamp":"soon'), loss(2).replace(b'"timestamp":"2026', b'"timestamp":"9999999'),
    loss(2).replace(b'"dataset":null', b'"dataset":["a"]'), loss(2).replace(b'"metric":', b'"metrik":'),
    event(2, "x").replace(b'"data":{}', b'"data":[]'), event(2, "x").replace(b'"data":{}', b'"data":null'),
    loss(2).replace(b'"run_id":"run"', b'"run_id":["run"]'), b"[" * 100_000 + b"\n",
])
def test_a_bad_line_is_counted_and_named(tmp_path: Path, bad: bytes) -> None:
    metrics(tmp_path, loss(1), bad, loss(3))
    view = open_run(tmp_path)
    assert list(values(view)) == [1, 3] and (view.torn, view.unreadable) == (0, 1)
    assert view.first_unreadable.startswith("metrics.ndjson:2: ")
    assert len({len(p) for s in view.series.values() for p in (s.steps, s.values, s.times)}) == 1
    view.close()


def test_values_that_are_no_numbers_are_no_points(tmp_path: Path) -> None:
    manifest, row = structured_records("run", 2, "validation", "confusion", "confusion_matrix", {"counts": [[1]]})
    text = scalar_record("run", 2, "validation", "grade", "A")
    metrics(tmp_path, loss(1), loss(2, float("nan")), loss(3, float("inf")), *map(encode, (manifest, row, text)))
    view = open_run(tmp_path)
    assert set(view.series) == {LOSS} and view.unreadable == 0
    assert str(values(view)) == "{1: 0.5, 2: nan, 3: inf}" and view.series[LOSS].best() == (1, 0.5)
    view.close()


# ---- what is new

def test_a_refresh_reads_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics(tmp_path, *(loss(step) for step in range(1000)))
    view, decoded = open_run(tmp_path), []
    real = runs.decode
    monkeypatch.setattr(runs, "decode", lambda line: decoded.append(1) or real(line))
    assert not view.refresh() and not decoded
    metrics(tmp_path, loss(1000))
    assert view.refresh() and len(decoded) == 1 and len(values(view)) == 1001
    view.close()


def test_reading_in_slices_comes_to_the_same(tmp_path: Path) -> None:
    metrics(tmp_path, *(loss(step, step / 7) for step in range(20_000)))
    view, rounds = RunView(tmp_path), 0
    while rounds == 0 or not view.caught_up:
        view.refresh(seconds=0)
        rounds += 1
    assert rounds > 3 and values(view) == {step: step / 7 for step in range(20_000)}
    view.close()


@pytest.mark.parametrize("packed", [False, True])
def test_rotations_are_followed(tmp_path: Path, packed: bool) -> None:
    path, view, step = metrics(tmp_path, loss(0)), None, 0
    for cuts in (0, 1, 3, 0, 2):  # between two looks
        for _ in range(cuts):
            step += 1
            metrics(tmp_path, loss(step))
            os.rename(path, next_segment(path))
            if packed:
                pack(path, backups=99)
            step += 1
            metrics(tmp_path, loss(step))
        view = view or RunView(tmp_path)
        view.refresh()
        assert list(values(view)) == list(range(step + 1)) and view.history.superseded == 0
    late = open_run(tmp_path)
    assert values(late) == values(view)
    view.close(), late.close()


def test_a_run_of_which_nothing_is_there_yet(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    view = open_run(tmp_path)
    assert view.series == {} and view.step == 0 and not view.refresh()
    metrics(tmp_path, loss(1))
    assert view.refresh() and list(values(view)) == [1]
    view.close()


# ---- resumes, several runs

def test_what_a_resume_trains_again_is_superseded(tmp_path: Path) -> None:
    first = [event(0, "run_start"), *(loss(step, 1.0) for step in range(3, 131, 3))]  # 99 is the last before the checkpoint
    metrics(tmp_path, *first, encode(scalar_record("run", 120, "validation", "val_loss", 9.0, timestamp=at(120))),
            event(100, "run_start", resumed_from="step-00000100"), *(loss(step, 2.0) for step in range(105, 131, 5)))
    view = open_run(tmp_path)
    assert [*values(view)] == [*range(3, 100, 3), *range(105, 131, 5)] and values(view)[105] == 2.0
    assert not len(view.series["validation", "val_loss", None]) and view.step == 130
    assert view.history.superseded == 11
    view.close()


def test_without_events_the_last_record_of_a_step_counts(tmp_path: Path) -> None:
    metrics(tmp_path, *(loss(step, 1.0) for step in (10, 20, 30)), *(loss(step, 2.0) for step in (20, 30, 40)), loss(15, 3.0))
    view = open_run(tmp_path)
    assert values(view) == {10: 1.0, 15: 3.0, 20: 2.0, 30: 2.0, 40: 2.0}
    view.close()


def test_of_several_runs_in_a_file_the_last_is_shown_or_the_one_asked_for(tmp_path: Path) -> None:
    metrics(tmp_path, loss(1, 1.0, "old"), loss(1, 2.0, "new"), loss(2, 1.0, "old"))
    latest, asked, absent = open_run(tmp_path), open_run(tmp_path, "old"), open_run(tmp_path, "none")
    assert (latest.run_id, values(latest)) == ("new", {1: 2.0})
    assert values(asked) == {1: 1.0, 2: 1.0} and values(absent) == {}
    metrics(tmp_path, loss(1, 3.0, "newest"))
    latest.refresh()
    assert (latest.run_id, values(latest)) == ("newest", {1: 3.0})
    for view in (latest, asked, absent):
        view.close()


# ---- whether it runs

HOLD = """
import sys, time
from codex_ml.run_folder import RunFolder
with RunFolder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_status_of_a_run_that_is_killed(tmp_path: Path) -> None:
    metrics(tmp_path, event(0, "run_start"), loss(1))
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        view = open_run(tmp_path)
        assert view.status == "running" and view.held
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=20)
        assert view.refresh() and view.status == "died"
        view.close()
    finally:
        holder.kill()
        holder.wait(timeout=20)
        holder.stdout.close()


@pytest.mark.parametrize(("said", "status"), [
    ("completed", "finished"), ("interrupted", "interrupted"), ("stopped", "interrupted"), ("failed", "failed")])
def test_the_status_that_a_run_left(tmp_path: Path, said: str, status: str) -> None:
    (tmp_path / ".lock").touch()
    metrics(tmp_path, event(0, "run_start"), loss(1), event(1, "run_end", status=said))
    view = open_run(tmp_path)
    assert view.status == status
    metrics(tmp_path, event(1, "run_start"))
    assert view.refresh() and view.status == "died"
    view.close()


def test_without_events_the_checkpoints_tell_whether_it_finished(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / "config.resolved.json").write_text(json.dumps({"values": {"epochs": {"value": 2, "origin": "default"}}}))
    checkpoint(tmp_path, "epoch-0001", epoch=1, global_step=10)
    assert open_run(tmp_path).status == "unfinished"
    checkpoint(tmp_path, "epoch-0002", epoch=2, global_step=20)
    assert open_run(tmp_path).status == "finished"


def test_without_a_lock_fresh_records_tell(tmp_path: Path) -> None:
    path = tmp_path / "metrics.ndjson"
    path.write_bytes(loss(1))
    old = open_run(path)
    path.write_bytes(encode(scalar_record("run", 1, "train", "loss", 0.5)))
    new = open_run(path)
    assert (old.status, new.status) == ("unfinished", "running")
    old.close(), new.close()


def test_a_free_lock_is_taken_once_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".lock").write_text("123\n")
    calls, real = [], fcntl.flock
    monkeypatch.setattr(recorded.fcntl, "flock", lambda *a: calls.append(a) or real(*a))
    view = open_run(tmp_path)
    for _ in range(20):
        view.refresh()
    assert len(calls) == 1
    view.close()


# ---- pieces that are missing or broken

def test_without_metrics_the_checkpoints_remember(tmp_path: Path) -> None:
    history = [{"epoch": 1, "train_loss": 2.0, "val_loss": 2.5, "note": "x"}, {"epoch": 2, "train_loss": 1.0, "val_loss": 1.5}, "?", {}]
    checkpoint(tmp_path, "epoch-0002", epoch=2, global_step=20, steps_per_epoch=10)
    (tmp_path / "metrics_history.jsonl").write_text("\n".join(map(json.dumps, history)) + '\n{"epoch": 3, "tra')
    (tmp_path / "config.resolved.json").write_text(json.dumps({"values": {"metrics_out": {"value": None}}}))
    view = open_run(tmp_path)
    assert view.metrics_path is None and set(view.series) == {("train", "epoch_loss", None), ("validation", "val_loss", None)}
    assert list(view.series["validation", "val_loss", None].steps) == [10, 20] and view.step == 20
    view.close()


def test_metrics_that_lie_elsewhere(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.ndjson"
    elsewhere.write_bytes(loss(1))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.resolved.json").write_text(json.dumps({"values": {"metrics_out": {"value": str(elsewhere)}}}))
    view = open_run(folder)
    assert values(view) == {1: 0.5} and view.config == {"metrics_out": str(elsewhere)}
    view.close()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"values": 3}', '{"values": {"epochs": 3}}', "\0" * 100])
def test_broken_files_of_a_folder_hide_nothing_else(tmp_path: Path, content: str) -> None:
    metrics(tmp_path, loss(1))
    (tmp_path / "config.resolved.json").write_text(content)
    (tmp_path / "epoch-0001").mkdir()
    (tmp_path / "epoch-0001/metadata.json").write_text(content)
    (tmp_path / "epoch-0003").symlink_to(tmp_path / "epoch-0001")
    checkpoint(tmp_path, "epoch-0002", epoch="2", global_step=None, checkpoint_sha256=5, checkpoint_bytes=[])
    view = open_run(tmp_path)
    assert values(view) == {1: 0.5} and view.config == {} and view.epochs is None
    assert [(c.name, c.epoch, c.step, c.bytes, c.sha256) for c in view.checkpoints] == [
        ("epoch-0001", None, None, None, None), ("epoch-0002", None, None, None, None)]
    view.environment()
    view.close()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, make) -> None:
    (tmp_path / ".codex").mkdir()
    make(tmp_path / ".codex/metrics.ndjson")
    view = open_run(tmp_path)
    assert "not a regular file" in view.trouble and view.series == {}
    view.close()


def test_a_share_that_goes_away_and_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    metrics(folder, loss(1))
    view = open_run(folder)
    folder.rename(tmp_path / "away")
    assert view.refresh() and "No such file" in view.trouble and values(view) == {1: 0.5}
    (tmp_path / "away").rename(folder)
    metrics(folder, loss(2))
    view.refresh()
    assert view.trouble == "" and list(values(view)) == [1, 2]
    view.close()


def test_no_run_says_what_there_is(tmp_path: Path) -> None:
    metrics(tmp_path / "good", loss(1))
    with pytest.raises(NoRun, match=r"does not exist.*Runs in .*: .*good"):
        open_run(tmp_path / "goood")
    with pytest.raises(NoRun, match="holds no run"):
        open_run(tmp_path)


# ---- size

def test_memory_is_bounded_and_extremes_are_kept(tmp_path: Path) -> None:
    metrics(tmp_path, *(loss(step, 5.0 if step == 7_000 else -5.0 if step == 3_001 else step % 10) for step in range(30_000)),
            encode(snapshot_record("run", 1, {"system.cpu.utilization": 0.5}, at(1))))
    view = RunView(tmp_path, most_points=2_000)
    view.refresh()
    series = view.series[LOSS]
    assert view.history.points() <= 2_000 + 4_096 and series.thinned
    assert series.best() == (3_001, -5.0) and series.steps[-1] == 29_999 and series.steps[0] == 0
    view.close()


def test_a_large_run_is_read_fast_and_without_torch(tmp_path: Path) -> None:
    with (tmp_path / "metrics.ndjson").open("wb") as file:
        line = loss(123456, 0.123456789)
        for step in range(100_000):
            file.write(line.replace(b"123456,", b"%d," % step))
    # VmHWM is the peak of this process alone; ru_maxrss would begin with that of the process that started it
    code = ("import sys; from codex_ml.telemetry.runs import open_run; v = open_run(sys.argv[1]);"
            "peak = open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]; print(v.step, 'torch' in sys.modules, peak)")
    began = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True).stdout.split()
    assert out[:2] == ["99999", "False"] and int(out[2]) < 120_000  # kB
    assert time.monotonic() - began < 15


# ---- a real run

def test_watching_changes_nothing(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from codex_ml.train_loop import run_training

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator)
    job = {"data": (x, (x[:, 0] > 0).long()), "model_name": "mlp", "epochs": 3, "batch_size": 10, "progress": "off", "log_every_steps": 1,
           "system_metrics_interval": 0}
    alone = run_training(**job, checkpoint_dir=tmp_path / "alone")
    (tmp_path / "watched").mkdir()
    (tmp_path / "watched/.lock").touch()
    view, done, seen = RunView(tmp_path / "watched"), threading.Event(), set()

    def look() -> None:
        while not done.is_set():
            view.refresh()
            seen.add(view.status)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        watched = run_training(**job, checkpoint_dir=tmp_path / "watched")
    finally:
        done.set()
        thread.join()
    view.refresh()
    assert watched["checkpoint_sha256_last"] == alone["checkpoint_sha256_last"] == view.checkpoints[-1].sha256
    assert "running" in seen and view.status == "finished" and view.step == 60 and view.epochs == 3
    assert len(view.series[LOSS]) == 60 and view.unreadable == view.torn == 0
    assert view.environment()["torch"] and view.config["batch_size"] == 10
    view.close()
