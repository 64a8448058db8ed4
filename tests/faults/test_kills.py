"""SIGKILL at random instants, several in the life of each run: of training in many forms, of saves, of prunes.

KILLS of training are as many in `make torture` as it asks for (1,000), of saves and prunes as many again together.
"""

import json
import os
import random
import shutil
import signal
import time

import pytest
from conftest import FULL
from runs import Zygote
from scenarios import DEAD, MANIFEST, Prune, facts_of, go_on, opened, place, prepared, put, state_of
from test_kill import check_records, leftovers

from codex_ml.checkpoint import list_checkpoints
from codex_ml.run_folder import RunFolder
from codex_ml.telemetry.ndjson import read_ndjson
from codex_ml.utils.retention import prune_checkpoints

TRAINING = int(os.environ.get("KILLS", "1000" if FULL else "12"))
OTHER = TRAINING if FULL else 30
BASE = {"epochs": 20, "checkpoint_every_steps": 2, "retention_policy": {"keep_last": 2}}
JOBS = {
    "dropout": {"variation": "dropout", "scheduler_cfg": {"type": "cosine"}},
    "augmentation from torch": {"variation": "torch", "checkpoint_every_steps": 1},
    "augmentation from numpy": {"variation": "numpy", "scheduler_cfg": {"type": "step", "step_size": 3, "gamma": 0.5, "interval": "step"}},
    "channels last": {"variation": "channels_last", "scheduler_cfg": {"type": "linear", "final_lr_scale": 0.1}},
    "metrics cut often": {"variation": "random", "monitoring_ndjson_max_bytes": 3000, "log_every_steps": 1},
}


@pytest.fixture(scope="module")
def zygote():
    with Zygote() as zygote:
        yield zygote


@pytest.mark.parametrize("name", JOBS)
def test_training_that_is_killed_again_and_again_comes_to_the_same_hash(name, zygote, tmp_path, rng, tally):
    job, wanted = BASE | JOBS[name], -(-TRAINING // len(JOBS))
    expected = zygote.run(folder=str(tmp_path / "whole"), **job)["checkpoint_sha256_last"]
    begun = time.monotonic()
    assert zygote.run(folder=str(tmp_path / "timed"), **job)["checkpoint_sha256_last"] == expected
    whole, kills, runs = time.monotonic() - begun, 0, 0
    while kills < wanted:
        folder, runs, answer, before = tmp_path / f"run{runs}", runs + 1, {"killed": True}, kills
        while "killed" in answer:
            after = rng.uniform(0.005, whole / 4) if kills < wanted else None
            answer = zygote.run(folder=str(folder), kill_after=after, **job)
            kills += "killed" in answer
        assert answer["checkpoint_sha256_last"] == expected, f"{name}: after {kills - before} kills of run {runs}"
        assert leftovers(folder) == []
        if "monitoring_ndjson_max_bytes" not in job:
            check_records(folder / ".codex" / "metrics.ndjson")
        else:
            records, _ = read_ndjson(folder / ".codex" / "metrics.ndjson")  # those of the last files that are kept
            assert len(records) > 10 and records[-1]["event"] == "run_end"
        shutil.rmtree(folder)
    print(f"{kills} kills of {runs} runs of {whole:.2f} s")
    tally("kills", f"training, {name}", kills=kills, resumed_to_the_same_hash=runs)


def killed(operation, after):
    """What a child had acknowledged when it was killed."""
    source, told = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            operation(lambda what: os.write(told, f"{what}\n".encode()))
        finally:
            os._exit(1)
    os.close(told)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with os.fdopen(source) as pipe:
        return pipe.read().split()


def saving(run, ack):
    with opened(run) as folder:
        checkpoint, _, _ = folder.newest()
        step = 0
        if checkpoint:
            folder.go_on(checkpoint)
            step = place(checkpoint.name)[1]
        while True:
            step += 5
            name = f"epoch-{step // 10:04d}" if step % 10 == 0 else f"step-{step:08d}"
            folder.save(name, state_of(name), facts_of(name), MANIFEST)
            ack(name)
            if step % 10 == 0 and step > 30:
                prune_checkpoints(run, keep_last=3)


def test_saves_that_are_killed_lose_nothing_acknowledged(scratch, rng, tally):
    run, acknowledged, kills = scratch / "run", [], 0
    while kills < OTHER:
        acknowledged = killed(lambda ack: saving(run, ack), rng.uniform(0.001, 0.06)) or acknowledged[-1:]
        kills += 1
        if rng.random() < 0.3:  # else the next one takes it up as it is
            continue
        found = list_checkpoints(run) if run.exists() else []
        if acknowledged:
            assert found and place(found[0].name) >= place(acknowledged[-1]), f"after {kills} kills {acknowledged[-1]} is lost"
    go_on(run, acknowledged[-1:])
    tally("kills", "saves and prunes, one after the other", kills=kills, acknowledged_lost=0)


def test_prunes_that_are_killed_keep_what_must_stay(scratch, rng, tally):
    scenario, base = Prune(), scratch / "base"
    start, kills = prepared(scenario, scratch / "start"), 0
    for _ in range(OTHER // 2):
        shutil.copytree(start, base)
        acknowledged = []
        for _ in range(rng.randint(1, 3)):
            acknowledged += killed(lambda ack: scenario.act(base, ack), rng.uniform(0, 0.006))
            kills += 1
        scenario.check(base, acknowledged)
        shutil.rmtree(base)
    tally("kills", "prunes", kills=kills, acknowledged_lost=0)


def test_the_kills_hit(scratch):
    """A kill that always comes too early or too late would show nothing: a checkpoint is caught half written now and then."""
    run, caught = scratch / "run", 0
    put(run, "epoch-0001")
    instants = random.Random(7)
    for _ in range(60):
        killed(lambda ack: saving(run, ack), instants.uniform(0.002, 0.03))
        caught += any(p.name.startswith((".tmp-", ".trash-")) for p in run.iterdir())
        if caught:
            break
    assert caught and not (run / f".tmp-{DEAD}").exists()
    with RunFolder(run):
        assert not [p for p in run.iterdir() if p.name.startswith((".tmp-", ".trash-"))]
    assert json.loads((run / "latest.json").read_bytes())["path"]
