"""Vision towers of random weights at real shapes, as our graph and as llama.cpp's mmproj file.

Speed does not depend on the values. Tensors are drawn one at a time while a file is written, so
memory holds one of them; names come from the families that the shapes belong to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import gguf
import numpy as np
from edgevlm_export import crops, tower
from edgevlm_export.checkpoint import Checkpoint
from edgevlm_export.families import llava
from edgevlm_export.graph import Graph
from numpy.typing import NDArray


@dataclass(frozen=True)
class Shape:
    """A vision tower and its projector."""

    clip: bool  # else SigLIP, as Moondream2 of 2024 has it: one crop, all layers
    width: int
    ff_width: int
    n_heads: int
    n_layers: int  # that are run
    image_px: int
    patch_px: int
    projector: tuple[int, int]
    eps: float

    @property
    def n_patches(self) -> int:
        return (self.image_px // self.patch_px) ** 2


TOWERS = {
    # openai/clip-vit-large-patch14-336 under LLaVA-Phi-3-mini, without the layer it does not read
    "CLIP-L/336": Shape(True, 1024, 4096, 16, 23, 336, 14, (3072, 3072), 1e-5),
    # google/siglip-so400m-patch14-384 at Moondream2's 378 px
    "SigLIP-so400m/378": Shape(False, 1152, 4304, 16, 27, 378, 14, (8192, 2048), 1e-5),
}


class Random(Checkpoint):
    """A checkpoint that was never trained: every tensor is drawn when it is asked for."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.directory = Path("random")
        self._shapes = shapes

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def get(self, name: str) -> NDArray[np.float32]:
        return _drawn(name, self._shapes[name])


def _drawn(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Activations keep their size through a matrix; a norm scales by 1."""
    if len(shape) == 1 and name.endswith("weight"):
        return np.ones(shape, np.float32)
    values = np.random.default_rng(crc32(name.encode())).standard_normal(shape, np.float32)
    values *= np.float32(0.02 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5)
    return values


def graph(shape: Shape) -> Graph:
    return _clip(shape) if shape.clip else _siglip(shape)


def _clip(shape: Shape) -> Graph:
    """By the family llava."""
    width, stem = shape.width, "vision_tower."
    shapes: dict[str, tuple[int, ...]] = {
        f"{stem}embeddings.patch_embedding.weight": (width, 3, shape.patch_px, shape.patch_px),
        f"{stem}embeddings.position_embedding.weight": (shape.n_patches + 1, width),
        f"{stem}embeddings.class_embedding": (width,),
    }
    linear: dict[str, tuple[int, int]] = {
        "multi_modal_projector.linear_1": (shape.projector[0], width),
        "multi_modal_projector.linear_2": (shape.projector[1], shape.projector[0]),
    }
    norms = [f"{stem}pre_layrnorm"]
    for layer in range(shape.n_layers):
        block = f"{stem}encoder.layers.{layer}."
        norms += [f"{block}layer_norm1", f"{block}layer_norm2"]
        linear |= {f"{block}self_attn.{p}_proj": (width, width) for p in ("q", "k", "v", "out")}
        linear[f"{block}mlp.fc1"] = (shape.ff_width, width)
        linear[f"{block}mlp.fc2"] = (width, shape.ff_width)
    weights = Random(_with_biases(shapes, linear, norms, width))
    plan = tower.Tower(
        stem, shape.n_layers, shape.n_heads, width, shape.ff_width, shape.image_px,
        shape.patch_px, "quick_gelu", shape.eps, cls=True,
    )  # fmt: skip
    root = {"vision_feature_layer": -1}
    normalisation = tower.Normalisation(1 / 255, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    return llava.vision(weights, root, plan, normalisation, shape.projector[1])[0]


def _siglip(shape: Shape) -> Graph:
    """By the family moondream."""
    width, inner, n_embd = shape.width, *shape.projector
    shapes: dict[str, tuple[int, ...]] = {"vision.pos_emb": (1, shape.n_patches, width)}
    linear: dict[str, tuple[int, int]] = {
        "vision.patch_emb": (width, 3 * shape.patch_px**2),
        "vision.proj_mlp.fc1": (inner, width),
        "vision.proj_mlp.fc2": (n_embd, inner),
    }
    norms = ["vision.post_ln"]
    for layer in range(shape.n_layers):
        block = f"vision.blocks.{layer}."
        norms += [f"{block}ln1", f"{block}ln2"]
        linear[f"{block}attn.qkv"] = (3 * width, width)
        linear[f"{block}attn.proj"] = (width, width)
        linear[f"{block}mlp.fc1"] = (shape.ff_width, width)
        linear[f"{block}mlp.fc2"] = (width, shape.ff_width)
    weights = Random(_with_biases(shapes, linear, norms, width))
    plan = crops.shape(weights, shape.n_heads)
    return crops.graph(weights, plan, averages=False, first_row=None)


def _with_biases(
    shapes: dict[str, tuple[int, ...]],
    linear: dict[str, tuple[int, int]],
    norms: list[str],
    width: int,
) -> dict[str, tuple[int, ...]]:
    for name, (n_out, n_in) in linear.items():
        shapes |= {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def mmproj(path: Path, shape: Shape, kind: str) -> None:
    """The same shape as llama.cpp's converter writes it; matrices as `kind`."""
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    for key, value in {
        "image_size": shape.image_px,
        "patch_size": shape.patch_px,
        "embedding_length": shape.width,
        "feed_forward_length": shape.ff_width,
        "attention.head_count": shape.n_heads,
        "block_count": shape.n_layers,
        "projection_dim": shape.projector[1],
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", shape.eps)
    writer.add_array("clip.vision.feature_layer", [shape.n_layers])
    writer.add_bool("clip.use_gelu", not shape.clip)
    writer.add_array("clip.vision.image_mean", [0.5] * 3)
    writer.add_array("clip.vision.image_std", [0.5] * 3)
    dtype = gguf.GGMLQuantizationType[kind]
    for name, dims in _mmproj_tensors(shape):
        values = _drawn(name, dims)
        block, _ = gguf.GGML_QUANT_SIZES[dtype]
        if len(dims) == 1 or name == "v.position_embd.weight":
            writer.add_tensor(name, values)
        elif len(dims) == 4 or dims[-1] % block:  # as the converter does with what has no blocks
            writer.add_tensor(name, values.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _mmproj_tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, ff_width = shape.width, shape.ff_width
    yield "v.patch_embd.weight", (width, 3, shape.patch_px, shape.patch_px)
    yield "v.position_embd.weight", (shape.n_patches + shape.clip, width)
    vectors = {"v.post_ln": width}
    if shape.clip:
        yield "v.class_embd", (width,)
        vectors = {"v.pre_ln": width}
    else:
        yield "v.patch_embd.bias", (width,)
    inner, n_embd = shape.projector
    matrices = {"mm.0": (inner, width), "mm.2": (n_embd, inner)}
    for layer in range(shape.n_layers):
        block = f"v.blk.{layer}."
        vectors |= {f"{block}ln1": width, f"{block}ln2": width}
        matrices |= {f"{block}attn_{part}": (width, width) for part in ("q", "k", "v", "out")}
        matrices |= {f"{block}ffn_up": (ff_width, width), f"{block}ffn_down": (width, ff_width)}
    for name, n in vectors.items():
        yield f"{name}.weight", (n,)
        yield f"{name}.bias", (n,)
    for name, (n_out, n_in) in matrices.items():
        yield f"{name}.weight", (n_out, n_in)
        yield f"{name}.bias", (n_out,)


def language_model(path: Path, n_embd: int) -> None:
    """One layer of a llama with byte tokens: libmtmd takes no mmproj without a language model."""
    writer = gguf.GGUFWriter(path, "llama")
    numbers: tuple[tuple[Callable[[Any], None], float], ...] = (
        (writer.add_context_length, 2048), (writer.add_embedding_length, n_embd),
        (writer.add_block_count, 1), (writer.add_feed_forward_length, 32),
        (writer.add_head_count, n_embd // 64), (writer.add_head_count_kv, 1),
        (writer.add_rope_dimension_count, 64), (writer.add_layer_norm_rms_eps, 1e-5),
    )  # fmt: skip
    for add, value in numbers:
        add(value)
    writer.add_tokenizer_model("llama")
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([2, 3, 3, *[6] * 256])
    for name, dims in {
        "token_embd": (len(words), n_embd), "output": (len(words), n_embd),
        "output_norm": (n_embd,),
        "blk.0.attn_norm": (n_embd,), "blk.0.ffn_norm": (n_embd,),
        "blk.0.attn_q": (n_embd, n_embd),
        "blk.0.attn_k": (64, n_embd), "blk.0.attn_v": (64, n_embd),
        "blk.0.attn_output": (n_embd, n_embd), "blk.0.ffn_gate": (32, n_embd),
        "blk.0.ffn_up": (32, n_embd), "blk.0.ffn_down": (n_embd, 32),
    }.items():  # fmt: skip
        dtype = np.float32 if len(dims) == 1 else np.float16
        writer.add_tensor(f"{name}.weight", np.ones(dims, dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
