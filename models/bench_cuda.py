"""Every form of blocks against dense on a GPU, with device buffers, with and without CUDA graphs.

    python -m models.bench_cuda [--provider cuda] [--quick] [--json FILE]

What is written is the compiler's own emission, *predicted* what the cost model says of it: a roofline until
`onnx-decomp bench --calibrate` has run on a GPU. Exit code 7 where CUDA does not work.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np
import onnx
from onnx import numpy_helper
from rich.console import Console

from models.bench_common import table, times
from onnx_decomp import calibrating, cost
from onnx_decomp.axes import Region, find_regions
from onnx_decomp.errors import ProviderError
from onnx_decomp.graph_index import GraphIndex
from onnx_decomp.latency import compare
from onnx_decomp.passes.folding import compose, forms, kept_flops
from onnx_decomp.passes.pricing import segment_time
from onnx_decomp.program import Segment, Structure
from onnx_decomp.runtime import Device, RunError, Session, open_session, resolve_provider
from onnx_decomp.sites import find_sites

WIDTHS = ((1024, 1024), (4096, 4096), (8192, 8192), (1024, 4096, 1024), (4096, 16384, 4096))
TOKENS = (1, 16, 128, 1024, 4096)
GROUPS = (2, 4, 8, 16)
TYPES = ("float16", "bfloat16", "float32")
SECONDS = 0.25
CORRECTION = 1 / 16
"""Rank of a correction beside blocks, over the layer's smaller side."""


@dataclass(frozen=True)
class Row:
    """One form. ideal: FLOPs before over after."""

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


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    widths: Sequence[tuple[int, ...]] = WIDTHS
    tokens: Sequence[int] = TOKENS
    groups: Sequence[int] = GROUPS
    types: Sequence[str] = TYPES
    seconds: float = SECONDS


QUICK = Sizes(((256, 512, 256),), (16, 64), (4,), ("float32",), 0.02)


def measure(provider: Device, sizes: Sizes) -> Iterator[Row]:
    """Every case; a type that ONNX Runtime can't run there is left out."""
    for dtype in sizes.types:
        for widths in sizes.widths:
            index = GraphIndex.build(calibrating.network(widths, dtype), numpy_helper.to_array)
            (region,) = find_regions(index, find_sites(index))
            written = list(_written(index, region, sizes.groups, provider))
            for graph in (False, True) if provider == "cuda" else (False,):
                for tokens in sizes.tokens:
                    # A CUDA graph holds for one shape: sessions are its own.
                    yield from _timed(index.proto, region, written, (dtype, tokens, graph), provider, sizes)


def _timed(
    dense: onnx.ModelProto,
    region: Region,
    written: Sequence[tuple[int, str, tuple[Segment, ...], onnx.ModelProto]],
    setting: tuple[str, int, bool],
    provider: Device,
    sizes: Sizes,
) -> Iterator[Row]:
    dtype, tokens, graph = setting
    widths = (*(site.shape[0] for site in region.sites), region.sites[-1].shape[1])
    x = (
        np.random.default_rng(tokens)
        .standard_normal((tokens, widths[0]))
        .astype(calibrating.numpy_type(dtype))
    )

    def opened(model: onnx.ModelProto) -> Session:
        return open_session(model, provider=provider, cuda_graph=graph)

    before = opened(dense)
    whole = sum(kept_flops(region, segment) for segment in compose(region))
    model = cost.model_for(provider, dtype)
    for blocks, name, segments, proto in written:
        try:
            timed = compare(before, opened(proto), {"x": x}, seconds=sizes.seconds)
        except RunError as error:
            print(f"{dtype} {widths} {name}: {error}", file=sys.stderr)
            continue
        times_of = [
            sum(segment_time(model, tokens, region, each, each.form) for each in found)
            for found in (compose(region), segments)
        ]
        left = sum(kept_flops(region, segment) for segment in segments)
        yield Row(
            dtype, widths, blocks, name, tokens, graph, timed.before_ms, timed.after_ms, timed.speedup,
            timed.interval, whole / left, times_of[0] / times_of[1],
        )  # fmt: skip


def _written(
    index: GraphIndex, region: Region, groups: Sequence[int], provider: Device
) -> Iterator[tuple[int, str, tuple[Segment, ...], onnx.ModelProto]]:
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
                shaped = (replace(segment, form=form, corrections=corrections),)
                yield blocks, name, shaped, calibrating.written(index, region, shaped, provider)
    if region.elastic:
        keep = {group: np.arange(region.groups[group].size) % 2 == 0 for group in region.elastic}
        reduced = compose(region, (), keep)
        yield 1, "reduced to 1/2", reduced, calibrating.written(index, region, reduced, provider)


@click.command()
@click.option("--provider", type=click.Choice(("cuda", "cpu")), default="cuda", show_default=True)
@click.option("--quick", is_flag=True, help="One small network, to see that it runs.")
@click.option(
    "--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there."
)
def main(provider: Device, quick: bool, file: Path | None) -> None:
    """Time every form against dense."""
    try:
        device = resolve_provider(provider)
    except ProviderError as error:
        print(f"not measured: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    rows = []
    for row in measure(device, QUICK if quick else Sizes()):
        rows.append(row)
        if file is not None:  # what was measured stays where the time is over before all of it was
            file.write_text(json.dumps([asdict(each) for each in rows]) + "\n", encoding="utf-8")
    made = table(
        f"forms on {device} (before / after in turns, device buffers)",
        ["type", "widths", "form"],
        ["blocks", "tokens", "graph", "FLOPs", "predicted", "speed-up [95 %]"],
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
        )
    Console(width=None if sys.stdout.isatty() else 160).print(made)


if __name__ == "__main__":
    main()
