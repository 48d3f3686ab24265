"""Token bytes → text: whole characters, stop strings, loops. Pure, no model in sight.

Tokens cut characters in two, stop strings arrive in pieces, and small models fall into loops:
`Spoken` yields only text that is certain to belong to the answer.
"""

from __future__ import annotations

import codecs
from collections.abc import Generator, Iterator, Sequence

from edgevlm.answer import FinishReason

# A loop is a unit of 1 to 64 tokens said often enough in a row that at least 24 tokens, and at
# least three copies, are the same: lists and refrains in real captions stay below that.
_LONGEST_UNIT_TOKENS = 64
_LOOP_TOKENS = 24
_LOOP_COPIES = 3


class Spoken:
    """Iterate over the text of (token id, bytes) pairs; afterwards ask how it ended.

    Text that may be the beginning of a stop string is held back until it is known not to be.
    Bytes that are not UTF-8 become U+FFFD.

    Attributes:
        text: what was yielded so far.
        n_tokens: how many tokens were taken.
        finish_reason: "length" until the end is known.
    """

    def __init__(
        self,
        tokens: Generator[tuple[int, bytes], None, FinishReason],
        stop: Sequence[str] = (),
        repetition_stop: bool = True,
    ) -> None:
        self.text = ""
        self.n_tokens = 0
        self.finish_reason: FinishReason = "length"
        self._tokens = tokens
        self._stop = stop
        self._repetition_stop = repetition_stop

    def __iter__(self) -> Iterator[str]:
        return (text for text in self.token_by_token() if text)

    def token_by_token(self) -> Iterator[str]:
        """What each token makes certain, often ""; at last what was held back."""
        for text in self._pieces():
            self.text += text
            yield text

    def _pieces(self) -> Iterator[str]:
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        held = ""  # decoded, not yet certain
        seen: list[int] = []
        ended: FinishReason | None = None
        while ended is None:
            try:
                token, data = next(self._tokens)
                seen.append(token)
                held += utf8.decode(data)
            except StopIteration as end:
                held += utf8.decode(b"", final=True)
                ended = end.value
            self.n_tokens = len(seen)
            # The one that is complete first, however the tokens cut the text.
            stops = [(held.find(s) + len(s), held.find(s)) for s in self._stop if s in held]
            if stops:
                held, ended = held[: min(stops)[1]], "stop"
            elif ended is None and self._repetition_stop and is_loop(seen):
                ended = "repetition"
            certain = len(held) if ended else len(held) - _possible_stop(held, self._stop)
            yield held[:certain]
            held = held[certain:]
        self.finish_reason = ended


def is_loop(tokens: Sequence[int]) -> bool:
    """Do the last tokens repeat one unit over and over?"""
    for unit in range(1, min(_LONGEST_UNIT_TOKENS, len(tokens) // _LOOP_COPIES) + 1):
        copies = max(_LOOP_COPIES, -(-_LOOP_TOKENS // unit))
        span = copies * unit
        if len(tokens) >= span and tokens[-span:-unit] == tokens[-(span - unit) :]:
            return True
    return False


def _possible_stop(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = 0
    for s in stop:
        for n in range(min(len(s) - 1, len(text)), longest, -1):
            if s.startswith(text[-n:]):
                longest = n
                break
    return longest
