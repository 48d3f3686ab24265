"""Which release a Moondream checkpoint is, its traps, and what its bundle says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from edgevlm_export import export
from edgevlm_export.oracles.moondream import Reference
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_moondream import RELEASES, moondream, starmie, tokenizer

import edgevlm
from edgevlm.bundle import manifest_text
from edgevlm.errors import BundleError


@pytest.mark.parametrize("names", ["2024", "2025"])
@pytest.mark.parametrize("release", RELEASES)
def test_the_release_is_told_by_tensors_and_code(tmp_path: Path, release: str, names: str) -> None:
    moondream(tmp_path / "checkpoint", release, names=names)
    manifest = manifest_of(export(tmp_path / "checkpoint", tmp_path / "bundle"))
    assert manifest["family"] == "moondream"
    assert release in manifest["card"]["summary"]


def test_without_its_code_a_release_must_be_named(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    moondream(checkpoint, "2025-03-27")
    (checkpoint / "moondream.py").unlink()
    with pytest.raises(BundleError, match="2025-01-09 or 2025-03-27"):
        export(checkpoint, tmp_path / "bundle")
    manifest = manifest_of(export(checkpoint, tmp_path / "bundle", release="2025-01-09"))
    assert manifest["region"] == {"log_sizes": False}


def test_starmie_s_tokenizer_alone_tells_its_release(tmp_path: Path) -> None:
    moondream(tmp_path / "checkpoint", "2025-06-21")
    (tmp_path / "checkpoint" / "moondream.py").unlink()
    manifest = manifest_of(export(tmp_path / "checkpoint", tmp_path / "bundle"))
    assert "2025-06-21" in manifest["card"]["summary"]


def test_a_release_that_the_tensors_contradict_is_refused(tmp_path: Path) -> None:
    moondream(tmp_path / "checkpoint", "2024-05-20")
    with pytest.raises(BundleError, match="is not like the release of 2025-01-09"):
        export(tmp_path / "checkpoint", tmp_path / "bundle", release="2025-01-09")


def test_the_tokenizer_of_another_release_is_refused_and_explained(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    moondream(checkpoint, "2025-06-21")
    right, wrong = tmp_path / "starmie.json", checkpoint / "tokenizer.json"
    right.write_bytes(wrong.read_bytes())
    tokenizer("2025-03-27").save(str(wrong))
    with pytest.raises(BundleError, match=r"starmie-v1.*--tokenizer"):
        export(checkpoint, tmp_path / "bundle")
    bundle = export(checkpoint, tmp_path / "bundle", tokenizer=right)
    assert (bundle / "tokenizer.json").read_bytes() == right.read_bytes()


def test_starmie_beside_an_older_release_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    moondream(checkpoint, "2025-03-27")
    tokenizer("2025-06-21").save(str(checkpoint / "tokenizer.json"))
    with pytest.raises(BundleError, match=r"belongs to another model.*--tokenizer"):
        export(checkpoint, tmp_path / "bundle")


def test_real_sizes_and_an_empty_config(tmp_path: Path, picture: Image.Image) -> None:
    """729 patches, 12 crops, 51200 tokens, the reference's own templates."""
    reference = moondream(
        tmp_path / "checkpoint", grid=27, overlap=4, vocabulary=starmie(),
        vision_width=64, vision_heads=16,
    )  # fmt: skip
    photo = picture.resize((640, 480))
    with torch.no_grad():
        rows = torch.cat([reference.begin(reference.encode(photo), 0)])
        asked = [1, 32708, 2, 6382, 3]
        expected, _ = reference.greedy(torch.cat([rows, reference.embed(asked)]), 730, 6, 0, (3,))
        named = [1, 7235, 476, 2, *starmie().encode(" query").ids, 3]
        ((x, y, w, h),) = reference.find(torch.cat([rows, reference.embed(named)]), 0, True, 1)
    export(tmp_path / "checkpoint", tmp_path / "bundle", language="f32")
    with edgevlm.load(tmp_path / "bundle", precise=True, threads=1) as vlm:
        image = vlm.encode(photo)
        assert image.layout.n_tiles == 9
        np.testing.assert_allclose(image.embeddings, rows.numpy(), atol=1e-4, rtol=0)
        answer = vlm.describe(image, max_tokens=6, repetition_stop=False)
        (box,) = vlm.detect(image, "query", max_objects=1)
    assert answer.text == starmie().decode(expected).strip()
    assert answer.image_tokens == 730
    corners = (box.x_min, box.y_min, box.x_max, box.y_max)
    np.testing.assert_allclose(corners, (x - w / 2, y - h / 2, x + w / 2, y + h / 2), atol=1e-6)


def test_the_small_model_s_heads_are_known(tmp_path: Path, picture: Image.Image) -> None:
    reference = moondream(tmp_path / "checkpoint", vision_width=720, vision_heads=10)
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    del config["config"]["vision"]["enc_n_heads"]
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    _same_embeddings(tmp_path, reference, picture)


def test_grouped_keys_and_values(tmp_path: Path, picture: Image.Image) -> None:
    moondream(tmp_path / "checkpoint", "2025-03-27", text_heads=4, text_kv_heads=2)
    export(tmp_path / "checkpoint", tmp_path / "bundle", language="f32")
    with edgevlm.load(tmp_path / "bundle") as vlm:
        assert vlm.describe(picture, max_tokens=3, repetition_stop=False).generated_tokens == 3


def _pack(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.text.blocks.0.mlp.fc1.weight.packed"] = torch.zeros(4, dtype=torch.uint8)


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.text.blocks.0.mlp.gate.weight"] = torch.zeros(4)


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.region.size_decoder.fc2.bias"]


def _skip(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".text.blocks.0." in name]:
        tensors[name.replace(".blocks.0.", ".blocks.5.")] = tensors[name].clone()


def _forget(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(f"model.{name}")


def _flatten(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({f"model.{name}": tensors[f"model.{name}"].flatten()})


def _narrow(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("weight", "bias"):
        name = f"model.vision.proj_mlp.fc2.{part}"
        tensors[name] = tensors[name][:64].clone()


def _widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.vision.proj_mlp.fc1.weight"] = torch.zeros(90, 50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_pack, "int4"),
        (_add, r"gate.weight .* is not a part"),
        (_drop, "size_decoder.fc2.bias is missing"),
        (_skip, r"text blocks \[0, 1, 5\]"),
        (_widen, "projector reads 50"),
        (_narrow, "projector gives 64 values, the language model takes 128"),
        (_forget("region.coord_encoder.weight"), "coord_encoder.weight is missing"),
        (_forget("vision.blocks.1.attn.proj.bias"), "attn.proj.bias is missing"),
        (_forget("vision.blocks.0.mlp.fc1.bias"), "mlp.fc1.bias is missing"),
        (_forget("vision.proj_mlp.fc2.bias"), "proj_mlp.fc2.bias is missing"),
        (_forget("text.wte"), "text.wte is missing"),
        (_flatten("text.wte"), "text.wte .* must have 2 axes"),
        (_flatten("vision.pos_emb"), "vision.pos_emb .* must have 3 axes"),
        (_flatten("region.size_features"), "size_features .* must have 2 axes"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    moondream(tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(BundleError, match=message):
        export(tmp_path / "checkpoint", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("text", {"n_layers": 7}, "num_hidden_layers = 7"),
        ("text", {"n_heads": 3}, "3 heads"),
        ("vision", {"enc_n_heads": 7}, "7 heads"),
        ("tokenizer", {"bos_id": 10**6}, "token 1000000"),
        ("tokenizer", {"bos_id": "zero"}, "something else than token ids"),
        ("tokenizer", {"templates": {"query": {"prefix": [1]}}}, "something else than token ids"),
        ("tokenizer", {"templates": {"detect": {"prefix": ["a"]}}}, "something else than"),
        ("tokenizer", {"templates": {"query": None}}, "something else than"),
        ("tokenizer", {"templates": {"caption": 7}}, "something else than"),
        ("text", {"n_heads": "two"}, "another type"),
        ("vision", {"max_crops": []}, "another type"),
    ],
)
def test_a_config_of_another_checkpoint_is_refused(
    tmp_path: Path, section: str, change: dict[str, object], message: str
) -> None:
    moondream(tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "config.json"
    config = json.loads(file.read_text())
    config["config"][section] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(BundleError, match=message):
        export(tmp_path / "checkpoint", tmp_path / "bundle")


def test_the_second_suffix_can_be_switched_off(tmp_path: Path, picture: Image.Image) -> None:
    moondream(tmp_path / "checkpoint")
    bundle = export(tmp_path / "checkpoint", tmp_path / "bundle", language="f32")
    with edgevlm.load(bundle) as vlm:
        twice = vlm.ask(picture, "Who?", max_tokens=1).prompt_tokens
    manifest = manifest_of(bundle)
    assert manifest["prompt"]["query"][-2:] == [[3], [3]]
    manifest["prompt"]["query"].pop()
    (bundle / "bundle.json").write_text(manifest_text(manifest))
    with edgevlm.load(bundle) as vlm:
        assert vlm.ask(picture, "Who?", max_tokens=1).prompt_tokens == twice - 1


def _same_embeddings(tmp_path: Path, reference: Reference, picture: Image.Image) -> None:
    with torch.no_grad():
        expected = reference.begin(reference.encode(picture), 0).numpy()
    export(tmp_path / "checkpoint", tmp_path / "bundle")
    with edgevlm.load(tmp_path / "bundle") as vlm:
        found = vlm.encode(picture).embeddings
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def manifest_of(bundle: Path) -> dict[str, dict[str, list[list[int]]]]:
    manifest: dict[str, dict[str, list[list[int]]]] = json.loads(
        (bundle / "bundle.json").read_text()
    )
    return manifest
