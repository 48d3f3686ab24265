"""Optimum's exporter beside ours, with the transformers that it asks for, in one child process.

The checkpoints and the reference are transformers 5's. test.sh installs what tests/optimum.txt
names, where these tests look for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import parity
import pytest
import tiny
import tiny_llava_next
import torch
from edgevlm_export import export
from PIL import Image
from transformers import AutoImageProcessor, LlavaForConditionalGeneration

from edgevlm.bundle import open_bundle
from edgevlm.errors import BundleError
from edgevlm.prompt import Message

INSTALLED = Path(__file__).parents[1] / ".venv/optimum"
VERBS = """
import json, sys
from pathlib import Path
from edgevlm.cli import run
Path("codes.json").write_text(json.dumps([run(verb) for verb in json.load(sys.stdin)]))
"""
FULL = {"vision_feature_select_strategy": "full"}
VERIFIED = ("clip", "siglip", "tiles")
TRACED = ("dinov2", "vit")

if not INSTALLED.is_dir():
    pytest.skip("tests/optimum.txt is not installed, see test.sh", allow_module_level=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """Checkpoints `NAME`, their bundles `NAME-out`, made and verified beside Optimum."""
    path = tmp_path_factory.mktemp("optimum")
    models = {
        "clip": tiny.llava(path / "clip", seed=3),
        "siglip": tiny.llava(path / "siglip", "siglip", seed=3, config=FULL),
        "tiles": tiny_llava_next.checkpoint(path / "tiles"),
        "dinov2": tiny.llava(path / "dinov2", "dinov2", "phi3", seed=3),
        "vit": tiny.llava(path / "vit", "vit", seed=3, config=FULL),
    }
    for name in models:  # as transformers 4 calls them
        file = path / name / "preprocessor_config.json"
        file.write_text(file.read_text().replace("ProcessorPil", "Processor"))
    exact = ["--llm", "f32", "--vision", "fp32", "--prefill", "none", "-q"]
    verbs: list[list[str]] = []
    for name in models:
        source, out = str(path / name), str(path / f"{name}-out")
        more = ["--exporter", "optimum"] if name in TRACED else []
        verbs += [["export", source, "-o", out, *exact, *more]]
        verbs += [["verify", out, "--reference", source]]
    out = str(path / "int8-out")
    verbs += [["export", str(path / "dinov2"), "-o", out, "--exporter", "optimum", "-q"]]
    tiny.llava(path / "last", "vit", config=FULL | {"vision_feature_layer": -1})
    out = str(path / "last-out")
    verbs += [["export", str(path / "last"), "-o", out, "--exporter", "optimum", "-q"]]
    paths = [str(INSTALLED), *sys.path]
    subprocess.run(
        [sys.executable, "-c", VERBS], input=json.dumps(verbs), text=True, check=True, cwd=path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    codes = json.loads((path / "codes.json").read_text())
    assert codes == [0] * (len(verbs) - 1) + [5]
    return path, models


def card(bundle: Path) -> dict[str, float]:
    return dict(open_bundle(bundle).manifest["card"]["parity"]["reference"])


@pytest.mark.parametrize("name", VERIFIED)
def test_our_graph_equals_optimums(name: str, made: tuple[Path, dict[str, object]]) -> None:
    found = card(made[0] / f"{name}-out")
    assert found["reference"] == "transformers 4.57.6, float32"
    assert found["optimum_max_error"] < 1e-4  # float32, added up in another order
    assert found["vision_fp32_max_error"] < 1e-4
    assert found["pixels_max_difference"] == 0
    assert found["greedy_tokens_equal"] == found["greedy_tokens"]


@pytest.mark.parametrize("name", TRACED)
@torch.no_grad()
def test_a_tower_that_is_not_ours_answers_as_transformers_does(
    name: str, made: tuple[Path, dict[str, object]], picture: Image.Image
) -> None:
    path, models = made
    model = models[name]
    assert isinstance(model, LlavaForConditionalGeneration)
    question = "What is in the picture?"
    found = parity.ours(path / f"{name}-out", [Message("user", question, (0,))], [picture])
    pixels = AutoImageProcessor.from_pretrained(path / name, backend="pil")(
        picture, return_tensors="pt"
    )["pixel_values"]
    embeddings = torch.cat([*model.get_image_features(pixel_values=pixels).pooler_output])
    ids = torch.tensor([found.prompt])
    inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    ends = open_bundle(path / f"{name}-out").manifest["generation"]["stop_token_ids"]
    parity.assert_equal(found, parity.reference(model, inputs, embeddings, ends))
    assert len(embeddings) == {"dinov2": 16, "vit": 17}[name]
    verified = card(path / f"{name}-out")
    assert verified["optimum_max_error"] is None  # it made the graph, so it is no second opinion
    assert verified["vision_fp32_max_error"] < 1e-4


def test_a_traced_tower_can_be_int8(made: tuple[Path, dict[str, object]]) -> None:
    manifest = open_bundle(made[0] / "int8-out").manifest
    assert manifest["options"] == {"exporter": "optimum"}
    verdict = manifest["card"]["parity"]["vision_int8"]
    assert verdict["cosine_worst_token"] >= 0.99
    assert verdict["layers"] > len(verdict["float_layers"])


def test_what_optimum_traces_wrongly_is_refused(made: tuple[Path, dict[str, object]]) -> None:
    """optimum-onnx 0.1.0 puts the state after ViT's final norm in the place of the one before."""
    assert not (made[0] / "last-out").exists()


def test_without_it_such_a_tower_is_refused_with_the_way_out(
    made: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=r"'dinov2'; known: .*: --exporter optimum"):
        export(made[0] / "dinov2", tmp_path / "out")
