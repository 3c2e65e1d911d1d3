"""Write rewrites as ONNX: a pure patch of the original.

`emit` copies the original model, takes out the nodes of each rewritten region and puts a fragment of standard operators
in their place. Every other message stays as it is, byte for byte. Fragments are built with onnx-graphsurgeon, which
never sees the whole model: a round trip of that through it is not lossless.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_decomp.axes import Link
from onnx_decomp.passes.folding import Layout, blocks_in_order, layouts
from onnx_decomp.program import DROPPED, Program, Rewrite, Segment
from onnx_decomp.runtime import Device
from onnx_decomp.sites import Affine, GraphIndex, Site, nested_graphs

Value: TypeAlias = Any
"""A graphsurgeon tensor; its own annotations are not for type checkers."""


@dataclass
class Fragment:
    """A small graph under construction. Names are made unique against the model's own."""

    taken: set[str]
    opset: int
    dtype: np.dtype[Any]
    nodes: list[gs.Node] = field(default_factory=list)
    scalars: dict[str, Value] = field(default_factory=dict)
    """Scalars of the model's own that are read as they stand; graphsurgeon wants one object for each name."""

    def unique(self, name: str) -> str:
        candidate, number = name, 1
        while candidate in self.taken:
            candidate, number = f"{name}.{number}", number + 1
        self.taken.add(candidate)
        return candidate

    def weight(self, name: str, array: NDArray[Any]) -> gs.Constant:
        return gs.Constant(self.unique(name), np.ascontiguousarray(array, self.dtype))

    def integers(self, name: str, values: Sequence[int] | NDArray[Any]) -> gs.Constant:
        return gs.Constant(self.unique(name), np.asarray(values, np.int64))

    def apply(
        self,
        op: str,
        name: str,
        inputs: Sequence[Value],
        outputs: int = 1,
        into: str | None = None,
        domain: str | None = None,
        **attributes: Any,
    ) -> list[Value]:
        """Append a node; its outputs are called after it, or `into` where the model already has a name for it."""
        name = self.unique(name)
        names = [into] if into else [self.unique(f"{name}_output_{i}") for i in range(outputs)]
        made = [gs.Variable(output) for output in names]
        self.nodes.append(
            gs.Node(op=op, name=name, attrs=attributes, inputs=list(inputs), outputs=made, domain=domain)
        )
        return made

    def one(self, op: str, name: str, inputs: Sequence[Value], **rest: Any) -> Value:
        return self.apply(op, name, inputs, **rest)[0]

    def messages(self) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """The fragment as messages to splice in: nodes in order, and the initializers they read."""
        graph = gs.Graph(nodes=self.nodes, opset=self.opset, name="fragment")
        exported = gs.export_onnx(graph, do_type_check=False).graph
        return list(exported.node), list(exported.initializer)


@dataclass(frozen=True)
class Writer:
    """Writes one rewrite into a fragment."""

    index: GraphIndex
    rewrite: Rewrite
    fragment: Fragment
    target: Device

    def write(self) -> None:
        region = self.rewrite.region
        segments = self.rewrite.segments
        orders = layouts(segments)
        prefix = f"{base_name(region.sites[0])}/decomp"
        outer: Value = gs.Variable(region.input)
        rank = region.sites[0].rank
        value = outer if rank == 2 else self._flatten(outer, prefix)
        value = self._gather_in(value, orders[0], prefix)
        for segment in segments:
            last = segment is segments[-1]
            into = region.output if last and rank == 2 and not orders[-1].gather else None
            local = orders[segment.start : segment.stop + 1]
            if segment.form == "batched":
                value = self._batched(value, segment, local, into)
            else:
                value = self._branches(value, segment, local, into)
            if not last:
                value = self._link(value, region.links[segment.stop - 1], segment.stop, orders)
        value = self._gather_out(value, orders[-1], prefix, region.output if rank == 2 else None)
        if rank != 2:
            self._unflatten(value, outer, prefix)

    # Borders of the region

    def _flatten(self, value: Value, prefix: str) -> Value:
        """To 2-D, once: every branch is then a plain Gemm."""
        shape = self.fragment.integers(f"{prefix}/rows", [-1, self.rewrite.region.widths[0]])
        return self.fragment.one("Reshape", f"{prefix}/Flatten", [value, shape])

    def _unflatten(self, value: Value, outer: Value, prefix: str) -> None:
        """Back to the leading dimensions of the region's input."""
        region, make = self.rewrite.region, self.fragment
        width = region.widths[-1]
        known = self.index.shapes.get(region.input)
        if known is not None and sum(dim is None for dim in known[:-1]) <= 1:
            lead = [-1 if dim is None else dim for dim in known[:-1]]
            shape: Value = make.integers(f"{prefix}/shape", [*lead, width])
        else:
            full = make.one("Shape", f"{prefix}/Shape", [outer])
            bounds = [make.integers(f"{prefix}/{what}", [at]) for what, at in (("from", 0), ("to", -1))]
            lead_shape = make.one("Slice", f"{prefix}/Leading", [full, *bounds])
            size = make.integers(f"{prefix}/width", [width])
            shape = make.one("Concat", f"{prefix}/NewShape", [lead_shape, size], axis=0)
        make.one("Reshape", f"{prefix}/Unflatten", [value, shape], into=region.output)

    def _gather_in(self, value: Value, layout: Layout, prefix: str) -> Value:
        if not layout.gather:
            return value
        return self._rearrange(value, layout.order, layout.size, layout.run, f"{prefix}/in", None)

    def _gather_out(self, value: Value, layout: Layout, prefix: str, into: str | None) -> Value:
        if not layout.gather:
            return value
        back = np.argsort(layout.order)
        return self._rearrange(value, back, layout.size, layout.run, f"{prefix}/out", into)

    def _rearrange(
        self, value: Value, order: NDArray[Any], width: int, run: int, prefix: str, into: str | None
    ) -> Value:
        """One Gather, of runs of columns where the order moves such: far cheaper than single columns.

        Single columns go as rows of the transposed matrix on a CPU, where a Gather of columns copies one element at a
        time: measured 2 to 3 times cheaper (docs/benchmarks.md). On a GPU either is about one copy.
        """
        make = self.fragment
        if run == 1:
            chosen = make.integers(f"{prefix}/columns", order)
            if self.target == "cuda":
                return make.one("Gather", f"{prefix}/Gather", [value, chosen], axis=1, into=into)
            value = make.one("Transpose", f"{prefix}/Columns", [value], perm=[1, 0])
            value = make.one("Gather", f"{prefix}/Gather", [value, chosen], axis=0)
            return make.one("Transpose", f"{prefix}/Back", [value], perm=[1, 0], into=into)
        runs = make.integers(f"{prefix}/runs", order[::run] // run)
        apart = make.integers(f"{prefix}/apart", [-1, width // run, run])
        joined = make.integers(f"{prefix}/joined", [-1, len(order)])
        value = make.one("Reshape", f"{prefix}/Apart", [value, apart])
        value = make.one("Gather", f"{prefix}/Gather", [value, runs], axis=1)
        return make.one("Reshape", f"{prefix}/Joined", [value, joined], into=into)

    # Forms

    def _branches(self, value: Value, segment: Segment, orders: Sequence[Layout], into: str | None) -> Value:
        """One Split, a chain of Gemms for each block, one Concat; a single block needs neither."""
        make, region = self.fragment, self.rewrite.region
        first, last = region.sites[segment.start], region.sites[segment.stop - 1]
        entering = _sequence(segment.labels[0], orders[0])
        leaving = _sequence(segment.labels[-1], orders[-1])
        if segment.blocks == 1:
            return self._chain(value, segment, orders, 0, into)
        pieces = self._split(value, [int(np.count_nonzero(segment.labels[0] == b)) for b in entering], first)
        made = {
            block: self._chain(piece, segment, orders, block, None)
            for block, piece in zip(entering, pieces, strict=True)
        }
        name = f"{base_name(last)}/decomp/Concat"
        return make.one("Concat", name, [made[block] for block in leaving], axis=1, into=into)

    def _split(self, value: Value, sizes: Sequence[int], site: Site) -> list[Value]:
        make, name = self.fragment, f"{base_name(site)}/decomp/Split"
        if make.opset >= 13:
            parts = make.integers(f"{name}/sizes", sizes)
            return make.apply("Split", name, [value, parts], outputs=len(sizes), axis=1)
        return make.apply("Split", name, [value], outputs=len(sizes), axis=1, split=list(sizes))

    def _chain(
        self, value: Value, segment: Segment, orders: Sequence[Layout], block: int, into: str | None
    ) -> Value:
        region = self.rewrite.region
        for position in range(segment.start, segment.stop):
            local = position - segment.start
            site, affine = region.sites[position], self.rewrite.affine[position]
            rows = _members(segment.labels[local], orders[local], block)
            columns = _members(segment.labels[local + 1], orders[local + 1], block)
            tag = f"block_{block:02d}"
            last = position == segment.stop - 1
            value = self._gemm(value, site, affine, rows, columns, tag, into if last else None)
            if not last:
                value = self._copy_link(value, region.links[position], columns, tag, (-1,))
        return value

    def _gemm(
        self,
        value: Value,
        site: Site,
        affine: Affine,
        rows: NDArray[Any],
        columns: NDArray[Any],
        tag: str,
        into: str | None,
    ) -> Value:
        make = self.fragment
        weight = make.weight(f"{site.weight}.decomp.{tag}", affine.weight[np.ix_(rows, columns)])
        stem = f"{base_name(site)}/decomp/{tag}"
        if affine.bias is None:
            return make.one("MatMul", f"{stem}/MatMul", [value, weight], into=into)
        name = f"{site.bias or site.weight + '.bias'}.decomp.{tag}"
        bias = make.weight(name, affine.bias[columns])
        return make.one("Gemm", f"{stem}/Gemm", [value, weight, bias], into=into)

    def _batched(self, value: Value, segment: Segment, orders: Sequence[Layout], into: str | None) -> Value:
        """[T, G k] -> [G, T, k], one batched MatMul for each site, and back; equal blocks only."""
        make, region = self.fragment, self.rewrite.region
        stem = f"{base_name(region.sites[segment.start])}/decomp"
        blocks = _sequence(segment.labels[0], orders[0])
        width = int(np.count_nonzero(segment.labels[0] != DROPPED))
        apart = make.integers(f"{stem}/apart", [-1, len(blocks), width // len(blocks)])
        value = make.one("Reshape", f"{stem}/Apart", [value, apart])
        value = make.one("Transpose", f"{stem}/Blocks", [value], perm=[1, 0, 2])
        for position in range(segment.start, segment.stop):
            local = position - segment.start
            site, affine = region.sites[position], self.rewrite.affine[position]
            rows = [_members(segment.labels[local], orders[local], b) for b in blocks]
            columns = [_members(segment.labels[local + 1], orders[local + 1], b) for b in blocks]
            stack = np.stack([affine.weight[np.ix_(r, c)] for r, c in zip(rows, columns, strict=True)])
            weight = make.weight(f"{site.weight}.decomp.blocks", stack)
            name = f"{base_name(site)}/decomp/blocks"
            value = make.one("MatMul", f"{name}/MatMul", [value, weight])
            if position < segment.stop - 1:
                if affine.bias is not None:
                    rows_of_bias = np.stack([affine.bias[c] for c in columns])[:, None, :]
                    bias = make.weight(f"{site.bias or site.weight + '.bias'}.decomp.blocks", rows_of_bias)
                    value = make.one("Add", f"{name}/Add", [value, bias])
                value = self._copy_link(
                    value, region.links[position], np.concatenate(columns), "blocks", (len(blocks), 1, -1)
                )
        return self._join(value, segment, orders[-1], blocks, into)

    def _join(
        self, value: Value, segment: Segment, layout: Layout, blocks: Sequence[int], into: str | None
    ) -> Value:
        """[G, T, n] -> [T, N] in the axis' own order of blocks, then the last bias, once."""
        make, region = self.fragment, self.rewrite.region
        site, affine = region.sites[segment.stop - 1], self.rewrite.affine[segment.stop - 1]
        stem = f"{base_name(site)}/decomp"
        leaving = _sequence(segment.labels[-1], layout)
        if leaving != list(blocks):
            places = make.integers(f"{stem}/order", [list(blocks).index(block) for block in leaving])
            value = make.one("Gather", f"{stem}/Order", [value, places], axis=0)
        value = make.one("Transpose", f"{stem}/Together", [value], perm=[1, 0, 2])
        joined = make.integers(f"{stem}/joined", [-1, len(layout.order)])
        if affine.bias is None:
            return make.one("Reshape", f"{stem}/Joined", [value, joined], into=into)
        value = make.one("Reshape", f"{stem}/Joined", [value, joined])
        bias = make.weight(f"{site.bias or site.weight + '.bias'}.decomp", affine.bias[layout.order])
        return make.one("Add", f"{stem}/Add", [value, bias], into=into)

    # What stands between sites

    def _link(self, value: Value, link: Link, axis: int, orders: Sequence[Layout]) -> Value:
        return self._copy_link(value, link, orders[axis].order, f"axis_{axis}", (-1,))

    def _copy_link(
        self, value: Value, link: Link, units: NDArray[Any], tag: str, shape: tuple[int, ...]
    ) -> Value:
        """The elementwise operators of a link once more, over the given units only."""
        make = self.fragment
        values: dict[str, Value] = {link.entry: value}
        for position in link.nodes:
            node = self.index.node(position)
            inputs = [self._operand(name, link, units, tag, shape, values) for name in node.input]
            stem = f"{node.name or node.op_type}/decomp/{tag}"
            attributes = {item.name: _attribute(item) for item in node.attribute}
            values[node.output[0]] = make.one(
                node.op_type, stem, inputs, domain=node.domain or None, **attributes
            )
        return values[link.exit]

    def _operand(
        self,
        name: str,
        link: Link,
        units: NDArray[Any],
        tag: str,
        shape: tuple[int, ...],
        values: dict[str, Value],
    ) -> Value:
        if name in values:
            return values[name]
        if not name:
            return gs.Variable.empty()
        if name not in link.channels:
            return self.fragment.scalars.setdefault(name, gs.Variable(name))
        constant = self.index.constant(name)
        assert constant is not None
        sliced = constant.reshape(-1)[units].reshape(shape)
        return gs.Constant(self.fragment.unique(f"{name}.decomp.{tag}"), np.ascontiguousarray(sliced))


def base_name(site: Site) -> str:
    """What the names of new nodes start with."""
    return site.name


def _attribute(item: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(item)
    return value.decode() if isinstance(value, bytes) else value


def _sequence(labels: NDArray[np.int32], layout: Layout) -> list[int]:
    """Blocks in the order in which the axis stores them."""
    return blocks_in_order(labels[layout.order])


def _members(labels: NDArray[np.int32], layout: Layout, block: int) -> NDArray[np.intp]:
    """Elements of a block, in the order in which the axis stores them."""
    members: NDArray[np.intp] = layout.order[labels[layout.order] == block]
    return members


def emit(
    index: GraphIndex, rewrites: Sequence[Rewrite], opset: int, target: Device = "cpu"
) -> onnx.ModelProto:
    """The original with every rewrite's region replaced; a pure function, the original stays as it is."""
    model = onnx.ModelProto()
    model.CopyFrom(index.proto)
    graph = model.graph
    taken = _names(graph)
    fragments: dict[int, list[onnx.NodeProto]] = {}
    removed: set[int] = set()
    new_tensors: list[onnx.TensorProto] = []
    for rewrite in rewrites:
        fragment = Fragment(taken, opset, rewrite.region.sites[0].dtype)
        Writer(index, rewrite, fragment, target).write()
        nodes, tensors = fragment.messages()
        fragments[rewrite.region.nodes[-1]] = nodes
        removed.update(rewrite.region.nodes)
        new_tensors += tensors
    nodes = []
    for position, node in enumerate(index.proto.graph.node):
        if position not in removed:
            nodes.append(node)
        nodes += fragments.get(position, [])
    del graph.node[:]
    graph.node.extend(nodes)
    _prune(graph, [index.node(position) for position in sorted(removed)])
    graph.initializer.extend(new_tensors)
    return model


def _names(graph: onnx.GraphProto) -> set[str]:
    """Every name in use, in nested graphs too."""
    names = {t.name for t in graph.initializer} | {v.name for v in graph.input}
    for node in graph.node:
        names.update([node.name, *node.input, *node.output])
        for nested in nested_graphs(node):
            names |= _names(nested)
    return names


def _mentions(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    for node in nodes:
        yield from node.input
        for nested in nested_graphs(node):
            yield from _mentions(nested.node)
            yield from (value.name for value in nested.output)


def _prune(graph: onnx.GraphProto, removed: Sequence[onnx.NodeProto]) -> None:
    """Take out what only the removed nodes read: their weights, and the Constants and Transposes behind them.

    What nothing read before stays: that is not this compiler's business.
    """
    suspects = {name for node in removed for name in node.input if name}
    gone = {name for node in removed for name in node.output}
    while True:
        read = set(_mentions(graph.node)) | {value.name for value in graph.output}
        dead = [
            at
            for at, node in enumerate(graph.node)
            if any(name in suspects for name in node.output) and not any(name in read for name in node.output)
        ]
        if not dead:
            break
        for at in reversed(dead):
            suspects.update(graph.node[at].input)
            gone.update(graph.node[at].output)
            del graph.node[at]
    fed = {value.name for value in graph.input}
    for at in reversed(range(len(graph.initializer))):
        name = graph.initializer[at].name
        if name in suspects and name not in read and name not in fed:
            gone.add(name)
            del graph.initializer[at]
    made = {name for node in graph.node for name in node.output}
    for at in reversed(range(len(graph.value_info))):
        if graph.value_info[at].name in gone - made:
            del graph.value_info[at]


@dataclass(frozen=True)
class Splitting:
    """The last pass: nothing is decided here any more, `program.written` is what will be measured."""

    name: str = "splitting"

    def run(self, program: Program) -> None:
        opset = next((o.version for o in program.original.opset_import if o.domain in ("", "ai.onnx")), 1)
        program.written = emit(program.index, program.rewrites, opset, program.target)
