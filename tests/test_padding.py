"""Blocks of several sizes in one batched product: the same function, what it costs, and when it is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.planted import Planted, build
from onnx_decomp.axes import Region
from onnx_decomp.cost import SCHEMA, CostModel, cpu, cuda
from onnx_decomp.passes import planning
from onnx_decomp.passes.folding import block_widths, compose, forms, is_padded, kept_flops
from onnx_decomp.passes.layouts import Layout, entering, leaving, own_orders, padded
from onnx_decomp.passes.pricing import region_time, with_best_forms
from onnx_decomp.program import Labels, Segment, Structure
from onnx_decomp.runtime import Device
from tests.forms import Graph
from tests.test_end_to_end import check_outcome, planted_job
from tests.test_lowrank_forms import products
from tests.test_splitting import check_equal, index_of, only_region, rewrite_of, true_structure

Activation = Callable[[Graph, str, int], str]


def erf_gelu(graph: Graph, x: str, _width: int) -> str:
    root, one, half = (
        graph.store(f"{x}.{name}", np.array(value, graph.dtype))
        for name, value in (("root", np.sqrt(2)), ("one", 1), ("half", 0.5))
    )
    inner = graph.add("Add", graph.add("Erf", graph.add("Div", x, root)), one)
    return graph.add("Mul", graph.add("Mul", x, inner), half)


def scaled(graph: Graph, x: str, width: int) -> str:
    """One factor, one summand and one slope for each unit."""
    rng = np.random.default_rng(width)
    factor, summand, slope = (
        graph.store(f"{x}.{name}", rng.standard_normal(width).astype(graph.dtype))
        for name in ("factor", "summand", "slope")
    )
    return graph.add("PRelu", graph.add("Add", graph.add("Mul", x, factor), summand), slope)


def reciprocal(graph: Graph, x: str, _width: int) -> str:
    """What is infinite at 0: padding of zeros would show."""
    return graph.add("Div", x, graph.add("Abs", x))


ACTIVATIONS: dict[str, Activation] = {
    "Relu": lambda graph, x, _width: graph.add("Relu", x),
    "Tanh": lambda graph, x, _width: graph.add("Tanh", x),
    "ErfGelu": erf_gelu,
    "scaled": scaled,
    "sign": reciprocal,
}
FEW = ("Relu", "Tanh")
"""What ONNX Runtime computes in double on a CPU."""


def network(widths: Sequence[int], activation: str, biases: Sequence[bool], dtype: str) -> onnx.ModelProto:
    graph, x = Graph(17, np.dtype(dtype)), "x"
    rng = np.random.default_rng(0)
    for at, (k, n) in enumerate(pairwise(widths)):
        x = ACTIVATIONS[activation](graph, x, k) if at else x
        weight = graph.store(f"W{at}", (rng.standard_normal((k, n)) / np.sqrt(k)).astype(dtype))
        x = graph.add("MatMul", x, weight, name=f"layer{at}")
        if biases[at]:
            x = graph.add("Add", x, graph.store(f"b{at}", rng.standard_normal(n).astype(dtype)))
    return graph.model(widths[0], widths[-1])


def in_blocks(region: Region, labels: Sequence[Labels]) -> tuple[Segment, ...]:
    """All of a region in the blocks of these labels, by axis; in one batched product for each layer."""
    blocks = int(max(each.max() for each in labels)) + 1
    every = tuple(range(len(region.sites)))
    structure = Structure(every, dict(zip(region.order, labels, strict=True)), blocks, "exact", 0, 1)
    return tuple(replace(segment, form="batched") for segment in compose(region, [structure]))


def drawn_labels(data: st.DataObject, width: int, blocks: int) -> Labels:
    """Sizes above 0, side by side or scattered."""
    cuts = data.draw(
        st.lists(st.integers(1, width - 1), min_size=blocks - 1, max_size=blocks - 1, unique=True)
    )
    labels = np.searchsorted(np.sort(cuts), np.arange(width), side="right").astype(np.int32)
    if data.draw(st.booleans()):
        labels = np.random.default_rng(width).permutation(labels)
    return labels


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_partitions(data: st.DataObject) -> None:
    """Any sizes, on either target: the function of the dense-equivalent model, in as many multiplications as told."""
    blocks, layers = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 3))
    widths = [data.draw(st.integers(blocks, 24)) for _ in range(layers + 1)]
    dtype = data.draw(st.sampled_from(["float32", "float16", "float64"]))
    activation = data.draw(st.sampled_from(FEW if dtype == "float64" else sorted(ACTIVATIONS)))
    biases = [data.draw(st.booleans()) for _ in range(layers)]
    index = index_of(network(widths, activation, biases, dtype))
    region = only_region(index)
    segments = in_blocks(region, [drawn_labels(data, width, blocks) for width in widths])
    assert "batched" in forms(region, segments[0])
    feeds = {"x": np.random.default_rng(1).standard_normal((5, widths[0])).astype(dtype)}
    target: Device = data.draw(st.sampled_from(["cpu", "cuda"]))
    written = check_equal(index, rewrite_of(index, region, segments), feeds, 17, target)
    assert kept_flops(region, segments[0]) == sum(2 * k * n for k, n in products(written))
    assert is_padded(region, segments[0]) == any(
        len(set(block_widths(region, segments[0], at))) > 1 for at in range(layers)
    )


def test_nothing_but_finite_numbers_meets_the_padding() -> None:
    """1 / x is computed of no zero that was not there before."""
    widths = (6, 10, 6)
    index = index_of(network(widths, "sign", (False, False), "float32"))
    region = only_region(index)
    labels = [np.repeat([0, 1], sizes).astype(np.int32) for sizes in ((3, 3), (7, 3), (3, 3))]
    segments = in_blocks(region, labels)
    affine = tuple(replace(each, bias=None) for each in rewrite_of(index, region, segments).affine)
    rewrite = replace(rewrite_of(index, region, segments), affine=affine)
    feeds = {"x": np.random.default_rng(1).standard_normal((5, 6)).astype(np.float32)}
    written = check_equal(index, rewrite, feeds, 17)
    assert (2, 7, 3) in {tuple(tensor.dims) for tensor in written.graph.initializer}


def test_only_borders_are_gathered() -> None:
    """Blocks that are uneven on hidden axes alone are padded in the weights, and nowhere else."""
    for sizes, gathers in (((4, 4), 0), ((5, 3), 2)):
        index = index_of(network((8, 12, 16, 8), "Relu", (True, True, True), "float32"))
        region = only_region(index)
        labels = [np.repeat([0, 1], each).astype(np.int32) for each in (sizes, (7, 5), (10, 6), sizes)]
        feeds = {"x": np.ones((5, 8), np.float32)}
        rewrite = rewrite_of(index, region, in_blocks(region, labels))
        written = check_equal(index, rewrite, feeds, 17, "cuda")
        assert sum(node.op_type == "Gather" for node in written.graph.node) == gathers


def test_padding_repeats_positions_in_their_runs() -> None:
    blocks = [np.arange(8), np.arange(8, 12)]
    assert [each.tolist() for each in padded(blocks)] == [[*range(8)], [8, 9, 10, 11, 8, 9, 10, 11]]
    into, out = (way(np.arange(12), padded(blocks)) for way in (entering, leaving))
    assert into.index is not None
    assert out.index is not None
    assert (into.index.tolist(), into.run, into.width) == ([*range(12), 8, 9, 10, 11], 4, 12)
    assert (out.index.tolist(), out.run, out.width) == ([*range(12)], 4, 16)


def test_an_empty_block_is_not_padded() -> None:
    index = index_of(network((8, 12), "Relu", (True,), "float32"))
    region = only_region(index)
    labels = {0: np.repeat([0, 1, 2], (4, 3, 1)), 1: np.repeat([0, 1], (8, 4))}
    structure = Structure((0,), {g: each.astype(np.int32) for g, each in labels.items()}, 3, "exact", 0, 1)
    (segment,) = compose(region, [structure])
    assert list(forms(region, segment)) == ["parallel"]


# --- chosen -------------------------------------------------------------------------------------------------------


def uneven(widths: Sequence[int], shares: Sequence[float], hidden: bool = False) -> tuple[Region, Segment]:
    """Layers whose blocks have these shares of every axis; of hidden axes alone, the others even."""
    planted = build(Planted(tuple(widths), blocks=len(shares), hide="none"))
    region = only_region(index_of(planted.model))
    labels = []
    for at, width in enumerate(widths):
        border = at in (0, len(widths) - 1)
        cuts = np.linspace(0, 1, len(shares) + 1)[1:] if hidden and border else np.cumsum(shares)
        labels.append(
            np.searchsorted(np.round(cuts * width)[:-1], np.arange(width), side="right").astype(np.int32)
        )
    (segment,) = in_blocks(region, labels)
    return region, replace(segment, form="dense")


def waste(region: Region, segment: Segment) -> float:
    return kept_flops(region, replace(segment, form="batched")) / kept_flops(region, segment)


def chosen(cost: CostModel, rows: int, region: Region, segment: Segment, padding: bool = True) -> str:
    return with_best_forms(cost, rows, region, [segment], padding)[0].form


NEARLY = (0.15, 0.14, 0.13, 0.12, 0.12, 0.12, 0.11, 0.11)
UNEVEN = (0.5, 0.25, 0.125, 0.125)


@pytest.mark.parametrize("rows", [1, 128, 1024])
def test_a_gpu_pads_blocks_that_are_nearly_even(rows: int) -> None:
    """Where one product of all blocks saves starting eight: padded FLOPs under 1.5 times those that are needed."""
    for widths, hidden in (((2048, 2048), False), ((1024, 4096, 1024), True)):
        region, segment = uneven(widths, NEARLY, hidden)
        assert 1 < waste(region, segment) < 1.5
        assert chosen(cuda(), rows, region, segment) == "batched"


@pytest.mark.parametrize("rows", [4096, 16384])
def test_a_gpu_does_not_pad_what_would_cost_more(rows: int) -> None:
    region, segment = uneven((4096, 16384, 4096), UNEVEN)
    assert waste(region, segment) > 2.5
    assert chosen(cuda(), rows, region, segment) == "chain"


@pytest.mark.parametrize("rows", [16, 128, 512])
def test_a_cpu_does_not_gather_columns_to_pad_them(rows: int) -> None:
    for widths, form in (((1024, 1024), "parallel"), ((768, 3072, 768), "chain")):
        for shares in (NEARLY, UNEVEN):
            assert chosen(cpu(), rows, *uneven(widths, shares)) == form


def test_what_is_chosen_is_the_cheapest_with_its_gathers() -> None:
    """Whatever the sizes: no form that can be written is predicted to take less time."""
    rng = np.random.default_rng(0)
    seen = set()
    for cost in (cpu(), cuda()):
        for _ in range(40):
            blocks = int(rng.integers(2, 9))
            widths = [int(rng.integers(blocks, 1024)) for _ in range(int(rng.integers(2, 4)))]
            region, segment = uneven(widths, rng.dirichlet(np.full(blocks, 5.0)), bool(rng.integers(2)))
            rows = int(rng.choice([1, 16, 512, 4096]))
            times = {
                form: region_time(
                    cost,
                    rows,
                    Layout.of(region, [replace(segment, form=form)], own_orders(region, [segment])),
                )
                for form in forms(region, segment)
            }
            found = chosen(cost, rows, region, segment)
            assert times[found] == min(times.values())
            seen.add((type(cost).__name__, found == "batched"))
    assert seen >= {("CPU", False), ("CUDA", False), ("CUDA", True)}


@pytest.mark.parametrize("cost", [cpu(), cuda()])
def test_blocks_over_a_part_of_the_layers(cost: CostModel) -> None:
    """What lies between blocks and the layers behind them is joined, and gathered where it was padded."""
    planted = build(Planted((64, 128, 96, 64), blocks=4, uneven=True, hide="none"))
    region = only_region(index_of(planted.model))
    whole = true_structure(planted, region)
    labels = {group: whole.labels[group] for group in region.order[:2]}
    segments = compose(region, [replace(whole, sites=(0,), labels=labels)])
    gathered = {}
    for form in forms(region, segments[0]):
        layout = Layout.of(region, (replace(segments[0], form=form), *segments[1:]))
        gathered[form] = [crossing.index is not None for _, crossing in layout.crossings()]
    assert gathered == {"parallel": [False, False], "batched": [True, True]}
    found = with_best_forms(cost, 512, region, segments)
    assert [each.form for each in found[1:]] == ["dense"]


def test_fewer_flops_are_not_padded() -> None:
    """Who asks for FLOPs or bytes does not get more of them for time; even blocks are batched all the same."""
    region, segment = uneven((2048, 2048), NEARLY)
    assert chosen(cuda(), 128, region, segment, padding=False) == "parallel"
    region, segment = uneven((2048, 2048), (0.25,) * 4)
    assert chosen(cuda(), 128, region, segment, padding=False) == "batched"


# --- the whole way ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (4, 4), (None, 128)])
def test_a_fixed_batch_is_what_is_priced(
    batch: int | None, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the model says how many samples it takes, that is what one run of it has to do."""
    planted = build(Planted((64, 64), off="zero", gain=3, hide="hidden"))
    if batch is not None:
        for value in (planted.model.graph.input[0], planted.model.graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_value = batch
    asked = []

    def recorded(cost: CostModel, count: int, *rest: Any) -> tuple[Segment, ...]:
        asked.append(count)
        return with_best_forms(cost, count, *rest)

    monkeypatch.setattr(planning, "with_best_forms", recorded)
    made = planted_job(tmp_path, planted, 700)
    code, report = made.run("--provider", "cpu", "--no-latency-gate", "--objective", "flops", "-q")
    assert code == 0
    assert report["kept"]
    assert set(asked) == {rows}


@pytest.mark.parametrize("objective", ["latency", "flops"])
def test_compiled_for_a_gpu(objective: str, tmp_path: Path) -> None:
    """The report counts what is multiplied in the end. (A slow GPU: a small model does not gain on a fast one.)"""
    spec = Planted((256, 512, 256), blocks=6, uneven=True, off="zero", gain=3, hide="hidden", seed=2)
    made = planted_job(tmp_path, build(spec), 1200)
    slow = {"flops": 2e6, "bandwidth": 1e7, "copies": 1e7, "kernel": 2.0, "recorded": 1.0, "element": 4}
    table = tmp_path / "cost.json"
    table.write_text(json.dumps({"schema": SCHEMA, "provider": "cuda", "tables": {"float32": slow}}), "utf-8")
    asked = ("--provider", "cuda", "--no-latency-gate", "--objective", objective, "--cost", str(table), "-q")
    code, report = made.run(*asked)
    assert code == 0
    check_outcome(made, report)
    assert {site["form"] for site in report["sites"]} == {"batched" if objective == "latency" else "chain"}
    counted = sum(2 * k * n for k, n in products(onnx.load(made.out)))
    assert report["output"]["matmul_flops"] == counted
    assert sum(site["flop_ratio"] * 2 * 256 * 512 for site in report["sites"]) == pytest.approx(counted)
