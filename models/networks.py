"""Whole networks with a known answer: residual stacks, gated pairs, shared layers, towers and transformers.

Each unit of each axis belongs to one block; a weight learned only where it joins two units of one block, as in
`models.planted`. Then the orders that a network is free to choose (the residual stream, hidden units, whole
heads) are hidden by random permutations; inputs and outputs of the graph keep theirs. The exact initial weights
(the snapshot) and the true blocks (the labels) are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from math import sqrt
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from models.planted import Activation, Floats, Labels, Off, Planted, _activate, _draw, _sizes, _stored, _train

Kind = Literal["residual", "albert", "transformer", "gated", "towers"]
Norm = Literal["layer", "rms", "batch", "none"]
FeedForward = Literal["plain", "gated"]
Embedding = Literal["gather", "linear"]
Form = Literal["MatMul", "Gemm", "Transpose"]

OUTPUT = "y"
EVERY = -1
"""Label of a unit that belongs to all blocks: dense weights have it on at least one side."""
EPSILON = 1e-5
STACKS = ("residual", "albert", "transformer")


@dataclass(frozen=True)
class Network:
    """What to build. The defaults are a clear case at the size of a small language model."""

    kind: Kind = "residual"
    """residual: embedding, layers x {x + feed-forward(norm(x))}, norm, dense head;
    albert: the same, all layers reading the same stored weights;
    transformer: attention before each feed-forward, learned positions;
    gated: one gated feed-forward y = (silu(x Wg) * (x Wu)) Wd, width -> hidden -> width;
    towers: an MLP of `layers` layers, width -> hidden -> ... -> outputs."""
    width: int = 768
    """Units of the residual stream; inputs of "gated" and "towers"."""
    hidden: int = 3072
    blocks: int = 4
    """1 is a control: all entries learned alike."""
    uneven: bool = False
    """Random block shares, none below a third of an even one; heads are always dealt evenly."""
    layers: int = 2
    heads: int = 8
    outputs: int = 64
    """Columns of the head, or outputs of the towers."""
    vocabulary: int = 4096
    """Rows of the embedding table, or inputs of the linear embedding. Without attention, the stream holds at most
    `vocabulary` different rows behind a table (times `sequence` with positions)."""
    embedding: Embedding = "gather"
    """A table that tokens look up, or a dense layer that inputs go through."""
    positions: bool = False
    """A learned constant [sequence, width] added to the embedding; a transformer always has it."""
    sequence: int = 16
    """Tokens of a sample where x has rank 3; part of the graph only with positions."""
    feed_forward: FeedForward = "plain"
    norm: Norm = "layer"
    """Before each sublayer and the head. layer: LayerNormalization, or its exported pieces below opset 17;
    rms: exported pieces; batch: BatchNormalization, rank 2 only. After "batch" or "none" only the head joins blocks."""
    shared_norm: bool = True
    """Whether the layers of an "albert" share their norm too."""
    causal: bool = False
    trunk: int = 0
    """How many first layers of the towers are dense; the blocks begin at the outputs of the last of them."""
    gain: float = 3.0
    decay: float = 1.0
    jitter: float = 0.0
    unchanged: float = 0.1
    off: Off = "zero"
    """gain, decay, jitter, unchanged and off mean what they mean in `Planted`."""
    hide: bool = True
    """False leaves every axis sorted by block."""
    activation: Activation = "Relu"
    """Of plain feed-forwards and towers."""
    bias: bool = True
    form: Form = "MatMul"
    rank: Literal[2, 3] = 3
    """Rank of what the layers work on: [batch, width] or [batch, sequence, width]."""
    opset: int = 17
    seed: int = 0

    def __post_init__(self) -> None:
        for chosen, known in ((self.kind, Kind), (self.norm, Norm), (self.feed_forward, FeedForward)):
            if chosen not in get_args(known):
                raise ValueError(f"{chosen!r} is none of {get_args(known)}")
        attends, stacked = self.kind == "transformer", self.kind in STACKS
        borders = (self.width, self.outputs) if self.kind == "towers" else (self.width,)
        self.recipe(min(borders), self.hidden, self.blocks)  # refuses what Planted refuses
        if self.layers < 1 or self.sequence < 1 or self.vocabulary < 1 or self.opset < 13:
            raise ValueError("layers, sequence and vocabulary must be at least 1, the opset at least 13")
        if attends and (self.width % self.heads or self.heads < self.blocks):
            raise ValueError(f"{self.heads} heads do not fit {self.width} units in {self.blocks} blocks")
        if self.rank == 2 and (attends or self.positions):
            raise ValueError("attention and positions need rank 3")
        if self.rank == 3 and stacked and self.norm == "batch":
            raise ValueError("norm 'batch' needs rank 2: the channels of rank 3 would be the tokens")
        if self.trunk and (self.kind != "towers" or not 0 < self.trunk < self.layers):
            raise ValueError(f"a trunk of {self.trunk} layers needs towers with more layers than that")

    def recipe(self, K: int, N: int, blocks: int = 1) -> Planted:
        """How one weight [K, N] is drawn, trained and stored."""
        both = {own.name for own in fields(self)} & {other.name for other in fields(Planted)}
        same = {name: getattr(self, name) for name in both - {"blocks", "hide"}}
        return Planted((K, N), blocks=blocks, **same)

    @property
    def takes_tokens(self) -> bool:
        """Whether the graph's input is tokens, int64 [batch] or [batch, sequence]."""
        return self.kind in STACKS and self.embedding == "gather"

    @property
    def has_positions(self) -> bool:
        """Whether the sequence length is part of the graph."""
        return self.kind == "transformer" or (self.kind in STACKS and self.positions)


@dataclass(frozen=True, eq=False)
class PlantedNetwork:
    """A planted network and its known answer; weights go by their stored name."""

    spec: Network
    model: onnx.ModelProto
    labels: dict[str, tuple[Labels, Labels]]
    """True block of each input [K] and each output [N] of the canonical W; EVERY where it belongs to all."""
    weights: dict[str, Floats]
    """Canonical W [K, N], y = x W."""
    initial: dict[str, Floats]
    """Canonical W0 [K, N]."""
    uses: dict[str, int]
    """How many layers read the weight."""

    @cached_property
    def snapshot(self) -> dict[str, Floats]:
        """Initial weights in the stored layout: [N, K] for Gemm and Transpose."""
        recipe = self.spec.recipe(self.spec.width, self.spec.hidden)
        return {name: _stored(recipe, start) for name, start in self.initial.items()}

    def mask(self, name: str) -> NDArray[np.bool_]:
        """[K, N], True where a weight joins two units of one block, or a unit of all."""
        return _joined(*self.labels[name])

    @property
    def input(self) -> str:
        """Name of the graph's input."""
        return str(self.model.graph.input[0].name)


class Flops(NamedTuple):
    """Twice the multiply-adds of all constant matrices for one sample."""

    dense: int
    ideal: int
    """Of the true blocks alone."""


def build(spec: Network) -> PlantedNetwork:
    """Generate the network of a spec; the same spec always gives the same bytes."""
    graph = _Graph(spec, np.random.default_rng(spec.seed))
    makers: dict[Kind, Callable[[_Graph], int]] = {"gated": _gated, "towers": _towers}
    columns = makers.get(spec.kind, _stack)(graph)
    graph.nodes[-1].output[0] = OUTPUT
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            spec.kind,
            [_input(spec)],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [*_leading(spec), columns])],
            list(graph.constants.values()),
        ),
        producer_name="onnx-decomp-planted",
        opset_imports=[helper.make_opsetid("", spec.opset)],
        ir_version=8 if spec.opset < 19 else 10,
    )
    return PlantedNetwork(spec, model, graph.labels, graph.weights, graph.initial, dict(graph.uses))


def calibration(network: PlantedNetwork, samples: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Inputs by name: even random tokens [samples(, sequence)], or standard normal x [samples(, sequence), K]."""
    spec, rng = network.spec, np.random.default_rng(seed)
    shape = (samples,) if spec.rank == 2 else (samples, spec.sequence)
    if spec.takes_tokens:
        return {network.input: rng.integers(0, spec.vocabulary, shape)}
    return {network.input: rng.standard_normal((*shape, _inputs(spec)), np.float32)}


def flops(network: PlantedNetwork) -> Flops:
    """What one sample of the calibration data costs: `sequence` rows where the rank is 3, else one."""
    rows = 2 * (1 if network.spec.rank == 2 else network.spec.sequence)
    dense = sum(network.weights[name].size * uses for name, uses in network.uses.items())
    ideal = sum(int(network.mask(name).sum()) * uses for name, uses in network.uses.items())
    return Flops(rows * dense, rows * ideal)


def random_spec(rng: np.random.Generator, **fixed: Any) -> Network:
    """A small spec (width 16 to 48, two or three blocks) drawn over all kinds and options, but for what is fixed.

    Fixed options that contradict each other, or need others to be fixed with them (Gelu: the opset), are refused.
    """

    def pick(name: str, among: Sequence[Any]) -> Any:
        drawn = among[int(rng.integers(len(among)))]
        return fixed.get(name, drawn)

    kind = pick("kind", get_args(Kind))
    flat = fixed.get("norm") == "batch" or fixed.get("form") == "Gemm"
    rank = 3 if kind == "transformer" else pick("rank", (2,) if flat else (2, 3))
    norm = pick("norm", [name for name in get_args(Norm) if rank == 2 or name != "batch"])
    blocks, opset = pick("blocks", (2, 3)), pick("opset", (13, 17, 18, 21))
    layers = pick("layers", (2, 3) if kind == "towers" else (1, 2, 3))
    heads = pick("heads", (blocks, 2 * blocks))
    width = pick("width", range(-(-16 // heads) * heads, 49, heads))
    drawn = {"kind": kind, "rank": rank, "norm": norm, "blocks": blocks, "opset": opset, "layers": layers}
    drawn |= {"heads": heads, "width": width}
    choices: Mapping[str, Sequence[Any]] = {
        "hidden": range(32, 81),
        "outputs": range(8, 25),
        "vocabulary": range(24, 61),
        "sequence": range(2, 9),
        "trunk": range(layers) if kind == "towers" else (0,),
        "positions": (False, True) if rank == 3 else (False,),
        "form": get_args(Form) if rank == 2 else ("MatMul", "Transpose"),
        "activation": ("Relu", "ErfGelu", "Tanh", "Gelu" if opset >= 20 else "Sigmoid"),
        "embedding": get_args(Embedding),
        "feed_forward": get_args(FeedForward),
        "off": get_args(Off),
        "gain": (2.0, 3.0, 4.0),
        "decay": (1.0, 0.5),
        "jitter": (0.0, 0.0, 0.02),
        "seed": range(1 << 31),
    }
    flags = dict.fromkeys(("uneven", "shared_norm", "causal", "bias", "hide"), (False, True))
    drawn |= {name: pick(name, among) for name, among in [*choices.items(), *flags.items()]}
    return Network(**(drawn | fixed))


def _joined(rows: Labels, columns: Labels) -> NDArray[np.bool_]:
    """[K, N], True where a row and a column have a block in common."""
    one, all_ = rows[:, None] == columns, (rows == EVERY)[:, None] | (columns == EVERY)
    return np.asarray(one | all_)


def _inputs(spec: Network) -> int:
    """Last axis of a float input."""
    return spec.vocabulary if spec.kind in STACKS else spec.width


def _leading(spec: Network) -> list[int | str]:
    """Axes before the last: batch, and the sequence where the rank is 3."""
    if spec.rank == 2:
        return ["batch"]
    return ["batch", spec.sequence if spec.has_positions else "sequence"]


def _input(spec: Network) -> onnx.ValueInfoProto:
    if spec.takes_tokens:
        return helper.make_tensor_value_info("tokens", TensorProto.INT64, _leading(spec))
    return helper.make_tensor_value_info("x", TensorProto.FLOAT, [*_leading(spec), _inputs(spec)])


@dataclass
class _Graph:
    """A graph in the making; parts append to it in running order, so the last node makes the output."""

    spec: Network
    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    labels: dict[str, tuple[Labels, Labels]] = field(default_factory=dict)
    weights: dict[str, Floats] = field(default_factory=dict)
    initial: dict[str, Floats] = field(default_factory=dict)
    uses: Counter[str] = field(default_factory=Counter)

    def node(self, op: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Appends a node, and gives its output."""
        made = f"{name}.out"
        self.nodes.append(helper.make_node(op, inputs, [made], name, **attributes))
        return made

    def constant(self, name: str, value: NDArray[Any] | np.float32) -> str:
        """Stores an array; one that is already stored under this name (shared) stays."""
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def vector(self, name: str, middle: float, spread: float) -> str:
        """A learned value for each unit of the stream, within `spread` around `middle`."""
        drawn = self.rng.uniform(middle - spread, middle + spread, self.spec.width)
        return self.constant(name, drawn.astype(np.float32))

    def axis(self, count: int, hide: bool = True) -> Labels:
        """Blocks [count] of an axis, in a random order where the spec hides them."""
        sizes = _sizes(self.spec.recipe(count, count, self.spec.blocks), count)
        sorted_ = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        return self.rng.permutation(sorted_) if hide and self.spec.hide else sorted_

    def linear(self, place: str, stored: str, source: str, rows: Labels, columns: Labels) -> str:
        """y = x W + b in the spec's form; draws W where it is not stored yet. Nodes are named after `place`."""
        spec, weight, bias = self.spec, f"{stored}.weight", f"{stored}.bias"
        recipe = spec.recipe(rows.size, columns.size)
        if weight not in self.weights:
            start = _draw(recipe, self.rng, 0, (rows.size, columns.size))
            self.labels[weight] = (rows, columns)
            self.initial[weight] = start
            self.weights[weight] = _train(recipe, self.rng, 0, start, _joined(rows, columns))
            self.constant(weight, _stored(recipe, self.weights[weight]))
        self.uses[weight] += 1
        drawn = _draw(recipe, self.rng, 0, (1, columns.size))[0]
        added = [self.constant(bias, drawn)] if spec.bias else []
        if spec.form == "Gemm":
            return self.node("Gemm", f"{place}/Gemm", [source, weight, *added], transB=1)
        if spec.form == "Transpose":
            weight = self.node("Transpose", f"{place}/Transpose", [weight], perm=[1, 0])
        made = self.node("MatMul", f"{place}/MatMul", [source, weight])
        return self.node("Add", f"{place}/Add", [made, *added]) if added else made

    def activate(self, place: str, source: str) -> str:
        """The spec's activation."""
        if self.spec.activation == "none":
            return source
        made, constants = f"{place}.active", list[onnx.TensorProto]()
        recipe = self.spec.recipe(self.spec.width, self.spec.hidden)
        self.nodes += _activate(recipe, place, source, made, constants)
        self.constants |= {tensor.name: tensor for tensor in constants}
        return made

    def mean(self, name: str, source: str) -> str:
        """Mean over the last axis, kept as 1; its axes are an attribute below opset 18."""
        if self.spec.opset < 18:
            return self.node("ReduceMean", name, [source], axes=[-1])
        return self.node("ReduceMean", name, [source, self.constant("last_axis", np.array([-1]))])


def _gated(graph: _Graph) -> int:
    axes = graph.axis(graph.spec.width, hide=False), graph.axis(graph.spec.hidden)
    _feed_forward(graph, "feed", "feed", "x", axes)
    return graph.spec.width


def _towers(graph: _Graph) -> int:
    spec, tensor = graph.spec, "x"
    widths = [spec.width, *[spec.hidden] * (spec.layers - 1), spec.outputs]
    axes = [graph.axis(width, hide=0 < place < spec.layers) for place, width in enumerate(widths)]
    for place in range(spec.trunk):
        axes[place] = _every(widths[place])
    for layer, (rows, columns) in enumerate(pairwise(axes)):
        name = f"layers.{layer}"
        tensor = graph.linear(name, name, tensor, rows, columns)
        if layer < spec.layers - 1:
            tensor = graph.activate(name, tensor)
    return spec.outputs


def _stack(graph: _Graph) -> int:
    spec, stream = graph.spec, graph.axis(graph.spec.width)
    tensor = _embed(graph, stream)
    for layer in range(spec.layers):
        place = f"layers.{layer}"
        stored = "shared" if spec.kind == "albert" else place
        norms = place if spec.kind != "albert" or not spec.shared_norm else stored
        if not layer or spec.kind != "albert":
            hidden = graph.axis(spec.hidden)
        if spec.kind == "transformer":
            normed = _norm(graph, f"{place}.attention_norm", f"{norms}.attention_norm", tensor)
            attended = _attend(graph, f"{place}.attention", normed, stream)
            tensor = graph.node("Add", f"{place}.attention_residual/Add", [tensor, attended])
        normed = _norm(graph, f"{place}.norm", f"{norms}.norm", tensor)
        fed = _feed_forward(graph, place, stored, normed, (stream, hidden))
        tensor = graph.node("Add", f"{place}.residual/Add", [tensor, fed])
    # What reads the head is outside: its columns belong to no single block.
    graph.linear("head", "head", _norm(graph, "norm", "norm", tensor), stream, _every(spec.outputs))
    return spec.outputs


def _every(count: int) -> Labels:
    return np.full(count, EVERY, np.int32)


def _embed(graph: _Graph, stream: Labels) -> str:
    """The start of the stream."""
    spec = graph.spec
    if spec.embedding == "linear":
        tensor = graph.linear("embedding", "embedding", "x", _every(spec.vocabulary), stream)
    else:
        drawn = graph.rng.standard_normal((spec.vocabulary, spec.width), np.float32)
        table = graph.constant("embedding.weight", drawn)
        tensor = graph.node("Gather", "embedding/Gather", [table, "tokens"], axis=0)
    if not spec.has_positions:
        return tensor
    learned = graph.constant("positions", graph.rng.standard_normal((spec.sequence, spec.width), np.float32))
    return graph.node("Add", "positions/Add", [tensor, learned])


def _feed_forward(graph: _Graph, place: str, stored: str, source: str, axes: tuple[Labels, Labels]) -> str:
    """plain: act(x Wu) Wd; gated: (silu(x Wg) * (x Wu)) Wd, each product with its bias; axes: stream and hidden."""
    stream, hidden = axes
    up = graph.linear(f"{place}.up", f"{stored}.up", source, stream, hidden)
    if graph.spec.kind != "gated" and graph.spec.feed_forward == "plain":
        inner = graph.activate(f"{place}.up", up)
    else:
        gate = graph.linear(f"{place}.gate", f"{stored}.gate", source, stream, hidden)
        opened = graph.node("Sigmoid", f"{place}.gate/Sigmoid", [gate])
        silu = graph.node("Mul", f"{place}.gate/Mul", [gate, opened])
        inner = graph.node("Mul", f"{place}.gated/Mul", [silu, up])
    return graph.linear(f"{place}.down", f"{stored}.down", inner, hidden, stream)


def _attend(graph: _Graph, place: str, source: str, stream: Labels) -> str:
    """Attention over the sequence; each head belongs to a block, its columns stay together and in order."""
    spec = graph.spec
    size = spec.width // spec.heads
    dealt = (np.arange(spec.heads) * spec.blocks // spec.heads).astype(np.int32)
    inner = np.repeat(graph.rng.permutation(dealt) if spec.hide else dealt, size)
    split = graph.constant("attention.split", np.array([0, 0, spec.heads, size]))
    parts = {}
    for name, order in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
        part = graph.linear(f"{place}.{name}", f"{place}.{name}", source, stream, inner)
        part = graph.node("Reshape", f"{place}.{name}/Reshape", [part, split])
        parts[name] = graph.node("Transpose", f"{place}.{name}/heads", [part], perm=order)
    scores = graph.node("MatMul", f"{place}.scores/MatMul", [parts["query"], parts["key"]])
    scale = graph.constant("attention.scale", np.float32(1 / sqrt(size)))
    scores = graph.node("Mul", f"{place}.scores/Mul", [scores, scale])
    if spec.causal:
        ahead = np.triu(np.full((spec.sequence, spec.sequence), -1e9, np.float32), 1)
        scores = graph.node("Add", f"{place}.scores/Add", [scores, graph.constant("attention.mask", ahead)])
    shares = graph.node("Softmax", f"{place}.scores/Softmax", [scores], axis=-1)
    mixed = graph.node("MatMul", f"{place}.mixed/MatMul", [shares, parts["value"]])
    mixed = graph.node("Transpose", f"{place}.mixed/Transpose", [mixed], perm=[0, 2, 1, 3])
    joined = graph.constant("attention.join", np.array([0, 0, spec.width]))
    mixed = graph.node("Reshape", f"{place}.mixed/Reshape", [mixed, joined])
    return graph.linear(f"{place}.output", f"{place}.output", mixed, inner, stream)


def _norm(graph: _Graph, place: str, stored: str, source: str) -> str:
    """The spec's norm over the units of the stream, each with its own scale (and shift, but for "rms")."""
    norm = graph.spec.norm
    if norm == "none":
        return source
    scale = graph.vector(f"{stored}.scale", 1, 0.3)
    if norm == "rms":
        return _scaled(graph, place, source, source, scale)
    shift = graph.vector(f"{stored}.shift", 0, 0.3)
    if norm == "batch":
        moments = graph.vector(f"{stored}.mean", 0, 0.5), graph.vector(f"{stored}.variance", 1, 0.5)
        inputs = [source, scale, shift, *moments]
        return graph.node("BatchNormalization", f"{place}/BatchNormalization", inputs, epsilon=EPSILON)
    if graph.spec.opset >= 17:
        name, inputs = f"{place}/LayerNormalization", [source, scale, shift]
        return graph.node("LayerNormalization", name, inputs, axis=-1, epsilon=EPSILON)
    middle = graph.mean(f"{place}/ReduceMean_middle", source)
    centred = graph.node("Sub", f"{place}/Sub", [source, middle])
    return graph.node("Add", f"{place}/Add", [_scaled(graph, place, source, centred, scale), shift])


def _scaled(graph: _Graph, place: str, source: str, centred: str, scale: str) -> str:
    """scale * c / sqrt(mean(c²) + epsilon), as exporters write it: Div for LayerNorm, Reciprocal for RMSNorm."""
    square = graph.node("Pow", f"{place}/Pow", [centred, graph.constant("two", np.float32(2))])
    power = graph.mean(f"{place}/ReduceMean", square)
    power = graph.node("Add", f"{place}/Add_epsilon", [power, graph.constant("epsilon", np.float32(EPSILON))])
    root = graph.node("Sqrt", f"{place}/Sqrt", [power])
    if centred == source:
        inverse = graph.node("Reciprocal", f"{place}/Reciprocal", [root])
        normed = graph.node("Mul", f"{place}/Mul", [centred, inverse])
    else:
        normed = graph.node("Div", f"{place}/Div", [centred, root])
    return graph.node("Mul", f"{place}/Mul_scale", [normed, scale])
