"""What the kernels must give, made with Pillow and numpy alone.

`cases` draws whole problems at random; `patches` solves one the long way: paste, resize, paste into
tiles, reshape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FILTERS = ("box", "bilinear", "bicubic", "lanczos")
Size = tuple[int, int]  # (height, width) in px


@dataclass(frozen=True)
class Case:
    canvas_px: Size
    size_px: Size
    resample: str
    tiles: tuple[Size, ...]
    tile_px: Size
    patch_px: Size
    channels_first: bool
    fill: tuple[int, int, int]


def plain(pixels: NDArray[np.uint8], size_px: Size, resample: str) -> Case:
    """A resize and nothing else: one tile of one patch."""
    return Case(pixels.shape[:2], size_px, resample, ((0, 0),), size_px, size_px, False, (9, 9, 9))


def resized(pixels: NDArray[np.uint8], size_px: Size, resample: str) -> NDArray[np.uint8]:
    image = Image.fromarray(pixels).resize(size_px[::-1], Image.Resampling[resample.upper()])
    return np.asarray(image)


def patches(pixels: NDArray[np.uint8], case: Case) -> NDArray[np.uint8]:
    """uint8 [tiles, n_patches, patch height · patch width · 3]"""
    height, width = pixels.shape[:2]
    canvas = Image.new("RGB", case.canvas_px[::-1], case.fill)
    corner = ((case.canvas_px[1] - width) // 2, (case.canvas_px[0] - height) // 2)
    canvas.paste(Image.fromarray(pixels), corner)
    whole = Image.fromarray(resized(np.asarray(canvas), case.size_px, case.resample))
    cut = []
    for top, left in case.tiles:
        tile = Image.new("RGB", case.tile_px[::-1], case.fill)
        tile.paste(whole, (-left, -top))
        cut.append(np.asarray(tile))
    (tile_h, tile_w), (patch_h, patch_w) = case.tile_px, case.patch_px
    rows, columns = tile_h // patch_h, tile_w // patch_w
    grid = np.stack(cut).reshape(len(cut), rows, patch_h, columns, patch_w, 3)
    order = (0, 1, 3, 5, 2, 4) if case.channels_first else (0, 1, 3, 2, 4, 5)
    ordered: NDArray[np.uint8] = grid.transpose(order)
    return ordered.reshape(len(cut), rows * columns, -1)


def noise(random: np.random.Generator, size_px: Size) -> NDArray[np.uint8]:
    """Noise, sometimes black and white only: the filters then overshoot both ends of the range."""
    pixels = random.integers(0, 256, (*size_px, 3), dtype=np.uint8)
    return pixels if random.random() < 0.7 else (pixels // 128 * 255).astype(np.uint8)


def cases(random: np.random.Generator, n: int) -> Iterator[tuple[NDArray[np.uint8], Case]]:
    """Pictures and what to make of them: padded or not, tiles inside, across and outside."""
    for _ in range(n):
        side = [int(px) for px in random.integers(1, 70, 4)]
        size_px, canvas_px = (side[0], side[1]), (side[2], side[3])
        picture_px = canvas_px
        if random.random() < 0.3:
            picture_px = (
                int(random.integers(1, side[2] + 1)),
                int(random.integers(1, side[3] + 1)),
            )
        patch_px = (int(random.integers(1, 20)), int(random.integers(1, 20)))
        grid = random.integers(1, 5, 2)
        corners = random.integers(-40, 80, (random.integers(1, 6), 2))
        yield (
            noise(random, picture_px),
            Case(
                canvas_px,
                size_px,
                str(random.choice(FILTERS)),
                tuple((int(top), int(left)) for top, left in corners),
                (patch_px[0] * int(grid[0]), patch_px[1] * int(grid[1])),
                patch_px,
                bool(random.random() < 0.5),
                (122, 116, 104),
            ),
        )
