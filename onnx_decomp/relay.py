"""The model run in pieces, from one region to the next, with other weights.

A refit in graph order needs what the rewritten model feeds each region. Running the whole graph for each costs as many
runs as there are regions; in pieces, each of which hands what is still needed to the next, it costs one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from onnx_decomp.axes import Region
from onnx_decomp.graph import mentions
from onnx_decomp.graph_index import GraphIndex
from onnx_decomp.probe import Feeds, Piece, Probe, outer_tensors
from onnx_decomp.runtime import Device
from onnx_decomp.scratch import kept
from onnx_decomp.sites import Affine, Site

HELD = 2**30
"""Bytes that may be carried between two pieces; a model that carries more is run whole."""


@dataclass
class Relay:
    """Pieces of a model that end where its regions begin. Sessions are opened when they are first needed."""

    index: GraphIndex
    sites: Sequence[Site]
    regions: Sequence[Region]
    folder: Path | None
    provider: Device = "cpu"
    _pieces: list[Piece] = field(init=False)
    _sessions: dict[int, Probe] = field(default_factory=dict)

    def __post_init__(self) -> None:
        cuts = [0, *(min(region.nodes) for region in self.regions)]
        live = [self._live(cut) for cut in cuts]
        kept = self._kept
        self._pieces = [
            Piece(frozenset(p for p in kept if first <= p < last), live[number], live[number + 1])
            for number, (first, last) in enumerate(pairwise(cuts))
        ]

    @property
    def possible(self) -> bool:
        """Every region finds all that enters it where it begins, and every tensor between has a type that is known.

        Inputs of the model that may be left out are not known to be there.
        """
        known = set(self.index.inputs)
        known |= {name for name, element in self.index.element_types.items() if element}
        found = {site.output for site in self.sites} | known
        for region, piece in zip(self.regions, self._pieces, strict=True):
            if not set(outer_tensors(self.index, region)) <= set(piece.leaving):
                return False
        return all(set(piece.entering) <= found - self.index.defaults for piece in self._pieces)

    def run(self, number: int, feeds: Feeds, affine: Mapping[int, Affine]) -> Feeds:
        """What is still needed where the region begins, from what was needed where the one before it did."""
        piece = self._pieces[number]
        passed = {name: feeds[name] for name in piece.leaving if name in feeds}
        if len(passed) == len(piece.leaving):
            return passed
        if number not in self._sessions:
            ends = [site for site in self.sites if site.nodes[-1] in piece.positions]
            made = tuple(name for name in piece.leaving if name not in piece.entering)
            others = piece.positions - {site.nodes[-1] for site in ends}
            own = Piece(others, piece.entering, made)
            self._sessions[number] = Probe(self.index, ends, self.folder, piece=own, provider=self.provider)
        found = self._sessions[number].run(feeds, affine)
        return passed | {name: kept(array) for name, array in found.items()}

    @cached_property
    def _kept(self) -> list[int]:
        """Positions that compute something: of a site's nodes the last."""
        inner = {position for site in self.sites for position in site.nodes[:-1]}
        inner -= {site.nodes[-1] for site in self.sites}
        inner |= self.index.between([(site.operand, site.nodes[0]) for site in self.sites])
        return [position for position in range(len(self.index.nodes)) if position not in inner]

    def _live(self, cut: int) -> tuple[str, ...]:
        """Tensors made before a position, or fed to the model, that are read there or later."""
        ends = {site.nodes[-1]: site for site in self.sites}
        made = set(self.index.inputs)
        read = {value.name for value in self.index.proto.graph.output}
        for position in self._kept:
            node = self.index.node(position)
            if position < cut:
                made |= {name for name in node.output if name and name not in self.index.stored}
            else:
                read |= {ends[position].input} if position in ends else set(mentions([node]))
        return tuple(sorted(made & read))


@dataclass
class Flow:
    """Batches on their way through a relay: `state` is what each holds where the region of that number begins."""

    relay: Relay
    state: list[Feeds]
    number: int = 0

    def to(self, region: Region, affine: Mapping[int, Affine]) -> list[Feeds]:
        """Go on to a region, with other affine maps in what lies between."""
        names = [each.name for each in self.relay.regions]
        while self.number <= names.index(region.name):
            self.state = [self.relay.run(self.number, feeds, affine) for feeds in self.state]
            self.number += 1
        return self.state

    @property
    def held(self) -> int:
        return sum(array.nbytes for feeds in self.state for array in feeds.values())
