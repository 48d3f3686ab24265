"""What the language model is fed: text and places for pictures, in order.

Messages come in from the caller; a family turns them into segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Message:
    """One turn. `images` are indices into the pictures of the conversation."""

    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[int, ...] = ()


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class ImageSlot:
    """The place of picture `index` in the prompt; its embeddings take `n_tokens` positions."""

    index: int
    n_tokens: int


Segment = Text | ImageSlot
