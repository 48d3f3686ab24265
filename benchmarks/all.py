"""Measure again and render the page: every script here that needs no model, one after another.

    python benchmarks/all.py [SCRIPT ...]

Wants a quiet machine for about twenty minutes, libmtmd (`./install.sh bench`) and the extras
`export` and, for the import that cold_start.py compares with, `verify`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
_NO_QUESTION = {"all", "check", "common", "render", "towers"}
_WANT_A_MODEL = {"batch", "cache", "prefill", "prefill_quality"}


def scripts() -> list[str]:
    found = {path.stem for path in HERE.glob("*.py")} - _NO_QUESTION
    return sorted(found)


def main() -> None:
    for name in sys.argv[1:] or sorted({*scripts()} - _WANT_A_MODEL):
        print(f"\n--- {name}", flush=True)
        out = HERE / "results" / f"{name}.json"
        command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(out)]
        subprocess.run(command, check=True)
    kept = [str(path) for path in sorted((HERE / "results").glob("*.json"))]
    for command in (["render.py"], ["check.py", *kept, "--update"]):
        subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], check=True)


if __name__ == "__main__":
    main()
