"""Products that stay: listed, with the reason. And the views that decide it, on anything that can be drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnx_decomp.passes.splitting import emit
from onnx_decomp.probe import Probe
from onnx_decomp.reasons import REASONS
from onnx_decomp.runtime import open_session
from onnx_decomp.sites import GraphIndex, Site, find_sites

# What is listed and stays


def stays(
    nodes: list[onnx.NodeProto], stored: dict[str, NDArray[Any]], opset: int = 21, **more: Any
) -> list[Site]:
    """The sites of a graph that is only read, never run."""
    graph = helper.make_graph(
        nodes,
        "stays",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, more.get("shape", ["n", 6]))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    model = helper.make_model(
        graph,
        ir_version=10,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("local", 1)],
        functions=more.get("functions", []),
    )
    return find_sites(GraphIndex.build(model, numpy_helper.to_array))


def node(op: str, inputs: str, output: str, **rest: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], name=f"{op}/{output}", **rest)


MS = {"domain": "com.microsoft"}
EIGHT = {"w": np.ones((6, 4), np.int8), "s": np.float32(0.1), "z": np.int8(0)}
FLOAT = {"w": np.ones((6, 4), np.float32)}
WIDE = {"w": np.ones((6, 12), np.float32), "b": np.zeros(12, np.float32)}

STAY: dict[str, tuple[str, tuple[int, int], list[onnx.NodeProto], dict[str, Any]]] = {
    "DequantizeLinear": (
        "quantized",
        (6, 4),
        [node("DequantizeLinear", "w s z", "d"), node("MatMul", "x d", "y")],
        EIGHT,
    ),
    "DequantizeLinear, Transpose": (
        "quantized",
        (4, 6),
        [
            node("DequantizeLinear", "w s", "d"),
            node("Transpose", "d", "t", perm=[1, 0]),
            node("Gemm", "x t", "y"),
        ],
        EIGHT,
    ),
    "Cast and Mul": (
        "quantized",
        (6, 4),
        [
            node("Cast", "w", "c", to=TensorProto.FLOAT),
            node("Sub", "c s", "d"),
            node("Mul", "s d", "e"),
            node("MatMul", "x e", "y"),
        ],
        EIGHT,
    ),
    "MatMulInteger": ("quantized", (6, 4), [node("MatMulInteger", "q w", "y")], EIGHT),
    "QLinearMatMul": ("quantized", (6, 4), [node("QLinearMatMul", "q s z w s z s z", "y")], EIGHT),
    "MatMulNBits": (
        "quantized",
        (32, 4),
        [node("MatMulNBits", "x w s", "y", K=32, N=4, **MS)],
        {"w": np.ones((4, 1, 16), np.uint8), "s": np.ones(4, np.float32)},
    ),
    "DynamicQuantizeMatMul": (
        "quantized",
        (6, 4),
        [node("DynamicQuantizeMatMul", "x w s z", "y", **MS)],
        EIGHT,
    ),
    "Conv": (
        "convolution",
        (6, 4),
        [node("Conv", "x w", "y")],
        {"w": np.ones((4, 6, 1, 1), np.float32)},
    ),
    "PackedAttention": (
        "fused-attention",
        (6, 12),
        [node("PackedAttention", "x w b offsets lengths", "y", num_heads=2, **MS)],
        WIDE,
    ),
    "Attention over a cache": (
        "attention-cache",
        (6, 12),
        [helper.make_node("Attention", ["x", "w", "b", "", "past"], ["y", "now"], num_heads=2, **MS)],
        WIDE,
    ),
    "Attention that keeps what it made": (
        "attention-cache",
        (6, 12),
        [helper.make_node("Attention", ["x", "w", "b"], ["y", "now"], num_heads=2, **MS)],
        WIDE,
    ),
    "Attention with a rotary embedding": (
        "attention-rotary",
        (6, 12),
        [node("Attention", "x w b", "y", num_heads=2, do_rotary=1, **MS)],
        WIDE,
    ),
    "Attention of a kind to come": (
        "fused-attention",
        (6, 12),
        [node("Attention", "x w b", "y", num_heads=2, softcap=1.0, **MS)],
        WIDE,
    ),
    "Attention whose heads don't come out even": (
        "fused-attention",
        (6, 12),
        [node("Attention", "x w b", "y", num_heads=3, **MS)],
        WIDE,
    ),
    "Attention with a mask of any kind": (
        "attention-mask",
        (6, 12),
        [node("Attention", "x w b computed", "y", num_heads=2, **MS)],
        WIDE,
    ),
    **{
        f"Attention with a mask {shape}": (
            "attention-mask",
            (6, 12),
            [node("Attention", "x w b m", "y", num_heads=2, **MS)],
            WIDE | {"m": np.ones(shape, np.int32)},
        )
        for shape in [(10,), (5, 1), (5, 1, 7, 7)]
    },
    "Attention with a quantized weight": (
        "quantized",
        (6, 12),
        [node("DequantizeLinear", "w s", "d"), node("Attention", "x d b", "y", num_heads=2, **MS)],
        WIDE | {"w": np.ones((6, 12), np.int8), "s": np.float32(0.1)},
    ),
    "FusedMatMul": ("fused-operator", (6, 4), [node("FusedMatMul", "x w", "y", **MS)], FLOAT),
    "whole numbers": (
        "weight-type",
        (6, 4),
        [node("MatMul", "q w", "y")],
        {"w": np.ones((6, 4), np.int32)},
    ),
    "cut up": (
        "reshaped-weight",
        (6, 4),
        [node("Reshape", "w shape", "r"), node("MatMul", "x r", "y")],
        {"w": np.ones(24, np.float32), "shape": np.array([6, 4])},
    ),
    "one axis more than x": (
        "reshaped-weight",
        (6, 4),
        [node("MatMul", "x w", "y")],
        {"w": np.ones((1, 6, 4), np.float32)},
    ),
    "left of something unknown": (
        "weight-on-the-left",
        (4, 5),
        [helper.make_node("Thing", ["x"], ["u"], domain="local"), node("MatMul", "w u", "y")],
        {"w": np.ones((5, 4), np.float32)},
    ),
    "nothing in it": (
        "empty-weight",
        (6, 0),
        [node("MatMul", "x w", "y")],
        {"w": np.ones((6, 0), np.float32)},
    ),
}


@pytest.mark.parametrize("name", STAY)
def test_what_stays_is_listed_with_the_reason(name: str) -> None:
    reason, shape, nodes, stored = STAY[name]
    (site,) = stays(nodes, stored)
    assert (site.obstacle, site.shape, site.weight, site.graph) == (reason, shape, "w", "main")
    assert reason in REASONS


@pytest.mark.parametrize(
    "attributes", [{"group": 2}, {"strides": [2, 2]}, {"pads": [1, 1, 1, 1]}, {"kernel": 3}], ids=str
)
def test_a_convolution_that_is_no_product_is_none(attributes: dict[str, Any]) -> None:
    size = attributes.pop("kernel", 1)
    weight = np.ones((4, 6 // attributes.get("group", 1), size, size), np.float32)
    assert stays([node("Conv", "x w", "y", **attributes)], {"w": weight}) == []


def body(nodes: list[onnx.NodeProto], output: str, stored: dict[str, NDArray[Any]]) -> onnx.GraphProto:
    made = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    return helper.make_graph(
        nodes, "inner", [], [made], [numpy_helper.from_array(a, n) for n, a in stored.items()]
    )


def test_sites_in_bodies_and_functions_say_where_they_are() -> None:
    """Weights of their own, from the graphs around them, behind a Cast, and handed over in a call.

    Those in bodies are looked at by themselves, later; a call is written out.
    """
    loop = body([node("Cast", "outer", "c", to=TensorProto.FLOAT), node("MatMul", "x c", "l")], "l", {})
    then = body(
        [node("MatMul", "x own", "a"), helper.make_node("Loop", ["m", "", "a"], ["b"], "again", body=loop)],
        "b",
        {"own": np.ones((6, 4), np.float32)},
    )
    other = body([node("Gemm", "x outer", "e", transB=1)], "e", {})
    function = helper.make_function(
        "local",
        "Dense",
        ["v", "weight"],
        ["z"],
        [node("Transpose", "weight", "t", perm=[1, 0]), node("MatMul", "v t", "z")],
        [helper.make_opsetid("", 21)],
    )
    nodes = [
        helper.make_node("If", ["flag"], ["i"], "choice", then_branch=then, else_branch=other),
        helper.make_node("Dense", ["x", "handed"], ["y"], "call", domain="local"),
    ]
    stored = {"outer": np.ones((5, 6), np.float16), "flag": np.array(True), "m": np.array(2)}
    stored["handed"] = np.ones((5, 6), np.float32)
    found = stays(nodes, stored, functions=[function])
    assert [(s.graph, s.node, s.weight, s.shape, s.obstacle) for s in found] == [
        ("if:choice/else", "Gemm/e", "outer", (6, 5), "nested-graph"),
        ("if:choice/then", "MatMul/a", "own", (6, 4), "nested-graph"),
        ("if:choice/then/loop:again/body", "MatMul/l", "outer", (5, 6), "nested-graph"),
        ("function:call", "call/MatMul/z", "handed", (6, 5), None),
    ]
    assert {"nested-graph", "function", "not-run"} <= REASONS.keys()


def test_calls_of_calls_end() -> None:
    """A function that calls itself is no valid model; one that calls another thousands of times may be."""
    call = helper.make_node("Dense", ["v", "weight"], ["z"], "again", domain="local")
    function = helper.make_function(
        "local", "Dense", ["v", "weight"], ["z"], [call] * 3, [helper.make_opsetid("", 21)]
    )
    nodes = [helper.make_node("Dense", ["x", "w"], ["y"], "call", domain="local")]
    assert stays(nodes, FLOAT, functions=[function]) == []


# Any chain, any flags


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[onnx.NodeProto], NDArray[Any]]:
    """A stored tensor, and operators that rearrange or convert it in any order."""
    rank = draw(st.integers(1, 4))
    array = np.arange(2**rank * 3, dtype=draw(st.sampled_from([np.float16, np.float32, np.float64])))
    array = array.reshape(*[2] * (rank - 1), 6)
    if draw(st.booleans()):
        array = array[None]
    shape, nodes = list(array.shape), list[onnx.NodeProto]()

    def add(op: str, **attributes: Any) -> None:
        source = f"c{len(nodes)}" if nodes else "w"
        nodes.append(helper.make_node(op, [source], [f"c{len(nodes) + 1}"], **attributes))

    for _ in range(draw(st.integers(1, 5))):
        op = draw(st.sampled_from(["Transpose", "Flatten", "Squeeze", "Unsqueeze", "Cast", "Identity"]))
        if op == "Transpose":
            order = draw(st.permutations(range(len(shape))))
            shape = [shape[at] for at in order]
            add(op, perm=order)
        elif op == "Flatten":
            axis = draw(st.integers(-len(shape), len(shape)))
            at = axis + len(shape) if axis < 0 else axis
            shape = [int(np.prod(shape[:at])), int(np.prod(shape[at:]))]
            add(op, axis=axis)
        elif op == "Squeeze":
            axes = [at for at, size in enumerate(shape) if size == 1]
            shape = [size for size in shape if size != 1]
            add(op, **({"axes": axes} if axes and draw(st.booleans()) else {}))
        elif op == "Unsqueeze":
            at = draw(st.integers(0, len(shape)))
            shape.insert(at, 1)
            add(op, axes=[at])
        elif op == "Cast":
            add(op, to=draw(st.sampled_from([TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16])))
        else:
            add(op)
    return nodes, array


@settings(max_examples=150, deadline=None)
@given(chains())
def test_a_constant_is_what_onnx_runtime_makes_of_it(
    drawn: tuple[list[onnx.NodeProto], NDArray[Any]],
) -> None:
    nodes, array = drawn
    output = onnx.ValueInfoProto(name=nodes[-1].output[0])
    graph = helper.make_graph(nodes, "g", [], [output], [numpy_helper.from_array(array, "w")])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 11)])
    source = GraphIndex.build(model, numpy_helper.to_array).resolve(output.name)
    assert source is not None
    expected = open_session(model).run({})[output.name]
    np.testing.assert_array_equal(source.array(numpy_helper.to_array), expected, strict=True)
    assert (source.shape, source.dtype) == (expected.shape, expected.dtype)
    assert source.storage.itemsize <= min(array.itemsize, expected.itemsize)
    if source.axes is not None:
        lengths = [int(np.prod([array.shape[axis] for axis in axes])) for axes in source.axes]
        assert lengths == list(expected.shape)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_gemm_is_the_product_that_it_is_seen_as(data: st.DataObject) -> None:
    """Either operand constant, any flags, C of any shape: the probe computes what the original does."""
    m, k, n = 3, 5, 4
    left = data.draw(st.booleans())
    flags = {name: data.draw(st.integers(0, 1)) for name in ("transA", "transB")}
    flags |= {name: data.draw(st.sampled_from([1.0, 0.5, -2.0, 0.0])) for name in ("alpha", "beta")}  # type: ignore[misc]
    a, b = ((k, m) if flags["transA"] else (m, k)), ((n, k) if flags["transB"] else (k, n))
    c = data.draw(st.sampled_from([None, (), (1,), (n,), (1, n), (m, 1), (m, n)]))
    fed = data.draw(st.booleans())
    rng = np.random.default_rng(0)
    arrays = {"a": rng.standard_normal(a), "b": rng.standard_normal(b), "c": rng.standard_normal(c or ())}
    arrays = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    x, w = ("b", "a") if left else ("a", "b")
    read = ["a", "b"] if c is None else ["a", "b", "c"]
    inputs = [x, "c"] if fed and c is not None else [x]
    graph = helper.make_graph(
        [helper.make_node("Gemm", read, ["y"], name="gemm", **flags)],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, arrays[name].shape) for name in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [m, n])],
        [numpy_helper.from_array(arrays[name], name) for name in read if name not in inputs],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
    index = GraphIndex.build(model, numpy_helper.to_array)
    (site,) = find_sites(index)
    assert (site.obstacle, site.weight, site.op, site.name) == (None, w, "Gemm", "gemm")
    assert emit(index, [], 13) == model, "normal form is a view, and is not written"
    feeds = {name: arrays[name] for name in inputs}
    found = Probe(index, [site], None).run(feeds, {})["y"]
    np.testing.assert_allclose(found, open_session(model).run(feeds)["y"], rtol=1e-5, atol=1e-5)
