"""What of a region can be made smaller, and how much that is predicted to change what it hands on.

Units of a group go by optimal brain surgeon, weighted by what the layers behind make of them; the rank of a site goes
by its weighted singular values. Both start from the region as it stands: from moments of what it is really fed, and
from the weights that earlier steps have refitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from onnx_decomp.axes import Region
from onnx_decomp.passes.compensation import View
from onnx_decomp.passes.correction import beside
from onnx_decomp.passes.folding import block_ranks, block_sizes, partition
from onnx_decomp.passes.heads import Directions, Turn, by_head, directions, turned_columns, turned_maps
from onnx_decomp.passes.importance import through, weighted
from onnx_decomp.passes.lowrank import Factoring, factor
from onnx_decomp.passes.moments import Moments
from onnx_decomp.passes.reduction import UnitPath, round_up, unit_path
from onnx_decomp.passes.ridge import factored, refit
from onnx_decomp.passes.tradeoff import Key, Knob, Work, size_levels
from onnx_decomp.program import DROPPED, Labels, Segment
from onnx_decomp.sites import Affine

Array = NDArray[np.float64]

RIDGE = 1e-6
"""Of the refit by which a sensitivity is measured."""

SMALLEST = 8
"""Sites with fewer rows or columns are not factored."""


@dataclass(frozen=True)
class Standing:
    """A region as it stands: its segments, affine maps and moments by site, and S of each site (None: identity).

    affine: of the blocks. corrections: by position of a site the map beside them, see `correction`.
    """

    region: Region
    segments: tuple[Segment, ...]
    affine: tuple[Affine, ...]
    moments: tuple[Moments, ...]
    importance: tuple[Array | None, ...]
    corrections: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)

    def readers(self, group: int) -> list[int]:
        return [at for at, (read, _) in enumerate(self.region.ends) if read == group]

    def whole(self, at: int) -> NDArray[np.floating]:
        """W [K, N] of a site that reads units of the region: its blocks with the correction beside them."""
        weight, low = self.affine[at].weight, self.corrections.get(at)
        return weight if low is None else weight + low

    def segment(self, at: int) -> Segment:
        return next(segment for segment in self.segments if at in segment.sites)

    def labels(self, group: int) -> Labels:
        """Block of each element of a group; DROPPED by one segment is dropped by all."""
        found = [segment.labels[group] for segment in self.segments if group in segment.labels]
        gone = np.any([each == DROPPED for each in found], axis=0)
        wide = max(found, key=lambda each: int(each.max(initial=0)))
        return np.where(gone, np.int32(DROPPED), wide)


@dataclass(frozen=True)
class UnitKnob:
    """Fewer units of one group. kept: for each level which elements stay."""

    knob: Knob
    kept: tuple[NDArray[np.bool_], ...]


@dataclass(frozen=True)
class HeadKnob:
    """Narrower heads of one pair. widths: of a head at each level."""

    knob: Knob
    widths: tuple[int, ...]
    directions: Directions

    def turn(self, level: int) -> Turn:
        """The bases in which heads are that narrow, from those in which they stand."""
        return self.directions.turn(self.widths[level])


def unread_inputs(region: Region) -> list[int]:
    """Groups that only sites of the region read: its tensor as it enters, nothing else of it is needed here."""
    written = {group for _, group in region.ends}
    found = []
    for entry in region.entries:
        group = region.group_of[entry]
        reading = [site for site in region.sites if site.input == entry]
        plain = len(region.carriers[entry].units) == region.groups[group].size
        readers = sum(read == group for read, _ in region.ends)
        if plain and group not in written and len(reading) == readers:
            found.append(group)
    return found


def unit_knobs(standing: Standing, multiple: int, share: float) -> list[UnitKnob]:
    """A knob for each group that can lose units: hidden ones, and inputs that need not be read.

    share: of the units, down to which levels are looked at from here.
    """
    region, made = standing.region, []
    for group in [*sorted(region.elastic), *unread_inputs(region)]:
        readers = standing.readers(group)
        if group not in region.elastic and standing.corrections.keys() & set(readers):
            continue  # a correction reads all inputs as they are joined
        if len({region.sites[at].input for at in readers}) == 1:
            made.append(_unit_knob(standing, group, readers, multiple, share))
    return made


def _unit_knob(
    standing: Standing, group: int, readers: Sequence[int], multiple: int, share: float
) -> UnitKnob:
    labels = standing.labels(group)
    stays = np.flatnonzero(labels != DROPPED)
    blocks = max(int(labels.max(initial=0)) + 1, 1)
    first = readers[0]
    rows = partition(standing.region, standing.segments)[first][0][stays]
    if standing.corrections.keys() & set(readers):
        rows = np.zeros_like(rows)  # what goes from one block is missed beside the others too
    weights = [weighted(standing.whole(at)[stays], standing.importance[at]) for at in readers]
    least = max(int(len(stays) * share), blocks)
    path = _path(standing.moments[first].xx[np.ix_(stays, stays)], np.hstack(weights), rows, share)
    kept, sizes, harm = [labels != DROPPED], [_counts(labels, labels != DROPPED, blocks)], [0.0]
    for count in size_levels(len(stays), multiple if blocks == 1 else 1, least)[1:]:
        mask = _kept(path, labels[stays], int(count), multiple)
        if mask.sum() < kept[-1].sum():
            whole = np.zeros(len(labels), bool)
            whole[stays] = mask
            kept.append(whole)
            sizes.append(_counts(labels, whole, blocks))
            harm.append(float(path.squared[len(stays) - int(mask.sum())]))
    key = Key(standing.region.name, "units", group)
    knob = Knob(key, np.array(sizes), np.array(harm), np.zeros(len(harm)))
    return UnitKnob(knob, tuple(kept))


def _path(xx: Array, weight: Array, blocks: Labels, share: float) -> UnitPath:
    """The path over all blocks; what goes from one does nothing to another, so each has its own, merged by its cost."""
    order, growth, total = [], [], 0.0
    for block in np.unique(blocks):
        units = np.flatnonzero(blocks == block)
        path = unit_path(xx[np.ix_(units, units)], weight[units], max(int(len(units) * share), 1))
        order.append(units[path.order])
        known = np.isfinite(path.squared)
        growth.append(np.full(len(units), np.inf))
        growth[-1][: known.sum() - 1] = np.diff(path.squared[known])
        total += path.total
    units, steps = np.concatenate(order), np.concatenate(growth)
    # In the order of each path, so by the dearest step up to a unit.
    dearest = np.concatenate([np.maximum.accumulate(each) for each in growth])
    merged = np.argsort(dearest, kind="stable")
    squared = np.concatenate([[0.0], np.cumsum(steps[merged])])
    return UnitPath(units[merged], squared, total)


def _kept(path: UnitPath, labels: Labels, count: int, multiple: int) -> NDArray[np.bool_]:
    """At least one unit of every block, in widths that vector units like."""
    stays = np.zeros(len(labels), bool)
    stays[path.order[len(labels) - count :]] = True
    rank = np.empty(len(labels), np.intp)
    rank[path.order] = np.arange(len(labels))
    for block in np.unique(labels):
        members = np.flatnonzero(labels == block)
        wanted = round_up(int(stays[members].sum()), len(members), multiple)
        stays[members] = False
        stays[members[np.argsort(-rank[members])[:wanted]]] = True
    return stays


def _counts(labels: Labels, kept: NDArray[np.bool_], blocks: int) -> NDArray[np.intp]:
    return np.bincount(labels[kept & (labels != DROPPED)], minlength=blocks)


def rank_knobs(standing: Standing, multiple: int) -> list[Knob]:
    """A knob for the rank of each site whose weight is its own."""
    region = standing.region
    matrices = [site.matrix for site in region.sites]
    spans = partition(region, standing.segments)
    found = []
    for at, site in enumerate(region.sites):
        sizes = block_sizes(region, standing.segment(at), at)
        corrected = at in standing.corrections
        if (
            matrices.count(site.matrix) == 1
            and not corrected
            and min(min(size) for size in sizes) >= SMALLEST
        ):
            found.append(_rank_knob(standing, at, spans[at], multiple))
    return [knob for knob in found if len(knob.harm) > 1]


def _rank_knob(standing: Standing, at: int, span: tuple[Labels, Labels], multiple: int) -> Knob:
    segment, (rows, columns) = standing.segment(at), span
    tails, importance = [], standing.importance[at]
    for block in range(segment.blocks):
        r, c = np.flatnonzero(rows == block), np.flatnonzero(columns == block)
        within = None if importance is None else importance[np.ix_(c, c)]
        weight = standing.affine[at].weight[np.ix_(r, c)]
        tails.append(factor(standing.moments[at].xx[np.ix_(r, r)], weight, within).tail)
    now = block_ranks(standing.region, segment, at)
    squares = np.sort(np.concatenate([-np.diff(tail) for tail in tails]))[::-1]
    levels, harm = [now], [0.0]
    for total in size_levels(sum(now), multiple if segment.blocks == 1 else 1, segment.blocks)[1:]:
        ranks = [
            _rank(tail, squares[total - 1], limit, multiple) for tail, limit in zip(tails, now, strict=True)
        ]
        if sum(ranks) < sum(levels[-1]):
            levels.append(tuple(ranks))
            harm.append(float(sum(tail[rank] for tail, rank in zip(tails, ranks, strict=True))))
    key = Key(standing.region.name, "rank", at)
    return Knob(key, np.array(levels), np.array(harm), np.zeros(len(harm)))


def correction_knobs(standing: Standing, multiple: int) -> list[Knob]:
    """A knob for the rank of each correction, down to none at all."""
    found = []
    for at in standing.corrections:
        tail = _correction_factors(standing, at)[1].tail
        now = standing.segment(at).corrections[at]
        levels = [*size_levels(now, multiple), 0]
        harm = np.array([float(tail[rank]) if rank < now else 0.0 for rank in levels])
        key = Key(standing.region.name, "correction", at)
        found.append(Knob(key, np.array(levels)[:, None], harm, np.zeros(len(harm))))
    return found


def _correction_factors(standing: Standing, at: int) -> tuple[NDArray[np.intp], Factoring]:
    """The columns that a correction makes, and all ranks of it."""
    low, importance = standing.corrections[at], standing.importance[at]
    columns = np.flatnonzero(partition(standing.region, standing.segments)[at][1] != DROPPED)
    within = None if importance is None else importance[np.ix_(columns, columns)]
    return columns, factor(standing.moments[at].xx, low[:, columns], within)


def _rank(tail: Array, threshold: float, limit: int, multiple: int) -> int:
    """Singular values of one block at the threshold or above it."""
    count = int(np.count_nonzero(-np.diff(tail) >= threshold))
    return round_up(max(count, 1), limit, multiple)


def head_knobs(standing: Standing, multiple: int, share: float) -> list[HeadKnob]:
    """A knob for the width of the heads of each pair of sites that meet head by head.

    share: of the width, down to which levels are looked at from here.
    """
    corrected = standing.corrections.keys()  # a correction knows nothing of the bases that heads turn to
    found = [
        _head_knob(standing, number, multiple, share)
        for number, pair in enumerate(standing.region.pairs)
        if not corrected & {pair.first, pair.second}
    ]
    return [each for each in found if len(each.widths) > 1]


def _head_knob(standing: Standing, number: int, multiple: int, share: float) -> HeadKnob:
    pair, segment = standing.region.pairs[number], standing.segment(standing.region.pairs[number].first)
    now = segment.heads.get(number, pair.width)
    found = directions(*_head_moments(standing, number))
    widths = size_levels(now, multiple, max(int(now * share), min(multiple, now)))
    columns = np.array([n for _, n in block_sizes(standing.region, segment, pair.first)])
    harm = found.tail[widths] - found.tail[now]
    key = Key(standing.region.name, "heads", number)
    knob = Knob(key, np.outer(widths, columns // now), harm, np.zeros(len(harm)))
    return HeadKnob(knob, tuple(int(width) for width in widths), found)


def _head_moments(standing: Standing, number: int) -> tuple[Array, Array]:
    """C and T of every head [H, d, d], see `heads`."""
    pair = standing.region.pairs[number]
    first, second = standing.moments[pair.first], standing.moments[pair.second]
    weight = standing.affine[pair.second].weight
    if pair.kind == "values":
        metric = through(weight, standing.importance[pair.second])
        return by_head(second.xx, pair.heads), by_head(metric, pair.heads)
    affine = standing.affine[pair.first]
    mean = first.mean_x @ affine.weight + (0.0 if affine.bias is None else affine.bias)
    made = through(affine.weight.T, first.xx) + np.outer(mean, mean)
    return by_head(made, pair.heads), by_head(through(weight.T, second.xx), pair.heads)


def variance(standing: Standing, knob: Knob, found: UnitKnob | HeadKnob | None) -> float:
    """Squared size of what a knob's harm is an error of, weighted in the same way."""
    if isinstance(found, HeadKnob):
        return float(found.directions.tail[0])
    at = knob.key.at if found is None else standing.readers(knob.key.at)[0]
    importance, yy = standing.importance[at], standing.moments[at].yy
    return float(yy.sum() if importance is None else (yy * np.diagonal(importance)).sum())


def works(standing: Standing, knobs: Mapping[Key, Knob], rows_of_x: Mapping[int, int]) -> list[Work]:
    """What the sites of a region cost, by their knobs."""
    region, made = standing.region, []
    for at, site in enumerate(region.sites):
        sizes = block_sizes(region, standing.segment(at), at)
        axes: list[Key | tuple[int, ...]] = []
        for side, (group, tensor) in enumerate(zip(region.ends[at], (site.input, site.output), strict=True)):
            keys = [Key(region.name, "units", group)]
            keys += [
                Key(region.name, "heads", n) for n, pair in enumerate(region.pairs) if tensor in pair.joined
            ]
            turning = [key for key in keys if key in knobs]
            axes.append(turning[0] if turning else tuple(size[side] for size in sizes))
        rank = Key(region.name, "rank", at)
        low = Key(region.name, "correction", at)
        made.append(Work(axes[0], axes[1], rank, rows_of_x.get(site.index, 1), len(sizes), low))
    return made


def turned(
    standing: Standing, knob: Knob, level: int, found: UnitKnob | HeadKnob | None
) -> dict[int, Affine]:
    """Affine maps by position, as the graph is fed, with one knob turned and everything else as it is."""
    spans, key = partition(standing.region, standing.segments), knob.key
    if isinstance(found, HeadKnob):
        return _narrowed(standing, key.at, found.turn(level))
    if isinstance(found, UnitKnob):
        return _without(standing, key.at, found.kept[level])
    at = key.at
    if key.kind == "correction":
        return {
            at: _fed(standing, at, standing.affine[at], _truncated(standing, at, int(knob.sizes[level][0])))
        }
    ranks = tuple(int(rank) for rank in knob.sizes[level])
    new = factored(standing.moments[at], standing.affine[at], *spans[at], ranks, standing.importance[at])
    return {at: _fed(standing, at, new, None)}


def _without(standing: Standing, group: int, kept: NDArray[np.bool_]) -> dict[int, Affine]:
    """The readers of a group that has lost units, refitted to what they make now."""
    spans, made = partition(standing.region, standing.segments), {}
    for at in standing.readers(group):
        rows = np.where(kept, spans[at][0], np.int32(DROPPED))
        left = standing.corrections.get(at)
        left = None if left is None else np.where(kept[:, None], left, np.float32(0))
        new = refit(_as_it_stands(standing, at, left), standing.affine[at], rows, spans[at][1], RIDGE)
        made[at] = _fed(standing, at, new, left)
    return made


def _fed(standing: Standing, at: int, blocks: Affine, low: NDArray[np.floating] | None) -> Affine:
    """Blocks, and the correction beside them, as the graph is fed with them."""
    whole = View.of(standing.region, standing.segments, at).fed(blocks)
    return whole if low is None else Affine((whole.weight + low).astype(np.float32), whole.bias)


def _truncated(standing: Standing, at: int, rank: int) -> Array:
    """The correction of one site with a lower rank."""
    columns, factoring = _correction_factors(standing, at)
    made = np.zeros(standing.corrections[at].shape)
    made[:, columns] = factoring.truncated(rank)
    return made


def _narrowed(standing: Standing, number: int, turn: Turn) -> dict[int, Affine]:
    """Both sites of a pair in narrower heads; an output projection is refitted on what it is fed then."""
    region, pair = standing.region, standing.region.pairs[number]
    made = turned_maps(region, {number: turn}, standing.affine)
    if pair.kind == "values":
        at = pair.second
        rows, columns = partition(region, standing.segments)[at]
        stays = np.arange(len(rows)) % pair.width < turn.width
        whole = _as_it_stands(standing, at, None)
        fed = replace(
            whole,
            mean_x=turned_columns(whole.mean_x, turn.down),
            xx=turned_columns(turned_columns(whole.xx, turn.down).T, turn.down),
            xy=turned_columns(whole.xy.T, turn.down).T,
        )
        made[at] = refit(fed, made[at], np.where(stays, rows, np.int32(DROPPED)), columns, RIDGE)
    return {at: _fed(standing, at, made[at], None) for at in (pair.first, pair.second)}


def _as_it_stands(standing: Standing, at: int, left: NDArray[np.float32] | None) -> Moments:
    """Moments whose aim is what the site makes now: a refit towards the original would change more than one knob.

    left: of the correction beside its blocks, which makes a part of that.
    """
    moments, bias = standing.moments[at], standing.affine[at].bias
    weight = standing.whole(at).astype(np.float64)
    aim = moments.mean_x @ weight + (0.0 if bias is None else bias)
    made = replace(moments, xy=moments.xx @ weight, mean_y=aim)
    return made if left is None else beside(made, left)
