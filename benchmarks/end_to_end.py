"""How long does a user wait for an answer about a photo, here and with llama.cpp's own path?

`edgevlm bench --vs mtmd` on random weights at real shapes: both take turns on the same photos with
the same language file and the same number of image tokens.

    python benchmarks/end_to_end.py [MODEL ...] [--rounds N] [--max-tokens N] [--json FILE]
                                    [--prefill gguf] [--visual-tokens N] [--busy]

`--prefill` and `--visual-tokens` are ours alone; `--busy` lets another program compute on one core
all the time.

Needs libmtmd (`./install.sh bench`) and the extra `export`; for Moondream2, which libmtmd does not
have, its tower over one crop and the same language model stand in.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import common

from edgevlm import device
from edgevlm.bench.run import COMPARED

MODELS = ("moondream2", "llava-phi-3-mini")
OURS, PEER = "edgevlm", "libmtmd"


@contextmanager
def busy() -> Iterator[None]:
    """Another program that computes on one core."""
    program = multiprocessing.Process(target=_compute, daemon=True)
    program.start()
    try:
        yield
    finally:
        program.kill()


def _compute() -> None:
    while True:
        sum(range(1_000_000))


def bench(
    name: str, rounds: int, max_tokens: int, threads: int, further: list[str]
) -> dict[str, Any]:
    """In a process of its own, so that a peak of memory belongs to one model."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "result.json"
        command = [sys.executable, "-m", "edgevlm", "bench", "--random", name, "--vs", "mtmd"]
        command += ["--rounds", str(rounds), "--max-tokens", str(max_tokens), *further]
        if threads != device.thread_budget():  # else as many as are free, as for every user
            command += ["--threads", str(threads)]
        subprocess.run([*command, "--json", str(file)], check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def main() -> None:
    parser = common.parser(__doc__, rounds=3)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=MODELS)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--prefill", choices=["gguf"], help="llama.cpp reads picture and prompt")
    parser.add_argument("--visual-tokens", type=int, metavar="N", help="fewer image tokens")
    parser.add_argument("--busy", action="store_true", help="beside a program that computes")
    options = parser.parse_args()
    question, further = str(__doc__).splitlines()[0].rstrip("?"), []
    if options.prefill:
        question, further = f"{question}, if llama.cpp reads the prompt", ["--prefill", "gguf"]
    if options.visual_tokens:
        question = f"{question}, with {options.visual_tokens} image tokens"
        further += ["--visual-tokens", str(options.visual_tokens)]
    if options.busy:
        question = f"{question}, while another program computes"
    times: dict[str, dict[str, float]] = {}
    runs = {}
    for name in options.models:
        with busy() if options.busy else nullcontext():
            found = bench(name, options.rounds, options.max_tokens, options.threads, further)
        runs[name] = found
        for stage in COMPARED:
            row = {OURS: found["stages"][stage], PEER: found["peer"][stage]}
            times[f"{name}: {stage.replace('_', ' ')}"] = row
    common.publish(common.result(f"{question}?", PEER, times, options, runs=runs), options)


if __name__ == "__main__":
    main()
