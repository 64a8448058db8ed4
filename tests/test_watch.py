"""The view of a run in a terminal: every size, hostile text, pipes, dumb terminals, keys, signals. Real terminals are pseudo-terminals."""

import errno
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path

import pytest
from rich.cells import cell_len

from codex_ml.telemetry.frame import Frame
from codex_ml.telemetry.ndjson import NdjsonWriter
from codex_ml.telemetry.record import event_record, scalar_record, snapshot_record, structured_records
from codex_ml.telemetry.runs import RunView, open_run
from codex_ml.telemetry.watch import Screen, watch

CODE = "import sys; from codex_ml.telemetry.watch import watch; sys.exit(watch(sys.argv[1], refresh=0.25, **eval(sys.argv[2])))"
HOSTILE = "\x1b[2J\x1b]0;owned\x07evil\r\n\x9b31m\u202e[bold]<b>" + "x" * 500


def write(folder: Path, *records: dict) -> Path:
    writer = NdjsonWriter(folder / ".codex/metrics.ndjson")
    for record in records:
        writer.emit(record)
    writer.close()
    return folder


def loss(step: int, value: float = 0.5) -> dict:
    return scalar_record("run", step, "train", "loss", value)


def rich_run(folder: Path, end: bool = False) -> Path:
    """A run with something in every panel."""
    records = [event_record("run", 0, "run_start", data={"epochs": 5, "model_params": 12})]
    records += [loss(step, 3 / step) for step in range(1, 50)]
    records += [scalar_record("run", step, "train", "lr", 0.1 / step) for step in range(1, 50)]
    records += [scalar_record("run", step, "validation", name, 1 / step) for step in (10, 20, 40) for name in ("val_loss", "val_accuracy")]
    records.append(snapshot_record("run", 5, {"system.cpu.utilization": 0.5, "system.memory.utilization": 0.25, "process.memory.usage": 3e8,
                                              "gpu_count": 2, "gpu_0_util": 0.97, "gpu_0_temp": 61.0, "gpu_1_mem_used": 1.2e10}))
    records.append(event_record("run", 30, "alert", "error", {"message": "the loss has not fallen for thirty steps, which is long"}))
    records += [event_record("run", 49, "run_end", data={"status": "completed"})] if end else []
    for epoch in (1, 2):
        (folder / f"epoch-000{epoch}").mkdir(parents=True)
        facts = {"epoch": epoch, "global_step": 10 * epoch, "steps_per_epoch": 10, "checkpoint_bytes": 5}
        facts["checkpoint_sha256"] = f"{epoch}" * 64
        (folder / f"epoch-000{epoch}/metadata.json").write_text(json.dumps(facts))
    return write(folder, *records)


# ---- frames

def draw(view: RunView, width: int, height: int, **how) -> list[str]:
    return Frame(width, height, **how).draw(view, note="q leaves")


@pytest.mark.parametrize("unicode", [True, False])
def test_a_frame_fits_every_terminal(tmp_path: Path, unicode: bool) -> None:
    view = open_run(rich_run(tmp_path))
    for width in (20, 39, 40, 59, 60, 79, 80, 81, 103, 104, 139, 140, 250):
        for height in (4, 5, 9, 17, 18, 24, 25, 60):
            lines = draw(view, width, height, unicode=unicode)
            assert len(lines) == height and max(map(cell_len, lines)) <= width, (width, height)
            assert unicode or "\n".join(lines).isascii()
    view.close()


def test_a_frame_says_what_matters(tmp_path: Path) -> None:
    view = open_run(rich_run(tmp_path))
    text = "\n".join(draw(view, 160, 40))
    for expected in ("● running", "epoch 5 of 5", "step 49 of 50", "98%", "loss 0.06122", "lr", "val_accuracy", "cpu", "50%",
                     "gpu 0  97%  61 °C", "gpu 1  12 GB", "epoch-0002    5 B 222222222222", "thirty steps", "started", "q leaves"):
        assert expected in text, expected
    small = "\n".join(draw(view, 80, 24))
    for expected in ("running", "loss", "lr", "cpu", "epoch-0002", "thirty"):
        assert expected in small, expected
    view.close()


def test_why_a_run_failed_is_told(tmp_path: Path) -> None:
    end = event_record("run", 1, "run_end", "error", {"status": "failed", "error": "NonFiniteLoss: the loss is nan"})
    view = open_run(write(tmp_path, loss(1), end))
    text = "\n".join(draw(view, 160, 40))
    assert "● failed" in text and "ended: failed: NonFiniteLoss" in text
    view.close()


def test_trouble_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, loss(1)) / ".codex/metrics.ndjson"
    with path.open("ab") as file:
        file.write(b"{\"cut\nnonsense}\n")
    view = open_run(tmp_path)
    bottom = draw(view, 100, 24)[-1]
    assert "1 cut short; 1 unreadable" in bottom and "metrics.ndjson:3" in bottom
    view.close()


@pytest.mark.parametrize("records", [
    [], [loss(1)], [loss(step, float("nan")) for step in range(9)], [loss(1, float("inf")), loss(2, 1.0)],
    [loss(step, 10.0**(100 * step)) for step in (-3, 0, 3)], [loss(2**62)], [loss(-5), loss(0)],
    [scalar_record("run", 1, "validation", f"metric{i}", i) for i in range(500)],
    [snapshot_record("run", 1, {"system.cpu.utilization": float("nan"), "gpu_count": 3})],
    [snapshot_record("run", 1, {"gpu_count": 1e9, "system.memory.utilization": 17.0})],
    [event_record("run", 1, "run_start", data={"epochs": 0}), event_record("run", 1, "run_start", data={"epochs": -3, "config": 5})],
    [event_record("run", i, "alert", "nonsense", {"message": 5, "x": [1], "y": None}) for i in range(50)],
])
def test_odd_runs_are_drawn(tmp_path: Path, records: list[dict]) -> None:
    (tmp_path / ".lock").touch()
    view = open_run(write(tmp_path, *records))
    for size in ((80, 24), (200, 50), (20, 4)):
        assert len(draw(view, *size)) == size[1]
    view.close()


def test_what_a_run_wrote_reaches_no_terminal_as_a_command(tmp_path: Path) -> None:
    folder = tmp_path / "\x1b[31mred"
    records = [scalar_record("run", 1, HOSTILE, HOSTILE, 1.0, dataset=HOSTILE), loss(1),
               scalar_record("run", 1, "validation", HOSTILE, 1.0),
               scalar_record("run", 1, "validation", "val_loss", 1.0, dataset=HOSTILE),
               event_record("run", 1, HOSTILE, HOSTILE, {"message": HOSTILE, HOSTILE: HOSTILE}),
               event_record("run", 1, "run_start", data={"resumed_from": HOSTILE}),
               event_record("run", 1, "run_end", data={"status": HOSTILE})]
    view = open_run(write(folder, *records))
    for size in ((80, 24), (200, 50)):
        text = "".join(draw(view, *size))
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202e]", text)
        assert max(map(cell_len, draw(view, *size))) <= size[0]
    view.close()


def test_wide_characters_are_counted_as_wide(tmp_path: Path) -> None:
    view = open_run(write(tmp_path / "走る実行", loss(1), scalar_record("run", 1, "validation", "損失" * 20, 1.0)))
    assert max(map(cell_len, draw(view, 80, 24))) <= 80
    view.close()


# ---- one frame

def test_without_a_terminal_one_plain_frame_is_printed(tmp_path: Path) -> None:
    out = io.StringIO()
    assert watch(rich_run(tmp_path), stream=out) == 0
    assert "\x1b" not in out.getvalue() and "epoch-0002" in out.getvalue() and len(out.getvalue().splitlines()) <= 30


def test_an_ascii_stream_gets_ascii(tmp_path: Path) -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    assert watch(rich_run(tmp_path), stream=out) == 0
    assert raw.getvalue().isascii() and b"AAAA" in raw.getvalue()


@pytest.mark.parametrize("text", ["does not exist", "holds no run"])
def test_no_run_is_exit_code_2(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "holds no run").mkdir()
    assert watch(tmp_path / text) == 2
    assert text in capsys.readouterr().err


def test_without_rich_the_command_to_install_it_is_told(tmp_path: Path, monkeypatch, capsys) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "rich"] + ["rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert watch(rich_run(tmp_path)) == 2
    assert 'pip install "codex_ml[watch]"' in capsys.readouterr().err


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", CODE, rich_run(tmp_path), "{}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=20) == 0
    process.stderr.close()


def test_lines_that_stay_are_not_sent_again() -> None:
    stream = io.StringIO()
    screen = Screen(stream)
    screen.draw(["a" * 50] * 20, (80, 24))
    assert screen.draw(["a" * 50] * 19 + ["b"], (80, 24)) < 30
    assert screen.draw(["a" * 50] * 19 + ["b"], (80, 24)) == 0
    assert screen.draw(["a" * 50] * 20, (81, 24)) > 1000  # another size: all anew


# ---- a terminal

class Terminal:
    """A process in a pseudo-terminal of 80 by 24."""

    def __init__(self, folder: Path, how: str, **env: str):
        self.master, slave = pty.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.slave, self.before = slave, termios.tcgetattr(slave)
        clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.process = subprocess.Popen([sys.executable, "-c", CODE, folder, how], stdin=slave, stdout=slave, stderr=slave,
                                        env={**clean, "TERM": "xterm", "LC_ALL": "C.UTF-8", **env}, start_new_session=True)
        self.seen = b""

    def read(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and select.select([self.master], [], [], left)[0]:
            try:
                self.seen += os.read(self.master, 65536)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                return

    def until(self, text: str) -> None:
        limit = time.monotonic() + 20
        while text.encode() not in self.seen:
            assert time.monotonic() < limit and self.process.poll() is None, self.seen[-2000:]
            self.read(0.1)

    def end(self) -> int:
        limit = time.monotonic() + 20
        while self.process.poll() is None:
            assert time.monotonic() < limit
            self.read(0.05)
        self.read(0.05)
        return self.process.returncode

    def left_as_it_was(self) -> bool:
        on, off = self.seen.rfind(b"\x1b[?1049h"), self.seen.rfind(b"\x1b[?1049l")
        return termios.tcgetattr(self.slave) == self.before and off > on and self.seen.rfind(b"\x1b[?25h") > self.seen.rfind(b"\x1b[?25l")


@contextmanager
def terminal(folder: Path, how: str = "{}", **env: str) -> Iterator[Terminal]:
    found = Terminal(folder, how, **env)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.wait(timeout=20)
        os.close(found.master), os.close(found.slave)


def test_a_live_run_is_drawn_anew_and_q_leaves(tmp_path: Path) -> None:
    with terminal(rich_run(tmp_path)) as tty:
        tty.until("step 49 of 50")
        write(tmp_path, loss(50))
        tty.until("step 50 of 50")
        tty.read(0.6)
        quiet = len(tty.seen)
        tty.read(1.0)  # nothing new: perhaps a clock, no more
        assert len(tty.seen) - quiet < 600
        os.write(tty.master, b"xq")
        tty.until("\x1b[?1049l")
        assert tty.end() == 0 and tty.left_as_it_was()


def test_ctrl_c_leaves(tmp_path: Path) -> None:
    with terminal(rich_run(tmp_path)) as tty:
        tty.until("step 49 of 50")
        tty.process.send_signal(signal.SIGINT)
        assert tty.end() == 0 and tty.left_as_it_was() and b"Traceback" not in tty.seen


def test_a_sigterm_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    with terminal(rich_run(tmp_path)) as tty:
        tty.until("step 49 of 50")
        tty.process.send_signal(signal.SIGTERM)
        assert tty.end() == 143 and tty.left_as_it_was() and b"Traceback" not in tty.seen


def test_it_ends_with_the_run_and_leaves_the_last_frame(tmp_path: Path) -> None:
    with terminal(rich_run(tmp_path)) as tty:
        tty.until("step 49 of 50")
        write(tmp_path, event_record("run", 49, "run_end", data={"status": "interrupted"}))
        assert tty.end() == 0 and tty.left_as_it_was()
        after = tty.seen[tty.seen.rfind(b"\x1b[?1049l"):]
        assert b"interrupted" in after and b"epoch-0002" in after


def test_with_keep_it_stays(tmp_path: Path) -> None:
    with terminal(rich_run(tmp_path, end=True), "{'keep': True}") as tty:
        tty.until("finished; q leaves")
        tty.read(0.7)
        assert tty.process.poll() is None
        os.write(tty.master, b"q")
        assert tty.end() == 0 and tty.left_as_it_was()


def test_the_terminal_may_change_its_size(tmp_path: Path) -> None:
    with terminal(rich_run(tmp_path)) as tty:
        tty.until("step 49 of 50")
        ioctl(tty.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 40, 0, 0))
        seen = len(tty.seen)
        tty.read(1.0)
        assert b"\x1b[12;1H" in tty.seen[seen:] and b"\x1b[13;1H" not in tty.seen[seen:]


def test_a_suspended_view_gives_the_terminal_back(tmp_path: Path) -> None:
    with terminal(rich_run(tmp_path)) as tty:
        tty.until("step 49 of 50")
        tty.process.send_signal(signal.SIGTSTP)
        tty.until("\x1b[?1049l")
        time.sleep(0.1)
        assert termios.tcgetattr(tty.slave) == tty.before
        tty.seen = b""
        tty.process.send_signal(signal.SIGCONT)
        tty.until("step 49 of 50")
        os.write(tty.master, b"q")
        assert tty.end() == 0 and tty.left_as_it_was()


def test_colours_unless_they_are_not_wanted(tmp_path: Path) -> None:
    colour = rb"\x1b\[[0-9;]*(3[0-7]|9[0-7])m"
    for env, expected in (({}, True), ({"NO_COLOR": "1"}, False)):
        with terminal(rich_run(tmp_path / str(expected), end=True), "{'once': True}", **env) as tty:
            assert tty.end() == 0 and bool(re.search(colour, tty.seen)) is expected, env
            assert b"\x1b[?1049h" not in tty.seen


def test_a_dumb_terminal_gets_one_frame(tmp_path: Path) -> None:
    with terminal(rich_run(tmp_path), TERM="dumb") as tty:
        assert tty.end() == 0 and b"\x1b" not in tty.seen and b"epoch-0002" in tty.seen


# ---- a run that is over

def clock(minute: int) -> str:
    return f"2026-11-24T{8 + minute // 60:02}:{minute % 60:02}:00.000000Z"


@pytest.mark.parametrize("killed", [False, True])
def test_the_wall_time_is_that_of_the_training(tmp_path: Path, killed: bool) -> None:
    """Two sessions, of 3 and 2 minutes; an evaluation in the same stream an hour later belongs to none of them."""
    records = [event_record("run", 0, "run_start", data={"epochs": 1, "steps_per_epoch": 4}, timestamp=clock(0)),
               scalar_record("run", 2, "train", "loss", 1.0, timestamp=clock(1)),
               scalar_record("run", 2, "validation", "val_loss", 1.0, timestamp=clock(2)),
               snapshot_record("run", 2, {"system.cpu.utilization": 0.5}, clock(3)),
               event_record("run", 2, "run_start", data={"epochs": 1, "steps_per_epoch": 4}, timestamp=clock(30)),
               scalar_record("run", 4, "train", "loss", 0.5, timestamp=clock(31 + killed))]
    records += [] if killed else [event_record("run", 4, "run_end", data={"status": "completed"}, timestamp=clock(32))]
    records += [scalar_record("run", 4, "test", "accuracy", 0.9, "wiki", {"phase": "eval"}, clock(92)),
                *structured_records("run", 4, "test", "confusion", "confusion_matrix", {"counts": [[1]]}, timestamp=clock(93))]
    if not killed:  # whatever comes after its end
        records += [scalar_record("run", 4, "train", "loss", 0.4, timestamp=clock(95)), event_record("run", 4, "x", timestamp=clock(96))]
    view = open_run(write(tmp_path / "run", *records))
    assert view.history.wall_time == 300 and view.history.ended - view.history.stretches[0].began > 5500
    assert "5:00 in all" in "\n".join(Frame(100, 24).draw(view))
    view.close()


@pytest.mark.parametrize("width", [30, 80, 120, 200])
def test_a_run_that_is_over_has_nothing_to_wait_for(tmp_path: Path, width: int) -> None:
    view = open_run(write(tmp_path / "run", event_record("run", 0, "x", timestamp=clock(0))))
    view.events.clear()
    for status in ("running", "finished", "interrupted", "failed", "died", "unfinished"):
        view.status = status
        text = "\n".join(Frame(width, 30).draw(view))
        assert ("yet" in text) == (status == "running") and "(yet)" not in text, status
        if width == 200:
            assert all(f"no {what}" in text for what in ("values", "snapshots", "checkpoints", "events"))
    view.close()
