"""The cost model against the measurements that it was fitted to (docs/benchmarks.md has new ones)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_decomp.cost import CostModel, cpu, cuda

SIZES = st.integers(8, 512).map(lambda n: 8 * n)


@pytest.mark.parametrize(
    ("T", "K", "N", "G", "measured"),
    [  # section 1: median speed-ups of the split form, and those of 4096 x 4096
        (16, 1024, 1024, 4, 3.6),
        (128, 1024, 1024, 2, 1.9),
        (128, 1024, 1024, 8, 5.5),
        (512, 1024, 1024, 8, 5.3),
        (128, 4096, 4096, 8, 7.4),
        (512, 4096, 4096, 16, 12.4),
    ],
)
def test_the_split_form_on_cpu(T: int, K: int, N: int, G: int, measured: float) -> None:
    found = cpu().dense(T, K, N) / cpu().parallel(T, [(K // G, N // G)] * G)
    assert found == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize(("T", "G", "measured"), [(16, 2, 0.89), (128, 4, 2.9), (512, 8, 5.3)])
def test_the_batched_form_on_cpu(T: int, G: int, measured: float) -> None:
    found = cpu().dense(T, 1024, 1024) / cpu().batched(T, G, 1024 // G, 1024 // G)
    assert found == pytest.approx(measured, rel=0.3)


@pytest.mark.parametrize(("T", "G", "measured"), [(128, 2, 2.2), (128, 4, 4.1), (512, 8, 6.7), (16, 4, 4.3)])
def test_chains_on_cpu(T: int, G: int, measured: float) -> None:
    dense = cpu().dense(T, 768, 3072) + cpu().dense(T, 3072, 768)
    layers = [[(768 // G, 3072 // G)] * G, [(3072 // G, 768 // G)] * G]
    assert dense / cpu().chain(T, layers) == pytest.approx(measured, rel=0.25)


def test_a_gather_of_columns_costs_as_much_as_a_small_dense_layer() -> None:
    assert cpu().gather(512, 1024, 1) == pytest.approx(cpu().dense(512, 1024, 165), rel=0.2)
    assert cpu().gather(512, 1024, 64) < 0.35 * cpu().gather(512, 1024, 1)


@pytest.mark.parametrize(
    ("K", "T", "microseconds"), [(1024, 1, 10), (1024, 4096, 18), (4096, 1, 14), (4096, 4096, 229)]
)
def test_dense_layers_on_the_roofline(K: int, T: int, microseconds: float) -> None:
    assert cuda().dense(T, K, K) == pytest.approx(microseconds, rel=0.15)


def test_gpus_prefer_one_batched_product() -> None:
    assert cuda().batched(128, 4, 256, 256) < cuda().parallel(128, [(256, 256)] * 4)
    assert cuda().batched(128, 4, 256, 256) >= cuda().dense(
        128, 1024, 1024
    )  # nothing to gain on small layers


@pytest.mark.parametrize("cost", [cpu(), cuda()])
@given(T=st.integers(1, 4096), K=SIZES, N=SIZES)
def test_times_grow_with_sizes(cost: CostModel, T: int, K: int, N: int) -> None:
    assert 0 < cost.dense(T, K, N) <= cost.dense(T, K, 2 * N) <= cost.dense(T, 2 * K, 2 * N)
    assert cost.parallel(T, [(K, N)] * 2) <= cost.parallel(T, [(K, N), (2 * K, N)])
    assert cost.batched(T, 2, K, N) <= cost.batched(T, 4, K, N)
    assert cost.gather(T, K, 1) >= cost.gather(T, K, 32)
