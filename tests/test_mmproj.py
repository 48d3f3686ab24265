"""The peer's vision file: read back by our own importer, and by libmtmd where that is installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from edgevlm_export import export, export_pair, mmproj
from edgevlm_export.checkpoint import Checkpoint
from edgevlm_export.families import llava
from edgevlm_export.random_models import RandomCheckpoint
from edgevlm_export.random_shapes import SHAPES
from gguf import GGUFReader
from PIL import Image
from test_random_models import small

import edgevlm
from edgevlm.bench import mtmd
from edgevlm.cli import run
from edgevlm.errors import BackendError


@pytest.fixture(scope="module", params=["clip", "siglip"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a bundle and the mmproj file of the same checkpoint."""
    directory = tmp_path_factory.mktemp("mmproj")
    strategy = {"clip": "default", "siglip": "full"}[request.param]
    tiny.llava(
        directory / "in", request.param, "phi3",
        config={"vision_feature_select_strategy": strategy},
        vision={"layer_norm_eps": 1e-5 if request.param == "clip" else 1e-6},
    )  # fmt: skip
    export(directory / "in", directory / "own", language="f32", fit="pad")
    checkpoint = Checkpoint(directory / "in")
    checkpoint.rename(llava.canonical)
    mmproj.write(checkpoint, directory / "mmproj.gguf")
    return directory


def test_our_importer_gets_the_same_tower_back(made: Path, picture: Image.Image) -> None:
    pair = export_pair(made / "own" / "language.gguf", made / "mmproj.gguf", made / "pair")
    with edgevlm.load(made / "own") as own, edgevlm.load(pair) as other:
        expected, found = own.encode(picture).embeddings, other.encode(picture).embeddings
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * scale)  # f16 matrices


def test_libmtmd_says_the_same(made: Path, tmp_path: Path) -> None:
    try:
        mtmd.check_installed()
    except BackendError:
        pytest.skip("no libmtmd: ./install.sh bench")
    side = 56  # no resize, no padding: what differs is the arithmetic
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    arguments = ["bench", str(made / "own"), "--vs", "mtmd", "--rounds", "1", "-n", "8", "-q"]
    arguments += ["--mmproj", str(made / "mmproj.gguf"), "--photo", str(tmp_path / "photo.png")]
    assert run([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert {"encode", "prefill", "first_token", "total"} <= set(result["ratios"])
    assert result["settings"]["peer"]["image_tokens"] == 16
    prompt = result["settings"]["photo"]["prompt_tokens"]
    assert result["settings"]["peer"]["prompt_tokens"] == prompt
    ours, theirs = result["answers"]["edgevlm"], result["answers"]["libmtmd"]
    assert theirs.strip().startswith(ours[:4])  # f16 and JPEG decoders move later words


def test_a_cut_tower_over_one_crop_stands_in_for_moondream(tmp_path: Path) -> None:
    shape = SHAPES["moondream2-0.5b"]
    few = {k: v for k, v in shape.tensors.items() if not any(f".{n}." in k for n in range(1, 40))}
    checkpoint = RandomCheckpoint(type(shape)(shape.config, few, shape.n_vocab, shape.special),
                                  tmp_path, 0)  # fmt: skip
    reader = GGUFReader(mmproj.write(checkpoint, tmp_path / "m.gguf"))
    found = {tensor.name: tuple(tensor.shape[::-1]) for tensor in reader.tensors}
    assert found["mm.0.weight"] == (8192, 720)  # half of the model's own 1440
    assert found["v.blk.0.attn_k.weight"] == (720, 720)
    assert found["v.patch_embd.weight"] == (720, 3, 14, 14)
    assert reader.fields["clip.vision.block_count"].contents() == 1
    query = reader.tensors[[t.name for t in reader.tensors].index("v.blk.0.attn_q.weight")]
    whole = checkpoint.get("vision.blocks.0.attn.qkv.weight")
    np.testing.assert_array_equal(query.data, whole[:720].astype(np.float16))


def test_pixel_shuffle_is_written_for_idefics3(tmp_path: Path) -> None:
    checkpoint = RandomCheckpoint(small(SHAPES["smolvlm-256m"]), tmp_path, 0)
    reader = GGUFReader(mmproj.write(checkpoint, tmp_path / "m.gguf"))
    assert reader.fields["clip.projector_type"].contents() == "idefics3"
    assert reader.fields["clip.vision.projector.scale_factor"].contents() == 4
    assert reader.fields["clip.vision.preproc_image_size"].contents() == 2048
    assert {"mm.model.fc.weight", "v.post_ln.bias"} <= {tensor.name for tensor in reader.tensors}
