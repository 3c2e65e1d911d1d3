"""Blocks of outputs that share their inputs, from an energy matrix: for every number of blocks, and how many it has.

Ward's tree over the outputs' profiles (a degree-normalised spectral embedding of the square roots, so that distances
are those of Hellinger) gives a partition for every number of blocks; the elbow of what its blocks have in common tells
how many there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from scipy.cluster.hierarchy import linkage

from onnx_decomp.program import DROPPED, Labels

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

MOST = 32
"""Blocks at most."""
SHARED = 0.7
"""A part that has more than this of its influence from inputs that another part needs as much is none of its own."""
PROTOTYPES = 256
"""Outputs that are searched one by one; more are first brought together."""
TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Partition:
    """Outputs in blocks, and how much of their influence the blocks want twice.

    outputs: [N], DROPPED where nothing moves the output. inputs: [F] the block that each field serves most, DROPPED
    where it moves nothing.
    curve: off(G) for G = 1, 2, ...: with the profile of a block the shares in which its influence comes from the
    fields, mean over blocks of what comes from fields that serve another block more. 0: independent; 1 - 1/G: alike.
    """

    outputs: Labels
    inputs: Labels
    blocks: int
    curve: tuple[float, ...]

    @property
    def off(self) -> float:
        return self.curve[self.blocks - 1]


def elbow(energy: Array, most: int = MOST) -> Partition:
    """The partition of outputs after which one more block costs most; one block where no split is clean.

    Let lost(G) = G off(G). Splitting a block in two adds what the two have in common: little for independent ones,
    about the share of common inputs if there are such, and most of it for halves of what belongs together. The last
    split before the largest jump of that is taken, among those that have less than SHARED in common. Energy that is
    infinite or NaN, as where a model overflows inside, shows nothing: one block.
    """
    if not np.isfinite(energy).all():
        inputs, outputs = (np.zeros(size, np.int32) for size in energy.shape)
        return Partition(outputs, inputs, 1, (0.0,))
    search = Search.of(energy, most)
    lost = np.array([search.lost(blocks) for blocks in range(1, search.most + 1)])
    curve = lost / np.arange(1, len(lost) + 1)
    return search.partition(_blocks_before_jump(lost), tuple(curve.tolist()))


def _blocks_before_jump(lost: Array) -> int:
    """The number of blocks chosen, given what is lost by 1, 2, ... of them."""
    # Splitting what cannot be split further is like splitting in two the same.
    common = np.append(np.diff(lost), 1.0)
    clean = int(np.flatnonzero(common > SHARED)[0])
    jumps = np.diff(common)[:clean]
    return 1 + clean - int(np.argmax(jumps[::-1])) if clean else 1


@dataclass(frozen=True)
class Search:
    """Partitions of the outputs that something moves, cut from a tree of how alike their profiles are.

    profiles: [f, n] shares in which the influence on each output comes from the moving inputs. cuts: [n, most] labels,
    into 1, 2, ... blocks in each column. moving [F] and moved [N]: what the others are counted among.
    """

    profiles: Array
    cuts: Labels
    moving: Mask
    moved: Mask

    @classmethod
    def of(cls, energy: Array, most: int) -> Search:
        moving, moved = energy.sum(1) > 0, energy.sum(0) > 0
        profiles = energy[np.ix_(moving, moved)]
        profiles /= profiles.sum(0)
        embedding = _embed(profiles, most)
        group = _prototypes(embedding)
        member = one_hot(group, int(group.max(initial=-1)) + 1)
        points = member.T @ embedding / member.sum(0)[:, None]
        cuts = _cuts(points, max(1, min(most, int(moving.sum()), len(points))))
        return cls(profiles, cuts[group], moving, moved)

    @property
    def most(self) -> int:
        return int(self.cuts.shape[1])

    def lost(self, blocks: int) -> float:
        """Sum over blocks of the share of their influence from inputs that serve another block more."""
        Q = self._block_profiles(blocks)
        return float(Q.sum() - Q.max(1, initial=0).sum())

    def partition(self, blocks: int, curve: tuple[float, ...] = ()) -> Partition:
        """Of all outputs and inputs; blocks in order of their first output."""
        labels = self.cuts[:, blocks - 1]
        outputs, inputs = (np.full(len(mask), DROPPED, np.int32) for mask in (self.moved, self.moving))
        if len(labels):
            names = np.argsort(np.argsort(np.unique(labels, return_index=True)[1]))
            outputs[self.moved] = names[labels]
            inputs[self.moving] = names[self._block_profiles(blocks).argmax(1)]
        return Partition(outputs, inputs, blocks, curve)

    def _block_profiles(self, blocks: int) -> Array:
        """Mean profile [f, blocks] of each block's outputs."""
        member = one_hot(self.cuts[:, blocks - 1], blocks)
        Q: Array = self.profiles @ (member / np.maximum(member.sum(0), 1))
        return Q


def _embed(profiles: Array, dimensions: int) -> Array:
    """Outputs [N, dimensions] by the leading singular vectors of the influence, each as much as it stands out.

    Degree-normalised as for spectral co-clustering (Dhillon 2001), lest strong inputs decide alone; rare inputs get a
    tenth of a mean degree more, lest each makes a dimension of its own. Square roots make distances those of Hellinger
    between profiles: on trained networks with shared inputs the plain ones part the outputs that are sure of
    themselves from the others, before they part the tasks.
    """
    degree = profiles.sum(1)
    if not profiles.size:
        return np.zeros((profiles.shape[1], 0))
    scaled = np.sqrt(profiles / np.sqrt(degree + 0.1 * degree.mean())[:, None])
    inputs, outputs = scaled.shape
    size = min(inputs, outputs)
    leading = (max(size - dimensions, 0), size - 1)
    if inputs <= outputs:
        _, vectors = linalg.eigh(scaled @ scaled.T, subset_by_index=leading)
        return np.asarray(scaled.T @ vectors)
    values, vectors = linalg.eigh(scaled.T @ scaled, subset_by_index=leading)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)))


def _cuts(points: Array, most: int) -> Labels:
    """Labels [n, most] of points [n, d]: column G - 1 cuts Ward's tree into exactly G blocks."""
    n = len(points)
    cuts = np.zeros((n, most), np.int32)
    names = np.arange(n)
    # scipy's own cuts give fewer blocks where points coincide.
    merges = linkage(points, "ward")[:, :2].astype(np.intp) if n > 1 else np.empty((0, 2), np.intp)
    for blocks in range(n, 0, -1):
        if blocks <= most:
            cuts[:, blocks - 1] = np.unique(names, return_inverse=True)[1]
        if blocks > 1:
            names[np.isin(names, merges[n - blocks])] = 2 * n - blocks
    return cuts


def _prototypes(embedding: Array) -> Labels:
    """The group [N] of each output, at most PROTOTYPES of them: by the nearest of outputs as far apart as can be."""
    n = len(embedding)
    if n <= PROTOTYPES:
        return np.arange(n, dtype=np.int32)
    group, nearest = np.zeros(n, np.int32), np.full(n, np.inf)
    for name in range(
        PROTOTYPES
    ):  # the farthest from those before (Gonzalez 1985): a small part gets its own
        distance = ((embedding - embedding[np.argmax(nearest) if name else 0]) ** 2).sum(1)
        group = np.where(distance < nearest, np.int32(name), group)
        nearest = np.minimum(nearest, distance)
    return np.unique(group, return_inverse=True)[1].astype(np.int32)


def one_hot(labels: Labels, G: int) -> Array:
    member: Array = (labels[:, None] == np.arange(G)).astype(np.float64)
    return member


def shuffled(energy: Array, rng: np.random.Generator) -> Array:
    """The influence [F, N] that as strong inputs would have if each output chose them without regard to the others.

    Each entry, over its input's strength, is shuffled within its output. The strength is what the other outputs see: an
    entry that made up its own yardstick would look tamer than it is, and shuffles tamer than noise.
    """
    strength = energy.sum(1, keepdims=True)
    # A small part of the entry itself stays in, for inputs that move a single output.
    others = strength - energy * (1 - 1 / energy.shape[1])
    mixed: Array = rng.permuted(energy / np.maximum(others, TINY), axis=0) * strength
    return mixed
