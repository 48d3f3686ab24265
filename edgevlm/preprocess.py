"""Pixels and a Layout → patches, through the kernels: nothing but sizes is decided here.

The patches equal what Pillow's paste, resize and crop followed by numpy's reshape would give, bit
for bit; one kernel call per view resizes, cuts and orders in one go.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm import kernels
from edgevlm.layout import Layout, View


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
    resize = partial(kernels.resize, fill=layout.fill, threads=threads, flag=flag)
    via: dict[tuple[object, ...], NDArray[np.uint8]] = {}  # uint8 [H, W, 3]; views share them
    done = 0
    for view in layout.views:
        source = _part(pixels, layout, view)
        side = max(source.shape[:2])
        canvas_px = (side, side) if view.square else source.shape[:2]
        for n, size_px in enumerate(view.via_px, 1):
            step = (view.box_px, view.square, view.resample, view.via_px[:n])
            if step not in via:
                via[step] = np.empty((*size_px, 3), np.uint8)
                resize(source, via[step], canvas_px=canvas_px, **_whole(size_px, view.resample))
            source, canvas_px = via[step], size_px
        resize(
            source,
            out[done : done + len(view.tiles)],
            canvas_px=canvas_px,
            size_px=(view.height_px, view.width_px),
            resample=view.resample,
            tiles=view.tiles,
            tile_px=(layout.tile_px, layout.tile_px),
            patch_px=(layout.patch_px, layout.patch_px),
            channels_first=layout.channels_first,
        )
        done += len(view.tiles)
    return out


def _part(pixels: NDArray[np.uint8], layout: Layout, view: View) -> NDArray[np.uint8]:
    """The view's box, which is in pixels of the full picture, out of one decoded smaller or not."""
    if view.box_px is None:
        return pixels
    (top, left, box_height, box_width), (height, width) = view.box_px, layout.picture_px
    rows, columns = pixels.shape[:2]
    return pixels[
        top * rows // height : max(1, (top + box_height) * rows // height),
        left * columns // width : max(1, (left + box_width) * columns // width),
    ]


def _whole(size_px: tuple[int, int], resample: str) -> dict[str, Any]:
    """A plain resize: one tile of one patch."""
    return {
        "size_px": size_px,
        "resample": resample,
        "tiles": ((0, 0),),
        "tile_px": size_px,
        "patch_px": size_px,
        "channels_first": False,
    }
