"""LLaVA's layouts and prompts: pixels against transformers, tolerance 0; prompts word for word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pillow_oracle as oracle
import pytest
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from edgevlm.bundle import Bundle
from edgevlm.errors import BundleError, PromptError
from edgevlm.families.llava import Family
from edgevlm.preprocess import patches
from edgevlm.prompt import ImageSlot, Message, Segment, Text

SIDE_PX, PATCH_PX = 56, 14
GREY = (122, 116, 104)  # CLIP's mean colour, with which LLaVA pads
IMAGE = {
    "fit": "crop",
    "size_px": SIDE_PX,
    "patch_px": PATCH_PX,
    "channels_first": True,
    "resample": "bicubic",
    "fill": list(GREY),
    "n_tokens": 16,
}
PROMPT = {
    "bos": True,
    "system": "A chat. ",
    "user": "USER: {content} ",
    "assistant": "ASSISTANT: {content}</s>",
    "generate": "ASSISTANT:",
    "image": "<image>\n",
    "image_token": "<image>",
    "describe": {"short": "What?", "normal": "Describe.", "long": "Describe in detail."},
}
RANDOM = np.random.default_rng(20)
SIZES = [tuple(int(n) for n in RANDOM.integers(1, 400, 2)) for _ in range(40)]  # height, width
SIZES += [(56, 56), (57, 56), (56, 57), (55, 55), (56, 400), (400, 56)]  # at the target
SIZES += [(1, 1), (5, 3), (20, 31), (55, 56)]  # smaller than the target
SIZES += [(1, 700), (700, 1), (2, 999), (999, 2), (7, 1500), (1500, 7)]  # extreme


def family(image: dict[str, Any] | None = None, prompt: dict[str, Any] | None = None) -> Family:
    sections = {"image": {**IMAGE, **(image or {})}, "prompt": {**PROMPT, **(prompt or {})}}
    return Family(Bundle(Path("tiny"), sections))


def photo(size_px: tuple[int, int]) -> NDArray[np.uint8]:
    return oracle.noise(np.random.default_rng(sum(size_px)), size_px)


def seen(pixels: NDArray[np.uint8], **image: Any) -> NDArray[np.uint8]:
    """What the layout lets the model see, uint8 [3, side, side]."""
    layout = family(image).layout(*pixels.shape[:2])
    n = layout.tile_px // layout.patch_px
    grid = patches(pixels, layout, 1).reshape(n, n, 3, layout.patch_px, layout.patch_px)
    return grid.transpose(2, 0, 3, 1, 4).reshape(3, layout.tile_px, layout.tile_px)


def processed(
    processor: CLIPImageProcessorPil | SiglipImageProcessorPil, picture: Image.Image
) -> NDArray[np.float32]:
    """float32 [3, side, side]"""
    pixels: NDArray[np.float32] = processor(
        picture, do_rescale=False, do_normalize=False, return_tensors="np"
    )["pixel_values"][0]
    return pixels


def clip(side_px: int) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": side_px}, crop_size={"height": side_px, "width": side_px}
    )


@pytest.mark.parametrize("size_px", SIZES, ids=str)
def test_crop_sees_the_pixels_of_clips_processor(size_px: tuple[int, int]) -> None:
    pixels = photo(size_px)
    expected = processed(clip(SIDE_PX), Image.fromarray(pixels))
    np.testing.assert_array_equal(seen(pixels, fit="crop"), expected)


@pytest.mark.parametrize("side_px", [28, 42, 224, 336])
def test_crop_is_the_same_for_other_sides(side_px: int) -> None:
    for size_px in ((333, 500), (500, 333), (100, 101)):
        pixels = photo(size_px)
        expected = processed(clip(side_px), Image.fromarray(pixels))
        np.testing.assert_array_equal(seen(pixels, size_px=side_px), expected)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size_px", SIZES[::3], ids=str)
def test_stretch_sees_the_pixels_of_siglips_processor(
    size_px: tuple[int, int], resample: str
) -> None:
    pixels = photo(size_px)
    processor = SiglipImageProcessorPil(
        size={"height": SIDE_PX, "width": SIDE_PX},
        resample=Image.Resampling[resample.upper()],
    )
    expected = processed(processor, Image.fromarray(pixels))
    np.testing.assert_array_equal(seen(pixels, fit="stretch", resample=resample), expected)


def expand2square(picture: Image.Image) -> Image.Image:
    """As in LLaVA's llava/mm_utils.py: the picture in the middle of a grey square."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), GREY)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


@pytest.mark.parametrize("size_px", SIZES, ids=str)
def test_pad_sees_the_pixels_of_llavas_square(size_px: tuple[int, int]) -> None:
    pixels = photo(size_px)
    expected = processed(clip(SIDE_PX), expand2square(Image.fromarray(pixels)))
    np.testing.assert_array_equal(seen(pixels, fit="pad"), expected)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_a_layout_is_one_tile_with_the_numbers_of_the_bundle(fit: str) -> None:
    layout = family({"fit": fit}).layout(90, 130)
    assert (layout.n_tiles, layout.tile_px, layout.patch_px) == (1, SIDE_PX, PATCH_PX)
    assert (layout.n_tokens, layout.fill, layout.channels_first) == (16, GREY, True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fit", "squash"),
        ("resample", "nearest"),
        ("patch_px", 57),
        ("patch_px", 0),
        ("patch_px", -14),
        ("size_px", 0),
        ("size_px", 7),
        ("fill", [1, 2]),
        ("fill", [1, 2, 256]),
        ("fill", [1, 2, 0.5]),
        ("fill", ["1", 2, 3]),
        ("n_tokens", 0),
        ("channels_first", 1),
        ("size_px", "56"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(key: str, value: object) -> None:
    with pytest.raises(BundleError, match="tiny"):
        family({key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("user", "USER: "),
        ("assistant", "{content}{content}"),
        ("image", "\n"),
        ("image", "<image><image>"),
        ("image_token", ""),
        ("describe", {"short": "What?"}),
        ("system", None),
        ("bos", 1),
    ],
)
def test_templates_that_lack_their_place_are_refused(key: str, value: object) -> None:
    with pytest.raises(BundleError, match="tiny"):
        family(prompt={key: value})


def told(segments: list[Segment]) -> str:
    return "".join(s.text if isinstance(s, Text) else f"[{s.index}:{s.n_tokens}]" for s in segments)


def prompt(*messages: Message, **override: str) -> str:
    spoken = family(prompt=override)
    return told(spoken.prompt(messages, [spoken.layout(90, 130)] * 3))


def test_a_question_about_a_picture() -> None:
    assert prompt(Message("user", " What? \n", (0,))) == ("A chat. USER: [0:16]\nWhat? ASSISTANT:")


def test_pictures_come_before_the_question_in_the_order_given() -> None:
    assert prompt(Message("user", "What?", (2, 0))) == (
        "A chat. USER: [2:16]\n[0:16]\nWhat? ASSISTANT:"
    )


def test_a_conversation_keeps_its_turns() -> None:
    assert prompt(
        Message("user", "What?", (0,)), Message("assistant", " A cat."), Message("user", "Where?")
    ) == ("A chat. USER: [0:16]\nWhat? ASSISTANT: A cat.</s>USER: Where? ASSISTANT:")


def test_a_system_message_takes_the_place_of_the_models_own() -> None:
    assert prompt(Message("system", "Be brief."), Message("user", "What?")) == (
        "USER: Be brief. USER: What? ASSISTANT:"
    )


def test_without_a_system_text_the_prompt_begins_with_the_user() -> None:
    segments = family(prompt={"system": ""}).prompt([Message("user", "What?")], [])
    assert segments[0] == Text("USER: ")


def test_words_around_the_picture_stay_around_it() -> None:
    assert prompt(Message("user", "What?", (1,)), image="Picture: <image>.\n") == (
        "A chat. USER: Picture: [1:16].\nWhat? ASSISTANT:"
    )


def test_braces_in_a_question_are_left_alone() -> None:
    assert prompt(Message("user", "{content} {x} %s")) == (
        "A chat. USER: {content} {x} %s ASSISTANT:"
    )


def test_no_empty_text_is_handed_on() -> None:
    spoken = family(prompt={"system": "", "user": "{content}", "generate": "", "image": "<image>"})
    segments = spoken.prompt([Message("user", "What?", (0,))], [spoken.layout(9, 9)])
    assert segments == [ImageSlot(0, 16), Text("What?")]


def test_each_length_of_a_description_has_its_question() -> None:
    questions = [family().describe(length) for length in ("short", "normal", "long")]
    assert questions == ["What?", "Describe.", "Describe in detail."]


def test_an_unknown_length_is_refused_with_those_that_exist() -> None:
    with pytest.raises(PromptError, match="'huge'; it must be one of short, normal, long"):
        family().describe("huge")
