"""Blocks of low rank, written as y = (x A) B + b: the function of the dense-equivalent model, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.networks import Network
from models.networks import build as build_network
from models.networks import calibration as network_calibration
from models.planted import Planted, build, calibration
from onnx_decomp.axes import Region, find_regions
from onnx_decomp.cost import CostModel, cpu, cuda
from onnx_decomp.passes.compensation import View
from onnx_decomp.passes.folding import (
    block_rank,
    block_sizes,
    block_widths,
    compose,
    decision_of,
    factors,
    forms,
    kept_flops,
    partition,
    site_labels,
    site_rank,
)
from onnx_decomp.passes.pricing import segment_time, with_best_forms
from onnx_decomp.passes.ridge import masked
from onnx_decomp.passes.splitting import emit
from onnx_decomp.probe import Probe
from onnx_decomp.program import DROPPED, Rewrite, Segment, Structure
from onnx_decomp.rendering import describe_site, render_html
from onnx_decomp.report import Measured, multiplications
from onnx_decomp.report import build as build_report
from onnx_decomp.runtime import open_session
from onnx_decomp.sites import Affine, GraphIndex, find_sites, read_affine
from tests.test_golden import check
from tests.test_report import make_program, shown
from tests.test_splitting import (
    NOISE,
    _all_forms,
    drawn_partition,
    index_of,
    newest_opset,
    only_region,
    true_structure,
)

Ranks = Mapping[int, tuple[int, ...]]


def of_rank(weight: NDArray[Any], rank: int) -> NDArray[np.float32]:
    """The nearest matrix of that rank, by a plain decomposition."""
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    return ((left[:, :rank] * values[:rank]) @ right[:rank]).astype(np.float32)


def low_rank(
    index: GraphIndex, region: Region, segments: Sequence[Segment], bias: bool = True
) -> tuple[Rewrite, dict[int, Affine]]:
    """Masked weights, factored blocks of exactly their rank, and biases moved a little; and what the probe is fed.

    Where a segment says so, random corrections of exactly their rank stand beside the blocks.
    """
    affine: list[Affine] = []
    fed: dict[int, Affine] = {}
    corrections: dict[int, NDArray[np.float32]] = {}
    for at, (rows, columns) in enumerate(partition(region, segments)):
        view = View.of(region, segments, at)
        kept = masked(view.affine(read_affine(index, region.sites[at])), rows, columns)
        segment = next(segment for segment in segments if at in segment.sites)
        weight = kept.weight.copy()
        for block, (k, n) in enumerate(block_sizes(region, segment, at)):
            cells = np.ix_(rows == block, columns == block)
            rank = block_rank(segment, at, block, k, n)
            if rank is not None:
                weight[cells] = of_rank(weight[cells], rank)
        moved = kept.bias
        if bias:
            moved = np.zeros(len(columns)) if kept.bias is None else kept.bias
            moved = (moved + np.linspace(-0.1, 0.1, len(columns))).astype(np.float32)
        affine.append(Affine(weight, moved))
        whole = view.fed(affine[-1])
        if segment.corrections.get(at):
            corrections[at] = _beside(region, segment, at, whole.weight.shape)
            whole = Affine(whole.weight + corrections[at], whole.bias)
        fed[region.sites[at].index] = whole
    outcome = decision_of(region, segments)
    rewrite = Rewrite(region, tuple(segments), tuple(affine), outcome, "applied", corrections=corrections)
    return rewrite, fed


def _beside(region: Region, segment: Segment, at: int, shape: tuple[int, int]) -> NDArray[np.float32]:
    """A random map of the rank that the segment says, between what there is to read and to make."""
    rng = np.random.default_rng(at)
    rank = segment.corrections[at]
    low = (
        rng.standard_normal((shape[0], rank))
        @ rng.standard_normal((rank, shape[1]))
        / np.sqrt(np.prod(shape))
    )
    rows, columns = site_labels(region, segment, at)
    low[:, columns == DROPPED] = 0
    if region.ends[at][0] in region.elastic:
        low[rows == DROPPED] = 0
    return low.astype(np.float32)


def check_low_rank(
    index: GraphIndex,
    regions: Sequence[tuple[Region, Sequence[Segment]]],
    feeds: dict[str, NDArray[Any]],
    opset: int,
    bias: bool = True,
) -> onnx.ModelProto:
    """The written model computes what the original graph does with the same dense-equivalent weights, and in as many
    multiplications as the report says."""
    made = [low_rank(index, region, segments, bias) for region, segments in regions]
    rewrites = [rewrite for rewrite, _ in made]
    written = emit(index, rewrites, opset)
    onnx.checker.check_model(written, full_check=True)
    sites = find_sites(index)
    placed = {at: affine for _, fed in made for at, affine in fed.items()}
    expected = Probe(index, [site for site in sites if site.obstacle is None], None).run(feeds, placed)
    found = open_session(written).run(feeds)
    tolerance = max(NOISE[str(site.dtype)] for site in sites)
    for name, value in expected.items():
        scale = float(np.linalg.norm(value.astype(np.float64)))
        assert np.linalg.norm(found[name].astype(np.float64) - value) <= tolerance * scale, name
    computed = {
        site.index: multiplications(rewrite, at)
        for rewrite in rewrites
        for at, site in enumerate(rewrite.region.sites)
    }
    told = sum(computed.get(site.index, site.flops // 2) for site in sites)
    assert told == sum(k * n for k, n in products(written))
    downs = sum(len(widths) > 2 for rewrite in rewrites for widths in all_widths(rewrite))
    beside = sum(len(segment.corrections) for rewrite in rewrites for segment in rewrite.segments)
    assert downs + beside == sum(node.name.endswith("/Down") for node in written.graph.node)
    return written


def all_widths(rewrite: Rewrite) -> list[tuple[int, ...]]:
    return [
        widths
        for segment in rewrite.segments
        for site in segment.sites
        for widths in block_widths(rewrite.region, segment, site)
    ]


def products(model: onnx.ModelProto) -> list[tuple[int, int]]:
    """Sizes of the stored matrix of every MatMul and Gemm; one of several axes counts as that many matrices."""
    stored = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    found = [stored[node.input[1]] for node in nodes if node.input[1] in stored]
    return [(int(np.prod(shape[:-1])), shape[-1]) for shape in found]


def with_ranks(segments: Sequence[Segment], ranks: Ranks) -> tuple[Segment, ...]:
    """Each segment with what is said of its own sites."""
    return tuple(
        replace(segment, ranks={at: ranks[at] for at in segment.sites if at in ranks}) for segment in segments
    )


# --- the same function --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["MatMul", "Gemm", "Constant", "Transpose", "Identity"])
@pytest.mark.parametrize("opset", [11, 13, 17, 21, newest_opset()])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_storage_opset_and_type(form: str, opset: int, dtype: str) -> None:
    planted = build(Planted((24, 48, 36), blocks=3, form=form, opset=opset, dtype=dtype, seed=opset))
    index = index_of(planted.model)
    region = only_region(index)
    feeds = calibration(planted, 9, seed=1)
    dense = with_ranks(compose(region), {0: (5,), 1: (7,)})
    written = check_low_rank(index, [(region, dense)], feeds, opset)
    assert products(written) == [(24, 5), (5, 48), (48, 7), (7, 36)]
    chain = with_ranks(compose(region, [true_structure(planted, region)]), {0: (2, 3, 2)})
    check_low_rank(index, [(region, (replace(chain[0], form="chain"),))], feeds, opset)


@pytest.mark.parametrize("activation", ["Relu", "Gelu", "ErfGelu", "Tanh", "Sigmoid"])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("hide", ["all", "hidden", "none"])
def test_every_link_rank_and_border(activation: str, rank: int, hide: str) -> None:
    planted = build(
        Planted((32, 64, 48, 32), blocks=4, activation=activation, rank=rank, hide=hide, opset=20)
    )
    index = index_of(planted.model)
    region = only_region(index)
    feeds = calibration(planted, 8, seed=2)
    whole = compose(region, [true_structure(planted, region)])
    for ranks in ({0: (2, 2, 2, 2)}, {1: (3, 1, 99, 2)}, {0: (1,) * 4, 2: (2,) * 4}):
        (segment,) = with_ranks(whole, ranks)
        assert list(forms(region, segment)) == ["chain"]
        written = check_low_rank(index, [(region, (replace(segment, form="chain"),))], feeds, 20)
        assert sum(node.op_type == "Gather" for node in written.graph.node) == (2 if hide == "all" else 0)
    for ranks in ({0: (6,)}, {1: (9,), 2: (4,)}):
        check_low_rank(index, [(region, with_ranks(compose(region), ranks))], feeds, 20)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_layer_with_and_without_a_bias(rank: int, bias: bool, dtype: str) -> None:
    planted = build(Planted((32, 24), blocks=2, rank=rank, bias=False, dtype=dtype))
    index = index_of(planted.model)
    region = only_region(index)
    feeds = calibration(planted, 8, seed=3)
    parallel = with_ranks(compose(region, [true_structure(planted, region)]), {0: (3, 2)})
    assert list(forms(region, parallel[0])) == ["parallel"]
    shaped = (replace(parallel[0], form="parallel"),)
    written = check_low_rank(index, [(region, shaped)], feeds, 17, bias)
    assert sorted(products(written)) == [(2, 12), (3, 12), (16, 2), (16, 3)]
    written = check_low_rank(index, [(region, with_ranks(compose(region), {0: (4,)}))], feeds, 17, bias)
    operators = [node.op_type for node in written.graph.node if node.op_type in ("MatMul", "Gemm", "Add")]
    assert operators == ["MatMul", "Gemm" if bias else "MatMul"]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_partitions_ranks_and_dropped_units(data: st.DataObject) -> None:
    """Any labels on any axis, dropped units, blocks factored or not, beside dense layers that are or are not."""
    drawn = drawn_partition(data)
    region, structure = drawn.region, drawn.structure
    ranks = {
        at: tuple(
            data.draw(st.integers(0, 6)) for _ in range(structure.blocks if at in structure.sites else 1)
        )
        for at in data.draw(st.sets(st.integers(0, len(region.sites) - 1)))
    }
    segments = with_ranks(compose(region, [structure], drawn.keep), ranks)
    for shaped in _all_forms(region, segments):
        check_low_rank(drawn.index, [(region, shaped)], drawn.feeds, 17)


NETWORKS = {
    "transformer": Network("transformer", width=32, hidden=64, blocks=2, heads=4, layers=2, vocabulary=64),
    "gated": Network("gated", width=32, hidden=64, blocks=2, rank=2),
    "shared": Network("albert", width=32, hidden=64, blocks=2, layers=3, vocabulary=64, outputs=16),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks(name: str) -> None:
    """Feed-forwards, attention, gates and shared weights, every site of every region factored, or every other one."""
    network = build_network(NETWORKS[name])
    index = index_of(network.model)
    regions = find_regions(index, find_sites(index))
    feeds = network_calibration(network, 5, 1)
    for step in (1, 2):
        factored = []
        for region in regions:
            ranks = {at: (6,) for at, site in enumerate(region.sites) if site.index % step == 0}
            if name == "shared":  # all uses of a weight alike
                ranks = {at: (6,) for at, site in enumerate(region.sites) if "up" in site.weight or step == 1}
            factored.append((region, with_ranks(compose(region), ranks)))
        written = check_low_rank(index, factored, feeds, NETWORKS[name].opset)
        assert any(6 in shape for shape in products(written))
        if name == "shared":
            sides = [t.name for t in written.graph.initializer if t.name.startswith("shared.up.weight")]
            assert sides == [f"shared.up.weight.decomp.block_00.{side}" for side in ("down", "up")]


def test_units_dropped_before_it_is_factored() -> None:
    planted = build(Planted((24, 48, 36), blocks=2, seed=3))
    index = index_of(planted.model)
    region = only_region(index)
    keep = {1: np.arange(48) % 3 > 0}
    segments = with_ranks(compose(region, (), keep), {1: (5,)})
    written = check_low_rank(index, [(region, segments)], calibration(planted, 9, seed=1), 17)
    assert products(written) == [(24, 32), (32, 5), (5, 36)]


def test_slices_with_copies() -> None:
    """Inputs and hidden units that two blocks read: copies of rows and of columns, in blocks of low rank."""
    planted = build(Planted((24, 48, 36), blocks=2, seed=5, hide="none"))
    index = index_of(planted.model)
    region = only_region(index)
    copies = {
        group: np.concatenate([np.arange(2 * n // 3), np.arange(n // 3, n)])
        for group, n in ((0, 24), (1, 48))
    }
    labels = {group: np.repeat(np.arange(2), len(units) // 2) for group, units in copies.items()}
    labels[2] = np.repeat(np.arange(2), 18)
    labels = {group: found.astype(np.int32) for group, found in labels.items()}
    structure = Structure((0, 1), labels, 2, "influence", 0.0, 1.0, copies)
    for ranks in ({}, {0: (4, 3)}, {0: (2, 99), 1: (5, 6)}):
        (segment,) = with_ranks(compose(region, [structure]), ranks)
        shaped = (replace(segment, form="chain"),)
        check_low_rank(index, [(region, shaped)], calibration(planted, 9, seed=1), 17)


@pytest.mark.parametrize("name", ["low_rank_dense", "low_rank_chain"])
def test_emitted_graph(name: str) -> None:
    planted = build(Planted((8, 16, 8), blocks=2, hide="hidden", seed=1))
    index = index_of(planted.model)
    region = only_region(index)
    if name == "low_rank_dense":
        segments = with_ranks(compose(region), {0: (2,)})
    else:
        chain = replace(compose(region, [true_structure(planted, region)])[0], form="chain")
        segments = with_ranks([chain], {1: (2, 9)})
    check(name, check_low_rank(index, [(region, segments)], calibration(planted, 5, seed=1), 17))


# --- the two sides ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
@pytest.mark.parametrize("spread", [1.0, 1e-6])
def test_factors_are_exact_and_alike_in_size(shape: tuple[int, int], spread: float) -> None:
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((side, 6)))[0] for side in shape)
    values = np.geomspace(3, 3 * spread, 6)
    weight = ((left * values) @ right.T).astype(np.float32)
    down, up = factors(weight, 6)
    assert (down.shape, up.shape) == ((shape[0], 6), (6, shape[1]))
    assert np.linalg.norm(down @ up - weight) <= 1e-6 * np.linalg.norm(weight)
    leading = values > 1e-3
    for sizes in (np.linalg.norm(down, axis=0)[::-1], np.linalg.norm(up, axis=1)[::-1]):
        assert sizes[leading] == pytest.approx(np.sqrt(values[leading]), rel=1e-3)


@pytest.mark.parametrize("true", [0, 1, 3])
def test_weights_of_less_than_their_rank(true: int) -> None:
    rng = np.random.default_rng(true)
    weight = (rng.standard_normal((20, true)) @ rng.standard_normal((true, 30))).astype(np.float32)
    down, up = factors(weight, 4)
    assert np.abs(down @ up - weight).max() <= 1e-6 * (1 + np.abs(weight).max())
    assert np.isfinite(down.astype(np.float16)).all()
    assert np.isfinite(up.astype(np.float16)).all()


# --- what it costs ------------------------------------------------------------------------------------------------


def mlp(*widths: int, blocks: int = 2) -> tuple[Region, Structure]:
    planted = build(Planted(widths, blocks=blocks, hide="none"))
    region = only_region(index_of(planted.model))
    return region, true_structure(planted, region)


def test_a_block_stays_whole_where_two_products_cost_as_much() -> None:
    segment = Segment((0, 1), {}, 2, ranks={1: (12, 8)})
    assert block_rank(segment, 0, 0, 24, 24) is None, "it is not listed"
    assert block_rank(segment, 1, 0, 24, 24) is None, "12 (24 + 24) = 24 * 24"
    assert block_rank(segment, 1, 0, 24, 25) == 12
    assert block_rank(segment, 1, 1, 24, 24) == 8
    assert block_rank(replace(segment, ranks={1: (0, 8)}), 1, 0, 24, 24) == 1, "nothing is not written"


def test_flops_ranks_and_decisions() -> None:
    region, structure = mlp(24, 48, 36)
    dense, split = compose(region), compose(region, [structure])
    assert decision_of(region, dense) == "reduced"
    assert decision_of(region, split) == "split"
    low = with_ranks(dense, {0: (5,)})
    assert decision_of(region, low) == "low-rank"
    assert kept_flops(region, low[0]) == 2 * (5 * (24 + 48) + 48 * 36)
    assert (site_rank(region, low[0], 0), site_rank(region, low[0], 1)) == (5, None)
    both = with_ranks(split, {0: (5, 99)})
    assert decision_of(region, both) == "split"
    assert kept_flops(region, both[0]) == 2 * (5 * (12 + 24) + 12 * 24 + 2 * 24 * 18)
    assert site_rank(region, both[0], 0) == 5 + 12
    whole = with_ranks(dense, {0: (16,)})  # 16 (24 + 48) = 24 * 48
    assert decision_of(region, whole) == "reduced"
    assert kept_flops(region, whole[0]) == kept_flops(region, dense[0])


def test_ranks_survive_composing_and_choosing_a_form() -> None:
    region, structure = mlp(24, 48, 36)
    (segment,) = with_ranks(compose(region, [structure]), {0: (5, 5)})
    assert "batched" in forms(region, replace(segment, ranks={}))
    assert "batched" in forms(region, replace(segment, ranks={0: (99, 99)})), "nothing is factored"
    (shaped,) = with_best_forms(cuda(), 128, region, [segment])
    assert (shaped.ranks, shaped.form) == ({0: (5, 5)}, "chain")


@pytest.mark.parametrize("cost", [cpu(), cuda()])
def test_two_products_are_priced_as_two(cost: CostModel) -> None:
    region, structure = mlp(768, 3072, blocks=4)
    dense, split = compose(region)[0], compose(region, [structure])[0]
    rows = 2048
    low = replace(dense, ranks={0: (64,)})
    two = cost.dense(rows, 768, 64) + cost.dense(rows, 64, 3072)
    assert segment_time(cost, rows, region, low, "dense") == pytest.approx(two)
    small = cost == cuda()  # for a GPU, which memory and starting kernels bound here
    assert (two < segment_time(cost, rows, region, dense, "dense")) == (not small)
    for form in ("parallel", "chain"):
        times = [
            segment_time(cost, rows, region, replace(split, ranks=ranks), form)
            for ranks in ({0: (8,) * 4}, {0: (32,) * 4}, {0: (96,) * 4})
        ]
        assert times == sorted(times)
        whole = segment_time(cost, rows, region, split, form)
        assert (times[0] < whole) == (not small)


def test_a_block_more_in_two_products_is_one_operator_more() -> None:
    layer = [(64, 64)] * 4
    for behind in ([], [layer]):
        more = cpu().chain(1, [[(64, 32, 64), *layer[1:]], *behind]) - cpu().chain(1, [layer, *behind])
        assert more == pytest.approx(cpu().node), "as many weights"


# --- the report ---------------------------------------------------------------------------------------------------


NOT_MEASURED = Measured(None, 0.0, None, 0.0)


def test_the_report_tells_the_rank() -> None:
    program = make_program()
    region = program.regions[0]
    (first, last), (_, third) = region.ends
    zeros = {group: np.zeros(region.groups[group].size, np.int32) for group in (first, last, third)}
    segments = (Segment((0, 1), zeros, 1, ranks={0: (2,)}),)
    affine = program.rewrites[0].affine
    program.rewrites = [Rewrite(region, segments, affine, decision_of(region, segments), "applied")]
    report = build_report(program, program.original, NOT_MEASURED)
    low, dense = report["sites"][:2]
    assert (low["decision"], low["form"], low["rank"]) == ("low-rank", "dense", 2)
    assert low["flop_ratio"] == 2 * (4 + 6) / 24
    assert (dense["decision"], dense["rank"], dense["flop_ratio"]) == ("dense", None, 1.0)
    assert report["output"]["matmul_flops"] == 2 * (10 * 20 + 10 * 24 + 8)
    assert "  decision: low-rank as dense, rank 2, 0.833 of its FLOPs" in describe_site(low)
    assert "low-rank" in shown(report)
    assert "dense, rank 2" in render_html(report)


def test_the_report_of_blocks_of_low_rank_says_split() -> None:
    program = make_program()
    (rewrite,) = program.rewrites
    segments = (replace(rewrite.segments[0], ranks={1: (1, 1)}),)
    program.rewrites = [replace(rewrite, segments=segments)]
    first, second = build_report(program, program.original, NOT_MEASURED)["sites"][:2]
    assert (first["decision"], first["rank"]) == ("split", None)
    # 3 x 2 takes 5 multiplications at rank 1, 2 x 2 is written whole, and has rank 2 at most.
    assert (second["decision"], second["rank"], second["flop_ratio"]) == ("split", 1 + 2, (5 + 4) / 24)
