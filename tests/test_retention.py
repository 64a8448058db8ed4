import errno
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_ml.checkpoint import Checkpoint, list_checkpoints, save_checkpoint, write_pointer
from codex_ml.config import RetentionConfig
from codex_ml.train_loop import run_training
from codex_ml.utils import retention
from codex_ml.utils.retention import plan_retention, protected_names, prune_checkpoints


def fill(folder, losses, steps=()):
    for epoch, loss in enumerate(losses, 1):
        state = {"epoch": epoch, "global_step": 10 * epoch}
        save_checkpoint(folder, f"epoch-{epoch:04d}", state, {**state, "avg_loss": loss}, {})
    for step in steps:
        state = {"epoch": step // 10, "global_step": step}
        save_checkpoint(folder, f"step-{step:08d}", state, state, {})


def names(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith(("epoch-", "step-")))


def epochs(folder):
    return [int(name[6:]) for name in names(folder) if name.startswith("epoch-")]


def edit(folder, name, **changes):
    path = folder / name / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil(folder, name):
    (folder / name / "checkpoint.pt").write_bytes(b"zeros")


# ---- the plan

limits = st.none() | st.integers(1, 15)
policies = st.builds(RetentionConfig, keep_last=limits, keep_every=limits, keep_best=limits, max_epochs=limits,
                     max_bytes=st.none() | st.integers(1, 3000))
losses = st.floats(0, 9, allow_nan=False) | st.none() | st.just("NaN")


@settings(max_examples=400, deadline=None)
@given(policy=policies, drawn=st.lists(st.tuples(losses, losses, st.integers(0, 500)), max_size=14), data=st.data())
def test_any_plan(policy, drawn, data):
    checkpoints = [
        Checkpoint(Path(f"epoch-{e:04d}"), {"epoch": e, "global_step": e, "avg_loss": a, "metrics": {"val_loss": v}, "checkpoint_bytes": b})
        for e, (a, v, b) in enumerate(drawn, 1)]
    by_name = {c.name: c for c in checkpoints}
    protected = set(data.draw(st.lists(st.sampled_from(sorted(by_name)), max_size=3))) if by_name else set()
    plan = plan_retention(checkpoints, policy, protected)
    kept = [c for c, keep in zip(checkpoints, plan, strict=True) if keep]
    gone = [c for c, keep in zip(checkpoints, plan, strict=True) if not keep]
    free = [c for c in kept if c.name not in protected]
    size = sum(c.metadata["checkpoint_bytes"] for c in kept)

    assert protected <= {c.name for c in kept}
    assert plan == plan_retention(checkpoints, policy, protected)
    assert kept == [c for c, k in zip(kept, plan_retention(kept, policy, protected), strict=True) if k] or policy.keep_best
    if all(value is None for value in vars(policy).values()):
        assert not gone
    if free and policy.max_epochs:
        assert len(kept) <= policy.max_epochs
    if free and policy.max_bytes:
        assert size <= policy.max_bytes
    selects = (policy.keep_last, policy.keep_every, policy.keep_best)
    if free and any(selects):
        last = {c.name for c in checkpoints[-policy.keep_last:]} if policy.keep_last else set()
        best = {c.name for c in sorted(checkpoints, key=lambda c: (retention.score(c), c.epoch))[:policy.keep_best or 0]}
        for c in free:
            assert c.name in last or c.name in best or (policy.keep_every and c.epoch % policy.keep_every == 0)
    if not policy.max_epochs and not policy.max_bytes and policy.keep_last:
        assert all(plan[-policy.keep_last:])
    capped = [c.epoch for c in gone] if not any(selects) else []
    assert not free or not capped or max(capped) < min(c.epoch for c in free), "the caps take the oldest first"


@pytest.mark.parametrize("policy,kept", [
    ({"keep_last": 3, "keep_every": 5}, [5, 8, 9, 10]), ({"keep_last": 1}, [10]), ({"keep_every": 4}, [4, 8, 10]),
    ({"keep_last": 99}, list(range(1, 11))), ({"max_epochs": 4}, [7, 8, 9, 10]), ({"keep_every": 2, "max_epochs": 3}, [6, 8, 10]),
    ({}, list(range(1, 11))), ({"keep_last": None, "max_bytes": None}, list(range(1, 11))), ({"max_epochs": 1}, [10]),
    ({"max_bytes": 1}, [10]),
])
def test_policies_on_a_disk(tmp_path, policy, kept):
    fill(tmp_path, [1 / e for e in range(1, 11)])
    rehearsal = prune_checkpoints(tmp_path, **policy, dry_run=True)
    assert epochs(tmp_path) == list(range(1, 11))
    report = prune_checkpoints(tmp_path, **policy)
    assert epochs(tmp_path) == kept
    assert report == rehearsal | {"dry_run": False}
    assert list(report)[:5] == ["total", "kept", "pruned", "protected_latest", "dry_run"] and report["failed"] == []
    assert report["total"] == 10 == len(report["kept"]) + len(report["pruned"]) and report["protected_latest"] == "epoch-0010"
    for row in report["pruned"]:
        assert set(row) == {"name", "bytes", "checkpoint_sha256"} and row["bytes"] > 0 and len(row["checkpoint_sha256"]) == 64
    assert prune_checkpoints(tmp_path, **policy)["pruned"] == []


def test_a_byte_budget(tmp_path):
    fill(tmp_path, [1 / e for e in range(1, 6)])
    size = list_checkpoints(tmp_path)[0].metadata["checkpoint_bytes"]
    prune_checkpoints(tmp_path, max_bytes=3 * size + size // 2)
    assert epochs(tmp_path) == [3, 4, 5]


@pytest.mark.parametrize("budget", [10, 10**9])
def test_a_budget_that_cannot_hold_is_told_before_the_first_step_and_in_the_report(tmp_path, caplog, budget):
    seen = []

    class Look:
        def on_train_start(self, state):
            seen.extend(record.getMessage() for record in caplog.records if "max_bytes" in record.getMessage())

    x = torch.randn(20, 4)
    with caplog.at_level(logging.WARNING, "codex_ml"):
        result = run_training(model="mlp", data=(x, (x.sum(1) > 0).long()), epochs=2, progress="off", threads=1, callbacks=[Look()],
                              checkpoint_dir=tmp_path, checkpoint_retention_max_bytes=budget)
    report = result["retention_last"]
    assert report["bytes"] == sum((tmp_path / name / "checkpoint.pt").stat().st_size for name in report["kept"])
    assert report["over_max_bytes"] == max(0, report["bytes"] - budget)
    if budget == 10:
        assert len(seen) == 1 and "checkpoint.retention.max_bytes=10 cannot hold what must stay" in seen[0] and "about" in seen[0]
    else:
        assert seen == []


@pytest.mark.parametrize(("budget", "epochs", "said"), [
    (199, 2, "where they are two"), (99, 2, "cannot hold what must stay"), (99, 1, "an epoch has about 100 bytes"), (100, 1, None),
    (200, 9, None), (None, 9, None)])
def test_what_a_budget_cannot_hold(budget, epochs, said):
    problem = retention.budget_problem(RetentionConfig(max_bytes=budget), epochs, 100)
    assert problem is None if said is None else said in problem


# ---- what must stay

def test_the_best_stays(tmp_path):
    fill(tmp_path, [3, 1, 2, 2, 2])
    prune_checkpoints(tmp_path, keep_last=1, max_epochs=1, max_bytes=1)
    assert epochs(tmp_path) == [2, 5]


def test_validation_decides_over_training_loss_and_nan_is_never_best(tmp_path):
    fill(tmp_path, [0.1, 0.2, 0.3, 0.4])
    for epoch, value in enumerate(["NaN", 5.0, 4.0, "Infinity"], 1):
        edit(tmp_path, f"epoch-{epoch:04d}", metrics={"val_loss": value})
    prune_checkpoints(tmp_path, keep_last=1)
    assert epochs(tmp_path) == [3, 4]


@pytest.mark.parametrize("changes", [{"metrics": None}, {"metrics": [1]}, {"metrics": {"val_loss": "low"}}, {"avg_loss": True},
                                     {"checkpoint_bytes": "many"}, {"checkpoint_bytes": None}, {"metrics": {"val_loss": [1]}}])
def test_metadata_of_the_wrong_kind(tmp_path, changes):
    fill(tmp_path, [3, 2, 1])
    edit(tmp_path, "epoch-0001", **changes)
    prune_checkpoints(tmp_path, keep_last=1, max_bytes=10**6)
    assert epochs(tmp_path) == [3]


def test_the_one_the_pointer_names_stays(tmp_path):
    fill(tmp_path, [3, 2, 1, 0])
    write_pointer(tmp_path, {"epoch": 2, "path": "epoch-0002", "checkpoint_sha256": list_checkpoints(tmp_path)[2].sha256})
    report = prune_checkpoints(tmp_path, keep_last=1)
    assert epochs(tmp_path) == [2, 4] and report["protected_latest"] == "epoch-0002"
    (tmp_path / "latest.json").write_text("{")
    (tmp_path / "latest.json.bak").unlink(missing_ok=True)
    report = prune_checkpoints(tmp_path, keep_last=1)
    assert epochs(tmp_path) == [4] and report["protected_latest"] == "epoch-0004"


def test_a_pointer_to_what_is_not_there(tmp_path):
    fill(tmp_path, [3, 2, 1])
    write_pointer(tmp_path, {"epoch": 9, "path": "epoch-0009", "checkpoint_sha256": "ab" * 32})
    assert prune_checkpoints(tmp_path, keep_last=1)["protected_latest"] == "epoch-0003"


def test_the_newest_that_verifies_stays_and_the_newest_too(tmp_path):
    fill(tmp_path, [5, 4, 3, 2, 1])
    for name in ("epoch-0003", "epoch-0004", "epoch-0005"):
        spoil(tmp_path, name)
    prune_checkpoints(tmp_path, keep_last=1)
    assert epochs(tmp_path) == [2, 5]


def test_a_newest_one_without_metadata_stays(tmp_path):
    fill(tmp_path, [3, 2, 1, 0])
    (tmp_path / "epoch-0004" / "metadata.json").write_text("")
    report = prune_checkpoints(tmp_path, keep_every=100)
    assert epochs(tmp_path) == [3, 4] and report["protected_latest"] == "epoch-0003"


def test_an_old_one_without_metadata_is_not_taken_for_the_newest(tmp_path):
    fill(tmp_path, [3, 2, 1, 0])
    (tmp_path / "epoch-0001" / "metadata.json").unlink()
    report = prune_checkpoints(tmp_path, keep_last=2)
    assert epochs(tmp_path) == [3, 4]
    assert report["pruned"][0] == {"name": "epoch-0001", "bytes": None, "checkpoint_sha256": None}


def test_the_best_stays_whichever_reading_of_it_fails(tmp_path, monkeypatch):
    """The disk says EIO once: what could not be read at one moment is not judged by what can be read at the next."""
    real, reads = os.open, [0]
    for failing in range(1, 20):
        folder = tmp_path / str(failing)
        folder.mkdir()
        fill(folder, [3, 1, 2, 2.5])
        reads[0] = 0

        def eio_once(path, *args, failing=failing, **kwargs):
            if str(path).endswith("epoch-0002/metadata.json"):
                reads[0] += 1
                if reads[0] == failing:
                    raise OSError(errno.EIO, "Input/output error")
            return real(path, *args, **kwargs)

        with monkeypatch.context() as m:
            m.setattr(os, "open", eio_once)
            prune_checkpoints(folder, keep_last=2)
        assert 2 in epochs(folder), f"the best is gone, of which reading {failing} failed"
        if reads[0] < failing:
            break
    assert 1 < failing < 19


def test_none_verifies_none_of_the_protected_goes(tmp_path):
    fill(tmp_path, [3, 2, 1])
    for name in names(tmp_path):
        spoil(tmp_path, name)
    prune_checkpoints(tmp_path, keep_last=1)
    assert epochs(tmp_path) == [3]


def test_steps_are_no_subject_but_may_be_the_latest(tmp_path):
    fill(tmp_path, [3, 2, 1], steps=(5, 37))
    report = prune_checkpoints(tmp_path, keep_last=1)
    assert names(tmp_path) == ["epoch-0003", "step-00000005", "step-00000037"]
    assert report["protected_latest"] == "step-00000037" and report["total"] == 3
    assert protected_names(tmp_path)[1] == {"epoch-0003", "step-00000037"}


def test_hashing_is_spared_for_what_is_known_and_where_nothing_goes(tmp_path, monkeypatch):
    fill(tmp_path, [3, 2, 1])
    hashed, real = [], retention.verify_checkpoint
    monkeypatch.setattr(retention, "verify_checkpoint", lambda c: hashed.append(c.name) or real(c))
    prune_checkpoints(tmp_path)
    prune_checkpoints(tmp_path, keep_last=2, verified=("epoch-0003",))
    assert hashed == []
    prune_checkpoints(tmp_path, keep_last=2)
    assert hashed == ["epoch-0003"]


def test_ten_thousand_is_after_nine_thousand(tmp_path):
    fill(tmp_path, [1])
    for epoch in (9999, 10000, 10001):
        state = {"epoch": epoch, "global_step": epoch}
        save_checkpoint(tmp_path, f"epoch-{epoch}", state, {**state, "avg_loss": 2}, {})
    prune_checkpoints(tmp_path, keep_last=2)
    assert epochs(tmp_path) == [1, 10000, 10001]


# ---- what is deleted, and what is not

def test_links_and_strangers_are_neither_followed_nor_deleted(tmp_path):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    folder.mkdir(), elsewhere.mkdir()
    fill(folder, [3, 2, 1])
    shutil.move(folder / "epoch-0001", elsewhere / "epoch-0001")
    (folder / "epoch-0001").symlink_to(elsewhere / "epoch-0001")
    for stranger in ("epoch-1", "epoch-00x1", "epoch-٠٠٠١", "epoch-0001-copy", "notes"):
        (folder / stranger).mkdir()
    (folder / "epoch-0000").write_text("a file")
    report = prune_checkpoints(folder, keep_last=1)
    assert report["total"] == 2 and [row["name"] for row in report["pruned"]] == ["epoch-0002"]
    assert (folder / "epoch-0001").is_symlink() and (elsewhere / "epoch-0001" / "checkpoint.pt").exists()
    assert {"epoch-1", "epoch-00x1", "epoch-٠٠٠١", "epoch-0001-copy", "notes", "epoch-0000"} <= {p.name for p in folder.iterdir()}


def test_a_link_inside_a_checkpoint_is_not_followed(tmp_path):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    folder.mkdir(), elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    fill(folder, [3, 2, 1])
    (folder / "epoch-0001" / "link").symlink_to(elsewhere)
    prune_checkpoints(folder, keep_last=1)
    assert epochs(folder) == [3] and (elsewhere / "precious").exists()


def test_what_cannot_be_deleted_is_told_and_tried_again(tmp_path, monkeypatch, caplog):
    fill(tmp_path, [5, 4, 3, 2, 1])
    real = retention.remove_folder

    def refuse(folder):
        if folder.name == "epoch-0002":
            raise PermissionError(1, "Operation not permitted")
        real(folder)

    monkeypatch.setattr(retention, "remove_folder", refuse)
    with caplog.at_level(logging.WARNING):
        report = prune_checkpoints(tmp_path, keep_last=2)
    assert report["failed"] == ["epoch-0002"] and [row["name"] for row in report["pruned"]] == ["epoch-0001", "epoch-0003"]
    assert report["kept"] == ["epoch-0004", "epoch-0005"] and "epoch-0002 could not be deleted" in caplog.text
    monkeypatch.setattr(retention, "remove_folder", real)
    assert [row["name"] for row in prune_checkpoints(tmp_path, keep_last=2)["pruned"]] == ["epoch-0002"]


@pytest.mark.parametrize("after", range(6))
def test_a_death_in_the_middle_leaves_whole_checkpoints(tmp_path, after):
    fill(tmp_path, [4, 3, 2, 1])
    pid = os.fork()
    if pid == 0:
        calls = [0]

        def dying(real):
            def call(*arguments, **keywords):
                if calls[0] == after:
                    os._exit(9)
                calls[0] += 1
                return real(*arguments, **keywords)
            return call

        os.rename, os.unlink, os.rmdir, os.fsync = map(dying, (os.rename, os.unlink, os.rmdir, os.fsync))
        prune_checkpoints(tmp_path, keep_last=1)
        os._exit(0)
    os.waitpid(pid, 0)
    assert {"epoch-0004"} <= set(names(tmp_path))
    for name in names(tmp_path):
        assert len(list((tmp_path / name).iterdir())) == 3
    prune_checkpoints(tmp_path, keep_last=1)
    assert epochs(tmp_path) == [4]


def test_an_empty_and_a_missing_folder(tmp_path):
    empty = {"total": 0, "kept": [], "pruned": [], "protected_latest": None, "dry_run": False, "failed": [], "bytes": 0,
             "over_max_bytes": 0}
    assert prune_checkpoints(tmp_path, keep_last=1) == empty == prune_checkpoints(tmp_path / "no", keep_last=1)


@pytest.mark.parametrize("field", ["keep_last", "keep_every", "keep_best", "max_epochs", "max_bytes"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5, 1.0, "3", [1]])
def test_a_wrong_value_names_the_field_and_deletes_nothing(tmp_path, field, value):
    fill(tmp_path, [2, 1])
    with pytest.raises(ValueError, match=f"{field}=.*whole number from 1 on, or None"):
        prune_checkpoints(tmp_path, **{field: value})
    assert epochs(tmp_path) == [1, 2]
