"""A vision graph in fp32 → the same graph in fp16 or int8, and a probe of what int8 would cost.

int8: weights per output channel, activations per token (per-tensor activations ruin real weights,
arXiv 2208.07339, section 3). Rows become uint8 around 128 because ONNX Runtime has fast kernels
for uint8 × int8 only: measured on CLIP-L's shapes, int8 × int8 took 17 times as long.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgevlm.errors import BundleError

from . import attention, linear
from .graph import Load, Model, Weight
from .linear import CONTRIB

_WEIGHT_MAX = 127
_F16_MAX = 65504.0


def linear_layers(model: Model) -> dict[str, onnx.NodeProto]:
    """The MatMuls that can be int8, by the name of their weight, in order.

    Not the one that takes the pixels: a fifth of a percent of a tower's work, and the one whose
    folded normalisation cancels large sums.
    """
    casts = {node.output[0] for node in model.nodes if node.op_type == "Cast"}
    uses: dict[str, list[onnx.NodeProto]] = {}
    for node in model.nodes:
        for name in node.input:
            if name in model.weights:
                uses.setdefault(name, []).append(node)
    return {
        name: node
        for name, (node, *others) in uses.items()
        if not others
        and node.op_type == "MatMul"
        and node.input[1] == name
        and len(model.weights[name].shape) == 2
        and node.input[0] not in casts
    }


def fp16(model: Model) -> Model:
    """Matrices stored as float16; ONNX Runtime widens them once, when it loads the graph."""
    half = np.dtype(np.float16)
    nodes, weights = [], {}
    for name, weight in model.weights.items():
        if len(weight.shape) < 2:
            weights[name] = weight
            continue
        stored = f"{name}.f16"
        weights[stored] = Weight(weight.shape, half, partial(_halved, name, weight.load))
        nodes.append(helper.make_node("Cast", [stored], [name], stored, to=TensorProto.FLOAT))
    return replace(model, nodes=(*nodes, *model.nodes), weights=weights)


def int8(model: Model, keep_float: Collection[str] = (), *, parts: int = 1) -> Model:
    """Linear layers in int8, except those whose weight `keep_float` names.

    The layer norm before it joins a product, and what follows it alone: bias, activation, residual.
    Rows have a scale in each of `parts` equal parts of their length, where that comes out even.
    """
    layers = _layers(model, keep_float)
    last = {layer.nodes[-1].output[0]: name for name, layer in layers.items()}
    joined = {node.output[0] for layer in layers.values() for node in layer.nodes}
    joined |= {layer.norm.output[0] for layer in layers.values() if layer.norm is not None}
    rewriting = _Rewriting(model)
    for node in model.nodes:
        output = node.output[0]
        if output in last:
            rewriting.quantized(last[output], layers[last[output]], output, parts)
        elif output not in joined:
            rewriting.copied(node)
    weights = {n: weight for n, weight in model.weights.items() if n not in layers}
    return rewriting.finish({**weights, **rewriting.weights}, model.outputs)


def probe(model: Model) -> Model:
    """The graph in fp32 with another output: how far int8 would move each linear layer.

    float32 [layers], in the order of `linear_layers`: the squared error of the layer's product as
    a part of its square, on the activations of the fp32 graph.
    """
    rewriting = _Rewriting(model)
    layers = {node.output[0]: name for name, node in linear_layers(model).items()}
    errors = []
    for node in model.nodes:
        rewriting.nodes.append(node)
        if (output := node.output[0]) in layers:
            rounded = f"{output}.rounded"
            rewriting.quantized(layers[output], _Layer((node,)), rounded, parts=1)
            difference = rewriting.op("Sub", rounded, output)
            moved, size = (
                rewriting.op("ReduceSumSquare", value, keepdims=0) for value in (difference, output)
            )
            ratio = rewriting.op("Div", moved, size)
            errors.append(rewriting.op("Reshape", ratio, _ONE.name))
    rewriting.op("Concat", *errors, output="errors", axis=0)
    result = helper.make_tensor_value_info("errors", TensorProto.FLOAT, [len(errors)])
    found = rewriting.finish({**model.weights, **rewriting.weights}, (result,))
    return replace(found, constants=(*found.constants, _ONE))


_ONE = numpy_helper.from_array(np.array([1], np.int64), "int8_one")


@dataclass(frozen=True)
class _Layer:
    """A product, what of bias, activation and residual follows it and nothing else reads, and the
    norm of its rows that only layers read."""

    nodes: tuple[onnx.NodeProto, ...]
    bias: str = ""
    activation: str = ""
    alpha: float = 0.0
    residual: str = ""
    norm: onnx.NodeProto | None = None


def _layers(model: Model, keep_float: Collection[str]) -> dict[str, _Layer]:
    """The layers to be int8 by the name of their weight, each with what it can be joined with."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in model.outputs}

    def next_node(node: onnx.NodeProto) -> onnx.NodeProto | None:
        name = node.output[0]
        followers = readers.get(name, [])
        return followers[0] if len(followers) == 1 and name not in outputs else None

    chosen = {n: node for n, node in linear_layers(model).items() if n not in keep_float}
    products = [node.output[0] for node in chosen.values()]
    norms = {
        node.output[0]: node
        for node in model.nodes
        if _is_norm(node)
        and node.output[0] not in outputs
        and all(reader.output[0] in products for reader in readers.get(node.output[0], []))
    }
    taken: set[str] = set()  # a residual between two layers joins one of them
    found = {}
    for name, product in chosen.items():
        layer, width = _Layer((product,)), model.weights[name].shape[1:]
        after = next_node(product)
        if after is not None and after.op_type == "Add" and len(after.input) == 2:
            (other,) = (value for value in after.input if value != product.output[0])
            if other in model.weights and model.weights[other].shape == width:
                layer = replace(layer, nodes=(product, after), bias=other)
                after = next_node(after)
        if after is not None and _is_activation(after):
            alpha = next((a.f for a in after.attribute if a.name == "alpha"), 0.0)
            nodes, kind = (*layer.nodes, after), after.op_type
            layer = replace(layer, nodes=nodes, activation=kind, alpha=alpha)
            after = next_node(after)
        if after is not None and (total := after.output[0]) in model.residuals - taken:
            taken.add(total)
            (other,) = (v for v in after.input if v != layer.nodes[-1].output[0])
            layer = replace(layer, nodes=(*layer.nodes, after), residual=other)
        found[name] = replace(layer, norm=norms.get(product.input[0]))
    return found


def _is_activation(node: onnx.NodeProto) -> bool:
    """Whether linear layers have functions with it."""
    kind = node.domain, node.op_type
    return kind in {(CONTRIB, name) for name in linear.ACTIVATIONS} and len(node.input) == 1


def _is_norm(node: onnx.NodeProto) -> bool:
    axis = next((a.i for a in node.attribute if a.name == "axis"), -1)
    return (
        node.op_type == "LayerNormalization"
        and axis == -1
        and len(node.input) == 3
        and len(node.output) == 1
    )


class _Rewriting:
    """The new graph: nodes in order, and what they need."""

    def __init__(self, model: Model) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Weight] = {}
        self._model = model
        self._kinds: set[linear.Kind] = set()
        self._attention: set[str] = set()

    def finish(self, weights: dict[str, Weight], outputs: tuple[onnx.ValueInfoProto, ...]) -> Model:
        return replace(
            self._model,
            nodes=tuple(self.nodes),
            weights=weights,
            outputs=outputs,
            functions=(
                *linear.functions(self._kinds),
                *(attention.function(name) for name in sorted(self._attention)),
            ),
        )

    def op(self, kind: str, *inputs: str, output: str = "", **given: Any) -> str:
        output = output or f"int8_{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], output, **given))
        return output

    def copied(self, node: onnx.NodeProto) -> None:
        """The node as it is, or ours for it."""
        ours = attention.replaced(node)
        if ours is not None:
            self._attention.add(ours.op_type)
        self.nodes.append(node if ours is None else ours)

    def quantized(self, name: str, layer: _Layer, output: str, parts: int) -> None:
        """The layer of weight `name` in int8, its result under the name `output`."""
        weight = self._model.weights[name]
        n_in, n_out = weight.shape
        if n_in % parts:
            parts = 1
        norm = layer.norm
        kind = linear.Kind(
            norm is not None, parts, bool(layer.bias), layer.activation, bool(layer.residual)
        )
        self._kinds.add(kind)
        integers, scales = f"{name}.int8", f"{name}.scale"
        self.weights[integers] = Weight(
            (n_in, n_out), np.dtype(np.int8), lambda: _channels(weight.load)[0]
        )
        self.weights[scales] = Weight(
            (n_out,), np.dtype(np.float32), lambda: _channels(weight.load)[1]
        )
        inputs = {
            "rows": layer.nodes[0].input[0],
            "weights": integers,
            "scales": scales,
            "bias": layer.bias,
            "residual": layer.residual,
        }
        attributes = {"alpha": layer.alpha}
        if norm is not None:
            inputs |= zip(("rows", "norm_scales", "norm_bias"), norm.input, strict=True)
            default = 1e-5  # of LayerNormalization
            epsilon = (a.f for a in norm.attribute if a.name == "epsilon")
            attributes["epsilon"] = next(epsilon, default)
        self.nodes.append(kind.node(inputs, output, attributes))


def _channels(load: Load) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """float32 [in, out] → int8 [in, out] and a scale for each column.

    A scale bounds the sum of two neighbours, not one value: without VNNI (before Ice Lake and
    Zen 4) ONNX Runtime adds the products of two neighbours, uint8 × int8, in an int16 that
    saturates (vpmaddubsw). Rounding adds at most 1, and 255 · 128 still fits.
    """
    values = load()
    padded = np.pad(values, ((0, len(values) % 2), (0, 0)))
    peaks = np.maximum(
        np.maximum(padded[0::2], 0) + np.maximum(padded[1::2], 0),
        np.maximum(-padded[0::2], 0) + np.maximum(-padded[1::2], 0),
    ).max(axis=0)
    scales = np.where(peaks > 0, peaks / _WEIGHT_MAX, 1.0).astype(np.float32)
    return np.rint(values / scales).astype(np.int8), scales


def _halved(name: str, load: Load) -> npt.NDArray[np.float16]:
    values = load()
    if max(values.max(), -values.min()) > _F16_MAX:
        raise BundleError(f"{name} does not fit fp16: export the vision part as fp32 or int8")
    return values.astype(np.float16)
