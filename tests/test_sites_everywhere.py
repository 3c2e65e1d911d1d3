"""Every form in which exporters write a constant product: found, rewritten, and the same model from outside.

Each test plants blocks, writes the layers in one form, compiles, and asks ONNX Runtime whether the written model is the
same function. A copy would pass every comparison, so a kept rewrite is part of what is asked.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from models.planted import PlantedModel, build
from onnx_decomp.axes import Region, find_regions
from onnx_decomp.compiler import decompose
from onnx_decomp.cost import cpu
from onnx_decomp.options import Options
from onnx_decomp.passes.folding import compose, partition
from onnx_decomp.passes.layouts import Layout
from onnx_decomp.passes.pricing import region_time, with_best_forms
from onnx_decomp.passes.ridge import masked
from onnx_decomp.passes.splitting import emit
from onnx_decomp.program import Rewrite, Structure
from onnx_decomp.runtime import Session, open_session
from onnx_decomp.sites import GraphIndex, find_sites, read_affine
from tests.forms import (
    CLEAR,
    FORMS,
    Graph,
    cast_from,
    check_interface,
    compiled,
    layered,
    plain,
    samples,
)

CASES = [(form, opset) for form, (_, opsets) in FORMS.items() for opset in opsets]


@pytest.mark.parametrize(("form", "opset"), CASES)
def test_every_form_is_rewritten(form: str, opset: int, tmp_path: Path) -> None:
    planted = build(replace(CLEAR, dtype="float16", hide="hidden" if form != "Reshape" else "none"))
    model = layered(FORMS[form][0], planted, opset).model(32, 32)
    done = compiled(model, tmp_path)
    assert done.decisions == ["split", "split"], done.reasons
    assert done.report["kept"], done.report["history"]
    assert done.bytes[1] < done.bytes[0] + 6000, "a few nodes more, and weights less"
    assert not {t.name for t in done.after.graph.initializer} & {"layer_0.weight", "layer_1.weight"}


# 1x1 convolutions


def convolutions(planted: PlantedModel, size: tuple[int | str, ...], link: str = "Relu") -> onnx.ModelProto:
    """The planted layers as convolutions over positions, with an operator of their own between."""
    graph, tensor = Graph(17), "x"
    for number, (weight, bias) in enumerate(zip(planted.weights, planted.biases, strict=True)):
        assert bias is not None
        if number and link == "BatchNormalization":
            rng = np.random.default_rng(number)
            four = [graph.store(f"norm.{at}", rng.uniform(0.5, 1.5, len(weight))) for at in "sbmv"]
            graph.stored |= {name: graph.stored[name].astype(np.float32) for name in four}
            tensor = graph.add("BatchNormalization", tensor, *four)
        elif number:
            tensor = graph.add(link, tensor)
        stored = np.ascontiguousarray(weight.T).reshape(*weight.T.shape, *[1] * len(size))
        names = [graph.store(f"conv.{number}.weight", stored), graph.store(f"conv.{number}.bias", bias)]
        tensor = graph.add("Conv", tensor, *names, name=f"conv.{number}", kernel_shape=[1] * len(size))
    model = graph.model(planted.spec.widths[0], planted.spec.widths[-1])
    for value, width in ((model.graph.input[0], 0), (model.graph.output[0], -1)):
        shape = ["batch", planted.spec.widths[width], *size]
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape))
    return model


@pytest.mark.parametrize("link", ["Relu", "HardSwish", "BatchNormalization"])
@pytest.mark.parametrize("size", [(9,), (3, 4), (2, 2, 3)], ids=str)
def test_a_1x1_convolution_is_a_product_with_channels_last(
    size: tuple[int, ...], link: str, tmp_path: Path
) -> None:
    planted = build(replace(CLEAR, hide="hidden"))
    model = convolutions(planted, size, link)
    feeds = {"x": np.random.default_rng(1).standard_normal((200, 32, *size), np.float32)}
    np.savez(tmp_path / "calib.npz", **feeds)
    start = dict(zip(("conv.0.weight", "conv.1.weight"), planted.initial, strict=True))
    ones = (1,) * len(size)
    np.savez(tmp_path / "init.npz", **{n: w.T.reshape(*w.T.shape, *ones) for n, w in start.items()})
    options = Options(provider="cpu", latency_gate=False, objective="flops")
    done = decompose(model, init=tmp_path / "init.npz", calib=tmp_path / "calib.npz", options=options)
    assert [(site["op"], site["decision"]) for site in done.report["sites"]] == [("Conv", "split")] * 2
    assert len(done.report["init"]["matched"]) == 2
    onnx.checker.check_model(done.model, full_check=True)
    check_interface(model, done.model)
    assert not {"Gather", "Conv"} & {made.op_type for made in done.model.graph.node}, "orders are folded"
    fresh = {"x": np.random.default_rng(2).standard_normal((5, 32, *size), np.float32)}
    expected, found = (open_session(each).run(fresh)["y"] for each in (model, done.model))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(33, 32), ("height", 4)], ids=str)
def test_a_convolution_over_many_or_unknown_positions_stays(size: tuple[int | str, ...]) -> None:
    index = GraphIndex.build(convolutions(build(CLEAR), size), numpy_helper.to_array)
    assert [site.obstacle for site in find_sites(index)] == ["convolution"] * 2


@pytest.mark.parametrize(
    ("form", "moved"), [("plain", [0, 0]), ("transA", [32, 64]), ("left MatMul", [96, 96])]
)
def test_transposes_have_a_price_only_where_they_are_written(form: str, moved: list[int]) -> None:
    planted = build(CLEAR)
    index = GraphIndex.build(layered(FORMS[form][0], planted, 17).model(32, 32), numpy_helper.to_array)
    sites = find_sites(index)
    (region,) = find_regions(index, sites)
    assert [site.moved for site in sites] == moved
    free = replace(region, sites=tuple(replace(site, moved=0) for site in sites))
    blocks = true_structure(region, planted)

    def price(of: Region, found: list[Structure]) -> float:
        segments = with_best_forms(cpu(), 100, of, compose(of, found))
        return region_time(cpu(), 100, Layout.of(of, segments))

    assert price(region, []) == price(free, []), "left as it is"
    extra = price(region, [blocks]) - price(free, [blocks])
    assert (extra > 0) == (sum(moved) > 0)


# Types


def types_of(model: onnx.ModelProto) -> set[str]:
    """Types of all matrices that a model stores."""
    return {
        TensorProto.DataType.Name(tensor.data_type)
        for tensor in model.graph.initializer
        if len(tensor.dims) > 1
    }


@pytest.mark.parametrize("form", ["plain", "all flags", "left MatMul", "Squeeze, Unsqueeze"])
@pytest.mark.parametrize("kind", ["float16", "float64"])
def test_types_are_kept(kind: str, form: str, tmp_path: Path) -> None:
    planted = build(replace(CLEAR, dtype="float16"))
    done = compiled(layered(FORMS[form][0], planted, 17, np.dtype(kind)).model(32, 32), tmp_path)
    assert done.decisions == ["split", "split"], done.reasons
    assert types_of(done.after) == {"FLOAT16" if kind == "float16" else "DOUBLE"}
    assert done.bytes[1] < done.bytes[0] + 6000


@pytest.mark.parametrize("form", ["float16 behind Cast", "bfloat16 behind Cast"])
def test_what_is_stored_small_stays_small(form: str, tmp_path: Path) -> None:
    """Weights in 16 bits behind a Cast are written in 16 bits, the Cast with them: also as thin products."""
    rng = np.random.default_rng(5)
    planted = build(replace(CLEAR, widths=(128, 128, 96), dtype="float16"))
    thin = [
        rng.standard_normal((n, 8)) @ rng.standard_normal((8, m)) / 30 for n, m in ((128, 128), (128, 96))
    ]
    planted = replace(planted, weights=tuple(w.astype(np.float32) for w in thin))
    done = compiled(layered(FORMS[form][0], planted, 17).model(128, 96), tmp_path, tolerance=0.02)
    assert "low-rank" in done.decisions, done.reasons
    assert types_of(done.after) == types_of(done.before)
    assert done.bytes[1] < 0.7 * done.bytes[0]


def test_double_behind_a_cast_becomes_what_the_product_computes_in(tmp_path: Path) -> None:
    planted = build(CLEAR)
    done = compiled(layered(cast_from(np.float64), planted, 17).model(32, 32), tmp_path)
    assert types_of(done.after) == {"FLOAT"}


def true_structure(region: Region, planted: PlantedModel) -> Structure:
    """The planted blocks of all sites of a region."""
    labels: dict[int, NDArray[np.int32]] = {}
    for at, (ends, units) in enumerate(zip(region.ends, region.units, strict=True)):
        for side in (0, 1):
            size = region.groups[ends[side]].size
            labels.setdefault(ends[side], np.zeros(size, np.int32))[units[side]] = planted.labels[at + side]
    return Structure(tuple(range(len(region.sites))), labels, 4, "exact", 0.0, 1.0)


def rewritten(model: onnx.ModelProto, planted: PlantedModel) -> onnx.ModelProto:
    """The model with the planted blocks written, whether or not it can run here."""
    index = GraphIndex.build(model, numpy_helper.to_array)
    (region,) = find_regions(index, find_sites(index))
    segments = compose(region, [true_structure(region, planted)])
    affine = tuple(
        masked(read_affine(index, site), rows, columns)
        for site, (rows, columns) in zip(region.sites, partition(region, segments), strict=True)
    )
    opset = model.opset_import[0].version
    return emit(index, [Rewrite(region, segments, affine, "split", "applied")], opset)


def in_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with float32 wherever it has bfloat16."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    for value in [*copy.graph.input, *copy.graph.output]:
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    for made in copy.graph.node:
        for item in made.attribute:
            if made.op_type == "Cast" and item.i == TensorProto.BFLOAT16:
                item.i = TensorProto.FLOAT
    return copy


@pytest.mark.parametrize("form", ["plain", "all flags", "left Gemm"])
def test_bfloat16_is_written_as_bfloat16(form: str) -> None:
    """The CPU provider can't run it: what is written is compared in float32, which holds every bfloat16."""
    planted = build(CLEAR)
    weights = tuple(w.astype(ml_dtypes.bfloat16).astype(np.float32) for w in planted.weights)
    model = layered(FORMS[form][0], replace(planted, weights=weights), 17, ml_dtypes.bfloat16).model(32, 32)
    written = rewritten(model, planted)
    onnx.checker.check_model(written, full_check=True)
    assert types_of(written) == {"BFLOAT16"}
    x = {"x": np.random.default_rng(3).standard_normal((16, 32), np.float32)}
    expected, found = (open_session(in_float32(each)).run(x)["y"] for each in (model, written))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model of the same interface that computes in float32 what the CPU provider has no bfloat16 kernels for."""
    inside = in_float32(model)
    graph = inside.graph
    nodes = list(graph.node)
    types = onnx.shape_inference.infer_shapes(model).graph
    kinds = {end.name: end.type.tensor_type.elem_type for end in [*types.input, *types.output]}
    for end in graph.input:
        if kinds[end.name] == TensorProto.BFLOAT16:
            cast = helper.make_node("Cast", [f"{end.name}.bfloat16"], [end.name], to=TensorProto.FLOAT)
            nodes.insert(0, cast)
            end.name, end.type.tensor_type.elem_type = cast.input[0], TensorProto.BFLOAT16
    for end in graph.output:
        if kinds[end.name] == TensorProto.BFLOAT16:
            name = f"{end.name}.bfloat16"
            nodes.append(helper.make_node("Cast", [end.name], [name], to=TensorProto.BFLOAT16))
            end.CopyFrom(helper.make_tensor_value_info(name, TensorProto.BFLOAT16, None))
    del graph.node[:]
    graph.node.extend(onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes)
    return renamed(inside)


def renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Inputs and outputs that were cast take their names back; what was cast inside takes another."""
    graph = model.graph
    ends = {
        end.name.removesuffix(".bfloat16") for end in [*graph.input, *graph.output] if ".bfloat16" in end.name
    }
    names = {name: f"{name}.float32" for name in ends} | {f"{name}.bfloat16": name for name in ends}
    for made in graph.node:
        made.input[:] = [names.get(name, name) for name in made.input]
        made.output[:] = [names.get(name, name) for name in made.output]
    for end in [*graph.input, *graph.output]:
        end.name = names.get(end.name, end.name)
    return model


@pytest.mark.parametrize("ends", ["float32", "bfloat16"])
def test_bfloat16_is_compiled_where_it_runs(
    ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a provider that computes bfloat16 (here: in float32), with bfloat16 inside only or at both ends."""

    def wide(model: onnx.ModelProto, **options: Any) -> Session:
        return open_session(emulated(model), **options)

    for module in ("verify", "gates", "probe"):
        monkeypatch.setattr(f"onnx_decomp.{module}.open_session", wide)
    planted = build(CLEAR)
    graph = Graph(17, ml_dtypes.bfloat16)
    tensor = "x" if ends == "bfloat16" else graph.add("Cast", "x", to=TensorProto.BFLOAT16)
    for number, (weight, bias) in enumerate(zip(planted.weights, planted.biases, strict=True)):
        assert bias is not None
        tensor = graph.add("Relu", tensor) if number else tensor
        kind = ml_dtypes.bfloat16
        tensor = plain(graph, f"layer_{number}", tensor, weight.astype(kind), bias.astype(kind))
    if ends == "float32":
        graph.add("Cast", tensor, to=TensorProto.FLOAT)
        graph.dtype = np.float32
    model = graph.model(32, 32)
    x = np.random.default_rng(1).standard_normal((400, 32), np.float32)
    np.savez(tmp_path / "calib.npz", x=x)
    options = Options(provider="cpu", latency_gate=False, objective="flops", tolerance=0.02)
    done = decompose(model, calib=tmp_path / "calib.npz", options=options)
    assert [site["decision"] for site in done.report["sites"]] == ["split", "split"]
    assert types_of(done.model) == {"BFLOAT16"}
    expected, found = (open_session(emulated(each)).run({"x": x[:16]})["y"] for each in (model, done.model))
    np.testing.assert_allclose(found, expected, atol=0.03 * float(np.abs(expected).max()))


@pytest.mark.parametrize("given", [True, False], ids=["calibration", "no data"])
def test_bfloat16_that_cannot_run_here_is_copied(given: bool, tmp_path: Path) -> None:
    model = layered(plain, build(CLEAR), 17, ml_dtypes.bfloat16).model(32, 32)
    np.savez(tmp_path / "calib.npz", x=np.random.default_rng(0).standard_normal((64, 32), np.float32))
    options = Options(provider="cpu", latency_gate=False)
    done = decompose(model, calib=tmp_path / "calib.npz" if given else None, options=options)
    assert (done.changed, {site["reason"] for site in done.report["sites"]}) == (False, {"cannot-verify"})
    assert {site["dtype"] for site in done.report["sites"]} == {"bfloat16"}


# Initializers that are inputs too


@pytest.mark.parametrize("form", ["plain", "float16 behind Cast", "transA"])
def test_an_old_model_lists_its_initializers_as_inputs(form: str, tmp_path: Path) -> None:
    """Before IR version 4 it has to, and nobody can feed them: they are constants, and so are the new ones."""
    planted = build(replace(CLEAR, dtype="float16"))
    done = compiled(layered(FORMS[form][0], planted, 9).model(32, 32, ir_version=3), tmp_path)
    assert done.decisions == ["split", "split"], done.reasons
    listed = [item.name for item in done.after.graph.input]
    assert listed[0] == "x"
    assert sorted(listed[1:]) == sorted(tensor.name for tensor in done.after.graph.initializer)


def test_a_weight_that_callers_may_override_stays(tmp_path: Path) -> None:
    model = layered(plain, build(CLEAR), 17).model(32, 32)
    model.graph.input.append(helper.make_tensor_value_info("layer_0.weight", TensorProto.FLOAT, [32, 64]))
    done = compiled(model, tmp_path)
    assert done.reasons[0] == "overridable"
    assert list(done.after.graph.input) == list(model.graph.input)
    other = {"layer_0.weight": np.ones((32, 64), np.float32), **samples(model, 8, 2)}
    expected, found = (open_session(each).run(other)["y"] for each in (done.before, done.after))
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["plain", "transA", "left MatMul"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_bias_that_callers_may_override_is_still_theirs(form: str, layer: int, tmp_path: Path) -> None:
    planted = build(replace(CLEAR, hide="none"))
    model = layered(FORMS[form][0], planted, 17).model(32, 32)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == f"layer_{layer}.bias")
    model.graph.input.append(helper.make_tensor_value_info(bias.name, TensorProto.FLOAT, bias.dims))
    done = compiled(model, tmp_path)
    assert done.decisions == ["split", "split"], done.reasons
    other = {bias.name: np.ones(tuple(bias.dims), np.float32), **samples(model, 8, 2)}
    expected, found = (open_session(each).run(other)["y"] for each in (done.before, done.after))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


# One weight, several readers


def test_one_decomposition_serves_all_uses(tmp_path: Path) -> None:
    """Two products with one stored weight, one of them behind a Transpose and a transposing Gemm."""
    planted = build(replace(CLEAR, widths=(64, 64)))
    (w,), (b,) = planted.weights, planted.biases
    assert b is not None
    graph = Graph(17)
    graph.store("table", w)
    one = graph.add("Add", graph.add("MatMul", "x", "table"), graph.store("b", b))
    turned = graph.add("Transpose", "table", perm=[1, 0])
    two = graph.add("Gemm", "x", turned, "b", transB=1)
    graph.add("Sub", one, graph.add("Tanh", two))
    done = compiled(graph.model(64, 64), tmp_path)
    assert done.decisions == ["split", "split"], done.reasons
    assert done.bytes[1] < done.bytes[0]


def test_uses_that_are_not_alike_all_stay(tmp_path: Path) -> None:
    """An autoencoder with tied weights: x W, then W transposed."""
    planted = build(replace(CLEAR, widths=(32, 64)))
    graph = Graph(17)
    graph.store("table", planted.weights[0])
    hidden = graph.add("Relu", graph.add("MatMul", "x", "table"))
    graph.add("Gemm", hidden, "table", transB=1)
    done = compiled(graph.model(32, 32), tmp_path)
    assert done.reasons == ["shared-weight"] * 2
    assert done.after == done.before


@pytest.mark.parametrize("projection", ["Transpose", "transB"])
def test_a_tied_table_is_never_stored_twice(projection: str, tmp_path: Path) -> None:
    """The table is looked up and projected on: what lies between is rewritten, in blocks of the table's own columns."""
    planted = build(replace(CLEAR, hide="all"))
    graph = Graph(17)
    graph.store("table", np.random.default_rng(0).standard_normal((40, 32), np.float32))
    tensor = graph.add("Gather", "table", "x")
    for number, (weight, bias) in enumerate(zip(planted.weights, planted.biases, strict=True)):
        assert bias is not None
        tensor = graph.add("Relu", tensor) if number else tensor
        tensor = plain(graph, f"layer_{number}", tensor, weight, bias)
    if projection == "transB":
        graph.add("Gemm", tensor, "table", transB=1)
    else:
        graph.add("MatMul", tensor, graph.add("Transpose", "table", perm=[1, 0]))
    model = graph.model(32, 40)
    del model.graph.input[:]
    model.graph.input.append(helper.make_tensor_value_info("x", TensorProto.INT64, ["batch"]))
    tokens = np.random.default_rng(1).integers(0, 40, 300)
    np.savez(tmp_path / "calib.npz", x=tokens)
    options = Options(provider="cpu", latency_gate=False, objective="flops")
    done = decompose(model, calib=tmp_path / "calib.npz", options=options)
    assert [site["reason"] for site in done.report["sites"]] == ["applied", "applied", "shared-weight"]
    shapes = [tuple(tensor.dims) for tensor in done.model.graph.initializer]
    assert [shape for shape in shapes if 40 in shape] == [(40, 32)], "the table, once"
    feeds = {"x": np.arange(40)}
    expected, found = (open_session(each).run(feeds)["y"] for each in (model, done.model))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


# Statistics


@pytest.mark.parametrize("form", ["Reshape", "Squeeze, Unsqueeze", "Constant, Transpose, Flatten, Cast"])
@pytest.mark.parametrize("kind", ["npz", "onnx"])
def test_a_snapshot_is_read_as_the_weights_are_stored(form: str, kind: str, tmp_path: Path) -> None:
    planted = build(replace(CLEAR, dtype="float16", off="untouched", hide="none"))
    start = layered(FORMS[form][0], replace(planted, weights=planted.initial), 17).model(32, 32)
    index = GraphIndex.build(start, numpy_helper.to_array)
    path = tmp_path / f"init.{kind}"
    if kind == "npz":
        held = {site.weight: index.read(index.stored[site.weight]) for site in find_sites(index)}
        np.savez(path, **held)  # type: ignore[arg-type]
    else:
        onnx.save(start, path)
    model = layered(FORMS[form][0], planted, 17).model(32, 32)
    done = decompose(model, init=path, options=Options(provider="cpu", latency_gate=False))
    assert len(done.report["init"]["matched"]) == 2
    for site, mask in zip(done.report["sites"], (planted.mask(0), planted.mask(1)), strict=True):
        assert site["null"]["kind"] == "snapshot"
        if site["supported"] is not None:
            assert abs(site["supported"] - mask.mean()) < 0.1, "the changed weights are those in blocks"
