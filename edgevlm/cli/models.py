"""`edgevlm models list|pull`"""

from __future__ import annotations

import click


@click.group("models")
def command() -> None:
    """List and fetch models."""


@command.command("list")
def list_models() -> None:
    """Models on this machine, and the built-in one."""
    from edgevlm import paths, registry

    found = registry.installed()
    for bundle in found:
        click.echo(
            f"{bundle.path.name:<20} {bundle.n_bytes / 1e6:>8.0f} MB  {bundle.manifest['licence']}"
        )
    if registry.BUILT_IN not in [bundle.path.name for bundle in found]:
        click.echo(f"{registry.BUILT_IN:<20} built in; fetched on first use")
    click.echo(f"edgevlm: models are kept in {paths.models()}", err=True)


@command.command("pull")
@click.argument("name")
def pull(name: str) -> None:
    """Fetch a model now instead of on first use."""
    from edgevlm import bundle, registry

    opened = bundle.open_bundle(registry.resolve(name))
    click.echo(f"edgevlm: {opened.name} is in {opened.path}", err=True)
