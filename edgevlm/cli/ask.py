"""`edgevlm ask PHOTO… QUESTION`"""

from __future__ import annotations

from typing import Any

import click

from edgevlm.cli import options
from edgevlm.cli.output import show_answer


@click.command("ask")
@click.argument("photos", metavar="PHOTO…", nargs=-1, required=True)
@click.argument("question")
@options.sampling
@options.output
@options.model
def command(photos: tuple[str, ...], question: str, **arguments: Any) -> None:
    """Answer a question about one photo, or about several together."""
    chosen = options.sampling_options(arguments)
    with options.open_model(arguments) as vlm:
        arguments["model_name"] = vlm.bundle.name
        show_answer(vlm.stream(list(photos), question, **chosen), arguments, photos)
