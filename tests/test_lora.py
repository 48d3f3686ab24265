"""PEFT adapters, merged at export, against PEFT's own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from edgevlm_export import export
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_export_llava import TOLERANCE, Gguf, text_pair, vision_pair
from transformers import LlavaForConditionalGeneration

from edgevlm.errors import BundleError

# peft 0.21 still asks transformers 5.23 under the old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning")

LANGUAGE = r".*language_model.*\.(q_proj|v_proj|down_proj)"
PROJECTOR = r".*multi_modal_projector\.linear_[12]"


def adapt(
    model: LlavaForConditionalGeneration, path: Path, **settings: Any
) -> LlavaForConditionalGeneration:
    """Save a random adapter; what comes back computes with it, unmerged."""
    torch.manual_seed(5)
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.normal_(0.0, 0.2)
            elif "modules_to_save" in name:
                value.add_(torch.randn_like(value) * 0.1)
    adapted.save_pretrained(path)
    return adapted.eval().base_model.model


CASES = {
    "language": {"target_modules": LANGUAGE},
    "projector": {"target_modules": PROJECTOR},
    "rank-stabilised": {"target_modules": LANGUAGE, "use_rslora": True},
    "a rank and an alpha of its own": {
        "target_modules": LANGUAGE,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 20},
    },
    "a module trained whole": {
        "target_modules": LANGUAGE,
        "modules_to_save": ["multi_modal_projector"],
    },
}


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_computes_what_peft_computes(case: str, tmp_path: Path) -> None:
    model = tiny.llava(tmp_path / "in")
    plain = export(tmp_path / "in", tmp_path / "plain", language="f32")
    adapted = adapt(model, tmp_path / "lora", **CASES[case])
    bundle = export(tmp_path / "in", tmp_path / "out", language="f32", lora=tmp_path / "lora")
    gguf: dict[str, Gguf] = {}
    for ours, expected in (
        vision_pair(tmp_path / "in", bundle, adapted, "clip"),
        text_pair(bundle, adapted, gguf),
    ):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)
    before = text_pair(plain, adapted, gguf), vision_pair(tmp_path / "in", plain, adapted, "clip")
    assert any(np.abs(ours - expected).max() > 0.05 for ours, expected in before)
    for file in gguf.values():
        file.close()
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert manifest["source"]["lora"] == "lora"


@pytest.mark.parametrize("names", ["transformers 4 saved", "transformers 4 state"])
def test_the_adapter_follows_the_checkpoints_names(names: str, tmp_path: Path) -> None:
    adapt(tiny.llava(tmp_path / "a"), tmp_path / "lora", target_modules=LANGUAGE)
    tiny.llava(tmp_path / "b", names=names)
    one = export(tmp_path / "a", tmp_path / "c", lora=tmp_path / "lora")
    two = export(tmp_path / "b", tmp_path / "d", lora=tmp_path / "lora")
    assert (one / "language.gguf").read_bytes() == (two / "language.gguf").read_bytes()


def change_config(adapter: Path, **settings: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter; only LORA"),
        ({"use_dora": True}, "uses use_dora"),
        ({"lora_alpha": "much"}, "lora_alpha = 'much'"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    adapt(tiny.llava(tmp_path / "in"), tmp_path / "lora", target_modules=LANGUAGE)
    change_config(tmp_path / "lora", **settings)
    with pytest.raises(BundleError, match=words):
        export(tmp_path / "in", tmp_path / "out", lora=tmp_path / "lora")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    adapt(tiny.llava(tmp_path / "in"), tmp_path / "lora", target_modules=LANGUAGE)
    tiny.llava(tmp_path / "wide", language={"intermediate_size": 128})
    with pytest.raises(BundleError, match="trained on another model"):
        export(tmp_path / "wide", tmp_path / "out", lora=tmp_path / "lora")
    with pytest.raises(BundleError, match=r"has no adapter_config\.json"):
        export(tmp_path / "in", tmp_path / "out", lora=tmp_path / "in")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, file)
    with pytest.raises(BundleError, match="has no lora_A and lora_B of one rank"):
        export(tmp_path / "in", tmp_path / "out", lora=tmp_path / "lora")
