"""`edgevlm detect PHOTO THING`"""

from __future__ import annotations

from typing import Any

import click

from edgevlm.cli import options, places


@click.command("detect")
@click.argument("photo")
@click.argument("thing")
@places.shared
@options.model
def command(photo: str, thing: str, **arguments: Any) -> None:
    """Print a box in pixels around every THING: left, top, right, bottom."""
    most = arguments["max_objects"]
    places.run(
        photo,
        thing,
        arguments,
        lambda vlm, source: vlm.detect(source, thing, max_objects=most),
        "objects",
    )
