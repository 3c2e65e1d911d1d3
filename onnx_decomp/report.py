"""What a compilation found, did and measured, as plain data: the JSON report, schema "onnx-decomp/1"."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import onnx
from scipy.stats import mannwhitneyu

from onnx_decomp import model_io, saving, scratch
from onnx_decomp.axes import Region
from onnx_decomp.errors import InputError
from onnx_decomp.init_stats import InitStats
from onnx_decomp.passes.folding import correction_widths, head_width, site_flops, site_labels, site_rank
from onnx_decomp.program import DROPPED, Decision, Program, Rewrite, Segment, Structure
from onnx_decomp.sites import IN_BODY, Site

if TYPE_CHECKING:  # both start ONNX Runtime, which reading a report does not need
    from onnx_decomp.latency import Latency
    from onnx_decomp.metrics import Verification
    from onnx_decomp.model_io import ModelFile
    from onnx_decomp.profiling import Operator

SCHEMA = "onnx-decomp/1"

PARTS: tuple[Literal["fit", "select", "report"], ...] = ("fit", "select", "report")

Report = dict[str, Any]
Span = TypeVar("Span", Structure, Segment)


@dataclass(frozen=True)
class Measured:
    """What only the run knows: gates, time, and what was undone on the way."""

    verification: Verification | None
    """None where the outputs could not be compared."""
    rewrite_change: float
    """Largest relative L2 distance of the written model from the dense-equivalent one."""
    latency: Latency | None
    seconds: float
    scores: tuple[float, float] | None = None
    """Of the original and of the written model, where --evaluate gave a function for it."""
    shapes: Mapping[str, Latency] = field(default_factory=dict)
    """Of every shape that was asked for; `latency` is the worst of them."""
    operators: Sequence[Operator] = ()
    """Of the models as ONNX Runtime optimizes them, where latency was measured."""
    history: Sequence[Mapping[str, Any]] = ()
    """{round, undone, why} for each round in which a gate undid something."""
    warnings: Sequence[str] = ()


def build(program: Program, written: onnx.ModelProto | None, measured: Measured) -> Report:
    """The report on one compilation; `written` is None where nothing was kept. NaN becomes null."""
    source, data = program.source, program.data
    dense, rewritten = matmul_flops(program)
    same = {"sha256": source.sha256, "bytes": source.size}
    output = {"path": None, **(same if written is None else _serialized(written, source))}
    report: Report = {
        "schema": SCHEMA,
        "verdict": verdict(program, measured.latency),
        "warnings": measured.warnings,
        "input": {"path": source.path, **same, **_size(source.proto, dense)},
        "output": {**output, **_size(written or source.proto, rewritten)},
        "options": dataclasses.asdict(program.options),
        "versions": versions(),
        "seed": program.options.seed,
        "seconds": round(measured.seconds, 3),
        "kept": [name for name, _ in program.kept],
        "history": measured.history,
        "init": _init(program),
        "data": {"kind": data.kind} | {part: data.samples(part) for part in PARTS},
        "sites": _sites(program),
        "verify": _verification(measured.verification),
        "evaluate": _evaluation(program, measured.scores),
        "rewrite": {"max_rel_l2": measured.rewrite_change},
        "plan": {"predicted": program.predicted, "measured": _measured_change(measured.verification)},
        "latency": _latency(measured),
        "operators": [dataclasses.asdict(each) for each in measured.operators],
    }
    plain: Report = _plain(report)
    return plain


def _latency(measured: Measured) -> Report | str:
    if measured.latency is None:
        return "not measured"
    shapes = [{"shape": name, **dataclasses.asdict(each)} for name, each in measured.shapes.items()]
    return dataclasses.asdict(measured.latency) | ({"shapes": shapes} if shapes else {})


def record_output(report: Report, out: Path) -> None:
    """Put down that the model was written to `out`."""
    report["output"]["path"] = str(out)
    if report["output"]["sha256"] is None:
        file = model_io.load(out)
        report["output"] |= {"sha256": file.sha256, "bytes": file.size}


def verdict(program: Program, latency: Latency | None) -> str:
    """The one line that the command ends with."""
    if not program.kept:
        return "nothing kept: OUT is IN byte for byte"
    dense, rewritten = matmul_flops(program)
    line = f"kept {len(program.kept)} of {_regions(program)} regions: "
    line += f"{rewritten / dense:.2g} of the MatMul FLOPs, "
    if latency is None:
        line += "latency not measured"
    else:
        ratio, word = (latency.speedup, "faster") if latency.speedup >= 1 else (1 / latency.speedup, "slower")
        threads = (
            f"{latency.threads} thread{'s' * (latency.threads != 1)}" if latency.threads else "all threads"
        )
        line += f"{ratio:.3g}x {word} on {latency.provider} with {threads}"
    return line if program.data.kind == "calibration" else f"{line}; not verified on real data"


def matmul_flops(program: Program) -> tuple[int, int]:
    """FLOPs of all sites for one sample of the report data: of the original, and with the rewrites."""
    rows = program.rows_per_sample
    computed = {
        site.index: multiplications(rewrite, position)
        for rewrite in program.rewrites
        for position, site in enumerate(rewrite.region.sites)
    }
    own = [site for site in program.sites if body_of(program, site) is None]
    dense = sum(site.flops * rows.get(site.index, 1) for site in own)
    rewritten = sum(2 * computed.get(site.index, site.flops // 2) * rows.get(site.index, 1) for site in own)
    for inner in program.inner.values():
        before, after = matmul_flops(inner)
        dense, rewritten = (
            dense + round(inner.per_sample * before),
            rewritten + round(inner.per_sample * after),
        )
    return dense, rewritten


def body_of(program: Program, site: Site) -> str | None:
    """The body, compiled as a model of its own, that a site of a program was found in; None for others."""
    bodies = (where for where in program.inner if f"{site.graph}/".startswith(f"{where}/"))
    return max(bodies, key=len, default=None)


def _regions(program: Program) -> int:
    return len(program.regions) + sum(_regions(inner) for inner in program.inner.values())


def multiplications(rewrite: Rewrite, position: int) -> int:
    """Multiplications that a rewrite does for one row of the input of the region's site at `position`."""
    segment = _covering(rewrite.segments, position)
    if segment is None:
        return rewrite.region.sites[position].flops // 2
    return site_flops(rewrite.region, segment, position) // 2


def versions() -> dict[str, str]:
    """Versions of what decides the result; ONNX Runtime under the name of the package that is installed."""
    found = {}
    for name in ("onnx-decomp", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def to_json(report: Report) -> str:
    """The report as text; a list of numbers stays on one line, however long."""
    text = json.dumps(report, indent=2, allow_nan=False)
    # A raw line break never stands inside a JSON string, so names can't be mistaken for lists.
    return re.sub(r"\[(\n[-+.\de,\s]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def read(path: Path) -> Report:
    """A report that an earlier run has written."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not a readable report ({error}); give a file that --report wrote"
        ) from error
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise InputError(f"{path}: not a report of schema {SCHEMA}; give a file that --report wrote")
    return report


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What a report lacks, or holds in another form, shows where it is used: one line instead of a KeyError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError(
            f"{path}: a damaged report ({type(error).__name__}: {error}); give a file that --report wrote"
        ) from error


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all: beside its place first, then renamed. Raises InputError if that fails."""
    temporary = scratch.beside(path)
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"{path}: can't be written: {reason}; write it elsewhere") from error
    finally:
        temporary.unlink(missing_ok=True)


def _serialized(model: onnx.ModelProto, source: ModelFile) -> Report:
    """What the file of a model will be; not known where saving will move its large tensors out of it."""
    if not saving.as_it_stands(model, source):
        return {"sha256": None, "bytes": None}
    data = model.SerializeToString(deterministic=True)
    beside = sum((source.folder / name).stat().st_size for name in model_io.external_files(model))
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data) + beside}


def _size(model: onnx.ModelProto, flops: int) -> Report:
    return {"parameters": model_io.parameters(model), "matmul_flops": flops}


def _sites(program: Program) -> list[Report]:
    """One entry for each site, those of a body where the body is first met."""
    own = dict(zip((site.index for site in program.sites), _own_sites(program), strict=True))
    entries: list[Report] = []
    seen = set[str]()
    for site in program.sites:
        where = body_of(program, site)
        if where is None:
            entries.append(own[site.index])
        elif where not in seen:
            seen.add(where)
            entries += _inner_sites(program, where, own)
    return entries


def _inner_sites(program: Program, where: str, own: Mapping[int, Report]) -> list[Report]:
    """Sites of a body as it was compiled; those that it does not know as products with a constant stay as listed."""
    entries = _sites(program.inner[where])
    for entry in entries:
        entry["graph"] = where if entry["graph"] == "main" else f"{where}/{entry['graph']}"
        entry["region"] = entry["region"] and f"{where}/{entry['region']}"

    names = Counter((entry["graph"], entry["op"], entry["node"]) for entry in entries)
    shapes = Counter(_product(entry["graph"], entry["op"], entry["shape"]) for entry in entries)
    unnamed = []
    for site in program.sites:
        name, product = (site.graph, site.op, site.name), _product(site.graph, site.op, site.shape)
        if body_of(program, site) != where:
            continue
        if names[name] and shapes[product]:
            names[name] -= 1
            shapes[product] -= 1
        else:
            unnamed.append((site, product))
    for site, product in unnamed:  # or called otherwise in the body, as by another weight
        if shapes[product]:
            shapes[product] -= 1
        else:
            entries.append(own[site.index])
    return entries


def _product(graph: str, op: str, shape: tuple[int, int]) -> tuple[object, ...]:
    """What tells a product that has no name of its own; an Attention is listed once, and compiled as three."""
    return graph, op, shape if op != "Attention" else "three in one"


def _own_sites(program: Program) -> list[Report]:
    place = {
        site.index: (region, position)
        for region in program.regions
        for position, site in enumerate(region.sites)
    }
    rewrites = {rewrite.region.name: rewrite for rewrite in program.rewrites}
    said: dict[int, list[Decision]] = defaultdict(list)
    for decision in program.decisions:
        said[decision.site].append(decision)
    entries = []
    for site in program.sites:
        region, position = place.get(site.index, (None, 0))
        name = region.name if region else None
        rewrite = rewrites.get(name) if name else None
        unused = _unused(said[site.index], rewrite, position)
        entries.append(
            {
                "node": site.name,
                "op": site.op,
                "weight": site.weight,
                "shape": site.shape,
                "dtype": str(site.dtype),
                "graph": site.graph,
                "region": name,
                **_evidence(program, site, said[site.index]),
                "structure": _structure(program, region, position, unused) if region else None,
                **_outcome(site, rewrite, position),
                "reason": _reason(program, site, name, rewrite, said[site.index]),
                "error": _errors(rewrite, position),
                "agreement": _agreement(program, site, rewrite, position),
                "decisions": [
                    {"pass": d.where, "verdict": d.verdict, "reason": d.reason, "numbers": dict(d.numbers)}
                    for d in said[site.index]
                ],
            }
        )
    return entries


def _init(program: Program) -> Report:
    """What of the user's statistics was used, in bodies too: what is left over is what none of them took."""
    found = (program.init or InitStats({})).report()
    for inner in program.inner.values():
        more = _init(inner)
        found["matched"] += more["matched"]
        found["ambiguous"] += more["ambiguous"]
        found["unmatched"]["sites"] += more["unmatched"]["sites"]
        taken = {match["entry"] for match in more["matched"]}
        spare = found["unmatched"]["entries"]
        found["unmatched"]["entries"] = [entry for entry in spare if entry not in taken]
    return found


def _measured_change(verification: Verification | None) -> float | None:
    """What the outputs change by on the report part, by the metric: to hold against what the plan expected."""
    return None if verification is None else verification.largest


def _agreement(program: Program, site: Site, rewrite: Rewrite | None, position: int) -> Report | None:
    """How well the evidence of the weights told which rows and columns could go.

    The share of pairs of one that stayed and one that went in which the one that stayed has more evidence (mean z²):
    1 if evidence told exactly, 0.5 if it told nothing. None for an axis of which nothing went, or all of it.
    """
    found, segment = (
        program.evidence.get(site.index),
        _covering(rewrite.segments, position) if rewrite else None,
    )
    if found is None or rewrite is None or segment is None or segment.copies:
        return None
    told: Report = {}
    whole = dataclasses.replace(segment, heads={})  # what narrower heads keep are no columns of the original
    for axis, (name, labels) in enumerate(
        zip(("rows", "cols"), site_labels(rewrite.region, whole, position), strict=True)
    ):
        stayed, energy = labels != DROPPED, (found.z.astype(np.float64) ** 2).mean(axis=1 - axis)
        told[name] = None
        if stayed.any() and not stayed.all():
            pairs = int(stayed.sum()) * int((~stayed).sum())
            told[name] = float(mannwhitneyu(energy[stayed], energy[~stayed]).statistic) / pairs
    return told


def _errors(rewrite: Rewrite | None, position: int) -> Report:
    """Relative error of a site's own output: expected from the fit, and measured on the select part."""
    if rewrite is None or not rewrite.errors:
        return {"predicted": None, "measured": None}
    fitted, measured = rewrite.errors[position]
    return {"predicted": fitted, "measured": measured}


def _evidence(program: Program, site: Site, said: Sequence[Decision]) -> Report:
    """What the two witnesses say about a site, whatever was decided."""
    influence = [decision.numbers["influence"] for decision in said if "influence" in decision.numbers]
    found = program.evidence.get(site.index)
    null: Report | None = None
    if found is not None:
        null = {"kind": found.kind, "fits": found.fits, "misfit": found.misfit}
        null |= {"scale": found.scale, "shrink": found.shrink, "summary": dict(found.summary)}
    elif program.init is not None and site.index in program.init.nulls:
        null = {"kind": program.init.nulls[site.index].kind, "fits": None}
    return {
        "null": null,
        "supported": found.supported if found else None,
        "learned_rank": found.learned_rank if found else None,
        "influence": influence[-1] if influence else None,
    }


def _unused(said: Sequence[Decision], rewrite: Rewrite | None, position: int) -> str | None:
    """Why the blocks that were found at a site were not written, even if it was reduced otherwise."""
    segment = _covering(rewrite.segments, position) if rewrite else None
    if segment is not None and segment.blocks > 1:
        return None
    declined = [decision.reason for decision in said if decision.verdict == "declined"]
    return declined[-1] if declined else None


def _structure(program: Program, region: Region, position: int, unused: str | None) -> Report | None:
    """What was found at a site: what was written, else by its weights, else by the function of its region."""
    by_weights, sliced = program.structures.get(region.name, ()), program.slices.get(region.name)
    rewrite = next((r for r in program.rewrites if r.region.name == region.name), None)
    segment = _covering(rewrite.segments, position) if rewrite else None
    found = [*by_weights, *([sliced] if sliced else [])]
    slices = segment is not None and any(group in region.elastic for group in segment.copies)
    structure = _covering(found[::-1] if slices else found, position)
    if structure is None:
        return None
    told = {"kind": structure.kind, "p": structure.p, "stability": structure.stability}
    return {"blocks": _blocks(region, structure, position), **told, "unused": unused}


def _outcome(site: Site, rewrite: Rewrite | None, position: int) -> Report:
    """The decision on the site itself: a region that is split may hold a layer that stays dense."""
    segment = _covering(rewrite.segments, position) if rewrite else None
    if rewrite is None or segment is None:
        return {
            "decision": "dense",
            "form": None,
            "rank": None,
            "correction": None,
            "head_width": None,
            "flop_ratio": 1.0,
        }
    count, dense = multiplications(rewrite, position), site.shape[0] * site.shape[1]
    rank = site_rank(rewrite.region, segment, position)
    decision = "low-rank" if rank is not None else "reduced" if count < dense else "dense"
    decision = "split" if segment.blocks > 1 else decision
    width = head_width(rewrite.region, segment, position)
    beside = correction_widths(rewrite.region, segment, position)
    return {
        "decision": decision,
        "form": segment.form,
        "rank": rank,
        "correction": None if beside is None else beside[1],
        "head_width": width,
        "flop_ratio": count / dense,
    }


def _reason(
    program: Program, site: Site, region: str | None, rewrite: Rewrite | None, said: Sequence[Decision]
) -> str | None:
    """Why it is as it is. What a gate undid tells more than the later pass that found it banned."""
    if site.obstacle == IN_BODY and said:
        return said[-1].reason  # why the body could not be looked at by itself
    if site.obstacle is not None:
        return site.obstacle
    if rewrite is not None:
        return rewrite.reason
    if region in program.banned:
        return program.banned[region]
    return said[-1].reason if said else None


def _covering(spans: Iterable[Span], position: int) -> Span | None:
    return next((span for span in spans if position in span.sites), None)


def _blocks(region: Region, structure: Structure, position: int) -> list[Report]:
    """Rows and columns of each block at one site, in original order."""
    sides = []
    for group, units in zip(region.ends[position], region.units[position], strict=True):
        labels, copies = structure.labels[group], structure.copies.get(group)
        of_elements = labels[units] if copies is None else labels
        originals = np.arange(len(units)) if copies is None else copies
        sides.append([np.sort(originals[of_elements == block]) for block in range(structure.blocks)])
    return [{"rows": rows, "cols": columns} for rows, columns in zip(*sides, strict=True)]


def _verification(found: Verification | None) -> Report | None:
    if found is None:
        return None
    outputs = {name: dataclasses.asdict(change) for name, change in found.outputs.items()}
    for name, entry in outputs.items():
        metric, tolerance = found.limits.of(name)
        if (metric, tolerance) != (found.metric, found.tolerance):
            entry |= {"metric": metric, "tolerance": tolerance}
    return {
        "passed": found.passed,
        "metric": found.metric,
        "tolerance": found.tolerance,
        "reason": found.reason,
        "outputs": outputs,
    }


def _evaluation(program: Program, scores: tuple[float, float] | None) -> Report | None:
    if program.options.evaluate is None:
        return None
    before, after = scores or (None, None)
    told = {"function": program.options.evaluate, "before": before, "after": after}
    return told | {"tolerance": program.options.tolerance}


def _plain(value: Any) -> Any:
    """The same in JSON's own types; NaN and infinity, which JSON lacks, become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)
