"""Attention operators of com.microsoft: what they are handed, and which of them plain products can stand for.

`Attention` holds the weights of queries, keys and values side by side. It is the same as three products before a
`MultiHeadAttention`, which ONNX Runtime computes by the same kernel; `normal_form` sees it so. What that operator can't
say, or not on every provider, stays as it is, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx

from onnx_decomp.graph import Constants, attribute, is_standard

DOMAIN = "com.microsoft"

PARTS = ("query", "key", "value")
"""What the columns of a packed weight make, in this order."""

_PASSED_ON = frozenset({"num_heads", "unidirectional", "scale", "mask_filter_value"})
"""Attributes of Attention that MultiHeadAttention has too, with the same meaning."""
_IDLE = frozenset({"do_rotary", "past_present_share_buffer", "rotary_embedding_dim", "qkv_hidden_sizes"})
"""Attributes of Attention that say nothing where there is neither a rotary embedding nor a cache."""

_MASK, _PAST, _BIAS, _LENGTH = 3, 4, 5, 6
"""Positions of inputs of Attention: mask, cache, what is added to scores, and how much of the cache is in use."""

ShapeOf = Callable[[str], tuple[int | None, ...] | None]
MakerOf = Callable[[str], onnx.NodeProto | None]
"""The node that makes a tensor."""


def is_microsoft(node: onnx.NodeProto, operator: str) -> bool:
    return bool(node.domain == DOMAIN and node.op_type == operator)


def given(node: onnx.NodeProto, position: int) -> str:
    """Name of an input, empty where it is left out."""
    return str(node.input[position]) if position < len(node.input) else ""


# Attention, with weights


def packed_widths(node: onnx.NodeProto, constants: Constants) -> tuple[int, int, int] | None:
    """Columns of queries, keys and values in the weight of an Attention; None where they don't fill it."""
    source = constants.sources.get(given(node, 1))
    if source is None or len(source.shape) != 2:
        return None
    columns, heads = source.shape[1], _heads(node)
    listed = [list(item.ints) for item in node.attribute if item.name == "qkv_hidden_sizes"]
    sizes = listed[0] if listed and listed[0] else [columns // 3] * 3
    fits = len(sizes) == 3 and sum(sizes) == columns and sizes[0] == sizes[1] and min(sizes) > 0
    if not fits or heads < 1 or any(size % heads for size in sizes):
        return None
    return sizes[0], sizes[1], sizes[2]


def _heads(node: onnx.NodeProto) -> int:
    """How many a node has; 0 where it does not say so in a whole number."""
    return next((int(item.i) for item in node.attribute if item.name == "num_heads"), 0)


def attention_obstacle(
    node: onnx.NodeProto, constants: Constants, shape_of: ShapeOf, maker_of: MakerOf
) -> str | None:
    """Why an Attention can't be seen as products before a MultiHeadAttention, as a reason code, or None."""
    if any(given(node, at) for at in (_PAST, _LENGTH)) or len([name for name in node.output if name]) > 1:
        return "attention-cache"
    if attribute(node, "do_rotary", 0):
        return "attention-rotary"
    mask = given(node, _MASK)
    if mask and not _takes(mask, given(node, 0), shape_of, maker_of):
        return "attention-mask"
    whole = given(node, 0) and node.output and node.output[0] and packed_widths(node, constants)
    known = all(item.name in _PASSED_ON | _IDLE and not item.ref_attr_name for item in node.attribute)
    return None if known and whole else "fused-attention"


def _takes(mask: str, x: str, shape_of: ShapeOf, maker_of: MakerOf) -> bool:
    """Whether MultiHeadAttention takes a mask: one length a sample, a value for each key, or for each query and key.

    Not the start of each sample beside its end [2 B], a dummy [B, 1], or a causal mask of four axes.
    """
    shape, batch = shape_of(mask), (shape_of(x) or (None,))[0]
    if shape is not None and len(shape) != 1:
        return len(shape) == 3 or (len(shape) == 2 and shape[1] != 1)
    if shape is not None and shape[0] is not None and batch is not None:
        return shape[0] in (batch, 3 * batch + 2)
    return _is_lengths(mask, maker_of)


def _is_lengths(mask: str, maker_of: MakerOf) -> bool:
    """Counted for each sample by what ONNX Runtime's own fusion puts in front of an Attention."""
    maker = maker_of(mask)
    if maker is not None and is_standard(maker, "Cast") and maker.input:
        maker = maker_of(maker.input[0])
    if maker is None:
        return False
    if is_microsoft(maker, "EmbedLayerNormalization"):
        return mask in maker.output[1:2]
    return is_standard(maker, "ReduceSum") and attribute(maker, "keepdims", 1) == 0


def multi_head_inputs(node: onnx.NodeProto, parts: Sequence[str]) -> list[str]:
    """What a MultiHeadAttention in place of an Attention is handed, made of its three products."""
    inputs = [*parts, "", given(node, _MASK), given(node, _BIAS)]
    while not inputs[-1]:
        inputs.pop()
    return inputs


def unbiased(node: onnx.NodeProto) -> onnx.NodeProto:
    """The same without its fourth input."""
    made = onnx.NodeProto()
    made.CopyFrom(node)
    if len(made.input) > 3:
        made.input[3] = ""
    return made


def passed_on(node: onnx.NodeProto) -> list[onnx.AttributeProto]:
    """The attributes of an Attention that a MultiHeadAttention in its place has."""
    return [item for item in node.attribute if item.name in _PASSED_ON]


# MultiHeadAttention, without


@dataclass(frozen=True)
class MultiHead:
    """A MultiHeadAttention over whole sequences [batch, length, heads x width], head by head.

    operands: queries, keys and values. mask: which keys, and for which queries, or "". added: to scores, [batch or 1,
    heads or 1, length, length], or "".
    """

    heads: int
    operands: tuple[str, str, str]
    mask: str
    added: str

    @classmethod
    def of(cls, node: onnx.NodeProto) -> MultiHead | None:
        """None for any other node, and for one that keeps a cache, or is handed packed tensors or a bias."""
        if not is_microsoft(node, "MultiHeadAttention") or not all(given(node, at) for at in range(3)):
            return None
        if any(given(node, at) for at in (3, *range(6, len(node.input)))):
            return None
        heads = _heads(node)
        if heads < 1 or len([name for name in node.output if name]) != 1:
            return None
        operands = node.input[0], node.input[1], node.input[2]
        return cls(heads, operands, given(node, 4), given(node, 5))
