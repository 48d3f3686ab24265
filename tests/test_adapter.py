"""A LoRA adapter in a bundle against the same adapter in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tiny
import torch
from edgevlm_export import export
from edgevlm_export.nano import adapter
from PIL import Image
from test_llava_parity import PROMPTS, _ours, _reference

from edgevlm.bundle import MANIFEST, file_sha256, manifest_text


def test_an_adapted_model_answers_as_transformers_does(
    tmp_path: Path, picture: Image.Image
) -> None:
    checkpoint = tmp_path / "checkpoint"
    reference = tiny.llava(checkpoint, seed=7)
    bundle = export(checkpoint, tmp_path / "bundle", language="f32")
    plain_ids, plain_logits = _ours(bundle, [picture])

    torch.manual_seed(0)
    text = reference.model.language_model
    learned = adapter.attach(SimpleNamespace(model=text))
    for value in learned.values():
        value.data = 0.3 * torch.randn_like(value)
    _add_to(bundle, learned, text.config)
    expected_ids, expected_logits = _reference(checkpoint, reference, [picture], PROMPTS["llama"])
    ids, logits = _ours(bundle, [picture])

    np.testing.assert_allclose(logits, expected_logits, atol=2e-3, rtol=0)  # float32, two orders
    assert ids == expected_ids
    assert np.abs(logits - plain_logits).max() > 0.1
    assert ids != plain_ids


def _add_to(bundle: Path, learned: dict[str, torch.Tensor], config: object) -> None:
    file = bundle / "adapter.gguf"
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads  # type: ignore[attr-defined]
    # float32, because llama.cpp rounds activations to float16 before a float16 matrix
    adapter.write(file, learned, heads, kv_heads, np.float32)
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    (bundle / MANIFEST).write_text(manifest_text(manifest))
