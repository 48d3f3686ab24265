"""Facts in, English out: the rules by which nano's training answers are written.

Each function words one aspect of the facts. How sure the words sound follows the verdict, and a
fact that nano does not have (text, numbers, places, actions) is never invented.
"""

from .facts import COLORS, MANY_FACES, NO_COLOR, Facts, Tone, Verdict
from .names import NO_KIND, Concept, group_noun, vocabulary, with_article

PEOPLE = ("", "a person", "two people", "several people")


def first(f: Facts) -> Concept:
    return vocabulary().concepts[f.first]


def second(f: Facts) -> Concept:
    return vocabulary().concepts[f.second]


def guesses(f: Facts) -> str:
    return f"{with_article(first(f).name)} or {with_article(second(f).name)}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _has_kind(c: Concept) -> bool:
    """Whether "a kind of ..." tells more than the name: of a beagle yes, of a tabby cat no."""
    living = c.group in ("animal", "food", "plant", "fungus", "vehicle")
    return living and c.kind != NO_KIND and c.kind not in c.name


def _worn(c: Concept, name: str) -> str:
    return f"{name}, perhaps worn by someone" if c.role == "worn" else name


def subject(f: Facts, with_kind: bool = False) -> str:
    """The sentence every description begins with."""
    if f.faces:
        return _subject_with_people(f)
    c = first(f)
    if f.verdict == Verdict.PLAIN:
        return f"The picture is almost plain {COLORS[f.color]}, with no clear subject."
    if f.verdict == Verdict.UNSURE:
        return f"It is hard to tell what the photo shows. It may be {guesses(f)}."
    if f.verdict == Verdict.GROUP:
        kind = with_article(group_noun(c.group))
        return f"The photo seems to show {kind}, perhaps {guesses(f)}."
    if f.verdict == Verdict.KIND:
        return f"The photo shows {with_article(c.kind)}, perhaps {guesses(f)}."
    name = _worn(c, with_article(c.name))
    if f.verdict == Verdict.PROBABLY:
        if _has_kind(c):
            return f"The photo shows {with_article(c.kind)}, probably {name}."
        return f"The photo probably shows {name}."
    if with_kind and _has_kind(c):
        name += f", a kind of {c.kind}"
    return f"The photo shows {name}."


def _subject_with_people(f: Facts) -> str:
    people, c = PEOPLE[f.faces], first(f)
    name = with_article(c.name)
    if f.verdict >= Verdict.PROBABLY:
        if c.group == "person":
            return f"The photo shows {people}, perhaps {name}."
        if c.role == "worn":
            return f"The photo shows {people}, perhaps wearing {name}."
        joint = "and" if f.verdict == Verdict.SURE else "and probably"
        return f"The photo shows {people} {joint} {name}."
    if f.verdict == Verdict.KIND:
        return f"The photo shows {people} and perhaps {with_article(c.kind)}."
    return f"The photo shows {people}. I am not sure what else is in it."


def colors(f: Facts, with_background: bool = False) -> str:
    if f.tone == Tone.MONOCHROME:
        return "It is a black-and-white picture."
    if f.other_color == NO_COLOR:
        text = f"The main color is {COLORS[f.color]}"
    else:
        text = f"The main colors are {COLORS[f.color]} and {COLORS[f.other_color]}"
    said = (f.color, f.other_color, NO_COLOR)
    if with_background and f.background not in said:
        text += f", on a mostly {COLORS[f.background]} background"
    return text + "."


def tone(f: Facts) -> str:
    return {
        Tone.NORMAL: "It is neither very dark nor very bright.",
        Tone.MONOCHROME: "It is a black-and-white picture.",
        Tone.DARK: "The picture is dark.",
        Tone.BRIGHT: "The picture is bright.",
    }[Tone(f.tone)]


def faces(f: Facts) -> str:
    if f.faces == 0:
        return "I do not see any faces."
    if f.faces == 1:
        return "I see one face."
    if f.faces < MANY_FACES:
        return "I see two faces."
    return "I see several faces."


def confidence(f: Facts) -> str:
    c = first(f)
    if f.verdict == Verdict.PLAIN:
        return "There is not enough in the picture to name a subject."
    if f.verdict == Verdict.SURE:
        return "I am quite sure about this."
    if f.verdict == Verdict.PROBABLY:
        return f"I am not certain: it could also be {with_article(second(f).name)}."
    if f.verdict == Verdict.KIND:
        return f"I am quite sure that it is {with_article(c.kind)}, but not which one."
    if f.verdict == Verdict.GROUP:
        return "I am not sure what it is exactly."
    return "I am not sure at all."


def short(f: Facts) -> str:
    return subject(f)


def normal(f: Facts) -> str:
    said = subject(f, with_kind=True)
    return said if f.verdict == Verdict.PLAIN and not f.faces else f"{said} {colors(f)}"


def long(f: Facts) -> str:
    parts = [subject(f, with_kind=True)]
    if f.verdict != Verdict.UNSURE and not f.faces:
        parts.append(confidence(f))
    if f.verdict != Verdict.PLAIN or f.faces:
        parts.append(colors(f, with_background=True))
    if f.tone in (Tone.DARK, Tone.BRIGHT):
        parts.append(tone(f))
    return " ".join([*parts, faces(f)])


def caption(f: Facts) -> str:
    """A noun phrase without "The photo shows"."""
    c = first(f)
    if f.faces:
        sentence = _subject_with_people(f).split(".")[0]
        return _capital(sentence.removeprefix("The photo shows ")) + "."
    if f.verdict == Verdict.PLAIN:
        return f"A plain {COLORS[f.color]} picture."
    if f.verdict == Verdict.UNSURE:
        return f"Perhaps {guesses(f)}."
    if f.verdict == Verdict.GROUP:
        return f"{_capital(with_article(group_noun(c.group)))}, perhaps {guesses(f)}."
    if f.verdict == Verdict.KIND:
        return f"{_capital(with_article(c.kind))}, perhaps {guesses(f)}."
    name = with_article(c.name)
    if f.verdict == Verdict.SURE:
        return f"{_capital(name)}."
    if _has_kind(c):
        return f"{_capital(with_article(c.kind))}, probably {name}."
    return f"Probably {name}."


def what(f: Facts) -> str:
    """In four words where the verdict allows it: "It is a beagle"."""
    c = first(f)
    if f.faces or f.verdict <= Verdict.UNSURE or c.role == "worn":
        return subject(f)
    name = with_article(c.name)
    if f.verdict == Verdict.GROUP:
        return f"It seems to be {with_article(group_noun(c.group))}, perhaps {guesses(f)}."
    if f.verdict == Verdict.KIND:
        return f"It is {with_article(c.kind)}, perhaps {guesses(f)}."
    if f.verdict == Verdict.SURE:
        return f"It is {name}."
    if _has_kind(c):
        return f"It is {with_article(c.kind)}, probably {name}."
    return f"It is probably {name}."


def which(f: Facts, asked: str) -> str:
    """Answer to "What kind of dog is it?"; `asked` is a kind, or the noun of a group."""
    c = first(f)
    name = with_article(c.name)
    fits = asked == c.kind or asked == group_noun(c.group)
    if not fits or f.verdict <= Verdict.UNSURE or (f.verdict == Verdict.GROUP and asked == c.kind):
        return absent(f, asked)
    if f.verdict in (Verdict.GROUP, Verdict.KIND):
        return f"It may be {guesses(f)}."
    return f"It is {name}." if f.verdict == Verdict.SURE else f"It is probably {name}."


def absent(f: Facts, asked: str) -> str:
    thing = with_article(asked)
    if f.verdict in (Verdict.GROUP, Verdict.UNSURE):
        return f"I do not see {thing}, but I am not sure. {subject(f)}"
    return f"No, I do not see {thing}. {subject(f)}"


def present(f: Facts, asked: str) -> str:
    """Answer to "Is there a dog?"; `asked` is a name, a kind or the noun of a group."""
    c, d = first(f), second(f)
    if f.verdict == Verdict.PLAIN:
        return absent(f, asked)
    named = asked == c.name or (f.verdict < Verdict.PROBABLY and asked == d.name)
    fits = asked == c.kind or asked == group_noun(c.group)
    if f.verdict == Verdict.UNSURE:
        return f"Perhaps. It may be {guesses(f)}." if named or fits else absent(f, asked)
    if named and f.verdict < Verdict.PROBABLY:
        return f"Perhaps. It may be {guesses(f)}."
    if f.verdict == Verdict.GROUP:
        if asked == group_noun(c.group):
            return f"I think so. It may be {guesses(f)}."
        return f"Perhaps. It may be {guesses(f)}." if fits else absent(f, asked)
    if not (named or fits):
        return absent(f, asked)
    if f.verdict == Verdict.PROBABLY:
        return f"Probably. It looks like {with_article(c.name)}."
    return f"Yes. {subject(f)}"


def people(f: Facts) -> str:
    """Answer to "Is there a person?"."""
    c = first(f)
    if f.faces:
        return f"Yes, I see {PEOPLE[f.faces]}."
    if f.verdict >= Verdict.KIND and c.group == "person":
        return f"Probably. {subject(f)}"
    if f.verdict >= Verdict.PROBABLY and c.role == "worn":
        return f"I do not see a face, but someone may be wearing {with_article(c.name)}."
    return "No, I do not see any faces in the picture."


def man_or_woman(f: Facts) -> str:
    if f.faces:
        return f"I see {PEOPLE[f.faces]}, but I cannot tell men from women."
    return people(f)


def people_count(f: Facts) -> str:
    if f.faces == MANY_FACES:
        return "I see several faces, but I cannot count them exactly."
    return faces(f)


def background(f: Facts) -> str:
    if f.tone == Tone.MONOCHROME:
        return "It is a black-and-white picture."
    if f.background == NO_COLOR:
        return "The background has no single main color."
    return f"The background is mostly {COLORS[f.background]}."


def monochrome(f: Facts) -> str:
    yes = f.tone == Tone.MONOCHROME
    return "Yes, it is a black-and-white picture." if yes else "No, the picture is in color."


def sure(f: Facts) -> str:
    if f.verdict == Verdict.SURE:
        return f"Yes. I am quite sure that I see {with_article(first(f).name)}."
    return f"No. {confidence(f)}" if f.verdict < Verdict.KIND else f"Not quite. {confidence(f)}"


def alternative(f: Facts) -> str:
    if f.verdict == Verdict.SURE:
        return f"I am quite sure that I see {with_article(first(f).name)}."
    if f.verdict == Verdict.PLAIN:
        return confidence(f)
    return f"It could also be {with_article(second(f).name)}."


def cannot(what_exactly: str) -> str:
    return f"I cannot {what_exactly}."
