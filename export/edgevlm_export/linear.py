"""The int8 linear layer as a function of standard operators, one for each kind of layer.

The runtime's library has a fused operator of the same name (kernels/operators.cpp) for CPUs on
which that is faster; elsewhere ONNX Runtime puts the function's body in place of the node. With
one part both give the same integers and round in the same order.
"""

from __future__ import annotations

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
    """One function: rows [.., in], weights [in, out], scales [out] and, where it has one, bias
    [out] → [.., out]. Our operator gives each of `parts` equal parts of a row a scale of its own,
    which costs it nothing; the body gives a row one, because ONNX Runtime would multiply as often
    as there are parts."""

    parts: int = 1
    bias: bool = False
    activation: str = ""

    @property
    def name(self) -> str:
        parts = str(self.parts) if self.parts > 1 else ""
        return f"Linear{parts}{'Bias' if self.bias else ''}{self.activation}"

    def node(self, inputs: list[str], output: str, alpha: float | None) -> NodeProto:
        node = helper.make_node(self.name, inputs, [output], output, domain=DOMAIN)
        if alpha is not None:
            node.attribute.append(helper.make_attribute("alpha", alpha))
        return node

    def function(self) -> FunctionProto:
        body = _Body()
        body.write(self)
        return helper.make_function(
            DOMAIN,
            self.name,
            ["rows", "weights", "scales", *(["bias"] if self.bias else [])],
            ["out"],
            body.nodes,
            [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
            ["alpha"] if self.activation == "QuickGelu" else [],
        )


class _Body:
    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []

    def write(self, kind: Kind) -> None:
        value = self._product("rows", "weights")
        if kind.bias:
            value = self.op("Add", value, "bias")
        if kind.activation:
            value = self.op(kind.activation, value, domain=CONTRIB)
            if kind.activation == "QuickGelu":
                alpha = AttributeProto(
                    name="alpha", ref_attr_name="alpha", type=AttributeProto.FLOAT
                )
                self.nodes[-1].attribute.append(alpha)
        self.nodes[-1].output[0] = "out"

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
