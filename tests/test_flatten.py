"""Turning strip by strip against Pillow turning the whole picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from edgevlm import flatten


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_across_many_strips(orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flatten, "_STRIP_PIXELS", 130)  # two or three rows
    values = np.random.default_rng(7).integers(0, 256, (40, 61, 3), dtype=np.uint8)
    picture = Image.fromarray(values)
    picture.getexif()[ExifTags.Base.Orientation] = orientation
    expected = np.asarray(ImageOps.exif_transpose(picture))
    assert flatten.exif_orientation(picture) == orientation
    assert (flatten.upright_rgb(picture, orientation, "picture") == expected).all()
