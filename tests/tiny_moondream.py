"""Tiny random Moondream checkpoints of every release, as they lie on disk.

The vocabulary is small, so config.json carries the templates in its ids, as the reference's
MoondreamConfig allows. What comes back is the reference with the same, rounded weights.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from edgevlm_export.oracles.moondream import Reference, Shape
from safetensors.torch import save_file
from tiny import byte_level_bpe
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

RELEASES = ("2024-03-04", "2024-05-20", "2025-01-09", "2025-03-27", "2025-06-21")
CODE = {  # one telling line of the code that lies beside the weights on the hub
    "2025-01-09": "w = torch.argmax(size_logits[0], dim=-1) / size_logits.size(-1)",
    "2025-03-27": "w = torch.pow(2.0, (w_bin.float() / 1023.0) * 10.0 - 10.0)",
    "2025-06-21": 'Tokenizer.from_pretrained("moondream/starmie-v1"); torch.pow(2.0, x)',
}
IDS = {
    "bos_id": 0,
    "eos_id": 0,
    "answer_id": 3,
    "thinking_id": 4,
    "coord_id": 5,
    "size_id": 6,
    "start_ground_points_id": 7,
    "end_ground_id": 9,
}
_OLD_NAMES = (
    (r"text\.wte", "text_model.transformer.embd.wte.weight"),
    (r"text\.blocks\.(\d+)\.attn\.qkv", r"text_model.transformer.h.\1.mixer.Wqkv"),
    (r"text\.blocks\.(\d+)\.attn\.proj", r"text_model.transformer.h.\1.mixer.out_proj"),
    (r"text\.blocks\.", "text_model.transformer.h."),
    (r"text\.post_ln", "text_model.lm_head.ln"),
    (r"text\.lm_head", "text_model.lm_head.linear"),
    (r"vision\.proj_mlp", "vision_encoder.projection.mlp"),
    (r"vision\.patch_emb", "vision_encoder.encoder.model.visual.patch_embed.linear"),
    (r"vision\.pos_emb", "vision_encoder.encoder.model.visual.pos_embed"),
    (r"vision\.post_ln", "vision_encoder.encoder.model.visual.norm"),
    (r"vision\.blocks\.(\d+)\.ln", r"vision_encoder.encoder.model.visual.blocks.\1.norm"),
    (r"vision\.blocks\.", "vision_encoder.encoder.model.visual.blocks."),
    (r"region\.(coord|size)_features", r"region_model.\1_features.weight"),
    (r"region\.", "region_model."),
    (r"region_model\.coord_", "region_model.coordinate_"),
)


def moondream(
    path: Path,
    release: str = "2025-06-21",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    names: str | None = None,
    grid: int = 5,
    overlap: int = 1,
    text_heads: int = 2,
    text_kv_heads: int = 2,
    vision_width: int = 48,
    vision_heads: int = 3,
    bias: dict[int, float] | None = None,
    vocabulary: Tokenizer | None = None,
) -> Reference:
    """A checkpoint in `path`; `names` is "2024" or "2025" (default: as the release's own).

    `bias` is added to the logits of tokens, to have them said sooner or never. With a
    `vocabulary` of the real size config.json is as empty as on the hub.
    """
    silent = vocabulary is not None
    modern = release >= "2025"
    if not modern:
        vision_width, vision_heads = 64, 16  # the number of heads is in the code of 2024
    vocabulary = vocabulary or tokenizer(release)
    n_vocab = vocabulary.get_vocab_size() + (0 if silent else 7)  # with unused rows
    torch.manual_seed(seed)
    weights = _weights(
        n_vocab, grid, 64 * text_heads, 64 * text_kv_heads, vision_width,
        pooled=release != "2024-03-04", region=modern,
    )  # fmt: skip
    for token, added in (bias or {}).items():
        weights["text.lm_head.bias"][token] += added
    weights = {name: value.to(dtype) for name, value in weights.items()}
    path.mkdir(parents=True, exist_ok=True)
    _save(path, weights, names or ("2025" if modern else "2024"), release)
    config: dict[str, Any] = {"model_type": "moondream1", "architectures": ["HfMoondream"]}
    if modern:
        config["config"] = (
            {}
            if silent
            else {
                "text": {
                    "dim": 64 * text_heads,
                    "n_heads": text_heads,
                    "n_kv_heads": text_kv_heads,
                    "max_context": 512,
                },
                "vision": {"enc_n_heads": vision_heads, "overlap_margin": overlap},
                "tokenizer": token_config(release, vocabulary),
            }
        )
        (path / "moondream.py").write_text(CODE[release])
    else:
        config["architectures"] = ["Moondream"]
        heads = {"num_attention_heads": text_heads, "max_position_embeddings": 512}
        config["text_config"] = {"model_type": "phi", **heads}
    (path / "config.json").write_text(json.dumps(config))
    vocabulary.save(str(path / "tokenizer.json"))
    shape = Shape(text_heads, vision_heads, overlap=overlap)
    return Reference(weights, release, shape)


def tokenizer(release: str) -> Tokenizer:
    """Byte-level BPE: GPT-2's kind, the end token behind, or starmie's kind, it in front."""
    if release < "2025-06-21":
        made = byte_level_bpe(())
        made.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
        return made
    return byte_level_bpe(("<|endoftext|>", *(f"<|md_reserved_{n}|>" for n in range(9))))


def token_config(release: str, made: Tokenizer) -> dict[str, Any]:
    """TokenizerConfig in the ids of a small vocabulary."""

    def ids(text: str) -> list[int]:
        return made.encode(text, add_special_tokens=False).ids

    if release == "2025-06-21":
        return {
            **IDS,
            "templates": {
                "caption": {n: [1, *ids("caption"), 2, *ids(n), 3] for n in _LENGTHS},
                "query": {"prefix": [1, *ids("query"), 2], "suffix": [3]},
                "detect": {"prefix": [1, *ids("detect"), 2], "suffix": [3]},
                "point": {"prefix": [1, *ids("point"), 2], "suffix": [3]},
            },
        }
    end = made.token_to_id("<|endoftext|>")
    captions = {"short": "Short caption", "normal": "Caption", "long": "Long caption"}
    if release == "2025-01-09":
        del captions["long"]
    return {
        "bos_id": end,
        "eos_id": end,
        "templates": {
            "caption": {length: ids(f"\n\n{text}:") for length, text in captions.items()},
            "query": {"prefix": ids("\n\nQuestion:"), "suffix": ids("\n\nAnswer:")},
            "detect": {"prefix": ids("\n\nDetect:"), "suffix": ids("\n\n")},
            "point": {"prefix": ids("\n\nPoint:"), "suffix": ids("\n\n")},
        },
    }


_LENGTHS = ("short", "normal", "long")


def _weights(
    n_vocab: int, grid: int, n_embd: int, n_kv: int, width: int, *, pooled: bool, region: bool
) -> dict[str, torch.Tensor]:
    sizes: dict[str, tuple[int, int]] = {  # linear layers: out, in
        "text.lm_head": (n_vocab, n_embd),
        "vision.patch_emb": (width, 588),
        "vision.proj_mlp.fc1": (90, width * (1 + pooled)),
        "vision.proj_mlp.fc2": (n_embd, 90),
    }
    norms = {"text.post_ln": n_embd, "vision.post_ln": width}
    for n in range(2):
        text, vision = f"text.blocks.{n}", f"vision.blocks.{n}"
        norms |= {f"{text}.ln": n_embd, f"{vision}.ln1": width, f"{vision}.ln2": width}
        sizes |= {
            f"{text}.attn.qkv": (n_embd + 2 * n_kv, n_embd),
            f"{text}.attn.proj": (n_embd, n_embd),
            f"{text}.mlp.fc1": (160, n_embd),
            f"{text}.mlp.fc2": (n_embd, 160),
            f"{vision}.attn.qkv": (3 * width, width),
            f"{vision}.attn.proj": (width, width),
            f"{vision}.mlp.fc1": (70, width),
            f"{vision}.mlp.fc2": (width, 70),
        }
    if region:
        sizes |= {
            "region.coord_encoder": (n_embd, 32),
            "region.size_encoder": (n_embd, 64),
            "region.coord_decoder.fc1": (96, n_embd),
            "region.coord_decoder.fc2": (1024, 96),
            "region.size_decoder.fc1": (96, n_embd),
            "region.size_decoder.fc2": (2048, 96),
        }
    weights = {
        "text.wte": torch.randn(n_vocab, n_embd),
        "vision.pos_emb": torch.randn(1, grid**2, width) * 0.5,
    }
    for name, (n_out, n_in) in sizes.items():
        weights[f"{name}.weight"] = torch.randn(n_out, n_in) * n_in**-0.5
        weights[f"{name}.bias"] = torch.randn(n_out) * 0.2
    for name, size in norms.items():
        weights[f"{name}.weight"] = 1 + 0.2 * torch.randn(size)
        weights[f"{name}.bias"] = 0.2 * torch.randn(size)
    weights["text.lm_head.weight"] *= 3  # so that the likeliest token is so by more than rounding
    if region:
        weights["region.coord_features"] = torch.randn(1, 16)
        weights["region.size_features"] = torch.randn(2, 32)
        for kind in ("coord", "size"):
            weights[f"region.{kind}_decoder.fc2.weight"] *= 3
    return weights


def _save(path: Path, weights: dict[str, torch.Tensor], names: str, release: str) -> None:
    stored = {}
    for name, value in weights.items():
        if names == "2025":
            stored[f"model.{name}"] = value
            continue
        if name.endswith("_features"):
            value = value.T
        for plain, old in _OLD_NAMES:
            name = re.sub(rf"\A{plain}", old, name)
        stored[name.replace(".visual.", ".visual._orig_mod.")] = value.contiguous()
    if release < "2025":  # never used: an earlier attempt at pointing
        stored["region_model.position_encoder.weight"] = torch.randn(4, 4)
        stored["region_model.size_features.weight"] = torch.randn(4, 4)
    save_file(stored, path / "model.safetensors")


def starmie() -> Tokenizer:
    """A vocabulary of the real size in which the real templates' ids are what they should be."""
    n_vocab = 51200
    special = ["<|endoftext|>", *(f"<|md_reserved_{n}|>" for n in range(9))]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: n for n, token in enumerate([*special, *alphabet])}
    merges = [("q", "u"), ("qu", "e"), ("que", "r"), ("quer", "y")]
    ids |= {"".join(pair): 300 + n for n, pair in enumerate(merges)}
    ids["query"] = 15381
    taken = set(ids.values())
    ids |= {f"unused{n}": n for n in range(n_vocab) if n not in taken}
    made = Tokenizer(models.BPE(vocab=ids, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return made
