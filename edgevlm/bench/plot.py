"""The result of a measurement as a picture, drawn with Pillow: nothing more to install.

Above, the whole answer on one time axis; below, each stage on an axis of its own, because a token
and a prefill differ by a hundredfold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from edgevlm.bench.run import is_random

_SCALE = 2  # drawn at twice the size, so that it stays sharp on dense screens
_WIDTH_PX = 960
_MARGIN_PX, _LABEL_PX, _VALUE_PX = 40, 120, 150
_BAR_PX, _GAP_PX, _ROW_PX = 26, 6, 30
_PAPER, _INK, _FAINT, _RULE = "#ffffff", "#1b1f24", "#667080", "#e3e7ec"
_OURS, _THEIRS = "#1f6feb", "#aab4c0"
_PARTS = (  # of the whole answer, with a colour for us and one for the peer
    ("photo", "#0b7a75", "#7f8b96"),
    ("encode", "#1f6feb", "#96a1ac"),
    ("prefill", "#6e4fd3", "#adb6bf"),
    ("answer", "#d9822b", "#c5ccd3"),
)
_STAGES = (
    ("encode", "encode"),
    ("prefill", "prefill"),
    ("first_token", "first token"),
    ("decode", "a token"),
    ("total", "whole answer"),
)


def draw(result: Mapping[str, Any]) -> Image.Image:
    """An RGB picture of the stages, and of the peer's where it was measured."""
    who = [("edgevlm", result["stages"], _OURS)]
    if result["peer"]:
        who.append(("libmtmd", result["peer"], _THEIRS))
    bars_px = len(who) * (_BAR_PX + _GAP_PX)
    height_px = 290 + bars_px + len(_STAGES) * (bars_px + 16)
    canvas = _Canvas(height_px)
    canvas.text(_MARGIN_PX, 30, _title(result), 24)
    canvas.text(_MARGIN_PX, 64, _subtitle(result), 13, _FAINT)
    canvas.text(_MARGIN_PX, 84, _conditions(result), 13, _FAINT)
    y = 124
    canvas.text(_MARGIN_PX, y, "From the photo to the end of the answer, seconds", 15)
    y = _legend(canvas, y + 26, [(name, colour) for name, colour, _ in _PARTS]) + 8
    longest_ms = max(stages["total"] for _, stages, _ in who)
    for column, (name, stages, _) in enumerate(who):
        _whole(canvas, y, name, list(_parts(stages, column)), stages["total"], longest_ms)
        y += _BAR_PX + _GAP_PX
    y += 26
    canvas.rule(y - 10)
    canvas.text(_MARGIN_PX, y, "Stage by stage, each to its own scale", 15)
    y = _legend(canvas, y + 26, [(name, colour) for name, _, colour in who]) + 8
    for stage, title in _STAGES:
        canvas.text(_MARGIN_PX, y + (bars_px - _GAP_PX) // 2 - 9, title, 14)
        slowest_ms = max(stages[stage] for _, stages, _ in who)
        for place, (_, stages, colour) in enumerate(who):
            note = _ratio(result, stage) if place == 0 else ""
            _bar(canvas, y, stages[stage], slowest_ms, colour, note)
            y += _BAR_PX + _GAP_PX
        y += 16
    return canvas.image


def _title(result: Mapping[str, Any]) -> str:
    against = " and llama.cpp's libmtmd" if result["peer"] else ""
    return f"{result['model']['name']}: edgevlm{against}"


def _subtitle(result: Mapping[str, Any]) -> str:
    machine, settings = result["machine"], result["settings"]
    board = f"{machine['board']}, " if machine["board"] else ""
    return f"{board}{machine['cpu']}, {settings['threads']} threads, {machine['system']}"


def _conditions(result: Mapping[str, Any]) -> str:
    photo, kinds = result["settings"]["photo"], result["model"]["quantization"]
    label = "random weights · " if is_random(result) else ""
    return (
        f"{label}language {kinds['language']}, vision {kinds['vision']} · "
        f"{photo['image_tokens']} image tokens · {result['settings']['max_tokens']} tokens of "
        f"answer · medians of {result['settings']['rounds']} rounds"
    )


def _parts(stages: Mapping[str, float], column: int) -> Iterator[tuple[float, str]]:
    """Milliseconds and colour of each part of the whole answer."""
    photo_ms = stages.get("image_decode", 0.0) + stages.get("preprocess", 0.0)
    answer_ms = stages["total"] - stages["first_token"]
    lengths = (photo_ms, stages["encode"], stages["prefill"], answer_ms)
    for length_ms, (_, *colours) in zip(lengths, _PARTS, strict=True):
        yield length_ms, colours[column]


def _legend(canvas: _Canvas, y: int, names: list[tuple[str, str]]) -> int:
    x = float(_MARGIN_PX + _LABEL_PX)
    for name, colour in names:
        canvas.box(x, y + 3, 12, 12, colour)
        x += 18
        canvas.text(x, y, name, 13, _FAINT)
        x += canvas.length(name, 13) + 20
    return y + 20


def _whole(
    canvas: _Canvas, y: int, name: str, parts: list[tuple[float, str]], total_ms: float,
    longest_ms: float,
) -> None:  # fmt: skip
    canvas.text(_MARGIN_PX, y + 4, name, 14)
    x = float(_MARGIN_PX + _LABEL_PX)
    for length_ms, colour in parts:
        width = canvas.axis_px * length_ms / longest_ms
        canvas.box(x, y, width - 1, _BAR_PX, colour)
        inside = f"{length_ms / 1000:.1f}"
        if canvas.length(inside, 12) + 10 < width:
            canvas.text(x + 6, y + 5, inside, 12, _PAPER)
        x += width
    canvas.text(x + 8, y + 4, f"{total_ms / 1000:.1f} s", 14)


def _bar(
    canvas: _Canvas, y: int, value_ms: float, slowest_ms: float, colour: str, note: str
) -> None:
    width = canvas.axis_px * value_ms / slowest_ms if slowest_ms else 0
    x = _MARGIN_PX + _LABEL_PX
    canvas.box(x, y, max(width, 2), _BAR_PX, colour)
    said = f"{value_ms / 1000:.2f} s" if value_ms >= 1000 else f"{value_ms:.0f} ms"
    canvas.text(x + width + 8, y + 4, said, 14)
    if note:
        canvas.text(x + width + 16 + canvas.length(said, 14), y + 4, note, 14, colour)


def _ratio(result: Mapping[str, Any], stage: str) -> str:
    ratio = (result["ratios"] or {}).get(stage)
    if ratio is None:
        return ""
    return f"{ratio:.1f} times as fast"


class _Canvas:
    """Lengths in px of the finished drawing; `_SCALE` is applied here and nowhere else."""

    axis_px = _WIDTH_PX - 2 * _MARGIN_PX - _LABEL_PX - _VALUE_PX

    def __init__(self, height_px: int) -> None:
        self.image = Image.new("RGB", (_WIDTH_PX * _SCALE, height_px * _SCALE), _PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, size_px: int, colour: str = _INK) -> None:
        self._draw.text((x * _SCALE, y * _SCALE), text, colour, _font(size_px))

    def length(self, text: str, size_px: int) -> float:
        return self._draw.textlength(text, _font(size_px)) / _SCALE

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        corners = (x * _SCALE, y * _SCALE, (x + width) * _SCALE - 1, (y + height) * _SCALE - 1)
        if width * _SCALE >= 1:
            self._draw.rectangle(corners, colour)

    def rule(self, y: float) -> None:
        self.box(_MARGIN_PX, y - 8, _WIDTH_PX - 2 * _MARGIN_PX, 1, _RULE)


def _font(size_px: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size_px * _SCALE)
