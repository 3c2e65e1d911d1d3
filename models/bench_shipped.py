"""Trained models that packages carry, through the command: at default options, then with data at a loose tolerance."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.table import Table

from models.bench_backend import invalid, run_command
from models.bench_common import Section, peak_bytes, save, table
from models.isolated import Lost, run_each
from models.shipped import CATALOGUE, Samples, Shipped, fetch, run
from onnx_decomp.metrics import compare_outputs
from onnx_decomp.runtime import open_session
from onnx_decomp.verify import interface_difference

LOOSE = 0.05
SECONDS = 900.0
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

    code: of the command; why: its error, or what is not as it must be. kept of regions, flops: share of the MatMul
    FLOPs that is left. reported: relative L2 of the outputs as the command's report has it; change: the same on
    held-back samples; the largest of the outputs. before, after: the task's score on them. megabytes: the most that
    the process held.
    """

    name: str
    calibrated: bool
    code: int
    why: str = ""
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


def compile_one(job: Job) -> Row:
    """Fetch, compile, and compare; in a process of its own."""
    model = CATALOGUE[job.place]
    try:
        source = fetch(model)
    except (subprocess.CalledProcessError, ImportError) as error:
        return Row(model.name, job.calibrated, -1, f"not to be had: {error}")
    samples = None if model.samples is None else model.samples(source, np.random.default_rng(0))
    if job.calibrated and samples is None:
        return Row(model.name, True, -1, model.note)
    with tempfile.TemporaryDirectory() as folder:
        out, report = Path(folder) / "out.onnx", Path(folder) / "report.json"
        arguments = [str(source), str(out), "--report", str(report)]
        if job.calibrated and samples is not None:
            calib = save(folder, "calib", samples.half(held_back=False).feeds)
            arguments += ["--calib", str(calib), *CALIBRATED]
        else:
            arguments += DEFAULTS
        started = time.perf_counter()
        code, why = run_command(arguments)
        seconds, memory = time.perf_counter() - started, peak_bytes() / 1e6
        if code:
            return Row(model.name, job.calibrated, code, why, seconds=seconds, megabytes=memory)
        told = json.loads(report.read_text())
        spent = [told[end]["matmul_flops"] for end in ("input", "output")]
        change, before, after = _compared(model, samples, source, out)
        return Row(
            model.name,
            job.calibrated,
            code,
            difference(source, out),
            sites=len(told["sites"]),
            kept=len(told["kept"]),
            flops=spent[1] / spent[0] if spent[0] else 1.0,
            identical=out.read_bytes() == source.read_bytes(),
            reported=max((o["rel_l2"] or 0.0 for o in told["verify"]["outputs"].values()), default=None),
            change=change,
            task=model.task,
            before=before,
            after=after,
            seconds=seconds,
            megabytes=memory,
        )


def _compared(model: Shipped, samples: Samples | None, source: Path, out: Path) -> tuple[Any, Any, Any]:
    """Change of the outputs on the held-back samples, and the score of both models; None without samples."""
    if samples is None or model.score is None:
        return None, None, None
    part = samples.half(held_back=True)
    expected, found = (run(open_session(path, threads=1), part.feeds, model.batch) for path in (source, out))
    truth = next(iter(expected.values())) if part.truth is None else part.truth
    change = compare_outputs([(expected, found)], "rel-l2").largest
    return change, model.score(expected, truth), model.score(found, truth)


def difference(source: Path, out: Path) -> str:
    """What is no longer as it was though nothing rewrote it, or that the written model is not valid; empty if sound."""
    before, after = onnx.load(source), onnx.load(out)
    if problem := invalid(source, out):
        return f"not valid: {problem}"
    if problem := interface_difference(before, after):
        return problem
    stored = {tensor.name: tensor for tensor in after.graph.initializer}
    changed = [t.name for t in before.graph.initializer if t.name in stored and stored[t.name] != t]
    if changed:
        return f"stored tensors have changed: {', '.join(changed[:3])}"
    fields = ("producer_name", "producer_version", "domain", "model_version", "doc_string")
    lost = [name for name in fields if getattr(before, name) != getattr(after, name)]
    return f"{', '.join(lost)} of the model changed" if lost else ""


def measure(quick: bool) -> list[Row]:
    """Every model twice; of quick ones the first, at default options."""
    jobs = [Job(place, calibrated) for place in range(len(CATALOGUE)) for calibrated in (False, True)]
    rows = []
    for job, result in run_each(compile_one, jobs[:1] if quick else jobs, 1, SECONDS, fresh=True):
        if isinstance(result, Lost):
            result = Row(CATALOGUE[job.place].name, job.calibrated, -1, result.why)
        rows.append(result)
    return rows


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
    result = row.why or ("the same bytes" if row.identical else "rewritten")
    measured = [f"{value:.3f}" if value is not None else "-" for value in (row.before, row.after)]
    changes = [f"{value:.2g}" if value is not None else "-" for value in (row.reported, row.change)]
    ends = [f"{row.seconds:.1f}", f"{row.megabytes:.0f}"]
    return [row.name, result, row.task, "0", str(row.kept), f"{row.flops:.2f}", *changes, *measured, *ends]


SECTION = Section("models that packages carry", measure, tables)
