"""The power fails after each operation, and the disk holds any part of what was not synced: see `disk_model`."""

import shutil

import pytest
from conftest import FULL
from disk_model import Disk, Recorder, read_tree, write_tree
from scenarios import SCENARIOS, History, prepared, resume
from shim import through


def record(scenario, base):
    """The operations of a scenario, and proof that none escaped."""
    recorder = Recorder(prepared(scenario, base))
    with through(recorder):
        scenario.act(base, recorder.ack)
    disk = Disk(recorder)
    for _ in disk.replay():
        pass
    assert disk.now() == read_tree(base), "the recording does not come to what is on the disk"
    return recorder


def states(recorder, limit, rng, acknowledged=(), seen=None):
    """(after which operation, what it was, what was acknowledged, what is on the disk), each different state once."""
    disk, seen = Disk(recorder), set() if seen is None else seen
    for number, operation in enumerate([("nothing",), *recorder.operations]):
        if number:
            getattr(disk, f"_{operation[0]}")(*operation[1:])
        for tree in disk.states(limit, rng):
            key = hash((*acknowledged, *disk.acknowledged, frozenset(tree.items())))
            if key not in seen:
                seen.add(key)
                yield number, operation, [*acknowledged, *disk.acknowledged], tree


def examine(scenario, base, number, operation, acknowledged, tree):
    write_tree(base, tree)
    try:
        scenario.check(base, acknowledged)
    except Exception as error:
        there = {p: None if c is None else len(c) for p, c in sorted(tree.items())}
        raise AssertionError(f"{scenario.name}: after operation {number}, {operation[:4]}, with {acknowledged} acknowledged and {there} on "
                             f"the disk: {type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(base)


def explore(scenario, scratch, limit, rng):
    """Check every state after every operation; the numbers of cuts and of different states. The first that fails is told."""
    base, found = scratch / scenario.name, 0
    recorder = record(scenario, base)
    shutil.rmtree(base)
    for state in states(recorder, limit, rng):
        examine(scenario, base, *state)
        found += 1
    return len(recorder.operations) + 1, found


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_nothing_that_was_promised_is_lost_in_a_power_cut(scenario, scratch, rng, full, tally):
    cuts, found = explore(scenario, scratch, 1024 if full else 8, rng)
    print(f"{cuts} cuts, {found} states")
    tally("power cuts", scenario.name, cuts=cuts, states=found)


TWICE = {"Save": {}, "Prune": {}, "Begin": {"strict": False, "versions": ("", "b")}, "Recover": {"strict": False, "versions": ("", "b")},
         "InTheWay": {"strict": False, "versions": ("", "b")}}


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s.name in TWICE], ids=lambda s: s.name)
def test_the_power_fails_again_while_a_run_recovers(scenario, scratch, rng, full, tally):
    """From states that a first cut leaves, the operations of the resume, and what a second cut among them leaves."""
    base, cuts, found, seen = scratch / "base", 0, 0, set()
    recorder = record(scenario, base)
    shutil.rmtree(base)
    first = list(states(recorder, 256 if full else 8, rng))
    for number, operation, acknowledged, tree in rng.sample(first, min(len(first), 400 if full else 2)):
        write_tree(base, tree)
        again = Recorder(base)
        with through(again):
            resume(scenario.run(base), **TWICE[scenario.name])
        shutil.rmtree(base)
        cuts += len(again.operations)
        for state in states(again, 128 if full else 4, rng, acknowledged, seen):
            try:
                examine(scenario, base, *state)
            except AssertionError as error:
                raise AssertionError(f"cut after operation {number}, {operation[:4]}, which left {sorted(tree)}; then {error}") from error
            found += 1
    print(f"{cuts} cuts, {found} states")
    tally("power cuts", f"{scenario.name}, again in its recovery", cuts=cuts, states=found)


@pytest.mark.parametrize("number", range(32 if FULL else 1))
def test_nothing_that_was_promised_is_lost_in_any_history(number, scratch, rng, full, tally):
    scenario = History(rng.randrange(10**6), 14 if full else 6)
    print(f"history {scenario.seed}")
    cuts, found = explore(scenario, scratch, 128 if full else 4, rng)
    tally("power cuts", "random histories", cuts=cuts, states=found, histories=1)
