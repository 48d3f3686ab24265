"""llama.cpp's pairs of files: written here as its converter writes them, held against
transformers and against the export of the checkpoint that they came from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_llava_next
import torch
from edgevlm_export import export, export_pair
from gguf import GGMLQuantizationType, GGUFWriter, quants
from PIL import Image
from test_export_llava import TOLERANCE, vision_pair
from test_llava_parity import _ours as answer
from transformers import LlavaForConditionalGeneration

from edgevlm import prefill
from edgevlm.cli import run
from edgevlm.errors import BundleError

LAYER = {  # the old converter's names: its ffn_down is the first half of the MLP
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_down",
    "mlp.fc2": "ffn_up",
}


def write_mmproj(
    path: Path,
    model: LlavaForConditionalGeneration,
    *,
    kind: str = "F32",
    modern: bool = False,
    n_layers: int | None = None,
    pinpoints: list[list[int]] | None = None,
    newline: bool = True,
) -> Path:
    """As tools/mtmd/legacy-models/convert_image_encoder_to_gguf.py; `modern` names the halves of
    the MLP for what they are and the layer that is read; `pinpoints` are 1.6's (width, height)."""
    vision = model.config.vision_config
    state = {n.removeprefix("model."): v.numpy() for n, v in model.state_dict().items()}
    n_layers = n_layers or vision.num_hidden_layers - 1  # feature layer -2
    writer = GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    for key, value in {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size,
        "attention.head_count": vision.num_attention_heads,
        "block_count": n_layers,
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision.layer_norm_eps)
    if modern:
        writer.add_array("clip.vision.feature_layer", [n_layers])
    clip = vision.model_type == "clip_vision_model"
    writer.add_bool("clip.use_gelu", vision.hidden_act != "quick_gelu")
    mean = [0.48145466, 0.4578275, 0.40821073] if clip else [0.5] * 3
    writer.add_array("clip.vision.image_mean", mean)
    std = [0.26862954, 0.26130258, 0.27577711] if clip else [0.5] * 3
    writer.add_array("clip.vision.image_std", std)

    def add(name: str, source: str) -> None:
        values = np.ascontiguousarray(state[source], np.float32)
        if values.ndim == 2 and kind != "F32":
            dtype = GGMLQuantizationType[kind]
            writer.add_tensor(name, quants.quantize(values, dtype), raw_dtype=dtype)
        else:
            writer.add_tensor(name, values)

    embeddings = "vision_tower.embeddings."
    add("v.patch_embd.weight", f"{embeddings}patch_embedding.weight")
    add("v.position_embd.weight", f"{embeddings}position_embedding.weight")
    if clip:
        add("v.class_embd", f"{embeddings}class_embedding")
        for part in ("weight", "bias"):
            add(f"v.pre_ln.{part}", f"vision_tower.pre_layrnorm.{part}")
    else:
        add("v.patch_embd.bias", f"{embeddings}patch_embedding.bias")
    if pinpoints is not None:
        flat = [side for pinpoint in pinpoints for side in pinpoint]
        writer.add_array("clip.vision.image_grid_pinpoints", flat)
        writer.add_string("clip.vision.mm_patch_merge_type", "spatial_unpad")
        if newline:
            add("model.image_newline", "image_newline")
    names = {**LAYER, "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"} if modern else LAYER
    for layer in range(n_layers):
        for source, name in names.items():
            for part in ("weight", "bias"):
                stem = f"vision_tower.encoder.layers.{layer}.{source}"
                add(f"v.blk.{layer}.{name}.{part}", f"{stem}.{part}")
    for index, source in ((0, "linear_1"), (2, "linear_2")):
        for part in ("weight", "bias"):
            add(f"mm.{index}.{part}", f"multi_modal_projector.{source}.{part}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(
    tmp_path: Path, tower: str = "clip", text: str = "phi3", **options: object
) -> tuple[LlavaForConditionalGeneration, Path, Path, Path]:
    """The reference, the checkpoint's own bundle, and the two files."""
    full = {"vision_feature_select_strategy": {"clip": "default", "siglip": "full"}[tower]}
    model = tiny.llava(tmp_path / "in", tower, text, config=full, **options)
    own = export(tmp_path / "in", tmp_path / "own", language="f32", fit="pad")
    return model, own, own / "language.gguf", write_mmproj(tmp_path / "mmproj.gguf", model)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("text", ["llama", "phi3"])
def test_a_pair_answers_as_its_checkpoint(
    tower: str, text: str, tmp_path: Path, picture: Image.Image
) -> None:
    model, own, language, mmproj = pair(tmp_path, tower, text)
    prompt = {"llama": "vicuna", "phi3": None}[text]  # nothing in the file says vicuna
    bundle = export_pair(language, mmproj, tmp_path / "out", prompt=prompt)
    assert (bundle / "language.gguf").read_bytes() == language.read_bytes()
    ours, expected = vision_pair(tmp_path / "in", bundle, model, tower)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)
    ids, logits = answer(bundle, [picture])
    own_ids, own_logits = answer(own, [picture])
    # llama.cpp tokenizes instead of tokenizer.json; everything else is the same arithmetic
    np.testing.assert_allclose(logits, own_logits, rtol=0, atol=1e-4)
    assert ids == own_ids
    assert len(ids) > 5
    sections = [json.loads((b / "bundle.json").read_text()) for b in (bundle, own)]
    for section in ("image", "prompt", "generation", "n_embd", "n_ctx"):
        assert sections[0][section] == sections[1][section], section
    assert sections[0]["quantization"] == {"vision": "fp32", "language": "f32"}


def test_a_pair_is_verified_against_its_checkpoint(
    tmp_path: Path, picture: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, language, mmproj = pair(tmp_path, "clip", "llama")
    (tmp_path / "in" / "chat_template.jinja").unlink()
    bundle = export_pair(language, mmproj, tmp_path / "out", prompt="vicuna")
    square = tmp_path / "square.png"
    picture.resize((80, 80)).save(square)  # the checkpoint crops, the pair pads
    capsys.readouterr()
    arguments = [str(bundle), "--reference", str(tmp_path / "in"), "--photos", str(square)]
    assert run(["verify", *arguments, "--json", "-t", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pixels_max_difference"] == 0
    assert found["vision_fp32_max_error"] < 1e-4
    assert found["greedy_tokens_equal"] == found["greedy_tokens"]


@pytest.mark.parametrize("text", ["llama", "phi3", "qwen2"])
def test_a_prefill_graph_is_made_of_the_language_file(
    tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(prefill, "fewest_rows_to_open", lambda: 2)
    _, own, language, mmproj = pair(tmp_path, text=text)
    prompt = {"llama": "vicuna", "qwen2": "chatml"}.get(text)
    bundle = export_pair(language, mmproj, tmp_path / "out", prompt=prompt, prefill="fp32")
    ids, logits = answer(bundle, [picture])
    own_ids, own_logits = answer(own, [picture])
    np.testing.assert_allclose(logits, own_logits, rtol=0, atol=2e-3)
    assert ids == own_ids


def test_a_language_file_that_says_more_than_a_graph_knows_is_refused(tmp_path: Path) -> None:
    _, _, language, mmproj = pair(tmp_path, text="llama")
    told = tmp_path / "told.gguf"
    told.write_bytes(language.read_bytes().replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_UP.weight"))
    with pytest.raises(BundleError, match=r"blk\.0\.ffn_UP\.weight, which no prefill graph knows"):
        export_pair(told, mmproj, tmp_path / "out", prompt="vicuna", prefill="int8")


@pytest.mark.parametrize("modern", [False, True])
def test_newer_and_quantized_files_are_read_too(modern: bool, tmp_path: Path) -> None:
    model, _, language, _ = pair(tmp_path, vision={"hidden_size": 96, "intermediate_size": 192})
    whole = write_mmproj(tmp_path / "a.gguf", model, modern=modern)
    half = write_mmproj(tmp_path / "b.gguf", model, modern=modern, kind="Q8_0")
    ours, expected = vision_pair(
        tmp_path / "in", export_pair(language, whole, tmp_path / "c"), model, "clip"
    )
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)
    ours, _ = vision_pair(
        tmp_path / "in", export_pair(language, half, tmp_path / "d"), model, "clip"
    )
    assert 1e-4 < np.abs(ours - expected).max() < 0.1  # eight bits


def test_the_chat_template_in_the_file_chooses_the_prompt(tmp_path: Path) -> None:
    _, _, language, mmproj = pair(tmp_path, text="llama")
    with pytest.raises(BundleError, match="name one with prompt="):
        export_pair(language, mmproj, tmp_path / "out")
    told = tmp_path / "told.gguf"
    command = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", str(language), str(told)]
    subprocess.run([*command, "--chat-template", tiny.VICUNA], check=True, capture_output=True)
    bundle = export_pair(told, mmproj, tmp_path / "out")
    assert json.loads((bundle / "bundle.json").read_text())["prompt"]["generate"] == "ASSISTANT:"


def test_a_pair_of_llava_1_6_sees_the_tiles_of_its_checkpoint(
    tmp_path: Path, picture: Image.Image
) -> None:
    model = tiny_llava_next.checkpoint(tmp_path / "in")
    own = export(tmp_path / "in", tmp_path / "own", language="f32")
    pinpoints = [[width, height] for height, width in tiny_llava_next.PINPOINTS]
    mmproj = write_mmproj(tmp_path / "mmproj.gguf", model, pinpoints=pinpoints)
    language = own / "language.gguf"
    bundle = export_pair(language, mmproj, tmp_path / "out", prompt="vicuna")
    manifests = [json.loads((b / "bundle.json").read_text()) for b in (bundle, own)]
    for section in ("family", "image", "prompt", "generation"):
        assert manifests[0][section] == manifests[1][section], section
    for wide in (picture, picture.resize((300, 80))):
        ids, logits = answer(bundle, [wide])
        own_ids, own_logits = answer(own, [wide])
        np.testing.assert_allclose(logits, own_logits, rtol=0, atol=1e-4)
        assert ids == own_ids
    one_view = export_pair(language, mmproj, tmp_path / "one", prompt="vicuna", fit="pad")
    assert json.loads((one_view / "bundle.json").read_text())["family"] == "llava"
    bare = write_mmproj(tmp_path / "bare.gguf", model, pinpoints=pinpoints, newline=False)
    with pytest.raises(BundleError, match=r"lacks image_newline.*--fit pad"):
        export_pair(language, bare, tmp_path / "no", prompt="vicuna")


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    _, _, language, mmproj = pair(tmp_path)
    wide = tiny.llava(tmp_path / "wide", text="phi3", language={"hidden_size": 128})
    other = write_mmproj(tmp_path / "wide.gguf", wide)
    with pytest.raises(BundleError, match=r"projects to 128 values; .* takes 64"):
        export_pair(language, other, tmp_path / "out")
    with pytest.raises(BundleError, match="is no mmproj file"):
        export_pair(language, language, tmp_path / "out")
    with pytest.raises(BundleError, match="it is a file of another kind"):
        export_pair(mmproj, mmproj, tmp_path / "out")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(mmproj.read_bytes()[:5000])
    with pytest.raises(BundleError, match="not a whole GGUF file"):
        export_pair(language, cut, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_from_the_command_line(
    tmp_path: Path, picture: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, language, mmproj = pair(tmp_path)
    picture.save(tmp_path / "photo.png")
    out = str(tmp_path / "out")
    assert run(["export", str(language), "-o", out]) == 2
    command = ["export", str(language), "--mmproj", str(mmproj), "-o", out]
    assert run([*command, "--llm", "q4_0"]) == 2
    capsys.readouterr()
    assert run(command) == 0
    assert "is ready" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "out" / "bundle.json").read_text())
    assert manifest["quantization"] == {"vision": "int8", "language": "f32", "prefill": "int8"}
    assert run(["describe", str(tmp_path / "photo.png"), "-m", out, "-n", "3"]) == 0


def test_a_whole_clip_l_tower_is_read_before_its_last_layer() -> None:
    from edgevlm_export import pair as module

    class Told:
        path = Path("mmproj.gguf")

        def __init__(self, n_layers: int) -> None:
            self.keys = {"embedding_length": 1024, "block_count": n_layers, "image_size": 336}
            self.keys |= {"patch_size": 14, "attention.head_count": 16}
            self.keys |= {"attention.layer_norm_epsilon": 1e-5}
            self.keys |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}

        def get(self, key: str, default: object = None) -> object:
            return self.keys.get(key.removeprefix("clip.vision."), default)

        need = get

    tensors = {"vision_tower.embeddings.class_embedding": torch.zeros(1)}
    for n_layers in (23, 24):
        config = module._config(Told(n_layers), tensors)  # type: ignore[arg-type]
        assert config["vision_feature_layer"] == [23]
