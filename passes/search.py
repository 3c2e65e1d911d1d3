"""The plan over all regions at once: down the trade of cost for change in measured steps.

Every step predicts what each knob of each region would change, weighted by sensitivities that were measured, turns
those that save most for the least (`tradeoff`), refits all rewritten regions in graph order on what the rewritten model
feeds them, and measures the outputs. What is predicted for the next step is scaled by what was measured for this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from onnx_decomp import scratch
from onnx_decomp.axes import Region
from onnx_decomp.calibration import Part as DataPart
from onnx_decomp.cost import CostModel
from onnx_decomp.passes.compensation import HELD, Calibrator, refit_run
from onnx_decomp.passes.folding import copies_of
from onnx_decomp.passes.heads import column_turns, turned_importance, turned_maps
from onnx_decomp.passes.importance import importances, moved_columns
from onnx_decomp.passes.judging import Judge, Outputs, batch_size
from onnx_decomp.passes.knobs import (
    HeadKnob,
    Standing,
    UnitKnob,
    correction_knobs,
    head_knobs,
    rank_knobs,
    turned,
    unit_knobs,
    variance,
    works,
)
from onnx_decomp.passes.plans import Part, Plan, generous_corrections, turned_part
from onnx_decomp.passes.tradeoff import Descent, Key, Knob, Price
from onnx_decomp.probe import Feeds, Probe, outer_tensors, stream_of
from onnx_decomp.program import Program, Structure
from onnx_decomp.relay import HELD as CARRIED
from onnx_decomp.relay import Flow, Relay
from onnx_decomp.sites import Affine

Array = NDArray[np.float64]

MARGIN = 0.95
"""Share of the tolerance that may be spent on the select part, so that unseen data still pass."""

OPTIMISM = 2.0
"""Over the root of the number of select samples: ridges and plans are chosen on them, and unseen ones do worse."""

STEP = 0.65
"""Cost after a step over cost before it, at the least: moments and weights are taken anew after each."""

LOOK_DOWN = STEP * STEP
"""Share of a group's units down to which one step looks."""

LEAST_GAIN = 0.995
"""A step that leaves more of the cost than that is the last."""

NEARLY = 0.9
"""Share of what may be spent at which a plan is good enough, and which a step that went too far is cut down to."""

WORTHWHILE = 0.03
"""Share of the cost that what is left of the tolerance has to save, at the rate of the last step, for one more."""

STEPS, RETRIES = 40, 4

PARTS: tuple[DataPart, ...] = ("fit", "select")
"""Of the data, that a search looks at."""

SEEN = 32
"""Times that all samples may be run while columns are moved, but for two of them in each run."""

TRIED = 0.1
"""Relative error of a site's own output at which sensitivities are measured, about."""

WIDEST, MOST_RUNS = 256, 2048
"""Columns of a region's exit that are moved one by one, and of all exits together: each is a run of the model. Of what
is wider, or comes when no more runs are left, all columns count the same."""

ENOUGH, AT_LEAST = 48, 2**14
"""Rows of x for each input of a region's widest site that are fitted on, and rows in any case, as far as there are."""

FURTHER = 10.0
"""A sensitivity is measured again where a knob can be turned to that many times the squared error of before."""

FEW = 0.02
"""Share of the tolerance under which what was spent says nothing yet."""


@dataclass(frozen=True)
class Sensitivity:
    """weight: loss for each unit of a knob's own squared error. tried: the relative one that it was measured at."""

    weight: float
    tried: float


@dataclass(frozen=True)
class Look:
    """A plan's regions as they stand, and the knobs that can be turned from there."""

    plan: Plan
    standings: list[Standing]
    knobs: dict[Key, Knob]
    found: dict[Key, UnitKnob | HeadKnob]


@dataclass
class Search:
    """The state of one compilation's search: what is held of the original, and the sensitivities measured so far."""

    program: Program
    regions: Sequence[Region]
    cost: CostModel
    judge: Judge
    units: bool = True
    ranks: bool = True
    _calibrators: dict[str, Calibrator] = field(default_factory=dict)
    _sensitivity: dict[Key, Sensitivity] = field(default_factory=dict)
    _exits: dict[str, dict[int, Array]] = field(default_factory=dict)
    _runs_left: int = MOST_RUNS
    _relay: Relay | None = None
    _seen: Look | None = None
    """Of the last plan: a step from it may have to be tried again."""

    def calibrator(
        self,
        region: Region,
        upstream: Mapping[int, Affine],
        entering: Mapping[DataPart, list[Feeds]] | None = None,
    ) -> Calibrator:
        """Of one region, below other regions' affine maps; what it holds of the original is kept for the next time."""
        if not self._calibrators:
            self._open()
        return self._calibrators[region.name].below(upstream, entering)

    def _open(self) -> None:
        """One calibrator for each region, and the original run once through all of them."""
        program = self.program
        self._calibrators = {region.name: self._new_calibrator(region) for region in self.regions}
        sites = [site for region in program.regions for site in region.sites]
        relay = Relay(program.index, sites, self.regions, program.source.folder, program.provider)
        if len(self.regions) > 1 and relay.possible and program.data.kind == "calibration":
            self._relay = relay
            for part, flow in self.flows().items():
                for region in self.regions:
                    self._calibrators[region.name].hold(part, flow.to(region, {}))
                    if flow.held > CARRIED:
                        self._relay = None
                        return

    def flows(self) -> dict[DataPart, Flow]:
        """Batches at the beginning of the model; none where it can't be run in pieces."""
        if not self._calibrators:
            self._open()
        if self._relay is None:
            return {}
        first = next(iter(self._calibrators.values()))
        return {part: Flow(self._relay, first.batches(part)) for part in PARTS}

    def _new_calibrator(self, region: Region) -> Calibrator:
        program = self.program
        assert program.probe is not None
        sites = [site for each in self.regions for site in each.sites]
        widest = max(site.shape[0] for site in sites)
        rows = min(program.rows_per_sample[site.index] for site in sites)
        streams = {site.index: stream_of(program.index, site) for site in region.sites}
        return Calibrator(
            program.probe,
            program.data,
            Probe(
                program.index, region.sites, program.source.folder, region=region, provider=program.provider
            ),
            outer_tensors(program.index, region),
            {},
            HELD // len(self.regions),
            -(-max(ENOUGH * widest, AT_LEAST) // rows),
            batch_size(program),
            {index: name for index, name in streams.items() if name is not None},
        )

    @property
    def margin(self) -> float:
        """Share of the tolerance that a plan may spend on the select part."""
        samples = max(self.program.data.samples("select"), 1)
        return MARGIN * self.program.budget * max(1.0 - OPTIMISM / float(np.sqrt(samples)), 0.5)

    # Plans

    def start(
        self,
        structures: Mapping[str, Sequence[Structure]] | None = None,
        corrected: Container[str] = (),
    ) -> Plan:
        """Regions with their blocks, if any, and nothing made smaller.

        corrected: regions whose blocks have low-rank corrections beside them, of a generous rank.
        """
        parts = []
        for region in self.regions:
            found = tuple((structures or {}).get(region.name, ()))
            beside = generous_corrections(region, found) if region.name in corrected else {}
            parts.append(Part(region, found, corrections=beside))
        return self.charged(self.fitted(parts))

    def charged(self, plan: Plan) -> Plan:
        """The same plan, its loss shared out over the regions that have blocks."""
        blocked = sum(not part.dense for part in plan.parts)
        if not blocked:
            return plan
        self._sensitivity.clear()  # what they were measured on had other blocks
        harm = self.judge.loss(plan.placed) / blocked
        return replace(
            plan, parts=tuple(part if part.dense else replace(part, harm=harm) for part in plan.parts)
        )

    def fitted(self, parts: Sequence[Part]) -> Plan:
        """Refit every part in graph order, on what the ones before it feed it, and measure."""
        placed: dict[int, Affine] = {}
        done, flows = [], self.flows()
        for part in parts:
            made = part
            if not part.dense:
                entering = (
                    {each: flow.to(part.region, placed) for each, flow in flows.items()} if placed else {}
                )
                made = self._refitted(part, placed, entering)
            placed |= made.placed
            done.append(made)
        return self._judged(done)

    def behind(
        self, plan: Plan, region: Region, structures: Sequence[Structure], flows: Mapping[DataPart, Flow]
    ) -> Plan:
        """A plan with blocks in one more region, behind all that it has rewritten: those stay as they were fitted.

        flows: on their way through the model as it is rewritten; they are not turned back.
        """
        placed = plan.placed
        entering = {each: flow.to(region, placed) for each, flow in flows.items()} if placed else {}
        made = self._refitted(Part(region, tuple(structures)), placed, entering)
        return self._judged([made if part.region is region else part for part in plan.parts])

    def _judged(self, parts: Sequence[Part]) -> Plan:
        placed = {index: fed for part in parts for index, fed in part.placed.items()}
        spent = self.judge.spent(placed) if placed else 0.0
        return Plan(tuple(parts), sum(self.part_cost(part) for part in parts), spent)

    def _refitted(
        self, part: Part, upstream: Mapping[int, Affine], entering: Mapping[DataPart, list[Feeds]]
    ) -> Part:
        calibrator = self.calibrator(part.region, upstream, entering)
        region = part.region
        old = turned_maps(region, part.heads, [self.program.affine(site) for site in region.sites])
        again = self.units or self.ranks  # only a step from here looks at the moments again
        turns = column_turns(region, part.heads)
        fitted = refit_run(calibrator, region, part.segments, old, upstream, part.importance, again, turns)
        return replace(part, refitted=fitted)

    def part_cost(self, part: Part) -> float:
        """Predicted cost of a region's sites, in the objective's unit."""
        name = part.region.name
        fixed = {Key(name, "rank", at): np.array([kept]) for at, kept in part.ranks.items()}
        fixed |= {Key(name, "correction", at): np.array([[rank]]) for at, rank in part.corrections.items()}
        knobs = {key: Knob(key, sizes, np.zeros(1), np.zeros(1)) for key, sizes in fixed.items()}
        bare = Standing(part.region, part.segments, (), (), ())
        return Descent(knobs, works(bare, {}, self._rows_of_x), self.price).cost

    @property
    def _rows_of_x(self) -> dict[int, int]:
        samples = self.program.timed_samples
        return {index: rows * samples for index, rows in self.program.rows_per_sample.items()}

    @property
    def price(self) -> Price:
        if self.program.options.objective == "latency":
            return self._time
        # A multiply-add for each stored weight: FLOPs and bytes have the same ratio.
        return lambda rows, k, n, rank: float(rows * (k * n if rank is None else min(k * n, rank * (k + n))))

    def _time(self, rows: int, k: int, n: int, rank: int | None) -> float:
        whole = self.cost.dense(rows, k, n)
        if rank is None or rank * (k + n) >= k * n:
            return whole
        return self.cost.dense(rows, k, rank) + self.cost.dense(rows, rank, n)

    def _standing(self, part: Part) -> Standing:
        """A region as it stands, with moments and importances."""
        region, refitted, segments = part.region, part.refitted, part.segments
        calibrator = self.calibrator(region, {})
        if refitted is not None:
            affine, moments = refitted.affine, refitted.moments
        else:
            affine = tuple(self.program.affine(site).kept() for site in region.sites)
            moments = tuple(calibrator.cautious_moments(site).kept() for site in region.sites)
        corrections = {} if refitted is None else refitted.corrections
        bare = Standing(region, segments, affine, moments, (), corrections)
        importance = part.importance
        if not importance or not copies_of(segments):
            # In slices errors of sites are large, and what the layers behind make of them after refits is no guide.
            whole = [Affine(bare.whole(at), each.bias) for at, each in enumerate(affine)]
            found = importances(calibrator, region, whole, part.placed, self._exits_of(region))
            found = turned_importance(region, part.heads, found)
            importance = tuple(None if each is None else scratch.kept(each) for each in found)
        return replace(bare, importance=tuple(importance))

    @property
    def _seen_while_moved(self) -> int:
        """Samples of one run in which a column is moved, so that all of them together cost a bounded time."""
        data = self.program.data
        handing_on = [
            site.shape[1]
            for region in self.regions
            for site, (_, made) in zip(region.sites, region.ends, strict=True)
            if made not in region.elastic and site.shape[1] <= WIDEST
        ]
        whole = SEEN * (data.samples("fit") + data.samples("select"))
        return whole // max(min(sum(handing_on), MOST_RUNS), 1)

    def _exits_of(self, region: Region) -> dict[int, Array]:
        """S of sites that hand on what they make, by moving one column of them at a time, while runs are left."""
        if region.name not in self._exits:
            calibrator, self._exits[region.name] = self.calibrator(region, {}), {}
            for at, site in enumerate(region.sites):
                columns = site.shape[1]
                if region.ends[at][1] in region.elastic or columns > min(WIDEST, self._runs_left):
                    continue
                self._runs_left -= columns
                found = moved_columns(self.judge, calibrator, site, self.program, self._seen_while_moved)
                if found is not None:
                    self._exits[region.name][at] = found
        return self._exits[region.name]

    # Steps

    def smaller(self, plan: Plan, allowed: float, share: float) -> Plan | None:
        """One step down: predicted loss of at most `allowed` more, or the given share of the cost.

        None where nothing turns.
        """
        if self._seen is None or self._seen.plan is not plan:
            self._seen = self._look(plan)
        standings, knobs, found = self._seen.standings, self._seen.knobs, self._seen.found
        work = [each for standing in standings for each in works(standing, knobs, self._rows_of_x)]
        descent = Descent(knobs, work, self.price)
        descent.run(allowed, share * descent.cost)
        if not any(descent.levels.values()):
            return None
        made = self.fitted(
            [
                turned_part(replace(part, importance=standing.importance), descent, found)
                for part, standing in zip(plan.parts, standings, strict=True)
            ]
        )
        return replace(made, predicted=(self.scale(plan) * made.harm) ** (1 / self.judge.order))

    def scale(self, plan: Plan) -> float:
        """What was spent, to the judge's order, for each unit of predicted loss; 1 while next to nothing is spent.

        What is spent to that order grows with the loss: with the square of a change, or with the change itself.
        """
        return plan.spent**self.judge.order / plan.harm if plan.spent > FEW and plan.harm > 0 else 1.0

    def _look(self, plan: Plan) -> Look:
        """All knobs of a plan as it stands, with what they are predicted to do."""
        standings = [self._standing(part) for part in plan.parts]
        base = cache(lambda: self.judge.outputs(plan.placed))  # only if they are asked for
        knobs: dict[Key, Knob] = {}
        found: dict[Key, UnitKnob | HeadKnob] = {}
        for standing in standings:
            units = unit_knobs(standing, self._multiple, LOOK_DOWN) if self.units else []
            ranks = rank_knobs(standing, self._multiple) if self.ranks else []
            ranks += correction_knobs(standing, self._multiple)
            heads = head_knobs(standing, self._multiple // 2, LOOK_DOWN) if self.ranks else []
            detailed: list[UnitKnob | HeadKnob] = [*units, *heads]
            found |= {each.knob.key: each for each in detailed}
            for knob in [*(each.knob for each in detailed), *ranks]:
                weight = self._weigh(plan, base, standing, knob, found.get(knob.key))
                knobs[knob.key] = replace(knob, harm=knob.harm * weight, toll=self._toll(standing, knob))
        return Look(plan, standings, knobs, found)

    @property
    def _multiple(self) -> int:
        return 16 if self.program.options.objective == "latency" else 4

    def _toll(self, standing: Standing, knob: Knob) -> Array:
        """Inputs that are left out cost a Gather of the others."""
        outer = knob.key.kind == "units" and knob.key.at not in standing.region.elastic
        if not outer or self.program.options.objective != "latency":
            return knob.toll
        rows = self._rows_of_x.get(standing.region.sites[0].index, 1)
        full = len(standing.labels(knob.key.at))
        kept = knob.sizes.sum(axis=1)
        return np.array([self.cost.gather(rows, int(n), 1) if n < full else 0.0 for n in kept])

    def _weigh(
        self,
        plan: Plan,
        base: Callable[[], Sequence[Outputs]],
        standing: Standing,
        knob: Knob,
        found: UnitKnob | HeadKnob | None,
    ) -> float:
        """Loss for each unit of a knob's own error, measured by turning it alone; base: what the plan itself makes.

        Against that and not against the original: what is gone already would drown it. What could be turned by
        next to nothing only when it was measured is measured again once there is more; in slices, whose S stays as
        it was, each time.
        """
        total = variance(standing, knob, found)
        level = int(np.searchsorted(knob.harm, TRIED**2 * total))
        level = min(max(level, 1), len(knob.harm) - 1)
        own = float(knob.harm[level])
        if total <= 0 or not 1e-9 * total < own < np.inf:
            return 1.0  # next to nothing yet, whatever it weighs; or the output never changes
        known = self._sensitivity.get(knob.key)
        if known is None or own / total > FURTHER * known.tried or copies_of(standing.segments):
            made = turned(standing, knob, level, found)
            fed = {standing.region.sites[at].index: affine for at, affine in made.items()}
            loss = self.judge.loss(plan.placed | fed, base())
            known = self._sensitivity[knob.key] = Sensitivity(
                max(loss, 1e-9) / own, min(own / total, TRIED**2)
            )
        return known.weight

    def _promise(self, plan: Plan, found: Plan) -> float:
        """Share of the cost that the rest of the tolerance would save, at the rate of the step that led to `found`."""
        order = self.judge.order
        taken, left = found.spent**order - plan.spent**order, self.margin**order - found.spent**order
        return math.log(plan.cost / found.cost) * left / taken if taken > 0 else math.inf

    def within(self, plan: Plan) -> Plan:
        """Steps down from a plan until the tolerance is spent."""
        if not (self.units or self.ranks):
            return plan
        order, margin, failed, cap = self.judge.order, self.margin, 0, np.inf
        for _ in range(STEPS):
            allowed = min(margin**order / self.scale(plan) - plan.harm, cap)
            found = self.smaller(plan, allowed, STEP) if allowed > 0 else None
            if found is None:
                break
            if found.spent > margin:
                failed += 1
                if failed > RETRIES:
                    break
                # The loss at which it would have fitted, with a little to spare each time.
                cap = (found.harm - plan.harm) * min(0.8, (NEARLY * margin / found.spent) ** order)
                continue
            if found.cost >= plan.cost:
                break
            last = found.cost > LEAST_GAIN * plan.cost or found.spent > NEARLY * margin
            last |= self._promise(plan, found) < WORTHWHILE
            plan, cap = found, np.inf
            if last:
                break
        return plan
