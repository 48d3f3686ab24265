"""Pixels and a Layout → patches, through the kernels: nothing but sizes is decided here.

The patches equal what Pillow's paste, resize and crop followed by numpy's reshape would give, bit
for bit; one kernel call per view resizes, cuts and orders in one go.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgevlm import kernels
from edgevlm.layout import Layout


def patches(
    pixels: NDArray[np.uint8],  # [H, W, 3]
    layout: Layout,
    threads: int,
    flag: kernels.Flag | None = None,
) -> NDArray[np.uint8]:  # [tiles, n_patches, patch_px² · 3]
    """Resize a picture and cut it into the tiles and patches of its layout.

    Only the layout says what comes out: a picture decoded at a smaller scale goes with the same
    layout as the full one.

    Raises:
        Cancelled: `flag` was set.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"pixels must be uint8 [H, W, 3], not {pixels.dtype} {pixels.shape}")
    if pixels.strides[1:] != (3, 1) or pixels.strides[0] < 3 * pixels.shape[1]:
        pixels = np.ascontiguousarray(pixels)
    n_patches = (layout.tile_px // layout.patch_px) ** 2
    out = np.empty((layout.n_tiles, n_patches, 3 * layout.patch_px**2), np.uint8)
    done = 0
    for view in layout.views:
        side = max(pixels.shape[:2])
        kernels.resize(
            pixels,
            out[done : done + len(view.tiles)],
            canvas_px=(side, side) if view.square else pixels.shape[:2],
            size_px=(view.height_px, view.width_px),
            resample=view.resample,
            tiles=view.tiles,
            tile_px=(layout.tile_px, layout.tile_px),
            patch_px=(layout.patch_px, layout.patch_px),
            channels_first=layout.channels_first,
            fill=layout.fill,
            threads=threads,
            flag=flag,
        )
        done += len(view.tiles)
    return out
