"""Patches → image embeddings, through the bundle's vision graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm.cancel import Cancel
from edgevlm.errors import BundleError
from edgevlm.families import Family
from edgevlm.layout import Layout
from edgevlm.sessions import Session


def encode(
    session: Session,
    patches: NDArray[np.uint8],
    layout: Layout,
    family: Family,
    cancel: Cancel,
) -> NDArray[np.float32]:
    """Embeddings of one picture, float32 [n_tokens, n_embd].

    Args:
        patches: uint8 [n_tiles, n_patches, patch_px² · 3], see `preprocess.patches`.

    Raises:
        BundleError: the graph gives another number of tokens than bundle.json says.
    """
    # Tiles that go through the graph together, 0.1 GB each, would keep it from the language model.
    parts = [
        session.run(inputs, cancel, keeps_memory=len(inputs["patches"]) == 1)
        for inputs in runs(patches, layout, family)
    ]
    features = np.concatenate(parts)  # float32 [n_tiles, tokens a tile, n_embd]
    embeddings = family.merge(features, layout)
    if len(embeddings) != layout.n_tokens:
        raise BundleError(
            f"vision.onnx gives {len(embeddings)} embeddings for a picture; bundle.json says "
            f"{layout.n_tokens}: export the model again"
        )
    return np.ascontiguousarray(embeddings)


def runs(
    patches: NDArray[np.uint8], layout: Layout, family: Family
) -> Iterator[Mapping[str, NDArray[Any]]]:
    """The inputs of each run of the graph for one picture."""
    for tiles, inputs in family.runs(layout):
        yield {"patches": patches[tiles], **inputs}
