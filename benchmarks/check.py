"""Did anything get slower? Ratios of new results against a committed baseline.

Only ratios are compared, ours against a peer or against the machine's own limit measured in the
same run, so the baseline of one machine serves on another of its class.

    edgevlm bench --random smolvlm-256m --json now.json && python benchmarks/check.py now.json
    python benchmarks/check.py RESULT.json ... [--tolerance 0.2] [--baseline FILE] [--update]

A RESULT is what `edgevlm bench --json` or a script in benchmarks/ writes. `--update` writes the
baseline from the results instead. Exit code 1 names what got worse.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BASELINE = Path(__file__).parent / "baseline.json"
# Two runs of the same code differ by up to a fifth on a machine that is shared.
TOLERANCE = 0.2

Ratios = dict[str, float]  # "result/case/who" → times as fast as its reference


def ratios(found: Mapping[str, Any], name: str) -> Ratios:
    """Everything in a result that can be compared, by a name that lasts.

    `name` is the result's; a measurement by `edgevlm bench` is named after its model.
    """
    if "stages" in found:
        name = f"bench {found['model']['name']}"
        against = {f"{name}/vs peer/{stage}": r for stage, r in (found["ratios"] or {}).items()}
        limits = {
            f"{name}/of the limit/{stage}": limit["percent"] / 100
            for stage, limit in found["limits"].items()
            if stage != "load"  # from a disk or from the page cache: not ours
        }
        return against | limits
    return dict(_flat(name, found["ratios"], found["peer"]))


def _flat(name: str, tree: Mapping[str, Any], peer: str) -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{name}/{key}", value, peer)
        elif key != peer and key.startswith("edgevlm"):  # other peers' speed is theirs
            yield f"{name}/{key}", float(value)


def worse(baseline: Ratios, now: Ratios, tolerance: float) -> list[str]:
    """A line for each ratio that fell by more than `tolerance`, the worst first."""
    fallen = {
        name: now[name] / before
        for name, before in baseline.items()
        if name in now and now[name] < before * (1 - tolerance)
    }
    return [
        f"{name}: {baseline[name]:.3g} → {now[name]:.3g}, {100 * (1 - part):.0f} % worse"
        for name, part in sorted(fallen.items(), key=lambda item: item[1])
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    parser.add_argument("--update", action="store_true", help="write the baseline")
    options = parser.parse_args(arguments)
    now: Ratios = {}
    for path in options.results:
        now |= ratios(json.loads(path.read_text("utf-8")), path.stem)
    if options.update:
        options.baseline.write_text(json.dumps(now, indent=2, ensure_ascii=False) + "\n")
        return 0
    baseline: Ratios = json.loads(options.baseline.read_text("utf-8"))
    compared = baseline.keys() & now.keys()
    if not compared:
        print(f"nothing to compare: {options.baseline} knows none of {', '.join(now)}")
        return 1
    lines = worse(baseline, now, options.tolerance)
    print("\n".join(lines or [f"{len(compared)} ratios, none worse than the baseline allows"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
