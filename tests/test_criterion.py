"""Evidence against the initialization: nulls are recovered, wrong ones noticed, error rates at their level."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from models.planted import Planted, build
from onnx_decomp.init_stats import Law
from onnx_decomp.passes.criterion import (
    Criterion,
    distribution_evidence,
    estimated_evidence,
    find_atom,
    fit_snapshot,
    snapshot_evidence,
)
from onnx_decomp.passes.significance import block_pair_tests, holm, learned_rank, supported
from onnx_decomp.program import Program
from tests.recovery import evidence_of, false_discovery_proportion, law_of, null_rates

CLEAR = Planted(widths=(256, 320), blocks=4)

# What the null is


@pytest.mark.parametrize("decay", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("off", ["shrunk", "zero", "untouched"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_exact_shrink_and_frozen_entries(decay: float, off: Any, dtype: Any) -> None:
    planted = build(replace(CLEAR, decay=decay, off=off, dtype=dtype))
    (e,) = evidence_of(planted)
    expected = 1.0 if off == "untouched" else decay
    assert e.shrink == pytest.approx(expected, rel=1e-5 if dtype == "float32" else 2e-3)
    assert e.fits
    assert e.frozen is not None
    assert e.frozen[~planted.mask(0)].all()
    assert e.frozen[planted.mask(0)].mean() < 0.15
    assert e.misfit == 0.0


@pytest.mark.parametrize("decay", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("off", ["shrunk", "zero", "untouched"])
@pytest.mark.parametrize("blocks", [2, 8])
def test_shrink_and_jitter_are_estimated_together(decay: float, off: Any, blocks: int) -> None:
    """Half of the entries may have learned; those that have not may have shrunk by another factor."""
    planted = build(replace(CLEAR, decay=decay, off=off, blocks=blocks, jitter=0.3))
    (e,) = evidence_of(planted)
    kept = {"shrunk": decay, "zero": 0.0, "untouched": 1.0}[off]
    assert e.shrink == pytest.approx(kept, abs=0.03)
    assert e.scale == pytest.approx(0.3 * planted.spec.change(0), rel=0.05)
    assert e.z[~planted.mask(0)].std() == pytest.approx(1, rel=0.05)
    assert e.fits


def test_an_atom_needs_more_than_a_dense_region() -> None:
    rng = np.random.default_rng(0)
    w0 = rng.standard_normal(20_000)
    noise = w0 * 0.5 + 0.01 * rng.standard_normal(20_000)
    assert find_atom(noise, w0, 1.0) is None
    some = np.where(rng.random(20_000) < 0.05, 0.5 * w0, noise)
    assert find_atom(some, w0, 1.0) == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_a_snapshot_of_another_seed_does_not_fit(seed: int, decay: float) -> None:
    planted = build(replace(CLEAR, decay=decay, seed=seed))
    other = build(replace(CLEAR, seed=seed + 100))
    e = snapshot_evidence(planted.weights[0], other.initial[0])
    assert not e.fits


def test_a_network_that_moved_as_a_whole_still_fits_its_snapshot() -> None:
    (e,) = evidence_of(build(replace(CLEAR, structured=False, gain=3, unchanged=0)))
    assert e.fits
    assert e.supported < 0.01


@pytest.mark.parametrize("family", ["normal", "uniform"])
@pytest.mark.parametrize("decay", [1.0, 0.3, 0.05])
@pytest.mark.parametrize("gain", [1.5, 3.0])
@pytest.mark.parametrize("blocks", [2, 8])
def test_shrink_of_a_distribution(family: Any, decay: float, gain: float, blocks: int) -> None:
    planted = build(replace(CLEAR, family=family, decay=decay, gain=gain, blocks=blocks))
    (e,) = evidence_of(planted, "distribution")
    assert e.shrink == pytest.approx(decay, rel=0.03)
    assert e.z[~planted.mask(0)].std() == pytest.approx(1, rel=0.05)
    assert e.fits


@pytest.mark.parametrize("family", ["normal", "uniform"])
@pytest.mark.parametrize("blocks", [2, 8])
def test_a_wrong_distribution_does_not_fit(family: Any, blocks: int) -> None:
    planted = build(replace(CLEAR, widths=(384, 384), family=family, blocks=blocks))
    law = law_of(planted.spec)
    half = law.scaled(0.5)
    assert not distribution_evidence(planted.weights[0], half.normal_scores, half.std()).fits
    other = Law("normal", 0, law.std()) if family == "uniform" else Law("uniform", 0, law.std() * 3**0.5)
    assert not distribution_evidence(planted.weights[0], other.normal_scores, other.std()).fits


def test_a_scale_too_large_reads_as_weight_decay() -> None:
    """From the weights alone they are the same thing: c = 0.5, and the scores are right either way."""
    planted = build(replace(CLEAR, family="normal"))
    double = law_of(planted.spec).scaled(2)
    e = distribution_evidence(planted.weights[0], double.normal_scores, double.std())
    assert e.shrink == pytest.approx(0.5, rel=0.03)
    assert e.z[~planted.mask(0)].std() == pytest.approx(1, rel=0.05)


def test_untrained_weights_fit_and_support_nothing() -> None:
    for family in ("normal", "uniform"):
        untouched = build(replace(CLEAR, family=family, structured=False, gain=1.0, unchanged=0))
        (e,) = evidence_of(untouched, "distribution")
        assert (e.fits, e.shrink, e.learned_rank) == (True, 1.0, 0)
        assert e.supported < 0.001


def test_estimated_evidence_finds_the_central_mode() -> None:
    planted = build(replace(CLEAR, family="normal", gain=4))
    e = estimated_evidence(planted.weights[0])
    assert e.kind == "estimated"
    assert e.scale == pytest.approx(planted.spec.sigma(0), rel=0.05)


@pytest.mark.parametrize(
    ("W", "W0"),
    [
        (np.zeros((8, 8), np.float32), np.zeros((8, 8), np.float32)),
        (np.ones((8, 8), np.float32), np.zeros((8, 8), np.float32)),
        (np.ones((1, 3), np.float32), np.full((1, 3), 2, np.float32)),
        (np.eye(64, dtype=np.float32), np.zeros((64, 64), np.float32)),
        (np.eye(64, dtype=np.float32), np.eye(64, dtype=np.float32)[::-1] * np.float32(1e-44)),
        (np.eye(64, dtype=np.float32) * np.float32(1e-44), np.eye(64, dtype=np.float32)[::-1]),
        (np.eye(64, dtype=np.float32) * np.float32(1e-44), np.eye(64, dtype=np.float32) * np.float32(1e-44)),
    ],
)
@pytest.mark.filterwarnings("error")
def test_degenerate_weights_give_finite_evidence(W: NDArray[np.float32], W0: NDArray[np.float32]) -> None:
    for e in (snapshot_evidence(W, W0), estimated_evidence(W)):
        assert np.isfinite(e.z).all()
        assert np.isfinite([e.shrink, e.scale, e.misfit, e.supported]).all()


# Tests of the tests


@pytest.fixture(scope="module")
def noise() -> list[dict[str, NDArray[np.float64]]]:
    return [null_rates(seed) for seed in range(60)]


@pytest.mark.parametrize("kind", ["entries", "rows", "columns", "tiles", "block pairs"])
def test_p_values_are_uniform_under_the_null(kind: str, noise: list[dict[str, NDArray[np.float64]]]) -> None:
    p = np.concatenate([run[kind] for run in noise])
    slack = 0.03 if kind == "block pairs" else 0.0  # pairs share a pool: a little cautious
    assert stats.kstest(p, "uniform").statistic < 1.95 / np.sqrt(len(p)) + slack
    assert np.mean([holm(run[kind]).min() < 0.05 for run in noise]) <= 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / 60)


def test_false_discoveries_stay_at_their_level() -> None:
    proportions, power = np.transpose([false_discovery_proportion(seed) for seed in range(20)])
    assert proportions.mean() <= 0.05
    assert power.mean() > 0.4


@pytest.mark.slow
def test_error_rates_over_200_seeds() -> None:
    runs = [null_rates(seed) for seed in range(200)]
    for kind in runs[0]:
        assert np.mean([holm(run[kind]).min() < 0.05 for run in runs]) <= 0.05 + 2 * np.sqrt(
            0.05 * 0.95 / 200
        )
    assert np.mean([false_discovery_proportion(seed)[0] for seed in range(200)]) <= 0.05


def test_block_pairs_find_an_edge_whatever_the_scale_and_tails() -> None:
    rng = np.random.default_rng(0)
    rows, cols = (rng.integers(0, 4, n).astype(np.int32) for n in (200, 300))
    z = (2.5 * rng.standard_t(5, (200, 300))).astype(np.float32)
    assert block_pair_tests(z, rows, cols, 4).p.min() > 1e-3
    z[np.ix_(rows == 1, cols == 2)] *= 1.2
    p = block_pair_tests(z, rows, cols, 4).p
    assert np.unravel_index(p.argmin(), p.shape) == (1, 2)
    assert holm(p)[1, 2] < 1e-3


def test_holm_against_its_definition() -> None:
    p = np.array([[0.01, 0.04], [0.03, 0.005]])
    assert holm(p) == pytest.approx(np.array([[0.03, 0.06], [0.06, 0.02]]))


def test_learned_rank_counts_what_stands_out_of_noise() -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((300, 500)).astype(np.float32)
    assert learned_rank(noise) == 0
    assert learned_rank(noise.T.copy()) == 0
    left, right = rng.standard_normal((300, 7)), rng.standard_normal((7, 500))
    assert learned_rank((noise + left @ right).astype(np.float32)) == 7


def test_power_grows_with_the_change() -> None:
    shares = []
    for gain in (1.0, 1.5, 2.0, 4.0):
        planted = build(replace(CLEAR, gain=gain, jitter=0.2 if gain > 1 else 0, structured=gain > 1))
        shares.append(evidence_of(planted, "distribution")[0].supported)
    assert shares == sorted(shares)
    rng = np.random.default_rng(0)
    assert not supported(rng.random(1000)).all()


# The pass


def test_the_pass_declines_a_site_whose_null_does_not_fit() -> None:
    planted, other = build(CLEAR), build(replace(CLEAR, seed=9))
    sites = [SimpleNamespace(index=n, obstacle=o) for n, o in enumerate([None, None, "weight-type"])]
    nulls = {
        0: SimpleNamespace(kind="snapshot", initial=lambda: planted.initial[0]),
        1: SimpleNamespace(kind="snapshot", initial=lambda: other.initial[0]),
    }
    declined = []

    def decide(_where: str, site: Any, verdict: str, reason: str, **_numbers: float) -> None:
        declined.append((site.index, verdict, reason))

    program = SimpleNamespace(
        sites=sites,
        init=SimpleNamespace(nulls=nulls),
        options=SimpleNamespace(seed=0, jobs=1, scheduler=None),
        evidence={},
        affine=lambda _site: SimpleNamespace(weight=planted.weights[0]),
        decide=decide,
    )
    Criterion().run(cast(Program, program))
    assert set(program.evidence) == {0, 1}
    assert declined == [(1, "declined", "null-does-not-fit")]


def test_fit_is_deterministic() -> None:
    planted = build(replace(CLEAR, jitter=0.3))
    assert fit_snapshot(planted.weights[0], planted.initial[0]) == fit_snapshot(
        planted.weights[0], planted.initial[0]
    )
