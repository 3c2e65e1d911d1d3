"""Which axes move together, and which parts of the graph are rewritten as one.

An *axis group* is a set of units (see `tracing`) that appear together on an axis of some site: the hidden units between
two layers, a residual stream through norms and adds, the heads of an attention. Every axis that carries the group keeps
one order. A group that touches the interface of the graph, or an operator that is not understood, is *pinned*: its
order is part of the interface. A free group may take any order, folded into all that carries it.

A *region* is a set of sites joined by operators that can be computed for some units alone, with those operators. It
is what is solved, rewritten and undone as one. A norm ends a region: it needs the joined tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from scipy.sparse import coo_array, csgraph

from onnx_decomp.attention import HeadPair, find_pairs
from onnx_decomp.fused_attention import MultiHead
from onnx_decomp.graph import DEFAULT
from onnx_decomp.graph_index import GraphIndex
from onnx_decomp.sites import Site
from onnx_decomp.tracing import ELEMENTWISE, MICROSOFT, Units, trace

Positions = NDArray[np.intp]


@dataclass(frozen=True)
class Carrier:
    """One axis (counted from the last, -1) of one tensor, and the unit of the group at each of its positions.

    Positions of other groups, on an axis that several share, hold -1.
    """

    tensor: str
    axis: int
    units: Positions


@dataclass(frozen=True)
class AxisGroup:
    """Units that share one order on all axes that carry them.

    writers, readers: indices of the sites whose columns, or rows, carry it. stored: constants that do.
    """

    index: int
    size: int
    writers: tuple[int, ...]
    readers: tuple[int, ...]
    stored: tuple[Carrier, ...] = field(repr=False)
    pinned: str | None = None
    """Why the order can't change, or None."""


@dataclass(frozen=True)
class Region:
    """Sites in graph order, and the operators between them.

    ends: for each site the groups of its inputs (rows of W) and of its outputs (columns).
    units: for each site the unit of each row, and of each column.
    carriers: the one grouped axis of each tensor that the region's operators read or make.
    entries: tensors from outside that carry units. exits: tensors that the outside reads.
    elastic: groups whose units can be left out or copied: nothing outside sees them, nothing reshapes them.
    """

    name: str
    sites: tuple[Site, ...]
    ends: tuple[tuple[int, int], ...]
    units: tuple[tuple[Positions, Positions], ...] = field(repr=False)
    links: tuple[int, ...]
    groups: Mapping[int, AxisGroup] = field(repr=False)
    carriers: Mapping[str, Carrier] = field(repr=False)
    group_of: Mapping[str, int] = field(repr=False)
    entries: tuple[str, ...] = ()
    exits: tuple[str, ...] = ()
    elastic: frozenset[int] = frozenset()
    constants: tuple[str, ...] = ()
    """Stored tensors beside weights and biases that carry units: scales, slopes."""
    flat: bool = True
    """All operators act on the last axis only, so that everything can be computed on matrices."""
    pairs: tuple[HeadPair, ...] = ()
    """Sites that meet head by head, so that heads can be made narrower."""
    one_row: bool = False
    """The graph says that what enters has a single row."""

    @property
    def nodes(self) -> tuple[int, ...]:
        """Positions of all nodes that a rewrite of the region replaces."""
        return tuple(sorted({*self.links, *(position for site in self.sites for position in site.nodes)}))

    @property
    def order(self) -> tuple[int, ...]:
        """Its groups by where they first occur along the sites: inputs, hidden ones, outputs."""
        found = [group for ends in self.ends for group in ends]
        return tuple(dict.fromkeys(found))

    @property
    def widths(self) -> tuple[int, ...]:
        """Size of each group, in `order`."""
        return tuple(self.groups[group].size for group in self.order)


def find_regions(index: GraphIndex, sites: Sequence[Site]) -> list[Region]:
    """Regions of the main graph in the order of their first site."""
    usable = [site for site in sites if site.obstacle is None]
    if not usable:
        return []
    return Builder(index, usable, trace(index)).regions()


class Builder:
    """Turns units into groups, and groups into regions."""

    def __init__(self, index: GraphIndex, sites: Sequence[Site], units: Units) -> None:
        self.index, self.sites, self.traced = index, sites, units
        self.rows = {site.index: self._weight_units(site, 0) for site in sites}
        self.columns = {site.index: self._weight_units(site, 1) for site in sites}
        self.group_of_unit, self.place = self._group_units()
        self.carriers = {name: self._carrier(name) for name in units.axes}
        for site in sites:
            for name, units_of in ((site.input, self.rows), (site.output, self.columns)):
                found, own = self.carriers.get(name), self._group(units_of[site.index])
                if found is not None and (found[0].axis, found[1]) != (-1, own):
                    self.carriers[name] = None  # a site's own units are on the last axis, told or not
        self.groups = dict(enumerate(self._groups()))

    # Groups

    def _weight_units(self, site: Site, side: int) -> NDArray[np.int64]:
        """Unit of each row (side 0) or column (1) of W [K, N]."""
        axis = (-2, -1)[side ^ site.turned]
        found = self.traced.of(site.operand, axis)
        if found is not None:
            return found
        nowhere = len(self.traced.unit)  # an axis of one: its order is no question
        return np.full(site.shape[side], nowhere)

    def _group_units(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Group of each unit, -1 for those on no site, and its place within the group, by first occurrence."""
        axes = [units for site in self.sites for units in (self.rows[site.index], self.columns[site.index])]
        count = len(self.traced.unit) + 1
        heads = np.concatenate([np.broadcast_to(axis[0], axis.shape) for axis in axes])
        tails = np.concatenate(axes)
        together = coo_array((np.ones(len(heads), np.int8), (heads, tails)), shape=(count, count))
        component = csgraph.connected_components(together, directed=False)[1]
        units, first = np.unique(tails, return_index=True)
        units = units[np.argsort(first)]
        names = {int(c): number for number, c in enumerate(dict.fromkeys(component[units].tolist()))}
        group, place = np.full(count, -1, np.intp), np.full(count, -1, np.intp)
        sizes: dict[int, int] = defaultdict(int)
        for unit in units:
            number = names[int(component[unit])]
            group[unit], place[unit] = number, sizes[number]
            sizes[number] += 1
        return group, place

    def _carrier(self, tensor: str) -> tuple[Carrier, int] | None:
        """The axis of a tensor that carries a group, and the group; None for none, or for more than one."""
        found = []
        for axis in self.traced.axes[tensor].known:
            units = self.traced.of(tensor, axis)
            if units is None:
                continue
            groups = np.unique(self.group_of_unit[units])
            if (groups >= 0).any():
                if len(groups) > 1:
                    return None
                found.append((Carrier(tensor, axis, self.place[units]), int(groups[0])))
        return found[0] if len(found) == 1 else None

    def _groups(self) -> Iterable[AxisGroup]:
        sizes = np.bincount(self.group_of_unit[self.group_of_unit >= 0])
        reasons: dict[int, str] = {}
        for elements, why in self.traced.pins:
            for group in np.unique(self.group_of_unit[self.traced.unit[elements]]):
                if reasons.get(int(group), "unknown") == "unknown":
                    reasons[int(group)] = why
        stored: dict[int, list[Carrier]] = defaultdict(list)
        for name in self.traced.axes:
            for carrier, group in self._carriers_of(name):
                if name in self.index.stored:
                    stored[group].append(carrier)
                if not self._regular(carrier, int(sizes[group])):
                    reasons.setdefault(group, "irregular")
        for number, size in enumerate(sizes):
            writers = [s.index for s in self.sites if self._group(self.columns[s.index]) == number]
            readers = [s.index for s in self.sites if self._group(self.rows[s.index]) == number]
            carriers = tuple(stored[number])
            yield AxisGroup(number, int(size), tuple(writers), tuple(readers), carriers, reasons.get(number))

    def _carriers_of(self, name: str) -> Iterable[tuple[Carrier, int]]:
        """Every axis of a tensor and every group on it."""
        for axis in self.traced.axes[name].known:
            units = self.traced.of(name, axis)
            if units is None:
                continue
            groups = self.group_of_unit[units]
            for group in np.unique(groups[groups >= 0]):
                yield Carrier(name, axis, np.where(groups == group, self.place[units], -1)), int(group)

    @staticmethod
    def _regular(carrier: Carrier, size: int) -> bool:
        """Every unit occurs equally often, so that units can change places with one another."""
        counts = np.bincount(carrier.units[carrier.units >= 0], minlength=size)
        return bool((counts == counts[0]).all())

    def _group(self, units: NDArray[np.int64]) -> int:
        return int(self.group_of_unit[units[0]])

    # Regions

    def regions(self) -> list[Region]:
        links = self._links()
        label = self._components(links)
        found: dict[int, list[Site]] = defaultdict(list)
        for site in self.sites:
            found[label[site.nodes[-1]]].append(site)
        inside: dict[int, list[int]] = defaultdict(list)
        for position in links:
            inside[label[position]].append(position)
        return [
            self._region(f"region_{number:03d}", sites, inside[component])
            for number, (component, sites) in enumerate(found.items())
        ]

    def _links(self) -> list[int]:
        """Operators on a path from one site to another that can be computed for some units alone, in order."""
        taken = {position for site in self.sites for position in site.nodes}
        entry = {site.input for site in self.sites}
        reached, links = {site.output for site in self.sites}, set[int]()
        # What is computed from joined tensors: the statistics of a norm in pieces, say, or a gate of width one.
        beyond = {site.output for site in self.sites if site.shape[1] == 1}
        forward = []
        for position, node in enumerate(self.index.nodes):
            if position in taken:
                continue
            joined = any(name in beyond and self.carriers.get(name) is None for name in node.input)
            if any(name in reached for name in node.input) and not joined and self._separable(position):
                forward.append(position)
                reached.update(node.output)
            elif any(name in beyond or name in reached for name in node.input):
                beyond.update(name for name in node.output if name)  # what is left out has no name
        wanted = set(entry)
        for position in reversed(forward):
            if any(name in wanted for name in self.index.node(position).output):
                links.add(position)
                wanted.update(self.index.node(position).input)
        return sorted(links)

    def _separable(self, position: int) -> bool:
        """The operator can be computed for some units of one group alone."""
        node = self.index.node(position)
        if position not in self.traced.copyable or (len(node.output) > 1 and node.op_type != "Split"):
            return False
        if node.op_type == "Reshape" and self.index.constant(node.input[1]) is None:
            return False  # a shape that is computed can't be told anew
        if not self.index.defaults.isdisjoint(node.input):
            return False  # nobody need feed it, so a region by itself would lack it
        for elements in self.traced.mixed.get(position, []):
            if (self.group_of_unit[self.traced.unit[elements]] >= 0).any():
                return False
        if not all((found := self.carriers.get(name)) and self._whole(*found) for name in node.output):
            return False
        if self._covers(position) or (_elementwise(self.index, position) and self._lifts(node)):
            return False
        groups = {
            found[1] for name in [*node.input, *node.output] if name and (found := self.carriers.get(name))
        }
        return len(groups) == 1

    def _covers(self, position: int) -> bool:
        """An operand may have a value for each unit without being known to carry them."""
        node = self.index.node(position)
        carrier = self.carriers[node.output[0]]
        assert carrier is not None
        axis = carrier[0].axis
        several = MultiHead.of(node)
        if several is not None:
            added = self.traced.axes[several.added].at(-3) if several.added else (None, False)
            carrying = [*several.operands, *([] if added[0] is None else [several.added])]
            return added[1] or any(self.carriers.get(name) is None for name in carrying)
        if not _elementwise(self.index, position) and (node.op_type != "MatMul" or axis >= -2):
            source = 1 if node.op_type == "MatMul" and axis == -1 else 0
            return self.carriers.get(node.input[source]) is None
        others = [name for name in node.input if name and self.carriers.get(name) is None]
        found = [self.traced.axes[name].at(axis) for name in others]
        return any(elements is not None or unknown for elements, unknown in found)

    def _whole(self, carrier: Carrier, group: int) -> bool:
        """All units of the group are there, so that every block has some."""
        return len(np.unique(carrier.units)) == int((self.group_of_unit == group).sum())

    def _lifts(self, node: onnx.NodeProto) -> bool:
        """A constant of higher rank adds an axis in front, which a fragment would lose."""
        rank = self.traced.axes[node.output[0]].rank
        for name in node.input:
            constant = self.index.constant(name) if name else None
            if constant is None:
                if self.carriers.get(name) and self.traced.axes[name].rank != rank:
                    return True
            elif rank is None and constant.ndim > 1:
                return True
        return False

    def _components(self, links: Sequence[int]) -> dict[int, int]:
        """Component of each site (by its last node) and link: what one makes the other reads, or one stored weight."""
        members = [site.nodes[-1] for site in self.sites] + list(links)
        number = {position: at for at, position in enumerate(members)}
        maker = {site.output: site.nodes[-1] for site in self.sites}
        maker |= {name: position for position in links for name in self.index.node(position).output}
        pairs = [
            (number[maker[site.input]], number[site.nodes[-1]]) for site in self.sites if site.input in maker
        ]
        pairs += [
            (number[maker[name]], number[position])
            for position in links
            for name in self.index.node(position).input
            if name in maker
        ]
        first: dict[str, int] = {}  # a part of a tensor is not rewritten without the others
        for site in self.sites:
            pairs.append((number[first.setdefault(site.weight, site.nodes[-1])], number[site.nodes[-1]]))
        heads, tails = np.array(pairs, np.intp).reshape(-1, 2).T
        graph = coo_array((np.ones(len(heads), np.int8), (heads, tails)), shape=(len(members), len(members)))
        labels = csgraph.connected_components(graph, directed=False)[1]
        return {position: int(labels[at]) for position, at in number.items()}

    def _region(self, name: str, sites: Sequence[Site], links: Sequence[int]) -> Region:
        ends = tuple((self._group(self.rows[s.index]), self._group(self.columns[s.index])) for s in sites)
        places = tuple((self.place[self.rows[s.index]], self.place[self.columns[s.index]]) for s in sites)
        groups = {group: self.groups[group] for pair in ends for group in pair}
        made = {site.output for site in sites} | {n for p in links for n in self.index.node(p).output}
        read = [site.input for site in sites] + [
            n for p in links for n in self.index.node(p).input if n and self.index.resolve(n) is None
        ]
        found = {n: self.carriers.get(n) for p in links for n in self.index.node(p).input if n}
        found |= {n: self.carriers.get(n) for n in [*made, *read]}
        for site, (rows, columns), (before, after) in zip(sites, ends, places, strict=True):
            found[site.input] = found.get(site.input) or (Carrier(site.input, -1, before), rows)
            found[site.output] = found.get(site.output) or (Carrier(site.output, -1, after), columns)
        carried = {n: pair for n, pair in found.items() if pair is not None}
        inner = {position for site in sites for position in site.nodes} | set(links)
        exits = [
            n
            for n in made
            if n in self.index.pinned_tensors or any(p not in inner for p in self.index.consumers.get(n, []))
        ]
        exits += [s.output for s in sites if s.output not in exits and not self.index.consumers.get(s.output)]
        entries = [n for n in dict.fromkeys(read) if n not in made and n in carried]
        joined = {carried[n][1] for n in [*entries, *exits]}
        return Region(
            name,
            tuple(sites),
            ends,
            places,
            tuple(links),
            groups,
            {n: carrier for n, (carrier, _) in carried.items()},
            {n: group for n, (_, group) in carried.items()},
            tuple(entries),
            tuple(sorted(exits, key=lambda n: self.index.producer[n])),
            frozenset(
                group for group in groups if group not in joined and self._elastic(group, sites, links)
            ),
            tuple(n for n in carried if self.index.resolve(n) is not None),
            self._flat(links, carried) and self._alike(entries),
            find_pairs(self.index, sites, places, links),
            all(set(self.index.shapes.get(name, (None, None))[:-1]) == {1} for name in entries),
        )

    def _elastic(self, group: int, sites: Sequence[Site], links: Sequence[int]) -> bool:
        """Free, carried by this region alone, one position for each unit, and only elementwise operators on it."""
        found, own = self.groups[group], {site.index for site in sites}
        if found.pinned or not own.issuperset([*found.writers, *found.readers]):
            return False
        if any(len(carrier.units) != found.size for carrier in found.stored):
            return False
        return all(
            _elementwise(self.index, position)
            for position in links
            if any((c := self.carriers.get(n)) and c[1] == group for n in self.index.node(position).input)
        )

    def _alike(self, entries: Sequence[str]) -> bool:
        """Tensors that have the same leading axes, as far as the graph tells: as matrices they have as many rows."""
        leads = {shape[:-1] if (shape := self.index.shapes.get(name)) else None for name in entries}
        return len(entries) == 1 or (len(leads) == 1 and None not in leads)

    def _flat(self, links: Sequence[int], carried: Mapping[str, tuple[Carrier, int]]) -> bool:
        """Every tensor carries its units on its last axis, and constants beside them have one value for each."""
        for position in links:
            if not _elementwise(self.index, position):
                return False
            for name in self.index.node(position).input:
                constant = self.index.constant(name) if name else None
                if constant is not None and constant.size == 1:
                    continue
                if name and name not in carried:
                    return False
                if constant is not None and constant.size != constant.shape[-1]:
                    return False
        return all(carrier.axis == -1 for carrier, _ in carried.values())


def _elementwise(index: GraphIndex, position: int) -> bool:
    node = index.node(position)
    if node.domain in DEFAULT:
        return node.op_type in ELEMENTWISE
    return node.op_type in MICROSOFT
