"""What can go wrong around a run, row by row: by default it warns and goes on, with checkpoint.strict it stops and says what to do."""

import errno
import gc
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from runs import Augmented, Net, StopAt
from torch import nn
from torch.utils.data import Dataset

from codex_ml import durable, run_folder
from codex_ml.checkpoint import CheckpointError, list_checkpoints, load_checkpoint
from codex_ml.config import ConfigError
from codex_ml.durable import StorageError
from codex_ml.loop import NonFiniteLoss
from codex_ml.run_folder import FolderInUse, FolderLock
from codex_ml.train_loop import run_training


def train(folder, **keywords):
    options = {"model": lambda: Net(0.2), "data": Augmented("plain"), "epochs": 3, "batch_size": 8, "grad_accum": 2, "learning_rate": 0.01,
               "threads": 1, "progress": "off", "resume": True, "checkpoint_dir": folder}
    return run_training(**options | keywords)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of three epochs, to be copied; and the hash of one of four."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder / "run")
    return folder / "run", train(folder / "longer", epochs=4)["checkpoint_sha256_last"]


@pytest.fixture
def run(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def four(whole):
    return whole[1]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def names(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith(("epoch-", "step-", "aside-", ".t")))


def records(caplog):
    return "\n".join(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)


def steps(run_dir):
    return [n for n in names(run_dir) if n.startswith("step-")]


# ---- the pointer


@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("content", (None, b"", b"{", b'{"path": "../x"}', b'{"path": "epoch-0003", "path": "epoch-0001"}'))
@pytest.mark.parametrize("backup", (True, False))
def test_broken_pointers_cost_a_warning(run, four, caplog, strict, content, backup):
    for name in ("latest.json",) if backup else ("latest.json", "latest.json.bak"):
        (run / name).unlink()
        if content is not None:
            (run / name).write_bytes(content)
    result = train(run, epochs=4, checkpoint_strict=strict)
    assert result["resumed_from_epoch"] == 3 and result["checkpoint_sha256_last"] == four
    assert "latest.json" in records(caplog) and any("latest.json" in p for p in result["resume_meta"]["problems"])
    assert json.loads((run / "latest.json").read_text())["path"] == "epoch-0004"
    assert names(run) == ["epoch-0001", "epoch-0002", "epoch-0003", "epoch-0004"]


# ---- checkpoints


def lose(folder):
    shutil.rmtree(folder)


SPOILT = {"changed": lambda folder: flip(folder / "checkpoint.pt"), "truncated": lambda folder: os.truncate(folder / "checkpoint.pt", 500),
          "no file": lambda folder: (folder / "checkpoint.pt").unlink(), "no metadata": lambda folder: (folder / "metadata.json").unlink(),
          "missing": lose}


@pytest.mark.parametrize("how", SPOILT)
def test_a_bad_checkpoint_sends_the_run_to_the_one_before(run, four, caplog, how):
    SPOILT[how](run / "epoch-0003")
    result = train(run, epochs=4)
    assert result["resumed_from_epoch"] == 2 and result["checkpoint_sha256_last"] == four
    assert "epoch-0003" in records(caplog)
    if how in ("changed", "truncated"):
        assert records(caplog).count("SHA-256") == 1 and json.loads((run / "epoch-0003" / "metadata.json").read_text())[
            "checkpoint_sha256"] in records(caplog)
    if how != "missing":
        assert names(run / "aside-0001") == ["epoch-0003"]


@pytest.mark.parametrize("how", SPOILT)
def test_strict_stops_at_a_bad_checkpoint(run, four, how):
    SPOILT[how](run / "epoch-0003")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(CheckpointError, match=r"epoch-0003.*newest good checkpoint is epoch-0002.*checkpoint\.strict=false"):
        train(run, epochs=4, checkpoint_strict=True)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"} == before  # nothing was touched
    assert train(run, epochs=4, checkpoint_strict=False)["checkpoint_sha256_last"] == four  # the command that it named


def test_nothing_verifies(run, four, caplog):
    for epoch in (1, 2, 3):
        flip(run / f"epoch-000{epoch}" / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"None of the 3 checkpoints .* verifies.*checkpoint\.resume=false"):
        train(run, epochs=4, checkpoint_strict=True)
    assert names(run) == ["epoch-0001", "epoch-0002", "epoch-0003"]
    result = train(run, epochs=4)
    assert not result["resumed"] and result["start_epoch"] == 1 and result["checkpoint_sha256_last"] == four
    assert records(caplog).count("SHA-256") == 3 and "aside-0001" in records(caplog)
    assert set(names(run / "aside-0001")) == {"epoch-0001", "epoch-0002", "epoch-0003"}
    assert (run / "aside-0001" / "latest.json").exists()


def test_every_checkpoint_but_the_pointer_is_gone(run, caplog):
    for epoch in (1, 2, 3):
        lose(run / f"epoch-000{epoch}")
    with pytest.raises(CheckpointError, match="names epoch-0003, which is not there"):
        train(run, checkpoint_strict=True)
    assert train(run)["start_epoch"] == 1 and "names epoch-0003, which is not there" in records(caplog)


@pytest.mark.parametrize("strict", (False, True))
def test_a_first_run_with_resume_has_nothing_to_warn_of(tmp_path, caplog, strict):
    result = train(tmp_path / "new", epochs=1, checkpoint_strict=strict)
    assert not result["resumed"] and result["resume_meta"]["problems"] == [] and records(caplog) == ""


# ---- another model or optimizer


class Other(Net):
    def __init__(self):
        super().__init__(0.2)
        self.layers[4] = nn.Linear(16, 5)


def test_another_model_is_told_by_names_and_shapes_and_nothing_is_restored(run, caplog):
    first = train(run.parent / "untouched", model=Other, epochs=1)
    result = train(run, model=Other, epochs=1)
    assert result["checkpoint_sha256_last"] == first["checkpoint_sha256_last"]  # its weights had not seen the other's
    assert not result["resumed"] and result["resume_meta"]["model_state_loaded"] is False
    assert "layers.4.weight: (3, 16) float32 in the checkpoint, (5, 16) float32 now" in records(caplog)
    assert set(names(run / "aside-0001")) == {"epoch-0001", "epoch-0002", "epoch-0003"}


@pytest.mark.parametrize("change", ({"model": Other}, {"optimizer": "sgd"}, {"model": lambda: nn.Linear(6, 3)}))
def test_another_model_or_optimizer_with_strict(run, change):
    with pytest.raises(CheckpointError, match=r"of another model or optimizer: .*checkpoint\.resume=false"):
        train(run, checkpoint_strict=True, epochs=4, **change)
    assert names(run) == ["epoch-0001", "epoch-0002", "epoch-0003"]


def test_a_live_model_is_untouched_by_a_checkpoint_of_another(run):
    model = Other()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        train(run, model=model, checkpoint_strict=True, epochs=4)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


# ---- drift


def test_drift_is_an_error_with_three_columns(run, four):
    with pytest.raises(CheckpointError) as caught:
        train(run, epochs=4, batch_size=4, learning_rate=0.02, scheduler_cfg={"type": "linear"})
    rows = [line.split() for line in str(caught.value).splitlines()[1:-1]]
    assert rows[0] == "key the run has asked for now".split()
    assert ["batch_size", "8", "4"] in rows and ["learning_rate", "0.01", "0.02"] in rows
    assert ["scheduler.type", '"constant"', '"linear"'] in rows
    assert "checkpoint.allow_drift=true" in str(caught.value)
    assert train(run, epochs=4)["checkpoint_sha256_last"] == four  # nothing was spoilt


def test_data_that_changed_is_drift(run):
    data = Augmented("plain")
    data.x[3, 2] += 1
    x, y = data.x, data.y
    train(run.parent / "tensors", data=(Augmented("plain").x, y), epochs=1)
    with pytest.raises(CheckpointError, match=r"\n  data "):
        train(run.parent / "tensors", data=(x, y), epochs=2)


def test_drift_that_is_allowed_takes_effect(run, caplog):
    result = train(run, epochs=4, learning_rate=0.5, checkpoint_allow_drift=True)
    assert result["resumed_from_epoch"] == 3 and result["learning_rate_history"] == [[0.01], [0.01], [0.01], [0.5]]
    assert ["learning_rate", 0.01, 0.5] in [list(row) for row in result["resume_meta"]["drift"]]
    assert "as allowed" in records(caplog)
    again = train(run, epochs=5, learning_rate=0.5)  # from now on the new values are the run's own
    assert again["resume_meta"]["drift"] == [] and again["learning_rate_history"][-1] == [0.5]


def test_harmless_keys_go_on(run, four):
    result = train(run, epochs=4, metrics_out=None, log_every_steps=1, retention_policy={"keep_last": 2}, checkpoint_every_steps=2,
                   checkpoint_strict=True, num_workers=1)
    assert result["resumed"] and result["resume_meta"]["drift"] == [] and result["checkpoint_sha256_last"] == four


def test_a_lost_record_of_the_configuration_does_no_harm(run, four):
    for name in ("config.resolved.json", "config.snapshot.json"):
        (run / name).write_bytes(b"\xff\xfe{")
    assert train(run, epochs=4)["checkpoint_sha256_last"] == four
    assert (run / "config.snapshot.0001.json").read_bytes() == b"\xff\xfe{"
    assert json.loads((run / "config.resolved.json").read_text())["values"]["epochs"]["value"] == 4


def test_drift_is_seen_although_the_record_is_lost(run):
    (run / "config.resolved.json").unlink()
    with pytest.raises(CheckpointError, match="another configuration"):
        train(run, epochs=4, batch_size=4)


# ---- the disk


def test_a_disk_that_is_too_small_is_told_before_the_first_step(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StorageError, match=r"needs about [0-9,]+ bytes, and 1,000 are free") as caught:
        train(tmp_path, callbacks=[StopAt(1)])
    assert caught.value.errno == errno.ENOSPC and names(tmp_path) == []


class FailingWrites:
    def __init__(self, fail_after):
        self.left = fail_after

    def __getattr__(self, name):
        return getattr(os, name)

    def write(self, fd, data):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(fd, data)


def test_a_disk_that_fills_up_while_saving(tmp_path, whole, monkeypatch):
    class Fill:
        def on_epoch_start(self, epoch, state):
            if epoch == 3:
                monkeypatch.setattr(durable, "os", FailingWrites(11))

    with pytest.raises(StorageError, match=r"cannot write .*epoch-0003.*No space left.*needed [0-9,]+ bytes.*bytes are free"):
        train(tmp_path, callbacks=[Fill()])
    monkeypatch.undo()
    assert names(tmp_path) == ["epoch-0001", "epoch-0002"] and json.loads((tmp_path / "latest.json").read_text())["epoch"] == 2
    result = train(tmp_path)  # as the message says
    assert result["resumed_from_epoch"] == 2 and result["checkpoint_sha256_last"] == list_checkpoints(whole[0])[0].sha256


def test_the_folder_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(StorageError, match="Choose another checkpoint.dir"):
            train(folder)
    assert (tmp_path / "file").read_text() == "x"


def test_retention_that_cannot_delete_warns_and_tries_again(tmp_path, monkeypatch, caplog):
    from codex_ml.utils import retention

    def refuse(folder):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(retention, "remove_folder", refuse)
    result = train(tmp_path, retention_policy={"keep_last": 1})
    assert result["status"] == "completed" and result["retention_last"]["failed"] and "Operation not permitted" in records(caplog)
    assert names(tmp_path) == ["epoch-0001", "epoch-0002", "epoch-0003"]
    monkeypatch.undo()
    train(tmp_path, epochs=4, retention_policy={"keep_last": 1})
    assert "epoch-0004" in names(tmp_path) and len(names(tmp_path)) <= 2  # the best may be an older one


# ---- two runs


def test_two_runs_in_one_folder(run, four):
    with FolderLock(run), pytest.raises(FolderInUse, match=rf"in use by another run \(pid {os.getpid()}\).*kill {os.getpid()}"):
        train(run, epochs=4)
    assert names(run) == ["epoch-0001", "epoch-0002", "epoch-0003"]
    assert train(run, epochs=4)["checkpoint_sha256_last"] == four


def test_a_run_inside_a_run(tmp_path):
    class Second:
        error = None

        def on_epoch_end(self, epoch, metrics, state):
            try:
                train(tmp_path, epochs=1)
            except FolderInUse as error:
                self.error = error

    second = Second()
    train(tmp_path, epochs=1, callbacks=[second])
    assert second.error is not None


def test_leftovers_of_a_killed_process_are_swept(run, four):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    (run / f".tmp-{pid}-0-epoch-0004").mkdir()
    (run / f".tmp-{pid}-0-epoch-0004" / "checkpoint.pt").write_bytes(b"half")
    (run / f".trash-{pid}-1-epoch-0001").mkdir()
    assert train(run, epochs=4)["checkpoint_sha256_last"] == four
    assert names(run) == ["epoch-0001", "epoch-0002", "epoch-0003", "epoch-0004"]


def test_a_pruned_folder_that_a_crash_left_half_deleted_is_no_checkpoint(run, four):
    os.rename(run / "epoch-0001", run / ".trash-1-0-epoch-0001")
    (run / "epoch-0004").mkdir()  # an empty folder of a foreign hand
    result = train(run, epochs=4)
    assert result["checkpoint_sha256_last"] == four and names(run / "aside-0001") == ["epoch-0004"]


# ---- losses that are not finite


class Poison:
    """A loss that is NaN in one step."""

    def __init__(self, step, value=float("nan")):
        self.step, self.value, self.count = step, value, 0

    def __call__(self, model, batch):
        self.count += 1
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        return loss * self.value if self.count == self.step else loss


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, whole, value):
    models = []
    with pytest.raises(NonFiniteLoss, match=r"the loss is (nan|inf) in epoch 2, step 3.*grad_clip=1.*on_nan=warn"):
        train(tmp_path, loss_fn=Poison(9, value), model=lambda: models.append(Net(0.2)) or models[-1])
    assert all(torch.isfinite(t).all() for t in models[0].state_dict().values())
    assert names(tmp_path) == ["epoch-0001"]
    assert train(tmp_path)["checkpoint_sha256_last"] == list_checkpoints(whole[0])[0].sha256


@pytest.mark.parametrize("policy", ("warn", "ignore"))
def test_on_nan_warn_and_ignore_go_on(tmp_path, caplog, policy):
    result = train(tmp_path, loss_fn=Poison(9), on_nan=policy)
    assert result["status"] == "completed" and result["global_step"] == 18
    assert records(caplog).count("the loss is nan in epoch 2, step 3") == (policy == "warn")
    metadata = json.loads((tmp_path / "epoch-0002" / "metadata.json").read_text())
    assert metadata["avg_loss"] == "NaN"
    state = load_checkpoint(list_checkpoints(tmp_path)[1])
    assert torch.isnan(state["model"]["layers.0.weight"]).all()  # the test would show nothing if the step had been skipped
    assert train(tmp_path, loss_fn=Poison(0), on_nan=policy, epochs=4)["resumed_from_epoch"] == 3


# ---- beginning anew


def test_a_fresh_start_moves_the_earlier_run_aside(run):
    before = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    result = train(run, epochs=1, resume=False, run_config={"name": "second"})
    assert result["resume_meta"]["moved_aside"] == "aside-0001" and names(run) == ["aside-0001", "epoch-0001"]
    aside = run / "aside-0001"
    assert {p.relative_to(aside): p.read_bytes() for p in aside.rglob("*") if p.is_file()} == before
    third = train(run, epochs=1, resume=False)
    assert third["resume_meta"]["moved_aside"] == "aside-0002" and names(run) == ["aside-0001", "aside-0002", "epoch-0001"]
    assert third["checkpoint_sha256_last"] == result["checkpoint_sha256_last"]
    moved = train(run / "aside-0001", epochs=4)  # the earlier run can go on where it is
    assert moved["resumed_from_epoch"] == 3


def test_other_snapshots_are_kept_under_numbers(tmp_path):
    configs = [{"note": n} for n in ("first", "second", "second", "third")]
    for epochs, config in enumerate(configs, 1):
        train(tmp_path, epochs=epochs, run_config=config)
    read = {p.name: json.loads(p.read_text()) for p in tmp_path.glob("config.snapshot*")}
    assert read == {"config.snapshot.json": configs[3], "config.snapshot.0001.json": configs[0], "config.snapshot.0002.json": configs[1]}
    (tmp_path / "config.snapshot.0001.json").unlink()
    train(tmp_path, epochs=5, run_config={"note": "fourth"})
    assert json.loads((tmp_path / "config.snapshot.0002.json").read_text()) == configs[1]  # a gap does not make it overwrite
    assert json.loads((tmp_path / "config.snapshot.0003.json").read_text()) == configs[3]


def test_a_snapshot_is_verbatim(tmp_path):
    config = {"z": 1, "a": [1, {"ü": None}], "epochs": 1, "learning_rate": 1e-3}
    train(tmp_path, epochs=1, run_config=config)
    text = (tmp_path / "config.snapshot.json").read_text()
    assert json.loads(text) == config and list(json.loads(text)) == list(config)


# ---- code of the user's that raises


class Raising:
    def __init__(self, event):
        self.event = event

    def __getattr__(self, name):
        if name != self.event:
            raise AttributeError(name)

        def method(*arguments):
            raise ZeroDivisionError("oh")

        return method


@pytest.mark.parametrize("event", ("on_train_start", "on_epoch_start", "on_step_end", "on_epoch_end", "on_train_end"))
def test_a_callback_that_raises_is_recorded_and_changes_nothing(tmp_path, whole, caplog, event):
    result = train(tmp_path, callbacks=[Raising(event)])
    assert result["status"] == "completed" and result["checkpoint_sha256_last"] == list_checkpoints(whole[0])[0].sha256
    times = {"on_step_end": 18, "on_train_start": 1, "on_train_end": 1}.get(event, 3)
    assert len(result["callback_errors"]) == times
    assert result["callback_errors"][0] | {"epoch": 0, "global_step": 0} == {
        "callback": "Raising", "event": event, "epoch": 0, "global_step": 0, "error": "ZeroDivisionError: oh"}
    assert records(caplog).count("raised in") == 1


def test_a_callback_that_draws_changes_nothing(tmp_path, whole):
    class Drawing:
        def on_step_end(self, step, state):
            torch.rand(3), np.random.rand(), random.random()

        def on_epoch_start(self, epoch, state):
            torch.manual_seed(99), random.seed(99), np.random.seed(99)

    assert train(tmp_path, callbacks=[Drawing()])["checkpoint_sha256_last"] == list_checkpoints(whole[0])[0].sha256


def test_an_object_that_is_no_callback_is_refused(tmp_path):
    with pytest.raises(TypeError, match="on_train_start, on_epoch_start"):
        train(tmp_path / "run", callbacks=[print])
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_raises_loses_no_work_of_the_epoch(tmp_path, whole):
    def evaluate(epoch, state):
        if epoch == 2:
            raise ZeroDivisionError
        return {}

    with pytest.raises(ZeroDivisionError):
        train(tmp_path, eval_fn=evaluate)
    assert names(tmp_path) == ["epoch-0001", "step-00000012"]
    result = train(tmp_path, eval_fn=lambda epoch, state: {})
    assert result["total_steps"] == 6 and result["final_epoch"] == 3
    expected = train(tmp_path / "other", eval_fn=lambda epoch, state: {})
    assert result["checkpoint_sha256_last"] == expected["checkpoint_sha256_last"] == list_checkpoints(whole[0])[0].sha256


class Fragile(Augmented):
    """Raises at the n-th sample that is asked for, in the process that has the flag."""

    def __init__(self, fail_at=None, action=None):
        super().__init__("torch")
        self.fail_at, self.action, self.count = fail_at, action, 0

    def __getitem__(self, i):
        self.count += 1
        if self.count == self.fail_at:
            self.action()
        return super().__getitem__(i)


def cannot_read():
    raise OSError(errno.EIO, "a sample that cannot be read")


def kill_me():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def fragile(tmp_path_factory):
    return train(tmp_path_factory.mktemp("fragile"), data=Fragile())["checkpoint_sha256_last"]


@pytest.mark.parametrize("workers", (0, 1, 2))
def test_a_dataset_that_raises_in_the_middle(tmp_path, fragile, workers):
    with pytest.raises(OSError, match="a sample that cannot be read"):
        train(tmp_path, data=Fragile(60, cannot_read), num_workers=workers)
    assert len(steps(tmp_path)) == 1
    if workers == 0:
        assert names(tmp_path) == ["epoch-0001", "step-00000007"]
    result = train(tmp_path, data=Fragile(), num_workers=workers)
    assert result["resumed"] and result["checkpoint_sha256_last"] == fragile


@pytest.mark.parametrize("workers", (1, 2))
def test_a_loader_worker_that_is_killed(tmp_path, fragile, workers):
    # in a child: torch's SIGCHLD handler raises wherever the process stands, be it in the test runner
    child = f"from test_failures import *; train({str(tmp_path)!r}, data=Fragile(60, kill_me), num_workers={workers})"
    done = subprocess.run([sys.executable, "-c", child], cwd=os.path.dirname(__file__), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "DataLoader worker" in done.stderr
    assert "epoch-0001" in names(tmp_path)
    with FolderLock(tmp_path):  # no worker that is left over holds it
        pass
    assert train(tmp_path, data=Fragile(), num_workers=workers)["checkpoint_sha256_last"] == fragile


def test_a_model_that_raises_in_the_middle(tmp_path, whole):
    class Breaking(Net):
        count = 0

        def forward(self, x):
            Breaking.count += 1
            if Breaking.count == 10:
                raise RuntimeError("out of memory, say")
            return super().forward(x)

    with pytest.raises(RuntimeError, match="out of memory, say"):
        train(tmp_path, model=lambda: Breaking(0.2))
    assert train(tmp_path)["checkpoint_sha256_last"] == list_checkpoints(whole[0])[0].sha256


def test_an_iterable_that_raises_in_the_middle(tmp_path):
    class Batches:
        fail = True

        def __iter__(self):
            for i in range(5):
                if self.fail and i == 3 and (tmp_path / "run" / "epoch-0001").exists():
                    raise OSError("the source is gone")
                yield torch.randn(4, 6), torch.randint(0, 3, (4,))

    class Steady(Batches):
        fail = False

    with pytest.raises(OSError, match="the source is gone"):
        train(tmp_path / "run", data=Batches())
    assert steps(tmp_path / "run")
    result = train(tmp_path / "run", data=Steady(), checkpoint_allow_drift=True)
    assert result["checkpoint_sha256_last"] == train(tmp_path / "whole", data=Steady())["checkpoint_sha256_last"]


# ---- the caller's surroundings


def surroundings():
    gc.collect()  # what earlier tests left in cycles: files of loaders, their threads
    return {"threads": torch.get_num_threads(), "int": signal.getsignal(signal.SIGINT), "term": signal.getsignal(signal.SIGTERM),
            "deterministic": torch.are_deterministic_algorithms_enabled(), "warn": torch.is_deterministic_algorithms_warn_only_enabled(),
            "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark), "env": dict(os.environ), "cwd": os.getcwd(),
            "torch": torch.get_rng_state().tolist(), "random": random.getstate(), "numpy": str(np.random.get_state()),
            "handlers": list(logging.getLogger("codex_ml").handlers), "running": threading.active_count(),
            "crc": torch.serialization.get_crc32_options(), "dtype": torch.get_default_dtype(), "grad": torch.is_grad_enabled(),
            "files": sorted(os.listdir("/proc/self/fd"))}


ENDINGS = {
    "completed": {"reproducibility_strict": False}, "stopped": {"callbacks": [StopAt(7)]}, "with workers": {"num_workers": 2},
    "without a folder": {"checkpoint_dir": None}, "an error in the data": {"data": Fragile(60, cannot_read)}, "nan": {"loss_fn": Poison(9)},
    "unknown model": {"model": "nope"}, "a wrong value": {"batch_size": 0}, "a folder that is a file": {"checkpoint_dir": __file__},
    "no such device": {"device": "cuda:99"},
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_callers_surroundings_are_as_they_were(tmp_path, monkeypatch, ending):
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "warm", epochs=1, num_workers=2, threads=2)  # torch starts threads of its own once
    random.random(), np.random.rand(), torch.rand(3)
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        before = surroundings()
        try:
            train(**{"folder": tmp_path / "run"} | {"deterministic_cudnn": True, "reproducibility_strict": True, "threads": 2,
                                                    "resume": False} | ENDINGS[ending])
        except (OSError, NonFiniteLoss, LookupError, ConfigError):
            pass
        deadline = time.monotonic() + 10
        while (after := surroundings())["running"] > before["running"] and time.monotonic() < deadline:
            time.sleep(0.05)  # a thread of torch's loader is on its way out
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert after.pop("running") <= before.pop("running") and set(after.pop("files")) <= set(before.pop("files"))  # nothing is left over
    assert [name for name in before if before[name] != after[name]] == []
    assert not run_folder._locked


def test_the_run_does_not_depend_on_the_callers_state(tmp_path, whole):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    torch.set_num_threads(2)
    try:
        assert train(tmp_path)["checkpoint_sha256_last"] == list_checkpoints(whole[0])[0].sha256
    finally:
        torch.set_num_threads(1)


def test_a_thread_count_is_kept_over_a_resume(tmp_path, caplog):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        train(tmp_path, threads=None, epochs=1)
        torch.set_num_threads(2)
        result = train(tmp_path, threads=None, epochs=2)
        assert result["resumed"] and "using 1 threads" in records(caplog) and torch.get_num_threads() == 2
        with pytest.raises(CheckpointError, match="threads"):
            train(tmp_path, threads=2, epochs=3)
    finally:
        torch.set_num_threads(before)


def test_training_in_another_thread(tmp_path, whole):
    """Where Python takes no signals, as in a server."""
    results = []
    thread = threading.Thread(target=lambda: results.append(train(tmp_path)))
    thread.start()
    thread.join()
    assert results[0]["checkpoint_sha256_last"] == list_checkpoints(whole[0])[0].sha256


# ---- signals, in this process


class Signal:
    def __init__(self, number, step, times=1):
        self.number, self.step, self.times = number, step, times

    def on_step_end(self, step, state):
        if step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def test_an_interrupt_saves_and_returns(tmp_path, whole):
    result = train(tmp_path, callbacks=[Signal(signal.SIGINT, 9)])
    assert result["status"] == "interrupted" and result["checkpoint_last"] == "step-00000009"
    resumed = train(tmp_path)
    assert resumed["checkpoint_sha256_last"] == list_checkpoints(whole[0])[0].sha256 and resumed.keys() == result.keys()


def test_sigterm_saves_and_exits_with_143(tmp_path, whole):
    with pytest.raises(SystemExit) as caught:
        train(tmp_path, callbacks=[Signal(signal.SIGTERM, 9)])
    assert caught.value.code == 143 and names(tmp_path) == ["epoch-0001", "step-00000009"]
    assert train(tmp_path)["checkpoint_sha256_last"] == list_checkpoints(whole[0])[0].sha256


@pytest.mark.parametrize(("number", "error"), ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)))
def test_a_second_signal_stops_at_once(tmp_path, whole, number, error):
    with pytest.raises(error):
        train(tmp_path, callbacks=[Signal(number, 9, times=2)])
    assert names(tmp_path) == ["epoch-0001"]
    assert train(tmp_path)["checkpoint_sha256_last"] == list_checkpoints(whole[0])[0].sha256


def test_an_interrupt_in_an_evaluation_or_at_an_epochs_end(tmp_path, whole):
    def evaluate(epoch, state):
        if epoch == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return {}

    result = train(tmp_path, eval_fn=evaluate)
    assert result["status"] == "interrupted" and result["checkpoint_last"] == "epoch-0002" and result["final_epoch"] == 2
    assert train(tmp_path)["checkpoint_sha256_last"] == list_checkpoints(whole[0])[0].sha256


def test_an_interrupt_of_a_run_that_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(None, callbacks=[Signal(signal.SIGINT, 9)])
    assert result["status"] == "interrupted" and result["checkpoint_last"] is None and result["global_step"] == 9


# ---- telemetry


def test_metrics_that_cannot_be_written_do_not_stop_a_run(tmp_path, whole, caplog):
    (tmp_path / "file").touch()
    result = train(tmp_path / "run", metrics_out=str(tmp_path / "file" / "metrics.ndjson"))
    assert result["status"] == "completed" and result["checkpoint_sha256_last"] == list_checkpoints(whole[0])[0].sha256
    assert result["sink_errors"] and records(caplog)


def test_the_retention_report_is_in_the_result(tmp_path):
    result = train(tmp_path, epochs=6, retention_policy={"keep_last": 1, "keep_every": 3})
    assert {"epoch-0003", "epoch-0006"} <= set(names(tmp_path))
    assert result["retention_last"]["protected_latest"] == "epoch-0006"


class Huge(Dataset):
    """Records which samples it is asked for."""

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 10**9

    def __getitem__(self, i):
        self.asked.append(i)
        return torch.full((6,), (i % 7) / 7), torch.tensor(i % 3)


def test_a_resume_asks_for_no_sample_twice(tmp_path):
    whole, parts = Huge(), Huge()
    train(tmp_path / "whole", data=whole, steps_per_epoch=5, epochs=2)
    for callbacks in ([StopAt(7)], []):
        train(tmp_path / "parts", data=parts, steps_per_epoch=5, epochs=2, callbacks=callbacks)
    assert parts.asked == whole.asked and len(set(whole.asked)) == 80


def test_a_change_of_the_validation_data_alone_is_told(tmp_path, caplog):
    """The model's bits do not depend on it, so the run goes on; its losses do."""
    from codex_ml.train_loop import run_training

    text, folder = "".join(f"{i} and {i % 7} make {i + i % 7}\n" for i in range(400)), tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text(text)
    job = {"model": "tiny", "data": folder, "block_size": 16, "steps_per_epoch": 3, "progress": "off", "threads": 1,
           "checkpoint_dir": tmp_path / "run", "resume": True}
    run_training(**job, epochs=1)
    with caplog.at_level("WARNING", "codex_ml"):
        assert run_training(**job, epochs=2)["resume_meta"]["problems"] == [] and not caplog.records
        (folder / "a.txt").write_text(text + "x\n")
        result = run_training(**job, epochs=3)
    [problem] = result["resume_meta"]["problems"]
    assert result["resumed_from_epoch"] == 2 and "the validation data are not those of the checkpoint" in problem
    assert [record.getMessage() for record in caplog.records] == [problem]
