"""ONNX Runtime behind one small door: sessions, what they refuse, and providers that are not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from onnx_decomp import runtime
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
        monkeypatch.setattr(runtime, "_devices", lambda _: 0)
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

        monkeypatch.setattr(runtime, "_devices", lambda _: 1)
        monkeypatch.setattr(runtime.ctypes, "CDLL", missing)
        assert "libcublasLt.so" in (cuda_problem() or "")
        assert "pip install onnx-decomp[cuda]" in (cuda_problem() or "")
        assert capfd.readouterr() == ("", "")

    def test_no_driver_no_devices(self) -> None:
        assert runtime._devices("libno-such-driver.so") == 0

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
