"""How many crops a picture is cut into, as rows and columns: pure functions of its size.

`overlapping` and `grid` choose as the references that the family names, `finest` gives the most
detail.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, floor, sqrt

Grid = tuple[int, int]  # rows, columns

GRIDS: tuple[Grid, ...] = ((1, 1), (1, 2), (2, 1), (2, 2))
_LARGE_PX = 512  # pictures with a smaller long side are not cut into a `grid`


def every(most: int) -> list[Grid]:
    """All of at most `most` crops."""
    return [(r, c) for r in range(1, most + 1) for c in range(1, most // r + 1)]


def overlapping(height: int, width: int, stride: int, most: int) -> Grid:
    """Of at most `most` crops, for a picture without its margins (image_crops.py,
    `select_tiling`)."""
    if height <= stride or width <= stride:
        return 1, 1
    rows, columns = ceil(height / stride), ceil(width / stride)
    if rows * columns > most:
        ratio = sqrt(most / (rows * columns))
        return max(1, floor(rows * ratio)), max(1, floor(columns * ratio))
    rows = max(floor(sqrt(most * height / width)), rows)
    columns = max(floor(sqrt(most * width / height)), columns)
    if rows * columns > most:
        if columns > rows:
            columns = floor(most / rows)
        else:
            rows = floor(most / columns)
    return max(1, rows), max(1, columns)


def grid(height: int, width: int, side: int) -> Grid:
    """One of GRIDS, the one of most alike shape (vision_encoder.py, `resize` of 2024)."""
    if max(height, width) < _LARGE_PX:
        return 1, 1
    return min(
        GRIDS,
        key=lambda n: (
            abs(n[1] / n[0] - width / height),
            # the reference takes the height's side from the width and the other way round
            abs(n[0] * side - width) + abs(n[1] * side - height),
        ),
    )


def finest(height: int, width: int, stride: int, margin: int, grids: Iterable[Grid]) -> Grid:
    """The grid that enlarges the picture's coarser axis most, and of equals the smallest.

    n crops of `stride` pixels and a `margin` in all cover n · stride + margin pixels of an axis.
    """
    return max(
        grids,
        key=lambda n: (
            min((n[0] * stride + margin) / height, (n[1] * stride + margin) / width),
            -n[0] * n[1],
        ),
    )
