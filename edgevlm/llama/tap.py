"""What the last layer gives, taken out of llama.cpp while it computes."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from edgevlm.llama.library import ggml, lib
from edgevlm.llama.model import Model


class Tap:
    """Copies the last layer's output while llama.cpp computes.

    Its API gives the state after the final norm only, and a norm cannot be undone.
    """

    def __init__(self, model: Model) -> None:
        self.row: NDArray[np.float32] = np.zeros(model.n_embd, np.float32)
        self.callback = lib.ggml_backend_sched_eval_callback(self._see)
        self._name = f"l_out-{lib.llama_model_n_layer(model.handle) - 1}".encode()
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._name_of = ggml("ggml_get_name", ctypes.c_char_p, pointer)
        self._n_bytes_of = ggml("ggml_nbytes", size, pointer)
        self._copy = ggml("ggml_backend_tensor_get", None, pointer, pointer, size, size)

    def _see(self, tensor: int, asks: bool, _: object) -> bool:
        """Called twice: whether a tensor is wanted, and when it is there. True goes on."""
        if asks:
            return bool(self._name_of(tensor) == self._name)
        end_bytes, row_bytes = self._n_bytes_of(tensor), self.row.nbytes
        if end_bytes:  # a batch without the row whose logits are wanted leaves it empty
            self._copy(tensor, self.row.ctypes.data, end_bytes - row_bytes, row_bytes)
        return True
