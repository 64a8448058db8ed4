"""Real training, cut off at any operation on the disk or by a power cut: the resumed run comes to the hash of the uninterrupted one."""

import errno
import shutil

import pytest
from conftest import FULL
from disk_model import Disk, Recorder, read_tree, write_tree
from runs import train
from shim import At, concerned, count, fails, leave, leave_halfway, through
from test_crashes import in_child, some

from codex_ml.checkpoint import CheckpointError
from codex_ml.durable import StorageError
from codex_ml.telemetry.ndjson import read_ndjson

JOB = {"epochs": 3, "checkpoint_every_steps": 4, "retention_policy": {"keep_last": 1}, "monitoring_ndjson_max_bytes": 4000,
       "log_every_steps": 2, "scheduler_cfg": {"type": "cosine"}}
VARIATIONS = ("dropout", "numpy", "channels_last")


@pytest.fixture(scope="module")
def hashes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return {v: train(str(folder / v), v, **JOB)["checkpoint_sha256_last"] for v in VARIATIONS}


def finished(run, variation, expected):
    """Resume, and compare: the bits, and that the metrics can be read."""
    result = train(str(run), variation, **JOB)
    assert result["checkpoint_sha256_last"] == expected and result["final_epoch"] == 3
    left = [p.name for p in run.iterdir() if p.name.startswith((".tmp-", ".trash-", "step-"))]
    assert not left, left
    read_ndjson(run / ".codex" / "metrics.ndjson", on_bad=lambda line: None)


PARTS = 4 if FULL else 1


@pytest.mark.parametrize("part", range(PARTS))  # two workers share them
@pytest.mark.parametrize("variation", VARIATIONS)
def test_training_that_ends_at_any_operation(variation, part, hashes, scratch, rng, full, tally):
    run, ends = scratch / "run", 0
    total = count(lambda: train(str(run), variation, **JOB))
    shutil.rmtree(run)
    most = 10 if not full else 10**6 if variation == VARIATIONS[0] else 80
    for k in some(range(1 + part, total + 1, PARTS), most, rng):
        how = rng.choice((leave, leave_halfway))
        _, whole = in_child(lambda ack: train(str(run), variation, **JOB), At(k, how))
        ends += not whole
        if rng.random() < 0.5:  # and a second time, somewhere in the resume
            _, whole = in_child(lambda ack: train(str(run), variation, **JOB), At(rng.randint(1, total), how))
            ends += not whole
        try:
            finished(run, variation, hashes[variation])
        except Exception as error:
            raise AssertionError(f"{variation}: ended at operation {k} of {total} by {how.__name__}: {error}") from error
        shutil.rmtree(run)
    tally("crash points", "training, resumed to the same hash", exits=ends)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("variation", VARIATIONS[:1])
def test_training_whose_power_is_cut(variation, part, hashes, scratch, rng, full, tally):
    base = scratch / "base"
    base.mkdir()
    recorder = Recorder(base)
    with through(recorder):
        train(str(base / "run"), variation, **JOB)
    disk = Disk(recorder)
    for _ in disk.replay():
        pass
    history = "run/metrics_history.jsonl"  # for people; written past `os.write`, and never waited for
    assert disk.now() | {history: None} == read_tree(base) | {history: None}
    shutil.rmtree(base)
    disk, seen, cuts = Disk(recorder), set(), 0
    places = set(some(range(part, len(recorder.operations), PARTS), 10**6 if full else 12, rng))
    for at, operation in enumerate(recorder.operations):
        getattr(disk, f"_{operation[0]}")(*operation[1:])
        if at not in places:
            continue
        cuts += 1
        tree = rng.choice(list(disk.states(16, rng)))
        key = hash(frozenset(tree.items()))
        if key in seen:
            continue
        seen.add(key)
        write_tree(base, tree)
        try:
            finished(base / "run", variation, hashes[variation])
        except Exception as error:
            raise AssertionError(f"after operation {at}, {operation[:4]}: {sorted(tree)}: {error}") from error
        shutil.rmtree(base)
    tally("power cuts", "training, resumed to the same hash", cuts=cuts, states=len(seen))


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("variation", VARIATIONS[:1])
def test_training_in_which_any_operation_fails(variation, part, hashes, scratch, rng, full, tally):
    """Telemetry may fail as it likes; what fails in a save is told, and the same command, run again, comes to the same bits."""
    run, told, quiet = scratch / "run", 0, 0
    total = count(lambda: train(str(run), variation, **JOB))
    shutil.rmtree(run)
    for k in some(range(1 + part, total + 1, PARTS), 10**6 if full else 10, rng):
        name = rng.choice(("EIO", "ENOSPC", "EDQUOT", "EACCES", "EMFILE"))
        code = getattr(errno, name)
        lasting = concerned(code) if rng.random() < 0.5 else None
        try:
            with through(At(k, fails(code), lasting)):
                result = train(str(run), variation, **JOB)
            assert result["checkpoint_sha256_last"] == hashes[variation], f"{name} at operation {k}"
            quiet += 1
        except (StorageError, CheckpointError):
            told += 1
        except OSError as error:
            raise AssertionError(f"{name} at operation {k}, lasting: {lasting is not None}: an OSError as it came") from error
        try:
            finished_again(run, variation, hashes[variation])
        except Exception as error:
            raise AssertionError(f"{name} at operation {k}, lasting: {lasting is not None}: {error}") from error
        shutil.rmtree(run, ignore_errors=True)
    tally("errors", "training, resumed to the same hash", errors_told=told, no_harm=quiet)


def finished_again(run, variation, expected):
    assert train(str(run), variation, **JOB)["checkpoint_sha256_last"] == expected
