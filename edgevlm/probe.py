"""Does the installed llama.cpp survive on this CPU?

Some builds die of SIGSEGV or SIGILL on some CPUs (gcc before 13 miscompiles the AMX kernels), and
a dead process cannot report. So a child process runs a tiny quantized model once for each
library and CPU; the verdict is remembered, and the safe settings are used from then on.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from edgevlm import device, paths
from edgevlm.answer import Device
from edgevlm.errors import BackendError

_MODEL = Path(__file__).parent / "data" / "probe.gguf"
_TIMEOUT_S = 120
# With the parent's module path: `-m` would look in the working directory first, and find the
# source tree there when somebody tries a fresh clone.
_CHILD = """
import sys
sys.path[:] = sys.argv[3:]
from edgevlm.probe import run_tiny_model
run_tiny_model(sys.argv[1] == "1", sys.argv[2])
"""
REQUIREMENT = "llama-cpp-python==0.3.36"


@dataclass(frozen=True)
class Verdict:
    """`extra_buffers`: may weights be repacked for this CPU; `finding`: what happened, or ""."""

    extra_buffers: bool
    finding: str


def verdict() -> Verdict:
    """The remembered verdict, or a new one: about a second, once for each library build.

    Raises:
        BackendError: llama.cpp does not run here with any settings.
    """
    known = paths.cache("probe", f"{_fingerprint()}.json")
    try:
        return Verdict(**json.loads(known.read_text()))
    except (OSError, ValueError, TypeError):  # none yet, or not readable as one
        found = _probe()
    paths.write_cache(known, json.dumps(asdict(found)))
    return found


def cuda_finding(gpus: Sequence[str]) -> str:
    """Does llama.cpp compute on the first of these GPUs? "" if so, else what is wrong.

    ggml aborts the process where a kernel or a driver is missing.
    """
    if not gpus:
        return "llama.cpp finds no NVIDIA GPU"
    key = "\n".join((_fingerprint(), *gpus))
    known = paths.cache("probe", hashlib.sha256(key.encode()).hexdigest()[:32] + "-cuda.txt")
    if paths.read_cache(known) is not None:
        return ""
    failure = _try(extra_buffers=False, where="cuda")
    if failure:  # not remembered: another program may have had all of the GPU's memory
        return f"llama.cpp fails there: {failure}"
    paths.write_cache(known, "")
    return ""


def _probe() -> Verdict:
    failure = _try(extra_buffers=True)
    if not failure:
        return Verdict(extra_buffers=True, finding="")
    second = _try(extra_buffers=False)
    if not second:
        return Verdict(extra_buffers=False, finding=failure)
    raise BackendError(
        f"the installed llama.cpp does not run on this CPU ({device.cpu_name()}): {second}. "
        "Build it here: pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python "
        + REQUIREMENT
    )


def _try(*, extra_buffers: bool, where: Device = "cpu") -> str:
    """Run the tiny model in a child; "" if it lived, else what became of it."""
    command = [sys.executable, "-c", _CHILD, str(int(extra_buffers)), where, *sys.path]
    settings = "with repacked weights" if extra_buffers else "with plain weights"
    settings = "on the GPU" if where == "cuda" else settings
    try:
        child = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"{settings} it did not finish in {_TIMEOUT_S} s"
    if child.returncode < 0:
        return f"{settings} it died of {signal.Signals(-child.returncode).name}"
    if child.returncode > 0:
        lines = child.stderr.decode("utf-8", "replace").strip().splitlines()
        return f"{settings} it failed: {lines[-1] if lines else 'no message'}"
    return ""


def _fingerprint() -> str:
    """Changes with the library's files and the CPU."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise BackendError(f"llama-cpp-python is not installed: pip install {REQUIREMENT}")
    parts = [device.cpu_name(), sys.executable]
    for file in sorted((Path(spec.origin).parent / "lib").glob("*")):
        stat = file.stat()
        parts.append(f"{file}|{stat.st_size}|{stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def run_tiny_model(extra_buffers: bool, where: Device) -> None:
    """What the child does; dies, raises or returns."""
    import numpy as np

    from edgevlm.kernels import Flag
    from edgevlm.llama import Context, Model

    model = Model(_MODEL, extra_buffers=extra_buffers, device=where)
    context = Context(model, 64, threads=2, flag=Flag())
    context.decode(list(range(1, 34)), 0)  # a batch: the matrix-matrix kernels
    context.decode([1], 33)  # one token: the matrix-vector kernels
    if not np.isfinite(context.logits()).all():
        raise BackendError("the logits are not finite")
