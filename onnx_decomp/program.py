"""The one value that flows through the passes, and the plain types that it carries.

A `Program` holds the original model, never changed, and what the passes learn about it. What will be written is an
ordered list of `Rewrite`s; the model itself is made from them by a pure patch (`onnx_decomp.passes.splitting.emit`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_decomp.axes import Region
from onnx_decomp.progress import Progress, Silent
from onnx_decomp.sites import Affine, GraphIndex, Site, read_affine

if TYPE_CHECKING:
    from onnx_decomp.calibration import Data
    from onnx_decomp.evaluation import Evaluation
    from onnx_decomp.init_stats import InitStats
    from onnx_decomp.model_io import ModelFile
    from onnx_decomp.options import Options
    from onnx_decomp.probe import Probe
    from onnx_decomp.runtime import Device

Labels = NDArray[np.int32]
"""Block of each element of an axis: 0, 1, ..., or DROPPED."""

DROPPED = -1

Form = Literal["dense", "chain", "parallel", "batched"]
Outcome = Literal["split", "low-rank", "reduced"]
"""What a rewrite does to its region, by the most that it does to any site."""


@dataclass(frozen=True)
class Evidence:
    """What the weights of one site say against their null (see docs/statistics.md).

    z: [K, N] float32 normal scores of the entries under the null: N(0, 1) where training changed nothing.
    frozen: [K, N] bool, entries that are exactly their shrunk initial value (or exactly zero), on the chosen tolerance;
        None where no exact test applies.
    """

    kind: Literal["snapshot", "distribution", "estimated"]
    z: NDArray[np.float32]
    frozen: NDArray[np.bool_] | None
    shrink: float
    """c in W = c W0 + what was learned (1 where the null has no shrink)."""
    scale: float
    """Standard deviation of an unchanged entry around its null, in units of the weights."""
    fits: bool
    """The unsupported part follows the null; nothing is decided from a null that does not fit."""
    misfit: float
    """Largest distance of the quantiles (Kolmogorov-Smirnov) of the unsupported part from the null."""
    supported: float
    """Share of entries that Benjamini-Hochberg supports at 5 %."""
    learned_rank: int
    """Singular values of the learned change above the Marchenko-Pastur edge."""
    summary: Mapping[str, float] = field(default_factory=dict)
    """Further statistics for the report: share of rows, columns and tiles that are supported, and so on."""


Copies = Mapping[int, NDArray[np.intp]]
"""By group: the original unit of each element of an axis that was dealt out anew. A unit that several blocks need has a
copy in each; one that none needs has none. A group that is not listed keeps its units as they are."""


@dataclass(frozen=True)
class Structure:
    """Independent blocks over some sites of a region (their positions in it).

    labels: for each group of those sites the block of each unit; DROPPED where nothing was learned at all.
    p: probability of as good a structure under shuffled evidence (an upper bound where it is one).
    stability: share of elements that keep their block over temperatures and seeds.
    """

    sites: tuple[int, ...]
    labels: Mapping[int, Labels]
    blocks: int
    kind: Literal["exact", "annealed", "influence"]
    p: float
    stability: float
    copies: Copies = field(default_factory=dict)

    @property
    def grouping(self) -> tuple[Labels, ...]:
        """Labels of all groups, in their order along the sites."""
        return tuple(self.labels.values())


@dataclass(frozen=True)
class Segment:
    """Sites of a region (their positions in it) that are written in one form, with one grouping.

    labels: for each of their groups the block of each element. blocks == 1 is dense, maybe reduced. Elements labelled
    DROPPED are not computed: their effect is folded into the bias.
    ranks: by position of a site the rank of each of its blocks, which is written as two thin products where that takes
    fewer multiplications (`folding.block_rank`); a site that is not listed is not factored.
    corrections: by position of a site the rank of a map beside its blocks, from everything that it reads to everything
    that it makes, written as two thin products.
    heads: by number of a pair in `Region.pairs` the width of its heads, which keep their first columns; the same in all
    segments of a region. A pair that is not listed keeps its width.
    """

    sites: tuple[int, ...]
    labels: Mapping[int, Labels]
    blocks: int
    form: Form = "dense"
    copies: Copies = field(default_factory=dict)
    ranks: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    corrections: Mapping[int, int] = field(default_factory=dict)
    heads: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Rewrite:
    """What replaces a region: dense-equivalent affine maps, zero wherever the segments say that nothing is read.

    A block that the segments factor has their rank exactly: its two sides are found from it when it is written.
    """

    region: Region
    segments: tuple[Segment, ...]
    affine: tuple[Affine, ...]
    decision: Outcome
    reason: str
    change: float = float("nan")
    """Change of the outputs on the select part, by the metric, with this and every earlier rewrite in place."""
    gain: float = 1.0
    """Predicted cost before over predicted cost after."""
    errors: tuple[tuple[float, float], ...] = ()
    """For each site the relative error of its output: on the data that it was fitted on, and on the select part."""
    placed: tuple[Affine, ...] = ()
    """The affine maps as the original graph is fed with them, where they differ (an input that several blocks read, a
    correction beside blocks)."""
    corrections: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)
    """By position of a site: the map [K, N] beside its blocks, of the rank that its segment says."""

    @property
    def fed(self) -> tuple[Affine, ...]:
        return self.placed or self.affine


@dataclass(frozen=True)
class Decision:
    """What a pass decided about a site, with the evidence as numbers.

    A reason is a stable code, explained in `reasons.REASONS`; tests assert on it.
    """

    where: str
    site: int
    verdict: Literal["applied", "declined"]
    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)


class Pass(Protocol):
    """One step of the compilation: fills in what it finds, and records a decision for every site it looked at."""

    @property
    def name(self) -> str:
        """What decisions and progress call it."""

    def run(self, program: Program) -> None:
        """Look at the program and add to it."""


@dataclass
class Program:
    """The model under compilation. Passes fill in what they find; `original` is never touched."""

    source: ModelFile
    options: Options
    index: GraphIndex
    sites: list[Site]
    regions: list[Region]
    data: Data
    progress: Progress = field(default_factory=Silent)
    init: InitStats | None = None
    evidence: dict[int, Evidence] = field(default_factory=dict)
    structures: dict[str, tuple[Structure, ...]] = field(default_factory=dict)
    """By region: blocks that the weights show."""
    slices: dict[str, Structure] = field(default_factory=dict)
    """By region: independent parts that its function shows."""
    rewrites: list[Rewrite] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    banned: dict[str, str] = field(default_factory=dict)
    """Regions that a gate has undone, with the reason; they are not planned again."""
    target: Device = "cpu"
    """The provider that it is written for."""
    provider: Device = "cpu"
    """The provider that things are measured on here: that one, if it works here."""
    timed_samples: int = 128
    """Samples of one timed run: what predicted times are for."""
    rows_per_sample: dict[int, int] = field(default_factory=dict)
    """Rows of x for one sample, by index of the site."""
    probe: Probe | None = None
    evaluation: Evaluation | None = None
    """The user's own score, where it decides instead of a metric."""
    budget: float = 1.0
    """Share of the tolerance that plans may spend; less once a gate has refused one."""
    predicted: float | None = None
    """Change of the outputs that the plan expected before its last step was measured."""
    memory: dict[str, object] = field(default_factory=dict)
    """What a pass wants to find again when it runs once more after a gate has undone something."""
    aside: Path | None = None
    """Where large tensors of what is written lie until it is saved; None: in the message itself."""
    written: onnx.ModelProto | None = None
    """What the rewrites come to, before it is measured."""
    inner: dict[str, Program] = field(default_factory=dict)
    """Bodies of If, Loop and Scan, compiled as models of their own, by where they are."""
    per_sample: float = 1.0
    """Of a body: samples of its own data for each of the model around it."""

    @property
    def original(self) -> onnx.ModelProto:
        return self.source.proto

    @property
    def kept(self) -> list[tuple[str, Rewrite]]:
        """All rewrites, those in bodies too, by the names of their regions in the whole model."""
        own = [(rewrite.region.name, rewrite) for rewrite in self.rewrites]
        return own + [
            (f"{where}/{name}", rewrite)
            for where, inner in self.inner.items()
            for name, rewrite in inner.kept
        ]

    def give_up(self, reason: str) -> None:
        """Undo everything, in bodies too."""
        self.banned |= dict.fromkeys((rewrite.region.name for rewrite in self.rewrites), reason)
        self.rewrites = []
        for inner in self.inner.values():
            inner.give_up(reason)

    def affine(self, site: Site) -> Affine:
        """Canonical weights of a site, read anew each time so that at most a few matrices are in memory."""
        return read_affine(self.index, site)

    def decide(
        self, where: str, site: Site, verdict: Literal["applied", "declined"], reason: str, **numbers: float
    ) -> None:
        self.decisions.append(Decision(where, site.index, verdict, reason, numbers))

    def reason(self, site: Site) -> Decision | None:
        """The last word on a site."""
        for decision in reversed(self.decisions):
            if decision.site == site.index:
                return decision
        return None
