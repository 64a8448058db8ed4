"""Lines that cannot be read: each command tells them as plain lines, and a call tells them once, at the line of its caller."""

import inspect
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from codex_ml.cli.main import main as codex_ml
from codex_ml.cli.ndjson import main as codex_ndjson
from codex_ml.first_difference import first_difference
from codex_ml.replay import replay
from codex_ml.telemetry.export import ExportError, export_run
from codex_ml.telemetry.ndjson import NdjsonReader, read_ndjson
from codex_ml.telemetry.record import encode, event_record, scalar_record
from codex_ml.telemetry.runs import open_run
from codex_ml.telemetry.settled import Settled
from codex_ml.telemetry.skipped import Skipped
from codex_ml.train_loop import run_training

BAD = b"loss was fine here\n"
MORE = "skipped 5 more such lines: codex-ndjson validate tells them all"


def loss(step: int) -> bytes:
    return encode(scalar_record("run", step, "train", "loss", 1 / step))


@pytest.fixture
def spoil():
    """Puts bad lines into the stream of a run, from line 2 on; gives their places."""
    def put(run: Path, count: int, bad: bytes = BAD) -> list[str]:
        path = run / ".codex/metrics.ndjson"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else [
            encode(event_record("run", 0, "run_start", data={"epochs": 1})), loss(1), loss(2)]
        path.write_bytes(b"".join([lines[0], *[bad] * count, *lines[1:]]))
        return [f"{path}:{2 + i}: " for i in range(count)]
    return put


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that its folder describes whole."""
    place = tmp_path_factory.mktemp("whole")
    (place / "text.txt").write_text("".join(f"{i} and {i % 7} make {i + i % 7}\n" for i in range(120)))
    run_training(model="tiny", data=place / "text.txt", block_size=16, epochs=2, batch_size=8, progress="off", threads=1,
                 fingerprint_every_steps=4, checkpoint_dir=place / "run", system_metrics_interval=0.0)
    return place / "run"


# ---- commands

COMMANDS = {"export": "export RUN --to csv", "compare": "compare RUN RUN2", "watch": "watch RUN --once", "diff": "diff RUN RUN2",
            "replay": "replay RUN"}


def told(command: str, run: Path, capsys) -> tuple[int, list[str]]:
    words = [str(run) if w == "RUN" else str(run.parent / "whole") if w == "RUN2" else w for w in COMMANDS[command].split()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code = codex_ml(words)
    return code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_tells_them_as_lines(command: str, whole: Path, tmp_path: Path, spoil, capsys) -> None:
    for name in ("run", "whole"):
        shutil.copytree(whole, tmp_path / name)
    run = tmp_path / "run"
    assert told(command, run, capsys) == (0, [])
    [place] = spoil(run, 1)
    code, [line] = told(command, run, capsys)
    assert code == 0 and line.startswith(f"skipped {place}it is no JSON")
    places = spoil(run, 24)
    code, lines = told(command, run, capsys)
    assert code == 0 and len(lines) == 21 and lines[-1] == MORE
    assert all(line.startswith(f"skipped {place}") for line, place in zip(lines, places[:20], strict=False))


def test_the_error_of_a_command_is_its_last_line(tmp_path: Path, spoil, capsys) -> None:
    spoil(tmp_path / "run", 2)
    (tmp_path / "run/.codex/metrics.ndjson").write_bytes(BAD * 2)
    assert codex_ml(["export", str(tmp_path / "run"), "--to", "csv"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["skipped", "skipped", "codex-ml"] and "has no records" in lines[-1]


def test_the_real_command_shows_no_warning(tmp_path: Path, spoil) -> None:
    [place] = spoil(tmp_path / "run", 1, b"text \x1b[2J\xe2\x80\xae\n")
    words = ["-m", "codex_ml.cli.main", "export", tmp_path / "run", "--to", "csv"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr.startswith(f"skipped {place}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("bad", [
    b'{"schema_version":"v1"}\n', b"[1]\n", loss(3).replace(b'"run_id":"run",', b""), loss(3).replace(b'"step":3', b'"step":"3"'),
    loss(3).replace(b'"run_id":"run"', b'"run_id":["run"]'), loss(3).replace(b'"metric":', b'"metrik":'),
    loss(3).replace(b',"tags":{}', b""),
])
def test_a_line_that_is_json_and_no_record_stops_no_export(tmp_path: Path, spoil, bad: bytes, capsys) -> None:
    [place] = spoil(tmp_path / "run", 1, bad)
    assert codex_ml(["export", str(tmp_path / "run"), "--to", "csv", "--check"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("2 numbers") and err.startswith(f"skipped {place}it") and err.count("\n") == 1


@pytest.mark.parametrize("words", [["merge", "-o", "OUT", "RUN"], ["tail", "RUN"], ["summarize", "--input", "RUN"]])
def test_the_commands_of_streams_tell_them_alike(tmp_path: Path, spoil, words: list[str], capsys) -> None:
    places = spoil(tmp_path / "run", 25)
    code = codex_ndjson([{"RUN": str(tmp_path / "run"), "OUT": str(tmp_path / "out")}.get(word, word) for word in words])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    assert code == (0 if words[0] == "tail" else 6) and lines[-1] == MORE and len(lines) == 21
    assert all(line.startswith(f"skipped {place}") for line, place in zip(lines, places[:20], strict=False))


def test_a_damaged_segment_is_told_by_watch_and_compare(tmp_path: Path, spoil, capsys) -> None:
    spoil(tmp_path / "run", 0)
    (tmp_path / "run/.codex/metrics.ndjson.00001.gz").write_bytes(b"no gzip")
    for words in (["watch", "--once"], ["compare"]):
        assert codex_ml([*words, str(tmp_path / "run")]) == 0
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"skipped {tmp_path}/run/.codex/metrics.ndjson.00001.gz:1: ")


# ---- calls

def library(call) -> None:
    """Call it, and look at what it warned of: once, at the line where it was called."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        line = call()
    [warning] = seen
    assert issubclass(warning.category, UserWarning) and str(warning.message).startswith("skipped 3 lines, the first ")
    assert "metrics.ndjson:2: " in str(warning.message) and (warning.filename, warning.lineno) == (__file__, line)


def here() -> int:
    return inspect.currentframe().f_back.f_lineno  # type: ignore[union-attr]


def test_a_call_gives_one_warning_that_points_at_it(tmp_path: Path, spoil, whole: Path) -> None:
    run, path = tmp_path / "run", tmp_path / "run/.codex/metrics.ndjson"
    shutil.copytree(whole, run)
    spoil(run, 3)
    library(lambda: (read_ndjson(path), here())[1])
    library(lambda: ([*NdjsonReader(path)], here())[1])
    reader = NdjsonReader(path)
    library(lambda: ([*reader.new()], here())[1])
    library(lambda: (reader.tail(10**6), here())[1])
    reader.close()
    library(lambda: (Settled(path), here())[1])
    library(lambda: (export_run(run, "csv", check=True), here())[1])
    library(lambda: (first_difference(run, whole), here())[1])
    library(lambda: (replay(run), here())[1])


def test_what_is_read_later_is_told_later(tmp_path: Path, spoil) -> None:
    spoil(tmp_path / "run", 1)
    path = tmp_path / "run/.codex/metrics.ndjson"
    reader = NdjsonReader(path)
    with pytest.warns(UserWarning, match=r"^skipped .*metrics\.ndjson:2: "):
        assert len(list(reader.new())) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(reader.new()) == []
    with path.open("ab") as file:
        file.write(BAD)
    with pytest.warns(UserWarning, match=r"^skipped .*metrics\.ndjson:5: "):
        assert list(reader.new()) == []
    assert reader.skipped == 2
    reader.close()


def test_a_loop_that_is_left_early_tells_what_it_has_seen(tmp_path: Path, spoil) -> None:
    spoil(tmp_path / "run", 2)
    with pytest.warns(UserWarning, match="skipped 2 lines"):
        for record in NdjsonReader(tmp_path / "run/.codex/metrics.ndjson"):
            if record["step"]:
                break


def test_who_listens_gets_no_warning_and_each_line_once(tmp_path: Path, spoil) -> None:
    places = spoil(tmp_path / "run", 30)
    path = tmp_path / "run/.codex/metrics.ndjson"
    with path.open("ab") as file:
        for step in range(3, 8000):
            file.write(loss(step))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader = NdjsonReader(path)
        for read in (lambda hear: read_ndjson(path, on_bad=hear), lambda hear: reader.tail(9000),
                     lambda hear: export_run(path, "csv", tmp_path / "x.csv", check=True, on_bad=hear)):
            heard: list[str] = []
            reader.on_bad = heard.append
            read(heard.append)
            reader.close()
            assert [reason[:len(place)] for reason, place in zip(heard, places, strict=True)] == places
        with pytest.raises(ExportError, match="has no records"):
            Settled(path, "another", on_bad=heard.append)


def test_strict_reading_raises_and_does_not_warn(tmp_path: Path, spoil) -> None:
    spoil(tmp_path / "run", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="strict=False"):
            read_ndjson(tmp_path / "run/.codex/metrics.ndjson", strict=True)


def test_a_view_counts_them_and_knows_the_first(tmp_path: Path, spoil) -> None:
    spoil(tmp_path / "run", 30)
    view = open_run(tmp_path / "run")
    assert view.unreadable == 30 and view.first_unreadable.startswith("metrics.ndjson:2: it is no JSON")
    assert len(view.skipped.lines()) == 21
    view.close()


def test_no_secret_and_no_control_character_is_told(capsys) -> None:
    with Skipped() as skipped:
        skipped("a\x1b[2J.ndjson:2: its step is 'hf_" + "a1B2" * 9 + "'")
    err = capsys.readouterr().err
    assert "\x1b" not in err and "a1B2a1B2" not in err and err.startswith(r"skipped a\x1b[2J.ndjson:2: ")
