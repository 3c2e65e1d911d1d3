"""The checks against the outside world themselves: they see what is wrong, and blame the one that did it.

What is fetched from a package registry is behind the marker `world`: `python -m pytest -m world`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

from models import bench, bench_backend, bench_shipped, shipped
from models.bench_backend import Variant, collection, compile_variant, planted
from models.isolated import Lost, run_each
from models.planted import INPUT, Planted, build
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


SPEC = Planted((32, 64, 32), off="zero", gain=3)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as a package might carry it: two layers in blocks, behind one that stays."""
    model = build(SPEC).model
    model.graph.initializer.append(numpy_helper.from_array(np.ones(32, np.float32), "scale"))
    model.graph.node.insert(0, helper.make_node("Mul", [INPUT, "scale"], ["scaled"], "first", doc_string="1"))
    model.graph.node[1].input[0] = "scaled"
    model.producer_name = "a package"
    model.metadata_props.add(key="author", value="somebody")
    path = tmp_path_factory.mktemp("package") / "model.onnx"
    onnx.save(model, path)
    return path


def standard_normal(_: Path, rng: shipped.Random) -> shipped.Samples:
    return shipped.Samples({INPUT: rng.standard_normal((400, 32)).astype(np.float32)})


LOCAL = shipped.Shipped("local==1", "model.onnx", standard_normal, shipped.same_winner, "same winner")


def test_a_sound_compilation_has_no_faults(local: Path) -> None:
    """At default options nothing is kept, and nothing then compared by the command itself."""
    plain = bench_shipped.compiled(LOCAL, local, calibrated=False)
    assert (plain.code, plain.faults, plain.identical, plain.reported) == (0, (), True, None)
    assert (plain.change, plain.before, plain.after) == (0.0, 1.0, 1.0)
    rewritten = bench_shipped.compiled(LOCAL, local, calibrated=True)
    assert (rewritten.code, rewritten.faults, rewritten.kept) == (0, (), 1)
    assert rewritten.flops < 0.6
    assert rewritten.reported is not None
    assert rewritten.megabytes > 50


Change = Callable[[onnx.ModelProto], None]


def other_field(model: onnx.ModelProto) -> None:
    model.producer_name = "someone else"


def other_metadata(model: onnx.ModelProto) -> None:
    next(entry for entry in model.metadata_props if entry.key == "author").value = "nobody"


def other_tensor(model: onnx.ModelProto) -> None:
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == "scale")
    scale.CopyFrom(numpy_helper.from_array(np.full(32, 1.5, np.float32), "scale"))


def other_node(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.name == "first").doc_string = "2"


def other_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].doc_string = "of the model"


def other_output(model: onnx.ModelProto) -> None:
    """Nothing but the numbers of a rewritten part: only running it tells."""
    for tensor in model.graph.initializer:
        if ".decomp." in tensor.name:
            tensor.CopyFrom(numpy_helper.from_array(1.5 * numpy_helper.to_array(tensor), tensor.name))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (other_field, "producer_name of the model changed"),
        (other_metadata, "metadata 'author' has changed"),
        (other_tensor, "stored tensors have changed: scale"),
        (other_node, "nodes have changed that no rewrite touches: first"),
        (other_input, "the inputs of the model have changed"),
        (other_output, "on held-back data, 0.05 are allowed"),
    ],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_a_compiler_that_spoils_something_is_seen(
    spoil: Change, says: str, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = bench_shipped.run_command

    def wrong(arguments: list[str]) -> tuple[int, str]:
        ended = command(arguments)
        written = onnx.load(arguments[1])
        spoil(written)
        onnx.save(written, arguments[1])
        return ended

    monkeypatch.setattr(bench_shipped, "run_command", wrong)
    found = bench_shipped.compiled(LOCAL, local, calibrated=True).faults
    assert any(says in fault for fault in found), found


def test_figures_that_must_not_be_are_seen() -> None:
    sound = bench_shipped.Row("m", True, 0, kept=1, reported=0.04, change=0.05, before=0.9, after=0.86)
    assert bench_shipped.faults(sound) == []
    for spoiled, says in (
        (replace(sound, kept=0), "OUT is not IN"),
        (replace(sound, change=None), "no data to compare"),
        (replace(sound, calibrated=False), "0.001 are allowed"),
        (replace(sound, reported=0.06), "0.06 on the report's data"),
        (replace(sound, change=float("nan")), "nan on held-back data"),
        (replace(sound, after=0.8), "0.900 before, 0.800 after"),
        (replace(sound, megabytes=4000.0), "took 4000 MB"),
    ):
        assert any(says in fault for fault in bench_shipped.faults(spoiled)), says


def test_what_is_wrong_ends_the_benchmark_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    row = bench_shipped.Row("m", True, 0, faults=("took 4000 MB",))
    section = replace(bench_shipped.SECTION, measure=lambda _: [row])
    monkeypatch.setitem(bench.OUTSIDE, "shipped", section)
    ended = CliRunner().invoke(bench.main, ["shipped"])
    assert ended.exit_code == 1
    assert "m with data: took 4000 MB" in ended.stderr


@pytest.mark.world
@pytest.mark.parametrize("calibrated", [False, True], ids=["default", "calibrated"])
@pytest.mark.parametrize("place", range(len(shipped.CATALOGUE)), ids=[m.name for m in shipped.CATALOGUE])
def test_a_shipped_model(place: int, calibrated: bool) -> None:
    """Exit 0, sound, within the tolerance on held-back data, and its task done as before or nearly."""
    (row,) = bench_shipped.each([bench_shipped.Job(place, calibrated)])
    if row is None:
        pytest.skip(shipped.CATALOGUE[place].note)
    print(row)
    assert (row.code, row.faults) == (0, ())
