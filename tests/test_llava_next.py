"""Tiny LLaVA-NeXT checkpoints against transformers: tiles, unpadding, prompts, tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pillow_oracle as oracle
import pytest
import tiny
import tiny_llava_next
import torch
from edgevlm_export import export
from PIL import Image
from transformers import LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil

import edgevlm
from edgevlm.bundle import open_bundle
from edgevlm.errors import BundleError, PromptError
from edgevlm.families import Family, find
from edgevlm.prompt import Message

QUESTION = "What is in the picture?"
RANDOM = np.random.default_rng(4)
SIZES = [tuple(int(n) for n in RANDOM.integers(1, 400, 2)) for _ in range(16)]  # height, width
SIZES += [(56, 56), (112, 112), (56, 112), (168, 56), (100, 101), (57, 113), (30, 20), (1, 1)]
SIZES += [(7, 300), (300, 7)]  # fewer rows or columns of tokens than one


def photo(size_px: tuple[int, int]) -> Image.Image:
    return Image.fromarray(oracle.noise(np.random.default_rng(sum(size_px)), size_px))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """The reference, its checkpoint and the bundle made of it."""
    path = tmp_path_factory.mktemp("next")
    model = tiny_llava_next.checkpoint(path / "in")
    return model, path / "in", export(path / "in", path / "out", language="f32")


@pytest.fixture(scope="module")
def family(exported: tuple[Any, Path, Path]) -> Family:
    return find(open_bundle(exported[2]))


@pytest.mark.parametrize("size_px", SIZES, ids=str)
def test_tiles_are_the_processors(family: Family, size_px: tuple[int, int]) -> None:
    side = {"height": 56, "width": 56}
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56},
        crop_size=side,
        image_grid_pinpoints=tiny_llava_next.PINPOINTS,
        do_rescale=False,
        do_normalize=False,
    )
    expected = processor(photo(size_px), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(parity.tiles(photo(size_px), family.layout(*size_px)), expected)


@pytest.mark.parametrize("size_px", SIZES, ids=str)
def test_stitching_equals_the_reference(
    exported: tuple[Any, Path, Path], family: Family, size_px: tuple[int, int]
) -> None:
    model, _, bundle = exported
    layout = family.layout(*size_px)
    features = np.random.default_rng(0).normal(size=(layout.n_tiles, 16, 64)).astype(np.float32)
    newline = torch.from_numpy(open_bundle(bundle).arrays("extra.npz")["image_newline"])
    sizes = torch.tensor([size_px])
    (expected,), _ = model.model.pack_image_features(
        [torch.from_numpy(features)], sizes, "default", image_newline=newline
    )
    merged = family.merge(features, layout)
    np.testing.assert_array_equal(merged, expected)
    assert len(merged) == layout.n_tokens


def test_low_detail_is_the_whole_picture_and_its_end(
    exported: tuple[Any, Path, Path],
) -> None:
    """As the reference treats a picture that has no tiles."""
    model, _, bundle = exported
    family = find(open_bundle(bundle), "low")
    layout = family.layout(100, 130)
    picture = photo((100, 130))
    expected = parity.tiles(picture, find(open_bundle(bundle)).layout(100, 130))[:1]
    np.testing.assert_array_equal(parity.tiles(picture, layout), expected)
    features = np.random.default_rng(0).normal(size=(1, 16, 64)).astype(np.float32)
    newline = torch.from_numpy(open_bundle(bundle).arrays("extra.npz")["image_newline"])
    (packed,), _ = model.model.pack_image_features(
        [torch.from_numpy(features)], torch.tensor([(100, 130)]), "default", image_newline=newline
    )
    merged = family.merge(features, layout)
    np.testing.assert_array_equal(merged, packed)
    assert len(merged) == layout.n_tokens == 17
    with pytest.raises(PromptError, match="this model knows low, auto"):
        find(open_bundle(bundle), "high")


def reference(
    model: LlavaNextForConditionalGeneration, path: Path, chat: list[dict[str, Any]], tower: str
) -> parity.Run:
    processor = tiny_llava_next.processor(path, tower)
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    inputs = {key: value for key, value in inputs.items() if key != "token_type_ids"}
    pixels = {key: inputs[key] for key in ("pixel_values", "image_sizes")}
    with torch.no_grad():
        embeddings = torch.cat([*model.get_image_features(**pixels).pooler_output])
    tokenizer = processor.tokenizer
    ends = [tokenizer.convert_tokens_to_ids(end) for end in ("</s>", "<|im_end|>")]
    return parity.reference(model, inputs, embeddings, [end for end in ends if end])


def user(text: str, *pictures: Image.Image) -> dict[str, Any]:
    images = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


@pytest.mark.parametrize(
    ("prompt", "size_px", "more"),
    [
        ("vicuna", (90, 130), {"names": "transformers 4 saved"}),
        ("vicuna", (60, 300), {"dtype": torch.bfloat16, "names": "transformers 5 state"}),
        ("mistral", (200, 70), {"dtype": torch.float16, "names": "transformers 4 state"}),
        ("mistral", (30, 20), {"tower": "siglip"}),
        ("chatml", (111, 113), {}),
    ],
)
def test_logits_and_greedy_tokens_equal_transformers(
    tmp_path: Path, prompt: str, size_px: tuple[int, int], more: dict[str, Any]
) -> None:
    model = tiny_llava_next.checkpoint(tmp_path / "in", prompt, seed=1, **more)
    export(tmp_path / "in", tmp_path / "out", language="f32")
    tower = more.get("tower", "clip")
    chat = [user(QUESTION, photo(size_px))]
    messages = [Message("user", QUESTION, (0,))]
    if prompt == "chatml":
        system = "Answer the questions."
        chat = [{"role": "system", "content": [{"type": "text", "text": system}]}, *chat]
        messages = [Message("system", system), *messages]
    expected = reference(model, tmp_path / "in", chat, tower)
    parity.assert_equal(parity.ours(tmp_path / "out", messages, [photo(size_px)]), expected)


@pytest.mark.parametrize("size_px", [(90, 130), (60, 300)])
def test_a_tile_that_is_no_multiple_of_the_patch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size_px: tuple[int, int]
) -> None:
    """SigLIP-so400m/14 at 384 px: 6 px of every tile are not looked at."""
    monkeypatch.setattr(tiny_llava_next, "TILE_PX", 62)
    pinpoints = [[62 * rows, 62 * columns] for rows, columns in tiny_llava_next.GRIDS]
    monkeypatch.setattr(tiny_llava_next, "PINPOINTS", pinpoints)
    model = tiny_llava_next.checkpoint(tmp_path / "in", tower="siglip", seed=1)
    export(tmp_path / "in", tmp_path / "out", language="f32")
    expected = reference(model, tmp_path / "in", [user(QUESTION, photo(size_px))], "siglip")
    found = parity.ours(tmp_path / "out", [Message("user", QUESTION, (0,))], [photo(size_px)])
    parity.assert_equal(found, expected)


def test_a_conversation_about_two_pictures_equals_transformers(
    exported: tuple[Any, Path, Path],
) -> None:
    model, checkpoint, bundle = exported
    pictures = [photo((90, 130)), photo((200, 70))]
    expected = reference(model, checkpoint, [user(QUESTION, *pictures)], "clip")
    found = parity.ours(bundle, [Message("user", QUESTION, (0, 1))], pictures)
    parity.assert_equal(found, expected)


def test_pictures_alike_in_all_tiles_are_told_apart(exported: tuple[Any, Path, Path]) -> None:
    """Black padding and a black picture look the same; what is cut away differs."""
    with edgevlm.load(exported[2], threads=1) as vlm:
        black = [vlm.encode(Image.new("RGB", (100, width))) for width in (100, 90, 60)]
    assert len({image.key for image in black}) == len({len(image.embeddings) for image in black})
    assert len({image.key for image in black}) > 1


def test_a_cls_row_among_the_tiles_is_refused(tmp_path: Path) -> None:
    tiny_llava_next.checkpoint(tmp_path / "in")
    file = tmp_path / "in" / "config.json"
    config = {**json.loads(file.read_text()), "vision_feature_select_strategy": "full"}
    file.write_text(json.dumps(config))
    with pytest.raises(BundleError, match="17 of 16 patches"):
        export(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image_grid_pinpoints", [[56, 112]], "different image_grid_pinpoints"),
        ("crop_size", {"height": 70, "width": 70}, "70"),
    ],
)
def test_a_processor_of_another_checkpoint_is_refused(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    tiny_llava_next.checkpoint(tmp_path / "in")
    file = tmp_path / "in" / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(BundleError, match=message):
        export(tmp_path / "in", tmp_path / "out")


def test_a_checkpoint_without_the_row_mark_is_refused(tmp_path: Path) -> None:
    tiny_llava_next.checkpoint(tmp_path / "in")
    tiny.rename_tensors(tmp_path / "in", lambda name: name.replace("image_newline", "other"))
    with pytest.raises(BundleError, match="image_newline is missing"):
        export(tmp_path / "in", tmp_path / "out")
