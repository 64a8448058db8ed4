"""`verify_run` and `codex-ml verify`: what is planted is found, what a kill may leave is not taken for it, and nothing is changed."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import train

from codex_ml.agreement import METADATA
from codex_ml.checkpoint import list_checkpoints, save_checkpoint, verify_checkpoint
from codex_ml.cli.main import main
from codex_ml.durable import sha256_file
from codex_ml.integrity import IntegrityError, verify_run
from codex_ml.settings import config_sha256


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("CODEX_ML_KEYS", raising=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four epochs, and a twin of another seed."""
    folder = tmp_path_factory.mktemp("integrity")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        patch.delenv("CODEX_ML_KEYS", raising=False)
        train(str(folder / "run"), epochs=4)
        train(str(folder / "twin"), epochs=4, seed=7)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    return {str(p): (p.lstat().st_mtime_ns, sha256_file(p)) for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}


def edit(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | values, indent=2, ensure_ascii=False) + "\n")


def flip(file: Path, at: int = 1000) -> None:
    data = bytearray(file.read_bytes())
    data[at % len(data)] ^= 4
    file.write_bytes(data)


# ---- nothing wrong

@pytest.mark.parametrize("deep", [False, True])
def test_a_run_agrees_and_is_left_as_it_was(run: Path, deep: bool) -> None:
    before = snapshot(run)
    report = verify_run(run, deep=deep)
    assert report and report.exit_code == 0 and report.notes == [] and snapshot(run) == before
    assert [c["name"] for c in report.checkpoints] == [f"epoch-{e:04d}" for e in (1, 2, 3, 4)]
    assert report.bytes == sum(p.stat().st_size for p in run.glob("*/checkpoint.pt"))
    assert json.loads(json.dumps(report.to_json()))["ok"] is True
    for c in list_checkpoints(run):
        one = verify_run(c.folder, deep=deep)
        assert one and [found["sha256"] for found in one.checkpoints] == [c.sha256]


def test_runs_of_every_kind_agree(tmp_path: Path) -> None:
    train(str(tmp_path / "a"), stop_at=4)  # ends with a step checkpoint
    train(str(tmp_path / "b"), stop_at=11, checkpoint_every_steps=2)
    train(str(tmp_path / "b"), checkpoint_every_steps=3)
    train(str(tmp_path / "c"), epochs=6, retention_policy={"keep_last": 1, "keep_every": 3})
    train(str(tmp_path / "c"), epochs=7, learning_rate=0.02, checkpoint_allow_drift=True)
    train(str(tmp_path / "d"))
    train(str(tmp_path / "d"), resume=False)
    for name in "abcd":
        report = verify_run(tmp_path / name, deep=True)
        assert report, str(report)
        assert len(report.notes) == (name in "cd"), report.notes
    [note] = verify_run(tmp_path / "c").notes
    assert "between epoch-0006 and epoch-0007" in note and "learning_rate: 0.01 then, 0.02 after" in note
    assert verify_run(tmp_path / "d/aside-0001", deep=True)


def drop_backup(run: Path) -> None:
    (run / "latest.json.bak").unlink()


def leftovers(run: Path) -> None:
    (run / ".tmp-99999999-0-epoch-0005").mkdir()
    (run / ".trash-99999999-1-epoch-0001").mkdir()
    (run / ".tmp-99999999-2-latest.json").write_text("{")


def pointer_not_written_yet(run: Path) -> None:
    shutil.copy(run / "latest.json.bak", run / "latest.json")


def pruned(run: Path) -> None:
    shutil.rmtree(run / "epoch-0002")


def pruned_to_one(run: Path) -> None:
    for e in (1, 2, 3):
        shutil.rmtree(run / f"epoch-{e:04d}")


def first_without_pointer(run: Path) -> None:
    for e in (2, 3, 4):
        shutil.rmtree(run / f"epoch-{e:04d}")
    (run / "latest.json").unlink()
    (run / "latest.json.bak").unlink()


@pytest.mark.parametrize("state", [drop_backup, leftovers, pointer_not_written_yet, pruned, pruned_to_one, first_without_pointer])
def test_what_a_kill_or_a_policy_leaves_is_no_finding(run: Path, state: Callable[[Path], Any]) -> None:
    state(run)
    report = verify_run(run, deep=True)
    assert report, str(report)
    assert len(report.notes) == {leftovers: 3, pointer_not_written_yet: 1}.get(state, 0)


# ---- something wrong

def renamed(run: Path) -> None:
    (run / "epoch-0004").rename(run / "epoch-0005")


def another_runs(run: Path) -> None:
    shutil.rmtree(run / "epoch-0002")
    shutil.copytree(run.parent / "twin/epoch-0002", run / "epoch-0002")


def linked(run: Path) -> None:
    shutil.move(run / "epoch-0003", run.parent / "elsewhere")
    (run / "epoch-0003").symlink_to(run.parent / "elsewhere")


def pipe(run: Path) -> None:
    (run / "epoch-0003/checkpoint.pt").unlink()
    os.mkfifo(run / "epoch-0003/checkpoint.pt")


def grandparent(run: Path) -> None:
    shutil.rmtree(run / "epoch-0003")
    first = json.loads((run / "epoch-0001/metadata.json").read_text())["checkpoint_sha256"]
    edit(run / "epoch-0004/metadata.json", parent_checkpoint_sha256=first)


def orphan(run: Path) -> None:
    shutil.rmtree(run / "epoch-0002")
    edit(run / "epoch-0003/metadata.json", parent_checkpoint_sha256=None)


def other_identity(file: Path) -> None:
    identity = json.loads(file.read_text())["identity"]
    edit(file, identity=identity | {"batch_size": 999})


def without(file: Path, name: str) -> None:
    content = json.loads(file.read_text())
    del content[name]
    file.write_text(json.dumps(content))


def back(run: Path, epochs: int) -> None:
    """The pointer, whole and true, of some epochs before."""
    folder = run / f"epoch-{4 - epochs:04d}"
    facts = json.loads((folder / "metadata.json").read_text()) | json.loads((folder / "run_manifest.json").read_text())
    pointer = json.loads((run / "latest.json").read_text())
    edit(run / "latest.json", **{name: facts[name] for name in pointer if name in facts}, path=folder.name)


def other_value(run: Path, name: str, value: Any) -> None:
    file = run / "config.resolved.json"
    values = json.loads(file.read_text())["values"]
    edit(file, values=values | {name: values[name] | {"value": value}})


def with_its_hash(file: Path, **changes: Any) -> None:
    """Another identity, with the hash and the values that go with it."""
    content = json.loads(file.read_text())
    identity = content["identity"] | (changes or {"learning_rate": 0.5})
    values = {name: entry | ({"value": identity[name]} if name in changes or name == "learning_rate" else {})
              for name, entry in content.get("values", {}).items()}
    edit(file, identity=identity, config_sha256=config_sha256(identity), **({"values": values} if values else {}))


WRONG: list[tuple[Callable[[Path], Any], str, str]] = [
    (lambda run: flip(run / "epoch-0002/checkpoint.pt"), "epoch-0002/checkpoint.pt", "SHA-256"),
    (lambda run: os.truncate(run / "epoch-0003/checkpoint.pt", 5000), "epoch-0003/checkpoint.pt", "size"),
    (lambda run: (run / "epoch-0003/checkpoint.pt").write_bytes(bytes((run / "epoch-0003/checkpoint.pt").stat().st_size)),
     "epoch-0003/checkpoint.pt", "SHA-256"),
    (lambda run: (run / "epoch-0003/checkpoint.pt").unlink(), "epoch-0003/checkpoint.pt", "SHA-256"),
    (lambda run: shutil.copy(run / "epoch-0002/checkpoint.pt", run / "epoch-0003/checkpoint.pt"), "epoch-0003/checkpoint.pt", "SHA-256"),
    (pipe, "epoch-0003/checkpoint.pt", "SHA-256"),
    (lambda run: (run / "epoch-0003/metadata.json").unlink(), "epoch-0003/metadata.json", "content"),
    (lambda run: (run / "epoch-0003/metadata.json").write_text('{"epoch": 3, "epoch": 3}'), "epoch-0003/metadata.json", "content"),
    (lambda run: edit(run / "epoch-0003/metadata.json", epoch=2), "epoch-0003/metadata.json", "epoch, global_step, checkpoint_sha256"),
    (lambda run: edit(run / "epoch-0003/metadata.json", checkpoint_bytes=17), "epoch-0003/checkpoint.pt", "size"),
    (lambda run: edit(run / "epoch-0003/metadata.json", parent_checkpoint_sha256=None), "epoch-0003/metadata.json",
     "parent_checkpoint_sha256"),
    (lambda run: edit(run / "epoch-0001/metadata.json", parent_checkpoint_sha256="ab" * 32), "epoch-0001/metadata.json",
     "parent_checkpoint_sha256"),
    (orphan, "epoch-0003/metadata.json", "parent_checkpoint_sha256"),
    (grandparent, "epoch-0004/metadata.json", "parent_checkpoint_sha256"),
    (another_runs, "epoch-0003/metadata.json", "parent_checkpoint_sha256"),
    (lambda run: edit(run / "epoch-0003/metadata.json", global_step=1), "epoch-0003/metadata.json", "global_step"),
    (lambda run: edit(run / "epoch-0003/metadata.json", config_sha256="ab" * 32), "epoch-0003/metadata.json", "config_sha256"),
    (lambda run: other_identity(run / "epoch-0003/metadata.json"), "epoch-0003/metadata.json", "config_sha256"),
    (lambda run: (run / "epoch-0003/run_manifest.json").write_text("{}"), "epoch-0003/run_manifest.json", "python"),
    (lambda run: (run / "epoch-0003/run_manifest.json").write_text("["), "epoch-0003/run_manifest.json", "content"),
    *((lambda run, name=name: without(run / "epoch-0003/run_manifest.json", name), "epoch-0003/run_manifest.json", name)
      for name in ("environment", "data_fingerprint", "model_params", "device", "determinism_level", "env")),
    (lambda run: edit(run / "epoch-0003/run_manifest.json", environment={"numpy": "2"}), "epoch-0003/run_manifest.json", "environment"),
    (lambda run: edit(run / "epoch-0003/run_manifest.json", environment=5), "epoch-0003/run_manifest.json", "environment"),
    (lambda run: edit(run / "epoch-0003/run_manifest.json", data_fingerprint="sha256:ab"), "epoch-0003/run_manifest.json",
     "data_fingerprint"),
    (lambda run: edit(run / "epoch-0003/run_manifest.json", device="cuda:0"), "epoch-0003/run_manifest.json", "device"),
    *((lambda run, name=name: without(run / "epoch-0003/metadata.json", name), "epoch-0003/metadata.json", name)
      for name in ("identity", "config_sha256", "metrics", "avg_loss", "grad_accum", "current_lrs", "optimizer_parameters_sha256")),
    (lambda run: edit(run / "epoch-0003/metadata.json", grad_accum=4), "epoch-0003/metadata.json", "grad_accum"),
    (lambda run: edit(run / "epoch-0003/metadata.json", scheduler_type="linear"), "epoch-0003/metadata.json", "scheduler_type"),
    (lambda run: edit(run / "epoch-0003/metadata.json", identity=5), "epoch-0003/metadata.json", "identity"),
    (lambda run: edit(run / "epoch-0003/metadata.json", metrics={"train_loss": 0.0001}), "epoch-0003/metadata.json", "metrics.train_loss"),
    (lambda run: (run / "latest.json").unlink(), "latest.json", "file"),
    (lambda run: (run / "latest.json").write_text("{"), "latest.json", "content"),
    (lambda run: (run / "latest.json.bak").write_text("{"), "latest.json.bak", "content"),
    (lambda run: edit(run / "latest.json", path="../../etc"), "latest.json", "path"),
    (lambda run: edit(run / "latest.json.bak", path="../../etc"), "latest.json.bak", "path"),
    (lambda run: edit(run / "latest.json", checkpoint_sha256="ab" * 32), "latest.json", "checkpoint_sha256"),
    (lambda run: edit(run / "latest.json", checkpoint_sha256="ab"), "latest.json", "checkpoint_sha256"),
    *((lambda run, value=value: edit(run / "latest.json", epoch=value), "latest.json", "epoch") for value in (-3, 4.0, "4", True, None, 3)),
    (lambda run: edit(run / "latest.json.bak", epoch="3"), "latest.json.bak", "epoch"),
    (lambda run: back(run, 2), "latest.json", "path"),
    (lambda run: back(run, 3), "latest.json", "path"),
    (lambda run: edit(run / "latest.json", model_params=1), "latest.json", "model_params"),
    (renamed, "epoch-0005/metadata.json", "epoch, global_step, checkpoint_sha256"),
    (lambda run: shutil.rmtree(run / "epoch-0004"), "latest.json", "path"),
    (linked, "epoch-0003", "kind"),
    (lambda run: (run / "epoch-0009").write_text("x"), "epoch-0009", "kind"),
    (lambda run: (run / "config.resolved.json").unlink(), "config.resolved.json", "content"),
    (lambda run: other_identity(run / "config.resolved.json"), "config.resolved.json", "config_sha256"),
    (lambda run: edit(run / "config.resolved.json", run_id=5), "config.resolved.json", "run_id"),
    *((lambda run, name=name, value=value: other_value(run, name, value), "config.resolved.json", f"values.{name}")
      for name, value in (("learning_rate", 0.5), ("seed", 7), ("scheduler.type", "linear"), ("threads", 7),
                          ("steps_per_epoch", 3), ("optimizer", "sgd"), ("reproducibility.strict", True))),
    (lambda run: other_value(run, "batch_size", 8.0), "config.resolved.json", "content"),
    (lambda run: edit(run / "config.resolved.json", values={}, identity=5), "config.resolved.json", "identity"),
    (lambda run: without(run / "config.resolved.json", "identity"), "config.resolved.json", "identity"),
    (lambda run: without(run / "config.resolved.json", "values"), "config.resolved.json", "values"),
    (lambda run: with_its_hash(run / "config.resolved.json"), "config.resolved.json", "identity"),
    (lambda run: (run / "config.snapshot.json").unlink(), "config.snapshot.json", "file"),
    (lambda run: (run / "config.snapshot.json").write_text("no"), "config.snapshot.json", "content"),
    (lambda run: (run / "config.snapshot.0001.json").write_text("no"), "config.snapshot.0001.json", "content"),
    (lambda run: (run / "tokenizer.json").write_text("no"), "tokenizer.json", "content"),
    (lambda run: (run / "epoch-0003/checkpoint.sigstore.json").write_text("{}"), "epoch-0003/checkpoint.sigstore.json", "signature"),
]


@pytest.mark.parametrize(("harm", "file", "name"), WRONG, ids=[f"{i:02d}-{case[1]}" for i, case in enumerate(WRONG)])
def test_what_is_planted_is_found(made: Path, run: Path, harm: Callable[[Path], Any], file: str, name: str) -> None:
    shutil.copytree(made / "twin", run.parent / "twin")
    harm(run)
    report = verify_run(run)
    assert report.exit_code == 6
    assert (file, name) in [(f.file, f.field) for f in report.findings], str(report)
    assert all(f.problem and f.do for f in report.findings) and file in str(report)
    deep = verify_run(run, deep=True)
    assert (file, name) in [(f.file, f.field) for f in deep.findings]


def test_one_finding_for_one_fault(run: Path) -> None:
    flip(run / "epoch-0002/checkpoint.pt")
    found = sha256_file(run / "epoch-0002/checkpoint.pt")
    [finding] = verify_run(run).findings
    assert found in finding.problem and json.loads((run / "epoch-0002/metadata.json").read_text())["checkpoint_sha256"] in finding.problem
    assert [c["verified"] for c in verify_run(run).checkpoints] == [True, False, True, True]
    [alone] = verify_run(run / "epoch-0002").findings
    assert alone.file == "checkpoint.pt" and verify_run(run / "epoch-0001")


@pytest.mark.parametrize("name", ["latest.json", "epoch-0004/checkpoint.pt"])
def test_every_flipped_byte_is_found(run: Path, name: str) -> None:
    """Of the pointer every one; of the weights one in thirty-one, since each of them is under the same hash."""
    file = run / name
    good = file.read_bytes()
    for i in range(0, len(good), 1 if name == "latest.json" else 31):
        bad = bytearray(good)
        bad[i] ^= 1 << i % 8
        file.write_bytes(bad)
        assert not verify_run(run if name == "latest.json" else file.parent), i


@pytest.mark.parametrize("name", ["epoch-0001", "epoch-0003", "epoch-0004"])
def test_one_epoch_of_another_configuration_is_noted(run: Path, name: str) -> None:
    """Its hash fits. A change can have been allowed, so the place is told; that nothing of it is in the configuration is a finding."""
    with_its_hash(run / name / "metadata.json")
    report = verify_run(run)
    notes = [note for note in report.notes if "learning_rate" in note and "allow_drift" in note]
    assert len(notes) == (1 if name in ("epoch-0001", "epoch-0004") else 2) and all(name in note for note in notes)
    assert [f.field for f in report.findings] == (["identity"] if name == "epoch-0004" else [])


def test_an_allowed_change_that_has_saved_nothing_yet_is_noted(run: Path) -> None:
    with_its_hash(run / "config.resolved.json")
    other_value(run, "checkpoint.allow_drift", True)
    report = verify_run(run)
    assert report and "has saved nothing yet: learning_rate: 0.01 then, 0.5 after" in report.notes[0]


def test_a_snapshot_that_was_put_aside_just_now_is_noted(run: Path) -> None:
    (run / "config.snapshot.json").rename(run / "config.snapshot.0001.json")
    report = verify_run(run)
    assert report and "a kill in between" in report.notes[0]


def test_a_backup_whose_checkpoint_was_made_anew_is_noted(run: Path) -> None:
    edit(run / "latest.json.bak", checkpoint_sha256="ab" * 32)
    report = verify_run(run)
    assert report and "latest.json.bak: checkpoint_sha256" in report.notes[0]


def test_an_epoch_that_was_trained_twice_has_no_history_to_compare(run: Path) -> None:
    edit(run / "epoch-0003/metadata.json", metrics={"train_loss": 0.0001})
    assert [f.field for f in verify_run(run / "epoch-0003").findings] == ["metrics.train_loss"]
    shutil.copytree(run / "epoch-0003", run / "aside-0001/epoch-0003")
    assert verify_run(run)


@pytest.mark.parametrize("slip", [
    {"epoch": -3}, {"epoch": 4.0}, {"epoch": "4"}, {"epoch": True}, {"checkpoint_sha256": "ab"}, {"checkpoint_sha256": None},
    {"model_params": 1}, {"created_at": "yesterday"}], ids=str)
def test_a_resume_does_with_the_pointer_what_the_finding_says(run: Path, slip: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    edit(run / "latest.json", **slip)
    [finding] = verify_run(run).findings
    assert "a resume warns and writes it anew" in finding.do
    with caplog.at_level(logging.WARNING, "codex_ml"):
        result = train(str(run), epochs=4, checkpoint_strict=True)
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "latest.json cannot be used" in line and next(iter(slip)) in line] == lines and len(lines) == 1
    assert result["resumed_from_epoch"] == 4 and verify_run(run, deep=True)


# ---- deep: the content

def deep_change(run: Path, **changes: Any) -> None:
    """The newest checkpoint with another content, and all hashes as they have to be."""
    c = list_checkpoints(run)[0]
    state, metadata = torch.load(c.folder / "checkpoint.pt", weights_only=True), c.metadata
    manifest = json.loads((c.folder / "run_manifest.json").read_text())
    for name, value in changes.items():
        state[name] = value(state[name]) if callable(value) else value
    shutil.rmtree(c.folder)
    made = save_checkpoint(run, c.name, state, metadata, manifest)
    edit(run / "latest.json", **{name: made.metadata[name] for name in ("checkpoint_sha256", "checkpoint_bytes")})


@pytest.mark.parametrize(("name", "value", "field"), [
    ("avg_loss", 0.0001, "avg_loss"), ("avg_loss", "NaN", "avg_loss"), ("current_lrs", [9.0], "current_lrs"),
    ("current_lrs", 5, "current_lrs"), ("current_lrs", [0.01, 0.01], "current_lrs"), ("scheduler_type", "linear", "scheduler_type"),
    ("optimizer_steps_epoch", 77, "optimizer_steps_epoch"), ("optimizer_steps_total", 1, "optimizer_steps_total"),
    ("steps_per_epoch", 7, "steps_per_epoch"), ("learning_rate_history_len", 3.0, "learning_rate_history_len")], ids=str)
def test_deep_compares_all_metadata_that_the_content_tells(run: Path, name: str, value: Any, field: str) -> None:
    edit(run / "epoch-0003/metadata.json", **{name: value})
    found = {(f.file, f.field): f.do for f in verify_run(run, deep=True).findings}
    assert "a resume passes over it" not in found["epoch-0003/checkpoint.pt", field], "it does not: its hash is right"


WRONG_KINDS: dict[str, Any] = {
    "learning_rate_history": 5, "loss_history": ["low"], "optimizer": 5, "scheduler": 5, "step": -4, "loss_sum": "much",
    "loss_samples": True, "optimizer_steps_epoch": 1.0, "steps_per_epoch": "many", "model": [1], "gradients": {"a": 1},
    "schema_version": 1, "accumulated": None,
    "optimizer_type": {}}


@pytest.mark.parametrize("name", WRONG_KINDS)
def test_deep_tells_content_of_another_kind(run: Path, name: str) -> None:
    deep_change(run, **{name: WRONG_KINDS[name]})
    assert verify_run(run), "the hash is right"
    [finding] = verify_run(run, deep=True).findings
    assert (finding.file, finding.field) == ("epoch-0004/checkpoint.pt", name) and "it has to be" in finding.problem


@pytest.mark.parametrize("value", [
    {"state": 5, "param_groups": []}, {"state": {}, "param_groups": 5}, {"state": {"a": {}}, "param_groups": []},
    {"state": {}, "param_groups": [5]}, {"state": {}, "param_groups": [{"params": 5}]},
    {"state": {0: 5}, "param_groups": [{"params": [0]}]}])
def test_deep_tells_an_optimizer_that_is_none(run: Path, value: Any) -> None:
    deep_change(run, optimizer=value)
    [finding] = verify_run(run, deep=True).findings
    assert finding.field in ("optimizer.state", "optimizer.param_groups") and "it has to be" in finding.problem


@pytest.mark.parametrize("value", [{"type": 5, "interval": "epoch", "base_lrs": [0.1]}, {"type": "linear", "interval": "epoch"}, {}])
def test_deep_tells_a_scheduler_that_is_none(run: Path, value: Any) -> None:
    deep_change(run, scheduler=value)
    assert [f.field for f in verify_run(run, deep=True).findings] == ["scheduler"]


@pytest.mark.parametrize(("name", "value", "fields"), [
    ("loss_history", lambda rows: [*rows[:-1], 9.0], ["loss_history"]), ("loss_history", lambda rows: rows[:-1], ["loss_history"] * 2),
    ("learning_rate_history", lambda rows: rows[:-1], ["learning_rate_history", "learning_rate_history_len"])],
    ids=("last loss", "short losses", "short rates"))
def test_deep_tells_content_that_contradicts_itself(run: Path, name: str, value: Any, fields: list[str]) -> None:
    deep_change(run, **{name: value})
    assert sorted(f.field for f in verify_run(run, deep=True).findings) == fields


@pytest.mark.parametrize("key", ["step", "model", "loss_history"])
def test_deep_tells_what_is_missing(run: Path, key: str) -> None:
    c = list_checkpoints(run)[0]
    state, metadata = torch.load(c.folder / "checkpoint.pt", weights_only=True), c.metadata
    del state[key]
    manifest = json.loads((c.folder / "run_manifest.json").read_text())
    shutil.rmtree(c.folder)
    save_checkpoint(run, c.name, state, metadata, manifest)
    assert ("checkpoint.pt", key) in [(f.file, f.field) for f in verify_run(run / c.name, deep=True).findings]


@pytest.mark.parametrize(("epochs", "more"), [
    (4, {"scheduler_type": "linear"}), (4, {"scheduler_type": "cosine", "scheduler_final_lr_scale": 0.1, "scheduler_warmup": 1}),
    (3, {"scheduler_type": "step", "scheduler_step_size": 2}), (3, {"scheduler_type": "linear", "scheduler_interval": "step"}),
    (3, {"scheduler_type": "cosine", "scheduler_interval": "step", "scheduler_warmup": 4, "checkpoint_every_steps": 4}),
    (2, {"learning_rate": 0.0}), (2, {"optimizer": "sgd", "scheduler_type": "linear", "scheduler_final_lr_scale": 1.0})], ids=str)
def test_the_rates_of_every_schedule_agree_also_where_a_run_was_extended(tmp_path: Path, epochs: int, more: dict[str, Any]) -> None:
    train(str(tmp_path), stop_at=4, epochs=epochs, **more)
    assert (report := verify_run(tmp_path, deep=True)), str(report)
    train(str(tmp_path), epochs=epochs, **more)
    assert (report := verify_run(tmp_path, deep=True)), str(report)
    train(str(tmp_path), epochs=2 * epochs + 1, **more)
    assert (report := verify_run(tmp_path, deep=True)), str(report)
    edit(tmp_path / "epoch-0002/metadata.json", current_lrs=[0.0123])
    assert "current_lrs" in [f.field for f in verify_run(tmp_path, deep=True).findings]


def test_rates_that_somebody_sets_are_no_finding(tmp_path: Path) -> None:
    class Sets:
        def on_step_end(self, step: int, state: Any) -> None:
            state.optimizer.param_groups[0]["lr"] = 0.123

    from codex_ml.train_loop import run_training
    x = torch.randn(20, 4)
    run_training(model="mlp", data=(x, (x.sum(1) > 0).long()), callbacks=[Sets()], epochs=3, scheduler_type="linear", progress="off",
                 threads=1, checkpoint_dir=tmp_path)
    assert (report := verify_run(tmp_path, deep=True)), str(report)


def test_losses_that_are_not_finite_agree(tmp_path: Path) -> None:
    train(str(tmp_path), learning_rate=1e30, on_nan="ignore", epochs=2)
    assert json.loads((tmp_path / "epoch-0002/metadata.json").read_text())["avg_loss"] == "NaN"
    assert (report := verify_run(tmp_path, deep=True)), str(report)


def test_a_run_writes_all_the_metadata_that_are_asked_for(run: Path) -> None:
    assert set(METADATA) == json.loads((run / "epoch-0002/metadata.json").read_text()).keys()


def test_deep_reads_what_the_hash_cannot_tell(run: Path) -> None:
    """A checkpoint whose hash is right, and whose content is not that of its metadata."""
    c = list_checkpoints(run)[0]
    metadata = c.metadata
    state = torch.load(c.folder / "checkpoint.pt", weights_only=True)
    shutil.rmtree(c.folder)
    manifest = json.loads((run / "epoch-0003/run_manifest.json").read_text())
    state["optimizer_steps_total"] += 1
    made = save_checkpoint(run, c.name, state, metadata, manifest)
    pointer = json.loads((run / "latest.json").read_text())
    edit(run / "latest.json", **{name: made.metadata[name] for name in ("checkpoint_sha256", "checkpoint_bytes")})
    assert pointer["path"] == c.name and verify_checkpoint(made) and verify_run(run)
    [finding] = verify_run(run, deep=True).findings
    assert (finding.file, finding.field) == ("epoch-0004/checkpoint.pt", "optimizer_steps_total")


def test_deep_runs_no_code(run: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {canary}",)

    file = run / "epoch-0004/checkpoint.pt"
    torch.save({"epoch": 4, "model": Evil()}, file)
    edit(run / "epoch-0004/metadata.json", checkpoint_sha256=sha256_file(file), checkpoint_bytes=file.stat().st_size)
    assert "cannot be loaded" in str(verify_run(run, deep=True)) and not canary.exists()


def test_a_redacted_configuration_is_noted(run: Path) -> None:
    file = run / "config.resolved.json"
    identity = json.loads(file.read_text())["identity"]
    edit(file, identity=identity | {"model_args": {"api_key": "[redacted: key name]"}})
    report = verify_run(run)
    assert report and "redacted" in report.notes[0]


@pytest.mark.parametrize("path", ["nowhere", "file", "empty"])
def test_where_there_is_nothing_to_verify(tmp_path: Path, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(IntegrityError, match=path):
        verify_run(tmp_path / path)
    assert main(["verify", str(tmp_path / path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(tmp_path / path) in err


def test_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    text = capsys.readouterr().out
    assert "4 checkpoints" in text and "all of it agrees" in text and text.count("verified") == 4
    assert main(["verify", str(run), "--deep", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["deep"] is True
    flip(run / "epoch-0002/checkpoint.pt")
    assert main(["verify", str(run)]) == 6
    text = capsys.readouterr().out
    assert "epoch-0002/checkpoint.pt: SHA-256" in text and "to do: " in text and "BROKEN" in text
    assert main(["verify", str(run), "--json"]) == 6
    [finding] = json.loads(capsys.readouterr().out)["findings"]
    assert finding.keys() == {"file", "field", "value", "problem", "do"} and finding["file"] == "epoch-0002/checkpoint.pt"
    assert main(["verify"]) == 2 and main(["verify", str(run), "--keys", "nowhere"]) == 2
    assert main(["verify", str(run / "epoch-0002")]) == 6 and main(["verify", str(run / "epoch-0001")]) == 0


def test_a_prune_meanwhile_is_no_finding(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from codex_ml import audit

    def pruned_now(c: Any) -> str:
        if c.name == "epoch-0001" and c.folder.exists():
            shutil.rmtree(c.folder)
        return verify_checkpoint(c)

    monkeypatch.setattr(audit, "verify_checkpoint", pruned_now)
    report = verify_run(run)
    assert report and [c["name"] for c in report.checkpoints] == ["epoch-0002", "epoch-0003", "epoch-0004"]


def test_it_is_as_fast_as_the_hash(tmp_path: Path) -> None:
    """Three checkpoints of 32 MB: not much more than hashing them one after the other."""
    parent = None
    for e in (1, 2, 3):
        place = {"epoch": e, "global_step": e}
        state, metadata = place | {"model": torch.full((8_000_000,), float(e))}, place | {"parent_checkpoint_sha256": parent}
        manifest = dict.fromkeys(("python", "platform", "git_sha", "lock_sha256", "env"))
        parent = save_checkpoint(tmp_path, f"epoch-{e:04d}", state, metadata, manifest).sha256
    took = []
    for _ in range(3):
        begun = time.perf_counter()
        for e in (1, 2, 3):
            sha256_file(tmp_path / f"epoch-{e:04d}/checkpoint.pt")
        hashed = time.perf_counter() - begun
        report = verify_run(tmp_path)
        assert report, str(report)
        took.append(report.seconds / hashed)
    assert min(took) < 2, took
