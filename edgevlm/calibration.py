"""What each stage of a model takes on this machine: measured once, kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgevlm import device, paths
from edgevlm.budget import Costs
from edgevlm.bundle import Bundle

if TYPE_CHECKING:
    from edgevlm.engine import VLM

_ROUNDS = 4  # of which the first only warms up
_ENOUGH_S = 45.0  # no round begins later
_ANSWER_TOKENS = 32
_SIZE_PX = (480, 640)
_LIBRARIES = ("onnxruntime", "llama-cpp-python")


def known(bundle: Bundle, threads: int) -> Costs | None:
    """What `measure` kept for this model, machine and libraries; None if it did not run."""
    text = paths.read_cache(_path(bundle, threads))
    try:
        return Costs(**json.loads(text)) if text is not None else None
    except (ValueError, TypeError):  # another version's, or damaged
        return None


def measure(vlm: VLM, progress: Callable[[str, int, int], None] | None = None) -> Costs:
    """Run the model on drawn pictures for up to a minute, through the path of every photo.

    Raises as `VLM.describe` does.
    """
    started = perf_counter()
    tile_ms, prefill_ms, token_ms = [], [], []
    for count in range(_ROUNDS):
        if count > 1 and perf_counter() - started > _ENOUGH_S:
            break
        if progress is not None:
            progress("calibrating", count, _ROUNDS)
        encode_started = perf_counter()
        encoded = vlm.encode(_picture(count))
        encode_ms = 1000 * (perf_counter() - encode_started)
        answer = vlm.describe(encoded, max_tokens=_ANSWER_TOKENS, repetition_stop=False)
        if count == 0:
            continue
        tile_ms.append(encode_ms / encoded.layout.n_tiles)
        prefill_ms.append(answer.timings.prefill_ms / answer.prompt_tokens)
        steps = answer.generated_tokens - (answer.finish_reason != "stop")
        token_ms.append(answer.timings.generate_ms / max(1, steps))
    costs = Costs(median(tile_ms), median(prefill_ms), median(token_ms))
    paths.write_cache(_path(vlm.bundle, vlm.threads), json.dumps(asdict(costs)))
    return costs


def _path(bundle: Bundle, threads: int) -> Path:
    parts = [
        device.cpu_name(),
        str(threads),
        *(metadata.version(library) for library in _LIBRARIES),
        *(entry["sha256"] for entry in bundle.manifest["files"].values()),
    ]
    return paths.cache("calibration", hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32])


def _picture(seed: int) -> NDArray[np.uint8]:
    """Coarse coloured noise, uint8 [H, W, 3]; another one for every seed, so nothing is cached."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return coarse.repeat(_SIZE_PX[0] // 6, axis=0).repeat(_SIZE_PX[1] // 8, axis=1)
