"""Keys and values → the bytes that llama.cpp takes as the state of a sequence.

The layout is internal to llama.cpp (src/llama-kv-cache.cpp, state_write) and may change with any
version, so `Context.takes_cache` tries a round trip before it is relied on. Little endian:
head, u32 streams, u32 cells; for each cell i32 position, u32 1, i32 sequence; u32 transposed,
u32 layers; for each layer its keys, then for each layer its values.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

HEAD_BYTES = 8  # what the library puts first: a magic number and the sequence id
_GGML_TYPES = {"float32": 0, "float16": 1}
_CELL = np.dtype([("position", "<i4"), ("sequences", "<u4"), ("sequence", "<i4")])


def pack(
    head: bytes,
    keys: Sequence[NDArray[Any]],
    values: Sequence[NDArray[Any]],
    dtype: DTypeLike,
    n_streams: int = 1,
) -> NDArray[np.uint8]:
    """The state of one sequence at positions 0 to n, for a cache without flash attention.

    Args:
        keys, values: one for each layer, [n, width] and [width, n]; rounded to `dtype`, which is
            the cache's float16 or float32.
        n_streams: of the cache, one a sequence; what stands in a stream goes to the sequence that
            the state is set for, so the first has all and the others none.
    """
    element = np.dtype(dtype)
    n = len(keys[0])
    cells = np.zeros(n, _CELL)
    cells["position"], cells["sequences"] = np.arange(n), 1
    front = (
        head + struct.pack("<II", n_streams, n) + cells.tobytes() + struct.pack("<II", 1, len(keys))
    )
    kind = _GGML_TYPES[element.name]
    parts = [(struct.pack("<iQ", kind, k.shape[1] * element.itemsize), k) for k in keys]
    parts += [(struct.pack("<iII", kind, element.itemsize, len(v)), v) for v in values]
    n_bytes = len(front) + sum(len(lead) + part.size * element.itemsize for lead, part in parts)
    state = np.zeros(n_bytes + 4 * (n_streams - 1), np.uint8)
    state[: len(front)] = np.frombuffer(front, np.uint8)
    end = len(front)
    for lead, part in parts:
        start = end + len(lead)
        state[end:start] = np.frombuffer(lead, np.uint8)
        end = start + part.size * element.itemsize
        state[start:end] = np.ascontiguousarray(part, element).view(np.uint8).reshape(-1)
    return state
