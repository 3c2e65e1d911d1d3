"""Models made to hurt whoever opens them: refused in one line, quickly, and without the memory that they ask for."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper
from onnx.helper import make_node

from onnx_decomp import guards, model_io, trial, verify
from onnx_decomp.cli import main
from onnx_decomp.errors import InputError
from onnx_decomp.graph_index import GraphIndex
from onnx_decomp.inspection import inspect_model
from tests.small import mlp, model, value, write, write_external
from tests.workplace import CANNOT_VERIFY, INPUT, Capture

PLAIN = ["--provider", "cpu", "--no-latency-gate", "--quiet"]


def refused(folder: Path, proto: onnx.ModelProto, says: str, capsys: Capture, *more: str) -> None:
    """The command ends with 3 and one line, and writes nothing."""
    path = write(proto, folder / "in.onnx")
    assert main([str(path), str(folder / "out.onnx"), *PLAIN, *more]) == INPUT
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert says in lines[0]
    assert not (folder / "out.onnx").exists()


def beside(nodes: list[NodeProto], made: str, **weights: np.ndarray) -> onnx.ModelProto:
    """y = (x * largest entry of what the nodes make) @ w."""
    nodes = [
        *nodes,
        make_node("ReduceMax", [made], ["largest"], keepdims=0),
        make_node("Mul", ["x", "largest"], ["scaled"]),
        make_node("MatMul", ["scaled", "w"], ["y"], name="product"),
    ]
    weights |= {"w": np.eye(4, dtype=np.float32), "one": np.ones((1, 1), np.float32)}
    return model(nodes, [value("x", ["N", 4])], [value("y", ["N", 4])], weights)


# Sizes


def bomb(kind: str, inputs: list[str]) -> onnx.ModelProto:
    """A few bytes that make a tensor of 40 GB."""
    size = np.array([10**5, 10**5])
    weights = {"size": size, "ends": np.array([0, 0, *size]), "zero": np.array(0.0, np.float32)}
    return beside([make_node(kind, inputs, ["bomb"])], "bomb", **weights)


BOMBS = {
    "ConstantOfShape": ["size"],
    "Expand": ["one", "size"],
    "Tile": ["one", "size"],
    "Pad": ["one", "ends"],
    "Resize": ["one", "", "", "size"],
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_tensor_of_enormous_size(kind: str, tmp_path: Path, capsys: Capture) -> None:
    refused(tmp_path, bomb(kind, BOMBS[kind]), "tensor 'bomb' takes 400", capsys)


def counting(*limit: NodeProto, **weights: np.ndarray) -> onnx.ModelProto:
    """0, 1, 2 ... `end`, which the nodes make, or is a weight."""
    nodes = [
        make_node("Range", ["zero", "end", "step"], ["counted"]),
        make_node("Cast", ["counted"], ["c"], to=1),
    ]
    return beside([*limit, *nodes], "c", zero=np.array(0), step=np.array(1), **weights)


def test_shape_inference_runs_out_of_memory(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It computes what a Range holds, where it can."""
    monkeypatch.setattr("onnx_decomp.graph_index.INFERENCE", 2**27)
    refused(tmp_path, counting(end=np.array(10**10)), "is there a Range without end", capsys)


def test_a_first_run_that_takes_all_memory(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shape tells it; the trial in a process of its own does."""
    monkeypatch.setattr(guards, "MAX_TENSOR", 2**28)
    proto = counting(make_node("Mul", ["side", "side"], ["end"]), side=np.array(10**5))
    refused(tmp_path, proto, "takes more than 268435456 bytes", capsys)


def test_dims_without_end(tmp_path: Path, capsys: Capture) -> None:
    free = mlp()
    free.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 2**62
    refused(tmp_path, free, "tensor 'x' takes", capsys)
    for dims in ([-6, -6], [2**32, 2**32], [2**62, 6]):
        stored = mlp()
        stored.graph.initializer[0].dims[:] = dims
        refused(tmp_path, stored, "impossible dims", capsys)


def test_synthetic_inputs_that_no_memory_holds(tmp_path: Path, capsys: Capture) -> None:
    """One sample may be as large as is allowed, and 64 of it are not made up."""
    proto = model(
        [make_node("ReduceMean", ["x"], ["y"], axes=[1], keepdims=0)],
        [value("x", ["N", 2**30])],
        [value("y", ["N"])],
    )
    assert main([str(write(proto, tmp_path / "m.onnx")), str(tmp_path / "out.onnx"), *PLAIN]) == 0
    assert "samples of 'x' are too large" in capsys.readouterr().err


def test_an_axis_too_long_for_a_table_of_its_units(tmp_path: Path) -> None:
    """8 GiB of tensor are allowed, 16 GiB of element numbers for it are not made."""
    path = write(mlp(batch=2**28), tmp_path / "m.onnx")
    assert [site["node"] for site in inspect_model(path)["sites"]] == ["first", "second"]


def test_element_types_that_are_none(tmp_path: Path, capsys: Capture) -> None:
    stored, fed = mlp(), mlp()
    stored.graph.initializer[0].data_type = 1000
    fed.graph.input[0].type.tensor_type.elem_type = -1
    refused(tmp_path, stored, "element type 1000", capsys)
    refused(tmp_path, fed, "element type -1", capsys)


# Nesting


def function(name: str, body: str, times: int) -> onnx.FunctionProto:
    """a -> `body` applied again and again -> b."""
    names = ["a", *(f"t{n}" for n in range(times - 1)), "b"]
    domain = "" if body == "Relu" else "local"
    nodes = [make_node(body, [names[n]], [names[n + 1]], domain=domain) for n in range(times)]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, ["a"], ["b"], nodes, opsets)


def calling(*functions: onnx.FunctionProto) -> onnx.ModelProto:
    """y = the last function of x."""
    nodes = [make_node(functions[-1].name, ["x"], ["y"], domain="local")]
    proto = model(nodes, [value("x", ["N", 4])], [value("y", ["N", 4])])
    proto.functions.extend(functions)
    proto.opset_import.append(helper.make_opsetid("local", 1))
    return proto


def test_a_billion_laughs(tmp_path: Path, capsys: Capture) -> None:
    """Ten functions, each calls the one before ten times: ten thousand million nodes to whoever inlines them."""
    functions = [function("f0", "Relu", 10), *(function(f"f{n}", f"f{n - 1}", 10) for n in range(1, 10))]
    refused(tmp_path, calling(*functions), "call each other so often", capsys)
    guards.check_functions(calling(*functions[:5]), "small enough")


def test_functions_that_call_themselves(tmp_path: Path, capsys: Capture) -> None:
    refused(tmp_path, calling(function("f", "f", 1)), "calls itself", capsys)
    refused(tmp_path, calling(function("f", "g", 1), function("g", "f", 1)), "calls itself", capsys)


def test_graphs_within_graphs_within_graphs(tmp_path: Path, capsys: Capture) -> None:
    inner = helper.make_graph([make_node("Relu", ["x"], ["y"])], "g", [], [value("y", ["N", 4])])
    data = inner.SerializeToString()
    for _ in range(200):  # by hand: protobuf itself would refuse to build it
        attribute = field(1, b"then_branch") + field(6, data) + b"\xa0\x01\x05"
        data = field(1, field(4, b"If") + field(5, attribute))
    proto = mlp().SerializeToString() + field(7, data)
    path = tmp_path / "in.onnx"
    path.write_bytes(proto)
    assert main([str(path), str(tmp_path / "out.onnx"), *PLAIN]) == INPUT
    assert "not an ONNX model" in capsys.readouterr().err


def field(number: int, data: bytes) -> bytes:
    """One length-delimited field in protobuf's encoding."""
    size, length = len(data), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


def test_more_nodes_than_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of branches count."""
    monkeypatch.setattr(guards, "MAX_NODES", 4)
    path = write(mlp(), tmp_path / "m.onnx")
    model_io.load(path)
    branch = helper.make_graph([make_node("Relu", ["r"], ["z"])] * 2, "b", [], [value("z", [1])])
    proto = mlp()
    proto.graph.node.append(make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch))
    with pytest.raises(InputError, match="more than 4 nodes"):
        model_io.load(write(proto, path))


# Odd, and valid


def test_an_output_listed_twice(tmp_path: Path) -> None:
    proto = mlp()
    proto.graph.output.append(proto.graph.output[0])
    np.savez(tmp_path / "c.npz", x=np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32))
    line = [str(write(proto, tmp_path / "in.onnx")), str(tmp_path / "out.onnx"), *PLAIN]
    assert (
        main([*line, "--calib", str(tmp_path / "c.npz"), "--objective", "flops", "--tolerance", "0.05"]) == 0
    )


def test_a_product_with_a_vector(tmp_path: Path) -> None:
    """A constant one, which nobody reads: its entries are rows of W, told or not."""
    weights = {
        "w": np.eye(4, 8, dtype=np.float32),
        "b": np.ones(8, np.float32),
        "v": np.eye(8, dtype=np.float32),
    }
    nodes = [
        make_node("MatMul", ["x", "w"], ["p"], name="first"),
        make_node("Add", ["p", "b"], ["y"]),
        make_node("Relu", ["b"], ["vector"]),
        make_node("MatMul", ["vector", "v"], ["unread"], name="second"),
    ]
    proto = model(nodes, [value("x", ["N", 4])], [value("y", ["N", 8])], weights)
    np.savez(tmp_path / "c.npz", x=np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32))
    line = [str(write(proto, tmp_path / "in.onnx")), str(tmp_path / "out.onnx"), *PLAIN]
    line += ["--calib", str(tmp_path / "c.npz"), "--objective", "flops", "--tolerance", "0.05"]
    assert main(line) == 0


def test_numbers_that_overflow_inside(tmp_path: Path) -> None:
    """A Sigmoid hides that what enters it is infinite: nothing is computed from that."""
    for large in (1e30, 1e38):
        proto = beside([make_node("Identity", ["huge"], ["made"])], "made", huge=np.array(large, np.float32))
        del proto.graph.output[:]
        proto.graph.node[-1].output[0] = "h"
        proto.graph.node.extend(
            [
                make_node("MatMul", ["h", "w2"], ["h2"], name="second"),
                make_node("Sigmoid", ["h2"], ["y"]),
            ]
        )
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.full((4, 4), 1e8, np.float32), "w2"))
        proto.graph.output.append(value("y", ["N", 4]))
        np.savez(tmp_path / "c.npz", x=np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32))
        line = [str(write(proto, tmp_path / "in.onnx")), "--dry-run", *PLAIN]
        report = tmp_path / "r.json"
        assert main([*line, "--calib", str(tmp_path / "c.npz"), "--report", str(report)]) == 0
        assert {site["reason"] for site in json.loads(report.read_text())["sites"]} == {"overflow"}


# Never ending, crashing


def endless() -> onnx.ModelProto:
    """A Loop whose condition stays true."""
    body = helper.make_graph(
        [make_node("Identity", ["go"], ["on"]), make_node("Mul", ["s", "s"], ["t"])],
        "body",
        [value("i", [], TensorProto.INT64), value("go", [], TensorProto.BOOL), value("s", [1, 1])],
        [value("on", [], TensorProto.BOOL), value("t", [1, 1])],
    )
    return beside([make_node("Loop", ["", "yes", "one"], ["made"], body=body)], "made", yes=np.array(True))


def test_a_loop_without_end(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "FIRST_SECONDS", 0.3)
    path = write(endless(), tmp_path / "in.onnx")
    np.savez(tmp_path / "c.npz", x=np.ones((40, 4), np.float32))
    line = [str(path), str(tmp_path / "out.onnx"), *PLAIN]
    assert main([*line, "--calib", str(tmp_path / "c.npz")]) == CANNOT_VERIFY
    assert "a Loop without end" in capsys.readouterr().err
    assert main(line) == 0  # synthetic inputs are ours: what can't be verified is copied
    assert (tmp_path / "out.onnx").read_bytes() == path.read_bytes()
    assert main(["bench", str(path), str(path), "--provider", "cpu"]) == CANNOT_VERIFY
    assert "a Loop without end" in capsys.readouterr().err


def splitting_into_more_than_it_says() -> onnx.ModelProto:
    """The checker lets it pass, shape inference of some releases of onnx reads beyond the end of a list."""
    nodes = [make_node("Split", ["x"], ["a", "b", "c"], axis=-1, num_outputs=2)]
    outputs = [value(name, ["N", 2]) for name in "abc"]
    return model(nodes, [value("x", ["N", 6])], outputs, opset=18)


def test_axes_that_are_not_there(tmp_path: Path) -> None:
    """Of a weight that is cut up: the checker does not look at attributes."""
    nodes = [
        make_node("Split", ["both", "sizes"], ["w", "v"], axis=27),
        make_node("MatMul", ["x", "w"], ["p"]),
        make_node("MatMul", ["x", "v"], ["q"]),
        make_node("Add", ["p", "q"], ["y"]),
    ]
    stored = {"both": np.ones((6, 8), np.float32), "sizes": np.array([4, 4])}
    path = write(model(nodes, [value("x", ["N", 6])], [value("y", ["N", 4])], stored), tmp_path / "in.onnx")
    assert main([str(path), str(tmp_path / "out.onnx"), *PLAIN]) == 0
    assert main(["inspect", str(path)]) == 0


def test_a_model_that_crashes_native_code(tmp_path: Path) -> None:
    """Whatever release: this process lives on, and so does that of `inspect`."""
    path = write(splitting_into_more_than_it_says(), tmp_path / "in.onnx")
    assert main([str(path), str(tmp_path / "out.onnx"), *PLAIN]) in (0, INPUT)
    assert main(["inspect", str(path)]) in (0, INPUT)
    assert main(["bench", str(path), str(path), "--provider", "cpu", "--seconds", "0.01"]) in (
        0,
        INPUT,
        CANNOT_VERIFY,
    )
    assert main(
        [str(write(mlp(), tmp_path / "m.onnx")), str(tmp_path / "o.onnx"), *PLAIN, "--init", str(path)]
    )


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def fail() -> None:
    raise ValueError("shown by the caller, who meets it again")


def hoard() -> None:
    np.ones(2**28)


def sleep() -> None:
    signal.pause()


@pytest.mark.parametrize(
    ("action", "says"),
    [(crash, "crash (SIGSEGV)"), (hoard, "more than 1000000 bytes"), (sleep, "more than 1 s"), (fail, None)],
)
def test_a_trial(action: Callable[[], None], says: str | None, capfd: Capture) -> None:
    before = children()
    if says is None:
        trial.attempt(action, "it", 20, 10**6)
    else:
        with pytest.raises(InputError, match=says.replace("(", r"\(").replace(")", r"\)")):
            trial.attempt(action, "it", 1 if action is sleep else 20, 10**6)
    assert capfd.readouterr() == ("", "")
    assert children() == before, "no copy is left behind"


def children() -> set[str]:
    """Processes that this one has started, ended ones that nobody has waited for included."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            _state, parent, *_rest = stat.read_text().rpartition(")")[2].split()
            if int(parent) == os.getpid():
                found.add(stat.parent.name)
    return found


# Names


def test_names_that_are_no_text(tmp_path: Path, capsys: Capture) -> None:
    for field_of in (lambda m: m.graph.node[0], lambda m: m.graph.initializer[0], lambda m: m.graph.input[0]):
        proto = mlp()
        field_of(proto).name = "QQQQ"
        data = proto.SerializeToString().replace(b"QQQQ", b"\xff\xfe\xff\xfe")
        (tmp_path / "in.onnx").write_bytes(data)
        assert main(["inspect", str(tmp_path / "in.onnx")]) == INPUT
        assert "a name in the model is not text" in capsys.readouterr().err
    noted = mlp()
    noted.doc_string = "QQQQ"  # nothing reads it
    (tmp_path / "in.onnx").write_bytes(noted.SerializeToString().replace(b"QQQQ", b"\xff\xfe\xff\xfe"))
    assert main(["inspect", str(tmp_path / "in.onnx")]) == 0


HOSTILE = "\x1b[2J\x1b]0;owned\x07<script>alert(1)</script>{{7*7}}[red]\u202egnp\u2028" + "long" * 2000


@pytest.mark.parametrize("command", ["compile", "inspect", "explain", "error"])
def test_names_that_talk_to_terminals_and_browsers(command: str, tmp_path: Path, capsys: Capture) -> None:
    """From the model to whatever is shown: as escapes, in full or cut, never as they are."""
    proto = mlp()
    for item in (proto.graph.node[0], proto.graph.node[2]):
        item.name = HOSTILE + item.op_type
    if command == "error":
        proto.graph.node[0].input[0] = HOSTILE
    path, report, page = write(proto, tmp_path / "in.onnx"), tmp_path / "r.json", tmp_path / "r.html"
    code = main([str(path), "--dry-run", *PLAIN[:3], "-v", "--report", str(report), "--html", str(page)])
    assert code == (INPUT if command == "error" else 0)
    if command == "inspect":
        main(["inspect", str(path)])
    elif command == "explain":
        main(["explain", str(report), HOSTILE + "MatMul"])
    shown = capsys.readouterr()
    text = shown.err + shown.out + (page.read_text() if page.exists() else "")
    assert not set("\x1b\x07\u202e\u2028") & set(text)
    assert "\\x1b[2J" in text
    if command == "error":
        assert len(text) < 1000
    else:
        assert "<script>" not in page.read_text()
        assert "&lt;script&gt;" in page.read_text()
        assert "{{7*7}}" in page.read_text()


# External data


INJECTED = {
    "__class__": "os.system",
    "__dict__": "x",
    "basepath": "/etc",
    "path": "/etc/passwd",
    "to_array": "x",
    "offset ": "99",
}


def test_attributes_are_not_injected(tmp_path: Path) -> None:
    """Readers that set whatever key they find as an attribute could be told anything."""
    path = write_external(mlp(), tmp_path / "m.onnx")
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for key, text in INJECTED.items():
            tensor.external_data.add(key=key, value=text)
    file = model_io.load(write(proto, path))
    for tensor in file.proto.graph.initializer:
        np.testing.assert_array_equal(model_io.read_tensor(file, tensor), stored(mlp(), tensor.name))
    assert len(GraphIndex.build(file.proto, lambda t: model_io.read_tensor(file, t)).nodes) == 3


def stored(proto: onnx.ModelProto, name: str) -> np.ndarray:
    return next(onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == name)


@pytest.mark.parametrize("key", ["location", "offset", "length"])
def test_an_entry_given_twice(key: str, tmp_path: Path, capsys: Capture) -> None:
    """One reader takes the first, another the last: what was checked would not be what is read."""
    path = write_external(mlp(), tmp_path / "w.onnx")
    proto = onnx.load(path, load_external_data=False)
    entries = proto.graph.initializer[0].external_data
    values = {entry.key: entry.value for entry in entries}
    entries.insert(0, onnx.StringStringEntryProto(key=key, value={"location": "/etc/passwd"}.get(key, "0")))
    assert values["location"] == "w.bin"
    refused(tmp_path, proto, "twice", capsys)


def test_a_location_too_long_for_any_folder(tmp_path: Path, capsys: Capture) -> None:
    path = write_external(mlp(), tmp_path / "m.onnx")
    proto = onnx.load(path, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        entry.value = "a" * 5000 if entry.key == "location" else entry.value
    refused(tmp_path, proto, "File name too long", capsys)
