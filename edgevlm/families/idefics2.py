"""Idefics2: the four quarters of a picture and the whole, each at its own size and shape.

Every patch is a tile of its own, since the tower takes any number of them; a resampler makes the
same few tokens of each view. Sizes and words follow transformers' Idefics2Processor.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

from edgevlm import families
from edgevlm.bundle import MANIFEST, Bundle, check_shape
from edgevlm.errors import BundleError
from edgevlm.layout import Layout, View
from edgevlm.prompt import ImageSlot, Message, Segment, Text
from edgevlm.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Iterator

_IMAGE = {
    "shortest_px": int,  # neither side of a view is shorter
    "longest_px": int,  # nor longer
    "split": bool,  # into quarters
    "patch_px": int,
    "resample": str,
    "n_positions": int,  # learned ones, on each side
    "view_tokens": int,
}
_PROMPT = {
    "border": str,  # around the tokens of each view
    "glue": str,  # between a picture and a word right after it
}
_Box = tuple[int, int, int, int]  # top, left, height, width


class Family(families.Family):
    details = ("low", "auto", "high")

    def __init__(self, bundle: Bundle) -> None:
        self._image = bundle.manifest["image"]
        self._prompt = bundle.manifest["prompt"]
        path = bundle.file(MANIFEST)
        check_shape(path, self._image, _IMAGE)
        check_shape(path, self._prompt, _PROMPT)
        self._turns = Turns(path, self._prompt, tight=True)
        self._patch_px: int = self._image["patch_px"]
        sizes = [self._image[key] for key in ("longest_px", "n_positions", "view_tokens")]
        if min(*sizes, self._patch_px) < 1 or self._image["shortest_px"] < self._patch_px:
            raise BundleError(f"{path}: the sizes of 'image' make no sense: export it again")

    def layout(self, height: int, width: int) -> Layout:
        boxes = [(0, 0, height, width)]
        if {"low": False, "high": True}.get(self.detail, self._image["split"]):
            boxes = [*_quarters(height, width), *boxes]
        return Layout(
            views=tuple(self._view(box) for box in boxes),
            tile_px=self._patch_px,
            patch_px=self._patch_px,
            channels_first=True,
            fill=(0, 0, 0),  # no tile reaches outside
            n_tokens=len(boxes) * self._image["view_tokens"],
            picture_px=(height, width),
        )

    def _view(self, box: _Box) -> View:
        """Patches that the size cuts through are left out: the reference masks them."""
        _, _, height, width = box
        longest, ratio = self._image["longest_px"], width / height
        if width >= height and width > longest:
            height, width = int(longest / ratio), longest
        elif height > width and height > longest:
            height, width = longest, int(longest * ratio)
        height, width = (max(size, self._image["shortest_px"]) for size in (height, width))
        rows, columns = (range(0, size // self._patch_px) for size in (height, width))
        corners = ((y * self._patch_px, x * self._patch_px) for y, x in product(rows, columns))
        return View(height, width, self._image["resample"], tuple(corners), box_px=box)

    def runs(self, layout: Layout) -> families.Runs:
        """The views apart, with the position of each of their patches."""
        from edgevlm.positions import positions  # here: the command line loads families first

        side: int = self._image["n_positions"]
        done, runs = 0, []
        for view in layout.views:
            rows, columns = (
                positions(size // self._patch_px, side) for size in (view.height_px, view.width_px)
            )
            table = (rows[:, None] * side + columns).reshape(-1)  # int64 [patches of the view]
            runs.append((slice(done, done + len(table)), {"positions": table}))
            done += len(table)
        return runs

    def prompt(self, messages: Sequence[Message], layouts: Sequence[Layout]) -> list[Segment]:
        segments = self._turns.segments(
            messages, lambda index: self._picture(index, layouts[index])
        )
        border = self._prompt["border"]
        before_word = re.compile(rf"{re.escape(border)}(?=[^\s<])")
        return [
            Text(before_word.sub(border + self._prompt["glue"], s.text.replace(border * 2, border)))
            if isinstance(s, Text)
            else s
            for s in _joined(segments)
        ]

    def _picture(self, index: int, layout: Layout) -> list[Segment]:
        border, count = Text(self._prompt["border"]), self._image["view_tokens"]
        segments: list[Segment] = []
        for n in range(len(layout.views)):
            segments += [border, ImageSlot(index, count, first=n * count), border]
        return segments

    def describe(self, length: str) -> str:
        return self._turns.describe(length)


def _quarters(height: int, width: int) -> list[_Box]:
    """Row by row. A picture of one pixel's width or height has it in both halves."""
    rows, columns = (
        [(0, max(size // 2, 1)), (size // 2, size - size // 2)] for size in (height, width)
    )
    return [(top, left, down, across) for (top, down), (left, across) in product(rows, columns)]


def _joined(segments: Sequence[Segment]) -> Iterator[Segment]:
    """Neighbouring texts made one."""
    text = ""
    for segment in segments:
        if isinstance(segment, Text):
            text += segment.text
            continue
        yield Text(text)
        yield segment
        text = ""
    yield Text(text)
