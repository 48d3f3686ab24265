"""A tiny LLaVA, exported and run, against transformers with the same weights and picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from edgevlm_export import export
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoImageProcessor, LlavaForConditionalGeneration

import edgevlm
from edgevlm.options import Options
from edgevlm.prompt import Message

QUESTION = "What is in the picture?"
PROMPTS = {  # as the model cards write them; MODELS: llava-1.5-7b-hf and llava-phi-3-mini-hf
    "llama": "<s>USER: <image>\nWhat is in the picture? ASSISTANT:",
    "phi3": "<s><|user|>\n<image>\nWhat is in the picture?<|end|>\n<|assistant|>\n",
}
STEPS = 64


@pytest.mark.parametrize("text", ["llama", "phi3"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_logits_and_greedy_tokens_equal_transformers(
    tmp_path: Path, picture: Image.Image, tower: str, text: str
) -> None:
    checkpoint = tmp_path / "checkpoint"
    # A SigLIP tower has no class token to drop.
    selection = {"vision_feature_select_strategy": {"clip": "default", "siglip": "full"}[tower]}
    reference = tiny.llava(checkpoint, tower, text, seed=3, config=selection)
    export(checkpoint, tmp_path / "bundle", language="f32")
    expected_ids, expected_logits = _reference(checkpoint, reference, [picture], PROMPTS[text])

    ids, logits = _ours(tmp_path / "bundle", [picture])

    # Both sides compute in float32 and add up in their own order.
    np.testing.assert_allclose(logits, expected_logits, atol=2e-3, rtol=0)
    assert ids == expected_ids


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_side_that_is_no_multiple_of_the_patch(
    tmp_path: Path, picture: Image.Image, tower: str
) -> None:
    """siglip-so400m-patch14-384, which nanoLLaVA, Bunny and Mantis have: 27 patches, 6 px left."""
    selection = {"vision_feature_select_strategy": {"clip": "default", "siglip": "full"}[tower]}
    reference = tiny.llava(tmp_path / "in", tower, seed=3, config=selection, image_px=62)
    export(tmp_path / "in", tmp_path / "bundle", language="f32")
    expected_ids, expected_logits = _reference(
        tmp_path / "in", reference, [picture], PROMPTS["llama"]
    )
    ids, logits = _ours(tmp_path / "bundle", [picture])
    np.testing.assert_allclose(logits, expected_logits, atol=2e-3, rtol=0)
    assert ids == expected_ids


def test_both_pictures_of_a_question_are_seen(tmp_path: Path, picture: Image.Image) -> None:
    checkpoint = tmp_path / "checkpoint"
    reference = tiny.llava(checkpoint, seed=4)
    export(checkpoint, tmp_path / "bundle", language="f32")
    turned = picture.transpose(Image.Transpose.ROTATE_180)
    prompt = PROMPTS["llama"].replace("<image>\n", "<image>\n<image>\n")
    expected_ids, expected_logits = _reference(checkpoint, reference, [picture, turned], prompt)

    ids, logits = _ours(tmp_path / "bundle", [picture, turned])

    np.testing.assert_allclose(logits, expected_logits, atol=2e-3, rtol=0)
    assert ids == expected_ids


def _ours(bundle: Path, pictures: list[Image.Image]) -> tuple[list[int], np.ndarray]:
    """The same as `_reference`, through the engine's own stages."""
    with edgevlm.load(bundle, precise=True) as vlm:
        language = vlm._language
        images = [vlm.encode(picture) for picture in pictures]
        message = Message("user", QUESTION, tuple(range(len(images))))
        prompt = language.tokenize(vlm._family.prompt([message], [i.layout for i in images]))
        language.feed(prompt, images)
        logits = language.logits()
        with language.sampler(Options()) as sampler:
            return [token for token, _ in language.tokens(sampler, STEPS)], logits


@torch.no_grad()
def _reference(
    checkpoint: Path,
    model: LlavaForConditionalGeneration,
    pictures: list[Image.Image],
    prompt: str,
) -> tuple[list[int], np.ndarray]:
    """Greedy token ids without the end token, and the logits after the prompt."""
    processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    repeated = prompt.replace("<image>", "<image>" * 16)  # (56 / 14)² patches
    ids = torch.tensor([tokenizer.encode(repeated, add_special_tokens=False).ids])
    logits = model(input_ids=ids, pixel_values=pixels).logits[0, -1].numpy()
    ends = [tokenizer.token_to_id(t) for t in ("</s>", "<|end|>", "<|endoftext|>", "<|assistant|>")]
    generated = model.generate(
        input_ids=ids,
        pixel_values=pixels,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=[end for end in ends if end is not None],
        pad_token_id=0,
    )[0, ids.shape[1] :].tolist()
    if generated[-1] in ends:
        generated.pop()
    return generated, logits
