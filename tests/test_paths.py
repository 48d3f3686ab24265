"""Places and atomic writes: a file is whole, old or not there."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgevlm import paths


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond a kilobyte: what a full disk does, through the real write().

    Only around the call itself: pytest's own log may be a file, too.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_cache_is_where_xdg_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert paths.home() == Path("/elsewhere/edgevlm")
    assert paths.cache("a", "b") == Path("/elsewhere/edgevlm/a/b")


@pytest.mark.parametrize("unset", [None, ""])
def test_the_cache_is_in_the_home_directory_otherwise(
    monkeypatch: pytest.MonkeyPatch, unset: str | None
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME")
    if unset is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
    assert paths.home() == Path("/home/someone/.cache/edgevlm")


def test_models_are_in_the_cache_unless_the_environment_says_where(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("EDGEVLM_MODELS", raising=False)
    assert paths.models() == paths.home() / "models"
    monkeypatch.setenv("EDGEVLM_MODELS", "/disk/models")
    assert paths.models() == Path("/disk/models")


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file"
    paths.write_atomic(target, b"old")
    paths.write_atomic(target, b"new")
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    paths.write_atomic(target, b"old")
    with full_disk(), pytest.raises(OSError, match="large"):
        paths.write_atomic(target, bytes(5000))
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    program = f"""
import os, signal
from pathlib import Path
from edgevlm import paths
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # all is written, not yet renamed
paths.write_atomic(Path({str(target)!r}), b"new")
"""
    child = subprocess.run([sys.executable, "-c", program], check=False)
    assert child.returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old"


def test_the_cache_makes_its_directories_and_remembers(tmp_path: Path) -> None:
    paths.write_cache(tmp_path / "a" / "b", "größer")
    assert paths.read_cache(tmp_path / "a" / "b") == "größer"


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    paths.write_cache(tmp_path / "file" / "b", "text")  # no directory
    with full_disk():
        paths.write_cache(tmp_path / "c", "text" * 1000)
    assert paths.read_cache(tmp_path / "c") is None


def test_a_cache_that_cannot_be_read_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "damaged").write_bytes(b"\xff\xfe")
    for path in (tmp_path, tmp_path / "damaged", tmp_path / "damaged" / "b", tmp_path / "none"):
        assert paths.read_cache(path) is None
