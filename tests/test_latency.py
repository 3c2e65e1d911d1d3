"""The latency gate: right on plain differences, and steady when the machine is not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from onnx_decomp import latency
from onnx_decomp.latency import compare
from onnx_decomp.runtime import RunError, cuda_problem, open_session
from tests.small import mlp, model, value

FEEDS = {"x": np.ones((32, 512), np.float32)}


def test_a_smaller_model_is_faster() -> None:
    relu = model([helper.make_node("Relu", ["x"], ["y"])], [value("x", ["N", 512])], [value("y", ["N", 512])])
    before, after = (open_session(proto, threads=1) for proto in (mlp(512), relu))
    found = compare(before, after, FEEDS, seconds=0.2, seed=1)
    assert 2 < found.interval[0] <= found.speedup <= found.interval[1]
    assert (found.provider, found.threads, found.samples) == ("cpu", 1, 32)
    assert found.rounds >= 20
    assert found.before_ms > found.after_ms > 0


def test_a_model_that_fails_is_an_error() -> None:
    with pytest.raises(RunError, match="fails to run"):
        compare(open_session(mlp(512)), open_session(mlp(64)), FEEDS)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.5, 4.0))
def test_the_median_of_ratios_survives_a_noisy_machine(seed: int, truth: float) -> None:
    """Slow drift hits both models of a round; spikes hit one in ten."""
    rng = np.random.default_rng(seed)
    drift = np.exp(np.cumsum(0.1 * rng.standard_normal(200)))[:, None]
    spikes = np.where(rng.random((200, 2)) < 0.1, 20.0, 1.0)
    noise = np.exp(0.03 * rng.standard_normal((200, 2)))
    times = drift * spikes * noise * np.array([truth, 1.0])
    speedup, (low, high) = latency._median_ratio(times, seed)
    assert low <= speedup <= high
    assert low * 0.98 <= truth <= high * 1.02
    assert latency._median_ratio(times, seed) == (speedup, (low, high))


def test_rounds_alternate_who_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(latency, "_timed", lambda run, _: run() or 1.0)
    runs = [lambda: called.append("a"), lambda: called.append("b")]
    latency._rounds(runs, 1, seconds=0, min_rounds=4)
    assert "".join(called) == "abbaabba"


def test_short_runs_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 1000)  # every look at the clock costs a microsecond
    monkeypatch.setattr(latency.time, "perf_counter_ns", lambda: next(clock))
    session = open_session(mlp(), threads=1)
    found = compare(session, session, {"x": np.ones((1, 6), np.float32)}, seconds=0, min_rounds=3)
    assert found.rounds == 3
    assert found.speedup == 1
    assert found.before_ms * 200 == pytest.approx(1e-3, rel=0.01)  # 200 runs shared one microsecond


@pytest.mark.cuda
@pytest.mark.skipif(cuda_problem() is not None, reason="no CUDA here")
def test_cuda_times_runs_on_the_device() -> None:
    before, after = (open_session(mlp(64), provider="cuda") for _ in range(2))
    found = compare(before, after, {"x": np.ones((8, 64), np.float32)}, seconds=0.2)
    assert found.provider == "cuda"
    assert 0.3 < found.speedup < 3
