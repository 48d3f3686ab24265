"""Control groups of both versions, from the files that Linux documents."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest

from edgevlm import cgroup, device

Files = dict[str, str]
MIB = 1 << 20


def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Files) -> None:
    for path, text in files.items():
        target = tmp_path / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    for module in (cgroup, device):
        monkeypatch.setattr(module, "Path", lambda path: tmp_path / path.lstrip("/"))


def v2(group: str, limit: str, used: int, files: int = 0) -> Files:
    root = f"/sys/fs/cgroup{group}"
    return {
        f"{root}/memory.max": f"{limit}\n",
        f"{root}/memory.current": f"{used}\n",
        f"{root}/memory.stat": f"anon 5\ninactive_file {files}\nactive_file 0\nslab 7\n",
    }


def v1(group: str, limit: int, used: int, files: int = 0) -> Files:
    root = f"/sys/fs/cgroup/memory{group}"
    return {
        f"{root}/memory.limit_in_bytes": f"{limit}\n",
        f"{root}/memory.usage_in_bytes": f"{used}\n",
        f"{root}/memory.stat": f"inactive_file 9\ntotal_inactive_file {files}\n",
    }


IN_A_CONTAINER = {"/proc/self/cgroup": "0::/\n"}
IN_A_SLICE = {"/proc/self/cgroup": "0::/user.slice/app.scope\n"}
OLD = {"/proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n"}
V1_NO_LIMIT = 9223372036854771712  # what version 1 says instead of "max"


@pytest.mark.parametrize(
    ("files", "limit", "free"),
    [
        ({}, inf, inf),
        ({**IN_A_CONTAINER, **v2("", "max", 10 * MIB)}, inf, inf),
        (
            {**IN_A_CONTAINER, **v2("", str(512 * MIB), 200 * MIB, 50 * MIB)},
            512 * MIB,
            362 * MIB,
        ),
        ({**IN_A_SLICE, **v2("/user.slice", str(9 * MIB), 0)}, 9 * MIB, 9 * MIB),
        (
            {
                **IN_A_SLICE,
                **v2("/user.slice", str(9 * MIB), 8 * MIB),
                **v2("/user.slice/app.scope", str(5 * MIB), MIB),
            },
            5 * MIB,
            MIB,  # the slice around it is nearly full
        ),
        ({**IN_A_CONTAINER, **v2("", "0", 10)}, 0, -10),
        ({**OLD, **v1("/docker/abc", 700 * MIB, 100 * MIB, 40 * MIB)}, 700 * MIB, 640 * MIB),
        # a container sees the path outside in /proc and its own group at the root
        ({**OLD, **v1("", 700 * MIB, 100 * MIB)}, 700 * MIB, 600 * MIB),
        ({**OLD, **v1("", V1_NO_LIMIT, 0)}, V1_NO_LIMIT, V1_NO_LIMIT),
        ({**IN_A_CONTAINER, **v2("", "many", 10)}, inf, inf),
        ({"/proc/self/cgroup": "\n::\nnonsense\n", **v2("", str(MIB), 0)}, MIB, MIB),
        (
            {"/proc/self/cgroup": "0::/../outside\n", **v2("", str(MIB), 0)},
            MIB,
            MIB,
        ),
    ],
)
def test_memory_is_what_the_tightest_group_grants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Files, limit: float, free: float
) -> None:
    pretend(tmp_path, monkeypatch, files)
    assert cgroup.memory_limit_bytes() == limit
    assert cgroup.memory_free_bytes() == free


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, inf),
        ({"/sys/fs/cgroup/cpu.max": "max 100000\n"}, inf),
        ({"/sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"/sys/fs/cgroup/cpu.max": "100000 0\n"}, inf),
        ({**IN_A_SLICE, "/sys/fs/cgroup/user.slice/cpu.max": "50000 100000\n"}, 0.5),
        (
            {
                **OLD,
                "/sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "200000\n",
                "/sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
        (
            {
                **OLD,
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            inf,
        ),
    ],
)
def test_cpus_are_what_the_tightest_group_grants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Files, cpus: float
) -> None:
    pretend(tmp_path, monkeypatch, files)
    assert cgroup.cpus() == cpus


def test_a_container_lends_what_it_has_left_and_not_what_the_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = {"/proc/meminfo": f"MemAvailable: {1 << 30} kB\n"}
    files = {**meminfo, **IN_A_CONTAINER, **v2("", str(512 * MIB), 200 * MIB)}
    pretend(tmp_path, monkeypatch, files)
    assert device.available_memory_bytes() == 312 * MIB
    assert device.total_memory_bytes() == 512 * MIB
    pretend(tmp_path, monkeypatch, v2("", str(512 * MIB), 600 * MIB))
    assert device.available_memory_bytes() == 0


def test_this_process_may_do_something() -> None:
    assert cgroup.cpus() > 0
    assert cgroup.memory_limit_bytes() > 100 * MIB
