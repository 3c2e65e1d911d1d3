"""What to make smaller first: cost against harm, over everything that can be made smaller at once.

A *knob* is one thing that comes in sizes: the units of an axis group, the rank of a site, the width of heads. For each
of its levels it says how much the outputs are predicted to change (squares, which add up over knobs), and the sites
that it belongs to say what they cost. `descend` turns the knob, to the level, that saves most for the harm it adds,
again and again: the steepest way down the convex hull, so that cheap layers pay for dear ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Sizes = NDArray[np.intp]

Price = Callable[[int, int, int, int | None], float]
"""Cost of one block for so many rows of x, with k rows and n columns, whole or with a rank between two products."""


@dataclass(frozen=True)
class Key:
    """Which knob of a region: units of a group, rank of the site at a position or of the correction beside its blocks,
    heads of a pair of sites."""

    region: str
    kind: Literal["units", "rank", "correction", "heads"]
    at: int


@dataclass(frozen=True)
class Knob:
    """sizes: [L, G] units kept, or rank, of each block at each level; level 0 is what stands.

    harm: [L] predicted squared change of the outputs. toll: [L] what a level costs beside its sites.
    """

    key: Key
    sizes: Sizes
    harm: Array
    toll: Array


@dataclass(frozen=True)
class Work:
    """One site: the knobs (or fixed sizes [G]) of its rows and its columns, and those of its rank and of the correction
    beside its blocks if it has them."""

    rows: Key | tuple[int, ...]
    columns: Key | tuple[int, ...]
    rank: Key
    rows_of_x: int
    blocks: int
    correction: Key | None = None

    @property
    def keys(self) -> Iterator[Key]:
        """Its knobs."""
        for key in (self.rows, self.columns, self.rank, self.correction):
            if isinstance(key, Key):
                yield key


@dataclass
class Descent:
    """The levels so far, what they cost and what harm they add."""

    knobs: Mapping[Key, Knob]
    works: Sequence[Work]
    price: Price
    levels: dict[Key, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.price = cache(self.price)
        self.levels = dict.fromkeys(self.knobs, 0)
        self._lists = {key: knob.sizes.tolist() for key, knob in self.knobs.items()}
        self._touching: dict[Key, list[Work]] = {key: [] for key in self.knobs}
        for work in self.works:
            for key in work.keys:
                if key in self.knobs:
                    self._touching[key].append(work)

    @property
    def cost(self) -> float:
        return sum(self._cost(work) for work in self.works) + sum(
            float(knob.toll[self.levels[key]]) for key, knob in self.knobs.items()
        )

    @property
    def harm(self) -> float:
        return sum(float(knob.harm[self.levels[key]]) for key, knob in self.knobs.items())

    def run(self, allowed: float, least: float) -> None:
        """Go down until the harm would be more than `allowed`, or the cost is `least` or under it."""
        cost, harm = self.cost, self.harm
        found = {key: self._best(key, allowed - harm) for key in self.knobs}
        while cost > least:
            key = max(found, key=lambda key: found[key][0], default=None)
            if key is None or found[key][0] <= 0:
                return
            _, level, saved, added = found[key]
            if cost - saved < least:  # no further than was asked for
                level, saved, added = self._nearest(key, level, cost - least)
            if added > allowed - harm:  # what fitted when it was looked at no longer does
                found[key] = self._best(key, allowed - harm)
                continue
            self.levels[key], cost, harm = level, cost - saved, harm + added
            for other in self._neighbours(key):
                found[other] = self._best(other, allowed - harm)

    def _nearest(self, key: Key, level: int, wanted: float) -> tuple[int, float, float]:
        """The first level up to this one that saves as much as is wanted, with its savings and the harm it adds."""
        knob, now = self.knobs[key], self.levels[key]
        for nearer in range(now + 1, level + 1):
            saved = self._saved(key, nearer)
            if saved >= wanted:
                break
        return nearer, saved, float(knob.harm[nearer] - knob.harm[now])

    def _saved(self, key: Key, level: int) -> float:
        """What turning one knob to a level takes off the cost."""
        knob, now = self.knobs[key], self.levels[key]
        before = sum(self._cost(work) for work in self._touching[key]) + float(knob.toll[now])
        self.levels[key] = level
        after = sum(self._cost(work) for work in self._touching[key]) + float(knob.toll[level])
        self.levels[key] = now
        return before - after

    def _best(self, key: Key, room: float) -> tuple[float, int, float, float]:
        """Savings for the harm added, level, savings and harm of the best turn of one knob; 0 for none."""
        knob, now = self.knobs[key], self.levels[key]
        best = (0.0, now, 0.0, 0.0)
        for level in range(now + 1, len(knob.harm)):
            added = float(knob.harm[level] - knob.harm[now])
            if added > room:
                break
            saved = self._saved(key, level)
            ratio = saved / max(added, 1e-30)
            if saved > 0 and ratio >= best[0]:
                best = (ratio, level, saved, added)
        return best

    def _neighbours(self, key: Key) -> set[Key]:
        found = {key}
        for work in self._touching[key]:
            found.update(work.keys)
        return found & set(self.knobs)

    def _cost(self, work: Work) -> float:
        ks, ns = self._sizes(work.rows, work.blocks), self._sizes(work.columns, work.blocks)
        ranks = self._lists[work.rank][self.levels[work.rank]] if work.rank in self.knobs else None
        total = 0.0
        for block, (k, n) in enumerate(zip(ks, ns, strict=True)):
            total += self.price(work.rows_of_x, k, n, None if ranks is None else ranks[block])
        if work.correction is not None and work.correction in self.knobs:
            (rank,) = self._lists[work.correction][self.levels[work.correction]]
            if rank:
                total += self.price(work.rows_of_x, sum(ks), rank, None)
                total += self.price(work.rows_of_x, rank, sum(ns), None)
        return total

    def _sizes(self, axis: Key | tuple[int, ...], blocks: int) -> Sequence[int]:
        sizes = self._lists[axis][self.levels[axis]] if isinstance(axis, Key) else axis
        return sizes if len(sizes) == blocks else [sum(sizes)]  # a dense layer beside one in blocks


def size_levels(size: int, multiple: int, least: int = 1, count: int = 96) -> Sizes:
    """Sizes to choose from, from `size` down to `least`, evenly in their logarithm; large ones in multiples."""
    if size <= least:
        return np.array([size], np.intp)
    wanted = np.geomspace(size, least, count)
    rounded = np.where(wanted > multiple, np.round(wanted / multiple) * multiple, np.round(wanted))
    rounded[0] = size
    return np.unique(np.clip(rounded, least, size).astype(np.intp))[::-1]
