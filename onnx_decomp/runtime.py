"""ONNX Runtime: which provider works here, and sessions that fail in one line."""

from __future__ import annotations

import ctypes
import functools
import io
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from onnx_decomp import driver
from onnx_decomp.errors import CannotVerifyError, ProviderError, UsageError
from onnx_decomp.interruption import stoppable
from onnx_decomp.options import Provider

Device = Literal["cpu", "cuda"]
Arrays = Mapping[str, NDArray[Any]]

_PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
NOT_RECORDED = -1
"""What ONNX Runtime calls a run that takes no part in CUDA graphs."""

_FATAL = 4  # ONNX Runtime's log severity: what goes wrong comes as an exception, in one line
_WARNING = 2  # ... and its default


class RunError(CannotVerifyError):
    """ONNX Runtime would not load or run a model."""


@dataclass(frozen=True)
class Port:
    """An input or output. dtype: numpy's name of it; shape: None or a symbol where a dim is free."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


class Session:
    """A model ready to run on one provider.

    numpy knows no bfloat16: inputs of that type are taken as float32 too, outputs are given as float32.
    cuda_graph: whether `bound` runs are recorded, and then started as a whole.
    """

    def __init__(
        self, handle: ort.InferenceSession, provider: Device, threads: int | None, cuda_graph: bool = False
    ) -> None:
        self.handle = handle
        self.provider = provider
        self.threads = threads
        self.cuda_graph = cuda_graph
        self.inputs = tuple(_port(item) for item in handle.get_inputs())
        self.outputs = tuple(_port(item) for item in handle.get_outputs())
        self._narrow = {port.name for port in (*self.inputs, *self.outputs) if port.dtype == "bfloat16"}
        self._recordings = count(1)

    def run(
        self,
        feeds: Arrays,
        outputs: Sequence[str] | None = None,
        *,
        partial: bool = False,
        seconds: float | None = None,
    ) -> dict[str, NDArray[Any]]:
        """The outputs asked for (all by default) by name.

        seconds: after which the run is ended. partial: only the nodes that they need have to run. A hint: ONNX
        Runtime's builds for inference run the whole graph all the same (microsoft/onnxruntime issue 16013).

        Raises RunError where ONNX Runtime refuses the feeds or fails, or time is over.
        """
        names = [port.name for port in self.outputs] if outputs is None else list(outputs)
        options = self._run_options(NOT_RECORDED)
        options.only_execute_path_to_fetches = partial
        started = time.monotonic()
        try:
            with stoppable(lambda: setattr(options, "terminate", True), seconds):
                return dict(zip(names, self._run(names, feeds, options), strict=True))
        except Exception as error:
            if seconds is not None and time.monotonic() - started >= seconds:
                raise RunError(
                    f"the model runs for more than {seconds:.0f} s: is there a Loop without end in it?"
                ) from error
            raise RunError(f"the model fails to run: {_reason(error)}") from error

    def _run(self, names: Sequence[str], feeds: Arrays, options: ort.RunOptions) -> list[Any]:
        if not self._narrow:
            return list(self.handle.run(names, dict(feeds), options))
        values = {name: self._value(name, array) for name, array in feeds.items()}
        return [_array(value) for value in self.handle.run_with_ort_values(names, values, options)]

    def bound(self, feeds: Arrays) -> Callable[[], object]:
        """One run as a server does it, finished when it returns: inputs and outputs stay where they are.

        On CUDA they lie on the device. Raises RunError where ONNX Runtime fails in the first run.
        """
        strings = any(array.dtype.kind in "OSU" for array in feeds.values())
        if strings or (self.provider == "cpu" and not self._narrow):
            self.run(feeds)  # fails in one line if it fails
            return functools.partial(self.handle.run, None, dict(feeds))
        try:
            return self._bound(feeds)
        except Exception as error:
            raise RunError(f"the model fails to run: {_reason(error)}") from error

    def _bound(self, feeds: Arrays) -> Callable[[], object]:
        binding = self.handle.io_binding()
        values = {name: self._value(name, array) for name, array in feeds.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)  # copied to where it is read
        for port in self.outputs:
            binding.bind_output(port.name, self.provider)
        self.handle.run_with_iobinding(binding, self._run_options(NOT_RECORDED))
        for port, value in zip(self.outputs, binding.get_outputs(), strict=True):
            binding.bind_ortvalue_output(port.name, value)
        options = self._run_options(next(self._recordings))

        def once(_lent: object = values) -> None:  # on the CPU the binding reads their memory
            self.handle.run_with_iobinding(binding, options)
            binding.synchronize_outputs()

        return once

    def _run_options(self, recording: int) -> ort.RunOptions:
        """recording: number of the CUDA graph that a run belongs to: one for each set of buffers."""
        options = ort.RunOptions()
        options.log_severity_level = _FATAL
        if self.cuda_graph:
            options.add_run_config_entry("gpu_graph_id", str(recording))
        return options

    def _value(self, name: str, array: NDArray[Any]) -> ort.OrtValue:
        if name not in self._narrow:
            return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        bits = np.ascontiguousarray(array, ml_dtypes.bfloat16).view(np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)


def open_session(
    model: onnx.ModelProto | Path,
    *,
    provider: Device = "cpu",
    threads: int | None = None,
    folder: Path | None = None,
    prepack: bool = True,
    optimize: bool = True,
    profile: Path | None = None,
    cuda_graph: bool = False,
) -> Session:
    """Load a model.

    profile: how the file starts that ONNX Runtime writes its times to. cuda_graph: on CUDA, `bound` runs start all
    kernels at once, as they were recorded in the first ones.

    threads: of one operator; None leaves it to ONNX Runtime. folder: where a ModelProto's external data lies.
    prepack: False leaves external weights in their files and makes no copies of them, slower but bounded in memory.
    Raises RunError where ONNX Runtime refuses the model.
    """
    options = _options(threads, prepack, optimize)
    if folder is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(folder.absolute()))
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    providers: list[Any] = list(_PROVIDERS[provider])
    if provider == "cuda":
        # Sessions that are not timed are many, and stay open side by side: each takes what it needs, no power of two.
        asked = {} if prepack else {"arena_extend_strategy": "kSameAsRequested"}
        providers[0] = providers[0], asked | ({"enable_cuda_graph": "1"} if cuda_graph else {})
    try:
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        with _quiet():
            handle = ort.InferenceSession(
                source,
                options,
                providers=providers,
                enable_fallback=0,
                # A Transpose of a weight, say, would be done beforehand, and its result held.
                disabled_optimizers=[] if prepack else ["ConstantFolding"],
            )
    except Exception as error:
        raise RunError(f"ONNX Runtime can't load the model: {_reason(error)}") from error
    if handle.get_providers()[0] != _PROVIDERS[provider][0]:
        raise RunError(f"ONNX Runtime did not start its {provider} provider: see `resolve_provider`")
    return Session(handle, provider, threads, cuda_graph and provider == "cuda")


def resolve_provider(asked: Provider) -> Device:
    """Where to run; `auto` is CUDA if that works. Raises ProviderError where CUDA must work and can't."""
    if asked == "cpu":
        return "cpu"
    problem = cuda_problem()
    if problem is None:
        return "cuda"
    if asked == "cuda":
        raise ProviderError(f"CUDA is not available: {problem}; or use --provider cpu")
    return "cpu"


def check_recording(asked: bool, provider: Device) -> None:
    """Whether runs can be recorded as CUDA graphs there. Raises UsageError where that was asked for and can't be."""
    if asked and provider != "cuda":
        raise UsageError("--cuda-graph: there are none on the CPU: leave it out, or use --provider cuda")


@cache
def cuda_problem() -> str | None:
    """What keeps ONNX Runtime's CUDA provider from working here and how to mend it, or None.

    Everything is probed before ONNX Runtime is asked for CUDA, which would write its own dump to stderr.
    """
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "this ONNX Runtime is built without it: `pip install onnx-decomp[cuda]`"
    windows = sys.platform == "win32"
    if not driver.devices():
        return "no NVIDIA driver with a GPU was found"
    with _quiet():
        ort.preload_dlls()
    folder = Path(ort.__file__).parent / "capi"
    ours = ("onnxruntime_providers_shared", "onnxruntime_providers_cuda")
    libraries = [str(folder / (f"{name}.dll" if windows else f"lib{name}.so")) for name in ours]
    for library in [*libraries, "cudnn64_9.dll" if windows else "libcudnn.so.9"]:
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            return f"{_reason(error)}: `pip install onnx-decomp[cuda]`"
    try:
        open_session(_smallest_model(), provider="cuda").run({"x": np.ones((1, 1), np.float32)})
    except RunError as error:
        return _reason(error)
    return None


def duplicate_runtimes() -> str | None:
    """A warning if both ONNX Runtime packages are installed: they overwrite each other's files."""
    try:
        found = [f"{name} {version(name)}" for name in ("onnxruntime", "onnxruntime-gpu")]
    except PackageNotFoundError:
        return None
    return f"{' and '.join(found)} overwrite each other: uninstall both, then reinstall the one you want"


def _smallest_model() -> onnx.ModelProto:
    """y = x @ x: what has to run before a provider counts as working (cuBLAS is loaded by it)."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "x"], ["y"])], "probe", [x], [y])
    return onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 13)])


def _options(threads: int | None, prepack: bool, optimize: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.use_deterministic_compute = True
    if threads is not None:
        options.intra_op_num_threads = threads
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False  # what a run needed is given back after it
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Threads that spin after a run would take the cores of the next session's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _port(item: Any) -> Port:
    kind = re.sub(r"tensor\((.*)\)", r"\1", item.type)
    names = {"float": "float32", "double": "float64", "string": "object"}
    return Port(item.name, names.get(kind, kind), tuple(item.shape))


def _array(value: ort.OrtValue) -> Any:
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()
    size = value.tensor_size_in_bytes()
    if not size:
        return np.zeros(value.shape(), np.float32)
    bits = np.frombuffer(ctypes.string_at(value.data_ptr(), size), ml_dtypes.bfloat16)
    return bits.astype(np.float32).reshape(value.shape())


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on stdout or in the log from ONNX Runtime itself, whatever it meets."""
    ort.set_default_logger_severity(_FATAL)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        ort.set_default_logger_severity(_WARNING)


def _reason(error: BaseException) -> str:
    """ONNX Runtime's message without its prefix and paths, in one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"/onnxruntime_src/\S*/", "", text)
    return text if len(text) <= 300 else f"{text[:297]}..."
