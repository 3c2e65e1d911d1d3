"""Models to try the compiler on: generated ones with a known answer (`planted`), and small trained ones.

Reading the trained ones takes numpy only; `python -m models.train` makes them anew, with the extra `train`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parent
NAMES = ("towers/vanished", "towers/shrunk", "towers/untouched", "towers/dense", "digits", "ranker")
"""The models that the demo shows and that are measured throughout."""
FURTHER = (
    "towers/dense-1",
    "towers/dense-2",
    "towers/deep-0",
    "towers/deep-1",
    "towers/deep-2",
    "shared",
    "coupled",
    "frozen",
    "charlm",
)
"""More seeds, more layers, controls, and a transformer."""


@dataclass(frozen=True)
class TrainedModel:
    """The files of one trained model."""

    name: str
    model: Path
    """The ONNX file: one input, one output of logits, the first axis free."""
    init: Path
    """Initial weights by stored name, in the stored layout."""
    calib: Path
    """Inputs by name, from the training side."""
    report: Path
    """Held-back inputs by name, and their labels under the key `target`."""
    labels: Path | None
    """True block of each element of axis l under the key `axis_<l>`, where training had blocks."""
    meta: dict[str, Any]
    """How it was trained, and what it reached."""


def load(name: str) -> TrainedModel:
    """One of `NAMES` or `FURTHER`. What variants of a model share lies in the folder above."""
    folder = ROOT / name
    meta = json.loads((folder / "meta.json").read_text())

    def nearest(file: str) -> Path:
        return folder / file if (folder / file).exists() else folder.parent / file

    return TrainedModel(
        name,
        folder / "model.onnx",
        nearest("init.npz"),
        nearest("calib.npz"),
        nearest("report.npz"),
        nearest("labels.npz") if meta["masked"] else None,
        meta,
    )


def accuracy(logits: NDArray[Any], target: NDArray[np.integer[Any]]) -> float:
    """Share of right answers; logits [n, heads * classes] for target [n, heads], or [n, classes] for [n]."""
    return float((logits.reshape(*target.shape, -1).argmax(-1) == target).mean())


def loss(logits: NDArray[Any], target: NDArray[np.integer[Any]]) -> float:
    """Mean cross-entropy in nats; logits [..., classes] for target [...]."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    right = np.take_along_axis(wide, target[..., None], axis=-1)[..., 0]
    return float((np.log(np.exp(wide).sum(axis=-1)) - right).mean())


@dataclass(frozen=True)
class Metric:
    """A measure of logits against their targets, and whether more of it is better."""

    measure: Callable[[NDArray[Any], NDArray[np.integer[Any]]], float]
    more_is_better: bool


METRICS = {"accuracy": Metric(accuracy, True), "loss": Metric(loss, False)}


def metric(trained: TrainedModel, logits: NDArray[Any], target: NDArray[np.integer[Any]]) -> float:
    """The model's task metric of its output on the report inputs; `worsening` knows which way is better."""
    return METRICS[trained.meta["metric"]].measure(logits, target)


def worsening(trained: TrainedModel, before: float, after: float) -> float:
    """By how much the task metric got worse, in its own unit; negative where it got better."""
    return before - after if METRICS[trained.meta["metric"]].more_is_better else after - before
