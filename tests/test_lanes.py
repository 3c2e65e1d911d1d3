"""What runs between two layers in blocks runs in [G, T, n], and nothing is brought together before the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnx_decomp.axes import Region
from onnx_decomp.passes.folding import compose
from onnx_decomp.passes.splitting import emit
from onnx_decomp.program import Segment, Structure
from tests.forms import Graph
from tests.test_splitting import check_equal, index_of, only_region, rewrite_of

BLOCKS, WIDTH, HIDDEN = 4, 16, 32
MICROSOFT = "com.microsoft"

Link = Callable[[Graph, str], str]
"""From what the first layer makes, HIDDEN wide, to what the second one reads."""


def number(graph: Graph, value: float) -> str:
    return graph.store(f"c{len(graph.stored)}", np.array(value, graph.dtype))


def units(graph: Graph, width: int = HIDDEN) -> str:
    """One number for each unit."""
    rng = np.random.default_rng(len(graph.stored))
    return graph.store(f"u{len(graph.stored)}", rng.standard_normal(width).astype(graph.dtype))


def layer(graph: Graph, x: str, k: int, n: int, bias: bool = True) -> str:
    rng, name = np.random.default_rng(len(graph.nodes)), f"layer{len(graph.nodes)}"
    weight = graph.store(f"{name}.weight", (rng.standard_normal((k, n)) / np.sqrt(k)).astype(graph.dtype))
    x = graph.add("MatMul", x, weight, name=name)
    return graph.add("Add", x, units(graph, n)) if bias else x


def erf_gelu(graph: Graph, x: str) -> str:
    inner = graph.add("Erf", graph.add("Div", x, number(graph, np.sqrt(2))))
    return graph.add(
        "Mul", graph.add("Mul", x, graph.add("Add", inner, number(graph, 1))), number(graph, 0.5)
    )


def tanh_gelu(graph: Graph, x: str) -> str:
    cube = graph.add("Mul", graph.add("Pow", x, number(graph, 3)), number(graph, 0.044715))
    inner = graph.add("Tanh", graph.add("Mul", graph.add("Add", x, cube), number(graph, 0.79788)))
    outer = graph.add("Mul", x, number(graph, 0.5))
    return graph.add("Mul", outer, graph.add("Add", inner, number(graph, 1)))


def silu(graph: Graph, x: str) -> str:
    return graph.add("Mul", x, graph.add("Sigmoid", x))


def affine(graph: Graph, x: str) -> str:
    """A norm in inference: a factor and a summand for each unit; and a slope."""
    scaled = graph.add("Add", graph.add("Mul", x, units(graph)), units(graph))
    return graph.add("PRelu", scaled, units(graph))


def gate(graph: Graph, x: str) -> str:
    return graph.add("Mul", silu(graph, x), layer(graph, "x", WIDTH, HIDDEN))


def residual(graph: Graph, x: str) -> str:
    inner = graph.add("Relu", layer(graph, graph.add("Relu", x), HIDDEN, HIDDEN))
    return graph.add("Add", x, layer(graph, inner, HIDDEN, HIDDEN, bias=False))


def of_microsoft(op: str, bias: bool = False) -> Link:
    return lambda graph, x: graph.add(op, x, *([units(graph)] if bias else []), domain=MICROSOFT)


def one(op: str, **attributes: Any) -> Link:
    return lambda graph, x: graph.add(op, x, **attributes)


LINKS: dict[str, Link] = {
    "nothing": lambda _graph, x: x,
    "Relu": one("Relu"),
    "LeakyRelu": one("LeakyRelu", alpha=0.2),
    "Clip": lambda graph, x: graph.add("Clip", x, number(graph, -0.5), number(graph, 0.5)),
    "erf-Gelu": erf_gelu,
    "tanh-Gelu": tanh_gelu,
    "SiLU": silu,
    "factors, summands and slopes": affine,
    "gate": gate,
    "residual": residual,
    "Gelu": of_microsoft("Gelu"),
    "QuickGelu": of_microsoft("QuickGelu"),
    "FastGelu": of_microsoft("FastGelu"),
    "FastGelu with a bias": of_microsoft("FastGelu", bias=True),
    "BiasGelu": of_microsoft("BiasGelu", bias=True),
}


def network(link: Link) -> onnx.ModelProto:
    graph = Graph(17)
    layer(graph, link(graph, layer(graph, "x", WIDTH, HIDDEN)), HIDDEN, WIDTH)
    model = graph.model(WIDTH, WIDTH)
    model.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
    return model


def blocks_of(region: Region, uneven: bool) -> tuple[Segment, ...]:
    """Every layer in blocks; uneven: on hidden axes."""
    labels = {}
    for group, found in region.groups.items():
        shares = np.array([3, 2, 2, 1] if uneven and group in region.elastic else [1] * BLOCKS)
        labels[group] = np.repeat(np.arange(BLOCKS), shares * found.size // shares.sum()).astype(np.int32)
    structure = Structure(tuple(range(len(region.sites))), labels, BLOCKS, "exact", 0.0, 1.0)
    return tuple(replace(each, form="batched") for each in compose(region, [structure]))


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("name", LINKS)
def test_lanes_are_kept(name: str, uneven: bool) -> None:
    """One way in, one way out, and as many products as there were."""
    index = index_of(network(LINKS[name]))
    region = only_region(index)
    feeds = {"x": np.random.default_rng(1).standard_normal((5, WIDTH)).astype(np.float32)}
    rewrite = rewrite_of(index, region, blocks_of(region, uneven))
    written = check_equal(index, rewrite, feeds, 17, "cuda")
    found = Counter(node.op_type for node in written.graph.node)
    assert (found["Transpose"], found["Reshape"], found["Gather"]) == (2, 2, 0)
    assert found["MatMul"] == Counter(node.op_type for node in index.proto.graph.node)["MatMul"]


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("shape", [(1, WIDTH), (1, 1, WIDTH)])
def test_one_row_needs_no_transpose(shape: tuple[int, ...], uneven: bool) -> None:
    """Where the graph says that there is one: nothing changes places."""
    model = network(erf_gelu)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, shape))
    index = index_of(model)
    region = only_region(index)
    assert region.one_row
    feeds = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    rewrite = rewrite_of(index, region, blocks_of(region, uneven))
    found = Counter(node.op_type for node in check_equal(index, rewrite, feeds, 17, "cuda").graph.node)
    assert found["Transpose"] == 0
    assert found["Reshape"] == (2 if len(shape) == 2 else 4)


def test_rows_that_the_graph_leaves_open_are_not_one() -> None:
    assert not only_region(index_of(network(erf_gelu))).one_row


def optimized(model: onnx.ModelProto, file: Path) -> Counter[str]:
    """Operators that ONNX Runtime makes of it."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(file)
    options.log_severity_level = 3
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(file).graph.node)


def test_what_is_fused_stays_fused(tmp_path: Path) -> None:
    """ONNX Runtime finds the Gelu that the exporter wrote as five operators, and takes the first Transpose in."""
    index = index_of(network(erf_gelu))
    region = only_region(index)
    written = emit(index, [rewrite_of(index, region, blocks_of(region, False))], 17, "cuda")
    wanted = {"FusedMatMul": 1, "Add": 2, "Gelu": 1, "MatMul": 1, "Transpose": 1, "Reshape": 2}
    assert optimized(written, tmp_path / "optimized.onnx") == wanted
