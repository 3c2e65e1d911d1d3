"""How much an error of each site's output matters for what its region hands on: Gauss-Newton matrices, forward only.

An error e of a site's output [N] changes the outputs of the model by about e' S e, up to a factor for the region. At
an exit S is measured, by moving one column at a time, or taken to be the identity. In front of sites with weights W_r,
whose outputs matter by S_r, and elementwise operators with slopes s,

    S = sum over readers of (W_r S_r W_r') * E[s s']                      (elementwise product)

the recursion of Botev, Ritter and Barber (2017, KFRA) for a squared loss. The slopes come from running the region
twice, with a small step added to the site's bias: operators are elementwise, so one run moves all units at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from onnx_decomp.axes import Region
from onnx_decomp.calibration import Feeds
from onnx_decomp.passes.compensation import BATCH, STEP, Calibrator
from onnx_decomp.passes.judging import Judge
from onnx_decomp.passes.ridge import TINY
from onnx_decomp.program import Program
from onnx_decomp.sites import Affine, Site

Array = NDArray[np.float64]

ROWS, LEAST = 512, 2
"""Of a site's output that are looked at while its columns are moved, and samples in any case."""

HELD = 2**25
"""Changes of outputs that are held while the columns of one site are moved."""


def importances(
    calibrator: Calibrator,
    region: Region,
    affine: Sequence[Affine],
    placed: Mapping[int, Affine],
    exits: Mapping[int, Array],
) -> list[Array | None]:
    """S [N, N] for each site of a region as it stands with `affine` (`placed`: as the graph is fed); None: identity.

    exits: S of sites that hand on what they make, where it has been measured.
    """
    found: list[Array | None] = [exits.get(at) for at in range(len(region.sites))]
    for at in reversed(range(len(region.sites))):
        group = region.ends[at][1]
        readers = [other for other, (read, _) in enumerate(region.ends) if read == group]
        if group not in region.elastic or not readers or min(readers) <= at:
            continue
        total = np.zeros((len(affine[readers[0]].weight),) * 2)
        for tensor in dict.fromkeys(region.sites[other].input for other in readers):
            slopes = calibrator.slopes(region.sites[at], tensor, affine[at], placed)
            for other in readers:
                if region.sites[other].input == tensor:
                    total += through(affine[other].weight, found[other]) * slopes
        found[at] = total
    return found


def through(weight: NDArray[np.floating], importance: Array | None) -> Array:
    """W S W' for W [K, N]: what an error of x = y W costs."""
    w = weight.astype(np.float64)
    result: Array = w @ (w.T if importance is None else importance @ w.T)
    return result


def weighted(weight: NDArray[np.floating], importance: Array | None) -> Array:
    """W S^(1/2) for W [K, N], so that its rows' lengths say what they cost."""
    w = weight.astype(np.float64)
    if importance is None:
        return w
    values, vectors = np.linalg.eigh(importance)
    # Only directions that matter: few where the layers behind are narrow.
    kept = values > values[-1] * 1e-10
    result: Array = w @ (vectors[:, kept] * np.sqrt(values[kept]))
    return result


def moved_columns(
    judge: Judge, calibrator: Calibrator, site: Site, program: Program, most: int
) -> Array | None:
    """S [N, N] of a site that hands on what it makes: each column is moved by itself, and the outputs are looked at.

    That is one run of the model for each column, on `most` samples at most. None where the outputs are not arrays of
    floats.
    """
    probe = program.probe
    assert probe is not None
    samples = min(-(-ROWS // program.rows_per_sample[site.index]), most)
    feeds, original = _original(program, samples)
    held = site.shape[1] * sum(array.size for array in original.values())
    if held > HELD:
        feeds, original = _original(program, samples * HELD // held)
    if not original:
        return None
    old = program.affine(site)
    bias = np.zeros(site.shape[1], np.float32) if old.bias is None else old.bias
    step = np.float32(2 * STEP * np.sqrt(max(calibrator.moments("fit", site, {}).yy.mean(), TINY)))
    moved = []
    for column in range(site.shape[1]):
        shifted = bias + step * (np.arange(site.shape[1]) == column)
        made = probe.run(feeds, {site.index: Affine(old.weight, shifted.astype(np.float32))})
        moved.append(
            np.concatenate([judge.outward(name, value, made[name]) for name, value in original.items()])
        )
    slopes = np.stack(moved) / step
    result: Array = slopes @ slopes.T
    return result if np.isfinite(result).all() and result.any() else None


def _original(program: Program, samples: int) -> tuple[Feeds, Feeds]:
    """The first samples of the fit part, and the outputs of the model that are arrays of floats."""
    assert program.probe is not None
    feeds = next(program.data.batches("fit", BATCH))
    if program.data.fixed is None:
        feeds = {name: array[: max(samples, LEAST)] for name, array in feeds.items()}
    made = program.probe.run(feeds, {})
    return feeds, {n: a for n, a in made.items() if isinstance(a, np.ndarray) and a.dtype.kind == "f"}
