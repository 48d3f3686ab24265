"""How much memory a model needs, from its manifest alone."""

from __future__ import annotations

from edgevlm.bundle import Bundle

# Measured on nano and on tiny bundles: interpreter, libraries and ONNX Runtime's graph.
_RUNTIME_BYTES = 150 << 20


def needed_bytes(bundle: Bundle) -> int:
    """An estimate: weights as they lie on disk, and the runtime around them."""
    return bundle.n_bytes + _RUNTIME_BYTES
