"""What this machine has: cores, memory, CPU; and one thread budget for everybody.

Read from the operating system each time it is asked; nothing is started.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from edgevlm import cgroup

_LOOKS, _BETWEEN_LOOKS_S = 4, 0.003


def thread_budget(threads: int | None = None) -> int:
    """Threads that kernels, ONNX Runtime and llama.cpp share; they run one after the other.

    By default the physical cores that this process may use, no more than its CPU quota: two
    hardware threads of one core only wait for each other in dense arithmetic.
    """
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads is {threads}; it must be 1 or more")
        return threads
    return max(1, int(min(physical_cores(), cgroup.cpus())))


def free_threads(budget: int) -> int:
    """As many threads of the budget as find a core that no other program computes on.

    llama.cpp's threads wait for each other at every matrix; one that has to share its core holds
    up all of them. (Linux; elsewhere the whole budget.)
    """
    others = _others_running()
    for _ in range(_LOOKS - 1):  # a program that computes is still there; most are not
        if others == 0:
            break
        time.sleep(_BETWEEN_LOOKS_S)
        others = min(others, _others_running())
    return max(1, min(budget, (os.cpu_count() or 1) - others))


def _others_running() -> int:
    """Threads of other programs that compute now, or wait for a core."""
    try:
        running = re.search(r"^procs_running (\d+)", Path("/proc/stat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return max(0, int(running[1]) - _own_running()) if running else 0


def _own_running() -> int:
    """Threads of this process that compute now: the caller, and one that decodes a photo."""
    running = 0
    for stat in Path("/proc/self/task").glob("*/stat"):
        try:
            running += stat.read_text().rpartition(")")[2].split()[0] == "R"  # proc(5)
        except OSError:
            continue  # it has just ended
    return max(1, running)


def usable_cpus() -> set[int]:
    if sys.platform == "linux":
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Cores behind the usable CPUs; hardware threads of one core count once."""
    cores = set()
    for cpu in usable_cpus():
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


@dataclass(frozen=True)
class Support:
    """A library and CUDA: whether it was built with it, and why it does not compute there ("" if
    it does)."""

    built: bool
    problem: str


def has_nvidia_gpu() -> bool:
    """Whether the system shows an NVIDIA GPU; what can compute on it is another question."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):  # hidden on purpose
        return False
    nodes = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/usr/lib/wsl/lib/libcuda.so.1")  # Jetson, WSL
    return any(Path(node).exists() for node in nodes)


def cpu_name() -> str:
    return _cpuinfo("model name", "Model")


def cpu_features() -> str:
    """The instructions that the CPU has; two machines may share a name, not this."""
    return _cpuinfo("flags", "Features")


def _cpuinfo(*keys: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in keys:
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def has_amx() -> bool:
    """Whether the CPU has Intel's matrix tiles (Linux)."""
    try:
        return " amx_int8" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def total_memory_bytes() -> int:
    """Of the machine, or of the container."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(machine, cgroup.memory_limit_bytes()))


def available_memory_bytes() -> int:
    """What new work can take without swapping (Linux: MemAvailable), in a container too."""
    machine = _kib("/proc/meminfo", "MemAvailable") * 1024 or total_memory_bytes()
    return int(max(0, min(machine, cgroup.memory_free_bytes())))


def rss_bytes() -> int:
    """The memory this process holds now; 0 where the system does not tell."""
    return _kib("/proc/self/status", "VmRSS") * 1024


def peak_rss_bytes() -> int:
    """The most memory this process ever held.

    Linux: VmHWM, because ru_maxrss begins with what the parent held before exec.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak
    return (_kib("/proc/self/status", "VmHWM") or peak) * 1024


def _kib(path: str, key: str) -> int:
    """The number after `key:` in a file under /proc; 0 if it is not there."""
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0
