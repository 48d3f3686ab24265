"""A checkpoint → the family module that knows how to export it.

A family module offers `matches(checkpoint)`, which looks at config.json alone, and
`parts(checkpoint, options)`, which plans everything and raises before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol, TypeAlias, cast

from edgevlm.errors import BundleError, UnknownFamily

from ..checkpoint import Checkpoint
from ..gguf import Language
from ..graph import Graph, Load

NO_RELEASES = "this family has no releases that the checkpoint would not tell"
Arrays: TypeAlias = Mapping[str, Load]  # what an .npz file holds, read when it is written


@dataclass(frozen=True)
class Options:
    """What the caller decides where the checkpoint would decide otherwise; None leaves it be."""

    prompt: str | None = None  # a name in prompts.TEMPLATES
    fit: str | None = None  # a name in processor.FITS
    release: str | None = None  # of families that have several
    exporter: str | None = None  # in EXPORTERS, where graph.py does not write the tower

    def refuse(self, **reasons: str) -> None:
        """BundleError if the caller decided one of these, which the family leaves to nobody."""
        for name, reason in reasons.items():
            if getattr(self, name) is not None:
                raise BundleError(f"{name}: {reason}")


@dataclass(frozen=True)
class Parts:
    vision: Graph
    language: Language
    manifest: dict[str, Any]  # image, prompt, generation and card sections of bundle.json
    arrays: Mapping[str, Arrays] = field(default_factory=dict)  # region.npz, extra.npz


class Family(Protocol):
    def matches(self, checkpoint: Checkpoint) -> bool: ...

    def parts(self, checkpoint: Checkpoint, options: Options) -> Parts: ...


def families() -> dict[str, Family]:
    names = sorted(module.name for module in iter_modules(__path__))
    return {name: cast(Family, import_module(f"{__name__}.{name}")) for name in names}


def find(checkpoint: Checkpoint, name: str | None) -> tuple[str, Family]:
    """The family called `name`, or the only one that recognises the checkpoint."""
    known = families()
    if name is not None:
        if name not in known:
            raise UnknownFamily(f"family {name!r} is unknown; known: {', '.join(known)}")
        return name, known[name]
    architectures = checkpoint.config.get("architectures")
    named = isinstance(architectures, list) and all(isinstance(a, str) for a in architectures)
    if not architectures or not named:
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
