"""The shapes of published models: configs, special tokens, and every tensor's name and shape.

Sizes are those of the config.json files on the hub and, for Moondream, of vikhyat/moondream,
moondream/config/ at 4fa1cd6; names are what the families read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from .tower import CLIP_L_336

Tensors: TypeAlias = dict[str, tuple[int, ...]]

_SIGLIP_HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@dataclass(frozen=True)
class Shape:
    """A checkpoint without its values."""

    config: dict[str, Any]  # config.json
    tensors: Tensors
    n_vocab: int
    special: Mapping[str, int]  # token → id, as published
    bos: str = ""  # a special token that comes first
    eos: str = ""
    processor: dict[str, Any] = field(default_factory=dict)  # preprocessor_config.json
    options: Mapping[str, str] = field(default_factory=dict)  # of `export`, what shapes cannot say


def _linear(name: str, n_out: int, n_in: int, *, bias: bool = True) -> Tensors:
    return {f"{name}.weight": (n_out, n_in), **({f"{name}.bias": (n_out,)} if bias else {})}


def _norm(name: str, width: int, *, bias: bool = True) -> Tensors:
    return {f"{name}.weight": (width,), **({f"{name}.bias": (width,)} if bias else {})}


def _tower(config: Mapping[str, Any], *, cls: bool) -> Tensors:
    """CLIP with a class row, or SigLIP; transformers' names behind `vision_tower.`"""
    width, ff_width, patch_px = (
        config[key] for key in ("hidden_size", "intermediate_size", "patch_size")
    )
    n_rows = (config["image_size"] // patch_px) ** 2 + cls
    embeddings, prefix = "vision_tower.embeddings", "vision_tower."
    tensors: Tensors = {
        f"{embeddings}.patch_embedding.weight": (width, 3, patch_px, patch_px),
        f"{embeddings}.position_embedding.weight": (n_rows, width),
    }
    if cls:
        tensors |= {f"{embeddings}.class_embedding": (width,)}
        tensors |= _norm(f"{prefix}pre_layrnorm", width)  # transformers' spelling
    else:
        tensors |= {f"{embeddings}.patch_embedding.bias": (width,)}
    for n in range(config["num_hidden_layers"]):
        layer = f"{prefix}encoder.layers.{n}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors |= _linear(f"{layer}.self_attn.{part}", width, width)
        tensors |= _norm(f"{layer}.layer_norm1", width) | _norm(f"{layer}.layer_norm2", width)
        tensors |= _linear(f"{layer}.mlp.fc1", ff_width, width)
        tensors |= _linear(f"{layer}.mlp.fc2", width, ff_width)
    return tensors | _norm(f"{prefix}post_layernorm", width)


def _llama(config: Mapping[str, Any]) -> Tensors:
    width, ff_width, n_vocab = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    kv_width = width * config["num_key_value_heads"] // config["num_attention_heads"]
    tensors: Tensors = {
        "language_model.embed_tokens.weight": (n_vocab, width),
        "language_model.norm.weight": (width,),
        "lm_head.weight": (n_vocab, width),
    }
    for n in range(config["num_hidden_layers"]):
        layer = f"language_model.layers.{n}"
        for name, n_out, n_in in (
            ("self_attn.q_proj", width, width),
            ("self_attn.k_proj", kv_width, width),
            ("self_attn.v_proj", kv_width, width),
            ("self_attn.o_proj", width, width),
            ("mlp.gate_proj", ff_width, width),
            ("mlp.up_proj", ff_width, width),
            ("mlp.down_proj", width, ff_width),
        ):
            tensors |= _linear(f"{layer}.{name}", n_out, n_in, bias=False)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors |= _norm(f"{layer}.{name}", width, bias=False)
    return tensors


def _text(
    sizes: tuple[int, int, int, int, int], n_vocab: int, n_ctx: int, **more: Any
) -> dict[str, Any]:
    """A llama's config; `sizes` = width, feed-forward width, layers, heads, key-value heads."""
    keys = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    return {
        "model_type": "llama",
        **dict(zip(keys, sizes, strict=True)),
        "vocab_size": n_vocab,
        "max_position_embeddings": n_ctx,
        "rms_norm_eps": 1e-5,
        **more,
    }


def _llava(text: dict[str, Any], special: Mapping[str, int], eos: str, prompt: str) -> Shape:
    """CLIP-L/336, two linear layers, a llama."""
    side, width, n_embd = 336, CLIP_L_336["hidden_size"], text["hidden_size"]
    return Shape(
        config={
            "architectures": ["LlavaForConditionalGeneration"],
            "image_token_index": special["<image>"],
            "vision_config": CLIP_L_336,
            "text_config": text,
        },
        tensors={
            **_tower(CLIP_L_336, cls=True),
            **_linear("multi_modal_projector.linear_1", n_embd, width),
            **_linear("multi_modal_projector.linear_2", n_embd, n_embd),
            **_llama(text),
        },
        n_vocab=text["vocab_size"],
        special=special,
        bos="<s>",
        eos=eos,
        processor={
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
        },
        options={"prompt": prompt},
    )


def _smolvlm(sizes: tuple[int, int, int, int, int]) -> Shape:
    """SigLIP-B/16-512, pixel shuffle by 4, a SmolLM2."""
    n_vocab, factor = 49280, 4
    vision = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    }
    text = _text(sizes, n_vocab, 8192, rope_theta=100000.0)
    tiles = {f"<row_{r}_col_{c}>": 49153 + 6 * (r - 1) + c - 1
             for r in range(1, 7) for c in range(1, 7)}  # fmt: skip
    return Shape(
        config={
            "architectures": ["Idefics3ForConditionalGeneration"],
            "image_token_id": 49190,
            "scale_factor": factor,
            "vision_config": vision,
            "text_config": text,
        },
        tensors={
            **_tower(vision, cls=False),
            **_linear(
                "connector.modality_projection.proj",
                text["hidden_size"],
                vision["hidden_size"] * factor**2,
                bias=False,
            ),
            **_llama(text),
        },
        n_vocab=n_vocab,
        special={
            "<|endoftext|>": 0,
            "<|im_start|>": 1,
            "<global-img>": 49152,
            **tiles,
            "<fake_token_around_image>": 49189,
            "<image>": 49190,
            "<end_of_utterance>": 49279,
        },
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        processor={
            "image_processor_type": "Idefics3ImageProcessor",
            "size": {"longest_edge": 2048},
            "max_image_size": {"longest_edge": vision["image_size"]},
            "do_image_splitting": True,
            **_SIGLIP_HALVES,
        },
    )


def _moondream(text: tuple[int, int, int, int], tower: tuple[int, int, int], n_heads: int) -> Shape:
    """The release of 2025-06-21: SigLIP over crops of 378 px, phi-1.5, the region model.

    `text` = width, feed-forward width, layers, heads; `tower` = the first three.
    """
    n_vocab, inner, n_patches, patch_values = 51200, 8192, 27**2, 3 * 14**2
    n_embd, ff_width, n_layers, n_text_heads = text
    width, tower_ff_width, n_tower_layers = tower
    tensors: Tensors = {
        "text.wte": (n_vocab, n_embd),
        **_linear("text.lm_head", n_vocab, n_embd),
        **_norm("text.post_ln", n_embd),
        "vision.pos_emb": (1, n_patches, width),
        **_linear("vision.patch_emb", width, patch_values),
        **_norm("vision.post_ln", width),
        **_linear("vision.proj_mlp.fc1", inner, 2 * width),
        **_linear("vision.proj_mlp.fc2", n_embd, inner),
    }
    for n in range(n_layers):
        tensors |= _block(f"text.blocks.{n}", n_embd, ff_width, ("ln",))
    for n in range(n_tower_layers):
        tensors |= _block(f"vision.blocks.{n}", width, tower_ff_width, ("ln1", "ln2"))
    for kind, n_values, n_features, n_bins in (("coord", 1, 128, 1024), ("size", 2, 256, 2048)):
        tensors |= {
            f"region.{kind}_features": (n_values, n_features),
            **_linear(f"region.{kind}_encoder", n_embd, 2 * n_features),
            **_linear(f"region.{kind}_decoder.fc1", inner, n_embd),
            **_linear(f"region.{kind}_decoder.fc2", n_bins, inner),
        }
    sizes = {"dim": n_embd, "ff_dim": ff_width, "n_layers": n_layers, "n_heads": n_text_heads}
    return Shape(
        config={
            "architectures": ["HfMoondream"],
            "config": {"text": sizes, "vision": {"enc_n_heads": n_heads}},
        },
        tensors=tensors,
        n_vocab=n_vocab,
        special={"<|endoftext|>": 0, **{f"<|md_reserved_{n}|>": n + 1 for n in range(9)}},
        eos="<|endoftext|>",
        options={"release": "2025-06-21"},
    )


def _block(name: str, width: int, ff_width: int, norms: tuple[str, ...]) -> Tensors:
    tensors: Tensors = {}
    for norm in norms:
        tensors |= _norm(f"{name}.{norm}", width)
    tensors |= _linear(f"{name}.attn.qkv", 3 * width, width)
    tensors |= _linear(f"{name}.attn.proj", width, width)
    tensors |= _linear(f"{name}.mlp.fc1", ff_width, width)
    return tensors | _linear(f"{name}.mlp.fc2", width, ff_width)


_LLAMA_2 = {"<unk>": 0, "<s>": 1, "</s>": 2}
_PHI_3 = {
    **_LLAMA_2,
    "<|endoftext|>": 32000,
    "<|assistant|>": 32001,
    "<|system|>": 32006,
    "<|end|>": 32007,
    "<|user|>": 32010,
    "<image>": 32038,
}

SHAPES: dict[str, Shape] = {
    "moondream2": _moondream((2048, 8192, 24, 32), (1152, 4304, 27), 16),
    "moondream2-0.5b": _moondream((1024, 4096, 24, 16), (720, 2690, 27), 10),
    # A llama by its tensors: xtuner splits what Phi-3 keeps fused.
    "llava-phi-3-mini": _llava(
        _text((3072, 8192, 32, 32, 32), 32064, 4096), _PHI_3, "<|end|>", "phi-3"
    ),
    "llava-1.5-7b": _llava(
        _text((4096, 11008, 32, 32, 32), 32064, 4096),
        {**_LLAMA_2, "<image>": 32000},
        "</s>",
        "vicuna",
    ),
    "smolvlm-256m": _smolvlm((576, 1536, 30, 9, 3)),
    "smolvlm-500m": _smolvlm((960, 2560, 32, 15, 5)),
}
