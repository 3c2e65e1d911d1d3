"""How long compiling takes, stage by stage, for the trained models and a planted one."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

import models
from models.bench_common import Section, save, table
from models.planted import Planted, build, calibration
from onnx_decomp import model_io
from onnx_decomp.compiler import compile_model
from onnx_decomp.options import Options

STAGES = ("reading", "criterion", "annealing", "planning", "measuring")
TOLERANCE = 0.05


@dataclass
class StageTimes:
    """A watcher of the compiler that sums the seconds of each kind of stage; rounds of one kind add up."""

    spent: dict[str, float] = field(default_factory=dict)
    rounds: int = 0
    _name: str = ""
    _since: float = 0.0

    def stage(self, name: str) -> None:
        now = time.perf_counter()
        if self._name:
            self.spent[self._name] = self.spent.get(self._name, 0.0) + now - self._since
        self._name, self._since = name.partition(",")[0], now
        self.rounds += self._name == "planning"

    def advance(self, done: int, total: int) -> None:
        """Only whole stages count."""


@dataclass(frozen=True)
class Row:
    """One compilation: seconds as a whole and by stage, and what came of it."""

    name: str
    tolerance: float
    kept: str
    rounds: int
    seconds: float
    stages: dict[str, float]


def measure(quick: bool) -> list[Row]:
    """Latency gate on, one thread, as `make run` compiles them; then a planted run of two layers."""
    names = ("towers/vanished",) if quick else models.NAMES
    rows = []
    for name in names:
        trained = models.load(name)
        rows.append(_compile(name, trained.model, trained.init, trained.calib))
    if not quick:
        rows.append(_planted((256, 1024, 256)))
    return rows


def _planted(widths: tuple[int, ...]) -> Row:
    planted = build(Planted(widths, 4, off="zero", hide="hidden"))
    with tempfile.TemporaryDirectory() as folder:
        init = save(folder, "init", planted.snapshot)
        calib = save(folder, "calib", calibration(planted, 2048))
        model = Path(folder) / "model.onnx"
        model.write_bytes(planted.model.SerializeToString())
        return _compile(f"planted {'-'.join(map(str, widths))}", model, init, calib)


def _compile(name: str, model: Path, init: Path, calib: Path) -> Row:
    options = Options(init=init, calib=calib, tolerance=TOLERANCE, provider="cpu", threads=1)
    watch = StageTimes()
    started = time.perf_counter()
    result, _ = compile_model(model_io.load(model), options, watch)
    watch.stage("")
    seconds = time.perf_counter() - started
    kept = ", ".join(sorted({site["decision"] for site in result.report["sites"]}))
    return Row(name, TOLERANCE, kept, watch.rounds, seconds, watch.spent)


def tables(rows: Sequence[Row]) -> list[Table]:
    made = table(
        "compile: seconds by stage (with calibration data and latency gate)",
        ["model", "kept"],
        ["tolerance", "rounds", "seconds", *STAGES],
    )
    for row in rows:
        stages = [f"{row.stages.get(stage, 0.0):.2f}" for stage in STAGES]
        made.add_row(row.name, row.kept, f"{row.tolerance:g}", str(row.rounds), f"{row.seconds:.1f}", *stages)
    return [made]


SECTION = Section("seconds of compiling, by stage", measure, tables)
