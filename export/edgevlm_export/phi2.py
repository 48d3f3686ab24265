"""Tensors of a phi-1.5 decoder, as Moondream names them → the plan of its GGUF file.

One norm feeds attention and MLP in parallel, everything has a bias, half of each head is rotated
(llama.cpp src/models/phi2.cpp; vikhyat/moondream, moondream/torch/text.py).
"""

from __future__ import annotations

import re
from typing import Any

from edgevlm.errors import BundleError

from .checkpoint import Checkpoint
from .gguf import Language, Tensor
from .vocabulary import Vocabulary

_HEAD = 64  # phi-1.5's, where the config is silent
_ROTATED = 0.5  # the part of a head that is rotated
_LAYER = {  # name after text.blocks.N → llama.cpp's name after blk.N
    "ln": "attn_norm",
    "attn.qkv": "attn_qkv",
    "attn.proj": "attn_output",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_ENDS = {"text.post_ln": "output_norm", "text.lm_head": "output"}


def shape(checkpoint: Checkpoint, declared: dict[str, Any]) -> dict[str, Any]:
    """Sizes of the decoder: from its tensors, held against what the config declares.

    Raises:
        BundleError: sizes contradict each other, or are none that llama.cpp runs.
    """
    n_vocab, n_embd = checkpoint.axes("text.wte", 2)
    n_rows = checkpoint.axes("text.blocks.0.attn.qkv.weight", 2)[0]
    n_heads = declared.get("num_attention_heads") or max(1, n_embd // _HEAD)
    head = n_embd // n_heads
    n_kv_heads = (n_rows - n_embd) // (2 * head)
    if n_embd % n_heads or n_rows != n_embd + 2 * head * n_kv_heads or n_heads % (n_kv_heads or 1):
        raise BundleError(
            f"text.blocks.0.attn.qkv in {checkpoint.directory} has {n_rows} rows for {n_heads} "
            f"heads in a width of {n_embd}: the config belongs to another checkpoint"
        )
    found = {
        "vocab_size": n_vocab,
        "hidden_size": n_embd,
        "intermediate_size": checkpoint.axes("text.blocks.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": n_layers(checkpoint, "text"),
        "num_key_value_heads": n_kv_heads,
    }
    for key, value in found.items():
        if declared.get(key, value) != value:
            raise BundleError(
                f"{checkpoint.directory / 'config.json'} says {key} = {declared[key]}; the tensors "
                f"make it {value}: it belongs to another checkpoint"
            )
    return {
        **found,
        "num_attention_heads": n_heads,
        "head_dim": head,
        "max_position_embeddings": declared.get("max_position_embeddings", 2048),
        "layer_norm_eps": 1e-5,
        "rope": {"rope_type": "default", "rope_theta": 10000.0, "dimensions": int(head * _ROTATED)},
    }


def n_layers(checkpoint: Checkpoint, part: str) -> int:
    """How many blocks `part` ("text" or "vision") has; they are numbered without gaps."""
    numbers = {
        int(match[1])
        for name in checkpoint.names
        if (match := re.match(rf"{part}\.blocks\.(\d+)\.", name))
    }
    if numbers != set(range(len(numbers))) or not numbers:
        raise BundleError(f"{checkpoint.directory} has the {part} blocks {sorted(numbers)}")
    return len(numbers)


def plan(
    checkpoint: Checkpoint, config: dict[str, Any], vocabulary: Vocabulary, eos_id: int
) -> Language:
    """The language file of the tensors `text.*`; `config` is what `shape` gave."""
    n_embd, n_ff = config["hidden_size"], config["intermediate_size"]
    n_rows = n_embd + 2 * config["head_dim"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "ln": (n_embd,),
        "attn.qkv": (n_rows, n_embd),
        "attn.proj": (n_embd, n_embd),
        "mlp.fc1": (n_ff, n_embd),
        "mlp.fc2": (n_embd, n_ff),
        "text.post_ln": (n_embd,),
        "text.lm_head": (config["vocab_size"], n_embd),
    }
    tensors = [_tensor(checkpoint, "text.wte", "token_embd.weight", config["vocab_size"], n_embd)]
    for source, target in _ENDS.items():
        tensors += _pair(checkpoint, source, target, shapes[source])
    for layer in range(config["num_hidden_layers"]):
        for source, target in _LAYER.items():
            stem = f"text.blocks.{layer}.{source}"
            tensors += _pair(checkpoint, stem, f"blk.{layer}.{target}", shapes[source])
    return Language("phi2", config, vocabulary, eos_id, tuple(tensors))


def _pair(checkpoint: Checkpoint, source: str, target: str, shape: tuple[int, ...]) -> list[Tensor]:
    """A weight and its bias, which is as long as the weight has rows."""
    return [
        _tensor(checkpoint, f"{source}.weight", f"{target}.weight", *shape),
        _tensor(checkpoint, f"{source}.bias", f"{target}.bias", shape[0]),
    ]


def _tensor(checkpoint: Checkpoint, source: str, target: str, *shape: int) -> Tensor:
    checkpoint.expect(source, *shape)
    return Tensor(target, shape, lambda: checkpoint.get(source))
