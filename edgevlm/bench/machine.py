"""The machine that a measurement was taken on, and the limits that its stages can be held against.

Two rates are measured: how fast memory is read and how fast numpy multiplies float32 matrices.
Temperature and throttling come from sysfs and, on a Raspberry Pi or a Jetson, from their own tools.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm import device

# What decides which kernels run, as Linux names it on x86 and Arm.
_FEATURES = (
    *("sse4_1", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni"),
    *("avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
_THROTTLED = {  # raspberrypi.com/documentation/computers/os.html#get_throttled
    0: "under-voltage now",
    1: "frequency capped now",
    2: "throttled now",
    3: "soft temperature limit now",
    16: "under-voltage since boot",
    17: "frequency capped since boot",
    18: "throttled since boot",
    19: "soft temperature limit since boot",
}
_ROUNDS = 5
_GEMM_SIDE = 1536
_TOOL_TIMEOUT_S = 2.0

Ask = Callable[[Sequence[str]], str]


def describe(root: Path = Path("/")) -> dict[str, Any]:
    """What the machine is; nothing is measured. `root` is where /proc and /sys are."""
    return {
        "board": _text(root / "proc/device-tree/model").rstrip("\0"),
        "cpu": device.cpu_name(),
        "architecture": platform.machine(),
        "cores": device.physical_cores(),
        "cpus": len(device.usable_cpus()),
        "features": [f for f in _FEATURES if f in _flags(root)],
        "memory_bytes": device.total_memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
    }


def state(root: Path = Path("/"), ask: Ask | None = None) -> dict[str, Any]:
    """How the machine is doing now; only what it tells.

    load: of the last minute (os.getloadavg). hottest_c: of all thermal zones. throttle_events:
    since boot, Intel. power: what vcgencmd, nvpmodel and tegrastats say where they are.
    """
    ask = ask or _ask
    zones = [_number(zone / "temp") for zone in (root / "sys/class/thermal").glob("thermal_zone*")]
    cpu0 = root / "sys/devices/system/cpu/cpu0"
    events = [_number(file) for file in (cpu0 / "thermal_throttle").glob("*_throttle_count")]
    found: dict[str, Any] = {
        "load": round(os.getloadavg()[0], 2),
        "memory_available_bytes": device.available_memory_bytes(),
        "hottest_c": max((t / 1000 for t in zones if t is not None), default=None),
        "frequency_mhz": _mhz(cpu0 / "cpufreq/scaling_cur_freq"),
        "frequency_max_mhz": _mhz(cpu0 / "cpufreq/cpuinfo_max_freq"),
        "governor": _text(cpu0 / "cpufreq/scaling_governor") or None,
        "throttle_events": sum(n for n in events if n is not None) if events else None,
    }
    found["throttled"] = _pi_throttled(root, ask)
    found["power_mode"] = _power_mode(ask(["nvpmodel", "-q"]))
    found["tegrastats"] = ask(["tegrastats", "--interval", "100"]).partition("\n")[0] or None
    return {key: value for key, value in found.items() if value is not None}


def measure(threads: int) -> dict[str, float]:
    """read_gb_s: main memory, read by `threads` threads. gemm_gflop_s: numpy's float32 product."""
    return {
        "read_gb_s": round(read_gb_s(threads), 2),
        "gemm_gflop_s": round(gemm_gflop_s(), 1),
    }


def read_gb_s(threads: int, n_bytes: int = 1 << 30) -> float:
    """Best of a few passes over more memory than a cache holds."""
    n_bytes = min(n_bytes, device.available_memory_bytes() // 4)
    values = np.ones(n_bytes // 8, np.int64)
    parts = np.array_split(values, threads)
    best_s = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_ROUNDS):
            begin_s = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))  # one pass, next to no arithmetic
            best_s = min(best_s, time.perf_counter() - begin_s)
    return values.nbytes / best_s / 1e9


def gemm_gflop_s(side: int = _GEMM_SIDE) -> float:
    """Best of a few products of square float32 matrices, with the threads that numpy takes."""
    a = np.ones((side, side), np.float32)
    best_s = float("inf")
    for _ in range(_ROUNDS):
        begin_s = time.perf_counter()
        a @ a
        best_s = min(best_s, time.perf_counter() - begin_s)
    return float(2 * side**3 / best_s / 1e9)


def _flags(root: Path) -> set[str]:
    lines = _text(root / "proc/cpuinfo").splitlines()
    named = [line for line in lines if line.startswith(("flags", "Features"))]
    return set(named[0].partition(":")[2].split()) if named else set()


def _pi_throttled(root: Path, ask: Ask) -> str | None:
    """In words, by vcgencmd or by the firmware's file; None where there is neither."""
    said = ask(["vcgencmd", "get_throttled"]).partition("=")[2].strip()
    said = said or _text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    try:
        bits = int(said, 16)
    except ValueError:
        return None
    return ", ".join(word for bit, word in _THROTTLED.items() if bits >> bit & 1) or "no"


def _power_mode(said: str) -> str | None:
    found = re.search(r"NV Power Mode: *(\S+)", said)
    return found[1] if found else None


def _ask(command: Sequence[str]) -> str:
    """What a program says in its first moments; "" where it is not installed."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:  # tegrastats goes on for ever
        return error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
    except OSError:
        return ""
    return done.stdout


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:
        return None


def _mhz(path: Path) -> int | None:
    khz = _number(path)
    return None if khz is None else khz // 1000
