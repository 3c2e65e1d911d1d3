"""Null models: laws, the files they come from, and which entry belongs to which weight."""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from scipy import stats

from onnx_decomp.errors import InputError, InternalError, UsageError
from onnx_decomp.init_stats import PRESETS, InitStats, Law, load_nulls, module_scopes
from onnx_decomp.init_stats.names import agreement, is_generated, split
from onnx_decomp.init_stats.nulls import estimate, fit
from onnx_decomp.init_stats.presets import Shape
from onnx_decomp.sites import GraphIndex, Site, find_sites, read_affine

Array = NDArray[np.float32]
RNG = np.random.default_rng(7)

LAWS = {
    "normal": Law("normal", 0.01, 0.02),
    "uniform": Law("uniform", -0.02, 0.1),
    "truncnorm": Law("truncnorm", 0.0, 0.02),
    "truncnorm-tight": Law("truncnorm", 0.3, 0.02, cut=0.7),
}


def layer(
    weight: str,
    stored: NDArray[Any],
    node: str = "",
    op: str = "MatMul",
    bias: str | None = None,
    **attributes: Any,
) -> dict[str, Any]:
    return {
        "weight": weight,
        "stored": stored,
        "node": node,
        "op": op,
        "bias": bias,
        "attributes": attributes,
    }


def model(*layers: dict[str, Any], scopes: Mapping[int, str] | None = None) -> onnx.ModelProto:
    """A graph of independent layers: all that the matching sees of a model is its sites."""
    nodes, stored, inputs, outputs = [], [], [], []
    for n, item in enumerate(layers):
        array = np.asarray(item["stored"])
        k, width = array.shape[::-1] if item["attributes"].get("transB") else array.shape
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        inputs.append(helper.make_tensor_value_info(f"x{n}", kind, [3, k]))
        outputs.append(helper.make_tensor_value_info(f"y{n}", kind, [3, width]))
        if all(tensor.name != item["weight"] for tensor in stored):
            stored.append(numpy_helper.from_array(array, item["weight"]))
        biased = item["bias"] is not None
        out = f"p{n}" if biased else f"y{n}"
        node = helper.make_node(
            item["op"], [f"x{n}", item["weight"]], [out], name=item["node"], **item["attributes"]
        )
        if scopes and n in scopes:
            node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=f"['', '{scopes[n]}', 'linear']")
        nodes.append(node)
        if biased:
            stored.append(numpy_helper.from_array(np.zeros(width, array.dtype), item["bias"]))
            nodes.append(helper.make_node("Add", [out, item["bias"]], [f"y{n}"]))
    graph = helper.make_graph(nodes, "g", inputs, outputs, stored)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(proto)
    return proto


class Loaded:
    """A model with its sites, ready to be matched."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.index = GraphIndex.build(proto, numpy_helper.to_array)
        self.sites = find_sites(self.index)

    def nulls(self, init: Path | None = None, preset: str | None = None) -> InitStats:
        scopes = module_scopes(self.index, self.sites)
        return load_nulls(self.sites, partial(read_affine, self.index), init, preset, scopes)

    def weight(self, site: Site) -> Array:
        return read_affine(self.index, site).weight


def draw(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def trained(w0: Array) -> Array:
    """The shrunk start and what was learned."""
    return (0.9 * w0 + 0.5 * draw(*w0.shape)).astype(np.float32)


def npz(path: Path, **entries: Any) -> Path:
    np.savez(path, **entries)
    return path


def hows(found: InitStats) -> dict[str, tuple[str, str]]:
    return {match.site: (match.entry, match.how) for match in found.matched}


# Laws


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_scores_of_draws_from_the_null_are_standard_normal(law: Law) -> None:
    w = law.sample(np.random.default_rng(1), (300, 400))
    z = law.normal_scores(w)
    assert z.dtype == np.float32
    assert z.shape == w.shape
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3
    assert w.std() == pytest.approx(law.std(), rel=0.01)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_cdf_is_scipys(law: Law) -> None:
    w = np.linspace(law.mean - 5 * law.scale, law.mean + 5 * law.scale, 2001)
    reference = {
        "normal": stats.norm(law.mean, law.scale),
        "uniform": stats.uniform(law.mean - law.scale, 2 * law.scale),
        "truncnorm": stats.truncnorm(-law.cut, law.cut, law.mean, law.scale),
    }[law.family]
    np.testing.assert_allclose(law.cdf(w), reference.cdf(w), atol=1e-12)
    assert law.std() == pytest.approx(reference.std())
    inside = (reference.cdf(w) > 1e-10) & (reference.sf(w) > 1e-10)
    z = law.normal_scores(w)[inside]
    np.testing.assert_allclose(z, stats.norm.ppf(reference.cdf(w[inside])), atol=1e-4)


@given(
    family=st.sampled_from(["normal", "uniform", "truncnorm"]),
    scale=st.floats(1e-6, 1e3),
    mean=st.floats(-1, 1),
    w=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
)
def test_scores_rise_with_the_weight_and_stay_clipped(
    family: Any, scale: float, mean: float, w: list[float]
) -> None:
    z = Law(family, mean, scale).normal_scores(np.sort(np.asarray(w, np.float32)))
    assert np.isfinite(z).all()
    assert (np.abs(z) <= 8.0).all()
    assert (np.diff(z) >= 0).all()


def test_beyond_the_edge_is_impossible_but_rounding_is_not() -> None:
    law = Law("uniform", 0.0, 0.3)  # half precision rounds 0.3 up
    assert law.normal_scores(np.asarray([0.3001]))[0] == 8.0
    half = law.sample(np.random.default_rng(0), (1000, 1000)).astype(np.float16)
    assert np.abs(law.normal_scores(half)).max() == 8.0
    assert np.abs(law.normal_scores(half, float(np.finfo(np.float16).eps))).max() < 4.0


def test_point_mass_and_scaling() -> None:
    np.testing.assert_array_equal(
        Law("normal", 1.0, 0.0).normal_scores(np.asarray([0.5, 1.0, 2.0])), [-8, 0, 8]
    )
    np.testing.assert_array_equal(Law("normal", 1.0, 0.0).cdf([0.5, 1.0]), [0, 1])
    assert Law("uniform", 0.1, 0.2).scaled(-2.0) == Law("uniform", -0.2, 0.4)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_scores_of_a_large_matrix_are_fast(law: Law) -> None:
    w = law.sample(np.random.default_rng(0), (2048, 2048))
    start = time.process_time()
    law.normal_scores(w)
    assert time.process_time() - start < 1.0  # a quarter of 4096 x 4096


def test_fit_knows_the_family() -> None:
    for law in (LAWS["normal"], LAWS["uniform"], LAWS["truncnorm"]):
        found = fit(law.sample(np.random.default_rng(3), (400, 500)))
        assert found.family == law.family
        assert found.scale == pytest.approx(law.scale, rel=0.02)
    assert fit(np.zeros((4, 4), np.float32)) == Law("normal", 0.0, 0.0)


def test_estimate_ignores_what_was_learned() -> None:
    w = 0.02 * draw(1500, 1500)
    w[:100] *= 20
    assert estimate(w).scale == pytest.approx(0.02, rel=0.1)


# Names


@pytest.mark.parametrize(
    ("name", "module", "leaf"),
    [
        ("layers.0.fc1.weight", "layers.0.fc1", "weight"),
        ("/layers.0/fc1/MatMul", "layers.0.fc1", ""),
        ("/layers/0/fc1/MatMul_1", "layers.0.fc1", ""),
        ("/net/net.0/Gemm", "net.0", ""),
        ("/layer1/layer1.0/downsample/downsample.0/MatMul", "layer1.0.downsample.0", ""),
        ("layers/dense/kernel:0", "layers.dense", "kernel"),
        (
            "StatefulPartitionedCall/model/dense/MatMul/ReadVariableOp:0",
            "StatefulPartitionedCall.model.dense",
            "",
        ),
        ("dense_1/BiasAdd/ReadVariableOp:0", "dense_1", "bias"),
        ("layers/dense/vars/0", "layers.dense", "vars/0"),
        ("fc", "fc", ""),
        ("weight", "weight", ""),
    ],
)
def test_names_of_exporters_give_the_module(name: str, module: str, leaf: str) -> None:
    assert split(name) == (tuple(module.split(".")), leaf)


@pytest.mark.parametrize("name", ["", "/", "//", ".", ":0"])
def test_a_name_that_names_nothing(name: str) -> None:
    assert split(name) == ((), "")


def test_generated_names() -> None:
    assert all(
        is_generated(n) for n in ("onnx::MatMul_123", "val_12", "MatMul_7", "node_linear_1", "412", "")
    )
    assert not any(
        is_generated(n) for n in ("W1", "fc.weight", "dense/MatMul/ReadVariableOp:0", "/fc/MatMul")
    )


@pytest.mark.parametrize(
    ("a", "b", "common"),
    [
        ("model.layers.0.fc", "layers.0.fc", 3),
        ("model.layers.0.fc", "module.layers.0.fc", 3),
        ("bert.layer.0.fc", "encoder.layer.0.fc", 3),
        ("layers.0.fc", "layers.1.fc", 0),
        ("head.fc", "tail.fc", 0),
        ("features.0", "classifier.0", 0),
        ("fc1", "fc2", 0),
    ],
)
def test_agreement_of_paths(a: str, b: str, common: int) -> None:
    for left, right in ((a, b), (b, a)):
        assert agreement(tuple(left.split(".")), tuple(right.split(".")))[0] == common


# Matching: every naming scheme, square weights throughout


def two_layers(scheme: str, a: Array, b: Array) -> onnx.ModelProto:
    """Trained [K, N] matrices of layers.0.fc and layers.1.fc, called as an exporter calls them."""
    match scheme:
        case "gemm":
            return model(
                layer("layers.0.fc.weight", a.T, "/layers.0/fc/Gemm", "Gemm", transB=1),
                layer("layers.1.fc.weight", b.T, "/layers.1/fc/Gemm", "Gemm", transB=1),
            )
        case "torchscript":
            return model(
                layer("onnx::MatMul_10", a, "/layers.0/fc/MatMul"),
                layer("onnx::MatMul_11", b, "/layers.1/fc/MatMul"),
            )
        case "dynamo-bias":
            return model(
                layer("val_0", a, "node_MatMul_1", bias="layers.0.fc.bias"),
                layer("val_2", b, "node_MatMul_3", bias="layers.1.fc.bias"),
            )
        case "dynamo-scopes":
            scopes = {0: "layers.0.fc", 1: "layers.1.fc"}
            return model(layer("val_0", a, "node_linear"), layer("val_2", b, "node_linear_1"), scopes=scopes)
        case _:
            prefix = "StatefulPartitionedCall/model/layers/"
            return model(
                layer(f"{prefix}0/fc/MatMul/ReadVariableOp:0", a, f"{prefix}0/fc/MatMul"),
                layer(f"{prefix}1/fc/MatMul/ReadVariableOp:0", b, f"{prefix}1/fc/MatMul"),
            )


SCHEMES = ["gemm", "torchscript", "dynamo-bias", "dynamo-scopes", "tf"]


@pytest.mark.parametrize("leaf", ["weight", "kernel"])
@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_finds_its_snapshot(tmp_path: Path, scheme: str, prefix: str, leaf: str) -> None:
    a, b = draw(16, 16), draw(16, 16)
    loaded = Loaded(two_layers(scheme, trained(a), trained(b)))
    turn: Callable[[Array], Array] = np.transpose if leaf == "weight" else np.asarray
    path = npz(
        tmp_path / "w0.npz",
        **{
            f"{prefix}layers.1.fc.{leaf}": turn(b),
            f"{prefix}layers.0.fc.{leaf}": turn(a),
            "step": np.int64(3),
        },
    )
    found = loaded.nulls(path)
    assert (found.unmatched_sites, found.unmatched_entries, found.ambiguous) == ((), (), ())
    for site, initial in zip(loaded.sites, (a, b), strict=True):
        null = found.nulls[site.index]
        assert null.kind == "snapshot"
        np.testing.assert_array_equal(null.initial(), initial)
        assert null.std() == pytest.approx(initial.std(), rel=1e-3)


@pytest.mark.parametrize("init_scheme", ["gemm", "torchscript", "dynamo-bias", "dynamo-scopes"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_untrained_export_of_any_exporter(tmp_path: Path, scheme: str, init_scheme: str) -> None:
    a, b = draw(12, 12), draw(12, 12)
    loaded = Loaded(two_layers(scheme, trained(a), trained(b)))
    path = tmp_path / "untrained.onnx"
    onnx.save(two_layers(init_scheme, a, b), path)
    found = loaded.nulls(path)
    for site, initial in zip(loaded.sites, (a, b), strict=True):
        np.testing.assert_array_equal(found.nulls[site.index].initial(), initial)


def test_alpha_and_transposition_are_folded_in(tmp_path: Path) -> None:
    w0 = draw(5, 8)
    gemm = model(layer("fc.weight", trained(w0).T, "fc", "Gemm", transB=1, alpha=-0.5))
    loaded = Loaded(gemm)
    null = loaded.nulls(npz(tmp_path / "w0.npz", **{"fc.weight": w0.T})).nulls[0]
    np.testing.assert_allclose(null.initial(), -0.5 * w0)
    assert null.std() == pytest.approx(0.5 * w0.std())
    onnx.save(model(layer("fc.weight", w0.T, "fc", "Gemm", transB=1, alpha=-0.5)), tmp_path / "w0.onnx")
    np.testing.assert_allclose(loaded.nulls(tmp_path / "w0.onnx").nulls[0].initial(), -0.5 * w0)
    assert loaded.nulls(None, "torch-linear").nulls[0].law == Law("uniform", 0.0, 0.5 / np.sqrt(5))


def test_correlation_overrules_the_convention(tmp_path: Path) -> None:
    """GPT-2's Conv1D stores [K, N] under torch's leaf name `weight`."""
    w0 = draw(24, 24)
    path = npz(tmp_path / "w0.npz", **{"h.0.c_proj.weight": w0})
    loaded = Loaded(model(layer("val_1", trained(w0), bias="h.0.c_proj.bias")))
    found = loaded.nulls(path)
    np.testing.assert_array_equal(found.nulls[0].initial(), w0)
    assert not found.matched[0].transposed
    unrelated = Loaded(model(layer("val_1", draw(24, 24), bias="h.0.c_proj.bias")))
    np.testing.assert_array_equal(unrelated.nulls(path).nulls[0].initial(), w0.T)


def test_a_square_weight_without_convention_or_correlation_is_refused(tmp_path: Path) -> None:
    loaded = Loaded(model(layer("val_1", draw(24, 24), "here"), layer("val_2", draw(24, 7))))
    found = loaded.nulls(npz(tmp_path / "w0.npz", p=draw(24, 24), q=draw(7, 24)))
    assert found.ambiguous == ("here",)
    assert found.nulls[0].kind == "estimated"
    assert hows(found) == {"val_2": ("q", "shape")}


def test_shape_decides_only_where_it_is_unique(tmp_path: Path) -> None:
    a, b, c = draw(6, 9), draw(4, 9), draw(4, 9)
    loaded = Loaded(model(layer("val_1", trained(a)), layer("val_2", trained(b)), layer("val_3", trained(c))))
    found = loaded.nulls(npz(tmp_path / "w0.npz", p=a.T, q=b, r=c))
    assert hows(found) == {"val_1": ("p", "shape")}
    assert found.ambiguous == ("val_2", "val_3")
    assert found.unmatched_entries == ("q", "r")
    np.testing.assert_array_equal(found.nulls[0].initial(), a)
    assert found.report() == {
        "matched": [{"site": "val_1", "entry": "p", "how": "shape", "transposed": True}],
        "unmatched": {"entries": ["q", "r"], "sites": []},
        "ambiguous": ["val_2", "val_3"],
    }
    assert json.loads(json.dumps(found.report())) == found.report()


def test_two_modules_that_end_alike_are_ambiguous(tmp_path: Path) -> None:
    loaded = Loaded(model(layer("onnx::MatMul_3", draw(6, 9), "/fc/MatMul"), layer("W", draw(3, 2), "other")))
    entries = {"encoder.fc.weight": draw(9, 6), "decoder.fc.weight": draw(9, 6), "W": draw(3, 2)}
    found = loaded.nulls(npz(tmp_path / "w0.npz", **entries))
    assert found.ambiguous == ("/fc/MatMul",)
    assert found.nulls[0].kind == "estimated"
    with_preset = loaded.nulls(tmp_path / "w0.npz", "xavier-uniform")
    assert with_preset.nulls[0].kind == "distribution"
    assert hows(with_preset)["/fc/MatMul"] == ("xavier-uniform", "preset")


@pytest.mark.parametrize("entry", ["layers/{}/kernel:0", "{}/kernel", "layers/{}/vars/0"])
def test_keras_names(tmp_path: Path, entry: str) -> None:
    initial = {"dense": draw(20, 20), "dense_1": draw(20, 20)}
    layers = [
        layer(f"functional_1/{n}/MatMul/ReadVariableOp:0", draw(20, 20), f"functional_1/{n}/MatMul")
        for n in initial
    ]
    found = Loaded(model(*layers)).nulls(
        npz(tmp_path / "w0.npz", **{entry.format(name): w0 for name, w0 in initial.items()})
    )
    for null, w0 in zip(found.nulls.values(), initial.values(), strict=True):
        np.testing.assert_array_equal(null.initial(), w0)


def test_a_pair_that_is_sure_settles_a_doubtful_one(tmp_path: Path) -> None:
    """`fc` alone agrees with both entries, until its namesake has taken its own."""
    deep = {"val_1": "head.fc", "val_2": "fc"}
    loaded = Loaded(model(*(layer(name, draw(5, 3), bias=f"{m}.bias") for name, m in deep.items())))
    entries = {"net.head.fc.weight": draw(3, 5), "net.fc.weight": draw(3, 5)}
    assert hows(loaded.nulls(npz(tmp_path / "w0.npz", **entries))) == {
        "val_1": ("net.head.fc.weight", "scope"),
        "val_2": ("net.fc.weight", "scope"),
    }


def test_generated_names_yield_to_scopes(tmp_path: Path) -> None:
    """The same made-up name in another export may be another layer."""
    a, b = draw(10, 10), draw(10, 10)
    loaded = Loaded(two_layers("torchscript", trained(a), trained(b)))
    swapped = model(
        layer("onnx::MatMul_11", a, "/layers.0/fc/MatMul"), layer("onnx::MatMul_10", b, "/layers.1/fc/MatMul")
    )
    onnx.save(swapped, tmp_path / "w0.onnx")
    found = loaded.nulls(tmp_path / "w0.onnx")
    np.testing.assert_array_equal(found.nulls[0].initial(), a)
    np.testing.assert_array_equal(found.nulls[1].initial(), b)
    bare = Loaded(model(layer("val_1", trained(a)), layer("val_2", trained(b))))
    assert {how for _, how in hows(bare.nulls(npz(tmp_path / "w.npz", val_1=a, val_2=b))).values()} == {
        "generated"
    }


def test_all_uses_of_a_shared_weight_are_matched(tmp_path: Path) -> None:
    w0 = draw(8, 8)
    shared = trained(w0)
    loaded = Loaded(model(layer("tied", shared, "a"), layer("tied", shared, "b", "Gemm", transB=1)))
    found = loaded.nulls(npz(tmp_path / "w0.npz", tied=w0))
    np.testing.assert_array_equal(found.nulls[0].initial(), w0)
    np.testing.assert_array_equal(found.nulls[1].initial(), w0.T)


NAMES = st.lists(st.sampled_from(["a", "b", "attn", "mlp", "fc", "0", "1"]), min_size=1, max_size=3).map(
    ".".join
)


@settings(max_examples=40, deadline=None)
@given(
    modules=st.lists(NAMES.map(lambda n: f"{n}.lin"), min_size=1, max_size=5, unique=True),
    prefix=st.sampled_from(["model.", "module.", "bert.encoder."]),
    data=st.data(),
)
def test_prefix_and_order_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, modules: list[str], prefix: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("w0")
    initial = {f"{m}.weight": draw(4, 3) for m in modules}
    layers = [
        layer(f"val_{n}", trained(initial[f"{m}.weight"].T), "/" + m.replace(".", "/") + "/MatMul")
        for n, m in enumerate(modules)
    ]
    loaded = Loaded(model(*layers))
    plain = hows(loaded.nulls(npz(folder / "plain.npz", **initial)))
    assert len(plain) == len(modules)
    order = data.draw(st.permutations(list(initial)))
    renamed = loaded.nulls(npz(folder / "renamed.npz", **{prefix + name: initial[name] for name in order}))
    assert hows(renamed) == {site: (prefix + entry, how) for site, (entry, how) in plain.items()}


# Other sources


def test_safetensors_in_every_float_type(tmp_path: Path) -> None:
    w0 = draw(4, 6)
    loaded = Loaded(model(layer("w", trained(w0))))
    for dtype in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16):
        save_file({"w": w0.astype(dtype), "position_ids": np.arange(3)}, tmp_path / "w0.safetensors")
        found = loaded.nulls(tmp_path / "w0.safetensors")
        expected = w0.astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(found.nulls[0].initial(), expected)


def test_onnx_with_external_data(tmp_path: Path) -> None:
    w0 = draw(64, 32)
    onnx.save(
        model(layer("w", w0)),
        tmp_path / "w0.onnx",
        save_as_external_data=True,
        location="w0.bin",
        size_threshold=0,
    )
    loaded = Loaded(model(layer("w", trained(w0))))
    np.testing.assert_array_equal(loaded.nulls(tmp_path / "w0.onnx").nulls[0].initial(), w0)
    (tmp_path / "w0.bin").unlink()
    with pytest.raises(InputError, match=r"w0\.bin"):
        loaded.nulls(tmp_path / "w0.onnx")


def spec(path: Path, *patterns: Any) -> Path:
    path.write_text(json.dumps({"onnx_decomp_init": 1, "patterns": patterns}))
    return path


def test_spec_first_match_wins_under_any_name(tmp_path: Path) -> None:
    loaded = Loaded(two_layers("dynamo-scopes", draw(16, 16), draw(16, 16)))
    path = spec(
        tmp_path / "init.json",
        {"match": "layers.0.*.weight", "family": "normal", "std": 0.02, "mean": 0.5},
        {"match": "re:^val_[0-9]$", "family": "uniform", "bound": "2*sqrt(3)/sqrt(fan_in + fan_out - 0.5)"},
        {"match": "*", "preset": "bert-truncated"},
    )
    found = loaded.nulls(path)
    assert found.nulls[0].law == Law("normal", 0.5, 0.02)
    assert found.nulls[1].law == Law("uniform", 0.0, 2 * np.sqrt(3) / np.sqrt(31.5))
    assert found.unmatched_entries == ("*",)
    assert {null.kind for null in found.nulls.values()} == {"distribution"}


def test_spec_then_preset(tmp_path: Path) -> None:
    loaded = Loaded(two_layers("gemm", draw(16, 16), draw(16, 16)))
    path = spec(tmp_path / "init.json", {"match": "layers.0.*", "family": "truncnorm", "std": 0.1, "cut": 3})
    assert loaded.nulls(path).unmatched_sites == ("/layers.1/fc/Gemm",)
    both = loaded.nulls(path, "kaiming-normal")
    assert both.nulls[0].law == Law("truncnorm", 0.0, 0.1, 3.0)
    assert both.nulls[1].law == Law("normal", 0.0, np.sqrt(2 / 16))
    assert both.unmatched_sites == ()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_variance_they_promise(name: str) -> None:
    k, n = 300, 500
    expected = {
        "torch-linear": 1 / np.sqrt(3 * k),
        "kaiming-normal": np.sqrt(2 / k),
        "kaiming-uniform": np.sqrt(2 / k),
        "kaiming": np.sqrt(2 / k),
        "lecun-normal": np.sqrt(1 / k),
        "bert": 0.02,
        "bert-truncated": 0.02 * 0.87962566,
        "gpt2": 0.02,
    }.get(name, np.sqrt(2 / (k + n)))
    assert PRESETS[name](Shape(k, n)).std() == pytest.approx(expected)


def test_gpt2_scales_residual_projections_by_depth() -> None:
    names = [f"h.{i}.{m}" for i in range(3) for m in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]
    loaded = Loaded(model(*(layer(f"val_{i}", draw(4, 4), bias=f"{n}.bias") for i, n in enumerate(names))))
    found = loaded.nulls(None, "gpt2")
    for n, name in enumerate(names):
        expected = 0.02 / np.sqrt(6) if name.endswith("c_proj") else 0.02
        assert found.nulls[n].std() == pytest.approx(expected)


def test_without_statistics_every_null_is_estimated() -> None:
    loaded = Loaded(two_layers("gemm", draw(100, 100), draw(100, 100)))
    found = loaded.nulls()
    assert [null.kind for null in found.nulls.values()] == ["estimated"] * 2
    assert found.nulls[0].std() == pytest.approx(1.0, rel=0.05)
    assert found.report() == {"matched": [], "unmatched": {"entries": [], "sites": []}, "ambiguous": []}
    with pytest.raises(InternalError):
        found.nulls[0].initial()


def test_nested_and_empty_weights_get_a_null_too(tmp_path: Path) -> None:
    proto = model(layer("w", draw(4, 4), "fc"), layer("empty", np.zeros((0, 3), np.float32), "none"))
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x0", "inside"], ["z"], name="deep")],
        "then",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [3, 4])],
        [numpy_helper.from_array(draw(4, 4), "inside")],
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.asarray(True), "flag"))
    proto.graph.node.append(helper.make_node("If", ["flag"], ["q"], then_branch=inner, else_branch=inner))
    loaded = Loaded(proto)
    assert len(loaded.sites) == 4
    for found in (
        loaded.nulls(),
        loaded.nulls(None, "torch-linear"),
        loaded.nulls(npz(tmp_path / "w0.npz", w=draw(4, 4), inside=draw(4, 4))),
    ):
        assert set(found.nulls) == {0, 1, 2, 3}
    onnx.save(proto, tmp_path / "w0.onnx")
    assert loaded.nulls(tmp_path / "w0.onnx").nulls[0].kind == "snapshot"


# Bad input


def bad(make: Callable[[Path], Path | None], says: str) -> Any:
    return pytest.param(make, says, id=says)


def zipped(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "."), data)
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def header(shape: str, descr: str = "<f4", data: bytes = b"") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def bomb(path: Path) -> Path:
    """A zip directory that declares far more than the archive holds."""
    data = bytearray(npz(path, v=draw(4, 4), w=draw(4, 4)).read_bytes())
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        data[at + 24 : at + 28] = (0xFFFFFFF0).to_bytes(4, "little")
        at = data.find(b"PK\x01\x02", at + 1)
    return written(path, bytes(data))


W = np.ones((4, 6), np.float32)
NPZ, SAFE, JSON = "w0.npz", "w0.safetensors", "w0.json"
BAD = [
    bad(lambda d: d / NPZ, "no such file"),
    bad(lambda d: d / JSON, "no such file"),
    bad(lambda d: written(d / "w0.pt", b""), "unknown kind"),
    bad(lambda d: written(d / "w0", b""), "unknown kind"),
    bad(lambda d: written(d / NPZ, b"\x80\x04K\x01."), "not a sound .npz"),
    bad(lambda d: written(d / NPZ, npz(d / NPZ, w=W).read_bytes()[:-40]), "not a sound .npz"),
    bad(lambda d: npz(d / NPZ, w=np.asarray([[{}]], object)), "'w' holds pickled objects"),
    bad(lambda d: zipped(d / NPZ, data__pkl=b"\x80\x04K\x01."), "'data.pkl' is not an array"),
    bad(lambda d: zipped(d / NPZ, w__npy=header("(1000000, 1000000)")), "'w' is not as long"),
    bad(lambda d: zipped(d / NPZ, w__npy=header("(-4, 6)")), "'w' is not as long"),
    bad(lambda d: zipped(d / NPZ, w__npy=b"junk"), "not a sound .npz"),
    bad(lambda d: bomb(d / NPZ), "over the budget"),
    bad(lambda d: npz(d / NPZ, w=W.astype(np.int64)), "'w' holds int64"),
    bad(lambda d: npz(d / NPZ, w=W.astype(np.complex64)), "'w' holds complex64"),
    bad(lambda d: npz(d / NPZ, w=np.ones((4, 7), np.float32)), "'w' has shape [4, 7]"),
    bad(lambda d: npz(d / NPZ, w=np.ones(24, np.float32)), "'w' has shape [24]"),
    bad(lambda d: npz(d / NPZ, w=np.full((4, 6), np.nan)), "'w' holds NaN"),
    bad(lambda d: npz(d / NPZ, w=np.full((4, 6), 1e300)), "'w' holds NaN or infinity"),
    bad(lambda d: npz(d / NPZ, other=np.ones((9, 9))), "none of its 1 entries"),
    bad(lambda d: npz(d / NPZ), "none of its 0 entries"),
    bad(lambda d: written(d / SAFE, b"junkjunkjunkjunk"), "not a sound .safetensors"),
    bad(lambda d: written(d / "w0.onnx", b"junk"), "w0.onnx"),
    bad(lambda d: written(d / JSON, b"{"), "broken JSON"),
    bad(lambda d: written(d / JSON, b"\xff"), "broken JSON"),
    bad(lambda d: written(d / JSON, b"[" * 100_000), "broken JSON"),
    bad(lambda d: written(d / JSON, b'{"onnx_decomp_init": NaN}'), "broken JSON"),
    bad(lambda d: written(d / JSON, b"[]"), "not a spec"),
    bad(lambda d: spec(d / JSON), "a spec holds one list"),
    bad(lambda d: spec(d / JSON, {"match": "v*", "preset": "bert"}), "no pattern matches"),
    bad(lambda d: spec(d / JSON, {"preset": "bert"}), 'pattern 0 is wrong: "match"'),
    bad(lambda d: spec(d / JSON, {"match": "re:(", "preset": "bert"}), "pattern 0 is wrong"),
    bad(lambda d: spec(d / JSON, {"match": "*", "preset": "bret"}), "unknown preset 'bret'"),
    bad(lambda d: spec(d / JSON, {"match": "*", "preset": "bert", "std": 1}), "a preset takes no std"),
    bad(lambda d: spec(d / JSON, {"match": "*", "family": "cauchy"}), '"family" must be'),
    bad(lambda d: spec(d / JSON, {"match": "*", "family": "normal"}), "normal takes 'std'"),
    bad(lambda d: spec(d / JSON, {"match": "*", "family": "normal", "std": -1}), "out of range"),
    bad(lambda d: spec(d / JSON, {"match": "*", "family": "normal", "std": True}), "neither a number"),
    bad(lambda d: spec(d / JSON, {"match": "*", "family": "normal", "std": "1/0"}), "division by zero"),
    bad(lambda d: spec(d / JSON, {"match": "*", "family": "normal", "std": "9**9"}), "is neither"),
    bad(lambda d: spec(d / JSON, {"match": "*", "family": "normal", "std": "exit()"}), "is neither"),
    bad(lambda d: spec(d / JSON, {"match": "*", "family": "normal", "std": "("}), "no expression"),
    bad(lambda d: spec(d / JSON, {"match": "*", "family": "normal", "std": "1" * 999}), "at most 200"),
]


@pytest.mark.parametrize(("make", "says"), BAD)
def test_bad_statistics_are_one_line_that_names_them(
    tmp_path: Path, make: Callable[[Path], Path], says: str
) -> None:
    path = make(tmp_path)
    loaded = Loaded(model(layer("w", draw(4, 6), "fc")))
    with pytest.raises(InputError) as error:
        loaded.nulls(path)
    message = str(error.value)
    assert says in message
    assert str(path) in message
    assert "\n" not in message


def test_bad_values_in_an_untrained_export(tmp_path: Path) -> None:
    onnx.save(model(layer("w", np.full((4, 6), np.nan, np.float32))), tmp_path / "w0.onnx")
    with pytest.raises(InputError, match=r"w0\.onnx.*NaN"):
        Loaded(model(layer("w", draw(4, 6)))).nulls(tmp_path / "w0.onnx")


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(UsageError, match=r"'he'.*torch-linear"):
        Loaded(model(layer("w", draw(4, 6)))).nulls(None, "he")


# Real exporters


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[bool, tuple[Loaded, Path, Path, dict[str, Array]]]:
    """A small transformer-like model, untrained and trained, by each exporter of torch."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    nn = torch.nn

    class Conv1D(nn.Module):
        """GPT-2's linear layer, stored [K, N]."""

        def __init__(self, n: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(n, n))
            self.bias = nn.Parameter(torch.zeros(n))

        def forward(self, x: Any) -> Any:
            return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(x.shape)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
            self.mlp = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
            self.c_proj = Conv1D(16)

        def forward(self, x: Any) -> Any:
            x = x + self.c_proj(torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1) @ x)
            return x + self.mlp(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])
            self.head = nn.Linear(16, 16, bias=False)

        def forward(self, x: Any) -> Any:
            for block in self.layers:
                x = block(x)
            return self.head(x)

    folder = tmp_path_factory.mktemp("torch")
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 4, 16)
    initial = {name: p.detach().numpy().copy() for name, p in net.named_parameters()}
    save_file(initial, folder / "w0.safetensors")
    arguments = {True: {"dynamo": True, "external_data": False, "verbose": False}, False: {"dynamo": False}}
    for dynamo, chosen in arguments.items():
        torch.onnx.export(net, (x,), str(folder / f"w0_{dynamo}.onnx"), **chosen)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.9).add_(0.3 * p.std() * torch.randn_like(p) if p.ndim == 2 else 1.0)
    found = {}
    for dynamo, chosen in arguments.items():
        torch.onnx.export(net, (x,), str(folder / f"w_{dynamo}.onnx"), **chosen)
        loaded = Loaded(onnx.load(folder / f"w_{dynamo}.onnx"))
        found[dynamo] = (loaded, folder / "w0.safetensors", folder / f"w0_{not dynamo}.onnx", initial)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_torch_exports_find_every_weight(exported: Any, dynamo: bool) -> None:
    loaded, state, other_export, initial = exported[dynamo]
    expected = sorted(name for name, array in initial.items() if array.ndim == 2)
    by_state, by_export = loaded.nulls(state), loaded.nulls(other_export)
    assert len(loaded.sites) == len(expected) == 11
    assert sorted(match.entry for match in by_state.matched) == expected
    for found in (by_state, by_export):
        assert (found.unmatched_sites, found.unmatched_entries, found.ambiguous) == ((), (), ())
    for match in by_state.matched:
        site = loaded.sites[match.index]
        stored = initial[match.entry]
        w0 = stored if "c_proj" in match.entry else stored.T
        for found in (by_state, by_export):
            np.testing.assert_array_equal(found.nulls[site.index].initial(), w0)
        assert np.corrcoef(loaded.weight(site).ravel(), w0.ravel())[0, 1] > 0.8
