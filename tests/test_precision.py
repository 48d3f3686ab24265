"""fp16 and int8 vision graphs, held against transformers, numpy and an older CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
from edgevlm_export import export, gate, photos, precision
from edgevlm_export.graph import Graph, Model
from safetensors.torch import load_file, save_file
from test_export_llava import vision_pair

from edgevlm import families, preprocess, vision
from edgevlm.bundle import open_bundle
from edgevlm.cancel import Cancel
from edgevlm.errors import BundleError, ImageError
from edgevlm.sessions import Session

TOWER = {"hidden_size": 96, "intermediate_size": 384}


def run(model: Model, path: Path, values: np.ndarray) -> np.ndarray:
    model.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"patches": values})[0]


def one_layer(weight: np.ndarray) -> Model:
    """pixels - 128 @ identity → rows; rows @ weight: the second is the linear layer under test."""
    n_in, n_out = weight.shape
    graph = Graph(n_patches=3, patch_values=n_in)
    pixels = graph.op("Cast", "patches", to=1)
    centred = graph.op("Sub", pixels, graph.constant(128, np.float32))
    scales = graph.constant([[[1.0], [1000.0], [0.001]]], np.float32)  # an outlier token
    rows = graph.op("Mul", centred, scales)
    graph.output(graph.linear(rows, "layer", weight.shape, lambda: weight, None), 3, n_out)
    return graph.model()


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_an_outlier_token_coarsens_no_other_token(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(255, 64)).astype(np.float32)  # odd: the last row has no neighbour
    patches = rng.integers(0, 256, (2, 3, 255), np.uint8)
    found = run(precision.int8(one_layer(weight)), tmp_path / "a.onnx", patches)
    rows = (patches.astype(np.float64) - 128) * np.array([[[1], [1000], [0.001]]])
    expected = rows @ weight
    assert cosines(found, expected).min() > 0.9998
    size = np.linalg.norm(expected, axis=-1)
    assert (np.linalg.norm(found - expected, axis=-1) / size).max() < 0.02


def test_empty_rows_and_columns_stay_empty(tmp_path: Path) -> None:
    weight = np.zeros((8, 4), np.float32)
    weight[0, 0] = 1
    patches = np.full((1, 3, 8), 128, np.uint8)
    patches[0, 0, 0] = 129
    found = run(precision.int8(one_layer(weight)), tmp_path / "a.onnx", patches)
    # 1 · 1, rounded to 127 steps of 1/127 each
    np.testing.assert_allclose(found, [[[1, 0, 0, 0], [0] * 4, [0] * 4]], atol=1e-6)


def test_a_cpu_without_vnni_gets_the_same_numbers(tmp_path: Path) -> None:
    """Haswell adds pairs of products in 16 bits; rows and columns at their limits show it."""
    rng = np.random.default_rng(1)
    weight = np.abs(rng.normal(size=(256, 32))).astype(np.float32)
    patches = np.full((1, 3, 256), 255, np.uint8)
    model = precision.int8(one_layer(weight))
    here = run(model, tmp_path / "a.onnx", patches)
    script = (
        "import sys; sys.path[:0] = sys.argv[1].split(':')\n"
        "import numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[2], providers=['CPUExecutionProvider'])\n"
        "out = session.run(None, {'patches': numpy.full((1, 3, 256), 255, numpy.uint8)})[0]\n"
        "numpy.save(sys.argv[3], out)\n"
    )
    site = ":".join(path for path in sys.path if path.endswith("-packages"))
    python = str(Path(sys.executable).resolve())
    subprocess.run(
        ["qemu-x86_64", "-cpu", "Haswell", python, "-c", script, site,
         str(tmp_path / "a.onnx"), str(tmp_path / "there.npy")],
        check=True, capture_output=True,
    )  # fmt: skip
    # Sums of integers are exact on both; the last multiplications may be fused on one.
    np.testing.assert_allclose(np.load(tmp_path / "there.npy"), here, rtol=1e-6)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize(
    ("kind", "least", "size"), [("fp16", 0.99999, 0.55), ("int8", 0.999, 0.45)]
)
def test_embeddings_follow_transformers(
    kind: str, least: float, size: float, tower: str, tmp_path: Path
) -> None:
    model = tiny.llava(tmp_path / "in", tower, vision=TOWER)
    whole = export(tmp_path / "in", tmp_path / "whole") / "vision.onnx"
    bundle = export(tmp_path / "in", tmp_path / "out", vision=kind)
    ours, expected = vision_pair(tmp_path / "in", bundle, model, tower)
    assert cosines(ours, expected).min() > least
    assert (bundle / "vision.onnx").stat().st_size < size * whole.stat().st_size


def embed(bundle: Path, pictures: list[np.ndarray]) -> list[np.ndarray]:
    opened = open_bundle(bundle)
    family, session = families.find(opened), Session(opened.file("vision.onnx"), 1)
    found = []
    for pixels in pictures:
        layout = family.layout(*pixels.shape[:2])
        patches = preprocess.patches(pixels, layout, 1)
        found.append(vision.encode(session, patches, layout, family, Cancel()))
    return found


def card(bundle: Path) -> dict[str, object]:
    manifest = json.loads((bundle / "bundle.json").read_text())
    return manifest["card"]["parity"]["vision_int8"]


def test_the_card_says_what_the_two_graphs_give(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "in", vision=TOWER)
    whole = export(tmp_path / "in", tmp_path / "a")
    bundle = export(tmp_path / "in", tmp_path / "b", vision="int8")
    pictures = list(photos.drawn())
    pairs = zip(embed(whole, pictures), embed(bundle, pictures), strict=True)
    found = np.concatenate([cosines(*pair) for pair in pairs])
    said = card(bundle)
    assert said["cosine_mean"] == pytest.approx(found.mean(), abs=2e-6)
    assert said["cosine_worst_token"] == pytest.approx(found.min(), abs=2e-6)
    assert said["photos"] == 4
    assert said["layers"] == 3 * 6 + 2  # three layers of six, and the projector
    assert said["float_layers"] == []


def spoil(checkpoint: Path, layer: int) -> None:
    """One unit of an MLP becomes 3000 and its outgoing weights a 3000th: the same function, but
    the other units vanish in the rounding of a row."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    stem = f"vision_tower.encoder.layers.{layer}.mlp."
    tensors[f"{stem}fc1.weight"][5] = 0
    tensors[f"{stem}fc1.bias"][5] = 3000
    tensors[f"{stem}fc2.weight"][:, 5] /= 3000
    save_file(tensors, file)


def test_a_layer_that_int8_would_ruin_stays_in_float(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "in", vision=TOWER)
    spoil(tmp_path / "in", 1)
    bundle = export(tmp_path / "in", tmp_path / "out", vision="int8")
    said = card(bundle)
    assert said["float_layers"] == ["vision_tower.encoder.layers.1.mlp.fc2.weight"]
    assert said["cosine_mean"] >= gate.Bar().mean
    assert said["cosine_worst_token"] >= gate.Bar().worst
    names = {tensor.name for tensor in onnx.load(bundle / "vision.onnx").graph.initializer}
    assert "vision_tower.encoder.layers.1.mlp.fc2.weight" in names
    assert "vision_tower.encoder.layers.0.mlp.fc2.weight.int8" in names
    assert "vision_tower.embeddings.patch_embedding.weight" in names  # pixels are never rounded


def block(width: int = 32) -> Model:
    """pixels → x; x + (norm(x) @ A + norm(x) @ B) @ C, and a residual between two layers."""
    rng = np.random.default_rng(0)
    graph = Graph(n_patches=3, patch_values=width)
    x = graph.op("Mul", graph.op("Cast", "patches", to=1), graph.constant(0.01, np.float32))
    norm = {name: rng.normal(1, 0.1, width).astype(np.float32) for name in ("scale", "bias")}
    names = [graph.weight(name, (width,), partial(norm.get, name)) for name in norm]
    normed = graph.op("LayerNormalization", x, *names, axis=-1, epsilon=1e-6)

    def linear(value: str, name: str) -> str:
        weight, bias = (rng.normal(size=s).astype(np.float32) for s in ((width, width), width))
        return graph.linear(value, name, weight.shape, lambda: weight, lambda: bias)

    both = graph.residual(linear(normed, "a"), linear(normed, "b"))
    graph.output(graph.residual(x, linear(both, "c")), 3, width)
    return graph.model()


@pytest.mark.parametrize("keep_float", [(), ("a.weight",), ("c.weight",)])
def test_norms_and_residuals_join_their_layers(tmp_path: Path, keep_float: tuple[str, ...]) -> None:
    """A norm that a float layer reads, too, stays; a residual joins one of two layers."""
    model = precision.int8(block(), keep_float)
    kinds = sorted(node.op_type for node in model.nodes if node.domain == "edgevlm")
    assert (
        kinds
        == {
            (): ["LinearBiasResidual", "NormLinearBias", "NormLinearBiasResidual"],
            ("a.weight",): ["LinearBiasResidual", "LinearBiasResidual"],
            ("c.weight",): ["NormLinearBias", "NormLinearBiasResidual"],
        }[keep_float]
    )
    norms = [node for node in model.nodes if node.op_type == "LayerNormalization"]
    assert len(norms) == ("a.weight" in keep_float)
    patches = np.random.default_rng(0).integers(0, 256, (2, 3, 32), np.uint8)
    found = run(model, tmp_path / "a.onnx", patches)
    expected = run(block(), tmp_path / "b.onnx", patches)
    assert cosines(found, expected).min() > 0.9995


def test_layers_of_one_norm_share_it_without_our_operators(tmp_path: Path) -> None:
    """ONNX Runtime inlines the functions, and finds what they have in common."""
    precision.int8(block()).save(tmp_path / "a.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "b.onnx")
    onnxruntime.InferenceSession(tmp_path / "a.onnx", options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "b.onnx").graph.node]
    assert kinds.count("LayerNormalization") == 1
    assert kinds.count("QuantizeLinear") == kinds.count("ReduceMax") == 2
    assert kinds.count("MatMulIntegerToFloat") == 3


def test_weights_beyond_fp16_are_refused(tmp_path: Path) -> None:
    weight = np.full((8, 4), 1e5, np.float32)
    with pytest.raises(BundleError, match=r"layer\.weight does not fit fp16"):
        precision.fp16(one_layer(weight)).save(tmp_path / "a.onnx")


def test_photos_come_from_files_and_directories(tmp_path: Path, picture: object) -> None:
    picture.save(tmp_path / "a.png")  # type: ignore[attr-defined]
    (tmp_path / "notes.txt").write_text("no photo")
    (found,) = photos.read([tmp_path])
    assert found.shape == (90, 130, 3)
    tiny.llava(tmp_path / "in", vision=TOWER)
    assert card(export(tmp_path / "in", tmp_path / "out", vision="int8",
                       photos=[tmp_path / "a.png"]))["photos"] == 1  # fmt: skip
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="holds no photo"):
        list(photos.read([tmp_path / "empty"]))


def test_drawn_pictures_have_a_photographs_spectrum() -> None:
    for pixels in photos.drawn():
        grey = pixels.mean(axis=-1)
        power = np.abs(np.fft.rfft2(grey - grey.mean())) ** 2
        y, x = np.fft.fftfreq(grey.shape[0])[:, np.newaxis], np.fft.rfftfreq(grey.shape[1])
        frequency = np.hypot(y, x)
        band = (frequency > 0.02) & (frequency < 0.3)
        slope = np.polyfit(np.log(frequency[band]), np.log(power[band] + 1e-9), 1)[0]
        assert -3.2 < slope < -1.5  # photographs: about -2 (Field 1987)
        assert pixels.std() > 40
