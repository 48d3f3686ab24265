"""Printing answers: text as it comes, or one JSON object a photo."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from edgevlm.errors import EdgeVLMError, ImageError

if TYPE_CHECKING:
    from edgevlm.answer import Answer, Outcome, Piece

BATCH_FAILED = 3


def each_photo(
    photos: Sequence[str], show: Callable[[str], None], fatal: tuple[type[Exception], ...] = ()
) -> int:
    """Show every photo; an unreadable one does not stop the others. The exit code."""
    if len(photos) == 1:
        show(photos[0])
        return 0
    failed = 0
    for photo in photos:
        try:
            show(photo)
        except ImageError as error:
            click.echo(f"edgevlm: {error}", err=True)
            failed += 1
    return BATCH_FAILED if failed else 0


def show_outcomes(outcomes: Iterator[Outcome], arguments: Mapping[str, Any]) -> int:
    """Print what became of each photo, one after the other. The exit code."""
    failed = 0
    for outcome in outcomes:
        if outcome.answer is None:
            click.echo(f"edgevlm: {outcome.error}", err=True)
            failed += 1
        else:
            _show_whole(outcome.answer, arguments, [outcome.picture], f"{outcome.picture}: ")
    return BATCH_FAILED if failed else 0


def show_answer(
    pieces: Iterator[Piece], arguments: Mapping[str, Any], photos: Sequence[str]
) -> Answer:
    """Print an answer to stdout while it is made, or whole; its timings to stderr if asked."""
    streaming = not (arguments["as_json"] or arguments["no_stream"] or arguments["schema"])
    answer = None
    started = False
    for piece in pieces:
        if streaming and piece.text:
            click.echo(piece.text if started else piece.text.lstrip(), nl=False)
            started = True
        answer = piece.answer or answer
    if answer is None:
        raise EdgeVLMError("the model gave no answer")
    if started:
        click.echo()
        _show_notes(answer, arguments)
    else:
        _show_whole(answer, arguments, photos)
    return answer


def _show_whole(
    answer: Answer, arguments: Mapping[str, Any], photos: Sequence[str], label: str = ""
) -> None:
    if arguments["as_json"]:
        click.echo(json.dumps(_as_dict(answer, arguments["model_name"], photos)))
    else:
        click.echo(label + answer.text)
    _show_notes(answer, arguments)


def _show_notes(answer: Answer, arguments: Mapping[str, Any]) -> None:
    if answer.finish_reason == "repetition" and not arguments["quiet"]:
        click.echo("edgevlm: stopped, the answer had begun to repeat itself", err=True)
    if arguments["timings"]:
        click.echo(_timings_line(answer), err=True)


def _as_dict(answer: Answer, model: str, photos: Sequence[str]) -> dict[str, Any]:
    record = {"image": photos[0] if len(photos) == 1 else list(photos), "model": model}
    return {**record, **asdict(answer)}


def _timings_line(answer: Answer) -> str:
    stages = [
        f"{name.removesuffix('_ms').replace('_', ' ')} {ms:.0f}"
        for name, ms in asdict(answer.timings).items()
    ]
    seconds = answer.timings.generate_ms / 1000
    speed = (answer.generated_tokens - 1) / seconds if seconds > 0 else 0.0
    return (
        f"edgevlm: ms: {' · '.join(stages)} · {answer.generated_tokens} tokens at "
        f"{speed:.1f}/s · peak {answer.peak_rss_bytes / 1e6:.0f} MB"
    )
