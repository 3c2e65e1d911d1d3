"""What is written of a region: segments that cover it, how wide their blocks are, and the forms they can have.

Blocks cost nothing to make contiguous where the permutations fold into the weights on either side (`layouts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from onnx_decomp.axes import Region
from onnx_decomp.program import DROPPED, Copies, Form, Labels, Outcome, Segment, Structure

Indices = NDArray[np.intp]
Keep = Mapping[int, NDArray[np.bool_]]
"""By elastic group: the elements that stay."""


# --- labels of axes -----------------------------------------------------------------------------------------------


def blocks_in_order(labels: Labels) -> list[int]:
    """Block ids by where they first occur."""
    kept = labels[labels != DROPPED]
    blocks, first = np.unique(kept, return_index=True)
    return [int(blocks[at]) for at in np.argsort(first)]


def adopt_dropped(labels: Labels) -> Labels:
    """Give each dropped element of a joined axis to the block before it (the first ones to the block after).

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


# --- segments -----------------------------------------------------------------------------------------------------


def compose(
    region: Region, structures: Sequence[Structure] = (), keep: Keep | None = None
) -> tuple[Segment, ...]:
    """Segments that cover a region: its structures, and one dense segment of the other sites, reduced to `keep`.

    A unit dropped by one segment is dropped by all that share its axis; only elastic groups can lose any, and inputs.
    """
    segments = [Segment(s.sites, s.labels, s.blocks, copies=s.copies) for s in structures]
    covered = {site for segment in segments for site in segment.sites}
    rest = tuple(site for site in range(len(region.sites)) if site not in covered)
    if rest:
        groups = dict.fromkeys(group for site in rest for group in region.ends[site])
        plain = {group: np.zeros(region.groups[group].size, np.int32) for group in groups}
        segments.append(Segment(rest, plain, 1))
    segments.sort(key=lambda segment: segment.sites[0])
    gone = _dropped(region, segments, keep or {})
    return tuple(_in_order(region, _settled(region, segment, gone)) for segment in segments)


def _in_order(region: Region, segment: Segment) -> Segment:
    """Blocks numbered as they lie on the first axis that can't change its order, if they lie side by side there.

    Free axes follow the numbers, so that nothing has to change places between one end and the other.
    """
    for group, labels in segment.labels.items():
        if group in segment.copies or region.groups[group].pinned is None:
            continue
        if is_contiguous(labels) and len(np.unique(labels)) == segment.blocks:
            return renumbered(segment, blocks_in_order(labels))
    return segment


def renumbered(segment: Segment, sequence: Sequence[int]) -> Segment:
    """The same blocks, all of them named, in another order."""
    names = np.full(segment.blocks + 1, DROPPED, np.int32)  # the last one: DROPPED indexes it as -1
    names[list(sequence)] = np.arange(segment.blocks)
    labels = {group: names[found] for group, found in segment.labels.items()}
    ranks = {site: tuple(found[block] for block in sequence) for site, found in segment.ranks.items()}
    return replace(segment, labels=labels, ranks=ranks)


def _dropped(region: Region, segments: Sequence[Segment], keep: Keep) -> dict[int, NDArray[np.bool_]]:
    gone: dict[int, NDArray[np.bool_]] = {}
    for group in region.elastic:
        for segment in segments:
            if group in segment.labels:
                lost = segment.labels[group] == DROPPED
                gone[group] = gone[group] | lost if group in gone else lost
        if group in keep:
            gone[group] = gone[group] | ~keep[group]
    return {group: ~stays for group, stays in keep.items() if group not in gone} | gone


def _settled(region: Region, segment: Segment, gone: Mapping[int, NDArray[np.bool_]]) -> Segment:
    labels: dict[int, Labels] = {}
    written = {region.ends[site][1] for site in segment.sites}
    for group, found in segment.labels.items():
        if group in gone:
            labels[group] = np.where(gone[group], np.int32(DROPPED), found)
        elif group in segment.copies:
            labels[group] = found
        elif group in written or region.groups[group].pinned is None:
            labels[group] = adopt_dropped(found)  # an output has to come from somewhere
        else:
            labels[group] = settle_border(found)
    return replace(segment, labels=labels)


def partition(region: Region, segments: Sequence[Segment]) -> list[tuple[Labels, Labels]]:
    """Row and column labels of each site of a region."""
    found: dict[int, tuple[Labels, Labels]] = {}
    for segment in segments:
        for site in segment.sites:
            found[site] = site_labels(region, segment, site)
    return [found[site] for site in range(len(region.sites))]


def site_labels(region: Region, segment: Segment, site: int) -> tuple[Labels, Labels]:
    """Block of each row and of each column of one site; of each copy where the group was dealt out anew."""
    rows, columns = (
        segment.labels[group] if group in segment.copies else segment.labels[group][units]
        for group, units in zip(region.ends[site], region.units[site], strict=True)
    )
    if segment.heads:
        found = region.sites[site]
        rows = np.where(in_heads(region, segment, found.input, np.arange(len(rows))), rows, np.int32(DROPPED))
        stays = in_heads(region, segment, found.output, np.arange(len(columns)))
        columns = np.where(stays, columns, np.int32(DROPPED))
    return rows, columns


def in_heads(region: Region, segment: Segment, tensor: str, positions: Indices) -> NDArray[np.bool_]:
    """Which positions of a tensor's grouped axis stay where heads are made narrower."""
    stays = np.ones(len(positions), bool)
    for number, width in segment.heads.items():
        pair = region.pairs[number]
        if tensor in pair.joined:
            stays &= positions % pair.width < width
    return stays


def head_width(region: Region, segment: Segment, site: int) -> int | None:
    """Width that heads keep between a site and the one that it meets, where they are narrower; None elsewhere."""
    tensors = {region.sites[site].input, region.sites[site].output}
    widths = [width for number, width in segment.heads.items() if tensors & region.pairs[number].joined]
    return min(widths, default=None)


def copies_of(segments: Sequence[Segment]) -> Copies:
    """All groups that were dealt out anew."""
    return {group: units for segment in segments for group, units in segment.copies.items()}


def block_sizes(region: Region, segment: Segment, site: int) -> list[tuple[int, int]]:
    """Kept rows and columns of each block at one site, by block id; padding is not counted."""
    rows, columns = (
        np.bincount(labels[labels != DROPPED], minlength=segment.blocks)
        for labels in site_labels(region, segment, site)
    )
    return [(int(k), int(n)) for k, n in zip(rows, columns, strict=True)]


def block_rank(segment: Segment, site: int, block: int, k: int, n: int) -> int | None:
    """Rank between the two products in which a block of k rows and n columns is written; None where it stays whole.

    It stays whole where two products would take no fewer multiplications. An axis between them is never empty: not
    every runtime takes one.
    """
    if site not in segment.ranks:
        return None
    rank = max(segment.ranks[site][block], 1)
    return rank if rank * (k + n) < k * n else None


def block_ranks(region: Region, segment: Segment, site: int) -> tuple[int, ...]:
    """Rank that each block of one site can have as it is written."""
    return tuple(min(widths) for widths in block_widths(region, segment, site))


def block_widths(region: Region, segment: Segment, site: int) -> list[tuple[int, ...]]:
    """Widths that each block of one site passes through: inputs, the rank where it is factored, outputs."""
    found: list[tuple[int, ...]] = []
    for block, (k, n) in enumerate(block_sizes(region, segment, site)):
        rank = block_rank(segment, site, block, k, n)
        found.append((k, n) if rank is None else (k, rank, n))
    return found


def written_widths(region: Region, segment: Segment, site: int) -> list[tuple[int, ...]]:
    """The same as they are multiplied: in a batched product every block is as wide as the widest."""
    found = block_widths(region, segment, site)
    if segment.form != "batched":
        return found
    return [tuple(max(sizes) for sizes in zip(*found, strict=True))] * len(found)


def is_padded(region: Region, segment: Segment) -> bool:
    """Blocks of several sizes in one product: as it is written, it multiplies more than there is."""
    return any(
        written_widths(region, segment, site) != block_widths(region, segment, site) for site in segment.sites
    )


def correction_widths(region: Region, segment: Segment, site: int) -> tuple[int, int, int] | None:
    """Inputs, rank and outputs of the correction beside the blocks of one site; None where it has none.

    Of few units that are left it has no higher rank than there are.
    """
    rank = segment.corrections.get(site, 0)
    if not rank:
        return None
    rows, columns = site_labels(region, segment, site)
    read = int(np.count_nonzero(rows != DROPPED))
    if region.ends[site][0] not in region.elastic:
        read = region.sites[site].shape[0]  # as the joined tensor has them
    rank = min(rank, read, int(np.count_nonzero(columns != DROPPED)))
    return read, rank, sum(widths[-1] for widths in written_widths(region, segment, site))


def site_flops(region: Region, segment: Segment, site: int) -> int:
    """Multiply-adds times two for one row, of one site, as they are written: padding counts."""
    beside = correction_widths(region, segment, site)
    widths = written_widths(region, segment, site) + ([] if beside is None else [beside])
    return sum(2 * k * n for each in widths for k, n in pairwise(each))


def kept_flops(region: Region, segment: Segment) -> int:
    """Multiply-adds times two for one row, of all sites of the segment."""
    return sum(site_flops(region, segment, site) for site in segment.sites)


def site_rank(region: Region, segment: Segment, site: int) -> int | None:
    """Largest rank that one site can have as it is written, over all blocks; None where none is factored."""
    found = block_widths(region, segment, site)
    return sum(min(widths) for widths in found) if any(len(widths) > 2 for widths in found) else None


def decision_of(region: Region, segments: Sequence[Segment]) -> Outcome:
    """What a rewrite with these segments is called."""
    if any(segment.blocks > 1 for segment in segments):
        return "split"
    ranks = [site_rank(region, segment, site) for segment in segments for site in segment.sites]
    return "reduced" if ranks.count(None) == len(ranks) else "low-rank"


def forms(region: Region, segment: Segment) -> Iterator[Form]:
    """Forms in which a segment can be written at all.

    Blocks of several sizes are padded in the batched one; a block without any inputs or outputs has nothing for that.
    """
    if segment.blocks == 1:
        yield "dense"
        return
    yield "chain" if len(segment.sites) > 1 else "parallel"
    widths = [block for site in segment.sites for block in block_widths(region, segment, site)]
    if region.flat and all(len(block) == 2 and min(block) > 0 for block in widths):
        yield "batched"


def factors(weight: NDArray[np.float32], rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A [K, rank] and B [rank, N] with A B = W of that rank, the singular values split evenly between them.

    From the smaller Gram matrix: several times quicker than a decomposition of W itself, and as exact as W is in
    float64. Sides of the same size are what float16 needs.
    """
    if weight.shape[0] > weight.shape[1]:
        right, left = factors(weight.T, rank)
        return left.T, right.T
    wide = weight.astype(np.float64)
    leading = [len(wide) - rank, len(wide) - 1]
    squares, vectors = linalg.eigh(wide @ wide.T, subset_by_index=leading)
    scale = np.maximum(squares, max(1e-14 * squares[-1], 1e-60)) ** 0.25  # W may have less than that rank
    down, up = vectors * scale, vectors.T @ wide / scale[:, None]
    return down.astype(np.float32), up.astype(np.float32)
