"""The `.json` spec: distributions by weight-name pattern, the first match wins. docs/init.md describes it."""

from __future__ import annotations

import ast
import fnmatch
import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, NoReturn

from onnx_decomp.errors import InputError
from onnx_decomp.init_stats.nulls import Family, Law
from onnx_decomp.init_stats.presets import PRESETS, Preset, Shape

VERSION = 1
MAX_BYTES = 16 << 20
MAX_EXPRESSION = 200

_FAMILIES: Mapping[Family, set[str]] = {"normal": {"std"}, "uniform": {"bound"}, "truncnorm": {"std", "cut"}}
_BINARY: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True)
class Rule:
    """One pattern of a spec, and what weights that it matches are drawn from."""

    match: str
    pattern: re.Pattern[str]
    law: Preset
    where: str
    """File and number of the pattern, for messages."""

    def matches(self, names: Iterable[str]) -> bool:
        """Whether one of a weight's names does."""
        return any(self.pattern.search(name) for name in names)

    def draw(self, shape: Shape) -> Law:
        """The law of a weight of this shape. Raises InputError where an expression has no sound value."""
        try:
            return self.law(shape)
        except (ValueError, ArithmeticError) as error:
            raise InputError(f"{self.where} is wrong: {error}; see docs/init.md") from error


def read_rules(path: Path) -> list[Rule]:
    """The patterns of a spec in order. Raises InputError, naming the pattern, where it isn't sure of one."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; check --init")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path}: a spec over {MAX_BYTES} bytes; merge its patterns")
    try:
        spec = json.loads(path.read_text("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: broken JSON ({error}); see docs/init.md for the format") from error
    if not isinstance(spec, dict) or spec.get("onnx_decomp_init") != VERSION:
        raise InputError(
            f'{path}: not a spec of distributions; it must start with {{"onnx_decomp_init": {VERSION}'
        )
    patterns = spec.get("patterns")
    if not isinstance(patterns, list) or not patterns or set(spec) != {"onnx_decomp_init", "patterns"}:
        raise InputError(f'{path}: a spec holds one list "patterns" and nothing else; see docs/init.md')
    rules = []
    for number, item in enumerate(patterns):
        try:
            rules.append(_rule(item, f"{path}: pattern {number}"))
        except (ValueError, re.error) as error:
            raise InputError(f"{path}: pattern {number} is wrong: {error}; see docs/init.md") from error
        rules[-1].draw(Shape(64, 64))  # a broken expression shows even where no weight matches
    return rules


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _rule(item: Any, where: str) -> Rule:
    if not isinstance(item, dict) or not isinstance(item.get("match"), str):
        raise ValueError('"match" must be a string')
    match = item["match"]
    pattern = re.compile(match[3:] if match.startswith("re:") else rf"\A{fnmatch.translate(match)}")
    fields = {key: value for key, value in item.items() if key != "match"}
    law = _preset(fields) if "preset" in fields else _distribution(fields)
    return Rule(match, pattern, law, where)


def _preset(fields: dict[str, Any]) -> Preset:
    name = fields.pop("preset")
    if fields:
        raise ValueError(f"a preset takes no {', '.join(sorted(fields))}")
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}, there are {', '.join(PRESETS)}")
    return PRESETS[name]


def _distribution(fields: dict[str, Any]) -> Preset:
    named = fields.pop("family", None)
    family = next((known for known in _FAMILIES if known == named), None)
    if family is None:
        raise ValueError(f'"family" must be one of {", ".join(_FAMILIES)}, or give a "preset"')
    scale = "bound" if family == "uniform" else "std"
    unknown = set(fields) - _FAMILIES[family] - {"mean"}
    if unknown or scale not in fields:
        optional = [*sorted(_FAMILIES[family] - {scale}), "mean"]
        raise ValueError(f"{family} takes {scale!r} and, if wanted, {', '.join(optional)}")

    def law(shape: Shape) -> Law:
        return Law(
            family,
            _number(fields.get("mean", 0.0), shape, lowest=None),
            _number(fields[scale], shape, lowest=0.0),
            _number(fields.get("cut", 2.0), shape, lowest=0.1),
        )

    return law


def _number(value: Any, shape: Shape, lowest: float | None) -> float:
    """A number, or an expression in fan_in and fan_out. Raises ValueError unless finite and >= `lowest`."""
    if isinstance(value, str):
        if len(value) > MAX_EXPRESSION:
            raise ValueError(f"an expression has at most {MAX_EXPRESSION} characters")
        try:
            number = _evaluate(ast.parse(value.strip(), mode="eval").body, shape)
        except (SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"{value!r} is no expression") from error
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    else:
        raise ValueError(f"{value!r} is neither a number nor an expression")
    if not isfinite(number) or (lowest is not None and number < lowest):
        raise ValueError(f"{value!r} gives {number}, out of range")
    return number


def _evaluate(node: ast.expr, shape: Shape) -> float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return float(value)
        case ast.Name(id="fan_in"):
            return float(shape.fan_in)
        case ast.Name(id="fan_out"):
            return float(shape.fan_out)
        case ast.Call(func=ast.Name(id="sqrt"), args=[inner], keywords=[]):
            return sqrt(_evaluate(inner, shape))
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_evaluate(inner, shape)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_evaluate(left, shape), _evaluate(right, shape))
    raise ValueError(f"{ast.unparse(node)!r} is neither number, fan_in, fan_out, sqrt() nor + - * /")
