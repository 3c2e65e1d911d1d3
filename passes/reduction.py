"""Drop hidden units that the layer after them can do without.

Optimal brain surgeon on whole units: a layer y = x W reads hidden units x with second moments H = E[x x'] + lam I. If
unit j goes and the remaining rows of W are refitted, the squared error grows by

    |W_j|^2 / (H^-1)_jj

(Hassibi and Stork 1993, applied to a row instead of a weight). Units go greedily, a few at a time, with W and H^-1
downdated after each step, so the whole path from all units to none is known at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

Array = NDArray[np.float64]

STEPS = 256
"""Rounds of the greedy path: widths up to this lose one unit a round."""
TINY = float(np.finfo(np.float32).tiny)
RIDGE = 1e-6
"""Relative to the mean variance of a unit; keeps H invertible where units are dead or copies of each other."""


@dataclass(frozen=True)
class UnitPath:
    """order: [H] units in the order of removal. squared: [H + 1] squared error of y, summed over outputs, that removing
    the first 0, 1, ... H units adds with the rest refitted; infinite where the path was not followed so far."""

    order: NDArray[np.intp]
    squared: Array
    total: float
    """Squared size of y, summed over outputs."""

    @property
    def error(self) -> Array:
        """[H + 1] relative error: of y's standard deviation."""
        result: Array = np.sqrt(self.squared / self.total)
        return result

    def keep(self, threshold: float) -> NDArray[np.intp]:
        """The smallest set of units whose predicted relative error stays at or under `threshold`, in unit order."""
        gone = int(np.searchsorted(self.error, threshold, side="right")) - 1
        return np.sort(self.order[max(gone, 0) :])

    def keep_count(self, count: int) -> NDArray[np.intp]:
        """The `count` units that go last, in unit order."""
        return np.sort(self.order[len(self.order) - count :])


def unit_path(xx: Array, weight: NDArray[np.floating], least: int = 0) -> UnitPath:
    """The greedy path for units with centred second moments xx [H, H], read through weight [H, N].

    least: how many units are left where the path need not be followed any further; their order is by what they cost.
    """
    size = len(xx)
    lam = RIDGE * max(float(np.trace(xx)) / size, TINY)
    inverse = linalg.inv(xx + lam * np.eye(size), overwrite_a=True, check_finite=False)
    w = old = weight.astype(np.float64)
    total = max(float(np.sum(w * (xx @ w))), np.finfo(np.float64).tiny)
    units = np.arange(size)
    order: list[NDArray[np.intp]] = []
    squared, penalised = [np.zeros(1)], 0.0
    step = max(1, size // STEPS)
    while units.size > least:
        loss = np.einsum("hn,hn->h", w, w) / np.diagonal(inverse)
        gone = np.zeros(len(units), bool)
        gone[np.argsort(loss, kind="stable")[: min(step, units.size - least)]] = True
        order.append(units[gone])
        w, inverse, joint = _without(w, inverse, gone)
        units = units[~gone]
        penalised += joint
        # What the ridge adds for moving away from the old weights is no error of y.
        moved = np.sum((w - old[units]) ** 2) + np.sum(old**2) - np.sum(old[units] ** 2)
        before, error = squared[-1][-1], max(penalised - lam * float(moved), 0.0)
        squared.append(np.linspace(before, max(before, error), len(order[-1]) + 1)[1:])
    if units.size:
        loss = np.einsum("hn,hn->h", w, w) / np.diagonal(inverse)
        order.append(units[np.argsort(loss, kind="stable")])
        squared.append(np.full(units.size, np.inf))
    return UnitPath(np.concatenate(order), np.concatenate(squared), total)


def _without(w: Array, inverse: Array, gone: NDArray[np.bool_]) -> tuple[Array, Array, float]:
    """The remaining rows of w [h, N] refitted, the inverse [h, h] of what remains, and the squared error added."""
    across = inverse[np.ix_(~gone, gone)]
    corner = linalg.cho_factor(inverse[np.ix_(gone, gone)])
    solved = linalg.cho_solve(corner, w[gone])
    joint = max(float(np.sum(w[gone] * solved)), 0.0)
    rest = inverse[np.ix_(~gone, ~gone)] - across @ linalg.cho_solve(corner, across.T)
    return w[~gone] - across @ solved, rest, joint


def round_up(count: int, size: int, multiple: int = 16) -> int:
    """A width that vector units like: up to the next multiple, never above what there is."""
    return min(size, -(-count // multiple) * multiple) if count > multiple // 2 else min(size, max(count, 1))
