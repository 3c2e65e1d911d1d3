"""Give the command thousands of damaged and hostile files; say how each kind ends, and keep what goes wrong."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import click

import onnx_decomp.compiler
import onnx_decomp.frontiers
import onnx_decomp.rendering  # noqa: F401  loaded once, before the first fork
from tests.fuzz.cases import COMMON, KINDS, Sound, kind_of, load_sound, prepare
from tests.fuzz.running import Limits, Outcome, Running
from tests.fuzz.seeds import make_seeds, write_seeds

Result = tuple[int, Outcome]


@dataclass
class Tally:
    """Cases of one kind by exit code, and the worst of them."""

    codes: Counter[int | str] = field(default_factory=Counter)
    faults: int = 0
    seconds: float = 0.0
    memory: int = 0

    def add(self, outcome: Outcome) -> None:
        self.codes[outcome.code] += 1
        self.faults += bool(outcome.faults)
        self.seconds = max(self.seconds, outcome.seconds)
        self.memory = max(self.memory, outcome.memory)


def make_sound(folder: Path) -> Sound:
    """Seeds in a folder, and the report of compiling one of them, which a child does."""
    seeds = make_seeds()
    write_seeds(folder, seeds)
    places = ["planted.onnx", "out.onnx", "--calib", "planted.calib.npz", "--report", "report.json"]
    arguments = [*places, "--init", "init.npz", "--tolerance", "0.05", *COMMON]
    arguments = [
        str(folder / item) if (folder / item).exists() or ".onnx" in item or ".json" in item else item
        for item in arguments
    ]
    made = Running(folder / "first", lambda _: arguments, Limits())
    while (outcome := made.poll()) is None:
        time.sleep(0.01)
    if outcome.code != 0:
        raise click.ClickException(
            f"a sound model does not compile: {(folder / 'first' / 'stderr').read_text()}"
        )
    return load_sound(folder, seeds)


def run_cases(
    numbers: Iterable[int],
    seed: int,
    sound: Sound,
    scratch: Path,
    kept: Path | None,
    jobs: int,
    limits: Limits,
) -> Iterator[Result]:
    """Each case and its outcome, as they end. Folders of cases with faults are moved to `kept`."""
    waiting = iter(numbers)
    running: dict[int, Running] = {}
    while True:
        while len(running) < jobs and (number := next(waiting, None)) is not None:
            case = partial(prepare, kind_of(number), seed, number, sound)
            running[number] = Running(scratch / str(number), case, limits)
        if not running:
            return
        ended = [
            (number, outcome) for number, case in running.items() if (outcome := case.poll()) is not None
        ]
        for number, outcome in ended:
            folder = running.pop(number).folder
            if outcome.faults and kept is not None:
                shutil.copytree(folder, kept / str(number), dirs_exist_ok=True, symlinks=True)
            shutil.rmtree(folder, ignore_errors=True)
            yield number, outcome
        if not ended:
            time.sleep(0.002)


def table(tallies: dict[str, Tally]) -> str:
    """Kinds by exit code."""
    codes = sorted({code for tally in tallies.values() for code in tally.codes}, key=str)
    heads = ["spoiled", "cases", *(str(code) for code in codes), "faults", "longest", "most memory"]
    rows = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for kind in KINDS:
        tally = tallies[kind]
        counts = [str(tally.codes[code]) for code in codes]
        worst = [str(tally.faults), f"{tally.seconds:.1f} s", f"{tally.memory >> 20} MiB"]
        rows.append(f"| {' | '.join([kind, str(tally.codes.total()), *counts, *worst])} |")
    return "\n".join(rows)


@click.command()
@click.option("--files", type=click.IntRange(min=1), default=20_000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Cases at the same time."
)
@click.option("--first", type=click.IntRange(min=0), default=0, show_default=True, help="Number to start at.")
@click.option("--seconds", type=float, default=Limits.seconds, show_default=True, help="A case may take.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the cases that went wrong.")
def fuzz(files: int, seed: int, jobs: int, first: int, seconds: float, out: Path | None) -> None:
    """Exit 1 if any case ends in a traceback, a crash, a hang, too much memory, or an undocumented exit code.

    Interrupted, it says how far it came.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    tallies: dict[str, Tally] = defaultdict(Tally)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, suppress(KeyboardInterrupt):
        (sound_folder := Path(folder, "sound")).mkdir()
        numbers, limits = range(first, first + files), Limits(seconds=seconds)
        for number, outcome in run_cases(
            numbers, seed, make_sound(sound_folder), Path(folder), out, jobs, limits
        ):
            tallies[kind_of(number)].add(outcome)
            if outcome.faults:
                say = f"case {number} ({kind_of(number)}): {'; '.join(outcome.faults)}"
                print(say, file=sys.stderr, flush=True)
    print(table(tallies))
    done = sum(tally.codes.total() for tally in tallies.values())
    faults = sum(tally.faults for tally in tallies.values())
    print(f"\n{faults} faults in {done} cases, seed {seed}, {time.monotonic() - started:.0f} s")
    sys.exit(faults > 0)


if __name__ == "__main__":
    fuzz()
