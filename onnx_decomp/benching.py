"""Two models side by side: how fast, how much memory, which operators, and how far their outputs are apart."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_decomp import calibration, driver, model_io
from onnx_decomp.errors import InputError
from onnx_decomp.latency import Latency, compare
from onnx_decomp.metrics import compare_outputs
from onnx_decomp.model_io import ModelFile
from onnx_decomp.options import Provider, Shape, shape_name
from onnx_decomp.profiling import Kernels, Profile, profile
from onnx_decomp.report import versions
from onnx_decomp.runtime import Arrays, Device, Session, check_recording, open_session, resolve_provider
from onnx_decomp.terminal import printable
from onnx_decomp.verify import patience, try_out

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

SCHEMA = "onnx-decomp-bench/1"

SAMPLES = 128
"""Of one run, where no shape is asked for and the model leaves that open."""

PROFILED, SHOWN = 10, 10
"""Runs that a profile is taken over, and nodes of it that are shown."""


@dataclass(frozen=True)
class Asked:
    """What two models are compared on, and how."""

    shapes: tuple[Shape, ...] = ()
    calib: Path | None = None
    provider: Provider = "auto"
    threads: int | None = None
    seconds: float = 2.0
    seed: int = 0
    cuda_graph: bool = False


def bench_models(before: Path, after: Path, asked: Asked) -> dict[str, Any]:
    """Everything about the two, as plain data.

    Raises InputError for models with different inputs or outputs, CannotVerifyError for those that do not run,
    ProviderError where the provider does not work.
    """
    provider = resolve_provider(asked.provider)
    check_recording(asked.cuda_graph, provider)
    models = [model_io.load(path) for path in (before, after)]
    settings = _settings(models[0], asked)
    first = next(iter(settings.values()))
    for model in models:
        try_out(model, first)
    sessions = [_session(model, provider, asked) for model in models]
    for model, session in zip(models, sessions, strict=True):
        session.run(first, seconds=patience(model))
    ports = [{(port.name, port.dtype) for port in (*each.inputs, *each.outputs)} for each in sessions]
    if odd := ports[0] ^ ports[1]:
        name, dtype = min(odd)
        raise InputError(f"{after}: {name!r} ({dtype}) is an input or output of one of the models only")
    timed = [_timed(sessions, name, feeds, asked) for name, feeds in settings.items()]
    profiles = [profile(partial(_session, model, provider, asked), first, PROFILED) for model in models]
    return {
        "schema": SCHEMA,
        "versions": versions(),
        "provider": provider,
        "device": driver.devices()[0] if provider == "cuda" else None,
        "threads": asked.threads,
        "cuda_graph": asked.cuda_graph,
        "models": [
            _described(path, model, first, provider, asked)
            for path, model in zip((before, after), models, strict=True)
        ],
        "shapes": timed,
        "operators": _operator_rows(*profiles),
        "nodes": _node_rows(*profiles),
    }


def _settings(model: ModelFile, asked: Asked) -> dict[str, calibration.Feeds]:
    """Inputs by what they are called: for each shape that was asked for, else samples as they come."""
    if asked.shapes:
        return {
            shape_name(shape): calibration.shaped(model.proto, shape, asked.seed) for shape in asked.shapes
        }
    if asked.calib is not None:
        data = calibration.load(asked.calib, model.proto, asked.seed)
    else:
        data = calibration.synthetic(model.proto, 5 * SAMPLES, asked.seed)
    feeds = next(data.batches("report", SAMPLES))
    return {f"{len(next(iter(feeds.values())))} samples": feeds}


def _session(model: ModelFile, provider: Device, asked: Asked, profile: Path | None = None) -> Session:
    assert model.path is not None
    return open_session(
        model.path,
        provider=provider,
        threads=asked.threads,
        profile=profile,
        cuda_graph=asked.cuda_graph and profile is None,
    )


def _timed(sessions: Sequence[Session], name: str, feeds: Arrays, asked: Asked) -> dict[str, Any]:
    """One shape: both models in turns, and how far their outputs are apart."""
    outputs = [(sessions[0].run(feeds), sessions[1].run(feeds))]
    found: Latency = compare(sessions[0], sessions[1], feeds, seconds=asked.seconds, seed=asked.seed)
    per_second = [found.samples / ms * 1e3 for ms in (found.before_ms, found.after_ms)]
    return {
        "shape": name,
        **asdict(found),
        "samples_per_second": per_second,
        "change": compare_outputs(outputs, "rel-l2").largest,
    }


def _described(path: Path, model: ModelFile, feeds: Arrays, provider: Device, asked: Asked) -> dict[str, Any]:
    return {
        "path": str(path),
        "sha256": model.sha256,
        "bytes": model.size,
        "parameters": model_io.parameters(model.proto),
        **asdict(_alone(path, feeds, provider, asked.threads)),
    }


# Memory


@dataclass(frozen=True)
class Memory:
    """Most bytes that a process holds which does no more than load the model and run it; None where unknown.

    peak_bytes: resident. device_bytes: taken from the GPU for the model, its buffers and its libraries.
    """

    peak_bytes: int | None = None
    device_bytes: int | None = None


def _alone(path: Path, feeds: Arrays, provider: Device, threads: int | None) -> Memory:
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(_taken, path, dict(feeds), provider, threads).result()
    except (BrokenProcessPool, OSError):
        return Memory()


def _taken(path: Path, feeds: Arrays, provider: Device, threads: int | None) -> Memory:
    before = driver.used_bytes() if provider == "cuda" else None
    if provider == "cuda":
        resolve_provider(provider)  # loads its libraries
    session = open_session(path, provider=provider, threads=threads)
    for _ in range(3):
        session.run(feeds)
    after = None if before is None else driver.used_bytes()
    return Memory(peak_bytes(), None if before is None or after is None else after - before)


def peak_bytes() -> int | None:
    """Most memory that this process ever held, where the system tells.

    Not getrusage's figure: that survives exec on Linux, so that a child would begin with its parent's peak.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return None if found is None else int(found[1]) * 1024


# Operators


def _operator_rows(before: Profile, after: Profile) -> list[dict[str, Any]]:
    """How many there are of each operator, on which provider, and microseconds of a run."""
    none = Kernels()
    rows = [
        {
            "operator": operator,
            "provider": where,
            "before": asdict(before.operators.get((operator, where), none)),
            "after": asdict(after.operators.get((operator, where), none)),
        }
        for operator, where in dict.fromkeys([*before.operators, *after.operators])
    ]
    return sorted(rows, key=lambda row: -row["before"]["microseconds"])


def _node_rows(before: Profile, after: Profile) -> list[dict[str, Any]]:
    """Microseconds of each node, those first that differ most."""
    rows = [
        {"node": name, "before": before.nodes.get(name, 0.0), "after": after.nodes.get(name, 0.0)}
        for name in dict.fromkeys([*before.nodes, *after.nodes])
    ]
    return sorted(rows, key=lambda row: -abs(row["before"] - row["after"]))


# Shown


def render_bench(found: Mapping[str, Any]) -> RenderableType:
    """Tables: speed, size, operators, nodes."""
    from rich.console import Group

    return Group(_speeds(found), _sizes(found), _operators(found), _nodes(found))


def _table(title: str, *headings: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for at, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", justify="right" if at else "left")
    return table


def _speeds(found: Mapping[str, Any]) -> Table:
    threads = "default threads" if found["threads"] is None else f"{found['threads']} threads"
    where = (
        f"{found['device'] or found['provider']}, {threads}{', CUDA graph' if found['cuda_graph'] else ''}"
    )
    table = _table(f"speed ({where})", "input", "A ms", "B ms", "A / B [95 %]", "A /s", "B /s", "B - A")
    for row in found["shapes"]:
        low, high = row["interval"]
        table.add_row(
            printable(row["shape"]),
            f"{row['before_ms']:.3g}",
            f"{row['after_ms']:.3g}",
            f"{row['speedup']:.2f} [{low:.2f}, {high:.2f}]",
            *(f"{value:,.0f}" for value in row["samples_per_second"]),
            f"{row['change']:.1e}",
        )
    return table


def _sizes(found: Mapping[str, Any]) -> Table:
    table = _table("size", "model", "file", "parameters", "peak memory", "GPU memory")
    for letter, model in zip("AB", found["models"], strict=True):
        size = f"{model['bytes'] / 2**20:,.1f} MiB"
        table.add_row(
            f"{letter} {printable(model['path'])}",
            size,
            f"{model['parameters']:,}",
            *(_mebibytes(model[kind]) for kind in ("peak_bytes", "device_bytes")),
        )
    return table


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.0f} MiB"


def _operators(found: Mapping[str, Any]) -> Table:
    table = _table("operators, as optimized", "operator", "on", "A", "B", "A us", "B us")
    for row in found["operators"]:
        sides = row["before"], row["after"]
        table.add_row(
            printable(row["operator"]),
            row["provider"],
            *(f"{side['nodes']}" for side in sides),
            *(f"{side['microseconds']:,.0f}" for side in sides),
        )
    return table


def _nodes(found: Mapping[str, Any]) -> Table:
    table = _table("nodes", "differ most", "A us", "B us")
    for row in found["nodes"][:SHOWN]:
        table.add_row(printable(row["node"]), *(f"{row[side]:,.0f}" for side in ("before", "after")))
    return table


def verdict(found: Mapping[str, Any]) -> str:
    """One line: the worst shape, and what does not run where it should."""
    worst = min(found["shapes"], key=lambda row: row["interval"][0])
    low, high = worst["interval"]
    line = f"B is {worst['speedup']:.2f} times as fast as A [{low:.2f}, {high:.2f}]"
    if len(found["shapes"]) > 1:
        line += f" at its worst shape, {worst['shape']}"
    strays = sorted({row["operator"] for row in found["operators"] if _strays(row, found["provider"])})
    return line + (f"; B has operators that fall back to the CPU: {', '.join(strays)}" if strays else "")


def _strays(row: Mapping[str, Any], provider: str) -> bool:
    return bool(row["provider"] != provider and row["after"]["nodes"])
