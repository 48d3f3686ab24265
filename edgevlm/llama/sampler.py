"""Logits → the next token: llama.cpp's samplers in a chain."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import numpy as np

from edgevlm.errors import OutputError, PromptError
from edgevlm.llama.context import Context
from edgevlm.llama.library import complaints, lib
from edgevlm.llama.model import Model

_PENALTY_WINDOW_TOKENS = 64
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class Sampler:
    """Chooses the next token; greedy at temperature 0."""

    def __init__(
        self,
        model: Model,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        repeat_penalty: float,
        grammar: str | None,
        banned_ids: Sequence[int] = (),
    ) -> None:
        """Raises PromptError: llama.cpp does not accept the grammar."""
        complaints.clear()
        self.handle = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        self._candidates = np.zeros(model.n_vocab, _CANDIDATE)
        self._ids = np.arange(model.n_vocab, dtype=np.int32)
        self._banned = model.textless if grammar is not None else np.empty(0, np.int64)
        if grammar is not None:
            constraint = lib.llama_sampler_init_grammar(model.vocab, grammar.encode(), b"root")
            if not constraint:
                self.close()
                raise PromptError(f"not a GBNF grammar with a root rule: {'; '.join(complaints)}")
            self._add(constraint)
        if banned_ids:
            biases = (lib.llama_logit_bias * len(banned_ids))(
                *(lib.llama_logit_bias(token, -math.inf) for token in banned_ids)
            )
            self._add(lib.llama_sampler_init_logit_bias(model.n_vocab, len(biases), biases))
        if repeat_penalty != 1:
            self._add(
                lib.llama_sampler_init_penalties(
                    model.n_vocab, _PENALTY_WINDOW_TOKENS, repeat_penalty, 0.0, 0.0
                )
            )
        if temperature == 0:
            self._add(lib.llama_sampler_init_greedy())
            return
        if top_k:
            self._add(lib.llama_sampler_init_top_k(top_k))
        if top_p < 1:
            self._add(lib.llama_sampler_init_top_p(top_p, 1))
        self._add(lib.llama_sampler_init_temp(temperature))
        self._add(lib.llama_sampler_init_dist(seed))

    def _add(self, part: object) -> None:
        lib.llama_sampler_chain_add(self.handle, part)

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sample(self, context: Context, row: int = -1) -> int:
        """The next token, by the logits of a row.

        Raises:
            OutputError: the grammar admits none. (llama.cpp's own call would take a forbidden
                one, and abort the process when the grammar meets it.)
        """
        candidates = self._candidates
        candidates["id"] = self._ids  # again: samplers reorder them
        candidates["logit"] = context.logits(row)
        candidates["logit"][self._banned] = -np.inf
        data = candidates.ctypes.data_as(lib.llama_token_data_p)
        array = lib.llama_token_data_array(data, len(candidates), -1, False)
        lib.llama_sampler_apply(self.handle, ctypes.byref(array))
        chosen = candidates[array.selected]
        if chosen["logit"] == -np.inf:
            raise OutputError("the grammar admits no token that this model has: make it wider")
        token = int(chosen["id"])
        lib.llama_sampler_accept(self.handle, token)
        return token

    def close(self) -> None:
        if self.handle:
            lib.llama_sampler_free(self.handle)
            self.handle = None
