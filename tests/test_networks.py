"""The planted networks are what they claim to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import erf, sqrt
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from scipy.special import expit

from models.networks import (
    EVERY,
    STACKS,
    Kind,
    Network,
    PlantedNetwork,
    build,
    calibration,
    flops,
    random_spec,
)

Array = NDArray[Any]
KINDS: tuple[Kind, ...] = get_args(Kind)
SEEDS = range(30)
BORDERED = ("gated", "towers")

ACTIVE: dict[str, Callable[[Array], Array]] = {
    "Relu": lambda y: np.maximum(y, 0),
    "Gelu": np.vectorize(lambda value: value * (1 + erf(value / sqrt(2))) / 2),
    "Tanh": np.tanh,
    "Sigmoid": expit,
}
ACTIVE["ErfGelu"] = ACTIVE["Gelu"]


def drawn(kind: Kind, seed: int, **fixed: Any) -> PlantedNetwork:
    """A random network of one kind."""
    rng = np.random.default_rng([KINDS.index(kind), seed])
    return build(random_spec(rng, kind=kind, **fixed))


def constants(model: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def run(model: onnx.ModelProto, inputs: dict[str, Array]) -> Array:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, inputs)
    return np.asarray(y)


def rewritten(network: PlantedNetwork, change: Callable[[str, Array], Array]) -> onnx.ModelProto:
    """The model with its weights W [K, N] put through `change(name, W)`."""
    model: onnx.ModelProto = onnx.ModelProto.FromString(network.model.SerializeToString())
    for tensor in model.graph.initializer:
        if tensor.name in network.weights:
            array = change(tensor.name, network.weights[tensor.name])
            layout = array if network.spec.form == "MatMul" else np.ascontiguousarray(array.T)
            tensor.CopyFrom(numpy_helper.from_array(layout, tensor.name))
    return model


class Reference:
    """The network by numpy in float64, from what the file stores."""

    def __init__(self, network: PlantedNetwork) -> None:
        self.spec = network.spec
        self.held = {name: array.astype(np.float64) for name, array in constants(network.model).items()}

    def linear(self, name: str, x: Array) -> Array:
        weight = self.held[f"{name}.weight"]
        return x @ (weight if self.spec.form == "MatMul" else weight.T) + self.held.get(f"{name}.bias", 0)

    def norm(self, name: str, x: Array) -> Array:
        if self.spec.norm == "none":
            return x
        scale, shift = self.held[f"{name}.scale"], self.held.get(f"{name}.shift", 0)
        middle: Array | float = x.mean(-1, keepdims=True) if self.spec.norm == "layer" else 0.0
        variance = ((x - middle) ** 2).mean(-1, keepdims=True)
        if self.spec.norm == "batch":
            middle, variance = self.held[f"{name}.mean"], self.held[f"{name}.variance"]
        return np.asarray((x - middle) / np.sqrt(variance + 1e-5) * scale + shift)

    def attention(self, name: str, x: Array) -> Array:
        size = self.spec.width // self.spec.heads
        q, k, v = (self.linear(f"{name}.{part}", x) for part in ("query", "key", "value"))
        mixed = np.zeros_like(q)
        for head in range(self.spec.heads):
            own = slice(head * size, (head + 1) * size)
            scores = np.einsum("bti,bsi->bts", q[..., own], k[..., own]) / sqrt(size)
            if self.spec.causal:
                scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[..., own] = shares / shares.sum(-1, keepdims=True) @ v[..., own]
        return self.linear(f"{name}.output", mixed)

    def feed_forward(self, name: str, x: Array) -> Array:
        inner = self.linear(f"{name}.up", x)
        if self.spec.kind == "gated" or self.spec.feed_forward == "gated":
            gate = self.linear(f"{name}.gate", x)
            inner = inner * gate * ACTIVE["Sigmoid"](gate)
        else:
            inner = ACTIVE[self.spec.activation](inner)
        return self.linear(f"{name}.down", inner)

    def __call__(self, x: Array) -> Array:
        spec = self.spec
        if spec.kind == "gated":
            return self.feed_forward("feed", x)
        if spec.kind == "towers":
            for layer in range(spec.layers):
                x = self.linear(f"layers.{layer}", ACTIVE[spec.activation](x) if layer else x)
            return x
        looked_up = spec.embedding == "gather"
        x = self.held["embedding.weight"][x] if looked_up else self.linear("embedding", x)
        if spec.kind == "transformer" or spec.positions:
            x = x + self.held["positions"]
        for layer in range(spec.layers):
            name = f"layers.{layer}"
            weights = "shared" if spec.kind == "albert" else name
            norms = "shared" if spec.kind == "albert" and spec.shared_norm else name
            if spec.kind == "transformer":
                x = x + self.attention(f"{name}.attention", self.norm(f"{norms}.attention_norm", x))
            x = x + self.feed_forward(weights, self.norm(f"{norms}.norm", x))
        return self.linear("head", self.norm("norm", x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_networks_run_and_agree_with_numpy(kind: Kind, seed: int) -> None:
    network = drawn(kind, seed)
    onnx.checker.check_model(network.model, full_check=True)
    inputs = calibration(network, 5, seed)
    y, wanted = run(network.model, inputs), Reference(network)(inputs[network.input])
    assert y.shape == wanted.shape
    assert np.abs(y - wanted).max() <= 1e-4 * np.abs(wanted).max()
    nodes = [node.name for node in network.model.graph.node]
    assert len(set(nodes)) == len(nodes)


def test_the_random_specs_reach_every_option() -> None:
    specs = [random_spec(np.random.default_rng(seed)) for seed in range(300)]
    reached = {name: {getattr(spec, name) for spec in specs} for name in vars(specs[0])}
    assert reached["kind"] == set(KINDS)
    assert reached["norm"] == {"layer", "rms", "batch", "none"}
    assert reached["form"] == {"MatMul", "Gemm", "Transpose"}
    assert reached["trunk"] == {0, 1, 2}
    assert all(len(values) > 1 for name, values in reached.items() if name != "unchanged")
    assert all(16 <= spec.width <= 48 and spec.blocks in (2, 3) for spec in specs)


@pytest.mark.parametrize("kind", KINDS)
def test_each_block_works_alone(kind: Kind) -> None:
    """A block without the rest of the network gives its outputs, or its share of what the head adds up."""
    for seed in range(4):
        norm = "batch" if kind not in ("transformer", *BORDERED) and seed % 2 else "none"
        network = drawn(kind, seed, off="zero", jitter=0.0, norm=norm, trunk=0)
        inputs = calibration(network, 7)
        whole, total = run(network.model, inputs), np.zeros(())
        for block in range(network.spec.blocks):

            def own(name: str, weight: Array, network: PlantedNetwork = network, block: int = block) -> Array:
                rows, columns = (np.isin(axis, (block, EVERY)) for axis in network.labels[name])
                return np.where(np.outer(rows, columns), weight, np.float32(0))

            y = run(rewritten(network, own), inputs)
            if kind in BORDERED:
                (*_, (_, columns)) = network.labels.values()
                np.testing.assert_allclose(y[..., columns == block], whole[..., columns == block], atol=1e-4)
            total = total + y
        if kind in STACKS:
            bias = constants(network.model).get("head.bias", np.zeros(()))
            total = total - (network.spec.blocks - 1) * bias
            np.testing.assert_allclose(total, whole, atol=1e-4 * np.abs(whole).max())


@pytest.mark.parametrize("kind", KINDS)
def test_sorting_by_label_shows_diagonal_blocks(kind: Kind) -> None:
    network = drawn(kind, 1, off="zero", jitter=0.0, hide=True, trunk=0)
    assert set(network.labels) == set(network.weights) == set(network.initial) == set(network.uses)
    for name, weight in network.weights.items():
        axes = network.labels[name]
        rows, columns = (np.argsort(axis, kind="stable") for axis in axes)
        kept = weight[np.ix_(rows, columns)] != 0
        if any((axis == EVERY).all() for axis in axes):
            assert kept.all()
            continue
        for block in range(network.spec.blocks):
            own = tuple(slice(*np.searchsorted(np.sort(axis), (block, block + 1))) for axis in axes)
            assert kept[own].all()
            assert kept[own].size
            kept[own] = False
        assert not kept.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("off", ["zero", "shrunk", "untouched"])
def test_the_snapshot_is_what_unlearned_weights_hold(kind: Kind, off: str) -> None:
    network = drawn(kind, 2, off=off, decay=0.5, jitter=0.0, hidden=200)
    kept = np.float32({"zero": 0.0, "shrunk": 0.5, "untouched": 1.0}[off])
    stored = constants(network.model)
    for name, weight in network.weights.items():
        start, inside = network.initial[name], network.mask(name)
        np.testing.assert_array_equal(weight[~inside], kept * start[~inside])
        unlearned = (weight == np.float32(0.5) * start)[inside].mean()
        assert abs(unlearned - 0.1) < 5 * sqrt(0.09 / inside.sum())
        canonical = stored[name] if network.spec.form == "MatMul" else stored[name].T
        np.testing.assert_array_equal(canonical, weight)
        snapshot = network.snapshot[name] if network.spec.form == "MatMul" else network.snapshot[name].T
        np.testing.assert_array_equal(snapshot, start)


def test_orders_are_hidden_where_they_are_free() -> None:
    model = build(Network("transformer", 48, 96, blocks=3, heads=6, vocabulary=40, outputs=8))
    streams = [
        model.labels[f"layers.{layer}.{name}.weight"][0]
        for layer in (0, 1)
        for name in ("up", "attention.key")
    ]
    streams += [model.labels["head.weight"][0], model.labels["layers.1.down.weight"][1]]
    assert all((axis == streams[0]).all() for axis in streams)
    assert (np.diff(streams[0]) < 0).any()
    for name in ("query", "key", "value"):
        heads = model.labels[f"layers.0.attention.{name}.weight"][1].reshape(6, 8)
        assert (heads == heads[:, :1]).all()
        np.testing.assert_array_equal(heads.ravel(), model.labels["layers.0.attention.output.weight"][0])
    np.testing.assert_array_equal(np.bincount(heads[:, 0]), [2, 2, 2])
    towers = build(Network("towers", 48, 96, blocks=3, layers=4, outputs=9, trunk=1, rank=2))
    assert (towers.labels["layers.0.weight"][0] == EVERY).all()
    assert (np.diff(towers.labels["layers.2.weight"][0]) < 0).any()
    assert (np.diff(towers.labels["layers.3.weight"][1]) >= 0).all()
    plain = build(Network("gated", 48, 96, blocks=3, hide=False))
    assert all((np.diff(axis) >= 0).all() for axes in plain.labels.values() for axis in axes)


def test_flops_count_every_use() -> None:
    gated = flops(build(Network("gated", 32, 64, blocks=4, rank=2)))
    assert gated == (2 * 3 * 32 * 64, 2 * 3 * 32 * 64 // 4)
    spec: dict[str, Any] = {
        "width": 32,
        "hidden": 64,
        "vocabulary": 40,
        "outputs": 10,
        "layers": 3,
        "sequence": 5,
    }
    shared = flops(build(Network("albert", **spec)))
    assert shared == flops(build(Network("residual", **spec)))
    head = 2 * 5 * 32 * 10
    assert shared == (head + 2 * 5 * 3 * 2 * 32 * 64, head + 2 * 5 * 3 * 2 * 32 * 64 // 4)


def test_same_spec_same_bytes() -> None:
    for kind in KINDS:
        spec = random_spec(np.random.default_rng(3), kind=kind)
        first, again, other = build(spec), build(spec), build(replace(spec, seed=spec.seed + 1))
        assert first.model.SerializeToString() == again.model.SerializeToString()
        assert first.model.SerializeToString() != other.model.SerializeToString()


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "recurrent"},
        {"norm": "group"},
        {"kind": "transformer", "heads": 7},
        {"kind": "transformer", "heads": 2},
        {"kind": "transformer", "rank": 2},
        {"norm": "batch"},
        {"positions": True, "rank": 2},
        {"trunk": 1},
        {"kind": "towers", "trunk": 2},
        {"kind": "towers", "outputs": 3},
        {"blocks": 0},
        {"hidden": 3},
        {"layers": 0},
        {"opset": 12},
        {"form": "Gemm"},
        {"activation": "Gelu"},
        {"gain": 0.5},
    ],
)
def test_impossible_specs_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"none of|heads|rank 2|rank 3|trunk|blocks|at least 1|opset 20|gain"
    ):
        Network(**wrong)
