"""Independent parts of a function, from the influence of its inputs: blocks of outputs and what each of them reads.

A partition counts if as many blocks, found by the same search in shuffled influence, don't leave out as much. What it
leaves out stays within a budget for every block, errors included. `influence.off_influence` then judges all of it at
once, on samples that nothing was chosen on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from onnx_decomp.passes.influence import CONFIDENCE, Array, Influence, Mask
from onnx_decomp.passes.partitions import Partition, Search, elbow, one_hot, shuffled
from onnx_decomp.program import DROPPED, Labels

LEVEL = 0.01
"""Chance of as good a partition in shuffled influence, at most."""
SHUFFLES = 100
"""The fewest whose p-value can fall below LEVEL."""
FOREIGN = 0.1
"""An input whose influence on a block is below this share of that on its own block is foreign to it."""
NEGLIGIBLE = 0.1
"""Share of the budget for inputs that move hardly anything at all, foreign or not."""
LEAST_SAVING = 0.05
"""Share of all pairs of an input and an output that has to go: otherwise the parts are the whole under other names."""
NULL_SIDES = (512, 256)
"""Inputs and outputs of a shuffled matrix at most. Smaller ones have more to find by chance: it errs safely."""


@dataclass(frozen=True)
class Independent:
    """Blocks of outputs, and the inputs that each needs.

    outputs: [N] block of each output, DROPPED where nothing moves it.
    inputs: [K] the block that each input serves most, DROPPED where it is constant or moves nothing.
    members: [G, K] inputs that each block reads; shared ones are in several, constant ones in none.
    curve: off(G) for G = 1, 2, ... (see Partition); off: its value at the chosen number of blocks.
    dropped, upper: [G] share of the variance of each block's outputs that the inputs it does not read take part in,
        added up over them, and its upper confidence bound. What they do together is for `off_influence` to say.
    saving: share of the pairs of a moving input and an output that no block keeps.
    """

    outputs: Labels
    inputs: Labels
    members: Mask
    blocks: int
    off: float
    p: float
    curve: tuple[float, ...]
    dropped: Array
    upper: Array
    saving: float


def co_cluster(
    influence: Influence,
    rng: np.random.Generator,
    budget: float = 0.05,
    foreign: float = FOREIGN,
    level: float = LEVEL,
    shuffles: int = SHUFFLES,
) -> Independent | None:
    """Independent parts, or None where there are none: no clean split, nothing to save, or shuffles do as well.

    budget: share of each block's variance that it may lose with what it no longer reads. foreign: see `needed`.
    level: of the p-value. It asks whether outputs share their inputs in groups; where each output is a block of its own
    it has little to go by, and 1 leaves the decision to `off_influence`.
    """
    found = elbow(influence.energy)
    if found.blocks < 2:
        return None
    share = block_shares(influence.energy, found)
    # Errors add up in full: one sample that is far out moves many inputs' influence at once.
    doubt = block_shares(influence.error, found) * float(stats.norm.ppf(CONFIDENCE))
    members = needed(share, share + doubt, found.inputs, budget, foreign)
    saving = _saving(members, found)
    if saving < LEAST_SAVING:
        return None
    p = p_value(influence.energy, found, rng, foreign, shuffles)
    if p >= level:
        return None
    gone = np.where(members, 0.0, 1.0)
    # For every input what its field has; the last entry is that of DROPPED, which indexes as -1.
    inputs = np.append(found.inputs, np.int32(DROPPED))[influence.fields]
    reads = np.append(members, np.zeros((1, found.blocks), bool), axis=0)[influence.fields].T
    return Independent(
        found.outputs,
        inputs,
        reads,
        found.blocks,
        found.off,
        p,
        found.curve,
        (share * gone).sum(0),
        ((share + doubt) * gone).sum(0),
        saving,
    )


def needed(share: Array, upper: Array, home: Labels, budget: float, foreign: float = FOREIGN) -> Mask:
    """Which inputs each block reads, [F, G]: its own, and those of others that it can't do without.

    share: [F, G] of a block's variance that an input takes part in; upper: the same, bounded from above. An input is
    left out if it moves the block less than `foreign` times what it moves its own, or hardly at all; and only while
    all that is left out stays within the budget, the weakest first.
    """
    own = home[:, None] == np.arange(share.shape[1])
    order = np.argsort(upper, axis=0, kind="stable")

    def summed(candidate: Mask) -> Array:
        sums = np.zeros_like(upper)
        weakest_first = np.take_along_axis(np.where(candidate, upper, 0.0), order, 0)
        np.put_along_axis(sums, order, np.cumsum(weakest_first, 0), 0)
        return sums

    negligible = ~own & (summed(~own) <= NEGLIGIBLE * budget)
    candidate = ~own & (_foreign(share, home, foreign) | negligible)
    out = candidate & (summed(candidate) <= budget)
    members: Mask = ~out & (home >= 0)[:, None]
    return members


def _foreign(share: Array, home: Labels, foreign: float) -> Mask:
    """Where [F, G] an input moves a block less than `foreign` times what it moves its own."""
    best = np.where(home >= 0, share[np.arange(len(home)), home], 0.0)
    alien: Mask = share < foreign * best[:, None]
    return alien


def block_shares(values: Array, found: Partition) -> Array:
    """Shares [F, G] of the variance of each block's outputs, in the mean over them, of energies [F, N]."""
    member = one_hot(found.outputs, found.blocks)
    shares: Array = values @ (member / np.maximum(member.sum(0), 1)) / 2
    return shares


def _saving(members: Mask, found: Partition) -> float:
    """Share of (moving input, output) pairs that no block keeps."""
    outputs = one_hot(found.outputs, found.blocks).sum(0)
    moving = int((found.inputs >= 0).sum())
    return float(1 - members.sum(0) @ outputs / max(moving * outputs.sum(), 1))


def p_value(
    energy: Array,
    found: Partition,
    rng: np.random.Generator,
    foreign: float = FOREIGN,
    shuffles: int = SHUFFLES,
) -> float:
    """Chance that as many blocks, found by the same search in shuffled influence, find as much that is foreign to them.

    The off-share itself would not do: where inputs are shared it is large for good reasons, and noise reaches a small
    one by cutting off a few outputs. Sequential (Besag and Clifford 1991): with the first shuffle that does as well,
    say number l, the answer is 1/l.
    """
    goal = _foreign_pairs(energy, found, foreign)
    live = energy[np.ix_(found.inputs >= 0, found.outputs >= 0)]
    most = max(len(found.curve), found.blocks)
    for tried in range(1, shuffles + 1):
        picks = (np.sort(rng.permutation(n)[:side]) for n, side in zip(live.shape, NULL_SIDES, strict=True))
        noise = shuffled(live[np.ix_(*picks)], rng)
        search = Search.of(noise, most)
        if search.most < found.blocks:
            continue
        if _foreign_pairs(noise, search.partition(found.blocks), foreign) >= goal:
            return 1 / tried
    return 1 / (shuffles + 1)


def _foreign_pairs(energy: Array, found: Partition, foreign: float) -> float:
    """Share of the pairs of a moving input and an output that are foreign to each other, whatever they cost."""
    alien = _foreign(block_shares(energy, found), found.inputs, foreign)
    return _saving(~alien & (found.inputs >= 0)[:, None], found)
