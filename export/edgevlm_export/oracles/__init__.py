"""Who says what a bundle should answer: one oracle for each family, in torch and float32.

transformers knows most families; for one that it lacks a module of that family's name is the
oracle, written apart from all that it judges. A checkpoint's own code is never run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from edgevlm.bundle import Bundle
from edgevlm.prompt import ImageSlot

from ..photos import Pixels

STEPS = 64  # greedy tokens
MOST_PLACES = 5  # boxes, and as many points
_TRANSFORMERS = "hugging_face"
Ids: TypeAlias = tuple[int | ImageSlot, ...]


@dataclass(frozen=True)
class Question:
    """A picture, and what is read after it; `detect` and `point` are empty where nobody points."""

    pixels: Pixels
    prompt: Ids
    detect: Ids
    point: Ids


@dataclass(frozen=True)
class Seen:
    """What one side makes of one question."""

    pixels: npt.NDArray[np.int16]  # [tiles, 3, S, S], before rescale and normalisation
    embeddings: npt.NDArray[np.float32]  # [n_tokens, n_embd]
    logits: npt.NDArray[np.float32]  # [n_vocab], after picture and question
    tokens: list[int]  # greedy, without the end token
    places: list[tuple[float, ...]]  # boxes (x, y, width, height), then points (x, y)


class Oracle(Protocol):
    NAME: str

    def answers(
        self, bundle: Bundle, checkpoint: Path, questions: Sequence[Question]
    ) -> Iterator[Seen]: ...


def find(family: str) -> Oracle:
    own = family in {module.name for module in iter_modules(__path__)}
    return cast(Oracle, import_module(f"{__name__}.{family if own else _TRANSFORMERS}"))
