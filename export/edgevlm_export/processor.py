"""preprocessor_config.json → the image section of bundle.json, and what the tower's weights absorb.

Covers the CLIP, SigLIP and LLaVA image processors of transformers: resize and centre crop, pad to
a square, or stretch. A setting that the runtime would not reproduce is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevlm.errors import BundleError

from .checkpoint import NUMBER, Checkpoint, Config, Kinds, section
from .tower import Normalisation

FITS = ("crop", "pad", "stretch")
_RESAMPLE = {1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box"}  # PIL.Image.Resampling
_KINDS = ("CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor")
_KEYS: Kinds = {
    "size": (int, dict),
    "crop_size": (int, dict),
    "image_mean": (int, float, list),
    "image_std": (int, float, list),
    "rescale_factor": NUMBER,
    "resample": int,
}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Processor:
    fit: str
    size_px: int
    resample: str
    fill: tuple[int, int, int]
    normalisation: Normalisation

    def section(self, patch_px: int, n_tokens: int) -> dict[str, Any]:
        """bundle.json's "image"; patches are flattened as a convolution kernel is."""
        return {
            "fit": self.fit,
            "size_px": self.size_px,
            "patch_px": patch_px,
            "channels_first": True,
            "resample": self.resample,
            "fill": list(self.fill),
            "n_tokens": n_tokens,
        }


def read(checkpoint: Checkpoint, fit: str | None) -> Processor:
    """The checkpoint's image processor; `fit` overrides how a picture meets the square."""
    config, where, kind = stored(checkpoint, _KINDS)
    if fit is not None and fit not in FITS:
        raise BundleError(f"fit {fit!r} is unknown; known: {', '.join(FITS)}")
    siglip = kind == "SiglipImageProcessor"
    found, size_px = _size(config, where, siglip)
    if config.get("do_pad") and kind == "LlavaImageProcessor":
        found = "pad"
    mean: Any = 0.5 if siglip else CLIP_MEAN
    red, green, blue = three(config.get("image_mean", mean), where)
    return Processor(
        fit=fit or found,
        size_px=size_px,
        resample=resample(config, 3, where),
        fill=(int(red * 255), int(green * 255), int(blue * 255)),  # as LLaVA truncates
        normalisation=normalisation(config, mean, 0.5 if siglip else CLIP_STD, where),
    )


def stored(checkpoint: Checkpoint, kinds: Sequence[str]) -> tuple[Config, Path, str]:
    """The image processor's config, the file it is in, and which of `kinds` it is."""
    config, where = _config(checkpoint)
    config = section(config, _KEYS, where)
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    kind = kind.removesuffix("Fast").removesuffix("Pil")  # one processor's other backends
    kind = kind.replace("FeatureExtractor", "ImageProcessor")  # its name before 2023
    if kind not in kinds:
        raise BundleError(f"{where} is for {kind or 'an unnamed processor'}; known: {kinds}")
    if not config.get("do_resize", True):
        raise BundleError(f"{where} turns do_resize off: one size is needed")
    return config, where, kind


def wrapper(checkpoint: Checkpoint) -> str:
    """The class that joins image processor and tokenizer, as saved with them; "" if unnamed."""
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if kind := (checkpoint.json(name) or {}).get("processor_class"):
            return str(kind)
    return ""


def resample(config: Config, default: int, where: Path) -> str:
    """The name of the resize's filter."""
    code = config.get("resample", default)
    if code not in _RESAMPLE:
        raise BundleError(f"{where} resamples with {code}; known: {_RESAMPLE}")
    return _RESAMPLE[code]


def normalisation(config: Config, mean: Any, std: Any, where: Path) -> Normalisation:
    """What happens to a pixel's value; `mean` and `std` are the processor's defaults."""
    rescale = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    if not config.get("do_normalize", True):
        return Normalisation(rescale, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return Normalisation(
        rescale,
        three(config.get("image_mean", mean), where),
        three(config.get("image_std", std), where),
    )


def _config(checkpoint: Checkpoint) -> tuple[Config, Path]:
    """The image processor's own file, or its part of the file that transformers 5 writes."""
    config = checkpoint.json("preprocessor_config.json")
    if config is not None:
        return config, checkpoint.directory / "preprocessor_config.json"
    config = (checkpoint.json("processor_config.json") or {}).get("image_processor")
    if config is None and "image_processor" in checkpoint.config:  # known by the tower's name
        return checkpoint.config["image_processor"], checkpoint.directory / "config.json"
    if not isinstance(config, dict):
        raise BundleError(
            f"{checkpoint.directory} has no preprocessor_config.json: how pictures are prepared "
            "is part of the model"
        )
    return config, checkpoint.directory / "processor_config.json"


def _size(config: Config, where: Path, siglip: bool) -> tuple[str, int]:
    """How a picture meets the square, and its side in px."""
    default: dict[str, int] = {"height": 224, "width": 224} if siglip else {"shortest_edge": 224}
    size = config.get("size", default)
    if isinstance(size, int):  # configs of 2022
        size = {"shortest_edge": size}
    crop: Any = None
    if config.get("do_center_crop", not siglip):
        crop = config.get("crop_size", 224)
        crop = crop if isinstance(crop, int) else (crop.get("height"), crop.get("width"))
        crop = (crop, crop) if isinstance(crop, int) else crop
    if "shortest_edge" in size and not size.get("longest_edge"):
        side = size["shortest_edge"]
        if crop == (side, side):
            return "crop", int(side)
    elif (side := size.get("height", 0)) == size.get("width") and crop in (None, (side, side)):
        return "stretch", int(side)
    raise BundleError(
        f"{where} resizes to {size} and crops to {crop}: only one square size can be exported"
    )


def three(value: Any, where: Path) -> tuple[float, float, float]:
    """One number for each of R, G and B."""
    channels = [value] * 3 if isinstance(value, NUMBER) else list(value)
    if len(channels) != 3 or not all(isinstance(channel, NUMBER) for channel in channels):
        raise BundleError(f"{where} has {value!r:.60} where three numbers are needed")
    red, green, blue = map(float, channels)
    return red, green, blue
