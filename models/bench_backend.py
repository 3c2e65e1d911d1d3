"""The onnx package's own backend test collection, through the compiler: node cases, exported models, light models.

Each case is compiled as it is, with its own inputs as calibration data where it can be so used. Then, because most
of them hold nothing to rewrite, with a small network planted before or after its operator whose weights alone prove
that something can go: hidden units that nothing drives (`dead`), or blocks with exact zeros between them (`blocks`).
These are compiled without data, so that what is written has to be right on any input, and so on the case's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.table import Table

from models.bench_common import Section, save, table
from models.isolated import Lost, run_each
from onnx_decomp import model_io
from onnx_decomp.cli import main as command
from onnx_decomp.metrics import compare_outputs
from onnx_decomp.runtime import RunError, open_session

Where = Literal["", "before", "after"]
Weights = Literal["", "dead", "blocks"]
WHERE: tuple[Where, ...] = ("before", "after")
WEIGHTS: tuple[Weights, ...] = ("dead", "blocks")

KINDS = ("node", "simple", "pytorch-operator", "pytorch-converted", "real")
DOCUMENTED = frozenset({0, 2, 3, 4, 5, 7})
"""Exit codes that the command may end with here: not 1, an internal error."""
RUNS = 10
"""Times that a case's inputs are repeated as calibration data."""
LARGEST = 256
"""Elements of a tensor that a planted network reads."""
HIDDEN = 32
TOLERANCE = 1e-3
SECONDS = 300.0
FREE = ("--provider", "cpu", "--no-latency-gate", "--objective", "flops", "--quiet", "--debug")


@dataclass(frozen=True)
class Case:
    """A model with inputs and outputs in the order of the graph's; arrays, or what else the onnx package has."""

    model: onnx.ModelProto
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]

    @property
    def feeds(self) -> dict[str, Any]:
        return dict(zip((item.name for item in self.model.graph.input), self.inputs, strict=False))


@dataclass(frozen=True)
class Variant:
    """One compilation: the case as it is, or with weights planted somewhere."""

    kind: str
    name: str
    where: Where = ""
    weights: Weights = ""


@dataclass(frozen=True)
class Row:
    """What came of one compilation.

    data: `own`, or `none` where the case's inputs can't be calibration data or the original fails on them; why says
    so then. change: largest relative L2 change of any output through ONNX Runtime, on the case's own inputs.
    outcome: `identical`, `rewritten`, `refused` (a documented exit code), else what is wrong.
    """

    kind: str
    name: str
    where: Where
    weights: Weights
    outcome: str
    code: int = 0
    data: str = ""
    why: str = ""
    decisions: str = ""
    change: float = 0.0
    seconds: float = 0.0

    @property
    def fine(self) -> bool:
        return self.outcome in ("identical", "rewritten", "refused")


# --- the collection -----------------------------------------------------------------------------------------------


@cache
def collection() -> dict[tuple[str, str], Callable[[], Case]]:
    """Every case by kind and name; a call reads it."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some cases overflow on purpose while they are made
        found = {(kind, case.name): case for kind in KINDS for case in load_model_tests(kind=kind)}
    return {key: _reader(case) for key, case in sorted(found.items())}


def _reader(case: Any) -> Callable[[], Case]:
    if case.model is not None:
        inputs, outputs = case.data_sets[0]
        return lambda: Case(case.model, tuple(inputs), tuple(outputs))
    if case.model_dir is not None:
        return lambda: _stored(Path(case.model_dir))
    light = Path(onnx.__file__).parent.parent / case.url  # a path in the package
    return lambda: Case(onnx.load(light), (), ())


def _stored(folder: Path) -> Case:
    model = onnx.load(folder / "model.onnx")
    values = [
        tuple(
            _read(folder / "test_data_set_0" / f"{end}_{number}.pb", item)
            for number, item in enumerate(items)
        )
        for end, items in (("input", model.graph.input), ("output", model.graph.output))
    ]
    return Case(model, *values)


def _read(file: Path, item: onnx.ValueInfoProto) -> Any:
    """An array, or a sequence as it is stored."""
    if not file.exists() or item.type.WhichOneof("value") != "tensor_type":
        return None
    return numpy_helper.to_array(TensorProto.FromString(file.read_bytes()))


# --- planting -----------------------------------------------------------------------------------------------------


def planted(case: Case, where: Where, weights: Weights) -> Case | None:
    """The case with a network at its first tensor of floats; None where it has none that fits.

    Inputs become stored constants unless their first axis is as long as that of the first array: the others can't
    all count samples.
    """
    if any(not isinstance(array, np.ndarray) or array.dtype.kind not in "fiubOU" for array in case.inputs):
        return None
    made = _with_constants(case)
    if made is None:
        return None
    model = made.model
    if not model_io.opset(model):
        model.opset_import.append(helper.make_opsetid("", 17))
    if where == "before":
        name = next((name for name, array in made.feeds.items() if _fits(array)), None)
        if name is None or made.feeds[name].dtype != np.float32:
            return None
        _plant_before(model.graph, name, made.feeds[name].shape, weights)
        return made
    outputs = dict(zip((item.name for item in model.graph.output), made.outputs, strict=False))
    name = next((name for name, array in outputs.items() if _fits(array)), None)
    if name is None:
        return None
    _plant_after(model.graph, name, outputs[name].shape, weights)
    return made


def _fits(array: Any) -> bool:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        return False
    return 2 <= array.size <= LARGEST and array.ndim > 0 and bool(np.isfinite(array).all())


def _with_constants(case: Case) -> Case | None:
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    model.ir_version = max(model.ir_version, 4)  # from there on a stored constant need not be an input
    samples = next((len(array) for array in case.inputs if array.ndim and len(array)), None)
    kept, feeds = [], []
    for item, array in zip(list(model.graph.input), case.inputs, strict=False):
        if array.ndim and len(array) == samples and array.dtype.kind in "fiub":
            kept.append(item)
            feeds.append(array)
        else:
            model.graph.initializer.append(numpy_helper.from_array(array, item.name))
    if not kept:
        return None
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return Case(model, tuple(feeds), case.outputs)


def _plant_before(graph: onnx.GraphProto, name: str, shape: Sequence[int], weights: Weights) -> None:
    """The operator reads x + network(x): near enough to x that it still works."""
    _rename_reads(graph.node, name, "planted.x")
    width = int(np.prod(shape)) // shape[0]
    nodes = _network(graph, width, weights, 0.02)
    graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), "planted.shape"))
    head = helper.make_node("Reshape", [name, "planted.flat"], ["planted.in"], "planted/flat")
    tail = [
        helper.make_node("Add", ["planted.in", "planted.out"], ["planted.sum"], "planted/residual"),
        helper.make_node("Reshape", ["planted.sum", "planted.shape"], ["planted.x"], "planted/shape"),
    ]
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([head, *nodes, *tail, *rest])


def _plant_after(graph: onnx.GraphProto, name: str, shape: Sequence[int], weights: Weights) -> None:
    """The first output is network(y) instead of y."""
    width = int(np.prod(shape)) // shape[0]
    nodes = _network(graph, width, weights, 1.0)
    graph.node.extend(
        [
            helper.make_node("Cast", [name], ["planted.float"], "planted/float", to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["planted.float", "planted.flat"], ["planted.in"], "planted/flat"),
            *nodes,
        ]
    )
    at = [item.name for item in graph.output].index(name)
    made = helper.make_tensor_value_info("planted.out", TensorProto.FLOAT, [shape[0], width])
    graph.output[at].CopyFrom(made)


def _network(graph: onnx.GraphProto, width: int, weights: Weights, scale: float) -> list[onnx.NodeProto]:
    """planted.in [n, width] -> MatMul, Add, Relu, MatMul, Add -> planted.out [n, width]; stores what it needs."""
    rng = np.random.default_rng(width)
    hidden = HIDDEN
    first, second = rng.standard_normal((width, hidden)), rng.standard_normal((hidden, width)) * scale
    bias = rng.standard_normal(hidden)
    if weights == "dead":
        first[:, ::2] = 0
        bias[::2] = 0
    else:
        inside = np.equal.outer(np.arange(width) * 2 // width, np.arange(hidden) % 2)
        first, second = first * inside, second * inside.T
    stored = {
        "planted.first": first / np.sqrt(width),
        "planted.bias": bias,
        "planted.second": second / np.sqrt(hidden),
        "planted.shift": rng.standard_normal(width) * scale,
    }
    for name, array in stored.items():
        graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    graph.initializer.append(numpy_helper.from_array(np.array([-1, width]), "planted.flat"))
    return [
        helper.make_node("MatMul", ["planted.in", "planted.first"], ["planted.h"], "planted/first"),
        helper.make_node("Add", ["planted.h", "planted.bias"], ["planted.b"], "planted/bias"),
        helper.make_node("Relu", ["planted.b"], ["planted.r"], "planted/relu"),
        helper.make_node("MatMul", ["planted.r", "planted.second"], ["planted.m"], "planted/second"),
        helper.make_node("Add", ["planted.m", "planted.shift"], ["planted.out"], "planted/shift"),
    ]


def _rename_reads(nodes: Any, old: str, new: str) -> None:
    """In nested graphs too, where a tensor of the outer one is read by its name."""
    for node in nodes:
        for at, name in enumerate(node.input):
            if name == old:
                node.input[at] = new
        for item in node.attribute:
            for graph in (*item.graphs, *([item.g] if item.HasField("g") else [])):
                _rename_reads(graph.node, old, new)


# --- compiling ----------------------------------------------------------------------------------------------------


def compile_variant(variant: Variant) -> Row | None:
    """Compile one, and check what came of it; None where nothing can be planted there."""
    case: Case | None = collection()[variant.kind, variant.name]()
    assert case is not None
    if variant.weights:
        case = planted(case, variant.where, variant.weights)
        if case is None:
            return None
        try:
            open_session(case.model).run(case.feeds)
        except RunError:
            return None  # ONNX Runtime lacks the operator, so that nothing could ever be verified
    row = Row(variant.kind, variant.name, variant.where, variant.weights, "")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.onnx"
        source.write_bytes(case.model.SerializeToString())
        started = time.perf_counter()
        code, why, data = _compile(case, Path(folder), calibrate=not variant.weights)
        row = replace(row, code=code, why=why, data=data, seconds=time.perf_counter() - started)
        return _checked(row, case, Path(folder))


def _compile(case: Case, folder: Path, calibrate: bool) -> tuple[int, str, str]:
    """Exit code, the error's line or why the case's own inputs were not used, and which data was used."""
    arguments = [str(folder / "in.onnx"), str(folder / "out.onnx"), "--report", str(folder / "report.json")]
    why = ""
    if (
        calibrate
        and case.feeds
        and all(isinstance(array, np.ndarray) and array.ndim for array in case.feeds.values())
    ):
        repeated = {name: np.concatenate([array] * RUNS) for name, array in case.feeds.items()}
        try:
            calib = save(str(folder), "calib", repeated)
            code, why = run_command([*arguments, *FREE, "--calib", str(calib)])
        except ValueError as error:  # numpy can't store the type
            code, why = 3, str(error)
        if code not in (3, 5):
            return code, why, "own"
    code, last = run_command([*arguments, *FREE])
    return code, last or why, "none"


def run_command(arguments: list[str]) -> tuple[int, str]:
    """Exit code, and the last line on stderr where that is an error; what else is written there is dropped."""
    with _stderr_in_file() as file:
        code = command(arguments)
    lines = [line for line in file.read_text(errors="replace").splitlines() if line]
    file.unlink()
    return code, lines[-1] if code and lines else ""


@contextlib.contextmanager
def _stderr_in_file() -> Iterator[Path]:
    """Of native libraries too."""
    handle, name = tempfile.mkstemp()
    saved = os.dup(2)
    os.dup2(handle, 2)
    try:
        yield Path(name)
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(handle)


def _checked(row: Row, case: Case, folder: Path) -> Row:
    source, out = folder / "in.onnx", folder / "out.onnx"
    if row.code:
        if row.code not in DOCUMENTED or out.exists():
            return replace(row, outcome="internal error" if row.code == 1 else "refused, but OUT is there")
        return replace(row, outcome="refused")
    report = json.loads((folder / "report.json").read_text())
    if not report["kept"]:
        same = out.read_bytes() == source.read_bytes()
        return replace(row, outcome="identical" if same else "OUT is not IN")
    decisions = Counter(site["decision"] for site in report["sites"] if site["decision"] != "dense")
    row = replace(row, decisions=", ".join(sorted(decisions)))
    if problem := invalid(source, out):
        return replace(row, outcome="invalid", why=problem)
    change = _change(source, out, case)
    row = replace(row, change=change)
    return replace(row, outcome="rewritten" if change <= TOLERANCE else "other outputs")


def invalid(source: Path, out: Path) -> str:
    """What the onnx package's checker says of OUT, empty if it passes; with shape inference where IN passes that."""
    try:
        onnx.checker.check_model(source, full_check=True)
        full = True
    except Exception:  # some cases of the collection itself
        full = False
    try:
        onnx.checker.check_model(out, full_check=full)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""


def _change(source: Path, out: Path, case: Case) -> float:
    before, after = open_session(source), open_session(out)
    return compare_outputs([(before.run(case.feeds), after.run(case.feeds))], "rel-l2").largest


# --- the section --------------------------------------------------------------------------------------------------


def variants(names: Iterable[tuple[str, str]]) -> list[Variant]:
    """All cases as they are, then each but the light models with a network before or after its operator, in turns."""
    listed = list(names)
    made = [Variant(*key) for key in listed]
    for number, (kind, name) in enumerate(key for key in listed if key[0] != "real"):
        where, weights = WHERE[number % 2], WEIGHTS[number // 2 % 2]
        made.append(Variant(kind, name, where, weights))
    return made


def measure(quick: bool) -> list[Row]:
    """Every variant; of every hundredth case where quick."""
    rows = []
    names = list(collection())[:: 100 if quick else 1]
    for variant, result in run_each(compile_variant, variants(names), seconds=SECONDS):
        if isinstance(result, Lost):
            result = Row(variant.kind, variant.name, variant.where, variant.weights, result.why)
        if result is not None:
            rows.append(result)
    return rows


def tables(rows: Sequence[Row]) -> list[Table]:
    columns = [
        "cases",
        "identical",
        "rewritten",
        "refused",
        "wrong",
        "largest change",
        "median s",
        "longest s",
    ]
    made = table(
        f"the onnx {onnx.__version__} package's backend test collection", ["kind", "planted"], columns
    )
    for kind, where, weights in dict.fromkeys((row.kind, row.where, row.weights) for row in _sorted(rows)):
        group = [row for row in rows if (row.kind, row.where, row.weights) == (kind, where, weights)]
        count = Counter(row.outcome for row in group)
        seconds = [row.seconds for row in group]
        made.add_row(
            kind,
            f"{weights} {where}" if where else "",
            str(len(group)),
            *(str(count[outcome]) for outcome in ("identical", "rewritten", "refused")),
            str(sum(not row.fine for row in group)),
            f"{max(row.change for row in group):.1g}",
            f"{np.median(seconds):.2f}",
            f"{max(seconds):.1f}",
        )
    wrong = table(
        "what was wrong, and what was refused", ["case", "planted", "outcome", "why"], ["exit code"]
    )
    for row in _sorted(rows):
        if row.outcome not in ("identical", "rewritten"):
            why = row.why.removeprefix("onnx-decomp: ")
            wrong.add_row(row.name, f"{row.weights} {row.where}".strip(), row.outcome, why, str(row.code))
    return [made, wrong] if wrong.row_count else [made]


def _sorted(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (KINDS.index(row.kind), row.where, row.weights, row.name))


def wrong(rows: Sequence[Row]) -> list[str]:
    """One line for each case that is not as it must be."""
    return [f"{row.name} {row.weights} {row.where}: {row.outcome} {row.why}" for row in rows if not row.fine]


SECTION = Section(
    "every case of the onnx package's backend tests, as it is and with planted weights",
    measure,
    tables,
    wrong,
)
