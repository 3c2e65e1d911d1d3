"""What must not matter, does not: names, the order and the scale of hidden units, batch, type, a second compilation.

Each test compiles a model and another that computes the same, with the latency gate off, and says what of the two
results is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

import models
from models.planted import INPUT, Planted, PlantedModel, build, calibration
from tests.test_end_to_end import FREE, Arrays, Job, change, job

SPEC = Planted((48, 96, 48), blocks=3, off="zero", gain=3)
HIDDEN = SPEC.widths[1]
FIRST, SECOND, BIAS = "layers.0.weight", "layers.1.weight", "layers.0.bias"
SAMPLES = 500

Model = onnx.ModelProto
Rename = Callable[[str], str]


def compiled(
    folder: Path, model: Model, initial: Arrays, feeds: Arrays, *options: str
) -> tuple[Job, dict[str, Any]]:
    """The files, and the report of a compilation that kept something."""
    made = job(folder, model, initial, feeds)
    code, report = made.run(*FREE, *options)
    assert code == 0
    assert report["kept"]
    return made, report


def cost(report: dict[str, Any]) -> list[Any]:
    """What was decided for each site, and what is left of it."""
    return [(site["decision"], site["form"], site["rank"], site["flop_ratio"]) for site in report["sites"]]


def without_form(report: dict[str, Any]) -> list[Any]:
    """The same, but for the form, which goes by the number of rows."""
    return [(decision, rank, ratio) for decision, _, rank, ratio in cost(report)]


def blocks(site: dict[str, Any]) -> set[tuple[frozenset[int], frozenset[int]]]:
    return {(frozenset(block["rows"]), frozenset(block["cols"])) for block in site["structure"]["blocks"]}


def changed(model: Model, arrays: Arrays) -> Model:
    """A copy with other stored tensors, by name."""
    copy = Model.FromString(model.SerializeToString())
    for tensor in copy.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))
    return copy


def stored(model: Model) -> Arrays:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.fixture(scope="module")
def planted() -> PlantedModel:
    return build(SPEC)


@pytest.fixture(scope="module")
def feeds(planted: PlantedModel) -> Arrays:
    return calibration(planted, SAMPLES, seed=1)


@pytest.fixture(scope="module")
def base(
    planted: PlantedModel, feeds: Arrays, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Job, dict[str, Any]]:
    return compiled(tmp_path_factory.mktemp("base"), planted.model, planted.snapshot, feeds)


# --- names --------------------------------------------------------------------------------------------------------


def renamed(model: Model, rename: Rename) -> Model:
    """Every node and every tensor, of a graph without nested ones, under another name."""
    copy = Model.FromString(model.SerializeToString())
    graph = copy.graph
    for item in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.name = rename(item.name)
    for node in graph.node:
        node.name = rename(node.name)
        for names in (node.input, node.output):
            names[:] = [rename(name) if name else name for name in names]
    return copy


def by_place(model: Model) -> bytes:
    """The model with names that tell nothing but where each was first met, and without metadata."""
    found: dict[str, str] = {}
    plain = renamed(model, lambda name: found.setdefault(name, f"n{len(found)}"))
    del plain.metadata_props[:]
    return plain.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: hashlib.sha256(name.encode()).hexdigest(),  # another order of the alphabet
        lambda name: f"модель/{name[::-1]}: {{}}",
    ],
    ids=["hashes", "odd"],
)
def test_names(
    rename: Rename, planted: PlantedModel, feeds: Arrays, base: tuple[Job, Any], tmp_path: Path
) -> None:
    """The written model is the same up to names: byte for byte once names say nothing."""
    model = renamed(planted.model, rename)
    initial = {rename(name): array for name, array in planted.snapshot.items()}
    made, report = compiled(tmp_path, model, initial, {rename(name): array for name, array in feeds.items()})
    assert by_place(onnx.load(made.out)) == by_place(onnx.load(base[0].out))
    assert cost(report) == cost(base[1])


# --- hidden units -------------------------------------------------------------------------------------------------


def reordered(arrays: Arrays, order: NDArray[np.intp]) -> Arrays:
    moved = {FIRST: arrays[FIRST][:, order], SECOND: arrays[SECOND][order]}
    return {**moved, BIAS: arrays[BIAS][order]} if BIAS in arrays else moved


@pytest.mark.parametrize("seed", range(3))
def test_order_of_hidden_units(
    seed: int, planted: PlantedModel, feeds: Arrays, base: tuple[Job, Any], tmp_path: Path
) -> None:
    """The same blocks up to the permutation, at the same cost; outputs to float noise."""
    order = np.random.default_rng(seed).permutation(HIDDEN)
    model = changed(planted.model, reordered(stored(planted.model), order))
    made, report = compiled(tmp_path, model, reordered(planted.snapshot, order), feeds)
    assert cost(report) == cost(base[1])
    first, second = (blocks(site) for site in report["sites"])
    assert {(rows, frozenset(order[list(cols)].tolist())) for rows, cols in first} == blocks(
        base[1]["sites"][0]
    )
    assert {(frozenset(order[list(rows)].tolist()), cols) for rows, cols in second} == blocks(
        base[1]["sites"][1]
    )
    assert change(onnx.load(base[0].out), onnx.load(made.out), feeds) < 1e-6


@pytest.mark.parametrize("each", [True, False], ids=["each its own", "all alike"])
def test_scale_of_hidden_units(
    each: bool, planted: PlantedModel, feeds: Arrays, base: tuple[Job, Any], tmp_path: Path
) -> None:
    """Powers of two in front of a Relu and out behind it change no bit of any output: same blocks, same cost."""
    exponents = np.random.default_rng(0).integers(-4, 5, HIDDEN) if each else np.full(HIDDEN, 5)
    scale = (2.0**exponents).astype(np.float32)

    def rescaled(arrays: Arrays) -> Arrays:
        made = {FIRST: arrays[FIRST] * scale, SECOND: arrays[SECOND] / scale[:, None]}
        return {**made, BIAS: arrays[BIAS] * scale} if BIAS in arrays else made

    model = changed(planted.model, rescaled(stored(planted.model)))
    assert change(planted.model, model, feeds) < 1e-7
    made, report = compiled(tmp_path, model, rescaled(planted.snapshot), feeds)
    assert cost(report) == cost(base[1])
    assert [blocks(site) for site in report["sites"]] == [blocks(site) for site in base[1]["sites"]]
    assert change(onnx.load(base[0].out), onnx.load(made.out), feeds) < 1e-6


# --- batch and type -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_batch(
    batch: int, planted: PlantedModel, feeds: Arrays, base: tuple[Job, Any], tmp_path: Path
) -> None:
    """The same decisions, blocks and FLOPs, in the form that is best for so few rows, and the batch is still fixed."""
    model = Model.FromString(planted.model.SerializeToString())
    for item in (*model.graph.input, *model.graph.output):
        item.type.tensor_type.shape.dim[0].dim_value = batch
    made, report = compiled(tmp_path, model, planted.snapshot, feeds)
    assert without_form(report) == without_form(base[1])
    assert [blocks(site) for site in report["sites"]] == [blocks(site) for site in base[1]["sites"]]
    written = onnx.load(made.out)
    assert list(written.graph.input) == list(model.graph.input)
    few = {INPUT: feeds[INPUT][:batch]}
    assert change(model, written, few) < 1e-6


def test_half_precision(tmp_path: Path) -> None:
    """Weights that float16 holds, stored as either type: the same blocks and cost."""
    reports = []
    half = build(Planted((48, 96, 48), blocks=3, off="zero", gain=3, dtype="float16"))
    for kind in ("float16", "float32"):
        made = build(Planted((48, 96, 48), blocks=3, off="zero", gain=3, dtype=kind))  # type: ignore[arg-type]
        arrays = {name: array.astype(kind) for name, array in stored(half.model).items()}
        initial = {name: array.astype(kind) for name, array in half.snapshot.items()}
        inputs = {INPUT: calibration(half, SAMPLES, seed=1)[INPUT].astype(kind)}
        reports.append(compiled(tmp_path / kind, changed(made.model, arrays), initial, inputs)[1])
    assert cost(reports[0]) == cost(reports[1])
    pairs = zip(*(report["sites"] for report in reports), strict=True)
    assert all(blocks(one) == blocks(other) for one, other in pairs)


# --- twice --------------------------------------------------------------------------------------------------------


def again(made: Job, folder: Path, initial: Arrays) -> Job:
    """The same job on what it wrote."""
    return job(folder, onnx.load(made.out), initial, made.feeds)


def trained(tmp_path: Path) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Trained models with what their tolerance of 0.03 keeps."""
    for name in ("towers/vanished", "digits"):
        source = models.load(name)
        arrays = {key: dict(np.load(path)) for key, path in (("init", source.init), ("calib", source.calib))}
        model = onnx.load(source.model)
        yield compiled(
            tmp_path / name.replace("/", "-"), model, arrays["init"], arrays["calib"], "--tolerance", "0.03"
        )


def test_a_second_time_changes_nothing(planted: PlantedModel, base: tuple[Job, Any], tmp_path: Path) -> None:
    """OUT is IN byte for byte, and the reason at every site is that it was compiled already."""
    second = again(base[0], tmp_path, planted.snapshot)
    code, report = second.run(*FREE)
    assert code == 0
    assert second.out.read_bytes() == second.source.read_bytes()
    assert report["kept"] == []
    assert {site["reason"] for site in report["sites"]} <= {"already-compiled"}  # batched products are none


def test_a_second_time_by_force_loses_nothing(
    planted: PlantedModel, base: tuple[Job, Any], tmp_path: Path
) -> None:
    """No more FLOPs than before, and outputs within the tolerance of the first result."""
    second = again(base[0], tmp_path, planted.snapshot)
    code, report = second.run(*FREE, "--force", init=False)
    assert code == 0
    assert report["output"]["matmul_flops"] <= base[1]["output"]["matmul_flops"]
    assert change(onnx.load(second.source), onnx.load(second.out), second.feeds) <= 1e-3
    onnx.checker.check_model(second.out, full_check=True)


def test_what_is_compiled_by_force_is_stamped_anew(
    planted: PlantedModel, feeds: Arrays, tmp_path: Path
) -> None:
    """The stamp of an earlier compilation is none of the metadata that has to stay; what others wrote is."""
    model = Model.FromString(planted.model.SerializeToString())
    for key in ("onnx_decomp.version", "onnx_decomp.verdict", "author"):
        model.metadata_props.add(key=key, value="before")
    made, _ = compiled(tmp_path, model, planted.snapshot, feeds, "--force")
    told = {entry.key: entry.value for entry in onnx.load(made.out).metadata_props}
    assert told["author"] == "before"
    assert told["onnx_decomp.verdict"].count("split") == 1
    assert told["onnx_decomp.version"] != "before"


@pytest.mark.slow
def test_order_of_units_that_are_left_out_and_refitted(tmp_path: Path) -> None:
    """A trained network, reduced by search and refits: as many FLOPs, the same change to a hundredth of it."""
    source = models.load("digits")
    model, initial = onnx.load(source.model), dict(np.load(source.init))
    order = np.random.default_rng(0).permutation(512)
    moved = {"layers.0.weight": (order,), "layers.0.bias": (order,), "layers.1.weight": (slice(None), order)}
    reports = []
    for name, places in (("as it is", {}), ("moved", moved)):
        arrays = {key: stored(model)[key][place] for key, place in places.items()}
        start = initial | {key: initial[key][place] for key, place in places.items() if key in initial}
        feeds = dict(np.load(source.calib))
        reports.append(
            compiled(tmp_path / name, changed(model, arrays), start, feeds, "--tolerance", "0.03")[1]
        )
    assert cost(reports[0]) == cost(reports[1])
    before, after = (report["verify"]["outputs"]["logits"]["rel_l2"] for report in reports)
    assert after == pytest.approx(before, rel=0.01)


@pytest.mark.slow
def test_trained_models_a_second_time(tmp_path: Path) -> None:
    """The same of networks that were refitted: nothing changes, and by force nothing is lost beyond the tolerance."""
    for made, report in trained(tmp_path):
        initial = dict(np.load(made.folder / "init.npz"))
        second = again(made, made.folder / "again", initial)
        assert second.run(*FREE, "--tolerance", "0.03", init=False)[0] == 0
        assert second.out.read_bytes() == second.source.read_bytes()
        code, forced = second.run(*FREE, "--tolerance", "0.03", "--force", init=False)
        assert code == 0
        assert forced["output"]["matmul_flops"] <= report["output"]["matmul_flops"]
        assert change(onnx.load(second.source), onnx.load(second.out), second.feeds) <= 1.5 * 0.03
