"""How much memory a model needs, from its manifest alone."""

from __future__ import annotations

from edgevlm.bundle import Bundle

# Interpreter, libraries, ONNX Runtime's graph and llama.cpp's cache and buffers.
_RUNTIME_BYTES = 128 << 20


def needed_bytes(bundle: Bundle) -> int:
    """An upper estimate of the peak: both libraries hold the weights twice at worst.

    llama.cpp beside the mapped file in the layout that suits this CPU, ONNX Runtime while it
    optimizes the graph. nano: 372 MB by this, 339 MB measured (`edgevlm describe --timings`).
    """
    return 2 * bundle.n_bytes + _RUNTIME_BYTES
