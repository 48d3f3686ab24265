"""The head of a GGUF file: a language model's shape, without loading it.

The format: docs/gguf.md of ggml-org/ggml. Key-value pairs come first; reading ends where the
vocabulary begins, which writers put after the shape.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edgevlm.errors import BundleError

_MAGIC = b"GGUF"
_TEXT, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"}
_SCALARS |= {10: "<Q", 11: "<q", 12: "<d"}
_VOCABULARY = "tokenizer.ggml.tokens"
_LONGEST_TEXT_BYTES = 1 << 24


@dataclass(frozen=True)
class Shape:
    """What a language model's working memory follows from."""

    n_layers: int
    n_heads: int
    kv_width: int  # values that one position keeps in one layer, keys and values together
    n_embd: int
    n_ff: int
    n_vocab: int


def read_shape(path: Path) -> Shape:
    """Raises BundleError: the file is no GGUF, or does not give its shape."""
    try:
        with path.open("rb") as stream:
            found = _read_head(stream)
    except (OSError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise BundleError(f"{path} cannot be read as GGUF: {error}") from error
    kind = found.get("general.architecture", "")

    def number(key: str, default: int | None = None) -> int:
        value = found.get(f"{kind}.{key}", default)
        if isinstance(value, list):  # one a layer, in some architectures
            value = max(value, default=default)
        if not isinstance(value, int) or value < 1:
            raise BundleError(f"{path} does not give {kind}.{key}: export the model again")
        return value

    n_heads, n_embd = number("attention.head_count"), number("embedding_length")
    n_kv_heads = number("attention.head_count_kv", n_heads)
    head = max(1, n_embd // n_heads)
    key, value = number("attention.key_length", head), number("attention.value_length", head)
    return Shape(
        n_layers=number("block_count"),
        n_heads=n_heads,
        kv_width=n_kv_heads * (key + value),
        n_embd=n_embd,
        n_ff=number("feed_forward_length", 4 * n_embd),
        n_vocab=found.get(_VOCABULARY, 0),
    )


def _read_head(stream: BinaryIO) -> dict[str, Any]:
    """Keys and values up to the vocabulary, of which only the size is kept."""
    magic, version, _, n_pairs = struct.unpack("<4sIQQ", stream.read(24))
    if magic != _MAGIC or version < 2:
        raise ValueError("it does not begin as GGUF 2 or 3 does")
    found: dict[str, Any] = {}
    for _ in range(n_pairs):
        key = _text(stream)
        (kind,) = _unpack(stream, "<I")
        if key == _VOCABULARY and kind == _ARRAY:
            _, found[key] = _unpack(stream, "<IQ")
            break
        found[key] = _value(stream, kind)
    return found


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(stream)
    if kind == _ARRAY:
        of, n = _unpack(stream, "<IQ")
        return [_value(stream, of) for _ in range(n)]
    if kind not in _SCALARS:
        raise ValueError(f"it has a value of the unknown type {kind}")
    return _unpack(stream, _SCALARS[kind])[0]


def _text(stream: BinaryIO) -> str:
    (n_bytes,) = _unpack(stream, "<Q")
    if n_bytes > _LONGEST_TEXT_BYTES:
        raise ValueError(f"it has a text of {n_bytes} bytes")
    return stream.read(n_bytes).decode()


def _unpack(stream: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, stream.read(struct.calcsize(form)))
