"""llama.cpp's published pairs: MODEL.gguf and MMPROJ.gguf, seen as a checkpoint.

The language file goes into the bundle as it is, tokenizer included; the tower and the projector
become our graph. Names and rules: llama.cpp tools/mtmd/clip-impl.h and, for the files that are
around, tools/mtmd/legacy-models/convert_image_encoder_to_gguf.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import LlamaFileType, ReaderTensor, dequantize

from edgevlm.errors import BundleError

from . import bundle, language_file, processor, prompts
from .checkpoint import Checkpoint
from .families import NO_RELEASES, Arrays, Options, llava, llava_next, moondream
from .gguf import Language
from .graph import Graph
from .language_file import File
from .tower import Normalisation
from .vocabulary import Vocabulary

_LAYER = r"vision_tower.encoder.layers.\1"
_NAMES = {  # the converter shortens transformers' names; ffn_up and ffn_down see `_swapped`
    r"v\.class_embd": "vision_tower.embeddings.class_embedding",
    r"v\.patch_embd\.(weight|bias)": r"vision_tower.embeddings.patch_embedding.\1",
    r"v\.position_embd\.weight": "vision_tower.embeddings.position_embedding.weight",
    r"v\.pre_ln\.(\w+)": r"vision_tower.pre_layrnorm.\1",
    r"v\.blk\.(\d+)\.attn_(q|k|v|out)\.(\w+)": rf"{_LAYER}.self_attn.\2_proj.\3",
    r"v\.blk\.(\d+)\.ln([12])\.(\w+)": rf"{_LAYER}.layer_norm\2.\3",
    r"v\.blk\.(\d+)\.ffn_up\.(\w+)": rf"{_LAYER}.mlp.fc1.\2",
    r"v\.blk\.(\d+)\.ffn_down\.(\w+)": rf"{_LAYER}.mlp.fc2.\2",
    r"mm\.0\.(\w+)": r"multi_modal_projector.linear_1.\1",
    r"mm\.2\.(\w+)": r"multi_modal_projector.linear_2.\1",
    r"(model\.|v\.)?image_newline": "image_newline",
}
_PROJECTOR_BIASES = ("multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_2.bias")
_IMAGE = "<image>"
_CLIP_L_WIDTH, _CLIP_L_LAYERS = 1024, 24


class Pair(Checkpoint):
    """The two files under the names and settings of a LLaVA checkpoint's directory."""

    projection = "multi_modal_projector.linear_2.weight"  # into the language model

    def __init__(self, model: Path, mmproj: Path) -> None:
        self.directory = model  # what messages name
        self._model, self._mmproj = File(model), File(mmproj)
        if self._model.get("split.count", 0) > 1:
            raise BundleError(f"{model} is one part of several: join them with llama-gguf-split")
        if self._mmproj.get("general.architecture") != "clip":
            raise BundleError(f"{mmproj} is no mmproj file: its architecture is not clip")
        if (kind := self._mmproj.get("clip.projector_type", "mlp")) != "mlp":
            raise BundleError(f"{mmproj} has a {kind!r} projector; only LLaVA's mlp is known")
        self._adapter = None
        self._tensors, self.config = self._read(self._mmproj)

    def _read(self, mmproj: File) -> tuple[dict[str, ReaderTensor], dict[str, Any]]:
        """Tensors by the names of the checkpoint, and its config.json."""
        tensors = renamed(mmproj, _NAMES)
        return tensors, _config(mmproj, tensors)

    @property
    def mmproj(self) -> Path:
        return self._mmproj.path

    @property
    def n_embd(self) -> int:
        width = int(self._architecture("embedding_length"))
        found = self.shape(self.projection)[0]
        if found != width:
            raise BundleError(
                f"{self._mmproj.path} projects to {found} values; {self._model.path} takes "
                f"{width}: they belong to two models"
            )
        return width

    @property
    def n_ctx(self) -> int:
        return int(self._architecture("context_length"))

    @property
    def quantization(self) -> str:
        code = self._model.get("general.file_type")
        known = {int(kind): kind.name for kind in LlamaFileType}
        return known.get(code, "unknown").removeprefix("MOSTLY_").removeprefix("ALL_").lower()

    @property
    def licence(self) -> str:
        return str(self._model.get("general.license", "unknown"))

    @property
    def name(self) -> str:
        return str(self._model.get("general.name", self._model.path.stem))

    def _architecture(self, key: str) -> Any:
        return self._model.need(f"{self._model.need('general.architecture')}.{key}")

    def vocabulary(self) -> Vocabulary:
        """What prompts are chosen by; llama.cpp itself tokenizes with the file."""
        return language_file.vocabulary(self._model)

    def language(self) -> Language:
        """What a prefill graph is made of."""
        return language_file.read(self._model)

    def json(self, name: str) -> dict[str, Any] | None:
        """What a checkpoint keeps in JSON files, as far as the GGUF says it."""
        if name != "tokenizer_config.json":
            return None
        tokens = self._model.need("tokenizer.ggml.tokens")
        eos = self._model.get("tokenizer.ggml.eos_token_id")
        return {
            "chat_template": self._model.get("tokenizer.chat_template", ""),
            "eos_token": str(tokens[eos]) if eos is not None else None,
        }

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def rename(self, rule: Callable[[str], str]) -> None:
        raise NotImplementedError("the names are canonical already")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensor(name).shape))

    def get(self, name: str) -> npt.NDArray[np.float32]:
        tensor = self._tensor(name)
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.size and not np.isfinite([values.min(), values.max()]).all():
            raise BundleError(f"{tensor.name} in {self._mmproj.path} holds NaN or Inf")
        return np.asarray(values.reshape(self.shape(name)), np.float32)

    def _tensor(self, name: str) -> ReaderTensor:
        if name not in self._tensors:
            raise BundleError(f"{name} is missing in {self._mmproj.path}")
        return self._tensors[name]


@dataclass(frozen=True)
class Planned:
    vision: Graph
    manifest: dict[str, Any]  # what bundle.json says of the model
    files: Pair
    arrays: Mapping[str, Arrays] = field(default_factory=dict)  # by .npz file
    texts: Mapping[str, str] = field(default_factory=dict)  # further files of the bundle


def plan(
    model: Path, mmproj: Path, prompt: str | None, fit: str | None, release: str | None
) -> Planned:
    """All of the bundle but the language file, planned before anything is written."""
    options = Options(prompt, fit, release)
    if "v.post_ln.weight" in File(mmproj).tensors:  # the norm behind the last layer
        from . import pair_moondream

        options.refuse(**moondream.OWN_WAYS)
        return pair_moondream.plan(model, mmproj, release)
    options.refuse(release=NO_RELEASES)
    pair = Pair(model, mmproj)
    vocabulary = pair.vocabulary()
    template = prompts.choose(pair, vocabulary, prompt)
    images = _processor(pair, fit)
    shape = llava.tower_of(pair)
    # LLaVA-1.6; who names a fit wants one view of each picture
    tiled = bool(pair.config["image_grid_pinpoints"]) and fit is None
    graph, n_tokens = llava.vision(
        pair, pair.config, shape, images.normalisation, pair.n_embd, shortens=not tiled
    )
    if tiled and "image_newline" not in pair:
        raise BundleError(
            f"{pair.mmproj} names tiles, as LLaVA-1.6 has them, but lacks image_newline, which "
            "joins them: take another file, or one view of each picture with fit (--fit pad)"
        )
    grids = llava_next.grids(pair.config["image_grid_pinpoints"], shape.image_px, pair.mmproj) \
        if tiled else []  # fmt: skip
    tiles = {
        "tile_px": shape.image_px,
        "patch_px": shape.patch_px,
        "resample": images.resample,
        "grids": grids,
    }
    single = {
        "summary": "LLaVA, from llama.cpp's files: one square view of each picture",
        "can": ["describe", "ask", "chat"],
        "cannot": ["detect", "point"],
        "parity": {},
    }
    # llama.cpp tokenizes around a picture's place, so the marker need not be in its vocabulary.
    marker = len(vocabulary.texts)
    marked = replace(vocabulary, ids={**vocabulary.ids, _IMAGE: marker})
    stops = prompts.stop_token_ids(pair, template, vocabulary)
    manifest = {
        "family": "llava_next" if tiled else "llava",
        "licence": pair.licence,
        "image": tiles if tiled else llava.image_section(images, shape, graph, n_tokens),
        "prompt": prompts.section(template, marked, marker),
        "generation": {"stop_token_ids": stops, "max_tokens": 256, "repeat_penalty": 1.0},
        "n_embd": pair.n_embd,
        "n_ctx": bundle.context(pair.n_ctx),
        "card": llava_next.CARD if tiled else single,
    }
    arrays: Mapping[str, Arrays] = llava_next.newline(pair, pair.n_embd) if tiled else {}
    return Planned(graph, manifest, pair, arrays)


def _processor(pair: Pair, fit: str | None) -> processor.Processor:
    """Pictures as LLaVA was trained on them: padded to a square, resized with bicubic."""
    if fit is not None and fit not in processor.FITS:
        raise BundleError(f"fit {fit!r} is unknown; known: {', '.join(processor.FITS)}")
    mean, std = pair.config["image_mean"], pair.config["image_std"]
    return processor.Processor(
        fit=fit or "pad",
        size_px=pair.config["vision_config"]["image_size"],
        resample="bicubic",
        fill=(int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255)),
        normalisation=Normalisation(1 / 255, tuple(mean), tuple(std)),
    )


def renamed(mmproj: File, names: Mapping[str, str]) -> dict[str, ReaderTensor]:
    """The tensors that `names` knows, by the names that it gives them."""
    swapped = _swapped(mmproj)
    found = {}
    for stored, tensor in mmproj.tensors.items():
        name = stored
        if swapped:
            name = re.sub(
                r"ffn_(up|down)", lambda m: {"up": "ffn_down", "down": "ffn_up"}[m[1]], name
            )
        for pattern, plain in names.items():
            if match := re.fullmatch(pattern, name):
                found[match.expand(plain)] = tensor
    return found


def _swapped(mmproj: File) -> bool:
    """The old converter named the two halves of the MLP the other way round (clip.cpp,
    is_ffn_swapped): the first half is the one that takes the tower's width."""
    down = mmproj.tensors.get("v.blk.0.ffn_down.weight")
    return down is not None and int(down.shape[0]) == mmproj.need("clip.vision.embedding_length")


def _config(mmproj: File, tensors: dict[str, ReaderTensor]) -> dict[str, Any]:
    """config.json of the checkpoint that the tower came from."""
    cls = "vision_tower.embeddings.class_embedding" in tensors
    if mmproj.get("clip.use_silu"):
        raise BundleError(f"{mmproj.path} uses silu in its tower, which no CLIP or SigLIP does")
    width = mmproj.need("clip.vision.embedding_length")
    n_layers = mmproj.need("clip.vision.block_count")
    # The old converter left out the layers behind the one that is read, and said no more.
    layers = list(mmproj.get("clip.vision.feature_layer") or [])
    if not layers:
        whole = cls and width == _CLIP_L_WIDTH and n_layers == _CLIP_L_LAYERS
        layers = [n_layers - 1 if whole else n_layers]
    # transformers' names for what use_gelu means in the two kinds of tower
    activation = ("gelu" if mmproj.get("clip.use_gelu") else "quick_gelu") if cls else \
        "gelu_pytorch_tanh"  # fmt: skip
    mean, std = mmproj.need("clip.vision.image_mean"), mmproj.need("clip.vision.image_std")
    sides = [int(side) for side in mmproj.get("clip.vision.image_grid_pinpoints") or []]
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_feature_layer": layers,
        "vision_feature_select_strategy": "default" if cls else "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": any(name in tensors for name in _PROJECTOR_BIASES),
        # stored flat, width before height
        "image_grid_pinpoints": [[h, w] for w, h in zip(sides[::2], sides[1::2], strict=True)],
        "vision_config": {
            "model_type": "clip_vision_model" if cls else "siglip_vision_model",
            "hidden_size": width,
            "intermediate_size": _ff_width(tensors),
            "num_hidden_layers": max(n_layers, *layers),
            "num_attention_heads": mmproj.need("clip.vision.attention.head_count"),
            "image_size": mmproj.need("clip.vision.image_size"),
            "patch_size": mmproj.need("clip.vision.patch_size"),
            "hidden_act": activation,
            "layer_norm_eps": mmproj.need("clip.vision.attention.layer_norm_epsilon"),
        },
        "image_mean": [float(value) for value in mean],
        "image_std": [float(value) for value in std],
    }


def _ff_width(tensors: dict[str, ReaderTensor]) -> int:
    """From the weights: files of the Qwen kind say 0."""
    first = tensors.get("vision_tower.encoder.layers.0.mlp.fc1.weight")
    return math.prod(int(n) for n in first.shape[1:]) if first is not None else 0
