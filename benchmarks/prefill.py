"""How much sooner does the prefill graph read a picture than llama.cpp does?

Random rows in place of a picture's embeddings, as many as --rows, go through the bundle's graph and
into llama.cpp's cache, and through llama.cpp itself; they take turns. Then the last row is decoded.
With --past the rows are those of the next question: so many were read before. Medians in ms, the
ratio, and how close the two logits are.

    python benchmarks/prefill.py BUNDLE [--rows N] [--past N] [--rounds N] [--threads N] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm import bundle as bundles
from edgevlm import device, llama, prefill, probe, sessions
from edgevlm.cancel import Cancel
from edgevlm.memory import BATCH_TOKENS


def milliseconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


def measure(directory: Path, n_rows: int, n_past: int, rounds: int, threads: int) -> dict[str, Any]:
    bundle = bundles.open_bundle(directory)
    cancel = Cancel()
    model = llama.Model(bundle.file("language.gguf"), extra_buffers=probe.verdict().extra_buffers)
    bidirectional = bundle.manifest["image"].get("bidirectional_tokens", 0)
    context = llama.Context(
        model, bundle.manifest["n_ctx"], threads=threads, flag=cancel.flag,
        n_batch=max(BATCH_TOKENS, bidirectional),
    )  # fmt: skip
    graph = prefill.find(bundle, "auto", threads, context.takes_cache)
    if graph is None:
        raise SystemExit(f"{directory} has no prefill graph: export it with --prefill int8")
    n_all = n_past + n_rows
    rows = np.random.default_rng(0).standard_normal((n_all, model.n_embd)).astype(np.float32)
    rows *= model.embed(list(range(100))).std()  # as large as a token's
    new = rows[n_past:]
    first_is_picture = bidirectional and not n_past
    read = context.decode_bidirectional if first_is_picture else context.decode
    times: dict[str, list[float]] = {"graph_ms": [], "llama_ms": [], "last_row_ms": []}
    n_prefix = n_rows if first_is_picture else 0

    def fill() -> None:
        graph.run(new, n_past, n_prefix, context, 0, cancel)

    if n_past:
        graph.run(rows[:n_past], 0, 0, context, 0, cancel)
    first_ms = milliseconds(fill)  # opens the graph where nothing was read before
    for _ in range(rounds):
        context.truncate(n_past)
        times["graph_ms"].append(milliseconds(fill))
        times["last_row_ms"].append(milliseconds(lambda: context.decode([1], n_all)))
        found = context.logits()
        context.truncate(n_past)
        times["llama_ms"].append(milliseconds(lambda: read(new, n_past)))
        context.decode([1], n_all)
        expected = context.logits()
    medians = {name: statistics.median(values) for name, values in times.items()}
    size = np.linalg.norm(found) * np.linalg.norm(expected)
    cancel.close()
    return {
        "bundle": str(directory),
        "cpu": device.cpu_name(),
        "threads": threads,
        "onnxruntime": sessions.version(),
        "llama-cpp-python": llama.version(),
        "rows": n_rows,
        "past": n_past,
        "rounds": rounds,
        "first_graph_ms": first_ms,
        **medians,
        "ratio": medians["llama_ms"] / medians["graph_ms"],
        "logits_cosine": float((found * expected).sum() / size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", type=int, default=730)
    parser.add_argument("--past", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=device.thread_budget())
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    result = measure(given.bundle, given.rows, given.past, given.rounds, given.threads)
    if given.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:18} {value:.3f}" if isinstance(value, float) else f"{name:18} {value}")


if __name__ == "__main__":
    main()
