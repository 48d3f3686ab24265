"""Attention of int8 graphs as functions of ONNX Runtime's operators.

The runtime's library has fused operators of the same names (kernels/attention_operator.cpp) that
round their operands to bfloat16, which is less than int8 rounds what they come from.
"""

from __future__ import annotations

from onnx import AttributeProto, FunctionProto, NodeProto, helper

from .linear import CONTRIB, DOMAIN, OPSET

# ONNX Runtime's operator, and how many inputs it has where nothing is masked by a tensor: ours.
_OURS = {("MultiHeadAttention", 3): "Attention", ("GroupQueryAttention", 7): "CausalAttention"}
_BODIES = {ours: kind for (kind, _), ours in _OURS.items()}
_INPUTS = {"Attention": ["q", "k", "v"], "CausalAttention": ["q", "k", "v", "last", "total"]}
_HEADS = {"Attention": ["num_heads"], "CausalAttention": ["num_heads", "kv_num_heads"]}


def replaced(node: NodeProto) -> NodeProto | None:
    """The same by our operator; None where it has none for this node."""
    name = _OURS.get((node.op_type, len(node.input)))
    if name is None or {attribute.name for attribute in node.attribute} != set(_HEADS[name]):
        return None
    inputs = [value for value in node.input if value]
    made = helper.make_node(name, inputs, node.output, node.name, domain=DOMAIN)
    made.attribute.extend(node.attribute)
    return made


def function(name: str) -> FunctionProto:
    """The function of one of our operators."""
    inputs = _INPUTS[name]
    given = inputs if name == "Attention" else [*inputs[:3], "", "", *inputs[3:]]
    body = helper.make_node(_BODIES[name], given, ["out"], domain=CONTRIB)
    for heads in _HEADS[name]:
        body.attribute.append(
            AttributeProto(name=heads, ref_attr_name=heads, type=AttributeProto.INT)
        )
    domains = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_function(DOMAIN, name, inputs, ["out"], [body], domains, _HEADS[name])
