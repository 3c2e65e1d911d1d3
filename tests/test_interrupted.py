"""Interrupted, killed, or out of disk: nothing is lost, nothing is left behind, and the code says what happened."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.large import Large, calibration
from models.large import write as write_large
from onnx_decomp import compiler, model_io, saving, scratch
from onnx_decomp.cli import main
from onnx_decomp.passes.annealing import Annealing
from onnx_decomp.passes.splitting import Splitting
from tests.small import write
from tests.test_hostile_models import endless
from tests.workplace import (
    INPUT,
    INTERRUPTED,
    USAGE,
    Capture,
    Workplace,
    arguments,
    check_refused,
    contents,
    make_place,
)


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return make_place(tmp_path)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing a file beyond this many bytes fails, as on a full disk."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (Annealing, "run"),
        (Splitting, "run"),
        (compiler.verify, "verify"),
        (saving, "serialize"),
        (saving, "_sync"),
        (saving.os, "replace"),
    ],
    ids=lambda item: getattr(item, "__name__", item),
)
def test_interrupted(
    where: Any, name: str, place: Workplace, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of a pass, of measuring, of writing, and right before the output would appear."""
    monkeypatch.setattr(where, name, interrupt)
    line = [*arguments(place, []), "--objective", "flops", "--report", str(place.folder / "report.json")]
    check_refused(place, line, INTERRUPTED, "interrupted", capsys)


def test_a_full_disk(place: Workplace, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "_sync", full)
    check_refused(place, [*arguments(place, []), "--objective", "flops"], INPUT, "No space left", capsys)


# By signals


def test_terminated_in_the_middle(place: Workplace, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM is what `timeout`, a CI system or a container says."""

    def terminate(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Annealing, "run", terminate)
    check_refused(place, [*arguments(place, [])], INTERRUPTED, "interrupted", capsys)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_library_that_makes_something_else_of_it(
    place: Workplace, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy, while it is imported, turns any exception into an ImportError."""

    def terminate(*_: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(20)
        except KeyboardInterrupt:
            raise ImportError("failed to import") from None

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test in the background would ignore it
    monkeypatch.setattr(Annealing, "run", terminate)
    check_refused(place, [*arguments(place, [])], INTERRUPTED, "interrupted", capsys)
    monkeypatch.undo()
    assert main(["inspect", str(place.model)]) == 0  # forgotten


TELLING = """
import sys
from onnx_decomp import cli, runtime, trial
trial.attempt = lambda *_: None
run = runtime.Session.run
def told(*arguments, **more):
    print("running", flush=True)
    return run(*arguments, **more)
runtime.Session.run = told
sys.exit(cli.main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_while_onnx_runtime_computes(number: signal.Signals, tmp_path: Path) -> None:
    """In a Loop without end: Python alone would hear of it when the run returns, which is never."""
    write(endless(), tmp_path / "in.onnx")
    (tmp_path / "out.onnx").write_bytes(b"older")
    before = contents(tmp_path)
    line = ["in.onnx", "out.onnx", "--provider", "cpu", "--report", "r.json"]
    reset = partial(
        signal.signal, signal.SIGINT, signal.default_int_handler
    )  # pytest may be in the background
    with subprocess.Popen(
        [sys.executable, "-c", TELLING, *line],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=reset,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        time.sleep(0.2)
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
    assert process.returncode == INTERRUPTED
    assert said.strip() == "onnx-decomp: error: interrupted"
    assert contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.05 * step for step in range(6, 60, 3)])
def test_a_signal_at_any_time(seconds: float, place: Workplace) -> None:
    """Either it came too late and all is written, or nothing is."""
    before = contents(place.folder)
    line = [*arguments(place, []), "--provider", "cpu", "--objective", "flops"]
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; from onnx_decomp import cli; sys.exit(cli.main())", *line],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    ) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    if process.returncode == 0:
        assert set(contents(place.folder)) - set(before) == {"out.onnx"}
        return
    assert contents(place.folder) == before
    if "onnx-decomp" in said:  # else the signal came while Python itself was starting
        assert process.returncode == INTERRUPTED


# Killed, which no process can hear

PAUSING = """
import sys, time
from onnx_decomp import cli, saving, scratch
from onnx_decomp.passes.splitting import Splitting
saving.LARGE = 1000
scratch.kept.__defaults__ = (1,)
def pause(*_):
    print("there", flush=True)
    time.sleep(60)
{place} = pause
sys.exit(cli.main())
"""


def make_older(*folders: Path) -> None:
    """What has just been made may be about to be locked, and nobody else touches it."""
    for folder in folders:
        for path in folder.rglob("*"):
            os.utime(path, (0, 0))


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
@pytest.mark.parametrize("place", ["Splitting.run", "saving._sync"])
def test_killed(place: str, tmp_path: Path) -> None:
    """While arrays lie in files, and right before OUT would appear. The next run finds what is left, and removes it."""
    spec = Large(layers=2, width=64, blocks=4)
    model, out, temporary = write_large(spec, tmp_path / "in"), tmp_path / "out", tmp_path / "temporary"
    np.savez(tmp_path / "calib.npz", **calibration(spec, 100))  # type: ignore[arg-type]
    out.mkdir()
    temporary.mkdir()
    (out / "m.onnx").write_bytes(b"older")
    line = [str(model), str(out / "m.onnx"), "--calib", str(tmp_path / "calib.npz"), "--init-preset"]
    line += ["torch-linear", "--provider", "cpu", "--objective", "flops", "--no-latency-gate", "-q"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(temporary)}
    command = [sys.executable, "-c", PAUSING.format(place=place), *line]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        make_older(temporary, out)
        before = contents(out), contents(temporary)
        subprocess.run([sys.executable, "-c", OTHER, *map(str, (temporary, out))], check=True)
        assert (contents(out), contents(temporary)) == before  # it lives: another run leaves it alone
        process.kill()
    (left,) = (path for path in temporary.iterdir() if path.name != ".ses")  # ONNX Runtime's own
    assert left.name.startswith(scratch.FOLDER)
    assert {path.name for path in left.iterdir()} <= {"new.data"}
    assert (out / "m.onnx").read_bytes() == b"older"
    unfinished = [path.name for path in out.rglob("*") if path.name != "m.onnx"]
    assert all(name.startswith(scratch.BESIDE) for name in unfinished)
    assert bool(unfinished) == (place == "saving._sync")
    make_older(temporary, out)
    again = [sys.executable, "-c", "import sys; from onnx_decomp import cli; sys.exit(cli.main())", *line]
    subprocess.run(again, check=True, env=environment)
    assert {path.name for path in temporary.iterdir()} <= {".ses"}
    assert not list(out.rglob(f"{scratch.BESIDE}*"))
    assert model_io.load(out / "m.onnx").sha256 != model_io.load(model).sha256


OTHER = """
import sys
from pathlib import Path
from onnx_decomp import scratch
scratch.remove_abandoned(Path(sys.argv[1]), scratch.FOLDER)
scratch.remove_abandoned(Path(sys.argv[2]), scratch.BESIDE)
"""


# No room, no right


@pytest.mark.parametrize("existing", [False, True])
def test_the_disk_is_full_for_the_model(existing: bool, place: Workplace, capsys: Capture) -> None:
    """The file system itself refuses, in the middle of a file."""
    if existing:
        place.out.write_bytes(b"what an earlier run has written")
    with largest_file(4096):
        line = [*arguments(place, []), "--objective", "flops"]
        check_refused(place, line, INPUT, "out.onnx: can't be written: File too large", capsys)


@pytest.mark.parametrize("option", ["--report", "--html"])
def test_the_disk_is_full_for_a_report(option: str, place: Workplace, capsys: Capture) -> None:
    with largest_file(2048):
        line = [*arguments(place, []), "--dry-run", option, str(place.folder / "r")]
        check_refused(place, line, INPUT, "/r: can't be written: File too large", capsys)


def test_a_report_in_a_folder_that_is_read_only(
    place: Workplace, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before the work, not after it."""
    shut = place.folder / "shut"
    shut.mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != shut)  # root may write anywhere
    monkeypatch.setattr(model_io, "load", interrupt)
    for option in ("--report", "--html"):
        line = [*arguments(place, []), option, str(shut / "r")]
        check_refused(place, line, USAGE, "is read-only", capsys)
