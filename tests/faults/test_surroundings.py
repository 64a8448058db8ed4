"""Faults of the machine around a run, real ones where they can be had: a full disk, a folder that is read-only, limits, other processes,
a clock that jumps."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from runs import train
from scenarios import MANIFEST, SCENARIOS, Save, digest, facts_of, is_whole, opened, place, prepared, put, resume, state_of
from test_crashes import in_child

from codex_ml import durable
from codex_ml.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, newest_verified
from codex_ml.durable import CorruptFile, StorageError
from codex_ml.run_folder import FolderInUse, RunFolder
from codex_ml.utils.retention import prune_checkpoints


def child(function, limit=60):
    """The exit status of a function in a child: what it returns, or 1 where it raised; what it printed is shown."""
    if (pid := os.fork()) == 0:
        status = 1
        try:
            signal.alarm(limit)
            status = function() or 0
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- a disk that is really full

FULL_DISK = """
    import os, subprocess, sys
    sys.path.insert(0, sys.argv[2])
    from pathlib import Path
    place = Path(sys.argv[1])
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place]).returncode:
        sys.exit(77)
    from runs import train
    from codex_ml.durable import StorageError
    whole = train(str(place.parent/"whole"), epochs=6)["checkpoint_sha256_last"]
    run = place/"run"
    first = train(str(run), epochs=2)["checkpoint_sha256_last"]
    def fill(left):
        with open(place/"ballast", "ab", 0) as file:
            while os.statvfs(place).f_bavail * os.statvfs(place).f_frsize > left:
                file.write(bytes(4096))
    told = 0
    for left in range(0, 60_000, 4096):
        fill(left)
        os.environ["LEFT"] = str(left)
        before = {p.name for p in run.iterdir()}
        try:
            from codex_ml import run_folder
            run_folder.RunFolder.need = lambda self, size: None  # else it is told before the first step
            train(str(run), epochs=6, metrics_out=None)
        except StorageError as error:
            told += 1
            assert "No space left" in str(error) and "bytes are free" in str(error), error
            assert not [p for p in run.iterdir() if p.name.startswith(".tmp-")], list(run.iterdir())
        os.unlink(place/"ballast")
        for epoch in ("epoch-0001", "epoch-0002"):
            assert (run/epoch/"checkpoint.pt").exists()
        if (run/"epoch-0006").exists():
            break
    result = train(str(run), epochs=6)
    assert result["checkpoint_sha256_last"] == whole, result
    print(told)
"""


def test_a_run_on_a_disk_that_is_really_full(tmp_path, tally):
    (tmp_path / "disk").mkdir()
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path / "disk"), here]
    try:
        done = subprocess.run(["unshare", "-rm", *command], capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("there is no `unshare` here to mount a small disk with")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"this system lets nobody mount a small disk: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr[-2000:]
    told = int(done.stdout.split()[-1])
    assert told > 0
    tally("surroundings", "training on a tmpfs that is full", errors_told=told, resumed_to_the_same_hash=1)


def test_a_folder_that_is_read_only(tmp_path, tally):
    run = tmp_path / "run"
    train(str(run), epochs=1)
    kept = digest(run)
    tmp_path.chmod(0o755)
    for path in (*tmp_path.parents,):
        if path.stat().st_mode & 0o005 != 0o005 and path.owner() == "root" and os.getuid() == 0:
            path.chmod(path.stat().st_mode | 0o005)
    run.chmod(0o555)
    steps = []

    class Counting:
        def on_step_end(self, step, state):
            steps.append(step)

    def as_nobody(folder):
        def go():
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                os.environ["HOME"] = os.environ["XDG_CONFIG_HOME"] = "/nowhere"
            from runs import Augmented, make_model

            from codex_ml.train_loop import run_training

            try:
                run_training(model=lambda: make_model("plain"), data=Augmented("plain"), checkpoint_dir=str(folder), epochs=3, batch_size=8,
                             grad_accum=2, learning_rate=0.01, progress="off", threads=1, resume=True, callbacks=[Counting()])
            except StorageError as error:
                assert not steps and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM), error
                return 42
            return 1

        return go

    try:
        for folder in (run, run / "new"):
            assert child(as_nobody(folder)) == 42, folder
    finally:
        run.chmod(0o755)
    assert digest(run) == kept
    tally("surroundings", "a folder that may not be written, as nobody", refused_before_the_first_step=2)


def test_a_limit_on_the_size_of_files(scratch, tally):
    start, tried = prepared(Save(), scratch / "start"), 0
    for limit in (100, 512, 1000, 1832):
        base = shutil.copytree(start, scratch / f"base{limit}")

        def limited(base=base, limit=limit):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                Save().act(base, lambda what: None)
            except StorageError as error:
                return 42 if error.errno == errno.EFBIG else 1
            return 2

        assert child(limited) == 42
        assert not [p for p in (base / "run").iterdir() if p.name.startswith(".tmp-")]
        Save().check(base, [])
        tried += 1
    tally("surroundings", "RLIMIT_FSIZE", errors_told=tried)


def test_no_descriptors_left(scratch, tally):
    """At whatever number of free ones it runs out, the error is typed, and a resume with enough of them finds everything."""
    start, told = prepared(Save(), scratch / "start"), 0
    for free in range(8):
        base = shutil.copytree(start, scratch / f"base{free}")

        def starved(base=base, free=free):
            held = max(map(int, os.listdir("/proc/self/fd"))) + 1
            hog = []
            resource.setrlimit(resource.RLIMIT_NOFILE, (held + 20, held + 20))
            with contextlib.suppress(OSError):
                while True:
                    hog.append(os.open(os.devnull, os.O_RDONLY))
            for fd in hog[len(hog) - free:]:
                os.close(fd)
            try:
                Save().act(base, lambda what: None)
            except (StorageError, CheckpointError):
                return 42
            return 0

        status = child(starved)
        assert status in (0, 42)
        told += status == 42
        Save().check(base, ["step-00000025"] if status else ["step-00000028", "epoch-0003"])
    assert told > 0
    tally("surroundings", "RLIMIT_NOFILE", errors_told=told, no_harm=8 - told)


def test_no_memory_left_while_saving(scratch, tally):
    base = prepared(Save(), scratch / "base")

    def starved():
        state = state_of("epoch-0003") | {"large": torch.zeros(64 << 20, dtype=torch.uint8).t()}
        large = [torch.zeros(2, 30 << 20, dtype=torch.uint8).t() for _ in range(4)]  # not contiguous: each is copied
        used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + (20 << 20), used + (20 << 20)))
        try:
            with opened(base / "run") as folder:
                folder.save("epoch-0003", state | {"more": large}, facts_of("epoch-0003"), MANIFEST)
        except (MemoryError, RuntimeError, StorageError):
            return 42
        return 1

    assert child(starved) == 42
    assert not [p for p in (base / "run").iterdir() if p.name.startswith(".tmp-")]
    Save().check(base, [])
    tally("surroundings", "RLIMIT_AS in a save", errors_told=1)


def test_any_allocation_of_python_fails(scratch, rng, full, tally):
    """One allocation, any of them, finds no memory; the process may die of it as it will."""
    failing = pytest.importorskip("_testcapi", reason="this Python cannot be made to run out of memory")
    start, ended, by_itself = prepared(Save(), scratch / "start"), 0, 0
    for _ in range(1000 if full else 15):
        base = shutil.copytree(start, scratch / "base")
        at = int(10 ** rng.uniform(0, 4.5))

        def save(ack, base=base, at=at):
            signal.alarm(20)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            failing.set_nomemory(at, at + 1)
            try:
                Save().act(base, ack)
            except BaseException:
                os._exit(9)
            finally:
                failing.remove_mem_hooks()

        try:
            acknowledged, whole = in_child(save, lambda name, real, args, kwargs: real(*args, **kwargs))
        except AssertionError:  # killed by a signal, for want of memory in a place that has no way to tell
            acknowledged, whole = [], False
        Save().check(base, acknowledged)
        ended, by_itself = ended + (not whole), by_itself + whole
        shutil.rmtree(base)
    tally("surroundings", "one allocation of Python's fails in a save", ended=ended, no_harm=by_itself)


def test_signals_that_interrupt_every_call(scratch, tally):
    """EINTR, as it really comes: a timer fires thousands of times while a scenario is at work."""
    for scenario in (s for s in SCENARIOS if s.repeatable and not s.raw_errors):
        start = prepared(scenario, scratch / "start")
        bases = [shutil.copytree(start, scratch / f"base{i}") for i in range(2)]
        scenario.act(bases[0], lambda what: None)

        def interrupted(scenario=scenario, base=bases[1]):
            fired = []
            signal.signal(signal.SIGALRM, lambda *_: fired.append(1))
            signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
            scenario.act(base, lambda what: None)
            signal.setitimer(signal.ITIMER_REAL, 0)
            return 0 if fired else 3

        assert child(interrupted) in (0, 3)
        found = [{k: v for k, v in digest(base).items() if "config.resolved" not in k} for base in bases]
        assert found[0] == found[1], scenario.name
        for folder in (start, *bases):
            shutil.rmtree(folder)
    tally("surroundings", "a timer that interrupts every call", no_harm=sum(s.repeatable and not s.raw_errors for s in SCENARIOS))


@pytest.mark.parametrize("file", ("checkpoint.pt", "metadata.json"))
def test_a_disk_that_cannot_read_a_checkpoint(scratch, monkeypatch, file, tally):
    run = scratch / "run"
    for name in ("epoch-0001", "epoch-0002", "epoch-0003"):
        put(run, name)
    real = os.open
    bad = (run / "epoch-0003" / file).as_posix()

    def unreadable(path, *args, **kwargs):
        if os.fspath(path) == bad:
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "open", unreadable)
        checkpoint, state, problems = newest_verified(run)
        assert checkpoint is not None and checkpoint.name == "epoch-0002" and is_whole(state, "epoch-0002") and problems
    assert newest_verified(run)[0].name == "epoch-0003"
    tally("surroundings", "EIO on reading the newest checkpoint", the_one_before_taken=1)


# ---- other processes


def test_two_runs_that_begin_at_once(tmp_path, tally):
    expected, rounds = train(str(tmp_path / "whole"))["checkpoint_sha256_last"], 3
    for number in range(rounds):
        run = tmp_path / f"run{number}"
        gate, opened_gate = os.pipe()

        def compete(run=run, gate=gate):
            os.read(gate, 1)
            try:
                result = train(str(run))
            except FolderInUse as error:
                assert str(run) in str(error)
                return 43
            return 42 if result["checkpoint_sha256_last"] == expected else 1

        pids = []
        for _ in range(2):
            if (pid := os.fork()) == 0:
                status = 1
                try:
                    status = compete()
                finally:
                    os._exit(status)
            pids.append(pid)
        os.write(opened_gate, b"go")
        os.close(gate)
        os.close(opened_gate)
        statuses = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
        assert statuses in ([42, 43], [42, 42]), statuses  # the second may come when the first is done
        assert list_checkpoints(run)[0].sha256 == expected
    tally("surroundings", "two runs that begin in one folder at once", one_refused_or_later=rounds)


def test_a_dead_run_leaves_its_lock_its_temporaries_and_half_a_prune(scratch, tally):
    run = scratch / "run"
    for epoch in range(1, 5):
        put(run, f"epoch-{epoch:04d}")

    def dies():
        folder = RunFolder(run)
        folder.__enter__()
        (run / f".tmp-{os.getpid()}-0-epoch-0005").mkdir()
        (run / f".tmp-{os.getpid()}-0-epoch-0005" / "checkpoint.pt").write_bytes(b"half")
        (run / "epoch-0001").rename(run / f".trash-{os.getpid()}-1-epoch-0001")
        (run / f".tmp-{os.getpid()}-2-latest.json").write_bytes(b"{")
        os._exit(0)

    assert child(dies) == 0
    (run / f".tmp-{os.getppid()}-0-other").write_bytes(b"of one who lives")
    assert len([p for p in run.iterdir() if p.name.startswith((".tmp-", ".trash-"))]) == 4
    with RunFolder(run):
        assert [p.name for p in run.iterdir() if p.name.startswith((".tmp-", ".trash-"))] == [f".tmp-{os.getppid()}-0-other"]
    (run / f".tmp-{os.getppid()}-0-other").unlink()
    assert resume(run) == "epoch-0004"
    tally("surroundings", "what a dead run left", swept=3)


def test_twenty_readers_during_prunes_and_saves(scratch, full, tally):
    """Who reads gets a checkpoint as it was saved, or is told that it is gone."""
    run, readers = scratch / "run", 20
    put(run, "epoch-0001")
    stop = scratch / "stop"

    def read():
        seen = 0
        while not stop.exists():
            for checkpoint in list_checkpoints(run):
                try:
                    assert is_whole(load_checkpoint(checkpoint), checkpoint.name)
                    seen += 1
                except CorruptFile as error:
                    assert not checkpoint.folder.exists(), error  # it was pruned under the reader's eyes
            newest, state, problems = newest_verified(run)
            if newest is None:  # all that it had listed were pruned before it came to them
                assert problems
            else:
                assert is_whole(state, newest.name)
        return 42 if seen else 1

    pids = []
    for _ in range(readers):
        if (pid := os.fork()) == 0:
            status = 1
            try:
                signal.alarm(120)
                status = read()
            except BaseException as error:
                os.write(2, f"reader: {type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(status)
        pids.append(pid)
    prunes = 0
    until = time.monotonic() + (20 if full else 2)
    try:
        epoch = 1
        while time.monotonic() < until:
            epoch += 1
            put(run, f"epoch-{epoch:04d}", loss=1 / epoch)
            prunes += len(prune_checkpoints(run, keep_last=3)["pruned"])
    finally:
        stop.touch()
        statuses = {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids}
    assert statuses == {42} and prunes > 10
    tally("surroundings", "checkpoints pruned under twenty readers", prunes=prunes, wrong_reads=0)


# ---- time and numbers


def test_a_clock_that_jumps_back(tmp_path, monkeypatch, tally):
    """Stamps in files and files' own times go backwards; what counts is the place."""
    expected = train(str(tmp_path / "whole"), epochs=6)["checkpoint_sha256_last"]
    run = tmp_path / "run"
    stamps = iter([f"20{year:02d}-01-01T00:00:00Z" for year in range(40, 1, -1)])
    monkeypatch.setattr("codex_ml.resume.utc_now", lambda: next(stamps))
    clock = iter(range(2_000_000_000, 0, -100_000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    for epochs in range(1, 6):
        assert train(str(run), epochs=epochs, checkpoint_every_steps=4, retention_policy={"keep_last": 2})["final_epoch"] == epochs
        for back, path in enumerate(sorted(run.rglob("*"))):
            if path.exists():
                os.utime(path, (1_000_000_000 - back * 1000 * epochs,) * 2)
    result = train(str(run), epochs=6)
    assert result["resumed_from_epoch"] == 5 and result["checkpoint_sha256_last"] == expected
    tally("surroundings", "a clock that jumps back at every step", resumed_to_the_same_hash=1)


def test_epochs_from_9998_to_10001(scratch, tally):
    run = scratch / "run"
    names = ["epoch-9998", "step-00099985", "epoch-9999", "step-00099995", "epoch-10000", "step-00100005", "epoch-10001"]
    for name in names:
        with opened(run) as folder:
            checkpoint, state, _ = folder.newest()
            assert checkpoint is None or is_whole(state, checkpoint.name)
            if checkpoint:
                folder.go_on(checkpoint)
            folder.save(name, state_of(name), facts_of(name, loss=1 / place(name)[1]), MANIFEST)
        assert resume(run) == name
    prune_checkpoints(run, keep_last=2)
    assert [c.name for c in list_checkpoints(run)] == ["epoch-10001", "epoch-10000"]
    assert resume(run) == "epoch-10001"
    tally("surroundings", "epochs from 9998 to 10001", newest_taken=len(names))
