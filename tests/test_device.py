"""The thread budget and what the machine has, against the operating system's own answers."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from edgevlm import cgroup, device

Machine = Callable[[dict[str, str]], None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A function that sets up another machine: its files under /proc and /sys."""

    def pretend(files: dict[str, str]) -> None:
        for path, text in files.items():
            target = tmp_path / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        for module in (device, cgroup):
            monkeypatch.setattr(module, "Path", lambda path: tmp_path / path.lstrip("/"))

    return pretend


def cores(*siblings: str) -> dict[str, str]:
    return {
        f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text + "\n"
        for cpu, text in enumerate(siblings)
    }


def test_the_number_that_was_asked_for_is_the_budget() -> None:
    assert device.thread_budget(3) == 3
    assert device.thread_budget(200) == 200


@pytest.mark.parametrize("threads", [0, -1])
def test_less_than_one_thread_is_refused(threads: int) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        device.thread_budget(threads)


def test_the_budget_follows_the_affinity_of_the_process() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert device.thread_budget() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert 1 <= device.thread_budget() <= len(before)


@pytest.mark.parametrize(
    ("usable", "expected"), [({0, 1, 2, 3}, 2), ({0, 1}, 1), ({0, 2}, 2), ({3}, 1)]
)
def test_hardware_threads_of_one_core_count_once(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, usable: set[int], expected: int
) -> None:
    machine(cores("0-1", "0-1", "2-3", "2-3"))
    monkeypatch.setattr(device, "usable_cpus", lambda: usable)
    assert device.thread_budget() == expected


def test_without_a_topology_every_cpu_is_a_core(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine({})
    monkeypatch.setattr(device, "usable_cpus", lambda: {0, 1, 5})
    assert device.physical_cores() == device.thread_budget() == 3


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000\n", 4),
        ("200000 100000\n", 2),
        ("250000 100000\n", 2),
        ("50000 100000\n", 1),
        ("800000 100000\n", 4),
        ("nonsense", 4),
    ],
)
def test_the_budget_stays_within_the_quota_of_a_container(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int
) -> None:
    machine({**cores("0", "1", "2", "3"), "/sys/fs/cgroup/cpu.max": quota})
    monkeypatch.setattr(device, "usable_cpus", lambda: {0, 1, 2, 3})
    assert device.thread_budget() == expected


def test_the_name_of_the_cpu_is_that_of_cpuinfo(machine: Machine) -> None:
    machine({"/proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU: fast @ 2 GHz\n\n"})
    assert device.cpu_name() == "Some CPU: fast @ 2 GHz"


def test_a_cpu_without_a_name_is_called_something(machine: Machine) -> None:
    machine({})
    assert device.cpu_name()


def test_available_memory_is_what_linux_says(machine: Machine) -> None:
    machine({"/proc/meminfo": "MemTotal: 9000 kB\nMemFree: 1 kB\nMemAvailable: 1234 kB\n"})
    assert device.available_memory_bytes() == 1234 * 1024


def test_without_that_line_all_memory_counts(machine: Machine) -> None:
    machine({"/proc/meminfo": "MemTotal: 9000 kB\n"})
    assert device.available_memory_bytes() == device.total_memory_bytes()


def test_this_machine_has_more_memory_than_is_available() -> None:
    assert 0 < device.available_memory_bytes() <= device.total_memory_bytes()


def test_peak_memory_is_that_of_this_process_alone() -> None:
    """A child of a large parent: ru_maxrss would begin with the parent's memory."""
    held = b"x" * 400_000_000
    program = "from edgevlm import device; b'x' * 100_000_000; print(device.peak_rss_bytes())"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert 100_000_000 < int(child.stdout) < 300_000_000
    assert device.peak_rss_bytes() > len(held)


def test_without_proc_peak_memory_comes_from_getrusage(machine: Machine) -> None:
    machine({})
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert device.peak_rss_bytes() >= peak_kib * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_threads_of_this_process_are_not_another_program() -> None:
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            hashlib.sha256(bytes(1 << 20))  # without the GIL

    before = device._own_running()
    busy = [threading.Thread(target=compute) for _ in range(3)]
    for thread in busy:
        thread.start()
    try:
        assert any(device._own_running() > before for _ in range(200))
    finally:
        stop.set()
        for thread in busy:
            thread.join()


@pytest.mark.parametrize(("then", "threads"), [(3, 2), (1, 4)], ids=["computes on", "ended soon"])
def test_a_core_is_left_to_a_program_that_goes_on_computing(
    then: int, threads: int, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    machine({"/proc/stat": "cpu 1 2 3\nprocs_running 3\nprocs_blocked 0\n"})
    later = {"/proc/stat": f"procs_running {then}\n"}
    monkeypatch.setattr("time.sleep", lambda _: machine(later))
    assert device.free_threads(4) == threads


def test_the_whole_budget_is_free_where_the_system_does_not_tell(machine: Machine) -> None:
    machine({})
    assert device.free_threads(1) == 1
    assert device.free_threads(os.cpu_count() or 1) == os.cpu_count()
