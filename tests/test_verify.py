"""`edgevlm verify`: an exact export is exact, a quantized one says how far off it is."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny
import tiny_idefics2
import tiny_idefics3
import tiny_llava_next
import tiny_moondream
import torch
from edgevlm_export import export
from PIL import Image
from safetensors.torch import load_file, save_file

from edgevlm.bundle import open_bundle
from edgevlm.cli import run

Captured = pytest.CaptureFixture[str]


def card(bundle: Path, checkpoint: Path, capsys: Captured, *more: str) -> dict[str, object]:
    capsys.readouterr()
    arguments = [str(bundle), "--reference", str(checkpoint), "--json", "-t", "1", *more]
    assert run(["verify", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("text", ["llama", "phi3"])
def test_an_exact_export_is_exact(tower: str, text: str, tmp_path: Path, capsys: Captured) -> None:
    full = {"vision_feature_select_strategy": {"clip": "default", "siglip": "full"}[tower]}
    tiny.llava(tmp_path / "in", tower, text, seed=3, config=full)
    bundle = export(tmp_path / "in", tmp_path / "out", language="f32")
    found = card(bundle, tmp_path / "in", capsys)
    assert found["pixels_max_difference"] == 0  # both resize with Pillow's filter
    assert found["vision_fp32_max_error"] < 1e-4
    assert found["vision_cosine_worst_token"] > 0.999999
    assert found["logits_max_error"] < 2e-3  # both sides add up in their own order
    assert found["greedy_tokens_equal"] == found["greedy_tokens"]
    assert max(found["greedy_tokens"]) > 20
    assert found["first_token_equal"] == found["photos"] == 4
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert manifest["card"]["parity"]["reference"] == found
    open_bundle(bundle)


@pytest.mark.parametrize("release", tiny_moondream.RELEASES)
def test_a_model_that_transformers_lacks_is_held_against_its_arithmetic(
    release: str, tmp_path: Path, capsys: Captured
) -> None:
    named = "2024" if release == "2025-01-09" else None
    tiny_moondream.moondream(tmp_path / "in", release, torch.bfloat16, seed=2, names=named)
    bundle = export(tmp_path / "in", tmp_path / "out", language="f32")
    found = card(bundle, tmp_path / "in", capsys)
    assert str(found["reference"]).startswith("the arithmetic of vikhyat/moondream in torch")
    assert found["pixels_max_difference"] == 0
    assert found["vision_fp32_max_error"] < 1e-4
    assert found["logits_max_error"] < 4e-3  # llama.cpp's GELU reads a float16 table
    assert found["greedy_tokens_equal"] == found["greedy_tokens"]
    assert max(found["greedy_tokens"]) > 20
    if release >= "2025":
        assert found["places_equal"] == found["places"] == [10] * 4
    else:
        assert "places" not in found


def test_a_quantized_model_that_points_says_what_it_lost(tmp_path: Path, capsys: Captured) -> None:
    tiny_moondream.moondream(tmp_path / "in", seed=2, text_heads=4, text_kv_heads=4)
    bundle = export(tmp_path / "in", tmp_path / "out", language="q4_0", vision="int8")
    found = card(bundle, tmp_path / "in", capsys)
    assert found["vision_fp32_max_error"] < 1e-4
    assert found["vision_cosine_worst_token"] < 0.99999
    assert found["logits_max_error"] > 0.01
    assert max(found["places_equal"]) < 10


def test_a_tower_that_leaves_a_rest_is_compared_where_it_looks(
    tmp_path: Path, capsys: Captured
) -> None:
    tiny.llava(tmp_path / "in", image_px=62)
    bundle = export(tmp_path / "in", tmp_path / "out", language="f32")
    found = card(bundle, tmp_path / "in", capsys)
    assert found["pixels_max_difference"] == 0
    assert found["vision_fp32_max_error"] < 1e-4


@pytest.mark.parametrize("family", [tiny_llava_next, tiny_idefics2, tiny_idefics3])
def test_tiles_and_splits_are_compared_too(
    family: ModuleType, tmp_path: Path, capsys: Captured
) -> None:
    family.checkpoint(tmp_path / "in")
    bundle = export(tmp_path / "in", tmp_path / "out", language="f32")
    found = card(bundle, tmp_path / "in", capsys)
    # Idefics2's processor pads its pictures at the right and below; ours come as rows of patches
    assert found["pixels_max_difference"] == (None if family is tiny_idefics2 else 0)
    assert found["vision_fp32_max_error"] < 1e-4
    assert found["greedy_tokens_equal"] == found["greedy_tokens"]


def test_a_quantized_export_says_what_it_lost(tmp_path: Path, capsys: Captured) -> None:
    tiny.llava(tmp_path / "in", language={"hidden_size": 256, "intermediate_size": 512})
    bundle = export(tmp_path / "in", tmp_path / "out", language="q4_0", vision="int8")
    found = card(bundle, tmp_path / "in", capsys)
    assert found["vision_fp32_max_error"] < 1e-4  # the graph itself, before int8
    assert 0.99 < found["vision_cosine_worst_token"] < 0.99999
    assert found["logits_max_error"] > 0.01
    kept = json.loads((bundle / "bundle.json").read_text())["card"]["parity"]
    assert set(kept) == {"vision_int8", "reference"}


def test_choices_at_export_are_kept_to(tmp_path: Path, capsys: Captured) -> None:
    tiny.llava(tmp_path / "in")
    (tmp_path / "in" / "chat_template.jinja").unlink()
    bundle = export(tmp_path / "in", tmp_path / "out", language="f32", prompt="vicuna", fit="pad")
    found = card(bundle, tmp_path / "in", capsys)
    assert found["pixels_max_difference"] > 50  # the reference crops; the export was told to pad
    assert found["vision_fp32_max_error"] > 0.1


def test_another_checkpoint_is_noticed(tmp_path: Path, capsys: Captured) -> None:
    tiny.llava(tmp_path / "in")
    bundle = export(tmp_path / "in", tmp_path / "out", language="f32")
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    tensors["language_model.model.layers.1.mlp.down_proj.weight"] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    found = card(bundle, tmp_path / "in", capsys)
    assert found["vision_fp32_max_error"] < 1e-4
    assert found["logits_max_error"] > 0.05


def test_a_person_gets_a_table_and_names_the_photos(tmp_path: Path, capsys: Captured) -> None:
    tiny.llava(tmp_path / "in")
    bundle = export(tmp_path / "in", tmp_path / "out", language="f32")
    noise = np.random.default_rng(0).integers(0, 256, (80, 60, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    arguments = ["--reference", str(tmp_path / "in"), "--photos", str(tmp_path / "photo.png")]
    assert run(["verify", str(bundle), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "photos:                     1" in lines
    assert "pixels max difference:      0" in lines


def test_what_transformers_cannot_open_is_one_line(tmp_path: Path, capsys: Captured) -> None:
    tiny.llava(tmp_path / "in")
    bundle = export(tmp_path / "in", tmp_path / "out", language="f32")
    config = tmp_path / "in" / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llava"', '"model_type": "none"'))
    capsys.readouterr()
    assert run(["verify", str(bundle), "--reference", str(tmp_path / "in")]) == 5
    said = capsys.readouterr().err
    assert "transformers cannot open" in said
    assert len(said.strip().splitlines()) == 1
