"""Compile models of many gigabytes, and measure the anonymous memory that it takes.

    python -m models.bench_large [--gigabytes 8] ...

The command runs as a process of its own, and what the kernel says of it is read every few milliseconds. Anonymous
memory (RssAnon) is what nothing but the process holds: pages of mapped files can be dropped, and are not counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from models.bench_common import machine
from models.large import Large, calibration, write

MIB = 2**20
INTERVAL = 0.02
"""Seconds between two looks at a process."""

OPTIONS = ("--init-preset", "torch-linear", "--provider", "cpu", "--no-latency-gate", "--objective", "flops")


@dataclass(frozen=True)
class Measured:
    """One compilation. Sizes in MiB; peak: of anonymous memory."""

    layers: int
    width: int
    samples: int
    source: float
    output: float
    peak: float
    seconds: float
    regions: int
    kept: int
    flops: float
    """Of the MatMuls after, over those before."""
    change: float
    """Of the outputs, by the metric of the tolerance gate."""


def anonymous(pid: int) -> int:
    """Bytes of anonymous memory of a process and of those that it has started, 0 once it is gone."""
    place = Path(f"/proc/{pid}")
    try:
        lines = (place / "status").read_text().splitlines()
        children = (place / f"task/{pid}/children").read_text().split()
    except OSError:
        return 0
    sizes = [int(line.split()[1]) for line in lines if line.startswith("RssAnon:")]
    return 1024 * sum(sizes) + sum(anonymous(int(child)) for child in children)


def watched(command: Sequence[str]) -> tuple[float, float]:
    """Run a command to its end: peak of anonymous memory in MiB, and seconds."""
    begun, peak = time.monotonic(), 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(INTERVAL)
    if process.returncode:
        raise click.ClickException(f"the compiler ended with exit code {process.returncode}")
    return peak / MIB, time.monotonic() - begun


def measure(spec: Large, samples: int, folder: Path, options: Sequence[str]) -> Measured:
    """Generate a model, compile it into another folder, and say what it took."""
    source = write(spec, folder / "in")
    np.savez(folder / "calib.npz", **calibration(spec, samples))  # type: ignore[arg-type]
    (folder / "out").mkdir()
    report_path = folder / "report.json"
    files = [str(source), str(folder / "out" / "model.onnx"), "--report", str(report_path)]
    command = [sys.executable, "-c", "import sys; from onnx_decomp.cli import main; sys.exit(main())"]
    calib = ["--calib", str(folder / "calib.npz")]
    peak, seconds = watched([*command, *files, *calib, *OPTIONS, *options])
    report: dict[str, Any] = json.loads(report_path.read_text())
    changes = [output["rel_l2"] for output in (report["verify"] or {"outputs": {}})["outputs"].values()]
    return Measured(
        spec.layers,
        spec.width,
        samples,
        _size(folder / "in"),
        _size(folder / "out"),
        peak,
        seconds,
        len({site["region"] for site in report["sites"]}),
        len(report["kept"]),
        report["output"]["matmul_flops"] / report["input"]["matmul_flops"],
        max(changes, default=0.0),
    )


def _size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / MIB


def table(rows: Sequence[Measured]) -> Table:
    shown = Table(title="Anonymous memory of a compilation")
    for name in ("model", "matrices", "peak anonymous", "time", "kept", "FLOPs", "change", "output"):
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(
            f"{row.source / 1024:.2f} GiB",
            f"{2 * row.layers} of {row.width}²",
            f"{row.peak:.0f} MiB",
            f"{row.seconds:.0f} s",
            f"{row.kept} of {row.regions}",
            f"{row.flops:.3f}",
            f"{row.change:.1e}",
            f"{row.output / 1024:.2f} GiB",
        )
    return shown


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--gigabytes", type=float, multiple=True, default=(8.0,), help="Of weights; several are compared."
)
@click.option("--width", default=4096, show_default=True, help="Rows and columns of each matrix.")
@click.option("--blocks", default=8, show_default=True)
@click.option("--samples", default=40, show_default=True, help="Of calibration data.")
@click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), help="Where to work; has to hold all."
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the figures."
)
@click.argument("options", nargs=-1)
def main(
    gigabytes: Sequence[float],
    width: int,
    blocks: int,
    samples: int,
    folder: Path | None,
    json_path: Path | None,
    options: Sequence[str],
) -> None:
    """Compile generated models and show what it took. OPTIONS go to the compiler."""
    rows = []
    for size in gigabytes:
        with tempfile.TemporaryDirectory(prefix="large-", dir=folder) as work:
            rows.append(measure(Large.of(size, width, blocks), samples, Path(work), options))
    Console(width=None if sys.stdout.isatty() else 120).print(table(rows))
    if json_path is not None:
        told = {"machine": machine(), "rows": [asdict(row) for row in rows]}
        json_path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
