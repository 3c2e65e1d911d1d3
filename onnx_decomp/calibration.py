"""Calibration data: samples of a model's inputs, in three parts that never mix.

*fit* gives moments and refits, *select* plans and rolls back, *report* is used once, for the final figures.
The first axis of every array counts samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_decomp import archives, guards
from onnx_decomp.errors import CannotVerifyError, InputError
from onnx_decomp.options import Shape

Part = Literal["fit", "select", "report"]
Feeds = dict[str, NDArray[Any]]

MIN_SAMPLES = 8
_FREE_DIM = 8
"""Size that synthetic inputs give to a dim the model leaves open."""

_RENAMING = frozenset({"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten"})
"""Operators after which an index still is the same index."""


@dataclass(frozen=True)
class Data:
    """parts: arrays by input name, in each part. fixed: samples of every run, where the model fixes that."""

    kind: Literal["calibration", "synthetic", "none"]
    parts: Mapping[Part, Feeds] = field(default_factory=dict)
    fixed: int | None = None
    warnings: tuple[str, ...] = ()

    def samples(self, part: Part) -> int:
        return next((len(array) for array in self.parts.get(part, {}).values()), 0)

    def batches(self, part: Part, size: int) -> Iterator[Feeds]:
        """Feeds of at most `size` samples, in order; of `fixed` samples where set, a remainder dropped."""
        total, step = self.samples(part), self.fixed or size
        for start in range(0, total - step + 1 if self.fixed else total, step):
            yield {name: array[start : start + step] for name, array in self.parts[part].items()}


NO_DATA = Data("none")


@dataclass(frozen=True)
class _Input:
    """A graph input that has to be fed; shape: None or a symbol where a dim is free."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


def load(path: Path, proto: onnx.ModelProto, seed: int) -> Data:
    """Samples from an .npz file of input name -> array, or from a folder of such files, in order of name.

    Raises InputError for files, names, types, shapes or values that don't fit the model, and too few samples.
    """
    wanted = _inputs(proto)
    fixed = _fixed(wanted)
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: no .npz file in this folder: save input name -> array with numpy.savez")
    loaded = [_load_file(file, wanted) for file in files]
    extra = sorted({name for _, names in loaded for name in names})
    arrays = {item.name: _join([feeds[item.name] for feeds, _ in loaded], item, path) for item in wanted}
    total = len(next(iter(arrays.values())))
    needed = max(MIN_SAMPLES, 3 * (fixed or 1))
    if total < needed:
        raise InputError(f"{path}: {total} samples, at least {needed} are needed: give more")
    warnings = (f"{path}: not inputs of the model, ignored: {', '.join(map(repr, extra))}",) if extra else ()
    return Data("calibration", _split(arrays, total, fixed, seed), fixed, warnings)


def synthetic(proto: onnx.ModelProto, samples: int, seed: int) -> Data:
    """Made-up inputs that respect types, shapes, index ranges and masks as far as the graph tells.

    Raises CannotVerifyError for inputs that can't be made up.
    """
    try:
        wanted = _inputs(proto)
        fixed = _fixed(wanted)
    except InputError as error:
        raise CannotVerifyError(f"no synthetic inputs can be made: {error}") from error
    rng = np.random.default_rng(seed)
    total = max(samples, MIN_SAMPLES, 3 * (fixed or 1))
    arrays = {item.name: _made_up(item, proto, total, rng) for item in wanted}
    return Data("synthetic", _split(arrays, total, fixed, seed), fixed)


def shaped(proto: onnx.ModelProto, shape: Shape, seed: int) -> Feeds:
    """Made-up inputs of the shape that is asked for, to measure time with.

    Inputs that it leaves out follow by the names of their dims; the first axis is the same for all that leave it open.
    Raises InputError where the model takes no such shape.
    """
    wanted = {item.name: item for item in _inputs(proto)}
    told, sizes = dict(shape), dict[str, int]()
    samples = 0
    for name, dims in told.items():
        if name not in wanted:
            known = ", ".join(map(repr, wanted))
            raise InputError(f"--shape {name}: no input of the model is called that; it has {known}")
        declared = wanted[name].shape
        fits = len(dims) == len(declared) and all(
            have == want for want, have in zip(declared, dims, strict=True) if isinstance(want, int)
        )
        if not fits:
            takes = "x".join("any" if dim is None else str(dim) for dim in declared)
            raise InputError(
                f"--shape {name}: {'x'.join(map(str, dims))} does not fit, the model takes {takes}"
            )
        sizes |= {want: have for want, have in zip(declared, dims, strict=True) if isinstance(want, str)}
        samples = samples or dims[0]
    rng = np.random.default_rng(seed)
    feeds = {}
    for name, item in wanted.items():
        first, *rest = (dim if isinstance(dim, int) else sizes.get(dim or "") for dim in item.shape)
        asked: tuple[int | None, ...] = told.get(name) or (first or samples, *rest)
        feeds[name] = _made_up(_Input(name, item.dtype, asked), proto, asked[0] or samples, rng)
    return feeds


def _inputs(proto: onnx.ModelProto) -> list[_Input]:
    """What the model has to be fed with. Raises InputError for what no array of samples can be."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    found = [_input(value) for value in proto.graph.input if value.name not in stored]
    if not found:
        raise InputError("the model has no inputs: there is nothing to calibrate it with")
    return found


def _input(value: onnx.ValueInfoProto) -> _Input:
    tensor = value.type.tensor_type
    if not tensor.elem_type or tensor.elem_type == onnx.TensorProto.STRING or not tensor.shape.dim:
        raise InputError(f"input {value.name!r} is not an array of numbers with a first axis for samples")
    shape = tuple(
        # some exporters write -1 for a dim that is free
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else dim.dim_param or None
        for dim in tensor.shape.dim
    )
    return _Input(value.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape)


def _fixed(wanted: list[_Input]) -> int | None:
    """The first dim that the model fixes, None where it is free."""
    sizes = {item.shape[0] for item in wanted if isinstance(item.shape[0], int)}
    if len(sizes) > 1 or 0 in sizes:
        raise InputError(
            f"the model's inputs have different first dims {sorted(sizes)}: samples can't be told"
        )
    return sizes.pop() if sizes else None


def _load_file(file: Path, wanted: list[_Input]) -> tuple[Feeds, list[str]]:
    """Checked arrays of the inputs, and the names of what else the file holds."""
    held = {member.name: member for member in archives.members(file)}
    raw = {item.name: held[item.name].read() for item in wanted if item.name in held}
    missing = [item.name for item in wanted if item.name not in raw]
    if missing:
        expected = ", ".join(repr(item.name) for item in wanted)
        raise InputError(f"{file}: no array {missing[0]!r}: the model's inputs are {expected}")
    feeds = {item.name: _checked(raw[item.name], item, f"{file}: {item.name!r}") for item in wanted}
    counts = {name: len(array) for name, array in feeds.items()}
    if len(set(counts.values())) > 1:
        raise InputError(f"{file}: the inputs have different numbers of samples: {counts}")
    return feeds, [name for name in held if name not in feeds]


def _checked(array: NDArray[Any], item: _Input, where: str) -> NDArray[Any]:
    """The array in the input's own type. Raises InputError where shape, type or values don't fit."""
    shape = ("samples", *item.shape[1:])
    fits = array.ndim == len(shape) and all(
        want == have
        for want, have in zip(item.shape[1:], array.shape[1:], strict=False)
        if isinstance(want, int)
    )
    if not fits:
        told = ", ".join("any" if dim is None else str(dim) for dim in shape)
        raise InputError(f"{where} has shape {array.shape}, the model takes ({told})")
    floats = [np.issubdtype(kind, np.floating) or kind.kind == "V" for kind in (array.dtype, item.dtype)]
    if (
        floats[0] != floats[1]
        or (array.dtype == bool) != (item.dtype == bool)
        or array.dtype.kind not in "fiub"
    ):
        raise InputError(f"{where} is {array.dtype}, the model takes {item.dtype}: convert it")
    with np.errstate(over="ignore"):
        cast = array.astype(item.dtype)
    if floats[1] and not np.isfinite(cast).all():
        raise InputError(f"{where} holds NaN or infinity as {item.dtype}: leave those samples out")
    if not floats[1] and not np.array_equal(cast, array):
        raise InputError(f"{where} holds values that {item.dtype} can't: convert it")
    return cast


def _join(arrays: list[NDArray[Any]], item: _Input, path: Path) -> NDArray[Any]:
    if len({array.shape[1:] for array in arrays}) > 1:
        raise InputError(
            f"{path}: {item.name!r} has another shape in each file: pad the samples to one shape"
        )
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _split(arrays: Feeds, total: int, fixed: int | None, seed: int) -> dict[Part, Feeds]:
    """A random fifth for *select*, another for *report* (whole runs of the model), the rest for *fit*."""
    unit = fixed or 1
    held = max(1, round(total // unit / 5)) * unit
    order = np.random.default_rng(seed).permutation(total)
    rows: dict[Part, NDArray[np.intp]] = {
        "fit": np.sort(order[2 * held :]),
        "select": np.sort(order[:held]),
        "report": np.sort(order[held : 2 * held]),
    }
    return {part: {name: array[chosen] for name, array in arrays.items()} for part, chosen in rows.items()}


def _made_up(item: _Input, proto: onnx.ModelProto, total: int, rng: np.random.Generator) -> NDArray[Any]:
    """Samples for one input [total, ...]: a mask of a valid start, indices of a table, or standard normal."""
    shape = (total, *(dim if isinstance(dim, int) else _FREE_DIM for dim in item.shape[1:]))
    if math.prod(shape) * item.dtype.itemsize > guards.MAX_TENSOR:
        raise CannotVerifyError(
            f"no synthetic inputs can be made: {total} samples of {item.name!r} are too large"
        )
    if "mask" in item.name.lower() and len(shape) > 1:
        valid = rng.integers(max(1, shape[-1] // 2), shape[-1] + 1, (*shape[:-1], 1))
        return (np.arange(shape[-1]) < valid).astype(item.dtype)
    if item.dtype.kind in "biu":
        return rng.integers(0, _table(item.name, proto) or 2, shape).astype(item.dtype)
    return rng.standard_normal(shape).astype(item.dtype)


def _table(name: str, proto: onnx.ModelProto) -> int | None:
    """Rows of the smallest constant table that the input indexes, None if it indexes none."""
    tables = {tensor.name: tensor for tensor in proto.graph.initializer}
    names, sizes = {name}, []
    for node in proto.graph.node:  # in topological order: what only renames the input comes before its use
        if node.op_type == "Constant":
            tables.update((node.output[0], item.t) for item in node.attribute if item.name == "value")
        elif node.op_type in _RENAMING and node.input[0] in names:
            names.add(node.output[0])
        elif node.op_type == "Gather" and node.input[1] in names and node.input[0] in tables:
            axis = next((item.i for item in node.attribute if item.name == "axis"), 0)
            sizes.append(tables[node.input[0]].dims[axis])
    return min(sizes, default=None)
