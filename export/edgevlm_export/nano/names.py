"""What nano can name: classes.tsv in, a vocabulary of concepts, kinds and groups out.

classes.tsv has one row for each ImageNet-1k class. Names start from WordNet 3.0 lemmas, kinds and
groups from its hypernyms; both were then edited by hand into words that people use. Classes with
one name (three breeds of tabby cat) are one concept, so that their probabilities add up.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

NO_KIND = "-"
_MASS_NOUNS = {"fabric", "sports equipment", "corn", "bread", "food", "glasses", "guacamole",
               "chocolate sauce", "clear soup", "clothing"}  # fmt: skip
_SAID_WITH_A = ("uni", "eu", "one")
_SAID_WITH_AN = ("a", "e", "i", "o", "u", "hour")
GROUP_NOUN = {"instrument": "musical instrument", "clothing": "piece of clothing"}


@dataclass(frozen=True)
class Concept:
    name: str
    kind: str  # a hypernym that says something ("dog"), or NO_KIND
    group: str  # one of GROUPS
    role: str  # "worn" clothes, "weak" classes that textures and drawings fall into, or "-"


@dataclass(frozen=True)
class Vocabulary:
    concepts: tuple[Concept, ...]
    kinds: tuple[str, ...]  # kinds[0] is NO_KIND
    groups: tuple[str, ...]
    concept_of_class: tuple[int, ...]  # one for each ImageNet class, in ImageNet's order


@cache
def vocabulary() -> Vocabulary:
    rows = files(__package__).joinpath("classes.tsv").read_text(encoding="utf-8").splitlines()[1:]
    by_name: dict[str, Concept] = {}
    names = []
    for row in rows:
        _index, _synset, name, kind, group, role = row.split("\t")
        by_name.setdefault(name, Concept(name, kind, group, role))
        names.append(name)
    position = {name: i for i, name in enumerate(by_name)}
    concepts = tuple(by_name.values())
    kinds = (NO_KIND, *sorted({c.kind for c in concepts} - {NO_KIND}))
    groups = tuple(sorted({c.group for c in concepts}))
    return Vocabulary(concepts, kinds, groups, tuple(position[name] for name in names))


def group_noun(group: str) -> str:
    return GROUP_NOUN.get(group, group)


def with_article(noun: str) -> str:
    if noun in _MASS_NOUNS:
        return noun
    sound = noun.lower()
    vowel = sound.startswith(_SAID_WITH_AN) and not sound.startswith(_SAID_WITH_A)
    return f"{'an' if vowel else 'a'} {noun}"
