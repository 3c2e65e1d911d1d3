"""A report for people: a table on a terminal, one HTML page, the story of one node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnx_decomp.reasons import explain
from onnx_decomp.report import Report
from onnx_decomp.terminal import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

MOST_ROWS = 1000
"""Rows of a table on a terminal: nobody reads more there, and laying out a hundred thousand takes minutes."""

PICTURE = 160.0
"""Longer side of the picture of a structure, in pixels."""


@dataclass(frozen=True)
class Rectangle:
    """One block in the picture of a structure: what it maps from (y, height) and to (x, width)."""

    x: float
    y: float
    width: float
    height: float
    hue: int
    title: str


def render_table(report: Report, every_site: bool = True) -> RenderableType:
    """The sites and what became of them; without `every_site`, those left dense are just counted."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("node", "shape", "null", "blocks", "decision", "form"):
        table.add_column(heading, overflow="fold", min_width=5)
    for heading in ("FLOPs", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold", min_width=24)
    shown = [site for site in report["sites"] if every_site or site["decision"] != "dense"]
    for site in shown[:MOST_ROWS]:
        style = "" if site["decision"] == "dense" else "green"
        table.add_row(*(Text(printable(cell), style) for cell in _row(site)))
    lines = [Text(printable(line)) for line in summary(report)]
    if len(shown) < len(report["sites"]):
        lines = [Text(printable(line)) for line in _left_alone(report)] + lines
    if len(shown) > MOST_ROWS:
        lines = [Text(f"{len(shown) - MOST_ROWS} more nodes are in the report: --report writes it"), *lines]
    return Group(*([table] if shown else []), *lines)


def render_frontier(found: Report) -> RenderableType:
    """The plan at each ratio that was asked for, and what the plain methods change at the same cost."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    points = found["points"]
    others = [method for method in found["methods"] if method != "plan"]
    columns: dict[str, str] = {"flops": "FLOPs", "cost": "cost", "change": "change", "predicted": "expected"}
    columns |= {"score": "score"} if any(point["score"] is not None for point in points) else {}
    columns |= {"speedup": "speed up"} if any(point["speedup"] is not None for point in points) else {}
    columns = columns if "plan" in found["methods"] else {}
    picked = None if found["picked"] is None else points[found["picked"]]
    at = {(point["method"], point["asked"]): point for point in points}
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("asked", *columns.values(), *(method.replace("-", " ") for method in others)):
        # Numbers and words stay whole, headings of two words need not.
        table.add_column(heading, justify="right", min_width=max(5, *map(len, heading.split())))
    for asked in sorted({point["asked"] for point in points}, reverse=True):
        plan = at.get(("plan", asked))
        cells = [_short(asked), *(_short(plan and plan[key]) for key in columns)]
        cells += [_beside(at.get((method, asked))) for method in others]
        table.add_row(*(Text(printable(cell), "green" if plan and plan is picked else "") for cell in cells))
    options, lines = found["options"], list(found["notes"])
    if found["score"] is not None:
        lines.append(f"score of {options['evaluate']}: {found['score']:.5g} of the original")
    measure = ", ".join([options["metric"], *(f"{o}: {m}" for o, m, _ in options["limits"] if m is not None)])
    lines.append(f"cost: {options['objective']}, predicted; change: {measure} on held-back samples")
    return Group(table, *(Text(printable(line)) for line in lines))


def _short(value: float | None) -> str:
    """What fits a narrow column."""
    return "-" if value is None else f"{value:.3g}" if value >= 0.1 else f"{value:.2g}"


def _beside(point: Mapping[str, Any] | None) -> str:
    """What another method changes, and its score if there is one."""
    if point is None:
        return "-"
    score = "" if point["score"] is None else f" ({_short(point['score'])})"
    return f"{_short(point['change'])}{score}"


def summary(report: Report) -> list[str]:
    """The whole model in a few lines."""
    before, after = report["input"], report["output"]
    lines = [
        f"MatMul FLOPs per sample: {_count(before['matmul_flops'])} -> {_count(after['matmul_flops'])}, "
        f"parameters: {_count(before['parameters'])} -> {_count(after['parameters'])}, "
        f"bytes: {_count(before['bytes'])} -> {_count(after['bytes'])}"
    ]
    check = report["verify"]
    if check is None:
        lines.append("outputs: not compared")
    else:
        changes = [c["rel_l2"] for c in check["outputs"].values() if c["rel_l2"] is not None]
        largest = f"largest relative change {_number(max(changes))}" if changes else "no float outputs"
        if report["evaluate"] is None:
            largest += f"; {check['metric']} {'within' if check['passed'] else 'beyond'} "
            largest += f"the tolerance of {_number(check['tolerance'])}"
        for name, own in check["outputs"].items():
            if "metric" in own:
                largest += f", {name}: {own['metric']} of {_number(own['tolerance'])}"
        lines.append(f"outputs: {largest}")
    score = report["evaluate"]
    if score is not None and score["after"] is not None:
        lines.append(
            f"score of {score['function']}: {score['before']:.5g} -> {score['after']:.5g}, "
            f"within the tolerance of {_number(score['tolerance'])}"
        )
    latency = report["latency"]
    if isinstance(latency, str):
        lines.append(f"latency: {latency}")
    else:
        for each in latency.get("shapes", [latency]):
            low, high = each["interval"]
            shape = f", {each['shape']}" if "shape" in each else ""
            lines.append(
                f"latency on {each['provider']}, threads {each['threads'] or 'all'}{shape}: "
                f"{_number(each['before_ms'])} ms -> {_number(each['after_ms'])} ms, "
                f"{_number(each['speedup'])}x (95 %: {_number(low)} to {_number(high)})"
            )
    fused = [each for each in report["operators"] if each["fused"]]
    if fused:
        counts = ", ".join(f"{each['operator']} {each['before']} -> {each['after']}" for each in fused)
        lines.append(f"fused by ONNX Runtime: {counts}")
    return lines


def called(site: Report) -> tuple[str, ...]:
    """Names that a site goes by: of its node, of a node that holds several with it, and of its weight."""
    whole = (site["node"].rpartition("/")[0],) if site["op"] == "Attention" else ()
    return site["node"], *whole, site["weight"]


def describe_site(site: Mapping[str, Any]) -> list[str]:
    """All that a report says of one site, a fact a line."""
    form = f" as {_form(site)}" if site["form"] else ""
    lines = [
        f"{site['node']}: {site['op']} {_shape(site)} {site['dtype']}",
        f"  weight: {site['weight']}, in {site['graph']}",
        f"  decision: {site['decision']}{form}, {_number(site['flop_ratio'])} of its FLOPs",
        f"  why: {explain(site['reason'] or 'not looked at')} [{site['reason'] or '-'}]",
    ]
    if site["region"]:
        lines.append(f"  region: {site['region']}")
    if site["null"]:
        lines.append(f"  null: {_facts(site['null'])}")
    lines.append(
        f"  evidence: {_facts({key: site[key] for key in ('supported', 'learned_rank', 'influence')})}"
    )
    structure = site["structure"]
    if structure:
        facts = {key: structure[key] for key in ("kind", "p", "stability")}
        lines.append(f"  structure: {len(structure['blocks'])} blocks, {_facts(facts)}")
        lines += [
            f"    block {number}: {len(block['rows'])} inputs, {len(block['cols'])} outputs"
            for number, block in enumerate(structure["blocks"])
        ]
    lines.append(f"  error: {_facts(site['error'])}")
    for entry in site.get("decisions", []):
        numbers = f": {_facts(entry['numbers'])}" if entry["numbers"] else ""
        lines.append(f"  {entry['pass']} {entry['verdict']} it, {entry['reason']}{numbers}")
    return [printable(line) for line in lines]


def render_html(report: Report) -> str:
    """One page that needs nothing else: no script, no font, no image from anywhere."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("onnx_decomp"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
    )
    environment.filters["explain"] = explain
    pictures = [(site, picture(site)) for site in report["sites"] if site["structure"]]
    rows = [(site["decision"] != "dense", _row(site)) for site in report["sites"]]
    template = environment.get_template("report.html")
    return template.render(report=report, summary=summary(report), rows=rows, pictures=pictures, side=PICTURE)


def picture(site: Mapping[str, Any]) -> list[Rectangle]:
    """The blocks along the diagonal of a K x N frame; what is in none leaves the frame empty."""
    k, n = site["shape"]
    scale = PICTURE / max(k, n)
    blocks = site["structure"]["blocks"]
    found, x, y = [], 0.0, 0.0
    for number, block in enumerate(blocks):
        height, width = len(block["rows"]) * scale, len(block["cols"]) * scale
        title = f"block {number}: {len(block['rows'])} inputs x {len(block['cols'])} outputs"
        found.append(Rectangle(x, y, width, height, 360 * number // len(blocks), title))
        x, y = x + width, y + height
    return found


def _row(site: Mapping[str, Any]) -> tuple[str, ...]:
    null, structure, error = site["null"], site["structure"], site["error"]
    measured = error["measured"] if error["measured"] is not None else error["predicted"]
    return (
        site["node"],
        _shape(site),
        "-" if null is None else null["kind"] if null["fits"] is not False else f"{null['kind']} (no fit)",
        str(len(structure["blocks"])) if structure else "-",
        site["decision"],
        _form(site),
        _number(site["flop_ratio"]),
        _number(measured),
        _why(site),
    )


def _form(site: Mapping[str, Any]) -> str:
    """How it is written: between products of which rank, with heads of which width, beside which correction."""
    rank = f", rank {site['rank']}" if site["rank"] is not None else ""
    heads = f", heads of {site['head_width']}" if site.get("head_width") is not None else ""
    beside = f" + rank {site['correction']}" if site.get("correction") is not None else ""
    return f"{site['form'] or '-'}{rank}{heads}{beside}"


def _why(site: Mapping[str, Any]) -> str:
    """The reason in words; where blocks were found and something else was done, also what spoke against them."""
    why = explain(site["reason"]) if site["reason"] else "-"
    unused = site["structure"]["unused"] if site["structure"] else None
    return why if unused in (None, site["reason"]) else f"{why}; blocks not used: {explain(unused)}"


def _left_alone(report: Report) -> Iterator[str]:
    counts = Counter(site["reason"] for site in report["sites"] if site["decision"] == "dense")
    for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0] or "")):
        why = explain(reason) if reason else "not looked at"
        yield f"{count} {'node' if count == 1 else 'nodes'} left dense: {why}"


def _shape(site: Mapping[str, Any]) -> str:
    return f"{site['shape'][0]}x{site['shape'][1]}"


def _facts(facts: Mapping[str, Any]) -> str:
    """Names and values in one line, nested ones too; what is not known is left out."""
    flat = dict(facts)
    for key, value in facts.items():
        if isinstance(value, Mapping):
            flat |= {f"{key} {name}": item for name, item in flat.pop(key).items()}
    known = [f"{key} {_number(value)}" for key, value in flat.items() if value is not None]
    return ", ".join(known) or "not known"


def _number(value: Any) -> str:
    """Three digits; what is not a number as it is."""
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _count(value: float) -> str:
    """A large count in three digits: 1.23 M."""
    for unit in ("", " k", " M", " G"):
        if abs(value) < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} T"
