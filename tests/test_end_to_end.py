"""The whole command on models with a known answer: what it finds, what it does about it, what it says and writes.

Most tests leave the latency gate off and plan for FLOPs: which blocks are found and kept then depends on nothing but
the input. `compile_planted` is the way in; every run of it also checks what has to hold whatever was decided.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, compose, helper, numpy_helper

from models.planted import Planted, PlantedModel, build, calibration, shuffled
from onnx_decomp import compiler, gates
from onnx_decomp.cli import main
from onnx_decomp.latency import Latency
from onnx_decomp.profiling import Operator, losses
from onnx_decomp.rendering import summary
from onnx_decomp.runtime import cuda_problem, open_session
from tests.small import model as small_model
from tests.small import value

Arrays = dict[str, NDArray[Any]]
Capture = pytest.CaptureFixture[str]

FREE = ("--provider", "cpu", "--no-latency-gate", "--objective", "flops", "--quiet")
"""Options under which the result follows from the input alone."""

CLEAR = Planted((64, 128, 64), off="zero", gain=3)
"""Four blocks, and nothing at all between them: removal changes nothing but rounding."""

PRESET = ("--init-preset", "torch-linear")
SPEC = {"onnx_decomp_init": 1, "patterns": [{"match": "*", "family": "uniform", "bound": "1/sqrt(fan_in)"}]}


@dataclass(frozen=True)
class Job:
    """A model and its data on disk. `run` is the command; anything it writes lies in `folder`."""

    folder: Path
    model: onnx.ModelProto
    feeds: Arrays

    @property
    def source(self) -> Path:
        return self.folder / "in.onnx"

    @property
    def out(self) -> Path:
        return self.folder / "out.onnx"

    def run(
        self, *options: str, init: bool = True, calib: bool = True, out: Path | None = None
    ) -> tuple[int, dict[str, Any]]:
        """The exit code and the report."""
        report = self.folder / "report.json"
        arguments = [str(self.source), str(out or self.out), "--report", str(report)]
        arguments += ["--init", str(self.folder / "init.npz")] if init else []
        arguments += ["--calib", str(self.folder / "calib.npz")] if calib else []
        code = main([*arguments, *(_here.get(option, option) for option in options)])
        return code, json.loads(report.read_text())


_here: dict[str, str] = {}
"""Options that are replaced: the provider, where a test runs on CUDA too."""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)], autouse=True)
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test here runs on both providers, unless it is ABOUT_CPU."""
    if request.param == "cuda":
        if problem := cuda_problem():
            pytest.skip(problem)
        monkeypatch.setitem(_here, "cpu", "cuda")
    return str(request.param)


ABOUT_CPU = pytest.mark.parametrize("provider", ["cpu"], indirect=True)
"""What is asserted holds for its forms, its order of regions, or times that are made up."""


def job(folder: Path, model: onnx.ModelProto, initial: Arrays, feeds: Arrays) -> Job:
    folder.mkdir(exist_ok=True)
    made = Job(folder, model, feeds)
    onnx.save(model, made.source)
    np.savez(folder / "init.npz", **initial)
    np.savez(folder / "calib.npz", **feeds)
    return made


def planted_job(folder: Path, planted: PlantedModel, samples: int = 600) -> Job:
    return job(folder, planted.model, planted.snapshot, calibration(planted, samples, seed=1))


def compile_planted(
    folder: Path, planted: PlantedModel, *options: str, init: bool = True, calib: bool = True
) -> dict[str, Any]:
    """Compile with the latency gate off, check what always holds, and give the report."""
    made = planted_job(folder, planted)
    code, report = made.run(*FREE, *options, init=init, calib=calib)
    assert code == 0
    check_outcome(made, report)
    return report


def check_outcome(made: Job, report: dict[str, Any]) -> None:
    """Either a valid model whose outputs are within the tolerance on fresh inputs, or the input byte for byte."""
    assert report["output"]["path"] == str(made.out)
    if not report["kept"]:
        assert made.out.read_bytes() == made.source.read_bytes()
        assert report["verdict"] == "nothing kept: OUT is IN byte for byte"
        assert all(site["decision"] == "dense" and site["reason"] != "applied" for site in report["sites"])
        return
    onnx.checker.check_model(str(made.out), full_check=True)
    before, after = onnx.load(made.source), onnx.load(made.out)
    assert list(before.graph.input) == list(after.graph.input)
    assert list(before.graph.output) == list(after.graph.output)
    fresh = {
        name: np.random.default_rng(9).standard_normal((64, *array.shape[1:])).astype(array.dtype)
        for name, array in made.feeds.items()
    }
    # Fresh inputs are not the report's: half of the tolerance on top is what sampling may add.
    assert change(before, after, fresh) <= 1.5 * report["options"]["tolerance"]
    assert report["output"]["matmul_flops"] < report["input"]["matmul_flops"]


def change(before: onnx.ModelProto, after: onnx.ModelProto, feeds: Arrays) -> float:
    """Largest ‖Δ‖/‖y‖ of any output."""
    expected, found = open_session(before).run(feeds), open_session(after).run(feeds)
    ratios = []
    for name, wide in expected.items():
        reference = wide.astype(np.float64)
        ratios.append(np.linalg.norm(found[name] - reference) / np.linalg.norm(reference))
    return float(max(ratios))


Blocks = set[tuple[frozenset[int], frozenset[int]]]


def found_blocks(site: dict[str, Any]) -> Blocks | None:
    """Blocks of a site in the report, whatever their numbers."""
    if site["structure"] is None:
        return None
    return {(frozenset(b["rows"]), frozenset(b["cols"])) for b in site["structure"]["blocks"]}


def true_blocks(rows: NDArray[np.int32], columns: NDArray[np.int32]) -> Blocks:
    return {
        (frozenset(np.flatnonzero(rows == b).tolist()), frozenset(np.flatnonzero(columns == b).tolist()))
        for b in np.unique(rows)
    }


def planted_blocks(planted: PlantedModel) -> list[Blocks]:
    return [true_blocks(*planted.labels[layer : layer + 2]) for layer in range(len(planted.weights))]


def each(report: dict[str, Any], key: str) -> list[Any]:
    return [site[key] for site in report["sites"]]


def chain(first: PlantedModel, second: PlantedModel, operator: str) -> tuple[onnx.ModelProto, Arrays]:
    """`first`, an operator, `second` (their names prefixed with a. and b.), and both snapshots."""
    head, tail = (compose.add_prefix(p.model, prefix) for p, prefix in ((first, "a."), (second, "b.")))
    head.graph.node.append(helper.make_node(operator, ["a.y"], ["a.z"], name=f"between/{operator}"))
    head.graph.output[0].name = "a.z"
    joined = compose.merge_models(head, tail, io_map=[("a.z", "b.x")])
    initial = {f"{p}.{n}": w for p, m in (("a", first), ("b", second)) for n, w in m.snapshot.items()}
    return joined, initial


# What is found and kept


SPECS = {
    "plain": CLEAR,
    "single layer": Planted((96, 64), off="zero", gain=3),
    "uneven blocks": replace(CLEAR, uneven=True, blocks=3, seed=3),
    "float16": replace(CLEAR, dtype="float16"),
    "rank 3": replace(CLEAR, rank=3),
    "sorted borders": replace(CLEAR, hide="hidden"),
    "three layers": Planted((48, 96, 96, 48), off="zero", gain=3, activation="ErfGelu"),
    "transposed Gemm": replace(CLEAR, form="Gemm", bias=False),
    "weights in Constant nodes": replace(CLEAR, form="Constant", activation="Tanh"),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_planted_blocks_are_found_and_written(spec: Planted, tmp_path: Path, capsys: Capture) -> None:
    planted = build(spec)
    report = compile_planted(tmp_path, planted)
    assert [found_blocks(site) for site in report["sites"]] == planted_blocks(planted)
    assert set(each(report, "decision")) == {"split"}
    assert set(each(report, "reason")) == {"applied"}
    assert set(each(report, "form")) <= {"chain", "batched", "parallel"}
    assert report["kept"] == ["region_000"]
    assert report["verify"]["passed"]
    assert max(each(report, "flop_ratio")) < 0.45
    written = onnx.load(tmp_path / "out.onnx")
    assert any("/decomp/" in node.name for node in written.graph.node)
    assert not {t.name for t in written.graph.initializer} & set(planted.names), "old weights are gone"
    said = capsys.readouterr()
    assert said.out == "", "libraries keep quiet"
    assert said.err.splitlines()[-1] == f"onnx-decomp: {report['verdict']}"
    assert {line.split(": ")[0] for line in said.err.splitlines()} == {"onnx-decomp"}


@pytest.mark.parametrize("null", ["preset", "spec"])
def test_blocks_are_found_from_a_distribution_alone(null: str, tmp_path: Path) -> None:
    """No snapshot: the law of the initial weights is enough where training was loud."""
    planted = build(replace(CLEAR, widths=(128, 256, 128), off="untouched", gain=4))
    (tmp_path / "spec.json").write_text(json.dumps(SPEC))
    given = PRESET if null == "preset" else ("--init", str(tmp_path / "spec.json"))
    report = compile_planted(tmp_path, planted, *given, "--tolerance", "0.7", init=False)
    assert [found_blocks(site) for site in report["sites"]] == planted_blocks(planted)
    assert [site["null"]["kind"] for site in report["sites"]] == ["distribution"] * 2
    assert set(each(report, "decision")) == {"split"}


WIDE = Planted((256, 256), off="zero", gain=3, hide="hidden")


@ABOUT_CPU
@pytest.mark.parametrize(
    ("spec", "form"),
    [
        (replace(WIDE, widths=(256, 256, 256)), "chain"),
        (replace(WIDE, uneven=True), "parallel"),
        (replace(WIDE, blocks=16), "batched"),
    ],
    ids=["chain", "parallel", "batched"],
)
def test_the_cost_model_chooses_the_form(spec: Planted, form: str, tmp_path: Path) -> None:
    """On the CPU: a chain over layers, parallel branches for uneven blocks, one batched MatMul for many even ones."""
    made = planted_job(tmp_path, build(spec), 700)
    code, report = made.run("--provider", "cpu", "--no-latency-gate", "-q")
    assert code == 0
    check_outcome(made, report)
    assert set(each(report, "form")) == {form}


def test_a_structured_run_before_an_unstructured_layer(tmp_path: Path) -> None:
    """One region of three layers: two are split, the third stays as it is, and the axis between them is free."""
    structured, dense = build(CLEAR), build(Planted((64, 48), structured=False, gain=3, seed=5))
    joined, initial = chain(structured, dense, "Relu")
    made = job(tmp_path, joined, initial, {"a.x": calibration(structured, 600)["x"]})
    code, report = made.run(*FREE)
    assert code == 0
    check_outcome(made, report)
    assert each(report, "region") == ["region_000"] * 3
    assert each(report, "decision") == ["split", "split", "dense"]
    assert [found_blocks(site) for site in report["sites"]] == [*planted_blocks(structured), None]
    assert each(report, "flop_ratio")[2] == 1


@dataclass(frozen=True)
class TwoRegions:
    """Two decomposable runs with a Softmax between them, which moves no block across."""

    job: Job
    blocks: list[Blocks]


@pytest.fixture
def two_regions(tmp_path: Path) -> TwoRegions:
    first, second = build(CLEAR), build(replace(CLEAR, blocks=2, seed=7))
    joined, initial = chain(first, second, "Softmax")
    made = job(tmp_path, joined, initial, {"a.x": calibration(first, 600)["x"]})
    return TwoRegions(made, planted_blocks(first) + planted_blocks(second))


def test_every_region_is_solved_on_its_own(two_regions: TwoRegions) -> None:
    code, report = two_regions.job.run(*FREE)
    assert code == 0
    check_outcome(two_regions.job, report)
    assert report["kept"] == ["region_000", "region_001"]
    assert [found_blocks(site) for site in report["sites"]] == two_regions.blocks


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--include", r"^a\."], ["region_000"]),
        (["--include", r"b\.layers\.0\.weight"], ["region_001"]),
        (["--exclude", r"^a\."], ["region_001"]),
        (["--include", "layers", "--exclude", "layers"], []),
    ],
)
def test_include_and_exclude(two_regions: TwoRegions, options: list[str], kept: list[str]) -> None:
    code, report = two_regions.job.run(*FREE, *options)
    assert code == 0
    check_outcome(two_regions.job, report)
    assert report["kept"] == kept
    assert [found_blocks(site) for site in report["sites"]] == two_regions.blocks, "found whatever was asked"
    assert {s["reason"] for s in report["sites"] if s["region"] not in kept} == {"excluded"}


# What is declined, and why


@pytest.mark.parametrize("control", ["shuffled", "unstructured"])
@pytest.mark.parametrize("null", ["snapshot", "distribution"])
def test_controls_without_structure_are_declined(control: str, null: str, tmp_path: Path) -> None:
    if control == "shuffled":
        planted = shuffled(build(replace(CLEAR, off="shrunk")), np.random.default_rng(1))
    else:
        planted = build(Planted((64, 128, 64), structured=False, gain=3))
    options = () if null == "snapshot" else PRESET
    report = compile_planted(tmp_path, planted, *options, init=null == "snapshot")
    assert each(report, "structure") == [None, None]
    assert each(report, "reason") == ["not-better-than-shuffled"] * 2
    assert all(null["fits"] for null in each(report, "null"))


@pytest.mark.parametrize("known", [True, False], ids=["given", "estimated"])
def test_an_estimated_null_removes_nothing(known: bool, tmp_path: Path) -> None:
    """Blocks that show without any statistics are reported, but not acted on: nobody said what the rest was.

    The data have eight dimensions, so each block can make up for all the others: only the null stands in the way.
    """
    planted = build(Planted((128, 128), off="untouched", gain=8, hide="hidden"))
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((1600, 8)) @ rng.standard_normal((8, 128))).astype(np.float32)
    made = job(tmp_path, planted.model, planted.snapshot, {"x": x})
    code, report = made.run(*FREE, "--tolerance", "0.01", *(PRESET if known else ()), init=False)
    assert code == 0
    (site,) = report["sites"]
    assert found_blocks(site) == planted_blocks(planted)[0]
    assert site["null"]["kind"] == ("distribution" if known else "estimated")
    # Fewer units or a lower rank need no null.
    assert (site["decision"] == "split") == known
    assert site["structure"]["unused"] == (None if known else "estimated-null")


def test_too_strict_a_tolerance_leaves_the_structure_in_the_report(tmp_path: Path) -> None:
    planted = build(replace(CLEAR, off="shrunk", decay=0.3))
    report = compile_planted(tmp_path, planted, "--tolerance", "1e-4")
    assert [found_blocks(site) for site in report["sites"]] == planted_blocks(planted)
    for site in report["sites"]:
        assert site["decision"] in ("dense", "reduced")
        declined = [d for d in site["decisions"] if d["reason"] == "tolerance"]
        assert declined, site["decisions"]
        assert declined[0]["verdict"] == "declined"
        assert declined[0]["numbers"]["change"] > 1e-4


def test_without_data_what_has_vanished_goes(tmp_path: Path) -> None:
    planted = build(replace(CLEAR, off="shrunk", decay=1e-5))
    report = compile_planted(tmp_path, planted, calib=False)
    assert set(each(report, "decision")) == {"split"}
    assert report["data"]["kind"] == "synthetic"
    assert any("not verified on real data" in warning for warning in report["warnings"])
    assert report["verdict"].endswith("not verified on real data")


def test_without_data_what_is_only_small_stays(tmp_path: Path) -> None:
    planted = build(replace(CLEAR, off="shrunk", decay=0.1))
    report = compile_planted(tmp_path, planted, "--tolerance", "0.01", calib=False)
    assert [found_blocks(site) for site in report["sites"]] == planted_blocks(planted)
    assert each(report, "reason") == ["no-calibration"] * 2


# The report


SCHEMA = {
    "": "schema verdict warnings input output options versions seed seconds kept history init data sites verify "
    "rewrite latency",
    "input": "path sha256 bytes parameters matmul_flops",
    "output": "path sha256 bytes parameters matmul_flops",
    "init": "matched unmatched ambiguous",
    "data": "kind fit select report",
    "sites": "node op weight shape dtype graph region null supported learned_rank influence structure decision reason "
    "form rank flop_ratio error",
    "null": "kind fits",
    "structure": "blocks p stability",
    "error": "predicted measured",
    "verify": "passed metric tolerance outputs",
    "outputs": "rel_l2 worst_sample max_abs cosine",
    "rewrite": "max_rel_l2",
    "latency": "provider threads before_ms after_ms speedup interval",
}
"""Fields that docs/report.md promises, by where they are."""


def test_the_report_has_every_promised_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "compare_latency", timed(2.0))
    made = planted_job(tmp_path, build(CLEAR))
    code, report = made.run("--provider", "cpu", "--objective", "flops", "-q")
    assert code == 0
    site = report["sites"][0]
    places = {"": report, "sites": site, "null": site["null"], "structure": site["structure"]}
    places |= {"error": site["error"], "outputs": report["verify"]["outputs"]["y"]}
    places |= {name: report[name] for name in SCHEMA if name not in places}
    for name, promised in SCHEMA.items():
        assert not set(promised.split()) - set(places[name]), name
    assert report["schema"] == "onnx-decomp/1"
    assert report["data"] | {"kind": "calibration"} == report["data"]
    assert report["data"]["fit"] + report["data"]["select"] + report["data"]["report"] == 600
    for part, path in (("input", made.source), ("output", made.out)):
        assert report[part]["sha256"] == compiler.model_io.digest(path)
        assert report[part]["bytes"] == path.stat().st_size
    assert report["input"]["matmul_flops"] == 2 * (64 * 128 + 128 * 64)
    assert report["output"]["matmul_flops"] * 4 == report["input"]["matmul_flops"]
    assert report["latency"]["speedup"] == 2.0


def test_the_model_says_what_was_done_to_it(tmp_path: Path) -> None:
    report = compile_planted(tmp_path, build(CLEAR))
    said = {entry.key: entry.value for entry in onnx.load(tmp_path / "out.onnx").metadata_props}
    assert set(said) == {f"onnx_decomp.{key}" for key in ("version", "options", "input_sha256", "verdict")}
    assert said["onnx_decomp.input_sha256"] == report["input"]["sha256"]


# The same again


@ABOUT_CPU
def test_the_same_run_gives_the_same_bytes(two_regions: TwoRegions, tmp_path: Path) -> None:
    """Here, and in another process whose sets and dicts of strings are hashed in another way."""
    made, elsewhere = two_regions.job, tmp_path / "second.onnx"
    code, report = made.run(*FREE, "--seed", "3", out=tmp_path / "first.onnx")
    assert code == 0
    assert report["kept"]
    command = [
        sys.executable,
        "-m",
        "onnx_decomp.cli",
        str(made.source),
        str(elsewhere),
        *FREE,
        "--seed",
        "3",
        "--jobs",
        "2",
    ]
    command += ["--init", str(made.folder / "init.npz"), "--calib", str(made.folder / "calib.npz")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "12345"})
    assert (tmp_path / "first.onnx").read_bytes() == elsewhere.read_bytes()


@ABOUT_CPU
def test_replay_repeats_what_measurement_decided(
    two_regions: TwoRegions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate undoes one region of two; the replay keeps the other one without asking the clock."""
    made = two_regions.job
    monkeypatch.setattr(gates, "compare_latency", timed(0.9, 1.5))
    code, report = made.run("--provider", "cpu", "--objective", "flops", "-q")
    assert code == 0
    assert len(report["kept"]) == len(report["history"]) == 1
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps(report))
    monkeypatch.setattr(gates, "compare_latency", timed(0.5))
    code, again = made.run(
        "--provider", "cpu", "--objective", "flops", "-q", "--replay", str(kept), out=tmp_path / "again.onnx"
    )
    assert code == 0
    assert again["kept"] == report["kept"]
    assert again["history"] == []
    assert {s["reason"] for s in again["sites"] if s["region"] not in again["kept"]} == {"replay"}
    assert (tmp_path / "again.onnx").read_bytes() == made.out.read_bytes()


@ABOUT_CPU
def test_a_compiled_model_is_copied_unless_forced(tmp_path: Path) -> None:
    spec = replace(CLEAR, widths=(256, 256, 256))  # a chain, whose products are sites again
    made = planted_job(tmp_path, build(spec))
    assert made.run(*FREE)[0] == 0
    made.source.write_bytes(made.out.read_bytes())
    code, report = made.run(*FREE, init=False)
    assert code == 0
    check_outcome(made, report)
    assert set(each(report, "reason")) == {"already-compiled"}
    code, report = made.run(*FREE, "--force", init=False)
    assert code == 0
    check_outcome(made, report)
    assert "already-compiled" not in each(report, "reason")


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    made = planted_job(tmp_path, build(CLEAR))
    code, report = made.run(*FREE, "--dry-run")
    assert code == 0
    assert report["kept"] == ["region_000"]
    assert report["output"]["path"] is None
    assert {path.name for path in tmp_path.iterdir()} == {"in.onnx", "init.npz", "calib.npz", "report.json"}
    assert made.run(*FREE)[1]["output"]["sha256"] == report["output"]["sha256"]


def test_require_change_fails_with_the_report_and_without_the_output(tmp_path: Path) -> None:
    made = planted_job(tmp_path, build(Planted((64, 64), structured=False)))
    code, report = made.run(*FREE, "--require-change")
    assert code == 4
    assert each(report, "reason") == ["not-better-than-shuffled"]
    assert not made.out.exists()
    assert planted_job(tmp_path, build(CLEAR)).run(*FREE, "--require-change")[0] == 0


# The same model told differently


def permuted(planted: PlantedModel, rng: np.random.Generator) -> tuple[onnx.ModelProto, Arrays, list[Blocks]]:
    """The hidden units in another order."""
    order = rng.permutation(planted.spec.widths[1])
    model, initial = onnx.ModelProto.FromString(planted.model.SerializeToString()), dict(planted.snapshot)
    into, out_of = planted.names
    for name, axis in ((into, 1), ("layers.0.bias", 0), (out_of, 0)):
        _edit(model, name, lambda array, axis=axis: array.take(order, axis))
    initial[into], initial[out_of] = initial[into][:, order], initial[out_of][order]
    hidden = planted.labels[1][order]
    labels = [planted.labels[0], hidden, planted.labels[2]]
    return model, initial, [true_blocks(*labels[i : i + 2]) for i in (0, 1)]


def rescaled(planted: PlantedModel, _: np.random.Generator) -> tuple[onnx.ModelProto, Arrays, list[Blocks]]:
    """ReLU passes a factor on: the first layer times four, the second one by four."""
    model, initial = onnx.ModelProto.FromString(planted.model.SerializeToString()), dict(planted.snapshot)
    into, out_of = planted.names
    for name, factor in ((into, 4.0), ("layers.0.bias", 4.0), (out_of, 0.25)):
        _edit(model, name, lambda array, factor=factor: array * np.float32(factor))
    initial[into], initial[out_of] = initial[into] * 4, initial[out_of] / 4
    return model, initial, planted_blocks(planted)


def renamed(planted: PlantedModel, rng: np.random.Generator) -> tuple[onnx.ModelProto, Arrays, list[Blocks]]:
    """Every name but those of inputs and outputs made up anew."""
    model = onnx.ModelProto.FromString(planted.model.SerializeToString())
    names: dict[str, str] = {"x": "x", "y": "y"}
    for node in model.graph.node:
        node.name = f"{rng.integers(1 << 40):x}"
        for field in (node.input, node.output):
            for position, name in enumerate(field):
                field[position] = names.setdefault(name, f"t{rng.integers(1 << 40):x}")
    for tensor in model.graph.initializer:
        tensor.name = names[tensor.name]
    initial = {names[name]: array for name, array in planted.snapshot.items()}
    return model, initial, planted_blocks(planted)


def _edit(model: onnx.ModelProto, name: str, how: Any) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(how(numpy_helper.to_array(tensor))), name))


@pytest.mark.parametrize("told", [permuted, rescaled, renamed])
@pytest.mark.parametrize("off", ["zero", "shrunk"])
def test_the_same_model_told_differently_has_the_same_blocks(told: Any, off: Any, tmp_path: Path) -> None:
    planted = build(replace(CLEAR, off=off, decay=0.8))
    model, initial, expected = told(planted, np.random.default_rng(4))
    made = job(tmp_path, model, initial, calibration(planted, 600, seed=1))
    code, report = made.run(*FREE)
    assert code == 0
    check_outcome(made, report)
    assert [found_blocks(site) for site in report["sites"]] == expected
    assert bool(report["kept"]) == (off == "zero")


# Models that can't be verified


def test_an_original_with_nan_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    made = unverifiable(tmp_path, helper.make_node("Log", ["h"], ["y"], name="log"))
    assert refused(made, capsys) == "output 'y' of the original has NaN or infinity on the given data"


def test_a_random_original_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    noise = helper.make_node("RandomNormalLike", ["h"], ["y"], name="noise")
    assert "differs from run to run" in refused(unverifiable(tmp_path, noise), capsys)


def test_an_original_that_fails_on_the_data_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    made = unverifiable(tmp_path, helper.make_node("Reshape", ["h", "seven"], ["y"], name="reshape"))
    assert "fails to run" in refused(made, capsys)


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Log", ["h"], ["y"], name="log"),
        helper.make_node("Reshape", ["h", "seven"], ["y"], name="reshape"),
    ],
    ids=["NaN", "fails"],
)
def test_without_data_such_an_original_is_copied(node: onnx.NodeProto, tmp_path: Path) -> None:
    made = unverifiable(tmp_path, node)
    code, report = made.run(*FREE, init=False, calib=False)
    assert code == 0
    check_outcome(made, report)
    assert each(report, "reason") == ["cannot-verify"]
    assert report["verify"] is None
    assert any("not verified" in warning for warning in report["warnings"])


def test_inputs_that_cannot_be_made_up_are_a_copy(tmp_path: Path) -> None:
    """A string is nothing that synthetic inputs know; without data nothing can be verified then."""
    made = unverifiable(tmp_path, helper.make_node("Identity", ["h"], ["y"], name="end"))
    made.model.graph.input.append(value("words", ["N"], TensorProto.STRING))
    onnx.save(made.model, made.source)
    code, report = made.run(*FREE, init=False, calib=False)
    assert code == 0
    check_outcome(made, report)
    assert each(report, "reason") == ["cannot-verify"]


def unverifiable(folder: Path, last: onnx.NodeProto) -> Job:
    """x -> MatMul -> h -> `last` -> y"""
    nodes = [helper.make_node("MatMul", ["x", "W"], ["h"], name="fc"), last]
    weights = {"W": np.random.default_rng(0).standard_normal((12, 12)).astype(np.float32)}
    weights["seven"] = np.array([-1, 7], np.int64)
    made = small_model(nodes, [value("x", ["N", 12])], [value("y", ["A", "B"])], weights)
    feeds = {"x": np.random.default_rng(1).standard_normal((65, 12)).astype(np.float32)}
    return job(folder, made, {"W": weights["W"]}, feeds)


def refused(made: Job, capsys: Capture) -> str:
    """The message of a run that ends with 5 and writes nothing."""
    before = {path.name for path in made.folder.iterdir()}
    arguments = [str(made.source), str(made.out), "--calib", str(made.folder / "calib.npz"), *FREE]
    assert main(arguments) == 5
    assert {path.name for path in made.folder.iterdir()} == before
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("onnx-decomp: error: ")


# Latency


def timed(*speedups: float) -> Any:
    """Stands in for the measurement: answers these speed-ups in turn, the last one for good."""
    left = list(speedups)

    def compare(*_: Any, **__: Any) -> Latency:
        speedup = left.pop(0) if len(left) > 1 else left[0]
        interval = (speedup * 0.99, speedup * 1.01)
        return Latency("cpu", 1, 1.0, 1 / speedup, speedup, interval, 20, 64)

    return compare


GATED = ("--provider", "cpu", "--objective", "flops", "--quiet")


def test_what_is_not_faster_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "compare_latency", timed(0.8))
    made = planted_job(tmp_path, build(CLEAR))
    code, report = made.run(*GATED)
    assert code == 0
    check_outcome(made, report)
    assert report["kept"] == []
    assert report["history"] == [{"round": 1, "undone": "region_000", "why": "latency"}]
    assert each(report, "reason") == ["latency"] * 2
    assert [found_blocks(site) for site in report["sites"]] == planted_blocks(build(CLEAR))


@ABOUT_CPU
@pytest.mark.parametrize(
    ("options", "measured", "kept"),
    [
        ((), 1.02, True),
        ((), 1.005, False),  # its interval reaches below 1
        (("--min-speedup", "1.5"), 1.4, False),
        (("--min-speedup", "0.5"), 0.8, True),
    ],
)
def test_never_slower_than_was_asked(
    options: Sequence[str], measured: float, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "compare_latency", timed(measured))
    made = planted_job(tmp_path, build(CLEAR))
    code, report = made.run(*GATED, *options)
    assert code == 0
    check_outcome(made, report)
    assert bool(report["kept"]) == kept
    assert (report["latency"] == "not measured") == (not kept)


@ABOUT_CPU
def test_undoing_goes_on_until_what_is_left_is_faster(
    two_regions: TwoRegions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "compare_latency", timed(0.9, 1.5))
    code, report = two_regions.job.run(*GATED)
    assert code == 0
    check_outcome(two_regions.job, report)
    # Two blocks promise less than four: region_001 goes first.
    assert report["history"] == [{"round": 1, "undone": "region_001", "why": "latency"}]
    assert report["kept"] == ["region_000"]
    assert report["latency"]["speedup"] == 1.5


@ABOUT_CPU
def test_a_region_that_only_slows_the_rest_down_is_undone(
    two_regions: TwoRegions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole is faster; then each region against the model without it: the second one does harm."""
    monkeypatch.setattr(gates, "compare_latency", timed(1.5, 1.8, 0.9, 1.6))
    code, report = two_regions.job.run(*GATED)
    assert code == 0
    check_outcome(two_regions.job, report)
    assert report["history"] == [{"round": 1, "undone": "region_001", "why": "latency"}]
    assert report["kept"] == ["region_000"]
    assert report["latency"]["speedup"] == 1.6


@ABOUT_CPU
def test_a_region_that_may_or_may_not_help_stays(
    two_regions: TwoRegions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many small gains half look like losses at a brief look: only harm beyond noise is undone."""
    monkeypatch.setattr(gates, "compare_latency", timed(1.5, 1.8, 0.995))
    code, report = two_regions.job.run(*GATED)
    assert code == 0
    check_outcome(two_regions.job, report)
    assert report["history"] == []
    assert report["kept"] == ["region_000", "region_001"]
    assert report["latency"]["speedup"] == 1.5


@ABOUT_CPU
def test_what_onnx_runtime_fuses_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "compare_latency", timed(2.0))
    made = planted_job(tmp_path, build(SPECS["three layers"]))
    code, report = made.run(*GATED)
    assert code == 0
    assert report["kept"]
    rows = {row["operator"]: row for row in report["operators"]}
    # Two activations of five operators each, in each of so many blocks.
    assert (rows["Gelu"]["before"], rows["Gelu"]["after"]) == (
        2,
        2 * len(planted_blocks(build(SPECS["three layers"]))[0]),
    )
    assert rows["Gelu"]["fused"]
    assert not rows["Split"]["fused"]  # the written model names it itself
    assert {row["provider"] for row in report["operators"]} == {"cpu"}
    assert any("fused by ONNX Runtime: " in line and "Gelu 2 -> " in line for line in summary(report))
    again, report = made.run(*GATED, "--no-latency-gate")
    assert (again, report["operators"]) == (0, [])


@ABOUT_CPU
@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            Operator("Attention", "cuda", True, 6, 5),
            "ONNX Runtime fuses Attention 5 times now, 6 times before",
        ),
        (Operator("Attention", "cuda", True, 6, 6), None),
        (Operator("BiasGelu", "cuda", True, 6, 0), None),  # the latency gate judges that
        (Operator("Attention", "cuda", False, 6, 5), None),  # not fused, but in the model
        (Operator("Shape", "cpu", False, 2, 3), "3 Shape run on the cpu, 2 before"),
        (Operator("Shape", "cpu", False, 2, 2), None),
    ],
)
def test_what_is_lost_of_fusions_is_said(row: Operator, said: str | None) -> None:
    assert losses([row], "cuda") == ([] if said is None else [said])


SHAPES = ("--shape", "x:1x64,x:32x64", "--shape", "x:500x64")


@ABOUT_CPU
@pytest.mark.parametrize(("slowest", "kept"), [(1.2, True), (0.9, False)])
def test_no_shape_may_get_slower(
    slowest: float, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(_before: Any, _after: Any, feeds: Any, **_: Any) -> Latency:
        seen.append(feeds["x"].shape)
        return timed(slowest if len(feeds["x"]) == 32 else 2.0)()

    monkeypatch.setattr(gates, "compare_latency", watched)
    made = planted_job(tmp_path, build(CLEAR))
    code, report = made.run(*GATED, *SHAPES)
    assert code == 0
    check_outcome(made, report)
    assert seen == [(1, 64), (32, 64), (500, 64)]
    assert bool(report["kept"]) == kept
    if kept:
        assert report["latency"]["speedup"] == slowest
        told = {row["shape"]: row["speedup"] for row in report["latency"]["shapes"]}
        assert told == {"x:1x64": 2.0, "x:32x64": slowest, "x:500x64": 2.0}


def test_every_shape_is_really_measured(tmp_path: Path) -> None:
    made = planted_job(tmp_path, build(CLEAR))
    code, report = made.run(*GATED, *SHAPES, "--min-speedup", "0.01", "--threads", "1")
    assert code == 0
    assert [row["samples"] for row in report["latency"]["shapes"]] == [1, 32, 500]


@pytest.mark.parametrize("shape", ["x:1x63", "y:1x64", "x:64"])
def test_a_shape_that_does_not_fit_is_refused_at_once(shape: str, tmp_path: Path, capsys: Capture) -> None:
    made = planted_job(tmp_path, build(CLEAR))
    assert main([str(made.source), str(made.out), *GATED, "--shape", shape]) == 3
    assert f"--shape {shape.partition(':')[0]}: " in capsys.readouterr().err
    assert not made.out.exists()


# Limits of single outputs, and the user's own score


SCORE = """
import pathlib
import numpy as np

folder = pathlib.Path(__file__).parent
x = np.load(folder / "calib.npz")["x"]
parts = {{"select": x[:100], "report": x[100:200]}}
first = {{}}

def score(run, part):
    print("scoring", part)
    with (folder / "calls.txt").open("a") as file:
        print(part, file=file)
    y = run({{"x": parts[part]}})["y"]
    before = first.setdefault(part, y)  # the original comes first
    return {answer}
"""


def scored(made: Job, answer: str, *options: str) -> tuple[dict[str, Any], list[str]]:
    """The report with a score of its own, and the parts that it was asked for."""
    (made.folder / "score.py").write_text(SCORE.format(answer=answer))
    code, report = made.run(*FREE, "--evaluate", f"{made.folder / 'score.py'}:score", *options)
    assert code == 0
    return report, (made.folder / "calls.txt").read_text().split()


def test_a_score_that_does_not_drop_lets_a_rewrite_pass(tmp_path: Path, capsys: Capture) -> None:
    made = planted_job(tmp_path / "m", build(CLEAR))
    answer = "1 - np.linalg.norm(y - before) / np.linalg.norm(before)"
    report, calls = scored(made, answer, "--tolerance", "0.01")
    assert report["kept"] == ["region_000"]
    told = report["evaluate"]
    assert told["function"].endswith("score.py:score")
    assert (told["before"], told["tolerance"]) == (1.0, 0.01)
    assert 0.99 <= told["after"] <= 1.0
    assert calls.count("report") == 2
    assert report["verify"]["passed"]
    assert report["verify"]["tolerance"] is None
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "scoring report" in captured.err
    assert captured.err.splitlines()[-1].startswith("onnx-decomp: kept 1 of 1")


def test_a_score_that_drops_undoes_what_a_metric_would_let_pass(tmp_path: Path) -> None:
    made = planted_job(tmp_path / "m", build(CLEAR))
    report, calls = scored(made, "float(np.array_equal(y, before))", "--tolerance", "0.5")
    assert report["kept"] == []
    assert made.out.read_bytes() == made.source.read_bytes()
    assert "tolerance" in each(report, "reason")
    assert report["evaluate"] | {"function": ""} == {
        "function": "", "before": None, "after": None, "tolerance": 0.5,
    }  # fmt: skip
    assert "select" in calls


def test_an_output_is_judged_by_its_own_metric(tmp_path: Path, capsys: Capture) -> None:
    planted = build(CLEAR)
    model = onnx.ModelProto.FromString(planted.model.SerializeToString())
    model.graph.node.append(helper.make_node("Mul", ["y", "two"], ["twice"]))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(2), "two"))
    model.graph.output.append(value("twice", ["N", 64]))
    made = job(tmp_path / "m", model, planted.snapshot, calibration(planted, 600, seed=1))
    limits = ("--metric", "twice=max-abs", "--tolerance", "twice=0.25", "--tolerance", "0.01")
    code, report = made.run(*FREE[:-1], *limits)
    assert code == 0
    assert report["kept"] == ["region_000"]
    check = report["verify"]
    assert (check["metric"], check["tolerance"]) == ("rel-l2", 0.01)
    assert (check["outputs"]["twice"]["metric"], check["outputs"]["twice"]["tolerance"]) == ("max-abs", 0.25)
    assert "metric" not in check["outputs"]["y"]
    assert report["options"]["limits"] == [["twice", "max-abs", 0.25]]
    assert "twice: max-abs of 0.25" in capsys.readouterr().err
    code, report = made.run(*FREE, "--tolerance", "0.01", "--tolerance", "twice=1e-12")
    assert code == 0
    assert report["kept"] == []
