"""`edgevlm info [MODEL]`"""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgevlm.cli import options


@click.command("info")
@click.argument("model", required=False)
@options.option("--json", "as_json", is_flag=True, help="The whole manifest as JSON.")
def command(model: str | None, as_json: bool) -> None:
    """What a model is, what it can and cannot do, and what it costs."""
    from edgevlm import memory, registry

    opened = registry.look_up(model)
    if as_json:
        click.echo(json.dumps({**opened.manifest, "path": str(opened.path)}, indent=2))
        return
    manifest, card = opened.manifest, opened.manifest["card"]
    click.echo(f"{opened.name}: {card.get('summary', '')}".rstrip(": "))
    for title, key in (("It can", "can"), ("It cannot", "cannot")):
        for line in card.get(key, []):
            click.echo(f"  {title}: {line}")
    image = manifest["image"]
    facts = {
        "family": manifest["family"],
        "source": " ".join(str(value) for value in manifest["source"].values()),
        "licence": manifest["licence"],
        "sees": f"{image['size_px']}×{image['size_px']} px, {image['n_tokens']} tokens a picture",
        "context": f"{manifest['n_ctx']} tokens",
        "weights": ", ".join(f"{part} {kind}" for part, kind in manifest["quantization"].items()),
        **({"adapters": ", ".join(opened.adapters)} if opened.adapters else {}),
        "disk": f"{opened.n_bytes / 1e6:.0f} MB in {_short(opened.path)}",
        "memory": f"about {memory.needed_bytes(opened) / 1e6:.0f} MB",
    }
    for name, value in facts.items():
        click.echo(f"{name + ':':<10}{value}")


def _short(path: Path) -> str:
    home = str(Path.home())
    return str(path).replace(home, "~", 1) if str(path).startswith(home) else str(path)
