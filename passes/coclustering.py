"""Groupings of the axes of a run of layers, and what each is worth: a likelihood over levels of evidence.

Entries within a block follow one law of |z|, all others another. Both are read off the data, as tables over levels of
|z|, so neither the jitter nor the learned change has to be normal. A grouping's worth is its description length: what
the evidence gains from it, less the nats that it takes to name the grouping and the tables. Hoeffding (1963,
theorem 4) makes it a test too: see `layer_gains` and docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import ClusterError, kmeans2, vq
from scipy.optimize import linear_sum_assignment
from scipy.special import gammaln, ndtr

from onnx_decomp.passes.significance import Matrix, Vector, one_hot, slabs
from onnx_decomp.program import DROPPED, Labels
from onnx_decomp.scratch import kept

Grouping = tuple[Labels, ...]
"""Labels of every axis of the layers that are grouped together."""

Elements = NDArray[np.intp]

EDGES = np.concatenate(([1e-3, 0.02], np.arange(0.25, 3.1, 0.25), [3.5, 4, 5, 6, 8, 12, 20, 35])).astype(
    np.float32
)
"""Between levels of |z|: the first level holds entries that are exactly unchanged, the second what rounding left."""
LEVELS = len(EDGES) + 1
STEP, SPAN = 0.25, 64
"""Log ratios of a table are told in SPAN steps of STEP nats: naming a table then has a finite cost."""
MOST = 32
"""Blocks at most."""


@dataclass(frozen=True)
class Schedule:
    """How labels cool down.

    hottest: first temperature, relative to how far apart the two best blocks of an element are.
    """

    hottest: float = 0.5
    coldest: float = 0.02
    temperatures: int = 2
    sweeps: int = 3


QUENCH = Schedule(temperatures=0)
HOT = Schedule(hottest=0.8, temperatures=3)


# --- evidence as levels -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's scores z [K, N], the level of each entry, and how often each level occurs.

    ends: which of the axes that are grouped together its rows and its columns are.
    units: the element of that axis for each row, and for each column, where several belong to one (a head, say).
    """

    z: Matrix
    codes: NDArray[np.uint8]
    count: Vector
    ends: tuple[int, int] = (0, 1)
    units: tuple[Elements | None, Elements | None] = (None, None)

    @classmethod
    def read(
        cls,
        z: Matrix,
        frozen: NDArray[np.bool_] | None = None,
        ends: tuple[int, int] = (0, 1),
        units: tuple[Elements | None, Elements | None] = (None, None),
    ) -> Layer:
        codes = np.empty(z.shape, np.uint8)
        count = np.zeros(LEVELS)
        for rows in slabs(z):
            codes[rows] = np.searchsorted(EDGES, np.abs(z[rows]))
            if frozen is not None:
                codes[rows][frozen[rows]] = 0
            count += np.bincount(codes[rows].reshape(-1), minlength=LEVELS)
        return cls(z, kept(codes), count, ends, units)

    def sides(self, labels: Sequence[Labels]) -> tuple[Labels, Labels]:
        """Labels of its rows and of its columns."""
        rows, cols = (
            labels[axis] if units is None else labels[axis][units]
            for axis, units in zip(self.ends, self.units, strict=True)
        )
        return rows, cols

    def gather(self, side: int, scores: Matrix, size: int) -> Matrix:
        """Scores [width, ...] of its rows (side 0) or columns (1), summed over each element of the axis."""
        units = self.units[side]
        if units is None:
            return scores
        total = np.zeros((size, *scores.shape[1:]), scores.dtype)
        np.add.at(total, units, scores)
        return total

    def spread(self, table: Vector) -> Matrix:
        """The value that a table gives to every entry [K, N]."""
        values = np.empty(self.codes.shape, np.float32)
        for rows in slabs(
            self.codes
        ):  # in slabs, as take makes wide indices of its codes; clip skips its checks
            np.take(table.astype(np.float32), self.codes[rows], out=values[rows], mode="clip")
        return kept(values)

    def inside(self, rows: Labels, cols: Labels, G: int) -> Vector:
        """How often each level occurs within blocks."""
        count = np.zeros(LEVELS)
        parts = 1 + self.codes.size // (1 << 22)
        for block in range(G):
            at = np.flatnonzero(cols == block)
            for part in np.array_split(np.flatnonzero(rows == block), parts):
                count += np.bincount(self.codes[np.ix_(part, at)].reshape(-1), minlength=LEVELS)
        return count

    def learned(self) -> Vector:
        """For each level, the posterior that an entry was learned: 1 - local false discovery rate (Efron 2004)."""
        null = np.diff(2 * ndtr(np.append(EDGES.astype(np.float64), np.inf)) - 1, prepend=0)
        share = self.count / self.count.sum()
        centre = slice(
            2, 5
        )  # exactly unchanged entries are a point mass of their own, beside the continuous null
        unchanged = min(1.0, share[centre].sum() / null[centre].sum())
        rate = np.minimum(unchanged * null[2:] / np.maximum(share[2:], 1e-12), 1)
        posterior = np.concatenate(([0.0, 0.0], np.maximum.accumulate(1 - rate)))
        # Where the levels alone show nothing learned, only their order is left to go by.
        return posterior if posterior.max() > 0.05 else np.minimum(np.append(0, EDGES) ** 2, 9) / 9


def ratios(layers: Sequence[Layer], labels: Sequence[Labels], G: int) -> list[Vector]:
    """For each layer, the log of how much likelier each level is within blocks than off them."""
    tables = []
    for layer in layers:
        inside = layer.inside(*layer.sides(labels), G)
        outside = layer.count - inside
        prior = 2 * layer.count / layer.count.sum() + 1e-6
        likelier = (inside + prior) / (inside + prior).sum() * (outside + prior).sum() / (outside + prior)
        tables.append(np.clip(np.log(likelier), -9, 9))
    return tables


def block_scores(
    layers: Sequence[Layer], scores: Sequence[Matrix], labels: Sequence[Labels], axis: int, G: int
) -> Matrix:
    """Log likelihood ratio [width, G] of each element of an axis for each block, the other axes given."""
    total = np.zeros((len(labels[axis]), G), np.float32)
    for layer, score in zip(layers, scores, strict=True):
        rows, cols = layer.sides(labels)
        if layer.ends[0] == axis:
            total += layer.gather(0, score @ one_hot(cols, G), len(total))
        if layer.ends[1] == axis:
            total += layer.gather(1, score.T @ one_hot(rows, G), len(total))
    return total


# --- what a grouping is worth -------------------------------------------------------------------------------------


class State(NamedTuple):
    """A grouping, how many blocks it has, and what each layer gains from it in nats."""

    labels: Grouping
    blocks: int
    gains: Vector

    @property
    def gain(self) -> float:
        return float(self.gains.sum())

    @property
    def p(self) -> float:
        """Bound on the probability that shuffled entries have any grouping worth as much."""
        return float(np.exp(-max(self.gain, 0.0)))


def valued(layers: Sequence[Layer], labels: Grouping, G: int) -> State:
    return State(labels, G, layer_gains(layers, labels, G))


def layer_gains(layers: Sequence[Layer], labels: Grouping, G: int) -> Vector:
    """What each layer gains from a grouping, in nats.

    Let r be positive on levels, of mean 1 over a layer's own entries. Whatever the grouping, if its entries are
    shuffled, the product of r over in-block entries has mean at most 1 (sampling without replacement is dominated by
    sampling with it). By Markov, and by the union over groupings and tables weighted by exp(-nats to name them),

        p <= exp(-(sum over layers of sum over in-block entries of log r  -  nats to name groupings and tables)).

    The cost of an axis is borne in equal parts by the layers that it joins.
    """
    cost = np.array([_label_cost(axis, G) for axis in labels])
    cost /= np.bincount([axis for layer in layers for axis in layer.ends], minlength=len(labels))
    table = LEVELS * np.log(SPAN) + np.log(MOST) / len(layers)
    worth = [_worth(layer.inside(*layer.sides(labels), G), layer.count) for layer in layers]
    gains: Vector = np.array(worth) - [sum(cost[list(layer.ends)]) for layer in layers] - table
    return gains


def _worth(inside: Vector, count: Vector) -> float:
    """Sum over in-block entries of log r, where r is the in-block excess, rounded to a finite family, of mean 1."""
    if not inside.sum():
        return 0.0
    share = count / count.sum()
    excess = np.log((inside + share) / (inside.sum() + 1) / np.maximum(share, 1e-300) + 1e-9)
    told = np.clip(np.round(excess / STEP), -SPAN // 2, SPAN // 2 - 1) * STEP
    return float(inside @ told - inside.sum() * np.log(share @ np.exp(told)))


def _label_cost(labels: Labels, G: int) -> float:
    """Nats to name the labels of an axis: how many of each of G + 1 kinds (DROPPED is one), then which are which."""
    n, kinds = len(labels), G + 1
    sizes = np.bincount(labels + 1, minlength=kinds)
    return float(gammaln(n + kinds) - gammaln(kinds) - gammaln(sizes + 1).sum())


# --- spectral start -----------------------------------------------------------------------------------------------


def widths_of(layers: Sequence[Layer]) -> list[int]:
    """Number of elements of each axis."""
    widths = [0] * (1 + max(axis for layer in layers for axis in layer.ends))
    for layer in layers:
        for axis, units, length in zip(layer.ends, layer.units, layer.codes.shape, strict=True):
            widths[axis] = max(widths[axis], length if units is None else int(units.max()) + 1)
    return widths


def sides_of(layers: Sequence[Layer]) -> list[int]:
    """Side 0 or 1 of each axis, so that (nearly) every layer joins the two sides; breadth first from axis 0."""
    count = 1 + max(axis for layer in layers for axis in layer.ends)
    side = [-1] * count
    for first in range(count):
        side[first] = max(side[first], 0)
        pending = [first]
        while pending:
            axis = pending.pop(0)
            for layer in layers:
                for here, there in (layer.ends, layer.ends[::-1]):
                    if here == axis and side[there] < 0:
                        side[there] = 1 - side[axis]
                        pending.append(there)
    return side


def embed(layers: Sequence[Layer], rng: np.random.Generator) -> tuple[list[Matrix], int]:
    """Spectral co-clustering (Dhillon 2001) of all axes, and how many blocks the singular values show.

    Layers make a bipartite graph between two sides of axes (the even and the odd ones of a chain, a residual stream and
    all that reads or writes it), so it is one matrix B, whose left and right singular vectors embed all elements. A
    layer within one side is left to the search. B holds the posterior that an entry was learned, normalised by degrees.
    Returns an embedding [width, dimensions] of each axis.
    """
    side, widths = np.array(sides_of(layers)), widths_of(layers)
    across = [layer for layer in layers if side[layer.ends[0]] != side[layer.ends[1]]] or list(layers)
    weights = [layer.spread(layer.learned()) for layer in across]
    degree = [np.full(n, 1e-6) for n in widths]
    for layer, w in zip(across, weights, strict=True):
        for end, axis in enumerate(layer.ends):
            degree[axis] += layer.gather(end, w.sum(1 - end, dtype=np.float64), widths[axis])
    # A tenth of the mean degree is added so that nearly empty elements make no singular vectors of their own.
    scale = [(1 / np.sqrt(d + 0.1 * d.mean())).astype(np.float32)[:, None] for d in degree]

    sizes = [sum(n for n, s in zip(widths, side, strict=True) if s == which) for which in (0, 1)]
    dimensions = min(MOST + 1, *widths)
    vectors = [rng.standard_normal((n, dimensions), np.float32) for n in widths]

    def turned(to: int) -> tuple[list[Matrix], Matrix]:
        made = _across(across, weights, scale, vectors)
        basis, triangle = _orthonormal([made[axis] for axis in np.flatnonzero(side == to)])
        for axis, vector in zip(np.flatnonzero(side == to), basis, strict=True):
            vectors[axis] = vector
        return vectors, triangle

    if not min(sizes):
        return vectors, 2
    for _ in range(8):  # randomised subspace iteration (Halko, Martinsson, Tropp 2011)
        turned(1)
        _, triangle = turned(0)
    turn, values, _ = np.linalg.svd(triangle)
    # Dimensions weigh as much as they stand out, the trivial first one as the second; left and right alike.
    weight = np.append(values[1:2], values[1:])
    far = _across(across, weights, scale, vectors)
    found = [
        far[axis] @ (turn / np.maximum(values, 1e-6)) if side[axis] else vectors[axis] @ turn
        for axis in range(len(widths))
    ]
    return [v * weight for v in found], int((values > _noise_edge(layers)).sum())


def _across(
    layers: Sequence[Layer], weights: Sequence[Matrix], scale: Sequence[Matrix], vectors: Sequence[Matrix]
) -> list[Matrix]:
    """B and its transpose times the vectors: what each axis gets from those it is joined to."""
    out = [np.zeros_like(v) for v in vectors]
    for layer, w in zip(layers, weights, strict=True):
        (row, col), (row_units, col_units) = layer.ends, layer.units
        of_rows, of_cols = scale[row] * vectors[row], scale[col] * vectors[col]
        of_rows = of_rows if row_units is None else of_rows[row_units]
        of_cols = of_cols if col_units is None else of_cols[col_units]
        out[row] += layer.gather(0, w @ of_cols, len(out[row]))
        out[col] += layer.gather(1, w.T @ of_rows, len(out[col]))
    return [factor * v for factor, v in zip(scale, out, strict=True)]


def _orthonormal(vectors: Sequence[Matrix]) -> tuple[list[Matrix], Matrix]:
    """QR of vectors stacked over axes."""
    basis, triangle = np.linalg.qr(np.concatenate(vectors))
    return np.split(basis, np.cumsum([len(v) for v in vectors])[:-1]), triangle


def _noise_edge(layers: Sequence[Layer]) -> float:
    """Largest singular value of B beyond the trivial one if entries were shuffled (Marchenko-Pastur)."""
    edges = []
    for layer in layers:
        posterior, share = layer.learned(), layer.count / layer.count.sum()
        mean = float(share @ posterior)
        spread = np.sqrt(max(float(share @ posterior**2) - mean**2, 0.0))
        edges.append(spread / max(mean, 1e-12) * sum(1 / np.sqrt(n) for n in layer.codes.shape))
    return float(max(edges))


def cluster(embedding: Sequence[Matrix], G: int, rng: np.random.Generator) -> Grouping:
    """k-means++ on the directions of all axes' elements in the leading G dimensions, the best of eight."""
    leading = np.concatenate([v[:, :G] for v in embedding])
    points = leading / (np.linalg.norm(leading, axis=1, keepdims=True) + 1e-12)
    few = points if len(points) <= 4096 else points[rng.choice(len(points), 4096, replace=False)]
    best, distortion = few[:G], np.inf
    for _ in range(8):
        start = few[_spread_seeds(few, G, rng)]
        try:
            centres, _ = kmeans2(few, start, minit="matrix", iter=15, missing="raise")
        except ClusterError:  # a cluster lost all its points
            continue
        found = float((vq(few, centres)[1] ** 2).sum())
        if found < distortion:
            best, distortion = centres, found
    labels = vq(points, best)[0].astype(np.int32)
    return tuple(np.split(labels, np.cumsum([len(v) for v in embedding])[:-1]))


def _spread_seeds(points: Matrix, G: int, rng: np.random.Generator) -> list[int]:
    """Seeds of k-means++: each new one is far from those before (Arthur, Vassilvitskii 2007)."""
    chosen = [int(rng.integers(len(points)))]
    nearest = np.full(len(points), np.inf)
    while len(chosen) < G:
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(1)) + 1e-12
        chosen.append(int(rng.choice(len(points), p=nearest / nearest.sum())))
    return chosen


# --- search -------------------------------------------------------------------------------------------------------


def search(
    layers: Sequence[Layer], embedding: Sequence[Matrix], guess: int, rng: np.random.Generator
) -> State:
    """Anneal from several numbers of blocks and keep the shortest description.

    From the spectral guess, and from more blocks than that, which then merge: merging two halves is one step,
    parting two blocks that k-means took for one is many. On to still more while nothing, or as many, was found.
    """
    most = max(2, min(MOST, *widths_of(layers)))
    first = min(max(guess, 2), most)
    best = _from(layers, embedding, first, rng)
    for factor in (1.25, 1.6, 2.0, 4.0, 8.0, 16.0):
        G = min(int(first * factor) + 1, most)
        if best.gain <= 0 or 2 * best.blocks >= G:
            best = max(best, _from(layers, embedding, G, rng), key=lambda state: state.gain)
        if most == G:
            break
    return best


def _from(layers: Sequence[Layer], embedding: Sequence[Matrix], G: int, rng: np.random.Generator) -> State:
    settled = anneal(layers, cluster(embedding, G, rng), G, rng)
    matched = anneal(layers, aligned(layers, settled), G, rng, QUENCH)
    return consolidate(layers, max(settled, matched, key=lambda state: state.gain), rng)


def aligned(layers: Sequence[Layer], state: State) -> Grouping:
    """The same groupings with the names of each axis matched to those of the axes before it.

    Two parts of a network can settle on the same blocks under different names. No single element can then change to its
    true name, as all its neighbours have the other one: the best assignment of names to names is found at once.
    """
    found = list(state.labels)
    pending, done = list(layers), {0}
    while pending:
        near = [layer for layer in pending if done.intersection(layer.ends)]
        if not near:
            done.add(pending[0].ends[0])
            continue
        axis = next((a for layer in near for a in layer.ends if a not in done), None)
        if axis is None:
            pending = [layer for layer in pending if layer not in near]
            continue
        joint = np.zeros((state.blocks, state.blocks))
        for layer in near:
            if axis in layer.ends and not done.isdisjoint(layer.ends):
                rows, cols = layer.sides(found)
                learned = layer.learned()
                evidence = layer.spread(learned - layer.count @ learned / layer.count.sum())
                table = one_hot(rows, state.blocks).T @ (evidence @ one_hot(cols, state.blocks))
                joint += table if layer.ends[1] == axis else table.T
        names = np.full(state.blocks + 1, DROPPED, np.int32)  # the last one: DROPPED indexes it as -1
        here, there = linear_sum_assignment(joint, maximize=True)
        names[there] = here
        found[axis] = names[found[axis]]
        done.add(axis)
    return tuple(found)


def anneal(
    layers: Sequence[Layer],
    labels: Grouping,
    G: int,
    rng: np.random.Generator,
    schedule: Schedule = Schedule(),
) -> State:
    """Gibbs sampling of all labels at falling temperature, then greedy until nothing moves.

    Given the neighbouring axes, the elements of an axis are independent: all of them move at once.
    """
    current = list(labels)
    axes = np.argsort(sides_of(layers), kind="stable").tolist()
    for temperature in (*np.geomspace(schedule.hottest, schedule.coldest, schedule.temperatures), 0.0, 0.0):
        scores = [
            layer.spread(table) for layer, table in zip(layers, ratios(layers, current, G), strict=True)
        ]
        for _ in range(schedule.sweeps if temperature else 10):
            before = list(current)
            for axis in axes:
                total = block_scores(layers, scores, current, axis, G)
                if temperature:
                    total += _heat(total, float(temperature), rng)
                current[axis] = total.argmax(1).astype(np.int32)
            if all(np.array_equal(a, b) for a, b in zip(before, current, strict=True)):
                break
    return valued(layers, tuple(current), G)


def _heat(total: Matrix, temperature: float, rng: np.random.Generator) -> Matrix:
    """Gumbel noise: the largest of noisy scores is a draw from the Gibbs distribution at that temperature."""
    top = np.partition(total, -2, axis=1)[:, -2:]
    heat = temperature * float(np.median(top[:, 1] - top[:, 0]))
    return np.float32(heat) * rng.gumbel(size=total.shape).astype(np.float32)


def consolidate(layers: Sequence[Layer], state: State, rng: np.random.Generator) -> State:
    """Merge pairs of blocks, best first, while the description gets shorter."""
    while state.blocks > 2:
        joint = np.zeros((state.blocks, state.blocks))
        tables = ratios(layers, state.labels, state.blocks)
        for layer, table in zip(layers, tables, strict=True):
            rows, cols = layer.sides(state.labels)
            joint += one_hot(rows, state.blocks).T @ (layer.spread(table) @ one_hot(cols, state.blocks))
        joint += joint.T
        np.fill_diagonal(joint, -np.inf)
        g, h = divmod(int(joint.argmax()), state.blocks)
        if joint[g, h] <= -sum(len(axis) for axis in state.labels):  # about what fewer names can save
            return state
        settled = anneal(layers, merged(state, g, h), state.blocks - 1, rng, QUENCH)
        if settled.gain <= state.gain:
            return state
        state = settled
    return state


def merged(state: State, g: int, h: int) -> Grouping:
    """Labels with blocks g and h as one, named min(g, h)."""
    names = np.arange(state.blocks + 1, dtype=np.int32)
    names[max(g, h)] = min(g, h)
    names[max(g, h) + 1 :] -= 1
    names[DROPPED] = DROPPED  # the last one: labels index it as -1
    return tuple(names[axis] for axis in state.labels)


def again(
    layers: Sequence[Layer], embedding: Sequence[Matrix], state: State, seed: int
) -> tuple[State, State]:
    """The search anew from another seed, and the found grouping heated up and cooled: what comes back is stable."""
    rng = np.random.default_rng(seed)
    heated = anneal(layers, state.labels, state.blocks, rng, HOT)
    return _from(layers, embedding, state.blocks, rng), consolidate(layers, heated, rng)
