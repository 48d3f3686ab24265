"""A llama, mistral, phi3 or qwen2 decoder's config and tensors → the plan of its GGUF file.

Names and layouts are what llama.cpp reads (src/models/{llama,phi3,qwen2}.cpp). Everything
is checked here, before a file is opened: config fields that change the arithmetic and are not
understood, and tensors that nothing reads, are refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.errors import BundleError

from .checkpoint import NUMBER, Checkpoint, Config, Kinds, section, whole_number
from .gguf import Array, Language, Tensor
from .vocabulary import Vocabulary

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_KINDS: Kinds = {
    "hidden_act": str,
    "rms_norm_eps": NUMBER,
    "rope_parameters": dict,
    "rope_scaling": dict,
    "rope_theta": NUMBER,
    "partial_rotary_factor": NUMBER,
    "attention_bias": bool,
    "mlp_bias": bool,
}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# The reference's defaults, which older configs leave out
# (transformers LlamaConfig, MistralConfig, Phi3Config and Qwen2Config).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    "phi3": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": 4096,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
    },
    "qwen2": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
    },
}
# config.json's model_type -> llama.cpp's architecture
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "phi3": "phi3", "qwen2": "qwen2"}


def architecture(checkpoint: Checkpoint, config: dict[str, Any]) -> str:
    """llama.cpp's name for the language model: from the config, held against the tensors.

    A LLaVA checkpoint may say nothing about its language model but the tensors always do; where
    both speak they must agree (a Phi-3 split by xtuner is a llama).
    """
    fused = "language_model.layers.0.self_attn.qkv_proj.weight" in checkpoint
    by_tensors = "phi3" if fused else "llama"
    by_config = config.get("model_type", by_tensors)
    if by_config not in _ARCHITECTURES:
        raise BundleError(
            f"the language model of {checkpoint.directory} is {by_config!r}; known: "
            f"{', '.join(_ARCHITECTURES)}"
        )
    if fused != (by_config == "phi3"):
        raise BundleError(
            f"text_config says {by_config}, the attention tensors are {by_tensors}'s in "
            f"{checkpoint.directory}: config.json belongs to another checkpoint"
        )
    return _ARCHITECTURES[by_config]


def complete(checkpoint: Checkpoint, arch: str, text: dict[str, Any]) -> dict[str, Any]:
    """The stored text config with defaults filled in and `rope` made one object.

    What llama.cpp would compute otherwise is refused here.
    """
    where = checkpoint.directory / "config.json"
    config = {**_DEFAULTS[text.get("model_type") or arch], **section(text, _KINDS, where)}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    for key in (*_SIZES, *(("original_max_position_embeddings",) if arch == "phi3" else ())):
        whole_number(config, key, where)
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    whole_number(config, "head_dim", where)
    if window := _sliding_window(text):  # llama.cpp attends to everything for these
        config["max_position_embeddings"] = min(config["max_position_embeddings"], window)
    if (kind := config.get("hidden_act", "silu")) != "silu":
        raise BundleError(f"hidden_act {kind!r} of the language model: llama.cpp computes silu")
    # transformers 5 keeps rope_parameters; before, rope_theta and rope_scaling lay side by side.
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = dict.fromkeys((*_LLAMA3, "rope_theta", "partial_rotary_factor"), NUMBER)
    scaling = section(scaling, kinds, where)
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **scaling}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    known = ("default", "linear", "llama3") if arch == "llama" else ("default", "linear")
    if rope["rope_type"] not in known:
        raise BundleError(
            f"rope scaling {rope['rope_type']!r} in {where}; known for {arch}: {', '.join(known)}"
        )
    needed = {"linear": ("factor",), "llama3": _LLAMA3}.get(rope["rope_type"], ())
    if missing := [key for key in needed if key not in rope]:
        raise BundleError(f"rope scaling {rope['rope_type']!r} in {where} has no {missing[0]}")
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    rope["dimensions"] = int(config["head_dim"] * partial)
    _refuse_heads(arch, config, rope["dimensions"], where)
    return {**config, "rope": rope}


def _sliding_window(text: Config) -> int | None:
    """How many positions the reference attends to; beyond them ours would see more."""
    if text.get("model_type") == "mistral":
        window: int | None = text.get("sliding_window", 4096)  # null: all
        return window
    return text.get("sliding_window", 4096) if text.get("use_sliding_window") else None


def _refuse_heads(arch: str, config: Config, rotated: int, where: Path) -> None:
    """llama.cpp aborts the process on head shapes that it does not expect."""
    head, n_heads, n_kv = (
        config[key] for key in ("head_dim", "num_attention_heads", "num_key_value_heads")
    )
    even = head * n_heads == config["hidden_size"]
    whole = {"llama": rotated == head, "phi3": even, "qwen2": even and rotated == head}[arch]
    if n_heads % n_kv or rotated % 2 or not rotated or not whole:
        raise BundleError(
            f"{where}: {n_heads} heads of {head}, {rotated} of them rotated, over {n_kv} key-value "
            f"heads is not a shape that llama.cpp runs for {arch}"
        )


def plan(
    checkpoint: Checkpoint, text: dict[str, Any], vocabulary: Vocabulary, eos_id: int, tied: bool
) -> Language:
    """The language file of the tensors `language_model.*` and `lm_head.*`.

    `text` is what `complete` gave; `tied` says that the head may be missing because it is the
    embedding table.
    """
    arch = architecture(checkpoint, text)
    tensors = [
        *_ends(checkpoint, text, len(vocabulary.texts), tied),
        *_rope_factors(text),
    ]
    layer_tensors = _phi3_layer if arch == "phi3" else _llama_layer
    for layer in range(text["num_hidden_layers"]):
        tensors += layer_tensors(checkpoint, text, layer)
    _refuse_leftovers(checkpoint, tensors, text["num_hidden_layers"])
    return Language(arch, text, vocabulary, eos_id, tuple(tensors))


def _ends(checkpoint: Checkpoint, text: dict[str, Any], n_vocab: int, tied: bool) -> list[Tensor]:
    n_embd = text["hidden_size"]
    ends = [
        _plain(checkpoint, "language_model.embed_tokens.weight", "token_embd.weight",
               n_vocab, n_embd),
        _plain(checkpoint, "language_model.norm.weight", "output_norm.weight", n_embd),
    ]  # fmt: skip
    if "lm_head.weight" in checkpoint or not tied:
        ends.append(_plain(checkpoint, "lm_head.weight", "output.weight", n_vocab, n_embd))
    return ends


def _llama_layer(checkpoint: Checkpoint, text: dict[str, Any], layer: int) -> list[Tensor]:
    n_embd, n_ff = text["hidden_size"], text["intermediate_size"]
    n_heads, n_kv, head = (
        text[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    interleaves = architecture(checkpoint, text) == "llama"  # qwen2's rope pairs halves
    shapes = {
        ("self_attn.q_proj", "attn_q"): (n_heads * head, n_embd),
        ("self_attn.k_proj", "attn_k"): (n_kv * head, n_embd),
        ("self_attn.v_proj", "attn_v"): (n_kv * head, n_embd),
        ("self_attn.o_proj", "attn_output"): (n_embd, n_heads * head),
        ("mlp.gate_proj", "ffn_gate"): (n_ff, n_embd),
        ("mlp.up_proj", "ffn_up"): (n_ff, n_embd),
        ("mlp.down_proj", "ffn_down"): (n_embd, n_ff),
    }
    tensors = _norms(checkpoint, n_embd, layer)
    biased = _biased(text)
    for (source, target), shape in shapes.items():
        heads = {"attn_q": n_heads, "attn_k": n_kv}.get(target) if interleaves else None
        stem = f"language_model.layers.{layer}.{source}"
        tensor = _plain(checkpoint, f"{stem}.weight", f"blk.{layer}.{target}.weight", *shape)
        tensors.append(_interleaved(tensor, heads) if heads else tensor)
        if source in biased:
            tensor = _plain(checkpoint, f"{stem}.bias", f"blk.{layer}.{target}.bias", shape[0])
            tensors.append(_interleaved(tensor, heads) if heads else tensor)
    return tensors


def _biased(text: Config) -> tuple[str, ...]:
    """The linear layers of a block that have a bias, as transformers' model class decides."""
    attention = tuple(f"self_attn.{part}_proj" for part in "qkvo")
    mlp = tuple(f"mlp.{part}_proj" for part in ("gate", "up", "down"))
    kind = text.get("model_type", "llama")
    if kind == "qwen2":
        return attention[:3]
    if kind != "llama":
        return ()
    return (
        *(attention if text.get("attention_bias") else ()),
        *(mlp if text.get("mlp_bias") else ()),
    )


def _phi3_layer(checkpoint: Checkpoint, text: dict[str, Any], layer: int) -> list[Tensor]:
    n_embd, n_ff = text["hidden_size"], text["intermediate_size"]
    rows = n_embd + 2 * text["num_key_value_heads"] * text["head_dim"]
    shapes = {
        ("self_attn.qkv_proj", "attn_qkv"): (rows, n_embd),
        ("self_attn.o_proj", "attn_output"): (n_embd, n_embd),
        ("mlp.gate_up_proj", "ffn_up"): (2 * n_ff, n_embd),
        ("mlp.down_proj", "ffn_down"): (n_embd, n_ff),
    }
    return [
        *_norms(checkpoint, n_embd, layer),
        *(
            _plain(
                checkpoint,
                f"language_model.layers.{layer}.{source}.weight",
                f"blk.{layer}.{target}.weight",
                *shape,
            )
            for (source, target), shape in shapes.items()
        ),
    ]


def _norms(checkpoint: Checkpoint, n_embd: int, layer: int) -> list[Tensor]:
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    return [
        _plain(
            checkpoint,
            f"language_model.layers.{layer}.{source}.weight",
            f"blk.{layer}.{target}.weight",
            n_embd,
        )
        for source, target in names.items()
    ]


def _plain(checkpoint: Checkpoint, source: str, target: str, *shape: int) -> Tensor:
    checkpoint.expect(source, *shape)
    return Tensor(target, shape, lambda: checkpoint.get(source), source)


def _interleaved(tensor: Tensor, n_heads: int) -> Tensor:
    """Rows of q or k as llama.cpp's rope pairs them: (0, 1), (2, 3)… instead of (0, d/2), …"""

    def paired(values: Array) -> Array:
        halves = values.reshape(n_heads, 2, -1, *values.shape[1:])
        rows: Array = halves.swapaxes(1, 2).reshape(values.shape)
        return rows

    return replace(tensor, load=lambda: paired(tensor.load()), rows=paired)


def _rope_factors(text: dict[str, Any]) -> list[Tensor]:
    """Llama 3.1's frequency divisors (transformers modeling_rope_utils.py, "llama3")."""
    rope = text["rope"]
    if rope["rope_type"] != "llama3":
        return []
    n_pairs = rope["dimensions"] // 2
    frequencies = rope["rope_theta"] ** -(np.arange(n_pairs) / n_pairs)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)  # 1: kept; 0: divided by factor
    divisors = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return [Tensor("rope_freqs.weight", (n_pairs,), lambda: divisors)]


def _refuse_leftovers(checkpoint: Checkpoint, tensors: list[Tensor], n_layers: int) -> None:
    """A tensor that no rule above reads would be arithmetic silently left out."""
    read = {tensor.source for tensor in tensors}
    for name in checkpoint.names:
        if not name.startswith("language_model.") or name.endswith(".rotary_emb.inv_freq"):
            continue
        if name not in read:
            raise BundleError(
                f"{name} in {checkpoint.directory} is not part of a model of {n_layers} layers "
                "that this exporter knows"
            )
