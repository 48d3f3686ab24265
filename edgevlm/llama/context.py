"""Rows in, logits out: llama.cpp's context and its cache of keys and values."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.errors import BackendError, Cancelled
from edgevlm.kernels import Flag, abort_callback
from edgevlm.llama import sequence_state
from edgevlm.llama.library import complaints, failure, lib
from edgevlm.llama.model import Model
from edgevlm.llama.sequence_state import State
from edgevlm.llama.tap import Tap
from edgevlm.memory import BATCH_TOKENS

_F32, _F16 = 0, 1  # ggml_type
_SPARE = 1  # sequence


class Context:
    """The cache of one conversation, or of several sequences that are decoded together.

    Positions count from 0 in each, one for each token or embedding.
    """

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        *,
        threads: int,
        flag: Flag,
        precise: bool = False,
        n_batch: int = BATCH_TOKENS,
        taps_hidden: bool = False,
        n_sequences: int = 1,
    ) -> None:
        """Each sequence has `n_ctx` positions of its own. `precise` keeps keys and values in
        float32, to compare with a reference.

        At most `n_batch` rows can attend to each other in both directions; `taps_hidden` makes
        `hidden` available, at the price of a Python call for each node of the graph.

        Raises:
            BackendError: no memory for a cache of `n_ctx` positions.
        """
        complaints.clear()
        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx * n_sequences
        # One sequence has a spare one, which is mostly empty, to append what was computed
        # elsewhere; several have caches of their own: each would attend over the cells of all.
        params.n_seq_max = n_sequences if n_sequences > 1 else 2
        params.kv_unified = n_sequences == 1
        params.n_batch = params.n_ubatch = min(n_ctx, n_batch)
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = (
            lib.LLAMA_FLASH_ATTN_TYPE_DISABLED  # slower to decode on CPUs
            if model.device == "cpu"
            else lib.LLAMA_FLASH_ATTN_TYPE_AUTO
        )
        params.type_k = params.type_v = _F32 if precise else _F16
        params.abort_callback = ctypes.cast(abort_callback(), lib.ggml_abort_callback)
        params.abort_callback_data = flag.address
        self._tap = Tap(model) if taps_hidden else None
        if self._tap is not None:
            params.cb_eval = self._tap.callback
        self.handle = lib.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise failure(f"cannot make a context of {n_ctx} tokens")
        self._memory = lib.llama_get_memory(self.handle)
        self._model = model
        self._flag = flag  # llama.cpp holds its address
        self._n_batch: int = params.n_batch
        self._n_sequences = n_sequences
        self._layout = sequence_state.Layout(
            self._get_state()[: sequence_state.HEAD_BYTES].tobytes(),
            model.n_layers,
            model.cache_width,
            np.dtype(np.float32 if precise else np.float16),
            n_sequences,
        )
        self.n_ctx = n_ctx

    def set_adapters(self, files: Sequence[Path]) -> None:
        """Use these LoRA adapters, and no others, in all that follows.

        Raises:
            BackendError: one is not an adapter of this model.
        """
        n = len(files)
        handles = (lib.llama_adapter_lora_p_ctypes * n)(*map(self._model.adapter, files))
        lib.llama_set_adapters_lora(self.handle, handles, n, (ctypes.c_float * n)(*[1.0] * n))

    def decode(
        self, rows: Sequence[int] | NDArray[np.float32], position: int, sequence: int = 0
    ) -> None:
        """Run token ids, or embeddings float32 [n, n_embd], from `position` on.

        The logits of the last row are kept. After an error the cache may hold some of the rows:
        `truncate` it.

        Raises:
            Cancelled: the flag was set.
            BackendError: llama.cpp failed.
        """
        for start in range(0, len(rows), self._n_batch):
            if self._flag.is_set():  # only the CPU's kernels ask for themselves
                raise Cancelled("cancelled")
            part = rows[start : start + self._n_batch]
            first, end = position + start, position + start + len(part)
            self._decode_batch(part, range(first, end), [sequence] * len(part))

    def decode_each(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int]
    ) -> None:
        """Run one token of each of several sequences, in one pass over the weights.

        The logits of all rows are kept. Raises as `decode` does.
        """
        self._decode_batch(tokens, positions, sequences, logits_of_all=True)

    def decode_bidirectional(
        self, rows: NDArray[np.float32], position: int, sequence: int = 0
    ) -> None:
        """Like `decode`, but every row attends to every other: all go in one batch."""
        if len(rows) > self._n_batch:
            raise ValueError(f"{len(rows)} rows; this context takes {self._n_batch} at once")
        lib.llama_set_causal_attn(self.handle, False)
        try:
            self.decode(rows, position, sequence)
        finally:
            lib.llama_set_causal_attn(self.handle, True)

    def _decode_batch(
        self,
        rows: Sequence[int] | NDArray[np.float32],
        positions: Sequence[int],
        sequences: Sequence[int],
        logits_of_all: bool = False,
    ) -> None:
        n = len(rows)
        embeds = isinstance(rows, np.ndarray)
        batch = lib.llama_batch_init(n, rows.shape[1] if isinstance(rows, np.ndarray) else 0, 1)
        try:
            batch.n_tokens = n
            if isinstance(rows, np.ndarray):
                ctypes.memmove(batch.embd, rows.ctypes.data, rows.nbytes)
            for i in range(n):
                if not embeds:
                    batch.token[i] = rows[i]
                batch.pos[i] = positions[i]
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequences[i]
                batch.logits[i] = logits_of_all or i == n - 1
            code = int(lib.llama_decode(self.handle, batch))
        finally:
            lib.llama_batch_free(batch)
        if code == 2:
            raise Cancelled("cancelled")
        if code != 0:
            raise failure(f"failed to decode {n} rows (code {code})")

    @property
    def cache_shape(self) -> tuple[int, int]:
        """Layers, and values that each layer's keys have at one position."""
        return self._layout.n_layers, self._layout.width

    def takes_cache(self) -> bool:
        """Whether keys and values can be given and taken with this library: two positions, given
        one after the other, come back as they were. The cache is empty then."""
        noise = np.random.default_rng(0)
        given = [self.new_state(range(n, n + 1)) for n in range(2)]
        for part in (part for state in given for part in (*state.keys, *state.values)):
            part[...] = noise.standard_normal(part.shape)
        try:
            for state in given:
                self.fill_cache(state)
            held = self.held(2)
        except BackendError:
            return False
        finally:
            self.truncate(0)
        return all(
            np.array_equal(np.concatenate(parts, axis), whole)
            for name, axis in (("keys", 0), ("values", 1))
            for whole, *parts in zip(*(getattr(s, name) for s in (held, *given)), strict=True)
        )

    def state_bytes(self, n_positions: int) -> int:
        """What `held` and `new_state` need for so many, rounded up to where the next may begin."""
        return -(-self._layout.n_bytes(n_positions) // 64) * 64

    def new_state(self, positions: range, memory: NDArray[np.uint8] | None = None) -> State:
        """What `fill_cache` takes, its keys and values still to be filled in."""
        return self._layout.state(positions, memory)

    def held(self, n_positions: int, memory: NDArray[np.uint8] | None = None) -> State:
        """A copy of all that the first sequence holds, which are so many positions.

        Raises:
            BackendError: llama.cpp keeps something else there.
        """
        state = self._layout.state(range(n_positions), memory)
        if n_positions == 0:
            return state
        read = lib.llama_state_seq_get_data(self.handle, _bytes(state.data), len(state.data), 0)
        if read != len(state.data) or state.data[: len(state.front)].tobytes() != state.front:
            raise failure(f"does not give keys and values of {n_positions} positions")
        return state

    @property
    def appends(self) -> bool:
        """Whether `fill_cache` takes a state that does not begin at position 0."""
        return self._n_sequences == 1

    def fill_cache(self, state: State, sequence: int = 0) -> None:
        """Put a state into a sequence's cache behind the positions before it; at position 0 it
        becomes all that the cache holds. There are no logits until more is decoded.

        Raises:
            BackendError: llama.cpp does not take it.
        """
        complaints.clear()
        if state.positions.start == 0:
            taken = self._set_state(state.data, sequence)
        else:  # a state replaces all that a sequence has, so it comes by way of the spare one
            taken = self.appends and self._set_state(state.data, _SPARE)
            lib.llama_memory_seq_cp(self._memory, _SPARE, sequence, -1, -1)
            self.truncate(0, _SPARE)
        if not taken:
            raise failure("did not take keys and values that it did not compute")

    def moved_to(self, make: Callable[[], Context]) -> Context:
        """A context that holds what the first sequence of this one did, which is closed.

        Raises:
            BackendError: there is no memory for it.
        """
        state = self._get_state()
        self.close()  # first: the two are not in memory at the same time
        moved = make()
        if not moved._set_state(state):
            moved.close()
            raise failure("does not take back what it gave")
        return moved

    def _get_state(self, sequence: int = 0) -> NDArray[np.uint8]:
        state = np.empty(lib.llama_state_seq_get_size(self.handle, sequence), np.uint8)
        n_bytes = lib.llama_state_seq_get_data(self.handle, _bytes(state), len(state), sequence)
        return state[:n_bytes]

    def _set_state(self, state: NDArray[np.uint8], sequence: int = 0) -> bool:
        read = lib.llama_state_seq_set_data(self.handle, _bytes(state), len(state), sequence)
        return bool(read == len(state))

    def set_threads(self, threads: int) -> None:
        lib.llama_set_n_threads(self.handle, threads, threads)

    def truncate(self, n_positions: int, sequence: int = 0) -> None:
        """Forget everything from `n_positions` on; a closed context has nothing to forget."""
        if self.handle:
            lib.llama_memory_seq_rm(self._memory, sequence, n_positions, -1)

    def logits(self, row: int = -1) -> NDArray[np.float32]:
        """Of the last row, or of one of `decode_each`: float32 [n_vocab]; a copy."""
        pointer = lib.llama_get_logits_ith(self.handle, row)
        return np.array(np.ctypeslib.as_array(pointer, (self._model.n_vocab,)), np.float32)

    def hidden(self) -> NDArray[np.float32]:
        """The last row's output of the last layer, before the final norm: float32 [n_embd]."""
        if self._tap is None:
            raise ValueError("this context was made without taps_hidden")
        return np.array(self._tap.row)

    def close(self) -> None:
        if self.handle:
            lib.llama_free(self.handle)
            self.handle = None


def _bytes(data: NDArray[np.uint8]) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
