"""A seed in, random facts and short conversations about them out: all of nano's training data.

No image and no caption is needed: the tower's facts are a handful of integers, so every
combination that photos can produce can be drawn directly.
"""

import random
from functools import cache

from .facts import COLORS, MANY_FACES, NO_COLOR, Facts, Tone, Verdict
from .names import NO_KIND, vocabulary
from .questions import ask

VERDICTS = {Verdict.SURE: 40, Verdict.PROBABLY: 20, Verdict.KIND: 14, Verdict.GROUP: 8,
            Verdict.UNSURE: 14, Verdict.PLAIN: 4}  # fmt: skip
TURNS = {1: 80, 2: 20}
DOG_WEIGHT = 0.35  # 118 of 992 concepts are dog breeds; photos have fewer


@cache
def _weights() -> tuple[float, ...]:
    return tuple(DOG_WEIGHT if c.kind == "dog" else 1.0 for c in vocabulary().concepts)


def _pick(weights: dict[int, int], rng: random.Random) -> int:
    return rng.choices(list(weights), list(weights.values()))[0]


def draw(rng: random.Random) -> Facts:
    concepts = vocabulary().concepts
    verdict = _pick({int(v): w for v, w in VERDICTS.items()}, rng)
    while True:
        first = rng.choices(range(len(concepts)), _weights())[0]
        second = _second(first, verdict, rng)
        if second is not None:
            break
    worn = concepts[first].role == "worn" or concepts[first].group == "person"
    faces = rng.choice((1, 1, 1, 2, MANY_FACES)) if rng.random() < (0.5 if worn else 0.22) else 0
    tone = rng.choices(list(Tone), (70, 8, 11, 11))[0]
    color, other, background = (rng.randrange(len(COLORS)) for _ in range(3))
    single = other == color or rng.random() < 0.3
    mixed = rng.random() < 0.4
    return Facts(verdict, first, second, faces, color, NO_COLOR if single else other,
                 NO_COLOR if mixed else background, tone)  # fmt: skip


def _second(first: int, verdict: int, rng: random.Random) -> int | None:
    """Another concept: of the same kind or group where the verdict says so; None if impossible."""
    concepts = vocabulary().concepts
    c = concepts[first]
    others = [i for i in range(len(concepts)) if i != first]
    near = [i for i in others if c.kind != NO_KIND and concepts[i].kind == c.kind]
    same_group = [i for i in others if concepts[i].group == c.group]
    if verdict == Verdict.KIND:
        pool = near
    elif verdict == Verdict.GROUP:
        pool = [] if c.group == "object" else same_group
    else:
        pool = rng.choice((near, same_group, others)) or others
    return rng.choice(pool) if pool else None


def conversation(f: Facts, rng: random.Random) -> list[tuple[str, str]]:
    """One or two questions about a photo, with answers."""
    return [ask(f, rng) for _ in range(_pick(TURNS, rng))]
