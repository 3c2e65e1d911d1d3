"""The trained models are what models/README.md says."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from models import NAMES, TrainedModel, load, metric

MASKED = [name for name in NAMES if load(name).meta["masked"]]


def trained_weights(trained: TrainedModel) -> dict[str, NDArray[Any]]:
    graph = onnx.load(trained.model).graph
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}


@pytest.mark.parametrize("name", NAMES)
def test_metric_is_the_recorded_one(name: str) -> None:
    trained = load(name)
    session = onnxruntime.InferenceSession(trained.model, providers=["CPUExecutionProvider"])
    report = np.load(trained.report)
    inputs = {value.name: report[value.name] for value in session.get_inputs()}
    assert list(inputs) == [trained.meta["input"]]
    (logits,) = session.run([trained.meta["output"]], inputs)
    assert len(logits) == trained.meta["samples"]
    assert metric(trained, logits, report["target"]) == pytest.approx(trained.meta["value"], abs=2e-3)
    assert trained.meta["value"] > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_file_is_sound_and_tells_nothing_of_the_machine(name: str) -> None:
    trained = load(name)
    model = onnx.load(trained.model)
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert not any(tensor.HasField("data_location") for tensor in model.graph.initializer)
    for start in (b"/home/", b"/Users/", b"site-packages"):
        assert start not in trained.model.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_snapshot_has_every_weight_and_data_every_input(name: str) -> None:
    trained = load(name)
    shapes = {key: array.shape for key, array in trained_weights(trained).items()}
    snapshot = np.load(trained.init)
    assert {key: snapshot[key].shape for key in snapshot.files} == shapes
    with np.load(trained.calib) as calib:
        assert calib.files == [trained.meta["input"]]
        inputs = calib[trained.meta["input"]]
    assert inputs.dtype == np.float32
    assert len(inputs) >= 10 * max(trained.meta["widths"][:-1])
    assert inputs.shape[1] == trained.meta["widths"][0]


@pytest.mark.parametrize("name", ["towers/dense", "digits"])
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
