"""Predicted time of each form of a layer, in microseconds: what the plan goes by before anything is measured.

A few parameters for each provider and type, from tables (tables/*.json; those for CUDA are a roofline until they are
measured). `onnx-decomp bench --calibrate` fits them to the machine that it runs on. They rank forms; the latency gate
measures the one that ranks first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from onnx_decomp.errors import InputError

SCHEMA = "onnx-decomp-cost/1"

Layer = Sequence[tuple[int, ...]]
"""The blocks of one layer, each by the widths it passes through: inputs, the rank between where it is written as two
products, outputs."""


def width_in(layer: Layer) -> int:
    return sum(widths[0] for widths in layer)


def width_out(layer: Layer) -> int:
    return sum(widths[-1] for widths in layer)


def products(layer: Layer) -> list[tuple[int, int]]:
    """Every product of the layer, inputs x outputs."""
    return [product for widths in layer for product in pairwise(widths)]


def _weights(layers: Sequence[Layer]) -> int:
    return sum(k * n for layer in layers for k, n in products(layer))


class CostModel(Protocol):
    """Microseconds for T rows. Sizes count columns."""

    def in_graph(self) -> CostModel:
        """Of runs that are recorded and started as a whole, where there are such."""

    def dense(self, T: int, K: int, N: int) -> float:
        """One MatMul with its bias."""

    def chain(self, T: int, layers: Sequence[Layer]) -> float:
        """Split, a chain of products (two where a block is factored) for each block through all layers, Concat."""

    def batched(self, T: int, layers: Sequence[Layer], one_row: bool = False) -> float:
        """Transpose, one MatMul [G, k, n] with its bias for each layer of equal blocks, Transpose.

        one_row: the graph says so; Reshapes, which move nothing, do for both Transposes.
        """

    def gather(self, T: int, width: int, run: int) -> float:
        """Reordering `width` columns that move in runs of `run`."""


@dataclass(frozen=True)
class CPU:
    """One thread."""

    flops: float
    """Per microsecond, in a large MatMul."""
    node: float
    """Microseconds of one more operator in a small model; in large ones it is more, but products take all the time."""
    copy: float
    """Microseconds to move one element in Split, Concat or Transpose."""
    stream: float
    """Bytes of weights per microsecond: what bounds a single row."""
    column: float
    """Microseconds to move one element when single columns are gathered, as rows between two Transposes."""

    def in_graph(self) -> CPU:
        return self

    def dense(self, T: int, K: int, N: int) -> float:
        return self.node + self._product(T, K * N, 8)

    def chain(self, T: int, layers: Sequence[Layer]) -> float:
        nodes = sum(len(products(layer)) + len(layer) for layer in layers) - len(layers[0]) + 2
        moved = self.copy * T * (width_in(layers[0]) + width_out(layers[-1]))
        return self.node * nodes + moved + self._product(T, _weights(layers), 8)

    def batched(self, T: int, layers: Sequence[Layer], one_row: bool = False) -> float:
        # Two Reshapes and a Transpose around MatMul, bias and, between layers, activation; the first Transpose becomes
        # a part of the MatMul, the bias none.
        nodes = 3 * len(layers) + (1 if one_row else 2)
        moved = sum(width_out(layer) for layer in layers) + (0 if one_row else width_in(layers[0]))
        # Batched weights are packed anew at every run: three times the overhead of a small T.
        return self.node * nodes + self.copy * T * moved + self._product(T, _weights(layers), 24)

    def gather(self, T: int, width: int, run: int) -> float:
        return 3 * self.node + T * width * (self.column / run + self.copy)

    def _product(self, T: int, weights: int, overhead: float) -> float:
        """Time of products: FLOPs with an overhead for few rows, or the weights' way from memory."""
        return max(
            2 * T * weights / self.flops * (1 + overhead / T) if T > 1 else 0.0, 4 * weights / self.stream
        )


@dataclass(frozen=True)
class CUDA:
    """One GPU."""

    flops: float
    """Per microsecond, in a large MatMul."""
    bandwidth: float
    """Bytes per microsecond for operands."""
    copies: float
    """Bytes per microsecond of Split, Concat and Transpose."""
    kernel: float
    """Microseconds between kernels started one by one."""
    recorded: float
    """The same where a run was recorded as a CUDA graph and is started as a whole."""
    element: float
    """Bytes."""

    def in_graph(self) -> CUDA:
        return replace(self, kernel=self.recorded)

    def dense(self, T: int, K: int, N: int) -> float:
        return self.product(T, 1, K, N) + self.moved(T * N)

    def chain(self, T: int, layers: Sequence[Layer]) -> float:
        # The last bias is added once, behind the Concat.
        inside = sum(self.product(T, 1, k, n) for layer in layers for k, n in products(layer))
        inside += sum(self.moved(T * widths[-1]) for layer in layers[:-1] for widths in layer)
        return self.moved(T * width_in(layers[0])) + inside + 2 * self.moved(T * width_out(layers[-1]))

    def batched(self, T: int, layers: Sequence[Layer], one_row: bool = False) -> float:
        # The first Transpose becomes a part of the MatMul.
        inside = sum(
            self.product(T, len(layer), *layer[0]) + self.moved(T * width_out(layer)) for layer in layers
        )
        return inside + (0.0 if one_row else self.moved(T * width_out(layers[-1])))

    def gather(self, T: int, width: int, run: int) -> float:
        return self.moved(T * width) * (
            1 if run * self.element >= 32 else 2
        )  # short runs waste half a sector

    def product(self, T: int, G: int, k: int, n: int) -> float:
        """[G, T, k] times [G, k, n]."""
        read = self.element * G * (k * n + T * (k + n)) / self.bandwidth
        return max(self.kernel, 2 * T * G * k * n / self.flops, read)

    def moved(self, elements: int) -> float:
        """One kernel that reads and writes so many elements."""
        return max(self.kernel, 2 * self.element * elements / self.copies)


KINDS: Mapping[str, type[CPU] | type[CUDA]] = {"cpu": CPU, "cuda": CUDA}


def model_for(provider: str, dtype: str = "float32", path: Path | None = None) -> CostModel:
    """The model of a provider for products of a type, from the user's own table or the one that comes along.

    A type that has no table takes that of the first one. Raises InputError for a file that is no such table.
    """
    return _choose(_shipped(provider) if path is None else read(path, provider), provider, dtype)


def cpu() -> CostModel:
    return model_for("cpu")


def cuda() -> CostModel:
    return model_for("cuda", "float16")


@cache
def _shipped(provider: str) -> dict[str, Any]:
    text = resources.files("onnx_decomp.tables").joinpath(f"{provider}.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def read(path: Path, provider: str) -> dict[str, Any]:
    """A table of the user's. Raises InputError where it can't be one, or is of another provider."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise InputError(
            f"{path}: not a cost table: make one with `onnx-decomp bench --calibrate {path.name}`"
        )
    if found.get("provider") != provider:
        raise InputError(f"{path}: a table of {found.get('provider')!r}, the model is for {provider!r}")
    tables = found.get("tables")
    wanted = {field.name for field in fields(KINDS[provider])}
    fits = isinstance(tables, dict) and all(_is_table(table, wanted) for table in tables.values())
    if not (fits and tables):
        raise InputError(
            f"{path}: each of its tables has to give numbers above 0 for {', '.join(sorted(wanted))}"
        )
    return found


def _is_table(table: object, wanted: set[str]) -> bool:
    return (
        isinstance(table, dict)
        and set(table) == wanted
        and all(type(v) in (int, float) and 0 < v < math.inf for v in table.values())
    )


def _choose(found: Mapping[str, Any], provider: str, dtype: str) -> CostModel:
    tables = found["tables"]
    return KINDS[provider](**tables.get(dtype, next(iter(tables.values()))))
