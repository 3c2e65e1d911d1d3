"""Learned or still as initialised: what each weight says against the null it was drawn from.

The null of one entry is W = c W0 + jitter: its initial value, shrunk by weight decay, moved by the noise of the
optimiser. Three kinds of null tell how much is known of it: the initial values themselves (`snapshot`), their
distribution (`distribution`), or nothing but the weights (`estimated`). Each gives normal scores z [K, N], N(0, 1)
where training changed nothing. arXiv 2601.15871 states the idea and publishes no criterion; this one is defined in
docs/statistics.md, where every error rate is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from onnx_decomp.init_stats import Null
from onnx_decomp.passes.significance import (
    Matrix,
    Vector,
    entry_p_values,
    learned_rank,
    set_tests,
    slabs,
    supported,
)
from onnx_decomp.program import Evidence, Program
from onnx_decomp.scratch import kept
from onnx_decomp.sites import Site
from onnx_decomp.workers import spread

Scores = Callable[[Matrix], NDArray[np.floating]]
"""Normal scores of weights under a distribution."""

LIMIT = 40.0
"""Scores are clipped here: no decision changes beyond, and z² stays summable in float32."""
SAMPLE = 1 << 18
"""Entries that fits look at; their error is then far below the spread of one entry."""
ATOM = 0.01
"""Smallest share of exact zeros that is more than an accident."""
TRACE = 0.003
"""Smallest share of entries on one exact value of W/W0 that is more than an accident."""
EXACT = 0.3
"""Share of exactly unchanged entries from which the rest counts as learned, not as jitter."""
TOLERANCES = (1e-4, 1e-2)
"""The plateau on which entries count as frozen, in units of the initial scale (measured: 1e-5 is too tight)."""
PRECISE = 1e-3
"""Scale of unchanged entries in the exact case, in units of the initial scale: within the plateau."""
SLACK = 1.25
"""Largest c of a distribution null: jitter widens it a little; a scale that is off by two does not pass."""
MARGIN = 0.03
"""Practical margin of the fit. Learned entries move the central distance by up to 0.02, a wrong family by 0.06."""
FAMILY = 1e-3
"""Log likelihood per entry by which a normal null may beat the one that was named."""
NOTHING, SMALLEST = 1e-30, float(np.finfo(np.float32).tiny)
"""Size of initial weights beside the weights' own that is as good as zero; the least scale that float32 divides by."""
FORGOTTEN = 0.75
"""Noise this large against W0 and no trace of W0: the snapshot says nothing about these weights."""


@dataclass(frozen=True)
class NullFit:
    """c, the scale of an unchanged entry around its null (units of the weights), and whether that is true."""

    shrink: float
    scale: float
    fits: bool = True
    exact: bool = False
    """Nearly all unchanged entries hold exactly c W0 or 0: there is no jitter."""
    tolerance: tuple[float, float] = (0.0, 0.0)
    """Ends of the plateau of tolerances, in units of the weights."""
    atom: float | None = None
    """c of entries that hold exactly c W0; under jitter it may be another than that of the rest."""


def snapshot_evidence(W: Matrix, W0: Matrix, seed: int = 0) -> Evidence:
    """Evidence of W [K, N] against its initial values W0 [K, N]."""
    fit = fit_snapshot(W, W0, seed)
    frozen = _frozen(W, W0, fit)
    z = W0 * np.float32(-fit.shrink)
    z += W
    z[W == 0] = 0
    z /= np.float32(fit.scale)
    found = _evidence("snapshot", z, frozen, fit, seed)
    untouched = float(untouched_rows(W, W0, 1.0 if fit.atom is None else fit.atom).mean())
    return replace(found, summary={**found.summary, "untouched_rows": untouched})


def _frozen(W: Matrix, W0: Matrix, fit: NullFit) -> NDArray[np.bool_] | None:
    """Entries [K, N] that are exactly zero or on the atom, within the plateau's middle, or its low end under jitter."""
    frozen = _zeros(W)
    if fit.atom is None:
        return frozen
    frozen = np.zeros(W.shape, np.bool_) if frozen is None else frozen
    tolerance = np.float32(np.sqrt(np.prod(fit.tolerance)) if fit.exact else fit.tolerance[0])
    for rows in slabs(W):
        frozen[rows] |= np.abs(W[rows] - np.float32(fit.atom) * W0[rows]) <= tolerance
    return frozen


def untouched_rows(W: Matrix, W0: Matrix, shrink: float) -> NDArray[np.bool_]:
    """Rows [K] of W that are c W0 to the rounding of float32: inputs that were never active in training.

    Tighter than `frozen`, which forgives the rounding of many steps: a row that learned almost nothing did learn.
    """
    still = np.empty(len(W), np.bool_)
    for rows in slabs(W):
        expected = np.float32(shrink) * W0[rows]
        apart = np.abs(W[rows] - expected) > 4 * np.finfo(np.float32).eps * np.abs(expected)
        still[rows] = ~apart.any(axis=1)
    return still


def distribution_evidence(W: Matrix, scores: Scores, std: float, seed: int = 0) -> Evidence:
    """Evidence of W [K, N] against the distribution with the given normal scores and standard deviation."""
    fit = fit_distribution(W, scores, std, seed)
    z = np.empty_like(W)
    for rows in slabs(W):
        z[rows] = np.clip(scores(W[rows] / np.float32(fit.shrink)), -LIMIT, LIMIT)
    return _evidence("distribution", z, _zeros(W), fit, seed)


def estimated_evidence(W: Matrix, seed: int = 0) -> Evidence:
    """Evidence of W [K, N] against its own central mode: weaker, and flagged by its kind."""
    w = _sample(W, seed).astype(np.float64)
    w = w[w != 0]
    lines = two_lines(w, np.zeros_like(w))
    scale = float(lines.sigma[0]) or 1.0
    z = W / np.float32(scale)
    return _evidence("estimated", z, _zeros(W), NullFit(1.0, scale), seed)


# --- snapshot: W = c W0 + change ----------------------------------------------------------------------------------


def fit_snapshot(W: Matrix, W0: Matrix, seed: int = 0) -> NullFit:
    """c and the scale of unchanged entries, exact ones first.

    Exact zeros and an atom of W/W0 are unchanged entries. What is left is a mixture of two lines through the
    origin, W = c W0 + N(0, σ²); the tighter one is the null unless most unchanged entries were exact.
    """
    w, w0 = _sample(W, seed).astype(np.float64), _sample(W0, seed).astype(np.float64)
    if w0.std() <= NOTHING * w.std():
        w0 = np.zeros_like(w0)
    size = float(w0.std()) or float(w.std()) or 1.0
    alive = w != 0
    share = 1 - float(alive.mean())
    share = share if share >= ATOM else 0.0
    atom = find_atom(w[alive], w0[alive], size)
    if atom is not None:
        on_atom = np.abs(w - atom * w0) <= TOLERANCES[1] / 3 * size
        share += float((on_atom & alive).mean())
        alive &= ~on_atom
    lines = two_lines(w[alive], w0[alive])
    exact = share >= EXACT or (share > ATOM and lines.share[0] == 1.0)
    c = float(lines.slope[0])
    if atom is not None and (exact or abs(atom - c) < 0.05):
        c = atom
    coarse = _rounding(W, abs(c) * float(np.abs(w0).max(initial=0)))
    low = max(TOLERANCES[0] * size, coarse)
    forgotten = atom is None and share == 0 and lines.sigma[0] >= FORGOTTEN * size
    return NullFit(
        shrink=c,
        scale=max(0.0 if exact else float(lines.sigma[0]), PRECISE * size, coarse, SMALLEST),
        fits=not forgotten or left_trace(w[alive], w0[alive]),
        exact=exact,
        tolerance=(low, max(TOLERANCES[1] * size, 4 * low)),
        atom=atom,
    )


def find_atom(w: Vector, w0: Vector, size: float) -> float | None:
    """The value of w/w0 that a set of entries share exactly, or None.

    The densest window of sorted ratios is an atom if it holds a share of TRACE, and three times what its
    neighbourhood, twenty times as wide, would put there.
    """
    ratio = np.sort((w / np.where(w0 == 0, np.inf, w0))[np.abs(w0) > 0.1 * size])
    if len(ratio) < 100:
        return None
    width = np.maximum(2e-3 * np.abs(ratio), 1e-5)
    count = np.searchsorted(ratio, ratio + width) - np.arange(len(ratio))
    best = int(count.argmax())
    inside = ratio[best : best + count[best]]
    around = float(np.median(inside))
    near = np.diff(np.searchsorted(ratio, [around - 10 * width[best], around + 10 * width[best]]))[0]
    smooth = (near - count[best]) / 19
    if count[best] < max(TRACE * len(ratio), 3 * smooth, 20):
        return None
    tight = inside[np.abs(inside - around) <= 2 * np.median(np.abs(inside - around)) + 1e-7]
    return float(np.median(tight))


class Lines(NamedTuple):
    """Mixture of lines w = slope w0 + N(0, sigma²), each field one value per line."""

    slope: Vector
    sigma: Vector
    share: Vector
    likelihood: float


def two_lines(w: Vector, w0: Vector) -> Lines:
    """Maximum likelihood by EM from several starts, the tighter line first. w, w0: [n].

    The second line must earn its place (BIC); where it does not, both are the one line, with shares 1 and 0.
    """
    if len(w) < 20 or not w.any():
        return Lines(np.zeros(2), np.full(2, w.std() if len(w) else 0.0), np.array([1.0, 0.0]), 0.0)
    one = _em(w, w0, np.zeros((1, len(w))), 1)
    slopes = sorted({0.0, 1.0, float(one.slope[0])}) if w0.any() else [0.0]
    few = slice(0, 1 << 16)
    trials = []
    for start in product(slopes, slopes):
        sigma = max(float((w - start[0] * w0).std()), float(one.sigma[0])) * np.array([0.8, 1.4])
        log_start = _log_density(w[few], w0[few], np.array(start), sigma, np.array([0.8, 0.2]))
        trials.append(_em(w[few], w0[few], log_start, 12))
    best = max(trials, key=lambda trial: trial.likelihood)
    two = _em(w, w0, _log_density(w, w0, *best[:3]), 60)
    if two.likelihood - one.likelihood < 2.5 * np.log(len(w)) or two.share.min() < 0.005:
        return Lines(np.repeat(one.slope, 2), np.repeat(one.sigma, 2), np.array([1.0, 0.0]), one.likelihood)
    tighter = np.argsort(two.sigma)
    return Lines(two.slope[tighter], two.sigma[tighter], two.share[tighter], two.likelihood)


def left_trace(w: Vector, w0: Vector) -> bool:
    """Whether w still leans towards w0. If unrelated, w0 is exchangeable, and the score is N(0, 1) whatever w is."""
    lean = np.clip(w, *(np.median(np.abs(w)) * np.array([-3, 3]))) if len(w) else w
    spread = float(w0.std() * np.sqrt(lean @ lean)) if len(w) else 0.0
    return spread > 0 and float(lean @ (w0 - w0.mean())) > 3 * spread


def _em(w: Vector, w0: Vector, log_density: Vector, steps: int) -> Lines:
    """Steps of EM from log densities [lines, n], up to a constant."""
    floor = 1e-6 * float(np.abs(w).mean()) + 1e-30
    weight, _ = _expect(log_density)
    for _ in range(steps):
        mass = weight.sum(1) + 1e-9
        slope = (weight @ (w * w0)) / (weight @ (w0 * w0) + 1e-30)
        sigma = np.maximum(np.sqrt((weight * (w - slope[:, None] * w0) ** 2).sum(1) / mass), floor)
        weight, likelihood = _expect(_log_density(w, w0, slope, sigma, mass / len(w)))
    return Lines(slope, sigma, mass / len(w), likelihood)


def _log_density(w: Vector, w0: Vector, slope: Vector, sigma: Vector, share: Vector) -> Vector:
    z = (w - slope[:, None] * w0) / sigma[:, None]
    log_density: Vector = -0.5 * z * z + np.log(share / sigma / np.sqrt(2 * np.pi))[:, None]
    return log_density


def _expect(log_density: Vector) -> tuple[Vector, float]:
    """Responsibilities [lines, n] and the log likelihood; scipy's logsumexp takes five times as long."""
    largest = log_density.max(0)
    weight = np.exp(log_density - largest)
    total = weight.sum(0)
    return weight / total, float((largest + np.log(total)).sum())


# --- distribution: |W| is a mixture of |c W0| and something wider -------------------------------------------------


def fit_distribution(W: Matrix, scores: Scores, std: float, seed: int = 0) -> NullFit:
    """c by maximum likelihood on |W| in 128 bins of equal count; a normal null that does far better is a misfit."""
    w = np.abs(_sample(W, seed))
    exact = float((w == 0).mean()) >= ATOM
    w = w[w > 0]
    if len(w) < 100 or std <= 0:
        return NullFit(1.0, std or 1.0, exact, exact)
    best = _best_shrink(w, scores, std)
    normal = _best_shrink(w, lambda x: x / np.float32(std), std)
    family = best.likelihood > normal.likelihood - FAMILY * len(w)
    c = min(best.c, SLACK)
    return NullFit(c, c * std, exact or (family and best.share > 0.02 and best.c <= SLACK), exact)


class Shrink(NamedTuple):
    """The c under which |w| is best a mixture of the shrunk null and a wider normal."""

    c: float
    likelihood: float
    share: float
    """Of the null."""


def _best_shrink(w: Matrix, scores: Scores, std: float) -> Shrink:
    """Coarse, then fine grid over c; c = 1 wins unless the weights clearly say otherwise."""
    edges = np.quantile(w, np.linspace(0, 1, 129)[1:-1]).astype(np.float32)
    bins = np.searchsorted(edges, w)
    count = np.bincount(bins, minlength=len(edges) + 1).astype(np.float64)
    square = np.bincount(bins, w.astype(np.float64) ** 2, len(edges) + 1) / np.maximum(count, 1)
    coarse = _shrunk_mixtures(np.geomspace(0.005, 3, 80), edges, count, square, scores, std)
    c = max(coarse, key=lambda found: found.likelihood).c
    fine = _shrunk_mixtures(
        np.append(c * np.geomspace(0.93, 1.07, 41), 1.0), edges, count, square, scores, std
    )
    best = max(fine, key=lambda found: found.likelihood)
    plain = max((found for found in fine if found.c == 1.0), key=lambda found: found.likelihood)
    return plain if plain.likelihood > best.likelihood - max(4.0, 1e-4 * len(w)) else best


def _shrunk_mixtures(
    grid: Vector, edges: Matrix, count: Vector, square: Vector, scores: Scores, std: float
) -> list[Shrink]:
    """EM over share and width of the learned part, for every c of a grid [C] at once, on binned |w| [bins]."""
    grid, share = np.tile(grid, 3), np.repeat([0.5, 0.8, 0.95], len(grid))  # EM is slow where parts overlap
    at = np.abs(scores((edges / grid[:, None]).astype(np.float32)).astype(np.float64))
    null = np.diff(2 * special.ndtr(at) - 1, axis=1, prepend=0, append=1)
    second = count @ square / count.sum()
    wide = np.sqrt(np.maximum((second - share * (grid * std) ** 2) / (1 - share), (1.1 * grid * std) ** 2))
    for _ in range(100):
        learned = np.diff(2 * special.ndtr(edges / wide[:, None]) - 1, axis=1, prepend=0, append=1)
        mixed = share[:, None] * null + (1 - share)[:, None] * learned + 1e-12
        mass = count * (share[:, None] * null / mixed)
        share = mass.sum(1) / count.sum()
        rest = count - mass
        wide = np.maximum(np.sqrt((rest * square).sum(1) / (rest.sum(1) + 1e-9)), 1.1 * grid * std)
    pure = (count * np.log(null + 1e-12)).sum(1)  # EM reaches a share of 1 only in the limit
    likelihood = (count * np.log(mixed)).sum(1)
    share = np.where(pure >= likelihood, 1.0, share)
    return [Shrink(*map(float, row)) for row in zip(grid, np.maximum(pure, likelihood), share, strict=True)]


# --- the evidence --------------------------------------------------------------------------------------------------


def central_distance(z: Matrix) -> float:
    """Kolmogorov-Smirnov distance of |z| from |N(0, 1)|, both below 1: what was learned lies mostly beyond."""
    inner = np.abs(z[(np.abs(z) < 1) & (z != 0)])
    if len(inner) < 100:
        return 0.0
    return float(
        stats.kstest(special.erf(inner / np.sqrt(2)) / special.erf(np.sqrt(0.5)), "uniform").statistic
    )


def _evidence(
    kind: Literal["snapshot", "distribution", "estimated"],
    z: Matrix,
    frozen: NDArray[np.bool_] | None,
    fit: NullFit,
    seed: int,
) -> Evidence:
    np.clip(z, -LIMIT, LIMIT, out=z)
    sets, sample = set_tests(z), _sample(z, seed)
    # Where unchanged entries are exact there is no jitter, and its scale is a convention.
    misfit = 0.0 if kind == "snapshot" and fit.exact else central_distance(sample)
    sampling = 1.63 / np.sqrt(len(sample))
    misfits = kind == "distribution" and frozen is None and misfit > MARGIN + sampling
    return Evidence(
        kind=kind,
        z=z,
        frozen=frozen,
        shrink=fit.shrink,
        scale=fit.scale,
        fits=fit.fits and not misfits,
        misfit=misfit,
        supported=float(supported(entry_p_values(sample)).mean()),
        learned_rank=learned_rank(z),
        summary={
            "supported_rows": float(supported(sets.rows).mean()),
            "supported_cols": float(supported(sets.cols).mean()),
            "supported_tiles": float(supported(sets.tiles.ravel()).mean()),
            "frozen": 0.0 if frozen is None else float(frozen.mean()),
            "frozen_low": fit.tolerance[0] / fit.scale,
            "frozen_high": fit.tolerance[1] / fit.scale,
        },
    )


def _sample(array: Matrix, seed: int) -> Matrix:
    """At most SAMPLE entries [n], the same ones for arrays of one shape."""
    flat = array.reshape(-1)
    if flat.size <= SAMPLE:
        return flat
    return flat[np.random.default_rng(seed).integers(0, flat.size, SAMPLE)]


def _zeros(W: Matrix) -> NDArray[np.bool_] | None:
    """Entries that vanished exactly, where they are more than an accident."""
    zero = W == 0
    return zero if zero.mean() >= ATOM else None


def _rounding(W: Matrix, size: float) -> float:
    """Rounding of weights of a size that were stored as float16; 0 for float32."""
    some = W[:64].reshape(-1)
    half = some.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), some):
        return 0.0
    return float(np.spacing(np.float16(min(size, 6e4))))


def matrix_evidence(W: Matrix, W0: Matrix | None, null: Null | None, seed: int) -> Evidence:
    """The evidence of W [K, N] against its initial values W0 [K, N], else its distribution, else itself."""
    if W0 is not None:
        return snapshot_evidence(W, W0, seed)
    if null is None:
        return estimated_evidence(W, seed)
    return distribution_evidence(W, null.normal_scores, null.std(), seed)


@dataclass(frozen=True)
class Criterion:
    """Fills `program.evidence` for every site that can be rewritten; declines those whose null does not fit."""

    name: str = "criterion"

    def run(self, program: Program) -> None:
        sites = [site for site in program.sites if site.obstacle is None]
        jobs, scheduler = program.options.jobs, program.options.scheduler
        made = spread(matrix_evidence, sites, partial(_weights_and_null, program), jobs, scheduler)
        for site, found in zip(sites, made, strict=True):
            frozen = None if found.frozen is None else kept(found.frozen)
            program.evidence[site.index] = replace(found, z=kept(found.z), frozen=frozen)
            if not found.fits:
                program.decide(
                    self.name, site, "declined", "null-does-not-fit", misfit=found.misfit, shrink=found.shrink
                )


def _weights_and_null(program: Program, site: Site) -> tuple[Matrix, Matrix | None, Null | None, int]:
    """What the evidence of a site is made of: the strongest null that there is for it."""
    W, seed = kept(program.affine(site).weight), program.options.seed
    null = None if program.init is None else program.init.nulls.get(site.index)
    if null is None or null.kind == "estimated":
        return W, None, None, seed
    if null.kind == "snapshot":
        return W, kept(null.initial()), None, seed
    return W, None, replace(null, read=None), seed
