"""The pipeline and its loop: find, plan, write, measure; undo what does not pass and plan again; save.

Nothing is written before every gate has passed. Where nothing is kept, the output is the input, byte for byte.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from joblib import cpu_count
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from onnx_decomp import (
    calibration,
    cautions,
    model_io,
    runtime,
    saving,
    scratch,
    verify,
    workers,
)
from onnx_decomp.axes import find_regions
from onnx_decomp.calibration import Data
from onnx_decomp.errors import CannotVerifyError, InputError, ProviderError, UsageError
from onnx_decomp.evaluation import Evaluation
from onnx_decomp.evaluation import load as load_evaluation
from onnx_decomp.gates import Findings, Gates, session_of, stamp
from onnx_decomp.init_stats import load_nulls, module_scopes
from onnx_decomp.model_io import ModelFile
from onnx_decomp.nesting import MAX_DEPTH, Bodies, Nested
from onnx_decomp.options import Options
from onnx_decomp.passes.annealing import Annealing
from onnx_decomp.passes.criterion import Criterion
from onnx_decomp.passes.planning import Planning
from onnx_decomp.passes.slicing import Slicing
from onnx_decomp.passes.splitting import Splitting
from onnx_decomp.passes.windows import Overlapping
from onnx_decomp.probe import Probe, outer_tensors, stream_of
from onnx_decomp.profiling import losses
from onnx_decomp.program import Pass, Program
from onnx_decomp.progress import Progress, Silent
from onnx_decomp.report import Measured, build, record_output
from onnx_decomp.runtime import Device
from onnx_decomp.sites import IN_BODY, GraphIndex, find_sites

HUGE = 1e15
"""Numbers above this are not squared, summed and inverted: of moments that they are in, too few digits are left."""

SCANNED, SCANS = 8, 8
"""Samples in which such numbers are looked for at once, and how often: the tensors of all sites are held meanwhile."""

MAX_ROUNDS = 8
"""After so many rounds of undoing, the answer is the copy."""

FRUGAL_ROUNDS, FRUGAL = 2, 0.85
"""Plans that the report part refuses are made again so often, with that share of what it would have allowed."""

SYNTHETIC_SAMPLES = 64

MOST_TIMED, MOST_ROWS = 128, 1024
"""Samples of one timed run at most, and rows of x where a sample has many."""


@dataclass(frozen=True)
class Result:
    """What a compilation made: the model (the original itself when nothing was kept) and its report."""

    model: onnx.ModelProto
    report: dict[str, Any]
    changed: bool


@dataclass
class Run:
    """One compilation under way."""

    source: ModelFile
    options: Options
    progress: Progress
    started: float = field(default_factory=time.monotonic)
    warnings: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)
    target: Device = "cpu"
    """Provider whose forms are written."""
    provider: Device = "cpu"
    """Provider that things are measured on here."""
    evaluation: Evaluation | None = None
    """The user's own score, which decides instead of the metric."""
    gates: Gates = field(init=False)
    """Once the original is known to be one that can be verified against."""
    aside: Path | None = None
    """A temporary file for large tensors of what is written; None: they stay in the message."""
    nested: Nested | None = None
    """Where the model is a body of another one."""
    parts: Iterator[int] = field(default_factory=count)
    """Numbers the compilations of bodies."""
    replayed: set[str] | None = None
    """Names of the only regions that may be kept; None: all may."""

    def compile(self) -> tuple[Program, onnx.ModelProto | None]:
        """The program with everything decided, and the written model or None where nothing was kept."""
        program, obstacle = self.prepared()
        if obstacle is not None:
            return self._nothing(program, obstacle, (None, IN_BODY))
        return program, self._with_bodies(program, self._settle(program))

    def prepared(self) -> tuple[Program, str | None]:
        """The program with everything that does not depend on what is kept, or the reason why nothing can be."""
        program = self._open(self._checked() if self.nested is None else self.nested.data)
        if _stamped(self.source.proto) and not self.options.force:
            return program, "already-compiled"  # before its weights are looked for in the original's snapshot
        self._read_nulls(program)
        if not self._can_verify(program):
            return program, "cannot-verify"
        if self.evaluation is not None:
            self.evaluation.original = self.gates.original.run
            self.evaluation.before("select")  # what is wrong with it shows now, not after planning
        self.warnings += cautions.of_mixing(program, self.gates.original)
        self.warnings += cautions.of_few_samples(program)
        self._replay(program)
        self._find(program)
        return program, None

    def _checked(self) -> Data:
        """The data of a model, once everything that was asked for is known to be possible."""
        self._choose_provider()
        self._check_limits()
        workers.check(self.options.scheduler)
        if self.options.evaluate is not None:
            self.evaluation = load_evaluation(self.options.evaluate, self.options.tolerance)
        self.progress.stage("reading")
        data = self._read_data()
        verify.try_out(self.source, None if data.kind == "none" else next(data.batches("select", 1)))
        return data

    def _choose_provider(self) -> None:
        try:
            self.provider = self.target = runtime.resolve_provider(self.options.provider)
        except ProviderError:
            if self.options.provider != "cuda" or self.options.latency_gate:
                raise
            self.provider, self.target = "cpu", "cuda"
            self.warnings.append("CUDA is not available here: written for it, verified on the CPU provider")
        runtime.check_recording(self.options.cuda_graph, self.target)

    def _check_limits(self) -> None:
        names = [value.name for value in self.source.proto.graph.output]
        for output, metric, _ in self.options.limits:
            if output not in names:
                option = "--tolerance" if metric is None else "--metric"
                raise UsageError(
                    f"{option}: the model has no output {output!r}: it has {', '.join(map(repr, names))}"
                )

    def _read_data(self) -> Data:
        if self.options.calib is None:
            return self._synthetic()
        return calibration.load(self.options.calib, self.source.proto, self.options.seed)

    def _open(self, data: Data) -> Program:
        read = partial(model_io.read_tensor, self.source)
        index = GraphIndex.build(self.source.proto, read, None if self.nested is None else self.nested.around)
        sites = find_sites(index)
        self.warnings += data.warnings
        timed = min(MOST_TIMED, data.samples("report"))
        if self.options.shapes:  # the smallest run gains least
            timed = min(dims[0] for shape in self.options.shapes for _, dims in shape)
        program = Program(
            self.source,
            self.options,
            index,
            sites,
            find_regions(index, sites),
            data,
            self.progress,
            target=self.target,
            provider=self.provider,
            evaluation=self.evaluation,
            aside=self.aside,
            timed_samples=data.fixed or timed,  # where the model fixes them, as in a body: those of one run
        )
        for site in sites:
            if site.obstacle is not None:
                program.decide("sites", site, "declined", site.obstacle)
            else:
                program.affine(site)  # refuses NaN by name, before anything else is tried
        return program

    def _read_nulls(self, program: Program) -> None:
        options = self.options
        scopes = module_scopes(program.index, program.sites)
        load = partial(load_nulls, program.sites, program.affine)
        try:
            program.init = load(options.init, options.init_preset, scopes)
        except InputError:
            if self.nested is None:
                raise
            program.init = load(None, options.init_preset, scopes)  # it may be about other parts of the model

    def _synthetic(self) -> Data:
        """Made-up inputs, or none where the graph does not tell what they should be."""
        try:
            return calibration.synthetic(self.source.proto, SYNTHETIC_SAMPLES, self.options.seed)
        except CannotVerifyError as error:
            self.warnings.append(f"not verified: {error}")
            return calibration.NO_DATA

    def _nothing(
        self, program: Program, reason: str, obstacles: tuple[str | None, ...] = (None,)
    ) -> tuple[Program, None]:
        for site in program.sites:
            if site.obstacle in obstacles:
                program.decide("compiler", site, "declined", reason)
        return program, None

    def _can_verify(self, program: Program) -> bool:
        """What can't be loaded here is copied, as is what fails on synthetic data.

        Raises CannotVerifyError for what fails on the user's own data.
        """
        if program.data.kind == "none":
            return False
        source = self.source
        try:
            original = session_of(source.path or source.proto, source, self.options, self.provider)
        except CannotVerifyError as error:
            self.warnings.append(f"not verified: {error}")
            return False
        try:
            verify.check_original(original, program.data, seconds=verify.patience(self.source))
        except CannotVerifyError as error:
            if program.data.kind == "calibration":
                raise
            self.warnings.append(f"not verified: {error}")
            return False
        if program.data.kind == "synthetic":
            self.warnings.append("not verified on real data: only synthetic inputs were given to the model")
        self.gates = Gates(program, original)
        if self.options.shapes:
            _ = self.gates.timed  # refuses shapes that do not fit, before the work is done
        return True

    def _replay(self, program: Program) -> None:
        if self.options.replay is not None:
            self.replayed = _kept_regions(self.options.replay, self.source.sha256)
        for region in program.regions:
            if self.replayed is not None and region.name not in self.replayed:
                program.banned[region.name] = "replay"

    def _find(self, program: Program) -> None:
        """Everything that does not depend on what is kept."""
        for finder in finding_passes():
            self.progress.stage(finder.name)
            finder.run(program)
        sites = [site for region in program.regions for site in region.sites]
        if sites:
            outer = [name for region in program.regions for name in outer_tensors(program.index, region)]
            outer += [name for site in sites if (name := stream_of(program.index, site)) is not None]
            program.probe = Probe(program.index, sites, self.source.folder, outer, provider=self.provider)
            self._refuse_overflow(program, program.probe)
            program.rows_per_sample = self._rows_per_sample(program, program.probe)
            most = max(MOST_ROWS // max(program.rows_per_sample.values()), 1)
            program.timed_samples = min(program.timed_samples, most)
            self.warnings += cautions.of_few_rows(program)

    def _refuse_overflow(self, program: Program, probe: Probe) -> None:
        """Leave regions alone whose weights or tensors are so large that moments of them are infinite or noise."""
        large = {site.output for site in probe.sites if np.abs(program.affine(site).weight).max() > HUGE}
        names = list(dict.fromkeys(name for site in probe.sites for name in (site.input, site.output)))
        for feeds in islice(program.data.batches("fit", SCANNED), SCANS):
            made = probe.run(feeds, {}, names)
            large |= {name for name, array in made.items() if not _moderate(array)}
        for region in program.regions:
            if any(large & {site.input, site.output} for site in region.sites):
                program.banned.setdefault(region.name, "overflow")

    def _rows_per_sample(self, program: Program, probe: Probe) -> dict[int, int]:
        feeds = next(program.data.batches("select", 1))  # few: this asks for the outputs of all sites at once
        samples = len(next(iter(feeds.values())))
        sites = [site for region in program.regions for site in region.sites]
        made = probe.run(feeds, {}, [site.output for site in sites])
        return {site.index: max(1, made[site.output].size // site.shape[1] // samples) for site in sites}

    def _settle(self, program: Program) -> onnx.ModelProto | None:
        """Plan, write and measure until every gate passes or nothing is left."""
        for number in range(MAX_ROUNDS):
            self.progress.stage(f"planning, round {number + 1}")
            Planning(reduce=self.options.search).run(program)
            if not program.rewrites:
                return None
            Splitting().run(program)
            written = program.written
            assert written is not None
            stamp(written, program, program.kept)
            self.progress.stage(f"measuring, round {number + 1}")
            self.findings = self.gates.measure()
            if not self.findings.offenders:
                return written
            if self._with_less(program, number):
                self.history.append({"round": number + 1, "undone": None, "why": self.findings.why})
                continue
            for name in self.findings.offenders:
                program.banned[name] = self.findings.why
                self.history.append({"round": number + 1, "undone": name, "why": self.findings.why})
        self._nothing(program, "rounds-exhausted")
        program.rewrites = []
        return None

    def _with_bodies(self, program: Program, written: onnx.ModelProto | None) -> onnx.ModelProto | None:
        """The same with bodies of If, Loop and Scan rewritten."""
        depth = 0 if self.nested is None else self.nested.depth
        if depth >= MAX_DEPTH:
            return written
        found = Bodies(program, self.gates, self._compile_body, written, depth)
        made, findings = found.run()
        self.warnings += found.warnings
        self.history += [{"round": 1, "undone": where, "why": why} for where, why in found.undone]
        if made is None or findings is None:
            return written
        findings.rewrite_change = self.findings.rewrite_change
        findings.scores = findings.scores or self.findings.scores
        self.findings = findings
        stamp(made, program, program.kept)
        return made

    def _compile_body(self, model: onnx.ModelProto, nested: Nested) -> tuple[Program, onnx.ModelProto | None]:
        """A body by itself. What is measured is its outputs; latency, and any score, are those of the whole model."""
        where = nested.where
        options = replace(
            self.options,
            tolerance=nested.tolerance,
            metric="rel-l2",
            limits=(),
            evaluate=None,
            latency_gate=False,
            replay=None,
        )
        run = Run(
            replace(self.source, path=None, proto=model),
            options,
            self.progress,
            target=self.target,
            provider=self.provider,
            aside=self.aside and self.aside.with_name(f"{self.aside.name}.{next(self.parts)}"),
            nested=nested,
        )
        if self.replayed is not None:
            run.replayed = {name[len(where) + 1 :] for name in self.replayed if name.startswith(f"{where}/")}
        done = run.compile()
        self.history += [
            entry | {"undone": f"{where}/{entry['undone']}"} for entry in run.history if entry["undone"]
        ]
        if nested.data.kind == "calibration":
            said = [f"{where}: {warning}" for warning in run.warnings]
            self.warnings += [warning for warning in said if warning not in self.warnings]
        return done

    def _with_less(self, program: Program, number: int) -> bool:
        """Whether the same regions are to be planned again, on a smaller budget.

        What was planned on the select part may be a little too much on the report part; banning a region for that
        would throw away nearly all that it gains.
        """
        if self.findings.why != "tolerance" or number >= FRUGAL_ROUNDS or program.predicted is None:
            return False
        verification = self.findings.verification
        spent = verification.spent if verification is not None else np.inf
        if not np.isfinite(spent):
            return False
        program.budget *= FRUGAL / max(spent, 1.0)
        return True


def finding_passes() -> list[Pass]:
    """What looks for structure, in order; other packages add theirs by the entry point `onnx_decomp.passes`."""
    further = [entry.load()() for entry in metadata.entry_points(group="onnx_decomp.passes")]
    return [Slicing(), Criterion(), Annealing(), Overlapping(), *further]


def _moderate(array: NDArray[Any]) -> bool:
    """Neither NaN nor larger than what can be squared and summed; in float32, because float16 has no HUGE."""
    return bool((np.abs(array.astype(np.float32)) <= HUGE).all())


def _stamped(proto: onnx.ModelProto) -> bool:
    return any(entry.key == f"{verify.STAMP}version" for entry in proto.metadata_props)


def _kept_regions(report: Path, sha256: str) -> set[str]:
    """Names of the regions that a report kept. Raises InputError for no report, or the report on another model."""
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
        kept, made_for = set(found["kept"]), found["input"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{report}: not a report with a list of kept regions ({type(error).__name__}); give one that --report wrote"
        ) from error
    if made_for != sha256:
        raise InputError(
            f"{report}: the report on another model (its input's sha256 differs); give this model's own"
        )
    return kept


def compile_model(
    source: ModelFile, options: Options, progress: Progress | None = None, aside: Path | None = None
) -> tuple[Result, Program]:
    """Compile a loaded model; nothing is written, but for `aside`, which takes what the result has too much of.

    aside: a temporary file that has to stay until the result is saved; None: all of the result is in memory.
    """
    run = Run(source, options, progress or Silent(), aside=aside)
    # BLAS threads spin while they wait: one for each core, beside any other program, is several times slower than half.
    with threadpool_limits(limits=max(1, cpu_count() // 2), user_api="blas"):
        program, written = run.compile()
    if written is None:
        run.findings = Findings()
    elif run.findings.latency is not None:
        run.findings.operators = run.gates.operators(written)
        run.warnings += losses(run.findings.operators, run.provider)
    measured = Measured(
        verification=run.findings.verification,
        rewrite_change=run.findings.rewrite_change,
        scores=run.findings.scores,
        latency=run.findings.latency,
        shapes=run.findings.shapes if options.shapes else {},
        operators=run.findings.operators,
        history=tuple(run.history),
        warnings=tuple(run.warnings),
        seconds=time.monotonic() - run.started,
    )
    report = build(program, written, measured)
    return Result(written if written is not None else source.proto, report, written is not None), program


def compile_file(path: Path, out: Path | None, options: Options, progress: Progress | None = None) -> Result:
    """Compile the model at `path` and write it to `out`, whole or not at all (nothing where `out` is None)."""
    if out is not None:
        saving.check_output(path, out)
    source = model_io.load(path)
    with scratch.folder() as folder:
        result, _ = compile_model(source, options, progress, _aside(source, folder))
        if out is None or options.dry_run or (options.require_change and not result.changed):
            return result
        if result.changed:
            result = replace(result, model=saving.save(result.model, source, out))
        else:
            saving.copy(source, out)
    record_output(result.report, out)
    return result


def _aside(source: ModelFile, folder: Path) -> Path | None:
    """Where new tensors of a model wait whose own are in files too, if both are on one drive."""
    near = folder.absolute().anchor == source.folder.absolute().anchor
    return folder / "new.data" if source.external and near else None


def decompose(
    model: onnx.ModelProto | str | Path,
    *,
    init: str | Path | None = None,
    calib: str | Path | None = None,
    options: Options | None = None,
) -> Result:
    """Decompose a model in memory or on disk; see `Options` for everything else. Nothing is written."""
    chosen = with_files(options, init, calib)
    return compile_model(opened(model), chosen)[0]


def with_files(options: Options | None, init: str | Path | None, calib: str | Path | None) -> Options:
    """Options with the files that were given beside them."""
    chosen = options or Options()
    if init is not None:
        chosen = replace(chosen, init=Path(init))
    if calib is not None:
        chosen = replace(chosen, calib=Path(calib))
    return chosen


def opened(model: onnx.ModelProto | str | Path) -> ModelFile:
    """A model in memory or on disk. Raises InputError as `model_io` does."""
    return model_io.from_proto(model) if isinstance(model, onnx.ModelProto) else model_io.load(Path(model))


__all__ = ["Data", "Result", "compile_file", "compile_model", "decompose"]
