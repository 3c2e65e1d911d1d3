"""What a candidate does to the outputs of the whole model, on the select part of the data: what the plan goes by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from onnx_decomp.metrics import Limits, OutputChange, compare_outputs
from onnx_decomp.options import Metric
from onnx_decomp.passes.compensation import BATCH, BATCH_ROWS
from onnx_decomp.probe import Feeds
from onnx_decomp.program import Program
from onnx_decomp.sites import Affine

Outputs = dict[str, NDArray[Any]]
"""Of one batch, by name."""

CAUTIOUS = 0.02
"""Relative change, and root of the divergence, of a first step where the tolerance is about something else."""

PROXY: Mapping[Metric, Metric] = {"top1": "kl", "max-abs": "rel-l2"}
"""What is predicted in place of metrics that small changes don't move smoothly."""

QUADRATIC = ("cosine", "kl")
"""Metrics that grow with the square of a small change; the others grow with the change itself."""


def batch_size(program: Program) -> int:
    """Samples of one run, so that what it holds in memory stays small."""
    rows = max(program.rows_per_sample.values(), default=1)
    return max(min(BATCH, BATCH_ROWS // rows), 1)


@dataclass
class Judge:
    """Compares the model with other affine maps in place against the original, whose outputs it holds."""

    program: Program
    _originals: list[Outputs] = field(default_factory=list)

    @property
    def limits(self) -> Limits:
        return Limits.asked(self.program.options)

    @property
    def order(self) -> int:
        """What is spent of the tolerance goes as the loss to the power of one over this."""
        metrics = {self.limits.of(value.name)[0] for value in self.program.original.graph.output}
        return 1 if metrics <= set(QUADRATIC) and self.program.evaluation is None else 2

    def spent(self, placed: Mapping[int, Affine]) -> float:
        """Share of the tolerance that affine maps take, with confidence; of the user's own score if there is one."""
        probe, evaluation = self.program.probe, self.program.evaluation
        assert probe is not None
        spent = compare_outputs(self._pairs(placed), self.limits).spent
        if evaluation is not None:
            spent = max(spent, evaluation.spent(lambda feeds: probe.run(feeds, placed), "select"))
        return spent

    def loss(self, placed: Mapping[int, Affine], reference: Sequence[Outputs] | None = None) -> float:
        """How much worse the outputs get, smoothly, as a square: 1 about where the tolerance is spent.

        Where the tolerance is about something that does not tell beforehand, 1 is a change that is surely small.
        reference: what `outputs` made of other affine maps; None: the original.
        """
        outputs = compare_outputs(self._pairs(placed, reference), self.limits).outputs
        return max(self._loss(name, change) for name, change in outputs.items())

    def outputs(self, placed: Mapping[int, Affine]) -> Sequence[Outputs]:
        """The model's outputs on the select part, batch by batch; the original's are held."""
        if not placed:
            return self._held()
        return [made for _, made in self._pairs(placed)]

    def _loss(self, name: str, change: OutputChange) -> float:
        metric, tolerance = self.limits.of(name)
        smooth = PROXY.get(metric, metric)
        if metric in PROXY or not np.isfinite(tolerance):
            tolerance = CAUTIOUS**2 if smooth in QUADRATIC else CAUTIOUS
        found = change.change(smooth) / tolerance
        return found if smooth in QUADRATIC else found**2

    def outward(self, name: str, original: NDArray[Any], made: NDArray[Any]) -> NDArray[np.float64]:
        """A small change of an output, flat, so that its squared length is what counts: Fisher's metric for classes."""
        difference = made.astype(np.float64) - original.astype(np.float64)
        if PROXY.get(self.limits.of(name)[0], self.limits.of(name)[0]) == "kl" and original.shape[-1] > 1:
            p = softmax(original.astype(np.float64), axis=-1)
            difference = np.sqrt(p) * (difference - (p * difference).sum(axis=-1, keepdims=True))
        else:
            difference /= max(float(np.linalg.norm(original)), 1e-30)
        flat: NDArray[np.float64] = difference.ravel()
        return flat

    def _pairs(self, placed: Mapping[int, Affine], reference: Sequence[Outputs] | None = None) -> Any:
        probe = self.program.probe
        assert probe is not None
        for before, feeds in zip(reference or self._held(), self._batches(), strict=True):
            yield before, probe.run(feeds, placed)

    def _batches(self) -> list[Feeds]:
        return list(self.program.data.batches("select", batch_size(self.program)))

    def _held(self) -> list[Outputs]:
        probe = self.program.probe
        assert probe is not None
        if not self._originals:
            self._originals = [probe.run(feeds, {}) for feeds in self._batches()]
        return self._originals
