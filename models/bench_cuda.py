"""Measure on a GPU: every form against dense, and what has to hold there.

    python -m models.bench_cuda [SECTION ...] [--provider cuda] [--quick] [--type float16] [--json FILE]

Exit code 7 where CUDA does not work, 1 where something is not as it must be. The cost model has a command of its own,
`onnx-decomp bench --calibrate FILE.json --provider cuda`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from models import cuda_forms, cuda_musts
from models.bench import finish, run
from models.bench_common import Section
from onnx_decomp.errors import ProviderError
from onnx_decomp.runtime import Device, resolve_provider

NAMES = ("towers", "shapes", "sentences", "forms")


def sections(provider: Device, types: Sequence[str] = ()) -> dict[str, Section]:
    """By name, those first that have to hold. types: that forms are measured in, all by default."""

    def forms(quick: bool) -> list[cuda_forms.Row]:
        sizes = cuda_forms.QUICK if quick else cuda_forms.Sizes()
        return list(cuda_forms.measure(provider, replace(sizes, types=types or sizes.types)))

    return {
        "towers": Section(
            "a planted chain against the roofline",
            lambda quick: list(cuda_musts.towers(provider, quick)),
            cuda_musts.tables,
            cuda_musts.below_roofline if provider == "cuda" else None,
        ),
        "shapes": Section(
            "no shape gets slower",
            lambda quick: list(cuda_musts.shapes(provider, quick)),
            cuda_musts.tables,
            cuda_musts.slower,
        ),
        "sentences": Section(
            "a sentence transformer from end to end",
            lambda quick: list(cuda_musts.sentences(provider, quick)),
            cuda_musts.tables,
            cuda_musts.not_faster,
        ),
        "forms": Section("every form against dense", forms, cuda_forms.tables),
    }


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(NAMES))
@click.option("--provider", type=click.Choice(("cuda", "cpu")), default="cuda", show_default=True)
@click.option("--quick", is_flag=True, help="Small cases, to see that it runs.")
@click.option(
    "--type", "types", multiple=True, type=click.Choice(cuda_forms.TYPES), help="Forms in these types alone."
)
@click.option(
    "--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there."
)
@click.option(
    "--markdown", "page", type=click.Path(dir_okay=False, path_type=Path), help="Write the tables there."
)
def main(
    names: tuple[str, ...],
    provider: Device,
    quick: bool,
    types: tuple[str, ...],
    file: Path | None,
    page: Path | None,
) -> None:
    """Measure the named sections, or all: towers, shapes, sentences, forms."""
    try:
        device = resolve_provider(provider)
    except ProviderError as error:
        print(f"not measured: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    console = Console(width=None if sys.stdout.isatty() else 160)
    finish(run(names or NAMES, quick, console, sections(device, types), device), file, page)


if __name__ == "__main__":
    main()
