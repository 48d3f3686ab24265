"""Which layers of a vision graph may be int8: measured on the checkpoint's own weights.

Photos go through the fp32 graph and the int8 graph, by the runtime's own path. Where embeddings
differ too much, the layers that int8 moves furthest stay in float, as few as pass the bar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from edgevlm import families, preprocess, vision
from edgevlm.bundle import Bundle
from edgevlm.cancel import Cancel
from edgevlm.errors import BundleError
from edgevlm.families import Family
from edgevlm.layout import Layout
from edgevlm.sessions import Session

from . import photos, precision
from .graph import Model, Progress

Embeddings = npt.NDArray[np.float32]  # [n_tokens, n_embd]


@dataclass(frozen=True)
class Bar:
    """The least cosine between fp32 and int8 embeddings: over all tokens, and of the worst."""

    mean: float = 0.999
    worst: float = 0.99


@dataclass(frozen=True)
class Verdict:
    """What passed, for the card of the bundle."""

    cosine_mean: float
    cosine_worst: float
    n_photos: int
    n_layers: int  # linear layers that could be int8
    float_layers: tuple[str, ...]  # those of them that stayed in float

    def card(self) -> dict[str, Any]:
        return {
            "cosine_mean": round(self.cosine_mean, 6),
            "cosine_worst_token": round(self.cosine_worst, 6),
            "photos": self.n_photos,
            "layers": self.n_layers,
            "float_layers": list(self.float_layers),
        }


class Gate:
    """The fp32 graph's answers to some photos, and the photos themselves as patches."""

    def __init__(
        self,
        model: Model,
        family: Family,
        pictures: Sequence[photos.Pixels],
        *,
        threads: int,
        bar: Bar | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._model, self._family, self._threads = model, family, threads
        self._bar = bar or Bar()
        self._progress = progress
        self._n_sessions = 0
        self._inputs: list[tuple[npt.NDArray[np.uint8], Layout]] = []
        for pixels in pictures:
            layout = family.layout(*pixels.shape[:2])
            self._inputs.append((preprocess.patches(pixels, layout, threads), layout))
        self._layers = list(precision.linear_layers(model))

    def choose(self) -> Verdict:
        """As few float layers as pass the bar.

        Costs a session of the fp32 graph (its weights are mapped from a temporary file), then one
        of the int8 graph; where that does not pass, one run of the probe and a bisection.
        """
        with TemporaryDirectory() as scratch:
            self._scratch = Path(scratch)
            expected = self._embed(self._model)
            if not all(np.isfinite(e).all() for e in expected):
                raise BundleError(
                    "the vision graph gives NaN or Inf in fp32: fetch the model again"
                )
            verdict = self._try(expected, ())
            if self._passes(verdict):
                return verdict
            order = self._by_damage()
            passed = self._try(expected, self._layers)
            n_failed, n_passed = 0, len(order)
            while n_passed - n_failed > 1:
                n_float = (n_failed + n_passed) // 2
                verdict = self._try(expected, order[:n_float])
                if self._passes(verdict):
                    n_passed, passed = n_float, verdict
                else:
                    n_failed = n_float
            return passed

    def _passes(self, verdict: Verdict) -> bool:
        bar = self._bar
        return verdict.cosine_mean >= bar.mean and verdict.cosine_worst >= bar.worst

    def _try(self, expected: Sequence[Embeddings], keep_float: Sequence[str]) -> Verdict:
        found = self._embed(precision.int8(self._model, keep_float))
        similar = np.concatenate([cosines(*pair) for pair in zip(expected, found, strict=True)])
        return Verdict(
            cosine_mean=float(similar.mean()),
            cosine_worst=float(similar.min()),
            n_photos=len(expected),
            n_layers=len(self._layers),
            float_layers=tuple(name for name in self._layers if name in keep_float),
        )

    def _by_damage(self) -> list[str]:
        """Linear layers, the one first whose output int8 moves furthest."""
        session = self._session(precision.probe(self._model))
        damage = np.zeros(len(self._layers))
        for patches, layout in self._inputs:
            for inputs in vision.runs(patches, layout, self._family):
                # NaN: a layer that reads nothing but zeros moves nothing
                damage = np.fmax(damage, session.run(inputs, Cancel()))
        return [self._layers[i] for i in np.argsort(-damage)]

    def _embed(self, model: Model) -> list[Embeddings]:
        session = self._session(model)
        return [
            vision.encode(session, patches, layout, self._family, Cancel())
            for patches, layout in self._inputs
        ]

    def _session(self, model: Model) -> Session:
        path, data = self._scratch / "graph.onnx", self._scratch / "graph.data"
        data.unlink(missing_ok=True)
        model.save(path, data=data)
        self._n_sessions += 1
        if self._progress is not None:  # fp32, int8 and the probe; then the bisection
            most = 4 + len(self._layers).bit_length()
            self._progress(self._n_sessions, most)
        return Session(path, self._threads, prepack=False)


def family_of(directory: Path, manifest: Mapping[str, Any]) -> Family:
    """The runtime's family for a bundle that is still being written."""
    files: dict[str, Any] = {path.name: {} for path in directory.iterdir()}
    return families.find(Bundle(directory, {**manifest, "files": files}))


def cosines(a: Embeddings, b: Embeddings) -> npt.NDArray[np.float64]:
    """Of each token's two embeddings, float64 [n_tokens]."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return np.asarray((x * y).sum(axis=-1) / np.maximum(lengths, 1e-30))
