"""Watching changes nothing: whatever becomes of a sink, the bits are those of an unwatched run, and the run ends."""

import contextlib
import importlib
import logging
import sqlite3
import sys
import time

import psutil
import pytest
import torch

from codex_ml.telemetry.mlflow import open_store
from codex_ml.telemetry.ndjson import read_ndjson
from codex_ml.train_loop import run_training

X = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()
ALL = {"tensorboard": True, "wandb_enable": True, "mlflow_enable": True, "system_metrics_interval": 0.02, "histogram_every_steps": 4,
       "monitoring_alerts": {"nan": True, "spike": True}, "monitoring_system_metrics_extended": True}
# the class whose `emit` a record goes through, and the package that it cannot do without
SINKS = {
    "ndjson": ("codex_ml.telemetry.ndjson", "NdjsonWriter", None), "alerts": ("codex_ml.telemetry.alerts", "Alerts", None),
    "tensorboard": ("codex_ml.telemetry.tensorboard", "TensorBoardSink", "tensorboard"),
    "wandb": ("codex_ml.telemetry.wandb", "WandbSink", "wandb"), "mlflow": ("codex_ml.telemetry.mlflow", "MlflowSink", "mlflow"),
}
pytestmark = pytest.mark.slow


class Clock:
    """The moment of the last step."""

    def on_step_end(self, step, state):
        self.last = time.monotonic()


class UntilBroken:
    """The second epoch begins when the sink has been called, however long it takes to come up."""

    def __init__(self, marks, count):
        self.marks, self.count = marks, count

    def on_epoch_start(self, epoch, state):
        deadline = time.monotonic() + 90 * (state.global_step > 0)
        while self.marks.stat().st_size < self.count and time.monotonic() < deadline:
            time.sleep(0.05)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One store for all runs, since to make one takes seconds."""
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("mlflow")
    open_store(folder)
    return folder


def train(folder, callbacks=(), **options):
    return run_training(model_name="mlp", model_args={"dropout": 0.2}, data=(X, Y), eval_data=(X[:8], Y[:8]), batch_size=8, epochs=2,
                        threads=1, grad_accum=2, checkpoint_dir=folder, progress="off", log_every_steps=1, callbacks=callbacks, **options)


@pytest.fixture(scope="module")
def unwatched(tmp_path_factory):
    result = train(tmp_path_factory.mktemp("unwatched"), metrics_out=None, system_metrics_interval=0)
    return result["checkpoint_sha256_last"]


class Waits:
    """Training begins when MLflow has the run, however slow the machine is."""

    def __init__(self, store):
        self.store = store

    def runs(self):
        with contextlib.closing(sqlite3.connect(self.store / "mlflow.db", timeout=20)) as store:
            return store.execute("SELECT count(*) FROM runs").fetchone()[0]

    def on_train_start(self, state):
        before, deadline = self.runs(), time.monotonic() + 90
        while self.runs() == before and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(3)  # it goes through the configuration


def test_all_sinks(tmp_path, unwatched, store):
    result = train(tmp_path, callbacks=[Waits(store)], mlflow_dir=str(store), **ALL | {"system_metrics_interval": 1.0})
    assert result["checkpoint_sha256_last"] == unwatched
    assert result["sink_errors"] == {}
    records = read_ndjson(tmp_path / ".codex" / "metrics.ndjson")[0]
    kinds = {r["$schema"] for r in records}
    assert kinds == {f"codex_ml/{kind}.v1" for kind in ("metrics", "event", "system", "manifest", "step")}
    assert list(tmp_path.glob("tensorboard/events*")) and list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert (store / "mlflow.db").exists()


@pytest.mark.parametrize("name", [name for name, (_, _, package) in SINKS.items() if package] + ["psutil"])
def test_an_absent_package(name, tmp_path, unwatched, store, monkeypatch, caplog):
    package = SINKS[name][2] if name in SINKS else name
    for module in [m for m in sys.modules if m == package or m.startswith(package + ".")]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package, None)
    if name == "psutil":
        for module in [m for m in sys.modules if m.startswith("codex_ml.telemetry.") and hasattr(sys.modules[m], "psutil")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.delitem(sys.modules, "codex_ml.telemetry.system", raising=False)
    wanted = {"tensorboard": {"tensorboard": True}, "wandb": {"wandb_enable": True}, "psutil": {"system_metrics_interval": 0.02},
              "mlflow": {"mlflow_enable": True, "mlflow_dir": str(store)}}[name]
    with caplog.at_level(logging.WARNING, "codex_ml"):
        result = train(tmp_path, **wanted)
    assert result["checkpoint_sha256_last"] == unwatched and result["status"] == "completed"
    assert sum(package in r.getMessage() for r in caplog.records) == 1, caplog.text  # told once
    assert len([r for r in read_ndjson(tmp_path / ".codex" / "metrics.ndjson")[0] if r.get("metric") == "loss"]) == 20


BREAKS = """
import importlib, time

owner = getattr(importlib.import_module({module!r}), {owner!r})
call, count = owner.{method}, 0

def broken(self, *arguments):
    global count
    count += 1
    if count >= {at}:
        with open({marks!r}, "a") as marks:
            marks.write(".")
        {how}
    return call(self, *arguments)

owner.{method} = broken
"""
FAIL, HANG = "raise ConnectionError('nobody answers')", "time.sleep(120)"


@pytest.fixture
def breaks(tmp_path, monkeypatch):
    """`breaks(name, at, how)`: from its `at`-th call on, the sink does that, and leaves a mark in the file returned.

    Those that have a process of their own do so there."""
    def breaks(name, at, how):
        module, owner, package = SINKS[name]
        method = "append" if name == "ndjson" else "emit"
        marks = tmp_path / "marks"
        marks.touch()
        source = BREAKS.format(module=module, owner=owner, method=method, at=at, how=how, marks=str(marks))
        if package is None:
            cls = getattr(importlib.import_module(module), owner)
            monkeypatch.setattr(cls, method, getattr(cls, method))  # to be put back
            exec(source, {})
        else:
            (tmp_path / "path").mkdir()
            (tmp_path / "path" / "sitecustomize.py").write_text(source)
            monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
        return marks

    children = psutil.Process().children(recursive=True)
    yield breaks
    for child in set(psutil.Process().children(recursive=True)) - set(children):  # what hangs
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


@pytest.mark.parametrize("at", [1, 3, 20])
@pytest.mark.parametrize("name", SINKS)
def test_failing_at_a_call(name, at, tmp_path, unwatched, store, breaks, caplog):
    marks = breaks(name, at, FAIL)
    only = {"tensorboard": {"tensorboard": True}, "wandb": {"wandb_enable": True}, "ndjson": {},
            "mlflow": {"mlflow_enable": True, "mlflow_dir": str(store)}, "alerts": {"monitoring_alerts": {"nan": True}}}[name]
    with caplog.at_level(logging.WARNING, "codex_ml"):
        result = train(tmp_path / "run", callbacks=[UntilBroken(marks, 2)], **only)
    assert result["checkpoint_sha256_last"] == unwatched and result["sink_errors"][name] > 1
    assert sum("nobody answers" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("name", [name for name in SINKS if name != "ndjson"])
def test_hanging_for_ever(name, at, tmp_path, unwatched, store, breaks, caplog):
    clock = Clock()
    marks = breaks(name, at, HANG)
    with caplog.at_level(logging.WARNING, "codex_ml"):
        result = train(tmp_path / "run", callbacks=[clock, UntilBroken(marks, 1)], mlflow_dir=str(store), **ALL)
    took = time.monotonic() - clock.last
    assert result["checkpoint_sha256_last"] == unwatched and result["status"] == "completed"
    told = "was given up" if name == "alerts" else "was not done when the run ended"
    assert took < 5 and f"the sink {name!r} {told}" in caplog.text and result["sink_errors"][name] == 1
    assert len([r for r in read_ndjson(tmp_path / "run" / ".codex" / "metrics.ndjson")[0] if r.get("metric") == "loss"]) == 20
