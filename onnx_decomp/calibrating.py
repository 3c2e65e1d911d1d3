"""Fit the cost model to the machine at hand: every form of small networks in blocks is written, timed and compared.

Every other case is fitted; the others tell how far its predictions are off.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from scipy.optimize import least_squares

from onnx_decomp import cost, driver
from onnx_decomp.axes import Region, find_regions
from onnx_decomp.cost import CostModel
from onnx_decomp.graph_index import GraphIndex
from onnx_decomp.latency import compare
from onnx_decomp.passes.folding import compose, decision_of, forms, partition
from onnx_decomp.passes.layouts import Layout
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
        "measured_on": f"{_device(provider)}, {threads or 'default'} threads, {len(found)} cases",
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


def _device(provider: Device) -> str:
    return driver.devices()[0] if provider == "cuda" else platform.machine()


def fit(start: CostModel, cases: Sequence[Case]) -> CostModel:
    """The parameters with the least error in the logarithm; outliers count less.

    The size of an element is known, and nothing here is recorded.
    """
    names = [field.name for field in fields(start) if field.name not in ("element", "recorded")]  # type: ignore[arg-type]
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
        index = GraphIndex.build(network(each, dtype), numpy_helper.to_array)
        (region,) = find_regions(index, find_sites(index))
        dense = _opened(index.proto, provider, threads)
        others = [
            (blocks, segment, _opened(written(index, region, (segment,), provider), provider, threads))
            for blocks, segment in _segments(region, quick)
        ]
        for count in rows:
            x = np.random.default_rng(count).standard_normal((count, each[0])).astype(numpy_type(dtype))
            call = _milliseconds(empty, empty, {"x": x[:, :1]})[0]
            before = []
            for blocks, segment, session in others:
                times = _milliseconds(dense, session, {"x": x})
                before.append(times[0])
                layout = Layout.of(region, (segment,))
                measured = max((times[1] - call) * 1e3, 0.1)
                yield Case(each, blocks, segment.form, count, layout, measured)
            whole = max((float(np.median(before)) - call) * 1e3, 0.1)
            yield Case(each, 1, "dense", count, Layout.of(region, compose(region)), whole)


def _milliseconds(before: Session, after: Session, feeds: Mapping[str, NDArray[Any]]) -> tuple[float, float]:
    timed = compare(before, after, feeds, seconds=SECONDS)
    return timed.before_ms, timed.after_ms


def _opened(model: onnx.ModelProto, provider: Device, threads: int | None) -> Session:
    return open_session(model, provider=provider, threads=threads)


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


def written(
    index: GraphIndex, region: Region, segments: Sequence[Segment], provider: Device
) -> onnx.ModelProto:
    """A network with its only region in these segments; corrections, where they say so, of its whole weights."""
    whole = [read_affine(index, site) for site in region.sites]
    affine = tuple(masked(each, *span) for each, span in zip(whole, partition(region, segments), strict=True))
    corrections = {at: whole[at].weight for segment in segments for at in segment.corrections}
    outcome = decision_of(region, segments)
    rewrite = Rewrite(region, tuple(segments), affine, outcome, "applied", corrections=corrections)
    return emit(index, [rewrite], OPSET, provider)


def network(widths: Sequence[int], dtype: str) -> onnx.ModelProto:
    """Dense layers of these widths with biases, and a Relu between two of them."""
    rng, kind = np.random.default_rng(0), numpy_type(dtype)
    nodes, stored, last = [], [], "x"
    for at, (k, n) in enumerate(pairwise(widths)):
        weight = rng.standard_normal((k, n), np.float32) / np.sqrt(np.float32(k))
        arrays = {f"W{at}": weight.astype(kind), f"b{at}": np.zeros(n, kind)}
        stored += [numpy_helper.from_array(array, name) for name, array in arrays.items()]
        made = "y" if at == len(widths) - 2 else f"h{at}"
        nodes.append(helper.make_node("MatMul", [last, f"W{at}"], [f"p{at}"], name=f"layer{at}"))
        nodes.append(helper.make_node("Add", [f"p{at}", f"b{at}"], [made], name=f"bias{at}"))
        last = made
        if made != "y":
            last = f"a{at}"
            nodes.append(helper.make_node("Relu", [made], [last], name=f"relu{at}"))
    element = helper.np_dtype_to_tensor_dtype(kind)
    return _model(nodes, element, widths[0], element, ["batch", widths[-1]], stored)


def numpy_type(dtype: str) -> np.dtype[Any]:
    """Of a name; numpy itself knows no bfloat16."""
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def _nothing(dtype: str) -> onnx.ModelProto:
    """The shape of x and no more: what a call of the runtime takes by itself."""
    shape = helper.make_node("Shape", ["x"], ["y"])
    return _model(
        [shape], helper.np_dtype_to_tensor_dtype(numpy_type(dtype)), 1, onnx.TensorProto.INT64, [2], []
    )


def _model(
    nodes: Sequence[onnx.NodeProto],
    kind: int,
    width: int,
    made: int,
    shape: Sequence[int | str],
    stored: Sequence[onnx.TensorProto],
) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", kind, ["batch", width])
    y = helper.make_tensor_value_info("y", made, list(shape))
    graph = helper.make_graph(list(nodes), "calibration", [x], [y], list(stored))
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", OPSET)])
