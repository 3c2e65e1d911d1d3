"""How much outputs changed: streamed over batches, accumulated in float64.

Beyond the metric of the tolerance, every change is given in all terms, so that people can choose another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from onnx_decomp.options import Metric

CONFIDENCE = 1.645
"""Standard errors of a one-sided 95 % bound."""

Array = NDArray[Any]
Outputs = Mapping[str, Any]


@dataclass(frozen=True)
class OutputChange:
    """Change of one output over all samples; the first axis counts samples.

    rel_l2: ‖Δ‖/‖y‖ over everything, and rel_l2_upper its 95 % confidence bound over samples; worst_sample: the
    largest of one sample; max_abs: of one entry; cosine: mean over samples. top1 (share of rows whose largest entry
    stays) and kl (mean divergence of the rows as distributions, in nats) are None where rows have less than two
    entries. For an output without floats only `differing` is set: the share of entries that differ. finite: no new
    NaN or infinity.
    """

    rel_l2: float | None = None
    worst_sample: float | None = None
    max_abs: float | None = None
    cosine: float | None = None
    top1: float | None = None
    kl: float | None = None
    differing: float | None = None
    rel_l2_upper: float | None = None
    finite: bool = True

    def bound(self, metric: Metric) -> float:
        """The change with confidence: its upper bound over samples where there is one, else the change itself."""
        change = self.change(metric)
        bounded = metric == "rel-l2" and self.rel_l2_upper is not None and self.finite
        return max(change, self.rel_l2_upper or 0.0) if bounded else change

    def change(self, metric: Metric) -> float:
        """The number that the tolerance is about: 0 where nothing changed, infinity where values were lost.

        Under `top1` and `kl` outputs without classes are judged by rel-l2; those without floats always by
        the share of entries that differ.
        """
        if not self.finite:
            return math.inf
        value = {
            "rel-l2": self.rel_l2,
            "cosine": None if self.cosine is None else 1 - self.cosine,
            "top1": None if self.top1 is None else 1 - self.top1,
            "kl": self.kl,
            "max-abs": self.max_abs,
        }[metric]
        found = (value, self.rel_l2, self.differing)
        return next((max(number, 0.0) for number in found if number is not None), 0.0)


@dataclass(frozen=True)
class Verification:
    """Whether all outputs stay within the tolerance. reason: why not, in words."""

    passed: bool
    metric: Metric
    tolerance: float
    outputs: Mapping[str, OutputChange]
    reason: str | None = None

    @property
    def largest(self) -> float:
        """Change of the output that changed most, by the metric; infinity where nothing was compared."""
        return max((change.change(self.metric) for change in self.outputs.values()), default=math.inf)

    @property
    def bound(self) -> float:
        """The same with confidence."""
        return max((change.bound(self.metric) for change in self.outputs.values()), default=math.inf)


def compare_outputs(
    batches: Iterable[tuple[Outputs, Outputs]], metric: Metric, tolerance: float
) -> Verification:
    """Compare outputs by name over batches of (reference, candidate)."""
    sums: dict[str, _Sums] = {}
    for reference, candidate in batches:
        for name, expected in reference.items():
            sums.setdefault(name, _Sums()).add(_array(expected), _array(candidate.get(name)))
    return judge({name: item.result() for name, item in sums.items()}, metric, tolerance)


def judge(outputs: Mapping[str, OutputChange], metric: Metric, tolerance: float) -> Verification:
    """Whether the changes are within the tolerance."""
    if not outputs:
        return Verification(False, metric, tolerance, outputs, "nothing was compared: no samples")
    worst = max(outputs, key=lambda name: outputs[name].change(metric))
    change = outputs[worst].change(metric)
    if change <= tolerance:
        return Verification(True, metric, tolerance, outputs)
    lost = "" if outputs[worst].finite else " (its shape differs, or it has new NaN or infinity)"
    reason = f"output {worst!r} changes by {change:.3g} in {metric}, more than {tolerance:.3g}{lost}"
    return Verification(False, metric, tolerance, outputs, reason)


@dataclass
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, values: Array) -> None:
        self.total += float(values.sum())
        self.count += values.size

    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass
class _Sums:
    """Running sums of one output."""

    difference: float = 0.0
    reference: float = 0.0
    moments: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Sums over samples of squared differences squared, times squared references, and of those squared."""
    samples: int = 0
    worst: float = 0.0
    max_abs: float = 0.0
    floating: bool = False
    finite: bool = True
    cosine: _Mean = field(default_factory=_Mean)
    top1: _Mean = field(default_factory=_Mean)
    kl: _Mean = field(default_factory=_Mean)
    differing: _Mean = field(default_factory=_Mean)

    def add(self, expected: Array, got: Array) -> None:
        if expected.shape != got.shape or expected.dtype != got.dtype:
            self.finite = False
        elif _is_float(expected):
            self.floating = True
            self._add_floats(expected.astype(np.float64), got.astype(np.float64))
        else:
            self.differing.add(np.asarray(expected != got, dtype=bool))

    def _add_floats(self, expected: Array, got: Array) -> None:
        sound = np.isfinite(expected)
        self.finite &= bool(np.isfinite(got[sound]).all())
        sound &= np.isfinite(got)
        a, b = np.where(sound, expected, 0.0), np.where(sound, got, 0.0)
        if not a.size:
            return
        rows_a, rows_b = a.reshape(len(a) if a.ndim else 1, -1), b.reshape(len(b) if b.ndim else 1, -1)
        difference, reference = ((rows**2).sum(axis=1) for rows in (rows_b - rows_a, rows_a))
        self.difference += float(difference.sum())
        self.reference += float(reference.sum())
        products = (difference @ difference, difference @ reference, reference @ reference)
        self.moments = tuple(a + float(b) for a, b in zip(self.moments, products, strict=True))  # type: ignore[assignment]
        self.samples += len(difference)
        self.worst = max(self.worst, float(_ratio(np.sqrt(difference), np.sqrt(reference), math.inf).max()))
        self.max_abs = max(self.max_abs, float(np.abs(b - a).max()))
        lengths = np.sqrt(reference) * np.sqrt((rows_b**2).sum(axis=1))
        same = (difference == 0).astype(np.float64)
        self.cosine.add(np.where(lengths > 0, _ratio((rows_a * rows_b).sum(axis=1), lengths, 0.0), same))
        if a.ndim > 1 and a.shape[-1] > 1:
            self.top1.add(a.argmax(axis=-1) == b.argmax(axis=-1))
            self.kl.add(_divergence(a, b))

    def result(self) -> OutputChange:
        if not self.floating:
            return OutputChange(differing=self.differing.value(), finite=self.finite)
        relative = _ratio(np.sqrt([self.difference]), np.sqrt([self.reference]), math.inf)
        return OutputChange(
            rel_l2=float(relative[0]),
            worst_sample=self.worst,
            max_abs=self.max_abs,
            cosine=self.cosine.value(),
            top1=self.top1.value(),
            kl=self.kl.value(),
            rel_l2_upper=self._upper(),
            finite=self.finite,
        )

    def _upper(self) -> float | None:
        """Upper confidence bound of ‖Δ‖/‖y‖: that of a ratio of sums over samples, by linearisation (Cochran 1977)."""
        if self.samples < 2 or not self.reference > 0:
            return None
        ratio = self.difference / self.reference
        dd, dr, rr = self.moments
        spread = max(dd - 2 * ratio * dr + ratio**2 * rr, 0.0) * self.samples / (self.samples - 1)
        return math.sqrt(ratio + CONFIDENCE * math.sqrt(spread) / self.reference)


def _ratio(numerator: Array, denominator: Array, without: float) -> Array:
    """numerator / denominator; where that is 0: 0 for 0, else `without`."""
    empty = np.where(numerator == 0, 0.0, without)
    result: Array = np.divide(numerator, denominator, out=empty, where=denominator > 0)
    return result


def _divergence(a: Array, b: Array) -> Array:
    """Kullback-Leibler divergence of rows b from rows a (last axis), as distributions.

    Rows of logits go through softmax; where all of `a` already are probabilities, they are taken as they are.
    """
    if (a >= 0).all() and np.allclose(a.sum(axis=-1), 1, atol=1e-3):
        a, b = (np.log(np.maximum(rows, 1e-30)) for rows in (a, b))
    log_a, log_b = log_softmax(a, axis=-1), log_softmax(b, axis=-1)
    divergence: Array = (np.exp(log_a) * (log_a - log_b)).sum(axis=-1)
    return divergence


def _is_float(array: Array) -> bool:
    return array.dtype.kind == "f" or array.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")


def _array(value: Any) -> Array:
    """An output as an array: those that are sequences or maps become arrays of objects."""
    return value if isinstance(value, np.ndarray) else np.array(value, dtype=object)
