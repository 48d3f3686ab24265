"""How far each stage is from what the machine could do at best: a roofline (Williams 2009).

Reading stages are held against memory bandwidth, multiplying ones against numpy's float32 product.
int8 kernels may pass the latter: it is a yardstick that every machine has, not a wall.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgevlm.answer import Answer
from edgevlm.engine import VLM

_BYTES_A_WEIGHT = {"int8": 1, "fp16": 2, "fp32": 4}
BYTES, FLOPS = "read_gb_s", "gemm_gflop_s"


def work(vlm: VLM, answer: Answer) -> dict[str, dict[str, float]]:
    """What each stage has to read or to multiply at least; estimates, attention left out.

    Every weight of the tower meets every patch, and every one of the language model every token
    of the prompt; a token of the answer reads the whole language file. A convolutional tower, one
    patch a tile, is left out: its weights meet every pixel of some layer.
    """
    manifest = vlm.bundle.manifest
    files = {name: float(entry["bytes"]) for name, entry in manifest["files"].items()}
    layout = vlm.layout(*answer.input_px[0])
    n_patches = layout.n_tiles * (layout.tile_px // layout.patch_px) ** 2
    patch_bytes = 3.0 * layout.n_tiles * layout.tile_px**2
    decoded_bytes = 3.0 * math.prod(map(min, answer.input_px[0], layout.at_least_px))
    vision_bytes = sum(files[name] for name in vlm.bundle.vision_files)
    n_weights = vision_bytes / _BYTES_A_WEIGHT.get(manifest["quantization"]["vision"], 4)
    by_patches = layout.patch_px < layout.tile_px
    return {
        "load": {BYTES: sum(files.values())},
        "preprocess": {BYTES: decoded_bytes + patch_bytes},
        **({"encode": {FLOPS: 2 * n_weights * n_patches}} if by_patches else {}),
        "prefill": {FLOPS: 2.0 * vlm.language_parameters * answer.prompt_tokens},
        "decode": {BYTES: files["language.gguf"]},
    }


def shares(
    stages: Mapping[str, float],
    work: Mapping[str, Mapping[str, float]],
    rates: Mapping[str, float],
) -> dict[str, dict[str, Any]]:
    """Stage → the rate that limits it, the least milliseconds at that rate, and the percentage."""
    found: dict[str, dict[str, Any]] = {}
    for stage, needs in work.items():
        for rate, amount in needs.items():
            least_ms = amount / (rates[rate] * 1e6)  # 1e9 a second
            percent = 100 * least_ms / stages[stage] if stages[stage] else 0.0
            found[stage] = {
                "by": rate,
                "amount": amount,
                "least_ms": round(least_ms, 3),
                "percent": round(percent, 1),
            }
    parts = ("preprocess", "encode", "prefill", "decode")
    if all(part in found for part in parts):
        least_ms = sum(found[part]["least_ms"] for part in parts)
        percent = 100 * least_ms / stages["first_token"]
        found["first_token"] = {
            "by": "its stages",
            "least_ms": round(least_ms, 3),
            "percent": round(percent, 1),
        }
    return found
