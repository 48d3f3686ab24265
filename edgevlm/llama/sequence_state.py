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
from numpy.typing import NDArray

HEAD_BYTES = 8  # what the library puts first: a magic number and the sequence id
_GGML_TYPES = {"float32": 0, "float16": 1}
_NUMBER, _BEFORE_KEYS, _BEFORE_VALUES = map(struct.Struct, ("<I", "<iQ", "<iII"))
_CELL = np.dtype([("position", "<i4"), ("sequences", "<u4"), ("sequence", "<i4")])


@dataclass(frozen=True)
class State:
    """One sequence at some positions, for a cache without flash attention.

    Attributes:
        positions: one after the other.
        data: uint8, all of it.
        front: the bytes before keys and values, which name the positions.
        keys, values: views of `data` for each layer, [n, width] and [width, n].
    """

    positions: range
    data: NDArray[np.uint8]
    front: bytes
    keys: list[NDArray[Any]]
    values: list[NDArray[Any]]


@dataclass(frozen=True)
class Layout:
    """What does not depend on positions.

    Attributes:
        head: HEAD_BYTES of a state that the library wrote.
        n_layers, width: of the cache, and how many values a layer's keys have at one position.
        dtype: the cache's float16 or float32.
        n_streams: of the cache, one a sequence; what stands in a stream goes to the sequence that
            the state is set for, so the first has all and the others none.
    """

    head: bytes
    n_layers: int
    width: int
    dtype: np.dtype[Any]
    n_streams: int

    def n_bytes(self, n: int) -> int:
        """Of a state of `n` positions."""
        leads = self.n_layers * (_BEFORE_KEYS.size + _BEFORE_VALUES.size)
        front = HEAD_BYTES + 4 * _NUMBER.size + n * _CELL.itemsize
        empty_streams = _NUMBER.size * (self.n_streams - 1)
        return front + leads + 2 * self.n_layers * self._part(n) + empty_streams

    def _part(self, n: int) -> int:
        return n * self.width * self.dtype.itemsize

    def state(self, positions: range, memory: NDArray[np.uint8] | None = None) -> State:
        """Everything but the keys and values; in `memory`, n_bytes of it, where that is given."""
        n = len(positions)
        data = np.empty(self.n_bytes(n), np.uint8) if memory is None else memory[: self.n_bytes(n)]
        kind, size = _GGML_TYPES[self.dtype.name], self.dtype.itemsize
        cells = np.zeros(n, _CELL)
        cells["position"], cells["sequences"] = positions, 1
        front = self.head + struct.pack("<II", self.n_streams, n) + cells.tobytes()
        front += struct.pack("<II", 1, self.n_layers)
        before_keys = _BEFORE_KEYS.pack(kind, self.width * size)
        before_values = _BEFORE_VALUES.pack(kind, size, self.width)
        state = State(positions, data, front, [], [])
        data[: len(front)] = np.frombuffer(front, np.uint8)
        end = len(front)
        for lead, parts, shape in (
            (before_keys, state.keys, (n, self.width)),
            (before_values, state.values, (self.width, n)),
        ):
            for _ in range(self.n_layers):
                start = end + len(lead)
                data[end:start] = np.frombuffer(lead, np.uint8)
                end = start + self._part(n)
                parts.append(data[start:end].view(self.dtype).reshape(shape))
        data[end:] = 0
        return state
