"""llama.cpp behind three small classes; the only module that imports llama_cpp.

Only its low-level, ctypes half is used. Pointers live and die here, C error codes become
exceptions, and what llama.cpp logs goes to the logger "edgevlm.llama".
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

# libgomp's threads spin for milliseconds at every barrier by default. When another program takes
# a core, the thread that spins keeps the one it waits for from running: a prefill of 0.4 s was
# seen to take 16 s. Read by libgomp when it is loaded, which importing llama_cpp does.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
from numpy.typing import NDArray

from edgevlm import sequence_state
from edgevlm.answer import Device
from edgevlm.embedding_table import EmbeddingTable
from edgevlm.errors import BackendError, Cancelled, OutputError, PromptError
from edgevlm.kernels import Flag, abort_callback
from edgevlm.memory import BATCH_TOKENS


@contextmanager
def _bare(package: str) -> Iterator[None]:
    """Import submodules of `package` without running its __init__, for ourselves only.

    llama_cpp's imports the high-level half with its template engine and its cache on disk: a
    tenth of the time until `edgevlm` begins to load a model.
    """
    before = dict(sys.modules)
    spec = find_spec(package)
    if spec is not None and package not in before:
        sys.modules[package] = module_from_spec(spec)
    try:
        yield
    finally:
        for name in {name for name in sys.modules if name.split(".")[0] == package} - {*before}:
            del sys.modules[name]  # whoever imports it after us gets all of it


with _bare("llama_cpp"):
    import llama_cpp.llama_cpp as lib

_log = logging.getLogger("edgevlm.llama")
_complaints: deque[str] = deque(maxlen=8)  # llama.cpp's last warnings, for error messages
_WARNING, _CONTINUED = 3, 5  # ggml_log_level

_PENALTY_WINDOW_TOKENS = 64
_F32, _F16 = 0, 1  # ggml_type
_PIECE_BYTES = 256
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def on_log(level: int, text: bytes, _: object) -> None:
    line = text.decode("utf-8", "replace").rstrip()
    if _WARNING <= level < _CONTINUED:
        _complaints.append(line)
    _log.debug(line)


@cache
def _start() -> None:
    lib.llama_log_set(on_log, ctypes.c_void_p(0))
    lib.llama_backend_init()


def _failure(what: str) -> BackendError:
    said = "; ".join(_complaints) or "nothing"
    return BackendError(f"llama.cpp {what}. It said: {said}")


def _ggml(name: str, result: Any, *arguments: Any) -> Any:
    """A function of ggml; the binding declares llama.cpp's only."""
    return ctypes.CFUNCTYPE(result, *arguments)((name, lib._lib))


@dataclass(frozen=True)
class _Cuda:
    built: bool
    gpus: Sequence[int]  # ggml_backend_dev_t


@cache
def _cuda() -> _Cuda:
    """The CUDA backend of the loaded library; it lists no GPU where there is none."""
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    backend = _ggml("ggml_backend_reg_by_name", pointer, ctypes.c_char_p)(b"CUDA")
    if backend is None:
        return _Cuda(False, ())
    count = _ggml("ggml_backend_reg_dev_count", size, pointer)(backend)
    get = _ggml("ggml_backend_reg_dev_get", pointer, pointer, size)
    return _Cuda(True, [get(backend, index) for index in range(count)])


def cuda_gpus() -> list[str] | None:
    """Names of the GPUs that llama.cpp can compute on; None if it was built without CUDA."""
    describe = _ggml("ggml_backend_dev_description", ctypes.c_char_p, ctypes.c_void_p)
    found = _cuda()
    return [describe(gpu).decode() for gpu in found.gpus] if found.built else None


def cuda_free_bytes() -> int:
    """Free memory of the GPU that would be used; 0 without one."""
    if not _cuda().gpus:
        return 0
    size = ctypes.POINTER(ctypes.c_size_t)
    ask = _ggml("ggml_backend_dev_memory", None, ctypes.c_void_p, size, size)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    ask(_cuda().gpus[0], ctypes.byref(free), ctypes.byref(total))
    return free.value


class Model:
    """The weights and the vocabulary of a GGUF file."""

    def __init__(
        self,
        path: Path,
        *,
        extra_buffers: bool,
        device: Device = "cpu",
        vocabulary_only: bool = False,
    ) -> None:
        """Map the file; `extra_buffers` lets llama.cpp repack weights for this CPU. The file is
        read then: a mapped one would stay in memory beside what was made of it.

        With `vocabulary_only` it reads words and nothing that computes.
        "cuda" copies all layers to the first GPU, "cpu" lets no GPU take part at all.

        Raises:
            BackendError: llama.cpp cannot read it.
        """
        _start()
        _complaints.clear()
        params = lib.llama_model_default_params()
        params.use_extra_bufts = extra_buffers
        params.load_mode = lib.LLAMA_LOAD_MODE_NONE if extra_buffers else lib.LLAMA_LOAD_MODE_MMAP
        params.vocab_only = vocabulary_only
        gpu = _cuda().gpus[0] if device == "cuda" else None
        devices = (ctypes.c_void_p * 2)(gpu, None)  # ends with a null; empty means no GPU
        params.devices = ctypes.cast(devices, ctypes.c_void_p)
        params.n_gpu_layers = -1  # all, on what is in `devices`
        self.device = device
        self.handle = lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise _failure(f"cannot load {path}")
        self.vocab = lib.llama_model_get_vocab(self.handle)
        self.n_embd: int = lib.llama_model_n_embd(self.handle)
        self.n_vocab: int = lib.llama_vocab_n_tokens(self.vocab)
        self.bos: int = lib.llama_vocab_bos(self.vocab)
        self._adapters: dict[Path, Any] = {}
        self.n_parameters: int = lib.llama_model_n_params(self.handle)
        self.n_layers: int = lib.llama_model_n_layer(self.handle)
        self._path = path

    def embed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """What token ids stand for at the model's input, float32 [n, n_embd]."""
        return self._table.rows(ids)

    @cached_property
    def _table(self) -> EmbeddingTable:
        return EmbeddingTable(lib._lib, self._path, self.n_embd)

    @property
    def cache_width(self) -> int:
        """Values that a layer's keys have at one position."""
        n_heads, n_kv_heads = (
            count(self.handle) for count in (lib.llama_model_n_head, lib.llama_model_n_head_kv)
        )
        return int(n_kv_heads * (self._number("attention.key_length") or self.n_embd // n_heads))

    def _number(self, key: str) -> int | None:
        """A number that the file says under its architecture."""
        found = self._meta(f"{self._meta('general.architecture')}.{key}")
        return int(found) if found else None

    def _meta(self, key: str) -> str:
        """What the file says under `key`; "" where it says nothing."""
        buffer = ctypes.create_string_buffer(_PIECE_BYTES)
        lib.llama_model_meta_val_str(self.handle, key.encode(), buffer, _PIECE_BYTES)
        return buffer.value.decode()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens recognised, nothing added around it."""
        data = text.encode()
        room = len(data) + 8  # no token is shorter than a byte; sentencepiece may add a space
        ids = (ctypes.c_int32 * room)()
        n = lib.llama_tokenize(self.vocab, data, len(data), ids, room, False, True)
        if n < 0:
            raise _failure(f"cannot tokenize {text[:40]!r}")
        return list(ids[:n])

    def piece(self, token: int) -> bytes:
        """The bytes of a token; a special token has none. May end inside a character."""
        buffer = ctypes.create_string_buffer(_PIECE_BYTES)
        n = lib.llama_token_to_piece(self.vocab, token, buffer, _PIECE_BYTES, 0, False)
        if n < 0:
            raise _failure(f"has a token {token} of more than {_PIECE_BYTES} bytes")
        return buffer.raw[:n]

    @cached_property
    def textless(self) -> NDArray[np.int64]:
        """Tokens that a grammar must not choose: it reads their names, the answer has no text."""
        ids = [
            token
            for token in range(self.n_vocab)
            if not self.is_end(token) and (not (piece := self.piece(token)) or piece[0] >= 0xF5)
        ]
        return np.array(ids, np.int64)  # 0xF5 and above never begin or continue a character

    def cache_bytes(self, n_positions: int, *, precise: bool) -> int:
        """Of keys and values."""
        n_heads: int = lib.llama_model_n_head(self.handle)
        n_kv_heads: int = lib.llama_model_n_head_kv(self.handle)
        n_layers: int = lib.llama_model_n_layer(self.handle)
        width = self.n_embd * n_kv_heads // n_heads
        return 2 * n_layers * width * n_positions * (4 if precise else 2)

    def adapter(self, path: Path) -> Any:
        """A LoRA adapter; it is read once and lives as long as the model.

        Raises:
            BackendError: not an adapter of this model.
        """
        if path not in self._adapters:
            adapter = lib.llama_adapter_lora_init(self.handle, str(path).encode())
            if not adapter:
                raise _failure(f"cannot load the adapter {path}")
            self._adapters[path] = adapter
        return self._adapters[path]

    def is_end(self, token: int) -> bool:
        return bool(lib.llama_vocab_is_eog(self.vocab, token))

    def close(self) -> None:
        if self.handle:
            lib.llama_model_free(self.handle)
            self.handle = None


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
        _complaints.clear()
        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx * n_sequences
        params.n_seq_max = n_sequences
        params.kv_unified = False  # else each sequence would attend over the cells of all
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
        self._tap = _Tap(model) if taps_hidden else None
        if self._tap is not None:
            params.cb_eval = self._tap.callback
        self.handle = lib.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise _failure(f"cannot make a context of {n_ctx} tokens")
        self._memory = lib.llama_get_memory(self.handle)
        self._model = model
        self._flag = flag  # llama.cpp holds its address
        self._n_batch: int = params.n_batch
        self._dtype = np.dtype(np.float32 if precise else np.float16)  # of keys and values
        self._n_sequences = n_sequences
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
            raise _failure(f"failed to decode {n} rows (code {code})")

    @property
    def cache_shape(self) -> tuple[int, int]:
        """Layers, and values that each layer's keys have at one position."""
        return self._model.n_layers, self._model.cache_width

    def takes_cache(self) -> bool:
        """Whether `fill_cache` works with this library: it gives back what it was given."""
        layers, width = self.cache_shape
        shape = (2, layers, 1, width)
        keys, values = np.random.default_rng(0).standard_normal(shape).astype(self._dtype)
        given = self._state(keys, values.swapaxes(1, 2))
        try:
            return self._set_state(given) and np.array_equal(self._get_state(), given)
        finally:
            self.truncate(0)

    def fill_cache(
        self, keys: Sequence[NDArray[Any]], values: Sequence[NDArray[Any]], sequence: int = 0
    ) -> None:
        """Keys [n, width] and values [width, n] of each layer become all that a sequence's cache
        holds, at positions 0 to n. There are no logits until more is decoded.

        Raises:
            BackendError: llama.cpp does not take them.
        """
        _complaints.clear()
        if not self._set_state(self._state(keys, values, sequence), sequence):
            raise _failure("did not take keys and values that it did not compute")

    def _state(
        self,
        keys: Sequence[NDArray[Any]],
        values: Sequence[NDArray[Any]],
        sequence: int = 0,
    ) -> NDArray[np.uint8]:
        self.truncate(0, sequence)
        head = self._get_state(sequence)[: sequence_state.HEAD_BYTES].tobytes()
        return sequence_state.pack(head, keys, values, self._dtype, self._n_sequences)

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
            raise _failure("does not take back what it gave")
        return moved

    def _get_state(self, sequence: int = 0) -> NDArray[np.uint8]:
        state = np.empty(lib.llama_state_seq_get_size(self.handle, sequence), np.uint8)
        data = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        n_bytes = lib.llama_state_seq_get_data(self.handle, data, len(state), sequence)
        return state[:n_bytes]

    def _set_state(self, state: NDArray[np.uint8], sequence: int = 0) -> bool:
        data, n_bytes = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)), len(state)
        read = lib.llama_state_seq_set_data(self.handle, data, n_bytes, sequence)
        return bool(read == n_bytes)

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


class _Tap:
    """Copies the last layer's output while llama.cpp computes.

    Its API gives the state after the final norm only, and a norm cannot be undone.
    """

    def __init__(self, model: Model) -> None:
        self.row: NDArray[np.float32] = np.zeros(model.n_embd, np.float32)
        self.callback = lib.ggml_backend_sched_eval_callback(self._see)
        self._name = f"l_out-{lib.llama_model_n_layer(model.handle) - 1}".encode()
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._name_of = _ggml("ggml_get_name", ctypes.c_char_p, pointer)
        self._n_bytes_of = _ggml("ggml_nbytes", size, pointer)
        self._copy = _ggml("ggml_backend_tensor_get", None, pointer, pointer, size, size)

    def _see(self, tensor: int, asks: bool, _: object) -> bool:
        """Called twice: whether a tensor is wanted, and when it is there. True goes on."""
        if asks:
            return bool(self._name_of(tensor) == self._name)
        end_bytes, row_bytes = self._n_bytes_of(tensor), self.row.nbytes
        if end_bytes:  # a batch without the row whose logits are wanted leaves it empty
            self._copy(tensor, self.row.ctypes.data, end_bytes - row_bytes, row_bytes)
        return True


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
        _complaints.clear()
        self.handle = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        self._candidates = np.zeros(model.n_vocab, _CANDIDATE)
        self._ids = np.arange(model.n_vocab, dtype=np.int32)
        self._banned = model.textless if grammar is not None else np.empty(0, np.int64)
        if grammar is not None:
            constraint = lib.llama_sampler_init_grammar(model.vocab, grammar.encode(), b"root")
            if not constraint:
                self.close()
                raise PromptError(f"not a GBNF grammar with a root rule: {'; '.join(_complaints)}")
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


def version() -> str:
    """Of llama-cpp-python, which pins its llama.cpp."""
    from importlib import metadata  # here, because it imports an e-mail parser

    return metadata.version("llama-cpp-python")


def library_path() -> Path:
    """The llama.cpp library that is loaded."""
    return Path(lib._lib._name)


def build_features() -> str:
    """What the library was built with, for example "AVX2 = 1 | AVX512 = 1"."""
    return str(lib.llama_print_system_info().decode())
