"""Model families: how a picture is cut and how a conversation becomes a prompt.

A family is one module with a class `Family`, a pure function of integers and text. Its numbers
come from bundle.json; docs/adding-a-family.md shows how to write one.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Protocol, cast

from edgevlm.bundle import Bundle
from edgevlm.errors import UnknownFamily
from edgevlm.layout import Layout
from edgevlm.prompt import Message, Segment


class Family(Protocol):
    def layout(self, height: int, width: int) -> Layout:
        """Resizes, tiles and number of image tokens of a picture of that size in pixels."""

    def prompt(self, messages: Sequence[Message], layouts: Sequence[Layout]) -> list[Segment]:
        """The conversation in the order the model reads it, ready for an answer."""

    def describe(self, length: str) -> str:
        """The question that asks for a description: "short", "normal" or "long"."""


def names() -> list[str]:
    return sorted(module.name for module in iter_modules(__path__))


def find(bundle: Bundle) -> Family:
    """The family of a bundle, set up with the numbers of its bundle.json.

    Raises:
        UnknownFamily: this version has no such family.
        BundleError: the family's numbers are missing or make no sense.
    """
    name = bundle.manifest["family"]
    if name not in names():
        raise UnknownFamily(
            f"bundle.json names the family {name!r}; this version has {', '.join(names())}: "
            "update edgevlm or export the model again"
        )
    module = import_module(f"edgevlm.families.{name}")
    return cast(Family, module.Family(bundle))
