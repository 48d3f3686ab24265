"""ONNX Runtime sessions; the only module that imports onnxruntime.

A path comes in, a session with fixed threads leaves. Spinning stops when a run ends: idle
ORT threads would otherwise take the cores from llama.cpp.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgevlm import graph_cache, kernels
from edgevlm.answer import Device
from edgevlm.cancel import Cancel
from edgevlm.device import Support
from edgevlm.errors import BackendError, Cancelled

_WARNINGS, ERRORS_ONLY, _SILENT = 2, 3, 4  # ORT's log severities; warnings are its default

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_PROVIDERS: dict[Device, list[Any]] = {
    "cpu": [_CPU],
    # float32 is computed as float32, not rounded to ten bits; no search through every convolution
    # algorithm at the first picture; no more GPU memory than asked for: llama.cpp has the rest.
    "cuda": [
        (
            _CUDA,
            {
                "use_tf32": 0,
                "cudnn_conv_algo_search": "HEURISTIC",
                "arena_extend_strategy": "kSameAsRequested",
            },
        ),
        _CPU,
    ],
}
# An ONNX model, y = -x: the least that shows whether a provider computes.
_NEGATE = (
    b'\x08\x08\x12\x00:2\n\x0b\n\x01x\x12\x01y"\x03Neg\x12\x01gZ\x0f\n\x01x\x12\n\n\x08'
    b"\x08\x01\x12\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01"
    b"B\x04\n\x00\x10\x11"
)


class Session:
    """One ONNX graph."""

    def __init__(
        self,
        path: Path,
        threads: int,
        device: Device = "cpu",
        *,
        sha256: str = "",
        prepack: bool = True,
        sizes_vary: bool = False,
    ) -> None:
        """Load the graph; with its `sha256`, the optimized copy of a small one is kept and used.

        Without `prepack` weights that lie in a file of their own stay there, mapped: slower, and
        memory that the system can take back. Where inputs are of few sizes, what a run takes is
        planned from the run before, and held as one block; `sizes_vary` does without.

        Raises:
            BackendError: it cannot be loaded, or not on this device.
        """
        keeps = bool(sha256) and device == "cpu"
        if keeps and path.stat().st_size <= graph_cache.MOST_BYTES:
            self._session = _open_kept(path, threads, graph_cache.directory(sha256, maker()))
        else:
            options = _options(threads, prepack, device)
            options.enable_mem_pattern = not sizes_vary
            self._session = _open(path, options, device)
        kernels.trim()  # opening leaves holes
        # ONNX Runtime's name of the type, and the shape; a dynamic axis has a name, too
        self.inputs: dict[str, tuple[str, list[int | str]]]
        self.outputs: dict[str, tuple[str, list[int | str]]]
        self.inputs, self.outputs = (
            {value.name: (value.type, value.shape) for value in values}
            for values in (self._session.get_inputs(), self._session.get_outputs())
        )

    def run(
        self, inputs: Mapping[str, NDArray[Any]], cancel: Cancel, *, keeps_memory: bool = False
    ) -> NDArray[np.float32]:
        """Run a graph of one output on arrays by the names of its inputs; see `run_all`."""
        (output,) = self.run_all(inputs, cancel, keeps_memory=keeps_memory)
        return np.asarray(output, dtype=np.float32)

    def run_all(
        self, inputs: Mapping[str, NDArray[Any]], cancel: Cancel, *, keeps_memory: bool = False
    ) -> list[NDArray[Any]]:
        """All outputs, in the graph's order and types.

        With `keeps_memory` the next run finds what this one computed in, which takes less time
        than asking the system for it anew.

        Raises:
            Cancelled: `cancel` was set while it ran.
            BackendError: ONNX Runtime failed.
        """
        feeds, found = dict(inputs), []
        self._call(
            lambda options: found.extend(self._session.run(None, feeds, options)),
            cancel,
            keeps_memory,
        )
        return found

    def run_into(
        self,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, NDArray[Any]],
        cancel: Cancel,
    ) -> None:
        """Write the outputs into arrays of their types and shapes, and keep the memory; raises as
        `run_all` does."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name, array in outputs.items():
            assert array.flags.c_contiguous
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._call(
            lambda options: self._session.run_with_iobinding(binding, options),
            cancel,
            keeps_memory=True,
        )

    def _call(
        self, run: Callable[[ort.RunOptions], None], cancel: Cancel, keeps_memory: bool
    ) -> None:
        run_options = ort.RunOptions()
        run_options.log_severity_level = _SILENT  # a terminated run is not worth a line on stderr
        if not keeps_memory:  # without any arena glibc would keep more, in pieces
            run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

        def terminate() -> None:
            run_options.terminate = True

        cancel.stops_with(terminate)
        try:
            cancel.check()
            run(run_options)
        except Cancelled:
            raise
        except Exception as error:  # onnxruntime's exceptions have no base class of their own
            cancel.check()
            raise BackendError(f"ONNX Runtime failed: {error}") from error
        finally:
            cancel.stops_with(None)


def maker() -> str:
    """What an optimized graph depends on besides the CPU."""
    return version() + (" with edgevlm's operators" if kernels.operators() else "")


def _options(threads: int, prepack: bool = True, device: Device = "cpu") -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = ERRORS_ONLY
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    library = kernels.operators() if device == "cpu" else None
    if library is not None:
        options.register_custom_ops_library(str(library))
    return options


def _open(path: Path, options: ort.SessionOptions, device: Device = "cpu") -> ort.InferenceSession:
    try:
        session = ort.InferenceSession(
            path, options, providers=_PROVIDERS[device], enable_fallback=0
        )
    except Exception as error:  # onnxruntime's exceptions have no base class of their own
        raise BackendError(f"{path} cannot be loaded by ONNX Runtime: {error}") from error
    if device == "cuda":
        _expect_cuda(session, path)
    return session


def _open_kept(path: Path, threads: int, directory: Path) -> ort.InferenceSession:
    """A session on the kept copy of the optimized graph; made while opening if it is not there."""
    copy = graph_cache.find(directory)
    if copy is not None:
        options = _options(threads)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        with suppress(BackendError):  # gone since: another process makes it anew
            return _open(copy, options)
    made: list[ort.InferenceSession] = []

    def write(copy: Path) -> None:
        options = _options(threads)
        options.optimized_model_filepath = str(copy)
        with suppress(BackendError):  # nothing is kept; a bad graph is reported below
            made.append(_open(path, options))

    graph_cache.keep(directory, write)
    return made[0] if made else _open(path, _options(threads))


def _expect_cuda(session: ort.InferenceSession, what: object) -> None:
    """ONNX Runtime leaves out a provider that does not load, and says it in its log only."""
    if _CUDA not in session.get_providers():
        raise BackendError(f"{what}: ONNX Runtime did not take its {_CUDA}")


@cache
def cuda() -> Support:
    """Does ONNX Runtime compute on a GPU here? A build with CUDA is tried on a graph of one node.

    Its libraries (CUDA, cuDNN) are loaded from NVIDIA's Python packages where they are installed.
    """
    if _CUDA not in providers():
        return Support(False, "the installed onnxruntime was built without CUDA")
    said = io.StringIO()
    ort.set_default_logger_severity(_SILENT)  # what fails here is told once, by the caller
    try:
        with redirect_stdout(said):  # preload_dlls prints what it does not find
            ort.preload_dlls()
        session = ort.InferenceSession(_NEGATE, providers=_PROVIDERS["cuda"], enable_fallback=0)
        _expect_cuda(session, "one node")
        session.run(None, {"x": np.zeros(1, np.float32)})
    except Exception as error:  # onnxruntime's exceptions have no base class of their own
        reason = (said.getvalue() or str(error)).strip().splitlines()[0]
        needs = f"it needs a GPU, CUDA {ort.cuda_version} and cuDNN"
        return Support(True, f"ONNX Runtime cannot compute there ({needs}): {reason}")
    finally:
        ort.set_default_logger_severity(_WARNINGS)
    return Support(True, "")


def providers() -> list[str]:
    """Execution providers of the installed ONNX Runtime, best first."""
    return list(ort.get_available_providers())


def version() -> str:
    return str(ort.__version__)
