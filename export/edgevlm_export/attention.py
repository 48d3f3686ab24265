"""Attention of int8 graphs as functions of ONNX Runtime's operators.

The runtime's library has fused operators of the same names (kernels/attention_operator.cpp) that
round their operands to bfloat16, which is less than int8 rounds what they come from.
"""

from __future__ import annotations

import numpy as np
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from .linear import CONTRIB, DOMAIN, OPSET

# A row attends to the past, to itself and those before it, rows at the front to each other: what no
# operator of ONNX Runtime does, so that the float graph has a function, too. No library has it.
EXACT_CAUSAL = "ExactCausalAttention"

# What a float graph has, and how many inputs where nothing is masked by a tensor: ours.
_OURS = {("MultiHeadAttention", 3): "Attention", (EXACT_CAUSAL, 6): "CausalAttention"}
_CAUSAL_INPUTS = ["q", "k", "v", "past_keys", "past_values", "n_prefix"]


def replaced(node: NodeProto) -> NodeProto | None:
    """The same by our operator; None where it has none for this node."""
    name = _OURS.get((node.op_type, len(node.input)))
    if name is None or {attribute.name for attribute in node.attribute} != set(_heads(name)):
        return None
    made = helper.make_node(name, node.input, node.output, node.name, domain=DOMAIN)
    made.attribute.extend(node.attribute)
    return made


def function(name: str) -> FunctionProto:
    """The function of one of our operators, or of the float graph's.

    CausalAttention: `q` float32 [1, n, num_heads × head], `k` and `v` [1, n, kv_num_heads × head];
    `past_keys` [m, kv_num_heads × head] and `past_values` [kv_num_heads × head, m] as llama.cpp's
    cache has them; `n_prefix` int64 []: so many rows at the front of all m + n see each other.
    """
    domains = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    inputs = ["q", "k", "v"] if name == "Attention" else _CAUSAL_INPUTS
    body = [] if name == "Attention" else [*_constants(), *_with_past(), *_bias()]
    given = inputs if name == "Attention" else ["q", "all_keys", "all_values", "", "", "bias"]
    attention = helper.make_node("MultiHeadAttention", given, ["out"], domain=CONTRIB)
    attention.attribute.append(_of_function("num_heads", "num_heads"))
    return helper.make_function(
        DOMAIN, name, inputs, ["out"], [*body, attention], domains, _heads(name)
    )


def _heads(name: str) -> list[str]:
    return ["num_heads"] if name == "Attention" else ["num_heads", "kv_num_heads"]


def _of_function(attribute: str, name: str) -> AttributeProto:
    """A node's attribute that is the function's."""
    return AttributeProto(name=attribute, ref_attr_name=name, type=AttributeProto.INT)


def _constants() -> list[NodeProto]:
    def constant(name: str, value: object, dtype: type = np.int64) -> NodeProto:
        tensor = numpy_helper.from_array(np.array(value, dtype), name)
        return helper.make_node("Constant", [], [name], value=tensor)

    heads = [helper.make_node("Constant", [], [name]) for name in ("heads", "kv_heads")]
    for node, name in zip(heads, _heads("CausalAttention"), strict=True):
        node.attribute.append(_of_function("value_int", name))
    return [
        *heads,
        constant("zero", 0),
        constant("one", 1),
        constant("front", [0]),
        constant("back", [1]),
        constant("axes", [0, 1]),
        constant("as_it_is", [0, 0]),
        constant("rest", [-1]),
        constant("once", [1]),
        constant("seen", 0.0, np.float32),
        constant("unseen", -1e30, np.float32),
    ]


def _with_past() -> list[NodeProto]:
    """Keys and values of all rows, [1, m + n, num_heads × head]: each head as often as heads of
    queries share it."""
    node = helper.make_node
    nodes = [
        node("Div", ["heads", "kv_heads"], ["times"]),
        node("Unsqueeze", ["times", "front"], ["times_1d"]),
        node("Unsqueeze", ["kv_heads", "front"], ["kv_heads_1d"]),
        node("Concat", ["as_it_is", "kv_heads_1d", "back", "rest"], ["one_by_one"], axis=0),
        node("Concat", ["once", "once", "once", "times_1d", "once"], ["repeats"], axis=0),
        node("Concat", ["as_it_is", "rest"], ["side_by_side"], axis=0),
        node("Cast", ["past_keys"], ["past_keys_f32"], to=TensorProto.FLOAT),
        node("Cast", ["past_values"], ["past_channels"], to=TensorProto.FLOAT),
        node("Transpose", ["past_channels"], ["past_values_f32"], perm=[1, 0]),
    ]  # fmt: skip
    for part, new in (("keys", "k"), ("values", "v")):
        nodes += [
            node("Unsqueeze", [f"past_{part}_f32", "front"], [f"past_{part}_3d"]),
            node("Concat", [f"past_{part}_3d", new], [f"joined_{part}"], axis=1),
            node("Reshape", [f"joined_{part}", "one_by_one"], [f"{part}_by_head"]),
            node("Tile", [f"{part}_by_head", "repeats"], [f"{part}_repeated"]),
            node("Reshape", [f"{part}_repeated", "side_by_side"], [f"all_{part}"]),
        ]
    return nodes


def _bias() -> list[NodeProto]:
    """What is added to the scores, [1, 1, n, m + n]: 0 where a row attends, else nearly -inf."""
    node = helper.make_node
    return [
        node("Shape", ["q"], ["n_1d"], start=1, end=2),
        node("Squeeze", ["n_1d", "front"], ["n"]),
        node("Shape", ["all_keys"], ["total_1d"], start=1, end=2),
        node("Squeeze", ["total_1d", "front"], ["total"]),
        node("Range", ["zero", "total", "one"], ["columns"]),
        node("Sub", ["total", "n"], ["m"]),
        node("Range", ["m", "total", "one"], ["rows"]),
        node("Add", ["rows", "one"], ["before"]),
        node("Max", ["before", "n_prefix"], ["reach"]),
        node("Unsqueeze", ["reach", "back"], ["reach_2d"]),
        node("Less", ["columns", "reach_2d"], ["attends"]),
        node("Where", ["attends", "seen", "unseen"], ["flat"]),
        node("Unsqueeze", ["flat", "axes"], ["bias"]),
    ]
