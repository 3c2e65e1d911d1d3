"""ONNX Runtime behind one small door: sessions, what they refuse, and providers that are not there."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from onnx_decomp import driver, runtime
from onnx_decomp.errors import ProviderError
from onnx_decomp.runtime import RunError, cuda_problem, duplicate_runtimes, open_session, resolve_provider
from tests.small import mlp, model, value, weight, write, write_external

X = np.random.default_rng(3).standard_normal((4, 6)).astype(np.float32)


def expected(proto: onnx.ModelProto) -> np.ndarray:
    return np.maximum(X @ weight(proto, "W1"), 0) @ weight(proto, "W2")


def test_ports_and_outputs(tmp_path: Path) -> None:
    for source in (mlp(), write(mlp(), tmp_path / "m.onnx")):
        session = open_session(source, threads=1)
        assert [(port.name, port.dtype, port.shape) for port in session.inputs] == [
            ("x", "float32", ("N", 6))
        ]
        np.testing.assert_allclose(session.run({"x": X})["y"], expected(mlp()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prepack", [True, False])
@pytest.mark.parametrize("optimize", [True, False])
def test_options_do_not_change_what_is_computed(prepack: bool, optimize: bool) -> None:
    session = open_session(mlp(), prepack=prepack, optimize=optimize)
    np.testing.assert_allclose(session.run({"x": X})["y"], expected(mlp()), rtol=1e-5, atol=1e-5)


def test_outputs_by_name() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Neg", ["x"], ["b"])]
    proto = model(nodes, [value("x", ["N", 6])], [value("a", ["N", 6]), value("b", ["N", 6])])
    session = open_session(proto)
    assert list(session.run({"x": X})) == ["a", "b"]
    found = session.run({"x": X}, ["b"], partial=True)
    assert list(found) == ["b"]
    np.testing.assert_array_equal(found["b"], -X)


def test_external_data_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    path = write_external(mlp(), tmp_path / "m.onnx")
    monkeypatch.chdir(tmp_path / "cwd")
    proto = onnx.load(path, load_external_data=False)
    for session in (open_session(path), open_session(proto, folder=tmp_path)):
        np.testing.assert_allclose(session.run({"x": X})["y"], expected(mlp()), rtol=1e-5, atol=1e-5)


def doubled(element: int) -> onnx.ModelProto:
    """y = 2 x, of a type that the CPU provider can only cast."""
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Add", ["wide", "wide"], ["twice"]),
        helper.make_node("Cast", ["twice"], ["y"], to=element),
    ]
    return model(nodes, [value("x", ["N", 6], element)], [value("y", ["N", 6], element)])


@pytest.mark.parametrize("rows", [4, 0])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_bfloat16_goes_in_and_comes_out(dtype: Any, rows: int) -> None:
    """numpy knows no such type: float32 holds every value of it."""
    session = open_session(doubled(onnx.TensorProto.BFLOAT16))
    rounded = X[:rows].astype(ml_dtypes.bfloat16)
    found = session.run({"x": rounded.astype(dtype)})["y"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, 2 * rounded.astype(np.float32))


@pytest.mark.parametrize("element", [onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16])
def test_bound_runs_read_and_write_the_same_buffers(element: int) -> None:
    session = open_session(doubled(element))
    once = session.bound({"x": X.copy()})
    for _ in range(3):  # what was lent for the first run is still there
        gc.collect()
        once()


def test_bound_buffers_hold_what_a_run_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU all runs are like this: the path is that of any provider, so the CPU tells whether it is right."""
    session = open_session(mlp())
    bindings: list[ort.IOBinding] = []
    bind = session.handle.io_binding
    monkeypatch.setattr(session.handle, "io_binding", lambda: bindings.append(bind()) or bindings[-1])
    once = session._bound({"x": X})
    once()
    (written,) = bindings[0].get_outputs()
    place = written.data_ptr()
    once()
    (written,) = bindings[0].get_outputs()
    assert written.data_ptr() == place
    np.testing.assert_allclose(written.numpy(), expected(mlp()), rtol=1e-5, atol=1e-5)


def test_a_bound_run_that_fails_is_one_line() -> None:
    for element in (onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16):
        with pytest.raises(RunError, match="fails to run"):
            open_session(doubled(element)).bound({"x": X[:, :5]})


@pytest.mark.parametrize("feeds", [{}, {"x": X[:, :5]}, {"x": X.astype(np.float64)}, {"q": X}])
def test_a_failing_run_is_one_line(feeds: dict[str, np.ndarray], capfd: pytest.CaptureFixture[str]) -> None:
    session = open_session(mlp())
    with pytest.raises(RunError) as caught:
        session.run(feeds)
    assert "\n" not in str(caught.value)
    assert "ONNXRuntimeError" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_model_that_does_not_load_is_one_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    unknown = helper.make_node("Foo", ["x"], ["y"], domain="com.acme")
    proto = model([unknown], [value("x", ["N", 6])], [value("y", ["N", 6])])
    for source in (proto, tmp_path / "none.onnx"):
        with pytest.raises(RunError, match="can't load") as caught:
            open_session(source)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def fresh_probe() -> None:
    cuda_problem.cache_clear()


@pytest.mark.usefixtures("fresh_probe")
class TestProviders:
    def test_cpu_asks_nobody(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runtime, "cuda_problem", lambda: pytest.fail("probed"))
        assert resolve_provider("cpu") == "cpu"

    def test_cuda_that_is_missing_is_one_line(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(driver, "devices", lambda: ())
        assert resolve_provider("auto") == "cpu"
        with pytest.raises(ProviderError, match=r"CUDA is not available: .*--provider cpu") as caught:
            resolve_provider("cuda")
        assert caught.value.exit_code == 7
        assert capfd.readouterr() == ("", "")

    def test_a_build_without_cuda_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
        assert "pip install onnx-decomp[cuda]" in (cuda_problem() or "")

    @pytest.mark.skipif("CUDAExecutionProvider" not in ort.get_available_providers(), reason="a CPU build")
    def test_missing_libraries_are_named(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        def missing(name: str, mode: int = 0) -> None:
            raise OSError(f"libcublasLt.so: cannot open shared object file {name and mode and ''}")

        monkeypatch.setattr(driver, "devices", lambda: ("a GPU",))
        monkeypatch.setattr(runtime.ctypes, "CDLL", missing)
        assert "libcublasLt.so" in (cuda_problem() or "")
        assert "pip install onnx-decomp[cuda]" in (cuda_problem() or "")
        assert capfd.readouterr() == ("", "")

    def test_no_driver_no_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(driver, "_library", lambda: None)
        assert driver.devices.__wrapped__() == ()
        assert driver.used_bytes() is None

    def test_both_runtimes_installed_is_a_warning(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runtime, "version", lambda _: "1.2")
        assert "onnxruntime 1.2 and onnxruntime-gpu 1.2" in (duplicate_runtimes() or "")

    def test_one_runtime_is_fine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def one(name: str) -> str:
            if name == "onnxruntime":
                raise runtime.PackageNotFoundError(name)
            return "1.2"

        monkeypatch.setattr(runtime, "version", one)
        assert duplicate_runtimes() is None
