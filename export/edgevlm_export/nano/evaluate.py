"""Photos with answer keys in, a table of right, hedged and wrong answers out.

The rules are mechanical: an answer is right when it contains an accepted word of the key, "sure"
when it contains no word of doubt. The photos and what was never trained on them: see README.md.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import edgevlm

from .names import with_article

DOUBT = re.compile(r"\b(probably|perhaps|may be|hard to tell|not sure|seems|no clear subject)\b")
YES = re.compile(r"^(Yes|Probably|I think so)\b")
NO = re.compile(r"^(No\b|I do not see)")
CANNOT = "I cannot"
REFUSED = ("What does the text say?", "How many objects are there?", "Where is it in the picture?",
           "What is happening?", "Where was this photo taken?")  # fmt: skip
SEED = 1


@dataclass(frozen=True)
class Key:
    photo: Path
    names: tuple[str, ...]  # any of these words is the specific name
    hypernyms: tuple[str, ...]
    in_vocabulary: bool  # ImageNet has a class for it


@dataclass
class Score:
    total: int = 0
    name: int = 0
    hypernym: int = 0  # name or hypernym
    sure: int = 0
    sure_wrong: int = 0  # sure, and neither name nor hypernym

    def row(self, title: str) -> str:
        cells = (self.name, self.hypernym, self.sure, self.sure_wrong, self.total)
        return f"| {title} | " + " | ".join(str(cell) for cell in cells) + " |"


def run(model: str, folders: dict[str, Path], threads: int, verbose: bool) -> None:
    with edgevlm.load(model, threads=threads) as vlm:
        judge = Judge(vlm, verbose)
        keys = {name: list(read_key(name, folder)) for name, folder in folders.items()}
        print("| describe | name | or hypernym | sure | sure but wrong | photos |")
        print("|---|---|---|---|---|---|")
        for name, photos in keys.items():
            known = [key for key in photos if key.in_vocabulary]
            print(judge.naming(known).row(f"{name} within ImageNet's vocabulary"))
            print(judge.naming(photos).row(f"all {name}"))
        unclear = list(read_key("unclear", folders["scenes"]))
        print(judge.naming(unclear).row("without a subject it could name"))
        print()
        known = [key for photos in keys.values() for key in photos if key.in_vocabulary]
        judge.presence(known)
        judge.colors(list(read_key("colors", folders["stamps"])))
        judge.refusals(known[::8])
        print(f"ended by themselves: {judge.ended} of {judge.asked} answers")


def read_key(name: str, folder: Path) -> Iterator[Key]:
    table = files(__package__).joinpath(f"key_{name}.tsv").read_text(encoding="utf-8")
    for line in table.splitlines()[1:]:
        photo, names, hypernyms, known = line.split("\t")
        yield Key(folder / photo, _words(names), _words(hypernyms), known == "yes")


def _words(cell: str) -> tuple[str, ...]:
    return () if cell == "-" else tuple(cell.lower().split("|"))


def mentions(text: str, words: tuple[str, ...]) -> bool:
    return any(word in text.lower() for word in words)


def is_sure(text: str) -> bool:
    return DOUBT.search(text) is None


class Judge:
    def __init__(self, vlm: edgevlm.VLM, verbose: bool) -> None:
        self.vlm = vlm
        self.verbose = verbose
        self.asked = 0
        self.ended = 0
        self._answers: dict[tuple[Path, str], str] = {}

    def ask(self, photo: Path, question: str) -> str:
        if (photo, question) not in self._answers:
            answer = self.vlm.ask(photo, question)
            self.asked += 1
            self.ended += answer.finish_reason == "stop"
            self._answers[photo, question] = answer.text
            if self.verbose:
                print(f"{photo.name}: {question} → {answer.text}")
        return self._answers[photo, question]

    def naming(self, keys: list[Key]) -> Score:
        score = Score()
        for key in keys:
            text = self.ask(key.photo, self.vlm.question_for("normal"))
            named = mentions(text, key.names)
            right = named or mentions(text, key.hypernyms)
            score.total += 1
            score.name += named
            score.hypernym += right
            score.sure += is_sure(text)
            score.sure_wrong += is_sure(text) and not right
        return score

    def presence(self, keys: list[Key]) -> None:
        """Balanced: each photo is asked for what it shows and for something of another key."""
        rng = random.Random(SEED)
        yes = no = undecided = 0
        for key in keys:
            words = {*key.names, *key.hypernyms}
            strangers = [k for k in keys if words.isdisjoint(k.names + k.hypernyms)]
            other = rng.choice(strangers).names[0]
            there = self.ask(key.photo, f"Is there {with_article(key.names[0])} in this picture?")
            absent = self.ask(key.photo, f"Is there {with_article(other)} in this picture?")
            yes += YES.match(there) is not None
            no += NO.match(absent) is not None
            undecided += sum(not YES.match(text) and not NO.match(text) for text in (there, absent))
        print(f"is there …: {yes} of {len(keys)} seen, {no} of {len(keys)} rightly denied, "
              f"{undecided} undecided")  # fmt: skip

    def colors(self, keys: list[Key]) -> None:
        right = sum(mentions(self.ask(key.photo, "What color is it?"), key.names) for key in keys)
        print(f"color: {right} of {len(keys)}")

    def refusals(self, keys: list[Key]) -> None:
        asked = [(key.photo, question) for key in keys for question in REFUSED]
        honest = sum(self.ask(*pair).startswith(CANNOT) for pair in asked)
        print(f"'I cannot …' where it cannot: {honest} of {len(asked)}")
