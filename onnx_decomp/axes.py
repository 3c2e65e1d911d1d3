"""Which axes move together.

An *axis group* is a set of tensor axes that must share one order: the hidden units between two layers, say. Its
members are columns of the sites that write it, rows of the sites that read it, and the per-unit constants of the
elementwise operators in between. A group that touches the interface of the graph, or an operator that is not known
to act on each unit alone, is *pinned*: its order is part of the interface.

A *region* is a run of sites joined by free groups, in graph order. It is what is solved, rewritten and undone as one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from onnx_decomp.sites import GraphIndex, Site

# fmt: off
UNARY = frozenset({
    "Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Gelu", "Erf", "Tanh", "Sigmoid", "HardSigmoid", "HardSwish", "Swish",
    "Mish", "Softplus", "Softsign", "ThresholdedRelu", "Abs", "Neg", "Exp", "Log", "Sqrt", "Reciprocal", "Sin", "Cos",
    "Floor", "Ceil", "Round", "Sign", "Identity",
})
# fmt: on
BINARY = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "PRelu", "Sum", "Mean"})
WITH_SCALARS = frozenset({"Clip"})
MICROSOFT = frozenset({"Gelu", "FastGelu", "QuickGelu", "BiasGelu"})
"""Operators that act on each unit alone, given operands that are scalars or have one value for each unit."""


@dataclass(frozen=True)
class Link:
    """The elementwise operators between two sites of a region: a small graph from `entry` to `exit`."""

    nodes: tuple[int, ...]
    entry: str
    exit: str
    channels: tuple[str, ...]
    """Constants with one value for each hidden unit, sliced when the axis is split."""


@dataclass(frozen=True)
class AxisGroup:
    """Axes that share one order: columns of `writers`, rows of `readers` (indices of sites), `channels` constants."""

    size: int
    writers: tuple[int, ...]
    readers: tuple[int, ...]
    channels: tuple[str, ...] = ()
    pinned: str | None = None
    """Why the order can't change, or None."""


@dataclass(frozen=True)
class Region:
    """A run of sites: site l writes the axis that site l+1 reads, `links[l]` between them."""

    name: str
    sites: tuple[Site, ...]
    links: tuple[Link, ...]
    groups: tuple[AxisGroup, ...]
    """One for each axis of the run: inputs, hidden axes, outputs; the first and the last are pinned."""

    @property
    def input(self) -> str:
        return self.sites[0].input

    @property
    def output(self) -> str:
        return self.sites[-1].output

    @property
    def widths(self) -> tuple[int, ...]:
        """Length of each axis of the run: K of the first site, then N of every site."""
        return (self.sites[0].shape[0], *(site.shape[1] for site in self.sites))

    @property
    def nodes(self) -> tuple[int, ...]:
        """Positions of all nodes that a rewrite of the region replaces."""
        found = [position for site in self.sites for position in site.nodes]
        found += [position for link in self.links for position in link.nodes]
        return tuple(sorted(found))


def find_regions(index: GraphIndex, sites: Sequence[Site]) -> list[Region]:
    """Runs of rewritable sites, as long as each hidden axis has one writer, one reader and elementwise operators."""
    usable = [site for site in sites if site.obstacle is None]
    by_input = Counter(site.input for site in usable)
    readers = {site.input: site for site in usable if by_input[site.input] == 1}
    follow: dict[int, tuple[Link, Site]] = {}
    for site in usable:
        link = _trace(index, site, readers)
        if link is not None:
            follow[site.index] = (link, readers[link.exit])
    reached = {target.index for _, target in follow.values()}
    regions: list[Region] = []
    for site in usable:
        if site.index in reached:
            continue
        run, links = [site], []
        while run[-1].index in follow:
            link, target = follow[run[-1].index]
            links.append(link)
            run.append(target)
        regions.append(_region(index, run, links, len(regions)))
    return regions


def _region(index: GraphIndex, run: list[Site], links: list[Link], number: int) -> Region:
    first, last = run[0], run[-1]
    groups = [AxisGroup(first.shape[0], (), (first.index,), pinned=_border(index, first.input))]
    for before, link, after in zip(run, links, run[1:], strict=False):
        groups.append(AxisGroup(before.shape[1], (before.index,), (after.index,), link.channels))
    groups.append(AxisGroup(last.shape[1], (last.index,), (), pinned=_border(index, last.output)))
    return Region(f"region_{number:03d}", tuple(run), tuple(links), tuple(groups))


def _border(index: GraphIndex, tensor: str) -> str:
    if any(value.name == tensor for value in index.proto.graph.input):
        return "graph-input"
    if any(value.name == tensor for value in index.proto.graph.output):
        return "graph-output"
    operators = {index.node(position).op_type for position in index.consumers.get(tensor, [])}
    if tensor in index.producer:
        operators.add(index.node(index.producer[tensor]).op_type)
    return "operator:" + ",".join(sorted(operators))


def _trace(index: GraphIndex, site: Site, readers: dict[str, Site]) -> Link | None:
    """Follow a site's output through elementwise operators until one site reads all of it.

    The operators may form a small graph (an exported GELU reads its input twice); every tensor in it must stay
    inside it. Returns None where the axis is pinned or where it forks.
    """
    inside, nodes, channels = {site.output}, [], []
    pending = [site.output]
    target: Site | None = None
    while pending:
        tensor = pending.pop()
        if tensor in index.pinned_tensors:
            return None
        for position in index.consumers.get(tensor, []):
            reader = readers.get(tensor)
            if reader is not None and position == reader.nodes[0]:
                if target is not None:
                    return None
                target = reader
                continue
            if position in nodes:
                continue
            constants = _elementwise(index, position, site.shape[1], index.rank(site.output))
            if constants is None:
                return None
            nodes.append(position)
            channels += constants
            inside.update(index.node(position).output)
            pending += index.node(position).output
    if target is None or not _closed(index, nodes, inside, target.input):
        return None
    return Link(tuple(sorted(nodes)), site.output, target.input, tuple(dict.fromkeys(channels)))


def _closed(index: GraphIndex, nodes: list[int], inside: set[str], exit_tensor: str) -> bool:
    """Every operand is made inside the link or constant, and every result is read."""
    for position in nodes:
        for name in index.node(position).input:
            if name and name not in inside and index.constant(name) is None:
                return False
    return all(name == exit_tensor or index.consumers.get(name) for name in inside)


def _elementwise(index: GraphIndex, position: int, width: int, rank: int | None) -> list[str] | None:
    """Per-unit constants of an operator that acts on each unit alone; None if it isn't known to."""
    node = index.node(position)
    domain, op = node.domain, node.op_type
    known = op in UNARY | BINARY | WITH_SCALARS if domain in ("", "ai.onnx") else op in MICROSOFT
    if domain not in ("", "ai.onnx", "com.microsoft") or not known or len(node.output) != 1:
        return None
    channels = []
    for name in node.input:
        if not name:
            continue
        array = index.constant(name)
        if array is None:
            if index.rank(name) is None and op in BINARY:
                return None
            continue
        if array.ndim > 1 and (rank is None or array.ndim > rank):
            return None  # it would lift the result to a higher rank
        if array.size == 1:
            continue
        if op not in BINARY and op != "BiasGelu":
            return None
        if array.size != width or array.shape[-1] != width:
            return None
        channels.append(name)
    return channels
