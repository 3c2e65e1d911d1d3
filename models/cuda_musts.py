"""What has to hold on a GPU, of models that the compiler itself made: near the roofline, never slower, a real one.

Each is compiled as a user would, with the latency gate on, and then timed anew.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from rich.table import Table

from models import ceilings, minilm, peers, planted
from models.bench_common import save, table, times
from models.ceilings import Ceilings
from onnx_decomp import Result, decompose, frontier
from onnx_decomp.latency import Latency, compare
from onnx_decomp.options import Options
from onnx_decomp.runtime import Device, open_session

SECONDS, QUICK = 2.0, 0.2
"""Of one comparison."""
REACHED = 0.85
"""Share of the roofline that a chain of batched products has to reach."""

Tokens = Sequence[int]


@dataclass(frozen=True)
class Timed:
    """A compiled model against its original at one shape. form: of its first site, or why it stayed as it was."""

    model: str
    dtype: str
    form: str
    flops: float
    """After over before."""
    tokens: int
    cuda_graph: bool
    before_ms: float
    after_ms: float
    speedup: float
    interval: tuple[float, float]
    roofline_ms: float | None = None


# A planted chain near the roofline


def towers(provider: Device, quick: bool) -> Iterator[Timed]:
    """One feed-forward pair of eight blocks, in float16, at the batch that keeps a GPU busy."""
    seconds = QUICK if quick else SECONDS
    widths, tokens = ((256, 1024, 256), 64) if quick else ((4096, 16384, 4096), 4096)
    spec = planted.Planted(widths, blocks=8, off="zero", gain=3, hide="hidden", dtype="float16")
    made = planted.build(spec)
    done = _compiled(made, provider, (tokens,))
    x = planted.calibration(made, tokens, seed=3)
    for graph in (False, True) if provider == "cuda" else (False,):
        found = ceilings.measure(provider, spec.dtype, graph, quick, seconds / 4)
        sessions = [
            open_session(each, provider=provider, cuda_graph=graph) for each in (made.model, done.model)
        ]
        timed = compare(sessions[0], sessions[1], x, seconds=seconds)
        row = _row("planted towers", spec.dtype, done.report, tokens, timed, graph)
        yield replace(row, roofline_ms=roofline(found, spec, tokens) / 1e3)


def roofline(ceiling: Ceilings, spec: planted.Planted, tokens: int) -> float:
    """Microseconds that the machine's ceilings allow a pair of layers in lanes: two batched products, a bias behind
    each, an activation between them, and one Transpose at the end."""
    (K, H, N), G, best = spec.widths, spec.blocks, ceiling.roofline
    products = [best.product(tokens, G, k // G, n // G) for k, n in ((K, H), (H, N))]
    return sum(products) + 2 * best.moved(tokens * H) + 2 * best.moved(tokens * N)


def below_roofline(rows: Sequence[Timed]) -> list[str]:
    """Those that waste more than they may; with CUDA graphs or without, the better one counts."""
    shares = [row.roofline_ms / row.after_ms for row in rows if row.roofline_ms is not None]
    if shares and max(shares) < REACHED:
        return [f"planted towers reach {max(shares):.0%} of the roofline, not {REACHED:.0%}"]
    return []


# Never slower


def shapes(provider: Device, quick: bool) -> Iterator[Timed]:
    """Small and large planted networks, asked to be faster at every one of some shapes, each timed again afterwards."""
    tokens = (1, 16) if quick else (1, 16, 128, 1024, 4096)
    widths = ((256, 512, 256),) if quick else ((256, 1024, 256), (1024, 4096, 1024), (2048, 2048))
    for dtype in ("float32",) if quick else ("float16", "float32"):
        for each in widths:
            for few in (tokens,) if quick else (tokens, tokens[-1:]):
                yield from _at_shapes(provider, each, dtype, few, (QUICK if quick else SECONDS) / 4)


def _at_shapes(
    provider: Device, widths: tuple[int, ...], dtype: Any, tokens: Tokens, seconds: float
) -> Iterator[Timed]:
    spec = planted.Planted(widths, off="zero", gain=3, hide="hidden", dtype=dtype)
    made = planted.build(spec)
    done = _compiled(made, provider, tokens)
    before, after = (open_session(each, provider=provider) for each in (made.model, done.model))
    for rows in tokens:
        timed = compare(before, after, planted.calibration(made, rows, seed=3), seconds=seconds)
        yield _row(f"planted {'-'.join(map(str, widths))}", dtype, done.report, rows, timed)


def slower(rows: Sequence[Timed]) -> list[str]:
    """Rewritten models that are slower at a shape, beyond noise."""
    return [
        f"{row.model} ({row.dtype}) is slower at {row.tokens} tokens: {times(row.speedup, row.interval)}"
        for row in rows
        if row.flops < 1 and row.interval[1] < 1
    ]


# A real one


BATCH, LENGTH = 32, 128
ASKED = 0.75
"""Of the FLOPs of its feed-forward layers."""


def sentences(provider: Device, quick: bool) -> Iterator[Timed]:
    """A small sentence transformer at three quarters of its feed-forward FLOPs, from end to end."""
    if quick and not minilm.cached():
        print("the sentence transformer is left out: it would have to be fetched", file=sys.stderr)
        return
    of = minilm.load()
    source = onnx.load(of.model)
    layers = peers.Work.of(source, dict(np.load(of.calib)), "feed-forward", "attention_mask")
    asked = Options(
        metric="cosine",
        objective="flops",
        provider=provider,
        latency_gate=False,
        include=layers.include(),
    )
    found = frontier(of.model, calib=of.calib, options=asked, ratios=(ASKED,), methods=("plan",))
    point = max((each for each in found.points if each.flops <= ASKED), key=lambda each: each.flops)
    ids = np.random.default_rng(0).integers(1000, 20000, (BATCH, LENGTH))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    before, after = (open_session(each, provider=provider) for each in (source, found.write(point)))
    timed = compare(before, after, feeds, seconds=SECONDS)
    yield Timed(
        "MiniLM-L6", "float32", "plan", point.flops, BATCH * LENGTH, False,
        timed.before_ms, timed.after_ms, timed.speedup, timed.interval,
    )  # fmt: skip


def not_faster(rows: Sequence[Timed]) -> list[str]:
    return [
        f"{row.model} at {row.flops:.2f} of its feed-forward FLOPs is not faster: {times(row.speedup, row.interval)}"
        for row in rows
        if row.interval[0] <= 1
    ]


# Shared


def _compiled(made: planted.PlantedModel, provider: Device, tokens: Tokens) -> Result:
    """Asked to be faster at every one of these numbers of tokens."""
    shapes = tuple(((planted.INPUT, (rows, made.spec.widths[0])),) for rows in tokens)
    with tempfile.TemporaryDirectory() as folder:
        calib = save(folder, "calib", planted.calibration(made, 400))
        asked = Options(provider=provider, search=False, shapes=shapes)
        return decompose(made.model, calib=calib, options=asked)


def _row(
    name: str, dtype: str, report: dict[str, Any], tokens: int, timed: Latency, graph: bool = False
) -> Timed:
    site = report["sites"][0]
    flops = report["output"]["matmul_flops"] / report["input"]["matmul_flops"]
    return Timed(
        name, dtype, site["form"] or site["reason"], flops, tokens, graph,
        timed.before_ms, timed.after_ms, timed.speedup, timed.interval,
    )  # fmt: skip


def tables(rows: Sequence[Timed]) -> list[Table]:
    made = table(
        "compiled models against their originals (in turns, device buffers on CUDA)",
        ["model", "type", "form"],
        ["FLOPs", "tokens", "graph", "before ms", "after ms", "speed-up [95 %]", "of the roofline"],
    )
    for row in rows:
        made.add_row(
            row.model,
            row.dtype,
            row.form,
            f"{row.flops:.2f}",
            str(row.tokens),
            "yes" if row.cuda_graph else "no",
            f"{row.before_ms:.3g}",
            f"{row.after_ms:.3g}",
            times(row.speedup, row.interval),
            "" if row.roofline_ms is None else f"{row.roofline_ms / row.after_ms:.0%}",
        )
    return [made]
