"""The fused attention, held against ONNX Runtime's own: the body of its function."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from edgevlm_export import attention, linear
from onnx import TensorProto, helper

from edgevlm import device, kernels

Inputs = dict[str, np.ndarray]

fused_here = pytest.mark.skipif(
    kernels.operators() is None or "avx512_bf16" not in device.cpu_features(),
    reason="this CPU runs ONNX Runtime's own operators",
)


def model(n_heads: int, width: int, n_kv_heads: int = 0, *, exact: bool = False) -> bytes:
    """One node of an int8 graph, made from the node of the float graph; or that, if `exact`.

    Without heads of keys it is a tower's attention, else a language model's.
    """
    counts, given = {"num_heads": n_heads}, ["q", "k", "v"]
    name, domain = "MultiHeadAttention", linear.CONTRIB
    if n_kv_heads:
        counts["kv_num_heads"] = n_kv_heads
        given += ["past_keys", "past_values", "n_prefix"]
        name, domain = attention.EXACT_CAUSAL, linear.DOMAIN
    node = helper.make_node(name, given, ["y"], domain=domain, **counts)
    if not exact:
        node = attention.replaced(node)
    assert node is not None
    kv_width = (n_kv_heads or n_heads) * width
    shapes = {
        "q": (TensorProto.FLOAT, ["b", "n", n_heads * width]),
        "k": (TensorProto.FLOAT, ["b", "n", kv_width]),
        "v": (TensorProto.FLOAT, ["b", "n", kv_width]),
        "past_keys": (TensorProto.FLOAT16, ["m", kv_width]),
        "past_values": (TensorProto.FLOAT16, [kv_width, "m"]),
        "n_prefix": (TensorProto.INT64, []),
    }
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "n", n_heads * width])
    domains = [("", linear.OPSET), (linear.CONTRIB, 1), (linear.DOMAIN, 1)]
    inputs = [helper.make_tensor_value_info(name, *shapes[name]) for name in given]
    made = helper.make_model(
        helper.make_graph([node], "graph", inputs, [output]),
        ir_version=8,
        functions=[attention.function(node.op_type)] if node.domain == linear.DOMAIN else [],
        opset_imports=[helper.make_opsetid(*domain) for domain in domains],
    )
    onnx.checker.check_model(made)
    return made.SerializeToString()


def some_rows(batch: int, n: int, n_heads: int, n_kv_heads: int, width: int) -> Inputs:
    """Operands that bfloat16 holds."""
    rng = np.random.default_rng(n)
    return {
        name: bfloat16(rng.normal(size=(batch, n, heads * width)).astype(np.float32))
        for name, heads in (("q", n_heads), ("k", n_kv_heads), ("v", n_kv_heads))
    }


def split(rows: Inputs, n_past: int, n_prefix: int) -> Inputs:
    """The rows after the first `n_past`, and those as llama.cpp's cache has them."""
    return {
        **{name: part[:, n_past:] for name, part in rows.items()},
        "past_keys": rows["k"][0, :n_past].astype(np.float16),
        "past_values": np.ascontiguousarray(rows["v"][0, :n_past].T.astype(np.float16)),
        "n_prefix": np.array(n_prefix, np.int64),
    }


def run(graph: bytes, inputs: Inputs, *, fused: bool, threads: int) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if fused:
        options.register_custom_ops_library(str(kernels.operators()))
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to the 8 bits that bfloat16 keeps, to even."""
    bits = values.view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32)


def assert_near(found: np.ndarray, expected: np.ndarray, values: np.ndarray) -> None:
    """What remains are the softmax's weights and the order of sums: queries are scaled before they
    are rounded, weights are rounded to 8 bits, 2 ** -9 each."""
    assert np.abs(found - expected).max() < 4 * 2**-9 * np.abs(values).max()
    lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
    assert ((found * expected).sum(-1) / lengths).min() > 0.9999


@fused_here
@pytest.mark.parametrize(
    ("batch", "n", "n_heads", "width"),
    [(1, 1, 2, 32), (2, 6, 2, 16), (1, 65, 3, 64), (3, 100, 4, 72), (1, 70, 2, 2), (1, 97, 1, 256)],
)
def test_the_fused_attention_follows_its_function(
    batch: int, n: int, n_heads: int, width: int
) -> None:
    rows = some_rows(batch, n, n_heads, n_heads, width)
    graph = model(n_heads, width)
    expected = run(graph, rows, fused=False, threads=1)
    for threads in (1, 3):
        assert_near(run(graph, rows, fused=True, threads=threads), expected, rows["v"])


# rows in all, those before, how many at the front attend to each other
CAUSAL = [
    (1, 0, 0), (7, 0, 7), (30, 0, 1), (100, 0, 70), (140, 0, 64), (129, 0, 128),
    (2, 1, 0), (40, 33, 0), (41, 34, 34), (200, 131, 131), (100, 96, 5), (97, 1, 0), (70, 69, 69),
]  # fmt: skip


@fused_here
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "width"), [(2, 2, 16), (8, 2, 96), (3, 1, 72)])
@pytest.mark.parametrize(("n", "n_past", "n_prefix"), CAUSAL)
def test_the_fused_causal_attention_follows_its_function(
    n: int, n_past: int, n_prefix: int, n_heads: int, n_kv_heads: int, width: int
) -> None:
    inputs = split(some_rows(1, n, n_heads, n_kv_heads, width), n_past, n_prefix)
    graph = model(n_heads, width, n_kv_heads)
    expected = run(graph, inputs, fused=False, threads=1)
    values = np.concatenate([inputs["v"].ravel(), inputs["past_values"].ravel()])
    for threads in (1, 3):
        assert_near(run(graph, inputs, fused=True, threads=threads), expected, values)


@pytest.mark.parametrize(("n", "n_past", "n_prefix"), CAUSAL)
def test_a_row_sees_what_is_before_and_a_prefix_all_of_itself(
    n: int, n_past: int, n_prefix: int
) -> None:
    rows = some_rows(1, n, 6, 2, 16)
    graph = model(6, 16, 2, exact=True)
    found = run(graph, split(rows, n_past, n_prefix), fused=False, threads=1)
    heads = [torch.from_numpy(part.reshape(1, n, -1, 16)).transpose(1, 2) for part in rows.values()]
    mask = torch.ones(n, n).tril().bool()
    mask[:n_prefix, :n_prefix] = True
    expected = torch.nn.functional.scaled_dot_product_attention(
        *heads, attn_mask=mask, enable_gqa=True
    )
    expected = expected.transpose(1, 2).reshape(1, n, 96)[:, n_past:].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@fused_here
@pytest.mark.parametrize("n_prefix", [-1, 41])
def test_a_prefix_longer_than_the_rows_is_refused(n_prefix: int) -> None:
    inputs = split(some_rows(1, 40, 1, 1, 16), 3, n_prefix)
    with pytest.raises(Exception, match="sizes of past, prefix and rows disagree"):
        run(model(1, 16, 1), inputs, fused=True, threads=1)


@fused_here
def test_large_scores_do_not_overflow() -> None:
    inputs = {name: np.full((1, 40, 64), 100, np.float32) for name in "qk"}
    inputs["v"] = np.random.default_rng(0).normal(size=(1, 40, 64)).astype(np.float32)
    found = run(model(1, 64), inputs, fused=True, threads=1)
    np.testing.assert_allclose(found[0, 3], inputs["v"][0].mean(axis=0), atol=0.01)


def test_masks_are_left_to_onnx_runtime() -> None:
    masked = helper.make_node(
        "MultiHeadAttention", ["q", "k", "v", "", "mask"], ["y"],
        domain=linear.CONTRIB, num_heads=2,
    )  # fmt: skip
    scaled = helper.make_node(
        "MultiHeadAttention", ["q", "k", "v"], ["y"],
        domain=linear.CONTRIB, num_heads=2, scale=0.5,
    )  # fmt: skip
    assert attention.replaced(masked) is attention.replaced(scaled) is None
