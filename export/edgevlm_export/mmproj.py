"""A checkpoint's tower and projector → llama.cpp's mmproj GGUF, for the peer of the benchmarks.

Keys and names are what llama.cpp reads (tools/mtmd/clip-impl.h and clip.cpp); matrices are f16, as
its converter writes them. Of Moondream only what libmtmd can run: the tower over one crop and a
projector that reads that crop alone, half as wide as the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from .checkpoint import Checkpoint
from .graph import Array, Load
from .processor import CLIP_MEAN, CLIP_STD

Named = Iterator[tuple[str, Load]]

_LAYER = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_CROP_LAYER = {
    "ln1": "ln1",
    "ln2": "ln2",
    "attn.proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def write(checkpoint: Checkpoint, path: Path) -> Path:
    """Write the mmproj file of a checkpoint with canonical tensor names.

    Raises:
        BundleError: a tensor is missing.
    """
    writer = GGUFWriter(path, "clip", use_temp_file=True)  # else all of it would wait in memory
    writer.add_bool("clip.has_vision_encoder", True)
    tensors = _crops(checkpoint, writer) if "vision.pos_emb" in checkpoint else \
        _vit(checkpoint, writer)  # fmt: skip
    for name, load in tensors:
        values = load()
        matrix = values.ndim > 1 and name != "v.position_embd.weight"
        writer.add_tensor(name, np.ascontiguousarray(values, np.float16 if matrix else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _keys(writer: GGUFWriter, projector: str, sizes: dict[str, int], eps: float) -> None:
    writer.add_string("clip.projector_type", projector)
    for key, value in sizes.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", eps)


def _vit(checkpoint: Checkpoint, writer: GGUFWriter) -> Named:
    """CLIP or SigLIP as transformers names them, with LLaVA's or Idefics3's projector."""
    config: dict[str, Any] = checkpoint.config["vision_config"]
    clip = "vision_tower.embeddings.class_embedding" in checkpoint
    shuffle = "connector.modality_projection.proj.weight" in checkpoint
    n_layers: int = config["num_hidden_layers"]
    if not shuffle:  # LLaVA reads an earlier hidden state, before the last norm
        n_layers += 1 + checkpoint.config.get("vision_feature_layer", -2)
    sizes = {
        "image_size": config["image_size"],
        "patch_size": config["patch_size"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "block_count": n_layers,
        "projection_dim": checkpoint.config["text_config"]["hidden_size"],
    }
    if shuffle:
        sizes["projector.scale_factor"] = checkpoint.config["scale_factor"]
        processor = checkpoint.json("preprocessor_config.json") or {}
        sizes["preproc_image_size"] = processor["size"]["longest_edge"]
    _keys(writer, "idefics3" if shuffle else "mlp", sizes, 1e-5 if clip else 1e-6)
    if not shuffle:
        writer.add_array("clip.vision.feature_layer", [n_layers])
    writer.add_bool("clip.use_gelu", not clip)
    writer.add_array("clip.vision.image_mean", list(CLIP_MEAN) if clip else [0.5] * 3)
    writer.add_array("clip.vision.image_std", list(CLIP_STD) if clip else [0.5] * 3)

    def pairs(source: str, target: str) -> Named:
        for part in ("weight", "bias"):
            if f"{source}.{part}" in checkpoint:
                yield f"{target}.{part}", _loader(checkpoint, f"{source}.{part}")

    yield from pairs("vision_tower.embeddings.patch_embedding", "v.patch_embd")
    yield from pairs("vision_tower.embeddings.position_embedding", "v.position_embd")
    if clip:
        yield "v.class_embd", _loader(checkpoint, "vision_tower.embeddings.class_embedding")
        yield from pairs("vision_tower.pre_layrnorm", "v.pre_ln")
    if shuffle:
        yield from pairs("vision_tower.post_layernorm", "v.post_ln")
    for layer in range(n_layers):
        for source, target in _LAYER.items():
            yield from pairs(f"vision_tower.encoder.layers.{layer}.{source}",
                             f"v.blk.{layer}.{target}")  # fmt: skip
    yield from pairs("multi_modal_projector.linear_1", "mm.0")
    yield from pairs("multi_modal_projector.linear_2", "mm.2")
    yield from pairs("connector.modality_projection.proj", "mm.model.fc")


def _crops(checkpoint: Checkpoint, writer: GGUFWriter) -> Named:
    """Moondream's SigLIP, one crop of it."""
    n_patches, width = checkpoint.shape("vision.pos_emb")[1:]
    patch_px = round((checkpoint.shape("vision.patch_emb.weight")[1] / 3) ** 0.5)
    n_layers = sum(name.endswith(".ln1.weight") for name in checkpoint.names)
    sizes = {
        "image_size": round(n_patches**0.5) * patch_px,
        "patch_size": patch_px,
        "embedding_length": width,
        "feed_forward_length": checkpoint.shape("vision.blocks.0.mlp.fc1.weight")[0],
        "attention.head_count": checkpoint.config["config"]["vision"]["enc_n_heads"],
        "block_count": n_layers,
        "projection_dim": checkpoint.shape("vision.proj_mlp.fc2.weight")[0],
    }
    _keys(writer, "mlp", sizes, 1e-5)
    writer.add_array("clip.vision.feature_layer", [n_layers])  # all of them
    writer.add_bool("clip.use_gelu", True)
    writer.add_array("clip.vision.image_mean", [0.5] * 3)
    writer.add_array("clip.vision.image_std", [0.5] * 3)

    def shaped(source: str, shape: tuple[int, ...]) -> Load:
        return lambda: checkpoint.get(source).reshape(shape)

    def part_of(source: str, third: int) -> Load:
        return lambda: checkpoint.get(source)[third * width : (third + 1) * width]

    kernel = (width, 3, patch_px, patch_px)
    yield "v.patch_embd.weight", shaped("vision.patch_emb.weight", kernel)
    yield "v.patch_embd.bias", _loader(checkpoint, "vision.patch_emb.bias")
    yield "v.position_embd.weight", shaped("vision.pos_emb", (n_patches, width))
    for part in ("weight", "bias"):
        yield f"v.post_ln.{part}", _loader(checkpoint, f"vision.post_ln.{part}")
        for layer in range(n_layers):
            block, target = f"vision.blocks.{layer}", f"v.blk.{layer}"
            for third, letter in enumerate("qkv"):
                yield f"{target}.attn_{letter}.{part}", part_of(f"{block}.attn.qkv.{part}", third)
            for source, name in _CROP_LAYER.items():
                yield f"{target}.{name}.{part}", _loader(checkpoint, f"{block}.{source}.{part}")
    first = "vision.proj_mlp.fc1.weight"
    yield "mm.0.weight", lambda: checkpoint.get(first)[:, :width]
    yield "mm.0.bias", _loader(checkpoint, "vision.proj_mlp.fc1.bias")
    yield "mm.2.weight", _loader(checkpoint, "vision.proj_mlp.fc2.weight")
    yield "mm.2.bias", _loader(checkpoint, "vision.proj_mlp.fc2.bias")


def _loader(checkpoint: Checkpoint, name: str) -> Callable[[], Array]:
    return lambda: checkpoint.get(name)
