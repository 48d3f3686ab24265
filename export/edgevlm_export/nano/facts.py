"""The few facts that nano knows about a photo: the one interface between seeing and speaking.

The tower fills them in from pixels, the sampler draws them at random for training, the sentences
put them into words and the projector into embeddings. Being discrete, they make every threshold a
number in `observe.py` that can be read and changed without training again.
"""

from dataclasses import dataclass, fields
from enum import IntEnum

import torch
from torch import Tensor


class Verdict(IntEnum):
    PLAIN = 0  # nothing but one colour
    UNSURE = 1  # two guesses, neither trustworthy
    GROUP = 2  # "an animal", perhaps one of two
    KIND = 3  # "a dog", perhaps one of two
    PROBABLY = 4  # "probably a beagle"
    SURE = 5  # "a beagle"


class Tone(IntEnum):
    NORMAL = 0
    MONOCHROME = 1
    DARK = 2
    BRIGHT = 3


COLORS = ("black", "white", "gray", "red", "orange", "yellow", "green", "blue", "purple", "pink",
          "brown")  # fmt: skip
NO_COLOR = len(COLORS)
MANY_FACES = 3


@dataclass(frozen=True)
class Facts:
    """One photo (plain integers) or a batch (int64 [n] each)."""

    verdict: int
    first: int  # concept: best guess; under KIND and GROUP the best of that kind or group
    second: int  # concept: next guess, by the same rule
    faces: int  # 0..MANY_FACES
    color: int
    other_color: int  # NO_COLOR: one colour prevails
    background: int  # colour of the border, or NO_COLOR where it has no single one
    tone: int


@dataclass(frozen=True)
class FactsBatch:
    """The same facts for n photos, each int64 [n]."""

    verdict: Tensor
    first: Tensor
    second: Tensor
    faces: Tensor
    color: Tensor
    other_color: Tensor
    background: Tensor
    tone: Tensor


def stack(photos: list[Facts]) -> FactsBatch:
    names = [field.name for field in fields(Facts)]
    return FactsBatch(**{n: torch.tensor([getattr(p, n) for p in photos]) for n in names})
