"""What the benchmarks share: taking turns, the machine, and a result that check.py and render.py
read.

A result is {"question", "command", "peer", "machine", "versions", "settings", "medians_ms",
"ratios", …}: `medians_ms` is case → who → milliseconds, `ratios` is case → who → how many times as
fast as the peer.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from edgevlm import device
from edgevlm.bench import machine

Work = Callable[[], Any]
Times = Mapping[str, Mapping[str, float]]  # case → who → milliseconds

_PACKAGES = ("numpy", "pillow", "onnxruntime", "llama-cpp-python", "torch", "transformers")


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    assert doc is not None
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--threads", type=int, default=device.thread_budget())
    made.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    return made


def medians_ms(work: Mapping[str, Work], rounds: int) -> dict[str, float]:
    """All take turns, so that whatever else the machine does meets all of them alike."""
    times_ms: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, call in work.items():
            begin_s = time.perf_counter()
            call()
            if turn > 0:  # the first turn warms up
                times_ms[name].append(1e3 * (time.perf_counter() - begin_s))
    return {name: statistics.median(times) for name, times in times_ms.items()}


def result(
    question: str, peer: str, times: Times, options: argparse.Namespace, **more: Any
) -> dict[str, Any]:
    """The result of a benchmark; a case without the peer has no ratios."""
    return {
        "question": question,
        "command": " ".join(["python", *_shown(sys.argv)]),
        "peer": peer,
        "machine": machine.describe() | machine.measure(options.threads),
        "versions": _versions(),
        "settings": {"threads": options.threads, "rounds": options.rounds},
        "medians_ms": {
            case: {who: round(ms, 2) for who, ms in row.items()} for case, row in times.items()
        },
        "ratios": {
            case: {who: round(row[peer] / ms, 3) for who, ms in row.items()}
            for case, row in times.items()
            if peer in row
        },
        **more,
    }


def publish(found: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Print a table; write the file that was asked for."""
    cpu, threads = found["machine"]["cpu"], found["settings"]["threads"]
    print(f"{found['question']}\n{cpu}, {threads} threads; times as fast as {found['peer']}")
    for case, row in found["medians_ms"].items():
        print(f"\n{case}")
        for who, ms in row.items():
            ratio = found["ratios"].get(case, {}).get(who)
            print(f"  {who:<36}{ms:>12.1f} ms" + (f"{ratio:>9.2f}×" if ratio else ""))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def _shown(arguments: list[str]) -> list[str]:
    """The command line as a reader would type it: from the repository, without its --json."""
    script, *rest = arguments
    kept = [a for n, a in enumerate(rest) if a != "--json" and rest[n - 1 : n] != ["--json"]]
    return [f"benchmarks/{Path(script).name}", *kept]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
