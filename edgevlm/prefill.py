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
from edgevlm.llama.sequence_state import State
from edgevlm.sessions import Session

# Measured at Moondream2's shape: behind a picture the graph was faster from 6 rows on. Opening it
# took as long as it saves on 60 with our operators, which take weights as they are mapped, and on
# 300 without, because ONNX Runtime packs them; all of it grows with the model alike.
FEWEST_ROWS = 6
_DTYPES = {"tensor(float16)": np.float16, "tensor(float)": np.float32}
_log = logging.getLogger("edgevlm.prefill")


class Prefill:
    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._path, self._threads = bundle.file("prefill.onnx"), threads
        self._session: Session | None = None
        self._memory: NDArray[np.uint8] | None = None  # of the last keys and values

    def pays(self, n_rows: int) -> bool:
        """Whether so many rows are read sooner here than by llama.cpp."""
        return n_rows >= (fewest_rows_to_open() if self._session is None else FEWEST_ROWS)

    def run(
        self,
        rows: NDArray[np.float32],
        n_past: int,
        n_prefix: int,
        context: Context,
        sequence: int,
        cancel: Cancel,
    ) -> None:
        """Read float32 [n, n_embd] into the cache of a sequence, behind the `n_past` positions that
        it holds; there are none unless the context `appends`.

        The first `n_prefix` rows of all attend to each other.

        Raises:
            Cancelled: `cancel` was set while the graph ran; the cache is as it was.
            BundleError: the graph belongs to another model or another version.
            BackendError: ONNX Runtime or llama.cpp failed.
        """
        if self._session is None:
            self._session = self._open(context)
        past_bytes = context.state_bytes(n_past)
        memory = self._at_least(past_bytes + context.state_bytes(len(rows)))
        past = context.held(n_past, memory)
        state = context.new_state(range(n_past, n_past + len(rows)), memory[past_bytes:])
        inputs: dict[str, NDArray[Any]] = {
            "rows": rows,
            "n_past": np.array(n_past, np.int64),
            "n_prefix": np.array(n_prefix, np.int64),
        }
        # a context or a graph may be in float32, to compare with a reference
        dtype = _DTYPES[self._session.outputs["keys.0"][0]]
        for name, part in _named(past):
            if f"past_{name}" in self._session.inputs:  # the last layer attends to nothing
                inputs[f"past_{name}"] = part.astype(dtype, copy=False)
        wanted = _named(state)
        outputs = {name: part.astype(dtype, copy=False) for name, part in wanted}
        self._session.run_into(inputs, outputs, cancel)
        for name, part in wanted:
            if outputs[name] is not part:
                part[...] = outputs[name]
        context.fill_cache(state, sequence)

    def _at_least(self, n_bytes: int) -> NDArray[np.uint8]:
        if self._memory is None or len(self._memory) < n_bytes:
            # What nothing was written to takes no memory, so the next turns of a chat have room.
            self._memory = np.empty(n_bytes + n_bytes // 4, np.uint8)
        return self._memory

    def _open(self, context: Context) -> Session:
        session = Session(self._path, self._threads, sizes_vary=True)
        if not {"rows", "n_past", "n_prefix"} <= session.inputs.keys():
            raise BundleError(f"{self._path} is of another version: export the model again")
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


def _named(state: State) -> list[tuple[str, NDArray[Any]]]:
    """Keys and values of each layer, by the graph's names."""
    parts = ("keys", state.keys), ("values", state.values)
    return [(f"{name}.{layer}", a) for name, each in parts for layer, a in enumerate(each)]


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
