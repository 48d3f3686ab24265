"""n patches in a row → which of the learned positions they take (NaViT, arXiv 2307.06304).

A patch takes the position of its fraction of the row. Fractions meet the borders between positions
exactly wherever n and their number share a factor, so the rounding of the reference decides:
transformers' Idefics2VisionEmbeddings, computed in float32 by torch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LARGEST = np.float32(1.0 - 1e-6)
_UNROLLED = 16  # torch's arange on x86 makes 2 × 8 values at a time, each 8 from a rounded first


def positions(n_patches: int, n_positions: int) -> NDArray[np.int64]:
    """int64 [n_patches], rising from 0 to at most n_positions - 1."""
    step = np.float32(1.0) / np.float32(n_patches)
    fractions = np.minimum(np.arange(n_patches, dtype=np.float32) * step, _LARGEST)
    found: NDArray[np.int64] = np.searchsorted(_borders(n_positions), fractions, side="right")
    return found


def _borders(n_positions: int) -> NDArray[np.float32]:
    """torch.arange(1 / n, 1.0, 1 / n), float32 and to the last bit."""
    step = 1 / n_positions
    index = np.arange(int(np.ceil((1.0 - step) / step)))
    first = (step + step * (index // 8 * 8)).astype(np.float32).astype(np.float64)
    unrolled = index < len(index) // _UNROLLED * _UNROLLED
    borders: NDArray[np.float32] = np.where(
        unrolled, first + step * (index % 8), step + step * index
    ).astype(np.float32)
    return borders
