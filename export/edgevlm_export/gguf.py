"""A planned language model → one GGUF file with its vocabulary, at f32 or f16.

Keys are what llama.cpp reads (src/llama-arch.cpp). Tensors stream through memory one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter, LlamaFileType, RopeScalingType

from edgevlm.errors import BundleError

from .vocabulary import Vocabulary

Array: TypeAlias = npt.NDArray[np.float32]

Progress: TypeAlias = Callable[[int, int], None]  # tensors read, tensors in all

DTYPES = ("f16", "f32")
# llama.cpp attaches tokenizer quirks to some names (a name with "phi3" demands four tokens), and
# the checkpoint's name is in bundle.json anyway.
_NAME = "edgevlm language model"
_F16_MAX = 65504.0


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file, by llama.cpp's name; `load` computes it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Array]
    source: str = ""  # the checkpoint's tensor that it is made from alone, in whole rows
    rows: Callable[[Array], Array] | None = None  # what brings these rows into llama.cpp's order


@dataclass(frozen=True)
class Language:
    """A language model ready to be written."""

    arch: str
    config: dict[str, Any]  # what decoder.complete gave
    vocabulary: Vocabulary
    eos_id: int
    tensors: tuple[Tensor, ...]

    @property
    def n_embd(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def n_ctx(self) -> int:
        return int(self.config["max_position_embeddings"])

    def save(self, path: Path, dtype: str) -> None:
        """Matrices in `dtype`, vectors in f32. BundleError when a value does not fit f16."""
        writer = GGUFWriter(path, self.arch)
        self._keys(writer, dtype)
        self.vocabulary.write(writer, self.eos_id)
        kinds = [_storage(tensor, dtype) for tensor in self.tensors]
        for tensor, kind in zip(self.tensors, kinds, strict=True):
            n_bytes = math.prod(tensor.shape) * kind.itemsize
            writer.add_tensor_info(tensor.name, tensor.shape, kind, n_bytes)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor, kind in zip(self.tensors, kinds, strict=True):
                values = tensor.load()
                assert values.shape == tensor.shape, (tensor.name, values.shape)
                if kind == np.float16 and max(values.max(), -values.min()) > _F16_MAX:
                    raise BundleError(f"{tensor.name} does not fit f16: export with language='f32'")
                writer.write_tensor_data(np.ascontiguousarray(values, dtype=kind))
        finally:
            writer.close()

    def _keys(self, writer: GGUFWriter, dtype: str) -> None:
        config = self.config
        writer.add_name(_NAME)
        writer.add_file_type(LlamaFileType.MOSTLY_F16 if dtype == "f16" else LlamaFileType.ALL_F32)
        writer.add_vocab_size(len(self.vocabulary.texts))
        writer.add_context_length(self.n_ctx)
        writer.add_embedding_length(self.n_embd)
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        if self.arch == "phi2":
            writer.add_layer_norm_eps(config["layer_norm_eps"])
        else:
            writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope"]["rope_theta"])
        writer.add_rope_dimension_count(config["rope"]["dimensions"])
        if self.arch == "llama":
            writer.add_key_length(config["head_dim"])
            writer.add_value_length(config["head_dim"])
        elif self.arch == "phi3":
            writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
            writer.add_sliding_window(0)  # llama.cpp attends to everything for phi3
        if config["rope"]["rope_type"] == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(config["rope"]["factor"])


def counted(language: Language, progress: Progress) -> Language:
    """The same model, which tells `progress` of each tensor that is read."""
    total = len(language.tensors)

    def load(tensor: Tensor, count: int) -> Array:
        values = tensor.load()
        progress(count, total)
        return values

    return replace(
        language,
        tensors=tuple(
            replace(tensor, load=partial(load, tensor, count))
            for count, tensor in enumerate(language.tensors, 1)
        ),
    )


def _storage(tensor: Tensor, dtype: str) -> np.dtype[Any]:
    return np.dtype(np.float16 if dtype == "f16" and len(tensor.shape) > 1 else np.float32)
