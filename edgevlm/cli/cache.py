"""`edgevlm cache info|clear`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edgevlm.cli import options


@click.group("cache")
def command() -> None:
    """What is kept: embeddings of photos that were seen before, and optimized vision graphs."""


@command.command("info")
@options.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def info(as_json: bool) -> None:
    """Where they are, how many, and what they take."""
    from edgevlm import cache, graph_cache

    photos = _record(cache.directory(), *cache.Disk(cache.directory()).usage())
    graphs = _record(graph_cache.root(), *graph_cache.usage())
    if as_json:
        click.echo(json.dumps({**photos, "graphs": graphs}))
        return
    for what, kept in (("photo", photos), ("graph", graphs)):
        n = _counted(kept["entries"], what)
        click.echo(f"{n}, {kept['bytes'] / 1e6:.1f} MB in {kept['directory']}")


@command.command("clear")
def clear() -> None:
    """Remove them all."""
    from edgevlm import cache, graph_cache, paths

    disk = cache.Disk(cache.directory())
    (photos, photo_bytes), (graphs, graph_bytes) = disk.usage(), graph_cache.usage()
    try:
        disk.clear()
        graph_cache.clear()
    except OSError as error:
        raise click.ClickException(f"{paths.home()} cannot be cleared: {error}") from None
    removed = f"{_counted(photos, 'photo')} and {_counted(graphs, 'graph')}"
    click.echo(f"removed {removed}, {(photo_bytes + graph_bytes) / 1e6:.1f} MB", err=True)


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _record(directory: Path, entries: int, n_bytes: int) -> dict[str, Any]:
    return {"directory": str(directory), "entries": entries, "bytes": n_bytes}
