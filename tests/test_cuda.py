"""What only a GPU can tell: the same outputs there, no operator beside it, and bfloat16, which no CPU computes.

Everything else runs on both: the planted models of tests/test_end_to_end.py, and `python -m models.bench_cuda`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from models.planted import Planted, build, calibration
from onnx_decomp import Options, decompose
from onnx_decomp.calibrating import calibrate
from onnx_decomp.profiling import profile
from onnx_decomp.runtime import cuda_problem, open_session
from tests.test_golden import CASES, emitted

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(cuda_problem() is not None, reason=f"no CUDA: {cuda_problem()}"),
]

EXACT = ("CUDAExecutionProvider", {"use_tf32": "0"})
"""Products of float32 in float32."""

ROUNDING = {"float32": 1e-5, "float16": 2e-3}


@pytest.mark.parametrize("name", CASES)
def test_every_form_computes_the_same_on_both(name: str) -> None:
    written, feeds = emitted(name)
    expected = open_session(written).run(feeds)
    session = ort.InferenceSession(written.SerializeToString(), providers=[EXACT])
    (found,) = session.run(None, feeds)
    (wide,) = (array.astype(np.float64) for array in expected.values())
    assert np.linalg.norm(found - wide) <= ROUNDING[CASES[name].spec.dtype] * np.linalg.norm(wide)


@pytest.mark.parametrize("name", CASES)
def test_no_operator_of_any_form_falls_back(name: str) -> None:
    written, feeds = emitted(name)
    opener = partial(_profiled, written)
    assert {where for _, where in profile(opener, feeds, 1).operators} == {"cuda"}


def _profiled(model: onnx.ModelProto, file: Path) -> object:
    return open_session(model, provider="cuda", profile=file)


@pytest.mark.parametrize("name", CASES)
def test_every_form_can_be_recorded(name: str) -> None:
    """A CUDA graph for each set of buffers; runs beside it are not part of it."""
    written, feeds = emitted(name)
    session = open_session(written, provider="cuda", cuda_graph=True)
    expected = open_session(written, provider="cuda").run(feeds)
    few = {key: array[:2] for key, array in feeds.items()}
    recorded = [session.bound(feeds), session.bound(few)]
    for _ in range(4):
        for once in recorded:
            once()
        found = session.run(feeds)
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key], array)


def test_a_recorded_run_writes_what_a_run_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    written, feeds = emitted("batched_chain")
    session = open_session(written, provider="cuda", cuda_graph=True)
    (expected,) = session.run(feeds).values()
    bindings: list[ort.IOBinding] = []
    bind = session.handle.io_binding
    monkeypatch.setattr(session.handle, "io_binding", lambda: bindings.append(bind()) or bindings[-1])
    once = session.bound(feeds)
    for _ in range(5):
        once()
    (found,) = bindings[0].get_outputs()
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("activation", ["Relu", "Tanh"])
def test_bfloat16_is_compiled(activation: str, tmp_path: Path) -> None:
    planted = build(Planted((64, 128, 64), off="zero", gain=3, dtype="bfloat16", activation=activation))  # type: ignore[arg-type]
    x = calibration(planted, 400)["x"].astype(np.float32)
    np.savez(tmp_path / "calib.npz", x=x)
    asked = Options(provider="cuda", latency_gate=False, objective="flops", tolerance=0.02)
    done = decompose(planted.model, calib=tmp_path / "calib.npz", options=asked)
    assert [site["decision"] for site in done.report["sites"]] == ["split", "split"]
    before, after = (open_session(each, provider="cuda") for each in (planted.model, done.model))
    expected, found = (each.run({"x": x[:32]})["y"] for each in (before, after))
    assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


def test_the_gate_times_recorded_runs_at_every_shape(tmp_path: Path) -> None:
    planted = build(Planted((256, 512, 256), off="zero", gain=3, hide="hidden", dtype="float16"))
    np.savez(tmp_path / "calib.npz", **calibration(planted, 400))  # type: ignore[arg-type]
    shapes = tuple((("x", (rows, 256)),) for rows in (1, 128))
    asked = Options(provider="cuda", cuda_graph=True, min_speedup=0.01, shapes=shapes)
    done = decompose(planted.model, calib=tmp_path / "calib.npz", options=asked)
    if done.changed:  # else it is predicted not to be faster
        assert [row["samples"] for row in done.report["latency"]["shapes"]] == [1, 128]


def test_the_cost_model_is_fitted() -> None:
    found = calibrate("cuda", "float16", None, quick=True)
    assert found["provider"] == "cuda"
    assert all(case["measured"] > 0 for case in found["cases"])
