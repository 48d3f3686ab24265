"""A GGUF file: its keys and tensors, and of a language model the plan that would write it.

The plan is what a prefill graph is made of where there is no checkpoint; a file that says what no
plan of ours says is refused. Keys: llama.cpp src/llama-arch.cpp.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor, TokenType, dequantize

from edgevlm.errors import BundleError

from .gguf import Array, Language, Tensor
from .vocabulary import Vocabulary

_KNOWN = re.compile(
    r"(token_embd|output|output_norm|rope_freqs)\.(weight|bias)|blk\.\d+\."
    r"(attn_norm|ffn_norm|attn_q|attn_k|attn_v|attn_qkv|attn_output|ffn_gate|ffn_up|ffn_down)"
    r"\.(weight|bias)"
)
_SIZES = {  # as in a checkpoint's config → as in the file
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}


class File:
    """A GGUF file: its keys and its tensors by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = GGUFReader(path)
            self._fields = reader.fields
            self.tensors: dict[str, ReaderTensor] = {t.name: t for t in reader.tensors}
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise BundleError(f"{path} is not a whole GGUF file: {error}") from error

    def get(self, key: str, default: Any = None) -> Any:
        return self._fields[key].contents() if key in self._fields else default

    def need(self, key: str) -> Any:
        if key not in self._fields:
            raise BundleError(f"{self.path} has no {key}: it is a file of another kind")
        return self._fields[key].contents()


def read(file: File) -> Language:
    """The plan, its weights as float32. BundleError when the file says what no plan says."""
    arch = str(file.need("general.architecture"))

    def get(key: str, default: Any = None) -> Any:
        return file.get(f"{arch}.{key}", default)

    sizes = {ours: file.need(f"{arch}.{theirs}") for ours, theirs in _SIZES.items()}
    for key, value in sizes.items():
        if not isinstance(value, int):
            raise BundleError(
                f"{file.path} says {arch}.{_SIZES[key]} = {value!r}; expected a number"
            )
    head = get("attention.key_length", sizes["hidden_size"] // sizes["num_attention_heads"])
    config = {
        **sizes,
        "num_key_value_heads": get("attention.head_count_kv", sizes["num_attention_heads"]),
        "head_dim": head,
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "layer_norm_eps": get("attention.layer_norm_epsilon"),
        "original_max_position_embeddings": get("rope.scaling.original_context_length", 4096),
        "rope": {
            "rope_type": get("rope.scaling.type", "none").replace("none", "default"),
            "rope_theta": get("rope.freq_base", 10000.0),
            "dimensions": get("rope.dimension_count", head),
            "factor": get("rope.scaling.factor", 1.0),
        },
    }
    unknown = [tensor.name for tensor in file.tensors.values() if not _KNOWN.fullmatch(tensor.name)]
    if (kind := config["rope"]["rope_type"]) not in ("default", "linear"):
        unknown.append(f"{arch}.rope.scaling.type = {kind}")
    if get("attention.sliding_window", 0):
        unknown.append(f"{arch}.attention.sliding_window")
    if unknown:
        raise BundleError(
            f"{file.path} has {unknown[0]}, which no prefill graph knows: export without"
        )
    tensors = tuple(
        Tensor(tensor.name, tuple(int(n) for n in reversed(tensor.shape)), partial(_load, tensor))
        for tensor in file.tensors.values()
    )
    eos_id = int(file.get("tokenizer.ggml.eos_token_id", 0))
    return Language(arch, config, vocabulary(file), eos_id, tensors)


def vocabulary(file: File) -> Vocabulary:
    texts = [str(text) for text in file.need("tokenizer.ggml.tokens")]
    model, bos = str(file.need("tokenizer.ggml.model")), file.get("tokenizer.ggml.bos_token_id")
    types = file.get("tokenizer.ggml.token_type", [int(TokenType.NORMAL)] * len(texts))
    adds_bos = file.get("tokenizer.ggml.add_bos_token", model == "llama")
    return Vocabulary(
        model=model,
        texts=tuple(texts),
        types=tuple(types),
        scores=tuple(file.get("tokenizer.ggml.scores", ())),
        merges=tuple(file.get("tokenizer.ggml.merges", ())),
        bos_id=bos,
        adds_bos=bool(adds_bos) and bos is not None,
        ids={text: index for index, text in enumerate(texts)},
    )


def _load(tensor: ReaderTensor) -> Array:
    values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    return np.asarray(values.reshape([int(n) for n in reversed(tensor.shape)]), np.float32)
