"""Draw what the compiler finds in a trained layer: `python -m models.picture` writes docs/towers.png.

The same 512 x 512 matrix of learned changes |W - c W0| twice: in the order in which the model stores its hidden units,
and in the order of the blocks that were found. Needs the extra `train` (matplotlib).
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np

import models
from onnx_decomp import model_io
from onnx_decomp.compiler import compile_model
from onnx_decomp.options import Options

TARGET = Path("docs/towers.png")
LAYER = 1


def main() -> None:
    """Compile `towers/untouched` and draw its middle layer."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    trained = models.load("towers/untouched")
    options = Options(
        init=trained.init, calib=trained.calib, tolerance=0.1, provider="cpu", latency_gate=False
    )
    _, program = compile_model(model_io.load(trained.model), options)
    site = program.sites[LAYER]
    (structure,) = program.structures[program.regions[0].name]
    assert program.init is not None
    weight, evidence = program.affine(site).weight, program.evidence[site.index]
    change = np.abs(weight - evidence.shrink * program.init.nulls[site.index].initial())
    rows, columns = (np.argsort(labels, kind="stable") for labels in structure.grouping[LAYER : LAYER + 2])
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.7), constrained_layout=True)
    pictures = [
        (np.abs(weight), "trained weights |W|\nthe initial values hide everything"),
        (change, "learned change |W - c W0|\nhidden units in the model's order"),
        (change[np.ix_(rows, columns)], "the same, in the order of\nthe four blocks that were found"),
    ]
    for axis, (matrix, title) in zip(axes, pictures, strict=True):
        axis.imshow(matrix, cmap="magma", vmax=np.quantile(matrix, 0.99), interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(TARGET, dpi=110)


if __name__ == "__main__":
    main()
