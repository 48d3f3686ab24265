"""A conversation about pictures: each turn is read once, the pictures are encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from edgevlm.answer import Answer, EncodedImage, Piece, fold
from edgevlm.options import Options
from edgevlm.prompt import Message

Run = Callable[[Sequence[Message], Sequence[EncodedImage], Options], Iterator[Piece]]


class Chat:
    """Made by `VLM.chat`. A turn that fails or is cancelled is not part of the conversation."""

    def __init__(self, run: Run, images: Sequence[EncodedImage]) -> None:
        """`run` is the model's `VLM.run`."""
        self._run = run
        self._images = images
        self.messages: list[Message] = []

    def ask(self, question: str, **options: Any) -> Answer:
        """The answer to the next question; raises as `VLM.ask` does."""
        return fold(self.stream(question, **options))

    def stream(self, question: str, **options: Any) -> Iterator[Piece]:
        """Like `ask`, in pieces as they are made."""
        pictures = () if self.messages else tuple(range(len(self._images)))
        asked = Message("user", question, pictures)
        for piece in self._run([*self.messages, asked], self._images, Options(**options)):
            if piece.answer is not None:
                self.messages += [asked, Message("assistant", piece.answer.text)]
            yield piece
