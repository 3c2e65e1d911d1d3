"""What every region is in a plan: blocks, units that stay, ranks, widths of heads, corrections."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from onnx_decomp.axes import Region
from onnx_decomp.passes.compensation import Refitted
from onnx_decomp.passes.folding import Keep, compose
from onnx_decomp.passes.heads import Turn, turned_importance
from onnx_decomp.passes.knobs import HeadKnob, UnitKnob
from onnx_decomp.passes.tradeoff import Descent, Key
from onnx_decomp.program import Segment, Structure
from onnx_decomp.sites import Affine

Array = NDArray[np.float64]

GENEROUS = 0.8
"""Cost of a correction beside blocks over that of the dense matrix, where a search starts with it."""


@dataclass(frozen=True)
class Part:
    """What one region is in a plan. refitted: None while it is as the original has it.

    keep: elements that stay, by group. ranks: of each block, by position of a site. corrections: rank of the map
    beside a site's blocks, by its position.
    """

    region: Region
    structures: tuple[Structure, ...] = ()
    keep: Keep = field(default_factory=dict)
    ranks: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    corrections: Mapping[int, int] = field(default_factory=dict)
    refitted: Refitted | None = None
    harm: float = 0.0
    """Its share of the predicted loss (`Judge.loss`)."""
    importance: Sequence[Array | None] = ()
    """S of each site, as it stood before the last step."""
    heads: Mapping[int, Turn] = field(default_factory=dict)
    """The bases in which heads are narrower, by number of a pair."""

    @property
    def dense(self) -> bool:
        return not (self.structures or self.keep or self.ranks or self.heads)

    @property
    def segments(self) -> tuple[Segment, ...]:
        composed = compose(self.region, self.structures, self.keep)
        heads = {number: turn.width for number, turn in self.heads.items()}
        return tuple(
            replace(
                segment,
                ranks={at: self.ranks[at] for at in segment.sites if at in self.ranks},
                corrections={at: rank for at in segment.sites if (rank := self.corrections.get(at, 0))},
                heads=heads,
            )
            for segment in composed
        )

    @property
    def placed(self) -> dict[int, Affine]:
        """Affine maps as the original graph is fed with them, by index of the site."""
        if self.refitted is None:
            return {}
        return {s.index: fed for s, fed in zip(self.region.sites, self.refitted.placed, strict=True)}


@dataclass(frozen=True)
class Plan:
    """All regions, in graph order. spent: of the tolerance, measured on the select part (1: all of it).

    predicted: what was expected to be spent before it was measured; NaN for a plan that no step has made.
    """

    parts: tuple[Part, ...]
    cost: float
    spent: float
    predicted: float = float("nan")

    @property
    def harm(self) -> float:
        return sum(part.harm for part in self.parts)

    @property
    def placed(self) -> dict[int, Affine]:
        return {index: fed for part in self.parts for index, fed in part.placed.items()}


def correctable(structures: Sequence[Structure]) -> bool:
    """Corrections stand beside blocks of which every input and unit is in one; slices and windows are not."""
    return bool(structures) and not any(structure.copies for structure in structures)


def generous_corrections(region: Region, structures: Sequence[Structure]) -> dict[int, int]:
    """Ranks of corrections beside blocks, by position of a site: what the search starts from, and lowers."""
    matrices = [site.matrix for site in region.sites]
    return {
        at: max(int(GENEROUS * math.prod(region.sites[at].shape) / sum(region.sites[at].shape)), 1)
        for structure in structures
        for at in structure.sites
        if matrices.count(matrices[at]) == 1
    }


def turned_part(part: Part, descent: Descent, found: Mapping[Key, UnitKnob | HeadKnob]) -> Part:
    """A part with the levels that were chosen for it."""
    keep, ranks, corrections, harm = dict(part.keep), dict(part.ranks), dict(part.corrections), part.harm
    turns: dict[int, Turn] = {}
    for key, level in descent.levels.items():
        if key.region != part.region.name or not level:
            continue
        knob = descent.knobs[key]
        harm += float(knob.harm[level])
        detail = found.get(key)
        if isinstance(detail, UnitKnob):
            keep[key.at] = detail.kept[level]
        elif isinstance(detail, HeadKnob):
            turns[key.at] = detail.turn(level)
        elif key.kind == "correction":
            corrections[key.at] = int(knob.sizes[level][0])
        else:
            ranks[key.at] = tuple(int(rank) for rank in knob.sizes[level])
    heads = {**part.heads, **{number: turn.after(part.heads.get(number)) for number, turn in turns.items()}}
    importance = turned_importance(part.region, turns, part.importance)
    return replace(
        part,
        keep=keep,
        ranks=ranks,
        corrections=corrections,
        heads=heads,
        harm=harm,
        importance=importance,
    )
