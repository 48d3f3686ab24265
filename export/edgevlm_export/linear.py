"""The int8 linear layer as a function of standard operators, one for each kind of layer.

The runtime's library has a fused operator of the same name (kernels/operators.cpp) for CPUs on
which that is faster; elsewhere ONNX Runtime puts the function's body in place of the node. With
one part and no norm both give the same integers and round in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import AttributeProto, FunctionProto, NodeProto, helper, numpy_helper

CONTRIB = "com.microsoft"  # ONNX Runtime's own operators
DOMAIN = "edgevlm"
OPSET = 17
ACTIVATIONS = ("QuickGelu", "FastGelu")  # what a layer may end with: operators of CONTRIB

_LARGEST = 127
_ZERO_POINT = 128
_SMALLEST_PEAK = 1e-9  # an empty row would divide by 0


@dataclass(frozen=True)
class Kind:
    """One function: `inputs` → [.., out], activation(norm(rows) @ weights + bias) + residual.

    Our operator gives each of `parts` equal parts of a row a scale of its own, which costs it
    nothing; the body gives a row one, because ONNX Runtime would multiply as often as there are
    parts."""

    norm: bool = False  # a layer norm of the rows
    parts: int = 1
    bias: bool = False
    activation: str = ""
    residual: bool = False

    @property
    def name(self) -> str:
        norm, bias = "Norm" * self.norm, "Bias" * self.bias
        parts = str(self.parts) if self.parts > 1 else ""
        return f"{norm}Linear{parts}{bias}{self.activation}{'Residual' * self.residual}"

    @property
    def inputs(self) -> list[str]:
        """rows [.., in], weights [in, out], scales [out], and what it has of bias [out], scales
        and bias of the norm [in] and residual [.., out]."""
        return [
            *("rows", "weights", "scales"),
            *(("bias",) if self.bias else ()),
            *(("norm_scales", "norm_bias") if self.norm else ()),
            *(("residual",) if self.residual else ()),
        ]

    @property
    def attributes(self) -> list[str]:
        alpha, epsilon = self.activation == "QuickGelu", self.norm
        return [*(["alpha"] if alpha else []), *(["epsilon"] if epsilon else [])]

    def node(
        self, inputs: Mapping[str, str], output: str, attributes: Mapping[str, float]
    ) -> NodeProto:
        """A node that takes its `inputs` and `attributes` from these, by name."""
        given = [inputs[name] for name in self.inputs]
        node = helper.make_node(self.name, given, [output], output, domain=DOMAIN)
        for name in self.attributes:
            node.attribute.append(helper.make_attribute(name, attributes[name]))
        return node

    def function(self) -> FunctionProto:
        body = _Body()
        body.write(self)
        return helper.make_function(
            DOMAIN,
            self.name,
            self.inputs,
            ["out"],
            body.nodes,
            [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
            self.attributes,
        )


class _Body:
    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []

    def write(self, kind: Kind) -> None:
        value = "rows"
        if kind.norm:
            value = self.op("LayerNormalization", value, "norm_scales", "norm_bias", axis=-1)
            self._takes("epsilon")
        value = self._product(value, "weights")
        if kind.bias:
            value = self.op("Add", value, "bias")
        if kind.activation:
            value = self.op(kind.activation, value, domain=CONTRIB)
            if kind.activation == "QuickGelu":
                self._takes("alpha")
        if kind.residual:
            self.op("Add", value, "residual")
        self.nodes[-1].output[0] = "out"

    def _takes(self, attribute: str) -> None:
        """The last node has the function's attribute of that name."""
        self.nodes[-1].attribute.append(
            AttributeProto(name=attribute, ref_attr_name=attribute, type=AttributeProto.FLOAT)
        )

    def op(self, kind: str, *inputs: str, domain: str = "", **given: Any) -> str:
        output = f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], domain=domain, **given))
        return output

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike) -> str:
        tensor = numpy_helper.from_array(np.asarray(value, dtype))
        return self.op("Constant", value=tensor)

    def _product(self, rows: str, weights: str) -> str:
        """One scale for each row, so that a token's outlier coarsens no other token."""
        high = self.op("ReduceMax", rows, axes=[-1], keepdims=1)
        low = self.op("Neg", self.op("ReduceMin", rows, axes=[-1], keepdims=1))
        peak = self.op("Max", high, low, self.constant(_SMALLEST_PEAK, np.float32))
        scale = self.op("Mul", peak, self.constant(1 / _LARGEST, np.float32))
        # QuantizeLinear takes a list of scales along one axis: all rows behind one another
        scales = self.op("Reshape", scale, self.constant([-1], np.int64))
        zero_point = numpy_helper.from_array(np.array([_ZERO_POINT], np.uint8))
        zero_points = self.op("ConstantOfShape", self.op("Shape", scales), value=zero_point)
        shape = self.op("Shape", rows)
        width = self.op("Shape", rows, start=-1)
        matrix = self.op("Concat", self.constant([-1], np.int64), width, axis=0)
        integers = self.op(
            "QuantizeLinear", self.op("Reshape", rows, matrix), scales, zero_points, axis=0
        )
        product = self.op(
            "MatMulIntegerToFloat", self.op("Reshape", integers, shape), weights,
            self.constant(1, np.float32), "scales", self.constant(_ZERO_POINT, np.uint8),
            domain=CONTRIB,
        )  # fmt: skip
        return self.op("Mul", product, scale)


def functions(kinds: set[Kind]) -> tuple[onnx.FunctionProto, ...]:
    return tuple(kind.function() for kind in sorted(kinds, key=lambda kind: kind.name))
