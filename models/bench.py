"""Measure on this machine: speed of what is written, the cost model, and the compiler's own time and memory.

    python -m models.bench [SECTION ...] [--quick] [--json FILE]

Every speed-up is a ratio of two models that run in turns in one process: its median, and the 95 % interval of that.
docs/benchmarks.md keeps the figures that were measured.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from models import bench_compile, bench_forms, bench_planted
from models.bench_common import Section, machine

SECTIONS: dict[str, Section] = {
    "planted": bench_planted.SECTION,
    "forms": bench_forms.SECTION,
    "compile": bench_compile.SECTION,
}


def run(names: list[str], quick: bool, console: Console) -> dict[str, Any]:
    """Measure the named sections, show each as it is done, and return everything as plain values."""
    started = machine()
    console.print(", ".join(f"{key}: {value}" for key, value in started.items()))
    measured: dict[str, Any] = {"machine": started, "quick": quick, "sections": {}}
    for name in names:
        section = SECTIONS[name]
        console.rule(f"{name}: {section.title}")
        begun = time.monotonic()
        rows = section.measure(quick)
        for made in section.tables(rows):
            console.print(made)
        console.print(f"({name}: {time.monotonic() - begun:.0f} s, load now {machine()['load']})")
        measured["sections"][name] = [asdict(row) for row in rows]
    return measured


@click.command()
@click.argument("sections", nargs=-1, type=click.Choice(list(SECTIONS)))
@click.option("--quick", is_flag=True, help="A few cases of each section, under a minute in all.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there.")
def main(sections: tuple[str, ...], quick: bool, file: Path | None) -> None:
    """Measure the named SECTIONS, or all of them."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    measured = run(list(sections or SECTIONS), quick, console)
    if file is not None:
        file.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
