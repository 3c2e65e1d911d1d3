"""The command: parse, call, print, exit code.

Everything heavy is imported where it is used, so that `--help` is fast.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnx_decomp.errors import DecompError, RequireChangeError, UsageError
from onnx_decomp.flags import (
    FILE,
    Console,
    bench_options,
    compile_options,
    debug_option,
    frontier_options,
    options_from,
    output_options,
)
from onnx_decomp.interruption import interrupted, interruptible
from onnx_decomp.progress import Progress, Silent
from onnx_decomp.terminal import brief, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from onnx_decomp.frontiers import Frontier
    from onnx_decomp.model_io import ModelFile
    from onnx_decomp.options import Options, Provider

NAME = "onnx-decomp"
EXIT_INTERNAL, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
LISTED = 40
"""Models with more sites than this have the untouched ones counted, not listed, unless -v asks for them."""


class CompileByDefault(click.Group):
    """A first argument that names no subcommand means `compile`; the help is that of `compile` too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in {*self.commands, "--help", "-h", "--version"}:
            args = ["compile", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "IN.onnx OUT.onnx [OPTIONS]")
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS] [OPTIONS]")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.commands["compile"].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; every failure is one line on stderr."""
    console = Console()
    given = None if arguments is None else list(arguments)
    try:
        with interruptible(), warnings.catch_warnings():
            if not sys.warnoptions:  # libraries' warnings are for developers, who ask for them with -W
                warnings.simplefilter("ignore")
            code = command.main(given, prog_name=NAME, standalone_mode=False, obj=console)
    except click.ClickException as error:
        return _fail(console, error.format_message(), EXIT_USAGE)
    except DecompError as error:
        return _fail(console, str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail(console, "interrupted", EXIT_INTERRUPTED)
    except OSError as error:
        return _fail(console, str(error), EXIT_INTERNAL)
    except Exception as error:
        message = f"internal error, a bug in {NAME}: {type(error).__name__}: {error}; --debug shows where"
        return _fail(console, message, EXIT_INTERNAL)
    return code if isinstance(code, int) else 0


def _fail(console: Console, message: str, code: int) -> int:
    if interrupted():
        message, code = "interrupted", EXIT_INTERRUPTED
    if console.debug:
        traceback.print_exc()
    _say(f"error: {brief(' '.join(message.split()))}")
    return code


def _say(message: str) -> None:
    print(f"{NAME}: {printable(message)}", file=sys.stderr)


def _show(renderable: RenderableType) -> None:
    from rich.console import Console as Terminal

    Terminal(stderr=True, highlight=False).print(renderable)


class Bars:
    """Progress on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Display

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
        )
        self.display = Display(*columns, console=Terminal(stderr=True), transient=True)
        self._task = self.display.add_task("", total=None)

    def stage(self, name: str) -> None:
        self.display.reset(self._task, description=printable(name), total=None)

    def advance(self, done: int, total: int) -> None:
        self.display.update(self._task, completed=done, total=total)


@contextmanager
def _watching(wanted: bool) -> Iterator[Progress]:
    if not wanted:
        yield Silent()
        return
    bars = Bars()
    with bars.display:
        yield bars


@click.group(NAME, cls=CompileByDefault, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name=NAME, prog_name=NAME)
def command() -> None:
    """Write a trained ONNX model as smaller parallel blocks, verified and never slower."""


@command.command("compile", hidden=True)
@click.argument("source", metavar="IN.onnx", type=FILE)
@click.argument("out", metavar="OUT.onnx", type=FILE, required=False)
@compile_options
@output_options
def compile_command(
    source: Path,
    out: Path | None,
    report_path: Path | None,
    html_path: Path | None,
    quiet: bool,
    verbose: bool,
    no_progress: bool,
    **values: Any,
) -> None:
    """Decompose IN.onnx into OUT.onnx."""
    bars = sys.stderr.isatty() and not (quiet or no_progress)
    options = options_from(values, progress=bars)
    if out is None and not options.dry_run:
        raise click.UsageError("Missing argument 'OUT.onnx': name the file to write, or try --dry-run")
    _check_files(_inputs(source, options), {"OUT": out, "--report": report_path, "--html": html_path})

    from onnx_decomp.compiler import compile_file

    with _watching(bars) as progress:
        result = compile_file(source, out, options, progress)
    _write_reports(result.report, report_path, html_path)
    _print_result(result.report, quiet, verbose)
    if options.require_change and not result.changed:
        raise RequireChangeError("nothing was kept, and --require-change asks for more; the report says why")


def _inputs(source: Path, options: Options) -> dict[str, Path | None]:
    """The files that a command reads, by what they are given as."""
    return {
        "IN": source,
        "--init": options.init,
        "--calib": options.calib,
        "--replay": options.replay,
        "--cost": options.cost,
        "--evaluate": Path(options.evaluate.rpartition(":")[0]) if options.evaluate else None,
    }


def _check_files(inputs: Mapping[str, Path | None], outputs: Mapping[str, Path | None]) -> None:
    """Before any work: every output can be written, none stands for an input or for another output."""
    taken = {path.resolve(): name for name, path in inputs.items() if path is not None}
    for name, path in outputs.items():
        if path is None:
            continue
        try:
            _check_place(name, path)
        except OSError as error:  # such as a name that is too long
            raise UsageError(f"{name}: {path}: {error.strerror}: choose another") from error
        place = path.resolve()
        if place in taken:
            raise UsageError(f"{name}: {path} is the file given as {taken[place]}: choose another")
        taken[place] = name


def _check_place(name: str, path: Path) -> None:
    if not path.parent.is_dir():
        raise UsageError(f"{name}: the folder of {path} does not exist: create it or choose another")
    if path.exists() and not path.is_file():
        raise UsageError(f"{name}: {path} is a folder or a device, not a file: name a file")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{name}: the folder of {path} is read-only: choose another")


def _write_reports(report: dict[str, Any], report_path: Path | None, html_path: Path | None) -> None:
    from onnx_decomp.rendering import render_html
    from onnx_decomp.report import to_json, write

    if report_path is not None:
        write(report_path, to_json(report))
    if html_path is not None:
        write(html_path, render_html(report))


def _print_result(report: dict[str, Any], quiet: bool, verbose: bool) -> None:
    from onnx_decomp.rendering import render_table

    if not quiet:
        _show(render_table(report, every_site=verbose or len(report["sites"]) <= LISTED))
    for warning in report["warnings"]:
        _say(f"warning: {warning}")
    _say(report["verdict"])


@command.command("frontier")
@click.argument("source", metavar="IN.onnx", type=FILE)
@frontier_options
def frontier_command(
    source: Path,
    points: int,
    writes: tuple[tuple[float, Path], ...],
    json_path: Path | None,
    picture: Path | None,
    latency: bool,
    quiet: bool,
    no_progress: bool,
    **values: Any,
) -> None:
    """Show what every size of IN.onnx would cost and change, beside plain ways to make it smaller."""
    bars = sys.stderr.isatty() and not (quiet or no_progress)
    options = options_from(values, progress=bars)
    piped = str(json_path) == "-"
    outputs = {f"--write {ratio:g}={path}": path for ratio, path in writes}
    if len(outputs) < len(writes):
        raise UsageError("--write: the same ratio and file are given twice")
    more = {"--json": None if piped else json_path, "--picture": picture}
    _check_files(_inputs(source, options), {**outputs, **more})
    if options.calib is None:
        raise UsageError(
            "--calib is missing: a frontier is measured on samples, an .npz of input name -> array"
        )

    from onnx_decomp import model_io
    from onnx_decomp.charts import draw
    from onnx_decomp.frontiers import evenly, trace_frontier
    from onnx_decomp.report import to_json, write

    loaded = model_io.load(source)
    ratios = (*evenly(points), *(ratio for ratio, _ in writes))
    with _watching(bars) as progress:
        found = trace_frontier(loaded, options, ratios, latency=latency, progress=progress)
    written = _write_points(found, loaded, writes)
    report = found.report()
    if json_path is not None and not piped:
        write(json_path, to_json(report))
    if picture is not None:
        write(picture, draw(report))
    _print_frontier(report, quiet, written)
    if piped:
        click.echo(to_json(report), nl=False)


def _write_points(found: Frontier, source: ModelFile, writes: Sequence[tuple[float, Path]]) -> list[str]:
    """The models that were asked for, and a line on each."""
    from onnx_decomp import saving

    lines = []
    for ratio, path in writes:
        point = found.nearest(ratio)
        model = found.write(point)
        if model is source.proto:
            saving.copy(source, path)
        else:
            saving.save(model, source, path)
        short = "" if point.asked <= ratio else f" ({ratio:g} was asked for, and there is none so small)"
        lines.append(f"wrote {path}: cost {point.cost:.3g}, change {point.change:.3g}{short}")
    return lines


def _print_frontier(report: dict[str, Any], quiet: bool, written: Sequence[str]) -> None:
    from onnx_decomp.rendering import render_frontier

    if not quiet:
        _show(render_frontier(report))
    for warning in report["warnings"]:
        _say(f"warning: {warning}")
    for line in [*written, report["verdict"]]:
        _say(line)


@command.command()
@click.argument("report", metavar="REPORT.json", type=FILE)
@click.argument("node")
@click.option("--json", "as_json", is_flag=True, help="Print the report's entries on stdout.")
@debug_option
def explain(report: Path, node: str, as_json: bool) -> None:
    """Say what a report found at NODE (a node or a weight), what was decided, and why."""
    from onnx_decomp.rendering import called, describe_site
    from onnx_decomp.report import read, reading, to_json

    with reading(report):
        sites = [site for site in read(report)["sites"] if node in called(site)]
        lines = [line for site in sites for line in describe_site(site)]
        shown = to_json({"sites": sites}) if as_json else "\n".join(lines)
    if not sites:
        raise UsageError(
            f"{report}: nothing in it is called {node!r}: give the name of a MatMul, a Gemm or a weight"
        )
    if as_json:
        click.echo(shown, nl=False)
    else:
        print(shown, file=sys.stderr)


@command.command()
@click.argument("source", metavar="IN.onnx", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print the list on stdout.")
@debug_option
def inspect(source: Path, as_json: bool) -> None:
    """List the constant matrices of a model, the regions that they form, and what stands in the way."""
    from onnx_decomp.inspection import inspect_model, render_inspection
    from onnx_decomp.report import to_json

    found = inspect_model(source)
    if as_json:
        click.echo(to_json(found), nl=False)
    else:
        _show(render_inspection(found))


@command.command()
@click.argument("before", metavar="A.onnx", type=FILE, required=False)
@click.argument("after", metavar="B.onnx", type=FILE, required=False)
@bench_options
def bench(
    before: Path | None,
    after: Path | None,
    json_path: Path | None,
    calibrate: Path | None,
    dtype: str,
    **values: Any,
) -> None:
    """Compare two models: speed in turns, memory, operators, and how far their outputs are apart.

    With --calibrate FILE.json and no models: fit the cost model to this machine.
    """
    if calibrate is not None:
        if before is not None:
            raise UsageError("--calibrate takes no models: it makes its own")
        _calibrate(calibrate, values["provider"], dtype, values["threads"])
        return
    if before is None or after is None:
        raise click.UsageError(
            "Missing argument: name two models, A.onnx B.onnx, or try --calibrate FILE.json"
        )
    piped = str(json_path) == "-"
    _check_files({"A": before, "B": after}, {"--json": None if piped else json_path})

    from onnx_decomp.benching import Asked, bench_models, render_bench, verdict
    from onnx_decomp.report import to_json, write

    found = bench_models(before, after, Asked(**values))
    if json_path is not None and not piped:
        write(json_path, to_json(found))
    _show(render_bench(found))
    _say(verdict(found))
    if piped:
        click.echo(to_json(found), nl=False)


def _calibrate(path: Path, asked: Provider, dtype: str, threads: int | None) -> None:
    _check_files({}, {"--calibrate": path})

    from onnx_decomp.calibrating import calibrate
    from onnx_decomp.report import to_json, write
    from onnx_decomp.runtime import resolve_provider

    with _watching(sys.stderr.isatty()) as progress:
        found = calibrate(resolve_provider(asked), dtype, threads, progress=progress)
    write(path, to_json(found))
    before, after = (found["median_error"][when] for when in ("before", "after"))
    _say(f"median error of predicted times {after:.0%} (was {before:.0%}), on cases that were not fitted")
    _say(f"wrote {path}: give it to --cost")


if __name__ == "__main__":
    sys.exit(main())
