"""Which entry of a snapshot is the initial value of which weight. Exporters rename; doubt means no.

In this order, each step on what the ones before left over:

1. name: an entry called like the stored weight, or like the node;
2. scope: the module path agrees best, from both sides, and with nothing else as well;
3. generated: the same made-up name (`onnx::MatMul_12`), which only the same exporter repeats;
4. shape: one weight and one entry left that fit each other and nothing else.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from onnx_decomp.errors import InputError
from onnx_decomp.init_stats.names import Names, agreement, is_generated, site_names
from onnx_decomp.init_stats.sources import Entry
from onnx_decomp.sites import Site

Step = Literal["name", "scope", "generated", "shape"]

Score = tuple[int, bool]
"""How well two module paths agree, see `agreement`."""


@dataclass(frozen=True)
class Weight:
    """One stored tensor and the sites that use it."""

    sites: tuple[Site, ...]
    names: Names

    @property
    def shape(self) -> tuple[int, ...]:
        """Of W, or of what is stored where that holds several."""
        return self.sites[0].packed or self.sites[0].shape

    def fits(self, entry: Entry) -> bool:
        """The entry has the shape of W [K, N], of its transpose where its orientation is open, or of what is stored."""
        shape, source = self.sites[0].shape, self.sites[0].source
        if len(entry.shape) != 2 or self.sites[0].packed:
            return source is not None and entry.shape == tuple(source.tensor.dims)
        return entry.shape == shape or (entry.layout != "canonical" and entry.shape == shape[::-1])


@dataclass
class Pairing:
    """What was paired, by position in the sequences that were matched."""

    pairs: dict[int, tuple[int, Step]] = field(default_factory=dict)
    ambiguous: set[int] = field(default_factory=set)


def group_sites(sites: Sequence[Site], scopes: Mapping[int, str]) -> list[Weight]:
    """Sites by stored tensor: all uses of a shared weight have the same initial value."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[Site]] = defaultdict(list)
    for site in sites:
        groups[site.weight, site.graph, tuple(sorted(site.packed or site.shape))].append(site)
    return [
        Weight(tuple(group), _merge([site_names(site, scopes.get(site.index)) for site in group]))
        for group in groups.values()
    ]


def _merge(names: Sequence[Names]) -> Names:
    exact = dict.fromkeys(name for item in names for name in item.exact)
    return Names(tuple(exact), tuple(dict.fromkeys(path for item in names for path in item.paths)))


def pair(weights: Sequence[Weight], entries: Sequence[Entry]) -> Pairing:
    """Pair weights with entries. Raises InputError where a weight's own name has another shape."""
    found = Pairing()
    _by_exact_name(weights, entries, found, "name", lambda name: not is_generated(name))
    _by_scope(weights, entries, found)
    _by_exact_name(weights, entries, found, "generated", is_generated)
    _by_shape(weights, entries, found)
    found.ambiguous -= found.pairs.keys()
    return found


def _by_exact_name(
    weights: Sequence[Weight],
    entries: Sequence[Entry],
    found: Pairing,
    step: Step,
    wanted: Callable[[str], bool],
) -> None:
    named: dict[str, set[int]] = defaultdict(set)
    for position, entry in enumerate(entries):
        for name in entry.names.exact:
            named[name].add(position)
    used = _used(found)
    for number, weight in enumerate(weights):
        if number in found.pairs:
            continue
        for name in filter(wanted, weight.names.exact):
            owners = named.get(name, set()) - used
            if len(owners) != 1:
                continue
            (position,) = owners
            if weight.fits(entries[position]):
                found.pairs[number] = (position, step)
                break
            if step == "name" and name == weight.sites[0].weight == entries[position].name:
                raise _wrong_shape(entries[position], weight)


def _wrong_shape(entry: Entry, weight: Weight) -> InputError:
    return InputError(
        f"{entry.file}: entry {entry.name!r} has shape {list(entry.shape)}, but the weight of"
        f" {weight.sites[0].name!r} is {list(weight.shape)}; give the snapshot of this very model"
    )


def _by_scope(weights: Sequence[Weight], entries: Sequence[Entry], found: Pairing) -> None:
    """Pair what agrees best from both sides, again and again: each pair made leaves fewer to confuse."""
    scores = _scores(weights, entries, found)
    while True:
        pairs, tied = _best_pairs(scores)
        found.pairs.update({number: (position, "scope") for number, position in pairs.items()})
        if not pairs:
            found.ambiguous |= tied
            return
        taken = set(pairs.values())
        rows = {number: row for number, row in scores.items() if number not in pairs}
        rest = {n: {e: score for e, score in row.items() if e not in taken} for n, row in rows.items()}
        scores = {number: row for number, row in rest.items() if row}


def _best_pairs(scores: Mapping[int, Mapping[int, Score]]) -> tuple[dict[int, int], set[int]]:
    """Weights and entries that are each other's only best, and weights for which several are equally good."""
    claims: dict[int, list[Score]] = defaultdict(list)
    for row in scores.values():
        for position, score in row.items():
            claims[position].append(score)
    pairs, tied = {}, set()
    for number, row in scores.items():
        best = max(row.values())
        candidates = [position for position, score in row.items() if score == best]
        rivals = claims[candidates[0]]
        if len(candidates) > 1 or (max(rivals) == best and rivals.count(best) > 1):
            tied.add(number)
        elif max(rivals) == best:
            pairs[number] = candidates[0]
    return pairs, tied


def _scores(
    weights: Sequence[Weight], entries: Sequence[Entry], found: Pairing
) -> dict[int, dict[int, Score]]:
    """How well each weight left over agrees with each entry left over that fits it, where it does at all."""
    used = _used(found)
    by_last: dict[str, list[int]] = defaultdict(list)
    for position, entry in enumerate(entries):
        for last in {path[-1] for path in entry.names.paths if path}:
            if position not in used:
                by_last[last].append(position)
    scores: dict[int, dict[int, Score]] = {}
    for number, weight in enumerate(weights):
        if number in found.pairs:
            continue
        row: dict[int, Score] = {}
        for path in weight.names.paths:
            for position in by_last.get(path[-1], []):
                if weight.fits(entries[position]):
                    score = max(agreement(path, other) for other in entries[position].names.paths)
                    row[position] = max(score, row.get(position, (0, False)))
        row = {position: score for position, score in row.items() if score[0]}
        if row:
            scores[number] = row
    return scores


def _by_shape(weights: Sequence[Weight], entries: Sequence[Entry], found: Pairing) -> None:
    used = _used(found)
    free: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for position, entry in enumerate(entries):
        if position not in used and entry.is_matrix:
            free[tuple(sorted(entry.shape))].append(position)
    fitting = {
        number: [n for n in free.get(tuple(sorted(weight.shape)), []) if weight.fits(entries[n])]
        for number, weight in enumerate(weights)
        if number not in found.pairs
    }
    claims = Counter(position for candidates in fitting.values() for position in candidates)
    for number, candidates in fitting.items():
        if len(candidates) == 1 and claims[candidates[0]] == 1:
            found.pairs[number] = (candidates[0], "shape")
        elif candidates:
            found.ambiguous.add(number)


def _used(found: Pairing) -> set[int]:
    return {position for position, _ in found.pairs.values()}
