"""Who makes and who reads each tensor of the main graph, and which tensors are constant."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import onnx
from numpy.typing import NDArray

from onnx_decomp import guards
from onnx_decomp.errors import InputError
from onnx_decomp.functions import FunctionKey, Inlined, inlined
from onnx_decomp.fused_attention import DOMAIN, MultiHead, is_microsoft
from onnx_decomp.graph import (
    Constants,
    Source,
    TensorReader,
    all_names,
    constant_tensor,
    is_standard,
    mentions,
    nested_graphs,
    outer_reads,
)
from onnx_decomp.model_io import opset
from onnx_decomp.normal_form import matrix, normal_form

SMALL = 1024
"""Entries of a tensor that shape inference may want to see."""

INFERENCE = 2**30
"""Bytes of memory that shape inference may take: it sees no weights, and computes what shapes are made of."""

AS_INPUT: Mapping[str, Sequence[int]] = {
    "SkipLayerNormalization": (0, 3),
    "SkipSimplifiedLayerNormalization": (0, 3),
    **dict.fromkeys(("BiasGelu", "FastGelu", "Gelu", "QuickGelu", "RotaryEmbedding"), (0,)),
}
"""Operators of com.microsoft, and which of their outputs have the type and the shape of the first input."""

INITIALIZERS_APART = 4
"""IR version from which initializers need not be listed among the inputs; those that are may be overridden."""


@dataclass(frozen=True)
class Around:
    """What a graph that is the body of another's node has to heed.

    pinned: constants that others read too. reserved: names that others have. called: functions that others call.
    """

    pinned: frozenset[str] = frozenset()
    reserved: frozenset[str] = frozenset()
    called: frozenset[FunctionKey] = frozenset()


@dataclass
class GraphIndex:
    """The main graph, its products in normal form; `proto` is the model as it is, and is never changed.

    nodes: the operators in normal form. Everything else counts positions in them. operators: as the model has them,
    with calls of its functions written out. origins: for each node the position in it of the one that it stands for.
    """

    proto: onnx.ModelProto
    read: TensorReader
    nodes: Sequence[onnx.NodeProto] = ()
    operators: Inlined = field(default_factory=lambda: Inlined(()))
    origins: Sequence[int] = ()
    constants: Constants = field(init=False)
    producer: dict[str, int] = field(default_factory=dict)
    consumers: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    stored: dict[str, onnx.TensorProto] = field(default_factory=dict)
    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    element_types: dict[str, int] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    """What callers feed, or may feed."""
    defaults: frozenset[str] = frozenset()
    """What callers may feed, and need not."""
    pinned_tensors: set[str] = field(default_factory=set)
    """Graph inputs and outputs, and whatever a nested graph reads: visible outside the main graph's nodes."""
    around: Around = field(default_factory=lambda: Around())

    @classmethod
    def build(
        cls,
        proto: onnx.ModelProto,
        read: TensorReader,
        around: Around | None = None,
    ) -> GraphIndex:
        index = cls(proto, read, around=around or Around())
        index.pinned_tensors.update(index.around.pinned)
        taken = all_names(proto.graph) | index.around.reserved
        index.operators = inlined(proto, taken, index.around.called)
        index.nodes, index.origins = index.operators.nodes, range(len(index.operators.nodes))
        index.constants = Constants.of(index.nodes, index._initializers(), read)
        index._read_shapes()
        normal = normal_form(index.nodes, index.constants, taken, index.shapes.get, opset(proto))
        if any(len(group) > 1 for group in normal):
            index.nodes = [node for group in normal for node in group]
            index.origins = [at for at, group in enumerate(normal) for _ in group]
            index.constants = Constants.of(index.nodes, index._initializers(), read)
            index._read_shapes()
        index._read_nodes()
        return index

    def _initializers(self) -> dict[str, Source]:
        """By name. A default that callers may override is no constant."""
        graph = self.proto.graph
        listed = (
            {value.name for value in graph.input} if self.proto.ir_version >= INITIALIZERS_APART else set()
        )
        stored = {
            tensor.name: Source.of(tensor.name, tensor, "overridable" if tensor.name in listed else None)
            for tensor in graph.initializer
        }
        return stored | {name: Source.of(name, held) for name, held in self.operators.constants.items()}

    def _read_nodes(self) -> None:
        graph = self.proto.graph
        self.stored = {
            name: source.tensor
            for name, source in self.constants.sources.items()
            if name == source.name and source.obstacle != "overridable"
        }
        for position, node in enumerate(self.nodes):
            self.producer |= {name: position for name in node.output if name}
            for name in node.input:
                if name:
                    self.consumers[name].append(position)
            for nested in nested_graphs(node):
                self.pinned_tensors.update(outer_reads(nested))
        self.inputs = tuple(value.name for value in graph.input if value.name not in self.stored)
        self.defaults = frozenset(self.inputs).intersection(self.constants.sources)
        self.pinned_tensors.update(self.inputs, self.operators.staying)
        self.pinned_tensors.update(value.name for value in graph.output)
        self.pinned_tensors.update(item.tensor_name for item in graph.quantization_annotation)

    def _read_shapes(self) -> None:
        try:
            with guards.limited_memory(INFERENCE):
                inferred = onnx.shape_inference.infer_shapes(self._skeleton(), data_prop=True).graph
        except MemoryError as error:
            raise InputError(
                f"the shapes of the model take more than {INFERENCE} bytes to tell: is there a Range without end in it?"
            ) from error
        except Exception:  # inference is a help; a model that it can't read still compiles
            inferred = self.proto.graph
        values = [*inferred.input, *inferred.value_info, *inferred.output]
        guards.check_sizes(values)
        for value in values:
            tensor = value.type.tensor_type
            self.element_types[value.name] = tensor.elem_type
            if tensor.HasField("shape"):
                self.shapes[value.name] = tuple(
                    dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None
                    for dim in tensor.shape.dim
                )
        for node in self.nodes:
            found = MultiHead.of(node)
            if found is not None and found.mask:  # inference does not know it
                self.element_types.setdefault(found.mask, onnx.TensorProto.INT32)
        for name, source in self.constants.sources.items():
            if source.obstacle is None:
                self.shapes[name], self.element_types[name] = source.shape, source.element

    def _skeleton(self) -> onnx.ModelProto:
        """The model in normal form, with what is large told by type and shape only."""
        graph, large = self.proto.graph, {}
        skeleton = onnx.ModelProto(ir_version=max(self.proto.ir_version, INITIALIZERS_APART))
        skeleton.opset_import.extend(self.proto.opset_import)
        skeleton.functions.extend(self.proto.functions)
        for tensor in graph.initializer:
            if prod(tensor.dims) <= SMALL:
                skeleton.graph.initializer.append(tensor)
            else:
                large[tensor.name] = tensor
        for name, tensor in self.operators.constants.items():
            if prod(tensor.dims) <= SMALL:
                skeleton.graph.initializer.append(tensor)
                skeleton.graph.initializer[-1].name = name
            else:
                large[name] = tensor
        for node in self._nodes_to_infer():
            held = constant_tensor(node)
            if held is None or prod(held.dims) <= SMALL:
                skeleton.graph.node.append(node)
            else:
                large[node.output[0]] = held
        skeleton.graph.input.extend(value for value in graph.input if value.name not in large)
        skeleton.graph.input.extend(
            onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
            for name, tensor in large.items()
        )
        skeleton.graph.output.extend(graph.output)
        skeleton.graph.value_info.extend(graph.value_info)
        skeleton.graph.sparse_initializer.extend(graph.sparse_initializer)
        return skeleton

    def _nodes_to_infer(self) -> Iterator[onnx.NodeProto]:
        """The nodes; in place of some that inference does not know, others of the same type and shape."""
        widths: dict[str, int] = {}
        for node in self.nodes:
            if is_standard(node, "MatMul"):
                sides = matrix(self.resolve(node.input[1]))
                widths[node.output[0]] = 0 if sides is None else sides[1]
            elif is_standard(node, "Add"):
                widths[node.output[0]] = max(widths.get(name, 0) for name in node.input)
            if is_microsoft(node, "EmbedLayerNormalization"):
                yield onnx.helper.make_node("Gather", [node.input[2], node.input[0]], node.output[:1])
                continue
            same = _as_input(node, widths)
            if not same:
                yield node
            for name in same:
                yield onnx.helper.make_node("Identity", node.input[:1], [name])

    def node(self, position: int) -> onnx.NodeProto:
        return self.nodes[position]

    def maker_of(self, name: str) -> onnx.NodeProto | None:
        """The node that computes a tensor, if one does."""
        position = self.producer.get(name)
        return None if position is None else self.nodes[position]

    def original(self, position: int) -> onnx.NodeProto:
        """The node of the model itself, or of a function of it, that the one at a position stands for."""
        return self.operators.nodes[self.origins[position]]

    def calls(self, position: int) -> list[onnx.NodeProto]:
        """The calls of functions that a position lies in, outermost first."""
        return [self.operators.calls[call] for call in self.operators.within[self.origins[position]]]

    def held(self, nodes: Iterable[onnx.NodeProto]) -> list[onnx.TensorProto]:
        """Constants of functions that nodes read, as initializers of the main graph."""
        read = set(mentions(nodes)) if self.operators.constants else set()
        found = []
        for name in sorted(read & self.operators.constants.keys()):
            found.append(onnx.TensorProto())
            found[-1].CopyFrom(self.operators.constants[name])
            found[-1].name = name
        return found

    def siblings(self, position: int) -> range:
        """Positions of everything that stands for the same node of the model."""
        origin = self.origins[position]
        return range(bisect_left(self.origins, origin), bisect_right(self.origins, origin))

    def rank(self, tensor: str) -> int | None:
        shape = self.shapes.get(tensor)
        return None if shape is None else len(shape)

    def sole_consumer(self, tensor: str) -> int | None:
        """Position of the one node that reads `tensor`, or None if it is read elsewhere too."""
        readers = self.consumers.get(tensor, [])
        if len(readers) != 1 or tensor in self.pinned_tensors:
            return None
        return readers[0]

    def resolve(self, tensor: str) -> Source | None:
        """The constant that `tensor` is, through whatever only rearranges or converts it; None for any other."""
        return self.constants.resolve(tensor)

    def constant(self, tensor: str) -> NDArray[Any] | None:
        """Value of a constant tensor, or None for any other."""
        return self.constants.constant(tensor)

    def between(self, reads: Sequence[tuple[str, int]]) -> set[int]:
        """Positions of operators that only lead from stored tensors to these reads (tensor, position of the reader)."""
        found: set[int] = set()
        pending = [name for name, _ in reads]
        gone = {position for _, position in reads}
        while pending:
            name = pending.pop()
            position = self.producer.get(name)
            if position is None or name not in self.constants.sources or name in self.pinned_tensors:
                continue
            made = self.nodes[position].output
            if all(gone.issuperset(self.consumers.get(output, [])) for output in made):
                found.add(position)
                gone.add(position)
                pending += self.nodes[position].input
        return found


def _as_input(node: onnx.NodeProto, widths: Mapping[str, int]) -> list[str]:
    """Outputs of the type and the shape of the first input, of an operator that inference does not know.

    widths: of what products make.
    """
    found = MultiHead.of(node)
    if found is not None:
        query, _, value = (widths.get(name, 0) for name in found.operands)
        return [node.output[0]] if query == value != 0 else []
    places = AS_INPUT.get(node.op_type, ()) if node.domain == DOMAIN else ()
    return [node.output[at] for at in places if at < len(node.output) and node.output[at]]
