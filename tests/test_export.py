"""Exports: what counts arrives, exactly; what was changed afterwards is found; what is missing is said."""

import json
import math
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from codex_ml.run_folder import take_turn
from codex_ml.telemetry import export as room
from codex_ml.telemetry.export import ExportError, Report, compare, export_run
from codex_ml.telemetry.ndjson import NdjsonWriter
from codex_ml.telemetry.record import event_record, scalar_record, snapshot_record, structured_records
from codex_ml.telemetry.runs import NoRun, open_run
from codex_ml.telemetry.settled import Settled

NEEDS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "csv": "csv", "parquet": "polars"}
ODD = [math.nan, math.inf, -math.inf, 0.1 + 0.2, 1e-320, 1.7976931348623157e308, -0.0, 1 / 3]


def write(folder, records):
    writer = NdjsonWriter(folder / ".codex" / "metrics.ndjson")
    for record in records:
        writer.emit(record)
    writer.close()
    return folder


def a_run(run_id="0f3a" * 8):
    "Two kills, orphans beyond both, odd values, data sets, texts, structures, and several looks at the machine in one step."
    def loss(step, value):
        return scalar_record(run_id, step, "train", "loss", value)

    yield event_record(run_id, 0, "run_start", data={"config": {"epochs": 5}})
    yield snapshot_record(run_id, 0, {"system.cpu.utilization": 0.5, "gpu_name": "none"})
    for step in range(1, 61):
        yield loss(step, random.random())
        if step % 10 == 0:
            yield snapshot_record(run_id, step, {"system.cpu.utilization": step / 7}, f"2026-11-24T08:30:{step - 1:02d}.000000Z")
            yield snapshot_record(run_id, step, {"system.cpu.utilization": step / 3}, f"2026-11-24T08:30:{step - 1:02d}.500000Z")
    yield event_record(run_id, 40, "run_start", data={"config": {"epochs": 5}, "resumed_from": "step-00000040"})
    for step in range(41, 46):
        yield loss(step, step / 3)
    yield event_record(run_id, 42, "run_start", data={"config": {"epochs": 8}, "resumed_from": "step-00000042"})
    for step in range(43, 51):
        yield loss(step, ODD[step - 43])
    yield scalar_record(run_id, 50, "validation", "val_loss", 1.0, dataset="a b")
    yield scalar_record(run_id, 50, "validation", "val_loss", 2.0, dataset="c")
    yield scalar_record(run_id, 50, "validation", "val_loss", 3.0, dataset="c")  # measured again
    yield scalar_record(run_id, 50, "validation", "grade", "good, \"quoted\"\nand more")
    yield from structured_records(run_id, 50, "train", "weights", "histogram",
                                  {"edges": [0.0, 1.0], "counts": [3], "min": 0.5, "max": 0.5, "num": 3, "sum": 1.5, "sum_squares": 0.75})
    yield event_record(run_id, 50, "run_end", data={"status": "completed"})


WRITTEN = 50 + 2 + 1 + 4 * 2  # losses, validations, looks at the machine at the beginning and in steps 10 to 40


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    random.seed(0)
    return write(tmp_path_factory.mktemp("a run"), a_run())


def test_what_counts(run):
    records = list(Settled(run / ".codex" / "metrics.ndjson"))
    losses = {r["step"]: r["value"] for r in records if r.get("metric") == "loss"}
    assert list(losses) == list(range(1, 51)) and losses[42] == 42 / 3 and repr(losses[43]) == "nan" and losses[44] == math.inf
    assert [r["value"] for r in records if r.get("dataset") == "c"] == [3.0]
    assert max(r["step"] for r in records if r.get("split") == "system") == 40


@pytest.mark.parametrize("target", list(room.TARGETS))
def test_every_number_arrives(target, run, tmp_path):
    pytest.importorskip(NEEDS[target])
    dest = tmp_path / ("m.table" if target in ("csv", "parquet") else "there")
    report = export_run(run, target, dest, check=True)
    assert report.differences == () and report.exit_code == 0 and "all equal" in str(report)
    assert report.checked == report.written == WRITTEN and report.dest == dest
    again = export_run(run, target, dest, check=True)  # over the first one
    assert again.differences == () and again.checked == WRITTEN


@pytest.mark.parametrize("target", list(room.TARGETS))
def test_a_check_sees_what_is_not_so(target, run, tmp_path, monkeypatch):
    "The same export, with one number changed, one lost and one too much on the way."
    pytest.importorskip(NEEDS[target])
    real = Settled.__iter__
    writing = [True]

    def tampered(self):
        for record in real(self):
            if writing[0] and record.get("metric") == "loss" and record["step"] == 7:
                yield {**record, "value": record["value"] * (1 + 1e-6)}
            elif writing[0] and record.get("metric") == "loss" and record["step"] == 1:
                yield {**record, "metric": "other"}
            else:
                yield record

    write_it = room.TARGETS[target].write

    def then_truth(*arguments):
        write_it(*arguments)
        writing[0] = False

    monkeypatch.setattr(Settled, "__iter__", tampered)
    monkeypatch.setitem(room.TARGETS, target, room.Target(**{**vars(room.TARGETS[target]), "write": then_truth}))
    report = export_run(run, target, tmp_path / "there", check=True)
    assert report.exit_code == 6
    text = "\n".join(report.differences)
    assert "train/other: 0 numbers were written, 1 are there" in text and "train/loss: 50 numbers were written, 49 are there" in text


def test_the_comparison():
    assert list(compare({"a": [(1, math.nan), (2, 0.5)]}, {"a": [(1, math.nan), (2, 0.5)]})) == []
    assert list(compare({"a": [(1, 0.5)]}, {"a": [(1, 0.5000000000000001)]})) == [
        "a: 0.5 at step 1 was written, 0.5000000000000001 at step 1 is there"]
    assert list(compare({"a": [(1, 0.5)]}, {"a": [(2, 0.5)]})) == ["a: 0.5 at step 1 was written, 0.5 at step 2 is there"]
    assert len(list(compare({"a": [(1, 0.5)]}, {}))) == len(list(compare({}, {"a": [(1, 0.5)]}))) == 1


def test_a_long_list_of_differences_is_cut():
    report = Report("csv", Path("m.csv"), "0f3a", 500, 500, 500, tuple(f"d{i}" for i in range(100)), "exactly")
    assert str(report).splitlines()[-1] == "  … and 480 more" and report.exit_code == 6


def test_defaults_lie_under_the_run(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert export_run(run, "csv").dest == run / "export" / "metrics.csv"
    lines = (run / "export" / "metrics.csv").read_text().splitlines()
    assert lines[0] == "timestamp,run_id,step,split,metric,dataset,value,text,tags" and list(tmp_path.iterdir()) == []
    assert export_run(run / ".codex" / "metrics.ndjson", "csv").dest == run / "export" / "metrics.csv"


def test_a_file_with_several_runs(tmp_path):
    write(tmp_path, [*a_run("a" * 32), *a_run("b" * 32), scalar_record("a" * 32, 99, "train", "loss", 1.0)])
    assert export_run(tmp_path, "csv").run_id == "b" * 32
    chosen = export_run(tmp_path, "csv", check=True, run_id="a" * 32)
    assert chosen.run_id == "a" * 32 and chosen.written == WRITTEN + 1 and chosen.exit_code == 0
    with pytest.raises(ExportError, match="no records of the run c; it has a"):
        export_run(tmp_path, "csv", run_id="c")


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(NoRun):
        export_run(tmp_path / "nowhere", "csv")
    with pytest.raises(ValueError, match="no target"):
        export_run(tmp_path, "excel")
    (tmp_path / "config.resolved.json").write_text(json.dumps({"values": {"metrics_out": {"value": None}}}))
    with pytest.raises(ExportError, match="metrics_out=null"):
        export_run(tmp_path, "csv")


@pytest.mark.parametrize("target, module", [(target, module) for target, module in NEEDS.items() if target != "csv"])
def test_a_missing_package_is_named_with_its_command(target, module, run, tmp_path, monkeypatch):
    for name in [module, *(n for n in sys.modules if n.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ExportError, match=r'pip install "codex_ml\['):
        export_run(run, target, tmp_path / "there")
    assert list(tmp_path.iterdir()) == []


def test_a_time_that_is_none_costs_its_line_and_is_told(tmp_path):
    pytest.importorskip("tensorboard")
    odd = scalar_record("0f3a", 2, "train", "loss", 2.0, timestamp="2026-02-30T25:00:00Z")
    run, told = write(tmp_path, [scalar_record("0f3a", 1, "train", "loss", 1.0), odd]), []
    report = export_run(run, "tensorboard", check=True, on_bad=told.append)
    assert report.exit_code == 0 and report.written == 1 and ":2: " in told[0] and "out of range" in told[0]


@pytest.mark.parametrize("to", ["tensorboard", "wandb", "mlflow"])
def test_a_folder_that_is_a_file_is_told_in_one_line(to, tmp_path):
    pytest.importorskip(NEEDS[to])
    (tmp_path / "taken").write_text("a file")
    with pytest.raises((ExportError, ValueError), match="taken"):
        export_run(write(tmp_path / "run", [scalar_record("0f3a", 1, "train", "loss", 1.0)]), to, tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "a file"


def test_a_torn_end_costs_itself_only(tmp_path):
    write(tmp_path, a_run())
    with (tmp_path / ".codex" / "metrics.ndjson").open("ab") as file:
        file.write(b'{"$schema":"codex_ml/metrics.v1","schema_ver')
    assert export_run(tmp_path, "csv", check=True).checked == WRITTEN


def test_nothing_that_is_read_is_written_over(tmp_path):
    from codex_ml.telemetry.summary import summarize_to

    metrics = write(tmp_path / "run", a_run()) / ".codex" / "metrics.ndjson"
    (tmp_path / "run" / "latest.json").write_text("{}")
    before = metrics.read_bytes()
    with pytest.raises(ValueError, match="would be destroyed"):
        export_run(tmp_path / "run", "csv", metrics)
    with pytest.raises(ValueError, match="a file of the run itself"):
        export_run(tmp_path / "run", "csv", tmp_path / "run" / "latest.json")
    with pytest.raises(ValueError, match="would be destroyed"):
        summarize_to([tmp_path / "run"], "csv", metrics)
    assert metrics.read_bytes() == before and (tmp_path / "run" / "latest.json").read_text() == "{}"


def test_an_export_of_a_run_that_goes_on_is_refused_and_does_not_hang(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setattr(room, "take_turn", lambda folder, name, patience: take_turn(folder, name, 0.3))
    run = write(tmp_path / "run", [scalar_record("0f3a", 1, "train", "loss", 1.0)])
    with take_turn(run, "mlflow"), pytest.raises(ExportError, match="another process still writes"):
        export_run(run, "mlflow", tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_wandb_that_is_told_to_do_nothing_is_refused(run, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(ExportError, match="WANDB_MODE=disabled writes nothing"):
        export_run(run, "wandb", tmp_path)


def test_what_a_run_writes_meanwhile_is_not_part_of_an_export(tmp_path, monkeypatch):
    "Neither of what is written, nor counted, nor compared."
    write(tmp_path, a_run())
    write_csv = room._write_csv

    def slowly(rows, file):
        write(tmp_path, [scalar_record("0f3a" * 8, step, "train", "loss", 1.0) for step in range(51, 60)])
        write_csv(rows, file)

    monkeypatch.setitem(room.TARGETS, "csv", replace(room.TARGETS["csv"], write=partial(room._to_file, slowly)))
    report = export_run(tmp_path, "csv", check=True)
    assert report.written == report.checked == WRITTEN and report.exit_code == 0


def test_of_runs_that_share_a_file_each_folder_shows_its_own(tmp_path):
    shared = tmp_path / "m.ndjson"
    for name, run_id in (("a", "0a" * 16), ("b", "0b" * 16)):
        (tmp_path / name).mkdir()
        recorded = {"run_id": run_id, "values": {"metrics_out": {"value": str(shared)}}}
        (tmp_path / name / "config.resolved.json").write_text(json.dumps(recorded))
        writer = NdjsonWriter(shared)
        writer.emit(event_record(run_id, 0, "run_start"))
        for step in range(1, 4):
            writer.emit(scalar_record(run_id, step, "train", "loss", step + (name == "b")))
        writer.close()
    for name, run_id in (("a", "0a" * 16), ("b", "0b" * 16)):
        view = open_run(tmp_path / name)
        assert view.run_id == run_id and view.series["train", "loss", None].values[-1] == 3 + (name == "b")
        assert export_run(tmp_path / name, "csv", check=True).run_id == run_id
    assert open_run(shared).run_id == "0b" * 16  # of a file, the one that began last
