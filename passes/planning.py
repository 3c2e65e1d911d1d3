"""Decide what each region becomes: the lowest predicted cost whose measured change of the outputs fits the tolerance.

Candidates for a region are its structure (blocks), its structure with hidden units dropped, and hidden units dropped
alone. Each is compensated first and then judged end to end, on the *select* part of the data: a split is never judged
by what it removes. Without calibration data only what the weights alone bound is considered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onnx_decomp.axes import Region
from onnx_decomp.calibration import Part
from onnx_decomp.cost import CostModel, cpu, cuda
from onnx_decomp.metrics import compare_outputs
from onnx_decomp.passes.compensation import BATCH, Calibrator, Moments, Refitted, masked, refit_run
from onnx_decomp.passes.folding import Layout, block_sizes, compose, forms, kept_flops, layouts, partition
from onnx_decomp.passes.reduction import UnitPath, round_up, unit_path
from onnx_decomp.program import DROPPED, Form, Labels, Program, Rewrite, Segment, Structure
from onnx_decomp.sites import Affine

THRESHOLDS = tuple(np.geomspace(0.7, 1e-5, 64))
"""Relative errors, each of which a reduction may cost at every hidden axis: what is searched by bisection."""

MARGIN = 0.95
"""Share of the tolerance that may be spent on the select part, so that unseen data still pass."""

WORTHWHILE = 1.02
"""Predicted gain under which a rewrite is not even measured."""

VANISHED = 1e-3
"""Share of a matrix' norm up to which entries count as gone already, whatever tolerance is allowed."""


@dataclass(frozen=True)
class Candidate:
    """A way to write a region, before it is compensated."""

    segments: tuple[Segment, ...]
    gain: float
    """Predicted cost of the dense region over that of the candidate, in the objective's own unit."""


@dataclass(frozen=True)
class Judged:
    """A compensated candidate and what it did to the outputs on the select part."""

    candidate: Candidate
    refitted: Refitted
    change: float


def segment_time(cost: CostModel, rows: int, segment: Segment, form: Form) -> float:
    """Predicted microseconds of one segment in the given form."""
    axes = range(segment.start, segment.stop + 1)
    sizes = [block_sizes(segment, axis) for axis in axes]
    if form == "dense":
        return sum(cost.dense(rows, sum(k), sum(n)) for k, n in pairwise(sizes))
    if form == "batched":
        return sum(cost.batched(rows, segment.blocks, k[0], n[0]) for k, n in pairwise(sizes))
    if form == "parallel":
        return cost.parallel(rows, sizes[0], sizes[1])
    layers = [list(zip(k, n, strict=True)) for k, n in pairwise(sizes)]
    return cost.chain(rows, layers)


def with_best_forms(cost: CostModel, rows: int, segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """The same segments, each in the form with the lowest predicted time."""
    return tuple(
        replace(segment, form=min(forms(segment), key=lambda form: segment_time(cost, rows, segment, form)))
        for segment in segments
    )


def region_time(cost: CostModel, rows: int, segments: Sequence[Segment], orders: Sequence[Layout]) -> float:
    """Predicted microseconds of a region's MatMuls and of the rearrangements at its borders."""
    time = sum(segment_time(cost, rows, segment, segment.form) for segment in segments)
    for layout in (orders[0], orders[-1]):
        if layout.gather:
            time += cost.gather(rows, len(layout.order), layout.run)
    return time


def reduce_to(
    widths: Sequence[int], structures: Sequence[Structure], paths: Sequence[UnitPath | None], threshold: float
) -> list[NDArray[np.bool_] | None]:
    """Units to keep on each axis at a threshold: at least one of every block, in widths that vector units like."""
    keep: list[NDArray[np.bool_] | None] = []
    for axis, path in enumerate(paths):
        if path is None:
            keep.append(None)
            continue
        labels = _block_labels(widths, structures, axis)
        stays = np.zeros(widths[axis], bool)
        stays[path.keep(threshold)] = True
        rank = np.empty(len(path.order), np.intp)
        rank[path.order] = np.arange(len(path.order))
        for block in np.unique(labels[labels != DROPPED]):
            members = np.flatnonzero(labels == block)
            count = round_up(int(stays[members].sum()), len(members))
            stays[members] = False
            stays[members[np.argsort(-rank[members])[:count]]] = True
        stays[labels == DROPPED] = False
        keep.append(stays)
    return keep


def _block_labels(widths: Sequence[int], structures: Sequence[Structure], axis: int) -> Labels:
    """Blocks on one axis: those of the structure that covers it, else one."""
    for structure in structures:
        if structure.start <= axis <= structure.stop:
            return structure.labels[axis - structure.start]
    return np.zeros(widths[axis], np.int32)


@dataclass(frozen=True)
class Verdict:
    """What came of a region: the best candidate that fits, or the reason why there is none, with its numbers."""

    judged: Judged | None
    reason: str = "applied"
    numbers: dict[str, float] = field(default_factory=dict)
    passed_over: tuple[Verdict, ...] = ()
    """What was declined on the way: blocks that change too much, say, where fewer units were kept instead."""


@dataclass(frozen=True)
class Planning:
    """Fills `program.rewrites`, region by region in graph order; later regions are fitted on what earlier ones feed."""

    name: str = "planning"
    reduce: bool = True

    def run(self, program: Program) -> None:
        program.rewrites = []
        program.decisions = [d for d in program.decisions if d.where != self.name]  # of an earlier round
        planner = Planner(program, self.reduce)
        flops = [sum(site.flops for site in region.sites) for region in program.regions]
        for done, (region, seen) in enumerate(zip(program.regions, np.cumsum(flops), strict=True)):
            program.progress.advance(done, len(program.regions))
            # Errors of separate regions add up like independent ones: each may use its share of the square.
            share = float(np.sqrt(seen / sum(flops)))
            verdict = planner.plan(region, program.options.tolerance * MARGIN * share)
            for said in [*verdict.passed_over, verdict]:
                outcome: Literal["applied", "declined"] = "applied" if said.judged else "declined"
                for site in region.sites:
                    if said.reason == "no-structure" and program.reason(site) is not None:
                        continue  # an earlier pass has said more exactly why
                    program.decide(self.name, site, outcome, said.reason, **said.numbers)
            if verdict.judged is not None:
                program.rewrites.append(planner.accept(region, verdict.judged))


@dataclass
class Planner:
    """One round over the regions: what has been accepted so far, and how the next one is judged on top of it."""

    program: Program
    reduce: bool
    upstream: dict[int, Affine] = field(default_factory=dict)
    change: float = 0.0
    unchanged: dict[tuple[Part, int], Moments] = field(default_factory=dict)
    """Moments of the original at the region under work; see `Calibrator`."""

    def plan(self, region: Region, budget: float) -> Verdict:
        """The best way to write one region; the budget of change to the outputs includes that of earlier regions."""
        refusal = self._refusal(region)
        if refusal is not None:
            return Verdict(None, refusal)
        self.unchanged.clear()
        found = self.program.structures.get(region.name, ())
        structures = tuple(s for s in found if self._may_act_on(region, s))
        if self.program.data.kind == "calibration":
            verdict = self._search(region, structures, budget)
        else:
            verdict = self._bounded(region, structures, budget)
        if verdict.judged is None and found and not structures:
            return replace(verdict, reason="estimated-null")
        return verdict

    def accept(self, region: Region, judged: Judged) -> Rewrite:
        """Take a candidate for good: what follows is fitted on what it makes."""
        refitted, segments = judged.refitted, judged.candidate.segments
        self.upstream |= {
            site.index: affine for site, affine in zip(region.sites, refitted.affine, strict=True)
        }
        added, self.change = max(judged.change - self.change, 0.0), max(judged.change, self.change)
        return Rewrite(
            region,
            segments,
            refitted.affine,
            "split" if any(segment.blocks > 1 for segment in segments) else "reduced",
            "applied",
            added,
            judged.candidate.gain,
            tuple(zip(refitted.fitted_errors, refitted.errors, strict=True)),
        )

    def _refusal(self, region: Region) -> str | None:
        options, names = self.program.options, [n for s in region.sites for n in (s.node, s.weight)]
        if region.name in self.program.banned:
            return self.program.banned[region.name]
        if options.include and not any(re.search(options.include, name) for name in names):
            return "excluded"
        if options.exclude and any(re.search(options.exclude, name) for name in names):
            return "excluded"
        return None

    def _may_act_on(self, region: Region, structure: Structure) -> bool:
        """An estimated null alone never removes anything, unless what would go is next to nothing by norm."""
        sites = region.sites[structure.start : structure.stop]
        if all(self.program.evidence[site.index].kind != "estimated" for site in sites):
            return True
        spans = zip(sites, structure.labels, structure.labels[1:], strict=False)
        return all(removed_norm(self.program.affine(s), rows, cols) <= VANISHED for s, rows, cols in spans)

    # Without data

    def _bounded(self, region: Region, structures: Sequence[Structure], budget: float) -> Verdict:
        """Plain removal of what has vanished; its share of the norm stands in for the change of the outputs."""
        if not structures:
            return Verdict(None, "no-calibration")
        candidate = self._candidate(region, structures, [None] * len(region.widths))
        affine, removed = [], []
        for site, (rows, columns) in zip(region.sites, partition(candidate.segments), strict=True):
            old = self.program.affine(site)
            removed.append(removed_norm(old, rows, columns))
            affine.append(masked(old, rows, columns))
        change = self.change + sum(removed)
        numbers = {"change": change, "gain": candidate.gain}
        if change > budget:
            return Verdict(None, "no-calibration", numbers)
        if candidate.gain < WORTHWHILE:
            return Verdict(None, _cost_reason(candidate), numbers)
        refitted = Refitted(tuple(affine), tuple(removed), tuple(removed))
        return Verdict(Judged(candidate, refitted, change), numbers=numbers)

    # With data

    def _search(self, region: Region, structures: Sequence[Structure], budget: float) -> Verdict:
        """The best of: structure, structure with fewer units, fewer units alone."""
        tried: list[Verdict] = []
        if structures:
            tried.append(self._as_found(region, structures, budget))
        if self.reduce and len(region.widths) > 2:
            # Where the structure alone changes too much, dropping units on top only adds to that.
            start = structures if structures and tried[0].reason != "tolerance" else ()
            moments = [self._calibrator.moments("fit", site, {}) for site in region.sites[1:]]
            paths = self._unit_paths(region, start, [moment.xx for moment in moments])
            tried.append(self._fewest_units(region, start, paths, budget))
        fitting = [verdict for verdict in tried if verdict.judged is not None]
        if not fitting:
            return tried[0] if structures else Verdict(None, "no-structure")
        best = max(fitting, key=lambda verdict: verdict.numbers["gain"])
        passed_over = tuple(verdict for verdict in tried[:1] if verdict.judged is None)
        return replace(best, numbers=tried[0].numbers | best.numbers, passed_over=passed_over)

    def _as_found(self, region: Region, structures: Sequence[Structure], budget: float) -> Verdict:
        candidate = self._candidate(region, structures, [None] * len(region.widths))
        judged = self._judge(region, candidate)
        numbers = {"change": judged.change, "gain": candidate.gain}
        numbers |= self._redraw(region, candidate)
        if judged.change > budget:
            return Verdict(None, "tolerance", numbers)
        if candidate.gain < WORTHWHILE:
            return Verdict(None, _cost_reason(candidate), numbers)
        return Verdict(judged, numbers=numbers)

    def _redraw(self, region: Region, candidate: Candidate) -> dict[str, float]:
        """Change of the outputs when what the structure leaves out is drawn anew from its null.

        If "never learned" meant "harmless", it would change nothing; that it does is why a refit has to follow.
        """
        init, placed = self.program.init, dict(self.upstream)
        rng = np.random.default_rng(self.program.options.seed)
        for site, (rows, columns) in zip(region.sites, partition(candidate.segments), strict=True):
            evidence, null = self.program.evidence.get(site.index), init and init.nulls.get(site.index)
            if evidence is None or not null or null.kind == "estimated":
                return {}
            old = self.program.affine(site)
            fresh = evidence.shrink * null.sample(rng, site.shape)
            placed[site.index] = Affine(np.where(in_blocks(rows, columns), old.weight, fresh), old.bias)
        return {"redraw": self._change(placed)}

    def _unit_paths(
        self, region: Region, structures: Sequence[Structure], moments: Sequence[NDArray[np.float64]]
    ) -> list[UnitPath | None]:
        """For each hidden axis the order in which its units can go, given what its reader still reads."""
        paths: list[UnitPath | None] = [None]
        for axis, (site, xx) in enumerate(zip(region.sites[1:], moments, strict=True), start=1):
            rows = _block_labels(region.widths, structures, axis)
            columns = _block_labels(region.widths, structures, axis + 1)
            together = (rows[:, None] == rows[None, :]) & (rows != DROPPED)[:, None]
            weight = masked(self.program.affine(site), rows, columns).weight
            paths.append(unit_path(xx * together, weight))
        return [*paths, None]

    def _fewest_units(
        self,
        region: Region,
        structures: Sequence[Structure],
        paths: Sequence[UnitPath | None],
        budget: float,
    ) -> Verdict:
        """Bisection over THRESHOLDS for the largest reduction whose measured change fits the budget."""
        best = Verdict(None, "no-redundancy")
        ways = (reduce_to(region.widths, structures, paths, threshold) for threshold in THRESHOLDS)
        by_gain = {found.gain: found for found in (self._candidate(region, structures, way) for way in ways)}
        candidates = [by_gain[gain] for gain in sorted(by_gain, reverse=True) if gain >= WORTHWHILE]
        low, high = 0, len(candidates) - 1
        while low <= high:
            middle = (low + high) // 2
            judged = self._judge(region, candidates[middle])
            if judged.change <= budget:
                best = Verdict(judged, numbers={"change": judged.change, "gain": judged.candidate.gain})
                high = middle - 1
            else:
                low = middle + 1
        return best

    @property
    def _calibrator(self) -> Calibrator:
        assert self.program.probe is not None
        return Calibrator(self.program.probe, self.program.data, self.unchanged)

    def _judge(self, region: Region, candidate: Candidate) -> Judged:
        old = [self.program.affine(site) for site in region.sites]
        refitted = refit_run(
            self._calibrator, region.sites, old, partition(candidate.segments), self.upstream
        )
        placed = self.upstream | {
            site.index: affine for site, affine in zip(region.sites, refitted.affine, strict=True)
        }
        return Judged(candidate, refitted, self._change(placed))

    def _change(self, placed: Mapping[int, Affine]) -> float:
        """Change of the model's outputs on the select part, by the metric of the tolerance."""
        probe, options = self.program.probe, self.program.options
        assert probe is not None
        batches = self.program.data.batches("select", BATCH)
        pairs = ((probe.run(feeds, {}), probe.run(feeds, placed)) for feeds in batches)
        return compare_outputs(pairs, options.metric, options.tolerance).largest

    def _candidate(
        self,
        region: Region,
        structures: Sequence[Structure],
        keep: Sequence[NDArray[np.bool_] | None],
    ) -> Candidate:
        cost: CostModel = cuda() if self.program.target == "cuda" else cpu()
        rows = self.program.timed_samples * self.program.rows_per_sample.get(region.sites[0].index, 1)
        segments = with_best_forms(cost, rows, compose(region.widths, structures, keep))
        dense = compose(region.widths, (), [None] * len(region.widths))
        if self.program.options.objective == "latency":
            before, after = (region_time(cost, rows, way, layouts(way)) for way in (dense, segments))
        else:  # a multiply-add for each stored weight: FLOPs and bytes have the same ratio
            before, after = (float(sum(map(sum, map(kept_flops, way)))) for way in (dense, segments))
        return Candidate(segments, before / max(after, 1e-9))


def _cost_reason(candidate: Candidate) -> str:
    """What stands in the way of a gain."""
    gathers = any(layout.gather for layout in layouts(candidate.segments))
    return "permutation-cost" if gathers else "not-faster"


def in_blocks(rows: Labels, columns: Labels) -> NDArray[np.bool_]:
    """[K, N], True where a row and a column share a block."""
    mask: NDArray[np.bool_] = (rows[:, None] == columns[None, :]) & (rows != DROPPED)[:, None]
    return mask


def removed_norm(affine: Affine, rows: Labels, columns: Labels) -> float:
    """Norm of the entries that go, over the norm of the matrix."""
    gone = np.where(in_blocks(rows, columns), np.float32(0), affine.weight)
    return float(np.linalg.norm(gone) / max(float(np.linalg.norm(affine.weight)), 1e-30))
