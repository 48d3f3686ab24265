"""Tiny Idefics3 and SmolVLM checkpoints against transformers: pixels, prompts, tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pillow_oracle as oracle
import pytest
import tiny_idefics3 as tiny
import torch
from edgevlm_export import export
from PIL import Image
from transformers import Idefics3ImageProcessorPil

import edgevlm
from edgevlm.bundle import Bundle
from edgevlm.errors import BundleError
from edgevlm.families.idefics3 import Family
from edgevlm.prompt import Message

QUESTION = "What is in the picture?"
RANDOM = np.random.default_rng(3)
SIZES = [tuple(int(n) for n in RANDOM.integers(1, 500, 2)) for _ in range(12)]  # height, width
SIZES += [(56, 56), (224, 224), (224, 168), (57, 224), (223, 224), (1, 1), (1, 300), (300, 1)]


def photo(size_px: tuple[int, int]) -> Image.Image:
    return Image.fromarray(oracle.noise(np.random.default_rng(sum(size_px)), size_px))


def family(**image: Any) -> Family:
    numbers = {
        "longest_px": 224,
        "tile_px": 56,
        "split": True,
        "patch_px": 14,
        "resample": "lanczos",
        "tile_tokens": 4,
    }
    words = {
        "border": "<b>",
        "tile": "<{row} {column}>",
        "whole": "<w>",
        "image_token": "<image>",
        "image": "<image>",
        "bos": False,
        "system": "",
        "user": "User: {content}\n",
        "assistant": "Assistant: {content}\n",
        "generate": "Assistant:",
        "describe": {"short": "?", "normal": "?", "long": "?"},
    }
    return Family(Bundle(Path("tiny"), {"image": {**numbers, **image}, "prompt": words}))


def assert_sees_what_the_processor_gives(size_px: tuple[int, int], **image: Any) -> None:
    picture, spoken = photo(size_px), family(**image)
    numbers = spoken._image
    processor = Idefics3ImageProcessorPil(
        size={"longest_edge": numbers["longest_px"]},
        max_image_size={"longest_edge": numbers["tile_px"]},
        do_image_splitting=numbers["split"],
        do_rescale=False,
        do_normalize=False,
    )
    expected = processor(picture, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(parity.tiles(picture, spoken.layout(*size_px)), expected)


@pytest.mark.parametrize("size_px", SIZES, ids=str)
def test_tiles_are_the_processors(size_px: tuple[int, int]) -> None:
    assert_sees_what_the_processor_gives(size_px)


@pytest.mark.parametrize("size_px", SIZES[:4], ids=str)
@pytest.mark.parametrize(
    "image",
    [
        {"split": False},
        {"longest_px": 56},  # one tile: nothing to split
        {"longest_px": 91},  # odd
        {"longest_px": 300},
        {"longest_px": 4144, "tile_px": 1036},  # above the reference's own limit
    ],
    ids=str,
)
def test_tiles_are_the_processors_for_other_sizes(
    size_px: tuple[int, int], image: dict[str, Any]
) -> None:
    assert_sees_what_the_processor_gives(size_px, **image)


def test_detail_splits_or_not() -> None:
    for split in (True, False):
        made, size_px = family(split=split), (200, 300)
        plain, whole = (family(split=each).layout(*size_px) for each in (True, False))
        for detail, expected in (("low", whole), ("high", plain)):
            made.detail = detail
            assert made.layout(*size_px) == expected


def test_an_odd_square_grows_as_in_the_reference() -> None:
    assert_sees_what_the_processor_gives((50, 50), longest_px=91)


@pytest.mark.parametrize(
    "image", [{"longest_px": 0}, {"patch_px": 13}, {"tile_tokens": 0}, {"split": 1}], ids=str
)
def test_numbers_that_make_no_sense_are_refused(image: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="tiny"):
        family(**image)


def reference(model: tiny.Model, path: Path, chat: list[dict[str, Any]], n_tokens: int) -> Any:
    """`n_tokens` are those of a tile."""
    processor = tiny.processor(path, n_tokens)
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    pixels = {key: inputs[key] for key in ("pixel_values", "pixel_attention_mask")}
    with torch.no_grad():
        embeddings = torch.cat([*model.get_image_features(**pixels).pooler_output])
    end = processor.tokenizer.convert_tokens_to_ids(tiny.END)
    return parity.reference(model, inputs, embeddings, [end])


def user(text: str, *pictures: Image.Image) -> dict[str, Any]:
    images = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


@pytest.mark.parametrize(
    ("kind", "dtype", "size_px", "shape"),
    [
        ("smolvlm", torch.float32, (90, 130), {}),
        ("smolvlm", torch.bfloat16, (300, 60), {"factor": 4, "seed": 1}),
        ("idefics3", torch.float16, (50, 50), {"seed": 2, "longest_px": 112}),
        ("idefics3", torch.float32, (60, 200), {"seed": 3, "split": False}),
        (
            "smolvlm",
            torch.float32,
            (131, 97),
            {"seed": 4, "tile_px": 96, "patch_px": 16, "factor": 3, "longest_px": 192},
        ),
        (  # 19 patches: the reference's rounding gives two of a row the same position
            "idefics3",
            torch.float32,
            (40, 60),
            {"seed": 7, "tile_px": 76, "patch_px": 4, "factor": 1, "longest_px": 76},
        ),
    ],
)
def test_logits_and_greedy_tokens_equal_transformers(
    tmp_path: Path, kind: str, dtype: torch.dtype, size_px: tuple[int, int], shape: dict[str, Any]
) -> None:
    model = tiny.checkpoint(tmp_path / "in", kind, dtype=dtype, **shape)
    export(tmp_path / "in", tmp_path / "out", language="f32")
    manifest = json.loads((tmp_path / "out" / "bundle.json").read_text())
    picture = photo(size_px)
    chat = [user(QUESTION, picture)]
    expected = reference(model, tmp_path / "in", chat, manifest["image"]["tile_tokens"])
    found = parity.ours(tmp_path / "out", [Message("user", QUESTION, (0,))], [picture])
    parity.assert_equal(found, expected)


def test_a_conversation_about_two_pictures_equals_transformers(tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path / "in", seed=5)
    export(tmp_path / "in", tmp_path / "out", language="f32")
    pictures = [photo((90, 130)), photo((40, 40))]
    chat = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        user(QUESTION, *pictures),
        {"role": "assistant", "content": [{"type": "text", "text": "Two cats."}]},
        user("Where?"),
    ]
    messages = [
        Message("system", "Be brief."),
        Message("user", QUESTION, (0, 1)),
        Message("assistant", "Two cats."),
        Message("user", "Where?"),
    ]
    expected = reference(model, tmp_path / "in", chat, 4)
    parity.assert_equal(parity.ours(tmp_path / "out", messages, pictures), expected)


def test_a_tied_head_and_a_whole_processor_file(tmp_path: Path) -> None:
    model = tiny.checkpoint(
        tmp_path / "in",
        seed=6,
        config={"tie_word_embeddings": True},
        processor_file="processor_config.json",
    )
    export(tmp_path / "in", tmp_path / "out", language="f32")
    expected = reference(model, tmp_path / "in", [user(QUESTION, photo((70, 90)))], 4)
    found = parity.ours(tmp_path / "out", [Message("user", QUESTION, (0,))], [photo((70, 90))])
    parity.assert_equal(found, expected)


def test_a_picture_of_as_many_tiles_is_not_taken_for_the_last_one(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "in")
    export(tmp_path / "in", tmp_path / "out", language="f32")
    picture, other = photo((90, 130)), photo((130, 90))
    with edgevlm.load(tmp_path / "out", threads=1) as vlm:
        fresh = vlm.ask(other, QUESTION).text
        vlm.ask(picture, QUESTION)
        assert vlm.ask(other, QUESTION).text == fresh


def test_a_processor_of_other_tiles_is_refused(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "in")
    file = tmp_path / "in" / "preprocessor_config.json"
    numbers = json.loads(file.read_text())
    file.write_text(json.dumps({**numbers, "max_image_size": {"longest_edge": 70}}))
    with pytest.raises(BundleError, match="70 px"):
        export(tmp_path / "in", tmp_path / "out")


def test_a_factor_that_leaves_patches_over_is_refused(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "in", factor=3)
    with pytest.raises(BundleError, match="scale_factor 3"):
        export(tmp_path / "in", tmp_path / "out")
