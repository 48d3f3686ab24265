"""`edgevlm export SOURCE -o DIR`: a checkpoint becomes a model directory."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from click.core import ParameterSource

from edgevlm.cli import options

# Said here again so that `--help` needs neither gguf nor onnx; a test holds them equal.
LANGUAGES = ("f32", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")
VISIONS = ("fp32", "fp16", "int8")
EXPORTERS = ("optimum",)
_CHECKPOINT_ONLY = ("family", "llm", "tokenizer", "exporter", "lora", "imatrix")
PREFILLS = ("none", "int8", "fp32")
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("export")
@click.argument("source")
@options.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Directory to make."
)
@options.option(
    "--mmproj",
    type=_FILE,
    help="SOURCE is llama.cpp's MODEL.gguf, which is kept as it is, and this its mmproj file.",
)
@options.option("--family", help="Do not detect the family, take this one.")
@options.option(
    "--llm",
    type=click.Choice(LANGUAGES, case_sensitive=False),
    default="q4_k_m",
    show_default=True,
    help="Format of the language model.",
)
@options.option(
    "--vision",
    type=click.Choice(VISIONS),
    default="int8",
    show_default=True,
    help="Format of the vision model; int8 keeps in float what it would harm.",
)
@click.option(
    "--prefill",
    type=click.Choice(PREFILLS),
    default="int8",
    envvar="EDGEVLM_EXPORT_PREFILL",  # EDGEVLM_PREFILL says how a model is run
    show_envvar=True,
    show_default=True,
    help="A copy of the language model that reads pictures faster; int8 is as large as q8_0.",
)
@options.option(
    "--release", help="Of a family whose checkpoints do not say which release they are."
)
@options.option(
    "--exporter",
    type=click.Choice(EXPORTERS),
    help="What writes a vision tower that edgevlm does not write itself; needs edgevlm[verify].",
)
@options.option("--tokenizer", type=_FILE, help="A tokenizer.json instead of the checkpoint's own.")
@options.option(
    "--lora",
    multiple=True,
    metavar="DIR|NAME=DIR",
    callback=lambda _, __, given: _loras(given),
    help="A PEFT adapter to merge into the weights, or to keep apart under a name: --adapter NAME "
    "switches it on at run time. May be repeated.",
)
@options.option("--prompt", help="The language model's template, where the checkpoint names none.")
@options.option("--fit", help="crop, pad or stretch, instead of what the checkpoint says.")
@options.option("--imatrix", type=_FILE, help="Importance matrix of llama-imatrix (GGUF).")
@options.option(
    "--photos",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Photos to measure int8 on, or a directory of them; may be repeated.",
)
@options.option("-t", "--threads", type=click.IntRange(1), help="[default: physical cores]")
@options.option("-q", "--quiet", is_flag=True, help="No progress bars.")
@click.pass_context
def command(context: click.Context, /, source: str, out: Path, **arguments: Any) -> None:
    """Make a model directory.

    SOURCE is a checkpoint's directory (safetensors and its JSON files), org/model[@revision] on
    the hub, or a GGUF file that goes with --mmproj.
    """
    from edgevlm.cli.progress import Bars

    path = Path(source)
    _refuse(context, path, arguments)
    exporter = load_exporter()
    origin = None
    if not path.exists():
        path, origin = _fetched(source)
    both = ("vision", "prefill", "prompt", "fit", "release", "photos", "threads")
    given = {name: arguments[name] for name in both}
    with Bars(quiet=arguments["quiet"]) as bars:
        if arguments["mmproj"]:
            exporter.export_pair(path, arguments["mmproj"], out, **given, progress=bars)
        else:
            more = {name: arguments[name] for name in _CHECKPOINT_ONLY if name != "llm"}
            language = arguments["llm"]
            merged, adapters = more["lora"]
            more |= {"language": language, "origin": origin, "lora": merged, "adapters": adapters}
            exporter.export(path, out, **given, **more, progress=bars)
    if not arguments["quiet"]:
        click.echo(f"edgevlm: {out} is ready: edgevlm describe PHOTO -m {out}", err=True)


def _loras(given: tuple[str, ...]) -> tuple[Path | None, dict[str, Path]]:
    """The adapter to merge, and by name those to keep apart."""
    merged: list[Path] = []
    apart: dict[str, Path] = {}
    for text in given:
        name, equals, directory = text.partition("=")
        path = Path(directory if equals and not Path(text).is_dir() else text)
        if not path.is_dir():
            raise click.BadParameter(f"{path} is not a directory")
        if path == Path(text):
            merged.append(path)
        elif apart.setdefault(name, path) != path:
            raise click.BadParameter(f"two adapters are called {name}")
    if len(merged) > 1:
        raise click.BadParameter("one adapter can be merged; name the others: NAME=DIR")
    return (merged[0] if merged else None), apart


def _fetched(text: str) -> tuple[Path, dict[str, str]]:
    """The files of a hub id, and where they come from."""
    from edgevlm import fetch

    source = fetch.parse(text)
    if source is None:
        raise click.UsageError(f"{text} is neither there nor org/model[@revision]")
    listing = fetch.look_up(source)
    return fetch.fetch(listing), {"id": source.repository, "revision": listing.commit}


def _refuse(context: click.Context, source: Path, arguments: dict[str, Any]) -> None:
    """Options that do not go together."""
    if source.is_file() and not arguments["mmproj"]:
        raise click.UsageError("a GGUF file needs its --mmproj; a checkpoint is a directory")
    if arguments["mmproj"]:
        for name in _CHECKPOINT_ONLY:
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(
                    f"--{name} is for a checkpoint; a GGUF pair is kept as it is"
                )
    if arguments["exporter"] and find_spec("optimum") is None:
        raise click.ClickException("this needs optimum-onnx: pip install 'edgevlm[verify]'")
    if arguments["imatrix"] and arguments["llm"] in ("f32", "f16"):
        raise click.UsageError("--imatrix is for a quantized --llm")


def load_exporter() -> ModuleType:
    """The exporter; a ClickException says what to install where it cannot run."""
    for package in ("gguf", "onnx"):
        if find_spec(package) is None:
            raise click.ClickException(f"this needs {package}: pip install edgevlm[export]")
    import edgevlm_export

    return edgevlm_export
