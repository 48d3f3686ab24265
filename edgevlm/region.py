"""Coordinates and sizes ↔ hidden states: how a language model points (`detect` and `point`).

A coordinate is read from the hidden state before the final norm, encoded by Fourier features
(arXiv 2006.10739) and fed back in place of a token. Four tiny networks, so plain numpy. Reference:
what the family names, region.py and `_generate_points`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgevlm.answer import Box, Point
from edgevlm.errors import PromptError
from edgevlm.prompt import Place

if TYPE_CHECKING:
    from edgevlm.language import Language

Spot = tuple[float, float] | tuple[float, float, float, float]  # (x, y), or a box by its corners
_OCTAVES = 10.0  # logarithmic sizes go from 2^-10 to 1
_LAST_BIN = 1023  # whose size is 1; the reference does not count the bins


class Region:
    def __init__(self, weights: Mapping[str, NDArray[np.float32]], log_sizes: bool) -> None:
        """`weights` are region.npz: matrices [out, in] as torch's Linear keeps them."""
        self._weights = weights
        self._log_sizes = log_sizes

    def coordinate(self, hidden: NDArray[np.float32]) -> float:
        """0 to 1, from float32 [n_embd]."""
        logits = self._decode("coord_decoder", hidden)
        return int(logits.argmax()) / len(logits)

    def size(self, hidden: NDArray[np.float32]) -> tuple[float, float]:
        """Width and height, 0 to 1, from float32 [n_embd]."""
        logits = self._decode("size_decoder", hidden).reshape(2, -1)
        n_bins = logits.shape[1]
        width, height = (
            2.0 ** (bin_ / _LAST_BIN * _OCTAVES - _OCTAVES) if self._log_sizes else bin_ / n_bins
            for bin_ in (int(row.argmax()) for row in logits)
        )
        return width, height

    def rows(self, place: Place) -> NDArray[np.float32]:
        """A place as the model reads it: x, y and for a box its size, float32 [2 or 3, n_embd]."""
        rows = [self.coordinate_row(place.x), self.coordinate_row(place.y)]
        if place.size is not None:
            rows.append(self.size_row(*place.size))
        return np.concatenate(rows)

    def coordinate_row(self, value: float) -> NDArray[np.float32]:
        """float32 [1, n_embd]"""
        return self._encode("coord", np.array([[value]], np.float32))

    def size_row(self, width: float, height: float) -> NDArray[np.float32]:
        """float32 [1, n_embd]"""
        return self._encode("size", np.array([[width, height]], np.float32))

    def _encode(self, kind: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        angles = np.float32(2 * np.pi) * values @ self._weights[f"{kind}_features"]
        features = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
        name = f"{kind}_encoder"
        row: NDArray[np.float32] = features @ self._weights[f"{name}.weight"].T
        return row + self._weights[f"{name}.bias"]

    def _decode(self, name: str, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        inner = self._weights[f"{name}.fc1.weight"] @ hidden + self._weights[f"{name}.fc1.bias"]
        inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
        logits: NDArray[np.float32] = self._weights[f"{name}.fc2.weight"] @ inner
        return logits + self._weights[f"{name}.fc2.bias"]


def find(
    language: Language, end_ids: Sequence[int], *, sized: bool, most: int, at_least: int = 0
) -> list[Place]:
    """Boxes (`sized`) or points that the model names after the prompt that was fed.

    After each place the model's next token says whether there is another; always greedy, as the
    reference. Ends early where the context does. The first `at_least` are taken unasked.

    Raises:
        Cancelled, BackendError: while decoding.
    """
    region = language.region
    places: list[Place] = []
    while len(places) < most and language.room > 3:
        if len(places) >= at_least and int(language.logits().argmax()) in end_ids:
            break
        x = region.coordinate(language.hidden())
        language.extend(region.coordinate_row(x))
        y = region.coordinate(language.hidden())
        language.extend(region.coordinate_row(y))
        size = None
        if sized:
            size = region.size(language.hidden())
            language.extend(region.size_row(*size))
        places.append(Place(x, y, size))
    return places


def place(spot: Spot) -> Place:
    """What a caller points at; raises PromptError for values outside 0 to 1."""
    if len(spot) not in (2, 4) or not all(0 <= value <= 1 for value in spot):
        raise PromptError(f"{spot} is neither a point (x, y) nor a box of four shares, 0 to 1")
    if len(spot) == 2:
        return Place(spot[0], spot[1])
    x_min, y_min, x_max, y_max = spot
    if x_max < x_min or y_max < y_min:
        raise PromptError(f"{spot} must be (x_min, y_min, x_max, y_max)")
    return Place((x_min + x_max) / 2, (y_min + y_max) / 2, (x_max - x_min, y_max - y_min))


def box(found: Place, height_px: int, width_px: int) -> Box:
    """A found place with a size, on a picture of that many pixels."""
    assert found.size is not None
    width, height = found.size
    left, right = found.x - width / 2, found.x + width / 2
    top, bottom = found.y - height / 2, found.y + height / 2
    x0, x1 = (min(max(round(x * width_px), 0), width_px) for x in (left, right))
    y0, y1 = (min(max(round(y * height_px), 0), height_px) for y in (top, bottom))
    return Box(left, top, right, bottom, (x0, y0, x1, y1))


def point(found: Place, height_px: int, width_px: int) -> Point:
    """A found place on a picture of that many pixels."""
    return Point(found.x, found.y, (int(found.x * width_px), int(found.y * height_px)))
