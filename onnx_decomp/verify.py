"""Is it still the same model? From outside (interface) and in what it computes (outputs)."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import onnx

from onnx_decomp import guards, model_io, trial
from onnx_decomp.calibration import Data, Part
from onnx_decomp.errors import CannotVerifyError
from onnx_decomp.graph_index import INITIALIZERS_APART, GraphIndex
from onnx_decomp.metrics import Limits, Verification, compare_outputs
from onnx_decomp.model_io import ModelFile
from onnx_decomp.options import Metric
from onnx_decomp.runtime import Arrays, RunError, Session, open_session

BATCH = 64
"""Samples per run."""

STAMP = "onnx_decomp."
"""What the keys of our own metadata begin with: a compilation by force writes them anew."""


FIRST_SECONDS, SECONDS_PER_BYTE = 120.0, 60e-9
"""What a model's first run may take, on one sample: two minutes, and one more for each GB. Some never end."""

TRIED = 2**26
"""Bytes up to which a model is tried in a process of its own first (64 MiB): larger ones take long to load twice."""


def patience(source: ModelFile) -> float:
    """Seconds that the first run of a model may take."""
    return FIRST_SECONDS + SECONDS_PER_BYTE * source.size


def try_out(source: ModelFile, feeds: Arrays | None) -> None:
    """Hand a model to native code for the first time, in a copy of this process, on the CPU.

    feeds: of one run; None: it is loaded only. Raises InputError where that crashes, never ends, or takes all memory.
    """

    def action() -> None:
        GraphIndex.build(source.proto, partial(model_io.read_tensor, source))
        session = open_session(source.path or source.proto, folder=source.folder)
        if feeds is not None:
            session.run(feeds, seconds=patience(source))

    if source.size <= TRIED:
        trial.attempt(action, str(source.path or "the model"), 2 * patience(source), guards.MAX_TENSOR)


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


def check_original(session: Session, data: Data, batch: int = BATCH, seconds: float | None = None) -> None:
    """Whether the original can be verified against, on the `select` part.

    seconds: that its first run may take, on as few samples as it runs on.
    Raises CannotVerifyError where it fails to run, gives NaN or infinity, or something else each time.
    """
    session.run(next(data.batches("select", 1)), seconds=seconds)
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


def together(session: Session, data: Data, batch: int = BATCH) -> float:
    """How far the outputs depend on which samples are run at once: largest change when a batch is run in two halves.

    Relative L2; infinity where halves don't run or make up the whole, 0 where the model fixes the number of samples.
    """
    feeds = next(data.batches("select", batch))
    count = len(next(iter(feeds.values())))
    if data.fixed or count < 2:
        return 0.0
    try:
        halves = [
            session.run({name: array[part] for name, array in feeds.items()})
            for part in (slice(count // 2), slice(count // 2, None))
        ]
    except RunError:
        return math.inf
    joined = {name: _joined([half[name] for half in halves]) for name in halves[0]}
    return compare_outputs([(session.run(feeds), joined)], "rel-l2").largest


def _joined(parts: list[object]) -> object:
    """Along the samples; the first part alone where there is no such axis, or the parts don't fit together."""
    arrays = [np.asarray(part) for part in parts]
    fit = all(array.ndim for array in arrays) and len({array.shape[1:] for array in arrays}) == 1
    return np.concatenate(arrays) if fit else arrays[0]


def _fed(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """What callers can feed. Old models have to list every initializer among the inputs: none of those can be fed."""
    listed = model.ir_version < INITIALIZERS_APART
    stored = {tensor.name for tensor in model.graph.initializer} if listed else set()
    return [value for value in model.graph.input if value.name not in stored]


def interface_difference(original: onnx.ModelProto, written: onnx.ModelProto) -> str | None:
    """What about the inputs, outputs, operator sets or metadata is no longer as it was, or None."""
    if _fed(original) != _fed(written):
        return "the inputs of the model have changed"
    if list(original.graph.output) != list(written.graph.output):
        return "the outputs of the model have changed"
    if list(original.opset_import) != list(written.opset_import) or original.ir_version != written.ir_version:
        return "the operator sets or the IR version of the model have changed"
    kept = {entry.key: entry.value for entry in written.metadata_props}
    own = [entry for entry in original.metadata_props if not entry.key.startswith(STAMP)]
    lost = [entry.key for entry in own if kept.get(entry.key) != entry.value]
    return f"metadata {', '.join(map(repr, lost))} has changed" if lost else None
