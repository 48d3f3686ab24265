"""CLIP and SigLIP tensors → the tower's part of the vision graph, and the projector behind it.

The patch embedding takes raw uint8 patches: rescale, mean and std live in its weights. Only the
layers below the deepest hidden state that is read are written. Reference: transformers'
modeling_clip.py, modeling_siglip.py and modeling_llava.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgevlm.errors import BundleError

from .checkpoint import Checkpoint, Config, whole_number
from .graph import Array, Graph, Load
from .linear import CONTRIB

_INT64_MAX = 2**63 - 1
# openai/clip-vit-large-patch14-336, which LLaVA's configs may leave out.
CLIP_L_336: Config = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Normalisation:
    """What the reference does to a uint8 value: (value · rescale - mean) / std, for R, G and B."""

    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Tower:
    """Shape of a ViT; tensor names are transformers' after `prefix`."""

    prefix: str
    n_layers: int
    n_heads: int
    width: int
    ff_width: int
    image_px: int
    patch_px: int
    activation: str
    eps: float
    cls: bool  # CLIP: a class row in front, a norm before the first layer, no patch bias

    @property
    def n_patches(self) -> int:
        """Whole ones: what is left at the right and below (384 px by 14) is not looked at."""
        return (self.image_px // self.patch_px) ** 2

    @property
    def patch_values(self) -> int:
        return 3 * self.patch_px**2


def shape(config: Config, where: Path, prefix: str, *, cls: bool) -> Tower:
    """The tower that a vision config, complete with defaults, describes."""
    sizes = ("hidden_size", "num_attention_heads", "image_size", "patch_size")
    width, n_heads, image_px, patch_px = (whole_number(config, key, where) for key in sizes)
    if width % n_heads or image_px < patch_px:
        raise BundleError(
            f"{where} splits a width of {width} into {n_heads} heads and {image_px} px into "
            f"patches of {patch_px} px: heads must come out even, and there must be a patch"
        )
    return Tower(
        prefix=prefix,
        n_layers=whole_number(config, "num_hidden_layers", where),
        n_heads=n_heads,
        width=width,
        ff_width=whole_number(config, "intermediate_size", where),
        image_px=image_px,
        patch_px=patch_px,
        activation=config["hidden_act"],
        eps=config["layer_norm_eps"],
        cls=cls,
    )


def hidden_states(
    graph: Graph,
    weights: Checkpoint,
    tower: Tower,
    normalisation: Normalisation,
    layers: Sequence[int],
    patches: str = "patches",
    positions: str | None = None,
) -> list[str]:
    """The hidden states `layers` (indices as transformers counts them: 0 is the first layer's
    input, negative from the end), each float32 [tiles, n_patches (+ 1 with cls), width].

    `patches` is the value that holds them, uint8 [tiles, n_patches, 3·P·P]. With `positions`, an
    int64 [n_patches], they take these positions, and there may be any number of them.
    """
    n_states = tower.n_layers + 1
    for layer in layers:
        if not -n_states <= layer < n_states:
            raise BundleError(
                f"vision_feature_layer {layer} is out of range: the tower has {tower.n_layers} "
                "layers"
            )
    wanted = [layer % n_states for layer in layers]
    value = _embed(graph, weights, tower, normalisation, patches, positions)
    if tower.cls:
        name = f"{tower.prefix}pre_layrnorm"  # transformers' spelling
        value = graph.layer_norm(value, weights, name, tower.width, tower.eps)
    states = [value]
    for layer in range(max(wanted)):
        value = _layer(graph, weights, tower, f"{tower.prefix}encoder.layers.{layer}", value)
        states.append(value)
    return [states[layer] for layer in wanted]


def drop_first_row(graph: Graph, value: str) -> str:
    """[tiles, n, width] → [tiles, n - 1, width]."""
    starts, ends, axes = (graph.constant([v], np.int64) for v in (1, _INT64_MAX, 1))
    return graph.op("Slice", value, starts, ends, axes)


def projector(
    graph: Graph,
    weights: Checkpoint,
    value: str,
    widths: tuple[int, int],
    activation: str,
    *,
    bias: bool,
) -> str:
    """LLaVA's two linear layers, `widths` = in, out."""
    n_in, n_out = widths
    name = "multi_modal_projector.linear_"
    value = linear(graph, weights, f"{name}1", value, (n_in, n_out), bias=bias)
    value = graph.activation(value, activation)
    return linear(graph, weights, f"{name}2", value, (n_out, n_out), bias=bias)


def _embed(
    graph: Graph,
    weights: Checkpoint,
    tower: Tower,
    normalisation: Normalisation,
    patches: str,
    positions: str | None,
) -> str:
    """uint8 [tiles, n_patches, 3·P·P] → float32 [tiles, n_patches (+ 1), width]."""
    prefix, width, patch_px = f"{tower.prefix}embeddings.", tower.width, tower.patch_px
    kernel = weights.expect(f"{prefix}patch_embedding.weight", width, 3, patch_px, patch_px)
    n_rows = tower.n_patches + tower.cls
    learned = weights.expect(f"{prefix}position_embedding.weight", n_rows, width)
    conv_bias = None if tower.cls else weights.expect(f"{prefix}patch_embedding.bias", width)
    class_row = weights.expect(f"{prefix}class_embedding", width) if tower.cls else None

    def matrix() -> Array:
        return fold(weights.get(kernel), normalisation)[0]

    def table() -> Array:
        """What is added to every row: position, the folded bias, and the class embedding."""
        rows = weights.get(learned).astype(np.float64)
        bias = fold(weights.get(kernel), normalisation)[1]
        if conv_bias is not None:
            bias = bias + weights.get(conv_bias)
        rows[tower.cls :] += bias
        if class_row is not None:
            rows[0] += weights.get(class_row)
        return rows.astype(np.float32)[np.newaxis]

    pixels = graph.op("Cast", patches, to=1)  # 1 is TensorProto.FLOAT
    name = f"{prefix}patch_embedding"
    value = graph.linear(pixels, name, (tower.patch_values, width), matrix, None)
    if tower.cls:  # an empty first row: the class embedding arrives with the table
        value = graph.op("Pad", value, graph.constant([0, 1, 0, 0, 0, 0], np.int64))
    added = graph.weight(learned, (1, n_rows, width), table)
    if positions is not None:
        added = graph.op("Gather", added, positions, axis=1)
    return graph.op("Add", value, added)


def fold(kernel: Array, normalisation: Normalisation) -> tuple[Array, npt.NDArray[np.float64]]:
    """[width, 3, P, P] → matrix [3·P·P, width] for raw uint8 values, and its bias [width].

    W · ((v · rescale - mean) / std) = (W · rescale / std) · v - Σ W · mean / std. In float64:
    the bias sums hundreds of products that nearly cancel.
    """
    std = np.asarray(normalisation.std, np.float64)[:, np.newaxis, np.newaxis]
    mean = np.asarray(normalisation.mean, np.float64)[:, np.newaxis, np.newaxis]
    scaled = kernel.astype(np.float64) / std
    bias = -(scaled * mean).sum(axis=(1, 2, 3))
    matrix = (scaled * normalisation.rescale).reshape(len(kernel), -1).T
    return matrix.astype(np.float32), bias


def _layer(graph: Graph, weights: Checkpoint, tower: Tower, name: str, value: str) -> str:
    width, ff_width = tower.width, tower.ff_width
    normed = graph.layer_norm(value, weights, f"{name}.layer_norm1", width, tower.eps)
    mixed = _attention(graph, weights, tower, f"{name}.self_attn", normed)
    value = graph.residual(value, mixed)
    normed = graph.layer_norm(value, weights, f"{name}.layer_norm2", width, tower.eps)
    inner = linear(graph, weights, f"{name}.mlp.fc1", normed, (width, ff_width))
    inner = graph.activation(inner, tower.activation)
    inner = linear(graph, weights, f"{name}.mlp.fc2", inner, (ff_width, width))
    return graph.residual(value, inner)


def _attention(graph: Graph, weights: Checkpoint, tower: Tower, name: str, value: str) -> str:
    for part in ("q", "k", "v", "out"):
        weights.expect(f"{name}.{part}_proj.weight", tower.width, tower.width)
        weights.expect(f"{name}.{part}_proj.bias", tower.width)

    def read(part: str, kind: str) -> Array:
        return weights.get(f"{name}.{part}_proj.{kind}")

    return attention(graph, value, name, tower.width, tower.n_heads, read)


def attention(
    graph: Graph,
    value: str,
    name: str,
    width: int,
    n_heads: int,
    read: Callable[[str, str], Array],
) -> str:
    """Full attention and its output projection: [tiles, n, width] → the same.

    `read` gives the "weight" [width, width] and the "bias" [width] of "q", "k", "v" and "out".
    K's bias would add the same to all scores of a row, which a softmax does not see; V's comes out
    as it goes in, for probabilities sum to 1, and moves through the projection into its bias.
    Three products with one quantization of their input: faster than one product and a Split.
    """

    def out_bias() -> Array:
        bias: Array = read("out", "bias") + read("out", "weight") @ read("v", "bias")
        return bias

    def part(letter: str, value: str, bias: Load | None) -> str:
        stem, shape = f"{name}.{letter}_proj", (width, width)
        return graph.linear(value, stem, shape, lambda: read(letter, "weight").T, bias)

    q = part("q", value, lambda: read("q", "bias"))
    k, v = part("k", value, None), part("v", value, None)
    mixed = graph.op("MultiHeadAttention", q, k, v, num_heads=n_heads, domain=CONTRIB)
    return part("out", mixed, out_bias)


def linear(
    graph: Graph,
    weights: Checkpoint,
    name: str,
    value: str,
    shape: tuple[int, int],
    *,
    bias: bool = True,
) -> str:
    """One torch Linear, stored [out, in]; `shape` is [in, out], `bias` says if the reference's has
    one: a checkpoint that lacks it or brings another is not the model it says it is."""
    n_in, n_out = shape
    weight, added = weights.expect(f"{name}.weight", n_out, n_in), f"{name}.bias"
    if not bias and added in weights:
        raise BundleError(
            f"{added} is in {weights.directory}, but this model has no such bias: config.json "
            "belongs to another checkpoint"
        )
    if bias:
        weights.expect(added, n_out)
    return graph.linear(
        value, name, shape, lambda: weights.get(weight).T,
        (lambda: weights.get(added)) if bias else None,
    )  # fmt: skip
