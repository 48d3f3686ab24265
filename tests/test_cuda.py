"""The real thing, where there is a GPU and both libraries compute on it; else skipped.

The CPU's numbers are the reference. Both sides compute in float32 (TF32 is off) except llama.cpp's
CUDA kernels, which round activations to 8 or 16 bits before they multiply: hence two tolerances.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from edgevlm_export import export
from PIL import Image

import edgevlm
from edgevlm import VLM, device, placement
from edgevlm.answer import Devices
from edgevlm.prompt import Message

EMBEDDINGS_ATOL = 1e-3
LOGITS_RTOL = 0.02  # of the largest logit
QUESTION = "What is in the picture?"


def lacks() -> str:
    if not device.has_nvidia_gpu():
        return "this machine shows no NVIDIA GPU"
    found = placement.find()
    return "; ".join(half.problem for half in (found.onnxruntime, found.llama) if half.problem)


pytestmark = pytest.mark.skipif(bool(reason := lacks()), reason=reason or "all is there")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cuda") / "checkpoint"
    tiny.llava(directory, seed=1)
    return directory


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def bundle(request: pytest.FixtureRequest, checkpoint: Path) -> Path:
    out = checkpoint.parent / request.param
    return export(checkpoint, out, language="f16", vision=request.param)


@pytest.fixture
def on_gpu(bundle: Path) -> Iterator[VLM]:
    with edgevlm.load(bundle, device="cuda") as vlm:
        yield vlm


@pytest.fixture
def on_cpu(bundle: Path) -> Iterator[VLM]:
    with edgevlm.load(bundle, device="cpu") as vlm:
        yield vlm


def test_embeddings_are_those_of_the_cpu(on_gpu: VLM, on_cpu: VLM, picture: Image.Image) -> None:
    there, here = on_gpu.encode(picture), on_cpu.encode(picture)
    np.testing.assert_allclose(there.embeddings, here.embeddings, rtol=0, atol=EMBEDDINGS_ATOL)


def test_logits_are_those_of_the_cpu(on_gpu: VLM, on_cpu: VLM, picture: Image.Image) -> None:
    image = on_cpu.encode(picture)  # the same embeddings for both: the language model alone
    there, here = logits(on_gpu, image), logits(on_cpu, image)
    np.testing.assert_allclose(there, here, rtol=0, atol=LOGITS_RTOL * float(np.abs(here).max()))


def test_the_answer_says_where_it_was_computed(on_gpu: VLM, picture: Image.Image) -> None:
    answer = on_gpu.ask(picture, QUESTION, max_tokens=3)
    assert answer.devices == Devices("cuda", "cuda")
    assert answer.generated_tokens >= 1


def test_auto_takes_the_gpu(bundle: Path) -> None:
    with edgevlm.load(bundle) as vlm:
        assert vlm.placement == placement.Placement(Devices("cuda", "cuda"))


def test_the_second_question_reuses_the_cache(on_gpu: VLM, picture: Image.Image) -> None:
    chat = on_gpu.chat(picture)
    chat.ask(QUESTION, max_tokens=4)
    assert chat.ask("And behind it?", max_tokens=4).timings.encode_ms == 0


def logits(vlm: VLM, image: edgevlm.EncodedImage) -> np.ndarray:
    segments = vlm._family.prompt([Message("user", QUESTION, (0,))], [image.layout])
    vlm._language.feed(vlm._language.tokenize(segments), [image])
    return vlm._language.logits()
