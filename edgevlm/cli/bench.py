"""`edgevlm bench [MODEL]`: how long each stage takes here, and how long it would have to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from edgevlm.cli import options

_OUT = click.Path(dir_okay=False, writable=True, path_type=Path)


@click.command("bench")
@click.argument("named", metavar="[MODEL]", required=False)
@options.option(
    "--random",
    "random_name",
    metavar="NAME",
    help="A published model's shape with random weights, made here: nothing is downloaded. An "
    "unknown NAME lists them.",
)
@options.option("--vs", type=click.Choice(["mtmd"]), help="Take turns with llama.cpp's libmtmd.")
@options.option(
    "--mmproj",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The model's vision file for --vs mtmd [default with --random: made here].",
)
@options.option(
    "--photo",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What is described [default: a drawn photo].",
)
@options.option(
    "-n", "--max-tokens", type=click.IntRange(2), default=64, show_default=True,
    help="Length of the answers.",
)  # fmt: skip
@options.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True,
    help="That count; one more goes before.",
)  # fmt: skip
@options.option("--json", "json_file", type=_OUT, help="Write the result here; - for stdout.")
@options.option("--plot", "plot_file", type=_OUT, help="Draw the stages as a PNG.")
@options.model
@click.pass_context
def command(context: click.Context, /, named: str | None, **arguments: Any) -> None:
    """Time the stages of an answer, here and now.

    Every stage is held against what this machine could do at best, and with --vs against
    llama.cpp's own multimodal path on the same language file.
    """
    from edgevlm.bench import plot, report, run

    random_name, mmproj = arguments["random_name"], arguments["mmproj"]
    by_option = context.get_parameter_source("model") is ParameterSource.COMMANDLINE
    if random_name and (named or by_option):  # $EDGEVLM_MODEL gives way
        raise click.UsageError("--random is a model of its own: give one or the other")
    if arguments["vs"] and not mmproj and not random_name:
        raise click.UsageError("--vs mtmd needs the model's vision file: --mmproj FILE")
    if arguments["vs"]:
        from edgevlm.bench import mtmd

        mtmd.check_installed()
    arguments["model"] = named or arguments["model"]
    if random_name:
        arguments["model"], made = _random(random_name, arguments)
        mmproj = mmproj or made
    plan = run.Plan(
        photo=arguments["photo"],
        mmproj=mmproj if arguments["vs"] else None,
        max_tokens=arguments["max_tokens"],
        rounds=arguments["rounds"],
    )
    with options.open_model(arguments) as vlm:
        result = run.run(vlm, plan, lambda line: _announce(line, arguments))
    if arguments["json_file"] == Path("-"):
        click.echo(json.dumps(result, indent=2))
    else:
        click.echo("\n".join(report.lines(result)))
        if arguments["json_file"]:
            arguments["json_file"].write_text(json.dumps(result, indent=2) + "\n")
    if arguments["plot_file"]:
        plot.draw(result).save(arguments["plot_file"], "PNG")


def _announce(line: str, arguments: dict[str, Any]) -> None:
    if not arguments["quiet"]:
        click.echo(f"edgevlm: {line}", err=True)


def _random(name: str, arguments: dict[str, Any]) -> tuple[str, Path | None]:
    """The bundle and, for a peer, the vision file; made where they are not there yet."""
    from edgevlm.cli.export import load_exporter
    from edgevlm.cli.progress import Bars

    load_exporter()
    from edgevlm_export import random_models

    if name not in random_models.NAMES:
        raise click.UsageError(f"no shape {name!r}; known: {', '.join(random_models.NAMES)}")
    with Bars(quiet=arguments["quiet"]) as bars:
        directory = random_models.cached(name, progress=bars)
    return str(directory), random_models.cached_mmproj(name) if arguments["vs"] else None
