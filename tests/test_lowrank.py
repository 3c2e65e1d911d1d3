"""Reduced-rank regression against numpy's SVD, plain truncation and random maps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_decomp.passes.lowrank import FLOOR_S, FLOOR_X, factor
from onnx_decomp.passes.moments import Moments, accumulate, residual
from onnx_decomp.passes.ridge import factored
from onnx_decomp.program import DROPPED
from onnx_decomp.sites import Affine

Array = np.ndarray
SHAPES = st.tuples(st.integers(1, 14), st.integers(1, 14))


def moments_of(rng: np.random.Generator, size: int, rank: int) -> Array:
    """Second moments of that rank, with directions of very different size."""
    root = rng.standard_normal((size, rank)) * 10.0 ** rng.uniform(-2, 2, rank)
    return root @ root.T


def cost(error: Array, xx: Array, importance: Array) -> float:
    return float(np.sum(error * (xx @ error @ importance)))


def floored(moments: Array, relative: float) -> Array:
    return moments + relative * np.trace(moments) / len(moments) * np.eye(len(moments))


def nearest(weight: Array, rank: int) -> Array:
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (7, 7), (1, 4), (4, 1)])
def test_without_weights_it_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(0).standard_normal(shape)
    found, values = factor(np.eye(shape[0]), weight), np.linalg.svd(weight, compute_uv=False)
    tails = [float(np.sum(values[rank:] ** 2)) for rank in range(len(values) + 1)]
    np.testing.assert_allclose(found.tail, tails, rtol=1e-8, atol=1e-12)
    for rank in range(len(values) + 1):
        np.testing.assert_allclose(found.truncated(rank), nearest(weight, rank), atol=1e-7)


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.integers(0, 2**32 - 1), st.floats(0.1, 1.0), st.floats(0.1, 1.0))
def test_no_map_of_the_same_rank_has_a_smaller_error(
    shape: tuple[int, int], seed: int, seen: float, read: float
) -> None:
    """seen, read: rank of C and of S over their size."""
    rng, (k, n) = np.random.default_rng(seed), shape
    xx, importance = moments_of(rng, k, max(int(seen * k), 1)), moments_of(rng, n, max(int(read * n), 1))
    weight = rng.standard_normal(shape)
    found = factor(xx, weight, importance)
    high = floored(xx, FLOOR_X), floored(importance, FLOOR_S)
    noise = 1e-9 * found.tail[0]
    assert len(found.tail) == min(shape) + 1
    assert found.tail[-1] == 0
    assert (np.diff(found.tail) <= 0).all()
    for rank in range(min(shape) + 1):
        made = found.truncated(rank)
        assert np.linalg.matrix_rank(made, tol=1e-6 * max(np.linalg.norm(made), 1e-30)) <= rank
        assert cost(weight - made, *high) == pytest.approx(found.tail[rank], rel=1e-5, abs=noise)
        assert cost(weight - made, xx, importance) <= found.tail[rank] * (1 + 1e-5) + noise
        others = [nearest(weight, rank)]
        for _ in range(3):
            near = made + 0.1 * rng.standard_normal(shape) * np.abs(made).max(initial=1e-3)
            others += [nearest(near, rank), nearest(rng.standard_normal(shape), rank)]
        assert all(found.tail[rank] <= cost(weight - other, *high) * (1 + 1e-9) + noise for other in others)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_full_rank_gives_the_weight_back(shape: tuple[int, int], seed: int, dead: bool, unread: bool) -> None:
    """Whole where the data show every direction; where they don't, in everything that they do show."""
    rng, (k, n) = np.random.default_rng(seed), shape
    xx, importance = (s @ s.T + 0.1 * np.eye(len(s)) for s in (rng.standard_normal((m, m)) for m in (k, n)))
    if dead:
        xx[0] = xx[:, 0] = 0.0
    if unread:
        importance[-1] = importance[:, -1] = 0.0
    weight = rng.standard_normal(shape)
    made = factor(xx, weight, importance).truncated(min(shape))
    read = np.flatnonzero(np.diag(xx) > 0)
    np.testing.assert_allclose(made[read] if dead else made, weight[read] if dead else weight, atol=1e-4)
    assert np.isfinite(made).all()


def test_an_exact_rank_is_seen() -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((20, 4)) @ rng.standard_normal((4, 30))
    found = factor(moments_of(rng, 20, 20), weight.astype(np.float32), moments_of(rng, 30, 30))
    assert found.tail[4] < 1e-11 * found.tail[0]
    np.testing.assert_allclose(found.truncated(4), weight, atol=1e-3)


def test_what_is_not_read_is_given_up_first() -> None:
    """Two directions; the larger one of the weight does not matter to S, or is never shown by C."""
    weight = np.diag([10.0, 1.0])
    for xx, importance in [(np.eye(2), np.diag([1e-3, 1.0])), (np.diag([1e-3, 1.0]), np.eye(2))]:
        np.testing.assert_allclose(
            factor(xx, weight, importance).truncated(1), np.diag([0.0, 1.0]), atol=1e-9
        )


@pytest.mark.parametrize("shape", [(3, 6), (6, 3)])
def test_nothing_in_nothing_out(shape: tuple[int, int]) -> None:
    k, n = shape
    weight = np.ones(shape)
    for xx, w in [(np.zeros((k, k)), weight), (np.eye(k), 0 * weight)]:
        found = factor(xx, w, np.zeros((n, n)))
        assert np.isfinite(found.tail).all()
        assert all(np.isfinite(found.truncated(rank)).all() for rank in range(4))


ROWS = np.array([0, 1, 0, 1, 0, 1, DROPPED, 0, 1, 0], np.int32)
COLUMNS = np.array([1, 0, 0, DROPPED, 1, 1, 0, 1, 0], np.int32)


def fitted(rng: np.random.Generator) -> tuple[Moments, Affine]:
    """Moments with means far from zero, and a map."""
    x = rng.standard_normal((500, 10)) @ rng.standard_normal((10, 10)) + 5.0 * np.arange(10)
    old = Affine(rng.standard_normal((10, 9)).astype(np.float32), rng.standard_normal(9).astype(np.float32))
    return accumulate([(x, x @ old.weight + old.bias)]), old


@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_are_factored_one_by_one_and_keep_their_mean(weighted: bool) -> None:
    rng = np.random.default_rng(2)
    moments, old = fitted(rng)
    importance = moments_of(rng, 9, 9) if weighted else None
    new = factored(moments, old, ROWS, COLUMNS, (1, 2), importance)
    assert new.bias is not None
    kept = COLUMNS != DROPPED
    mean = moments.mean_x @ new.weight + new.bias
    np.testing.assert_allclose(mean[kept], moments.mean_y[kept], rtol=1e-4, atol=1e-3)
    assert not new.weight[:, ~kept].any()
    assert not new.bias[~kept].any()
    assert not new.weight[(ROWS[:, None] != COLUMNS) & kept].any()
    for block, rank in enumerate((1, 2)):
        r, c = np.flatnonzero(block == ROWS), np.flatnonzero(block == COLUMNS)
        made, before = new.weight[np.ix_(r, c)], old.weight[np.ix_(r, c)]
        assert np.linalg.matrix_rank(made, tol=1e-4 * np.linalg.norm(made)) == rank
        within = None if importance is None else importance[np.ix_(c, c)]
        wanted = factor(moments.xx[np.ix_(r, r)], before, within)
        error = cost(before - made, moments.xx[np.ix_(r, r)], np.eye(len(c)) if within is None else within)
        assert error == pytest.approx(wanted.tail[rank], rel=1e-3)


def test_the_error_of_a_dense_map_is_its_tail() -> None:
    moments, old = fitted(np.random.default_rng(3))
    rows, columns = np.zeros(10, np.int32), np.zeros(9, np.int32)
    tail = factor(moments.xx, old.weight).tail
    for rank in (1, 4, 8):
        new = factored(moments, old, rows, columns, (rank,), None)
        assert residual(moments, new) == pytest.approx(tail[rank], rel=1e-3)
    whole = factored(moments, old, rows, columns, (9,), None)
    np.testing.assert_array_equal(whole.weight, old.weight)
    np.testing.assert_array_equal(whole.bias, old.bias)
