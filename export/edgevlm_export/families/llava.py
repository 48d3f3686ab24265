"""LLaVA: a CLIP or SigLIP tower, a two-layer projector and a llama or phi3 language model.

Covers LLaVA-1.5, LLaVA-Phi-3-mini, LLaVA-Llama-3 and their like as transformers stores them
(modeling_llava.py). The feature layer and the select strategy are taken literally.
"""

from __future__ import annotations

from typing import Any

from edgevlm.errors import BundleError

from .. import decoder, processor, prompts, tower, vocabulary
from ..checkpoint import NUMBER, Checkpoint, Config, Kinds, section, whole_number
from ..graph import Graph
from . import Options, Parts

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
_KINDS: Kinds = {
    "text_config": dict,
    "vision_config": dict,
    "image_token_index": int,
    "image_token_id": int,
    "projector_hidden_act": str,
}
_CLIP_L_336: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def matches(checkpoint: Checkpoint) -> bool:
    return "LlavaForConditionalGeneration" in checkpoint.config["architectures"]


def parts(checkpoint: Checkpoint, options: Options) -> Parts:
    checkpoint.rename(canonical)
    where = checkpoint.directory / "config.json"
    root = section(checkpoint.config, _KINDS, where)
    text = section(root.get("text_config", {}), {"model_type": str}, where)
    text = decoder.complete(checkpoint, decoder.architecture(checkpoint, text), text)
    n_vocab = checkpoint.shape("language_model.embed_tokens.weight")[0]
    vocab = vocabulary.read(checkpoint, n_vocab)
    template = prompts.choose(checkpoint, vocab, options.prompt)
    stops = prompts.stop_token_ids(checkpoint, template, vocab)
    tied = bool(root.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    language = decoder.plan(checkpoint, text, vocab, stops[0], tied)
    images = processor.read(checkpoint, options.fit)
    shape = _tower(checkpoint)
    if images.size_px != shape.image_px:
        raise BundleError(
            f"the image processor makes {images.size_px} px, the tower takes {shape.image_px} px "
            f"in {checkpoint.directory}: they belong to two checkpoints"
        )
    graph, n_tokens = _vision(checkpoint, root, shape, images.normalisation, language.n_embd)
    newer: int = root.get("image_token_id", 32000)
    image_token_id: int = root.get("image_token_index", newer)
    manifest = {
        "image": images.section(shape.patch_px, n_tokens),
        "prompt": prompts.section(template, vocab, image_token_id),
        "generation": {"stop_token_ids": stops, "max_tokens": 256, "repeat_penalty": 1.0},
        "card": {
            "summary": "LLaVA: answers questions about one or more pictures, one square view each",
            "can": ["describe", "ask", "chat"],
            "cannot": ["detect", "point"],
            "parity": {},
        },
    }
    return Parts(graph, language, manifest)


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


def _tower(checkpoint: Checkpoint) -> tower.Tower:
    where = checkpoint.directory / "config.json"
    kinds: Kinds = {"model_type": str, "hidden_act": str, "layer_norm_eps": NUMBER}
    config = section(checkpoint.config.get("vision_config") or _CLIP_L_336, kinds, where)
    kind = config.get("model_type", "unnamed")
    if kind not in _DEFAULTS:
        raise BundleError(
            f"the vision tower of {checkpoint.directory} is {kind!r}; known: {', '.join(_DEFAULTS)}"
        )
    config = {**_DEFAULTS[kind], **config}
    sizes = ("hidden_size", "num_attention_heads", "image_size", "patch_size")
    width, n_heads, image_px, patch_px = (whole_number(config, key, where) for key in sizes)
    if width % n_heads or image_px % patch_px:
        raise BundleError(
            f"{where} splits a width of {width} into {n_heads} heads and {image_px} px into "
            f"patches of {patch_px} px: both must come out even"
        )
    return tower.Tower(
        prefix="vision_tower.",
        n_layers=whole_number(config, "num_hidden_layers", where),
        n_heads=n_heads,
        width=width,
        ff_width=whole_number(config, "intermediate_size", where),
        image_px=image_px,
        patch_px=patch_px,
        activation=config["hidden_act"],
        eps=config["layer_norm_eps"],
        cls=kind == "clip_vision_model",
    )


def _vision(
    checkpoint: Checkpoint,
    root: Config,
    shape: tower.Tower,
    normalisation: tower.Normalisation,
    n_embd: int,
) -> tuple[Graph, int]:
    """The graph, and the number of image tokens it gives for one tile."""
    layers = root.get("vision_feature_layer", -2)
    layers = layers if isinstance(layers, list) else [layers]
    if not layers or not all(isinstance(layer, int) for layer in layers):
        raise BundleError(f"vision_feature_layer {layers!r:.60} names no layers")
    strategy = root.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise BundleError(f"vision_feature_select_strategy {strategy!r}; known: default, full")
    graph = Graph(shape.n_patches, shape.patch_values)
    states = tower.hidden_states(graph, checkpoint, shape, normalisation, layers)
    n_tokens = shape.n_patches + shape.cls
    if strategy == "default":  # literally: a SigLIP tower has no CLS row and loses a patch
        states = [tower.drop_first_row(graph, state) for state in states]
        n_tokens -= 1
    value = graph.op("Concat", *states, axis=-1) if len(states) > 1 else states[0]
    widths = (shape.width * len(layers), n_embd)
    activation = root.get("projector_hidden_act", "gelu")
    graph.output(tower.projector(graph, checkpoint, value, widths, activation), n_tokens, n_embd)
    return graph, n_tokens
