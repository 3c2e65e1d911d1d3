"""Calls of a model's own functions, seen as the operators that they stand for.

A call is written out only if something in it is rewritten; every other one stays a call. That is why onnx's own inliner
is not enough: it does not tell which operators come from which call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

import onnx

from onnx_decomp.graph import DEFAULT, constant_tensor, nested_graphs, unique

MAX_INLINED, MAX_DEPTH = 100_000, 16
"""Operators that stand for calls, and calls in calls, that are looked into: hostile files have any number."""

FunctionKey = tuple[str, str, str]
"""Domain, name and overload."""


@dataclass
class Inlined:
    """The operators of a graph, those that its calls stand for among them.

    within: for each operator the calls that it stands in, outermost first, as positions in `calls`. calls: as they are
    written where they stay. constants: what Constant nodes of functions hold, by the name that the operators read it
    by: the same for every call, because it is one tensor. staying: those that calls read too which can't be written
    out.
    """

    nodes: Sequence[onnx.NodeProto]
    within: Sequence[tuple[int, ...]] = ()
    calls: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    staying: frozenset[str] = frozenset()


def inlined(model: onnx.ModelProto, taken: set[str], elsewhere: Set[FunctionKey] = frozenset()) -> Inlined:
    """The main graph of a model with its calls as operators. taken: names in use, added to.

    elsewhere: functions that are called by others too.
    Calls that ask for other operator sets than the model has stay calls, and so do those that are too many, too deep,
    or handed a whole graph.
    """
    if not model.functions:
        nodes: Sequence[onnx.NodeProto] = model.graph.node
        return Inlined(nodes, [()] * len(nodes))
    functions = functions_of(model)
    inliner = _Inliner(functions, _versions(model.opset_import), taken)
    for node in model.graph.node:
        inliner.add(node, ())
    still = called(inliner.nodes, functions) | elsewhere
    staying = frozenset(name for (key, _), name in inliner.held.items() if key in still)
    return Inlined(inliner.nodes, inliner.within, inliner.calls, inliner.constants, staying)


def functions_of(model: onnx.ModelProto) -> dict[FunctionKey, onnx.FunctionProto]:
    """The model's own functions, as calls name them."""
    return {(f.domain, f.name, f.overload): f for f in model.functions}


def called(
    nodes: Iterable[onnx.NodeProto], functions: Mapping[FunctionKey, onnx.FunctionProto]
) -> set[FunctionKey]:
    """Functions that nodes call, in nested graphs and in other functions too."""
    found = set[FunctionKey]()
    pending = [nodes]
    while pending:
        for node in pending.pop():
            key = (node.domain, node.op_type, node.overload)
            if key in functions and key not in found:
                found.add(key)
                pending.append(functions[key].node)
            pending += [graph.node for graph in nested_graphs(node)]
    return found


@dataclass
class _Inliner:
    functions: Mapping[FunctionKey, onnx.FunctionProto]
    versions: Mapping[str, int]
    """Of the model's operator sets."""
    taken: set[str]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    within: list[tuple[int, ...]] = field(default_factory=list)
    calls: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    held: dict[tuple[FunctionKey, str], str] = field(default_factory=dict)
    """Name of a constant by where it is defined."""

    def add(self, node: onnx.NodeProto, within: tuple[int, ...]) -> None:
        """A node as it is, or what it stands for if it is a call."""
        key = (node.domain, node.op_type, node.overload)
        function = self.functions.get(key)
        if function is None or not self._can(function, node, len(within)):
            self.nodes.append(node)
            self.within.append(within)
            return
        within = (*within, len(self.calls))
        self.calls.append(node)
        scope = self._scope(function, node)
        operators = []
        for inner in function.node:
            tensor = constant_tensor(inner)
            if tensor is None or inner.output[0] in function.output:
                scope.define(inner.output)
                operators.append(inner)
            else:
                scope.names[inner.output[0]] = self._hold(key, inner.output[0], tensor)
        for inner in operators:
            self.add(scope.node(inner), within)

    def _can(self, function: onnx.FunctionProto, call: onnx.NodeProto, depth: int) -> bool:
        """Whether a call may be written out, and there is room for it."""
        formal = [*function.input, *function.output]
        made = {name for node in function.node for name in node.output}
        plain = len(set(formal)) == len(formal) and bool(made.intersection(function.output))
        plain &= not any(nested_graphs(call))
        room = depth < MAX_DEPTH and len(self.nodes) + len(function.node) <= MAX_INLINED
        return plain and room and len(self.calls) < MAX_INLINED and self._same_operators(function)

    def _same_operators(self, function: onnx.FunctionProto) -> bool:
        """Whether what a function computes with is the same under the operator sets of the model."""
        wanted = _versions(function.opset_import)
        domains = {_domain(domain) for domain in _domains(function.node)}
        if any(domain not in self.versions for domain in domains):
            return False
        changed = {domain for domain in domains if wanted.get(domain) != self.versions[domain]}
        nodes = [node for node in _all(function.node) if _domain(node.domain) in changed]
        return all(_since(node, wanted) == _since(node, self.versions) is not None for node in nodes)

    def _scope(self, function: onnx.FunctionProto, call: onnx.NodeProto) -> _Scope:
        """What the names and attributes of a function are in a call of it."""
        names = {"": ""} | dict.fromkeys(function.input, "")
        names |= dict(zip(function.input, call.input, strict=False))
        names |= {
            formal: actual for formal, actual in zip(function.output, call.output, strict=False) if actual
        }
        given = {item.name: item for item in (*function.attribute_proto, *call.attribute)}
        return _Scope(call.name or function.name, names, given, self.taken)

    def _hold(self, key: FunctionKey, name: str, tensor: onnx.TensorProto) -> str:
        if (key, name) not in self.held:
            chosen = unique(f"{key[1]}/{name}", self.taken)
            self.held[key, name] = chosen
            self.constants[chosen] = tensor
        return self.held[key, name]


@dataclass
class _Scope:
    """What the names inside a function, or a graph in it, are outside."""

    prefix: str
    names: dict[str, str]
    attributes: Mapping[str, onnx.AttributeProto]
    """What a call gives, by name."""
    taken: set[str]

    def define(self, names: Iterable[str]) -> None:
        """Names of their own for those that have none yet."""
        for name in names:
            if name not in self.names:
                self.names[name] = unique(f"{self.prefix}/{name}", self.taken)

    def node(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """A copy under its names outside, with the attributes of the call filled in."""
        made = onnx.NodeProto()
        made.CopyFrom(node)
        made.name = unique(f"{self.prefix}/{node.name or node.op_type}", self.taken)
        made.input[:] = [self.names.get(name, name) for name in node.input]
        made.output[:] = [self.names.get(name, name) for name in node.output]
        del made.attribute[:]
        for item in node.attribute:
            given = self.attributes.get(item.ref_attr_name) if item.ref_attr_name else item
            if given is not None:  # one that the call leaves out is left out
                made.attribute.append(given)
                made.attribute[-1].name = item.name
        for graph in nested_graphs(made):
            self._rename(graph)
        return made

    def _rename(self, graph: onnx.GraphProto) -> None:
        """The same for a nested graph, in place. All its own names are new: outside they may be taken."""
        sparse = [tensor.values for tensor in graph.sparse_initializer]
        own = [*graph.input, *graph.initializer, *sparse]
        defined = {item.name for item in own if item.name} | {
            name for node in graph.node for name in node.output if name
        }
        around = {inner: outer for inner, outer in self.names.items() if inner not in defined}
        scope = _Scope(self.prefix, around, self.attributes, self.taken)
        scope.define(sorted(defined))
        for item in [*own, *graph.output]:
            item.name = scope.names.get(item.name, item.name)
        nodes = [scope.node(node) for node in graph.node]
        del graph.node[:]
        graph.node.extend(nodes)
        del graph.value_info[:], graph.quantization_annotation[:]  # notes on names that are gone


def _versions(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {_domain(item.domain): item.version for item in imports}


def _domain(name: str) -> str:
    return "" if name in DEFAULT else name


def _all(nodes: Iterable[onnx.NodeProto]) -> Iterable[onnx.NodeProto]:
    """Nodes, and those in their bodies."""
    for node in nodes:
        yield node
        for graph in nested_graphs(node):
            yield from _all(graph.node)


def _domains(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    return {node.domain for node in _all(nodes)}


def _since(node: onnx.NodeProto, versions: Mapping[str, int]) -> int | None:
    """The operator set that an operator is from; None where it is not known."""
    try:
        schema = onnx.defs.get_schema(
            node.op_type, versions.get(_domain(node.domain), 0), _domain(node.domain)
        )
    except onnx.defs.SchemaError:
        return None
    return int(schema.since_version)
