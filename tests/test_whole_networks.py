"""Whole networks: axes through norms, residual adds, gates, heads and shared weights; found, folded and written."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.networks import EVERY, Network, PlantedNetwork, build, calibration, random_spec
from onnx_decomp.axes import Region, find_regions
from onnx_decomp.compiler import compile_file
from onnx_decomp.options import Options
from onnx_decomp.passes.folding import compose, forms, is_padded, partition
from onnx_decomp.passes.ridge import masked
from onnx_decomp.passes.splitting import emit
from onnx_decomp.probe import Probe
from onnx_decomp.program import Rewrite, Segment, Structure
from onnx_decomp.runtime import open_session
from onnx_decomp.sites import GraphIndex, find_sites, read_affine
from tests.disguise import FUSED, disguised, fused

SMALL: dict[str, Any] = {"width": 64, "hidden": 128, "blocks": 4, "heads": 4, "layers": 2, "outputs": 16}
"""Hidden axes of 128 with blocks of 32: exact components need no more."""

KINDS = {
    "pre-norm residual stack": Network("residual", vocabulary=512, **SMALL),
    "the same with RMS norms in pieces": Network("residual", norm="rms", vocabulary=512, **SMALL),
    "residual stack without norms": Network("residual", norm="none", vocabulary=512, **SMALL),
    "residual stack with batch norms": Network(
        "residual", norm="batch", rank=2, embedding="linear", vocabulary=64, **SMALL
    ),
    "gated feed-forward": Network("gated", rank=2, **SMALL),
    "gated residual stack": Network("residual", feed_forward="gated", vocabulary=512, **SMALL),
    "one weight for all layers": Network("albert", vocabulary=512, **SMALL),
    "towers": Network("towers", rank=2, **SMALL | {"layers": 4}),
    "a shared trunk with private heads": Network("towers", rank=2, trunk=1, **SMALL | {"layers": 4}),
    "transformer": Network("transformer", vocabulary=512, **SMALL),
    "causal transformer": Network("transformer", causal=True, vocabulary=512, activation="ErfGelu", **SMALL),
}


FORMS = ("plain", "any", "old", *FUSED)


def true_structures(network: PlantedNetwork, regions: list[Region]) -> dict[str, Structure]:
    """The planted blocks of each region that has any."""
    found = {}
    for region in regions:
        labels: dict[int, np.ndarray] = {}
        sites = []
        for at, site in enumerate(region.sites):
            sides = network.labels[f"{site.node}.{site.part}.weight" if site.part else site.weight]
            if any((side == EVERY).any() for side in sides):
                continue
            sites.append(at)
            for group, units, side in zip(region.ends[at], region.units[at], sides, strict=True):
                labels.setdefault(group, np.zeros(region.groups[group].size, np.int32))[units] = side
        if sites:
            blocks = network.spec.blocks
            found[region.name] = Structure(tuple(sites), labels, blocks, "exact", 0.0, 1.0)
    return found


def masked_rewrite(index: GraphIndex, region: Region, structure: Structure) -> Rewrite:
    """Nothing made up for, and biases moved a little, as a refit would."""
    segments = compose(region, [structure])
    affine = [
        masked(read_affine(index, site), rows, columns)
        for site, (rows, columns) in zip(region.sites, partition(region, segments), strict=True)
    ]
    return Rewrite(region, segments, tuple(affine), "split", "applied")


def in_any_form(rewrite: Rewrite, rng: np.random.Generator) -> tuple[Segment, ...]:
    found = [list(forms(rewrite.region, segment)) for segment in rewrite.segments]
    return tuple(
        replace(segment, form=offered[rng.integers(len(offered))])
        for segment, offered in zip(rewrite.segments, found, strict=True)
    )


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 100_000), keep=st.integers(1, 255), form=st.sampled_from(FORMS))
def test_what_is_written_equals_the_masked_dense_network(seed: int, keep: int, form: str) -> None:
    """Any network, any subset of its regions rewritten: the same function as the original with masked weights.

    Its products are written as they are built, in forms at random, or its attentions are single operators; blocks in
    any form that they can have, for either provider.
    """
    rng = np.random.default_rng(seed)
    kind = {"kind": "transformer"} if form in FUSED else {}
    network = build(random_spec(rng, off="untouched", uneven=bool(rng.random() < 0.3), **kind))
    if form in FUSED:
        network = replace(network, model=fused(network.model, form))
    elif form != "plain":
        network = replace(network, model=disguised(network.model, rng, old=form == "old"))
    index = GraphIndex.build(network.model, onnx.numpy_helper.to_array)
    regions = find_regions(index, find_sites(index))
    structures = true_structures(network, regions)
    rewrites = [
        masked_rewrite(index, region, structures[region.name])
        for number, region in enumerate(regions)
        if region.name in structures and keep >> (number % 8) & 1
    ]
    rewrites = [replace(each, segments=in_any_form(each, rng)) for each in rewrites]
    written = emit(index, rewrites, network.spec.opset, "cuda" if rng.random() < 0.5 else "cpu")
    onnx.checker.check_model(written, full_check=form not in FUSED)
    feeds = calibration(network, 5, seed)
    sites = [site for region in regions for site in region.sites]
    placed = {
        site.index: affine
        for rewrite in rewrites
        for site, affine in zip(rewrite.region.sites, rewrite.affine, strict=True)
    }
    expected = Probe(index, sites, None).run(feeds, placed)["y"].astype(np.float64)
    found = open_session(written).run(feeds)["y"]
    noise = 1e-4 if form in FUSED else 1e-5  # of other kernels, and without norms it grows
    assert np.linalg.norm(found - expected) <= noise * np.linalg.norm(expected)
    if any(is_padded(rewrite.region, segment) for rewrite in rewrites for segment in rewrite.segments):
        return
    gathers = Counter(node.op_type for node in written.graph.node)["Gather"]
    assert gathers <= Counter(node.op_type for node in network.model.graph.node)["Gather"], (
        "orders are folded"
    )


def compiled(network: PlantedNetwork, folder: Path) -> tuple[dict[str, Any], onnx.ModelProto]:
    onnx.save(network.model, folder / "in.onnx")
    np.savez(folder / "init.npz", **network.snapshot)
    np.savez(folder / "calib.npz", **calibration(network, 300, 1))  # type: ignore[arg-type]
    options = Options(
        init=folder / "init.npz",
        calib=folder / "calib.npz",
        provider="cpu",
        latency_gate=False,
        objective="flops",
    )
    report = compile_file(folder / "in.onnx", folder / "out.onnx", options).report
    return report, onnx.load(folder / "out.onnx")


def blocks_of(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == block).tolist()) for block in np.unique(labels)}


IN_OTHER_FORMS = ("pre-norm residual stack", "gated feed-forward", "towers")


def in_form(network: PlantedNetwork, form: str) -> PlantedNetwork:
    """A network in another form; the snapshot of an Attention holds packed weights too."""
    if form == "any":
        return replace(network, model=disguised(network.model, np.random.default_rng(0)))
    if form not in FUSED:
        return network
    initial = dict(network.initial)
    if form == "Attention":
        for layer in range(network.spec.layers):
            place = f"layers.{layer}.attention"
            parts = [initial.pop(f"{place}.{part}.weight") for part in ("query", "key", "value")]
            initial[f"{place}.weight"] = np.hstack(parts)
    return replace(network, model=fused(network.model, form), initial=initial)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "plain") for name in KINDS),
        *((name, "any") for name in IN_OTHER_FORMS),
        *(("transformer", form) for form in FUSED),
    ],
)
def test_planted_networks_are_recovered_exactly(name: str, form: str, tmp_path: Path) -> None:
    network = in_form(build(KINDS[name]), form)
    report, written = compiled(network, tmp_path)
    for site in report["sites"]:
        part = f"{site['node'].replace('/', '.')}.weight"  # of an Attention, which has several
        rows, columns = network.labels[part if site["op"] == "Attention" else site["weight"]]
        if (rows == EVERY).any() or (columns == EVERY).any():
            assert site["structure"] is None or site["decision"] != "split", site["node"]
            continue
        assert {frozenset(block["rows"]) for block in site["structure"]["blocks"]} == blocks_of(rows)
        assert {frozenset(block["cols"]) for block in site["structure"]["blocks"]} == blocks_of(columns)
        assert (site["decision"], site["flop_ratio"]) == ("split", 0.25), site["node"]
    assert report["verify"]["outputs"]["y"]["rel_l2"] < 1e-5
    operators = Counter(node.op_type for node in written.graph.node)
    assert operators["Gather"] == Counter(node.op_type for node in network.model.graph.node)["Gather"]


def test_without_norms_one_split_and_one_concat(tmp_path: Path) -> None:
    """A network of independent parts comes out as independent parallel networks, residual adds included."""
    network = build(Network("residual", norm="none", vocabulary=512, **SMALL | {"layers": 3}))
    _, written = compiled(network, tmp_path)
    joined = [
        node for node in written.graph.node if node.op_type in ("Split", "Concat") and "decomp" in node.name
    ]
    assert [node.op_type for node in joined if "NewShape" not in node.name] == ["Split", "Concat"]


def test_a_shared_weight_is_stored_once(tmp_path: Path) -> None:
    network = build(Network("albert", vocabulary=512, **SMALL))
    _, written = compiled(network, tmp_path)
    names = [
        tensor.name for tensor in written.graph.initializer if tensor.name.startswith("shared.up.weight")
    ]
    assert names == [f"shared.up.weight.decomp.block_{block:02d}" for block in range(4)]
