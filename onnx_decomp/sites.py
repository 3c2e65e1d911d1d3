"""What the graph holds: every use of a constant matrix, in one canonical view.

A *site* is one MatMul or Gemm whose right operand is constant. Its canonical view is the affine map

    y = x @ W + b        W [K, N] (inputs x outputs), b [N] or None

whatever the exporter wrote: a transposed Gemm, alpha and beta, a weight behind Constant, Identity or Transpose, a
bias in an Add of its own. Everything above this file is free of that detail.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_decomp.errors import InputError

FLOATS: dict[int, np.dtype[Any]] = {
    onnx.TensorProto.FLOAT: np.dtype(np.float32),
    onnx.TensorProto.FLOAT16: np.dtype(np.float16),
}
"""Weight types that are decomposed; any other is declined with the reason `weight-type`."""

TensorReader = Callable[[onnx.TensorProto], NDArray[Any]]


@dataclass(frozen=True)
class Site:
    """One use of a constant matrix. `nodes` are positions in the main graph; the last one makes `output`."""

    index: int
    node: str
    op: str
    weight: str
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    graph: str
    input: str
    output: str
    nodes: tuple[int, ...]
    transposed: bool
    """The stored tensor is [N, K]."""
    alpha: float = 1.0
    beta: float = 1.0
    bias: str | None = None
    rank: int | None = None
    """Rank of x where the graph tells."""
    obstacle: str | None = None
    """Reason code why this site can't be rewritten, or None."""

    @property
    def name(self) -> str:
        """How messages and reports call it: the node's name, or its weight's where the node has none."""
        return self.node or self.weight

    @property
    def flops(self) -> int:
        """Multiply-adds times two for one row of x."""
        return 2 * self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Affine:
    """The canonical view of a site: y = x @ weight + bias."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None


@dataclass
class GraphIndex:
    """Who makes and who reads each tensor of the main graph, and which tensors are constant."""

    proto: onnx.ModelProto
    read: TensorReader
    producer: dict[str, int] = field(default_factory=dict)
    consumers: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    stored: dict[str, onnx.TensorProto] = field(default_factory=dict)
    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    element_types: dict[str, int] = field(default_factory=dict)
    pinned_tensors: set[str] = field(default_factory=set)
    """Graph inputs and outputs, and whatever a nested graph reads: visible outside the main graph's nodes."""

    @classmethod
    def build(cls, proto: onnx.ModelProto, read: TensorReader) -> GraphIndex:
        index = cls(proto, read)
        graph = proto.graph
        fed = {value.name for value in graph.input}
        index.stored = {t.name: t for t in graph.initializer if t.name not in fed}
        for position, node in enumerate(graph.node):
            for name in node.output:
                index.producer[name] = position
            for name in node.input:
                if name:
                    index.consumers[name].append(position)
            for nested in nested_graphs(node):
                index.pinned_tensors.update(outer_reads(nested))
            tensor = constant_tensor(node)
            if tensor is not None:
                index.stored[node.output[0]] = tensor
        index.pinned_tensors.update(fed)
        index.pinned_tensors.update(value.name for value in graph.output)
        index.pinned_tensors.update(
            name for item in graph.quantization_annotation for name in [item.tensor_name]
        )
        index._read_shapes()
        return index

    def _read_shapes(self) -> None:
        try:
            inferred = onnx.shape_inference.infer_shapes(self.proto, data_prop=True).graph
        except Exception:  # inference is a help; a model that it can't read still compiles
            inferred = self.proto.graph
        for value in [*inferred.input, *inferred.value_info, *inferred.output]:
            tensor = value.type.tensor_type
            self.element_types[value.name] = tensor.elem_type
            if tensor.HasField("shape"):
                self.shapes[value.name] = tuple(
                    dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim
                )

    def node(self, position: int) -> onnx.NodeProto:
        node: onnx.NodeProto = self.proto.graph.node[position]
        return node

    def rank(self, tensor: str) -> int | None:
        shape = self.shapes.get(tensor)
        return None if shape is None else len(shape)

    def sole_consumer(self, tensor: str) -> int | None:
        """Position of the one node that reads `tensor`, or None if it is read elsewhere too."""
        readers = self.consumers.get(tensor, [])
        if len(readers) != 1 or tensor in self.pinned_tensors:
            return None
        return readers[0]

    def constant(self, tensor: str) -> NDArray[Any] | None:
        """Value of a constant tensor, reached through Identity, or None."""
        found = self.resolve(tensor)
        if found is None:
            return None
        stored, transposed, _ = found
        array = self.read(stored)
        return array.T if transposed else array

    def resolve(self, tensor: str) -> tuple[onnx.TensorProto, bool, str] | None:
        """The stored tensor behind `tensor` through Identity and 2-D Transpose: (tensor, transposed, its name)."""
        transposed = False
        for _ in range(64):  # chains are short; the bound only guards against cycles in hostile files
            if tensor in self.stored:
                return self.stored[tensor], transposed, tensor
            position = self.producer.get(tensor)
            if position is None:
                return None
            node = self.node(position)
            if node.domain not in ("", "ai.onnx") or not node.input:
                return None
            if node.op_type == "Transpose":
                permutation = attribute(node, "perm", [1, 0])
                if list(permutation) != [1, 0]:
                    return None
                transposed = not transposed
            elif node.op_type != "Identity":
                return None
            tensor = node.input[0]
        return None


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Value of a node's attribute, or `default`."""
    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


def constant_tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The tensor that a Constant node holds, or None."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
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


def nested_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Bodies of If, Loop, Scan and the like."""
    for item in node.attribute:
        if item.type == onnx.AttributeProto.GRAPH:
            yield item.g
        elif item.type == onnx.AttributeProto.GRAPHS:
            yield from item.graphs


def outer_reads(graph: onnx.GraphProto) -> set[str]:
    """Every name that a nested graph, or one nested in it, mentions as an input or passes through."""
    names = {name for node in graph.node for name in node.input if name}
    names.update(value.name for value in graph.output)
    for node in graph.node:
        for inner in nested_graphs(node):
            names |= outer_reads(inner)
    return names


def find_sites(index: GraphIndex) -> list[Site]:
    """Every site of the model in graph order, those in nested graphs and those that can't be rewritten included."""
    sites: list[Site] = []
    for position, node in enumerate(index.proto.graph.node):
        if node.domain in ("", "ai.onnx") and node.op_type in ("MatMul", "Gemm"):
            site = _read_site(index, position, node, len(sites))
            if site is not None:
                sites.append(site)
        for nested in nested_graphs(node):
            sites.extend(_nested_sites(index, nested, f"{node.op_type.lower()}:{node.name}", len(sites)))
    return _mark_shared(sites)


def _read_site(index: GraphIndex, position: int, node: onnx.NodeProto, number: int) -> Site | None:
    found = index.resolve(node.input[1]) if len(node.input) > 1 else None
    if found is None:
        return _left_site(index, position, node, number)
    tensor, transposed, name = found
    if len(tensor.dims) != 2:
        return None
    trans_b = node.op_type == "Gemm" and bool(attribute(node, "transB", 0))
    transposed ^= trans_b
    dims = tuple(tensor.dims)
    shape = (dims[1], dims[0]) if transposed else (dims[0], dims[1])
    obstacle = None if tensor.data_type in FLOATS else "weight-type"
    if 0 in shape:
        obstacle = "empty-weight"
    bias: str | None = None
    output, beta = node.output[0], 1.0
    nodes: tuple[int, ...] = (position,)
    if node.op_type == "Gemm":
        if attribute(node, "transA", 0):
            obstacle = obstacle or "transposed-input"
        beta = float(attribute(node, "beta", 1.0))
        if len(node.input) > 2 and node.input[2]:
            bias = node.input[2]
            if _bias_array(index, bias, shape[1]) is None:
                obstacle = obstacle or "bias-not-constant"
    else:
        bias, output, nodes = _bias_of_matmul(index, position, node, shape[1])
    return Site(
        index=number,
        node=node.name,
        op=node.op_type,
        weight=name,
        shape=shape,
        dtype=FLOATS.get(tensor.data_type, np.dtype(np.float32)),
        graph="main",
        input=node.input[0],
        output=output,
        nodes=nodes,
        transposed=transposed,
        alpha=float(attribute(node, "alpha", 1.0)) if node.op_type == "Gemm" else 1.0,
        beta=beta,
        bias=bias,
        rank=index.rank(node.input[0]),
        obstacle=obstacle,
    )


def _left_site(index: GraphIndex, position: int, node: onnx.NodeProto, number: int) -> Site | None:
    """A constant left operand is reported, and declined: its canonical view comes with its rewrite."""
    found = index.resolve(node.input[0]) if node.input else None
    if found is None or len(found[0].dims) != 2:
        return None
    tensor, transposed, name = found
    rows, columns = (tensor.dims[1], tensor.dims[0]) if transposed else tuple(tensor.dims)
    return Site(
        index=number,
        node=node.name,
        op=node.op_type,
        weight=name,
        shape=(columns, rows),
        dtype=FLOATS.get(tensor.data_type, np.dtype(np.float32)),
        graph="main",
        input=node.input[1],
        output=node.output[0],
        nodes=(position,),
        transposed=not transposed,
        obstacle="weight-on-the-left",
    )


def _bias_array(index: GraphIndex, tensor: str, n: int) -> NDArray[Any] | None:
    """A constant that adds one value to each of n outputs, as [n]; None if it is anything else."""
    array = index.constant(tensor)
    if array is None or array.size not in (1, n) or (array.ndim and array.shape[-1] != array.size):
        return None
    return np.broadcast_to(array.reshape(-1), (n,))


def _bias_of_matmul(
    index: GraphIndex, position: int, node: onnx.NodeProto, n: int
) -> tuple[str | None, str, tuple[int, ...]]:
    """The Add that follows a MatMul belongs to the site when nothing else sees the product."""
    product = node.output[0]
    reader = index.sole_consumer(product)
    if reader is not None:
        add = index.node(reader)
        if add.op_type == "Add" and add.domain in ("", "ai.onnx") and add.input[0] != add.input[1]:
            other = add.input[1] if add.input[0] == product else add.input[0]
            array = index.constant(other)
            rank = index.rank(product)
            fits = array is not None and (array.ndim <= 1 or (rank is not None and array.ndim <= rank))
            if fits and _bias_array(index, other, n) is not None:
                return other, add.output[0], (position, reader)
    return None, product, (position,)


def _nested_sites(index: GraphIndex, graph: onnx.GraphProto, where: str, number: int) -> Iterator[Site]:
    """Sites in a nested graph: listed with the reason that they are not rewritten."""
    local = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.domain in ("", "ai.onnx") and len(node.input) > 1:
            tensor = local.get(node.input[1]) or index.stored.get(node.input[1])
            if tensor is not None and len(tensor.dims) == 2:
                transposed = node.op_type == "Gemm" and bool(attribute(node, "transB", 0))
                dims = tuple(tensor.dims)
                yield Site(
                    index=number,
                    node=node.name,
                    op=node.op_type,
                    weight=node.input[1],
                    shape=(dims[1], dims[0]) if transposed else (dims[0], dims[1]),
                    dtype=FLOATS.get(tensor.data_type, np.dtype(np.float32)),
                    graph=f"{where}/{graph.name}",
                    input=node.input[0],
                    output=node.output[0],
                    nodes=(),
                    transposed=transposed,
                    obstacle="nested-graph",
                )
                number += 1
        for inner in nested_graphs(node):
            for site in _nested_sites(index, inner, f"{where}/{node.op_type.lower()}:{node.name}", number):
                yield site
                number += 1


def _mark_shared(sites: list[Site]) -> list[Site]:
    """Uses of one weight are rewritten together, or not at all: else the file would hold two versions of it."""
    uses: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        uses[site.weight].append(site)

    def alike(site: Site) -> bool:
        return all(
            other.obstacle is None and (other.transposed, other.alpha) == (site.transposed, site.alpha)
            for other in uses[site.weight]
        )

    return [
        replace(site, obstacle="shared-weight") if not site.obstacle and not alike(site) else site
        for site in sites
    ]


def read_affine(index: GraphIndex, site: Site) -> Affine:
    """The canonical W [K, N] and b [N] of a site, alpha and beta folded in, in float32.

    Raises InputError where the weight holds NaN or infinity.
    """
    found = index.stored[site.weight]
    array = index.read(found).astype(np.float32)
    weight = np.ascontiguousarray(array.T if site.transposed else array)
    if site.alpha != 1.0:
        weight = weight * np.float32(site.alpha)
    if not np.isfinite(weight).all():
        raise InputError(
            f"{site.name}: weight {site.weight!r} holds NaN or infinity; export the model again from sound weights"
        )
    if site.bias is None:
        return Affine(weight, None)
    bias = _bias_array(index, site.bias, site.shape[1])
    if bias is None:
        return Affine(weight, None)
    scaled = bias.astype(np.float32) * np.float32(site.beta)
    if not np.isfinite(scaled).all():
        raise InputError(f"{site.name}: bias {site.bias!r} holds NaN or infinity; export the model again")
    return Affine(weight, scaled)
