"""`edgevlm verify BUNDLE --reference CHECKPOINT`: how close an export is to its source."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from edgevlm.cli import options

_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command("verify")
@click.argument("bundle", type=_DIRECTORY)
@options.option(
    "--reference", required=True, type=_DIRECTORY, help="The checkpoint that it was exported from."
)
@options.option(
    "--photos",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Photos to compare on, or a directory of them [default: drawn pictures].",
)
@options.option("-t", "--threads", type=click.IntRange(1), help="[default: physical cores]")
@options.option("--json", "as_json", is_flag=True, help="The card as JSON.")
def command(
    bundle: Path, reference: Path, photos: tuple[Path, ...], threads: int | None, as_json: bool
) -> None:
    """Hold a model directory against its reference, and write the numbers into its card."""
    for package in ("gguf", "onnx", "torch", "transformers"):
        if find_spec(package) is None:
            raise click.ClickException(f"this needs {package}: pip install edgevlm[verify]")
    from edgevlm_export.verify import verify

    from edgevlm.device import thread_budget

    card = verify(bundle, reference, pictures=photos, threads=thread_budget(threads))
    if find_spec("optimum") is None:
        click.echo(
            "edgevlm: Optimum is not installed, so its export is not compared: "
            "pip install 'edgevlm[verify]'",
            err=True,
        )
    if as_json:
        click.echo(json.dumps(card, indent=2))
        return
    for name, value in card.items():
        click.echo(f"{name.replace('_', ' ') + ':':<28}{_shown(value)}")


def _shown(value: Any) -> str:
    if value is None:
        return "not comparable"
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
