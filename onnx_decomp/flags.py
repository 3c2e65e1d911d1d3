"""The options of the command, what they accept, and the file that gives them defaults."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from onnx_decomp.errors import InputError
from onnx_decomp.options import Metric, Objective, Provider

FILE = click.Path(path_type=Path, dir_okay=False)
FILE_OR_FOLDER = click.Path(path_type=Path)

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass
class Console:
    """What the command has to know of its options when something fails."""

    debug: bool = False


def _positive(what: str) -> Callable[[click.Context, click.Parameter, float], float]:
    def check(_ctx: click.Context, _param: click.Parameter, value: float) -> float:
        if not (math.isfinite(value) and value > 0):
            raise click.BadParameter(f"impossible {what} {value}: give a number above 0")
        return value

    return check


def _regex(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    try:
        re.compile(value or "")
    except re.error as error:
        raise click.BadParameter(f"{value!r} is not a regular expression: {error}") from error
    return value


def _existing(_ctx: click.Context, _param: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and not value.exists():
        raise InputError(f"{value}: no such file: check the path")
    return value


def _remember_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> bool:
    if isinstance(ctx.obj, Console):
        ctx.obj.debug = value
    return value


def _read_config(ctx: click.Context, _param: click.Parameter, path: Path | None) -> Path | None:
    """Make the values of a TOML file the defaults of the options that they are named after."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{path}: not a readable TOML file: {error}") from error
    ctx.default_map = dict(_default(ctx.command, path, key, value) for key, value in values.items())
    return path


def _default(command: click.Command, path: Path, key: str, value: Any) -> tuple[str, Any]:
    flag = f"--{key.replace('_', '-')}"
    for param in command.params:
        if not isinstance(param, click.Option) or param.name in (None, "config"):
            continue
        if flag in param.opts or flag in param.secondary_opts:
            if param.is_flag != isinstance(value, bool) or not isinstance(value, bool | int | float | str):
                kind = "true or false" if param.is_flag else "a number or a text"
                raise click.BadParameter(f"{path}: {key}: {value!r} has to be {kind}")
            return str(param.name), (not value if flag in param.secondary_opts else value)
    raise click.BadParameter(
        f"{path}: unknown key {key!r}: keys are the names of options, as in min-speedup = 1.1"
    )


def _chain(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several decorators as one, the first outermost."""

    def decorate(function: Command) -> Command:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_remember_debug, help="Show tracebacks."
)

compile_options = _chain(
    click.option(
        "--init",
        type=FILE_OR_FOLDER,
        callback=_existing,
        help="Snapshot (.npz, .safetensors, .onnx) or .json spec.",
    ),
    click.option(
        "--init-preset", metavar="NAME", help="Initialization of a framework, as torch-linear or bert."
    ),
    click.option(
        "--calib",
        type=FILE_OR_FOLDER,
        callback=_existing,
        help="Samples: an .npz of input name -> array, or a folder.",
    ),
    click.option(
        "--tolerance",
        type=float,
        default=1e-3,
        show_default=True,
        callback=_positive("tolerance"),
        help="Largest change of any output.",
    ),
    click.option(
        "--metric",
        type=click.Choice(get_args(Metric)),
        default="rel-l2",
        show_default=True,
        help="What the tolerance is about.",
    ),
    click.option(
        "--objective",
        type=click.Choice(get_args(Objective)),
        default="latency",
        show_default=True,
        help="What the plan makes small.",
    ),
    click.option(
        "--provider",
        type=click.Choice(get_args(Provider)),
        default="auto",
        show_default=True,
        help="Where the model will run.",
    ),
    click.option(
        "--threads", type=click.IntRange(min=1), help="Threads of the latency gate. [default: ONNX Runtime's]"
    ),
    click.option(
        "--min-speedup",
        type=float,
        default=1.0,
        show_default=True,
        callback=_positive("speedup"),
        help="Measured speedup below which a rewrite is undone.",
    ),
    click.option("--latency-gate/--no-latency-gate", default=True, help="Measure latency.  [default: on]"),
    click.option(
        "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything random."
    ),
    click.option(
        "--include", metavar="REGEX", callback=_regex, help="Only nodes or weights whose name matches."
    ),
    click.option(
        "--exclude", metavar="REGEX", callback=_regex, help="No nodes or weights whose name matches."
    ),
    click.option("--replay", type=FILE, callback=_existing, help="Keep exactly what this report kept."),
    click.option("--require-change", is_flag=True, help="Fail if nothing was kept."),
    click.option("--force", is_flag=True, help="Compile a model that is compiled already."),
    click.option(
        "--jobs",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Matrices looked at together.",
    ),
    click.option("--dry-run", is_flag=True, help="Do everything except writing OUT."),
)

output_options = _chain(
    click.option("--report", "report_path", type=FILE, help="Write the report as JSON."),
    click.option("--html", "html_path", type=FILE, help="Write the report as one HTML page."),
    click.option("--quiet", "-q", is_flag=True, help="Only warnings and the verdict."),
    click.option("--verbose", "-v", is_flag=True, help="List every node, however many."),
    click.option("--no-progress", is_flag=True, help="No progress bars."),
    click.option(
        "--config",
        type=FILE,
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="TOML file with defaults for these options.",
    ),
    debug_option,
)
