"""The picture of a frontier: an SVG that needs nothing else, from the plain data that the command writes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any
from xml.sax.saxutils import escape

from onnx_decomp.terminal import printable

WIDTH, HEIGHT = 760, 480
LEFT, RIGHT, TOP, BOTTOM = 76, 150, 44, 56
"""Around the frame; the legend stands to its right."""

LINES: Mapping[str, tuple[str, str]] = {
    "plan": ("#0072b2", ""),
    "magnitude": ("#d55e00", "7 3"),
    "wanda": ("#e69f00", "2 3"),
    "svd": ("#009e73", "7 3"),
    "whitened-svd": ("#cc79a7", "2 3"),
}
"""Colour (Okabe and Ito's, told apart by everybody) and dashes of each method."""

OTHER = ("#555555", "")

DECADES = 8
"""Changes that are smaller by more powers of ten than that are drawn at the bottom."""

OBJECTIVES = {"latency": "predicted time", "flops": "MatMul FLOPs", "bytes": "bytes of the weights"}


@dataclass(frozen=True)
class Axes:
    """Log-log: ratio from `least` to 1 to the right, change between powers of ten upwards."""

    least: float
    low: int
    high: int

    @classmethod
    def around(cls, points: Sequence[Mapping[str, Any]], levels: Sequence[float]) -> Axes:
        found = [*(p["change"] for p in points if p["change"]), *levels]
        high = math.ceil(math.log10(max(found, default=1.0)) - 1e-9)
        low = math.floor(math.log10(min(found, default=0.1)) + 1e-9)
        low = max(min(low, high - 1), high - DECADES)
        return cls(min([0.5, *(p["cost"] for p in points)]) / 1.05, low, high)

    def x(self, cost: float) -> float:
        share = 1 - math.log(max(cost, self.least)) / math.log(self.least)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, change: float) -> float:
        if change <= 0:
            return HEIGHT - BOTTOM
        share = (min(max(math.log10(change), self.low), self.high) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def draw(report: Mapping[str, Any]) -> str:
    """The SVG of a frontier's report."""
    options = report["options"]
    points = [point for point in report["points"] if point["change"] is not None]
    plain = options["evaluate"] is None and not options["limits"]
    levels = [options["tolerance"]] if plain else []
    axes = Axes.around(points, levels)
    body = [*_frame(axes), *_words(report)]
    for level in levels:
        y = axes.y(level)
        body.append(_line(LEFT, y, WIDTH - RIGHT, y, "#999999", "4 4"))
        beside = y > TOP + 20 * len(report["methods"]) + 10  # below the legend
        at = (WIDTH - RIGHT + 6, y + 4) if beside else (LEFT + 4, y - 5)
        body.append(_label(*at, f"tolerance {level:g}", "start", 11))
    for number, method in enumerate(report["methods"]):
        body += _curve(axes, method, [point for point in points if point["method"] == method], number)
    body += _marker(axes, report)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="sans-serif" font-size="12">'
    )
    ground = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    return "\n".join([head, ground, *body, "</svg>"]) + "\n"


def _words(report: Mapping[str, Any]) -> Iterator[str]:
    options = report["options"]
    metrics = [options["metric"]]
    metrics += [f"{output}: {metric}" for output, metric, _ in options["limits"] if metric is not None]
    name = PurePath(report["input"]["path"] or "the model").name
    yield _label(LEFT, 24, f"{name}: cost against change", "start", 14)
    across = (LEFT + WIDTH - RIGHT) / 2
    below = f"{OBJECTIVES.get(options['objective'], options['objective'])}, of the dense model"
    yield _label(across, HEIGHT - 14, below, "middle", 12)
    upwards = (TOP + HEIGHT - BOTTOM) / 2
    said = f"change of the outputs ({', '.join(metrics)}) on held-back samples"
    yield (
        f'<text x="16" y="{upwards:.1f}" text-anchor="middle" transform="rotate(-90 16 {upwards:.1f})">'
        f"{_safe(said, 80)}</text>"
    )


def _frame(axes: Axes) -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for power in range(axes.low, axes.high + 1):
        y = axes.y(10.0**power)
        yield _line(LEFT, y, right, y, "#e5e5e5")
        yield _label(LEFT - 6, y + 4, f"{10.0**power:g}", "end", 11)
    for cost in _ticks(axes.least):
        x = axes.x(cost)
        yield _line(x, TOP, x, bottom, "#e5e5e5")
        yield _label(x, bottom + 16, f"{cost:g}", "middle", 11)
    yield (
        f'<rect x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}" fill="none" '
        'stroke="#555555"/>'
    )


def _ticks(least: float) -> list[float]:
    """1, 0.5, 0.2, 0.1, ... as far as they go; fewer where there would be many."""
    found, power = [], 0
    while 10.0**-power >= least:
        found += [
            each
            for each in (10.0**-power, 5 * 10.0 ** -(power + 1), 2 * 10.0 ** -(power + 1))
            if each >= least
        ]
        power += 1
    return found if power < 5 else found[::3]


def _curve(axes: Axes, method: str, points: Sequence[Mapping[str, Any]], number: int) -> Iterator[str]:
    colour, dashes = LINES.get(method, OTHER)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    width = 2.5 if method == "plan" else 1.5
    places = [(axes.x(point["cost"]), axes.y(point["change"])) for point in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>'
    for point, (x, y) in zip(points, places, strict=True):
        said = f"{method}: FLOPs {point['flops']:.3g}, cost {point['cost']:.3g}, change {point['change']:.3g}"
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{_safe(said)}</title></circle>'
    y = TOP + 14 + 20 * number
    start = WIDTH - RIGHT + 12
    yield _line(start, y - 4, start + 26, y - 4, colour, dashes, width)
    yield _label(start + 32, y, method, "start", 12)


def _marker(axes: Axes, report: Mapping[str, Any]) -> Iterator[str]:
    """Where the tolerance would land."""
    if report["picked"] is None:
        return
    point = report["points"][report["picked"]]
    x, y = axes.x(point["cost"]), axes.y(point["change"] or 0.0)
    yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8" fill="none" stroke="#000000" stroke-width="1.5"/>'
    side = "end" if x > (LEFT + WIDTH - RIGHT) / 2 else "start"
    yield _label(
        x + (-12 if side == "end" else 12), y + 18 - 30 * (y > HEIGHT - BOTTOM - 20), "picked", side, 12
    )


def _line(
    x: float, y: float, to_x: float, to_y: float, colour: str, dashes: str = "", width: float = 1
) -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{colour}" '
        f'stroke-width="{width}"{dashed}/>'
    )


def _label(x: float, y: float, text: str, anchor: str, size: int) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{_safe(text, 100)}</text>'
    )


def _safe(text: str, longest: int = 200) -> str:
    """Text of strangers: escaped, with nothing that XML does not know, and not longer than there is room for."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in printable(text))
    return escape(shown if len(shown) <= longest else f"{shown[: longest - 3]}...")
