"""`edgevlm doctor`"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from typing import Any

import click

from edgevlm.cli import options
from edgevlm.errors import EdgeVLMError
from edgevlm.settings import Settings


@click.command("doctor")
@options.option("--json", "as_json", is_flag=True, help="The same as JSON.")
@options.option(
    "--calibrate", is_flag=True, help="Measure a model, for --budget; takes about a minute."
)
@options.model
def command(as_json: bool, calibrate: bool, **arguments: Any) -> None:
    """What this machine has, how the libraries were built, and what each model would cost."""
    if calibrate:
        _calibrate(arguments, as_json=as_json)
        return
    report = {"machine": _machine(), "kernels": _kernels(), "onnxruntime": _onnxruntime()}
    report |= {"llama.cpp": _llama(), "cuda": _cuda(), "models": _models()}
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    for section, facts in report.items():
        click.echo(section)
        for name, value in facts.items():
            click.echo(f"  {name + ':':<14} {value}")


def _calibrate(arguments: dict[str, Any], *, as_json: bool) -> None:
    from edgevlm import calibration
    from edgevlm.cli.progress import Bars

    with options.open_model(arguments) as vlm:
        with Bars(quiet=arguments["quiet"]) as bars:
            costs = asdict(calibration.measure(vlm, bars))
        if as_json:
            click.echo(json.dumps({"model": vlm.bundle.name, **costs}))
            return
        click.echo(
            f"{vlm.bundle.name}: {costs['tile_ms']:.1f} ms a tile, {costs['prefill_ms']:.2f} ms a "
            f"token read, {costs['token_ms']:.1f} ms a token said"
        )


def _machine() -> dict[str, Any]:
    from edgevlm import device

    total, available = device.total_memory_bytes(), device.available_memory_bytes()
    return {
        "cpu": f"{device.cpu_name()} ({platform.machine()})",
        "cores": f"{device.physical_cores()} physical, {len(device.usable_cpus())} usable CPUs; "
        f"edgevlm uses {device.thread_budget()} threads",
        "memory": f"{total / 1e9:.1f} GB, {available / 1e9:.1f} GB available",
        "python": platform.python_version(),
    }


def _kernels() -> dict[str, Any]:
    from edgevlm import kernels

    try:
        return {"tier": kernels.tier(), "available": ", ".join(kernels.tiers())}
    except EdgeVLMError as error:
        return {"problem": str(error)}


def _onnxruntime() -> dict[str, Any]:
    from edgevlm import kernels, sessions

    own = "ONNX Runtime's own" if kernels.operators() is None else "edgevlm's, fused"
    return {
        "version": sessions.version(),
        "providers": ", ".join(sessions.providers()),
        "int8_layers": own,
    }


def _llama() -> dict[str, Any]:
    from edgevlm import probe

    try:
        verdict = probe.verdict()  # first, in a child: the library may die of being loaded
    except EdgeVLMError as error:
        return {"problem": str(error)}
    from edgevlm import llama

    return {
        "version": llama.version(),
        "library": str(llama.library_path()),
        "features": llama.build_features(),
        "repacking": "on" if verdict.extra_buffers else f"switched off: {verdict.finding}",
    }


def _cuda() -> dict[str, Any]:
    from edgevlm import placement

    try:
        found = placement.find()
    except (EdgeVLMError, OSError) as error:  # a library that is not there or does not load
        return {"problem": str(error)}
    return {
        "gpu": "an NVIDIA GPU" if found.gpu else "none that the system shows",
        "image encoder": found.onnxruntime.problem or "runs there, if vision.onnx is not int8",
        "language model": found.llama.problem or "runs there",
    }


def _models() -> dict[str, Any]:
    from edgevlm import plan, registry

    costs = {}
    for bundle in registry.known():
        try:
            memory = f"memory {plan.make(bundle, Settings())}"
        except EdgeVLMError as error:
            memory = str(error)
        costs[bundle.path.name] = f"{bundle.n_bytes / 1e6:.0f} MB on disk; {memory}"
    return costs
