"""A sink in a process of its own: nothing is lost or waited for, whatever becomes of the process or of the run."""

import fcntl
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from codex_ml import registry
from codex_ml.config import TrainConfig
from codex_ml.telemetry import sink_process
from codex_ml.telemetry.record import scalar_record
from codex_ml.telemetry.sink_process import SinkProcess
from codex_ml.telemetry.sink_thread import SinkThread
from codex_ml.telemetry.sinks import open_sinks
from codex_ml.telemetry.tensorboard import read_scalars

pytest.importorskip("tensorboard")
ON = TrainConfig(tensorboard=True, metrics_out=None, system_metrics_interval=0)


@pytest.fixture
def failures():
    return []


@pytest.fixture
def start(tmp_path, failures):
    """`start()` opens TensorBoard's sink; what is left of it at the end is killed."""
    started = []

    def start(config=ON, name="tensorboard"):
        started.append(SinkProcess(name, config, tmp_path, "0f3a", lambda what, why: failures.append(f"{what}: {why}")))
        return started[-1]

    yield start
    for sink in started:
        sink.process.kill()
        sink.process.wait()


def record(step, note=""):
    return scalar_record("0f3a", step, "train", "loss", step / 7, tags={"note": note})


def steps(folder):
    return [step for step, _ in read_scalars(folder / "tensorboard")["train/loss"]]


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


def finish(sink):
    sink.close()
    sink.wait(time.monotonic() + 30)


def test_all_that_was_logged_arrives_and_no_process_is_left(start, tmp_path, failures):
    before = len(os.listdir("/proc/self/fd"))
    sink = start()
    for step in range(5000):  # more than its pipe takes while it starts
        sink.emit(record(step))
    finish(sink)
    assert steps(tmp_path) == [*range(5000)] and sink.process.returncode == 0 and failures == []
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("count, note", [(9000, ""), (1000, "long" * 2000)])  # of the long ones a pipe takes parts
def test_a_full_pipe_keeps_lines_whole_and_nobody_waiting(count, note, start, tmp_path, failures):
    sink = start()
    until(lambda: sink._heard)
    os.kill(sink.process.pid, signal.SIGSTOP)
    longest = 0.0
    for step in range(count):
        begun = time.perf_counter()
        sink.emit(record(step, note))
        longest = max(longest, time.perf_counter() - begun)
    assert len(sink._lines) > 500 and longest < 0.5
    os.kill(sink.process.pid, signal.SIGCONT)
    finish(sink)
    assert steps(tmp_path) == [*range(count)] and failures == []


@pytest.mark.parametrize("room", [8192, 1 << 20])  # what a user gets who has many pipes, and what others get
def test_what_had_no_room_in_the_pipe_goes_there_without_another_call(room, start, tmp_path, failures, monkeypatch):
    monkeypatch.setattr(sink_process, "_PIPE", room)
    sink = start()
    until(lambda: sink._heard)
    lots = 2 * room // len(sink_process.encode(record(1)))
    for step in range(lots):
        sink.emit(record(step))
    assert sink._lines
    until(lambda: not sink._lines)
    finish(sink)
    assert steps(tmp_path) == [*range(lots)] and failures == []


def test_a_small_pipe_is_read_as_fast_as_it_fills(start, tmp_path, failures, monkeypatch):
    monkeypatch.setattr(sink_process, "_PIPE", 8192)
    sink = start()
    until(lambda: sink._heard)
    for step in range(600):
        sink.emit(record(step, "long" * 100))  # 200 kB in three seconds, twelve times what two looks a second would take
        time.sleep(0.005)
    assert len(sink._lines) < 100
    finish(sink)
    assert steps(tmp_path) == [*range(600)] and failures == []


def test_what_finds_too_many_waiting_is_refused_and_a_silent_process_killed(start, monkeypatch, failures):
    monkeypatch.setattr(SinkProcess, "most", 100)
    sink = start()
    until(lambda: sink._heard)
    os.kill(sink.process.pid, signal.SIGSTOP)
    with pytest.raises(OverflowError, match="100 lots of records wait.*codex-ml export RUN --to tensorboard"):
        for step in range(20_000):
            sink.emit(record(step))
    sink.close()
    begun = time.monotonic()
    sink.wait(begun + 3)
    assert time.monotonic() < begun + 4.5
    assert len(failures) == 1 and "says nothing, and is killed" in failures[0] and "codex-ml export RUN --to tensorboard" in failures[0]
    sink.thread.join(5)
    assert sink.process.returncode == -signal.SIGKILL and len(failures) == 1


def test_a_crash_is_told_and_counted(tmp_path, caplog):
    with open_sinks(ON, tmp_path, "0f3a") as door:
        sink = door.sinks["tensorboard"]
        until(lambda: sink._heard)
        os.kill(sink.process.pid, signal.SIGSEGV)
        sink.thread.join(10)
        for step in range(3):
            door.log(step, "train", {"loss": 1.0, "lr": 0.1})
    assert "has lost its process" in caplog.text and "SIGSEGV" in caplog.text and "its process has ended" in caplog.text
    assert door.errors["tensorboard"] == 1 + 3 + 1  # the crash, three handfuls of records, the end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_means_the_run_does_not_end_its_sinks(number, start, tmp_path, failures):
    sink = start()
    sink.emit(record(1))
    until(lambda: sink._heard)
    os.kill(sink.process.pid, number)
    sink.emit(record(2))
    finish(sink)
    assert steps(tmp_path) == [1, 2] and failures == []


RUN = """
import os, signal, sys, time
from pathlib import Path
from codex_ml.config import TrainConfig
from codex_ml.telemetry.sinks import open_sinks
door = open_sinks(TrainConfig(tensorboard=True, system_metrics_interval=0), Path(sys.argv[1]), "0f3a")
for step in range(1, 501):
    door.log(step, "train", {"loss": step / 7})
print(door.sinks["tensorboard"].process.pid, flush=True)
"""


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_run_that_is_killed_is_logged_to_its_last_line(tmp_path):
    done = subprocess.run([sys.executable, "-c", RUN + "os.killpg(os.getpgrp(), signal.SIGKILL)", tmp_path], capture_output=True,
                          text=True, timeout=60, start_new_session=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    until(lambda: gone(pid))
    assert steps(tmp_path) == [*range(1, 501)]


def test_the_sink_of_a_resumed_run_waits_for_that_of_the_killed_one(start, tmp_path):
    (tmp_path / ".codex").mkdir()
    with open(tmp_path / ".codex" / "tensorboard.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        sink = start()
        sink.emit(record(1))
        until(lambda: sink._heard)
        time.sleep(0.5)
        assert not (tmp_path / "tensorboard").exists()
    finish(sink)
    assert steps(tmp_path) == [1]


def test_a_lock_that_leads_out_of_the_folder_is_not_followed(start, tmp_path, failures):
    (tmp_path / ".codex").mkdir()
    (tmp_path / ".codex" / "tensorboard.lock").symlink_to(tmp_path / "elsewhere")
    sink = start()
    sink.emit(record(1))
    finish(sink)
    assert steps(tmp_path) == [1] and not (tmp_path / "elsewhere").exists() and failures == []


def test_what_may_not_be_imported_here_is_not_imported_there(start, tmp_path, failures, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    sink = start()
    sink.emit(record(1))
    finish(sink)
    assert "TensorBoard cannot be loaded" in caplog.text and not (tmp_path / "tensorboard").exists() and failures == []


CHATTY = """
from codex_ml.telemetry import tensorboard
emit = tensorboard.TensorBoardSink.emit
def chatty(self, record):
    print("a word about", record["step"], flush=True)
    return emit(self, record)
tensorboard.TensorBoardSink.emit = chatty
"""


def test_what_a_library_prints_disturbs_nothing(start, tmp_path, failures, monkeypatch, capfd):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(CHATTY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    sink = start()
    sink.emit(record(7))
    until(lambda: "a word about 7\n" in capfd.readouterr().err)
    finish(sink)
    assert steps(tmp_path) == [7] and failures == []


def test_a_run_without_an_output_loses_nothing(start, tmp_path, failures, monkeypatch):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(CHATTY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.setattr(sys, "stderr", None)
    sink = start()
    sink.emit(record(0))
    until(lambda: list(tmp_path.glob("tensorboard/events*")))
    time.sleep(0.5)  # what was printed has come
    for step in range(1, 200):
        sink.emit(record(step))
    finish(sink)
    assert steps(tmp_path) == [*range(200)] and failures == []


HANGS = """
import time
from codex_ml.telemetry import {module}
emit = {module}.{sink}.emit
def hangs(self, record):
    emit(self, record)
    time.sleep(100)
{module}.{sink}.emit = hangs
"""


@pytest.mark.parametrize("module, sink", [("tensorboard", "TensorBoardSink"), ("wandb", "WandbSink")])  # W&B starts a process of its own
def test_who_reads_what_a_run_prints_does_not_wait_for_a_sink_that_hangs(module, sink, tmp_path):
    pytest.importorskip(module)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(HANGS.format(module=module, sink=sink))
    code = RUN.replace("tensorboard=True", "tensorboard=True, wandb_enable=True").replace('door.sinks["tensorboard"].process.pid',
                                                                                          f'door.sinks["{module}"].process.pid')
    code += f"time.sleep(6 * ('{module}' == 'wandb'))\ndoor.close()\nprint(door.errors)"
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=90,
                          env={name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
                          | {"PYTHONPATH": str(tmp_path / "path")})
    took, said = time.monotonic() - begun, done.stdout.splitlines()
    os.kill(int(said[0]), signal.SIGKILL)
    assert f"'{module}': 1" in said[-1] and f"the sink {module!r} was not done when the run ended" in done.stdout and took < 30


def test_a_file_in_the_working_folder_is_not_imported(tmp_path, monkeypatch, failures):
    monkeypatch.setattr(sys, "path", [name for name in sys.path if name])
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    sink = SinkProcess("tensorboard", ON, tmp_path, "0f3a", lambda what, why: failures.append(f"{what}: {why}"))
    sink.emit(record(1))
    finish(sink)
    assert steps(tmp_path) == [1] and failures == []


def test_a_signal_handler_may_log(start, tmp_path, failures, monkeypatch):
    "At every instant, also between a write and what remembers it."
    sink, numbers, logged = start(), itertools.count(100_000), []

    def handler(*_):
        number = next(numbers)  # a handler may be interrupted, too
        sink.emit(record(number))
        logged.append(number)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        for step in range(10_000):
            sink.emit(record(step))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    finish(sink)
    found = steps(tmp_path)
    assert len(logged) > 10 and failures == []
    assert [s for s in found if s < 100_000] == [*range(10_000)] and sorted(s for s in found if s >= 100_000) == sorted(logged)


def test_a_forked_child_does_not_keep_the_sinks_of_a_killed_run_alive(tmp_path):
    code = RUN.replace("print(", "if os.fork() == 0:\n    time.sleep(30)\n    os._exit(0)\nprint(") + "os.kill(os.getpid(), signal.SIGKILL)"
    run = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        pid = int(run.stdout.readline())
        assert run.wait(30) == -signal.SIGKILL
        until(lambda: gone(pid), 15)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.stdout.close()
    assert steps(tmp_path) == [*range(1, 501)]


def test_a_folder_that_was_taken_away_stays_away(start, tmp_path):
    (tmp_path / ".codex").mkdir()
    gone = tmp_path / "gone"
    sink = SinkProcess("tensorboard", ON, gone, "0f3a", print)
    sink.emit(record(1))
    finish(sink)
    assert not gone.exists()


def test_a_line_that_is_none_costs_itself_only(start, tmp_path, failures):
    sink = start()
    sink.append(b"{\n")
    sink.emit(record(2))
    finish(sink)
    assert steps(tmp_path) == [2] and len(failures) == 1 and failures[0].startswith("failed: ValueError")


def test_a_start_that_fails_leaves_the_run_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with open_sinks(ON, tmp_path, "0f3a") as door:
        door.log(1, "train", {"loss": 1.0})
    assert door.errors == {"tensorboard": 1} and "cannot be opened: FileNotFoundError" in caplog.text


def test_one_that_is_still_to_come_up_goes_on_alone(start, tmp_path, failures):
    (tmp_path / ".codex").mkdir()
    with open(tmp_path / ".codex" / "tensorboard.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        sink = start()
        sink.emit(record(1))
        sink.close()
        sink.wait(time.monotonic() + 0.2)
        [told] = failures
        assert "was not done when the run ended: TimeoutError: it is still starting" in told
        assert "codex-ml export RUN --to tensorboard" in told
    sink.thread.join(30)
    assert steps(tmp_path) == [1] and sink.process.returncode == 0 and len(failures) == 1


def test_a_name_that_a_user_took_is_called_in_a_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    callers = []

    class Mine:
        def emit(self, record):
            callers.append(threading.current_thread().name)

        def flush(self):
            callers.append("flush")

        def close(self):
            callers.append("close")

    registry.register("sinks", "tensorboard", lambda config, folder, run_id: Mine(), override=True)
    with open_sinks(ON, tmp_path, "0f3a") as door:
        assert isinstance(door.sinks["tensorboard"], SinkThread)
        door.log(1, "train", {"loss": 1.0})
    assert callers == ["codex_ml tensorboard", "close"]


def test_the_configuration_arrives(start, tmp_path):
    sink = start(TrainConfig(tensorboard=True, tensorboard_dir="curves", model_args={(1, 2): object()}))
    sink.emit(record(1))
    finish(sink)
    assert list((tmp_path / "curves").glob("events*"))


USERS_OWN = """
import os, signal, sys, time
from pathlib import Path
import wandb
from codex_ml.config import TrainConfig
from codex_ml.telemetry.sinks import open_sinks
folder = Path(sys.argv[1])
own = wandb.init(dir=folder, project="mine", mode="offline", settings=wandb.Settings(silent=True, console="off"))
(folder / "run").mkdir()
door = open_sinks(TrainConfig(wandb_enable=True, system_metrics_interval=0), folder / "run", "0f3a")
for step in range(1, 301):
    door.log(step, "train", {"loss": step / 7})
print(door.sinks["wandb"].process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_the_run_of_a_user_does_not_take_its_sink_down_with_it(tmp_path):
    pytest.importorskip("wandb")
    from codex_ml.telemetry.wandb import read_run

    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run([sys.executable, "-c", USERS_OWN, tmp_path], stdout=subprocess.PIPE, text=True, timeout=90, env=env)
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    until(lambda: gone(pid), 60)
    [folder] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    found = read_run(folder)
    assert [row["step"] for row in found["rows"]] == [*range(1, 301)] and found["exit_code"] == 1


def test_the_processes_of_sinks_are_no_workers_of_the_run(start):
    from codex_ml.telemetry.processes import descendants

    sink = start()
    worker = subprocess.Popen(["sleep", "30"])
    try:
        assert worker.pid in descendants(os.getpid()) and sink.process.pid not in descendants(os.getpid())
    finally:
        worker.kill()
        worker.wait()
