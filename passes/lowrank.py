"""Write W as a product of two thin matrices: reduced-rank regression, weighted on both sides.

For y = x W + b with second moments C = E[x x'] of what is fed, and a matrix S that says how much errors of y matter
(`importance`), the best map of rank r minimises

    E |(y - x W' - b)|_S^2 = |C^(1/2) (W - W') S^(1/2)|^2 + const        over W' of rank r

with W the least-squares map. It is the truncated singular value decomposition of C^(1/2) W S^(1/2), mapped back
(Eckart and Young 1936; Izenman 1975 for the regression). With S = I this is whitened SVD, with C = S = I plain SVD.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

Array = NDArray[np.float64]

FLOOR_X, FLOOR_S = 1e-10, 1e-6
"""Added to the diagonals of C and of S, relative to their means: directions that the data never show, and those that
nothing reads, keep a little weight. The first counts as error, so it has to be far below any tolerance."""

TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Factoring:
    """All ranks of one matrix W [k, n] at once.

    tail: [m + 1] weighted squared error at rank 0, 1, ..., m = min(k, n); the last is 0.
    """

    tail: Array
    _weight: Array
    _right: Array | None
    """S^(1/2), lower triangular [n, n]; None: the identity, which may be large."""
    _directions: Array
    """[m, n] right singular vectors of C^(1/2) W S^(1/2)."""

    def truncated(self, rank: int) -> Array:
        """The best map of that rank, [k, n]."""
        kept = self._directions[:rank]
        if self._right is None:
            whole: Array = (self._weight @ kept.T) @ kept
            return whole
        down = self._weight @ (self._right @ kept.T)
        up = linalg.solve_triangular(self._right, kept.T, lower=True, trans="T", check_finite=False).T
        result: Array = down @ up
        return result


def factor(xx: Array, weight: NDArray[np.floating], importance: Array | None = None) -> Factoring:
    """Factor weight [k, n] for inputs with second moments xx [k, k]; importance: S [n, n], else every output alike."""
    w = weight.astype(np.float64)
    left = root(xx, FLOOR_X)
    right = None if importance is None else root(importance, FLOOR_S)
    core = left.T @ w if right is None else left.T @ w @ right
    # The smaller side's eigenvectors are enough, and several times cheaper than the decomposition itself.
    if core.shape[0] < core.shape[1]:
        values, vectors = linalg.eigh(core @ core.T, check_finite=False)
        squares, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
        scale = np.sqrt(np.maximum(squares, squares[0] * 1e-14 + TINY))
        directions = (vectors.T @ core) / scale[:, None]
    else:
        values, vectors = linalg.eigh(core.T @ core, check_finite=False)
        squares, directions = np.maximum(values[::-1], 0.0), vectors[:, ::-1].T
    tail = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])
    return Factoring(tail, w, right, directions)


def root(moments: Array, relative: float) -> Array:
    """L, lower triangular, with L L' = moments and a floor under its diagonal."""
    size = len(moments)
    floor = relative * max(float(np.trace(moments)) / size, TINY)
    while True:
        try:
            root: Array = linalg.cholesky(moments + floor * np.eye(size), lower=True, check_finite=False)
        except linalg.LinAlgError:  # rounding has made it indefinite
            floor *= 10
        else:
            return root
