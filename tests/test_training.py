"""What a run computes: rates, counts, gradients, histories, and one hash wherever and however it is watched."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from runs import StopAt
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from codex_ml.checkpoint import list_checkpoints, load_checkpoint
from codex_ml.config import ConfigError, TrainConfig
from codex_ml.data import DataError
from codex_ml.train_loop import run_training

torch.manual_seed(0)
X, Y = torch.randn(50, 6), torch.randint(0, 3, (50,))


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))


def train(folder=None, **keywords):
    options = {"model": net, "data": (X, Y), "epochs": 2, "batch_size": 10, "threads": 1, "progress": "off", "checkpoint_dir": folder,
               "metrics_out": None}
    return run_training(**options | keywords)


def rates(result):
    return [rate for (rate,) in result["learning_rate_history"]]


def metadata(folder, epoch):
    return json.loads((folder / f"epoch-{epoch:04d}" / "metadata.json").read_text())


def weights(result):
    return [p.detach().clone() for p in result.model.parameters()]


# ---- the learning rate


def test_linear_to_zero_over_six_epochs():
    result = train(epochs=6, scheduler_cfg={"type": "linear"})
    assert rates(result)[:3] == pytest.approx([0.001, 0.0008333, 0.0006667], abs=1e-7)
    assert rates(result) == pytest.approx([0.001 * (1 - e / 6) for e in range(6)], abs=1e-12)


def test_linear_to_a_third_over_ten_epochs(tmp_path):
    train(tmp_path, epochs=10, scheduler_cfg={"type": "linear", "final_lr_scale": 0.3})
    assert metadata(tmp_path, 4)["current_lrs"] == pytest.approx([0.00072], abs=1e-7)
    assert metadata(tmp_path, 10)["current_lrs"] == pytest.approx([0.0003], abs=1e-7)


def test_step_decays_every_step_size():
    result = train(epochs=6, scheduler_cfg={"type": "step", "step_size": 2, "gamma": 0.5})
    assert rates(result) == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4], abs=1e-12)


def test_cosine_and_constant():
    cosine = train(epochs=4, scheduler_cfg={"type": "cosine", "final_lr_scale": 0.1})
    assert rates(cosine) == pytest.approx([1e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * e / 4)) / 2) for e in range(4)], abs=1e-12)
    assert rates(train(epochs=4)) == [1e-3] * 4


@pytest.mark.parametrize("scheduler", ("constant", "linear", "step", "cosine"))
def test_the_optimizer_uses_the_rate_that_is_told(scheduler):
    """Under SGD an update is the rate times the gradient."""
    seen = []

    class Watch:
        def on_epoch_start(self, epoch, state):
            self.before = state.model.weight.item()

        def on_epoch_end(self, epoch, metrics, state):
            seen.append(self.before - state.model.weight.item())

    result = train(model=lambda: nn.Linear(1, 1, bias=False), data=(torch.ones(10, 1), torch.ones(10, 1)), epochs=5, learning_rate=0.25,
                   loss_fn=lambda model, batch: model(batch[0]).mean(), optimizer="sgd", weight_decay=0.0, callbacks=[Watch()],
                   scheduler_cfg={"type": scheduler, "warmup": 1})
    assert seen == pytest.approx(rates(result), abs=1e-6)
    assert rates(result)[0] == pytest.approx(0.125)  # half of the base, while it warms up


def test_by_the_step_the_rate_changes_inside_an_epoch():
    lrs = []

    class Watch:
        def on_step_end(self, step, state):
            lrs.append(state.optimizer.param_groups[0]["lr"])

    result = train(grad_accum=2, epochs=2, scheduler_cfg={"type": "linear", "interval": "step"}, callbacks=[Watch()])
    used = [1e-3 * (1 - u / 6) for u in range(6)]  # three updates an epoch, over steps 1-2, 3-4, 5
    assert [lrs[1], lrs[3], lrs[4]] == pytest.approx(used[:3], abs=1e-12)
    assert rates(result) == pytest.approx([used[0], used[3]], abs=1e-12)


def test_each_parameter_group_has_its_own_rate(tmp_path):
    def two_groups(params, lr):
        *most, last = params
        return torch.optim.SGD([{"params": most}, {"params": [last], "lr": 0.5}], lr=lr)

    job = {"optimizer": two_groups, "scheduler_cfg": {"type": "linear"}, "learning_rate": 0.1}
    result = train(tmp_path, epochs=2, **job)
    assert result["learning_rate_history"] == [[pytest.approx(0.1), pytest.approx(0.5)], [pytest.approx(0.05), pytest.approx(0.25)]]
    again = train(tmp_path, epochs=4, resume=True, **job)  # the base rates are not those of the last epoch
    assert again["learning_rate_history"][2:] == [[pytest.approx(0.05), pytest.approx(0.25)], [pytest.approx(0.025), pytest.approx(0.125)]]


# ---- counts


def test_steps_and_updates(tmp_path):
    result = train(tmp_path, steps_per_epoch=5, grad_accum=2, epochs=2)
    assert (result["optimizer_steps"], result["total_steps"]) == (6, 10)
    assert (result["steps_per_epoch"], result["grad_accum"]) == (5, 2)
    assert {k: metadata(tmp_path, 2)[k] for k in ("optimizer_steps_total", "optimizer_steps_epoch", "steps_per_epoch", "global_step")} == {
        "optimizer_steps_total": 6, "optimizer_steps_epoch": 3, "steps_per_epoch": 5, "global_step": 10}


def test_three_epochs_then_five_then_nothing(tmp_path):
    first = train(tmp_path, epochs=3)
    second = train(tmp_path, epochs=5, resume=True)
    assert first["resumed"] is False and first["resumed_from_epoch"] is None and first["start_epoch"] == 1
    assert second["resumed"] and second["resumed_from_epoch"] == 3 and second["start_epoch"] == 4 and second["final_epoch"] == 5
    assert sorted(p.name for p in tmp_path.glob("epoch-*")) == [f"epoch-000{e}" for e in range(1, 6)]
    assert second["resume_meta"]["previous_checkpoint_sha256"] == first["checkpoint_sha256_last"]
    assert second["optimizer_steps"] == 10 and second["optimizer_steps_total"] == 25  # counters go on
    assert len(second["learning_rate_history"]) == len(second["loss_history"]) == len(second["metrics_history"]) == 5
    assert second["loss_history"][:3] == first["loss_history"]
    before = (tmp_path / "epoch-0005" / "checkpoint.pt").stat()
    third = train(tmp_path, epochs=5, resume=True)
    assert third["optimizer_steps"] == third["total_steps"] == 0 and third["status"] == "completed"
    assert third["checkpoint_sha256_last"] == second["checkpoint_sha256_last"]
    assert first.keys() == second.keys() == third.keys() and first["resume_meta"].keys() == third["resume_meta"].keys()
    assert third["learning_rate_history"] == second["learning_rate_history"]
    assert (tmp_path / "epoch-0005" / "checkpoint.pt").stat().st_mtime_ns == before.st_mtime_ns
    fewer = train(tmp_path, epochs=2, resume=True)  # fewer than there are: nothing to do, nothing lost
    assert fewer["optimizer_steps"] == 0 and fewer["final_epoch"] == 5


def test_keys_of_every_ending(tmp_path):
    results = [train(tmp_path / "a"), train(tmp_path / "b", callbacks=[StopAt(3)]), train(tmp_path / "b", resume=True), train(None),
               train(tmp_path / "c", epochs=0), train(tmp_path / "d", retention_policy={"keep_last": 1})]
    wanted = {"resumed", "resumed_from_epoch", "start_epoch", "final_epoch", "epochs", "optimizer_steps", "total_steps", "steps_per_epoch",
              "grad_accum", "model_params", "scheduler_type", "learning_rate_history", "loss_history", "checkpoint_sha256_last",
              "retention_last", "resume_meta", "wall_time_sec", "status"}
    assert all(result.keys() == results[0].keys() and wanted <= result.keys() for result in results)
    assert results[0]["model_params"] == 6 * 8 + 8 + 8 * 3 + 3
    json.dumps(results[0])  # plain values


def test_the_chain_goes_on_over_every_resume(tmp_path):
    train(tmp_path, epochs=2, callbacks=[StopAt(8)])
    train(tmp_path, epochs=2, resume=True, callbacks=[StopAt(9)])
    train(tmp_path, epochs=4, resume=True)
    train(tmp_path / "whole", epochs=4)
    parents = [metadata(tmp_path, e)["parent_checkpoint_sha256"] for e in range(1, 5)]
    hashes = [hashlib.sha256((tmp_path / f"epoch-000{e}" / "checkpoint.pt").read_bytes()).hexdigest() for e in range(1, 5)]
    assert parents == [None, *hashes[:3]]
    assert [metadata(tmp_path / "whole", e)["checkpoint_sha256"] for e in range(1, 4)] == hashes[:3]


def test_the_records_on_disk_agree(tmp_path):
    result = train(tmp_path)
    latest, last = json.loads((tmp_path / "latest.json").read_text()), metadata(tmp_path, 2)
    assert list(latest) == ["epoch", "path", "created_at", "model_params", "optimizer_steps_total", "scheduler_type", "checkpoint_sha256",
                            "schema_version", "global_step", "checkpoint_bytes"]
    assert list(last)[:11] == ["epoch", "created_at", "optimizer_steps_total", "optimizer_steps_epoch", "steps_per_epoch", "grad_accum",
                               "avg_loss", "scheduler_type", "current_lrs", "learning_rate_history_len", "checkpoint_sha256"]
    file = tmp_path / "epoch-0002" / "checkpoint.pt"
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    assert sha == latest["checkpoint_sha256"] == last["checkpoint_sha256"] == result["checkpoint_sha256_last"]
    assert latest["checkpoint_bytes"] == last["checkpoint_bytes"] == file.stat().st_size
    assert last["avg_loss"] == result["loss_history"][-1] and last["learning_rate_history_len"] == 2
    manifest = json.loads((tmp_path / "epoch-0002" / "run_manifest.json").read_text())
    assert list(manifest)[:5] == ["python", "platform", "git_sha", "lock_sha256", "env"]


# ---- gradients


def sgd(batch_size, grad_accum, n=50, **keywords):
    return weights(train(model=lambda: nn.Linear(6, 3), data=(X[:n], Y[:n]), optimizer="sgd", learning_rate=0.5, weight_decay=0.0,
                         batch_size=batch_size, grad_accum=grad_accum, epochs=3, **keywords))


@pytest.mark.parametrize(("n", "small", "k"), (
    (48, 8, 2), (48, 8, 3), (48, 8, 6), (40, 8, 2), (50, 10, 3), (50, 10, 5), (50, 7, 2), (50, 7, 4), (47, 4, 5), (9, 4, 2), (10, 4, 100)))
def test_accumulated_chunks_are_the_full_batch(n, small, k):
    """Also where the last window, or its last batch, is short."""
    for a, b in zip(sgd(small, k, n), sgd(small * k, 1, n), strict=True):
        assert (a - b).abs().max() < 1e-6
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(sgd(small, k, n), sgd(small, 1, n), strict=True))


def test_clipping_caps_the_norm_of_the_whole_update():
    norms = []

    class Norms(torch.optim.SGD):
        def step(self, closure=None):
            norms.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm().item())
            return super().step(closure)

    train(optimizer=Norms, learning_rate=0.1, grad_accum=2)
    free, norms[:] = norms[:], []
    train(optimizer=Norms, learning_rate=0.1, grad_accum=2, grad_clip=0.05)
    assert min(free) > 0.05 and norms == pytest.approx([0.05] * 6, rel=1e-3)
    for a, b in zip(sgd(10, 3, grad_clip=0.1), sgd(30, 1, grad_clip=0.1), strict=True):
        assert (a - b).abs().max() < 1e-6


def test_frozen_parameters_stay(tmp_path):
    class Frozen(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(6, 8), nn.Linear(8, 3))
            self[0].requires_grad_(False)

    first = train(tmp_path, model=Frozen, callbacks=[StopAt(3)])
    second = train(tmp_path, model=Frozen, resume=True)
    assert first.model[0].weight.equal(second.model[0].weight) and not first.model[1].weight.equal(second.model[1].weight)
    assert second["checkpoint_sha256_last"] == train(tmp_path / "whole", model=Frozen)["checkpoint_sha256_last"]


# ---- every optimizer and scheduler, resumed in the middle


class Lion(torch.optim.Optimizer):
    """One of the user's own."""

    def __init__(self, params, lr, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["beta"])
                p.add_(mean.sign(), alpha=-group["lr"])


OPTIMIZERS = {"adamw": {}, "adam": {"amsgrad": True}, "sgd": {"momentum": 0.9, "nesterov": True}, Lion: {"beta": 0.8},
              torch.optim.RMSprop: {}, torch.optim.Adagrad: {}, torch.optim.NAdam: {}}


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("scheduler", ("constant", "linear", "step", "cosine"))
def test_every_optimizer_with_every_scheduler(tmp_path, optimizer, scheduler):
    job = {"optimizer": optimizer, "optimizer_args": OPTIMIZERS[optimizer], "grad_accum": 2,
           "scheduler_cfg": {"type": scheduler, "warmup": 1, "interval": "step"}}
    whole = train(tmp_path / "whole", **job)
    train(tmp_path / "parts", callbacks=[StopAt(3)], **job)  # between two updates
    resumed = train(tmp_path / "parts", resume=True, **job)
    assert resumed["resumed"] and resumed["checkpoint_sha256_last"] == whole["checkpoint_sha256_last"]
    assert resumed["loss_history"] == whole["loss_history"]


# ---- data


class Rows(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i], Y[i]


class Own(nn.Module):
    """Takes keywords and returns an object with `.loss`, as many libraries' models do."""

    class Output:
        def __init__(self, loss):
            self.loss = loss

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, features, labels):
        return self.Output(nn.functional.cross_entropy(self.net(features), labels))


class Named(Rows):
    def __getitem__(self, i):
        return {"features": X[i], "labels": Y[i]}


class Stream:
    """Batches from an iterable without a length."""

    def __iter__(self):
        for i in range(0, 50, 10):
            yield X[i:i + 10], Y[i:i + 10]


DATA = {
    "tensors": {"data": (X, Y)}, "arrays": {"data": (X.numpy(), Y.numpy())},
    "float64": {"data": (X.double().numpy(), Y.numpy())}, "dataset": {"data": Rows()}, "TensorDataset": {"data": TensorDataset(X, Y)},
    "workers": {"data": Rows(), "num_workers": 2}, "loader": {"data": DataLoader(Rows(), batch_size=10, shuffle=True)},
    "list of batches": {"data": list(Stream())}, "stream": {"data": Stream()},
    "stream with steps": {"data": Stream(), "steps_per_epoch": 7},
    "mappings": {"data": Named(), "model": Own},
    "mappings in a list": {"data": [{"features": X[:9], "labels": Y[:9]}, {"features": X[9:13], "labels": Y[9:13]}], "model": Own},
    "values": {"data": (X, X[:, :3] * 2)}, "one tensor": {"data": X, "loss_fn": lambda model, x: model(x).square().mean()},
    "a loss of one's own": {"data": (X, Y), "loss_fn": lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])},
    "a registered model": {"data": (X, Y), "model": "mlp", "model_args": {"hidden": [4], "dropout": 0.5}},
}


@pytest.mark.parametrize("kind", DATA)
def test_every_kind_of_data_resumes_exactly(tmp_path, kind):
    job = DATA[kind]
    whole = train(tmp_path / "whole", **job)
    assert whole["status"] == "completed" and all(math.isfinite(loss) for loss in whole["loss_history"])
    steps = whole["steps_per_epoch"]
    stops = (1, steps + 1) if steps > 1 else (1,)
    for stop in stops:
        train(tmp_path / f"parts{stop}", callbacks=[StopAt(stop)], **job)
        resumed = train(tmp_path / f"parts{stop}", resume=True, **job)
        assert resumed["resumed"] and resumed["checkpoint_sha256_last"] == whole["checkpoint_sha256_last"]


def test_equal_data_in_other_clothes_gives_one_hash(tmp_path):
    hashes = {kind: train(tmp_path / kind, **DATA[kind])["checkpoint_sha256_last"]
              for kind in ("tensors", "arrays", "dataset", "TensorDataset", "workers")}
    assert len(set(hashes.values())) == 1, hashes


def test_an_iterator_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match="only once"):
        train(tmp_path / "run", data=iter(list(Stream())))
    assert not (tmp_path / "run").exists()


NO_DATA = {"two lengths": (X, Y[:40]), "a list of two": [X, Y], "no rows": (X[:0], Y[:0]), "a number": 5, "nothing": [],
           "a mapping": {"a": 1}, "an object": object(), "text in arrays": (np.array(["a", "b"]), np.arange(2))}


@pytest.mark.parametrize("data", NO_DATA.values(), ids=NO_DATA)
def test_what_is_no_data_is_refused(tmp_path, data):
    with pytest.raises((DataError, ConfigError)):
        train(tmp_path / "run", data=data)
    assert not (tmp_path / "run").exists() or not list_checkpoints(tmp_path / "run")


def test_every_sample_is_seen_once_an_epoch():
    seen = []

    class Counting(Rows):
        def __getitem__(self, i):
            seen.append(i)
            return super().__getitem__(i)

    train(data=Counting(), batch_size=8)
    assert sorted(seen[:50]) == sorted(seen[50:]) == list(range(50)) and seen[:50] != seen[50:]


# ---- nothing that only watches changes a bit


WATCHING = {
    "lines": {"progress": "lines"}, "live": {"progress": "live"}, "auto": {"progress": "auto"},
    "metrics": {"metrics_out": ".codex/metrics.ndjson", "log_every_steps": 1}, "callbacks": {"callbacks": [StopAt(999)]},
    "retention": {"retention_policy": {"keep_last": 1}}, "step checkpoints": {"checkpoint_every_steps": 1},
    "strict": {"checkpoint_strict": True},
    "workers": {"num_workers": 2}, "a record": {"run_config": {"anything": [1, 2]}}, "resume of nothing": {"resume": True},
    "evaluation": {"eval_fn": lambda epoch, state: {"drawn": torch.rand(1).item()}}, "validation": {"eval_data": (X[:20], Y[:20])},
    "a config": {"config": TrainConfig(epochs=9)},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(tmp_path_factory.mktemp("plain"))["checkpoint_sha256_last"]


@pytest.mark.parametrize("what", WATCHING)
def test_watching_changes_nothing(tmp_path, plain, what):
    folder = tmp_path / "another folder, with a longer name"
    assert train(folder, **WATCHING[what])["checkpoint_sha256_last"] == plain


@pytest.mark.parametrize("change", ({"seed": 1}, {"learning_rate": 2e-3}, {"batch_size": 25}, {"weight_decay": 0.1}, {"grad_clip": 0.1},
                                    {"grad_accum": 2}, {"scheduler_cfg": {"type": "cosine"}}, {"data": (X, Y.flip(0))}), ids=str)
def test_what_decides_the_bits_does(tmp_path, plain, change):
    assert train(tmp_path, **change)["checkpoint_sha256_last"] != plain


@pytest.mark.parametrize("seed", (None, 0, 1234))
def test_no_seed_is_the_default_seed(tmp_path, plain, seed):
    assert train(tmp_path, seed=seed)["checkpoint_sha256_last"] == plain


def test_a_small_default_run_in_two_folders(tmp_path, monkeypatch):
    """The default corpus and model, made small by settings.ini; with another display, and without metrics."""
    hashes = []
    for name, words in (("a", {}), ("b", {"progress": "lines"}), ("c", {"metrics_out": None, "progress": "live"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.ini").write_text("[codex_ml]\nsteps_per_epoch = 2\neval_steps = 1\nbatch_size = 2\nepochs = 2\n"
                                                      "threads = 1\nmodel_args.layers = 1\nmodel_args.dim = 32\n")
        monkeypatch.chdir(tmp_path / name)
        result = run_training(checkpoint_dir="run", **words)
        hashes.append(result["checkpoint_sha256_last"])
        assert result["metrics"]["val_perplexity"] > 1
    assert len(set(hashes)) == 1


# ---- callbacks and evaluation


def test_callbacks_are_called_in_order_and_their_metrics_are_kept(tmp_path):
    calls = []

    class All:
        def on_train_start(self, state): calls.append("start")
        def on_epoch_start(self, epoch, state): calls.append(f"epoch {epoch}")
        def on_step_end(self, step, state): calls.append(f"step {step}")
        def on_epoch_end(self, epoch, metrics, state):
            calls.append(f"end {epoch} {sorted(metrics)}")
            return {"mine": torch.tensor(epoch / 2)}
        def on_train_end(self, state): calls.append("over")

    result = train(tmp_path, batch_size=25, callbacks=[All()], eval_fn=lambda epoch, state: {"theirs": 7})
    assert calls == ["start", "epoch 1", "step 1", "step 2", "end 1 ['theirs', 'train_loss']", "epoch 2", "step 3", "step 4",
                     "end 2 ['theirs', 'train_loss']", "over"]
    assert [m["mine"] for m in result["metrics_history"]] == [0.5, 1.0] and result["metrics"]["theirs"] == 7
    assert metadata(tmp_path, 2)["metrics"] == {"train_loss": result["loss_history"][1], "theirs": 7, "mine": 1.0}


def test_the_loss_of_an_epoch_is_the_mean_over_its_samples():
    losses = []

    def loss_fn(model, batch):
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        losses.append((loss.item(), len(batch[1])))
        return loss

    result = train(loss_fn=loss_fn, batch_size=8, epochs=1)
    assert [n for _, n in losses] == [8] * 6 + [2]
    assert result["loss_history"] == [pytest.approx(sum(loss * n for loss, n in losses) / 50)]


def test_the_model_returned_is_the_one_of_the_last_checkpoint(tmp_path):
    result = train(tmp_path)
    saved = load_checkpoint(list_checkpoints(tmp_path)[0])["model"]
    assert all(tensor.equal(saved[name]) for name, tensor in result.model.state_dict().items()) and result.model.training


@pytest.mark.parametrize("keywords", ({"learning_rat": 1}, {"checkpont_dir": "x"}, {"epoch": 3}))
def test_an_unknown_keyword_is_a_type_error_with_the_nearest(tmp_path, keywords):
    with pytest.raises(TypeError, match="did you mean"):
        train(tmp_path / "run", **keywords)
    assert not (tmp_path / "run").exists()
