"""What a review found: each of these was wrong once."""

import copy
import errno
import itertools
import json
import logging
import os
import pickle

import pytest
import torch

from codex_ml import checkpoint
from codex_ml.checkpoint import CheckpointError, list_checkpoints
from codex_ml.cli.train import main
from codex_ml.config import ConfigError, RetentionConfig, TrainConfig, given
from codex_ml.data import DataError
from codex_ml.durable import StorageError
from codex_ml.optimizers import OptimizerError
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


class Stop:
    def __init__(self, step):
        self.step = step

    def on_step_end(self, step, state):
        if step == self.step:
            state.request_stop()


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
    names, rename = [], os.rename

    def dies(path, target):
        if len(names) == moved:
            raise KeyboardInterrupt
        names.append(path)
        return rename(path, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "rename", dies)
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
    path = tmp_path / "metrics_history.jsonl"
    path.write_text(json.dumps(history) + "\n" + path.read_text() + '{"epoch": 3, "tr')
    result = train(tmp_path, epochs=3, resume=True)
    assert result["final_epoch"] == 3 and [row["epoch"] for row in result["metrics_history"]] == [1, 2, 3]


def test_large_metrics_and_a_long_history_leave_checkpoints_that_are_read(tmp_path):
    big = [[1.5] * 300] * 300
    train(tmp_path, eval_fn=lambda epoch, state: {"confusion": big, "score": 0.5})
    assert all((tmp_path / f"epoch-000{e}" / "metadata.json").stat().st_size < 1 << 16 for e in (1, 2))
    resumed = train(tmp_path, eval_fn=lambda epoch, state: {"score": 0.5}, epochs=3, resume=True)
    assert resumed["resumed_from_epoch"] == 2 and resumed["metrics_history"][0]["confusion"] == big


class Named(torch.nn.Module):
    def __init__(self, *order):
        super().__init__()
        for name, (a, b) in order:
            setattr(self, name, torch.nn.Linear(a, b))

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("a, b", [((4, 2), (2, 2)), ((4, 4), (4, 2))])
def test_the_same_parameters_in_another_order_are_another_model(tmp_path, a, b, caplog):
    train(tmp_path, model=lambda: Named(("a", a), ("b", b)))
    again = train(tmp_path, model=lambda: Named(("b", b), ("a", a)), epochs=3, resume=True)
    assert not again["resumed"] and "stand in another order" in caplog.text


def test_an_optimizer_that_groups_the_same_parameters_in_another_way(tmp_path, caplog):
    def grouped(swap):
        def make(parameters, lr):
            w, v = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]
            return torch.optim.AdamW([{"params": v}, {"params": w}] if swap else [{"params": w}, {"params": v}], lr=lr)
        return make

    def net():
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))

    train(tmp_path, model=net, optimizer=grouped(False))
    again = train(tmp_path, model=net, optimizer=grouped(True), epochs=3, resume=True, checkpoint_allow_drift=True)
    assert not again["resumed"] and "in another order" in caplog.text


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
@pytest.mark.parametrize("name", ("NAdam", "ASGD", "AdamW", "Adamax", "RMSprop", "Rprop", "Adadelta", "Adagrad", "RAdam"))
def test_moments_keep_their_own_dtype(tmp_path, name, dtype):
    kind = getattr(torch.optim, name)
    job = {"model": lambda: torch.nn.Linear(4, 2).to(dtype), "data": (X.to(dtype), Y), "optimizer": lambda p, lr: kind(p, lr=lr)}
    whole = train(tmp_path / "whole", **job)
    train(tmp_path / "run", callbacks=[Stop(3)], **job)
    assert train(tmp_path / "run", resume=True, **job)["checkpoint_sha256_last"] == whole["checkpoint_sha256_last"]


def test_a_parameter_that_no_checkpoint_would_hold(tmp_path):
    model, w = torch.nn.Linear(4, 2), torch.nn.Parameter(torch.ones(()))
    with pytest.raises(OptimizerError, match="no checkpoint would hold"):
        train(tmp_path, model=model, optimizer=torch.optim.SGD([*model.parameters(), w], lr=0.1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", (errno.EMFILE, errno.ENOMEM, errno.EFBIG))
def test_a_process_that_cannot_read_moves_nothing(tmp_path, monkeypatch, code):
    train(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("codex_ml.durable._hash_and_copy", refuse)
    with pytest.raises(StorageError, match="cannot read"):
        train(tmp_path, epochs=3, resume=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_grad_accum_that_drifts_inside_an_update_drops_the_half_of_it(tmp_path, caplog):
    train(tmp_path, grad_accum=4, callbacks=[Stop(3)], optimizer="sgd")
    train(tmp_path, grad_accum=1, resume=True, checkpoint_allow_drift=True, optimizer="sgd")
    assert "the gradients that it had gathered are dropped" in caplog.text


@pytest.mark.parametrize("stop", (3, 8))
def test_a_loader_with_a_generator_of_its_own(tmp_path, stop):
    def job():
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 8, shuffle=True, generator=torch.Generator())
        return {"data": loader, "model": lambda: torch.nn.Linear(4, 2), "epochs": 3}

    whole = train(tmp_path / "whole", **job())
    train(tmp_path / "run", callbacks=[Stop(stop)], **job())
    assert train(tmp_path / "run", resume=True, **job())["checkpoint_sha256_last"] == whole["checkpoint_sha256_last"]


def test_threads_are_those_of_the_checkpoint(tmp_path):
    train(tmp_path, threads=2, callbacks=[Stop(3)])
    (tmp_path / "config.resolved.json").write_text('{"identity": null, "run_id": 7}')
    result = train(tmp_path, threads=None, resume=True)
    assert result["resumed"] and isinstance(result["run_id"], str)
    torch.set_num_threads(1)


@pytest.mark.parametrize("words, said", [
    (["epochs=${x}"], "epochs"), (["batch_size=100000000000000000000"], "batch_size"),
    (["optimizer_args.amsgrad=1"], "takes true or false"),
    (["optimizer_args.differentiable=true"], "leave it out"), (["monitoring.sinks.mine=true"], "no 'mine'"),
])
def test_what_cannot_be_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("the quick brown fox " * 100)
    code = main(["data=t.txt", "model_name=tiny", "block_size=8", "epochs=1", "progress=off", *words])
    err = capsys.readouterr().err
    assert code == 2 and said in err and err.count("\n") == 1 and not (tmp_path / ".codex").exists()


def test_an_optimizer_that_wants_a_closure_is_refused(tmp_path):
    with pytest.raises(OptimizerError, match="closure"):
        train(tmp_path / "run", optimizer=torch.optim.LBFGS)


def test_a_resume_that_has_no_folder_is_told(caplog):
    train(None, checkpoint_resume=True)
    assert "checkpoint.resume does nothing without checkpoint.dir" in caplog.text


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


def test_drift_is_told_key_by_key_after_an_allowed_one_that_saved_nothing(tmp_path):
    train(tmp_path, epochs=1)
    with pytest.raises(RuntimeError, match="the data are gone"):
        train(tmp_path, resume=True, batch_size=4, checkpoint_allow_drift=True, loss_fn=lambda model, batch: fail())
    with pytest.raises(CheckpointError, match=r"batch_size\s+8\s+4"):
        train(tmp_path, resume=True, batch_size=4)


def fail():
    raise RuntimeError("the data are gone")


def test_no_room_for_a_checkpoint_moves_nothing_and_a_finished_run_needs_none(tmp_path, monkeypatch):
    whole = train(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(StorageError, match="needs about"):
        train(tmp_path, epochs=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    with pytest.raises(StorageError, match="needs about"):
        train(tmp_path, epochs=3, resume=True)
    assert train(tmp_path, resume=True)["checkpoint_sha256_last"] == whole["checkpoint_sha256_last"]


def test_a_parameter_that_only_the_optimizer_holds_gets_the_mean_gradient_too(tmp_path):
    def go(folder, batch_size, grad_accum):
        torch.manual_seed(0)
        model, scale = torch.nn.Linear(4, 2), torch.nn.Parameter(torch.ones(()))
        optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.1)
        train(folder, model=model, optimizer=optimizer, batch_size=batch_size, grad_accum=grad_accum, epochs=1,
              loss_fn=lambda model, batch: (model(batch[0]) * scale).square().mean())
        return scale.item()

    assert go(None, 4, 4) == pytest.approx(go(None, 16, 1), abs=1e-6)


def test_a_value_that_no_optimizer_takes(tmp_path):
    with pytest.raises(OptimizerError, match=r"cannot be built with optimizer_args=\{'betas': \(0.9,\)\}"):
        train(tmp_path / "run", optimizer_args={"betas": [0.9]})
    assert not (tmp_path / "run").exists()


class Endless:
    """A stream: batch after batch, never the same."""

    def __iter__(self):
        for i in itertools.count():
            yield torch.full((8, 4), i / 100) + torch.rand(8, 4), torch.full((8,), i % 2)


@pytest.mark.parametrize("data", (Endless(), [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 40, 8)]))
def test_an_iterable_goes_on_from_epoch_to_epoch(tmp_path, data):
    seen = []

    def loss(model, batch):
        seen.append(batch[0].sum().item())
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    job = {"data": data, "model": lambda: torch.nn.Linear(4, 2), "steps_per_epoch": 3, "epochs": 3, "loss_fn": loss}
    whole = train(tmp_path / "whole", **job)
    assert len({round(value, 3) for value in seen}) == (9 if isinstance(data, Endless) else 5)
    for stop in (2, 3, 4, 7):
        train(tmp_path / f"stop{stop}", callbacks=[Stop(stop)], **job)
        resumed = train(tmp_path / f"stop{stop}", resume=True, **job)
        assert resumed["checkpoint_sha256_last"] == whole["checkpoint_sha256_last"], stop


def test_an_iterable_whose_length_is_not_true(tmp_path):
    class Liar(list):
        def __len__(self):
            return 4

    with pytest.raises(DataError, match="yielded 5 batches, and its length is 4"):
        train(tmp_path, model=torch.nn.Linear(4, 2), data=Liar((X[i : i + 8], Y[i : i + 8]) for i in range(0, 40, 8)), steps_per_epoch=3)


def test_settings_ini_takes_entries_and_dicts(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text('[codex_ml]\nmodel_args = {"dim": 64}\noptimizer_args.note = gelu\n'
                                           "monitoring.alerts.nan = true\n")
    monkeypatch.chdir(tmp_path)
    found = resolve(overrides=["monitoring.alerts.nan.for=3", "model_args.layers=2"])
    assert found.config.model_args == {"dim": 64, "layers": 2} and found.config.optimizer_args == {"note": "gelu"}
    assert found.config.monitoring.alerts == {"nan": {"for": 3}} and found.origins["monitoring.alerts"] == "override"
    (tmp_path / "settings.ini").write_text("[codex_ml]\nmodel_args = dim 64\n")
    with pytest.raises(ConfigError, match="key-value pairs as JSON"):
        resolve()


def test_a_schedule_that_follows_another_number_of_epochs_is_told(tmp_path, caplog):
    for kind, told in (("linear", True), ("constant", False)):
        train(tmp_path / kind, scheduler_cfg={"type": kind})
        caplog.clear()
        train(tmp_path / kind, scheduler_cfg={"type": kind}, epochs=3, resume=True)
        assert ("planned for 2 epochs and now has 3" in caplog.text) == told
        caplog.clear()
        train(tmp_path / kind, scheduler_cfg={"type": kind}, epochs=3, resume=True)
        assert "planned for" not in caplog.text
