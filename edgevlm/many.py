"""Many pictures, several answers at a time: the pipeline around the path of a photo.

A thread decodes and preprocesses the next pictures meanwhile. When an answer ends, the next picture
goes through the vision model and the prompt, and all answers under way are read together, token by
token. What is held at a time does not grow with the number of pictures.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from edgevlm.answer import Outcome, Piece, fold
from edgevlm.errors import EdgeVLMError, ImageError, OutputError, PromptError, TimeBudget
from edgevlm.language import Language, Slots

PARALLEL = 4
_AHEAD = 2  # pictures that are decoded and wait
# What the others do not suffer from.
_OF_ONE_PICTURE = (ImageError, PromptError, OutputError, TimeBudget)

Picture = TypeVar("Picture")
Asked = TypeVar("Asked")
Pieces = Generator[Piece, None, None]


def outcomes(
    pictures: Iterable[Picture],
    prepare: Callable[[Picture], Asked],
    answer: Callable[[Asked, Language], Pieces],
    needed: Callable[[Asked], int],
    new_slots: Callable[[int], Slots],
) -> Iterator[Outcome]:
    """What becomes of each picture, as answers end.

    Args:
        prepare: what can be done beside the models, on another thread.
        answer: a piece for each token that a slot says, and at last the answer.
        needed: positions that a slot must have for it.
        new_slots: makes slots of so many positions.

    Raises:
        Cancelled, BackendError: and whatever else is not about one picture.
    """
    slots: Slots | None = None
    speaking: dict[Language, _Speaker] = {}
    ahead = _Ahead(pictures, prepare)
    try:
        while True:
            for slot, speaker in [*speaking.items()]:
                if outcome := speaker.go_on():
                    del speaking[slot]
                    yield outcome
            # After them: what a slot reads alone takes the place of the logits it left for others.
            while coming := ahead.first():
                index, picture, asked = coming
                if isinstance(asked, EdgeVLMError):
                    ahead.take()
                    yield Outcome(index, picture, error=asked)
                    continue
                if slots is None or needed(asked) > slots.n_ctx:
                    if speaking:
                        break  # until none does: then there can be larger ones
                    if slots is not None:
                        slots.close()
                    slots = new_slots(needed(asked))
                free = [slot for slot in slots.all if slot not in speaking]
                if not free:
                    break
                ahead.take()
                speaker = _Speaker(index, picture, free[0], answer(asked, free[0]))
                speaking[free[0]] = speaker
                if outcome := speaker.go_on():
                    del speaking[free[0]]
                    yield outcome
            if slots is None or not speaking:
                return
            slots.read()
    finally:
        ahead.close()
        for speaker in speaking.values():
            speaker.pieces.close()
        if slots is not None:
            slots.close()


def one_by_one(
    pictures: Iterable[Picture], answer: Callable[[Picture], Pieces]
) -> Iterator[Outcome]:
    """The same, one answer at a time, where there is no memory for more, or each has its time."""
    for index, picture in enumerate(pictures):
        try:
            yield Outcome(index, picture, fold(answer(picture)))
        except _OF_ONE_PICTURE as error:
            yield Outcome(index, picture, error=error)


def in_order(outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    """Those that come too early wait, without their pictures' embeddings."""
    early: dict[int, Outcome] = {}
    n = 0
    for outcome in outcomes:
        early[outcome.index] = outcome
        while n in early:
            yield early.pop(n)
            n += 1


@dataclass(frozen=True)
class _Speaker:
    index: int
    picture: object
    slot: Language
    pieces: Pieces

    def go_on(self) -> Outcome | None:
        """Speak until a token has to be read, or all is said."""
        try:
            for piece in self.pieces:
                if piece.answer is not None:
                    return Outcome(self.index, self.picture, piece.answer)
                if self.slot.unread is not None:
                    return None
        except _OF_ONE_PICTURE as error:
            return Outcome(self.index, self.picture, error=error)
        raise AssertionError("a stream ends with its answer")


class _Ahead(Generic[Picture, Asked]):
    """The next pictures, prepared on a thread of their own."""

    def __init__(self, pictures: Iterable[Picture], prepare: Callable[[Picture], Asked]) -> None:
        self._pictures = enumerate(pictures)
        self._prepare = prepare
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="edgevlm-ahead")
        self._waiting: deque[tuple[int, Picture, Future[Asked]]] = deque()

    def first(self) -> tuple[int, Picture, Asked | EdgeVLMError] | None:
        """The next picture, when it is prepared, or why it cannot be; None after the last.

        It waits rather than let others speak on without it: who is read together with whom, and
        so the last bits of every number, is the same in every run.
        """
        while len(self._waiting) < _AHEAD and (coming := next(self._pictures, None)):
            self._waiting.append((*coming, self._pool.submit(self._prepare, coming[1])))
        if not self._waiting:
            return None
        index, picture, future = self._waiting[0]
        try:
            return index, picture, future.result()
        except _OF_ONE_PICTURE as error:
            return index, picture, error

    def take(self) -> None:
        self._waiting.popleft()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
