"""The options of one compilation, as the command and the Python API share them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Provider = Literal["cpu", "cuda", "auto"]
Metric = Literal["rel-l2", "cosine", "top1", "kl", "max-abs"]
Objective = Literal["latency", "flops", "bytes"]
OwnLimit = tuple[str, Metric | None, float | None]
"""(output, metric, tolerance) of one output; None where it is that of all outputs."""
Shape = tuple[tuple[str, tuple[int, ...]], ...]
"""(input, dims) of those inputs that are told; others follow by the names of their dims."""


def shape_name(shape: Shape) -> str:
    """As it is written on the command line."""
    return "+".join(f"{name}:{'x'.join(map(str, dims))}" for name, dims in shape)


@dataclass(frozen=True)
class Options:
    """Everything that decides what a compilation does; docs/command.md says what each means."""

    init: Path | None = None
    init_preset: str | None = None
    calib: Path | None = None
    tolerance: float = 1e-3
    metric: Metric = "rel-l2"
    limits: tuple[OwnLimit, ...] = ()
    evaluate: str | None = None  # SCRIPT.py:function; the tolerance is then the largest drop of its score
    objective: Objective = "latency"
    search: bool = True  # look for units and ranks to leave out, beside blocks
    provider: Provider = "auto"
    threads: int | None = None  # intra-op threads of the latency gate; None: ONNX Runtime's default
    latency_gate: bool = True
    min_speedup: float = 1.0
    shapes: tuple[
        Shape, ...
    ] = ()  # each of which the latency gate measures; none: samples of the report part
    cuda_graph: bool = False  # the latency gate times runs that start all kernels at once
    seed: int = 0
    include: str | None = None
    exclude: str | None = None
    replay: Path | None = None
    require_change: bool = False
    force: bool = False
    jobs: int = 1
    cost: Path | None = None  # table of the cost model, made by `bench --calibrate`
    scheduler: str | None = None  # address of a Dask cluster, which does the jobs instead
    dry_run: bool = False
    progress: bool = False
