"""Fewer image tokens by VisionZip, against a plain writing of the paper on transformers' tower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import parity
import pytest
import tiny
import torch
from edgevlm_export import export
from PIL import Image
from transformers import AutoImageProcessor, LlavaForConditionalGeneration

import edgevlm
from edgevlm.errors import PromptError

CLIP = {"vision_feature_select_strategy": "default"}
SIGLIP = {"vision_feature_select_strategy": "full"}


@torch.no_grad()
def shortened(model: LlavaForConditionalGeneration, pixels: torch.Tensor, n: int) -> np.ndarray:
    """arXiv 2412.04467, sections 3.2 and 3.3, one patch after the other: [n, n_embd]."""
    model.set_attn_implementation("eager")
    tower = model.model.vision_tower
    layer = tower.encoder.layers[-2]
    keys: list[torch.Tensor] = []
    hook = layer.self_attn.k_proj.register_forward_hook(lambda _, __, out: keys.append(out))
    outputs = tower(pixels, output_hidden_states=True, output_attentions=True)
    hook.remove()
    states, attention = outputs.hidden_states[-2][0], outputs.attentions[-2][0]
    has_class = len(states) > (pixels.shape[-1] // tower.config.patch_size) ** 2
    n_heads = layer.self_attn.num_heads
    metric = keys[0][0].reshape(len(states), n_heads, -1).mean(dim=1)
    if has_class:
        importance = attention[:, 0, 1:].sum(dim=0)
        patches, metric = states[1:], metric[1:]
    else:
        importance = attention.mean(dim=(0, 1))
        patches = states
    n_dominant = {8: 6, 11: 9, 15: 12}[n]  # 27 of 32, rounded down
    n_contextual = n - n_dominant
    kept = sorted(importance.argsort(descending=True)[: n_dominant - has_class].tolist())
    others = [i for i in range(len(patches)) if i not in kept]
    step = max(1, len(others) // n_contextual)
    targets = others[::step][:n_contextual]
    joined: dict[int, list[torch.Tensor]] = {target: [] for target in targets}
    for i in others:
        if i not in targets:
            alike = [torch.cosine_similarity(metric[i], metric[t], dim=0) for t in targets]
            joined[targets[int(torch.stack(alike).argmax())]].append(patches[i])
    rows = [states[0]] * has_class + [patches[i] for i in kept]
    for target in targets:
        more = torch.stack(joined[target]).mean(dim=0) if joined[target] else 0
        rows.append(patches[target] + more)
    return model.model.multi_modal_projector(torch.stack(rows)[None])[0].numpy()


@pytest.mark.parametrize("n", [8, 11, 15])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_the_tokens_are_those_of_the_paper(
    tmp_path: Path, picture: Image.Image, tower: str, n: int
) -> None:
    selection = CLIP if tower == "clip" else SIGLIP
    reference = tiny.llava(tmp_path / "checkpoint", tower, seed=5, config=selection)
    export(tmp_path / "checkpoint", tmp_path / "bundle", language="f32")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "checkpoint", backend="pil")
    pixels = processor(picture, return_tensors="pt")["pixel_values"]

    with edgevlm.load(tmp_path / "bundle", visual_tokens=n, threads=1) as vlm:
        found = vlm.encode(picture)
        answer = vlm.ask(found, "What is it?", max_tokens=2)

    expected = shortened(reference, pixels, n)
    np.testing.assert_allclose(found.embeddings, expected, atol=parity.EMBEDDINGS_ATOL, rtol=0)
    assert answer.image_tokens == n


@pytest.mark.parametrize("vision", ["int8", "fp16"])
def test_quantized_towers_can_do_it_too(tmp_path: Path, picture: Image.Image, vision: str) -> None:
    tiny.llava(tmp_path / "checkpoint", seed=6, config=CLIP)
    export(tmp_path / "checkpoint", tmp_path / "bundle", language="f16", vision=vision)

    with edgevlm.load(tmp_path / "bundle", visual_tokens=8, threads=1) as vlm:
        assert vlm.encode(picture).embeddings.shape == (8, vlm.bundle.manifest["n_embd"])


@pytest.mark.parametrize("n", [3, 16, 700])
def test_numbers_that_make_no_sense_are_refused(tmp_path: Path, n: int) -> None:
    tiny.llava(tmp_path / "checkpoint", seed=7, config=CLIP)
    export(tmp_path / "checkpoint", tmp_path / "bundle", language="f16")

    with pytest.raises(PromptError, match="from 4 to 15 of its 16 can be asked for"):
        edgevlm.load(tmp_path / "bundle", visual_tokens=n)


def test_a_tower_read_at_several_layers_keeps_all_tokens(
    tmp_path: Path, picture: Image.Image
) -> None:
    tiny.llava(tmp_path / "checkpoint", seed=8, config={**CLIP, "vision_feature_layer": [-3, -2]})
    export(tmp_path / "checkpoint", tmp_path / "bundle", language="f16")

    with pytest.raises(PromptError, match="only LLaVA models"):
        edgevlm.load(tmp_path / "bundle", visual_tokens=8)
    with edgevlm.load(tmp_path / "bundle", threads=1) as vlm:
        assert vlm.encode(picture).embeddings.shape[0] == 16
