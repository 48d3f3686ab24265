"""How much sooner is the first word when a photo was seen before, or asked about before?

A new photo, one whose embeddings are on disk or in memory, and a second question about the photo
of the first take turns; another photo is asked about in between. Answers must not differ.

    python benchmarks/cache.py [MODEL] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import common

import edgevlm
from edgevlm.answer import Answer
from edgevlm.bench import photo

NEW, ON_DISK, IN_MEMORY, SECOND = "new photo", "on disk", "in memory", "second question"
QUESTIONS = ("What is in the picture?", "Which colours do you see?")
STAGES = ("prefill", "first_token")


def turn(model: str | None, threads: int, files: list[Path]) -> dict[str, Answer]:
    """Each case once, with a photo that nobody saw before."""
    new, other = files

    def ask(vlm: edgevlm.VLM, file: Path, question: str) -> Answer:
        return vlm.ask(file, question, max_tokens=16, repetition_stop=False)

    answers = {}
    with edgevlm.load(model, threads=threads) as vlm:
        ask(vlm, other, QUESTIONS[0])
        answers[NEW] = ask(vlm, new, QUESTIONS[0])
        answers[SECOND] = ask(vlm, new, QUESTIONS[1])
        ask(vlm, other, QUESTIONS[0])
        answers[IN_MEMORY] = ask(vlm, new, QUESTIONS[0])
    with edgevlm.load(model, threads=threads) as vlm:
        ask(vlm, other, QUESTIONS[0])
        answers[ON_DISK] = ask(vlm, new, QUESTIONS[0])
    assert {case: answer.cache for case, answer in answers.items()} == {
        NEW: "miss", SECOND: "hit", IN_MEMORY: "hit", ON_DISK: "hit"
    }  # fmt: skip
    assert answers[NEW].text == answers[IN_MEMORY].text == answers[ON_DISK].text
    return answers


def main() -> None:
    parser = common.parser(__doc__, rounds=3)
    parser.add_argument("model", nargs="?")
    options = parser.parse_args()
    with edgevlm.load(options.model) as vlm:
        name, pixels = vlm.bundle.name, photo.pixels(None, vlm.layout)
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / "new.jpg", Path(scratch) / "other.jpg"]
        for _ in range(options.rounds):
            for file in files:
                photo.save_another(pixels, file)
            rounds.append(turn(options.model, options.threads, files))
    times = {
        f"{name}: {stage.replace('_', ' ')}": {
            case: statistics.median(getattr(r[case].timings, f"{stage}_ms") for r in rounds)
            for case in (NEW, ON_DISK, IN_MEMORY, SECOND)
        }
        for stage in STAGES
    }
    question = str(__doc__).splitlines()[0]
    common.publish(common.result(question, NEW, times, options), options)


if __name__ == "__main__":
    main()
