"""Decide what each region becomes: the lowest predicted cost whose measured change of the outputs fits the tolerance.

Candidates for a region are its structure (blocks), its structure with hidden units dropped, and hidden units dropped
alone. Each is compensated first and then judged end to end, on the *select* part of the data: a split is never judged
by what it removes. Without calibration data only what the weights alone bound is considered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from onnx_decomp.axes import Region
from onnx_decomp.cost import CostModel
from onnx_decomp.metrics import compare_outputs
from onnx_decomp.passes.compensation import Calibrator, Moments, masked, refit_run
from onnx_decomp.passes.folding import Layout, block_sizes, compose, forms, kept_flops, layouts, partition
from onnx_decomp.passes.reduction import UnitPath, round_up, unit_path
from onnx_decomp.program import DROPPED, Labels, Program, Rewrite, Segment, Structure
from onnx_decomp.sites import Affine

THRESHOLDS = tuple(np.geomspace(0.7, 1e-5, 24))
"""Relative errors, each of which a reduction may cost at every hidden axis: what is searched by bisection."""

MARGIN = 0.95
"""Share of the tolerance that may be spent on the select part, so that unseen data still pass."""

WORTHWHILE = 1.02
"""Predicted gain under which a rewrite is not even measured."""

DEFAULT_ROWS = 128


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
    affine: tuple[Affine, ...]
    change: float


def segment_time(cost: CostModel, rows: int, segment: Segment, form: str) -> float:
    """Predicted microseconds of one segment in the given form."""
    axes = range(segment.start, segment.stop + 1)
    sizes = [block_sizes(segment, axis) for axis in axes]
    if form == "dense":
        return sum(cost.dense(rows, sum(k), sum(n)) for k, n in zip(sizes, sizes[1:], strict=False))
    if form == "batched":
        return sum(cost.batched(rows, segment.blocks, k[0], n[0]) for k, n in zip(sizes, sizes[1:], strict=False))
    if form == "parallel":
        return cost.parallel(rows, sizes[0], sizes[1])
    layers = [list(zip(k, n, strict=True)) for k, n in zip(sizes, sizes[1:], strict=False)]
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
class Planning:
    """Fills `program.rewrites`, region by region in graph order; later regions are fitted on what earlier ones feed."""

    name: str = "planning"
    reduce: bool = True

    def run(self, program: Program) -> None:
        program.rewrites = []
        planner = Planner(program, self)
        weights = [2.0 * sum(k * n for k, n in _pairs(region.widths)) for region in program.regions]
        spent = 0.0
        for region, weight in zip(program.regions, weights, strict=True):
            spent += weight
            # Errors of separate regions add up like independent ones: each may use its share of the square.
            budget = program.options.tolerance * MARGIN * float(np.sqrt(spent / sum(weights)))
            rewrite = planner.plan(region, budget)
            if rewrite is not None:
                program.rewrites.append(rewrite)


def _pairs(widths: Sequence[int]) -> Iterator[tuple[int, int]]:
    yield from zip(widths, widths[1:], strict=False)


@dataclass
class Planner:
    """What planning needs for one round over the regions."""

    program: Program
    settings: Planning

    def __post_init__(self) -> None:
        self.calibrator: Calibrator | None = self.program.shared.get("calibrator")
        self.cost: CostModel = self.program.shared["cost"]
        self.upstream: dict[int, Affine] = {}

    def plan(self, region: Region, budget: float) -> Rewrite | None:
        """The rewrite of one region, or None with the reason recorded for each of its sites."""
        refusal = self._refusal(region)
        if refusal is not None:
            return self._decline(region, refusal)
        structures, reason = self._usable_structures(region)
        if self.program.data.kind == "calibration":
            chosen, why = self._search(region, structures, budget)
        else:
            chosen, why = self._bounded(region, structures, budget)
        if chosen is None:
            return self._decline(region, why if structures or why != "no-structure" else reason or why)
        for site, affine in zip(region.sites, chosen.affine, strict=True):
            self.upstream[site.index] = affine
            self.program.decide(
                self.settings.name, site, "applied", "applied", change=chosen.change, gain=chosen.candidate.gain
            )
        split = any(segment.blocks > 1 for segment in chosen.candidate.segments)
        return Rewrite(
            region,
            chosen.candidate.segments,
            chosen.affine,
            "split" if split else "reduced",
            "applied",
            chosen.change,
            chosen.candidate.gain,
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

    def _decline(self, region: Region, reason: str) -> None:
        for site in region.sites:
            numbers = self._numbers.get(region.name, {}) if hasattr(self, "_numbers") else {}
            self.program.decide(self.settings.name, site, "declined", reason, **numbers)

    def _usable_structures(self, region: Region) -> tuple[tuple[Structure, ...], str | None]:
        """Structures that may be acted upon: an estimated null alone never removes anything."""
        found = self.program.structures.get(region.name, ())
        usable = tuple(s for s in found if not self._only_estimated(region, s) or self._vanished(region, s))
        return usable, "estimated-null" if found and not usable else None

    def _only_estimated(self, region: Region, structure: Structure) -> bool:
        sites = region.sites[structure.start : structure.stop]
        return any(self.program.evidence[site.index].kind == "estimated" for site in sites)

    def _vanished(self, region: Region, structure: Structure) -> bool:
        """What would go is nothing, by norm: the weights alone bound it."""
        tolerance = self.program.options.tolerance
        return all(
            _removed_norm(self.program.affine(site), rows, columns) <= tolerance
            for site, rows, columns in zip(
                region.sites[structure.start : structure.stop], structure.labels, structure.labels[1:], strict=False
            )
        )

    # Without data

    def _bounded(
        self, region: Region, structures: Sequence[Structure], budget: float
    ) -> tuple[Judged | None, str]:
        """Plain removal of what has vanished; its share of the norm stands in for the change of the outputs."""
        if not structures:
            return None, "no-calibration"
        candidate = self._candidate(region, structures, [None] * len(region.widths))
        affine, removed = [], 0.0
        for site, (rows, columns) in zip(region.sites, partition(candidate.segments), strict=True):
            old = self.program.affine(site)
            removed += _removed_norm(old, rows, columns)
            affine.append(masked(old, rows, columns))
        if removed > budget:
            return None, "no-calibration"
        if candidate.gain < WORTHWHILE:
            return None, self._cost_reason(candidate)
        return Judged(candidate, tuple(affine), removed), "applied"

    # With data

    def _search(
        self, region: Region, structures: Sequence[Structure], budget: float
    ) -> tuple[Judged | None, str]:
        """The best of: structure, structure with fewer units, fewer units alone."""
        assert self.calibrator is not None
        best: Judged | None = None
        why = "no-structure"
        whole: list[NDArray[np.bool_] | None] = [None] * len(region.widths)
        if structures:
            candidate = self._candidate(region, structures, whole)
            if candidate.gain < WORTHWHILE and not self.settings.reduce:
                return None, self._cost_reason(candidate)
            judged = self._judge(region, candidate)
            why = "tolerance" if judged.change > budget else self._cost_reason(candidate)
            self._note(region, judged)
            if judged.change <= budget and candidate.gain >= WORTHWHILE:
                best = judged
        if not self.settings.reduce or len(region.widths) < 3:
            return best, why
        paths = self._paths(region)
        for starting in [structures, ()] if structures else [()]:
            if starting and why == "tolerance":
                continue  # dropping units on top only adds to a change that is too large already
            reduced = self._fewest_units(region, starting, paths(starting), budget)
            if reduced is not None and (best is None or reduced.candidate.gain > best.candidate.gain):
                best = reduced
        return best, why

    def _note(self, region: Region, judged: Judged) -> None:
        if not hasattr(self, "_numbers"):
            self._numbers: dict[str, dict[str, float]] = {}
        self._numbers[region.name] = {"change": judged.change, "gain": judged.candidate.gain}

    def _paths(self, region: Region):  # type: ignore[no-untyped-def]
        """Moments are taken once for the original; each start only masks them by its blocks."""
        assert self.calibrator is not None
        moments: list[Moments] = []
        for site in region.sites[1:]:
            moments.append(self.calibrator.moments("fit", site, {}))

        def paths(structures: Sequence[Structure]) -> list[UnitPath | None]:
            found: list[UnitPath | None] = [None]
            for axis, (site, moment) in enumerate(zip(region.sites[1:], moments, strict=True), start=1):
                rows = _block_labels(region.widths, structures, axis)
                columns = _block_labels(region.widths, structures, axis + 1)
                same = (rows[:, None] == rows[None, :]) & (rows != DROPPED)[:, None]
                weight = masked(self.program.affine(site), rows, columns).weight
                found.append(unit_path(moment.xx * same, weight))
            return [*found, None]

        return paths

    def _fewest_units(
        self,
        region: Region,
        structures: Sequence[Structure],
        paths: Sequence[UnitPath | None],
        budget: float,
    ) -> Judged | None:
        """Bisection over THRESHOLDS for the largest reduction whose measured change fits the budget."""
        best: Judged | None = None
        low, high = 0, len(THRESHOLDS) - 1
        while low <= high:
            middle = (low + high) // 2
            keep = reduce_to(region.widths, structures, paths, THRESHOLDS[middle])
            candidate = self._candidate(region, structures, keep)
            if candidate.gain < WORTHWHILE:
                high = middle - 1  # too timid to gain anything
                continue
            judged = self._judge(region, candidate)
            if judged.change <= budget:
                best, high = judged, middle - 1
            else:
                low = middle + 1
        return best

    def _judge(self, region: Region, candidate: Candidate) -> Judged:
        assert self.calibrator is not None
        old = [self.program.affine(site) for site in region.sites]
        refitted = refit_run(self.calibrator, region.sites, old, partition(candidate.segments), self.upstream)
        placed = self.upstream | {
            site.index: affine for site, affine in zip(region.sites, refitted.affine, strict=True)
        }
        return Judged(candidate, refitted.affine, self._change(placed))

    def _change(self, placed: dict[int, Affine]) -> float:
        assert self.calibrator is not None
        probe = self.calibrator.probe
        pairs = ((probe.run(feeds, {}), probe.run(feeds, placed)) for feeds in self.calibrator.feeds("select"))
        options = self.program.options
        return compare_outputs(pairs, options.metric, options.tolerance).largest

    # Cost

    def _candidate(
        self,
        region: Region,
        structures: Sequence[Structure],
        keep: Sequence[NDArray[np.bool_] | None],
    ) -> Candidate:
        rows = self._rows(region)
        segments = with_best_forms(self.cost, rows, compose(region.widths, structures, keep))
        dense = compose(region.widths, (), [None] * len(region.widths))
        objective = self.program.options.objective
        if objective == "latency":
            before = region_time(self.cost, rows, dense, layouts(dense))
            after = region_time(self.cost, rows, segments, layouts(segments))
        else:  # one multiply-add for each stored weight: the two counts have the same ratio
            before = float(sum(flops for segment in dense for flops in kept_flops(segment)))
            after = float(sum(flops for segment in segments for flops in kept_flops(segment)))
        return Candidate(segments, before / max(after, 1e-9))

    def _rows(self, region: Region) -> int:
        per_sample = self.program.shared.get("rows_per_sample", {}).get(region.sites[0].index, 1)
        return int(self.program.shared.get("latency_samples", DEFAULT_ROWS)) * int(per_sample)

    def _cost_reason(self, candidate: Candidate) -> str:
        gathers = any(layout.gather for layout in layouts(candidate.segments))
        return "permutation-cost" if gathers else "not-faster"


def _removed_norm(affine: Affine, rows: Labels, columns: Labels) -> float:
    """Norm of the entries that go, over the norm of the matrix."""
    gone = np.where((rows[:, None] == columns[None, :]) & (rows != DROPPED)[:, None], 0.0, affine.weight)
    return float(np.linalg.norm(gone) / max(float(np.linalg.norm(affine.weight)), 1e-30))
