"""How much memory does an answer take at most, next to what its files hold?

Each model describes a photo, then two more, in a process of its own; what counts is resident memory
at its peak, mapped files included, as the system tells it. Random weights at real shapes besides
nano; the larger ones are made at the first time, which takes minutes.

    python benchmarks/memory.py [MODEL ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from edgevlm_export import random_models

import edgevlm
from edgevlm import device, registry
from edgevlm.bench import photo

MODELS = ("nano", "smolvlm-256m", "moondream2", "moondream2 gguf", "llava-phi-3-mini")
_SIZE_PX = 1500, 2000
_TOKENS = 16  # of the answer


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", nargs="*", default=MODELS, help="name of a shape, or a bundle")
    parser.add_argument("--inner", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        print(json.dumps(measure(**json.loads(options.inner))))
        return
    print(f"{'MB':26}{'files':>10}{'1 photo':>10}{'of files':>10}{'3 photos':>10}{'plan':>10}")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "photo.jpg"
        noise = np.random.default_rng(0).integers(0, 256, (*_SIZE_PX, 3), np.uint8)
        photo.save_another(noise, file)
        for model in options.model:
            name, _, route = model.partition(" ")
            given = {"model": str(find(name)), "picture": str(file), "route": route or "auto"}
            command = [sys.executable, __file__, "--inner", json.dumps(given)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            files, one, three, plan = json.loads(said)
            print(
                f"{model:26}{files / 1e6:>10.0f}{one / 1e6:>10.0f}{one / files:>9.2f}×"
                f"{three / 1e6:>10.0f}{plan / 1e6:>10.0f}",
                flush=True,
            )


def find(name: str) -> Path:
    """The built-in model, a bundle, or a random one of this shape."""
    if name in random_models.NAMES:
        return random_models.cached(name)
    return registry.resolve(name)


def measure(model: str, picture: str, route: str) -> list[int]:
    """Bytes of the files, at the peak of one photo and of three, and of the plan."""
    peaks = []
    with edgevlm.load(model, cache=False, prefill=route) as vlm:
        for _ in range(3):
            vlm.describe(picture, max_tokens=_TOKENS, repetition_stop=False)
            peaks.append(device.peak_rss_bytes())
        sizes = {name: entry["bytes"] for name, entry in vlm.bundle.manifest["files"].items()}
        if route == "gguf":  # nothing opens the prefill graph
            sizes = {name: size for name, size in sizes.items() if not name.startswith("prefill.")}
        return [sum(sizes.values()), peaks[0], peaks[-1], vlm.plan.peak_bytes]


if __name__ == "__main__":
    main()
