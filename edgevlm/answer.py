"""What the engine gives back: pieces while it speaks, an `Answer` at the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgevlm.errors import EdgeVLMError
    from edgevlm.layout import Layout

FinishReason = Literal["stop", "length", "repetition", "budget"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Devices:
    """Where a model's stages run; decoding and preparing a picture is always the CPU's."""

    encode: Device = "cpu"
    language: Device = "cpu"  # prefill and every token


@dataclass(frozen=True)
class Timings:
    """Wall time of each stage in milliseconds; a stage that did not run took 0.

    `first_token_ms` counts from the call to the first token, `generate_ms` from there to the end.
    """

    load_ms: float = 0.0  # opening the model, once per engine
    decode_ms: float = 0.0  # file → pixels
    preprocess_ms: float = 0.0  # pixels → patches
    encode_ms: float = 0.0  # patches → embeddings
    prefill_ms: float = 0.0  # prompt and embeddings → llama.cpp's cache
    first_token_ms: float = 0.0
    generate_ms: float = 0.0


@dataclass(frozen=True)
class EncodedImage:
    """A picture that went through the vision model; give it wherever a picture is taken."""

    embeddings: NDArray[np.float32]  # [n_tokens, n_embd]
    layout: Layout
    input_px: tuple[int, int]  # height, width of the upright picture
    key: str  # SHA-256 of the embeddings
    model_sha256: str  # of the vision file that made it


@dataclass(frozen=True)
class Box:
    """An object that the model found.

    Attributes:
        x_min, y_min, x_max, y_max: in shares of width and height, 0 to 1. As the model says them:
            a box at the edge may reach a little beyond the picture.
        box_px: (x_min, y_min, x_max, y_max) in pixels of the upright picture, and inside it.
    """

    x_min: float
    y_min: float
    x_max: float
    y_max: float
    box_px: tuple[int, int, int, int]


@dataclass(frozen=True)
class Point:
    """A point that the model names: `x` and `y` in shares of width and height, 0 to 1."""

    x: float
    y: float
    point_px: tuple[int, int]  # the pixel of the upright picture


@dataclass(frozen=True)
class Grounding:
    """The points that characters `start` to `end` of the thoughts are about."""

    start: int
    end: int
    points: tuple[tuple[float, float], ...]  # (x, y), 0 to 1


@dataclass(frozen=True)
class Reasoning:
    """What the model thought before it answered."""

    text: str
    grounding: tuple[Grounding, ...]


@dataclass(frozen=True)
class Answer:
    """A whole answer and what it took.

    Attributes:
        finish_reason: "stop" (the model ended), "length" (max_tokens reached), "repetition"
            (it had begun to loop) or "budget" (its time was over).
        prompt_tokens: positions of the prompt, image tokens included.
        image_tokens: positions taken by pictures.
        input_px, model_px: (height, width) of each picture as it came, and as the model saw it.
        peak_rss_bytes: largest resident memory of this process so far.
        cache: "hit" if no picture had to be encoded for this answer, else "miss".
        devices: where it was computed.
        reasoning: the thoughts, if they were asked for.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    image_tokens: int
    generated_tokens: int
    input_px: tuple[tuple[int, int], ...]
    model_px: tuple[tuple[int, int], ...]
    timings: Timings
    peak_rss_bytes: int
    cache: Literal["hit", "miss"]
    devices: Devices
    reasoning: Reasoning | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one of many pictures: an answer, or the error that stood in its way."""

    index: int  # the picture's place among those that were given, from 0
    picture: Any  # as it was given
    answer: Answer | None = None
    error: EdgeVLMError | None = None


@dataclass(frozen=True)
class Piece:
    """The next characters of an answer; the last piece has no text and carries the answer."""

    text: str
    answer: Answer | None = None


def fold(pieces: Iterator[Piece]) -> Answer:
    """The whole answer of a stream."""
    for piece in pieces:
        if piece.answer is not None:
            return piece.answer
    raise AssertionError("a stream ends with its answer")
