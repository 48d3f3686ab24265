"""A PEFT LoRA adapter → a checkpoint's tensors with it merged in, or llama.cpp's adapter file.

W + s · B A (arXiv 2106.09685), s = alpha / r, or alpha / √r where rank-stabilised. Modules that
were trained whole take the place of the checkpoint's. Other kinds of adapter are refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFType, GGUFWriter

from edgevlm.errors import BundleError

from .checkpoint import Checkpoint, Entry, header, read
from .gguf import Array, Language

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings under which W + s · B A is not what the adapter computes (peft LoraConfig).
_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
)


@dataclass(frozen=True)
class _Pair:
    low: Entry  # A, [r, in]
    high: Entry  # B, [out, r]
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.high.shape[0], self.low.shape[1]

    def factors(self, name: str) -> tuple[Array, Array]:
        """A and s · B."""
        low = read(f"{name} (lora_A)", self.low)
        return low, np.asarray(self.scale * read(f"{name} (lora_B)", self.high), np.float32)

    def delta(self, name: str) -> Array:
        low, high = self.factors(name)
        return high @ low


class Lora:
    """An adapter directory; `rename` follows the checkpoint's renaming."""

    def __init__(self, directory: Path) -> None:
        """BundleError when it is no LoRA adapter that can be merged."""
        self._directory = directory
        config = _config(directory)
        self._transposed = bool(config.get("fan_in_fan_out"))  # Conv1D keeps [in, out]
        entries = header(directory / _WEIGHTS)
        self._pairs: dict[str, _Pair] = {}
        self._whole: dict[str, Entry] = {}
        for stored, entry in entries.items():
            name = stored.removeprefix(_PREFIX)
            if name.endswith(".lora_A.weight"):
                module = name.removesuffix(".lora_A.weight")
                other = entries.get(stored.replace(".lora_A.", ".lora_B."))
                self._pairs[f"{module}.weight"] = _pair(directory, config, module, entry, other)
            elif name.endswith(".base_layer.weight"):
                continue  # the frozen layer's own, which peft saves with adapters on the vocabulary
            elif ".lora_" in name:
                if not name.endswith(".lora_B.weight"):
                    raise BundleError(f"{stored} in {directory} is not part of a linear layer")
            else:
                self._whole[name] = entry

    def rename(self, rule: Callable[[str], str]) -> None:
        self._pairs = {rule(name): pair for name, pair in self._pairs.items()}
        self._whole = {rule(name): entry for name, entry in self._whole.items()}

    def check(self, checkpoint: Checkpoint) -> None:
        """BundleError when a tensor of the adapter has no place in the checkpoint."""
        shapes = {name: pair.shape for name, pair in self._pairs.items()}
        if self._transposed:
            shapes = {name: (n_in, n_out) for name, (n_out, n_in) in shapes.items()}
        shapes_whole = {name: entry.shape for name, entry in self._whole.items()}
        for name, shape in {**shapes, **shapes_whole}.items():
            if name not in checkpoint or checkpoint.shape(name) != shape:
                found = list(checkpoint.shape(name)) if name in checkpoint else "not there"
                raise BundleError(
                    f"{self._directory} changes {name} {list(shape)}, which is {found} in "
                    f"{checkpoint.directory}: it was trained on another model"
                )

    def write(self, path: Path, language: Language) -> None:
        """Write llama.cpp's adapter for a language model (format: its convert_lora_to_gguf.py).

        Raises:
            BundleError: the adapter changes more than linear layers of the language model.
        """
        targets = {tensor.source: tensor for tensor in language.tensors if tensor.source}
        other = next((name for name in (*self._pairs, *self._whole) if name not in targets), None)
        trained = next(iter(self._whole), other)
        if trained is not None or self._transposed:
            raise BundleError(
                f"{self._directory} changes {trained or 'layers that lie transposed'}: only linear "
                "layers of the language model can be switched at run time; merge it (--lora DIR)"
            )
        writer = GGUFWriter(path, language.arch)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 0.0)  # no further scale: each B has its own
        for name, pair in self._pairs.items():
            tensor = targets[name]
            low, high = pair.factors(name)
            high = tensor.rows(high) if tensor.rows else high
            writer.add_tensor(f"{tensor.name}.lora_a", low)
            writer.add_tensor(f"{tensor.name}.lora_b", np.ascontiguousarray(high))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def merged(self, name: str, values: Array) -> Array:
        if name in self._whole:
            values = read(name, self._whole[name])
        if name in self._pairs:
            delta = self._pairs[name].delta(name)
            values = values + (delta.T if self._transposed else delta)
        return values


def _config(directory: Path) -> Mapping[str, Any]:
    for name in (_CONFIG, _WEIGHTS):
        if not (directory / name).is_file():
            raise BundleError(f"{directory} has no {name}: it is not a PEFT adapter")
    try:
        config = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{directory / _CONFIG} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise BundleError(f"{directory} is a {kind} adapter; only LORA can be merged")
    for setting in _UNSUPPORTED:
        if config.get(setting):
            raise BundleError(f"{directory} uses {setting}, which cannot be merged here")
    return config


def _pair(
    directory: Path, config: Mapping[str, Any], module: str, low: Entry, high: Entry | None
) -> _Pair:
    if high is None or len(low.shape) != 2 or high.shape[1:] != low.shape[:1]:
        raise BundleError(f"{module} in {directory} has no lora_A and lora_B of one rank")
    rank = low.shape[0]
    alpha = config.get("lora_alpha", 8)  # LoraConfig's default
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # as peft's get_pattern_key
            alpha = value
            break
    if not isinstance(alpha, (int, float)):
        raise BundleError(f"{directory / _CONFIG} says lora_alpha = {alpha!r:.60}")
    return _Pair(low, high, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
