"""A folder where everything is right, to be spoiled, and how a command has to end that meets what is wrong."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest

from models.planted import Planted, PlantedModel, build, calibration
from onnx_decomp.cli import main

USAGE, INPUT, CANNOT_VERIFY, PROVIDER, INTERRUPTED = 2, 3, 5, 7, 130
SAMPLES = 60

Capture = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class Workplace:
    """A sound model with statistics and calibration data, to be spoiled."""

    folder: Path
    planted: PlantedModel

    @property
    def model(self) -> Path:
        return self.folder / "in.onnx"

    @property
    def out(self) -> Path:
        return self.folder / "out.onnx"

    @property
    def init(self) -> Path:
        return self.folder / "init.npz"

    @property
    def calib(self) -> Path:
        return self.folder / "calib.npz"

    def edit(self) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(self.planted.model)
        return model


@cache
def planted() -> PlantedModel:
    """What every workplace holds; nobody changes it."""
    return build(Planted((32, 64, 32), off="zero", gain=3))


def make_place(above: Path) -> Workplace:
    """A workplace in a folder of its own."""
    folder = above / "work"
    folder.mkdir()
    made = Workplace(folder, planted())
    onnx.save(made.planted.model, made.model)
    np.savez(made.init, **made.planted.snapshot)
    np.savez(made.calib, **calibration(made.planted, SAMPLES))
    return made


def contents(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    """Everything in a folder: kind and bytes, or where a link points to."""
    found: dict[str, tuple[int, bytes | str]] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        found[str(path.relative_to(folder))] = (stat.S_IFMT(mode), content)
    return found


def check_refused(place: Workplace, arguments: list[str], code: int, says: str, capsys: Capture) -> None:
    """One line on stderr, the right code, and every file around as it was."""
    before = contents(place.folder.parent)
    assert main(["--provider", "cpu", "--no-latency-gate", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [
        line for line in captured.err.splitlines() if line
    ]  # click ends the line of a terminal's ^C first
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("onnx-decomp: error: ")
    assert says in lines[0]
    assert "Traceback" not in captured.err
    assert contents(place.folder.parent) == before


Spoil = Callable[[Workplace], list[str]]
"""Spoils one thing; gives options to append, or a whole command line that starts with the model."""


@dataclass(frozen=True)
class Case:
    """What is spoiled, how the command ends, and what its message has to name."""

    spoil: Spoil
    code: int
    says: str


def arguments(place: Workplace, given: list[str]) -> list[str]:
    """A command line, completed by what it doesn't mention."""
    positional = [] if given and not given[0].startswith("--") else [str(place.model), str(place.out)]
    data = [] if "--init" in given else ["--init", str(place.init)]
    data += [] if "--calib" in given else ["--calib", str(place.calib)]
    return [*positional, *given, *data]


def run_case(case: Case, place: Workplace, capsys: Capture, existing: bool = False) -> None:
    given = case.spoil(place)
    if existing and not place.out.exists():
        place.out.write_bytes(b"what an earlier run has written")
    check_refused(place, arguments(place, given), case.code, case.says, capsys)
