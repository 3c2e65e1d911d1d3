"""Every form of blocks against dense, with device buffers, with and without CUDA graphs.

What is written is the compiler's own emission. *predicted* is what the cost model says of it; *roofline* what the
machine's own ceilings (models/ceilings.py) would allow, so that its share tells how much a form wastes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from rich.table import Table

from models import ceilings
from models.bench_common import table, times
from models.ceilings import Ceilings
from onnx_decomp import calibrating, cost
from onnx_decomp.axes import Region, find_regions
from onnx_decomp.cost import CostModel
from onnx_decomp.graph_index import GraphIndex
from onnx_decomp.latency import compare
from onnx_decomp.passes.folding import compose, forms, kept_flops
from onnx_decomp.passes.layouts import Layout
from onnx_decomp.passes.pricing import region_time
from onnx_decomp.program import Segment, Structure
from onnx_decomp.runtime import Device, RunError, Session, open_session
from onnx_decomp.sites import find_sites

WIDTHS = ((1024, 1024), (4096, 4096), (8192, 8192), (1024, 4096, 1024), (4096, 16384, 4096))
TOKENS = (1, 16, 128, 1024, 4096)
GROUPS = (2, 4, 8, 16)
TYPES = ("float16", "bfloat16", "float32")
SECONDS = 0.1
CORRECTION = 1 / 16
"""Rank of a correction beside blocks, over the layer's smaller side."""

Segments = tuple[Segment, ...]


@dataclass(frozen=True)
class Row:
    """One form. ideal: FLOPs before over after. roofline_ms: of the form, by the machine's own ceilings; dense_ms:
    of the dense network by them."""

    dtype: str
    widths: tuple[int, ...]
    blocks: int
    form: str
    tokens: int
    cuda_graph: bool
    before_ms: float
    after_ms: float
    speedup: float
    interval: tuple[float, float]
    ideal: float
    predicted: float
    dense_ms: float
    roofline_ms: float

    @property
    def share(self) -> float:
        """Of the roofline that is reached."""
        return self.roofline_ms / self.after_ms


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    widths: Sequence[tuple[int, ...]] = WIDTHS
    tokens: Sequence[int] = TOKENS
    groups: Sequence[int] = GROUPS
    types: Sequence[str] = TYPES
    seconds: float = SECONDS
    quick: bool = False


QUICK = Sizes(((256, 512, 256),), (16, 64), (4,), ("float32",), 0.02, quick=True)


def measure(provider: Device, sizes: Sizes) -> Iterator[Row]:
    """Every case; a type that ONNX Runtime can't run there is left out, with a line on stderr."""
    for dtype in sizes.types:
        graphs = (False, True) if provider == "cuda" else (False,)
        try:
            found = [ceilings.measure(provider, dtype, graph, sizes.quick, sizes.seconds) for graph in graphs]
        except RunError as error:
            print(f"{dtype} is left out: {error}", file=sys.stderr)
            continue
        for widths in sizes.widths:
            yield from _network(provider, dtype, widths, found, sizes)


def _network(
    provider: Device, dtype: str, widths: tuple[int, ...], found: Sequence[Ceilings], sizes: Sizes
) -> Iterator[Row]:
    index = GraphIndex.build(calibrating.network(widths, dtype), numpy_helper.to_array)
    (region,) = find_regions(index, find_sites(index))
    rng = np.random.default_rng(0)
    inputs = {
        tokens: rng.standard_normal((tokens, widths[0]), np.float32).astype(calibrating.numpy_type(dtype))
        for tokens in sizes.tokens
    }
    dense = [_opened(index.proto, provider, each) for each in found]
    for blocks, name, segments in _segments(region, sizes.groups):
        case = _Case(dtype, widths, blocks, name, region, segments)
        written = calibrating.written(index, region, segments, provider)
        for before, ceiling in zip(dense, found, strict=True):
            try:
                after = _opened(written, provider, ceiling)
                for tokens, x in inputs.items():
                    yield case.timed(before, after, ceiling, tokens, x, sizes.seconds)
            except RunError as error:
                print(f"{dtype} {widths} {name}: {error}", file=sys.stderr)


def _opened(model: onnx.ModelProto, provider: Device, ceiling: Ceilings) -> Session:
    return open_session(model, provider=provider, cuda_graph=ceiling.cuda_graph)


@dataclass(frozen=True)
class _Case:
    dtype: str
    widths: tuple[int, ...]
    blocks: int
    form: str
    region: Region
    segments: Segments

    def timed(
        self,
        before: Session,
        after: Session,
        ceiling: Ceilings,
        tokens: int,
        x: NDArray[np.generic],
        seconds: float,
    ) -> Row:
        region, segments = self.region, self.segments
        model = cost.model_for(before.provider, self.dtype)
        predicting = model.in_graph() if ceiling.cuda_graph else model
        timed = compare(before, after, {"x": x}, seconds=seconds)
        both = compose(region), segments
        kept = [sum(kept_flops(region, segment) for segment in each) for each in both]
        predicted = [_microseconds(predicting, tokens, region, each) for each in both]
        roofline = [
            (_microseconds(ceiling.roofline, tokens, region, each) + links(ceiling, tokens, self.widths))
            / 1e3
            for each in both
        ]
        return Row(
            self.dtype, self.widths, self.blocks, self.form, tokens, ceiling.cuda_graph,
            timed.before_ms, timed.after_ms, timed.speedup, timed.interval,
            kept[0] / kept[1], predicted[0] / predicted[1], roofline[0], roofline[1],
        )  # fmt: skip


def _microseconds(model: CostModel, tokens: int, region: Region, segments: Segments) -> float:
    return region_time(model, tokens, Layout.of(region, segments))


def links(ceiling: Ceilings, tokens: int, widths: Sequence[int]) -> float:
    """Microseconds of the activations between layers, which cost models leave out: they are the same in every form."""
    return sum(ceiling.roofline.moved(tokens * width) for width in widths[1:-1])


def _segments(region: Region, groups: Sequence[int]) -> Iterator[tuple[int, str, Segments]]:
    """Blocks in every form, with and without a correction, and layers with half of their hidden units."""
    for blocks in groups:
        labels = {
            group: np.arange(found.size, dtype=np.int32) * blocks // found.size
            for group, found in region.groups.items()
        }
        every = tuple(range(len(region.sites)))
        (segment,) = compose(region, [Structure(every, labels, blocks, "exact", 0.0, 1.0)])
        ranks = {at: int(min(region.sites[at].shape) * CORRECTION) for at in every}
        for form in forms(region, segment):
            for name, corrections in ((form, {}), (f"{form} + rank", ranks)):
                yield blocks, name, (replace(segment, form=form, corrections=corrections),)
    if region.elastic:
        keep = {group: np.arange(region.groups[group].size) % 2 == 0 for group in region.elastic}
        yield 1, "reduced to 1/2", compose(region, (), keep)


def tables(rows: Sequence[Row]) -> list[Table]:
    """One, and the median error of what was predicted."""
    made = table(
        "forms against dense (in turns, device buffers on CUDA)",
        ["type", "widths", "form"],
        ["blocks", "tokens", "graph", "FLOPs", "predicted", "speed-up [95 %]", "ms", "of the roofline"],
    )
    for row in rows:
        made.add_row(
            row.dtype,
            "-".join(map(str, row.widths)),
            row.form,
            str(row.blocks),
            str(row.tokens),
            "yes" if row.cuda_graph else "no",
            f"{row.ideal:.2f}x",
            f"{row.predicted:.2f}x",
            times(row.speedup, row.interval),
            f"{row.after_ms:.3g}",
            f"{row.share:.0%}",
        )
    errors = [abs(row.predicted / row.speedup - 1) for row in rows]
    if errors:
        made.caption = f"median error of predicted speed-ups: {np.median(errors):.0%}"
    return [made]
