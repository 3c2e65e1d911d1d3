"""Where the elements of a region's groups lie: orders, and how joined axes turn into blocks and back.

A free group may take any order: every weight, bias, scale, embedding and head that carries it is stored in that order.
A pinned group keeps its own. Where a tensor enters blocks, or leaves them, they are used as they lie when each is one
contiguous run; otherwise one Gather brings them together, of whole runs of columns where the blocks consist of such.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from onnx_decomp.axes import Region
from onnx_decomp.passes.folding import Indices, in_heads, renumbered
from onnx_decomp.program import DROPPED, Labels, Rewrite, Segment

Orders = Mapping[int, Indices]
"""By group: its elements in the order in which a joined tensor stores them."""


def joined_orders(rewrites: Iterable[Rewrite]) -> dict[int, Indices]:
    """The order that each free group takes where joined tensors carry it: by the blocks of the first that needs one."""
    orders: dict[int, Indices] = {}
    for rewrite in rewrites:
        orders = own_orders(rewrite.region, rewrite.segments) | orders
    return orders


def own_orders(region: Region, segments: Iterable[Segment]) -> dict[int, Indices]:
    """The same for one region by itself."""
    orders: dict[int, Indices] = {}
    for segment in segments:
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


def padded(blocks: Sequence[Indices]) -> list[Indices]:
    """Blocks as wide as the widest, none of which is empty: the others repeat their positions from the first one on.

    So what fills them up is finite wherever the block is, and whole runs of columns stay together. Nothing reads it:
    in the matrix behind it, its rows are zero.
    """
    width = max(len(block) for block in blocks)
    return [np.resize(block, width) for block in blocks]


@dataclass(frozen=True)
class Crossing:
    """How a joined axis and its blocks turn into one another: blocks in `sequence` hold `sizes` positions each.

    index: what to Gather of `width` positions, or None where the blocks lie side by side. run: positions that stay
    together when gathered.
    """

    sequence: tuple[int, ...]
    sizes: tuple[int, ...]
    width: int
    index: Indices | None
    run: int = 1


def entering(joined: Indices, blocks: Sequence[Indices], numbered: bool = False) -> Crossing:
    """From a joined axis, which stores the original positions `joined`, to blocks of such positions.

    numbered: they have to come in the order of their numbers. Blocks may share positions, or repeat them.
    """
    place = np.zeros(int(max(joined.max(), *(int(b.max(initial=0)) for b in blocks))) + 1, np.intp)
    place[joined] = np.arange(len(joined))
    sequences = _sequences(place, blocks, numbered)
    wanted = {order: place[np.concatenate([blocks[b] for b in order])] for order in sequences}
    return _crossing(blocks, wanted, len(joined))


def leaving(joined: Indices, blocks: Sequence[Indices], numbered: bool = False) -> Crossing:
    """From blocks to a joined axis that stores the original positions `joined`; of one that is repeated the first."""
    place = np.zeros(int(joined.max()) + 1, np.intp)
    place[joined] = np.arange(len(joined))
    held = {
        order: np.unique(place[np.concatenate([blocks[b] for b in order])], return_index=True)[1]
        for order in _sequences(place, blocks, numbered)
    }
    return _crossing(blocks, held, sum(len(block) for block in blocks))


def _sequences(place: Indices, blocks: Sequence[Indices], numbered: bool) -> Iterator[tuple[int, ...]]:
    """Orders of blocks: as they lie, if they lie side by side; by number, so that what is gathered agrees."""
    if not numbered:
        yield tuple(
            sorted(range(len(blocks)), key=lambda block: place[blocks[block]].min(initial=len(place)))
        )
    yield tuple(range(len(blocks)))


def _crossing(blocks: Sequence[Indices], indices: Mapping[tuple[int, ...], Indices], width: int) -> Crossing:
    """The first order in which nothing has to be gathered, else the last. width: of what would be gathered from."""
    for sequence, index in indices.items():
        sizes = tuple(len(blocks[block]) for block in sequence)
        if np.array_equal(index, np.arange(width)):
            return Crossing(sequence, sizes, width, None)
    return Crossing(sequence, sizes, width, index, _run_length(index, width))


def _run_length(order: Indices, size: int) -> int:
    """Largest r such that the order moves aligned groups of r consecutive elements."""
    starts = np.flatnonzero(np.diff(order, prepend=-2) != 1)
    bounds = np.concatenate([starts, order[starts], [size, len(order)]])
    return int(np.gcd.reduce(bounds))


def exchanged(segments: Sequence[Segment], number: int, segment: Segment) -> tuple[Segment, ...]:
    """All of them, with another one in one place."""
    return (*segments[:number], segment, *segments[number + 1 :])


@dataclass(frozen=True)
class Layout:
    """Where the elements of a region's groups lie: what emission writes, and what the plan prices."""

    region: Region
    segments: tuple[Segment, ...]
    """Blocks of a batched product are numbered as they lie where they enter or, else, where they leave."""
    orders: Orders

    @classmethod
    def of(cls, region: Region, segments: Sequence[Segment], joined: Orders | None = None) -> Layout:
        found = cls(region, tuple(segments), region_orders(region, segments, joined or {}))
        numbered = tuple(map(found._numbered, range(len(found.segments))))
        return cls(region, numbered, region_orders(region, numbered, joined or {}))

    def _numbered(self, number: int) -> Segment:
        segment = self.segments[number]
        if segment.form != "batched":
            return segment
        apart = replace(self, segments=exchanged(self.segments, number, replace(segment, form="chain")))
        for _, crossing in apart.crossings(number):
            if crossing.index is None:
                return renumbered(segment, crossing.sequence)
        return segment

    def stored(self, tensor: str) -> Indices:
        """Original positions of a joined tensor's grouped axis, in the order in which it holds them."""
        group = self.region.group_of[tensor]
        return self._in_heads(tensor, along(self._units(tensor, group), self.orders[group]))

    def blocks(self, tensor: str, segment: Segment) -> list[Indices]:
        """Original positions of a tensor's grouped axis in each block of a segment, padded where that is."""
        group = self.region.group_of[tensor]
        if group in segment.copies and group not in self.region.elastic:  # inputs that several blocks read
            found = [segment.copies[group][segment.labels[group] == b] for b in range(segment.blocks)]
        else:
            units, labels = self._units(tensor, group), segment.labels[group]
            every = [members(units, self.orders[group], labels, block) for block in range(segment.blocks)]
            found = [self._in_heads(tensor, positions) for positions in every]
        return padded(found) if segment.form == "batched" else found

    def entering(self, tensor: str, segment: Segment) -> Crossing:
        """From a joined tensor to a segment's blocks."""
        return entering(self.stored(tensor), self.blocks(tensor, segment), segment.form == "batched")

    def leaving(self, tensor: str, segment: Segment) -> Crossing:
        """From a segment's blocks to the joined tensor."""
        return leaving(self.stored(tensor), self.blocks(tensor, segment), segment.form == "batched")

    def _in_heads(self, tensor: str, positions: Indices) -> Indices:
        return positions[in_heads(self.region, self.segments[0], tensor, positions)]

    def _units(self, tensor: str, group: int) -> Indices:
        """Unit at each position; elements of a group that was dealt out anew count as units of their own."""
        for segment in self.segments:
            if group in segment.copies and group in self.region.elastic:
                return np.arange(len(segment.copies[group]))
        return self.region.carriers[tensor].units

    def crossings(self, number: int | None = None) -> Iterator[tuple[str, Crossing]]:
        """How the region's border tensors get into blocks and out of them, and those between two of its segments.

        number: of the only segment that is asked for.
        """
        for segment in self.segments if number is None else self.segments[number : number + 1]:
            read = {self.region.ends[site][0] for site in segment.sites}
            made = {self.region.ends[site][1] for site in segment.sites}
            yield from self._crossings(self.region.entries, read - made, 0, segment)
            yield from self._crossings(self.region.exits, made - read, 1, segment)

    def _crossings(
        self, border: Sequence[str], inner: Set[int], side: int, segment: Segment
    ) -> Iterator[tuple[str, Crossing]]:
        """border: what the outside hands over, or reads. inner: groups that other segments may make, or read."""
        region, cross = self.region, (self.entering, self.leaving)[side]
        touched = {region.ends[site][side] for site in segment.sites}
        tensors = [tensor for tensor in border if region.group_of[tensor] in touched]
        inner = inner - {region.group_of[tensor] for tensor in border}
        tensors += [
            (region.sites[site].input, region.sites[site].output)[side]
            for site in segment.sites
            if region.ends[site][side] in inner
        ]
        for tensor in dict.fromkeys(tensors):
            if segment.blocks > 1 or (segment.labels[region.group_of[tensor]] == DROPPED).any():
                yield tensor, cross(tensor, segment)
