import errno
import fcntl
import io
import os
import pty
import random
import re
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
import torch

from codex_ml.telemetry import display as module
from codex_ml.telemetry.display import Lines, LiveLine, Notes, choose_view, duration, open_display


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def screen(text, width):
    "What a terminal of that width shows in the end: lines, as far as carriage returns and line breaks go."
    lines, column = [[]], 0
    for character in text.replace(LiveLine.erase, "\0"):
        if character == "\0":
            del lines[-1][column:]
        elif character == "\r":
            column = 0
        elif character == "\n":
            lines.append([])
            column = 0
        else:
            assert column < width, "the line wraps"
            lines[-1][column:column + 1] = [character]
            column += 1
    return ["".join(line).rstrip() for line in lines]


def test_a_live_line_is_covered_wholly(clock):
    stream = io.StringIO()
    display = open_display("live", 3, stream)
    for step, loss in [(1, 1.23456789), (2, 1.0), (3, 123456.789), (4, 2.0)]:
        clock.now += 1
        display.step(1, step, 4, loss, 1e-3)
    line = "epoch 1/3  step 4/4  100%  loss 2.000  lr 0.001  1.0 steps/s  0:08 left"
    assert screen(stream.getvalue(), 80) == [line]
    clock.now += 1
    display.view.show({"epoch": "x"})
    assert screen(stream.getvalue(), 80) == ["x"]
    display.view.show({"epoch": "a longer line"})
    display.note("short")
    assert screen(stream.getvalue(), 80) == ["short", "a longer line"]
    stream.write("^C")  # the terminal's own echo of a key
    display.step(1, 4, 4, 2.0, 1e-3)
    display.epoch(1, {"train_loss": 2.0, "note": "a\nb"})
    display.close()
    assert screen(stream.getvalue(), 80) == ["short", "epoch 1/3  train_loss 2.000  note a b  1.0 steps/s  0:04", ""]


def test_it_is_drawn_ten_times_a_second_at_most(clock):
    stream = io.StringIO()
    display = open_display("live", 1, stream)
    for step in range(1, 2001):
        clock.now += 0.001
        display.step(1, step, 2000, 1.0, 1e-3)
    assert 19 <= stream.getvalue().count("\r") <= 21


def test_plain_lines_come_every_ten_seconds(clock):
    stream = io.StringIO()
    display = open_display("lines", 1, stream)
    for step in range(1, 1001):
        clock.now += 0.035
        display.step(1, step, 1000, 1.0, 1e-3)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and "\r" not in stream.getvalue()
    assert lines[0].endswith("28.6 steps/s  0:25 left") and "step 286/1000  28%" in lines[0]


def test_rate_and_time_left(clock):
    stream = io.StringIO()
    display = open_display("live", 2, stream)
    for step in range(1, 11):
        clock.now += 2
        display.step(1, step, 10, 1.0, 1e-3)
    assert screen(stream.getvalue(), 80)[-1].endswith("2.0 s/step  0:20 left")
    clock.now += 100  # validation
    display.epoch(1, {})
    clock.now += 2
    display.step(2, 1, 10, 1.0, 1e-3)
    assert "  2.0 s/step  1:48 left" in stream.getvalue().split("\r")[-1]


def test_what_goes_before_the_first_step_is_in_no_figure(clock):
    stream = io.StringIO()
    display = open_display("live", 2, stream)
    clock.now += 1000  # data are read, the model is built
    for step in range(1, 11):
        clock.now += 2
        display.step(1, step, 10, 1.0, 1e-3)
        assert "left" not in stream.getvalue() or max(map(int, re.findall(r"0:(\d\d) left", stream.getvalue()))) <= 36
    clock.now += 50
    display.epoch(1, {"val_loss": 1.0})
    assert "epoch 1/2  val_loss 1.000  2.0 s/step  1:08" in stream.getvalue()
    display.epoch(2, {})  # no step at all
    display.close()
    assert "epoch 2/2  0:00" in stream.getvalue()


def test_one_step_or_none_in_the_first_epoch(clock):
    for steps in (0, 1):
        stream = io.StringIO()
        display = open_display("lines", 1, stream)
        clock.now += 5
        for step in range(steps):
            display.step(1, step + 1, steps, 1.0, 1e-3)
        display.epoch(1, {})
        assert stream.getvalue() == "epoch 1/1  0:05\n"
        for step in range(4):
            clock.now += 1
            display.step(2, step + 1, 4, 1.0, 1e-3)
        display.epoch(2, {})
        assert stream.getvalue().endswith(f"epoch 2/1  1.0 steps/s  0:0{3 + steps}\n")


@pytest.mark.parametrize("width,expected", [
    (200, "epoch 12/100  step 1234/5000  24%  loss 2.554  lr 0.0008  0.5 s/step  1:02:07 left"),
    (80, "epoch 12/100  step 1234/5000  24%  loss 2.554  0.5 s/step  1:02:07 left"),
    (60, "epoch 12/100  step 1234/5000  24%  loss 2.554  1:02:07 left"),
    (59, "epoch 12/100  24%  loss 2.554  1:02:07 left"),
    (40, "epoch 12/100  24%  loss 2.554"),
    (20, "epoch 12/100  loss "),
    (1, ""),
])
def test_a_narrow_terminal_says_less(width, expected, monkeypatch):
    stream = io.StringIO()
    view = LiveLine(stream)
    monkeypatch.setattr(view, "width", lambda: width)
    view.show({"epoch": "epoch 12/100", "step": "step 1234/5000", "share": "24%", "loss": "loss 2.554", "lr": "lr 0.0008",
               "rate": "0.5 s/step", "left": "1:02:07 left"})
    assert screen(stream.getvalue(), width) == [expected.rstrip()]


def test_what_stays_is_folded_and_a_note_of_many_lines_is_whole(clock, monkeypatch):
    monkeypatch.setattr(LiveLine, "width", lambda self: 40)
    stream = io.StringIO()
    display = open_display("live", 4, stream)
    for step in (1, 2):
        clock.now += 1
        display.step(1, step, 2, 3.633, 1e-3)
    display.note("one\n" + "w" * 39)
    display.epoch(1, {"train_loss": 3.633, "val_loss": 2.51, "val_perplexity": 12.3, "m" * 50: 1.0} | {"val_accuracy": 0.3775})
    display.close()
    lines = screen(re.sub("m{50} 1.000", "x" * 30, stream.getvalue().replace("m" * 50 + " 1.000", "x" * 30)), 40)
    assert lines == ["one", "w" * 39, "epoch 1/4  train_loss 3.633", "  val_loss 2.510  val_perplexity 12.30",
                     "  " + "x" * 30, "  val_accuracy 0.3775  1.0 steps/s", "  0:01", ""]


def test_a_metric_that_cannot_be_shown_stops_nobody(clock):
    class Odd:
        def __str__(self):
            raise RuntimeError("no words")

    display = open_display("lines", 1, io.StringIO())
    display.epoch(1, {"odd": Odd()})
    clock.now += 20
    display.step(1, 1, 2, "no number", None)  # type: ignore


def test_an_epoch_whose_length_is_not_known(clock):
    stream = io.StringIO()
    display = open_display("live", 1, stream)
    for step in (1, 2):
        clock.now += 1
        display.step(1, step, None, float("nan"), 1e-3)
    assert stream.getvalue().split("\r")[-1].startswith("epoch 1/1  step 2  loss nan  lr 0.001  1.0 steps/s")


class Gone(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error, self.tries = error, 0

    def write(self, text):
        self.tries += 1
        raise self.error


@pytest.mark.parametrize("mode", ["live", "lines"])
@pytest.mark.parametrize("error", [
    BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.EIO, "Input/output error"), ValueError("I/O operation on closed file"),
    RuntimeError("reentrant call"),
])
def test_a_place_that_is_gone_turns_it_off_once(mode, error, clock):
    stream = Gone(error)
    display = open_display(mode, 2, stream)
    for step in range(5):
        clock.now += 20
        display.step(1, step + 1, 5, 1.0, 1e-3)
        display.epoch(1, {"a": 1.0})
        display.note("x")
    display.close()
    assert stream.tries == 1


def test_a_slow_place_loses_lines_only(clock):
    stream = Gone(BlockingIOError(errno.EAGAIN, "again"))
    display = open_display("lines", 2, stream)
    display.note("lost")
    display.note("lost")
    assert stream.tries == 2 and display.view is not None


def test_a_note_from_a_signal_handler_in_the_middle_of_a_write_waits(clock):
    class Interrupted(io.StringIO):
        asked = False

        def write(self, text):
            if not self.asked:
                self.asked = True
                display.note("SIGINT: ending after this step")
                assert not self.getvalue()
            return super().write(text)

    stream = Interrupted()
    display = open_display("live", 1, stream)
    display.step(1, 1, 2, 1.0, 1e-3)
    assert display.view is not None and not display._waiting
    display.close()
    assert screen(stream.getvalue(), 80) == ["SIGINT: ending after this step", "epoch 1/1  step 1/2  50%  loss 1.000  lr 0.001", ""]


def test_an_interrupt_goes_through(clock):
    display = open_display("lines", 1, Gone(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        display.note("x")
    assert not display._busy


def test_characters_that_the_stream_does_not_know():
    raw = io.BytesIO()
    display = open_display("lines", 1, io.TextIOWrapper(raw, encoding="ascii"))
    display.epoch(1, {"größe\ud800": 1.0})
    display.note("→")
    assert b"gr??e? 1.000" in raw.getvalue() and display.view is not None


def test_off_still_warns():
    stream = io.StringIO()
    display = open_display("off", 1, stream)
    display.step(1, 1, 1, 1.0, 1.0), display.epoch(1, {"a": 1.0}), display.note("mind this"), display.close()
    assert stream.getvalue() == "mind this\n"


def test_without_any_stream(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    display = open_display("auto", 1)
    display.step(1, 1, 1, 1.0, 1.0), display.epoch(1, {}), display.note("x"), display.close()


@pytest.mark.parametrize("mode", ["auto", "live", "lines", "off"])
def test_streams_that_are_closed_or_only_write(mode, monkeypatch):
    closed = io.StringIO()
    closed.close()

    class Writes:
        def write(self, text):
            return len(text)

    for stream in (closed, Writes()):
        monkeypatch.setattr(sys, "stderr", stream)
        display = open_display(mode, 1)
        display.step(1, 1, 1, 1.0, 1.0), display.epoch(1, {}), display.note("x"), display.close()


def test_the_place_is_recognised(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert type(choose_view("auto", Terminal())) is LiveLine
    assert type(choose_view("auto", io.StringIO())) is Lines
    monkeypatch.setenv("TERM", "dumb")
    assert type(choose_view("auto", Terminal())) is Lines
    assert type(choose_view("lines", Terminal())) is Lines and type(choose_view("off", Terminal())) is Notes


RUN = """
import sys, time
from codex_ml.telemetry.display import open_display
with open_display("auto", 2) as display:
    for epoch in (1, 2):
        for step in range(1, 41):
            time.sleep(0.005)
            display.step(epoch, step, 40, 1/step, 1e-3)
            if step == 20: display.note("a warning in the middle")
        display.epoch(epoch, {"train_loss": 0.5})
assert "IPython" not in sys.modules
"""


def test_in_a_terminal_of_forty_columns():
    pid, fd = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-c", RUN])
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    text = b""
    while True:
        try:
            piece = os.read(fd, 4096)
        except OSError:
            break
        if not piece:
            break
        text += piece
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    shown = text.decode().replace("\r\n", "\n")
    lines = [line for line in screen(shown, 40) if line]
    assert [line[:27] for line in lines if line[:2] != "  "] == [
        "a warning in the middle", "epoch 1/2  train_loss 0.500", "a warning in the middle", "epoch 2/2  train_loss 0.500"]
    assert shown.count("\r") > 4


def test_in_a_pipe_and_in_a_pipe_that_closes():
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "" and done.stderr.count("\n") == 4 and "\r" not in done.stderr
    read, write = os.pipe()
    os.close(read)
    child = subprocess.Popen([sys.executable, "-c", RUN], stderr=write)
    os.close(write)
    assert child.wait() == 0


def kernel_outputs(environment, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    code = RUN.replace('assert "IPython" not in sys.modules\n', "")
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    old = {name: os.environ.pop(name, None) for name in ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")}
    os.environ.update(environment)
    try:
        NotebookClient(nb, timeout=60, kernel_name="python3").execute()
    finally:
        for name in environment:
            del os.environ[name]
        os.environ.update({k: v for k, v in old.items() if v is not None})
    return nb.cells[0].outputs


def test_in_a_notebook_one_output_changes_in_place(tmp_path):
    outputs = kernel_outputs({"JPY_SESSION_NAME": "a.ipynb"}, tmp_path)
    displays = [o for o in outputs if o["output_type"] == "display_data"]
    assert len(displays) == 1
    lines = displays[0]["data"]["text/plain"].splitlines()
    assert [line[:24] for line in lines] == ["epoch 1/2  train_loss 0.", "epoch 2/2  train_loss 0."]
    assert "".join(o["text"] for o in outputs if o["output_type"] == "stream") == "a warning in the middle\n" * 2


def test_under_papermill_lines(tmp_path):
    outputs = kernel_outputs({}, tmp_path)
    assert {o["output_type"] for o in outputs} == {"stream"} and {o["name"] for o in outputs} == {"stderr"}
    assert "".join(o["text"] for o in outputs).count("\n") == 4


def test_a_step_costs_little(monkeypatch):
    display, shown = open_display("lines", 1, io.StringIO()), []
    monkeypatch.setattr(display, "_show", lambda *step: shown.append(step))
    for step in range(20_000):
        display.step(1, step, 20_000, 1.0, 1e-3)
    assert len(shown) < 5, "a step is shown when its time has come, not each"


def test_nothing_draws_a_random_number(clock):
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    with open_display("live", 1, io.StringIO()) as display:
        clock.now += 1
        display.step(1, 1, 1, 1.0, 1.0)
        display.epoch(1, {})
    assert random.getstate() == before[0] and np.random.get_state()[1].tobytes() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_durations():
    assert [duration(s) for s in (0, 59.6, 3599, 3600, 100000)] == ["0:00", "1:00", "59:59", "1:00:00", "27:46:40"]
