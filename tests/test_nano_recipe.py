"""The rules that nano was trained by, and the files that came of them. Nothing is trained here."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from edgevlm_export.nano import observe, questions, sentences
from edgevlm_export.nano.evaluate import NO, YES, is_sure, read_key
from edgevlm_export.nano.facts import COLORS, NO_COLOR, Facts, Tone, Verdict
from edgevlm_export.nano.names import NO_KIND, vocabulary, with_article
from edgevlm_export.nano.projector import N_TOKENS
from edgevlm_export.nano.sampler import conversation, draw
from edgevlm_export.nano.tower import INPUT_PX, EfficientNetLite2
from PIL import Image

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "edgevlm" / "data" / "nano"


def concept(name: str) -> int:
    return [c.name for c in vocabulary().concepts].index(name)


def facts(**changes: int) -> Facts:
    beagle = Facts(
        verdict=Verdict.SURE,
        first=concept("beagle"),
        second=concept("basset hound"),
        faces=0,
        color=COLORS.index("brown"),
        other_color=NO_COLOR,
        background=NO_COLOR,
        tone=Tone.NORMAL,
    )
    return replace(beagle, **changes)


def many_facts(n: int = 400) -> list[Facts]:
    rng = random.Random(7)
    return [draw(rng) for _ in range(n)]


# Sentences


def test_a_sure_description_names_the_subject_its_kind_and_its_color() -> None:
    assert sentences.normal(facts()) == (
        "The photo shows a beagle, a kind of dog. The main color is brown."
    )


def test_words_of_doubt_appear_exactly_when_the_verdict_is_not_sure() -> None:
    for f in many_facts():
        if not f.faces and vocabulary().concepts[f.first].role != "worn":
            assert is_sure(sentences.subject(f)) == (f.verdict == Verdict.SURE)


@pytest.mark.parametrize("verdict", list(Verdict))
def test_what_may_be_there_is_never_denied_for_sure(verdict: Verdict) -> None:
    answer = sentences.present(facts(verdict=verdict), "beagle")
    if verdict >= Verdict.PROBABLY:
        assert YES.match(answer)
    elif verdict > Verdict.PLAIN:
        assert answer.startswith("Perhaps.")


@pytest.mark.parametrize("verdict", [Verdict.KIND, Verdict.PROBABLY, Verdict.SURE])
def test_what_is_something_else_is_denied(verdict: Verdict) -> None:
    assert NO.match(sentences.present(facts(verdict=verdict), "car"))


def test_every_answer_is_whole_sentences() -> None:
    rng = random.Random(3)
    for _ in range(2000):
        for question, answer in conversation(draw(rng), rng):
            assert question[0].isupper() and question[-1] in "?."
            assert answer[0].isupper() and answer[-1] == "." and "  " not in answer


def test_articles_follow_the_sound() -> None:
    said = [with_article(noun) for noun in ("umbrella", "unicycle", "hourglass", "corn cob")]
    assert said == ["an umbrella", "a unicycle", "an hourglass", "a corn cob"]


# Sampling


def test_one_seed_gives_one_conversation() -> None:
    first, again = random.Random(5), random.Random(5)
    assert draw(first) == draw(again)
    assert conversation(facts(), first) == conversation(facts(), again)


def test_guesses_of_one_kind_or_group_belong_to_it() -> None:
    concepts = vocabulary().concepts
    for f in many_facts():
        one, other = concepts[f.first], concepts[f.second]
        assert f.first != f.second
        if f.verdict == Verdict.KIND:
            assert one.kind == other.kind != NO_KIND
        if f.verdict == Verdict.GROUP:
            assert one.group == other.group != "object"


def test_something_else_to_ask_for_is_found_for_every_concept() -> None:
    rng = random.Random(1)
    for i, c in enumerate(vocabulary().concepts):
        noun = questions._something_else(facts(first=i, second=(i + 1) % 2), rng)
        assert noun not in (c.name, c.kind, c.group)


# Observing


@pytest.fixture(scope="module")
def observer() -> observe.Observer:
    torch.manual_seed(0)
    return observe.Observer(EfficientNetLite2().eval()).requires_grad_(False)


def test_lab_agrees_with_published_values() -> None:
    # Lindbloom's CIE colour calculator, sRGB, D65; rounded there to 0.01.
    rgb = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0, 1.0, 1.0]])
    expected = [[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86], [100, 0, 0]]
    assert observe.lab(rgb).numpy() == pytest.approx(np.array(expected), abs=0.05)


def test_every_class_counts_for_one_concept(observer: observe.Observer) -> None:
    classes = observer.classes_of.flatten().tolist()
    assert sorted(c for c in classes if c < 1000) == list(range(1000))


@pytest.mark.parametrize(
    ("mass", "verdict"),
    [
        ({"beagle": 0.97}, Verdict.SURE),
        ({"beagle": 0.7, "pizza": 0.3}, Verdict.PROBABLY),
        ({"beagle": 0.4, "basset hound": 0.4}, Verdict.KIND),
        ({"beagle": 0.4, "tench": 0.35}, Verdict.GROUP),
        ({"beagle": 0.4, "pizza": 0.35}, Verdict.UNSURE),
        ({"doormat": 0.97}, Verdict.PROBABLY),  # textures look like this class
        ({"doormat": 0.7}, Verdict.UNSURE),
    ],
)
def test_verdict_follows_the_probabilities(
    observer: observe.Observer, mass: dict[str, float], verdict: Verdict
) -> None:
    p = torch.zeros(1, len(vocabulary().concepts))
    for name, value in mass.items():
        p[0, concept(name)] = value
    found, first, _ = observer.subject(p)
    assert Verdict(int(found)) == verdict
    assert int(first) == concept(next(iter(mass)))


def test_a_red_disc_on_white_is_red_on_white(observer: observe.Observer) -> None:
    cells = torch.full((1, 13, 13, 3), 250.0)
    cells[:, 3:10, 3:10] = torch.tensor([200.0, 30.0, 35.0])
    color, other, background, _ = observer.colors(cells.reshape(1, 169, 3))
    assert [COLORS[int(color)], int(other), COLORS[int(background)]] == ["red", NO_COLOR, "white"]


def test_each_peak_of_the_heat_map_is_a_face_up_to_many() -> None:
    heat = torch.zeros(1, 1, 64, 64)
    for i, expected in enumerate((1, 2, 3, 3)):
        heat[0, 0, 10, 10 + 12 * i] = 0.9
        assert int(observe.faces(heat)) == expected


def test_the_tower_has_the_published_size() -> None:
    # 6.1 M parameters: tensorflow/tpu, models/official/efficientnet/lite/README.md
    assert round(sum(p.numel() for p in EfficientNetLite2().parameters()) / 1e6, 1) == 6.1


# Evaluation keys


@pytest.mark.parametrize("name", ["stamps", "scenes", "unclear", "colors"])
def test_answer_keys_list_each_photo_once(name: str) -> None:
    photos = [key.photo for key in read_key(name, Path())]
    assert photos and len(set(photos)) == len(photos)


# What is shipped


@pytest.fixture(scope="module")
def manifest() -> dict[str, dict[str, object]]:
    loaded: dict[str, dict[str, object]] = json.loads((SHIPPED / "bundle.json").read_text("utf-8"))
    return loaded


def test_the_manifest_describes_the_shipped_graph(manifest: dict[str, dict[str, object]]) -> None:
    data = (SHIPPED / "vision.onnx").read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["files"]["vision.onnx"] == entry
    assert len(data) < 20e6
    assert manifest["image"]["n_tokens"] == N_TOKENS
    assert manifest["prompt"]["describe"] == questions.DESCRIBE


def test_the_shipped_graph_runs_from_opset_17_on() -> None:
    model = onnx.load(SHIPPED / "vision.onnx")
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 17}
    assert model.ir_version == 8


def test_the_shipped_graph_tells_photos_apart() -> None:
    session = onnxruntime.InferenceSession(SHIPPED / "vision.onnx")
    blank = np.full((INPUT_PX, INPUT_PX, 3), 255, np.uint8)
    size = (INPUT_PX, INPUT_PX)
    cat = Image.open(ROOT / "examples" / "cat.jpg").resize(size, Image.Resampling.BICUBIC)
    pictures = [np.asarray(picture).reshape(1, 1, -1) for picture in (blank, cat)]
    soft = [session.run(["embeddings"], {"patches": picture})[0] for picture in pictures]
    assert all(e.shape == (1, N_TOKENS, 576) and e.dtype == np.float32 for e in soft)
    assert np.isfinite(soft).all() and not np.array_equal(*soft)
