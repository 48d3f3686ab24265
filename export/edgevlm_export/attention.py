"""Attention of int8 graphs as functions of ONNX Runtime's operators.

The runtime's library has fused operators of the same names (kernels/attention_operator.cpp) that
round their operands to bfloat16, which is less than int8 rounds what they come from.
"""

from __future__ import annotations

import numpy as np
from onnx import AttributeProto, FunctionProto, NodeProto, helper, numpy_helper

from .linear import CONTRIB, DOMAIN, OPSET

# Rows at the front attend to each other, a later one to itself and those before it: what no
# operator of ONNX Runtime does, so that the float graph has a function, too. No library has it.
EXACT_PREFIX = "ExactPrefixAttention"

# What a float graph has, and how many inputs where nothing is masked by a tensor: ours.
_OURS = {
    ("MultiHeadAttention", 3): "Attention",
    ("GroupQueryAttention", 7): "CausalAttention",
    (EXACT_PREFIX, 4): "PrefixAttention",
}
_INPUTS = {
    "Attention": ["q", "k", "v"],
    "CausalAttention": ["q", "k", "v", "last", "total"],
    "PrefixAttention": ["q", "k", "v", "n_prefix"],
    EXACT_PREFIX: ["q", "k", "v", "n_prefix"],
}


def replaced(node: NodeProto) -> NodeProto | None:
    """The same by our operator; None where it has none for this node."""
    name = _OURS.get((node.op_type, len(node.input)))
    if name is None or {attribute.name for attribute in node.attribute} != set(_heads(name)):
        return None
    inputs = [value for value in node.input if value]
    made = helper.make_node(name, inputs, node.output, node.name, domain=DOMAIN)
    made.attribute.extend(node.attribute)
    return made


def function(name: str) -> FunctionProto:
    """The function of one of our operators, or of the float graph's."""
    domains = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    body = {
        "Attention": [_node("MultiHeadAttention", "q k v", _heads(name))],
        "CausalAttention": [_node("GroupQueryAttention", "q k v - - last total", _heads(name))],
    }.get(name) or [*_bias(), _node("MultiHeadAttention", "q k v - - bias", _heads(name))]
    return helper.make_function(DOMAIN, name, _INPUTS[name], ["out"], body, domains, _heads(name))


def _heads(name: str) -> list[str]:
    return ["num_heads", "kv_num_heads"] if name == "CausalAttention" else ["num_heads"]


def _node(kind: str, inputs: str, heads: list[str]) -> NodeProto:
    """ONNX Runtime's attention; "-" is an input that is left out."""
    given = [name.replace("-", "") for name in inputs.split()]
    node = helper.make_node(kind, given, ["out"], domain=CONTRIB)
    for each in heads:
        node.attribute.append(
            AttributeProto(name=each, ref_attr_name=each, type=AttributeProto.INT)
        )
    return node


def _bias() -> list[NodeProto]:
    """What is added to the scores, [1, 1, n, n]: 0 where a row attends, else as good as -inf."""

    def constant(name: str, value: object, dtype: type) -> NodeProto:
        tensor = numpy_helper.from_array(np.array(value, dtype), name)
        return helper.make_node("Constant", [], [name], value=tensor)

    return [
        constant("zero", 0, np.int64),
        constant("one", 1, np.int64),
        constant("front", [0], np.int64),
        constant("back", [1], np.int64),
        constant("axes", [0, 1], np.int64),
        constant("seen", 0.0, np.float32),
        constant("unseen", -1e30, np.float32),
        helper.make_node("Shape", ["q"], ["size"], start=1, end=2),
        helper.make_node("Squeeze", ["size", "front"], ["n"]),
        helper.make_node("Range", ["zero", "n", "one"], ["keys"]),
        helper.make_node("Add", ["keys", "one"], ["before"]),
        helper.make_node("Max", ["before", "n_prefix"], ["reach"]),
        helper.make_node("Unsqueeze", ["reach", "back"], ["column"]),
        helper.make_node("Less", ["keys", "column"], ["attends"]),
        helper.make_node("Where", ["attends", "seen", "unseen"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "axes"], ["bias"]),
    ]
