"""How much each input moves each output, measured forward only, and the independent parts that this shows.

The second witness. Weights that all learned can still compute functions that have nothing to do with each other; no
test of the weights shows it, moving the inputs does. An input is moved by giving every sample the value that another
sample has (Breiman 2001), so it keeps its distribution and loses its relation to the rest. For inputs that do not
depend on each other, half of the mean squared change over the output's variance is the share of that variance that
the input takes part in, the total Sobol index (Jansen 1999).

What is found here proposes. An independent part may go its own way only where `off_influence`, on samples that were
not looked at before, bounds what it loses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from onnx_decomp.passes.partitions import elbow, one_hot
from onnx_decomp.program import DROPPED, Labels

Batch = NDArray[np.float32]
Array = NDArray[np.float64]
Indices = NDArray[np.intp]
Mask = NDArray[np.bool_]
Run = Callable[[Batch], Batch]
"""x [S, ..., K] to y [S, ..., N], whatever S is; samples do not touch each other."""
Progress = Callable[[int, int], None]

ROWS = 8192
"""Rows of x (samples times middle axes) of one run."""
ENTRIES = 1 << 23
"""Entries of x, of y or of its squared changes that are held at once."""
CONFIDENCE = 0.95
CUT = 4
"""Single fields that are tried before a group is taken apart, and the smallest group that is worth trying."""
APART = 0.75
"""Neighbouring groups meet at a border where their shares over blocks differ by this (2 at most)."""
TINY = float(np.finfo(np.float64).tiny)


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Influence:
    """What moving each field of inputs does to each output.

    energy: [F, N] mean squared change of the output, over its own variance between samples (0 where it is constant).
    error: [F, N] standard error of the energy, over samples.
    constant: [F] fields that never vary in the data: their influence is unknown, and 0 here.
    fields: [K] the field of each input, or DROPPED where it was not looked at.
    """

    energy: Array
    error: Array
    constant: Mask
    fields: Labels


def measure(
    run: Run,
    x: Batch,
    rng: np.random.Generator,
    fields: Labels | None = None,
    repeats: int = 1,
    progress: Progress | None = None,
) -> Influence:
    """Move one field after another of x [S, ..., K]; middle axes keep their positions.

    fields: [K], None for every input by itself; all inputs of a field move together, DROPPED ones never.
    Samples that a move leaves as they were are not run again, so sparse inputs cost what they hold.
    """
    labels = np.arange(x.shape[-1], dtype=np.int32) if fields is None else fields
    count = int(labels.max(initial=DROPPED)) + 1
    y = _outputs(run, x)
    variance = _variance(y)
    constant = ~np.isin(np.arange(count), labels[_varies(x)])
    energy, error = (np.zeros((count, y.shape[-1])) for _ in range(2))
    moving = np.flatnonzero(~constant)
    at_once = max(1, min(4 * ROWS // len(x), ENTRIES // (len(x) * y.shape[-1])))
    for start in range(0, len(moving), at_once):
        now = moving[start : start + at_once]
        energy[now], error[now] = _moved(run, x, y, labels, now, repeats, rng)
        if progress is not None:
            progress(min(start + at_once, len(moving)), len(moving))
    scale = np.where(variance > 0, 1 / np.maximum(variance, TINY), 0.0)
    return Influence(energy * scale, error * scale, constant, labels)


def _moved(
    run: Run, x: Batch, y: Batch, labels: Labels, fields: Indices, repeats: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Mean squared change [f, N] of the outputs for each of a few fields, and its standard error.

    The change of a sample depends on two: the one that is moved and the one that gave its value. Each sample is
    credited with both, which makes the error that of a U-statistic (Hoeffding 1948), rather too large than too small.
    """
    samples = len(x)
    mean, credit = np.zeros((len(fields), y.shape[-1])), np.zeros((len(fields), samples, y.shape[-1]))
    for _ in range(repeats):
        donors = np.stack([derangement(samples, rng) for _ in fields])
        change = _changes(run, x, y, labels, fields, donors)
        mean += change.mean(1) / repeats
        credit += (change + np.take_along_axis(change, np.argsort(donors, 1)[:, :, None], 1)) / repeats
    return mean, credit.std(1) / np.sqrt(max(samples - 1, 1))


def _changes(
    run: Run, x: Batch, y: Batch, labels: Labels, fields: Indices, donors: Indices
) -> NDArray[np.float32]:
    """Squared change [f, S, N] of every sample, averaged over middle axes, when its field comes from its donor."""
    change = np.zeros((*donors.shape, y.shape[-1]), np.float32)
    pairs = [_differing(x, labels == field, donor) for field, donor in zip(fields, donors, strict=True)]
    which = np.repeat(np.arange(len(fields)), [len(pair) for pair in pairs])
    sample = np.concatenate(pairs)
    for part in _parts(len(sample), x, y):
        f, s = which[part], sample[part]
        foreign = (labels == fields[f][:, None]).reshape(len(s), *[1] * (x.ndim - 2), -1)
        moved = run(np.where(foreign, x[donors[f, s]], x[s]))
        squared = np.square(moved - y[s])
        change[f, s] = squared.reshape(len(s), -1, squared.shape[-1]).mean(1)
    return change


def _differing(x: Batch, columns: Mask, donor: Indices) -> Indices:
    """Samples of x [S, ..., K] that differ from their donor in some of the columns."""
    values = x[..., columns].reshape(len(x), -1)
    return np.flatnonzero((values != values[donor]).any(1))


def _outputs(run: Run, x: Batch) -> Batch:
    """y of all samples, in runs of bounded size."""
    return np.concatenate([run(x[part]) for part in _parts(len(x), x, x)])


def _parts(samples: int, x: Batch, y: Batch) -> Iterator[slice]:
    """Consecutive slices of samples that one run takes."""
    rows = max(int(np.prod(x.shape[1:-1])), 1)
    entries = max(int(np.prod(x.shape[1:])), int(np.prod(y.shape[1:])), 1)
    step = max(1, min(ROWS // rows, ENTRIES // entries))
    return (slice(start, min(start + step, samples)) for start in range(0, samples, step))


def _variance(y: Batch) -> Array:
    """Variance [N] of y [S, ..., N] between samples at the same position, averaged over positions."""
    wide = y.reshape(len(y), -1, y.shape[-1])
    still = (wide == wide[:1]).all((0, 1))
    variance: Array = np.where(still, 0.0, wide.var(0, dtype=np.float64).mean(0))
    return variance


def _varies(x: Batch) -> Mask:
    """Which inputs [K] of x [S, ..., K] differ between samples at some position."""
    return np.asarray((x != x[:1]).any(tuple(range(x.ndim - 1))))


def derangement(size: int, rng: np.random.Generator) -> Indices:
    """A random permutation [size] that leaves nothing in its place: one cycle through all, in random order."""
    order = rng.permutation(size)
    donor = np.empty(size, np.intp)
    donor[order] = np.roll(order, 1)
    return donor


def fields_of(x: Batch) -> Labels:
    """The field [K] of each input of x [S, ..., K]: the columns of an exact one-hot code share one.

    A code is a run of neighbouring columns of zeros and ones with exactly one 1 in every sample. Moved one at a time,
    its columns would make samples that no data holds. Columns that may be 1 together stay by themselves.
    """
    flat = x.reshape(-1, x.shape[-1])
    ones = flat == 1
    binary = (ones | (flat == 0)).all(0)
    live = ones.any(0) & ~ones.all(0)
    # Sums of random numbers over the samples that a column marks: a run of columns is a code where they add up to all.
    marks = np.random.default_rng(0).integers(1 << 40, size=len(flat))
    total = int(marks.sum())
    ends = np.cumsum(np.array([0, *(int(marks[column].sum()) for column in ones.T)], np.int64))
    starts = np.ones(x.shape[-1], bool)
    column = 0
    while column < x.shape[-1]:
        stop = int(np.searchsorted(ends, ends[column] + total)) if live[column] else 0
        if (
            column < stop <= x.shape[-1]
            and binary[column:stop].all()
            and (ones[:, column:stop].sum(1) == 1).all()
        ):
            starts[column + 1 : stop] = False
            column = stop
        else:
            column += 1
    return (np.cumsum(starts) - 1).astype(np.int32)


# --- measuring in groups ------------------------------------------------------------------------------------------


class _Leaf(NamedTuple):
    """Fields that moved together, with their energy and error, each [N]. shared: single fields look like the whole."""

    fields: Indices
    energy: Array
    error: Array
    shared: bool = False


_Look = Callable[[list[Indices]], list[_Leaf]]


def measure_grouped(
    run: Run,
    x: Batch,
    rng: np.random.Generator,
    fields: Labels | None = None,
    repeats: int = 1,
    progress: Progress | None = None,
    groups: int = 64,
) -> Influence:
    """The same for many fields, at a cost that follows the number of parts rather than that of fields.

    Neighbouring fields move together, as one of `groups`, and a sample of fields by itself. Where that shows blocks of
    outputs, groups are halved as long as they move several blocks or lie beside one that moves another block; groups
    that are mixed through and through are taken apart at once, and those whose single fields all move several blocks
    are left. Fields of a group that was not taken apart share its influence equally. A lone field that goes against
    its whole group can stay hidden: `off_influence` is what bounds that.
    """
    labels = np.arange(x.shape[-1], dtype=np.int32) if fields is None else fields
    count = int(labels.max(initial=DROPPED)) + 1
    varying = np.intersect1d(np.arange(count), labels[_varies(x)])

    def look(pieces: list[Indices]) -> list[_Leaf]:
        if not pieces:
            return []
        group = np.full(count + 1, DROPPED, np.int32)  # the last one: DROPPED indexes it as -1
        for index, piece in enumerate(pieces):
            group[piece] = index
        found = measure(run, x, rng, group[labels], repeats, progress)
        return [_Leaf(*leaf) for leaf in zip(pieces, found.energy, found.error, strict=True)]

    leaves = look([piece for piece in np.array_split(varying, groups) if len(piece)])
    if len(varying) > len(leaves):
        singles = look([field[None] for field in rng.choice(varying, len(leaves), replace=False)])
        leaves = _divided(leaves, singles, look, rng)
    energy, error = (np.zeros((count, run(x[:1]).shape[-1])) for _ in range(2))
    for leaf in leaves:
        energy[leaf.fields] = leaf.energy / len(leaf.fields)
        error[leaf.fields] = leaf.error / len(leaf.fields)
    return Influence(energy, error, ~np.isin(np.arange(count), varying), labels)


def _divided(leaves: list[_Leaf], singles: list[_Leaf], look: _Look, rng: np.random.Generator) -> list[_Leaf]:
    """Groups taken apart until each is one field, moves one block, or is shared through and through.

    mixed: the spread over blocks from which on a group holds inputs of several, going by that of the purer fields.
    """
    found = [elbow(np.stack([leaf.energy for leaf in some])) for some in (leaves, singles)]
    blocks = max((partition for partition in found), key=lambda partition: partition.blocks)
    if blocks.blocks < 2:
        return leaves
    member = one_hot(blocks.outputs, blocks.blocks)
    alone = [_spread(_shares(single, member)) for single in singles]
    mixed = 1.5 * float(np.quantile(alone, 0.25)) + 0.05
    together = float(np.median([_spread(_shares(leaf, member)) for leaf in leaves]))
    if together > max(mixed, 2 * float(np.median(alone))):  # neighbours have nothing to do with each other
        return look([field[None] for leaf in leaves for field in leaf.fields])
    while True:
        due = _due(leaves, member, mixed)
        if not due.any():
            return leaves
        pieces = iter(_pieces([leaves[i] for i in np.flatnonzero(due)], member, mixed, look, rng))
        leaves = [
            piece
            for leaf, apart in zip(leaves, due, strict=True)
            for piece in (next(pieces) if apart else [leaf])
        ]


def _due(leaves: list[_Leaf], member: Array, mixed: float) -> Mask:
    """Which leaves have to be divided: those that move several blocks, and both sides of a border."""
    shares = np.stack([_shares(leaf, member) for leaf in leaves])
    several = np.array(
        [_spread(share) > mixed and not leaf.shared for leaf, share in zip(leaves, shares, strict=True)]
    )
    border = np.abs(np.diff(shares, axis=0)).sum(1) > APART
    beside = np.append(border, False) | np.append(False, border)
    divisible = np.array([len(leaf.fields) > 1 for leaf in leaves])
    due: Mask = (several | beside) & divisible
    return due


def _pieces(
    leaves: list[_Leaf], member: Array, mixed: float, look: _Look, rng: np.random.Generator
) -> list[list[_Leaf]]:
    """What each leaf is divided into: halves; or, if they are alike and both move several blocks, its single fields
    where these are purer than the leaf, and halves marked as shared where they are not."""
    flat = look([half for leaf in leaves for half in np.array_split(leaf.fields, 2)])
    halves = [flat[i : i + 2] for i in range(0, len(flat), 2)]
    unclear = [
        i
        for i, (leaf, (left, right)) in enumerate(zip(leaves, halves, strict=True))
        if len(leaf.fields) > CUT
        and _spread(_shares(leaf, member)) > mixed
        and np.abs(_shares(left, member) - _shares(right, member)).sum() < APART
    ]
    drawn = look([field[None] for i in unclear for field in rng.choice(leaves[i].fields, CUT, replace=False)])
    apart = []
    for at, i in enumerate(unclear):
        tried = [_spread(_shares(single, member)) for single in drawn[at * CUT : (at + 1) * CUT]]
        if np.mean(tried) < _spread(_shares(leaves[i], member)) / 2:
            apart.append(i)
        else:
            halves[i] = [half._replace(shared=True) for half in halves[i]]
    singles = iter(look([field[None] for i in apart for field in leaves[i].fields]))
    for i in apart:
        halves[i] = [next(singles) for _ in leaves[i].fields]
    return halves


def _shares(leaf: _Leaf, member: Array) -> Array:
    """Shares [G] of what a leaf moves that go to each block; all blocks count alike whatever their outputs."""
    moved = leaf.energy @ (member / np.maximum(member.sum(0), 1))
    shares: Array = moved / max(float(moved.sum()), TINY)
    return shares


def _spread(share: Array) -> float:
    """What goes elsewhere than to the block that gets most."""
    return float(share.sum() - share.max())


# --- the equivalence test -----------------------------------------------------------------------------------------


class OffInfluence(NamedTuple):
    """What each block loses by not reading its foreign inputs: shares [G] of its variance, mean over its outputs.

    estimate, upper: foreign inputs take other samples' values: half of the squared change. What nothing else in the
        model tells, if they do not depend on the inputs that the block reads.
    clamped, clamped_upper: foreign inputs stand at their mean: the squared change about its own mean, as a bias makes
        up for that. What the block would lose before any refit.
    """

    estimate: Array
    upper: Array
    clamped: Array
    clamped_upper: Array


def off_influence(
    run: Run, x: Batch, members: Mask, outputs: Labels, rng: np.random.Generator, repeats: int = 4
) -> OffInfluence:
    """The equivalence test, on samples that nothing was chosen on: a dependency goes only where the upper bound is
    below the budget.

    x: [S, ..., K]. members: [G, K] inputs that each block reads; all others move together. outputs: [N] blocks.
    """
    y = _outputs(run, x)
    variance = np.maximum(_variance(y), TINY)
    mean = x.mean(0, keepdims=True, dtype=np.float64).astype(np.float32)
    rows = []
    for block, keep in enumerate(members):
        at = outputs == block
        if keep.all() or not at.any():
            rows.append((0.0, 0.0, 0.0, 0.0))
            continue
        moved = np.zeros(len(x))
        for _ in range(repeats):
            donor = derangement(len(x), rng)
            loss = _loss(_outputs(run, np.where(keep, x, x[donor])) - y, at, variance) / 2
            moved += (loss + loss[np.argsort(donor)]) / 2 / repeats
        change = _outputs(run, np.where(keep, x, mean)) - y
        clamped = _loss(change - change.mean(0, keepdims=True), at, variance)
        # The mean of what a sample receives and gives varies half as much as their sum, which is the influence.
        rows.append((moved.mean(), _upper(moved, 2.0), clamped.mean(), _upper(clamped, 1.0)))
    return OffInfluence(*np.array(rows).T)


def _loss(change: Batch, at: Mask, variance: Array) -> Array:
    """Squared change [S] of a block's outputs over their variance, averaged over outputs and middle axes."""
    squared = np.square(change[..., at], dtype=np.float64) / variance[at]
    loss: Array = squared.reshape(len(change), -1).mean(1)
    return loss


def _upper(values: Array, credit: float) -> float:
    """Upper confidence bound of the mean of values [S], corrected for their skew (Johnson 1978)."""
    n = len(values)
    if n < 2 or not values.any():
        return float(values.mean()) if n > 1 else np.inf
    centred = values - values.mean()
    spread, t = float(centred.std(ddof=1)), float(stats.t.ppf(CONFIDENCE, n - 1))
    skew = float((centred**3).mean()) / max(spread**2, TINY) * (1 + 2 * t**2) / (6 * n)
    return float(values.mean() + credit * (t * spread / np.sqrt(n) + max(skew, 0.0)))
