"""Trained parts in, one vision.onnx out: uint8 patches → float32 soft tokens.

torch exports "pixels → face detector's input" and "pixels, heat → soft tokens"; CenterFace comes
as ONNX; the three are merged. Weights are stored as float16 and cast back, so computing stays
float32 and the file halves. Opset 17 is read by every ONNX Runtime from 1.13 on.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, compose, helper, numpy_helper
from torch import Tensor, nn

from . import face_detector
from .observe import Observer
from .projector import Projector
from .tower import INPUT_PX

OPSET = 17
IR_VERSION = 8  # the one that came with opset 17
PATCH_VALUES = INPUT_PX * INPUT_PX * 3
HALF_FROM_VALUES = 1000  # smaller weights stay float32: nothing to gain


class _FaceInput(nn.Module):
    """The central 256 px, which is what CenterFace's stride of 32 divides."""

    def forward(self, patches: Tensor) -> Tensor:
        pixels = patches.reshape(1, INPUT_PX, INPUT_PX, 3).permute(0, 3, 1, 2).float()
        margin = (INPUT_PX - face_detector.SIZE_PX) // 2
        return pixels[:, :, margin : INPUT_PX - margin, margin : INPUT_PX - margin]


class _Speller(nn.Module):
    def __init__(self, observer: Observer, projector: Projector) -> None:
        super().__init__()
        self.observer = observer
        self.projector = projector

    def forward(self, patches: Tensor, heat: Tensor) -> Tensor:
        pixels = patches.reshape(1, INPUT_PX, INPUT_PX, 3)
        soft: Tensor = self.projector(self.observer(pixels, heat))
        return soft  # float32 [1, 37, width]


def vision_model(
    observer: Observer, projector: Projector, centerface: Path, half: bool = True
) -> onnx.ModelProto:
    """Input `patches` uint8 [1, 1, 202800], output `embeddings` float32 [1, 37, width]."""
    patches = torch.zeros(1, 1, PATCH_VALUES, dtype=torch.uint8)
    heat = torch.rand(1, 1, face_detector.HEAT_CELLS, face_detector.HEAT_CELLS)
    crop = _export(_FaceInput(), (patches,), ["patches"], "pixels")
    speller = _Speller(observer, projector).eval()
    spell = _export(speller, (patches, heat), ["patches", "heat"], "embeddings")
    faces = face_detector.load(centerface, OPSET)
    face_in, face_out = faces.graph.input[0].name, faces.graph.output[0].name
    seen = compose.merge_models(
        compose.add_prefix(crop, "crop/"),
        compose.add_prefix(faces, "faces/"),
        io_map=[("crop/pixels", f"faces/{face_in}")],
    )
    spell = compose.add_prefix(spell, "spell/")
    model = compose.merge_models(seen, spell, io_map=[(f"faces/{face_out}", "spell/heat")])
    _one_input(model.graph)
    _rename(model.graph, {"crop/patches": "patches", "spell/embeddings": "embeddings"})
    model.ir_version = IR_VERSION
    if half:
        _store_half(model.graph)
    onnx.checker.check_model(model)
    return model


def _export(
    module: nn.Module, arguments: tuple[Tensor, ...], inputs: list[str], output: str
) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "part.onnx"
        # The TorchScript exporter writes opset 17 itself; the newer one converts down from 18.
        torch.onnx.export(
            module, arguments, file, input_names=inputs, output_names=[output],
            opset_version=OPSET, dynamo=False,
        )  # fmt: skip
        model = onnx.load(file)
    model.ir_version = IR_VERSION
    return model


def _one_input(graph: onnx.GraphProto) -> None:
    """Both torch parts read the same patches."""
    _rename(graph, {"spell/patches": "crop/patches"})
    first = next(value for value in graph.input if value.name == "crop/patches")
    del graph.input[:]
    graph.input.append(first)


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in [*graph.input, *graph.output]:
        value.name = names.get(value.name, value.name)


def _store_half(graph: onnx.GraphProto) -> None:
    casts, stored = [], []
    constants = {node.output[0]: node for node in graph.node if node.op_type == "Constant"}
    hoisted = [_as_weight(name, node) for name, node in constants.items()]
    for weight in [*graph.initializer, *hoisted]:
        value = numpy_helper.to_array(weight)
        if value.dtype == np.float32 and value.size >= HALF_FROM_VALUES:
            half_name = f"{weight.name}/half"
            stored.append(numpy_helper.from_array(value.astype(np.float16), half_name))
            casts.append(helper.make_node("Cast", [half_name], [weight.name], to=TensorProto.FLOAT))
        else:
            stored.append(weight)
    nodes = [*casts, *(node for node in graph.node if node.op_type != "Constant")]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(stored)
    graph.node.extend(nodes)


def _as_weight(name: str, constant: onnx.NodeProto) -> onnx.TensorProto:
    weight = onnx.TensorProto()
    weight.CopyFrom(constant.attribute[0].t)
    weight.name = name
    return weight
