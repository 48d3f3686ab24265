"""Fewer image tokens: VisionZip (arXiv 2412.04467) as a branch of the vision graph.

The patches that the tower attends to most are kept as they are ("dominant"); of the others, some at
even distances take in those that resemble them ("contextual"). Training-free, before the projector.
Where there is a class row, attention is what it pays, as in the authors' code
(visionzip/clip_encoder.py); where there is none, what all patches pay on average (section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .checkpoint import Checkpoint
from .graph import Array, Graph
from .tower import Tower, drop_first_row

INPUT = "visual_tokens"  # of the graph: int64 scalar, how many tokens a tile gives; 0: all
_DOMINANT = (27, 32)  # of all: 54 of 64, 108 of 128, 162 of 192 (the paper's tables)


def shorten(
    graph: Graph,
    weights: Checkpoint,
    tower: Tower,
    layer: int,
    states: tuple[str, str],
    otherwise: Callable[[], str],
) -> str:
    """`visual_tokens` rows of each tile, or what `otherwise` selects, where that is 0.

    `states` are the input and the output of the tower's `layer`, float32
    [tiles, n_patches (+ 1 with cls), width].
    """
    n_tokens = graph.input(INPUT, np.int64, [], default=0)
    asked = graph.op("Greater", n_tokens, graph.constant(0, np.int64))
    branch = _Branch(graph, weights, tower, f"{tower.prefix}encoder.layers.{layer}")
    return graph.choose(asked, lambda: branch.zip(*states, n_tokens), otherwise)


class _Branch:
    def __init__(self, graph: Graph, weights: Checkpoint, tower: Tower, name: str) -> None:
        self._graph, self._weights, self._tower, self._name = graph, weights, tower, name

    def zip(self, before: str, after: str, n_tokens: str) -> str:
        op, graph, tower = self._graph.op, self._graph, self._tower
        normed = graph.layer_norm(
            before, self._weights, f"{self._name}.layer_norm1", tower.width, tower.eps
        )
        keys = self._heads(normed, "k", 1.0)  # [tiles, n, heads, head]
        importance = self._importance(normed, keys)
        likeness = op("ReduceMean", keys, axes=[2], keepdims=0)
        patches = after
        if tower.cls:
            likeness, patches = (drop_first_row(graph, value) for value in (likeness, patches))
        times, of = (self._int(n) for n in _DOMINANT)
        n_dominant = op("Div", op("Mul", n_tokens, times), of)
        n_contextual = op("Sub", n_tokens, n_dominant)
        n_kept = op("Sub", n_dominant, self._int(1)) if tower.cls else n_dominant
        kept, others = self._ranked(importance, n_kept)
        rows = [self._rows(patches, kept)]
        if tower.cls:
            rows.insert(0, op("Slice", after, *(self._axis(n) for n in (0, 1, 1))))
        rows.append(
            self._merged(self._rows(patches, others), self._rows(likeness, others), n_contextual)
        )
        return op("Concat", *rows, axis=1)

    def _importance(self, normed: str, keys: str) -> str:
        """What attention each patch gets: [tiles, n_patches]."""
        op = self._graph.op
        if self._tower.cls:
            normed = op("Slice", normed, *(self._axis(n) for n in (0, 1, 1)))
        queries = self._heads(normed, "q", (self._tower.width // self._tower.n_heads) ** -0.5)
        queries = op("Transpose", queries, perm=[0, 2, 1, 3])
        keys = op("Transpose", keys, perm=[0, 2, 3, 1])
        paid = op("Softmax", op("MatMul", queries, keys), axis=-1)  # [tiles, heads, queries, n]
        got = op("ReduceMean", paid, axes=[1, 2], keepdims=0)
        if not self._tower.cls:
            return got
        ends = self._axis(self._tower.n_patches + 1)
        return op("Slice", got, self._axis(1), ends, self._axis(1))

    def _ranked(self, importance: str, n: str) -> tuple[str, str]:
        """Positions of the `n` most important patches, and of the others, both in order."""
        op, all_of_them = self._graph.op, self._axis(self._tower.n_patches)
        order = self._graph.ops("TopK", 2, importance, all_of_them)[1]
        first = op("Unsqueeze", n, self._axis(0))
        parts = (
            op("Slice", order, self._axis(0), first, self._axis(1)),
            op("Slice", order, first, all_of_them, self._axis(1)),
        )
        sizes = first, op("Sub", all_of_them, first)
        dominant, others = (
            self._graph.ops("TopK", 2, part, size, largest=0)[0]
            for part, size in zip(parts, sizes, strict=True)
        )
        return dominant, others

    def _merged(self, rows: str, likeness: str, n: str) -> str:
        """`n` of the rows, each with the mean of those that are most like it added."""
        op = self._graph.op
        length = op("ReduceL2", likeness, axes=[-1], keepdims=1)
        likeness = op("Div", likeness, length)
        n_rows = op("Gather", op("Shape", rows), self._int(1))
        zero, one = self._int(0), self._int(1)
        numbers = op("Range", zero, n, one)
        targets = op("Mul", numbers, op("Max", op("Div", n_rows, n), one))
        aims = op("Transpose", op("Gather", likeness, targets, axis=1), perm=[0, 2, 1])
        nearest = op("ArgMax", op("MatMul", likeness, aims), axis=2, keepdims=1)
        joins = op("Cast", op("Equal", nearest, numbers), to=1)  # [tiles, rows, n]
        position = op("Unsqueeze", op("Range", zero, n_rows, one), self._axis(1))
        is_target = op("Cast", op("Equal", position, targets), to=1)  # [rows, n]
        is_target = op("ReduceMax", is_target, axes=[1], keepdims=1)
        joins = op("Mul", joins, op("Sub", self._float(1), is_target))
        n_joined = op("Transpose", op("ReduceSum", joins, self._axis(1)), perm=[0, 2, 1])
        total = op("MatMul", op("Transpose", joins, perm=[0, 2, 1]), rows)
        mean = op("Div", total, op("Max", n_joined, self._float(1)))
        return op("Add", op("Gather", rows, targets, axis=1), mean)

    def _heads(self, value: str, part: str, scale: float) -> str:
        """One of the layer's projections, in float: [tiles, n, heads, head]."""
        width, n_heads = self._tower.width, self._tower.n_heads
        name, weights = f"{self._name}.self_attn.{part}_proj", self._weights
        weights.expect(f"{name}.weight", width, width)
        weights.expect(f"{name}.bias", width)

        def scaled(kind: str) -> Array:
            return (weights.get(f"{name}.{kind}") * scale).astype(np.float32)

        own = f"{name}.visionzip"  # the tower's may become int8, and K has lost its bias there
        value = self._graph.linear(
            value, own, (width, width), lambda: scaled("weight").T, lambda: scaled("bias")
        )
        shape = self._graph.constant([0, 0, n_heads, width // n_heads], np.int64)
        return self._graph.op("Reshape", value, shape)

    def _rows(self, value: str, positions: str) -> str:
        """[tiles, n_patches, width] at int64 [tiles, n] → [tiles, n, width]."""
        positions = self._graph.op("Unsqueeze", positions, self._axis(-1))
        return self._graph.op("GatherND", value, positions, batch_dims=1)

    def _int(self, value: int) -> str:
        return self._graph.constant(value, np.int64)

    def _axis(self, value: Any) -> str:
        return self._graph.constant([value], np.int64)

    def _float(self, value: float) -> str:
        return self._graph.constant(value, np.float32)
