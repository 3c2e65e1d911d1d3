"""Plain ways to make a model smaller, which the plan has to beat: one share for every layer, nothing refitted.

Hidden units go by the size of their weights, |column of W_in| |row of W_out|, or as in Wanda (Sun et al. 2023) by
|row of W_out| and how much their activation varies; the mean of what goes is folded into the bias (An et al. 2023). Or
every site is written with fewer singular values: those of W itself, or of C^(1/2) W for what the model, rewritten so
far, feeds it (Wang et al. 2024, SVD-LLM). Each gives maps to feed the probe with, and sizes to count FLOPs by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onnx_decomp.axes import Region
from onnx_decomp.passes.compensation import Refitted
from onnx_decomp.passes.folding import partition
from onnx_decomp.passes.plans import Part
from onnx_decomp.passes.ridge import factored, masked
from onnx_decomp.passes.search import Search
from onnx_decomp.program import DROPPED, Labels
from onnx_decomp.sites import Affine

Array = NDArray[np.float64]
Method = Literal["magnitude", "wanda", "svd", "whitened-svd"]

METHODS: tuple[Method, ...] = ("magnitude", "wanda", "svd", "whitened-svd")

SMALL = 32
"""Sites with fewer rows or columns, such as an output layer of few classes, are left dense by either SVD: every rank
counts there, and there is next to nothing to save."""

HALVINGS = 14


def unit_scores(
    region: Region, affine: Sequence[Affine], variances: Sequence[Array] | None
) -> dict[int, Array]:
    """What each unit of a hidden group counts for. variances: of each site's inputs (Wanda); None: by weights alone."""
    found: dict[int, Array] = {}
    for group in sorted(region.elastic):
        size = region.groups[group].size
        incoming, outgoing = np.zeros(size), np.zeros(size)
        for at, (read, written) in enumerate(region.ends):
            squares = affine[at].weight.astype(np.float64) ** 2
            if read == group:
                varied = squares.sum(axis=1) * (1.0 if variances is None else variances[at])
                np.add.at(outgoing, region.units[at][0], varied)
            if written == group:
                np.add.at(incoming, region.units[at][1], squares.sum(axis=0))
        if outgoing.any() and incoming.any():
            found[group] = np.sqrt(outgoing if variances is not None else outgoing * incoming)
    return found


def best_units(scores: Mapping[int, Array], share: float, multiple: int) -> dict[int, NDArray[np.bool_]]:
    """The units that stay where every group keeps the same share of its own."""
    kept = {}
    for group, score in scores.items():
        count = _rounded(share * len(score), len(score), multiple)
        kept[group] = np.zeros(len(score), bool)
        kept[group][np.argsort(-score, kind="stable")[:count]] = True
    return {group: stays for group, stays in kept.items() if not stays.all()}


def uniform_ranks(region: Region, share: float, multiple: int) -> dict[int, tuple[int, ...]]:
    """Rank of each site whose two products take the same share of its multiplications."""
    matrices = [site.matrix for site in region.sites]
    found: dict[int, tuple[int, ...]] = {}
    for at, site in enumerate(region.sites):
        k, n = site.shape
        if matrices.count(site.matrix) == 1 and min(k, n) >= SMALL and share < 1:
            found[at] = (_rounded(share * k * n / (k + n), min(k, n), multiple),)
    return found


def _rounded(wanted: float, limit: int, multiple: int) -> int:
    """Down to a multiple where that is not nothing; at least 1."""
    count = int(wanted + 1e-9)
    return min(max(count // multiple * multiple if count > multiple else count, 1), limit)


def pruned(
    region: Region, affine: Sequence[Affine], means: Sequence[Array], keep: Mapping[int, NDArray[np.bool_]]
) -> Part:
    """A region without some hidden units. means: of each site's inputs, folded into its bias where they go."""
    part = Part(region, keep=keep)
    made = [
        _without(old, mean, rows, columns)
        for old, mean, (rows, columns) in zip(affine, means, partition(region, part.segments), strict=True)
    ]
    return _placed(part, made)


def _without(affine: Affine, mean: Array, rows: Labels, columns: Labels) -> Affine:
    made, gone = masked(affine, rows, columns), rows == DROPPED
    if not gone.any():
        return made
    lost = np.where(columns == DROPPED, 0.0, mean[gone] @ affine.weight[gone].astype(np.float64))
    return Affine(made.weight, ((0.0 if made.bias is None else made.bias) + lost).astype(np.float32))


def _placed(part: Part, made: Sequence[Affine]) -> Part:
    errors = (0.0,) * len(made)
    refitted = Refitted(tuple(made), tuple(made), errors, errors)
    return Part(part.region, (), part.keep, part.ranks, refitted=refitted)


def truncated(left: Array, right: Array, rank: int) -> NDArray[np.float32]:
    """U diag(s) [K, m] times V' [m, N], of the leading singular values alone."""
    return (left[:, :rank] @ right[:rank]).astype(np.float32)


@dataclass
class Baselines:
    """The regions of a search made smaller in plain ways. cost: what parts cost, 1 for the dense model."""

    search: Search
    cost: Callable[[Sequence[Part]], float]
    multiple: int = 1
    _scores: dict[tuple[Method, str], dict[int, Array]] = field(default_factory=dict)
    _decomposed: dict[int, tuple[Array, Array]] = field(default_factory=dict)

    def parts(self, method: Method, ratio: float) -> list[Part] | None:
        """All regions at the largest common share whose cost is not above the ratio; None where none is so small."""
        share = self._share(lambda share: self._sizes(method, share), ratio)
        if share is None:
            return None
        sized = self._sizes(method, share)
        if method in ("magnitude", "wanda"):
            return [self._pruned(part) for part in sized]
        return (
            self._whitened(sized) if method == "whitened-svd" else [self._truncated(part) for part in sized]
        )

    def _share(self, sized: Callable[[float], Sequence[Part]], ratio: float) -> float | None:
        low, high = 0.0, 1.0
        if self.cost(sized(low)) > ratio:
            return None
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost(sized(middle)) <= ratio else (low, middle)
        return low

    def _sizes(self, method: Method, share: float) -> list[Part]:
        """The regions with what stays of them, without affine maps."""
        regions = self.search.regions
        if method in ("svd", "whitened-svd"):
            return [Part(each, ranks=uniform_ranks(each, share, self.multiple)) for each in regions]
        scores = [self._scored(method, region) for region in regions]
        kept = [best_units(each, share, self.multiple) for each in scores]
        return [Part(region, keep=keep) for region, keep in zip(regions, kept, strict=True)]

    def _scored(self, method: Method, region: Region) -> dict[int, Array]:
        if (method, region.name) not in self._scores:
            variances = None
            if method == "wanda":
                calibrator = self.search.calibrator(region, {})
                variances = [calibrator.moments("fit", site, {}).xx.diagonal() for site in region.sites]
            self._scores[method, region.name] = unit_scores(region, self._affine(region), variances)
        return self._scores[method, region.name]

    def _affine(self, region: Region) -> list[Affine]:
        return [self.search.program.affine(site) for site in region.sites]

    def _pruned(self, part: Part) -> Part:
        if part.dense:
            return part
        calibrator = self.search.calibrator(part.region, {})
        means = [calibrator.moments("fit", site, {}).mean_x for site in part.region.sites]
        return pruned(part.region, self._affine(part.region), means, part.keep)

    def _truncated(self, part: Part) -> Part:
        made = self._affine(part.region)
        for at, (rank,) in part.ranks.items():
            index = part.region.sites[at].index
            if index not in self._decomposed:
                left, values, right = np.linalg.svd(made[at].weight.astype(np.float64), full_matrices=False)
                self._decomposed[index] = left * values, right
            if rank < min(made[at].weight.shape):
                made[at] = Affine(truncated(*self._decomposed[index], rank), made[at].bias)
        return part if part.dense else _placed(part, made)

    def _whitened(self, parts: Sequence[Part]) -> list[Part]:
        """Each site in graph order, for what the sites before it feed it as they are written."""
        upstream: dict[int, Affine] = {}
        found = []
        for part in parts:
            if not part.dense:
                part = self._whitened_part(part, upstream)
            upstream |= part.placed
            found.append(part)
        return found

    def _whitened_part(self, part: Part, upstream: Mapping[int, Affine]) -> Part:
        calibrator = self.search.calibrator(part.region, upstream)
        made, placed = self._affine(part.region), dict(upstream)
        spans = partition(part.region, part.segments)
        for at, site in enumerate(part.region.sites):
            if at in part.ranks:
                moments = calibrator.moments("fit", site, placed)
                made[at] = factored(moments, made[at], *spans[at], part.ranks[at], None)
            placed[site.index] = made[at]
        return _placed(part, made)
