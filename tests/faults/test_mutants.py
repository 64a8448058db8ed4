"""The tests above are worth what they find: with any one sync taken out, or any two steps exchanged, they must fail."""

import json
import shutil

import pytest
from damage import flips
from mutants import CHECKS, ORDERS, syncs
from scenarios import SCENARIOS, is_whole, put
from test_power_cuts import explore

from codex_ml.checkpoint import newest_verified
from codex_ml.durable import sha256_file

LIKELY = {"durable": "Write", "checkpoint": "Begin", "run_folder": "Save", "keys": "Keys", "appender": "Pack", "segments": "Pack",
          "ndjson": "Pack"}  # by module, to be tried first
CHEAP = ("Write", "First", "Prune", "Begin", "Keys", "Pack")


@pytest.fixture
def found_by(scratch, rng):
    """The scenario that fails with a mutant, or None; the mutants are many and most die early."""
    scenarios = {s.name: s for s in SCENARIOS}

    def find(mutant):
        first = LIKELY.get(mutant.module.rpartition(".")[2], "Write")
        others = [name for name in dict.fromkeys([*CHEAP, *scenarios]) if name in scenarios and name not in (first, "Rotate")]
        tries = [(first, 6), (first, 100), *((name, limit) for limit in (6, 24) for name in others)]
        for name, limit in tries:
            try:
                with mutant.alive():
                    explore(scenarios[name], scratch, limit, rng)
            except AssertionError as error:
                return name, str(error)
            finally:
                shutil.rmtree(scratch / name, ignore_errors=True)
        return None

    return find


@pytest.mark.parametrize("mutant", [*syncs(), *ORDERS], ids=lambda m: m.name)
def test_every_mutant_is_found(mutant, found_by, tally):
    found = found_by(mutant)
    tally("mutants", "a sync taken out" if "without sync" in mutant.name else "two steps exchanged",
          found=found is not None, survived=found is None)
    assert found, f"{mutant.name}: nothing failed"
    print(f"{mutant.name}: found by {found[0]}: {found[1][-300:]}")


def test_all_places_that_wait_for_the_disk_are_known():
    """If a sync moved out of a function that this file can find, the mutants would be fewer, and nobody would see it."""
    names = {m.name.partition(" ")[0] for m in syncs()}
    assert names >= {"durable.write_file", "durable.fsync_dir", "durable.write_atomic", "durable.publish_folder", "durable.remove_folder",
                     "durable.make_folder", "checkpoint.move_aside", "ndjson._sync_and_close"}


@pytest.mark.parametrize("mutant", CHECKS, ids=lambda m: m.name)
def test_a_check_that_is_missing_is_found_by_damage(mutant, scratch, tally):
    """Flips, swaps and a rollback, as `test_damage` has them, must fail where a check before use is taken out."""
    run, names = scratch / "run", ("epoch-0003", "step-00000034", "step-00000037")
    for name in names:
        put(run, name)
    newest = run / names[-1]
    kept = {p.name: p.read_bytes() for p in newest.iterdir()}
    other = {p.name: p.read_bytes() for p in (run / names[1]).iterdir()}
    facts = json.loads(kept["metadata.json"]) | {"checkpoint_sha256": sha256_file(run / names[1] / "checkpoint.pt")}
    damages = [{"checkpoint.pt": content} for _, content in flips(kept["checkpoint.pt"], False, 5)]
    damages += [other, {**other, "metadata.json": json.dumps(facts).encode()}]

    def found():
        for damage in damages:
            for file, content in {**kept, **damage}.items():
                (newest / file).write_bytes(content)
            checkpoint, state, _ = newest_verified(run)
            if checkpoint is None or not is_whole(state, checkpoint.name):
                return True
        return False

    with mutant.alive():
        seen = found()
    tally("mutants", "a check before use taken out", found=seen, survived=not seen)
    assert seen and not found()
