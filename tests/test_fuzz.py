"""The fuzzer itself: a seed always gives the same files, and what goes wrong in a case is told for what it is."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import running
from tests.fuzz.__main__ import make_sound, run_cases
from tests.fuzz.cases import KINDS, Sound, kind_of, prepare
from tests.fuzz.running import Limits, Outcome, Running
from tests.workplace import contents


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return make_sound(tmp_path_factory.mktemp("sound"))


def test_a_seed_gives_the_same_files(sound: Sound, tmp_path: Path) -> None:
    assert {kind_of(number) for number in range(100)} == set(KINDS)
    for number, kind in enumerate(KINDS):
        made = []
        for seed in (3, 3, 4):
            folder = tmp_path / f"{number}-{len(made)}"
            folder.mkdir()
            made.append((prepare(kind, seed, number, sound, folder), contents(folder)))
        assert made[0] == made[1]
        assert made[0] != made[2]


def test_some_cases_of_every_kind(sound: Sound, tmp_path: Path) -> None:
    """The same as a short run of the command."""
    numbers = [next(n for n in range(100) if kind_of(n) == kind) for kind in KINDS]
    outcomes = dict(run_cases(numbers, 7, sound, tmp_path / "scratch", None, 1, Limits()))
    assert sorted(outcomes) == sorted(numbers)
    assert {number: outcome.faults for number, outcome in outcomes.items() if outcome.faults} == {}


def run(folder: Path, action: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """A case in which the command does something else."""
    monkeypatch.setattr(running, "main", action)
    monkeypatch.setattr(running, "PATIENCE", 1)
    case = Running(folder, lambda _: ["in.onnx", "--quiet"], Limits(seconds=1.0))
    while (outcome := case.poll()) is None:
        time.sleep(0.01)
    return outcome


def crash(_: list[str]) -> int:
    os.kill(os.getpid(), signal.SIGSEGV)
    return 0


def hang(_: list[str]) -> int:
    time.sleep(60)
    return 0


def fail(_: list[str]) -> int:
    raise KeyError("name")


def litter(_: list[str]) -> int:
    Path("half.tmp").touch()
    print("onnx-decomp: error: it can't be", file=sys.stderr)
    return 3


def chatter(_: list[str]) -> int:
    print("onnx-decomp: error: \x1b[31mred\nand more", file=sys.stderr)
    return 2


def refuse(_: list[str]) -> int:
    print("onnx-decomp: error: it can't be", file=sys.stderr)
    return 3


@pytest.mark.parametrize(
    ("action", "code", "faults"),
    [
        (crash, "SIGSEGV", ["ended with SIGSEGV"]),
        (hang, "hang", ["ended with hang"]),
        (fail, 1, ["ended with 1", "a traceback", "stray output"]),
        (litter, 3, ["left behind: half.tmp"]),
        (chatter, 2, ["a raw escape", "stray output", "not one line of error"]),
        (refuse, 3, []),
    ],
)
def test_what_goes_wrong(
    action: Callable[[list[str]], int],
    code: int | str,
    faults: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcome = run(tmp_path / "case", action, monkeypatch)
    assert outcome.code == code
    assert list(outcome.faults) == faults
