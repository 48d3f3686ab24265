"""Moondream's pair of GGUF files, written as its author's script writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from edgevlm_export import export, export_pair
from edgevlm_export.oracles.moondream import Reference
from gguf import GGUFReader, GGUFWriter, TokenType
from PIL import Image
from test_pair import pair as llava_pair
from tiny_moondream import moondream, tokenizer

import edgevlm
from edgevlm.cli import run
from edgevlm.errors import BundleError

RELEASE = "2024-03-04"
QUESTION = "What's in   the picture, 42?"


def write_mmproj(path: Path, reference: Reference, *, copy: int = 1) -> Path:
    """create_gguf.py (vikhyat/moondream at bdefcdd); the last block is written twice."""
    w = {name: value.numpy() for name, value in reference.w.items()}
    width, n_layers = w["vision.patch_emb.bias"].size, 2
    writer = GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    for key, value in {
        "image_size": reference.side,
        "patch_size": reference.patch,
        "embedding_length": width,
        "feed_forward_length": 70,
        "attention.head_count": reference.shape.vision_heads,
        "block_count": n_layers + 1,
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    writer.add_array("clip.vision.image_mean", [0.5] * 3)
    writer.add_array("clip.vision.image_std", [0.5] * 3)
    writer.add_bool("clip.use_gelu", True)
    writer.add_tensor("v.position_embd.weight", w["vision.pos_emb"])
    kernel = w["vision.patch_emb.weight"].reshape(width, 3, reference.patch, reference.patch)
    writer.add_tensor("v.patch_embd.weight", kernel)
    writer.add_tensor("v.patch_embd.bias", w["vision.patch_emb.bias"])
    for part in ("weight", "bias"):
        writer.add_tensor(f"mm.0.{part}", w[f"vision.proj_mlp.fc1.{part}"])
        writer.add_tensor(f"mm.2.{part}", w[f"vision.proj_mlp.fc2.{part}"])
        writer.add_tensor(f"v.post_ln.{part}", w[f"vision.post_ln.{part}"])
        for block, source in ((0, 0), (1, 1), (2, copy)):
            names = {"attn_out": "attn.proj", "ln1": "ln1", "ln2": "ln2"}
            names |= {"ffn_down": "mlp.fc1", "ffn_up": "mlp.fc2"}
            for name, plain in names.items():
                values = w[f"vision.blocks.{source}.{plain}.{part}"]
                writer.add_tensor(f"v.blk.{block}.{name}.{part}", values)
            fused = np.split(w[f"vision.blocks.{source}.attn.qkv.{part}"], 3)
            for name, values in zip("qkv", fused, strict=True):
                writer.add_tensor(f"v.blk.{block}.attn_{name}.{part}", values)
    return _written(writer, path)


def write_language(path: Path, source: Path) -> Path:
    """The tensors of `source` with the keys of create_gguf.py, which marks unused rows as words of
    their own and does not say how text is split."""
    reader, writer = GGUFReader(source), GGUFWriter(path, "phi2")
    for key in ("context_length", "embedding_length", "feed_forward_length", "block_count"):
        writer.add_uint32(f"phi2.{key}", reader.fields[f"phi2.{key}"].contents())
    for key in ("attention.head_count", "attention.head_count_kv", "rope.dimension_count"):
        writer.add_uint32(f"phi2.{key}", reader.fields[f"phi2.{key}"].contents())
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(0)
    writer.add_add_bos_token(False)
    keys = {
        name: reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges")
    }
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    pads = {TokenType.UNUSED: TokenType.USER_DEFINED}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(keys["tokens"])
    writer.add_token_types([pads.get(kind, kind) for kind in types])
    writer.add_token_merges(keys["merges"])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    return _written(writer, path)


def _written(writer: GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reference, Path, Path, Path]:
    """The reference, its checkpoint's own bundle, and the two files."""
    path = tmp_path_factory.mktemp("pair")
    reference = moondream(path / "in", RELEASE, seed=6)
    own = export(path / "in", path / "own", language="f32")
    language = write_language(path / "text.gguf", own / "language.gguf")
    return reference, own, language, write_mmproj(path / "mmproj.gguf", reference)


def test_the_pair_answers_as_its_checkpoint(
    tmp_path: Path, files: tuple[Reference, Path, Path, Path], picture: Image.Image
) -> None:
    reference, own, language, mmproj = files
    bundle = export_pair(language, mmproj, tmp_path / "out", release=RELEASE)
    assert (bundle / "language.gguf").read_bytes() == language.read_bytes()
    with torch.no_grad():
        expected = reference.encode(picture).numpy()
        ids = tokenizer(RELEASE).encode(f"\n\nQuestion: {QUESTION}\n\nAnswer:").ids
        end = tokenizer(RELEASE).token_to_id("<|endoftext|>")
        rows = torch.cat([reference.begin(torch.tensor(expected), end), reference.embed(ids)])
        said, _ = reference.greedy(rows, 0, 20, end)
    options = {"max_tokens": 20, "repetition_stop": False}
    with edgevlm.load(bundle, precise=True, threads=1) as vlm:
        found = vlm.encode(picture).embeddings
        answer = vlm.ask(picture, QUESTION, **options)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    assert answer.text == tokenizer(RELEASE).decode(said).strip()
    assert answer.prompt_tokens == len(rows)
    with edgevlm.load(own, precise=True, threads=1) as vlm:
        assert vlm.ask(picture, QUESTION, **options).text == answer.text
    sections = [json.loads((b / "bundle.json").read_text()) for b in (bundle, own)]
    for section in ("family", "image", "prompt", "generation", "n_embd", "n_ctx"):
        assert sections[0][section] == sections[1][section], section


def test_the_release_of_a_pair_must_be_said(
    tmp_path: Path, files: tuple[Reference, Path, Path, Path]
) -> None:
    _, _, language, mmproj = files
    for release in (None, "2025-03-27"):
        with pytest.raises(BundleError, match=r"may be of any release.*say release=2024-03-04"):
            export_pair(language, mmproj, tmp_path / "out", release=release)
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_such_pair_are_refused(
    tmp_path: Path, files: tuple[Reference, Path, Path, Path]
) -> None:
    reference, _, language, mmproj = files
    single = write_mmproj(tmp_path / "single.gguf", reference, copy=0)
    with pytest.raises(BundleError, match="is no copy of the block before"):
        export_pair(language, single, tmp_path / "out", release=RELEASE)
    (tmp_path / "llava").mkdir()
    _, _, other, _ = llava_pair(tmp_path / "llava")
    with pytest.raises(BundleError, match="is phi3, not Moondream's phi2"):
        export_pair(other, mmproj, tmp_path / "out", release=RELEASE)
    two_views = write_mmproj(tmp_path / "two.gguf", moondream(tmp_path / "in", "2024-05-20"))
    with pytest.raises(BundleError, match="reads two views of a picture"):
        export_pair(language, two_views, tmp_path / "out", release=RELEASE)


def test_from_the_command_line(
    tmp_path: Path,
    files: tuple[Reference, Path, Path, Path],
    picture: Image.Image,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, _, language, mmproj = files
    picture.save(tmp_path / "photo.png")
    out = str(tmp_path / "out")
    asked = ["export", str(language), "--mmproj", str(mmproj), "-o", out, "--vision", "fp32"]
    assert run(asked) == 5
    assert "may be of any release" in capsys.readouterr().err
    assert run([*asked, "--release", RELEASE]) == 0
    assert run(["describe", str(tmp_path / "photo.png"), "-m", out, "-n", "3"]) == 0
