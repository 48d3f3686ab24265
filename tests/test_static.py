"""ruff, mypy, clang-format: all green."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    ["ruff check .", "ruff format --check .", "mypy --no-error-summary"],
)
def test_python(command: str) -> None:
    _green([sys.executable, "-m", *command.split()])


def test_kernels_are_formatted() -> None:
    sources = [*ROOT.glob("kernels/**/*.cpp"), *ROOT.glob("kernels/**/*.h")]
    assert sources
    clang_format = Path(sys.executable).with_name("clang-format")
    _green([str(clang_format), "--dry-run", "--Werror", *map(str, sources)])


def _green(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
