"""The planted models are what they claim to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import erf, isinf, sqrt
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from models.planted import (
    Activation,
    Dtype,
    Family,
    Form,
    Hide,
    Off,
    Planted,
    PlantedModel,
    build,
    calibration,
    contrast,
    oracle_misplacements,
    recoverable,
    shuffled,
)

SMALL = Planted(widths=(24, 36, 16), blocks=3)


def expected(planted: PlantedModel, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """The model's output [..., N] by numpy in float64."""
    gelu = np.vectorize(lambda value: value * (1 + erf(value / sqrt(2))) / 2)
    functions: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
        "Relu": lambda y: np.maximum(y, 0),
        "Gelu": gelu,
        "ErfGelu": gelu,
        "Tanh": np.tanh,
        "Sigmoid": lambda y: 1 / (1 + np.exp(-y)),
        "none": lambda y: y,
    }
    active = functions[planted.spec.activation]
    y = x.astype(np.float64)
    for layer, (weight, bias) in enumerate(zip(planted.weights, planted.biases, strict=True)):
        y = (active(y) if layer else y) @ weight + (0 if bias is None else bias)
    return np.asarray(y)


@pytest.mark.parametrize("form", ["MatMul", "Gemm", "Constant", "Transpose", "Identity"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("opset", [13, 17, 21])
def test_forms_run_and_agree_with_numpy(form: Form, dtype: Dtype, opset: int) -> None:
    check(replace(SMALL, form=form, dtype=dtype, opset=opset))


@pytest.mark.parametrize("activation", ["Relu", "Gelu", "ErfGelu", "Tanh", "Sigmoid", "none"])
@pytest.mark.parametrize(("rank", "bias"), [(2, False), (3, True)])
def test_activations_ranks_and_bias(activation: Activation, rank: Literal[2, 3], bias: bool) -> None:
    check(replace(SMALL, activation=activation, rank=rank, bias=bias, opset=20))


def check(spec: Planted) -> None:
    planted = build(spec)
    onnx.checker.check_model(planted.model, full_check=True)
    session = onnxruntime.InferenceSession(
        planted.model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    inputs = calibration(planted, 5)
    (y,) = session.run(None, inputs)
    wanted = expected(planted, inputs["x"])
    assert y.shape == wanted.shape
    tolerance = 1e-5 if spec.dtype == "float32" else 5e-3
    assert np.abs(y - wanted).max() <= tolerance * np.abs(wanted).max()
    stored = {tensor.name: tensor for tensor in planted.model.graph.initializer}
    stored |= {n.output[0]: n.attribute[0].t for n in planted.model.graph.node if n.op_type == "Constant"}
    for layer, name in enumerate(planted.names):
        array = onnx.numpy_helper.to_array(stored[name])
        canonical = array.T if spec.form in ("Gemm", "Transpose") else array
        np.testing.assert_array_equal(canonical, planted.weights[layer].astype(spec.dtype))
        assert planted.snapshot[name].shape == array.shape


@pytest.mark.parametrize("hide", ["all", "hidden", "none"])
@pytest.mark.parametrize("uneven", [False, True])
def test_sorting_by_label_shows_diagonal_blocks(hide: Hide, uneven: bool) -> None:
    spec = replace(SMALL, hide=hide, uneven=uneven, decay=0.5)
    planted = build(spec)
    for layer, (weight, start) in enumerate(zip(planted.weights, planted.initial, strict=True)):
        rows, columns = (np.argsort(axis, kind="stable") for axis in planted.labels[layer : layer + 2])
        changed = (weight != np.float32(0.5) * start)[np.ix_(rows, columns)]
        assert changed.mean() > 0.9 * planted.mask(layer).mean() * (1 - spec.unchanged)
        edges = [np.cumsum(np.bincount(axis)) for axis in planted.labels[layer : layer + 2]]
        for block in range(spec.blocks):
            below = slice(edges[0][block - 1] if block else 0, edges[0][block])
            right = slice(edges[1][block - 1] if block else 0, edges[1][block])
            changed[below, right] = False
        assert not changed.any()
    is_sorted = [bool((np.diff(axis) >= 0).all()) for axis in planted.labels]
    assert is_sorted == {"all": [False] * 3, "hidden": [True, False, True], "none": [True] * 3}[hide]
    smallest = min(np.bincount(axis).min() / axis.size for axis in planted.labels)
    assert smallest >= 1 / (3 * spec.blocks) - 1 / min(spec.widths)


@pytest.mark.parametrize("off", ["zero", "shrunk", "untouched"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_off_block_weights_hold_their_initial_values(off: Off, dtype: Dtype) -> None:
    planted = build(replace(SMALL, off=off, dtype=dtype, decay=0.3))
    kept = {"zero": 0.0, "shrunk": 0.3, "untouched": 1.0}[off]
    for layer, (weight, start) in enumerate(zip(planted.weights, planted.initial, strict=True)):
        outside = ~planted.mask(layer)
        np.testing.assert_array_equal(
            weight[outside], (np.float32(kept) * start[outside]).astype(dtype).astype(np.float32)
        )


@pytest.mark.parametrize("family", ["normal", "uniform"])
def test_scales_are_those_of_the_spec(family: Family) -> None:
    spec = Planted((512, 640), family=family, gain=1.5, jitter=0.3)
    planted = build(spec)
    weight, start, inside = planted.weights[0], planted.initial[0], planted.mask(0)
    sigma, change = spec.sigma(0), (weight - start)
    assert start.std() == pytest.approx(1 / sqrt(3 * 512), rel=0.01)
    assert weight[inside].std() == pytest.approx(1.5 * sigma, rel=0.02)
    assert (change[inside] == 0).mean() == pytest.approx(0.1, abs=0.01)
    assert change[~inside].std() == pytest.approx(0.3 * spec.change(0), rel=0.02)
    assert change[inside].std() / change[~inside].std() == pytest.approx(contrast(spec, "snapshot"), rel=0.02)
    assert weight[inside].std() / weight[~inside].std() == pytest.approx(contrast(spec), rel=0.02)


def test_controls_have_no_structure() -> None:
    whole = build(replace(SMALL, structured=False))
    assert all(not axis.any() for axis in whole.labels)
    planted = build(SMALL)
    mixed = shuffled(planted, np.random.default_rng(1))
    for before, after in zip(planted.weights, mixed.weights, strict=True):
        np.testing.assert_array_equal(np.sort(before, axis=None), np.sort(after, axis=None))
    changed = mixed.weights[0] != mixed.initial[0]
    assert abs(changed[planted.mask(0)].mean() - changed.mean()) < 0.1
    assert not recoverable(mixed.spec)


def test_same_seed_same_bytes() -> None:
    first, again, other = build(SMALL), build(SMALL), build(replace(SMALL, seed=1))
    assert first.model.SerializeToString() == again.model.SerializeToString()
    assert first.model.SerializeToString() != other.model.SerializeToString()


def test_recoverability_matches_what_was_measured() -> None:
    verdicts = {gain: recoverable(Planted(gain=gain)) for gain in (1.0, 1.1, 1.2, 1.5, 2.0)}
    assert verdicts == {1.0: False, 1.1: False, 1.2: False, 1.5: True, 2.0: True}
    assert recoverable(Planted(gain=1.05), "snapshot")
    assert isinf(contrast(Planted(), "snapshot"))
    assert not recoverable(Planted(gain=1.5), margin=10)
    assert oracle_misplacements(100, 100, 2, 1.0, 50) == pytest.approx(100)
    assert oracle_misplacements(100, 100, 2, float("inf"), 50) == 0


@pytest.mark.parametrize(
    "wrong", [{"blocks": 17}, {"form": "Gemm", "rank": 3}, {"activation": "Gelu", "opset": 17}, {"gain": 0.5}]
)
def test_impossible_specs_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"blocks|rank 2|opset 20|gain"):
        replace(SMALL, **wrong)
