"""Keys and values in the bytes that llama.cpp takes as the state of a sequence.

The layout is internal to llama.cpp (src/llama-kv-cache.cpp, state_write) and may change with any
version, so `Context.takes_cache` tries a round trip before it is relied on. Little endian:
head, u32 streams, u32 cells; for each cell i32 position, u32 1, i32 sequence; u32 transposed,
u32 layers; for each layer its keys, then for each layer its values.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

HEAD_BYTES = 8  # what the library puts first: a magic number and the sequence id
_GGML_TYPES = {"float32": 0, "float16": 1}
_CELL = np.dtype([("position", "<i4"), ("sequences", "<u4"), ("sequence", "<i4")])


@dataclass(frozen=True)
class State:
    """One sequence at positions 0 to n, for a cache without flash attention.

    Attributes:
        data: uint8, all of it.
        keys, values: views of it for each layer, [n, width] and [width, n], to be filled in.
    """

    data: NDArray[np.uint8]
    keys: list[NDArray[Any]]
    values: list[NDArray[Any]]


def lay_out(
    head: bytes,
    n: int,
    cache_shape: tuple[int, int],
    dtype: DTypeLike,
    n_streams: int = 1,
    memory: NDArray[np.uint8] | None = None,
) -> State:
    """Everything but the keys and values.

    Args:
        cache_shape: layers, and values that each layer's keys have at one position.
        dtype: the cache's float16 or float32.
        n_streams: of the cache, one a sequence; what stands in a stream goes to the sequence that
            the state is set for, so the first has all and the others none.
        memory: used where it suffices: new memory costs more than what is written to it.
    """
    element = np.dtype(dtype)
    kind = _GGML_TYPES[element.name]
    layers, width = cache_shape
    cells = np.zeros(n, _CELL)
    cells["position"], cells["sequences"] = np.arange(n), 1
    front = head + struct.pack("<II", n_streams, n) + cells.tobytes()
    front += struct.pack("<II", 1, layers)
    before_keys = struct.pack("<iQ", kind, width * element.itemsize)
    before_values = struct.pack("<iII", kind, element.itemsize, width)
    part_bytes = n * width * element.itemsize
    n_bytes = len(front) + layers * (len(before_keys) + len(before_values) + 2 * part_bytes)
    n_bytes += 4 * (n_streams - 1)
    if memory is None or len(memory) < n_bytes:
        memory = np.empty(n_bytes, np.uint8)
    state = State(memory[:n_bytes], [], [])
    state.data[: len(front)] = np.frombuffer(front, np.uint8)
    end = len(front)
    for lead, parts, shape in (
        (before_keys, state.keys, (n, width)),
        (before_values, state.values, (width, n)),
    ):
        for _ in range(layers):
            start = end + len(lead)
            state.data[end:start] = np.frombuffer(lead, np.uint8)
            end = start + part_bytes
            parts.append(state.data[start:end].view(element).reshape(shape))
    state.data[end:] = 0
    return state
