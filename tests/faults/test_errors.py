"""An operation on the disk fails, for all operations, in all ways: once, or from then on. The error is typed, what was promised stays,
nothing is left over, no descriptor is lost; and once the disk is well, the same again goes through."""

import errno
import os
import shutil

import pytest
from disk_model import DEAD
from scenarios import LEFT, SCENARIOS, descriptors, digest, prepared
from shim import At, concerned, count, fails, no_memory, short, through
from test_crashes import operations_of, some

from codex_ml.checkpoint import CheckpointError
from codex_ml.durable import StorageError
from codex_ml.keys import SigningError

ALWAYS = ("EIO", "ENOSPC", "EDQUOT", "EACCES", "EINTR")  # at every operation, once; of the others and of those that last a choice
CODES = (*ALWAYS, "EROFS", "EPERM", "EMFILE", "EXDEV", "EBUSY", "ESTALE", "EFBIG")


def attempt(scenario, base, around):
    """What was acknowledged, and the error that it ended with."""
    acknowledged: list[str] = []
    try:
        with through(around):
            scenario.act(base, acknowledged.append)
    except (OSError, MemoryError, CheckpointError, SigningError) as error:
        return acknowledged, error
    return acknowledged, None


def examine(scenario, base, acknowledged, error, code, lasting):
    if error is not None and not isinstance(error, MemoryError) and not scenario.raw_errors:
        assert isinstance(error, (StorageError, CheckpointError, SigningError)), f"{type(error).__name__} as it came"
        if isinstance(error, StorageError):
            assert error.errno == code and str(base) in str(error), error
    if error is not None and not lasting:
        own = f".tmp-{os.getpid()}-*"  # what a dead one left may lie there still: this one may not have come so far
        left = [p.name for p in scenario.run(base).glob(own)] if scenario.run(base).exists() else []
        assert not left, f"left over: {left}"
    buried(base)
    scenario.check(base, acknowledged)


def buried(base):
    """This process stands for one that has ended: what it could not remove is a dead one's."""
    for path in sorted(base.rglob(f".t*-{os.getpid()}-*"), reverse=True):
        path.rename(path.with_name(path.name.replace(f"-{os.getpid()}-", f"-{DEAD}-")))


def each(scenario, scratch, ways, points):
    """Run `scenario` with the k-th operation changed: (operation, `around`, its code, whether it lasts) of `ways`."""
    start, base, before = prepared(scenario, scratch / "start"), scratch / "base", descriptors()
    told = quiet = 0
    for k in points:
        for name, around, code, lasting in ways(k):
            shutil.copytree(start, base)
            acknowledged, error = attempt(scenario, base, around)
            told, quiet = told + (error is not None), quiet + (error is None)
            again = None
            if error is not None and not scenario.raw_errors and scenario.name != "Keys":
                again = scratch / "again"
                shutil.copytree(base, again)
            try:
                examine(scenario, base, acknowledged, error, code, lasting)
                if again:  # the disk is well, and the same command is run again
                    buried(again)
                    done: list[str] = []
                    scenario.act(again, done.append)
                    scenario.check(again, [*acknowledged, *done] if scenario.name in ("Save", "Sign") else done)
            except Exception as wrong:
                raise AssertionError(f"{scenario.name}: {name} at operation {k}, {around.what}, ended with {error!r}, {acknowledged} "
                                     f"acknowledged: {type(wrong).__name__}: {wrong}") from wrong
            finally:
                for folder in filter(None, (base, again)):
                    shutil.rmtree(folder, ignore_errors=True)
    if not (scenario.raw_errors and around.action is no_memory):  # a constructor that is cut off has nobody to close what it opened
        assert descriptors() <= before, "a descriptor is lost"
    return told, quiet


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr("codex_ml.durable.time.sleep", lambda seconds: None)


@pytest.mark.parametrize("lasting", (False, True), ids=("once", "from then on"))
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_any_operation_fails(scenario, lasting, scratch, rng, full, tally):
    def ways(k):
        some_codes = [*ALWAYS, rng.choice(CODES[len(ALWAYS):])] if full and not lasting else rng.sample(CODES, 2 if full else 1)
        for name in some_codes:
            code = getattr(errno, name)
            yield name, At(k, fails(code), concerned(code) if lasting else None), code, lasting

    total = operations_of(scenario, scratch)
    told, quiet = each(scenario, scratch, ways, some(range(1, total + 1), 10**6 if full else 30, rng))
    tally("errors", f"{scenario.name}, {'from then on' if lasting else 'once'}", errors_told=told, no_harm=quiet)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_memory_runs_out_at_any_operation(scenario, scratch, rng, full, tally):
    total = operations_of(scenario, scratch)
    told, quiet = each(scenario, scratch, lambda k: [("MemoryError", At(k, no_memory), None, True)],
                       some(range(1, total + 1), 10**6 if full else 12, rng))
    tally("errors", f"{scenario.name}, MemoryError", errors_told=told, no_harm=quiet)


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s.repeatable and not s.raw_errors], ids=lambda s: s.name)
def test_short_writes_change_nothing(scenario, scratch, rng, full, tally):
    whole, base = prepared(scenario, scratch / "whole"), scratch / "base"
    start = shutil.copytree(whole, scratch / "start")
    total = count(lambda: scenario.act(whole, lambda what: None))
    expected = {k: v for k, v in digest(whole).items() if "config.resolved" not in k}
    for k in some(range(1, total + 1), 10**6 if full else 12, rng):
        shutil.copytree(start, base)
        _, error = attempt(scenario, base, At(k, short))
        assert error is None
        assert {k: v for k, v in digest(base).items() if "config.resolved" not in k} == expected, f"a short write at operation {k}"
        shutil.rmtree(base)
    tally("errors", f"{scenario.name}, short write", no_harm=total)


def test_a_failed_sync_is_not_tried_again_on_the_same_file(scratch):
    """The kernel forgets what it could not write: a second sync of the same file would succeed, and the data be gone."""
    from codex_ml.durable import write_atomic

    opened, synced = {}, []

    def around(name, real, args, kwargs):
        if name == "open" and args[1] & os.O_CREAT:
            fd = real(*args, **kwargs)
            opened[fd] = os.path.basename(args[0])
            return fd
        if name == "close":
            opened.pop(args[0], None)
        if name == "fsync" and args[0] in opened:
            synced.append(opened[args[0]])
            if len(synced) == 1:
                raise OSError(errno.EIO, "Input/output error")
        return real(*args, **kwargs)

    with through(around):
        with pytest.raises(StorageError):
            write_atomic(scratch / "f", b"x")
        write_atomic(scratch / "f", b"x")
    assert len(synced) == 2 and synced[0] != synced[1] and not [p for p in scratch.iterdir() if LEFT.match(p.name)]


def test_a_leftover_that_will_not_go_stops_nobody(scratch):
    """`shutil.rmtree` raises in spite of `ignore_errors` where a close fails: it closes once more."""
    from codex_ml.durable import sweep

    leftover = scratch / f".tmp-{DEAD}-0-epoch-0004"
    (leftover / "inner").mkdir(parents=True)

    def around(name, real, args, kwargs):
        if name == "close":
            real(*args, **kwargs)
            raise OSError(errno.EIO, "Input/output error")
        return real(*args, **kwargs)

    with through(around):
        assert sweep(scratch) == [leftover.name]
    sweep(scratch)
    assert not leftover.exists()


@pytest.mark.parametrize("code", (errno.EBUSY, errno.ESTALE))
@pytest.mark.parametrize("times", (1, 3, 4))
def test_a_rename_that_is_refused_for_a_moment(scratch, code, times):
    from codex_ml.durable import publish_folder, remove_folder, write_atomic

    for operation in (lambda: write_atomic(scratch / "f", b"x"), lambda: publish_folder(scratch / "a", scratch / "b"),
                      lambda: remove_folder(scratch / "a")):
        (scratch / "a").mkdir(exist_ok=True)
        left = [times]

        def around(name, real, args, kwargs, left=left):
            if name in ("rename", "replace") and left[0]:
                left[0] -= 1
                raise OSError(code, "not now")
            return real(*args, **kwargs)

        with through(around):
            if times < 4:
                operation()
            else:
                with pytest.raises(OSError):  # not for ever
                    operation()
