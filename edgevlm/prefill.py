"""Rows of a prompt → every layer's keys and values, through the bundle's prefill graph.

ONNX Runtime's int8 kernels read a picture's rows faster than llama.cpp does; llama.cpp's cache
takes over what they give, and goes on from there. The graph is opened when it is first needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgevlm.bundle import Bundle
from edgevlm.cancel import Cancel
from edgevlm.errors import BackendError, BundleError
from edgevlm.llama import Context
from edgevlm.sessions import Session

# Measured at Moondream2's shape: the graph was faster from 32 rows on, and opening it took as long
# as it saves on 300; both grow with the model alike.
FEWEST_ROWS, FEWEST_ROWS_TO_OPEN = 32, 256
_log = logging.getLogger("edgevlm.prefill")


class Prefill:
    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._path, self._threads = bundle.file("prefill.onnx"), threads
        self._session: Session | None = None
        # Where a picture's rows attend to each other, the graph knows nothing else.
        self.bidirectional = bool(bundle.manifest["image"].get("bidirectional_tokens"))

    def pays(self, n_rows: int) -> bool:
        """Whether so many rows are read sooner here than by llama.cpp."""
        return n_rows >= (FEWEST_ROWS_TO_OPEN if self._session is None else FEWEST_ROWS)

    def run(
        self, rows: NDArray[np.float32], context: Context, sequence: int, cancel: Cancel
    ) -> None:
        """Read float32 [n, n_embd] into the empty cache of a sequence, at positions 0 to n.

        Raises:
            Cancelled: `cancel` was set while the graph ran; the cache is still empty.
            BundleError: the graph belongs to another model.
            BackendError: ONNX Runtime or llama.cpp failed.
        """
        if self._session is None:
            self._session = Session(self._path, self._threads)
        outputs = self._session.run_all({"rows": rows}, cancel)
        keys, values = outputs[0::2], outputs[1::2]
        if (len(keys), keys[0].shape[1]) != context.cache_shape:
            layers, width = context.cache_shape
            raise BundleError(
                f"{self._path} gives keys of {len(keys)} layers, {keys[0].shape[1]} wide; "
                f"language.gguf has {layers} layers, {width} wide: export both again"
            )
        context.fill_cache(keys, values, sequence)

    def close(self) -> None:
        """Free the graph; the next run opens it again."""
        self._session = None


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
