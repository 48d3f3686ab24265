"""The language model's GGUF in, the same weights as a frozen torch model and its tokenizer out.

Training sees the dequantized Q4_1 weights that llama.cpp will run, not the original checkpoint.
"""

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

Weights = npt.NDArray[np.float32]
_CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def load(path: Path) -> tuple[LlamaForCausalLM, Tokenizer]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        max_position_embeddings=fields["llama.context_length"],
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    weights = dict(_weight(tensor, config) for tensor in reader.tensors)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{path.name}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, _tokenizer(fields)


def embedding_table(model: LlamaForCausalLM) -> torch.Tensor:
    """float32 [vocabulary, width]"""
    weight: torch.Tensor = model.model.embed_tokens.weight
    return weight.float().clone()


def _weight(tensor: gguf.ReaderTensor, config: LlamaConfig) -> tuple[str, torch.Tensor]:
    value = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    if tensor.name == "token_embd.weight":
        return "model.embed_tokens.weight", torch.from_numpy(value)
    if tensor.name == "output_norm.weight":
        return "model.norm.weight", torch.from_numpy(value)
    _, layer, part, _ = tensor.name.split(".")
    if part == "attn_q":
        value = _unpermute(value, int(config.num_attention_heads))
    if part == "attn_k":
        value = _unpermute(value, int(config.num_key_value_heads or 0))
    name = f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
    return name, torch.from_numpy(value)


def _unpermute(weight: Weights, heads: int) -> Weights:
    """Undo llama.cpp's interleaved rotary order (conversion/llama.py, `permute`)."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def _tokenizer(fields: dict[str, list[str] | list[int]]) -> Tokenizer:
    pieces, merges, types = (
        fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges", "token_type")
    )
    pairs = [(left, right) for left, right in (str(merge).split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE({str(p): i for i, p in enumerate(pieces)}, pairs))
    digits = pre_tokenizers.Digits(individual_digits=True)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, split])
    tokenizer.decoder = decoders.ByteLevel()
    control = [p for p, kind in zip(pieces, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(str(p), special=True) for p in control])
    return tokenizer
