"""Blocks that overlap: groups of outputs that each read inputs of their own, some of which others read as well.

An input that two blocks read makes them one connected component. So components are taken over everything behind the
first layer; each of them reads some inputs, and those that read much the same are merged (average linkage of Jaccard
distances) as far as that leaves the fewest multiplications. An input that several blocks read gets a copy in each.
Only weights that are exactly frozen, or exactly zero, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist

from onnx_decomp.axes import Region
from onnx_decomp.passes.annealing import FROZEN, Wiring, components
from onnx_decomp.passes.folding import blocks_in_order, compose, kept_flops
from onnx_decomp.program import DROPPED, Labels, Program, Structure

MOST_BLOCKS = 16
MOST_PATTERNS = 2048
"""Different sets of inputs that are compared with each other; where there are more, nothing repeats."""
BLOCK = 0.01
"""What a further block has to save of the multiplications: each costs a few operators."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Windows:
    """Groups of outputs. of: [C] the group of each component. members: [G, K] inputs that each group reads."""

    of: Labels
    members: Mask


def find_windows(support: Mask, width: NDArray[np.intp]) -> Windows | None:
    """Merge components that read much the same inputs; None where the best of it is to read everything everywhere.

    support: [C, K], which inputs each component reads. width: [C], columns of the first layer that are its own.
    """
    patterns, of = np.unique(np.packbits(support, axis=1), axis=0, return_inverse=True)
    if not 2 <= len(patterns) <= MOST_PATTERNS:
        return None
    reads = np.unpackbits(patterns, axis=1, count=support.shape[1]).astype(bool)
    tree = linkage(pdist(reads, "jaccard"), "average")
    total, best = float(support.shape[1] * width.sum()), None
    least = (1 - BLOCK) * total
    for groups in range(2, MOST_BLOCKS + 1):
        labels = fcluster(tree, groups, "maxclust")[of.ravel()] - 1
        members = np.stack([support[labels == group].any(axis=0) for group in range(labels.max() + 1)])
        members[~members.any(axis=1), 0] = True  # outputs that read nothing are in a block even so
        cost = float(members.sum(1) @ np.bincount(labels, width)) + BLOCK * total * len(members)
        if len(members) > 1 and cost < least:
            least, best = cost, Windows(labels.astype(np.int32), members)
    return best


def windowed(region: Region, learned: Sequence[Mask]) -> Structure | None:
    """Overlapping blocks over all sites of a region that one tensor enters; learned: [K, N] for each site."""
    group = region.group_of[region.entries[0]]
    first = [at for at, (rows, _) in enumerate(region.ends) if rows == group]
    labels = _behind(region, learned, first)
    if labels is None:
        return None
    names = sorted({int(name) for found in labels.values() for name in found[found != DROPPED]})
    reads = [_reads(learned[at], labels[region.ends[at][1]], names) for at in first]
    width = sum(np.array([(labels[region.ends[at][1]] == name).sum() for name in names]) for at in first)
    found = find_windows(np.any(reads, axis=0), np.asarray(width))
    if found is None:
        return None
    table = np.full(max(names) + 2, DROPPED, np.int32)
    table[names] = found.of
    merged = {other: table[own] for other, own in labels.items()}  # DROPPED indexes the last entry
    return _structure(region, group, merged, found.members)


def _behind(region: Region, learned: Sequence[Mask], first: Sequence[int]) -> dict[int, Labels] | None:
    """Component of each unit of every group behind the first layer; without further layers each unit is one."""
    rest = [at for at in range(len(region.sites)) if at not in first]
    written = dict.fromkeys(region.ends[at][1] for at in first)
    if not rest:
        if len(written) > 1:
            return None
        return {group: np.arange(region.groups[group].size, dtype=np.int32) for group in written}
    axes, wiring = Wiring(region.ends).within(rest)
    if not set(written) <= set(axes):
        return None
    scores = [learned[at].astype(np.float32) for at in rest]
    labels = components(scores, wiring, [0.5] * len(rest))
    return dict(zip(axes, labels, strict=True))


def _reads(learned: Mask, columns: Labels, names: Sequence[int]) -> Mask:
    """[C, K]: the inputs that the columns of each component read."""
    return np.stack([learned[:, columns == name].any(axis=1) for name in names])


def _structure(region: Region, group: int, labels: dict[int, Labels], members: Mask) -> Structure:
    """Blocks in the order of the region's last group, so that what leaves needs no rearranging where it can."""
    order = np.array(blocks_in_order(labels[region.order[-1]]))
    names = np.full(len(members) + 1, DROPPED, np.int32)
    names[order] = np.arange(len(order))
    part, column = np.nonzero(members[order])
    ordered = {group: part.astype(np.int32)} | {other: names[own] for other, own in labels.items()}
    sites = tuple(range(len(region.sites)))
    return Structure(sites, ordered, len(order), "exact", 0.0, 1.0, {group: column})


@dataclass(frozen=True)
class Overlapping:
    """Replaces the structures of regions where overlapping blocks leave fewer multiplications."""

    name: str = "windows"

    def run(self, program: Program) -> None:
        for region in program.regions:
            learned = self._learned(program, region)
            found = windowed(region, learned) if learned else None
            if found is None:
                continue
            known = program.structures.get(region.name, ())
            before, after = (
                sum(kept_flops(region, segment) for segment in compose(region, structures))
                for structures in (known, (found,))
            )
            if after < before:
                program.structures[region.name] = (found,)
                for site in region.sites:
                    program.decide(
                        self.name, site, "applied", "overlapping-blocks", parts=float(found.blocks)
                    )

    @staticmethod
    def _learned(program: Program, region: Region) -> list[Mask]:
        """What is not frozen at each site; nothing where the region is of another kind, or little is frozen."""
        border = {region.group_of[name] for name in (*region.entries, *region.exits)}
        plain = (
            region.flat
            and len(region.entries) == 1
            and not region.constants
            and set(region.groups) - border == region.elastic
            and region.group_of[region.entries[0]] not in {written for _, written in region.ends}
            and len({site.matrix for site in region.sites}) == len(region.sites)
            and all(
                len(units) == region.groups[group].size
                for ends, own in zip(region.ends, region.units, strict=True)
                for group, units in zip(ends, own, strict=True)
            )
        )
        evidence = [program.evidence.get(site.index) for site in region.sites] if plain else []
        masks = [~e.frozen for e in evidence if e is not None and e.fits and e.frozen is not None]
        if not masks or len(masks) < len(region.sites) or masks[0].mean() > 1 - FROZEN:
            return []
        return masks
