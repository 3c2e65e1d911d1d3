"""What an error inside costs at the outputs: predicted, against the model run with that error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from scipy.special import softmax

from onnx_decomp import model_io
from onnx_decomp.compiler import Run
from onnx_decomp.cost import cpu
from onnx_decomp.options import Options
from onnx_decomp.passes.compensation import BATCH
from onnx_decomp.passes.importance import (
    GROUPS,
    SKETCH,
    importances,
    moved_columns,
    projection,
    sample_groups,
    shrunk,
    through,
    weighted,
)
from onnx_decomp.passes.judging import Judge
from onnx_decomp.passes.search import Search
from onnx_decomp.progress import Silent
from onnx_decomp.sites import Affine
from tests import small

Array = np.ndarray
Weights = dict[str, Array]


def opened(proto: onnx.ModelProto, x: Array, folder: Path, **options: object) -> Search:
    """A search over all regions of a model before its first step."""
    np.savez(folder / "calib.npz", x=x)
    told = Options(calib=folder / "calib.npz", provider="cpu", latency_gate=False, **options)
    program, obstacle = Run(model_io.from_proto(proto), told, Silent()).prepared()
    assert obstacle is None
    return Search(program, program.regions, cpu(), Judge(program))


def found(search: Search, exits: dict[int, Array] | None = None) -> dict[str, Array | None]:
    """S of each site of the only region, by name of its weight."""
    (region,) = search.regions
    affine = [search.program.affine(site) for site in region.sites]
    made = importances(search.calibrator(region, {}), region, affine, {}, exits or {})
    return {site.weight: each for site, each in zip(region.sites, made, strict=True)}


def fed(search: Search) -> Array:
    return np.concatenate([feeds["x"] for feeds in search.program.data.batches("fit", BATCH)])


def drawn(seed: int, **shapes: tuple[int, ...]) -> Weights:
    rng = np.random.default_rng(seed)
    scaled = {name: rng.standard_normal(shape) / np.sqrt(shape[0]) for name, shape in shapes.items()}
    return {name: array.astype(np.float32) for name, array in scaled.items()}


def network(weights: Weights, *lines: str) -> onnx.ModelProto:
    """From lines like "MatMul x W0 -> h"; x is as wide as W0 is high, y as W-last is wide."""
    nodes = []
    for line in lines:
        read, made = line.split(" -> ")
        op, *inputs = read.split()
        nodes.append(helper.make_node(op, inputs, [made], name=made))
    first, last = next(iter(weights.values())), list(weights.values())[-1]
    inputs, outputs = [small.value("x", ["N", len(first)])], [small.value("y", ["N", last.shape[1]])]
    return small.model(nodes, inputs, outputs, weights)


def deep(weights: Weights, activation: str) -> onnx.ModelProto:
    return network(
        weights,
        "MatMul x W0 -> h0",
        f"{activation} h0 -> a0",
        "MatMul a0 W1 -> h1",
        f"{activation} h1 -> a1",
        "MatMul a1 W2 -> y",
    )


def gated(weights: Weights) -> onnx.ModelProto:
    return network(
        weights,
        "MatMul x W0 -> g",
        "Tanh g -> t",
        "MatMul x W1 -> u",
        "Mul t u -> m",
        "MatMul m W2 -> y",
    )


SMOOTH: dict[str, Callable[[Array], Array]] = {
    "Tanh": np.tanh,
    "Sigmoid": lambda h: 1 / (1 + np.exp(-h)),
    "Softplus": lambda h: np.log1p(np.exp(h)),
}


def assert_predicts(
    run: Callable[[dict[str, Array]], Array], sizes: dict[str, Array | None], within: float
) -> None:
    """run: outputs with an error added at one site; S predicts their squared change in several directions."""
    rng, still = np.random.default_rng(5), run({})
    for name, importance in sizes.items():
        if importance is None:
            continue
        rows, width = len(still), len(importance)
        np.testing.assert_allclose(importance, importance.T, rtol=1e-6, atol=1e-9 * importance.max())
        one = np.zeros((rows, width))
        one[:, 0] = 1.0
        for shape in (np.eye(width), rng.standard_normal((width, width)), one[:width]):
            predicted = measured = 0.0
            for _ in range(6):
                error = 1e-3 * rng.standard_normal((rows, width)) @ shape
                predicted += float(np.sum((error @ importance) * error))
                measured += float(np.sum((run({name: error}) - still) ** 2))
            assert predicted == pytest.approx(measured, rel=within), (name, shape[0, :2])


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("seed", [0, 1])
def test_errors_inside_a_deep_network(activation: str, seed: int, tmp_path: Path) -> None:
    weights = drawn(seed, W0=(12, 24), W1=(24, 20), W2=(20, 6))
    x = np.random.default_rng(seed).standard_normal((1500, 12)).astype(np.float32)
    search, active = opened(deep(weights, activation), x, tmp_path), SMOOTH[activation]
    rows = fed(search).astype(np.float64)

    def run(errors: dict[str, Array]) -> Array:
        a0 = active(rows @ weights["W0"] + errors.get("W0", 0.0))
        return active(a0 @ weights["W1"] + errors.get("W1", 0.0)) @ weights["W2"]

    sizes = found(search)
    assert sizes["W0"] is not None
    assert sizes["W1"] is not None
    assert_predicts(run, sizes, 0.3)
    assert_predicts(run, {"W1": sizes["W1"]}, 0.08)


def test_errors_on_both_sides_of_a_gate(tmp_path: Path) -> None:
    weights = drawn(2, W0=(12, 24), W1=(12, 24), W2=(24, 6))
    weights["W0"] *= np.linspace(0.1, 3, 24, dtype=np.float32)
    x = np.random.default_rng(2).standard_normal((1500, 12)).astype(np.float32)
    search = opened(gated(weights), x, tmp_path)
    rows = fed(search).astype(np.float64)

    def run(errors: dict[str, Array]) -> Array:
        gate = np.tanh(rows @ weights["W0"] + errors.get("W0", 0.0))
        return (gate * (rows @ weights["W1"] + errors.get("W1", 0.0))) @ weights["W2"]

    sizes = found(search)
    assert sizes["W0"] is not None
    assert sizes["W1"] is not None
    assert_predicts(run, sizes, 0.08)


def test_where_nothing_is_read_behind_every_output_counts_alike(tmp_path: Path) -> None:
    weights = drawn(3, W0=(8, 12), W1=(12, 12), W2=(12, 5))
    x = np.random.default_rng(3).standard_normal((600, 8)).astype(np.float32)
    search = opened(deep(weights, "Tanh"), x, tmp_path)
    plain = found(search)
    assert plain["W2"] is None
    measured = np.diag([4.0, 1, 1, 1, 0])
    told = found(search, {2: measured})
    assert told["W2"] is measured
    (region,) = search.regions
    slopes = search.calibrator(region, {}).slopes(
        region.sites[1], "a1", search.program.affine(region.sites[1]), {}
    )
    w = weights["W2"].astype(np.float64)
    np.testing.assert_allclose(plain["W1"], (w @ w.T) * slopes, rtol=1e-9)
    np.testing.assert_allclose(told["W1"], (w @ measured @ w.T) * slopes, rtol=1e-9)


def test_slopes_of_a_relu_are_shares_of_active_samples(tmp_path: Path) -> None:
    weights = drawn(4, W0=(8, 16), W1=(16, 16), W2=(16, 5))
    x = (np.random.default_rng(4).standard_normal((1500, 8)) + 0.7).astype(np.float32)
    search = opened(deep(weights, "Relu"), x, tmp_path)
    (region,) = search.regions
    site = region.sites[0]
    slopes = search.calibrator(region, {}).slopes(site, "a0", search.program.affine(site), {})
    active = (fed(search) @ weights["W0"] > 0).astype(np.float64)
    np.testing.assert_allclose(slopes, active.T @ active / len(active), atol=0.01)
    assert 0.05 < np.diag(slopes).min() < np.diag(slopes).max() < 0.99


def test_slopes_are_those_of_the_maps_in_place(tmp_path: Path) -> None:
    """With a bias that shuts a unit, or halves in front of it, nothing of the original's slopes is left."""
    weights = drawn(4, W0=(8, 16), W1=(16, 16), W2=(16, 5))
    x = np.random.default_rng(4).standard_normal((600, 8)).astype(np.float32)
    search = opened(deep(weights, "Relu"), x, tmp_path)
    (region,) = search.regions
    site = region.sites[0]
    shut = np.where(np.arange(16) < 8, -100.0, 100.0).astype(np.float32)
    current = Affine(weights["W0"], shut)
    slopes = search.calibrator(region, {}).slopes(site, "a0", current, {site.index: current})
    # atol: float32 rounding of 100 against a step of a hundredth of the spread
    np.testing.assert_allclose(slopes, np.outer(shut > 0, shut > 0), atol=0.02)


def test_slopes_behind_other_maps(tmp_path: Path) -> None:
    weights = drawn(4, W0=(8, 16), W1=(16, 16), W2=(16, 5))
    x = np.random.default_rng(4).standard_normal((600, 8)).astype(np.float32)
    search = opened(deep(weights, "Relu"), x, tmp_path)
    (region,) = search.regions
    other = Affine(-2.0 * weights["W0"], np.full(16, 0.5, np.float32))
    current = search.program.affine(region.sites[1])
    slopes = search.calibrator(region, {}).slopes(
        region.sites[1], "a1", current, {region.sites[0].index: other}
    )
    active = (np.maximum(fed(search) @ other.weight + other.bias, 0) @ weights["W1"] > 0).astype(np.float64)
    np.testing.assert_allclose(slopes, active.T @ active / len(active), atol=0.03)


@pytest.mark.parametrize("metric", ["rel-l2", "kl"])
@pytest.mark.parametrize("most", [10_000, 40])
def test_moved_columns_of_a_linear_model(metric: str, most: int, tmp_path: Path) -> None:
    weights = drawn(6, W0=(8, 12), W1=(12, 5))
    x = np.random.default_rng(6).standard_normal((600, 8)).astype(np.float32)
    proto = network(weights, "MatMul x W0 -> h", "MatMul h W1 -> y")
    search = opened(proto, x, tmp_path, metric=metric)
    (region,) = search.regions
    found = moved_columns(search.judge, search.calibrator(region, {}), region.sites[0], search.program, most)
    w = weights["W1"].astype(np.float64)
    groups = list(sample_groups(search.program.data, min(most, 360)))
    assert len(groups) == GROUPS
    assert sum(len(group["x"]) for group in groups) <= most
    expected = []
    for group in groups:
        y = group["x"].astype(np.float64) @ weights["W0"] @ w
        if metric == "kl":  # Fisher's matrix of the classes, summed over rows
            p = softmax(y, axis=1)
            middle = np.diag(p.sum(0)) - p.T @ p
        else:
            middle = len(y) * np.eye(5) / np.sum(y**2)
        expected.append(w @ middle @ w.T)
    wanted = shrunk(expected)
    np.testing.assert_allclose(found, wanted, rtol=0.02, atol=2e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("most", [4, 8])
def test_what_few_samples_do_not_show_is_not_taken_for_free(most: int, tmp_path: Path) -> None:
    """Each sample shows two of 24 outputs, as a sparse encoder would: a few of them say little of all directions."""
    weights = drawn(8, W0=(24, 16), W1=(16, 24))
    rng = np.random.default_rng(8)
    x = rng.standard_normal((2000, 24)).astype(np.float32)
    proto = network(weights, "MatMul x W0 -> h", "MatMul h W1 -> z", "Greater x high -> shown")
    nodes = [
        helper.make_node("Cast", ["shown"], ["mask"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["z", "mask"], ["y"]),
    ]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1.4, np.float32), "high"))
    search = opened(proto, x, tmp_path)
    (region, *_) = (each for each in search.regions if each.sites[0].weight == "W0")
    site = region.sites[0]
    found = moved_columns(search.judge, search.calibrator(region, {}), site, search.program, most)
    assert found is not None
    shown = (x > 1.4).mean(0)
    truth = (weights["W1"] * shown) @ weights["W1"].T
    directions = np.linalg.eigh(found)[1].T
    said, real = (np.einsum("di,ij,dj->d", directions, s / np.trace(s), directions) for s in (found, truth))
    assert (real / said).max() < 10


def test_estimates_are_drawn_in_as_far_as_they_disagree() -> None:
    rng = np.random.default_rng(9)
    half = rng.standard_normal((12, 12))
    truth = half @ half.T
    np.testing.assert_allclose(shrunk([truth] * 4), truth)
    np.testing.assert_allclose(shrunk([truth]), truth)
    better = 0
    for _ in range(50):
        parts = half @ rng.standard_normal((4, 12, 3))
        seen = [part @ part.T / 3 for part in parts]
        better += np.linalg.norm(shrunk(seen) - truth) < np.linalg.norm(np.mean(seen, axis=0) - truth)
        assert np.trace(shrunk(seen)) == pytest.approx(np.trace(np.mean(seen, axis=0)))
    assert better > 40


def test_long_changes_keep_their_inner_products() -> None:
    rng = np.random.default_rng(10)
    changes = rng.standard_normal((8, 3)) @ rng.standard_normal((3, 200_000))
    made = changes @ projection(200_000).T
    assert made.shape == (8, SKETCH)
    whole = changes @ changes.T
    np.testing.assert_allclose(made @ made.T, whole, atol=0.05 * whole.max())
    np.testing.assert_array_equal(made, changes @ projection(200_000).T)
    np.testing.assert_array_equal(projection(50) @ changes[0, :50], changes[0, :50])


def test_weights_by_what_they_cost() -> None:
    rng = np.random.default_rng(7)
    w, half = rng.standard_normal((6, 9)), rng.standard_normal((9, 4))
    np.testing.assert_allclose(through(w, None), w @ w.T)
    np.testing.assert_allclose(through(w, half @ half.T), w @ half @ half.T @ w.T)
    for importance in (None, half @ half.T):
        made = weighted(w, importance)
        np.testing.assert_allclose(made @ made.T, through(w, importance), rtol=1e-6, atol=1e-6)
    assert weighted(w, half @ half.T).shape == (6, 4)
