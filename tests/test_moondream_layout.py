"""Moondream's crops and prompts, from its numbers in bundle.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgevlm_export import releases

from edgevlm.bundle import Bundle
from edgevlm.errors import BundleError, PromptError
from edgevlm.families.moondream import Family
from edgevlm.prompt import ImageSlot, Message, Segment, Text, Tokens

IMAGE = {
    "size_px": 378,
    "patch_px": 14,
    "resample": "lanczos",
    "crops": "overlap",
    "max_crops": 12,
    "overlap_patches": 4,
    "n_tokens": 730,
    "bidirectional_tokens": 730,
}
ASKED = Message("user", "Who?", (0,))


def family(release: str = "2025-06-21", **image: Any) -> Family:
    tokens = releases.TOKENS.get(release, {"bos_id": 50256, "eos_id": 50256})
    sections = {"image": {**IMAGE, **image}, "prompt": releases.prompt_section(release, tokens)}
    return Family(Bundle(Path("tiny"), sections))


# What the reference's own select_tiling gives (vikhyat/moondream, image_crops.py).
@pytest.mark.parametrize(
    ("width", "height", "tiling"),
    [
        (224, 224, (1, 1)),
        (378, 378, (1, 1)),
        (500, 500, (3, 3)),
        (640, 480, (2, 4)),
        (800, 600, (2, 4)),
        (1280, 720, (2, 4)),
        (1920, 1080, (2, 4)),
        (2048, 1536, (3, 4)),
        (4000, 3000, (2, 4)),
        (400, 1000, (6, 2)),
        (1000, 400, (2, 6)),
        (300, 2000, (1, 1)),
        (1000, 4000, (6, 1)),
        (1024, 1024, (3, 3)),
    ],
)
def test_crops_are_chosen_as_the_reference_does(
    width: int, height: int, tiling: tuple[int, int]
) -> None:
    layout = family().layout(height, width)
    rows, columns = tiling
    assert layout.n_tiles == (1 if tiling == (1, 1) else 1 + rows * columns)
    cut = layout.views[-1]
    assert (cut.height_px, cut.width_px) == (rows * 266 + 112, columns * 266 + 112)
    assert cut.tiles == tuple((r * 266, c * 266) for r in range(rows) for c in range(columns))
    assert (layout.views[0].height_px, layout.views[0].width_px) == (378, 378)


@pytest.mark.parametrize(
    ("width", "height", "tiling"),
    [
        (224, 224, (3, 3)),  # which auto sees once
        (4000, 3000, (3, 4)),  # which auto cuts into (2, 4)
        (1024, 1024, (3, 3)),
        (640, 480, (3, 4)),
        (1000, 4000, (6, 2)),
        (3000, 300, (1, 12)),
    ],
)
def test_high_detail_takes_as_many_crops_as_help(
    width: int, height: int, tiling: tuple[int, int]
) -> None:
    made = family()
    made.detail = "high"
    cut = made.layout(height, width).views[-1]
    assert (cut.height_px, cut.width_px) == tuple(n * 266 + 112 for n in tiling)
    made.detail = "low"
    assert made.layout(height, width).n_tiles == 1


def test_high_detail_of_2024_is_one_of_its_sizes() -> None:
    made = family("2024-05-20", crops="grid", overlap_patches=0, bidirectional_tokens=0)
    made.detail = "high"
    assert [made.layout(*size).n_tiles for size in ((300, 300), (300, 700), (90, 40))] == [4, 2, 2]


def test_one_crop_leaves_nothing_to_choose() -> None:
    made = family("2024-03-04", crops="single", overlap_patches=0, bidirectional_tokens=0)
    assert made.details == ("auto",)
    assert family().details == ("low", "auto", "high")


@pytest.mark.parametrize("size", [(500, 500), (480, 640), (1000, 400), (4000, 1000)])
def test_every_place_of_the_map_comes_from_one_crop_and_pooling_is_torch_s(
    size: tuple[int, int],
) -> None:
    made = family()
    inputs = made.graph_inputs(made.layout(*size))
    index, rows, columns = (inputs[name] for name in ("index", "pool_rows", "pool_columns"))
    n_rows, n_columns = index.shape
    assert (n_rows - 8) % 19 == (n_columns - 8) % 19 == 0
    assert index.min() >= 729  # the first crop is the whole picture
    # Neighbours in the map are neighbours in a crop, or the same place of the next.
    np.testing.assert_array_equal(np.unique(index), np.sort(index, axis=None))
    values = np.random.default_rng(0).normal(size=(n_rows, n_columns)).astype(np.float32)
    expected = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(values)[None], (27, 27))[0]
    np.testing.assert_allclose(rows @ values @ columns, expected.numpy(), atol=1e-6)


def test_a_picture_in_one_crop_is_its_own_map() -> None:
    made = family()
    inputs = made.graph_inputs(made.layout(300, 300))
    np.testing.assert_array_equal(inputs["index"], np.arange(729).reshape(27, 27))
    np.testing.assert_array_equal(inputs["pool_rows"], np.eye(27, dtype=np.float32))


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [(511, 300, (1, 1)), (512, 512, (1, 1)), (1200, 500, (1, 2)), (400, 900, (2, 1)),
     (900, 600, (2, 2)), (2000, 2000, (2, 2))],
)  # fmt: skip
def test_crops_of_2024(width: int, height: int, grid: tuple[int, int]) -> None:
    made = family("2024-05-20", crops="grid", overlap_patches=0, bidirectional_tokens=0)
    layout = made.layout(height, width)
    assert layout.n_tiles == grid[0] * grid[1]
    inputs = made.graph_inputs(layout)
    assert tuple(inputs["grid"]) == grid
    assert inputs["index"].shape == (27 * grid[0], 27 * grid[1])


SLOT = ImageSlot(0, 730, bidirectional=True)
PROMPTS: dict[str, list[Segment]] = {
    "2024-05-20": [
        Tokens((50256,)),
        ImageSlot(0, 730),
        Text("\n\nQuestion: "),
        Text("Who?"),
        Text("\n\nAnswer:"),
    ],
    "2025-01-09": [
        SLOT,
        Tokens((198, 198, 24361, 25)),
        Text("Who?"),
        Tokens((198, 198, 33706, 25)),
    ],
    "2025-03-27": [
        SLOT,
        Tokens((198, 198, 24361, 25)),
        Text(" "),
        Text("Who?"),
        Tokens((198, 198, 33706, 25)),
    ],
    "2025-06-21": [SLOT, Tokens((1, 15381, 2)), Text("Who?"), Tokens((3,)), Tokens((3,))],
}


@pytest.mark.parametrize("release", PROMPTS)
def test_questions_by_release(release: str) -> None:
    image = {} if release >= "2025" else {"bidirectional_tokens": 0}
    made = family(release, **image)
    assert made.prompt([ASKED], [made.layout(300, 300)]) == PROMPTS[release]


def test_things_are_named_with_a_space_since_march_2025() -> None:
    assert family("2025-01-09").detect_prompt("a car") == [
        SLOT,
        Tokens((198, 198, 47504, 25)),
        Text("a car"),
        Tokens((628,)),
    ]
    assert family().point_prompt("a car") == [
        SLOT,
        Tokens((1, 2581, 2)),
        Text(" "),
        Text("a car"),
        Tokens((3,)),
    ]


def test_a_chat_repeats_the_turns() -> None:
    turns = [ASKED, Message("assistant", "Me."), Message("user", "Why?")]
    made = family()
    assert made.prompt(turns, [made.layout(300, 300)])[4:] == [
        Tokens((3,)),
        Text("Me."),
        Tokens((1, 15381, 2)),
        Text("Why?"),
        Tokens((3,)),
        Tokens((3,)),
    ]


@pytest.mark.parametrize(
    ("messages", "n_pictures", "message"),
    [
        ([Message("user", "Who?", (0, 1))], 2, "one picture at a time"),
        ([Message("system", "Be."), ASKED], 1, "system"),
        ([Message("user", "Hi"), ASKED], 1, "at the start"),
    ],
)
def test_what_the_model_cannot_take_is_said(
    messages: list[Message], n_pictures: int, message: str
) -> None:
    made = family()
    with pytest.raises(PromptError, match=message):
        made.prompt(messages, [made.layout(300, 300)] * n_pictures)


def test_earlier_releases_say_what_they_cannot() -> None:
    made = family("2024-05-20", crops="grid", overlap_patches=0, bidirectional_tokens=0)
    for refused in (
        lambda: made.detect_prompt("car"),
        lambda: made.point_prompt("car"),
        lambda: made.thinking([ASKED], [made.layout(9, 9)]),
        lambda: made.prompt([Message("user", "Who?")], []),
    ):
        with pytest.raises(PromptError):
            refused()
    with pytest.raises(PromptError, match="short, normal"):
        family("2025-01-09").describe("long")


@pytest.mark.parametrize(
    "wrong",
    [
        {"crops": "many"},
        {"patch_px": 0},
        {"patch_px": 13},
        {"overlap_patches": 14},
        {"n_tokens": "7"},
        {"max_crops": 0},
    ],
)
def test_numbers_that_make_no_crops_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BundleError):
        family(**wrong)
