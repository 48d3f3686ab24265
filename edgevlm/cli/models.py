"""`edgevlm models list|pull|info|verify|remove`"""

from __future__ import annotations

from pathlib import Path

import click

from edgevlm.cli import options
from edgevlm.cli.export import LANGUAGES, VISIONS, load_exporter

_LLM = "q4_k_m"


@click.group("models")
def command() -> None:
    """List, fetch, check and remove models."""


@command.command("list")
def list_models() -> None:
    """Models on this machine, the built-in one, and those that `pull` knows by name."""
    from edgevlm import paths, pull, registry

    found = registry.installed()
    names = [bundle.path.name for bundle in found]
    for bundle in found:
        click.echo(
            f"{bundle.path.name:<20} {bundle.n_bytes / 1e6:>8.0f} MB  {bundle.manifest['licence']}"
        )
    if registry.BUILT_IN not in names:
        click.echo(f"{registry.BUILT_IN:<20} built in; fetched on first use")
    for known in pull.catalogue():
        if known.name not in names:
            size = f"{known.n_bytes / 1e9:.1f} GB to pull"
            click.echo(f"{known.name:<20} {size:<16} {known.licence}; {known.summary}")
    click.echo(f"edgevlm: models are kept in {paths.models()}", err=True)


@command.command("pull")
@click.argument("name")
@options.option(
    "--llm",
    type=click.Choice(LANGUAGES[1:], case_sensitive=False),
    default=_LLM,
    show_default=True,
    help="Format of the language model.",
)
@options.option(
    "--vision",
    type=click.Choice(VISIONS),
    default="int8",
    show_default=True,
    help="Format of the vision model.",
)
@options.option(
    "--tokenizer",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A tokenizer.json instead of the checkpoint's own.",
)
@options.option("--prompt", help="The language model's template, where the checkpoint names none.")
@options.option("-q", "--quiet", is_flag=True, help="No plan and no progress bars.")
def pull_model(
    name: str, llm: str, vision: str, tokenizer: Path | None, prompt: str | None, quiet: bool
) -> None:
    """Fetch a model and make it ready: a name of `models list`, or org/model[@revision]."""
    from edgevlm import bundle, pull, registry
    from edgevlm.cli.progress import Bars

    def announce(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    def export(
        checkpoint: Path, out: Path, origin: dict[str, str], other_tokenizer: Path | None
    ) -> None:
        with Bars(quiet=quiet) as bars:
            exporter.export(
                checkpoint,
                out,
                language=llm,
                vision=vision,
                prefill="int8",
                tokenizer=tokenizer or other_tokenizer,
                prompt=prompt,
                progress=bars,
                origin=origin,
            )

    if name == registry.BUILT_IN:
        path = registry.resolve(name)
    else:
        exporter = load_exporter()
        path = pull.pull(name, language=llm, export=export, announce=announce)
    opened = bundle.open_bundle(path)
    announce(f"edgevlm: {opened.name} is in {opened.path}")


@command.command("info")
@click.argument("name")
@click.pass_context
def info(context: click.Context, /, name: str) -> None:
    """What a model is: of one that is not here yet, what the catalogue says."""
    from edgevlm import pull, registry
    from edgevlm.cli.info import command as installed

    known = {model.name: model for model in pull.catalogue()}
    if name not in known or name in [bundle.path.name for bundle in registry.installed()]:
        context.invoke(installed, model=name, as_json=False, max_ram=None)
        return
    model = known[name]
    click.echo(f"{name}: {model.summary}")
    for key, value in {
        "source": str(model.source),
        "licence": model.licence,
        "size": f"{model.parameters / 1e9:.2f} billion parameters, {model.n_bytes / 1e9:.1f} GB",
        "memory": f"about {model.memory_bytes(_LLM) / 1e9:.1f} GB to run, as {_LLM}",
        "here": f"no: edgevlm models pull {name}",
    }.items():
        click.echo(f"{key + ':':<10}{value}")


@command.command("verify")
@click.argument("name")
def verify(name: str) -> None:
    """Read every file of an installed model and compare its SHA-256."""
    from edgevlm import bundle, registry
    from edgevlm.errors import BundleError

    opened = bundle.open_bundle(registry.resolve(name))
    for file, entry in opened.manifest["files"].items():
        if bundle.file_sha256(opened.file(file)) != entry["sha256"]:
            raise BundleError(f"{opened.file(file)} is damaged: remove and pull {name} again")
    click.echo(f"edgevlm: {name} is whole", err=True)


@command.command("remove")
@click.argument("name")
def remove(name: str) -> None:
    """Delete an installed model."""
    from edgevlm import pull

    click.echo(f"edgevlm: removed {pull.remove(name)}", err=True)
