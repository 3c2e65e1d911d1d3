"""From `--init` and `--init-preset` to one null for every site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from onnx_decomp.errors import InputError, UsageError
from onnx_decomp.init_stats.match import Step, Weight, group_sites, pair
from onnx_decomp.init_stats.names import count_layers
from onnx_decomp.init_stats.nulls import Law, Null, estimate, fit
from onnx_decomp.init_stats.orientation import is_transposed
from onnx_decomp.init_stats.presets import PRESETS, Shape
from onnx_decomp.init_stats.sources import Entry, read_entries
from onnx_decomp.init_stats.spec import read_rules
from onnx_decomp.sites import Affine, Site

RESIDUAL = "c_proj"
"""GPT-2's name for a projection that writes the residual stream."""


@dataclass(frozen=True)
class Match:
    """Where the null of a site was taken from."""

    site: str
    index: int
    entry: str
    """Name of the snapshot's entry, the spec's pattern, or the preset."""
    how: Step | Literal["pattern", "preset"]
    transposed: bool = False
    """The entry is W transposed."""


@dataclass(frozen=True)
class InitStats:
    """A null for every site, by Site.index, and what of the user's statistics was used."""

    nulls: dict[int, Null]
    matched: tuple[Match, ...] = ()
    unmatched_entries: tuple[str, ...] = ()
    """Matrices of the snapshot, or patterns of the spec, that no site took."""
    unmatched_sites: tuple[str, ...] = ()
    """Sites that nothing given covers: their null is estimated, and removes nothing on its own."""
    ambiguous: tuple[str, ...] = ()
    """Sites with several equally good entries, or an orientation that nothing tells: none was taken."""

    def report(self) -> dict[str, Any]:
        """The report's `init`, ready for JSON."""
        return {
            "matched": [
                {"site": m.site, "entry": m.entry, "how": m.how, "transposed": m.transposed}
                for m in self.matched
            ],
            "unmatched": {"entries": list(self.unmatched_entries), "sites": list(self.unmatched_sites)},
            "ambiguous": list(self.ambiguous),
        }


@dataclass
class _Found:
    """What was taken from the user's statistics so far."""

    nulls: dict[int, Null] = field(default_factory=dict)
    matched: list[Match] = field(default_factory=list)
    spare: list[str] = field(default_factory=list)
    ambiguous: set[int] = field(default_factory=set)

    def take(self, site: Site, null: Null, match: Match) -> None:
        self.nulls[site.index] = null
        self.matched.append(match)


def load_nulls(
    sites: Sequence[Site],
    affine: Callable[[Site], Affine],
    init: Path | None,
    preset: str | None,
    scopes: Mapping[int, str] | None = None,
) -> InitStats:
    """One null for every site: from the file, else from the preset, else estimated from the trained weights.

    affine: canonical W of a site. scopes: module of a site by its index, where the exporter noted it, as
        `module_scopes` finds them.
    Raises UsageError for an unknown preset, InputError for a file that can't be used or that matches nothing.
    """
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"--init-preset {preset!r}: unknown; choose one of {', '.join(PRESETS)}")
    weights = group_sites([site for site in sites if site.readable], scopes or {})
    found = _Found()
    if init is not None and init.suffix.lower() == ".json":
        _from_spec(init, weights, found)
    elif init is not None:
        _from_snapshot(init, weights, affine, found)
    if preset is not None:
        _from_preset(preset, weights, found)
    bare = [site for site in sites if site.index not in found.nulls]
    asked = init is not None or preset is not None
    return InitStats(
        nulls=found.nulls | {site.index: _estimated(site, affine) for site in bare},
        matched=tuple(sorted(found.matched, key=lambda match: match.index)),
        unmatched_entries=tuple(found.spare),
        unmatched_sites=tuple(
            site.name for site in bare if asked and site.readable and site.index not in found.ambiguous
        ),
        ambiguous=tuple(site.name for site in sites if site.index in found.ambiguous),
    )


def _from_snapshot(
    path: Path, weights: Sequence[Weight], affine: Callable[[Site], Affine], found: _Found
) -> None:
    entries = read_entries(path)
    pairing = pair(weights, entries)
    found.ambiguous |= {site.index for number in pairing.ambiguous for site in weights[number].sites}
    used = set()
    for number, (position, step) in pairing.pairs.items():
        entry = entries[position]
        used.add(position)
        for site in weights[number].sites:
            taken = _snapshot(site, entry, step, affine)
            if taken is None:
                found.ambiguous.add(site.index)
            else:
                null, transposed = taken
                found.take(site, null, Match(site.name, site.index, entry.name, step, transposed))
    if weights and not found.matched and not found.ambiguous:
        wanted = ", ".join(repr(weight.sites[0].weight) for weight in weights[:3])
        raise InputError(
            f"{path}: none of its {len(entries)} entries fits a weight of the model ({wanted}, ...);"
            " give the snapshot of this model, named like its weights or modules"
        )
    found.spare = [entry.name for n, entry in enumerate(entries) if n not in used and entry.is_matrix]


def _snapshot(
    site: Site, entry: Entry, step: Step, affine: Callable[[Site], Affine]
) -> tuple[Null, bool] | None:
    """The null of a matched site and whether the entry is transposed; None where that can't be told."""
    alpha = 1.0 if entry.layout == "canonical" else site.alpha
    read_entry = partial(_matrix, entry, site)
    initial = _scaled(read_entry(), alpha)
    as_stored = len(entry.shape) != 2 or bool(site.packed)
    transposed = (
        False if as_stored else is_transposed(site, entry, step, initial, lambda: affine(site).weight)
    )
    if transposed is None:
        return None
    read = partial(_canonical, read_entry, transposed, alpha)
    return Null("snapshot", fit(initial), f"{entry.file}: {entry.name}", _resolution(site), read), transposed


def _matrix(entry: Entry, site: Site) -> NDArray[np.float32]:
    """An entry as a matrix; one that has more axes, or holds several, is stored as the weight is."""
    return entry.read() if len(entry.shape) == 2 and not site.packed else site.canonical(entry.read())


def _canonical(
    read: Callable[[], NDArray[np.float32]], transposed: bool, alpha: float
) -> NDArray[np.float32]:
    values = _scaled(read(), alpha)
    return np.ascontiguousarray(values.T if transposed else values)


def _scaled(values: NDArray[np.float32], alpha: float) -> NDArray[np.float32]:
    return values if alpha == 1.0 else values * np.float32(alpha)


def _from_spec(path: Path, weights: Sequence[Weight], found: _Found) -> None:
    rules, layers = read_rules(path), _layers(weights)
    used = set()
    for weight in weights:
        names = _pattern_names(weight)
        rule = next((rule for rule in rules if rule.matches(names)), None)
        if rule is None:
            continue
        used.add(rule.where)
        for site in weight.sites:
            law = rule.draw(_shape(site, weight, layers)).scaled(site.alpha)
            null = Null("distribution", law, f"{path}: {rule.match}", _resolution(site))
            found.take(site, null, Match(site.name, site.index, rule.match, "pattern"))
    if weights and not used:
        wanted = ", ".join(repr(name) for name in _pattern_names(weights[0]))
        raise InputError(
            f"{path}: no pattern matches a weight of the model (the first is {wanted}); mend the patterns"
        )
    found.spare = [rule.match for rule in rules if rule.where not in used]


def _from_preset(name: str, weights: Sequence[Weight], found: _Found) -> None:
    layers = _layers(weights)
    for weight in weights:
        for site in weight.sites:
            if site.index in found.nulls:
                continue
            law = PRESETS[name](_shape(site, weight, layers)).scaled(site.alpha)
            null = Null("distribution", law, f"preset {name}", _resolution(site))
            found.take(site, null, Match(site.name, site.index, name, "preset"))


def _pattern_names(weight: Weight) -> list[str]:
    """What a pattern may match: names of stored weight and node, `module.path.weight`, `module.path`."""
    modules = [".".join(path) for path in weight.names.paths]
    return [*weight.names.exact, *(f"{module}.weight" for module in modules), *modules]


def _is_residual(weight: Weight) -> bool:
    return any(path[-1] == RESIDUAL for path in weight.names.paths)


def _layers(weights: Sequence[Weight]) -> int:
    return count_layers([path for weight in weights if _is_residual(weight) for path in weight.names.paths])


def _shape(site: Site, weight: Weight, layers: int) -> Shape:
    # An empty weight has no fans; its law is never used, but every site has one.
    return Shape(max(site.shape[0], 1), max(site.shape[1], 1), layers if _is_residual(weight) else 0)


def _estimated(site: Site, affine: Callable[[Site], Affine]) -> Null:
    law = estimate(affine(site).weight) if site.readable else Law("normal", 0.0, 0.0)
    return Null("estimated", law, "estimated", _resolution(site))


def _resolution(site: Site) -> float:
    """Relative rounding of the values as they are stored."""
    stored = site.storage if site.readable else np.float32
    return float(ml_dtypes.finfo(stored).eps)  # type: ignore[no-untyped-call]
