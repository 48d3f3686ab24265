"""A GGUF file: its weights, its vocabulary and what it says of itself."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.answer import Device
from edgevlm.llama import gpu
from edgevlm.llama.embedding_table import EmbeddingTable
from edgevlm.llama.library import complaints, failure, lib, start

_PIECE_BYTES = 256


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
        start()
        complaints.clear()
        params = lib.llama_model_default_params()
        params.use_extra_bufts = extra_buffers
        params.load_mode = lib.LLAMA_LOAD_MODE_NONE if extra_buffers else lib.LLAMA_LOAD_MODE_MMAP
        params.vocab_only = vocabulary_only
        first_gpu = gpu.cuda().gpus[0] if device == "cuda" else None
        devices = (ctypes.c_void_p * 2)(first_gpu, None)  # ends with a null; empty means no GPU
        params.devices = ctypes.cast(devices, ctypes.c_void_p)
        params.n_gpu_layers = -1  # all, on what is in `devices`
        self.device = device
        self.handle = lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise failure(f"cannot load {path}")
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
            raise failure(f"cannot tokenize {text[:40]!r}")
        return list(ids[:n])

    def piece(self, token: int) -> bytes:
        """The bytes of a token; a special token has none. May end inside a character."""
        buffer = ctypes.create_string_buffer(_PIECE_BYTES)
        n = lib.llama_token_to_piece(self.vocab, token, buffer, _PIECE_BYTES, 0, False)
        if n < 0:
            raise failure(f"has a token {token} of more than {_PIECE_BYTES} bytes")
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
                raise failure(f"cannot load the adapter {path}")
            self._adapters[path] = adapter
        return self._adapters[path]

    def is_end(self, token: int) -> bool:
        return bool(lib.llama_vocab_is_eog(self.vocab, token))

    def close(self) -> None:
        if self.handle:
            lib.llama_model_free(self.handle)
            self.handle = None
