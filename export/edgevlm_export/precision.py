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

from .graph import CONTRIB, Load, Model, Weight

_WEIGHT_MAX = 127
_ACTIVATION_MAX = 127
_ZERO_POINT = 128
_F16_MAX = 65504.0
_SMALLEST_PEAK = 1e-9  # an empty row would divide by 0


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


def int8(model: Model, keep_float: Collection[str] = ()) -> Model:
    """Linear layers in int8, except those whose weight `keep_float` names."""
    chosen = {n: node for n, node in linear_layers(model).items() if n not in keep_float}
    rewriting = _Rewriting(model)
    by_output = {node.output[0]: name for name, node in chosen.items()}
    for node in model.nodes:
        if (name := by_output.get(node.output[0])) is None:
            rewriting.nodes.append(node)
        else:
            rewriting.quantized(node.input[0], name, node.output[0])
    weights = {n: weight for n, weight in model.weights.items() if n not in chosen}
    return rewriting.finish({**weights, **rewriting.weights}, model.outputs)


def probe(model: Model) -> Model:
    """The graph in fp32 with another output: how far int8 would move each linear layer.

    float32 [layers], in the order of `linear_layers`: the squared error of the layer's output as
    a part of its square, on the activations of the fp32 graph.
    """
    rewriting = _Rewriting(model)
    layers = {node.output[0]: name for name, node in linear_layers(model).items()}
    errors = []
    for node in model.nodes:
        rewriting.nodes.append(node)
        if (output := node.output[0]) in layers:
            rounded = f"{output}.rounded"
            rewriting.quantized(node.input[0], layers[output], rounded)
            difference = rewriting.op("Sub", rounded, output)
            moved, size = (
                rewriting.op("ReduceSumSquare", value, keepdims=0) for value in (difference, output)
            )
            ratio = rewriting.op("Div", moved, size)
            errors.append(rewriting.op("Reshape", ratio, rewriting.constant(_ONE)))
    rewriting.op("Concat", *errors, output="errors", axis=0)
    result = helper.make_tensor_value_info("errors", TensorProto.FLOAT, [len(errors)])
    return rewriting.finish({**model.weights, **rewriting.weights}, (result,))


_ONE = np.array([1], np.int64)


@dataclass(frozen=True)
class _Rows:
    """A value as the int8 kernels take it."""

    quantized: str  # uint8 [..., in]
    scale: str  # float32 [..., 1]


class _Rewriting:
    """The new graph: nodes in order, and what they need."""

    def __init__(self, model: Model) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Weight] = {}
        self._model = model
        self._constants: dict[bytes, onnx.TensorProto] = {}
        self._rows: dict[str, _Rows] = {}  # layers that read one value share its rounding

    def finish(self, weights: dict[str, Weight], outputs: tuple[onnx.ValueInfoProto, ...]) -> Model:
        constants = (*self._model.constants, *self._constants.values())
        return replace(
            self._model,
            nodes=tuple(self.nodes),
            constants=constants,
            weights=weights,
            outputs=outputs,
        )

    def op(self, kind: str, *inputs: str, output: str = "", domain: str = "", **given: Any) -> str:
        output = output or f"int8_{kind}_{len(self.nodes)}"
        node = helper.make_node(kind, list(inputs), [output], output, domain=domain, **given)
        self.nodes.append(node)
        return output

    def constant(self, value: npt.NDArray[Any]) -> str:
        name = f"int8_constant_{len(self._constants)}"
        key = value.dtype.str.encode() + bytes(value.shape) + value.tobytes()
        return self._constants.setdefault(key, numpy_helper.from_array(value, name)).name

    def quantized(self, value: str, name: str, output: str) -> None:
        """value @ weight in int8, under the name `output`."""
        weight = self._model.weights[name]
        integers, scales = f"{name}.int8", f"{name}.scale"
        n_in, n_out = weight.shape
        rows = self._rows.get(value) or self._quantize_rows(value, n_in)
        self._rows[value] = rows
        self.weights[integers] = Weight(
            (n_in, n_out), np.dtype(np.int8), lambda: _channels(weight.load)[0]
        )
        self.weights[scales] = Weight(
            (n_out,), np.dtype(np.float32), lambda: _channels(weight.load)[1]
        )
        one = self.constant(np.array(1, np.float32))
        zero_point = self.constant(np.array(_ZERO_POINT, np.uint8))
        product = self.op(
            "MatMulIntegerToFloat", rows.quantized, integers, one, scales, zero_point,
            domain=CONTRIB,
        )  # fmt: skip
        self.op("Mul", product, rows.scale, output=output)

    def _quantize_rows(self, value: str, width: int) -> _Rows:
        """One scale for each row, so that a token's outlier coarsens no other token."""
        high = self.op("ReduceMax", value, axes=[-1], keepdims=1)
        low = self.op("Neg", self.op("ReduceMin", value, axes=[-1], keepdims=1))
        peak = self.op("Max", high, low, self.constant(np.array(_SMALLEST_PEAK, np.float32)))
        scale = self.op("Mul", peak, self.constant(np.array(1 / _ACTIVATION_MAX, np.float32)))
        # QuantizeLinear takes a list of scales along one axis: all rows behind one another
        scales = self.op("Reshape", scale, self.constant(np.array([-1], np.int64)))
        zero_point = self.constant(np.array([_ZERO_POINT], np.uint8))
        zero_points = self.op("Expand", zero_point, self.op("Shape", scales))
        rows = self.op("Reshape", value, self.constant(np.array([-1, width], np.int64)))
        quantized = self.op("QuantizeLinear", rows, scales, zero_points, axis=0)
        return _Rows(self.op("Reshape", quantized, self.op("Shape", value)), scale)


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
