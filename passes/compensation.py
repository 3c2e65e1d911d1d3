"""Make up for what is removed: closed-form refits from second moments, no gradients.

For a site that will read only some of its inputs, with x what the *rewritten* model feeds it and y what the *original*
site made of its own input, the kept weights of each block solve

    minimise  E |y - x W - b|^2 + lam |W - W_old|^2          over W on the kept entries, and b

Ridge regression towards the old weights: with lam = 0 plain least squares, with lam = inf the old weights with the mean
of what is gone folded into the bias. lam is chosen on the select part of the data, never on what was fitted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from onnx_decomp.axes import Region
from onnx_decomp.calibration import Data, Part
from onnx_decomp.passes.correction import Wanted, corrected
from onnx_decomp.passes.folding import block_ranks, copies_of, partition
from onnx_decomp.passes.heads import turned_columns
from onnx_decomp.passes.moments import PLENTY, Array, Indices, Moments, accumulate, cautious, pooled
from onnx_decomp.passes.ridge import TINY, best_refit, factored, masked, relative_error, relative_to_aim
from onnx_decomp.probe import Feeds, Probe
from onnx_decomp.program import DROPPED, Labels, Segment
from onnx_decomp.scratch import kept
from onnx_decomp.sites import Affine, Site

BATCH, BATCH_ROWS = 512, 4096
"""Samples of one run over the data at most, and rows of x where a sample has many."""

HELD = 2**29
"""Bytes of what enters a region, held in memory for each part of the data."""

BOTH: tuple[Part, ...] = ("fit", "select")
"""Parts of the data that a fit looks at: one to solve on, one to choose the ridge on."""

FILED = 16
"""Moments lie in files where they are large, so that many times as many bytes of them are held."""

STEP = 1e-2
"""By which slopes are taken, of a unit's standard deviation: far above float32 rounding, small against the curvature
of an activation."""


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
        self,
        part: Part,
        site: Site,
        affine: Mapping[int, Affine],
        blocks: Labels | None = None,
        turn: Array | None = None,
    ) -> Moments:
        """Moments of x as the model with `affine` feeds it, and y as the original makes it; see `accumulate`.

        turn: [H, d, d], the basis that y is wanted in, head by head.
        """
        pairs = self._pairs(part, site, affine)
        if turn is not None:
            return accumulate(((x, turned_columns(y, turn)) for x, y in pairs), blocks)
        if affine:
            return accumulate(pairs, blocks)
        if (part, site.index) not in self.unchanged:
            made = accumulate(pairs)
            if sum(each.nbytes for each in self.unchanged.values()) + made.nbytes > FILED * self.limit:
                return made
            self.unchanged[part, site.index] = made.kept()
        return self.unchanged[part, site.index]

    def cautious_moments(self, site: Site) -> Moments:
        """Those of the original on the fit part, as `cautious` has them."""
        fit = self.moments("fit", site, {})
        if fit.rows >= PLENTY * site.shape[0]:
            return fit
        return cautious(fit, self.moments("select", site, {}))

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
    corrections: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)
    """By position of a site: the low-rank map beside its blocks, of x as the graph has it."""


def refit_run(
    calibrator: Calibrator,
    region: Region,
    segments: Sequence[Segment],
    old: Sequence[Affine],
    upstream: Mapping[int, Affine],
    importance: Sequence[Array | None] = (),
    remember: bool = True,
    turns: Mapping[int, Array] | None = None,
) -> Refitted:
    """Compensate the sites of a region one after another, each on what the rewritten sites before it really feed it.

    old: the original affine maps. upstream: affine maps already rewritten elsewhere in the model. importance: S for
    each site that is written in factors, see `lowrank`. Uses of one stored weight are refitted together, on the data
    of all of them, when the first one's turn comes. remember: the moments that they were fitted on. turns: the bases of
    heads that sites (by position) make their outputs in, which `old` is in already.
    """
    fitter = Fitter(calibrator, region, segments, old, importance, turns or {})
    placed = dict(upstream)
    if copies_of(segments):  # the graph runs whole, so later sites have to fit what earlier ones make
        placed |= {site.index: fitter.untouched(at) for at, site in enumerate(region.sites)}
    fitted: dict[int, Fitted] = {}
    for position, site in enumerate(region.sites):
        if position in fitted:
            continue
        uses = [at for at, other in enumerate(region.sites) if other.matrix == site.matrix]
        for at, one in fitter.fit(uses, placed, remember).items():
            fitted[at] = one
            placed[region.sites[at].index] = one.fed
    order = range(len(region.sites))
    return Refitted(
        tuple(fitted[at].affine for at in order),
        tuple(fitted[at].fed for at in order),
        tuple(fitted[at].errors[0] for at in order),
        tuple(fitted[at].errors[1] for at in order),
        tuple(made for at in order if (made := fitted[at].moments) is not None),
        {at: low for at in order if (low := fitted[at].correction) is not None},
    )


@dataclass(frozen=True)
class Fitted:
    """What became of one site: its blocks, the same as the graph is fed with them, with the correction beside them."""

    affine: Affine
    fed: Affine
    correction: NDArray[np.float32] | None
    errors: tuple[float, float]
    moments: Moments | None


@dataclass(frozen=True)
class Fitter:
    """Fits the sites of one region, each for given affine maps of those before it."""

    calibrator: Calibrator
    region: Region
    segments: Sequence[Segment]
    old: Sequence[Affine]
    importance: Sequence[Array | None]
    turns: Mapping[int, Array]
    """By position of a site, the bases of heads that its outputs are in."""

    def untouched(self, at: int) -> Affine:
        """A site's old weights within its blocks, as the graph is fed with them."""
        view, (rows, columns) = self._view(at), self._labels[at]
        return view.fed(masked(view.affine(self.old[at]), rows, columns))

    def fit(self, uses: Sequence[int], placed: Mapping[int, Affine], remember: bool) -> dict[int, Fitted]:
        """All sites that use one stored weight."""
        first = uses[0]
        segment = next(segment for segment in self.segments if first in segment.sites)
        if segment.corrections.get(first, 0):
            return {first: self._corrected(first, segment, placed, remember)}
        view, (rows, columns) = self._view(first), self._labels[first]
        inside = rows if view.rows is not None and not view.outside else None
        parts = [[view.moments(self._moments(part, at, placed, inside)) for at in uses] for part in BOTH]
        fit, select = (pooled(moments) for moments in parts)
        best = best_refit(fit, select, view.affine(self.old[first]), rows, columns)
        if first in segment.ranks:
            ranks = block_ranks(self.region, segment, first)
            best = factored(fit, best, rows, columns, ranks, self._importance(first))
        best = best.kept()
        errors = (relative_error(fit, best, rows, columns), relative_error(select, best, rows, columns))
        kept_moments = cautious(fit, select).kept() if remember else None
        made = {}
        for at, own in zip(uses, parts[0], strict=True):
            affine = best if len(uses) == 1 else _with_own_bias(best, own, columns)
            made[at] = Fitted(affine, view.fed(affine), None, errors, kept_moments)
        return made

    def _corrected(self, at: int, segment: Segment, placed: Mapping[int, Affine], remember: bool) -> Fitted:
        """A site that is blocks with a low-rank correction."""
        rows, columns = self._labels[at]
        fit, select = (self._moments(part, at, placed) for part in BOTH)
        elastic = self.region.ends[at][0] in self.region.elastic
        readable = rows != DROPPED if elastic else np.ones(len(rows), bool)
        rank = segment.corrections[at]
        wanted = Wanted(self.old[at], rows, columns, readable, rank, self._importance(at))
        blocks, low = corrected(fit, select, wanted)
        fed = Affine(blocks.weight + low, blocks.bias)
        stays = np.flatnonzero(columns != DROPPED)
        errors = (relative_to_aim(fit, fed, stays), relative_to_aim(select, fed, stays))
        kept_moments = cautious(fit, select).kept() if remember else None
        return Fitted(blocks.kept(), fed.kept(), kept(low), errors, kept_moments)

    def _moments(
        self, part: Part, at: int, placed: Mapping[int, Affine], blocks: Labels | None = None
    ) -> Moments:
        return self.calibrator.moments(part, self.region.sites[at], placed, blocks, self.turns.get(at))

    @cached_property
    def _labels(self) -> list[tuple[Labels, Labels]]:
        return partition(self.region, self.segments)

    def _view(self, at: int) -> View:
        return View.of(self.region, self.segments, at)

    def _importance(self, at: int) -> Array | None:
        return self.importance[at] if self.importance else None


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


def _with_own_bias(affine: Affine, own: Moments, columns: Labels) -> Affine:
    bias = own.mean_y - own.mean_x @ affine.weight.astype(np.float64)
    return Affine(affine.weight, np.where(columns != DROPPED, bias, 0.0).astype(np.float32))
