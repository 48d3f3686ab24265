"""LLaVA and its relatives: one view, one square tile, a fixed number of image tokens.

bundle.json gives the fit (crop, pad or stretch) and the words around a turn. Sizes follow
transformers' CLIPImageProcessor and LLaVA's own `expand2square`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgevlm.bundle import MANIFEST, Bundle, check_shape
from edgevlm.errors import BundleError, PromptError
from edgevlm.layout import Layout, View
from edgevlm.prompt import ImageSlot, Message, Segment, Text

_IMAGE = {
    "fit": str,
    "size_px": int,
    "patch_px": int,
    "channels_first": bool,
    "resample": str,
    "fill": list,
    "n_tokens": int,
}
_FITS = ("crop", "pad", "stretch")
_FILTERS = ("bicubic", "bilinear", "lanczos", "box")
_PROMPT = {
    "bos": bool,
    "system": str,
    "user": str,
    "assistant": str,
    "generate": str,
    "image": str,
    "image_token": str,
    "describe": {"short": str, "normal": str, "long": str},
}


class Family:
    def __init__(self, bundle: Bundle) -> None:
        self._image = bundle.manifest["image"]
        self._prompt = bundle.manifest["prompt"]
        path = bundle.file(MANIFEST)
        check_shape(path, self._image, _IMAGE)
        check_shape(path, self._prompt, _PROMPT)
        slot = self._prompt["image_token"]
        for key, mark in (("user", "{content}"), ("assistant", "{content}"), ("image", slot)):
            if not mark or self._prompt[key].count(mark) != 1:
                raise BundleError(f"{path}: the prompt's {key!r} must hold {mark!r} once")
        side, patch, fill = (self._image[key] for key in ("size_px", "patch_px", "fill"))
        for key, fits, expected in (
            ("fit", self._image["fit"] in _FITS, f"one of {', '.join(_FITS)}"),
            ("resample", self._image["resample"] in _FILTERS, f"one of {', '.join(_FILTERS)}"),
            ("size_px", 0 < patch <= side and side % patch == 0, f"a multiple of {patch}"),
            ("fill", len(fill) == 3 and all(v in range(256) for v in fill), "RGB, 0 to 255"),
            ("n_tokens", self._image["n_tokens"] > 0, "1 or more"),
        ):
            if not fits:
                raise BundleError(f"{path}: {key} is {self._image[key]!r}; expected {expected}")

    def layout(self, height: int, width: int) -> Layout:
        side: int = self._image["size_px"]
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
            tile_px=side,
            patch_px=self._image["patch_px"],
            channels_first=self._image["channels_first"],
            fill=(red, green, blue),
            n_tokens=self._image["n_tokens"],
        )

    def prompt(self, messages: Sequence[Message], layouts: Sequence[Layout]) -> list[Segment]:
        segments: list[Segment] = []
        if not messages or messages[0].role != "system":
            segments.append(Text(self._prompt["system"]))
        for message in messages:
            before, after = self._around(message.role)
            segments.append(Text(before))
            for index in message.images:
                ahead, behind = self._prompt["image"].split(self._prompt["image_token"])
                slot = ImageSlot(index, layouts[index].n_tokens)
                segments += [Text(ahead), slot, Text(behind)]
            segments += [Text(message.text.strip()), Text(after)]
        segments.append(Text(self._prompt["generate"]))
        return [s for s in segments if not isinstance(s, Text) or s.text]

    def describe(self, length: str) -> str:
        questions: Mapping[str, str] = self._prompt["describe"]
        if length not in questions:
            raise PromptError(f"length is {length!r}; it must be one of {', '.join(questions)}")
        return questions[length]

    def _around(self, role: str) -> tuple[str, str]:
        template: str = self._prompt["user" if role == "system" else role]
        before, after = template.split("{content}")
        return before, after
