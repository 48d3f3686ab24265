"""LLaVA-NeXT (1.6): the whole picture, then a grid of tiles with an end mark on every row.

The grid that suits the picture best is chosen, its padding is cut away again after the projector:
transformers' LlavaNextImageProcessor and pack_image_features in modeling_llava_next.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

from edgevlm import families
from edgevlm.bundle import MANIFEST, Bundle, check_shape
from edgevlm.errors import BundleError
from edgevlm.layout import Layout, View
from edgevlm.prompt import ImageSlot, Message, Segment
from edgevlm.turns import Turns

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_IMAGE = {
    "tile_px": int,
    "patch_px": int,
    "resample": str,
    "grids": list,  # (height, width) in tiles, in the order that decides between equals
}
_BLACK = (0, 0, 0)  # the padding is added to the picture before it is normalised
_Size = tuple[int, int]  # height, width


class Family(families.Family):
    details = ("low", "auto")

    def __init__(self, bundle: Bundle) -> None:
        self._image = bundle.manifest["image"]
        path = bundle.file(MANIFEST)
        check_shape(path, self._image, _IMAGE)
        self._turns = Turns(path, bundle.manifest["prompt"])
        self._tile_px, patch_px = self._image["tile_px"], self._image["patch_px"]
        self._grids: list[_Size] = []
        for grid in self._image["grids"]:
            if not (isinstance(grid, list) and [type(n) for n in grid] == [int, int]):
                raise BundleError(f"{path}: the grid {grid!r} is no pair of numbers")
            self._grids.append((grid[0], grid[1]))
        tiles = [n for grid in self._grids for n in grid]
        if min(patch_px, *tiles, 1) < 1 or not tiles or self._tile_px < patch_px:
            raise BundleError(f"{path}: the sizes of 'image' make no sense: export it again")
        self._side = self._tile_px // patch_px  # of a tile, in tokens
        newline = bundle.arrays("extra.npz").get("image_newline")
        if newline is None or newline.shape != (bundle.manifest["n_embd"],):
            raise BundleError(f"{bundle.file('extra.npz')} has no image_newline: export it again")
        self._newline = newline  # float32 [n_embd]

    def layout(self, height: int, width: int) -> Layout:
        side, resample = self._tile_px, self._image["resample"]
        whole = View(side, side, resample, ((0, 0),))
        if self.detail == "low":
            return self._layout((whole,), 1, (height, width))
        rows, columns = self._grid(height, width)
        canvas_px = (rows * side, columns * side)
        height_px, width_px = _fitted((height, width), canvas_px)
        top, left = (canvas_px[0] - height_px) // 2, (canvas_px[1] - width_px) // 2
        corners = product(range(rows), range(columns))
        tiles = tuple((row * side - top, column * side - left) for row, column in corners)
        kept_rows, kept_columns = self._kept(height, width)
        n_more = len(kept_rows) * (len(kept_columns) + 1)
        views = (whole, View(height_px, width_px, resample, tiles))
        return self._layout(views, n_more, (height, width))

    def _layout(self, views: tuple[View, ...], n_more: int, picture_px: _Size) -> Layout:
        """`n_more` tokens follow those of the whole picture."""
        patch_px: int = self._image["patch_px"]
        return Layout(
            views=views,
            tile_px=self._tile_px - self._tile_px % patch_px,  # whole patches, from the top left
            patch_px=patch_px,
            channels_first=True,
            fill=_BLACK,
            n_tokens=self._side**2 + n_more,
            picture_px=picture_px,
        )

    def runs(self, layout: Layout) -> families.Runs:
        return families.one_by_one(layout)

    def merge(self, features: NDArray[np.float32], layout: Layout) -> NDArray[np.float32]:
        import numpy as np  # here, because the command line loads families without it

        if layout.n_tiles == 1:  # the reference ends a picture without tiles by one mark
            return np.concatenate([features[0], self._newline[np.newaxis]])
        rows, columns = self._grid(*layout.picture_px)
        side, n_embd = self._side, features.shape[-1]
        grid = features[1:].reshape(rows, columns, side, side, n_embd)
        grid = grid.swapaxes(1, 2).reshape(rows * side, columns * side, n_embd)
        kept_rows, kept_columns = self._kept(*layout.picture_px)
        grid = grid[kept_rows.start : kept_rows.stop, kept_columns.start : kept_columns.stop]
        ends = np.broadcast_to(self._newline, (len(grid), 1, n_embd))
        lines = np.concatenate([grid, ends], axis=1).reshape(-1, n_embd)
        return np.concatenate([features[0], lines])

    def prompt(self, messages: Sequence[Message], layouts: Sequence[Layout]) -> list[Segment]:
        return self._turns.segments(
            messages, lambda index: [ImageSlot(index, layouts[index].n_tokens)]
        )

    def describe(self, length: str) -> str:
        return self._turns.describe(length)

    def _grid(self, height: int, width: int) -> _Size:
        """The grid that keeps most of the picture's pixels, then the one that wastes fewest."""

        def quality(grid: _Size) -> tuple[int, int]:
            grid_height, grid_width = grid[0] * self._tile_px, grid[1] * self._tile_px
            scale = min(grid_width / width, grid_height / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - grid_width * grid_height

        return max(self._grids, key=quality)

    def _kept(self, height: int, width: int) -> tuple[range, range]:
        """The rows and columns of the grid's tokens that are not padding (unpad_image)."""
        rows, columns = (n * self._side for n in self._grid(height, width))
        if width / height > columns / rows:
            padding = (rows - int(round(height * (columns / width), 7))) // 2
            return range(padding, rows - padding), range(columns)
        padding = (columns - int(round(width * (rows / height), 7))) // 2
        return range(rows), range(padding, columns - padding)


def _fitted(size: _Size, canvas: _Size) -> _Size:
    """The largest size of the same shape inside the canvas, rounded up."""
    (height, width), (canvas_height, canvas_width) = size, canvas
    across, down = canvas_width / width, canvas_height / height
    if across < down:
        return min(math.ceil(height * across), canvas_height), canvas_width
    return canvas_height, min(math.ceil(width * down), canvas_width)
