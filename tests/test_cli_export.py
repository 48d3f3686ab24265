"""`edgevlm export`: from the command line to a model that answers, and every way to fail."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import edgevlm_export
import pytest
import tiny
from PIL import Image

from edgevlm.cli import export as cli_export
from edgevlm.cli import run

PYPROJECT = str(Path(__file__).parents[1] / "pyproject.toml")
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli-export") / "checkpoint"
    tiny.llava(path, language={"hidden_size": 256, "intermediate_size": 512})
    return path


def test_the_default_is_what_a_cpu_wants(
    checkpoint: Path, tmp_path: Path, picture: Image.Image, capsys: Captured
) -> None:
    picture.save(tmp_path / "photo.png")
    out = tmp_path / "bundle"
    assert run(["export", str(checkpoint), "-o", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"edgevlm: {out} is ready: edgevlm describe PHOTO -m {out}\n"
    manifest = json.loads((out / "bundle.json").read_text())
    kinds = {"vision": "int8", "language": "q4_k_m", "prefill": "int8"}
    assert manifest["quantization"] == kinds
    assert run(["describe", str(tmp_path / "photo.png"), "-m", str(out), "-n", "3"]) == 0


def test_the_choices_are_the_exporters() -> None:
    assert cli_export.LANGUAGES == edgevlm_export.LANGUAGES
    assert cli_export.VISIONS == edgevlm_export.VISIONS
    assert cli_export.EXPORTERS == edgevlm_export.EXPORTERS
    assert cli_export.PREFILLS == edgevlm_export.PREFILLS


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--llm", "q3"], 2, "'q3' is not one of"),
        (["--llm", "f16", "--imatrix", PYPROJECT], 2, "is for a quantized --llm"),
        (["--family", "strange"], 5, "family 'strange' is unknown; known: "),
        (["--prompt", "strange"], 5, "prompt 'strange' is unknown; known: "),
        (["--tokenizer", PYPROJECT], 5, "pyproject.toml is not valid JSON"),
        (["--photos", PYPROJECT, "--llm", "f16"], 4, "pyproject.toml"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    arguments: list[str], code: int, words: str, checkpoint: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert run(["export", str(checkpoint), "-o", str(tmp_path / "out"), *arguments]) == code
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_its_packages_it_says_what_to_install(
    checkpoint: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_export, "find_spec", lambda name: None)
    assert run(["export", str(checkpoint), "-o", str(tmp_path / "out")]) == 1
    assert "pip install edgevlm[export]" in capsys.readouterr().err


def command(checkpoint: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "edgevlm", "export", str(checkpoint), "-o", str(out)]


def test_a_person_sees_bars_and_a_pipe_sees_none(checkpoint: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    subprocess.run(command(checkpoint, tmp_path / "a"), stderr=theirs, check=True)
    os.close(theirs)
    shown = b""
    while chunk := _read(ours):
        shown += chunk
    text = shown.decode()
    for what in ("language f16", "language q4_k_m", "int8", "vision"):
        assert f"\r{what}" in text
    assert "100%" in text
    piped = subprocess.run(command(checkpoint, tmp_path / "b"), capture_output=True, check=True)
    assert b"\r" not in piped.stderr


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux says that the other end was closed
        return b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_work_leaves_nothing_that_opens(
    number: signal.Signals, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    child = subprocess.Popen(command(checkpoint, out), stderr=subprocess.PIPE)
    for _ in range(400):
        if list(tmp_path.glob(".out.partial-*/language*.gguf")):
            break
        time.sleep(0.02)
    child.send_signal(number)
    child.communicate()
    assert child.returncode == (130 if number == signal.SIGINT else -number)
    assert not out.exists()
    left = list(tmp_path.glob(".out.partial-*"))
    assert left == [] or (number == signal.SIGKILL and not list(left[0].glob("bundle.json")))
