"""Patterns: what their grammar makes matches `re`, and what a grammar would change is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import tiny
from edgevlm_export import export
from PIL import Image

import edgevlm
from edgevlm import VLM
from edgevlm.errors import PromptError
from edgevlm.pattern import pattern_to_grammar

GOOD = [
    "^yes$",
    "^(yes|no|)$",
    r"^[A-Z]{2}-[0-9]{3,4}$",
    r"^\d+\.\d{2} (?:€|\$)$",
    r"^[-a-c\d_ ]{1,4}$",
    r"^[x\w-]*\+\(\)$",
    r"^a|bc?|d$",
    r"^(ab|c){2}.{0,2}é$",
    "^'[,;:!?]/<=>#@%&~`$",
]
REFUSED = ["a", "^a", "a$", "^a\\$", "^[^a]$", "^[ -~]$", '^"$', "^\\\\$", "^(?=a)a$", "^a+?$"]
REFUSED += ["^(a)\\1$", "^\\s$", "^[A-z]$", "^(a$", "^a{3,1}$", "^a$|^b$", "^\\p{L}$", "^a\n$"]
REFUSED += ["^*$", "^[z-a]$", "^a{,2}$", "^{$", "^(?i)a$", "^a\\b$", "^a++$", "^(?P<n>a)$", "^[]$"]
REFUSED += ["^[a\\]]$", '^["]$', "^a{99999999999}$", "^a\x7f$", "^a\\", "^", "$", ""]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLM]:
    directory = tmp_path_factory.mktemp("pattern")
    tiny.llava(directory / "checkpoint", seed=6)
    with edgevlm.load(
        export(directory / "checkpoint", directory / "bundle", language="f32"), threads=1
    ) as opened:
        yield opened


@pytest.mark.parametrize("pattern", GOOD)
def test_whatever_the_grammar_makes_matches_the_pattern(
    vlm: VLM, picture: Image.Image, pattern: str
) -> None:
    encoded = vlm.encode(picture)
    finished = 0
    for seed in range(20):
        answer = vlm.ask(
            *(encoded, "What?"),
            grammar=f'root ::= "<" ({pattern_to_grammar(pattern)}) ">"',
            max_tokens=40,
            temperature=1.0,
            seed=seed,
            repetition_stop=False,
        )
        if answer.finish_reason == "stop" and "\ufffd" not in answer.text:
            finished += 1
            assert re.search(pattern, answer.text[1:-1])
    assert finished > 0


@pytest.mark.parametrize("pattern", [*REFUSED, None, 3, ["^a$"]])
def test_a_pattern_that_a_grammar_would_change_is_refused(pattern: object) -> None:
    with pytest.raises(PromptError, match="pattern"):
        pattern_to_grammar(pattern)
