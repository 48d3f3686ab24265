"""How long from the start of the process to the first word?

`edgevlm describe` on the built-in nano, photo and all, against llama-cpp-python's own class loading
the same language file and saying a word about no photo at all: the least that any program on it
does. Where transformers is installed, its import alone stands beside. Page cache warm.

    python benchmarks/cold_start.py [--rounds N] [--json FILE]
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import common

from edgevlm import registry

PEER = "llama-cpp-python, same language file, no photo"
PHOTO = Path(__file__).parents[1] / "examples" / "cat.jpg"
_LLAMA = """
import sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=512, n_threads=int(sys.argv[2]), verbose=False)
for piece in model("A photo of", max_tokens=1, stream=True):
    print(piece["choices"][0]["text"], flush=True)
"""
_TRANSFORMERS = "from transformers import AutoModelForImageTextToText; print('imported')"


def until_first_byte(command: Sequence[str]) -> None:
    """Start a program and wait for the first thing it says; then it is stopped."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        if not child.stdout.read(1):
            raise SystemExit(f"{command[:3]} said nothing")
        child.kill()


def main() -> None:
    options = common.parser(__doc__, rounds=7).parse_args()
    nano = registry.resolve(registry.BUILT_IN)
    describe = ["-m", "edgevlm", "describe", str(PHOTO), "-q", "-m", registry.BUILT_IN]
    commands = {
        "edgevlm describe, nano": [*describe, "-t", str(options.threads)],
        PEER: ["-c", _LLAMA, str(nano / "language.gguf"), str(options.threads)],
    }
    if find_spec("transformers") and find_spec("torch"):
        commands["transformers, import alone"] = ["-c", _TRANSFORMERS]
    work = {
        who: partial(until_first_byte, [sys.executable, *rest]) for who, rest in commands.items()
    }
    times = {"process start to first word": common.medians_ms(work, options.rounds)}
    question = str(__doc__).splitlines()[0]
    common.publish(common.result(question, PEER, times, options), options)


if __name__ == "__main__":
    main()
