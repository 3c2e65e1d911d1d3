"""A small BERT as exporters write it, and as ONNX Runtime's optimizer for transformers fuses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

TOKENS, WIDTH, HEADS, WIDE, WORDS = 8, 32, 4, 64, 50


class _Exporter:
    """A graph under construction."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[str, NDArray[Any]] = {}

    def add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], f"{output}/{op}", **attributes))
        return output

    def store(self, name: str, array: Any) -> str:
        self.stored[name] = np.asarray(array)
        return name

    def draw(self, name: str, *shape: int, scale: float = 1.0) -> str:
        return self.store(name, (scale * self.rng.standard_normal(shape)).astype(np.float32))

    def linear(self, name: str, x: str, rows: int, columns: int) -> str:
        weight = self.draw(f"{name}.weight", rows, columns, scale=rows**-0.5)
        product = self.add("MatMul", [x, weight], f"{name}/product")
        return self.add("Add", [self.draw(f"{name}.bias", columns, scale=0.1), product], name)

    def norm(self, name: str, x: str) -> str:
        scale = self.store(f"{name}.scale", self.rng.uniform(0.7, 1.3, WIDTH).astype(np.float32))
        shift = self.draw(f"{name}.shift", WIDTH, scale=0.1)
        return self.add("LayerNormalization", [x, scale, shift], name, epsilon=1e-12)

    def heads(self, name: str, x: str, perm: list[int]) -> str:
        apart = self.store("apart", np.array([0, 0, HEADS, WIDTH // HEADS]))
        made = self.add("Reshape", [self.linear(name, x, WIDTH, WIDTH), apart], f"{name}/apart")
        return self.add("Transpose", [made], f"{name}/heads", perm=perm)

    def attend(self, name: str, x: str, mask: str) -> str:
        query, key, value = (
            self.heads(f"{name}.{part}", x, perm)
            for part, perm in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3]))
        )
        root = self.store("root", np.float32((WIDTH // HEADS) ** 0.5))
        scores = self.add("Div", [self.add("MatMul", [query, key], f"{name}/scores"), root], f"{name}/scaled")
        scores = self.add("Add", [scores, mask], f"{name}/masked")
        shares = self.add("Softmax", [scores], f"{name}/shares", axis=-1)
        mixed = self.add("MatMul", [shares, value], f"{name}/mixed")
        mixed = self.add("Transpose", [mixed], f"{name}/turned", perm=[0, 2, 1, 3])
        together = self.store("together", np.array([0, 0, WIDTH]))
        return self.add("Reshape", [mixed, together], f"{name}/context")

    def gelu(self, name: str, x: str) -> str:
        two, one, half = (self.store(f"number_{n:.2f}", np.float32(n)) for n in (2**0.5, 1, 0.5))
        error = self.add("Erf", [self.add("Div", [x, two], f"{name}/divided")], f"{name}/error")
        made = self.add("Mul", [x, self.add("Add", [error, one], f"{name}/raised")], f"{name}/product")
        return self.add("Mul", [made, half], name)

    def embed(self) -> str:
        word = self.add("Gather", [self.draw("words", WORDS, WIDTH), "input_ids"], "word")
        kind = self.add("Gather", [self.draw("kinds", 2, WIDTH), "token_type_ids"], "kind")
        place = self.add(
            "Gather",
            [self.draw("places", TOKENS, WIDTH), self.store("order", np.arange(TOKENS)[None])],
            "place",
        )
        return self.norm("embedded", self.add("Add", [self.add("Add", [word, kind], "both"), place], "all"))

    def mask(self) -> str:
        """0 where a token counts, -10000 where it is padding, [batch, 1, 1, tokens]."""
        mask = "attention_mask"
        for axis in (1, 2):
            mask = self.add("Unsqueeze", [mask, self.store(f"axis_{axis}", np.array([axis]))], f"mask_{axis}")
        mask = self.add("Cast", [mask], "mask_cast", to=TensorProto.FLOAT)
        mask = self.add("Sub", [self.store("one", np.float32(1)), mask], "mask_turned")
        return self.add("Mul", [mask, self.store("far", np.float32(-10000))], "mask")


def exported(layers: int = 2, seed: int = 0) -> onnx.ModelProto:
    """[batch, 8] tokens, masks and kinds to y [batch, 8, 32]."""
    graph = _Exporter(seed)
    x, mask = graph.embed(), graph.mask()
    for layer in range(layers):
        name = f"layer.{layer}"
        context = graph.attend(f"{name}.attention", x, mask)
        context = graph.linear(f"{name}.attention.output", context, WIDTH, WIDTH)
        x = graph.norm(f"{name}.attention.norm", graph.add("Add", [context, x], f"{name}/attended"))
        inner = graph.gelu(f"{name}/active", graph.linear(f"{name}.up", x, WIDTH, WIDE))
        fed = graph.linear(f"{name}.down", inner, WIDE, WIDTH)
        x = graph.norm(f"{name}.norm", graph.add("Add", [fed, x], f"{name}/fed"))
    graph.nodes[-1].output[0] = "y"
    made = helper.make_graph(
        graph.nodes,
        "bert",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", TOKENS])
            for name in ("input_ids", "attention_mask", "token_type_ids")
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", TOKENS, WIDTH])],
        [numpy_helper.from_array(array, name) for name, array in graph.stored.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def fused(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The same as ONNX Runtime's optimizer for transformers writes it."""
    from onnxruntime.transformers.optimizer import optimize_model

    onnx.save(model, folder / "exported.onnx")
    made = optimize_model(
        str(folder / "exported.onnx"), "bert", num_heads=HEADS, hidden_size=WIDTH, opt_level=0
    )
    result: onnx.ModelProto = made.model
    return result


def texts(count: int, seed: int) -> dict[str, NDArray[Any]]:
    """Random tokens, the last ones of most samples padding."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, TOKENS + 1, count)
    return {
        "input_ids": rng.integers(0, WORDS, (count, TOKENS)),
        "attention_mask": (np.arange(TOKENS) < lengths[:, None]).astype(np.int64),
        "token_type_ids": rng.integers(0, 2, (count, TOKENS)),
    }
