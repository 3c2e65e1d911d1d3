"""Ridge regression towards the old weights, block by block, from second moments alone (`compensation`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from onnx_decomp.passes.lowrank import factor
from onnx_decomp.passes.moments import Array, Indices, Moments, residual
from onnx_decomp.program import DROPPED, Labels
from onnx_decomp.sites import Affine

RIDGES = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, np.inf)
"""Candidates for lam, relative to the mean variance of a block's inputs."""


TINY = float(np.finfo(np.float32).tiny)


def blocks_of(rows: Labels, columns: Labels) -> Iterator[tuple[Indices, Indices]]:
    """Row and column indices of every block; columns that no row feeds come with an empty row set."""
    for block in np.unique(columns[columns != DROPPED]):
        yield np.flatnonzero(rows == block), np.flatnonzero(columns == block)


def masked(affine: Affine, rows: Labels, columns: Labels) -> Affine:
    """The old weights on kept entries, zero elsewhere; nothing is made up for."""
    return _by_block(affine, rows, columns, lambda old, _rows, _columns: old)


def in_blocks(rows: Labels, columns: Labels) -> NDArray[np.bool_]:
    """[K, N], True where a row and a column share a block."""
    mask: NDArray[np.bool_] = (rows[:, None] == columns[None, :]) & (rows != DROPPED)[:, None]
    return mask


def removed_norm(affine: Affine, left: Affine) -> float:
    """Norm of the entries that go, over the norm of the matrix."""
    gone = float(np.linalg.norm(affine.weight - left.weight))
    return gone / max(float(np.linalg.norm(affine.weight)), 1e-30)


def refit(moments: Moments, affine: Affine, rows: Labels, columns: Labels, ridge: float) -> Affine:
    """The ridge solution of the module's formula on the entries where rows and columns share a block.

    affine: the old weights [K, N]. Columns labelled DROPPED get zeros.
    """
    return _by_block(affine, rows, columns, lambda old, r, c: refit_block(moments.of(r, c), old, ridge))


def best_refit(fit: Moments, select: Moments, affine: Affine, rows: Labels, columns: Labels) -> Affine:
    """Each block refitted on `fit`, with the ridge that does best on `select`; leaving it as it was is a choice too."""

    def best(old: Affine, r: Indices, c: Indices) -> Affine:
        fitted, unseen = fit.of(r, c), select.of(r, c)
        candidates = [old]
        for ridge in RIDGES:
            try:
                candidates.append(refit_block(fitted, old, ridge))
            except linalg.LinAlgError:
                continue
        return min(candidates, key=lambda candidate: residual(unseen, candidate))

    return _by_block(affine, rows, columns, best)


def refit_block(moments: Moments, old: Affine, ridge: float) -> Affine:
    """The ridge solution for one block, dense in itself.

    ridge: lam relative to the mean variance of the inputs; inf keeps the old weights and moves the bias only.
    """
    weight = old.weight.astype(np.float64)
    if np.isfinite(ridge) and len(weight):
        lam = ridge * max(float(np.trace(moments.xx)) / len(weight), TINY)
        system = moments.xx + lam * np.eye(len(weight))
        weight = linalg.solve(system, moments.xy + lam * weight, assume_a="pos", overwrite_a=True)
    bias = moments.mean_y - moments.mean_x @ weight
    return Affine(weight.astype(np.float32), bias.astype(np.float32))


def factored(
    moments: Moments,
    affine: Affine,
    rows: Labels,
    columns: Labels,
    ranks: Sequence[int],
    importance: Array | None,
) -> Affine:
    """Each block of a refitted map [K, N] as the nearest one of its rank, by the errors that matter (`lowrank`)."""

    def nearest(old: Affine, r: Indices, c: Indices) -> Affine:
        rank = ranks[int(columns[c[0]])]
        if rank >= min(len(r), len(c)):
            return old
        block = moments.of(r, c)
        within = None if importance is None else importance[np.ix_(c, c)]
        weight = factor(block.xx, old.weight, within).truncated(rank)
        bias = block.mean_y - block.mean_x @ weight
        return Affine(weight.astype(np.float32), bias.astype(np.float32))

    return _by_block(affine, rows, columns, nearest)


def _by_block(
    affine: Affine, rows: Labels, columns: Labels, change: Callable[[Affine, Indices, Indices], Affine]
) -> Affine:
    """Put together what `change` makes of each block of W [k, n] and b [n]; zero outside of them."""
    weight = np.zeros_like(affine.weight)
    bias = np.zeros(len(columns), np.float32)
    biased = affine.bias is not None
    for r, c in blocks_of(rows, columns):
        at = np.ix_(r, c)
        block = change(Affine(affine.weight[at], None if affine.bias is None else affine.bias[c]), r, c)
        weight[at] = block.weight
        if block.bias is not None:
            bias[c], biased = block.bias, True
    return Affine(weight, bias if biased else None)


def relative_error(moments: Moments, affine: Affine, rows: Labels, columns: Labels) -> float:
    """Root of the mean squared error over the variance of y, both summed over the columns that are computed."""
    error = variance = 0.0
    for r, c in blocks_of(rows, columns):
        block = moments.of(r, c)
        bias = None if affine.bias is None else affine.bias[c]
        error += residual(block, Affine(affine.weight[np.ix_(r, c)], bias))
        variance += float(block.yy.sum())
    return float(np.sqrt(error / max(variance, TINY)))


def relative_to_aim(moments: Moments, affine: Affine, columns: Indices) -> float:
    """The same for a map that is in no blocks, over some columns."""
    rows = np.arange(len(moments.mean_x))
    bias = None if affine.bias is None else affine.bias[columns]
    error = residual(moments.of(rows, columns), Affine(affine.weight[:, columns], bias))
    return float(np.sqrt(error / max(float(moments.yy[columns].sum()), TINY)))
