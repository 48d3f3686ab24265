"""A photo's file, open as a stream → its header, then its pixels, or an ImageError.

Only the plug-in for the one format that sniff found runs: Pillow's full list reaches as far as
Ghostscript. Whatever a codec raises on damaged data leaves as one line. `name` is for messages.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from edgevlm import flatten, sniff
from edgevlm.errors import EdgeVLMError, ImageError

_PLUGINS = {  # format: module, class
    "AVIF": ("PIL.AvifImagePlugin", "AvifImageFile"),
    "BMP": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "GIF": ("PIL.GifImagePlugin", "GifImageFile"),
    "HEIF": ("pillow_heif", "HeifImageFile"),
    # MPO is a JPEG with more JPEGs behind it; the plain plug-in reads the first one.
    "JPEG": ("PIL.JpegImagePlugin", "JpegImageFile"),
    "PNG": ("PIL.PngImagePlugin", "PngImageFile"),
    "PPM": ("PIL.PpmImagePlugin", "PpmImageFile"),
    "TIFF": ("PIL.TiffImagePlugin", "TiffImageFile"),
    "WEBP": ("PIL.WebPImagePlugin", "WebPImageFile"),
}
_READ_WHOLE = {"AVIF", "HEIF", "WEBP"}  # their plug-ins copy the file into memory to see the header
_NEW_SUBFILE_TYPE = 254  # TIFF 6.0, section 8; bit 0: a reduced copy of another picture in the file


def header(stream: BinaryIO, name: str, max_pixels: int) -> tuple[ImageFile.ImageFile, int]:
    """Run the one plug-in that fits: an image not decoded yet, and its orientation.

    The plug-in's class is called directly because Image.open would apply Pillow's process-wide
    MAX_IMAGE_PIXELS; ours is per call.
    """
    with decoding(name, "a file"):
        kind = sniff.photo_format(stream.read(sniff.HEAD_BYTES), name)
        if kind in _READ_WHOLE:
            check_bytes(stream.seek(0, os.SEEK_END), name, max_pixels)
        stream.seek(0)
    plugin = _plugin(kind, name)
    with decoding(name, f"{kind} data"):
        image: ImageFile.ImageFile = plugin(stream)
        check_pixels(image.size, name, max_pixels)
        if kind == "TIFF":
            # The raw files of most cameras are TIFFs that open with a thumbnail.
            if getattr(image, "tag_v2", {}).get(_NEW_SUBFILE_TYPE, 0) & 1:
                raise sniff.camera_raw(name)
            return image, 1  # Pillow turns it while decoding and reports the turned size
        if kind == "PNG" and "exif" not in image.info and (exif := _late_exif(stream)):
            image.info["exif"] = exif
        return image, flatten.exif_orientation(image)


def _plugin(kind: str, name: str) -> Any:
    module, class_name = _PLUGINS[kind]
    try:
        imported = importlib.import_module(module)
        if not getattr(imported, "SUPPORTED", True):
            raise ImportError("Pillow was built without this codec")
    except ImportError as error:
        found, install = kind, "pip install -U pillow"
        if kind == "HEIF":
            found, install = "HEIF (HEIC)", "pip install edgevlm[heif]"
        raise ImageError(
            f"{name}: found {found}, expected a format that is installed here: {install}, "
            "or convert it to JPEG"
        ) from error
    return getattr(imported, class_name)


def _late_exif(stream: BinaryIO) -> bytes:
    """Find a PNG's eXIf chunk that stands behind the picture data, without decoding."""
    position = stream.tell()
    stream.seek(8)
    exif = b""
    while len(header := stream.read(8)) == 8 and header[4:] != b"IEND":
        n_bytes = int.from_bytes(header[:4], "big")
        if header[4:] == b"eXIf":
            exif = stream.read(min(n_bytes, 1 << 20))
            break
        stream.seek(n_bytes + 4, os.SEEK_CUR)
    stream.seek(position)
    return exif


def pixels(
    reopen: Callable[[], BinaryIO],
    name: str,
    max_pixels: int,
    size: tuple[int, int],
    at_least: tuple[int, int] | None,
) -> NDArray[np.uint8]:
    """Decode a file whose header gave `size`: uint8 [H, W, 3]; `at_least` may reduce a JPEG.

    Both sizes are (height, width), upright.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ImageError(
            f"{name}: found PIL.ImageFile.LOAD_TRUNCATED_IMAGES on in this process, expected off: "
            "it gives half pictures without a word; turn it off or pass decoded pixels"
        )
    with reopen() as stream:
        image, orientation = header(stream, name, max_pixels)
        if flatten.upright_size(image.size, orientation) != size:
            raise ImageError(f"{name}: found a file that changed while it was read: try again")
        with decoding(name, f"{image.format} data"):
            if image.format == "JPEG" and at_least is not None:
                image.draft(None, flatten.upright_size(at_least, orientation))
            if image.format == "PNG":
                flatten.scale_transparent_colour(image)
            if canvas_size := getattr(image, "_tile_size", None):
                # TIFF: Pillow would ask its process-wide limit when it makes this canvas
                image.im = Image.new(image.mode, canvas_size).im
            size_expected = image.size
            image.load()
            if image.size != size_expected:
                raise ValueError(f"the header said {size_expected}, the data {image.size}")
            return flatten.upright_rgb(image, orientation, name)


def check_pixels(size: tuple[int, int], name: str, max_pixels: int) -> None:
    """Refuse a picture without pixels or with too many; `size` is Pillow's (width, height)."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: found a picture of {width} × {height} px, expected some pixels")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: found {width} × {height} px ({width * height / 1e6:.4g} megapixels), "
            f"expected at most {max_pixels / 1e6:.4g}: save it smaller or raise the limit "
            "(max_pixels)"
        )


def check_bytes(n_bytes: int, name: str, max_pixels: int) -> None:
    if n_bytes > max_bytes(max_pixels):
        raise ImageError(
            f"{name}: found more than {max_bytes(max_pixels) >> 20} MiB of data, expected a photo "
            f"of at most {max_pixels / 1e6:g} megapixels: save it smaller"
        )


def max_bytes(max_pixels: int) -> int:
    """The largest file that is worth holding: 16-bit RGBA without compression, and metadata."""
    return 8 * max_pixels + (64 << 20)


@contextmanager
def decoding(name: str, what: str) -> Iterator[None]:
    """Turn whatever reading or decoding raises into an ImageError."""
    try:
        yield
    except EdgeVLMError:
        raise
    except MemoryError as error:
        raise ImageError(
            f"{name}: found {what} that memory does not hold, expected a smaller one: "
            "shrink it or free memory"
        ) from error
    except Exception as error:
        # On damaged files Pillow and its codecs raise nearly everything: LookupError, TypeError,
        # ArithmeticError, struct.error, warnings that the host turned into errors ...
        raise ImageError(
            f"{name}: found {what} that cannot be read ({reason(error)}), expected a whole "
            "photo: it is damaged, incomplete or of a rare kind; export or fetch it again"
        ) from error


def reason(error: BaseException) -> str:
    """Pillow's words on one short line; an OSError's without the path that we print ourselves."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:120]
