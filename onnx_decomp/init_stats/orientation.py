"""Whether a stored matrix is W [K, N] or its transpose."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from onnx_decomp.init_stats.match import Step
from onnx_decomp.init_stats.sources import Entry
from onnx_decomp.sites import Site

CLEARLY = 6.0
"""Correlations differ clearly if by this over sqrt(entries): 4.2 standard errors of a difference of zero."""


def is_transposed(
    site: Site,
    entry: Entry,
    step: Step,
    initial: NDArray[np.float32],
    trained: Callable[[], NDArray[np.float32]],
) -> bool | None:
    """Whether the entry is W transposed; None where nothing tells.

    initial: the entry as stored, alpha folded in. trained: gives W [K, N]. The shape tells unless it is
    square. Then the correlation of the two does, where it is clear: training starts from the snapshot and
    rarely leaves it behind. Else the convention of where the entry comes from counts.
    """
    if entry.layout == "canonical":
        return False
    if site.shape[0] != site.shape[1]:
        return entry.shape != site.shape
    seen = _seen(initial, trained())
    if seen is not None:
        return seen
    if step in ("name", "generated") and entry.name == site.weight:
        return site.transposed
    return {"out-in": True, "in-out": False}.get(entry.layout)


def _seen(initial: NDArray[np.float32], trained: NDArray[np.float32]) -> bool | None:
    straight, turned = _correlation(initial, trained), _correlation(initial.T, trained)
    if abs(straight - turned) * sqrt(trained.size) < CLEARLY:
        return None
    return turned > straight


def _correlation(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Pearson's r over all entries, 0 where one of them is constant."""
    x, y = a - float(a.mean(dtype=np.float64)), b - float(b.mean(dtype=np.float64))
    scale = float(np.linalg.norm(x)) * float(np.linalg.norm(y))
    return float(np.vdot(x, y)) / scale if scale > 0.0 else 0.0
