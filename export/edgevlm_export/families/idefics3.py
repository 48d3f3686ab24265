"""Idefics3 and SmolVLM: a SigLIP tower, pixel shuffle, one linear layer and a llama.

Reference: transformers' modeling_idefics3.py; SmolVLM is the same model under another name.
Every tile fills the tower's square, so its NaViT-style positions are known here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgevlm.errors import BundleError
from edgevlm.positions import positions

from .. import backbone, processor, tower
from ..checkpoint import NUMBER, Checkpoint, Config, Kinds, section, whole_number
from ..graph import Graph
from . import NO_RELEASES, Options, Parts

_ARCHITECTURES = {"Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"}
_PROCESSORS = ("Idefics3ImageProcessor", "SmolVLMImageProcessor")
_KINDS: Kinds = {"text_config": dict, "vision_config": dict, "image_token_id": int}
_VISION: Config = {  # transformers' Idefics3VisionConfig
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_IMAGE_TOKEN_ID = 128257  # Idefics3Config's default
_WORDS = {
    "border": "<fake_token_around_image>",
    "tile": "<row_{row}_col_{column}>",
    "whole": "<global-img>",
}


def matches(checkpoint: Checkpoint) -> bool:
    return not _ARCHITECTURES.isdisjoint(checkpoint.config["architectures"])


def parts(checkpoint: Checkpoint, options: Options) -> Parts:
    checkpoint.rename(canonical)
    where = checkpoint.directory / "config.json"
    root = section(checkpoint.config, _KINDS, where)
    options.refuse(
        fit="this family cuts pictures into tiles; it has no other way", release=NO_RELEASES
    )
    text = backbone.read(checkpoint, root, options.prompt)
    kinds: Kinds = {"hidden_act": str, "layer_norm_eps": NUMBER}
    vision = {**_VISION, **section(root.get("vision_config", {}), kinds, where)}
    shape = tower.shape(vision, where, "vision_tower.", cls=False)
    image, normalisation = _image(checkpoint, shape)
    factor = whole_number({"scale_factor": 2, **root}, "scale_factor", where)
    graph, image["tile_tokens"] = _vision(
        checkpoint, shape, normalisation, factor, text.language.n_embd
    )
    image_token_id: int = root.get("image_token_id", _IMAGE_TOKEN_ID)
    words = text.prompt(image_token_id)
    manifest = {
        "image": image,
        "prompt": {**words, "image": words["image_token"], **_WORDS},
        "generation": text.generation(),
        "card": {
            "summary": "Idefics3: answers questions about pictures, which it sees as tiles",
            "can": ["describe", "ask", "chat"],
            "cannot": ["detect", "point"],
            "parity": {},
        },
    }
    return Parts(graph, text.language, manifest)


def canonical(name: str) -> str:
    """`model.vision_model.…`, `model.text_model.…` → the names that tower and decoder take."""
    name = name.removeprefix("model.")
    for stored, plain in (("vision_model.", "vision_tower."), ("text_model.", "language_model.")):
        if name.startswith(stored):
            return plain + name.removeprefix(stored)
    return name


def _image(checkpoint: Checkpoint, shape: tower.Tower) -> tuple[Config, tower.Normalisation]:
    """bundle.json's "image" but for the number of tokens, and what the weights absorb."""
    config, where, _ = processor.stored(checkpoint, _PROCESSORS)
    longest = _edge(config.get("size", {"longest_edge": 4 * 364}), where)
    tile_px = _edge(config.get("max_image_size", {"longest_edge": 364}), where)
    if tile_px != shape.image_px:
        raise BundleError(
            f"{where} makes tiles of {tile_px} px, the tower takes {shape.image_px} px: they "
            "belong to two checkpoints"
        )
    image = {
        "longest_px": longest,
        "tile_px": tile_px,
        "split": bool(config.get("do_image_splitting", True)),
        "patch_px": shape.patch_px,
        "resample": processor.resample(config, 1, where),
    }
    return image, processor.normalisation(config, 0.5, 0.5, where)


def _edge(size: Any, where: object) -> int:
    edge = size.get("longest_edge") if isinstance(size, dict) else None
    if not isinstance(edge, int) or edge < 1:
        raise BundleError(f"{where} has the size {size!r:.60}; a longest_edge is needed")
    return edge


def _vision(
    checkpoint: Checkpoint,
    shape: tower.Tower,
    normalisation: tower.Normalisation,
    factor: int,
    n_embd: int,
) -> tuple[Graph, int]:
    """The graph, and the number of image tokens it gives for one tile."""
    side = shape.image_px // shape.patch_px
    if side % factor:
        raise BundleError(
            f"scale_factor {factor} does not divide the {side} patches of a tile's side in "
            f"{checkpoint.directory}"
        )
    graph = Graph(shape.n_patches, shape.patch_values)
    row = positions(side, side)  # the plain grid but for some sizes' rounding
    taken = None
    if not np.array_equal(row, np.arange(side)):
        taken = graph.constant((row[:, np.newaxis] * side + row).reshape(-1), np.int64)
    (value,) = tower.hidden_states(graph, checkpoint, shape, normalisation, [-1], positions=taken)
    norm = f"{shape.prefix}post_layernorm"
    value = graph.layer_norm(value, checkpoint, norm, shape.width, shape.eps)
    value = _pixel_shuffle(graph, value, side, shape.width, factor)
    widths = (shape.width * factor**2, n_embd)
    name = "connector.modality_projection.proj"
    value = tower.linear(graph, checkpoint, name, value, widths, bias=False)
    n_tokens = (side // factor) ** 2
    graph.output(value, n_tokens, n_embd)
    return graph, n_tokens


def _pixel_shuffle(graph: Graph, value: str, side: int, width: int, factor: int) -> str:
    """[tiles, side², C] → [tiles, (side / f)², f²·C]: each square of f × f patches, row by row."""
    less = side // factor

    def shape(*sizes: int) -> str:
        return graph.constant(sizes, np.int64)

    value = graph.op("Reshape", value, shape(-1, less, factor, less, factor * width))
    value = graph.op("Transpose", value, perm=[0, 1, 3, 2, 4])
    return graph.op("Reshape", value, shape(-1, less**2, factor**2 * width))
