"""transformers as the oracle: its image processor, its model, its generate."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from edgevlm.bundle import Bundle
from edgevlm.errors import BundleError

from . import STEPS, Question, Seen

_auto: Any = transformers  # half of it is typed
NAME = f"transformers {transformers.__version__}, float32"


@torch.no_grad()
def answers(bundle: Bundle, checkpoint: Path, questions: Sequence[Question]) -> Iterator[Seen]:
    """What transformers makes of each question; BundleError if it has no such model."""
    _auto.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers about itself
        try:
            model = _auto.AutoModelForImageTextToText.from_pretrained(
                checkpoint, dtype=torch.float32
            ).eval()
            processor = _auto.AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
        except (OSError, ValueError, KeyError) as error:
            first_line = str(error).splitlines()[0]
            raise BundleError(f"transformers cannot open {checkpoint}: {first_line}") from error
        stops = bundle.manifest["generation"]["stop_token_ids"]
        image_token_id = model.config.image_token_id
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
            values = np.asarray(raw["pixel_values"])
            yield Seen(
                pixels=np.rint(values.reshape(-1, *values.shape[-3:])).astype(np.int16),
                embeddings=_flat(features).numpy(),
                logits=logits.numpy(),
                tokens=[token for token in said if token not in stops],
                places=[],
            )


def _flat(features: Any) -> torch.Tensor:
    """What a model of any release returns for one picture's features, as [n_tokens, n_embd]."""
    features = getattr(features, "pooler_output", features)
    if isinstance(features, (list, tuple)):
        features = torch.cat([part.reshape(-1, part.shape[-1]) for part in features])
    return features.reshape(-1, features.shape[-1])  # type: ignore[no-any-return]
