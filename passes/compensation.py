"""Make up for what is removed: closed-form refits from second moments, no gradients.

For a site that will read only some of its inputs, with x what the *rewritten* model feeds it and y what the *original*
site made of its own input, the kept weights of each block solve

    minimise  E |y - x W - b|^2 + lam |W - W_old|^2          over W on the kept entries, and b

Ridge regression towards the old weights: with lam = 0 plain least squares, with lam = inf the old weights with the mean
of what is gone folded into the bias. lam is chosen on the select part of the data, never on what was fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from onnx_decomp.axes import Region
from onnx_decomp.calibration import Data, Part
from onnx_decomp.passes.folding import block_ranks, copies_of, partition
from onnx_decomp.passes.lowrank import factor
from onnx_decomp.probe import Feeds, Probe
from onnx_decomp.program import DROPPED, Labels, Segment
from onnx_decomp.scratch import kept
from onnx_decomp.sites import Affine, Site

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

RIDGES = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, np.inf)
"""Candidates for lam, relative to the mean variance of a block's inputs."""


BATCH, BATCH_ROWS = 512, 4096
"""Samples of one run over the data at most, and rows of x where a sample has many."""

HELD = 2**29
"""Bytes of what enters a region, held in memory for each part of the data."""

STRIP = 512
"""Rows of a large matrix that are worked on at once."""

FILED = 16
"""Moments lie in files where they are large, so that many times as many bytes of them are held."""

STEP = 1e-2
"""By which slopes are taken, of a unit's standard deviation: far above float32 rounding, small against the curvature
of an activation."""

TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Moments:
    """Centred second moments of paired rows x [K] and y [N], each divided by the number of rows, in float64."""

    rows: int
    mean_x: Array
    mean_y: Array
    xx: Array
    xy: Array
    yy: Array
    """[N]: variances of y alone."""

    @property
    def nbytes(self) -> int:
        return self.xx.nbytes + self.xy.nbytes

    def kept(self) -> Moments:
        """The same, in files where they are large."""
        return replace(self, xx=kept(self.xx), xy=kept(self.xy))

    def of(self, rows: Indices, columns: Indices) -> Moments:
        """Those of one block."""
        return Moments(
            self.rows,
            self.mean_x[rows],
            self.mean_y[columns],
            self.xx[np.ix_(rows, rows)],
            self.xy[np.ix_(rows, columns)],
            self.yy[columns],
        )


def accumulate(
    pairs: Iterable[tuple[NDArray[np.floating], NDArray[np.floating]]], blocks: Labels | None = None
) -> Moments:
    """One streaming pass over batches of x [T, K] and y [T, N]; memory is bounded by a batch and K x (K + N).

    Sums are taken around the first batch's mean, so that a large mean costs no precision.
    blocks: [K], where products of x across blocks are not needed; they are left out of `xx`.
    """
    rows = 0
    parts = [] if blocks is None else [np.flatnonzero(blocks == b) for b in np.unique(blocks)]
    for x, y in pairs:
        x64 = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
        y64 = np.asarray(y, np.float64).reshape(-1, y.shape[-1])
        if rows == 0:
            shift_x, shift_y = x64.mean(0), y64.mean(0)
            sum_x, sum_y = np.zeros_like(shift_x), np.zeros_like(shift_y)
            xx = np.zeros((x64.shape[1], x64.shape[1]))
            xy = np.zeros((x64.shape[1], y64.shape[1]))
            yy = np.zeros(y64.shape[1])
        x64 = x64 - shift_x
        y64 = y64 - shift_y
        rows += len(x64)
        sum_x += x64.sum(0)
        sum_y += y64.sum(0)
        if blocks is None:
            _add_products(xx, x64, x64)
        for part in parts:
            xx[np.ix_(part, part)] += x64[:, part].T @ x64[:, part]
        _add_products(xy, x64, y64)
        yy += np.einsum("tn,tn->n", y64, y64)
    if rows == 0:
        raise ValueError("no rows to take moments of")
    dx, dy = sum_x / rows, sum_y / rows
    for products, other in ((xx, dx), (xy, dy)):
        for some in _strips(len(products)):
            products[some] /= rows
            products[some] -= np.outer(dx[some], other)
    yy = np.maximum(yy / rows - dy**2, 0.0)
    return Moments(rows, shift_x + dx, shift_y + dy, xx, xy, yy)


def _add_products(total: Array, x: Array, y: Array) -> None:
    """total [K, N] += x' y, in strips: these are the largest arrays that there are, and none is made beside them."""
    for some in _strips(len(total)):
        total[some] += x[:, some].T @ y


def _strips(size: int) -> Iterator[slice]:
    return (slice(start, start + STRIP) for start in range(0, size, STRIP))


def residual(moments: Moments, affine: Affine) -> float:
    """Mean squared error of y - (x W + b), summed over outputs, from moments alone."""
    weight = affine.weight.astype(np.float64)
    bias = np.zeros(weight.shape[1]) if affine.bias is None else affine.bias.astype(np.float64)
    spread = moments.yy.sum() - 2.0 * np.sum(weight * moments.xy) + np.sum(weight * (moments.xx @ weight))
    offset = moments.mean_y - moments.mean_x @ weight - bias
    return float(max(spread, 0.0) + offset @ offset)


def blocks_of(rows: Labels, columns: Labels) -> Iterator[tuple[Indices, Indices]]:
    """Row and column indices of every block; columns that no row feeds come with an empty row set."""
    for block in np.unique(columns[columns != DROPPED]):
        yield np.flatnonzero(rows == block), np.flatnonzero(columns == block)


def masked(affine: Affine, rows: Labels, columns: Labels) -> Affine:
    """The old weights on kept entries, zero elsewhere; nothing is made up for."""
    return _by_block(affine, rows, columns, lambda old, _rows, _columns: old)


def refit(moments: Moments, affine: Affine, rows: Labels, columns: Labels, ridge: float) -> Affine:
    """The ridge solution of the module's formula on the entries where rows and columns share a block.

    affine: the old weights [K, N]. Columns labelled DROPPED get zeros.
    """
    return _by_block(affine, rows, columns, lambda old, r, c: refit_block(moments.of(r, c), old, ridge))


def best_refit(fit: Moments, select: Moments, affine: Affine, rows: Labels, columns: Labels) -> Affine:
    """Each block refitted on `fit`, with the ridge that does best on `select`; leaving it as it was is a choice too."""

    def best(old: Affine, r: Indices, c: Indices) -> Affine:
        fitted, unseen = fit.of(r, c), select.of(r, c)
        candidates = [old]
        for ridge in RIDGES:
            try:
                candidates.append(refit_block(fitted, old, ridge))
            except linalg.LinAlgError:
                continue
        return min(candidates, key=lambda candidate: residual(unseen, candidate))

    return _by_block(affine, rows, columns, best)


def refit_block(moments: Moments, old: Affine, ridge: float) -> Affine:
    """The ridge solution for one block, dense in itself.

    ridge: lam relative to the mean variance of the inputs; inf keeps the old weights and moves the bias only.
    """
    weight = old.weight.astype(np.float64)
    if np.isfinite(ridge) and len(weight):
        lam = ridge * max(float(np.trace(moments.xx)) / len(weight), TINY)
        system = moments.xx + lam * np.eye(len(weight))
        weight = linalg.solve(system, moments.xy + lam * weight, assume_a="pos", overwrite_a=True)
    bias = moments.mean_y - moments.mean_x @ weight
    return Affine(weight.astype(np.float32), bias.astype(np.float32))


def factored(
    moments: Moments,
    affine: Affine,
    rows: Labels,
    columns: Labels,
    ranks: Sequence[int],
    importance: Array | None,
) -> Affine:
    """Each block of a refitted map [K, N] as the nearest one of its rank, by the errors that matter (`lowrank`)."""

    def nearest(old: Affine, r: Indices, c: Indices) -> Affine:
        rank = ranks[int(columns[c[0]])]
        if rank >= min(len(r), len(c)):
            return old
        block = moments.of(r, c)
        within = None if importance is None else importance[np.ix_(c, c)]
        weight = factor(block.xx, old.weight, within).truncated(rank)
        bias = block.mean_y - block.mean_x @ weight
        return Affine(weight.astype(np.float32), bias.astype(np.float32))

    return _by_block(affine, rows, columns, nearest)


def _by_block(
    affine: Affine, rows: Labels, columns: Labels, change: Callable[[Affine, Indices, Indices], Affine]
) -> Affine:
    """Put together what `change` makes of each block of W [k, n] and b [n]; zero outside of them."""
    weight = np.zeros_like(affine.weight)
    bias = np.zeros(len(columns), np.float32)
    biased = affine.bias is not None
    for r, c in blocks_of(rows, columns):
        at = np.ix_(r, c)
        block = change(Affine(affine.weight[at], None if affine.bias is None else affine.bias[c]), r, c)
        weight[at] = block.weight
        if block.bias is not None:
            bias[c], biased = block.bias, True
    return Affine(weight, bias if biased else None)


def relative_error(moments: Moments, affine: Affine, rows: Labels, columns: Labels) -> float:
    """Root of the mean squared error over the variance of y, both summed over the columns that are computed."""
    error = variance = 0.0
    for r, c in blocks_of(rows, columns):
        block = moments.of(r, c)
        bias = None if affine.bias is None else affine.bias[c]
        error += residual(block, Affine(affine.weight[np.ix_(r, c)], bias))
        variance += float(block.yy.sum())
    return float(np.sqrt(error / max(variance, TINY)))


@dataclass
class Calibrator:
    """Runs a region over a part of the data to get what a site is fed and what it ought to make.

    local: the region by itself. What enters it, in the original and in the model with `upstream` in place, is computed
    once and held, and so is what the original makes inside; where that is more than `limit` bytes, it is computed anew
    each time, and where the entering tensors alone are more, the whole graph runs.
    """

    probe: Probe
    data: Data
    local: Probe
    outer: Sequence[str]
    upstream: Mapping[int, Affine]
    limit: int = HELD
    samples: int | None = None
    """Of each part that are looked at; None: all."""
    batch: int = BATCH
    """Samples of one run."""
    streams: Mapping[int, str] = field(default_factory=dict)
    """By index of a site what its output is added to: its refit aims at the original's sum."""
    unchanged: dict[tuple[Part, int], Moments] = field(default_factory=dict)
    """Moments of the original, which every candidate for the region starts from."""
    entering: dict[tuple[Part, bool], list[Feeds] | None] = field(default_factory=dict)
    """What enters the region, batch by batch: in the original (False), with `upstream` (True); None if too much."""
    made: dict[tuple[Part, int, str], NDArray[np.floating]] = field(default_factory=dict)
    """What the original makes inside, by batch and tensor, as far as it is held."""

    def below(
        self, upstream: Mapping[int, Affine], entering: Mapping[Part, list[Feeds]] | None = None
    ) -> Calibrator:
        """The same with other affine maps upstream; what is held of the original is shared.

        entering: what enters the region with them in place, where that is known already.
        """
        held: dict[tuple[Part, bool], list[Feeds] | None] = {
            key: batches for key, batches in self.entering.items() if not key[1]
        }
        held |= {(part, True): batches for part, batches in (entering or {}).items()}
        return replace(self, upstream=upstream, entering=held)

    def batches(self, part: Part) -> list[Feeds]:
        """Inputs of the model that are looked at."""
        return list(self._batches(part))

    def hold(self, part: Part, batches: list[Feeds]) -> None:
        """Keep what enters the region in the original, if there is room for it."""
        names = {*self.outer, *self.streams.values()}
        wanted = [{n: a for n, a in feeds.items() if n in names} for feeds in batches]
        if sum(array.nbytes for feeds in wanted for array in feeds.values()) <= self.limit:
            self.entering[part, False] = [{n: kept(a) for n, a in feeds.items()} for feeds in wanted]

    def moments(
        self, part: Part, site: Site, affine: Mapping[int, Affine], blocks: Labels | None = None
    ) -> Moments:
        """Moments of x as the model with `affine` feeds it, and y as the original makes it; see `accumulate`."""
        if affine:
            return accumulate(self._pairs(part, site, affine), blocks)
        if (part, site.index) not in self.unchanged:
            made = accumulate(self._pairs(part, site, affine))
            if sum(each.nbytes for each in self.unchanged.values()) + made.nbytes > FILED * self.limit:
                return made
            self.unchanged[part, site.index] = made.kept()
        return self.unchanged[part, site.index]

    def slopes(self, site: Site, tensor: str, current: Affine, placed: Mapping[int, Affine]) -> Array:
        """E[s s'] over the fit part, s [N] the slopes of `tensor` by the site's output, unit by unit.

        current: the site's map as it stands; placed: all of them. Only elementwise operators may lie between.
        """
        bias = np.zeros(current.weight.shape[1], np.float32) if current.bias is None else current.bias
        spread = np.sqrt(self.moments("fit", site, {}).yy)
        step = STEP * (spread if len(spread) == len(bias) else np.full(len(bias), spread.mean()))
        step = np.maximum(step, STEP * max(float(spread.max()), TINY)).astype(np.float32)
        weight = placed.get(site.index, current).weight
        moved = {**placed, site.index: Affine(weight, (bias + step).astype(np.float32))}
        _, after, probe = self._runs("fit", bool(placed))
        total, rows = np.zeros((len(bias), len(bias))), 0
        for feeds in after:
            still = probe.run(feeds, placed, [tensor])[tensor].reshape(-1, len(bias))
            shifted = probe.run(feeds, moved, [tensor])[tensor].reshape(-1, len(bias))
            slope = (shifted.astype(np.float32) - still) / step
            total += slope.T @ slope
            rows += len(slope)
        return total / rows

    def _pairs(
        self, part: Part, site: Site, affine: Mapping[int, Affine]
    ) -> Iterator[tuple[NDArray[np.floating], NDArray[np.floating]]]:
        before, after, probe = self._runs(part, bool(affine))
        for number, (original, rewritten) in enumerate(zip(before, after, strict=True)):
            wanted = self._wanted(part, number, probe, (original, rewritten), site)
            if affine:
                yield probe.run(rewritten, affine, [site.input])[site.input], wanted
            else:
                yield self._originals(part, number, probe, original, [site.input])[site.input], wanted

    def _wanted(
        self, part: Part, number: int, probe: Probe, feeds: tuple[Feeds, Feeds], site: Site
    ) -> NDArray[np.floating]:
        """What a site ought to make of one batch: what the original makes, and what the stream lost before it."""
        wanted = self._originals(part, number, probe, feeds[0], [site.output])[site.output]
        stream = self.streams.get(site.index)
        if stream is None or not self.upstream or any(stream not in each for each in feeds):
            return wanted
        missing: NDArray[np.floating] = feeds[0][stream] - feeds[1][stream]
        return wanted + missing

    def _originals(
        self, part: Part, number: int, probe: Probe, feeds: Feeds, names: Sequence[str]
    ) -> dict[str, NDArray[np.floating]]:
        """Tensors that the original makes of one batch."""
        if any((part, number, name) not in self.made for name in names):
            local = () if probe is self.probe else probe.sites
            inner = [name for site in local for name in (site.input, site.output)]
            found = probe.run(feeds, {}, [*names, *inner])
            held = sum(array.nbytes for array in self.made.values())
            if held + sum(array.nbytes for array in found.values()) > self.limit:
                return {name: found[name] for name in names}
            self.made |= {(part, number, name): kept(array) for name, array in found.items()}
        return {name: self.made[part, number, name] for name in names}

    def _runs(self, part: Part, rewritten: bool) -> tuple[list[Feeds], list[Feeds], Probe]:
        """Batches of the original, of the model with `upstream`, and what to run them with."""
        before, after = self._entering(part, False), self._entering(part, bool(rewritten and self.upstream))
        if before is None or after is None:
            whole: list[Feeds] = list(self._batches(part))
            return whole, whole, self.probe
        return before, after, self.local

    def _entering(self, part: Part, rewritten: bool) -> list[Feeds] | None:
        key = (part, rewritten)
        if key not in self.entering:
            self.entering[key] = self._collected(part, self.upstream if rewritten else {})
        return self.entering[key]

    def _batches(self, part: Part) -> Iterator[Feeds]:
        left = self.samples if self.samples is not None and not self.data.fixed else self.data.samples(part)
        for feeds in self.data.batches(part, self.batch):
            count = len(next(iter(feeds.values())))
            yield feeds if count <= left else {name: array[:left] for name, array in feeds.items()}
            left -= count
            if left <= 0:
                return

    def _collected(self, part: Part, upstream: Mapping[int, Affine]) -> list[Feeds] | None:
        held, collected = 0, list[Feeds]()
        names = list(dict.fromkeys([*self.outer, *self.streams.values()]))
        for feeds in self._batches(part):
            made = self.probe.run(feeds, upstream, names)
            collected.append({name: kept(array) for name, array in made.items()})
            held += sum(array.nbytes for array in collected[-1].values())
            if held > self.limit:
                return None
        return collected


@dataclass(frozen=True)
class Refitted:
    """A region's compensated affine maps, with each site's relative error on what was fitted and on the select part."""

    affine: tuple[Affine, ...]
    placed: tuple[Affine, ...]
    """The same as the original graph is fed with them."""
    fitted_errors: tuple[float, ...]
    errors: tuple[float, ...]
    moments: tuple[Moments, ...] = ()
    """What each site was fitted on."""


def refit_run(
    calibrator: Calibrator,
    region: Region,
    segments: Sequence[Segment],
    old: Sequence[Affine],
    upstream: Mapping[int, Affine],
    importance: Sequence[Array | None] = (),
    remember: bool = True,
) -> Refitted:
    """Compensate the sites of a region one after another, each on what the rewritten sites before it really feed it.

    old: the original affine maps. upstream: affine maps already rewritten elsewhere in the model. importance: S for
    each site that is written in factors, see `lowrank`. Uses of one stored weight are refitted together, on the data
    of all of them, when the first one's turn comes. remember: the moments that they were fitted on.
    """
    placed = dict(upstream)
    labels = partition(region, segments)
    ranks = {at: block_ranks(region, segment, at) for segment in segments for at in segment.ranks}
    if copies_of(segments):  # the graph runs whole, so later sites have to fit what earlier ones make
        for position, (site, (rows, columns)) in enumerate(zip(region.sites, labels, strict=True)):
            view = View.of(region, segments, position)
            placed[site.index] = view.fed(masked(view.affine(old[position]), rows, columns))
    fitted: dict[int, Affine] = {}
    seen: dict[int, Moments] = {}
    errors: dict[int, tuple[float, float]] = {}
    for position, site in enumerate(region.sites):
        if position in fitted:
            continue
        uses = [at for at, other in enumerate(region.sites) if other.weight == site.weight]
        rows, columns = labels[position]
        view = View.of(region, segments, position)
        inside = rows if view.rows is not None and not view.outside else None
        parts: list[list[Moments]] = [
            [view.moments(calibrator.moments(part, region.sites[at], placed, inside)) for at in uses]
            for part in ("fit", "select")
        ]
        fit, select = (pooled(moments) for moments in parts)
        best = best_refit(fit, select, view.affine(old[position]), rows, columns)
        if position in ranks:
            weighting = importance[position] if importance else None
            best = factored(fit, best, rows, columns, ranks[position], weighting)
        best = best.kept()
        error = (relative_error(fit, best, rows, columns), relative_error(select, best, rows, columns))
        remembered = fit.kept() if remember else None
        for at, own in zip(uses, parts[0], strict=True):
            fitted[at] = best if len(uses) == 1 else _with_own_bias(best, own, columns)
            placed[region.sites[at].index] = view.fed(fitted[at])
            errors[at] = error
            if remembered is not None:
                seen[at] = remembered
        del parts, fit, select  # before the next site's are made: nothing else is as large
    order = range(len(region.sites))
    return Refitted(
        tuple(fitted[at] for at in order),
        tuple(placed[site.index] for site in region.sites),
        tuple(errors[at][0] for at in order),
        tuple(errors[at][1] for at in order),
        tuple(seen[at] for at in order if remember),
    )


@dataclass(frozen=True)
class View:
    """One site in the elements that its groups were dealt out to, beside its own rows and columns.

    rows, columns: the original row, or column, of each element; None where nothing was dealt out.
    outside: the rows come from outside of the region, so x still has the original ones.
    """

    shape: tuple[int, int]
    rows: Indices | None
    columns: Indices | None
    outside: bool

    @classmethod
    def of(cls, region: Region, segments: Sequence[Segment], position: int) -> View:
        copies, (before, after) = copies_of(segments), region.ends[position]
        return cls(
            region.sites[position].shape,
            copies.get(before),
            copies.get(after),
            before not in region.elastic,
        )

    def affine(self, old: Affine) -> Affine:
        """W and b of all elements."""
        weight, bias = old.weight, old.bias
        if self.rows is not None:
            weight = weight[self.rows]
        if self.columns is not None:
            weight, bias = weight[:, self.columns], None if bias is None else bias[self.columns]
        return Affine(weight, bias)

    def moments(self, found: Moments) -> Moments:
        """Moments of all elements. Inside the region x is made of elements already."""
        rows = np.arange(len(found.mean_x)) if self.rows is None or not self.outside else self.rows
        columns = np.arange(len(found.mean_y)) if self.columns is None else self.columns
        return found if self.rows is None and self.columns is None else found.of(rows, columns)

    def fed(self, affine: Affine) -> Affine:
        """The map as the graph is fed with it: an input that several blocks read is one row again."""
        if self.rows is None or not self.outside:
            return affine
        weight = np.zeros((self.shape[0], affine.weight.shape[1]), np.float32)
        np.add.at(weight, self.rows, affine.weight)
        return Affine(weight, affine.bias).kept()


def pooled(parts: Sequence[Moments]) -> Moments:
    """Moments around each part's own means, averaged over rows: those of one weight that is used several times."""
    if len(parts) == 1:
        return parts[0]
    rows = sum(part.rows for part in parts)

    def mean(values: Iterable[Array]) -> Array:
        return sum((part.rows / rows) * value for part, value in zip(parts, values, strict=True))  # type: ignore[return-value]

    return Moments(
        rows,
        mean(part.mean_x for part in parts),
        mean(part.mean_y for part in parts),
        mean(part.xx for part in parts),
        mean(part.xy for part in parts),
        mean(part.yy for part in parts),
    )


def _with_own_bias(affine: Affine, own: Moments, columns: Labels) -> Affine:
    bias = own.mean_y - own.mean_x @ affine.weight.astype(np.float64)
    return Affine(affine.weight, np.where(columns != DROPPED, bias, 0.0).astype(np.float32))
