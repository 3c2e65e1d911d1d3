"""Tiny models that several test files share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = Sequence[int | str | None]


def value(name: str, shape: Shape, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: dict[str, np.ndarray] | None = None,
    opset: int = 17,
) -> onnx.ModelProto:
    stored = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), stored)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", opset)])


def mlp(width: int = 6, batch: int | str = "N", seed: int = 0) -> onnx.ModelProto:
    """x [batch, width] -> MatMul W1 -> Relu -> MatMul W2 -> y [batch, width]; `h` and `r` are inside."""
    rng = np.random.default_rng(seed)
    weights = {name: rng.standard_normal((width, width)).astype(np.float32) for name in ("W1", "W2")}
    nodes = [
        helper.make_node("MatMul", ["x", "W1"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "W2"], ["y"], name="second"),
    ]
    return model(nodes, [value("x", [batch, width])], [value("y", [batch, width])], weights)


def weight(proto: onnx.ModelProto, name: str) -> np.ndarray:
    return next(numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == name)


def write(proto: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def write_external(proto: onnx.ModelProto, path: Path, data: str = "w.bin") -> Path:
    """The model at `path` with all its initializers in the file `data` beside it."""
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    onnx.save_model(copy, path, save_as_external_data=True, location=data, size_threshold=0)
    return path
