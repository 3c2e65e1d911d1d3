"""Graphs as they are written, one text file for each form in tests/golden.

A change of emission shows here as a diff to read. After a change that was meant:

    UPDATE_GOLDEN=1 python -m pytest tests/test_golden.py

writes the files anew; look at `git diff tests/golden` before committing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.planted import Planted, PlantedModel, build, calibration
from onnx_decomp.axes import Region
from onnx_decomp.passes.folding import compose
from onnx_decomp.program import Form, Rewrite, Structure
from onnx_decomp.runtime import Device, cuda_problem
from onnx_decomp.sites import GraphIndex
from tests.test_end_to_end import check_outcome, planted_job
from tests.test_splitting import check_equal, index_of, only_region, rewrite_of, true_structure

GOLDEN = Path(__file__).parent / "golden"


def dump(model: onnx.ModelProto) -> str:
    """A line for each input, node, initializer and output; small integers in full, weights by shape only."""
    graph = model.graph
    lines = [f"opset {item.domain or 'ai.onnx'} {item.version}" for item in model.opset_import]
    lines += [f"in    {_port(item)}" for item in graph.input]
    for node in graph.node:
        attributes = [f"{a.name}={_attribute(a)}" for a in sorted(node.attribute, key=lambda a: a.name)]
        inputs, outputs = (", ".join(f"'{name}'" for name in names) for names in (node.input, node.output))
        lines.append(f"node  {outputs} = {' '.join([node.op_type, *attributes])}({inputs})  # {node.name}")
    lines += [f"out   {_port(item)}" for item in graph.output]
    lines += [f"store {_tensor(tensor)}  # {tensor.name}" for tensor in graph.initializer]
    return "\n".join(lines) + "\n"


def _port(item: onnx.ValueInfoProto) -> str:
    tensor = item.type.tensor_type
    dims = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return f"{TensorProto.DataType.Name(tensor.elem_type)} {dims} {item.name}"


def _tensor(tensor: onnx.TensorProto) -> str:
    kind = TensorProto.DataType.Name(tensor.data_type)
    shape = list(tensor.dims)
    if tensor.data_type != TensorProto.INT64:
        return f"{kind} {shape}"
    return f"{kind} {shape} = {numpy_helper.to_array(tensor).tolist()}"


def _attribute(item: onnx.AttributeProto) -> object:
    value = helper.get_attribute_value(item)
    return _tensor(value) if isinstance(value, TensorProto) else value


def check(name: str, model: onnx.ModelProto) -> None:
    """The graph against its golden file, which UPDATE_GOLDEN=1 writes anew."""
    path, found = GOLDEN / f"{name}.txt", dump(model)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(found, encoding="utf-8", newline="\n")
    assert path.exists(), f"{path} is missing: UPDATE_GOLDEN=1 writes it"
    assert found == path.read_text(encoding="utf-8"), "as meant? UPDATE_GOLDEN=1 writes it anew"


@dataclass(frozen=True)
class Golden:
    """A planted model, the form of its blocks, and what else is done to its region.

    layers: how many of its layers are in blocks, all by default; the rest is dense.
    keep: units that stay on each hidden axis; without blocks (`form` dense) that is all that changes.
    rows: that the graph says x has.
    """

    spec: Planted
    form: Form
    layers: int | None = None
    keep: int | None = None
    target: Device = "cpu"
    rows: int | None = None


TINY = Planted((8, 16, 8), blocks=2, hide="hidden", seed=1)

CASES = {
    "cpu_chain": Golden(TINY, "chain"),
    "cpu_parallel": Golden(replace(TINY, widths=(8, 12)), "parallel"),
    "cpu_batched": Golden(replace(TINY, widths=(8, 12)), "batched"),
    "batched_chain": Golden(replace(TINY, activation="ErfGelu"), "batched"),
    "gather_borders": Golden(replace(TINY, hide="all"), "chain"),
    "batched_gather_borders": Golden(replace(TINY, hide="all"), "batched"),
    "rank_3": Golden(replace(TINY, rank=3), "chain"),
    "mixed_segments": Golden(replace(TINY, widths=(8, 16, 16, 8)), "chain", layers=2),
    "reduced_dense": Golden(TINY, "dense", keep=6),
    "reduced_chain": Golden(TINY, "chain", keep=3),
    "without_bias": Golden(replace(TINY, bias=False), "chain"),
    "split_before_opset_13": Golden(replace(TINY, opset=11), "chain"),
    "padded_layer": Golden(replace(TINY, widths=(12, 16), uneven=True, seed=3), "batched", target="cuda"),
    "padded_chain": Golden(replace(TINY, uneven=True, hide="all", seed=3), "batched", target="cuda"),
    "one_row": Golden(replace(TINY, activation="ErfGelu"), "batched", target="cuda", rows=1),
    "cuda_parallel": Golden(replace(TINY, widths=(8, 12), rank=3), "parallel", target="cuda"),
    "gemm_float16": Golden(replace(TINY, form="Gemm", dtype="float16"), "chain"),
}


@pytest.mark.parametrize("name", CASES)
def test_emitted_graph(name: str) -> None:
    """The text is what it was, and the graph computes what the dense-equivalent one does."""
    check(name, emitted(name)[0])


def emitted(name: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """The written model of a case, which computes what the dense-equivalent one does, and inputs for it."""
    case = CASES[name]
    index, rewrite, feeds = rewritten(name)
    return check_equal(index, rewrite, feeds, case.spec.opset, case.target), feeds


def rewritten(name: str) -> tuple[GraphIndex, Rewrite, dict[str, np.ndarray]]:
    """What is written of a case, and inputs for it."""
    case = CASES[name]
    planted = build(case.spec)
    if case.rows is not None:
        planted.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = case.rows
    index = index_of(planted.model)
    region = only_region(index)
    structures: list[Structure] = []
    if case.form != "dense":
        whole = true_structure(planted, region)
        stop = case.layers or len(region.sites)
        labels = {group: whole.labels[group] for group in range(stop + 1)}
        structures = [replace(whole, sites=tuple(range(stop)), labels=labels)]
    keep = {} if case.keep is None else _first_of_each(planted, region, case.keep)
    segments = compose(region, structures, keep)
    shaped = tuple(replace(s, form=case.form) if s.blocks > 1 else s for s in segments)
    return index, rewrite_of(index, region, shaped), calibration(planted, case.rows or 5, seed=1)


def _first_of_each(planted: PlantedModel, region: Region, count: int) -> dict[int, np.ndarray]:
    """The first `count` units of every block of each hidden axis."""
    keep = {group: np.zeros(len(planted.labels[group]), bool) for group in region.elastic}
    for group, stays in keep.items():
        for block in np.unique(planted.labels[group]):
            stays[np.flatnonzero(planted.labels[group] == block)[:count]] = True
    return keep


def test_written_for_cuda_end_to_end(tmp_path: Path) -> None:
    """One batched MatMul for each layer; without a GPU it is verified on the CPU, and says so."""
    spec = Planted((64, 128, 64), off="zero", gain=3, hide="hidden")
    made = planted_job(tmp_path, build(spec))
    code, report = made.run("--provider", "cuda", "--no-latency-gate", "--objective", "flops", "-q")
    assert code == 0
    check_outcome(made, report)
    told = [warning for warning in report["warnings"] if "verified on the CPU provider" in warning]
    assert len(told) == (0 if cuda_problem() is None else 1)
    assert [site["form"] for site in report["sites"]] == ["batched", "batched"]
    assert report["latency"] == "not measured"
    written = onnx.load(made.out)
    del written.metadata_props[:]
    check("cuda_batched_chain", written)
