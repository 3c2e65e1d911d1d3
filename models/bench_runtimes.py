"""Written models elsewhere: the onnx package's reference evaluator, OpenVINO, and optimizers of other people.

Each example is compiled, and what was written has to give the same outputs there as in ONNX Runtime. `onnxslim` and
`onnxsim` are run over it, and what they make of it is run in ONNX Runtime.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.table import Table

import models
from models.bench_common import Section, save, table
from models.planted import Planted, build, calibration
from onnx_decomp.compiler import compile_model
from onnx_decomp.metrics import compare_outputs
from onnx_decomp.model_io import from_proto, load
from onnx_decomp.options import Options
from onnx_decomp.runtime import Arrays, open_session

SAMPLES = 24
TOLERANCE = 0.03
"""Of trained models: large enough that something is rewritten."""


def reference(model: onnx.ModelProto, feeds: Arrays) -> dict[str, Any]:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(model)
    return dict(zip(evaluator.output_names, evaluator.run(None, dict(feeds)), strict=True))


def onnxslim(model: onnx.ModelProto, feeds: Arrays) -> dict[str, Any]:
    import onnxslim as slimmer

    copy = onnx.ModelProto.FromString(model.SerializeToString())  # it changes what it is given
    return dict(open_session(slimmer.slim(copy), threads=1).run(feeds))


def onnxsim(model: onnx.ModelProto, feeds: Arrays) -> dict[str, Any]:
    import onnxsim as simplifier

    simplified, _ = simplifier.simplify(onnx.ModelProto.FromString(model.SerializeToString()))
    return dict(open_session(simplified, threads=1).run(feeds))


def openvino(model: onnx.ModelProto, feeds: Arrays) -> dict[str, Any]:
    """On its CPU plugin, which may compute in bfloat16 unless told otherwise."""
    os.environ["OPENVINO_TELEMETRY_OPT_OUT"] = "1"
    import openvino as vino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        core = vino.Core()
        compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        made = compiled({name: np.ascontiguousarray(array) for name, array in feeds.items()})
        return {port.any_name: np.array(made[port]) for port in compiled.outputs}


Runtime = Callable[[onnx.ModelProto, Arrays], dict[str, Any]]
RUNTIMES: dict[str, Runtime] = {
    "reference": reference,
    "onnxslim": onnxslim,
    "onnxsim": onnxsim,
    "openvino": openvino,
}


def disagreement(runtime: Runtime, model: onnx.ModelProto, feeds: Arrays) -> float:
    """Relative L2 difference from ONNX Runtime, largest of the outputs."""
    expected = open_session(model, threads=1).run(feeds)
    return compare_outputs([(expected, runtime(model, feeds))], "rel-l2").largest


@dataclass(frozen=True)
class Row:
    """One written model. forms: of its sites. differences: by runtime, or what it failed with."""

    name: str
    forms: str
    differences: dict[str, float | str]


def measure(quick: bool) -> list[Row]:
    return [_measured(*example) for example in (*_planted(), *(() if quick else _trained()))]


def _measured(name: str, report: dict[str, Any], model: onnx.ModelProto, feeds: Arrays) -> Row:
    forms = {_form(site) for site in report["sites"] if site["decision"] != "dense"}
    found: dict[str, float | str] = {}
    for runtime, run in RUNTIMES.items():
        try:
            found[runtime] = disagreement(run, model, feeds)
        except ImportError:
            found[runtime] = "not installed"
        except Exception as error:
            found[runtime] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return Row(name, ", ".join(sorted(forms)) or "the same bytes", found)


def _form(site: dict[str, Any]) -> str:
    kind = (site["structure"] or {}).get("kind")
    words = [site["decision"], site["form"], "slices" if kind == "influence" else ""]
    return " ".join(word for word in words if word)


def _planted() -> Iterator[tuple[str, dict[str, Any], onnx.ModelProto, Arrays]]:
    """Every form: blocks in parallel, in chains and batched, with Gathers at the border or without, in two types."""
    chain = Planted((64, 128, 64), off="zero", gain=3, hide="hidden")
    cases = {
        "chain": (chain, "cpu"),
        "chain, order hidden": (replace(chain, hide="all"), "cpu"),
        "one layer": (replace(chain, widths=(128, 128)), "cpu"),
        "three axes": (replace(chain, rank=3), "cpu"),
        "float16": (replace(chain, dtype="float16"), "cpu"),
        "batched lanes": (chain, "cuda"),
    }
    for name, (spec, provider) in cases.items():
        planted = build(spec)
        with tempfile.TemporaryDirectory() as folder:
            options = Options(
                init=save(folder, "init", planted.snapshot),
                calib=save(folder, "calib", calibration(planted, 600, seed=1)),
                provider="cuda" if provider == "cuda" else "cpu",
                latency_gate=False,
                objective="flops",
            )
            result, _ = compile_model(from_proto(planted.model), options)
        yield f"planted: {name}", result.report, result.model, calibration(planted, SAMPLES, seed=2)


def _trained() -> Iterator[tuple[str, dict[str, Any], onnx.ModelProto, Arrays]]:
    for name in (*models.NAMES, *models.FURTHER):
        trained = models.load(name)
        options = Options(
            init=trained.init,
            calib=trained.calib,
            tolerance=TOLERANCE,
            provider="cpu",
            latency_gate=False,
            objective="flops",
        )
        result, _ = compile_model(load(trained.model), options)
        with np.load(trained.report) as stored:
            feeds = {key: stored[key][:SAMPLES] for key in stored.files if key != "target"}
        yield name, result.report, result.model, feeds


def tables(rows: Sequence[Row]) -> list[Table]:
    made = table(
        "written models elsewhere: relative L2 difference from ONNX Runtime",
        ["model", "forms"],
        list(RUNTIMES),
    )
    for row in rows:
        found = (row.differences[name] for name in RUNTIMES)
        cells = (value if isinstance(value, str) else f"{value:.1g}" for value in found)
        made.add_row(row.name, row.forms, *cells)
    return [made]


SECTION = Section("written models in other runtimes", measure, tables)
