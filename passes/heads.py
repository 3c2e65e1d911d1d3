"""Narrower heads: for two products that meet in the d columns of a head, the r directions of them that matter most.

Where x [d] is what one site of a pair makes for a head, and the other turns an error e of it into a loss e T e', the
best map of rank r on the way minimises

    E |x (I - A U)|_T^2 = |C^(1/2) (I - A U) T^(1/2)|^2          over A [d, r] and U [r, d],  C = E[x' x]

by the singular value decomposition of C^(1/2)' T^(1/2) (Eckart and Young 1936). A goes into the columns of the first
site. For scores T is E[k' k] around its mean, as Softmax does not see what is the same for all keys, and U' goes into
the columns of the keys: q k' becomes (q A) (k U')'. For values T is W S W' with W [d, N] the rows of the output
projection and S what its errors cost (`importance`), and U goes into those rows. All heads of a pair keep the same r.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from onnx_decomp.axes import Region
from onnx_decomp.passes.lowrank import FLOOR_X, root
from onnx_decomp.sites import Affine

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Turn:
    """A change of basis of every head, of which the first `width` directions stay.

    down: A [H, d, d] for what the first site makes. up: U [H, d, d] for the second. Zero in columns, or rows, that go:
    matrices keep their size, and what is written leaves those out.
    """

    width: int
    down: Array
    up: Array

    def after(self, earlier: Turn | None) -> Turn:
        """Both in one: this one was found in the basis of the earlier one."""
        return self if earlier is None else Turn(self.width, earlier.down @ self.down, self.up @ earlier.up)


@dataclass(frozen=True)
class Directions:
    """Every width of the heads of one pair at once.

    tail: [d + 1] squared error, summed over heads, with 0, 1, ..., d directions left.
    """

    tail: Array
    _down: Array
    _up: Array

    def turn(self, width: int) -> Turn:
        """The best basis of that width. A has orthonormal columns: what the first site makes keeps its scale."""
        down, up = np.zeros_like(self._down), np.zeros_like(self._up)
        for head in range(len(down)):
            basis, change = linalg.qr(self._down[head, :, :width], mode="economic", check_finite=False)
            down[head, :, :width] = basis
            up[head, :width] = change @ self._up[head, :width]
        return Turn(width, down, up)


def directions(moments: Array, metric: Array) -> Directions:
    """The directions of each head by what they keep. moments: C, metric: T, both [H, d, d]."""
    heads, width, _ = moments.shape
    tail, down, up = np.zeros(width + 1), np.zeros_like(moments), np.zeros_like(moments)
    for head in range(heads):
        left, right = root(moments[head], FLOOR_X), root(metric[head], FLOOR_X)
        vectors, values, _ = linalg.svd(left.T @ right, check_finite=False)
        tail[:-1] += np.cumsum(values[::-1] ** 2)[::-1]
        down[head] = linalg.solve_triangular(left, vectors, lower=True, trans="T", check_finite=False)
        up[head] = vectors.T @ left.T
    return Directions(tail, down, up)


def by_head(matrix: Array, heads: int) -> Array:
    """[H, d, d] from [H d, H d]: what each head has with itself."""
    width = len(matrix) // heads
    apart = matrix.reshape(heads, width, heads, width)
    return np.stack([apart[head, :, head] for head in range(heads)])


def column_turns(region: Region, turns: Mapping[int, Turn]) -> dict[int, Array]:
    """By position of a site what its columns are multiplied by, head by head [H, d, d]. turns: by number of a pair."""
    found = {}
    for number, turn in turns.items():
        pair = region.pairs[number]
        found[pair.first] = turn.down
        if pair.kind == "scores":
            found[pair.second] = turn.up.transpose(0, 2, 1)
    return found


def turned_maps(region: Region, turns: Mapping[int, Turn], affine: Sequence[Affine]) -> list[Affine]:
    """Affine maps of a region in other bases of its heads."""
    made = list(affine)
    for at, matrices in column_turns(region, turns).items():
        bias = made[at].bias
        turned = None if bias is None else turned_columns(bias, matrices).astype(np.float32)
        made[at] = Affine(turned_columns(made[at].weight, matrices).astype(np.float32), turned)
    for number, turn in turns.items():
        pair = region.pairs[number]
        if pair.kind == "values":
            weight = turned_columns(made[pair.second].weight.T, turn.up.transpose(0, 2, 1)).T
            made[pair.second] = Affine(np.ascontiguousarray(weight, np.float32), made[pair.second].bias)
    return made


def turned_importance(
    region: Region, turns: Mapping[int, Turn], importance: Sequence[Array | None]
) -> list[Array | None]:
    """S of each site for errors in the other bases: an error e of what is turned by A counts as e U."""
    made = list(importance)
    for number, turn in turns.items():
        pair = region.pairs[number]
        back = {pair.first: turn.up.transpose(0, 2, 1)}
        if pair.kind == "scores":
            back[pair.second] = turn.down
        for at, matrices in back.items():
            old = made[at]
            if old is not None:
                made[at] = turned_columns(turned_columns(old, matrices).T, matrices)
    return made


def turned_columns(x: NDArray[np.floating], matrices: Array) -> Array:
    """x [..., H d] times one matrix [d, d] for each head."""
    heads, width, _ = matrices.shape
    apart = np.asarray(x, np.float64).reshape(-1, heads, width).transpose(1, 0, 2)
    made: Array = (apart @ matrices).transpose(1, 0, 2).reshape(x.shape)
    return made
