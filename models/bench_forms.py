"""Single block layers in each form that the compiler can write: measured against what the cost model says of them.

Two questions: how far the predicted times are off, and what it costs to follow them (regret: the picked form's time
over that of the fastest, less one).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx
from onnx import helper
from rich.table import Table

from models.bench_common import Section, compare, table, times
from models.planted import INPUT, Planted, build
from onnx_decomp import cost
from onnx_decomp.axes import Region, find_regions
from onnx_decomp.passes.pricing import segment_time
from onnx_decomp.passes.splitting import emit
from onnx_decomp.program import Form, Rewrite, Segment
from onnx_decomp.sites import GraphIndex, find_sites, read_affine

SHAPES = ((256, 256), (768, 768), (1024, 1024), (768, 3072), (4096, 4096))
GROUPS = (2, 4, 8, 16)
ROWS = (1, 16, 128, 512)
FORMS: tuple[Form, ...] = ("parallel", "batched")


@dataclass(frozen=True)
class Row:
    """One form of one layer on one thread. Times in microseconds, less those of an empty run."""

    K: int
    N: int
    blocks: int
    rows: int
    form: str
    predicted: float
    measured: float
    predicted_speedup: float
    speedup: float
    interval: tuple[float, float]


def measure(quick: bool) -> list[Row]:
    """Every shape, number of blocks and of rows; one thread."""
    if quick:
        return list(_measure(((768, 768),), (4,), (16, 128), 0.25))
    return list(_measure(SHAPES, GROUPS, ROWS, 0.5))


def _measure(
    shapes: Sequence[tuple[int, int]], groups: Sequence[int], rows: Sequence[int], seconds: float
) -> Iterator[Row]:
    model = cost.cpu()
    for K, N in shapes:
        for G in groups:
            dense, region, written = _written(K, N, G)
            for T in rows:
                feeds = {INPUT: np.random.default_rng(T).standard_normal((T, K), np.float32)}
                call = compare(_nothing(K), _nothing(K), feeds, 1, 0.05).before_ms * 1e3
                for form, proto in written.items():
                    timed = compare(dense, proto, feeds, 1, seconds)
                    segments = [_segment(K, N, G, kind) for kind in ("dense", form)]
                    before, after = (segment_time(model, T, region, s, s.form) for s in segments)
                    measured = max(timed.after_ms * 1e3 - call, 0.1)
                    yield Row(
                        K, N, G, T, form, after, measured, before / after, timed.speedup, timed.interval
                    )


def _segment(K: int, N: int, G: int, form: Form) -> Segment:
    blocks = 1 if form == "dense" else G
    labels = {
        group: np.repeat(np.arange(blocks, dtype=np.int32), width // blocks)
        for group, width in enumerate((K, N))
    }
    return Segment((0,), labels, blocks, form)


def _written(K: int, N: int, G: int) -> tuple[onnx.ModelProto, Region, dict[Form, onnx.ModelProto]]:
    """A dense layer whose blocks lie in order, and what the compiler's own emission makes of it."""
    planted = build(Planted((K, N), G, off="zero", hide="none"))
    index = GraphIndex.build(planted.model, onnx.numpy_helper.to_array)
    (region,) = find_regions(index, find_sites(index))
    affine = tuple(read_affine(index, site) for site in region.sites)
    rewrites = {
        form: Rewrite(region, (_segment(K, N, G, form),), affine, "split", "applied") for form in FORMS
    }
    written = {form: emit(index, [rewrite], planted.spec.opset) for form, rewrite in rewrites.items()}
    return planted.model, region, written


def _nothing(width: int) -> onnx.ModelProto:
    """The shape of x and no more: what a call of the runtime takes by itself."""
    x = helper.make_tensor_value_info(INPUT, onnx.TensorProto.FLOAT, ["batch", width])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.INT64, [2])
    graph = helper.make_graph([helper.make_node("Shape", [INPUT], ["y"])], "nothing", [x], [y])
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


class Choice(NamedTuple):
    """The form with the best predicted speed-up, the one with the best measured one, and the regret."""

    picked: str
    best: str
    regret: float


Choices = dict[tuple[int, int, int, int], Choice]
"""By K, N, blocks and rows of a layer."""


def picks(rows: Sequence[Row]) -> Choices:
    """What the cost model chooses for each layer; dense is a choice too."""
    layers: dict[tuple[int, int, int, int], list[Row]] = {}
    for row in rows:
        layers.setdefault((row.K, row.N, row.blocks, row.rows), []).append(row)
    found = {}
    for key, group in layers.items():
        predicted = {"dense": 1.0} | {row.form: row.predicted_speedup for row in group}
        measured = {"dense": 1.0} | {row.form: row.speedup for row in group}
        picked, best = (max(which, key=which.__getitem__) for which in (predicted, measured))
        found[key] = Choice(picked, best, measured[best] / measured[picked] - 1)
    return found


def tables(rows: Sequence[Row]) -> list[Table]:
    """Each layer with its two forms side by side, then how well the cost model does as a whole."""
    made = table(
        "forms: one layer, dense against block forms (before / after, one thread, CPU, float32)",
        ["layer", "picked", "fastest"],
        [
            "blocks",
            "rows",
            *(f"{form} {what}" for form in FORMS for what in ("[95 %]", "predicted")),
            "regret",
        ],
    )
    by_form = {(row.K, row.N, row.blocks, row.rows, row.form): row for row in rows}
    choices = picks(rows)
    for (K, N, G, T), (picked, best, regret) in choices.items():
        cells = []
        for form in FORMS:
            row = by_form[K, N, G, T, form]
            cells += [times(row.speedup, row.interval), f"{row.predicted_speedup:.2f}"]
        made.add_row(f"{K}x{N}", picked, best, str(G), str(T), *cells, f"{regret:.0%}")
    return [made, _summary(rows), _regrets(choices)]


def _summary(rows: Sequence[Row]) -> Table:
    """Medians by form and number of rows: predicted over measured time and speed-up, and their error."""
    made = table(
        "forms: the cost model against measurement",
        ["form"],
        ["rows", "time: predicted / measured", "error", "speed-up: predicted / measured", "error"],
    )
    for form in FORMS:
        for T in sorted({row.rows for row in rows}):
            chosen = [row for row in rows if (row.form, row.rows) == (form, T)]
            time = np.array([row.predicted / row.measured for row in chosen])
            gain = np.array([row.predicted_speedup / row.speedup for row in chosen])
            cells = [f"{np.median(time):.2f}", _error(time), f"{np.median(gain):.2f}", _error(gain)]
            made.add_row(form, str(T), *cells)
    return made


def _regrets(choices: Choices) -> Table:
    """What it costs to take the form that the cost model ranks first, by number of rows."""
    made = table(
        "forms: regret of the cost model's choice", ["rows"], ["layers", "right", "mean regret", "worst"]
    )
    for T in sorted({at for *_, at in choices}):
        found = [choice for (*_, at), choice in choices.items() if at == T]
        regrets = [choice.regret for choice in found]
        right = sum(choice.picked == choice.best for choice in found)
        made.add_row(str(T), str(len(found)), str(right), f"{np.mean(regrets):.1%}", f"{max(regrets):.0%}")
    return made


def _error(ratios: np.ndarray) -> str:
    """Median of how far predictions are off, either way."""
    return f"{np.exp(np.median(np.abs(np.log(ratios)))) - 1:.0%}"


SECTION = Section("single layers: forms and the cost model", measure, tables)
