"""`edgevlm ask PHOTO… QUESTION`"""

from __future__ import annotations

from typing import Any

import click

from edgevlm.cli import options
from edgevlm.cli.output import show_answer


@click.command("ask")
@click.argument("photos", metavar="PHOTO…", nargs=-1, required=True)
@click.argument("question")
@options.option("--reasoning", is_flag=True, help="Think first, if the model can.")
@options.option(
    "--place",
    "places",
    multiple=True,
    metavar="X,Y|X0,Y0,X1,Y1",
    callback=lambda _, __, given: [_spot(text) for text in given],
    help="What the question points at, 0 to 1, if the model can look there; may be repeated.",
)
@options.sampling
@options.output
@options.model
def command(photos: tuple[str, ...], question: str, **arguments: Any) -> None:
    """Answer a question about one photo, or about several together."""
    chosen = options.sampling_options(arguments)
    chosen |= {"reasoning": arguments["reasoning"], "places": arguments["places"]}
    with options.open_model(arguments) as vlm:
        arguments["model_name"] = vlm.bundle.name
        answer = show_answer(vlm.stream(list(photos), question, **chosen), arguments, photos)
    if answer.reasoning is not None and not (arguments["as_json"] or arguments["quiet"]):
        click.echo(f"edgevlm: thought: {answer.reasoning.text}", err=True)


def _spot(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not two or four numbers with commas") from None
