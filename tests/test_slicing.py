"""Independent parts that only the function shows: found, sliced, refitted; and refused where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

import models
from onnx_decomp import calibration, model_io
from onnx_decomp.axes import find_regions
from onnx_decomp.compiler import compile_file
from onnx_decomp.options import Options
from onnx_decomp.passes.slicing import Slicing
from onnx_decomp.program import Program, Structure
from onnx_decomp.runtime import open_session
from onnx_decomp.sites import GraphIndex, find_sites
from tests.small import model, value

Floats = NDArray[np.float32]


def mixed(parts: int, inputs: int, hidden: int, outputs: int, shared: int, seed: int) -> onnx.ModelProto:
    """y = x A R R^-1 B: independent parts in A B, every weight of A R and of R^-1 B dense.

    The first `shared` inputs are read by every part; the inputs of each part follow, one part after another.
    """
    rng = np.random.default_rng(seed)
    A = np.zeros((shared + parts * inputs, parts * hidden))
    B = np.zeros((parts * hidden, parts * outputs))
    for part in range(parts):
        units = slice(part * hidden, (part + 1) * hidden)
        own = slice(shared + part * inputs, shared + (part + 1) * inputs)
        A[:shared, units] = rng.standard_normal((shared, hidden))
        A[own, units] = rng.standard_normal((inputs, hidden))
        B[units, part * outputs : (part + 1) * outputs] = rng.standard_normal((hidden, outputs))
    rotation = np.linalg.qr(rng.standard_normal((parts * hidden, parts * hidden)))[0]
    weights = {"w1": (A @ rotation).astype(np.float32), "w2": (rotation.T @ B).astype(np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="first"),
        helper.make_node("MatMul", ["h", "w2"], ["y"], name="second"),
    ]
    return model(nodes, [value("x", ["n", len(A)])], [value("y", ["n", B.shape[1]])], weights)


def compiled(proto: onnx.ModelProto, folder: Path, tolerance: float = 1e-4) -> dict[str, Any]:
    onnx.save(proto, folder / "in.onnx")
    width = proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    np.savez(
        folder / "calib.npz", x=np.random.default_rng(9).standard_normal((900, width)).astype(np.float32)
    )
    told = Options(
        calib=folder / "calib.npz", tolerance=tolerance, provider="cpu", latency_gate=False, objective="flops"
    )
    return compile_file(folder / "in.onnx", folder / "out.onnx", told).report


def test_parts_hidden_in_dense_weights_become_branches(tmp_path: Path) -> None:
    report = compiled(mixed(3, 24, 24, 8, shared=0, seed=0), tmp_path)
    assert [site["decision"] for site in report["sites"]] == ["split", "split"]
    first, second = (site["structure"] for site in report["sites"])
    assert first["kind"] == second["kind"] == "influence"
    assert [block["rows"] for block in first["blocks"]] == [
        list(range(p * 24, p * 24 + 24)) for p in range(3)
    ]
    assert [block["cols"] for block in second["blocks"]] == [list(range(p * 8, p * 8 + 8)) for p in range(3)]
    assert report["verify"]["outputs"]["y"]["rel_l2"] < 1e-4
    assert report["output"]["matmul_flops"] < 0.45 * report["input"]["matmul_flops"]
    written = onnx.load(tmp_path / "out.onnx")
    operators = [node.op_type for node in written.graph.node]
    assert (operators[0], operators[-1]) == ("Split", "Concat")
    assert set(operators[1:-1]) <= {"MatMul", "Gemm"}
    assert len(operators) == 8


def test_shared_inputs_are_read_by_every_branch(tmp_path: Path) -> None:
    report = compiled(mixed(3, 24, 40, 8, shared=8, seed=1), tmp_path)
    blocks = report["sites"][0]["structure"]["blocks"]
    for part, block in enumerate(blocks):
        assert block["rows"] == [*range(8), *range(8 + part * 24, 32 + part * 24)]
    assert report["sites"][0]["decision"] == "split"
    assert report["verify"]["passed"]


def test_one_part_has_no_parts(tmp_path: Path) -> None:
    report = compiled(mixed(1, 72, 72, 24, shared=0, seed=2), tmp_path)
    for site in report["sites"]:
        assert site["structure"] is None
        assert "influence-everywhere" in {d["reason"] for d in site["decisions"]}


def sliced(name: str, samples: int) -> Structure | None:
    """What the pass finds on a trained model, from so many calibration samples."""
    trained = models.load(name)
    source = model_io.load(trained.model)
    index = GraphIndex.build(source.proto, lambda tensor: model_io.read_tensor(source, tensor))
    sites = find_sites(index)
    data = calibration.load(trained.calib, source.proto, 0)
    program = Program(source, Options(calib=trained.calib), index, sites, find_regions(index, sites), data)
    Slicing(samples=samples).run(program)
    assert not program.slices or list(program.slices) == ["region_000"]
    return program.slices.get("region_000")


@pytest.mark.parametrize("name", ["dense", "dense-1", "dense-2", "deep-0", "deep-1", "deep-2"])
def test_tasks_trained_densely_are_parted_exactly_from_64_samples(name: str) -> None:
    found = sliced(f"towers/{name}", 64)
    assert found is not None
    assert found.blocks == 4
    outputs = found.grouping[-1]
    assert outputs.tolist() == np.repeat(np.arange(4), 10).tolist()
    for part in range(4):
        read = columns_of(found, part)
        own = (read // 64 == part).sum()
        assert own > 50, "all but constant pixels"
        assert len(read) - own <= 3, "few samples leave a doubt or two"


def columns_of(found: Structure, part: int) -> NDArray[np.intp]:
    """Input columns that a part reads."""
    group = next(iter(found.labels))
    elements = np.flatnonzero(found.labels[group] == part)
    return found.copies[group][elements] if group in found.copies else elements


def test_a_shared_digit_stays_with_every_task() -> None:
    found = sliced("shared", 256)
    meta = models.load("shared").meta
    assert found is not None
    assert found.blocks == len(meta["outputs"])
    for outputs, inputs in zip(meta["outputs"], meta["inputs"], strict=True):
        (part,) = set(found.grouping[-1][outputs].tolist())
        read = set(columns_of(found, part).tolist())
        assert read <= set(inputs)
        assert len(read) > 0.8 * len(inputs), "all but constant pixels"


@pytest.mark.parametrize("name", ["digits", "coupled", "frozen"])
def test_controls_are_refused(name: str) -> None:
    for samples in (64, 256):
        assert sliced(name, samples) is None


@pytest.mark.slow
def test_four_tasks_at_less_than_a_tenth_of_the_cost(tmp_path: Path) -> None:
    trained = models.load("towers/dense")
    told = Options(calib=trained.calib, tolerance=0.1, provider="cpu", latency_gate=False, objective="flops")
    report = compile_file(trained.model, tmp_path / "out.onnx", told).report
    assert report["output"]["matmul_flops"] <= 0.09 * report["input"]["matmul_flops"]
    held_back = dict(np.load(trained.report))
    target = held_back.pop("target")
    before, after = (
        models.metric(trained, next(iter(open_session(path).run(held_back).values())), target)
        for path in (trained.model, tmp_path / "out.onnx")
    )
    assert before - after <= 0.003
