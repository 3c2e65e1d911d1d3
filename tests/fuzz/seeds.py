"""Sound files that every case starts from: small models of many operators, statistics, data, a report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import safetensors.numpy
from onnx import TensorProto, helper
from onnx.helper import make_node

from models.planted import Planted, build, calibration
from tests.small import mlp, model, value

Arrays = dict[str, np.ndarray]

SAMPLES = 24

SPEC = {
    "onnx_decomp_init": 1,
    "patterns": [
        {"match": "layers.0.*", "family": "uniform", "bound": "1/sqrt(fan_in)"},
        {"match": r"re:layers\.1", "family": "truncnorm", "std": 0.2, "cut": 2, "mean": 0.0},
        {"match": "*", "preset": "torch-linear"},
    ],
}

CONFIG = """\
init-preset = "torch-linear"
tolerance = [1e-2, "y=0.02"]
metric = "rel-l2"
objective = "flops"
min-speedup = 1.1
seed = 3
include = "layers.*"
no-latency-gate = true
"""


@dataclass(frozen=True)
class Seed:
    """A sound model, samples of its inputs, and what its weights were drawn from where that is known."""

    model: onnx.ModelProto
    calib: Arrays
    init: Arrays = field(default_factory=dict)


def make_seeds() -> dict[str, Seed]:
    """By name. The same each time."""
    rng = np.random.default_rng(0)
    planted = build(Planted((8, 16, 8), off="zero", gain=3))

    def floats(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "planted": Seed(planted.model, calibration(planted, 2 * SAMPLES), planted.snapshot),
        "mlp": Seed(mlp(), {"x": floats(SAMPLES, 6)}),
        "attention": Seed(_attention(floats), {"ids": rng.integers(0, 9, (SAMPLES, 4))}),
        "fused": Seed(_fused(floats), {"x": floats(SAMPLES, 4, 8), "mask": np.ones((SAMPLES, 4), np.int32)}),
        "nested": Seed(_nested(floats), {"x": floats(SAMPLES, 4)}),
        "odd": Seed(_odd(floats), {"x": floats(SAMPLES, 4, 1, 1)}),
    }


def _attention(floats) -> onnx.ModelProto:  # type: ignore[no-untyped-def]
    """Embedding, norm, two heads, residual stream, gated unit."""
    weights = {"table": floats(9, 8), "qkv": floats(8, 24), "out": floats(8, 8), "gate": floats(8, 12)}
    weights |= {"up": floats(8, 12), "down": floats(12, 8), "scale": floats(8), "bias": floats(8)}
    weights |= {"heads": np.array([0, 0, 2, 4]), "flat": np.array([0, 0, 8])}
    nodes = [
        make_node("Gather", ["table", "ids"], ["e"], name="embed"),
        make_node("LayerNormalization", ["e", "scale", "bias"], ["n"], name="norm"),
        make_node("MatMul", ["n", "qkv"], ["p"], name="qkv"),
        make_node("Split", ["p"], ["q", "k", "v"], name="split", axis=-1, num_outputs=3),
    ]
    for name in "qkv":
        nodes.append(make_node("Reshape", [name, "heads"], [f"{name}1"], name=f"{name}/Reshape"))
        nodes.append(make_node("Transpose", [f"{name}1"], [f"{name}2"], perm=[0, 2, 1, 3]))
    nodes += [
        make_node("Transpose", ["k2"], ["kt"], perm=[0, 1, 3, 2]),
        make_node("MatMul", ["q2", "kt"], ["s"], name="scores"),
        make_node("Softmax", ["s"], ["a"], axis=-1),
        make_node("MatMul", ["a", "v2"], ["c"]),
        make_node("Transpose", ["c"], ["ct"], perm=[0, 2, 1, 3]),
        make_node("Reshape", ["ct", "flat"], ["cf"]),
        make_node("MatMul", ["cf", "out"], ["o"], name="out"),
        make_node("Add", ["e", "o"], ["r"], name="residual"),
        make_node("MatMul", ["r", "gate"], ["g"], name="gate"),
        make_node("Sigmoid", ["g"], ["sg"]),
        make_node("MatMul", ["r", "up"], ["u"], name="up"),
        make_node("Mul", ["sg", "u"], ["m"]),
        make_node("MatMul", ["m", "down"], ["y"], name="down"),
    ]
    ids = value("ids", ["N", 4], TensorProto.INT64)
    return model(nodes, [ids], [value("y", ["N", 4, 8])], weights, opset=18)


def _fused(floats) -> onnx.ModelProto:  # type: ignore[no-untyped-def]
    """Attention over packed weights, a norm of a sum, MultiHeadAttention with a bias, a constant that is cut up."""
    weights = {
        "qkv": floats(8, 24),
        "b": floats(24),
        "out": floats(8, 8),
        "scale": floats(8),
        "shift": floats(8),
    }
    weights |= {"three": floats(8, 24), "b3": floats(24), "sizes": np.array([8, 8, 8]), "out2": floats(8, 8)}
    own = {"domain": "com.microsoft"}
    nodes = [
        make_node("Attention", ["x", "qkv", "b", "mask"], ["c"], name="first", num_heads=2, **own),
        make_node("MatMul", ["c", "out"], ["o"], name="out"),
        make_node("SkipLayerNormalization", ["x", "o", "scale", "shift"], ["n", "", "", "r"], "norm", **own),
        make_node("Split", ["three", "sizes"], ["wq", "wk", "wv"], name="cut", axis=1),
        *(make_node("MatMul", ["n", f"w{part}"], [part], name=part) for part in "qkv"),
        make_node("MultiHeadAttention", ["q", "k", "v", "b3"], ["c2"], name="second", num_heads=2, **own),
        make_node("MatMul", ["c2", "out2"], ["o2"], name="out2"),
        make_node("Add", ["r", "o2"], ["y"], name="residual"),
    ]
    proto = model(
        nodes,
        [value("x", ["N", 4, 8]), value("mask", ["N", 4], TensorProto.INT32)],
        [value("y", ["N", 4, 8])],
        weights,
    )
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return proto


def _nested(floats) -> onnx.ModelProto:  # type: ignore[no-untyped-def]
    """If and Loop with sites in their bodies that read outer weights, a local function, a Scan-free rest."""
    outer = {"w": floats(4, 4), "w2": floats(4, 4), "zero": np.float32(0).reshape(()), "three": np.array(3)}
    outer["yes"] = np.array(True)

    def body(name: str, weight: str) -> onnx.GraphProto:
        nodes = [make_node("MatMul", ["h", weight], [f"{name}y"], name=f"{name}/MatMul")]
        return helper.make_graph(nodes, name, [], [value(f"{name}y", ["N", 4])])

    step = helper.make_graph(
        [make_node("MatMul", ["s", "w2"], ["t"], name="step"), make_node("Identity", ["c"], ["c1"])],
        "body",
        [value("i", [], TensorProto.INT64), value("c", [], TensorProto.BOOL), value("s", ["N", 4])],
        [value("c1", [], TensorProto.BOOL), value("t", ["N", 4])],
    )
    nodes = [
        make_node("MatMul", ["x", "w"], ["h"], name="first"),
        make_node("ReduceMean", ["h"], ["mean"], keepdims=0),
        make_node("Greater", ["mean", "zero"], ["choose"]),
        make_node(
            "If", ["choose"], ["b"], name="if", then_branch=body("a", "w"), else_branch=body("b", "w2")
        ),
        make_node("Loop", ["three", "yes", "b"], ["l"], name="loop", body=step),
        make_node("Twice", ["l"], ["y"], name="call", domain="local"),
    ]
    proto = model(nodes, [value("x", ["N", 4])], [value("y", ["N", 4])], outer)
    twice = [make_node("Add", ["a", "a"], ["b"])]
    proto.functions.append(
        helper.make_function("local", "Twice", ["a"], ["b"], twice, [helper.make_opsetid("", 17)])
    )
    proto.opset_import.append(helper.make_opsetid("local", 1))
    return proto


def _odd(floats) -> onnx.ModelProto:  # type: ignore[no-untyped-def]
    """1x1 Conv, weights behind Constant, Identity, Transpose, Cast and DequantizeLinear, Gemm with all flags."""
    constant = onnx.numpy_helper.from_array(floats(4, 4), "held")
    weights = {"conv": floats(6, 4, 1, 1), "norm": np.ones(6, np.float32), "w": floats(4, 6)}
    weights |= {"q": np.arange(-8, 8, dtype=np.int8).reshape(4, 4), "scale": np.float32(0.1).reshape(())}
    weights |= {"half": floats(4, 4).astype(np.float16), "b": floats(4), "flat": np.array([0, -1])}
    nodes = [
        make_node("Conv", ["x", "conv"], ["c"], name="conv"),
        make_node("BatchNormalization", ["c", "norm", "norm", "norm", "norm"], ["bn"]),
        make_node("Relu", ["bn"], ["r"]),
        make_node("Reshape", ["r", "flat"], ["f"]),
        make_node("Gemm", ["f", "w", "b"], ["g"], name="gemm", alpha=0.5, beta=2.0, transB=1),
        make_node("Constant", [], ["k"], value=constant),
        make_node("Identity", ["k"], ["ki"]),
        make_node("Transpose", ["ki"], ["kt"], perm=[1, 0]),
        make_node("MatMul", ["g", "kt"], ["h"], name="constant"),
        make_node("Clip", ["h"], ["hc"]),
        make_node("DequantizeLinear", ["q", "scale"], ["dq"]),
        make_node("MatMul", ["hc", "dq"], ["i"], name="quantized"),
        make_node("Cast", ["half"], ["full"], to=TensorProto.FLOAT),
        make_node("MatMul", ["i", "full"], ["j"], name="half"),
        make_node("Concat", ["j", "hc"], ["y"], axis=1),
    ]
    return model(nodes, [value("x", ["N", 4, 1, 1])], [value("y", ["N", 8])], weights)


def write_seeds(folder: Path, seeds: dict[str, Seed]) -> None:
    """`planted.onnx`, `planted.calib.npz` and so on; statistics of every kind and a configuration."""
    for name, seed in seeds.items():
        (folder / f"{name}.onnx").write_bytes(seed.model.SerializeToString())
        np.savez(folder / f"{name}.calib.npz", **seed.calib)
    planted = seeds["planted"]
    np.savez(folder / "init.npz", **planted.init)
    safetensors.numpy.save_file(
        {n: np.ascontiguousarray(a) for n, a in planted.init.items()}, folder / "init.safetensors"
    )
    (folder / "init.json").write_text(json.dumps(SPEC))
    (folder / "init.onnx").write_bytes(planted.model.SerializeToString())
    (folder / "config.toml").write_text(CONFIG)
