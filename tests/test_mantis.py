"""Tiny Mantis checkpoints against transformers' LLaVA, prompted as MLlavaProcessor does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pillow_oracle as oracle
import pytest
import tiny
import torch
from edgevlm_export import export
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoImageProcessor, LlavaForConditionalGeneration

import edgevlm
from edgevlm.errors import PromptError
from edgevlm.prompt import Message

HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"


def photo(seed: int) -> Image.Image:
    return Image.fromarray(oracle.noise(np.random.default_rng(seed), (90, 60 + seed)))


def checkpoint(path: Path, tower: str, **more: Any) -> LlavaForConditionalGeneration:
    """A LLaVA whose processor is called as Mantis calls it."""
    model = tiny.llava(path, tower, prompt="llama-3", **more)
    file = path / "preprocessor_config.json"
    numbers = json.loads(file.read_text())
    file.write_text(json.dumps({**numbers, "processor_class": "MLlavaProcessor"}))
    return model


def reference(
    path: Path, model: LlavaForConditionalGeneration, text: str, pictures: list[Image.Image], n: int
) -> parity.Run:
    """`text` with <image> in the places of pictures; `n` tokens a picture."""
    for number in range(1, len(pictures) + 1):
        text = text.replace("<image>", f"(image {number}: <Image>{'<IMAGE>' * n}</Image>)", 1)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(text.replace("<IMAGE>", "<image>")).ids])
    processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embeddings = torch.cat([*model.get_image_features(pixel_values=pixels).pooler_output])
    inputs = {
        "input_ids": ids,
        "pixel_values": pixels,
        "attention_mask": torch.ones_like(ids),
    }
    ends = [tokenizer.token_to_id(end) for end in ("<|eot_id|>", "<|end_of_text|>")]
    return parity.reference(model, inputs, embeddings, ends)


@pytest.mark.parametrize(
    ("tower", "dtype", "n_tokens"),
    [("clip", torch.float32, 16), ("siglip", torch.bfloat16, 15)],  # "default", literally
)
def test_pictures_among_the_words_equal_transformers(
    tmp_path: Path, tower: str, dtype: torch.dtype, n_tokens: int
) -> None:
    model = checkpoint(tmp_path / "in", tower, dtype=dtype, seed=7)
    export(tmp_path / "in", tmp_path / "out", language="f32")
    question = "What is in <image> and not in <image>? There are two."
    text = HEADER.format("user") + question + "<|eot_id|>" + HEADER.format("assistant")
    pictures = [photo(1), photo(2)]
    expected = reference(tmp_path / "in", model, text, pictures, n_tokens)
    found = parity.ours(tmp_path / "out", [Message("user", question, (0, 1))], pictures)
    parity.assert_equal(found, expected)


def test_pictures_without_a_place_come_first_and_numbers_go_on(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "in", "clip", seed=8)
    export(tmp_path / "in", tmp_path / "out", language="f32")
    text = "".join(
        [
            HEADER.format("user") + "<image><image> What is it?<|eot_id|>",
            HEADER.format("assistant") + "A boat.<|eot_id|>",
            HEADER.format("user") + "<image> And this?<|eot_id|>" + HEADER.format("assistant"),
        ]
    )
    pictures = [photo(1), photo(2), photo(3)]
    messages = [
        Message("user", "What is it?", (0, 1)),
        Message("assistant", "A boat."),
        Message("user", "And this?", (2,)),
    ]
    expected = reference(tmp_path / "in", model, text, pictures, 16)
    parity.assert_equal(parity.ours(tmp_path / "out", messages, pictures), expected)


def test_places_for_another_number_of_pictures_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "in", "clip")
    export(tmp_path / "in", tmp_path / "out")
    with (
        edgevlm.load(tmp_path / "out", threads=1) as vlm,
        pytest.raises(PromptError, match="2 places <image> for 1 pictures"),
    ):
        vlm.ask(photo(1), "Is <image> like <image>?")


def test_a_llava_of_another_processor_is_no_mantis(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "in")
    bundle = export(tmp_path / "in", tmp_path / "out")
    assert json.loads((bundle / "bundle.json").read_text())["family"] == "llava"
