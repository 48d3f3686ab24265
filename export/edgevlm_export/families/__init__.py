"""A checkpoint → the family module that knows how to export it.

A family module offers `matches(checkpoint)`, which looks at config.json alone, and
`parts(checkpoint, options)`, which plans everything and raises before anything is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from edgevlm.errors import BundleError, UnknownFamily

from ..checkpoint import Checkpoint
from ..gguf import Language
from ..graph import Graph


@dataclass(frozen=True)
class Options:
    """What the caller decides where the checkpoint would decide otherwise; None leaves it be."""

    prompt: str | None = None  # a name in prompts.TEMPLATES
    fit: str | None = None  # a name in processor.FITS


@dataclass(frozen=True)
class Parts:
    vision: Graph
    language: Language
    manifest: dict[str, Any]  # image, prompt, generation and card sections of bundle.json


class Family(Protocol):
    def matches(self, checkpoint: Checkpoint) -> bool: ...

    def parts(self, checkpoint: Checkpoint, options: Options) -> Parts: ...


def families() -> dict[str, Family]:
    from . import llava

    return {"llava": llava}


def find(checkpoint: Checkpoint, name: str | None) -> tuple[str, Family]:
    """The family called `name`, or the only one that recognises the checkpoint."""
    known = families()
    if name is not None:
        if name not in known:
            raise UnknownFamily(f"family {name!r} is unknown; known: {', '.join(known)}")
        return name, known[name]
    architectures = checkpoint.config.get("architectures")
    if not architectures or not isinstance(architectures, list):
        raise BundleError(
            f"{checkpoint.directory / 'config.json'} names no architectures: repair it or name "
            f"the family ({', '.join(known)})"
        )
    found = [(key, family) for key, family in known.items() if family.matches(checkpoint)]
    if len(found) != 1:
        raise UnknownFamily(
            f"{checkpoint.directory} is {', '.join(map(str, architectures))}; known families: "
            f"{', '.join(known)}"
        )
    return found[0]
