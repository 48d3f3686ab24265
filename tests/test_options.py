"""Options: what is out of range is refused when they are made."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from edgevlm.errors import PromptError
from edgevlm.options import Options

INF, NAN = float("inf"), float("nan")


def test_the_defaults_give_the_same_answer_every_time() -> None:
    assert Options().temperature == 0
    assert Options() == Options(seed=0)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 1},
        {"temperature": 0.0},
        {"temperature": 2.5},
        {"top_k": 0},
        {"top_p": 1.0},
        {"top_p": 1e-6},
        {"seed": 2**32 - 1},
        {"repeat_penalty": 0.5},
        {"stop": ("\n", "</s>")},
        {"schema": {"type": "string"}},
        {"grammar": "root ::= [a-z]+"},
    ],
)
def test_values_in_range_are_taken(options: dict[str, Any]) -> None:
    for name, value in options.items():
        assert getattr(Options(**options), name) == value


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [0, -1]),
        ("temperature", [-0.1, INF, NAN]),
        ("top_k", [-1]),
        ("top_p", [0.0, -0.5, 1.01, NAN]),
        ("seed", [-1, 2**32]),
        ("repeat_penalty", [0.0, -1.0, INF, NAN]),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(PromptError, match=f"^{name} is {value}; it must be"):
            Options(**{name: value})


@pytest.mark.parametrize("stop", ["end", ("a", ""), ("a", 1)])
def test_a_stop_that_is_no_tuple_of_strings_is_refused(stop: Any) -> None:
    with pytest.raises(PromptError, match="stop"):
        Options(stop=stop)


def test_a_schema_beside_a_grammar_is_refused() -> None:
    with pytest.raises(PromptError, match="one of them"):
        Options(schema={"type": "string"}, grammar="root ::= [a-z]")


@pytest.mark.parametrize("grammar", ["", " \n", "\0root ::= [a-z]"])
def test_a_grammar_that_llama_cpp_would_take_for_none_is_refused(grammar: str) -> None:
    with pytest.raises(PromptError, match="grammar"):
        Options(grammar=grammar)


def test_options_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Options().seed = 3  # type: ignore[misc]
