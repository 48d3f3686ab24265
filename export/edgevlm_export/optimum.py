"""A vision tower that graph.py does not write → its part of the vision graph, through Optimum.

Optimum traces transformers' own model in torch; around it go the same uint8 patches and the same
projector as everywhere. `verify` holds our graphs against such a one. Needs the extra `verify`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
import transformers
from onnx import numpy_helper
from optimum.exporters.onnx import model_configs  # noqa: F401  registers the types of tower
from optimum.exporters.onnx.convert import export_pytorch
from optimum.exporters.tasks import TasksManager
from optimum.utils import DummyVisionInputGenerator

from edgevlm.errors import BundleError

from .checkpoint import Checkpoint, Config, whole_number
from .graph import Graph
from .linear import OPSET
from .tower import Normalisation

_auto: Any = transformers  # half of it is typed
_TASK = "feature-extraction"


class Tower:
    """The vision tower of a checkpoint with canonical tensor names, whatever type it has."""

    def __init__(self, checkpoint: Checkpoint, config: Config) -> None:
        """`config` is config.json's vision_config.

        Raises:
            BundleError: transformers or Optimum does not know the type, or a weight is missing.
        """
        where = checkpoint.directory / "config.json"
        self._kind = str(config.get("model_type"))
        try:
            settings = _auto.AutoConfig.for_model(
                self._kind, **{key: value for key, value in config.items() if key != "model_type"}
            )
            self._model = _auto.AutoModel.from_config(settings).eval()
            constructor = TasksManager.get_exporter_config_constructor(
                "onnx", task=_TASK, library_name="transformers", model_type=self._kind
            )
            self._onnx_config = constructor(settings, task=_TASK)
        except (ValueError, KeyError) as error:
            raise BundleError(
                f"the vision tower {self._kind!r} in {where} is not one that transformers "
                f"{transformers.__version__} and Optimum know: {str(error).splitlines()[0]}"
            ) from error
        self._absent = _load(self._model, checkpoint)
        self._where = where
        self.image_px = whole_number(vars(settings), "image_size", where)
        patch = vars(settings).get("patch_size")
        even = isinstance(patch, int) and self.image_px % patch == 0
        # How the picture comes in; the tower cuts it again as it likes.
        self.patch_px = patch if isinstance(patch, int) and even else self.image_px

    @property
    def n_patches(self) -> int:
        return (self.image_px // self.patch_px) ** 2

    @property
    def patch_values(self) -> int:
        return 3 * self.patch_px**2

    def hidden_states(
        self, graph: Graph, normalisation: Normalisation, layers: Sequence[int]
    ) -> tuple[list[str], tuple[int, int]]:
        """The hidden states `layers`, as transformers counts them, and rows and width of each."""
        pixels = self._pixels(graph, normalisation)
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(1, 3, self.image_px, self.image_px, generator=generator)
        with torch.no_grad():
            states = self._model(pixel_values=noise, output_hidden_states=True).hidden_states
        shapes, n_states = [tuple(state.shape) for state in states], len(states)
        if any(not -n_states <= layer < n_states for layer in layers):
            raise BundleError(
                f"vision_feature_layer {list(layers)} is out of range: the tower has "
                f"{n_states - 1} layers"
            )
        wanted = [layer % n_states for layer in layers]
        (shape, *others) = {shapes[layer] for layer in wanted}
        if others or len(shape) != 3:
            raise BundleError(
                f"the hidden states {wanted} of {self._kind!r} in {self._where} are of shapes "
                f"{[shape, *others]}: rows of one width are needed"
            )
        traced, found = self._trace(n_states, noise)
        names = [f"hidden_states.{index}" for index in wanted]
        if not all(_alike(found[n], states[i].numpy()) for n, i in zip(names, wanted, strict=True)):
            raise BundleError(
                f"Optimum's export of {self._kind!r} does not compute the hidden states {wanted} "
                f"of transformers {transformers.__version__}: it cannot be used"
            )
        needed = _needed(traced.graph, names)
        for tensor in needed.initializer:
            if not np.isfinite(numpy_helper.to_array(tensor)).all():
                raise BundleError(f"{self._absent[0]} is missing in {self._where.parent}")
        added = graph.insert(needed, {"pixel_values": pixels})
        return [added[name] for name in names], (shape[1], shape[2])

    def _pixels(self, graph: Graph, normalisation: Normalisation) -> str:
        """uint8 [tiles, n_patches, 3·P·P] → float32 [tiles, 3, S, S], normalised."""
        patch, image = self.patch_px, self.image_px
        side = image // patch
        std = np.asarray(normalisation.std, np.float64).reshape(3, 1, 1)
        mean = np.asarray(normalisation.mean, np.float64).reshape(3, 1, 1)
        value = graph.op("Cast", "patches", to=onnx.TensorProto.FLOAT)
        split = graph.constant([-1, side, side, 3, patch, patch], np.int64)
        value = graph.op("Reshape", value, split)
        value = graph.op("Transpose", value, perm=[0, 3, 1, 4, 2, 5])
        value = graph.op("Reshape", value, graph.constant([-1, 3, image, image], np.int64))
        value = graph.op("Mul", value, graph.constant(normalisation.rescale / std, np.float32))
        return graph.op("Sub", value, graph.constant(mean / std, np.float32))

    def _trace(
        self, n_states: int, pixels: torch.Tensor
    ) -> tuple[onnx.ModelProto, dict[str, npt.NDArray[np.float32]]]:
        """Optimum's export for one size of picture, and what it makes of `pixels`."""
        names = [f"hidden_states.{index}" for index in range(n_states)]

        class AllStates(type(self._onnx_config)):  # type: ignore[misc]
            DUMMY_INPUT_GENERATOR_CLASSES = (DummyVisionInputGenerator,)
            inputs = property(lambda _: {"pixel_values": {0: "tiles"}})
            outputs = property(lambda _: {name: {0: "tiles"} for name in names})

        with TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, about branches on fixed sizes
            path = Path(scratch) / "tower.onnx"
            export_pytorch(
                self._model,
                AllStates(self._model.config, task=_TASK),
                OPSET,
                path,
                input_shapes={"batch_size": 2, "height": self.image_px, "width": self.image_px},
                model_kwargs={"output_hidden_states": True},
            )
            traced = onnx.load(path)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            outputs = session.run(names, {"pixel_values": pixels.numpy()})
            return traced, dict(zip(names, outputs, strict=True))


@torch.no_grad()
def _load(model: torch.nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Fill the model; what the checkpoint lacks (layers behind those that are read) becomes NaN.

    Gives the names of these.
    """
    absent = []
    for stored, value in model.named_parameters():
        # one release of transformers has this level in its towers, another has not
        name = "vision_tower." + stored.removeprefix("vision_model.")
        if name in checkpoint:
            value.copy_(torch.from_numpy(checkpoint.get(checkpoint.expect(name, *value.shape))))
        else:
            value.fill_(torch.nan)
            absent.append(name)
    return absent


def _alike(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> bool:
    """float32, added up in another order; what the checkpoint lacks is NaN on both sides."""
    scale = max(1.0, float(np.nan_to_num(np.abs(expected)).max()))
    return np.allclose(found, expected, rtol=0, atol=1e-4 * scale, equal_nan=True)


def _needed(graph: onnx.GraphProto, outputs: Sequence[str]) -> onnx.GraphProto:
    """The part of a graph that `outputs` come from."""
    wanted, nodes = set(outputs), []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            nodes.append(node)
            wanted.update(node.input)
    weights = [tensor for tensor in graph.initializer if tensor.name in wanted]
    return onnx.GraphProto(node=nodes[::-1], initializer=weights)
