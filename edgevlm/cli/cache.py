"""`edgevlm cache info|clear`"""

from __future__ import annotations

import json

import click

from edgevlm.cli import options


@click.group("cache")
def command() -> None:
    """Image embeddings of photos that were seen before."""


@command.command("info")
@options.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def info(as_json: bool) -> None:
    """Where they are, how many, and what they take."""
    from edgevlm import cache

    entries, n_bytes = cache.Disk(cache.directory()).usage()
    if as_json:
        record = {"directory": str(cache.directory()), "entries": entries, "bytes": n_bytes}
        click.echo(json.dumps(record))
    else:
        click.echo(f"{entries} photos, {n_bytes / 1e6:.1f} MB in {cache.directory()}")


@command.command("clear")
def clear() -> None:
    """Remove them all."""
    from edgevlm import cache

    disk = cache.Disk(cache.directory())
    entries, n_bytes = disk.usage()
    try:
        disk.clear()
    except OSError as error:
        raise click.ClickException(f"{cache.directory()} cannot be cleared: {error}") from None
    click.echo(f"removed {entries} photos, {n_bytes / 1e6:.1f} MB", err=True)
