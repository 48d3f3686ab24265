"""LLaVA: a CLIP or SigLIP tower, a two-layer projector and a llama or phi3 language model.

Covers LLaVA-1.5, LLaVA-Phi-3-mini, LLaVA-Llama-3 and their like as transformers stores them
(modeling_llava.py), and LLaVA's own format, nanoLLaVA and Bunny (original.py). The feature layer
and the select strategy are taken literally.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from edgevlm.errors import BundleError

from .. import backbone, original, processor, tower, visionzip
from ..checkpoint import NUMBER, Checkpoint, Config, Kinds, section
from ..graph import Graph
from . import NO_RELEASES, Options, Parts

if TYPE_CHECKING:
    from ..optimum import Tower as Traced

Tower: TypeAlias = "tower.Tower | Traced"
# The reference's defaults, which older configs leave out (transformers CLIPVisionConfig,
# SiglipVisionConfig; without any vision_config LlavaConfig means CLIP-L/336).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}
# Mantis is a LLaVA by config.json and tensors; only its prompts are made by another class.
MANTIS_PROCESSOR = "MLlavaProcessor"
KINDS: Kinds = {
    "text_config": dict,
    "vision_config": dict,
    "image_token_index": int,
    "image_token_id": int,
    "projector_hidden_act": str,
    "multimodal_projector_bias": bool,
}


def matches(checkpoint: Checkpoint) -> bool:
    if original.matches(checkpoint):
        return not original.has_tiles(checkpoint)
    return (
        "LlavaForConditionalGeneration" in checkpoint.config["architectures"]
        and processor.wrapper(checkpoint) != MANTIS_PROCESSOR
    )


def parts(checkpoint: Checkpoint, options: Options) -> Parts:
    options.refuse(release=NO_RELEASES)
    if not original.matches(checkpoint):
        checkpoint.rename(canonical)
        return _parts(checkpoint, options)
    config = checkpoint.config = original.config(checkpoint)
    checkpoint.rename(original.canonical)
    fit, prompt = options.fit or config["fit"], options.prompt or config["prompt"]
    return _parts(checkpoint, replace(options, fit=fit, prompt=prompt), image_token=False)


def _parts(checkpoint: Checkpoint, options: Options, image_token: bool = True) -> Parts:
    where = checkpoint.directory / "config.json"
    root = section(checkpoint.config, KINDS, where)
    text = backbone.read(checkpoint, root, options.prompt)
    images = processor.read(checkpoint, options.fit)
    shape = tower_of(checkpoint, options.exporter)
    if images.size_px != shape.image_px:
        raise BundleError(
            f"the image processor makes {images.size_px} px, the tower takes {shape.image_px} px "
            f"in {checkpoint.directory}: they belong to two checkpoints"
        )
    n_embd = text.language.n_embd
    graph, n_tokens = vision(checkpoint, root, shape, images.normalisation, n_embd, shortens=True)
    manifest = {
        "image": image_section(images, shape, graph, n_tokens),
        "prompt": text.prompt(image_token_id(root) if image_token else None),
        "generation": text.generation(),
        "card": {
            "summary": "LLaVA: answers questions about one or more pictures, one square view each",
            "can": ["describe", "ask", "chat"],
            "cannot": ["detect", "point"],
            "parity": {},
        },
    }
    return Parts(graph, text.language, manifest)


def canonical(name: str) -> str:
    """Every scheme that transformers 4 and 5 save → `vision_tower.…`, `multi_modal_projector.…`,
    `language_model.…` (the decoder without its `model.`) and `lm_head.weight`."""
    name = name.removeprefix("model.")
    for stored, plain in (
        ("vision_tower.vision_model.", "vision_tower."),
        ("language_model.model.", "language_model."),
        ("language_model.lm_head.", "lm_head."),
    ):
        if name.startswith(stored):
            return plain + name.removeprefix(stored)
    return name


def image_token_id(root: Config) -> int:
    """Under its older or its newer name."""
    newer: int = root.get("image_token_id", 32000)
    older: int = root.get("image_token_index", newer)
    return older


def tower_of(checkpoint: Checkpoint, exporter: str | None = None) -> Tower:
    """The tower, to be written by graph.py or by the exporter that the caller names."""
    where = checkpoint.directory / "config.json"
    kinds: Kinds = {"model_type": str, "hidden_act": str, "layer_norm_eps": NUMBER}
    config = section(checkpoint.config.get("vision_config") or tower.CLIP_L_336, kinds, where)
    if exporter is not None:
        from .. import optimum  # brings torch

        return optimum.Tower(checkpoint, config)
    kind = config.get("model_type", "unnamed")
    if kind not in _DEFAULTS:
        raise BundleError(
            f"the vision tower of {checkpoint.directory} is {kind!r}; known: "
            f"{', '.join(_DEFAULTS)}; Optimum writes others: --exporter optimum"
        )
    config = {**_DEFAULTS[kind], **config}
    return tower.shape(config, where, "vision_tower.", cls=kind == "clip_vision_model")


def vision(
    checkpoint: Checkpoint,
    root: Config,
    shape: Tower,
    normalisation: tower.Normalisation,
    n_embd: int,
    *,
    shortens: bool = False,
) -> tuple[Graph, int]:
    """The graph, and the number of image tokens it gives for one tile.

    If it `shortens`, it has an input for fewer, unless several layers or none are read.
    """
    layers = root.get("vision_feature_layer", -2)
    layers = layers if isinstance(layers, list) else [layers]
    if not layers or not all(isinstance(layer, int) for layer in layers):
        raise BundleError(f"vision_feature_layer {layers!r:.60} names no layers")
    strategy = root.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise BundleError(f"vision_feature_select_strategy {strategy!r}; known: default, full")
    graph = Graph(shape.n_patches, shape.patch_values)
    if isinstance(shape, tower.Tower):
        n_tokens, width = shape.n_patches + shape.cls, shape.width
        last = layers[-1] + (shape.n_layers + 1 if layers[-1] < 0 else 0)
        shortens = shortens and len(layers) == 1 and last > 0
        read = [last - 1, last] if shortens else layers
        states = tower.hidden_states(graph, checkpoint, shape, normalisation, read)
    else:
        shortens = False
        states, (n_tokens, width) = shape.hidden_states(graph, normalisation, layers)
    n_tokens -= strategy == "default"

    def selected() -> str:
        chosen = states[-len(layers) :]
        if strategy == "default":  # literally: a SigLIP tower has no CLS row and loses a patch
            chosen = [tower.drop_first_row(graph, state) for state in chosen]
        return graph.op("Concat", *chosen, axis=-1) if len(chosen) > 1 else chosen[0]

    if isinstance(shape, tower.Tower) and shortens:
        before, after = states
        value = visionzip.shorten(graph, checkpoint, shape, last - 1, (before, after), selected)
    else:
        value = selected()
    widths = (width * len(layers), n_embd)
    activation = root.get("projector_hidden_act", "gelu")
    bias: bool = root.get("multimodal_projector_bias", True)
    embeddings = tower.projector(graph, checkpoint, value, widths, activation, bias=bias)
    graph.output(embeddings, "tokens" if shortens else n_tokens, n_embd)
    return graph, n_tokens


def image_section(
    images: processor.Processor, shape: Tower, graph: Graph, n_tokens: int
) -> dict[str, Any]:
    """bundle.json's "image"."""
    shortens = visionzip.INPUT in graph.input_names
    return {**images.section(shape.patch_px, n_tokens), "shortens": shortens}
