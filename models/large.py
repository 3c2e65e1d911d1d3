"""Models of many gigabytes with a known answer, written to disk matrix by matrix.

    x -> [LayerNormalization -> MatMul, Add, Relu, MatMul, Add -> + x] for each layer -> y

Every layer consists of independent blocks: weights between blocks are exactly zero, those within are twice as large as
torch.nn.Linear draws them. The residual stream holds the blocks side by side, hidden units are in a random order.
Weights lie in several files of a folder beside the model, and so does a table that nothing reads; or, where there are
words, a row of it is added to x for each sample: the model then stays large whatever becomes of its layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Floats = NDArray[np.float32]
Labels = NDArray[np.intp]

SLAB = 2**13
"""Rows of a table that are made at once."""

GAIN = 2.0
"""Weights within blocks over what torch.nn.Linear draws."""


@dataclass(frozen=True)
class Large:
    """What to generate. Each layer holds two matrices of 4 width² bytes."""

    layers: int
    width: int = 4096
    blocks: int = 8
    file_bytes: int = 2**30
    """Weights in one external file, about."""
    seed: int = 0
    words: int = 0
    """Rows of the table that the input `words` looks up; 0: no such input."""

    @classmethod
    def of(cls, gigabytes: float, width: int = 4096, blocks: int = 8) -> Large:
        """As many layers as it takes to hold about so many GiB."""
        return cls(max(1, round(gigabytes * 2**30 / (8 * width**2))), width, blocks)

    @property
    def labels(self) -> Labels:
        """Block of each unit of the stream."""
        return np.arange(self.width) * self.blocks // self.width


class Files:
    """External files of a model, filled one after another."""

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most = folder, most
        self._number, self._end = -1, most
        (folder / "weights").mkdir(parents=True, exist_ok=True)

    def add(self, name: str, slabs: Iterable[Floats]) -> TensorProto:
        """Write a matrix, given as slabs of its rows, and give the tensor that refers to it."""
        if self._end >= self._most:
            self._number, self._end = self._number + 1, 0
        location, start, rows, columns = f"weights/part_{self._number:03d}.bin", self._end, 0, 0
        with (self._folder / location).open("ab" if start else "wb") as file:
            for slab in slabs:
                slab.tofile(file)
                self._end += slab.nbytes
                rows, columns = rows + len(slab), slab.shape[1]
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=(rows, columns))
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", start), ("length", self._end - start)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def write(spec: Large, folder: Path) -> Path:
    """Write the model of a spec as `model.onnx` in a folder; the same spec always gives the same bytes."""
    rng = np.random.default_rng(spec.seed)
    files = Files(folder, spec.file_bytes)
    nodes, stream = ([], "x") if spec.words == 0 else (_lookup(), "looked up")
    stored = [files.add("table", _table(spec, rng))]
    for number in range(spec.layers):
        made = "y" if number == spec.layers - 1 else f"layers.{number}.out"
        nodes += _nodes(f"layers.{number}", stream, made)
        stored += _tensors(spec, f"layers.{number}", rng, files)
        stream = made
    shape = ["batch", spec.width]
    inputs, outputs = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy")
    fed = [inputs]
    if spec.words:
        fed.append(helper.make_tensor_value_info("words", TensorProto.INT64, ["batch"]))
    graph = helper.make_graph(nodes, "large", fed, [outputs], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def calibration(spec: Large, samples: int) -> dict[str, NDArray[Any]]:
    """Standard normal inputs by name, and any words."""
    rng = np.random.default_rng(spec.seed + 1)
    found: dict[str, NDArray[Any]] = {"x": rng.standard_normal((samples, spec.width), np.float32)}
    return found | ({"words": rng.integers(0, spec.words, samples)} if spec.words else {})


def _lookup() -> list[onnx.NodeProto]:
    return [
        helper.make_node("Gather", ["table", "words"], ["rows"], "lookup/0_Gather"),
        helper.make_node("Add", ["x", "rows"], ["looked up"], "lookup/1_Add"),
    ]


def _table(spec: Large, rng: np.random.Generator) -> Iterator[Floats]:
    """The table in slabs."""
    if spec.words == 0:
        yield rng.standard_normal((spec.width, spec.width // 8), np.float32)
    for start in range(0, spec.words, SLAB):
        yield rng.standard_normal((min(SLAB, spec.words - start), spec.width), np.float32)


def _nodes(name: str, stream: str, made: str) -> list[onnx.NodeProto]:
    steps = [
        ("LayerNormalization", [stream, f"{name}.norm.weight", f"{name}.norm.bias"], f"{name}.normed"),
        ("MatMul", [f"{name}.normed", f"{name}.up.weight"], f"{name}.product"),
        ("Add", [f"{name}.product", f"{name}.up.bias"], f"{name}.hidden"),
        ("Relu", [f"{name}.hidden"], f"{name}.active"),
        ("MatMul", [f"{name}.active", f"{name}.down.weight"], f"{name}.lower"),
        ("Add", [f"{name}.lower", f"{name}.down.bias"], f"{name}.added"),
        ("Add", [stream, f"{name}.added"], made),
    ]
    return [
        helper.make_node(op, inputs, [output], f"{name}/{number}_{op}")
        for number, (op, inputs, output) in enumerate(steps)
    ]


def _tensors(spec: Large, name: str, rng: np.random.Generator, files: Files) -> list[TensorProto]:
    """What one layer stores; its hidden units are in an order of their own."""
    hidden = rng.permutation(spec.labels)
    vectors = {
        "norm.weight": np.ones(spec.width, np.float32),
        "norm.bias": np.zeros(spec.width, np.float32),
        "up.bias": _uniform(spec, rng, (spec.width,)),
        "down.bias": _uniform(spec, rng, (spec.width,)),
    }
    small = [numpy_helper.from_array(array, f"{name}.{key}") for key, array in vectors.items()]
    up = _blocked(spec, rng, spec.labels, hidden)
    down = _blocked(spec, rng, hidden, spec.labels)
    return [*small, files.add(f"{name}.up.weight", [up]), files.add(f"{name}.down.weight", [down])]


def _blocked(spec: Large, rng: np.random.Generator, rows: Labels, columns: Labels) -> Floats:
    """A matrix [width, width] that is zero but where rows and columns share a block."""
    weight = np.zeros((spec.width, spec.width), np.float32)
    for block in range(spec.blocks):
        at = np.ix_(np.flatnonzero(rows == block), np.flatnonzero(columns == block))
        weight[at] = GAIN * _uniform(spec, rng, (len(at[0]), at[1].shape[1]))
    return weight


def _uniform(spec: Large, rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """As torch.nn.Linear draws weights and biases."""
    return (2 * rng.random(shape, np.float32) - 1) / np.float32(np.sqrt(spec.width))
