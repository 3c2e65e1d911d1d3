"""Products in bodies of If, Loop and Scan: each body compiled as a model of its own, and judged by the whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from models.planted import Planted, build
from onnx_decomp import nesting
from onnx_decomp.cli import main
from onnx_decomp.compiler import Result, decompose
from onnx_decomp.gates import Gates
from onnx_decomp.nesting import Bodies
from onnx_decomp.options import Options
from onnx_decomp.runtime import open_session
from tests.small import value, write
from tests.test_functions import PLAIN, call, function, node

WIDTH = 32
ROWS: list[int | str | None] = ["batch", WIDTH]
BLOCKS = Planted((WIDTH, 64, WIDTH), off="zero", gain=3, hide="hidden")

Arrays = dict[str, NDArray[Any]]


def layers(prefix: str, x: str, y: str) -> list[onnx.NodeProto]:
    """y = w1 Relu(w0 x + b0) + b1, under a name of its own."""
    p = prefix
    return [
        node("MatMul", f"{x} {p}.w0", f"{p}.p", f"{p}.first"),
        node("Add", f"{p}.p {p}.b0", f"{p}.h", f"{p}.first/Add"),
        node("Relu", f"{p}.h", f"{p}.r", f"{p}.relu"),
        node("MatMul", f"{p}.r {p}.w1", f"{p}.q", f"{p}.second"),
        node("Add", f"{p}.q {p}.b1", y, f"{p}.second/Add"),
    ]


def weights(prefix: str, seed: int = 0) -> Arrays:
    """Four planted blocks, with nothing at all between them."""
    planted = build(Planted(**(BLOCKS.__dict__ | {"seed": seed})))
    arrays = {f"w{at}": weight for at, weight in enumerate(planted.weights)}
    arrays |= {f"b{at}": bias for at, bias in enumerate(planted.biases) if bias is not None}
    return {f"{prefix}.{name}": array for name, array in arrays.items()}


def tensors(stored: Arrays) -> list[onnx.TensorProto]:
    return [numpy_helper.from_array(array, name) for name, array in stored.items()]


def body(
    nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[onnx.ValueInfoProto],
    inputs: Sequence[onnx.ValueInfoProto] = (),
    stored: Arrays | None = None,
) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "body", list(inputs), list(outputs), tensors(stored or {}))


def model(nodes: Sequence[onnx.NodeProto], stored: Arrays, **more: Any) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "outer",
        [value("x", more.get("shape", ROWS))],
        [value("y", more.get("shape", ROWS))],
        tensors(stored),
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, ir_version=8, opset_imports=imports, functions=more.get("functions", []))


def signed() -> tuple[list[onnx.NodeProto], Arrays]:
    """A flag that some batches set and others do not."""
    nodes = [node("ReduceSum", "x axes", "sum", keepdims=0), node("Greater", "sum zero", "flag")]
    return nodes, {"axes": np.array([0, 1]), "zero": np.array(0.0, np.float32)}


def branches(inside: bool = True, outside: bool = True) -> onnx.ModelProto:
    """One set of weights for each branch: that of `then` in the branch or around it, that of `else` likewise."""
    nodes, stored = signed()
    own, other = weights("t", 1), weights("e", 2)
    then = body(layers("t", "x", "ty"), [value("ty", ROWS)], stored=own if inside else None)
    rest = body(layers("e", "x", "ey"), [value("ey", ROWS)], stored=None if outside else other)
    stored |= ({} if inside else own) | (other if outside else {})
    nodes += [helper.make_node("If", ["flag"], ["y"], "choice", then_branch=then, else_branch=rest)]
    return model(nodes, stored)


def looped(inside: bool, inner: Sequence[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    """A state goes through the layers three times; each iteration adds its own row of a table, and hands out a mean."""
    nodes = [
        *(inner or layers("l", "state", "made")),
        node("Gather", "table i", "row"),
        node("Add", "made row", "moved"),
        node("Tanh", "moved", "next"),
        node("Identity", "go", "on"),
        node("ReduceMean", "next", "mean", axes=[1]),
    ]
    inputs = [
        value("i", [], TensorProto.INT64),
        value("go", [], TensorProto.BOOL),
        value("state", ROWS),
    ]
    outputs = [value("on", [], TensorProto.BOOL), value("next", ROWS), value("mean", ["batch", 1])]
    own = weights("l", 3)
    graph = body(nodes, outputs, inputs, own if inside else None)
    table = np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)
    loop = helper.make_node("Loop", ["times", "yes", "x"], ["last", "means"], "again", body=graph)
    total = node("ReduceSum", "means outer_axes", "total", keepdims=0)
    stored: Arrays = {
        "times": np.array(3),
        "yes": np.array(True),
        "table": table,
        "outer_axes": np.array([0]),
    }
    return model([loop, total, node("Add", "last total", "y")], stored | ({} if inside else own))


def scanned(inside: bool) -> onnx.ModelProto:
    """A state and rows of x: [time, batch, width] -> the same."""
    nodes = [
        node("Add", "state row", "both"),
        *layers("s", "both", "made"),
        node("Tanh", "made", "next"),
        node("Identity", "next", "out"),
    ]
    shape = [2, WIDTH]
    inputs, outputs = (
        [value("state", shape), value("row", shape)],
        [value("next", shape), value("out", shape)],
    )
    own = weights("s", 4)
    graph = body(nodes, outputs, inputs, own if inside else None)
    scan = helper.make_node(
        "Scan", ["start", "x"], ["last", "y"], "scan", body=graph, num_scan_inputs=1, scan_output_axes=[0]
    )
    stored = {"start": np.zeros(shape, np.float32)} | ({} if inside else own)
    return model([scan], stored, shape=[8, *shape])


FORMS = {
    "both branches, weights inside and outside": branches(),
    "both branches, weights the other way round": branches(False, False),
    "Loop, weights inside": looped(True),
    "Loop, weights outside": looped(False),
    "Scan, weights inside": scanned(True),
    "Scan, weights outside": scanned(False),
}


def samples(proto: onnx.ModelProto, seed: int, count: int) -> Arrays:
    shape = [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    return {"x": np.random.default_rng(seed).standard_normal((count, *shape[1:]), np.float32)}


def agree(before: onnx.ModelProto, after: onnx.ModelProto, tolerance: float = 1e-5) -> None:
    """On new data, in batches that take either branch."""
    onnx.checker.check_model(after, full_check=True)
    assert before.graph.input == after.graph.input
    assert before.graph.output == after.graph.output
    first, second = open_session(before), open_session(after)
    rows = before.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 3
    for seed in range(20, 28):
        feeds = samples(before, seed, rows)
        expected, found = first.run(feeds)["y"], second.run(feeds)["y"]
        assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def done(proto: onnx.ModelProto, folder: Path, **more: Any) -> Result:
    """Compiled with calibration data."""
    np.savez(folder / "calib.npz", **samples(proto, 0, 400))  # type: ignore[arg-type]
    return decompose(proto, calib=folder / "calib.npz", options=Options(**(PLAIN.__dict__ | more)))


def rows(result: Result) -> list[tuple[str, str, str, str]]:
    return [(s["node"], s["graph"], s["decision"], s["reason"]) for s in result.report["sites"]]


@pytest.mark.parametrize("form", FORMS)
def test_products_in_bodies_are_rewritten(form: str, tmp_path: Path) -> None:
    proto = FORMS[form]
    found = done(proto, tmp_path)
    assert {(decision, reason) for _, _, decision, reason in rows(found)} == {("split", "applied")}
    assert found.report["output"]["matmul_flops"] * 4 == found.report["input"]["matmul_flops"]
    assert found.report["output"]["parameters"] < 0.3 * found.report["input"]["parameters"]
    agree(proto, found.model)
    assert done(proto, tmp_path).model == found.model, "the same again"


@pytest.mark.parametrize("form", FORMS)
def test_without_calibration_data_what_the_weights_prove_is_rewritten(form: str) -> None:
    proto = FORMS[form]
    found = decompose(proto, options=PLAIN)
    assert {(decision, reason) for _, _, decision, reason in rows(found)} == {("split", "applied")}
    assert "not verified on real data" in found.report["verdict"]
    agree(proto, found.model)


def test_everything_else_is_preserved(tmp_path: Path) -> None:
    """Nodes around the body, the other branch, what the body reads from outside and others read too."""
    proto = branches()
    (choice,) = (item for item in proto.graph.node if item.op_type == "If")
    for item in choice.attribute:
        item.g.doc_string = "kept"
        item.g.metadata_props.add(key="kept", value="too")
    rest = next(item.g for item in choice.attribute if item.name == "else_branch")
    found = done(proto, tmp_path, exclude="^e")
    assert [decision for *_, decision, _ in rows(found)] == ["dense", "dense", "split", "split"]
    after = found.model.graph
    assert list(after.node)[:-1] == list(proto.graph.node)[:-1]
    assert list(after.initializer) == list(proto.graph.initializer)
    graphs = {item.name: item.g for item in after.node[-1].attribute}
    assert graphs["else_branch"] == rest
    assert (graphs["then_branch"].doc_string, graphs["then_branch"].metadata_props[0].value) == (
        "kept",
        "too",
    )
    assert after.node[-1].name == "choice"


def test_two_branches_with_the_same_names(tmp_path: Path) -> None:
    """Neither sees the other; what is new in one is called otherwise in the other, and nodes may have no name."""
    nodes, stored = signed()
    graphs = [body(layers("t", "x", "ty"), [value("ty", ROWS)], stored=weights("t", seed)) for seed in (1, 2)]
    nodes += [helper.make_node("If", ["flag"], ["y"], then_branch=graphs[0], else_branch=graphs[1])]
    proto = model(nodes, stored)
    found = done(proto, tmp_path)
    assert [(graph, decision) for _, graph, decision, _ in rows(found)] == [
        ("if:y/else", "split"),
        ("if:y/else", "split"),
        ("if:y/then", "split"),
        ("if:y/then", "split"),
    ]
    new = [
        {name for inner in item.g.node for name in inner.output} - {"ty"}
        for item in found.model.graph.node[-1].attribute
    ]
    assert new[0].isdisjoint(new[1])
    agree(proto, found.model)


def test_weights_behind_operators_outside(tmp_path: Path) -> None:
    """Stored turned, in half as many bits, in the graph around; it leaves with the operators that led to it."""
    proto = branches()
    for tensor in proto.graph.initializer:
        if tensor.name == "e.w0":
            array = numpy_helper.to_array(tensor)
            turned = np.ascontiguousarray(array.T.astype(np.float16))
            tensor.CopyFrom(numpy_helper.from_array(turned, "stored"))
    steps = [
        node("Cast", "stored", "cast", to=TensorProto.FLOAT),
        node("Transpose", "cast", "e.w0", perm=[1, 0]),
    ]
    nodes = [*steps, *proto.graph.node]
    copies = [onnx.NodeProto.FromString(item.SerializeToString()) for item in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
    found = done(proto, tmp_path)
    assert [decision for *_, decision, _ in rows(found)] == ["split"] * 4
    assert {item.op_type for item in found.model.graph.node} == {"ReduceSum", "Greater", "If"}
    assert {t.name for t in found.model.graph.initializer} == {"axes", "zero"}
    agree(proto, found.model)


def test_each_product_of_a_body_is_reported_once(tmp_path: Path) -> None:
    """It may know a product more or less than the graph around it: two of one shape are told by their names."""
    nodes, stored = signed()
    wide = np.random.default_rng(5).standard_normal((WIDTH, 2 * WIDTH), np.float32)
    nodes.append(helper.make_node("Split", ["both", "sizes"], ["w", "rest"], axis=1))
    inner = [
        node("MatMul", "x w", "p", "first"),
        node("Relu", "p", "h"),
        node("MatMul", "h v", "ty", "second"),
    ]
    then = body(inner, [value("ty", ROWS)])
    other = body([node("Identity", "x", "ey")], [value("ey", ROWS)])
    nodes += [helper.make_node("If", ["flag"], ["y"], "choice", then_branch=then, else_branch=other)]
    found = done(
        model(nodes, stored | {"both": wide, "v": wide[:, :WIDTH], "sizes": np.array([WIDTH, WIDTH])}),
        tmp_path,
    )
    assert sorted(name for name, *_ in rows(found)) == ["first", "second"]


def test_constants_of_a_new_order_that_others_read_too(tmp_path: Path) -> None:
    """A bias of the hidden units, read outside as well: there it stays as it was."""
    nodes, stored = signed()
    nodes += [node("Expand", "e.b0 shape", "unread", "reads the bias")]
    rest = body([node("Identity", "x", "ty")], [value("ty", ROWS)])
    then = body(layers("e", "x", "ey"), [value("ey", ROWS)])
    nodes += [helper.make_node("If", ["flag"], ["y"], "choice", then_branch=then, else_branch=rest)]
    own = weights("e")
    proto = model(nodes, stored | own | {"shape": np.array([1, 64])})
    found = done(proto, tmp_path)
    assert [decision for *_, decision, _ in rows(found)] == ["split", "split"]
    left = {tensor.name: tensor for tensor in found.model.graph.initializer}
    np.testing.assert_array_equal(numpy_helper.to_array(left["e.b0"]), own["e.b0"])
    agree(proto, found.model)


def both_read(where: str) -> onnx.ModelProto:
    """One set of weights, read in a branch and in the other one, or outside."""
    nodes, stored = signed()
    x = "x"
    if where == "outside":
        nodes += [
            node("MatMul", "x e.w0", "o", "o"),
            node("Tanh", "o", "oh"),
            node("MatMul", "oh e.w1", "ox", "ox"),
        ]
        x = "ox"
    then = body(layers("e", x, "ty"), [value("ty", ROWS)])
    rest = body([node("Identity", x, "ry")], [value("ry", ROWS)])
    if where == "other branch":
        again = [onnx.NodeProto.FromString(item.SerializeToString()) for item in layers("e", x, "ry")]
        for item in again:
            item.name = f"again.{item.name}"
            item.output[0] = item.output[0] if item.output[0] == "ry" else f"again.{item.output[0]}"
            item.input[0] = item.input[0] if item.input[0] == x else f"again.{item.input[0]}"
        rest = body(again, [value("ry", ROWS)])
    nodes += [helper.make_node("If", ["flag"], ["y"], "choice", then_branch=then, else_branch=rest)]
    return model(nodes, stored | weights("e"))


@pytest.mark.parametrize("where", ["outside", "other branch"])
def test_a_weight_that_others_read_too_stays(where: str, tmp_path: Path) -> None:
    """Else the file would hold two versions of it."""
    proto = both_read(where)
    found = done(proto, tmp_path)
    assert {reason for *_, reason in rows(found)} == {"shared-weight"}
    assert found.model == proto


def test_a_branch_that_never_runs_stays(tmp_path: Path) -> None:
    proto = branches()
    del proto.graph.node[:2]
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    found = done(proto, tmp_path)
    assert [(graph, reason) for _, graph, _, reason in rows(found)] == [
        ("if:choice/else", "not-run"),
        ("if:choice/else", "not-run"),
        ("if:choice/then", "applied"),
        ("if:choice/then", "applied"),
    ]
    agree(proto, found.model)


def test_branches_of_different_widths(tmp_path: Path) -> None:
    """The shape of the output depends on the data: two halves of a batch may not even be put together."""
    proto = branches()
    graphs = {item.name: item.g for item in proto.graph.node[-1].attribute}
    graphs["else_branch"].node.append(node("Concat", "ey ey", "ee", axis=1))
    graphs["else_branch"].output[0].CopyFrom(value("ee", ["batch", 2 * WIDTH]))
    proto.graph.output[0].CopyFrom(value("y", ["batch", "width"]))
    found = done(proto, tmp_path)
    assert [decision for *_, decision, _ in rows(found)] == ["split"] * 4
    agree(proto, found.model)


def test_a_rare_branch_is_found_in_single_samples(tmp_path: Path) -> None:
    proto = rare()
    found = done(proto, tmp_path)
    assert [decision for *_, decision, _ in rows(found)] == ["split"] * 4
    before, after = open_session(proto), open_session(found.model)
    feeds = [samples(proto, seed, 1) for seed in range(60)]
    taken = [bool((batch["x"].mean() > 0.15).item()) for batch in feeds]
    assert any(taken)
    for batch in feeds:
        np.testing.assert_allclose(after.run(batch)["y"], before.run(batch)["y"], atol=1e-5)


def test_bodies_in_bodies(tmp_path: Path) -> None:
    """An If in a Loop: the weights of one branch lie two graphs out, those of the other in it."""
    then = body(layers("t", "state", "ty"), [value("ty", ROWS)])
    rest = body(layers("e", "state", "ey"), [value("ey", ROWS)], stored=weights("e", 2))
    inner = [
        node("ReduceSum", "state", "sum", keepdims=0),
        node("Greater", "sum zero", "flag"),
        helper.make_node("If", ["flag"], ["made"], "choice", then_branch=then, else_branch=rest),
    ]
    proto = looped(inside=False, inner=inner)
    proto.graph.initializer.extend(tensors(weights("t", 1) | {"zero": np.array(0.0, np.float32)}))
    unread = [tensor for tensor in proto.graph.initializer if tensor.name.startswith("l.")]
    for tensor in unread:
        proto.graph.initializer.remove(tensor)
    found = done(proto, tmp_path)
    assert [(graph, decision) for _, graph, decision, _ in rows(found)] == [
        ("loop:again/body/if:choice/else", "split"),
        ("loop:again/body/if:choice/else", "split"),
        ("loop:again/body/if:choice/then", "split"),
        ("loop:again/body/if:choice/then", "split"),
    ]
    assert not {t.name for t in found.model.graph.initializer} & {"t.w0", "t.w1"}
    agree(proto, found.model)


def test_functions_in_bodies_and_bodies_in_functions(tmp_path: Path) -> None:
    """A call in a body is written out there; a body in a function is looked at by nobody."""
    linear = function("Linear", "v w b", "out", [node("MatMul", "v w", "p"), node("Add", "p b", "out")])
    nodes, stored = signed()
    calls = [
        call("first", "x e.w0 e.b0", "h", "Linear"),
        node("Relu", "h", "r"),
        call("second", "r e.w1 e.b1", "ty", "Linear"),
    ]
    then = body(calls, [value("ty", ROWS)])
    rest = body([node("Identity", "x", "ry")], [value("ry", ROWS)])
    nodes += [helper.make_node("If", ["flag"], ["y"], "choice", then_branch=then, else_branch=rest)]
    proto = model(nodes, stored | weights("e"), functions=[linear])
    found = done(proto, tmp_path)
    assert [(name, graph, decision) for name, graph, decision, _ in rows(found)] == [
        ("first/MatMul", "if:choice/then/function:first", "split"),
        ("second/MatMul", "if:choice/then/function:second", "split"),
    ]
    agree(proto, found.model)

    inner = body([node("MatMul", "v w", "ty")], [value("ty", ROWS)])
    other = body([node("Identity", "v", "ry")], [value("ry", ROWS)])
    choice = helper.make_node("If", ["f"], ["out"], "choice", then_branch=inner, else_branch=other)
    proto = model(
        [*signed()[0], call("c", "x flag w", "y", "F")],
        signed()[1] | {"w": np.eye(WIDTH, dtype=np.float32)},
        functions=[function("F", "v f w", "out", [choice])],
    )
    found = done(proto, tmp_path)
    assert [reason for *_, reason in rows(found)] == ["nested-graph"]
    assert found.model == proto


def test_a_body_with_nan_among_its_weights_stays(tmp_path: Path) -> None:
    """In the main graph that is refused; here the rest of the model may be sound."""
    proto = branches()
    (graph,) = (item.g for item in proto.graph.node[-1].attribute if item.name == "then_branch")
    graph.initializer.extend(tensors({"bad": np.full((WIDTH, 4), np.nan, np.float32)}))
    graph.node.append(node("MatMul", "x bad", "unread", "unread"))
    found = done(proto, tmp_path)
    assert [reason for *_, reason in rows(found)] == ["applied"] * 2 + ["cannot-verify"] * 3
    assert any("'bad' holds NaN" in warning for warning in found.report["warnings"])
    agree(proto, found.model)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_function_with_its_own_weights_that_a_body_calls(elsewhere: bool, tmp_path: Path) -> None:
    """It goes with its call; if another one is left, it stays, and so does the call: no weight is there twice."""
    stored = weights("e")
    inside = [
        *(helper.make_node("Constant", [], [n], value=numpy_helper.from_array(a)) for n, a in stored.items()),
        *layers("e", "v", "out"),
    ]
    nodes, more = signed()
    then = body([call("net", "x", "ty", "Net")], [value("ty", ROWS)])
    rest = body([node("Identity", "x", "ry")], [value("ry", ROWS)])
    if elsewhere:
        rest = body([call("again", "x", "ry", "Net")], [value("ry", ROWS)])
    nodes += [helper.make_node("If", ["flag"], ["y"], "choice", then_branch=then, else_branch=rest)]
    proto = model(nodes, more, functions=[function("Net", "v", "out", inside)])
    found = done(proto, tmp_path)
    assert {reason for *_, reason in rows(found)} == {"shared-weight" if elsewhere else "applied"}
    assert list(found.model.functions) == (list(proto.functions) if elsewhere else [])
    agree(proto, found.model)


def test_bodies_too_many_and_too_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's file may have thousands, one in another; what is not looked at stays, with the reason."""
    graph = body(layers("e", "x", "y0"), [value("y0", ROWS)], stored=weights("e"))
    for depth in range(20):
        inner = helper.make_node("If", ["yes"], [f"y{depth + 1}"], f"if{depth}")
        for name in ("then_branch", "else_branch"):
            other = body([node("Identity", "x", f"o{depth}")], [value(f"o{depth}", ROWS)])
            inner.attribute.append(helper.make_attribute(name, graph if name == "then_branch" else other))
        graph = body([inner], [value(f"y{depth + 1}", ROWS)])
    (top,) = graph.node
    top.output[0] = "y"
    proto = model([top], {"yes": np.array(True)})
    found = done(proto, tmp_path)
    assert found.model == proto
    assert rows(found) == [], "sixteen deep, products are no longer listed"
    many = branches()
    monkeypatch.setattr(nesting, "MAX_BODIES", 1)
    reasons = [reason for *_, reason in rows(done(many, tmp_path))]
    assert reasons == ["applied", "applied", "nested-graph", "nested-graph"]


def noisy(proto: onnx.ModelProto, attribute: str = "body") -> onnx.ModelProto:
    """Weights between the blocks are small, not nothing: what goes changes the outputs."""
    graphs = [item.g for each in proto.graph.node for item in each.attribute if item.name == attribute]
    (graph,) = graphs
    rng = np.random.default_rng(0)
    for tensor in graph.initializer:
        if tensor.name.endswith(("w0", "w1")):
            array = numpy_helper.to_array(tensor)
            array = array + rng.standard_normal(array.shape, np.float32) * 0.01 * array.std()
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
    return proto


def test_the_whole_model_stays_within_its_tolerance(tmp_path: Path) -> None:
    """Three times through the body, errors grow."""
    proto = noisy(looped(inside=True))
    found = done(proto, tmp_path, tolerance=0.05)
    assert found.report["kept"]
    assert found.report["verify"]["passed"]
    agree(proto, found.model, 0.06)
    tight = done(proto, tmp_path, tolerance=1e-4)
    assert not tight.report["kept"]
    assert tight.model == proto


def rare() -> onnx.ModelProto:
    """No batch of ten takes the first branch; some samples by themselves do."""
    proto = branches()
    proto.graph.node[0].CopyFrom(node("ReduceMean", "x", "sum", keepdims=0))
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    stored["zero"].CopyFrom(numpy_helper.from_array(np.array(0.15, np.float32), "zero"))
    proto.graph.initializer.remove(stored["axes"])
    return proto


def test_the_gate_of_the_whole_sees_a_rare_branch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch was compiled far too loosely: in batches that never take it, nobody would notice."""
    proto = noisy(rare(), "then_branch")
    monkeypatch.setattr(nesting, "_tolerance", lambda _: 0.2)
    found = done(proto, tmp_path)
    before, after = open_session(proto), open_session(found.model)
    for seed in range(60):
        feeds = samples(proto, seed, 1)
        expected, made = before.run(feeds)["y"], after.run(feeds)["y"]
        assert np.linalg.norm(made - expected) <= 2e-3 * np.linalg.norm(expected)


def test_what_changes_the_whole_too_much_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = branches()
    monkeypatch.setattr(Bodies, "_spent", lambda *_: 2.0)
    found = done(proto, tmp_path)
    assert {reason for *_, reason in rows(found)} == {"tolerance"}
    assert {entry["undone"] for entry in found.report["history"]} == {"if:choice/then", "if:choice/else"}
    assert found.model == proto
    assert found.report["verdict"].startswith("nothing kept")


def test_what_is_not_faster_is_undone(tmp_path: Path) -> None:
    proto = branches()
    found = done(proto, tmp_path, latency_gate=True, min_speedup=1000.0)
    assert {reason for *_, reason in rows(found)} == {"latency"}
    assert found.model == proto
    assert found.report["latency"] == "not measured"


def test_one_slow_body_is_undone_and_the_other_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked one by one, whether the rest is faster without it."""
    proto = branches()
    slow = [0.5, 2.0, 2.0]
    monkeypatch.setattr(Gates, "speedup", lambda *_: slow.pop(0))
    found = done(proto, tmp_path, latency_gate=True, min_speedup=0.0)
    assert {(graph, reason) for _, graph, _, reason in rows(found)} == {
        ("if:choice/else", "latency"),
        ("if:choice/then", "applied"),
    }
    agree(proto, found.model)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Replayed, explained, left out, tried, and compiled twice."""
    proto = branches()
    path = write(proto, tmp_path / "in.onnx")
    np.savez(tmp_path / "calib.npz", **samples(proto, 0, 400))  # type: ignore[arg-type]
    options = ["--provider", "cpu", "--no-latency-gate", "--quiet", "--objective", "flops"]
    options += ["--calib", str(tmp_path / "calib.npz")]
    out, again, report = (tmp_path / name for name in ("out.onnx", "again.onnx", "report.json"))
    assert main([str(path), str(out), *options, "--exclude", "^e", "--report", str(report)]) == 0
    assert json.loads(report.read_text())["kept"] == ["if:choice/then/region_000"]
    assert main([str(path), str(again), *options, "--replay", str(report)]) == 0
    assert onnx.load(again).graph == onnx.load(out).graph
    capsys.readouterr()
    assert main(["explain", str(report), "t.first"]) == 0
    assert "verified and kept" in capsys.readouterr().err
    assert main(["explain", str(report), "e.first"]) == 0
    assert "--include or --exclude" in capsys.readouterr().err
    assert main([str(path), *options, "--dry-run", "--require-change"]) == 0
    assert main([str(out), str(again), *options]) == 0
    assert again.read_bytes() == out.read_bytes()
    entries = {item.key: item.value for item in onnx.load(out).metadata_props}
    assert entries["onnx_decomp.verdict"] == "if:choice/then/region_000: split"
    assert main(["inspect", str(path), "--json"]) == 0
    assert "if:choice/then" in capsys.readouterr().out


def test_external_data_in_and_around_bodies(tmp_path: Path) -> None:
    proto = branches()
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    path = tmp_path / "in" / "m.onnx"
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    onnx.save_model(copy, path, save_as_external_data=True, location="w.bin", size_threshold=1024)
    np.savez(tmp_path / "calib.npz", **samples(proto, 0, 400))  # type: ignore[arg-type]
    out = tmp_path / "out" / "m.onnx"
    options = ["--provider", "cpu", "--no-latency-gate", "--quiet", "--objective", "flops"]
    assert main([str(path), str(out), *options, "--calib", str(tmp_path / "calib.npz")]) == 0
    onnx.checker.check_model(str(out))
    after = onnx.load(out)
    assert "onnx_decomp.verdict" in {item.key for item in after.metadata_props}
    agree(proto, after)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_body_is_the_same_network(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["If", "Loop", "Scan"]))
    inside, seed = data.draw(st.booleans()), data.draw(st.integers(0, 5))
    proto = {"If": lambda: branches(inside, data.draw(st.booleans())), "Loop": lambda: looped(inside)}.get(
        kind, lambda: scanned(inside)
    )()
    rng = np.random.default_rng(seed)
    graphs = [proto.graph, *(item.g for each in proto.graph.node for item in each.attribute)]
    for tensor in (tensor for graph in graphs for tensor in graph.initializer):
        if tensor.name.endswith(("w0", "w1")):  # zeros stay zeros
            array = numpy_helper.to_array(tensor) * rng.uniform(0.5, 1.5, tensor.dims)
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
    found = decompose(proto, options=PLAIN)
    assert {decision for _, _, decision, _ in rows(found)} == {"split"}
    agree(proto, found.model)
