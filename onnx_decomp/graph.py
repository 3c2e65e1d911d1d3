"""Nodes of an ONNX graph, and its constants: what is stored, and what stands between that and whoever reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

TensorReader = Callable[[onnx.TensorProto], NDArray[Any]]

DEFAULT = ("", "ai.onnx")
"""Names of the domain of the standard operators."""

FLOATS = frozenset(
    {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
        onnx.TensorProto.DOUBLE,
    }
)
"""Types of weights that are decomposed."""

WHOLE = frozenset(
    getattr(onnx.TensorProto, name)
    for name in ("BOOL", "INT16", "INT32", "INT64", "UINT16", "UINT32", "UINT64")
)
MAX_STEPS = 16
"""Operators between a stored tensor and what reads it; exporters write two or three."""
MAX_SHAPE = 64
"""Entries of a constant that may be a shape or a list of axes."""

Step = tuple[str, Any]
"""("transpose", permutation), ("reshape", shape), ("cast", element type) or ("part", (axis, from, to))."""


def is_standard(node: onnx.NodeProto, *operators: str) -> bool:
    """Whether a node is one of these standard operators."""
    return node.domain in DEFAULT and node.op_type in operators


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Value of a node's attribute, or `default`; what a function's call fills in is not known here."""
    for item in node.attribute:
        if item.name == name and not item.ref_attr_name:
            return onnx.helper.get_attribute_value(item)
    return default


def constant_tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The tensor that a Constant node holds, or None."""
    if not is_standard(node, "Constant"):
        return None
    for item in node.attribute:
        if item.name == "value":
            tensor: onnx.TensorProto = item.t
            return tensor
        if item.name in ("value_float", "value_floats"):
            values = item.f if item.name == "value_float" else list(item.floats)
            return onnx.numpy_helper.from_array(np.asarray(values, np.float32), node.output[0])
        if item.name in ("value_int", "value_ints"):
            whole = item.i if item.name == "value_int" else list(item.ints)
            return onnx.numpy_helper.from_array(np.asarray(whole, np.int64), node.output[0])
    return None


def bodies(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    """Nested graphs of If, Loop, Scan and the like, each with its attribute's name, `then` for `then_branch`."""
    for item in node.attribute:
        if item.type == onnx.AttributeProto.GRAPH:
            yield item.name.removesuffix("_branch"), item.g
        elif item.type == onnx.AttributeProto.GRAPHS:
            for number, graph in enumerate(item.graphs):
                yield f"{item.name}_{number}", graph


def nested_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Bodies of If, Loop, Scan and the like."""
    return (graph for _, graph in bodies(node))


def outer_reads(graph: onnx.GraphProto) -> set[str]:
    """Every name that a nested graph, or one nested in it, mentions as an input or passes through."""
    names = {name for node in graph.node for name in node.input if name}
    names.update(value.name for value in graph.output)
    for node in graph.node:
        for inner in nested_graphs(node):
            names |= outer_reads(inner)
    return names


def mentions(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """Every name that nodes read, in nested graphs too."""
    for node in nodes:
        yield from node.input
        for nested in nested_graphs(node):
            yield from mentions(nested.node)
            yield from (value.name for value in nested.output)


def all_names(graph: onnx.GraphProto) -> set[str]:
    """Every name in use, in nested graphs too."""
    names = {t.name for t in graph.initializer} | {v.name for v in graph.input}
    for node in graph.node:
        names.update([node.name, *node.input, *node.output])
        for nested in nested_graphs(node):
            names |= all_names(nested)
    return names


def unique(name: str, taken: set[str]) -> str:
    """The name, or with a number where it is taken; it is from now on."""
    candidate, number = name, 1
    while candidate in taken:
        candidate, number = f"{name}.{number}", number + 1
    taken.add(candidate)
    return candidate


@dataclass(frozen=True)
class Source:
    """A constant as an operator reads it.

    name, tensor: what is stored. steps: what happens to it on the way. shape, element: of what arrives.
    axes: the axes of the stored tensor that each axis is made of, those of length one left out; None where a Reshape
        cuts one up, or comes behind a part. obstacle: reason code why nothing may be written in its place, or None.
    """

    name: str
    tensor: onnx.TensorProto
    shape: tuple[int, ...]
    element: int
    axes: tuple[tuple[int, ...], ...] | None
    steps: tuple[Step, ...] = ()
    obstacle: str | None = None

    @classmethod
    def of(cls, name: str, tensor: onnx.TensorProto, obstacle: str | None = None) -> Source:
        shape = tuple(tensor.dims)
        axes = tuple((axis,) if size != 1 else () for axis, size in enumerate(shape))
        return cls(name, tensor, shape, tensor.data_type, axes, obstacle=obstacle)

    @property
    def parts(self) -> tuple[Step, ...]:
        """How it is cut out of what is stored; nothing where all of that arrives."""
        return tuple(step for step in self.steps if step[0] == "part")

    @property
    def dtype(self) -> np.dtype[Any]:
        """numpy's type of what arrives."""
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self.element))

    @property
    def storage(self) -> np.dtype[Any]:
        """The type in which something else is stored in its place: its own, unless that is wider than what arrives."""
        if self.tensor.data_type not in FLOATS:
            return self.dtype
        stored = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self.tensor.data_type))
        return stored if stored.itemsize < self.dtype.itemsize else self.dtype

    def arranged(self, array: NDArray[Any]) -> NDArray[Any]:
        """An array of the stored tensor's shape as it arrives, in its own type."""
        for kind, what in self.steps:
            if kind == "transpose":
                array = array.transpose(what)
            elif kind == "reshape":
                array = array.reshape(what)
            elif kind == "part":
                axis, start, stop = what
                array = array[(slice(None),) * axis + (slice(start, stop),)]
        return array

    def array(self, read: TensorReader) -> NDArray[Any]:
        """What arrives."""
        array = read(self.tensor)
        for kind, what in self.steps:
            if kind == "cast":
                with np.errstate(over="ignore"):  # as the operator itself does
                    array = array.astype(onnx.helper.tensor_dtype_to_np_dtype(what))
        return self.arranged(array)

    def transposed(self, permutation: Sequence[int]) -> Source | None:
        if sorted(permutation) != list(range(len(self.shape))):
            return None
        axes = None if self.axes is None else tuple(self.axes[at] for at in permutation)
        shape = tuple(self.shape[at] for at in permutation)
        return replace(self, shape=shape, axes=axes, steps=(*self.steps, ("transpose", tuple(permutation))))

    def reshaped(self, shape: Sequence[int]) -> Source | None:
        if min(shape, default=0) < 0 or prod(shape) != prod(self.shape):
            return None
        axes = self._regrouped(shape)
        return replace(self, shape=tuple(shape), axes=axes, steps=(*self.steps, ("reshape", tuple(shape))))

    def _regrouped(self, shape: Sequence[int]) -> tuple[tuple[int, ...], ...] | None:
        """Axes of the stored tensor that make up each axis of `shape`; None where one would have to be cut up."""
        if self.axes is None or 0 in shape or self.parts:
            return None
        parts = [axis for axes in self.axes for axis in axes]
        made = []
        for size in shape:
            taken: list[int] = []
            while parts and prod(self.tensor.dims[axis] for axis in taken) < size:
                taken.append(parts.pop(0))
            if prod(self.tensor.dims[axis] for axis in taken) != size:
                return None
            made.append(tuple(taken))
        return tuple(made)

    def part(self, axis: int, start: int, stop: int) -> Source:
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        return replace(self, shape=shape, steps=(*self.steps, ("part", (axis, start, stop))))

    def cast(self, element: int) -> Source | None:
        if element not in FLOATS | WHOLE:
            return None
        obstacle = self.obstacle
        if self.element not in FLOATS | WHOLE:  # eight bits or fewer that are to be numbers
            obstacle = obstacle or "quantized"
        return replace(self, element=element, steps=(*self.steps, ("cast", element)), obstacle=obstacle)


@dataclass
class Constants:
    """The constants of one graph by name, those of the graphs around it included.

    An operator is followed if it only rearranges or converts a constant. Nodes are given in the order of the graph.
    """

    read: TensorReader
    sources: MutableMapping[str, Source] = field(default_factory=dict)

    @classmethod
    def of(
        cls, nodes: Iterable[onnx.NodeProto], stored: MutableMapping[str, Source], read: TensorReader
    ) -> Constants:
        """Adds to `stored`, which holds the constants that are there without any node."""
        found = cls(read, stored)
        for node in nodes:
            tensor = constant_tensor(node)
            if is_standard(node, "Split"):
                made: Sequence[Source | None] = found._split(node)
            else:
                made = [found._made(node) if tensor is None else Source.of(node.output[0], tensor)]
            for name, source in zip(node.output, made, strict=False):
                if source is not None and len(source.steps) <= MAX_STEPS:
                    found.sources[name] = source
        return found

    def resolve(self, tensor: str) -> Source | None:
        """The constant that `tensor` is, or None; a quantized one is none, nor one that callers may override."""
        found = self.sources.get(tensor)
        return None if found is None or found.obstacle is not None else found

    def constant(self, tensor: str) -> NDArray[Any] | None:
        """Value of a constant tensor, or None for any other."""
        found = self.resolve(tensor)
        return None if found is None else found.array(self.read)

    def _made(self, node: onnx.NodeProto) -> Source | None:
        """The constant that an operator makes of a constant, or None."""
        source = self.sources.get(node.input[0]) if node.input and len(node.output) == 1 else None
        if source is None or node.domain not in DEFAULT:
            return self._scaled(node)
        if node.op_type == "Identity":
            return source
        if node.op_type == "Cast":
            return source.cast(int(attribute(node, "to", 0)))
        if node.op_type == "DequantizeLinear":
            return self._quantized(node, source)
        if node.op_type == "Transpose":
            return source.transposed(attribute(node, "perm", list(range(len(source.shape)))[::-1]))
        shape = self._shape(node, source.shape)
        return self._scaled(node) if shape is None else source.reshaped(shape)

    def _split(self, node: onnx.NodeProto) -> Sequence[Source]:
        """The parts of a constant, where it is told how large they are."""
        source, sizes = self.sources.get(node.input[0]), self._list(node, "split")
        if source is None or sizes is None or not source.shape or min(sizes, default=-1) < 0:
            return []
        axis = int(attribute(node, "axis", 0)) % len(source.shape)
        if (sum(sizes), len(sizes)) != (source.shape[axis], len(node.output)):
            return []
        ends = np.cumsum(sizes).tolist()
        return [source.part(axis, end - size, end) for size, end in zip(sizes, ends, strict=True)]

    def _quantized(self, node: onnx.NodeProto, source: Source) -> Source:
        scale = self.sources.get(node.input[1])
        element = onnx.TensorProto.FLOAT if scale is None else scale.element
        return replace(source, element=element, obstacle="quantized")

    def _scaled(self, node: onnx.NodeProto) -> Source | None:
        """A quantized constant that is multiplied by its scales, or moved by its zero points, still is one."""
        if not is_standard(node, "Mul", "Sub", "Add", "Div") or len(node.input) != 2:
            return None
        both = [self.sources.get(name) for name in node.input]
        if any(source is None for source in both):
            return None
        for source in both:
            if source is not None and source.obstacle == "quantized":
                return source
        return None

    def _shape(self, node: onnx.NodeProto, shape: tuple[int, ...]) -> list[int] | None:
        """The shape that Reshape, Flatten, Squeeze or Unsqueeze gives to a tensor of `shape`; None for any other."""
        rank = len(shape)
        if node.op_type == "Flatten":
            axis = int(attribute(node, "axis", 1))
            axis += rank if axis < 0 else 0
            return [prod(shape[:axis]), prod(shape[axis:])] if 0 <= axis <= rank else None
        if node.op_type == "Reshape":
            return self._asked_shape(node, shape)
        if node.op_type == "Squeeze":
            axes = self._list(node, "axes")
            if axes is None:
                return [size for size in shape if size != 1] if len(node.input) < 2 else None
            dropped = {axis % rank for axis in axes} if rank else set()
            return [size for axis, size in enumerate(shape) if axis not in dropped]
        if node.op_type == "Unsqueeze":
            axes = self._list(node, "axes")
            if axes is None:
                return None
            rank += len(axes)
            new, rest = {axis % rank for axis in axes} if rank else set(), list(shape)
            return [1 if axis in new or not rest else rest.pop(0) for axis in range(rank)]
        return None

    def _asked_shape(self, node: onnx.NodeProto, shape: tuple[int, ...]) -> list[int] | None:
        asked = self._list(node, "shape")
        if asked is None or asked.count(-1) > 1:
            return None
        if not attribute(node, "allowzero", 0):
            if any(size == 0 and axis >= len(shape) for axis, size in enumerate(asked)):
                return None
            asked = [shape[axis] if size == 0 else size for axis, size in enumerate(asked)]
        if -1 in asked:
            rest = prod(size for size in asked if size != -1)
            if rest <= 0 or prod(shape) % rest:
                return None
            asked[asked.index(-1)] = prod(shape) // rest
        return asked

    def _list(self, node: onnx.NodeProto, name: str) -> list[int] | None:
        """A list of whole numbers: an attribute in old operator sets, a constant second input in new ones."""
        listed = attribute(node, name, None)
        if listed is not None:
            return [int(number) for number in listed]
        source = self.resolve(node.input[1]) if len(node.input) > 1 else None
        if source is None or prod(source.shape) > MAX_SHAPE:
            return None
        array = source.array(self.read)
        return [int(number) for number in np.ravel(array)] if array.dtype.kind in "iu" else None
