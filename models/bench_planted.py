"""Planted runs of layers through the whole compiler, and how much of the possible speed-up was reached.

The blocks' complement has vanished (exact zeros), so the weights alone bound the change of the function and no
calibration data is needed; `compile` measures what compiling with data costs.

The ideal: what the dense model spends outside matrix products stays, the products shrink as their FLOPs do.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import onnx
from rich.table import Table

from models.bench_common import Section, compare, kernel_events, save, table, times
from models.planted import INPUT, Planted, build
from onnx_decomp import model_io
from onnx_decomp.compiler import compile_model
from onnx_decomp.options import Options
from onnx_decomp.runtime import Arrays

THREE, TWO = (768, 3072, 3072, 768), (768, 3072, 768)
ROWS = (1, 16, 128, 512)
PRODUCTS = {"MatMul", "Gemm", "FusedGemm", "FusedMatMul"}
"""Operators that count as matrix products; an activation fused into one is part of it."""


@dataclass(frozen=True)
class Row:
    """One planted model at one number of rows and threads.

    flops: of the dense model over the written one's. share: of the dense model's time in matrix products.
    """

    widths: tuple[int, ...]
    blocks: int
    uneven: bool
    hide: str
    form: str
    rows: int
    threads: int | None
    before_ms: float
    after_ms: float
    flops: float
    share: float
    speedup: float
    interval: tuple[float, float]

    @property
    def ideal(self) -> float:
        return 1 / (1 - self.share + self.share / self.flops)

    @property
    def reached(self) -> float:
        """Share of the ideal speed-up."""
        return self.speedup / self.ideal


def cases(quick: bool) -> list[Planted]:
    """What is planted: even and uneven blocks, hidden axes permuted, or the borders too (which takes Gathers)."""
    if quick:
        return [_planted(TWO, 4)]
    return [
        planted
        for widths in (THREE, TWO)
        for planted in (
            *(_planted(widths, blocks) for blocks in (2, 4, 8)),
            Planted(widths, 4, uneven=True, off="zero", hide="hidden"),
            Planted(widths, 4, off="zero", hide="all"),
        )
    ]


def _planted(widths: tuple[int, ...], blocks: int) -> Planted:
    return Planted(widths, blocks, off="zero", hide="hidden")


def measure(quick: bool) -> list[Row]:
    """Compile each case once, then time it at each number of rows and threads."""
    rows = (16, 128) if quick else ROWS
    return [row for spec in cases(quick) for row in measure_one(spec, rows, 0.5 if quick else 1.5)]


def measure_one(spec: Planted, rows: Sequence[int], seconds: float) -> Iterator[Row]:
    """All rows of one case; the written model is the same at every number of rows."""
    planted = build(spec)
    with tempfile.TemporaryDirectory() as folder:
        init = save(folder, "init", planted.snapshot)
        options = Options(init=init, provider="cpu", latency_gate=False)
        result, _ = compile_model(model_io.from_proto(planted.model), options)
    report = result.report
    flops = report["input"]["matmul_flops"] / report["output"]["matmul_flops"]
    forms = ", ".join(sorted({site["form"] or "dense" for site in report["sites"]}))
    for count in rows:
        feeds = {INPUT: np.random.default_rng(count).standard_normal((count, spec.widths[0]), np.float32)}
        for threads in (1, None):
            share = product_share(planted.model, feeds, threads)
            timed = compare(planted.model, result.model, feeds, threads, seconds)
            yield Row(
                spec.widths,
                spec.blocks,
                spec.uneven,
                spec.hide,
                forms,
                count,
                threads,
                timed.before_ms,
                timed.after_ms,
                flops,
                share,
                timed.speedup,
                timed.interval,
            )


def product_share(model: onnx.ModelProto, feeds: Arrays, threads: int | None) -> float:
    """Share of the operators' time that matrix products take, by ONNX Runtime's own profile."""
    spent = node_times(model, feeds, threads)
    return sum(time for op, time in spent.items() if op in PRODUCTS) / sum(spent.values())


def node_times(model: onnx.ModelProto, feeds: Arrays, threads: int | None, runs: int = 10) -> Counter[str]:
    """Microseconds of one run by operator, the first run left out."""
    kernels = kernel_events(model, feeds, threads, runs + 1)
    spent: Counter[str] = Counter()
    for event in kernels[len(kernels) // (runs + 1) :]:
        spent[event["args"]["op_name"]] += event["dur"] / runs
    return spent


def tables(rows: Sequence[Row]) -> list[Table]:
    """One line a case and number of rows, its numbers of threads side by side."""
    made = table(
        "planted: the original against the written model (before / after in one interleaved run, CPU, float32)",
        ["widths", "blocks", "permuted", "form"],
        ["rows", "FLOPs", *(f"{threads}: {what}" for threads in ("1 thread", "default") for what in _SHOWN)],
    )
    lines: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.widths, row.blocks, row.uneven, row.hide, row.form, row.rows), []).append(row)
    for (widths, blocks, uneven, hide, form, count), beside in lines.items():
        cells = [
            (times(row.speedup, row.interval), f"{row.ideal:.2f}", f"{row.reached:.0%}") for row in beside
        ]
        made.add_row(
            "-".join(map(str, widths)),
            f"{blocks}{' uneven' if uneven else ''}",
            hide,
            form,
            str(count),
            f"{beside[0].flops:.2f}x",
            *chain.from_iterable(cells),
        )
    return [made]


_SHOWN = ("speed-up [95 %]", "ideal", "share of it")


SECTION = Section("planted runs of layers, through the whole compiler", measure, tables)
