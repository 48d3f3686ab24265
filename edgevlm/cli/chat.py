"""`edgevlm chat PHOTO…`"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click

from edgevlm.cli import options
from edgevlm.cli.output import show_answer
from edgevlm.errors import ContextOverflow, OutputError


@click.command("chat")
@click.argument("photos", metavar="PHOTO…", nargs=-1, required=True)
@options.sampling
@options.output
@options.model
def command(photos: tuple[str, ...], **arguments: Any) -> None:
    """Talk about photos, a question a line; end with Ctrl-D. Ctrl-C stops an answer."""
    chosen = options.sampling_options(arguments)
    with options.open_model(arguments) as vlm:
        arguments["model_name"] = vlm.bundle.name
        chat = vlm.chat(list(photos))
        for question in _questions():
            try:
                show_answer(chat.stream(question, **chosen), arguments, photos)
            except KeyboardInterrupt:
                click.echo("\nedgevlm: stopped", err=True)
            except (ContextOverflow, OutputError) as error:
                click.echo(f"edgevlm: {error}", err=True)


def _questions() -> Iterator[str]:
    """Lines of standard input, with a prompt on stderr if a person types them."""
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
