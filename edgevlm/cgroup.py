"""What the control groups of this process grant it (containers, systemd): CPUs and memory.

Linux's Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst. A process is bound by its own group
and by every group around it; without a limit, and on other systems, the answer is infinite.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from pathlib import Path

_ROOT = "/sys/fs/cgroup"
# The limit, what is used of it, and which file pages among that the kernel can drop.
_MEMORY = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)


def cpus() -> float:
    """How many CPUs the process may keep busy; not always a whole number."""
    return min((_quota(group) for group in _groups("cpu")), default=inf)


def memory_limit_bytes() -> float:
    """The most memory that the process may ever hold."""
    return min((limit for limit, _ in _memory()), default=inf)


def memory_free_bytes() -> float:
    """What it may still take, file pages that the kernel can drop included."""
    return min((limit - used for limit, used in _memory()), default=inf)


def _quota(group: Path) -> float:
    limit = _number(group / "cpu.cfs_quota_us")  # version 1; -1 is no limit
    period = _number(group / "cpu.cfs_period_us")
    words = _read(group / "cpu.max").split()  # version 2: "max 100000" is no limit
    if len(words) == 2:
        limit, period = _as_number(words[0]), _as_number(words[1])
    return limit / period if limit > 0 and 0 < period < inf else inf


def _memory() -> Iterator[tuple[float, float]]:
    """Limit and use of each group that has them."""
    for group in _groups("memory"):
        for limit_name, used_name, droppable in _MEMORY:
            used = _number(group / used_name)
            if used == inf:
                continue
            for line in _read(group / "memory.stat").splitlines():
                key, _, value = line.partition(" ")
                if key in droppable:
                    used -= _as_number(value)
            yield _number(group / limit_name), max(0.0, used)


def _groups(controller: str) -> Iterator[Path]:
    """Directories of the group that the process is in and of all around it, innermost first.

    A container may see the path that its group has outside; what is not there is skipped.
    """
    for line in (_read(Path("/proc/self/cgroup")) or "0::/").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if names and controller not in names.split(","):
            continue
        root = f"{_ROOT}/{controller}" if names else _ROOT
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield Path("/".join([root, *parts[:depth]]))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _number(path: Path) -> float:
    return _as_number(_read(path))


def _as_number(text: str) -> float:
    """A file's number; "max", nothing and nonsense are no limit."""
    try:
        return float(int(text))
    except ValueError:
        return inf
