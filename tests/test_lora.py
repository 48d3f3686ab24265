"""PEFT adapters, merged at export or switched at run time, against PEFT's own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from edgevlm_export import export
from parity import LOGITS_ATOL
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from test_export_llava import TOLERANCE, Gguf, text_pair, vision_pair
from test_llava_parity import PROMPTS, _reference
from transformers import LlavaForConditionalGeneration

import edgevlm
from edgevlm.bundle import MANIFEST, file_sha256, manifest_text, open_bundle
from edgevlm.cli import run
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


EVERY_LINEAR = {
    "llama": r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
    "phi3": r".*language_model.*\.(qkv|o|gate_up|down)_proj",
}


def logits(vlm: edgevlm.VLM, picture: Image.Image) -> np.ndarray:
    vlm.ask(picture, "What is in the picture?", max_tokens=1)
    return vlm._language.logits()


def expected_logits(
    checkpoint: Path, model: LlavaForConditionalGeneration, picture: Image.Image, text: str
) -> np.ndarray:
    return _reference(checkpoint, model, [picture], PROMPTS[text])[1]


@pytest.mark.parametrize("text", EVERY_LINEAR)
def test_a_switched_adapter_computes_what_peft_computes(
    text: str, tmp_path: Path, picture: Image.Image
) -> None:
    checkpoint = tmp_path / "in"
    model = tiny.llava(checkpoint, text=text, seed=2)
    expected = {None: expected_logits(checkpoint, model, picture, text)}
    settings = {"a": {"r": 3}, "b": {"use_rslora": True, "alpha_pattern": {"down_proj": 9}}}
    for name, setting in settings.items():
        plain = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        setting["target_modules"] = EVERY_LINEAR[text]
        adapted = adapt(plain.eval(), tmp_path / name, **setting)
        expected[name] = expected_logits(checkpoint, adapted, picture, text)
    adapters = {name: tmp_path / name for name in settings}
    bundle = export(checkpoint, tmp_path / "out", language="f32", adapters=adapters)
    assert open_bundle(bundle).adapters == ("a", "b")
    with edgevlm.load(bundle, precise=True, threads=1) as vlm:
        for name in (None, "a", "b", None, "a"):
            vlm.use_adapter(name)
            found = logits(vlm, picture)
            np.testing.assert_allclose(found, expected[name], atol=LOGITS_ATOL, rtol=0)
        with pytest.raises(BundleError, match="has no adapter 'c'; it has: a, b"):
            vlm.use_adapter("c")
        np.testing.assert_allclose(logits(vlm, picture), found, atol=LOGITS_ATOL, rtol=0)
    with edgevlm.load(bundle, precise=True, threads=1, adapter="b") as vlm:
        np.testing.assert_allclose(logits(vlm, picture), expected["b"], atol=LOGITS_ATOL, rtol=0)
    assert np.abs(expected["a"] - expected[None]).max() > 0.1
    assert np.abs(expected["a"] - expected["b"]).max() > 0.1


def test_an_adapter_that_is_always_on_stays_on(tmp_path: Path, picture: Image.Image) -> None:
    for seed, name in enumerate(("a", "b")):
        model = tiny.llava(tmp_path / "in", seed=2)
        adapt(model, tmp_path / name, r=3 + seed, target_modules=LANGUAGE)
    both = {"a": tmp_path / "a", "b": tmp_path / "b"}
    bundle = export(tmp_path / "in", tmp_path / "out", language="f32", adapters=both)
    file = (bundle / "adapter-a.gguf").rename(bundle / "adapter.gguf")  # as nano has one
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"].pop("adapter-a.gguf")
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    (bundle / MANIFEST).write_text(manifest_text(manifest))
    adapters = {"b": tmp_path / "b"}
    merged = export(
        tmp_path / "in", tmp_path / "m", language="f32", lora=tmp_path / "a", adapters=adapters
    )
    found = []
    for one in (bundle, merged):
        with edgevlm.load(one, precise=True, threads=1) as vlm:
            before = logits(vlm, picture)
            vlm.use_adapter("b")
            found.append((before, logits(vlm, picture)))
    np.testing.assert_allclose(found[0], found[1], atol=LOGITS_ATOL, rtol=0)
    assert np.abs(found[0][0] - found[0][1]).max() > 0.1


def test_what_cannot_be_switched_is_refused(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "in")
    for name, settings, words in (
        ("projector", {"target_modules": PROJECTOR}, "changes multi_modal_projector"),
        ("whole", CASES["a module trained whole"], "changes multi_modal_projector"),
        ("transposed", {"target_modules": LANGUAGE}, "lie transposed"),
    ):
        model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "in", dtype=torch.float32)
        adapt(model, tmp_path / name, **settings)
        if name == "transposed":
            change_config(tmp_path / name, fan_in_fan_out=True)
        with pytest.raises(BundleError, match=rf"{words}.*merge it \(--lora DIR\)|another model"):
            export(tmp_path / "in", tmp_path / "out", adapters={"x": tmp_path / name})
    with pytest.raises(BundleError, match=r"adapter name '\.\./x'"):
        export(tmp_path / "in", tmp_path / "out", adapters={"../x": tmp_path / "whole"})
    assert not (tmp_path / "out").exists()


def test_from_the_command_line(
    tmp_path: Path, picture: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    adapt(tiny.llava(tmp_path / "in"), tmp_path / "lora", target_modules=LANGUAGE)
    photo, out = tmp_path / "photo.png", str(tmp_path / "out")
    picture.save(photo)
    given = str(tmp_path / "lora")
    command = ["export", str(tmp_path / "in"), "-o", out, "--llm", "f32", "--vision", "fp32"]
    assert run([*command, "--lora", given, "--lora", given]) == 2
    assert run([*command, "--lora", "nowhere=there"]) == 2
    assert run([*command, "--lora", f"pets={given}"]) == 0
    ask = ["ask", str(photo), "What is it?", "-m", out, "-n", "12", "-q"]
    capsys.readouterr()
    assert run(ask) == 0
    plain = capsys.readouterr().out
    assert run([*ask, "--adapter", "pets"]) == 0
    assert capsys.readouterr().out != plain
    assert run([*ask, "--adapter", "cars"]) == 5
    assert "has no adapter 'cars'; it has: pets" in capsys.readouterr().err
    assert run(["info", out]) == 0
    assert "adapters: pets" in capsys.readouterr().out
