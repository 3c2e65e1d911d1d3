"""Make up for what is removed: closed-form refits from second moments, no gradients.

For a site that will read only some of its inputs, with x what the *rewritten* model feeds it and y what the *original*
site made of its own input, the kept weights of each block solve

    minimise  E |y - x W - b|^2 + lam |W - W_old|^2          over W on the kept entries, and b

Ridge regression towards the old weights: with lam = 0 plain least squares, with lam = inf the old weights with the mean
of what is gone folded into the bias. lam is chosen on the select part of the data, never on what was fitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from onnx_decomp.calibration import Data, Part
from onnx_decomp.probe import Feeds, Probe
from onnx_decomp.program import DROPPED, Labels
from onnx_decomp.sites import Affine, Site

Array = NDArray[np.float64]

RIDGES = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, np.inf)
"""Candidates for lam, relative to the mean variance of a block's inputs."""


TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Moments:
    """Centred second moments of paired rows x [K] and y [N], each divided by the number of rows, in float64."""

    rows: int
    mean_x: Array
    mean_y: Array
    xx: Array
    xy: Array
    yy: Array
    """[N]: variances of y alone."""


def accumulate(pairs: Iterable[tuple[NDArray[np.floating], NDArray[np.floating]]]) -> Moments:
    """One streaming pass over batches of x [T, K] and y [T, N]; memory is bounded by a batch and K x (K + N).

    Sums are taken around the first batch's mean, so that a large mean costs no precision.
    """
    rows = 0
    for x, y in pairs:
        x64 = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
        y64 = np.asarray(y, np.float64).reshape(-1, y.shape[-1])
        if rows == 0:
            shift_x, shift_y = x64.mean(0), y64.mean(0)
            sum_x, sum_y = np.zeros_like(shift_x), np.zeros_like(shift_y)
            xx = np.zeros((x64.shape[1], x64.shape[1]))
            xy = np.zeros((x64.shape[1], y64.shape[1]))
            yy = np.zeros(y64.shape[1])
        x64 = x64 - shift_x
        y64 = y64 - shift_y
        rows += len(x64)
        sum_x += x64.sum(0)
        sum_y += y64.sum(0)
        xx += x64.T @ x64
        xy += x64.T @ y64
        yy += np.einsum("tn,tn->n", y64, y64)
    if rows == 0:
        raise ValueError("no rows to take moments of")
    dx, dy = sum_x / rows, sum_y / rows
    return Moments(
        rows,
        shift_x + dx,
        shift_y + dy,
        xx / rows - np.outer(dx, dx),
        xy / rows - np.outer(dx, dy),
        np.maximum(yy / rows - dy**2, 0.0),
    )


def residual(moments: Moments, affine: Affine) -> float:
    """Mean squared error of y - (x W + b), summed over outputs, from moments alone."""
    weight = affine.weight.astype(np.float64)
    bias = np.zeros(weight.shape[1]) if affine.bias is None else affine.bias.astype(np.float64)
    spread = moments.yy.sum() - 2.0 * np.sum(weight * moments.xy) + np.sum(weight * (moments.xx @ weight))
    offset = moments.mean_y - moments.mean_x @ weight - bias
    return float(max(spread, 0.0) + offset @ offset)


def blocks_of(rows: Labels, columns: Labels) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Row and column indices of every block; columns that no row feeds come with an empty row set."""
    for block in np.unique(columns[columns != DROPPED]):
        yield np.flatnonzero(rows == block), np.flatnonzero(columns == block)


def masked(affine: Affine, rows: Labels, columns: Labels) -> Affine:
    """The old weights on kept entries, zero elsewhere; nothing is made up for."""
    weight = np.zeros_like(affine.weight)
    for block_rows, block_columns in blocks_of(rows, columns):
        at = np.ix_(block_rows, block_columns)
        weight[at] = affine.weight[at]
    return Affine(weight, affine.bias)


def refit(moments: Moments, affine: Affine, rows: Labels, columns: Labels, ridge: float) -> Affine:
    """The ridge solution of the module's formula on the entries where rows and columns share a block.

    affine: the old weights [K, N]; `ridge` is relative to the mean variance of each block's inputs, inf keeps the old
    weights. Columns labelled DROPPED get zeros.
    """
    weight = np.zeros(affine.weight.shape)
    for block_rows, block_columns in blocks_of(rows, columns):
        if not block_rows.size:
            continue
        at = np.ix_(block_rows, block_columns)
        old = affine.weight[at].astype(np.float64)
        if np.isinf(ridge):
            weight[at] = old
            continue
        xx = moments.xx[np.ix_(block_rows, block_rows)]
        lam = ridge * max(float(np.trace(xx)) / len(xx), TINY)
        system = xx + lam * np.eye(len(xx))
        weight[at] = linalg.solve(system, moments.xy[at] + lam * old, assume_a="pos", overwrite_a=True)
    bias = moments.mean_y - moments.mean_x @ weight
    bias[columns == DROPPED] = 0.0
    return Affine(weight.astype(np.float32), bias.astype(np.float32))


def best_refit(fit: Moments, select: Moments, affine: Affine, rows: Labels, columns: Labels) -> Affine:
    """Refit on `fit`, with the ridge that does best on `select`; doing nothing but masking is a candidate too."""
    live = columns != DROPPED
    candidates = [masked(affine, rows, columns)]
    for ridge in RIDGES:
        try:
            candidates.append(refit(fit, affine, rows, columns, ridge))
        except linalg.LinAlgError:
            continue
    return min(candidates, key=lambda candidate: relative_error(select, candidate, live))


def relative_error(moments: Moments, affine: Affine, live: NDArray[np.bool_]) -> float:
    """Root of the mean squared error over the variance of y, both summed over the columns that are computed."""
    bias = None if affine.bias is None else affine.bias[live]
    columns = replace(moments, mean_y=moments.mean_y[live], xy=moments.xy[:, live], yy=moments.yy[live])
    variance = max(float(columns.yy.sum()), np.finfo(np.float64).tiny)
    return float(np.sqrt(residual(columns, Affine(affine.weight[:, live], bias)) / variance))


@dataclass(frozen=True)
class Calibrator:
    """Runs the probe over a part of the data to get what a site is fed and what it ought to make."""

    probe: Probe
    data: Data
    batch: int = 512

    def moments(self, part: Part, site: Site, affine: Mapping[int, Affine]) -> Moments:
        """Moments of x as the model with `affine` feeds it, and y as the original makes it."""
        return accumulate(self._pairs(part, site, affine))

    def _pairs(
        self, part: Part, site: Site, affine: Mapping[int, Affine]
    ) -> Iterator[tuple[NDArray[np.floating], NDArray[np.floating]]]:
        for feeds in self.data.batches(part, self.batch):
            if affine:
                x = self.probe.run(feeds, affine, [site.input])[site.input]
                y = self.probe.run(feeds, {}, [site.output])[site.output]
            else:
                both = self.probe.run(feeds, {}, [site.input, site.output])
                x, y = both[site.input], both[site.output]
            yield x, y

    def feeds(self, part: Part) -> Iterator[Feeds]:
        yield from self.data.batches(part, self.batch)


@dataclass(frozen=True)
class Refitted:
    """A region's compensated affine maps, with each site's relative error on what was fitted and on the select part."""

    affine: tuple[Affine, ...]
    fitted_errors: tuple[float, ...]
    errors: tuple[float, ...]


def refit_run(
    calibrator: Calibrator,
    sites: Sequence[Site],
    old: Sequence[Affine],
    partition: Sequence[tuple[Labels, Labels]],
    upstream: Mapping[int, Affine],
) -> Refitted:
    """Compensate a run of sites one after another, each on what the rewritten sites before it really feed it.

    partition: row and column labels of each site. upstream: affine maps already rewritten elsewhere in the model.
    """
    placed = dict(upstream)
    fitted: list[Affine] = []
    errors: list[tuple[float, float]] = []
    for site, affine, (rows, columns) in zip(sites, old, partition, strict=True):
        fit = calibrator.moments("fit", site, placed)
        select = calibrator.moments("select", site, placed)
        best = best_refit(fit, select, affine, rows, columns)
        live = columns != DROPPED
        placed[site.index] = best
        fitted.append(best)
        errors.append((relative_error(fit, best, live), relative_error(select, best, live)))
    return Refitted(tuple(fitted), *zip(*errors, strict=True))
