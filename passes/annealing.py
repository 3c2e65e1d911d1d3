"""Independent blocks in a run of layers, from the evidence of its weights.

Exact first: where unchanged entries are exactly frozen, the blocks are the connected components of the rest, over all
axes of the run at once. Otherwise annealing looks for the grouping that describes the evidence best. Either way a
structure counts only if it beats shuffled evidence, and if no off-diagonal block is supported as a set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import joblib
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array, csgraph

from onnx_decomp.passes.coclustering import (
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
)
from onnx_decomp.passes.significance import block_pair_tests, holm, slabs
from onnx_decomp.program import DROPPED, Evidence, Program, Structure

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
    """What was found on a run: structures, and for each layer in none of them the reason."""

    structures: tuple[Structure, ...]
    reasons: dict[int, Reason]


@dataclass(frozen=True)
class Failure:
    """No structure on a run, and the layer that bears one least."""

    reason: Reason
    weakest: int = 0


def find_structure(evidence: Sequence[Evidence | None], seed: int = 0, restarts: int = 1) -> Finding:
    """Blocks of consecutive layers; evidence[l].z is [width l, width l+1].

    None, or a null that does not fit, cuts the run. restarts: searches that measure the stability.
    """
    structures: list[Structure] = []
    reasons: dict[int, Reason] = {}
    pending = list(_sound_runs(evidence, reasons))
    while pending:
        start, run = pending.pop()
        found = exact_structure(run) or annealed_structure(run, seed, restarts)
        if isinstance(found, Structure):
            shifted = Structure(
                start, start + len(run), found.labels, found.blocks, found.kind, found.p, found.stability
            )
            structures.append(shifted)
        elif len(run) == 1:
            reasons[start] = found.reason
        else:
            cut = found.weakest
            parts = ((0, cut), (cut, cut + 1), (cut + 1, len(run)))
            pending += [(start + lo, run[lo:hi]) for lo, hi in parts if lo < hi]
    return Finding(tuple(sorted(structures, key=lambda s: s.start)), reasons)


def _sound_runs(
    evidence: Sequence[Evidence | None], reasons: dict[int, Reason]
) -> list[tuple[int, list[Evidence]]]:
    """Longest runs of layers whose null fits, with where they start."""
    runs: list[tuple[int, list[Evidence]]] = []
    joined = False
    for position, e in enumerate(evidence):
        sound = e is not None and e.fits
        if e is None or not e.fits:
            reasons[position] = Reason("null-does-not-fit", {} if e is None else {"misfit": e.misfit})
        elif joined:
            runs[-1][1].append(e)
        else:
            runs.append((position, [e]))
        joined = sound
    return runs


# --- exact: connected components ----------------------------------------------------------------------------------


def exact_structure(run: Sequence[Evidence]) -> Structure | None:
    """Components of the entries that are not frozen, if most of a plateau of tolerances agrees on them."""
    if any(e.frozen is None or e.frozen.mean() < FROZEN for e in run):
        return None
    tried = [
        components([_tolerance_mask(e, float(step)) for e in run]) for step in np.linspace(0, 1, PLATEAU)
    ]
    stretches = [_stretch(tried, first) for first in range(PLATEAU)]
    first = int(np.argmax(stretches))
    labels, G = tried[first], count_blocks(tried[first])
    if stretches[first] < 2 or G < 2:
        return None
    state = valued([Layer.read(e.z, e.frozen) for e in run], labels, G)
    if state.p >= LEVEL or state.gains.min() <= 0:
        return None
    return Structure(0, len(run), labels, G, "exact", state.p, stretches[first] / PLATEAU)


def _tolerance_mask(e: Evidence, step: float) -> NDArray[np.bool_]:
    """True where an entry [K, N] is not frozen, at a tolerance from the tightest (step 0) to the widest (1)."""
    low, high = e.summary.get("frozen_low", 0.0), e.summary.get("frozen_high", 0.0)
    tolerance = low ** (1 - step) * high**step if low > 0 else 0.0
    return np.abs(e.z) > np.float32(tolerance)


def _stretch(tried: Sequence[Grouping], first: int) -> int:
    """How many consecutive tolerances, from `first` on, give the same two or more blocks."""
    if count_blocks(tried[first]) < 2:
        return 0
    length = 1
    while first + length < len(tried) and same(tried[first], tried[first + length]):
        length += 1
    return length


def components(changed: Sequence[NDArray[np.bool_]]) -> Grouping:
    """Connected components over all axes of a run, by masks [width l, width l+1]; those on every axis are blocks.

    Slab by slab, each time on the components so far, so that memory stays bounded.
    """
    ends = np.cumsum([0, len(changed[0]), *(mask.shape[1] for mask in changed)])
    component = np.arange(ends[-1], dtype=np.int32)
    for axis, mask in enumerate(changed):
        for part in slabs(mask):
            rows, cols = np.nonzero(mask[part])
            head, tail = component[rows + ends[axis] + part.start], component[cols + ends[axis + 1]]
            graph = coo_array((np.ones(len(head), np.int8), (head, tail)), shape=(ends[-1], ends[-1]))
            component = csgraph.connected_components(graph, directed=False)[1][component]
    return ordered(tuple(np.split(component, ends[1:-1])))


# --- annealed -----------------------------------------------------------------------------------------------------


def annealed_structure(run: Sequence[Evidence], seed: int = 0, restarts: int = 1) -> Structure | Failure:
    """The best grouping of a whole run, or why it is none."""
    layers = [Layer.read(e.z, e.frozen) for e in run]
    if min(min(layer.codes.shape) for layer in layers) < SMALLEST:
        return Failure(Reason("no-structure"), int(np.argmin([min(layer.codes.shape) for layer in layers])))
    rng = np.random.default_rng(seed)
    embedding, guess = embed(layers, rng)
    best = search(layers, embedding, guess, rng)
    weakest = int(best.gains.argmin())
    if best.p >= LEVEL:
        return Failure(
            Reason("not-better-than-shuffled", {"gain": best.gain, "blocks": best.blocks}), weakest
        )
    if best.gains[weakest] <= 0:
        return Failure(Reason("no-structure", {"gain": float(best.gains[weakest])}), weakest)
    clean, blamed = merge_supported(layers, best)
    if clean.blocks < 2:
        return Failure(Reason("off-block-evidence", {"blocks": best.blocks, "p": best.p}), blamed)
    labels = ordered(drop_dead(layers, clean))
    final = valued(layers, labels, count_blocks(labels))
    if final.blocks < 2:
        return Failure(Reason("no-structure", {"gain": final.gain, "blocks": best.blocks}), weakest)
    if final.p >= LEVEL:
        return Failure(Reason("not-better-than-shuffled", {"gain": final.gain}), int(final.gains.argmin()))
    others = [other for turn in range(restarts) for other in again(layers, embedding, final, seed + 1 + turn)]
    stability = float(np.mean([agreement(labels, other.labels) for other in others])) if others else 1.0
    return Structure(0, len(run), labels, final.blocks, "annealed", final.p, stability)


def merge_supported(layers: Sequence[Layer], state: State) -> tuple[State, int]:
    """Merge blocks that a supported off-diagonal block joins, strongest first. Returns the last one's layer too."""
    blamed = 0
    while state.blocks > 1:
        tests = [
            block_pair_tests(layer.z, rows, cols, state.blocks)
            for layer, (rows, cols) in zip(layers, pairwise(state.labels), strict=True)
        ]
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
        best = block_scores(scores, state.labels, axis, state.blocks).max(1)
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
        runs = [[program.evidence.get(site.index) for site in region.sites] for region in program.regions]
        workers = joblib.Parallel(n_jobs=program.options.jobs, prefer="threads")
        solve = joblib.delayed(find_structure)
        findings = workers(solve(run, program.options.seed, self.restarts) for run in runs)
        for region, found in zip(program.regions, findings, strict=True):
            program.structures[region.name] = found.structures
            for position, reason in sorted(found.reasons.items()):
                if reason.code != "null-does-not-fit":  # the criterion said so already
                    site = region.sites[position]
                    program.decide(self.name, site, "declined", reason.code, **reason.numbers)
