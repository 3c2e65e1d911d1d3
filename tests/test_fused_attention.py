"""Attention and MultiHeadAttention of com.microsoft: seen as products, narrower by head, in blocks of heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnx_decomp.axes import find_regions
from onnx_decomp.passes.splitting import emit
from onnx_decomp.probe import Probe
from onnx_decomp.program import Rewrite
from onnx_decomp.runtime import open_session
from onnx_decomp.sites import GraphIndex, Site, find_sites, read_affine
from tests.attentions import (
    FORMS,
    HEADS,
    NATIVE,
    SAMPLES,
    TOKENS,
    WIDTH,
    Array,
    Fused,
    check_close,
    index_of,
    run,
)
from tests.test_golden import check
from tests.test_heads import heads_in_two, narrowed


@pytest.mark.parametrize("spec", FORMS, ids=str)
def test_the_products_compute_what_the_operator_does(spec: Fused) -> None:
    """In normal form the model is another one, and computes the same."""
    index = index_of(spec.model())
    sites = find_sites(index)
    assert [site.obstacle for site in sites] == [None] * 4
    feeds = spec.feeds(SAMPLES, 1)
    found = Probe(index, sites, None).run(feeds, {})["y"].astype(np.float64)
    check_close(found, run(index.proto, feeds), spec.dtype)


def test_sites_of_an_attention() -> None:
    sites = find_sites(index_of(Fused(widths=(12, 36)).model()))
    told = [(site.name, site.op, site.weight, site.shape) for site in sites]
    assert told == [
        ("attention/query", "Attention", "W", (24, 12)),
        ("attention/key", "Attention", "W", (24, 12)),
        ("attention/value", "Attention", "W", (24, 36)),
        ("node_o", "MatMul", "Wo", (36, 24)),
    ]
    weights = Fused(widths=(12, 36)).weights
    for site, name in zip(sites, ("q", "k", "v", "o"), strict=True):
        affine = read_affine(index_of(Fused(widths=(12, 36)).model()), site)
        np.testing.assert_array_equal(affine.weight, weights[name])
        np.testing.assert_array_equal(affine.bias, weights[f"b{name}"])


@pytest.mark.parametrize("spec", FORMS, ids=str)
def test_what_is_not_rewritten_stays_byte_for_byte(spec: Fused) -> None:
    model = spec.model()
    assert emit(index_of(model), [], spec.opset) == model


@pytest.mark.parametrize("spec", FORMS, ids=str)
@pytest.mark.parametrize("widths", [{0: 3}, {1: 2}, {0: 2, 1: 3}], ids=str)
def test_narrower_heads(spec: Fused, widths: dict[int, int]) -> None:
    """Scores keep their scale; the packed weight is gone, and nothing that only it needed is left."""
    index = index_of(spec.model())
    (region,) = find_regions(index, find_sites(index))
    assert [pair.kind for pair in region.pairs] == ["scores", "values"]
    rewrite = narrowed(index, region, widths, 1)
    written = emit(index, [rewrite], spec.opset)
    check_written(spec, index, rewrite, written)
    for number, width in widths.items():
        pair = region.pairs[number]
        first, second = region.sites[pair.first], region.sites[pair.second]
        assert shape_of(written, first)[1] == HEADS * width
        assert shape_of(written, second)[1 if pair.kind == "scores" else 0] == HEADS * width


def check_written(spec: Fused, index: GraphIndex, rewrite: Rewrite, written: onnx.ModelProto) -> None:
    """Valid, the same as the graph with the rewritten weights, and with no weight that nothing reads."""
    onnx.checker.check_model(written)
    feeds, sites = spec.feeds(SAMPLES, 3), rewrite.region.sites
    placed = {site.index: fed for site, fed in zip(sites, rewrite.affine, strict=True)}
    expected = Probe(index, sites, None).run(feeds, placed)["y"].astype(np.float64)
    check_close(run(written, feeds), expected, spec.dtype)
    read = {name for node in written.graph.node for name in node.input}
    assert {tensor.name for tensor in written.graph.initializer} <= read
    assert not read & {"W", "b", "Wq", "Wk", "Wv", "Wo"}
    assert not any(node.op_type == "Attention" for node in written.graph.node)


def shape_of(model: onnx.ModelProto, site: Site) -> list[int]:
    return next(list(t.dims) for t in model.graph.initializer if t.name.startswith(f"{site.stem}.decomp"))


def in_blocks(index: GraphIndex, widths: dict[int, int]) -> Rewrite:
    """Heads 0 and 2 in one block, head 1 in the other; inputs and outputs in two halves."""
    (region,) = find_regions(index, find_sites(index))
    return replace(narrowed(index, region, widths, 2, (heads_in_two(region),)), decision="split")


@pytest.mark.parametrize("spec", FORMS, ids=str)
@pytest.mark.parametrize("widths", [{}, {0: 2, 1: 3}], ids=["whole", "narrow"])
def test_blocks_of_heads(spec: Fused, widths: dict[int, int]) -> None:
    """Each block is an attention over its own heads, with its part of what is added to scores."""
    index = index_of(spec.model())
    rewrite = in_blocks(index, widths)
    written = emit(index, [rewrite], spec.opset)
    check_written(spec, index, rewrite, written)
    nodes = [node for node in written.graph.node if node.op_type == "MultiHeadAttention"]
    heads = [next(a.i for a in node.attribute if a.name == "num_heads") for node in nodes]
    assert sorted(heads) == [1, 2]


def test_emitted_graph() -> None:
    """As narrower heads, and in blocks."""
    for name, spec in {
        "fused_attention": Fused(mask="BS"),
        "fused_attention_opset_11": Fused(opset=11),
    }.items():
        index = index_of(spec.model())
        (region,) = find_regions(index, find_sites(index))
        check(name, emit(index, [narrowed(index, region, {0: 4, 1: 6}, 2)], spec.opset))
    index = index_of(Fused(added="1HSS").model())
    check("fused_attention_blocks", emit(index, [in_blocks(index, {})], 17))


# --- where it applies ---------------------------------------------------------------------------------------------


def edited(spec: Fused, *nodes: onnx.NodeProto, keep: int | None = None, **tensors: Array) -> onnx.ModelProto:
    """The model of a spec with further nodes and tensors; keep: how many of its own nodes."""
    model = spec.model()
    del model.graph.node[len(model.graph.node) if keep is None else keep :]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in tensors.items())
    return model


def attend(inputs: str, output: str = "y", op: str = "MultiHeadAttention", **more: Any) -> onnx.NodeProto:
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(
        op, names, output.split(), f"again_{output}", domain="com.microsoft", num_heads=HEADS, **more
    )


def kinds(model: onnx.ModelProto) -> list[str]:
    index = index_of(model)
    return [pair.kind for region in find_regions(index, find_sites(index)) for pair in region.pairs]


def projected(*nodes: onnx.NodeProto, **tensors: Array) -> onnx.ModelProto:
    """Products of queries, keys and values, some nodes that make `context` of them, and the output projection."""
    own = list(NATIVE.model().graph.node)
    return edited(NATIVE, *nodes, *own[-2:], keep=len(own) - 3, **tensors)


PLAIN = attend("q k v", "context")


def output_too(name: str) -> onnx.ModelProto:
    model = projected(PLAIN)
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return model


def apart(name: str) -> onnx.NodeProto:
    """[batch, heads, length, width]: how keys and values of another sequence are handed over."""
    return helper.make_node("Transpose", [f"{name}4"], [f"{name}5"], f"{name}_apart", perm=[0, 2, 1, 3])


NO_PAIRS: dict[str, tuple[onnx.ModelProto, list[str]]] = {
    "as it is": (projected(PLAIN), ["scores", "values"]),
    "queries that are keys": (projected(attend("q q v", "context")), ["values"]),
    "keys that the outside reads": (output_too("k"), ["values"]),
    "what attention makes, read by the outside": (output_too("context"), ["scores"]),
    "a cache that is kept": (projected(attend("q k v", "context keys values")), []),
    "a cache that is given": (
        projected(attend("q k v - - - past past", "context"), past=np.zeros((5, HEADS, 2, 8), np.float32)),
        [],
    ),
    "a bias on top of another": (
        projected(attend("q k v w", "context"), w=np.zeros(3 * WIDTH, np.float32)),
        [],
    ),
    "a bias of the wrong length": (
        projected(attend("q k v w", "context"), w=np.zeros(3 * WIDTH + 1, np.float32)),
        [],
    ),
    "heads that don't come out even": (
        projected(
            helper.make_node(
                "MultiHeadAttention", ["q", "k", "v"], ["context"], domain="com.microsoft", num_heads=5
            )
        ),
        [],
    ),
    "keys with heads apart": (
        projected(
            *(helper.make_node("Reshape", [name, "apart"], [f"{name}4"]) for name in "kv"),
            apart("k"),
            apart("v"),
            attend("q k5 v5", "context"),
            apart=np.array([0, 0, HEADS, WIDTH // HEADS]),
        ),
        [],
    ),
    "a rotary embedding": (
        projected(
            helper.make_node("RotaryEmbedding", ["q", "at", "c", "s"], ["turned"], domain="com.microsoft"),
            attend("turned k v", "context"),
            at=np.arange(TOKENS)[None],
            c=np.ones((TOKENS, 4), np.float32),
            s=np.ones((TOKENS, 4), np.float32),
        ),
        ["values"],
    ),
    "scores that something unknown is added to": (
        projected(
            helper.make_node("Thing", ["x"], ["u"], domain="local"),
            attend("q k v - - u", "context"),
        ),
        [],
    ),
}


@pytest.mark.parametrize("name", NO_PAIRS)
def test_pairs_only_where_heads_are_all_that_mixes(name: str) -> None:
    model, found = NO_PAIRS[name]
    assert kinds(model) == found


def test_what_is_left_out_ties_nothing() -> None:
    """Outputs of a norm and inputs of an attention that are not there have the same name, an empty one."""
    inputs, outputs = ["context", "x", "scale"], ["normed", "", "", "sum"]
    norm = helper.make_node("SkipSimplifiedLayerNormalization", inputs, outputs, domain="com.microsoft")
    own = [
        onnx.NodeProto.FromString(n.SerializeToString())
        for n in replace(NATIVE, bias="packed").model().graph.node
    ]
    for node in own[:3]:
        node.input[0] = "normed"
    own[-3].output[0], own[-2].input[0] = "mixed", "mixed"
    first = [attend("x W b", "context", "Attention"), norm]
    more = {"W": Fused().weights["q"].repeat(3, 1), "scale": np.ones(WIDTH, np.float32)}
    model = edited(replace(NATIVE, bias="packed"), *first, *own, keep=0, **more)
    assert kinds(model) == ["scores", "values"]


def lengths(how: str) -> list[onnx.NodeProto]:
    """One length for each sample, as fusions count them."""
    if how == "EmbedLayerNormalization":
        inputs = ["ids", "", "table", "table", "", "g", "g", "", "keys"]
        return [helper.make_node(how, inputs, ["embedded", "m"], domain="com.microsoft")]
    return [
        helper.make_node("ReduceSum", ["keys", "axes"], ["counted"], keepdims=0),
        helper.make_node("Cast", ["counted"], ["m"], to=TensorProto.INT32),
    ]


@pytest.mark.parametrize("how", ["ReduceSum", "EmbedLayerNormalization"])
def test_lengths_that_are_counted_are_a_mask(how: str) -> None:
    """ONNX Runtime's fusions count the keys of each sample, and an exporter does not tell how many samples."""
    spec = Fused(opset=17)
    own = list(spec.model().graph.node)
    attention = attend("x W b m", "context", "Attention")
    model = edited(spec, *lengths(how), attention, *own[-2:], keep=0, axes=np.array([1]))
    model.graph.input.append(helper.make_tensor_value_info("keys", TensorProto.INT32, ["batch", TOKENS]))
    assert kinds(model) == ["scores", "values"]
    if how == "EmbedLayerNormalization":
        return  # it is only looked at here: what else it wants is not there
    index = index_of(model)
    (region,) = find_regions(index, find_sites(index))
    rewrite = narrowed(index, region, {0: 4, 1: 4}, 3)
    feeds = spec.feeds(SAMPLES, 1) | {"keys": np.tril(np.ones((SAMPLES, TOKENS), np.int32), 1)}
    placed = {site.index: fed for site, fed in zip(region.sites, rewrite.affine, strict=True)}
    expected = Probe(index, region.sites, None).run(feeds, placed)["y"]
    check_close(run(emit(index, [rewrite], 17), feeds), expected, np.float32)


def test_an_attention_without_a_projection() -> None:
    """Its products are rewritten by themselves; the attention stays whole behind them."""
    spec = Fused(mask="BS")
    model = edited(
        spec,
        attend("x W b mask", "context", "Attention"),
        helper.make_node("Relu", ["context"], ["y"]),
        keep=0,
    )
    del model.graph.initializer[:2]
    index = index_of(model)
    (region,) = find_regions(index, find_sites(index))
    assert (len(region.sites), region.pairs) == (3, ())
    rewrite = narrowed(index, region, {}, 1)
    halved = tuple(replace(affine, weight=affine.weight / 2) for affine in rewrite.affine)
    check_written(
        spec, index, replace(rewrite, affine=halved), emit(index, [replace(rewrite, affine=halved)], 17)
    )


def test_a_bias_that_only_one_product_takes_with_it() -> None:
    """Queries are rewritten alone; keys and values get theirs from what is left of the operator's bias."""
    spec, (*own, _, _) = replace(NATIVE, bias="packed"), replace(NATIVE, bias="packed").model().graph.node
    model = edited(spec, *own, helper.make_node("Relu", ["context"], ["y"]), keep=0)
    index = index_of(model)
    regions = find_regions(index, find_sites(index))
    assert [len(region.sites) for region in regions] == [1, 1, 1]
    rewrite = narrowed(index, regions[0], {}, 1)
    halved = replace(rewrite, affine=tuple(replace(a, weight=a.weight / 2) for a in rewrite.affine))
    written, feeds = emit(index, [halved], 17), spec.feeds(SAMPLES, 1)
    placed = {regions[0].sites[0].index: halved.affine[0]}
    expected = Probe(index, find_sites(index), None).run(feeds, placed)["y"]
    check_close(run(written, feeds), expected, np.float32)


@pytest.mark.parametrize("name", ["k", "v", "context"])
def test_what_the_outside_reads_is_joined(name: str) -> None:
    index = index_of(output_too(name))
    written, feeds = emit(index, [rewrite := in_blocks(index, {})], 17), NATIVE.feeds(SAMPLES, 1)
    placed = {site.index: fed for site, fed in zip(rewrite.region.sites, rewrite.affine, strict=True)}
    expected = Probe(index, rewrite.region.sites, None).run(feeds, placed)
    found = open_session(written).run(feeds)
    for output in ("y", name):
        check_close(found[output], expected[output], np.float32)


def test_layers_that_share_a_packed_weight() -> None:
    """As in ALBERT: one region, each of the three matrices rewritten once for all layers."""
    spec, own = Fused(), list(Fused().model().graph.node)
    again = [attend("y0 W b", "context1", "Attention")]
    again += [
        helper.make_node("MatMul", ["context1", "Wo"], ["o1"]),
        helper.make_node("Add", ["o1", "bo"], ["y"]),
    ]
    own[-1].output[0] = "y0"
    model = edited(spec, *own, *again, keep=0)
    index = index_of(model)
    sites = find_sites(index)
    assert [site.obstacle for site in sites] == [None] * 8
    (region,) = find_regions(index, sites)
    assert region.pairs == ()
    rewrite = narrowed(index, region, {}, 1)
    halved = tuple(replace(affine, weight=affine.weight / 2) for affine in rewrite.affine)
    written = emit(index, [replace(rewrite, affine=halved)], 17)
    check_written(spec, index, replace(rewrite, affine=halved), written)
    names = [tensor.name for tensor in written.graph.initializer]
    assert len([name for name in names if name.startswith("W.")]) == 3


@pytest.mark.parametrize(
    "reader",
    [
        helper.make_node("ReduceSum", ["W"], ["z"]),
        helper.make_node("MatMul", ["x", "W"], ["z"]),
        helper.make_node("Identity", ["W"], ["z"]),
        attend("x W b", "z", "Attention", qkv_hidden_sizes=[30, 30, 12]),
    ],
    ids=lambda node: str(node.op_type),
)
def test_a_packed_weight_that_is_read_in_another_way_stays(reader: onnx.NodeProto) -> None:
    """All of it: else the file would hold its columns twice."""
    model = edited(Fused(), reader)
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    obstacles = {(site.weight, site.obstacle) for site in find_sites(index_of(model))}
    assert obstacles == {("W", "shared-weight"), ("Wo", None)}


def test_a_constant_that_a_split_cuts_up() -> None:
    """An exporter may write the same: parts of one weight are rewritten together."""
    spec, own = NATIVE, list(NATIVE.model().graph.node)
    weights = spec.weights
    packed = {name: np.concatenate([weights[f"{name}{part}"] for part in "qkv"], -1) for name in ("", "b")}
    cut = [
        helper.make_node("Split", ["W", "sizes"], ["Wq", "Wk", "Wv"], "cut", axis=-1),
        helper.make_node("Split", ["B", "sizes"], ["bq", "bk", "bv"], "cut_bias", axis=0),
    ]
    model = edited(spec, *cut, *own, keep=0, sizes=np.array([WIDTH] * 3), W=packed[""], B=packed["b"])
    kept = [
        tensor
        for tensor in model.graph.initializer
        if tensor.name not in {f"{b}{p}" for b in "Wb" for p in "qkv"}
    ]
    stored = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del model.graph.initializer[:]
    model.graph.initializer.extend(stored)
    index = index_of(model)
    (region,) = find_regions(index, find_sites(index))
    assert [site.weight for site in region.sites] == ["W", "W", "W", "Wo"]
    rewrite = narrowed(index, region, {0: 3, 1: 5}, 1)
    written = emit(index, [rewrite], 17)
    check_written(spec, index, rewrite, written)
    assert not {"sizes", "B"} & {tensor.name for tensor in written.graph.initializer}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_node_of_these_operators_is_read(data: st.DataObject) -> None:
    """Files hold what they like: inputs and outputs left out, attributes of any type, shapes that don't fit."""
    names = st.sampled_from(["", "x", "W", "b", "q", "k", "v", "mask", "none"])
    op = data.draw(st.sampled_from(["Attention", "MultiHeadAttention"]))
    inputs, outputs = (data.draw(st.lists(names, max_size=most)) for most in (8, 3))
    values = st.sampled_from([0, 1, 3, -3, 2.5, "three", [1, 2], [WIDTH] * 3, [0.5]])
    keys = ("num_heads", "qkv_hidden_sizes", "scale", "do_rotary", "unidirectional", "else")
    more = data.draw(st.dictionaries(st.sampled_from(keys), values))
    outputs = [f"{name}.made{at}" if name else "" for at, name in enumerate(outputs)]
    node = helper.make_node(op, inputs, outputs, domain="com.microsoft", **more)
    model = edited(
        replace(NATIVE, mask="BS"), node, W=np.ones((WIDTH, 3 * WIDTH), np.float32), b=np.ones(5, np.float32)
    )
    index = index_of(model)
    find_regions(index, find_sites(index))
    assert emit(index, [], 17) == model
