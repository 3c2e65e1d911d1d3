"""What the graph holds: every use of a constant matrix, in one canonical view.

A *site* is one product with a constant matrix. Its canonical view is the affine map

    y = x @ W + b        W [K, N] (inputs x outputs), b [N] or None

whatever the exporter wrote: a transposed Gemm, alpha and beta, a constant on the left (`normal_form`), a weight behind
Constant, Identity, Transpose, Cast, Reshape, Squeeze or Unsqueeze, a bias in an Add of its own. Everything above this
file is free of that detail. Products that stay as they are are listed too, with the reason.
"""

from __future__ import annotations

from collections import ChainMap, defaultdict
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, cast

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_decomp.errors import InputError
from onnx_decomp.functions import MAX_DEPTH, functions_of
from onnx_decomp.fused_attention import DOMAIN, PARTS, attention_obstacle, is_microsoft
from onnx_decomp.graph import DEFAULT, FLOATS, Constants, Source, attribute, bodies, is_standard
from onnx_decomp.graph_index import GraphIndex
from onnx_decomp.model_io import opset
from onnx_decomp.normal_form import bias_of, is_pointwise, matrix
from onnx_decomp.scratch import kept

__all__ = ["IN_BODY", "Affine", "GraphIndex", "Site", "find_sites", "path_of", "read_affine"]

IN_BODY = "nested-graph"
"""Reason code of products in bodies, which are looked at by themselves."""

OLDEST_OPSET = 7
"""Of the models whose products can be rewritten."""


@dataclass(frozen=True)
class Site:
    """One use of a constant matrix. `nodes` are positions in the index; the last one makes `output`."""

    index: int
    node: str
    op: str
    weight: str
    """Name of the stored tensor."""
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    """The type that the product computes in."""
    graph: str
    input: str
    output: str
    nodes: tuple[int, ...]
    transposed: bool
    """The stored tensor is [N, K], axes of length one left out."""
    operand: str = ""
    """The constant that the product reads."""
    turned: bool = False
    """The operand is [N, K]."""
    source: Source | None = field(default=None, repr=False, compare=False)
    """How the operand comes from what is stored; None where there is no canonical W to read."""
    alpha: float = 1.0
    beta: float = 1.0
    bias: str | None = None
    rank: int | None = None
    """Rank of x where the graph tells."""
    part: str = ""
    """What the product makes where the node of the model makes several at once: query, key or value."""
    moved: int = 0
    """Elements that Transposes around the product move for each row, once it is written in normal form."""
    obstacle: str | None = None
    """Reason code why this site can't be rewritten, or None."""

    @property
    def name(self) -> str:
        """How messages and reports call it: the node's name, or its weight's where the node has none."""
        name = self.node or self.weight
        return f"{name}/{self.part}" if self.part else name

    @property
    def matrix(self) -> tuple[object, ...]:
        """What tells its matrix from any other: the stored tensor, and which part of it that is."""
        return self.weight, *(() if self.source is None else self.source.parts)

    @property
    def packed(self) -> tuple[int, ...]:
        """Shape of the stored tensor where the matrix is a part of it; nothing where it is all of it."""
        return tuple(self.source.tensor.dims) if self.source is not None and self.source.parts else ()

    @property
    def stem(self) -> str:
        """What names of new weights start with: the stored tensor's name, or that of the part of it."""
        return f"{self.weight}.{self.part}" if self.part else self.weight

    @property
    def flops(self) -> int:
        """Multiply-adds times two for one row of x."""
        return 2 * self.shape[0] * self.shape[1]

    @property
    def readable(self) -> bool:
        """There is a canonical W to look at."""
        return self.source is not None

    @property
    def storage(self) -> np.dtype[Any]:
        """The type that weights in its place are stored in: never wider than that of the original.

        Where it is not the type of the product, a Cast follows.
        """
        return self.dtype if self.source is None else self.source.storage

    def canonical(self, stored: NDArray[Any]) -> NDArray[Any]:
        """W [K, N] from an array of the stored tensor's shape; alpha is not in it."""
        assert self.source is not None
        arranged = self.source.arranged(stored).reshape(self.shape[::-1] if self.turned else self.shape)
        return arranged.T if self.turned else arranged


@dataclass(frozen=True)
class Affine:
    """The canonical view of a site: y = x @ weight + bias."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None

    def kept(self) -> Affine:
        """The same, the weight in a file if it is large."""
        return Affine(kept(self.weight), self.bias)


# The main graph


def find_sites(index: GraphIndex) -> list[Site]:
    """Every site of the model in graph order, those in nested graphs and those that can't be rewritten included."""
    sites: list[Site] = []
    inner = _Inner(index)
    for position, node in enumerate(index.nodes):
        site = _read_site(index, position, node)
        if site is None:
            where, reason = _graph(index, position), _reason(index, node)
            site = _listed(node, index.constants, reason, where, nodes=(position,))
        found = [*([] if site is None else [site]), *inner.sites(node, index.constants)]
        sites += [replace(each, index=len(sites) + number) for number, each in enumerate(found)]
    return _mark_shared(index, sites)


def _read_site(index: GraphIndex, position: int, node: onnx.NodeProto) -> Site | None:
    """A product x @ W in normal form; None for anything else."""
    if not is_standard(node, "MatMul", "Gemm") or len(node.input) < 2:
        return None
    source = index.resolve(node.input[1])
    sides = matrix(source)
    if source is None or sides is None or node.input[0] in index.constants.sources:
        return None
    turned = node.op_type == "Gemm" and bool(attribute(node, "transB", 0))
    shape = (sides[1], sides[0]) if turned else sides
    bias, output, nodes = _bias(index, position, node, shape[1])
    rank = index.rank(node.input[0])
    original = index.original(position)
    return Site(
        index=0,
        node=original.name,
        op=original.op_type,
        weight=source.name,
        shape=shape,
        dtype=source.dtype,
        graph=_graph(index, position),
        input=node.input[0],
        output=output,
        nodes=nodes,
        transposed=_is_transposed(source, shape, turned),
        operand=node.input[1],
        turned=turned,
        source=source if source.element in FLOATS and 0 not in shape else None,
        alpha=float(attribute(node, "alpha", 1.0)) if node.op_type == "Gemm" else 1.0,
        beta=float(attribute(node, "beta", 1.0)) if node.op_type == "Gemm" else 1.0,
        bias=bias,
        rank=rank,
        part=_part(index, position),
        moved=_moved(index, position, shape),
        obstacle=_obstacle(source, shape, rank) or _outdated(index),
    )


def _graph(index: GraphIndex, position: int) -> str:
    """Where reports say that a node is."""
    calls = index.calls(position)
    return f"function:{calls[-1].name or calls[-1].op_type}" if calls else "main"


def path_of(node: onnx.NodeProto, attribute: str) -> str:
    """Where reports say that the body is that a node holds in an attribute."""
    return f"{node.op_type.lower()}:{node.name or node.output[0]}/{attribute.removesuffix('_branch')}"


def _part(index: GraphIndex, position: int) -> str:
    """What a product makes for the attention that it stands for a third of."""
    if not is_microsoft(index.original(position), "Attention"):
        return ""
    products = [at for at in index.siblings(position) if is_standard(index.node(at), "MatMul")]
    return PARTS[products.index(position)]


def _moved(index: GraphIndex, position: int, shape: tuple[int, int]) -> int:
    """Inputs are moved before the product, and outputs after it."""
    turns = [at for at in index.siblings(position) if index.node(at).op_type == "Transpose"]
    data = [at for at in turns if index.node(at).output[0] not in index.constants.sources]
    return sum(shape[0] if at < position else shape[1] for at in data)


def _obstacle(source: Source, shape: tuple[int, int], rank: int | None) -> str | None:
    """Why nothing can be written in place of a weight, or None. rank: of x."""
    if 0 in shape:
        return "empty-weight"
    if source.element not in FLOATS:
        return "weight-type"
    if source.tensor.data_type not in FLOATS:
        return "quantized"
    if source.axes is None or (len(source.shape) > 2 and (rank is None or rank < len(source.shape))):
        return "reshaped-weight"
    return None


def _outdated(index: GraphIndex) -> str | None:
    """Operators from before opset 7 don't broadcast, and ONNX Runtime has only some of them."""
    return "old-opset" if opset(index.proto) < OLDEST_OPSET else None


def _is_transposed(source: Source, shape: tuple[int, int], turned: bool) -> bool:
    """Whether the stored tensor is [N, K]: by where the axes come from, or by shape where one has length one."""
    rows, columns = _sides(source, turned)
    if rows and columns:
        return rows[0] > columns[0]
    return tuple(source.tensor.dims)[-2:] != shape


def _sides(source: Source, turned: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of the stored tensor that make up the rows of W, and its columns."""
    if source.axes is None:
        return (), ()
    rows, columns = source.axes[-2:]
    return (columns, rows) if turned else (rows, columns)


def _bias(
    index: GraphIndex, position: int, node: onnx.NodeProto, n: int
) -> tuple[str | None, str, tuple[int, ...]]:
    """Bias, output and nodes of a product.

    The Add that follows a MatMul belongs to the site when nothing else sees the product.
    """
    product = node.output[0]
    if node.op_type == "Gemm":
        return node.input[2] if len(node.input) > 2 and node.input[2] else None, product, (position,)
    reader = index.sole_consumer(product)
    if reader is not None:
        add = index.node(reader)
        if is_standard(add, "Add") and add.input[0] != add.input[1]:
            other = add.input[1] if add.input[0] == product else add.input[0]
            source = index.resolve(other)
            rank = index.rank(product)
            fits = source is not None and (
                len(source.shape) <= 1 or (rank is not None and len(source.shape) <= rank)
            )
            if fits and bias_of(index.constants, other, n) is not None:
                return other, add.output[0], (position, reader)
    return None, product, (position,)


def _mark_shared(index: GraphIndex, sites: list[Site]) -> list[Site]:
    """Uses of one weight are rewritten together, or not at all: else the file would hold two versions of it."""
    uses: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        uses[site.weight].append(site)

    def use(site: Site) -> tuple[object, ...]:
        sides = None if site.source is None else _sides(site.source, site.turned)
        return site.matrix, site.shape, sides, site.dtype, site.transposed, site.alpha

    def alone(weight: str) -> bool:
        """All uses of a matrix are alike, and nothing else reads it: a table of embeddings, say.

        Of several parts, none is read twice, so that they take no more room than what is stored.
        """
        found = uses[weight]
        readers = {position for site in found for position in site.nodes}
        matrices = {site.matrix: site for site in found}
        alike = len({use(site) for site in found}) == len(matrices)
        same = len({site.obstacle for site in found}) == 1
        apart = len(matrices) == 1 or sum(prod(s.shape) for s in matrices.values()) <= prod(found[0].packed)
        return alike and same and apart and not _read_elsewhere(index, weight, readers)

    shared = {weight for weight in uses if not alone(weight)}
    return [
        replace(site, obstacle="shared-weight") if not site.obstacle and site.weight in shared else site
        for site in sites
    ]


def _read_elsewhere(index: GraphIndex, weight: str, readers: set[int]) -> bool:
    """Whether a stored tensor, or what is made of it on the way to an operator, is read by others than these."""
    pending, seen = [weight], {weight}
    while pending:
        name = pending.pop()
        if name in index.pinned_tensors:
            return True
        for position in index.consumers.get(name, []):
            made = {output for output in index.node(position).output if output in index.constants.sources}
            if not made and position not in readers:
                return True
            pending += sorted(made - seen)
            seen |= made
    return False


# Products that stay as they are

_WEIGHT_INPUTS = {
    "MatMulInteger": (1, "quantized"),
    "QLinearMatMul": (3, "quantized"),
    "DynamicQuantizeMatMul": (1, "quantized"),
    "MatMulIntegerToFloat": (1, "quantized"),
    "MatMulNBits": (1, "quantized"),
    "MatMulBnb4": (1, "quantized"),
    "QGemm": (3, "quantized"),
    "QAttention": (1, "quantized"),
    "PackedAttention": (1, "fused-attention"),
    "LongformerAttention": (1, "fused-attention"),
    "FusedMatMul": (1, "fused-operator"),
    "FusedGemm": (1, "fused-operator"),
    "Conv": (1, "convolution"),
}
"""Which input of an operator is the weight, and why the operator stays as it is."""


def _reason(index: GraphIndex, node: onnx.NodeProto) -> str:
    """Why a product of the main graph that is no site stays."""
    if not is_microsoft(node, "Attention"):
        return "weight-on-the-left"
    return attention_obstacle(node, index.constants, index.shapes.get, index.maker_of) or "fused-attention"


def _listed(
    node: onnx.NodeProto,
    constants: Constants,
    reason: str,
    graph: str = "main",
    nodes: tuple[int, ...] = (),
) -> Site | None:
    """A use of a constant matrix that can't be rewritten; None for anything else.

    reason: why products that could be rewritten elsewhere stay.
    """
    at, why = _WEIGHT_INPUTS.get(node.op_type, (1, reason))
    if is_standard(node, "MatMul", "Gemm"):
        sides = [name in constants.sources for name in node.input[:2]]
        if sides.count(True) != 1:
            return None
        at = sides.index(True)
    elif is_microsoft(node, "Attention"):
        at = 1  # the standard one has no weights
    elif node.op_type not in _WEIGHT_INPUTS or node.domain not in (*DEFAULT, DOMAIN):
        return None
    source = constants.sources.get(node.input[at]) if len(node.input) > at and node.output else None
    shape = None if source is None else _listed_shape(node, source, at)
    if source is None or shape is None:
        return None
    return Site(
        index=0,
        node=node.name,
        op=node.op_type,
        weight=source.name,
        shape=shape,
        dtype=np.dtype(onnx.helper.tensor_dtype_to_np_dtype(source.tensor.data_type)),
        graph=graph,
        input=node.input[1 if at == 0 else 0],
        output=node.output[0],
        nodes=nodes,
        transposed=False,
        obstacle=source.obstacle or why,
    )


def _listed_shape(node: onnx.NodeProto, source: Source, at: int) -> tuple[int, int] | None:
    """[K, N] of a weight that stays; None where it is no matrix."""
    if node.op_type in ("MatMulNBits", "MatMulBnb4"):
        return int(attribute(node, "K", 0)), int(attribute(node, "N", 0))
    if node.op_type == "Conv":
        return (source.shape[1], source.shape[0]) if is_pointwise(node, source) else None
    sides = matrix(source)
    flag = ("transA", "transB")[at] if at < 2 else ""
    turned = bool(flag and attribute(node, flag, 0)) ^ (at == 0)
    return sides if sides is None or not turned else (sides[1], sides[0])


MAX_LISTED = 100_000
"""Nodes of nested graphs and functions that are looked at: hostile files have any number."""


@dataclass
class _Inner:
    """Finds products in bodies of If, Loop and Scan, and in functions that stay: listed with the reason."""

    index: GraphIndex
    budget: int = MAX_LISTED
    functions: dict[tuple[str, str, str], onnx.FunctionProto] = field(init=False)

    def __post_init__(self) -> None:
        self.functions = functions_of(self.index.proto)

    def sites(
        self,
        node: onnx.NodeProto,
        constants: Constants,
        path: str = "",
        reason: str | None = None,
        depth: int = 0,
    ) -> Iterator[Site]:
        """Sites inside one node. constants: of the graph around it. path: to that graph. reason: of all in it."""
        function = self.functions.get((node.domain, node.op_type, node.overload))
        for name, graph in bodies(node):
            stored = {tensor.name: Source.of(tensor.name, tensor) for tensor in graph.initializer}
            known = ChainMap(stored, cast(dict[str, Source], constants.sources))
            where = f"{path}{path_of(node, name)}"
            yield from self._all(graph.node, known, where, reason or IN_BODY, depth + 1)
        if function is not None:
            given = zip(function.input, node.input, strict=False)
            bound = {name: constants.sources[by] for name, by in given if by in constants.sources}
            where = f"{path}function:{node.name}"
            yield from self._all(function.node, bound, where, reason or "function", depth + 1)

    def _all(
        self,
        nodes: Sequence[onnx.NodeProto],
        stored: MutableMapping[str, Source],
        path: str,
        reason: str,
        depth: int,
    ) -> Iterator[Site]:
        self.budget -= len(nodes)
        if self.budget < 0 or depth > MAX_DEPTH:
            return
        constants = Constants.of(nodes, stored, self.index.read)
        for node in nodes:
            site = _listed(node, constants, reason, path)
            if site is not None:
                yield site
            yield from self.sites(node, constants, f"{path}/", reason, depth)


# Canonical weights


def read_affine(index: GraphIndex, site: Site) -> Affine:
    """The canonical W [K, N] and b [N] of a site, alpha and beta folded in, in float32.

    Raises InputError where the weight holds NaN or infinity, also as float32.
    """
    assert site.source is not None
    array = np.asarray(site.source.array(index.read), np.float32)
    array = array.reshape(site.shape[::-1] if site.turned else site.shape)
    # What is mapped from a file stays so, unless it has to be turned or lies askew.
    weight = np.require(array.T if site.turned else array, requirements=["C", "A"])
    if site.alpha != 1.0:
        weight = weight * np.float32(site.alpha)
    if not np.isfinite(weight).all():
        raise InputError(
            f"{site.name}: weight {site.weight!r} holds NaN or infinity; export the model again from sound weights"
        )
    if site.bias is None:
        return Affine(weight, None)
    bias = bias_of(index.constants, site.bias, site.shape[1])
    if bias is None:
        return Affine(weight, None)
    scaled = bias.astype(np.float32) * np.float32(site.beta)
    if not np.isfinite(scaled).all():
        raise InputError(f"{site.name}: bias {site.bias!r} holds NaN or infinity; export the model again")
    return Affine(weight, scaled)
