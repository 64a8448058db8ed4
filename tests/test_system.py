"""What the sampler must hold: it ends when told, survives what fails, keeps its times, names what it reads, and costs little."""

import itertools
import json
import logging
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from codex_ml.telemetry import host as host_module
from codex_ml.telemetry import nvml
from codex_ml.telemetry import processes as processes_module
from codex_ml.telemetry import system as module
from codex_ml.telemetry.host import Cgroup, Host, cgroup_folders
from codex_ml.telemetry.processes import SLOTS, Processes, Rates, descendants
from codex_ml.telemetry.record import encode, snapshot_record
from codex_ml.telemetry.system import Readings, SystemSampler, cuda_memory

ROOT = Path(__file__).parent.parent
THREADS = ("codex_ml-sampler", "codex_ml-gpus", "codex_ml-gpu-events")


@pytest.fixture(autouse=True)
def no_gpu_and_no_thread_left(monkeypatch):
    monkeypatch.delenv("CODEX_MONITORING_ENABLE_GPU", raising=False)
    yield
    until = time.monotonic() + 3
    while (left := running()) and time.monotonic() < until:
        time.sleep(0.02)
    assert left == []


def running():
    return [t.name for t in threading.enumerate() if t.name in THREADS]


def python(code):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


def collect(count, interval=0.05, **how):
    snapshots = []
    with SystemSampler(interval, snapshots.append, **how) as sampler:
        until = time.monotonic() + 20
        while len(snapshots) < count and time.monotonic() < until:
            time.sleep(0.01)
    assert len(snapshots) >= count
    return snapshots, sampler


@pytest.fixture
def child():
    "Starts processes that wait, or run code, and ends them."
    started = []

    def start(code="sys.stdin.read()"):
        process = subprocess.Popen([sys.executable, "-c", f"import sys; {code}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


# ---- start and end

@pytest.mark.parametrize("interval", [0, 0.0, -1])
def test_no_interval_no_thread(interval):
    with SystemSampler(interval, print) as sampler:
        assert running() == [] and sampler._thread is None


def test_it_ends_promptly_in_a_long_interval():
    sampler = SystemSampler(3600, print).start()
    begun = time.monotonic()
    sampler.close()
    assert time.monotonic() - begun < 0.5 and running() == []
    sampler.close()
    assert sampler.start()._thread is not None and running() == []  # closed is closed


def test_a_run_that_ends_before_the_first_interval_has_one_look():
    looks = []
    for _ in range(20):  # at once, while the thread may not even have begun to read
        with SystemSampler(3600, looks.append):
            pass
    assert len(looks) == 20 and all(look["process.memory.usage"] > 0 for look in looks)


def test_starting_twice_is_one_thread():
    sampler = SystemSampler(3600, print)
    assert sampler.start() is sampler.start() and running() == ["codex_ml-sampler"]
    sampler.close()


def test_closing_before_it_began_is_fine():
    SystemSampler(1, print).close()


def test_a_receiver_that_hangs_is_left_behind():
    hang, emitted = threading.Event(), []

    def emit(values):
        emitted.append(values)
        hang.wait(30)

    sampler = SystemSampler(0.02, emit).start()
    while not emitted:
        time.sleep(0.01)
    begun = time.monotonic()
    sampler.close()
    assert 0.9 < time.monotonic() - begun < 2
    hang.set()
    time.sleep(0.2)
    assert len(emitted) == 1  # nothing after the end


def test_a_reading_that_hangs_is_left_behind(monkeypatch):
    hang, calls, emitted = threading.Event(), [], []

    def look(self):
        calls.append(1)
        if len(calls) > 1:
            hang.wait(30)
        return {}

    monkeypatch.setattr(Host, "filesystem", look)
    sampler = SystemSampler(0.02, emitted.append).start()
    while len(calls) < 2:
        time.sleep(0.01)
    begun = time.monotonic()
    sampler.close()
    assert 0.9 < time.monotonic() - begun < 2
    hang.set()
    time.sleep(0.2)
    assert emitted == []


def test_closing_from_within_emit():
    done = threading.Event()

    def emit(values):
        sampler.close()
        done.set()

    sampler = SystemSampler(0.02, emit).start()
    assert done.wait(5)


def test_a_sampler_that_is_never_closed_holds_nobody_up():
    begun = time.monotonic()
    done = python("from codex_ml.telemetry.system import SystemSampler\ns = SystemSampler(0.01, lambda v: None).start()\n"
                  "import time; time.sleep(0.2)")
    assert (done.returncode, done.stderr) == (0, "") and time.monotonic() - begun < 10


def test_a_forked_process_has_a_copy_that_does_nothing(tmp_path):
    log = tmp_path / "pids"

    def emit(values):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")

    with SystemSampler(0.02, emit) as sampler:
        pid = os.fork()
        if pid == 0:
            begun = time.monotonic()
            time.sleep(0.2)
            sampler.close()
            os._exit(0 if running() == [] and time.monotonic() - begun < 0.5 else 1)
        assert os.waitpid(pid, 0)[1] == 0
        while not log.exists() or log.read_text().count("\n") < 5:
            time.sleep(0.01)
    assert set(log.read_text().split()) == {str(os.getpid())}


# ---- times

def test_the_first_snapshot_comes_after_one_interval_and_has_rates():
    times, begun = [], time.monotonic()
    with SystemSampler(0.4, lambda values: times.append((time.monotonic() - begun, values))):
        while not times and time.monotonic() - begun < 10:
            time.sleep(0.01)
    at, values = times[0]
    assert 0.39 < at < 2
    assert {"system.cpu.utilization", "process.cpu.utilization", "codex_ml.sampler.cpu.utilization"} <= values.keys()


def test_the_schedule_does_not_drift():
    times, begun = [], []

    def emit(values):
        times.append(time.monotonic() - begun[0])
        time.sleep(0.06)  # most of the interval

    begun.append(time.monotonic())
    with SystemSampler(0.1, emit):
        time.sleep(2.35)
    assert 19 <= len(times) <= 23  # with drift it would be 14
    late = [at - 0.1 * round(at / 0.1) for at in times]
    assert abs(sorted(late)[len(late) // 2]) < 0.04


def test_what_is_missed_is_not_made_up_for():
    times, begun = [], time.monotonic()

    def emit(values):
        times.append(time.monotonic() - begun)
        if len(times) == 1:
            time.sleep(0.55)

    with SystemSampler(0.1, emit):
        time.sleep(1.25)
    assert len(times) <= 8 and all(b - a > 0.03 for a, b in itertools.pairwise(times))


# ---- failures

def test_a_reading_that_fails_is_left_out_and_told_once(monkeypatch, caplog):
    monkeypatch.setattr(psutil, "swap_memory", lambda: (_ for _ in ()).throw(OSError("no swap to be seen")))
    monkeypatch.setattr(psutil, "net_io_counters", lambda **_: 1 / 0)
    snapshots, sampler = collect(3)
    assert sampler.errors["swap"] >= 3 and sampler.errors["network"] >= 3 and set(sampler.errors) == {"swap", "network"}
    assert not [n for n in snapshots[-1] if n.startswith(("system.paging", "system.network"))]
    assert snapshots[-1]["system.cpu.utilization"] >= 0 and snapshots[-1]["process.memory.usage"] > 0
    assert snapshots[-1]["codex_ml.sampler.errors"] >= 6
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == 2 and "'network' failed: ZeroDivisionError" in "".join(told)


def test_each_reading_may_fail_alone():
    readings = Readings()
    names = list(readings.readings)
    logging.disable()
    try:
        for failing in names:
            kept = readings.readings[failing]
            readings.readings[failing] = lambda: 1 / 0
            assert len(readings.read()) > 10
            readings.readings[failing] = kept
    finally:
        logging.disable(logging.NOTSET)
    assert readings.errors == dict.fromkeys(names, 1)


def test_a_receiver_that_fails_gets_the_next_one():
    emitted = []

    def emit(values):
        emitted.append(values)
        raise ValueError("not now")

    with SystemSampler(0.02, emit) as sampler:
        while len(emitted) < 3:
            time.sleep(0.01)
    assert sampler.errors["emit"] >= 3


def test_a_machine_that_cannot_be_read_is_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(module, "Readings", lambda **_: 1 / 0)
    with SystemSampler(0.01, print) as sampler:
        sampler._thread.join(5)
    assert sampler.errors == {"start": 1} and "without system metrics" in caplog.text


def test_an_event_handler_that_fails_is_counted():
    readings = Readings(event=lambda name, severity, **data: 1 / 0)
    readings.tell("gpu.xid", "error", gpu=0)
    assert readings.errors == {"event": 1}


# ---- what is said

def documented():
    "The names of the table, as patterns."
    nb = json.loads((ROOT / "nbs/40_system.ipynb").read_text(encoding="utf-8"))
    text = "\n".join("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    found = set()
    for cell in (cell for row in rows for cell in (row[1], row[3])):
        names = re.findall(r"`([^`]+)`", cell)
        for name in names:
            name = names[0].rpartition(".")[0] + name if name.startswith(".") else name
            pattern = re.escape(name).replace("MODE", "[a-z]+").replace("STATE", "[a-z]+").replace("DIRECTION", "[a-z]+")
            found.add(pattern.replace("DEVICE", r"\d+").replace("gpu_N", r"gpu_\d+").replace("REASON", "[a-z_]+"))
    own = [p for p in found if p.startswith("process") and "SLOT" not in p and "children" not in p]
    for prefix in ("process.children.", r"process.child.\d+."):
        found |= {p.replace(r"process\.", prefix.replace(".", r"\."), 1) for p in own}
    return re.compile("|".join(p.replace("SLOT", r"\d+") for p in found))


def test_every_name_stands_in_the_table(child):
    child()
    stand_in = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True, device_count=lambda: 1, memory_stats=lambda device: STATS))
    readings = Readings(extended=True)
    readings.read()
    values = {**readings.read(), **cuda_memory(stand_in)}
    for name in ("util", "mem_busy", "mem_used", "mem_total", "mem_util", "temperature", "power", "power_limit", "clock_sm", "clock_mem",
                 "energy", "throttled", *(f"throttle_{reason}" for reason in nvml.SLOWDOWNS), "pstate", "ecc_corrected", "ecc_uncorrected"):
        values |= nvml.gpu_keys(3, {name: 1.0})
    table = documented()
    assert len(values) > 70
    assert [name for name in values if not table.fullmatch(name)] == []
    assert not table.fullmatch("system.memory.fullness") and not table.fullmatch("gpu_3_smell")  # it can say no


def test_values_are_finite_floats_in_their_range():
    snapshots, sampler = collect(3)
    for values in snapshots:
        assert all(type(v) is float and math.isfinite(v) and v >= 0 for v in values.values())
        for name, value in values.items():
            if "utilization" in name:
                assert value <= 1.05, name
        line = encode(snapshot_record("0f3a", 7, values))
        assert json.loads(line)["system.memory.limit"] == psutil.virtual_memory().total and b'"NaN"' not in line
    assert not sampler.errors


def test_cpu_shares_add_up_and_show_work():
    host = Host()
    host.cpu()
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        sum(range(1000))
    values = host.cpu()
    assert sum(v for n, v in values.items() if n.startswith("system.cpu.utilization.")) == pytest.approx(1)
    assert values["system.cpu.utilization"] > 0.2 / os.cpu_count()


def test_guests_are_not_counted_twice(monkeypatch):
    class Times(SimpleNamespace):
        def _asdict(self):
            return vars(self)

    seconds = iter([Times(user=10, system=0, idle=10, guest=10, softirq=1, irq=1),
                    Times(user=20, system=0, idle=20, guest=20, softirq=3, irq=3)])
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(seconds))
    host = Host()
    host.cpu()
    values = host.cpu()
    assert values["system.cpu.utilization.user"] == pytest.approx(10 / 24)
    assert values["system.cpu.utilization.interrupt"] == pytest.approx(4 / 24)


def test_a_machine_without_swap_disks_or_network_says_nothing_of_them(monkeypatch):
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(used=0, free=0, total=0))
    monkeypatch.setattr(psutil, "disk_io_counters", lambda **_: None)
    monkeypatch.setattr(psutil, "net_io_counters", lambda **_: {"lo": SimpleNamespace()})
    host = Host()
    for _ in range(2):
        assert host.swap() == host.disk() == host.network() == {}


def test_network_leaves_out_the_loopback_and_errors_are_rates(monkeypatch):
    def card(n):
        return SimpleNamespace(bytes_recv=n, bytes_sent=2 * n, errin=n, errout=0, dropin=0, dropout=0)

    cards = iter([{"lo": card(0), "eth0": card(100)}, {"lo": card(10**9), "eth0": card(150), "eth1": card(0)}])
    monkeypatch.setattr(psutil, "net_io_counters", lambda **_: next(cards))
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(processes_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    host = Host()
    assert host.network() == {}
    values = host.network()
    assert values["system.network.io.receive.rate"] == 25 and values["system.network.io.transmit.rate"] == 50
    assert values["system.network.errors.receive.rate"] == 25 and values["system.network.packet.dropped.receive.rate"] == 0


def test_rates_need_two_looks_and_never_go_backwards():
    rates = Rates()
    assert rates({"a": 5.0}, now=1.0) == {} and rates({"a": 5.0}, now=1.0) == {}  # no time has passed
    assert rates({"a": 0.0, "b": 1.0}, now=2.0) == {}  # a counter that began anew
    assert rates({"a": 4.0, "b": 2.0}, now=4.0) == {"a": 2.0, "b": 0.5}


# ---- processes

def test_children_are_found_and_summed(child):
    processes = Processes(cpus=1, each=True)
    busy = child("[0 for _ in iter(int, 1)]")  # for ever
    idle = child()
    time.sleep(0.5)
    processes.read()
    time.sleep(0.5)
    values = processes.read()
    slots = {int(values[n]): n.removesuffix(".pid") for n in values if n.endswith(".pid")}
    assert values["process.children.count"] >= 2 and {busy.pid, idle.pid} <= slots.keys()
    assert values[f"{slots[busy.pid]}.cpu.utilization"] > 0.02 + 5 * values[f"{slots[idle.pid]}.cpu.utilization"]
    for name in ("memory.usage", "thread.count", "cpu.utilization"):
        assert values[f"process.children.{name}"] == pytest.approx(sum(values[f"{slot}.{name}"] for slot in slots.values()))
    assert values["process.memory.usage"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)


def test_grandchildren_too(child):
    process = child("import subprocess; p = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE); "
                    "print(p.pid, flush=True); sys.stdin.read(); p.kill()")
    grandchild = int(process.stdout.readline())
    found = descendants(os.getpid())
    assert found.index(process.pid) < found.index(grandchild)
    process.communicate()


def test_the_slow_way_finds_the_same(child, monkeypatch):
    pids = {child().pid, child().pid}
    fast = set(descendants(os.getpid()))
    monkeypatch.setattr(processes_module, "Path", lambda text: SimpleNamespace(exists=lambda: False))
    assert pids <= set(descendants(os.getpid())) == fast


def test_a_child_keeps_its_slot_and_a_new_one_takes_a_free_one(child, monkeypatch):
    monkeypatch.setattr(processes_module, "SCAN_BUDGET", 0)
    first, second, third = child(), child(), child()
    processes = Processes(cpus=1, each=True)

    def slots():
        values = processes.read()
        return {int(values[n]): n.split(".")[2] for n in values if n.endswith(".pid")}

    before = slots()
    first.kill()
    first.communicate()
    after = slots()
    assert first.pid not in after and after[second.pid] == before[second.pid] and after[third.pid] == before[third.pid]
    new = child()
    assert slots()[new.pid] == before[first.pid]


def test_many_children_are_a_bounded_number_of_names(monkeypatch):
    monkeypatch.setattr(processes_module, "descendants", lambda pid: list(range(10**6, 10**6 + 200)))

    class Stand(SimpleNamespace):
        def create_time(self):
            return -self.pid  # the last was started first

    real = psutil.Process
    monkeypatch.setattr(psutil, "Process", lambda pid=None: Stand(pid=pid) if pid and pid >= 10**6 else real(pid))
    usage, of_stand = processes_module.usage, processes_module.Usage(1, 10, 20, 1, 3, 0, 0)
    monkeypatch.setattr(processes_module, "usage", lambda p: of_stand if isinstance(p, Stand) else usage(p))
    values = Processes(cpus=1, each=True).read()
    pids = [values[f"process.child.{slot}.pid"] for slot in range(SLOTS)]
    assert values["process.children.count"] == 200 and values["process.children.memory.usage"] == 2000
    assert pids == list(range(10**6 + 199, 10**6 + 199 - SLOTS, -1)) and f"process.child.{SLOTS}.pid" not in values


@pytest.mark.parametrize("error", [psutil.NoSuchProcess(1), psutil.ZombieProcess(1), psutil.AccessDenied(1)])
def test_a_child_that_ends_while_it_is_read_is_left_out(child, monkeypatch, error):
    process = child()
    usage = processes_module.usage

    def ended(p):
        if p.pid == process.pid:
            raise error
        return usage(p)

    processes = Processes(cpus=1, each=True)
    monkeypatch.setattr(processes_module, "usage", ended)
    values = processes.read()
    assert process.pid not in {v for n, v in values.items() if n.endswith(".pid")} and values["process.memory.usage"] > 0


def test_a_zombie_harms_nothing():
    process = subprocess.Popen([sys.executable, "-c", ""])
    time.sleep(0.3)  # ended, and nobody has asked for its result
    processes = Processes(cpus=1, each=True)
    for _ in range(3):
        assert processes.read()["process.memory.usage"] > 0
    process.wait()


def test_what_the_system_does_not_tell_is_left_out(monkeypatch):
    monkeypatch.setattr(psutil.Process, "io_counters", lambda self: (_ for _ in ()).throw(psutil.AccessDenied(1)))
    monkeypatch.delattr(psutil.Process, "num_fds")
    processes = Processes(cpus=1)
    processes.read()
    values = processes.read()
    assert "process.cpu.utilization" in values and not [n for n in values if "disk" in n or "descriptor" in n]


def test_looking_for_processes_has_a_budget(monkeypatch):
    scans = []

    def slow(pid):
        scans.append(pid)
        time.sleep(0.02)
        return []

    monkeypatch.setattr(processes_module, "descendants", slow)
    processes = Processes(cpus=1)
    for _ in range(20):
        processes.read()
    assert len(scans) == 1


# ---- control groups

def groups(tmp_path, cgroup, mounts, **files):
    "A /proc with these lines, and files of groups by path."
    for path, text in files.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "cgroup").write_text(cgroup)
    (tmp_path / "mountinfo").write_text("".join(f"4{i} 31 0:{i} {m.replace('@', str(tmp_path))}\n" for i, m in enumerate(mounts)))
    return tmp_path


V1 = ["/ @/memory rw - cgroup cgroup rw,memory", "/ @/cpu rw shared:9 - cgroup cgroup rw,cpu,cpuacct"]
NONE_V1 = "9223372036854771712\n"


def test_version_1(tmp_path):
    proc = groups(tmp_path, "4:memory:/job\n2:cpu,cpuacct:/job\n0::/\n", V1, **{
        "memory/job/memory.limit_in_bytes": "1000\n", "memory/job/memory.usage_in_bytes": "900\n",
        "memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 400\n", "memory/memory.limit_in_bytes": NONE_V1,
        "cpu/job/cpu.cfs_quota_us": "150000\n", "cpu/job/cpu.cfs_period_us": "100000\n", "cpu/cpu.cfs_quota_us": "-1\n",
        "cpu/cpu.cfs_period_us": "100000\n", "cpu/job/cpu.stat": "nr_periods 10\nnr_throttled 0\nthrottled_time 0\n"})
    limits = Cgroup(10_000, 8, proc)
    assert limits.read() == {"container.memory.limit": 1000, "container.memory.usage": 900, "container.memory.working_set": 500,
                             "container.memory.utilization": 0.5, "container.cpu.limit": 1.5}
    (tmp_path / "cpu/job/cpu.stat").write_text("nr_periods 30\nnr_throttled 5\nthrottled_time 7\n")
    assert limits.read()["container.cpu.throttled"] == 0.25
    assert "container.cpu.throttled" not in limits.read()  # no period has passed


def test_an_outer_group_binds_where_it_has_less_room(tmp_path):
    proc = groups(tmp_path, "0::/a/b\n", ["/ @/fs rw - cgroup2 cgroup2 rw,nsdelegate"], **{
        "fs/a/memory.max": "1000\n", "fs/a/memory.current": "950\n", "fs/a/memory.stat": "inactive_file 0\n",
        "fs/a/b/memory.max": "500\n", "fs/a/b/memory.current": "100\n", "fs/a/b/memory.stat": "inactive_file 0\n",
        "fs/a/cpu.max": "50000 100000\n", "fs/a/cpu.stat": "usage_usec 3\n", "fs/a/b/cpu.max": "max 100000\n"})
    values = Cgroup(10_000, 8, proc).read()
    assert values["container.memory.limit"] == 1000 and values["container.memory.utilization"] == 0.95
    assert values["container.cpu.limit"] == 0.5


@pytest.mark.parametrize("maximum", ["max\n", "10000\n", "20000\n"])
def test_a_limit_that_does_not_bind_is_absent(tmp_path, maximum):
    proc = groups(tmp_path, "0::/\n", ["/ @/fs rw - cgroup2 cgroup2 rw"], **{
        "fs/memory.max": maximum, "fs/memory.current": "9\n", "fs/memory.stat": "", "fs/cpu.max": "800000 100000\n", "fs/cpu.stat": ""})
    assert Cgroup(10_000, 8, proc).read() == {}


def test_both_versions_mounted(tmp_path):
    proc = groups(tmp_path, "3:memory:/job\n0::/job\n", [V1[0], "/ @/unified rw - cgroup2 cgroup2 rw"],
                  **{"memory/job/x": "", "unified/job/x": ""})
    assert cgroup_folders("memory", proc) == (1, [tmp_path / "memory/job", tmp_path / "memory"])
    assert cgroup_folders("cpu", proc) == (2, [tmp_path / "unified/job", tmp_path / "unified"])


@pytest.mark.parametrize(("path", "root", "found"), [
    ("/docker/ab", "/docker/ab", ["fs"]),  # the container's group is where the tree is mounted
    ("/docker/ab/in", "/docker/ab", ["fs/in", "fs"]),
    ("/elsewhere", "/docker/ab", ["fs"]),  # the machine's path in a container that sees only its own part
    ("/../..", "/", ["fs"]),  # above what its name space shows
    ("/gone", "/", ["fs"]),
])
def test_groups_in_a_container(tmp_path, path, root, found):
    proc = groups(tmp_path, f"0::{path}\n", [f"{root} @/fs rw - cgroup2 cgroup2 rw"], **{"fs/in/x": ""})
    assert cgroup_folders("memory", proc) == (2, [tmp_path / f for f in found])


def test_no_groups_at_all(tmp_path):
    assert cgroup_folders("memory", tmp_path) == (0, []) and Cgroup(1, 1, tmp_path).read() == {}
    assert cgroup_folders("memory", groups(tmp_path, "0::/\n", ["/ /proc rw - proc proc rw"])) == (0, [])


def test_a_group_that_goes_away_is_a_failure_of_that_reading(tmp_path):
    proc = groups(tmp_path, "0::/\n", ["/ @/fs rw - cgroup2 cgroup2 rw"], **{
        "fs/memory.max": "10\n", "fs/memory.current": "9\n", "fs/memory.stat": ""})
    limits = Cgroup(100, 8, proc)
    assert limits.read()["container.memory.utilization"] == 0.9
    (tmp_path / "fs/memory.current").unlink()
    with pytest.raises(OSError):
        limits.read()


def test_a_quota_counts_as_the_cpus_of_the_process(monkeypatch):
    monkeypatch.setattr(host_module.Cgroup, "cpu_limit", lambda self: (0.5, Path("x")))
    seen = []
    monkeypatch.setattr(module, "Processes", lambda cpus, each: seen.append(cpus) or SimpleNamespace(read=lambda gpu: {}))
    Readings()
    assert seen == [0.5]


# ---- torch

STATS = {"reserved_bytes.all.peak": 900, "allocated_bytes.all.current": 100, "allocated_bytes.all.peak": 300,
         "reserved_bytes.all.current": 800, "num_alloc_retries": 2, "num_ooms": 1}


def test_cuda_memory_of_devices_in_use():
    stats = {0: {}, 1: STATS}
    cuda = SimpleNamespace(is_initialized=lambda: True, device_count=lambda: 2, memory_stats=stats.__getitem__)
    assert cuda_memory(SimpleNamespace(cuda=cuda)) == {
        "codex_ml.cuda.1.memory.allocated": 100, "codex_ml.cuda.1.memory.allocated.peak": 300, "codex_ml.cuda.1.memory.reserved": 800,
        "codex_ml.cuda.1.alloc_retries": 2, "codex_ml.cuda.1.ooms": 1}


@pytest.mark.parametrize("half_loaded", [SimpleNamespace(), SimpleNamespace(cuda=SimpleNamespace())])
def test_a_torch_that_is_still_loading(half_loaded):
    assert cuda_memory(half_loaded) == {}


def test_the_sampler_loads_no_torch_and_no_binding():
    code = ("import sys, time\nfrom codex_ml.telemetry.system import SystemSampler\nout = []\n"
            "with SystemSampler(0.05, out.append, extended=True):\n    while not out: time.sleep(0.01)\n"
            "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'pynvml', 'numpy'}))")
    done = python(code)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_looking_draws_no_random_number():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    collect(3, extended=True)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_memory_of_a_real_device():
    kept = torch.zeros(1 << 20, device="cuda")
    values = cuda_memory()
    assert values[f"codex_ml.cuda.{kept.device.index}.memory.allocated"] >= kept.nbytes


# ---- cost

def test_it_costs_less_than_half_a_percent_of_a_core_at_one_look_a_second(child):
    for _ in range(4):
        child()
    snapshots, _ = collect(12, interval=0.1)
    costs = sorted(values["codex_ml.sampler.cpu.utilization"] * 0.1 for values in snapshots)  # seconds of CPU for one look
    assert 0 < costs[len(costs) // 2] < 0.005
    assert 0 < snapshots[-1]["codex_ml.sampler.duration"] < 0.5


def test_its_own_cost_is_what_the_system_says_it_is():
    used, begun, snapshots = time.process_time(), time.monotonic(), []
    with SystemSampler(0.05, snapshots.append):
        time.sleep(2.0)
    outside = (time.process_time() - used) / (time.monotonic() - begun)
    inside = sum(values["codex_ml.sampler.cpu.utilization"] for values in snapshots) / len(snapshots)
    assert inside == pytest.approx(outside, rel=0.5, abs=0.004)
