"""`Options.budget_s`: the best answer that fits into so many seconds, chosen before work starts.

Pure arithmetic on what calibration.py measured. The choices come from the engine, best first: the
picture looked at as asked, then as closely as `Family.cheaper` offers, each with shorter answers.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from edgevlm.answer import FinishReason
from edgevlm.errors import TimeBudget

# Tokens that an answer of each length is given time for; a question's, where there is no length.
ANSWER_TOKENS = {"long": 160, "normal": 80, "short": 30, None: 30}
_SAFE = 0.9  # of the budget is planned with: no two runs take the same time


@dataclass(frozen=True)
class Costs:
    """What one unit of each stage takes on this machine, in milliseconds."""

    tile_ms: float  # file → embeddings, a tile
    prefill_ms: float  # a token of the prompt
    token_ms: float  # a token of the answer


@dataclass(frozen=True)
class Choice:
    """One way to answer."""

    n_tiles: int
    n_prompt_tokens: int  # that are not in the cache yet
    n_answer_tokens: int

    def seconds(self, costs: Costs) -> float:
        ms = self.n_tiles * costs.tile_ms + self.n_prompt_tokens * costs.prefill_ms
        return (ms + self.n_answer_tokens * costs.token_ms) / 1000


def best(costs: Costs, budget_s: float, choices: Sequence[Choice]) -> int:
    """The index of the first choice that fits.

    Raises:
        TimeBudget: none does; the message says what would.
    """
    seconds = [choice.seconds(costs) / _SAFE for choice in choices]
    for index, needed in enumerate(seconds):
        if needed <= budget_s:
            return index
    quickest = choices[seconds.index(min(seconds))]
    raise TimeBudget(
        f"{budget_s:g} s are too few on this machine: {quickest.n_tiles} tiles, "
        f"{quickest.n_prompt_tokens} tokens to read and {quickest.n_answer_tokens} to say take "
        f"{min(seconds):.1f} s: allow that, or take a smaller model"
    )


def shorter(length: str | None) -> Sequence[str | None]:
    """`length` and those below it; a question has none."""
    lengths = list(ANSWER_TOKENS)
    return lengths[lengths.index(length) : -1] if length is not None else [None]


def spoken(
    tokens: Generator[tuple[int, bytes], None, FinishReason],
) -> Generator[tuple[int, bytes], None, FinishReason]:
    """The same tokens; when the time is over, the answer ends with what was said.

    Raises:
        TimeBudget: nothing was said yet.
    """
    said = False
    while True:
        try:
            token = next(tokens)
        except StopIteration as end:
            reason: FinishReason = end.value
            return reason
        except TimeBudget:
            if said:
                return "budget"
            raise
        said = True
        yield token
