"""Cost against change over the whole range: the plan beside plain ways to make a model smaller."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import helper

from onnx_decomp import Options, cli, frontier
from onnx_decomp.charts import draw
from onnx_decomp.errors import UsageError
from onnx_decomp.frontiers import METHODS, Frontier, Point, evenly
from onnx_decomp.metrics import compare_outputs
from onnx_decomp.passes import baselines
from onnx_decomp.probe import Probe
from onnx_decomp.rendering import render_frontier
from onnx_decomp.report import to_json
from onnx_decomp.runtime import open_session
from onnx_decomp.sites import Affine
from tests import small

Capture = pytest.CaptureFixture[str]

RATIOS = (0.6, 0.3, 0.15)
OPTIONS = Options(objective="flops", provider="cpu", threads=1, tolerance=0.1)
WIDTHS = (24, 64, 56, 40)


def network(seed: int = 0) -> onnx.ModelProto:
    """Gemms with a Relu between them."""
    rng = np.random.default_rng(seed)
    nodes, weights, name = [], {}, "x"
    for at, (k, n) in enumerate(pairwise(WIDTHS)):
        weights[f"W{at}"] = (rng.standard_normal((k, n)) / np.sqrt(k)).astype(np.float32)
        weights[f"b{at}"] = rng.standard_normal(n).astype(np.float32) * 0.1
        made = f"h{at}" if at < len(WIDTHS) - 2 else "y"
        nodes.append(helper.make_node("Gemm", [name, f"W{at}", f"b{at}"], [made], name=f"fc{at}"))
        if made != "y":
            nodes.append(helper.make_node("Relu", [made], [f"r{at}"], name=f"relu{at}"))
        name = f"r{at}"
    inputs, outputs = [small.value("x", ["N", WIDTHS[0]])], [small.value("y", ["N", WIDTHS[-1]])]
    return small.model(nodes, inputs, outputs, weights)


def samples() -> np.ndarray:
    """Inputs that lie near a plane, so that much of the model is not needed."""
    rng = np.random.default_rng(1)
    plane = rng.standard_normal((1500, 6)) @ rng.standard_normal((6, WIDTHS[0]))
    return (plane + 0.1 * rng.standard_normal(plane.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("frontier")
    small.write(network(), path / "m.onnx")
    np.savez(path / "calib.npz", x=samples())
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> Frontier:
    return frontier(folder / "m.onnx", calib=folder / "calib.npz", options=OPTIONS, ratios=RATIOS)


def report_change(found: Frontier, model: onnx.ModelProto) -> float:
    """Change of a model on the report part, as it runs."""
    walked = found._walked
    original, made = open_session(walked.program.original), open_session(model)
    batches = walked.program.data.batches("report", 512)
    return compare_outputs(((original.run(f), made.run(f)) for f in batches), "rel-l2").largest


def test_points_go_down_from_the_dense_model(found: Frontier) -> None:
    for method in METHODS:
        points = found.of(method)
        assert (points[0].flops, points[0].cost, points[0].change, points[0].select) == (1, 1, 0, 0)
        flops = [point.flops for point in points]
        assert flops == sorted(flops, reverse=True)
        assert all(point.cost == pytest.approx(point.flops) for point in points)
        for point in points[1:]:
            assert point.flops <= point.asked * (1 + 1e-9)
            assert point.flops > 0.7 * point.asked
            assert point.change > 0
    assert [point.asked for point in found.of("plan")] == [1.0, *RATIOS]


def test_the_plan_is_no_worse_than_any_plain_method(found: Frontier) -> None:
    for plan in found.of("plan")[1:]:
        others = [p for p in found.points if p.method != "plan" and p.asked == plan.asked]
        assert others
        assert all(plan.change <= 1.02 * other.change for other in others)


def test_what_was_expected_is_about_what_came(found: Frontier) -> None:
    for point in found.of("plan")[1:]:
        assert point.predicted == pytest.approx(point.spent * OPTIONS.tolerance, rel=0.5)


def test_the_tolerance_picks_the_smallest_that_fits(found: Frontier) -> None:
    assert found.picked is not None
    assert found.picked.spent <= 0.95
    smaller = [point for point in found.of("plan") if point.cost < found.picked.cost]
    assert all(point.spent > 0.95 for point in smaller)


def test_a_written_point_runs_and_does_what_was_measured(found: Frontier) -> None:
    for point in found.of("plan"):
        model = found.write(point)
        onnx.checker.check_model(model)
        assert report_change(found, model) == pytest.approx(point.change, rel=1e-3, abs=1e-6)
    stamped = {entry.key for entry in model.metadata_props}
    assert "onnx_decomp.version" in stamped
    assert found.write(found.points[0]) is found._walked.program.original


def test_only_points_of_the_plan_are_written(found: Frontier) -> None:
    with pytest.raises(UsageError, match="only points of the plan"):
        found.write(found.of("svd")[1])
    with pytest.raises(UsageError, match="not of this frontier"):
        found.write(replace(found.of("plan")[1], change=7.0))


def test_asking_for_a_copy(folder: Path) -> None:
    one = frontier(folder / "m.onnx", calib=folder / "calib.npz", options=OPTIONS, ratios=(1.0,))
    assert [point.cost for point in one.points] == [1.0] * len(METHODS)


def test_no_method_but_plain_ones(folder: Path) -> None:
    one = frontier(
        folder / "m.onnx", calib=folder / "calib.npz", options=OPTIONS, ratios=(0.5,), methods=("svd",)
    )
    assert [point.method for point in one.points] == ["svd", "svd"]
    assert one.picked is None
    json.loads(to_json(one.report()))
    ElementTree.fromstring(draw(one.report()))


# --- plain methods ------------------------------------------------------------------------------------------------


def outputs(found: Frontier, affine: dict[str, tuple[np.ndarray, np.ndarray]]) -> float:
    """Change on the report part where numpy has made the weights."""
    program = found._walked.program
    placed = {site.index: Affine(*affine[site.node]) for site in program.sites}
    probe = Probe(program.index, program.sites, None)
    batches = program.data.batches("report", 512)
    return compare_outputs(((probe.run(f, {}), probe.run(f, placed)) for f in batches), "rel-l2").largest


def test_svd_is_numpys_truncation(found: Frontier) -> None:
    point = found.of("svd")[2]
    model, affine, flops = network(), {}, 0
    plain = baselines.Baselines(found._walked.search, found._walked.cost)
    (part,) = plain.parts("svd", point.asked)
    for at in range(3):
        weight, bias = small.weight(model, f"W{at}"), small.weight(model, f"b{at}")
        k, n = weight.shape
        rank = part.ranks[at][0] if at in part.ranks else None
        if rank is not None and rank * (k + n) < k * n:
            u, s, vt = np.linalg.svd(weight, full_matrices=False)
            weight = (u[:, :rank] * s[:rank]) @ vt[:rank]
            flops += rank * (k + n)
        else:
            flops += k * n
        affine[f"fc{at}"] = (weight.astype(np.float32), bias)
    dense = sum(k * n for k, n in pairwise(WIDTHS))
    assert point.flops == pytest.approx(flops / dense)
    assert 0 in part.ranks or WIDTHS[0] < baselines.SMALL
    assert outputs(found, affine) == pytest.approx(point.change, rel=1e-3)


def test_units_go_with_their_mean(found: Frontier) -> None:
    walked, model = found._walked, network()
    program = walked.program
    for method in ("magnitude", "wanda"):
        point = next(p for p in found.of(method) if p.asked == RATIOS[1])
        (part,) = baselines.Baselines(walked.search, walked.cost).parts(method, point.asked)
        x = program.data.parts["fit"]["x"].astype(np.float64)
        affine, hidden = {}, []
        for at in range(3):
            weight, bias = small.weight(model, f"W{at}"), small.weight(model, f"b{at}")
            hidden.append(x)
            x = np.maximum(x @ weight + bias, 0)
            affine[f"fc{at}"] = (weight.copy(), bias.copy())
        for at in (1, 2):
            weight, before = small.weight(model, f"W{at}"), small.weight(model, f"W{at - 1}")
            score = np.linalg.norm(weight, axis=1)
            score = score * (hidden[at].std(0) if method == "wanda" else np.linalg.norm(before, axis=0))
            mask = next(keep for keep in part.keep.values() if len(keep) == len(score))
            gone = np.argsort(-score)[mask.sum() :]
            assert not mask[gone].any()
            affine[f"fc{at}"][0][gone] = 0
            affine[f"fc{at}"][1][:] += (hidden[at].mean(0)[gone] @ weight[gone]).astype(np.float32)
        assert outputs(found, affine) == pytest.approx(point.change, rel=0.02)


def test_whitened_svd_beats_svd(found: Frontier) -> None:
    for plain, whitened in zip(found.of("svd")[1:], found.of("whitened-svd")[1:], strict=True):
        assert whitened.flops == plain.flops
        assert whitened.change < plain.change


def test_a_narrow_layer_keeps_its_rank() -> None:
    def ranks(widths: tuple[int, int], names: tuple[str, ...], share: float = 0.5) -> dict[int, Any]:
        sites = tuple(SimpleNamespace(shape=widths, matrix=(name,)) for name in names)
        return baselines.uniform_ranks(SimpleNamespace(sites=sites), share, 1)  # type: ignore[arg-type]

    assert ranks((64, 64), ("W",)) == {0: (16,)}
    assert ranks((64, 10), ("W",)) == {}
    assert ranks((64, 64), ("W", "W")) == {}
    assert ranks((64, 64), ("W",), 1.0) == {}
    assert ranks((64, 64), ("W",), 0.0) == {0: (1,)}


# --- showing ------------------------------------------------------------------------------------------------------


def hostile(found: Frontier) -> dict[str, Any]:
    report = found.report()
    name = "<script>alert('&')</script>\x1b[2J\x00\ufffe\u202e"
    report["input"]["path"] = f"folder/{name}.onnx"
    report["options"]["limits"] = [[name, "kl", 0.1]]
    report["notes"] = [name]
    return report


def test_json_is_strict(found: Frontier) -> None:
    broken = replace(found, points=(*found.points, Point("svd", 0.1, 0.1, math.inf, math.nan, math.inf)))
    text = to_json(broken.report())
    read = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert read["schema"] == "onnx-decomp-frontier/1"
    assert read["points"][-1]["change"] is None
    assert read["points"][read["picked"]]["method"] == "plan"
    draw(read)


def test_the_picture_is_xml_whatever_names_there_are(found: Frontier) -> None:
    for report in (found.report(), hostile(found)):
        root = ElementTree.fromstring(draw(report))
        assert root.tag.endswith("svg")
        lines = [each for each in root.iter() if each.tag.endswith("polyline")]
        assert len(lines) == len(METHODS)
        assert not any("script" in each.tag for each in root.iter())
        assert "\u202e" not in "".join(root.itertext())
    text = "".join(ElementTree.fromstring(draw(found.report())).itertext())
    assert "tolerance 0.1" in text
    assert "picked" in text


def test_the_table_has_a_row_for_each_ratio(found: Frontier, capsys: Capture) -> None:
    from rich.console import Console

    Console(width=80).print(render_frontier(found.report()))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["asked", "FLOPs", "cost", "change", "expected"]
    assert [line.split()[0] for line in lines[1:5]] == ["1", "0.6", "0.3", "0.15"]
    assert "\u2026" not in "".join(lines)
    Console(width=80).print(render_frontier(hostile(found)))
    assert "\x1b[2J" not in capsys.readouterr().out


# --- the command --------------------------------------------------------------------------------------------------


def test_ratios_are_even_in_their_logarithm() -> None:
    assert evenly(1) == (0.05,)
    assert evenly(2) == (0.224, 0.05)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--write", "half=o.onnx"], "not a number"),
        (["--write", "0.5"], "names no file"),
        (["--write", "0.5="], "names no file"),
        (["--write", "0=o.onnx"], "impossible ratio"),
        (["--write", "nan=o.onnx"], "impossible ratio"),
        (["--write", "1.5=o.onnx"], "impossible ratio"),
        (["--write", "0.5=m.onnx"], "given as IN"),
        (["--write", "0.5=no/such/o.onnx"], "does not exist"),
        (["--write", "0.5=o.onnx", "--write", "0.2=o.onnx"], "given as --write"),
        (["--write", "0.5=o.onnx", "--write", "0.5=o.onnx"], "twice"),
        (["--picture", "no/such/p.svg"], "does not exist"),
        (["--json", "m.onnx"], "given as IN"),
        (["--json", "a", "--picture", "a"], "given as --json"),
        (["--points", "0"], "--points"),
        (["--tolerance", "0"], "impossible tolerance"),
        (["--min-speedup", "2"], "--min-speedup"),
    ],
)
def test_usage_errors_come_before_any_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(path.name for path in folder.iterdir())
    assert cli.main(["frontier", "m.onnx", "--calib", "calib.npz", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert says in line
    assert sorted(path.name for path in folder.iterdir()) == before


def test_it_needs_data(folder: Path, capsys: Capture) -> None:
    assert cli.main(["frontier", str(folder / "m.onnx")]) == 2
    assert "--calib" in capsys.readouterr().err
    with pytest.raises(UsageError, match="calib"):
        frontier(folder / "m.onnx")
    with pytest.raises(UsageError, match="impossible ratio"):
        frontier(folder / "m.onnx", calib=folder / "calib.npz", ratios=(0.0,))
    with pytest.raises(UsageError, match="no method 'obs'"):
        frontier(folder / "m.onnx", calib=folder / "calib.npz", methods=("obs",))  # type: ignore[arg-type]


def test_one_configuration_file_serves_every_command(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """What only `compile` has is left aside; what no command has is still refused."""
    config = tmp_path / "decomp.toml"
    config.write_text('min-speedup = 1.1\nreport = "r.json"\nlatency-gate = false\npoints = 0\n')
    line = ["frontier", str(folder / "m.onnx"), "--config", str(config)]
    assert cli.main(line) == 2
    assert "--points" in capsys.readouterr().err
    config.write_text("min-speedup = 1.1\npoinst = 3\n")
    assert cli.main(line) == 2
    assert "unknown key 'poinst'" in capsys.readouterr().err


def test_bad_files(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    data = str(folder / "calib.npz")
    assert cli.main(["frontier", str(tmp_path / "none.onnx"), "--calib", data]) == 3
    assert cli.main(["frontier", str(folder / "m.onnx"), "--calib", str(tmp_path / "none.npz")]) == 3
    assert cli.main(["frontier", str(folder / "m.onnx"), "--calib", data, "--tolerance", "z=0.1"]) == 2
    assert "no output 'z'" in capsys.readouterr().err.splitlines()[-1]


def test_where_nothing_can_be_done(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["--calib", str(folder / "calib.npz"), "--json", "-", "--write", f"0.5={tmp_path / 'o.onnx'}"]
    assert cli.main(["frontier", str(folder / "m.onnx"), *arguments, "--exclude", "fc"]) == 0
    captured = capsys.readouterr()
    read = json.loads(captured.out)
    assert {point["cost"] for point in read["points"]} == {1.0}
    assert "left out by --include or --exclude" in captured.err
    assert "nothing can be made smaller" in captured.err.splitlines()[-1]
    assert (tmp_path / "o.onnx").read_bytes() == (folder / "m.onnx").read_bytes()


def test_end_to_end(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out, picture, score = tmp_path / "o.onnx", tmp_path / "p.svg", tmp_path / "score.py"
    score.write_text("def score(run, part):\n    return float(-len(part))\n")
    arguments = ["--calib", str(folder / "calib.npz"), "--objective", "flops", "--provider", "cpu"]
    arguments += ["--points", "1", "--write", f"0.4={out}", "--json", "-", "--picture", str(picture)]
    arguments += ["--latency", "--threads", "1", "--evaluate", f"{score}:score", "--tolerance", "0.1"]
    assert cli.main(["frontier", str(folder / "m.onnx"), *arguments]) == 0
    captured = capsys.readouterr()
    read = json.loads(captured.out)
    assert read["ratios"] == [0.4, 0.05]
    assert read["score"] == -6.0
    plan = [point for point in read["points"] if point["method"] == "plan"]
    assert all(point["score"] == -6.0 and point["speedup"] for point in plan[1:])
    assert any(line.startswith(f"onnx-decomp: wrote {out}: cost 0.") for line in captured.err.splitlines())
    assert "would pick" in captured.err.splitlines()[-1]
    ElementTree.parse(picture)
    written = open_session(onnx.load(out))
    assert written.run({"x": samples()[:3]})["y"].shape == (3, WIDTHS[-1])
    assert {path.name for path in tmp_path.iterdir()} == {"o.onnx", "p.svg", "score.py"}


@pytest.mark.slow
def test_on_trained_digits_the_plan_is_far_ahead() -> None:
    import models

    digits = models.load("digits")
    found = frontier(digits.model, init=digits.init, calib=digits.calib, options=OPTIONS, ratios=(0.5, 0.1))
    for plan in found.of("plan")[1:]:
        for other in (p for p in found.points if p.method != "plan" and p.asked == plan.asked):
            assert plan.change < 0.3 * other.change
