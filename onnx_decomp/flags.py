"""The options of the command, what they accept, and the file that gives them defaults."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from click.core import ParameterSource

from onnx_decomp.errors import InputError
from onnx_decomp.options import Metric, Objective, Options, OwnLimit, Provider, Shape

FILE = click.Path(path_type=Path, dir_okay=False)
FILE_OR_FOLDER = click.Path(path_type=Path)

LARGEST = 2.0**63
"""No number in a configuration file is larger than this, and none is infinite or NaN."""

COMMAND_LINE_ONLY = frozenset({"evaluate", "scheduler"})
"""What runs code or lets others run it: only who calls the command may ask for that, not a file in the folder."""

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


def _limits(read: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, tuple[str, ...]], Any]:
    """Values as they are given, `VALUE` or `OUTPUT=VALUE`, as pairs of an output or None, and a value that was read.

    Those of a configuration file come first, so that the command line overrides them one by one.
    """

    def check(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> Any:
        configured = (ctx.default_map or {}).get(str(param.name), ())
        if ctx.get_parameter_source(str(param.name)) == ParameterSource.COMMANDLINE:
            values = (*map(str, configured), *values)
        pairs = []
        for value in values:
            output, assigned, text = value.rpartition("=")
            if assigned and not output:
                raise click.BadParameter(f"{value!r} names no output: write OUTPUT=VALUE")
            pairs.append((output or None, read(text)))
        return tuple(pairs)

    return check


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a number") from error
    if not (math.isfinite(value) and value > 0):
        raise click.BadParameter(f"impossible tolerance {text}: give a number above 0")
    return value


def _metric(text: str) -> str:
    if text not in get_args(Metric):
        raise click.BadParameter(f"{text!r} is not one of {', '.join(map(repr, get_args(Metric)))}")
    return text


def options_from(values: Mapping[str, Any], **further: Any) -> Options:
    """The options that the values of the command line make."""
    given = dict(values)
    common: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    for name in ("metric", "tolerance"):
        for output, value in given.pop(name):
            (common if output is None else own.setdefault(output, {}))[name] = value
    limits: tuple[OwnLimit, ...] = tuple(
        (output, limit.get("metric"), limit.get("tolerance")) for output, limit in own.items()
    )
    if limits and given["evaluate"] is not None:
        raise click.UsageError(
            "--evaluate judges by one score: leave out the --metric and --tolerance of single outputs"
        )
    return Options(**given, **common, limits=limits, **further)


def _writes(
    _ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[float, Path], ...]:
    """RATIO=OUT.onnx, as often as is wanted."""
    found = []
    for value in values:
        text, assigned, path = value.partition("=")
        if not (assigned and path):
            raise click.BadParameter(f"{value!r} names no file: write RATIO=OUT.onnx, as in 0.5=half.onnx")
        try:
            ratio = float(text)
        except ValueError as error:
            raise click.BadParameter(f"{text!r} is not a number: write RATIO=OUT.onnx") from error
        if not 0 < ratio <= 1:
            raise click.BadParameter(f"impossible ratio {text}: give a number above 0 and up to 1")
        found.append((ratio, Path(path)))
    return tuple(found)


def _shapes(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> tuple[Shape, ...]:
    """NAME:DIMS, several inputs of one run joined by +, several runs by commas or given one after another."""
    return tuple(
        tuple(_dims(each) for each in setting.split("+")) for value in values for setting in value.split(",")
    )


def _dims(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, dims = text.rpartition(":")
    if not name or not re.fullmatch(r"[1-9]\d{0,8}(x[1-9]\d{0,8})*", dims):
        raise click.BadParameter(f"{text!r} is no shape: write INPUT:DIMS, as in x:32x128")
    return name, tuple(map(int, dims.split("x")))


def _script(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """SCRIPT.py:function; whether there is such a function shows when it is loaded."""
    if value is None:
        return None
    path, _, function = value.rpartition(":")
    if not path or not function.isidentifier():
        raise click.BadParameter(f"{value!r} names no function: write SCRIPT.py:function")
    _existing(_ctx, _param, Path(path))
    return value


def _regex(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    try:
        re.compile(value or "")
    except re.error as error:
        raise click.BadParameter(f"{value!r} is not a regular expression: {error}") from error
    return value


def _existing(_ctx: click.Context, _param: click.Parameter, value: Path | None) -> Path | None:
    try:
        missing = value is not None and not value.exists()
    except OSError as error:  # such as a name that is too long
        raise InputError(f"{value}: can't be read: {error.strerror}: check the path") from error
    if missing:
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
    defaults = (_default(ctx, path, key, value) for key, value in values.items())
    ctx.default_map = dict(each for each in defaults if each is not None)
    return path


def _default(ctx: click.Context, path: Path, key: str, value: Any) -> tuple[str, Any] | None:
    """The option of a key and its default; None where only another command has such an option."""
    flag = f"--{key.replace('_', '-')}"
    for param in ctx.command.params:
        if not isinstance(param, click.Option) or param.name in (None, "config"):
            continue
        if flag in param.opts or flag in param.secondary_opts:
            if param.name in COMMAND_LINE_ONLY:
                raise click.BadParameter(f"{path}: {key} runs code: give {flag} on the command line instead")
            listed = value if param.multiple and isinstance(value, list) else [value]
            if not all(_fits(item, param) for item in listed):
                kind = "true or false" if param.is_flag else "a number or a text"
                kind += ", or a list of them" if param.multiple else ""
                raise click.BadParameter(f"{path}: {key}: {value!r} has to be {kind}")
            if param.multiple:
                return str(param.name), [str(item) for item in listed]
            if param.is_flag:
                return str(param.name), (not value if flag in param.secondary_opts else value)
            return str(param.name), str(value)  # as on the command line: a number may be the name of a file
    if flag in _flags_elsewhere(ctx):
        return None
    raise click.BadParameter(
        f"{path}: unknown key {key!r}: keys are the names of options, as in min-speedup = 1.1"
    )


def _flags_elsewhere(ctx: click.Context) -> set[str]:
    """What the other commands that read such files take there: one file may serve them all."""
    group = ctx.parent.command if ctx.parent is not None else None
    others = group.commands.values() if isinstance(group, click.Group) else ()
    configured = [other for other in others if any(param.name == "config" for param in other.params)]
    return {
        flag
        for other in configured
        for param in other.params
        if isinstance(param, click.Option) and param.name not in {"config", *COMMAND_LINE_ONLY}
        for flag in (*param.opts, *param.secondary_opts)
    }


def _fits(item: Any, param: click.Option) -> bool:
    """Whether a value of a configuration file is of a kind that the option takes."""
    if isinstance(item, bool) or param.is_flag:
        return isinstance(item, bool) and param.is_flag
    return isinstance(item, str) or (isinstance(item, int | float) and abs(item) <= LARGEST)


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

model_options = _chain(
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
        metavar="[OUTPUT=]X",
        multiple=True,
        callback=_limits(_tolerance),
        help=f"Largest change of any output, or of one.  [default: {Options.tolerance:g}]",
    ),
    click.option(
        "--metric",
        metavar="[OUTPUT=]NAME",
        multiple=True,
        callback=_limits(_metric),
        help=f"What the tolerance is about: {', '.join(get_args(Metric))}.  [default: {Options.metric}]",
    ),
    click.option(
        "--evaluate",
        metavar="SCRIPT.py:FUNCTION",
        callback=_script,
        help="Run your own score; the tolerance is its largest drop.",
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
        "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything random."
    ),
    click.option(
        "--include", metavar="REGEX", callback=_regex, help="Only nodes or weights whose name matches."
    ),
    click.option(
        "--exclude", metavar="REGEX", callback=_regex, help="No nodes or weights whose name matches."
    ),
    click.option("--force", is_flag=True, help="Compile a model that is compiled already."),
    click.option(
        "--jobs",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Processes that matrices are spread over.",
    ),
    click.option("--scheduler", metavar="ADDRESS", help="Dask cluster to spread them over instead."),
    click.option(
        "--cost",
        metavar="FILE.json",
        type=FILE,
        callback=_existing,
        help="Cost model of your machine, made by bench --calibrate.",
    ),
)
"""What a model is looked at with, whatever is made of it."""

shape_option = click.option(
    "--shape",
    "shapes",
    metavar="INPUT:DIMS,…",
    multiple=True,
    callback=_shapes,
    help="Shapes that must not get slower, as x:1x128,x:32x128; inputs of one run joined by +.",
)

cuda_graph_option = click.option(
    "--cuda-graph", is_flag=True, help="On CUDA, time runs that start all kernels at once."
)

compile_options = _chain(
    model_options,
    shape_option,
    cuda_graph_option,
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
        "--search/--no-search",
        default=True,
        help="Look for units and ranks to leave out; slow for wide matrices.  [default: on]",
    ),
    click.option("--replay", type=FILE, callback=_existing, help="Keep exactly what this report kept."),
    click.option("--require-change", is_flag=True, help="Fail if nothing was kept."),
    click.option("--dry-run", is_flag=True, help="Do everything except writing OUT."),
)

show_options = _chain(
    click.option("--quiet", "-q", is_flag=True, help="Only warnings and the verdict."),
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

output_options = _chain(
    click.option("--report", "report_path", type=FILE, help="Write the report as JSON."),
    click.option("--html", "html_path", type=FILE, help="Write the report as one HTML page."),
    click.option("--verbose", "-v", is_flag=True, help="List every node, however many."),
    show_options,
)

json_option = click.option(
    "--json",
    "json_path",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="Write everything as JSON; - is stdout.",
)

frontier_options = _chain(
    model_options,
    click.option(
        "--points",
        type=click.IntRange(1, 100),
        default=8,
        show_default=True,
        help="Sizes to look at, down to a twentieth.",
    ),
    click.option(
        "--write",
        "writes",
        metavar="RATIO=OUT.onnx",
        multiple=True,
        callback=_writes,
        help="Write the plan's model at this share of the cost.",
    ),
    json_option,
    click.option("--picture", metavar="FILE.svg", type=FILE, help="Draw it."),
    click.option("--latency", is_flag=True, help="Measure how fast each point of the plan is."),
    show_options,
)

bench_options = _chain(
    shape_option,
    click.option(
        "--calib", type=FILE_OR_FOLDER, callback=_existing, help="Samples to run, instead of made-up ones."
    ),
    click.option(
        "--provider",
        type=click.Choice(get_args(Provider)),
        default="auto",
        show_default=True,
        help="Where both models run.",
    ),
    click.option("--threads", type=click.IntRange(min=1), help="Of one operator.  [default: ONNX Runtime's]"),
    click.option(
        "--seconds",
        type=click.FloatRange(0.01, 3600),
        default=2.0,
        show_default=True,
        help="Time for each shape.",
    ),
    click.option(
        "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of made-up inputs."
    ),
    click.option(
        "--calibrate", metavar="FILE.json", type=FILE, help="Fit the cost model to this machine, for --cost."
    ),
    click.option(
        "--dtype",
        type=click.Choice(("float32", "float16", "bfloat16")),
        default="float32",
        show_default=True,
        help="Of the products that --calibrate times.",
    ),
    cuda_graph_option,
    json_option,
    debug_option,
)
