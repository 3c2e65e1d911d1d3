"""Centred second moments of what a layer reads and of what it ought to make: all that closed-form refits need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from onnx_decomp.program import Labels
from onnx_decomp.scratch import kept
from onnx_decomp.sites import Affine

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

PLENTY = 2
"""Rows for each input from which on moments are taken for what they are."""

STRIP = 512
"""Rows of a large matrix that are worked on at once."""


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

    @property
    def nbytes(self) -> int:
        return self.xx.nbytes + self.xy.nbytes

    def kept(self) -> Moments:
        """The same, in files where they are large."""
        return replace(self, xx=kept(self.xx), xy=kept(self.xy))

    def of(self, rows: Indices, columns: Indices) -> Moments:
        """Those of one block."""
        return Moments(
            self.rows,
            self.mean_x[rows],
            self.mean_y[columns],
            self.xx[np.ix_(rows, rows)],
            self.xy[np.ix_(rows, columns)],
            self.yy[columns],
        )


def accumulate(
    pairs: Iterable[tuple[NDArray[np.floating], NDArray[np.floating]]], blocks: Labels | None = None
) -> Moments:
    """One streaming pass over batches of x [T, K] and y [T, N]; memory is bounded by a batch and K x (K + N).

    Sums are taken around the first batch's mean, so that a large mean costs no precision.
    blocks: [K], where products of x across blocks are not needed; they are left out of `xx`.
    """
    rows = 0
    parts = [] if blocks is None else [np.flatnonzero(blocks == b) for b in np.unique(blocks)]
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
        if blocks is None:
            _add_squares(xx, x64)
        for part in parts:
            xx[np.ix_(part, part)] += x64[:, part].T @ x64[:, part]
        _add_products(xy, x64, y64)
        yy += np.einsum("tn,tn->n", y64, y64)
    if rows == 0:
        raise ValueError("no rows to take moments of")
    if blocks is None:
        _mirror(xx)
    dx, dy = sum_x / rows, sum_y / rows
    for products, other in ((xx, dx), (xy, dy)):
        for some in _strips(len(products)):
            products[some] /= rows
            products[some] -= np.outer(dx[some], other)
    yy = np.maximum(yy / rows - dy**2, 0.0)
    return Moments(rows, shift_x + dx, shift_y + dy, xx, xy, yy)


def _add_products(total: Array, x: Array, y: Array) -> None:
    """total [K, N] += x' y, in strips: these are the largest arrays that there are, and none is made beside them."""
    for some in _strips(len(total)):
        total[some] += x[:, some].T @ y


def _add_squares(total: Array, x: Array) -> None:
    """total [K, K] += x' x on and above the diagonal, which is half of the work: see `_mirror`."""
    for some in _strips(len(total)):
        total[some, some.start :] += x[:, some].T @ x[:, some.start :]


def _mirror(total: Array) -> None:
    for some in _strips(len(total)):
        total[some.stop :, some] = total[some, some.stop :].T


def _strips(size: int) -> Iterator[slice]:
    return (slice(start, start + STRIP) for start in range(0, size, STRIP))


def residual(moments: Moments, affine: Affine) -> float:
    """Mean squared error of y - (x W + b), summed over outputs, from moments alone."""
    weight = affine.weight.astype(np.float64)
    bias = np.zeros(weight.shape[1]) if affine.bias is None else affine.bias.astype(np.float64)
    spread = moments.yy.sum() - 2.0 * np.sum(weight * moments.xy) + np.sum(weight * (moments.xx @ weight))
    offset = moments.mean_y - moments.mean_x @ weight - bias
    return float(max(spread, 0.0) + offset @ offset)


def cautious(fit: Moments, held: Moments) -> Moments:
    """The same, but where there are few rows for each input, no direction of x is smaller than held-back rows show it.

    Few rows span few directions, and all others would look as if nothing were lost with them. The eigenvalues of `xx`
    are taken from other rows than its eigenvectors (Abadir, Distaso and Zikes, 2014), where that makes them larger.
    """
    if fit.rows >= PLENTY * len(fit.xx):
        return fit
    values, vectors = np.linalg.eigh(fit.xx)
    shown = np.einsum("ki,ki->i", vectors, held.xx @ vectors)
    unseen = values <= np.finfo(np.float64).eps * len(values) * values[-1]
    shown[unseen] = shown[unseen].mean() if unseen.any() else 0.0  # of those, any basis would have done
    return replace(fit, xx=(vectors * np.maximum(values, shown)) @ vectors.T)


def pooled(parts: Sequence[Moments]) -> Moments:
    """Moments around each part's own means, averaged over rows: those of one weight that is used several times."""
    if len(parts) == 1:
        return parts[0]
    rows = sum(part.rows for part in parts)

    def mean(values: Iterable[Array]) -> Array:
        return sum((part.rows / rows) * value for part, value in zip(parts, values, strict=True))  # type: ignore[return-value]

    return Moments(
        rows,
        mean(part.mean_x for part in parts),
        mean(part.mean_y for part in parts),
        mean(part.xx for part in parts),
        mean(part.xy for part in parts),
        mean(part.yy for part in parts),
    )
