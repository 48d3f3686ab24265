"""Moondream: a SigLIP tower over crops, a phi-1.5 decoder and, since 2025, a region model.

The release is told by tensor names, the projector's width and the files beside the weights; where
those leave two open, the caller must name it. Tensor names: vikhyat/moondream,
moondream/torch/weights.py.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from edgevlm.errors import BundleError

from .. import crops, phi2, releases, vocabulary
from ..checkpoint import Checkpoint, section
from ..graph import Array, Load
from ..releases import GRID, LINEAR_SIZES, LOG_SIZES, ONE_CROP, RELEASES, STARMIE
from . import Options, Parts

OWN_WAYS = {  # what the caller does not decide
    "fit": "this family stretches pictures; it has no other way",
    "prompt": "this family's prompts go by its release",
}
_OLD_NAMES = (  # moondream/torch/weights.py; the first that fits
    (r"text_model\.transformer\.embd\.wte\.weight", "text.wte"),
    (r"text_model\.transformer\.h\.(\d+)\.mixer\.Wqkv\.", r"text.blocks.\1.attn.qkv."),
    (r"text_model\.transformer\.h\.(\d+)\.mixer\.out_proj\.", r"text.blocks.\1.attn.proj."),
    (r"text_model\.transformer\.h\.(\d+)\.", r"text.blocks.\1."),
    (r"text_model\.lm_head\.ln\.", "text.post_ln."),
    (r"text_model\.lm_head\.linear\.", "text.lm_head."),
    (r"vision_encoder\.projection\.mlp\.", "vision.proj_mlp."),
    (r"vision_encoder\.encoder\.model\.visual\.patch_embed\.linear\.", "vision.patch_emb."),
    (r"vision_encoder\.encoder\.model\.visual\.pos_embed", "vision.pos_emb"),
    (r"vision_encoder\.encoder\.model\.visual\.norm\.", "vision.post_ln."),
    (r"vision_encoder\.encoder\.model\.visual\.blocks\.(\d+)\.norm", r"vision.blocks.\1.ln"),
    (r"vision_encoder\.encoder\.model\.visual\.", "vision."),
    (r"region_model\.coordinate_features\.weight", "region.coord_features"),
    (r"region_model\.size_features\.weight", "region.size_features"),
    (r"region_model\.coordinate_", "region.coord_"),
    (r"region_model\.size_", "region.size_"),
)
_PART = re.compile(  # all that is read; another tensor would be arithmetic left out
    r"text\.(wte|(post_ln|lm_head)\.(weight|bias)"
    r"|blocks\.\d+\.(ln|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias))"
    r"|vision\.(pos_emb|(patch_emb|post_ln|proj_mlp\.fc[12])\.(weight|bias)"
    r"|blocks\.\d+\.(ln[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias))"
    r"|region\.((coord|size)_features|(coord|size)_(encoder|decoder\.fc[12])\.(weight|bias))"
)
# Buffers, and the region model of 2024, which was never used.
_UNREAD = re.compile(
    r"region_model\.|text\.(freqs_cis|blocks\.\d+\.kv_cache)|attn_mask|.*\.(inv_freq|rotary_emb\..*)"
)


def matches(checkpoint: Checkpoint) -> bool:
    named = checkpoint.config["architectures"]
    return "HfMoondream" in named or "Moondream" in named


def parts(checkpoint: Checkpoint, options: Options) -> Parts:
    options.refuse(**OWN_WAYS)
    early_region = "region_model.position_encoder.weight" in checkpoint
    checkpoint.rename(lambda name: canonical(name, early_region))
    _refuse_unknown(checkpoint)
    where = checkpoint.directory / "config.json"
    declared = section(checkpoint.config.get("config") or {}, _KINDS, where)
    release = release_of(checkpoint, options.release)
    config = phi2.shape(checkpoint, _text_config(checkpoint, declared))
    vision = section(declared.get("vision") or {}, _VISION, where)
    n_heads = vision.get("enc_n_heads")
    tower = crops.shape(checkpoint, n_heads)
    if tower.n_embd != config["hidden_size"]:
        raise BundleError(
            f"{checkpoint.directory}: the projector gives {tower.n_embd} values, the language "
            f"model takes {config['hidden_size']}: they belong to two models"
        )
    vocab = vocabulary.read(checkpoint, config["vocab_size"])
    tokens = releases.tokens(checkpoint, release, declared, vocab.ids)
    releases.check_ids(checkpoint, release, tokens, config["vocab_size"])
    vocab = replace(vocab, bos_id=tokens["bos_id"], adds_bos=False)
    prefix = release not in (ONE_CROP, GRID)  # BOS and picture are read in both directions
    graph = crops.graph(
        checkpoint, tower,
        averages=release == GRID, first_row=tokens["bos_id"] if prefix else None,
    )  # fmt: skip
    n_tokens = tower.n_patches + prefix
    return Parts(
        graph,
        phi2.plan(checkpoint, config, vocab, tokens["eos_id"]),
        {
            "image": image_section(release, tower, vision, n_tokens),
            "prompt": releases.prompt_section(release, tokens),
            "generation": releases.generation_section(release, tokens),
            **({"region": {"log_sizes": release != LINEAR_SIZES}} if prefix else {}),
            "card": card(release),
        },
        {"region.npz": _region(checkpoint, config["hidden_size"])} if prefix else {},
    )


_KINDS = {"text": dict, "vision": dict, "tokenizer": dict}
_VISION = {"enc_n_heads": int, "max_crops": int, "overlap_margin": int}


def canonical(name: str, early_region: bool = False) -> str:
    """Every naming scheme → that of 2025 without its `model.`; a buffer keeps what it has."""
    name = name.removeprefix("model.").replace("._orig_mod", "")
    if early_region and name.startswith("region_model."):
        return name
    for stored, plain in _OLD_NAMES:
        new, count = re.subn(rf"\A{stored}", plain, name)
        if count:
            return new
    return name


def release_of(checkpoint: Checkpoint, named: str | None) -> str:
    """The first release that this checkpoint is like.

    Raises:
        BundleError: it could be two, and `named` does not say which; or `named` cannot be.
    """
    possible = _possible(checkpoint)
    if named is not None:
        if named not in RELEASES:
            raise BundleError(f"release {named!r} is unknown; known: {', '.join(RELEASES)}")
        if named not in possible:
            raise BundleError(
                f"{checkpoint.directory} is not like the release of {named}: by its tensors it is "
                f"that of {' or '.join(possible)}"
            )
        return named
    if len(possible) == 1:
        return possible[0]
    code = "".join(
        path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(checkpoint.directory.glob("*.py"))
    )
    if code:
        later = LOG_SIZES if re.search(r"pow\(2\.0|14617", code) else LINEAR_SIZES
        return STARMIE if "starmie" in code else later
    if "<|md_reserved_0|>" in releases.tokenizer(checkpoint).get_vocab(with_added_tokens=True):
        return STARMIE
    raise BundleError(
        f"{checkpoint.directory} may be of {' or '.join(possible)}: the tensors are alike and the "
        "code that came with them is not there; name one with release="
    )


def _possible(checkpoint: Checkpoint) -> tuple[str, ...]:
    if any(name.startswith("region.") for name in checkpoint.names):
        return (LINEAR_SIZES, LOG_SIZES, STARMIE)
    width = checkpoint.axes("vision.patch_emb.weight", 2)[0]
    read = checkpoint.axes("vision.proj_mlp.fc1.weight", 2)[1]
    return (ONE_CROP,) if read == width else (GRID,)


def _refuse_unknown(checkpoint: Checkpoint) -> None:
    for name in checkpoint.names:
        if name.endswith((".packed", ".scale", ".zero_point")):
            raise BundleError(f"{name}: this is an int4 checkpoint; take the unquantized one")
        if not _PART.fullmatch(name) and not _UNREAD.match(name):
            raise BundleError(
                f"{name} in {checkpoint.directory} is not a part of a model that is known here"
            )


def _text_config(checkpoint: Checkpoint, declared: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the decoder, in transformers' words; 2025 has words of its own."""
    where = checkpoint.directory / "config.json"
    root = checkpoint.config
    kinds = {"num_attention_heads": int, "max_position_embeddings": int}
    config = section(root.get("text_config") or root.get("phi_config") or {}, kinds, where)
    names = {
        "dim": "hidden_size",
        "ff_dim": "intermediate_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "vocab_size": "vocab_size",
        "max_context": "max_position_embeddings",
    }
    own = section(declared.get("text") or {}, dict.fromkeys(names, int), where)
    config |= {name: own[key] for key, name in names.items() if key in own}
    return config


def image_section(
    release: str, tower: crops.Tower, vision: dict[str, Any], n_tokens: int
) -> dict[str, Any]:
    overlapping = release not in (ONE_CROP, GRID)
    return {
        "size_px": tower.grid * tower.patch_px,
        "patch_px": tower.patch_px,
        "resample": "lanczos" if overlapping else "bicubic",
        "crops": {ONE_CROP: "single", GRID: "grid"}.get(release, "overlap"),
        "max_crops": vision.get("max_crops", 12) if overlapping else 4,
        "overlap_patches": vision.get("overlap_margin", 4) if overlapping else 0,
        "n_tokens": n_tokens,
        "bidirectional_tokens": n_tokens if overlapping else 0,
    }


def _region(checkpoint: Checkpoint, n_embd: int) -> dict[str, Load]:
    """Arrays of region.npz, without `region.`; features [1, n] and [2, n]."""
    arrays: dict[str, Load] = {}
    for kind, n_values in (("coord", 1), ("size", 2)):
        features = f"region.{kind}_features"
        rows, columns = checkpoint.axes(features, 2)
        turned = rows != n_values  # older names hold the matrix of a Linear
        n_features = rows if turned else columns
        checkpoint.expect(features, *((n_features, n_values) if turned else (n_values, n_features)))
        arrays[f"{kind}_features"] = _matrix(checkpoint, features, turned)
        inner, out = (checkpoint.axes(f"region.{kind}_decoder.fc{n}.weight", 2)[0] for n in (1, 2))
        for layer, shape in (
            (f"{kind}_encoder", (n_embd, 2 * n_features)),
            (f"{kind}_decoder.fc1", (inner, n_embd)),
            (f"{kind}_decoder.fc2", (out, inner)),
        ):
            for part, expected in (("weight", shape), ("bias", shape[:1])):
                name = checkpoint.expect(f"region.{layer}.{part}", *expected)
                arrays[f"{layer}.{part}"] = _matrix(checkpoint, name, False)
    return arrays


def _matrix(checkpoint: Checkpoint, name: str, turned: bool) -> Load:
    def load() -> Array:
        values = checkpoint.get(name)
        return values.T if turned else values

    return load


def card(release: str) -> dict[str, Any]:
    points = release not in (ONE_CROP, GRID)
    return {
        "summary": f"Moondream2 as released on {release}: one picture, described or asked about",
        "can": ["describe", "ask", "chat", *(["detect", "point", "gaze"] if points else [])],
        "cannot": ["several pictures", *([] if points else ["detect", "point"])],
        "parity": {},
    }
