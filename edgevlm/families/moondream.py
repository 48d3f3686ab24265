"""Moondream: one picture, many overlapping crops, prompts made of token ids.

bundle.json gives the crops (none, a grid without overlap, or overlapping), and each prompt as a
list of id runs and texts, so that every release of the model is a table and not code. Reference:
vikhyat/moondream, folder moondream/torch, and for 2024 moondream/vision_encoder.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor
from typing import TYPE_CHECKING, Any

from edgevlm import crops, families
from edgevlm.bundle import MANIFEST, Bundle, check_shape
from edgevlm.errors import BundleError, PromptError
from edgevlm.layout import Layout, View
from edgevlm.prompt import ImageSlot, Message, Place, Segment, Text, Thinking, Tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONTENT = "{content}"
_IMAGE = {
    "size_px": int,
    "patch_px": int,
    "resample": str,
    "crops": str,
    "max_crops": int,
    "overlap_patches": int,
    "n_tokens": int,
    "bidirectional_tokens": int,
}
_CROPS = ("single", "grid", "overlap")
_PROMPT = {
    "bos_id": int,
    "eos_id": int,
    "text_only": bool,
    "places": bool,
    "caption": dict,
    "query": list,
    "answer": list,
}


class Family(families.Family):
    def __init__(self, bundle: Bundle) -> None:
        path = bundle.file(MANIFEST)
        self._image = bundle.manifest["image"]
        self._prompt = bundle.manifest["prompt"]
        check_shape(path, self._image, _IMAGE)
        check_shape(path, self._prompt, _PROMPT)
        side, patch, overlap = (
            self._image[key] for key in ("size_px", "patch_px", "overlap_patches")
        )
        if not 0 < patch <= side or side % patch or not 0 <= 2 * overlap < side // patch:
            raise BundleError(f"{path}: {side} px in patches of {patch} px do not make crops")
        if (most := self._image["max_crops"]) < 1:
            raise BundleError(f"{path}: max_crops is {most}; expected 1 or more")
        if self._image["crops"] not in _CROPS:
            raise BundleError(f"{path}: crops is {self._image['crops']!r}; known: {_CROPS}")
        for name, template in self._templates().items():
            if not isinstance(template, list) or not all(
                isinstance(part, (str, list)) for part in template
            ):
                raise BundleError(f"{path}: the prompt's {name!r} is no list of texts and ids")
        self._grid = side // patch  # patches along a crop
        if self._image["crops"] != "single":
            self.details = ("low", "auto", "high")

    def layout(self, height: int, width: int) -> Layout:
        side: int = self._image["size_px"]
        whole = View(side, side, self._image["resample"], ((0, 0),))
        rows, columns = self._tiling(height, width)
        stride = side - 2 * self._margin_px
        corners = tuple((r * stride, c * stride) for r in range(rows) for c in range(columns))
        cut = View(
            rows * stride + 2 * self._margin_px,
            columns * stride + 2 * self._margin_px,
            self._image["resample"],
            corners,
        )
        views = (whole, cut) if self._image["crops"] == "overlap" else (cut,)
        return Layout(
            views=(whole,) if len(corners) == 1 else views,
            tile_px=side,
            patch_px=self._image["patch_px"],
            channels_first=True,
            fill=(0, 0, 0),
            n_tokens=self._image["n_tokens"],
        )

    def graph_inputs(self, layout: Layout) -> Mapping[str, NDArray[Any]]:
        """How the crops' features become one map, [rows, columns], and how that is pooled.

        `index` int64 [rows, columns] says which feature of the batch lies where; `pool_rows`
        float32 [grid, rows] and `pool_columns` float32 [columns, grid] average it. A picture in
        one crop is its own map: the reference encodes that crop twice and gets the same.
        """
        import numpy as np

        if self._image["crops"] == "single":
            return {}
        cut = layout.views[-1]
        stride = self._image["size_px"] - 2 * self._margin_px
        n_rows, n_columns = (
            (px - 2 * self._margin_px) // stride for px in (cut.height_px, cut.width_px)
        )
        crop_row, row = self._stitched(n_rows)
        crop_column, column = self._stitched(n_columns)
        crop = crop_row[:, np.newaxis] * n_columns + crop_column
        if n_rows * n_columns > 1:
            crop += 1  # the whole picture is the batch's first
        inputs: dict[str, NDArray[Any]] = {
            "index": (crop * self._grid + row[:, np.newaxis]) * self._grid + column,
            "pool_rows": self._pooling(len(row)),
            "pool_columns": np.ascontiguousarray(self._pooling(len(column)).T),
        }
        if self._image["crops"] == "grid":
            inputs["grid"] = np.array([n_rows, n_columns], np.int64)
        return inputs

    def prompt(self, messages: Sequence[Message], layouts: Sequence[Layout]) -> list[Segment]:
        segments = self._begin(messages, layouts)
        for message in messages[:-1]:
            segments += self._turn(message)
        return segments + self._turn(messages[-1])

    def thinking(self, messages: Sequence[Message], layouts: Sequence[Layout]) -> Thinking:
        if "think" not in self._prompt:
            raise PromptError("this model does not reason before it answers: ask without")
        if messages[-1].length is not None:
            raise PromptError("a description is not reasoned about: ask a question")
        segments = self._begin(messages, layouts)
        for message in messages[:-1]:
            segments += self._turn(message)
        ids: Mapping[str, Any] = self._prompt["thinking_ids"]
        return Thinking(
            segments=(*segments, *self._fill(self._prompt["think"], messages[-1])),
            then=tuple(ids["then"]),
            end_id=ids["end"],
            coordinate_id=ids["coordinate"],
            chunk_ids=tuple(ids["chunks"]),
            banned_ids=tuple(ids["banned"]),
        )

    def describe(self, length: str) -> str:
        if length not in self._prompt["caption"]:
            raise PromptError(
                f"length is {length!r}; this model knows {', '.join(self._prompt['caption'])}"
            )
        return f"{length.capitalize()} caption"

    def detect_prompt(self, thing: str) -> list[Segment]:
        return self._locating("detect", thing)

    def point_prompt(self, thing: str) -> list[Segment]:
        return self._locating("point", thing)

    def gaze_prompt(self, eye: Place) -> list[Segment]:
        return self._locating("gaze", "", eye)

    def _locating(self, task: str, thing: str, *places: Place) -> list[Segment]:
        if task not in self._prompt:
            raise PromptError(f"this release of the model cannot {task}: use one of 2025")
        if not thing.strip() and not places:
            raise PromptError(f"nothing to {task} was named")
        asked = Message("user", thing.strip(), (0,), places=places)
        return [*self._picture(0), *self._fill(self._prompt[task], asked)]

    def _begin(self, messages: Sequence[Message], layouts: Sequence[Layout]) -> list[Segment]:
        """The picture in front of everything; BOS alone where there is none."""
        if any(message.role == "system" for message in messages):
            raise PromptError("this model takes no system message: put it into the question")
        if any(message.images for message in messages[1:]):
            raise PromptError("this model sees one picture, at the start: begin a new chat")
        if len(layouts) > 1:
            raise PromptError(f"this model sees one picture at a time; {len(layouts)} were given")
        if layouts:
            return self._picture(messages[0].images[0])
        if not self._prompt["text_only"]:
            raise PromptError("this release of the model answers only about a picture: give one")
        return [Tokens((self._prompt["bos_id"],))]

    def _picture(self, index: int) -> list[Segment]:
        """BOS and the picture; a bidirectional slot holds the row of BOS itself."""
        bidirectional = self._image["bidirectional_tokens"] > 0
        slot = ImageSlot(index, self._image["n_tokens"], bidirectional=bidirectional)
        return [slot] if bidirectional else [Tokens((self._prompt["bos_id"],)), slot]

    def _turn(self, message: Message) -> list[Segment]:
        if message.places and not self._prompt["places"]:
            raise PromptError("this release of the model takes no places in a question")
        if message.role == "assistant":
            return self._fill(self._prompt["answer"], message)
        if message.length is not None:
            return self._fill(self._prompt["caption"][message.length], message)
        return self._fill(self._prompt["query"], message)

    def _fill(self, template: Sequence[str | list[int]], message: Message) -> list[Segment]:
        segments: list[Segment] = []
        for part in template:
            if isinstance(part, list):
                segments.append(Tokens(tuple(part)))
                continue
            before, mark, after = part.partition(CONTENT)
            content: list[Segment] = []
            if mark:
                content = [*message.places, Text(message.text.strip())]
            segments += [Text(before), *content, Text(after)]
        return [s for s in segments if not isinstance(s, Text) or s.text]

    def _templates(self) -> dict[str, Any]:
        names = ("query", "answer", "think", "detect", "point", "gaze")
        return {
            **{name: self._prompt[name] for name in names if name in self._prompt},
            **{f"caption {key}": value for key, value in self._prompt["caption"].items()},
        }

    @property
    def _margin_px(self) -> int:
        return int(self._image["overlap_patches"] * self._image["patch_px"])

    def _tiling(self, height: int, width: int) -> crops.Grid:
        """Rows and columns of crops."""
        kind, side, most = (self._image[key] for key in ("crops", "size_px", "max_crops"))
        if kind == "single" or self.detail == "low":
            return 1, 1
        margin = 2 * self._margin_px
        if self.detail == "high":
            allowed = crops.GRIDS if kind == "grid" else crops.every(most)
            return crops.finest(height, width, side - margin, margin, allowed)
        if kind == "grid":
            return crops.grid(height, width, side)
        return crops.overlapping(height - margin, width - margin, side - margin, most)

    def _stitched(self, n_crops: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Crop and patch within it at each place of one axis: a crop gives up its border of
        `overlap_patches` where it meets another."""
        import numpy as np

        overlap: int = self._image["overlap_patches"]
        stride = self._grid - 2 * overlap
        place = np.arange(n_crops * stride + 2 * overlap)
        crop = np.clip((place - overlap) // stride, 0, n_crops - 1)
        return crop, place - crop * stride

    def _pooling(self, n: int) -> NDArray[Any]:
        """float32 [grid, n]: averages n values down to `grid`, in cells that may share their ends
        (torch's adaptive_avg_pool2d; where n is a multiple of grid, also its bilinear
        interpolation by two)."""
        import numpy as np

        weights = np.zeros((self._grid, n), np.float32)
        for cell in range(self._grid):
            start, stop = floor(cell * n / self._grid), ceil((cell + 1) * n / self._grid)
            weights[cell, start:stop] = 1 / (stop - start)
        return weights
