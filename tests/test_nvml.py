"""GPU readings against a driver library made for the purpose: tests/fake_nvml.c stands where NVIDIA's would, below the binding."""

import ctypes
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from codex_ml.telemetry import nvml as module
from codex_ml.telemetry.nvml import GpuReader, Gpus, gpu_monitoring_enabled, open_gpus
from codex_ml.telemetry.system import Readings, SystemSampler

pynvml = pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
SOURCE = Path(__file__).with_name("fake_nvml.c")
ROOT = SOURCE.parent.parent
GIB = 1 << 30


def compiled(folder, *flags):
    gcc = shutil.which("gcc") or shutil.which("cc")
    if gcc is None:
        pytest.skip("needs a C compiler (gcc) for the driver library of the tests")
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([gcc, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", *flags, "-o", library, SOURCE, "-pthread"], check=True)
    return library


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="session")
def old_library(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("old_driver"), "-DOLD")


class Driver:
    "The library, its control file, and what was heard from the code under test."

    def __init__(self, library, folder, monkeypatch):
        self.control = folder / "driver"
        self.control.touch()
        self.events, self.failures = [], Counter()
        loaded = ctypes.CDLL(str(library))
        monkeypatch.setenv("FAKE_NVML", str(self.control))
        monkeypatch.setenv("CODEX_MONITORING_ENABLE_GPU", "1")
        loaded.fake_reset()
        monkeypatch.setattr(pynvml, "nvmlLib", loaded)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})

    def set(self, *lines):
        with open(self.control, "a") as file:
            file.write("".join(f"{line}\n" for line in lines))

    def calls(self):
        path = Path(f"{self.control}.calls")
        return Counter(path.read_text().splitlines() if path.exists() else ())

    def event(self, name, severity="info", **data):
        self.events.append((name, severity, data))

    def failed(self, what, error):
        self.failures[what] += 1

    def open(self, extended=False):
        return open_gpus(extended=extended, event=self.event, failed=self.failed)

    def named(self, name):
        return [(severity, data) for event, severity, data in self.events if event == name]

    def heard(self, name, count=1, within=5.0):
        "The events of a name, once there are `count`."
        until = time.monotonic() + within
        while len(self.named(name)) < count:
            assert time.monotonic() < until, f"{name} was not heard, but {self.events}"
            time.sleep(0.01)
        return self.named(name)


@pytest.fixture
def driver(library, tmp_path, monkeypatch):
    return Driver(library, tmp_path, monkeypatch)


@pytest.fixture
def gpus(driver):
    "Opens GPUs, and closes them at the end."
    opened = []

    def open_(**how):
        opened.append(driver.open(**how))
        return opened[-1]

    yield open_
    for one in opened:
        if one is not None:
            one.close()


# ---- what is read

def test_one_gpu_in_si_units(driver, gpus):
    assert gpus().read() == {
        "gpu_count": 1, "gpu_util_mean": 0.5, "gpu_0_util": 0.5, "gpu_0_mem_busy": 0.25, "gpu_0_mem_used": 20 * GIB,
        "gpu_0_mem_total": 80 * GIB, "gpu_0_mem_util": 0.25, "gpu_0_temperature": 61, "gpu_0_power": 300.0, "gpu_0_power_limit": 700.0,
        "gpu_0_clock_sm": 1.98e9,
        "gpu_0_clock_mem": 2.619e9, "hw.gpu.utilization.gpu_0": 0.5, "hw.gpu.memory.usage.gpu_0": 20 * GIB,
        "hw.gpu.memory.limit.gpu_0": 80 * GIB, "hw.gpu.memory.utilization.gpu_0": 0.25, "hw.temperature.gpu_0": 61, "hw.power.gpu_0": 300.0,
    }
    assert driver.failures == {} and driver.events == []


def test_two_gpus_and_their_mean(driver, gpus):
    driver.set("count 2", "util.0 100", "util.1 40", "temperature.1 80")
    values = gpus().read()
    assert (values["gpu_count"], values["gpu_0_util"], values["gpu_1_util"], values["gpu_util_mean"]) == (2, 1.0, 0.4, 0.7)
    assert (values["gpu_0_temperature"], values["gpu_1_temperature"]) == (61, 80)


def test_an_idle_gpu_is_zero_and_there(driver, gpus):
    driver.set("util 0", "mem_used 0", "power 0")
    values = gpus().read()
    assert values["gpu_util_mean"] == values["gpu_0_util"] == values["gpu_0_power"] == values["gpu_0_mem_used"] == 0


def test_extended_readings(driver, gpus):
    driver.set("energy 5500", "pstate 2", "corrected 7", "uncorrected 1", f"reasons {0x04 | 0x40}")
    values = gpus(extended=True).read()
    assert values["gpu_0_energy"] == values["hw.energy.gpu_0"] == 5.5 and values["gpu_0_pstate"] == 2
    assert values["hw.errors.gpu_0.corrected"] == 7 and values["gpu_0_ecc_uncorrected"] == 1
    throttle = {name.removeprefix("gpu_0_throttle_"): value for name, value in values.items() if "_throttle_" in name}
    assert throttle == {"power_cap": 1, "hw_slowdown": 0, "sw_thermal": 0, "hw_thermal": 1, "power_brake": 0}
    assert values["gpu_0_throttled"] == 1


def test_what_is_not_extended_is_not_asked(driver, gpus):
    values = gpus().read()
    assert not {"gpu_0_energy", "gpu_0_throttled", "gpu_0_pstate", "gpu_0_ecc_corrected"} & values.keys()
    asked = {call.split()[0] for call in driver.calls()}
    assert not asked & {"nvmlEventSetCreate", "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetComputeRunningProcesses_v3"}
    assert not [t for t in threading.enumerate() if t.name == "codex_ml-gpu-events"]


def test_memory_by_process_over_all_gpus(driver, gpus):
    driver.set("count 3", f"pid.0 {os.getpid()}", f"pid.1 {os.getpid()}", f"pid_used.0 {GIB}", f"pid_used.1 {2 * GIB}", "pid.2 1",
               f"pid_used.2 {(1 << 64) - 1 - (1 << 64)}")  # not available
    assert gpus(extended=True).process_memory() == {os.getpid(): 3 * GIB}


def test_a_driver_without_newer_functions(old_library, tmp_path, monkeypatch):
    driver = Driver(old_library, tmp_path, monkeypatch)
    driver.set("reasons 8")
    gpus = driver.open(extended=True)
    values = gpus.read()
    gpus.close()
    assert values["gpu_0_mem_used"] == 21 * GIB  # this version counts the driver's own
    assert values["gpu_0_throttle_hw_slowdown"] == 1 and driver.failures == {}


# ---- where there is none

def shut(driver):
    calls = driver.calls()
    return calls["nvmlInitWithFlags"] == calls["nvmlShutdown"]


@pytest.mark.parametrize(("lines", "why"), [
    (["count 0"], "knows of no GPU"),
    (["fail.nvmlInitWithFlags 9"], "does not answer"),  # driver not loaded
    (["fail.nvmlInitWithFlags 18"], "does not answer"),  # library and driver of different versions
])
def test_no_gpu_though_asked_for_is_one_warning(driver, caplog, lines, why):
    driver.set(*lines)
    with caplog.at_level(logging.INFO, "codex_ml"):
        assert driver.open(extended=True) is None
    assert [r.levelname for r in caplog.records] == ["WARNING"] and why in caplog.text and "CODEX_MONITORING_ENABLE_GPU" in caplog.text
    assert [(name, severity) for name, severity, _ in driver.events] == [("gpu.unavailable", "info")]
    assert driver.calls()["nvmlShutdown"] == (1 if lines == ["count 0"] else 0)


def test_no_library(driver, monkeypatch, caplog):
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    with caplog.at_level(logging.INFO, "codex_ml"):
        assert driver.open() is None
    assert "does not answer" in caplog.text and len(caplog.records) == 1


def test_no_package(driver, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with caplog.at_level(logging.INFO, "codex_ml"):
        assert driver.open() is None
    assert 'pip install "codex_ml[gpu]"' in caplog.text and len(caplog.records) == 1


def test_a_count_that_fails_ends_the_use_of_the_library(driver):
    driver.set("fail.nvmlDeviceGetCount_v2 999")
    with pytest.raises(pynvml.NVMLError):
        driver.open()
    assert shut(driver)


@pytest.mark.parametrize(("value", "wanted"), [
    ("1", True), ("true", True), (" ON ", True), ("0", False), ("", False), ("no", False), (None, False)])
def test_the_environment_decides(monkeypatch, value, wanted):
    monkeypatch.delenv("CODEX_MONITORING_ENABLE_GPU", raising=False)
    if value is not None:
        monkeypatch.setenv("CODEX_MONITORING_ENABLE_GPU", value)
    assert gpu_monitoring_enabled() is wanted
    readings = Readings()
    readings.close()
    assert ("gpu" in readings.readings) is wanted


# ---- what fails

def test_what_a_gpu_cannot_tell_is_absent_and_asked_once(driver, gpus):
    driver.set("count 2", "fail.nvmlDeviceGetUtilizationRates.0 3", "fail.nvmlDeviceGetEnforcedPowerLimit 3",
               "fail.nvmlDeviceGetPowerUsage.1 4")
    opened = gpus()
    first, second = opened.read(), opened.read()
    assert first == second and "gpu_0_util" not in first and "hw.gpu.utilization.gpu_0" not in first
    assert first["gpu_util_mean"] == first["gpu_1_util"] == 0.5 and first["gpu_count"] == 2
    assert "gpu_0_power_limit" not in first and "gpu_1_power" not in first and first["gpu_0_power"] == 300
    assert driver.calls()["nvmlDeviceGetUtilizationRates 0"] == 1 and driver.calls()["nvmlDeviceGetUtilizationRates 1"] == 2
    assert driver.failures == {} and driver.events == []


def test_nothing_supported_at_all(driver, gpus):
    driver.set(*(f"fail.{name} 3" for name in (
        "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetTemperature",
        "nvmlDeviceGetPowerUsage",
        "nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetClockInfo", "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPerformanceState",
        "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons", "nvmlDeviceGetTotalEccErrors",
        "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetSupportedEventTypes")))
    opened = gpus(extended=True)
    assert opened.read() == {"gpu_count": 1} and opened.process_memory() == {}
    assert driver.failures == {} and driver.events == []


def test_the_kth_call_fails(driver, gpus):
    driver.set("fail.nvmlDeviceGetTemperature.0 999", "at.nvmlDeviceGetTemperature.0 2")
    opened = gpus()
    reads = [opened.read() for _ in range(3)]
    assert ["gpu_0_temperature" in values for values in reads] == [True, False, True]
    assert [values["gpu_0_util"] for values in reads] == [0.5] * 3
    assert driver.failures == {"gpu 0 temperature": 1} and driver.events == []


def test_a_lost_gpu_is_told_once_and_its_values_go(driver, gpus, caplog):
    driver.set("count 2", "util.1 90")
    opened = gpus()
    assert opened.read()["gpu_count"] == 2
    driver.set("lost.0 1")
    values = opened.read()
    assert opened.read() == values and values["gpu_count"] == 1 and values["gpu_util_mean"] == values["gpu_1_util"] == 0.9
    assert not [name for name in values if "gpu_0" in name]
    assert driver.named("gpu.lost") == [("error", {"gpu": 0, "reason": "GPU is lost"})]
    assert driver.failures == {} and caplog.text.count("is lost") == 2  # one line, which says it twice: our words and the driver's
    driver.set("lost.1 1")
    assert opened.read() == {} and len(driver.named("gpu.lost")) == 2


def test_a_gpu_lost_between_two_readings_leaves_nothing(driver, gpus):
    driver.set("count 2", "fail.nvmlDeviceGetPowerUsage.0 15")  # after utilisation and memory were read
    values = gpus().read()
    assert values["gpu_count"] == 1 and not [name for name in values if "gpu_0" in name]


@pytest.mark.parametrize("code", [15, 16])
def test_a_gpu_lost_from_the_start(driver, gpus, code):
    driver.set("count 2", f"fail.nvmlDeviceGetHandleByIndex_v2.0 {code}")
    assert gpus().read()["gpu_count"] == 1
    assert [data["gpu"] for _, data in driver.named("gpu.lost")] == [0]


def test_a_gpu_that_may_not_be_opened_is_counted(driver, gpus):
    driver.set("count 2", "fail.nvmlDeviceGetHandleByIndex_v2.1 4")
    assert gpus().read()["gpu_count"] == 1 and driver.failures == {"gpu 1": 1}


def test_all_lost_from_the_start(driver):
    driver.set("count 2", "lost 1")
    assert driver.open(extended=True) is None
    assert len(driver.named("gpu.lost")) == 2 and len(driver.named("gpu.unavailable")) == 1 and shut(driver)


# ---- events of the driver

def test_a_fault_is_heard_with_its_gpu(driver, gpus):
    driver.set("count 2")
    gpus(extended=True)
    driver.set("event 1 8 79", "event 0 8 999")
    assert driver.heard("gpu.xid", 2) == [
        ("error", {"gpu": 1, "xid": 79, "meaning": "GPU has fallen off the bus", "count": 1}),
        ("error", {"gpu": 0, "xid": 999, "meaning": "see NVIDIA's list of XID errors", "count": 1})]


def test_each_kind_of_event(driver, gpus):
    driver.set("pstate 5", "clock_sm 1410", "supported 65535", "event 0 1 0", "event 0 2 0", "event 0 4 0", "event 0 16 0",
               "event 0 128 0", "event 0 512 3")
    gpus(extended=True)
    assert driver.heard("gpu.ecc.single_bit_storm") == [("warning", {"gpu": 0, "data": 3, "count": 1})]
    assert driver.events == [
        ("gpu.ecc.single_bit", "warning", {"gpu": 0, "count": 1}), ("gpu.ecc.double_bit", "error", {"gpu": 0, "count": 1}),
        ("gpu.pstate", "info", {"gpu": 0, "pstate": 5, "count": 1}), ("gpu.clock", "info", {"gpu": 0, "clock_sm": 1.41e9, "count": 1}),
        ("gpu.power_source", "info", {"gpu": 0, "count": 1}), ("gpu.ecc.single_bit_storm", "warning", {"gpu": 0, "data": 3, "count": 1})]


def test_only_what_a_gpu_supports_is_registered(driver, gpus):
    driver.set("supported 8", "event 0 16 0", "event 0 8 31")  # the library refuses a kind that is not supported
    gpus(extended=True)
    driver.heard("gpu.xid")
    assert [name for name, *_ in driver.events] == ["gpu.xid"] and driver.failures == {}


def test_a_flood_is_grouped_and_hides_no_fault(driver, gpus):
    driver.set(*["event 0 16 0"] * 200, "event 0 8 31", *["event 0 16 0"] * 100, "event 0 8 48")
    opened = gpus(extended=True)
    assert [data["xid"] for _, data in driver.heard("gpu.xid", 2, within=10)] == [31, 48]
    opened.close()
    counts = [data["count"] for _, data in driver.named("gpu.clock")]
    assert counts[0] == 1 and sum(counts) == 300 and len(counts) <= 10


def test_different_faults_at_once_are_told_apart(driver, gpus):
    driver.set("event 0 8 31", "event 0 8 48", "event 0 8 63", "event 0 8 48")
    gpus(extended=True)
    driver.heard("gpu.xid", 4)
    assert [(data["xid"], data["count"]) for _, data in driver.named("gpu.xid")] == [(31, 1), (48, 1), (63, 1), (48, 1)]


def test_kinds_of_events_without_a_name_are_not_asked_for(driver, gpus):
    driver.set(f"supported {0x108}", f"event 0 {0x100} 0", "event 0 8 31")
    gpus(extended=True)
    driver.heard("gpu.xid")
    assert [name for name, *_ in driver.events] == ["gpu.xid"]


def test_a_loss_that_two_threads_find_is_told_once(driver, gpus):
    driver.set("count 2")
    opened = gpus()
    opened.lost(1, pynvml.NVMLError(15))
    opened.lost(1, pynvml.NVMLError(15))
    assert len(driver.named("gpu.lost")) == 1


def test_events_go_on_for_the_gpus_that_are_left(driver, gpus):
    driver.set("count 2")
    gpus(extended=True)
    driver.set("lost.0 1")
    driver.heard("gpu.lost")
    driver.set("event 1 8 31")
    assert driver.heard("gpu.xid") == [("error", {"gpu": 1, "xid": 31, "meaning": "memory page fault", "count": 1})]
    assert driver.failures == {} and len(driver.named("gpu.lost")) == 1


def test_when_all_are_lost_the_thread_ends(driver, gpus):
    opened = gpus(extended=True)
    driver.set("lost 1")
    driver.heard("gpu.lost")
    opened._events._thread.join(5)
    assert not opened._events._thread.is_alive() and opened.read() == {}
    assert driver.calls()["nvmlEventSetWait_v2"] < 50  # it did not spin
    assert driver.calls()["nvmlEventSetCreate"] == driver.calls()["nvmlEventSetFree"]


def test_waiting_that_fails_is_counted_and_does_not_spin(driver, gpus):
    driver.set("fail.nvmlEventSetWait_v2 999")
    opened = gpus(extended=True)
    time.sleep(0.5)
    assert 1 <= driver.calls()["nvmlEventSetWait_v2"] <= 3 and driver.failures["gpu events"] >= 1
    assert opened.read()["gpu_count"] == 1
    driver.set("fail.nvmlEventSetWait_v2 0", "event 0 8 31")
    driver.heard("gpu.xid")


def test_waiting_costs_little(driver, gpus):
    gpus(extended=True)
    time.sleep(1.0)
    assert driver.calls()["nvmlEventSetWait_v2"] <= 8


def test_slowing_down_is_an_event_when_it_changes(driver, gpus):
    opened = gpus(extended=True)
    for reasons in (0, 0x04, 0x40, 0x44, 0x48, 0x01, 0):  # power cap, thermal, both, thermal and slowdown, idle, nothing
        driver.set(f"reasons {reasons}")
        opened.read()
    assert driver.named("gpu.throttle") == [
        ("warning", {"gpu": 0, "reasons": ["hw_thermal"]}), ("warning", {"gpu": 0, "reasons": ["hw_slowdown", "hw_thermal"]}),
        ("info", {"gpu": 0, "reasons": []})]


# ---- the end

@pytest.mark.parametrize("extended", [False, True])
def test_closing_gives_everything_back(driver, extended):
    opened = driver.open(extended=extended)
    opened.read()
    begun = time.monotonic()
    opened.close()
    assert time.monotonic() - begun < 1.5 and shut(driver)
    assert driver.calls()["nvmlEventSetCreate"] == driver.calls()["nvmlEventSetFree"] == extended
    assert not [t for t in threading.enumerate() if t.name.startswith("codex_ml-gpu")]


def test_a_driver_that_hangs_is_waited_for_once(driver):
    driver.set("hang.nvmlDeviceGetTemperature 1500")
    reader = GpuReader(extended=False, event=driver.event, failed=driver.failed)
    begun = time.monotonic()
    assert reader.read(timeout=0.3) == ({}, {})
    first = time.monotonic() - begun
    assert reader.read(timeout=0.3) == ({}, {})
    assert 0.3 <= first < 1.0 and time.monotonic() - begun < first + 0.25 and driver.failures == {"gpu": 2}
    driver.set("hang.nvmlDeviceGetTemperature 0")
    time.sleep(1.6)
    driver.set("util 77")
    assert reader.read()[0]["gpu_0_util"] == 0.77  # a fresh look, not the late answer
    reader.close()
    assert shut(driver)


# ---- in the sampler, and through the binding's own look-up

def test_the_sampler_goes_on_when_the_driver_hangs(driver):
    snapshots = []
    sampler = SystemSampler(0.2, snapshots.append).start()
    until = time.monotonic() + 5
    while not (snapshots and "gpu_count" in snapshots[-1]) and time.monotonic() < until:
        time.sleep(0.02)
    driver.set("hang.nvmlDeviceGetTemperature 2000")
    time.sleep(1.5)
    begun, count = time.monotonic(), len(snapshots)
    sampler.close()
    assert "gpu_count" not in snapshots[-1] and snapshots[-1]["system.memory.utilization"] > 0 and count >= 3
    assert sampler.errors["gpu"] >= 1 and time.monotonic() - begun < 3


def test_a_lost_gpu_leaves_the_rest_of_the_telemetry(driver):
    snapshots = []
    with SystemSampler(0.1, snapshots.append, extended=True, event=driver.event):
        while not snapshots or "gpu_count" not in snapshots[-1]:
            time.sleep(0.02)
        driver.set("lost 1")
        driver.heard("gpu.lost")
        count = len(snapshots)
        while len(snapshots) < count + 3:
            time.sleep(0.02)
    assert not [name for name in snapshots[-1] if "gpu" in name] and snapshots[-1]["process.cpu.utilization"] >= 0


def test_gpu_memory_of_this_process(driver):
    driver.set(f"pid {os.getpid()}", f"pid_used {5 * GIB}")
    readings = Readings(extended=True)
    try:
        until = time.monotonic() + 5
        while not (values := readings.read()).get("process.gpu.memory.usage") and time.monotonic() < until:
            time.sleep(0.02)
        assert values["process.gpu.memory.usage"] == 5 * GIB
    finally:
        readings.close()


SCRIPT = """
import json, sys, time
from codex_ml.telemetry.system import SystemSampler
out, events = [], []
step = 0
with SystemSampler(0.1, out.append, extended=True, event=lambda name, severity, **data: events.append([step, name, severity, data])):
    until = time.monotonic() + 10
    while time.monotonic() < until and not (out and "gpu_count" in out[-1] and any(e[1] == "gpu.xid" for e in events)):
        step += 1
        time.sleep(0.01)
print(json.dumps([out[-1], events, "pynvml" in sys.modules]))
"""


def run_script(library, control, **env):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": str(library.parent), "FAKE_NVML": str(control), **env}
    done = subprocess.run([sys.executable, "-c", SCRIPT if "UNTIL" not in env else SCRIPT.replace("+ 10", "+ 0.4")],
                          env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_the_library_is_found_by_its_name(library, tmp_path):
    control = tmp_path / "driver"
    control.write_text("count 2\nevent 1 8 79\n")
    (values, events, _), stderr = run_script(library, control, CODEX_MONITORING_ENABLE_GPU="1")
    assert values["gpu_count"] == 2 and values["gpu_util_mean"] == 0.5 and values["hw.temperature.gpu_1"] == 61.0
    [(step, _, severity, data)] = [e for e in events if e[1] == "gpu.xid"]
    assert step >= 1 and severity == "error" and data["gpu"] == 1 and data["xid"] == 79
    assert stderr == ""


def test_unless_asked_the_binding_is_not_even_loaded(library, tmp_path):
    control = tmp_path / "driver"
    control.write_text("")
    (values, events, loaded), stderr = run_script(library, control, CODEX_MONITORING_ENABLE_GPU="", UNTIL="soon")
    assert not loaded and events == [] and not [name for name in values if "gpu" in name] and stderr == ""
    assert not Path(f"{control}.calls").exists()


# ---- a real GPU

def real_gpu():
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    try:
        return pynvml.nvmlDeviceGetCount() > 0
    finally:
        pynvml.nvmlShutdown()


@pytest.mark.skipif(not real_gpu(), reason="needs an NVIDIA GPU and its driver")
def test_a_real_gpu(monkeypatch):
    monkeypatch.setenv("CODEX_MONITORING_ENABLE_GPU", "1")
    failures, events = [], []
    opened = open_gpus(extended=True, event=lambda *a, **k: events.append(a), failed=lambda *failure: failures.append(failure))
    assert isinstance(opened, Gpus)
    values = opened.read()
    opened.process_memory()
    begun = time.monotonic()
    opened.read()
    took = time.monotonic() - begun
    opened.close()
    assert failures == [] and not [e for e in events if e[0] == "gpu.lost"]
    assert values["gpu_count"] >= 1 and 0 <= values["gpu_util_mean"] <= 1
    assert 1 << 28 < values["gpu_0_mem_total"] < 1 << 42 and 0 < values["gpu_0_mem_util"] < 1  # bytes, not MiB
    assert 10 < values["gpu_0_temperature"] < 110 and took < 0.5
    if "gpu_0_power" in values:
        assert 1 < values["gpu_0_power"] < 2000  # watts, not milliwatts
    if "gpu_0_clock_sm" in values:
        assert 5e7 < values["gpu_0_clock_sm"] < 5e9  # hertz, not megahertz


def test_the_module_names_its_errors_as_the_binding_does():
    assert {pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED} == set(module.LOST)
    assert {pynvml.NVML_ERROR_INVALID_ARGUMENT, pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_NO_PERMISSION,
            pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
            pynvml.NVML_ERROR_DEPRECATED} == set(module.MISSING)
    assert (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM, pynvml.NVML_TEMPERATURE_GPU, pynvml.NVML_VOLATILE_ECC) == (1, 2, 0, 0)
    for name, bit in {"SwPowerCap": "power_cap", "HwSlowdown": "hw_slowdown", "SwThermalSlowdown": "sw_thermal",
                      "HwThermalSlowdown": "hw_thermal", "HwPowerBrakeSlowdown": "power_brake"}.items():
        assert module.SLOWDOWNS[bit] == getattr(pynvml, f"nvmlClocksThrottleReason{name}")
