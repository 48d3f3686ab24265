"""Options that several verbs share. Every option can also be set as EDGEVLM_…"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgevlm.settings import (
    DEFAULT_CACHE_BYTES,
    DEFAULT_MAX_PIXELS,
    DETAILS,
    DEVICES,
    PREFILLS,
    Settings,
)

if TYPE_CHECKING:
    from edgevlm.engine import VLM

C = TypeVar("C", bound=Callable[..., Any])
_FLAGS = re.ASCII | re.IGNORECASE


def option(*names: str, **attributes: Any) -> Callable[[C], C]:
    """click.option with an environment variable named after the long flag."""
    flag = next(name for name in names if name.startswith("--")).split("/")[0]
    variable = "EDGEVLM_" + flag.removeprefix("--").replace("-", "_").upper()
    return click.option(*names, envvar=variable, show_envvar=True, **attributes)


def every(*decorators: Callable[[C], C]) -> Callable[[C], C]:
    def decorate(command: C) -> C:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def size(text: str) -> int:
    """Bytes of "1.5GB", "800M", "2GiB" or a plain number; k to T are powers of 1000, Ki to Ti of
    1024."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(?:([kmgt])(i?))?b?", text.strip(), _FLAGS)
    if match is None:
        raise click.BadParameter(f"{text!r} is no size: write for example 1.5GB, 800MB or 2GiB")
    power = "kmgt".index(match[2].lower()) + 1 if match[2] else 0
    n_bytes = float(match[1]) * (1024 if match[3] else 1000) ** power
    if not 1 <= n_bytes < 2**63:
        raise click.BadParameter(f"{text!r} is no size that memory can have")
    return int(n_bytes)


max_ram = option(
    "--max-ram",
    metavar="SIZE",
    callback=lambda _, __, given: None if given is None else size(given),
    help="Memory the model may take, for example 1.5GB [default: what is available].",
)

model = every(
    option("-m", "--model", metavar="MODEL", help="Model name or bundle directory."),
    option("--adapter", metavar="NAME", help="LoRA adapter of the model to answer with."),
    option(
        "--device",
        type=click.Choice(DEVICES),
        default="auto",
        show_default=True,
        help="cuda: an NVIDIA GPU or an error; auto: whatever of it is there.",
    ),
    option("-t", "--threads", type=click.IntRange(1), help="Threads [default: physical cores]."),
    option(
        "--max-pixels",
        type=click.IntRange(1),
        default=DEFAULT_MAX_PIXELS,
        show_default=True,
        help="Refuse larger pictures before decoding them.",
    ),
    option(
        "--exact-decode",
        is_flag=True,
        help="Decode large JPEGs at full size even if the model sees them much smaller.",
    ),
    option(
        "--cache/--no-cache",
        default=True,
        show_default=True,
        help="Keep image embeddings; the same photo is not encoded again.",
    ),
    option(
        "--cache-bytes",
        type=click.IntRange(0),
        default=DEFAULT_CACHE_BYTES,
        show_default=True,
        help="What they may take on disk.",
    ),
    option(
        "--detail",
        type=click.Choice(DETAILS),
        default="auto",
        show_default=True,
        help="How closely to look, if the model can choose: low is fast, high is slow.",
    ),
    max_ram,
    option(
        "--prefill",
        type=click.Choice(PREFILLS),
        default="auto",
        show_default=True,
        help="What reads picture and prompt: the model's int8 graph, or llama.cpp (gguf).",
    ),
    option(
        "--visual-tokens",
        type=click.IntRange(1),
        help="Fewer image tokens, where the model can: a sooner first word, a coarser answer.",
    ),
    option("-q", "--quiet", is_flag=True, help="No hints on stderr."),
    option("-v", "--verbose", is_flag=True, help="Show what the libraries log."),
)

sampling = every(
    option(
        "-n",
        "--max-tokens",
        "--max-new-tokens",
        "max_tokens",
        type=click.IntRange(1),
        help="At most so many tokens [default: the model's].",
    ),
    option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
    option(
        "--top-p", type=float, default=1.0, show_default=True, help="Nucleus sampling; 1 is off."
    ),
    option("--top-k", type=int, default=0, show_default=True, help="0 is off."),
    option("--seed", type=int, default=0, show_default=True, help="Of the sampler."),
    option("--repeat-penalty", type=float, help="1 is off [default: the model's]."),
    option("--stop", multiple=True, metavar="TEXT", help="End the answer here; may be repeated."),
    option(
        "--budget",
        "budget_s",
        type=click.FloatRange(0, min_open=True),
        metavar="SECONDS",
        help="Answer within this time; `edgevlm doctor --calibrate` lets it choose well.",
    ),
    option("--no-repetition-stop", is_flag=True, help="Let an answer that loops go on."),
    option(
        "--schema",
        metavar="FILE|JSON",
        help="JSON schema that the answer must satisfy; fails rather than break it.",
    ),
)

output = every(
    option("--json", "as_json", is_flag=True, help="One JSON object a photo."),
    option("--no-stream", is_flag=True, help="Print the answer when it is complete."),
    option("--timings", is_flag=True, help="Print the time of each stage on stderr."),
)


def open_model(arguments: Mapping[str, Any]) -> VLM:
    """Load the model that the command line asks for, with one hint if nobody chose it."""
    from edgevlm import engine, registry

    warnings.filterwarnings("ignore", module="PIL")  # odd metadata; the pixels are checked
    if arguments["verbose"]:
        logging.basicConfig(level=logging.DEBUG, format="%(name)s: %(message)s")
    chosen = arguments["model"] or registry.default()
    if not arguments["model"] and chosen == registry.BUILT_IN and not arguments["quiet"]:
        click.echo(
            "edgevlm: answering with nano, the small built-in model; -m chooses another "
            "(see `edgevlm info nano` for what it can do)",
            err=True,
        )
    names = {field.name for field in fields(Settings)}
    vlm = engine.load(chosen, **{k: v for k, v in arguments.items() if k in names})
    if vlm.placement.note and not arguments["quiet"]:
        click.echo(f"edgevlm: {vlm.placement.note}", err=True)
    if vlm.plan.gives_up and not arguments["quiet"]:
        click.echo(f"edgevlm: to fit into memory, {vlm.plan.gives_up}", err=True)
    if arguments.get("budget_s") and not arguments["quiet"]:
        from edgevlm import calibration

        if calibration.known(vlm.bundle, vlm.threads) is None:
            click.echo(
                "edgevlm: what fits into the budget is not known yet: `edgevlm doctor --calibrate` "
                "measures it, until then answers are cut off",
                err=True,
            )
    return vlm


def sampling_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `Options` that the command line sets."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "repeat_penalty", "stop")
    return {
        **{name: arguments[name] for name in (*names, "budget_s")},
        "repetition_stop": not arguments["no_repetition_stop"],
        "schema": _read_schema(arguments["schema"]),
    }


def _read_schema(given: str | None) -> Any:
    if given is None:
        return None
    try:
        text = given if given.lstrip().startswith("{") else Path(given).read_text("utf-8")
        return json.loads(text)
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"neither a JSON object nor a file of one: {error}") from None
