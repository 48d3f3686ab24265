"""Regular expression → GBNF, for the patterns of a JSON schema; what would change is refused.

The result matches only texts that the expression matches and that a JSON string needs no escape
for. Both notations share groups, alternatives and repeats, so it is a walk from left to right.
"""

from __future__ import annotations

import re
from typing import Any

from edgevlm.errors import PromptError

# Regular expressions whose GBNF is the same but for spelling and whose matches need no escape.
_SET_ITEM = r"[a-z]-[a-z]|[A-Z]-[A-Z]|[0-9]-[0-9]|\\[dw]|[A-Za-z0-9 _.,:;/+*?!@#$%'()<>={}]"
_ATOM = re.compile(
    rf"(?P<set>\[-?(?:{_SET_ITEM})+-?\]|\\[dw])|(?P<any>\.)|(?P<group>\((?:\?:|(?!\?))|\)|\|)"
    r"|(?P<repeat>(?:[*+?]|\{\d+(?:,\d*)?\})(?![*+?{]))"
    r"""|\\(?P<escaped>[-^$.|?*+()\[\]{}/])|(?P<literal>[^\\^$.|?*+()\[\]{}"\x00-\x1f\x7f])"""
)


def pattern_to_grammar(pattern: Any) -> str:
    """The right side of a GBNF rule.

    Raises:
        PromptError: not a pattern, or one with parts that a grammar cannot express.
    """
    refusal = PromptError(
        f"the pattern {pattern!r}; only ^…$ of plain characters, \\d, \\w, [sets], (groups), | and "
        "repeats can be enforced"
    )
    if not isinstance(pattern, str) or not re.match(r"\^.*\$\Z", pattern):
        raise refusal
    try:
        re.compile(pattern)
    except (re.error, OverflowError):
        raise refusal from None
    parts, at, end = [], 1, len(pattern) - 1
    while at < end:
        atom = _ATOM.match(pattern, at, end)
        if atom is None:
            raise refusal
        parts.append(_to_grammar(atom))
        at = atom.end()
    return " ".join(parts)


def _to_grammar(atom: re.Match[str]) -> str:
    found = atom[0]
    if atom["set"]:
        inside = found.strip("[]")
        return "[" + inside.replace(r"\d", "0-9").replace(r"\w", "a-zA-Z0-9_") + "]"
    if atom["any"]:
        return r'[^"\\\x00-\x1F\x7F\u2028\u2029]'
    if atom["group"]:
        return found[0]
    return found if atom["repeat"] else quoted(atom["escaped"] or found)


def quoted(text: str) -> str:
    """A GBNF literal; `text` has no line breaks."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
