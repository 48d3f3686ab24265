"""What `pip install .`, `pip install -e .` and a wheel built here put on a machine."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Runs in a directory without the source tree, on whatever was installed in `site`.
PROGRAM = """
import site, sys
sys.path[:] = [p for p in sys.path if "site-packages" not in p or p in {keep!r}]
sys.path.insert(0, {site!r})
site.addsitedir({site!r})  # runs what an editable install leaves there
import edgevlm, edgevlm.kernels, edgevlm_export
print(edgevlm.__version__, edgevlm.kernels.tier(), edgevlm.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-deps", "-w", str(directory), str(ROOT))
    (built,) = directory.glob("*.whl")
    return built


def test_one_wheel_serves_every_python_3(wheel: Path) -> None:
    _, _, python, abi, platform = wheel.stem.split("-")
    assert (python, abi) == ("py3", "none")
    assert platform.startswith("linux_")


def test_the_wheel_holds_both_packages_and_their_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "edgevlm/libedgevlm_kernels.so",
        "edgevlm/py.typed",
        "edgevlm/data/probe.gguf",
        "edgevlm/data/nano/bundle.json",
        "edgevlm/data/nano/adapter.gguf",
        "edgevlm/data/nano/vision.onnx",
        "edgevlm_export/graph.py",
    } <= names
    assert not [name for name in names if name.startswith(("tests/", "kernels/", "benchmarks/"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("licenses/NOTICE") for name in names)


@pytest.fixture(scope="module")
def arm_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("arm")
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'cmake' / 'aarch64.cmake'}"
    cross = {"_PYTHON_HOST_PLATFORM": "linux-aarch64", "CMAKE_ARGS": toolchain}
    _pip("wheel", "--no-deps", "-w", str(directory), str(ROOT), **cross)
    (built,) = directory.glob("*.whl")
    return built


def test_the_wheel_for_arm_is_cross_built(arm_wheel: Path) -> None:
    assert arm_wheel.name.endswith("-py3-none-linux_aarch64.whl")
    library = zipfile.ZipFile(arm_wheel).read("edgevlm/libedgevlm_kernels.so")
    machine = int.from_bytes(library[18:20], "little")
    assert (library[:4], machine) == (b"\x7fELF", 183)  # EM_AARCH64, elf.h


def test_an_installed_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    _pip("install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel))
    assert str(tmp_path) in _run(tmp_path / "site", tmp_path)


def test_an_editable_install_runs_from_the_source_tree(tmp_path: Path) -> None:
    _pip("install", "--no-deps", "--target", str(tmp_path / "site"), "-e", str(ROOT))
    assert str(ROOT / "edgevlm") in _run(tmp_path / "site", tmp_path)


def _pip(*arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    variables = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr


def _run(site: Path, directory: Path) -> str:
    import numpy

    keep = [str(Path(numpy.__file__).parents[1])]
    program = PROGRAM.format(site=str(site), keep=keep)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=directory, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
