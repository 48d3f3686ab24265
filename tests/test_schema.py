"""Schemas: every answer satisfies `jsonschema`, and what cannot be enforced is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tiny
from edgevlm_export import export
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import edgevlm
from edgevlm import VLM
from edgevlm.bundle import open_bundle
from edgevlm.errors import OutputError, PromptError
from edgevlm.llama import Model, Sampler
from edgevlm.schema import check_answer, to_grammar

QUESTION = "What is in the picture?"
DEFINITIONS = {"string": {"type": "integer"}, "colour": {"enum": ["red", "grün", 'a"b\\c\n']}}
TREE = {
    "type": "object",
    "properties": {"leaf": {"type": "boolean"}, "child": {"$ref": "#/$defs/tree"}},
    "required": ["leaf"],
}

# Each asks for something that llama-cpp-python's own converter passes over or gets wrong.
ENFORCED: dict[str, dict[str, Any]] = {
    "any object": {"type": "object"},
    "any array": {"type": "array", "maxItems": 3},
    "number": {"type": "number"},
    "integer": {"type": "integer"},
    "required and optional": {
        "type": "object",
        "properties": {
            "a": {"type": "boolean"},
            "b": {"type": "string", "maxLength": 4},
            "c": {"type": "null"},
            "d": {"type": "integer"},
        },
        "required": ["b", "d"],
        "additionalProperties": False,
    },
    "all optional": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}},
    },
    "type left out": {"minLength": 2, "maxLength": 3},
    "names that look like rules": {
        "type": "object",
        "properties": {
            "": {"type": "boolean"},
            "integral_part": {"const": "x"},
            "root": {"type": "number"},
            "r0": {"type": "null"},
            "space": {"enum": [1, 2]},
        },
        "required": ["", "integral_part", "root", "r0", "space"],
    },
    "further properties cannot repeat a name": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "additionalProperties": {"type": "string", "maxLength": 3},
    },
    "a map": {"type": "object", "additionalProperties": {"type": "integer"}},
    "nothing at all": {"type": "object", "additionalProperties": False},
    "bounded text": {"type": "string", "minLength": 3, "maxLength": 5},
    "text or nothing": {"type": ["string", "null"], "minLength": 2, "maxLength": 3},
    "bounded array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "an empty array": {"type": "array", "maxItems": 0},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "boolean"}, {"enum": ["x", "y"]}],
        "items": False,
        "minItems": 2,
        "maxItems": 2,
    },
    "enum of one type": {"type": "integer", "enum": ["a", 1, True, 12, 123, None]},
    "enum of structures": {"enum": [{"a": [1, "\\"]}, [], "\u007f", 'q"', -0.5]},
    "const": {"type": "string", "const": 'back\\slash "quoted"\n\u00e9'},
    "either": {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"const": 0}}]},
    "pattern": {"type": "string", "pattern": r"^([A-Z]{2}|x-\.)[\d_ -]{1,3}(?:é|/)?.{2}\w$"},
    "references of like names": {
        "type": "array",
        "prefixItems": [
            {"$ref": "#/$defs/string", "description": "a number in truth"},
            {"$ref": "#/$defs/colour"},
            {"$ref": "#/$defs/a~1b/colour"},
            {"type": "string", "maxLength": 2},
        ],
        "$defs": {**DEFINITIONS, "a/b": {"colour": {"type": "boolean"}}},
    },
    "recursive": {"$ref": "#/$defs/tree", "$defs": {"tree": TREE}},
}

REFUSED: dict[str, Any] = {
    "not an object": True,
    "nothing said": {},
    "only notes": {"title": "x", "description": "y"},
    "minimum": {"type": "integer", "minimum": 3},
    "multipleOf": {"type": "number", "multipleOf": 2},
    "format": {"type": "string", "format": "email"},
    "not": {"type": "string", "not": {"const": "x"}},
    "if": {"type": "string", "if": {"const": "x"}, "then": False},
    "uniqueItems": {"type": "array", "items": {"type": "null"}, "uniqueItems": True},
    "contains": {"type": "array", "contains": {"type": "null"}},
    "allOf": {"allOf": [{"type": "string"}]},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "patternProperties": {"type": "object", "patternProperties": {"^a": {"type": "null"}}},
    "minProperties": {"type": "object", "minProperties": 1},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 3}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "$dynamicRef": {"$dynamicRef": "#x"},
    "an inner $id": {"type": "array", "items": {"type": "null", "$id": "other"}},
    "a misspelt keyword": {"type": "string", "maxlength": 3},
    "a keyword of another type": {"type": "integer", "maxLength": 3},
    "unknown type": {"type": "text"},
    "no type": {"type": []},
    "a type that is no name": {"type": 3},
    "required but not described": {"properties": {"a": {"type": "null"}}, "required": ["a", "b"]},
    "required of nothing": {"type": "object", "required": ["a"]},
    "required as a flag": {"properties": {"a": {"type": "null"}}, "required": True},
    "additionalProperties of no kind": {"type": "object", "additionalProperties": None},
    "boolean property": {"properties": {"a": True}},
    "boolean items": {"type": "array", "items": False},
    "items as a list": {"type": "array", "items": [{"type": "null"}]},
    "too few prefixItems": {"type": "array", "prefixItems": [{"type": "null"}], "minItems": 2},
    "too many prefixItems": {"type": "array", "prefixItems": [{"type": "null"}], "maxItems": 0},
    "limits crossed": {"type": "string", "minLength": 3, "maxLength": 2},
    "negative limit": {"type": "string", "minLength": -1},
    "limit that is no number": {"type": "array", "maxItems": "2"},
    "limit beyond llama.cpp's": {"type": "string", "maxLength": 2001},
    "empty enum": {"enum": []},
    "enum that is no list": {"enum": "ab"},
    "enum outside its type": {"type": "string", "enum": [1, 2]},
    "const outside its type": {"type": "integer", "const": True},
    "const beside enum": {"const": 1, "enum": [2]},
    "enum beside a limit": {"type": "string", "enum": ["abc"], "maxLength": 2},
    "empty anyOf": {"anyOf": []},
    "anyOf beside a type": {"type": "string", "anyOf": [{"type": "string"}]},
    "$ref beside a limit": {
        "$ref": "#/$defs/a",
        "maxLength": 1,
        "$defs": {"a": {"type": "string"}},
    },
    "$ref to nowhere": {"$ref": "#/$defs/b", "$defs": {"a": {"type": "string"}}},
    "$ref to elsewhere": {"$ref": "https://example.org/schema"},
    "$ref to the root": {"properties": {"a": {"$ref": "#"}}},
    "a bad target": {"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer", "maximum": 2}}},
    "a pattern beyond a grammar": {"type": "string", "pattern": "^[^a]$"},
    "pattern beside a length": {"type": "string", "pattern": "^a*$", "maxLength": 2},
    "not JSON": {"const": {1, 2}},
    "not a number": {"const": float("nan")},
    "half a character": {"const": "\ud800"},
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("schema")
    tiny.llava(directory / "checkpoint", seed=5)
    return export(directory / "checkpoint", directory / "bundle", language="f32")


@pytest.fixture(scope="module")
def vlm(bundle: Path) -> Iterator[VLM]:
    with edgevlm.load(bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[Model]:
    opened = Model(open_bundle(bundle).file("language.gguf"), extra_buffers=False)
    yield opened
    opened.close()


@pytest.mark.parametrize("name", ENFORCED)
def test_every_answer_satisfies_its_schema(vlm: VLM, picture: Image.Image, name: str) -> None:
    schema = ENFORCED[name]
    encoded = vlm.encode(picture)
    finished = 0
    for seed in range(30):
        try:
            answer = vlm.ask(
                *(encoded, QUESTION),
                schema=schema,
                max_tokens=60,
                temperature=1.0,
                seed=seed,
                repetition_stop=False,
            )
        except OutputError:  # the model is random: it rarely ends a string by itself
            continue
        finished += 1
        jsonschema.validate(json.loads(answer.text), schema, jsonschema.Draft202012Validator)
    assert finished > 0


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused(name: str) -> None:
    with pytest.raises(PromptError):
        to_grammar(REFUSED[name])


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_inside_another_schema(name: str) -> None:
    if "$defs" in (inner := REFUSED[name] if isinstance(REFUSED[name], Mapping) else {}):
        inner = {**inner, "$ref": "#/$defs/elsewhere"}
    with pytest.raises(PromptError):
        to_grammar({"type": "array", "items": {"anyOf": [{"type": "null"}, inner]}})


def test_a_schema_nested_without_end_is_refused() -> None:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(PromptError, match="deep"):
        to_grammar(schema)


def test_the_refusal_says_where_and_why() -> None:
    with pytest.raises(PromptError, match=r"schema\.properties\.age has minimum.*leave it out"):
        to_grammar({"properties": {"age": {"type": "integer", "minimum": 0}}})


def test_a_reference_that_only_names_itself_is_refused_by_llama_cpp(model: Model) -> None:
    schema = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    with pytest.raises(PromptError):
        _sampler(model, to_grammar(schema))


@pytest.mark.parametrize("limit", ["maxLength", "minLength", "maxItems", "minItems"])
def test_the_largest_limit_is_one_that_llama_cpp_takes(model: Model, limit: str) -> None:
    with _sampler(model, to_grammar({limit: 2000})):
        pass


def test_properties_come_in_the_order_of_the_schema(vlm: VLM, picture: Image.Image) -> None:
    one = {"const": 1}
    schema = {"properties": {"z": one, "a": one, "m": one}, "required": ["m", "a", "z"]}
    answer = vlm.ask(picture, QUESTION, schema=schema, max_tokens=60)
    assert list(json.loads(answer.text)) == ["z", "a", "m"]


def test_every_choice_of_optional_properties_can_be_made(vlm: VLM, picture: Image.Image) -> None:
    encoded, one = vlm.encode(picture), {"const": 1}
    schema = {"properties": {"a": one, "b": one, "c": one, "d": one}, "required": ["c"]}
    made = set()
    for seed in range(60):
        answer = vlm.ask(
            *(encoded, QUESTION), schema=schema, max_tokens=60, temperature=5.0, seed=seed
        )
        made.add("".join(json.loads(answer.text)))
    assert made == {"abcd", "abc", "acd", "ac", "bcd", "bc", "cd", "c"}


def test_an_unfinished_answer_fails(vlm: VLM, picture: Image.Image) -> None:
    schema = {"type": "string", "minLength": 50}
    with pytest.raises(OutputError, match="max_tokens"):
        vlm.ask(picture, QUESTION, schema=schema, max_tokens=5)


@pytest.mark.parametrize("reason", ["length", "repetition"])
def test_half_a_number_fails_although_it_is_json(reason: str) -> None:
    with pytest.raises(OutputError, match="not complete"):
        check_answer("12", reason, {"type": "integer"})
    check_answer("12", "stop", {"type": "integer"})
    check_answer("[12]", reason, {"type": "array"})


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        ('"ab"', {"type": "string", "minLength": 3}),  # a control token was counted as characters
        ('"\ufffd\ufffd"', {"const": "a"}),  # bytes that only llama.cpp takes for a letter
        ("1", {"enum": [12]}),
        ("true", {"enum": [1]}),
        ("true", {"type": "integer"}),
        ("1", {"type": ["boolean", "null"]}),
        ("{}", {"properties": {"a": {"type": "null"}}, "required": ["a"]}),
        ('{"a": 1}', {"properties": {"a": {"type": "null"}}}),
        ('{"b": 1}', {"type": "object", "additionalProperties": False}),
        ('{"b": 1}', {"type": "object", "additionalProperties": {"type": "null"}}),
        ("[1]", {"items": {"type": "integer"}, "minItems": 2}),
        ('[1, "a"]', {"items": {"type": "integer"}}),
        ("[1, 2]", {"prefixItems": [{"type": "integer"}, {"type": "null"}]}),
        ('"b"', {"pattern": "^a$"}),
        ("1", {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}], "$defs": {"a": {"const": 2}}}),
    ],
)
def test_an_answer_that_breaks_the_schema_fails(text: str, schema: dict[str, Any]) -> None:
    assert not _validator(json.dumps(schema)).is_valid(json.loads(text))
    with pytest.raises(OutputError):
        check_answer(text, "stop", schema)


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text("ab é", max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(value=_values, name=st.sampled_from(sorted(set(ENFORCED) - {"type left out"})))
def test_the_check_of_an_answer_agrees_with_jsonschema(value: Any, name: str) -> None:
    schema = ENFORCED[name]
    text = json.dumps(value)
    if _validator(json.dumps(schema)).is_valid(value):
        check_answer(text, "stop", schema)
    elif not (isinstance(value, list) and "prefixItems" in schema):  # longer ones are never made
        with pytest.raises(OutputError):
            check_answer(text, "stop", schema)


@cache
def _validator(schema_json: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(schema_json))


def _sampler(model: Model, grammar: str) -> Sampler:
    return Sampler(
        model, temperature=0, top_k=0, top_p=1, seed=0, repeat_penalty=1, grammar=grammar
    )
