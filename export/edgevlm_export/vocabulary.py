"""tokenizer.json → the vocabulary that llama.cpp keeps: texts, types, scores, merges, ids.

The runtime tokenizes with tokenizer.json itself; this copy turns generated ids back into bytes.
Byte-level BPE becomes llama.cpp's "gpt2" model, BPE with byte fallback (a SentencePiece model in
Hugging Face's clothes) its "llama" model. Keys: llama.cpp src/llama-vocab.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer

from edgevlm.errors import BundleError

from .checkpoint import Checkpoint


@dataclass(frozen=True)
class Vocabulary:
    model: str  # "gpt2" or "llama"
    texts: tuple[str, ...]  # as stored in tokenizer.json; unique
    types: tuple[int, ...]
    scores: tuple[float, ...]  # empty for gpt2
    merges: tuple[str, ...]  # empty for llama
    bos_id: int | None
    adds_bos: bool  # the tokenizer itself puts BOS in front of every text
    ids: dict[str, int]

    def write(self, writer: GGUFWriter, eos_id: int) -> None:
        writer.add_tokenizer_model(self.model)
        # Only llama.cpp's own tokenizer would use it, and that one is not used.
        writer.add_tokenizer_pre("gpt-2" if self.model == "gpt2" else "default")
        writer.add_token_list(list(self.texts))
        writer.add_token_types(list(self.types))
        writer.add_token_scores(list(self.scores))
        writer.add_token_merges(list(self.merges))
        if self.bos_id is not None:
            writer.add_bos_token_id(self.bos_id)
        writer.add_eos_token_id(eos_id)
        writer.add_add_bos_token(self.adds_bos)


def read(checkpoint: Checkpoint, n_vocab: int) -> Vocabulary:
    """The vocabulary of the checkpoint's tokenizer.json, filled up to `n_vocab` rows."""
    where = checkpoint.tokenizer
    stored = checkpoint.json("tokenizer.json")
    if stored is None:
        raise BundleError(f"{where} is missing: save the tokenizer in the fast format beside it")
    try:
        tokenizer = Tokenizer.from_file(str(where))
    except Exception as error:  # the library raises nothing narrower
        raise BundleError(f"{where} is not a tokenizer: {error}") from error
    model = stored["model"]
    if "merges" not in model:
        raise BundleError(f"{where} is a {model.get('type')} tokenizer; only BPE can be exported")
    added = stored.get("added_tokens") or []
    ids = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
    if (highest := max(ids.values())) >= n_vocab:
        raise BundleError(
            f"{where} has token id {highest}; the language model has {n_vocab} rows: "
            "it belongs to another model"
        )
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    sentencepiece = bool(model.get("byte_fallback"))
    texts = [f"[PAD{i}]" for i in range(n_vocab)]
    for text, index in ids.items():
        texts[index] = text
    if len(set(ids.values())) != len(ids) or len(set(texts)) != n_vocab:
        raise BundleError(f"{where} gives one id to two tokens or one text to two ids")
    bos_id, adds_bos = _bos(checkpoint, tokenizer, ids)
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        texts=tuple(texts),
        types=_types(model, added, ids, n_vocab),
        scores=_scores(pairs, ids, n_vocab) if sentencepiece else (),
        merges=() if sentencepiece else tuple(_merge(*pair) for pair in pairs),
        bos_id=bos_id,
        adds_bos=adds_bos,
        ids=ids,
    )


def _types(
    model: dict[str, Any], added: list[dict[str, Any]], ids: dict[str, int], n_vocab: int
) -> tuple[int, ...]:
    types = [TokenType.UNUSED] * n_vocab
    for index in model["vocab"].values():
        types[index] = TokenType.NORMAL
    if model.get("byte_fallback"):
        for byte in range(256):
            if (index := ids.get(f"<0x{byte:02X}>")) is not None:
                types[index] = TokenType.BYTE
    for token in added:
        types[token["id"]] = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
    if (unknown := model.get("unk_token")) in ids:
        types[ids[unknown]] = TokenType.UNKNOWN
    return tuple(int(kind) for kind in types)


def _scores(pairs: list[list[str]], ids: dict[str, int], n_vocab: int) -> tuple[float, ...]:
    """SentencePiece merges the highest score first; a merge's rank is its negated score."""
    scores = [-1e9] * n_vocab
    for rank, (left, right) in reversed(list(enumerate(pairs))):
        if (index := ids.get(left + right)) is not None:
            scores[index] = -float(rank)
    return tuple(scores)


def _merge(left: str, right: str) -> str:
    """GGUF joins a pair with a space, so a space inside a part is shifted as GPT-2 shifts bytes."""
    shifted = chr(ord(" ") + 256)
    return f"{left.replace(' ', shifted)} {right.replace(' ', shifted)}"


def _bos(
    checkpoint: Checkpoint, tokenizer: Tokenizer, ids: dict[str, int]
) -> tuple[int | None, bool]:
    """The BOS id, and whether the tokenizer puts it in front by itself."""
    with_special = tokenizer.encode("a", add_special_tokens=True).ids
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    if len(with_special) > len(plain) and with_special[0] != plain[0]:
        return with_special[0], True
    settings = checkpoint.json("tokenizer_config.json") or {}
    named = settings.get("bos_token")
    text = named.get("content") if isinstance(named, dict) else named
    index = ids.get(text) if isinstance(text, str) else None
    return index, index is not None and settings.get("add_bos_token") is True
