"""Measure on this machine: speed of what is written, the cost model, and the compiler's own time and memory.

    python -m models.bench [SECTION ...] [--quick] [--json FILE] [--markdown FILE]

Every speed-up is a ratio of two models that run in turns in one process: its median, and the 95 % interval of that.
docs/benchmarks.md keeps the figures that were measured.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console

from models import (
    bench_backend,
    bench_compile,
    bench_decision,
    bench_forms,
    bench_frontier,
    bench_independent,
    bench_networks,
    bench_planted,
    bench_rounding,
    bench_runtimes,
    bench_shipped,
    bench_smaller,
)
from models.bench_common import Section, machine, markdown
from onnx_decomp.runtime import Device

SECTIONS: dict[str, Section] = {
    "planted": bench_planted.SECTION,
    "networks": bench_networks.SECTION,
    "independent": bench_independent.SECTION,
    "forms": bench_forms.SECTION,
    "decision": bench_decision.SECTION,
    "compile": bench_compile.SECTION,
    "rounding": bench_rounding.SECTION,
    "smaller": bench_smaller.SECTION,
    "frontier": bench_frontier.SECTION,
}
OUTSIDE: dict[str, Section] = {
    "backend": bench_backend.SECTION,
    "shipped": bench_shipped.SECTION,
    "runtimes": bench_runtimes.SECTION,
}
"""What is checked against the outside world: minutes to an hour, packages to fetch, and only where named."""


@dataclass
class Measured:
    """All figures as plain values, the tables that show them, as Markdown, and what must not be."""

    figures: dict[str, Any]
    shown: list[str]
    wrong: list[str]


def run(
    names: Sequence[str],
    quick: bool,
    console: Console,
    sections: Mapping[str, Section] | None = None,
    provider: Device = "cpu",
) -> Measured:
    """Measure the named sections (of these, or of all here) and show each as it is done."""
    where = machine(provider)
    console.print(", ".join(f"{key}: {value}" for key, value in where.items()))
    measured = Measured({"machine": where, "quick": quick, "sections": {}}, [], [])
    for name in names:
        section = (sections or SECTIONS | OUTSIDE)[name]
        console.rule(f"{name}: {section.title}")
        begun = time.monotonic()
        rows = section.measure(quick)
        for made in section.tables(rows):
            console.print(made)
            measured.shown.append(markdown(made))
        console.print(f"({name}: {time.monotonic() - begun:.0f} s, load now {machine()['load']})")
        measured.wrong += section.wrong(rows) if section.wrong is not None else []
        measured.figures["sections"][name] = [asdict(row) for row in rows]
    return measured


@click.command()
@click.argument("sections", nargs=-1, type=click.Choice([*SECTIONS, *OUTSIDE]))
@click.option("--quick", is_flag=True, help="A few cases of each section, under a minute in all.")
@click.option(
    "--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there."
)
@click.option(
    "--markdown", "page", type=click.Path(dir_okay=False, path_type=Path), help="Write the tables there."
)
def main(sections: tuple[str, ...], quick: bool, file: Path | None, page: Path | None) -> None:
    """Measure the named SECTIONS, or all but those against the outside world: backend, shipped, runtimes.

    Exit 1 where what those find is not as it must be.
    """
    console = Console(width=None if sys.stdout.isatty() else 160)
    finish(run(sections or list(SECTIONS), quick, console), file, page)


def finish(measured: Measured, file: Path | None, page: Path | None) -> NoReturn:
    """Write what was asked for and exit, with 1 where something is not as it must be."""
    if file is not None:
        file.write_text(json.dumps(measured.figures, indent=1) + "\n", encoding="utf-8")
    if page is not None:
        page.write_text("\n".join(measured.shown), encoding="utf-8")
    for line in measured.wrong:
        click.echo(line, err=True)
    sys.exit(bool(measured.wrong))


if __name__ == "__main__":
    main()
