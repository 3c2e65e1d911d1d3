"""The trained models are what models/README.md says."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from models import FURTHER, METRICS, NAMES, ROOT, TrainedModel, load, metric, worsening

ALL = NAMES + FURTHER
MASKED = [name for name in ALL if load(name).meta["masked"]]
DIGITS = [name for name in ALL if load(name).meta["input"] == "pixels"]
TASKS = [name for name in ALL if "outputs" in load(name).meta]


def trained_weights(trained: TrainedModel) -> dict[str, NDArray[Any]]:
    graph = onnx.load(trained.model).graph
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}


def test_every_trained_model_has_a_name() -> None:
    found = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.rglob("model.onnx")}
    assert {name for name in found if not name.startswith(".")} == set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_metric_is_the_recorded_one(name: str) -> None:
    trained = load(name)
    session = onnxruntime.InferenceSession(trained.model, providers=["CPUExecutionProvider"])
    report = np.load(trained.report)
    inputs = {value.name: report[value.name] for value in session.get_inputs()}
    assert list(inputs) == [trained.meta["input"]]
    (logits,) = session.run([trained.meta["output"]], inputs)
    assert len(logits) == trained.meta["samples"]
    assert metric(trained, logits, report["target"]) == pytest.approx(trained.meta["value"], abs=2e-3)
    assert (
        worsening(trained, trained.meta["value"], {"accuracy": 0.9, "loss": 1.7}[trained.meta["metric"]]) > 0
    )


def test_loss_is_the_mean_of_negative_log_probabilities() -> None:
    logits, target = np.log(np.float32([[[0.5, 0.5], [0.1, 0.9]]])), np.int64([[0, 1]])
    expected = -(np.log(0.5) + np.log(0.9)) / 2
    assert METRICS["loss"].measure(logits + 100, target) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_file_is_sound_and_tells_nothing_of_the_machine(name: str) -> None:
    trained = load(name)
    model = onnx.load(trained.model)
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert not any(tensor.HasField("data_location") for tensor in model.graph.initializer)
    for start in (b"/home/", b"/Users/", b"site-packages"):
        assert start not in trained.model.read_bytes()


@pytest.mark.parametrize("name", ALL)
def test_snapshot_has_every_weight_and_data_every_input(name: str) -> None:
    trained = load(name)
    weights = trained_weights(trained)
    with np.load(trained.init) as snapshot:
        assert {key: snapshot[key].shape for key in snapshot.files} == {
            key: weights[key].shape for key in snapshot.files
        }
        constants = set(weights) - set(snapshot.files)
    nodes = [
        node for node in onnx.load(trained.model).graph.node if node.op_type in ("Gemm", "MatMul", "Gather")
    ]
    assert not constants & {name for node in nodes for name in node.input}
    assert not constants or trained.name == "charlm"
    with np.load(trained.calib) as calib, np.load(trained.report) as report:
        assert calib.files == [trained.meta["input"]]
        inputs, held_back = calib[trained.meta["input"]], report[trained.meta["input"]]
    assert inputs.dtype == held_back.dtype
    assert inputs.shape[1:] == held_back.shape[1:]
    rows = inputs.size if inputs.dtype == np.int64 else len(inputs)  # of tokens, each is a row
    meta = trained.meta
    assert rows >= 10 * (max(meta["widths"][:-1]) if "widths" in meta else meta["feed_forward"])


@pytest.mark.parametrize("name", DIGITS)
def test_report_holds_no_digit_that_training_saw(name: str) -> None:
    trained = load(name)
    seen, held_back = (
        {digit.tobytes() for digit in np.load(path)["pixels"].reshape(-1, 64)}
        for path in (trained.calib, trained.report)
    )
    assert not seen & held_back


@pytest.mark.parametrize("name", MASKED)
def test_masked_towers_keep_their_shrunk_initial_weights(name: str) -> None:
    trained = load(name)
    assert trained.labels is not None
    labels, snapshot, weights = np.load(trained.labels), np.load(trained.init), trained_weights(trained)
    for layer in range(len(trained.meta["widths"]) - 1):
        start, weight = (source[f"layers.{layer}.weight"] for source in (snapshot, weights))
        outside = np.not_equal.outer(labels[f"axis_{layer + 1}"], labels[f"axis_{layer}"])
        off = weight[outside] - trained.meta["shrink"] * start[outside]
        assert np.abs(off).max() <= 1e-4 * start.std()
        moved = np.abs(weight - trained.meta["shrink"] * start)[~outside] > 1e-2 * start.std()
        assert moved.mean() > 0.02


def test_variants_shrink_as_their_names_say() -> None:
    shrink = {name: load(name).meta["shrink"] for name in MASKED}
    assert shrink["towers/vanished"] < 1e-6
    assert 0.2 < shrink["towers/shrunk"] < 0.8
    assert shrink["towers/untouched"] == 1


def test_rows_of_features_that_training_never_saw_are_untouched() -> None:
    trained = load("ranker")
    before, after = np.load(trained.init)["layers.0.weight"], trained_weights(trained)["layers.0.weight"]
    frozen = (before == after).all(axis=0)
    assert np.flatnonzero(frozen).tolist() == trained.meta["never_active"]
    assert not np.load(trained.calib)["features"][:, frozen].any()


def test_the_frozen_layer_is_untouched_and_the_others_are_not() -> None:
    trained = load("frozen")
    weights = trained_weights(trained)
    with np.load(trained.init) as snapshot:
        same = {key: bool((snapshot[key] == weights[key]).all()) for key in snapshot.files}
    assert {key for key, kept in same.items() if kept} == {"layers.0.weight", "layers.0.bias"}


@pytest.mark.parametrize("name", TASKS)
def test_tasks_share_no_output_and_the_inputs_that_the_readme_says(name: str) -> None:
    trained = load(name)
    first, last = trained.meta["widths"][0], trained.meta["widths"][-1]
    assert sorted(column for task in trained.meta["outputs"] for column in task) == list(range(last))
    inputs = [set(task) for task in trained.meta["inputs"]]
    assert set.union(*inputs) == set(range(first))
    assert set.intersection(*inputs) == set(range(192, 256) if name == "shared" else range(first))


@pytest.mark.parametrize("name", TASKS)
def test_tasks_hear_the_digits_that_they_name_and_only_those(name: str) -> None:
    trained = load(name)
    session = onnxruntime.InferenceSession(trained.model, providers=["CPUExecutionProvider"])
    with np.load(trained.report) as report:
        pixels, target = report["pixels"], report["target"]
    for digit in range(pixels.shape[1] // 64):
        columns = np.arange(64 * digit, 64 * digit + 64)
        shuffled = pixels.copy()
        shuffled[:, columns] = np.random.default_rng(0).permutation(pixels[:, columns])
        (logits,) = session.run(["logits"], {"pixels": shuffled})
        for task, (inputs, outputs) in enumerate(
            zip(trained.meta["inputs"], trained.meta["outputs"], strict=True)
        ):
            right = metric(trained, logits[:, outputs], target[:, task])
            assert right < 0.4 if columns[0] in inputs else right > 0.9


def test_variants_of_one_shape_differ_in_their_weights_only() -> None:
    for names in (
        ("towers/dense", "towers/dense-1", "towers/dense-2"),
        [f"towers/deep-{n}" for n in range(3)],
    ):
        several = [load(name) for name in names]
        assert len({trained.init for trained in several}) == 3
        assert (
            len({trained.calib for trained in several}) == len({trained.report for trained in several}) == 1
        )
        assert sorted(trained.meta["seed"] for trained in several) == [0, 1, 2]
        assert len({(*trained.meta["widths"], trained.meta["recipe"]) for trained in several}) == 1


def test_no_future_character_changes_a_prediction() -> None:
    trained = load("charlm")
    session = onnxruntime.InferenceSession(trained.model, providers=["CPUExecutionProvider"])
    with np.load(trained.report) as report:
        tokens, target = report["tokens"][:4], report["target"][:4]
    assert (tokens[:, 1:] == target[:, :-1]).all()
    changed = tokens.copy()
    changed[:, 40:] = (changed[:, 40:] + 1) % trained.meta["vocabulary"]
    before, after = (session.run(["logits"], {"tokens": each})[0] for each in (tokens, changed))
    np.testing.assert_allclose(before[:, :40], after[:, :40], atol=1e-4)
    assert np.abs(before[:, 40:] - after[:, 40:]).max() > 0.1
