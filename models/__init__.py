"""Models to try the compiler on: generated ones with a known answer (`planted`), and small trained ones.

Reading the trained ones takes numpy only; `python -m models.train` makes them anew, with the extra `train`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parent
NAMES = ("towers/vanished", "towers/shrunk", "towers/untouched", "towers/dense", "digits", "ranker")


@dataclass(frozen=True)
class TrainedModel:
    """The files of one trained model."""

    name: str
    model: Path
    """The ONNX file: one float32 input, one output of logits, the first axis free."""
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
    """One of `NAMES`. Variants of a model share data and initial weights, which lie in the folder above."""
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


def metric(trained: TrainedModel, logits: NDArray[Any], target: NDArray[np.integer[Any]]) -> float:
    """The model's task metric, higher is better, of its output on the report inputs."""
    return {"accuracy": accuracy}[trained.meta["metric"]](logits, target)
