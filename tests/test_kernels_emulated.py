"""The kernels on CPUs that this machine is not, under qemu-user: NEON, and older x86-64.

The library's own sources are compiled with kernels_emulated/replay.cpp, which does cases drawn here
and compares with Pillow's answers, bit for bit.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pillow_oracle as oracle
import pytest
from numpy.typing import NDArray
from pillow_oracle import Case
from test_kernels import tier_flags

from edgevlm import kernels

ROOT = Path(__file__).parents[1]
TIERS = {"aarch64": ("neon", "scalar"), "x86_64": ("avx512", "avx2", "sse41", "scalar")}
TIER_LACKING = 5  # edgevlm_kernels.h


def build(target: str, directory: Path) -> Path:
    """A static program for `target`."""
    compiler = [f"{target}-linux-gnu-g++", "-std=c++17", "-O2", "-ffp-contract=off"]
    objects = []
    for name in TIERS[target]:
        objects.append(str(directory / f"{name}.o"))
        define = f"-DEDGEVLM_TIER_{name.upper()}"
        source = str(ROOT / "kernels" / "tier.cpp")
        command = [*compiler, *tier_flags()[name], define, "-c", source, "-o", objects[-1]]
        subprocess.run(command, check=True)
    everywhere = re.findall(
        r"add_library\(edgevlm_kernels SHARED (.*?)\)", (ROOT / "CMakeLists.txt").read_text(), re.S
    )
    sources = [str(ROOT / name) for name in everywhere[0].split()]
    sources.append(str(ROOT / "tests" / "kernels_emulated" / "replay.cpp"))
    program = directory / f"replay-{target}"
    subprocess.run([*compiler, "-static", *sources, *objects, "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["qemu-aarch64", str(build("aarch64", tmp_path_factory.mktemp("arm")))]


@pytest.fixture(scope="module")
def x86(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build("x86_64", tmp_path_factory.mktemp("x86")))


def write_cases(path: Path, drawn: list[tuple[NDArray[np.uint8], Case]]) -> None:
    """In the form that replay.cpp describes."""
    with path.open("wb") as file:
        file.write(np.int32(len(drawn)).tobytes())
        for pixels, case in drawn:
            expected = oracle.patches(pixels, case)
            height, width = pixels.shape[:2]
            corner = ((case.canvas_px[0] - height) // 2, (case.canvas_px[1] - width) // 2)
            numbers = [height, width, *case.canvas_px, *corner]
            numbers += [*case.size_px, kernels.FILTERS[case.resample], len(case.tiles)]
            numbers += [*case.tile_px, *case.patch_px, case.channels_first, *case.fill]
            numbers += [px for tile in case.tiles for px in tile] + [expected.nbytes]
            file.write(np.array(numbers, "<i4").tobytes() + pixels.tobytes() + expected.tobytes())


def drawn_cases(seed: int) -> list[tuple[NDArray[np.uint8], Case]]:
    random = np.random.default_rng(seed)
    drawn = list(oracle.cases(random, 120))
    for resample in oracle.FILTERS:
        for picture_px, size_px in (((301, 401), (48, 64)), ((401, 61), (33, 64))):
            pixels = oracle.noise(random, picture_px)
            drawn.append((pixels, oracle.plain(pixels, size_px, resample)))
    return drawn


@pytest.mark.parametrize("tier", TIERS["aarch64"])
def test_every_aarch64_tier_equals_pillow(arm: list[str], tier: str, tmp_path: Path) -> None:
    write_cases(tmp_path / "cases", drawn_cases(seed=3))
    done = subprocess.run([*arm, "run", str(tmp_path / "cases"), tier], capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_neon_is_first_on_aarch64(arm: list[str]) -> None:
    assert subprocess.check_output([*arm, "tiers"], text=True).split() == list(TIERS["aarch64"])


@pytest.mark.parametrize(
    ("cpu", "tiers"),
    [
        ("Haswell", ["avx2", "sse41", "scalar"]),
        ("Nehalem", ["sse41", "scalar"]),
        ("qemu64", ["scalar"]),
    ],
)
def test_an_older_x86_gets_the_best_it_can_run_and_equals_pillow(
    x86: str, cpu: str, tiers: list[str], tmp_path: Path
) -> None:
    emulated = ["qemu-x86_64", "-cpu", cpu, x86]
    assert subprocess.check_output([*emulated, "tiers"], text=True).split() == tiers
    write_cases(tmp_path / "cases", drawn_cases(seed=4))
    subprocess.run([*emulated, "run", str(tmp_path / "cases"), tiers[0]], check=True)


@pytest.mark.parametrize(("cpu", "tier"), [("Haswell", "avx512"), ("Nehalem", "avx2")])
def test_forcing_a_tier_that_the_cpu_lacks_is_refused(x86: str, cpu: str, tier: str) -> None:
    done = subprocess.run(["qemu-x86_64", "-cpu", cpu, x86, "select", tier])
    assert done.returncode == TIER_LACKING
