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
from scipy.sparse import csc_array, eye_array

from onnx_decomp.axes import Region
from onnx_decomp.calibration import Data, Feeds
from onnx_decomp.passes.compensation import STEP, Calibrator
from onnx_decomp.passes.judging import Judge
from onnx_decomp.passes.ridge import TINY
from onnx_decomp.program import Program
from onnx_decomp.sites import Affine, Site

Array = NDArray[np.float64]

ROWS, GROUPS = 512, 4
"""Of a site's output that are looked at while its columns are moved, and groups that their samples are seen in."""

SKETCH = 2**15
"""Numbers that stand for the outputs of one group."""


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

    That is a run of the model for each column, on `most` samples at most, in a few groups that say how far to trust
    them. None where the outputs are not arrays of floats.
    """
    probe = program.probe
    assert probe is not None
    wanted = min(-(-ROWS // program.rows_per_sample[site.index]), most, program.data.samples("fit"))
    old = program.affine(site)
    bias = np.zeros(site.shape[1], np.float32) if old.bias is None else old.bias
    step = np.float32(2 * STEP * np.sqrt(max(calibrator.moments("fit", site, {}).yy.mean(), TINY)))
    found = []
    for feeds in sample_groups(program.data, wanted):
        made = probe.run(feeds, {})
        original = {n: a for n, a in made.items() if isinstance(a, np.ndarray) and a.dtype.kind == "f"}
        if not original:
            return None
        shorter = projection(sum(array.size for array in original.values()))
        moved = []
        for column in range(site.shape[1]):
            shifted = bias + step * (np.arange(site.shape[1]) == column)
            made = probe.run(feeds, {site.index: Affine(old.weight, shifted.astype(np.float32))})
            changes = [judge.outward(name, array, made[name]) for name, array in original.items()]
            moved.append(shorter @ np.concatenate(changes))
        slopes = np.stack(moved) / step
        found.append(slopes @ slopes.T)
    result = shrunk(found)
    return result if np.isfinite(result).all() and result.any() else None


def sample_groups(data: Data, samples: int) -> list[Feeds]:
    """So many samples of the fit part, from all over it, in groups of one size: at least two where there are so many.

    A model that fixes how many it takes is fed whole runs.
    """
    size = data.fixed or max(samples // GROUPS, 1)
    count = min(max(samples // size, 2), GROUPS)
    batches = list(data.batches("fit", size))
    return batches[:: max(len(batches) // count, 1)][:count]


def projection(length: int) -> csc_array:
    """[at most SKETCH, length]: the identity, or where that is long a projection that about keeps inner products.

    It is drawn as by Clarkson and Woodruff (2013): each entry is added to one of the sums, or taken off.
    """
    if length <= SKETCH:
        return csc_array(eye_array(length))
    rng = np.random.default_rng(0)
    signs, sums = rng.choice([-1.0, 1.0], length), rng.integers(0, SKETCH, length)
    return csc_array((signs, sums, np.arange(length + 1)), shape=(SKETCH, length))


def shrunk(found: Sequence[Array]) -> Array:
    """The mean of what groups of samples show, drawn towards a multiple of the identity as far as they disagree.

    What the few samples that were looked at hardly notice, others may: the estimate of Ledoit and Wolf (2004).
    """
    mean: Array = np.mean(found, axis=0)
    flat = np.eye(len(mean)) * np.trace(mean) / len(mean)
    spread = sum(float(np.sum((each - mean) ** 2)) for each in found)
    noise, far = spread / max(len(found) * (len(found) - 1), 1), float(np.sum((mean - flat) ** 2))
    share = min(noise / far, 1.0) if far > 0 else 0.0
    result: Array = (1 - share) * mean + share * flat
    return result
