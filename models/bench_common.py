"""What the sections of the benchmark share: the machine in words, timing of two models, cells of tables."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from rich.table import Table

from onnx_decomp import benching, driver, latency, profiling
from onnx_decomp.latency import Latency
from onnx_decomp.runtime import Arrays, Device, open_session

Model = onnx.ModelProto | Path


@dataclass(frozen=True)
class Section:
    """One part of the benchmark. `measure` gets True where it has to be quick; its rows are dataclasses.

    wrong: what of them must not be, a line each; None where there is nothing but figures.
    """

    title: str
    measure: Callable[[bool], Sequence[Any]]
    tables: Callable[[Sequence[Any]], list[Table]]
    wrong: Callable[[Sequence[Any]], list[str]] | None = None


def machine(provider: Device = "cpu") -> dict[str, Any]:
    """Where figures come from, without names of hosts or paths. load: programs that ran meanwhile, ours included."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnxruntime": ort.__version__,
        "provider": driver.devices()[0] if provider == "cuda" else provider,
        "load": round(os.getloadavg()[0], 2),
    }


def _cpu() -> str:
    """Model of the CPU and the widest vectors that it has, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    widest = next((name for flag, name in _VECTORS if flag in flags), "")
    return " ".join(filter(None, [facts.get("model name", platform.machine()), widest]))


_VECTORS = (("amx_tile", "AVX-512 and AMX"), ("avx512f", "AVX-512"), ("avx2", "AVX2"))


def compare(
    before: Model, after: Model, feeds: Arrays, threads: int | None, seconds: float = 1.5, rounds: int = 15
) -> Latency:
    """Two models in turns in one process, on the CPU provider; `threads` of one operator, None: the default."""
    first, second = (open_session(model, threads=threads) for model in (before, after))
    return latency.compare(first, second, feeds, seconds=seconds, min_rounds=rounds)


def kernel_events(
    model: onnx.ModelProto, feeds: Arrays, threads: int | None, runs: int
) -> list[dict[str, Any]]:
    """What ONNX Runtime's own profile says of each operator in each of so many runs, in order."""
    return profiling.kernel_events(
        lambda file: open_session(model, threads=threads, profile=file), feeds, runs
    )


def peak_bytes() -> int:
    """Most memory that this process ever held."""
    told = benching.peak_bytes()
    if told is not None:
        return told
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def save(folder: str, name: str, arrays: Mapping[str, Any]) -> Path:
    """Arrays by name, in a file that the compiler reads."""
    path = Path(folder) / f"{name}.npz"
    np.savez(path, **dict(arrays))
    return path


def table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """An empty table with its text columns on the left and its numbers on the right."""
    made = Table(title=title, title_justify="left")
    for name in left:
        made.add_column(name)
    for name in right:
        made.add_column(name, justify="right")
    return made


def markdown(shown: Table) -> str:
    """A table as a Markdown page takes it, under its title in bold."""
    head = [str(column.header) for column in shown.columns]
    rule = ["---:" if column.justify == "right" else "---" for column in shown.columns]
    rows = zip(*(column.cells for column in shown.columns), strict=True)
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (head, rule, *rows)]
    return "\n".join([f"**{shown.title}**", "", *lines, ""])


def times(speedup: float, interval: Sequence[float]) -> str:
    low, high = interval
    return f"{speedup:.2f} [{low:.2f}, {high:.2f}]"
