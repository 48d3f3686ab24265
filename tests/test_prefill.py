"""Prompts read through the prefill graph, against llama.cpp reading them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from edgevlm_export import export
from edgevlm_export.bundle import seal
from gguf import GGUFReader, dequantize
from PIL import Image
from tiny_moondream import moondream

import edgevlm
from edgevlm import prefill, sessions
from edgevlm.errors import BackendError, BundleError, Cancelled
from edgevlm.llama import Model, sequence_state
from edgevlm.options import Options
from edgevlm.prompt import Message
from edgevlm.sessions import Session

STEPS = 64
# Two float32 programs add up in their own order; llama.cpp's GELU reads a float16 table.
LOGITS_ATOL = 2e-3
GELU_ATOL = 4e-3
DECODERS = {
    "llama": {},
    "llama, biases and scaled angles": {
        "attention_bias": True,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    },
    "llama 3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": {"head_dim": 32},
    "phi3": {"partial_rotary_factor": 0.5},
    "qwen2": {"num_key_value_heads": 1},
}


@pytest.fixture(autouse=True)
def _short_prompts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "FEWEST_ROWS", 2)
    monkeypatch.setattr(prefill, "fewest_rows_to_open", lambda: 2)


def answer(
    bundle: Path, picture: Image.Image, route: str, *, precise: bool = True
) -> tuple[list[int], np.ndarray]:
    """64 greedy ids and the logits after the prompt; `route` as in Settings.prefill."""
    with edgevlm.load(bundle, precise=precise, prefill=route, threads=1) as vlm:
        language = vlm._language
        assert (language._prefill is None) is (route == "gguf")
        encoded = vlm.encode(picture)
        message = Message("user", "What is in the picture?", (0,))
        prompt = language.tokenize(vlm._family.prompt([message], [encoded.layout]))
        language.feed(prompt, [encoded])
        logits = language.logits()
        with language.sampler(Options()) as sampler:
            return [token for token, _ in language.tokens(sampler, STEPS)], logits


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_float_graph_gives_llama_cpps_tokens(
    tmp_path: Path, picture: Image.Image, decoder: str
) -> None:
    text = decoder.split(",")[0].split()[0]
    tiny.llava(tmp_path / "checkpoint", text=text, seed=5, language=DECODERS[decoder])
    export(tmp_path / "checkpoint", tmp_path / "bundle", language="f32", prefill="fp32")
    expected, expected_logits = answer(tmp_path / "bundle", picture, "gguf")
    found, logits = answer(tmp_path / "bundle", picture, "auto")
    np.testing.assert_allclose(logits, expected_logits, atol=LOGITS_ATOL, rtol=0)
    assert found == expected


@pytest.mark.parametrize("release", ["2024-05-20", "2025-06-21"])
@pytest.mark.parametrize("n_kv_heads", [1, 2])
def test_moondreams_parallel_blocks_and_its_prefix(
    tmp_path: Path, picture: Image.Image, release: str, n_kv_heads: int
) -> None:
    moondream(tmp_path / "checkpoint", release, seed=6, text_kv_heads=n_kv_heads)
    export(tmp_path / "checkpoint", tmp_path / "bundle", language="f32", prefill="fp32")
    expected, expected_logits = answer(tmp_path / "bundle", picture, "gguf")
    found, logits = answer(tmp_path / "bundle", picture, "auto")
    np.testing.assert_allclose(logits, expected_logits, atol=GELU_ATOL, rtol=0)
    assert found == expected


def test_the_question_after_a_prefix_goes_through_the_graph_too(
    tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    moondream(tmp_path / "checkpoint", "2025-06-21", seed=6)
    export(tmp_path / "checkpoint", tmp_path / "bundle", language="f32", prefill="fp32")
    runs = counted(monkeypatch)
    with edgevlm.load(tmp_path / "bundle", threads=1) as vlm:
        found = vlm.ask(picture, "What is in the picture?", max_tokens=8)
    assert runs == [found.prompt_tokens - 1] and runs[0] > found.image_tokens + 5


def test_both_pictures_and_the_words_between_are_read(tmp_path: Path, picture: Image.Image) -> None:
    tiny.llava(tmp_path / "checkpoint", seed=7)
    export(tmp_path / "checkpoint", tmp_path / "bundle", language="f32", prefill="fp32")
    pictures = [picture, picture.transpose(Image.Transpose.ROTATE_180)]
    texts = []
    for route in ("gguf", "auto"):
        with edgevlm.load(tmp_path / "bundle", prefill=route, threads=1) as vlm:
            texts.append(vlm.ask(pictures, "What changed?", max_tokens=STEPS).text)
    assert texts[0] == texts[1]


def test_the_next_question_reuses_what_the_graph_read(
    tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = small(tmp_path)
    runs = counted(monkeypatch)
    with edgevlm.load(bundle, threads=1) as vlm:
        encoded = vlm.encode(picture)
        first = vlm.ask(encoded, "Two cats?", max_tokens=8).text
        second = vlm.ask(encoded, "A red sofa?", max_tokens=8).text
        assert len(runs) == 2 and runs[1] < encoded.layout.n_tokens < runs[0]
    with edgevlm.load(bundle, threads=1, prefill="gguf") as vlm:
        assert [vlm.ask(picture, q, max_tokens=8).text for q in ("Two cats?", "A red sofa?")] == [
            first,
            second,
        ]


@pytest.mark.parametrize("family", ["llava", "moondream"])
def test_a_chat_goes_through_the_graph_turn_by_turn(
    tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    make = tiny.llava if family == "llava" else moondream
    make(tmp_path / "checkpoint", seed=12)
    bundle = tmp_path / "bundle"
    export(tmp_path / "checkpoint", bundle, language="f32", prefill="fp32")

    def chat(route: str) -> tuple[list[str], list[int]]:
        with edgevlm.load(bundle, threads=1, precise=True, prefill=route) as vlm:
            chat = vlm.chat(picture)
            answers = [chat.ask(q, max_tokens=12) for q in ("Two cats?", "A red sofa?", "Why?")]
        return [a.text for a in answers], [a.prompt_tokens - a.image_tokens for a in answers]

    expected = chat("gguf")
    runs = counted(monkeypatch)
    assert chat("auto") == expected
    assert len(runs) == 3  # after the first no picture, but more than the last token
    assert all(1 < rows < words for rows, words in zip(runs[1:], expected[1][1:], strict=True))


def test_the_next_picture_goes_through_the_graph_though_prompts_begin_alike(
    tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = small(tmp_path)
    runs = counted(monkeypatch)
    pictures = [picture, picture.transpose(Image.Transpose.ROTATE_180)]
    with edgevlm.load(bundle, threads=1) as vlm:
        found = [vlm.ask(each, "Two cats?", max_tokens=8).text for each in pictures]
    # the words before the picture are not read again
    assert len(runs) == 2 and runs[0] // 2 < runs[1] < runs[0]
    with edgevlm.load(bundle, threads=1, prefill="gguf") as vlm:
        assert [vlm.ask(each, "Two cats?", max_tokens=8).text for each in pictures] == found


def test_answers_at_the_same_time_read_through_the_graph_too(
    tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = small(tmp_path)
    runs = counted(monkeypatch)
    pictures = [picture.rotate(90 * n, expand=True) for n in range(4)]
    with edgevlm.load(bundle, threads=1, precise=True) as vlm:
        expected = [vlm.describe(each, max_tokens=8).text for each in pictures]
        assert len(runs) == 4
        outcomes = vlm.describe_many(pictures, parallel=3, max_tokens=8)
        assert [o.answer.text for o in outcomes if o.answer is not None] == expected
    assert len(runs) == 8


def test_a_prompt_of_few_rows_is_left_to_llama_cpp(
    tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = small(tmp_path)
    runs = counted(monkeypatch)
    monkeypatch.setattr(prefill, "fewest_rows_to_open", lambda: 1000)
    with edgevlm.load(bundle, threads=1) as vlm:
        vlm.ask(picture, "Two cats?", max_tokens=2)
    assert not runs


def test_int8_stays_near_the_float_graph(tmp_path: Path, picture: Image.Image) -> None:
    tiny.llava(tmp_path / "checkpoint", seed=8)
    for kind in ("int8", "fp32"):
        export(tmp_path / "checkpoint", tmp_path / kind, language="f16", prefill=kind)
    _, expected = answer(tmp_path / "fp32", picture, "auto", precise=False)
    _, found = answer(tmp_path / "int8", picture, "int8", precise=False)
    assert (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected) > 0.999


@pytest.mark.parametrize("language", ["f32", "f16", "q8_0", "q4_k_m", "q4_0"])
def test_rows_of_the_embedding_table_equal_ggufs(tmp_path: Path, language: str) -> None:
    size = {"hidden_size": 256, "intermediate_size": 256}  # llama.cpp's blocks are 256 wide
    tiny.llava(tmp_path / "checkpoint", seed=9, language=size)
    export(tmp_path / "checkpoint", tmp_path / "bundle", language=language)
    file = tmp_path / "bundle" / "language.gguf"
    (table,) = (t for t in GGUFReader(file).tensors if t.name == "token_embd.weight")
    model = Model(file, extra_buffers=False)
    np.testing.assert_allclose(
        model.embed([3, 0, 7]),
        dequantize(table.data, table.tensor_type)[[3, 0, 7]].astype(np.float32),
        atol=1e-6,
        rtol=0,
    )
    model.close()


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_cancel_stops_the_graph_and_leaves_nothing_half_read(
    tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    with edgevlm.load(small(tmp_path, kind), threads=1) as vlm:
        encoded = vlm.encode(picture)
        expected = vlm.ask(encoded, "Two cats?", max_tokens=8).text
        vlm._language._forget_from(0)
        whole = Session._call

        def cancelled(self: Session, *given: Any, **more: Any) -> None:
            vlm.cancel()
            whole(self, *given, **more)

        with monkeypatch.context() as patch:
            patch.setattr(Session, "_call", cancelled)
            with pytest.raises(Cancelled):
                vlm.ask(encoded, "Two cats?")
        assert vlm._language._cached == []
        assert vlm.ask(encoded, "Two cats?", max_tokens=8).text == expected


def test_another_layout_of_the_cache_falls_back_with_one_line(
    tmp_path: Path,
    picture: Image.Image,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle = small(tmp_path, "int8")
    monkeypatch.setattr(sequence_state, "HEAD_BYTES", sequence_state.HEAD_BYTES + 4)
    with edgevlm.load(bundle, threads=1) as vlm:
        found = vlm.ask(picture, "Two cats?", max_tokens=8).text
    assert len(caplog.records) == 1 and "keeps its cache in a way" in caplog.text
    with pytest.raises(BackendError, match="keeps its cache in a way"):
        edgevlm.load(bundle, threads=1, prefill="int8")
    with edgevlm.load(bundle, threads=1, prefill="gguf") as vlm:
        assert vlm.ask(picture, "Two cats?", max_tokens=8).text == found


def test_a_graph_of_another_version_is_refused(tmp_path: Path, picture: Image.Image) -> None:
    bundle = small(tmp_path)
    manifest = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").unlink()
    (bundle / "prefill.onnx").write_bytes(sessions._NEGATE)
    seal(bundle, {key: value for key, value in manifest.items() if key != "files"})
    with (
        edgevlm.load(bundle, threads=1) as vlm,
        pytest.raises(BundleError, match="of another version: export the model again"),
    ):
        vlm.ask(picture, "Two cats?")


def test_int8_asked_for_and_absent_is_an_error(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "bundle")
    with pytest.raises(BundleError, match=r"has no int8 prefill graph.*--prefill int8"):
        edgevlm.load(tmp_path / "bundle", prefill="int8")


def test_the_graph_of_another_model_is_refused(tmp_path: Path, picture: Image.Image) -> None:
    bundle = small(tmp_path)
    tiny.llava(tmp_path / "other", language={"num_hidden_layers": 2})
    export(tmp_path / "other", tmp_path / "second", prefill="fp32")
    for name in ("prefill.onnx", "prefill.data"):
        (bundle / name).write_bytes((tmp_path / "second" / name).read_bytes())
    (bundle / "bundle.json").unlink()
    manifest = json.loads((tmp_path / "second" / "bundle.json").read_text())
    seal(bundle, {key: value for key, value in manifest.items() if key != "files"})
    with (
        edgevlm.load(bundle, threads=1) as vlm,
        pytest.raises(BundleError, match=r"of 2 layers, 32 wide.*3 layers.*export"),
    ):
        vlm.ask(picture, "Two cats?")


def small(directory: Path, kind: str = "fp32") -> Path:
    """A bundle; where its prefill graph is float, both routes give one text."""
    tiny.llava(directory / "checkpoint", seed=11)
    export(directory / "checkpoint", directory / "bundle", language="f32", prefill=kind)
    return directory / "bundle"


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each run of the graph reads."""
    runs: list[int] = []
    whole = prefill.Prefill.run

    def run(self: prefill.Prefill, rows: np.ndarray, *more: Any) -> None:
        runs.append(len(rows))
        whole(self, rows, *more)

    monkeypatch.setattr(prefill.Prefill, "run", run)
    return runs
