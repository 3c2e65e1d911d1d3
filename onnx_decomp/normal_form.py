"""Products in other forms, as the one form that everything above knows: y = x @ W, x first and its inputs last.

A Gemm that transposes its input, a constant on the left, a Gemm whose C is no bias, a 1x1 convolution: each is a few
plain operators, Transposes and an Add, around a plain product. They are written only if the product is. So is an
Attention of com.microsoft, as three products before a MultiHeadAttention.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_decomp.fused_attention import (
    DOMAIN,
    PARTS,
    MakerOf,
    MultiHead,
    ShapeOf,
    attention_obstacle,
    given,
    is_microsoft,
    multi_head_inputs,
    packed_widths,
    passed_on,
    unbiased,
)
from onnx_decomp.graph import Constants, Source, attribute, is_standard, unique

MAX_POSITIONS = 1024
"""Positions of one sample up to which a 1x1 convolution is taken as a product: each is a row to fit and measure on."""


def bias_of(constants: Constants, tensor: str, n: int) -> NDArray[Any] | None:
    """A constant that adds one value to each of n outputs, as [n]; None if it is anything else."""
    source = constants.resolve(tensor)
    if source is None:
        return None
    size = int(np.prod(source.shape))
    if size not in (1, n) or (source.shape and source.shape[-1] != size):
        return None
    return np.broadcast_to(source.array(constants.read).reshape(-1), (n,))


def matrix(source: Source | None) -> tuple[int, int] | None:
    """Rows and columns of a constant that is a matrix, behind axes of length one; None for any other."""
    if source is None or len(source.shape) < 2 or any(size != 1 for size in source.shape[:-2]):
        return None
    return source.shape[-2], source.shape[-1]


def is_pointwise(node: onnx.NodeProto, weight: Source) -> bool:
    """A convolution that computes each position from that position alone, all channels together."""
    return (
        len(weight.shape) > 2
        and all(size == 1 for size in weight.shape[2:])
        and attribute(node, "group", 1) == 1
        and all(step == 1 for step in attribute(node, "strides", []))
        and not any(attribute(node, "pads", []))
    )


def normal_form(
    nodes: Sequence[onnx.NodeProto], constants: Constants, taken: set[str], shape_of: ShapeOf, opset: int
) -> list[tuple[onnx.NodeProto, ...]]:
    """For each node what stands for it: itself, or several. taken: names in use, added to.

    shape_of: shape of a tensor as far as the graph tells.
    """
    makers = {name: node for node in nodes for name in node.output}
    return [
        tuple(_Expansion(node, constants, taken, shape_of, makers.get, opset).made() or [node])
        for node in nodes
    ]


@dataclass
class _Expansion:
    """What one node becomes; nothing if it is in normal form, or no product with one constant."""

    node: onnx.NodeProto
    constants: Constants
    taken: set[str]
    shape_of: ShapeOf
    maker_of: MakerOf
    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    def made(self) -> list[onnx.NodeProto]:
        if is_standard(self.node, "Conv"):
            self._convolution()
            return self.nodes
        if is_microsoft(self.node, "Attention"):
            self._attention()
            return self.nodes
        if is_microsoft(self.node, "MultiHeadAttention"):
            self._multi_head()
            return self.nodes
        if not is_standard(self.node, "MatMul", "Gemm") or len(self.node.input) < 2:
            return []
        sides = [matrix(self.constants.resolve(name)) for name in self.node.input[:2]]
        left = sides[0] is not None
        if left == (sides[1] is not None):
            return []
        if self.node.op_type == "Gemm":
            self._gemm(left)
        elif left:
            self._left_matmul()
        return self.nodes

    def _left_matmul(self) -> None:
        """y = W x, as the transpose of x^T W^T."""
        weight, x = self.node.input
        shape, source = self.shape_of(x), self.constants.resolve(weight)
        if source is None or shape is None or len(shape) < max(2, len(source.shape)):
            return
        rank = len(shape)
        turned = self._add("Transpose", "Weight", [weight], perm=_swap(len(source.shape)))
        x = self._add("Transpose", "Input", [x], perm=_swap(rank))
        product = self._product("MatMul", [x, turned])
        self._add("Transpose", "Output", [product], self.node.output[0], perm=_swap(rank))

    def _convolution(self) -> None:
        """A 1x1 convolution is a product with channels last."""
        x, weight = self.node.input[:2]
        source, shape = self.constants.resolve(weight), self.shape_of(x)
        if source is None or shape is None or not is_pointwise(self.node, source):
            return
        positions = [size for size in shape[2:] if size is not None]
        rank = len(source.shape)
        if len(positions) != rank - 2 or prod(positions) > MAX_POSITIONS:
            return
        flat = self._add("Flatten", "Flat", [weight], axis=1)
        turned = self._add("Transpose", "Weight", [flat], perm=[1, 0])
        x = self._add("Transpose", "Input", [x], perm=[0, *range(2, rank), 1])
        product = self._product("MatMul", [x, turned])
        if len(self.node.input) > 2 and self.node.input[2]:
            product = self._add("Add", "Add", [product, self.node.input[2]])
        self._add(
            "Transpose", "Output", [product], self.node.output[0], perm=[0, rank - 1, *range(1, rank - 1)]
        )

    def _attention(self) -> None:
        """An Attention is three products, of columns of its weight, before a MultiHeadAttention."""
        node, widths = self.node, packed_widths(self.node, self.constants)
        obstacle = attention_obstacle(node, self.constants, self.shape_of, self.maker_of)
        if widths is None or obstacle is not None or self.constants.resolve(node.input[1]) is None:
            return
        x, packed, bias = (*node.input, "")[:3]
        weights = self._split(packed, widths, axis=1)
        made = []
        for part, weight in zip(PARTS, weights, strict=True):
            made.append(self._product("MatMul", [x, weight], tag=f"{part}/MatMul"))
        if bias:
            made = self._added(made, bias, widths)
        self._heads(multi_head_inputs(node, made), passed_on(node))

    def _multi_head(self) -> None:
        """The bias of a MultiHeadAttention is added to what the products before it make."""
        node = self.node
        plain, bias = MultiHead.of(unbiased(node)), self.constants.resolve(given(node, 3))
        if plain is None or bias is None:
            return
        widths = [self._width(name) for name in plain.operands]
        if min(widths) and bias.shape == (sum(widths),):
            made = self._added(plain.operands, node.input[3], widths)
            self._heads([*made, "", *node.input[4:]], node.attribute)

    def _width(self, tensor: str) -> int:
        """Columns of the constant matrix that makes a tensor, 0 where none does."""
        maker = self.maker_of(tensor)
        if maker is None or not is_standard(maker, "MatMul"):
            return 0
        sides = matrix(self.constants.resolve(maker.input[1]))
        return 0 if sides is None else sides[1]

    def _added(self, tensors: Sequence[str], bias: str, widths: Sequence[int]) -> list[str]:
        parts = zip(PARTS, tensors, self._split(bias, widths, axis=0), strict=True)
        return [self._add("Add", f"{part}/Add", [tensor, added]) for part, tensor, added in parts]

    def _split(self, constant: str, widths: Sequence[int], axis: int) -> list[str]:
        """The parts of a constant that make queries, keys and values."""
        made = [unique(f"{constant}.{part}", self.taken) for part in PARTS]
        name = unique(f"{self.node.name or self.node.op_type}/decomp/Split", self.taken)
        split = onnx.helper.make_node("Split", [constant], made, name, axis=axis)
        if self.opset < 13:
            split.attribute.append(onnx.helper.make_attribute("split", widths))
        else:
            value = onnx.numpy_helper.from_array(np.array(widths, np.int64))
            split.input.append(self._add("Constant", "Widths", [], value=value))
        self.nodes.append(split)
        return made

    def _heads(self, inputs: Sequence[str], attributes: Iterable[onnx.AttributeProto]) -> None:
        node = self.node
        name = unique(f"{node.name or node.op_type}/decomp/MultiHeadAttention", self.taken)
        made = onnx.helper.make_node("MultiHeadAttention", inputs, node.output[:1], name, domain=DOMAIN)
        made.attribute.extend(attributes)
        made.metadata_props.extend(node.metadata_props)
        made.doc_string = node.doc_string
        self.nodes.append(made)

    def _gemm(self, left: bool) -> None:
        """y = alpha A' B' + beta C. With the constant on the left: y = (alpha B'^T A'^T)^T + beta C."""
        node = self.node
        flags = [bool(attribute(node, name, 0)) for name in ("transA", "transB")]
        weight, x = (node.input[0], node.input[1]) if left else (node.input[1], node.input[0])
        turn_x = not flags[1] if left else flags[0]
        turn_weight = not flags[0] if left else flags[1]
        c = node.input[2] if len(node.input) > 2 else ""
        shape = matrix(self.constants.resolve(weight))
        assert shape is not None
        folded = not left and (
            not c or bias_of(self.constants, c, shape[0 if turn_weight else 1]) is not None
        )
        if folded and not turn_x:
            return
        beta = float(attribute(node, "beta", 1.0))
        apart = bool(c) and not folded and beta != 0.0
        if turn_x:
            x = self._add("Transpose", "Input", [x], perm=[1, 0])
        operands = [x, weight, c] if folded and c else [x, weight]
        scales: dict[str, Any] = {n: float(attribute(node, n, 1.0)) for n in ("alpha", "beta")}
        output = node.output[0]
        own = None if left or apart else output
        product = self._product("Gemm", operands, own, transB=int(turn_weight), **scales)
        if left:
            product = self._add("Transpose", "Output", [product], None if apart else output, perm=[1, 0])
        if apart:
            self._add("Add", "Add", [product, self._scaled(c, beta, weight)], output)

    def _scaled(self, c: str, beta: float, weight: str) -> str:
        source = self.constants.resolve(weight)
        if beta == 1.0 or source is None:
            return c
        value = onnx.numpy_helper.from_array(np.asarray(beta, source.dtype))
        return self._add("Mul", "Scaled", [c, self._add("Constant", "Beta", [], value=value)])

    def _product(
        self, op: str, operands: Sequence[str], output: str | None = None, tag: str = "", **attributes: Any
    ) -> str:
        """The product itself keeps what its exporter noted about it."""
        made = self._add(op, tag or op, operands, output, **attributes)
        self.nodes[-1].metadata_props.extend(self.node.metadata_props)
        self.nodes[-1].doc_string = self.node.doc_string
        return made

    def _add(
        self, op: str, tag: str, inputs: Sequence[str], output: str | None = None, **attributes: Any
    ) -> str:
        name = unique(f"{self.node.name or self.node.op_type}/decomp/{tag}", self.taken)
        made = output or unique(f"{name}_output", self.taken)
        self.nodes.append(onnx.helper.make_node(op, list(inputs), [made], name=name, **attributes))
        return made


def _swap(rank: int) -> list[int]:
    """The permutation that swaps the last two of so many axes."""
    return [*range(rank - 2), rank - 1, rank - 2]
