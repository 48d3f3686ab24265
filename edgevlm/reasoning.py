"""Thoughts before an answer: text, with coordinates of what it is about.

The model says a token that means "a coordinate"; its value is read from the hidden state and fed
back encoded (the reference that the family names, `_generate_reasoning`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from edgevlm.answer import Grounding, Reasoning
from edgevlm.language import Language
from edgevlm.options import Options
from edgevlm.prompt import Thinking


@dataclass
class _Chunk:
    data: bytes = b""
    coordinates: list[float] = field(default_factory=list)


def think(language: Language, thinking: Thinking, options: Options) -> Reasoning:
    """Think after the prompt that was fed, until the model wants to answer or `max_tokens`.

    Afterwards the language model has read what asks for the answer.

    Raises:
        Cancelled, BackendError: while decoding.
    """
    chunks = [_Chunk()]
    with language.sampler(options, thinking.banned_ids) as sampler:
        room = language.room - len(thinking.then) - 1
        for _ in range(min(language.limit(options.max_tokens), room)):
            token = language.sample(sampler)
            if token == thinking.end_id:
                break
            if token in thinking.chunk_ids:
                chunks.append(_Chunk())
            chunks[-1].data += language.piece(token)
            if token == thinking.coordinate_id:
                value = language.region.coordinate(language.hidden())
                chunks[-1].coordinates.append(value)
                language.extend(language.region.coordinate_row(value))
            else:
                language.extend([token])
    language.extend(list(thinking.then))
    return _told(chunks)


def _told(chunks: list[_Chunk]) -> Reasoning:
    text = ""
    grounding = []
    for chunk in chunks:
        start = len(text)
        text += chunk.data.decode("utf-8", "replace")
        points = tuple(zip(chunk.coordinates[::2], chunk.coordinates[1::2], strict=False))
        if points:
            grounding.append(Grounding(start, len(text), points))
    return Reasoning(text, tuple(grounding))
