"""The pictures on which int8 is measured while exporting: the caller's, or drawn ones.

Drawn ones have the statistics that matter to a tower: a spectrum that falls as photographs' does
(1/f amplitude, Field 1987), channels that go together, and objects with hard edges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgevlm import image
from edgevlm.errors import ImageError

Pixels = npt.NDArray[np.uint8]  # [H, W, 3]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_SIZES_PX = ((480, 640), (640, 480), (512, 512), (360, 800))  # height, width


def read(paths: Sequence[Path]) -> Iterator[Pixels]:
    """The photos at `paths` (files, or directories of photos); drawn pictures for no paths.

    Raises:
        ImageError: one is unreadable, or a directory holds none.
    """
    if not paths:
        yield from drawn()
    for path in paths:
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES) \
            if path.is_dir() else [path]  # fmt: skip
        if not files:
            raise ImageError(f"{path} holds no photo ({', '.join(_SUFFIXES)})")
        for file in files:
            yield image.load(file)


def drawn() -> Iterator[Pixels]:
    """Four pictures, the same at every call."""
    rng = np.random.default_rng(0)
    for height, width in _SIZES_PX:
        shared = _clouds(rng, height, width)
        tints = [0.8 * shared + 0.4 * _clouds(rng, height, width) for _ in range(3)]
        picture = 118 + 55 * np.stack(tints, axis=-1)  # float64 [H, W, 3]
        for _ in range(12):
            _paint(rng, picture)
        yield np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _clouds(rng: np.random.Generator, height: int, width: int) -> npt.NDArray[np.float64]:
    """Noise with a 1/f amplitude spectrum, mean 0, standard deviation 1."""
    y, x = np.fft.fftfreq(height)[:, np.newaxis], np.fft.rfftfreq(width)
    frequency = np.hypot(y, x)
    frequency[0, 0] = np.inf
    phases = np.exp(2j * np.pi * rng.random(frequency.shape))
    noise = np.fft.irfft2(phases / frequency, s=(height, width))
    return np.asarray(noise / noise.std())


def _paint(rng: np.random.Generator, picture: npt.NDArray[np.float64]) -> None:
    """One shaded ellipse, in place."""
    height, width, _ = picture.shape
    top, left = rng.random(2) * (height, width)
    half_px = (0.02 + 0.2 * rng.random(2)) * min(height, width)
    y, x = np.mgrid[0:height, 0:width]
    distance = np.hypot((y - top) / half_px[0], (x - left) / half_px[1])
    inside = distance < 1
    shade = 1 - 0.4 * distance[inside, np.newaxis]
    picture[inside] = 0.3 * picture[inside] + 0.7 * shade * (255 * rng.random(3))
