"""A checkpoint → transformers' own model and image processor, in float32, whole or not at all.

Releases 4 and 5 name the tensors of a tower differently, and fill what they do not find with
random numbers and a warning; a reference like that would be worse than none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from edgevlm.errors import BundleError

_auto: Any = transformers  # half of it is typed
NAME = f"transformers {transformers.__version__}, float32"
_IS_4 = transformers.__version__.startswith("4.")
# The processors that resize with Pillow.
_PILLOW: dict[str, Any] = {"use_fast": False} if _IS_4 else {"backend": "pil"}
# What 5 saves, under the names of 4, which has one more level in CLIP and SigLIP.
_LEVEL = {r"^(model\.)?vision_tower\.(?!vision_model\.)": "model.vision_tower.vision_model."}


def load(directory: Path) -> tuple[Any, Any]:
    """The model and its image processor.

    Raises:
        BundleError: transformers has no such model, or does not find all its weights.
    """
    _auto.utils.logging.disable_progress_bar()
    _auto.utils.logging.set_verbosity_error()  # what it does not find is said below
    try:
        model, missing = _model(directory)
        if missing and _IS_4:
            known: dict[str, str] = type(model)._checkpoint_conversion_mapping
            model, missing = _model(directory, key_mapping={**_LEVEL, **known})
        processor = _auto.AutoImageProcessor.from_pretrained(directory, **_PILLOW)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).splitlines()[0]
        raise BundleError(f"transformers cannot open {directory}: {first_line}") from error
    if missing:
        raise BundleError(
            f"transformers {transformers.__version__} does not find {missing[0]} and "
            f"{len(missing) - 1} others in {directory}: try the release that saved it"
        )
    return model, processor


def _model(directory: Path, **more: Any) -> tuple[Any, list[str]]:
    """The model, and the names of weights that were not in the checkpoint."""
    model, info = _auto.AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **more
    )
    tied = set(model._tied_weights_keys or ())
    return model.eval(), sorted(set(info["missing_keys"]) - tied)
