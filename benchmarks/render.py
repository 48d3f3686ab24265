"""The kept results → docs/benchmarks.md.

python benchmarks/render.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "benchmarks.md"
_INTRODUCTION = """\
# Benchmarks

Rendered by `python benchmarks/render.py` from `benchmarks/results/*.json`;
`python benchmarks/all.py` measures everything again and renders. What stands in a table took turns
in one run on one machine, named below it. Numbers are medians; ratios say how many times as fast
as the peer. Weights are random at real shapes unless a model is named: speed does not depend on
their values. Yours:

    edgevlm bench --random moondream2 --json mine.json --plot mine.png

`--vs mtmd` adds llama.cpp's own multimodal path (`./install.sh bench` builds it). The JSON has
`stages` and `peer` in milliseconds (`encode`, `prefill`, `first_token`, `decode` for one token,
`total` for the whole answer), `ratios` (peer ÷ ours), `spread`, `limits` (what this machine could
do at best), `machine`, `settings` and `versions`. The limit of a stage that multiplies is numpy's
float32 product, of one that reads the memory's bandwidth, both measured in the same run; int8
kernels can pass the first. `benchmarks/check.py` compares such results with a baseline.
"""


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown of results by name; those in another form than common.py's are left out."""
    parts = [_INTRODUCTION]
    parts += ["\n".join(_section(results[name])) for name in sorted(results)]
    return "\n".join(parts)


def _section(found: Mapping[str, Any]) -> Iterator[str]:
    machine, peer = found["machine"], found["peer"]
    yield f"## {found['question']}\n"
    runs = found.get("runs", {})
    for name, run in runs.items():
        yield from _run(name, run)
    if not runs:
        yield from _table(found["medians_ms"], found["ratios"], peer)
    if "peak_bytes" in found:
        for name, row in found["peak_bytes"].items():
            said = ", ".join(f"{who} {n_bytes / 1e6:.0f} MB" for who, n_bytes in row.items())
            yield f"Peak memory, {name}: {said}.\n"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield (
        f"`{found['command']}`: {machine['cpu']} ({', '.join(machine['features'][-4:])}), "
        f"{found['settings']['threads']} threads, {machine['memory_bytes'] / 1e9:.0f} GB; memory "
        f"{machine['read_gb_s']:.1f} GB/s, float32 product {machine['gemm_gflop_s']:.0f} GFLOP/s; "
        f"medians of {found['settings']['rounds']}; {versions}.\n"
    )


def _table(times: Mapping[str, Any], ratios: Mapping[str, Any], peer: str) -> Iterator[str]:
    """A column for everybody, a row for each case; ours are bold where they are fastest."""
    everybody = list(dict.fromkeys(who for row in times.values() for who in row))
    yield "| | " + " | ".join(everybody) + " |"
    yield "|---" * (len(everybody) + 1) + "|"
    for case, row in times.items():
        cells = []
        for who in everybody:
            ratio = ratios.get(case, {}).get(who)
            cell = _ms(row[who]) if who in row else "–"
            cell += f" ({ratio:.2f}×)" if ratio and who != peer else ""
            cells.append(f"**{cell}**" if who in row and row[who] == min(row.values()) else cell)
        yield f"| {case} | " + " | ".join(cells) + " |"
    yield ""


def _run(name: str, run: Mapping[str, Any]) -> Iterator[str]:
    """What `edgevlm bench --vs mtmd` found."""
    settings, memory = run["settings"], run["memory"]
    photo = settings["photo"]
    yield f"| {name} | edgevlm | libmtmd | ratio | of the machine's limit |"
    yield "|---|---|---|---|---|"
    for stage, ratio in run["ratios"].items():
        limit = run["limits"].get(stage)
        share = f"{limit['percent']:.0f} %" if limit else ""
        ours, theirs = run["stages"][stage], run["peer"][stage]
        title = {"decode": "a token", "total": "whole answer"}.get(stage, stage.replace("_", " "))
        yield f"| {title} | {_ms(ours)} | {_ms(theirs)} | **{ratio:.2f}×** | {share} |"
    yield (
        f"\n{run['model']['name']}: random weights, "
        f"{', '.join(f'{part} {kind}' for part, kind in run['model']['quantization'].items())}; a "
        f"photo of {photo['input_px'][1]}×{photo['input_px'][0]} px, {photo['image_tokens']} image "
        f"tokens (libmtmd {settings['peer']['image_tokens']}), answers of {settings['max_tokens']} "
        f"tokens; peak memory {memory['peak_rss_bytes'] / 1e6:.0f} MB (libmtmd "
        f"{memory['peer_peak_rss_bytes'] / 1e6:.0f} MB).\n"
    )


def _ms(ms: float) -> str:
    return f"{ms / 1000:.2f} s" if ms >= 1000 else f"{ms:.3g} ms"


def read(directory: Path) -> dict[str, Any]:
    """Results by name; only those that say which question they answer."""
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in directory.glob("*.json")}
    return {name: result for name, result in found.items() if "question" in result}


if __name__ == "__main__":
    PAGE.write_text(page(read(RESULTS)), "utf-8")
