"""Bodies of If, Loop and Scan: each seen as a model of its own, with data of its own, and put back in its place.

What a body takes, its formal inputs and computed tensors of the graphs around it, are the inputs of that model, and
constants from outside are its initializers. Its calibration data is what it was given whenever it ran in the original:
the whole model runs on its own data with what the body takes brought out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, get_args

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_decomp import model_io, verify
from onnx_decomp.calibration import Data, Feeds, Part
from onnx_decomp.functions import FunctionKey, called, functions_of
from onnx_decomp.graph import all_names, bodies, is_standard, nested_graphs, outer_reads, unique
from onnx_decomp.graph_index import INITIALIZERS_APART, GraphIndex
from onnx_decomp.passes.splitting import drop_uncalled, prune
from onnx_decomp.probe import Feeds as AnyFeeds
from onnx_decomp.runtime import Session
from onnx_decomp.scratch import kept
from onnx_decomp.sites import IN_BODY, Site, path_of

MAX_RUNS, MOST_RUNS = 64, 4096
"""Runs of a body that are looked at in each part of the data, and how many of them are chosen from."""

ENOUGH_RUNS = 8
"""The model runs on so few samples at once that a body should run as often as this in each part."""

PARTS: tuple[Part, ...] = get_args(Part)

SCAN_SINCE = 9
"""Opset from which a Scan has no axis of batches of its own."""


# --- what a body is -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Body:
    """One graph that a node of the model holds.

    where: what reports call it. computed: tensors of the graphs around it that it reads. stored, lead: the constants of
    those graphs that it reads, and the operators that make them of what is stored. shared: constants among them that
    are read elsewhere too. called: functions that are called elsewhere too.
    """

    where: str
    node: onnx.NodeProto
    attribute: str
    graph: onnx.GraphProto
    computed: tuple[str, ...]
    stored: Mapping[str, onnx.TensorProto]
    lead: tuple[onnx.NodeProto, ...]
    shared: frozenset[str]
    called: frozenset[FunctionKey]


def find_bodies(index: GraphIndex, sites: Sequence[Site], most: int) -> list[Body]:
    """The first bodies with products in them, in nodes of the model itself that have a name of their own."""
    if index.proto.ir_version < INITIALIZERS_APART:
        return []  # there, an initializer of a body would have to be one of its inputs
    paths = [site.graph.split("/") for site in sites if site.obstacle == IN_BODY]
    holders = {"/".join(path[:end]) for path in paths for end in range(1, len(path) + 1)}
    graphs = (graph for node in index.operators.nodes for graph in nested_graphs(node))
    readers = Counter(name for graph in graphs for name in outer_reads(graph))
    readers.update(value.name for value in index.proto.graph.output)
    found: dict[str, list[tuple[onnx.NodeProto, onnx.AttributeProto]]] = {}
    for node, within in zip(index.operators.nodes, index.operators.within, strict=True):
        if within or not is_standard(node, "If", "Loop", "Scan"):
            continue
        for item in node.attribute:
            if item.type != onnx.AttributeProto.GRAPH:
                continue
            where = path_of(node, item.name)
            if where in holders:
                found.setdefault(where, []).append((node, item))
    alone = [(where, *same[0]) for where, same in found.items() if len(same) == 1]
    return [_body(index, node, item, where, readers) for where, node, item in alone[:most]]


def _body(
    index: GraphIndex,
    node: onnx.NodeProto,
    item: onnx.AttributeProto,
    where: str,
    readers: Mapping[str, int],
) -> Body:
    """readers: how many nested graphs read a tensor, or how often it is an output."""
    reads = outer_reads(item.g)
    sources = index.constants.sources
    computed = {*index.producer, *index.inputs} - sources.keys() | index.defaults
    lead, stored = set[int](), dict[str, onnx.TensorProto]()
    pending = sorted(reads & sources.keys() - index.defaults)
    own = {name for name in reads if name in computed}
    while pending:
        name = pending.pop()
        position = index.producer.get(name)
        if position is None:
            stored[name] = index.stored[name]
        elif index.calls(position) or set(index.node(position).input) - sources.keys() - {""}:
            own.add(name)  # made inside of a call: it is no constant of the model's own
        elif len(index.node(position).output) > 1:
            own.add(name)  # a part of a constant, which other parts are made with
        elif position not in lead:
            lead.add(position)
            pending += [name for name in index.node(position).input if name]
    operators = tuple(index.node(position) for position in sorted(lead))
    constants = [*stored, *(operator.output[0] for operator in operators)]
    shared = frozenset(
        name
        for name in constants
        if readers[name] > (name in reads) or not lead.issuperset(index.consumers.get(name, []))
    )
    elsewhere = frozenset(called(_without(index.proto.graph.node, node, item), functions_of(index.proto)))
    elsewhere |= index.around.called
    return Body(where, node, item.name, item.g, tuple(sorted(own)), stored, operators, shared, elsewhere)


def _without(
    nodes: Iterable[onnx.NodeProto], holder: onnx.NodeProto, item: onnx.AttributeProto
) -> Iterator[onnx.NodeProto]:
    """Nodes, and in place of one that holds a body those of its other bodies."""
    for node in nodes:
        if node.output != holder.output:
            yield node
        else:
            yield from (
                inner for other in node.attribute if other.name != item.name for inner in other.g.node
            )


def as_model(index: GraphIndex, body: Body, example: AnyFeeds) -> onnx.ModelProto:
    """A body as a model. example: what it was given once."""
    model = onnx.ModelProto(ir_version=index.proto.ir_version)
    model.opset_import.extend(index.proto.opset_import)
    model.functions.extend(index.proto.functions)
    graph = model.graph
    graph.name = body.graph.name or "body"
    graph.node.extend([*body.lead, *body.graph.node])
    graph.initializer.extend([*body.stored.values(), *body.graph.initializer])
    graph.sparse_initializer.extend(body.graph.sparse_initializer)
    graph.value_info.extend(body.graph.value_info)
    graph.output.extend(body.graph.output)
    for value in body.graph.input:
        graph.input.append(value)
        if not value.type.tensor_type.elem_type:
            graph.input[-1].CopyFrom(_value(value.name, example[value.name], None))
    graph.input.extend(_value(name, example[name], index.shapes.get(name)) for name in body.computed)
    return model


def _value(name: str, array: NDArray[Any], shape: Sequence[int | None] | None) -> onnx.ValueInfoProto:
    """An input as it was once, with the lengths that are the same each time."""
    element = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return onnx.helper.make_tensor_value_info(name, element, shape or [None] * array.ndim)


# --- what it is given ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runs(Data):
    """What a body was given in some of its runs, each of which is a batch as it stands."""

    feeds: Mapping[Part, Sequence[Feeds]] = field(default_factory=dict)
    per_sample: float = 1.0
    """Rows of the body's first input for each sample of the model."""
    batch: int = verify.BATCH
    """Samples on which the model ran at once: on others, it may not run the body."""

    def samples(self, part: Part) -> int:
        return sum(map(_rows, self.feeds[part]))

    def batches(self, part: Part, _size: int) -> Iterator[Feeds]:
        yield from self.feeds[part]


def _rows(feeds: AnyFeeds) -> int:
    return len(next(iter(feeds.values())))


@dataclass(frozen=True)
class Watch:
    """The whole model with what a body takes brought out.

    outside: captured tensors. inside: for each formal input what collects it, run after run. condition: of an If, with
    the value for which the body runs.
    """

    model: onnx.ModelProto
    outside: tuple[str, ...]
    inside: Mapping[str, str]
    condition: tuple[str, bool] | None

    def fetched(self) -> list[str]:
        own = [] if self.condition is None else [self.condition[0]]
        return list(dict.fromkeys([*self.outside, *self.inside.values(), *own]))

    def runs(self, found: AnyFeeds) -> Iterator[Feeds]:
        """What the body was given in one run of the model, each time that it ran."""
        outside = {name: found[name] for name in self.outside}
        if self.condition is not None:
            name, wanted = self.condition
            if bool(np.ravel(found[name])[0]) == wanted:
                yield outside
            return
        for number in range(min((len(found[name]) for name in self.inside.values()), default=0)):
            inside = {name: np.asarray(found[output][number]) for name, output in self.inside.items()}
            yield inside | outside


def watched(index: GraphIndex, body: Body) -> Watch:
    """A copy of the original that hands out what a body takes."""
    model = onnx.ModelProto()
    model.CopyFrom(index.proto)
    inside: dict[str, str] = {}
    condition = None
    if body.node.op_type == "If":
        condition = body.node.input[0], body.attribute == "then_branch"
    else:
        taken = all_names(model.graph)
        holder = next(node for node in model.graph.node if node.output == body.node.output)
        inside = _collected(holder, taken)
    listed = {value.name for value in model.graph.output}
    watch = Watch(model, body.computed, inside, condition)
    model.graph.output.extend(
        onnx.ValueInfoProto(name=name)
        for name in watch.fetched()
        if name not in listed and (name not in index.inputs or name in index.defaults)
    )
    return watch


def _collected(holder: onnx.NodeProto, taken: set[str]) -> dict[str, str]:
    """Let a Loop or Scan collect every formal input of its body; gives the output that does, by the input."""
    (graph,) = (item.g for item in holder.attribute if item.type == onnx.AttributeProto.GRAPH)
    made = len(graph.output) - (holder.op_type == "Loop")  # the body of a Loop also says whether it goes on
    holder.output.extend(unique("onnx_decomp.unread", taken) for _ in range(made - len(holder.output)))
    found = {}
    for value in graph.input:
        inner, outer = (unique(f"onnx_decomp.{kind}", taken) for kind in ("given", "collected"))
        graph.node.append(onnx.helper.make_node("Identity", [value.name], [inner]))
        graph.output.append(onnx.ValueInfoProto(name=inner))
        graph.output[-1].type.CopyFrom(value.type)
        holder.output.append(outer)
        found[value.name] = outer
    for item in holder.attribute:
        if item.name in ("scan_output_axes", "scan_output_directions"):
            item.ints.extend([0] * len(graph.input))
    return found


def recorded(
    index: GraphIndex, body: Body, data: Data, opened: Callable[[onnx.ModelProto], Session]
) -> Runs | None:
    """What a body was given in the original on each part of the data; None where it did not run in all of them.

    opened: a session of a model that was made of the original.
    Raises CannotVerifyError where the model does not run with what the body takes brought out.
    """
    if body.node.op_type == "Scan" and model_io.opset(index.proto) < SCAN_SINCE:
        return None
    watch = watched(index, body)
    session = opened(watch.model)
    least = min(data.samples(part) for part in PARTS)
    sizes = [max(1, min(verify.BATCH, least // ENOUGH_RUNS)), 1]
    for size in sizes if data.fixed is None else sizes[:1]:
        found = {part: _runs_of(index, watch, session.run, data, part, size) for part in PARTS}
        parts = {part: list(islice(runs, MOST_RUNS)) for part, runs in found.items()}
        runs = _alike(parts, body)
        if runs is not None:
            rows = _rows(runs["fit"][0])
            per_sample = len(parts["report"]) * rows / data.samples("report")
            return Runs(data.kind, {}, rows, (), runs, per_sample, size)
    return None


def _runs_of(
    index: GraphIndex, watch: Watch, run: Callable[..., AnyFeeds], data: Data, part: Part, size: int
) -> Iterator[Feeds]:
    names = watch.fetched()
    for feeds in data.batches(part, size):
        given = {name: feeds[name] for name in names if name in feeds}
        known = {name: array for name in names if (array := index.constant(name)) is not None}
        found = {**run(feeds, [name for name in names if name not in given]), **given, **known}
        for each in watch.runs(found):
            if all(isinstance(array, np.ndarray) for array in each.values()):
                yield {name: kept(array) for name, array in each.items()}


def _alike(parts: Mapping[Part, Sequence[Feeds]], body: Body) -> dict[Part, list[Feeds]] | None:
    """Runs on arrays of the same shapes, at most MAX_RUNS of each part, what counts samples first in each."""
    first = next(iter(parts["fit"]), None)
    if first is None:
        return None
    shapes = {name: array.shape for name, array in first.items()}
    counted = sorted(shapes, key=lambda name: (-min(len(shapes[name]), 2), name in body.computed))
    if not counted or not shapes[counted[0]] or 0 in shapes[counted[0]]:
        return None
    found = {}
    for part, runs in parts.items():
        same = [run for run in runs if {name: array.shape for name, array in run.items()} == shapes]
        chosen = np.unique(np.linspace(0, len(same) - 1, min(len(same), MAX_RUNS)).astype(int))
        found[part] = [{name: same[at][name] for name in counted} for at in chosen]
    return found if all(found.values()) else None


# --- back in its place --------------------------------------------------------------------------------------------


def put_back(
    model: onnx.ModelProto, body: Body, written: onnx.ModelProto, reserved: Set[str] = frozenset()
) -> None:
    """Write a body as it was compiled into the model that holds it; what nothing reads any more goes.

    reserved: names that nothing new may have.
    """
    holder = next(node for node in model.graph.node if node.output == body.node.output)
    graph = next(item.g for item in holder.attribute if item.name == body.attribute)
    lead = {node.output[0]: node for node in body.lead}
    before = called(model.graph.node, functions_of(model))
    taken = all_names(model.graph) | all_names(written.graph) | reserved
    # Constants from outside that are no longer what they are there get a name of their own here.
    names: dict[str, str] = {}
    tensors, nodes = [], []
    for tensor in written.graph.initializer:
        outside = body.stored.get(tensor.name)
        if outside is not None and tensor != outside:
            names[tensor.name] = unique(f"{tensor.name}.decomp.ordered", taken)
        if outside is None or tensor != outside:
            tensors.append(tensor)
    for node in written.graph.node:
        led = lead.get(node.output[0]) if node.output else None
        changed = led is not None and (node != led or not names.keys().isdisjoint(node.input))
        if changed:
            names[node.output[0]] = unique(f"{node.output[0]}.decomp.ordered", taken)
        if led is None or changed:
            nodes.append(node)
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(tensors)
    graph.node.extend(nodes)
    graph.value_info.extend(written.graph.value_info)
    _rename(graph, names)
    unread = {*body.stored, *lead} - outer_reads(graph)
    prune(model, [onnx.NodeProto(input=sorted(unread))])
    drop_uncalled(model, before)


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Other names for constants, and for what nodes read and make, in nested graphs too."""
    if not names:
        return
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for _, nested in bodies(node):
            _rename(nested, names)
    for value in graph.output:
        value.name = names.get(value.name, value.name)
