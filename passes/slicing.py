"""Independent parts of a region's function: one branch for each through its whole depth.

The weights of a network that was trained on several unrelated tasks at once show nothing, its function does: moving
the inputs of one task leaves the outputs of the others alone (see `influence`). Each part then gets a branch of its
own. A branch reads the inputs that its outputs need, shared ones included; foreign inputs stand at their mean, which
the bias takes in. Hidden units serve several parts, so each branch starts with a copy of all of them, fitted to its
own outputs; planning then drops those that it can do without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnx_decomp.axes import Region
from onnx_decomp.calibration import Part
from onnx_decomp.passes.compensation import BATCH
from onnx_decomp.passes.folding import blocks_in_order
from onnx_decomp.passes.independence import Independent, co_cluster
from onnx_decomp.passes.influence import fields_of, measure, measure_grouped, off_influence
from onnx_decomp.probe import Probe
from onnx_decomp.program import DROPPED, Labels, Program, Structure
from onnx_decomp.runtime import Device, RunError
from onnx_decomp.sites import GraphIndex

Array = NDArray[np.float32]

SAMPLES = 256
"""Samples of the fit part on which influence is measured; the select part holds as many back for the bound."""
MOST_ROWS = 4096
"""Rows that they have at most: a sample may be a whole sequence."""
MANY = 512
"""Fields from which on groups are moved first, and taken apart where it matters."""
BUDGET = 0.05
"""Share of its outputs' variance that a part may lose before any refit: what is proposed, not what is allowed."""


@dataclass(frozen=True)
class Slicing:
    """Fills `program.slices` for regions whose function has independent parts."""

    samples: int = SAMPLES
    budget: float = BUDGET
    name: str = "influence"

    def run(self, program: Program) -> None:
        if program.data.kind != "calibration":
            return
        chosen = [region for region in program.regions if sliceable(region)]
        if not chosen:
            return
        entries = [region.entries[0] for region in chosen]
        probe = Probe(program.index, (), program.source.folder, entries, provider=program.provider)
        for region in chosen:
            # Where the whole model runs but this part by itself does not, nothing is claimed of it.
            with contextlib.suppress(RunError):
                self._slice(program, region, probe)

    def _slice(self, program: Program, region: Region, probe: Probe) -> None:
        forward = Forward(program.index, region, program.source.folder, program.provider)
        x = self._entry(program, region, probe, "fit")
        rng = np.random.default_rng(program.options.seed)
        fields = fields_of(x)
        look = measure if int(fields.max(initial=0)) < MANY else measure_grouped
        found = co_cluster(look(forward, x, rng, fields, progress=program.progress.advance), rng, self.budget)
        if found is None:
            self._decline(program, region, "influence-everywhere")
            return
        held = self._entry(program, region, probe, "select")
        loss = off_influence(forward, held, found.members, found.outputs, rng)
        # Left out inputs will stand at their mean or, if others tell of them, be made up for: the milder loss counts.
        worst = float(np.minimum(loss.upper, loss.clamped_upper).max())
        numbers = {"influence": found.off, "p": found.p, "off_block": worst, "parts": float(found.blocks)}
        if worst > self.budget:
            self._decline(program, region, "off-block-influence", **numbers)
            return
        program.slices[region.name] = sliced(region, found, forward.splits)
        for site in region.sites:
            program.decide(self.name, site, "applied", "independent-parts", **numbers)

    def _entry(self, program: Program, region: Region, probe: Probe, part: Part) -> Array:
        """What enters the region, [samples, ..., K]."""
        (entry,) = region.entries
        collected: list[Array] = []
        rows = samples = 0
        for feeds in program.data.batches(part, BATCH):
            x = np.asarray(probe.run(feeds, {}, [entry])[entry], np.float32)
            collected.append(x)
            samples += len(x)
            rows += x.size // x.shape[-1]
            if samples >= self.samples or rows >= MOST_ROWS:
                break
        joined = np.concatenate(collected)
        each = max(1, joined.size // joined.shape[-1] // len(joined))
        return joined[: max(2, min(self.samples, MOST_ROWS // each))]

    def _decline(self, program: Program, region: Region, reason: str, **numbers: float) -> None:
        for site in region.sites:
            program.decide(self.name, site, "declined", reason, **numbers)


def sliceable(region: Region) -> bool:
    """One tensor enters, every hidden group can be copied, and what leaves carries its units last."""
    border = {region.group_of[name] for name in (*region.entries, *region.exits)}
    hidden = set(region.groups) - border
    return (
        region.flat
        and len(region.entries) == 1
        and len(region.sites) > 1
        and hidden == region.elastic
        and bool(hidden)
        and not region.constants
        and len({site.matrix for site in region.sites}) == len(region.sites)
        and not {region.group_of[name] for name in region.entries}
        & {region.group_of[name] for name in region.exits}
    )


class Forward:
    """A region by itself: x [S, ..., K] to all its outputs side by side, [S, ..., N]."""

    def __init__(
        self, index: GraphIndex, region: Region, folder: Path | None = None, provider: Device = "cpu"
    ) -> None:
        """folder: where external data lies."""
        self._region, self._type = region, region.sites[0].dtype
        self._probe = Probe(index, region.sites, folder, region=region, provider=provider)
        ends = np.cumsum([len(region.carriers[name].units) for name in region.exits])
        self.splits = tuple(int(end) for end in ends)

    def __call__(self, x: Array) -> Array:
        made = self._probe.run({self._region.entries[0]: x.astype(self._type)}, {})
        return np.concatenate([made[name].astype(np.float32) for name in self._region.exits], axis=-1)


def in_order(found: Independent) -> Independent:
    """The same with parts renamed by their first output."""
    order = np.array(blocks_in_order(found.outputs))
    names = np.full(found.blocks + 1, DROPPED, np.int32)  # the last one: DROPPED indexes it as -1
    names[order] = np.arange(found.blocks)
    return replace(
        found, outputs=names[found.outputs], inputs=names[found.inputs], members=found.members[order]
    )


def sliced(region: Region, found: Independent, splits: Sequence[int]) -> Structure:
    """Branches as a structure over the whole region: copies of hidden units, and of inputs that several parts read.

    Parts are named in the order of their outputs, so that these need no rearranging where each part's lie together.
    """
    found = in_order(found)
    labels: dict[int, Labels] = {}
    copies: dict[int, NDArray[np.intp]] = {}
    parts = np.arange(found.blocks, dtype=np.int32)
    inputs = region.group_of[region.entries[0]]
    for group in region.order:
        size = region.groups[group].size
        if group in region.elastic:
            copies[group] = np.tile(np.arange(size), found.blocks)
            labels[group] = np.repeat(parts, size)
    readers = found.members.sum(0)
    if (readers <= 1).all():
        labels[inputs] = np.where(readers == 1, found.members.argmax(0), DROPPED).astype(np.int32)
    else:
        part, column = np.nonzero(found.members)
        labels[inputs], copies[inputs] = part.astype(np.int32), column
    for name, own in zip(region.exits, np.split(found.outputs, splits[:-1]), strict=True):
        labels[region.group_of[name]] = own.astype(np.int32)
    ordered = {group: labels[group] for group in region.order}
    every = tuple(range(len(region.sites)))
    return Structure(every, ordered, found.blocks, "influence", found.p, 1.0, copies)
