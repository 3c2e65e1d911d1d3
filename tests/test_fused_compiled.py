"""Models with attention in one operator through the whole compiler."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_decomp import cli
from onnx_decomp.axes import find_regions
from onnx_decomp.compiler import Result, decompose
from onnx_decomp.init_stats import load_nulls
from onnx_decomp.options import Options
from onnx_decomp.relay import Relay
from onnx_decomp.runtime import open_session
from onnx_decomp.sites import find_sites, read_affine
from tests import bert
from tests.attentions import (
    NATIVE,
    Array,
    Fused,
    index_of,
    run,
    with_attributes,
)


def compiled(model: onnx.ModelProto, feeds: dict[str, Array], folder: Path, **options: Any) -> Result:
    np.savez(folder / "calib.npz", **feeds)  # type: ignore[arg-type]
    chosen = Options(provider="cpu", latency_gate=False, objective="flops", **options)
    return decompose(model, calib=folder / "calib.npz", options=chosen)


@pytest.mark.parametrize(
    "spec",
    [
        Fused(rank=4),
        Fused(rank=4, mask="BS", widths=(24, 48), attributes=with_attributes(scale=0.3)),
        Fused(rank=4, attributes=with_attributes(unidirectional=1), opset=11),
        replace(NATIVE, rank=4),
        replace(NATIVE, rank=4, bias="packed"),
    ],
    ids=str,
)
def test_the_rank_that_heads_have_is_found(spec: Fused, tmp_path: Path) -> None:
    """Heads whose products have a low rank are written that narrow; a second compilation changes nothing."""
    model = spec.model()
    done = compiled(model, spec.feeds(400, 1), tmp_path, tolerance=1e-4)
    assert [site["head_width"] for site in done.report["sites"]] == [4] * 4
    feeds = spec.feeds(20, 7)
    before, after = run(model, feeds), run(done.model, feeds)
    assert np.linalg.norm(after - before) <= 3e-6 * np.linalg.norm(before)
    assert done.model.ByteSize() < model.ByteSize()
    again = compiled(done.model, spec.feeds(400, 1), tmp_path, tolerance=1e-4, force=True)
    assert not again.changed


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With external data, too; `explain` takes the node's name, of one of its three matrices, or of the weight."""
    spec = Fused(rank=4, mask="BS", dtype=np.float16)
    onnx.save(
        spec.model(), tmp_path / "in.onnx", save_as_external_data=True, location="in.data", size_threshold=0
    )
    np.savez(tmp_path / "calib.npz", **spec.feeds(400, 1))  # type: ignore[arg-type]
    files = [str(tmp_path / name) for name in ("in.onnx", "out.onnx")]
    asked = [
        "--calib",
        str(tmp_path / "calib.npz"),
        "--report",
        str(tmp_path / "report.json"),
        "--provider",
        "cpu",
    ]
    asked += ["--objective", "flops", "--tolerance", "1e-2", "--no-latency-gate", "--require-change", "-q"]
    assert cli.main([*files, *asked]) == 0
    feeds = spec.feeds(20, 7)
    before, after = (open_session(Path(name)).run(feeds)["y"].astype(np.float64) for name in files)
    assert np.linalg.norm(after - before) <= 1e-2 * np.linalg.norm(before)
    written = onnx.load(files[1])
    assert {tensor.data_type for tensor in written.graph.initializer} == {TensorProto.FLOAT16}
    assert not any(tensor.name in ("W", "b") for tensor in written.graph.initializer)
    for name, count in (("attention", 3), ("attention/key", 1), ("W", 3), ("node_o", 1)):
        capsys.readouterr()
        assert cli.main(["explain", str(tmp_path / "report.json"), name, "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["sites"]) == count


def test_what_was_stored_packed_is_compared_with_a_packed_snapshot(tmp_path: Path) -> None:
    """As arrays by name, and as the untrained export."""
    spec, start = Fused(widths=(12, 36)), Fused(widths=(12, 36), seed=1)
    index = index_of(spec.model())
    onnx.save(start.model(), tmp_path / "init.onnx")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in start.model().graph.initializer}
    np.savez(tmp_path / "init.npz", **{name: stored[name] for name in ("W", "Wo")})
    for init in ("init.npz", "init.onnx"):
        found = load_nulls(find_sites(index), partial(read_affine, index), tmp_path / init, None)
        for site, name in zip(find_sites(index), "qkvo", strict=True):
            initial = found.nulls[site.index].initial()
            np.testing.assert_array_equal(initial, start.weights[name])


def test_in_a_function_and_in_a_body(tmp_path: Path) -> None:
    """A call is written out with the attention in it; the body of an If is compiled by itself."""
    spec = Fused(rank=4, opset=17)
    model, plain = spec.model(), spec.model()
    nodes = list(model.graph.node)
    opsets = list(model.opset_import)
    function = helper.make_function("local", "Layer", ["x", "W", "b", "Wo", "bo"], ["y"], nodes, opsets)
    del model.graph.node[:]
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    call = helper.make_node("Layer", ["x", "W", "b", "Wo", "bo"], ["y"], "call", domain="local")
    model.graph.node.append(call)
    done = compiled(model, spec.feeds(400, 1), tmp_path, tolerance=1e-4)
    assert [site["head_width"] for site in done.report["sites"]] == [4] * 4
    assert {site["graph"] for site in done.report["sites"]} == {"function:call"}
    assert not done.model.functions

    branches = []
    for name in ("y1", "y2"):
        inner = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        inner[-1].output[0] = name
        made = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        other = helper.make_node("Identity", ["x"], [name])
        branches.append(helper.make_graph(inner if name == "y1" else [other], name, [], [made]))
    del plain.graph.node[:]
    choice = helper.make_node(
        "If", ["yes"], ["y"], "choice", then_branch=branches[0], else_branch=branches[1]
    )
    plain.graph.node.append(choice)
    plain.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    done = compiled(plain, spec.feeds(400, 1), tmp_path, tolerance=1e-4)
    told = [(site["graph"], site["node"], site["head_width"]) for site in done.report["sites"]]
    assert told == [
        *(("if:choice/then", f"attention/{part}", 4) for part in ("query", "key", "value")),
        ("if:choice/then", "node_o", 4),
    ]


def test_what_fused_operators_make_has_a_shape(tmp_path: Path) -> None:
    """So that the model can be run in pieces, behind embeddings that are one operator, too."""
    index = index_of(bert.fused(bert.exported(), tmp_path))
    sites = find_sites(index)
    assert Relay(index, sites, find_regions(index, sites), None).possible
    assert index.shapes["layer.1.attention/context"] == (None, bert.TOKENS, bert.WIDTH)
    inputs = ["input_ids", "token_type_ids", "words", "places", "kinds", "embedded.scale", "embedded.shift"]
    model = bert.exported()
    embedded = helper.make_node(
        "EmbedLayerNormalization", inputs, ["all.normed", "m"], domain="com.microsoft"
    )
    model.graph.node.append(embedded)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert index_of(model).shapes["all.normed"] == (None, bert.TOKENS, bert.WIDTH)


def test_a_fused_bert_compiles_as_the_exported_one(tmp_path: Path) -> None:
    """The optimizer's own operators around it or not: the same rewrites, and layers that stay are as they were."""
    models = {"exported": bert.exported()}
    models["fused"] = bert.fused(models["exported"], tmp_path)
    before = [node for node in models["fused"].graph.node if node.op_type == "Attention"]
    assert len(before) == 2
    told, feeds = {}, bert.texts(50, 5)
    for name, model in models.items():
        done = compiled(model, bert.texts(400, 1), tmp_path, tolerance=0.05)
        change = np.linalg.norm(run(done.model, feeds) - run(model, feeds))
        assert 0 < change <= 0.05 * np.linalg.norm(run(model, feeds))
        told[name] = [(s["shape"], s["region"], s["decision"], s["head_width"]) for s in done.report["sites"]]
    assert told["fused"] == told["exported"]
    assert any(width is not None for *_, width in told["fused"]), "nothing was kept inside of an attention"
    regions = {s["node"].partition("/")[0]: s["region"] for s in done.report["sites"]}
    after = {node.name: node for node in done.model.graph.node}
    stored = {tensor.name for tensor in done.model.graph.initializer}
    for node in before:
        if regions[node.name] not in done.report["kept"]:
            assert after[node.name] == node
            assert set(node.input[1:3]) <= stored
            continue
        assert node.name not in after
        assert not set(node.input[1:3]) & stored
        (heads,) = [n for name, n in after.items() if name.startswith(f"{node.name}/decomp/MultiHead")]
        assert list(heads.input[3:]) == ["", node.input[3]]
