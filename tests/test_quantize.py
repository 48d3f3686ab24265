"""Quantized language files: llama.cpp writes them, PyPI's gguf says whether they are right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from edgevlm_export import export, quantize
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, dequantize, quants
from PIL import Image

import edgevlm
from edgevlm.errors import BackendError, BundleError

WIDE = {"hidden_size": 256, "intermediate_size": 512}  # rows of K-quants come in 256s


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantize") / "checkpoint"
    tiny.llava(path, language=WIDE)
    return path


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> dict[str, np.ndarray]:
    """The float weights by llama.cpp's names."""
    return weights(export(checkpoint, checkpoint.parent / "f32", language="f32"))


def weights(bundle: Path) -> dict[str, np.ndarray]:
    tensors = GGUFReader(bundle / "language.gguf").tensors
    return {t.name: dequantize(t.data, t.tensor_type) for t in tensors}


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("kind", "file_type", "most"),
    [  # Gaussian weights lose about 2^-bits of their size; seen: two thirds of these
        ("q8_0", LlamaFileType.MOSTLY_Q8_0, 0.008),
        ("q6_k", LlamaFileType.MOSTLY_Q6_K, 0.03),
        ("q5_k_m", LlamaFileType.MOSTLY_Q5_K_M, 0.06),
        ("q4_k_m", LlamaFileType.MOSTLY_Q4_K_M, 0.11),
        ("q4_0", LlamaFileType.MOSTLY_Q4_0, 0.13),
    ],
)
def test_every_format_keeps_the_weights(
    kind: str,
    file_type: LlamaFileType,
    most: float,
    checkpoint: Path,
    whole: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    bundle = export(checkpoint, tmp_path / "out", language=kind)
    found = weights(bundle)
    assert found.keys() == whole.keys()
    for name, expected in whole.items():
        assert relative_error(found[name], expected) < (most if expected.ndim > 1 else 1e-7), name
    fields = GGUFReader(bundle / "language.gguf").fields
    assert fields["general.file_type"].contents() == file_type
    assert json.loads((bundle / "bundle.json").read_text())["quantization"]["language"] == kind
    assert sorted(path.name for path in bundle.iterdir()) == [
        "bundle.json", "language.gguf", "tokenizer.json", "vision.onnx",
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [("q8_0", "Q8_0"), ("q4_0", "Q4_0")])
def test_simple_formats_equal_the_reference_quantizer_bit_for_bit(
    kind: str, name: str, checkpoint: Path, whole: dict[str, np.ndarray], tmp_path: Path
) -> None:
    bundle = export(checkpoint, tmp_path / "out", language=kind)
    tensors = {t.name: t for t in GGUFReader(bundle / "language.gguf").tensors}
    found = tensors["blk.1.ffn_up.weight"]
    through_f16 = whole["blk.1.ffn_up.weight"].astype(np.float16).astype(np.float32)
    assert found.tensor_type == GGMLQuantizationType[name]
    np.testing.assert_array_equal(found.data, quants.quantize(through_f16, found.tensor_type))


def write_imatrix(path: Path, importance: dict[str, np.ndarray], count: int = 4) -> Path:
    """As llama.cpp's tools/imatrix writes it."""
    writer = GGUFWriter(path, arch="")
    writer.add_type("imatrix")
    for name, values in importance.items():
        sums = (values * count).astype(np.float32).reshape(1, -1)
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", np.full((1, 1), count, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_imatrix_makes_important_columns_more_exact(
    checkpoint: Path, whole: dict[str, np.ndarray], tmp_path: Path
) -> None:
    name = "blk.0.ffn_up.weight"
    importance = np.full(256, 1e-3, np.float32)
    importance[::8] = 100
    imatrix = write_imatrix(
        tmp_path / "imatrix.gguf",
        {n: importance for n, w in whole.items() if n.startswith("blk") and w.shape[-1] == 256},
    )
    plain = weights(export(checkpoint, tmp_path / "a", language="q4_k_m"))
    aware = weights(export(checkpoint, tmp_path / "b", language="q4_k_m", imatrix=imatrix))
    before, after = (relative_error(w[name][:, ::8], whole[name][:, ::8]) for w in (plain, aware))
    assert after < 0.8 * before
    rest = np.arange(256) % 8 != 0
    assert relative_error(aware[name][:, rest], whole[name][:, rest]) > before


def test_an_imatrix_is_a_mean_over_its_counts(tmp_path: Path) -> None:
    values = np.array([1.0, 2.0, 3.0], np.float32)
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", {"blk.0.ffn_up.weight": values}, count=7)
    np.testing.assert_allclose(
        quantize.read_imatrix(imatrix)["blk.0.ffn_up.weight"], values, rtol=1e-6
    )


def test_an_imatrix_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    ones = np.ones(128, np.float32)
    narrow = write_imatrix(tmp_path / "a.gguf", {"blk.0.ffn_up.weight": ones})
    with pytest.raises(BundleError, match=r"128 columns for blk.0.ffn_up.* has 256"):
        export(checkpoint, tmp_path / "out", language="q4_0", imatrix=narrow)
    strange = write_imatrix(tmp_path / "b.gguf", {"blk.9.ffn_up.weight": ones})
    with pytest.raises(BundleError, match="names no tensor of the model"):
        export(checkpoint, tmp_path / "out", language="q4_0", imatrix=strange)
    (tmp_path / "c.gguf").write_bytes(b"no gguf")
    with pytest.raises(BundleError, match="not a GGUF file"):
        export(checkpoint, tmp_path / "out", language="q4_0", imatrix=tmp_path / "c.gguf")
    assert [path for path in tmp_path.iterdir() if path.suffix != ".gguf"] == []


def test_what_llama_cpp_refuses_is_one_error_with_its_words(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"no gguf")
    with pytest.raises(BackendError, match=r"cannot quantize .*a\.gguf to q4_0\. It said: .+"):
        quantize.quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_0")


def test_a_quantized_bundle_answers(checkpoint: Path, tmp_path: Path, picture: Image.Image) -> None:
    bundle = export(checkpoint, tmp_path / "out", language="q4_k_m")
    with edgevlm.load(bundle, threads=1) as vlm:
        assert vlm.ask(picture, "What is it?", max_tokens=5).generated_tokens == 5


def test_progress_counts_every_tensor(checkpoint: Path, tmp_path: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    export(
        checkpoint,
        tmp_path / "out",
        language="q8_0",
        vision="int8",
        progress=lambda what, done, total: told.setdefault(what, []).append((done, total)),
    )
    assert list(told) == ["language f16", "language q8_0", "int8", "vision"]
    for what, steps in told.items():
        done = [step for step, _ in steps]
        assert done == sorted(done), what
        assert what == "int8" or done[-1] == steps[-1][1], what
