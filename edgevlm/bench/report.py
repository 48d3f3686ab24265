"""The result of a measurement as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edgevlm.bench.run import COMPARED, STAGES, is_random

_TITLES = {
    "load": "load",
    "image_decode": "photo decode",
    "preprocess": "preprocess",
    "encode": "encode",
    "prefill": "prefill",
    "first_token": "first token",
    "decode": "a token",
    "total": "whole answer",
}
_BY = {
    "read_gb_s": "reading memory",
    "gemm_gflop_s": "float32 product",
    "its stages": "its stages",
}


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """What was measured and where, then a line a stage."""
    yield from _where(result)
    yield ""
    peer, ratios = result["peer"], result["ratios"]
    head = f"{'':<14}{'ms':>10}{'spread':>18}"
    yield head + (f"{'libmtmd ms':>13}{'ratio':>8}" if peer else "") + "  of the limit"
    for stage in STAGES:
        ms, spread = result["stages"][stage], result["spread"]["stages"].get(stage)
        between = "–".join(f"{ms:.{0 if ms >= 100 else 1}f}" for ms in spread or ())
        line = f"{_TITLES[stage]:<14}{ms:>10.1f}{between:>18}"
        if peer:
            theirs = f"{peer[stage]:.1f}" if stage in peer else ""
            ratio = f"{ratios[stage]:.2f}×" if stage in COMPARED and stage in ratios else ""
            line += f"{theirs:>13}{ratio:>8}"
        limit = result["limits"].get(stage)
        yield line + (f"  {limit['percent']:.0f} % ({_BY[limit['by']]})" if limit else "")
    yield ""
    yield from _what(result)


def _where(result: Mapping[str, Any]) -> Iterator[str]:
    machine, settings = result["machine"], result["settings"]
    model, photo = result["model"], settings["photo"]
    board = f"{machine['board']}: " if machine["board"] else ""
    label = ", random weights: the answers are noise" if is_random(result) else ""
    kinds = ", ".join(f"{part} {kind}" for part, kind in model["quantization"].items())
    yield f"{model['name']}{label}; {kinds}"
    yield (
        f"{board}{machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 1e9:.0f} GB; {settings['threads']} threads"
    )
    yield f"{' '.join(machine['features']) or machine['architecture']}"
    yield (
        f"limits measured here: memory {machine['read_gb_s']:.1f} GB/s, "
        f"numpy's float32 product {machine['gemm_gflop_s']:.0f} GFLOP/s"
    )
    yield f"before: {_state(machine['before'])}; after: {_state(machine['after'])}"
    height, width = photo["input_px"]
    yield (
        f"photo {photo['file']} {width}×{height} px, {photo['image_tokens']} image tokens of "
        f"{photo['prompt_tokens']}; answers of {settings['max_tokens']} tokens; median of "
        f"{settings['rounds']} rounds"
    )
    if settings["peer"]:
        peer = settings["peer"]
        yield (
            f"peer: {peer['name']}, {peer['mmproj']}, {peer['image_tokens']} image tokens of "
            f"{peer['prompt_tokens']}, flash attention {peer['flash_attention']}, same language "
            "file and threads"
        )


def _what(result: Mapping[str, Any]) -> Iterator[str]:
    memory = result["memory"]
    speed = f"{result['tokens_per_s']:.1f} tokens/s; " if result["tokens_per_s"] else ""
    yield (
        f"{speed}prefill {result['prefill_tokens_per_s']:.0f} tokens/s; "
        f"{result['model']['size_bytes'] / 1e6:.0f} MB on disk, "
        f"peak {memory['peak_rss_bytes'] / 1e6:.0f} MB of memory"
        + (f", libmtmd {memory['peer_peak_rss_bytes'] / 1e6:.0f} MB" if result["peer"] else "")
    )


def _state(state: Mapping[str, Any]) -> str:
    said = [f"load {state['load']}"]
    if "hottest_c" in state:
        said.append(f"{state['hottest_c']:.0f} °C")
    if "frequency_mhz" in state:
        said.append(f"{state['frequency_mhz']} MHz of {state.get('frequency_max_mhz', '?')}")
    if state.get("throttle_events"):
        said.append(f"throttled {state['throttle_events']} times since boot")
    for key in ("throttled", "power_mode"):
        if key in state:
            said.append(f"{key.replace('_', ' ')}: {state[key]}")
    return ", ".join(said)
