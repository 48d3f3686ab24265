"""Tiny Idefics2 checkpoints against transformers: views, positions, prompts, tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pillow_oracle as oracle
import pytest
import tiny_idefics2 as tiny
import torch
from edgevlm_export import export
from PIL import Image
from tokenizers import Tokenizer
from transformers import Idefics2ForConditionalGeneration, Idefics2ImageProcessorPil

from edgevlm.bundle import Bundle
from edgevlm.errors import BundleError
from edgevlm.families.idefics2 import Family
from edgevlm.positions import positions
from edgevlm.preprocess import patches
from edgevlm.prompt import Message

QUESTION = "What is in the picture?"
RANDOM = np.random.default_rng(5)
SIZES = [tuple(int(n) for n in RANDOM.integers(2, 400, 2)) for _ in range(16)]  # height, width
SIZES += [(98, 98), (97, 99), (42, 300), (300, 42), (84, 84), (2, 2), (3, 301)]


def photo(size_px: tuple[int, int]) -> Image.Image:
    return Image.fromarray(oracle.noise(np.random.default_rng(sum(size_px)), size_px))


def family(**image: Any) -> Family:
    numbers = {
        "shortest_px": 42,
        "longest_px": 98,
        "split": True,
        "patch_px": 14,
        "resample": "bilinear",
        "n_positions": 7,
        "view_tokens": 5,
    }
    words = {
        "border": "<b>",
        "glue": " ",
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


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("size_px", SIZES, ids=str)
def test_patches_are_those_that_the_reference_does_not_mask(
    size_px: tuple[int, int], split: bool
) -> None:
    spoken = family(split=split)
    layout = spoken.layout(*size_px)
    found = patches(np.asarray(photo(size_px)), layout, 1)
    processor = Idefics2ImageProcessorPil(
        size={"shortest_edge": 42, "longest_edge": 98},
        do_image_splitting=split,
        do_rescale=False,
        do_normalize=False,
    )
    inputs = processor(photo(size_px), return_tensors="np")
    views = zip(
        inputs["pixel_values"][0],
        inputs["pixel_attention_mask"][0],
        spoken.runs(layout),
        strict=True,
    )
    for view, mask, (tiles, _) in views:
        rows, columns = mask[:, 0].sum() // 14, mask[0].sum() // 14
        grid = view[:, : rows * 14, : columns * 14].reshape(3, rows, 14, columns, 14)
        expected = grid.transpose(1, 3, 0, 2, 4).reshape(rows * columns, 1, 588)
        np.testing.assert_array_equal(found[tiles], expected)


@pytest.mark.parametrize("n_positions", [1, 2, 7, 16, 25, 32, 33, 70, 224])
def test_positions_equal_torchs_to_the_last_bit(n_positions: int) -> None:
    """transformers' Idefics2VisionEmbeddings, for one side."""
    borders = torch.arange(1 / n_positions, 1.0, 1 / n_positions)
    for n_patches in range(1, 2 * n_positions + 5):
        fractions = torch.arange(n_patches, dtype=torch.float32) * (1.0 / torch.tensor(n_patches))
        fractions = torch.clamp(fractions, max=1.0 - 1e-6)
        expected = torch.bucketize(fractions, borders, right=True).numpy()
        np.testing.assert_array_equal(positions(n_patches, n_positions), expected)


def test_detail_splits_or_not() -> None:
    for split in (True, False):
        made, size_px = family(split=split), (200, 300)
        plain, whole = (family(split=each).layout(*size_px) for each in (True, False))
        for detail, expected in (("low", whole), ("high", plain)):
            made.detail = detail
            assert made.layout(*size_px) == expected


def test_a_picture_decoded_smaller_has_the_same_quarters() -> None:
    layout = family().layout(400, 600)
    smooth = np.linspace(0, 255, 600).astype(np.uint8)[np.newaxis, :, np.newaxis]
    full = np.broadcast_to(smooth, (400, 600, 3))
    half = np.ascontiguousarray(full[::2, ::2])
    assert layout.at_least_px == (260, 392)  # of views of 65 × 98 px: twice, for half of each side
    difference = patches(full, layout, 1).astype(int) - patches(half, layout, 1)
    assert np.abs(difference).max() <= 2  # half a pixel of a ramp of 255 in 600


def test_a_picture_one_pixel_wide_still_has_quarters() -> None:
    layout = family().layout(100, 1)
    assert len(layout.views) == 5
    patches(np.zeros((100, 1, 3), np.uint8), layout, 1)


@pytest.mark.parametrize("image", [{"longest_px": 0}, {"shortest_px": 13}, {"split": 1}], ids=str)
def test_numbers_that_make_no_sense_are_refused(image: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="tiny"):
        family(**image)


def reference(
    model: Idefics2ForConditionalGeneration, path: Path, chat: list[dict[str, Any]]
) -> parity.Run:
    processor = tiny.processor(path)
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    pixels = {key: inputs[key] for key in ("pixel_values", "pixel_attention_mask")}
    with torch.no_grad():
        embeddings = torch.cat([*model.get_image_features(**pixels).pooler_output])
    ends = [processor.tokenizer.convert_tokens_to_ids(end) for end in (tiny.END, "</s>")]
    return parity.reference(model, inputs, embeddings, ends)


def user(text: str, *pictures: Image.Image) -> dict[str, Any]:
    images = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


@pytest.mark.parametrize(
    ("size_px", "shape"),
    [
        ((90, 130), {}),
        ((300, 60), {"dtype": torch.bfloat16, "seed": 1, "n_kv": 1}),
        ((50, 50), {"dtype": torch.float16, "seed": 2, "split": False}),
        ((131, 197), {"seed": 3, "image_px": 140, "longest_px": 140, "n_kv": 4}),
    ],
)
def test_logits_and_greedy_tokens_equal_transformers(
    tmp_path: Path, size_px: tuple[int, int], shape: dict[str, Any]
) -> None:
    model = tiny.checkpoint(tmp_path / "in", **shape)
    export(tmp_path / "in", tmp_path / "out", language="f32")
    expected = reference(model, tmp_path / "in", [user(QUESTION, photo(size_px))])
    found = parity.ours(tmp_path / "out", [Message("user", QUESTION, (0,))], [photo(size_px)])
    parity.assert_equal(found, expected)


def test_a_conversation_about_pictures_of_other_sizes_equals_transformers(tmp_path: Path) -> None:
    """The reference pads all views of all pictures to one size and masks the padding."""
    model = tiny.checkpoint(tmp_path / "in", seed=4)
    export(tmp_path / "in", tmp_path / "out", language="f32")
    pictures = [photo((90, 130)), photo((200, 40))]
    chat = [
        user(QUESTION, *pictures),
        {"role": "assistant", "content": [{"type": "text", "text": "Two cats."}]},
        user("Where?"),
    ]
    messages = [
        Message("user", QUESTION, (0, 1)),
        Message("assistant", "Two cats."),
        Message("user", "Where?"),
    ]
    expected = reference(model, tmp_path / "in", chat)
    parity.assert_equal(parity.ours(tmp_path / "out", messages, pictures), expected)


def test_a_tokenizer_that_marks_words_itself_gets_no_second_mark(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "in", legacy_tokenizer=True)
    export(tmp_path / "in", tmp_path / "out", language="f32")
    run = parity.ours(tmp_path / "out", [Message("user", QUESTION, (0,))], [photo((60, 60))])
    tokenizer = Tokenizer.from_file(str(tmp_path / "in" / "tokenizer.json"))
    border = tokenizer.token_to_id(tiny.BORDER)
    last = len(run.prompt) - 1 - run.prompt[::-1].index(border)
    words = tokenizer.encode(QUESTION, add_special_tokens=False).ids
    assert run.prompt[last + 1 : last + 1 + len(words)] == words


def test_a_size_without_both_edges_is_refused(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "in")
    file = tmp_path / "in" / "preprocessor_config.json"
    numbers = json.loads(file.read_text())
    file.write_text(json.dumps({**numbers, "size": {"longest_edge": 98}}))
    with pytest.raises(BundleError, match="two edges"):
        export(tmp_path / "in", tmp_path / "out")
