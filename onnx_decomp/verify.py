"""Is it still the same model? From outside (interface) and in what it computes (outputs)."""

from __future__ import annotations

import math

import numpy as np
import onnx

from onnx_decomp.calibration import Data, Part
from onnx_decomp.errors import CannotVerifyError
from onnx_decomp.metrics import Limits, Verification, compare_outputs
from onnx_decomp.options import Metric
from onnx_decomp.runtime import Session

BATCH = 64
"""Samples per run."""


def verify(
    original: Session,
    candidate: Session,
    data: Data,
    part: Part,
    limits: Limits | Metric,
    tolerance: float = math.inf,
    batch: int = BATCH,
) -> Verification:
    """Compare two models on one part of the data. limits, tolerance: as for `compare_outputs`.

    Raises RunError where either fails to run.
    """
    pairs = ((original.run(feeds), candidate.run(feeds)) for feeds in data.batches(part, batch))
    return compare_outputs(pairs, limits, tolerance)


def check_original(session: Session, data: Data, batch: int = BATCH) -> None:
    """Whether the original can be verified against, on the `select` part.

    Raises CannotVerifyError where it fails to run, gives NaN or infinity, or something else each time.
    """
    for feeds in data.batches("select", batch):
        first, second = session.run(feeds), session.run(feeds)
        for name, value in first.items():
            array = np.asarray(value)
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise CannotVerifyError(
                    f"output {name!r} of the original has NaN or infinity on the given data"
                )
            if not np.array_equal(array, np.asarray(second[name])):
                raise CannotVerifyError(
                    f"output {name!r} of the original differs from run to run: remove the randomness"
                )


def interface_difference(original: onnx.ModelProto, written: onnx.ModelProto) -> str | None:
    """What about the inputs, outputs, operator sets or metadata is no longer as it was, or None."""
    for kind in ("input", "output"):
        before, after = getattr(original.graph, kind), getattr(written.graph, kind)
        if list(before) != list(after):
            return f"the {kind}s of the model have changed"
    if list(original.opset_import) != list(written.opset_import) or original.ir_version != written.ir_version:
        return "the operator sets or the IR version of the model have changed"
    kept = {entry.key: entry.value for entry in written.metadata_props}
    lost = [entry.key for entry in original.metadata_props if kept.get(entry.key) != entry.value]
    return f"metadata {', '.join(map(repr, lost))} has changed" if lost else None
