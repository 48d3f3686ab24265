"""Detect, point and what else only a model with places does, through API and command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tiny
from edgevlm_export import export
from PIL import Image
from tiny_moondream import IDS, moondream

import edgevlm
from edgevlm import VLM, PromptError
from edgevlm.cli import run

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("moondream")
    moondream(directory / "checkpoint", seed=4)
    return export(directory / "checkpoint", directory / "bundle", language="f32")


@pytest.fixture
def vlm(bundle: Path) -> Iterator[VLM]:
    with edgevlm.load(bundle) as opened:
        yield opened


@pytest.fixture
def photo(tmp_path: Path, picture: Image.Image) -> str:
    picture.save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def test_places_are_given_in_shares_and_in_pixels(vlm: VLM, picture: Image.Image) -> None:
    boxes = vlm.detect(picture, "car", max_objects=3)
    assert len(boxes) == 3
    for box in boxes:
        x0, y0, x1, y1 = box.box_px
        assert 0 <= x0 <= x1 <= 130
        assert 0 <= y0 <= y1 <= 90
        assert x0 == min(max(round(box.x_min * 130), 0), 130)
    for point in vlm.point(picture, "car", max_objects=3):
        assert point.point_px == (int(point.x * 130), int(point.y * 90))


def test_nothing_found_is_an_empty_list(tmp_path: Path, picture: Image.Image) -> None:
    moondream(tmp_path / "checkpoint", seed=4, bias={IDS["eos_id"]: 100.0})
    export(tmp_path / "checkpoint", tmp_path / "bundle", language="f32")
    with edgevlm.load(tmp_path / "bundle") as vlm:
        assert vlm.detect(picture, "car") == []
        assert vlm.gaze(picture, (0.5, 0.5)) is None
        assert vlm.gaze(picture, (0.5, 0.5), always=True) is not None


def test_an_accurate_gaze_is_reproducible(vlm: VLM, photo: str) -> None:
    face = (0.2, 0.2, 0.5, 0.6)
    first = vlm.gaze(photo, face, accurate=True, always=True, seed=1)
    assert first is not None
    assert first == vlm.gaze(photo, face, accurate=True, always=True, seed=1)


def test_an_accurate_gaze_needs_a_face_and_a_picture(vlm: VLM, picture: Image.Image) -> None:
    with pytest.raises(PromptError, match="the box of the face"):
        vlm.gaze(picture, (0.5, 0.5), accurate=True)
    with pytest.raises(PromptError, match="the place of an eye"):
        vlm.gaze(picture, (0.2, 0.2, 0.5, 0.6))
    with pytest.raises(PromptError, match="not an encoded one"):
        vlm.gaze(vlm.encode(picture), (0.2, 0.2, 0.5, 0.6), accurate=True)


def test_detail_from_the_command_line(
    bundle: Path, photo: str, tmp_path: Path, capsys: Captured
) -> None:
    seen = []
    for detail in ("low", "auto", "high"):
        asked = ["describe", photo, "-m", str(bundle), "-n", "2", "--json", "--detail", detail]
        assert run(asked) == 0
        seen.append(json.loads(capsys.readouterr().out)["model_px"])
    assert len({str(px) for px in seen}) == 3
    moondream(tmp_path / "checkpoint", "2024-03-04")
    one_way = str(export(tmp_path / "checkpoint", tmp_path / "bundle"))
    assert run(["describe", photo, "-m", one_way, "--detail", "high"]) == 2
    assert "detail is 'high'; this model knows auto" in capsys.readouterr().err
    assert run(["describe", photo, "-m", one_way, "--detail", "most"]) == 2
    with pytest.raises(ValueError, match="must be one of low, auto, high"):
        edgevlm.load(bundle, detail="most")


def test_a_full_context_ends_the_search(vlm: VLM, picture: Image.Image) -> None:
    found = vlm.detect(picture, "car", max_objects=1000)
    assert 100 < len(found) < 512 / 3


def test_a_model_without_places_says_so_before_any_work(
    tmp_path: Path, photo: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.llava(tmp_path / "checkpoint")
    bundle = export(tmp_path / "checkpoint", tmp_path / "bundle", language="f32")
    with edgevlm.load(bundle) as vlm:
        monkeypatch.setattr(vlm._encoder, "open", lambda _: pytest.fail("it was read"))
        for refused in (
            lambda: vlm.detect(photo, "car"),
            lambda: vlm.point(photo, "car"),
            lambda: vlm.gaze(photo, (0.5, 0.5)),
        ):
            with pytest.raises(PromptError, match="this model does not"):
                refused()
    with edgevlm.load(bundle) as vlm, pytest.raises(PromptError, match="does not reason"):
        vlm.ask(photo, "Why?", reasoning=True)
    assert run(["detect", photo, "car", "-m", str(bundle)]) == 2
    assert "does not detect" in capsys.readouterr().err


@pytest.mark.parametrize("thing", ["", "  "])
def test_a_thing_must_be_named(vlm: VLM, picture: Image.Image, thing: str) -> None:
    with pytest.raises(PromptError, match="nothing to detect"):
        vlm.detect(picture, thing)


@pytest.mark.parametrize("spot", [(0.5,), (0.5, 1.5), (0.9, 0.1, 0.2, 0.3), (-0.1, 0.5)])
def test_places_outside_the_picture_are_refused(
    vlm: VLM, picture: Image.Image, spot: tuple[float, float]
) -> None:
    with pytest.raises(PromptError):
        vlm.ask(picture, "What is here?", places=[spot])


def test_a_picture_is_read_once_for_many_questions(
    vlm: VLM, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = vlm.encode(picture)
    first = vlm.detect(encoded, "car", max_objects=2)
    context = vlm._language._context
    monkeypatch.setattr(
        context, "decode_bidirectional", lambda *_: pytest.fail("the picture was read again")
    )
    vlm.ask(encoded, "What is it?", max_tokens=3)
    assert vlm.detect(encoded, "car", max_objects=2) == first


def test_a_text_question_between_two_about_a_picture_changes_nothing(
    vlm: VLM, picture: Image.Image
) -> None:
    before = vlm.ask(picture, "What?", max_tokens=8).text
    vlm.ask([], "What?", max_tokens=8)
    assert vlm.ask(picture, "What?", max_tokens=8).text == before


def test_a_chat_goes_on(vlm: VLM, picture: Image.Image) -> None:
    chat = vlm.chat(picture)
    chat.ask("One?", max_tokens=4)
    second = chat.ask("Two?", max_tokens=4)
    assert second.prompt_tokens > 26 + 8


def test_two_pictures_are_refused(vlm: VLM, picture: Image.Image) -> None:
    with pytest.raises(PromptError, match="one picture at a time"):
        vlm.ask([picture, picture], "Which?")


def test_thoughts_are_part_of_the_answer(vlm: VLM, picture: Image.Image) -> None:
    thought = vlm.ask(picture, "Why?", reasoning=True, max_tokens=9, repetition_stop=False)
    assert thought.reasoning is not None
    assert thought.reasoning.text
    assert vlm.ask(picture, "Why?", max_tokens=9).reasoning is None


def test_ask_takes_places_and_thinks(bundle: Path, photo: str, capsys: Captured) -> None:
    asked = ["ask", photo, "What is here?", "-m", str(bundle), "-n", "5"]
    assert run([*asked, "--place", "0.5,0.5", "--place", "0.1,0.1,0.4,0.4", "--json"]) == 0
    pointed = json.loads(capsys.readouterr().out)
    assert run([*asked, "--reasoning"]) == 0
    assert "thought: " in capsys.readouterr().err
    assert run([*asked, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert pointed["prompt_tokens"] == plain["prompt_tokens"] + 5
    assert run([*asked, "--place", "here"]) == 2
    assert run([*asked, "--place", "0.5,7"]) == 2


def test_cancel_stops_a_search(vlm: VLM, picture: Image.Image) -> None:
    decode = vlm._language._context.decode
    count = iter(range(100))

    def cancelled_at_the_ninth(rows, position, sequence):  # type: ignore[no-untyped-def]
        if next(count) == 9:
            vlm.cancel()
        decode(rows, position, sequence)

    vlm._language._context.decode = cancelled_at_the_ninth  # type: ignore[method-assign]
    with pytest.raises(edgevlm.Cancelled):
        vlm.detect(picture, "car")
    assert len(vlm.detect(picture, "car", max_objects=2)) == 2


def test_detect_prints_pixels_or_json(bundle: Path, photo: str, capsys: Captured) -> None:
    asked = [photo, "car", "-m", str(bundle), "--max-objects", "2"]
    assert run(["detect", *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert run(["detect", *asked, "--json"]) == 0
    objects = json.loads(capsys.readouterr().out)["objects"]
    assert [" ".join(map(str, item["box_px"])) for item in objects] == lines
    assert set(objects[0]) == {"x_min", "y_min", "x_max", "y_max", "box_px"}
    assert len(lines) == 2


def test_point_prints_pixels_or_json(bundle: Path, photo: str, capsys: Captured) -> None:
    asked = [photo, "car", "-m", str(bundle), "--max-objects", "2"]
    assert run(["point", *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert run(["point", *asked, "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [" ".join(map(str, item["point_px"])) for item in points] == lines
    assert set(points[0]) == {"x", "y", "point_px"}


@pytest.mark.parametrize("verb", ["detect", "point"])
def test_what_was_found_is_drawn(
    bundle: Path, photo: str, picture: Image.Image, tmp_path: Path, verb: str
) -> None:
    out = tmp_path / "out.png"
    asked = [photo, "car", "-m", str(bundle), "--max-objects", "1", "--draw", str(out)]
    assert run([verb, *asked]) == 0
    with Image.open(out) as drawn:
        assert drawn.size == picture.size
        assert (np.asarray(drawn) != np.asarray(picture)).any()


def test_standard_input_is_drawn_on_too(
    bundle: Path, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = BytesIO()
    picture.save(stream, "PNG")
    stream.seek(0)
    monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": stream}))
    out = tmp_path / "out.png"
    asked = ["-", "car", "-m", str(bundle), "--max-objects", "1", "--draw", str(out)]
    assert run(["point", *asked]) == 0
    with Image.open(out) as drawn:
        assert drawn.size == picture.size


def test_a_drawing_that_cannot_be_written_is_one_line(
    bundle: Path, photo: str, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "missing" / "out.png"
    asked = [photo, "car", "-m", str(bundle), "--max-objects", "1", "--draw", str(out)]
    assert run(["point", *asked]) == 1
    assert "out.png" in capsys.readouterr().err


def test_a_damaged_region_file_is_named(tmp_path: Path, picture: Image.Image) -> None:
    moondream(tmp_path / "checkpoint")
    bundle = export(tmp_path / "checkpoint", tmp_path / "bundle", language="f32")
    data = bytearray((bundle / "region.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "region.npz").write_bytes(data)
    with pytest.raises(edgevlm.BundleError, match=r"region.npz"):
        edgevlm.load(bundle)
