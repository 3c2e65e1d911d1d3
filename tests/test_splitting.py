"""Emission: every form equals the dense-equivalent model, and every other message is the original's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.planted import Planted, PlantedModel, build, calibration
from onnx_decomp.axes import Region, find_regions
from onnx_decomp.cost import cpu, cuda
from onnx_decomp.passes.folding import compose, forms, partition
from onnx_decomp.passes.pricing import with_best_forms
from onnx_decomp.passes.ridge import masked
from onnx_decomp.passes.splitting import emit
from onnx_decomp.probe import Probe
from onnx_decomp.program import Rewrite, Segment, Structure
from onnx_decomp.runtime import Device, RunError, open_session
from onnx_decomp.sites import Affine, GraphIndex, find_sites, read_affine

NOISE = {"float64": 1e-6, "float32": 1e-5, "float16": 5e-3}


def newest_opset() -> int:
    """The newest that the installed onnx and ONNX Runtime both take."""
    for opset in range(onnx.defs.onnx_opset_version(), 20, -1):
        try:
            open_session(build(Planted((4, 4), blocks=2, opset=opset)).model)
        except RunError:
            continue
        return opset
    return 21


def index_of(model: onnx.ModelProto) -> GraphIndex:
    return GraphIndex.build(model, onnx.numpy_helper.to_array)


def only_region(index: GraphIndex) -> Region:
    (region,) = find_regions(index, find_sites(index))
    return region


def true_structure(planted: PlantedModel, region: Region) -> Structure:
    layers = tuple(range(len(planted.labels) - 1))
    labels = dict(zip(region.order, planted.labels, strict=True))
    return Structure(layers, labels, planted.spec.blocks, "exact", 0.0, 1.0)


def rewrite_of(index: GraphIndex, region: Region, segments: tuple[Segment, ...]) -> Rewrite:
    """Masked weights and a bias that was moved a little, as a refit would."""
    affine = []
    for site, (rows, columns) in zip(region.sites, partition(region, segments), strict=True):
        kept = masked(read_affine(index, site), rows, columns)
        bias = np.linspace(-0.1, 0.1, site.shape[1]) if kept.bias is None else kept.bias + 0.01
        affine.append(Affine(kept.weight, bias.astype(np.float32)))
    return Rewrite(region, segments, tuple(affine), "split", "applied")


def check_equal(
    index: GraphIndex, rewrite: Rewrite, feeds: dict[str, np.ndarray], opset: int, target: Device = "cpu"
) -> onnx.ModelProto:
    """The written model against the original graph run with the same dense-equivalent weights."""
    written = emit(index, [rewrite], opset, target)
    onnx.checker.check_model(written, full_check=True)
    region = rewrite.region
    probe = Probe(index, region.sites, None)
    placed = {site.index: affine for site, affine in zip(region.sites, rewrite.affine, strict=True)}
    expected = probe.run(feeds, placed)
    found = open_session(written).run(feeds)
    tolerance = NOISE[str(region.sites[0].dtype)]
    for name, value in expected.items():
        scale = float(np.linalg.norm(value.astype(np.float64)))
        assert np.linalg.norm(found[name].astype(np.float64) - value) <= tolerance * scale, name
    return written


@pytest.mark.parametrize("form", ["MatMul", "Gemm", "Constant", "Transpose", "Identity"])
@pytest.mark.parametrize("opset", [11, 13, 17, 21, newest_opset()])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_storage_opset_and_type(form: str, opset: int, dtype: str) -> None:
    planted = build(Planted((24, 48, 36), blocks=3, form=form, opset=opset, dtype=dtype, seed=opset))
    index = index_of(planted.model)
    region = only_region(index)
    segments = compose(region, [true_structure(planted, region)])
    for form_name in forms(region, segments[0]):
        shaped = (replace(segments[0], form=form_name),)
        rewrite = rewrite_of(index, region, shaped)
        check_equal(index, rewrite, calibration(planted, 9, seed=1), opset)


@pytest.mark.parametrize("activation", ["Relu", "Gelu", "ErfGelu", "Tanh", "Sigmoid"])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("hide", ["all", "hidden", "none"])
def test_every_link_rank_and_border(activation: str, rank: int, hide: str) -> None:
    planted = build(
        Planted((32, 64, 48, 32), blocks=4, activation=activation, rank=rank, hide=hide, opset=20)
    )
    index = index_of(planted.model)
    region = only_region(index)
    assert len(region.sites) == 3
    segments = compose(region, [true_structure(planted, region)])
    for form_name in forms(region, segments[0]):
        shaped = (replace(segments[0], form=form_name),)
        written = check_equal(index, rewrite_of(index, region, shaped), calibration(planted, 8, seed=2), 20)
        gathers = sum(node.op_type == "Gather" for node in written.graph.node)
        assert gathers == (2 if hide == "all" else 0)


@dataclass(frozen=True)
class Drawn:
    """A random run of layers, blocks over a part of it, and units that are dropped."""

    index: GraphIndex
    region: Region
    structure: Structure
    keep: dict[int, NDArray[np.bool_]]
    feeds: dict[str, NDArray[Any]]


def drawn_partition(data: st.DataObject) -> Drawn:
    """Any labels on any axis, over a part of the layers."""
    layers = data.draw(st.integers(1, 4))
    widths = tuple(data.draw(st.integers(4, 20)) for _ in range(layers + 1))
    seed = data.draw(st.integers(0, 1000))
    rank = data.draw(st.sampled_from([2, 3]))
    planted = build(Planted(widths, blocks=2, rank=rank, bias=data.draw(st.booleans()), seed=seed))
    index = index_of(planted.model)
    region = only_region(index)
    rng = np.random.default_rng(seed)
    start = data.draw(st.integers(0, layers - 1))
    stop = data.draw(st.integers(start + 1, layers))
    blocks = data.draw(st.integers(2, 3))
    labels = {group: _labels(rng, widths[group], blocks) for group in range(start, stop + 1)}
    structure = Structure(tuple(range(start, stop)), labels, blocks, "exact", 0, 1)
    keep = {group: _keep(rng, widths, group, structure) for group in range(1, layers)}
    return Drawn(index, region, structure, keep, calibration(planted, 5, seed=seed))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_partitions_with_dropped_units(data: st.DataObject) -> None:
    """Any labels on any axis, dropped units, structure over a part of the run only: same function as the dense one."""
    drawn = drawn_partition(data)
    index, region = drawn.index, drawn.region
    assert region.order == tuple(range(len(region.sites) + 1))
    segments = compose(region, [drawn.structure], drawn.keep)
    offered = _all_forms(region, segments)
    for shaped in offered:
        check_equal(index, rewrite_of(index, region, shaped), drawn.feeds, 17)
    for cost in (cpu(), cuda()):
        assert with_best_forms(cost, 64, region, segments) in offered


def _labels(rng: np.random.Generator, width: int, blocks: int) -> np.ndarray:
    """Every block at least once, some elements dropped."""
    labels = rng.integers(-1, blocks, width).astype(np.int32)
    labels[rng.permutation(width)[:blocks]] = np.arange(blocks)
    return labels


def _keep(rng: np.random.Generator, widths: tuple[int, ...], axis: int, structure: Structure) -> np.ndarray:
    keep = rng.random(widths[axis]) < 0.7
    if axis in structure.labels:
        for block in range(structure.blocks):
            keep[np.flatnonzero(structure.labels[axis] == block)[0]] = True
    else:
        keep[0] = True
    return keep


def _all_forms(region: Region, segments: tuple[Segment, ...]) -> list[tuple[Segment, ...]]:
    shaped: list[tuple[Segment, ...]] = [()]
    for segment in segments:
        shaped = [
            (*before, replace(segment, form=form)) for before in shaped for form in forms(region, segment)
        ]
    return shaped
