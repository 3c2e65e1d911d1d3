"""What can go for nothing: units that never change, that nothing reads, or that copy another one.

With x_j = c the bias of what reads unit j takes c W_j in; with x_j = a x_i + c its row is added to that of unit i, a
times. Nothing is approximated, so nothing is refitted. On calibration data "never" means never there, which held-back
samples have to confirm; without data only what the weights themselves prove is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_decomp.passes.moments import Array, Moments
from onnx_decomp.sites import Affine

ROUNDING = 1e-12
"""Share of a variance that is rounding of float32 samples, squared: a residual below it is none."""
UNREAD, CONSTANT = -1, -2


@dataclass(frozen=True)
class Folding:
    """What becomes of each of H units.

    onto: [H] the unit that stands for it (itself where it stays), CONSTANT or UNREAD. slope, offset: [H] its value as
    slope times that of the other one, plus offset; the constant itself where it is one.
    """

    onto: NDArray[np.intp]
    slope: Array
    offset: Array

    @property
    def keep(self) -> NDArray[np.bool_]:
        """[H], units that stay."""
        stays: NDArray[np.bool_] = self.onto == np.arange(len(self.onto))
        return stays

    def apply(self, reader: Affine) -> Affine:
        """The map [H, N] that reads the units that stay, with zero rows for all others."""
        gone, copied = ~self.keep, (self.onto >= 0) & ~self.keep
        weight = reader.weight.astype(np.float64)
        bias = np.zeros(weight.shape[1]) if reader.bias is None else reader.bias.astype(np.float64)
        bias = bias + self.offset[gone] @ weight[gone]
        np.add.at(weight, self.onto[copied], self.slope[copied, None] * weight[copied])
        weight[gone] = 0.0
        return Affine(weight.astype(np.float32), bias.astype(np.float32))


def fold_units(moments: Moments, readers: Sequence[Affine], proven: Proven | None = None) -> Folding:
    """Which units x [H], with the given moments, can go exactly; `readers` are all maps [H, N] that read them.

    proven: without calibration data, what the weights prove; nothing else goes then.
    """
    size = len(moments.mean_x)
    onto, slope, offset = np.arange(size), np.ones(size), np.zeros(size)
    variance = np.diagonal(moments.xx)
    still = variance <= ROUNDING * (moments.mean_x**2 + float(variance.mean()))
    if proven is not None:
        still = proven.constant
    unread = ~np.any([reader.weight.any(axis=1) for reader in readers], axis=0)
    if proven is None:
        twin = _twins(moments.xx, ~still & ~unread)
    else:  # a unit that goes itself, because nothing reads it, stands for no other
        twin = np.where(still | unread[proven.twin], onto, proven.twin)
    copied = twin != onto
    onto[copied] = twin[copied]
    slope[copied] = moments.xx[copied, twin[copied]] / np.maximum(
        variance[twin[copied]], np.finfo(float).tiny
    )
    offset[copied] = moments.mean_x[copied] - slope[copied] * moments.mean_x[twin[copied]]
    onto[still], slope[still], offset[still] = CONSTANT, 0.0, moments.mean_x[still]
    onto[unread], slope[unread], offset[unread] = UNREAD, 0.0, 0.0
    return Folding(onto, slope, offset)


def _twins(xx: Array, alive: NDArray[np.bool_]) -> NDArray[np.intp]:
    """The first unit that each one is a multiple of, itself for most: a correlation of one, up to rounding."""
    twin = np.arange(len(xx))
    chosen = np.flatnonzero(alive)
    if not chosen.size:
        return twin
    scale = 1 / np.sqrt(np.maximum(np.diagonal(xx)[chosen], np.finfo(float).tiny))
    part = xx[np.ix_(chosen, chosen)] * scale[:, None] * scale[None, :]
    same = 1 - part**2 <= ROUNDING
    np.fill_diagonal(same, True)
    twin[chosen] = chosen[same.argmax(axis=1)]
    return twin


@dataclass(frozen=True)
class Proven:
    """What weights alone prove of H units, whatever is fed: constant [H], and the first unit that each one copies."""

    constant: NDArray[np.bool_]
    twin: NDArray[np.intp]


def prove(writers: Sequence[Affine], alike: bool) -> Proven:
    """From all maps [K, H] that write the units. alike: every unit is treated the same after that."""
    columns = [
        w if w.bias is not None else Affine(w.weight, np.zeros(w.weight.shape[1], np.float32))
        for w in writers
    ]
    constant = ~np.any([w.weight.any(axis=0) for w in writers], axis=0)
    twin = np.arange(len(constant))
    if alike:
        stacked = np.concatenate([np.vstack([w.weight, np.asarray(w.bias)[None]]) for w in columns])
        _, first, back = np.unique(stacked, axis=1, return_index=True, return_inverse=True)
        twin = first[back.reshape(-1)]
    return Proven(constant, np.asarray(twin, np.intp))
