"""JSON schema → GBNF grammar, and a check of the answer; both fail closed.

llama.cpp's own converter passes over keywords it cannot express and mixes up rules whose names
collide, and the answer then breaks the schema unnoticed. Here every keyword is enforced, an
annotation, or an error before any work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from edgevlm.errors import OutputError, PromptError
from edgevlm.pattern import pattern_to_grammar, quoted

_ANNOTATIONS = {"$comment", "$defs", "default", "definitions", "deprecated", "description"}
_ANNOTATIONS |= {"examples", "readOnly", "title", "writeOnly"}
_KEYWORDS: dict[str, set[str]] = {  # type → what can be said about it
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern"},
    "number": set(),
    "integer": set(),
    "boolean": set(),
    "null": set(),
}
_MOST_REPEATS = 2000  # llama.cpp's MAX_REPETITION_THRESHOLD, src/llama-grammar.cpp

# RFC 8259. An escaped surrogate is left out: two of them are one character to whoever counts.
_RULES = {
    "ws": '" "?',
    "char": r'[^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" code)',
    "code": "[0-9a-cefA-CEF] [0-9a-fA-F]{3} | [dD] [0-7] [0-9a-fA-F]{2}",
    "string": r'"\"" char* "\""',
    "integer": '"-"? ("0" | [1-9] [0-9]{0,15})',
    "number": 'integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "value": "object | array | string | number | boolean | null",
    "object": '"{" ws (pair ("," ws pair)* ws)? "}"',
    "pair": 'string ":" ws value',
    "array": '"[" ws (value ("," ws value)* ws)? "]"',
}


def to_grammar(schema: Mapping[str, Any]) -> str:
    """GBNF that admits only JSON texts of `schema`; properties come in the schema's order.

    Raises:
        PromptError: not a schema, or one that the grammar would not enforce.
    """
    try:
        copy = json.loads(json.dumps(schema, allow_nan=False, ensure_ascii=False).encode())
        return _Grammar(copy).text()
    except (TypeError, ValueError) as error:
        raise PromptError(f"the schema is not JSON: {error}") from error
    except RecursionError:
        raise PromptError("the schema is nested too deeply") from None


def check_answer(text: str, finish_reason: str, schema: Mapping[str, Any]) -> None:
    """Raises OutputError unless the answer is whole and satisfies `schema`.

    The grammar sees tokens, not text: a control token has a name there and no bytes here, and
    max_tokens may end an answer anywhere.
    """
    why = "max_tokens was reached" if finish_reason == "length" else f"ended by {finish_reason}"
    try:
        value = json.loads(text)
        # Half a number is a number.
        whole = finish_reason == "stop" or isinstance(value, bool | dict | list | str | None)
    except ValueError:
        whole = False
    if not whole:
        raise OutputError(
            f"the answer is not complete JSON ({why}): allow more tokens, or bound the strings "
            "and arrays of the schema with maxLength and maxItems"
        )
    if not _fits(value, schema, schema):
        raise OutputError(f"the answer does not satisfy the schema: {text[:80]!r}")


class _Grammar:
    """Rules under construction. A method for a node returns the right side of its rule."""

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._rules: dict[str, str] = {}
        self._referenced: dict[str, str] = {}  # $ref → name of its rule

    def text(self) -> str:
        root = self._schema
        if isinstance(root, Mapping):
            root = {key: root[key] for key in root if key not in ("$schema", "$id")}
        rules = {"root": self._value(root, "schema"), **self._rules, **_RULES}
        return "\n".join(f"{name} ::= {rule}" for name, rule in rules.items())

    def _named(self, rule: str) -> str:
        if rule in _RULES or rule in self._rules:
            return rule
        name = f"r{len(self._rules)}"
        self._rules[name] = rule
        return name

    def _value(self, node: Any, where: str) -> str:
        keywords = _keywords(node, where)
        if "$ref" in keywords:
            return self._reference(node["$ref"], where)
        if "anyOf" in keywords:
            return self._any_of(node["anyOf"], f"{where}.anyOf")
        if keywords & {"const", "enum"}:
            values = [node["const"]] if "const" in node else node["enum"]
            if not isinstance(values, list):
                raise PromptError(f"{where}.enum must be a list")
            fitting = [value for value in values if _fits(value, node, node)]
            if not fitting:
                raise PromptError(f"{where} admits no value")
            return " | ".join(_literal(value) for value in fitting)
        kinds = {"object": self._object, "array": self._array, "string": _string}
        return " | ".join(
            self._named(kinds[kind](node, where)) if _KEYWORDS[kind] & keywords else kind
            for kind in _kinds(node, where)
        )

    def _reference(self, ref: Any, where: str) -> str:
        target = _target(ref, self._schema, where)
        if ref not in self._referenced:  # named before its rule is made: it may refer to itself
            name = self._referenced[ref] = f"ref{len(self._referenced)}"
            self._rules[name] = self._value(target, ref)
        return self._referenced[ref]

    def _any_of(self, nodes: Any, where: str) -> str:
        if not isinstance(nodes, list) or not nodes:
            raise PromptError(f"{where} must be a list of schemas")
        rules = (self._value(node, f"{where}[{i}]") for i, node in enumerate(nodes))
        return " | ".join(self._named(rule) for rule in rules)

    def _object(self, node: Mapping[str, Any], where: str) -> str:
        properties = node.get("properties", {})
        required = node.get("required", [])
        extra = node.get("additionalProperties", True)
        if not isinstance(properties, dict) or not _is_list_of_str(required):
            raise PromptError(f"{where}: properties must be an object, required a list of names")
        if missing := [name for name in required if name not in properties]:
            raise PromptError(f"{where} requires {missing[0]!r}, which is not in its properties")
        if not isinstance(extra, bool):
            extra_rule = self._named(self._value(extra, f"{where}.additionalProperties"))
        if not properties and extra is not False:
            pair = self._named(f'string ":" ws {"value" if extra is True else extra_rule}')
            return f'"{{" ws ({pair} ("," ws {pair})* ws)? "}}"'
        # From the last property to the first: what may begin here, and what may follow another.
        # More than the named properties is never said: a second value could take a name again.
        begin, follow = [""], self._named('""')
        for name, child in reversed(properties.items()):
            value = self._named(self._value(child, f"{where}.properties.{name}"))
            pair = self._named(f'{_literal(name)} ":" ws {value}')
            if name in required:
                begin = [f"{pair} {follow} ws"]
                follow = self._named(f'"," ws {pair} {follow}')
            else:
                begin = [f"{pair} {follow} ws", *begin]
                follow = self._named(f'("," ws {pair})? {follow}')
        return f'"{{" ws ({" | ".join(begin)}) "}}"'

    def _array(self, node: Mapping[str, Any], where: str) -> str:
        least, most = _limits(node, "minItems", "maxItems", where)
        if "prefixItems" in node:  # never more than these, whatever `items` says about the rest
            nodes = node["prefixItems"]
            if not isinstance(nodes, list) or not nodes:
                raise PromptError(f"{where}.prefixItems must be a list of schemas")
            if not least <= len(nodes) <= (len(nodes) if most is None else most):
                raise PromptError(f"{where} has {len(nodes)} prefixItems, outside its limits")
            rules = [self._value(n, f"{where}.prefixItems[{i}]") for i, n in enumerate(nodes)]
            return '"[" ws ' + ' "," ws '.join(self._named(rule) for rule in rules) + ' ws "]"'
        item = self._named(self._value(node["items"], f"{where}.items")) if "items" in node else ""
        if most == 0:
            return '"[" ws "]"'
        item = item or "value"
        another = self._named(f'"," ws {item}')
        several = (
            f"{item} {another}{_repeat(max(least - 1, 0), None if most is None else most - 1)}"
        )
        return f'"[" ws {several} ws "]"' if least else f'"[" ws ({several} ws)? "]"'


def _keywords(node: Any, where: str) -> set[str]:
    """What a schema says, annotations aside; refuses what would be passed over."""
    if not isinstance(node, Mapping):
        raise PromptError(f"{where} is {json.dumps(node)}; it must be a JSON object")
    keywords = set(node) - _ANNOTATIONS
    ruling = next((k for k in ("$ref", "anyOf", "const", "enum") if k in keywords), None)
    if ruling is None:
        enforced = {"type"}.union(*(_KEYWORDS[kind] for kind in _kinds(node, where)))
    else:
        enforced = {ruling, "type"} if ruling in ("const", "enum") else {ruling}
    if ignored := keywords - enforced:
        beside = f"beside {ruling!r}" if ruling else "for its type"
        raise PromptError(
            f"{where} has {', '.join(sorted(ignored))}, which cannot be enforced {beside}: "
            "leave it out and check the answer yourself, or give a grammar"
        )
    return keywords


def _kinds(node: Mapping[str, Any], where: str) -> list[str]:
    """The types a schema speaks of; without `type`, those that its keywords belong to."""
    given = node.get("type", [kind for kind, words in _KEYWORDS.items() if words & set(node)])
    kinds = [given] if isinstance(given, str) else given
    if not _is_list_of_str(kinds):
        raise PromptError(f"{where}.type must be a name or a list of names")
    if unknown := set(kinds) - set(_KEYWORDS):
        raise PromptError(f"{where} has the unknown type {unknown.pop()!r}")
    if not kinds:
        said = ", ".join(sorted(set(node) - _ANNOTATIONS)) or "nothing"
        raise PromptError(f"{where} says {said}, which cannot be enforced: give a type")
    return list(kinds)


def _is_list_of_str(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _target(ref: Any, schema: Any, where: str) -> Any:
    """What a local JSON pointer (RFC 6901, as a fragment) names."""
    node = schema
    if not isinstance(ref, str) or not ref.startswith("#/"):
        raise PromptError(f"{where} refers to {ref!r}; only '#/…' can be followed")
    for part in unquote(ref[2:]).split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(node, Mapping) or name not in node:
            raise PromptError(f"{where} refers to {ref!r}, which is not in the schema")
        node = node[name]
    return node


def _string(node: Mapping[str, Any], where: str) -> str:
    least, most = _limits(node, "minLength", "maxLength", where)
    if "pattern" not in node:
        return rf'"\"" char{_repeat(least, most)} "\""'
    if (least, most) != (0, None):
        raise PromptError(f"{where} has pattern and a length: say the length in the pattern")
    try:
        return rf'"\"" ({pattern_to_grammar(node["pattern"])}) "\""'
    except PromptError as error:
        raise PromptError(f"{where} has {error}") from None


def _limits(node: Mapping[str, Any], low: str, high: str, where: str) -> tuple[int, int | None]:
    least, most = node.get(low, 0), node.get(high)
    for name, n in ((low, least), (high, least if most is None else most)):
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= _MOST_REPEATS:
            raise PromptError(f"{where}.{name} is {n!r}; it must be 0 to {_MOST_REPEATS}")
    if most is not None and most < least:
        raise PromptError(f"{where} has {low} {least} above {high} {most}")
    return least, most


def _repeat(least: int, most: int | None) -> str:
    return f"{{{least},{'' if most is None else most}}}"


def _literal(value: Any) -> str:
    return quoted(json.dumps(value, ensure_ascii=False))


def _fits(value: Any, node: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    """Whether a value satisfies a node that `_Grammar` accepts."""
    if "$ref" in node:
        return _fits(value, _target(node["$ref"], schema, "schema"), schema)
    if "anyOf" in node:
        return any(_fits(value, child, schema) for child in node["anyOf"])
    if "const" in node or "enum" in node:
        values = [node["const"]] if "const" in node else node["enum"]
        if json.dumps(value, sort_keys=True) not in {json.dumps(v, sort_keys=True) for v in values}:
            return False
        if "type" not in node:
            return True
    if not any(_is_a(value, kind) for kind in _kinds(node, "schema")):
        return False
    if isinstance(value, dict):
        extra = node.get("additionalProperties", True)
        others = {} if isinstance(extra, bool) else dict.fromkeys(value, extra)
        children = {**others, **node.get("properties", {})}
        return (
            set(node.get("required", [])) <= set(value)
            and (extra is not False or set(value) <= set(children))
            and all(
                _fits(value[name], children[name], schema) for name in value if name in children
            )
        )
    if isinstance(value, list):
        tuple_ = node.get("prefixItems", [node["items"]] * len(value) if "items" in node else [])
        return _within(len(value), node, "minItems", "maxItems") and all(
            _fits(item, child, schema) for item, child in zip(value, tuple_, strict=False)
        )
    if isinstance(value, str):
        matches = "pattern" not in node or re.search(node["pattern"], value)
        return _within(len(value), node, "minLength", "maxLength") and bool(matches)
    return True


def _is_a(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": int | float}
    return kind in kinds and isinstance(value, kinds[kind])


def _within(n: int, node: Mapping[str, Any], low: str, high: str) -> bool:
    return bool(node.get(low, 0) <= n <= node.get(high, n))
