"""Write rewrites as ONNX: a pure patch of the original.

`emit` copies the original model, takes out the nodes of each rewritten region and puts a fragment of standard operators
in their place. Constants that carry a reordered group are stored in its new order. Every other message stays as it is,
byte for byte: a round trip of the whole model through onnx-graphsurgeon would not be lossless.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_decomp.axes import Carrier
from onnx_decomp.functions import FunctionKey, called, functions_of
from onnx_decomp.graph import all_names, constant_tensor, mentions
from onnx_decomp.graph_index import INITIALIZERS_APART, GraphIndex
from onnx_decomp.passes.fragments import Fragment
from onnx_decomp.passes.layouts import Layout, Orders, along, joined_orders
from onnx_decomp.passes.writing import Writer
from onnx_decomp.program import Program, Rewrite
from onnx_decomp.runtime import Device
from onnx_decomp.saving import Aside


def emit(
    index: GraphIndex,
    rewrites: Sequence[Rewrite],
    opset: int,
    target: Device = "cpu",
    aside: Aside | None = None,
) -> onnx.ModelProto:
    """The original with every rewrite's region replaced; a pure function, the original stays as it is.

    aside: takes large new tensors, which would make the message as large as the model.
    """
    model = onnx.ModelProto()
    model.CopyFrom(index.proto)
    graph = model.graph
    orders = joined_orders(rewrites)
    taken = all_names(graph).union(*(node.output for node in index.nodes), (n.name for n in index.nodes))
    taken |= index.around.reserved
    fragments: dict[int, list[onnx.NodeProto]] = {}
    removed: set[int] = set()
    new_tensors: list[onnx.TensorProto] = []
    for rewrite in rewrites:
        region = rewrite.region
        fragment = Fragment(taken, opset)
        layout = Layout.of(region, rewrite.segments, orders)
        spans = Writer(index, rewrite, fragment, layout, target).write()
        nodes, tensors = fragment.messages()
        fragments |= {position: nodes[first:last] for position, (first, last) in spans.items()}
        removed.update(region.nodes)
        new_tensors += tensors if aside is None else map(aside.taken, tensors)
    changes = _changes(rewrites, orders)
    del graph.node[:]
    graph.node.extend(_patched(index, removed, fragments, changes.keys()))
    graph.initializer.extend(index.held(graph.node))
    prune(model, [index.node(position) for position in sorted(removed)])
    drop_uncalled(model, called(index.proto.graph.node, functions_of(model)))
    _reorder(index, graph, changes, aside)
    graph.initializer.extend(new_tensors)
    if model.ir_version < INITIALIZERS_APART:
        graph.input.extend(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            for tensor in new_tensors
        )
    return model


def _patched(
    index: GraphIndex,
    removed: set[int],
    fragments: Mapping[int, Sequence[onnx.NodeProto]],
    changed: Set[str],
) -> Iterator[onnx.NodeProto]:
    """The model's own nodes, with fragments in place of the removed ones.

    A node that stands for several in normal form is written as those where one of them is removed. A call of a function
    is written out where something in it is removed, or where a constant of the function is changed.
    """
    opened = {index.origins[position] for position in removed}
    within = index.operators.within
    held = changed & index.operators.constants.keys()
    touched = {
        at
        for at, node in enumerate(index.operators.nodes)
        if within[at] and (not held.isdisjoint(mentions([node])) or not changed.isdisjoint(node.output))
    }
    written_out = {call for origin in opened | touched for call in within[origin]}
    origin_before, call_before = -1, -1
    for position, node in enumerate(index.nodes):
        origin = index.origins[position]
        call = next((call for call in within[origin] if call not in written_out), None)
        if call is not None:
            if call != call_before:
                yield index.operators.calls[call]
            call_before = call
        elif origin not in opened:
            if origin != origin_before:
                yield index.original(position)
        elif position not in removed:
            yield node
        yield from fragments.get(position, [])
        origin_before = origin


def drop_uncalled(model: onnx.ModelProto, before: Set[FunctionKey]) -> None:
    """Take out functions that are no longer called: their weights would be there for nothing. before: that were."""
    functions = functions_of(model)
    gone = before - called(model.graph.node, functions)
    if gone and not model.training_info:  # where they may be called, too
        for key in gone:
            model.functions.remove(functions[key])


Changes = Mapping[str, Sequence[tuple[Carrier, NDArray[np.intp]]]]
"""By stored tensor the axes that get a new order."""


def _changes(rewrites: Sequence[Rewrite], orders: Orders) -> Changes:
    """Every constant that carries a reordered group."""
    groups = {number: group for rewrite in rewrites for number, group in rewrite.region.groups.items()}
    changes: dict[str, list[tuple[Carrier, NDArray[np.intp]]]] = {}
    for number, order in orders.items():
        if not np.array_equal(order, np.arange(len(order))):
            for carrier in groups[number].stored:
                changes.setdefault(carrier.tensor, []).append((carrier, order))
    return changes


def _reorder(index: GraphIndex, graph: onnx.GraphProto, changes: Changes, aside: Aside | None) -> None:
    """Store every constant that carries a reordered group in its new order."""

    def reordered(name: str, called: str) -> onnx.TensorProto:
        array = index.read(index.stored[name])
        for carrier, order in changes[name]:
            array = np.take(array, along(carrier.units, order), axis=carrier.axis)
        stored = onnx.numpy_helper.from_array(np.ascontiguousarray(array), called)
        return stored if aside is None else aside.taken(stored)

    for tensor in graph.initializer:
        if tensor.name in changes:
            tensor.CopyFrom(reordered(tensor.name, tensor.name))
    for node in graph.node:
        if constant_tensor(node) is not None and node.output[0] in changes:
            # It may hold a plain list, which has no place for a tensor.
            tensor = reordered(node.output[0], index.stored[node.output[0]].name)
            value = onnx.helper.make_attribute("value", tensor)
            del node.attribute[:]
            node.attribute.append(value)


def prune(model: onnx.ModelProto, removed: Sequence[onnx.NodeProto]) -> None:
    """Take out what only the removed nodes read: their weights, and the operators that led to them.

    What nothing read before stays: that is not this compiler's business. Nor do defaults go that callers may override;
    in old models inputs are listed for all initializers, and go with them.
    """
    graph = model.graph
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
    fed = {value.name for value in graph.input} if model.ir_version >= INITIALIZERS_APART else set()
    for at in reversed(range(len(graph.initializer))):
        name = graph.initializer[at].name
        if name in suspects and name not in read and name not in fed:
            gone.add(name)
            del graph.initializer[at]
    if not fed:
        for at in reversed(range(len(graph.input))):
            if graph.input[at].name in gone:
                del graph.input[at]
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
        aside = None if program.aside is None else Aside(program.aside)
        program.written = emit(program.index, program.rewrites, opset, program.target, aside)
