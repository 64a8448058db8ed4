"""`codex-ndjson` as a shell calls it: exit codes, one line for an error, and what is printed."""

import gzip
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from codex_ml.cli import ndjson as cli
from codex_ml.telemetry.ndjson import NdjsonReader, NdjsonWriter
from codex_ml.telemetry.record import encode, event_record, scalar_record, snapshot_record, structured_records

COMMAND = [sys.executable, "-m", "codex_ml.cli.ndjson"]


def at(second):
    return f"2026-11-24T08:{second // 60:02d}:{second % 60:02d}.000000Z"


def scalar(step, metric="loss", split="train", run="r", **tags):
    return scalar_record(run, step, split, metric, step / 4, tags=tags, timestamp=at(step))


def write(path, *records, **options):
    writer = NdjsonWriter(path, **options)
    for record in records:
        writer.emit(record)
    writer.close()
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / ".codex" / "metrics.ndjson"


@pytest.fixture
def call(capsys):
    def run(*words):
        code = cli.main([str(word) for word in words])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err
    return run


# ---- wrong use

@pytest.mark.parametrize("words", [
    [], ["tial"], ["validate"], ["tail"], ["tail", "{}", "-n", "-1"], ["tail", "{}", "-n", "x"], ["merge", "{}"], ["summarize"],
    ["summarize", "--input", "{}", "--output", "xml"], ["tail", "{}/no"], ["validate", "{}/no"], ["merge", "{}/no", "-o", "{}/out"],
    ["validate", "{}/empty"], ["tail", "{}/empty"], ["merge", "{}/empty", "-o", "{}/out"], ["summarize", "--input", "{}/no"],
    ["merge", "{}/a.ndjson", "-o", "{}/a.ndjson"], ["tail", "{}/a.ndjson/b"], ["merge", "{}/a.ndjson", "-o", "{}/c.ndjson"],
])
def test_wrong_use_is_2_and_says_why_in_one_line(words, tmp_path, call):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "a.ndjson", scalar(1))
    (tmp_path / "c.ndjson.00001").write_bytes(b"")
    code, out, err = call(*(word.replace("{}", str(tmp_path)) for word in words))
    assert code == 2 and out == "" and not (tmp_path / "out").exists()
    assert err.splitlines()[-1].startswith("codex-ndjson")


@pytest.mark.parametrize("words", [["-h"], ["tail", "-h"], ["validate", "-h"], ["merge", "-h"], ["summarize", "-h"]])
def test_help(words, call):
    code, out, err = call(*words)
    assert code == 0 and out.startswith("usage: codex-ndjson") and err == ""


def test_a_folder_in_the_place_of_a_file(tmp_path, call):
    (tmp_path / "x.ndjson").mkdir()
    assert call("validate", tmp_path / "x.ndjson")[0] == 2
    write(tmp_path / "a.ndjson", scalar(1))
    code, _, err = call("merge", tmp_path / "a.ndjson", "-o", tmp_path / "no" / "out")
    assert code == 2 and err == f"codex-ndjson: {tmp_path / 'no'}: No such file or directory\n"


# ---- validate

def test_a_stream_as_it_should_be(path, call):
    matrix = structured_records("r", 5, "validation", "confusion", "confusion_matrix", {"counts": [[1]]})
    write(path, event_record("r", 0, "run_start"), *(scalar(n) for n in range(30)), snapshot_record("r", 5, {"gpu_count": 1}), *matrix,
          max_bytes=2000, backups=99)
    assert call("validate", path) == (0, "1 stream, 34 records: 0 findings\n", "")
    with path.open("ab") as file:
        file.write(b'{"$schema":"codex_ml/met')
    assert call("validate", path.parent.parent) == (0, "1 stream, 34 records, 1 cut short by a kill or a full disk: 0 findings\n", "")


def test_findings_have_their_place(path, call):
    write(path, scalar(1), {**scalar(2), "step": "2"}, {**scalar(3), "$schema": "x"})
    with path.open("a") as file:
        file.write("no record\n")
    row = structured_records("r", 5, "v", "c", "histogram", {})[1]
    write(path, {**scalar(4), "extra": 1, "value": [2]}, row)
    code, out, err = call("validate", path)
    lines = out.splitlines()
    assert code == 6 and err == "" and lines[-1] == "1 stream, 5 records: 6 findings"
    assert [line.removeprefix(f"{path}:")[:17] for line in lines[:-1]] == [
        "2: step: '2' is n", "3: $schema: 'x' i", "4: it is no JSON ", "5: Additional pro", "5: value: [2] is ", "6: tags.manifest:"]


def test_a_finding_in_a_segment_and_in_another_stream(path, call):
    write(path, {**scalar(1), "metric": 3}, scalar(2), scalar(3), max_bytes=300)
    write(path.parent.parent / "eval.ndjson", {**scalar(1), "split": None})
    code, out, _ = call("validate", path.parent.parent)
    assert code == 6 and f"{path}.00001.gz:1: metric: 3 is not" in out and "eval.ndjson:1: split: None is not" in out
    assert out.endswith("2 streams, 4 records: 2 findings\n")


def test_a_manifest_that_was_changed(path, call):
    manifest, row = structured_records("r", 5, "v", "c", "histogram", {"counts": [1]})
    write(path, {**manifest, "data": {"counts": [2]}}, row)
    code, out, _ = call("validate", path)
    assert code == 6 and f"{path}:1: manifest: {manifest['manifest']} is not the hash of its kind and data" in out


def test_a_manifest_that_was_deleted_with_its_segment_is_no_finding(path, call):
    manifest, row = structured_records("r", 5, "v", "c", "histogram", {"counts": [1]})
    write(path, manifest, scalar(1), scalar(2), row, max_bytes=300, backups=1)
    assert call("validate", path)[0] == 0


def test_many_findings_are_cut_short_and_counted(path, call):
    path.parent.mkdir(parents=True)
    path.write_text("x\n" * 3000)
    code, out, err = call("validate", path)
    assert code == 6 and len(out.splitlines()) == 102 and f"{path}: and 2,900 more" in out and "3,000 findings" in out and err == ""


def test_without_jsonschema(path, call, monkeypatch):
    from codex_ml.telemetry import schema

    monkeypatch.setitem(sys.modules, "jsonschema", None)
    schema._validators.cache_clear()
    code, _, err = call("validate", write(path, scalar(1)))
    schema._validators.cache_clear()
    assert code == 2 and err == 'codex-ndjson: checking records needs the package jsonschema: pip install "codex_ml[schema]"\n'


# ---- tail

def test_tail_of_every_kind(path, call):
    write(path, event_record("r", 0, "run_start", data={"epochs": 3, "resumed_from": None}, timestamp=at(0)), scalar(1, phase="eval"),
          snapshot_record("r", 2, {"system.cpu.utilization": 0.123456789, "gpu_count": 1}, timestamp=at(2)),
          *structured_records("r", 3, "train", "w", "histogram", {}, timestamp=at(3)))
    code, out, err = call("tail", path.parent.parent)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0 and err == "" and lines[:3] == [
        "2026-11-24 08:00:00 0 info run_start epochs=3 resumed_from=None", "2026-11-24 08:00:01 1 train loss 0.25 phase=eval",
        "2026-11-24 08:00:02 2 system system.cpu.utilization 0.123457 gpu_count 1"]
    sample = {"$schema": "codex_ml/sample.v1", "schema_version": "v1", "split": "test", "index": 3, "loss": 0.5}
    write(path.parent / "records.ndjson", sample)
    assert call("tail", path.parent / "records.ndjson")[1].split() == ["test", "index=3", "loss=0.5"]
    assert lines[3].startswith("2026-11-24 08:00:03 3 manifest histogram ")
    assert lines[4].startswith("2026-11-24 08:00:03 3 train w None manifest=")


def test_tail_chooses(path, call):
    write(path, *(scalar(n, metric, split) for n in range(9) for metric, split in [("loss", "train"), ("val_loss", "validation")]),
          snapshot_record("r", 9, {"gpu_util_mean": 0.5, "system.cpu.utilization": 0.1}, timestamp=at(9)), max_bytes=900)
    got = lambda *words: [line.split()[2:5] for line in call("tail", path, *words)[1].splitlines()]
    assert len(got()) == 10 and len(got("-n", "100")) == 19 and got("-n", "0") == []
    assert got("-n", "2", "--metric", "val_*") == [["7", "validation", "val_loss"], ["8", "validation", "val_loss"]]
    assert got("--split", "train")[-1] == ["8", "train", "loss"]
    assert got("--metric", "gpu_*") == [["9", "system", "gpu_util_mean"]]
    assert got("--split", "test") == []


def test_tail_of_a_folder_with_several_streams_asks_for_one(tmp_path, call, path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.ndjson", scalar(1))
    code, _, err = call("tail", tmp_path)
    assert code == 2 and "a.ndjson" in err and "b.ndjson" in err
    write(path, scalar(3))
    write(path.parent.parent / "eval.ndjson", scalar(1))
    assert call("tail", path.parent.parent)[1].split()[2] == "3"  # the stream of a run


def test_what_is_bad_is_told_and_the_rest_is_shown(path, call):
    write(path, scalar(1))
    with path.open("a") as file:
        file.write("bad\n")
    write(path, scalar(2))
    code, out, err = call("tail", path)
    assert code == 0 and len(out.splitlines()) == 2 and err.startswith(f"skipped {path}:2: ") and err.count("\n") == 1


def test_no_name_steers_the_terminal(path, call):
    event = event_record("r", 1, "a\rb", data={"\x1b": "\x1b]0;x"})
    write(path, scalar(1, "\x1b[2J\x07loss\n\u202eevil"), event, {**scalar(2), "timestamp": "\x1b"})
    _, out, _ = call("tail", path)
    assert len(out.splitlines()) == 3 and all(line.isprintable() for line in out.splitlines()) and "\\x1b[2J" in out


@pytest.mark.parametrize("odd", [{"tags": None}, {"tags": [1]}, {"value": {"a": 1}}, {"dataset": 3}, {"timestamp": 5}, {"step": None}])
def test_odd_records_are_shown_too(path, call, odd):
    event = {**event_record("r", 1, "x"), "data": odd.get("tags", "text")}
    assert len(call("tail", write(path, {**scalar(1), **odd}, event))[1].splitlines()) == 2


def test_followed_by_another_process_over_cuts(path):
    writer = NdjsonWriter(path, max_bytes=1000, backups=99)
    writer.emit(scalar(0))
    words = ["tail", "-f", "-n", "5", path, "--metric", "lo*"]
    child = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout
        seen = [child.stdout.readline().split()[2]]
        for step in range(1, 200):
            writer.emit(scalar(step))
            writer.emit(scalar(step, "other"))
            if step % 50 == 0:
                time.sleep(0.05)
        writer.close()
        seen += [child.stdout.readline().split()[2] for _ in range(199)]
        child.send_signal(signal.SIGINT)
        assert child.wait(5) == 130 and child.stderr and child.stderr.read() == ""
    finally:
        child.kill()
        child.wait()
    assert seen == [str(n) for n in range(200)]


def test_a_reader_that_has_read_enough(path):
    write(path, *(scalar(n) for n in range(5000)))
    child = subprocess.Popen([*COMMAND, "tail", "-n", "5000", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout and child.stderr
    assert child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait(10) == 0
    child.stderr.close()


# ---- merge

def steps(path):
    return [r["step"] for r in NdjsonReader(path, strict=True)]


@pytest.mark.parametrize("name", ["all.ndjson", "all.ndjson.gz"])
def test_merged_by_time_each_line_once(tmp_path, name, call):
    write(tmp_path / "a.ndjson", *(scalar(n) for n in (0, 3, 4, 9)), max_bytes=300)
    write(tmp_path / "b" / "b.ndjson", *(scalar(n) for n in (1, 3, 5)), scalar(5, "other"))
    code, out, err = call("merge", tmp_path / "a.ndjson", tmp_path / "b", "-o", tmp_path / name)
    assert (code, out, err) == (0, f"{tmp_path / name}: 7 records, 1 double left out\n", "")
    assert steps(tmp_path / name) == [0, 1, 3, 4, 5, 5, 9]
    data = (tmp_path / name).read_bytes()
    lines = (gzip.decompress(data) if name.endswith("gz") else data).splitlines(keepends=True)
    assert set(lines) == {encode(scalar(n)) for n in (0, 1, 3, 4, 5, 9)} | {encode(scalar(5, "other"))}
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_merging_a_merge_changes_nothing(tmp_path, call):
    write(tmp_path / "a.ndjson", *(scalar(n) for n in range(20)))
    call("merge", tmp_path / "a.ndjson", tmp_path / "a.ndjson", "-o", tmp_path / "one.ndjson")
    assert (tmp_path / "one.ndjson").read_bytes() == (tmp_path / "a.ndjson").read_bytes()
    write(tmp_path / "b.ndjson", *(scalar(n) for n in range(5, 25)))
    call("merge", tmp_path / "one.ndjson", tmp_path / "b.ndjson", "-o", tmp_path / "two.ndjson")
    assert steps(tmp_path / "two.ndjson") == list(range(25))


def test_a_stream_keeps_its_own_order_where_a_clock_was_set_back(tmp_path, call):
    write(tmp_path / "a.ndjson", *({**scalar(n), "timestamp": at(second)} for n, second in enumerate([10, 11, 2, 3, 20])))
    write(tmp_path / "b.ndjson", *(scalar(n) for n in (5, 12)))
    call("merge", tmp_path / "a.ndjson", tmp_path / "b.ndjson", "-o", tmp_path / "out")
    assert steps(tmp_path / "out") == [5, 0, 1, 2, 3, 12, 4]


def test_times_with_and_without_a_fraction(tmp_path, call):
    stamps = ["2026-11-24T08:00:00Z", "2026-11-24T08:00:00.5Z", "2026-11-24T08:00:01Z"]
    write(tmp_path / "a.ndjson", {**scalar(1), "timestamp": stamps[1]})
    write(tmp_path / "b.ndjson", {**scalar(0), "timestamp": stamps[0]}, {**scalar(2), "timestamp": stamps[2]})
    call("merge", tmp_path / "a.ndjson", tmp_path / "b.ndjson", "-o", tmp_path / "out")
    assert steps(tmp_path / "out") == [0, 1, 2]


def test_lines_that_are_no_records_are_left_out_and_told(tmp_path, call):
    write(tmp_path / "a.ndjson", scalar(1))
    with (tmp_path / "a.ndjson").open("ab") as file:
        file.write(b"bad\n" + encode(scalar(2))[:30] + b"\n" + encode(scalar(3)).rstrip())
    code, out, err = call("merge", tmp_path / "a.ndjson", "-o", tmp_path / "out")
    assert code == 6 and "2 records, 1 cut short" in out and err.startswith(f"skipped {tmp_path / 'a.ndjson'}:2: ")
    assert (tmp_path / "out").read_bytes() == encode(scalar(1)) + encode(scalar(3))


def test_a_merge_that_fails_leaves_what_was_there(tmp_path, call, monkeypatch):
    write(tmp_path / "a.ndjson", *(scalar(n) for n in range(5)))
    (tmp_path / "out").write_text("before")

    def full(fd, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    code, _, err = call("merge", tmp_path / "a.ndjson", "-o", tmp_path / "out")
    monkeypatch.undo()
    assert code == 5 and "No space left" in err and err.count("\n") == 1
    assert (tmp_path / "out").read_text() == "before" and sorted(p.name for p in tmp_path.iterdir()) == ["a.ndjson", "out"]


# ---- summarize

def test_summarize_hands_on_what_was_asked_for(tmp_path, call, monkeypatch):
    import types

    asked = []
    room = types.ModuleType("summary")
    room.summarize_to = lambda *words: asked.append(words)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "codex_ml.telemetry.summary", room)
    a = write(tmp_path / "a.ndjson", scalar(1))
    code, out, err = call("summarize", "--input", a, "--input", tmp_path / "d", "--output", "csv", "--dest", tmp_path / "x.csv")
    assert (code, out, err) == (0, "", "") and asked == [([a, tmp_path / "d"], "csv", tmp_path / "x.csv")]

    def broken(*_):
        raise ModuleNotFoundError('summaries need polars: pip install "codex_ml[metrics]"')

    room.summarize_to = broken  # type: ignore[attr-defined]
    assert call("summarize", "--input", a) == (2, "", 'codex-ndjson: summaries need polars: pip install "codex_ml[metrics]"\n')


def test_a_summary_that_had_to_skip_lines_is_written_and_is_6(tmp_path, call):
    pytest.importorskip("polars")
    a, page = write(tmp_path / "a.ndjson", scalar(1), scalar(2)), tmp_path / "x.csv"
    with a.open("ab") as file:
        file.write(encode(scalar(3))[:40])  # a torn end is no finding
    code, out, err = call("summarize", "--input", a, "--output", "csv")
    assert code == 0 and out.count("\n") == 2 and err == "2 records in 1 file, 1 more cut short by a kill or a full disk\n"
    with a.open("ab") as file:
        file.write(b"\n" + b"bad\n" * 22)
    code, printed, err = call("summarize", "--input", a, "--output", "csv")
    assert code == 6 and printed == out and err.splitlines()[1].startswith(f"skipped {a}:4: ")
    assert err.splitlines()[-1] == "skipped 2 more such lines: codex-ndjson validate tells them all"
    assert call("summarize", "--input", a, "--dest", page)[:2] == (6, "") and page.read_text() == out
    assert call("validate", a)[0] == 6 and call("merge", a, "-o", tmp_path / "m")[0] == 6


@pytest.mark.parametrize("old, new, told", [
    ('"step":1,', '"step":1.0,', "step: 1.0 is written as a fraction"),
    ('"value":0.5', '"value":1e999', "1e999"),
    ('"value":0.5', '"value":0.5,"value":0.25', "value"),
    ('"run_id":"r"', '"run_id":"\\\\ud800"', "surrogate"),
    (None, "2026-02-30T25:00:00.000000Z", "is no time"),
])
def test_validate_tells_what_readers_disagree_on(old, new, told, tmp_path, call):
    text = encode(scalar(1)).decode()
    text = text.replace('"value":' + str(scalar(1)["value"]), '"value":0.5').replace('"value":0.0', '"value":0.5')
    new_text = text.replace(old, new.replace("\\\\", "\\")) if old else re.sub(r'"timestamp":"[^"]*"', f'"timestamp":"{new}"', text)
    assert new_text != text
    (tmp_path / "a.ndjson").write_text(new_text)
    code, out, _ = call("validate", tmp_path / "a.ndjson")
    assert code == 6 and f"{tmp_path / 'a.ndjson'}:1: " in out and told in out, out


def test_a_destination_that_is_no_file_is_not_replaced(tmp_path, call):
    pytest.importorskip("polars")
    a = write(tmp_path / "a.ndjson", scalar(1), scalar(2))
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("real.csv")
    assert call("summarize", "--input", a, "--dest", tmp_path / "link.csv")[0] == 0
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "real.csv").read_text().startswith("run_id,")
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    assert call("merge", a, "-o", tmp_path / "pipe")[0] == 0
    reader.join(20)
    assert (tmp_path / "pipe").is_fifo() and read == [a.read_bytes()]


def test_the_ending_of_a_summary_says_its_form(tmp_path, call):
    polars = pytest.importorskip("polars")
    a = write(tmp_path / "a.ndjson", scalar(1), scalar(2))
    looks = {"x.csv": lambda p: p.read_text().startswith("run_id,"), "x.json": lambda p: p.read_text().startswith("[\n{"),
             "x.parquet": lambda p: polars.read_parquet(p).height == 1, "x.txt": lambda p: p.read_text().startswith("run  "),
             "x.md": lambda p: p.read_text().startswith("run  ")}
    for name, right in looks.items():
        assert call("summarize", "--input", a, "--dest", tmp_path / name)[0] == 0 and right(tmp_path / name), name
    assert call("summarize", "--input", a, "--output", "csv", "--dest", tmp_path / "scores.dat")[0] == 0
    assert looks["x.csv"](tmp_path / "scores.dat")


@pytest.mark.parametrize(("words", "said"), [
    (["--output", "csv", "--dest", "{}/x.parquet"],
     "x.parquet: its ending stands for parquet, and --output says csv: leave one of the two out"),
    (["--dest", "{}/x.dat"], "x.dat: its ending does not say what to write: it can be .txt (table), .md (table), .csv (csv), .json (json), "
                             ".parquet (parquet); or say it with --output"),
])
def test_a_form_that_contradicts_its_ending_is_2_and_writes_nothing(words, said, tmp_path, call):
    a = write(tmp_path / "a.ndjson", scalar(1))
    code, out, err = call("summarize", "--input", a, *[word.format(tmp_path) for word in words])
    assert (code, out, err) == (2, "", f"codex-ndjson: {tmp_path}/{said}\n") and [*tmp_path.iterdir()] == [a]


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_summarize_takes_what_is_piped_into_it(name, tmp_path):
    pytest.importorskip("polars")
    train, judged = (write(tmp_path / part / "m.ndjson", *(scalar(step, split=part) for step in range(1, count)))
                     for part, count in (("train", 6), ("eval", 4)))
    piped = subprocess.run(f"cat {train} {judged} | {' '.join(COMMAND)} summarize --input {name} --output csv", shell=True,
                           capture_output=True, text=True, timeout=60)
    named = subprocess.run([*COMMAND, "summarize", "--input", train, judged, "--output", "csv"], capture_output=True, text=True, timeout=60)
    assert piped.returncode == 0 and piped.stdout == named.stdout and len(piped.stdout.splitlines()) == 3, piped.stderr


def test_a_place_in_a_folder_that_is_not_there(path, tmp_path, call):
    pytest.importorskip("polars")
    write(path, scalar(1))
    code, _, err = call("summarize", "--input", path, "--dest", tmp_path / "no" / "scores.csv")
    assert code == 5 and f"there is no folder {tmp_path / 'no'}. Make it first, or choose another place" in err
    assert not (tmp_path / "no").exists()
