"""Decide what each region becomes: the lowest predicted cost whose measured change of the outputs fits the tolerance.

Candidates for a region are what goes exactly, its structure (blocks), its structure with units dropped, units dropped
alone, and slices where its function has independent parts. Each is compensated first and then judged end to end, on
the *select* part of the data: a split is never judged by what it removes. Without calibration data only what the
weights alone bound is considered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onnx_decomp.axes import Region
from onnx_decomp.cost import CostModel, cpu, cuda
from onnx_decomp.metrics import compare_outputs
from onnx_decomp.passes.compensation import (
    BATCH,
    Calibrator,
    Refitted,
    View,
    masked,
    refit_run,
)
from onnx_decomp.passes.exact import Proven, fold_units, prove
from onnx_decomp.passes.folding import (
    Indices,
    Keep,
    Layout,
    compose,
    joined_orders,
    kept_flops,
    partition,
)
from onnx_decomp.passes.pricing import region_time, with_best_forms
from onnx_decomp.passes.reduction import UnitPath, round_up, unit_path
from onnx_decomp.probe import Probe, outer_tensors
from onnx_decomp.program import DROPPED, Labels, Program, Rewrite, Segment, Structure
from onnx_decomp.sites import Affine

THRESHOLDS = tuple(np.geomspace(0.7, 1e-5, 64))
"""Relative errors, each of which a reduction may cost at every hidden axis: what is searched by bisection."""

MARGIN = 0.95
"""Share of the tolerance that may be spent on the select part, so that unseen data still pass."""

PREFERRED = 1.5
"""Weight of a slice's gain: what it removes is leakage between parts, so that the task suffers less than from the same
change of the outputs elsewhere (docs/benchmarks.md)."""

EXACT = 1e-6
"""Change of the outputs on held-back samples up to which a removal counts as exact."""

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


def reduce_to(
    region: Region, structures: Sequence[Structure], paths: Mapping[int, UnitPath], threshold: float
) -> Keep:
    """Units to keep at a threshold: at least one of every block, in widths that vector units like."""
    keep: dict[int, NDArray[np.bool_]] = {}
    for group, path in paths.items():
        labels = group_labels(region, structures, group)
        stays = np.zeros(len(labels), bool)
        stays[path.keep(threshold)] = True
        rank = np.empty(len(path.order), np.intp)
        rank[path.order] = np.arange(len(path.order))
        for block in np.unique(labels[labels != DROPPED]):
            members = np.flatnonzero(labels == block)
            count = round_up(int(stays[members].sum()), len(members))
            stays[members] = False
            stays[members[np.argsort(-rank[members])[:count]]] = True
        stays[labels == DROPPED] = False
        keep[group] = stays
    return keep


def unread_inputs(region: Region) -> list[int]:
    """Groups that only sites of the region read: its tensor as it enters, nothing else of it is needed here."""
    written = {group for _, group in region.ends}
    found = []
    for entry in region.entries:
        group = region.group_of[entry]
        reading = [site for site in region.sites if site.input == entry]
        plain = len(region.carriers[entry].units) == region.groups[group].size
        readers = sum(read == group for read, _ in region.ends)
        if plain and group not in written and len(reading) == readers:
            found.append(group)
    return found


def group_labels(region: Region, structures: Sequence[Structure], group: int) -> Labels:
    """Blocks of one group: those of the structure that covers it, else one."""
    for structure in structures:
        if group in structure.labels:
            return structure.labels[group]
    return np.zeros(region.groups[group].size, np.int32)


@dataclass(frozen=True)
class Verdict:
    """What came of a region: the best candidate that fits, or the reason why there is none, with its numbers."""

    judged: Judged | None
    reason: str = "applied"
    numbers: dict[str, float] = field(default_factory=dict)
    sliced: bool = False
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
    orders: dict[int, Indices] = field(default_factory=dict)
    """Of free groups, as accepted rewrites need them."""
    _calibrator: Calibrator = field(init=False)
    """Of the region under work."""

    def plan(self, region: Region, budget: float) -> Verdict:
        """The best way to write one region; the budget of change to the outputs includes that of earlier regions."""
        refusal = self._refusal(region)
        if refusal is not None:
            return Verdict(None, refusal)
        self._calibrator = self._calibrate(region)
        found = self.program.structures.get(region.name, ())
        structures = tuple(s for s in found if self._may_act_on(region, s))
        if self.program.data.kind == "calibration":
            verdict = self._search(region, structures, budget)
        else:
            verdict = self._bounded(region, structures, budget)
        if verdict.judged is None and found and not structures:
            return replace(verdict, reason="estimated-null")
        return verdict

    def _calibrate(self, region: Region) -> Calibrator:
        program = self.program
        assert program.probe is not None
        outer = outer_tensors(program.index, region)
        local = Probe(program.index, region.sites, program.source.folder, region=region)
        return Calibrator(program.probe, program.data, local, outer, dict(self.upstream))

    def accept(self, region: Region, judged: Judged) -> Rewrite:
        """Take a candidate for good: what follows is fitted on what it makes."""
        refitted, segments = judged.refitted, judged.candidate.segments
        self.upstream |= _placed(region, refitted)
        added, self.change = max(judged.change - self.change, 0.0), max(judged.change, self.change)
        rewrite = Rewrite(
            region,
            segments,
            refitted.affine,
            "split" if any(segment.blocks > 1 for segment in segments) else "reduced",
            "applied",
            added,
            judged.candidate.gain,
            tuple(zip(refitted.fitted_errors, refitted.errors, strict=True)),
            refitted.placed,
        )
        self.orders = joined_orders([*self.program.rewrites, rewrite])
        return rewrite

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
        sites = [region.sites[at] for at in structure.sites]
        if all(self.program.evidence[site.index].kind != "estimated" for site in sites):
            return True
        spans = partition(region, compose(region, [structure]))
        return all(
            removed_norm(self.program.affine(region.sites[at]), *spans[at]) <= VANISHED
            for at in structure.sites
        )

    # Without data

    def _bounded(self, region: Region, structures: Sequence[Structure], budget: float) -> Verdict:
        """Plain removal of what has vanished; its share of the norm stands in for the change of the outputs."""
        exact = self._exact(region)
        if not structures:
            return exact if exact.judged is not None else Verdict(None, "no-calibration")
        candidate = self._candidate(region, structures)
        affine, removed = [], []
        for site, (rows, columns) in zip(region.sites, partition(region, candidate.segments), strict=True):
            old = self.program.affine(site)
            removed.append(removed_norm(old, rows, columns))
            affine.append(masked(old, rows, columns))
        change = self.change + sum(removed)
        numbers = {"change": change, "gain": candidate.gain}
        if change > budget:
            return Verdict(None, "no-calibration", numbers)
        if candidate.gain < WORTHWHILE:
            return Verdict(None, self._cost_reason(region, candidate), numbers)
        refitted = Refitted(tuple(affine), tuple(affine), tuple(removed), tuple(removed))
        bounded = Verdict(Judged(candidate, refitted, change), numbers=numbers)
        return max(bounded, exact, key=lambda verdict: verdict.numbers.get("gain", 0.0))

    def _exact(self, region: Region) -> Verdict:
        """Units that go for nothing, without any refit; without calibration data those that the weights prove."""
        affine = [self.program.affine(site) for site in region.sites]
        keep: dict[int, NDArray[np.bool_]] = {}
        for group in sorted(region.elastic):
            readers = [at for at, (read, _) in enumerate(region.ends) if read == group]
            if len({region.sites[at].input for at in readers}) != 1:
                continue
            moments = self._calibrator.moments("fit", region.sites[readers[0]], {})
            folding = fold_units(moments, [affine[at] for at in readers], self._proven(region, group))
            if not folding.keep.all() and folding.keep.any():
                keep[group] = folding.keep
                for at in readers:
                    affine[at] = folding.apply(affine[at])
        candidate = self._candidate(region, (), keep)
        if not keep or candidate.gain < WORTHWHILE:
            return Verdict(None, "no-redundancy")
        spans = partition(region, candidate.segments)
        written = tuple(masked(old, *span) for old, span in zip(affine, spans, strict=True))
        refitted = Refitted(written, written, (0.0,) * len(written), (0.0,) * len(written))
        change = self._change(self.upstream | _placed(region, refitted))
        numbers = {"change": change, "gain": candidate.gain}
        if change > self.change + EXACT:
            return Verdict(None, "no-redundancy", numbers)  # what never moved there does move here
        return Verdict(Judged(candidate, refitted, change), numbers=numbers)

    def _proven(self, region: Region, group: int) -> Proven | None:
        """What the weights prove of a group; None where data is there to show more."""
        if self.program.data.kind == "calibration":
            return None
        writers = [at for at, (_, written) in enumerate(region.ends) if written == group]
        alike = not any(region.group_of[name] == group for name in region.constants)
        return prove([self.program.affine(region.sites[at]) for at in writers], alike)

    # With data

    def _search(self, region: Region, structures: Sequence[Structure], budget: float) -> Verdict:
        """The best of: structure, structure with fewer units, fewer units alone, independent slices."""
        tried: list[Verdict] = []
        if structures:
            tried.append(self._as_found(region, structures, budget))
        if region.elastic:
            tried.append(self._exact(region))
        if self.reduce and region.elastic:
            # Where the structure alone changes too much, dropping units on top only adds to that.
            start = structures if structures and tried[0].reason != "tolerance" else ()
            tried.append(self._reduced(region, start, budget))
        # Where blocks that the weights show were kept, the function has no others to show.
        accepted = bool(structures) and tried[0].judged is not None
        sliced = None if accepted else self.program.slices.get(region.name)
        if sliced is not None:
            tried.append(self._sliced(region, sliced, budget))
        fitting = [verdict for verdict in tried if verdict.judged is not None]
        if not fitting:
            return tried[0] if structures else tried[-1] if sliced else Verdict(None, "no-structure")
        best = max(
            fitting, key=lambda verdict: verdict.numbers["gain"] * (PREFERRED if verdict.sliced else 1.0)
        )
        passed_over = tuple(verdict for verdict in tried[:1] if structures and verdict.judged is None)
        first = tried[0].numbers if structures else {}
        return replace(best, numbers=first | best.numbers, passed_over=passed_over)

    def _as_found(self, region: Region, structures: Sequence[Structure], budget: float) -> Verdict:
        candidate = self._candidate(region, structures)
        judged = self._judge(region, candidate)
        numbers = {"change": judged.change, "gain": candidate.gain}
        numbers |= self._redraw(region, candidate)
        if judged.change > budget:
            return Verdict(None, "tolerance", numbers)
        if candidate.gain < WORTHWHILE:
            return Verdict(None, self._cost_reason(region, candidate), numbers)
        return Verdict(judged, numbers=numbers)

    def _sliced(self, region: Region, sliced: Structure, budget: float) -> Verdict:
        """A branch for each independent part, with copies of the units that several need, then fewer units in each."""
        whole = self._judge(region, self._candidate(region, [sliced]))
        numbers = {"sliced": whole.change}
        if whole.change > budget:
            return Verdict(None, "tolerance", numbers | {"change": whole.change})
        verdict = self._reduced(region, [sliced], budget, whole.refitted)
        if verdict.judged is None and whole.candidate.gain >= WORTHWHILE:
            verdict = Verdict(whole, numbers={"change": whole.change, "gain": whole.candidate.gain})
        return replace(verdict, numbers=verdict.numbers | numbers, sliced=True)

    def _reduced(
        self,
        region: Region,
        structures: Sequence[Structure],
        budget: float,
        refitted: Refitted | None = None,
    ) -> Verdict:
        """Fewer hidden units; fewer inputs as well if that gains more, though what is read has to be gathered then."""
        paths = self._unit_paths(region, structures, refitted)
        hidden = {group: path for group, path in paths.items() if group in region.elastic}
        best = self._fewest_units(region, structures, hidden, budget)
        if len(hidden) == len(paths):
            return best
        least = max(best.numbers.get("gain", 0.0), WORTHWHILE) * WORTHWHILE
        further = self._fewest_units(region, structures, paths, budget, least)
        return further if further.judged is not None else best

    def _redraw(self, region: Region, candidate: Candidate) -> dict[str, float]:
        """Change of the outputs when what the structure leaves out is drawn anew from its null.

        If "never learned" meant "harmless", it would change nothing; that it does is why a refit has to follow.
        """
        init, placed = self.program.init, dict(self.upstream)
        rng = np.random.default_rng(self.program.options.seed)
        spans = partition(region, candidate.segments)
        for site, (rows, columns) in zip(region.sites, spans, strict=True):
            evidence, null = self.program.evidence.get(site.index), init and init.nulls.get(site.index)
            if evidence is None or not null or null.kind == "estimated":
                return {}
            old = self.program.affine(site)
            fresh = evidence.shrink * null.sample(rng, site.shape)
            placed[site.index] = Affine(np.where(in_blocks(rows, columns), old.weight, fresh), old.bias)
        return {"redraw": self._change(placed)}

    def _unit_paths(
        self,
        region: Region,
        structures: Sequence[Structure],
        refitted: Refitted | None = None,
    ) -> dict[int, UnitPath]:
        """For each group that can lose units the order in which they can go, given what its readers still read.

        Hidden units, and inputs that the region need not read. refitted: the slices, whose units are copies; their
        moments are those of the sliced network.
        """
        placed = {} if refitted is None else self.upstream | _placed(region, refitted)
        segments = compose(region, structures)
        spans = partition(region, segments)
        paths: dict[int, UnitPath] = {}
        for group in [*sorted(region.elastic), *unread_inputs(region)]:
            readers = [at for at, (read, _) in enumerate(region.ends) if read == group]
            if len({region.sites[at].input for at in readers}) != 1:
                continue
            first, rows = readers[0], spans[readers[0]][0]
            view = View.of(region, segments, first)
            together = (rows[:, None] == rows[None, :]) & (rows != DROPPED)[:, None]
            weights = []
            for at in readers:
                own = View.of(region, segments, at).affine(self.program.affine(region.sites[at]))
                weights.append(masked(own if refitted is None else refitted.affine[at], *spans[at]).weight)
            moments = view.moments(self._calibrator.moments("fit", region.sites[first], placed))
            paths[group] = unit_path(moments.xx * together, np.hstack(weights))
        return paths

    def _fewest_units(
        self,
        region: Region,
        structures: Sequence[Structure],
        paths: Mapping[int, UnitPath],
        budget: float,
        least: float = WORTHWHILE,
    ) -> Verdict:
        """Bisection over THRESHOLDS for the largest reduction whose measured change fits the budget."""
        best = Verdict(None, "no-redundancy")
        ways = (reduce_to(region, structures, paths, threshold) for threshold in THRESHOLDS)
        by_gain = {found.gain: found for found in (self._candidate(region, structures, way) for way in ways)}
        candidates = [by_gain[gain] for gain in sorted(by_gain, reverse=True) if gain >= least]
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

    def _judge(self, region: Region, candidate: Candidate) -> Judged:
        old = [self.program.affine(site) for site in region.sites]
        refitted = refit_run(self._calibrator, region, candidate.segments, old, self.upstream)
        return Judged(candidate, refitted, self._change(self.upstream | _placed(region, refitted)))

    def _change(self, placed: Mapping[int, Affine]) -> float:
        """Change of the model's outputs on the select part, by the metric of the tolerance, with confidence."""
        probe, options = self.program.probe, self.program.options
        assert probe is not None
        batches = self.program.data.batches("select", BATCH)
        pairs = ((probe.run(feeds, {}), probe.run(feeds, placed)) for feeds in batches)
        return compare_outputs(pairs, options.metric, options.tolerance).bound

    def _candidate(
        self, region: Region, structures: Sequence[Structure], keep: Keep | None = None
    ) -> Candidate:
        cost: CostModel = cuda() if self.program.target == "cuda" else cpu()
        rows = self.program.timed_samples * self.program.rows_per_sample.get(region.sites[0].index, 1)
        segments = with_best_forms(cost, rows, region, compose(region, structures, keep))
        dense = compose(region)
        if self.program.options.objective == "latency":
            before, after = (region_time(cost, rows, self._layout(region, way)) for way in (dense, segments))
        else:  # a multiply-add for each stored weight: FLOPs and bytes have the same ratio
            before, after = (
                float(sum(kept_flops(region, segment) for segment in way)) for way in (dense, segments)
            )
        return Candidate(segments, before / max(after, 1e-9))

    def _layout(self, region: Region, segments: Sequence[Segment]) -> Layout:
        """Where things lie with everything that has been accepted so far in place."""
        here = {
            group: np.argsort(labels, kind="stable")
            for segment in segments
            for group, labels in segment.labels.items()
            if segment.blocks > 1 and region.groups[group].pinned is None and group not in segment.copies
        }
        return Layout.of(region, segments, here | self.orders)

    def _cost_reason(self, region: Region, candidate: Candidate) -> str:
        """What stands in the way of a gain."""
        crossings = self._layout(region, candidate.segments).crossings()
        gathers = any(crossing.index is not None for _, crossing in crossings)
        return "permutation-cost" if gathers else "not-faster"


def _placed(region: Region, refitted: Refitted) -> dict[int, Affine]:
    return {site.index: affine for site, affine in zip(region.sites, refitted.placed, strict=True)}


def in_blocks(rows: Labels, columns: Labels) -> NDArray[np.bool_]:
    """[K, N], True where a row and a column share a block."""
    mask: NDArray[np.bool_] = (rows[:, None] == columns[None, :]) & (rows != DROPPED)[:, None]
    return mask


def removed_norm(affine: Affine, rows: Labels, columns: Labels) -> float:
    """Norm of the entries that go, over the norm of the matrix."""
    gone = np.where(in_blocks(rows, columns), np.float32(0), affine.weight)
    return float(np.linalg.norm(gone) / max(float(np.linalg.norm(affine.weight)), 1e-30))
