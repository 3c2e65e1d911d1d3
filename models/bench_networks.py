"""Planted whole networks through the whole compiler, and how much of the possible speed-up was reached.

As for runs of layers (`bench_planted`), the blocks' complement has vanished and no calibration data is needed.

The ideal is taken node by node from the dense model's profile: a product with a stored weight shrinks as its true
blocks do; everything else stays: embedding, norms, activations, attention's own products, the dense head.
"""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import onnx
from rich.table import Table

from models.bench_common import Section, compare, kernel_events, save, table, times
from models.bench_planted import PRODUCTS
from models.networks import EVERY, Network, PlantedNetwork, build, calibration
from models.planted import Labels
from onnx_decomp import model_io
from onnx_decomp.compiler import compile_model
from onnx_decomp.options import Options
from onnx_decomp.runtime import Arrays

ROWS = (128, 512)
"""Rows that go through each product: batch times sequence."""

SIZES: Mapping[str, Any] = {
    "width": 768,
    "hidden": 3072,
    "blocks": 4,
    "layers": 2,
    "heads": 12,
    "outputs": 64,
    "vocabulary": 1024,
    "sequence": 64,
}

CASES: Mapping[str, Network] = {
    "pre-norm residual stack": Network("residual", **SIZES),
    "residual stack without norms": Network("residual", norm="none", **SIZES),
    "gated residual stack (SwiGLU)": Network("residual", feed_forward="gated", **SIZES),
    "one weight for all layers (ALBERT)": Network("albert", **SIZES),
    "transformer": Network("transformer", **SIZES),
    "six towers, four layers": Network(
        "towers", **{**SIZES, "blocks": 6, "layers": 4, "outputs": 768}, rank=2
    ),
}

Node: TypeAlias = tuple[str, str]
"""Name and operator of a node, as ONNX Runtime runs it."""


@dataclass(frozen=True)
class Row:
    """One network at one number of rows and threads.

    right: sites of `sites` whose blocks are the planted ones, or that were rightly left whole. gathers: added ones.
    flops: of all products with stored weights, before over after. ideal: the speed-up to hope for.
    """

    network: str
    rows: int
    threads: int | None
    right: int
    sites: int
    gathers: int
    flops: float
    ideal: float
    before_ms: float
    after_ms: float
    speedup: float
    interval: tuple[float, float]

    @property
    def reached(self) -> float:
        """Share of the ideal speed-up."""
        return self.speedup / self.ideal


def measure(quick: bool) -> list[Row]:
    """Compile each network once, then time it at each number of rows and threads."""
    names, rows, seconds = (list(CASES)[:1], ROWS[:1], 0.5) if quick else (list(CASES), ROWS, 4.0)
    return [row for name in names for row in measure_one(name, CASES[name], rows, seconds)]


def measure_one(name: str, spec: Network, rows: Sequence[int], seconds: float) -> Iterator[Row]:
    """All rows of one network; the written model is the same at every number of rows."""
    network = build(spec)
    with tempfile.TemporaryDirectory() as folder:
        init = save(folder, "init", network.snapshot)
        options = Options(init=init, provider="cpu", latency_gate=False)
        result, _ = compile_model(model_io.from_proto(network.model), options)
    sites = result.report["sites"]
    right = sum(is_right(site, *network.labels[site["weight"]]) for site in sites)
    flops = result.report["input"]["matmul_flops"] / result.report["output"]["matmul_flops"]
    gathers = _gathers(result.model) - _gathers(network.model)
    kept = kept_shares(network, sites)
    for count in rows:
        feeds = calibration(network, count // (1 if spec.rank == 2 else spec.sequence), count)
        for threads in (1, None):
            ideal = ideal_speedup(node_times(network.model, feeds, threads), kept)
            timed = compare(network.model, result.model, feeds, threads, seconds)
            yield Row(
                name,
                count,
                threads,
                right,
                len(sites),
                gathers,
                flops,
                ideal,
                timed.before_ms,
                timed.after_ms,
                timed.speedup,
                timed.interval,
            )


def is_right(site: Mapping[str, Any], rows: Labels, columns: Labels) -> bool:
    """Whether a site of a report has exactly the planted blocks, or is left whole where it joins all of them."""
    if (rows == EVERY).any() or (columns == EVERY).any():
        return bool(site["decision"] != "split")
    if site["decision"] != "split" or site["structure"] is None:
        return False
    blocks = site["structure"]["blocks"]
    found = ({frozenset(block[side]) for block in blocks} for side in ("rows", "cols"))
    return all(have == _blocks(labels) for have, labels in zip(found, (rows, columns), strict=True))


def _blocks(labels: Labels) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == block).tolist()) for block in np.unique(labels)}


def _gathers(model: onnx.ModelProto) -> int:
    return Counter(node.op_type for node in model.graph.node)["Gather"]


def kept_shares(network: PlantedNetwork, sites: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of each product's FLOPs that its true blocks need, by the name of its node."""
    return {site["node"]: float(network.mask(site["weight"]).mean()) for site in sites}


def ideal_speedup(spent: Mapping[Node, float], kept: Mapping[str, float]) -> float:
    """Time of all nodes over that with each product of `kept` shrunk to its share.

    ONNX Runtime names what it fuses after the product's node. Raises ValueError where a product is not found.
    """
    saved, seen = 0.0, set[str]()
    for (name, op), time in spent.items():
        plain = name.removeprefix("fused ")
        product = next((node for node in kept if plain == node or plain.startswith(f"{node}/")), None)
        if product is not None and op in PRODUCTS:
            seen.add(product)
            saved += time * (1 - kept[product])
    if missing := kept.keys() - seen:
        raise ValueError(f"not in the profile: {', '.join(sorted(missing))}")
    whole = sum(spent.values())
    return whole / (whole - saved)


def node_times(
    model: onnx.ModelProto, feeds: Arrays, threads: int | None, runs: int = 15
) -> dict[Node, float]:
    """Microseconds of each node: the median over the runs, since other programs use the machine too."""
    spent: dict[Node, list[float]] = defaultdict(list)
    for event in kernel_events(model, feeds, threads, runs):
        spent[event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]].append(event["dur"])
    return {node: float(np.median(found)) for node, found in spent.items()}


def tables(rows: Sequence[Row]) -> list[Table]:
    """One line a network and number of rows, its numbers of threads side by side."""
    made = table(
        "networks: the original against the written model (before / after in one interleaved run, CPU, float32)",
        ["network"],
        [
            "sites right",
            "Gathers added",
            "FLOPs",
            "rows",
            *(f"{threads}: {what}" for threads in ("1 thread", "default") for what in _SHOWN),
        ],
    )
    lines: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.network, row.rows), []).append(row)
    for (network, count), beside in lines.items():
        first = beside[0]
        cells = [
            (times(row.speedup, row.interval), f"{row.ideal:.2f}", f"{row.reached:.0%}") for row in beside
        ]
        made.add_row(
            network,
            f"{first.right} of {first.sites}",
            str(first.gathers),
            f"{first.flops:.2f}x",
            str(count),
            *chain.from_iterable(cells),
        )
    return [made]


_SHOWN = ("speed-up [95 %]", "ideal", "share of it")


SECTION = Section("planted whole networks, through the whole compiler", measure, tables)
