"""Fold the permutations that make blocks contiguous into the weights on either side, where they cost nothing.

A free group may take any order: every weight, bias, scale, embedding and head that carries it is stored in that order.
A pinned group keeps its own. Where a tensor enters blocks, or leaves them, they are used as they lie when each is one
contiguous run; otherwise one Gather brings them together, of whole runs of columns where the blocks consist of such.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from onnx_decomp.axes import Region
from onnx_decomp.program import DROPPED, Copies, Form, Labels, Outcome, Rewrite, Segment, Structure

Indices = NDArray[np.intp]
Keep = Mapping[int, NDArray[np.bool_]]
"""By elastic group: the elements that stay."""
Orders = Mapping[int, Indices]
"""By group: its elements in the order in which a joined tensor stores them."""


# --- labels of axes -----------------------------------------------------------------------------------------------


def blocks_in_order(labels: Labels) -> list[int]:
    """Block ids by where they first occur."""
    kept = labels[labels != DROPPED]
    blocks, first = np.unique(kept, return_index=True)
    return [int(blocks[at]) for at in np.argsort(first)]


def adopt_dropped(labels: Labels) -> Labels:
    """Give each dropped element of a joined axis to the block before it (the first ones to the block after).

    Reading an input that nothing learned from costs a few multiplications in its block; leaving it out would break a
    contiguous run and cost a Gather.
    """
    kept = np.flatnonzero(labels != DROPPED)
    if not kept.size:
        return np.zeros_like(labels)
    before = np.searchsorted(kept, np.arange(len(labels)), side="right") - 1
    return labels[kept[np.maximum(before, 0)]]


def is_contiguous(labels: Labels) -> bool:
    """Nothing is dropped and every block is one run."""
    changes = int(np.count_nonzero(np.diff(labels)))
    return bool((labels != DROPPED).all()) and changes == len(np.unique(labels)) - 1


def settle_border(labels: Labels) -> Labels:
    """Labels of a pinned axis as they will be used: dropped elements adopted where that spares a Gather."""
    adopted = adopt_dropped(labels)
    return adopted if is_contiguous(adopted) or not (labels == DROPPED).any() else labels


# --- segments -----------------------------------------------------------------------------------------------------


def compose(
    region: Region, structures: Sequence[Structure] = (), keep: Keep | None = None
) -> tuple[Segment, ...]:
    """Segments that cover a region: its structures, and one dense segment of the other sites, reduced to `keep`.

    A unit dropped by one segment is dropped by all that share its axis; only elastic groups can lose any, and inputs.
    """
    segments = [Segment(s.sites, s.labels, s.blocks, copies=s.copies) for s in structures]
    covered = {site for segment in segments for site in segment.sites}
    rest = tuple(site for site in range(len(region.sites)) if site not in covered)
    if rest:
        groups = dict.fromkeys(group for site in rest for group in region.ends[site])
        plain = {group: np.zeros(region.groups[group].size, np.int32) for group in groups}
        segments.append(Segment(rest, plain, 1))
    segments.sort(key=lambda segment: segment.sites[0])
    gone = _dropped(region, segments, keep or {})
    return tuple(_settled(region, segment, gone) for segment in segments)


def _dropped(region: Region, segments: Sequence[Segment], keep: Keep) -> dict[int, NDArray[np.bool_]]:
    gone: dict[int, NDArray[np.bool_]] = {}
    for group in region.elastic:
        for segment in segments:
            if group in segment.labels:
                lost = segment.labels[group] == DROPPED
                gone[group] = gone[group] | lost if group in gone else lost
        if group in keep:
            gone[group] = gone[group] | ~keep[group]
    return {group: ~stays for group, stays in keep.items() if group not in gone} | gone


def _settled(region: Region, segment: Segment, gone: Mapping[int, NDArray[np.bool_]]) -> Segment:
    labels: dict[int, Labels] = {}
    written = {region.ends[site][1] for site in segment.sites}
    for group, found in segment.labels.items():
        if group in gone:
            labels[group] = np.where(gone[group], np.int32(DROPPED), found)
        elif group in segment.copies:
            labels[group] = found
        elif group in written or region.groups[group].pinned is None:
            labels[group] = adopt_dropped(found)  # an output has to come from somewhere
        else:
            labels[group] = settle_border(found)
    return replace(segment, labels=labels)


def partition(region: Region, segments: Sequence[Segment]) -> list[tuple[Labels, Labels]]:
    """Row and column labels of each site of a region."""
    found: dict[int, tuple[Labels, Labels]] = {}
    for segment in segments:
        for site in segment.sites:
            found[site] = site_labels(region, segment, site)
    return [found[site] for site in range(len(region.sites))]


def site_labels(region: Region, segment: Segment, site: int) -> tuple[Labels, Labels]:
    """Block of each row and of each column of one site; of each copy where the group was dealt out anew."""
    rows, columns = (
        segment.labels[group] if group in segment.copies else segment.labels[group][units]
        for group, units in zip(region.ends[site], region.units[site], strict=True)
    )
    if segment.heads:
        found = region.sites[site]
        rows = np.where(in_heads(region, segment, found.input, np.arange(len(rows))), rows, np.int32(DROPPED))
        stays = in_heads(region, segment, found.output, np.arange(len(columns)))
        columns = np.where(stays, columns, np.int32(DROPPED))
    return rows, columns


def in_heads(region: Region, segment: Segment, tensor: str, positions: Indices) -> NDArray[np.bool_]:
    """Which positions of a tensor's grouped axis stay where heads are made narrower."""
    stays = np.ones(len(positions), bool)
    for number, width in segment.heads.items():
        pair = region.pairs[number]
        if tensor in pair.joined:
            stays &= positions % pair.width < width
    return stays


def head_width(region: Region, segment: Segment, site: int) -> int | None:
    """Width that heads keep between a site and the one that it meets, where they are narrower; None elsewhere."""
    tensors = {region.sites[site].input, region.sites[site].output}
    widths = [width for number, width in segment.heads.items() if tensors & region.pairs[number].joined]
    return min(widths, default=None)


def copies_of(segments: Sequence[Segment]) -> Copies:
    """All groups that were dealt out anew."""
    return {group: units for segment in segments for group, units in segment.copies.items()}


def block_sizes(region: Region, segment: Segment, site: int) -> list[tuple[int, int]]:
    """Kept rows and columns of each block at one site, by block id."""
    rows, columns = (
        np.bincount(labels[labels != DROPPED], minlength=segment.blocks)
        for labels in site_labels(region, segment, site)
    )
    return [(int(k), int(n)) for k, n in zip(rows, columns, strict=True)]


def block_rank(segment: Segment, site: int, block: int, k: int, n: int) -> int | None:
    """Rank between the two products in which a block of k rows and n columns is written; None where it stays whole.

    It stays whole where two products would take no fewer multiplications. An axis between them is never empty: not
    every runtime takes one.
    """
    if site not in segment.ranks:
        return None
    rank = max(segment.ranks[site][block], 1)
    return rank if rank * (k + n) < k * n else None


def block_ranks(region: Region, segment: Segment, site: int) -> tuple[int, ...]:
    """Rank that each block of one site can have as it is written."""
    return tuple(min(widths) for widths in block_widths(region, segment, site))


def block_widths(region: Region, segment: Segment, site: int) -> list[tuple[int, ...]]:
    """Widths that each block of one site passes through: inputs, the rank where it is factored, outputs."""
    found: list[tuple[int, ...]] = []
    for block, (k, n) in enumerate(block_sizes(region, segment, site)):
        rank = block_rank(segment, site, block, k, n)
        found.append((k, n) if rank is None else (k, rank, n))
    return found


def correction_widths(region: Region, segment: Segment, site: int) -> tuple[int, int, int] | None:
    """Inputs, rank and outputs of the correction beside the blocks of one site; None where it has none."""
    rank = segment.corrections.get(site, 0)
    if not rank:
        return None
    rows, columns = site_labels(region, segment, site)
    read = int(np.count_nonzero(rows != DROPPED))
    if region.ends[site][0] not in region.elastic:
        read = region.sites[site].shape[0]  # as the joined tensor has them
    return read, rank, int(np.count_nonzero(columns != DROPPED))


def site_flops(region: Region, segment: Segment, site: int) -> int:
    """Multiply-adds times two for one row, of one site."""
    beside = correction_widths(region, segment, site)
    widths = block_widths(region, segment, site) + ([] if beside is None else [beside])
    return sum(2 * k * n for each in widths for k, n in pairwise(each))


def kept_flops(region: Region, segment: Segment) -> int:
    """Multiply-adds times two for one row, of all sites of the segment."""
    return sum(site_flops(region, segment, site) for site in segment.sites)


def site_rank(region: Region, segment: Segment, site: int) -> int | None:
    """Largest rank that one site can have as it is written, over all blocks; None where none is factored."""
    found = block_widths(region, segment, site)
    return sum(min(widths) for widths in found) if any(len(widths) > 2 for widths in found) else None


def decision_of(region: Region, segments: Sequence[Segment]) -> Outcome:
    """What a rewrite with these segments is called."""
    if any(segment.blocks > 1 for segment in segments):
        return "split"
    ranks = [site_rank(region, segment, site) for segment in segments for site in segment.sites]
    return "reduced" if ranks.count(None) == len(ranks) else "low-rank"


def forms(region: Region, segment: Segment) -> Iterator[Form]:
    """Forms in which a segment can be written at all."""
    if segment.blocks == 1:
        yield "dense"
        return
    yield "chain" if len(segment.sites) > 1 else "parallel"
    sites = [block_widths(region, segment, site) for site in segment.sites]
    if region.flat and all(len(set(widths)) == 1 and len(widths[0]) == 2 for widths in sites):
        yield "batched"


def factors(weight: NDArray[np.float32], rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A [K, rank] and B [rank, N] with A B = W of that rank, the singular values split evenly between them.

    From the smaller Gram matrix: several times quicker than a decomposition of W itself, and as exact as W is in
    float64. Sides of the same size are what float16 needs.
    """
    if weight.shape[0] > weight.shape[1]:
        right, left = factors(weight.T, rank)
        return left.T, right.T
    wide = weight.astype(np.float64)
    leading = [len(wide) - rank, len(wide) - 1]
    squares, vectors = linalg.eigh(wide @ wide.T, subset_by_index=leading)
    scale = np.maximum(squares, max(1e-14 * squares[-1], 1e-60)) ** 0.25  # W may have less than that rank
    down, up = vectors * scale, vectors.T @ wide / scale[:, None]
    return down.astype(np.float32), up.astype(np.float32)


# --- orders -------------------------------------------------------------------------------------------------------


def joined_orders(rewrites: Iterable[Rewrite]) -> dict[int, Indices]:
    """The order that each free group takes where joined tensors carry it: by the blocks of the first that needs one."""
    orders: dict[int, Indices] = {}
    for rewrite in rewrites:
        region = rewrite.region
        for segment in rewrite.segments:
            for group, labels in segment.labels.items():
                free = region.groups[group].pinned is None and group not in region.elastic
                if segment.blocks > 1 and free and group not in orders and group not in segment.copies:
                    orders[group] = np.argsort(labels, kind="stable")
    return orders


def region_orders(region: Region, segments: Sequence[Segment], joined: Orders) -> dict[int, Indices]:
    """Elements of each group of a region in the order in which its tensors hold them, dropped ones left out."""
    orders: dict[int, Indices] = {}
    for group, found in region.groups.items():
        labels = [segment.labels[group] for segment in segments if group in segment.labels]
        if group in region.elastic:
            kept = np.flatnonzero(np.all([each != DROPPED for each in labels], axis=0))
            orders[group] = kept[np.lexsort([each[kept] for each in reversed(labels)])]
        else:
            orders[group] = joined.get(group, np.arange(found.size))
    return orders


def along(units: Indices, order: Indices) -> Indices:
    """Positions of an axis as stored once its group is in `order`; units: the unit of each position, -1 for another's.

    Positions of one unit keep their places relative to those of the others: of a packed axis of queries, keys and
    values each part is reordered by itself.
    """
    held = units >= 0
    if len(order) > units.max(initial=-1) and np.array_equal(order, np.arange(len(order))):
        return np.arange(len(units))  # nothing moves; an axis may carry only some units of a pinned group
    if held.all() and np.array_equal(units, np.arange(len(units))):
        return order  # one position for each unit: some may be left out
    at = np.flatnonzero(held)
    size = int(units.max()) + 1
    places = at[np.argsort(units[at], kind="stable")].reshape(size, -1)
    stored = np.arange(len(units))
    stored[places] = places[order]
    return stored


def members(units: Indices, order: Indices, labels: Labels, block: int) -> Indices:
    """Positions of one block on an axis, in the order in which the axis stores them."""
    stored = along(units, order)
    found: Indices = stored[labels[units[stored]] == block]
    return found


@dataclass(frozen=True)
class Crossing:
    """How a joined axis and its blocks turn into one another: blocks in `sequence` hold `sizes` positions each.

    index: what to Gather, or None where the blocks lie side by side. run: positions that stay together when gathered.
    """

    sequence: tuple[int, ...]
    sizes: tuple[int, ...]
    index: Indices | None
    run: int = 1


def entering(joined: Indices, blocks: Sequence[Indices]) -> Crossing:
    """From a joined axis, which stores the original positions `joined`, to blocks of such positions."""
    place = np.zeros(int(max(joined.max(), *(int(b.max(initial=0)) for b in blocks))) + 1, np.intp)
    place[joined] = np.arange(len(joined))
    wanted = {order: place[np.concatenate([blocks[b] for b in order])] for order in _sequences(place, blocks)}
    return _crossing(blocks, wanted, len(joined))


def leaving(joined: Indices, blocks: Sequence[Indices]) -> Crossing:
    """From blocks to a joined axis that stores the original positions `joined`."""
    place = np.zeros(int(joined.max()) + 1, np.intp)
    place[joined] = np.arange(len(joined))
    held = {
        order: np.argsort(place[np.concatenate([blocks[b] for b in order])])
        for order in _sequences(place, blocks)
    }
    return _crossing(blocks, held, len(joined))


def _sequences(place: Indices, blocks: Sequence[Indices]) -> Iterator[tuple[int, ...]]:
    """Orders of blocks: as they lie, if they lie side by side; by number, so that what is gathered agrees."""
    yield tuple(sorted(range(len(blocks)), key=lambda block: place[blocks[block]].min(initial=len(place))))
    yield tuple(range(len(blocks)))


def _crossing(blocks: Sequence[Indices], indices: Mapping[tuple[int, ...], Indices], width: int) -> Crossing:
    """The first order in which nothing has to be gathered, else the last."""
    for sequence, index in indices.items():
        sizes = tuple(len(blocks[block]) for block in sequence)
        if np.array_equal(index, np.arange(width)):
            return Crossing(sequence, sizes, None)
    return Crossing(sequence, sizes, index, _run_length(index, width))


def _run_length(order: Indices, size: int) -> int:
    """Largest r such that the order moves aligned groups of r consecutive elements."""
    starts = np.flatnonzero(np.diff(order, prepend=-2) != 1)
    bounds = np.concatenate([starts, order[starts], [size, len(order)]])
    return int(np.gcd.reduce(bounds))


@dataclass(frozen=True)
class Layout:
    """Where the elements of a region's groups lie: what emission writes, and what the plan prices."""

    region: Region
    segments: tuple[Segment, ...]
    orders: Orders

    @classmethod
    def of(cls, region: Region, segments: Sequence[Segment], joined: Orders | None = None) -> Layout:
        return cls(region, tuple(segments), region_orders(region, segments, joined or {}))

    def stored(self, tensor: str) -> Indices:
        """Original positions of a joined tensor's grouped axis, in the order in which it holds them."""
        group = self.region.group_of[tensor]
        return self._in_heads(tensor, along(self._units(tensor, group), self.orders[group]))

    def blocks(self, tensor: str, segment: Segment) -> list[Indices]:
        """Original positions of a tensor's grouped axis in each block of a segment."""
        group = self.region.group_of[tensor]
        if group in segment.copies and group not in self.region.elastic:  # inputs that several blocks read
            return [segment.copies[group][segment.labels[group] == b] for b in range(segment.blocks)]
        units, labels = self._units(tensor, group), segment.labels[group]
        found = [members(units, self.orders[group], labels, block) for block in range(segment.blocks)]
        return [self._in_heads(tensor, positions) for positions in found]

    def _in_heads(self, tensor: str, positions: Indices) -> Indices:
        return positions[in_heads(self.region, self.segments[0], tensor, positions)]

    def _units(self, tensor: str, group: int) -> Indices:
        """Unit at each position; elements of a group that was dealt out anew count as units of their own."""
        for segment in self.segments:
            if group in segment.copies and group in self.region.elastic:
                return np.arange(len(segment.copies[group]))
        return self.region.carriers[tensor].units

    def crossings(self) -> Iterator[tuple[str, Crossing]]:
        """How the region's border tensors get into blocks and out of them."""
        for tensors, cross, side in ((self.region.entries, entering, 0), (self.region.exits, leaving, 1)):
            for tensor in tensors:
                for segment in self.segments:
                    touched = {self.region.ends[site][side] for site in segment.sites}
                    group = self.region.group_of[tensor]
                    if group in touched and (segment.blocks > 1 or (segment.labels[group] == DROPPED).any()):
                        yield tensor, cross(self.stored(tensor), self.blocks(tensor, segment))
