"""Layouts against Pillow's paste, resize and crop and numpy's reshape; tolerance 0."""

from __future__ import annotations

import numpy as np
import pillow_oracle as oracle
import pytest
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPImageProcessorPil

from edgevlm import kernels
from edgevlm.errors import Cancelled
from edgevlm.layout import Layout, View
from edgevlm.preprocess import patches

LLAVA_GREY = (122, 116, 104)


def photo(height: int, width: int) -> NDArray[np.uint8]:
    return oracle.noise(np.random.default_rng(height + width), (height, width))


def expected(pixels: NDArray[np.uint8], layout: Layout) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    parts = []
    for view in layout.views:
        side = max(height, width)
        case = oracle.Case(
            (side, side) if view.square else (height, width),
            (view.height_px, view.width_px),
            view.resample,
            view.tiles,
            (layout.tile_px, layout.tile_px),
            (layout.patch_px, layout.patch_px),
            layout.channels_first,
            layout.fill,
        )
        parts.append(oracle.patches(pixels, case))
    return np.concatenate(parts)


CROP = Layout((View(56, 74, "bicubic", ((0, 9),)),), 56, 14, True, (0, 0, 0), 16)
PAD = Layout((View(56, 56, "bicubic", ((0, 0),), square=True),), 56, 14, True, LLAVA_GREY, 16)
STRETCH = Layout((View(70, 70, "bilinear", ((0, 0),)),), 70, 14, False, (0, 0, 0), 25)
WHOLE = Layout((View(52, 52, "lanczos", ((0, 0),)),), 52, 52, True, (0, 0, 0), 1)
TILED = Layout(
    (
        View(60, 90, "lanczos", ((0, 0), (0, 28), (28, 0), (28, 56), (40, 70))),
        View(28, 28, "bicubic", ((0, 0),), square=True),
    ),
    *(28, 7, True, (3, 200, 90), 96),
)


@pytest.mark.parametrize("layout", [CROP, PAD, STRETCH, WHOLE, TILED])
@pytest.mark.parametrize("picture_px", [(97, 131), (131, 97), (40, 300), (300, 40), (1, 1)])
def test_a_layout_equals_pillow_and_numpy(layout: Layout, picture_px: tuple[int, int]) -> None:
    pixels = photo(*picture_px)
    np.testing.assert_array_equal(patches(pixels, layout, 1), expected(pixels, layout))
    np.testing.assert_array_equal(patches(pixels, layout, 3), expected(pixels, layout))


def test_clip_crop_equals_transformers() -> None:
    """Only rescaling and normalisation, folded into the vision graph, are left out of both."""
    pixels = photo(301, 402)
    layout = Layout((View(336, 448, "bicubic", ((0, 56),)),), 336, 14, True, (0, 0, 0), 576)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        do_rescale=False,
        do_normalize=False,
    )
    picture = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
    grid = picture.astype(np.uint8).reshape(3, 24, 14, 24, 14).transpose(1, 3, 0, 2, 4)
    np.testing.assert_array_equal(patches(pixels, layout, 1), grid.reshape(1, 576, 588))


@pytest.mark.parametrize(
    "view",
    [
        lambda pixels: pixels[::-1],
        lambda pixels: pixels[:, ::-1],
        lambda pixels: pixels[::2, 3:90],
        lambda pixels: pixels[..., ::-1],
        lambda pixels: pixels.transpose(1, 0, 2),
        lambda pixels: np.broadcast_to(pixels[:1], pixels.shape),
        lambda pixels: np.asfortranarray(pixels),
    ],
)
def test_any_memory_layout_gives_the_same_patches(view: object) -> None:
    pixels = view(photo(97, 131))  # type: ignore[operator]
    np.testing.assert_array_equal(patches(pixels, PAD, 1), expected(pixels.copy("C"), PAD))


def test_a_read_only_picture_will_do() -> None:
    pixels = photo(20, 20)
    pixels.setflags(write=False)
    patches(pixels, CROP, 1)


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)],
)
def test_what_is_not_rgb_bytes_is_refused(pixels: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="uint8"):
        patches(pixels, CROP, 1)


def test_an_empty_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        patches(np.zeros((0, 4, 3), np.uint8), CROP, 1)


def test_a_set_flag_raises_cancelled() -> None:
    flag = kernels.Flag()
    flag.set()
    with pytest.raises(Cancelled):
        patches(photo(20, 20), CROP, 1, flag)


def test_resizes_on_the_way_round_as_pillow_does() -> None:
    pixels = photo(97, 131)
    steps = ((60, 80), (56, 84))
    views = (
        View(56, 84, "lanczos", ((0, 0), (0, 28), (28, 56)), via_px=steps),
        View(28, 28, "lanczos", ((0, 0),), via_px=steps),
    )
    layout = Layout(views, 28, 7, True, (0, 0, 0), 64)
    grid = Image.fromarray(pixels).resize((80, 60), Image.Resampling.LANCZOS)
    grid = grid.resize((84, 56), Image.Resampling.LANCZOS)
    whole = grid.resize((28, 28), Image.Resampling.LANCZOS)
    tiles = [grid.crop((x, y, x + 28, y + 28)) for y, x in views[0].tiles]
    parts = np.stack([np.asarray(tile) for tile in (*tiles, whole)])
    parts = parts.reshape(4, 4, 7, 4, 7, 3).transpose(0, 1, 3, 5, 2, 4)
    np.testing.assert_array_equal(patches(pixels, layout, 2), parts.reshape(4, 16, 147))


def test_a_square_is_padded_once_before_the_first_of_two_resizes() -> None:
    pixels = photo(40, 60)
    view = View(14, 14, "bicubic", ((0, 0),), square=True, via_px=((30, 30),))
    layout = Layout((view,), 14, 14, False, LLAVA_GREY, 1)
    square = Image.new("RGB", (60, 60), LLAVA_GREY)
    square.paste(Image.fromarray(pixels), (0, 10))
    small = square.resize((30, 30), Image.Resampling.BICUBIC)
    small = small.resize((14, 14), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(patches(pixels, layout, 1), np.asarray(small).reshape(1, 1, -1))


def test_a_box_is_resized_without_its_neighbours() -> None:
    pixels = photo(97, 131)
    view = View(28, 42, "bilinear", ((0, 0), (14, 28)), box_px=(48, 65, 49, 66))
    layout = Layout((view,), 14, 14, False, (0, 0, 0), 2, picture_px=(97, 131))
    small = (
        Image.fromarray(pixels).crop((65, 48, 131, 97)).resize((42, 28), Image.Resampling.BILINEAR)
    )
    tiles = [np.asarray(small)[y : y + 14, x : x + 14].reshape(1, -1) for y, x in view.tiles]
    np.testing.assert_array_equal(patches(pixels, layout, 1), np.stack(tiles))
