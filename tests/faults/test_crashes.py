"""The process ends at its k-th operation on the disk, for all k: before it, and with half of it done. Then once more while it recovers."""

import os
import shutil
from functools import partial

import pytest
from scenarios import SCENARIOS, Save, prepared, resume
from shim import At, count, leave, leave_halfway, through

ENDS = {"before it": leave, "half done": leave_halfway}


def in_child(operations, around, limit=30):
    """What a forked process had acknowledged, and whether it came to an end by itself."""
    source, told = os.pipe()
    tell = os.write
    if (pid := os.fork()) == 0:
        status = 1
        try:
            with through(around):
                operations(lambda what: tell(told, f"{what}\n".encode()))
            status = 0
        finally:
            os._exit(status)
    os.close(told)
    with os.fdopen(source) as pipe:
        acknowledged = pipe.read().split()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9), f"the child failed with {status}, after {acknowledged}"
    return acknowledged, status == 0


def some(numbers, most, rng):
    """All of a range, or as many as fit, its ends included."""
    numbers = list(numbers)
    return numbers if len(numbers) <= most else sorted({numbers[0], numbers[-1], *rng.sample(numbers, most - 2)})


def operations_of(scenario, scratch):
    return count(lambda: scenario.act(prepared(scenario, scratch / "counted"), lambda what: None))


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_a_process_that_ends_at_any_operation(scenario, how, scratch, rng, full, tally):
    start, base, ends = prepared(scenario, scratch / "start"), scratch / "base", 0
    total = operations_of(scenario, scratch)
    for k in some(range(1, total + 1), 10**6 if full else 40, rng):
        shutil.copytree(start, base)
        acknowledged, ended = in_child(lambda ack: scenario.act(base, ack), At(k, ENDS[how]))
        try:
            scenario.check(base, acknowledged)
        except Exception as error:
            raise AssertionError(f"{scenario.name}, {how}, operation {k} of {total}, {acknowledged} acknowledged: {error}") from error
        shutil.rmtree(base)
        ends += not ended
    assert ends > 0
    tally("crash points", scenario.name, exits=ends)


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s.name in ("Save", "Recover", "Begin", "InTheWay")], ids=lambda s: s.name)
def test_a_process_that_ends_while_another_recovers_from_its_end(scenario, scratch, rng, full, tally):
    """A crash in the middle, then one at an operation of the resume that follows, each at random within nine of the last, then one more."""
    start, base, ends = prepared(scenario, scratch / "start"), scratch / "base", 0
    total, once = operations_of(scenario, scratch), scratch / "once"

    def recover(ack):
        resume(scenario.run(base), strict=isinstance(scenario, Save), versions=("", "b"))

    for first in some(range(1, total + 1), 10**6 if full else 5, rng):
        shutil.copytree(start, once)
        acknowledged, _ = in_child(partial(scenario.act, once), At(first, leave))
        second = 0
        while True:
            second += rng.randint(1, 9)
            shutil.copytree(once, base)
            _, ended = in_child(recover, At(second, leave))
            ends += not ended
            _, third = in_child(recover, At(rng.randint(1, 40), leave))
            ends += not third
            try:
                scenario.check(base, acknowledged)
            except Exception as error:
                raise AssertionError(f"{scenario.name}, ended at {first}, the resume at {second}, {acknowledged}: {error}") from error
            shutil.rmtree(base)
            if ended:
                break
        shutil.rmtree(once)
    tally("crash points", f"{scenario.name}, then its recovery", exits=ends)
