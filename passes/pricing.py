"""Predicted time of the ways to write a region: what the plan goes by before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from onnx_decomp.axes import Region
from onnx_decomp.cost import CostModel, Layer
from onnx_decomp.passes.folding import Layout, block_widths, correction_widths, forms, kept_flops
from onnx_decomp.program import Form, Segment


def segment_time(cost: CostModel, rows: int, region: Region, segment: Segment, form: Form) -> float:
    """Predicted microseconds of one segment in the given form."""
    layers = [block_widths(region, segment, site) for site in segment.sites]
    return _blocks_time(cost, rows, segment, layers, form) + sum(
        _correction_time(cost, rows, region, segment, site) for site in segment.sites
    )


def _correction_time(cost: CostModel, rows: int, region: Region, segment: Segment, site: int) -> float:
    """Two thin products beside the blocks, the first of what the blocks have to be joined for."""
    widths = correction_widths(region, segment, site)
    if widths is None:
        return 0.0
    read, rank, made = widths
    inside = region.sites[site].input not in region.entries
    joined = cost.gather(rows, read, read) if inside else 0.0
    return joined + cost.dense(rows, read, rank) + cost.dense(rows, rank, made)


def _blocks_time(cost: CostModel, rows: int, segment: Segment, layers: Sequence[Layer], form: Form) -> float:
    if form == "dense":
        return sum(cost.dense(rows, k, n) for (widths,) in layers for k, n in pairwise(widths))
    if form == "batched":
        return sum(cost.batched(rows, segment.blocks, k, n) for (k, n), *_ in layers)
    if form == "parallel":
        (layer,) = layers
        return cost.parallel(rows, layer)
    return cost.chain(rows, layers)


def with_best_forms(
    cost: CostModel, rows: int, region: Region, segments: Sequence[Segment]
) -> tuple[Segment, ...]:
    """The same segments, each in the form with the lowest predicted time."""

    def best(segment: Segment) -> Form:
        return min(forms(region, segment), key=lambda form: segment_time(cost, rows, region, segment, form))

    return tuple(replace(segment, form=best(segment)) for segment in segments)


def region_time(cost: CostModel, rows: int, layout: Layout) -> float:
    """Predicted microseconds of a region's products and of the rearrangements at its borders.

    A product in another form is left in it, or stands between Transposes, each about a Gather of long runs.
    """
    time = sum(segment_time(cost, rows, layout.region, segment, segment.form) for segment in layout.segments)
    for _, crossing in layout.crossings():
        if crossing.index is not None:
            time += cost.gather(rows, len(crossing.index), crossing.run)
    if _stays(layout):
        return time
    return time + sum(cost.gather(rows, site.moved, site.moved) for site in layout.region.sites if site.moved)


def _stays(layout: Layout) -> bool:
    """The region is as it was: whole, and in one piece."""
    region, segments = layout.region, layout.segments
    whole = sum(site.flops for site in region.sites)
    return all(segment.blocks == 1 for segment in segments) and whole == sum(
        kept_flops(region, segment) for segment in segments
    )
