"""One attention layer in an operator of com.microsoft, in all the ways that ONNX Runtime's fusions write it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnx_decomp.runtime import open_session
from onnx_decomp.sites import GraphIndex

Array = NDArray[Any]

TOKENS, WIDTH, HEADS, SAMPLES = 6, 24, 3, 5


@dataclass(frozen=True)
class Fused:
    """One attention layer over x [batch, 6, 24], as ONNX Runtime's fusions write it, and its output projection.

    op: Attention, or MultiHeadAttention behind three products. widths: of queries (and keys), and of values. rank: of
    queries times keys, and of values times the projection, for each head. bias: in the operator (packed), of the
    products before it (own), or none. mask, added: shapes of the mask and of what is added to scores. cross: keys and
    values of another sequence, z [batch, 4, 24].
    """

    op: str = "Attention"
    widths: tuple[int, int] = (WIDTH, WIDTH)
    rank: int = 8
    bias: str = "packed"
    mask: str = ""
    added: str = ""
    opset: int = 17
    dtype: Any = np.float32
    attributes: tuple[tuple[str, Any], ...] = ()
    cross: bool = False
    seed: int = 0

    def __str__(self) -> str:
        plain = Fused()
        return ",".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(plain, k)) or "plain"

    @property
    def weights(self) -> dict[str, Array]:
        rng = np.random.default_rng(self.seed)
        queries, values = self.widths

        def low(rows: int, columns: int, heads: int = HEADS) -> Array:
            left, right = (
                rng.standard_normal((heads, rows, self.rank)),
                rng.standard_normal((heads, self.rank, columns)),
            )
            made: Array = left @ right / np.sqrt(self.rank)
            return made

        made = {"q": 2 * rng.standard_normal((WIDTH, queries)), "v": rng.standard_normal((WIDTH, values))}
        made["k"] = low(WIDTH, queries // HEADS).transpose(1, 0, 2).reshape(WIDTH, queries)
        made["o"] = low(values // HEADS, WIDTH).reshape(values, WIDTH)
        made = {name: array / np.sqrt(WIDTH) for name, array in made.items()}
        made |= {f"b{name}": rng.standard_normal(made[name].shape[1]) for name in ("q", "k", "v", "o")}
        return {name: array.astype(self.dtype) for name, array in made.items()}

    def model(self) -> onnx.ModelProto:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        weights = self.weights
        wide = self.opset  # operators that any opset has
        nodes, stored = [], {"Wo": weights["o"], "bo": weights["bo"]}
        behind = ["mask" if self.mask else "", "", "added" if self.added else ""]
        more: dict[str, Any] = {"num_heads": HEADS, **dict(self.attributes)}
        packed = np.concatenate([weights[f"b{name}"] for name in "qkv"])
        if self.op == "Attention":
            stored |= {"W": np.hstack([weights[name] for name in "qkv"])}
            if self.widths != (WIDTH, WIDTH):
                more["qkv_hidden_sizes"] = [self.widths[0], *self.widths]
            inputs = ["x", "W", "b", *behind]
        else:
            for name in "qkv":
                stored[f"W{name}"] = weights[name]
                own = self.bias == "own"
                nodes.append(
                    helper.make_node(
                        "MatMul",
                        ["z" if self.cross and name != "q" else "x", f"W{name}"],
                        [f"{name}0" if own else name],
                        f"node_{name}",
                    )
                )
                if own:
                    stored[f"b{name}"] = weights[f"b{name}"]
                    nodes.append(helper.make_node("Add", [f"{name}0", f"b{name}"], [name], f"add_{name}"))
            inputs = ["q", "k", "v", "b" if self.bias == "packed" else "", behind[0], behind[2]]
        if "b" in inputs:
            stored["b"] = packed
        nodes.append(
            helper.make_node(self.op, inputs, ["context"], "attention", domain="com.microsoft", **more)
        )
        nodes.append(helper.make_node("MatMul", ["context", "Wo"], ["o"], "node_o"))
        nodes.append(helper.make_node("Add", ["o", "bo"], ["y"], "add_o"))
        fed = [helper.make_tensor_value_info("x", kind, ["batch", TOKENS, WIDTH])]
        if self.cross:
            fed.append(helper.make_tensor_value_info("z", kind, ["batch", 4, WIDTH]))
        if self.mask:
            fed.append(helper.make_tensor_value_info("mask", TensorProto.INT32, self._dims(self.mask)))
        if self.added:
            fed.append(helper.make_tensor_value_info("added", kind, self._dims(self.added)))
        graph = helper.make_graph(
            nodes,
            "fused",
            fed,
            [helper.make_tensor_value_info("y", kind, ["batch", TOKENS, WIDTH])],
            [numpy_helper.from_array(array, name) for name, array in stored.items()],
        )
        opsets = [helper.make_opsetid("", wide), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)

    @staticmethod
    def _dims(layout: str) -> list[Any]:
        lengths = {"B": "batch", "H": HEADS, "S": TOKENS, "1": 1}
        return [lengths[axis] for axis in layout]

    def feeds(self, count: int, seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        made = {"x": rng.standard_normal((count, TOKENS, WIDTH)).astype(self.dtype)}
        if self.cross:
            made["z"] = rng.standard_normal((count, 4, WIDTH)).astype(self.dtype)
        if self.mask:
            shape = [count if axis == "batch" else axis for axis in self._dims(self.mask)]
            made["mask"] = (rng.random(shape) < 0.7).astype(np.int32)
            made["mask"][..., 0] = 1
        if self.added:
            shape = [count if axis == "batch" else axis for axis in self._dims(self.added)]
            made["added"] = rng.standard_normal(shape).astype(self.dtype)
        return made


def index_of(model: onnx.ModelProto) -> GraphIndex:
    return GraphIndex.build(model, numpy_helper.to_array)


def with_attributes(**more: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(more.items())


NATIVE = Fused(op="MultiHeadAttention", bias="own")

FORMS = [
    Fused(),
    Fused(attributes=with_attributes(unidirectional=1)),
    Fused(attributes=with_attributes(scale=0.2, mask_filter_value=-3.0), mask="BS"),
    Fused(mask="BSS", attributes=with_attributes(unidirectional=1)),
    Fused(added="BHSS", mask="BS"),
    Fused(added="1HSS"),
    Fused(added="B1SS", attributes=with_attributes(unidirectional=1)),
    Fused(widths=(12, 36)),
    Fused(widths=(48, 12), mask="BS"),
    Fused(dtype=np.float16),
    Fused(opset=9),
    Fused(opset=12, mask="BS"),
    Fused(opset=21),
    NATIVE,
    replace(NATIVE, bias="none", opset=11),
    replace(NATIVE, bias="packed"),
    replace(NATIVE, cross=True),
    replace(NATIVE, cross=True, bias="packed", widths=(12, 36)),
    replace(NATIVE, bias="packed", widths=(12, 36), mask="BS"),
    replace(NATIVE, added="1HSS", attributes=with_attributes(scale=0.3)),
]


def run(model: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    made: Array = open_session(model).run(feeds)["y"].astype(np.float64)
    return made


def check_close(found: Array, expected: Array, dtype: Any) -> None:
    noise = 1e-2 if dtype == np.float16 else 1e-5
    assert np.linalg.norm(found - expected) <= noise * np.linalg.norm(expected)
