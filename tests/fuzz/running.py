"""One case in a process of its own, within limits, so that a crash or a hang is known for what it is.

The process that forks never opens a session: ONNX Runtime's threads would not live on in its children.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from onnx_decomp import graph_index, guards, verify
from onnx_decomp.cli import main

DOCUMENTED = frozenset({0, 2, 3, 4, 5, 7})
"""Exit codes that a case may end with: 1 is a fault of ours, 130 nobody asked for."""

PATIENCE = 4
"""Seconds of a wall clock for each of the processor: the machine may be busy with something else."""

UNPREPARED = 99
MADE = frozenset({"out.onnx", "report.json", "report.html"})
"""What a case may leave behind if it ends well."""


@dataclass(frozen=True)
class Limits:
    """Of one case. seconds: of the processor. memory: bytes, resident."""

    seconds: float = 30.0
    memory: int = 1 << 30


@dataclass(frozen=True)
class Outcome:
    """How a case ended. faults: what is wrong with that, nothing if all is well."""

    code: int | str
    seconds: float
    memory: int
    faults: tuple[str, ...]


class Running:
    """A case under way."""

    def __init__(self, folder: Path, prepare: Callable[[Path], list[str]], limits: Limits) -> None:
        self.folder, self.limits = folder, limits
        self.work = folder / "work"
        self.work.mkdir(parents=True)
        self.started = time.monotonic()
        gc.disable()  # a session that is garbage here would wait, in the child, for threads that are not there
        self.pid = os.fork()
        if self.pid == 0:
            gc.freeze()
            gc.enable()
            os._exit(_child(folder, self.work, prepare, limits))
        gc.enable()

    def poll(self) -> Outcome | None:
        """The outcome once there is one; ends what takes too long."""
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        late = time.monotonic() - self.started > PATIENCE * self.limits.seconds
        if pid == 0 and not late:
            return None
        if pid == 0:
            os.kill(self.pid, signal.SIGKILL)
            _, status, usage = os.wait4(self.pid, 0)
        code: int | str = os.waitstatus_to_exitcode(status)
        if late or code == -signal.SIGXCPU:
            code = "hang"
        elif isinstance(code, int) and code < 0:
            code = signal.Signals(-code).name
        memory = usage.ru_maxrss * 1024
        faults = tuple(_faults(self.folder, self.work, code, memory, self.limits))
        return Outcome(code, time.monotonic() - self.started, memory, faults)


def _child(folder: Path, work: Path, prepare: Callable[[Path], list[str]], limits: Limits) -> int:
    """Never returns into the caller's code: its result is the exit code of the process."""
    faulthandler.disable()
    try:
        # First of all: a message that is copied into itself a few times takes more than any machine has.
        resource.setrlimit(resource.RLIMIT_AS, (4 * limits.memory, 4 * limits.memory))
        arguments = prepare(work)
        (folder / "command").write_text("\0".join(arguments), errors="surrogatepass")
        before = sorted(path.name for path in work.rglob("*"))
        (folder / "before").write_text("\n".join(before))
        os.chdir(work)
        for number, name in ((1, "stdout"), (2, "stderr")):
            handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, number)
        _scale_down(limits)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (int(limits.seconds), int(limits.seconds) + 5))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))
    except BaseException:
        (folder / "stderr").write_text(traceback.format_exc())
        return UNPREPARED
    try:
        with open(1, "w", closefd=False) as sys.stdout, open(2, "w", closefd=False) as sys.stderr:
            code = main(arguments)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        return 1
    return code


def _scale_down(limits: Limits) -> None:
    """The budgets of the command are for real models; these have to show within the limits of a case."""
    verify.FIRST_SECONDS = limits.seconds / 6
    guards.MAX_TENSOR = graph_index.INFERENCE = limits.memory // 4


def _faults(folder: Path, work: Path, code: int | str, memory: int, limits: Limits) -> list[str]:
    """Everything that a user would call a fault, in words."""
    if code == UNPREPARED or not (folder / "before").exists():
        return ["the case could not be made"]
    faults = [] if code in DOCUMENTED else [f"ended with {code}"]
    if memory > limits.memory:
        faults.append(f"{memory >> 20} MiB")
    said = (folder / "stderr").read_bytes() if (folder / "stderr").exists() else b""
    shown = (folder / "stdout").read_bytes() if (folder / "stdout").exists() else b""
    if b"Traceback" in said:
        faults.append("a traceback")
    if b"\x1b" in said or b"\x1b" in shown:
        faults.append("a raw escape")
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    quiet = "--quiet" in (folder / "command").read_text().split("\0")
    if quiet and any(not line.startswith("onnx-decomp: ") for line in lines):
        faults.append("stray output")
    if (
        code in DOCUMENTED
        and code != 0
        and (len(lines) != 1 or not lines[0].startswith("onnx-decomp: error: "))
    ):
        faults.append("not one line of error")
    before = (folder / "before").read_text().split("\n")
    left = {path.name for path in work.rglob("*")} - set(before)
    if left - (MADE if code == 0 else set()):
        faults.append(f"left behind: {', '.join(sorted(left))}")
    return faults
