"""Trained models that packages carry, through the command: at default options, then with data at a loose tolerance."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.table import Table

from models import untouched
from models.bench_backend import invalid, run_command
from models.bench_common import Section, peak_bytes, save, table
from models.isolated import Lost, run_each
from models.shipped import CATALOGUE, Samples, Shipped, fetch, run
from onnx_decomp.metrics import compare_outputs
from onnx_decomp.runtime import open_session

LOOSE = 0.05
STRICT = 1e-3
"""The command's own."""

WORSE = 0.05
"""What a score may fall by."""

SECONDS, MEGABYTES = 900.0, 2000.0
"""What one compilation may take."""

DEFAULTS: tuple[str, ...] = ("--quiet",)
CALIBRATED = ("--tolerance", str(LOOSE), "--no-latency-gate", "--objective", "flops", "--quiet")
"""What is kept then does not depend on the machine, and more is tried."""


@dataclass(frozen=True)
class Job:
    """One compilation: of the model at this place of the catalogue."""

    place: int
    calibrated: bool


@dataclass(frozen=True)
class Row:
    """What came of one compilation.

    code: of the command, -1 where it never ended or never began; why: its error. faults: what is not as it must be.
    kept of regions, flops: share of the MatMul FLOPs that is left. reported: relative L2 of the outputs as the
    command's report has it; change: the same on held-back samples; the largest of the outputs. before, after: the
    task's score on them. megabytes: the most that the process held.
    """

    name: str
    calibrated: bool
    code: int
    why: str = ""
    faults: tuple[str, ...] = ()
    sites: int = 0
    kept: int = 0
    flops: float = 1.0
    identical: bool = False
    reported: float | None = None
    change: float | None = None
    task: str = ""
    before: float | None = None
    after: float | None = None
    seconds: float = 0.0
    megabytes: float = 0.0


def compile_one(job: Job) -> Row | None:
    """Fetch, compile, and compare, in a process of its own; None where there is no data of the model's kind."""
    model = CATALOGUE[job.place]
    if job.calibrated and model.samples is None:
        return None
    try:
        source = fetch(model)
    except (subprocess.CalledProcessError, ImportError) as error:
        return lost(job, f"not to be had: {error}")
    return compiled(model, source, job.calibrated)


def lost(job: Job, why: str) -> Row:
    """The row of a job that gave none."""
    return Row(CATALOGUE[job.place].name, job.calibrated, -1, why, (why,))


def compiled(model: Shipped, source: Path, calibrated: bool) -> Row:
    """Compile one model's file, and compare what came of it."""
    samples = None if model.samples is None else model.samples(source, np.random.default_rng(0))
    with tempfile.TemporaryDirectory() as folder:
        out, told = Path(folder) / "out.onnx", Path(folder) / "report.json"
        arguments = [str(source), str(out), "--report", str(told)]
        if calibrated:
            assert samples is not None
            calib = save(folder, "calib", samples.half(held_back=False).feeds)
            arguments += ["--calib", str(calib), *CALIBRATED]
        else:
            arguments += DEFAULTS
        started = time.perf_counter()
        code, why = run_command(arguments)
        row = Row(
            model.name,
            calibrated,
            code,
            why,
            task=model.task,
            seconds=time.perf_counter() - started,
            megabytes=peak_bytes() / 1e6,
        )
        if code:
            return replace(row, faults=(f"exit code {code}",))
        report = json.loads(told.read_text())
        row = _measured(row, model, samples, source, out, report)
        changed = difference(source, out, report)
        return replace(row, faults=(*([changed] if changed else []), *faults(row)))


def _measured(
    row: Row, model: Shipped, samples: Samples | None, source: Path, out: Path, report: Mapping[str, Any]
) -> Row:
    """The row with its figures: what the report says, and what held-back samples say."""
    dense, left = (report[end]["matmul_flops"] for end in ("input", "output"))
    row = replace(
        row,
        sites=len(report["sites"]),
        kept=len(report["kept"]),
        flops=left / dense if dense else 1.0,
        identical=out.read_bytes() == source.read_bytes(),
        reported=reported_change(report),
    )
    if samples is None or model.score is None:
        return row
    part = samples.half(held_back=True)
    expected, found = (run(open_session(path, threads=1), part.feeds, model.batch) for path in (source, out))
    truth = next(iter(expected.values())) if part.truth is None else part.truth
    change = compare_outputs([(expected, found)], "rel-l2").largest
    return replace(row, change=change, before=model.score(expected, truth), after=model.score(found, truth))


def reported_change(report: Mapping[str, Any]) -> float | None:
    """Relative L2 of the output that changed most, as the report has it; None where nothing was kept or compared."""
    outputs = (report["verify"] or {"outputs": {}})["outputs"]
    return max((output["rel_l2"] or 0.0 for output in outputs.values()), default=None)


def faults(row: Row) -> list[str]:
    """What of the figures is not as it must be."""
    tolerance, found = LOOSE if row.calibrated else STRICT, []
    if row.kept == 0 and not row.identical:
        found.append("nothing was kept, and OUT is not IN")
    if row.kept > 0 and row.change is None:
        found.append("rewritten, and there is no data to compare it on")
    for name, change in (("the report's data", row.reported), ("held-back data", row.change)):
        if change is not None and not change <= tolerance:
            found.append(f"outputs change by {change:.3g} on {name}, {tolerance:g} are allowed")
    if row.before is not None and row.after is not None and not row.after >= row.before - WORSE:
        found.append(f"{row.task}: {row.before:.3f} before, {row.after:.3f} after")
    if row.megabytes > MEGABYTES:
        found.append(f"took {row.megabytes:.0f} MB")
    return found


def difference(source: Path, out: Path, report: Mapping[str, Any]) -> str:
    """What is no longer as it was though nothing rewrote it, or that the written model is not valid; empty if sound."""
    if problem := invalid(source, out):
        return f"not valid: {problem}"
    return untouched.difference(onnx.load(source), onnx.load(out), report)


def measure(quick: bool) -> list[Row]:
    """Every model twice; of quick ones the first, at default options."""
    jobs = [Job(place, calibrated) for place in range(len(CATALOGUE)) for calibrated in (False, True)]
    return [row for row in each(jobs[:1] if quick else jobs) if row is not None]


def each(jobs: Sequence[Job]) -> Iterator[Row | None]:
    """The row of each job, one after another, in processes of their own; None as by `compile_one`."""
    for job, result in run_each(compile_one, jobs, 1, SECONDS, fresh=True):
        yield lost(job, result.why) if isinstance(result, Lost) else result


def tables(rows: Sequence[Row]) -> list[Table]:
    columns = ["exit", "kept", "FLOPs left", "reported", "change", "task before", "after", "s", "MB"]
    made = []
    for calibrated, title in (
        (False, "default options"),
        (True, f"calibrated, tolerance {LOOSE:g}, for FLOPs"),
    ):
        shown = table(f"models that packages carry: {title}", ["model", "result", "task"], columns)
        for row in rows:
            if row.calibrated == calibrated:
                shown.add_row(*_cells(row))
        made.append(shown)
    return made


def _cells(row: Row) -> list[str]:
    if row.code:
        numbers = [str(row.code) if row.code > 0 else "-", *["-"] * 8]
        return [row.name, row.why.removeprefix("onnx-decomp: "), "", *numbers]
    result = "; ".join(row.faults) or ("the same bytes" if row.identical else "rewritten")
    measured = [f"{value:.3f}" if value is not None else "-" for value in (row.before, row.after)]
    changes = [f"{value:.2g}" if value is not None else "-" for value in (row.reported, row.change)]
    ends = [f"{row.seconds:.1f}", f"{row.megabytes:.0f}"]
    return [row.name, result, row.task, "0", str(row.kept), f"{row.flops:.2f}", *changes, *measured, *ends]


def wrong(rows: Sequence[Row]) -> list[str]:
    """One line for each model that is not as it must be."""
    return [
        f"{row.name}{' with data' if row.calibrated else ''}: {fault}" for row in rows for fault in row.faults
    ]


SECTION = Section("models that packages carry", measure, tables, wrong)
