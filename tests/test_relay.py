"""The model run in pieces gives every region what the whole graph gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from models.networks import Network, PlantedNetwork, build, calibration, random_spec
from onnx_decomp import model_io
from onnx_decomp.axes import Region, find_regions
from onnx_decomp.compiler import compile_model
from onnx_decomp.options import Options
from onnx_decomp.probe import Probe, outer_tensors
from onnx_decomp.relay import Flow, Relay
from onnx_decomp.sites import Affine, GraphIndex, Site, find_sites, read_affine
from tests import small
from tests.disguise import disguised

Feeds = dict[str, np.ndarray[Any, Any]]
SMALL: dict[str, Any] = {"width": 24, "hidden": 40, "vocabulary": 32, "outputs": 10, "blocks": 2, "heads": 4}


def planted(**spec: Any) -> PlantedNetwork:
    return build(Network(**(SMALL | spec)))


def branching() -> onnx.ModelProto:
    """Norms between its layers, and an If whose branches read the first hidden layer and one of the stored tensors."""
    rng = np.random.default_rng(0)
    weights = {f"W{at}": rng.standard_normal((12, 12)).astype(np.float32) / 3 for at in range(4)}
    weights |= {"s": np.linspace(0.5, 1.5, 12, dtype=np.float32), "axes": np.array([-1], np.int64)}
    then = helper.make_graph(
        [helper.make_node("Mul", ["a0", "s"], ["left"])], "then", [], [small.value("left", ["N", 12])]
    )
    other = helper.make_graph(
        [helper.make_node("Sub", ["n0", "x"], ["right"])], "else", [], [small.value("right", ["N", 12])]
    )
    nodes = [
        helper.make_node("MatMul", ["x", "W0"], ["h0"]),
        helper.make_node("Tanh", ["h0"], ["a0"]),
        helper.make_node("LayerNormalization", ["a0", "s"], ["n0"]),
        helper.make_node("MatMul", ["n0", "W1"], ["h1"]),
        helper.make_node("Relu", ["h1"], ["a1"]),
        helper.make_node("If", ["flag"], ["c"], then_branch=then, else_branch=other),
        helper.make_node("Add", ["a1", "c"], ["t"]),
        helper.make_node("LayerNormalization", ["t", "s"], ["n1"]),
        helper.make_node("MatMul", ["n1", "W2"], ["h2"]),
        helper.make_node("Softmax", ["h2"], ["p"]),
        helper.make_node("Add", ["p", "n1"], ["q"]),
        helper.make_node("MatMul", ["q", "W3"], ["y"]),
    ]
    inputs = [small.value("x", ["N", 12]), small.value("flag", [], TensorProto.BOOL)]
    return small.model(nodes, inputs, [small.value("y", ["N", 12])], weights)


def opened(proto: onnx.ModelProto) -> tuple[GraphIndex, list[Site], list[Region]]:
    source = model_io.from_proto(proto)
    index = GraphIndex.build(source.proto, lambda tensor: model_io.read_tensor(source, tensor))
    sites = find_sites(index)
    regions = find_regions(index, sites)
    return index, [site for region in regions for site in region.sites], regions


def changed(index: GraphIndex, sites: Sequence[Site]) -> dict[int, Affine]:
    """Other maps for all sites, with a bias where there was none."""
    rng, made = np.random.default_rng(3), {}
    for site in sites:
        old = read_affine(index, site)
        bias = np.zeros(site.shape[1], np.float32) if old.bias is None else old.bias
        factor = rng.uniform(0.5, 1.5, old.weight.shape).astype(np.float32)
        noise = 0.1 * rng.standard_normal(bias.shape).astype(np.float32)
        made[site.index] = Affine(old.weight * factor, bias + noise)
    return made


def assert_fed_alike(proto: onnx.ModelProto, batches: list[Feeds]) -> int:
    """Every region, as it is and with other maps in place. Gives the number of regions."""
    index, sites, regions = opened(proto)
    relay = Relay(index, sites, regions, None)
    assert relay.possible
    outer = {region.name: outer_tensors(index, region) for region in regions}
    whole = Probe(index, sites, None, [name for names in outer.values() for name in names])
    before: list[Feeds] = []
    for placed in ({}, changed(index, sites)):
        flow, after = Flow(relay, list(batches)), []
        for region in regions:
            # Only what lies before a region may change what enters it.
            earlier = {
                site.index: placed[site.index]
                for other in regions[: regions.index(region)]
                for site in other.sites
                if placed
            }
            for feeds, came in zip(batches, flow.to(region, earlier), strict=True):
                wanted = whole.run(feeds, earlier, outer[region.name])
                for name in outer[region.name]:
                    np.testing.assert_allclose(came[name], wanted[name], rtol=2e-5, atol=2e-5, err_msg=name)
                after.append(wanted)
        if placed and len(regions) > 1:
            assert any(not np.allclose(a[n], b[n]) for a, b in zip(after, before, strict=True) for n in a)
        before = after
    return len(regions)


CASES: dict[str, tuple[dict[str, Any], int]] = {
    "a residual stack": ({"kind": "residual", "layers": 3}, 4),
    "on rows": ({"kind": "residual", "layers": 2, "rank": 2, "form": "Gemm", "embedding": "linear"}, 3),
    "norms in pieces": ({"kind": "residual", "norm": "rms", "opset": 13, "positions": True}, 3),
    "a transformer": ({"kind": "transformer", "layers": 2, "sequence": 5}, 5),
    "a causal one with gates": (
        {"kind": "transformer", "causal": True, "feed_forward": "gated", "sequence": 5},
        5,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_regions_of_whole_networks(name: str) -> None:
    spec, least = CASES[name]
    network = planted(**spec)
    batches = [calibration(network, count, seed) for seed, count in enumerate((7, 3))]
    assert assert_fed_alike(network.model, batches) >= least


@pytest.mark.parametrize("flag", [False, True])
def test_a_branch_that_reads_what_lies_far_back(flag: bool) -> None:
    x = np.random.default_rng(1).standard_normal((9, 12)).astype(np.float32)
    assert assert_fed_alike(branching(), [{"x": x, "flag": np.array(flag)}]) >= 3


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("disguise", [False, True], ids=["as built", "in other forms"])
def test_random_networks(seed: int, disguise: bool) -> None:
    """Wherever it is possible, it is right; only shared layers, or forms that nobody mixes, may make it impossible."""
    rng = np.random.default_rng([77, seed])
    network = build(random_spec(rng))
    if disguise:
        network = replace(network, model=disguised(network.model, rng))
    index, sites, regions = opened(network.model)
    if Relay(index, sites, regions, None).possible:
        assert_fed_alike(network.model, [calibration(network, 4)])
    else:
        assert disguise or network.spec.kind == "albert"


def test_a_region_may_be_skipped_on_the_way() -> None:
    """Regions that no one refits are run through all the same; going nowhere runs nothing."""
    network = planted(kind="residual", layers=3)
    index, sites, regions = opened(network.model)
    flow = Flow(Relay(index, sites, regions, None), [calibration(network, 4)])
    placed = changed(index, sites)
    (came,) = flow.to(regions[-1], placed)
    assert flow.number == len(regions)
    assert flow.held == sum(array.nbytes for array in came.values())
    whole = Probe(index, sites, None, outer_tensors(index, regions[-1]))
    wanted = whole.run(calibration(network, 4), placed, outer_tensors(index, regions[-1]))
    for name, array in wanted.items():
        np.testing.assert_allclose(came[name], array, rtol=2e-5, atol=2e-5)
    assert flow.to(regions[-1], {})[0] is came


def further(kind: str) -> onnx.ModelProto:
    """Three regions; an input with a default, or a sequence, is carried past the second."""
    rng = np.random.default_rng(4)
    weights = {f"W{at}": (rng.standard_normal((24, 24)) / 5).astype(np.float32) for at in range(6)}
    weights["s"] = np.ones(24, np.float32)
    nodes, source = [], "x"
    for at in range(3):
        out = "y" if at == 2 else f"g{at}"
        nodes += [
            helper.make_node("MatMul", [source, f"W{2 * at}"], [f"h{at}"]),
            helper.make_node("Relu", [f"h{at}"], [f"a{at}"]),
            helper.make_node("MatMul", [f"a{at}", f"W{2 * at + 1}"], [out]),
        ]
        source = f"n{at}"
        if at < 2:
            nodes.append(helper.make_node("LayerNormalization", [out, "s"], [source]))
        if at == 0 and kind == "sequence":
            weights |= {"parts": np.array([12, 12], np.int64), "zero": np.array(0, np.int64)}
            nodes.append(helper.make_node("SplitToSequence", ["n0", "parts"], ["q"], axis=1))
        if at == 1 and kind == "sequence":
            nodes.append(helper.make_node("SequenceAt", ["q", "zero"], ["r"]))
            nodes.append(helper.make_node("Concat", ["r", "r"], ["d"], axis=1))
        if at == 1:
            nodes.append(helper.make_node("Mul", [source, "d"], ["m"]))
            source = "m"
    inputs = [small.value("x", ["N", 24])]
    if kind == "default":
        inputs.append(small.value("d", [24]))
        weights["d"] = np.linspace(0.2, 1, 24, dtype=np.float32)
    return small.model(nodes, inputs, [small.value("y", ["N", 24])], weights)


@pytest.mark.parametrize("kind", ["default", "sequence"])
def test_what_can_not_be_carried_is_run_whole(kind: str, tmp_path: Path) -> None:
    proto, rng = further(kind), np.random.default_rng(5)
    onnx.checker.check_model(proto, full_check=True)
    index, sites, regions = opened(proto)
    assert len(regions) == 3
    assert not Relay(index, sites, regions, None).possible
    x = rng.standard_normal((800, 6)) @ rng.standard_normal((6, 24))
    assert compiled(proto, {"x": x.astype(np.float32)}, tmp_path) < 1


def compiled(proto: onnx.ModelProto, feeds: Feeds, folder: Path) -> float:
    """FLOPs after over FLOPs before."""
    np.savez(folder / "calib.npz", **feeds)
    told = Options(
        calib=folder / "calib.npz",
        tolerance=0.2,
        provider="cpu",
        latency_gate=False,
        objective="flops",
        threads=1,
    )
    report = compile_model(model_io.from_proto(proto), told)[0].report
    assert report["verify"]["passed"]
    return float(report["output"]["matmul_flops"] / report["input"]["matmul_flops"])


def test_a_weight_shared_around_a_norm_is_run_whole(tmp_path: Path) -> None:
    """One region holds both of its uses; what enters the second is not there yet where the first begins."""
    network = planted(kind="albert", layers=2, embedding="linear", off="untouched")
    index, sites, regions = opened(network.model)
    assert any(len({site.weight for site in region.sites}) < len(region.sites) for region in regions)
    assert not Relay(index, sites, regions, None).possible
    assert compiled(network.model, calibration(network, 300), tmp_path) < 1
