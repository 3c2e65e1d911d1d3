"""Cost against change over the whole range: this compiler's plan, and plain ways to the same size.

The plan is walked down in steps, from the dense model and from blocks and slices where there are any, and every point
is measured on the report part of the data; nothing is decided from that. A point of the plan can be written as a model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx
from joblib import cpu_count
from threadpoolctl import threadpool_limits

from onnx_decomp import calibration
from onnx_decomp.compiler import Run, opened, with_files
from onnx_decomp.errors import UsageError
from onnx_decomp.gates import REGION_SECONDS
from onnx_decomp.latency import compare as compare_latency
from onnx_decomp.metrics import Limits, compare_outputs
from onnx_decomp.model_io import ModelFile
from onnx_decomp.options import Options
from onnx_decomp.passes import baselines
from onnx_decomp.passes.baselines import Baselines
from onnx_decomp.passes.compensation import BATCH, Refitted
from onnx_decomp.passes.folding import decision_of, site_flops
from onnx_decomp.passes.layouts import Layout, joined_orders
from onnx_decomp.passes.planning import PREFERRED, Planner
from onnx_decomp.passes.plans import Part, Plan, correctable
from onnx_decomp.passes.pricing import region_time, with_best_forms
from onnx_decomp.passes.search import FEW, LEAST_GAIN, MARGIN, Search
from onnx_decomp.probe import Feeds
from onnx_decomp.program import Program, Rewrite, Segment, Structure
from onnx_decomp.progress import Progress, Silent
from onnx_decomp.reasons import explain
from onnx_decomp.report import PARTS, versions
from onnx_decomp.sites import Affine

SCHEMA = "onnx-decomp-frontier/1"

Method = Literal["plan", "magnitude", "wanda", "svd", "whitened-svd"]
METHODS: tuple[Method, ...] = ("plan", *baselines.METHODS)

LEAST, POINTS = 0.05, 8
"""The smallest share of the cost that is looked at unless others are asked for, and how many there are."""

STEP = 0.8
"""Cost after a step over cost before it, at the least: what follows is predicted anew after each."""

NEAR, RETRIES = 0.92, 3
"""A step that takes the cost below that share of a ratio is tried again, so often on the way to it."""

LOOSE = 0.5
"""Relative change of the outputs up to which blocks and slices are worth starting from."""

HOPELESS = 4.0
"""A walk ends where its loss is that many times that of another one at the same cost."""

Blocks = Mapping[str, tuple[Structure, ...]]

Base = tuple[Blocks, Blocks]
"""What a walk starts from, and which of it has corrections beside its blocks."""


def evenly(points: int) -> tuple[float, ...]:
    """So many ratios down to the smallest one, evenly in their logarithm."""
    return tuple(float(f"{LEAST ** (at / points):.3g}") for at in range(1, points + 1))


@dataclass(frozen=True)
class Point:
    """One size of one method. flops, cost: of the dense model's, over the regions that are looked at.

    change: of the outputs on the report part, by the metric; select: the same on the part that chooses.
    predicted: what the plan expected of the select part, at its upper bound, before it was measured.
    """

    method: Method
    flops: float
    cost: float
    change: float
    predicted: float | None
    select: float
    speedup: float | None = None
    asked: float = 1.0
    """The ratio that the point was made for: the cost is as near to it as sizes allow, and not above."""
    spent: float = 0.0
    """Share of the tolerance, with confidence, on the select part."""
    score: float | None = None
    """The user's own, on the report part."""


@dataclass(frozen=True)
class Frontier:
    """What was found, from the dense model down, method after method. notes: why there is nothing, or less."""

    points: tuple[Point, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    options: Options
    ratios: tuple[float, ...]
    _walked: Walked = field(repr=False)

    def of(self, method: Method) -> tuple[Point, ...]:
        """The points of one method."""
        return tuple(point for point in self.points if point.method == method)

    @property
    def picked(self) -> Point | None:
        """The point of the plan that the tolerance would pick; None where the plan was not asked for."""
        fitting = [point for point in self.of("plan") if point.spent <= MARGIN]
        return min(fitting, key=lambda point: point.cost, default=None)

    def nearest(self, ratio: float) -> Point:
        """The point of the plan for a ratio that was asked for, or the next one."""
        return min(self.of("plan"), key=lambda point: abs(math.log(point.asked / ratio)))

    def write(self, point: Point) -> onnx.ModelProto:
        """The model of a point of the plan; what it computes is checked against what was measured."""
        return self._walked.written(point)

    @property
    def verdict(self) -> str:
        """One line for the end."""
        picked = self.picked
        if len(self.points) <= len({point.method for point in self.points}):
            return f"nothing can be made smaller: {'; '.join(self.notes) or 'no size below the dense one'}"
        if picked is None:
            return f"{len(self.points)} points of {', '.join({point.method: 0 for point in self.points})}"
        allowed = f"a tolerance of {self.options.tolerance:g}"
        if picked.cost >= 1:
            return f"{allowed} would leave the model as it is at these points"
        return f"{allowed} would pick {picked.flops:.2g} of the MatMul FLOPs: change {picked.change:.3g}"

    def report(self) -> dict[str, Any]:
        """Everything as plain data, strict JSON."""
        options, walked = self.options, self._walked
        data = walked.program.data
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "input": {"path": _text(walked.program.source.path), "sha256": walked.program.source.sha256},
            "options": {
                "metric": options.metric,
                "tolerance": options.tolerance,
                "limits": [list(limit) for limit in options.limits],
                "evaluate": options.evaluate,
                "objective": options.objective,
                "seed": options.seed,
            },
            "versions": versions(),
            "data": {"kind": data.kind} | {part: data.samples(part) for part in PARTS},
            "score": _finite(walked.score_before),
            "ratios": list(self.ratios),
            "methods": list(dict.fromkeys(point.method for point in self.points)),
            "picked": None if self.picked is None else self.points.index(self.picked),
            "points": [
                {
                    "method": point.method,
                    "asked": point.asked,
                    "flops": point.flops,
                    "cost": point.cost,
                    "change": _finite(point.change),
                    "predicted": _finite(point.predicted),
                    "select": _finite(point.select),
                    "spent": _finite(point.spent),
                    "score": _finite(point.score),
                    "speedup": _finite(point.speedup),
                }
                for point in self.points
            ],
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


@dataclass
class Walked:
    """The model that is walked down, what it costs, and what was made of it."""

    run: Run
    program: Program
    search: Search | None
    plans: dict[Point, Plan] = field(default_factory=dict)
    score_before: float | None = None
    _dense: float = float("nan")
    _originals: dict[calibration.Part, list[dict[str, Any]]] = field(default_factory=dict)

    # What it costs

    def cost(self, parts: Iterable[Part]) -> float:
        """Predicted cost in the objective's unit, of the dense model's."""
        if math.isnan(self._dense):
            assert self.search is not None
            self._dense = self._cost([Part(region) for region in self.search.regions])
        return self._cost(list(parts)) / self._dense

    def _cost(self, parts: Sequence[Part]) -> float:
        if self.program.options.objective != "latency":
            return self._flops(parts)
        assert self.search is not None
        rewrites = self._rewrites(parts)
        orders, total = joined_orders(rewrites), 0.0
        for part in parts:
            segments = next((r.segments for r in rewrites if r.region is part.region), part.segments)
            layout = Layout.of(part.region, segments, orders)
            total += region_time(self.search.cost, self._rows(part), layout)
        return total

    def flops(self, parts: Sequence[Part]) -> float:
        """Share of the multiplications with stored weights."""
        return self._flops(parts) / self._flops([Part(part.region) for part in parts])

    def _flops(self, parts: Iterable[Part]) -> float:
        rows = self.program.rows_per_sample
        return float(
            sum(
                rows.get(part.region.sites[at].index, 1) * site_flops(part.region, segment, at)
                for part in parts
                for segment in self._segments(part)
                for at in segment.sites
            )
        )

    def _rows(self, part: Part) -> int:
        return self.program.timed_samples * self.program.rows_per_sample.get(part.region.sites[0].index, 1)

    def _segments(self, part: Part) -> tuple[Segment, ...]:
        """As they are written."""
        if part.dense:
            return part.segments
        assert self.search is not None
        padding = self.program.options.objective == "latency"
        return with_best_forms(self.search.cost, self._rows(part), part.region, part.segments, padding)

    def _rewrites(self, parts: Iterable[Part]) -> list[Rewrite]:
        found = []
        for part in parts:
            if part.dense:
                continue
            segments = self._segments(part)
            made = part.refitted or Refitted((), (), (), ())
            outcome = decision_of(part.region, segments)
            found.append(
                Rewrite(
                    part.region,
                    segments,
                    made.affine,
                    outcome,
                    "applied",
                    placed=made.placed,
                    corrections=made.corrections,
                )
            )
        return found

    # The walk

    def bases(self) -> list[Base]:
        """What to start from: slices and blocks, blocks, blocks with corrections beside them, the dense model."""
        assert self.search is not None
        planner = Planner(self.program, True)
        blocks = self._loosely({}, {r.name: planner.structures(r) for r in self.search.regions})
        slices = {name: (found,) for name, found in self.program.slices.items() if name not in blocks}
        both = self._loosely(blocks, slices)
        shown = {region.name: planner.structures(region) for region in self.search.regions}
        weights = {name: found for name, found in shown.items() if correctable(found)}
        bases: list[Base] = [(both, {}), (blocks, {}), (weights, weights), ({}, {})]
        # The same regions: the same structures.
        regions = [tuple(map(set, base)) for base in bases]
        return [base for at, base in enumerate(bases) if regions[at] not in regions[at + 1 :]]

    def _loosely(self, base: Blocks, found: Blocks) -> Blocks:
        """With the structures that leave the outputs what they are, roughly, each on top of those before it."""
        assert self.search is not None
        accepted = dict(base)
        for region in self.search.regions:
            structures = found.get(region.name)
            if structures and self._roughly(self.search.start({**accepted, region.name: structures})):
                accepted[region.name] = structures
        return accepted

    def _roughly(self, plan: Plan) -> bool:
        return compare_outputs(self._pairs("select", plan.placed), "rel-l2").largest <= LOOSE

    def walk(self, ratios: Sequence[float]) -> dict[float, Plan]:
        """For each ratio that can be reached the plan that changes least of those that cost no more.

        By the smooth loss on the select part: scores and winners move in steps.
        """
        known: list[tuple[float, float, Plan]] = []
        for number, base in enumerate(self.bases()):
            self.run.progress.stage(f"walking down, start {number + 1}")
            self._walk_from(base, ratios, known)
        best: dict[float, Plan] = {}
        for ratio in ratios:
            fitting = [(loss, cost, plan) for loss, cost, plan in known if _fits(cost, ratio)]
            if fitting:
                best[ratio] = min(fitting, key=lambda each: each[:2])[2]
        return best

    def _walk_from(self, base: Base, ratios: Sequence[float], known: list[tuple[float, float, Plan]]) -> None:
        assert self.search is not None
        plan: Plan | None = self.search.start(*base)
        others = list(known)
        for number, ratio in enumerate(ratios):
            self.run.progress.advance(number, len(ratios))
            plan = self._down(plan, ratio) if plan is not None else None
            if plan is None:
                return
            loss = self.search.judge.loss(plan.placed) if plan.placed else 0.0
            sliced = any(each.kind == "influence" for part in plan.parts for each in part.structures)
            weighed = loss / PREFERRED**2 if sliced else loss  # as in planning: a gain there is a change here
            known.append((weighed, self.cost(plan.parts), _slim(plan)))
            rival = min((loss for loss, cost, _ in others if _fits(cost, ratio)), default=math.inf)
            if weighed > HOPELESS * max(rival, FEW**2):
                return

    def _down(self, plan: Plan, ratio: float) -> Plan | None:
        """Steps until the cost is not above the ratio; None where it does not come to that."""
        assert self.search is not None
        cost, retries = self.cost(plan.parts), RETRIES
        while not _fits(cost, ratio):
            steps = math.ceil(math.log(ratio / cost) / math.log(STEP))
            share = (ratio / cost) ** (1 / steps)
            found = self._smaller(plan, np.inf, share)
            while found is not None and retries and self.cost(found.parts) < NEAR * ratio:
                retries -= 1  # one turn has gone too far: another way, which changes less
                gentler = self._smaller(plan, (found.harm - plan.harm) / 2, share)
                if gentler is None:
                    break
                found = gentler
            if found is None:
                return None
            plan, cost = found, self.cost(found.parts)
        return plan

    def _smaller(self, plan: Plan, allowed: float, share: float) -> Plan | None:
        """One step, with what is expected of it; None where it leads nowhere."""
        assert self.search is not None
        found = self.search.smaller(plan, allowed, share)
        if found is None or found.cost > LEAST_GAIN * plan.cost:
            return None
        return found

    # What is measured

    def _pairs(self, part: calibration.Part, placed: Mapping[int, Affine]) -> Iterable[tuple[Any, Any]]:
        probe, data = self.program.probe, self.program.data
        assert probe is not None
        if part not in self._originals:
            self._originals[part] = [probe.run(feeds, {}) for feeds in data.batches(part, BATCH)]
        for original, feeds in zip(self._originals[part], data.batches(part, BATCH), strict=True):
            yield original, probe.run(feeds, placed)

    def point(self, method: Method, asked: float, parts: Sequence[Part], plan: Plan | None) -> Point:
        """What parts come to, measured."""
        assert self.search is not None
        limits = Limits.asked(self.program.options)
        placed = {index: fed for part in parts for index, fed in part.placed.items()}
        select, held = (compare_outputs(self._pairs(part, placed), limits) for part in ("select", "report"))
        predicted = None
        if plan is not None and self.program.evaluation is None and math.isfinite(plan.predicted):
            predicted = plan.predicted * self.program.options.tolerance
        return Point(
            method,
            self.flops(parts),
            self.cost(parts),
            held.largest,
            predicted,
            select.largest,
            asked=asked,
            spent=self.search.judge.spent(placed) if plan is None else plan.spent,
            score=self._score(placed),
        )

    def _score(self, placed: Mapping[int, Affine]) -> float | None:
        probe, evaluation = self.program.probe, self.program.evaluation
        if evaluation is None:
            return None
        assert probe is not None

        def answer(feeds: Feeds) -> dict[str, Any]:
            return probe.run(feeds, placed)

        self.score_before, score = evaluation.compared(answer, "report")
        return score

    def timed(self, plan: Plan) -> float:
        """Measured speed-up of a plan over the original."""
        _, session = self._emitted(plan)
        feeds = next(self.program.data.batches("report", self.program.timed_samples))
        seed = self.program.options.seed
        return compare_latency(
            self.run.gates.original, session, feeds, seconds=REGION_SECONDS, seed=seed
        ).speedup

    def _emitted(self, plan: Plan) -> tuple[onnx.ModelProto, Any]:
        return self.run.gates.emitted(self._rewrites(plan.parts))

    def written(self, point: Point) -> onnx.ModelProto:
        """The model of a point; the original itself for the dense one."""
        if point.method != "plan":
            raise UsageError(f"only points of the plan can be written, not those of {point.method!r}")
        plan = self.plans.get(point)
        if plan is None and point.cost < 1:
            raise UsageError("this point is not of this frontier")
        if plan is None or not plan.placed:
            return self.program.original
        return self._emitted(plan)[0]


def _fits(cost: float, ratio: float) -> bool:
    return cost <= ratio * (1 + 1e-9)


def _slim(plan: Plan) -> Plan:
    """Without the moments and sensitivities that only the next step would need."""
    parts = [
        replace(part, importance=(), refitted=part.refitted and replace(part.refitted, moments=()))
        for part in plan.parts
    ]
    return replace(plan, parts=tuple(parts))


def trace_frontier(
    source: ModelFile,
    options: Options,
    ratios: Sequence[float] = evenly(POINTS),
    methods: Sequence[Method] = METHODS,
    latency: bool = False,
    progress: Progress | None = None,
) -> Frontier:
    """Cost against change of a loaded model. latency: measure how fast each point of the plan is, too."""
    check(options, ratios, methods)
    run = Run(source, replace(options, latency_gate=latency), progress or Silent())
    wanted = tuple(sorted({float(ratio) for ratio in ratios}, reverse=True))
    with threadpool_limits(limits=max(1, cpu_count() // 2), user_api="blas"):
        walked, notes = _start(run)
        points = [Point(method, 1.0, 1.0, 0.0, None, 0.0) for method in methods]
        if walked.search is not None:
            points = _points(walked, wanted, methods, latency)
            notes += _missing(points, wanted, methods)
    return Frontier(tuple(points), tuple(run.warnings), tuple(notes), options, wanted, walked)


def check(options: Options, ratios: Sequence[float], methods: Sequence[str] = METHODS) -> None:
    """Raises UsageError for what makes no sense, before any work."""
    if options.calib is None:
        raise UsageError(
            "a frontier is measured on data: give samples of the inputs with --calib (calib=...), "
            "an .npz of input name -> array"
        )
    wrong = [ratio for ratio in ratios if not 0 < ratio <= 1]
    if wrong:
        raise UsageError(f"impossible ratio {wrong[0]:g}: give numbers above 0 and up to 1")
    unknown = [method for method in methods if method not in get_args(Method)]
    if unknown:
        raise UsageError(f"no method {unknown[0]!r}: there are {', '.join(map(repr, METHODS))}")


def _start(run: Run) -> tuple[Walked, list[str]]:
    """The model with what was found in it, and why nothing can be done to it, if so."""
    program, obstacle = run.prepared()
    if obstacle is not None:
        return Walked(run, program, None), [explain(obstacle)]
    search = Planner(program, True).search if program.regions else None
    if search is None or not search.regions:
        sites = [site for region in program.regions for site in region.sites]
        reasons = Counter("excluded" for _ in sites)
        reasons |= Counter(site.obstacle for site in program.sites if site.obstacle is not None)
        notes = [f"{count} x {explain(reason)}" for reason, count in sorted(reasons.items())]
        return Walked(run, program, None), notes or ["no product with a constant matrix in it"]
    return Walked(run, program, search), []


def _points(walked: Walked, ratios: Sequence[float], methods: Sequence[Method], latency: bool) -> list[Point]:
    assert walked.search is not None
    dense = Plan(tuple(Part(region) for region in walked.search.regions), 1.0, 0.0)
    zero = walked.point("plan", 1.0, dense.parts, dense)
    below, points = [ratio for ratio in ratios if ratio < 1], []
    # Widths that vector units like are faster, others nearer to what is asked for: the better of both.
    multiples = (4, 16) if walked.program.options.objective == "latency" else (1,)
    plain = [Baselines(walked.search, walked.cost, multiple) for multiple in multiples]
    for method in methods:
        points.append(replace(zero, method=method))
        if method == "plan":
            for ratio, plan in walked.walk(below).items():
                point = walked.point("plan", ratio, plan.parts, plan)
                point = replace(point, speedup=walked.timed(plan)) if latency and plan.placed else point
                walked.plans[point] = plan
                points.append(point)
            continue
        walked.run.progress.stage(method)
        for ratio in below:
            made = [each.parts(method, ratio) for each in plain]
            found = [walked.point(method, ratio, parts, None) for parts in made if parts is not None]
            points += [min(found, key=lambda point: point.select)] if found else []
    return points


def _missing(points: Sequence[Point], ratios: Sequence[float], methods: Sequence[Method]) -> list[str]:
    """Which methods come no further down than where."""
    notes = []
    for method in methods:
        reached = min(point.asked for point in points if point.method == method)
        if ratios and reached > ratios[-1]:
            notes.append(f"{method} gets no further down than {reached:g} of those asked for")
    return notes


def frontier(
    model: onnx.ModelProto | str | Path,
    *,
    init: str | Path | None = None,
    calib: str | Path | None = None,
    options: Options | None = None,
    ratios: Sequence[float] = evenly(POINTS),
    methods: Sequence[Method] = METHODS,
    latency: bool = False,
) -> Frontier:
    """Cost against change of a model in memory or on disk, at the ratios asked for. Nothing is written."""
    chosen = with_files(options, init, calib)
    check(chosen, ratios, methods)
    return trace_frontier(opened(model), chosen, ratios, methods, latency)


__all__ = ["METHODS", "Frontier", "Method", "Point", "check", "evenly", "frontier", "trace_frontier"]
