import copy
import json
import math
import pickle
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from codex_ml.result import TrainingResult

WHOLE = {
    "status": "completed", "resumed": True, "resume_meta": {"checkpoint": "epoch-0002"}, "final_epoch": 4, "epochs": 4,
    "loss_history": [2.4, 1.9, math.nan, 1.5], "metrics": {"train_loss": 1.5, "val_loss": 1.55, "name": "x", "count": 3},
    "metrics_history": [{"epoch": e, "val_loss": 2.0 / e} for e in range(1, 5)],
    "learning_rate_history": [[1e-3, 1e-4]] * 4, "total_steps": 400, "optimizer_steps": 200, "wall_time_sec": 61.25,
    "checkpoint_dir": "runs/a", "checkpoint_last": "epoch-0004", "checkpoint_sha256_last": "ab" * 32, "callback_errors": [{}, {}],
    "sink_errors": {"ndjson": 7},
}


def test_it_is_a_dictionary():
    result = TrainingResult(WHOLE, model=torch.nn.Linear(1, 1), data="data")
    assert result == WHOLE and dict(**result) == WHOLE and isinstance(result, dict)
    assert json.loads(json.dumps(TrainingResult(WHOLE | {"loss_history": [1.0]})))["status"] == "completed"
    for twin in (copy.copy(result), copy.deepcopy(TrainingResult(WHOLE, data="data")), pickle.loads(pickle.dumps(result))):
        assert twin.keys() == result.keys() and twin.data == "data" and type(twin) is TrainingResult
    result |= {"more": 1}
    assert type(result) is TrainingResult and result.model is not None


def test_what_it_shows():
    text = repr(TrainingResult(WHOLE))
    assert len(text.splitlines()) == 9 and all(len(line) < 100 for line in text.splitlines())
    for part in ("completed at epoch 4 of 4", "from epoch-0002", "2.4000 → 1.5000", "val_loss", "400 (200 updates) in 61.2 s",
                 "runs/a/epoch-0004", "ab" * 32):
        assert part in text, part


@pytest.mark.parametrize("missing", [*WHOLE, "all"])
@pytest.mark.parametrize("as_none", [False, True])
def test_nothing_that_is_missing_keeps_it_from_showing(missing, as_none):
    gone = set(WHOLE) if missing == "all" else {missing}
    entries = {k: v for k, v in WHOLE.items() if k not in gone} | (dict.fromkeys(gone) if as_none else {})
    result = TrainingResult(entries)
    assert "status" in repr(result) and "<table>" in result._repr_html_()
    result.plot()


HOSTILE = "</td><script>alert(1)</script><img src=x onerror='alert(1)'>\"&"


def test_html_is_escaped_and_well_formed():
    result = TrainingResult(WHOLE | {"status": HOSTILE, "checkpoint_dir": HOSTILE, "metrics": {HOSTILE: 1.0}})
    html = result._repr_html_()
    assert "<script" not in html and "<img" not in html and len(html) < 6000
    tree = ElementTree.fromstring(f"<div>{html}</div>")
    assert {element.tag for element in tree.iter()} == {"div", "table", "tr", "th", "td", "svg", "polyline"}
    assert not any(name.startswith("on") for element in tree.iter() for name in element.attrib)


@pytest.mark.parametrize("losses,points", [
    ([], 0), ([1.0], 0), ([1.0, 1.0], 2), ([math.nan, math.inf, 1.0], 0), ([math.nan, 2.0, -math.inf, 1.0, 3], 3), ([None, 2.0, 1.0], 2),
])
def test_the_sparkline_stays_in_its_frame(losses, points):
    html = TrainingResult({"loss_history": losses})._repr_html_()
    found = re.findall(r"([\d.-]+),([\d.-]+)", re.search(r"points='([^']*)'", html)[1]) if "<svg" in html else []
    assert len(found) == points
    assert all(0 <= float(x) <= 240 and 0 <= float(y) <= 40 for x, y in found)


def test_the_plot():
    figure = TrainingResult(WHOLE).plot()
    losses, rates = figure.axes
    assert [line.get_label() for line in losses.lines] == ["training", "validation"] and len(rates.lines) == 2
    assert list(losses.lines[1].get_ydata()) == [2.0, 1.0, 2 / 3, 0.5] and list(rates.lines[0].get_ydata()) == [1e-3] * 4


def test_the_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'codex_ml\[plot\]'"):
        TrainingResult(WHOLE).plot()
