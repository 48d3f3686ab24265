"""Token bytes → text, against bytes.decode and str.find on the whole answer."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgevlm.answer import FinishReason
from edgevlm.text import Spoken, is_loop

PROSE = """
A woman in a red coat stands on a wet street and holds a black umbrella. Behind her there are two
parked cars, a white van and a row of brick houses with green doors. The sky is grey, the street is
wet, and the light of a street lamp falls on the wet stones. On the left side of the picture a man
in a blue jacket walks a small brown dog; on the right side of the picture a child in a yellow
raincoat jumps into a puddle. There are no leaves on the trees, so it may be late in the autumn.
"""
REFRAIN = """
Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a
dream. Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is
but a dream.
"""
NUMBERED = "\n".join(
    f"{n}. A {colour} car on the road."
    for n, colour in enumerate(
        ["red", "blue", "green", "white", "black", "grey", "yellow", "silver"], 1
    )
)
TABLE = "| year | sold | left |\n|---|---|---|\n" + "\n".join(
    f"| {1990 + n} | {n * n % 17} | {100 - 3 * n} |" for n in range(30)
)
BOXES = json.dumps([{"label": "car", "box": [n, n + 10, 2 * n, 20]} for n in range(0, 90, 7)])


def tokens(
    parts: Iterable[bytes], reason: FinishReason = "stop"
) -> Generator[tuple[int, bytes], None, FinishReason]:
    yield from enumerate(parts)
    return reason


def cut(data: bytes, at: Iterable[int]) -> list[bytes]:
    borders = [0, *sorted({n % (len(data) + 1) for n in at}), len(data)]
    return [data[start:end] for start, end in pairwise(borders)]


def words(text: str) -> list[int]:
    """About what tokenizers make: words, numbers by digit, punctuation."""
    found = re.findall(r" ?[A-Za-z]+|\d|\s|[^\w\s]+", text)
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(found))}
    return [vocabulary[word] for word in found]


@given(st.text(), st.lists(st.integers(0, 1000)))
def test_text_cut_anywhere_comes_out_whole(text: str, at: list[int]) -> None:
    spoken = Spoken(tokens(cut(text.encode(), at)))
    assert "".join(spoken) == text == spoken.text


@given(st.binary(), st.lists(st.integers(0, 1000)))
def test_bytes_that_are_not_utf_8_are_replaced_as_python_does(data: bytes, at: list[int]) -> None:
    spoken = Spoken(tokens(cut(data, at)))
    assert "".join(spoken) == data.decode("utf-8", "replace")


def test_every_piece_is_made_of_whole_characters() -> None:
    pieces = list(Spoken(tokens(bytes([byte]) for byte in "aé写😀".encode())))
    assert pieces == ["a", "é", "写", "😀"]


def test_a_character_cut_off_by_the_end_is_replaced() -> None:
    assert "".join(Spoken(tokens([b"ab", "😀".encode()[:3]], "length"))) == "ab\ufffd"


@given(
    st.text("ab\u00e9", max_size=30),
    st.lists(st.text("ab\u00e9", min_size=1, max_size=6), max_size=3),
    st.lists(st.integers(0, 1000)),
)
def test_the_stop_that_is_complete_first_ends_the_text_however_it_is_cut(
    text: str, stop: list[str], at: list[int]
) -> None:
    first = min(((text.find(s) + len(s), text.find(s)) for s in stop if s in text), default=None)
    spoken = Spoken(tokens(cut(text.encode(), at), "length"), stop, repetition_stop=False)
    assert "".join(spoken) == (text if first is None else text[: first[1]])
    assert spoken.finish_reason == ("length" if first is None else "stop")


def test_a_stop_inside_a_longer_one_ends_the_text_however_it_is_cut() -> None:
    assert "".join(Spoken(tokens([b"xabcd"]), ["abcd", "bc"])) == "xa"
    assert "".join(Spoken(tokens([b"xab", b"c", b"d"]), ["abcd", "bc"])) == "xa"


def test_the_beginning_of_a_stop_is_held_back_and_no_more() -> None:
    pieces = iter(Spoken(tokens([b"one ", b"<", b"e", b"n", b"x", b" <end"]), ["<end>"]))
    assert next(pieces) == "one "
    assert next(pieces) == "<enx"
    assert next(pieces) == " "
    assert next(pieces) == "<end"  # the answer ended: it was no stop string


def test_what_is_held_back_may_be_all_but_one_character_of_the_stop() -> None:
    spoken = Spoken(tokens([b"aaaa", b"aaaa", b"b"]), ["aaaaaaaaa"])
    assert list(spoken) == ["aaaaaaaab"]


def test_a_stop_at_the_very_end_is_not_part_of_the_text() -> None:
    spoken = Spoken(tokens([b"yes", b".", b"\n", b"\n"], "length"), ["\n\n"])
    assert "".join(spoken) == "yes."
    assert spoken.finish_reason == "stop"


def test_a_stop_at_the_very_beginning_leaves_nothing() -> None:
    assert list(Spoken(tokens([b"STOP", b" more"]), ["STOP"])) == []


def test_no_token_is_taken_after_a_stop() -> None:
    def endless() -> Generator[tuple[int, bytes], None, FinishReason]:
        yield from enumerate([b"a", b"b"])
        raise AssertionError("a third token was asked for")

    spoken = Spoken(endless(), ["b"])
    assert "".join(spoken) == "a"
    assert spoken.n_tokens == 2


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_without_stop_or_loop_the_reason_is_that_of_the_tokens(reason: FinishReason) -> None:
    spoken = Spoken(tokens([b"a", b"", b"b"], reason))
    assert "".join(spoken) == "ab"
    assert (spoken.finish_reason, spoken.n_tokens) == (reason, 3)


def test_no_tokens_are_an_empty_answer() -> None:
    spoken = Spoken(tokens([]))
    assert list(spoken) == []
    assert (spoken.finish_reason, spoken.n_tokens) == ("stop", 0)


def test_empty_pieces_are_not_yielded() -> None:
    assert list(Spoken(tokens([b"", b"\xc3", b"\xa9", b""]))) == ["é"]


def looping() -> Generator[tuple[int, bytes], None, FinishReason]:
    yield 1, b"a "
    for _ in range(500):
        yield 2, b"red "
        yield 3, b"car "
    return "length"


def test_a_loop_ends_the_answer() -> None:
    spoken = Spoken(looping())
    assert "".join(spoken).startswith("a red car red car ")
    assert spoken.finish_reason == "repetition"
    assert spoken.n_tokens < 30


def test_a_loop_goes_on_if_it_may() -> None:
    spoken = Spoken(looping(), repetition_stop=False)
    assert "".join(spoken) == "a " + "red car " * 500
    assert (spoken.finish_reason, spoken.n_tokens) == ("length", 1001)


@pytest.mark.parametrize("unit", range(1, 65))
@pytest.mark.parametrize("before", [0, 7])
def test_a_loop_of_any_unit_is_found_once_it_is_long_enough(unit: int, before: int) -> None:
    copies = max(3, -(-24 // unit))  # three copies and 24 tokens at least
    start = list(range(1000, 1000 + before))
    assert is_loop([*start, *list(range(unit)) * copies])
    assert is_loop([*start, *(list(range(unit)) * (copies + 2))[: unit * copies + unit // 2]])
    assert not is_loop([*start, *(list(range(unit)) * copies)[1:]])


def test_a_unit_longer_than_64_tokens_is_no_loop() -> None:
    assert not is_loop(list(range(65)) * 4)


def test_one_other_token_breaks_a_loop() -> None:
    assert not is_loop([*[1] * 23, 2, *[1] * 23])


@pytest.mark.parametrize(
    "said",
    [PROSE, REFRAIN, NUMBERED, TABLE, BOXES],
    ids=["prose", "refrain", "list", "table", "boxes"],
)
def test_what_people_write_is_no_loop(said: str) -> None:
    sequence = words(said)
    assert not any(is_loop(sequence[:n]) for n in range(len(sequence) + 1))


@given(st.lists(st.integers(0, 2), max_size=90))
def test_a_loop_is_what_the_definition_says(sequence: Sequence[int]) -> None:
    def repeats(unit: int) -> bool:
        copies = next(n for n in range(3, 100) if n * unit >= 24)
        last = sequence[-unit:]
        return len(sequence) >= copies * unit and all(
            sequence[len(sequence) - (n + 1) * unit :][:unit] == last for n in range(copies)
        )

    assert is_loop(sequence) == any(repeats(unit) for unit in range(1, 65))
