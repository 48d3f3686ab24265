"""Idefics2: a SigLIP tower for any size, a gated projector, a perceiver resampler and a mistral.

One run of the graph takes the patches of one view and gives the same few tokens whatever their
number; nothing is padded, so nothing is masked. Reference: transformers' modeling_idefics2.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from edgevlm.errors import BundleError

from .. import backbone, processor, tower
from ..checkpoint import NUMBER, Checkpoint, Config, Kinds, section, whole_number
from ..graph import Graph
from . import NO_RELEASES, Options, Parts, idefics3

_KINDS: Kinds = {
    "text_config": dict,
    "vision_config": dict,
    "perceiver_config": dict,
    "image_token_id": int,
}
_VISION: Config = {  # transformers' Idefics2VisionConfig
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_PERCEIVER: Config = {  # Idefics2PerceiverConfig
    "hidden_act": "silu",
    "hidden_size": 4096,
    "rms_norm_eps": 1e-6,
    "resampler_n_latents": 64,
    "resampler_depth": 3,
    "resampler_n_heads": 16,
    "resampler_head_dim": 96,
    "num_key_value_heads": 4,
}
_IMAGE_TOKEN_ID = 32001
_SIZE = {"shortest_edge": 378, "longest_edge": 980}
_BORDER = "<fake_token_around_image>"


def matches(checkpoint: Checkpoint) -> bool:
    return "Idefics2ForConditionalGeneration" in checkpoint.config["architectures"]


def parts(checkpoint: Checkpoint, options: Options) -> Parts:
    checkpoint.rename(idefics3.canonical)
    where = checkpoint.directory / "config.json"
    root = section(checkpoint.config, _KINDS, where)
    options.refuse(
        fit="this family cuts pictures into quarters; it has no other way", release=NO_RELEASES
    )
    root["text_config"] = {"model_type": "mistral", **root.get("text_config", {})}
    text = backbone.read(checkpoint, root, options.prompt)
    kinds: Kinds = {"hidden_act": str, "layer_norm_eps": NUMBER}
    vision = {**_VISION, **section(root.get("vision_config", {}), kinds, where)}
    shape = tower.shape(vision, where, "vision_tower.", cls=False)
    resampler = _resampler(root, text.language.config, where)
    image, normalisation = _image(checkpoint, shape)
    image["view_tokens"] = resampler.n_latents
    graph = _vision(checkpoint, shape, normalisation, resampler, text.language.config)
    image_token_id: int = root.get("image_token_id", _IMAGE_TOKEN_ID)
    words = text.prompt(image_token_id)
    manifest = {
        "image": image,
        "prompt": {
            **words,
            "image": words["image_token"],
            "border": _BORDER,
            "glue": _glue(checkpoint),
        },
        "generation": text.generation(),
        "card": {
            "summary": "Idefics2: answers questions about pictures, 64 tokens for each view",
            "can": ["describe", "ask", "chat"],
            "cannot": ["detect", "point"],
            "parity": {},
        },
    }
    return Parts(graph, text.language, manifest)


def _image(checkpoint: Checkpoint, shape: tower.Tower) -> tuple[Config, tower.Normalisation]:
    """bundle.json's "image" but for the number of tokens, and what the weights absorb."""
    config, where, _ = processor.stored(checkpoint, ("Idefics2ImageProcessor",))
    size = config.get("size", _SIZE)
    shortest, longest = (size.get(key) if isinstance(size, dict) else None for key in _SIZE)
    if not (isinstance(shortest, int) and isinstance(longest, int) and shortest <= longest):
        raise BundleError(f"{where} has the size {size!r:.60}; two edges are needed")
    image = {
        "shortest_px": shortest,
        "longest_px": longest,
        "split": bool(config.get("do_image_splitting", False)),
        "patch_px": shape.patch_px,
        "resample": processor.resample(config, 2, where),
        "n_positions": shape.image_px // shape.patch_px,
    }
    return image, processor.normalisation(config, 0.5, 0.5, where)


def _glue(checkpoint: Checkpoint) -> str:
    """What makes a word right after a picture begin as any word does: the reference writes a space,
    unless (before transformers 5) the tokenizer marks the beginning of a text by itself."""
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer))
    tokens = tokenizer.encode(f"{_BORDER}a", add_special_tokens=False).tokens
    return "" if tokens[1].startswith("▁") else " "


@dataclass(frozen=True)
class _Resampler:
    prefix: str
    width: int
    n_latents: int
    depth: int
    n_heads: int
    n_kv: int
    head: int
    activation: str
    eps: float


def _resampler(root: Config, text: Config, where: Path) -> _Resampler:
    kinds: Kinds = {"hidden_act": str, "rms_norm_eps": NUMBER}
    config = {**_PERCEIVER, **section(root.get("perceiver_config", {}), kinds, where)}
    if config["hidden_size"] != text["hidden_size"]:  # as Idefics2Config repairs it
        config |= {key: text[key] for key in ("hidden_size", "rms_norm_eps")}
    width, n_latents, depth, n_heads, n_kv, head = (
        whole_number(config, key, where)
        for key in (
            "hidden_size",
            "resampler_n_latents",
            "resampler_depth",
            "resampler_n_heads",
            "num_key_value_heads",
            "resampler_head_dim",
        )
    )
    if n_heads % n_kv:
        raise BundleError(f"{where}: {n_heads} resampler heads over {n_kv} key-value heads")
    return _Resampler(
        prefix="connector.perceiver_resampler.",
        width=width,
        n_latents=n_latents,
        depth=depth,
        n_heads=n_heads,
        n_kv=n_kv,
        head=head,
        activation=config["hidden_act"],
        eps=config["rms_norm_eps"],
    )


def _vision(
    checkpoint: Checkpoint,
    shape: tower.Tower,
    normalisation: tower.Normalisation,
    resampler: _Resampler,
    text: dict[str, Any],
) -> Graph:
    """[n, 1, values] patches of one view and their positions int64 [n] → [1, n_latents, n_embd]."""
    graph = Graph(1, shape.patch_values)
    positions = graph.input("positions", np.int64, ["tiles"])
    one = graph.constant([1, -1, shape.patch_values], np.int64)
    (value,) = tower.hidden_states(
        graph,
        checkpoint,
        shape,
        normalisation,
        [-1],
        patches=graph.op("Reshape", "patches", one),
        positions=positions,
    )
    norm = f"{shape.prefix}post_layernorm"
    value = graph.layer_norm(value, checkpoint, norm, shape.width, shape.eps)
    widths = (shape.width, text["intermediate_size"], resampler.width)
    name = "connector.modality_projection"
    value = _gated(graph, checkpoint, name, value, widths, text.get("hidden_act", "silu"))
    value = _resample(graph, checkpoint, resampler, value)
    graph.output(value, resampler.n_latents, resampler.width)
    return graph


def _gated(
    graph: Graph,
    weights: Checkpoint,
    name: str,
    value: str,
    widths: tuple[int, int, int],
    activation: str,
) -> str:
    """down(act(gate(x)) · up(x))"""
    n_in, n_ff, n_out = widths
    gate = tower.linear(graph, weights, f"{name}.gate_proj", value, (n_in, n_ff), bias=False)
    up = tower.linear(graph, weights, f"{name}.up_proj", value, (n_in, n_ff), bias=False)
    value = graph.op("Mul", graph.activation(gate, activation), up)
    return tower.linear(graph, weights, f"{name}.down_proj", value, (n_ff, n_out), bias=False)


def _resample(graph: Graph, weights: Checkpoint, r: _Resampler, context: str) -> str:
    """[1, n, width] → [1, n_latents, width]: latents look at the context and at themselves."""
    name = weights.expect(f"{r.prefix}latents", r.n_latents, r.width)
    value = graph.weight(name, (1, r.n_latents, r.width), lambda: weights.get(name)[np.newaxis])
    for layer in range(r.depth):
        stem = f"{r.prefix}layers.{layer}."
        latents = graph.rms_norm(value, weights, f"{stem}input_latents_norm", r.width, r.eps)
        seen = graph.rms_norm(context, weights, f"{stem}input_context_norm", r.width, r.eps)
        mixed = _cross_attention(graph, weights, r, f"{stem}self_attn", latents, seen)
        value = graph.residual(value, mixed)
        inner = graph.rms_norm(value, weights, f"{stem}post_attention_layernorm", r.width, r.eps)
        widths = (r.width, 4 * r.width, r.width)
        inner = _gated(graph, weights, f"{stem}mlp", inner, widths, r.activation)
        value = graph.residual(value, inner)
    return graph.rms_norm(value, weights, f"{r.prefix}norm", r.width, r.eps)


def _cross_attention(
    graph: Graph, weights: Checkpoint, r: _Resampler, name: str, latents: str, context: str
) -> str:
    """Groups of query heads share a key-value head."""
    both = graph.op("Concat", context, latents, axis=1)
    groups, inner = r.n_heads // r.n_kv, r.n_heads * r.head

    def heads(part: str, value: str, shared: int, perm: list[int]) -> str:
        width = r.n_kv * shared * r.head
        value = tower.linear(
            graph, weights, f"{name}.{part}_proj", value, (r.width, width), bias=False
        )
        shape = graph.constant([0, 0, r.n_kv, shared, r.head], np.int64)  # 0 keeps that axis
        return graph.op("Transpose", graph.op("Reshape", value, shape), perm=perm)

    q = heads("q", latents, groups, [0, 2, 3, 1, 4])  # [1, kv, groups, latents, head]
    q = graph.op("Mul", q, graph.constant(r.head**-0.5, np.float32))
    k = heads("k", both, 1, [0, 2, 3, 4, 1])  # [1, kv, 1, head, n]
    v = heads("v", both, 1, [0, 2, 3, 1, 4])
    scores = graph.op("Softmax", graph.op("MatMul", q, k), axis=-1)
    mixed = graph.op("Transpose", graph.op("MatMul", scores, v), perm=[0, 3, 1, 2, 4])
    mixed = graph.op("Reshape", mixed, graph.constant([0, 0, inner], np.int64))
    return tower.linear(graph, weights, f"{name}.o_proj", mixed, (inner, r.width), bias=False)
