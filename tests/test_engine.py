"""The engine on a tiny exported LLaVA: one path for every call, and ways to leave it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from edgevlm_export import export
from PIL import Image

import edgevlm
from edgevlm import VLM, plan, preprocess, vision
from edgevlm.bundle import manifest_text, open_bundle
from edgevlm.settings import Settings

QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engine")
    tiny.llava(directory / "checkpoint", seed=1)
    return export(directory / "checkpoint", directory / "bundle", language="f32")


@pytest.fixture
def vlm(bundle: Path) -> Iterator[VLM]:
    with edgevlm.load(bundle) as opened:
        yield opened


def test_the_blocking_call_folds_the_stream(vlm: VLM, picture: Image.Image) -> None:
    pieces = list(vlm.stream(picture, QUESTION, max_tokens=20))
    answer = vlm.ask(picture, QUESTION, max_tokens=20)
    assert "".join(piece.text for piece in pieces).strip() == answer.text
    assert pieces[-1].answer is not None
    assert pieces[-1].answer.text == answer.text


def test_every_kind_of_source_gives_the_same_answer(
    vlm: VLM, picture: Image.Image, tmp_path: Path
) -> None:
    picture.save(tmp_path / "picture.png")
    data = (tmp_path / "picture.png").read_bytes()
    sources = [
        tmp_path / "picture.png",
        str(tmp_path / "picture.png"),
        data,
        picture,
        np.asarray(picture),
        vlm.encode(picture),
    ]
    answers = {vlm.ask(source, QUESTION, max_tokens=12).text for source in sources}
    assert len(answers) == 1


def test_the_answer_says_what_it_took(vlm: VLM, picture: Image.Image) -> None:
    answer = vlm.ask(picture, QUESTION, max_tokens=7, repetition_stop=False)
    assert answer.generated_tokens == 7
    assert answer.finish_reason == "length"
    assert answer.image_tokens == 16
    assert answer.prompt_tokens > 16
    assert answer.input_px == ((90, 130),)
    assert answer.model_px == ((56, 56),)
    assert answer.peak_rss_bytes > 10_000_000
    timings = answer.timings
    stages = (timings.decode_ms, timings.preprocess_ms, timings.encode_ms, timings.prefill_ms)
    assert all(ms > 0 for ms in (*stages, timings.load_ms, timings.generate_ms))
    assert timings.first_token_ms >= sum(stages)


def test_a_context_that_grows_changes_no_token(
    bundle: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan.make(open_bundle(bundle), Settings())
    asked: dict[str, Any] = {"max_tokens": 300, "repetition_stop": False, "repeat_penalty": 1.3}

    def answers(first_n_ctx: int) -> list[str]:
        way = replace(made.way, first_n_ctx=first_n_ctx)
        monkeypatch.setattr(plan, "make", lambda *_: replace(made, way=way))
        with edgevlm.load(bundle) as vlm:
            assert vlm._language._context.n_ctx == first_n_ctx
            chat = vlm.chat(picture)
            told = [chat.ask(QUESTION, **asked).text, chat.ask("And now?", max_tokens=9).text]
            assert vlm._language._context.n_ctx == made.way.n_ctx
            return told

    assert made.way.n_ctx > 300
    assert answers(256) == answers(made.way.n_ctx)  # in the middle of the first answer


def test_an_encoded_picture_is_not_encoded_again(vlm: VLM, picture: Image.Image) -> None:
    answer = vlm.ask(vlm.encode(picture), QUESTION, max_tokens=3)
    assert answer.timings.encode_ms == 0
    assert answer.timings.decode_ms == 0


def test_a_picture_encoded_by_another_model_is_refused(
    vlm: VLM, picture: Image.Image, tmp_path: Path
) -> None:
    tiny.llava(tmp_path / "checkpoint", seed=2)
    other = export(tmp_path / "checkpoint", tmp_path / "other", language="f32")
    with edgevlm.load(other) as second:
        encoded = second.encode(picture)
    with pytest.raises(edgevlm.PromptError, match="another model"):
        vlm.ask(encoded, QUESTION)


def test_sampling_repeats_with_its_seed_and_varies_without(vlm: VLM, picture: Image.Image) -> None:
    def sampled(seed: int) -> str:
        return vlm.ask(picture, QUESTION, max_tokens=12, temperature=1.5, seed=seed).text

    assert sampled(5) == sampled(5)
    assert len({sampled(seed) for seed in range(5)}) > 1


def test_top_k_1_is_greedy(vlm: VLM, picture: Image.Image) -> None:
    greedy = vlm.ask(picture, QUESTION, max_tokens=12)
    sampled = vlm.ask(picture, QUESTION, max_tokens=12, temperature=2.0, top_k=1)
    assert sampled.text == greedy.text


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(
    vlm: VLM, picture: Image.Image
) -> None:
    whole = vlm.ask(picture, QUESTION, max_tokens=30, repetition_stop=False).text
    stop = whole[len(whole) // 2 :][:3]
    answer = vlm.ask(picture, QUESTION, max_tokens=30, stop=(stop,), repetition_stop=False)
    assert answer.finish_reason == "stop"
    assert answer.text == whole[: whole.index(stop)].strip()


def test_a_loop_ends_with_its_own_reason(vlm: VLM, picture: Image.Image) -> None:
    grammar = 'root ::= "a" root'  # nothing but the same token, for ever
    looping = vlm.ask(picture, QUESTION, max_tokens=200, grammar=grammar)
    assert looping.finish_reason == "repetition"
    assert looping.generated_tokens < 200
    free = vlm.ask(picture, QUESTION, max_tokens=200, grammar=grammar, repetition_stop=False)
    assert free.finish_reason == "length"


def test_a_grammar_that_is_none_is_refused_before_any_work(vlm: VLM, picture: Image.Image) -> None:
    with pytest.raises(edgevlm.PromptError, match="GBNF"):
        vlm.ask(picture, QUESTION, grammar="root ::= (")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_without_a_way_on_is_an_error_and_no_crash(
    vlm: VLM, picture: Image.Image, temperature: float
) -> None:
    dead_end = 'root ::= "a" [\\U00D80000]'
    with pytest.raises(edgevlm.OutputError, match="admits no token"):
        vlm.ask(picture, QUESTION, grammar=dead_end, temperature=temperature)
    assert vlm.ask(picture, QUESTION, max_tokens=2).generated_tokens == 2


def test_chat_reads_only_what_is_new(vlm: VLM, picture: Image.Image) -> None:
    chat = vlm.chat(picture)
    chat.ask("One?", max_tokens=4)
    read: list[int] = []
    decode = vlm._language._context.decode

    def counting(rows, position, sequence):  # type: ignore[no-untyped-def]
        read.append(len(rows))
        decode(rows, position, sequence)

    vlm._language._context.decode = counting  # type: ignore[method-assign]
    chat.ask("Two?", max_tokens=1)
    assert sum(read) < 40  # the picture's 16 rows and the first question were kept
    assert 16 not in read


def test_chat_answers_as_a_fresh_engine_does(vlm: VLM, bundle: Path, picture: Image.Image) -> None:
    chat = vlm.chat(picture)
    chat.ask("One?", max_tokens=8)
    second = chat.ask("Two?", max_tokens=8)
    with edgevlm.load(bundle) as fresh:
        *_, last = fresh.run(
            chat.messages[:-1], [fresh.encode(picture)], edgevlm.Options(max_tokens=8)
        )
    assert last.answer is not None
    assert last.answer.text == second.text


def test_a_turn_that_fails_is_not_part_of_the_chat(vlm: VLM, picture: Image.Image) -> None:
    chat = vlm.chat(picture)
    with pytest.raises(edgevlm.ContextOverflow):
        chat.ask("word " * 2000)
    assert chat.messages == []
    assert chat.ask("One?", max_tokens=2).generated_tokens == 2


def test_context_overflow_comes_before_any_work(
    vlm: VLM, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_pixels(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("edgevlm.image.Photo.pixels", no_pixels)
    with pytest.raises(edgevlm.ContextOverflow) as caught:
        vlm.ask([picture] * 40, QUESTION)
    assert caught.value.needed > caught.value.available == 512


def test_an_answer_ends_where_the_context_does(vlm: VLM, picture: Image.Image) -> None:
    answer = vlm.ask(picture, QUESTION, max_tokens=10_000, repetition_stop=False, temperature=1.0)
    if answer.finish_reason == "length":
        assert answer.prompt_tokens + answer.generated_tokens == 512


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_refused(vlm: VLM, picture: Image.Image, question: str) -> None:
    with pytest.raises(edgevlm.PromptError, match="empty"):
        vlm.ask(picture, question)


def test_a_question_cannot_smuggle_a_picture_in(vlm: VLM, picture: Image.Image) -> None:
    with pytest.raises(edgevlm.PromptError, match="<image>"):
        vlm.ask(picture, "What is <image>?")


def test_an_unreadable_picture_never_reaches_the_model(
    vlm: VLM, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vlm._language, "feed", lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(edgevlm.ImageError):
        vlm.ask([picture, b"no picture at all"], QUESTION)


def test_cancel_from_another_thread_leaves_the_engine_usable(
    vlm: VLM, picture: Image.Image
) -> None:
    stream = vlm.stream(picture, QUESTION, max_tokens=400, repetition_stop=False, temperature=1.0)
    next(stream)
    threading.Thread(target=vlm.cancel).start()
    with pytest.raises(edgevlm.Cancelled):
        while True:
            next(stream)
            time.sleep(0.001)
    assert vlm.ask(picture, QUESTION, max_tokens=3).generated_tokens == 3


@pytest.mark.parametrize("stage", ["preprocess", "encode", "prefill"])
def test_cancel_stops_every_stage(
    vlm: VLM, picture: Image.Image, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {
        "preprocess": "edgevlm.preprocess.patches",
        "encode": "edgevlm.vision.encode",
        "prefill": "edgevlm.llama.Context.decode",
    }[stage]
    module, _, name = where.rpartition(".")
    owner = {
        "edgevlm.preprocess": preprocess,
        "edgevlm.vision": vision,
        "edgevlm.llama.Context": type(vlm._language._context),
    }[module]
    original = getattr(owner, name)

    def cancelled_first(*args: object, **kwargs: object) -> object:
        vlm.cancel()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, cancelled_first)
    with pytest.raises(edgevlm.Cancelled):
        vlm.ask(picture, QUESTION, max_tokens=3)
    monkeypatch.undo()
    assert vlm.ask(picture, QUESTION, max_tokens=3).generated_tokens == 3


def test_ctrl_c_leaves_the_engine_usable(bundle: Path) -> None:
    program = f"""
import edgevlm, numpy as np, time
picture = np.zeros((60, 60, 3), np.uint8)
with edgevlm.load({str(bundle)!r}) as vlm:
    try:
        for piece in vlm.stream(picture, "go", repetition_stop=False, grammar='root ::= [a-z]+'):
            print("ready", flush=True)
            time.sleep(0.1)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    print(vlm.ask(picture, "again", max_tokens=2, grammar='root ::= [a-z]+').generated_tokens)
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "ready\n"
        os.kill(child.pid, signal.SIGINT)
        assert child.stdout.read().removeprefix("ready\n") == "interrupted\n2\n"
    assert child.wait(timeout=60) == 0


def test_a_second_stream_in_the_same_thread_is_refused(vlm: VLM, picture: Image.Image) -> None:
    first = vlm.stream(picture, QUESTION, max_tokens=5)
    next(first)
    with pytest.raises(RuntimeError, match="still open"):
        vlm.ask(picture, QUESTION)
    first.close()
    assert vlm.ask(picture, QUESTION, max_tokens=2).generated_tokens == 2


def test_threads_take_turns(vlm: VLM, picture: Image.Image) -> None:
    alone = vlm.ask(picture, QUESTION, max_tokens=10).text
    answers: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(vlm.ask(picture, QUESTION, max_tokens=10).text)
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [alone] * 3


def test_a_closed_model_refuses_work(bundle: Path, picture: Image.Image) -> None:
    vlm = edgevlm.load(bundle)
    unfinished = vlm.stream(picture, QUESTION, max_tokens=5)
    next(unfinished)
    vlm.close()
    vlm.close()
    with pytest.raises((RuntimeError, edgevlm.EdgeVLMError)):
        list(unfinished)
    with pytest.raises(RuntimeError, match="closed"):
        vlm.ask(picture, QUESTION)


def test_close_stops_what_another_thread_runs(bundle: Path, picture: Image.Image) -> None:
    vlm = edgevlm.load(bundle)
    caught: list[BaseException] = []
    started = threading.Event()

    def work() -> None:
        try:
            for _ in vlm.stream(picture, QUESTION, grammar="root ::= [a-z]+", max_tokens=400):
                started.set()
                time.sleep(0.01)
        except edgevlm.Cancelled as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    vlm.close()
    thread.join()
    assert len(caught) == 1


def test_parts_of_two_models_are_refused_with_both_widths(bundle: Path, tmp_path: Path) -> None:
    import json
    import shutil

    tiny.llava(tmp_path / "checkpoint", seed=2, language={"hidden_size": 128})
    other = export(tmp_path / "checkpoint", tmp_path / "other", language="f32")
    mixed = tmp_path / "mixed"
    shutil.copytree(bundle, mixed)
    shutil.copy(other / "vision.onnx", mixed / "vision.onnx")
    manifest = json.loads((mixed / "bundle.json").read_text())
    theirs = json.loads((other / "bundle.json").read_text())
    manifest["files"]["vision.onnx"] = theirs["files"]["vision.onnx"]
    (mixed / "bundle.json").write_text(manifest_text(manifest))
    with pytest.raises(edgevlm.BundleError, match=r"128-wide.*64"):
        edgevlm.load(mixed)
