"""The front door: what somebody calls a photo becomes pixels, or one ImageError that says why not.

Enters: a path, "-" (stdin), bytes, a binary file, a Pillow image or an array. Leaves: uint8
[H, W, 3], upright, transparency on white. Opening reads the header only and keeps no handle, so
that sizes are known, and refused, before anything is decoded.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgevlm import flatten, image_file, sniff
from edgevlm.errors import ImageError
from edgevlm.settings import DEFAULT_MAX_PIXELS

Pixels: TypeAlias = NDArray[np.uint8]
Source: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | NDArray[Any]
Size: TypeAlias = tuple[int, int]  # (height, width), upright

_HELD_BYTES = 64 << 20  # a JPEG of 100 megapixels has about 50 MB


@dataclass(frozen=True)
class Photo:
    """A picture whose header was read and found acceptable; its pixels are not decoded yet."""

    name: str  # for messages
    height_px: int  # upright, that is after EXIF orientation
    width_px: int
    _decode: Callable[[Size | None], Pixels] = field(repr=False)
    _digest: Callable[[], str | None] = field(repr=False)

    def pixels(self, at_least: Size | None = None) -> Pixels:
        """Decode to uint8 [H, W, 3], C-contiguous, maybe read-only, maybe the caller's own array.

        With `at_least` = (height, width) in px, a JPEG may come at 1/2, 1/4 or 1/8 of its size
        as long as no side falls below; libjpeg then skips most of the work. Colour profiles are
        not applied: the models were trained on pixels read without them.

        Raises: ImageError if the data is damaged or incomplete.
        """
        if at_least is not None and min(at_least) < 1:
            raise ValueError(f"at_least must be two positive sides (height, width): {at_least}")
        return self._decode(at_least)

    def digest(self) -> str | None:
        """SHA-256 of a file's bytes, or of pixels; `pixels` then decodes those very bytes.

        None if the file is too long to be held. Raises: ImageError if it cannot be read.
        """
        return self._digest()

    def mirrored(self) -> Photo:
        """The same photo with left and right exchanged."""
        decode, digest = self._decode, self._digest
        return replace(
            self,
            _decode=lambda size: np.ascontiguousarray(decode(size)[:, ::-1]),
            _digest=lambda: f"{content} mirrored" if (content := digest()) else None,
        )


def load(source: Source, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Pixels:
    """Open and decode at full size: uint8 [H, W, 3]. Raises as `open_image` does."""
    return open_image(source, max_pixels=max_pixels).pixels()


def open_image(source: Source, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Photo:
    """Read the header of a photo: a path, "-", bytes, binary file, Pillow image or uint8 array.

    Arrays are [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], the fourth channel being alpha. A file
    that is no regular file (stdin, a pipe, a file object) is read to its end here.

    Raises: ImageError if it is no photo, unreadable, or has more than `max_pixels`;
    TypeError or ValueError if an array's dtype or shape, or the source's type, is wrong.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        return _from_pillow(source, max_pixels)
    name, reopen = _reopener(source, max_pixels)
    with reopen() as stream:
        image, orientation = image_file.header(stream, name, max_pixels)
        size = flatten.upright_size(image.size, orientation)
    content = _Content(name, reopen)
    decode = partial(image_file.pixels, content.open, name, max_pixels, size)
    return Photo(name, *size, decode, content.digest)


class _Content:
    """A file's bytes; once they were hashed, nobody can change what is decoded next."""

    def __init__(self, name: str, reopen: Callable[[], BinaryIO]) -> None:
        self._name = name
        self._reopen = reopen
        self._hashed: bytes | None = None

    def digest(self) -> str | None:
        with self._reopen() as stream, image_file.decoding(self._name, "a file"):
            data = _read_up_to(stream, _HELD_BYTES + 1)
        if len(data) > _HELD_BYTES:
            return None
        self._hashed = data
        return hashlib.sha256(data).hexdigest()

    def open(self) -> BinaryIO:
        data, self._hashed = self._hashed, None  # held no longer than until it is decoded
        return self._reopen() if data is None else io.BytesIO(data)


def _from_array(array: NDArray[Any], max_pixels: int) -> Photo:
    if array.dtype != np.uint8:
        raise TypeError(
            f"found an array of {array.dtype}, expected uint8: multiply 0–1 values by 255, "
            "round and convert"
        )
    if array.ndim < 2 or array.shape[2:] not in ((), (1,), (3,), (4,)):
        raise ValueError(
            f"found an array of shape {list(array.shape)}, expected [H, W], [H, W, 1], [H, W, 3] "
            "or [H, W, 4]: move the channels last"
        )
    height, width = array.shape[:2]
    image_file.check_pixels((width, height), "<array>", max_pixels)
    if array.shape[2:] == (3,):
        return _decoded("<array>", (height, width), lambda: np.ascontiguousarray(array))
    grey_or_rgba = array[:, :, 0] if array.shape[2:] == (1,) else array
    image = Image.fromarray(np.ascontiguousarray(grey_or_rgba))
    rgb = partial(flatten.upright_rgb, image, 1, "<array>")
    return _decoded("<array>", (height, width), rgb)


def _from_pillow(image: Image.Image, max_pixels: int) -> Photo:
    """Take the host's image at its present frame; it is loaded but otherwise left as it is."""
    name = _printable(str(getattr(image, "filename", "") or "<Pillow image>"))
    image_file.check_pixels(image.size, name, max_pixels)
    with image_file.decoding(name, "a Pillow image"):
        image.load()
        orientation = flatten.exif_orientation(image)

    def rgb() -> Pixels:
        with image_file.decoding(name, "a Pillow image"):
            return flatten.upright_rgb(image, orientation, name)

    return _decoded(name, flatten.upright_size(image.size, orientation), rgb)


def _decoded(name: str, size: Size, rgb: Callable[[], Pixels]) -> Photo:
    """A picture that needs no decoding; what `rgb` gives is converted once."""
    pixels = cache(rgb)

    def digest() -> str:
        sha256 = hashlib.sha256(repr(size).encode())
        sha256.update(pixels().data)
        return sha256.hexdigest()

    return Photo(name, *size, lambda _: pixels(), digest)


def _reopener(source: Any, max_pixels: int) -> tuple[str, Callable[[], BinaryIO]]:
    """Name a source and give a function that opens it afresh, so that no handle stays open."""
    if isinstance(source, bytes | bytearray | memoryview):
        return "<bytes>", partial(io.BytesIO, bytes(source))
    if isinstance(source, str) and source == "-":
        stdin = getattr(sys.stdin, "buffer", None)
        if stdin is None or stdin.closed or stdin.isatty():
            raise ImageError("<stdin>: found no piped data, expected a photo's bytes: pipe one in")
        return "<stdin>", _read_all(stdin, "<stdin>", max_pixels)
    if isinstance(source, str | os.PathLike):
        path = Path(os.fsdecode(source))
        name = _printable(os.fsdecode(source))
        with _finding(name):
            regular = stat.S_ISREG(path.stat().st_mode)
        if regular:
            return name, partial(_open_path, path, name)
        with _open_path(path, name) as stream:  # a named pipe, or the shell's <(...)
            return name, _read_all(stream, name, max_pixels)
    if isinstance(source, io.TextIOBase) or not hasattr(source, "read"):
        raise TypeError(
            "an image is a path, bytes, a binary file, a Pillow image or a uint8 array, "
            f"not {type(source).__name__}"
        )
    label = getattr(source, "name", None)  # a number if it was opened by its descriptor
    name = _printable(label) if isinstance(label, str) else "<file object>"
    return name, _read_all(source, name, max_pixels)


def _printable(name: str) -> str:
    """Keep messages on one short line whatever a file is called."""
    name = name if len(name) <= 300 else f"…{name[-300:]}"
    return name if name.isprintable() and name else ascii(name)


def _open_path(path: Path, name: str) -> BinaryIO:
    with _finding(name):
        return path.open("rb")


@contextmanager
def _finding(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        if "://" in name:
            raise ImageError(f"{name}: found a URL, expected a file: download it first") from error
        raise ImageError(f"{name}: found no such file, expected a photo: check the path") from error
    except IsADirectoryError as error:
        raise ImageError(f"{name}: found a folder, expected one photo: name a file") from error
    except PermissionError as error:
        raise ImageError(
            f"{name}: found a file that may not be read, expected a photo: check its permissions"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = image_file.reason(error)
        raise ImageError(
            f"{name}: found nothing readable ({reason}), expected a photo: check the path"
        ) from error


def _read_all(stream: Any, name: str, max_pixels: int) -> Callable[[], BinaryIO]:
    """Read a stream from its start, but no further than a photo of `max_pixels` can reach."""
    with image_file.decoding(name, "a stream"):
        if hasattr(stream, "seekable") and stream.seekable():
            stream.seek(0)  # as Pillow does: a file just written stands at its end
        head = _read_up_to(stream, sniff.HEAD_BYTES)
        sniff.photo_format(head, name)  # before the rest: an endless stream is no photo
        rest = _read_up_to(stream, image_file.max_bytes(max_pixels) - len(head) + 1)
    image_file.check_bytes(len(head) + len(rest), name, max_pixels)
    return partial(io.BytesIO, head + rest)


def _read_up_to(stream: Any, n_bytes: int) -> bytes:
    parts: list[bytes] = []  # pipes give less than they are asked for; files allocate all of it
    while n_bytes > 0 and (part := stream.read(min(n_bytes, 1 << 20))):
        parts.append(part)
        n_bytes -= len(part)
    return b"".join(parts)
