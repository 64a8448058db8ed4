"""Values of metrics against hand computations, scikit-learn and torchmetrics; intervals against a plain bootstrap and by their coverage."""

import math

import numpy as np
import pytest
import torch

from codex_ml import registry
from codex_ml.bootstrap import BLOCK, Resampled, draws, interval
from codex_ml.metric_sources import Whole, find_metric
from codex_ml.metrics import Metric, MetricError, NotFinite, confusion_matrix, scored, usual_metrics
from codex_ml.registry import ArgumentError, UnknownName, register

GENERATOR = torch.Generator().manual_seed(0)
SCORES = torch.randn(500, 7, generator=GENERATOR)
CLASSES = torch.where(torch.rand(500, generator=GENERATOR) < 0.5, SCORES.argmax(-1), torch.randint(0, 6, (500,), generator=GENERATOR))
VALUES, TRUTH = torch.randn(200, 3, generator=GENERATOR), torch.randn(200, 3, generator=GENERATOR)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def value(name, output, target, portion=None, **args):
    """A metric over a data set that is cut into portions."""
    found, totals = None, 0
    for begin in range(0, len(target), portion or len(target)):
        batch = scored(output[begin:begin + (portion or len(target))], target[begin:begin + (portion or len(target))])
        found = found or find_metric(name, batch.output.shape[-1] if batch.kind == "classes" else None, args)
        if isinstance(found, Whole):
            found.update(batch)
        else:
            totals = totals + found.rows(batch).sum(0)
    return found.compute()[found.name] if isinstance(found, Whole) else float(found.value(totals))


# ---- values

@pytest.mark.parametrize("portion", [None, 1, 64])
def test_classes_against_scikit_learn(portion):
    sklearn = pytest.importorskip("sklearn.metrics")
    y, p, probabilities = CLASSES.numpy(), SCORES.argmax(-1).numpy(), SCORES.softmax(-1).double().numpy()
    probabilities /= probabilities.sum(1, keepdims=True)
    assert value("accuracy", SCORES, CLASSES, portion) == pytest.approx(sklearn.accuracy_score(y, p))
    for average in ("macro", "micro", "weighted"):
        assert value(f"f1_{average}", SCORES, CLASSES, portion) == pytest.approx(sklearn.f1_score(y, p, average=average))
    for k in (1, 3, 6):
        expected = sklearn.top_k_accuracy_score(y, probabilities, k=k, labels=range(7))
        assert value("top_k", SCORES, CLASSES, portion, top_k=k) == pytest.approx(expected)
    assert value("loss", SCORES, CLASSES, portion) == pytest.approx(sklearn.log_loss(y, probabilities, labels=range(7)), rel=1e-5)
    assert (confusion_matrix(scored(SCORES, CLASSES)) == sklearn.confusion_matrix(y, p, labels=range(7))).all()


def test_values_against_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    assert value("mse", VALUES, TRUTH, 32) == pytest.approx(sklearn.mean_squared_error(TRUTH, VALUES))
    assert value("rmse", VALUES, TRUTH, 32) == pytest.approx(math.sqrt(sklearn.mean_squared_error(TRUTH, VALUES)))
    assert value("mae", VALUES, TRUTH, 32) == pytest.approx(sklearn.mean_absolute_error(TRUTH, VALUES))
    assert value("loss", VALUES, TRUTH, 32) == pytest.approx(torch.nn.functional.mse_loss(VALUES, TRUTH).item())


def test_by_hand():
    # three classes; predicted 0 1 1 2 2 2, true 0 1 2 2 2 0: F1 of class 0 is 2/3, of 1 is 2/3, of 2 is 4/6
    output, target = torch.eye(3)[torch.tensor([0, 1, 1, 2, 2, 2])] * 5, torch.tensor([0, 1, 2, 2, 2, 0])
    assert value("accuracy", output, target) == pytest.approx(4 / 6)
    assert value("f1", output, target) == pytest.approx((2 / 3 + 2 / 3 + 4 / 6) / 3)
    assert value("f1_micro", output, target) == value("accuracy", output, target)
    assert value("f1_weighted", output, target) == pytest.approx(2 / 3)
    uniform = torch.zeros(4, 9, 11)
    assert value("perplexity", uniform, torch.randint(0, 11, (4, 9))) == pytest.approx(11)


def test_f1_leaves_out_classes_that_do_not_occur():
    output, target = torch.eye(9)[torch.tensor([0, 1])], torch.tensor([0, 1])
    assert value("f1_macro", output, target) == 1.0


@pytest.mark.parametrize("bins", [1, 2, 10, 15])
def test_calibration_error_by_hand(bins):
    probabilities, target = SCORES.softmax(-1).double(), CLASSES
    confidence, prediction = probabilities.max(-1)
    expected = 0.0
    for b in range(bins):
        held = [i for i in range(len(target)) if b / bins < confidence[i] <= (b + 1) / bins]
        if held:
            share = sum(int(prediction[i] == target[i]) for i in held) / len(held)
            expected += len(held) / len(target) * abs(share - sum(float(confidence[i]) for i in held) / len(held))
    assert value("calibration_error", SCORES, target, 17, num_bins=bins) == pytest.approx(expected, abs=1e-6)
    assert value("ece", SCORES, target, num_bins=bins) == pytest.approx(expected, abs=1e-6)


def test_a_confidence_on_an_edge_belongs_below():
    output = torch.tensor([[0.0, 0.0], [math.log(0.9), math.log(0.1)]], dtype=torch.float64)  # 0.5 and right, 0.9 and wrong
    assert value("calibration_error", output, torch.tensor([0, 1]), num_bins=2) == pytest.approx((0.5 + 0.9) / 2)


def test_perfectly_sure_and_right_is_calibrated():
    output = torch.eye(3)[torch.tensor([0, 1, 2])] * 1e4  # a confidence of exactly one
    assert value("calibration_error", output, torch.tensor([0, 1, 2])) == 0
    assert value("calibration_error", output, torch.tensor([1, 2, 0])) == 1


@pytest.mark.parametrize("shape", ["last", "second"])
def test_scores_may_come_last_or_second(shape):
    output, target = torch.randn(6, 5, 4, generator=GENERATOR), torch.randint(0, 4, (6, 5), generator=GENERATOR)
    expected = torch.nn.functional.cross_entropy(output.flatten(0, 1), target.flatten()).item()
    assert value("loss", output if shape == "last" else output.movedim(-1, 1), target, 4) == pytest.approx(expected, rel=1e-6)


def test_ignored_targets_do_not_count():
    output, target = torch.randn(6, 5, 4, generator=GENERATOR), torch.randint(0, 4, (6, 5), generator=GENERATOR)
    target[:, 3:] = -100
    for name in ("loss", "accuracy", "f1", "calibration_error", "top_k"):
        args = {"top_k": 2} if name == "top_k" else {}
        assert value(name, output, target, **args) == pytest.approx(value(name, output[:, :3], target[:, :3], **args)), name
    assert confusion_matrix(scored(output, target)).sum() == 18


def test_equal_scores_give_no_model_full_marks():
    output, target = torch.zeros(8, 4), torch.arange(8) % 4
    assert value("top_k", output, target, top_k=2) == 0.5 and value("accuracy", output, target) == 0.25


def test_half_precision_is_judged_in_single():
    assert value("loss", SCORES.bfloat16(), CLASSES) == pytest.approx(value("loss", SCORES.bfloat16().float(), CLASSES))


def test_masked_scores_are_no_error():
    output = SCORES.clone()
    output[:, 6] = -math.inf
    assert math.isfinite(value("perplexity", output, CLASSES.clamp(max=5)))
    assert value("loss", output, torch.full((500,), 6)) == math.inf


# ---- what cannot be

@pytest.mark.parametrize(("output", "target", "said"), [
    (torch.zeros(4, 3), torch.zeros(3).long(), "no metric follows from an output of shape"),
    (torch.zeros(4, 3), torch.zeros(4, 2), "no metric follows"),
    (torch.zeros(4, 1), torch.zeros(4).long(), "a single class"),
    (torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]), "a target is 3 or below 0, and the model scores 3 classes"),
    (torch.zeros(4, 3), torch.tensor([0, 1, 2, -1]), "below 0"),
    ([1, 2], torch.zeros(2), "predict_fn"),
])
def test_what_cannot_be_scored(output, target, said):
    with pytest.raises(MetricError, match=said):
        scored(output, target)


def test_nan_is_told_with_its_place():
    output = SCORES.clone()
    output[123, 2] = math.nan
    with pytest.raises(NotFinite, match="NaN at sample 1123"):
        scored(output, CLASSES, first=1000)
    assert issubclass(NotFinite, MetricError) and issubclass(MetricError, ValueError)


def test_arguments_that_cannot_be():
    batch = scored(SCORES, CLASSES)
    with pytest.raises(MetricError, match="set top_k to a number from 1 to 7"):
        find_metric("top_k", args={"top_k": 8}).rows(batch)
    with pytest.raises(MetricError, match="one bin or more"):
        find_metric("calibration_error", args={"num_bins": 0})
    with pytest.raises(ArgumentError, match="did you mean 'num_bins'"):
        find_metric("calibration_error", args={"num_bin": 3})
    with pytest.raises(UnknownName, match="did you mean 'perplexity'"):
        find_metric("perplexty")
    with pytest.raises(MetricError, match="judges classes, and the targets of these data are values"):
        find_metric("accuracy").rows(scored(VALUES, TRUTH))
    with pytest.raises(MetricError, match="which is no metric"):
        find_metric(3)


# ---- metrics of one's own

def test_own_metrics():
    @register("metrics", "twice")
    def twice(output, target):
        return 2 * (output.argmax(-1) == target).float()

    assert value("twice", SCORES, CLASSES, 33) == pytest.approx(2 * value("accuracy", SCORES, CLASSES))
    assert value(twice, SCORES, CLASSES) == value("twice", SCORES, CLASSES)
    own = Metric("zero", lambda batch: np.ones((len(batch), 1)), lambda totals: 0 * totals[..., 0])
    assert find_metric(own) is own
    register("metrics", "zero", own)
    assert find_metric("zero") is own
    with pytest.raises(MetricError, match="returned 2 numbers for 500 samples"):
        find_metric(lambda output, target: [1.0, 2.0]).rows(scored(SCORES, CLASSES))


def test_an_object_with_update_and_compute():
    class Largest:
        def __init__(self, num_classes, start=0.0):
            self.num_classes, self.found = num_classes, start

        def update(self, output, target):
            self.found = max(self.found, output.max().item())

        def compute(self):
            return {"probability": self.found, "classes": self.num_classes}

    register("metrics", "largest", Largest)
    found = find_metric("largest", num_classes=7, args={"start": 0.1})
    found.update(scored(SCORES, CLASSES))
    assert found.compute() == {"largest_probability": pytest.approx(SCORES.softmax(-1).max().item()), "largest_classes": 7.0}
    with pytest.raises(MetricError, match="needs num_classes: set metric_args"):
        find_metric("largest")


def test_torchmetrics():
    pytest.importorskip("torchmetrics")
    args = {"average": "macro"}
    assert value("torchmetrics.MulticlassF1Score", SCORES, CLASSES, 50, **args) == pytest.approx(value("f1", SCORES, CLASSES), abs=1e-6)
    ours = value("ece", SCORES, CLASSES, num_bins=12)
    assert value("torchmetrics.classification.MulticlassCalibrationError", SCORES, CLASSES, n_bins=12) == pytest.approx(ours, abs=1e-6)
    assert value("torchmetrics.MeanAbsoluteError", VALUES, TRUTH, 50) == pytest.approx(value("mae", VALUES, TRUTH))
    windows, next_tokens = torch.randn(8, 5, 11, generator=GENERATOR), torch.randint(0, 11, (8, 5), generator=GENERATOR)
    assert value("torchmetrics.Perplexity", windows, next_tokens, 3) == pytest.approx(value("perplexity", windows, next_tokens), rel=1e-5)
    with pytest.raises(MetricError, match="has no MulticlassFoo"):
        find_metric("torchmetrics.MulticlassFoo")


def test_torchmetrics_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics", None)
    with pytest.raises(MetricError, match=r'pip install "codex_ml\[torchmetrics\]"'):
        find_metric("torchmetrics.MulticlassAUROC")


def test_the_usual_metrics_can_all_be_computed():
    windows = scored(torch.zeros(2, 5, 3), torch.zeros(2, 5).long())
    for batch in (scored(SCORES, CLASSES), scored(VALUES, TRUTH), windows):
        for name in usual_metrics(batch):
            found = find_metric(name)
            assert np.isfinite(found.value(found.rows(batch).sum(0))), name
    assert usual_metrics(windows) == ["loss", "perplexity", "accuracy"]


def test_values_of_resamples_are_computed_at_once():
    batch = scored(SCORES, CLASSES)
    for name in ("loss", "perplexity", "accuracy", "f1", "f1_micro", "f1_weighted", "calibration_error", "top_k"):
        found = find_metric(name)
        rows = found.rows(batch)
        totals = np.stack([rows[:100].sum(0), rows.sum(0)])
        assert found.value(totals) == pytest.approx([float(found.value(t)) for t in totals]), name


# ---- resampling

def test_resampling_does_not_depend_on_the_portions():
    rows = np.random.default_rng(1).normal(size=(2 * BLOCK + 77, 3))
    sums = []
    for portion in (1, 13, BLOCK, BLOCK + 1, len(rows)):
        one = Resampled(7, 300)
        for begin in range(0, len(rows), portion):
            one.add(rows[begin:begin + portion])
        one.finish()
        sums.append(one)
        assert one.rows == len(rows) and one.totals == pytest.approx(rows.sum(0))
    assert all(np.array_equal(s.drawn, sums[0].drawn) and np.array_equal(s.totals, sums[0].totals) for s in sums)
    other = Resampled(8, 300)
    other.add(rows)
    other.finish()
    assert not np.array_equal(other.drawn, sums[0].drawn)


def test_more_resamples_begin_with_the_fewer():
    rows = np.random.default_rng(1).normal(size=(50, 2))
    few, many = Resampled(7, 300), Resampled(7, 700)
    for sums in (few, many):
        sums.add(rows)
        sums.finish()
    assert np.allclose(few.drawn[:256], many.drawn[:256])


def test_draws_are_poisson():
    found = np.concatenate([draws(5, block, 0, 100).ravel() for block in range(10)])
    assert abs(found.mean() - 1) < 0.005 and abs(found.var() - 1) < 0.01
    shares = [math.exp(-1) / math.factorial(k) for k in range(5)]
    assert np.allclose([(found == k).mean() for k in range(5)], shares, atol=0.002)


def test_an_infinite_sum_counts_where_it_is_drawn():
    rows = np.ones((50, 2))
    rows[3, 0] = math.inf
    sums = Resampled(1, 400)
    sums.add(rows)
    sums.finish()
    values = sums.drawn[:, 0] / sums.drawn[:, 1]
    assert not np.isnan(values).any() and abs(np.isinf(values).mean() - (1 - math.exp(-1))) < 0.08
    assert interval(math.inf, values) == (1.0, math.inf)


def test_rows_of_another_width_are_refused():
    sums = Resampled(1, 10)
    sums.add(np.ones((3, 2)))
    with pytest.raises(ValueError, match="rows of 3 sums came after rows of 2"):
        sums.add(np.ones((3, 3)))


def test_intervals_agree_with_a_plain_bootstrap():
    """The same question, asked with nothing but a loop over drawn indices and percentiles."""
    random = np.random.default_rng(3)
    rows = np.stack([random.normal(2, 1, size=300), random.uniform(0.5, 1.5, size=300)], 1)
    plain = []
    for _ in range(4000):
        drawn = rows[random.integers(0, 300, size=300)].sum(0)
        plain.append(drawn[0] / drawn[1])
    sums = Resampled(11, 4000)
    sums.add(rows)
    sums.finish()
    low, high = interval(rows[:, 0].sum() / rows[:, 1].sum(), sums.drawn[:, 0] / sums.drawn[:, 1], 0.9)
    expected = np.quantile(plain, [0.05, 0.95])
    assert abs(low - expected[0]) < 0.012 and abs(high - expected[1]) < 0.012


@pytest.mark.parametrize(("confidence", "least", "most"), [(0.95, 0.91, 0.985), (0.8, 0.74, 0.86)])
def test_coverage_of_a_share(confidence, least, most):
    held = 0
    for trial in range(400):
        right = np.random.default_rng(trial).random(100) < 0.7
        sums = Resampled(trial, 400)
        sums.add(np.stack([right, np.ones(100)], 1))
        sums.finish()
        low, high = interval(right.mean(), sums.drawn[:, 0] / sums.drawn[:, 1], confidence)
        held += low <= 0.7 <= high
    assert least < held / 400 < most


def test_a_biased_metric_is_held_where_percentiles_fail():
    """A calibration error grows when samples repeat: percentiles hold the true value too rarely."""
    ece, held, plain = find_metric("calibration_error", args={"num_bins": 10}), 0, 0
    for trial in range(150):
        random = np.random.default_rng(trial)
        confidence = random.uniform(0.5, 1, size=200)
        right = random.random(200) < confidence - 0.05
        batch = scored(torch.tensor(np.stack([confidence, 1 - confidence], 1)).log(), torch.tensor(np.where(right, 0, 1)))
        sums = Resampled(trial, 300)
        sums.add(ece.rows(batch))
        sums.finish()
        drawn = ece.value(sums.drawn)
        low, high = interval(float(ece.value(sums.totals)), drawn)
        held += low <= 0.05 <= high
        plain += np.quantile(drawn, 0.025) <= 0.05 <= np.quantile(drawn, 0.975)
    assert held / 150 > 0.85 and held > plain + 5


def test_edges_of_an_interval():
    assert interval(0.5, np.full(10, 0.5)) == (0.5, 0.5)
    assert interval(0.1, np.linspace(0.5, 0.6, 100))[0] == 0.1  # widened to the value
    assert interval(0.5, np.array([math.nan, math.nan, 0.4])) is None
    assert interval(math.nan, np.ones(10)) is None
    assert interval(math.inf, np.full(10, math.inf)) == (math.inf, math.inf)
