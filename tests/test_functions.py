"""Products in a model's own functions: found through calls, rewritten, and every other call as it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from models.planted import Planted, build
from onnx_decomp import functions
from onnx_decomp.cli import main
from onnx_decomp.compiler import decompose
from onnx_decomp.inspection import inspect_model
from onnx_decomp.options import Options
from onnx_decomp.passes.splitting import emit
from onnx_decomp.runtime import open_session
from onnx_decomp.sites import GraphIndex, find_sites
from tests.forms import CLEAR, compiled
from tests.small import value, write

LOCAL = "local"
IMPORTS = [helper.make_opsetid("", 17), helper.make_opsetid(LOCAL, 1)]
PLAIN = Options(provider="cpu", latency_gate=False, objective="flops")

Nodes = Sequence[onnx.NodeProto]


def node(op: str, inputs: str, output: str, name: str = "", **rest: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], name=name or op, **rest)


def constant(name: str, array: NDArray[Any]) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], name=name, value=numpy_helper.from_array(array, name))


def call(name: str, inputs: str, output: str, to: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(to, inputs.split(), [output], name=name, domain=LOCAL, **attributes)


def function(name: str, inputs: str, output: str, nodes: Nodes, **rest: Any) -> onnx.FunctionProto:
    return helper.make_function(LOCAL, name, inputs.split(), [output], list(nodes), IMPORTS, **rest)


def model(
    nodes: Nodes, made: Sequence[onnx.FunctionProto], stored: dict[str, NDArray[Any]], width: int = 32
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "calls",
        [value("x", ["batch", width])],
        [value("y", ["batch", width])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    proto = helper.make_model(graph, ir_version=8, opset_imports=IMPORTS, functions=list(made))
    proto.graph.doc_string = "what nobody touches"
    return proto


def weights(seed: int = 0) -> dict[str, NDArray[Any]]:
    """Four planted blocks 32 -> 64 -> 32, with nothing at all between them."""
    planted = build(Planted(CLEAR.widths, off="zero", gain=3, seed=seed, hide="hidden"))
    first, second = planted.biases
    assert first is not None
    assert second is not None
    return {"w0": planted.weights[0], "b0": first, "w1": planted.weights[1], "b1": second}


LINEAR = function("Linear", "v w b", "out", [node("MatMul", "v w", "p"), node("Add", "p b", "out")])
ACTIVATION = function("Act", "v", "out", [node("Relu", "v", "out")])


def given_in_the_call() -> onnx.ModelProto:
    """One function for both layers, with the weights as arguments, as torch exports modules."""
    nodes = [
        call("first", "x w0 b0", "h", "Linear"),
        call("act", "h", "r", "Act"),
        call("second", "r w1 b1", "y", "Linear"),
    ]
    return model(nodes, [LINEAR, ACTIVATION], weights())


def held_inside() -> onnx.ModelProto:
    """One function that holds both layers and their weights."""
    inside = [
        *(constant(name, array) for name, array in weights().items()),
        node("MatMul", "v w0", "p"),
        node("Add", "p b0", "h"),
        node("Relu", "h", "r"),
        node("MatMul", "r w1", "q", "second"),
        node("Add", "q b1", "out", "second/Add"),
    ]
    return model([call("mlp", "x", "y", "Mlp")], [function("Mlp", "v", "out", inside)], {})


def nested() -> onnx.ModelProto:
    """A function of functions; the inner ones are also called from elsewhere, and that stays."""
    inside = [
        call("first", "v w0 b0", "h", "Linear"),
        call("act", "h", "r", "Act"),
        call("second", "r w1 b1", "out", "Linear"),
    ]
    outer = function("Mlp", "v w0 b0 w1 b1", "out", inside)
    nodes = [
        call("before", "x", "a", "Act"),
        call("mlp", "a w0 b0 w1 b1", "b", "Mlp"),
        call("after", "b", "y", "Act"),
    ]
    return model(nodes, [LINEAR, ACTIVATION, outer], weights())


def attributes() -> onnx.ModelProto:
    """Flags of a Gemm and the slope of an activation come from the call, or are the function's own default."""
    gemm = node("Gemm", "v w b", "out")
    for name, own in (("transB", "turned"), ("alpha", "scale"), ("beta", "missing")):
        kind = onnx.AttributeProto.INT if name == "transB" else onnx.AttributeProto.FLOAT
        gemm.attribute.append(onnx.AttributeProto(name=name, ref_attr_name=own, type=kind))
    linear = function("Linear", "v w b", "out", [gemm], attributes=["turned", "missing"])
    linear.attribute_proto.append(helper.make_attribute("scale", 2.0))
    leaky = node("LeakyRelu", "v", "out")
    leaky.attribute.append(
        onnx.AttributeProto(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    )
    act = function("Act", "v", "out", [leaky], attributes=["slope"])
    stored = weights()
    stored |= {name: np.ascontiguousarray(stored[name].T) / np.float32(2) for name in ("w0", "w1")}
    nodes = [
        call("first", "x w0 b0", "h", "Linear", turned=1),
        call("act", "h", "r", "Act", slope=0.2),
        call("second", "r w1 b1", "y", "Linear", turned=1, scale=2.0),
    ]
    return model(nodes, [linear, act], stored)


FORMS = {f.__name__: f for f in (given_in_the_call, held_inside, nested, attributes)}


@pytest.mark.parametrize("form", FORMS)
def test_products_in_functions_are_rewritten(form: str, tmp_path: Path) -> None:
    done = compiled(FORMS[form](), tmp_path)
    assert done.decisions == ["split", "split"], done.reasons
    assert done.bytes[1] < done.bytes[0], "what was rewritten is not there twice"
    assert all(site["graph"].startswith("function:") for site in done.report["sites"])
    held = [tensor.name for tensor in done.after.graph.initializer]
    assert not {"w0", "w1", "Mlp/w0", "Mlp/w1"} & set(held)


@pytest.mark.parametrize("form", FORMS)
def test_without_calibration_data_what_the_weights_prove_is_rewritten(form: str) -> None:
    proto = FORMS[form]()
    done = decompose(proto, options=PLAIN)
    assert [site["decision"] for site in done.report["sites"]] == ["split", "split"]
    onnx.checker.check_model(done.model, full_check=True)
    feeds = {"x": np.random.default_rng(5).standard_normal((33, 32), np.float32)}
    before, after = (open_session(each).run(feeds)["y"] for each in (proto, done.model))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_where_nothing_is_rewritten_every_call_stays(form: str) -> None:
    proto = FORMS[form]()
    index = GraphIndex.build(proto, numpy_helper.to_array)
    assert len(find_sites(index)) == 2
    assert emit(index, [], 17).SerializeToString() == proto.SerializeToString()


def test_calls_that_hold_nothing_rewritten_stay_byte_for_byte(tmp_path: Path) -> None:
    """Around, inside of an outer call, and with the functions that they call; the others go with their weights."""
    proto = nested()
    done = compiled(proto, tmp_path)
    calls = {item.name: item for item in done.after.graph.node if item.domain == LOCAL}
    for item in proto.graph.node:
        assert (item.name == "mlp") != (calls.get(item.name) == item)
    assert [f.name for f in done.after.functions] == ["Act"]
    assert done.after.functions[0] == ACTIVATION
    assert done.after.graph.doc_string == proto.graph.doc_string


def test_constants_of_functions_in_a_new_order(tmp_path: Path) -> None:
    """The stream between two dense layers takes another order: with it the scale of a norm, held inside of a
    function, and the shift that another function hands out."""
    planted = build(Planted(CLEAR.widths, off="zero", gain=3, hide="all"))
    rng = np.random.default_rng(0)
    stored = {f"w{at}": weight for at, weight in enumerate(planted.weights)}
    for name in ("enter", "leave"):
        stored[name] = rng.standard_normal((32, 32)).astype(np.float32)
    scale, shift = (rng.uniform(0.5, 1.5, 32).astype(np.float32) for _ in range(2))
    normal = helper.make_node("LayerNormalization", ["v", "scale", "shift"], ["out"], name="normal")
    made = [
        function("Norm", "v shift", "out", [constant("scale", scale), normal]),
        helper.make_function(LOCAL, "Shift", [], ["out"], [constant("out", shift)], IMPORTS),
    ]
    nodes = [
        node("MatMul", "x enter", "e", "enter"),
        call("shift", "", "s", "Shift"),
        call("norm", "e s", "n", "Norm"),
        node("MatMul", "n w0", "h", "first"),
        node("Relu", "h", "r"),
        node("MatMul", "r w1", "o", "second"),
        node("MatMul", "o leave", "y", "leave"),
    ]
    done = compiled(model(nodes, made, stored), tmp_path)
    decisions = {site["node"]: site["decision"] for site in done.report["sites"]}
    assert (decisions["first"], decisions["second"]) == ("split", "split")
    assert "Gather" not in {item.op_type for item in done.after.graph.node}
    assert done.report["history"] == []
    assert not done.after.functions


def chained(shared: bool) -> onnx.ModelProto:
    """x -> f -> f -> y: one function that holds its weights is called twice, or two of them once each."""
    made = []
    for number in range(1 if shared else 2):
        stored = weights(number)
        inside = [
            *(constant(name, array) for name, array in stored.items()),
            node("MatMul", "v w0", "p"),
            node("Add", "p b0", "h"),
            node("Relu", "h", "r"),
            node("MatMul", "r w1", "q", "second"),
            node("Add", "q b1", "s", "second/Add"),
            node("Tanh", "s", "out"),
        ]
        made.append(function(f"F{number}", "v", "out", inside))
    calls = [call("one", "x", "m", "F0"), call("two", "m", "y", made[-1].name)]
    return model(calls, made, {})


@pytest.mark.parametrize("shared", [True, False])
def test_a_function_that_is_called_twice(shared: bool, tmp_path: Path) -> None:
    """Its weights are one tensor: they are written once, however many calls read them."""
    done = compiled(chained(shared), tmp_path)
    assert done.decisions == ["split"] * 4, done.reasons
    weighed = {site["weight"] for site in done.report["sites"]}
    assert len(weighed) == (2 if shared else 4)
    assert done.bytes[1] < 0.6 * done.bytes[0]
    assert not done.after.functions


def test_a_function_that_a_body_calls_too_keeps_its_weights(tmp_path: Path) -> None:
    """Else the file would hold them twice: in blocks, and whole."""
    proto = chained(shared=True)
    branch = helper.make_graph([call("inner", "m", "then", "F0")], "b", [], [value("then", ["batch", 32])])
    other = helper.make_graph([node("Identity", "m", "else")], "b", [], [value("else", ["batch", 32])])
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    proto.graph.node[1].CopyFrom(
        helper.make_node("If", ["flag"], ["y"], "if", then_branch=branch, else_branch=other)
    )
    sites = find_sites(GraphIndex.build(proto, numpy_helper.to_array))
    assert [site.obstacle for site in sites[:2]] == ["shared-weight"] * 2
    done = compiled(proto, tmp_path)
    assert not done.report["kept"]
    assert done.after == proto


def test_operators_of_another_set_stay_in_their_function() -> None:
    """The model does not import what the function does: written out, it would not be valid."""
    proto = given_in_the_call()
    other = proto.functions[0]
    other.opset_import.add(domain="com.microsoft", version=1)
    other.node.append(helper.make_node("Gelu", ["p"], ["unused"], domain="com.microsoft"))
    index = GraphIndex.build(proto, numpy_helper.to_array)
    assert [site.obstacle for site in find_sites(index)] == ["function"] * 2
    assert emit(index, [], 17) == proto


def test_the_same_operator_of_a_newer_set_is_the_same() -> None:
    """MatMul and Add are the same in 15 and in 17; Reshape is not in 13 and 14."""
    proto = given_in_the_call()
    proto.functions[0].opset_import[0].version = 15
    index = GraphIndex.build(proto, numpy_helper.to_array)
    assert [site.obstacle for site in find_sites(index)] == [None] * 2
    proto.functions[0].opset_import[0].version = 12
    index = GraphIndex.build(proto, numpy_helper.to_array)
    assert [site.obstacle for site in find_sites(index)] == ["function"] * 2


def test_a_graph_in_a_function_keeps_to_its_own_names(tmp_path: Path) -> None:
    """An If inside the function reads its tensors; called twice, no name is there twice."""
    then = helper.make_graph([node("Mul", "s s", "t")], "then", [], [value("t", ["batch", "n"])])
    other = helper.make_graph([node("Neg", "s", "t")], "else", [], [value("t", ["batch", "n"])])
    inside = [
        constant("flag", np.array(True)),
        node("MatMul", "v w", "p"),
        node("Tanh", "p", "s"),
        node("If", "flag", "out", then_branch=then, else_branch=other),
    ]
    stored = weights()
    nodes = [call("one", "x w0", "m", "F"), call("two", "m w1", "y", "F")]
    proto = model(nodes, [function("F", "v w", "out", inside)], {n: stored[n] for n in ("w0", "w1")})
    done = compiled(proto, tmp_path)
    assert done.decisions == ["split", "split"], done.reasons
    assert not done.after.functions


def test_functions_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What calls itself, or others thousands of times, is given up, and stays as it is."""
    doubled = [call("a", "v", "t", "F"), call("b", "t", "out", "F")]
    proto = model([call("c", "x", "y", "F")], [function("F", "v", "out", doubled)], {})
    monkeypatch.setattr(functions, "MAX_INLINED", 1000)
    index = GraphIndex.build(proto, numpy_helper.to_array)
    assert len(index.nodes) <= 1100
    assert find_sites(index) == []
    assert emit(index, [], 17) == proto


def test_the_command_and_its_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(nested(), tmp_path / "in.onnx")
    found = inspect_model(path)
    assert [(site["node"], site["graph"]) for site in found["sites"]] == [
        ("mlp/first/MatMul", "function:mlp/first"),
        ("mlp/second/MatMul", "function:mlp/second"),
    ]
    options = ["--provider", "cpu", "--no-latency-gate", "--quiet", "--objective", "flops"]
    out, again, report = (tmp_path / name for name in ("out.onnx", "again.onnx", "report.json"))
    assert main([str(path), str(out), *options, "--report", str(report)]) == 0
    assert main([str(path), str(again), *options, "--replay", str(report)]) == 0
    assert out.read_bytes() == again.read_bytes() != path.read_bytes()
    capsys.readouterr()
    assert main(["explain", str(report), "mlp/first/MatMul"]) == 0
    assert "verified and kept" in capsys.readouterr().err
    assert main([str(path), str(again), *options, "--exclude", "mlp/"]) == 0
    assert again.read_bytes() == path.read_bytes()


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_cut_of_a_network_into_functions_is_the_same_network(data: st.DataObject) -> None:
    """Runs of nodes become functions, those of functions too; some weights are handed over, others held inside."""
    stored = weights(data.draw(st.integers(0, 3)))
    body = [
        node("MatMul", "x w0", "p"),
        node("Add", "p b0", "h"),
        node("Relu", "h", "r"),
        node("MatMul", "r w1", "q", "second"),
        node("Add", "q b1", "y", "second/Add"),
    ]
    made: list[onnx.FunctionProto] = []
    inside = set(data.draw(st.sets(st.sampled_from(sorted(stored)))))
    for number in range(data.draw(st.integers(1, 3))):
        first = data.draw(st.integers(0, len(body) - 1))
        last = data.draw(st.integers(first + 1, len(body)))
        cut = body[first:last]
        outputs = {name for item in cut for name in item.output}
        read = list(dict.fromkeys(name for item in cut for name in item.input if name not in outputs))
        held = [name for name in read if name in inside]
        given_names = [name for name in read if name not in inside]
        result = cut[-1].output[0]
        nodes = [*(constant(name, stored[name]) for name in held), *cut]
        made.append(function(f"F{number}", " ".join(given_names), result, nodes))
        body[first:last] = [call(f"call{number}", " ".join(given_names), result, f"F{number}")]
        inside -= set(held)
    proto = model(body, made, stored)
    onnx.checker.check_model(proto)
    done = decompose(proto, options=PLAIN)
    assert [site["decision"] for site in done.report["sites"]] == ["split", "split"]
    onnx.checker.check_model(done.model, full_check=True)
    feeds = {"x": np.random.default_rng(1).standard_normal((9, 32), np.float32)}
    before, after = (open_session(each).run(feeds)["y"] for each in (proto, done.model))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
