"""Which llama.cpp settings read a prompt and speak fastest on this machine?

One language file, one process, contexts that differ in one setting; they take turns reading a
prompt of a picture's length and then speaking. The peer is llama.cpp as it comes: flash attention
auto, 512 rows at once. Plain weights are what the engine takes where no prefill graph reads.

    python benchmarks/language.py [--model DIR | --random NAME] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import llama_cpp.llama_cpp as lib
import numpy as np
from numpy.typing import NDArray

from edgevlm import probe
from edgevlm.kernels import Flag
from edgevlm.llama import Context, Model

PEER = "llama.cpp as it comes"
N_PROMPT, N_SPOKEN = 730, 16  # Moondream2's picture, and words enough for a median
_AUTO, _OFF, _ON = -1, 0, 1  # llama.h, enum llama_flash_attn_type
_CONTEXTS = {  # flash attention, rows at once
    PEER: (_AUTO, 512),
    "flash attention on, 1024 rows": (_ON, 1024),
    "flash attention off, 512 rows": (_OFF, 512),
}


@dataclass
class Plain:
    """A context of llama.cpp with nothing of ours around it."""

    model: Model
    flash: int
    n_ubatch: int
    threads: int

    def __post_init__(self) -> None:
        params = lib.llama_context_default_params()
        params.n_ctx = N_PROMPT + N_SPOKEN + 8
        params.n_batch, params.n_ubatch = max(2048, self.n_ubatch), self.n_ubatch
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = self.flash
        self.handle = lib.llama_init_from_model(self.model.handle, params)
        assert self.handle

    def read(self, rows: NDArray[np.float32]) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(self.handle), True)
        batch = lib.llama_batch_init(len(rows), rows.shape[1], 1)
        ctypes.memmove(batch.embd, rows.ctypes.data, rows.nbytes)
        self._decode(batch, len(rows), 0)

    def speak(self) -> None:
        lib.llama_memory_seq_rm(lib.llama_get_memory(self.handle), 0, N_PROMPT, -1)
        for n in range(N_SPOKEN):
            batch = lib.llama_batch_init(1, 0, 1)
            batch.token[0] = 100 + n
            self._decode(batch, 1, N_PROMPT + n)

    def _decode(self, batch: Any, n: int, position: int) -> None:
        batch.n_tokens = n
        for i in range(n):
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = position + i, 1, 0
            batch.logits[i] = i == n - 1
        assert lib.llama_decode(self.handle, batch) == 0
        lib.llama_batch_free(batch)


class Ours:
    """The context that the engine makes."""

    def __init__(self, model: Model, threads: int) -> None:
        self.flag = Flag()
        n_ctx = N_PROMPT + N_SPOKEN + 8
        self.context = Context(model, n_ctx, threads=threads, flag=self.flag)

    def read(self, rows: NDArray[np.float32]) -> None:
        self.context.truncate(0)
        self.context.decode(rows, 0)

    def speak(self) -> None:
        self.context.truncate(N_PROMPT)
        for n in range(N_SPOKEN):
            self.context.decode([100 + n], N_PROMPT + n)


def contenders(path: Path, threads: int) -> Iterator[tuple[str, Plain | Ours]]:
    model = Model(path, extra_buffers=probe.verdict().extra_buffers)
    yield "edgevlm", Ours(model, threads)
    yield "edgevlm, plain weights", Ours(Model(path, extra_buffers=False), threads)
    for name, (flash, n_ubatch) in _CONTEXTS.items():
        yield name, Plain(model, flash, n_ubatch, threads)


def main() -> None:
    parser = common.parser(__doc__, rounds=2)
    parser.add_argument("--model", type=Path, help="directory of a bundle")
    parser.add_argument("--random", default="moondream2", help="else a random model of this shape")
    options = parser.parse_args()
    if options.model is None:
        from edgevlm_export import random_models

        options.model = random_models.cached(options.random)
    work = dict(contenders(options.model / "language.gguf", options.threads))
    n_embd = next(one.model.n_embd for one in work.values() if isinstance(one, Plain))
    rows = np.random.default_rng(0).standard_normal((N_PROMPT, n_embd), np.float32) * 0.02
    reading = common.medians_ms(
        {name: partial(one.read, rows) for name, one in work.items()}, options.rounds
    )
    speaking = common.medians_ms({name: one.speak for name, one in work.items()}, options.rounds)
    times = {
        f"prefill of {N_PROMPT} rows": reading,
        "a token": {name: ms / N_SPOKEN for name, ms in speaking.items()},
    }
    question = str(__doc__).splitlines()[0]
    more = {"model": options.model.name}
    common.publish(common.result(question, PEER, times, options, **more), options)


if __name__ == "__main__":
    main()
