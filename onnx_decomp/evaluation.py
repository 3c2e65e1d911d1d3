"""The user's own score: a function in a script of theirs, which decides instead of a metric of the outputs.

Nothing of the script is read or run before it is asked for by `--evaluate`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from numpy.typing import NDArray

from onnx_decomp.errors import CannotVerifyError, InputError, UsageError

Part = Literal["select", "report"]
Run = Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]
"""Runs a model: arrays by input name give arrays by output name."""

MODULE = "onnx_decomp_evaluation"
"""What the script is called while it is loaded: not __main__, and nothing that another package may be called."""

UNSTEADY = 0.01
"""Share of the tolerance by which the score of one and the same model may differ from call to call."""

LONGEST = 200
"""Characters of an error's own message that are shown."""


@dataclass
class Evaluation:
    """A score of models, higher is better, and the largest drop of it that is allowed.

    original: runs the original model; its score is taken once for each part.
    """

    name: str
    """As it was asked for: SCRIPT.py:function."""
    function: Callable[[Run, Part], Any]
    folder: Path
    tolerance: float
    original: Run | None = None
    _before: dict[Part, float] = field(default_factory=dict)

    def score(self, run: Run, part: Part) -> float:
        """One call of the function. Raises InputError where it fails or returns no finite number."""
        with _calling(self.name, self.folder):
            value = self.function(run, part)
            number = _number(value)
        if number is None:
            shown = _text(value)
            raise InputError(f"{self.name}: it returned {shown} for {part!r}: return one finite number")
        return number

    def before(self, part: Part) -> float:
        """Score of the original. Raises CannotVerifyError where the score on `select` changes from call to call."""
        assert self.original is not None
        if part not in self._before:
            found = self.score(self.original, part)
            if part == "select":
                again = self.score(self.original, part)
                if abs(found - again) > UNSTEADY * self.tolerance:
                    raise CannotVerifyError(
                        f"{self.name}: it scores the same model {found:.6g}, then {again:.6g}: "
                        "remove the randomness, or allow a larger --tolerance"
                    )
            self._before[part] = found
        return self._before[part]

    def spent(self, run: Run, part: Part) -> float:
        """Drop of the score from that of the original, as a share of the tolerance; below 0 where it rose."""
        before, after = self.compared(run, part)
        return (before - after) / self.tolerance

    def compared(self, run: Run, part: Part) -> tuple[float, float]:
        """Scores of the original, which comes first, and of another model."""
        before = self.before(part)
        return before, self.score(run, part)


def load(spec: str, tolerance: float) -> Evaluation:
    """The function that `SCRIPT.py:function` names. Raises InputError where it can't be had, in one line."""
    file, _, name = spec.rpartition(":")
    if not file or not name.isidentifier():
        raise UsageError(f"--evaluate: {spec!r} names no function: write SCRIPT.py:function")
    path = Path(file)
    try:
        source = path.read_bytes()
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise InputError(f"{path}: {reason}: check the path given by --evaluate") from error
    folder = path.resolve().parent
    module = ModuleType(MODULE)
    module.__file__ = str(path)
    with _calling(str(path), folder):
        code = compile(source, str(path), "exec", dont_inherit=True)
        sys.modules[MODULE] = module  # dataclasses and pickle look it up there
        exec(code, module.__dict__)
    if not hasattr(module, name):
        raise InputError(f"{path}: no function {name!r} in it: check the name given by --evaluate")
    function = getattr(module, name)
    if not callable(function):
        raise InputError(f"{path}: {name!r} is no function but {_text(function)}: name a function")
    return Evaluation(spec, function, folder, tolerance)


@contextmanager
def _calling(what: str, folder: Path) -> Iterator[None]:
    """The script's folder is where it imports from, what it prints goes to stderr, and all that it raises is one line.

    Files that it makes Python compile are not kept beside it.
    """
    writes = sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:
        raise InputError(f"{what}: {_place(error)}{type(error).__name__}: {_text(error, str)}") from error
    finally:
        sys.dont_write_bytecode = writes
        with suppress(ValueError):
            sys.path.remove(str(folder))  # what the script has added itself stays


def _number(value: Any) -> float | None:
    """A finite number, or None; arrays and tensors of one entry are numbers too."""
    if isinstance(value, str | bytes | bool):
        return None
    try:
        number = float(value.item() if hasattr(value, "item") else value)
    except Exception:
        return None
    return number if math.isfinite(number) else None


def _place(error: BaseException) -> str:
    """The line of the script at which an error rose, as far as it tells."""
    found, at = None, error.__traceback__
    while at is not None:
        if at.tb_frame.f_globals.get("__name__") == MODULE:
            found = at.tb_lineno
        at = at.tb_next
    return "" if found is None else f"line {found}: "


def _text(value: Any, show: Callable[[Any], str] = repr) -> str:
    """What a value of a stranger says of itself, in bearable length; it may even refuse to."""
    try:
        text = " ".join(show(value).split())
    except Exception:
        text = ""
    text = text or f"a value of type {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
