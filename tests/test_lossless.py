"""Everything that is not replaced stays as it was, message by message, byte for byte and in order.

One model holds whatever a careless rewriter loses, around a run of layers that can be decomposed.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.planted import Planted, build, calibration
from onnx_decomp.runtime import open_session
from tests.small import value
from tests.test_end_to_end import FREE, Job, change, each, job

PLANTED = Planted((64, 128, 64), off="zero", gain=3)

REPLACED = {"layers.0/MatMul", "layers.0/Add", "layers.0/Relu", "layers.1/MatMul", "layers.1/Add"}
REPLACED_WEIGHTS = {"layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"}
REPLACED_TENSORS = {"layers.0.product", "layers.0.out", "layers.0.active", "layers.1.product"}

DATA, MORE = "weights/most of it.bin", "weights/deeper/rest.bin"
EXTERNAL = {"layers.1.weight": DATA, "head: weight": DATA, "unused": MORE}
"""Stored in files of folders beside the model: one that will be replaced, two that stay."""


def branch(name: str, scale: str) -> onnx.GraphProto:
    """A branch of the If: reads what the planted run makes, and a constant of the outer graph."""
    inner = numpy_helper.from_array(np.full((64, 4), 0.1, np.float32), "inner weight")
    nodes = [
        helper.make_node("Mul", ["y", scale], [f"{name} scaled"], name=f"{name}/Mul"),
        helper.make_node("MatMul", [f"{name} scaled", "inner weight"], [f"{name} out"], name="inner"),
    ]
    out = value(f"{name} out", ["batch", 4])
    return helper.make_graph(nodes, name, [], [out], [inner], doc_string=f"the {name} branch")


def function() -> onnx.FunctionProto:
    """Twice the first input plus the second one."""
    nodes = [
        helper.make_node("Add", ["a", "a"], ["aa"], name="in function"),
        helper.make_node("Add", ["aa", "b"], ["c"]),
    ]
    made = helper.make_function(
        "local.things", "TwiceAndAdd", ["a", "b"], ["c"], nodes, [helper.make_opsetid("", 17)]
    )
    made.doc_string = "2a + b"
    return made


def tricky_model() -> onnx.ModelProto:
    """x -> planted run -> y -> If, function, shared weight, head -> outputs."""
    model = onnx.ModelProto()
    model.CopyFrom(build(PLANTED).model)
    graph, rng = model.graph, np.random.default_rng(0)

    def add(op: str, inputs: list[str], output: str, **rest: Any) -> onnx.NodeProto:
        node = helper.make_node(op, inputs, [output], **rest)
        graph.node.append(node)
        return node

    def store(name: str, array: np.ndarray) -> None:
        graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))

    store("head: weight", rng.standard_normal((64, 8)))
    store("unused", rng.standard_normal(5))
    store("scale für alle", np.array(0.5))
    store("shared", rng.standard_normal((64, 64)))
    store("zero", np.array(0))
    store("default", rng.standard_normal(64))

    # Before and after the run in the list of nodes: order has to survive on both sides.
    graph.node.insert(0, helper.make_node("Greater", ["x", "default"], ["flags"], name="first: of all"))
    add("ReduceMean", ["x"], "mean", keepdims=0)
    add("Greater", ["mean", "zero"], "choose", name="choose")
    branches = {"then_branch": branch("then", "scale für alle"), "else_branch": branch("else", "default")}
    add("If", ["choose"], "chosen", name="if", **branches)
    add("TwiceAndAdd", ["y", "default"], "twice", name="call", domain="local.things")
    add("MatMul", ["twice", "shared"], "once", name="shared/first")
    add("MatMul", ["once", "shared"], "shared twice", name="shared/second")
    add(
        "Gemm",
        ["shared twice", "head: weight"],
        "logits ✓",
        name="head/Gemm",
        doc_string="the head",
        alpha=0.5,
    )
    graph.node[-1].metadata_props.add(key="namespace", value="model.head")

    del graph.input[:], graph.output[:]
    # `default` is an initializer too: a value that callers may override.
    graph.input.extend([value("x", ["batch", 64]), value("default", [64])])
    graph.output.extend([value("logits ✓", ["batch", 8]), value("chosen", ["batch", 4])])
    graph.output.append(value("flags", ["batch", 64], TensorProto.BOOL))
    graph.output[0].doc_string = "unnormalised"
    graph.input[0].type.denotation = "TENSOR"
    for name in ("layers.0.out", "y", "twice", "once"):
        graph.value_info.append(value(name, ["batch", 128 if name == "layers.0.out" else 64]))
    graph.doc_string = "a graph\nwith two lines"
    annotation = graph.quantization_annotation.add(tensor_name="twice")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale für alle")

    model.functions.append(function())
    model.opset_import.extend([helper.make_opsetid("local.things", 1), helper.make_opsetid("not.used", 3)])
    model.producer_version, model.domain, model.model_version = "1.2", "org.example", 42
    model.doc_string = "what a careless rewriter loses"
    model.metadata_props.add(key="author", value="Żółć")
    model.metadata_props.add(key="", value="")
    add_oddities(model)
    return model


ODD = ['{"json": [1, "two"]}', "a name: with spaces", "", "", "../../up", "<b>&"]
"""Names of nodes that nothing reads. (ONNX Runtime refuses the same one twice.)"""


def add_oddities(model: onnx.ModelProto) -> None:
    """What the format allows and few expect, none of which computes anything."""
    graph = model.graph
    strings = numpy_helper.from_array(np.array(["ä", "", "c\0d"], object), "strings")
    strings.doc_string = "three"
    strings.metadata_props.add(key="kind", value="labels")
    graph.initializer.append(strings)
    for number, name in enumerate(ODD):
        node = helper.make_node("Identity", ["strings"], [f"odd {number}"], name=name, doc_string="odd")
        node.metadata_props.add(key="number", value=str(number))
        graph.node.insert(number, node)
    constant = helper.make_node("Constant", [], ["words"], value_strings=["x", "y"])
    graph.node.append(constant)
    values = numpy_helper.from_array(np.array([1.5, -2], np.float32), "sparse")
    places = numpy_helper.from_array(np.array([1, 3], np.int64), "sparse places")
    graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [5]))
    graph.metadata_props.add(key="graph", value="yes")
    graph.value_info[0].doc_string = "of the first layer"
    training = model.training_info.add()
    training.algorithm.name = "descent"
    training.algorithm.node.append(helper.make_node("Step", ["w"], ["w'"], domain="not.known", lr=0.1))
    training.algorithm.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "rate"))
    training.update_binding.add(key="unused", value="w'")
    for message in (model, graph, graph.node[-1], graph.initializer[-1], graph.input[0]):
        message.MergeFromString(UNKNOWN)


UNKNOWN = b"\xca\xb8\x02\x05later"
"""Field 5001, five bytes: of a version of the format that is not known yet."""


def to_external(model: onnx.ModelProto, folder: Path) -> None:
    """Move some tensors into files of folders beside the model, behind some bytes that nobody reads."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for location in dict.fromkeys(EXTERNAL.values()):
        (folder / location).parent.mkdir()
        (folder / location).write_bytes(b"header" + bytes(58))
    for name, location in EXTERNAL.items():
        with (folder / location).open("ab") as file:
            offset, length = file.tell(), file.write(stored[name].raw_data)
        stored[name].ClearField("raw_data")
        stored[name].data_location = TensorProto.EXTERNAL
        for key, said in (("location", location), ("offset", offset), ("length", length)):
            stored[name].external_data.add(key=key, value=str(said))
    for name, location in EXTERNAL.items():
        checksum = hashlib.sha1((folder / location).read_bytes()).hexdigest()
        stored[name].external_data.add(key="checksum", value=checksum)


@pytest.fixture
def tricky(tmp_path: Path) -> Job:
    folder = tmp_path / "given"
    folder.mkdir()
    model = tricky_model()
    to_external(model, folder)
    return job(folder, model, build(PLANTED).snapshot, calibration(build(PLANTED), 600))


def compiled(made: Job, out: Path, *options: str) -> tuple[onnx.ModelProto, onnx.ModelProto, dict[str, Any]]:
    code, report = made.run(*FREE, *options, out=out)
    assert code == 0
    return (*(onnx.load(path, load_external_data=False) for path in (made.source, out)), report)


def exact(messages: Iterable[Any], keep: Callable[[str], bool] = lambda _: True) -> list[tuple[str, bytes]]:
    """Name and bytes of each message whose name is to be kept, in order."""
    return [(m.name, m.SerializeToString(deterministic=True)) for m in messages if keep(m.name)]


def test_everything_else_is_equal_byte_for_byte(tricky: Job, tmp_path: Path) -> None:
    before, after, report = compiled(tricky, tmp_path / "out.onnx")
    assert report["kept"] == ["region_000"]
    assert not REPLACED & {node.name for node in after.graph.node}

    stays = exact(before.graph.node, lambda name: name not in REPLACED)
    assert exact(after.graph.node, lambda name: "/decomp/" not in name) == stays
    stays = exact(before.graph.initializer, lambda name: name not in REPLACED_WEIGHTS)
    assert (
        exact(after.graph.initializer, lambda name: ".decomp" not in name and "/decomp" not in name) == stays
    )
    stays = exact(before.graph.value_info, lambda name: name not in REPLACED_TENSORS)
    assert exact(after.graph.value_info) == stays

    said = [(entry.key, entry.value) for entry in after.metadata_props]
    own = [(entry.key, entry.value) for entry in before.metadata_props]
    assert said[: len(own)] == own
    assert all(key.startswith("onnx_decomp.") for key, _ in said[len(own) :])

    for model in (before, after):  # what was compared above; all the rest has to be the same at once
        for field in (
            model.graph.node,
            model.graph.initializer,
            model.graph.value_info,
            model.metadata_props,
        ):
            del field[:]
    assert after.SerializeToString(deterministic=True) == before.SerializeToString(deterministic=True)


def test_new_nodes_stand_where_the_old_ones_stood(tricky: Job, tmp_path: Path) -> None:
    before, after, _ = compiled(tricky, tmp_path / "out.onnx")
    names = ["…" if "/decomp/" in node.name else node.name for node in after.graph.node]
    expected = ["…" if node.name in REPLACED else node.name for node in before.graph.node]
    assert list(dict.fromkeys(names)) == list(dict.fromkeys(expected))


def test_what_is_left_says_why(tricky: Job, tmp_path: Path) -> None:
    *_, report = compiled(tricky, tmp_path / "out.onnx")
    reasons = {(site["node"], site["graph"]): site["reason"] for site in report["sites"]}
    assert reasons == {
        ("layers.0/MatMul", "main"): "applied",
        ("layers.1/MatMul", "main"): "applied",
        ("inner", "if:if/then"): "not-better-than-shuffled",
        ("inner", "if:if/else"): "not-better-than-shuffled",
        ("shared/first", "main"): "not-better-than-shuffled",
        ("shared/second", "main"): "not-better-than-shuffled",
        ("head/Gemm", "main"): "not-better-than-shuffled",
    }


@pytest.mark.parametrize("choose", [True, False])
@pytest.mark.parametrize("override", [True, False])
def test_the_output_stands_alone_and_agrees(
    choose: bool, override: bool, tricky: Job, tmp_path: Path
) -> None:
    """With its data beside it, and without the input's folder; with and without the optional input."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    compiled(tricky, elsewhere / "out.onnx")
    x = np.random.default_rng(2).standard_normal((33, 64)) + (0.5 if choose else -0.5)
    feeds = {"x": x.astype(np.float32)}
    if override:
        feeds["default"] = np.linspace(-1, 1, 64, dtype=np.float32)
    expected = open_session(tricky.source).run(feeds)
    shutil.rmtree(tricky.folder)
    found = open_session(elsewhere / "out.onnx").run(feeds)
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-4, err_msg=name)
    assert {str(p.relative_to(elsewhere)) for p in elsewhere.rglob("*.*")} == {"out.onnx", DATA, MORE}


def test_nothing_kept_is_the_input_byte_for_byte(tricky: Job, tmp_path: Path) -> None:
    out = tmp_path / "copy" / "out.onnx"
    out.parent.mkdir()
    code, report = tricky.run(*FREE, "--exclude", ".", out=out)
    assert code == 0
    assert report["kept"] == []
    for name, copied in (("in.onnx", out), (DATA, out.parent / DATA), (MORE, out.parent / MORE)):
        digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (tricky.folder / name, copied)]
        assert digests[0] == digests[1], name
    assert report["output"]["sha256"] == report["input"]["sha256"]


def test_beside_the_input_no_data_is_copied(tricky: Job) -> None:
    data = tricky.folder / DATA
    before = data.stat()
    compiled(tricky, tricky.folder / "out.onnx")
    after = data.stat()
    assert (before.st_ino, before.st_mtime_ns, before.st_size) == (
        after.st_ino,
        after.st_mtime_ns,
        after.st_size,
    )
    assert {str(p.relative_to(tricky.folder)) for p in data.parent.rglob("*.*")} == {DATA, MORE}


def test_what_cannot_run_is_a_copy(tmp_path: Path) -> None:
    """Operators of unknown domains, and names that ONNX Runtime refuses: nothing can be measured."""
    model = tricky_model()
    model.opset_import.append(helper.make_opsetid("vendor.secret", 1))
    for _ in range(2):
        model.graph.node.append(
            helper.make_node(
                "Mystery", ["y"], ["unknown"], name="the same twice", domain="vendor.secret", a=[1.5]
            )
        )
    model.graph.node[-1].output[0] = "unknown too"
    made = job(tmp_path, model, build(PLANTED).snapshot, {})
    code, report = made.run(*FREE, calib=False)
    assert code == 0
    assert made.out.read_bytes() == made.source.read_bytes()
    assert {"cannot-verify"} <= set(each(report, "reason"))
    assert report["kept"] == []


def test_names_of_new_tensors_avoid_the_models_own(tmp_path: Path) -> None:
    """The model already uses the very names that a rewrite would give, one of them in a branch."""
    planted = build(PLANTED)
    model = onnx.ModelProto()
    model.CopyFrom(planted.model)
    taken = "layers.0.weight.decomp.block_00"
    model.graph.initializer.append(numpy_helper.from_array(np.ones(64, np.float32), taken))
    model.graph.node.append(
        helper.make_node("Add", ["y", taken], ["layers.0/MatMul/decomp/Split_output_0"], name="uses them")
    )
    model.graph.output.append(value("layers.0/MatMul/decomp/Split_output_0", ["batch", 64]))
    feeds = {"x": np.random.default_rng(3).standard_normal((200, 64)).astype(np.float32)}
    made = job(tmp_path, model, planted.snapshot, feeds)
    code, report = made.run(*FREE)
    assert code == 0
    assert report["kept"]
    assert each(report, "decision") == ["split", "split"]
    after = onnx.load(made.out)
    onnx.checker.check_model(after, full_check=True)
    names = [t.name for t in after.graph.initializer]
    assert len(names) == len(set(names))
    assert change(model, after, feeds) < 1e-4
