"""Predicted time of each form of a layer, in microseconds: what the plan goes by before anything is measured.

The CPU figures are fitted to 72 cases measured on one thread of an AVX-512 machine (mean error 10 to 15 %); the GPU
ones are a roofline, not a measurement. docs/benchmarks.md holds them against what another machine measures. They rank
forms; the latency gate measures the one that ranks first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

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


class CostModel(Protocol):
    """Microseconds for T rows. Sizes count columns."""

    def dense(self, T: int, K: int, N: int) -> float:
        """One MatMul with its bias."""

    def parallel(self, T: int, layer: Layer) -> float:
        """Split, one MatMul for each block (two where it is factored), Concat, bias."""

    def batched(self, T: int, G: int, k: int, n: int) -> float:
        """Transpose, one MatMul [G, k, n], Transpose, bias."""

    def chain(self, T: int, layers: Sequence[Layer]) -> float:
        """Split, a chain of Gemm and activation for each block through all layers, Concat."""

    def gather(self, T: int, width: int, run: int) -> float:
        """Reordering `width` columns that move in runs of `run`."""


@dataclass(frozen=True)
class CPU:
    """One thread, float32."""

    flops: float = 95e3
    """Per microsecond, in a large MatMul."""
    node: float = 3.0
    """Microseconds of one more operator in a model whose weights don't all fit in the cache."""
    copy: float = 0.8e-3
    """Microseconds to move one element in Split, Concat or Transpose."""
    stream: float = 12e3
    """Bytes of weights per microsecond: what bounds a single row."""
    column: float = 2.5e-3
    """Microseconds to move one element when single columns are gathered, as rows between two Transposes."""

    def dense(self, T: int, K: int, N: int) -> float:
        return self.node + self._product(T, K * N, 8)

    def parallel(self, T: int, layer: Layer) -> float:
        weights = sum(k * n for k, n in products(layer))
        moved = self.copy * T * (width_in(layer) + width_out(layer))
        return self.node * (len(products(layer)) + 3) + moved + self._product(T, weights, 8)

    def batched(self, T: int, G: int, k: int, n: int) -> float:
        # Batched weights are packed anew at every run: three times the overhead of a small T.
        return self.node * 5 + self.copy * T * G * (k + n) + self._product(T, G * k * n, 24)

    def chain(self, T: int, layers: Sequence[Layer]) -> float:
        nodes = sum(len(products(layer)) + len(layer) for layer in layers) - len(layers[0]) + 2
        moved = self.copy * T * (width_in(layers[0]) + width_out(layers[-1]))
        weights = sum(k * n for layer in layers for k, n in products(layer))
        return self.node * nodes + moved + self._product(T, weights, 8)

    def gather(self, T: int, width: int, run: int) -> float:
        return 3 * self.node + T * width * (self.column / run + 1e-3)

    def _product(self, T: int, weights: int, overhead: float) -> float:
        """Time of products: FLOPs with an overhead for few rows, or the weights' way from memory."""
        return max(
            2 * T * weights / self.flops * (1 + overhead / T) if T > 1 else 0.0, 4 * weights / self.stream
        )


@dataclass(frozen=True)
class CUDA:
    """One H200, float16, run eagerly: estimated from its data sheet, not measured."""

    flops: float = 0.85 * 790e6
    """Per microsecond: 85 % of the peak."""
    bandwidth: float = 0.85 * 4.8e6
    """Bytes per microsecond for operands."""
    copies: float = 0.6 * 4.8e6
    """Bytes per microsecond of Split, Concat and Transpose."""
    kernel: float = 5.0
    """Microseconds between kernels started one by one; 2 where they are captured in a graph."""
    element: int = 2
    """Bytes."""

    def dense(self, T: int, K: int, N: int) -> float:
        return self._product(T, 1, K, N) + self._moved(T * N)

    def parallel(self, T: int, layer: Layer) -> float:
        inside = sum(self._product(T, 1, k, n) for k, n in products(layer))
        return self._moved(T * width_in(layer)) + inside + 2 * self._moved(T * width_out(layer))

    def batched(self, T: int, G: int, k: int, n: int) -> float:
        # The first Transpose is fused into the MatMul; at one row the second is only a Reshape.
        back = self._moved(T * G * n) if T > 1 else 0.0
        return self._product(T, G, k, n) + back + self._moved(T * G * n)

    def chain(self, T: int, layers: Sequence[Layer]) -> float:
        inside = sum(self._product(T, 1, k, n) for layer in layers for k, n in products(layer))
        inside += sum(self._moved(T * widths[-1]) for layer in layers for widths in layer)
        return self._moved(T * width_in(layers[0])) + inside + self._moved(T * width_out(layers[-1]))

    def gather(self, T: int, width: int, run: int) -> float:
        return self._moved(T * width) * (
            1 if run * self.element >= 32 else 2
        )  # short runs waste half a sector

    def _product(self, T: int, G: int, k: int, n: int) -> float:
        read = self.element * G * (k * n + T * (k + n)) / self.bandwidth
        return max(self.kernel, 2 * T * G * k * n / self.flops, read)

    def _moved(self, elements: int) -> float:
        """One kernel that reads and writes so many elements."""
        return max(self.kernel, 2 * self.element * elements / self.copies)


def cpu() -> CPU:
    return CPU()


def cuda() -> CUDA:
    return CUDA()
