"""The fused attention, held against ONNX Runtime's own: the body of its function."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from edgevlm_export import attention, linear
from onnx import TensorProto, helper

from edgevlm import device, kernels

fused_here = pytest.mark.skipif(
    kernels.operators() is None or "avx512_bf16" not in device.cpu_features(),
    reason="this CPU runs ONNX Runtime's own operators",
)


def model(n_heads: int, n_kv_heads: int, width: int, *, causal: bool) -> bytes:
    """One node of an int8 graph, made from the node of the float graph."""
    if causal:
        theirs = helper.make_node(
            "GroupQueryAttention", ["q", "k", "v", "", "", "last", "total"], ["y"],
            domain=linear.CONTRIB, num_heads=n_heads, kv_num_heads=n_kv_heads,
        )  # fmt: skip
    else:
        theirs = helper.make_node(
            "MultiHeadAttention", ["q", "k", "v"], ["y"], domain=linear.CONTRIB, num_heads=n_heads
        )
    node = attention.replaced(theirs)
    assert node is not None
    widths = {"q": n_heads * width, "k": n_kv_heads * width, "v": n_kv_heads * width}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "n", size])
        for name, size in widths.items()
    ]
    if causal:
        inputs.append(helper.make_tensor_value_info("last", TensorProto.INT32, ["b"]))
        inputs.append(helper.make_tensor_value_info("total", TensorProto.INT32, []))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "n", widths["q"]])
    domains = [("", linear.OPSET), (linear.CONTRIB, 1), (linear.DOMAIN, 1)]
    made = helper.make_model(
        helper.make_graph([node], "graph", inputs, [output]),
        ir_version=8,
        functions=[attention.function(node.op_type)],
        opset_imports=[helper.make_opsetid(*domain) for domain in domains],
    )
    onnx.checker.check_model(made)
    return made.SerializeToString()


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


@fused_here
@pytest.mark.parametrize(
    ("batch", "n", "n_heads", "n_kv_heads", "width", "causal"),
    [
        (1, 1, 2, 2, 32, False),
        (2, 6, 2, 2, 16, False),
        (1, 65, 3, 3, 64, False),
        (3, 100, 4, 4, 72, False),
        (1, 70, 2, 2, 2, False),
        (1, 97, 1, 1, 256, False),
        (1, 1, 2, 1, 32, True),
        (2, 6, 2, 2, 16, True),
        (1, 130, 8, 2, 96, True),
        (1, 200, 2, 1, 128, True),
    ],
)
def test_the_fused_attention_follows_its_function(
    batch: int, n: int, n_heads: int, n_kv_heads: int, width: int, causal: bool
) -> None:
    rng = np.random.default_rng(n)
    # Operands that bfloat16 holds: what remains are the softmax's weights and the order of sums.
    inputs = {
        name: bfloat16(rng.normal(size=(batch, n, heads * width)).astype(np.float32))
        for name, heads in (("q", n_heads), ("k", n_kv_heads), ("v", n_kv_heads))
    }
    if causal:
        inputs |= {"last": np.full(batch, n - 1, np.int32), "total": np.array(n, np.int32)}
    graph = model(n_heads, n_kv_heads, width, causal=causal)
    expected = run(graph, inputs, fused=False, threads=1)
    for threads in (1, 3):
        found = run(graph, inputs, fused=True, threads=threads)
        # Queries are scaled before they are rounded, weights are rounded to 8 bits: 2 ** -9 each.
        scale = np.abs(inputs["v"]).max()
        assert np.abs(found - expected).max() < 4 * 2**-9 * scale
        lengths = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
        assert ((found * expected).sum(-1) / lengths).min() > 0.9999


@fused_here
def test_large_scores_do_not_overflow() -> None:
    inputs = {name: np.full((1, 40, 64), 100, np.float32) for name in "qk"}
    inputs["v"] = np.random.default_rng(0).normal(size=(1, 40, 64)).astype(np.float32)
    graph = model(1, 1, 64, causal=False)
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
