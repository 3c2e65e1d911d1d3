"""What the graph holds: canonical views of every way to write an affine layer, and runs that share hidden axes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_decomp import Options, decompose
from onnx_decomp.axes import find_regions
from onnx_decomp.errors import InputError
from onnx_decomp.runtime import open_session
from onnx_decomp.sites import GraphIndex, find_sites, read_affine

RNG = np.random.default_rng(0)
K, N = 6, 4
W = RNG.standard_normal((K, N)).astype(np.float32)
B = RNG.standard_normal(N).astype(np.float32)


def model(
    nodes: list[onnx.NodeProto], tensors: dict[str, np.ndarray], x: list[int | str], y: list[int | str]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def index_of(proto: onnx.ModelProto) -> GraphIndex:
    return GraphIndex.build(proto, numpy_helper.to_array)


CASES = {
    "gemm": ([helper.make_node("Gemm", ["x", "w", "b"], ["y"])], {"w": W, "b": B}),
    "gemm without bias": ([helper.make_node("Gemm", ["x", "w"], ["y"])], {"w": W}),
    "gemm transB": ([helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)], {"w": W.T, "b": B}),
    "gemm alpha beta": (
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], alpha=0.5, beta=-2.0)],
        {"w": W, "b": B},
    ),
    "gemm scalar bias": ([helper.make_node("Gemm", ["x", "w", "b"], ["y"])], {"w": W, "b": B[:1]}),
    "gemm row bias": ([helper.make_node("Gemm", ["x", "w", "b"], ["y"])], {"w": W, "b": B[None]}),
    "matmul": ([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": W}),
    "bias first": (
        [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["b", "p"], ["y"])],
        {"w": W, "b": B},
    ),
    "transpose": (
        [
            helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "t"], ["y"]),
        ],
        {"w": W.T},
    ),
    "transpose twice, identity": (
        [
            helper.make_node("Transpose", ["w"], ["t"]),
            helper.make_node("Identity", ["t"], ["i"]),
            helper.make_node("Gemm", ["x", "i"], ["y"], transB=1),
        ],
        {"w": W},
    ),
    "constant": (
        [
            helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(W)),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_canonical_view_is_what_onnx_runtime_computes(name: str) -> None:
    nodes, tensors = CASES[name]
    proto = model(nodes, tensors, ["n", K], ["n", N])
    index = index_of(proto)
    (site,) = find_sites(index)
    assert (site.shape, site.obstacle, site.input, site.output) == ((K, N), None, "x", "y")
    affine = read_affine(index, site)
    x = RNG.standard_normal((5, K)).astype(np.float32)
    bias = 0.0 if affine.bias is None else affine.bias
    np.testing.assert_allclose(open_session(proto).run({"x": x})["y"], x @ affine.weight + bias, rtol=1e-5)


def test_uses_of_a_shared_weight_are_one_region_or_stay() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    index = index_of(model(nodes, {"w": W[:4]}, ["n", 4], ["n", 4]))
    (region,) = find_regions(index, find_sites(index))
    assert region.ends == ((0, 0), (0, 0)), "one order for rows and columns"
    nodes[1] = helper.make_node("Gemm", ["h", "w"], ["y"], alpha=2.0)
    sites = find_sites(index_of(model(nodes, {"w": W[:4]}, ["n", 4], ["n", 4])))
    assert [site.obstacle for site in sites] == ["shared-weight"] * 2


def test_an_add_belongs_to_the_site_only_if_nothing_else_sees_the_product() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["q"]),
        helper.make_node("Mul", ["p", "q"], ["y"]),
    ]
    (site,) = find_sites(index_of(model(nodes, {"w": W, "b": B}, ["n", K], ["n", N])))
    assert (site.bias, site.output) == (None, "p")


def test_nan_weights_are_refused_by_name() -> None:
    broken = W.copy()
    broken[1, 2] = np.nan
    index = index_of(
        model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": broken}, ["n", K], ["n", N])
    )
    with pytest.raises(InputError, match="'w' holds NaN"):
        read_affine(index, find_sites(index)[0])


def run_of(link: list[onnx.NodeProto], tensors: dict[str, np.ndarray]) -> list[tuple[int, ...]]:
    """Sizes of the regions of x -> MatMul -> link from h to a -> MatMul -> y."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        *link,
        helper.make_node("MatMul", ["a", "w2"], ["y"]),
    ]
    weights = {"w1": W, "w2": np.ascontiguousarray(W.T)}
    index = index_of(model(nodes, weights | tensors, ["n", K], ["n", K]))
    return [tuple(site.index for site in region.sites) for region in find_regions(index, find_sites(index))]


TOGETHER, APART = [(0, 1)], [(0,), (1,)]

LINKS = {
    "relu": ([helper.make_node("Relu", ["h"], ["a"])], {}, TOGETHER),
    "scale per unit": ([helper.make_node("Mul", ["h", "s"], ["a"])], {"s": B}, TOGETHER),
    "swish": (
        [helper.make_node("Sigmoid", ["h"], ["g"]), helper.make_node("Mul", ["h", "g"], ["a"])],
        {},
        TOGETHER,
    ),
    "clip": (
        [helper.make_node("Clip", ["h", "lo", "hi"], ["a"])],
        {"lo": np.float32(0), "hi": np.float32(6)},
        TOGETHER,
    ),
    "row per unit": ([helper.make_node("Mul", ["s", "h"], ["a"])], {"s": B[None]}, TOGETHER),
    "lifts the rank": ([helper.make_node("Mul", ["h", "s"], ["a"])], {"s": B[None, None]}, APART),
    "softmax": ([helper.make_node("Softmax", ["h"], ["a"], axis=-1)], {}, APART),
    "norm": ([helper.make_node("LayerNormalization", ["h", "s"], ["a"])], {"s": B}, APART),
    "residual": (
        [helper.make_node("MatMul", ["x", "w3"], ["r"]), helper.make_node("Add", ["h", "r"], ["a"])],
        {"w3": W + 1},
        [(0, 1, 2)],
    ),
    "values across samples": (
        [helper.make_node("Mul", ["h", "s"], ["a"])],
        {"s": np.ones((3, 1), np.float32)},
        TOGETHER,
    ),
}


@pytest.mark.parametrize("name", LINKS)
def test_runs_end_where_units_mix(name: str) -> None:
    link, tensors, expected = LINKS[name]
    assert run_of(link, tensors) == expected


def test_a_graph_output_in_between_pins_the_axis_and_is_an_exit() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w1"], ["h"]), helper.make_node("MatMul", ["h", "w2"], ["y"])]
    proto = model(nodes, {"w1": W, "w2": np.ascontiguousarray(W.T)}, ["n", K], ["n", K])
    (region,) = find_regions(index_of(proto), find_sites(index_of(proto)))
    assert (region.exits, region.elastic) == (("y",), {1})
    proto.graph.output.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["n", N]))
    (region,) = find_regions(index_of(proto), find_sites(index_of(proto)))
    assert (region.exits, region.elastic) == (("h", "y"), frozenset())
    assert region.groups[1].pinned == "graph-output"


@pytest.mark.parametrize("opset", [6, 7])
def test_products_of_old_operators_stay(opset: int) -> None:
    """Before opset 7 nothing broadcasts: there is no way to add a bias that ONNX Runtime would run."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    made = model(nodes, {"w": np.eye(N, dtype=np.float32)}, ["n", N], ["n", N])
    made.opset_import[0].version = opset
    (site,) = find_sites(index_of(made))
    assert site.obstacle == ("old-opset" if opset < 7 else None)
    result = decompose(made, options=Options(provider="cpu", latency_gate=False))
    assert not result.changed
    assert result.model is made
