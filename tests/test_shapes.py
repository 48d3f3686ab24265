"""LLaVA checkpoints of shapes that no released model has, exported and run against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parity
import pytest
import tiny
import torch
from edgevlm_export import export
from PIL import Image
from transformers import AutoImageProcessor

from edgevlm.bundle import open_bundle
from edgevlm.prompt import Message

FULL = {"vision_feature_select_strategy": "full"}
ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0}
ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "one key-value head of many": {
        "language": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 1}
    },
    "heads wider than the model": {"language": {"num_attention_heads": 4, "head_dim": 32}},
    "biases everywhere": {"language": {"attention_bias": True, "mlp_bias": True}},
    "rope of Llama 3.1": {"language": {"rope_parameters": ROPE}},
    "linear rope": {
        "language": {
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}
        }
    },
    "tied embeddings, bfloat16, several shards": {
        "config": {"tie_word_embeddings": True},
        "language": {"tie_word_embeddings": True},
        "dtype": torch.bfloat16,
        "shard": "60KB",
    },
    "mistral in float16": {"text": "mistral", "dtype": torch.float16},
    "phi3 with grouped heads": {
        "text": "phi3",
        "language": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
    },
    "qwen2, tied": {
        "text": "qwen2",
        "tower": "siglip",
        "config": {**FULL, "tie_word_embeddings": True},
        "language": {"tie_word_embeddings": True},
    },
    "small patches, three heads": {
        "patch_px": 6,
        "image_px": 42,
        "vision": {"hidden_size": 36, "num_attention_heads": 3, "intermediate_size": 51},
    },
    "a rest beside the patches": {"tower": "siglip", "image_px": 67, "config": FULL},
    "one patch": {"image_px": 14, "config": FULL},
    "two feature layers": {"config": {"vision_feature_layer": [-2, 1]}},
    "an early feature layer, all rows": {"config": {"vision_feature_layer": 1, **FULL}},
    "a projector without biases": {"config": {"multimodal_projector_bias": False}},
    "an exact GELU in the tower": {"vision": {"hidden_act": "gelu"}},
}


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_any_shape_answers_as_transformers_does(
    shape: str, tmp_path: Path, picture: Image.Image
) -> None:
    model = tiny.llava(tmp_path / "in", seed=11, **SHAPES[shape])
    bundle = export(tmp_path / "in", tmp_path / "out", language="f32")
    asked = [Message("user", "What is in the picture?", (0,))]
    found = parity.ours(bundle, asked, [picture])
    processor = AutoImageProcessor.from_pretrained(tmp_path / "in", backend="pil")
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    embeddings = torch.cat([*model.get_image_features(pixel_values=pixels).pooler_output])
    ids = torch.tensor([found.prompt])
    inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    ends = open_bundle(bundle).manifest["generation"]["stop_token_ids"]
    parity.assert_equal(found, parity.reference(model, inputs, embeddings, ends))
