"""ONNX Runtime sessions; the only module that imports onnxruntime.

A path comes in, a session with fixed threads leaves. Spinning stops when a run ends: idle
ORT threads would otherwise take the cores from llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgevlm.cancel import Cancel
from edgevlm.errors import BackendError, Cancelled

ERRORS_ONLY = 3  # ORT's log severity


class Session:
    """One ONNX graph with one output."""

    def __init__(self, path: Path, threads: int, *, prepack: bool = True) -> None:
        """Without `prepack` weights that lie in a file of their own stay there, mapped: slower,
        and memory that the system can take back."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = ERRORS_ONLY
        options.enable_cpu_mem_arena = False  # the arena keeps the largest batch it ever saw
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no base class of their own
            raise BackendError(f"{path} cannot be loaded by ONNX Runtime: {error}") from error
        self.output_width = self._session.get_outputs()[0].shape[-1]

    def run(self, inputs: Mapping[str, NDArray[Any]], cancel: Cancel) -> NDArray[np.float32]:
        """Run the graph on arrays by the names of its inputs.

        Raises:
            Cancelled: `cancel` was set while it ran.
            BackendError: ONNX Runtime failed.
        """
        run_options = ort.RunOptions()
        run_options.log_severity_level = 4  # a terminated run is not worth a line on stderr

        def terminate() -> None:
            run_options.terminate = True

        cancel.stops_with(terminate)
        try:
            cancel.check()
            (output,) = self._session.run(None, dict(inputs), run_options)
        except Cancelled:
            raise
        except Exception as error:  # onnxruntime's exceptions have no base class of their own
            cancel.check()
            raise BackendError(f"ONNX Runtime failed: {error}") from error
        finally:
            cancel.stops_with(None)
        return np.asarray(output, dtype=np.float32)


def providers() -> list[str]:
    """Execution providers of the installed ONNX Runtime, best first."""
    return list(ort.get_available_providers())


def version() -> str:
    return str(ort.__version__)
