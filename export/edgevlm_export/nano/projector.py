"""Facts in, 37 soft tokens in the language model's embedding space out: float32 [n, 37, 576].

Names are spelled with the model's own token embeddings plus a learned offset for each slot, so a
name needs no training of its own; only the ways to be sure, faces and tones are learned vectors.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .facts import COLORS, MANY_FACES, FactsBatch, Tone, Verdict
from .names import NO_KIND, vocabulary

N_TOKENS = 37
NAME_SLOTS, KIND_SLOTS, GROUP_SLOTS = 6, 3, 1
VERDICT_SLOTS, FACE_SLOTS = 2, 2
BEFORE_SLOTS, AFTER_SLOTS = 5, 8
COLOR_SLOTS = 3  # main, other, background
ROLES = ("-", "weak", "worn")
# Words whose embeddings the learned vectors start from.
VERDICT_WORDS = (" plain empty", " unknown unsure", " seems maybe", " kind perhaps",
                 " probably likely", " surely certain")  # fmt: skip
FACE_WORDS = (" nobody none", " one person", " two people", " several people")
TONE_WORDS = (" normal", " gray", " dark", " bright")
# Constants around the facts. They are where the model learns how to answer; those behind the
# facts can attend to them, which makes room to work out an answer before the question is read.
BEFORE_WORDS = "Facts about one photo:"
AFTER_WORDS = " Answer the question about this photo in short."

Encode = Callable[[str], list[int]]


class Projector(nn.Module):
    spelling: Tensor
    name_rows: Tensor
    kind_rows: Tensor
    group_rows: Tensor
    color_rows: Tensor
    role_of: Tensor

    def __init__(self, embeddings: Tensor, encode: Encode) -> None:
        """`embeddings` is the language model's float32 [vocabulary, width] table."""
        super().__init__()
        words = vocabulary()
        tables = {
            "name_rows": _spell([c.name for c in words.concepts], NAME_SLOTS, encode),
            "kind_rows": _spell([_kind(c.kind) for c in words.concepts], KIND_SLOTS, encode),
            "group_rows": _spell([c.group for c in words.concepts], GROUP_SLOTS, encode),
            "color_rows": _spell([*COLORS, ""], 1, encode),
        }
        # Row 0 of `spelling` stands for an empty slot and is replaced by a learned vector.
        used = sorted({int(t) for table in tables.values() for t in table.flatten()})
        position = {token: i for i, token in enumerate(used)}
        spelling = embeddings[torch.tensor([max(token, 0) for token in used])]
        # Not persistent: a checkpoint holds what was learned, and outlives changes of the names.
        self.register_buffer("spelling", spelling, persistent=False)
        for name, table in tables.items():
            table.apply_(lambda token: position[int(token)])
            self.register_buffer(name, table, persistent=False)
        roles = torch.tensor([ROLES.index(c.role) for c in words.concepts])
        self.register_buffer("role_of", roles, persistent=False)

        def start(texts: Sequence[str], slots: int) -> nn.Parameter:
            tokens = torch.tensor([encode(text)[:slots] for text in texts])
            return nn.Parameter(embeddings[tokens].clone())  # float32 [texts, slots, width]

        width = embeddings.shape[1]
        self.before = start([BEFORE_WORDS], BEFORE_SLOTS)
        self.after = start([AFTER_WORDS], AFTER_SLOTS)
        self.verdict = start(VERDICT_WORDS, VERDICT_SLOTS)
        self.faces = start(FACE_WORDS, FACE_SLOTS)
        self.tone = start(TONE_WORDS, 1)
        self.role = nn.Parameter(torch.zeros(len(ROLES), 1, width))
        self.empty = nn.Parameter(embeddings[encode("\n")[0]].clone())
        spelled = GROUP_SLOTS + KIND_SLOTS + 2 * NAME_SLOTS + COLOR_SLOTS
        self.offset = nn.Parameter(torch.zeros(spelled, width))
        assert len(VERDICT_WORDS) == len(Verdict) and len(TONE_WORDS) == len(Tone)
        assert len(FACE_WORDS) == MANY_FACES + 1

    def forward(self, facts: FactsBatch) -> Tensor:
        rows = torch.cat(
            [
                self.group_rows[facts.first],
                self.kind_rows[facts.first],
                self.name_rows[facts.first],
                self.name_rows[facts.second],
                self.color_rows[facts.color],
                self.color_rows[facts.other_color],
                self.color_rows[facts.background],
            ],
            dim=1,
        )  # int64 [n, 19]
        spelled = torch.where((rows == 0)[..., None], self.empty, self.spelling[rows]) + self.offset
        group, rest = spelled[:, :GROUP_SLOTS], spelled[:, GROUP_SLOTS:]
        return torch.cat(
            [
                self.before.expand(rows.shape[0], -1, -1),
                self.verdict[facts.verdict],
                group + self.role[self.role_of[facts.first]],
                rest,
                self.faces[facts.faces],
                self.tone[facts.tone],
                self.after.expand(rows.shape[0], -1, -1),
            ],
            dim=1,
        )  # float32 [n, 37, width]


def _kind(kind: str) -> str:
    return "" if kind == NO_KIND else kind


def _spell(words: Sequence[str], slots: int, encode: Encode) -> Tensor:
    """Token ids, int64 [words, slots]; -1 in slots that a word leaves empty."""
    table = torch.full((len(words), slots), -1)
    for i, word in enumerate(words):
        tokens = encode(f" {word}")[:slots] if word else []
        table[i, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    return table
