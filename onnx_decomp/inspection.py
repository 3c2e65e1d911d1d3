"""What the compiler would look at in a model, before anything is decided."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_decomp import guards, model_io, trial
from onnx_decomp.axes import find_regions
from onnx_decomp.reasons import explain
from onnx_decomp.sites import GraphIndex, find_sites
from onnx_decomp.terminal import printable

MOST_ROWS = 1000
"""Of a table on a terminal."""
SECONDS = 600.0
"""Telling the shapes of a model may take."""

if TYPE_CHECKING:
    from rich.console import RenderableType


def inspect_model(path: Path) -> dict[str, Any]:
    """The sites of a model, the regions that they form, and what stands in the way of the others."""
    source = model_io.load(path)
    build = partial(GraphIndex.build, source.proto, partial(model_io.read_tensor, source))
    trial.attempt(build, str(path), SECONDS, guards.MAX_TENSOR)
    index = build()
    sites = find_sites(index)
    regions = find_regions(index, sites)
    home = {site.index: region.name for region in regions for site in region.sites}
    return {
        "path": str(path),
        "sha256": source.sha256,
        "bytes": source.size,
        "parameters": model_io.parameters(source.proto),
        "sites": [
            {
                "node": site.name,
                "op": site.op,
                "weight": site.weight,
                "shape": list(site.shape),
                "dtype": str(site.dtype),
                "graph": site.graph,
                "region": home.get(site.index),
                "obstacle": site.obstacle,
            }
            for site in sites
        ],
        "regions": [
            {
                "name": region.name,
                "nodes": [site.name for site in region.sites],
                "widths": list(region.widths),
                "pinned": [region.groups[at].pinned for at in (region.order[0], region.order[-1])],
            }
            for region in regions
        ],
    }


def render_inspection(found: dict[str, Any]) -> RenderableType:
    """The sites as a table, and how many regions they form."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("node", "op", "shape", "dtype", "region", "obstacle"):
        table.add_column(heading, overflow="fold", min_width=5)
    for site in found["sites"][:MOST_ROWS]:
        shape = f"{site['shape'][0]}x{site['shape'][1]}"
        obstacle = explain(site["obstacle"]) if site["obstacle"] else "-"
        cells = (site["node"], site["op"], shape, site["dtype"], site["region"] or "-", obstacle)
        table.add_row(*(Text(printable(cell)) for cell in cells))
    counts = f"constant matrices: {len(found['sites'])}, regions: {len(found['regions'])}"
    if len(found["sites"]) > MOST_ROWS:
        counts += f"; the first {MOST_ROWS} are listed, --json lists all"
    return Group(*([table] if found["sites"] else []), Text(counts))
