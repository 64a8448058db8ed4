"""What a user is promised, each promise by a real run: figures, files, refusals. (The command line: test_cli.)"""

import hashlib
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from codex_ml.checkpoint import CheckpointError, list_checkpoints
from codex_ml.durable import StorageError
from codex_ml.loop import NonFiniteLoss
from codex_ml.run_folder import FolderInUse, RunFolder
from codex_ml.train_loop import run_training

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()
SMALL = {"data": (X, Y), "model": "mlp", "batch_size": 8, "progress": "off", "threads": 1}


def train(folder: Path | None = None, **keywords):
    return run_training(checkpoint_dir=folder, **SMALL | keywords)


# ---- figures


def test_learning_rates_linear_to_zero(tmp_path):
    result = train(tmp_path, epochs=6, learning_rate=0.001, scheduler_cfg={"type": "linear"})
    expected = [[0.001 * (6 - e) / 6] for e in range(6)]
    assert np.allclose(result["learning_rate_history"], expected, atol=1e-7, rtol=0)


def test_current_lrs_of_metadata(tmp_path):
    train(tmp_path, epochs=10, learning_rate=0.001, scheduler_cfg={"type": "linear", "final_lr_scale": 0.3})
    metadata = json.loads((tmp_path / "epoch-0004" / "metadata.json").read_text())
    assert abs(metadata["current_lrs"][0] - 0.00072) < 1e-7 and metadata["learning_rate_history_len"] == 4


def test_history_without_a_scheduler(tmp_path):
    assert train(tmp_path, epochs=2)["learning_rate_history"] == [[0.001], [0.001]]


def test_steps_and_updates():
    result = train(steps_per_epoch=5, grad_accum=2, epochs=2)
    assert (result["optimizer_steps"], result["total_steps"]) == (6, 10)


def test_retention_during_training(tmp_path):
    result = train(tmp_path, epochs=10, retention_policy={"keep_last": 3, "keep_every": 5})
    best = min(range(1, 11), key=lambda e: result["loss_history"][e - 1])
    assert {c.epoch for c in list_checkpoints(tmp_path)} == {5, 8, 9, 10, best}
    assert result["retention_last"]["protected_latest"] == "epoch-0010"


def test_more_epochs_go_on_and_done_is_done(tmp_path):
    train(tmp_path, epochs=3)
    more = train(tmp_path, epochs=5, resume=True)
    assert more["resumed_from_epoch"] == 3 and [p.name for p in sorted(tmp_path.glob("epoch-*"))] == [f"epoch-{e:04d}" for e in range(1, 6)]
    done = train(tmp_path, epochs=5, resume=True)
    assert done["optimizer_steps"] == 0 and done.keys() == more.keys()
    assert done["checkpoint_sha256_last"] == more["checkpoint_sha256_last"] == train(tmp_path / "whole", epochs=5)["checkpoint_sha256_last"]


def test_chain_of_hashes(tmp_path):
    train(tmp_path, epochs=2)
    train(tmp_path, epochs=4, resume=True)
    parent = None
    for checkpoint in reversed(list_checkpoints(tmp_path)):
        assert checkpoint.metadata["parent_checkpoint_sha256"] == parent
        parent = checkpoint.sha256


def test_one_hash_everywhere(tmp_path):
    result = train(tmp_path, epochs=2)
    latest = json.loads((tmp_path / "latest.json").read_text())
    metadata = json.loads((tmp_path / latest["path"] / "metadata.json").read_text())
    found = hashlib.sha256((tmp_path / latest["path"] / "checkpoint.pt").read_bytes()).hexdigest()
    assert latest["checkpoint_sha256"] == metadata["checkpoint_sha256"] == result["checkpoint_sha256_last"] == found


@pytest.mark.parametrize("chunks", (2, 3, 5))
def test_accumulated_chunks_are_the_full_batch(chunks):
    """40 samples: five chunks of 8; with 3 the last window is short, and with batches of 7 so is the last batch."""
    for size in (8, 7):
        def weights(batch_size, grad_accum):
            torch.manual_seed(1)
            model = nn.Linear(4, 2)
            train(model=model, optimizer=torch.optim.SGD, batch_size=batch_size, grad_accum=grad_accum, epochs=2, learning_rate=0.5)
            return model.weight

        assert torch.allclose(weights(size, chunks), weights(size * chunks, 1), atol=1e-6)


# ---- watching changes nothing


def test_folder_display_and_metrics_change_nothing(tmp_path):
    hashes = {train(tmp_path / name, epochs=2, **options)["checkpoint_sha256_last"] for name, options in {
        "a": {}, "b": {"progress": "lines"}, "c": {"progress": "live"}, "d": {"metrics_out": None}, "e": {"log_every_steps": 1},
        "f": {"callbacks": [Draws()]}, "g": {"checkpoint_every_steps": 1}}.items()}
    assert len(hashes) == 1


class Draws:
    """A callback that draws from every generator and raises."""

    def on_step_end(self, step, state):
        random.random(), np.random.rand(), torch.rand(3)
        raise RuntimeError("a plot that broke")


def test_callback_errors_are_recorded(tmp_path):
    errors = train(tmp_path, epochs=1, callbacks=[Draws()])["callback_errors"]
    assert len(errors) == 5 and errors[0] == {"callback": "Draws", "event": "on_step_end", "epoch": 1, "global_step": 1,
                                              "error": "RuntimeError: a plot that broke"}


def test_global_state_is_as_it_was(tmp_path):
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.get_num_threads(), \
        signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), torch.backends.cudnn.benchmark
    train(tmp_path, epochs=1, threads=3, deterministic_cudnn=True, reproducibility_strict=True)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.get_num_threads(),
                      signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), torch.backends.cudnn.benchmark)


# ---- when things go wrong


def test_lost_and_broken_pointers_cost_a_warning(tmp_path, caplog):
    train(tmp_path, epochs=2)
    (tmp_path / "latest.json").write_text("{")
    (tmp_path / "latest.json.bak").unlink()
    result = train(tmp_path, epochs=3, resume=True)
    assert result["resumed_from_epoch"] == 2 and "latest.json" in caplog.text


def test_a_changed_checkpoint_sends_the_run_one_back(tmp_path, caplog):
    whole = train(tmp_path / "whole", epochs=3)
    train(tmp_path / "run", epochs=2)
    path = tmp_path / "run" / "epoch-0002" / "checkpoint.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"newest good checkpoint is epoch-0001.*checkpoint\.strict=false"):
        train(tmp_path / "run", epochs=3, resume=True, checkpoint_strict=True)
    result = train(tmp_path / "run", epochs=3, resume=True)
    assert result["resumed_from_epoch"] == 1 and result["checkpoint_sha256_last"] == whole["checkpoint_sha256_last"]
    assert hashlib.sha256(data).hexdigest() in caplog.text
    assert (tmp_path / "run" / "aside-0001" / "epoch-0002" / "checkpoint.pt").read_bytes() == data


def test_another_model_is_not_restored(tmp_path, caplog):
    train(tmp_path, epochs=1)
    with pytest.raises(CheckpointError, match="of another model"):
        train(tmp_path, epochs=1, resume=True, model_args={"hidden": [5]}, checkpoint_strict=True)
    result = train(tmp_path, epochs=1, resume=True, model_args={"hidden": [5]})
    assert not result["resumed"] and "(64, 4) float32 in the checkpoint, (5, 4) float32 now" in caplog.text
    assert (tmp_path / "aside-0001" / "epoch-0001").is_dir()


def test_drift_is_refused_with_a_table(tmp_path):
    train(tmp_path, epochs=1)
    with pytest.raises(CheckpointError, match=r"(?s)key +the run has +asked for now.*batch_size +8 +4.*allow_drift=true"):
        train(tmp_path, epochs=2, resume=True, batch_size=4)
    result = train(tmp_path, epochs=2, resume=True, batch_size=4, checkpoint_allow_drift=True)
    assert result["resumed_from_epoch"] == 1 and ("batch_size", 8, 4) in result["resume_meta"]["drift"]
    assert train(tmp_path / "b", epochs=1)["status"] == "completed"
    harmless = {"metrics_out": None, "retention_policy": {"keep_last": 9}, "num_workers": 1, "log_every_steps": 3}
    assert train(tmp_path / "b", epochs=2, resume=True, **harmless)["resumed_from_epoch"] == 1


def test_a_loss_that_is_not_finite(tmp_path):
    def broken(model, batch):
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        return loss * float("nan") if broken.calls.append(1) or len(broken.calls) == 7 else loss

    broken.calls = []
    with pytest.raises(NonFiniteLoss, match="epoch 2, step 2"):
        train(tmp_path, epochs=2, loss_fn=broken)
    assert [c.name for c in list_checkpoints(tmp_path)] == ["epoch-0001"]
    broken.calls = []
    assert train(tmp_path / "on", epochs=2, loss_fn=broken, on_nan="ignore")["status"] == "completed"


def test_killed_between_publishing_and_pointing(tmp_path, monkeypatch):
    """The new checkpoint is durable, the pointer and the clean-up never came: the next run makes up for both."""
    class Killed(BaseException):
        pass

    def dies(*arguments):
        raise Killed

    train(tmp_path, epochs=2, checkpoint_every_steps=4)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("codex_ml.run_folder.drop_older_steps", dies)
        train(tmp_path, epochs=3, checkpoint_every_steps=4, resume=True)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("codex_ml.run_folder.write_pointer", dies)
        train(tmp_path, epochs=3, checkpoint_every_steps=4, resume=True)
    result = train(tmp_path, epochs=3, checkpoint_every_steps=4, resume=True, retention_policy={"keep_last": 1})
    latest = json.loads((tmp_path / "latest.json").read_text())
    assert latest["path"] == "epoch-0003" and latest["checkpoint_sha256"] == result["checkpoint_sha256_last"]
    assert [c.name for c in list_checkpoints(tmp_path)] == ["epoch-0003"]


def test_two_runs_in_one_folder(tmp_path):
    with RunFolder(tmp_path), pytest.raises(FolderInUse, match=f"pid {os.getpid()}"):
        train(tmp_path)


def test_no_room_is_told_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("codex_ml.run_folder.shutil.disk_usage", lambda path: type("U", (), {"free": 10})())
    with pytest.raises(StorageError, match="and 10 are free"):
        train(tmp_path)
    assert list_checkpoints(tmp_path) == []


def test_a_failing_evaluation_loses_nothing(tmp_path):
    def fails(epoch, state):
        raise RuntimeError("no such metric")

    with pytest.raises(RuntimeError, match="no such metric"):
        train(tmp_path, epochs=1, eval_fn=fails)
    result = train(tmp_path, epochs=1, resume=True)
    assert result["total_steps"] == 0 and result["final_epoch"] == 1
    assert result["checkpoint_sha256_last"] == train(tmp_path / "whole", epochs=1)["checkpoint_sha256_last"]


def test_snapshots_are_kept(tmp_path):
    train(tmp_path, epochs=1, run_config={"note": "first"})
    train(tmp_path, epochs=2, resume=True, run_config={"note": "second"})
    assert json.loads((tmp_path / "config.snapshot.json").read_text()) == {"note": "second"}
    assert json.loads((tmp_path / "config.snapshot.0001.json").read_text()) == {"note": "first"}


# ---- layouts and devices


@pytest.mark.parametrize("optimizer", (torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)))
@pytest.mark.parametrize("stop", (3, 5))
def test_exact_with_channels_last(tmp_path, optimizer, stop):
    class StopAt:
        def on_step_end(self, step, state):
            if step == stop:
                state.request_stop()

    def net():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2)).to(
            memory_format=torch.channels_last)

    images = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    job = {"model": net, "data": (images, Y), "optimizer": optimizer, "epochs": 2, "grad_accum": 2, "learning_rate": 0.01}
    whole = train(tmp_path / "whole", **job)
    train(tmp_path / "run", callbacks=[StopAt()], **job)
    assert train(tmp_path / "run", resume=True, **job)["checkpoint_sha256_last"] == whole["checkpoint_sha256_last"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_exact_on_cuda(tmp_path):
    class StopAt:
        def on_step_end(self, step, state):
            if step == 8:
                state.request_stop()

    job = {"device": "cuda", "model_args": {"dropout": 0.2}, "epochs": 3, "grad_accum": 2}
    whole = train(tmp_path / "whole", **job)
    train(tmp_path / "run", callbacks=[StopAt()], **job)
    assert train(tmp_path / "run", resume=True, **job)["checkpoint_sha256_last"] == whole["checkpoint_sha256_last"]
