"""How an answer is sampled and where it ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from edgevlm.errors import PromptError


@dataclass(frozen=True)
class Options:
    """Sampling options; the defaults give the same answer every time.

    Attributes:
        max_tokens: at most so many tokens; None takes the model's own default.
        temperature: 0 takes the likeliest token (greedy), and top_k, top_p and seed do not matter.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens whose mass reaches p; 1 keeps all.
        seed: of the sampler.
        repeat_penalty: divides the logits of the last 64 tokens; 1 is off, None takes the
            model's own default.
        stop: strings that end the answer; they are not part of it.
        schema: JSON schema that the answer must satisfy.
        grammar: GBNF grammar (llama.cpp's grammars/README.md) that the answer must satisfy.
        repetition_stop: end an answer that has begun to loop.
        budget_s: seconds that the answer may take. Where the machine was calibrated, pictures are
            looked at less closely and descriptions get shorter if they have to; what cannot be
            done is refused at once. When the time is over, the answer ends.
        reasoning: think first, if the model can; the thoughts are in `Answer.reasoning`.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repeat_penalty: float | None = None
    stop: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None
    grammar: str | None = None
    repetition_stop: bool = True
    budget_s: float | None = None
    reasoning: bool = False

    def __post_init__(self) -> None:
        """Raises PromptError for values outside their range."""
        for name, allowed, fits in (
            ("max_tokens", "1 or more", self.max_tokens is None or self.max_tokens >= 1),
            ("temperature", "finite, 0 or more", 0 <= self.temperature < inf),
            ("top_k", "0 or more", self.top_k >= 0),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("seed", "0 to 2³²-1", 0 <= self.seed < 2**32),
            ("budget_s", "above 0", self.budget_s is None or 0 < self.budget_s < inf),
            (
                "repeat_penalty",
                "finite and above 0",
                self.repeat_penalty is None or 0 < self.repeat_penalty < inf,
            ),
        ):
            if not fits:
                raise PromptError(f"{name} is {getattr(self, name)}; it must be {allowed}")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise PromptError(f"stop is {self.stop!r}; it must be a tuple of non-empty strings")
        if self.schema is not None and self.grammar is not None:
            raise PromptError("schema and grammar were both given; give one of them")
        if self.grammar is not None and (not self.grammar.strip() or "\0" in self.grammar):
            # llama.cpp reads a C string, and an empty one constrains nothing
            raise PromptError("the grammar is empty or holds a NUL; give rules or leave it out")
