"""How long does an export of a real size take, and how much memory?

Random checkpoints, drawn one tensor at a time, become bundles: int8 vision, q4_k_m language. The
reference draws the same tensors and writes them as f16, which is the least that any converter does.

    python benchmarks/export.py [MODEL ...] [--json FILE]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np
from edgevlm_export import random_models
from edgevlm_export.random_shapes import SHAPES

from edgevlm import device

MODELS = ("moondream2", "llava-phi-3-mini")
PEER = "tensors drawn and written as f16"


def export(name: str, out: Path) -> None:
    random_models.write(name, out / name)


def write(name: str, out: Path) -> None:
    checkpoint = random_models.RandomCheckpoint(SHAPES[name], out, seed=0)
    with (out / "tensors.f16").open("wb") as file:
        for tensor in checkpoint.names:
            file.write(checkpoint.get(tensor).astype(np.float16).data)


WORK = {"edgevlm export": export, PEER: write}


def measure(who: str, name: str) -> tuple[float, int]:
    """Milliseconds and peak bytes, in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [sys.executable, __file__, "--child", who, name, scratch],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    return found["ms"], found["peak_bytes"]


def child(who: str, name: str, out: str) -> None:
    begin_s = time.perf_counter()
    WORK[who](name, Path(out))
    ms = 1e3 * (time.perf_counter() - begin_s)
    print(json.dumps({"ms": ms, "peak_bytes": device.peak_rss_bytes()}))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    parser = common.parser(__doc__, rounds=1)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=MODELS)
    options = parser.parse_args()
    times: dict[str, dict[str, float]] = {}
    peaks: dict[str, dict[str, int]] = {}
    for name in options.models:
        times[name], peaks[name] = {}, {}
        for who in WORK:
            times[name][who], peaks[name][who] = measure(who, name)
    question = str(__doc__).splitlines()[0]
    found = common.result(question, PEER, times, options, peak_bytes=peaks)
    common.publish(found, options)
    for name, row in peaks.items():
        said = ", ".join(f"{who} {n_bytes / 1e6:.0f} MB" for who, n_bytes in row.items())
        print(f"{name}: peak memory {said}")


if __name__ == "__main__":
    main()
