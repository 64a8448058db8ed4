"""Replays: the same bits where nothing changed, the first step and the reason where something did, and a run that is never touched."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_house as house
import torch
from runs import Augmented, StopAt, make_model

from codex_ml import replay as room
from codex_ml.checkpoint import serialize
from codex_ml.cli.main import main
from codex_ml.durable import CorruptFile, sha256_file
from codex_ml.recorded_steps import NoRun
from codex_ml.replay import ReplayError, replay
from codex_ml.stretches import NotRecorded
from codex_ml.train_loop import EXIT_CODES, run_training
from codex_ml.utils.determinism import environment_fingerprint

OBJECTS: dict[str, Any] = {"model": lambda: make_model("dropout"), "data": Augmented("numpy")}  # 6 steps an epoch


def train(folder: Path, **change: Any) -> dict[str, Any]:
    job = {**OBJECTS, "epochs": 4, "batch_size": 8, "grad_accum": 2, "threads": 1, "progress": "off", "learning_rate": 0.01,
           "system_metrics_interval": 0.0, "scheduler_cfg": {"type": "linear"}, "fingerprint_every_steps": 5}
    return run_training(checkpoint_dir=folder, **{**job, **change})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(folder)
    return folder


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that its folder describes whole."""
    place = tmp_path_factory.mktemp("text")
    (place / "text.txt").write_text("".join(f"{i} and {i % 7} make {i + i % 7}\n" for i in range(120)))
    run_training(model="tiny", data=place / "text.txt", block_size=16, epochs=2, batch_size=8, progress="off", threads=1,
                 fingerprint_every_steps=4, checkpoint_dir=place / "run")
    return place / "run"


def state_of(folder: Path) -> dict[str, tuple]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_ino, p.stat().st_size, p.stat().st_nlink) for p in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize("epoch", [None, 1, 2, 3, 4])
def test_every_epoch_comes_to_the_same_bits(trained: Path, epoch: int | None) -> None:
    before = state_of(trained)
    found = replay(trained, epoch=epoch, **OBJECTS)
    assert found.same and found.exit_code == 0 and found.recorded == found.found and found.differences == []
    assert found.steps == found.compared == 6 and found.start == (f"epoch-{(epoch or 4) - 1:04d}" if epoch != 1 else None)
    assert state_of(trained) == before


@pytest.mark.parametrize("start, end, checkpoint", [(8, 10, "epoch-0001"), (3, 5, None), (None, 14, "epoch-0002"), (9, 18, "epoch-0001"),
                                                    (13, 13, "epoch-0002")])
def test_steps(trained: Path, start: int | None, end: int, checkpoint: str | None) -> None:
    found = replay(trained, from_step=start, to_step=end, **OBJECTS)
    assert found.same and found.start == checkpoint
    assert found.compared == found.steps == end - (int(checkpoint[-1]) * 6 if checkpoint else 0)
    assert (found.recorded is not None) == (end == 18) and (end != 18 or found.target == "epoch-0003")


def test_a_mid_epoch_checkpoint_is_an_end(tmp_path: Path) -> None:
    train(tmp_path, callbacks=[StopAt(9)])
    found = replay(tmp_path, to_step=9, **OBJECTS)
    assert found.same and found.target == "step-00000009" and found.recorded is not None and found.start == "epoch-0001"


def test_a_run_that_was_resumed_and_made_longer(tmp_path: Path) -> None:
    """Each epoch is run again with what the process was told that trained it: `epochs` decides the rates."""
    train(tmp_path, epochs=2)
    train(tmp_path, epochs=4, resume=True)
    assert all(replay(tmp_path, epoch=epoch, **OBJECTS).same for epoch in (2, 3, 4))


def test_checkpoints_that_were_pruned(tmp_path: Path) -> None:
    train(tmp_path, retention_policy={"keep_last": 1})
    gone = max(epoch for epoch in (1, 2, 3) if not (tmp_path / f"epoch-{epoch:04d}").exists())
    found = replay(tmp_path, epoch=gone, **OBJECTS)
    assert found.same and found.recorded is not None and found.steps == 6 * gone


def test_a_broken_checkpoint_before_it_is_passed_over(tmp_path: Path) -> None:
    train(tmp_path)
    path = tmp_path / "epoch-0003/checkpoint.pt"
    broken = bytearray(path.read_bytes())
    broken[len(broken) // 2] ^= 1
    path.write_bytes(broken)
    found = replay(tmp_path, **OBJECTS)
    assert found.same and found.start == "epoch-0002" and found.steps == 12


def test_a_hash_that_nobody_came_to(tmp_path: Path) -> None:
    result = train(tmp_path)
    for path in (tmp_path / "epoch-0004/metadata.json", tmp_path / "latest.json", tmp_path / ".codex/metrics.ndjson"):
        path.write_text(path.read_text().replace(result["checkpoint_sha256_last"], "0" * 64))
    found = replay(tmp_path, **OBJECTS)
    assert not found.same and found.exit_code == 6 and found.differences == [] and "0" * 64 in str(found)


def test_the_first_step_that_differs(trained: Path) -> None:
    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        calls.append(1)
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1]) * (1.01 if len(calls) >= 4 else 1.0)

    calls: list[int] = []
    found = replay(trained, epoch=2, loss_fn=loss, **OBJECTS)
    assert not found.same and found.differences[0].kind == "loss" and found.differences[0].step == 10
    assert "step 10" in str(found) and "nothing differs in the environment" in str(found)


def test_what_differs_in_the_environment(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from codex_ml import provenance
    monkeypatch.setattr(provenance, "environment_fingerprint", lambda device: environment_fingerprint(device) | {"torch": "9.9"})
    monkeypatch.setenv("GIT_SHA", "abc")
    same = replay(trained, **OBJECTS)
    assert same.same and {row[0] for row in same.environment} == {"torch", "git_sha"}
    other = replay(trained, **OBJECTS | {"model": lambda: make_model("plain")})
    assert not other.same and "9.9" in str(other)


def test_what_is_missing_is_named(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match=r"model=…, data=…"):
        replay(trained)
    with pytest.raises(ReplayError, match="data=…"):
        replay(trained, model=OBJECTS["model"])
    train(tmp_path, loss_fn=lambda model, batch: model(batch[0]).mean(), optimizer=lambda params, lr: torch.optim.SGD(params, lr))
    with pytest.raises(ReplayError, match="loss_fn=…, optimizer=…"):
        replay(tmp_path, **OBJECTS)


@pytest.mark.parametrize("words, said", [
    ({"epoch": 9}, "nothing of epoch-0009"), ({"epoch": 0}, "nothing of epoch-0000"), ({"epoch": 2, "to_step": 3}, "not both"),
    ({"to_step": 99}, "no step 99"), ({"from_step": 20, "to_step": 10}, "not a step up to 10"),
    ({"from_step": 0, "to_step": 3}, "not a step")])
def test_stretches_that_cannot_be(trained: Path, words: dict[str, int], said: str) -> None:
    with pytest.raises(ReplayError, match=said):
        replay(trained, **words, **OBJECTS)


def test_other_objects_are_refused(trained: Path) -> None:
    for change in ({"data": (torch.randn(46, 6), torch.zeros(46).long())}, {"model": lambda: torch.nn.Linear(6, 3)}):
        with pytest.raises(ReplayError):
            replay(trained, epoch=2, **OBJECTS | change)
    with pytest.raises(ReplayError):  # from the beginning there is no checkpoint that could refuse
        replay(trained, epoch=1, **OBJECTS | {"data": (torch.randn(46, 6), torch.zeros(46).long())})


def test_no_run(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(NoRun):
            replay(place)


def test_without_fingerprints(tmp_path: Path) -> None:
    train(tmp_path, metrics_out=None)
    found = replay(tmp_path, **OBJECTS)
    assert found.same and found.compared == 0 and "no fingerprints" in str(found)
    with pytest.raises(ReplayError, match="nothing of step-00000008"):
        replay(tmp_path, to_step=8, **OBJECTS)


def test_at_the_command_line(text_run: Path, capsys: pytest.CaptureFixture) -> None:
    before = state_of(text_run)
    assert main(["replay", str(text_run)]) == 0
    assert "the same bits" in capsys.readouterr().out
    assert main(["replay", str(text_run), "--epoch", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["same"] is True and found["target"] == "epoch-0001" and found["start"] is None
    assert main(["replay", str(text_run), "--epoch", "7"]) == 2 and main(["replay", str(text_run), "--to-step"]) == 2
    assert main(["replay", str(text_run.parent / "no")]) == 2
    assert state_of(text_run) == before


def test_in_a_process_of_its_own(text_run: Path) -> None:
    found = replay(text_run)
    assert found.same and found.compared > 0 and str(found) == str(room.replay(text_run, fresh=False))


def test_a_data_file_that_changed(text_run: Path, capsys: pytest.CaptureFixture) -> None:
    path = text_run.parent / "text.txt"
    text = path.read_text()
    try:
        path.write_text(text.replace("5 and", "6 and", 1))
        for words in ([], ["--epoch", "1"]):
            assert main(["replay", str(text_run), *words]) == 2
            assert "data" in capsys.readouterr().err
    finally:
        path.write_text(text)


def test_another_number_of_threads_is_set_back(text_run: Path) -> None:
    """The run's own number of threads is used, whatever the environment says."""
    command = [sys.executable, "-m", "codex_ml.cli.main", "replay", str(text_run), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    rows = {row[0] for row in json.loads(done.stdout)["environment"]}
    assert "threads" not in rows and rows <= {"kernel_env.OMP_NUM_THREADS", "interop_threads"}


def test_the_folder_of_a_replay_goes(text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.tempfile, "tempdir", str(tmp_path))
    replay(text_run, fresh=False)
    with pytest.raises(ReplayError):
        replay(text_run, model=lambda: torch.nn.Linear(2, 2), fresh=False)
    assert list(tmp_path.iterdir()) == []


def swap(run: Path, epoch: int) -> tuple[str, str]:
    """Change one bit of a weight of an epoch's checkpoint, and its hash in metadata; the hash that was, and the one that is."""
    folder = run / f"epoch-{epoch:04d}"
    state = torch.load(folder / "checkpoint.pt")
    next(t for t in state["model"].values() if t.is_floating_point()).view(torch.int32).view(-1)[0] ^= 1 << 20
    with open(folder / "checkpoint.pt", "wb") as file:
        serialize(state, file)
    facts = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps(facts | {"checkpoint_sha256": sha256_file(folder / "checkpoint.pt")}))
    return facts["checkpoint_sha256"], sha256_file(folder / "checkpoint.pt")


@pytest.mark.parametrize("metrics", [".codex/metrics.ndjson", None])
@pytest.mark.parametrize("epoch", [2, 3])
def test_a_checkpoint_that_is_not_the_recorded_one_is_named(tmp_path: Path, epoch: int, metrics: str | None) -> None:
    """As the start of a stretch and as its end; the code is not blamed. Its child, and the stream, tell."""
    train(tmp_path, metrics_out=metrics)
    was, now = swap(tmp_path, 2)
    with pytest.raises(NotRecorded, match=f"epoch-0002 is not the checkpoint that this run recorded: {now} stands in epoch") as told:
        replay(tmp_path, epoch=epoch, **OBJECTS)
    said = str(told.value)
    assert f"{was} stands in epoch-0003/metadata.json (as its parent)" in said and "look at the code" not in said
    assert ("the file of metrics" in said) == (metrics is not None)
    assert replay(tmp_path, epoch=4, **OBJECTS).same


def test_a_newest_checkpoint_that_is_not_the_recorded_one(text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    shutil.copytree(text_run, run)
    was, now = swap(run, 2)
    for words in ([], ["--to-step", str(json.loads((run / "epoch-0002/metadata.json").read_text())["global_step"])]):
        assert main(["replay", str(run), *words]) == 6
        said = capsys.readouterr().err
        assert was in said and now in said and "latest.json and in the file of metrics" in said
    assert main(["replay", str(run), "--epoch", "1"]) == 0


def test_an_epoch_that_was_trained_anew_is_the_one_that_counts(tmp_path: Path) -> None:
    """The stream still tells of the epoch that was there before, which its owner took away; the process that made the second was killed
    before it could tell."""
    train(tmp_path, epochs=2)
    shutil.rmtree(tmp_path / "epoch-0002")
    train(tmp_path, epochs=2, resume=True, learning_rate=0.02, checkpoint_allow_drift=True)
    stream = tmp_path / ".codex/metrics.ndjson"
    lines = [line for line in stream.read_text().splitlines() if '"checkpoint"' not in line or "epoch-0002" not in line]
    first = next(line for line in stream.read_text().splitlines() if '"checkpoint"' in line and "epoch-0002" in line)
    at = next(i for i, line in enumerate(lines) if '"run_end"' in line)
    stream.write_text("\n".join([*lines[:at], first, *lines[at:]]) + "\n")
    assert replay(tmp_path, epoch=2, **OBJECTS).same and replay(tmp_path, epoch=1, **OBJECTS).same


DRIFTED = {"learning_rate": 0.02, "batch_size": 4, "checkpoint_allow_drift": True}


@pytest.mark.parametrize("metrics", [".codex/metrics.ndjson", None])
def test_a_run_that_went_on_with_another_configuration(tmp_path: Path, metrics: str | None) -> None:
    """Each stretch is run again as it was, also one that leads over the place where it changed."""
    train(tmp_path, epochs=1, scheduler_cfg=None, metrics_out=metrics)
    train(tmp_path, epochs=3, resume=True, scheduler_cfg=None, metrics_out=metrics, **DRIFTED)
    train(tmp_path, epochs=4, resume=True, scheduler_cfg=None, metrics_out=metrics, **DRIFTED | {"learning_rate": 0.03})
    for epoch in (1, 2, 3, 4, None):
        found = replay(tmp_path, epoch=epoch, **OBJECTS)
        assert found.same, str(found)
    for gone in (1, 3):  # the first and the third were pruned: from the beginning, over both changes
        shutil.rmtree(tmp_path / f"epoch-{gone:04d}")
    if metrics:
        shutil.rmtree(tmp_path / "epoch-0002")
        found = replay(tmp_path, **OBJECTS)
        assert found.same and found.start is None and found.steps == found.compared == 6 + 12 * 3
        assert replay(tmp_path, epoch=2, **OBJECTS).same and replay(tmp_path, from_step=3, to_step=15, **OBJECTS).same


def test_a_change_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    train(tmp_path, epochs=2, callbacks=[StopAt(9)])
    train(tmp_path, epochs=2, resume=True, learning_rate=0.02, checkpoint_allow_drift=True)
    found = replay(tmp_path, epoch=2, **OBJECTS)
    assert found.same and found.start == "epoch-0001" and found.steps == 6


def test_the_advice_is_that_of_a_replay(tmp_path: Path) -> None:
    train(tmp_path, epochs=2)
    train(tmp_path, epochs=3, resume=True, learning_rate=0.02, checkpoint_allow_drift=True)
    changes = [{"data": (torch.randn(46, 6), torch.zeros(46).long())}, {"model": lambda: torch.nn.Linear(6, 3)}]
    for epoch in (1, 2, 3):
        for change in changes[:1 + (epoch > 1)]:  # from the beginning, names and shapes are not known
            with pytest.raises(ReplayError, match="A replay takes what the run had") as told:
                replay(tmp_path, epoch=epoch, **OBJECTS | change)
            assert "checkpoint." not in str(told.value) and "asked for now" not in str(told.value)


def test_no_step_is_done_with_other_data(tmp_path: Path) -> None:
    train(tmp_path, epochs=1)
    steps: list[int] = []
    count = type("Count", (), {"on_step_end": lambda self, step, state: steps.append(step)})()
    with pytest.raises(ReplayError, match="given now"):
        replay(tmp_path, callbacks=[count], **OBJECTS | {"data": (torch.randn(46, 6), torch.zeros(46).long())})
    assert steps == []


@pytest.mark.parametrize("key, value", [("model_args", {"foo": 1}), ("optimizer_args", {"foo": 1}), ("model_name", "no such"),
                                        ("optimizer", "no such"), ("tokenizer", "no such"), ("scheduler.type", "no such"),
                                        ("learning_rate", "fast"), ("data", "/nowhere/at/all"), ("block_size", 10**9)])
def test_what_a_training_refuses_is_told_in_a_line(
        text_run: Path, tmp_path: Path, key: str, value: Any, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    shutil.copytree(text_run, run)
    shutil.rmtree(run / ".codex")
    resolved = json.loads((run / "config.resolved.json").read_text())
    resolved["values"][key]["value"] = value
    resolved["identity"].pop(key, None)
    (run / "config.resolved.json").write_text(json.dumps(resolved))
    for path in run.glob("epoch-*/metadata.json"):
        facts = json.loads(path.read_text())
        facts["identity"].pop(key, None)
        path.write_text(json.dumps(facts))
    assert main(["replay", str(run)]) == 2
    said = capsys.readouterr().err
    assert "cannot be run again here" in said and "Traceback" not in said


def test_every_error_of_the_package_has_an_exit_code() -> None:
    """Those of what lies below `train_loop`, which a run can raise; the others belong to another command."""
    root = Path(room.__file__).parent
    modules = sorted(".".join(("codex_ml", *p.relative_to(root).with_suffix("").parts)) for p in root.rglob("*.py"))
    below = {m.name for m in house.modules() if m.number < 56}
    own = {kind for name in modules if name in below for kind in vars(importlib.import_module(name)).values()
           if isinstance(kind, type) and issubclass(kind, Exception) and kind.__module__ == name and not kind.__name__.startswith("_")}
    elsewhere = {"MetricError", "NotFinite", "IntegrityError", "SchemaError", "CommandFailed", "NotAFile"}
    assert {kind.__name__ for kind in own if not issubclass(kind, (CorruptFile, *EXIT_CODES))} == elsewhere


def test_a_pipe_in_the_place_of_the_stream(text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    shutil.copytree(text_run, run)
    (run / ".codex/metrics.ndjson").unlink()
    os.mkfifo(run / ".codex/metrics.ndjson")
    assert main(["replay", str(run)]) in (0, 2) and main(["diff", str(run), str(text_run)]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_the_stream_tells_where_an_epoch_ended(tmp_path: Path) -> None:
    """The checkpoint is gone, and the stream has its hash."""
    train(tmp_path)
    shutil.rmtree(tmp_path / "epoch-0003")
    found = replay(tmp_path, to_step=18, **OBJECTS)
    assert found.same and found.target == "epoch-0003" and found.recorded == found.found and "no checkpoint" not in str(found)


@pytest.mark.parametrize("words, said", [({"epoch": -1}, "no epoch -1: they are counted"), ({"to_step": -2}, "no step -2: they"),
                                         ({"to_step": 0}, "no step 0: they")])
def test_numbers_that_no_epoch_and_no_step_has(trained: Path, words: dict[str, int], said: str) -> None:
    with pytest.raises(ReplayError, match=said):
        replay(trained, **words, **OBJECTS)
