"""Measure again and render the page: every script here that needs no model, one after another.

    python benchmarks/all.py [SCRIPT ...]

Wants a quiet machine for about forty minutes, libmtmd (`./install.sh bench`) and the extras
`export` and, for the import that cold_start.py compares with, `verify`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
_NO_QUESTION = {"all", "check", "common", "render", "towers"}
_WANT_A_MODEL = {"batch", "cache", "prefill", "prefill_quality"}
_TAKE_NO_TIME = {"memory"}  # nothing for the page, whose tables are of times
# More results of one script, by their name: which, and how it is called.
_VARIANTS = {
    "end_to_end_busy": "end_to_end moondream2 --busy --max-tokens 8",
    "end_to_end_fewer_tokens": "end_to_end llava-phi-3-mini --visual-tokens 160 --max-tokens 8",
    "end_to_end_gguf": "end_to_end moondream2 --prefill gguf --max-tokens 16",
}


def scripts() -> list[str]:
    found = {path.stem for path in HERE.glob("*.py")} - _NO_QUESTION
    return sorted(found)


def main() -> None:
    for name in sys.argv[1:] or sorted({*scripts(), *_VARIANTS} - _WANT_A_MODEL - _TAKE_NO_TIME):
        print(f"\n--- {name}", flush=True)
        out = HERE / "results" / f"{name}.json"
        script, *options = _VARIANTS.get(name, name).split()
        command = [sys.executable, str(HERE / f"{script}.py"), *options, "--json", str(out)]
        subprocess.run(command, check=True)
    kept = [str(path) for path in sorted((HERE / "results").glob("*.json"))]
    for command in (["render.py"], ["check.py", *kept, "--update"]):
        subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], check=True)


if __name__ == "__main__":
    main()
