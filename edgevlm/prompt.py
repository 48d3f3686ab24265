"""What the language model is fed: text, token ids and places for pictures, in order.

Messages come in from the caller; a family turns them into segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Place:
    """A point of a picture, or with a `size` (width, height) a box around it; all 0 to 1.

    It reaches the model as embeddings, one for each coordinate and one for the size.
    """

    x: float
    y: float
    size: tuple[float, float] | None = None

    @property
    def n_tokens(self) -> int:
        return 2 if self.size is None else 3


@dataclass(frozen=True)
class Message:
    """One turn.

    `images` are indices into the pictures of the conversation. `length` says that the turn asks
    for a description ("short", "normal" or "long"); `text` is then the family's question for it.
    """

    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[int, ...] = ()
    length: str | None = None
    places: tuple[Place, ...] = ()  # what the question points at


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Tokens:
    """Ids that bypass the tokenizer; text on their two sides is tokenized apart."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class ImageSlot:
    """A place of picture `index` in the prompt, `n_tokens` positions wide.

    It takes the picture's embeddings from number `first` on; a picture cut into tiles may have
    words between them. In a `bidirectional` slot all positions attend to each other.
    """

    index: int
    n_tokens: int
    first: int = 0
    bidirectional: bool = False


Segment = Text | Tokens | ImageSlot | Place


@dataclass(frozen=True)
class Thinking:
    """How a model reasons before it answers: what it reads, how thoughts end, what comes then."""

    segments: tuple[Segment, ...]
    end_id: int
    then: tuple[int, ...]  # read after the thoughts; the answer follows
    coordinate_id: int  # said where a thought names a coordinate
    chunk_ids: tuple[int, ...]  # open a part of the thoughts with coordinates of its own
    banned_ids: tuple[int, ...]
