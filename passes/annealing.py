"""Independent blocks in layers that share axes, from the evidence of their weights.

Exact first: where unchanged entries are exactly frozen, the blocks are the connected components of the rest, over all
axes at once. Otherwise annealing looks for the grouping that describes the evidence best. Either way a
structure counts only if it beats shuffled evidence, and if no off-diagonal block is supported as a set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array, csgraph

from onnx_decomp.axes import Region
from onnx_decomp.passes.coclustering import (
    Elements,
    Grouping,
    Layer,
    State,
    again,
    block_scores,
    embed,
    merged,
    ratios,
    search,
    valued,
    widths_of,
)
from onnx_decomp.passes.significance import Matrix, block_pair_tests, holm, slabs
from onnx_decomp.program import DROPPED, Evidence, Program, Structure
from onnx_decomp.workers import spread

LEVEL = 0.01
"""Of a structure against shuffling, and for each axis of dropping a living element."""
PAIR_LEVEL = 0.001
"""Family-wise over off-diagonal blocks: a false one costs a true structure, a real edge is far beyond it."""
MATERIAL = 1e-3
"""Rounding noise can be significant; an off-diagonal block also has to reach this share of the in-block level."""
FROZEN = 0.1
"""Smallest share of frozen entries with which components are looked for."""
PLATEAU = 5
"""Tolerances on which components have to be the same."""
SMALLEST = 4
"""Axes below this have no structure worth a search."""


@dataclass(frozen=True)
class Reason:
    """Why a layer is in no structure: a stable code, with numbers."""

    code: str
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """What was found: structures, by positions of layers and numbers of axes, and for each other layer the reason."""

    structures: tuple[Structure, ...]
    reasons: dict[int, Reason]


@dataclass(frozen=True)
class Failure:
    """No structure, and what each layer would gain from the best grouping."""

    reason: Reason
    gains: NDArray[np.float64]


@dataclass(frozen=True)
class Wiring:
    """How layers join axes: layer l has rows on axis ends[l][0], columns on ends[l][1].

    units: for its rows and its columns the element of the axis, None where they are the elements themselves.
    parts: layers that are tried on their own when all together show nothing.
    """

    ends: tuple[tuple[int, int], ...]
    units: tuple[tuple[Elements | None, Elements | None], ...] = ()
    parts: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def chain(cls, layers: int) -> Wiring:
        return cls(tuple((at, at + 1) for at in range(layers)))

    def within(self, chosen: Sequence[int]) -> tuple[list[int], Wiring]:
        """The axes that the chosen layers join, and the wiring of those layers alone."""
        axes = sorted({axis for at in chosen for axis in self.ends[at]})
        place = {axis: number for number, axis in enumerate(axes)}
        ends = tuple((place[self.ends[at][0]], place[self.ends[at][1]]) for at in chosen)
        return axes, Wiring(ends, tuple(self.units[at] for at in chosen) if self.units else ())

    def connected(self, chosen: Sequence[int]) -> list[list[int]]:
        """Layers that share axes, by way of one another."""
        axes, inner = self.within(chosen)
        heads, tails = np.array(inner.ends).T
        graph = coo_array((np.ones(len(heads), np.int8), (heads, tails)), shape=(len(axes), len(axes)))
        of_axis = csgraph.connected_components(graph, directed=False)[1]
        found: dict[int, list[int]] = {}
        for at, head in zip(chosen, heads, strict=True):
            found.setdefault(int(of_axis[head]), []).append(at)
        return list(found.values())


def find_structure(
    evidence: Sequence[Evidence | None], seed: int = 0, restarts: int = 1, wiring: Wiring | None = None
) -> Finding:
    """Blocks of layers that share axes; evidence[l].z is [K, N]. Without a wiring the layers are a chain.

    None, or a null that does not fit, leaves a layer out. restarts: searches that measure the stability.
    """
    wiring = wiring or Wiring.chain(len(evidence))
    structures: list[Structure] = []
    reasons: dict[int, Reason] = {}
    for position, e in enumerate(evidence):
        if e is None or not e.fits:
            reasons[position] = Reason("null-does-not-fit", {} if e is None else {"misfit": e.misfit})
    sound = [at for at in range(len(evidence)) if at not in reasons]
    pending = wiring.connected(sound) if sound else []
    while pending:
        chosen = pending.pop()
        run = [e for at in chosen if (e := evidence[at]) is not None]
        axes, inner = wiring.within(chosen)
        found = exact_structure(run, inner) or annealed_structure(run, seed, restarts, inner)
        if isinstance(found, Structure):
            labels = {axes[axis]: found.labels[axis] for axis in found.labels}
            structures.append(replace(found, sites=tuple(chosen), labels=labels))
        elif len(chosen) == 1:
            reasons[chosen[0]] = found.reason
        else:
            pending += _smaller(wiring, chosen, found.gains)
    return Finding(tuple(sorted(structures, key=lambda s: s.sites)), reasons)


def _smaller(wiring: Wiring, chosen: Sequence[int], gains: NDArray[np.float64]) -> list[list[int]]:
    """Sets of layers to try next: those that would gain, joined; the others by their parts, then one by one."""
    gaining = [at for at, gain in zip(chosen, gains, strict=True) if gain > 0]
    if 0 < len(gaining) < len(chosen):
        others = [at for at in chosen if at not in gaining]
        return [*wiring.connected(gaining), *wiring.connected(others)]
    parts = [[at for at in part if at in chosen] for part in wiring.parts]
    parts = [part for part in parts if part]
    if len(parts) > 1:
        return [joined for part in parts for joined in wiring.connected(part)]
    weakest = chosen[int(np.argmin(gains))]
    return [[weakest], *wiring.connected([at for at in chosen if at != weakest])]


def _layers(run: Sequence[Evidence], wiring: Wiring) -> list[Layer]:
    units = wiring.units or ((None, None),) * len(run)
    return [
        Layer.read(e.z, e.frozen, ends, own) for e, ends, own in zip(run, wiring.ends, units, strict=True)
    ]


# --- exact: connected components ----------------------------------------------------------------------------------


def exact_structure(run: Sequence[Evidence], wiring: Wiring | None = None) -> Structure | None:
    """Components of the entries that are not frozen, if most of a plateau of tolerances agrees on them."""
    if any(e.frozen is None or e.frozen.mean() < FROZEN for e in run):
        return None
    wiring = wiring or Wiring.chain(len(run))
    scores = [e.z for e in run]
    steps = [tuple(_tolerance(e, float(step)) for e in run) for step in np.linspace(0, 1, PLATEAU)]
    found = {tolerances: components(scores, wiring, tolerances) for tolerances in dict.fromkeys(steps)}
    tried = [found[tolerances] for tolerances in steps]
    stretches = [_stretch(tried, first) for first in range(PLATEAU)]
    first = int(np.argmax(stretches))
    labels, G = tried[first], count_blocks(tried[first])
    if stretches[first] < 2 or G < 2:
        return None
    state = valued(_layers(run, wiring), labels, G)
    if state.p >= LEVEL or state.gains.min() <= 0:
        return None
    return _structure(run, state, "exact", stretches[first] / PLATEAU)


def _tolerance(e: Evidence, step: float) -> float:
    """Score up to which an entry counts as frozen, from the tightest (step 0) to the widest (1)."""
    low, high = e.summary.get("frozen_low", 0.0), e.summary.get("frozen_high", 0.0)
    return float(low ** (1 - step) * high**step) if low > 0 else 0.0


def _stretch(tried: Sequence[Grouping], first: int) -> int:
    """How many consecutive tolerances, from `first` on, give the same two or more blocks."""
    if count_blocks(tried[first]) < 2:
        return 0
    length = 1
    while first + length < len(tried) and same(tried[first], tried[first + length]):
        length += 1
    return length


def components(scores: Sequence[Matrix], wiring: Wiring, tolerances: Sequence[float]) -> Grouping:
    """Connected components over all axes, by entries of each layer's [K, N] above its tolerance.

    Those on every axis are blocks. Slab by slab, each time on the components so far, so that memory stays bounded.
    """
    units = wiring.units or ((None, None),) * len(scores)
    of_side = [
        tuple(np.arange(n) if own is None else own for n, own in zip(z.shape, pair, strict=True))
        for z, pair in zip(scores, units, strict=True)
    ]
    widths = [0] * (1 + max(axis for ends in wiring.ends for axis in ends))
    for ends, sides in zip(wiring.ends, of_side, strict=True):
        for axis, elements in zip(ends, sides, strict=True):
            widths[axis] = max(widths[axis], int(elements.max()) + 1)
    starts = np.cumsum([0, *widths])
    component = np.arange(starts[-1], dtype=np.int32)
    layers = zip(scores, tolerances, wiring.ends, of_side, strict=True)
    for z, tolerance, (row, col), (of_rows, of_cols) in layers:
        for part in slabs(z):
            rows, cols = np.nonzero(np.abs(z[part]) > np.float32(tolerance))
            head = component[of_rows[rows + part.start] + starts[row]]
            tail = component[of_cols[cols] + starts[col]]
            graph = coo_array((np.ones(len(head), np.int8), (head, tail)), shape=(starts[-1], starts[-1]))
            component = csgraph.connected_components(graph, directed=False)[1][component]
    return ordered(tuple(np.split(component, starts[1:-1])))


# --- annealed -----------------------------------------------------------------------------------------------------


def annealed_structure(
    run: Sequence[Evidence], seed: int = 0, restarts: int = 1, wiring: Wiring | None = None
) -> Structure | Failure:
    """The best grouping of all layers, or why it is none."""
    layers = _layers(run, wiring or Wiring.chain(len(run)))
    widths = widths_of(layers)
    if min(widths) < SMALLEST:
        narrow = np.array([min(widths[axis] for axis in layer.ends) for layer in layers])
        return Failure(Reason("no-structure"), np.where(narrow < SMALLEST, -1.0, 1.0))
    rng = np.random.default_rng(seed)
    embedding, guess = embed(layers, rng)
    best = search(layers, embedding, guess, rng)
    if best.p >= LEVEL:
        numbers = {"gain": best.gain, "blocks": best.blocks}
        return Failure(Reason("not-better-than-shuffled", numbers), best.gains)
    if best.gains.min() <= 0:
        return Failure(Reason("no-structure", {"gain": float(best.gains.min())}), best.gains)
    clean, blamed = merge_supported(layers, best)
    if clean.blocks < 2:
        gains = np.where(np.arange(len(layers)) == blamed, -1.0, 1.0)
        return Failure(Reason("off-block-evidence", {"blocks": best.blocks, "p": best.p}), gains)
    labels = ordered(drop_dead(layers, clean))
    final = valued(layers, labels, count_blocks(labels))
    if final.blocks < 2:
        return Failure(Reason("no-structure", {"gain": final.gain, "blocks": best.blocks}), best.gains)
    if final.p >= LEVEL:
        return Failure(Reason("not-better-than-shuffled", {"gain": final.gain}), final.gains)
    others = [other for turn in range(restarts) for other in again(layers, embedding, final, seed + 1 + turn)]
    stability = float(np.mean([agreement(labels, other.labels) for other in others])) if others else 1.0
    return _structure(run, final, "annealed", stability)


def _structure(
    run: Sequence[Evidence], state: State, kind: Literal["exact", "annealed"], stability: float
) -> Structure:
    labels = dict(enumerate(state.labels))
    return Structure(tuple(range(len(run))), labels, state.blocks, kind, state.p, stability)


def merge_supported(layers: Sequence[Layer], state: State) -> tuple[State, int]:
    """Merge blocks that a supported off-diagonal block joins, strongest first. Returns the last one's layer too."""
    blamed = 0
    while state.blocks > 1:
        tests = [block_pair_tests(layer.z, *layer.sides(state.labels), state.blocks) for layer in layers]
        strength = np.stack(
            [test.level / max(float(np.diagonal(test.level).mean()), 1e-30) for test in tests]
        )
        p = np.stack([test.p for test in tests])
        off = np.broadcast_to(~np.eye(state.blocks, dtype=bool), p.shape)
        supported = off & (strength > MATERIAL)
        supported[off] &= holm(p[off]) < PAIR_LEVEL
        if not supported.any():
            break
        at = np.unravel_index(int(np.where(supported, strength, -1).argmax()), p.shape)
        blamed, g, h = (int(i) for i in at)
        state = valued(layers, merged(state, g, h), state.blocks - 1)
    return state, blamed


def drop_dead(layers: Sequence[Layer], state: State) -> Grouping:
    """DROPPED where an element is far likelier to have learned nothing than to belong to any block.

    In a block the ratio off/in has mean 1. By Markov a log ratio beyond log(n/LEVEL) therefore drops any living
    element of an axis of n with a probability of LEVEL at most.
    """
    tables = ratios(layers, state.labels, state.blocks)
    scores = [layer.spread(table) for layer, table in zip(layers, tables, strict=True)]
    kept = []
    for axis, labels in enumerate(state.labels):
        best = block_scores(layers, scores, state.labels, axis, state.blocks).max(1)
        kept.append(np.where(best < -np.log(len(best) / LEVEL), DROPPED, labels).astype(np.int32))
    return tuple(kept)


# --- groupings ----------------------------------------------------------------------------------------------------


def agreement(first: Grouping, second: Grouping) -> float:
    """Share of elements in the same block, after the best matching of block names; DROPPED ones don't count."""
    a, b = np.concatenate(first), np.concatenate(second)
    alive = (a >= 0) & (b >= 0)
    G = max(int(a.max(initial=0)), int(b.max(initial=0))) + 1
    table = np.bincount(a[alive] * G + b[alive], minlength=G * G).reshape(G, G)
    rows, cols = linear_sum_assignment(-table)
    return float(table[rows, cols].sum() / max(alive.sum(), 1))


def ordered(labels: Grouping) -> Grouping:
    """Blocks renamed 0, 1, ... by first occurrence on the first axis; one that misses an axis is dropped."""
    shared = set(labels[0].tolist()).intersection(*(axis.tolist() for axis in labels[1:])) - {DROPPED}
    names = [name for name in dict.fromkeys(labels[0].tolist()) if name in shared]
    table = np.full(max(int(axis.max(initial=0)) for axis in labels) + 2, DROPPED, np.int32)
    table[names] = np.arange(len(names))
    return tuple(table[axis] for axis in labels)  # DROPPED indexes the last entry, which stays DROPPED


def same(first: Grouping, second: Grouping) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def count_blocks(labels: Grouping) -> int:
    return int(max(axis.max(initial=DROPPED) for axis in labels)) + 1


@dataclass(frozen=True)
class Annealing:
    """Fills `program.structures` for every region; declines the sites that are in no structure, with the reason."""

    restarts: int = 1
    """Further searches that measure the stability."""
    name: str = "annealing"

    def run(self, program: Program) -> None:
        families = families_of(program.regions)
        options = program.options

        def arguments(family: Sequence[Region]) -> tuple[Any, ...]:
            evidence = [program.evidence.get(site.index) for region in family for site in region.sites]
            return evidence, options.seed, self.restarts, wiring_of(family)

        findings = spread(find_structure, families, arguments, options.jobs, options.scheduler)
        for family, found in zip(families, findings, strict=True):
            self._record(program, family, found)

    def _record(self, program: Program, family: Sequence[Region], found: Finding) -> None:
        """Deal what was found over several regions out to each of them."""
        first = 0
        for region in family:
            own = range(first, first + len(region.sites))
            program.structures[region.name] = tuple(
                _restricted(structure, region, first)
                for structure in found.structures
                if any(at in own for at in structure.sites)
            )
            for at in own:
                reason = found.reasons.get(at)
                if reason is not None and reason.code != "null-does-not-fit":  # the criterion said so already
                    site = region.sites[at - first]
                    program.decide(self.name, site, "declined", reason.code, **reason.numbers)
            first += len(region.sites)


def _restricted(structure: Structure, region: Region, first: int) -> Structure:
    """The part of a structure on the sites of one region, the first of which is number `first` of its family."""
    sites = tuple(at - first for at in structure.sites if 0 <= at - first < len(region.sites))
    groups = dict.fromkeys(group for at in sites for group in region.ends[at])
    return replace(structure, sites=sites, labels={group: structure.labels[group] for group in groups})


def families_of(regions: Sequence[Region]) -> list[list[Region]]:
    """Regions that share groups, by way of one another: what is searched together."""
    families: list[tuple[set[int], list[Region]]] = []
    for region in regions:
        groups, members = set(region.groups), [region]
        near = [family for family in families if family[0] & groups]
        for family in near:
            groups |= family[0]
            members = [*family[1], *members]
            families.remove(family)
        families.append((groups, members))
    families.sort(key=lambda family: family[1][0].name)
    return [sorted(members, key=lambda region: region.name) for _, members in families]


def wiring_of(family: Sequence[Region]) -> Wiring:
    """Groups of the model are the axes; a region's own sites are a part."""
    ends = tuple(pair for region in family for pair in region.ends)
    units = tuple(
        (_unless_plain(region, pair[0], own[0]), _unless_plain(region, pair[1], own[1]))
        for region in family
        for pair, own in zip(region.ends, region.units, strict=True)
    )
    starts = np.cumsum([0, *(len(region.sites) for region in family)])
    parts = tuple(tuple(range(lo, hi)) for lo, hi in pairwise(starts.tolist()))
    return Wiring(ends, units, parts)


def _unless_plain(region: Region, group: int, units: Elements) -> Elements | None:
    size = region.groups[group].size
    return None if len(units) == size and np.array_equal(units, np.arange(size)) else units
