"""The checks against the outside world themselves: they see what is wrong, and blame the one that did it.

What is fetched from a package registry is behind the marker `world`: `python -m pytest -m world`.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from models import bench_backend, bench_shipped, shipped
from models.bench_backend import Variant, collection, compile_variant, planted
from models.isolated import Lost, run_each
from models.planted import Planted, build
from onnx_decomp.runtime import open_session


def act(what: str) -> str:
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "hang":
        time.sleep(600)
    if what == "raise":
        raise ValueError("no")
    return what.upper()


def nothing(_: int) -> None:
    """A result of None is a result."""


def test_a_lost_task_costs_no_other() -> None:
    asked = ["a", "crash", "b", "hang", "raise", "c"]
    found = dict(run_each(act, asked, processes=2, seconds=5))
    assert {what: found[what] for what in "abc"} == {"a": "A", "b": "B", "c": "C"}
    assert found["crash"] == Lost("crashed: SIGSEGV")
    assert found["hang"] == Lost("hung")
    assert found["raise"] == Lost("raised: ValueError: no")
    assert list(run_each(nothing, [1, 2], processes=1)) == [(1, None), (2, None)]


def test_the_whole_collection_is_there() -> None:
    kinds = [kind for kind, _ in collection()]
    assert len(kinds) > 1900
    assert set(kinds) == set(bench_backend.KINDS)


@pytest.mark.parametrize("name", ["test_gemm_all_attributes", "test_if", "test_add_bcast"])
@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("weights", ["dead", "blocks"])
def test_planted_cases_compute_the_case(
    name: str, where: bench_backend.Where, weights: bench_backend.Weights
) -> None:
    """The planted network is read by the operator, or reads it."""
    case = collection()["node", name]()
    made = planted(case, where, weights)
    if made is None:
        assert name == "test_if"  # its only input is a condition
        return
    onnx.checker.check_model(made.model, full_check=True)
    found = open_session(made.model).run(made.feeds)
    if where == "before":
        (expected,) = open_session(case.model).run(case.feeds).values()
        (moved,) = found.values()
        assert moved.shape == expected.shape
        assert 0 < np.abs(moved - expected).max() < np.abs(expected).max()
    else:
        assert "planted.out" in found


def test_cases_are_told_apart() -> None:
    plain = compile_variant(Variant("node", "test_relu"))
    assert plain is not None
    assert (plain.outcome, plain.code) == ("identical", 0)
    rewritten = compile_variant(Variant("node", "test_relu", "after", "dead"))
    assert rewritten is not None
    assert (rewritten.outcome, rewritten.decisions) == ("rewritten", "reduced")
    assert rewritten.change < 1e-5


def test_a_wrong_output_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that negates what it writes."""
    compile_file = bench_backend.command

    def wrong(arguments: list[str]) -> int:
        code = compile_file(arguments)
        written = onnx.load(arguments[1])
        node = written.graph.node[-1]
        written.graph.node.append(helper.make_node("Neg", ["turned"], [node.output[0]]))
        node.output[0] = "turned"
        onnx.save(written, arguments[1])
        return code

    monkeypatch.setattr(bench_backend, "command", wrong)
    row = compile_variant(Variant("node", "test_relu", "after", "dead"))
    assert row is not None
    assert (row.outcome, row.change) == ("other outputs", pytest.approx(2.0))
    plain = compile_variant(Variant("node", "test_relu"))
    assert plain is not None
    assert plain.outcome == "OUT is not IN"


def test_a_changed_tensor_is_seen(tmp_path: Path) -> None:
    before = build(Planted((8, 8), blocks=2)).model
    after = onnx.ModelProto.FromString(before.SerializeToString())
    paths = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(before, paths[0])
    onnx.save(after, paths[1])
    assert bench_shipped.difference(*paths) == ""
    bias = next(tensor for tensor in after.graph.initializer if tensor.name == "layers.0.bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 1, bias.name))
    onnx.save(after, paths[1])
    assert "layers.0.bias" in bench_shipped.difference(*paths)
    after.producer_name = "someone else"
    del after.graph.initializer[:]
    after.graph.initializer.extend(before.graph.initializer)
    onnx.save(after, paths[1])
    assert "producer_name" in bench_shipped.difference(*paths)


@pytest.mark.world
@pytest.mark.parametrize("calibrated", [False, True], ids=["default", "calibrated"])
@pytest.mark.parametrize("place", range(len(shipped.CATALOGUE)), ids=[m.name for m in shipped.CATALOGUE])
def test_a_shipped_model(place: int, calibrated: bool) -> None:
    """Exit 0, sound, within the tolerance on held-back data, and its task done as before or nearly."""
    if calibrated and shipped.CATALOGUE[place].samples is None:
        pytest.skip(shipped.CATALOGUE[place].note)
    row = bench_shipped.compile_one(bench_shipped.Job(place, calibrated))
    assert (row.code, row.why) == (0, "")
    if row.change is not None and row.before is not None and row.after is not None:
        assert row.change <= 1.5 * bench_shipped.LOOSE
        assert row.after >= row.before - 0.05
