"""Which blocks the evidence of a run of layers falls into.

Exact first: where unchanged entries are exactly frozen, the blocks are the connected components of the rest, over all
axes of the run at once. Otherwise a likelihood: entries within a block follow one law of |z|, all others another,
both read off the data as tables over levels of |z|. Annealing moves every element of an axis at once (given the
labels of the neighbouring axes they are independent, so this is exact Gibbs sampling) while the temperature falls.

A structure counts only if it beats shuffled evidence: for a fixed grouping and a table r of mean 1 over the layer's own
entries, Hoeffding (1963, theorem 4) gives E exp(sum log r) <= 1 under random shuffling, so by the union over all
groupings and tables

    p <= exp(-(sum over in-block entries of log r - bits to name the groupings and tables, in nats)).

The same number is a description length, and so chooses how many blocks there are. See docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2, vq
from scipy.optimize import linear_sum_assignment
from scipy.sparse import block_array, csgraph, csr_array
from scipy.special import gammaln, ndtr

from onnx_decomp.passes.criterion import EXACT, block_pair_tests, holm, one_hot, slabs
from onnx_decomp.program import DROPPED, Evidence, Labels, Program, Structure

Matrix = NDArray[np.float32]
Vector = NDArray[np.float64]
Codes = NDArray[np.uint8]
Grouping = tuple[Labels, ...]
"""Labels of every axis of a run."""

EDGES = np.float32([0.02, 0.3, 0.6, 0.9, 1.2, 1.5, 1.8, 2.1, 2.4, 2.7, 3, 3.5, 4, 5, 6, 8, 12, 20, 35])
"""Levels of |z|: the first holds entries that are exactly unchanged."""
LEVELS = len(EDGES) + 1
STEP, SPAN = 0.25, 64
"""Log ratios of a table are told in SPAN steps of STEP nats: what a table costs is then finite."""
LEVEL = 0.01
"""Of a structure against shuffling, and family-wise of off-diagonal block pairs."""
MATERIAL = 1e-3
"""Rounding noise can be significant; an off-diagonal block also has to reach this share of the in-block level."""
MOST = 32
"""Blocks at most."""
DIMENSIONS = MOST + 1


class Reason(NamedTuple):
    """Why a layer is in no structure: a stable code, with numbers."""

    code: str
    numbers: dict[str, float]


@dataclass(frozen=True)
class Finding:
    """What was found on a run: structures, and for each layer in none of them the reason."""

    structures: tuple[Structure, ...]
    reasons: dict[int, Reason]


@dataclass(frozen=True)
class Options:
    """Of the search."""

    seed: int = 0
    restarts: int = 2
    """Independent searches that measure the stability."""
    sweeps: int = 12
    hottest: float = 0.5
    """First temperature, relative to how far apart the two best blocks of an element are."""


# --- the whole run ------------------------------------------------------------------------------------------------


def find_structure(evidence: Sequence[Evidence | None], options: Options = Options()) -> Finding:
    """Blocks of consecutive layers; evidence[l].z is [width l, width l+1]. None, or a misfit, cuts the run."""
    structures: list[Structure] = []
    reasons: dict[int, Reason] = {}
    start = 0
    for stop in range(len(evidence) + 1):
        found = evidence[stop] if stop < len(evidence) else None
        if found is not None and found.fits:
            continue
        if stop > start:
            _solve([e for e in evidence[start:stop] if e is not None], start, options, structures, reasons)
        if stop < len(evidence):
            reasons[stop] = Reason("null-does-not-fit", {} if found is None else {"misfit": found.misfit})
        start = stop + 1
    return Finding(tuple(sorted(structures, key=lambda s: s.start)), reasons)


def _solve(
    run: Sequence[Evidence],
    start: int,
    options: Options,
    structures: list[Structure],
    reasons: dict[int, Reason],
) -> None:
    """Solve layers start..start+len(run)-1 as one; where a layer does not bear the grouping, cut it out."""
    found = exact_structure(run, start) or annealed_structure(run, start, options)
    if isinstance(found, Structure):
        structures.append(found)
        return
    if len(run) == 1:
        reasons[start] = found.reason
        return
    cut = found.weakest
    for lo, hi in ((0, cut), (cut, cut + 1), (cut + 1, len(run))):
        if hi > lo:
            _solve(run[lo:hi], start + lo, options, structures, reasons)


class Failure(NamedTuple):
    """No structure on a run, and the layer that bears it least."""

    reason: Reason
    weakest: int


# --- exact: connected components ----------------------------------------------------------------------------------


def exact_structure(run: Sequence[Evidence], start: int = 0) -> Structure | None:
    """Components of the entries that are not frozen, the same ones over the longest stretch of tolerances."""
    if any(e.frozen is None or e.summary.get("frozen", 1.0) < EXACT / 3 for e in run):
        return None
    tried: list[Grouping] = []
    for step in np.linspace(0, 1, 5):
        labels = _components([_changed(e, float(step)) for e in run])
        tried.append(labels)
    best, length = tried[0], 0
    for first in range(len(tried)):
        same = [_same(tried[first], other) for other in tried[first:]]
        stretch = same.index(False) if False in same else len(same)
        if stretch > length and _count(tried[first]) > 1:
            best, length = tried[first], stretch
    if length < 2 or _count(best) < 2:
        return None
    layers = [Layer.read(e) for e in run]
    gains = layer_gains(layers, best, _count(best))
    p = float(np.exp(-max(gains.sum(), 0.0)))
    if p >= LEVEL or gains.min() <= 0:
        return None
    return Structure(start, start + len(run), best, _count(best), "exact", p, length / len(tried))


def _changed(e: Evidence, step: float) -> csr_array:
    """Entries [K, N] that are not frozen, at a tolerance from the tightest (0) to the widest (1)."""
    low, high = e.summary.get("frozen_low", 0.0), e.summary.get("frozen_high", 0.0)
    tolerance = low ** (1 - step) * high**step if low > 0 else 0.0
    changed = np.abs(e.z) > np.float32(tolerance)
    where = np.flatnonzero(changed.reshape(-1))
    rows, cols = changed.shape
    pointers = np.append(0, np.cumsum(np.count_nonzero(changed, axis=1)))
    index = (where % cols).astype(np.int32)
    return csr_array((np.ones(len(index), np.int8), index, pointers.astype(np.int32)), shape=(rows, cols))


def _components(layers: Sequence[csr_array]) -> Grouping:
    """Connected components over all axes of the run; only those that reach every axis are blocks."""
    widths = [layers[0].shape[0], *(layer.shape[1] for layer in layers)]
    grid: list[list[csr_array | None]] = [[None] * len(widths) for _ in widths]
    for axis, layer in enumerate(layers):
        grid[axis][axis + 1] = layer
        grid[axis][axis] = grid[axis][axis] or csr_array((widths[axis], widths[axis]), dtype=np.int8)
    grid[-1][-1] = csr_array((widths[-1], widths[-1]), dtype=np.int8)
    _, component = csgraph.connected_components(block_array(grid, format="csr"), directed=False)
    axes = np.split(component, np.cumsum(widths)[:-1])
    spanning = set(axes[0].tolist()).intersection(*(axis.tolist() for axis in axes[1:]))
    kept = np.full(int(component.max()) + 1, DROPPED, np.int32)
    kept[sorted(spanning)] = np.arange(len(spanning))
    return ordered(tuple(kept[axis] for axis in axes))


# --- annealed: a likelihood over levels of |z| --------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One layer's evidence as levels: codes [K, N], how often each level occurs, and a first guess of the ratio."""

    z: Matrix
    codes: Codes
    count: Vector

    @classmethod
    def read(cls, e: Evidence) -> Layer:
        codes = np.empty(e.z.shape, np.uint8)
        count = np.zeros(LEVELS)
        for rows in slabs(e.z):
            codes[rows] = np.searchsorted(EDGES, np.abs(e.z[rows]))
            count += np.bincount(codes[rows].reshape(-1), minlength=LEVELS)
        return cls(e.z, codes, count)

    def spread(self, table: Vector) -> Matrix:
        """The table's value at every entry [K, N]."""
        return table.astype(np.float32).take(self.codes)

    def learned(self) -> Vector:
        """For each level, the posterior that an entry was learned: 1 - local false discovery rate (Efron 2004)."""
        ends = np.append(EDGES.astype(np.float64), np.inf)
        null = np.diff(2 * ndtr(ends) - 1, prepend=0)
        share = self.count / self.count.sum()
        changed = share[1:].sum()
        # The exactly unchanged entries are a point mass of their own, beside the continuous null.
        unchanged = min(1.0, share[1:4].sum() / max(null[1:4].sum(), 1e-9)) if changed else 0.0
        rate = np.ones(LEVELS)
        rate[1:] = np.minimum(unchanged * null[1:] / np.maximum(share[1:], 1e-12), 1)
        posterior: Vector = np.maximum.accumulate(1 - rate)
        return posterior if posterior.max() > 0.05 else np.minimum(np.append(0, EDGES) ** 2, 9) / 9


class State(NamedTuple):
    """A grouping, how many blocks, and what each layer gains from it."""

    labels: Grouping
    blocks: int
    gains: Vector

    @property
    def gain(self) -> float:
        return float(self.gains.sum())


def annealed_structure(run: Sequence[Evidence], start: int, options: Options) -> Structure | Failure:
    """The best grouping that beats shuffling and has no supported off-diagonal block."""
    rng = np.random.default_rng(options.seed)
    layers = [Layer.read(e) for e in run]
    embedding, guess = embed(layers, rng)
    best = _search(layers, embedding, guess, rng, options)
    weakest = int(best.gains.argmin())
    p = float(np.exp(-max(best.gain, 0.0)))
    if p >= LEVEL or best.blocks < 2:
        return Failure(
            Reason("not-better-than-shuffled", {"gain": best.gain, "blocks": best.blocks}), weakest
        )
    if len(run) > 1 and best.gains[weakest] <= 0:
        return Failure(Reason("no-structure", {"gain": float(best.gains[weakest])}), weakest)
    merged, worst = _merge_supported(layers, best)
    if merged.blocks < 2:
        return Failure(Reason("off-block-evidence", {"blocks": best.blocks, "p": p}), worst)
    labels = ordered(_drop_dead(layers, merged))
    again = layer_gains(layers, labels, merged.blocks)
    p = float(np.exp(-max(again.sum(), 0.0)))
    if p >= LEVEL or _count(labels) < 2:
        return Failure(Reason("not-better-than-shuffled", {"gain": float(again.sum())}), int(again.argmin()))
    kept = stability(layers, replace_labels(merged, labels), embedding, options)
    return Structure(start, start + len(run), labels, _count(labels), "annealed", p, kept)


def replace_labels(state: State, labels: Grouping) -> State:
    return state._replace(labels=labels)


def _search(
    layers: Sequence[Layer],
    embedding: Sequence[Matrix],
    guess: int,
    rng: np.random.Generator,
    options: Options,
) -> State:
    """Anneal from the spectral guess and from more blocks than that, which then merge; keep the shortest description.

    Too many blocks to begin with, because merging two halves is one step, while parting two blocks that k-means
    took for one is many.
    """
    most = max(2, min(MOST, *(min(layer.codes.shape) for layer in layers)))
    first = min(max(guess, 2), most)
    best: State | None = None
    for G in dict.fromkeys(min(G, most) for G in (first, *(first + 1 + first // part for part in (4, 2, 1)), 8, 16, 28)):
        if best is not None and best.gain > 0 and G > 2 * best.blocks + 1:
            continue
        state = _consolidate(layers, anneal(layers, cluster(embedding, G, rng), G, rng, options), rng, options)
        best = state if best is None or state.gain > best.gain else best
    assert best is not None
    return best


def _consolidate(layers: Sequence[Layer], state: State, rng: np.random.Generator, options: Options) -> State:
    """Merge pairs of blocks, best first, while their common entries look learned; then settle again."""
    while state.blocks > 2:
        joint = np.zeros((state.blocks, state.blocks))
        tables = ratios(layers, state.labels, state.blocks)
        for layer, table, (rows, cols) in zip(layers, tables, pairwise(state.labels), strict=True):
            inside = layer.spread(np.log(table)) @ one_hot(cols, state.blocks)
            joint += one_hot(rows, state.blocks).T @ inside
        joint += joint.T
        np.fill_diagonal(joint, -np.inf)
        g, h = (int(i) for i in np.unravel_index(int(joint.argmax()), joint.shape))
        if joint[g, h] <= -sum(len(axis) for axis in state.labels):  # about what fewer names could save
            return state
        merged = merge(layers, state, g, h)
        settled = anneal(layers, merged.labels, merged.blocks, rng, replace(options, sweeps=0))
        if settled.gain <= state.gain:
            return state
        state = settled
    return state


def merge(layers: Sequence[Layer], state: State, g: int, h: int) -> State:
    """Blocks g and h as one, named min(g, h)."""
    names = np.arange(state.blocks + 1, dtype=np.int32)
    names[max(g, h)] = min(g, h)
    names[max(g, h) + 1 :] -= 1
    names[-1] = DROPPED
    labels = tuple(names[axis] for axis in state.labels)
    return State(labels, state.blocks - 1, layer_gains(layers, labels, state.blocks - 1))


def embed(layers: Sequence[Layer], rng: np.random.Generator) -> tuple[list[Matrix], int]:
    """Spectral co-clustering (Dhillon 2001) of the whole run, and how many blocks its singular values show.

    A path of layers is a bipartite graph between its even and its odd axes: one matrix B, whose left and right
    singular vectors embed them. B holds the posterior that an entry was learned, normalised by degrees. Returns an
    embedding [width, dimensions] of each axis.
    """
    weights = [layer.spread(layer.learned()) for layer in layers]
    widths = [weights[0].shape[0], *(w.shape[1] for w in weights)]
    degree = [np.full(n, 1e-6, np.float64) for n in widths]
    for axis, w in enumerate(weights):
        degree[axis] += w.sum(1, dtype=np.float64)
        degree[axis + 1] += w.sum(0, dtype=np.float64)
    # A tenth of the mean degree is added so that nearly empty elements do not make singular vectors of their own.
    scale = [(1 / np.sqrt(d + 0.1 * d.mean())).astype(np.float32)[:, None] for d in degree]

    def across(vectors: list[Matrix], parity: int) -> list[Matrix]:
        """B (parity 1: from the odd to the even axes) or its transpose; entries of the other parity are replaced."""
        out = [v if axis % 2 == parity else np.zeros_like(v) for axis, v in enumerate(vectors)]
        for axis, w in enumerate(weights):
            if axis % 2 == parity:
                out[axis + 1] += w.T @ (scale[axis] * vectors[axis])
            else:
                out[axis] += w @ (scale[axis + 1] * vectors[axis + 1])
        return [v if axis % 2 == parity else scale[axis] * v for axis, v in enumerate(out)]

    dimensions = min(DIMENSIONS, *widths)
    vectors = [rng.standard_normal((n, dimensions), np.float32) for n in widths]
    values = np.zeros(dimensions)
    for _ in range(8):  # randomised subspace iteration (Halko, Martinsson, Tropp 2011)
        for parity in (1, 0):
            vectors = across(vectors, parity)
            side = slice(1 - parity, None, 2)
            flat, triangle = np.linalg.qr(np.concatenate(vectors[side]))
            values = np.linalg.svd(triangle, compute_uv=False)
            ends = np.cumsum([v.shape[0] for v in vectors[side]])[:-1]
            vectors[side] = np.split(flat, ends)
    turn = np.linalg.svd(triangle)[0].astype(np.float32)
    vectors[side] = [v @ turn for v in vectors[side]]
    vectors = across(vectors, 1)
    edge = _noise_edge(layers, weights, widths)
    guess = int((values > edge).sum())
    return [_unit(v) for v in vectors], guess


def _noise_edge(layers: Sequence[Layer], weights: Sequence[Matrix], widths: Sequence[int]) -> float:
    """Largest singular value of the normalised B if its entries were shuffled, after the trivial one (Marchenko-Pastur)."""
    edges = []
    for layer, (K, N) in zip(layers, pairwise(widths), strict=True):
        posterior = layer.learned()
        share = layer.count / layer.count.sum()
        mean = float(share @ posterior)
        spread = float(np.sqrt(max(share @ posterior**2 - mean**2, 0.0)))
        edges.append(spread / max(mean, 1e-12) * (1 / np.sqrt(K) + 1 / np.sqrt(N)) / 1.1)
    return 1.1 * max(edges)


def _unit(v: Matrix) -> Matrix:
    """Rows of unit length in the leading dimensions are taken later; here only NaN is kept out."""
    return np.nan_to_num(v)


def cluster(embedding: Sequence[Matrix], G: int, rng: np.random.Generator) -> Grouping:
    """k-means++ on the directions of all axes' elements in the leading G dimensions, the best of a few runs."""
    points = np.concatenate(
        [v[:, :G] / (np.linalg.norm(v[:, :G], axis=1, keepdims=True) + 1e-12) for v in embedding]
    )
    few = points if len(points) <= 4096 else points[rng.choice(len(points), 4096, replace=False)]
    best, distortion = few[:G], np.inf
    for _ in range(8):
        centres, _ = kmeans2(few, G, minit="++", iter=15, missing="warn", seed=rng)
        mean = float((vq(few, centres)[1] ** 2).mean())
        if mean < distortion:
            best, distortion = centres, mean
    labels = vq(points, best)[0].astype(np.int32)
    return tuple(np.split(labels, np.cumsum([len(v) for v in embedding])[:-1]))


def anneal(
    layers: Sequence[Layer], labels: Grouping, G: int, rng: np.random.Generator, options: Options
) -> State:
    """Gibbs sampling of all labels at falling temperature, then greedy until nothing moves."""
    current = list(labels)
    for temperature in [*np.geomspace(options.hottest, 0.02, options.sweeps // 3), 0.0, 0.0]:
        scores = [
            layer.spread(np.log(table))
            for layer, table in zip(layers, ratios(layers, current, G), strict=True)
        ]
        for _ in range(3 if temperature else 10):
            moved = 0
            for axis in (*range(0, len(current), 2), *range(1, len(current), 2)):
                total = block_scores(scores, current, axis, G)
                if temperature:
                    top = np.partition(total, G - 2, axis=1)[:, G - 2 :]
                    heat = temperature * float(np.median(top[:, 1] - top[:, 0]))
                    total += np.float32(heat) * rng.gumbel(size=total.shape).astype(np.float32)
                chosen = total.argmax(1).astype(np.int32)
                moved += int((chosen != current[axis]).sum())
                current[axis] = chosen
            if not moved:
                break
    return State(tuple(current), G, layer_gains(layers, current, G))


def block_scores(scores: Sequence[Matrix], labels: Sequence[Labels], axis: int, G: int) -> Matrix:
    """Log likelihood ratio [width, G] of putting each element of an axis into each block, the other axes given."""
    total = np.zeros((len(labels[axis]), G), np.float32)
    if axis < len(scores):
        total += scores[axis] @ one_hot(labels[axis + 1], G)
    if axis > 0:
        total += scores[axis - 1].T @ one_hot(labels[axis - 1], G)
    return total


def ratios(layers: Sequence[Layer], labels: Sequence[Labels], G: int) -> list[Vector]:
    """For each layer, how much likelier each level of |z| is within blocks than off them."""
    tables = []
    for layer, (rows, cols) in zip(layers, pairwise(labels), strict=True):
        inside = inside_count(layer, rows, cols, G)
        outside = layer.count - inside
        prior = 2 * layer.count / layer.count.sum()
        table = (inside + prior) / (inside.sum() + 2) / ((outside + prior) / (outside.sum() + 2) + 1e-300)
        tables.append(np.clip(np.nan_to_num(table, nan=1.0), 1e-4, 1e4))
    return tables


def inside_count(layer: Layer, rows: Labels, cols: Labels, G: int) -> Vector:
    """How often each level occurs within blocks."""
    count = np.zeros(LEVELS)
    for block in range(G):
        at = np.flatnonzero(cols == block)
        for part in np.array_split(np.flatnonzero(rows == block), 1 + layer.codes.size // (1 << 22)):
            count += np.bincount(layer.codes[np.ix_(part, at)].reshape(-1), minlength=LEVELS)
    return count


# --- significance -------------------------------------------------------------------------------------------------


def layer_gains(layers: Sequence[Layer], labels: Sequence[Labels], G: int) -> Vector:
    """What each layer gains from a grouping, in nats; exp(-sum) bounds the p-value against shuffled entries.

    Naming an axis costs its labels (their counts, then which ones), borne half by each layer that it joins.
    """
    cost = [_label_cost(axis, G) for axis in labels]
    gains = []
    for number, (layer, (rows, cols)) in enumerate(zip(layers, pairwise(labels), strict=True)):
        before = cost[number] * (1.0 if number == 0 else 0.5)
        after = cost[number + 1] * (1.0 if number == len(layers) - 1 else 0.5)
        table = LEVELS * np.log(SPAN) + np.log(MOST) / len(layers)
        gains.append(_evidence_gain(inside_count(layer, rows, cols, G), layer.count) - before - after - table)
    return np.array(gains)


def _evidence_gain(inside: Vector, count: Vector) -> float:
    """Sum over in-block entries of log r; r in a finite family, of mean 1 over all entries of the layer."""
    if not inside.sum():
        return 0.0
    share = count / count.sum()
    ratio = (inside + share) / (inside.sum() + 1) / np.maximum(share, 1e-300)
    told = np.clip(np.round(np.log(np.maximum(ratio, 1e-9)) / STEP), -SPAN // 2, SPAN // 2 - 1) * STEP
    return float(inside @ told - inside.sum() * np.log(share @ np.exp(told)))


def _label_cost(labels: Labels, G: int) -> float:
    """Nats to name the labels of an axis: how many of each of G + 1 kinds (DROPPED is one), then which are which."""
    n, kinds = len(labels), G + 1
    counts = np.bincount(labels + 1, minlength=kinds)
    which = gammaln(n + 1) - gammaln(counts + 1).sum()
    return float(which + gammaln(n + kinds) - gammaln(kinds) - gammaln(n + 1))


# --- off-diagonal blocks, dead elements, stability ----------------------------------------------------------------


def _merge_supported(layers: Sequence[Layer], state: State) -> tuple[State, int]:
    """Merge blocks that a supported off-diagonal block joins, strongest first, until none is left.

    Returns the layer of the last supported pair too.
    """
    worst = 0
    while state.blocks > 1:
        tests = [
            block_pair_tests(layer.z, rows, cols, state.blocks)
            for layer, (rows, cols) in zip(layers, pairwise(state.labels), strict=True)
        ]
        p = np.stack([test.p for test in tests])
        level = np.stack([test.level for test in tests])
        own = np.array([np.diagonal(test.level).mean() for test in tests])[:, None, None]
        supported = (holm(p) < LEVEL) & (level > MATERIAL * own)
        if not supported.any():
            return state, worst
        strength = np.where(supported, level / own, -1)
        worst, g, h = (int(i) for i in np.unravel_index(int(strength.argmax()), strength.shape))
        state = merge(layers, state, g, h)
    return state, worst


def _drop_dead(layers: Sequence[Layer], state: State) -> Grouping:
    """Elements far likelier to have learned nothing than to belong to any block.

    In a block, the ratio off/in has mean 1, so by Markov log ratio > log(n/0.01) drops a living element of the axis
    with probability 0.01 at most.
    """
    labels = list(state.labels)
    scores = [
        layer.spread(np.log(table))
        for layer, table in zip(layers, ratios(layers, labels, state.blocks), strict=True)
    ]
    for axis in range(len(labels)):
        best = block_scores(scores, state.labels, axis, state.blocks).max(1)
        dead = best < -np.log(len(best) / LEVEL)
        labels[axis] = np.where(dead, DROPPED, labels[axis]).astype(np.int32)
    return tuple(labels)


def stability(layers: Sequence[Layer], state: State, embedding: Sequence[Matrix], options: Options) -> float:
    """Share of elements that keep their block when the search runs anew, hotter, from another seed."""
    kept = []
    for turn in range(options.restarts):
        rng = np.random.default_rng([options.seed, turn + 1])
        hotter = replace(options, hottest=options.hottest * 2 ** (turn + 1))
        start = state.labels if turn % 2 else cluster(embedding, state.blocks, rng)
        again = anneal(layers, start, state.blocks, rng, hotter)
        kept.append(agreement(state.labels, again.labels, state.blocks))
    return float(np.mean(kept)) if kept else 1.0


def agreement(first: Grouping, second: Grouping, G: int) -> float:
    """Share of elements with the same block, after the best matching of block names; DROPPED ones don't count."""
    a, b = np.concatenate(first), np.concatenate(second)
    alive = (a >= 0) & (b >= 0)
    table = np.bincount(a[alive] * G + b[alive], minlength=G * G).reshape(G, G)
    rows, cols = linear_sum_assignment(-table)
    return float(table[rows, cols].sum() / max(alive.sum(), 1))


def ordered(labels: Grouping) -> Grouping:
    """Blocks renamed 0, 1, ... by first occurrence along the axes; a block missing from an axis is dropped."""
    shared = set(labels[0].tolist()).intersection(*(axis.tolist() for axis in labels[1:])) - {DROPPED}
    names = [name for name in dict.fromkeys(labels[0].tolist()) if name in shared]
    table = np.full(max(int(axis.max(initial=0)) for axis in labels) + 2, DROPPED, np.int32)
    table[names] = np.arange(len(names))
    return tuple(table[axis] for axis in labels)  # table[-1] keeps DROPPED


def _count(labels: Grouping) -> int:
    return int(max(axis.max(initial=DROPPED) for axis in labels)) + 1


def _same(first: Grouping, second: Grouping) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@dataclass(frozen=True)
class Annealing:
    """Fills `program.structures` for every region; declines the sites that are in no structure, with the reason."""

    options: Options = Options()
    name: str = "annealing"

    def run(self, program: Program) -> None:
        options = replace(self.options, seed=program.options.seed)
        for region in program.regions:
            evidence = [program.evidence.get(site.index) for site in region.sites]
            found = find_structure(evidence, options)
            program.structures[region.name] = found.structures
            for position, reason in found.reasons.items():
                site = region.sites[position]
                if reason.code != "null-does-not-fit":  # the criterion said so already
                    program.decide(self.name, site, "declined", reason.code, **reason.numbers)
