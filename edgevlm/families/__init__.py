"""Model families: how a picture is cut and how a conversation becomes a prompt.

A family is one module with a class `Family`, a pure function of integers and text. Its numbers
come from bundle.json; docs/adding-a-family.md shows how to write one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgevlm.bundle import Bundle
from edgevlm.errors import PromptError, UnknownFamily
from edgevlm.layout import Layout
from edgevlm.prompt import Message, Place, Segment, Thinking

_FEWER_TOKENS = (192, 128, 64)  # what VisionZip's authors measured (arXiv 2412.04467)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Runs = Sequence[tuple[slice, Mapping[str, NDArray[Any]]]]


class Family(Protocol):
    """What the engine asks of a family; one that inherits need not write what has a default.

    `details` are the values of `Settings.detail` that it knows, `detail` is the one to go by.
    `shorter` are the numbers of visual tokens that it can do with besides all of them, and
    `visual_tokens` is the one to go by; None for all.
    """

    details: Sequence[str] = ("auto",)
    detail: str = "auto"
    shorter: range = range(0)
    visual_tokens: int | None = None

    def layout(self, height: int, width: int) -> Layout:
        """Resizes, tiles and number of image tokens of a picture of that size in pixels."""

    def prompt(self, messages: Sequence[Message], layouts: Sequence[Layout]) -> list[Segment]:
        """The conversation in the order the model reads it, ready for an answer."""

    def describe(self, length: str) -> str:
        """The question that asks for a description: "short", "normal" or "long"."""

    def cheaper(self) -> Sequence[Family]:
        """The same family looking less closely, best first, for who has little time."""
        ways = []
        for name, values in (("detail", ("low",)), ("visual_tokens", _FEWER_TOKENS)):
            known = self.details if name == "detail" else self.shorter
            for value in values:
                if value in known and value != getattr(self, name):
                    ways.append(copy(self))
                    setattr(ways[-1], name, value)
        return ways

    def graph_inputs(self, layout: Layout) -> Mapping[str, NDArray[Any]]:
        """Inputs of the vision graph besides the patches, by name."""
        return {}

    def runs(self, layout: Layout) -> Runs:
        """Which tiles go through the graph together, in order, and their further inputs.

        Where the graph treats each tile alone, one at a time takes the least memory.
        """
        return [(slice(None), self.graph_inputs(layout))]

    def merge(self, features: NDArray[np.float32], layout: Layout) -> NDArray[np.float32]:
        """What the graph gives, float32 [tiles, tokens a tile, n_embd] → embeddings
        float32 [n_tokens, n_embd]."""
        return features.reshape(-1, features.shape[-1])

    def detect_prompt(self, thing: str) -> list[Segment]:
        """About picture 0: find boxes of `thing`. Needs the bundle's region.npz."""
        raise PromptError("this model does not detect: it has no outputs for places")

    def point_prompt(self, thing: str) -> list[Segment]:
        """About picture 0: find points on `thing`. Needs the bundle's region.npz."""
        raise PromptError("this model does not point: it has no outputs for places")

    def gaze_prompt(self, eye: Place) -> list[Segment]:
        """About picture 0: where somebody looks. Needs the bundle's region.npz."""
        raise PromptError("this model does not follow gazes: it has no outputs for places")

    def thinking(self, messages: Sequence[Message], layouts: Sequence[Layout]) -> Thinking:
        """Like `prompt`, for an answer that is reasoned about first."""
        raise PromptError("this model does not reason before it answers: ask without")


def one_by_one(layout: Layout) -> Runs:
    """`runs` of a family whose graph treats each tile alone."""
    return [(slice(n, n + 1), {}) for n in range(layout.n_tiles)]


def names() -> list[str]:
    return sorted(module.name for module in iter_modules(__path__))


def find(bundle: Bundle, detail: str = "auto", visual_tokens: int | None = None) -> Family:
    """The family of a bundle, set up with the numbers of its bundle.json.

    Raises:
        UnknownFamily: this version has no such family.
        BundleError: the family's numbers are missing or make no sense.
        PromptError: the family does not know this `detail`, or so few `visual_tokens`.
    """
    name = bundle.manifest["family"]
    if name not in names():
        raise UnknownFamily(
            f"bundle.json names the family {name!r}; this version has {', '.join(names())}: "
            "update edgevlm or export the model again"
        )
    module = import_module(f"edgevlm.families.{name}")
    family = cast(Family, module.Family(bundle))
    if detail not in family.details:
        raise PromptError(
            f"detail is {detail!r}; this model knows {', '.join(family.details)}: choose of those"
        )
    if visual_tokens is not None and visual_tokens not in family.shorter:
        few, many = family.shorter.start, family.shorter.stop
        known = (
            f"from {few} to {many - 1} of its {many} can be asked for"
            if family.shorter
            else "only LLaVA models that were exported by this version can do with fewer"
        )
        raise PromptError(f"visual_tokens is {visual_tokens} for this model: {known}")
    family.detail, family.visual_tokens = detail, visual_tokens
    return family
