"""`edgevlm describe PHOTO…`"""

from __future__ import annotations

from typing import Any

import click

from edgevlm.cli import options
from edgevlm.cli.output import show_answer, show_outcomes


@click.command("describe")
@click.argument("photos", metavar="PHOTO…", nargs=-1, required=True)
@options.option(
    "--length",
    type=click.Choice(["short", "normal", "long"]),
    default="normal",
    show_default=True,
    help="How much to say.",
)
@options.sampling
@options.output
@options.model
def command(photos: tuple[str, ...], length: str, **arguments: Any) -> int:
    """Say what each photo shows. A PHOTO is a file, or - for standard input."""
    chosen = options.sampling_options(arguments)
    with options.open_model(arguments) as vlm:
        arguments["model_name"] = vlm.bundle.name
        if len(photos) > 1:
            return show_outcomes(vlm.describe_many(photos, length, **chosen), arguments)
        show_answer(vlm.stream(photos[0], length=length, **chosen), arguments, photos)
        return 0
