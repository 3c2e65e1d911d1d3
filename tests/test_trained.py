"""What the compiler must do on really trained models, judged on data that neither training nor it has seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest

import models
from onnx_decomp.compiler import compile_file
from onnx_decomp.options import Options
from onnx_decomp.runtime import open_session

POINTS = 0.01
MASKED = ("towers/vanished", "towers/shrunk", "towers/untouched")


@dataclass(frozen=True)
class Outcome:
    """A report, and the task metric before and after on the held-back data."""

    report: dict[str, Any]
    before: float
    after: float

    @property
    def flops(self) -> float:
        return self.report["output"]["matmul_flops"] / self.report["input"]["matmul_flops"]

    def each(self, field: str) -> list[Any]:
        return [site[field] for site in self.report["sites"]]


def compiled(name: str, tolerance: float) -> Outcome:
    trained = models.load(name)
    options = Options(
        init=trained.init, calib=trained.calib, tolerance=tolerance, provider="cpu", latency_gate=False
    )
    result = compile_file(trained.model, None, options)
    held_back = dict(np.load(trained.report))
    target = held_back.pop("target")
    scores = [
        models.metric(trained, next(iter(open_session(model).run(held_back).values())), target)
        for model in (onnx.load(trained.model), result.model)
    ]
    return Outcome(result.report, *scores)


def check_blocks(name: str, report: dict[str, Any]) -> None:
    """Exactly the towers on every axis; elements in no block must have had nothing to learn: constant inputs."""
    trained = models.load(name)
    assert trained.labels is not None
    truth, inputs = np.load(trained.labels), np.load(trained.calib)
    varies = next(iter(inputs.values())).std(axis=0) > 0
    for layer, site in enumerate(report["sites"]):
        blocks = site["structure"]["blocks"]
        assert len(blocks) == 4
        for side, axis in (("rows", layer), ("cols", layer + 1)):
            labels = truth[f"axis_{axis}"]
            named = [set(labels[block[side]].tolist()) for block in blocks]
            assert all(len(towers) == 1 for towers in named), (side, axis)
            assert set.union(*named) == {0, 1, 2, 3}
            missed = set(range(len(labels))) - {element for block in blocks for element in block[side]}
            assert axis != 0 or not varies[sorted(missed)].any()


def test_what_has_vanished_goes_at_a_strict_tolerance() -> None:
    outcome = compiled("towers/vanished", 1e-3)
    check_blocks("towers/vanished", outcome.report)
    assert outcome.each("decision") == ["split"] * 3
    assert outcome.flops <= 0.26
    assert outcome.report["verify"]["outputs"]["logits"]["rel_l2"] <= 1e-3
    assert outcome.after >= outcome.before - 0.2 * POINTS


@pytest.mark.parametrize(("name", "loose"), [("towers/shrunk", 0.07), ("towers/untouched", 0.1)])
def test_initial_values_that_stay_are_found_but_not_thrown_away(name: str, loose: float) -> None:
    strict = compiled(name, 1e-3)
    check_blocks(name, strict.report)
    assert "split" not in strict.each("decision")
    for site in strict.report["sites"]:
        declined = [d for d in site["decisions"] if d["verdict"] == "declined"]
        assert [d["reason"] for d in declined] == ["tolerance"]
        assert declined[0]["numbers"]["change"] > 1e-3
        assert declined[0]["numbers"]["redraw"] > 0.1  # what never learned is not harmless
    allowed = compiled(name, loose)
    check_blocks(name, allowed.report)
    assert allowed.each("decision") == ["split"] * 3
    assert allowed.flops <= 0.26
    assert allowed.after >= allowed.before - 0.2 * POINTS


def test_an_ordinary_network_loses_units_and_no_accuracy() -> None:
    outcome = compiled("digits", 0.05)
    assert outcome.each("structure") == [None] * 3
    assert set(outcome.each("decision")) == {"reduced", "low-rank"}
    assert outcome.flops <= 1 / 12
    assert outcome.after >= outcome.before - 0.2 * POINTS


def test_dense_training_shows_no_blocks_in_its_weights() -> None:
    """The parts are there, but only the function shows them: nothing may be split on the weights' word."""
    outcome = compiled("towers/dense", 1e-3)
    assert "split" not in outcome.each("decision")
