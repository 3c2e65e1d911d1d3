"""What is left of the task at fewer FLOPs: the compiler's own points beside what others make of the same data.

FLOPs are those of products with stored weights, of the layers in question: all of them, or the pairs of layers with
nothing but an activation between them (`feed-forward`). Every method is asked for the same share, gets the same
calibration data (beyond `peers.ROWS` rows only the compiler sees the rest), and none sees the held-back samples that
the task metric is taken on. A difference is paired: its 95 % interval comes from drawing the held-back samples anew.

    python -m models.bench_frontier [NAME ...] [--against METHOD] [--peers-only] [--quick]

runs it by itself. `allowed` is what a user would accept at that share; it was set before anything was measured here.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import models
from models import minilm, peers
from models.bench_common import Section, table
from models.bench_independent import interval, scores
from onnx_decomp.options import Metric, Options

Floats = NDArray[np.float64]
Interval = tuple[float, float, float]
Answer = Callable[[Mapping[str, NDArray[Any]]], NDArray[Any]]

OURS = "onnx-decomp"


@dataclass(frozen=True)
class Case:
    """Layers of a model, and what is allowed at each share of their FLOPs: of the original's metric, or in its unit."""

    name: str
    scope: peers.Scope
    allowed: Mapping[float, float | None]
    relative: bool = False
    metric: Metric = "rel-l2"
    """What the compiler is told to go by: divergence where one softmax follows, direction for embeddings."""


CASES = (
    Case("digits", "all", {0.025: 0.002}, metric="kl"),
    Case("towers/dense", "all", {0.085: 0.003}),
    Case("towers/shrunk", "all", {0.17: 0.003}),
    Case("ranker", "all", {0.29: 0.0}, metric="kl"),
    Case("charlm", "feed-forward", {0.5: 0.0065, 0.25: 0.065}, relative=True, metric="kl"),
    Case("charlm", "all", {0.7: 0.005, 0.5: None}, relative=True, metric="kl"),
    Case("minilm", "feed-forward", {0.9: 0.006, 0.75: 0.02}, metric="cosine"),
)


@dataclass(frozen=True)
class Row:
    """One method at one share of the FLOPs on one set of held-back samples. worse: than the original, in the metric's
    unit; beyond: what it loses beyond ours, None for ours; neighbours: share of sentences whose nearest one stays."""

    name: str
    scope: str
    asked: float
    data: str
    method: str
    note: str
    flops: float
    metric: str
    before: float
    after: float
    worse: Interval
    allowed: float | None
    beyond: Interval | None
    neighbours: float | None
    seconds: float


@dataclass(frozen=True)
class Held:
    """Held-back samples, and the metric of each of them for an output."""

    feeds: Mapping[str, NDArray[Any]]
    score: Callable[[NDArray[Any]], Floats]
    neighbours: Callable[[NDArray[Any]], float] | None = None


@dataclass(frozen=True)
class Subject:
    """A model with all that its rows are made of."""

    model: Path
    init: Path | None
    calib: Path
    metric: str
    mask: str | None
    reports: Mapping[str, Held]

    @property
    def sign(self) -> float:
        """1 where more of the metric is better."""
        return -1.0 if self.metric == "loss" else 1.0


def subject(name: str) -> Subject:
    """One of the trained models, or the sentence transformer, whose metric is the cosine to its own embeddings."""
    if name == "minilm":
        made = minilm.load()
        kinds = {kind: _sentences(made.model, path) for kind, path in made.reports.items()}
        return Subject(made.model, None, made.calib, "cosine", "attention_mask", kinds)
    trained = models.load(name)
    feeds = dict(np.load(trained.report))
    target = feeds.pop("target")
    held = Held(feeds, lambda output: scores(trained, output, target))
    return Subject(trained.model, trained.init, trained.calib, trained.meta["metric"], None, {"report": held})


def _sentences(model: Path, path: Path) -> Held:
    feeds = dict(np.load(path))
    reference = peers.run_model(onnx.load(model), feeds)
    return Held(
        feeds,
        partial(minilm.cosines, reference),
        lambda output: float(minilm.neighbours_kept(reference, output).mean()),
    )


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """What a method came to, ready to run."""

    method: str
    note: str
    flops: float
    answer: Answer
    seconds: float


def measure(
    quick: bool, names: Sequence[str] = (), ours: bool = True, against: Sequence[str] = ()
) -> list[Row]:
    """All cases, or those of the named models, against all methods, or some.

    quick: digits alone, against unit pruning alone.
    """
    only = {"wanda", "obs"} if quick else set(against) or None
    rows: list[Row] = []
    for case in CASES:
        if case.name in (names or [each.name for each in CASES]) and not (quick and case.name != "digits"):
            try:
                of = subject(case.name)
            except (subprocess.CalledProcessError, ModuleNotFoundError) as error:
                print(f"{case.name} is left out: {error}", file=sys.stderr)
                continue
            rows += measure_case(case, of, only, ours)
    return rows


def measure_case(case: Case, of: Subject, only: set[str] | None, ours: bool) -> Iterator[Row]:
    """Ours first, then every peer."""
    work = peers.Work.of(onnx.load(of.model), dict(np.load(of.calib)), case.scope, of.mask)
    own = our_points(case, of, work) if ours else {}
    for asked, allowed in case.allowed.items():
        made = [own[asked]] if asked in own else []
        made += [each for each in (peer(name, work, asked) for name in methods(only)) if each is not None]
        for kind, held in of.reports.items():
            before = held.score(peers.run_model(work.index.proto, held.feeds))
            outputs = [each.answer(held.feeds) for each in made]
            after = [held.score(output) for output in outputs]
            limit = None if allowed is None else allowed * (float(before.mean()) if case.relative else 1.0)
            for each, output, scored in zip(made, outputs, after, strict=True):
                yield Row(
                    case.name,
                    case.scope,
                    asked,
                    kind,
                    each.method,
                    each.note,
                    each.flops,
                    of.metric,
                    float(before.mean()),
                    float(scored.mean()),
                    interval(of.sign * (before - scored)),
                    limit,
                    interval(of.sign * (after[0] - scored)) if own and each is not made[0] else None,
                    held.neighbours(output) if held.neighbours else None,
                    each.seconds,
                )


def our_points(case: Case, of: Subject, work: peers.Work) -> dict[float, Made]:
    """For each share the compiler's own point with the most FLOPs that is not above it; FLOPs as the file has them."""
    from onnx_decomp import frontier

    options = Options(
        metric=case.metric,
        objective="flops",
        provider="cpu",
        threads=1,
        latency_gate=False,
        include=work.include() if case.scope == "feed-forward" else None,
    )
    started = time.perf_counter()
    found = frontier(
        of.model, init=of.init, calib=of.calib, options=options, ratios=tuple(case.allowed), methods=("plan",)
    )
    seconds = time.perf_counter() - started
    made = {}
    for asked in case.allowed:
        fitting = [point for point in found.points if point.method == "plan" and point.flops <= asked + 1e-9]
        if fitting:
            written = found.write(max(fitting, key=lambda point: point.flops))
            gone = peers.multiplications(work.index.proto) - peers.multiplications(written)
            flops = 1 - 2 * gone / work.flops
            made[asked] = Made(
                OURS, "", flops, partial(peers.run_model, written), seconds / len(case.allowed)
            )
    return made


def methods(only: set[str] | None) -> list[str]:
    """The peers that can run here: onnxsim is an extra."""
    there = find_spec("onnxsim") is not None
    return [
        name for name in peers.METHODS if (only is None or name in only) and (there or "onnxsim" not in name)
    ]


def peer(name: str, work: peers.Work, asked: float) -> Made | None:
    """None where the method has no such point."""
    started = time.perf_counter()
    try:
        reached = peers.METHODS[name](work, asked)
    except peers.OutOfReachError as error:
        print(error, file=sys.stderr)
        return None
    return Made(
        name, reached.note, reached.flops, partial(work.answer, reached), time.perf_counter() - started
    )


# --- showing ------------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for each model and scope."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.name, row.scope), []).append(row)
    return [show(group) for group in groups.values()]


def show(rows: Sequence[Row]) -> Table:
    first = rows[0]
    embeds = any(row.neighbours is not None for row in rows)
    made = table(
        f"frontier: {first.name}, {first.scope} layers ({first.metric}; the original: {first.before:.4f})",
        [*(["text"] if embeds else []), "method", "how"],
        [
            "asked",
            "FLOPs",
            first.metric,
            *(["neighbours kept"] if embeds else []),
            "worse than the original",
            "allowed",
            "beyond ours",
        ],
    )
    for row in rows:
        made.add_row(
            *([row.data] if embeds else []),
            row.method,
            row.note,
            f"{row.asked:g}",
            f"{row.flops:.4f}",
            f"{row.after:.4f}",
            *([f"{row.neighbours:.3f}"] if row.neighbours is not None else []),
            span(row.worse),
            "" if row.allowed is None else f"{row.allowed:.4f}",
            "" if row.beyond is None else span(row.beyond),
        )
    return made


def span(values: Interval) -> str:
    mean, low, high = values
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


SECTION = Section("task metric against FLOPs, beside other methods", measure, tables)


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(sorted({case.name for case in CASES})))
@click.option("--quick", is_flag=True, help="Digits alone, against unit pruning.")
@click.option("--peers-only", is_flag=True, help="Without the compiler.")
@click.option("--against", multiple=True, type=click.Choice(list(peers.METHODS)), help="These methods alone.")
def main(names: tuple[str, ...], quick: bool, peers_only: bool, against: tuple[str, ...]) -> None:
    """Measure the named models, or all of them."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    for made in tables(measure(quick, names, not peers_only, against)):
        console.print(made)


if __name__ == "__main__":
    main()
