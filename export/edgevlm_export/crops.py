"""A SigLIP tower over the crops of one picture → the graph that stitches and pools their features.

Crops go in as one batch; one picture's embeddings come out, with the row of BOS in front where the
model reads both together. The family's `graph_inputs` says which feature lies where. Reference:
vikhyat/moondream, moondream/torch/vision.py, and for 2024 moondream/vision_encoder.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgevlm.errors import BundleError

from .checkpoint import Checkpoint
from .graph import Array, Graph
from .phi2 import n_layers
from .tower import Normalisation, attention, fold, linear

_EPS = 1e-5  # torch's default, which the reference uses; SigLIP's own is 1e-6
_N_HEADS = {720: 10}  # of the 0.5B model's narrower tower; else the reference's own default
_DEFAULT_N_HEADS = 16
_INT64_MAX = 2**63 - 1
# What the reference does to a uint8 value: (value / 255 - 0.5) / 0.5.
_NORMALISATION = Normalisation(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Tower:
    """Shape of the tower and of the projector behind it."""

    width: int
    ff_width: int
    n_layers: int
    n_heads: int
    grid: int  # patches along a crop
    patch_px: int
    projector_width: int
    n_embd: int
    pooled: bool  # the projector reads the whole picture's features beside those of its crops

    @property
    def n_patches(self) -> int:
        return self.grid**2


def shape(checkpoint: Checkpoint, n_heads: int | None) -> Tower:
    """The tower that the tensors describe; `n_heads` where the config says it.

    Raises:
        BundleError: tensors contradict each other.
    """
    width, n_values = checkpoint.axes("vision.patch_emb.weight", 2)
    patch_px, n_patches = round((n_values / 3) ** 0.5), checkpoint.axes("vision.pos_emb", 3)[1]
    grid = round(n_patches**0.5)
    n_heads = n_heads or _N_HEADS.get(width, _DEFAULT_N_HEADS)
    projector_width, read = checkpoint.axes("vision.proj_mlp.fc1.weight", 2)
    if 3 * patch_px**2 != n_values or grid**2 != n_patches or width % n_heads:
        raise BundleError(
            f"{checkpoint.directory}: {n_patches} patches of {n_values} values, {n_heads} heads in "
            f"a width of {width} are no tower of square patches and whole heads"
        )
    if read not in (width, 2 * width):
        raise BundleError(f"the projector reads {read} values; the tower gives {width}")
    return Tower(
        width=width,
        ff_width=checkpoint.axes("vision.blocks.0.mlp.fc1.weight", 2)[0],
        n_layers=n_layers(checkpoint, "vision"),
        n_heads=n_heads,
        grid=grid,
        patch_px=patch_px,
        projector_width=projector_width,
        n_embd=checkpoint.axes("vision.proj_mlp.fc2.weight", 2)[0],
        pooled=read == 2 * width,
    )


def graph(checkpoint: Checkpoint, tower: Tower, *, averages: bool, first_row: int | None) -> Graph:
    """The whole vision graph.

    `averages`: the view of the whole picture is not a crop of its own but the mean of 2 × 2, 2 × 1
    or 1 × 2 pixels of the others. `first_row`: a token whose embedding goes in front.
    """
    built = Graph(tower.n_patches, 3 * tower.patch_px**2)
    pixels = built.op("Cast", "patches", to=1)  # 1 is TensorProto.FLOAT
    if averages:
        pixels = _with_average(built, tower, pixels)
    features = _features(built, checkpoint, tower, pixels)  # [crops, n_patches, width]
    name, widths = "vision.proj_mlp.fc1", (tower.width, tower.projector_width)
    if tower.pooled:
        value = _linear_of_two(
            built, checkpoint, name, *_whole_and_pooled(built, tower, features), widths
        )
    else:
        value = linear(built, checkpoint, name, features, widths)
    value = built.activation(value, "gelu_pytorch_tanh")
    widths = (tower.projector_width, tower.n_embd)
    value = linear(built, checkpoint, "vision.proj_mlp.fc2", value, widths)
    if first_row is not None:
        shape = (1, 1, tower.n_embd)
        row = built.weight("bos", shape, lambda: checkpoint.get("text.wte")[[first_row]][None])
        value = built.op("Concat", row, value, axis=1)
    built.output(value, tower.n_patches + (first_row is not None), tower.n_embd)
    return built


def _features(graph: Graph, weights: Checkpoint, tower: Tower, pixels: str) -> str:
    """float32 [crops, n_patches, 3·P·P] → [crops, n_patches, width], after the last norm."""
    patch_px, width = tower.patch_px, tower.width
    kernel = weights.expect("vision.patch_emb.weight", width, 3 * patch_px**2)
    bias = weights.expect("vision.patch_emb.bias", width)
    positions = weights.expect("vision.pos_emb", 1, tower.n_patches, width)

    def folded() -> tuple[Array, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
        stored = weights.get(kernel).reshape(width, 3, patch_px, patch_px)
        return fold(stored, _NORMALISATION)

    def table() -> Array:
        rows = weights.get(positions) + (folded()[1] + weights.get(bias))
        return rows.astype(np.float32)

    value = graph.linear(
        pixels, "vision.patch_emb", (3 * patch_px**2, width), lambda: folded()[0], None
    )
    table_name = graph.weight(positions, (1, tower.n_patches, width), table)
    value = graph.op("Add", value, table_name)
    for layer in range(tower.n_layers):
        value = _layer(graph, weights, tower, f"vision.blocks.{layer}", value)
    return graph.layer_norm(value, weights, "vision.post_ln", width, _EPS)


def _layer(graph: Graph, weights: Checkpoint, tower: Tower, name: str, value: str) -> str:
    width, ff_width, n_heads = tower.width, tower.ff_width, tower.n_heads
    weights.expect(f"{name}.attn.qkv.weight", 3 * width, width)
    weights.expect(f"{name}.attn.qkv.bias", 3 * width)
    weights.expect(f"{name}.attn.proj.weight", width, width)
    weights.expect(f"{name}.attn.proj.bias", width)

    def read(part: str, kind: str) -> Array:
        if part == "out":
            return weights.get(f"{name}.attn.proj.{kind}")
        first = "qkv".index(part) * width
        return weights.get(f"{name}.attn.qkv.{kind}")[first : first + width]

    normed = graph.layer_norm(value, weights, f"{name}.ln1", width, _EPS)
    mixed = attention(graph, normed, f"{name}.attn", width, n_heads, read)
    value = graph.residual(value, mixed)
    normed = graph.layer_norm(value, weights, f"{name}.ln2", width, _EPS)
    inner = linear(graph, weights, f"{name}.mlp.fc1", normed, (width, ff_width))
    inner = graph.activation(inner, "gelu_pytorch_tanh")
    inner = linear(graph, weights, f"{name}.mlp.fc2", inner, (ff_width, width))
    return graph.residual(value, inner)


def _whole_and_pooled(graph: Graph, tower: Tower, features: str) -> tuple[str, str]:
    """The first crop's features, float32 [n_patches, width], and how far the average of all others,
    stitched to one map, is from them: [n_patches, width], or [1, width] for a picture in one view,
    which is its own map: zeros.

    Averaging a grid cell is separable: one MatMul over the rows, one over the columns.
    """
    grid, width = tower.grid, tower.width
    index = graph.input("index", np.int64, ["rows", "columns"])
    pool_rows = graph.input("pool_rows", np.float32, [grid, "rows"])
    pool_columns = graph.input("pool_columns", np.float32, ["columns", grid])
    flat = graph.op("Reshape", features, graph.constant([-1, width], np.int64))
    whole = graph.op("Slice", flat, *(graph.constant([n], np.int64) for n in (0, grid**2, 0)))
    stitched = graph.op("Gather", flat, index)  # [rows, columns, width]
    channels_first = graph.op("Transpose", stitched, perm=[2, 0, 1])
    pooled = graph.op("MatMul", pool_rows, channels_first)  # [width, grid, columns]
    pooled = graph.op("MatMul", pooled, pool_columns)  # [width, grid, grid]
    pooled = graph.op("Reshape", pooled, graph.constant([width, grid**2], np.int64))
    pooled = graph.op("Transpose", pooled, perm=[1, 0])
    zero, one, all_of_them = (graph.constant([n], np.int64) for n in (0, 1, grid**2))
    n_crops = graph.op("Slice", graph.op("Shape", features), zero, one)
    n_rows = graph.op("Where", graph.op("Equal", n_crops, one), one, all_of_them)
    return whole, graph.op("Slice", graph.op("Sub", pooled, whole), zero, n_rows, zero)


def _linear_of_two(
    graph: Graph, weights: Checkpoint, name: str, whole: str, apart: str, widths: tuple[int, int]
) -> str:
    """A layer [2 · in, out] that reads the whole view beside the map: float32 [1, n_patches, out].

    W · [whole; map] = (W_whole + W_map) · whole + W_map · (map - whole): half the work where the
    two are the same, and no weights but the layer's own.
    """
    n_in, n_out = widths
    weight = weights.expect(f"{name}.weight", n_out, 2 * n_in)
    bias = weights.expect(f"{name}.bias", n_out)

    def of_map() -> Array:
        matrix: Array = weights.get(weight).T[n_in:]
        return matrix

    def of_both() -> Array:
        stored = weights.get(weight).T
        matrix: Array = stored[:n_in] + stored[n_in:]
        return matrix

    value = graph.linear(whole, name, widths, of_both, lambda: weights.get(bias))
    value = graph.op("Add", value, graph.linear(apart, f"{name}.map", widths, of_map, None))
    return graph.op("Unsqueeze", value, graph.constant([0], np.int64))


def _with_average(graph: Graph, tower: Tower, pixels: str) -> str:
    """Crops [n, n_patches, 3·P·P] → the same behind their average, which is the whole picture.

    The reference shrinks the resized picture to one crop with a bilinear filter, which by a factor
    of two is the mean of its pixels. A picture of one crop is left alone.
    """
    side, patch_px, crop_px = tower.grid, tower.patch_px, tower.grid * tower.patch_px
    counts = graph.input("grid", np.int64, [2])  # rows and columns of crops
    rows, columns = (
        graph.op("Gather", counts, graph.constant([axis], np.int64)) for axis in (0, 1)
    )

    def reshape(value: str, *shape: str | int) -> str:
        parts = (n if isinstance(n, str) else graph.constant([n], np.int64) for n in shape)
        return graph.op("Reshape", value, graph.op("Concat", *parts, axis=0))

    # [rows, columns, patch row, patch column, channel, y, x] → [channel, height, width]
    value = reshape(pixels, rows, columns, side, side, 3, patch_px, patch_px)
    value = graph.op("Transpose", value, perm=[4, 0, 2, 5, 1, 3, 6])
    value = reshape(value, 3, crop_px, rows, crop_px, columns)
    value = graph.op("ReduceMean", value, axes=[2, 4], keepdims=0)  # [3, crop_px, crop_px]
    value = reshape(value, 3, side, patch_px, side, patch_px)
    value = graph.op("Transpose", value, perm=[1, 3, 0, 2, 4])
    value = reshape(value, 1, side**2, 3 * patch_px**2)
    every = graph.op("Concat", value, pixels, axis=0)
    # One crop is its own average: skip it.
    n_crops = graph.op("Mul", rows, columns)
    one = graph.constant([1], np.int64)
    start = graph.op("Cast", graph.op("Equal", n_crops, one), to=7)  # 7 is TensorProto.INT64
    end, axis = graph.constant([_INT64_MAX], np.int64), graph.constant([0], np.int64)
    return graph.op("Slice", every, start, end, axis)
