"""Null models: the law that a weight would follow had training changed nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from onnx_decomp.errors import InternalError

Family = Literal["normal", "uniform", "truncnorm"]
Kind = Literal["snapshot", "distribution", "estimated"]

Z_MAX = 8.0
"""Normal scores are clipped here; a double holds tail probabilities well beyond it."""

_CHUNK = 1 << 20
_SAMPLE = 1 << 20
_EXCESS_KURTOSIS: dict[Family, float] = {"normal": 0.0, "truncnorm": -0.634, "uniform": -1.2}


@dataclass(frozen=True)
class Law:
    """A symmetric distribution around `mean`, in units of the weights.

    scale: the standard deviation (normal), that of the normal before it is cut (truncnorm), the half-width
        (uniform). Zero is a point mass.
    cut: where a truncnorm ends, in units of `scale`.
    """

    family: Family
    mean: float
    scale: float
    cut: float = 2.0

    def std(self) -> float:
        """Standard deviation; for truncnorm after the cut: scale sqrt(1 - 2 c phi(c) / (2 Phi(c) - 1))."""
        if self.family == "uniform":
            return self.scale / float(np.sqrt(3.0))
        if self.family == "normal":
            return self.scale
        density = float(np.exp(-0.5 * self.cut**2) / np.sqrt(2.0 * np.pi))
        lost = 2.0 * self.cut * density / (1.0 - 2.0 * float(ndtr(-self.cut)))
        return self.scale * float(np.sqrt(max(1.0 - lost, 0.0)))

    def scaled(self, factor: float) -> Law:
        """The law of `factor` times such a weight."""
        return replace(self, mean=self.mean * factor, scale=self.scale * abs(factor))

    def cdf(self, w: ArrayLike) -> NDArray[np.float64]:
        """F0(w), of any shape."""
        distance = np.asarray(w, np.float64) - self.mean
        if self.scale == 0.0:
            return np.asarray((distance >= 0.0).astype(np.float64))
        if self.family == "normal":
            return np.asarray(ndtr(distance / self.scale))
        tail = self._tail(np.minimum(np.abs(distance) / self._edge, 1.0))
        return np.where(distance < 0.0, tail, 1.0 - tail)

    def normal_scores(self, w: NDArray[Any], resolution: float = 0.0) -> NDArray[np.float32]:
        """z = Phi^-1(F0(w)), the shape of w, clipped to |z| <= Z_MAX: N(0, 1) if w follows this law.

        A bounded law gives Z_MAX beyond its edge. `resolution` is the relative rounding of stored weights:
        what rounding alone may have carried over the edge counts as just inside it.
        """
        z = np.empty(w.shape, np.float32)
        flat, out = w.reshape(-1), z.reshape(-1)
        for start in range(0, flat.size, _CHUNK):  # bounds the double precision temporaries
            part = slice(start, start + _CHUNK)
            out[part] = self._scores(flat[part].astype(np.float64) - self.mean, resolution)
        return z

    def _scores(self, distance: NDArray[np.float64], resolution: float) -> NDArray[np.float64]:
        if self.scale == 0.0:
            return Z_MAX * np.sign(distance)
        if self.family == "normal":
            return np.clip(distance / self.scale, -Z_MAX, Z_MAX)
        # Always the tail on w's own side: 1 - F would lose the digits that a score far out is made of.
        outward = np.abs(distance) / self._edge
        inside = np.where(outward <= 1.0 + resolution, np.minimum(outward, 1.0 - resolution / 2), outward)
        tail = np.maximum(self._tail(inside), 0.0)
        return np.copysign(np.minimum(-ndtri(tail), Z_MAX), distance)

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Independent draws."""
        if self.family == "normal":
            unit = rng.standard_normal(shape)
        elif self.family == "uniform":
            unit = rng.uniform(-1.0, 1.0, shape)
        else:
            unit = np.asarray(ndtri(rng.uniform(ndtr(-self.cut), ndtr(self.cut), shape)))
        return (self.mean + self.scale * unit).astype(np.float32)

    @property
    def _edge(self) -> float:
        return self.scale * self.cut if self.family == "truncnorm" else self.scale

    def _tail(self, outward: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probability, on one side, of lying beyond this share of the way to the edge of a bounded law."""
        if self.family == "uniform":
            return 0.5 * (1.0 - outward)
        beyond = ndtr(-self.cut)
        return np.asarray((ndtr(-self.cut * outward) - beyond) / (1.0 - 2.0 * beyond))


@dataclass(frozen=True)
class Null:
    """What one site's canonical W [K, N], alpha folded in, was before training.

    A *snapshot* also gives the very values by `initial()`; its law is fitted to them.
    """

    kind: Kind
    law: Law
    source: str
    """Where it comes from: file and entry, pattern, preset, or "estimated"."""
    resolution: float = float(np.finfo(np.float32).eps)
    """Relative rounding of the stored weights."""
    read: Callable[[], NDArray[np.float32]] | None = field(default=None, repr=False, compare=False)

    def initial(self) -> NDArray[np.float32]:
        """Initial W [K, N] of a snapshot, read anew each time so that few matrices are in memory."""
        if self.read is None:
            raise InternalError(f"{self.source}: a null of kind {self.kind!r} has no initial values")
        return self.read()

    def std(self) -> float:
        """Standard deviation of an untrained weight."""
        return self.law.std()

    def cdf(self, w: ArrayLike) -> NDArray[np.float64]:
        """F0(w), of any shape."""
        return self.law.cdf(w)

    def normal_scores(self, w: NDArray[Any]) -> NDArray[np.float32]:
        """z = Phi^-1(F0(w)), see `Law.normal_scores`."""
        return self.law.normal_scores(w, self.resolution)

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Weights drawn anew from the initialization."""
        return self.law.sample(rng, shape)


def fit(values: NDArray[np.float32]) -> Law:
    """The law untrained values look drawn from: the family nearest in kurtosis, their mean and deviation."""
    part = _subsample(values).astype(np.float64)
    mean, deviation = float(part.mean()), float(part.std())
    if deviation == 0.0:
        return Law("normal", mean, 0.0)
    kurtosis = float((((part - mean) / deviation) ** 4).mean()) - 3.0
    family = min(_EXCESS_KURTOSIS, key=lambda name: abs(_EXCESS_KURTOSIS[name] - kurtosis))
    return Law(family, mean, deviation / Law(family, 0.0, 1.0).std())


def estimate(values: NDArray[np.float32]) -> Law:
    """A normal law for the central mode of trained values: median, and median absolute deviation / 0.6745."""
    part = _subsample(values).astype(np.float64)
    centre = float(np.median(part))
    return Law("normal", centre, float(np.median(np.abs(part - centre))) / 0.6744897501960817)


def _subsample(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """At most a million entries, drawn evenly: enough for three digits of a scale."""
    if values.size <= _SAMPLE:
        return values.reshape(-1)
    # A stride would see only some columns where it divides their number.
    return values.reshape(-1)[np.random.default_rng(0).integers(0, values.size, _SAMPLE)]
