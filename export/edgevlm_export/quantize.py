"""A language GGUF at f16 or f32 → the same model in one of llama.cpp's quantized formats.

llama.cpp's own quantizer does it, so that the file equals what its tools would make, in a child
process: it cannot be interrupted, and where it meets what it did not expect it aborts. This is
the exporter's only importer of llama_cpp, low-level half. Rows stream through a bounded buffer.
"""

from __future__ import annotations

import ctypes
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import llama_cpp.llama_cpp as lib
import numpy as np
import numpy.typing as npt
from gguf import GGUFReader

from edgevlm.errors import BackendError, BundleError

Progress: TypeAlias = Callable[[int, int], None]  # tensors done, tensors in all

FILE_TYPES = {  # llama.h, enum llama_ftype
    "q4_0": 2,
    "q8_0": 7,
    "q4_k_m": 15,
    "q5_k_m": 17,
    "q6_k": 18,
}
_BUFFER_BYTES = 64 << 20  # of tensor rows at once; llama.cpp's own default is 8 GiB
_COUNTED = re.compile(r"\[ *(\d+)/ *(\d+)\]")  # how llama.cpp begins its line for a tensor


def quantize(
    source: Path,
    out: Path,
    kind: str,
    *,
    imatrix: Path | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> None:
    """Write `source` as `kind`, a key of FILE_TYPES, into the file `out`.

    Args:
        imatrix: importance matrix, as llama.cpp's llama-imatrix writes it (imatrix.gguf).

    Raises:
        BundleError: `imatrix` is not such a file, or belongs to a model of other widths.
        BackendError: llama.cpp refused; what it said is in the message.
    """
    if imatrix is not None:
        _check_widths(source, read_imatrix(imatrix), imatrix)
    command = [sys.executable, "-m", "edgevlm_export.quantize", str(source), str(out), kind]
    command += [str(threads), *([str(imatrix)] if imatrix else [])]
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if progress is not None:
                    done, total = line.split()
                    progress(int(done), int(total))
            code = child.wait()
        finally:
            child.kill()
            child.communicate()
        log.seek(0)
        said = "; ".join(log.read().decode("utf-8", "replace").strip().splitlines()[-3:])
    if code != 0:
        how = f" ({signal.Signals(-code).name})" if code < 0 else ""
        raise BackendError(f"llama.cpp cannot quantize {source} to {kind}{how}. It said: {said}")


def read_imatrix(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Mean squared activation for each input column, by the name of the weight it meets.

    The file keeps sums and counts (llama.cpp tools/imatrix); experts lie behind one another.
    """
    try:
        tensors = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise BundleError(f"{path} is not a GGUF file: {error}") from error
    found = {}
    for name, sums in tensors.items():
        stem = name.removesuffix(".in_sum2")
        if stem == name:
            continue
        if f"{stem}.counts" not in tensors:
            raise BundleError(f"{path} has no counts for {stem}: make the imatrix again")
        counts = tensors[f"{stem}.counts"].reshape(-1, 1)
        rows = sums.reshape(len(counts), -1).astype(np.float32)
        # a matrix that saw no token counts every column alike, as llama-quantize has it
        means = np.where(counts > 0, rows / np.maximum(counts, 1), 1.0)
        found[stem] = means.astype(np.float32).reshape(-1)
    if not found:
        raise BundleError(f"{path} holds no importance matrix (no tensor named *.in_sum2)")
    return found


def _check_widths(
    source: Path, importance: dict[str, npt.NDArray[np.float32]], imatrix: Path
) -> None:
    """llama.cpp would skip a matrix that it finds no entry for, and say nothing on the way."""
    widths = {tensor.name: int(tensor.shape[0]) for tensor in GGUFReader(source).tensors}
    for name, means in importance.items():
        if name in widths and len(means) % widths[name]:
            raise BundleError(
                f"{imatrix} has {len(means)} columns for {name}, the model has {widths[name]}: "
                "it was made for another model"
            )
    if not importance.keys() & widths.keys():
        raise BundleError(f"{imatrix} names no tensor of the model: it was made for another one")


def _entries(importance: dict[str, npt.NDArray[np.float32]]) -> Any:
    """The C array, ended by a zeroed entry; `importance` must outlive it."""
    entries = (lib.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, means) in zip(entries, importance.items(), strict=False):
        entry.name = name.encode()
        entry.data = means.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = len(means)
    return entries


def _quantize_here(source: str, out: str, kind: str, threads: str, imatrix: str = "") -> int:
    """The child's part: counts on stdout, complaints on stderr, llama.cpp's code returned."""

    @lib.llama_log_callback  # type: ignore[untyped-decorator]
    def on_log(level: int, text: bytes, _: object) -> None:
        line = text.decode("utf-8", "replace").strip()
        if counted := _COUNTED.match(line):
            print(counted[1], counted[2], flush=True)
        elif level in (3, 4):  # ggml_log_level: warning, error
            print(line, file=sys.stderr)

    lib.llama_log_set(on_log, ctypes.c_void_p(0))
    params = lib.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[kind]
    params.nthread = int(threads)
    params.max_buf_size = _BUFFER_BYTES
    importance = read_imatrix(Path(imatrix)) if imatrix else {}
    if importance:
        params.imatrix = _entries(importance)
    return int(lib.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)))


if __name__ == "__main__":
    sys.exit(_quantize_here(*sys.argv[1:]))
