"""What a written model has to pass: it computes what was measured, within the tolerance, and it is faster.

The first gate that fails names the regions to undo; the loop is the compiler's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from onnx_decomp import calibration, model_io, saving, verify
from onnx_decomp.calibration import Feeds
from onnx_decomp.errors import CannotVerifyError, DecompError
from onnx_decomp.latency import Latency
from onnx_decomp.latency import compare as compare_latency
from onnx_decomp.metrics import Limits, Verification, compare_outputs
from onnx_decomp.model_io import ModelFile
from onnx_decomp.options import Options, shape_name
from onnx_decomp.passes.compensation import BATCH
from onnx_decomp.passes.splitting import emit
from onnx_decomp.profiling import Operator, profile, side_by_side
from onnx_decomp.program import Program, Rewrite
from onnx_decomp.runtime import Device, Session, open_session

WHOLE_SECONDS, REGION_SECONDS = 2.0, 0.5
"""Time spent on comparing whole models, and on asking for each kept region whether it helps."""

REGION_ROUNDS = 8
"""Of such a question at least: where one run takes half a second, many regions would take minutes."""

FLOAT_NOISE = {
    np.dtype(np.float64): 1e-4,  # weights are fitted in float32
    np.dtype(np.float32): 1e-4,
    np.dtype(np.float16): 2e-2,
    np.dtype(ml_dtypes.bfloat16): 2e-1,
}
"""Largest relative difference between the written model and the dense-equivalent one, by a type in use."""

TF32_NOISE = 5e-3
"""The same on a GPU, whose float32 products keep ten bits of their operands."""


@dataclass
class Findings:
    """What one round of measuring found; `offenders` are the regions to undo, none when everything passed."""

    verification: Verification | None = None
    rewrite_change: float = 0.0
    scores: tuple[float, float] | None = None
    """Of the original and of the written model on the report part, where the user has a function for it."""
    latency: Latency | None = None
    """Of the shape that gains least, where several were asked for."""
    shapes: Mapping[str, Latency] = field(default_factory=dict)
    """Of every shape that was asked for."""
    operators: Sequence[Operator] = ()
    """Of the models as ONNX Runtime optimizes them, where latency was measured."""
    offenders: tuple[str, ...] = ()
    why: str = ""


@dataclass
class Gates:
    """Of one compilation; holds the original, which everything is measured against."""

    program: Program
    original: Session
    faster: set[str] = field(default_factory=set)
    """Regions that made the rest faster when they were asked."""

    def emitted(self, rewrites: Sequence[Rewrite]) -> tuple[onnx.ModelProto, Session]:
        """The model with rewrites, and a session of it, once it computes what they do."""
        program = self.program
        written = emit(program.index, rewrites, model_io.opset(program.original), program.target)
        stamp(written, program, [(rewrite.region.name, rewrite) for rewrite in rewrites])
        candidate, change = self._passed(written, rewrites)
        if change > self._noise(rewrites):
            raise _broken(f"the written model differs by {change:.3g} from what was measured")
        return written, candidate

    def measure(self) -> Findings:
        """What the program has written, gate after gate; a first one that fails ends it."""
        program, found = self.program, Findings()
        assert program.written is not None
        worst = max(program.rewrites, key=lambda rewrite: rewrite.change).region.name
        candidate, found.rewrite_change = self._passed(program.written, program.rewrites)
        if found.rewrite_change > self._noise(program.rewrites):
            found.offenders, found.why = (worst,), "rounding"
            return found
        self._compare(candidate, found)
        if found.why:
            found.offenders = (worst,)
        elif found.latency is not None and program.options.replay is None:
            found.offenders, found.why = self._slow(candidate, found.latency), "latency"
        return found

    def judged(self, written: onnx.ModelProto, batch: int) -> Findings:
        """The whole model with its bodies rewritten, against the original; `why` is empty if it computes the same.

        batch: samples of one run.
        """
        candidate, found = self._loaded(written), Findings()
        self._compare(candidate, found, batch)
        return found

    def operators(self, written: onnx.ModelProto) -> list[Operator]:
        """What ONNX Runtime makes of the original and of what was written, on what latency was measured on."""
        source, feeds = self.program.source, next(iter(self.timed.values()))
        models = (source.path or source.proto, written)
        found = [profile(partial(self.session, model), feeds, 1) for model in models]
        return side_by_side((source.proto, written), *found)

    def speedup(self, before: onnx.ModelProto, after: onnx.ModelProto) -> float:
        """Of one model over another at best, looked at briefly: below 1 it is slower, and not by chance."""
        return self._briefly(self.session(before), self.session(after))

    def _compare(self, candidate: Session, found: Findings, batch: int = verify.BATCH) -> None:
        """Outputs against the original's on the report part, and if they pass, latency."""
        program = self.program
        limits = Limits.asked(program.options).widened(self._own_rounding())
        found.verification = verify.verify(
            self.original, candidate, program.data, "report", limits, batch=batch
        )
        if not found.verification.passed or self._worse(found, candidate):
            found.why = "tolerance"
        elif program.options.latency_gate:
            found.shapes = self._latencies(self.original, candidate, WHOLE_SECONDS)
            found.latency = _worst(found.shapes)

    def _passed(self, written: onnx.ModelProto, rewrites: Sequence[Rewrite]) -> tuple[Session, float]:
        """A session of what was written, and how far it is from the dense-equivalent model."""
        candidate = self._loaded(written)
        return candidate, self._rewrite_change(rewrites, candidate)

    def _loaded(self, written: onnx.ModelProto) -> Session:
        """A session of what was written. From outside it has to be the original."""
        try:
            candidate = self.session(written)
        except CannotVerifyError as error:
            raise _broken(f"the written model does not load: {error}") from error
        if problem := verify.interface_difference(self.program.original, written):
            raise _broken(problem)
        return candidate

    def session(self, model: onnx.ModelProto | Path, profile: Path | None = None) -> Session:
        """Of the original or of what was written of it."""
        program = self.program
        return session_of(model, program.source, program.options, program.provider, profile)

    def _worse(self, found: Findings, candidate: Session) -> bool:
        """Whether the user's own score falls by more than the tolerance."""
        if self.program.evaluation is None:
            return False
        before, after = self.program.evaluation.compared(candidate.run, "report")
        found.scores = before, after
        return before - after > self.program.options.tolerance

    def _slow(self, candidate: Session, whole: Latency) -> tuple[str, ...]:
        """Regions to undo: the whole is not faster, or it is, but would be faster still without them.

        Only those that do harm beyond noise: of many small gains half would look like losses at a brief look.
        """
        program, rewrites = self.program, self.program.rewrites
        if whole.interval[0] < self.program.options.min_speedup:
            return (min(rewrites, key=lambda rewrite: rewrite.gain).region.name,)
        if len(rewrites) < 2:
            return ()
        unknown = [rewrite for rewrite in rewrites if rewrite.region.name not in self.faster]
        gains, opset = dict[str, float](), model_io.opset(program.original)
        for number, rewrite in enumerate(unknown):
            program.progress.advance(number, len(unknown))
            rest = [other for other in rewrites if other is not rewrite]
            without = self.session(emit(program.index, rest, opset, program.target))
            gains[rewrite.region.name] = self._briefly(without, candidate)
        # Each is asked once: the model without the slow ones is measured as a whole, which is what counts.
        self.faster |= {name for name, gain in gains.items() if gain >= 1.0}
        return tuple(name for name, gain in gains.items() if gain < 1.0)

    def _noise(self, rewrites: Sequence[Rewrite]) -> float:
        sites = [site for rewrite in rewrites for site in rewrite.region.sites]
        noise = max(FLOAT_NOISE[kind] for site in sites for kind in (site.dtype, site.storage))
        return max(noise, TF32_NOISE) if self.program.provider == "cuda" else noise

    def _own_rounding(self) -> dict[str, float]:
        """How far an original of 16 bits differs from itself when only the order of its sums changes; else nothing.

        Of each output by its own metric.
        """
        program = self.program
        sites = [site for rewrite in program.rewrites for site in rewrite.region.sites]
        halves = [site for site in sites if site.dtype.itemsize == 2]
        probe = program.probe
        if not halves or probe is None:
            return {}
        batches = program.data.batches("select", BATCH)
        pairs = ((self.original.run(feeds), probe.run(feeds, {})) for feeds in batches)
        return compare_outputs(pairs, Limits.asked(self.program.options)).changes

    def _rewrite_change(self, rewrites: Sequence[Rewrite], candidate: Session) -> float:
        """The written model against the dense-equivalent one: the same sums in another order."""
        program, probe = self.program, self.program.probe
        assert probe is not None
        placed = {
            site.index: affine
            for rewrite in rewrites
            for site, affine in zip(rewrite.region.sites, rewrite.fed, strict=True)
        }
        batches = program.data.batches("select", BATCH)
        pairs = ((probe.run(feeds, placed), candidate.run(feeds)) for feeds in batches)
        return compare_outputs(pairs, "rel-l2").largest

    def _briefly(self, before: Session, after: Session) -> float:
        """Upper end of the speed-up's interval, at the shape that gains least."""
        found = self._latencies(before, after, REGION_SECONDS, REGION_ROUNDS)
        return min(latency.interval[1] for latency in found.values())

    def _latencies(
        self, before: Session, after: Session, seconds: float, rounds: int = 20
    ) -> dict[str, Latency]:
        """Of every shape that was asked for, or of samples of the report part."""
        seed = self.program.options.seed
        return {
            name: compare_latency(before, after, feeds, seconds=seconds, min_rounds=rounds, seed=seed)
            for name, feeds in self.timed.items()
        }

    @cached_property
    def timed(self) -> Mapping[str, Feeds]:
        """What latency is measured on. Raises InputError for a shape that the model does not take."""
        program = self.program
        if not program.options.shapes:
            return {"": next(program.data.batches("report", program.timed_samples))}
        return {
            shape_name(shape): calibration.shaped(program.original, shape, program.options.seed)
            for shape in program.options.shapes
        }


def _worst(found: Mapping[str, Latency]) -> Latency:
    return min(found.values(), key=lambda latency: latency.interval[0])


def session_of(
    model: onnx.ModelProto | Path,
    source: ModelFile,
    options: Options,
    provider: Device,
    profile: Path | None = None,
) -> Session:
    """Of `source` or of what was made of it. Weights stay in their files unless they are to be as quick as they can."""
    folder = source.folder
    if isinstance(model, onnx.ModelProto):
        model, folder = saving.rooted(model, folder)
    return open_session(
        model,
        provider=provider,
        threads=options.threads,
        folder=folder,
        prepack=options.latency_gate,
        profile=profile,
        cuda_graph=options.cuda_graph and options.latency_gate and profile is None,
    )


def _broken(what: str) -> DecompError:
    return DecompError(f"internal error: {what}; please report it with the model's structure")


def stamp(written: onnx.ModelProto, program: Program, rewrites: Sequence[tuple[str, Rewrite]]) -> None:
    """Say in the model's own metadata what was done to it; the user's entries stay as they are.

    rewrites: with the names of their regions.
    """
    options = program.options
    asked: dict[str, Any] = {"tolerance": options.tolerance, "metric": options.metric, "seed": options.seed}
    if options.limits:
        asked["limits"] = options.limits
    if options.evaluate is not None:
        asked["evaluate"] = options.evaluate
    said = {
        "version": version(),
        "options": json.dumps(asked, sort_keys=True),
        "input_sha256": program.source.sha256,
        "verdict": ", ".join(f"{name}: {rewrite.decision}" for name, rewrite in rewrites),
    }
    for entry in [entry for entry in written.metadata_props if entry.key.startswith(verify.STAMP)]:
        written.metadata_props.remove(entry)
    for key, value in said.items():
        written.metadata_props.add(key=f"{verify.STAMP}{key}", value=value)


def version() -> str:
    """Version of this package as installed."""
    return metadata.version("onnx-decomp")
