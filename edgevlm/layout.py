"""How one picture becomes tiles: sizes and positions only, no pixels.

A family computes a `Layout` from the picture's height and width; `preprocess` carries it out.
Kept apart so that families stay pure functions of integers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class View:
    """The whole picture, or a part of it, resized, then cut into tiles.

    `tiles` holds the (top, left) corner of each tile in the resized picture, in pixels. A tile
    may reach outside the picture; what lies outside takes the layout's fill colour. `via_px`
    are sizes that it is resized to on the way: each resize rounds to whole values, so a reference
    that takes two steps is only equalled in two.
    """

    height_px: int
    width_px: int
    resample: str  # "bicubic" | "bilinear" | "lanczos" | "box": Pillow's filters
    tiles: tuple[tuple[int, int], ...]
    square: bool = False  # pad the source to a centred square before the resize
    via_px: tuple[tuple[int, int], ...] = ()  # (height, width) of each resize before the last
    box_px: tuple[int, int, int, int] | None = None  # top, left, height, width of the part


@dataclass(frozen=True)
class Layout:
    """All views of one picture and the shape of their tiles.

    The tiles of all views, in order, are the batch that the vision graph sees:
    uint8 [n_tiles, (tile_px / patch_px)², patch_px² · 3].
    """

    views: tuple[View, ...]
    tile_px: int  # side of a tile
    patch_px: int  # side of a patch; equals tile_px for a convolutional tower
    channels_first: bool  # values inside a patch: [3, P, P] if true, else [P, P, 3]
    fill: tuple[int, int, int]  # RGB
    n_tokens: int  # image tokens the language model will see
    picture_px: tuple[int, int] = (0, 0)  # (height, width), where boxes or `merge` depend on it

    @property
    def n_tiles(self) -> int:
        return sum(len(view.tiles) for view in self.views)

    @property
    def model_px(self) -> tuple[int, int]:
        """(height, width) of what the model sees: the largest view, no larger than its tiles."""
        if self.n_tiles == 1:
            return (self.tile_px, self.tile_px)
        return max((view.height_px, view.width_px) for view in self.views)

    @property
    def at_least_px(self) -> tuple[int, int]:
        """The smallest decoded size whose resize is as good as that of the full picture.

        Twice the largest first resize: a JPEG decoded at a power-of-two fraction is already
        averaged over whole pixels, and the resize that follows still averages two of those in
        each axis (benchmarks/preprocess.py prints what remains in patches and embeddings).
        """
        least = (0, 0)
        for view in self.views:
            height, width = (*view.via_px, (view.height_px, view.width_px))[0]
            if view.box_px is not None:  # the whole picture, where this is the size of the part
                height = height * self.picture_px[0] // view.box_px[2]
                width = width * self.picture_px[1] // view.box_px[3]
            least = max(least[0], height), max(least[1], width)
        return 2 * least[0], 2 * least[1]
