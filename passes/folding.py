"""Fold the permutations that make blocks contiguous into the weights on either side, where they cost nothing.

A hidden axis may take any order: the columns of the site before it and the rows of the site after it are stored in
that order. An axis at the border of a region is pinned. There the blocks are used as they lie when each is one
contiguous run; otherwise one Gather brings them together, of whole runs of columns where the blocks consist of such.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from onnx_decomp.program import DROPPED, Form, Labels, Segment, Structure

Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Layout:
    """How one axis is stored: `order` lists the kept elements, the blocks one after another.

    gather: the axis is pinned and its own order is another one, so it must be rearranged at run time.
    run: elements that stay side by side when it is (1: single columns).
    """

    order: Indices
    size: int
    gather: bool
    run: int = 1

    @property
    def identity(self) -> bool:
        return not self.gather and len(self.order) == self.size


def blocks_in_order(labels: Labels) -> list[int]:
    """Block ids by where they first occur."""
    kept = labels[labels != DROPPED]
    blocks, first = np.unique(kept, return_index=True)
    return [int(blocks[at]) for at in np.argsort(first)]


def adopt_dropped(labels: Labels) -> Labels:
    """Give each dropped element of a pinned axis to the block before it (the first ones to the block after).

    Reading an input that nothing learned from costs a few multiplications in its block; leaving it out would break a
    contiguous run and cost a Gather.
    """
    kept = np.flatnonzero(labels != DROPPED)
    if not kept.size:
        return np.zeros_like(labels)
    before = np.searchsorted(kept, np.arange(len(labels)), side="right") - 1
    return labels[kept[np.maximum(before, 0)]]


def is_contiguous(labels: Labels) -> bool:
    """Nothing is dropped and every block is one run."""
    changes = int(np.count_nonzero(np.diff(labels)))
    return bool((labels != DROPPED).all()) and changes == len(np.unique(labels)) - 1


def settle_border(labels: Labels) -> Labels:
    """Labels of a pinned axis as they will be used: dropped elements adopted where that spares a Gather."""
    adopted = adopt_dropped(labels)
    return adopted if is_contiguous(adopted) or not (labels == DROPPED).any() else labels


def pinned_layout(labels: Labels, blocks: Sequence[int]) -> Layout:
    """An axis whose own order is part of the interface. `blocks`: their order, where they have to be gathered."""
    if is_contiguous(labels):
        return Layout(np.arange(len(labels)), len(labels), gather=False)
    order = np.concatenate([np.flatnonzero(labels == block) for block in blocks])
    return Layout(order, len(labels), gather=True, run=_run_length(order, len(labels)))


def free_layout(before: Labels, after: Labels) -> Layout:
    """A hidden axis: by the blocks that write it, then by those that read it."""
    kept = np.flatnonzero((before != DROPPED) & (after != DROPPED))
    order = kept[np.lexsort((after[kept], before[kept]))]
    return Layout(order, len(before), gather=False)


def _run_length(order: Indices, size: int) -> int:
    """Largest r such that the order moves aligned groups of r consecutive elements."""
    starts = np.flatnonzero(np.diff(order, prepend=-2) != 1)
    bounds = np.concatenate([starts, order[starts], [size, len(order)]])
    return int(np.gcd.reduce(bounds))


def layouts(segments: Sequence[Segment]) -> list[Layout]:
    """One layout for each axis of a region, first to last; the first and the last axis are pinned."""
    first, last = segments[0].labels[0], segments[-1].labels[-1]
    found = [pinned_layout(first, blocks_in_order(first))]
    for segment, follower in zip(segments, [*segments[1:], None], strict=True):
        found += [free_layout(labels, labels) for labels in segment.labels[1:-1]]
        if follower is not None:
            found.append(free_layout(segment.labels[-1], follower.labels[0]))
    # Written in the order in which the last segment takes its blocks in, so that one Gather does for both.
    entering = segments[-1].labels[0][found[segments[-1].start].order]
    found.append(pinned_layout(last, blocks_in_order(entering)))
    return found


def compose(
    widths: Sequence[int], structures: Sequence[Structure], keep: Sequence[NDArray[np.bool_] | None]
) -> tuple[Segment, ...]:
    """Segments that cover a region: its structures in their places, dense layers between them, reduced to `keep`.

    widths: length of each axis. keep: for each axis the units that stay, or None for all of them; the first and the
    last axis always stay whole. A unit dropped on one side of an axis is dropped on both.
    """
    segments: list[Segment] = []
    at = 0
    for structure in structures:
        segments += _dense(widths, at, structure.start)
        segments.append(Segment(structure.start, structure.stop, structure.labels, structure.blocks))
        at = structure.stop
    segments += _dense(widths, at, len(widths) - 1)
    gone = _dropped(widths, segments, keep)
    return tuple(_apply(segment, gone, len(widths) - 1) for segment in segments)


def _dense(widths: Sequence[int], start: int, stop: int) -> list[Segment]:
    if start == stop:
        return []
    labels = tuple(np.zeros(width, np.int32) for width in widths[start : stop + 1])
    return [Segment(start, stop, labels, 1)]


def _dropped(
    widths: Sequence[int], segments: Sequence[Segment], keep: Sequence[NDArray[np.bool_] | None]
) -> list[NDArray[np.bool_]]:
    gone = [np.zeros(width, bool) for width in widths]
    for axis in range(1, len(widths) - 1):
        stays = keep[axis]
        if stays is not None:
            gone[axis] |= ~stays
        for segment in segments:
            if segment.start <= axis <= segment.stop:
                gone[axis] |= segment.labels[axis - segment.start] == DROPPED
    return gone


def _apply(segment: Segment, gone: Sequence[NDArray[np.bool_]], last: int) -> Segment:
    labels = []
    for axis, axis_labels in enumerate(segment.labels, start=segment.start):
        if axis == last:
            labels.append(adopt_dropped(axis_labels))  # an output has to come from somewhere
        elif axis == 0:
            labels.append(settle_border(axis_labels))
        else:
            labels.append(np.where(gone[axis], np.int32(DROPPED), axis_labels))
    return replace(segment, labels=tuple(labels))


def block_sizes(segment: Segment, axis: int) -> list[int]:
    """Number of kept elements of each block on one axis of a segment, by block id."""
    labels = segment.labels[axis - segment.start]
    return [int(size) for size in np.bincount(labels[labels != DROPPED], minlength=segment.blocks)]


def kept_flops(segment: Segment) -> list[int]:
    """Multiply-adds times two for one row, of each site of the segment."""
    return [
        2
        * sum(k * n for k, n in zip(block_sizes(segment, axis), block_sizes(segment, axis + 1), strict=True))
        for axis in range(segment.start, segment.stop)
    ]


def partition(segments: Sequence[Segment]) -> list[tuple[Labels, Labels]]:
    """Row and column labels of each site of a region."""
    return [
        (segment.labels[at], segment.labels[at + 1])
        for segment in segments
        for at in range(segment.stop - segment.start)
    ]


def forms(segment: Segment) -> Iterator[Form]:
    """Forms in which a segment can be written at all."""
    if segment.blocks == 1:
        yield "dense"
        return
    yield "chain" if segment.stop - segment.start > 1 else "parallel"
    sizes = [block_sizes(segment, axis) for axis in range(segment.start, segment.stop + 1)]
    if all(len(set(axis)) == 1 for axis in sizes):
        yield "batched"
