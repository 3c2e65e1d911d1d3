"""Which of two models is faster here, on a machine that other programs use too.

The two run in turns, so that both see the same noise; each turn gives one ratio, and the median of the ratios
with its bootstrap interval is the answer. The times themselves are only shown.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_decomp.runtime import Arrays, Session

MIN_TIMING = 200e-6
"""Seconds that one timing lasts at least: shorter ones are repeated and timed together."""

MAX_ROUNDS = 2000
RESAMPLES = 1000


@dataclass(frozen=True)
class Latency:
    """Two models compared on runs of `samples` samples.

    before_ms, after_ms: median milliseconds of a run. speedup: median over `rounds` of before / after;
    interval: its 95 %. threads: of one operator, None for ONNX Runtime's default.
    """

    provider: str
    threads: int | None
    before_ms: float
    after_ms: float
    speedup: float
    interval: tuple[float, float]
    rounds: int
    samples: int


def compare(
    before: Session,
    after: Session,
    feeds: Arrays,
    *,
    seconds: float = 2.0,
    min_rounds: int = 20,
    seed: int = 0,
) -> Latency:
    """Time both models on the same feeds for about `seconds`, and for `min_rounds` at least.

    Raises RunError where either fails to run.
    """
    runs = [session.bound(feeds) for session in (before, after)]
    repeats = max(1, math.ceil(MIN_TIMING / min(_warm_up(run) for run in runs)))
    times = _rounds(runs, repeats, seconds, min_rounds)
    speedup, interval = _median_ratio(times, seed)
    before_ms, after_ms = (float(np.median(column)) * 1e3 for column in times.T)
    samples = max((len(array) for array in feeds.values()), default=0)
    provider, threads = before.provider, before.threads
    return Latency(provider, threads, before_ms, after_ms, speedup, interval, len(times), samples)


def _warm_up(run: Callable[[], object]) -> float:
    """Seconds of one run once caches and allocators are warm."""
    return min(_timed(run, 1) for _ in range(5))


def _timed(run: Callable[[], object], repeats: int) -> float:
    """Seconds of one run, averaged over `repeats`."""
    start = time.perf_counter_ns()
    for _ in range(repeats):
        run()
    return (time.perf_counter_ns() - start) / 1e9 / repeats


def _rounds(
    runs: list[Callable[[], object]], repeats: int, seconds: float, min_rounds: int
) -> NDArray[np.float64]:
    """Seconds of one run, [rounds, 2]. The order alternates, A B B A, so that neither always comes second."""
    end = time.monotonic() + seconds
    times: list[list[float]] = []
    while len(times) < min_rounds or (time.monotonic() < end and len(times) < MAX_ROUNDS):
        order = (0, 1) if len(times) % 2 == 0 else (1, 0)
        measured = {index: _timed(runs[index], repeats) for index in order}
        times.append([measured[0], measured[1]])
    return np.array(times)


def _median_ratio(times: NDArray[np.float64], seed: int) -> tuple[float, tuple[float, float]]:
    """Median of before / after over the rounds [rounds, 2], and its 95 % bootstrap interval."""
    ratios = times[:, 0] / times[:, 1]
    redrawn = np.median(np.random.default_rng(seed).choice(ratios, (RESAMPLES, len(ratios))), axis=1)
    low, high = np.quantile(redrawn, (0.025, 0.975))
    return float(np.median(ratios)), (float(low), float(high))
