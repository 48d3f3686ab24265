"""Random models: published shapes, sane values, the same bundle for the same seed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from edgevlm_export import families, random_models
from edgevlm_export.random_models import RandomCheckpoint
from edgevlm_export.random_shapes import SHAPES, Shape
from PIL import Image

import edgevlm
from edgevlm.cli import run

PARAMETERS = {  # model cards and papers, in billions
    "moondream2": 1.93,
    "llava-phi-3-mini": 4.14,  # 3.82 of Phi-3-mini, 0.30 of CLIP-L and the projector
    "llava-1.5-7b": 7.06,
    "smolvlm-256m": 0.256,
    "smolvlm-500m": 0.507,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shape_has_as_many_parameters_as_was_published(name: str) -> None:
    n = sum(int(np.prod(shape)) for shape in SHAPES[name].tensors.values())
    assert n / 1e9 == pytest.approx(PARAMETERS[name], rel=0.06)


@pytest.mark.parametrize("name", SHAPES)
def test_the_exporter_takes_every_shape_for_what_it_is(name: str, tmp_path: Path) -> None:
    checkpoint = RandomCheckpoint(SHAPES[name], tmp_path, seed=0)
    _, family = families.find(checkpoint, None)
    options = families.Options(**SHAPES[name].options)
    parts = family.parts(checkpoint, options)  # plans everything, reads no tensor
    assert len(parts.language.vocabulary.texts) == SHAPES[name].n_vocab


def small(shape: Shape) -> Shape:
    """The same family with one layer of each part and a small vocabulary's worth of rows."""
    keep = {
        tensor: size
        for tensor, size in shape.tensors.items()
        if not any(f".{n}." in tensor for n in range(1, 40))
    }
    config = json.loads(json.dumps(shape.config))
    for part in ("vision_config", "text_config"):
        config[part]["num_hidden_layers"] = 1
    return replace(shape, config=config, tensors=keep)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("random")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "smolvlm-256m", small(SHAPES["smolvlm-256m"]))
        return random_models.write("smolvlm-256m", directory / "one")


def test_a_random_bundle_says_so_and_answers(bundle: Path, picture: Image.Image) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert "random weights" in manifest["source"]["id"]
    assert manifest["licence"] == "random-weights"
    kinds = {"vision": "int8", "language": "q4_k_m", "prefill": "int8"}
    assert manifest["quantization"] == kinds
    with edgevlm.load(bundle) as vlm:
        answer = vlm.describe(picture, max_tokens=4, repetition_stop=False)
        logits = vlm._language.logits()
    assert answer.generated_tokens == 4
    assert answer.text
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 10


def test_a_cached_bundle_of_another_exporter_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(SHAPES, "smolvlm-256m", small(SHAPES["smolvlm-256m"]))
    manifest = random_models.cached("smolvlm-256m") / "bundle.json"
    made = manifest.stat().st_ino
    assert random_models.cached("smolvlm-256m") == manifest.parent
    assert manifest.stat().st_ino == made
    monkeypatch.setattr(random_models, "_revision", lambda seed: f"seed {seed}, another")
    random_models.cached("smolvlm-256m")
    assert json.loads(manifest.read_text())["source"]["revision"] == "seed 0, another"
    manifest.write_text("{")
    elsewhere = manifest.parent.rename(tmp_path / "elsewhere")
    manifest.parent.symlink_to(elsewhere)
    assert random_models.cached("smolvlm-256m") == manifest.parent
    assert not manifest.parent.is_symlink()
    assert (elsewhere / "bundle.json").read_text() == "{"
    edgevlm.load(manifest.parent).close()


def test_values_depend_on_seed_and_name_alone(tmp_path: Path) -> None:
    def made(seed: int) -> RandomCheckpoint:
        directory = tmp_path / str(seed)
        directory.mkdir(exist_ok=True)
        return RandomCheckpoint(SHAPES["moondream2-0.5b"], directory, seed)

    name = "vision.blocks.0.attn.proj.weight"
    first = made(0).get(name)
    np.testing.assert_array_equal(first, made(0).get(name))
    assert not np.array_equal(first, made(1).get(name))
    assert not np.array_equal(first, made(0).get(name.replace("0", "1")))
    assert first.std() == pytest.approx(720**-0.5, rel=0.01)  # 1 / fan-in
    assert (made(0).get("vision.post_ln.weight") == 1).all()


def test_an_unknown_name_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--random", "gpt-9"]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in random_models.NAMES)
