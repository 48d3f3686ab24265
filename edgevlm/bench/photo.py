"""The photo that is measured with: the caller's, or a drawn one, a little different every round.

Different, so that no cache answers for the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgevlm import image
from edgevlm.layout import Layout

# Height, width: a phone's 12 megapixels, and what a model that would cut them into tiles sees in
# one view.
SIZES_PX = ((3000, 4000), (1080, 1440), (480, 640), (372, 372))
_JPEG_QUALITY = 90
_PATCHES = 4  # along the side of the patchwork, which is that part of the picture's shorter side
_PART = 8


def pixels(path: Path | None, layout: Callable[[int, int], Layout]) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] of the file, or drawn in the largest size that is one tile to the model."""
    if path is not None:
        return image.load(path)
    one_view = [size for size in SIZES_PX if layout(*size).n_tiles == 1]
    return drawn(*(one_view or SIZES_PX)[0])


def drawn(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """A picture whose detail falls off with frequency as a photo's does (1/f; Field 1987)."""
    random = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    cells = 4
    while cells <= width:
        shape = (max(2, cells * height // width), cells, 3)
        octave = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
        total += np.asarray(octave.resize((width, height), Image.Resampling.BICUBIC)) * (4 / cells)
        cells *= 2
    total -= total.min()
    drawn: NDArray[np.uint8] = (total * (255 / total.max())).astype(np.uint8)
    return drawn


def save_another(pixels: NDArray[np.uint8], path: Path) -> None:
    """A JPEG of the picture with a patchwork in its middle that was never there before."""
    height, width = pixels.shape[:2]
    side = max(_PATCHES, min(height, width) // _PART)
    random = np.random.default_rng()  # from the system: another one in every run
    patches = random.integers(0, 256, (_PATCHES, _PATCHES, 3), dtype=np.uint8)
    changed = Image.fromarray(pixels)
    patchwork = Image.fromarray(patches).resize((side, side), Image.Resampling.NEAREST)
    changed.paste(patchwork, ((width - side) // 2, (height - side) // 2))
    changed.save(path, "JPEG", quality=_JPEG_QUALITY)
