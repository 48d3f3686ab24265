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

fused_here = pytest.mark.skipif(
    kernels.operators() is None or "avx512_bf16" not in device.cpu_features(),
    reason="this CPU runs ONNX Runtime's own operators",
)


def model(kind: str, n_heads: int, n_kv_heads: int, width: int, *, exact: bool = False) -> bytes:
    """One node of an int8 graph, made from the node of the float graph; or that, if `exact`."""
    counts = {"num_heads": n_heads}
    if kind == "causal":
        name, domain = "GroupQueryAttention", linear.CONTRIB
        given, counts["kv_num_heads"] = ["q", "k", "v", "", "", "last", "total"], n_kv_heads
    elif kind == "prefix":
        name, domain, given = attention.EXACT_PREFIX, linear.DOMAIN, ["q", "k", "v", "n_prefix"]
    else:
        name, domain, given = "MultiHeadAttention", linear.CONTRIB, ["q", "k", "v"]
    node = helper.make_node(name, given, ["y"], domain=domain, **counts)
    if not exact:
        node = attention.replaced(node)
    assert node is not None
    widths = {"q": n_heads * width, "k": n_kv_heads * width, "v": n_kv_heads * width}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "n", size])
        for name, size in widths.items()
    ]
    if kind == "causal":
        inputs.append(helper.make_tensor_value_info("last", TensorProto.INT32, ["b"]))
        inputs.append(helper.make_tensor_value_info("total", TensorProto.INT32, []))
    if kind == "prefix":
        inputs.append(helper.make_tensor_value_info("n_prefix", TensorProto.INT64, []))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "n", widths["q"]])
    domains = [("", linear.OPSET), (linear.CONTRIB, 1), (linear.DOMAIN, 1)]
    made = helper.make_model(
        helper.make_graph([node], "graph", inputs, [output]),
        ir_version=8,
        functions=[attention.function(node.op_type)] if node.domain == linear.DOMAIN else [],
        opset_imports=[helper.make_opsetid(*domain) for domain in domains],
    )
    onnx.checker.check_model(made)
    return made.SerializeToString()


def some_inputs(
    kind: str, batch: int, n: int, n_heads: int, n_kv_heads: int, width: int, n_prefix: int = 0
) -> dict[str, np.ndarray]:
    """Operands that bfloat16 holds."""
    rng = np.random.default_rng(n)
    inputs = {
        name: bfloat16(rng.normal(size=(batch, n, heads * width)).astype(np.float32))
        for name, heads in (("q", n_heads), ("k", n_kv_heads), ("v", n_kv_heads))
    }
    if kind == "causal":
        inputs |= {"last": np.full(batch, n - 1, np.int32), "total": np.array(n, np.int32)}
    if kind == "prefix":
        inputs["n_prefix"] = np.array(n_prefix, np.int64)
    return inputs


def run(graph: bytes, inputs: dict[str, np.ndarray], *, fused: bool, threads: int) -> np.ndarray:
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


PREFIXES = [(1, 0), (7, 7), (30, 1), (100, 70), (140, 64), (129, 128)]  # rows, prefix


@fused_here
@pytest.mark.parametrize(
    ("kind", "batch", "n", "n_heads", "n_kv_heads", "width", "n_prefix"),
    [
        ("all", 1, 1, 2, 2, 32, 0),
        ("all", 2, 6, 2, 2, 16, 0),
        ("all", 1, 65, 3, 3, 64, 0),
        ("all", 3, 100, 4, 4, 72, 0),
        ("all", 1, 70, 2, 2, 2, 0),
        ("all", 1, 97, 1, 1, 256, 0),
        ("causal", 1, 1, 2, 1, 32, 0),
        ("causal", 2, 6, 2, 2, 16, 0),
        ("causal", 1, 130, 8, 2, 96, 0),
        ("causal", 1, 200, 2, 1, 128, 0),
        *(("prefix", 2, n, 3, 3, 64, n_prefix) for n, n_prefix in PREFIXES),
    ],
)
def test_the_fused_attention_follows_its_function(
    kind: str, batch: int, n: int, n_heads: int, n_kv_heads: int, width: int, n_prefix: int
) -> None:
    inputs = some_inputs(kind, batch, n, n_heads, n_kv_heads, width, n_prefix)
    graph = model(kind, n_heads, n_kv_heads, width)
    expected = run(graph, inputs, fused=False, threads=1)
    for threads in (1, 3):
        found = run(graph, inputs, fused=True, threads=threads)
        # What remains are the softmax's weights and the order of sums: queries are scaled before
        # they are rounded, weights are rounded to 8 bits, 2 ** -9 each.
        scale = np.abs(inputs["v"]).max()
        assert np.abs(found - expected).max() < 4 * 2**-9 * scale
        lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
        assert ((found * expected).sum(-1) / lengths).min() > 0.9999


@pytest.mark.parametrize(("n", "n_prefix"), PREFIXES)
def test_a_prefix_sees_all_of_itself_and_what_follows_only_what_is_before(
    n: int, n_prefix: int
) -> None:
    inputs = some_inputs("prefix", 2, n, 3, 3, 16, n_prefix)
    found = run(model("prefix", 3, 3, 16, exact=True), inputs, fused=False, threads=1)
    heads = [torch.from_numpy(inputs[name].reshape(2, n, 3, 16)).transpose(1, 2) for name in "qkv"]
    mask = torch.ones(n, n).tril().bool()
    mask[:n_prefix, :n_prefix] = True
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)
    np.testing.assert_allclose(
        found, expected.transpose(1, 2).reshape(2, n, 48).numpy(), atol=1e-5, rtol=0
    )


@fused_here
@pytest.mark.parametrize("n_prefix", [-1, 41])
def test_a_prefix_longer_than_the_rows_is_refused(n_prefix: int) -> None:
    inputs = some_inputs("prefix", 1, 40, 1, 1, 16, n_prefix)
    with pytest.raises(Exception, match="the prefix is longer"):
        run(model("prefix", 1, 1, 16), inputs, fused=True, threads=1)


@fused_here
def test_large_scores_do_not_overflow() -> None:
    inputs = {name: np.full((1, 40, 64), 100, np.float32) for name in "qk"}
    inputs["v"] = np.random.default_rng(0).normal(size=(1, 40, 64)).astype(np.float32)
    graph = model("all", 1, 1, 64)
    found = run(graph, inputs, fused=True, threads=1)
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
