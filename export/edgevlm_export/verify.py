"""A bundle and the checkpoint it came from → how far apart they are, number by number.

The reference is transformers with torch in float32: its image processor, its tower, its logits
and its greedy tokens, on the same pictures and the same prompt. Needs the extra `verify`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from PIL import Image

from edgevlm import families, paths, preprocess, vision
from edgevlm.answer import EncodedImage
from edgevlm.bundle import MANIFEST, Bundle, open_bundle
from edgevlm.cancel import Cancel
from edgevlm.errors import BundleError
from edgevlm.language import Language
from edgevlm.layout import Layout
from edgevlm.options import Options
from edgevlm.prompt import ImageSlot, Message
from edgevlm.sessions import Session

from . import photos
from .checkpoint import Checkpoint
from .families import Options as FamilyOptions
from .families import find
from .gate import cosines

Floats = npt.NDArray[np.float32]

STEPS = 64
_auto: Any = transformers  # half of it is typed
_QUESTION = "What is in the picture?"


@dataclass(frozen=True)
class Seen:
    """What one side makes of one picture."""

    pixels: npt.NDArray[np.int16]  # [tiles, 3, S, S], before rescale and normalisation
    embeddings: Floats  # [n_tokens, n_embd]
    logits: Floats  # [n_vocab], after picture and question
    tokens: list[int]  # greedy, without the end token


def verify(
    bundle: Path, reference: Path, *, pictures: Sequence[Path] = (), threads: int = 1
) -> dict[str, Any]:
    """Compare, write the numbers into the bundle's card, and return them.

    Raises:
        BundleError: either side cannot be opened, or transformers has no such model.
    """
    opened = open_bundle(bundle)
    seen = list(photos.read(pictures))
    with closing(_Ours(opened, threads)) as ours:  # its memory is free before torch takes some
        prompts, found = zip(*map(ours.look, seen), strict=True)
    exact = _exact_embeddings(opened, reference, seen, threads)
    expected = list(_reference(opened, reference, seen, prompts))
    card = _card(found, exact, expected)
    _write(opened, card)
    return card


class _Ours:
    """The bundle, through the runtime's own stages; keys and values in float32."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._threads, self._cancel = threads, Cancel()
        self._family = families.find(bundle)
        self._session = Session(bundle.file("vision.onnx"), threads)
        self._language = Language(bundle, threads=threads, cancel=self._cancel, precise=True)

    def look(self, pixels: photos.Pixels) -> tuple[tuple[int | ImageSlot, ...], Seen]:
        layout = self._family.layout(*pixels.shape[:2])
        patches = preprocess.patches(pixels, layout, self._threads)
        embeddings = vision.encode(self._session, patches, layout, self._family, self._cancel)
        encoded = EncodedImage(embeddings, layout, pixels.shape[:2], str(id(pixels)), "")
        segments = self._family.prompt([Message("user", _QUESTION, (0,))], [layout])
        prompt = self._language.tokenize(segments)
        self._language.feed(prompt, [encoded])
        logits = self._language.logits()
        with self._language.sampler(Options(repeat_penalty=1.0)) as sampler:
            tokens = [token for token, _ in self._language.tokens(sampler, STEPS)]
        units = tuple(unit for unit in prompt.units if isinstance(unit, (int, ImageSlot)))
        return units, Seen(_tiles(patches, layout), embeddings, logits, tokens)

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


def _exact_embeddings(
    bundle: Bundle, reference: Path, seen: Sequence[photos.Pixels], threads: int
) -> list[Floats]:
    """What the graph gives in fp32, whatever format the bundle keeps it in."""
    checkpoint = Checkpoint(reference, bundle.file("tokenizer.json"))
    _, module = find(checkpoint, bundle.manifest["family"])
    model = module.parts(checkpoint, _as_exported(bundle)).vision.model()
    family = families.find(bundle)
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "vision.onnx"
        model.save(path, data=path.with_suffix(".data"))
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


@torch.no_grad()
def _reference(
    bundle: Bundle,
    reference: Path,
    seen: Sequence[photos.Pixels],
    prompts: Sequence[tuple[int | ImageSlot, ...]],
) -> Iterator[Seen]:
    _auto.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers about itself
        try:
            model = _auto.AutoModelForImageTextToText.from_pretrained(
                reference, dtype=torch.float32
            ).eval()
            processor = _auto.AutoImageProcessor.from_pretrained(reference, backend="pil")
        except (OSError, ValueError, KeyError) as error:
            first_line = str(error).splitlines()[0]
            raise BundleError(f"transformers cannot open {reference}: {first_line}") from error
        stops = bundle.manifest["generation"]["stop_token_ids"]
        image_token_id = model.config.image_token_id
        for pixels, prompt in zip(seen, prompts, strict=True):
            picture = Image.fromarray(pixels)
            raw = processor(picture, do_rescale=False, do_normalize=False, return_tensors="np")
            inputs = dict(processor(picture, return_tensors="pt"))
            features = model.get_image_features(**inputs)
            ids: list[int] = []
            for unit in prompt:
                ids += [unit] if isinstance(unit, int) else [image_token_id] * unit.n_tokens
            inputs["input_ids"] = torch.tensor([ids])
            logits = model(**inputs).logits[0, -1]
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            said = model.generate(
                **inputs, max_new_tokens=STEPS, do_sample=False, eos_token_id=stops, pad_token_id=0
            )[0, len(ids) :].tolist()
            values = np.asarray(raw["pixel_values"])
            yield Seen(
                pixels=np.rint(values.reshape(-1, *values.shape[-3:])).astype(np.int16),
                embeddings=_flat(features).numpy(),
                logits=logits.numpy(),
                tokens=[token for token in said if token not in stops],
            )


def _flat(features: Any) -> torch.Tensor:
    """What a model of any release returns for one picture's features, as [n_tokens, n_embd]."""
    features = getattr(features, "pooler_output", features)
    if isinstance(features, (list, tuple)):
        features = torch.cat([part.reshape(-1, part.shape[-1]) for part in features])
    return features.reshape(-1, features.shape[-1])  # type: ignore[no-any-return]


def _card(
    found: Sequence[Seen], exact: Sequence[Floats], expected: Sequence[Seen]
) -> dict[str, Any]:
    pairs = list(zip(found, expected, strict=True))
    same_tiles = all(ours.pixels.shape == theirs.pixels.shape for ours, theirs in pairs)
    errors = [np.abs(e - t.embeddings).max() for e, t in zip(exact, expected, strict=True)]
    similar = np.concatenate([cosines(o.embeddings, t.embeddings) for o, t in pairs])
    spread = np.concatenate([t.embeddings for t in expected]).std()
    return {
        "reference": f"transformers {transformers.__version__}, float32",
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


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two answers begin alike."""
    different = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(different, min(len(a), len(b)))


def _write(bundle: Bundle, card: Mapping[str, Any]) -> None:
    manifest = json.loads(bundle.file(MANIFEST).read_text("utf-8"))
    manifest["card"].setdefault("parity", {})["reference"] = card
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    paths.write_atomic(bundle.file(MANIFEST), text.encode())
