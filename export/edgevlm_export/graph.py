"""Tensors of a vision tower → an ONNX graph: uint8 patches in, float32 embeddings out.

Standard operators, opset 17, and ONNX Runtime's own where they save passes over memory: attention
keeps its scores in the cache. Every linear layer is a MatMul with a 2-D initializer [in, out],
which is what precision.py turns into fp16 and int8. Weights are loaded while the file is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgevlm.errors import BundleError

from .checkpoint import Checkpoint
from .linear import CONTRIB, OPSET

Array: TypeAlias = npt.NDArray[np.float32]
Load: TypeAlias = Callable[[], Array]
Progress: TypeAlias = Callable[[int, int], None]  # weights written, weights in all

_IR_VERSION = 8  # the version of opset 17's first release; every supported ONNX Runtime reads it
_PROTOBUF_LIMIT_BYTES = 2**31 - 1
_ALIGNMENT_BYTES = 4096  # so that external data can be mapped


@dataclass(frozen=True)
class Weight:
    """An initializer that is computed when its turn to be written comes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    load: Callable[[], npt.NDArray[Any]]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Model:
    """A whole graph, ready to be written or to be rewritten first."""

    inputs: tuple[onnx.ValueInfoProto, ...]
    outputs: tuple[onnx.ValueInfoProto, ...]
    nodes: tuple[onnx.NodeProto, ...]
    constants: tuple[onnx.TensorProto, ...]
    weights: Mapping[str, Weight]
    functions: tuple[onnx.FunctionProto, ...] = ()
    residuals: frozenset[str] = frozenset()  # sums of two values of one shape

    @property
    def n_bytes(self) -> int:
        """Of the weights."""
        return sum(weight.n_bytes for weight in self.weights.values())

    def save(
        self, path: Path, *, data: Path | None = None, progress: Progress | None = None
    ) -> None:
        """Write the model, then append its weights one by one.

        A protobuf parser merges repeated occurrences of an embedded message (protobuf encoding
        guide, "Last One Wins"), so each weight follows as another piece of the same graph and
        memory holds one of them. With `data` they go to that file beside `path` instead, which
        ONNX Runtime maps into memory.
        """
        if data is None and self.n_bytes > _PROTOBUF_LIMIT_BYTES:
            raise BundleError(
                f"the vision graph needs {self.n_bytes} bytes; an ONNX file holds "
                f"{_PROTOBUF_LIMIT_BYTES}: export it as fp16 or int8"
            )
        graph = helper.make_graph(
            list(self.nodes), "graph", self.inputs, self.outputs, list(self.constants)
        )
        bodies = (node for function in self.functions for node in function.node)
        domains = sorted({node.domain for node in (*self.nodes, *bodies)} | {""})
        model = helper.make_model(
            graph,
            ir_version=_IR_VERSION,
            opset_imports=[helper.make_opsetid(d, 1 if d else OPSET) for d in domains],
            producer_name="edgevlm",
            functions=self.functions,
        )
        with path.open("wb") as stream:
            stream.write(model.SerializeToString())
            for count, (name, weight) in enumerate(self.weights.items(), 1):
                tensor = _tensor(name, weight, data)
                body = onnx.GraphProto(initializer=[tensor]).SerializeToString()
                stream.write(b"\x3a" + _varint(len(body)))  # field 7 of ModelProto: graph
                stream.write(body)
                if progress is not None:
                    progress(count, len(self.weights))


def _tensor(name: str, weight: Weight, data: Path | None) -> onnx.TensorProto:
    """The initializer, its values inside it or appended to the file `data`."""
    values = np.ascontiguousarray(weight.load(), dtype=weight.dtype)
    assert values.shape == weight.shape, (name, values.shape, weight.shape)
    if data is None:
        return numpy_helper.from_array(values, name)
    with data.open("ab") as stream:
        stream.write(b"\0" * (-stream.tell() % _ALIGNMENT_BYTES))
        offset_bytes = stream.tell()
        stream.write(values.data)
    tensor = onnx.TensorProto(
        name=name,
        dims=weight.shape,
        data_type=helper.np_dtype_to_tensor_dtype(weight.dtype),
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in (
        ("location", data.name),
        ("offset", str(offset_bytes)),
        ("length", str(values.nbytes)),
    ):
        tensor.external_data.add(key=key, value=value)
    return tensor


class Builder:
    """A graph under construction; methods return the name of the value they add."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._n_nodes = 0  # in branches, too: their names must differ
        self._small: list[onnx.TensorProto] = []
        self._weights: dict[str, tuple[tuple[int, ...], Load]] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._residuals: set[str] = set()
        self.has_inserted = False

    def input(
        self,
        name: str,
        dtype: npt.DTypeLike,
        shape: Sequence[int | str],
        default: npt.ArrayLike | None = None,
    ) -> str:
        """One more input; a name in `shape` is a dynamic axis. With a `default` it need not be
        fed."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        if default is not None:
            self._small.append(numpy_helper.from_array(np.asarray(default, dtype), name))
        self._inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    @property
    def input_names(self) -> list[str]:
        return [value.name for value in self._inputs]

    def result(
        self, value: str, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]
    ) -> None:
        """One more output: `value`, under the name that the runtime knows."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name))
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self._outputs.append(helper.make_tensor_value_info(name, kind, list(shape)))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, n_outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        """A node with several outputs."""
        name = f"{kind}_{self._n_nodes}"
        names = [name, *(f"{name}_{n}" for n in range(1, n_outputs))]
        self._nodes.append(helper.make_node(kind, list(inputs), names, name, **attributes))
        self._n_nodes += 1
        return names

    def choose(self, condition: str, then: Callable[[], str], otherwise: Callable[[], str]) -> str:
        """What `then` adds where the boolean `condition` holds, else what `otherwise` adds."""
        branches = {"then_branch": self._branch(then), "else_branch": self._branch(otherwise)}
        return self.op("If", condition, **branches)

    def _branch(self, build: Callable[[], str]) -> onnx.GraphProto:
        outside, self._nodes = self._nodes, []
        value = self.op("Identity", build())  # a branch cannot give back a value from outside
        nodes, self._nodes = self._nodes, outside
        output = onnx.ValueInfoProto(name=value)
        output.type.tensor_type.elem_type = TensorProto.FLOAT
        return helper.make_graph(nodes, value, [], [output])

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike) -> str:
        name = f"constant_{len(self._small)}"
        self._small.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weight(self, name: str, shape: Sequence[int], load: Load) -> str:
        """An initializer of `shape`, computed by `load` only when the file is written."""
        self._weights[name] = (tuple(shape), load)
        return name

    def linear(
        self, value: str, name: str, shape: tuple[int, int], load: Load, bias: Load | None
    ) -> str:
        """value @ W + b, where `load` gives W as `shape` [in, out]."""
        value = self.op("MatMul", value, self.weight(f"{name}.weight", shape, load))
        if bias is None:
            return value
        return self.op("Add", value, self.weight(f"{name}.bias", shape[1:], bias))

    def residual(self, value: str, added: str) -> str:
        """The sum of two values of one shape: what can join the layer that comes before it."""
        total = self.op("Add", value, added)
        self._residuals.add(total)
        return total

    def layer_norm(self, value: str, weights: Checkpoint, name: str, width: int, eps: float) -> str:
        scale, bias = f"{name}.weight", f"{name}.bias"
        for part in (scale, bias):
            weights.expect(part, width)
            self.weight(part, (width,), lambda part=part: weights.get(part))  # type: ignore[misc]
        return self.op("LayerNormalization", value, scale, bias, axis=-1, epsilon=eps)

    def rms_norm(self, value: str, weights: Checkpoint, name: str, width: int, eps: float) -> str:
        weights.expect(f"{name}.weight", width)
        scale = self.weight(f"{name}.weight", (width,), lambda: weights.get(f"{name}.weight"))
        mean = self.op("ReduceMean", self.op("Mul", value, value), axes=[-1])
        root = self.op("Sqrt", self.op("Add", mean, self.constant(eps, np.float32)))
        return self.op("Mul", self.op("Div", value, root), scale)

    def insert(self, other: onnx.GraphProto, inputs: Mapping[str, str]) -> dict[str, str]:
        """Add another graph's nodes; its `inputs` become values of this one.

        Gives the new names of its values. Its initializers must be in memory.
        """
        names = dict(inputs)
        values = {tensor.name: numpy_helper.to_array(tensor) for tensor in other.initializer}
        outputs = [name for node in other.node for name in node.output]
        names |= {name: f"inserted/{name}" for name in (*values, *outputs) if name}
        for name, array in values.items():
            if array.dtype == np.float32 and array.ndim:
                self._weights[names[name]] = (array.shape, partial(np.asarray, array))
            else:
                self._small.append(numpy_helper.from_array(array, names[name]))
        for node in other.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = f"inserted/{node.name}"
            copy.input[:] = [names.get(name, name) for name in node.input]
            copy.output[:] = [names.get(name, name) for name in node.output]
            self._nodes.append(copy)
        self.has_inserted = True
        return names

    def activation(self, value: str, kind: str) -> str:
        if kind not in _ACTIVATIONS:
            raise BundleError(f"activation {kind!r} is unknown; known: {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[kind](self, value)

    def output(self, value: str, n_tokens: int | str, n_embd: int) -> None:
        self.result(value, "embeddings", np.float32, ["tiles", n_tokens, n_embd])

    def model(self) -> Model:
        """The graph as built, in fp32."""
        float32 = np.dtype(np.float32)
        return Model(
            inputs=tuple(self._inputs),
            outputs=tuple(self._outputs),
            nodes=tuple(self._nodes),
            constants=tuple(self._small),
            weights={
                name: Weight(shape, float32, load) for name, (shape, load) in self._weights.items()
            },
            residuals=frozenset(self._residuals),
        )


class Graph(Builder):
    """A vision graph: it takes patches, and what `input` adds for the family's `graph_inputs`."""

    def __init__(self, n_patches: int, patch_values: int) -> None:
        super().__init__()
        self.input("patches", np.uint8, ["tiles", n_patches, patch_values])


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _quick_gelu(graph: Builder, x: str) -> str:
    """x · sigmoid(1.702 x), CLIP's own."""
    return graph.op("QuickGelu", x, domain=CONTRIB, alpha=1.702)


def _erf_gelu(graph: Builder, x: str) -> str:
    """x (1 + erf(x / √2)) / 2"""
    return graph.op("Gelu", x, domain=CONTRIB)


def _tanh_gelu(graph: Builder, x: str) -> str:
    """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), arXiv 1606.08415"""
    return graph.op("FastGelu", x, domain=CONTRIB)


def _silu(graph: Builder, x: str) -> str:
    """x · sigmoid(x)"""
    return graph.op("QuickGelu", x, domain=CONTRIB, alpha=1.0)


_ACTIVATIONS: dict[str, Callable[[Builder, str], str]] = {  # names as in Hugging Face configs
    "gelu": _erf_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": _quick_gelu,
    "silu": _silu,
}
