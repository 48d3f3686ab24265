"""Writes edgevlm/data/probe.gguf: the tiny quantized model that shows whether llama.cpp runs.

    python -m edgevlm_export.probe edgevlm/data/probe.gguf

One layer whose matrices are quantized in several formats, 256 wide so that llama.cpp's repacked
kernels take them. The weights are random with a fixed seed: the same bytes every time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants

_WIDTH, _HEADS, _VOCABULARY = 256, 4, 64
_MATRICES = {  # formats that PyPI's gguf can quantize to
    "attn_q": "Q4_0",
    "attn_k": "Q8_0",
    "attn_v": "Q4_1",
    "attn_output": "Q4_0",
    "ffn_gate": "Q4_0",
    "ffn_up": "Q8_0",
    "ffn_down": "Q4_1",
}


def write(path: Path) -> None:
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_head_count(_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(_VOCABULARY)

    def add(name: str, rows: int, kind: str) -> None:
        values = rng.normal(0, _WIDTH**-0.5, (rows, _WIDTH)).astype(np.float32)
        dtype = GGMLQuantizationType[kind]
        writer.add_tensor(name, quants.quantize(values, dtype), raw_dtype=dtype)

    ones = np.ones(_WIDTH, np.float32)
    add("token_embd.weight", _VOCABULARY, "Q8_0")
    add("output.weight", _VOCABULARY, "Q8_0")
    writer.add_tensor("output_norm.weight", ones)
    for name, kind in _MATRICES.items():
        add(f"blk.0.{name}.weight", _WIDTH, kind)
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
