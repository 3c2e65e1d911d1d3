"""The user's own score: loaded as it would run by itself, and whatever goes wrong in it is one line."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_decomp.errors import CannotVerifyError, InputError, UsageError
from onnx_decomp.evaluation import MODULE, Evaluation, load
from onnx_decomp.runtime import open_session
from tests.small import mlp

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """The script and its neighbours are not remembered from test to test."""
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if name in (MODULE, "neighbour"):
            del sys.modules[name]


def written(folder: Path, text: str, name: str = "score") -> str:
    (folder / "score.py").write_text(text)
    return f"{folder / 'score.py'}:{name}"


def scored(folder: Path, body: str) -> Evaluation:
    return load(written(folder, f"def score(run, part):\n    {body}\n"), 0.1)


def run(_: Any) -> dict[str, Any]:
    return {"y": np.ones((2, 3), np.float32)}


def test_a_script_finds_its_neighbours_and_its_types(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("LATE = 3.0\n")
    text = (
        "from __future__ import annotations\n"
        "import dataclasses, pathlib\n"
        "@dataclasses.dataclass\n"
        "class Sum:\n"
        "    total: float = 0.0\n"
        "def score(run, part):\n"
        "    import neighbour\n"
        "    assert pathlib.Path(__file__).name == 'score.py' and __name__ != '__main__'\n"
        "    return Sum(neighbour.LATE * run({})['y'].mean()).total\n"
    )
    before = list(sys.path)
    assert load(written(tmp_path, text), 0.1).score(run, "report") == 3.0
    assert sys.path == before
    assert {path.name for path in tmp_path.iterdir()} == {"score.py", "neighbour.py"}


def test_the_score_of_the_original_is_taken_once_for_each_part(tmp_path: Path) -> None:
    calls: list[str] = []

    def original(_: Any) -> dict[str, Any]:
        calls.append("original")
        return {"y": np.array(0.9)}

    evaluation = scored(tmp_path, "return run({})['y'] + (part == 'report')")
    evaluation.original = original
    for _ in range(3):
        assert evaluation.spent(lambda _: {"y": np.array(0.85)}, "select") == pytest.approx(0.5)
        assert evaluation.spent(lambda _: {"y": np.array(1.0)}, "report") == pytest.approx(-1.0)
    assert calls == ["original"] * 3  # twice on select, to see that it is the same each time
    assert evaluation.before("report") == pytest.approx(1.9)


@pytest.mark.parametrize(
    "value", ["1", "0.5", "np.float32(2)", "np.array(3)", "np.array([4.0])", "fractions.Fraction(1, 2)"]
)
def test_numbers(tmp_path: Path, value: str) -> None:
    found = scored(tmp_path, f"import fractions, numpy as np; return {value}").score(run, "select")
    assert type(found) is float


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return None", "returned None for 'select'"),
        ("return 'good'", "returned 'good'"),
        ("return '0.5'", "returned '0.5'"),
        ("return True", "returned True"),
        ("return float('nan')", "returned nan"),
        ("return float('-inf')", "returned -inf"),
        ("return [0.5]", "returned [0.5]"),
        ("return 1j", "returned 1j"),
        ("import numpy as np; return np.ones(1000)", "one finite number"),
        ("return 10 ** 400", "one finite number"),
        ("raise ValueError('no\\n such   label')", "line 2: ValueError: no such label"),
        ("raise ValueError('x' * 999)", "xxx..."),
        ("return 1 / 0", "ZeroDivisionError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("import sys; sys.exit()", "SystemExit"),
        ("return score(run, part)", "RecursionError"),
        ("run()", "TypeError"),
        ("raise type('Sly', (Exception,), {'__str__': lambda self: 1 / 0})", "Sly: a value of type Sly"),
        ("return type('Sly', (), {'item': lambda self: 1 / 0})()", "one finite number"),
        ("return type('Sly', (), {'__repr__': lambda self: 1 / 0})()", "a value of type Sly"),
        ("import no_such_module", "ModuleNotFoundError"),
    ],
)
def test_a_function_that_fails(tmp_path: Path, body: str, says: str) -> None:
    with pytest.raises(InputError) as raised:
        scored(tmp_path, body).score(run, "select")
    message = str(raised.value)
    assert says in message
    assert "score.py:score" in message
    assert "\n" not in message
    assert len(message) < 500 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        ("score = 3", "score", "'score' is no function but 3"),
        ("def other(): ...", "score", "no function 'score'"),
        ("def score(:", "score", "SyntaxError"),
        ("\0", "score", "score.py"),
        ("x = 1\nraise RuntimeError('broken')", "score", "line 2: RuntimeError: broken"),
        ("import sys; sys.exit('usage: ...')", "score", "SystemExit: usage: ..."),
        ("import no_such_module", "score", "No module named 'no_such_module'"),
        ("# -*- coding: no-such -*-", "score", "score.py"),
    ],
)
def test_a_script_that_cannot_be_used(tmp_path: Path, text: str, name: str, says: str) -> None:
    with pytest.raises(InputError) as raised:
        load(written(tmp_path, text, name), 0.1)
    assert says in str(raised.value)
    assert str(tmp_path / "score.py") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_script(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load(f"{tmp_path / 'none.py'}:score", 0.1)
    with pytest.raises(InputError, match="irectory"):
        load(f"{tmp_path}:score", 0.1)
    for spec in ("score.py", "score.py:", ":score", "score.py:a.b", "score.py:1"):
        with pytest.raises(UsageError, match=r"write SCRIPT\.py:function"):
            load(spec, 0.1)


def test_a_model_that_refuses_what_it_is_fed(tmp_path: Path) -> None:
    evaluation = scored(tmp_path, "return run({'z': 1})")
    with pytest.raises(InputError, match="RunError: the model fails to run"):
        evaluation.score(open_session(mlp()).run, "select")


def test_a_score_that_changes_from_call_to_call(tmp_path: Path) -> None:
    evaluation = scored(tmp_path, "import random; return random.random()")
    evaluation.original = run
    with pytest.raises(CannotVerifyError, match="remove the randomness"):
        evaluation.before("select")
    noisy = load(
        written(tmp_path, "n = [0]\ndef score(run, part):\n    n[0] += 1\n    return n[0] * 1e-9\n"), 0.1
    )
    noisy.original = run
    assert math.isfinite(noisy.before("select"))


def test_what_it_prints_goes_to_stderr(tmp_path: Path, capsys: Capture) -> None:
    text = "print('loading')\ndef score(run, part):\n    print('scoring', part)\n    return 1\n"
    assert load(written(tmp_path, text), 0.1).score(run, "select") == 1.0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "loading\nscoring select\n")


def test_ctrl_c_is_no_failure_of_the_script(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        scored(tmp_path, "raise KeyboardInterrupt").score(run, "select")
