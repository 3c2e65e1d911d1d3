"""What goes for nothing: dead, constant, unread and copied units, removed at an error under 1e-6."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from onnx_decomp.compiler import compile_file
from onnx_decomp.options import Options
from onnx_decomp.passes.exact import CONSTANT, UNREAD, fold_units, prove
from onnx_decomp.passes.moments import accumulate
from onnx_decomp.sites import Affine
from tests.small import model, value

Floats = NDArray[np.float32]
K, H, N = 24, 96, 12


def network(rng: np.random.Generator) -> dict[str, Floats]:
    """x [K] -> relu -> y [N]: units 0-7 never fire, 8-15 have no inputs, 16-23 are not read, 24-39 copy 40-55."""
    w1, b1 = rng.standard_normal((K, H)).astype(np.float32), rng.standard_normal(H).astype(np.float32)
    w2, b2 = rng.standard_normal((H, N)).astype(np.float32), rng.standard_normal(N).astype(np.float32)
    b1[:8] = -1000
    w1[:, 8:16] = 0
    b1[8:16] = np.abs(b1[8:16])
    w2[16:24] = 0
    w1[:, 24:40], b1[24:40] = w1[:, 40:56], b1[40:56]
    return {"w1": w1, "b1": b1, "w2": w2, "b2": b2}


def saved(folder: Path, weights: dict[str, Floats], scale: float = 1.0) -> Path:
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["a"], name="relu"),
        helper.make_node("Gemm", ["a", "w2", "b2"], ["y"], name="second"),
    ]
    proto = model(nodes, [value("x", ["n", K])], [value("y", ["n", N])], dict(weights))
    onnx.save(proto, folder / "in.onnx")
    x = scale * np.random.default_rng(5).standard_normal((600, K)).astype(np.float32)
    np.savez(folder / "calib.npz", x=x)
    return folder / "in.onnx"


def compiled(path: Path, **options: Any) -> dict[str, Any]:
    told = Options(provider="cpu", latency_gate=False, objective="flops", **options)
    return compile_file(path, path.with_name("out.onnx"), told).report


def test_what_never_matters_goes_at_a_tolerance_of_a_millionth(tmp_path: Path) -> None:
    path = saved(tmp_path, network(np.random.default_rng(0)))
    report = compiled(path, calib=tmp_path / "calib.npz", tolerance=2e-6)
    assert [site["decision"] for site in report["sites"]] == ["reduced", "reduced"]
    assert report["sites"][0]["flop_ratio"] == (H - 40) / H
    assert report["verify"]["outputs"]["y"]["rel_l2"] < 1e-6


def test_without_data_only_what_the_weights_prove(tmp_path: Path) -> None:
    """Units that never fire on made-up inputs stay; those without inputs, those not read, and copies go."""
    path = saved(tmp_path, network(np.random.default_rng(0)))
    report = compiled(path)
    assert report["sites"][0]["flop_ratio"] == (H - 32) / H
    assert report["verify"]["outputs"]["y"]["rel_l2"] < 1e-6


def test_what_moves_on_held_back_samples_stays(tmp_path: Path) -> None:
    """Units that fire on one sample in fifty: never on few fitted ones maybe, but held-back ones show them."""
    weights = network(np.random.default_rng(1))
    weights["b1"][:8] = -2.2 * np.linalg.norm(weights["w1"][:, :8], axis=0)
    path = saved(tmp_path, weights)
    report = compiled(path, calib=tmp_path / "calib.npz", tolerance=2e-6)
    assert report["sites"][0]["flop_ratio"] >= (H - 32) / H
    assert report["verify"] is None or report["verify"]["outputs"]["y"]["rel_l2"] <= 2e-6


def test_folding_is_exact_for_scaled_and_shifted_copies() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((500, 6))
    x[:, 3] = 2.5 * x[:, 1] - 4
    x[:, 4] = 7.0
    readers = [Affine(rng.standard_normal((6, 3)).astype(np.float32), None) for _ in range(2)]
    readers[0].weight[5] = readers[1].weight[5] = 0
    folding = fold_units(accumulate([(x, x[:, :1])]), readers)
    assert folding.onto.tolist() == [0, 1, 2, 1, CONSTANT, UNREAD]
    for reader in readers:
        folded = folding.apply(reader)
        assert folded.bias is not None
        np.testing.assert_allclose(x @ folded.weight + folded.bias, x @ reader.weight, atol=1e-5)
        assert not folded.weight[3:].any()


@pytest.mark.parametrize("alike", [True, False])
def test_weights_prove_copies_only_where_units_are_treated_alike(alike: bool) -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((4, 5)).astype(np.float32)
    weight[:, 3] = weight[:, 0]
    weight[:, 2] = 0
    found = prove([Affine(weight, np.zeros(5, np.float32))], alike)
    assert found.constant.tolist() == [False, False, True, False, False]
    assert found.twin.tolist() == ([0, 1, 2, 0, 4] if alike else [0, 1, 2, 3, 4])


def test_a_unit_that_is_not_read_stands_for_no_copy() -> None:
    """Without data: unit 1 copies unit 0, which nothing reads; what reads unit 1 must still get it."""
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((4, 3)).astype(np.float32)
    weight[:, 1] = weight[:, 0]
    x = rng.standard_normal((50, 4)) @ weight
    reader = Affine(rng.standard_normal((3, 2)).astype(np.float32), None)
    reader.weight[0] = 0
    folding = fold_units(accumulate([(x, x)]), [reader], prove([Affine(weight, None)], alike=True))
    folded = folding.apply(reader)
    assert folded.bias is not None
    np.testing.assert_allclose(x @ folded.weight + folded.bias, x @ reader.weight, atol=1e-5)
    assert folding.onto.tolist() == [UNREAD, 1, 2]
