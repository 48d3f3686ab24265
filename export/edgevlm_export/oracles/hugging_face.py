"""transformers as the oracle: its image processor, its model, its generate."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from edgevlm.bundle import Bundle

from ..reference import NAME, load
from . import STEPS, Question, Seen

__all__ = ["NAME", "answers"]


@torch.no_grad()
def answers(bundle: Bundle, checkpoint: Path, questions: Sequence[Question]) -> Iterator[Seen]:
    """What transformers makes of each question; BundleError if it has no such model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers about itself
        model, processor = load(checkpoint)
        stops = bundle.manifest["generation"]["stop_token_ids"]
        image_token_id = model.config.image_token_id
        seen_px = _whole_patches_px(bundle.manifest["image"])
        for question in questions:
            picture = Image.fromarray(question.pixels)
            raw = processor(picture, do_rescale=False, do_normalize=False, return_tensors="np")
            inputs = dict(processor(picture, return_tensors="pt"))
            features = model.get_image_features(**inputs)
            ids: list[int] = []
            for unit in question.prompt:
                ids += [unit] if isinstance(unit, int) else [image_token_id] * unit.n_tokens
            inputs["input_ids"] = torch.tensor([ids])
            logits = model(**inputs).logits[0, -1]
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            said = model.generate(
                **inputs, max_new_tokens=STEPS, do_sample=False, eos_token_id=stops, pad_token_id=0
            )[0, len(ids) :].tolist()
            values = np.asarray(raw["pixel_values"])[..., :seen_px, :seen_px]
            yield Seen(
                pixels=np.rint(values.reshape(-1, *values.shape[-3:])).astype(np.int16),
                embeddings=_flat(features).numpy(),
                logits=logits.numpy(),
                tokens=[token for token in said if token not in stops],
                places=[],
            )


def _whole_patches_px(image: Mapping[str, Any]) -> int | None:
    """What a tower looks at of a tile whose side is no multiple of its patches."""
    side: int | None = image.get("size_px", image.get("tile_px"))
    return None if side is None else side - side % int(image["patch_px"])


def _flat(features: Any) -> torch.Tensor:
    """What a model of any release returns for one picture's features, as [n_tokens, n_embd]."""
    features = getattr(features, "pooler_output", features)
    if isinstance(features, (list, tuple)):
        features = torch.cat([part.reshape(-1, part.shape[-1]) for part in features])
    return features.reshape(-1, features.shape[-1])  # type: ignore[no-any-return]
