"""Decide what each region becomes: the lowest predicted cost whose measured change of the outputs fits the tolerance.

First each region's blocks, those that its weights show, are judged by themselves after a refit. On top of what was
accepted, a search over all regions at once drops units and lowers ranks until the tolerance is spent (`search`); where
the function of a region has independent parts, the same search starts from slices too, and the better plan is taken. A
region for which nothing else paid may still lose what goes exactly. Without calibration data only what the weights
alone bound is considered.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onnx_decomp.axes import Region
from onnx_decomp.cost import CostModel, model_for
from onnx_decomp.passes.compensation import Refitted, View
from onnx_decomp.passes.exact import Proven, fold_units, prove
from onnx_decomp.passes.folding import Indices, compose, copies_of, decision_of, kept_flops, partition
from onnx_decomp.passes.judging import Judge
from onnx_decomp.passes.layouts import Layout, joined_orders, own_orders
from onnx_decomp.passes.plans import Part, Plan, correctable
from onnx_decomp.passes.pricing import region_time, with_best_forms
from onnx_decomp.passes.ridge import in_blocks, masked, removed_norm
from onnx_decomp.passes.search import MARGIN, Search
from onnx_decomp.program import Program, Rewrite, Segment, Structure
from onnx_decomp.sites import Affine

PREFERRED = 3.0
"""Weight of a plan with slices: what they remove is leakage between parts, so that the task suffers less than from the
same change of the outputs elsewhere (docs/benchmarks.md)."""

ROOM = 0.7
"""Share of what may be spent above which the search is not taken up again after something was undone: it would cost as
much time as before, for little."""

EXACT = 1e-6
"""Change of the outputs on held-back samples up to which a removal counts as exact."""

WORTHWHILE = 1.02
"""Predicted gain under which a rewrite is not even measured."""

WORTH = 0.01
"""Share of the whole cost that a search has to save for spending all of the tolerance, or as much less as it spends."""

VANISHED = 1e-3
"""Share of a matrix' norm up to which entries count as gone already, whatever tolerance is allowed."""


@dataclass(frozen=True)
class Candidate:
    """A way to write a region, with the forms that are predicted to be fastest."""

    segments: tuple[Segment, ...]
    gain: float
    """Predicted cost of the dense region over that of the candidate, in the objective's own unit."""


@dataclass(frozen=True)
class Judged:
    """A compensated candidate and what it did to the outputs on the select part."""

    candidate: Candidate
    refitted: Refitted
    change: float


@dataclass(frozen=True)
class Verdict:
    """What came of a region: what it becomes, or the reason why it stays, with its numbers."""

    judged: Judged | None
    reason: str = "applied"
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Planning:
    """Fills `program.rewrites`, in graph order."""

    name: str = "planning"
    reduce: bool = True

    def run(self, program: Program) -> None:
        program.rewrites = []
        program.decisions = [d for d in program.decisions if d.where != self.name]  # of an earlier round
        planner = Planner(program, self.reduce)
        verdicts = planner.plan()
        for region in program.regions:
            for said in verdicts[region.name]:
                outcome: Literal["applied", "declined"] = "applied" if said.judged else "declined"
                for site in region.sites:
                    if said.reason == "no-structure" and program.reason(site) is not None:
                        continue  # an earlier pass has said more exactly why
                    program.decide(self.name, site, outcome, said.reason, **said.numbers)
            final = verdicts[region.name][-1]
            if final.judged is not None:
                program.rewrites.append(_rewrite(region, final.judged))


def _rewrite(region: Region, judged: Judged) -> Rewrite:
    refitted = judged.refitted
    return Rewrite(
        region,
        judged.candidate.segments,
        refitted.affine,
        decision_of(region, judged.candidate.segments),
        "applied",
        judged.change,
        judged.candidate.gain,
        tuple(zip(refitted.fitted_errors, refitted.errors, strict=True)),
        refitted.placed,
        refitted.corrections,
    )


Blocks = dict[str, tuple[Structure, ...]]
"""What a plan starts from, by region."""

Verdicts = dict[str, list[Verdict]]
"""By region what was said of it; the last word counts."""


@dataclass
class Planner:
    """One round over the regions."""

    program: Program
    reduce: bool
    orders: dict[int, Indices] = field(default_factory=dict)
    """Of free groups, as blocks that were accepted need them."""
    refused: Blocks = field(default_factory=dict)
    """Blocks that change the outputs too much by themselves, by region."""
    cost: CostModel = field(init=False)
    search: Search = field(init=False)

    def __post_init__(self) -> None:
        found = model_for(self.program.target, self._type(), self.program.options.cost)
        self.cost = found.in_graph() if self.program.options.cuda_graph else found
        kept = self.program.memory.get("search")
        usable = [region for region in self.program.regions if self._refusal(region) is None]
        if isinstance(kept, Search):
            self.search = replace(kept, regions=usable)
        else:
            self.search = Search(
                self.program, usable, self.cost, Judge(self.program), self.reduce, self.reduce
            )
        self.program.memory["search"] = self.search

    def _type(self) -> str:
        """That most of the products are computed in."""
        flops = Counter[str]()
        for region in self.program.regions:
            for site in region.sites:
                flops[str(site.dtype)] += site.flops
        return flops.most_common(1)[0][0] if flops else "float32"

    def plan(self) -> Verdicts:
        """What becomes of every region."""
        verdicts: Verdicts = {}
        for region in self.program.regions:
            refusal = self._refusal(region)
            verdicts[region.name] = [] if refusal is None else [Verdict(None, refusal)]
        if self.program.data.kind == "calibration":
            self._measured(verdicts)
        else:
            self._unmeasured(verdicts)
        return verdicts

    def _refusal(self, region: Region) -> str | None:
        options, names = self.program.options, [n for s in region.sites for n in (s.node, s.weight)]
        if region.name in self.program.banned:
            return self.program.banned[region.name]
        if options.include and not any(re.search(options.include, name) for name in names):
            return "excluded"
        if options.exclude and any(re.search(options.exclude, name) for name in names):
            return "excluded"
        return None

    def structures(self, region: Region) -> tuple[Structure, ...]:
        """Blocks that may be acted on: an estimated null alone never removes anything but next to nothing by norm."""
        return tuple(s for s in self.program.structures.get(region.name, ()) if self._may_act_on(region, s))

    def _may_act_on(self, region: Region, structure: Structure) -> bool:
        sites = [region.sites[at] for at in structure.sites]
        if all(self.program.evidence[site.index].kind != "estimated" for site in sites):
            return True
        segments = compose(region, [structure])
        return all(
            removed_norm(self.program.affine(region.sites[at]), self._masked(region, segments, at)[1])
            <= VANISHED
            for at in structure.sites
        )

    def _masked(self, region: Region, segments: Sequence[Segment], at: int) -> tuple[Affine, Affine]:
        """A site's old weights within its blocks, and the same as the graph is fed with them."""
        view = View.of(region, segments, at)
        blocks = masked(view.affine(self.program.affine(region.sites[at])), *partition(region, segments)[at])
        return blocks, view.fed(blocks)

    # With data

    def _measured(self, verdicts: Verdicts) -> None:
        """The best plan found from blocks as the weights show them, and from slices."""
        if not self.search.regions:
            return
        blocks, blocked = self._accepted(verdicts)
        plan = self._continued() or self._cheapest(blocks, blocked, verdicts)
        plan = self._worthwhile(self._settled(plan), blocked, verdicts)
        self.program.memory["plan"] = plan
        stepped = not np.isnan(plan.predicted) and bool(plan.placed)
        self.program.predicted = plan.predicted * self._tolerance if stepped else None
        self._say(plan, verdicts)

    def _cheapest(self, blocks: Blocks, blocked: Plan, verdicts: Verdicts) -> Plan:
        """The best of the plans that start from blocks, from slices, and from blocks with corrections beside them."""
        plan = self.search.within(self.search.charged(blocked))
        sliced = self._accepted_slices(blocks, verdicts)
        if sliced:
            other = self.search.within(self.search.start({**blocks, **sliced}))
            if self._total(plan) > self._total(other) / PREFERRED:
                plan = other
        if self.refused and self.reduce:
            start = self.search.start({**blocks, **self.refused}, self.refused)
            if start.spent <= self.search.margin:
                other = self.search.within(start)
                if self._total(other) < self._total(plan):
                    plan = other
        return plan

    def _continued(self) -> Plan | None:
        """The plan of the round before, without what a gate has undone since; none if it was to spend too much."""
        before = self.program.memory.get("plan")
        if not isinstance(before, Plan) or before.spent > self.search.margin:
            return None
        names = {region.name for region in self.search.regions}
        plan = self.search.fitted([part for part in before.parts if part.region.name in names])
        return self.search.within(plan) if plan.spent < ROOM * self.search.margin else plan

    @property
    def _tolerance(self) -> float:
        return self.program.options.tolerance

    def _budget(self, region: Region) -> float:
        """Share of the tolerance that a region and those before it may spend on blocks: errors add up in squares."""
        flops = {r.name: sum(site.flops for site in r.sites) for r in self.program.regions}
        seen = 0
        for name, own in flops.items():
            seen += own
            if name == region.name:
                break
        return MARGIN * self.program.budget * float(np.sqrt(seen / sum(flops.values())))

    def _accepted(self, verdicts: Verdicts) -> tuple[Blocks, Plan]:
        """Regions whose blocks fit and pay, each tried on top of those before it, and the plan that they make."""
        accepted: Blocks = {}
        standing, flows = self.search.start(), self.search.flows()
        for region in self.search.regions:
            structures = self.structures(region)
            if not structures:
                if self.program.structures.get(region.name):
                    verdicts[region.name].append(Verdict(None, "estimated-null"))
                continue
            plan = self.search.behind(standing, region, structures, flows)
            candidate = self._candidate(region, self._part(plan, region).segments)
            numbers = {"change": plan.spent * self._tolerance, "gain": candidate.gain}
            numbers |= self._redraw(region, candidate)
            if plan.spent > self._budget(region):
                if correctable(structures):
                    self.refused[region.name] = structures
                verdicts[region.name].append(Verdict(None, "tolerance", numbers))
            elif candidate.gain < WORTHWHILE:
                verdicts[region.name].append(Verdict(None, self._cost_reason(region, candidate), numbers))
            else:
                accepted[region.name], standing = structures, plan
                written = [self._part(plan, r) for r in self.search.regions if r.name in accepted]
                self.orders = joined_orders(
                    Rewrite(part.region, part.segments, (), "split", "") for part in written
                )
        return accepted, standing

    def _accepted_slices(self, blocks: Mapping[str, Sequence[Structure]], verdicts: Verdicts) -> Blocks:
        """Regions whose function shows independent parts where the weights show none, and that may be sliced."""
        accepted: Blocks = {}
        for region in self.search.regions:
            found = self.program.slices.get(region.name)
            if found is None or region.name in blocks:
                continue
            plan = self.search.start({**blocks, **accepted, region.name: (found,)})
            change = plan.spent * self._tolerance
            if plan.spent <= self._budget(region):
                accepted[region.name] = (found,)
                continue
            if not verdicts[region.name]:
                verdicts[region.name].append(Verdict(None, "tolerance", {"change": change, "sliced": change}))
        return accepted

    @staticmethod
    def _part(plan: Plan, region: Region) -> Part:
        return next(part for part in plan.parts if part.region is region)

    def _total(self, plan: Plan) -> float:
        """Predicted cost of everything, as it will be written."""
        total = 0.0
        for part in plan.parts:
            dense = self._cost(part.region, compose(part.region))
            total += dense / max(self._candidate(part.region, part.segments).gain, 1.0)
        return total

    def _settled(self, plan: Plan) -> Plan:
        """Regions that gain next to nothing go back to what they were, and the others are refitted without them."""
        parts = []
        for part in plan.parts:
            pays = not part.dense and self._candidate(part.region, part.segments).gain >= WORTHWHILE
            parts.append(part if pays or part.dense else Part(part.region))
        if all(new is old for new, old in zip(parts, plan.parts, strict=True)):
            return plan
        settled = replace(self.search.fitted(parts), predicted=plan.predicted)
        # What was refitted on top of a region may miss it.
        return settled if settled.spent <= max(plan.spent, MARGIN) else plan

    def _worthwhile(self, plan: Plan, blocked: Plan, verdicts: Verdicts) -> Plan:
        """The plan, or only the blocks that it has where the rest saves too little for what it changes."""
        whole, saved = self._total(blocked), self._total(blocked) - self._total(plan)
        if saved >= WORTH * (plan.spent - blocked.spent) * whole:
            return plan
        numbers = {"change": plan.spent * self._tolerance, "saved": saved / whole}
        for part in plan.parts:
            if not part.dense and self._part(blocked, part.region).dense:
                verdicts[part.region.name].append(Verdict(None, "little-gain", numbers))
        return self.search.charged(blocked)

    def _say(self, plan: Plan, verdicts: Verdicts) -> None:
        """The last word on every region: what the plan makes of it, or what goes exactly where that gains more."""
        for part in plan.parts:
            said, region = verdicts[part.region.name], part.region
            exact = Verdict(None, "no-structure")
            if region.elastic and not part.structures:
                exact = self._exact(region, plan)
            planned = self._planned(part, plan)
            if planned is None and exact.judged is None and said:
                continue
            if exact.judged is not None and exact.numbers["gain"] > (
                planned.numbers["gain"] if planned else 0
            ):
                planned = exact
            said.append(planned or Verdict(None, "no-structure"))

    def _planned(self, part: Part, plan: Plan) -> Verdict | None:
        if part.dense:
            return None
        change = plan.spent * self._tolerance
        candidate = self._candidate(part.region, part.segments)
        numbers = {"change": change, "gain": candidate.gain}
        if any(structure.kind == "influence" for structure in part.structures):
            numbers["sliced"] = change
        share = change * float(np.sqrt(part.harm / max(plan.harm, 1e-30)))
        assert part.refitted is not None
        return Verdict(Judged(candidate, part.refitted, share), numbers=numbers)

    def _redraw(self, region: Region, candidate: Candidate) -> dict[str, float]:
        """Change of the outputs when what the structure leaves out is drawn anew from its null.

        If "never learned" meant "harmless", it would change nothing; that it does is why a refit has to follow.
        """
        if copies_of(candidate.segments):
            return {}
        init, placed = self.program.init, dict[int, Affine]()
        rng = np.random.default_rng(self.program.options.seed)
        spans = partition(region, candidate.segments)
        for site, (rows, columns) in zip(region.sites, spans, strict=True):
            evidence, null = self.program.evidence.get(site.index), init and init.nulls.get(site.index)
            if evidence is None or not null or null.kind == "estimated":
                return {}
            old = self.program.affine(site)
            fresh = evidence.shrink * null.sample(rng, site.shape)
            placed[site.index] = Affine(np.where(in_blocks(rows, columns), old.weight, fresh), old.bias)
        return {"redraw": self.search.judge.spent(placed) * self._tolerance}

    # What goes exactly, and without data

    def _unmeasured(self, verdicts: Verdicts) -> None:
        """Plain removal of what has vanished; its share of the norm stands in for the change of the outputs."""
        change = 0.0
        plan = Plan((), 0.0, 0.0)
        for region in self.search.regions:
            verdict = self._bounded(region, plan, change)
            verdicts[region.name].append(verdict)
            if verdict.judged is not None:
                change = max(change, verdict.judged.change)

    def _bounded(self, region: Region, plan: Plan, before: float) -> Verdict:
        exact = self._exact(region, plan) if region.elastic else Verdict(None, "no-redundancy")
        structures = self.structures(region)
        if not structures:
            if exact.judged is not None:
                return exact
            unsure = self.program.structures.get(region.name)
            return Verdict(None, "estimated-null" if unsure else "no-calibration")
        candidate = self._candidate(region, compose(region, structures))
        affine, placed, removed = [], [], []
        for at, site in enumerate(region.sites):
            blocks, fed = self._masked(region, candidate.segments, at)
            affine.append(blocks)
            placed.append(fed)
            removed.append(removed_norm(self.program.affine(site), fed))
        change = before + sum(removed)
        numbers = {"change": change, "gain": candidate.gain}
        if change > self._budget(region) * self._tolerance:
            return Verdict(None, "no-calibration", numbers)
        if candidate.gain < WORTHWHILE:
            return Verdict(None, self._cost_reason(region, candidate), numbers)
        refitted = Refitted(tuple(affine), tuple(placed), tuple(removed), tuple(removed))
        bounded = Verdict(Judged(candidate, refitted, change), numbers=numbers)
        return max(bounded, exact, key=lambda verdict: verdict.numbers.get("gain", 0.0))

    def _exact(self, region: Region, plan: Plan) -> Verdict:
        """Units that go for nothing, without any refit; without calibration data those that the weights prove."""
        affine = [self.program.affine(site) for site in region.sites]
        keep: dict[int, NDArray[np.bool_]] = {}
        calibrator = self.search.calibrator(region, {})
        for group in sorted(region.elastic):
            readers = [at for at, (read, _) in enumerate(region.ends) if read == group]
            if len({region.sites[at].input for at in readers}) != 1:
                continue
            moments = calibrator.moments("fit", region.sites[readers[0]], {})
            folding = fold_units(moments, [affine[at] for at in readers], self._proven(region, group))
            if not folding.keep.all() and folding.keep.any():
                keep[group] = folding.keep
                for at in readers:
                    affine[at] = folding.apply(affine[at])
        candidate = self._candidate(region, compose(region, (), keep))
        if not keep or candidate.gain < WORTHWHILE:
            return Verdict(None, "no-redundancy")
        spans = partition(region, candidate.segments)
        written = tuple(masked(old, *span) for old, span in zip(affine, spans, strict=True))
        refitted = Refitted(written, written, (0.0,) * len(written), (0.0,) * len(written))
        placed = {site.index: fed for site, fed in zip(region.sites, written, strict=True)}
        change = self.search.judge.spent(plan.placed | placed) * self._tolerance
        numbers = {"change": change, "gain": candidate.gain}
        if change > plan.spent * self._tolerance + EXACT:
            return Verdict(None, "no-redundancy")  # what never moved there does move here
        return Verdict(Judged(candidate, refitted, change), numbers=numbers)

    def _proven(self, region: Region, group: int) -> Proven | None:
        """What the weights prove of a group; None where data is there to show more."""
        if self.program.data.kind == "calibration":
            return None
        writers = [at for at, (_, written) in enumerate(region.ends) if written == group]
        alike = not any(region.group_of[name] == group for name in region.constants)
        return prove([self.program.affine(region.sites[at]) for at in writers], alike)

    # What it costs

    def _candidate(self, region: Region, segments: Sequence[Segment]) -> Candidate:
        rows = self._rows(region)
        padding = self.program.options.objective == "latency"
        chosen = with_best_forms(self.cost, rows, region, segments, padding)
        return Candidate(chosen, self._cost(region, compose(region)) / max(self._cost(region, chosen), 1e-9))

    def _rows(self, region: Region) -> int:
        return self.program.timed_samples * self.program.rows_per_sample.get(region.sites[0].index, 1)

    def _cost(self, region: Region, segments: Sequence[Segment]) -> float:
        if self.program.options.objective == "latency":
            return region_time(self.cost, self._rows(region), self._layout(region, segments))
        # A multiply-add for each stored weight: FLOPs and bytes have the same ratio.
        return float(self._rows(region) * sum(kept_flops(region, segment) for segment in segments))

    def _layout(self, region: Region, segments: Sequence[Segment]) -> Layout:
        """Where things lie, with everything that the weights show in place."""
        return Layout.of(region, segments, own_orders(region, segments) | self.orders)

    def _cost_reason(self, region: Region, candidate: Candidate) -> str:
        """What stands in the way of a gain."""
        crossings = self._layout(region, candidate.segments).crossings()
        gathers = any(crossing.index is not None for _, crossing in crossings)
        return "permutation-cost" if gathers else "not-faster"
