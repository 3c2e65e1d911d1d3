"""Pairs of sites that an attention multiplies head by head, whose width d of a head can change.

Scores are q k' for each head, and what attention hands on is P v, which the output projection reads. A basis of the d
columns of a head can change between the two sites of such a pair, and the columns that matter least can go, as long as
nothing but scalars, Transposes and Reshapes stands between the site and the product, and nothing else reads on the way.
A rotary embedding, a norm on each head, a cache of keys: whatever tells the d columns apart leaves no pair.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onnx_decomp.fused_attention import MultiHead
from onnx_decomp.graph import FLOATS, attribute, is_standard
from onnx_decomp.graph_index import GraphIndex
from onnx_decomp.sites import Site
from onnx_decomp.tracing import matched

Ends = Sequence[tuple[NDArray[np.intp], NDArray[np.intp]]]


@dataclass(frozen=True)
class HeadPair:
    """Two sites of a region, by position, that meet in one product for each head.

    kind: "scores", where columns of `first` meet columns of `second` (queries, and the right operand as keys), or
    "values", where columns of `first` are mixed over positions and then meet rows of `second`, the output projection.
    joined: tensors whose last axis holds `width` positions of each head, one head after another.
    shapes: by tensor that a Reshape makes, the axis (from the last, -1) that is the width alone.
    """

    kind: Literal["scores", "values"]
    first: int
    second: int
    heads: int
    width: int
    joined: frozenset[str]
    shapes: Mapping[str, int] = field(default_factory=dict)


def find_pairs(
    index: GraphIndex, sites: Sequence[Site], units: Ends, links: Collection[int]
) -> tuple[HeadPair, ...]:
    """All pairs among the sites of a region, in graph order.

    units: for each site the unit of each row, and of each column. links: positions of the operators between them.
    """
    finder = _Finder(index, sites, units, frozenset(links))
    found = [pair for position in sorted(links) for pair in finder.at(position)]
    return tuple(pair for pair in found if pair is not None)


@dataclass(frozen=True)
class _Path:
    """Where the columns of a site have come to: as heads side by side on the last axis, or with an axis of their own.

    axis: (from the last) of the width, once it is apart; None while heads are side by side.
    """

    tensor: str
    heads: int
    width: int
    axis: int | None = None
    joined: tuple[str, ...] = ()
    shapes: Mapping[str, int] = field(default_factory=dict)

    def moved(self, tensor: str, axis: int | None) -> _Path:
        joined = self.joined if axis is not None else (*self.joined, tensor)
        return replace(self, tensor=tensor, axis=axis, joined=joined)


@dataclass(frozen=True)
class _Finder:
    index: GraphIndex
    sites: Sequence[Site]
    units: Ends
    links: frozenset[int]

    def at(self, position: int) -> Sequence[HeadPair | None]:
        """The pairs that meet in the product at a position, if it is one of computed operands."""
        node = self.index.node(position)
        several = MultiHead.of(node)
        if several is not None:
            return self._in_heads(several, node.output[0])
        if not is_standard(node, "MatMul") or any(
            name in self.index.constants.sources for name in node.input
        ):
            return []
        left, right = (self._from(name) for name in node.input)
        if left is not None and right is not None and (left[1].axis, right[1].axis) == (-1, -2):
            return [self._pair("scores", left, right[0], 1, right[1])]
        for side, found in enumerate((left, right)):
            if found is not None and found[1].axis == (-2, -1)[side]:
                return [self._behind(node.output[0], *found)]
        return []

    def _in_heads(self, several: MultiHead, output: str) -> Sequence[HeadPair | None]:
        """Both pairs of a MultiHeadAttention, which takes heads side by side."""
        query, key, value = (self._from(name) for name in several.operands)
        if any(found and found[1].axis is not None for found in (query, key, value)):
            return []
        pairs = [
            query and key and self._pair("scores", query, key[0], 1, key[1]),
            value and self._behind(output, *value),
        ]
        return [pair for pair in pairs if pair is not None and pair.heads == several.heads]

    def _behind(self, made: str, first: int, path: _Path) -> HeadPair | None:
        """Values that were mixed over positions, on to the site that reads them."""
        ends = {site.nodes[0]: at for at, site in enumerate(self.sites)}
        behind = self._onward(replace(path, joined=(), shapes={}).moved(made, path.axis))
        while behind is not None:
            reader = self.index.consumers[behind.tensor][0]
            if reader in ends and behind.axis is None and self.sites[ends[reader]].input == behind.tensor:
                return self._pair("values", (first, path), ends[reader], 0, behind)
            behind = self._step(behind, reader)
        return None

    def _pair(
        self, kind: Literal["scores", "values"], begin: tuple[int, _Path], second: int, side: int, end: _Path
    ) -> HeadPair | None:
        """side: rows (0) or columns (1) of the second site."""
        first, path = begin
        heads, width = path.heads, path.width
        same = np.array_equal(self.units[first][1], self.units[second][side])
        matrices = [site.matrix for site in self.sites]
        own = first != second and all(matrices.count(matrices[at]) == 1 for at in (first, second))
        if not (same and own and (end.heads, end.width) == (heads, width)):
            return None
        joined = frozenset([*path.joined, *end.joined])
        return HeadPair(kind, first, second, heads, width, joined, {**path.shapes, **end.shapes})

    def _from(self, tensor: str) -> tuple[int, _Path] | None:
        """The site whose columns a tensor carries, and how; None where something else was done to them."""
        ends = {site.output: at for at, site in enumerate(self.sites)}
        steps: list[int] = []
        while tensor not in ends:
            position = self.index.producer.get(tensor)
            if position not in self.links:
                return None
            steps.insert(0, position)
            carrying = [name for name in self.index.node(position).input if not self._known(name)]
            if len(carrying) != 1:
                return None
            tensor = carrying[0]
        at = ends[tensor]
        heads, width = _dealt(self.units[at][1])
        start = self._onward(_Path(tensor, heads, width, None, (tensor,))) if width > 1 else None
        path = reduce(lambda path, step: path and self._step(path, step), steps, start)
        return None if path is None else (at, path)

    def _known(self, name: str) -> bool:
        return not name or self.index.constant(name) is not None

    def _onward(self, path: _Path | None) -> _Path | None:
        """The same if exactly one operator reads the tensor, and nothing outside does."""
        if path is None or path.tensor in self.index.pinned_tensors:
            return None
        return path if len(self.index.consumers.get(path.tensor, [])) == 1 else None

    def _step(self, path: _Path, position: int) -> _Path | None:
        """Through one operator; None for one that tells the columns of a head apart."""
        node = self.index.node(position)
        steps: dict[str, Callable[[_Path, int], _Path | None]] = {
            "Transpose": self._transposed,
            "Reshape": self._reshaped,
            "Squeeze": self._reshaped,
            "Unsqueeze": self._reshaped,
            "Mul": self._scaled,
            "Div": self._scaled,
            "Identity": self._scaled,
            "Cast": self._scaled,
        }
        if position not in self.links or not is_standard(node, *steps):
            return None
        return self._onward(steps[node.op_type](path, position))

    def _scaled(self, path: _Path, position: int) -> _Path | None:
        node = self.index.node(position)
        others = [self.index.constant(name) for name in node.input if name != path.tensor]
        if any(other is None or other.size != 1 for other in others):
            return None
        if node.op_type == "Div" and node.input[0] != path.tensor:
            return None
        if node.op_type == "Cast" and attribute(node, "to", 0) not in FLOATS:
            return None
        return path.moved(node.output[0], path.axis)

    def _transposed(self, path: _Path, position: int) -> _Path | None:
        node = self.index.node(position)
        order = attribute(node, "perm", None)
        if order is None:
            return None
        width = len(order) + (-1 if path.axis is None else path.axis)
        axis = list(order).index(width) - len(order)
        if path.axis is None:
            return path.moved(node.output[0], None) if axis == -1 else None
        return path.moved(node.output[0], axis)

    def _reshaped(self, path: _Path, position: int) -> _Path | None:
        """Heads are taken apart, or put side by side again, or only other axes change."""
        node = self.index.node(position)
        before, after = (self.index.shapes.get(name) for name in (node.input[0], node.output[0]))
        if before is None or after is None:
            return None
        at = len(before) + (-1 if path.axis is None else path.axis)
        for sources, targets in matched(before, after, node.op_type != "Reshape"):
            if at not in sources:
                continue
            own, made = [before[axis] for axis in sources], [after[axis] for axis in targets]
            last = targets[-1] - len(after)
            if own == made and len(own) == 1 and (path.axis is not None or last == -1):
                return self._told(path.moved(node.output[0], None if path.axis is None else last))
            apart, together = [path.heads, path.width], [path.heads * path.width]
            if path.axis is None and (own, made) == (together, apart):
                return self._told(path.moved(node.output[0], last))
            if (
                path.axis is not None
                and (own, made) == (apart, together)
                and at == sources[-1]
                and last == -1
            ):
                return path.moved(node.output[0], None)
        return None

    @staticmethod
    def _told(path: _Path) -> _Path:
        """A Reshape is told the width of a head, if heads are apart."""
        return path if path.axis is None else replace(path, shapes={**path.shapes, path.tensor: path.axis})


def _dealt(units: NDArray[np.intp]) -> tuple[int, int]:
    """Heads and width of each where the columns of one head lie side by side; (0, 0) where they don't."""
    heads = len(np.unique(units))
    width = len(units) // heads
    alike = heads * width == len(units) and (units.reshape(heads, width) == units[::width, None]).all()
    return (heads, width) if alike else (0, 0)
