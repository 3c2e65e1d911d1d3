"""Blocks with a low-rank correction beside them: fitted, written and chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import models
from models.networks import build as build_network
from models.networks import calibration as network_calibration
from models.planted import Planted, build, calibration
from onnx_decomp.axes import Region, find_regions
from onnx_decomp.compiler import compile_file
from onnx_decomp.cost import cpu, cuda
from onnx_decomp.options import Options
from onnx_decomp.passes.correction import Wanted, beside, corrected
from onnx_decomp.passes.folding import compose, kept_flops
from onnx_decomp.passes.moments import Moments, accumulate, residual
from onnx_decomp.passes.pricing import segment_time
from onnx_decomp.passes.ridge import best_refit
from onnx_decomp.passes.tradeoff import Descent, Key, Knob, Work
from onnx_decomp.program import DROPPED, Labels, Segment, Structure
from onnx_decomp.sites import Affine, find_sites
from tests.test_golden import check
from tests.test_lowrank_forms import NETWORKS, check_low_rank, of_rank, products
from tests.test_splitting import (
    _all_forms,
    drawn_partition,
    index_of,
    newest_opset,
    only_region,
    true_structure,
)


def with_corrections(segments: Sequence[Segment], ranks: Mapping[int, int]) -> tuple[Segment, ...]:
    """Each segment with corrections beside those of its sites that it says are in blocks."""
    return tuple(
        replace(segment, corrections={at: ranks[at] for at in segment.sites if at in ranks})
        if segment.blocks > 1
        else segment
        for segment in segments
    )


# --- written ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["MatMul", "Gemm"])
@pytest.mark.parametrize("opset", [11, 13, 17, newest_opset()])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_opset_and_type(form: str, opset: int, dtype: str) -> None:
    planted = build(Planted((24, 48, 36), blocks=3, form=form, opset=opset, dtype=dtype, seed=opset))
    index = index_of(planted.model)
    region = only_region(index)
    whole = compose(region, [true_structure(planted, region)])
    for shaped in _all_forms(region, with_corrections(whole, {0: 5, 1: 2})):
        written = check_low_rank(index, [(region, shaped)], calibration(planted, 9, seed=1), opset)
        assert {(24, 5), (48, 2)} <= set(products(written))


@pytest.mark.parametrize("activation", ["Relu", "ErfGelu", "Tanh"])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("hide", ["all", "hidden", "none"])
def test_every_link_rank_and_border(activation: str, rank: int, hide: str) -> None:
    planted = build(
        Planted((32, 64, 48, 32), blocks=4, activation=activation, rank=rank, hide=hide, opset=17)
    )
    index = index_of(planted.model)
    region = only_region(index)
    whole = compose(region, [true_structure(planted, region)])
    for ranks in ({0: 3}, {1: 4}, {2: 1}, {0: 2, 1: 3, 2: 5}):
        for shaped in _all_forms(region, with_corrections(whole, ranks)):
            check_low_rank(index, [(region, shaped)], calibration(planted, 8, seed=2), 17)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_partitions_and_dropped_units(data: st.DataObject) -> None:
    drawn = drawn_partition(data)
    region, structure = drawn.region, drawn.structure
    within = st.sampled_from(structure.sites)
    factored = dict.fromkeys(data.draw(st.sets(within)), (2,) * structure.blocks)
    corrections = data.draw(st.dictionaries(within, st.integers(1, 3)))
    segments = with_corrections(compose(region, [structure], drawn.keep), corrections)
    for shaped in _all_forms(region, segments):
        both = [
            replace(each, ranks=factored) if each.blocks > 1 and each.form != "batched" else each
            for each in shaped
        ]
        for written in (shaped, both):
            check_low_rank(drawn.index, [(region, written)], drawn.feeds, 17)


def test_a_rank_above_what_is_left() -> None:
    """Of three units that stay in each block no correction has a higher rank than six."""
    planted = build(Planted((24, 48, 36), blocks=2, seed=5))
    index = index_of(planted.model)
    region = only_region(index)
    structure = true_structure(planted, region)
    keep = np.zeros(48, bool)
    for block in range(2):
        keep[np.flatnonzero(planted.labels[1] == block)[:3]] = True
    segments = with_corrections(compose(region, [structure], {1: keep}), {1: 20})
    for shaped in _all_forms(region, segments):
        written = check_low_rank(index, [(region, shaped)], calibration(planted, 9, seed=1), 17)
        assert (6, 6) in products(written)


@pytest.mark.parametrize("name", ["transformer", "gated"])
def test_whole_networks(name: str) -> None:
    """Attention heads, gates and residual streams in blocks, each site with a correction."""
    network = build_network(NETWORKS[name])
    index = index_of(network.model)
    regions = find_regions(index, find_sites(index))
    chosen = []
    for region in regions:
        labels = {
            group: (np.arange(found.size) * 2 // found.size).astype(np.int32)
            for group, found in region.groups.items()
        }
        structure = Structure(tuple(range(len(region.sites))), labels, 2, "exact", 0, 1)
        segments = with_corrections(compose(region, [structure]), dict.fromkeys(range(len(region.sites)), 3))
        chosen.append((region, tuple(replace(each, form="chain") for each in segments)))
    feeds = network_calibration(network, 5, 1)
    check_low_rank(index, chosen, feeds, NETWORKS[name].opset)


def sliced(region: Region) -> Structure:
    """Two branches that share a third of what they read, at the border and inside."""
    sizes = {group: region.groups[group].size for group in region.order}
    last = region.order[-1]
    copies = {
        group: np.concatenate([np.arange(2 * n // 3), np.arange(n // 3, n)])
        for group, n in sizes.items()
        if group != last
    }
    labels = {
        group: np.repeat(np.arange(2), len(units) // 2).astype(np.int32) for group, units in copies.items()
    }
    labels[last] = (np.arange(sizes[last]) * 2 // sizes[last]).astype(np.int32)
    return Structure((0, 1), labels, 2, "influence", 0.0, 1.0, copies)


def test_slices_with_copies() -> None:
    planted = build(Planted((24, 48, 36), blocks=2, seed=5, hide="none"))
    index = index_of(planted.model)
    region = only_region(index)
    for ranks in ({0: 3}, {1: 4}, {0: 2, 1: 3}):
        (segment,) = with_corrections(compose(region, [sliced(region)]), ranks)
        written = check_low_rank(
            index, [(region, (replace(segment, form="chain"),))], calibration(planted, 9, seed=1), 17
        )
        assert all(
            shape in products(written) for shape in [(24, ranks.get(0)), (64, ranks.get(1))] if shape[1]
        )


@pytest.mark.parametrize("form", ["chain", "batched"])
def test_emitted_graph(form: Any) -> None:
    planted = build(Planted((8, 16, 8), blocks=2, hide="hidden", seed=1))
    index = index_of(planted.model)
    region = only_region(index)
    (segment,) = with_corrections(compose(region, [true_structure(planted, region)]), {0: 2, 1: 3})
    made = check_low_rank(
        index, [(region, [replace(segment, form=form)])], calibration(planted, 5, seed=1), 17
    )
    check(f"correction_{form}", made)


# --- fitted -------------------------------------------------------------------------------------------------------

ROWS, COLUMNS = np.repeat(np.arange(3), 8).astype(np.int32), np.repeat(np.arange(3), 6).astype(np.int32)


def planted_map(rank: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Blocks and a map of low rank between 24 inputs and 18 outputs."""
    rng = np.random.default_rng(seed)
    blocks = np.where(ROWS[:, None] == COLUMNS, rng.standard_normal((24, 18)), 0.0)
    return blocks, rng.standard_normal((24, rank)) @ rng.standard_normal((rank, 18)) / 2


def paired(weight: NDArray[np.float64], seed: int, rows: int = 600) -> Moments:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 24)) @ (
        np.eye(24) + 0.2 * np.random.default_rng(9).standard_normal((24, 24))
    )
    return accumulate([(x, x @ weight + 0.3)])


def wanted(old: NDArray[np.float64], rank: int, rows: Labels = ROWS, columns: Labels = COLUMNS) -> Wanted:
    affine = Affine(old.astype(np.float32), None)
    return Wanted(affine, rows, columns, np.ones(24, bool), rank, None)


def error(moments: Moments, blocks: Affine, low: NDArray[np.float32]) -> float:
    return residual(moments, Affine(blocks.weight + low, blocks.bias)) / float(moments.yy.sum())


def test_blocks_with_a_low_rank_map_are_found_exactly() -> None:
    """What is fitted makes the planted function, though no entry of the old weights tells blocks from the rest."""
    blocks, low = planted_map(2)
    fit, select, unseen = (paired(blocks + low, seed) for seed in (1, 2, 3))
    found, beside_them = corrected(fit, select, wanted(blocks + low, 2))
    assert np.linalg.matrix_rank(beside_them, tol=1e-4) == 2
    assert not found.weight[ROWS[:, None] != COLUMNS].any()
    without = best_refit(fit, select, Affine((blocks + low).astype(np.float32), None), ROWS, COLUMNS)
    plain = error(unseen, without, np.zeros_like(beside_them))
    assert error(unseen, found, beside_them) < 0.02 * plain


def test_more_rank_is_never_worse_and_all_of_it_is_exact() -> None:
    rng = np.random.default_rng(4)
    dense = rng.standard_normal((24, 18))
    fit, select, unseen = (paired(dense, seed) for seed in (1, 2, 3))
    errors = [error(unseen, *corrected(fit, select, wanted(dense, rank))) for rank in (0, 1, 3, 6, 12, 18)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9


def test_it_beats_the_nearest_map_of_the_residual_weights() -> None:
    """By what is fed: cutting the weights left over by their own singular values does worse on unseen data."""
    rng = np.random.default_rng(5)
    dense = rng.standard_normal((24, 18))
    fit, select, unseen = (paired(dense, seed) for seed in (1, 2, 3))
    old = Affine(dense.astype(np.float32), None)
    blocks = best_refit(fit, select, old, ROWS, COLUMNS)
    plain = of_rank(dense - blocks.weight, 4)
    bias = fit.mean_y - fit.mean_x @ (blocks.weight + plain)
    naive = error(unseen, Affine(blocks.weight, bias.astype(np.float32)), plain)
    assert error(unseen, *corrected(fit, select, wanted(dense, 4))) < 0.9 * naive


def test_dropped_units_stay_out() -> None:
    blocks, low = planted_map(3)
    rows, columns = ROWS.copy(), COLUMNS.copy()
    rows[::5], columns[::7] = DROPPED, DROPPED
    asked = replace(wanted(blocks + low, 3, rows, columns), readable=rows != DROPPED)
    found, beside_them = corrected(paired(blocks + low, 1), paired(blocks + low, 2), asked)
    for each in (found.weight, beside_them):
        assert not each[rows == DROPPED].any()
        assert not each[:, columns == DROPPED].any()
    assert found.bias is not None
    assert not found.bias[columns == DROPPED].any()


def test_what_a_map_leaves_is_what_is_left() -> None:
    rng = np.random.default_rng(6)
    x, weight, part = (rng.standard_normal(shape) for shape in ((50, 24), (24, 18), (24, 18)))
    found = beside(accumulate([(x, x @ weight)]), part)
    direct = accumulate([(x, x @ weight - x @ part)])
    for name in ("mean_y", "xy", "yy", "xx"):
        assert getattr(found, name) == pytest.approx(getattr(direct, name), abs=1e-9)


# --- chosen -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", [cpu(), cuda()])
def test_it_is_counted_and_priced(cost: Any) -> None:
    planted = build(Planted((768, 3072, 768), blocks=4, hide="none"))
    region = only_region(index_of(planted.model))
    (plain,) = compose(region, [true_structure(planted, region)])
    (more,) = with_corrections([plain], {0: 64, 1: 32})
    extra = 64 * (768 + 3072) + 32 * (3072 + 768)
    assert kept_flops(region, more) == kept_flops(region, plain) + 2 * extra
    for form in ("chain", "batched"):
        alone, both = (segment_time(cost, 2048, region, each, form) for each in (plain, more))
        thin = sum(cost.dense(2048, *shape) for shape in ((768, 64), (64, 3072), (3072, 32), (32, 768)))
        assert both == pytest.approx(alone + thin + cost.gather(2048, 3072, 3072))


def test_the_rank_is_a_knob_that_goes_down_to_nothing() -> None:
    key = Key("r", "correction", 0)
    knob = Knob(key, np.array([[8], [4], [0]]), np.array([0.0, 0.1, 5.0]), np.zeros(3))
    work = Work((6, 4), (5, 5), Key("r", "rank", 0), 2, 2, key)

    descent = Descent({key: knob}, [work], lambda rows, k, n, _rank: float(rows * k * n))
    blocks = 2 * (6 * 5 + 4 * 5)
    assert descent.cost == blocks + 2 * 8 * (10 + 10)
    descent.run(1.0, 0.0)
    assert (descent.levels[key], descent.cost) == (1, blocks + 2 * 4 * (10 + 10))
    descent.run(10.0, 0.0)
    assert (descent.levels[key], descent.cost) == (2, blocks)


def test_a_trained_network_whose_blocks_alone_change_too_much(tmp_path: Path) -> None:
    """Decay has shrunk what lies between the towers, but not to nothing."""
    trained = models.load("towers/shrunk")
    options = Options(
        init=trained.init,
        calib=trained.calib,
        tolerance=0.05,
        provider="cpu",
        objective="flops",
        latency_gate=False,
    )
    report = compile_file(trained.model, tmp_path / "out.onnx", options).report
    found = [site for site in report["sites"] if site["correction"]]
    assert found
    assert {site["decision"] for site in found} == {"split"}
    assert report["verify"]["passed"]
    assert (
        report["output"]["matmul_flops"] < 0.2 * report["input"]["matmul_flops"]
    )  # 0.25 without corrections
    assert report["rewrite"]["max_rel_l2"] < 1e-5
    assert any(node.name.endswith("beside/Down") for node in onnx.load(tmp_path / "out.onnx").graph.node)
