"""The pipeline over all bodies of a model: each is compiled as a model of its own, and judged by the whole.

A body has the outputs' share of the tolerance that the main graph and earlier bodies left. What decides is the whole
model with the body in its place: its outputs on data that nothing was fitted on, and its latency.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from onnx_decomp import verify
from onnx_decomp.bodies import Body, Runs, as_model, find_bodies, put_back, recorded
from onnx_decomp.errors import CannotVerifyError, InputError
from onnx_decomp.gates import Findings, Gates
from onnx_decomp.graph import all_names
from onnx_decomp.graph_index import Around
from onnx_decomp.metrics import Limits
from onnx_decomp.options import Options
from onnx_decomp.program import Program
from onnx_decomp.sites import IN_BODY

MAX_BODIES, MAX_DEPTH = 64, 4
"""Bodies of one graph that are compiled, and bodies in bodies: each takes a run of the model around it."""

ATTEMPTS, FRUGAL, MOST_SPENT = 3, 0.85, 10.0
"""A body that changes the outputs too much is compiled again, with that share of what would have been allowed."""

LEAST_LEFT, CAUTIOUS = 0.01, 0.05
"""Share of the tolerance, as a square, that a body may try to spend at least; and the change of its own outputs, where
the tolerance of the whole model is about something else."""


@dataclass(frozen=True)
class Nested:
    """What the compilation of a body has to know of the model around it. depth: how many models it lies in."""

    where: str
    around: Around
    data: Runs
    tolerance: float
    depth: int


def _tolerance(options: Options) -> float:
    """Relative L2 change that a body's own outputs may have, for a start; the gates of the whole model decide."""
    if options.metric == "rel-l2" and options.evaluate is None:
        return options.tolerance
    return min(options.tolerance, CAUTIOUS)


Compile = Callable[[onnx.ModelProto, Nested], tuple[Program, onnx.ModelProto | None]]


@dataclass
class Rewritten:
    """A body that was rewritten.

    batch: samples on which the whole model runs at once, so that it does run the body. spent: share of the tolerance
    that the whole model spends with it and those before it. change: what it adds to that, as squares.
    """

    body: Body
    program: Program
    model: onnx.ModelProto
    batch: int
    spent: float = 0.0
    change: float = 0.0


def _batch(done: Sequence[Rewritten]) -> int:
    return min((each.batch for each in done), default=verify.BATCH)


@dataclass
class Bodies:
    """Compiles the bodies of one model, after its main graph."""

    program: Program
    gates: Gates
    compile: Compile
    written: onnx.ModelProto | None
    """What became of the main graph; None: it stays."""
    depth: int = 0
    done: list[Rewritten] = field(default_factory=list)
    undone: list[tuple[str, str]] = field(default_factory=list)
    """Body, and why."""
    warnings: list[str] = field(default_factory=list)
    spent: float = 0.0
    """Share of the tolerance that the main graph and the bodies so far take; errors add up as squares."""

    def run(self) -> tuple[onnx.ModelProto | None, Findings | None]:
        """The model with bodies rewritten and what was measured of it; None where all bodies stay."""
        program = self.program
        bodies = find_bodies(program.index, program.sites, MAX_BODIES)
        if bodies and self.written is not None:
            self.spent = self._spent([])
        for body in bodies:
            program.progress.stage(body.where)
            self._decide(body, self._rewrite(body))
        while self.done:
            made = self._made(self.done)
            found = self.gates.judged(made, _batch(self.done))
            offender, why = self._offender(made, found)
            if offender is None:
                return made, found
            self._undo(offender, why)
        return self.written, None

    def _made(self, done: Iterable[Rewritten]) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(self.written or self.program.original)
        for each in done:
            put_back(model, each.body, each.model, self.program.index.around.reserved)
        return model

    def _decide(self, body: Body, reason: str | None) -> None:
        for site in self.program.sites:
            inside = site.graph == body.where or site.graph.startswith(f"{body.where}/")
            if reason is not None and inside and site.obstacle == IN_BODY:
                self.program.decide("bodies", site, "declined", reason)

    def _rewrite(self, body: Body) -> str | None:
        """Compile a body, again with a smaller tolerance if the model changes too much; why it can't be, or None."""
        program = self.program
        try:
            data = recorded(program.index, body, program.data, self.gates.session)
            if data is None:
                return "not-run"
            model = as_model(program.index, body, data.feeds["fit"][0])
            tolerance = _tolerance(program.options) * float(np.sqrt(max(1.0 - self.spent**2, LEAST_LEFT)))
            for _ in range(ATTEMPTS):
                found = self._attempt(body, data, model, tolerance)
                if found is None or found.spent <= 1.0:
                    break
                tolerance *= FRUGAL / min(found.spent, MOST_SPENT)
        except CannotVerifyError as error:
            program.inner.pop(body.where, None)
            self.warnings.append(f"{body.where}: {error}")
            return "cannot-verify"
        if found is not None:
            self.done.append(found)
            if found.spent > 1.0:
                self._undo(found, "tolerance")
            else:
                self.spent = found.spent
        return None

    def _attempt(self, body: Body, data: Runs, model: onnx.ModelProto, tolerance: float) -> Rewritten | None:
        models = [self.program.original, *(each.model for each in self.done)]
        models += [] if self.written is None else [self.written]
        reserved = self.program.index.around.reserved.union(*(all_names(each.graph) for each in models))
        around = Around(body.shared, reserved, body.called)
        nested = Nested(body.where, around, data, tolerance, self.depth + 1)
        try:
            inner, written = self.compile(model, nested)
        except InputError as error:  # NaN in a weight, say; the rest of the model may be sound
            raise CannotVerifyError(str(error)) from error
        inner.per_sample = data.per_sample
        self.program.inner[body.where] = inner
        if written is None:
            return None
        found = Rewritten(body, inner, written, data.batch)
        found.spent = self._spent([*self.done, found])
        found.change = found.spent**2 - self.spent**2
        return found

    def _spent(self, done: Sequence[Rewritten]) -> float:
        """Share of the tolerance that the model spends on the select part with these bodies."""
        program, original = self.program, self.gates.original
        limits, evaluation = Limits.asked(program.options), program.evaluation
        candidate = self.gates.session(self._made(done))
        spent = verify.verify(original, candidate, program.data, "select", limits, batch=_batch(done)).spent
        return spent if evaluation is None else max(spent, evaluation.spent(candidate.run, "select"))

    def _offender(self, made: onnx.ModelProto, found: Findings) -> tuple[Rewritten | None, str]:
        """The body to undo next, and why: the one that changes most, or one without which it is faster."""
        if found.why == "tolerance":
            return max(self.done, key=lambda each: each.change), found.why
        if found.latency is None or self.program.options.replay is not None:
            return None, ""
        gains = [self._gain(made, each) for each in self.done]
        slow = found.latency.interval[0] < self.program.options.min_speedup
        least = int(np.argmin(gains))
        return (self.done[least], "latency") if slow or gains[least] < 1.0 else (None, "")

    def _gain(self, made: onnx.ModelProto, each: Rewritten) -> float:
        """Speed-up that a body brings beside all others."""
        rest = [other for other in self.done if other is not each]
        return self.gates.speedup(self._made(rest), made)

    def _undo(self, each: Rewritten, why: str) -> None:
        self.done.remove(each)
        each.program.give_up(why)
        self.undone.append((each.body.where, why))
