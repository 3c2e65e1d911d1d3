"""Axes: what ties and what pins, operator by operator; and random graphs, where a free order changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnx_decomp.axes import AxisGroup, Builder, Region, find_regions
from onnx_decomp.passes.folding import compose, forms, partition
from onnx_decomp.passes.layouts import along
from onnx_decomp.passes.ridge import masked
from onnx_decomp.passes.splitting import emit
from onnx_decomp.probe import Probe
from onnx_decomp.program import Rewrite, Structure
from onnx_decomp.runtime import open_session
from onnx_decomp.sites import GraphIndex, find_sites, read_affine
from onnx_decomp.tracing import trace
from tests.small import value

Weights = dict[str, np.ndarray]
Link = tuple[list[onnx.NodeProto], Weights]

RNG = np.random.default_rng(0)
UNITS = 8
"""Columns of the first site of a small graph."""


def floats(*shape: int) -> np.ndarray:
    return RNG.uniform(0.5, 1.5, shape).astype(np.float32)


def whole(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def nodes_of(*lines: str, **attributes: Any) -> list[onnx.NodeProto]:
    """Nodes from lines like "Add h s -> a"; attributes are those of the nodes that know them."""
    made = []
    for line in lines:
        made_from, outputs = line.split(" -> ")
        op, *inputs = made_from.split()
        domain, _, op = op.rpartition(":")
        schema = None if domain else onnx.defs.get_schema(op, 17)
        known = {k: v for k, v in attributes.items() if schema is not None and k in schema.attributes}
        made.append(helper.make_node(op, inputs, outputs.split(), f"{op}/{outputs}", domain=domain, **known))
    return made


def between(link: Link, lead: Sequence[int | str], rows: int = UNITS, opset: int = 17) -> onnx.ModelProto:
    """x [*lead, 6] -> site -> h [*lead, UNITS] -> link -> a -> site -> y; the last site has `rows` rows."""
    nodes = [*nodes_of("MatMul x w1 -> h"), *link[0], *nodes_of("MatMul a w2 -> y")]
    weights = {"w1": floats(6, UNITS), "w2": floats(rows, 5)} | link[1]
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", [*lead, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        stored,
    )
    opsets = [
        helper.make_opsetid("", opset),
        helper.make_opsetid("com.microsoft", 1),
        helper.make_opsetid("own", 1),
    ]
    return helper.make_model(graph, ir_version=11 if opset > 21 else 8, opset_imports=opsets)


def summary(model: onnx.ModelProto) -> tuple[str | None, int, list[tuple[int, ...]]]:
    """Why the columns of the first site are pinned, how many units they are, and the sites of each region."""
    index = index_of(model)
    sites = find_sites(index)
    regions = find_regions(index, sites)
    columns = regions[0].groups[regions[0].ends[0][1]]
    return columns.pinned, columns.size, [tuple(site.index for site in region.sites) for region in regions]


TOGETHER, APART = [(0, 1)], [(0,), (1,)]
ROW, TOKENS, LOOSE = ["n"], [2, 3], ["n", "t"]
"""Leading axes of x: a batch; batch and tokens of told lengths; the same untold."""

FREE = (None, UNITS)
HEADS = (None, 2)

# fmt: off
LINKS: dict[str, tuple[Sequence[int | str], Link, tuple[str | None, int], list[tuple[int, ...]]]] = {
    "unary": (LOOSE, (nodes_of("Erf h -> e", "Abs e -> a"), {}), FREE, TOGETHER),
    "cast": (ROW, (nodes_of("Cast h -> c", to=11) + nodes_of("Cast c -> a", to=1), {}), FREE, TOGETHER),
    "clip": (ROW, (nodes_of("Clip h lo -> a"), {"lo": np.float32(0)}), FREE, TOGETHER),
    "a constant from the left": (LOOSE, (nodes_of("Sub s h -> a"), {"s": floats(UNITS)}), FREE, TOGETHER),
    "a constant from the right": (LOOSE, (nodes_of("Pow h s -> a"), {"s": floats(1, UNITS)}), FREE, TOGETHER),
    "values across tokens": (TOKENS, (nodes_of("Mul h s -> a"), {"s": floats(3, 1)}), FREE, TOGETHER),
    "a value for each token and unit": (TOKENS, (nodes_of("Mul h s -> a"), {"s": floats(3, UNITS)}), FREE, TOGETHER),
    "slopes": (LOOSE, (nodes_of("PRelu h s -> a"), {"s": floats(UNITS)}), FREE, TOGETHER),
    "where": (LOOSE, (nodes_of("Greater h s -> g", "Where g h s -> a"), {"s": floats(UNITS)}), FREE, TOGETHER),
    "swish": (LOOSE, (nodes_of("Sigmoid h -> g", "Mul h g -> a"), {}), FREE, TOGETHER),
    "quick gelu": (LOOSE, (nodes_of("com.microsoft:QuickGelu h -> a"), {}), FREE, TOGETHER),
    "layer norm": (LOOSE, (nodes_of("LayerNormalization h s s -> a"), {"s": floats(UNITS)}), FREE, APART),
    "norm in pieces": (LOOSE, (
        nodes_of("Mul h h -> q", "ReduceMean q -> m", "Sqrt m -> r", "Div h r -> d", "Mul s d -> a", axes=[-1]),
        {"s": floats(UNITS)}), FREE, APART),
    "batch norm": (ROW, (nodes_of("BatchNormalization h s s s s -> a"), {"s": floats(UNITS)}), FREE, TOGETHER),
    "batch norm of tokens": (TOKENS, (nodes_of("BatchNormalization h s s s s -> a"), {"s": floats(3)}), FREE, TOGETHER),
    "softmax": (LOOSE, (nodes_of("Softmax h -> a"), {}), FREE, APART),
    "softmax over tokens": (LOOSE, (nodes_of("Softmax h -> a", axis=1), {}), FREE, TOGETHER),
    "mean over units": (LOOSE, (nodes_of("ReduceMean h -> m", "Sub h m -> a", axes=[-1]), {}), FREE, APART),
    "mean over tokens": (LOOSE, (nodes_of("ReduceMean h -> a", axes=[1], keepdims=0), {}), FREE, TOGETHER),
    "sum over no axes": (ROW, (
        nodes_of("ReduceSum h none -> m", "Add h m -> a"), {"none": whole()}), ("operator:ReduceSum", UNITS), APART),
    "residual": (LOOSE, (nodes_of("Relu h -> r", "Add h r -> a"), {}), FREE, TOGETHER),
    "halves treated alike": (LOOSE, (
        nodes_of("Split h -> p q", "Mul p q -> m", "Concat m m -> a", axis=-1), {}), (None, 4), APART),
    "halves treated differently": (LOOSE, (
        nodes_of("Split h -> p q", "Tanh p -> t", "Concat t q -> a", axis=-1), {}), ("irregular", UNITS), APART),
    "unsqueeze and squeeze": (LOOSE, (
        nodes_of("Unsqueeze h one -> u", "Squeeze u one -> a"), {"one": whole(1)}), FREE, TOGETHER),
    "heads and back": (LOOSE, (
        nodes_of("Reshape h apart -> r", "Transpose r -> t", "Tanh t -> u", "Transpose u -> v", "Reshape v back -> a",
                 perm=[0, 2, 1, 3]),
        {"apart": whole(0, 0, 2, 4), "back": whole(0, 0, -1)}), HEADS, TOGETHER),
    "heads of told lengths": (TOKENS, (
        nodes_of("Reshape h apart -> r", "Transpose r -> t", "Transpose t -> v", "Reshape v back -> a",
                 perm=[0, 2, 1, 3]),
        {"apart": whole(2, 3, -1, 4), "back": whole(2, 3, 8)}), HEADS, TOGETHER),
    "heads of a computed shape": (LOOSE, (
        nodes_of("Reshape h apart -> r", "Shape h -> s", "Reshape r s -> a"), {"apart": whole(0, 0, 2, -1)}),
        HEADS, APART),
    "softmax over heads": (LOOSE, (
        nodes_of("Reshape h apart -> r", "Softmax r -> s", "Reshape s back -> a", axis=2),
        {"apart": whole(0, 0, 2, 4), "back": whole(0, 0, 8)}), HEADS, APART),
    "tokens and units in one": (LOOSE, (
        nodes_of("Transpose h -> t", "Transpose t -> u", "Reshape u rows -> a", perm=[1, 0, 2]),
        {"rows": whole(-1, 8)}), FREE, TOGETHER),
    "gather from units": (LOOSE, (
        nodes_of("Gather h turned -> a", axis=-1), {"turned": whole(*range(8))[::-1].copy()}),
        ("operator:Gather", UNITS), APART),
    "slice": (LOOSE, (
        nodes_of("Slice h from to last -> a"), {"from": whole(0), "to": whole(8), "last": whole(-1)}),
        ("operator:Slice", UNITS), APART),
    "recurrence": (TOKENS, (
        nodes_of("GRU h wx wh -> seq a0", "Squeeze a0 zero -> a", hidden_size=8),
        {"wx": floats(1, 24, 8), "wh": floats(1, 24, 8), "zero": whole(0)}), ("operator:GRU", UNITS), APART),
    "an operator of one's own": (LOOSE, (nodes_of("own:Thing h -> a"), {}), ("operator:Thing", UNITS), APART),
    "units and what is not known": (LOOSE, (
        nodes_of("own:Thing h2 -> o", "Add h o -> a"), {"h2": floats(UNITS)}), ("unknown", UNITS), APART),
    "a product with itself": (LOOSE, (
        nodes_of("Transpose h -> t", "MatMul t h -> a", perm=[0, 2, 1]), {}), ("graph-output", UNITS), APART),
    "tokens weighted": (TOKENS, (
        nodes_of("MatMul mix h -> a"), {"mix": floats(2, 3, 3)}), FREE, TOGETHER),
}
# fmt: on


@pytest.mark.parametrize("name", LINKS)
def test_what_ties_what_pins_and_what_ends_a_region(name: str) -> None:
    lead, link, units, regions = LINKS[name]
    assert summary(between(link, lead)) == (*units, regions)


def graph_of(
    nodes: list[onnx.NodeProto], weights: Weights, inputs: Sequence[onnx.ValueInfoProto], opset: int = 17
) -> onnx.ModelProto:
    """A graph whose output is y."""
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, stored)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", opset)])


def test_packed_attention_is_one_region_of_whole_heads() -> None:
    """Columns of one weight that are split in three are one unit where they meet: a head."""
    nodes = [
        *nodes_of("MatMul x w1 -> p", "Split p thirds -> q k v", axis=-1),
        *(node for name in "qkv" for node in nodes_of(f"Reshape {name} apart -> {name}h")),
        *nodes_of("Transpose qh -> qt", "Transpose vh -> vt", perm=[0, 2, 1, 3]),
        *nodes_of("Transpose kh -> kt", perm=[0, 2, 3, 1]),
        *nodes_of("MatMul qt kt -> s", "Softmax s -> e", "MatMul e vt -> o"),
        *nodes_of("Transpose o -> ot", "Reshape ot back -> a", "MatMul a w2 -> y", perm=[0, 2, 1, 3]),
    ]
    weights = {"w1": floats(6, 24), "w2": floats(8, 5), "thirds": whole(8, 8, 8)}
    weights |= {"apart": whole(0, 0, 2, 4), "back": whole(0, 0, 8)}
    index = index_of(graph_of(nodes, weights, [value("x", ["n", "t", 6])]))
    (region,) = find_regions(index, find_sites(index))
    assert (region.entries, region.exits, region.flat, region.elastic) == (("x",), ("y",), False, frozenset())
    assert (region.widths, [region.groups[g].pinned for g in region.order]) == (
        (6, 2, 5),
        ["graph-input", None, "graph-output"],
    )
    assert region.units[0][1].tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4


def test_a_packed_gate_is_elastic_for_no_one_but_free() -> None:
    nodes = nodes_of(
        "MatMul x w1 -> p", "Split p -> g u", "Sigmoid g -> s", "Mul s u -> a", "MatMul a w2 -> y", axis=-1
    )
    index = index_of(graph_of(nodes, {"w1": floats(6, 16), "w2": floats(8, 5)}, [value("x", ["n", 6])]))
    (region,) = find_regions(index, find_sites(index))
    assert (region.widths, region.groups[1].pinned, region.elastic) == ((6, 8, 5), None, frozenset())


def test_a_tied_table_carries_the_stream_and_stays() -> None:
    nodes = nodes_of(
        "Gather table tokens -> e", "MatMul e w -> h", "Add e h -> s", "LayerNormalization s g -> n"
    ) + nodes_of("Transpose table -> t", "MatMul n t -> y", perm=[1, 0])
    weights = {"table": floats(9, 8), "w": floats(8, 8), "g": floats(8)}
    index = index_of(graph_of(nodes, weights, [value("tokens", ["n", "t"], TensorProto.INT64)]))
    assert [site.obstacle for site in find_sites(index)] == [None, "shared-weight"]
    (stream,) = groups_of(index)
    assert (stream.pinned, stream.writers, stream.readers) == (None, (0,), (0,))
    held = {(carrier.tensor, carrier.axis) for carrier in stream.stored}
    assert held == {("table", -1), ("w", -1), ("w", -2), ("g", -1)}


def test_a_norm_of_opset_23_ends_a_region_and_stays_free() -> None:
    made = helper.make_node("RMSNormalization", ["h", "s"], ["a"])
    model = between(([made], {"s": floats(UNITS)}), LOOSE, opset=23)
    assert summary(model) == (None, UNITS, APART)


def test_what_a_nested_graph_reads_is_pinned() -> None:
    branch = helper.make_graph(
        nodes_of("Relu h -> inner"),
        "b",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    nodes = [
        *nodes_of("Greater one zero -> c"),
        helper.make_node("If", ["c"], ["o"], then_branch=branch, else_branch=branch),
    ]
    model = between(([*nodes, *nodes_of("Relu h -> a")], {"one": floats(1), "zero": floats(1)}), ROW)
    assert summary(model) == ("nested-graph", UNITS, TOGETHER)


def test_readers_of_one_tensor_share_its_units_even_untold() -> None:
    """Two sites that read a tensor whose length only their weights tell."""
    nodes = nodes_of("own:Thing x -> h", "MatMul h w1 -> p", "MatMul h w2 -> q", "Add p q -> y")
    model = graph_of(nodes, {"w1": floats(8, 4), "w2": floats(8, 4)}, [value("x", ["n", 6])])
    model.opset_import.append(helper.make_opsetid("own", 1))
    index = index_of(model)
    regions = find_regions(index, find_sites(index))
    assert [region.ends for region in regions] == [((0, 1),), ((0, 1),)]
    assert regions[0].groups[0].pinned == "unknown"


def test_a_gate_of_width_one_belongs_to_no_block() -> None:
    nodes = nodes_of("MatMul x w1 -> h", "MatMul h wg -> g", "Mul h g -> a", "MatMul a w2 -> y")
    weights = {"w1": floats(6, 8), "wg": floats(8, 1), "w2": floats(8, 5)}
    index = index_of(graph_of(nodes, weights, [value("x", ["n", 6])]))
    first, last = find_regions(index, find_sites(index))
    assert ([site.weight for site in first.sites], first.exits) == (["w1", "wg"], ("h", "g"))
    assert [site.weight for site in last.sites] == ["w2"]
    assert first.ends[1][1] not in first.ends[0], "a group of its own"


OPSET = 17
B, T, D = 2, 3, 8
"""Samples, tokens, and the width that most tensors have. Heads are two of four."""

Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    """As it is at run time; the last axis is that of the units."""


@dataclass
class Stack:
    """A random graph in the making: a list of live tensors, and operators that each read some of them.

    told: which axes the graph's inputs and shapes tell: "all", "units" (the last ones alone), or "none" (not even
    their number).
    """

    rank: int
    told: str
    seed: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    live: list[Tensor] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    feeds: Feeds = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        lead = (5,) if self.rank == 2 else (B, T)
        told: list[int | str] = list(lead) if self.told == "all" else ["n", "t"][: len(lead)]
        x = self.rng.standard_normal((*lead, D)).astype(np.float32)
        tokens = self.rng.integers(0, 9, lead)
        self.inputs = [value("x", [*told, D]), value("tokens", told, TensorProto.INT64)]
        self.feeds = {"x": x, "tokens": tokens}
        table = self.store(self.rng.standard_normal((9, D)) * 0.5)
        source = Tensor("x", x.shape)
        if self.told == "none":  # an operator that inference does not know
            source = self.node("QuickGelu", [source], x.shape, domain="com.microsoft")
            source = self.node("Trilu", [source, self.store(np.array(-99))], x.shape, domain="com.microsoft")
        first = self.site(source, D)
        looked = self.node("Gather", [table, "tokens"], (*lead, D), axis=0)
        self.live = [looked, first]

    # Parts

    def store(self, array: Any) -> str:
        array = np.asarray(array)
        name = f"c{len(self.weights)}"
        self.weights[name] = array.astype(np.float32) if array.dtype == np.float64 else array
        return name

    def drawn(self, *shape: int) -> str:
        """A constant away from zero."""
        return self.store(self.rng.uniform(0.5, 1.5, shape))

    def node(self, op: str, inputs: Sequence[Any], shape: Sequence[int], **attributes: Any) -> Tensor:
        made = f"t{len(self.nodes)}"
        names = [item.name if isinstance(item, Tensor) else item for item in inputs]
        self.nodes.append(helper.make_node(op, names, [made], name=f"{op}_{len(self.nodes)}", **attributes))
        return Tensor(made, tuple(shape))

    def reshape(self, x: Tensor, told: Sequence[int], shape: Sequence[int]) -> Tensor:
        return self.node("Reshape", [x, self.store(np.array(told, np.int64))], shape)

    def site(self, x: Tensor, width: int, how: int = 0, weight: str | None = None) -> Tensor:
        shape = (*x.shape[:-1], width)
        K = x.shape[-1]
        how = how % 4
        if weight is None:
            array = self.rng.standard_normal((K, width)) / np.sqrt(K)
            weight = self.store(array.T if how == 1 or (how == 2 and len(shape) == 2) else array)
        if how == 1:
            weight = self.node("Transpose", [weight], (K, width), perm=[1, 0]).name
        if how == 2 and len(shape) == 2:
            bias = self.drawn(*((1, width) if width % 3 else (width,)))
            return self.node("Gemm", [x, weight, bias], shape, transB=1, alpha=0.5)
        made = self.node("MatMul", [x, weight], shape)
        return made if how == 3 else self.node("Add", [made, self.drawn(width)], shape)

    # Operators

    def take(self, pick: int) -> Tensor:
        return self.live[-1 - pick % len(self.live)]

    def like(self, x: Tensor, pick: int) -> Tensor:
        """A live tensor of the same shape."""
        same = [other for other in self.live if other.shape == x.shape]
        return same[-1 - pick % len(same)]

    def step(self, op: str, pick: int, how: int) -> None:
        x = self.take(pick)
        made = getattr(self, f"op_{op}")(x, how)
        if made is None:
            return
        for each in made if isinstance(made, list) else [made]:
            if 0 < np.prod(each.shape) <= 4096:
                self.live.append(each)

    def op_site(self, x: Tensor, how: int) -> Tensor:
        return self.site(x, (D, D, 4, 12)[how % 4], how // 4)

    def op_again(self, x: Tensor, how: int) -> Tensor | None:
        """A weight that is stored already."""
        K = x.shape[-1]
        fitting = [
            n for n, a in self.weights.items() if a.ndim == 2 and a.shape[0] == K and a.dtype.kind == "f"
        ]
        if not fitting:
            return None
        weight = fitting[how % len(fitting)]
        return self.site(x, self.weights[weight].shape[1], 3, weight)

    def op_unary(self, x: Tensor, how: int) -> Tensor:
        op = ("Relu", "Tanh", "Sigmoid", "Neg", "LeakyRelu", "Erf", "Abs", "Identity")[how % 8]
        return self.node(op, [x], x.shape)

    def op_clip(self, x: Tensor, how: int) -> Tensor:
        low = self.store(np.float32(-0.5)) if how % 2 else ""
        return self.node("Clip", [x, low, self.store(np.float32(1.0))], x.shape)

    def op_cast(self, x: Tensor, _how: int) -> Tensor:
        wide = self.node("Cast", [x], x.shape, to=TensorProto.DOUBLE)
        return self.node("Cast", [wide], x.shape, to=TensorProto.FLOAT)

    def op_constant(self, x: Tensor, how: int) -> Tensor:
        """With a constant on either side, of any shape that broadcasts."""
        n = x.shape[-1]
        shapes = [(n,), (1, n), (), (1,) * len(x.shape), (1,) * (len(x.shape) - 1) + (n,), (x.shape[-2], n)]
        shapes += [(x.shape[-2], 1), (*x.shape[-2:],)]
        constant = self.drawn(*shapes[how % 8])
        op = ("Add", "Mul", "Sub", "Max", "PRelu")[how // 8 % 5]
        pair = [constant, x] if how // 40 % 2 and op != "PRelu" else [x, constant]
        return self.node(op, pair, x.shape)

    def op_pair(self, x: Tensor, how: int) -> Tensor:
        other = self.like(x, how // 4)
        return self.node(("Add", "Mul", "Sub", "Min")[how % 4], [x, other], x.shape)

    def op_where(self, x: Tensor, how: int) -> Tensor:
        other = self.like(x, how)
        larger = self.node("Greater", [x, other], x.shape)
        return self.node("Where", [larger, x, other], x.shape)

    def op_norm(self, x: Tensor, how: int) -> Tensor:
        n = x.shape[-1]
        if how % 3 == 0:
            return self.node("LayerNormalization", [x, self.drawn(n), self.drawn(n)], x.shape, axis=-1)
        square = self.node("Mul", [x, x], x.shape)
        mean = self.node("ReduceMean", [square], (*x.shape[:-1], 1), axes=[-1])
        root = self.node(
            "Sqrt", [self.node("Add", [mean, self.store(np.float32(0.1))], mean.shape)], mean.shape
        )
        made = self.node("Div", [x, root], x.shape)
        return self.node("Mul", [self.drawn(n), made], x.shape) if how % 3 == 1 else made

    def op_wide_norm(self, x: Tensor, _how: int) -> Tensor | None:
        """Over the last two axes."""
        if len(x.shape) < 3:
            return None
        return self.node("LayerNormalization", [x, self.drawn(*x.shape[-2:])], x.shape, axis=-2)

    def op_batch_norm(self, x: Tensor, _how: int) -> Tensor:
        n = x.shape[1]
        return self.node("BatchNormalization", [x, *(self.drawn(n) for _ in range(4))], x.shape)

    def op_softmax(self, x: Tensor, how: int) -> Tensor:
        return self.node("Softmax", [x], x.shape, axis=(-1, -2, len(x.shape) - 1, 1)[how % 4])

    def op_reduce(self, x: Tensor, how: int) -> Tensor:
        """Over one axis, broadcast back."""
        axis = (-1, -2, 1)[how % 3]
        shape = list(x.shape)
        shape[axis] = 1
        if how // 3 % 2:
            reduced = self.node("ReduceSum", [x, self.store(np.array([axis], np.int64))], shape)
        else:
            reduced = self.node("ReduceMean", [x], shape, axes=[axis])
        return self.node(("Sub", "Mul")[how // 6 % 2], [x, reduced], x.shape)

    def op_pool(self, x: Tensor, how: int) -> Tensor | None:
        """Over one axis, which is gone then."""
        if len(x.shape) < 3:
            return None
        axis = (-2, 1, -1)[how % 3]
        shape = list(x.shape)
        del shape[axis]
        return self.node("ReduceMean", [x], shape, axes=[axis], keepdims=0)

    def op_split(self, x: Tensor, how: int) -> list[Tensor] | None:
        n = x.shape[-1]
        sizes = ([n // 2, n - n // 2], [n // 4, n - n // 4], [n // 4, n // 2, n - n // 4 - n // 2])[how % 3]
        if 0 in sizes:
            return None
        made = [f"t{len(self.nodes)}.{at}" for at in range(len(sizes))]
        axis = -1 if how // 3 % 2 else len(x.shape) - 1
        inputs = [x.name, self.store(np.array(sizes, np.int64))]
        self.nodes.append(helper.make_node("Split", inputs, made, name=f"Split_{len(self.nodes)}", axis=axis))
        return [Tensor(name, (*x.shape[:-1], size)) for name, size in zip(made, sizes, strict=True)]

    def op_concat(self, x: Tensor, how: int) -> Tensor:
        fitting = [other for other in self.live if other.shape[:-1] == x.shape[:-1]]
        other = fitting[-1 - how // 2 % len(fitting)]
        pair = [x, other] if how % 2 else [other, x]
        return self.node("Concat", pair, (*x.shape[:-1], x.shape[-1] + other.shape[-1]), axis=-1)

    def op_cut(self, x: Tensor, how: int) -> Tensor | None:
        """Parts that are treated differently, and joined again."""
        parts = self.op_split(x, how)
        if parts is None:
            return None
        parts[how // 3 % 2] = self.node("Tanh", [parts[how // 3 % 2]], parts[how // 3 % 2].shape)
        parts = parts[:: 1 if how // 6 % 2 else -1]
        return self.node("Concat", parts, x.shape, axis=-1)

    def op_one(self, x: Tensor, how: int) -> Tensor:
        """A gate of width one, or a site that reads one value."""
        gate = self.node("Sigmoid", [self.site(x, 1, how)], (*x.shape[:-1], 1))
        return self.site(gate, D) if how // 4 % 2 else self.node("Mul", [x, gate], x.shape)

    def op_broad(self, x: Tensor, how: int) -> Tensor | None:
        """What a mean over an axis makes, added everywhere."""
        if len(x.shape) < 3:
            return None
        axis = 1 if how % 3 else 0
        shape = tuple(1 if at == axis else size for at, size in enumerate(x.shape))
        mean = self.node("ReduceMean", [x], shape, axes=[axis])
        other = self.site(self.like(x, how // 6), x.shape[-1], 3) if how // 3 % 2 else self.like(x, how // 6)
        return self.node("Add", [self.site(mean, x.shape[-1], 0), other], x.shape)

    def op_packed(self, x: Tensor, how: int) -> Tensor:
        """One weight for two branches, one of them the gate of the other; or for three that are added."""
        count = 2 + how % 2
        parts = self.op_parts(self.site(x, count * D, how // 2), count)
        gate = self.node("Sigmoid", parts[:1], parts[0].shape)
        made = self.node("Mul", [gate, parts[1]], gate.shape)
        return self.node("Add", [made, parts[2]], gate.shape) if count == 3 else made

    def op_parts(self, x: Tensor, count: int) -> list[Tensor]:
        count = 2 + count % 2
        n = x.shape[-1] // count
        made = [f"t{len(self.nodes)}.{at}" for at in range(count)]
        extra = (
            []
            if x.shape[-1] % count == 0
            else [self.store(np.array([n] * (count - 1) + [x.shape[-1] - n * (count - 1)]))]
        )
        self.nodes.append(
            helper.make_node("Split", [x.name, *extra], made, name=f"Split_{len(self.nodes)}", axis=-1)
        )
        widths = [n] * (count - 1) + [x.shape[-1] - n * (count - 1)]
        return [Tensor(name, (*x.shape[:-1], w)) for name, w in zip(made, widths, strict=True)]

    def heads(self, x: Tensor, how: int) -> Tensor:
        """[B, T, n] -> [B, heads, T, n / heads]."""
        lead, n = x.shape[:-1], x.shape[-1]
        zeros = [0] * len(lead)
        told = ([*zeros, 2, n // 2], [*zeros, -1, n // 2], [*zeros, 2, -1], [*lead, 2, n // 2])[how % 4]
        apart = self.reshape(x, told, (*lead, 2, n // 2))
        if len(lead) == 1:
            return apart
        return self.node("Transpose", [apart], (lead[0], 2, lead[1], n // 2), perm=[0, 2, 1, 3])

    def merged(self, x: Tensor, how: int) -> Tensor:
        if len(x.shape) == 4:
            b, h, t, d = x.shape
            x = self.node("Transpose", [x], (b, t, h, d), perm=[0, 2, 1, 3])
        *lead, h, d = x.shape
        told = ([*[0] * len(lead), h * d], [*[0] * len(lead), -1], [*lead, h * d])[how % 3]
        return self.reshape(x, told, (*lead, h * d))

    def op_heads(self, x: Tensor, how: int) -> Tensor | None:
        """Into heads, an operator that works on heads, and back."""
        if x.shape[-1] % 2 or len(x.shape) > 3:
            return None
        apart = self.heads(x, how)
        within = ("Tanh", "Softmax", "Mul", "swap", "sum")[how // 4 % 5]
        if within == "Softmax":
            apart = self.node("Softmax", [apart], apart.shape, axis=(-1, 1)[how // 20 % 2])
        elif within == "Mul":
            inner = [(apart.shape[-1],), (2, *(1,) * (len(apart.shape) - 2)), (1,)][how // 20 % 3]
            apart = self.node("Mul", [apart, self.drawn(*inner)], apart.shape)
        elif within == "swap" and len(apart.shape) == 4:  # position within the head first
            b, h, t, d = apart.shape
            turned = self.node("Transpose", [apart], (b, t, d, h), perm=[0, 2, 3, 1])
            return self.reshape(turned, [0, 0, h * d], (b, t, h * d))
        elif within == "sum":
            shape = list(apart.shape)
            axis = -1 if len(shape) == 4 and how // 20 % 2 else 1
            shape[axis] = 1
            mean = self.node("ReduceMean", [apart], shape, axes=[axis])
            apart = self.node("Sub", [apart, mean], apart.shape)
        else:
            apart = self.node("Tanh", [apart], apart.shape)
        return self.merged(apart, how // 4)

    def op_attention(self, x: Tensor, how: int) -> Tensor | None:
        if len(x.shape) != 3:
            return None
        if how % 2:
            q, k, v = self.op_parts(self.site(x, 3 * D), 3)
        else:
            q, k, v = (self.site(x, D) for _ in range(3))
        q, k, v = (self.heads(each, how // 2) for each in (q, k, v))
        b, h, t, d = k.shape
        scores = self.node(
            "MatMul", [q, self.node("Transpose", [k], (b, h, d, t), perm=[0, 1, 3, 2])], (b, h, t, t)
        )
        if how // 8 % 2:
            scores = self.node("Add", [scores, self.store(np.triu(np.full((t, t), -3.0), 1))], scores.shape)
        if how // 16 % 2:
            scores = self.node("Mul", [scores, self.drawn(h, 1, 1)], scores.shape)
        shares = self.node("Softmax", [scores], scores.shape, axis=-1)
        return self.merged(self.node("MatMul", [shares, v], v.shape), how)

    def op_gram(self, x: Tensor, how: int) -> Tensor | None:
        """A product of two tensors, on the tokens or on the units."""
        if len(x.shape) != 3:
            return None
        other = self.like(x, how // 2)
        b, t, n = x.shape
        turned = self.node("Transpose", [other], (b, n, t), perm=[0, 2, 1])
        if how % 2:
            return self.node("MatMul", [x, turned], (b, t, t))
        return self.node("MatMul", [turned, x], (b, n, n))

    def op_turn(self, x: Tensor, _how: int) -> Tensor | None:
        if len(x.shape) != 3:
            return None
        b, t, n = x.shape
        return self.node("Transpose", [x], (b, n, t), perm=[0, 2, 1])

    def op_flatten(self, x: Tensor, how: int) -> Tensor | None:
        if len(x.shape) != 3:
            return None
        b, t, n = x.shape
        if how % 4 == 0:
            return self.node("Flatten", [x], (b, t * n), axis=1)
        if how % 4 == 1:
            return self.reshape(x, [0, -1], (b, t * n)) if self.told == "all" else None
        if how % 4 == 2:
            return self.reshape(x, [-1, n], (b * t, n))
        rows = self.reshape(x, [-1, n], (b * t, n))
        return self.reshape(self.site(rows, n), [-1, T, n] if t == T else [b, t, n], (b, t, n))

    def op_squeeze(self, x: Tensor, how: int) -> Tensor:
        axis = (1, -1, len(x.shape) - 1, 0)[how % 4]
        at = axis if axis >= 0 else axis + len(x.shape) + 1
        chosen = self.store(np.array([axis], np.int64))
        apart = self.node("Unsqueeze", [x, chosen], (*x.shape[:at], 1, *x.shape[at:]))
        apart = self.node("Tanh", [apart], apart.shape)
        return self.node("Squeeze", [apart, chosen], x.shape)

    def op_chosen(self, x: Tensor, how: int) -> Tensor:
        """Some positions, by a constant."""
        n = x.shape[-1]
        if how % 3 == 0:
            order = self.rng.permutation(n)
            return self.node("Gather", [x, self.store(order)], x.shape, axis=-1)
        if how % 3 == 1:
            first = self.store(np.array(0))
            return (
                self.node("Gather", [x, first], (x.shape[0], *x.shape[2:]), axis=1)
                if len(x.shape) == 3
                else x
            )
        bounds = [self.store(np.array([at], np.int64)) for at in (0, n // 2, -1)]
        return self.node("Slice", [x, *bounds], (*x.shape[:-1], n // 2))

    def op_shape(self, x: Tensor, how: int) -> Tensor:
        """Reshaped by a shape that is computed."""
        shape = self.node("Shape", [x], (len(x.shape),))
        if how % 2 or x.shape[-1] % 2:
            return self.node("Reshape", [self.node("Neg", [x], x.shape), shape], x.shape)
        bounds = [self.store(np.array([at], np.int64)) for at in (0, -1)]
        lead = self.node("Slice", [shape, *bounds], (len(x.shape) - 1,))
        told = self.node(
            "Concat", [lead, self.store(np.array([2, x.shape[-1] // 2]))], (len(x.shape) + 1,), axis=0
        )
        apart = self.node("Reshape", [x, told], (*x.shape[:-1], 2, x.shape[-1] // 2))
        apart = self.node("Tanh", [apart], apart.shape)
        return self.node("Reshape", [apart, shape], x.shape)

    def op_head(self, x: Tensor, _how: int) -> Tensor | None:
        """The embedding once more, transposed: logits."""
        table = self.weights["c0"]
        if x.shape[-1] != table.shape[1]:
            return None
        turned = self.node("Transpose", ["c0"], table.shape[::-1], perm=[1, 0])
        return self.node("MatMul", [x, turned], (*x.shape[:-1], table.shape[0]))

    def model(self, exported: int) -> onnx.ModelProto:
        """All live tensors that nothing reads go through sites and into one output each."""
        read = {name for node in self.nodes for name in node.input}
        loose = [each for each in self.live if each.name not in read][-3:]
        ends = [self.site(each, 5) for each in loose]
        if exported:
            ends.append(self.take(exported))
        outputs = [value(each.name, [None] * len(each.shape)) for each in dict.fromkeys(ends)]
        stored = [numpy_helper.from_array(array, name) for name, array in self.weights.items()]
        graph = helper.make_graph(self.nodes, "g", self.inputs, outputs, stored)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, ir_version=8, opset_imports=opsets)


OPS = sorted(name.removeprefix("op_") for name in dir(Stack) if name.startswith("op_"))
STEPS = st.lists(
    st.tuples(st.sampled_from(OPS), st.integers(0, 5), st.integers(0, 119)), min_size=1, max_size=10
)
FORMS = st.tuples(st.sampled_from([2, 3]), st.sampled_from(["all", "units", "none"]), st.integers(0, 999))


def random_graph(
    form: tuple[int, str, int], steps: Sequence[tuple[str, int, int]], exported: int
) -> tuple[onnx.ModelProto, Feeds]:
    stack = Stack(*form)
    for op, pick, how in steps:
        stack.step(op, pick, how)
    return stack.model(exported), stack.feeds


def index_of(model: onnx.ModelProto) -> GraphIndex:
    return GraphIndex.build(model, numpy_helper.to_array)


def groups_of(index: GraphIndex) -> list[AxisGroup]:
    usable = [site for site in find_sites(index) if site.obstacle is None]
    return list(Builder(index, usable, trace(index)).groups.values()) if usable else []


def reordered(index: GraphIndex, groups: Sequence[AxisGroup], rng: np.random.Generator) -> onnx.ModelProto:
    """The model with the units of some groups in a random order, in every constant that carries them."""
    arrays: dict[str, np.ndarray] = {}
    for group in groups:
        order = rng.permutation(group.size)
        for carrier in group.stored:
            array = arrays.setdefault(carrier.tensor, numpy_helper.to_array(index.stored[carrier.tensor]))
            arrays[carrier.tensor] = np.take(array, along(carrier.units, order), axis=carrier.axis)
    model = onnx.ModelProto()
    model.CopyFrom(index.proto)
    for tensor in model.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(arrays[tensor.name]), tensor.name))
    return model


def agree(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert found[name].shape == wanted.shape, name
        error = np.linalg.norm(found[name].astype(np.float64) - wanted)
        assert error <= 1e-4 * np.linalg.norm(wanted.astype(np.float64)) + 1e-6, name


@settings(max_examples=600, deadline=None)
@given(form=FORMS, steps=STEPS, exported=st.integers(0, 5))
def test_the_order_of_a_free_group_changes_nothing(
    form: tuple[int, str, int], steps: list[tuple[str, int, int]], exported: int
) -> None:
    model, feeds = random_graph(form, steps, exported)
    index = index_of(model)
    free = [group for group in groups_of(index) if group.pinned is None and group.size > 1]
    expected = open_session(model).run(feeds)
    agree(open_session(reordered(index, free, np.random.default_rng(form[2]))).run(feeds), expected)


def test_a_norm_may_scale_each_token_and_unit() -> None:
    nodes = [
        *nodes_of("Transpose x -> t", "MatMul t w1 -> m", "Transpose m -> h", perm=[0, 2, 1]),
        *nodes_of("LayerNormalization h s -> n", "MatMul n w2 -> o", axis=-1),
        *nodes_of("Transpose o -> u", "MatMul u w3 -> y", perm=[0, 2, 1]),
    ]
    weights = {"w1": floats(3, 4), "s": floats(4, 6), "w2": floats(6, 5), "w3": floats(4, 2)}
    model = graph_of(nodes, weights, [value("x", [2, 3, 6])])
    index, feeds = index_of(model), {"x": floats(2, 3, 6)}
    free = [group for group in groups_of(index) if group.pinned is None]
    assert [group.size for group in free] == [4]
    changed = reordered(index, free, np.random.default_rng(0))
    agree(open_session(changed).run(feeds), open_session(model).run(feeds))


def test_sites_of_two_types_in_one_region_keep_their_own() -> None:
    half = {"w2": floats(UNITS, 5).astype(np.float16)}
    link = nodes_of("Cast h -> a", to=TensorProto.FLOAT16)
    model = between((link, half), ROW)
    model.graph.output[0].CopyFrom(value("y", ["n", 5], TensorProto.FLOAT16))
    index = index_of(model)
    (region,) = find_regions(index, find_sites(index))
    drawn = (random_rewrite(index, region, np.random.default_rng(seed)) for seed in range(20))
    rewrite = next(each for each in drawn if each is not None and len(each.segments) == 1)
    written = emit(index, [rewrite], OPSET)
    onnx.checker.check_model(written, full_check=True)
    assert open_session(written).run({"x": floats(5, 6)})["y"].dtype == np.float16


def random_rewrite(index: GraphIndex, region: Region, rng: np.random.Generator) -> Rewrite | None:
    """Random blocks over some of a region's sites, none without a unit of each of their groups."""
    blocks = int(rng.integers(2, 4))
    wide = [at for at, ends in enumerate(region.ends) if min(region.groups[g].size for g in ends) >= blocks]
    chosen = tuple(at for at in wide if rng.random() < 0.7)
    if not chosen:
        return None
    labels = {}
    for group in dict.fromkeys(group for at in chosen for group in region.ends[at]):
        size = region.groups[group].size
        some = np.concatenate([np.arange(blocks), rng.integers(0, blocks, size - blocks)])
        labels[group] = rng.permutation(some).astype(np.int32)
    for at in chosen:
        for group, units in zip(region.ends[at], region.units[at], strict=True):
            if len(np.unique(labels[group][units])) < blocks:
                return None
    segments = compose(region, [Structure(chosen, labels, blocks, "exact", 0.0, 1.0)])
    shaped = []
    for segment in segments:
        known = list(forms(region, segment))
        shaped.append(replace(segment, form=known[int(rng.integers(len(known)))]))
    affine = [
        masked(read_affine(index, site), rows, columns)
        for site, (rows, columns) in zip(region.sites, partition(region, shaped), strict=True)
    ]
    return Rewrite(region, tuple(shaped), tuple(affine), "split", "applied")


@settings(max_examples=500, deadline=None)
@given(form=FORMS, steps=STEPS, exported=st.integers(0, 5), draw=st.integers(0, 999))
def test_what_is_written_equals_the_masked_graph(
    form: tuple[int, str, int], steps: list[tuple[str, int, int]], exported: int, draw: int
) -> None:
    model, feeds = random_graph(form, steps, exported)
    index, rng = index_of(model), np.random.default_rng(draw)
    regions = find_regions(index, find_sites(index))
    drawn = [random_rewrite(index, region, rng) for region in regions]
    rewrites = [rewrite for rewrite in drawn if rewrite is not None and rng.random() < 0.8]
    if not rewrites:
        return
    sites = [site for region in regions for site in region.sites]
    placed = {
        site.index: affine
        for rewrite in rewrites
        for site, affine in zip(rewrite.region.sites, rewrite.affine, strict=True)
    }
    expected = Probe(index, sites, None).run(feeds, placed)
    written = emit(index, rewrites, OPSET, ("cpu", "cuda")[draw % 2])  # type: ignore[arg-type]
    onnx.checker.check_model(written, full_check=True)
    agree(open_session(written).run(feeds), expected)
