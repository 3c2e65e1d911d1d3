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

from onnx_decomp.options import Metric, Options, OwnLimit

CONFIDENCE = 1.645
"""Standard errors of a one-sided 95 % bound."""

NOISE = 1e-6
"""Relative L2 change up to which an output moved by nothing but rounding."""

Array = NDArray[Any]
Outputs = Mapping[str, Any]


@dataclass(frozen=True)
class OutputChange:
    """Change of one output over all samples; the first axis counts samples.

    rel_l2: ‖Δ‖/‖y‖ over everything; worst_sample: the largest of one sample; max_abs: of one entry; cosine: mean over
    samples. top1 (share of rows whose largest entry stays) and kl (mean divergence of the rows as distributions, in
    nats) are None where rows have less than two entries. For an output without floats only `differing` is set: the
    share of entries that differ. finite: no new NaN or infinity. *_upper and *_lower: 95 % confidence bounds over
    samples, on the side of more change; None where one sample, or none, can't tell.
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
    cosine_lower: float | None = None
    top1_lower: float | None = None
    kl_upper: float | None = None

    def bound(self, metric: Metric) -> float:
        """The change with confidence: its upper bound over samples where there is one, else the change itself.

        No bound is known of the largest change of an entry, nor taken of outputs without floats. Where an output
        moved by rounding alone, few samples are no reason to fear for its winners.
        """
        change = self.change(metric)
        if not self.finite or (metric == "top1" and (self.rel_l2 or 0.0) <= NOISE):
            return change
        measured = {"cosine": self.cosine, "top1": self.top1, "kl": self.kl, "max-abs": self.max_abs}
        of = metric if measured.get(metric) is not None else "rel-l2"
        upper = {
            "rel-l2": self.rel_l2_upper,
            "cosine": None if self.cosine_lower is None else 1 - self.cosine_lower,
            "top1": None if self.top1_lower is None else 1 - self.top1_lower,
            "kl": self.kl_upper,
            "max-abs": None,
        }[of]
        return change if upper is None else max(change, upper)

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
class Limits:
    """What each output may change by: `metric` and `tolerance`, but for those that have their own."""

    metric: Metric
    tolerance: float
    own: tuple[OwnLimit, ...] = ()
    """(output, metric, tolerance), None where it is that of all."""

    @classmethod
    def asked(cls, options: Options) -> Limits:
        """What the options ask for; nothing but lost values fails where a score decides instead (--evaluate)."""
        tolerance = options.tolerance if options.evaluate is None else math.inf
        return cls(options.metric, tolerance, options.limits)

    def of(self, output: str) -> tuple[Metric, float]:
        """Metric and tolerance of one output."""
        for name, metric, tolerance in self.own:
            if name == output:
                return metric or self.metric, self.tolerance if tolerance is None else tolerance
        return self.metric, self.tolerance

    def widened(self, by: Mapping[str, float]) -> Limits:
        """With so much more for outputs that have limits of their own; all others get the largest of theirs."""
        own = tuple((name, *self.of(name)) for name, _, _ in self.own)
        named = {name for name, _, _ in own}
        rest = max((more for name, more in by.items() if name not in named), default=0.0)
        wider = tuple((name, metric, tolerance + by.get(name, 0.0)) for name, metric, tolerance in own)
        return Limits(self.metric, self.tolerance + rest, wider)


@dataclass(frozen=True)
class Verification:
    """Whether every output stays within its own tolerance. reason: why not, in words."""

    passed: bool
    limits: Limits
    outputs: Mapping[str, OutputChange]
    reason: str | None = None

    @property
    def metric(self) -> Metric:
        """Of all outputs without one of their own."""
        return self.limits.metric

    @property
    def tolerance(self) -> float:
        """Of all outputs without one of their own."""
        return self.limits.tolerance

    @property
    def changes(self) -> dict[str, float]:
        """Of every output by its own metric."""
        return {name: change.change(self.limits.of(name)[0]) for name, change in self.outputs.items()}

    @property
    def largest(self) -> float:
        """Change of the output that changed most, each by its own metric; infinity where nothing was compared."""
        return max(self.changes.values(), default=math.inf)

    @property
    def bound(self) -> float:
        """The same with confidence."""
        bounds = (change.bound(self.limits.of(name)[0]) for name, change in self.outputs.items())
        return max(bounds, default=math.inf)

    @property
    def spent(self) -> float:
        """Largest share of an output's own tolerance that is used up, with confidence.

        Infinity where values were lost or nothing was compared.
        """
        shares = []
        for name, change in self.outputs.items():
            metric, tolerance = self.limits.of(name)
            shares.append(_share(change.bound(metric), tolerance) if change.finite else math.inf)
        return max(shares, default=math.inf)


def compare_outputs(
    batches: Iterable[tuple[Outputs, Outputs]], limits: Limits | Metric, tolerance: float = math.inf
) -> Verification:
    """Compare outputs by name over batches of (reference, candidate).

    limits: of each output, or one metric for all with its `tolerance`; without that nothing but lost values fails.
    """
    sums: dict[str, _Sums] = {}
    for reference, candidate in batches:
        for name, expected in reference.items():
            sums.setdefault(name, _Sums()).add(_array(expected), _array(candidate.get(name)))
    return judge({name: item.result() for name, item in sums.items()}, limits, tolerance)


def judge(
    outputs: Mapping[str, OutputChange], limits: Limits | Metric, tolerance: float = math.inf
) -> Verification:
    """Whether the changes are within the tolerances."""
    if not isinstance(limits, Limits):
        limits = Limits(limits, tolerance)
    if not outputs:
        return Verification(False, limits, outputs, "nothing was compared: no samples")
    shares = {}
    for name, change in outputs.items():
        metric, allowed = limits.of(name)
        shares[name] = _share(change.change(metric), allowed) if change.finite else math.inf
    worst = max(shares, key=lambda name: shares[name])
    if shares[worst] <= 1:
        return Verification(True, limits, outputs)
    metric, allowed = limits.of(worst)
    amount = outputs[worst].change(metric)
    lost = "" if outputs[worst].finite else " (its shape differs, or it has new NaN or infinity)"
    reason = f"output {worst!r} changes by {amount:.3g} in {metric}, more than {allowed:.3g}{lost}"
    return Verification(False, limits, outputs, reason)


def wilson(share: float, samples: float) -> float:
    """Upper 95 % bound of a share seen in so many independent samples; above 0 even where it was never seen."""
    squared = CONFIDENCE**2
    spread = CONFIDENCE * math.sqrt(samples * share * (1 - share) + squared / 4)
    return min(1.0, (samples * share + squared / 2 + spread) / (samples + squared))


def _share(change: float, tolerance: float) -> float:
    """Change over tolerance, 0 where that has no end."""
    if change == 0 or tolerance == math.inf:
        return 0.0
    return change / tolerance if tolerance > 0 and math.isfinite(change) else math.inf


@dataclass
class _Ratio:
    """A ratio of two sums over samples, and how far it may be off (linearised, Cochran 1977)."""

    upper: float = 0.0
    lower: float = 0.0
    squares: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Sums over samples of upper squared, upper times lower, and lower squared."""
    samples: int = 0

    def add(self, upper: Array, lower: Array) -> None:
        """One value of each for each sample."""
        self.upper += float(upper.sum())
        self.lower += float(lower.sum())
        products = (upper @ upper, upper @ lower, lower @ lower)
        self.squares = tuple(a + float(b) for a, b in zip(self.squares, products, strict=True))  # type: ignore[assignment]
        self.samples += len(upper)

    def add_rows(self, values: Array) -> None:
        """Values [samples, ...] of rows, whose mean is meant; the rows of one sample are not independent."""
        rows = values.reshape(len(values), -1).astype(np.float64)
        self.add(rows.sum(axis=1), np.full(len(rows), float(rows.shape[1])))

    def value(self) -> float | None:
        return self.upper / self.lower if self.lower > 0 else None

    def error(self) -> float | None:
        """Standard error of the ratio over samples."""
        if self.samples < 2 or not self.lower > 0:
            return None
        ratio = self.upper / self.lower
        uu, ul, ll = self.squares
        spread = max(uu - 2 * ratio * ul + ratio**2 * ll, 0.0) * self.samples / (self.samples - 1)
        return math.sqrt(spread) / self.lower

    def bound(self) -> float | None:
        """Upper 95 % bound."""
        value, error = self.value(), self.error()
        return None if value is None or error is None else value + CONFIDENCE * error

    def share_bound(self) -> float | None:
        """The same for a share of rows, with sense where it is 0 or nearly so: Wilson's.

        It takes the number of independent rows that would show the same spread over samples: all of them if errors
        fall anywhere, no less than the samples if each sample is right or wrong as a whole. Where no error was
        seen, they are taken to fall anywhere.
        """
        value, error = self.value(), self.error()
        if value is None or error is None:
            return None
        rows = value * (1 - value) / error**2 if error > 0 else self.lower
        return wilson(value, min(max(rows, float(self.samples)), self.lower))


@dataclass
class _Sums:
    """Running sums of one output."""

    change: _Ratio = field(default_factory=_Ratio)
    """Squared differences over squared references."""
    worst: float = 0.0
    max_abs: float = 0.0
    floating: bool = False
    finite: bool = True
    turned: _Ratio = field(default_factory=_Ratio)
    """1 - cosine of samples."""
    moved: _Ratio = field(default_factory=_Ratio)
    """Rows with another winner."""
    divergence: _Ratio = field(default_factory=_Ratio)
    differing: tuple[int, int] = (0, 0)
    """Entries that differ, of so many."""

    def add(self, expected: Array, got: Array) -> None:
        if expected.shape != got.shape or expected.dtype != got.dtype:
            self.finite = False
        elif _is_float(expected):
            self.floating = True
            self._add_floats(expected.astype(np.float64), got.astype(np.float64))
        else:
            different = np.asarray(expected != got, dtype=bool)
            self.differing = (self.differing[0] + int(different.sum()), self.differing[1] + different.size)

    def _add_floats(self, expected: Array, got: Array) -> None:
        sound = np.isfinite(expected)
        self.finite &= bool(np.isfinite(got[sound]).all())
        sound &= np.isfinite(got)
        a, b = np.where(sound, expected, 0.0), np.where(sound, got, 0.0)
        if not a.size:
            return
        rows_a, rows_b = a.reshape(len(a) if a.ndim else 1, -1), b.reshape(len(b) if b.ndim else 1, -1)
        difference, reference = ((rows**2).sum(axis=1) for rows in (rows_b - rows_a, rows_a))
        self.change.add(difference, reference)
        self.worst = max(self.worst, float(_ratio(np.sqrt(difference), np.sqrt(reference), math.inf).max()))
        self.max_abs = max(self.max_abs, float(np.abs(b - a).max()))
        lengths = np.sqrt(reference) * np.sqrt((rows_b**2).sum(axis=1))
        same = (difference == 0).astype(np.float64)
        cosine = np.where(lengths > 0, _ratio((rows_a * rows_b).sum(axis=1), lengths, 0.0), same)
        self.turned.add_rows(1 - cosine)
        if a.ndim > 1 and a.shape[-1] > 1:
            self.moved.add_rows(a.argmax(axis=-1) != b.argmax(axis=-1))
            self.divergence.add_rows(_divergence(a, b))

    def result(self) -> OutputChange:
        if not self.floating:
            different, entries = self.differing
            return OutputChange(differing=different / entries if entries else None, finite=self.finite)
        relative = _ratio(np.sqrt([self.change.upper]), np.sqrt([self.change.lower]), math.inf)
        rel_l2_upper = self.change.bound()
        return OutputChange(
            rel_l2=float(relative[0]),
            worst_sample=self.worst,
            max_abs=self.max_abs,
            cosine=_rest(self.turned.value()),
            top1=_rest(self.moved.value()),
            kl=self.divergence.value(),
            rel_l2_upper=None if rel_l2_upper is None else math.sqrt(rel_l2_upper),
            finite=self.finite,
            cosine_lower=_rest(self.turned.bound()),
            top1_lower=_rest(self.moved.share_bound()),
            kl_upper=self.divergence.bound(),
        )


def _rest(share: float | None) -> float | None:
    return None if share is None else 1 - share


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
