"""Time and memory to decide on one large layer, on one core: 4096 x 4096 with 8 hidden blocks.

Each measurement runs in a process of its own, so that peak memory is its own too: what it adds to a Python with
everything imported, the weights themselves (and their initial values) included.

    python -m models.bench_decision KIND SIDE FOLDER      such a process; prints its figures as JSON
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from models.bench_common import Section, peak_bytes, table
from models.planted import Null, Planted, build, shuffled
from onnx_decomp.init_stats import Law
from onnx_decomp.passes.annealing import agreement, find_structure
from onnx_decomp.passes.criterion import distribution_evidence, snapshot_evidence
from onnx_decomp.program import Evidence

BLOCKS = 8
RESTARTS: int = inspect.signature(find_structure).parameters["restarts"].default
"""Searches that measure the stability, as many as the compiler's own pass makes."""
CASES: tuple[tuple[Null, float, float], ...] = (("snapshot", 2.0, 0.3), ("distribution", 2.0, 0.0))
"""Null, gain and jitter: a noisy snapshot, and a distribution that knows nothing but the scale."""
ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Row:
    """One decision. Seconds; peak: bytes over those of the matrix in float32.

    search: one search without stability; whole: criterion, search, restarts that measure stability, all tests.
    Significance comes from a bound, not from shuffles, so `restarts` is all that is repeated.
    """

    null: str
    planted: bool
    side: int
    restarts: int
    blocks: int
    recovered: float
    """Share of rows and columns in their true block; of a control, nothing."""
    criterion: float
    search: float
    whole: float
    peak: float


def measure(quick: bool) -> list[Row]:
    """Both nulls, and for each the control: the same entries shuffled, where nothing must be found."""
    side = 512 if quick else 4096
    return [
        _measure(
            Planted((side, side), BLOCKS, gain=gain, jitter=jitter, unchanged=0.0, off="untouched"),
            null,
            planted,
        )
        for null, gain, jitter in CASES
        for planted in (True, False)
    ]


def _measure(spec: Planted, null: Null, planted: bool) -> Row:
    made = build(spec)
    if not planted:
        made = shuffled(made, np.random.default_rng(0))
    with tempfile.TemporaryDirectory() as folder:
        arrays = {"W": made.weights[0], "W0": made.initial[0], "rows": made.labels[0], "cols": made.labels[1]}
        for name, array in arrays.items():
            np.save(Path(folder) / f"{name}.npy", array)
        command = [sys.executable, "-m", "models.bench_decision", null, str(spec.widths[0]), folder]
        done = subprocess.run(
            command, env=os.environ | ONE_CORE, stdout=subprocess.PIPE, text=True, check=True, cwd=_ROOT
        )
    return Row(null, planted, spec.widths[0], **json.loads(done.stdout))


_ROOT = Path(__file__).parent.parent


def decide(null: str, side: int, folder: Path) -> dict[str, Any]:
    """Criterion and structure of one layer, with their times; in a process of its own."""
    baseline = peak_bytes()
    W = np.load(folder / "W.npy")
    started = time.perf_counter()
    evidence = _evidence(null, W, folder)
    looked = time.perf_counter()
    (found,) = find_structure([evidence], restarts=RESTARTS).structures or (None,)
    whole = time.perf_counter()
    peak = peak_bytes() - baseline
    find_structure([evidence], restarts=0)
    searched = time.perf_counter()
    truth = tuple(np.load(folder / f"{axis}.npy") for axis in ("rows", "cols"))
    return {
        "restarts": RESTARTS,
        "blocks": found.blocks if found else 1,
        "recovered": _recovered(truth, found.grouping) if found else 0.0,
        "criterion": looked - started,
        "search": searched - whole,
        "whole": whole - started,
        "peak": peak / (4 * side * side),
    }


def _evidence(null: str, W: np.ndarray, folder: Path) -> Evidence:
    if null == "snapshot":
        return snapshot_evidence(W, np.load(folder / "W0.npy"))
    law = Law("uniform", 0.0, 1 / sqrt(len(W)))  # as torch.nn.Linear draws, and so the planted ones
    return distribution_evidence(W, law.normal_scores, law.std())


def _recovered(truth: tuple[Any, ...], labels: tuple[Any, ...]) -> float:
    """Dropped elements count as misplaced."""
    kept = np.concatenate(labels) >= 0
    return agreement(truth, labels) * float(kept.mean())


def tables(rows: Sequence[Row]) -> list[Table]:
    made = table(
        f"decision: one layer with {BLOCKS} hidden blocks, one core (p by a bound: no shuffles; one seed)",
        ["null", "evidence", "matrix"],
        ["blocks found", "recovered", "restarts", "criterion s", "search s", "whole s", "peak / matrix"],
    )
    for row in rows:
        made.add_row(
            row.null,
            "planted" if row.planted else "shuffled",
            f"{row.side}x{row.side}",
            str(row.blocks) if row.blocks > 1 else "none",
            f"{row.recovered:.2%}" if row.planted else "-",
            str(row.restarts),
            *(f"{seconds:.1f}" for seconds in (row.criterion, row.search, row.whole)),
            f"{row.peak:.1f}x",
        )
    return [made]


SECTION = Section("what deciding on one large layer takes", measure, tables)

if __name__ == "__main__":
    print(json.dumps(decide(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
