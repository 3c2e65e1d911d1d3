"""Which positions of which tensor axes are one unit, and must keep one order.

Every axis of known length gets one *element* for each position. Operators tie elements together: an Add ties column j
of both operands and of the result, a MatMul ties column j of x to row j of W, a Reshape into heads ties the d columns
of a head to that head. Elements that are tied, however far apart in the graph, are one *unit*. What an operator does
that is not understood here is never guessed: it *pins* the elements that it touches, and their order stays.

Some operators *mix*: a norm or a Softmax reads all units of an axis to make each of them. The order of the units does
not matter to it, but none of them can be computed without the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from scipy.sparse import coo_array, csgraph

from onnx_decomp.fused_attention import DOMAIN, MultiHead
from onnx_decomp.graph import DEFAULT, attribute, nested_graphs, outer_reads
from onnx_decomp.graph_index import GraphIndex

Elements = NDArray[np.int64]

# fmt: off
ELEMENTWISE = frozenset({
    "Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Gelu", "Erf", "Tanh", "Sigmoid", "HardSigmoid", "HardSwish", "Swish",
    "Mish", "Softplus", "Softsign", "ThresholdedRelu", "Abs", "Neg", "Exp", "Log", "Sqrt", "Reciprocal", "Sin", "Cos",
    "Floor", "Ceil", "Round", "Sign", "Identity", "Cast", "Not", "IsNaN", "Clip", "Dropout",
    "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "PRelu", "Sum", "Mean", "Where", "Mod",
    "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor",
})
# fmt: on
"""Operators that act on each position alone, their operands broadcast against each other."""
MICROSOFT = frozenset({"Gelu", "FastGelu", "QuickGelu", "BiasGelu"})
"""The same in the domain com.microsoft."""
LONGEST = 2**24
"""An axis with more positions than this has no units: it is no layer's, and a table of them would not fit in memory."""
SKIP_NORMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
REDUCTIONS = frozenset(
    f"Reduce{kind}"
    for kind in ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSum", "LogSumExp")
)


@dataclass
class Axes:
    """The axes of one tensor, counted from the last one (-1). None: an axis whose length the graph doesn't tell.

    An axis of length one has no entry: it is broadcast. rank None: nothing is known of axes that are not listed.
    """

    known: dict[int, Elements | None]
    rank: int | None

    def at(self, axis: int) -> tuple[Elements | None, bool]:
        """Elements of an axis, and whether it may hold some that are not known."""
        if axis in self.known:
            found = self.known[axis]
            return found, found is None
        return None, self.rank is None

    def elements(self) -> list[Elements]:
        return [found for found in self.known.values() if found is not None]


NOTHING = Axes({}, None)


@dataclass
class Units:
    """What tracing found. `unit[e]` is the unit of element e; units are numbered from zero."""

    axes: dict[str, Axes]
    unit: NDArray[np.int64]
    pins: list[tuple[Elements, str]]
    mixed: dict[int, list[Elements]]
    """Elements that the operator at a position of the graph mixes."""
    copyable: set[int]
    """Positions of operators that can be computed for some units alone, if they mix none of them."""

    def of(self, tensor: str, axis: int) -> NDArray[np.int64] | None:
        """Unit of each position of an axis, or None where its length is not known."""
        found = self.axes.get(tensor, NOTHING).known.get(axis)
        return None if found is None else self.unit[found]


def trace(index: GraphIndex) -> Units:
    """Tie, pin and mix through the whole main graph, in its own order (ONNX graphs are sorted)."""
    tracer = Tracer(index)
    for name in index.inputs:
        tracer.pin(tracer.axes_of(name), "graph-input")
    for position, node in enumerate(index.nodes):
        tracer.visit(position, node)
    for value in index.proto.graph.output:
        tracer.pin(tracer.axes_of(value.name), "graph-output")
    return tracer.finish()


@dataclass
class Tracer:
    """State of one walk over the graph."""

    index: GraphIndex
    count: int = 0
    axes: dict[str, Axes] = field(default_factory=dict)
    ties: list[tuple[Elements, Elements]] = field(default_factory=list)
    pins: list[tuple[Elements, str]] = field(default_factory=list)
    mixed: dict[int, list[Elements]] = field(default_factory=dict)
    copyable: set[int] = field(default_factory=set)

    @cached_property
    def interface(self) -> set[str]:
        return {*self.index.inputs, *(value.name for value in self.index.proto.graph.output)}

    def finish(self) -> Units:
        heads = np.concatenate([np.zeros(0, np.int64), *(a for a, _ in self.ties)])
        tails = np.concatenate([np.zeros(0, np.int64), *(b for _, b in self.ties)])
        graph = coo_array((np.ones(len(heads), np.int8), (heads, tails)), shape=(self.count, self.count))
        unit = csgraph.connected_components(graph, directed=False)[1].astype(np.int64)
        return Units(self.axes, unit, self.pins, self.mixed, self.copyable)

    # Elements

    def fresh(self, length: int) -> Elements:
        self.count += length
        return np.arange(self.count - length, self.count)

    def axes_of(self, name: str) -> Axes:
        """Axes of a tensor: as traced, or new ones for a stored tensor or a graph input."""
        if name not in self.axes:
            stored = self.index.stored.get(name)
            shape = tuple(stored.dims) if stored is not None else self.index.shapes.get(name)
            self.axes[name] = self.new(shape)
            if stored is None:
                self.pin(self.axes[name], "unknown")
        return self.axes[name]

    def new(self, shape: Sequence[int | None] | None) -> Axes:
        if shape is None:
            return Axes({}, None)
        known = {
            at - len(shape): None if size is None or size > LONGEST else self.fresh(size)
            for at, size in enumerate(shape)
            if size != 1
        }
        return Axes(known, len(shape))

    def tie(self, first: Elements, second: Elements) -> None:
        if len(first) != len(second):
            self.pins += [(first, "unknown"), (second, "unknown")]
        elif first is not second:
            self.ties.append((first, second))

    def pin(self, axes: Axes, why: str) -> None:
        self.pins += [(found, why) for found in axes.elements()]

    def mix(self, position: int, elements: Elements | None) -> None:
        if elements is not None:
            self.mixed.setdefault(position, []).append(elements)

    # Operators

    def visit(self, position: int, node: onnx.NodeProto) -> None:
        for nested in nested_graphs(node):
            for name in sorted(outer_reads(nested) & (self.axes.keys() | self.index.stored.keys())):
                self.pin(self.axes_of(name), f"operator:{node.op_type}")
        if node.op_type == "Constant" and node.domain in DEFAULT:
            return  # its tensor is in `stored`
        made = None
        handler = self._handler(node)
        if handler is not None:
            made = handler(position, node)
        if made is None:
            made = self._unknown(node)
        self.axes |= made
        for name in made:
            if name in self.index.pinned_tensors - self.interface:
                self.pin(made[name], "nested-graph")

    def _handler(
        self, node: onnx.NodeProto
    ) -> Callable[[int, onnx.NodeProto], dict[str, Axes] | None] | None:
        domain, op = node.domain, node.op_type
        if domain == DOMAIN:
            special = {"MultiHeadAttention": self._multi_head, **dict.fromkeys(SKIP_NORMS, self._skip_norm)}
            return self._elementwise if op in MICROSOFT else special.get(op)
        if domain not in DEFAULT:
            return None
        if op in ELEMENTWISE:
            return self._elementwise
        if op in NORMS:
            return self._norm
        if op in REDUCTIONS:
            return self._reduce
        handlers = {
            "MatMul": self._matmul,
            "Gemm": self._gemm,
            "BatchNormalization": self._batch_norm,
            "Softmax": self._softmax,
            "LogSoftmax": self._softmax,
            "Transpose": self._transpose,
            "Reshape": self._reshape,
            "Flatten": self._reshape,
            "Squeeze": self._reshape,
            "Unsqueeze": self._reshape,
            "Split": self._split,
            "Concat": self._concat,
            "Gather": self._gather,
            "Shape": self._shape,
            "Size": self._shape,
        }
        return handlers.get(op)

    def _unknown(self, node: onnx.NodeProto) -> dict[str, Axes]:
        """An operator that is not understood: nothing it touches may change its order."""
        why = f"operator:{node.op_type}"
        for name in node.input:
            if name:
                self.pin(self.axes_of(name), why)
        made = {name: self.new(self.index.shapes.get(name)) for name in node.output if name}
        for axes in made.values():
            self.pin(axes, why)
        return made

    def _elementwise(self, position: int, node: onnx.NodeProto) -> dict[str, Axes]:
        self.copyable.add(position)
        result = self.broadcast([self.axes_of(name) for name in node.input if name])
        return {name: result for name in node.output if name}

    def broadcast(self, operands: Sequence[Axes]) -> Axes:
        """Tie operands position by position, counted from the last axis."""
        known: dict[int, Elements | None] = {}
        for axis in sorted({axis for axes in operands for axis in axes.known}):
            found = [axes.at(axis) for axes in operands]
            arrays = [elements for elements, _ in found if elements is not None]
            if not arrays:
                known[axis] = None
                continue
            known[axis] = arrays[0]
            for other in arrays[1:]:
                self.tie(arrays[0], other)
            if any(unknown for _, unknown in found):
                self.pins.append((arrays[0], "unknown"))
        ranks = [axes.rank for axes in operands]
        whole = [rank for rank in ranks if rank is not None]
        return Axes(known, max(whole, default=None) if len(whole) == len(ranks) else None)

    def _matmul(self, position: int, node: onnx.NodeProto) -> dict[str, Axes] | None:
        left, right = (self.axes_of(name) for name in node.input[:2])
        return self._product(position, node, left, right, right.rank)

    def _product(
        self, position: int, node: onnx.NodeProto, left: Axes, right: Axes, right_rank: int | None
    ) -> dict[str, Axes] | None:
        if right_rank is None or right_rank < 2 or left.rank == 1:
            return None
        self.copyable.add(position)
        inner = (left.at(-1)[0], right.at(-2)[0])
        for elements, other in (inner, inner[::-1]):
            if elements is not None and other is None:
                self.pins.append((elements, "unknown"))
        if inner[0] is not None and inner[1] is not None:
            self.tie(inner[0], inner[1])
        elif inner[1] is not None:
            left.known[-1] = inner[1]  # now its length is known: all that read this tensor share its units
        self.mix(position, inner[0] if inner[0] is not None else inner[1])
        batch = self.broadcast([_without(left, (-1, -2)), _without(right, (-1, -2))])
        known = dict(batch.known)
        for axis, source in ((-1, right), (-2, left)):
            elements, unknown = source.at(axis)
            if elements is not None or unknown:
                known[axis] = elements
        rank = None if left.rank is None else max(left.rank, right_rank)
        return {node.output[0]: Axes(known, rank)}

    def _gemm(self, position: int, node: onnx.NodeProto) -> dict[str, Axes] | None:
        left, right = (
            _turned(self.axes_of(name)) if attribute(node, flag, 0) else self.axes_of(name)
            for name, flag in zip(node.input[:2], ("transA", "transB"), strict=True)
        )
        made = self._product(position, node, Axes(left.known, 2), Axes(right.known, 2), 2)
        if made is not None and len(node.input) > 2 and node.input[2]:
            made[node.output[0]] = self.broadcast([made[node.output[0]], self.axes_of(node.input[2])])
        return made

    def _norm(self, position: int, node: onnx.NodeProto) -> dict[str, Axes] | None:
        x = self.axes_of(node.input[0])
        axis = int(attribute(node, "axis", -1))
        if axis >= 0:
            if x.rank is None:
                return None
            axis -= x.rank
        for at in range(axis, 0):
            self.mix(position, x.at(at)[0])
        parameters = [self.axes_of(name) for name in node.input[1:] if name]
        result = self.broadcast([x, *parameters])
        statistics = {name: Axes({}, None) for name in node.output[1:] if name}
        return {node.output[0]: result, **statistics}

    def _skip_norm(self, position: int, node: onnx.NodeProto) -> dict[str, Axes] | None:
        """A norm of a sum, which it hands on too, as its fourth output."""
        made = self._norm(position, node)
        if made is not None and len(node.output) > 3 and node.output[3]:
            made[node.output[3]] = made[node.output[0]]
        return made

    def _multi_head(self, position: int, node: onnx.NodeProto) -> dict[str, Axes] | None:
        """The columns of one head meet no others; what is added to scores may have values for each head."""
        found = MultiHead.of(node)
        if found is None:
            return None
        operands = [self.axes_of(name) for name in found.operands]
        columns = [elements for axes in operands if (elements := axes.at(-1)[0]) is not None]
        whole = len(columns) == 3 and not any(len(elements) % found.heads for elements in columns)
        if not whole or len(columns[0]) != len(columns[1]) or any(axes.rank == 4 for axes in operands):
            return None
        self.copyable.add(position)
        heads = self.fresh(found.heads)
        for elements in columns:
            self.tie(np.repeat(heads, len(elements) // found.heads), elements)
        added = self.axes_of(found.added) if found.added else Axes({}, 0)
        own, unknown = added.at(-3)
        if own is not None:
            self.tie(heads, own)
        elif unknown:
            self.pins.append((heads, "unknown"))
        mask = self.axes_of(found.mask) if found.mask else Axes({}, 0)
        for axes in (*(_without(axes, (-1,)) for axes in operands), _without(added, (-3,)), mask):
            self.pin(axes, f"operator:{node.op_type}")
        rows = _without(operands[0], (-1,)).known if operands[0].rank else dict.fromkeys((-2, -3))
        return {node.output[0]: Axes({**rows, -1: columns[2]}, 3)}

    def _batch_norm(self, position: int, node: onnx.NodeProto) -> dict[str, Axes] | None:
        x = self.axes_of(node.input[0])
        if x.rank is None or len([name for name in node.output if name]) > 1:
            return None
        self.copyable.add(position)
        channels, _ = x.at(1 - x.rank)
        for name in node.input[1:]:
            of_parameter = self.axes_of(name).at(-1)[0]
            if (channels is None) != (of_parameter is None):
                return None
            if channels is not None and of_parameter is not None:
                self.tie(channels, of_parameter)
        return {node.output[0]: x}

    def _reduce(self, position: int, node: onnx.NodeProto) -> dict[str, Axes] | None:
        x = self.axes_of(node.input[0])
        listed = attribute(node, "axes", None)
        if listed is None and len(node.input) > 1 and node.input[1]:
            listed = self.index.constant(node.input[1])
        if x.rank is None or listed is None or not np.size(listed):  # no axes at all may mean every axis
            return None
        self.copyable.add(position)
        reduced = {int(axis) - (x.rank if axis >= 0 else 0) for axis in np.ravel(listed)}
        for axis in reduced:
            self.mix(position, x.at(axis)[0])
        if attribute(node, "keepdims", 1):
            kept = {axis: elements for axis, elements in x.known.items() if axis not in reduced}
            return {node.output[0]: Axes(kept, x.rank)}
        kept = {
            axis + sum(other > axis for other in reduced): elements
            for axis, elements in x.known.items()
            if axis not in reduced
        }
        return {node.output[0]: Axes(kept, x.rank - len(reduced))}

    def _softmax(self, position: int, node: onnx.NodeProto) -> dict[str, Axes] | None:
        x = self.axes_of(node.input[0])
        opset = next((o.version for o in self.index.proto.opset_import if o.domain in DEFAULT), 1)
        axis = int(attribute(node, "axis", -1 if opset >= 13 else 1))
        if axis >= 0:
            if x.rank is None:
                return None
            axis -= x.rank
        self.copyable.add(position)
        for at in range(axis, axis + 1 if opset >= 13 else 0):  # once it flattened all that follows the axis
            self.mix(position, x.at(at)[0])
        return {node.output[0]: x}

    def _transpose(self, position: int, node: onnx.NodeProto) -> dict[str, Axes] | None:
        x = self.axes_of(node.input[0])
        order = attribute(node, "perm", None)
        rank = len(order) if order is not None else x.rank
        if rank is None or (x.rank is not None and x.rank != rank):
            return None
        order = list(order) if order is not None else list(range(rank))[::-1]
        self.copyable.add(position)
        known = {}
        for to, source in enumerate(order):
            elements, unknown = x.at(source - rank)
            if elements is not None or unknown:
                known[to - rank] = elements
        return {node.output[0]: Axes(known, rank)}

    def _reshape(self, position: int, node: onnx.NodeProto) -> dict[str, Axes] | None:
        before, after = (self.index.shapes.get(name) for name in (node.input[0], node.output[0]))
        stored = self.index.stored.get(node.input[0])
        before = tuple(stored.dims) if stored is not None else before
        if before is None or after is None:
            return None
        self.copyable.add(position)
        x, known = self.axes_of(node.input[0]), dict[int, Elements | None]()
        traced = [x.at(axis - len(before))[0] for axis in range(len(before))]
        before = tuple(len(e) if e is not None else n for e, n in zip(traced, before, strict=True))
        pairs = matched(before, after, node.op_type in ("Squeeze", "Unsqueeze"))
        for sources, targets in pairs:
            elements = [x.at(axis - len(before))[0] for axis in sources]
            known |= self._regrouped(sources, targets, elements, before, after)
        done = {axis for sources, _ in pairs for axis in sources}
        for axis, size in enumerate(before):
            lost = x.at(axis - len(before))[0]
            if axis not in done and size != 1 and lost is not None:
                self.pins.append((lost, f"operator:{node.op_type}"))
        reached = {axis for _, targets in pairs for axis in targets}
        for axis, size in enumerate(after):
            if axis not in reached and size != 1:
                known[axis - len(after)] = None
        return {node.output[0]: Axes(known, len(after))}

    def _regrouped(
        self,
        sources: Sequence[int],
        targets: Sequence[int],
        elements: Sequence[Elements | None],
        before: Sequence[int | None],
        after: Sequence[int | None],
    ) -> dict[int, Elements | None]:
        """Axes that one or several axes become. Where one axis is cut up, the outermost part carries its units."""
        rank = len(after)
        carrying = [at for at, found in enumerate(elements) if found is not None]
        if len(sources) == len(targets) == 1:
            return {targets[0] - rank: elements[0]}
        self.pins += [(elements[at], "operator:Reshape") for at in carrying[1:]]  # type: ignore[misc]
        if not carrying:
            return {axis - rank: None for axis in targets}
        at = carrying[0]
        inner = prod(before[axis] or 1 for axis in sources[at + 1 :])
        outer = prod(before[axis] or 1 for axis in sources[:at])
        found = elements[at]
        assert found is not None
        if inner * outer * len(found) > LONGEST:
            self.pins.append((found, "operator:Reshape"))
            return {axis - rank: None for axis in targets}
        flat = np.tile(np.repeat(found, inner), outer)
        if len(targets) == 1:
            return {targets[0] - rank: flat}
        heads = self.fresh(after[targets[0]] or 1)
        self.tie(np.repeat(heads, len(flat) // len(heads)), flat)
        return {targets[0] - rank: heads} | {axis - rank: None for axis in targets[1:]}

    def _split(self, position: int, node: onnx.NodeProto) -> dict[str, Axes] | None:
        x = self.axes_of(node.input[0])
        axis = int(attribute(node, "axis", 0))
        shapes = [self.index.shapes.get(name) for name in node.output]
        if x.rank is None or not -x.rank <= axis < x.rank:
            return None
        axis -= x.rank if axis >= 0 else 0
        elements = x.at(axis)[0]
        sizes = [shape[axis] if shape is not None and len(shape) == x.rank else None for shape in shapes]
        if elements is None or None in sizes:
            return None
        self.copyable.add(position)
        ends = np.cumsum([size or 0 for size in sizes])
        parts = np.split(elements, ends[:-1])
        self.pins += [(part, "operator:Split") for part in parts if len(part) == 1]
        others = _without(x, (axis,)).known
        return {
            name: Axes(others | ({axis: part} if len(part) != 1 else {}), x.rank)
            for name, part in zip(node.output, parts, strict=True)
        }

    def _concat(self, _position: int, node: onnx.NodeProto) -> dict[str, Axes] | None:
        operands = [self.axes_of(name) for name in node.input]
        rank = operands[0].rank
        if rank is None or any(axes.rank != rank for axes in operands):
            return None
        axis = int(attribute(node, "axis", 0))
        axis -= rank if axis >= 0 else 0
        parts = [axes.at(axis)[0] for axes in operands]
        result = self.broadcast([_without(axes, (axis,)) for axes in operands])
        if any(part is None for part in parts):
            self.pins += [(part, "operator:Concat") for part in parts if part is not None]
            return {node.output[0]: Axes({**result.known, axis: None}, rank)}
        joined = np.concatenate([part for part in parts if part is not None])
        return {node.output[0]: Axes({**result.known, axis: joined}, rank)}

    def _gather(self, position: int, node: onnx.NodeProto) -> dict[str, Axes] | None:
        data, indices = (self.axes_of(name) for name in node.input)
        if data.rank is None:
            return None
        axis = int(attribute(node, "axis", 0))
        axis -= data.rank if axis >= 0 else 0
        chosen = data.at(axis)[0]
        if chosen is not None:
            self.pins.append((chosen, "operator:Gather"))
        self.mix(position, chosen)
        self.pin(indices, "operator:Gather")
        before = {at: e for at, e in data.known.items() if at < axis}
        if indices.rank is None:
            self.pins += [(e, "operator:Gather") for e in before.values() if e is not None]
            rank, before = None, {}
        else:
            rank = data.rank + indices.rank - 1
        known = {at: e for at, e in data.known.items() if at > axis}
        if indices.rank is not None:
            known |= {at - indices.rank + 1: e for at, e in before.items()}
            known |= {axis - step: None for step in range(indices.rank)}
        return {node.output[0]: Axes(known, rank)}

    def _shape(self, _position: int, node: onnx.NodeProto) -> dict[str, Axes]:
        return {node.output[0]: self.new(self.index.shapes.get(node.output[0]))}


def matched(
    before: Sequence[int | None], after: Sequence[int | None], same: bool = False
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Which axes of a reshaped tensor hold the same positions: pairs of (axes before, axes after), from the right.

    Ends where a length that is not known leaves it open; axes of length one belong to no pair. same: all others are
    the same, in order.
    """
    same = same or (list(before).count(None), list(after).count(None)) == (1, 1)
    sources = [at for at, size in enumerate(before) if size != 1]
    targets = [at for at, size in enumerate(after) if size != 1]
    pairs: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    while sources and targets:
        s, t = [sources.pop()], [targets.pop()]
        while True:
            left = [before[at] for at in s]
            right = [after[at] for at in t]
            if None in left or None in right:
                if same and left == right == [None]:
                    break
                return pairs
            made, wanted = prod(x or 0 for x in left), prod(x or 0 for x in right)
            if made == wanted:
                break
            side, other = (s, sources) if made < wanted else (t, targets)
            if not other:
                return pairs
            side.insert(0, other.pop())
        pairs.append((tuple(s), tuple(t)))
    return pairs


def _without(axes: Axes, dropped: Sequence[int]) -> Axes:
    return Axes({axis: found for axis, found in axes.known.items() if axis not in dropped}, axes.rank)


def _turned(axes: Axes) -> Axes:
    swap: dict[int, Any] = {-1: -2, -2: -1}
    return Axes({swap.get(axis, axis): found for axis, found in axes.known.items()}, axes.rank)
