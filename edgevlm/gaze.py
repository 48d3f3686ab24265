"""The accurate way to follow a gaze: asked from many places in the face, and in the mirror.

Pure arithmetic; the engine asks. Reference: what the family names, `detect_gaze` with
prioritize_accuracy, and `remove_outlier_points`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from edgevlm.prompt import Place

N_EACH = 10  # times that either picture is asked about
_N_NEAREST = 2  # a point itself is one of them
_FURTHEST = 2.0  # times the median distance


def eyes(face: Place, seed: int) -> tuple[list[Place], list[Place]]:
    """N_EACH random places in the box of a face, and as many in the mirrored picture."""
    drawn = random.Random(seed)
    assert face.size is not None
    left, top = face.x - face.size[0] / 2, face.y - face.size[1] / 2
    right, bottom = face.x + face.size[0] / 2, face.y + face.size[1] / 2

    def place() -> tuple[float, float]:
        return drawn.uniform(left, right), drawn.uniform(top, bottom)

    plain = [Place(*place()) for _ in range(N_EACH)]
    return plain, [Place(1 - x, y) for x, y in (place() for _ in range(N_EACH))]


def agreed(plain: Sequence[Place], mirrored: Sequence[Place]) -> Place | None:
    """What most gazes point at: the mean of those found without the outliers.

    None where fewer than half of the questions found a target.
    """
    found = [(p.x, p.y) for p in plain] + [(1 - p.x, p.y) for p in mirrored]
    if len(found) < N_EACH:
        return None
    points = np.array(found)  # float64 [n, 2]
    apart = np.sqrt(((points[:, np.newaxis] - points) ** 2).sum(axis=-1))
    nearest = np.sort(apart, axis=1)[:, :_N_NEAREST].mean(axis=1)
    x, y = points[nearest <= _FURTHEST * np.median(nearest)].mean(axis=0)
    return Place(float(x), float(y))
