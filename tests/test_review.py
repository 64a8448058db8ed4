"""What a review found: each of these was wrong once."""

import copy
import json
import logging
import pickle

import pytest
import torch

from codex_ml import checkpoint
from codex_ml.checkpoint import CheckpointError, list_checkpoints
from codex_ml.config import ConfigError, RetentionConfig, TrainConfig, given
from codex_ml.settings import resolve
from codex_ml.train_loop import run_training

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


def train(folder, **keywords):
    options = {"data": (X, Y), "model": "mlp", "batch_size": 8, "progress": "off", "threads": 1, "epochs": 2}
    return run_training(checkpoint_dir=folder, **options | keywords)


def test_a_value_that_was_given_wins_though_it_is_the_default(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[codex_ml]\nepochs = 50\nbatch_size = 2\n")
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(epochs=5)
    assert resolve(config).config.epochs == 5 and resolve(config).config.batch_size == 2
    config.batch_size = 16  # the default, set by hand
    assert resolve(config).config.batch_size == 16 and resolve(config).origins["batch_size"] == "TrainConfig"
    config = TrainConfig()
    config.scheduler.type = "constant"
    assert resolve(config).origins["scheduler.type"] == "TrainConfig" and resolve(config).origins["scheduler.gamma"] == "default"


def test_what_was_given_is_no_field_and_survives_a_copy():
    config = TrainConfig(epochs=5)
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config and given(twin) == {"epochs"}
        twin.seed = 1
        assert given(twin) == {"epochs", "seed"} and given(config) == {"epochs"}
    assert list(vars(RetentionConfig())) == ["keep_last", "keep_every", "keep_best", "max_epochs", "max_bytes"]


def test_entries_of_entries_and_too_many_threads():
    assert resolve(overrides=["model_args.a.b=1"]).config.model_args == {"a": {"b": 1}}
    with pytest.raises(ConfigError, match="threads=100000"):
        resolve(overrides=["threads=100000"])


def test_another_rate_in_an_optimizer_that_was_built_is_drift(tmp_path):
    def go(rate, **keywords):
        model = torch.nn.Linear(4, 2)
        return train(tmp_path, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=rate), **keywords)

    go(0.1)
    with pytest.raises(CheckpointError, match=r"optimizer_groups"):
        go(0.001, epochs=3, resume=True)
    assert go(0.1, epochs=3, resume=True)["resumed"]


@pytest.mark.parametrize("moved", range(1, 5))
def test_a_beginning_that_is_killed_leaves_the_newest_of_the_old_run(tmp_path, monkeypatch, moved):
    train(tmp_path, epochs=4)
    newest = list_checkpoints(tmp_path)[0].sha256
    names, rename = [], checkpoint.Path.rename

    def dies(path, target):
        if len(names) == moved:
            raise KeyboardInterrupt
        names.append(path.name)
        return rename(path, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint.Path, "rename", dies)
        train(tmp_path, epochs=4)
    left = list_checkpoints(tmp_path)
    assert not left or left[0].sha256 == newest


def test_a_step_that_cannot_be_dropped_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint, "remove_folder", lambda folder: (_ for _ in ()).throw(PermissionError(1, "no")))
    with caplog.at_level(logging.WARNING):
        train(tmp_path, epochs=1, checkpoint_every_steps=3)
    assert "step-00000003" in caplog.text and "next run tries again" in caplog.text


@pytest.mark.parametrize("history", (5, [1], "no"))
def test_a_history_of_metrics_that_is_none(tmp_path, history):
    train(tmp_path)
    path = tmp_path / "epoch-0002" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metrics_history": history}))
    assert train(tmp_path, epochs=3, resume=True)["final_epoch"] == 3


def test_a_rate_that_groups_share_is_one_hash(tmp_path):
    class StopAt:
        def on_step_end(self, step, state):
            if step == 7:
                state.request_stop()

    def adamw(parameters, lr):
        parameters = list(parameters)
        return torch.optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=torch.tensor(0.01), capturable=False)

    whole = train(tmp_path / "whole", optimizer=adamw)
    train(tmp_path / "run", optimizer=adamw, callbacks=[StopAt()])
    assert train(tmp_path / "run", optimizer=adamw, resume=True)["checkpoint_sha256_last"] == whole["checkpoint_sha256_last"]
