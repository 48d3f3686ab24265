"""What fits into a time: arithmetic on costs, then the deadline on a real model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from edgevlm_export import export
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import edgevlm
from edgevlm import VLM, budget, calibration, cancel, vision
from edgevlm.budget import Choice, Costs
from edgevlm.cli import run
from edgevlm.errors import Cancelled, PromptError, TimeBudget

COSTS = Costs(tile_ms=1000, prefill_ms=5, token_ms=100)
CLOSE = Choice(n_tiles=9, n_prompt_tokens=800, n_answer_tokens=80)  # 9 + 4 + 8 s
FAR = Choice(n_tiles=1, n_prompt_tokens=800, n_answer_tokens=80)  # 1 + 4 + 8 s
SHORT = Choice(n_tiles=1, n_prompt_tokens=200, n_answer_tokens=30)  # 1 + 1 + 3 s


def test_a_choice_costs_the_sum_of_its_stages() -> None:
    assert CLOSE.seconds(COSTS) == 21
    assert SHORT.seconds(COSTS) == 5


@pytest.mark.parametrize(("seconds", "index"), [(30, 0), (20, 1), (14, 2), (6, 2)])
def test_the_first_choice_that_fits_is_taken(seconds: float, index: int) -> None:
    assert budget.best(COSTS, seconds, [CLOSE, FAR, SHORT]) == index


def test_what_cannot_be_done_is_refused_with_what_would() -> None:
    with pytest.raises(TimeBudget, match=r"^5 s are too few .* take 5\.6 s"):
        budget.best(COSTS, 5, [CLOSE, SHORT, FAR])


@given(
    st.builds(Costs, st.floats(0, 1e5), st.floats(0, 1e4), st.floats(0, 1e4)),
    st.floats(0.001, 1e5),
    st.lists(
        st.builds(Choice, st.integers(0, 20), st.integers(0, 5000), st.integers(0, 500)),
        min_size=1,
    ),
)
def test_what_is_taken_fits_with_something_to_spare(
    costs: Costs, seconds: float, choices: list[Choice]
) -> None:
    try:
        chosen = choices[budget.best(costs, seconds, choices)]
    except TimeBudget:
        assert all(choice.seconds(costs) > 0.89 * seconds for choice in choices)
    else:
        assert chosen.seconds(costs) <= seconds


def test_only_descriptions_get_shorter() -> None:
    assert budget.shorter("long") == ["long", "normal", "short"]
    assert budget.shorter("normal") == ["normal", "short"]
    assert budget.shorter("short") == ["short"]
    assert budget.shorter(None) == [None]


def test_native_work_ends_when_its_time_is_over() -> None:
    stopper = cancel.Cancel()

    def work() -> None:
        while True:
            time.sleep(0.005)
            stopper.check()

    with pytest.raises(TimeBudget), stopper.within(0.05):
        stopper.call(work)
    with stopper.within(60):  # the next call is not touched, and nothing waits for its timer
        stopper.call(stopper.check)
    stopper.cancel()
    with pytest.raises(Cancelled), stopper.within(None):
        stopper.call(work)
    stopper.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("budget")
    tiny.llava(directory / "checkpoint", seed=1)
    return export(directory / "checkpoint", directory / "tiny", language="f32")


@pytest.fixture
def vlm(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[VLM]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no calibration of another test
    with edgevlm.load(model) as opened:
        yield opened


def calibrated(monkeypatch: pytest.MonkeyPatch, costs: Costs) -> None:
    monkeypatch.setattr(calibration, "known", lambda *_: costs)


def test_enough_time_changes_nothing(vlm: VLM, picture: Image.Image) -> None:
    free = vlm.describe(picture, max_tokens=6)
    assert vlm.describe(picture, max_tokens=6, budget_s=600).text == free.text
    calibration.measure(vlm)
    assert vlm.describe(picture, max_tokens=6, budget_s=600).text == free.text


def test_too_little_time_is_refused_before_any_work(
    vlm: VLM, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated(monkeypatch, COSTS)
    monkeypatch.setattr(vision, "encode", None)  # would fail if it were called
    with pytest.raises(TimeBudget, match=r"0\.1 s are too few on this machine: 1 tiles"):
        vlm.describe(picture, budget_s=0.1)


def test_a_description_gets_shorter_where_the_asked_one_does_not_fit(
    vlm: VLM, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated(monkeypatch, Costs(0, 0, 100_000))
    short = vlm.describe(picture, "short", max_tokens=None, repetition_stop=False)
    chosen = vlm.describe(picture, "long", budget_s=30 * 100 / 0.89, repetition_stop=False)
    assert chosen.text == short.text
    assert chosen.prompt_tokens == short.prompt_tokens


def test_what_was_read_already_costs_nothing_again(
    vlm: VLM, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated(monkeypatch, Costs(10**7, 10**5, 0))  # 10,000 s a tile, 100 s a token
    chat = vlm.chat(picture)
    chat.ask("What is it?", max_tokens=2)
    with pytest.raises(TimeBudget):
        vlm.ask(picture, "And now?", max_tokens=2, budget_s=6000)
    chat.ask("And now?", max_tokens=2, budget_s=6000)


def test_an_answer_ends_with_what_was_said_when_the_time_is_over(
    vlm: VLM, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = []
    options: dict[str, Any] = {"budget_s": 1.0, "max_tokens": 400, "repetition_stop": False}
    for piece in vlm.stream(picture, length="normal", **options):
        pieces.append(piece)
        if piece.answer is None and len(pieces) == 2:
            time.sleep(1.1)  # whoever reads may be slow too
    answer = pieces[-1].answer
    assert answer is not None
    assert answer.finish_reason == "budget"
    assert answer.text == "".join(piece.text for piece in pieces).strip()
    assert vlm.describe(picture, max_tokens=3).finish_reason == "length"


def test_nothing_said_in_time_is_an_error(
    vlm: VLM, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: object) -> None:
        time.sleep(0.3)
        vlm._cancel.check()

    monkeypatch.setattr(vision, "encode", slow)
    with pytest.raises(TimeBudget, match="before the first word"):
        vlm.describe(picture, budget_s=0.1)
    monkeypatch.undo()
    vlm.describe(picture, max_tokens=3)


def test_each_of_many_photos_has_its_time(
    vlm: VLM, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = picture.transpose(Image.Transpose.ROTATE_90)
    expected = [vlm.describe(photo, max_tokens=3).text for photo in (other, picture)]
    encode = vision.encode
    late = iter([True, False, False])

    def slow_at_first(*arguments: Any) -> Any:
        while next(late, False):
            time.sleep(1.1)
            vlm._cancel.check()
        return encode(*arguments)

    monkeypatch.setattr(vision, "encode", slow_at_first)
    vlm._encoder._cache = None
    found = [*vlm.describe_many([picture, other, picture], max_tokens=3, budget_s=1.0)]
    assert isinstance(found[0].error, TimeBudget)
    assert [outcome.answer.text for outcome in found[1:] if outcome.answer] == expected


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_budget_is_a_time(vlm: VLM, picture: Image.Image, seconds: float) -> None:
    with pytest.raises(PromptError, match="budget_s is"):
        vlm.describe(picture, budget_s=seconds)


def test_the_command_line_calibrates_hints_and_gives_exit_code_7(
    model: Path,
    picture: Image.Image,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    picture.save(tmp_path / "photo.png")
    describe = ["describe", str(tmp_path / "photo.png"), "-m", str(model), "-n", "3"]
    assert run([*describe, "--budget", "600"]) == 0
    assert "doctor --calibrate" in capsys.readouterr().err
    assert run(["doctor", "--calibrate", "-m", str(model)]) == 0
    assert "ms a tile" in capsys.readouterr().out
    assert run([*describe, "--budget", "600"]) == 0
    assert capsys.readouterr().err == ""
    calibrated(monkeypatch, COSTS)
    assert run([*describe, "--budget", "0.1"]) == 7
    assert "0.1 s are too few" in capsys.readouterr().err
    assert run([*describe, "--budget", "0"]) == 2


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"tile_ms": 1}', "null", "\x00"])
def test_a_damaged_calibration_is_none(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = calibration._path(vlm.bundle, vlm.threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert calibration.known(vlm.bundle, vlm.threads) is None
