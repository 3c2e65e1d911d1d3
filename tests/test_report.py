"""The report: what it says of a program, and how it is shown."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnx_decomp import model_io, rendering
from onnx_decomp.axes import find_regions
from onnx_decomp.calibration import Data
from onnx_decomp.errors import InputError
from onnx_decomp.latency import Latency
from onnx_decomp.metrics import Limits, OutputChange, Verification
from onnx_decomp.options import Options
from onnx_decomp.program import Evidence, Program, Rewrite, Segment, Structure
from onnx_decomp.reasons import REASONS, explain
from onnx_decomp.rendering import describe_site, render_html, render_table
from onnx_decomp.report import Measured, Report, build, read, to_json, verdict, write
from onnx_decomp.sites import GraphIndex, find_sites
from onnx_decomp.terminal import printable

BLOCKS = np.array([0, 1, 0, 1], np.int32)
HIDDEN = np.array([0, 0, 0, 1, 1, -1], np.int32)


def make_model(node: str = "fc1") -> onnx.ModelProto:
    """x [?, 4] -> fc1 -> 6 -> Relu -> fc2 -> 4 = y, and a weight of whole numbers that nothing can be done about."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int, dtype: type = np.float32) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.normal(size=shape).astype(dtype), name)

    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], node),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "w2"], ["y"], "fc2"),
        helper.make_node("MatMul", ["d", "w3"], ["z"], "fc3"),
    ]
    value = helper.make_tensor_value_info
    inputs = [value("x", onnx.TensorProto.FLOAT, [None, 4]), value("d", onnx.TensorProto.INT32, [None, 4])]
    outputs = [value("y", onnx.TensorProto.FLOAT, [None, 4]), value("z", onnx.TensorProto.INT32, [None, 2])]
    weights = [weight("w1", 4, 6), weight("w2", 6, 4), weight("w3", 4, 2, dtype=np.int32)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def make_program(node: str = "fc1", keep: bool = True) -> Program:
    """Evidence, a structure and, if `keep`, a rewrite into two blocks for the region of fc1 and fc2."""
    source = model_io.from_proto(make_model(node))
    index = GraphIndex.build(source.proto, partial(model_io.read_tensor, source))
    sites = find_sites(index)
    regions = find_regions(index, sites)
    program = Program(
        source, Options(seed=5, calib=Path("c.npz")), index, sites, regions, Data("calibration")
    )
    region = regions[0]
    zero = np.zeros((4, 6), np.float32)
    program.evidence[0] = Evidence(
        "snapshot", zero, None, 0.9, 0.1, True, float("nan"), 0.25, 2, {"tiles": 0.5}
    )
    labels = dict(zip(region.order, (BLOCKS, HIDDEN, BLOCKS), strict=True))
    program.structures[region.name] = (Structure((0, 1), labels, 2, "exact", 0.005, 1.0),)
    if keep:
        segment = Segment((0, 1), labels, 2, "chain")
        errors = ((2e-4, 4e-4), (1e-4, 2e-4))
        affine = tuple(program.affine(site) for site in region.sites)
        program.rewrites.append(Rewrite(region, (segment,), affine, "split", "applied", errors=errors))
    else:
        program.decide("planning", region.sites[0], "declined", "not-faster", gain=0.9)
    program.rows_per_sample = {0: 10, 1: 10}
    return program


def measured(**values: Any) -> Measured:
    change = OutputChange(rel_l2=3e-4, worst_sample=float("inf"), max_abs=1e-3, cosine=0.99999)
    return Measured(
        verification=Verification(True, Limits("rel-l2", 1e-3), {"y": change}),
        rewrite_change=1e-7,
        latency=make_latency(2.9),
        seconds=1.23456,
        history=({"round": 1, "undone": "region_001", "why": "latency"},),
        **values,
    )


def make_latency(speedup: float) -> Latency:
    return Latency("cpu", 1, 2.9, 2.9 / speedup, speedup, (2.5, 3.1), rounds=30, samples=64)


def build_report(node: str = "fc1", keep: bool = True, **values: Any) -> Report:
    program = make_program(node, keep)
    return build(program, program.original if keep else None, measured(**values))


def shown(report: Report, **options: Any) -> str:
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=200).print(render_table(report, **options))
    return text.getvalue()


def test_fields_that_others_rely_on() -> None:
    report = build_report()
    assert list(report) == [
        "schema", "verdict", "warnings", "input", "output", "options", "versions", "seed", "seconds", "kept",
        "history", "init", "data", "sites", "verify", "evaluate", "rewrite",
        "plan", "latency", "operators",
    ]  # fmt: skip
    assert report["schema"] == "onnx-decomp/1"
    assert report["kept"] == ["region_000"]
    assert report["seed"] == 5
    assert report["options"]["calib"] == "c.npz"
    assert report["data"] == {"kind": "calibration", "fit": 0, "select": 0, "report": 0}
    assert report["latency"]["interval"] == [2.5, 3.1]
    assert report["verify"]["outputs"]["y"]["rel_l2"] == 3e-4
    assert report["rewrite"] == {"max_rel_l2": 1e-7}
    assert set(report["init"]) == {"matched", "unmatched", "ambiguous"}
    assert {"onnx", "numpy"} <= set(report["versions"])
    site = report["sites"][0]
    assert (site["node"], site["op"], site["weight"]) == ("fc1", "MatMul", "w1")
    assert (site["shape"], site["dtype"], site["graph"]) == ([4, 6], "float32", "main")
    assert (site["supported"], site["learned_rank"], site["influence"]) == (0.25, 2, None)
    assert site["error"] == {"predicted": 2e-4, "measured": 4e-4}


def test_structure_is_in_original_order_without_the_dead() -> None:
    first, second, third = build_report(keep=False)["sites"]
    assert first["structure"]["blocks"] == [
        {"rows": [0, 2], "cols": [0, 1, 2]},
        {"rows": [1, 3], "cols": [3, 4]},
    ]
    assert second["structure"]["blocks"][1] == {"rows": [3, 4], "cols": [1, 3]}
    assert third["structure"] is None
    assert (first["decision"], first["reason"]) == ("dense", "not-faster")
    assert (third["decision"], third["reason"]) == ("dense", "weight-type")


def test_flops_count_what_is_computed() -> None:
    report = build_report()
    first = report["sites"][0]
    assert (first["decision"], first["form"], first["reason"]) == ("split", "chain", "applied")
    assert first["flop_ratio"] == (2 * 3 + 2 * 2) / 24
    assert report["input"]["matmul_flops"] == 2 * (10 * 24 + 10 * 24 + 8)
    assert report["output"]["matmul_flops"] == 2 * (10 * 10 + 10 * 10 + 8)
    assert report["input"]["parameters"] == 24 + 24, "floats"


def test_a_dense_segment_without_dropped_units_is_dense() -> None:
    program = make_program()
    region = program.regions[0]
    first, hidden, last = region.order
    whole = {first: np.zeros(4, np.int32), hidden: np.array([0, 0, 0, 0, 0, -1], np.int32)}
    segments = (
        Segment((0,), whole, 1),
        Segment((1,), {hidden: np.zeros(6, np.int32), last: np.zeros(4, np.int32)}, 1),
    )
    affine = program.rewrites[0].affine
    program.rewrites = [Rewrite(region, segments, affine, "reduced", "applied")]
    reduced, dense = build(program, program.original, measured())["sites"][:2]
    assert (reduced["decision"], reduced["flop_ratio"]) == ("reduced", 20 / 24)
    assert (dense["decision"], dense["flop_ratio"]) == ("dense", 1.0)
    assert reduced["error"]["predicted"] is None


def test_a_region_that_a_gate_undid_keeps_the_reason() -> None:
    program = make_program(keep=False)
    program.banned["region_000"] = "latency"
    assert build(program, None, measured())["sites"][0]["reason"] == "latency"


def test_nothing_kept_means_the_input() -> None:
    report = build_report(keep=False)
    assert report["verdict"] == "nothing kept: OUT is IN byte for byte"
    assert {key: report["output"][key] for key in ("sha256", "bytes")} == {
        key: report["input"][key] for key in ("sha256", "bytes")
    }


def test_verdict_says_what_was_not_measured() -> None:
    program = make_program()
    assert verdict(program, make_latency(2.9)) == (
        "kept 1 of 1 regions: 0.43 of the MatMul FLOPs, 2.9x faster on cpu with 1 thread"
    )
    assert "1.25x slower" in verdict(program, make_latency(0.8))
    assert verdict(program, None).endswith("latency not measured")
    program.data = Data("synthetic")
    assert verdict(program, None).endswith("not verified on real data")


def test_json_is_valid_and_the_same_each_time() -> None:
    report = build_report()
    text = to_json(report)
    assert text == to_json(build_report())
    assert json.loads(text, parse_constant=pytest.fail) == report
    assert report["verify"]["outputs"]["y"]["worst_sample"] is None
    assert '"rows": [0, 2]' in text


def test_names_that_look_like_json_survive() -> None:
    name = '[\n 1,\n 2 ] "\ud800'
    assert json.loads(to_json({"name": name, "list": [1, 2.5e-7, -3]})) == {
        "name": name,
        "list": [1, 2.5e-7, -3],
    }


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write(path, to_json(build_report()))
    assert read(path)["schema"] == "onnx-decomp/1"
    before = path.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        write(path, "half \ud800")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    path.write_text("[]")
    with pytest.raises(InputError, match="schema"):
        read(path)


def test_table_shows_names_without_their_control_characters() -> None:
    text = shown(build_report("[bold]\x1b[2Jfc\u202e1"))
    assert "[bold]\\x1b[2Jfc\\u202e1" in text
    assert "\x1b" not in text
    assert explain("weight-type") in text


def test_table_counts_what_it_does_not_list() -> None:
    text = shown(build_report(), every_site=False)
    assert "fc3" not in text
    assert f"1 node left dense: {REASONS['weight-type']}" in text


def test_table_ends_before_it_takes_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "MOST_ROWS", 2)
    sites = len(build_report()["sites"])
    assert f"{sites - 2} more nodes are in the report" in shown(build_report())
    monkeypatch.setattr(rendering, "MOST_ROWS", sites)
    assert "more nodes" not in shown(build_report())


def test_html_is_self_contained_and_escapes_names() -> None:
    page = render_html(build_report("<script>alert(1)</script>\x1b", warnings=("<b>careful</b>",)))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;careful" in page
    assert "\x1b" not in page
    assert "<svg" in page
    assert "region_001" in page
    assert "http" not in page.replace("http-equiv", "")


def test_story_of_a_site_names_reason_and_numbers() -> None:
    story = "\n".join(describe_site(build_report(keep=False)["sites"][0]))
    assert explain("not-faster") in story
    assert "[not-faster]" in story
    assert "gain 0.9" in story
    assert "shrink 0.9" in story


def test_an_unknown_reason_stays_as_it_is() -> None:
    assert explain("from-a-plugin") == "from-a-plugin"


def test_the_documentation_has_every_reason() -> None:
    text = (Path(__file__).parent.parent / "docs" / "report.md").read_text(encoding="utf-8")
    for code, sentence in REASONS.items():
        assert f"| `{code}` | {sentence} |" in text


def test_printable() -> None:
    assert printable("a\tb\u200bc\x9bé") == "a\\tb\\u200bc\\x9bé"
