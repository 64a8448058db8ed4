"""Evaluations: what is written, what is refused, and what is left as it was."""

import hashlib
import json
import math
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from codex_ml.checkpoint import CheckpointError
from codex_ml.config import ConfigError
from codex_ml.data import DataError, make_batches
from codex_ml.durable import StorageError
from codex_ml.evaluate_run import choose_checkpoint, evaluate_run, main, parse_words, usage
from codex_ml.evaluation import validate
from codex_ml.evaluator import evaluate
from codex_ml.metrics import MetricError, NotFinite
from codex_ml.registry import UnknownName
from codex_ml.scorecard import EvaluationConfig, EvaluationResult, Scorecard
from codex_ml.seeding import key
from codex_ml.sources import open_data
from codex_ml.telemetry.ndjson import read_ndjson
from codex_ml.tokenizers import ByteTokenizer
from codex_ml.train_loop import run_training

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(230, 4, generator=GENERATOR)
Y = (X[:, 0] + 0.7 * torch.randn(230, generator=GENERATOR) > 0).long() + (X[:, 1] > 0.5).long()
torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on text, with three epochs."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("".join(f"{i} and {i % 7} make {i + i % 7}\n" for i in range(400)))
    result = run_training(model="tiny", data=folder / "text.txt", block_size=32, epochs=3, learning_rate=0.01, progress="off", threads=1,
                          steps_per_epoch=8, checkpoint_dir=folder / "run")
    return folder / "run", result


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    return tmp_path / "run"


# ---- values

def test_the_loss_is_that_of_a_validation():
    batches = make_batches(open_data((X, Y)).train, 32, key(1234, "validation"), shuffle=False)
    expected = validate(MODEL, batches)
    found = evaluate(MODEL, (X, Y))
    assert found["metrics"]["loss"] == pytest.approx(expected["val_loss"], rel=1e-6)
    assert found["metrics"]["accuracy"] == pytest.approx(expected["val_accuracy"])
    assert list(found["metrics"]) == ["loss", "accuracy", "f1_macro", "calibration_error"]


def test_a_model_that_draws_does_so_as_in_a_validation():
    class Drawing(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x[:, :3], 0.5, training=True)

    expected = validate(Drawing(), make_batches(open_data((X, Y)).train, 32, key(1234, "validation"), shuffle=False))["val_loss"]
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert evaluate(Drawing(), (X, Y))["metrics"]["loss"] == pytest.approx(expected, rel=1e-6)


def test_an_augmenting_dataset_is_the_same_for_every_worker_count_and_batch_size(tmp_path):
    class Noisy(Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, i):
            return X[i] + random.random() + float(np.random.rand()) + torch.rand(1), Y[i]

    def judged(size, workers):
        folder = str(tmp_path / f"{size}-{workers}")
        return evaluate(MODEL, Noisy(), EvaluationConfig(batch_size=size, num_workers=workers, output_dir=folder))

    found = [judged(size, workers) for size, workers in ((16, 0), (16, 2), (7, 0))]
    assert found[0]["metrics"] == found[1]["metrics"] and found[0]["intervals"] == found[1]["intervals"]
    assert found[0]["files"]["records"]["sha256"] == found[1]["files"]["records"]["sha256"]
    for name in ("accuracy", "f1_macro"):  # counts, which a matrix product of another size does not move
        assert found[2]["intervals"][name] == found[0]["intervals"][name]
    for name, value in found[0]["metrics"].items():
        assert found[2]["metrics"][name] == pytest.approx(value, rel=1e-5)


def test_intervals_hold_their_values_and_follow_the_seed():
    found = evaluate(MODEL, (X, Y), EvaluationConfig(metrics=["loss", "accuracy", "f1", "ece", "top_k"], top_k=2))
    for name, value in found["metrics"].items():
        low, high = found["intervals"][name]
        assert low <= value <= high and low < high, name
    assert evaluate(MODEL, (X, Y), EvaluationConfig(seed=1234))["intervals"] == evaluate(MODEL, (X, Y))["intervals"]
    assert evaluate(MODEL, (X, Y), EvaluationConfig(seed=2))["intervals"] != evaluate(MODEL, (X, Y))["intervals"]
    wide, narrow = (evaluate(MODEL, (X, Y), EvaluationConfig(confidence=c))["intervals"]["accuracy"] for c in (0.99, 0.5))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_without_bootstrap_there_are_values_alone():
    found = evaluate(MODEL, (X, Y), EvaluationConfig(bootstrap=0))
    assert set(found["intervals"].values()) == {None} and found["metrics"] == evaluate(MODEL, (X, Y))["metrics"]


def test_a_metric_of_too_many_sums_has_no_interval(monkeypatch):
    from codex_ml import scorecard

    monkeypatch.setattr(scorecard, "WIDEST", 8)
    found = evaluate(MODEL, (X, Y), EvaluationConfig(metrics=["f1", "accuracy"]))
    assert found["intervals"]["f1_macro"] is None and found["intervals"]["accuracy"]
    assert "f1_macro has 9 sums" in found["notes"][0] and found["notes"][0] in repr(found) and "f1_macro has" in found._repr_html_()
    monkeypatch.undo()
    assert evaluate(MODEL, (X, Y), EvaluationConfig(metrics=["f1", "accuracy"]))["metrics"] == found["metrics"]


def test_max_steps():
    assert evaluate(MODEL, (X, Y), EvaluationConfig(max_steps=2, batch_size=10))["counts"] == {"samples": 20, "places": 20}


def test_values_and_names():
    target = X[:, :1] * 2
    found = evaluate(nn.Linear(4, 1), (X, target))
    assert list(found["metrics"]) == ["loss", "mae", "rmse"]
    assert found["metrics"]["rmse"] == pytest.approx(math.sqrt(found["metrics"]["loss"]))


def test_splits():
    data = open_data((X, Y), (X[:50], Y[:50]))
    assert evaluate(MODEL, data)["split"] == "validation" and evaluate(MODEL, data)["counts"]["samples"] == 50
    both = evaluate(MODEL, data, EvaluationConfig(splits=["train", "validation"]))
    assert both["split"] == "train" and [found["counts"]["samples"] for found in both["splits"].values()] == [230, 50]
    assert "validation accuracy" in repr(both)
    with pytest.raises(DataError, match="no split 'test'"):
        evaluate(MODEL, data, EvaluationConfig(splits=["test"]))
    with pytest.raises(DataError, match=r"no split 'validation': give other data, or splits=\['train'\]"):
        evaluate(MODEL, open_data((X, Y)))


# ---- how the model is asked

def test_a_loss_function_of_ones_own():
    asked = []

    def smooth(model, batch):
        asked.append(len(batch[0]))
        return nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)

    model, calls = nn.Sequential(*MODEL), []
    model.register_forward_hook(lambda *_: calls.append(1))
    found = evaluate(model, (X, Y), loss_fn=smooth)
    assert len(calls) == len(asked) == 8 and len(model._forward_hooks) == 1
    plain = evaluate(MODEL, (X, Y))
    assert found["metrics"]["loss"] > plain["metrics"]["loss"] and found["intervals"]["loss"] is None
    assert found["metrics"]["accuracy"] == plain["metrics"]["accuracy"] and found["intervals"]["accuracy"] == plain["intervals"]["accuracy"]
    expected = sum(smooth(MODEL.eval(), (X[i:i + 32], Y[i:i + 32])).item() * len(X[i:i + 32]) for i in range(0, 230, 32)) / 230
    assert found["metrics"]["loss"] == pytest.approx(expected)
    MODEL.train()


class Mapped(nn.Module):
    """Takes keywords and computes its own loss."""

    def __init__(self):
        super().__init__()
        self.inner = MODEL

    def forward(self, x, labels):
        logits = self.inner(x)
        return type("Output", (), {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits})()


def test_a_model_that_computes_its_own_loss(tmp_path):
    batches = [{"x": X[i:i + 50], "labels": Y[i:i + 50]} for i in range(0, 200, 50)]
    found = evaluate(Mapped(), batches, EvaluationConfig(output_dir=str(tmp_path)))
    assert list(found["metrics"]) == ["loss"] and found["counts"] == {"samples": 200, "places": 0} and "predict_fn" in found["notes"][0]
    assert (tmp_path / "records.ndjson").read_text() == ""
    with pytest.raises(MetricError, match="only the loss"):
        evaluate(Mapped(), batches, EvaluationConfig(metrics=["accuracy"]))
    told = evaluate(Mapped(), batches, predict_fn=lambda model, batch: (model(**batch).logits, batch["labels"]))
    assert told["metrics"]["accuracy"] == evaluate(MODEL, (X[:200], Y[:200]))["metrics"]["accuracy"]


def test_loaders_and_output_objects():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = MODEL

        def forward(self, x):
            return type("Output", (), {"logits": self.inner(x)})()

    loader = DataLoader([(x, y) for x, y in zip(X, Y, strict=True)], batch_size=20)
    assert evaluate(Wrapped(), loader)["metrics"]["accuracy"] == evaluate(MODEL, (X, Y))["metrics"]["accuracy"]


def test_objects_as_metrics():
    def margin(output, target):
        return output.gather(1, target[:, None]).squeeze(1)

    found = evaluate(MODEL, (X, Y), EvaluationConfig(metrics=[margin, "accuracy"]))
    assert list(found["metrics"]) == ["margin", "accuracy"] == found["config"]["metrics"] and found["intervals"]["margin"]


def test_torchmetrics_object_begins_anew():
    torchmetrics = pytest.importorskip("torchmetrics.classification")
    metric = torchmetrics.MulticlassAccuracy(num_classes=3, average="micro")
    config = EvaluationConfig(metrics=[metric, "accuracy"])
    first, second = evaluate(MODEL, (X[:90], Y[:90]), config), evaluate(MODEL, (X, Y), config)
    for found in (first, second):
        assert found["metrics"]["MulticlassAccuracy"] == pytest.approx(found["metrics"]["accuracy"])
        assert found["intervals"]["MulticlassAccuracy"] is None


@pytest.mark.parametrize("name", ["F1Score", "torchmetrics.F1Score"])
def test_arguments_stand_under_the_name_that_the_error_gives_or_the_whole_one(name):
    pytest.importorskip("torchmetrics")
    args = {"task": "multiclass", "average": "macro", "num_classes": 3}
    config = EvaluationConfig(metrics=["torchmetrics.F1Score", "f1_macro"], metric_args={name: args})
    found = evaluate(MODEL, (X, Y), config)["metrics"]
    assert found["F1Score"] == pytest.approx(found["f1_macro"])
    with pytest.raises(ConfigError, match="'F1' is not among the metrics"):
        evaluate(MODEL, (X, Y), EvaluationConfig(metrics=["torchmetrics.F1Score"], metric_args={"F1": {}}))


def test_a_table_goes_to_a_manifest_line(tmp_path):
    pytest.importorskip("torchmetrics")
    config = EvaluationConfig(metrics=["torchmetrics.MulticlassConfusionMatrix", "accuracy"], output_dir=str(tmp_path))
    found = evaluate(MODEL, (X, Y), config)
    assert list(found["metrics"]) == ["accuracy"] and any("is a table" in note for note in found["notes"])
    records, _ = read_ndjson(tmp_path / config.metrics_filename)
    [row] = [r for r in records if r.get("metric") == "MulticlassConfusionMatrix"]
    [manifest] = [r for r in records if r.get("manifest") == row["tags"]["manifest"]]
    assert row["value"] is None and manifest["data"]["values"] == found["splits"]["test"]["confusion_matrix"]


# ---- nothing else is changed

def test_random_state_and_modes_are_as_they_were():
    class Drawing(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, i):
            return X[i] + torch.rand(4), Y[i]

    model = nn.Sequential(*MODEL)
    model[2].eval()
    model.register_buffer("buffer", torch.zeros(1))
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, Drawing())
    evaluate(model, (X, Y))
    with pytest.raises(MetricError):
        evaluate(model, (X, Y), EvaluationConfig(metrics=["top_k"], top_k=9))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert model.training and model[0].training and not model[2].training
    assert all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()


def test_memory_does_not_grow_with_the_data():
    card = Scorecard(EvaluationConfig(metrics=["accuracy", "ece"], bootstrap=50))
    from codex_ml.metrics import scored

    sizes = []
    for _ in range(60):
        card.add(scored(torch.randn(100, 3), torch.randint(0, 3, (100,))))
        sizes.append(sum(rows.nbytes for rows in card._sums._waiting))
    assert max(sizes) <= (1024 + 100) * (2 + 16) * 8


# ---- what is written

def test_files(tmp_path):
    config = EvaluationConfig(output_dir=str(tmp_path / "out"), batch_size=50)
    found = evaluate(MODEL, (X, Y), config)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["eval.ndjson", "records.ndjson", "summary.json"]
    records = lines(tmp_path / "out" / "records.ndjson")
    assert [record["index"] for record in records] == list(range(230)) and {record["split"] for record in records} == {"test"}
    MODEL.eval()
    scores = MODEL(X).detach()
    MODEL.train()
    assert [record["prediction"] for record in records] == scores.argmax(-1).tolist()
    assert [record["target"] for record in records] == Y.tolist()
    assert np.mean([record["correct"] for record in records]) == pytest.approx(found["metrics"]["accuracy"])
    assert np.mean([record["loss"] for record in records]) == pytest.approx(found["metrics"]["loss"])
    assert [record["confidence"] for record in records] == pytest.approx(scores.softmax(-1).amax(-1).tolist(), rel=1e-5)
    assert found["files"]["records"]["sha256"] == hashlib.sha256((tmp_path / "out" / "records.ndjson").read_bytes()).hexdigest()

    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    for name, (low, high) in summary["intervals"].items():
        assert low <= summary["metrics"][name] <= high
    assert summary["metrics"] == found["metrics"] and summary["counts"]["samples"] == 230 and summary["config"]["batch_size"] == 50
    assert summary["data"]["fingerprint"] == {"test": open_data((X, Y)).fingerprint} and summary["checkpoint"] is None
    assert np.array(summary["splits"]["test"]["confusion_matrix"]).sum() == 230


def test_metrics_are_in_the_schema_of_a_run(tmp_path):
    found = evaluate(MODEL, (X, Y), EvaluationConfig(output_dir=str(tmp_path), metrics_filename="scores.ndjson", records=False))
    assert not (tmp_path / "records.ndjson").exists()
    evaluate(MODEL, (X, Y), EvaluationConfig(output_dir=str(tmp_path), metrics_filename="scores.ndjson", bootstrap=0))
    records, torn = read_ndjson(tmp_path / "scores.ndjson", strict=True)
    rows = [record for record in records if "metric" in record]
    assert torn == 0 and len(records) == 12 and len(rows) == 10
    for record in rows:
        assert list(record) == ["$schema", "schema_version", "timestamp", "run_id", "step", "split", "metric", "value", "dataset", "tags"] \
            or record["metric"] == "confusion_matrix"
        assert record["tags"]["phase"] == "eval" and record["split"] == "test" and record["dataset"] == "TensorSamples"
    first = {record["metric"]: record for record in rows[:4]}
    assert {name: record["value"] for name, record in first.items()} == found["metrics"]
    for name, (low, high) in found["intervals"].items():
        assert (first[name]["tags"]["low"], first[name]["tags"]["high"], first[name]["tags"]["confidence"]) == (low, high, 0.95)
    assert "low" not in rows[5]["tags"]
    manifest = next(record for record in records if record["$schema"] == "codex_ml/manifest.v1")
    assert rows[4]["tags"]["manifest"] == manifest["manifest"] and manifest["data"]["counts"] == found["splits"]["test"]["confusion_matrix"]


def test_windows(tmp_path):
    class Last(nn.Module):
        block_size = 8

        def forward(self, x):
            return nn.functional.one_hot(x, 256).float() * 3

    (tmp_path / "text.txt").write_text("aab" * 100)
    found = evaluate(Last(), tmp_path / "text.txt", EvaluationConfig(output_dir=str(tmp_path / "out")), tokenizer=ByteTokenizer())
    records = lines(tmp_path / "out" / "records.ndjson")
    assert len(records) == found["counts"]["samples"] == 37 and found["counts"]["places"] == 37 * 8
    assert records[0]["target"] == list(b"abaabaab") and records[0]["prediction"] == list(b"aabaabaa") and records[0]["places"] == 8
    assert sum(record["correct"] for record in records) / (37 * 8) == pytest.approx(found["metrics"]["accuracy"])
    assert found["data"]["name"].endswith("text.txt")
    assert found["metrics"]["perplexity"] == pytest.approx(math.exp(found["metrics"]["loss"]))


def test_infinity_is_spelt_out(tmp_path):
    class Certain(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 3), -math.inf).index_fill(1, torch.tensor([0]), 0.0)

    found = evaluate(Certain(), (X, Y), EvaluationConfig(output_dir=str(tmp_path)))
    assert found["metrics"]["loss"] == math.inf and json.loads((tmp_path / "summary.json").read_text())["metrics"]["loss"] == "Infinity"
    assert read_ndjson(tmp_path / "eval.ndjson")[0][0]["value"] == math.inf


def test_a_failure_leaves_the_earlier_evaluation(tmp_path):
    config = EvaluationConfig(output_dir=str(tmp_path))
    evaluate(MODEL, (X, Y), config)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    class Late(nn.Module):
        def forward(self, x):
            return torch.where(x[:, :1] == X[200, 0], math.nan, MODEL(x))

    with pytest.raises(NotFinite, match="NaN at sample 200"):
        evaluate(Late(), (X, Y), config)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        evaluate(MODEL, (X, Y), EvaluationConfig(output_dir=str(tmp_path / "file")))


# ---- what cannot be

class Empty(Dataset):
    def __len__(self):
        return 0

    def __getitem__(self, i):
        raise IndexError


@pytest.mark.parametrize(("data", "error", "said"), [
    (Empty(), DataError, "empty"), ([], DataError, "empty"), ((X, torch.full((230,), -100)), MetricError, "every target is -100"),
    ((X, torch.full((230,), 7)), MetricError, "a target is 7"), ((X, X), MetricError, "no metric follows"),
])
def test_data_that_cannot_be_judged(data, error, said):
    with pytest.raises(error, match=said):
        evaluate(MODEL, data)


def test_an_iterable_that_yields_nothing():
    class Nothing:
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match="yielded"):
        evaluate(MODEL, Nothing())


@pytest.mark.parametrize(("values", "said"), [
    ({"bootstrap": -1}, "bootstrap=-1"), ({"confidence": 1.0}, "confidence"), ({"batch_size": 0}, "batch_size"),
    ({"max_steps": 0}, "max_steps"), ({"metrics": []}, "metrics"), ({"metrics": "accuracy"}, "metrics"), ({"seed": -3}, "seed"),
    ({"metric_args": {"f1": 3}}, "metric_args"),
    ({"metrics_filename": " "}, "metrics_filename"), ({"splits": "train"}, "splits"), ({"top_k": True}, "top_k"),
])
def test_configuration_that_cannot_be(values, said):
    with pytest.raises(ConfigError, match=said):
        evaluate(MODEL, (X, Y), EvaluationConfig(**values))


def test_an_unknown_metric_writes_nothing(tmp_path):
    with pytest.raises(UnknownName, match="did you mean 'accuracy'"):
        evaluate(MODEL, (X, Y), EvaluationConfig(metrics=["acuracy"], output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


# ---- what it shows

def test_a_result_shows_itself():
    found = evaluate(MODEL, (X, Y))
    assert isinstance(found, dict) and json.loads(json.dumps(found)) == json.loads(json.dumps(dict(found)))
    text = repr(found)
    assert "230 samples" in text and len(text.splitlines()) == 5 and " – " in text
    hostile = EvaluationResult({"metrics": {"</td><script>": 1.0}, "intervals": {}, "split": "<img>", "data": {"name": "<b>"}})
    assert "<script" not in hostile._repr_html_() and "<img" not in hostile._repr_html_() and "<b>" not in hostile._repr_html_()
    for gone in found:
        assert repr(EvaluationResult({k: v for k, v in found.items() if k != gone}))
        assert EvaluationResult(found | {gone: None})._repr_html_().startswith("<table>")


# ---- runs

def test_a_run_that_validated_itself_on_less_says_so(tmp_path):
    options = {"model_args": {"dim": 16, "layers": 1, "heads": 2}, "block_size": 16, "steps_per_epoch": 2, "epochs": 1, "progress": "off"}
    trained = run_training(checkpoint_dir=tmp_path, eval_steps=3, **options)
    few = evaluate_run(tmp_path, EvaluationConfig(max_steps=3, bootstrap=0, records=False, batch_size=16))
    assert few["metrics"]["loss"] == pytest.approx(trained["metrics"]["val_loss"], rel=1e-5) and few["notes"] == []
    # all of it would be thousands of batches, so the note is looked for where the limit is that of the configuration
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("codex_ml.evaluate_run.evaluate", lambda *_, subject, **__: subject)
        assert any("validated itself on 3 batches" in note and "max_steps=3" in note for note in evaluate_run(tmp_path).notes)


def test_a_run_is_judged_as_it_judged_itself(run):
    folder, trained = run
    best = min(trained["metrics_history"], key=lambda row: row["val_loss"])
    history = trained["metrics_history"]
    for which, row in ((None, history[-1]), ("latest", history[-1]), ("epoch-0001", history[0]), ("best", best)):
        found = evaluate_run(folder, checkpoint=which)
        assert found["checkpoint"]["epoch"] == row["epoch"]
        assert found["metrics"]["loss"] == pytest.approx(row["val_loss"], rel=1e-6)
        assert found["metrics"]["accuracy"] == pytest.approx(row["val_accuracy"]) and found["run_id"] == trained["run_id"]
    out = folder / "evaluation" / "epoch-0001"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["checkpoint"]["sha256"] == json.loads((folder / "epoch-0001" / "metadata.json").read_text())["checkpoint_sha256"]
    assert len(lines(out / "records.ndjson")) == summary["counts"]["samples"]
    record = read_ndjson(out / "eval.ndjson")[0][0]
    assert record["step"] == 8 and record["split"] == "validation"
    assert record["tags"]["checkpoint_sha256"] == summary["checkpoint"]["sha256"]


def test_a_corrupt_checkpoint_is_refused(copy):
    weights = copy / "epoch-0003" / "checkpoint.pt"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    for which in (None, "latest", "epoch-0003"):
        with pytest.raises(CheckpointError, match=r"epoch-0003.*It is not evaluated.*checkpoint=epoch-0002"):
            evaluate_run(copy, checkpoint=which)
    assert not (copy / "evaluation").exists()
    assert evaluate_run(copy, checkpoint="epoch-0002")["checkpoint"]["name"] == "epoch-0002"
    (copy / "epoch-0002" / "metadata.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be verified"):
        evaluate_run(copy, checkpoint="epoch-0002")
    (copy / "epoch-0001" / "checkpoint.pt").unlink()
    with pytest.raises(CheckpointError, match="No other one verifies"):
        evaluate_run(copy)


def test_a_broken_one_does_not_quietly_leave_the_contest_for_the_best(copy):
    (copy / "epoch-0002" / "metadata.json").write_text("{")
    assert "epoch-0002 has no metadata" in choose_checkpoint(copy, "best")[2][0]
    assert "epoch-0002 has no metadata" in evaluate_run(copy, checkpoint="best")["notes"][0]


def test_a_checkpoint_that_is_not_there(copy):
    with pytest.raises(CheckpointError, match="did you mean 'epoch-0003'"):
        evaluate_run(copy, checkpoint="epoch-003")
    for epoch in (1, 2, 3):
        shutil.rmtree(copy / f"epoch-000{epoch}")
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        evaluate_run(copy)


def test_data_that_changed_are_refused(copy, run, tmp_path):
    recorded = json.loads((copy / "config.resolved.json").read_text())
    (tmp_path / "other.txt").write_text("something else altogether\n" * 300)
    recorded["values"]["data"]["value"] = str(tmp_path / "other.txt")
    (copy / "config.resolved.json").write_text(json.dumps(recorded))
    with pytest.raises(DataError, match="was trained on sha256:.*data=PATH"):
        evaluate_run(copy)
    found = evaluate_run(copy, data=str(tmp_path / "other.txt"))
    assert found["split"] == "test" and found["data"]["name"].endswith("other.txt")
    tokens = open_data(tmp_path / "other.txt", block_size=32, eval_fraction=0)
    assert found["counts"]["samples"] == len(tokens.train)


def test_no_run(tmp_path):
    with pytest.raises(ConfigError, match="is no run"):
        evaluate_run(tmp_path)


def test_objects_of_the_caller(tmp_path):
    net = lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    run_training(model=net, data=(X, Y), eval_data=(X[:60], Y[:60]), epochs=1, progress="off", checkpoint_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"a model of its caller's own.*model=Net"):
        evaluate_run(tmp_path / "run", data=(X, Y))
    with pytest.raises(DataError, match=r"give what to judge on"):
        evaluate_run(tmp_path / "run", model=net)
    found, module = evaluate_run(tmp_path / "run", model=net, data=(X[:60], Y[:60])), net()
    assert found["metrics"] == evaluate_run(tmp_path / "run", model=module, data=(X[:60], Y[:60]))["metrics"]
    recorded = json.loads((tmp_path / "run" / "epoch-0001" / "metadata.json").read_text())["metrics"]
    assert found["metrics"]["loss"] == pytest.approx(recorded["val_loss"], rel=1e-6)
    other = nn.Linear(4, 3)
    before = other.weight.clone()
    with pytest.raises(CheckpointError, match=r"0.weight: \(8, 4\) in the checkpoint, absent in the model"):
        evaluate_run(tmp_path / "run", model=other, data=(X, Y))
    assert torch.equal(other.weight, before)


def test_a_buffer_that_no_checkpoint_holds_is_drawn_as_in_the_run(tmp_path):
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("projection", torch.randn(4, 6), persistent=False)
            self.output = nn.Linear(6, 3)

        def forward(self, x):
            return self.output(x @ self.projection)

    trained = run_training(model=Projected, data=(X, Y), eval_data=(X, Y), epochs=1, progress="off", checkpoint_dir=tmp_path)
    torch.manual_seed(99)
    found = evaluate_run(tmp_path, model=Projected, data=(X, Y))
    assert found["metrics"]["loss"] == pytest.approx(trained["metrics"]["val_loss"], rel=1e-6)


def test_what_the_folder_says_about_objects_counts(copy):
    recorded = json.loads((copy / "config.resolved.json").read_text())
    cases = (["loss_fn"], None, "loss_fn"), (["eval_data"], DataError, "caller's own"), (["model"], ConfigError, "model=Net")
    for objects, error, said in cases:
        (copy / "config.resolved.json").write_text(json.dumps({**recorded, "objects": objects}))
        if error is None:
            assert said in evaluate_run(copy)["notes"][0]
            assert not evaluate_run(copy, loss_fn=lambda model, batch: model(batch[0]).mean())["notes"]
        else:
            with pytest.raises(error, match=said):
                evaluate_run(copy)


def test_random_state_is_as_it_was_after_a_run(run):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    evaluate_run(run[0], EvaluationConfig(bootstrap=0, records=False))
    assert torch.equal(torch.get_rng_state(), before)


# ---- the command

def test_the_command(copy, capsys):
    assert main([str(copy), "checkpoint=epoch-0002", "metrics=perplexity,accuracy", "bootstrap=50", "device=cpu"]) == 0
    out = capsys.readouterr().out
    assert "epoch-0002" in out and "perplexity" in out and "checkpoint_sha256" in out and "summary.json" in out
    assert len(lines(copy / "evaluation" / "epoch-0002" / "eval.ndjson")) == 2


@pytest.mark.parametrize(("words", "code", "said"), [
    (["metrics=acuracy"], 2, "did you mean 'accuracy'"), (["metrcs=accuracy"], 2, "did you mean 'metrics'"),
    (["bootstrap=many"], 2, "a whole number"), (["records"], 2, "key=value"), (["checkpoint=epoch-0009"], 4, "has no checkpoint"),
    (["data=/nowhere/at/all.txt"], 2, "nowhere"), (["device=cuda:77"], 2, "device"), (["output_dir=/proc/none"], 5, "cannot write"),
    (["metrics=top_k", "top_k=300"], 2, "from 1 to 256"), (["splits=test"], 2, "no split"), (["batch_size=0"], 2, "batch_size"),
    (["records=maybe"], 2, "true or false"), (["metric_args={"], 2, "JSON"),
])
def test_exit_codes(run, words, code, said, capsys):
    assert main([str(run[0]), *words]) == code
    err = capsys.readouterr().err
    assert said in err and err.startswith("codex-ml evaluate: ") and "Traceback" not in err


def test_exit_codes_of_broken_things(copy, tmp_path, capsys, monkeypatch):
    assert main([str(tmp_path / "none")]) == 2
    (copy / "epoch-0003" / "checkpoint.pt").write_bytes(b"no")
    assert main([str(copy)]) == 4
    (copy / "config.resolved.json").write_text("{")
    assert main([str(copy)]) == 4
    assert main([]) == 2 and main(["--help"]) == 0
    from codex_ml import evaluate_run as module

    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "evaluate_run", interrupted)
    monkeypatch.setattr(module, "evaluation_of", lambda folder: EvaluationConfig())
    assert main([str(copy)]) == 130


def test_nan_weights_have_a_code_of_their_own(copy, capsys, monkeypatch):
    from codex_ml import evaluate_run as module

    def broken(*arguments, **keywords):
        raise NotFinite("the model's output is NaN at sample 0")

    monkeypatch.setattr(module, "evaluate", broken)
    assert main([str(copy)]) == 7


def test_words():
    words = ["metrics=accuracy, f1", "max_steps=null", "confidence=0.9", "records=false", 'metric_args={"f1": {}}', "seed=7"]
    assert parse_words(words) == {
        "metrics": ["accuracy", "f1"], "max_steps": None, "confidence": 0.9, "records": False, "metric_args": {"f1": {}}, "seed": 7}
    assert all(f"  {name} " in usage() for name in vars(EvaluationConfig()))
    assert replace(EvaluationConfig(), **parse_words(["top_k=3"])).top_k == 3
