"""A low-rank correction beside blocks: what blocks leave out, written as two thin products.

    y = x W + x L + b,    W zero outside the blocks, L = A B with A [K, r] and B [r, N]

Blocks and correction are fitted in turn, each in closed form to what the other one leaves: W by ridge regression within
the blocks, L as the map of rank r that is nearest to a ridge fit of the rest, by the errors that matter (`lowrank`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from onnx_decomp.passes.lowrank import factor
from onnx_decomp.passes.moments import Array, Moments, residual
from onnx_decomp.passes.ridge import RIDGES, TINY, best_refit
from onnx_decomp.program import DROPPED, Labels
from onnx_decomp.sites import Affine

ROUNDS, WORTH = 16, 0.9
"""Times that blocks and correction are fitted at most, each to what the other leaves, and share of the squared error
on the select part above which one more round is not worth its time."""


@dataclass(frozen=True)
class Wanted:
    """One site that is written as blocks with a correction.

    old: affine map [K, N] that blocks, alone and with the correction, are kept near. rows, columns: block of each of
    its rows and columns. readable: [K] rows of x that the correction may read.
    """

    old: Affine
    rows: Labels
    columns: Labels
    readable: NDArray[np.bool_]
    rank: int
    importance: Array | None


def corrected(fit: Moments, select: Moments, wanted: Wanted) -> tuple[Affine, NDArray[np.float32]]:
    """Blocks W [K, N] with b, and the correction L [K, N] of rank r at most, fitted on `fit`; ridges by `select`."""
    low, error = np.zeros((len(fit.mean_x), len(fit.mean_y))), np.inf
    stays, ridges = wanted.columns != DROPPED, list(RIDGES)
    for _ in range(ROUNDS):
        left = [beside(moments, low) for moments in (fit, select)]
        blocks = best_refit(left[0], left[1], wanted.old, wanted.rows, wanted.columns)
        weight = blocks.weight.astype(np.float64)
        low, ridge = _nearest(fit, select, wanted, weight, ridges)
        ridges = [ridge]  # chosen once: trying all of them is most of the work
        before, error = error, float(beside(select, weight + low).yy[stays].sum())
        if error >= WORTH * before:
            break
    bias = np.where(stays, fit.mean_y - fit.mean_x @ (weight + low), 0.0)
    return Affine(blocks.weight, bias.astype(np.float32)), low.astype(np.float32)


def _nearest(
    fit: Moments, select: Moments, wanted: Wanted, blocks: Array, ridges: Sequence[float]
) -> tuple[Array, float]:
    """L for given blocks: a ridge fit of what they leave, over rows and columns that are there, cut to its rank.

    With the ridge that did best on `select`.
    """
    r, c = np.flatnonzero(wanted.readable), np.flatnonzero(wanted.columns != DROPPED)
    low = np.zeros_like(blocks)
    if not (r.size and c.size and wanted.rank):
        return low, np.inf
    at = np.ix_(r, c)
    prior = wanted.old.weight[at] - blocks[at]
    rest_fit, rest_select = (beside(moments, blocks).of(r, c) for moments in (fit, select))
    rest, ridge = min(
        _ridges(rest_fit, prior, ridges), key=lambda found: _unseen(rest_fit, rest_select, found[0])
    )
    within = None if wanted.importance is None else wanted.importance[np.ix_(c, c)]
    low[at] = factor(rest_fit.xx, rest, within).truncated(wanted.rank)
    return low, ridge


def _ridges(fit: Moments, prior: Array, ridges: Sequence[float]) -> Iterator[tuple[Array, float]]:
    """Maps [k, n] of ridge regression towards `prior`, each with its ridge; inf is the prior itself."""
    scale = max(float(np.trace(fit.xx)) / len(prior), TINY)
    for ridge in ridges:
        if not np.isfinite(ridge):
            yield prior, ridge
            continue
        lam = ridge * scale
        try:
            system = fit.xx + lam * np.eye(len(prior))
            yield linalg.solve(system, fit.xy + lam * prior, assume_a="pos", overwrite_a=True), ridge
        except linalg.LinAlgError:  # the next ridge is larger
            continue


def _unseen(fit: Moments, select: Moments, weight: Array) -> float:
    offset = fit.mean_y - fit.mean_x @ weight
    return residual(select, Affine(weight.astype(np.float32), offset.astype(np.float32)))


def beside(moments: Moments, weight: NDArray[np.floating]) -> Moments:
    """Moments whose aim is y - x weight: what a map [K, N] that is in place already leaves to another."""
    fed = moments.xx @ weight
    spread = moments.yy - 2.0 * np.sum(weight * moments.xy, axis=0) + np.sum(weight * fed, axis=0)
    return Moments(
        moments.rows,
        moments.mean_x,
        moments.mean_y - moments.mean_x @ weight,
        moments.xx,
        moments.xy - fed,
        np.maximum(spread, 0.0),
    )
