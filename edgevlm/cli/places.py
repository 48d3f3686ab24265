"""What `detect` and `point` share: options, printing, drawing."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevlm.cli import options

if TYPE_CHECKING:
    from edgevlm.answer import Box, Point
    from edgevlm.engine import VLM

_COLOUR = (255, 0, 60)

shared = options.every(
    options.option(
        "--max-objects", type=click.IntRange(1), default=50, show_default=True, help="At most."
    ),
    options.option("--json", "as_json", is_flag=True, help="One JSON object."),
    options.option(
        "--draw",
        type=click.Path(dir_okay=False, writable=True, path_type=Path),
        metavar="OUT.png",
        help="Also write the photo with what was found on it.",
    ),
)


def run(
    photo: str,
    thing: str,
    arguments: Mapping[str, Any],
    find: Callable[[VLM, str | bytes], Sequence[Box] | Sequence[Point]],
    key: str,
) -> None:
    """Find, print and if asked draw; `key` is what the JSON object calls the list."""
    source = sys.stdin.buffer.read() if photo == "-" else photo  # read once, drawn on later
    with options.open_model(arguments) as vlm:
        found = find(vlm, source)
    if arguments["as_json"]:
        click.echo(json.dumps({key: [asdict(item) for item in found]}))
    else:
        for item in found:
            click.echo(" ".join(map(str, _px(item))))
        if not found and not arguments["quiet"]:
            click.echo(f"edgevlm: no {thing} found", err=True)
    if arguments["draw"] is not None:
        _draw(source, found, arguments["draw"], arguments["max_pixels"])


def _px(item: Box | Point) -> tuple[int, ...]:
    """What `asdict` calls box_px or point_px."""
    fields = asdict(item)
    pixels: tuple[int, ...] = fields["box_px"] if "box_px" in fields else fields["point_px"]
    return pixels


def _draw(
    source: str | bytes, found: Sequence[Box] | Sequence[Point], out: Path, max_pixels: int
) -> None:
    from PIL import Image, ImageDraw

    from edgevlm import image, paths

    pixels = image.open_image(source, max_pixels=max_pixels).pixels(None)
    picture = Image.fromarray(pixels)
    line_px = max(2, max(picture.size) // 250)
    pen = ImageDraw.Draw(picture)
    for item in found:
        corners = _px(item)
        if len(corners) == 4:
            pen.rectangle(corners, outline=_COLOUR, width=line_px)
        else:
            pen.circle(corners, 3 * line_px, fill=_COLOUR, outline="white", width=line_px)
    png = io.BytesIO()
    picture.save(png, "PNG")
    try:
        paths.write_atomic(out, png.getvalue())
    except OSError as error:
        raise click.FileError(str(out), hint=str(error)) from error
