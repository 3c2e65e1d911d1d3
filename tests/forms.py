"""Models whose products are written in every form that exporters use, and what has to hold once they are compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from models.planted import Planted, PlantedModel
from onnx_decomp.compiler import decompose
from onnx_decomp.options import Options
from onnx_decomp.runtime import open_session

CLEAR = Planted((32, 64, 32), off="zero", gain=3)
"""Four blocks, and nothing at all between them."""

OPSETS = (9, 11, 13, 17, 21)


@dataclass
class Graph:
    """A model under construction: x [batch, K] float -> layers -> y."""

    opset: int
    dtype: Any = np.float32
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    stored: dict[str, NDArray[Any]] = field(default_factory=dict)

    def add(self, op: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        output = f"t{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op, list(inputs), [output], name or f"{op}_{output}", **attributes)
        )
        return output

    def store(self, name: str, array: NDArray[Any]) -> str:
        self.stored[name] = array
        return name

    def shaped(self, op: str, tensor: str, axes: list[int]) -> str:
        """Squeeze or Unsqueeze: axes are an attribute before opset 13, and an input from there on."""
        if self.opset < 13:
            return self.add(op, tensor, axes=axes)
        return self.add(op, tensor, self.store(f"{tensor}.axes", np.array(axes)))

    def model(self, width_in: int, width_out: int, ir_version: int = 0) -> onnx.ModelProto:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        self.nodes[-1].output[0] = "y"
        graph = helper.make_graph(
            self.nodes,
            "everywhere",
            [helper.make_tensor_value_info("x", kind, ["batch", width_in])],
            [helper.make_tensor_value_info("y", kind, ["batch", width_out])],
            [numpy_helper.from_array(array, name) for name, array in self.stored.items()],
        )
        if ir_version == 3:
            graph.input.extend(
                helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in graph.initializer
            )
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=ir_version or (10 if self.opset >= 19 else 8)
        )


Layer = Callable[[Graph, str, str, NDArray[Any], NDArray[Any]], str]
"""Adds y = x W + b to a graph: (graph, name, x, W [K, N], b [N]) -> y."""


def matmul(graph: Graph, name: str, x: str, operand: str, b: NDArray[Any]) -> str:
    product = graph.add("MatMul", x, operand, name=f"{name}/MatMul")
    return graph.add("Add", product, graph.store(f"{name}.bias", b), name=f"{name}/Add")


def plain(graph: Graph, name: str, x: str, w: NDArray[Any], b: NDArray[Any]) -> str:
    return matmul(graph, name, x, graph.store(f"{name}.weight", w), b)


def cast_from(kind: Any) -> Layer:
    def layer(graph: Graph, name: str, x: str, w: NDArray[Any], b: NDArray[Any]) -> str:
        stored = graph.store(f"{name}.weight", w.astype(kind))
        to = int(helper.np_dtype_to_tensor_dtype(np.dtype(graph.dtype)))
        return matmul(graph, name, x, graph.add("Cast", stored, to=to), b)

    return layer


def reshaped(graph: Graph, name: str, x: str, w: NDArray[Any], b: NDArray[Any]) -> str:
    """Four axes become two, as behind a Flatten of channels and pixels."""
    stored = graph.store(f"{name}.weight", w.reshape(-1, 2, 2, w.shape[1]))
    shape = graph.store(f"{name}.shape", np.array([-1, w.shape[1]]))
    return matmul(graph, name, x, graph.add("Reshape", stored, shape), b)


def ones(graph: Graph, name: str, x: str, w: NDArray[Any], b: NDArray[Any]) -> str:
    """[1, 1, N, K] -> Squeeze -> Identity -> Transpose -> Unsqueeze -> Squeeze, all on the way to one MatMul."""
    stored = graph.store(f"{name}.weight", np.ascontiguousarray(w.T)[None, None])
    tensor = graph.add("Identity", graph.shaped("Squeeze", stored, [0, 1]))
    tensor = graph.add("Transpose", tensor, perm=[1, 0])
    return matmul(graph, name, x, graph.shaped("Squeeze", graph.shaped("Unsqueeze", tensor, [1]), [1]), b)


def chain(graph: Graph, name: str, x: str, w: NDArray[Any], b: NDArray[Any]) -> str:
    """A Constant node in float16 -> Transpose of three axes -> Flatten -> Cast."""
    held = numpy_helper.from_array(np.ascontiguousarray(w.astype(np.float16).T)[:, None], f"{name}.weight")
    graph.nodes.append(helper.make_node("Constant", [], [f"{name}.weight"], f"{name}/C", value=held))
    tensor = graph.add("Transpose", f"{name}.weight", perm=[2, 1, 0])
    tensor = graph.add("Cast", graph.add("Flatten", tensor, axis=1), to=TensorProto.FLOAT)
    return matmul(graph, name, x, tensor, b)


def gemm(c: str = "row", **flags: Any) -> Layer:
    """Gemm with any flags; c: a row [N], one of two axes [1, N], or a column [batch, 1] that is computed."""

    def layer(graph: Graph, name: str, x: str, w: NDArray[Any], b: NDArray[Any]) -> str:
        column = graph.add("ReduceMean", x, axes=[1], keepdims=1) if c == "column" else ""
        stored = w / np.array(flags.get("alpha", 1), w.dtype)
        stored = graph.store(
            f"{name}.weight", np.ascontiguousarray(stored.T if flags.get("transB") else stored)
        )
        x = graph.add("Transpose", x, perm=[1, 0]) if flags.get("transA") else x
        bias = b / np.array(flags.get("beta", 1), b.dtype)
        bias = column or graph.store(f"{name}.bias", bias[None] if c == "row of two axes" else bias)
        return graph.add("Gemm", x, stored, bias, name=f"{name}/Gemm", **flags)

    return layer


def left_matmul(graph: Graph, name: str, x: str, w: NDArray[Any], b: NDArray[Any]) -> str:
    """y = (W^T x^T)^T + b"""
    stored = graph.store(f"{name}.weight", np.ascontiguousarray(w.T))
    product = graph.add("MatMul", stored, graph.add("Transpose", x, perm=[1, 0]), name=f"{name}/MatMul")
    product = graph.add("Add", product, graph.store(f"{name}.bias", b[:, None]), name=f"{name}/Add")
    return graph.add("Transpose", product, perm=[1, 0])


def left_gemm(graph: Graph, name: str, x: str, w: NDArray[Any], b: NDArray[Any]) -> str:
    """The same as a Gemm that transposes both, with a bias down the rows."""
    stored = graph.store(f"{name}.weight", w / np.array(2, w.dtype))
    bias = graph.store(f"{name}.bias", b[:, None])
    made = graph.add("Gemm", stored, x, bias, name=f"{name}/Gemm", transA=1, transB=1, alpha=2.0)
    return graph.add("Transpose", made, perm=[1, 0])


FORMS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "plain": (plain, OPSETS),
    "float16 behind Cast": (cast_from(np.float16), OPSETS),
    "double behind Cast": (cast_from(np.float64), (17,)),
    "bfloat16 behind Cast": (cast_from(ml_dtypes.bfloat16), (13, 21)),
    "Reshape": (reshaped, OPSETS),
    "Squeeze, Unsqueeze": (ones, OPSETS),
    "Constant, Transpose, Flatten, Cast": (chain, OPSETS),
    "transA": (gemm(transA=1), (9, 17)),
    "all flags": (gemm("row of two axes", transA=1, transB=1, alpha=0.5, beta=-2.0), (9, 21)),
    "C of one column": (gemm("column", alpha=2.0, beta=0.5), (9, 17)),
    "left MatMul": (left_matmul, OPSETS),
    "left Gemm": (left_gemm, (9, 17)),
}


def layered(layer: Layer, planted: PlantedModel, opset: int, dtype: Any = np.float32) -> Graph:
    """The planted layers in another form, with a Relu between."""
    graph, tensor = Graph(opset, dtype), "x"
    for number, (weight, bias) in enumerate(zip(planted.weights, planted.biases, strict=True)):
        assert bias is not None
        tensor = graph.add("Relu", tensor) if number else tensor
        tensor = layer(graph, f"layer_{number}", tensor, weight.astype(dtype), bias.astype(dtype))
    return graph


def samples(model: onnx.ModelProto, count: int, seed: int) -> dict[str, NDArray[Any]]:
    stored = {tensor.name for tensor in model.graph.initializer}
    rng = np.random.default_rng(seed)
    fed = [item for item in model.graph.input if item.name not in stored]
    kinds = [helper.tensor_dtype_to_np_dtype(item.type.tensor_type.elem_type) for item in fed]
    widths = [item.type.tensor_type.shape.dim[1].dim_value for item in fed]
    return {
        item.name: rng.standard_normal((count, width)).astype(kind)
        for item, kind, width in zip(fed, kinds, widths, strict=True)
    }


@dataclass(frozen=True)
class Compiled:
    """A model before and after, and the report."""

    before: onnx.ModelProto
    after: onnx.ModelProto
    report: dict[str, Any]
    bytes: tuple[int, int]

    @property
    def decisions(self) -> list[str]:
        return [site["decision"] for site in self.report["sites"]]

    @property
    def reasons(self) -> list[str]:
        return [site["reason"] for site in self.report["sites"]]


def compiled(model: onnx.ModelProto, folder: Path, **options: Any) -> Compiled:
    """Compile a model with calibration data, and check what holds whatever was decided."""
    np.savez(folder / "calib.npz", **samples(model, 400, 1))  # type: ignore[arg-type]
    chosen = Options(provider="cpu", latency_gate=False, objective="flops", **options)
    done = decompose(model, calib=folder / "calib.npz", options=chosen)
    after = done.model
    onnx.checker.check_model(after, full_check=True)
    sizes = [len(each.SerializeToString()) for each in (model, after)]
    check_interface(model, after)
    feeds = samples(model, 64, 9)
    expected, found = open_session(model).run(feeds)["y"], open_session(after).run(feeds)["y"]
    distance = np.linalg.norm((found - expected).astype(np.float64))
    assert distance <= 1.5 * chosen.tolerance * np.linalg.norm(expected.astype(np.float64))
    return Compiled(model, after, done.report, (sizes[0], sizes[1]))


def check_interface(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """What callers see is the same: in models of IR version 3, inputs but those that only list an initializer."""
    ends = []
    for model in (before, after):
        stored = {tensor.name for tensor in model.graph.initializer} if model.ir_version < 4 else set()
        ends.append([*(item for item in model.graph.input if item.name not in stored), *model.graph.output])
    assert ends[0] == ends[1]
    assert (before.ir_version, list(before.opset_import)) == (after.ir_version, list(after.opset_import))
    assert [(p.name, p.dtype, p.shape) for p in open_session(before).inputs] == [
        (p.name, p.dtype, p.shape) for p in open_session(after).inputs
    ]
