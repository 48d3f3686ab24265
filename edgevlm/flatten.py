"""A decoded Pillow image of any mode → upright uint8 RGB [H, W, 3], transparency on white.

Pillow's own conversions clip 16 bits at 255, drop alpha and leave EXIF orientation to the caller.
The work goes strip by strip: np.asarray(image) joins small pieces of the whole picture; strips that
stay in the cache are four times faster and keep every conversion's temporary arrays small.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile

from edgevlm.errors import ImageError

_STRIP_PIXELS = 1 << 18  # 1 MB of Pillow's pixels: stays in the L2 cache between crop and copy
_TURNS = {  # EXIF 2.3, table 4
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8, without decoding."""
    try:
        # The base method: PngImageFile's own decodes the whole picture in search of a late eXIf.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:
        return 1  # broken metadata around a sound picture: show it as stored, as viewers do
    return value if isinstance(value, int) and value in _TURNS else 1


def upright_size(stored: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Pillow's (width, height) as stored → (height, width) after turning; and the way back."""
    return stored if orientation >= 5 else stored[::-1]


def upright_rgb(image: Image.Image, orientation: int, name: str) -> NDArray[np.uint8]:
    """Turn, convert and copy a loaded image: uint8 [H, W, 3].

    Raises: ImageError if the image called `name` has 32-bit values of unknown range.
    """
    white = _white(image)
    if white is None and image.mode in ("I", "F"):
        raise ImageError(
            f"{name}: found 32-bit values without a stated range (mode {image.mode}), expected 8 "
            "or 16 bits: scale it to 0–255 and save it as PNG"
        )
    height, width = upright_size(image.size, orientation)
    out = np.empty((height, width, 3), np.uint8)
    n_rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, n_rows):
        bottom = min(top + n_rows, height)
        strip = image.crop(_stored_box(image.size, orientation, top, bottom))
        strip = _on_white(strip) if white is None else _to_8_bits(strip, white)
        if orientation in _TURNS:
            strip = strip.transpose(_TURNS[orientation])
        data = np.frombuffer(strip.tobytes(), np.uint8)  # uint8 [rows * W * 3]
        out[top:bottom] = data.reshape(bottom - top, width, 3)
    return out


def scale_transparent_colour(image: ImageFile.ImageFile) -> None:
    """Before a PNG is loaded, bring its transparent colour to 8 bits: Pillow scales pixels only."""
    colour = image.info.get("transparency")
    raw_mode = image.tile[0][3] if image.tile else None
    if raw_mode == "RGB;16B" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    elif raw_mode in ("L;2", "L;4") and isinstance(colour, int):
        image.info["transparency"] = colour * (85 if raw_mode == "L;2" else 17)


def _stored_box(
    stored: tuple[int, int], orientation: int, top: int, bottom: int
) -> tuple[int, int, int, int]:
    """Where upright rows top to bottom lie in the stored picture: left, top, right, bottom."""
    width, height = stored
    if orientation in (3, 4):
        return 0, height - bottom, width, height - top
    if orientation in (5, 6):
        return top, 0, bottom, height
    if orientation in (7, 8):
        return width - bottom, 0, width - top, height
    return 0, top, width, bottom


def _on_white(image: Image.Image) -> Image.Image:
    """Convert up to 8 bits a channel to RGB."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")  # Pillow has no direct way
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _to_8_bits(image: Image.Image, white: int) -> Image.Image:
    """Scale grey from 0..white to 0..255, rounded."""
    values = np.asarray(image).astype(np.int32)  # int32 [rows, W]
    grey = ((values.clip(0, white) * 255 + white // 2) // white).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def _white(image: Image.Image) -> int | None:
    """The value of white if pixels are wider than a byte and it is known."""
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample)
        return 4095 if bits == (12,) else 65535  # Pillow unpacks a 12-bit TIFF, but does not scale
    # Pillow reads 16-bit PGM as 32-bit integers
    return 65535 if image.mode == "I" and image.format == "PPM" else None
