"""The fused int8 layer, held against ONNX Runtime's own operators: the body of its function."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from edgevlm_export import linear
from onnx import TensorProto, helper, numpy_helper

from edgevlm import kernels

KINDS = [
    linear.Kind(bias=bias, activation=activation, residual=residual)
    for bias in (False, True)
    for activation in ("", *linear.ACTIVATIONS)
    for residual in (False, True)
]
EPSILON = 1e-5
SIZES = [(1, 4, 64), (5, 33, 100), (6, 64, 16), (7, 1, 1), (100, 130, 257), (800, 48, 65)]
fused_here = pytest.mark.skipif(
    kernels.operators() is None, reason="this CPU runs ONNX Runtime's own operators"
)


def layer(kind: linear.Kind, n_in: int, n_out: int) -> bytes:
    """A model of one node; its weights reach the limits of int8."""
    rng = np.random.default_rng(0)
    tensors = {
        "w": rng.integers(-127, 128, (n_in, n_out)).astype(np.int8),
        "scales": rng.uniform(1e-4, 1e-3, n_out).astype(np.float32),
    }
    for name, size in (("bias", n_out), ("norm_scales", n_in), ("norm_bias", n_in)):
        if name in kind.inputs:
            tensors[name] = rng.normal(size=size).astype(np.float32)
    names = {"rows": "x", "weights": "w", "residual": "r", **{name: name for name in tensors}}
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", "b", n_in])]
    if kind.residual:
        inputs.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, ["a", "b", n_out]))
    graph = helper.make_graph(
        [kind.node(names, "y", {"alpha": 1.702, "epsilon": EPSILON})],
        "graph",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b", n_out])],
        [numpy_helper.from_array(values, name) for name, values in tensors.items()],
    )
    domains = [("", linear.OPSET), (linear.CONTRIB, 1), (linear.DOMAIN, 1)]
    model = helper.make_model(
        graph,
        ir_version=8,
        functions=[kind.function()],
        opset_imports=[helper.make_opsetid(*domain) for domain in domains],
    )
    onnx.checker.check_model(model)
    return model.SerializeToString()


def run(model: bytes, rows: np.ndarray, *, fused: bool, threads: int = 2) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if fused:
        options.register_custom_ops_library(str(kernels.operators()))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = {"x": rows}
    for value in session.get_inputs()[1:]:
        shape = (*rows.shape[:-1], value.shape[-1])
        feeds[value.name] = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    return session.run(None, feeds)[0]


def some_rows(n_rows: int, n_in: int) -> np.ndarray:
    rows = np.random.default_rng(1).normal(size=(1, n_rows, n_in)).astype(np.float32)
    rows[0, 0, 0] = 300  # an outlier
    rows[0, -1] = 0  # an empty row
    return rows


@fused_here
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("n_rows", "n_in", "n_out"), SIZES)
def test_the_fused_layer_equals_its_function(
    kind: linear.Kind, n_rows: int, n_in: int, n_out: int
) -> None:
    model, rows = layer(kind, n_in, n_out), some_rows(n_rows, n_in)
    expected = run(model, rows, fused=False)
    for threads in (1, 3):
        found = run(model, rows, fused=True, threads=threads)
        if kind.activation:  # two ways to compute an exponential
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(found, expected)


@fused_here
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("n_rows", "part", "n_out"), SIZES)
def test_parts_of_a_row_are_layers_of_their_own(
    kind: linear.Kind, n_rows: int, part: int, n_out: int
) -> None:
    """Four layers of one part each, added by numpy, then the bias and the activation."""
    rows = some_rows(n_rows, 4 * part)
    whole = onnx.load_from_string(layer(replace(kind, parts=4), 4 * part, n_out))
    tensors = {t.name: numpy_helper.to_array(t) for t in whole.graph.initializer}
    single = onnx.load_from_string(layer(linear.Kind(), part, n_out))
    values = {t.name: t for t in single.graph.initializer}
    values["scales"].CopyFrom(numpy_helper.from_array(tensors["scales"], "scales"))
    expected = np.zeros((1, n_rows, n_out), np.float32)
    for n in range(4):
        own = slice(n * part, (n + 1) * part)
        values["w"].CopyFrom(numpy_helper.from_array(tensors["w"][own], "w"))
        expected += run(single.SerializeToString(), rows[..., own], fused=False)
    expected += tensors.get("bias", np.float32(0))
    if kind.activation:
        inner = 1.702 * expected
        if kind.activation == "FastGelu":
            inner = 2 * np.sqrt(2 / np.pi) * (expected + 0.044715 * expected**3)
        expected = expected / (1 + np.exp(-np.clip(inner, -80, None)))
    if kind.residual:
        expected += np.random.default_rng(3).normal(size=expected.shape).astype(np.float32)
    found = run(whole.SerializeToString(), rows, fused=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [pytest.param(True, marks=fused_here), False])
@pytest.mark.parametrize(("n_rows", "width"), [(1, 4), (5, 33), (6, 64), (3, 100), (50, 1030)])
def test_a_norm_is_numpys_to_half_a_step(n_rows: int, width: int, *, fused: bool) -> None:
    """Weights that take the rows as they are show what they were rounded to."""
    kind = linear.Kind(norm=True)
    model = onnx.load_from_string(layer(kind, width, width))
    tensors = {t.name: t for t in model.graph.initializer}
    for name, values in (
        ("w", np.eye(width, dtype=np.int8)), ("scales", np.ones(width, np.float32))
    ):  # fmt: skip
        tensors[name].CopyFrom(numpy_helper.from_array(values, name))
    rows = np.random.default_rng(1).normal(3, 2, (1, n_rows, width)).astype(np.float32)
    exact = rows[0].astype(np.float64)
    exact -= exact.mean(axis=1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(axis=1, keepdims=True) + EPSILON)
    scales, bias = (numpy_helper.to_array(tensors[n]) for n in ("norm_scales", "norm_bias"))
    exact = exact * scales + bias
    steps = np.abs(exact).max(axis=1, keepdims=True) / 127
    found = run(model.SerializeToString(), rows, fused=fused)[0]
    assert (np.abs(found - exact) <= 0.501 * steps).all()


@fused_here
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_norm_joins_every_kind_of_layer(kind: linear.Kind, parts: int) -> None:
    """The same as a norm of ONNX Runtime's before the layer, but for values halfway between two
    integers, which either norm may round its own way."""
    kind = replace(kind, parts=parts)
    rows = some_rows(40, 96)
    model = layer(replace(kind, norm=True), 96, 70)
    tensors = {
        t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(model).graph.initializer
    }
    mean, spread = rows.mean(axis=-1, keepdims=True), rows.var(axis=-1, keepdims=True)
    normed = (rows - mean) / np.sqrt(spread + EPSILON) * tensors["norm_scales"]
    normed += tensors["norm_bias"]
    expected = run(layer(kind, 96, 70), normed, fused=True)
    found = run(model, rows, fused=True)
    assert (np.isclose(found, expected, rtol=1e-4, atol=1e-4)).mean() > 0.95
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=0.05)


@fused_here
@pytest.mark.parametrize("activation", linear.ACTIVATIONS)
def test_activations_hold_at_any_size(activation: str) -> None:
    """Far from zero the exponential must neither overflow nor leave a NaN."""
    kind = linear.Kind(bias=True, activation=activation)
    model = layer(kind, 8, 32)
    rows = np.geomspace(1e-6, 1e6, 64, dtype=np.float32)[np.newaxis, :, np.newaxis]
    rows = rows * np.array([1, -1, 0.5, -0.5, 0.1, 0, 1, 1], np.float32)
    found, expected = run(model, rows, fused=True), run(model, rows, fused=False)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@fused_here
def test_no_rows_give_no_rows_and_batches_are_rows() -> None:
    model = layer(linear.Kind(bias=True), 32, 48)
    rows = np.random.default_rng(0).normal(size=(3, 5, 32)).astype(np.float32)
    flat = run(model, rows.reshape(1, 15, 32), fused=True)
    np.testing.assert_array_equal(run(model, rows, fused=True).reshape(1, 15, 48), flat)
    assert run(model, rows[:, :0], fused=True).shape == (3, 0, 48)


@fused_here
@pytest.mark.parametrize(
    ("name", "shape"), [("scales", 47), ("bias", 47), ("norm_scales", 31), ("norm_bias", 33)]
)
def test_sizes_that_disagree_are_an_error(name: str, shape: int) -> None:
    model = onnx.load_from_string(layer(linear.Kind(norm=True, bias=True), 32, 48))
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.zeros(shape, np.float32), name))
    with pytest.raises(Exception, match="sizes of the inputs disagree"):
        run(model.SerializeToString(), np.zeros((1, 2, 32), np.float32), fused=True)


@fused_here
@pytest.mark.parametrize("shape", [(1, 3, 48), (2, 2, 48), (1, 2, 47), (2, 48)])
def test_a_residual_of_another_size_is_an_error(shape: tuple[int, ...]) -> None:
    model = onnx.load_from_string(layer(linear.Kind(residual=True), 32, 48))
    del model.graph.input[1]
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), "r"))
    with pytest.raises(Exception, match="sizes of the inputs disagree"):
        run(model.SerializeToString(), np.zeros((1, 2, 32), np.float32), fused=True)


def test_a_lower_cpu_tier_runs_onnx_runtimes_own_operators() -> None:
    """EDGEVLM_CPU says what the whole process may use."""
    code = "from edgevlm import kernels; print(kernels.operators())"
    for name in kernels.tiers():
        environment = {**os.environ, "EDGEVLM_CPU": name}
        said = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        best = name == kernels.tiers()[0]
        assert said == (str(kernels.operators()) if best else "None")


def test_without_the_library_the_function_takes_its_place() -> None:
    """numpy's arithmetic on the same integers; one scale a row, whatever the parts."""
    data = layer(linear.Kind(parts=4, bias=True), 64, 24)
    rows = np.random.default_rng(2).normal(size=(1, 9, 64)).astype(np.float32)
    initializers = onnx.load_from_string(data).graph.initializer
    tensors = {t.name: numpy_helper.to_array(t) for t in initializers}
    values = rows[0].astype(np.float64)
    scale = np.abs(values).max(axis=1, keepdims=True) / 127
    expected = np.rint(values / scale) * scale @ tensors["w"].astype(np.float64)
    expected = expected * tensors["scales"] + tensors["bias"]
    np.testing.assert_allclose(run(data, rows, fused=False)[0], expected, rtol=1e-5, atol=1e-5)
