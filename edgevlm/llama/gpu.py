"""What llama.cpp's CUDA backend finds."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from edgevlm.llama.library import ggml


@dataclass(frozen=True)
class _Cuda:
    built: bool
    gpus: Sequence[int]  # ggml_backend_dev_t


@cache
def cuda() -> _Cuda:
    """The CUDA backend of the loaded library; it lists no GPU where there is none."""
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    backend = ggml("ggml_backend_reg_by_name", pointer, ctypes.c_char_p)(b"CUDA")
    if backend is None:
        return _Cuda(False, ())
    count = ggml("ggml_backend_reg_dev_count", size, pointer)(backend)
    get = ggml("ggml_backend_reg_dev_get", pointer, pointer, size)
    return _Cuda(True, [get(backend, index) for index in range(count)])


def cuda_gpus() -> list[str] | None:
    """Names of the GPUs that llama.cpp can compute on; None if it was built without CUDA."""
    describe = ggml("ggml_backend_dev_description", ctypes.c_char_p, ctypes.c_void_p)
    found = cuda()
    return [describe(gpu).decode() for gpu in found.gpus] if found.built else None


def cuda_free_bytes() -> int:
    """Free memory of the GPU that would be used; 0 without one."""
    if not cuda().gpus:
        return 0
    size = ctypes.POINTER(ctypes.c_size_t)
    ask = ggml("ggml_backend_dev_memory", None, ctypes.c_void_p, size, size)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    ask(cuda().gpus[0], ctypes.byref(free), ctypes.byref(total))
    return free.value
