"""CenterFace's ONNX in, its heat-map branch at 256 px out, ready to be merged with nano's graph.

CenterFace (arXiv:1911.03599, MIT) gives heat, sizes and landmarks; nano only asks whether there
are faces and about how many, so everything that the heat map does not need is cut away.
"""

from pathlib import Path

import onnx
from onnx import version_converter

SIZE_PX = 256
HEAT_CELLS = SIZE_PX // 4
_INPUT, _HEAT = "input.1", "537"


def load(path: Path, opset: int) -> onnx.ModelProto:
    """Input float32 [1, 3, 256, 256] in 0..255 RGB, output float32 [1, 1, 64, 64]."""
    graph = onnx.load(path).graph
    weights = {weight.name for weight in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    heat = next(value for value in graph.output if value.name == _HEAT)
    _fix_shape(inputs[0], (1, 3, SIZE_PX, SIZE_PX))
    _fix_shape(heat, (1, 1, HEAT_CELLS, HEAT_CELLS))
    nodes, needed = _ancestors(graph, _HEAT)
    kept = [weight for weight in graph.initializer if weight.name in needed]
    trimmed = onnx.helper.make_graph(nodes, "centerface", inputs, [heat], kept)
    opsets = [onnx.helper.make_opsetid("", 9)]
    model = onnx.helper.make_model(trimmed, opset_imports=opsets, ir_version=8)
    return version_converter.convert_version(model, opset)


def _ancestors(graph: onnx.GraphProto, output: str) -> tuple[list[onnx.NodeProto], set[str]]:
    needed, nodes = {output}, []
    for node in reversed(graph.node):
        if needed & set(node.output):
            nodes.append(node)
            needed |= set(node.input)
    return nodes[::-1], needed


def _fix_shape(value: onnx.ValueInfoProto, shape: tuple[int, ...]) -> None:
    for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
        dim.dim_value = size
