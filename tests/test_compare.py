"""Runs side by side: what is said of their bits, what differs, and pages that hold whatever a run wrote as text."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from codex_ml.telemetry.charts import Curve, chart, plain
from codex_ml.telemetry.compare import UnknownMetric, choose_metrics, compare, compare_runs, differing, run_names, same_bits
from codex_ml.telemetry.ndjson import NdjsonWriter
from codex_ml.telemetry.page import Figure, Report, Table, Words, as_html, as_markdown, as_text
from codex_ml.telemetry.record import event_record, scalar_record
from codex_ml.telemetry.runs import open_run

HOSTILE = "</script><script>alert(1)</script>\"'&<img src=x onerror=y>|`*_[a](http://b)\x1b[2J\n# title"


def make(folder: Path, losses: list[float], *records: dict, config: dict | None = None, environment: dict | None = None) -> Path:
    writer = NdjsonWriter(folder / ".codex/metrics.ndjson")
    data = {"epochs": 2, "config": config or {}, "environment": environment or {}}
    writer.emit(event_record("run", 0, "run_start", data=data))
    for step, value in enumerate(losses, 1):
        writer.emit(scalar_record("run", step, "train", "loss", value))
    for record in records:
        writer.emit(record)
    writer.close()
    return folder


def saved(folder: Path, **hashes: str) -> Path:
    for name, digest in hashes.items():
        place = folder / name.replace("_", "-")
        place.mkdir(parents=True)
        (place / "metadata.json").write_text(json.dumps({"epoch": int(name[-4:]), "global_step": 10, "checkpoint_sha256": digest * 64}))
    return folder


def text_of(capsys: pytest.CaptureFixture[str], *paths: Path, **how) -> str:
    assert compare(paths, **how) == 0
    return capsys.readouterr().out


# ---- bits

def test_equal_hashes_are_said_in_words(tmp_path: Path, capsys) -> None:
    a = saved(make(tmp_path / "a", [1.0]), epoch_0001="1", epoch_0002="2")
    b = saved(make(tmp_path / "b", [1.0]), epoch_0001="1", epoch_0002="2")
    c = saved(make(tmp_path / "c", [1.0]), epoch_0001="1", epoch_0002="3")
    text = text_of(capsys, a, b, c)
    assert "A and B: same bits (epoch-0001 to epoch-0002; 222222222222)" in text
    assert "A and C: same bits up to epoch-0001, other bits in epoch-0002" in text


def test_hashes_of_deleted_checkpoints_count(tmp_path: Path, capsys) -> None:
    gone = event_record("run", 10, "checkpoint", data={"path": "runs/a/epoch-0001", "sha256": "1" * 64, "epoch": 1, "bytes": 5})
    a, b = saved(make(tmp_path / "a", [1.0], gone), epoch_0002="2"), saved(make(tmp_path / "b", [1.0]), epoch_0001="1")
    assert "same bits (epoch-0001; 111111111111)" in text_of(capsys, a, b)


@pytest.mark.parametrize(("one", "two", "said"), [
    ({}, {"epoch-0001": "1"}, "A has no checkpoint"), ({"epoch-0001": "1"}, {}, "B has no checkpoint"),
    ({"epoch-0001": "1"}, {"epoch-0002": "1"}, "nothing can be said"),
    ({"epoch-0001": "1"}, {"epoch-0001": "2"}, "other bits from the first common checkpoint on (epoch-0001)"),
    ({"epoch-9999": "1", "epoch-10000": "2"}, {"epoch-9999": "1", "epoch-10000": "3"}, "up to epoch-9999, other bits in epoch-10000"),
    ({"epoch-0001": "1", "epoch-0002": "2"}, {"epoch-0001": "9", "epoch-0002": "2"}, "B: other bits in epoch-0001"),
])
def test_what_hashes_say(one: dict, two: dict, said: str) -> None:
    assert said in same_bits(one, two)


# ---- what differs

def test_only_differences_are_listed(tmp_path: Path, capsys) -> None:
    def run(name: str, lr: float, device: str) -> Path:
        return make(tmp_path / name, [1.0], config={"seed": 1, "lr": lr, "checkpoint.dir": name},
                    environment={"torch": "2", "device": {"type": device}})

    text = text_of(capsys, run("a", 0.1, "cpu"), run("b", 0.2, "cuda"))
    assert re.search(r"^lr +0\.1 +0\.2$", text, re.M) and re.search(r"^device.type +cpu +cuda$", text, re.M)
    assert "seed" not in text and "checkpoint.dir" not in text and "torch" not in text


def test_types_and_absence_are_differences() -> None:
    assert differing([{"a": 1}, {"a": True}]) == [("a", ["1", "true"])]
    assert differing([{"a": None}, {"b": 1}]) == [("a", ["null", "–"]), ("b", ["–", "1"])]
    assert differing([{"a": [1, 2]}, {"a": [1, 2]}, {}]) == []


def test_no_difference_and_nothing_recorded_are_said(tmp_path: Path, capsys) -> None:
    a, b = make(tmp_path / "a", [1.0], config={"seed": 1}), make(tmp_path / "b", [1.0], config={"seed": 1})
    text = text_of(capsys, a, b)
    assert "configuration\n- no difference" in text and "environment\n- not recorded, so not compared" in text


# ---- metrics

def test_the_best_is_marked_where_its_direction_is_known(tmp_path: Path, capsys) -> None:
    def more(v: float) -> list[dict]:
        return [scalar_record("run", 9, "validation", name, v) for name in ("val_loss", "val_accuracy", "mystery")]

    a, b = make(tmp_path / "a", [3.0, 1.0, 2.0], *more(0.25)), make(tmp_path / "b", [3.0, 2.0, 1.5], *more(0.5))
    text = text_of(capsys, a, b)
    for label, first, second in (("val_loss, last", "0.25*", "0.5"), ("val_accuracy, best", "0.25 at 9", "0.5 at 9*"),
                                 ("mystery, last", "0.25", "0.5"), ("loss (training), best", "1 at 2*", "1.5 at 3")):
        assert re.search(rf"^{re.escape(label)} +{re.escape(first)} +{re.escape(second)}$", text, re.M), label
    assert "mystery, best" not in text


def test_metrics_can_be_chosen(tmp_path: Path, capsys) -> None:
    a = make(tmp_path / "a", [1.0, 2.0], *(scalar_record("run", 1, "train", name, 1.0) for name in ("lr", "x")))
    assert "lr" not in text_of(capsys, a, a) and "lr (training), last" in text_of(capsys, a, a, metrics=["lr"])
    assert compare([a], metrics=["losss"]) == 2
    assert "did you mean 'loss'?" in capsys.readouterr().err


def test_many_metrics_are_not_all_shown(tmp_path: Path) -> None:
    view = open_run(make(tmp_path, [1.0], *(scalar_record("run", 1, "validation", f"m{i:03}", 1.0) for i in range(300))))
    keys, left_out = choose_metrics([view])
    assert len(keys) == 12 and left_out == 289
    assert len(choose_metrics([view], ["m250"])[0]) == 1
    with pytest.raises(UnknownMetric, match="there are"):
        choose_metrics([view], ["nothing like it"])
    view.close()


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    views = [open_run(make(tmp_path / p, [1.0])) for p in ("x/a", "y/a", "y/b")]
    assert run_names(views) == ["x/a", "y/a", "y/b"] and run_names(views[1:]) == ["a", "b"]
    assert run_names([views[0], views[0]]) == ["a/metrics.ndjson"] * 2
    for view in views:
        view.close()


@pytest.mark.parametrize("losses", [
    [], [1.0], [float("nan")] * 3, [float("inf"), 1.0, float("-inf")], [1e-300, 1e300], [0.0, 0.0], [-1.0, 5.0]])
@pytest.mark.parametrize("form", ["text", "markdown", "html"])
def test_odd_curves_are_compared(tmp_path: Path, capsys, losses: list[float], form: str) -> None:
    a, b = make(tmp_path / "a", losses), make(tmp_path / "b", [1.0, 2.0])
    text = text_of(capsys, a, b, a, output=form)
    assert "finished" not in text and (form != "html" or Checked(text).balanced)


# ---- forms

class Checked(HTMLParser):
    """A page, its elements counted and its text and attributes collected."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.balanced, self.tags, self.links, self.scripts = True, [], [], []
        self.feed(page)
        self.balanced = self.balanced and not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action") or k.startswith("on")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        self.balanced = self.balanced and bool(self.open) and self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def hostile_report() -> Report:
    steps = np.arange(5.0)
    curves = [Curve(HOSTILE, steps, steps), Curve("b", steps, np.array([1.0, math.nan, 3.0, math.inf, 5.0]))]
    return Report(HOSTILE, [HOSTILE, "b"], [
        Table(HOSTILE, [(HOSTILE, [HOSTILE, "1"])], frozenset({(0, 0)})), Words(HOSTILE, [HOSTILE]), Figure(HOSTILE, curves)])


def test_a_page_needs_nothing_and_runs_nothing_of_what_a_run_wrote() -> None:
    page = as_html(hostile_report())
    checked = Checked(page)
    assert checked.balanced and checked.links == [] and "img" not in checked.tags and "link" not in checked.tags
    assert len(checked.scripts) == 2 and json.loads(checked.scripts[0])["curves"][1]["ys"] == [1.0, "nan", 3.0, "inf", 5.0]
    assert "alert(1)" in json.loads(checked.scripts[0])["curves"][0]["name"] and "alert(1)" not in checked.scripts[1]
    without_text = page.replace("http://b", "")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<link|<iframe", without_text)
    assert "default-src 'none'" in page and "\x1b" not in page


def test_the_policy_of_a_page_allows_its_own_script_alone() -> None:
    import base64
    import hashlib

    page = as_html(hostile_report())
    digest = base64.b64encode(hashlib.sha256(Checked(page).scripts[-1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


def test_markdown_holds_text_alone() -> None:
    text = as_markdown(hostile_report())
    outside = re.sub(r"```text\n.*?\n```", "", text, flags=re.S)
    for row in (line for line in outside.splitlines() if line.startswith("|")):
        assert len(re.findall(r"(?<!\\)\|", row)) == 4, row
    assert not re.search(r"(?<!\\)[<`]|(?<!\\)\]\(", outside) and "\x1b" not in text and "\n# title" not in text


def test_text_holds_no_control_characters() -> None:
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", as_text(hostile_report()))


def test_a_wide_table_is_continued_below() -> None:
    names = [f"run-{i}" for i in range(30)]
    text = as_text(Report("many", names, [Table("t", [("row", [str(i) * 5 for i in range(30)])])]), width=80)
    assert max(map(len, text.splitlines())) <= 80 and text.count("\nrow ") > 3 and "AD run-29" in text


def test_curves_that_meet_are_starred() -> None:
    steps = np.arange(100.0)
    drawn = plain(chart([Curve("a", steps, steps), Curve("b", steps, steps)], 40, 8, braille=False))
    assert "*" in drawn and "A" not in drawn


# ---- the command

def test_the_name_of_the_file_chooses_the_form(tmp_path: Path, capsys) -> None:
    a = make(tmp_path / "a", [1.0, 2.0])
    for name, start in (("r.html", "<!doctype html>"), ("r.md", "# Runs compared"), ("r.txt", "Runs compared")):
        assert compare([a, a], dest=tmp_path / name) == 0 and (tmp_path / name).read_text().startswith(start)
    assert compare([a, a], dest=tmp_path / "r.dat", output="markdown") == 0 and (tmp_path / "r.dat").read_text().startswith("# ")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("name", "output", "said"), [
    ("page.txt", "html", "its ending stands for text, and --output says html: leave one of the two out"),
    ("page.html", "text", "its ending stands for html, and --output says text: leave one of the two out"),
    *((name, None, "its ending does not say what to write: it can be .txt (text), .md (markdown), .html (html); or say it with --output")
      for name in ("page.csv", "page")),
])
def test_a_form_that_contradicts_the_name_is_2_and_writes_nothing(tmp_path: Path, capsys, name: str, output: str | None, said: str) -> None:
    a = make(tmp_path / "a", [1.0, 2.0])
    assert compare([a, a], dest=tmp_path / name, output=output) == 2
    assert capsys.readouterr() == ("", f"codex-ml compare: {tmp_path / name}: {said}\n") and not (tmp_path / name).exists()


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", [1.0, 2.0]), make(tmp_path / "b", [2.0])
    for name in ("1.html", "2.html"):
        assert compare([a, b], dest=tmp_path / name) == 0
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()


@pytest.mark.parametrize(("how", "code", "said"), [
    ({"output": "pdf"}, 2, "text, markdown, html"), ({"dest": "nowhere/x.html"}, 5, "cannot write"),
    ({"metrics": ["?"]}, 2, "no run has a metric")])
def test_what_cannot_be_is_told(tmp_path: Path, monkeypatch, capsys, how: dict, code: int, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    a = make(tmp_path / "a", [1.0])
    assert compare([a], **how) == code
    assert said in capsys.readouterr().err


def test_no_run_is_told(tmp_path: Path, capsys) -> None:
    assert compare([tmp_path / "nowhere"]) == 2 and compare([]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_trouble_stands_in_the_notes(tmp_path: Path, capsys) -> None:
    resume = event_record("run", 0, "run_start", data={"resumed_from": "step-00000000"})
    a, b = make(tmp_path / "a", [1.0]), make(tmp_path / "b", [1.0], resume)
    with (a / ".codex/metrics.ndjson").open("ab") as file:
        file.write(b"nonsense\n")
    text = text_of(capsys, a, b)
    assert "A: metrics: 1 unreadable (metrics.ndjson:3" in text and "B: 1 values were measured again" in text


def test_long_runs_keep_their_best(tmp_path: Path, monkeypatch) -> None:
    losses = [2.0] * 60_000
    losses[34_567] = 0.5
    lines = [json.dumps(scalar_record("run", i, "train", "loss", v, timestamp="2026-11-24T08:30:00.000000Z")) for i, v in enumerate(losses)]
    (tmp_path / "metrics.ndjson").write_text("\n".join(lines) + "\n")
    view = open_run(tmp_path / "metrics.ndjson")
    view.history.halve_longest()
    report = compare_runs([view])
    assert ("loss (training), best", ["0.5 at 34,567"]) in report.parts[1].rows
    assert "thinned" in report.parts[-1].lines[0] and len(as_html(report)) < 100_000
    view.close()
