"""The accurate gaze's arithmetic, held against the reference's written out word by word."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from edgevlm import gaze, region
from edgevlm.prompt import Place


def without_outliers(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """remove_outlier_points (vikhyat/moondream, moondream/torch/utils.py), in plain Python."""
    near = []
    for x, y in points:
        distances = sorted(math.hypot(x - a, y - b) for a, b in points)  # its own 0 comes first
        near.append(sum(distances[:2]) / 2)
    limit = 2.0 * statistics.median(near)
    return [point for point, distance in zip(points, near, strict=True) if distance <= limit]


@pytest.mark.parametrize("seed", range(20))
def test_gazes_agree_as_in_the_reference(seed: int) -> None:
    drawn = random.Random(seed)
    n_plain, n_mirrored = drawn.randint(3, 10), drawn.randint(3, 10)
    plain = [Place(drawn.gauss(0.3, 0.01), drawn.gauss(0.6, 0.02)) for _ in range(n_plain)]
    mirrored = [Place(drawn.gauss(0.7, 0.01), drawn.gauss(0.6, 0.02)) for _ in range(n_mirrored)]
    plain[0] = Place(drawn.random(), drawn.random())
    points = [(p.x, p.y) for p in plain] + [(1 - p.x, p.y) for p in mirrored]
    found = gaze.agreed(plain, mirrored)
    if len(points) < 10:
        assert found is None
        return
    kept = without_outliers(points)
    assert found is not None
    assert (found.x, found.y) == pytest.approx(
        tuple(sum(values) / len(kept) for values in zip(*kept, strict=True)), abs=1e-12
    )


def test_an_outlier_is_left_out() -> None:
    places = [Place(0.25 + n / 1000, 0.5) for n in range(10)] + [Place(0.9, 0.9)]
    found = gaze.agreed(places, [])
    assert found is not None
    assert (found.x, found.y) == pytest.approx((0.2545, 0.5))


def test_one_and_the_same_place_is_no_outlier() -> None:
    assert gaze.agreed([Place(0.25, 0.5)] * 10, []) == Place(0.25, 0.5)


def test_eyes_are_drawn_as_in_the_reference() -> None:
    face = {"x_min": 0.2, "y_min": 0.1, "x_max": 0.4, "y_max": 0.5}
    random.seed(5)
    expected = [
        (random.uniform(face["x_min"], face["x_max"]), random.uniform(face["y_min"], face["y_max"]))
        for _ in range(20)
    ]
    plain, mirrored = gaze.eyes(region.place((0.2, 0.1, 0.4, 0.5)), 5)
    found = [(eye.x, eye.y) for eye in plain] + [(1 - eye.x, eye.y) for eye in mirrored]
    assert len(plain) == len(mirrored) == 10
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-12)
    assert gaze.eyes(region.place((0.2, 0.1, 0.4, 0.5)), 6) != (plain, mirrored)
