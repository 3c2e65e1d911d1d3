"""Moments, refits and unit paths against what numpy says directly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_decomp.passes.moments import Moments, accumulate, cautious, residual
from onnx_decomp.passes.reduction import round_up, unit_path
from onnx_decomp.passes.ridge import best_refit, masked, refit, relative_error
from onnx_decomp.program import DROPPED
from onnx_decomp.sites import Affine


def batches(x: np.ndarray, y: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(x[at : at + size], y[at : at + size]) for at in range(0, len(x), size)]


def affine_of(rng: np.random.Generator, k: int, n: int) -> Affine:
    return Affine(rng.standard_normal((k, n)).astype(np.float32), rng.standard_normal(n).astype(np.float32))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60), st.floats(0, 1e4))
def test_moments_do_not_depend_on_batches_or_offset(seed: int, size: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((60, 5)) + offset, rng.standard_normal((60, 3)) - offset
    moments = accumulate(batches(x, y, size))
    assert moments.rows == 60
    np.testing.assert_allclose(moments.mean_x, x.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.xx, np.cov(x.T, bias=True), atol=1e-8)
    np.testing.assert_allclose(moments.xy, (x - x.mean(0)).T @ (y - y.mean(0)) / 60, atol=1e-8)
    np.testing.assert_allclose(moments.yy, y.var(0), atol=1e-8)


def test_refit_is_least_squares_in_each_block() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 8)) @ rng.standard_normal((8, 8)) + 3.0
    old = affine_of(rng, 8, 4)
    y = x @ old.weight + old.bias
    moments = accumulate(batches(x, y, 100))
    rows = np.array([0, 1, 0, 1, 0, 1, DROPPED, 0], np.int32)
    columns = np.array([1, 0, 0, 1], np.int32)
    new = refit(moments, old, rows, columns, 1e-12)
    for block in (0, 1):
        read, made = rows == block, columns == block
        design = np.hstack([x[:, read], np.ones((400, 1))])
        solution = np.linalg.lstsq(design, y[:, made], rcond=None)[0]
        np.testing.assert_allclose(new.weight[np.ix_(read, made)], solution[:-1], rtol=1e-3, atol=1e-3)
        assert not new.weight[np.ix_(~read, made)].any()
    predicted = x @ new.weight + new.bias
    assert residual(moments, new) == pytest.approx(np.sum((y - predicted).var(0)), rel=1e-3)


def test_infinite_ridge_folds_the_mean_of_what_is_gone() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((300, 6)) + np.arange(6)
    old = affine_of(rng, 6, 3)
    moments = accumulate([(x, x @ old.weight + old.bias)])
    rows, columns = np.array([0, 0, 0, DROPPED, DROPPED, 0], np.int32), np.zeros(3, np.int32)
    new = refit(moments, old, rows, columns, np.inf)
    np.testing.assert_array_equal(new.weight, masked(old, rows, columns).weight)
    np.testing.assert_allclose(new.bias, old.bias + x.mean(0)[3:5] @ old.weight[3:5], rtol=1e-4)


def test_best_refit_keeps_the_old_weights_when_nothing_is_gone() -> None:
    """Few rows: a free refit would overfit; the select part must see through it."""
    rng = np.random.default_rng(2)
    old = affine_of(rng, 40, 5)
    x, unseen = rng.standard_normal((45, 40)), rng.standard_normal((200, 40))
    noisy = x @ old.weight + old.bias + rng.standard_normal((45, 5))
    fit, select = accumulate([(x, noisy)]), accumulate([(unseen, unseen @ old.weight + old.bias)])
    whole = np.zeros(40, np.int32), np.zeros(5, np.int32)
    best = best_refit(fit, select, old, *whole)
    np.testing.assert_array_equal(best.weight, old.weight)
    assert relative_error(select, best, *whole) < 1e-5


def test_unit_path_drops_copies_and_dead_units_for_nothing() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((500, 12))
    x[:, 4], x[:, 7] = 0.0, 2.0 * x[:, 1]
    weight = rng.standard_normal((12, 6))
    path = unit_path(np.cov(x.T, bias=True), weight)
    assert sorted(path.order) == list(range(12))
    assert set(path.order[:2]) in ({4, 7}, {4, 1})
    assert path.error[2] < 1e-2 < path.error[3]
    assert path.error[-1] == pytest.approx(1.0, rel=1e-3)
    assert 4 not in path.keep(1e-2)
    assert len(path.keep(1e-2)) == 10


def test_unit_path_predicts_the_error_of_a_refit() -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((800, 20)) @ rng.standard_normal((20, 20))
    old = affine_of(rng, 20, 7)
    moments = accumulate([(x, x @ old.weight)])
    path = unit_path(moments.xx, old.weight)
    rows = np.full(20, DROPPED, np.int32)
    rows[path.keep_count(12)] = 0
    new = refit(moments, old, rows, np.zeros(7, np.int32), 1e-12)
    measured = np.sqrt(residual(moments, new) / moments.yy.sum())
    assert path.error[8] == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize(
    ("count", "size", "expected"), [(0, 64, 1), (1, 64, 1), (9, 64, 16), (60, 61, 61), (17, 64, 32)]
)
def test_round_up(count: int, size: int, expected: int) -> None:
    assert round_up(count, size) == expected


def drawn_moments(seed: int, rows: int, rank: int) -> Moments:
    """Of rows of 60 inputs in a space of so many dims."""
    space = np.random.default_rng(rank).standard_normal((rank, 60)) / np.sqrt(rank)
    x = np.random.default_rng(seed).standard_normal((rows, rank)) @ space
    return accumulate([(x, x[:, :1])])


def test_what_few_rows_do_not_span_is_not_taken_for_empty() -> None:
    """40 rows of 60 inputs that all vary leave 21 directions that look empty; of inputs in 6 dims they do not."""
    fit, held, truth = (drawn_moments(*each, 60) for each in ((0, 40), (1, 15), (2, 20_000)))
    directions = np.linalg.eigh(fit.xx)[1].T[:21]
    real, seen, said = (
        np.einsum("di,ij,dj->", directions, found.xx, directions)
        for found in (truth, fit, cautious(fit, held))
    )
    assert seen < 1e-9 * real
    assert said == pytest.approx(real, rel=0.4)
    flat = cautious(drawn_moments(0, 40, 6), drawn_moments(1, 15, 6))
    assert np.linalg.matrix_rank(flat.xx, tol=1e-9) == 6
    many = drawn_moments(0, 130, 60)
    assert cautious(many, held) is many
