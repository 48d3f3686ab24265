"""LLaVA-NeXT (1.6): LLaVA's tower and projector over a grid of tiles, and a mark that ends a row.

Reference: transformers' modeling_llava_next.py; in LLaVA's own format llava/mm_utils.py, where
tiles are called anyres. The runtime stitches them and takes the mark from extra.npz.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgevlm.errors import BundleError

from .. import backbone, original, processor
from ..checkpoint import Checkpoint, Config, section
from . import NO_RELEASES, Arrays, Options, Parts, llava

_PROCESSOR = "LlavaNextImageProcessor"
# transformers' LlavaNextConfig, (height, width) in px
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
CARD = {
    "summary": "LLaVA-NeXT: answers questions about pictures, which it sees as tiles",
    "can": ["describe", "ask", "chat"],
    "cannot": ["detect", "point"],
    "parity": {},
}


def matches(checkpoint: Checkpoint) -> bool:
    architectures = checkpoint.config["architectures"]
    return "LlavaNextForConditionalGeneration" in architectures or original.has_tiles(checkpoint)


def parts(checkpoint: Checkpoint, options: Options) -> Parts:
    own = original.has_tiles(checkpoint)
    if own:
        checkpoint.config = original.config(checkpoint)
    checkpoint.rename(original.canonical if own else llava.canonical)
    where = checkpoint.directory / "config.json"
    root = section(checkpoint.config, llava.KINDS, where)
    options.refuse(
        fit="this family cuts pictures into tiles; it has no other way", release=NO_RELEASES
    )
    text = backbone.read(checkpoint, root, options.prompt or root.get("prompt"))
    shape = llava.tower_of(checkpoint, options.exporter)
    config, file, kind = processor.stored(checkpoint, original.PROCESSORS if own else (_PROCESSOR,))
    siglip = kind == original.SIGLIP
    mean, std = (0.5, 0.5) if siglip else (processor.CLIP_MEAN, processor.CLIP_STD)
    normalisation = processor.normalisation(config, mean, std, file)
    _check_sizes(config, shape.image_px, file)
    n_embd = text.language.n_embd
    graph, n_tokens = llava.vision(checkpoint, root, shape, normalisation, n_embd)
    if n_tokens != shape.n_patches:
        raise BundleError(
            f"vision_feature_select_strategy leaves {n_tokens} of {shape.n_patches} patches in "
            f"{where}: rows of tiles cannot be joined"
        )
    pinpoints = root.get("image_grid_pinpoints", _PINPOINTS)
    if config.get("image_grid_pinpoints", pinpoints if own else _PINPOINTS) != pinpoints:
        raise BundleError(f"{where} and the image processor name different image_grid_pinpoints")
    manifest = {
        "image": {
            "tile_px": shape.image_px,
            "patch_px": shape.patch_px,
            "resample": processor.resample(config, 3, file),
            "grids": grids(pinpoints, shape.image_px, where),
        },
        "prompt": text.prompt(None if own else llava.image_token_id(root)),
        "generation": text.generation(),
        "card": CARD,
    }
    return Parts(graph, text.language, manifest, newline(checkpoint, n_embd))


def newline(checkpoint: Checkpoint, n_embd: int) -> dict[str, Arrays]:
    """The mark that ends a row of tiles, as the runtime's family reads it."""
    name = checkpoint.expect("image_newline", n_embd)
    return {"extra.npz": {"image_newline": lambda: checkpoint.get(name)}}


def _check_sizes(config: Config, tile_px: int, where: Path) -> None:
    """Tiles are cut, resized and cropped to three configured sizes, which must all be one."""
    found: list[Any] = []
    for key in ("size", "crop_size"):
        size = config.get(key, {})
        found += size.values() if isinstance(size, dict) else [size]
    if not found or any(edge != tile_px for edge in found):
        raise BundleError(
            f"{where} makes tiles of {found} px, the tower takes {tile_px} px: they belong to two "
            "checkpoints"
        )


def grids(pinpoints: Any, tile_px: int, where: Path) -> list[list[int]]:
    """The grids that a picture may be laid on, (height, width) in tiles."""
    try:
        found = [[height // tile_px, width // tile_px] for height, width in pinpoints]
        if not found or [[h * tile_px, w * tile_px] for h, w in found] != pinpoints:
            raise ValueError(f"they are not multiples of {tile_px} px")
    except (TypeError, ValueError) as error:
        raise BundleError(
            f"image_grid_pinpoints {pinpoints!r:.60} in {where} cannot be used: {error}"
        ) from error
    return found
