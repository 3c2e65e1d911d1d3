"""Blocks side by side between what is joined: a branch for each, or one tensor for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_decomp.passes.folding import block_rank, factors
from onnx_decomp.passes.fragments import Fragment, Value
from onnx_decomp.passes.layouts import Crossing, Layout, padded
from onnx_decomp.program import Rewrite, Segment
from onnx_decomp.sites import Site

Cells = tuple[NDArray[Any], NDArray[Any]]
"""Rows and columns of a block."""
Correction = tuple[Value, NDArray[Any], str]
"""The first product of a correction, the matrix of the second one, and what its names start with."""

WITH_BIAS = {"BiasGelu": "Gelu", "FastGelu": "FastGelu"}
"""Activations that may have a bias in them, and what does the same without one."""


class Around(Protocol):
    """What lanes need of the writer: where they are written, and what is beside them."""

    @property
    def fragment(self) -> Fragment: ...
    @property
    def rewrite(self) -> Rewrite: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def flattened(self) -> bool: ...

    def stem(self, number: int, end: int) -> str: ...
    def cells(self, at: int, segment: Segment, block: int) -> Cells: ...
    def late(self, tensor: str, number: int) -> int | None: ...
    def correction(self, at: int, segment: Segment) -> Correction | None: ...
    def carried(self, name: str) -> bool: ...
    def operand(
        self, name: str, tag: str | None, positions: Callable[[], NDArray[Any]], shape: tuple[int, ...]
    ) -> Value: ...
    def copy(
        self,
        node: onnx.NodeProto,
        inputs: Sequence[Value],
        tag: str,
        positions: Callable[[str], NDArray[Any]],
        into: str | None = None,
    ) -> dict[str, Value]: ...


@dataclass(frozen=True)
class Branches:
    """One value for each block: Split, a Gemm (behind a MatMul where factored) or an operator for each, Concat."""

    writer: Around
    segment: Segment
    number: int

    def enter(self, value: Value, crossing: Crossing, axis: int) -> list[Value]:
        if self.segment.blocks == 1:
            return [value]
        make, name = self.writer.fragment, f"{self.writer.stem(self.number, 0)}/Split"
        axis = 1 if self._matrix else axis
        if make.opset >= 13:
            parts = make.integers(f"{name}/sizes", crossing.sizes)
            made = make.apply("Split", name, [value, parts], outputs=len(crossing.sizes), axis=axis)
        else:
            made = make.apply(
                "Split", name, [value], outputs=len(crossing.sizes), axis=axis, split=list(crossing.sizes)
            )
        return [made[crossing.sequence.index(block)] for block in range(self.segment.blocks)]

    def leave(self, values: Sequence[Value], crossing: Crossing, axis: int, into: str | None) -> Value:
        if self.segment.blocks == 1:
            return values[0]
        name = f"{self.writer.stem(self.number, -1)}/Concat"
        ordered = [values[block] for block in crossing.sequence]
        axis = 1 if self._matrix else axis
        return self.writer.fragment.one("Concat", name, ordered, axis=axis, into=into)

    @property
    def _matrix(self) -> bool:
        region = self.writer.rewrite.region
        return region.flat and (self.writer.flattened or region.sites[0].rank == 2)

    def site(self, values: Sequence[Value], at: int, into: str | None) -> list[Value]:
        beside = self.writer.correction(at, self.segment)
        made = [self._gemm(value, at, block, into) for block, value in enumerate(values)]
        if beside is None:
            return made
        return [self._plus(value, at, block, *beside) for block, value in enumerate(made)]

    def _plus(self, value: Value, at: int, block: int, low: Value, up: NDArray[Any], name: str) -> Value:
        """A block's output with its columns of the correction added, in the same product where it can be."""
        make, site = self.writer.fragment, self.writer.rewrite.region.sites[at]
        _, columns = self.writer.cells(at, self.segment, block)
        tag = f"block_{block:02d}"
        side = make.stored(f"{name}.up.{tag}", up[:, columns], site)
        stem = f"{site.name}/decomp/beside/{tag}"
        if self._matrix or site.rank == 2:
            return make.one("Gemm", f"{stem}/Gemm", [low, side, value])
        return make.one("Add", f"{stem}/Add", [value, make.one("MatMul", f"{stem}/MatMul", [low, side])])

    def _gemm(self, value: Value, at: int, block: int, into: str | None) -> Value:
        make, writer = self.writer.fragment, self.writer
        site, affine = writer.rewrite.region.sites[at], writer.rewrite.affine[at]
        rows, columns = writer.cells(at, self.segment, block)
        tag = f"block_{block:02d}"
        stem, name = f"{site.name}/decomp/{tag}", f"{site.stem}.decomp.{tag}"
        kept = affine.weight[np.ix_(rows, columns)]
        rank = block_rank(self.segment, at, block, len(rows), len(columns))
        if rank is not None:
            down, kept = factors(kept, rank)
            side = make.stored(f"{name}.down", down, site)
            value, name = make.one("MatMul", f"{stem}/Down", [value, side]), f"{name}.up"
        weight = make.stored(name, kept, site)
        if affine.bias is None or writer.late(site.output, self.number) is not None:
            return make.one("MatMul", f"{stem}/MatMul", [value, weight], into=into)
        bias = make.weight(
            f"{site.bias or site.stem + '.bias'}.decomp.{tag}", affine.bias[columns], site.dtype
        )
        if self._matrix or site.rank == 2:
            return make.one("Gemm", f"{stem}/Gemm", [value, weight, bias], into=into)
        value = make.one("MatMul", f"{stem}/MatMul", [value, weight])
        return make.one("Add", f"{stem}/Add", [value, bias], into=into)

    def link(
        self, node: onnx.NodeProto, lanes: Callable[[str], list[Value]], into: str | None
    ) -> dict[str, list[Value]]:
        made: dict[str, list[Value]] = {name: [] for name in node.output if name}
        for block in range(self.segment.blocks):
            tag = f"block_{block:02d}"

            positions = partial(self._positions, block)
            inputs = [
                lanes(name)[block]
                if self.writer.carried(name)
                else self.writer.operand(name, tag, partial(positions, name), (-1,))
                for name in node.input
            ]
            for name, value in self.writer.copy(node, inputs, tag, positions, into).items():
                made[name].append(value)
        return made

    def _positions(self, block: int, name: str) -> NDArray[Any]:
        return self.writer.layout.blocks(name, self.segment)[block]


@dataclass(frozen=True)
class Batched:
    """One value [G, T, n] for all blocks, padded to the widest: one batched MatMul for each site.

    On one row, which the graph tells of, the Transposes on either side are left out: nothing changes places.
    """

    writer: Around
    segment: Segment
    number: int

    def enter(self, value: Value, crossing: Crossing, _axis: int) -> Value:
        make, stem = self.writer.fragment, self.writer.stem(self.number, 0)
        count, width = len(crossing.sizes), crossing.sizes[0]
        lead = [count, 1] if self._one_row else [-1, count]
        apart = make.integers(f"{stem}/apart", [*lead, width])
        value = make.one("Reshape", f"{stem}/Apart", [value, apart])
        return value if self._one_row else make.one("Transpose", f"{stem}/Blocks", [value], perm=[1, 0, 2])

    def leave(self, value: Value, crossing: Crossing, _axis: int, into: str | None) -> Value:
        """[G, T, n] -> [T, G n]"""
        make, stem = self.writer.fragment, self.writer.stem(self.number, -1)
        if not self._one_row:
            value = make.one("Transpose", f"{stem}/Together", [value], perm=[1, 0, 2])
        joined = make.integers(f"{stem}/joined", [-1, sum(crossing.sizes)])
        return make.one("Reshape", f"{stem}/Joined", [value, joined], into=into)

    @property
    def _one_row(self) -> bool:
        return self.writer.rewrite.region.one_row

    def site(self, value: Value, at: int, _into: str | None) -> Value:
        make, writer = self.writer.fragment, self.writer
        site, affine = writer.rewrite.region.sites[at], writer.rewrite.affine[at]
        cells = [writer.cells(at, self.segment, block) for block in range(self.segment.blocks)]
        made = np.stack(padded([columns for _, columns in cells]))
        weight = make.stored(f"{site.stem}.decomp.blocks", self._stacked(affine.weight, cells, made), site)
        name = f"{site.name}/decomp/blocks"
        value = make.one("MatMul", f"{name}/MatMul", [value, weight])
        beside = writer.correction(at, self.segment)
        if beside is not None:
            value = self._plus(value, site, made, *beside)
        if affine.bias is None or writer.late(site.output, self.number) is not None:
            return value
        rows_of_bias = affine.bias[made][:, None, :]
        bias = make.weight(f"{site.bias or site.stem + '.bias'}.decomp.blocks", rows_of_bias, site.dtype)
        return make.one("Add", f"{name}/Add", [value, bias])

    def _stacked(self, weight: NDArray[Any], cells: Sequence[Cells], made: NDArray[Any]) -> NDArray[Any]:
        """[G, k, n]; what a block is padded with on its way in meets rows of zeros."""
        widest = max(len(rows) for rows, _ in cells)
        stack = np.zeros((len(cells), widest, made.shape[1]), weight.dtype)
        for block, (rows, _) in enumerate(cells):
            stack[block, : len(rows)] = weight[np.ix_(rows, made[block])]
        return stack

    def _plus(
        self, value: Value, site: Site, made: NDArray[Any], low: Value, up: NDArray[Any], name: str
    ) -> Value:
        """The lanes with their columns of the correction added.

        Its first product is repeated for each block: a matrix times several would be a product for each, with its
        addresses copied to the GPU at every run.
        """
        make, stem = self.writer.fragment, f"{site.name}/decomp/beside"
        each = make.integers(f"{stem}/each", [self.segment.blocks, 1, 1])
        low = make.one("Expand", f"{stem}/Expand", [low, each])
        side = make.stored(f"{name}.up", np.moveaxis(up[:, made], 0, 1), site)
        return make.one("Add", f"{stem}/Add", [value, make.one("MatMul", f"{stem}/MatMul", [low, side])])

    def link(self, node: onnx.NodeProto, lanes: Callable[[str], Value], into: str | None) -> dict[str, Value]:
        shape = (self.segment.blocks, 1, -1)
        inputs = [
            lanes(name)
            if self.writer.carried(name)
            else self.writer.operand(name, "blocks", partial(self._positions, name), shape)
            for name in node.input
        ]
        if node.op_type in WITH_BIAS and len(inputs) == 2:
            # Its bias has to be a vector: that of lanes is added before.
            stem = f"{node.name or node.op_type}/decomp/blocks"
            inputs = [self.writer.fragment.one("Add", f"{stem}/Add", inputs)]
            plain = onnx.NodeProto(op_type=WITH_BIAS[node.op_type], name=node.name, domain=node.domain)
            plain.output.extend(node.output)
            node = plain
        return self.writer.copy(node, inputs, "blocks", self._positions, into)

    def _positions(self, name: str) -> NDArray[Any]:
        return np.concatenate(self.writer.layout.blocks(name, self.segment))
