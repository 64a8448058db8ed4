"""Replays: the same bits where nothing changed, the first step and the reason where something did, and a run that is never touched."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Augmented, StopAt, make_model

from codex_ml import replay as room
from codex_ml.cli.main import main
from codex_ml.recorded_steps import NoRun
from codex_ml.replay import ReplayError, replay
from codex_ml.train_loop import run_training
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
    train(tmp_path)
    path = tmp_path / "epoch-0002/metadata.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"checkpoint_sha256": "0" * 64}))
    found = replay(tmp_path, epoch=2, **OBJECTS)
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
