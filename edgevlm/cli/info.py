"""`edgevlm info [MODEL]`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edgevlm.cli import options
from edgevlm.errors import EdgeVLMError
from edgevlm.settings import Settings


@click.command("info")
@click.argument("model", required=False)
@options.option("--json", "as_json", is_flag=True, help="The manifest and the plan as JSON.")
@options.max_ram
def command(model: str | None, as_json: bool, max_ram: int | None) -> None:
    """What a model is, what it can and cannot do, and what it costs."""
    from edgevlm import families, plan, registry

    opened = registry.look_up(model)
    needed: dict[str, Any] | str
    try:
        planned = plan.make(opened, Settings(max_ram=max_ram))
        needed = planned.as_dict() if as_json else str(planned)
    except EdgeVLMError as error:  # what it is can be said even where it cannot run
        needed = {"problem": str(error)} if as_json else str(error)
    if as_json:
        record = {**opened.manifest, "path": str(opened.path), "plan": needed}
        click.echo(json.dumps(record, indent=2))
        return
    manifest, card = opened.manifest, opened.manifest["card"]
    click.echo(f"{opened.name}: {card.get('summary', '')}".rstrip(": "))
    for title, key in (("It can", "can"), ("It cannot", "cannot")):
        for line in card.get(key, []):
            click.echo(f"  {title}: {line}")
    seen = families.find(opened).layout(3000, 4000)
    facts = {
        "family": manifest["family"],
        "source": " ".join(str(value) for value in manifest["source"].values()),
        "licence": manifest["licence"],
        "sees": f"{seen.n_tiles} × {seen.tile_px}×{seen.tile_px} px, {seen.n_tokens} tokens",
        "context": f"{manifest['n_ctx']} tokens",
        "weights": ", ".join(f"{part} {kind}" for part, kind in manifest["quantization"].items()),
        **({"adapters": ", ".join(opened.adapters)} if opened.adapters else {}),
        "disk": f"{opened.n_bytes / 1e6:.0f} MB in {_short(opened.path)}",
        "memory": needed,
    }
    for name, value in facts.items():
        click.echo(f"{name + ':':<10}{value}")


def _short(path: Path) -> str:
    home = str(Path.home())
    return str(path).replace(home, "~", 1) if str(path).startswith(home) else str(path)
