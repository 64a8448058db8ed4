"""SIGKILL at random instants: whatever a process was doing, the resumed run comes to the hash of the uninterrupted one.

KILLS is the number of kills (50; `make kill-test KILLS=1000`), KILL_SEED the seed of the instants (printed).
"""

import json
import os
import random
import time

import pytest
from runs import Zygote

KILLS = int(os.environ.get("KILLS", "50"))
SEED = int(os.environ.get("KILL_SEED", str(random.SystemRandom().randrange(10**6))))
JOB = {"variation": "dropout", "epochs": 20, "checkpoint_every_steps": 2, "scheduler_cfg": {"type": "cosine"},
       "retention_policy": {"keep_last": 2}}


@pytest.mark.slow
def test_killed_at_random_instants(tmp_path):
    print(f"KILLS={KILLS} KILL_SEED={SEED}")
    instants = random.Random(SEED)
    with Zygote() as zygote:
        expected = zygote.run(folder=str(tmp_path / "whole"), **JOB)
        begun = time.monotonic()
        zygote.run(folder=str(tmp_path / "timed"), **JOB)
        whole = time.monotonic() - begun
        kills, rounds = 0, 0
        while kills < KILLS:
            folder, rounds = tmp_path / f"round{rounds}", rounds + 1
            answer = {"killed": True}
            while "killed" in answer:
                # from a moment after its start to a fifth of the whole run, so that a run is killed many times over on its way
                after = instants.uniform(0.005, whole / 5) if kills < KILLS else None
                answer = zygote.run(folder=str(folder), kill_after=after, **JOB)
                kills += "killed" in answer
            assert answer["checkpoint_sha256_last"] == expected["checkpoint_sha256_last"], f"KILL_SEED={SEED}, after {kills} kills"
            assert chain(folder) == chain(tmp_path / "whole")
            assert leftovers(folder) == []
            check_records(folder / ".codex" / "metrics.ndjson")
        print(f"{kills} kills over {rounds} runs of {whole:.1f} s")


def chain(folder):
    """What the last epochs say of themselves and of the one before; all but the time must be equal, too."""
    found = [json.loads((folder / name / "metadata.json").read_text()) for name in ("epoch-0019", "epoch-0020")]
    assert found[1]["parent_checkpoint_sha256"] == found[0]["checkpoint_sha256"]
    return [{k: v for k, v in facts.items() if k != "created_at"} for facts in found]


def leftovers(folder):
    """What a finished run of that job should not have: temporaries, mid-epoch checkpoints, epochs but the last two and the best."""
    known = {"latest.json", "latest.json.bak", "config.resolved.json", "config.snapshot.json", "metrics_history.jsonl", ".codex", ".lock"}
    epochs = sorted(p.name for p in folder.glob("epoch-*"))
    assert epochs[-2:] == ["epoch-0019", "epoch-0020"] and len(epochs) <= 3
    return sorted(p.name for p in folder.iterdir() if p.name not in known | set(epochs))


def check_records(path):
    """Every line is whole, but for those that a kill tore."""
    whole = 0
    for line in path.read_bytes().splitlines():
        try:
            whole += json.loads(line)["schema_version"] == "v1"
        except ValueError:
            continue
    assert whole > 0
