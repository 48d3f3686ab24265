"""A planned language model → an ONNX graph that only prefills: embeddings in, keys and values out.

It is built from the tensors of the GGUF file, under llama.cpp's names, so keys and values leave as
llama.cpp's cache keeps them (arithmetic: its src/models/{llama,phi2,phi3,qwen2}.cpp). What only
logits need is left out: the head, and of the last layer all but its keys and values. Attention,
rotation and gates are ONNX Runtime's contrib operators, which measured faster than plain ones.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from onnx import TensorProto

from edgevlm.errors import BundleError

from . import attention, precision
from .gguf import Array, Language
from .graph import Builder, Model, Progress
from .linear import CONTRIB, DOMAIN

GRAPH, WEIGHTS = "prefill.onnx", "prefill.data"
# Rows of a language model hold outliers: a scale for each quarter halves what int8 changes
# (docs/export.md).
PARTS = 4
_ARCHITECTURES = ("llama", "phi2", "phi3", "qwen2")


def write(
    language: Language,
    directory: Path,
    kind: str,
    *,
    progress: Progress | None = None,
) -> None:
    """prefill.onnx, and its weights as prefill.data; `kind` is "int8" or "fp32".

    The weights lie apart because ONNX Runtime maps them then, and because they may pass the 2 GiB
    that an ONNX file holds.

    Raises:
        BundleError: no graph can be made for this architecture.
    """
    model = graph(language, half=kind == "int8")
    if kind == "int8":
        model = precision.int8(model, parts=PARTS)
    model.save(directory / GRAPH, data=directory / WEIGHTS, progress=progress)


def graph(language: Language, *, half: bool = False, hidden: bool = False) -> Model:
    """The graph in fp32.

    Inputs: `rows`, float32 [n, n_embd]; `n_past`, int64 [], how many were read before; and of these
    for every layer N that attends `past_keys.N` and `past_values.N`, as the outputs for every layer
    N: `keys.N` [n, width], rotated, and `values.N` [width, n], in float16 where `half`, where width
    is heads of keys × head. A row attends to itself and all before it, and the first `n_prefix`
    rows of all, int64 [], to each other.
    `hidden` adds what the head would read, float32 [n, n_embd], to measure what int8 changes.
    """
    if language.arch not in _ARCHITECTURES:
        raise BundleError(
            f"no prefill graph is known for {language.arch} (known: {', '.join(_ARCHITECTURES)}): "
            "export with --prefill none"
        )
    return _Decoder(language, half).build(hidden)


class _Decoder(Builder):
    def __init__(self, language: Language, half: bool) -> None:
        super().__init__()
        config = language.config
        self._tensors = {tensor.name: tensor for tensor in language.tensors}
        self._config, self._half = config, half
        self._n_layers: int = config["num_hidden_layers"]
        self._n_heads: int = config["num_attention_heads"]
        self._n_kv_heads: int = config["num_key_value_heads"]
        self._head: int = config["head_dim"]
        self._width = self._n_kv_heads * self._head
        self._dtype = np.float16 if half else np.float32  # of keys and values
        self._interleaved = int(language.arch == "llama")
        self._front = self.constant([0], np.int64)

    def build(self, hidden: bool) -> Model:
        value = self.input("rows", np.float32, ["n", self._config["hidden_size"]])
        n_past = self.input("n_past", np.int64, [])
        self._n_prefix = self.input("n_prefix", np.int64, [])
        self._place(value, n_past)
        for layer in range(self._n_layers):
            value = self._block(layer, value, only_keys=layer + 1 == self._n_layers and not hidden)
        if hidden:
            value = self._norm("output_norm", value)
            self.result(value, "hidden", np.float32, ["n", self._config["hidden_size"]])
        return replace(self.model(), functions=(attention.function(attention.EXACT_CAUSAL),))

    def _place(self, rows: str, n_past: str) -> None:
        """The angles that llama.cpp's rope turns pairs by at the rows' positions."""
        n = self.op("Squeeze", self.op("Shape", rows, start=0, end=1))
        zero, one = (self.constant(value, np.int64) for value in (0, 1))
        numbers = self.op("Range", zero, n, one)
        self._numbers = self.op("Unsqueeze", numbers, self._front)  # [1, n]: of rows in the tables
        positions = self.op("Add", numbers, n_past)
        rope = self._config["rope"]
        n_pairs = rope["dimensions"] // 2
        frequencies = rope["rope_theta"] ** -(np.arange(n_pairs) / n_pairs)
        if rope["rope_type"] == "linear":
            frequencies /= rope["factor"]
        if (divisors := self._tensors.get("rope_freqs.weight")) is not None:
            frequencies /= divisors.load()
        column = self.op("Unsqueeze", positions, self.constant([1], np.int64))
        column = self.op("Cast", column, to=TensorProto.FLOAT)
        angles = self.op("Mul", column, self.constant(frequencies, np.float32))  # [n, n_pairs]
        self._cosines, self._sines = self.op("Cos", angles), self.op("Sin", angles)

    def _block(self, layer: int, value: str, only_keys: bool) -> str:
        name = f"blk.{layer}"
        normed = self._norm(f"{name}.attn_norm", value)
        query, key, values = self._query_key_value(name, normed)
        key = self._rotated(key, self._n_kv_heads)
        self._hand_over(layer, key, values)
        if only_keys:
            return value
        mixed = self._attention(layer, self._rotated(query, self._n_heads), key, values)
        mixed = self._linear(f"{name}.attn_output", mixed)
        if f"{name}.ffn_norm.weight" not in self._tensors:  # attention and MLP side by side
            return self.residual(self.residual(value, mixed), self._mlp(name, normed))
        value = self.residual(value, mixed)
        return self.residual(value, self._mlp(name, self._norm(f"{name}.ffn_norm", value)))

    def _norm(self, name: str, value: str) -> str:
        scale = self._stored(f"{name}.weight")
        if f"{name}.bias" in self._tensors:
            bias, eps = self._stored(f"{name}.bias"), self._config["layer_norm_eps"]
            return self.op("LayerNormalization", value, scale, bias, axis=-1, epsilon=eps)
        eps = self._config["rms_norm_eps"]
        return self.op("SimplifiedLayerNormalization", value, scale, axis=-1, epsilon=eps)

    def _query_key_value(self, name: str, value: str) -> tuple[str, str, str]:
        """[1, n, heads × head] each; a product each, since taking one's result apart costs more."""
        if f"{name}.attn_qkv.weight" in self._tensors:
            ends = np.cumsum([0, self._n_heads * self._head, self._width, self._width])
            rows = [slice(*pair) for pair in pairwise(ends.tolist())]
            parts = [self._linear(f"{name}.attn_qkv", value, part) for part in rows]
        else:
            parts = [self._linear(f"{name}.attn_{part}", value) for part in "qkv"]
        query, key, values = (self.op("Unsqueeze", part, self._front) for part in parts)
        return query, key, values

    def _rotated(self, value: str, n_heads: int) -> str:
        """Pairs are neighbours for llama, halves of the rotated part for the others."""
        return self.op(
            "RotaryEmbedding", value, self._numbers, self._cosines, self._sines,
            domain=CONTRIB, interleaved=self._interleaved,
            num_heads=n_heads, rotary_embedding_dim=self._config["rope"]["dimensions"],
        )  # fmt: skip

    def _hand_over(self, layer: int, key: str, values: str) -> None:
        """In the cache's order: keys by position, values by channel (no flash attention)."""
        keys = self.op("Squeeze", key, self._front)
        channels = self.op("Transpose", self.op("Squeeze", values, self._front), perm=[1, 0])
        for name, part, shape in (
            (f"keys.{layer}", keys, ["n", self._width]),
            (f"values.{layer}", channels, [self._width, "n"]),
        ):
            if self._half:
                part = self.op("Cast", part, to=TensorProto.FLOAT16)
            self.result(part, name, self._dtype, shape)

    def _attention(self, layer: int, query: str, key: str, values: str) -> str:
        """[1, n, heads × head] → [n, heads × head]"""
        past_keys = self.input(f"past_keys.{layer}", self._dtype, ["n_past", self._width])
        past_values = self.input(f"past_values.{layer}", self._dtype, [self._width, "n_past"])
        mixed = self.op(
            attention.EXACT_CAUSAL, query, key, values, past_keys, past_values, self._n_prefix,
            domain=DOMAIN, num_heads=self._n_heads, kv_num_heads=self._n_kv_heads,
        )  # fmt: skip
        return self.op("Squeeze", mixed, self._front)

    def _mlp(self, name: str, value: str) -> str:
        n_inner = self._tensors[f"{name}.ffn_down.weight"].shape[1]
        n_up = self._tensors[f"{name}.ffn_up.weight"].shape[0]
        if f"{name}.ffn_gate.weight" in self._tensors:
            gate, up = (self._linear(f"{name}.ffn_{part}", value) for part in ("gate", "up"))
        elif n_up == 2 * n_inner:  # phi3: both in one matrix, the gate first
            halves = slice(0, n_inner), slice(n_inner, n_up)
            gate, up = (self._linear(f"{name}.ffn_up", value, half) for half in halves)
        else:
            inner = self.activation(self._linear(f"{name}.ffn_up", value), "gelu_new")
            return self._linear(f"{name}.ffn_down", inner)
        gated = self.op("Mul", self.activation(gate, "silu"), up)
        return self._linear(f"{name}.ffn_down", gated)

    def _linear(self, name: str, value: str, part: slice | None = None) -> str:
        """A product with the matrix of that name, or with a part of its rows."""
        tensor, bias = self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.bias")
        rows = part or slice(0, tensor.shape[0])

        def transposed() -> Array:
            return np.asarray(tensor.load()[rows].T)

        def of_part() -> Array:
            assert bias is not None
            return bias.load()[rows]

        if part is not None:
            name = f"{name}.{part.start}"
        shape = (tensor.shape[1], rows.stop - rows.start)
        return self.linear(value, name, shape, transposed, None if bias is None else of_part)

    def _stored(self, name: str) -> str:
        tensor = self._tensors[name]
        return self.weight(name, tensor.shape, tensor.load)
