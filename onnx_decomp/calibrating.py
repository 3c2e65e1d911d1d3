"""Fit the cost model to the machine at hand: every form of small networks in blocks is written, timed and compared.

Every other case is fitted; the others tell how far its predictions are off.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from scipy.optimize import least_squares

from onnx_decomp import cost
from onnx_decomp.axes import Region, find_regions
from onnx_decomp.cost import CostModel
from onnx_decomp.graph_index import GraphIndex
from onnx_decomp.latency import compare
from onnx_decomp.passes.folding import Layout, compose, forms, partition
from onnx_decomp.passes.pricing import region_time
from onnx_decomp.passes.ridge import masked
from onnx_decomp.passes.splitting import emit
from onnx_decomp.program import Rewrite, Segment, Structure
from onnx_decomp.progress import Progress, Silent
from onnx_decomp.runtime import Device, Session, open_session
from onnx_decomp.sites import find_sites, read_affine

OPSET = 17
WIDTHS = ((256, 256), (768, 768), (1024, 1024), (768, 3072), (2048, 2048), (768, 3072, 768))
GROUPS = (2, 4, 8)
ROWS = {"cpu": (1, 16, 128, 512), "cuda": (1, 16, 128, 1024, 4096)}
RUNS = (1, 16)
"""Columns that stay together where blocks are scattered over the inputs."""
SECONDS = 0.15
"""For each case."""
UNSURE = 0.1
"""Relative error under which a case no longer pulls at the fit harder for being an outlier."""


@dataclass(frozen=True)
class Case:
    """One network in one form at one number of rows. Microseconds of a run, less those of an empty one."""

    widths: tuple[int, ...]
    blocks: int
    form: str
    rows: int
    layout: Layout
    measured: float


def calibrate(
    provider: Device, dtype: str, threads: int | None, quick: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """A table for `--cost`, with what it was fitted to. quick: a few cases only, to see that it works.

    Raises RunError where ONNX Runtime can't run what is written.
    """
    watching = progress or Silent()
    watching.stage("timing forms")
    found = list(_cases(provider, dtype, threads, quick, watching))
    start = cost.model_for(provider, dtype)
    fitted = fit(start, found[::2])
    held = errors(fitted, found[1::2])
    return {
        "schema": cost.SCHEMA,
        "provider": provider,
        "measured_on": f"{platform.machine()}, {threads or 'default'} threads, {len(found)} cases",
        "median_error": {
            "before": float(np.median(errors(start, found[1::2]))),
            "after": float(np.median(held)),
        },
        "tables": {dtype: {field.name: getattr(fitted, field.name) for field in fields(fitted)}},  # type: ignore[arg-type]
        "cases": [
            {
                "widths": list(case.widths),
                "blocks": case.blocks,
                "form": case.form,
                "rows": case.rows,
                "measured": case.measured,
                "predicted": predicted(fitted, case),
            }
            for case in found
        ],
    }


def fit(start: CostModel, cases: Sequence[Case]) -> CostModel:
    """The parameters with the least error in the logarithm; outliers count less, what is no size is left alone."""
    names = [field.name for field in fields(start) if field.name != "element"]  # type: ignore[arg-type]
    fixed = {field.name: getattr(start, field.name) for field in fields(start)}  # type: ignore[arg-type]
    first = np.log([fixed[name] for name in names])

    def model(logs: NDArray[np.float64]) -> CostModel:
        made: CostModel = type(start)(**(fixed | dict(zip(names, map(float, np.exp(logs)), strict=True))))
        return made

    def off(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        there = model(logs)
        return np.log([predicted(there, case) / case.measured for case in cases])

    return model(least_squares(off, first, loss="soft_l1", f_scale=UNSURE).x)


def predicted(model: CostModel, case: Case) -> float:
    return region_time(model, case.rows, case.layout)


def errors(model: CostModel, cases: Sequence[Case]) -> NDArray[np.float64]:
    """Relative errors of what is predicted."""
    return np.array([abs(predicted(model, case) / case.measured - 1) for case in cases])


# What is timed


def _cases(
    provider: Device, dtype: str, threads: int | None, quick: bool, progress: Progress
) -> Iterator[Case]:
    widths = WIDTHS[1:2] if quick else WIDTHS
    rows = ROWS[provider][2:3] if quick else ROWS[provider]
    empty = _opened(_nothing(dtype), provider, threads)
    for number, each in enumerate(widths):
        progress.advance(number, len(widths))
        index = GraphIndex.build(_network(each, dtype), numpy_helper.to_array)
        (region,) = find_regions(index, find_sites(index))
        dense = _opened(index.proto, provider, threads)
        written = [
            (blocks, segment, _opened(_written(index, region, segment, provider), provider, threads))
            for blocks, segment in _segments(region, quick)
        ]
        for count in rows:
            x = np.random.default_rng(count).standard_normal((count, each[0])).astype(dtype)
            call = _milliseconds(empty, empty, {"x": x[:, :1]})[0]
            before = []
            for blocks, segment, session in written:
                times = _milliseconds(dense, session, {"x": x})
                before.append(times[0])
                layout = Layout.of(region, (segment,))
                measured = max((times[1] - call) * 1e3, 0.1)
                yield Case(each, blocks, segment.form, count, layout, measured)
            whole = max((float(np.median(before)) - call) * 1e3, 0.1)
            yield Case(each, 1, "dense", count, Layout.of(region, _dense(region)), whole)


def _milliseconds(before: Session, after: Session, feeds: Mapping[str, NDArray[Any]]) -> tuple[float, float]:
    timed = compare(before, after, feeds, seconds=SECONDS)
    return timed.before_ms, timed.after_ms


def _opened(model: onnx.ModelProto, provider: Device, threads: int | None) -> Session:
    return open_session(model, provider=provider, threads=threads)


def _dense(region: Region) -> tuple[Segment, ...]:
    return compose(region)


def _segments(region: Region, quick: bool) -> Iterator[tuple[int, Segment]]:
    """Every form of every number of blocks, side by side; and scattered ones, which are gathered first."""
    for blocks in GROUPS[1:2] if quick else GROUPS:
        for run in (0, *RUNS):
            labels = {group: _labels(found.size, blocks, run) for group, found in region.groups.items()}
            labels |= {region.order[-1]: _labels(region.groups[region.order[-1]].size, blocks, 0)}
            every = tuple(range(len(region.sites)))
            (segment,) = compose(region, [Structure(every, labels, blocks, "exact", 0.0, 1.0)])
            for form in forms(region, segment) if not run else ("chain" if len(every) > 1 else "parallel",):
                yield blocks, Segment(every, segment.labels, blocks, form)


def _labels(size: int, blocks: int, run: int) -> NDArray[np.int32]:
    at = np.arange(size)
    return (at * blocks // size if not run else at // run % blocks).astype(np.int32)


def _written(index: GraphIndex, region: Region, segment: Segment, provider: Device) -> onnx.ModelProto:
    spans = partition(region, (segment,))
    affine = tuple(
        masked(read_affine(index, site), *span) for site, span in zip(region.sites, spans, strict=True)
    )
    return emit(index, [Rewrite(region, (segment,), affine, "split", "applied")], OPSET, provider)


def _network(widths: Sequence[int], dtype: str) -> onnx.ModelProto:
    """Gemms of these widths, with a Relu between two of them."""
    rng, kind = np.random.default_rng(0), _kind(dtype)
    nodes, stored, last = [], [], "x"
    for at, (k, n) in enumerate(pairwise(widths)):
        made = "y" if at == len(widths) - 2 else f"h{at}"
        arrays = rng.standard_normal((k, n)) / np.sqrt(k), np.zeros(n)
        for name, array in zip((f"W{at}", f"b{at}"), arrays, strict=True):
            stored.append(numpy_helper.from_array(array.astype(helper.tensor_dtype_to_np_dtype(kind)), name))
        nodes.append(helper.make_node("Gemm", [last, f"W{at}", f"b{at}"], [made], name=f"layer{at}"))
        last = made
        if made != "y":
            last = f"a{at}"
            nodes.append(helper.make_node("Relu", [made], [last], name=f"relu{at}"))
    return _model(nodes, kind, widths[0], kind, [None, widths[-1]], stored)


def _nothing(dtype: str) -> onnx.ModelProto:
    """The shape of x and no more: what a call of the runtime takes by itself."""
    shape = helper.make_node("Shape", ["x"], ["y"])
    return _model([shape], _kind(dtype), 1, onnx.TensorProto.INT64, [2], [])


def _model(
    nodes: Sequence[onnx.NodeProto],
    kind: int,
    width: int,
    made: int,
    shape: Sequence[int | None],
    stored: Sequence[onnx.TensorProto],
) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", kind, ["batch", width])
    y = helper.make_tensor_value_info("y", made, list(shape))
    graph = helper.make_graph(list(nodes), "calibration", [x], [y], list(stored))
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", OPSET)])


def _kind(dtype: str) -> int:
    return int(getattr(onnx.TensorProto, {"float32": "FLOAT", "float16": "FLOAT16"}[dtype]))
