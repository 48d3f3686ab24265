"""Many photos at a time give what one after the other gives, and one bad photo is one error."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from edgevlm_export import export
from numpy.typing import NDArray

import edgevlm
from edgevlm import VLM, device

QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("many")
    tiny.llava(directory / "checkpoint", seed=1)
    return export(directory / "checkpoint", directory / "bundle", language="f32")


@pytest.fixture
def vlm(bundle: Path) -> Iterator[VLM]:
    with edgevlm.load(bundle, cache=False) as opened:
        yield opened


def photos(n: int) -> list[NDArray[np.uint8]]:
    """Small ones of different sizes."""
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (40 + n, 60, 3), np.uint8) for n in range(n)]


def same(many: edgevlm.Answer, one: edgevlm.Answer) -> None:
    for field in ("text", "finish_reason", "prompt_tokens", "generated_tokens", "input_px"):
        assert getattr(many, field) == getattr(one, field), field


@pytest.mark.parametrize("parallel", [1, 2, 3, 8])
def test_answers_equal_those_one_by_one(vlm: VLM, parallel: int) -> None:
    """Greedy text of a float32 model; answers of different lengths leave at different times."""
    pictures = photos(7)
    options: dict[str, Any] = {"max_tokens": 40, "stop": ("a",)}
    expected = [vlm.ask(picture, QUESTION, **options) for picture in pictures]
    assert len({answer.generated_tokens for answer in expected}) > 2
    found = list(vlm.ask_many(pictures, QUESTION, parallel=parallel, **options))
    assert [outcome.index for outcome in found] == list(range(7))
    for outcome, picture, one in zip(found, pictures, expected, strict=True):
        assert outcome.picture is picture and outcome.error is None
        assert outcome.answer is not None
        same(outcome.answer, one)


@pytest.mark.parametrize("text", ["phi3", "qwen2"])
def test_answers_equal_those_one_by_one_on_other_architectures(tmp_path: Path, text: str) -> None:
    tiny.llava(tmp_path / "checkpoint", text=text, tower="siglip", seed=3)
    other = export(tmp_path / "checkpoint", tmp_path / "bundle", language="f32")
    with edgevlm.load(other, cache=False) as vlm:
        expected = [vlm.describe(picture, max_tokens=24) for picture in photos(5)]
        for outcome in vlm.describe_many(photos(5), max_tokens=24):
            assert outcome.answer is not None
            same(outcome.answer, expected[outcome.index])


def test_each_length_and_sampling_equal_those_one_by_one(vlm: VLM) -> None:
    pictures = photos(5)
    for length in ("short", "long"):
        options: dict[str, Any] = {"max_tokens": 12, "temperature": 0.7, "seed": 3}
        expected = [vlm.describe(picture, length, **options) for picture in pictures]
        for outcome in vlm.describe_many(pictures, length, **options):
            assert outcome.answer is not None
            same(outcome.answer, expected[outcome.index])


def test_a_grammar_holds_in_every_answer(vlm: VLM) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    expected = [vlm.ask(picture, QUESTION, schema=schema) for picture in photos(3)]
    for outcome in vlm.ask_many(photos(3), QUESTION, schema=schema):
        assert outcome.answer is not None
        same(outcome.answer, expected[outcome.index])


def test_as_they_come_none_is_missing(vlm: VLM) -> None:
    found = list(vlm.describe_many(photos(9), ordered=False, max_tokens=30, stop=("a",)))
    assert sorted(outcome.index for outcome in found) == list(range(9))


def test_an_unreadable_photo_is_an_error_in_its_place(vlm: VLM, tmp_path: Path) -> None:
    pictures: list[Any] = [*photos(6)]
    pictures[0], pictures[3], pictures[5] = b"no photo", tmp_path / "none.jpg", b""
    found = list(vlm.describe_many(pictures, max_tokens=8))
    assert [outcome.index for outcome in found] == list(range(6))
    failed = [outcome.index for outcome in found if isinstance(outcome.error, edgevlm.ImageError)]
    assert failed == [0, 3, 5]
    assert all((outcome.answer is None) == (outcome.error is not None) for outcome in found)


def test_an_answer_that_breaks_its_schema_is_an_error_in_its_place(vlm: VLM) -> None:
    dead_end = 'root ::= "a" [\\U00D80000]'
    found = list(vlm.describe_many(photos(3), grammar=dead_end))
    assert [type(outcome.error) for outcome in found] == [edgevlm.OutputError] * 3
    assert vlm.ask(photos(1)[0], QUESTION, max_tokens=2).generated_tokens == 2


def test_no_photos_give_no_outcomes(vlm: VLM) -> None:
    assert list(vlm.describe_many([])) == []
    (outcome,) = vlm.describe_many([b"no photo"])
    assert outcome.answer is None


def test_pictures_are_taken_as_they_are_needed(vlm: VLM) -> None:
    taken: list[int] = []

    def endless() -> Iterator[NDArray[np.uint8]]:
        while True:
            taken.append(len(taken))
            yield photos(1)[0]

    outcomes = vlm.describe_many(endless(), max_tokens=4, parallel=2)
    for n in range(1, 8):
        next(outcomes)
        assert len(taken) <= n + 2 + 2 + 1  # under way and prepared
    outcomes.close()  # type: ignore[attr-defined]
    assert vlm.ask(photos(1)[0], QUESTION, max_tokens=2).generated_tokens == 2


def test_encoded_pictures_are_taken_too(vlm: VLM) -> None:
    encoded = [vlm.encode(picture) for picture in photos(3)]
    for outcome in vlm.describe_many(encoded, max_tokens=4):
        assert outcome.answer is not None and outcome.answer.cache == "hit"


@pytest.mark.parametrize(
    "wrong",
    [
        {"reasoning": True},
        {"temperature": -1},
        {"grammar": "root ::= ("},
        {"length": "endless"},
    ],
)
def test_what_cannot_be_asked_is_refused_before_any_work(vlm: VLM, wrong: dict[str, Any]) -> None:
    def untouched() -> Iterator[bytes]:
        pytest.fail("a picture was taken")
        yield b""

    with pytest.raises(edgevlm.PromptError):
        list(vlm.describe_many(untouched(), **wrong))


def test_an_empty_question_and_no_parallel_answers_are_refused(vlm: VLM) -> None:
    with pytest.raises(edgevlm.PromptError, match="empty"):
        list(vlm.ask_many(photos(1), " "))
    with pytest.raises(ValueError, match="parallel"):
        list(vlm.describe_many(photos(1), parallel=0))


def test_a_longer_prompt_gets_a_larger_cache(vlm: VLM) -> None:
    """Tokens are counted for each picture; here its size stands for more of them."""
    needed = vlm._language.needed
    asked: list[int] = []

    def growing(*arguments: Any) -> int:
        asked.append(needed(*arguments))
        return min(512, asked[-1] + 100 * (len(asked) // 4))

    expected = [vlm.describe(picture, max_tokens=20) for picture in photos(6)]
    vlm._language.needed = growing  # type: ignore[method-assign]
    for outcome in vlm.describe_many(photos(6), max_tokens=20, parallel=2):
        assert outcome.answer is not None
        same(outcome.answer, expected[outcome.index])


def test_cancel_ends_it_and_leaves_the_engine_usable(vlm: VLM) -> None:
    outcomes = vlm.describe_many(photos(50), max_tokens=100, repetition_stop=False)
    next(outcomes)
    threading.Thread(target=vlm.cancel).start()
    with pytest.raises(edgevlm.Cancelled):
        for _ in outcomes:
            pass
    assert vlm.ask(photos(1)[0], QUESTION, max_tokens=2).generated_tokens == 2


def test_the_conversation_before_is_still_in_the_cache_after(vlm: VLM) -> None:
    picture = photos(1)[0]
    chat = vlm.chat(picture)
    chat.ask("One?", max_tokens=4)
    before = list(vlm._language._cached)
    list(vlm.describe_many(photos(3), max_tokens=4))
    assert vlm._language._cached == before


def test_memory_does_not_grow_with_the_number_of_photos(vlm: VLM) -> None:
    def stream(n: int) -> Iterator[NDArray[np.uint8]]:
        random = np.random.default_rng(0)
        for _ in range(n):
            yield random.integers(0, 256, (400, 600, 3), np.uint8)

    def work(n: int) -> None:
        for outcome in vlm.describe_many(stream(n), max_tokens=2):
            assert outcome.answer is not None

    work(20)
    gc.collect()
    before = device.peak_rss_bytes()
    work(150)  # 108 MB of pixels, if they were kept
    assert device.peak_rss_bytes() - before < 30_000_000
