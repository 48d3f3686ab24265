"""Token ids → the rows of a GGUF file's embedding table, as llama.cpp itself would unpack them.

llama.cpp's API gives no rows, and a copy of the table for the prefill graph would take a tenth of
a model. So the table is found with ggml's own reader, and its rows unpacked by its own functions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_F32 = 0  # ggml_type; the one that has nothing to unpack


class _Params(ctypes.Structure):
    """gguf.h, struct gguf_init_params"""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


class _Traits(ctypes.Structure):
    """ggml.h, struct ggml_type_traits"""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float", ctypes.c_void_p),
    )


class EmbeddingTable:
    def __init__(self, library: ctypes.CDLL, path: Path, n_embd: int) -> None:
        """`library` is llama.cpp's, which has read `path` before; its dependency ggml is used."""

        def function(name: str, result: Any, *arguments: Any) -> Any:
            return ctypes.CFUNCTYPE(result, *arguments)((name, library))

        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
        opened = function("gguf_init_from_file", pointer, ctypes.c_char_p, _Params)(
            str(path).encode(), _Params(no_alloc=True)
        )
        tensor = function("gguf_find_tensor", number, pointer, ctypes.c_char_p)(
            opened, b"token_embd.weight"
        )
        self._kind = function("gguf_get_tensor_type", ctypes.c_int, pointer, number)(opened, tensor)
        offset_bytes = function("gguf_get_data_offset", size, pointer)(opened)
        offset_bytes += function("gguf_get_tensor_offset", size, pointer, number)(opened, tensor)
        function("gguf_free", None, pointer)(opened)
        traits = function("ggml_get_type_traits", ctypes.POINTER(_Traits), ctypes.c_int)
        self._traits = traits(self._kind).contents
        self._row_bytes = n_embd // self._traits.block * self._traits.block_bytes
        self._stored = np.memmap(path, np.uint8, "r", offset_bytes)
        self._n_embd = n_embd

    def rows(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32 [n, n_embd]"""
        rows = np.empty((len(ids), self._n_embd), np.float32)
        for row, token in zip(rows, ids, strict=True):
            start = token * self._row_bytes
            stored = np.array(self._stored[start : start + self._row_bytes])  # aligned
            if self._kind == _F32:
                row[:] = stored.view(np.float32)
            else:
                self._traits.to_float(stored.ctypes.data, row.ctypes.data, self._n_embd)
        return rows
