"""A bundle and the checkpoint it came from → how far apart they are, number by number.

The reference is one of `oracles`, in float32: its pixels, its embeddings, its logits, its greedy
tokens and its places, on the same pictures and the same prompts. Needs the extra `verify`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from edgevlm import families, paths, plan, preprocess, region, vision
from edgevlm.answer import EncodedImage
from edgevlm.bundle import MANIFEST, Bundle, manifest_text, open_bundle
from edgevlm.cancel import Cancel
from edgevlm.errors import PromptError
from edgevlm.language import Language
from edgevlm.layout import Layout
from edgevlm.options import Options
from edgevlm.prompt import ImageSlot, Message, Segment
from edgevlm.sessions import Session
from edgevlm.settings import Settings

from . import oracles, photos
from .checkpoint import Checkpoint
from .families import Options as FamilyOptions
from .families import find
from .gate import cosines
from .oracles import MOST_PLACES, STEPS, Ids, Question, Seen

Floats = npt.NDArray[np.float32]

_QUESTION, _THING = "What is in the picture?", "person"


def verify(
    bundle: Path, reference: Path, *, pictures: Sequence[Path] = (), threads: int = 1
) -> dict[str, Any]:
    """Compare, write the numbers into the bundle's card, and return them.

    Raises:
        BundleError: either side cannot be opened, or no oracle has such a model.
    """
    opened = open_bundle(bundle)
    seen = list(photos.read(pictures))
    with closing(_Ours(opened, threads)) as ours:  # its memory is free before torch takes some
        questions, found = zip(*map(ours.look, seen), strict=True)
    exact = _embeddings(opened, reference, seen, threads)
    oracle = oracles.find(opened.manifest["family"])
    expected = list(oracle.answers(opened, reference, questions))
    card = {"reference": oracle.NAME, **_card(found, exact, expected)}
    card |= _against_optimum(opened, reference, seen, threads, exact)
    _write(opened, card)
    return card


class _Ours:
    """The bundle, through the runtime's own stages; keys and values in float32."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._threads, self._cancel = threads, Cancel()
        self._family = families.find(bundle)
        self._session = Session(bundle.file("vision.onnx"), threads)
        way = plan.make(bundle, Settings(precise=True)).way
        self._language = Language(
            bundle, way=way, threads=threads, cancel=self._cancel, precise=True
        )
        self._ends: list[int] = bundle.manifest["generation"]["stop_token_ids"]

    def look(self, pixels: photos.Pixels) -> tuple[Question, Seen]:
        layout = self._family.layout(*pixels.shape[:2])
        patches = preprocess.patches(pixels, layout, self._threads)
        embeddings = vision.encode(self._session, patches, layout, self._family, self._cancel)
        encoded = EncodedImage(embeddings, layout, pixels.shape[:2], str(id(pixels)), "")
        prompt = self._read(
            self._family.prompt([Message("user", _QUESTION, (0,))], [layout]), encoded
        )
        logits = self._language.logits()
        with self._language.sampler(Options(repeat_penalty=1.0)) as sampler:
            tokens = [token for token, _ in self._language.tokens(sampler, STEPS)]
        detect, boxes = self._find(self._family.detect_prompt, encoded, sized=True)
        point, points = self._find(self._family.point_prompt, encoded, sized=False)
        question = Question(pixels, prompt, detect, point)
        return question, Seen(_tiles(patches, layout), embeddings, logits, tokens, boxes + points)

    def _read(self, segments: Sequence[Segment], encoded: EncodedImage) -> Ids:
        prompt = self._language.tokenize(segments)
        self._language.feed(prompt, [encoded])
        return tuple(unit for unit in prompt.units if isinstance(unit, (int, ImageSlot)))

    def _find(
        self, prompt: Callable[[str], list[Segment]], encoded: EncodedImage, *, sized: bool
    ) -> tuple[Ids, list[tuple[float, ...]]]:
        """What is read, and what is found; nothing of either where the model does not point."""
        try:
            segments = prompt(_THING)
        except PromptError:
            return (), []
        ids = self._read(segments, encoded)
        found = region.find(self._language, self._ends, sized=sized, most=MOST_PLACES)
        return ids, [(place.x, place.y, *(place.size or ())) for place in found]

    def close(self) -> None:
        self._cancel.close()
        self._language.close()


def _tiles(patches: npt.NDArray[np.uint8], layout: Layout) -> npt.NDArray[np.int16]:
    """uint8 [tiles, n, P·P·3] → int16 [tiles, 3, S, S], as the reference lays pixels out."""
    side, patch = layout.tile_px // layout.patch_px, layout.patch_px
    inner = (3, patch, patch) if layout.channels_first else (patch, patch, 3)
    blocks = patches.reshape(len(patches), side, side, *inner)
    order = (0, 3, 1, 4, 2, 5) if layout.channels_first else (0, 5, 1, 3, 2, 4)
    tiles = blocks.transpose(order).reshape(len(patches), 3, layout.tile_px, layout.tile_px)
    return np.asarray(tiles, np.int16)


def _against_optimum(
    bundle: Bundle,
    reference: Path,
    seen: Sequence[photos.Pixels],
    threads: int,
    exact: Sequence[Floats],
) -> dict[str, Any]:
    """Our fp32 graph against one whose tower Optimum exports from the same weights.

    Nothing to compare where Optimum is not installed, or where it or no such tower made the graph.
    """
    if find_spec("optimum") is None or bundle.manifest.get("options", {}).get("exporter"):
        return {"optimum_max_error": None}
    theirs = _embeddings(bundle, reference, seen, threads, exporter="optimum")
    if not theirs:
        return {"optimum_max_error": None}
    errors = [np.abs(a - b).max() for a, b in zip(exact, theirs, strict=True)]
    return {"optimum_max_error": float(max(errors))}


def _embeddings(
    bundle: Bundle,
    reference: Path,
    seen: Sequence[photos.Pixels],
    threads: int,
    exporter: str | None = None,
) -> list[Floats]:
    """What the graph gives in fp32, whatever format the bundle keeps it in."""
    # what a GGUF pair became has none
    tokenizer = bundle.file("tokenizer.json") if bundle.has("tokenizer.json") else None
    checkpoint = Checkpoint(reference, tokenizer)
    _, module = find(checkpoint, bundle.manifest["family"])
    options = _as_exported(bundle)
    graph = module.parts(checkpoint, replace(options, exporter=exporter or options.exporter)).vision
    if exporter is not None and not graph.has_inserted:
        return []
    family = families.find(bundle)
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "vision.onnx"
        graph.model().save(path, data=path.with_suffix(".data"))
        session = Session(path, threads)
        found = []
        for pixels in seen:
            layout = family.layout(*pixels.shape[:2])
            patches = preprocess.patches(pixels, layout, threads)
            found.append(vision.encode(session, patches, layout, family, Cancel()))
        return found


def _as_exported(bundle: Bundle) -> FamilyOptions:
    """The choices that were the caller's at export time."""
    chosen: Mapping[str, str] = bundle.manifest.get("options", {})
    return FamilyOptions(**chosen)


def _card(
    found: Sequence[Seen], exact: Sequence[Floats], expected: Sequence[Seen]
) -> dict[str, Any]:
    pairs = list(zip(found, expected, strict=True))
    same_tiles = all(ours.pixels.shape == theirs.pixels.shape for ours, theirs in pairs)
    errors = [np.abs(e - t.embeddings).max() for e, t in zip(exact, expected, strict=True)]
    similar = np.concatenate([cosines(o.embeddings, t.embeddings) for o, t in pairs])
    spread = np.concatenate([t.embeddings for t in expected]).std()
    card = {
        "photos": len(pairs),
        "pixels_max_difference": max(int(np.abs(o.pixels - t.pixels).max()) for o, t in pairs)
        if same_tiles
        else None,
        "vision_fp32_max_error": float(max(errors)),
        "vision_standard_deviation": float(spread),
        "vision_cosine_mean": float(similar.mean()),
        "vision_cosine_worst_token": float(similar.min()),
        "logits_max_error": float(max(np.abs(o.logits - t.logits).max() for o, t in pairs)),
        "logits_standard_deviation": float(np.concatenate([t.logits for _, t in pairs]).std()),
        "first_token_equal": sum(bool(o.logits.argmax() == t.logits.argmax()) for o, t in pairs),
        "greedy_tokens": [len(theirs.tokens) for _, theirs in pairs],
        "greedy_tokens_equal": [_common(ours.tokens, theirs.tokens) for ours, theirs in pairs],
    }
    if any(seen.places for seen in (*found, *expected)):
        card["places"] = [len(theirs.places) for _, theirs in pairs]
        card["places_equal"] = [_common(ours.places, theirs.places) for ours, theirs in pairs]
    return card


def _common(a: Sequence[object], b: Sequence[object]) -> int:
    """How many tokens or places two answers begin alike with."""
    different = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(different, min(len(a), len(b)))


def _write(bundle: Bundle, card: Mapping[str, Any]) -> None:
    manifest = json.loads(bundle.file(MANIFEST).read_text("utf-8"))
    manifest["card"].setdefault("parity", {})["reference"] = card
    paths.write_atomic(bundle.file(MANIFEST), manifest_text(manifest).encode())
