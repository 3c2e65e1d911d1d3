"""What `make run` shows: really trained models decomposed, verified on held-back data and timed in one run.

    python -m models.demo [NAME ...]

Speeds are ratios of interleaved runs on the CPU provider, at one thread and, beside it, at the default number.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import models
from onnx_decomp import latency, runtime
from onnx_decomp.compiler import Result, compile_file
from onnx_decomp.options import Options
from onnx_decomp.rendering import render_table

OUT = Path("out")
ROWS = 128
"""Samples of one timed run."""


@dataclass(frozen=True)
class Case:
    """A trained model and the change of its outputs that is allowed (relative L2)."""

    name: str
    tolerance: float
    why: str
    init: bool = True


CASES = (
    Case("towers/vanished", 1e-3, "masked training, strong decay: what never learned is gone"),
    Case("towers/shrunk", 1e-3, "masked training, moderate decay, strict: must be declined"),
    Case("towers/shrunk", 0.07, "the same, with a change that its user allows"),
    Case("towers/untouched", 0.1, "masked training, no decay: plain removal changes the function"),
    Case("digits", 0.05, "an ordinary dense network: no blocks, much redundancy"),
    Case("ranker", 0.03, "sparse inputs, ordinary training: units and inputs that it can do without"),
    Case("towers/dense", 0.1, "four unrelated tasks, ordinary training: parts that only the function shows"),
    Case("shared", 0.1, "three tasks that share an input, ordinary training"),
    Case("coupled", 0.05, "two tasks that need the same inputs: no parts, and none are claimed"),
)


@dataclass(frozen=True)
class Outcome:
    """What one case came to."""

    case: Case
    result: Result
    metric: str
    before: float
    after: float
    single: latency.Latency | None
    default: latency.Latency | None
    seconds: float


def run_case(case: Case) -> Outcome:
    """Compile one model and measure it on data that neither training nor the compiler has seen."""
    trained = models.load(case.name)
    out = OUT / f"{case.name.replace('/', '-')}-{case.tolerance:g}.onnx"
    options = Options(
        init=trained.init if case.init else None,
        calib=trained.calib,
        tolerance=case.tolerance,
        provider="cpu",
        threads=1,
    )
    started = time.monotonic()
    result = compile_file(trained.model, out, options)
    seconds = time.monotonic() - started
    held_back = dict(np.load(trained.report))
    target = held_back.pop("target")
    before, after = (_metric(trained, path, held_back, target) for path in (trained.model, out))
    single = default = None
    if result.changed:
        single, default = (_speed(trained.model, out, held_back, threads) for threads in (1, None))
    return Outcome(case, result, trained.meta["metric"], before, after, single, default, seconds)


def _metric(
    trained: models.TrainedModel, path: Path, feeds: dict[str, Any], target: np.ndarray[Any, Any]
) -> float:
    outputs = runtime.open_session(path, threads=1).run(feeds)
    return models.metric(trained, next(iter(outputs.values())), target)


def _speed(before: Path, after: Path, feeds: dict[str, Any], threads: int | None) -> latency.Latency:
    """Both models in turn, at the same number of threads and on the same rows."""
    sessions = [runtime.open_session(path, threads=threads) for path in (before, after)]
    return latency.compare(*sessions, {name: array[:ROWS] for name, array in feeds.items()}, seed=0)


def summary(outcomes: list[Outcome]) -> Table:
    """One row a case."""
    table = Table(title=f"Measured on held-back data; speed at {ROWS} rows, interleaved, [95 % interval]")
    for column in ("model", "tolerance", "kept", "parameters", "FLOPs", "output change", "task metric"):
        table.add_column(column)
    for column in ("speed-up, 1 thread", "default threads", "compiled in"):
        table.add_column(column, justify="right")
    for outcome in outcomes:
        table.add_row(*_row(outcome))
    return table


def _row(outcome: Outcome) -> list[str]:
    report = outcome.result.report
    source, written = report["input"], report["output"]
    changes = (report["verify"] or {}).get("outputs", {}).values() if outcome.result.changed else ()
    change = max((entry["rel_l2"] for entry in changes), default=0.0)
    return [
        outcome.case.name,
        f"{outcome.case.tolerance:g}",
        ", ".join(sorted({site["decision"] for site in report["sites"]})),
        f"{source['parameters']:,} -> {written['parameters']:,}",
        f"{written['matmul_flops'] / source['matmul_flops']:.3f}",
        f"{change:.1e}",
        f"{outcome.metric} {outcome.before:.4f} -> {outcome.after:.4f}",
        _ratio(outcome.single),
        _ratio(outcome.default),
        f"{outcome.seconds:.1f} s",
    ]


def _ratio(measured: latency.Latency | None) -> str:
    if measured is None:
        return "unchanged"
    low, high = measured.interval
    return f"{measured.speedup:.2f}x [{low:.2f}, {high:.2f}]"


def main() -> None:
    """Run the cases named on the command line, or all of them."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    chosen = [case for case in CASES if not sys.argv[1:] or case.name in sys.argv[1:]]
    OUT.mkdir(exist_ok=True)
    outcomes = []
    for case in chosen:
        console.rule(f"{case.name} at {case.tolerance:g}: {case.why}")
        outcomes.append(run_case(case))
        console.print(render_table(outcomes[-1].result.report))
    console.print(summary(outcomes))


if __name__ == "__main__":
    main()
