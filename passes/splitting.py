"""Write rewrites as ONNX: a pure patch of the original.

`emit` copies the original model, takes out the nodes of each rewritten region and puts a fragment of standard operators
in their place. Constants that carry a reordered group are stored in its new order. Every other message stays as it is,
byte for byte: a round trip of the whole model through onnx-graphsurgeon would not be lossless.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_decomp.axes import Carrier
from onnx_decomp.passes.folding import Layout, Orders, along, joined_orders
from onnx_decomp.passes.fragments import Fragment
from onnx_decomp.passes.writing import Writer
from onnx_decomp.probe import mentions
from onnx_decomp.program import Program, Rewrite
from onnx_decomp.runtime import Device
from onnx_decomp.sites import GraphIndex, constant_tensor, nested_graphs


def emit(
    index: GraphIndex, rewrites: Sequence[Rewrite], opset: int, target: Device = "cpu"
) -> onnx.ModelProto:
    """The original with every rewrite's region replaced; a pure function, the original stays as it is."""
    model = onnx.ModelProto()
    model.CopyFrom(index.proto)
    graph = model.graph
    orders = joined_orders(rewrites)
    taken = _names(graph)
    fragments: dict[int, list[onnx.NodeProto]] = {}
    removed: set[int] = set()
    new_tensors: list[onnx.TensorProto] = []
    for rewrite in rewrites:
        region = rewrite.region
        fragment = Fragment(taken, opset, region.sites[0].dtype)
        layout = Layout.of(region, rewrite.segments, orders)
        spans = Writer(index, rewrite, fragment, layout, target).write()
        nodes, tensors = fragment.messages()
        fragments |= {position: nodes[first:last] for position, (first, last) in spans.items()}
        removed.update(region.nodes)
        new_tensors += tensors
    nodes = []
    for position, node in enumerate(index.proto.graph.node):
        if position not in removed:
            nodes.append(node)
        nodes += fragments.get(position, [])
    del graph.node[:]
    graph.node.extend(nodes)
    _prune(graph, [index.node(position) for position in sorted(removed)])
    _reorder(index, graph, rewrites, orders)
    graph.initializer.extend(new_tensors)
    return model


def _reorder(index: GraphIndex, graph: onnx.GraphProto, rewrites: Sequence[Rewrite], orders: Orders) -> None:
    """Store every constant that carries a reordered group in its new order."""
    groups = {number: group for rewrite in rewrites for number, group in rewrite.region.groups.items()}
    changes: dict[str, list[tuple[Carrier, NDArray[np.intp]]]] = {}
    for number, order in orders.items():
        if not np.array_equal(order, np.arange(len(order))):
            for carrier in groups[number].stored:
                changes.setdefault(carrier.tensor, []).append((carrier, order))
    holders = [(tensor.name, tensor) for tensor in graph.initializer]
    for node in graph.node:
        tensor = constant_tensor(node)
        if tensor is not None:
            holders.append((node.output[0], tensor))
    for name, tensor in holders:
        if name not in changes:
            continue
        array = index.read(index.stored[name])
        for carrier, order in changes[name]:
            array = np.take(array, along(carrier.units, order), axis=carrier.axis)
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))


def _names(graph: onnx.GraphProto) -> set[str]:
    """Every name in use, in nested graphs too."""
    names = {t.name for t in graph.initializer} | {v.name for v in graph.input}
    for node in graph.node:
        names.update([node.name, *node.input, *node.output])
        for nested in nested_graphs(node):
            names |= _names(nested)
    return names


def _prune(graph: onnx.GraphProto, removed: Sequence[onnx.NodeProto]) -> None:
    """Take out what only the removed nodes read: their weights, and the Constants and Transposes behind them.

    What nothing read before stays: that is not this compiler's business.
    """
    suspects = {name for node in removed for name in node.input if name}
    gone = {name for node in removed for name in node.output}
    while True:
        read = set(mentions(graph.node)) | {value.name for value in graph.output}
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
