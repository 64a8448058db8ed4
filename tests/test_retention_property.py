"""Retention over random histories, with crashes: what must stay stays, the budget holds, the report is true, the forecast is no less.

A history is a run's own order of work: save an epoch (durable, pointed to), then prune by the policy; in between a checkpoint rots, the
process dies at any operation, and a later process sweeps up and goes on. The disk is the real one.
"""

import logging
import os
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from codex_ml import durable
from codex_ml.checkpoint import list_checkpoints, newest_verified, read_pointer, save_checkpoint, verify_checkpoint, write_pointer
from codex_ml.config import RetentionConfig
from codex_ml.durable import CorruptFile, sweep
from codex_ml.train_loop import run_training
from codex_ml.utils import retention
from codex_ml.utils.retention import most_held, prune_checkpoints, score

limits = st.none() | st.integers(1, 6)
policies = st.fixed_dictionaries({"keep_last": limits, "keep_every": limits, "keep_best": limits, "max_epochs": limits,
                                  "max_bytes": st.none() | st.integers(1, 12_000)})
losses = st.sampled_from([0.5, 1.0, 1.5, 2.0, None, "NaN"])


def good(folder):
    """Names of the checkpoints that verify."""
    names = set()
    for checkpoint in list_checkpoints(folder):
        try:
            verify_checkpoint(checkpoint)
            names.add(checkpoint.name)
        except CorruptFile:
            continue
    return names


def save(folder, epoch, loss):
    facts = {"epoch": epoch, "global_step": epoch}
    checkpoint = save_checkpoint(folder, f"epoch-{epoch:04d}", facts, {**facts, "avg_loss": loss}, {})
    write_pointer(folder, {"epoch": epoch, "path": checkpoint.name, "checkpoint_sha256": checkpoint.sha256})


def must_stay(folder):
    """Latest (by the pointer and by number), best, newest that verifies: found here by reading everything, without the plan."""
    epochs = [c for c in list_checkpoints(folder) if c.is_epoch]
    pointer, _ = read_pointer(folder)
    best = sorted((c for c in epochs if c.metadata), key=lambda c: (score(c), c.epoch))[:1]
    sure = sorted(good(folder))[-1:]
    return {c.name for c in (*epochs[:1], *best)} | set(sure) | ({pointer["path"]} & {c.name for c in epochs} if pointer else set())


def size_of(folder, names):
    return sum(c.metadata.get("checkpoint_bytes", 0) for c in list_checkpoints(folder) if c.name in names)


OPERATIONS = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync", "write", "open")


def dies_at(k, work):
    """Do `work` in a forked child that is gone at its k-th operation on the disk; True if it got to the end."""
    pid = os.fork()
    if pid == 0:
        left = [k]

        def counted(real):
            def call(*arguments, **keywords):
                if left[0] == 0:
                    os._exit(9)
                left[0] -= 1
                return real(*arguments, **keywords)
            return call

        code = 1
        try:
            for name in OPERATIONS:
                setattr(os, name, counted(getattr(os, name)))
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 9)
    return os.waitstatus_to_exitcode(status) == 0


class History(RuleBasedStateMachine):
    """A run, its retention, its accidents."""

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp())
        self.epoch, self.acknowledged = 0, set()  # names that a save came back for, until a report says they are gone
        self.rotten = set()

    def teardown(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    @rule(loss=losses)
    def save_an_epoch(self, loss):
        before = good(self.folder)
        self.epoch += 1
        save(self.folder, self.epoch, loss)
        self.acknowledged.add(f"epoch-{self.epoch:04d}")
        assert before < good(self.folder), "nothing good may go before the new one is durable"

    @rule(loss=losses, policy=policies)
    def save_and_prune(self, loss, policy):
        self.save_an_epoch(loss)
        self.prune(policy)

    @rule(policy=policies)
    def prune(self, policy):
        staying, there = must_stay(self.folder), {c.name for c in list_checkpoints(self.folder)}
        rehearsal = prune_checkpoints(self.folder, **policy, dry_run=True)
        assert {c.name for c in list_checkpoints(self.folder)} == there
        report = prune_checkpoints(self.folder, **policy)
        left = {c.name for c in list_checkpoints(self.folder)}
        gone = {row["name"] for row in report["pruned"]}
        assert staying <= left, (policy, staying, left)
        assert report | {"dry_run": True} == rehearsal, "the rehearsal says what will happen"
        assert set(report["kept"]) == left and gone == there - left and report["total"] == len(there) and report["failed"] == []
        assert all(value is None for value in policy.values()) <= (not gone)
        more = left - staying
        if policy["max_bytes"] and more:
            assert size_of(self.folder, left) <= policy["max_bytes"], "a byte budget is passed only by what must stay"
        if policy["max_epochs"] and more:
            assert len(left) <= policy["max_epochs"]
        self.acknowledged -= gone

    @rule(loss=losses, k=st.integers(0, 30))
    def die_while_saving(self, loss, k):
        before = good(self.folder)
        if dies_at(k, lambda: save(self.folder, self.epoch + 1, loss)):
            self.acknowledged.add(f"epoch-{self.epoch + 1:04d}")
        assert before <= good(self.folder), "a death while saving takes nothing that was good"
        self.recover()

    @rule(policy=policies, k=st.integers(0, 12))
    def die_while_pruning(self, policy, k):
        staying, before = must_stay(self.folder), good(self.folder)
        dies_at(k, lambda: prune_checkpoints(self.folder, **policy))
        assert staying <= {c.name for c in list_checkpoints(self.folder)}
        planned = {row["name"] for row in prune_checkpoints(self.folder, **policy, dry_run=True)["pruned"]}
        gone = before - good(self.folder)
        assert staying & before <= good(self.folder) and not gone & staying, (gone, planned)
        assert not [name for name in gone if (self.folder / name).exists()], "a checkpoint is whole, or it is gone"
        left = {c.name for c in list_checkpoints(self.folder)}
        assert self.acknowledged - left <= gone | self.rotten  # a rotten one may go, too
        self.acknowledged &= left
        self.recover()

    def recover(self):
        """What the next process does."""
        sweep(self.folder)
        epochs = [c.epoch for c in list_checkpoints(self.folder)]
        self.epoch = max(epochs, default=0)

    @rule(which=st.integers(0, 10))
    def rot(self, which):
        """A checkpoint goes bad; never the last good one, which nothing could make good again."""
        names = sorted(good(self.folder))
        if len(names) > 1:
            name = names[-1 - which % len(names)]
            path = self.folder / name / "checkpoint.pt"
            path.write_bytes(path.read_bytes()[:-1] + b"?")
            self.rotten.add(name)

    @invariant()
    def nothing_acknowledged_is_lost(self):
        assert self.acknowledged <= {c.name for c in list_checkpoints(self.folder)}
        if self.acknowledged - self.rotten:
            assert newest_verified(self.folder)[0] is not None


History.TestCase.settings = settings(max_examples=int(os.environ.get("HISTORIES", "40")), stateful_step_count=25, deadline=None,
                                     suppress_health_check=list(HealthCheck))
TestHistory = History.TestCase


# ---- that the machine can see


def histories():
    """Random ones, always the same."""
    few = settings(max_examples=150, stateful_step_count=20, deadline=None, database=None, derandomize=True, print_blob=False,
                   suppress_health_check=list(HealthCheck), report_multiple_bugs=False, phases=[p for p in settings().phases
                                                                                               if p.name in ("explicit", "generate")])
    from hypothesis.stateful import run_state_machine_as_test
    run_state_machine_as_test(History, settings=few)


def every_death_while_pruning():
    """Die at the first operation of a prune, at the second, and so on to the last: each time a checkpoint is whole under its name, or has
    lost it. Returns how many there are."""
    for k in range(1000):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            for epoch in (1, 2, 3):
                save(folder, epoch, 1.0 / epoch)
            files = sorted(p.name for p in (folder / "epoch-0003").iterdir())
            ended = dies_at(k, lambda folder=folder: prune_checkpoints(folder, keep_last=1))
            names = {c.name for c in list_checkpoints(folder)}
            for name in sorted(names):
                left = sorted(p.name for p in (folder / name).iterdir())
                assert left == files, f"dead at operation {k}: {name} is half deleted, {left} are left of it"
            assert "epoch-0003" in names == good(folder)
            sweep(folder)
            assert {p.name for p in folder.iterdir()} == names | {"latest.json", "latest.json.bak"}, "a leftover goes with the next sweep"
            if ended:
                assert names == {"epoch-0003"}
                return k
    raise AssertionError("it never came to its end")


def test_a_removal_takes_the_name_first():
    assert every_death_while_pruning() >= 2 * 5  # two checkpoints: a rename each, a sync, three files


def in_place(folder):
    """`remove_folder` without the rename."""
    shutil.rmtree(folder)
    durable.fsync_dir(Path(folder).parent)


MUTANTS = {  # what is broken, and what has to see it
    "the best is not protected": (histories, lambda m: m.setattr(retention, "score", lambda checkpoint: 0.0)),
    "nothing is protected": (histories, lambda m: m.setattr(retention, "protected_names", lambda *_: (None, set()))),
    "the newest that verifies is not protected": (
        histories, lambda m: m.setattr(retention, "_verifies", lambda checkpoint, verified: True)),
    "the budget is not kept": (histories, lambda m: m.setattr(retention, "_size", lambda checkpoint: 0)),
    "the report is not true": (histories, lambda m: m.setattr(retention, "_removed", lambda checkpoint, failed: True)),
    "a removal deletes in place": (every_death_while_pruning, lambda m: m.setattr(retention, "remove_folder", in_place)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_retention_is_seen(monkeypatch, mutant):
    sees, breaks = MUTANTS[mutant]
    breaks(monkeypatch)
    with pytest.raises(AssertionError):
        sees()


# ---- how much disk a run will need


@settings(max_examples=300, deadline=None)
@given(policy=policies, drawn=st.lists(losses, min_size=1, max_size=30), size=st.integers(1, 3000))
def test_no_history_holds_more_than_was_foretold(policy, drawn, size):
    from codex_ml.checkpoint import Checkpoint

    config, held = RetentionConfig(**policy), []
    if all(value is None for value in policy.values()):
        assert most_held(config, len(drawn), size) == len(drawn) * size
    for epoch, loss in enumerate(drawn, 1):
        facts = {"epoch": epoch, "global_step": epoch, "avg_loss": loss, "checkpoint_bytes": size}
        held.append(Checkpoint(Path(f"epoch-{epoch:04d}"), facts))
        assert len(held) * size <= most_held(config, len(drawn), size) + size, "one more while it is written"
        best = sorted(held, key=lambda c: (score(c), c.epoch))[0].name
        plan = retention.plan_retention(held, config, {held[-1].name, best})
        held = [c for c, keep in zip(held, plan, strict=True) if keep]
        assert len(held) * size <= most_held(config, len(drawn), size)
    note(f"{len(held)} held")


def train(folder, **keywords):
    import torch

    generator = torch.Generator().manual_seed(0)
    data = torch.randn(32, 64, generator=generator), torch.randint(0, 3, (32,), generator=generator)
    options = {"model": "mlp", "model_args": {"hidden": [256, 256]}, "data": data, "epochs": 20, "batch_size": 16, "threads": 1,
               "progress": "off", "checkpoint_dir": folder, "system_metrics_interval": 0.0}
    return run_training(**options | keywords)


class Watch:
    """The most bytes that checkpoints and metrics took."""

    most = 0

    def __init__(self, folder):
        self.folder = folder

    def look(self):
        self.most = max(self.most, sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file()))


NEEDS = (({}, "adamw"), ({"retention_policy": {"keep_last": 2}}, "sgd"), ({"grad_accum": 3}, "adam"),
         ({"retention_policy": {"max_bytes": 4_000_000}, "checkpoint_every_steps": 1}, "adamw"))


@pytest.mark.parametrize(("options", "optimizer"), NEEDS)
def test_what_a_run_needs_is_foretold(tmp_path, monkeypatch, caplog, options, optimizer):
    """The forecast is no less than what lay there at the worst moment, and not a third more."""
    folder, real = tmp_path / "run", durable.publish_folder
    watch = Watch(folder)

    def publish(tmp, final):
        real(tmp, final)
        watch.look()

    monkeypatch.setattr("codex_ml.checkpoint.publish_folder", publish)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_500_000))
    with caplog.at_level(logging.WARNING, "codex_ml"):
        train(folder, optimizer=optimizer, **options)
    lines = [r.getMessage() for r in caplog.records if "will come to need" in r.getMessage()]
    assert len(lines) == (watch.most > 2_500_000 * 1.01) or lines, "a run that does not fit is told"
    if lines:
        needed = int(lines[0].split("need ")[1].split(" ")[0].replace(",", ""))
        assert watch.most <= needed <= watch.most * 1.34 + 200_000, (watch.most, needed)


Usage = namedtuple("Usage", "total used free")


def test_not_even_one_fits_and_the_whole_does_not_fit(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 1_000_000))
    with pytest.raises(durable.StorageError, match=r"needs about [0-9,]+ bytes, and 1,000,000 are free"):
        train(tmp_path / "none")
    assert not list((tmp_path / "none").glob("epoch-*"))
    free = 8_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free))
    with caplog.at_level(logging.WARNING, "codex_ml"):
        train(tmp_path / "some", epochs=20)
    line = next(r.getMessage() for r in caplog.records if "will come to need" in r.getMessage())
    fewer = int(line.rpartition("keep_last=")[2])
    caplog.clear()
    with caplog.at_level(logging.WARNING, "codex_ml"):
        train(tmp_path / "fewer", epochs=20, retention_policy={"keep_last": fewer})  # as the line says
    assert not [r for r in caplog.records if "will come to need" in r.getMessage()]
    used = sum(p.stat().st_size for p in (tmp_path / "fewer").rglob("*") if p.is_file())
    assert used <= free


def test_a_resume_counts_what_is_there_already(tmp_path, monkeypatch, caplog):
    train(tmp_path / "run", epochs=10)
    size = list_checkpoints(tmp_path / "run")[0].metadata["checkpoint_bytes"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 6 * size + (1 << 20)))
    with caplog.at_level(logging.WARNING, "codex_ml"):
        train(tmp_path / "run", epochs=14, resume=True)
        assert not [r for r in caplog.records if "will come to need" in r.getMessage()]
        train(tmp_path / "run", epochs=30, resume=True)
    line = next(r.getMessage() for r in caplog.records if "will come to need" in r.getMessage())
    assert "of 16" in line


