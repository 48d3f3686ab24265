"""`edgevlm point PHOTO THING`"""

from __future__ import annotations

from typing import Any

import click

from edgevlm.cli import options, places


@click.command("point")
@click.argument("photo")
@click.argument("thing")
@places.shared
@options.model
def command(photo: str, thing: str, **arguments: Any) -> None:
    """Print a point in pixels on every THING: from the left, from the top."""
    most = arguments["max_objects"]
    places.run(
        photo,
        thing,
        arguments,
        lambda vlm, source: vlm.point(source, thing, max_objects=most),
        "points",
    )
