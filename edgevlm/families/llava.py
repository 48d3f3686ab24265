"""LLaVA and its relatives: one view, one square tile, a fixed number of image tokens.

bundle.json gives the fit (crop, pad or stretch) and the words around a turn. Sizes follow
transformers' CLIPImageProcessor and LLaVA's own `expand2square`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgevlm import families
from edgevlm.bundle import MANIFEST, Bundle, check_shape
from edgevlm.errors import BundleError
from edgevlm.layout import Layout, View
from edgevlm.prompt import ImageSlot, Message, Segment
from edgevlm.turns import Turns

if TYPE_CHECKING:
    from numpy.typing import NDArray

_IMAGE = {
    "fit": str,
    "size_px": int,
    "patch_px": int,
    "channels_first": bool,
    "resample": str,
    "fill": list,
    "n_tokens": int,
}
_FEWEST_TOKENS = 4  # with one of them made of many
_FITS = ("crop", "pad", "stretch")
_FILTERS = ("bicubic", "bilinear", "lanczos", "box")


class Family(families.Family):
    def __init__(self, bundle: Bundle) -> None:
        self._image = bundle.manifest["image"]
        path = bundle.file(MANIFEST)
        check_shape(path, self._image, _IMAGE)
        self._turns = Turns(path, bundle.manifest["prompt"])
        side, patch, fill = (self._image[key] for key in ("size_px", "patch_px", "fill"))
        if self._image.get("shortens"):
            self.shorter = range(_FEWEST_TOKENS, self._image["n_tokens"])
        for key, fits, expected in (
            ("fit", self._image["fit"] in _FITS, f"one of {', '.join(_FITS)}"),
            ("resample", self._image["resample"] in _FILTERS, f"one of {', '.join(_FILTERS)}"),
            ("size_px", 0 < patch <= side, f"{max(patch, 1)} or more"),
            ("fill", len(fill) == 3 and all(v in range(256) for v in fill), "RGB, 0 to 255"),
            ("n_tokens", self._image["n_tokens"] > 0, "1 or more"),
        ):
            if not fits:
                raise BundleError(f"{path}: {key} is {self._image[key]!r}; expected {expected}")

    def layout(self, height: int, width: int) -> Layout:
        side: int = self._image["size_px"]
        patch_px: int = self._image["patch_px"]
        fit: str = self._image["fit"]
        height_px, width_px = side, side
        if fit == "crop":  # short side to `side`, long side truncated (transformers)
            short, long = sorted((height, width))
            scaled = int(side * long / short)
            height_px, width_px = (scaled, side) if height > width else (side, scaled)
        corner = ((height_px - side) // 2, (width_px - side) // 2)
        view = View(height_px, width_px, self._image["resample"], (corner,), fit == "pad")
        red, green, blue = self._image["fill"]
        return Layout(
            views=(view,),
            tile_px=side - side % patch_px,  # whole patches, from the top left (384 px by 14)
            patch_px=patch_px,
            channels_first=self._image["channels_first"],
            fill=(red, green, blue),
            n_tokens=self.visual_tokens or self._image["n_tokens"],
        )

    def graph_inputs(self, layout: Layout) -> Mapping[str, NDArray[Any]]:
        import numpy as np  # here, because the command line loads families without it

        if self.visual_tokens is None:
            return {}
        return {"visual_tokens": np.array(self.visual_tokens, np.int64)}

    def prompt(self, messages: Sequence[Message], layouts: Sequence[Layout]) -> list[Segment]:
        return self._turns.segments(
            messages, lambda index: [ImageSlot(index, layouts[index].n_tokens)]
        )

    def describe(self, length: str) -> str:
        return self._turns.describe(length)
