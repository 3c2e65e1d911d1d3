"""Tests of scores z [K, N] that are N(0, 1) where training changed nothing.

Entries, rows, columns and tiles for the report (Benjamini-Hochberg), the spectrum for the learned rank, and block
pairs for the structure (Holm: one false edge joins two blocks).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats
from scipy.linalg import blas, lapack

Matrix = NDArray[np.float32]
Vector = NDArray[np.float64]

LEVEL = 0.05
"""False discovery rate of what is reported."""


def entry_p_values(z: NDArray[np.floating]) -> Vector:
    """Two-sided p-values of normal scores."""
    p: Vector = 2 * special.ndtr(-np.abs(z, dtype=np.float64))
    return p


def supported(p: Vector) -> NDArray[np.bool_]:
    """Which hypotheses Benjamini and Hochberg (1995) reject at false discovery rate LEVEL."""
    rejected: NDArray[np.bool_] = stats.false_discovery_control(np.clip(p, 0, 1)) <= LEVEL
    return rejected


@dataclass(frozen=True)
class SetTests:
    """p-values of sums of z² against χ² with as many degrees of freedom as entries."""

    rows: Vector
    cols: Vector
    tiles: Vector
    """[K/side, N/side]; tiles at the border are smaller."""


def set_tests(z: Matrix, side: int = 32) -> SetTests:
    """Row, column and tile tests of z [K, N]."""
    K, N = z.shape
    rows, strips = np.empty(K), []
    for part in slabs(z, side):
        square = z[part].astype(np.float32) ** 2
        rows[part] = square.sum(1, dtype=np.float64)
        strips.append(np.add.reduceat(square, np.arange(0, len(square), side), axis=0, dtype=np.float64))
    strip = np.concatenate(strips)
    tiles = np.add.reduceat(strip, np.arange(0, N, side), axis=1)
    heights, widths = (np.diff(np.append(np.arange(0, n, side), n)) for n in (K, N))
    return SetTests(
        *(
            np.asarray(stats.chi2.sf(total, entries))
            for total, entries in ((rows, N), (strip.sum(0), K), (tiles, np.outer(heights, widths)))
        )
    )


def learned_rank(z: Matrix) -> int:
    """Singular values of z [K, N] above the Marchenko-Pastur edge √K + √N of pure noise.

    Counted, not computed: by Sylvester's law the eigenvalues of the Gram matrix above t are the positive pivots of
    the LDLᵀ factorisation of Gram - t (Bunch and Kaufman: each 2x2 pivot holds one positive and one negative).
    """
    small = z if z.shape[0] <= z.shape[1] else z.T
    edge = np.sqrt(z.shape[0]) + np.sqrt(z.shape[1])
    gram = np.zeros((len(small), len(small)), np.float32, order="F")
    for start in range(0, small.shape[1], 1024):  # half of it, as it is symmetric
        part = np.asfortranarray(small[:, start : start + 1024])
        gram = blas.ssyrk(1.0, part, beta=1.0, c=gram, lower=1, overwrite_c=1)
    # Finite-size fluctuations of the largest noise eigenvalue (Tracy-Widom): three of their scales to the edge.
    fluctuation = edge * (1 / np.sqrt(z.shape[0]) + 1 / np.sqrt(z.shape[1])) ** (1 / 3)
    gram[np.diag_indices_from(gram)] -= np.float32(edge**2 + 3 * fluctuation)
    factor, pivots, _ = lapack.ssytrf(gram, lower=1, overwrite_a=1)
    single = pivots > 0
    return int((np.diagonal(factor)[single] > 0).sum() + (~single).sum() // 2)


def holm(p: Vector) -> Vector:
    """Family-wise adjusted p-values (Holm 1979), of any shape."""
    order = np.argsort(p, axis=None)
    steps = p.ravel()[order] * np.arange(p.size, 0, -1)
    adjusted = np.empty(p.size)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted.reshape(p.shape)


@dataclass(frozen=True)
class PairTests:
    """Block pairs of one layer: all [G, G], rows x columns."""

    p: Vector
    """Off-diagonal: p-value that the block's mean z² exceeds that of the other off-diagonal blocks; diagonal: 1."""
    level: Vector
    """Mean z² of each block (0 where empty)."""


def block_pair_tests(
    z: Matrix, row_labels: NDArray[np.int32], col_labels: NDArray[np.int32], G: int
) -> PairTests:
    """Does an off-diagonal block, as a set, beat the pool of the other ones?

    Both sums of z² are scaled χ² whatever the scale of the jitter, so their ratio is F(m, M - m). Heavier tails
    than normal only make a χ² of fewer degrees: m is divided by (kurtosis - 1)/2 of the pool (Box 1953).
    """
    row, col = one_hot(row_labels, G), one_hot(col_labels, G)
    total, fourth = np.zeros((G, G)), np.zeros((G, G))
    for part in slabs(z):
        square = z[part] ** 2
        total += row[part].T @ (square @ col)
        square *= square
        fourth += row[part].T @ (square @ col)
    m = np.outer(row.sum(0, dtype=np.float64), col.sum(0, dtype=np.float64))
    off = ~np.eye(G, dtype=bool)
    pool, entries = total[off].sum(), m[off].sum()
    kurtosis = fourth[off].sum() * entries / max(pool**2, 1e-30)
    dilution = max((kurtosis - 1) / 2, 1.0)
    level = total / np.maximum(m, 1)
    rest = (pool - total) / np.maximum(entries - m, 1)
    ratio = level / np.maximum(rest, 1e-12)
    p = stats.f.sf(ratio, np.maximum(m, 1) / dilution, np.maximum(entries - m, 1) / dilution)
    return PairTests(np.where(off & (m > 0) & (entries > m), p, 1.0), level)


def one_hot(labels: NDArray[np.int32], G: int) -> Matrix:
    """Membership [n, G] of labels [n]; DROPPED belongs nowhere."""
    member: Matrix = (labels[:, None] == np.arange(G)).astype(np.float32)
    return member


def slabs(z: NDArray[Any], multiple: int = 1) -> Iterator[slice]:
    """Consecutive row slices of about a million entries, so that temporaries stay small."""
    height = max(1, (1 << 20) // max(z.shape[1], 1) // multiple) * multiple
    return (slice(start, min(start + height, len(z))) for start in range(0, len(z), height))
