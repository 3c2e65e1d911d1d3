"""Narrower heads: the algebra, where it applies, and what is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from models.networks import build, calibration, random_spec
from onnx_decomp.axes import Region, find_regions
from onnx_decomp.compiler import decompose
from onnx_decomp.frontiers import frontier
from onnx_decomp.options import Options
from onnx_decomp.passes.compensation import masked
from onnx_decomp.passes.folding import compose, partition
from onnx_decomp.passes.heads import Turn, directions, turned_maps
from onnx_decomp.passes.splitting import emit
from onnx_decomp.probe import Probe
from onnx_decomp.program import Rewrite, Structure
from onnx_decomp.runtime import open_session
from onnx_decomp.sites import GraphIndex, find_sites, read_affine
from tests.disguise import FUSED, disguised, fused
from tests.test_golden import check
from tests.test_whole_networks import true_structures

Array = NDArray[Any]

TOKENS, WIDTH, HEADS, SIZE = 6, 24, 3, 8

FORMS_OF_NETWORKS = ("plain", "any", "old", *FUSED)


@dataclass(frozen=True)
class Attention:
    """One attention layer over x [batch, 6, 24]. rank: of queries times keys, and of values times the projection.

    between: what is done to queries (and to keys) after heads were taken apart. reads: what the outside reads, too.
    """

    rank: int = SIZE
    bias: bool = True
    opset: int = 17
    dtype: Any = np.float32
    causal: bool = False
    cross: bool = False
    between: str = "scale"
    reads: str | None = None
    values_transposed: bool = False
    shared: bool = False
    seed: int = 0
    rebased: bool = False

    def __str__(self) -> str:
        plain = Attention()
        return ",".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(plain, k)) or "plain"

    @property
    def weights(self) -> dict[str, Array]:
        rng = np.random.default_rng(self.seed)
        made = {name: rng.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH) for name in ("q", "k", "v", "o")}
        thin = rng.standard_normal((HEADS, WIDTH, self.rank)) @ rng.standard_normal((HEADS, self.rank, SIZE))
        made["k"] = thin.transpose(1, 0, 2).reshape(WIDTH, WIDTH) / self.rank
        made["q"] *= 2.0
        low = rng.standard_normal((HEADS, SIZE, self.rank)) @ rng.standard_normal((HEADS, self.rank, WIDTH))
        made["o"] = low.reshape(WIDTH, WIDTH) / self.rank
        made |= {f"b{name}": rng.standard_normal(WIDTH) for name in ("q", "k", "v", "o")}
        if self.rebased:
            _rebase(made)
        return {name: array.astype(self.dtype) for name, array in made.items()}

    def model(self) -> onnx.ModelProto:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        build = _Build(self, [], {})
        names = ["x", "z"] if self.cross else ["x"]
        outputs = ["y"] + ([self.reads] if self.reads else [])
        build.write()
        graph = helper.make_graph(
            build.nodes,
            "attention",
            [helper.make_tensor_value_info(name, kind, ["batch", TOKENS, WIDTH]) for name in names],
            [
                helper.make_tensor_value_info(name, kind, [None] * (3 if name in ("y", "joined") else 4))
                for name in outputs
            ],
            [numpy_helper.from_array(array, name) for name, array in build.stored.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)

    def feeds(self, count: int, seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        names = ["x", "z"] if self.cross else ["x"]
        return {name: rng.standard_normal((count, TOKENS, WIDTH)).astype(self.dtype) for name in names}


def _rebase(weights: dict[str, Array]) -> None:
    """Every head in other bases, with the same scores and the same outputs."""
    rng = np.random.default_rng(7)
    for first, second, name in (("q", "k", "scores"), ("v", "o", "values")):
        for head in range(HEADS):
            at = slice(head * SIZE, (head + 1) * SIZE)
            turned = np.linalg.qr(rng.standard_normal((2, SIZE, SIZE)))[0]
            change = turned[0] * rng.uniform(0.5, 2, SIZE) @ turned[1]
            back = np.linalg.inv(change)
            for each in (first, f"b{first}"):
                weights[each][..., at] = weights[each][..., at] @ change
            if name == "scores":
                for each in (second, f"b{second}"):
                    weights[each][..., at] = weights[each][..., at] @ back.T
            else:
                weights[second][at] = back @ weights[second][at]


@dataclass
class _Build:
    spec: Attention
    nodes: list[onnx.NodeProto]
    stored: dict[str, Array]

    def add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], f"node_{output}", **attributes))
        return output

    def store(self, name: str, array: Array) -> str:
        self.stored[name] = array
        return name

    def linear(self, name: str, x: str, output: str) -> str:
        weights = self.spec.weights
        source = "k" if self.spec.shared and name == "q" else name
        weight = self.store(f"W{source}", weights[source])
        if not self.spec.bias:
            return self.add("MatMul", [x, weight], output)
        product = self.add("MatMul", [x, weight], f"{output}.product")
        return self.add("Add", [product, self.store(f"b{name}", weights[f"b{name}"])], output)

    def heads(self, name: str, x: str, perm: list[int]) -> str:
        shape = self.store("apart", np.array([-1, TOKENS, HEADS, SIZE]))
        found = self.add("Reshape", [self.linear(name, x, name), shape], f"{name}.apart")
        spec = self.spec
        if name != "v" and spec.between == "rotary":
            factor = np.linspace(1, 2, SIZE).astype(spec.dtype)
            found = self.add("Mul", [found, self.store("rotary", factor)], f"{name}.turned")
        if name != "v" and spec.between == "norm":
            scale = np.ones(SIZE, spec.dtype)
            found = self.add("LayerNormalization", [found, self.store("scale", scale)], f"{name}.normed")
        if name != "v" and spec.between == "scale":
            root = np.array(SIZE**-0.25, spec.dtype)
            found = self.add("Mul", [found, self.store("root", root)], f"{name}.scaled")
        return self.add("Transpose", [found], f"{name}.heads", perm=perm)

    def write(self) -> None:
        spec, other = self.spec, "z" if self.spec.cross else "x"
        q = self.heads("q", "x", [0, 2, 1, 3] if spec.between != "heads" else [0, 1, 2, 3])
        k = self.heads("k", other, [0, 2, 3, 1] if spec.between != "heads" else [0, 1, 3, 2])
        scores = self.add("MatMul", [q, k], "scores")
        if spec.causal:
            mask = np.triu(np.full((TOKENS, TOKENS), -1e4), 1).astype(spec.dtype)
            scores = self.add("Add", [scores, self.store("mask", mask)], "masked")
        axis = -1 if spec.opset >= 11 else 3
        p = self.add("Softmax", [scores], "p", axis=axis)
        if spec.values_transposed:  # (P v)' = v' P'
            v = self.heads("v", other, [0, 2, 3, 1])
            p = self.add("Transpose", [p], "p.turned", perm=[0, 1, 3, 2])
            context = self.add("MatMul", [v, p], "mixed")
            context = self.add("Transpose", [context], "context", perm=[0, 3, 1, 2])
        else:
            order = [0, 2, 1, 3] if spec.between != "heads" else [0, 1, 2, 3]
            context = self.add("MatMul", [p, self.heads("v", other, order)], "mixed")
            context = self.add("Transpose", [context], "context", perm=order)
        shape = self.store("together", np.array([0, 0, WIDTH]))
        self.linear("o", self.add("Reshape", [context, shape], "joined"), "y")


def index_of(model: onnx.ModelProto) -> GraphIndex:
    return GraphIndex.build(model, numpy_helper.to_array)


def regions_of(model: onnx.ModelProto) -> list[Region]:
    index = index_of(model)
    return find_regions(index, find_sites(index))


def kinds(model: onnx.ModelProto) -> list[str]:
    return [pair.kind for region in regions_of(model) for pair in region.pairs]


# --- where it applies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        Attention(),
        Attention(between=""),
        Attention(causal=True),
        Attention(cross=True),
        Attention(bias=False),
        Attention(values_transposed=True),
        Attention(opset=11),
        Attention(dtype=np.float16),
    ],
    ids=str,
)
def test_pairs_are_found(spec: Attention) -> None:
    assert sorted(kinds(spec.model())) == ["scores", "values"]


@pytest.mark.parametrize(
    ("spec", "left"),
    [
        (Attention(between="rotary"), ["values"]),
        (Attention(between="norm"), ["values"]),
        (Attention(between="heads"), []),  # heads of one position meet one another
        (Attention(reads="k.heads"), ["values"]),
        (Attention(reads="v.apart"), ["scores"]),
        (Attention(reads="joined"), ["scores"]),
        (Attention(shared=True), ["values"]),
    ],
    ids=str,
)
def test_no_pair_where_columns_of_a_head_are_told_apart_or_read(spec: Attention, left: list[str]) -> None:
    assert kinds(spec.model()) == left


# --- the algebra --------------------------------------------------------------------------------------------------


def spd(rng: np.random.Generator, count: int, size: int) -> Array:
    root = rng.standard_normal((count, size, 2 * size)) * np.exp(rng.standard_normal((count, size, 1)))
    result: Array = root @ root.transpose(0, 2, 1)
    return result


def harm(turn: Turn, moments: Array, metric: Array) -> float:
    """E |x (I - A U)|_T^2, summed over heads."""
    lost = np.eye(moments.shape[1]) - turn.down @ turn.up
    return float(np.einsum("hij,hik,hkl,hjl->", moments, lost, metric, lost))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.integers(1, 5))
def test_the_tail_is_the_error_and_no_other_basis_has_less(seed: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    moments, metric = spd(rng, 2, 5), spd(rng, 2, 5)
    found = directions(moments, metric)
    turn = found.turn(width)
    assert harm(turn, moments, metric) == pytest.approx(found.tail[width], rel=1e-4, abs=1e-5 * found.tail[0])
    columns = np.eye(5)[:, :width]  # as they stand, the others left out
    for basis in [columns, *(rng.standard_normal((5, width)) for _ in range(10))]:
        down = np.broadcast_to(basis, (2, 5, width))
        inner = np.linalg.inv(down.transpose(0, 2, 1) @ moments @ down)
        up = inner @ down.transpose(0, 2, 1) @ moments  # the best for that basis: a regression
        assert harm(Turn(width, down, up), moments, metric) >= found.tail[width] - 1e-5 * found.tail[0]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_basis_that_a_head_is_given_in_does_not_matter(seed: int) -> None:
    """x M and T in the basis that belongs to it: the same errors, and the same map once it is turned back."""
    rng = np.random.default_rng(seed)
    moments, metric = spd(rng, 2, 4), spd(rng, 2, 4)
    turned = np.linalg.qr(rng.standard_normal((2, 2, 4, 4)))[0]
    change = turned[0] * rng.uniform(0.5, 2, (2, 1, 4)) @ turned[1]
    back = np.linalg.inv(change)
    found = directions(moments, metric)
    other = directions(change.transpose(0, 2, 1) @ moments @ change, back @ metric @ back.transpose(0, 2, 1))
    np.testing.assert_allclose(other.tail, found.tail, rtol=1e-3, atol=1e-4 * found.tail[0])
    one, two = found.turn(2), other.turn(2)
    np.testing.assert_allclose(change @ two.down @ two.up @ back, one.down @ one.up, atol=1e-2)


def test_turns_one_after_another_are_one_turn() -> None:
    rng = np.random.default_rng(0)
    first = directions(spd(rng, 2, 5), spd(rng, 2, 5)).turn(4)
    second = directions(
        first.down.transpose(0, 2, 1) @ spd(rng, 2, 5) @ first.down,
        first.up @ spd(rng, 2, 5) @ first.up.transpose(0, 2, 1),
    ).turn(2)
    both = second.after(first)
    assert both.width == 2
    np.testing.assert_allclose(
        both.down @ both.up, first.down @ second.down @ second.up @ first.up, atol=1e-12
    )
    assert not both.down[:, :, 2:].any()
    assert not both.up[:, 2:].any()


# --- what is written ----------------------------------------------------------------------------------------------


def narrowed(
    index: GraphIndex,
    region: Region,
    widths: dict[int, int],
    seed: int,
    structures: tuple[Structure, ...] = (),
) -> Rewrite:
    """A region with heads in random bases and narrower."""
    rng = np.random.default_rng(seed)
    turns = {}
    for number, width in widths.items():
        pair = region.pairs[number]
        found = directions(*(spd(rng, pair.heads, pair.width) for _ in range(2)))
        turns[number] = found.turn(width)
    segments = tuple(replace(segment, heads=widths) for segment in compose(region, structures))
    affine = turned_maps(region, turns, [read_affine(index, site) for site in region.sites])
    kept = [
        masked(*each) for each in zip(affine, *zip(*partition(region, segments), strict=True), strict=True)
    ]
    return Rewrite(region, segments, tuple(kept), "reduced", "applied")


FORMS = [
    Attention(),
    Attention(causal=True, bias=False),
    Attention(cross=True, values_transposed=True),
    Attention(opset=11, between=""),
    Attention(opset=9),
    Attention(dtype=np.float16),
    Attention(dtype=np.float64, opset=21),
]


@pytest.mark.parametrize("spec", FORMS, ids=str)
@pytest.mark.parametrize("widths", [{0: 3}, {1: 5}, {0: 2, 1: 4}], ids=str)
def test_what_is_written_is_what_the_probe_computes(spec: Attention, widths: dict[int, int]) -> None:
    index = index_of(spec.model())
    (region,) = find_regions(index, find_sites(index))
    rewrite = narrowed(index, region, widths, 1)
    written = emit(index, [rewrite], spec.opset)
    onnx.checker.check_model(written, full_check=True)
    check_equal(spec, index, rewrite, written)
    for number, width in widths.items():
        pair = region.pairs[number]
        columns = [shape(written, region.sites[pair.first].weight)[1]]
        columns.append(shape(written, region.sites[pair.second].weight)[1 if pair.kind == "scores" else 0])
        assert columns == [pair.heads * width] * 2


def check_equal(spec: Attention, index: GraphIndex, rewrite: Rewrite, written: onnx.ModelProto) -> None:
    feeds, sites = spec.feeds(5, 3), rewrite.region.sites
    placed = {site.index: fed for site, fed in zip(sites, rewrite.affine, strict=True)}
    expected = Probe(index, sites, None).run(feeds, placed)["y"].astype(np.float64)
    found = open_session(written).run(feeds)["y"]
    noise = 1e-2 if spec.dtype == np.float16 else 1e-5
    assert np.linalg.norm(found - expected) <= noise * np.linalg.norm(expected)


def heads_in_two(region: Region) -> Structure:
    """Heads 0 and 2 in one block, head 1 in the other; inputs and outputs at random."""
    rng = np.random.default_rng(0)
    labels = {
        group: rng.integers(0, 2, found.size).astype(np.int32) for group, found in region.groups.items()
    }
    labels[region.ends[0][1]] = np.array([1, 0, 1], np.int32)
    return Structure((0, 1, 2, 3), labels, 2, "exact", 0.0, 1.0)


@pytest.mark.parametrize("spec", [Attention(causal=True), Attention(opset=11)], ids=str)
def test_narrower_heads_in_blocks(spec: Attention) -> None:
    """An attention that is split by heads: each block has its own, and all are as narrow."""
    index = index_of(spec.model())
    (region,) = find_regions(index, find_sites(index))
    structure = heads_in_two(region)
    rewrite = narrowed(index, region, {0: 4, 1: 6}, 2, (structure,))
    written = emit(index, [replace(rewrite, decision="split")], spec.opset)
    onnx.checker.check_model(written, full_check=True)
    check_equal(spec, index, rewrite, written)
    shapes = [list(t.dims) for t in written.graph.initializer if t.name.startswith("Wq.decomp")]
    assert [columns for _, columns in shapes] == [4, 8]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 100_000), split=st.booleans(), form=st.sampled_from(FORMS_OF_NETWORKS))
def test_whole_transformers_with_narrower_heads(seed: int, split: bool, form: str) -> None:
    """Any transformer, products in any form, its regions in blocks or dense: written as the probe computes it."""
    rng = np.random.default_rng(seed)
    network = build(random_spec(rng, kind="transformer", off="untouched"))
    model = network.model
    if form in ("any", "old"):
        model = disguised(model, rng, old=form == "old")
    elif form != "plain":
        model = fused(model, form)
    index = index_of(model)
    regions = find_regions(index, find_sites(index))
    structures = true_structures(replace(network, model=model), regions) if split else {}
    rewrites, narrow = [], 0
    for region in regions:
        widths = {
            n: int(rng.integers(1, pair.width)) for n, pair in enumerate(region.pairs) if rng.random() < 0.7
        }
        found = (structures[region.name],) if region.name in structures else ()
        narrow += len(widths)
        rewrites += [narrowed(index, region, widths, seed, found)] if widths or found else []
    written = emit(index, rewrites, network.spec.opset)
    onnx.checker.check_model(written, full_check=form not in FUSED)
    feeds = calibration(network, 5, seed)
    sites = [site for region in regions for site in region.sites]
    placed = {s.index: a for each in rewrites for s, a in zip(each.region.sites, each.affine, strict=True)}
    expected = Probe(index, sites, None).run(feeds, placed)["y"].astype(np.float64)
    found_y = open_session(written).run(feeds)["y"]
    noise = 1e-4 if form in FUSED else 1e-5  # of other kernels, and without norms it grows
    assert np.linalg.norm(found_y - expected) <= noise * np.linalg.norm(expected)
    event(f"pairs made narrower: {min(narrow, 3)}")


def test_emitted_graph() -> None:
    spec = Attention(causal=True)
    index = index_of(spec.model())
    (region,) = find_regions(index, find_sites(index))
    check("narrow_heads", emit(index, [narrowed(index, region, {0: 4, 1: 6}, 2)], spec.opset))


def shape(model: onnx.ModelProto, weight: str) -> list[int]:
    return next(list(t.dims) for t in model.graph.initializer if t.name.startswith(f"{weight}.decomp"))


# --- the whole compiler -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [Attention(rank=4), Attention(rank=4, bias=False, causal=True), Attention(rank=6, cross=True, seed=3)],
    ids=str,
)
def test_the_rank_that_heads_have_is_found(spec: Attention, tmp_path: Path) -> None:
    """Heads whose products have a low rank are written that narrow, and nothing changes on new data."""
    model = spec.model()
    np.savez(tmp_path / "calib.npz", **spec.feeds(400, 1))  # type: ignore[arg-type]
    options = Options(provider="cpu", latency_gate=False, objective="flops", tolerance=1e-4)
    done = decompose(model, calib=tmp_path / "calib.npz", options=options)
    assert {name: shape(done.model, f"W{name}") for name in ("q", "k", "v", "o")} == {
        name: [WIDTH, HEADS * spec.rank] if name != "o" else [HEADS * spec.rank, WIDTH]
        for name in ("q", "k", "v", "o")
    }
    feeds = spec.feeds(20, 7)
    before, after = open_session(model).run(feeds)["y"], open_session(done.model).run(feeds)["y"]
    assert np.linalg.norm(after - before) <= 3e-6 * np.linalg.norm(before)
    for site in done.report["sites"]:
        assert (site["decision"], site["form"]) == ("reduced", "dense")
        assert (site["rank"], site["head_width"]) == (None, spec.rank)
        assert site["flop_ratio"] == pytest.approx(spec.rank / SIZE)


def test_a_walk_down_is_the_same_in_any_basis(tmp_path: Path) -> None:
    """Step after step heads get narrower; what is written is checked, and bases of the original don't matter."""
    found = []
    for spec in (Attention(causal=True), Attention(causal=True, rebased=True)):
        np.savez(tmp_path / "calib.npz", **spec.feeds(400, 1))  # type: ignore[arg-type]
        options = Options(provider="cpu", latency_gate=False, objective="flops")
        calib = tmp_path / "calib.npz"
        made = frontier(spec.model(), calib=calib, options=options, ratios=(0.8, 0.6, 0.4), methods=("plan",))
        points = [point for point in made.points if point.flops < 1]
        assert len(points) == 3
        for point in points:
            written, feeds = made.write(point), spec.feeds(100, 5)
            before, after = (open_session(model).run(feeds)["y"] for model in (spec.model(), written))
            change = np.linalg.norm(after - before) / np.linalg.norm(before)
            assert change == pytest.approx(point.change, rel=0.1)
        narrow = [int(shape(made.write(points[-1]), f"W{name}")[1]) for name in ("q", "k")]
        assert narrow[0] == narrow[1] < WIDTH
        found.append([point.change for point in points])
    assert found[1] == pytest.approx(found[0], rel=0.05)
