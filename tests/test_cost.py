"""The cost model against the measurements that it was fitted to (docs/benchmarks.md has new ones)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_decomp import calibrating
from onnx_decomp.cost import CPU, SCHEMA, CostModel, cpu, cuda, model_for
from onnx_decomp.errors import InputError
from onnx_decomp.passes.layouts import Layout
from onnx_decomp.passes.pricing import region_time
from tests.test_splitting import index_of, only_region

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
    found = cpu().dense(T, K, N) / cpu().chain(T, even(K, N, G=G))
    assert found == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize(("T", "G", "measured"), [(16, 2, 0.89), (128, 4, 2.9), (512, 8, 5.3)])
def test_the_batched_form_on_cpu(T: int, G: int, measured: float) -> None:
    found = cpu().dense(T, 1024, 1024) / cpu().batched(T, even(1024, 1024, G=G))
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


def even(*widths: int, G: int) -> list[list[tuple[int, int]]]:
    """Layers of G equal blocks between these widths."""
    return [[(k // G, n // G)] * G for k, n in pairwise(widths)]


@pytest.mark.parametrize(
    ("widths", "T", "speedups"),
    [
        ((4096, 4096), 4096, (1.5, 2.4, 3.2)),
        ((4096, 16384, 4096), 4096, (1.8, 3.0, 4.6)),
        ((4096, 16384, 4096), 128, (1.5, 2.2, 2.9)),
        ((4096, 16384, 4096), 1, (1.7, 2.7, 3.5)),
    ],
)
def test_batched_chains_on_the_roofline(widths: Sequence[int], T: int, speedups: Sequence[float]) -> None:
    """Estimates made apart from the model, for 2, 4 and 8 blocks; a single row needs no Transposes."""
    dense = sum(cuda().dense(T, k, n) for k, n in pairwise(widths))
    found = [dense / cuda().batched(T, even(*widths, G=G), one_row=T == 1) for G in (2, 4, 8)]
    assert found == pytest.approx(speedups, rel=0.12)


def test_a_layer_more_in_a_batched_chain_moves_nothing_back() -> None:
    """What one layer more adds to a chain, against a dense layer: estimates for 4096 x 4096 at 4096 tokens."""
    found = []
    for G in (2, 4, 8):
        one, two = (cuda().batched(4096, even(*[4096] * count, G=G)) for count in (2, 3))
        found.append(cuda().dense(4096, 4096, 4096) / (two - one))
    assert found == pytest.approx((1.85, 3.2, 5.1), rel=0.1)


@pytest.mark.parametrize(("T", "G", "measured"), [(128, 2, 1.8), (128, 4, 3.3), (128, 8, 5.6), (512, 4, 3.7)])
def test_batched_chains_on_cpu(T: int, G: int, measured: float) -> None:
    dense = cpu().dense(T, 768, 3072) + cpu().dense(T, 3072, 768)
    assert dense / cpu().batched(T, even(768, 3072, 768, G=G)) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("cost", [cpu(), cuda()])
def test_one_row_needs_no_transposes(cost: CostModel) -> None:
    layers = even(768, 3072, 768, G=4)
    assert cost.batched(1, layers, one_row=True) < cost.batched(1, layers)


def test_gpus_prefer_one_batched_product() -> None:
    layers = even(1024, 1024, G=4)
    assert cuda().batched(128, layers) < cuda().chain(128, layers)
    assert cuda().batched(128, layers) >= cuda().dense(128, 1024, 1024)  # nothing to gain on small layers


@pytest.mark.parametrize("cost", [cpu(), cuda()])
@given(T=st.integers(1, 4096), K=SIZES, N=SIZES)
def test_times_grow_with_sizes(cost: CostModel, T: int, K: int, N: int) -> None:
    assert 0 < cost.dense(T, K, N) <= cost.dense(T, K, 2 * N) <= cost.dense(T, 2 * K, 2 * N)
    assert cost.chain(T, [[(K, N)] * 2]) <= cost.chain(T, [[(K, N), (2 * K, N)]])
    assert cost.batched(T, [[(K, N)] * 2]) <= cost.batched(T, [[(K, N)] * 4])
    assert cost.gather(T, K, 1) >= cost.gather(T, K, 32)


# --- tables -------------------------------------------------------------------------------------------------------


def test_a_table_of_the_user_is_used(tmp_path: Path) -> None:
    told = {"flops": 1e3, "node": 1.0, "copy": 1e-3, "stream": 1e4, "column": 1e-3}
    path = tmp_path / "cost.json"
    path.write_text(json.dumps({"schema": SCHEMA, "provider": "cpu", "tables": {"float32": told}}), "utf-8")
    assert model_for("cpu", "float32", path) == CPU(**told)
    assert model_for("cpu", "float16", path) == CPU(**told), "a type without a table takes the first"
    assert model_for("cpu") != CPU(**told)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a readable JSON file"),
        ("[]", "not a cost table"),
        ('{"schema": "onnx-decomp-cost/1", "provider": "cuda"}', "a table of 'cuda', the model is for 'cpu'"),
        (
            '{"schema": "onnx-decomp-cost/1", "provider": "cpu", "tables": {}}',
            "numbers above 0 for column, copy",
        ),
        (
            '{"schema": "onnx-decomp-cost/1", "provider": "cpu", "tables": {"float32": {"flops": 1}}}',
            "above 0",
        ),
        (
            '{"schema": "onnx-decomp-cost/1", "provider": "cpu", "tables": {"float32":'
            ' {"flops": -1, "node": 1, "copy": 1, "stream": 1, "column": NaN}}}',
            "above 0",
        ),
    ],
)
def test_files_that_are_no_table(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text(text, "utf-8")
    with pytest.raises(InputError, match=message):
        model_for("cpu", "float32", path)


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_every_type_has_a_model(provider: str, dtype: str) -> None:
    assert model_for(provider, dtype).dense(128, 1024, 1024) > 0


def test_a_fit_finds_the_parameters_that_made_the_times() -> None:
    """Times that a model of another machine predicts, some of them wrong by half."""
    truth, rng = CPU(flops=3e5, node=1.0, copy=2e-4, stream=4e4, column=6e-4), np.random.default_rng(0)
    cases = []
    for widths in calibrating.WIDTHS:
        region = only_region(index_of(calibrating.network(widths, "float32")))
        for blocks, segment in calibrating._segments(region, False):
            for rows in calibrating.ROWS["cpu"]:
                layout = Layout.of(region, (segment,))
                time = region_time(truth, rows, layout) * np.exp(0.05 * rng.standard_normal())
                wrong = 1.5 if rng.random() < 0.05 else 1.0
                cases.append(calibrating.Case(widths, blocks, segment.form, rows, layout, time * wrong))
    found = calibrating.fit(cpu(), cases)
    for name in ("flops", "node", "copy", "stream", "column"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.25), name
    assert np.median(calibrating.errors(found, cases)) < 0.06


def test_calibrating_this_machine() -> None:
    found = calibrating.calibrate("cpu", "float32", 1, quick=True)
    assert {case["form"] for case in found["cases"]} == {"dense", "parallel", "batched"}
    assert found["median_error"]["after"] < 1.0
    assert set(found["tables"]) == {"float32"}
    assert all(value > 0 for value in found["tables"]["float32"].values())


def test_recorded_kernels_cost_less() -> None:
    """Small blocks that don't pay one by one may do so in a CUDA graph; on the CPU there is no such thing."""
    layers = [[(1024, 1024)] * 4, [(1024, 1024)] * 4]
    model = model_for("cuda", "float16")
    gains = [each.dense(1, 4096, 4096) * 2 / each.batched(1, layers) for each in (model, model.in_graph())]
    assert gains[0] < gains[1]
    assert model_for("cpu").in_graph() == model_for("cpu")
