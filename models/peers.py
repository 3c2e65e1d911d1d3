"""What others would do with the same calibration data at the same FLOPs: the baselines, each as good as it gets.

    svd          truncated SVD of each weight
    whitened     the same of the map on whitened inputs, fitted layer after layer
    wanda, obs   fewer hidden units, chosen by Wanda's score or by optimal brain surgeon; the next layer refitted
    onnxsim-*    pruning and fine-tuning of the package onnxsim (extra `bench`), layer after layer

The first four are written here, apart from the compiler's own passes. They work on weights [K, N] of y = x W + b, are
fitted on what the model rewritten so far feeds a layer (the target: what the original made of its own input), and
choose their ridge on a fifth of the data. A weight stays as large as it was; FLOPs are those that its form would need.
Calibration data is used whole: nothing of it is set aside for a report.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from scipy import linalg

from onnx_decomp.probe import Probe
from onnx_decomp.runtime import open_session
from onnx_decomp.sites import Affine, GraphIndex, Site, find_sites, read_affine

Array = NDArray[np.float64]
Indices = NDArray[np.intp]
Feeds = Mapping[str, NDArray[Any]]
Scope = Literal["all", "feed-forward"]
Score = Literal["wanda", "obs"]

ELEMENTWISE = frozenset({"Relu", "Gelu", "Tanh", "Sigmoid", "LeakyRelu", "Elu", "HardSwish", "Mish"})
BATCH = 128
"""Samples of one run."""
ROWS = 2**16
"""Rows of x that moments are taken of, at most; as many samples as hold them."""
HELD = 5
"""One sample in so many chooses the ridge; the final fit has all of them."""
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Relative to the mean variance of the inputs, towards the old weights."""
SELECTING = (1e-4, 1e-2, 1e-1)
"""The same while units are chosen."""
STEPS = 256
"""Rounds of the greedy removal of all units."""
TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Pair:
    """Two layers with nothing but elementwise operators of one input between them."""

    first: Site
    second: Site

    @property
    def units(self) -> int:
        return self.second.shape[0]


@dataclass(frozen=True)
class Reached:
    """What a method made. flops: over those of the scope's sites; affine: by site, as the original graph is fed."""

    method: str
    flops: float
    affine: Mapping[int, Affine] = field(default_factory=dict)
    model: onnx.ModelProto | None = None
    """Where the method writes a smaller model itself."""
    note: str = ""


@dataclass
class Work:
    """A model with its calibration data, and the layers in question.

    mask: input that is 1 where a position is real; padding takes no part in moments.
    """

    index: GraphIndex
    sites: tuple[Site, ...]
    pairs: tuple[Pair, ...]
    calib: dict[str, NDArray[Any]]
    mask: str | None
    probe: Probe
    _made: dict[int, list[NDArray[np.float32]]] = field(default_factory=dict)
    _spread: dict[str, Array] = field(default_factory=dict)
    _answers: list[NDArray[Any]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model: onnx.ModelProto,
        calib: Feeds,
        scope: Scope = "all",
        mask: str | None = None,
        rows: int = ROWS,
    ) -> Work:
        index = GraphIndex.build(model, onnx.numpy_helper.to_array)
        sites = [site for site in find_sites(index) if site.obstacle is None]
        pairs = find_pairs(index, sites)
        if scope == "feed-forward":
            inside = {site.index for pair in pairs for site in (pair.first, pair.second)}
            sites = [site for site in sites if site.index in inside]
        (shape, *_) = (array.shape for array in calib.values())
        each = 1 if calib[next(iter(calib))].dtype.kind == "f" else int(np.prod(shape[1:]))
        samples = max(rows // each, 1)
        kept = {name: array[:samples] for name, array in calib.items()}
        return cls(index, tuple(sites), tuple(pairs), kept, mask, Probe(index, sites, None))

    @property
    def flops(self) -> int:
        return sum(site.flops for site in self.sites)

    @property
    def outer(self) -> set[int]:
        """Sites that make an output of the graph."""
        outputs = {value.name for value in self.index.proto.graph.output}
        return {site.index for site in self.sites if site.output in outputs}

    def include(self) -> str:
        """A pattern of the names of the scope's nodes, as the compiler's option takes it."""
        return "^(" + "|".join(re.escape(site.name) for site in self.sites) + ")$"

    def old(self, site: Site) -> Affine:
        return read_affine(self.index, site)

    def batches(self) -> Iterator[dict[str, NDArray[Any]]]:
        total = len(next(iter(self.calib.values())))
        for start in range(0, total, BATCH):
            yield {name: array[start : start + BATCH] for name, array in self.calib.items()}

    def answer(self, reached: Reached, feeds: Feeds) -> NDArray[Any]:
        """The first output of the graph."""
        if reached.model is not None:
            return run_model(reached.model, feeds)
        total = len(next(iter(feeds.values())))
        parts = []
        for start in range(0, total, BATCH):
            part = {name: array[start : start + BATCH] for name, array in feeds.items()}
            parts.append(next(iter(self.probe.run(part, reached.affine).values())))
        return np.concatenate(parts)

    def change(self, affine: Mapping[int, Affine]) -> float:
        """Relative L2 change of the outputs on the calibration data."""
        if not self._answers:
            self._answers = [next(iter(self.probe.run(feeds, {}).values())) for feeds in self.batches()]
        apart = size = 0.0
        for feeds, before in zip(self.batches(), self._answers, strict=True):
            after = next(iter(self.probe.run(feeds, affine).values()))
            apart += float(np.sum((after.astype(np.float64) - before) ** 2))
            size += float(np.sum(before.astype(np.float64) ** 2))
        return float(np.sqrt(apart / max(size, TINY)))

    def moments(self, sites: Sequence[Site], affine: Mapping[int, Affine]) -> list[tuple[Moments, Moments]]:
        """For sites that read one tensor: x as the model with `affine` feeds it, y as the original made it; of the
        samples that fit, and of those that choose."""
        (read,) = {site.input for site in sites}
        made = self._targets(sites)
        parts: list[list[list[Moments]]] = [[[], []] for _ in sites]
        for at, feeds in enumerate(self.batches()):
            x = self.probe.run(feeds, affine, [read])[read]
            choose = np.arange(len(x)) % HELD == 0
            for part, chosen in enumerate((~choose, choose)):
                rows = self._rows(x, feeds, chosen)
                for site, outputs, found in zip(sites, made, parts, strict=True):
                    y = outputs[at][self._within(x, feeds, chosen)]
                    found[part].append(Moments.of(rows, y.reshape(-1, site.shape[1])))
        return [(joined(fit), joined(choose)) for fit, choose in parts]

    def inputs(self, pair: Pair, affine: Mapping[int, Affine]) -> NDArray[np.float32]:
        """Rows [T, K] of what the first layer of a pair reads."""
        name, rows = pair.first.input, []
        for feeds in self.batches():
            x = self.probe.run(feeds, affine, [name])[name]
            rows.append(self._rows(x, feeds, np.ones(len(x), bool)))
        return np.concatenate(rows)

    def spread(self, site: Site) -> Array:
        """Centred second moments [K, K] of a site's input in the original, of all sites in one pass."""
        if not self._spread:
            names = list(dict.fromkeys(each.input for each in self.sites))
            parts: dict[str, list[Moments]] = {name: [] for name in names}
            for feeds in self.batches():
                made = self.probe.run(feeds, {}, names)
                for name in names:
                    rows = self._rows(made[name], feeds, np.ones(len(made[name]), bool))
                    parts[name].append(Moments.of(rows, np.zeros((len(rows), 0), np.float32)))
            self._spread = {name: joined(found).xx for name, found in parts.items()}
        return self._spread[site.input]

    def _targets(self, sites: Sequence[Site]) -> list[list[NDArray[np.float32]]]:
        """What the original makes, batch by batch; computed for all sites of the scope at once."""
        if not self._made:
            for feeds in self.batches():
                made = self.probe.run(feeds, {}, [site.output for site in self.sites])
                for site in self.sites:
                    self._made.setdefault(site.index, []).append(made[site.output])
        return [self._made[site.index] for site in sites]

    def _within(self, x: NDArray[Any], feeds: Feeds, samples: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """[samples] or, where there is a mask over positions, [samples, positions]."""
        if self.mask is None or x.ndim < 3:
            return samples
        return samples[:, None] & (feeds[self.mask] > 0)

    def _rows(self, x: NDArray[Any], feeds: Feeds, samples: NDArray[np.bool_]) -> NDArray[Any]:
        return x[self._within(x, feeds, samples)].reshape(-1, x.shape[-1])


class OutOfReachError(ValueError):
    """A method has no point with so few FLOPs."""


def run_model(model: onnx.ModelProto, feeds: Feeds) -> NDArray[Any]:
    """The first output of a model, `BATCH` samples at a time."""
    session = open_session(model, threads=1)
    name = session.outputs[0].name
    total = len(next(iter(feeds.values())))
    parts = (slice(start, start + BATCH) for start in range(0, total, BATCH))
    made = [session.run({key: array[part] for key, array in feeds.items()}, [name])[name] for part in parts]
    return np.concatenate(made)


def multiplications(model: onnx.ModelProto) -> int:
    """Those with stored weights, for one row each, whatever form they have: counted in the file, node by node."""
    index = GraphIndex.build(model, onnx.numpy_helper.to_array)
    found = 0
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            weights = [index.resolve(name) for name in node.input[:2]]
            found += sum(int(np.prod(weight.shape)) for weight in weights if weight is not None)
    return found


def find_pairs(index: GraphIndex, sites: Sequence[Site]) -> list[Pair]:
    """Pairs in graph order."""
    heads = {site.nodes[0]: site for site in sites}
    pairs = []
    for site in sites:
        tensor = site.output
        while (reader := index.sole_consumer(tensor)) is not None:
            node = index.node(reader)
            if reader in heads:
                if heads[reader].input == tensor and heads[reader].shape[0] == site.shape[1]:
                    pairs.append(Pair(site, heads[reader]))
                break
            if node.op_type not in ELEMENTWISE:
                break
            tensor = node.output[0]
    return pairs


# --- moments and fits ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Centred second moments of x [T, K] and y [T, N], each divided by the number of rows."""

    rows: int
    mean_x: Array
    mean_y: Array
    xx: Array
    xy: Array

    @classmethod
    def of(cls, x: NDArray[Any], y: NDArray[Any]) -> Moments:
        x64, y64 = np.asarray(x, np.float64), np.asarray(y, np.float64)
        rows = max(len(x64), 1)
        mean_x, mean_y = x64.sum(0) / rows, y64.sum(0) / rows
        x64, y64 = x64 - mean_x, y64 - mean_y
        return cls(len(x), mean_x, mean_y, x64.T @ x64 / rows, x64.T @ y64 / rows)

    def of_units(self, units: Indices) -> Moments:
        """Those of some of the inputs."""
        return replace(self, mean_x=self.mean_x[units], xx=self.xx[np.ix_(units, units)], xy=self.xy[units])


def joined(parts: Sequence[Moments]) -> Moments:
    """The moments of all rows together."""
    rows = sum(part.rows for part in parts)
    shares = [part.rows / max(rows, 1) for part in parts]
    mean_x = sum(share * part.mean_x for share, part in zip(shares, parts, strict=True))
    mean_y = sum(share * part.mean_y for share, part in zip(shares, parts, strict=True))
    xx, xy = np.zeros_like(parts[0].xx), np.zeros_like(parts[0].xy)
    for share, part in zip(shares, parts, strict=True):
        off_x, off_y = part.mean_x - mean_x, part.mean_y - mean_y
        xx += share * (part.xx + np.outer(off_x, off_x))
        xy += share * (part.xy + np.outer(off_x, off_y))
    return Moments(rows, np.asarray(mean_x), np.asarray(mean_y), xx, xy)


def regression(moments: Moments, old: Array, ridge: float) -> tuple[Array, Array]:
    """The ridge solution [K, N] towards the old weights, and the regularised moments [K, K] that it is exact for."""
    lam = ridge * max(float(np.trace(moments.xx)) / max(len(old), 1), TINY)
    system = moments.xx + lam * np.eye(len(old))
    solved = linalg.solve(system, moments.xy + lam * old, assume_a="pos")
    return np.asarray(solved), system


def error(moments: Moments, weight: Array) -> float:
    """Mean squared error of the centred y, but for the variance of y itself, which no weight changes."""
    return float(np.sum(weight * (moments.xx @ weight)) - 2 * np.sum(weight * moments.xy))


def best(fit: Moments, choose: Moments, candidate: Callable[[Moments, float], Array]) -> Array:
    """The candidate of the ridge that does best on `choose`, fitted on all of the data."""
    tried = []
    for ridge in RIDGES:
        try:
            tried.append((error(choose, candidate(fit, ridge)), ridge))
        except linalg.LinAlgError:
            continue
    return candidate(joined([fit, choose]), min(tried)[1])


def with_bias(moments: Moments, weight: Array) -> Affine:
    """The bias that keeps the mean of y."""
    bias = moments.mean_y - moments.mean_x @ weight
    return Affine(weight.astype(np.float32), bias.astype(np.float32))


# --- low rank -----------------------------------------------------------------------------------------------------


def truncated(weight: Array, rank: int) -> Array:
    """The nearest matrix of that rank."""
    left, values, right = linalg.svd(weight, full_matrices=False)
    return np.asarray((left[:, :rank] * values[:rank]) @ right[:rank])


def whitened(solution: Array, system: Array, rank: int) -> Array:
    """The matrix of that rank nearest to a regression's solution in what it makes of inputs with these moments."""
    factor = linalg.cholesky(system, lower=True)
    low = truncated(factor.T @ solution, rank)
    return np.asarray(linalg.solve_triangular(factor.T, low))


def uniform_ranks(shapes: Sequence[tuple[int, int]], free: Sequence[bool], budget: float) -> list[int | None]:
    """One share of its FLOPs for every free layer, so that all fit the budget; None: dense."""
    fixed = sum(k * n for (k, n), each in zip(shapes, free, strict=True) if not each)
    movable = sum(k * n for (k, n), each in zip(shapes, free, strict=True) if each)
    share = min(max((budget - fixed) / max(movable, 1), 0.0), 1.0)
    if share >= 1:
        return [None] * len(shapes)
    return [
        max(int(share * k * n / (k + n)), 1) if each else None
        for (k, n), each in zip(shapes, free, strict=True)
    ]


def energy_ranks(
    shapes: Sequence[tuple[int, int]], free: Sequence[bool], values: Sequence[Array], budget: float
) -> list[int | None]:
    """Ranks by singular values: whatever saves most of a layer's relative error for its FLOPs comes first.

    A layer that would need more FLOPs than dense becomes dense.
    """
    spent = sum(k * n for (k, n), each in zip(shapes, free, strict=True) if not each)
    ranks: list[int | None] = [1 if each else None for each in free]
    spent += sum(k + n for (k, n), each in zip(shapes, free, strict=True) if each)
    gains = [
        (float(value) ** 2 / max(float(np.sum(found**2)), TINY) / sum(shapes[at]), at)
        for at, found in enumerate(values)
        if free[at]
        for value in found[1:]
    ]
    for _, at in sorted(gains, reverse=True):
        rank, (k, n) = ranks[at], shapes[at]
        if rank is None:
            continue
        dense = (rank + 1) * (k + n) >= k * n
        cost = k * n - rank * (k + n) if dense else k + n
        if spent + cost <= budget:
            spent += cost
            ranks[at] = None if dense else rank + 1
    return ranks


def low_rank(work: Work, ratio: float, method: Literal["svd", "whitened"]) -> Reached:
    """Both ways to deal out ranks, with the layers that make the outputs dense and not: the least change counts."""
    shapes = [site.shape for site in work.sites]
    budget = ratio * work.flops / 2
    tried: list[tuple[float, Reached]] = []
    choices = [[site.index not in work.outer for site in work.sites]]
    if work.outer:
        choices.append([True] * len(work.sites))
    values = _values(work, method)
    for free in choices:
        dealt = {"uniform": uniform_ranks(shapes, free, budget)}
        dealt["by energy"] = energy_ranks(shapes, free, values, budget)
        for way, ranks in dealt.items():
            spent = sum(
                k * n if rank is None else rank * (k + n) for (k, n), rank in zip(shapes, ranks, strict=True)
            )
            if spent > budget * (1 + 1e-9):
                continue
            affine = _with_ranks(work, ranks, method)
            note = f"ranks {way}{'' if all(free) else ', output dense'}"
            tried.append(
                (
                    work.change(affine),
                    Reached(method, spent / sum(k * n for k, n in shapes), affine, note=note),
                )
            )
    if not tried:
        raise OutOfReachError(f"{method}: rank one everywhere already needs more than {ratio:g} of the FLOPs")
    return min(tried, key=lambda entry: entry[0])[1]


def _values(work: Work, method: str) -> list[Array]:
    """Singular values of each site's map, of whitened inputs where asked."""
    found = []
    for site in work.sites:
        weight = work.old(site).weight.astype(np.float64)
        if method == "whitened":
            xx = work.spread(site)
            lam = RIDGES[0] * max(float(np.trace(xx)) / len(xx), TINY)
            weight = linalg.cholesky(xx + lam * np.eye(len(xx)), lower=True).T @ weight
        found.append(np.asarray(linalg.svdvals(weight)))
    return found


def _with_ranks(work: Work, ranks: Sequence[int | None], method: str) -> dict[int, Affine]:
    """Layer after layer; a dense one is left as it is."""
    placed: dict[int, Affine] = {}
    asked = {site.index: rank for site, rank in zip(work.sites, ranks, strict=True) if rank is not None}
    for read in dict.fromkeys(site.input for site in work.sites):
        sites = [site for site in work.sites if site.input == read and site.index in asked]
        if not sites:
            continue
        for site, (fit, choose) in zip(sites, work.moments(sites, placed), strict=True):
            old, rank = work.old(site).weight.astype(np.float64), asked[site.index]
            fitted = truncated(old, rank) if method == "svd" else best(fit, choose, partial(_low, old, rank))
            placed[site.index] = with_bias(joined([fit, choose]), fitted)
    return placed


def _low(old: Array, rank: int, moments: Moments, ridge: float) -> Array:
    return whitened(*regression(moments, old, ridge), rank)


# --- fewer hidden units -------------------------------------------------------------------------------------------


def kept_units(work: Work, budget: float) -> dict[int, int]:
    """Hidden units of each pair, by its second site: one share for all of them, so that all layers fit the budget."""
    low, high = 0.0, 1.0
    for _ in range(40):
        share = (low + high) / 2
        low, high = (share, high) if _unit_flops(work, _shared(work, share)) <= budget else (low, share)
    return _shared(work, high if _unit_flops(work, _shared(work, high)) <= budget else low)


def _shared(work: Work, share: float) -> dict[int, int]:
    return {pair.second.index: max(int(share * pair.units + 1e-9), 1) for pair in work.pairs}


def _unit_flops(work: Work, kept: Mapping[int, int]) -> int:
    """Multiply-adds of all sites with so many units."""
    after = {pair.first.index: kept[pair.second.index] for pair in work.pairs}
    return sum(
        kept.get(site.index, site.shape[0]) * after.get(site.index, site.shape[1]) for site in work.sites
    )


def obs_units(system: Array, weight: Array, count: int) -> Indices:
    """The `count` units that optimal brain surgeon leaves of those with moments [H, H], read through weight [H, N]."""
    units, inverse, w = np.arange(len(weight)), np.asarray(linalg.inv(system)), weight.copy()
    step = max(1, len(weight) // STEPS)
    while len(units) > count:
        loss = np.sum(w**2, axis=1) / np.diagonal(inverse)
        gone = np.zeros(len(units), bool)
        gone[np.argsort(loss, kind="stable")[: min(step, len(units) - count)]] = True
        across, corner = inverse[np.ix_(~gone, gone)], inverse[np.ix_(gone, gone)]
        w = w[~gone] - across @ linalg.solve(corner, w[gone], assume_a="pos")
        inverse = inverse[np.ix_(~gone, ~gone)] - across @ linalg.solve(corner, across.T, assume_a="pos")
        units = units[~gone]
    return units


def wanda_units(moments: Moments, weight: Array, count: int) -> Indices:
    """The `count` units with the largest norm of what reads them times their standard deviation."""
    score = np.linalg.norm(weight, axis=1) * np.sqrt(np.diagonal(moments.xx))
    return np.sort(np.argsort(-score, kind="stable")[:count])


def fewer_units(work: Work, ratio: float, score: Score) -> Reached:
    """One share of the hidden units in every pair; what reads them is refitted."""
    kept = kept_units(work, ratio * work.flops / 2)
    reached = 2 * _unit_flops(work, kept) / work.flops
    if reached > ratio * (1 + 1e-9):
        raise OutOfReachError(f"{score}: a unit in each layer needs {reached:.3f} of the FLOPs")
    placed: dict[int, Affine] = {}
    for pair in work.pairs:
        count = kept[pair.second.index]
        if count == pair.units:
            continue
        ((fit, choose),) = work.moments([pair.second], placed)
        placed[pair.second.index] = refitted(fit, choose, work.old(pair.second), count, score)
    return Reached(score, reached, placed)


def refitted(fit: Moments, choose: Moments, old: Affine, count: int, score: Score) -> Affine:
    """The layer with `count` of its inputs, the others' weights at zero."""
    weight, every = old.weight.astype(np.float64), joined([fit, choose])
    if score == "wanda":
        units = wanda_units(every, weight, count)
    else:
        ridge = min(SELECTING, key=lambda ridge: _obs_error(fit, choose, weight, count, ridge))
        units = _obs_units(every, weight, count, ridge)
    made = np.zeros_like(weight)
    made[units] = best(fit.of_units(units), choose.of_units(units), partial(_solution, weight[units]))
    return with_bias(every, made)


def _solution(old: Array, moments: Moments, ridge: float) -> Array:
    return regression(moments, old, ridge)[0]


def _obs_units(moments: Moments, weight: Array, count: int, ridge: float) -> Indices:
    solution, system = regression(moments, weight, ridge)
    return obs_units(system, solution, count)


def _obs_error(fit: Moments, choose: Moments, weight: Array, count: int, ridge: float) -> float:
    """Of the units that this ridge chooses, on data that neither choice nor refit saw."""
    units = _obs_units(fit, weight, count, ridge)
    return error(choose.of_units(units), regression(fit.of_units(units), weight[units], ridge)[0])


# --- onnxsim ------------------------------------------------------------------------------------------------------


def onnxsim_pruned(
    work: Work, ratio: float, score: Literal["wanda", "magnitude"], tune: bool = True, ridge: float = 1e-2
) -> Reached:
    """Its structured pruning and its fine-tune, one pair of layers after another.

    Neither function takes the name of a layer, and the fine-tune finds units again by comparing weights bit by bit, so
    each pair is cut out as a model of its own, fed with what the model pruned so far feeds it. The reference of its
    fine-tune is then the unpruned pair on the same rows.
    """
    onnxsim: Any = import_module("onnxsim")
    kept = kept_units(work, ratio * work.flops / 2)
    if 2 * _unit_flops(work, kept) > ratio * work.flops * (1 + 1e-9):
        raise OutOfReachError("onnxsim: a unit in each layer needs more FLOPs")
    model = onnx.ModelProto.FromString(work.index.proto.SerializeToString())
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    placed: dict[int, Affine] = {}
    widths = {}
    for pair in work.pairs:
        x = work.inputs(pair, placed)
        rows = [{pair.first.input: x}]
        stage = pair_model(work.index, pair, stored, x.shape[1])
        sparsity = 1 - kept[pair.second.index] / pair.units
        if score == "wanda":
            pruned = onnxsim.apply_structured_wanda_pruning(stage, calibration_data=rows, sparsity=sparsity)
        else:
            pruned = onnxsim.apply_structured_pruning(stage, sparsity=sparsity)
        if tune:
            pruned = onnxsim.apply_pruning_finetune(stage, pruned, calibration_data=rows, reg_param=ridge)
        for tensor in pruned.graph.initializer:
            stored[tensor.name].CopyFrom(tensor)
        index = GraphIndex.build(pruned, onnx.numpy_helper.to_array)
        first, second = find_sites(index)
        widths[pair.second.index] = second.shape[0]
        placed[pair.first.index] = read_affine(index, first)
        placed[pair.second.index] = read_affine(index, second)
    del model.graph.value_info[:]
    reached = 2 * _unit_flops(work, widths) / work.flops
    tuned = f"fine-tuned, reg {ridge:g}" if tune else "not tuned"
    return Reached(f"onnxsim-{score}", reached, model=model, note=tuned)


def pair_model(
    index: GraphIndex, pair: Pair, stored: Mapping[str, onnx.TensorProto], inputs: int
) -> onnx.ModelProto:
    """The two layers by themselves, with the given weights: rows [T, K] -> rows [T, N]."""
    nodes, tensor = [index.node(at) for at in pair.first.nodes], pair.first.output
    while tensor != pair.second.input:
        reader = index.sole_consumer(tensor)
        assert reader is not None
        nodes.append(index.node(reader))
        tensor = nodes[-1].output[0]
    nodes += [index.node(at) for at in pair.second.nodes]
    read = {name for node in nodes for name in node.input}
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", width])
        for name, width in ((pair.first.input, inputs), (pair.second.output, pair.second.shape[1]))
    ]
    weights = [tensor for name, tensor in stored.items() if name in read]
    graph = onnx.helper.make_graph(nodes, "pair", ends[:1], ends[1:], weights)
    proto = index.proto
    return onnx.helper.make_model(graph, ir_version=proto.ir_version, opset_imports=list(proto.opset_import))


# --- all of them --------------------------------------------------------------------------------------------------

Method = Callable[[Work, float], Reached]


def _onnxsim(score: Literal["wanda", "magnitude"]) -> Method:
    """With the fine-tune's own ridge and a smaller one: the least change on the calibration data counts."""

    def run(work: Work, ratio: float) -> Reached:
        tried = [onnxsim_pruned(work, ratio, score, ridge=ridge) for ridge in (1e-2, 1e-4)]
        before = work.answer(Reached("original", 1.0), work.calib)

        def change(reached: Reached) -> float:
            return float(np.linalg.norm(work.answer(reached, work.calib) - before))

        return min(tried, key=change)

    return run


METHODS: dict[str, Method] = {
    "svd": lambda work, ratio: low_rank(work, ratio, "svd"),
    "whitened": lambda work, ratio: low_rank(work, ratio, "whitened"),
    "wanda": lambda work, ratio: fewer_units(work, ratio, "wanda"),
    "obs": lambda work, ratio: fewer_units(work, ratio, "obs"),
    "onnxsim-magnitude": _onnxsim("magnitude"),
    "onnxsim-wanda": _onnxsim("wanda"),
}
