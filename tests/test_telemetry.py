"""Whole runs, watched and not: whatever becomes of what watches them, the bits are the same and the failure is told once."""

import contextlib
import json
import logging
import os
import resource
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from codex_ml import registry
from codex_ml.telemetry.ndjson import read_ndjson
from codex_ml.train_loop import run_training

X = torch.linspace(-1, 1, 64 * 3).reshape(64, 3)
Y = (X.sum(1) > 0).long()
COLUMNS = ["$schema", "schema_version", "timestamp", "run_id", "step", "split", "metric", "value", "dataset", "tags"]
SCALARS = 2 * (8 * len(["loss", "lr", "step_time", "data_time"]) + len(["epoch_loss"]) + len(["val_loss", "val_accuracy"]))
EVENTS = ["run_start", "checkpoint", "checkpoint", "run_end"]


def train(folder, **options):
    options = {"metrics_out": "m.ndjson", "progress": "off", "log_every_steps": 1, "epochs": 2} | options
    return run_training(model_name="mlp", data=(X, Y), eval_data=(X[:8], Y[:8]), batch_size=8, threads=1, seed=3,
                        checkpoint_dir=folder, **options)


@pytest.fixture(scope="module")
def unwatched(tmp_path_factory):
    return train(tmp_path_factory.mktemp("unwatched"), metrics_out=None)["checkpoint_sha256_last"]


@contextlib.contextmanager
def file_size_limit(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_run_leaves_every_number_it_knows(tmp_path, unwatched):
    result = train(tmp_path)
    assert result["checkpoint_sha256_last"] == unwatched and result["sink_errors"] == {}
    records, torn = read_ndjson(tmp_path / "m.ndjson")
    assert torn == 0 and [r["event"] for r in records if "event" in r] == EVENTS and len({r["run_id"] for r in records}) == 1
    assert records[-1]["data"]["checkpoint_sha256"] == unwatched and records[0]["data"]["config"]["batch_size"] == 8
    records = scalars(records)
    found = {(r["step"], r["split"], r["metric"]): r["value"] for r in records}
    assert len(records) == SCALARS
    assert all(0 <= found[step, "train", "data_time"] < found[step, "train", "step_time"] for step in range(1, 17))
    assert {(step, "train", name) for step in range(1, 17) for name in ("loss", "lr")} <= found.keys()
    assert found[16, "train", "epoch_loss"] == result["loss_history"][-1]
    assert found[16, "validation", "val_loss"] == result["metrics"]["val_loss"]
    for line in (tmp_path / "m.ndjson").read_text().splitlines():
        assert list(json.loads(line)) == COLUMNS or json.loads(line).keys() & {"event", "losses", "system.memory.limit"}


def scalars(records):
    return [r for r in records if "metric" in r]


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "codex_ml" and "failures are told once" in r.getMessage()]


@pytest.mark.parametrize("out", ["a folder", "under a file", "/dev/full", "a link to nowhere"])
def test_a_place_that_takes_no_metrics(out, tmp_path, unwatched, caplog):
    (tmp_path / "a folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "file" / "below")
    out = {"under a file": tmp_path / "file" / "m.ndjson", "a link to nowhere": tmp_path / "link"}.get(out, tmp_path / out)
    result = train(tmp_path / "run", metrics_out=str(out))
    assert result["checkpoint_sha256_last"] == unwatched and result["status"] == "completed"
    lost = result["sink_errors"]["ndjson"]
    assert lost >= SCALARS + len(EVENTS) if out == Path("/dev/full") else lost == 1
    assert len(warnings_of(caplog)) == 1


def test_a_limit_on_the_size_of_the_file_is_met_in_the_middle_of_a_line(tmp_path, caplog):
    "Records are lost from there on; those before stay, and when there is room again the next ones are whole."
    log = tmp_path / "m.ndjson"
    log.write_bytes(b"\n" * 995_000)

    class Callback:
        def on_epoch_end(self, epoch, metrics, state):
            limited.close()

    with contextlib.ExitStack() as limited:
        limited.enter_context(file_size_limit(1_000_000))
        result = train(tmp_path / "run", metrics_out=str(log), callbacks=[Callback()])
    records, torn = read_ndjson(log)
    assert torn == 1 and result["sink_errors"]["ndjson"] > 5 and len(warnings_of(caplog)) == 1 and result["callback_errors"] == []
    assert [r["step"] for r in scalars(records) if r["metric"] == "loss"][-8:] == list(range(9, 17))
    assert scalars(records)[0]["step"] == 1


@pytest.mark.parametrize("method", ["open", "emit", "flush", "close"])
def test_a_registered_sink_that_raises(method, tmp_path, unwatched, monkeypatch, caplog):
    class Broken:
        def __getattr__(self, name):
            def call(*_):
                if name == method:
                    raise ConnectionError("nobody answers")
            return call

    def opener(config, folder, run_id):
        if method == "open":
            raise ConnectionError("nobody answers")
        return Broken()

    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    registry.register("sinks", "broken", opener)
    result = train(tmp_path, monitoring_sinks={"broken": True})
    assert result["checkpoint_sha256_last"] == unwatched and list(result["sink_errors"]) == ["broken"]
    assert len(warnings_of(caplog)) == 1 and len(read_ndjson(tmp_path / "m.ndjson")[0]) > 30


def test_texts_and_odd_values_from_a_callback(tmp_path, unwatched, caplog):
    class Callback:
        def on_epoch_end(self, epoch, metrics, state):
            return {"grade": "good", "nan": float("nan"), "low": -float("inf"), "t": torch.tensor(2), "n": np.float32(0.5), "yes": True}

    result = train(tmp_path, callbacks=[Callback()])
    found = {r["metric"]: r["value"] for r in scalars(read_ndjson(tmp_path / "m.ndjson")[0]) if r["step"] == 16}
    assert result["sink_errors"] == {} and result["callback_errors"] == []
    assert (found["grade"], found["low"], found["t"], found["n"], found["yes"]) == ("good", -float("inf"), 2.0, 0.5, 1.0)
    assert found["nan"] != found["nan"]


RUN = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_telemetry import train
print(train(sys.argv[1], progress=sys.argv[2])["checkpoint_sha256_last"])
"""


@pytest.mark.parametrize("mode", ["live", "lines", "off"])
def test_nobody_hears_the_display(mode, tmp_path, unwatched):
    read, write = os.pipe()
    os.close(read)
    child = subprocess.run([sys.executable, "-c", RUN, tmp_path, mode], stderr=write, stdout=subprocess.PIPE, text=True)
    os.close(write)
    assert child.returncode == 0 and child.stdout.strip() == unwatched


def test_workers_leave_the_parents_sinks_alone(tmp_path):
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, i):
            return X[i], Y[i]

    hashes = []
    for workers in (0, 2):
        result = run_training(model_name="mlp", model_args={"in_features": 3, "out_features": 2}, data=Data(), batch_size=8, epochs=2,
                              threads=1, num_workers=workers, checkpoint_dir=tmp_path / str(workers), progress="off", log_every_steps=1,
                              loss_fn=lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1]))
        records, torn = read_ndjson(tmp_path / str(workers) / ".codex" / "metrics.ndjson")
        assert [r["step"] for r in scalars(records) if r["metric"] == "loss"] == list(range(1, 17)) and torn == 0
        assert result["sink_errors"] == {}
        hashes.append(result["checkpoint_sha256_last"])
    assert hashes[0] == hashes[1]


def test_warnings_are_the_librarys_logger(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="codex_ml"):
        train(None, metrics_out="/dev/full")
    assert len(warnings_of(caplog)) == 1 and "No space left" in warnings_of(caplog)[0]


def test_a_snapshot_has_the_step_that_the_run_has_come_to(tmp_path):
    seen = []

    class Looks:
        def on_step_end(self, step, state):
            time.sleep(0.05)
            seen.append((time.time(), step))

    train(tmp_path, log_every_steps=1000, system_metrics_interval=0.05, callbacks=[Looks()])
    snapshots = [r for r in read_ndjson(tmp_path / "m.ndjson")[0] if r["$schema"] == "codex_ml/system.v1"]
    joined = 0
    for snapshot in snapshots:
        at = datetime.fromisoformat(snapshot["timestamp"]).timestamp()
        done = max((step for when, step in seen if when <= at), default=0)
        assert snapshot["step"] - done in (0, 1)  # the callback hears of a step a moment after it was counted
        joined += 0 < snapshot["step"] < len(seen)
    assert joined > 3


def test_the_start_tells_what_the_manifest_of_a_checkpoint_does(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_SHA", "ab12cd")
    train(tmp_path)
    [start] = [r["data"] for r in read_ndjson(tmp_path / "m.ndjson")[0] if r.get("event") == "run_start"]
    manifest = json.loads((tmp_path / "epoch-0002" / "run_manifest.json").read_text())
    assert start["manifest"]["git_sha"] == "ab12cd" and start["environment"] == manifest["environment"]
    assert {name: value for name, value in manifest.items() if name in start["manifest"]} == start["manifest"]
