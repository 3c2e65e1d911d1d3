"""The command: what it accepts, what it prints where, and what it returns."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pytest

from onnx_decomp import cli, errors
from onnx_decomp.options import Options
from onnx_decomp.progress import Progress, Silent
from tests.test_report import build_report

Capture = pytest.CaptureFixture[str]


@dataclass
class FakeCompiler:
    """Stands in for `onnx_decomp.compiler`: notes what it is asked for, and answers or fails as told."""

    changed: bool = True
    failure: BaseException | None = None
    report: dict[str, Any] = field(default_factory=build_report)
    asked: list[tuple[Path, Path | None, Options]] = field(default_factory=list)

    def compile_file(self, path: Path, out: Path | None, options: Options, progress: Progress) -> Any:
        self.asked.append((path, out, options))
        progress.stage("planning")
        progress.advance(1, 2)
        if self.failure is not None:
            raise self.failure
        return types.SimpleNamespace(model=None, report=self.report, changed=self.changed)

    @property
    def options(self) -> Options:
        return self.asked[-1][2]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    fake = FakeCompiler()
    monkeypatch.setitem(sys.modules, "onnx_decomp.compiler", fake)
    return fake


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "in.onnx"
    path.write_bytes(b"a model")
    return str(path)


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "out.onnx")


def error_line(capsys: Capture) -> str:
    """The one line of a failure; stdout has to be empty."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("onnx-decomp: error: ")
    return lines[0]


def test_help_is_fast_and_lists_options_and_commands() -> None:
    probe = "import sys; from onnx_decomp.cli import main; main(['--help']); print(sorted(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert "--tolerance" in shown
    assert "explain" in shown
    for heavy in ("numpy", "onnx", "onnxruntime", "scipy", "rich", "jinja2"):
        assert f"'{heavy}'" not in shown, f"--help imports {heavy}"


def test_the_documentation_has_every_option() -> None:
    text = (Path(__file__).parent.parent / "docs" / "command.md").read_text(encoding="utf-8")
    for param in cli.compile_command.params:
        if isinstance(param, click.Option):
            assert f"`{(param.secondary_opts or param.opts)[0]}" in text, param.name


def test_compile_is_the_default_command(
    compiler: FakeCompiler, model: str, out: str, capsys: Capture
) -> None:
    assert cli.main([model, out]) == 0
    assert compiler.asked == [(Path(model), Path(out), Options())]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == f"onnx-decomp: {compiler.report['verdict']}"
    assert "fc1" in captured.err


def test_options_may_come_first_and_reach_the_compiler(
    compiler: FakeCompiler, model: str, out: str, tmp_path: Path
) -> None:
    arguments = [
        "--seed",
        "7",
        "--provider",
        "cpu",
        "--no-latency-gate",
        "--tolerance",
        "1e-4",
        "--threads",
        "1",
    ]
    arguments += ["--metric", "top1", "--objective", "bytes", "--min-speedup", "1.2", "--include", "fc.*"]
    arguments += ["--exclude", "head", "--require-change", "--force", "--jobs", "2", "--calib", str(tmp_path)]
    arguments += ["--no-search", "--scheduler", "tcp://here:1"]
    assert cli.main([*arguments, "--init-preset", "bert", model, out]) == 0
    assert compiler.options == Options(
        init_preset="bert", calib=tmp_path, tolerance=1e-4, metric="top1", objective="bytes", provider="cpu",
        threads=1, latency_gate=False, min_speedup=1.2, seed=7, include="fc.*", exclude="head",
        require_change=True, force=True, jobs=2, search=False, scheduler="tcp://here:1",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tolerance", "0"], "impossible tolerance"),
        (["--tolerance", "nan"], "impossible tolerance"),
        (["--tolerance", "inf"], "impossible tolerance"),
        (["--tolerance", "-1"], "impossible tolerance"),
        (["--tolerance", "small"], "--tolerance"),
        (["--min-speedup", "0"], "impossible speedup"),
        (["--include", "("], "not a regular expression"),
        (["--exclude", "["], "not a regular expression"),
        (["--provider", "tpu"], "'cpu', 'cuda', 'auto'"),
        (["--tolerance", "y=0"], "impossible tolerance"),
        (["--tolerance", "0.1", "--tolerance", "y=nan"], "impossible tolerance"),
        (["--tolerance", "=0.1"], "names no output"),
        (["--tolerance", "y="], "not a number"),
        (["--metric", "l7"], "'rel-l2'"),
        (["--metric", "y=l7"], "'rel-l2'"),
        (["--metric", "=kl"], "names no output"),
        (["--evaluate", "score.py"], "SCRIPT.py:function"),
        (["--evaluate", "score.py:"], "SCRIPT.py:function"),
        (["--evaluate", ":score"], "SCRIPT.py:function"),
        (["--evaluate", f"{__file__}:score", "--tolerance", "y=0.1"], "one score"),
        (["--jobs", "0"], "--jobs"),
        (["--threads", "0"], "--threads"),
        (["--seed", "-1"], "--seed"),
        (["--no-such-option"], "--no-such-option"),
        (["--report", "no/such/folder/r.json"], "does not exist"),
        (["--html", "no/such/folder/r.html"], "does not exist"),
        (["--config", "no-such.toml"], "no-such.toml"),
    ],
)
def test_usage_errors_come_before_any_work(
    compiler: FakeCompiler, model: str, out: str, capsys: Capture, arguments: list[str], says: str
) -> None:
    assert cli.main([model, out, *arguments]) == 2
    assert says in error_line(capsys)
    assert compiler.asked == []


def test_an_output_stands_for_no_other_file(
    compiler: FakeCompiler, model: str, out: str, tmp_path: Path, capsys: Capture
) -> None:
    link = tmp_path / "link.onnx"
    link.symlink_to(model)
    for arguments in (
        [model, model],
        [model, str(link)],
        [model, out, "--report", model],
        [model, out, "--report", out],
        [model, out, "--html", str(tmp_path)],
        [model, str(tmp_path / "no" / "out.onnx")],
        [model],
        [],
    ):
        assert cli.main(arguments) == 2
        error_line(capsys)
    assert compiler.asked == []


def test_outputs_have_their_own_metric_and_tolerance(compiler: FakeCompiler, model: str, out: str) -> None:
    arguments = ["--metric", "kl", "--metric", "a=b=cosine", "--tolerance", "0.01", "--tolerance", "c=0.002"]
    assert cli.main([model, out, *arguments, "--tolerance", "a=b=3", "--tolerance", "a=b=0.5"]) == 0
    limits = (("a=b", "cosine", 0.5), ("c", None, 0.002))
    assert compiler.options == Options(metric="kl", tolerance=0.01, limits=limits)


def test_a_configured_tolerance_stands_where_the_command_line_names_another_output(
    compiler: FakeCompiler, model: str, out: str, tmp_path: Path
) -> None:
    config = tmp_path / "decomp.toml"
    config.write_text('tolerance = [1e-5, "a=0.1", "b=0.2"]\nmetric = "kl"\n')
    assert cli.main([model, out, "--config", str(config)]) == 0
    limits = (("a", None, 0.1), ("b", None, 0.2))
    assert compiler.options == Options(metric="kl", tolerance=1e-5, limits=limits)
    assert cli.main([model, out, "--config", str(config), "--tolerance", "a=0.5"]) == 0
    limits = (("a", None, 0.5), ("b", None, 0.2))
    assert compiler.options == Options(metric="kl", tolerance=1e-5, limits=limits)


def test_a_script_is_only_named_here(compiler: FakeCompiler, model: str, out: str, tmp_path: Path) -> None:
    script = tmp_path / "score.py"
    script.write_text("raise SystemExit('it was run')\n")
    assert cli.main([model, out, "--evaluate", f"{script}:score", "--tolerance", "0.02"]) == 0
    assert compiler.options == Options(evaluate=f"{script}:score", tolerance=0.02)


@pytest.mark.parametrize("option", ["--init", "--calib", "--replay"])
def test_missing_data_is_bad_input(
    compiler: FakeCompiler, model: str, out: str, capsys: Capture, option: str
) -> None:
    assert cli.main([model, out, option, "no-such-file"]) == 3
    assert "no-such-file" in error_line(capsys)
    assert compiler.asked == []


@pytest.mark.parametrize(
    ("failure", "code", "says"),
    [
        (errors.InputError("m.onnx: broken"), 3, "m.onnx: broken"),
        (errors.RequireChangeError("nothing was kept"), 4, "nothing was kept"),
        (errors.CannotVerifyError("gives NaN"), 5, "gives NaN"),
        (errors.ProviderError("no CUDA"), 7, "no CUDA"),
        (errors.InternalError("does not hold"), 1, "does not hold"),
        (errors.InputError("two\nlines \x1b[31m"), 3, "two lines \\x1b[31m"),
        (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero; --debug"),
        (OSError(28, "No space left on device"), 1, "No space left"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_failure_is_one_line_and_its_code(
    compiler: FakeCompiler,
    model: str,
    out: str,
    capsys: Capture,
    failure: BaseException,
    code: int,
    says: str,
) -> None:
    compiler.failure = failure
    assert cli.main([model, out]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err.strip().splitlines()[-1]
    assert "Traceback" not in captured.err
    assert "\x1b" not in captured.err


def test_debug_shows_the_traceback(compiler: FakeCompiler, model: str, out: str, capsys: Capture) -> None:
    compiler.failure = errors.InputError("m.onnx: broken")
    assert cli.main([model, out, "--debug"]) == 3
    captured = capsys.readouterr().err
    assert "Traceback" in captured
    assert captured.splitlines()[-1] == "onnx-decomp: error: m.onnx: broken"


def test_require_change_writes_the_report_before_it_fails(
    compiler: FakeCompiler, model: str, out: str, tmp_path: Path, capsys: Capture
) -> None:
    compiler.changed = False
    assert cli.main([model, out, "--require-change", "-q", "--report", str(tmp_path / "r.json")]) == 4
    assert (tmp_path / "r.json").exists()
    assert "--require-change" in capsys.readouterr().err.splitlines()[-1]


def test_config_gives_defaults_that_the_command_line_overrides(
    compiler: FakeCompiler, model: str, out: str, tmp_path: Path
) -> None:
    config = tmp_path / "decomp.toml"
    config.write_text(
        'tolerance = 0.01\nseed = 3\nprovider = "cpu"\nno-latency-gate = true\nrequire_change = true\n'
    )
    assert cli.main([model, out, "--config", str(config), "--seed", "4"]) == 0
    expected = Options(tolerance=0.01, seed=4, provider="cpu", latency_gate=False, require_change=True)
    assert compiler.options == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tolerence = 0.01", "tolerence"),
        ("tolerance = [[1]]", "tolerance"),
        ("tolerance = [true]", "tolerance"),
        ("tolerance = [0.1, 'y=0']", "impossible tolerance"),
        ("metric = ['kl', 'y=l7']", "'l7'"),
        ("min-speedup = [1.0]", "min-speedup"),
        ("tolerance = -1", "impossible tolerance"),
        ("seed = true", "seed"),
        ("force = 1", "true or false"),
        ("config = 'other.toml'", "config"),
        ("tolerance =", "not a readable TOML file"),
    ],
)
def test_a_wrong_config_is_a_usage_error(
    compiler: FakeCompiler, model: str, out: str, tmp_path: Path, capsys: Capture, text: str, says: str
) -> None:
    config = tmp_path / "decomp.toml"
    config.write_text(text)
    assert cli.main([model, out, "--config", str(config)]) == 2
    assert says in error_line(capsys)
    assert compiler.asked == []


def test_quiet_prints_only_warnings_and_the_verdict(
    compiler: FakeCompiler, model: str, out: str, capsys: Capture
) -> None:
    compiler.report["warnings"] = ["beware \x1b[2J"]
    assert cli.main([model, out, "-q"]) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "onnx-decomp: warning: beware \\x1b[2J",
        f"onnx-decomp: {compiler.report['verdict']}",
    ]
    assert captured.out == ""


def test_dry_run_needs_no_output_and_still_writes_reports(
    compiler: FakeCompiler, model: str, tmp_path: Path
) -> None:
    report, page = tmp_path / "r.json", tmp_path / "r.html"
    assert cli.main([model, "--dry-run", "--report", str(report), "--html", str(page)]) == 0
    assert compiler.asked[0][1] is None
    assert json.loads(report.read_text())["schema"] == "onnx-decomp/1"
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert {path.name for path in tmp_path.iterdir()} == {"in.onnx", "r.json", "r.html"}


def test_bars_only_on_a_terminal(
    compiler: FakeCompiler, model: str, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main([model, out]) == 0
    assert not compiler.options.progress
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main([model, out]) == 0
    assert compiler.options.progress
    assert cli.main([model, out, "--no-progress"]) == 0
    assert not compiler.options.progress


def test_progress_is_optional() -> None:
    for progress in (Silent(), cli.Bars()):
        progress.stage("planning [bold]\x1b")
        progress.advance(1, 3)


def test_warnings_of_libraries_stay_out_of_sight() -> None:
    program = (
        "import warnings, onnx_decomp.cli as cli; cli._check_files = lambda *_: warnings.warn('numpy'); "
    )
    program += "cli.main(['a.onnx', 'b.onnx'])"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stderr
    assert "numpy" not in shown
    assert "a.onnx" in shown


def test_explain_prints_the_story_of_a_node(compiler: FakeCompiler, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(compiler.report))
    assert cli.main(["explain", str(path), "fc1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2 blocks" in captured.err
    assert cli.main(["explain", str(path), "fc1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"][0]["node"] == "fc1"
    assert cli.main(["explain", str(path), "fc9"]) == 2
    assert "fc9" in error_line(capsys)
    path.write_text("{}")
    assert cli.main(["explain", str(path), "fc1"]) == 3
    assert "schema" in error_line(capsys)


def test_inspect_lists_sites_and_regions(tmp_path: Path, capsys: Capture) -> None:
    import onnx

    from tests.test_report import make_model

    path = tmp_path / "m.onnx"
    onnx.save(make_model(), path)
    assert cli.main(["inspect", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "fc1" in captured.err
    assert cli.main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["regions"][0]["nodes"] == ["fc1", "fc2"]
    assert found["sites"][2]["obstacle"] == "weight-type"
