"""Feed-forward layers with fewer units, as products of low rank, and as blocks with a correction of low rank beside
them: speed against the ideal, their FLOPs alone.

Weights are random and of the exact rank; what such sizes do to trained networks is another section's business
(`frontier`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import helper, numpy_helper
from rich.table import Table

from models.bench_common import Section, compare, table, times
from onnx_decomp.axes import Region, find_regions
from onnx_decomp.cost import cpu
from onnx_decomp.passes.folding import compose, decision_of, kept_flops, partition
from onnx_decomp.passes.pricing import segment_time
from onnx_decomp.passes.ridge import masked
from onnx_decomp.passes.splitting import emit
from onnx_decomp.program import Rewrite, Segment, Structure
from onnx_decomp.sites import GraphIndex, find_sites, read_affine

WIDTH, HIDDEN = 768, 3072
ROWS = (16, 128, 512)


@dataclass(frozen=True)
class Way:
    """Units kept, and the rank of both layers (None: whole); blocks, and the rank of what is beside them."""

    name: str
    units: int
    rank: int | None
    blocks: int = 1
    correction: int = 0


WAYS = (
    Way("reduced to 1/2", 1536, None),
    Way("reduced to 1/4", 768, None),
    Way("rank 1/2 of the FLOPs", HIDDEN, 304),
    Way("rank 1/4 of the FLOPs", HIDDEN, 152),
    Way("1/2 of the units x rank", 1536, 256),
    Way("4 blocks + rank 64", HIDDEN, None, 4, 64),
    Way("4 blocks + rank 152", HIDDEN, None, 4, 152),
    Way("8 blocks + rank 96", HIDDEN, None, 8, 96),
)


@dataclass(frozen=True)
class Row:
    """One way at one number of rows, one thread."""

    way: str
    rows: int
    ideal: float
    """FLOPs before over FLOPs after."""
    speedup: float
    interval: tuple[float, float]
    predicted: float


def measure(quick: bool) -> list[Row]:
    """A pair of layers, 768-3072-768, with a Relu between them."""
    ways, rows, seconds = (WAYS[:1] + WAYS[2:3] + WAYS[5:6], (128,), 0.25) if quick else (WAYS, ROWS, 1.0)
    return [row for way in ways for row in _measured(way, rows, seconds)]


def _measured(way: Way, rows: Sequence[int], seconds: float) -> Iterator[Row]:
    original = _model(way)
    index = GraphIndex.build(original, numpy_helper.to_array)
    (region,) = find_regions(index, find_sites(index))
    dense, smaller = compose(region), _segments(region, way)
    affine = [read_affine(index, site) for site in region.sites]
    corrections = {}
    for at, (rows_of, columns_of) in enumerate(partition(region, smaller)):
        if way.correction:
            corrections[at] = affine[at].weight
            affine[at] = masked(affine[at], rows_of, columns_of)
    outcome = decision_of(region, smaller)
    rewrite = Rewrite(region, smaller, tuple(affine), outcome, "applied", corrections=corrections)
    written = emit(index, [rewrite], 17)
    flops = [sum(kept_flops(region, segment) for segment in each) for each in (dense, smaller)]
    for count in rows:
        feeds = {"x": np.random.default_rng(count).standard_normal((count, WIDTH), np.float32)}
        timed = compare(original, written, feeds, 1, seconds)
        before, after = (
            segment_time(cpu(), count, region, each[0], each[0].form) for each in (dense, smaller)
        )
        yield Row(way.name, count, flops[0] / flops[1], timed.speedup, timed.interval, before / after)


def _segments(region: Region, way: Way) -> tuple[Segment, ...]:
    (hidden,) = region.elastic
    keep = {hidden: np.arange(HIDDEN) < way.units}
    both = range(len(region.sites))
    if way.blocks > 1:
        labels = {
            group: np.arange(found.size, dtype=np.int32) * way.blocks // found.size
            for group, found in region.groups.items()
        }
        structure = Structure(tuple(both), labels, way.blocks, "exact", 0.0, 1.0)
        (segment,) = compose(region, [structure])
        return (replace(segment, form="chain", corrections=dict.fromkeys(both, way.correction)),)
    ranks = {} if way.rank is None else dict.fromkeys(both, (way.rank,))
    return tuple(replace(segment, ranks=ranks) for segment in compose(region, (), keep))


def _model(way: Way) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    rank = way.correction or way.rank or WIDTH
    weights = {}
    for name, (k, n) in {"first": (WIDTH, HIDDEN), "second": (HIDDEN, WIDTH)}.items():
        sides = rng.standard_normal((k, rank)), rng.standard_normal((rank, n))
        weights[name] = (sides[0] @ sides[1] / np.sqrt(rank * k)).astype(np.float32)
        weights[f"{name}.bias"] = np.zeros(n, np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "first", "first.bias"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["a"]),
        helper.make_node("Gemm", ["a", "second", "second.bias"], ["y"], name="second"),
    ]
    x, y = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", WIDTH]) for name in ("x", "y")
    )
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "feed-forward", [x], [y], stored)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def tables(rows: Sequence[Row]) -> list[Table]:
    """Speed-ups beside the ideal."""
    made = table(
        "smaller: a feed-forward pair, 768-3072-768 (before / after, one thread, CPU, float32)",
        ["written"],
        ["rows", "FLOPs", "speed-up [95 %]", "share of the ideal", "predicted"],
    )
    for row in rows:
        made.add_row(
            row.way,
            str(row.rows),
            f"{row.ideal:.2f}x",
            times(row.speedup, row.interval),
            f"{row.speedup / row.ideal:.0%}",
            f"{row.predicted:.2f}x",
        )
    return [made]


SECTION = Section("fewer units and low rank: speed against the FLOPs", measure, tables)
