"""Idefics3 and SmolVLM: a grid of tiles and the whole picture once more, each with its name.

A picture is resized twice before it is cut, as transformers' Idefics3ImageProcessor does it; the
prompt names every tile's row and column (processing_idefics3.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgevlm import families
from edgevlm.bundle import MANIFEST, Bundle, check_shape
from edgevlm.errors import BundleError
from edgevlm.layout import Layout, View
from edgevlm.prompt import ImageSlot, Message, Segment, Text
from edgevlm.turns import Turns

_IMAGE = {
    "longest_px": int,  # of the picture's sides after the first resize
    "tile_px": int,
    "split": bool,  # into tiles; else the whole picture is all
    "patch_px": int,
    "resample": str,
    "tile_tokens": int,
}
_PROMPT = {
    "border": str,  # before each tile and after the last
    "tile": str,  # with {row} and {column}, from 1
    "whole": str,
}
_LARGEST_PX = 4096  # MAX_IMAGE_SIZE in image_processing_idefics3.py


class Family(families.Family):
    details = ("low", "auto", "high")

    def __init__(self, bundle: Bundle) -> None:
        self._image = bundle.manifest["image"]
        self._prompt = bundle.manifest["prompt"]
        path = bundle.file(MANIFEST)
        check_shape(path, self._image, _IMAGE)
        check_shape(path, self._prompt, _PROMPT)
        self._turns = Turns(path, self._prompt, tight=True)
        self._tile_px: int = self._image["tile_px"]
        counts = [self._image[key] for key in ("longest_px", "tile_tokens", "patch_px")]
        if min(*counts, self._tile_px) < 1 or self._tile_px % self._image["patch_px"]:
            raise BundleError(f"{path}: the sizes of 'image' make no sense: export it again")

    def layout(self, height: int, width: int) -> Layout:
        side, first = self._tile_px, self._longest(height, width)
        corners: list[tuple[int, int]] = [(0, 0)]
        steps = [first, (side, side)]  # the sizes that the whole picture goes through
        views: list[View] = []
        resample: str = self._image["resample"]
        if {"low": False, "high": True}.get(self.detail, self._image["split"]):
            height_px, width_px = grid = self._multiple(*first)
            steps = [first, grid, (side, side)]
            corners = [(y, x) for y in range(0, height_px, side) for x in range(0, width_px, side)]
            if len(corners) > 1:
                views.append(View(*grid, resample, tuple(corners), via_px=(first, grid)))
        views.append(View(side, side, resample, ((0, 0),), via_px=tuple(steps[:-1])))
        return Layout(
            views=tuple(views),
            tile_px=side,
            patch_px=self._image["patch_px"],
            channels_first=True,
            fill=(0, 0, 0),  # no tile reaches outside
            n_tokens=sum(len(view.tiles) for view in views) * self._image["tile_tokens"],
        )

    def _longest(self, height: int, width: int) -> tuple[int, int]:
        """The long side as configured, the short one in proportion and even."""
        wide = width >= height
        height, width = _scaled(height, width, self._image["longest_px"])
        if wide:
            height = max(1, height + height % 2)
        else:
            width = max(1, width + width % 2)
        if max(height, width) > _LARGEST_PX:
            height, width = _scaled(height, width, _LARGEST_PX)
        return max(1, height), max(1, width)

    def _multiple(self, height: int, width: int) -> tuple[int, int]:
        """Both sides multiples of the tile's."""
        side = self._tile_px
        longest = math.ceil(max(height, width) / side) * side
        height, width = _scaled(height, width, longest)
        return math.ceil(height / side) * side, math.ceil(width / side) * side

    def runs(self, layout: Layout) -> families.Runs:
        return families.one_by_one(layout)

    def prompt(self, messages: Sequence[Message], layouts: Sequence[Layout]) -> list[Segment]:
        return self._turns.segments(messages, lambda index: self._picture(index, layouts[index]))

    def _picture(self, index: int, layout: Layout) -> list[Segment]:
        """Row by row, an empty line, the whole picture."""
        border, count = self._prompt["border"], self._image["tile_tokens"]
        segments: list[Segment] = []
        first = 0
        if layout.n_tiles > 1:
            for top, left in layout.views[0].tiles:
                row, column = top // self._tile_px + 1, left // self._tile_px + 1
                name = self._prompt["tile"].replace("{row}", str(row))
                name = name.replace("{column}", str(column))
                line = "\n" if left == 0 and top > 0 else ""
                segments += [Text(line + border + name), ImageSlot(index, count, first=first)]
                first += count
            segments.append(Text("\n\n"))
        segments += [Text(border + self._prompt["whole"]), ImageSlot(index, count, first=first)]
        return [*segments, Text(border)]

    def describe(self, length: str) -> str:
        return self._turns.describe(length)


def _scaled(height: int, width: int, longest: int) -> tuple[int, int]:
    """The long side as given, the short one truncated; in the reference's order of roundings."""
    ratio = width / height
    if width >= height:
        return int(longest / ratio), longest
    return longest, int(longest * ratio)
