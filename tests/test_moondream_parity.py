"""Tiny Moondreams of every release, exported and run, against the reference's arithmetic."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from edgevlm_export import export
from edgevlm_export.oracles.moondream import Reference
from PIL import Image
from test_gaze import without_outliers
from tiny_moondream import IDS, RELEASES, moondream, token_config, tokenizer

import edgevlm
from edgevlm import preprocess, vision
from edgevlm.options import Options
from edgevlm.prompt import Message

POINTING = [release for release in RELEASES if release >= "2025"]
QUESTION = "What is in the picture?"
STEPS = 64
# Two float32 programs add up in their own order.
EMBEDDING_ATOL = 1e-4
# llama.cpp's GELU reads a float16 table.
LOGIT_ATOL = 4e-3


@pytest.fixture(autouse=True, scope="module")
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def sized(picture: Image.Image, width: int, height: int) -> Image.Image:
    return picture.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("size", [(60, 50), (300, 110), (200, 600), (520, 500), (900, 300)])
def test_embeddings_equal_the_reference(
    tmp_path: Path, picture: Image.Image, release: str, size: tuple[int, int]
) -> None:
    reference = moondream(tmp_path / "checkpoint", release, seed=1)
    photo = sized(picture, *size)
    expected = reference.encode(photo)
    if reference.prefix:
        expected = torch.cat([reference.embed([_bos(release)]), expected])
    with opened(tmp_path) as vlm:
        embeddings = vlm.encode(photo).embeddings
    np.testing.assert_allclose(embeddings, expected.numpy(), atol=EMBEDDING_ATOL, rtol=0)


@pytest.mark.parametrize("release", ["2024-05-20", "2025-06-21"])
def test_a_picture_in_one_view_takes_half_of_the_projector(
    tmp_path: Path, picture: Image.Image, release: str
) -> None:
    moondream(tmp_path / "checkpoint", release, seed=1)
    with opened(tmp_path) as vlm:
        family = vlm._family
    model = onnx.load(tmp_path / "bundle" / "vision.onnx")
    (of_map,) = (n for n in model.graph.node if "vision.proj_mlp.fc1.map.weight" in n.input)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(of_map.input[0]))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for size, n_rows in (((60, 50), 1), ((900, 600), 25)):
        photo = sized(picture, *size)
        layout = family.layout(photo.height, photo.width)
        patches = preprocess.patches(np.asarray(photo), layout, 1)
        (inputs,) = vision.runs(patches, layout, family)
        (apart,) = session.run(of_map.input[:1], inputs)
        assert len(apart) == n_rows
        assert apart.any() == (n_rows > 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("release", RELEASES)
def test_logits_and_greedy_tokens_equal_the_reference(
    tmp_path: Path, picture: Image.Image, release: str, dtype: torch.dtype
) -> None:
    names = "2024" if dtype == torch.float16 else None
    reference = moondream(tmp_path / "checkpoint", release, dtype, seed=2, names=names)
    prompt = _query(release, reference, reference.encode(picture))
    banned = (IDS["answer_id"],) if release == "2025-06-21" else ()
    end = _bos(release)
    expected, expected_logits = reference.greedy(prompt, reference.prefix, STEPS, end, banned)
    with opened(tmp_path) as vlm:
        ids, logits = _ours(vlm, Message("user", QUESTION, (0,)), picture)
    np.testing.assert_allclose(logits, expected_logits.numpy(), atol=LOGIT_ATOL, rtol=0)
    assert ids == expected


@pytest.mark.parametrize("release", POINTING)
@pytest.mark.parametrize("length", ["short", "normal", "long"])
def test_captions_equal_the_reference(
    tmp_path: Path, picture: Image.Image, release: str, length: str
) -> None:
    if (release, length) == ("2025-01-09", "long"):
        return  # came with the next release
    reference = moondream(tmp_path / "checkpoint", release, seed=3)
    template = token_config(release, tokenizer(release))["templates"]["caption"][length]
    begin = reference.begin(reference.encode(picture), _bos(release))
    prompt = torch.cat([begin, reference.embed(template)])
    banned = (IDS["answer_id"],) if release == "2025-06-21" else ()
    expected, _ = reference.greedy(prompt, reference.prefix, 12, _bos(release), banned)
    with opened(tmp_path) as vlm:
        text = tokenizer(release).decode(expected)
        answer = vlm.describe(picture, length, max_tokens=12, repetition_stop=False)
    assert answer.text == text.strip()


@pytest.mark.parametrize("release", POINTING)
@pytest.mark.parametrize("sized_", [True, False])
def test_places_equal_the_reference(
    tmp_path: Path, picture: Image.Image, release: str, sized_: bool
) -> None:
    end = _bos(release)
    reference = moondream(tmp_path / "checkpoint", release, seed=4, bias={end: 4.0})
    templates = token_config(release, tokenizer(release))["templates"]
    template = templates["detect" if sized_ else "point"]
    thing = ("" if release == "2025-01-09" else " ") + "red sofa"
    ids = tokenizer(release).encode(thing).ids
    begin = reference.begin(reference.encode(picture), end)
    prompt = torch.cat([begin, reference.embed([*template["prefix"], *ids, *template["suffix"]])])
    expected = reference.find(prompt, end, sized_, 6)
    with opened(tmp_path) as vlm:
        if sized_:
            boxes = vlm.detect(picture, "red sofa", max_objects=6)
            found = [(b.x_min, b.y_min, b.x_max, b.y_max) for b in boxes]
            expected = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in expected]
        else:
            found = [(p.x, p.y) for p in vlm.point(picture, "red sofa", max_objects=6)]
    assert len(found) == len(expected)
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


def test_a_text_only_question_is_causal(tmp_path: Path) -> None:
    reference = moondream(tmp_path / "checkpoint", seed=5)
    prompt = _query("2025-06-21", reference, None)
    banned = (IDS["answer_id"],)
    expected, _ = reference.greedy(prompt, 0, 12, IDS["eos_id"], banned)
    with opened(tmp_path) as vlm:
        answer = vlm.ask([], QUESTION, max_tokens=12, repetition_stop=False)
    assert answer.text == tokenizer("2025-06-21").decode(expected).strip()


@pytest.mark.parametrize("seed", [7, 9])  # thoughts that max_tokens ends, and that end themselves
def test_reasoning_equals_the_reference(tmp_path: Path, picture: Image.Image, seed: int) -> None:
    release = "2025-06-21"
    bias = {IDS["coord_id"]: 9.0, IDS["answer_id"]: 7.0, IDS["start_ground_points_id"]: 8.0}
    reference = moondream(tmp_path / "checkpoint", release, seed=seed, bias=bias)
    made = tokenizer(release)
    template = token_config(release, made)["templates"]["query"]
    begin = reference.begin(reference.encode(picture), IDS["bos_id"])
    asked = [*template["prefix"], *made.encode(QUESTION).ids, *template["suffix"]]
    prompt = torch.cat([begin, reference.embed([*asked, IDS["thinking_id"]])])
    chunks, rows = _think(reference, prompt, 40)
    rows = torch.cat([rows, reference.embed(template["suffix"])])
    expected, _ = reference.greedy(rows, reference.prefix, 40, IDS["eos_id"], (IDS["answer_id"],))
    with opened(tmp_path) as vlm:
        answer = vlm.ask(picture, QUESTION, reasoning=True, max_tokens=40, repetition_stop=False)
    assert answer.text == made.decode(expected).strip()
    assert answer.reasoning is not None
    texts = [made.decode(tokens) for tokens, _ in chunks]
    assert answer.reasoning.text == "".join(texts)
    pairs = [[*zip(values[::2], values[1::2], strict=False)] for _, values in chunks]
    found = [(g.start, g.end, [*g.points]) for g in answer.reasoning.grounding]
    ends = np.cumsum([len(text) for text in texts]).tolist()
    starts = [0, *ends[:-1]]
    assert found == [told for told in zip(starts, ends, pairs, strict=True) if told[2]]
    assert found


def test_places_in_a_question_equal_the_reference(tmp_path: Path, picture: Image.Image) -> None:
    release = "2025-06-21"
    reference = moondream(tmp_path / "checkpoint", release, seed=7)
    template = token_config(release, tokenizer(release))["templates"]["query"]
    ids = tokenizer(release).encode(QUESTION).ids
    prompt = torch.cat(
        [
            reference.begin(reference.encode(picture), IDS["bos_id"]),
            reference.embed(template["prefix"]),
            reference.encoded("coord", 0.25),
            reference.encoded("coord", 0.5),
            reference.encoded("coord", 0.5),
            reference.encoded("coord", 0.4),
            reference.encoded("size", 0.2, 0.6),
            reference.embed([*ids, *template["suffix"], *template["suffix"]]),
        ]
    )
    banned = (IDS["answer_id"],)
    expected, _ = reference.greedy(prompt, reference.prefix, 12, IDS["eos_id"], banned)
    with opened(tmp_path) as vlm:
        answer = vlm.ask(
            picture,
            QUESTION,
            places=[(0.25, 0.5), (0.4, 0.1, 0.6, 0.7)],
            max_tokens=12,
            repetition_stop=False,
        )
    assert answer.text == tokenizer(release).decode(expected).strip()


@pytest.mark.parametrize("release", POINTING)
def test_a_gaze_equals_the_reference(tmp_path: Path, picture: Image.Image, release: str) -> None:
    reference = moondream(tmp_path / "checkpoint", release, seed=8)
    rows = _gaze_rows(reference, reference.encode(picture), 0.3, 0.7)
    ((x, y),) = reference.find(rows, _bos(release), False, 1)
    with opened(tmp_path) as vlm:
        gaze = vlm.gaze(picture, (0.3, 0.7))
    assert gaze is not None
    assert (gaze.x, gaze.y) == (x, y)


def test_an_accurate_gaze_equals_the_reference(tmp_path: Path, picture: Image.Image) -> None:
    """detect_gaze with prioritize_accuracy (vikhyat/moondream, moondream/torch/moondream.py)."""
    end = IDS["eos_id"]
    reference = moondream(tmp_path / "checkpoint", seed=8)
    drawn = random.Random(11)
    eyes = [(drawn.uniform(0.1, 0.5), drawn.uniform(0.2, 0.9)) for _ in range(20)]
    mirror = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pictures = [reference.encode(picture)] * 10 + [reference.encode(mirror)] * 10
    rows = [
        _gaze_rows(reference, seen, x if n < 10 else 1 - x, y)
        for n, (seen, (x, y)) in enumerate(zip(pictures, eyes, strict=True))
    ]
    # The end is made likely enough that some looks find nothing.
    logits = [reference.run(each, reference.prefix)[1] for each in rows]
    leads = sorted(float(each.max() - each[end]) for each in logits)
    gaps = [after - before for before, after in pairwise(leads)]
    widest = max(range(1, 9), key=gaps.__getitem__)
    bias = leads[widest] + gaps[widest] / 2
    assert gaps[widest] > 4 * LOGIT_ATOL
    reference = moondream(tmp_path / "checkpoint", seed=8, bias={end: bias})
    found = []
    for n, each in enumerate(rows):
        for x, y in reference.find(each, end, False, 1):
            found.append((x, y) if n < 10 else (1 - x, y))
    assert 10 <= len(found) < 20
    kept = without_outliers(found)
    with opened(tmp_path) as vlm:
        gaze = vlm.gaze(picture, (0.1, 0.2, 0.5, 0.9), accurate=True, seed=11)
    assert gaze is not None
    expected = tuple(sum(values) / len(kept) for values in zip(*kept, strict=True))
    assert (gaze.x, gaze.y) == pytest.approx(expected, abs=1e-9)


def _gaze_rows(reference: Reference, picture: torch.Tensor, x: float, y: float) -> torch.Tensor:
    words = [tokenizer(reference.release).encode(s).ids for s in ("\n\nPoint:", " gaze\n\n")]
    return torch.cat(
        [
            reference.begin(picture, _bos(reference.release)),
            reference.embed(words[0]),
            reference.encoded("coord", x),
            reference.encoded("coord", y),
            reference.embed(words[1]),
        ]
    )


@pytest.mark.parametrize("release", RELEASES[1:])
@pytest.mark.parametrize("detail", ["low", "high"])
def test_less_and_more_detail_is_the_same_arithmetic(
    tmp_path: Path, picture: Image.Image, release: str, detail: str
) -> None:
    reference = moondream(tmp_path / "checkpoint", release, seed=1)
    photo = sized(picture, 640, 330)
    grid = {"low": (1, 1), "high": (2, 2) if release == "2024-05-20" else (2, 5)}[detail]
    reference.tiling = lambda height, width: grid  # type: ignore[method-assign]
    expected = reference.encode(photo)
    if reference.prefix:
        expected = torch.cat([reference.embed([_bos(release)]), expected])
    with opened(tmp_path, detail=detail) as vlm:
        encoded = vlm.encode(photo)
    assert (
        encoded.layout.views[-1].tiles[-1]
        == {
            (1, 1): (0, 0),
            (2, 2): (70, 70),
            (2, 5): (42, 168),
        }[grid]
    )
    np.testing.assert_allclose(encoded.embeddings, expected.numpy(), atol=EMBEDDING_ATOL, rtol=0)


def _think(
    reference: Reference, rows: torch.Tensor, steps: int
) -> tuple[list[tuple[list[int], list[float]]], torch.Tensor]:
    """Chunks of thoughts (token ids, coordinates), and the rows up to their end."""
    chunks: list[tuple[list[int], list[float]]] = [([], [])]
    n_tokens = 0
    hidden, logits = reference.run(rows, reference.prefix)
    while (token := int(logits.argmax())) != IDS["answer_id"] and n_tokens < steps:
        if token in (IDS["start_ground_points_id"], IDS["end_ground_id"]):
            chunks.append(([], []))
        chunks[-1][0].append(token)
        n_tokens += 1
        row = reference.embed([token])
        if token == IDS["coord_id"]:
            chunks[-1][1].append(reference.coordinate(hidden))
            row = reference.encoded("coord", chunks[-1][1][-1])
        rows = torch.cat([rows, row])
        hidden, logits = reference.run(rows, reference.prefix)
        logits[[IDS["eos_id"], IDS["size_id"]]] = -torch.inf
    return chunks, rows


def opened(tmp_path: Path, **settings: Any) -> edgevlm.VLM:
    bundle = tmp_path / "bundle"
    if not bundle.exists():
        export(tmp_path / "checkpoint", bundle, language="f32")
    return edgevlm.load(bundle, precise=True, threads=1, **settings)


def _bos(release: str) -> int:
    return 0 if release == "2025-06-21" else int(tokenizer(release).token_to_id("<|endoftext|>"))


def _query(release: str, reference: Reference, picture: torch.Tensor | None) -> torch.Tensor:
    made = tokenizer(release)
    begin = reference.begin(picture, _bos(release))
    if release < "2025":
        ids = made.encode(f"\n\nQuestion: {QUESTION}\n\nAnswer:").ids
        return torch.cat([begin, reference.embed(ids)])
    template = token_config(release, made)["templates"]["query"]
    asked = made.encode((" " if release == "2025-03-27" else "") + QUESTION).ids
    suffix = template["suffix"] * (2 if release == "2025-06-21" else 1)
    return torch.cat([begin, reference.embed([*template["prefix"], *asked, *suffix])])


def _ours(
    vlm: edgevlm.VLM, message: Message, picture: Image.Image
) -> tuple[list[int], np.ndarray[Any, Any]]:
    language, image = vlm._language, vlm.encode(picture)
    prompt = language.tokenize(vlm._family.prompt([message], [image.layout]))
    language.feed(prompt, [image])
    logits = language.logits()
    with language.sampler(Options()) as sampler:
        return [token for token, _ in language.tokens(sampler, STEPS)], logits
