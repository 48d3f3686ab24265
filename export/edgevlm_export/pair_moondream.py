"""Moondream's published pair: the release of 2024 that sees one crop.

The model's author wrote the two files (vikhyat/moondream at bdefcdd, create_gguf.py): the tower's
last block stands there twice, since llama.cpp's graph leaves one out, and its last norm is kept.
llama.cpp would split text by other rules than GPT-2's, so a tokenizer.json is made of the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import ReaderTensor, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from edgevlm.errors import BundleError

from . import bundle, crops, pair, releases
from .families import moondream
from .language_file import File

_BLOCK = r"vision.blocks.\1"
_NAMES = {
    r"v\.patch_embd\.(weight|bias)": r"vision.patch_emb.\1",
    r"v\.position_embd\.weight": "vision.pos_emb",
    r"v\.post_ln\.(\w+)": r"vision.post_ln.\1",
    r"v\.blk\.(\d+)\.attn_(q|k|v)\.(\w+)": rf"{_BLOCK}.attn.\2.\3",
    r"v\.blk\.(\d+)\.attn_out\.(\w+)": rf"{_BLOCK}.attn.proj.\2",
    r"v\.blk\.(\d+)\.ln([12])\.(\w+)": rf"{_BLOCK}.ln\2.\3",
    r"v\.blk\.(\d+)\.ffn_up\.(\w+)": rf"{_BLOCK}.mlp.fc1.\2",
    r"v\.blk\.(\d+)\.ffn_down\.(\w+)": rf"{_BLOCK}.mlp.fc2.\2",
    r"mm\.0\.(\w+)": r"vision.proj_mlp.fc1.\1",
    r"mm\.2\.(\w+)": r"vision.proj_mlp.fc2.\1",
}
_MERGES = "tokenizer.ggml.merges"


class MoondreamPair(pair.Pair):
    """The two files under the names of a checkpoint of 2025, queries, keys and values as one."""

    projection = "vision.proj_mlp.fc2.weight"

    def _read(self, mmproj: File) -> tuple[dict[str, ReaderTensor], dict[str, Any]]:
        if (kind := self._model.need("general.architecture")) != "phi2":
            raise BundleError(
                f"{mmproj.path} norms the tower's last layer, as Moondream's does; "
                f"{self._model.path} is {kind}, not Moondream's phi2: they belong to two models"
            )
        if not mmproj.get("clip.use_gelu"):
            raise BundleError(f"{mmproj.path} does not use gelu in its tower; Moondream's does")
        tensors = pair.renamed(mmproj, _NAMES)
        last = mmproj.need("clip.vision.block_count") - 1
        copy = [name for name in tensors if name.startswith(f"vision.blocks.{last}.")]
        for name in copy:
            original = tensors.get(name.replace(f".{last}.", f".{last - 1}.", 1))
            if original is None or not np.array_equal(original.data, tensors.pop(name).data):
                raise BundleError(
                    f"{mmproj.path}: {name} is no copy of the block before, which Moondream's "
                    "pair has and llama.cpp leaves out: it is a file of another kind"
                )
        return tensors, {}

    def shape(self, name: str) -> tuple[int, ...]:
        if ".attn.qkv." in name:
            rows, *rest = super().shape(name.replace("qkv", "q"))
            return 3 * rows, *rest
        found = super().shape(name)
        if name == "vision.patch_emb.weight":
            return found[0], int(np.prod(found[1:]))
        return (1, *found[-2:]) if name == "vision.pos_emb" else found

    def get(self, name: str) -> npt.NDArray[np.float32]:
        stored = super().get
        if ".attn.qkv." in name:
            return np.concatenate([stored(name.replace("qkv", part)) for part in "qkv"])
        return stored(name)

    @property
    def n_heads(self) -> int:
        return int(self._mmproj.need("clip.vision.attention.head_count"))

    def own_tokenizer(self) -> Tokenizer:
        """GPT-2's way to split text, with the tokens and merges of the file."""
        vocabulary = self.vocabulary()
        if vocabulary.model != "gpt2":
            raise BundleError(f"{self._model.path} has no tokenizer of GPT-2's kind")
        added: list[AddedToken] = []
        for index, (text, kind) in enumerate(zip(vocabulary.texts, vocabulary.types, strict=True)):
            special = kind == TokenType.CONTROL
            # The author's script marks unused rows as if they were words of their own.
            if special or (kind == TokenType.USER_DEFINED and text != f"[PAD{index}]"):
                added.append(AddedToken(text, special=special, normalized=False))
        halves = (str(pair).partition(" ") for pair in self._model.need(_MERGES))
        merges = [(left, right) for left, _, right in halves]
        try:
            made = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges))
        except Exception as error:  # the library raises nothing narrower
            raise BundleError(f"{self._model.path}: its merges make no BPE: {error}") from error
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        made.add_tokens(added)
        return made


def plan(model: Path, mmproj: Path, release: str | None) -> pair.Planned:
    """The vision graph, what bundle.json says of the model, and its tokenizer.

    Raises:
        BundleError: the files are another model's, or nobody said that they are this release.
    """
    files = MoondreamPair(model, mmproj)
    if release != releases.ONE_CROP:
        raise BundleError(
            f"{mmproj} may be of any release of Moondream: pairs of 2025 look alike but were "
            "trained with crops, another attention and a region model that the files leave out. "
            f"If it is one of {releases.ONE_CROP} to 2024-05-08, say release={releases.ONE_CROP}; "
            "for a later one export the checkpoint"
        )
    tower = crops.shape(files, files.n_heads)
    if tower.pooled:
        raise BundleError(f"{mmproj} reads two views of a picture: export the checkpoint instead")
    made = files.own_tokenizer()
    end = made.token_to_id("<|endoftext|>")
    if end is None:
        raise BundleError(f"{model} has no <|endoftext|>: it is another model's")
    tokens = {"bos_id": end, "eos_id": end}
    return pair.Planned(
        crops.graph(files, tower, averages=False, first_row=None),
        {
            "family": "moondream",
            "licence": files.licence,
            "image": moondream.image_section(release, tower, {}, tower.n_patches),
            "prompt": releases.prompt_section(release, tokens),
            "generation": releases.generation_section(release, tokens),
            "n_embd": files.n_embd,
            "n_ctx": bundle.context(files.n_ctx),
            "card": moondream.card(release),
        },
        files,
        texts={"tokenizer.json": made.to_str(pretty=True)},
    )
