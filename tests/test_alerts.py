import json
import logging
import math
import random
import statistics
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from codex_ml.config import ConfigError, TrainConfig
from codex_ml.telemetry.alerts import Alerts, open_alerts
from codex_ml.telemetry.conditions import CONDITIONS, Falls, Point, Rises, Span, Spike, parse_span
from codex_ml.telemetry.record import decode, encode, event_record, scalar_record, snapshot_record, structured_records
from codex_ml.telemetry.rules import PRESETS, CommandFailed, parse_rules, run_command

START = 1_800_000_000.0
NAN, INF = math.nan, math.inf


def stamp(seconds):
    return datetime.fromtimestamp(START + seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class Run:
    "Alerts with a run around them: plays records, hears what comes of it."

    def __init__(self, **rules):
        self.stream, self.stops = [], []
        self.alerts = Alerts(parse_rules(rules), record=self.stream.append, request_stop=self.stops.append)

    def log(self, step, value, metric="loss", split="train", seconds=None, dataset=None):
        when = stamp(step if seconds is None else seconds)
        self.alerts.emit(scalar_record("0f3a", step, split, metric, value, dataset, timestamp=when))

    def snapshot(self, step, seconds, **values):
        self.alerts.emit(snapshot_record("0f3a", step, values, stamp(seconds)))

    def event(self, step, seconds, event, severity="info", **data):
        self.alerts.emit(event_record("0f3a", step, event, severity, data, stamp(seconds)))

    def play(self, series, **how):
        "Values by step, one a second for each step."
        for step, value in series.items() if isinstance(series, dict) else enumerate(series, 1):
            self.log(step, value, **how)
        return self

    @property
    def heard(self):
        return [(r["data"]["state"], r["step"]) for r in self.stream]


def on(condition, **keys):
    return {"metric": "loss", "condition": condition, **keys}


# ---- each condition, on a series

@pytest.mark.parametrize(("rule", "series", "heard"), [
    (on("nan"), [1, 2, NAN, NAN, 3, INF, -INF, 1], [("firing", 3), ("resolved", 5), ("firing", 6), ("resolved", 8)]),
    (on("nan"), [NAN], [("firing", 1)]),  # the first record of all
    (on("above", value=5), [5, 5.1, 6, 5, 7], [("firing", 2), ("resolved", 4), ("firing", 5)]),
    (on("above", value=5, clear=3), [6, 4, 3.1, 6, 3, 4, 6], [("firing", 1), ("resolved", 5), ("firing", 7)]),
    (on("above", value=5), [NAN, 6, NAN, 4], [("firing", 2), ("resolved", 4)]),  # NaN says nothing
    (on("above", value=5), [INF, -INF], [("firing", 1), ("resolved", 2)]),
    (on("below", value=0.1, clear=0.2), [0.1, 0.05, 0.15, 0.2], [("firing", 2), ("resolved", 4)]),
    (on("no_progress", patience=3), [5, 4, 4, 4, 4, 3, 3], [("firing", 5), ("resolved", 6)]),
    (on("no_progress", patience=3), [NAN, NAN, NAN, NAN, 1], [("firing", 4), ("resolved", 5)]),
    (on("no_progress", patience="3s"), [5, 6, 7, 8], [("firing", 4)]),
    (on("no_progress", patience=2, min_change=0.1), [10, 9.5, 9.1, 8.9], [("firing", 3), ("resolved", 4)]),
    (on("no_progress", patience=2, direction="up"), [1, 2, 2, 1, 3], [("firing", 4), ("resolved", 5)]),
    (on("no_progress", patience=2, direction="up"), [-INF, NAN, NAN, 1], [("firing", 3), ("resolved", 4)]),
    (on("rises", value=2, window=2), [1, 2, 2.9, 3, 3, 6, 4, 4, 4], [("firing", 6), ("resolved", 7)]),
    (on("rises", value=2, window="3s"), [1, 2, 2.9, 3], [("firing", 4)]),
    (on("falls", value=2, window=10), [5, 4, 3, 2, 5.5, 4], [("firing", 3), ("resolved", 5)]),
    (on("rises", value=0.5, window=9, relative=True), [10, 14, 15, NAN, 14], [("firing", 3), ("resolved", 5)]),
    (on("rises", value=0.5, window=9, relative=True), [0, 0, 0], []),
    (on("spike", window=6, deviations=5), [NAN, 2, 2.1, 1.9, 2, 9, 2.1, 2, 9, 9.1, 2], [("firing", 9), ("resolved", 11)]),  # after 5
    (on("spike", window=6), [2, 2, 2, 2, 2, 2.19, 2.21, 2], [("firing", 7), ("resolved", 8)]),  # a tenth of the median at least
    (on("spike", window=6, direction="down"), [2, 2, 2, 2, 2, 9, 1, 2], [("firing", 7), ("resolved", 8)]),
    (on("spike", window=6, direction="both"), [2, 2, 2, 2, 2, 9, 2, 1, 2],
     [("firing", 6), ("resolved", 7), ("firing", 8), ("resolved", 9)]),
    (on("spike", window=6), [2, 2, 2, 2, 2, INF, NAN, 2, 2], [("firing", 6), ("resolved", 8)]),
    (on("spike", window=6), [2, 2, 2, 2, 2, INF, INF, INF, INF, 9, 2], [("firing", 6), ("resolved", 11)]),
    (on("spike", window=6), [2, 2, 2, 2, 2, 9, 9, 9, 9, 9], [("firing", 6), ("resolved", 9)]),  # a level that stays is none
])
def test_a_condition_fires_and_ends_where_it_should(rule, series, heard):
    assert Run(a=rule).play(series).heard == heard


HOLDS = [
    ({"for": 3}, [6, 6, 6, 6, 6], [("firing", 4)]),
    ({"for": "3s"}, [6, 6, 6, 6, 6], [("firing", 4)]),
    ({"for": 3}, [6, 6, 6, 4, 6, 6, 6, 6], [("firing", 8)]),
    ({"for": 3}, [6, NAN, NAN, 6], [("firing", 4)]),  # what says nothing neither counts nor breaks
    ({"for": 0}, [6], [("firing", 1)]),
    ({"cooldown": 4}, [6, 4, 6, 4, 6, 4, 6], [("firing", 1), ("resolved", 2), ("firing", 5), ("resolved", 6)]),
    ({"cooldown": "4s"}, [6, 4, 6, 4, 6, 4, 6], [("firing", 1), ("resolved", 2), ("firing", 5), ("resolved", 6)]),
    ({"cooldown": 4}, [6, 4, 4, 6, 6, 6], [("firing", 1), ("resolved", 2), ("firing", 5)]),  # it still holds when the cooldown ends
    ({"cooldown": 4}, [6, 6, 6, 6, 6, 6, 6], [("firing", 1)]),  # once for as long as it holds
    ({"for": 2, "cooldown": 5}, [6, 6, 6, 4, 6, 6, 6, 6], [("firing", 3), ("resolved", 4), ("firing", 8)]),
    ({"for": 2, "clear": 3}, [6, 4, 4, 6, 6, 6, 4, 3], [("firing", 6), ("resolved", 8)]),  # clear is for alerts, not for what precedes them
]


@pytest.mark.parametrize(("keys", "series", "heard"), HOLDS)
def test_for_and_cooldown_count_to_the_step(keys, series, heard):
    assert Run(a=on("above", value=5, **keys)).play(series).heard == heard


def test_the_alert_says_what_it_is_about():
    run = Run(high={"metric": "*_loss", "condition": "above", "value": 5, "for": 10, "severity": "error"})
    run.play({10: 6, 20: 7, 30: 1}, metric="val_loss", split="validation", dataset="wiki")
    firing, resolved = run.stream
    assert firing == {
        "$schema": "codex_ml/event.v1", "schema_version": "v1", "timestamp": stamp(20), "run_id": "0f3a", "step": 20, "event": "alert",
        "severity": "error", "data": {
            "rule": "high", "state": "firing", "message": "validation val_loss wiki is 7, above 5, at step 20", "metric": "val_loss",
            "split": "validation", "dataset": "wiki", "event": None, "value": 7.0, "since_step": 10, "data": {}}}
    assert resolved["severity"] == "info" and resolved["timestamp"] == stamp(30) and resolved["data"]["value"] == 1.0
    assert resolved["data"]["message"] == "validation val_loss wiki: over at step 30, began at step 10"


# ---- which series a rule looks at

def test_every_series_is_judged_by_itself():
    run = Run(a={"metric": "*loss", "condition": "above", "value": 5, "for": 10})
    run.log(10, 6)
    run.log(20, 6, "val_loss", "validation")
    run.log(20, 6, split="validation")
    run.log(20, 6, dataset="wiki")
    assert run.heard == []
    run.log(30, 4, "val_loss", "validation")
    run.log(30, 6, dataset="wiki")
    assert [(r["data"]["metric"], r["data"]["dataset"]) for r in run.stream] == [("loss", "wiki")]


@pytest.mark.parametrize(("split", "fires"), [(None, 2), ("train", 1), ("validation", 1), ("test", 0)])
def test_a_split_narrows_a_rule(split, fires):
    run = Run(a=on("above", value=5, split=split))
    run.log(1, 6), run.log(1, 6, split="validation")
    assert len(run.heard) == fires


def test_keys_of_a_snapshot_are_series():
    run = Run(hot={"metric": "gpu_*_temperature", "condition": "above", "value": 80}, bad={"metric": "process.cpu", "condition": "nan"})
    run.snapshot(5, 0, gpu_0_temperature=70, gpu_1_temperature=90, gpu_2_temperature="unknown", gpu_3_temperature=None)
    run.snapshot(5, 1, **{"process.cpu": "NaN"})  # as it stands in a file
    assert [(r["data"]["rule"], r["data"]["metric"], r["data"]["split"]) for r in run.stream] == [
        ("hot", "gpu_1_temperature", "system"), ("bad", "process.cpu", "system")]


def test_a_name_is_itself_before_it_is_a_glob():
    run = Run(a={"metric": "acc[0]", "condition": "above", "value": 5})
    run.log(1, 6, "acc[0]"), run.log(1, 6, "acc1")
    assert len(run.heard) == 1


def test_what_is_no_number_says_nothing():
    run = Run(a={"metric": "*", "condition": "nan"}, b={"metric": "*", "condition": "below", "value": 1e9})
    run.log(1, "good", "grade")
    for record in structured_records("0f3a", 1, "train", "confusion", "confusion_matrix", {"counts": [[1]]}):
        run.alerts.emit(record)
    assert run.heard == []


# ---- a ratio of two metrics

BOUND = {"metric": "data_time/step_time", "condition": "above", "value": 0.5}


@pytest.mark.parametrize("order", [("data_time", "step_time"), ("step_time", "data_time")])
def test_a_ratio_is_of_one_step(order):
    run, values = Run(a=BOUND), {"data_time": {1: 0.1, 2: 0.6, 3: 0.1}, "step_time": {1: 1, 2: 1, 3: 1}}
    for step in (1, 2, 3):
        for metric in order:
            run.log(step, values[metric][step], metric)
    assert run.heard == [("firing", 2), ("resolved", 3)]
    assert run.stream[0]["data"]["metric"] == "data_time/step_time" and run.stream[0]["data"]["value"] == 0.6


def test_halves_of_different_steps_splits_or_snapshots_make_no_ratio():
    run = Run(a=BOUND, b={"metric": "used/total", "condition": "above", "value": 0.5})
    run.log(1, 9, "data_time"), run.log(2, 1, "step_time")
    run.log(3, 9, "data_time"), run.log(3, 1, "step_time", "validation"), run.log(3, 1, "step_time", dataset="wiki")
    run.log(4, 9, "data_time"), run.log(4, 0, "step_time")
    run.log(4, 1, "data_time"), run.log(4, 9, "step_time"), run.log(4, 1, "step_time")  # each is used once
    run.snapshot(5, 0, used=1, total=10)
    run.snapshot(5, 10, used=6, total=20)  # the 6 and the 10 are both of step 5
    assert run.heard == []
    run.snapshot(5, 20, used=11, total=20)
    assert run.heard == [("firing", 5)]


def test_a_metric_with_a_slash_in_its_name_is_a_metric():
    run = Run(a={"metric": "val/loss", "condition": "above", "value": 5})
    run.log(1, 6, "val/loss")
    assert run.heard == [("firing", 1)]


# ---- going back

def test_after_a_resume_the_condition_starts_afresh():
    rule = on("above", value=5, **{"for": 20})
    assert Run(a=rule).play({10: 6, 20: 6}).play({10: 6, 20: 6, 30: 6}).heard == [("firing", 30)]
    assert Run(a=rule).play({10: 4, 40: 6, 50: 6}).play({45: 6, 60: 6, 65: 6}).heard == [("firing", 65)]
    run = Run(a=on("no_progress", patience=30)).play({10: 5, 20: 1, 30: 2, 40: 2}).play({10: 5, 20: 5, 30: 5, 40: 5})
    assert run.heard == [("firing", 40)]  # the 1 of a step that is no more does not count
    run = Run(a=on("spike", window=10)).play([9]*8).play([2, 2, 2, 2, 2, 9])
    assert run.heard == [("firing", 6)]


def test_an_alert_and_its_cooldown_outlive_a_resume():
    run = Run(a=on("above", value=5, cooldown=50)).play({100: 6}).play({60: 6, 70: 4, 80: 6, 90: 4, 100: 4, 110: 6})
    assert run.heard == [("firing", 100), ("resolved", 70), ("firing", 110)]
    assert run.stream[1]["data"]["since_step"] == 60


def test_the_same_step_twice_is_no_way_back():
    assert Run(a=on("above", value=5, **{"for": 10})).play({10: 6}).play({10: 6, 20: 6}).heard == [("firing", 20)]


# ---- events

def test_an_event_fires_each_time_and_never_ends():
    run = Run(lost={"event": "gpu.*", "event_severity": "warning", "cooldown": "10s"})
    run.event(1, 1, "gpu.clock")  # an info
    run.event(2, 2, "gpu.lost", "error", gpu=3)
    run.event(3, 3, "gpu.throttle", "warning")  # another event, with its own cooldown
    run.event(4, 11.9, "gpu.lost", "error")
    run.event(5, 12, "gpu.lost", "error", gpu=1)
    assert [(r["step"], r["data"]["event"], r["data"]["data"]) for r in run.stream] == [
        (2, "gpu.lost", {"gpu": 3}), (3, "gpu.throttle", {}), (5, "gpu.lost", {"gpu": 1})]
    assert [r["data"]["since_step"] for r in run.stream] == [2, 3, 5]
    assert run.stream[0]["data"]["message"] == "gpu.lost happened, at step 2: gpu=3" and run.stream[0]["data"]["value"] is None
    assert run.alerts.active == []
    run.event(6, 30, "gpu.lost", "fatal")  # a word that is not known here is not thought harmless
    assert len(run.heard) == 4


def test_alerts_are_blind_to_alerts():
    run = Run(all={"event": "*"})
    run.event(1, 1, "checkpoint")
    for record in list(run.stream):
        run.alerts.emit(record)
    assert run.heard == [("firing", 1)]


# ---- silence

STALLED = {"metric": "*", "condition": "stalled", "after": "60s"}


def test_silence_is_noticed_by_the_clock_alone():
    run = Run(a=STALLED)
    run.event(0, 0, "run_start")
    run.alerts.tick(START + 59)
    run.log(10, 2.5, seconds=59.5)
    run.alerts.tick(START + 119.4)
    assert run.heard == []
    run.alerts.tick(START + 119.5), run.alerts.tick(START + 500)
    assert run.heard == [("firing", 10)] and run.stream[0]["timestamp"] == stamp(119.5)
    assert run.stream[0]["data"]["message"] == "* has been silent for 1m since step 10, at step 10"
    run.log(20, 2.5, seconds=600)
    run.alerts.tick(START + 660)
    assert run.heard == [("firing", 10), ("resolved", 20), ("firing", 20)]


def test_a_run_that_never_says_a_thing_is_silent_too():
    run = Run(a=STALLED)
    run.alerts.tick(START - 1000)  # before the run
    run.event(0, 0, "run_start")
    run.alerts.tick(START + 59)
    assert run.heard == []
    run.alerts.tick(START + 60)
    assert run.heard == [("firing", 0)]


def test_snapshots_are_a_clock_and_no_sign_of_life():
    run = Run(a=STALLED, b={**STALLED, "split": "system"})
    run.log(10, 2.5, seconds=0)
    for second in range(10, 70, 10):
        run.snapshot(10, second, cpu=1.0)
    assert run.heard == [("firing", 10)] and run.stream[0]["data"]["rule"] == "a"


def test_a_run_that_ended_is_not_stalled():
    run = Run(a=STALLED)
    run.log(10, 2.5, seconds=0)
    run.event(10, 1, "run_end")
    run.snapshot(10, 2, cpu=1.0)
    run.alerts.tick(START + 1000)
    assert run.heard == []
    run.event(10, 2000, "run_start"), run.alerts.tick(START + 2000)  # it goes on, in the same process
    run.log(20, 2.5, seconds=2001), run.alerts.tick(START + 2061)
    assert run.heard[-1] == ("firing", 20)
    run.log(30, 2.5, seconds=3000), run.alerts.close(), run.alerts.tick(START + 9000)
    assert run.heard[-1] == ("resolved", 30)


def test_an_event_may_be_what_is_missed():
    run = Run(unsaved={"event": "checkpoint", "condition": "stalled", "after": "2h"})
    run.event(1, 0, "checkpoint")
    run.log(10, 1.0, seconds=7199)
    assert run.heard == []
    run.log(20, 1.0, seconds=7200)
    run.event(20, 7300, "checkpoint")
    assert run.heard == [("firing", 20), ("resolved", 20)]


def test_a_clock_that_goes_back_ends_no_silence():
    run = Run(a=STALLED)
    run.log(10, 2.5, seconds=0)
    run.alerts.tick(START + 60), run.alerts.tick(START - 60), run.alerts.tick(START + 60)
    assert run.heard == [("firing", 10)]


# ---- actions

def test_all_actions_are_done_whatever_one_raises(caplog):
    done = []

    def leaves(alert):
        raise SystemExit(1)

    class Odd:
        def __call__(self, alert):
            alert["message"] = alert["rule"] = None  # its own copy
            raise KeyError("odd")

    rules = parse_rules({"a": on("above", value=5, actions=[leaves, Odd(), "stop", "log", "command: false", done.append])})

    def refuse(argument):
        raise OSError("full")

    alerts = Alerts(rules, record=refuse, request_stop=refuse)
    with caplog.at_level(logging.INFO):
        for step in range(1, 7):
            alerts.emit(scalar_record("0f3a", step, "train", "loss", 6 if step % 2 else 1, timestamp=stamp(step)))
    assert [(a["state"], a["step"], a["rule"]) for a in done] == [("firing", step, "a") for step in (1, 3, 5)]
    assert alerts.errors == {"a: record": 6, "a: stop": 3, "a: Odd": 3, "a: command false": 3,
                             "a: leaves": 3}
    failures = [r.getMessage() for r in caplog.records if "failed" in r.getMessage()]
    assert len(failures) == 5 and any("the action 'stop' of the alert 'a' failed: OSError: full. The run goes on" in f for f in failures)
    assert [r.getMessage() for r in caplog.records if "alert a: " in r.getMessage()][:2] == [
        "alert a: train loss is 6, above 5, at step 1", "alert a: train loss: over at step 2, began at step 1"]


def test_failures_are_told_to_who_asked(caplog):
    told, rules = [], parse_rules({"a": on("nan", actions="stop")})
    alerts = Alerts(rules, record=lambda record: None, request_stop=lambda reason: 1 / 0, failed=lambda *what: told.append(what))
    for step, value in enumerate([NAN, 1, NAN], 1):
        alerts.emit(scalar_record("0f3a", step, "train", "loss", value))
    assert [(what, type(error)) for what, error in told] == [("the action 'stop' of the alert 'a' failed", ZeroDivisionError)] * 2
    assert alerts.errors == {"a: stop": 2} and caplog.records == []


def test_an_interrupt_is_not_swallowed():
    def interrupted(alert):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        Run(a=on("nan", actions=interrupted)).play([NAN])


def test_what_is_quick_comes_first_and_stop_is_asked_once(tmp_path):
    order = []
    rules = parse_rules({"a": on("nan", actions=[lambda alert: order.append("function"), "stop"])})
    alerts = Alerts(rules, record=lambda r: order.append("record"), request_stop=lambda reason: order.append(reason))
    for step, value in [(1, NAN), (2, 1.0)]:
        alerts.emit(scalar_record("0f3a", step, "train", "loss", value))
    assert order == ["record", "the alert 'a': train loss is nan, at step 1", "function", "record"]


def test_the_end_is_told_to_those_who_ask():
    told = []
    Run(a=on("nan", actions=told.append, notify_resolved=True)).play([NAN, 1])
    assert [alert["state"] for alert in told] == ["firing", "resolved"]


@pytest.mark.parametrize(("severity", "level"), [("info", logging.INFO), ("warning", logging.WARNING), ("error", logging.ERROR)])
def test_the_log_line_has_the_level_of_the_rule(severity, level, caplog):
    with caplog.at_level(logging.INFO):
        Run(a=on("nan", severity=severity)).play([NAN])
    assert [(r.name, r.levelno) for r in caplog.records] == [("codex_ml", level)]


# ---- commands

def test_a_command_is_told_everything_and_prints_nowhere(tmp_path, capfd):
    script = ("import json, os, sys; print('noise'); print('noise', file=sys.stderr); alert = json.load(sys.stdin); "
              "env = {k: v for k, v in os.environ.items() if k.startswith('CODEX_ALERT_')}; "
              f"json.dump([sys.argv[1:], alert, env], open({str(tmp_path/'told')!r}, 'w'))")
    argument = "$HOME; rm -rf `x` 'y'"
    run = Run(a={**on("nan"), "actions": [{"command": [sys.executable, "-c", script, argument]}]})
    run.log(7, NAN, dataset="ev\0il\ud800")
    argv, alert, env = json.loads((tmp_path/"told").read_text())
    assert run.alerts.errors == {} and argv == [argument]
    assert alert["value"] == "NaN" and (alert["rule"], alert["state"], alert["step"], alert["metric"]) == ("a", "firing", 7, "loss")
    assert env["CODEX_ALERT_VALUE"] == "nan" and env["CODEX_ALERT_STEP"] == "7" and env["CODEX_ALERT_DATASET"] == "evil?"
    assert set(env) == {f"CODEX_ALERT_{key.upper()}" for key in alert if key != "data"}
    assert capfd.readouterr() == ("", "")


def test_a_command_that_takes_too_long_is_killed_with_its_children(tmp_path):
    child = tmp_path/"child"
    began = time.monotonic()
    with pytest.raises(CommandFailed, match=r"none within 0\.3 s"):
        run_command(["sh", "-c", f"sleep 60 & echo $! > {child}; wait"], {}, 0.3)
    assert time.monotonic() - began < 5
    for _ in range(100):
        stat = Path(f"/proc/{child.read_text().strip()}/stat")
        if not stat.exists() or "Z" in stat.read_text().split():
            return
        time.sleep(0.02)
    raise AssertionError("the child lives on")


def test_a_command_may_leave_a_child_behind_and_read_nothing():
    began = time.monotonic()
    run_command(["sh", "-c", "sleep 2 & exit 0"], {"message": "x" * 1_000_000}, 10)  # the child holds the output open
    assert time.monotonic() - began < 1.5


@pytest.mark.parametrize(("script", "message"), [
    ("echo oops >&2; exit 7", "exit status 7; it printed: oops"),
    ("kill -9 $$", "exit status -9$"),
    ("head -c 300000 /dev/zero | tr '\\0' x >&2; exit 1", r"exit status 1; it printed: x{500}$"),
])
def test_a_command_that_fails_says_why(script, message):
    with pytest.raises(CommandFailed, match=message):
        run_command(["sh", "-c", script], {}, 10)


def test_a_program_that_has_gone_is_counted(tmp_path):
    program = tmp_path/"notify"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    run = Run(a=on("nan", actions=f"command: {program}"))
    program.unlink()
    run.play([NAN])
    assert run.alerts.errors == {f"a: command {program}": 1} and run.heard == [("firing", 1)]


# ---- configuration

@pytest.mark.parametrize(("rules", "message"), [
    ({"nann": True}, "monitoring.alerts.nann: there is no preset 'nann': did you mean 'nan'?"),
    ({"a": {"preset": "spke"}}, "there is no preset 'spke': did you mean 'spike'?"),
    ({"a": {"preset": ["nan"]}}, "there is no preset"),
    ({"a": {"preset": "nan", "condition": "above"}}, "a preset brings its own condition"),
    ({"nan": 1}, "monitoring.alerts.nan=1: it takes true"),
    ({"a": "loss > 5"}, "it takes true for a preset"),
    ({"a": {}}, "either a metric or an event"),
    ({"a": {"metric": "loss"}}, "it has no condition: give one of nan, above"),
    ({"a": {"metric": "loss", "event": "x"}}, "either a metric or an event"),
    ({"a": {"metric": "loss", "condition": "abve"}}, "there is no condition 'abve': did you mean 'above'?"),
    ({"a": {"metric": "loss", "condition": {}}}, "there is no condition"),
    ({"a": {"event": "x", "condition": "above"}}, "an event has no value"),
    ({"a": {"event": "x", "for": 3}}, "an event is over as soon as it happens"),
    ({"a": on("above")}, "its condition needs value"),
    ({"a": on("rises")}, "its condition needs value and window"),
    ({"a": on("above", value="5")}, "a.value='5': it takes a number"),
    ({"a": on("above", value=True)}, "it takes a number"),
    ({"a": on("above", value=NAN)}, "it takes a number"),
    ({"a": on("above", value=5, clear=6)}, "clear=6 lies beyond value=5"),
    ({"a": on("below", value=5, clear=4)}, "clear=4 lies beyond value=5"),
    ({"a": on("nan", value=5)}, "there is no key 'value'"),
    ({"a": on("nan", cooldwn=5)}, "there is no key 'cooldwn': did you mean 'cooldown'?"),
    ({"a": on("nan", cooldown="5 min")}, 'cooldown=\'5 min\': it takes a number of steps, or a time such as "30s"'),
    ({"a": on("nan", **{"for": -1})}, "it takes a number of steps"),
    ({"a": on("nan", **{"for": True})}, "it takes a number of steps"),
    ({"a": on("nan", **{"for": 1.5})}, "it takes a number of steps"),
    ({"a": on("nan", severity="warn")}, "it takes info, warning, error; did you mean 'warning'?"),
    ({"a": on("nan", actions="stpo")}, "did you mean 'stop'?"),
    ({"a": on("nan", actions=[3])}, "it takes log, stop"),
    ({"a": on("nan", actions={"cmd": "x"})}, "it takes log, stop"),
    ({"a": on("nan", actions="command:")}, "it takes log, stop"),
    ({"a": on("nan", actions="command: echo 'open")}, "No closing quotation"),
    ({"a": on("nan", actions="command: no-such-program now")}, "there is no program 'no-such-program' to run"),
    ({"a": on("nan", actions={"command": ["echo", 3]})}, "it takes log, stop"),
    ({"a": on("nan", timeout=0)}, "it takes a time up to an hour"),
    ({"a": on("nan", timeout="10")}, "it takes a time up to an hour"),
    ({"a": on("nan", notify_resolved="yes")}, "it takes true or false"),
    ({"a": on("spike", window=4)}, "window=4: it takes a number of records from 5"),
    ({"a": on("spike", window=True)}, "it takes a whole number"),
    ({"a": on("spike", direction="upp")}, "it takes up, down, both; did you mean 'up'?"),
    ({"a": on("no_progress", patience=5, direction="both")}, "progress has one direction"),
    ({"a": on("stalled", after=5)}, "silence is measured as a time"),
    ({"a": on("rises", value=0, window=5)}, "it takes a number above 0"),
    ({"a": {"metric": [], "condition": "nan"}}, "it takes a text"),
    ({"a": {"metric": ["loss", 3], "condition": "nan"}}, "it takes a text"),
    (["nan"], "it takes rules by name"),
])
def test_a_wrong_rule_is_refused_in_one_line(rules, message):
    with pytest.raises(ConfigError) as refused:
        parse_rules(rules)
    assert message in str(refused.value) and "\n" not in str(refused.value) and "monitoring.alerts" in str(refused.value)


def test_presets_are_switched_on_changed_and_renamed():
    off = parse_rules({"nan": False, "spike": None})
    assert off == []
    rules = {rule.name: rule for rule in parse_rules({
        **dict.fromkeys(PRESETS, True), "nan": {"actions": "stop", "cooldown": None}, "memory": {"value": 0.8},
        "x": {"preset": "spike", "window": 9}, "spike": {"metric": "loss", "condition": "above", "value": 3}})}
    assert rules["nan"].actions == ("record", "stop") and rules["nan"].cooldown == Span(300, "seconds")
    assert (rules["memory"].condition.value, rules["memory"].condition.clear) == (0.8, None)
    assert rules["x"].condition.window == 9 and rules["x"].split == "train"
    assert rules["spike"].condition.value == 3 and rules["spike"].split is None and rules["spike"].cooldown == Span(0)
    assert parse_rules({"nan": {}})[0].metric == ("loss", "*_loss")


@pytest.mark.parametrize(("preset", "play", "heard"), [
    ("nan", lambda run: run.play([2, NAN], metric="val_loss", split="validation"), [("firing", 2)]),
    ("spike", lambda run: run.play([2 + 0.1 * math.sin(i) for i in range(60)] + [9]), [("firing", 61)]),
    ("no_progress", lambda run: run.play(dict.fromkeys(range(0, 7000, 100), 2)), [("firing", 3600)]),
    ("stalled", lambda run: (run.log(1, 2), run.snapshot(1, 601, cpu=1)), [("firing", 1)]),
    ("data_bound", lambda run: [(run.log(s, 0.3, "data_time"), run.log(s, 0.5, "step_time")) for s in (0, 50, 100)], [("firing", 100)]),
    ("memory", lambda run: [run.snapshot(s, s, **{"system.memory.utilization": 0.96}) for s in (0, 10, 20)], [("firing", 20)]),
    ("memory", lambda run: [run.snapshot(s, s, **{"container.memory.utilization": 0.96}) for s in (0, 10, 20)], [("firing", 20)]),
    ("disk", lambda run: run.snapshot(1, 1, **{"system.filesystem.utilization": 0.96}), [("firing", 1)]),
    ("gpu", lambda run: (run.event(0, 0, "gpu.unavailable"), run.event(1, 1, "gpu.lost", "error")), [("firing", 1)]),
])
def test_a_preset_as_it_comes(preset, play, heard):
    run = Run(**{preset: True})
    play(run)
    assert run.heard == heard


def test_no_false_alarm_from_an_ordinary_loss():
    noise = random.Random(1)
    run = Run(spike=True, nan=True)
    run.play([3 * 0.9995**i + 1 + noise.gauss(0, 0.15) for i in range(20_000)])
    assert run.heard == []


def test_a_function_is_an_action_of_a_configuration_in_python():
    told, config = [], TrainConfig()
    assert open_alerts(config, record=print, request_stop=print) is None
    config.monitoring.alerts = {"nan": {"actions": told.append}}
    alerts = open_alerts(config, record=lambda record: None, request_stop=print)
    alerts.emit(scalar_record("0f3a", 1, "train", "loss", NAN))
    alerts.close()
    assert len(told) == 1
    config.monitoring.alerts = {"nan": {"action": "stop"}}
    with pytest.raises(ConfigError, match="did you mean 'actions'"):
        open_alerts(config, record=print, request_stop=print)


def test_a_hook_that_never_returns_silences_no_rule(caplog):
    released, stops, failures, config = threading.Event(), [], [], TrainConfig()
    config.monitoring.alerts = {"h": {"metric": "loss", "condition": "above", "value": 0, "actions": [lambda alert: released.wait(60)]},
                                "s": {"metric": "loss", "condition": "above", "value": 5, "actions": ["stop"]}}
    alerts = open_alerts(config, record=lambda record: None, request_stop=stops.append, failed=lambda what, error: failures.append(what))
    for step, value in enumerate((1.0, 2.0, 9.0)):
        alerts.emit(scalar_record("0f3a", step, "train", "loss", value))
    assert len(stops) == 1
    alerts.close()
    released.set()
    assert failures == ["1 actions of alerts"]


def test_a_rule_that_nothing_matched_is_told_at_the_end(caplog):
    config = TrainConfig()
    config.monitoring.alerts = {"x": {"metric": "los", "condition": "above", "value": 3}, "gpu": True}
    alerts = open_alerts(config, record=lambda record: None, request_stop=print)
    caplog.clear()  # that the preset lacks a GPU was told at the start
    alerts.emit(scalar_record("0f3a", 1, "train", "loss", 1.0))
    alerts.emit(event_record("0f3a", 2, "run_end"))
    assert "the alert 'x' looks at los" in caplog.text and "did you mean 'loss'?" in caplog.text and "'gpu'" not in caplog.text


# ---- properties

words = st.sampled_from(["5s", "loss", "up", "log", "stop", "command: echo"])
plain = st.recursive(st.none() | st.booleans() | st.integers(-5, 10**6) | st.floats() | words | st.text(max_size=8),
                     lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["command", "x"]), x), max_leaves=4)
keys = st.sampled_from(["metric", "event", "split", "condition", "for", "cooldown", "severity", "event_severity", "actions", "timeout",
                        "preset", "value", "clear", "window", "patience", "after", "direction", "relative", "min_change", "deviations",
                        "notify_resolved", "mtric"])
rule_like = st.dictionaries(keys, plain, max_size=6) | st.fixed_dictionaries(
    {"metric": st.just("*"), "condition": st.sampled_from(list(CONDITIONS))}, optional={
        "value": st.floats(0.5, 3), "window": st.sampled_from([5, 6, "30s"]), "patience": st.sampled_from([3, "5s"]),
        "after": st.just("20s"), "for": st.sampled_from([0, 5, "5s"]), "cooldown": st.sampled_from([0, 20, "20s"])})


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=6) | st.sampled_from(list(PRESETS)), rule_like | plain, max_size=3))
def test_reading_rules_ends_in_rules_or_in_one_line(alerts):
    try:
        rules = parse_rules(alerts)
    except ConfigError as error:
        assert "monitoring.alerts" in str(error)
    else:
        assert len(rules) == len([a for a in alerts.values() if a is not False and a is not None])


values = st.sampled_from([1, 2, 2.1, 3, 9, 0, -1, NAN, INF, -INF]) | st.floats()
points = st.lists(st.tuples(st.integers(0, 30), st.floats(0, 30), values), max_size=60)


@settings(max_examples=200, deadline=None)
@given(points, st.lists(rule_like, max_size=4))
def test_any_series_under_any_rules(series, some):
    "Nothing raises, beginning and end take turns, and the same stream, be it read back from a file, has the same alerts."
    rules = {}
    for i, rule in enumerate(some):
        try:
            parse_rules({str(i): rule})
            rules[str(i)] = {**rule, "actions": "record"}
        except ConfigError:
            continue
    live, again = Run(**PRESETS, **rules), Run(**PRESETS, **rules)
    for step, seconds, value in series:
        for record in (scalar_record("0f3a", step, "train", "loss", value, timestamp=stamp(seconds)),
                       snapshot_record("0f3a", step, {"system.memory.utilization": value}, stamp(seconds)),
                       event_record("0f3a", step, "gpu.xid", "error", {}, stamp(seconds))):
            live.alerts.emit(record)
            again.alerts.emit(decode(encode(record)))
    assert [encode(r) for r in live.stream] == [encode(r) for r in again.stream] and live.alerts.errors == {}
    states = {}
    for record in live.stream:
        data = record["data"]
        if not data["event"]:
            key = (data["rule"], data["metric"], data["split"])
            assert data["state"] != states.get(key, "resolved")
            states[key] = data["state"]


steps = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([4, 6, NAN])), max_size=40)


@settings(max_examples=300, deadline=None)
@given(steps, st.integers(0, 8), st.integers(0, 12))
@example([(1, 6), (1, 6), (1, 4), (1, 6)], 1, 3)
def test_for_and_cooldown_against_their_definition(moves, hold, cooldown):
    run, step, expected = Run(a=on("above", value=5, **{"for": hold, "cooldown": cooldown})), 0, []
    history = []  # (step, value) that say something
    fired, active = None, False
    for move, value in moves:
        step += move
        run.log(step, value)
        if math.isnan(value):
            continue
        history.append((step, value))
        streak = []
        for at, v in reversed(history):
            if v < 5:
                break
            streak.append(at)
        if not streak and active:
            active = False
            expected.append(("resolved", step))
        if streak and not active and step - streak[-1] >= hold and (fired is None or step - fired >= cooldown):
            active, fired = True, step
            expected.append(("firing", step))
    assert run.heard == expected


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-9, 9)), max_size=60), st.integers(0, 12), st.integers(1, 9))
def test_the_running_extreme_is_that_of_the_window(moves, window, amount):
    rises, falls = Rises(amount, Span(window)), Falls(amount, Span(window))
    history, step = [], 0
    for move, value in moves:
        step += move
        history.append((step, value))
        inside = [v for s, v in history if step - s <= window]
        assert bool(rises(Point(step, 0.0, value), False)) == (value - min(inside) >= amount)
        assert bool(falls(Point(step, 0.0, value), False)) == (max(inside) - value >= amount)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-100, 100), max_size=60), st.integers(5, 20), st.sampled_from(["up", "down", "both"]))
def test_a_spike_against_its_definition(values, window, direction):
    spike = Spike(window, 4.0, 0.1, direction)
    for i, value in enumerate(values):
        past = values[max(0, i - window):i]
        verdict = spike(Point(i, 0.0, value), False)
        if len(past) < max(5, window // 2):
            assert verdict is None
            continue
        median = statistics.median(past)
        limit = max(4 * 1.4826 * statistics.median([abs(v - median) for v in past]), 0.1 * abs(median))
        up, down = value - median > limit, median - value > limit
        assert bool(verdict) == {"up": up, "down": down, "both": up or down}[direction]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**12 - 1) | st.builds("{}{}".format, st.integers(0, 10**6), st.sampled_from("smhd")))
def test_a_span_that_is_printed_is_read_back(value):
    span = parse_span(value)
    assert parse_span(str(span)) == span


def test_memory_stays_bounded():
    run = Run(a=on("rises", value=1e9, window=10**9), b=on("spike", window=5), c=on("no_progress", patience=10**9), d=BOUND)
    for step in range(11_000):
        run.log(step, float(step))
    watches = run.alerts._watches.values()
    assert max(len(v) for w in watches for v in vars(w.condition).values() if hasattr(v, "__len__")) <= 10_000


@pytest.mark.parametrize("alert, changes, lacking", [
    ("memory", {"system_metrics_interval": 0}, "system_metrics_interval above 0"),
    ("disk", {"system_metrics_interval": 0}, "system_metrics_interval above 0"),
    ("gpu", {}, "CODEX_MONITORING_ENABLE_GPU=1 in the environment and monitoring.system_metrics.extended=true"),
    ("memory", {}, None), ("spike", {"system_metrics_interval": 0}, None),
])
def test_a_rule_that_can_never_fire_is_told_at_the_start(alert, changes, lacking, monkeypatch, caplog):
    monkeypatch.delenv("CODEX_MONITORING_ENABLE_GPU", raising=False)
    config = TrainConfig(**changes)
    config.monitoring.alerts |= {alert: True}
    open_alerts(config, record=print, request_stop=print)
    told = [r.getMessage() for r in caplog.records]
    assert (told == []) if lacking is None else (len(told) == 1 and lacking in told[0] and repr(alert) in told[0])
