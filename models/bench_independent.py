"""Independent parts of trained networks through the whole compiler, judged on samples that nothing was fitted on.

All accuracies, losses and changes of outputs are those on the held-back samples; the compiler sees the calibration data
only. The tolerances were set by hand, one for each kind of model: the calibration data has no labels to choose them by.
That of the towers was lowered once, from 0.1, where two of the six lost half a point of held-back accuracy.
A difference of accuracies is paired: its 95 % interval comes from drawing the held-back samples anew (Efron's
bootstrap). Digits occur in several samples, so that it is rather too narrow for other digits.

Unit pruning is the same reduction with the same refit, but without slices: it gets at least as many FLOPs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from rich.table import Table

import models
from models.bench_common import Section, table
from onnx_decomp import model_io
from onnx_decomp.axes import Region
from onnx_decomp.compiler import Result, compile_model
from onnx_decomp.metrics import compare_outputs
from onnx_decomp.options import Options
from onnx_decomp.passes.compensation import BATCH, Calibrator, refit_run
from onnx_decomp.passes.criterion import untouched_rows
from onnx_decomp.passes.folding import compose, kept_flops
from onnx_decomp.passes.independence import co_cluster
from onnx_decomp.passes.influence import fields_of
from onnx_decomp.passes.influence import measure as move_inputs
from onnx_decomp.passes.knobs import unread_inputs
from onnx_decomp.passes.reduction import UnitPath, round_up, unit_path
from onnx_decomp.passes.slicing import Forward, Slicing
from onnx_decomp.probe import Probe, outer_tensors
from onnx_decomp.program import Program, Segment
from onnx_decomp.runtime import open_session
from onnx_decomp.sites import Affine

Floats = NDArray[np.float64]
Labels = NDArray[np.integer[Any]]

TOWERS = (
    "towers/dense",
    "towers/dense-1",
    "towers/dense-2",
    "towers/deep-0",
    "towers/deep-1",
    "towers/deep-2",
)
CONTROLS = ("digits", "coupled", "frozen", "charlm")
TOLERANCES = {"towers": 0.09, "exact": 0.07, "ranker": 0.03, "shared": 0.1, "control": 0.05}
"""Change of the outputs (relative L2) that each kind of model is allowed."""

PIXELS, CLASSES = 64, 10
"""Inputs and outputs of one digit of the towers."""
FEW, DRAWS = 64, 20
"""Samples that are enough to see the parts, and draws of them."""
RESAMPLES = 2_000


# --- what is measured ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """One compilation. flops: of the products with stored weights, after over before; change: relative L2.

    worse: what the metric lost, in its own unit, with its 95 % interval.
    """

    name: str
    tolerance: float
    kept: str
    flops: float
    change: float
    metric: str
    before: float
    after: float
    worse: tuple[float, float, float]
    seconds: float


@dataclass(frozen=True)
class Pruned:
    """Unit pruning at no fewer FLOPs. further: what it loses beyond the compiler's own way, with its interval."""

    flops: float
    change: float
    after: float
    further: tuple[float, float, float]


@dataclass(frozen=True)
class Look:
    """Parts that a number of samples shows, against the four digits and their heads.

    outputs, inputs: adjusted Rand index; of the inputs those that vary in these samples, each at the part that it
    moves most. foreign: inputs of another digit that branches read, over all branches. accepted: no test objected.
    """

    outputs: float
    inputs: float
    foreign: int
    accepted: bool


@dataclass(frozen=True)
class TowersRow:
    """Four tasks in one dense network. look: as compiled; few: from `FEW` samples, draw by draw."""

    outcome: Outcome
    parts: int
    look: Look
    few: tuple[Look, ...]
    pruned: Pruned


@dataclass(frozen=True)
class ExactRow:
    """Masked towers: components of the whole network. right: hidden units and logits in their true component."""

    outcome: Outcome
    components: int
    kind: str
    right: float
    redrawn: float
    """Change of the outputs if what never learned is drawn anew from its null: why a refit has to follow."""


@dataclass(frozen=True)
class RankerRow:
    """Features that no training sample had, as rows of the first weight that are exactly their initial values."""

    outcome: Outcome
    never: int
    found: int
    precision: float
    recall: float


@dataclass(frozen=True)
class Branch:
    """What one branch reads of the inputs that vary, against what its task depends on."""

    task: int
    reads: int
    precision: float
    recall: float
    shared: float
    """Share of the inputs that several tasks need which this branch kept."""


@dataclass(frozen=True)
class SharedRow:
    """Tasks with a common input. outputs: adjusted Rand index of the logits against the tasks."""

    outcome: Outcome
    outputs: float
    branches: tuple[Branch, ...]
    pruned: Pruned


@dataclass(frozen=True)
class ControlRow:
    """A network without independent parts; claimed: regions with slices, and segments written as blocks."""

    outcome: Outcome
    claimed: int
    weights: str
    function: str


Row = TowersRow | ExactRow | RankerRow | SharedRow | ControlRow


# --- compiling and scoring ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """A compilation with everything that its rows are made of."""

    trained: models.TrainedModel
    result: Result
    program: Program
    outcome: Outcome
    feeds: dict[str, NDArray[Any]]
    target: NDArray[np.integer[Any]]
    original: NDArray[Any]
    """Its output on the held-back samples."""
    scores: Floats
    """The metric of each held-back sample after compiling."""


def compiled(name: str, tolerance: float) -> Compiled:
    """Through the whole compiler with everything that the model has: snapshot and calibration data."""
    trained = models.load(name)
    options = Options(
        init=trained.init,
        calib=trained.calib,
        tolerance=tolerance,
        objective="flops",
        provider="cpu",
        threads=1,
        latency_gate=False,
    )
    started = time.perf_counter()
    result, program = compile_model(model_io.load(trained.model), options)
    seconds = time.perf_counter() - started
    feeds = dict(np.load(trained.report))
    target = feeds.pop("target")
    original, written = (answer(model, feeds) for model in (onnx.load(trained.model), result.model))
    before, after = (scores(trained, logits, target) for logits in (original, written))
    outcome = Outcome(
        name,
        tolerance,
        ", ".join(sorted({rewrite.decision for rewrite in program.rewrites})) or "nothing",
        result.report["output"]["matmul_flops"] / result.report["input"]["matmul_flops"],
        change(original, written),
        trained.meta["metric"],
        float(before.mean()),
        float(after.mean()),
        interval(models.worsening(trained, before, after)),  # type: ignore[arg-type]
        seconds,
    )
    return Compiled(trained, result, program, outcome, feeds, target, original, after)


def answer(model: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """The model's one output."""
    (made,) = open_session(model, threads=1).run(feeds).values()
    return np.asarray(made)


def change(before: NDArray[Any], after: NDArray[Any]) -> float:
    """Relative L2, as the compiler's own gate takes it."""
    return compare_outputs([({"y": before}, {"y": after})], "rel-l2", np.inf).largest


def scores(trained: models.TrainedModel, logits: NDArray[Any], target: NDArray[Any]) -> Floats:
    """The task metric of each sample; its mean is that of all."""
    each = (slice(at, at + 1) for at in range(len(target)))
    return np.array([models.metric(trained, logits[one], target[one]) for one in each])


def interval(values: Floats) -> tuple[float, float, float]:
    """Mean of values [S], and its 95 % interval over samples."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def rand_index(first: Labels, second: Labels) -> float:
    """Adjusted Rand index of two partitions of the same elements (Hubert and Arabie 1985)."""
    a, b = (np.unique(labels, return_inverse=True)[1] for labels in (first, second))
    counts = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(counts, (a, b), 1)
    both, rows, columns = (_pairs(each) for each in (counts, counts.sum(1), counts.sum(0)))
    expected = rows * columns / max(_pairs(np.array(len(a))), 1.0)
    most = (rows + columns) / 2
    return 1.0 if most == expected else float((both - expected) / (most - expected))


def _pairs(counts: Floats) -> float:
    return float((counts * (counts - 1) / 2).sum())


def whole_region(program: Program) -> Region:
    """The one region that these networks are."""
    (region,) = program.regions
    return region


# --- towers that were trained densely -----------------------------------------------------------------------------


def measure_towers(name: str) -> TowersRow:
    done = compiled(name, TOLERANCES["towers"])
    found = done.program.slices.get(whole_region(done.program).name)
    few = tuple(look(in_another_order(done.program, draw), FEW) for draw in range(DRAWS))
    parts = found.blocks if found else 1
    return TowersRow(done.outcome, parts, look(done.program), few, pruned(done))


def in_another_order(program: Program, draw: int) -> Program:
    """The same with its calibration samples in another order, so that the first ones are others."""
    rng = np.random.default_rng(draw)
    parts = {
        part: {name: array[rng.permutation(len(array))] for name, array in feeds.items()}
        for part, feeds in program.data.parts.items()
    }
    return replace(program, data=replace(program.data, parts=parts))


def look(program: Program, samples: int = Slicing().samples) -> Look:
    """Parts as the pass finds them by itself; nothing in `program` changes."""
    region = whole_region(program)
    again = replace(program, slices={}, decisions=[])
    Slicing(samples=samples).run(again)
    (array,) = program.data.parts["fit"].values()
    x = array[:samples]
    rng = np.random.default_rng(program.options.seed)
    moved = move_inputs(Forward(program.index, region), x, rng, fields_of(x))
    found = co_cluster(moved, rng, Slicing().budget)
    if found is None:
        return Look(0.0, 0.0, 0, False)
    varies = (x != x[:1]).any(0)
    digit, head = np.arange(x.shape[1]) // PIXELS, np.arange(len(found.outputs)) // CLASSES
    return Look(
        rand_index(found.outputs, head),
        rand_index(found.inputs[varies], digit[varies]),
        foreign_reads(found.members, found.outputs, digit, head),
        region.name in again.slices,
    )


def foreign_reads(members: NDArray[np.bool_], outputs: Labels, digit: Labels, head: Labels) -> int:
    """Inputs of digits that none of a branch's outputs is about, over all branches."""
    own = [np.isin(digit, head[outputs == part]) for part in range(len(members))]
    return int((members & ~np.array(own)).sum())


# --- unit pruning at equal FLOPs ----------------------------------------------------------------------------------


def pruned(done: Compiled) -> Pruned:
    """The best of pruning hidden units, or inputs as well, by the change on the select part: as planning chooses."""
    region = whole_region(done.program)
    dense = sum(site.flops for site in region.sites)
    least = done.outcome.flops * dense
    groups = sorted(region.elastic)
    tried = [
        fit_pruned(done.program, region, least, chosen) for chosen in (groups, groups + unread_inputs(region))
    ]
    _, flops, placed = min(tried, key=lambda entry: entry[0])
    probe = done.program.probe
    assert probe is not None
    (after,) = probe.run(done.feeds, placed).values()
    own = scores(done.trained, after, done.target)
    return Pruned(
        flops / dense,
        change(done.original, after),
        float(own.mean()),
        interval(models.worsening(done.trained, done.scores, own)),  # type: ignore[arg-type]
    )


def fit_pruned(
    program: Program, region: Region, least: float, groups: Sequence[int]
) -> tuple[float, float, dict[int, Affine]]:
    """Change on the select part, FLOPs and refitted maps of the network pruned to no fewer than `least` FLOPs."""
    assert program.probe is not None
    local = Probe(program.index, region.sites, program.source.folder, region=region)
    calibrator = Calibrator(program.probe, program.data, local, outer_tensors(program.index, region), {})
    old = [program.affine(site) for site in region.sites]
    paths = unit_paths(calibrator, region, old, groups)
    segments = prune_to(region, paths, least)
    fitted = refit_run(calibrator, region, segments, old, {})
    placed = {site.index: affine for site, affine in zip(region.sites, fitted.placed, strict=True)}
    probe = program.probe
    pairs = ((probe.run(x, {}), probe.run(x, placed)) for x in program.data.batches("select", BATCH))
    return compare_outputs(pairs, "rel-l2", np.inf).largest, flops_of(region, segments), placed


def unit_paths(
    calibrator: Calibrator, region: Region, old: Sequence[Affine], groups: Sequence[int]
) -> dict[int, UnitPath]:
    """For each group the order in which its units can go; one site reads each of them here."""
    paths = {}
    for group in groups:
        (at,) = (at for at, (read, _) in enumerate(region.ends) if read == group)
        moments = calibrator.moments("fit", region.sites[at], {})
        paths[group] = unit_path(moments.xx, old[at].weight)
    return paths


def prune_to(region: Region, paths: Mapping[int, UnitPath], least: float) -> tuple[Segment, ...]:
    """The largest reduction, by one threshold for all groups, that leaves at least `least` FLOPs."""
    low, high = -16.0, 1.0  # exponents of the threshold: everything stays, next to nothing does
    for _ in range(48):
        middle = (low + high) / 2
        enough = flops_of(region, pruned_by(region, paths, 10.0**middle)) >= least
        low, high = (middle, high) if enough else (low, middle)
    return pruned_by(region, paths, 10.0**low)


def pruned_by(region: Region, paths: Mapping[int, UnitPath], threshold: float) -> tuple[Segment, ...]:
    """Each group without the units whose loss stays under the threshold, in widths that vector units like."""
    keep = {}
    for group, path in paths.items():
        stays = np.zeros(len(path.order), bool)
        stays[path.keep_count(round_up(len(path.keep(threshold)), len(path.order)))] = True
        keep[group] = stays
    return compose(region, (), keep)


def flops_of(region: Region, segments: Sequence[Segment]) -> int:
    return sum(kept_flops(region, segment) for segment in segments)


# --- masked towers, sparse features, shared inputs, controls ------------------------------------------------------


def measure_exact(name: str) -> ExactRow:
    """The weights' own witness: connected components of what training changed, over all layers at once."""
    done = compiled(name, TOLERANCES["exact"])
    region = whole_region(done.program)
    assert done.trained.labels is not None
    truth = np.load(done.trained.labels)
    drawn = [d.numbers["redraw"] for d in done.program.decisions if "redraw" in d.numbers]
    redrawn = drawn[0] if drawn else float("nan")
    (found,) = done.program.structures.get(region.name) or (None,)
    if found is None or len(found.sites) < len(region.sites):
        return ExactRow(done.outcome, 1, "not the whole network", 0.0, redrawn)
    have = np.concatenate([found.labels[group] for group in region.order[1:]])
    true = np.concatenate([truth[f"axis_{axis}"] for axis in range(1, len(region.order))])
    return ExactRow(done.outcome, found.blocks, found.kind, rand_index(have, true), redrawn)


def measure_ranker(name: str) -> RankerRow:
    done = compiled(name, TOLERANCES["ranker"])
    first = whole_region(done.program).sites[0]
    initial = np.load(done.trained.init)[first.weight]
    evidence = done.program.evidence[first.index]
    W0 = initial.T if first.transposed else initial
    untouched = untouched_rows(done.program.affine(first).weight, W0, evidence.shrink)
    never = np.isin(np.arange(first.shape[0]), done.trained.meta["never_active"])
    precision, recall = hits(untouched, never)
    return RankerRow(done.outcome, int(never.sum()), int(untouched.sum()), precision, recall)


def hits(found: NDArray[np.bool_], true: NDArray[np.bool_]) -> tuple[float, float]:
    """Precision and recall."""
    both = int((found & true).sum())
    return both / max(int(found.sum()), 1), both / max(int(true.sum()), 1)


def measure_shared(name: str) -> SharedRow:
    done = compiled(name, TOLERANCES["shared"])
    region = whole_region(done.program)
    found = done.program.slices.get(region.name)
    tasks = done.trained.meta["outputs"]
    truth = np.repeat(np.arange(len(tasks)), [len(own) for own in tasks])  # their logits lie in order
    if found is None:
        return SharedRow(done.outcome, 0.0, (), pruned(done))
    inputs, outputs = (region.group_of[name] for name in (region.entries[0], region.exits[0]))
    labels = found.labels[outputs]
    columns = found.copies.get(inputs, np.arange(len(found.labels[inputs])))
    reads = [np.unique(columns[found.labels[inputs] == part]) for part in range(found.blocks)]
    branches = [branch(done, columns, truth[labels == part]) for part, columns in enumerate(reads)]
    return SharedRow(done.outcome, rand_index(labels, truth), tuple(branches), pruned(done))


def branch(done: Compiled, reads: NDArray[np.intp], truth: Labels) -> Branch:
    """A branch that reads these columns, and whose logits belong to the tasks of `truth`."""
    task = int(np.bincount(truth).argmax())
    calib = np.load(done.trained.calib)[done.trained.meta["input"]]
    varies = (calib != calib[:1]).any(0)
    columns = np.arange(len(varies))
    needs = np.array([np.isin(columns, own) for own in done.trained.meta["inputs"]])
    shared = needs[task] & (needs.sum(0) > 1) & varies
    kept = np.isin(columns, reads) & varies
    precision, recall = hits(kept, needs[task] & varies)
    return Branch(task, int(kept.sum()), precision, recall, hits(kept, shared)[1])


def measure_control(name: str) -> ControlRow:
    done = compiled(name, TOLERANCES["control"])
    program = done.program
    blocks = sum(segment.blocks > 1 for rewrite in program.rewrites for segment in rewrite.segments)
    return ControlRow(
        done.outcome, len(program.slices) + blocks, said(program, "annealing"), said(program, "influence")
    )


def said(program: Program, where: str) -> str:
    """What a pass decided, and about how many sites."""
    found = Counter(decision.reason for decision in program.decisions if decision.where == where)
    return ", ".join(f"{reason} {count}" for reason, count in found.most_common()) or "nothing to look at"


def measure(quick: bool) -> list[Row]:
    """All of them take about 25 minutes on one core, most of it the deep towers and the transformer."""
    if quick:
        return [measure_ranker("ranker"), measure_control("digits")]
    return [
        *(measure_towers(name) for name in TOWERS),
        measure_exact("towers/shrunk"),
        measure_ranker("ranker"),
        measure_shared("shared"),
        *(measure_control(name) for name in CONTROLS),
    ]


# --- tables -------------------------------------------------------------------------------------------------------

SHOWN = ("tolerance", "FLOPs", "change", "before", "after", "worse [95 %]", "s")
PRUNED = ("pruned: FLOPs", "change", "after", "worse than split [95 %]")


def tables(rows: Sequence[Row]) -> list[Table]:
    """One or two for each kind of row that there is."""
    made = []
    for kind, shown in SHOW.items():
        own = [row for row in rows if isinstance(row, kind)]
        if own:
            made += [show(own) for show in shown]
    return made


def cells(outcome: Outcome) -> list[str]:
    return [
        f"{outcome.tolerance:g}",
        f"{outcome.flops:.3f}",
        f"{outcome.change:.3f}",
        f"{outcome.before:.4f}",
        f"{outcome.after:.4f}",
        spread(outcome.worse, outcome.metric),
        f"{outcome.seconds:.0f}",
    ]


def spread(found: tuple[float, float, float], metric: str = "accuracy") -> str:
    """A loss of the metric with its interval; accuracies in points."""
    scale, digits = (100, 2) if metric == "accuracy" else (1, 4)
    mean, low, high = (value * scale for value in found)
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def pruned_cells(found: Pruned) -> list[str]:
    return [f"{found.flops:.3f}", f"{found.change:.3f}", f"{found.after:.4f}", spread(found.further)]


def show_parts(rows: Sequence[TowersRow]) -> Table:
    few = f"{DRAWS} draws of {FEW} samples"
    made = table(
        "independent: parts of densely trained networks of four tasks (adjusted Rand index, 1: the four digits)",
        ["model"],
        [
            "parts",
            "outputs",
            "inputs",
            "foreign reads",
            f"{few}: accepted",
            "outputs, least",
            "inputs, least",
            "foreign reads, most",
        ],
    )
    for row in rows:
        least = [min(getattr(each, side) for each in row.few) for side in ("outputs", "inputs")]
        made.add_row(
            row.outcome.name,
            str(row.parts),
            f"{row.look.outputs:.3f}",
            f"{row.look.inputs:.3f}",
            str(row.look.foreign),
            str(sum(each.accepted for each in row.few)),
            *(f"{each:.3f}" for each in least),
            str(max(each.foreign for each in row.few)),
        )
    return made


def show_towers(rows: Sequence[TowersRow]) -> Table:
    made = table(
        "independent: the same networks in parts (accuracy), beside unit pruning at no fewer FLOPs",
        ["model"],
        [*SHOWN, *PRUNED],
    )
    for row in rows:
        made.add_row(row.outcome.name, *cells(row.outcome), *pruned_cells(row.pruned))
    return made


def show_exact(rows: Sequence[ExactRow]) -> Table:
    made = table(
        "independent: masked towers, by the exact test of the weights (accuracy)",
        ["model", "kept", "test"],
        ["components", "Rand index", "change if redrawn", *SHOWN],
    )
    for row in rows:
        found = [str(row.components), f"{row.right:.3f}", f"{row.redrawn:.3f}"]
        made.add_row(row.outcome.name, row.outcome.kept, row.kind, *found, *cells(row.outcome))
    return made


def show_ranker(rows: Sequence[RankerRow]) -> Table:
    made = table(
        "independent: features that never occurred in training, by the exact test of the weights (accuracy)",
        ["model", "kept"],
        ["never active", "found", "precision", "recall", *SHOWN],
    )
    for row in rows:
        found = [str(row.never), str(row.found), f"{row.precision:.3f}", f"{row.recall:.3f}"]
        made.add_row(row.outcome.name, row.outcome.kept, *found, *cells(row.outcome))
    return made


def show_branches(rows: Sequence[SharedRow]) -> Table:
    made = table(
        "independent: what each branch reads where three tasks share a digit, of the inputs that vary",
        ["model"],
        ["outputs (Rand index)", "task", "inputs read", "precision", "recall", "shared ones kept"],
    )
    for row in rows:
        for one in row.branches:
            shares = (one.precision, one.recall, one.shared)
            made.add_row(
                row.outcome.name,
                f"{row.outputs:.3f}",
                str(one.task),
                str(one.reads),
                *(f"{share:.3f}" for share in shares),
            )
    return made


def show_shared(rows: Sequence[SharedRow]) -> Table:
    made = table(
        "independent: the same network in branches (accuracy), beside unit pruning at no fewer FLOPs",
        ["model"],
        [*SHOWN, *PRUNED],
    )
    for row in rows:
        made.add_row(row.outcome.name, *cells(row.outcome), *pruned_cells(row.pruned))
    return made


def show_controls(rows: Sequence[ControlRow]) -> Table:
    made = table(
        "independent: controls, which have no independent parts (accuracy, loss)",
        ["model", "kept", "the weights say", "their function says"],
        ["parts claimed", *SHOWN],
    )
    for row in rows:
        texts = [row.outcome.name, row.outcome.kept, row.weights, row.function]
        made.add_row(*texts, str(row.claimed), *cells(row.outcome))
    return made


SHOW: dict[type[Any], tuple[Callable[[Sequence[Any]], Table], ...]] = {
    TowersRow: (show_parts, show_towers),
    ExactRow: (show_exact,),
    RankerRow: (show_ranker,),
    SharedRow: (show_branches, show_shared),
    ControlRow: (show_controls,),
}


SECTION = Section("independent parts of trained networks, on held-back samples", measure, tables)
