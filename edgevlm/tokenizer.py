"""Segments of a prompt → token ids, with the pictures and places that stand between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgevlm.bundle import Bundle
from edgevlm.errors import PromptError
from edgevlm.llama import Model
from edgevlm.prompt import ImageSlot, Place, Segment, Text, Tokens

if TYPE_CHECKING:
    import tokenizers

Unit = int | ImageSlot | Place


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt: token ids, image slots and places in order."""

    units: tuple[Unit, ...]

    @property
    def n_image_tokens(self) -> int:
        return sum(unit.n_tokens for unit in self.units if isinstance(unit, ImageSlot))

    @property
    def n_tokens(self) -> int:
        return sum(width(unit) for unit in self.units)


class Tokenizer:
    """The checkpoint's: tokenizer.json where the bundle has one, else llama.cpp's own."""

    def __init__(self, bundle: Bundle, model: Model) -> None:
        self._model = model
        self._json = _from_json(bundle)
        self._image_token: str = bundle.manifest["prompt"]["image_token"]
        self._bos: bool = bundle.manifest["prompt"]["bos"]

    def tokenize(self, segments: Sequence[Segment]) -> Prompt:
        """Token ids of the prompt.

        Raises:
            PromptError: the text contains the token that marks a picture.
        """
        together = self._json is not None and self._image_token
        encode = self._encode_together if together else self._encode_apart
        units: list[Unit] = [self._model.bos] if self._bos else []
        run: list[Text | ImageSlot | Place] = []
        for segment in (*segments, Tokens(())):
            if isinstance(segment, Tokens):
                units += [*encode(run), *segment.ids]
                run = []
            else:
                run.append(segment)
        return Prompt(tuple(units))

    def _encode_together(self, segments: Sequence[Text | ImageSlot | Place]) -> list[Unit]:
        # One string, as the reference does it: merges may cross the borders of segments.
        assert self._json is not None
        marker = self._json.token_to_id(self._image_token) or -1
        text = "".join(s.text if isinstance(s, Text) else self._image_token for s in segments)
        slots = [s for s in segments if not isinstance(s, Text)]
        ids = self._ids(text)
        if ids.count(marker) != len(slots):
            raise PromptError(f"the text contains {self._image_token}, which marks a picture")
        remaining = iter(slots)
        return [next(remaining) if token == marker else token for token in ids]

    def _encode_apart(self, segments: Sequence[Text | ImageSlot | Place]) -> list[Unit]:
        # Where no token marks a picture, what stands before and after it never meets.
        units: list[Unit] = []
        text = ""
        for segment in segments:
            if isinstance(segment, Text):
                text += segment.text
            else:
                units += [*self._ids(text), segment]
                text = ""
        return units + self._ids(text)

    def _ids(self, text: str) -> list[int]:
        if self._json is None:
            return self._model.tokenize(text)
        ids: list[int] = self._json.encode(text, add_special_tokens=False).ids
        return ids


def width(unit: Unit) -> int:
    return 1 if isinstance(unit, int) else unit.n_tokens


def _from_json(bundle: Bundle) -> tokenizers.Tokenizer | None:
    if not bundle.has("tokenizer.json"):
        return None  # llama.cpp's own is the checkpoint's
    from tokenizers import Tokenizer  # here, because not every model needs it

    return Tokenizer.from_file(str(bundle.file("tokenizer.json")))
