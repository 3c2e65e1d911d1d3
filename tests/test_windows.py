"""Blocks that overlap: found in what is exactly zero or frozen, written with a copy of what several blocks read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnx_decomp import model_io
from onnx_decomp.compiler import compile_file
from onnx_decomp.frontiers import trace_frontier
from onnx_decomp.options import Options
from onnx_decomp.passes.windows import find_windows
from onnx_decomp.runtime import open_session

WIDTHS = (192, 256, 128)


def windows_of(inputs: int, outputs: int, groups: int, beyond: int) -> NDArray[np.bool_]:
    """[inputs, outputs]: each group of outputs reads its own run of inputs, and some on either side of it."""
    at = np.arange(inputs)[:, None]
    own = np.arange(outputs) * groups // outputs
    first, last = own * inputs // groups, (own + 1) * inputs // groups
    return (at >= first - beyond) & (at < last + beyond)


def network(layers: int, seed: int = 0) -> onnx.ModelProto:
    """Four overlapping windows, with four plain blocks behind them if there are two layers."""
    rng = np.random.default_rng(seed)
    widths = WIDTHS[: layers + 1]
    nodes, stored, last = [], [], "x"
    for at, (k, n) in enumerate(pairwise(widths)):
        mask = windows_of(k, n, 4, 12 if at == 0 else 0)
        weight = np.where(mask, rng.standard_normal((k, n)) / np.sqrt(mask.sum(0)), 0.0)
        stored += [
            numpy_helper.from_array(weight.astype(np.float32), f"w{at}"),
            numpy_helper.from_array(rng.standard_normal(n).astype(np.float32), f"b{at}"),
        ]
        made = "y" if at == layers - 1 else f"h{at}"
        nodes.append(helper.make_node("Gemm", [last, f"w{at}", f"b{at}"], [made], name=f"layer{at}"))
        last = made
        if made != "y":
            nodes.append(helper.make_node("Relu", [made], [f"a{at}"], name=f"relu{at}"))
            last = f"a{at}"
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", widths[0]])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", widths[-1]])
    graph = helper.make_graph(nodes, "windows", [x], [y], stored)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("data", [True, False])
def test_overlapping_blocks_are_found_and_written(layers: int, data: bool, tmp_path: Path) -> None:
    model, out = network(layers), tmp_path / "out.onnx"
    onnx.save(model, tmp_path / "in.onnx")
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "calib.npz", x=rng.standard_normal((2000, WIDTHS[0])).astype(np.float32))
    options = Options(
        calib=tmp_path / "calib.npz" if data else None,
        tolerance=1e-4,
        provider="cpu",
        objective="flops",
        latency_gate=False,
    )
    report = compile_file(tmp_path / "in.onnx", out, options).report
    first = report["sites"][0]
    assert (first["decision"], len(first["structure"]["blocks"])) == ("split", 4)
    assert first["flop_ratio"] == windows_of(*WIDTHS[:2], 4, 12).mean()
    rows = [set(block["rows"]) for block in first["structure"]["blocks"]]
    assert rows == [set(range(max(g * 48 - 12, 0), min(g * 48 + 60, 192))) for g in range(4)]
    assert not [node for node in onnx.load(out).graph.node if node.op_type == "Gather" and "out" in node.name]
    x = rng.standard_normal((50, WIDTHS[0])).astype(np.float32)
    before, after = (open_session(each).run({"x": x})["y"] for each in (model, onnx.load(out)))
    # A refit of what is exact already moves it by the noise of the moments.
    assert np.linalg.norm(after - before) < (2e-5 if data else 1e-6) * np.linalg.norm(before)


def test_a_snapshot_tells_which_weights_were_frozen(tmp_path: Path) -> None:
    """Masked training without decay: outside of the windows lies what was there before."""
    rng = np.random.default_rng(2)
    start = (rng.standard_normal((192, 256)) / 14).astype(np.float32)
    mask = windows_of(192, 256, 4, 12)
    trained = np.where(mask, start + rng.standard_normal(start.shape) / 14, start * np.float32(1e-5))
    model = network(1)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(trained.astype(np.float32), "w0"))
    onnx.save(model, tmp_path / "in.onnx")
    np.savez(tmp_path / "init.npz", w0=start)
    np.savez(tmp_path / "calib.npz", x=rng.standard_normal((2000, 192)).astype(np.float32))
    options = Options(
        init=tmp_path / "init.npz",
        calib=tmp_path / "calib.npz",
        provider="cpu",
        objective="flops",
        latency_gate=False,
    )
    (site,) = compile_file(tmp_path / "in.onnx", tmp_path / "out.onnx", options).report["sites"]
    assert (site["decision"], site["flop_ratio"]) == ("split", mask.mean())


@pytest.mark.parametrize("density", [0.2, 0.4, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_scattered_zeros_are_no_windows(density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = find_windows(rng.random((256, 192)) < density, np.ones(256, np.intp))
    if found is not None:  # a set of rows that nobody reads is left out even so
        sizes = np.bincount(found.of, minlength=len(found.members))
        assert found.members.sum(1) @ sizes > 0.85 * 256 * 192


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_nothing_that_is_read_is_left_out(data: st.DataObject) -> None:
    """Whatever is merged, each component's group reads all that it reads; order does not matter."""
    seed = data.draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    groups, inputs, outputs = (
        data.draw(st.integers(2, 5)),
        data.draw(st.integers(8, 60)),
        data.draw(st.integers(8, 60)),
    )
    support = windows_of(inputs, outputs, groups, data.draw(st.integers(0, 4))).T
    support &= rng.random(support.shape) < data.draw(st.sampled_from([0.6, 1.0]))
    order = rng.permutation(outputs)
    width = rng.integers(1, 4, outputs)
    found, again = find_windows(support, width), find_windows(support[order], width[order])
    assert (found is None) == (again is None)
    if found is None or again is None:
        return
    assert not (support & ~found.members[found.of]).any()
    costs = [
        float(each.members.sum(1) @ np.bincount(each.of, w))
        for each, w in ((found, width), (again, width[order]))
    ]
    assert costs[0] == costs[1]
    assert costs[0] < width.sum() * inputs


def test_one_pattern_or_too_many_are_none() -> None:
    assert find_windows(np.ones((8, 8), bool), np.ones(8, np.intp)) is None
    assert find_windows(np.array([[1, 0, 1, 0]] * 5, bool), np.ones(5, np.intp)) is None


def test_a_frontier_of_overlapping_blocks(tmp_path: Path) -> None:
    """Nothing stands beside blocks that share inputs: found by fuzzing."""
    onnx.save(network(2), tmp_path / "in.onnx")
    np.savez(
        tmp_path / "x.npz", x=np.random.default_rng(3).standard_normal((400, WIDTHS[0])).astype(np.float32)
    )
    options = Options(calib=tmp_path / "x.npz", provider="cpu", objective="flops")
    found = trace_frontier(model_io.load(tmp_path / "in.onnx"), options, (0.4,))
    (point,) = [each for each in found.points if each.method == "plan" and each.asked == 0.4]
    assert point.cost <= 0.4
    assert point.change < 1e-3
