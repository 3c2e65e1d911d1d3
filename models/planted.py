"""Models with a known answer: hidden blocks planted into freshly initialised weights.

A chain of layers K -> H1 -> ... -> N. Each element of each axis belongs to one block; only weights that join
two elements of one block have "learned". The order of the axes is then hidden by random permutations. The
generator keeps the exact initial weights (the snapshot) and the true blocks (the labels).

    W = c W0 + change       in-block:  change ~ N(0, s²), exactly 0 for a share `unchanged`
                            off-block: change ~ N(0, (jitter s)²) around 0, c W0 or W0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import isinf, sqrt
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from scipy.special import fdtrc

Floats = NDArray[np.float32]
Labels = NDArray[np.int32]
Form = Literal["MatMul", "Gemm", "Constant", "Transpose", "Identity"]
Activation = Literal["Relu", "Gelu", "ErfGelu", "Tanh", "Sigmoid", "none"]
Null = Literal["distribution", "snapshot"]
Off = Literal["zero", "shrunk", "untouched"]
Hide = Literal["all", "hidden", "none"]
Family = Literal["normal", "uniform"]
Dtype = Literal["float32", "float16", "bfloat16"]

INPUT, OUTPUT = "x", "y"


@dataclass(frozen=True)
class Planted:
    """What to plant. The defaults are a clear case: four even blocks at twice the init scale."""

    widths: tuple[int, ...] = (768, 3072)
    """Axes of the run: K, N or K, H1, ..., N."""
    blocks: int = 4
    uneven: bool = False
    """Random block shares, none below a third of an even one."""
    gain: float = 2.0
    """Standard deviation of in-block weights over that of their initialisation, where decay is 1."""
    decay: float = 1.0
    """c, how far weight decay shrank the initial values."""
    jitter: float = 0.0
    """Standard deviation of the off-block change, relative to that of the in-block change."""
    unchanged: float = 0.1
    """Share of in-block weights that did not change: W = c W0 exactly (before any rounding to float16)."""
    off: Off = "shrunk"
    """Off-block weights before jitter: 0, c W0 or W0. No single c fits "untouched" where decay is below 1."""
    hide: Hide = "all"
    """Axes whose order is permuted at random; "hidden" leaves inputs and outputs sorted by block."""
    family: Family = "uniform"
    init_scale: float | None = None
    """Standard deviation of initial weights; 1/sqrt(3K) by default, as torch.nn.Linear draws them."""
    form: Form = "MatMul"
    """How a layer reaches its weight: MatMul on an initializer [K, N], Gemm with transB on [N, K], MatMul on
    a Constant node, behind a Transpose of [N, K], or behind an Identity."""
    dtype: Dtype = "float32"
    activation: Activation = "Relu"
    """Between layers; "Gelu" needs opset 20, "ErfGelu" is the five operators that older exporters write."""
    bias: bool = True
    rank: Literal[2, 3] = 2
    """Rank of x: [batch, K] or [batch, sequence, K]. Gemm has rank 2 only."""
    opset: int = 17
    seed: int = 0
    structured: bool = True
    """False is a control: one block, all entries changed alike."""

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or not 1 <= self.blocks <= min(self.widths):
            raise ValueError(f"{self.blocks} blocks do not fit widths {self.widths}")
        if self.gain < 1 or not 0 <= self.unchanged < 1:
            raise ValueError(f"gain {self.gain} must be at least 1 and unchanged {self.unchanged} in [0, 1)")
        if self.form == "Gemm" and self.rank != 2:
            raise ValueError("Gemm takes inputs of rank 2 only")
        if self.activation == "Gelu" and self.opset < 20:
            raise ValueError(f"Gelu is an operator from opset 20 on, not in {self.opset}")

    def sigma(self, layer: int) -> float:
        """Standard deviation of a layer's initial weights."""
        return self.init_scale or 1 / sqrt(3 * self.widths[layer])

    @property
    def kind(self) -> np.dtype[Any]:
        """What is stored; numpy itself knows no bfloat16."""
        return np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)

    @property
    def kept(self) -> float:
        """What is left of the initial value of an off-block weight."""
        return {"zero": 0.0, "shrunk": self.decay, "untouched": 1.0}[self.off]

    def change(self, layer: int) -> float:
        """s, the standard deviation of the in-block weights that did change."""
        return self.sigma(layer) * sqrt((self.gain**2 - 1) / (1 - self.unchanged))


@dataclass(frozen=True, eq=False)
class PlantedModel:
    """A planted model and its known answer."""

    spec: Planted
    model: onnx.ModelProto
    labels: tuple[Labels, ...]
    """True block of each element of each axis, in the order of the model (after hiding)."""
    names: tuple[str, ...]
    """Stored name of each layer's weight."""
    weights: tuple[Floats, ...]
    """Canonical W [K, N] of each layer, as float32 holds what is stored."""
    initial: tuple[Floats, ...]
    """Canonical W0 [K, N] of each layer."""
    biases: tuple[Floats | None, ...]
    """b [N] of each layer."""

    @cached_property
    def snapshot(self) -> dict[str, Floats]:
        """Initial weights by stored name, in the stored layout: [N, K] for Gemm and Transpose."""
        stored = (_stored(self.spec, start) for start in self.initial)
        return dict(zip(self.names, stored, strict=True))

    def mask(self, layer: int) -> NDArray[np.bool_]:
        """[K, N], True where a weight joins two elements of one block."""
        return np.equal.outer(self.labels[layer], self.labels[layer + 1])


def build(spec: Planted) -> PlantedModel:
    """Generate the model of a spec; the same spec always gives the same bytes."""
    rng = np.random.default_rng(spec.seed)
    labels = _labels(spec, rng)
    initial, weights, biases = [], [], []
    for layer, shape in enumerate(pairwise(spec.widths)):
        start = _round(spec, _draw(spec, rng, layer, shape))
        inside = np.equal.outer(labels[layer], labels[layer + 1])
        initial.append(start)
        weights.append(_round(spec, _train(spec, rng, layer, start, inside)))
        bound = sqrt(3) * spec.sigma(layer)
        bias = rng.uniform(-bound, bound, shape[1]).astype(np.float32)
        biases.append(_round(spec, bias) if spec.bias else None)
    return _assemble(spec, labels, weights, initial, biases)


def shuffled(planted: PlantedModel, rng: np.random.Generator) -> PlantedModel:
    """Control: entries of each weight permuted, with their initial values, so that no structure remains."""
    weights, initial = [], []
    for weight, start in zip(planted.weights, planted.initial, strict=True):
        order = rng.permutation(weight.size)
        weights.append(weight.ravel()[order].reshape(weight.shape))
        initial.append(start.ravel()[order].reshape(start.shape))
    labels = tuple(np.zeros_like(axis) for axis in planted.labels)
    spec = replace(planted.spec, structured=False)
    return _assemble(spec, labels, weights, initial, planted.biases)


def calibration(
    planted: PlantedModel, samples: int, seed: int = 0, sequence: int = 8
) -> dict[str, NDArray[Any]]:
    """Standard normal inputs by name: [samples, K] or [samples, sequence, K]."""
    spec = planted.spec
    shape = (samples, spec.widths[0]) if spec.rank == 2 else (samples, sequence, spec.widths[0])
    return {INPUT: np.random.default_rng(seed).standard_normal(shape, np.float32).astype(spec.kind)}


def oracle_misplacements(K: int, N: int, G: int, kappa: float, m: int) -> float:
    """Elements that even an oracle, told the other axis, is expected to put into a wrong block.

    kappa: in-block over off-block standard deviation of what is looked at; m: the smallest block side.
    """
    tail = 0.0 if isinf(kappa) else float(fdtrc(m, m, kappa**2))
    return (K + N) * (G - 1) * tail


def contrast(spec: Planted, null: Null = "distribution") -> float:
    """kappa: in-block over off-block standard deviation of W (distribution) or of W - c W0 (snapshot)."""
    in_block = spec.gain**2 - 1
    off_block = spec.jitter**2 * in_block / (1 - spec.unchanged)
    if null == "distribution":
        in_block += spec.decay**2
        off_block += spec.kept**2
    else:
        off_block += (spec.kept - spec.decay) ** 2
    if not in_block:
        return 1.0
    return sqrt(in_block / off_block) if off_block else float("inf")


def recoverable(
    spec: Planted, null: Null = "distribution", margin: float = 1.0, misplaced: float = 0.01
) -> bool:
    """Whether every layer alone shows its blocks exactly: docs/statistics.md, with n its smaller side.

    margin: factor by which the detection threshold must be exceeded; misplaced: what the oracle may lose.
    Cautious for chains, where two layers speak for each hidden axis.
    """
    if not spec.structured or spec.blocks == 1:
        return False
    kappa, G = contrast(spec, null), spec.blocks
    if isinf(kappa):
        return True
    smallest = int(_sizes(spec, min(spec.widths)).min())
    for K, N in pairwise(spec.widths):
        n = min(K, N)
        signal = n / G * (kappa**2 - 1)
        noise = 2 * sqrt(n * (2 * kappa**4 / G + 2 * (G - 1) / G))
        if signal <= margin * noise or oracle_misplacements(K, N, G, kappa, smallest) > misplaced:
            return False
    return True


def _sizes(spec: Planted, width: int) -> NDArray[np.int64]:
    """Number of elements of each block along an axis."""
    if not spec.structured:
        return np.array([width])
    shares = np.full(spec.blocks, 1 / spec.blocks)
    if spec.uneven:
        drawn = np.random.default_rng(spec.seed).dirichlet(np.ones(spec.blocks))
        shares = shares / 3 + drawn * 2 / 3
    ends = np.round(np.cumsum(shares) * width).astype(np.int64)
    return np.diff(ends, prepend=0)


def _labels(spec: Planted, rng: np.random.Generator) -> tuple[Labels, ...]:
    """Blocks of each axis, sorted or in a random order as `hide` says."""
    labels = []
    for position, width in enumerate(spec.widths):
        sizes = _sizes(spec, width)
        axis = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        border = position in (0, len(spec.widths) - 1)
        if spec.hide == "all" or (spec.hide == "hidden" and not border):
            axis = rng.permutation(axis)
        labels.append(axis)
    return tuple(labels)


def _draw(spec: Planted, rng: np.random.Generator, layer: int, shape: tuple[int, int]) -> Floats:
    """Initial weights W0 [K, N]."""
    sigma = np.float32(spec.sigma(layer))
    if spec.family == "normal":
        return rng.standard_normal(shape, np.float32) * sigma
    return (2 * rng.random(shape, np.float32) - 1) * np.float32(sqrt(3)) * sigma


def _train(
    spec: Planted, rng: np.random.Generator, layer: int, start: Floats, inside: NDArray[np.bool_]
) -> Floats:
    """Trained weights W [K, N] from the initial ones; `inside` marks the in-block entries."""
    scale = spec.change(layer)
    weight = rng.standard_normal(start.shape, np.float32)
    weight *= np.where(inside, np.float32(scale), np.float32(scale * spec.jitter))
    if spec.unchanged:
        weight[inside & (rng.random(start.shape, np.float32) < spec.unchanged)] = 0
    weight += start * np.where(inside, np.float32(spec.decay), np.float32(spec.kept))
    return weight


def _round(spec: Planted, array: Floats) -> Floats:
    """What the stored type keeps of an array, as float32."""
    return array.astype(spec.kind).astype(np.float32)


def _stored(spec: Planted, weight: Floats) -> Floats:
    """From the canonical [K, N] to the layout that the form stores."""
    return np.ascontiguousarray(weight.T) if spec.form in ("Gemm", "Transpose") else weight


def _assemble(
    spec: Planted,
    labels: tuple[Labels, ...],
    weights: Sequence[Floats],
    initial: Sequence[Floats],
    biases: Sequence[Floats | None],
) -> PlantedModel:
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    names = []
    tensor = INPUT
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        last = layer == len(weights) - 1
        name = f"layers.{layer}"
        names.append(f"{name}.weight")
        made = OUTPUT if last else f"{name}.out"
        nodes += _layer(spec, name, tensor, made, weight, bias, constants)
        tensor = made
        if not last and spec.activation != "none":
            tensor = f"{name}.active"
            nodes += _activate(spec, name, made, tensor, constants)
    element = helper.np_dtype_to_tensor_dtype(spec.kind)
    leading = ["batch"] if spec.rank == 2 else ["batch", "sequence"]
    graph = helper.make_graph(
        nodes,
        "planted",
        [helper.make_tensor_value_info(INPUT, element, [*leading, spec.widths[0]])],
        [helper.make_tensor_value_info(OUTPUT, element, [*leading, spec.widths[-1]])],
        constants,
    )
    model = helper.make_model(
        graph,
        producer_name="onnx-decomp-planted",
        opset_imports=[helper.make_opsetid("", spec.opset)],
        ir_version=8 if spec.opset < 19 else 10,
    )
    return PlantedModel(spec, model, labels, tuple(names), tuple(weights), tuple(initial), tuple(biases))


def _layer(
    spec: Planted,
    name: str,
    source: str,
    made: str,
    weight: Floats,
    bias: Floats | None,
    constants: list[onnx.TensorProto],
) -> list[onnx.NodeProto]:
    """Nodes of y = x W + b in the spec's form; what they store is appended to `constants`."""
    stored = f"{name}.weight"
    tensor = numpy_helper.from_array(_stored(spec, weight).astype(spec.kind), stored)
    nodes, reached = [], stored
    if spec.form == "Constant":
        nodes.append(helper.make_node("Constant", [], [stored], f"{name}/Constant", value=tensor))
    else:
        constants.append(tensor)
    if spec.form in ("Transpose", "Identity"):
        reached = f"{name}.reached"
        nodes.append(helper.make_node(spec.form, [stored], [reached], f"{name}/{spec.form}"))
    if bias is not None:
        constants.append(numpy_helper.from_array(bias.astype(spec.kind), f"{name}.bias"))
    added = [] if bias is None else [f"{name}.bias"]
    if spec.form == "Gemm":
        nodes.append(helper.make_node("Gemm", [source, reached, *added], [made], f"{name}/Gemm", transB=1))
        return nodes
    product = f"{name}.product" if added else made
    nodes.append(helper.make_node("MatMul", [source, reached], [product], f"{name}/MatMul"))
    if added:
        nodes.append(helper.make_node("Add", [product, *added], [made], f"{name}/Add"))
    return nodes


def _activate(
    spec: Planted, name: str, source: str, made: str, constants: list[onnx.TensorProto]
) -> list[onnx.NodeProto]:
    """Nodes of the activation between two layers."""
    if spec.activation != "ErfGelu":
        return [helper.make_node(spec.activation, [source], [made], f"{name}/{spec.activation}")]
    for key, value in (("sqrt2", sqrt(2)), ("one", 1.0), ("half", 0.5)):
        constants.append(numpy_helper.from_array(np.array(value, spec.kind), f"{name}.{key}"))
    steps = [
        ("Div", [source, f"{name}.sqrt2"], f"{name}.scaled"),
        ("Erf", [f"{name}.scaled"], f"{name}.erf"),
        ("Add", [f"{name}.erf", f"{name}.one"], f"{name}.gate"),
        ("Mul", [source, f"{name}.gate"], f"{name}.gated"),
        ("Mul", [f"{name}.gated", f"{name}.half"], made),
    ]
    return [
        helper.make_node(op, inputs, [out], f"{name}/gelu/{position}_{op}")
        for position, (op, inputs, out) in enumerate(steps)
    ]
