"""Rows of a prompt → every layer's keys and values, through the bundle's prefill graph.

ONNX Runtime's int8 kernels read a picture's rows faster than llama.cpp does; llama.cpp's cache
takes over what they give, and goes on from there. The graph is opened when it is first needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm import kernels
from edgevlm.bundle import Bundle
from edgevlm.cancel import Cancel
from edgevlm.errors import BackendError, BundleError
from edgevlm.llama import Context
from edgevlm.sessions import Session

# Measured at Moondream2's shape: the graph was faster from 32 rows on. Opening it took as long as
# it saves on 60 with our operators, which take weights as they are mapped, and on 300 without,
# because ONNX Runtime packs them; all of it grows with the model alike.
FEWEST_ROWS = 32
_TYPES = {2: "tensor(float16)", 4: "tensor(float)"}
_log = logging.getLogger("edgevlm.prefill")


class Prefill:
    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._path, self._threads = bundle.file("prefill.onnx"), threads
        self._session: Session | None = None
        self._memory: NDArray[np.uint8] | None = None  # of the last keys and values
        # Whether the graph knows rows at the front that attend to each other.
        self.takes_prefix = bool(bundle.manifest["image"].get("bidirectional_tokens"))

    def pays(self, n_rows: int) -> bool:
        """Whether so many rows are read sooner here than by llama.cpp."""
        return n_rows >= (fewest_rows_to_open() if self._session is None else FEWEST_ROWS)

    def run(
        self,
        rows: NDArray[np.float32],
        n_prefix: int,
        context: Context,
        sequence: int,
        cancel: Cancel,
    ) -> None:
        """Read float32 [n, n_embd] into the cache of a sequence, at positions 0 to n.

        The first `n_prefix` rows attend to each other; 0 unless the graph `takes_prefix`.
        What the cache held before is gone.

        Raises:
            Cancelled: `cancel` was set while the graph ran; the cache is empty.
            BundleError: the graph belongs to another model.
            BackendError: ONNX Runtime or llama.cpp failed.
        """
        if self._session is None:
            self._session = self._open(context)
        inputs: dict[str, NDArray[Any]] = {"rows": rows}
        if self.takes_prefix:
            inputs["n_prefix"] = np.array(n_prefix, np.int64)
        state = context.new_state(len(rows), sequence, self._memory)
        if self._memory is None or len(self._memory) < len(state.data):
            self._memory = state.data
        wanted = {f"keys.{layer}": keys for layer, keys in enumerate(state.keys)}
        wanted |= {f"values.{layer}": values for layer, values in enumerate(state.values)}
        if all(self._session.outputs[n][0] == _TYPES[p.itemsize] for n, p in wanted.items()):
            self._session.run_into(inputs, wanted, cancel)
        else:  # a context or a graph in float32, to compare with a reference
            outputs = self._session.run_all(inputs, cancel)
            for name, output in zip(self._session.outputs, outputs, strict=True):
                wanted[name][...] = output
        context.fill_cache(state, sequence)

    def _open(self, context: Context) -> Session:
        session = Session(self._path, self._threads, sizes_vary=True)
        inputs = {"rows", "n_prefix"} if self.takes_prefix else {"rows"}
        if session.inputs != inputs:
            raise BundleError(
                f"{self._path} takes {', '.join(sorted(session.inputs))}; this version gives "
                f"{', '.join(sorted(inputs))}: export the model again"
            )
        layers, width = context.cache_shape
        n_keys, keys_width = len(session.outputs) // 2, session.outputs["keys.0"][1][-1]
        if (n_keys, keys_width) != (layers, width):
            raise BundleError(
                f"{self._path} gives keys of {n_keys} layers, {keys_width} wide; "
                f"language.gguf has {layers} layers, {width} wide: export both again"
            )
        return session

    def close(self) -> None:
        """Free the graph; the next run opens it again."""
        self._session = self._memory = None


def fewest_rows_to_open() -> int:
    return 256 if kernels.operators() is None else 64


def find(
    bundle: Bundle, wanted: str, threads: int, takes_cache: Callable[[], bool]
) -> Prefill | None:
    """The prefill of a bundle; None where llama.cpp is to read all by itself.

    Args:
        wanted: "auto", "gguf" or "int8", as in `Settings`.
        takes_cache: whether llama.cpp takes keys and values that it did not compute.

    Raises:
        BundleError: "int8" is wanted, and the bundle has none.
        BackendError: "int8" is wanted, and this llama.cpp keeps its cache in another way.
    """
    kind = bundle.manifest["quantization"].get("prefill")
    if wanted == "int8" and kind != "int8":
        raise BundleError(
            f"{bundle.path} has no int8 prefill graph: export the model with --prefill int8, or "
            "leave --prefill at auto"
        )
    if wanted == "gguf" or kind is None:
        return None
    if takes_cache():
        return Prefill(bundle, threads)
    problem = "the installed llama.cpp keeps its cache in a way that this version does not know"
    if wanted == "int8":
        raise BackendError(f"{problem}: leave --prefill at auto")
    _log.warning("%s; it reads prompts by itself, which takes longer", problem)
    return None
