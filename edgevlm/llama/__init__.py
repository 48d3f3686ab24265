"""llama.cpp behind three small classes: pointers live and die here, C codes become exceptions."""

from edgevlm.llama.context import Context
from edgevlm.llama.gpu import cuda_free_bytes, cuda_gpus
from edgevlm.llama.library import build_features, library_path, on_log, version
from edgevlm.llama.model import Model
from edgevlm.llama.sampler import Sampler

__all__ = [
    "Context",
    "Model",
    "Sampler",
    "build_features",
    "cuda_free_bytes",
    "cuda_gpus",
    "library_path",
    "on_log",
    "version",
]
