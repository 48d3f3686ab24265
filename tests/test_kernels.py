"""The kernels against Pillow, bit for bit (tolerance 0: it is all integers), on every CPU tier."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pillow_oracle as oracle
import pytest
from numpy.typing import NDArray
from pillow_oracle import Case

from edgevlm import kernels
from edgevlm.errors import BackendError, Cancelled, DeviceError

ROOT = Path(__file__).parents[1]
HEADER = (ROOT / "kernels" / "edgevlm_kernels.h").read_text()

SIZES = [  # picture → resized, (height, width) in px
    ((1, 1), (1, 1)),
    ((1, 1), (7, 5)),
    ((7, 5), (1, 1)),
    ((1, 97), (31, 1)),
    ((97, 1), (1, 31)),
    ((2, 3), (200, 301)),
    ((331, 257), (37, 53)),  # both down, width first
    ((331, 57), (37, 53)),  # height lost more than twice the width: height first
    ((257, 31), (63, 97)),  # height down, width up
    ((31, 257), (97, 63)),  # height up, width down
    ((3, 2000), (5, 11)),
    ((2000, 3), (11, 5)),
    ((120, 90), (120, 45)),  # one side keeps its size
    ((120, 90), (60, 90)),
    ((64, 64), (64, 64)),
    ((1024, 768), (336, 252)),
]


@pytest.fixture(params=kernels.tiers())
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.tier()
    kernels.select_tier(request.param)
    yield request.param
    kernels.select_tier(before)


def run(
    pixels: NDArray[np.uint8], case: Case, threads: int = 1, flag: kernels.Flag | None = None
) -> NDArray[np.uint8]:
    n_patches = (case.tile_px[0] // case.patch_px[0]) * (case.tile_px[1] // case.patch_px[1])
    out = np.full((len(case.tiles), n_patches, 3 * case.patch_px[0] * case.patch_px[1]), 77, "u1")
    kernels.resize(pixels, out, **asdict(case), threads=threads, flag=flag)
    return out


@pytest.mark.parametrize("resample", oracle.FILTERS)
@pytest.mark.parametrize(("picture_px", "size_px"), SIZES)
def test_resize_equals_pillow(
    tier: str, picture_px: tuple[int, int], size_px: tuple[int, int], resample: str
) -> None:
    pixels = oracle.noise(np.random.default_rng(0), picture_px)
    got = run(pixels, oracle.plain(pixels, size_px, resample)).reshape(*size_px, 3)
    np.testing.assert_array_equal(got, oracle.resized(pixels, size_px, resample))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_random_tiles_and_patches_equal_pillow_and_numpy(tier: str, threads: int) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    for pixels, case in oracle.cases(np.random.default_rng(seed), 150):
        np.testing.assert_array_equal(
            run(pixels, case, threads), oracle.patches(pixels, case), err_msg=f"{seed=} {case}"
        )


@pytest.mark.parametrize("size_px", [(1, 1), (5, 3), (40, 40)])
def test_rows_may_lie_apart_and_nothing_past_the_picture_is_read_into_it(
    tier: str, size_px: tuple[int, int]
) -> None:
    wide = oracle.noise(np.random.default_rng(1), (21, 90))
    view = wide[:, 7:24]
    got = run(view, oracle.plain(view, size_px, "lanczos")).reshape(*size_px, 3)
    np.testing.assert_array_equal(got, oracle.resized(view.copy(), size_px, "lanczos"))


def test_a_set_flag_cancels_before_the_first_row(tier: str) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    flag = kernels.Flag()
    flag.set()
    with pytest.raises(Cancelled):
        run(pixels, oracle.plain(pixels, (4, 4), "box"), flag=flag)
    flag.clear()
    run(pixels, oracle.plain(pixels, (4, 4), "box"), flag=flag)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_flag_set_by_another_thread_stops_a_running_resize(threads: int) -> None:
    pixels = np.zeros((3000, 3000, 3), np.uint8)
    case = oracle.plain(pixels, (8000, 8000), "lanczos")  # far longer than the timer
    flag = kernels.Flag()
    timer = threading.Timer(0.02, flag.set)
    timer.start()
    with pytest.raises(Cancelled):
        run(pixels, case, threads, flag)


def test_the_flag_is_what_llama_cpp_polls() -> None:
    callback = ctypes.cast(
        kernels.abort_callback(), ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
    )
    flag = kernels.Flag()
    assert callback(flag.address) is False
    flag.set()
    assert callback(flag.address) is True
    assert flag.is_set()


GOOD = Case((8, 8), (4, 4), "box", ((0, 0),), (4, 4), (2, 2), True, (0, 0, 0))


@pytest.mark.parametrize(
    "bad",
    [
        replace(GOOD, canvas_px=(7, 8)),  # smaller than the picture
        replace(GOOD, size_px=(0, 4)),
        replace(GOOD, size_px=(4, 1 << 25)),
        replace(GOOD, tile_px=(4, 3)),  # no whole patches
        replace(GOOD, patch_px=(4, 0)),
        replace(GOOD, tiles=()),
        replace(GOOD, tiles=((0, -(1 << 25)),)),
    ],
    ids=str,
)
def test_sizes_that_disagree_are_refused(bad: Case) -> None:
    with pytest.raises(ValueError, match="the kernels refuse"):
        kernels.resize(
            np.zeros((8, 8, 3), np.uint8), np.zeros((1, 4, 12), np.uint8), **asdict(bad), threads=1
        )


@pytest.mark.parametrize("shape", [(1, 4, 11), (1, 4, 13), (2, 4, 12)])
def test_an_output_of_another_size_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="the kernels refuse"):
        kernels.resize(
            np.zeros((8, 8, 3), np.uint8), np.zeros(shape, np.uint8), **asdict(GOOD), threads=1
        )


def test_no_threads_are_refused() -> None:
    with pytest.raises(ValueError, match="threads 0"):
        run(np.zeros((8, 8, 3), np.uint8), GOOD, threads=0)


def test_more_memory_than_there_is_becomes_memory_error() -> None:
    code = """
import resource
import numpy as np
from edgevlm import kernels
out = np.zeros((1, 1, 12), np.uint8)
in_use_bytes = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit_bytes = in_use_bytes + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
try:  # a window of 32 rows of 48 MB each
    kernels.resize(np.zeros((1, 1, 3), np.uint8), out, canvas_px=(64, 1 << 24),
                   size_px=(4, (1 << 24) - 1), resample="bilinear", tiles=((0, 0),), tile_px=(2, 2),
                   patch_px=(2, 2), channels_first=False, fill=(0, 0, 0), threads=1)
except MemoryError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("no memory to resize 1×1 px")


def test_best_tier_is_in_force_and_scalar_is_always_there() -> None:
    assert kernels.tiers()[-1] == "scalar"
    assert tier_in_child({}) == kernels.tiers()[0]


def tier_in_child(environment: dict[str, str]) -> str:
    """Name of the tier in force in a fresh process, or the error it raised."""
    code = """
from edgevlm import kernels
try:
    print(kernels.tier())
except Exception as error:
    print(type(error).__name__, error)
"""
    clean = {k: v for k, v in os.environ.items() if k != "EDGEVLM_CPU"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.mark.parametrize("name", kernels.tiers())
def test_edgevlm_cpu_forces_a_tier(name: str) -> None:
    assert tier_in_child({"EDGEVLM_CPU": name}) == name


@pytest.mark.parametrize("name", ["avx3", "AVX2", "sse41 "])
def test_edgevlm_cpu_with_an_unknown_tier_is_an_error_that_lists_the_tiers(name: str) -> None:
    error = tier_in_child({"EDGEVLM_CPU": name})
    assert error.startswith(f"DeviceError CPU tier {name!r} was asked for")
    assert ", ".join(kernels.tiers()) in error


def test_a_refused_tier_leaves_the_one_in_force() -> None:
    before = kernels.tier()
    with pytest.raises(DeviceError, match="this build does not know"):
        kernels.select_tier("mmx")
    assert kernels.tier() == before


def test_a_missing_library_says_where_it_was_sought(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("edgevlm.__path__", [str(tmp_path)])
    with pytest.raises(BackendError, match=re.escape(str(tmp_path))):
        kernels._library.__wrapped__()


def test_a_library_of_another_abi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ABI_VERSION", kernels.ABI_VERSION + 1)
    with pytest.raises(BackendError, match="ABI version"):
        kernels._library.__wrapped__()


def test_the_binding_knows_every_function_and_number_of_the_header() -> None:
    functions = set(re.findall(r"\b(edgevlm_\w+)\(", HEADER))
    source = Path(kernels.__file__).read_text()
    assert functions == set(re.findall(r"library\.(edgevlm_\w+)\.argtypes", source))
    assert functions == set(re.findall(r"library\.(edgevlm_\w+)\.restype", source))
    constants = dict(re.findall(r"EDGEVLM_(\w+)[ =]+(\d+)", HEADER))
    assert int(constants["ABI_VERSION"]) == kernels.ABI_VERSION
    assert {name: int(constants[name.upper()]) for name in oracle.FILTERS} == kernels.FILTERS
    for code in ("OK", "CANCELLED", "INVALID_ARGUMENT", "OUT_OF_MEMORY", "TIER_LACKING"):
        assert getattr(kernels, f"_{code}") == int(constants[code])


def test_the_library_shows_nothing_but_the_header() -> None:
    library = kernels._library()._name
    table = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    )
    shown = {line.split()[-1] for line in table.stdout.splitlines()}
    ours = set(re.findall(r"\b(edgevlm_\w+)\(", HEADER))
    operators = {"RegisterCustomOps"} if platform.machine() == "x86_64" else set()
    assert shown == ours | operators  # the latter is what ONNX Runtime looks for


def tier_flags() -> dict[str, list[str]]:
    """Compiler flags of each tier, as CMakeLists.txt gives them."""
    calls = re.findall(r"^ *add_tier\((\w+) ?(.*?)\)", (ROOT / "CMakeLists.txt").read_text(), re.M)
    return {name: flags.split() for name, flags in calls}


def shown_symbols(source: str, flags: list[str], arm: bool, scratch: Path) -> list[str]:
    """What the linker sees of a file's definitions, as nm prints them."""
    target = "aarch64" if arm or platform.machine() == "aarch64" else "x86_64"
    compiled = scratch / "compiled.o"
    command = [f"{target}-linux-gnu-g++", "-std=c++17", "-O3", "-fPIC", *flags]
    path = str(ROOT / "kernels" / source)
    subprocess.run([*command, "-c", path, "-o", str(compiled)], check=True)
    table = subprocess.run(
        ["nm", "-C", "--defined-only", str(compiled)], capture_output=True, text=True, check=True
    )
    return [line for line in table.stdout.splitlines() if not line[17:18].islower()]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instructions of x86-64")
@pytest.mark.parametrize("name", ["linear", "attention"])
def test_a_fused_operator_shares_no_symbol_with_code_compiled_for_other_cpus(
    name: str, tmp_path: Path
) -> None:
    build = (ROOT / "CMakeLists.txt").read_text()
    (common,) = re.findall(r"set\(avx512 ([^)]*)\)", build)
    (own,) = re.findall(rf'{name}_avx512\.cpp PROPERTIES COMPILE_OPTIONS\s+"(.*?)"', build)
    flags = [*common.split(), *own.replace("${avx512}", "-Wall").split(";")]
    (line,) = shown_symbols(f"{name}_avx512.cpp", flags, False, tmp_path)
    assert f" T edgevlm::{name}_avx512(" in line


@pytest.mark.parametrize(("name", "flags"), tier_flags().items(), ids=tier_flags().keys())
def test_a_tier_shares_no_symbol_with_code_compiled_for_other_cpus(
    name: str, flags: list[str], tmp_path: Path
) -> None:
    """A weak symbol compiled with AVX2 could replace its twin in the rest of the library."""
    define = f"-DEDGEVLM_TIER_{name.upper()}"
    shared = shown_symbols("tier.cpp", [define, *flags], "neon" in name, tmp_path)
    assert [re.sub(r"^\S+ [DR] edgevlm::k\w+Tier$", "table", line) for line in shared] == ["table"]
