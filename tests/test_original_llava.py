"""Tiny checkpoints in LLaVA's own format, nanoLLaVA's and Bunny's, against transformers.

The same weights are saved once as transformers stores them (the reference) and once under the names
and with the flat config.json of haotian-liu/LLaVA.
"""

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
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoImageProcessor, LlavaForConditionalGeneration

from edgevlm.errors import BundleError
from edgevlm.prompt import Message

QUESTION = "What is in the picture?"
CLIP_GREY, SIGLIP_GREY = (122, 116, 104), (127, 127, 127)
BUNNY = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)


def picture() -> Image.Image:
    return Image.fromarray(oracle.noise(np.random.default_rng(9), (90, 130)))


def checkpoint(
    path: Path, architecture: str, tower: str, text: str, **more: Any
) -> tuple[LlavaForConditionalGeneration, AutoImageProcessor]:
    """The reference of a checkpoint in the original format."""
    selection = {"vision_feature_select_strategy": "default" if tower == "clip" else "full"}
    model = tiny.llava(path, tower, text, config=selection, **more)
    processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    (path / "preprocessor_config.json").unlink()
    tiny.rename_tensors(path, original)
    config = json.loads((path / "config.json").read_text())
    flat = {
        **config["text_config"],
        "architectures": [architecture],
        "model_type": "llava",
        "mm_vision_tower": "someone/tiny",
        "vision_config": config["vision_config"],
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad",
    }
    (path / "config.json").write_text(json.dumps(flat))
    return model, processor


def original(name: str) -> str:
    for saved, own in (
        ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("multi_modal_projector.linear_1", "model.mm_projector.0"),
        ("multi_modal_projector.linear_2", "model.mm_projector.2"),
        ("language_model.lm_head", "lm_head"),
        ("language_model.", ""),
    ):
        if name.startswith(saved):
            return own + name.removeprefix(saved)
    raise ValueError(name)


def reference(
    path: Path, model: LlavaForConditionalGeneration, processor: Any, prompt: str, grey: Any
) -> parity.Run:
    """`prompt` as tokenizer_image_token of llava/mm_utils.py takes it; one picture on a square."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    before, after = (tokenizer.encode(chunk).ids for chunk in prompt.split("<image>"))
    image = [model.config.image_token_id] * 16
    ids = torch.tensor([[*before, *image, *after[1:]]])  # [1:]: its BOS
    square = Image.new("RGB", (130, 130), grey)
    square.paste(picture(), (0, 20))
    pixels = processor([square], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embeddings = torch.cat([*model.get_image_features(pixel_values=pixels).pooler_output])
    inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    ends = [tokenizer.token_to_id(end) for end in ("</s>", "<|im_end|>", "<|end_of_text|>")]
    return parity.reference(model, inputs, embeddings, [end for end in ends if end is not None])


@pytest.mark.parametrize(
    ("architecture", "tower", "text", "prompt", "template"),
    [
        ("LlavaLlamaForCausalLM", "clip", "llama", "vicuna", "USER: <image>\n{} ASSISTANT:"),
        ("LlavaMistralForCausalLM", "clip", "mistral", "vicuna", "USER: <image>\n{} ASSISTANT:"),
        (  # nanoLLaVA
            "LlavaQwen2ForCausalLM",
            "siglip",
            "qwen2",
            None,
            "<|im_start|>user\n<image>\n{}<|im_end|><|im_start|>assistant\n",
        ),
        ("BunnyPhi3ForCausalLM", "siglip", "phi3", None, BUNNY + "USER: <image>\n{} ASSISTANT:"),
    ],
)
def test_logits_and_greedy_tokens_equal_transformers(
    tmp_path: Path, architecture: str, tower: str, text: str, prompt: str | None, template: str
) -> None:
    model, processor = checkpoint(tmp_path / "in", architecture, tower, text, seed=3)
    grey = CLIP_GREY if tower == "clip" else SIGLIP_GREY
    export(tmp_path / "in", tmp_path / "out", language="f32", prompt=prompt)
    words = template.format(QUESTION)
    expected = reference(tmp_path / "in", model, processor, words, grey)
    found = parity.ours(tmp_path / "out", [Message("user", QUESTION, (0,))], [picture()])
    parity.assert_equal(found, expected)


def test_tiles_are_those_of_the_same_checkpoint_in_transformers(tmp_path: Path) -> None:
    """LLaVA-1.6: image_aspect_ratio anyres, pinpoints as (width, height)."""
    tiny_llava_next.checkpoint(tmp_path / "in")
    expected = export(tmp_path / "in", tmp_path / "expected", language="f32", prompt="vicuna")
    file = tmp_path / "in" / "config.json"
    config = json.loads(file.read_text())
    stored = load_file(tmp_path / "in" / "model.safetensors")
    newline = next(name for name in stored if name.endswith("image_newline"))
    tiny.rename_tensors(
        tmp_path / "in",
        lambda name: "model.image_newline" if name == newline else original(name),
    )
    (tmp_path / "in" / "preprocessor_config.json").unlink()
    pinpoints = [[width, height] for height, width in tiny_llava_next.PINPOINTS]
    flat = {
        **config["text_config"],
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "someone/tiny",
        "vision_config": config["vision_config"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": pinpoints,
    }
    file.write_text(json.dumps(flat))
    found = export(tmp_path / "in", tmp_path / "found", language="f32", prompt="vicuna")
    for name in ("vision.onnx", "language.gguf"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()
    ours, theirs = (json.loads((b / "bundle.json").read_text()) for b in (found, expected))
    assert ours["family"] == theirs["family"] == "llava_next"
    assert ours["image"] == theirs["image"]
    assert ours["prompt"]["image_token"] != theirs["prompt"]["image_token"]  # words tokenized apart
    file.write_text(json.dumps({**flat, "mm_patch_merge_type": "flat"}))
    with pytest.raises(BundleError, match="mm_patch_merge_type 'flat'"):
        export(tmp_path / "in", tmp_path / "flat", prompt="vicuna")


def test_a_tower_cut_above_the_read_layer_is_enough(tmp_path: Path) -> None:
    """Bunny and nanoLLaVA store SigLIP without its last layer, which layer -2 does not need."""
    checkpoint(tmp_path / "in", "LlavaQwen2ForCausalLM", "siglip", "qwen2")
    whole = export(tmp_path / "in", tmp_path / "whole")
    tiny.rename_tensors(
        tmp_path / "in", lambda name: name.replace("vision_model.encoder.layers.3", "unused")
    )
    cut = export(tmp_path / "in", tmp_path / "cut")
    assert (whole / "vision.onnx").read_bytes() == (cut / "vision.onnx").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlavaMptForCausalLM"]}, "LlavaMptForCausalLM"),
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear'"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio 'anyres_max_9'"),
        ({"use_s2": True}, "use_s2"),
        ({"vision_config": None}, "'someone/tiny'"),
    ],
)
def test_what_is_not_known_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    checkpoint(tmp_path / "in", "LlavaLlamaForCausalLM", "clip", "llama")
    file = tmp_path / "in" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(BundleError, match=message):
        export(tmp_path / "in", tmp_path / "out", prompt="vicuna")


def test_a_checkpoint_without_its_tower_says_so(tmp_path: Path) -> None:
    checkpoint(tmp_path / "in", "LlavaLlamaForCausalLM", "clip", "llama")
    tiny.rename_tensors(tmp_path / "in", lambda name: name.replace("vision_tower", "other"))
    with pytest.raises(BundleError, match="no tensors of its vision tower"):
        export(tmp_path / "in", tmp_path / "out", prompt="vicuna")
