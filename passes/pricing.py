"""Predicted time of the ways to write a region: what the plan goes by before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

from onnx_decomp.axes import Region
from onnx_decomp.cost import CostModel
from onnx_decomp.passes.folding import correction_widths, forms, is_padded, kept_flops, written_widths
from onnx_decomp.passes.layouts import Crossing, Layout, exchanged, own_orders
from onnx_decomp.program import Form, Segment


def segment_time(cost: CostModel, rows: int, region: Region, segment: Segment, form: Form) -> float:
    """Predicted microseconds of one segment in the given form, without what is gathered at its borders."""
    shaped = replace(segment, form=form)
    return _blocks_time(cost, rows, region, shaped) + sum(
        _correction_time(cost, rows, region, shaped, site) for site in shaped.sites
    )


def _correction_time(cost: CostModel, rows: int, region: Region, segment: Segment, site: int) -> float:
    """Two thin products beside the blocks, the first of what the blocks have to be joined for."""
    widths = correction_widths(region, segment, site)
    if widths is None:
        return 0.0
    read, rank, made = widths
    joined = 0.0
    if region.sites[site].input not in region.entries:
        joined = cost.gather(rows, read, read)
        if is_padded(region, segment):
            joined += cost.gather(rows, read, 1)
    return joined + cost.dense(rows, read, rank) + cost.dense(rows, rank, made)


def _blocks_time(cost: CostModel, rows: int, region: Region, segment: Segment) -> float:
    layers = [written_widths(region, segment, site) for site in segment.sites]
    if segment.form == "dense":
        return sum(cost.dense(rows, k, n) for (widths,) in layers for k, n in pairwise(widths))
    if segment.form == "batched":
        return cost.batched(rows, layers, region.one_row)
    return cost.chain(rows, layers)


def with_best_forms(
    cost: CostModel, rows: int, region: Region, segments: Sequence[Segment], padding: bool = True
) -> tuple[Segment, ...]:
    """The same segments, each in the form with the lowest predicted time, the Gathers at its borders included.

    padding: blocks of several sizes may be padded to one, which takes less time, but more FLOPs and bytes.
    """
    orders = own_orders(region, segments)

    def offered(segment: Segment) -> list[Segment]:
        found = [replace(segment, form=form) for form in forms(region, segment)]
        return [each for each in found if padding or not is_padded(region, each)]

    def time(number: int, segment: Segment) -> tuple[float, bool]:
        layout = Layout.of(region, exchanged(segments, number, segment), orders)
        gathered = sum(_crossing_time(cost, rows, crossing) for _, crossing in layout.crossings(number))
        # Of equals the batched one: nothing in it has several sizes, which a GPU is told anew at every run.
        return segment_time(cost, rows, region, segment, segment.form) + gathered, segment.form != "batched"

    def best(number: int, segment: Segment) -> Segment:
        found = offered(segment)
        return min(found, key=partial(time, number)) if len(found) > 1 else found[0]

    return tuple(best(number, segment) for number, segment in enumerate(segments))


def region_time(cost: CostModel, rows: int, layout: Layout) -> float:
    """Predicted microseconds of a region's products and of the rearrangements at its borders.

    A product in another form is left in it, or stands between Transposes, each about a Gather of long runs.
    """
    time = sum(segment_time(cost, rows, layout.region, segment, segment.form) for segment in layout.segments)
    time += sum(_crossing_time(cost, rows, crossing) for _, crossing in layout.crossings())
    if _stays(layout):
        return time
    return time + sum(cost.gather(rows, site.moved, site.moved) for site in layout.region.sites if site.moved)


def _crossing_time(cost: CostModel, rows: int, crossing: Crossing) -> float:
    return 0.0 if crossing.index is None else cost.gather(rows, len(crossing.index), crossing.run)


def _stays(layout: Layout) -> bool:
    """The region is as it was: whole, and in one piece."""
    region, segments = layout.region, layout.segments
    whole = sum(site.flops for site in region.sites)
    return all(segment.blocks == 1 for segment in segments) and whole == sum(
        kept_flops(region, segment) for segment in segments
    )
