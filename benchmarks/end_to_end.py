"""How long does a user wait for an answer about a photo, here and with llama.cpp's own path?

`edgevlm bench --vs mtmd` on random weights at real shapes: both take turns on the same photos with
the same language file and the same number of image tokens.

    python benchmarks/end_to_end.py [MODEL ...] [--rounds N] [--max-tokens N] [--json FILE]

Needs libmtmd (`./install.sh bench`) and the extra `export`; for Moondream2, which libmtmd does not
have, its tower over one crop and the same language model stand in.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

from edgevlm.bench.run import COMPARED

MODELS = ("moondream2", "llava-phi-3-mini")
OURS, PEER = "edgevlm", "libmtmd"


def bench(name: str, rounds: int, max_tokens: int, threads: int) -> dict[str, Any]:
    """In a process of its own, so that a peak of memory belongs to one model."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "result.json"
        command = [sys.executable, "-m", "edgevlm", "bench", "--random", name, "--vs", "mtmd"]
        command += ["--rounds", str(rounds), "--max-tokens", str(max_tokens)]
        subprocess.run(
            [*command, "--threads", str(threads), "--json", str(file)],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def main() -> None:
    parser = common.parser(__doc__, rounds=3)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=MODELS)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    times: dict[str, dict[str, float]] = {}
    runs = {}
    for name in options.models:
        runs[name] = found = bench(name, options.rounds, options.max_tokens, options.threads)
        for stage in COMPARED:
            row = {OURS: found["stages"][stage], PEER: found["peer"][stage]}
            times[f"{name}: {stage.replace('_', ' ')}"] = row
    question = str(__doc__).splitlines()[0]
    common.publish(common.result(question, PEER, times, options, runs=runs), options)


if __name__ == "__main__":
    main()
