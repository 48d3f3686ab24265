"""Broken checkpoints and interrupted exports: one clear line, and nothing that opens is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from edgevlm_export import bundle, export
from safetensors.torch import load_file, save_file
from tiny_moondream import moondream

from edgevlm.bundle import open_bundle
from edgevlm.errors import BundleError, UnknownFamily


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensor(
    checkpoint: Path, name: str, value: torch.Tensor | None, extra: str | None = None
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors.pop(name)
    if value is not None:
        tensors[name] = value
    if extra is not None:
        tensors[f"language_model.model.{extra}"] = torch.ones(16)
    save_file(tensors, checkpoint / "model.safetensors")


def truncate(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def lie_about_the_header(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:])


def change_header(checkpoint: Path, **changes: object) -> None:
    file = checkpoint / "model.safetensors"
    data = file.read_bytes()
    (n_bytes,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n_bytes])
    header[MLP] |= changes
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n_bytes :])


def alter(checkpoint: Path, section: str, **changes: object) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    edit(checkpoint / "config.json", **{section: {**config[section], **changes}})


def alter_text(checkpoint: Path, **changes: object) -> None:
    alter(checkpoint, "text_config", **changes)


TOKEN = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False) | {"special": True}
MLP = "language_model.model.layers.0.mlp.up_proj.weight"
PROJECTOR = "multi_modal_projector.linear_2.weight"
TOWER_BIAS = "vision_tower.encoder.layers.0.mlp.fc1.bias"
BROKEN = {
    "missing tensor": (
        lambda c: change_tensor(c, PROJECTOR, None),
        r"multi_modal_projector\.linear_2\.weight is missing",
    ),
    "a tower that lacks a bias": (
        lambda c: change_tensor(c, TOWER_BIAS, None),
        r"layers\.0\.mlp\.fc1\.bias is missing",
    ),
    "a projector that lacks a bias": (
        lambda c: change_tensor(c, PROJECTOR.replace("weight", "bias"), None),
        r"linear_2\.bias is missing",
    ),
    "a projector with biases that the config denies": (
        lambda c: edit(c / "config.json", multimodal_projector_bias=False),
        r"linear_1\.bias is in .*config\.json belongs to another checkpoint",
    ),
    "biases that the config announces": (
        lambda c: alter_text(c, attention_bias=True),
        r"layers\.0\.self_attn\.q_proj\.bias is missing",
    ),
    "a bias that the config does not announce": (
        lambda c: change_tensor(c, MLP, torch.zeros(96, 64), "layers.0.self_attn.q_proj.bias"),
        r"layers\.0\.self_attn\.q_proj\.bias .* is not part of a model",
    ),
    "NaN": (
        lambda c: change_tensor(c, MLP, torch.full((96, 64), torch.nan)),
        r"up_proj\.weight in model\.safetensors holds NaN",
    ),
    "does not fit f16": (
        lambda c: change_tensor(c, MLP, torch.full((96, 64), 1e5)),
        r"blk\.0\.ffn_up\.weight does not fit f16",
    ),
    "projector of another width": (
        lambda c: change_tensor(c, PROJECTOR, torch.zeros(32, 32)),
        r"linear_2\.weight is \[32, 32\] .* make it \[64, 64\]",
    ),
    "quantized storage": (
        lambda c: change_tensor(c, MLP, torch.zeros(96, 64, dtype=torch.int8)),
        r"stored as I8",
    ),
    "a tensor nobody reads": (
        lambda c: change_tensor(c, MLP, torch.zeros(96, 64), "layers.0.q_norm.weight"),
        r"layers\.0\.q_norm\.weight .* is not part of a model of 3 layers",
    ),
    "fewer layers in the config": (
        lambda c: alter_text(c, num_hidden_layers=2),
        r"language_model\.layers\.2\..* is not part of a model of 2 layers",
    ),
    "truncated weights": (truncate, "not a whole safetensors file"),
    "header longer than the file": (lie_about_the_header, "not a whole safetensors file"),
    "shape that is a word": (
        lambda c: change_header(c, shape="I64"),
        "not a whole safetensors file",
    ),
    "dtype that is a list": (
        lambda c: change_header(c, dtype=["F32"]),
        "not a whole safetensors file",
    ),
    "offsets before the data": (
        lambda c: change_header(c, data_offsets=[-24576, 0]),
        "not a whole safetensors file",
    ),
    "no weights": (lambda c: (c / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "no config": (lambda c: (c / "config.json").unlink(), "no config.json"),
    "config is not JSON": (lambda c: (c / "config.json").write_text("{"), "not valid JSON"),
    "no architectures": (lambda c: edit(c / "config.json", architectures=None), "architectures"),
    "architectures that are no names": (
        lambda c: edit(c / "config.json", architectures=[{}]),
        "names no architectures",
    ),
    "no tokenizer": (lambda c: (c / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    "tokenizer of a larger model": (
        lambda c: edit(
            c / "tokenizer.json",
            added_tokens=[{**TOKEN, "id": 9999, "content": "<image>"}],
        ),
        "has token id 9999; the language model has 512 rows",
    ),
    "not a tokenizer": (
        lambda c: edit(c / "tokenizer.json", model={"type": "BPE"}),
        "is not a tokenizer",
    ),
    "image size as a list": (
        lambda c: alter(c, "vision_config", image_size=[56, 56]),
        r"image_size = \[56, 56\]",
    ),
    "vision config of another type": (
        lambda c: edit(c / "config.json", vision_config="clip"),
        r"vision_config = 'clip', which has another type",
    ),
    "rope scaling without its factor": (
        lambda c: alter_text(c, rope_parameters={"rope_type": "linear"}),
        "rope scaling 'linear' .* has no factor",
    ),
    "llama that rotates half a head": (
        lambda c: alter_text(c, partial_rotary_factor=0.5),
        "4 heads of 16, 8 of them rotated, .* not a shape that llama.cpp runs",
    ),
    "mean of two channels": (
        lambda c: edit(c / "preprocessor_config.json", image_mean=[0.5, 0.5]),
        r"has \[0\.5, 0\.5\] where three numbers are needed",
    ),
    "heads that do not divide the width": (
        lambda c: alter(c, "vision_config", num_attention_heads=5),
        "width of 48 into 5 heads",
    ),
    "text size that is no number": (
        lambda c: alter_text(c, num_hidden_layers="three"),
        "num_hidden_layers = 'three'",
    ),
    "image token of another tokenizer": (
        lambda c: edit(c / "config.json", image_token_index=500),
        "image token id 500",
    ),
    "no preprocessor": (
        lambda c: (c / "preprocessor_config.json").unlink(),
        r"no preprocessor_config\.json",
    ),
    "processor of another size": (
        lambda c: edit(
            c / "preprocessor_config.json",
            size={"shortest_edge": 70},
            crop_size={"height": 70, "width": 70},
        ),
        "makes 70 px, the tower takes 56 px",
    ),
    "crop smaller than the resize": (
        lambda c: edit(c / "preprocessor_config.json", size={"shortest_edge": 64}),
        "only one square size",
    ),
    "unknown rope scaling": (
        lambda c: alter_text(c, rope_parameters={"rope_type": "yarn", "factor": 4.0}),
        "rope scaling 'yarn'",
    ),
    "unknown language model": (
        lambda c: alter_text(c, model_type="gemma"),
        "'gemma'; known: llama, mistral, phi3, qwen2",
    ),
    "config of another language model": (
        lambda c: alter_text(c, model_type="phi3"),
        "text_config says phi3",
    ),
    "feature layer out of range": (
        lambda c: edit(c / "config.json", vision_feature_layer=-9),
        "vision_feature_layer -9",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint_is_one_clear_line_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    tiny.llava(tmp_path / "in")
    damage, message = BROKEN[case]
    damage(tmp_path / "in")
    with pytest.raises(BundleError, match=message) as caught:
        export(tmp_path / "in", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_language_model_that_lacks_a_bias_its_kind_always_has(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "in", text="qwen2")
    bias = "language_model.model.layers.1.self_attn.k_proj.bias"
    change_tensor(tmp_path / "in", bias, None)
    with pytest.raises(BundleError, match=r"layers\.1\.self_attn\.k_proj\.bias is missing"):
        export(tmp_path / "in", tmp_path / "out")


def test_missing_shard(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "in", shard="200KB")
    shard = sorted((tmp_path / "in").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(BundleError, match=shard.name):
        export(tmp_path / "in", tmp_path / "out")


def test_the_family_stands_in_for_architectures(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "in")
    edit(tmp_path / "in" / "config.json", architectures=None)
    open_bundle(export(tmp_path / "in", tmp_path / "out", family="llava"))


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "in", shard="200KB")
    first, second = sorted((tmp_path / "in").glob("*.safetensors"))[:2]
    name, value = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: value}, second)
    with pytest.raises(BundleError, match=rf"{name} is in {second.name} and in another shard"):
        export(tmp_path / "in", tmp_path / "out")


def test_unknown_family_lists_what_is_known_and_what_was_seen(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "in")
    edit(tmp_path / "in" / "config.json", architectures=["FuyuForCausalLM"])
    with pytest.raises(UnknownFamily, match=r"FuyuForCausalLM; known families: .*llava"):
        export(tmp_path / "in", tmp_path / "out")
    with pytest.raises(UnknownFamily, match=r"'fuyu' is unknown; known: .*llava"):
        export(tmp_path / "in", tmp_path / "out", family="fuyu")
    export(tmp_path / "in", tmp_path / "out", family="llava")


def test_a_choice_that_a_family_does_not_leave_open_is_refused(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "llava")
    moondream(tmp_path / "moondream")
    for name, choice in (
        ("llava", {"release": "2025-06-21"}),
        ("moondream", {"fit": "pad"}),
        ("moondream", {"prompt": "vicuna"}),
    ):
        with pytest.raises(BundleError, match=f"^{next(iter(choice))}: this family"):
            export(tmp_path / name, tmp_path / "out", **choice)


def test_a_taken_directory_is_not_touched(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(BundleError, match="already exists and is not empty"):
        export(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_killed_export_leaves_nothing_that_opens(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "in")
    script = (
        "import os, pathlib, signal, edgevlm_export.bundle as bundle\n"
        "from edgevlm_export import export\n"
        "bundle.seal = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "export(pathlib.Path('in'), pathlib.Path('out'))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env)
    assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("bundle.json"))
    (left,) = tmp_path.glob(".out.partial-*")
    other = tmp_path / ".outer.partial-0"
    other.mkdir()
    with bundle.writing(tmp_path / "out") as alive:  # another export, in the middle of its work
        assert not left.exists()
        export(tmp_path / "in", tmp_path / "out")
        assert alive.exists()
        shutil.rmtree(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "in", "out"]


def test_no_torch_and_no_transformers_at_run_time(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "in")
    script = (
        "import pathlib, sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from edgevlm_export import export\n"
        "export(pathlib.Path('in'), pathlib.Path('out'))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, check=True)
    open_bundle(tmp_path / "out")
