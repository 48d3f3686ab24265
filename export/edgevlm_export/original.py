"""A checkpoint in LLaVA's own format → the config that transformers would have stored.

LLaVA, nanoLLaVA and Bunny keep the language model's fields at the top of config.json and name their
tower; the tower's sizes and its image processor are known here (haotian-liu/LLaVA,
llava/model/multimodal_encoder; BAAI-DCAI/Bunny, bunny/model).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from edgevlm.errors import BundleError

from . import tower
from .checkpoint import Checkpoint, Config, Kinds, section

PROCESSORS = CLIP, SIGLIP = "CLIPImageProcessor", "SiglipImageProcessor"
MARK = "<image>"  # where a picture belongs; words before and after it are tokenized apart
_ARCHITECTURE = re.compile(r"(?P<by>Llava|Bunny)(?P<text>[A-Z][A-Za-z0-9]*)ForCausalLM")
_TEXT = {"Llama": "llama", "Mistral": "mistral", "Phi3": "phi3", "Qwen": "qwen2", "Qwen2": "qwen2"}
_KINDS: Kinds = {
    "mm_vision_tower": str,
    "mm_projector_type": str,
    "mm_vision_select_layer": int,
    "mm_vision_select_feature": str,
    "image_aspect_ratio": str,
    "vision_config": dict,
    "image_grid_pinpoints": list,
}
_TOWERS: dict[str, Config] = {
    "clip-vit-large-patch14-336": tower.CLIP_L_336,
    "siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}
_TILES = "anyres"  # the image_aspect_ratio of LLaVA-1.6, which families/llava_next.py exports
# image_aspect_ratio -> ours; None: the processor's own
_FITS = {"pad": "pad", "square": None, _TILES: None}


def matches(checkpoint: Checkpoint) -> bool:
    architectures = checkpoint.config.get("architectures") or []  # --family may stand in for it
    return any(_ARCHITECTURE.fullmatch(name) for name in architectures if isinstance(name, str))


def has_tiles(checkpoint: Checkpoint) -> bool:
    return matches(checkpoint) and checkpoint.config.get("image_aspect_ratio") == _TILES


def config(checkpoint: Checkpoint) -> Config:
    """What config.json would be; with the image processor, the fit and the prompt of the format."""
    where = checkpoint.directory / "config.json"
    flat = section(checkpoint.config, _KINDS, where)
    architecture = next(filter(None, map(_ARCHITECTURE.fullmatch, flat["architectures"])))
    if architecture["text"] not in _TEXT:
        raise BundleError(
            f"the language model of {architecture[0]} in {where} is not known; known: "
            f"{', '.join(_TEXT)}"
        )
    if (kind := flat.get("mm_projector_type", "linear")) != "mlp2x_gelu":
        raise BundleError(f"mm_projector_type {kind!r} in {where}; known: mlp2x_gelu")
    ratio = flat.get("image_aspect_ratio", "square")
    if ratio not in _FITS:
        raise BundleError(
            f"image_aspect_ratio {ratio!r} in {where}; known: {', '.join(_FITS)}: take the "
            "checkpoint that transformers reads (its name ends in -hf)"
        )
    if flat.get("use_s2"):  # Bunny's: the tower's features at several scales, joined
        raise BundleError(f"{where} sets use_s2, which is not known: take a model without S2")
    merge = flat.get("mm_patch_merge_type", "flat")
    if ratio == _TILES and merge != "spatial_unpad":
        raise BundleError(f"mm_patch_merge_type {merge!r} in {where}; known: spatial_unpad")
    vision = _tower(checkpoint, flat)
    clip = vision["model_type"] == "clip_vision_model"
    patches_only = flat.get("mm_vision_select_feature", "patch") == "patch"
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    return {
        "text_config": {**flat, "model_type": _TEXT[architecture["text"]]},
        "vision_config": vision,
        "vision_feature_layer": flat.get("mm_vision_select_layer", -2),
        # a SigLIP tower has no CLS row, and this format drops none
        "vision_feature_select_strategy": "default" if clip and patches_only else "full",
        "tie_word_embeddings": bool(flat.get("tie_word_embeddings")),
        "image_processor": {
            "image_processor_type": CLIP if clip else SIGLIP,
            "size": {"shortest_edge": vision["image_size"]} if clip else size,
            **({"crop_size": size} if clip else {}),
        },
        "image_grid_pinpoints": _pinpoints(flat, where),
        "fit": _FITS[ratio],
        "prompt": "bunny" if architecture["by"] == "Bunny" else None,
    }


def canonical(name: str) -> str:
    """`model.vision_tower.vision_tower.…`, `model.mm_projector.…`, `model.layers.…` → the names
    that tower, projector and decoder take."""
    for stored, plain in (
        ("model.image_newline", "image_newline"),
        ("model.vision_tower.vision_tower.vision_model.", "vision_tower."),
        ("model.vision_tower.vision_tower.", "vision_tower."),
        ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
        ("model.", "language_model."),
    ):
        if name.startswith(stored):
            return plain + name.removeprefix(stored)
    return name


def _pinpoints(flat: Config, where: Path) -> list[list[int]]:
    """(height, width) as transformers has them; this format has (width, height)."""
    stored = flat.get("image_grid_pinpoints", [])
    try:
        return [[height, width] for width, height in stored]
    except (ValueError, TypeError) as error:
        raise BundleError(f"{where} says image_grid_pinpoints = {stored!r:.60}") from error


def _tower(checkpoint: Checkpoint, flat: Config) -> Config:
    named = str(flat.get("mm_vision_tower", ""))
    short = named.rsplit("/", 1)[-1]
    found: dict[str, Any] | None = flat.get("vision_config") or _TOWERS.get(short)
    if found is None or "model_type" not in found:
        raise BundleError(
            f"the vision tower {named!r} in {checkpoint.directory} is not known; known: "
            f"{', '.join(_TOWERS)}"
        )
    if not any(name.startswith("model.vision_tower.") for name in checkpoint.names):
        raise BundleError(
            f"{checkpoint.directory} holds no tensors of its vision tower {named}: take the "
            "checkpoint that transformers reads (its name ends in -hf)"
        )
    return found
