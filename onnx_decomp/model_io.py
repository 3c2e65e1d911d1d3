"""Model files: read without pulling external data into memory, written whole or not at all.

A model file is untrusted. Its external data may only be regular files inside the model's own folder,
and a tensor must fit in the file that it points to; both are checked before anything is read.
"""

from __future__ import annotations

import hashlib
import math
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_decomp import guards
from onnx_decomp.errors import InputError

MAX_PROTO = 2**31 - 1  # bytes that one protobuf message can hold

_EXTERNAL_KEYS = frozenset({"location", "offset", "length", "checksum"})
_FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"})
_BITS = {"INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4}
"""Types whose elements share bytes."""


@dataclass(frozen=True)
class ModelFile:
    """A model that passed the guards. `proto` has no external data in it and is never changed by anyone.

    path: None for a model from memory. folder: where its external data lies. sha256: of the file itself.
    size: bytes of the file and of the external files that it references.
    """

    path: Path | None
    folder: Path
    proto: onnx.ModelProto
    sha256: str
    size: int

    @property
    def external(self) -> tuple[str, ...]:
        """Locations of its external files, relative to `folder`, sorted."""
        return external_files(self.proto)


@dataclass(frozen=True)
class Place:
    """Where an external tensor's bytes are."""

    path: Path
    offset: int
    length: int


def load(path: Path) -> ModelFile:
    """Read a model. Raises InputError for what is not a sound ONNX model with its external data in place."""
    data = _read(path)
    proto = _parse(data, path)
    _guard(proto, path.parent, str(path))
    _check(proto, path)
    beside = sum((path.parent / name).stat().st_size for name in external_files(proto))
    return ModelFile(path, path.parent, proto, hashlib.sha256(data).hexdigest(), len(data) + beside)


def from_proto(proto: onnx.ModelProto) -> ModelFile:
    """A model from memory, which the caller must not change meanwhile. Its tensors have to be in it.

    Raises InputError as `load` does, and for external data or more than 2 GB.
    """
    if external_files(proto):
        raise InputError("the model refers to external data: pass its path instead of the ModelProto")
    data = serialize(proto)
    _guard(proto, Path(), "the model")
    _check(proto, None)
    return ModelFile(None, Path(), proto, hashlib.sha256(data).hexdigest(), len(data))


def opset(proto: onnx.ModelProto) -> int:
    """Version of the standard operators that the model asks for; 0 if it asks for none."""
    versions = (item.version for item in proto.opset_import if item.domain in ("", "ai.onnx"))
    return max(versions, default=0)


def parameters(proto: onnx.ModelProto) -> int:
    """Elements of all floating-point tensors in the model, Constant nodes and nested graphs included."""
    return sum(math.prod(tensor.dims) for tensor in tensors(proto) if _type_name(tensor) in _FLOATS)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that the model stores: initializers and attributes, of nested graphs and functions too."""
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        for node in function.node:
            yield from _node_tensors(node)
    for training in proto.training_info:
        yield from _graph_tensors(training.initialization)
        yield from _graph_tensors(training.algorithm)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    """Recursion ends: protobuf itself refuses messages nested more than 100 deep."""
    for item in node.attribute:
        if item.HasField("t"):
            yield item.t
        yield from item.tensors
        for sparse in (item.sparse_tensor, *item.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        if item.HasField("g"):
            yield from _graph_tensors(item.g)
        for graph in item.graphs:
            yield from _graph_tensors(graph)


def external_files(proto: onnx.ModelProto) -> tuple[str, ...]:
    """Locations of the external files that the model references, sorted."""
    found = {external_entries(tensor).get("location", "") for tensor in tensors(proto) if is_external(tensor)}
    return tuple(sorted(found))


def read_tensor(file: ModelFile, tensor: onnx.TensorProto) -> NDArray[Any]:
    """Values of a tensor of `file`, shaped as its dims; mapped read-only, not loaded, if external.

    bfloat16 and 8-bit floats come as ml_dtypes. Raises InputError where the bytes don't make the tensor.
    """
    try:
        if not is_external(tensor):
            return np.asarray(onnx.numpy_helper.to_array(tensor))
        place = locate(tensor, file.folder)
        if _type_name(tensor) in _BITS:  # onnx knows how to unpack them
            packed = np.fromfile(place.path, np.uint8, place.length, offset=place.offset)
            loose = onnx.TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=packed.tobytes())
            return np.asarray(onnx.numpy_helper.to_array(loose))
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if place.length == 0:
            return np.empty(tuple(tensor.dims), dtype)
        mapped = np.memmap(place.path, dtype, "r", place.offset, tuple(tensor.dims))
        return mapped.view(np.ndarray)
    except (ValueError, TypeError, KeyError, OSError, OverflowError) as error:
        why = f"{reason(error)}; export the model again"
        raise InputError(f"tensor {tensor.name!r} can't be read: {why}") from error


def _read(path: Path) -> bytes:
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise InputError(f"{path}: a folder or a device, not a file: give an .onnx file")
        if not 0 < info.st_size <= MAX_PROTO:
            raise InputError(f"{path}: empty, or over 2 GB in one file: export it again, with external data")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read: {reason(error)}: check the path") from error


def serialize(proto: onnx.ModelProto) -> bytes:
    """The same bytes for the same message."""
    try:
        return bytes(proto.SerializeToString(deterministic=True))
    except Exception as error:  # protobuf's own kinds of error differ between its versions
        raise InputError("the model has over 2 GB embedded: save it with external data first") from error


def _parse(data: bytes, path: Path) -> onnx.ModelProto:
    try:
        return onnx.ModelProto.FromString(data)  # type: ignore[no-any-return]
    except Exception as error:
        raise InputError(f"{path}: not an ONNX model, or cut short: export or copy it again") from error


def _guard(proto: onnx.ModelProto, folder: Path, where: str) -> None:
    """What has to hold before anything reads the model: it is one, within budget, its data in its folder."""
    if not proto.HasField("graph") or not proto.opset_import:
        raise InputError(f"{where}: not an ONNX model (no graph or no opset in it): export it again")
    guards.check_messages(proto, where)
    guards.check_functions(proto, where)
    guards.check_sizes([*proto.graph.input, *proto.graph.value_info, *proto.graph.output])
    for tensor in tensors(proto):
        if is_external(tensor):
            locate(tensor, folder)


def _check(proto: onnx.ModelProto, path: Path | None) -> None:
    """onnx's checker, by path where there is one, so that it sees the external data too."""
    contrib = "com.microsoft"  # the checker insists on an import of it; ONNX Runtime does without
    imported = any(item.domain == contrib for item in proto.opset_import)
    if not imported and any(node.domain == contrib for node in proto.graph.node):
        completed = onnx.ModelProto()
        completed.CopyFrom(proto)
        completed.opset_import.add(domain=contrib, version=1)
        proto, path = completed, None
    try:
        onnx.checker.check_model(proto if path is None else str(path))
    except Exception as error:
        raise InputError(f"{path or 'the model'}: not a valid ONNX model: {reason(error)}") from error


def is_external(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def external_entries(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data if entry.key in _EXTERNAL_KEYS}


def _type_name(tensor: onnx.TensorProto) -> str:
    return str(onnx.TensorProto.DataType.Name(tensor.data_type))


def locate(tensor: onnx.TensorProto, folder: Path) -> Place:
    """Where an external tensor's bytes are. Raises InputError unless in a file of the model's own folder."""
    entries = external_entries(tensor)
    location = entries.get("location", "")
    path = _inside(location, folder, tensor.name)
    where = f"tensor {tensor.name!r} in {location!r}"
    if sum(entry.key in _EXTERNAL_KEYS for entry in tensor.external_data) > len(entries):
        raise InputError(f"{where}: an entry of its external data is there twice: export the model again")
    try:
        whole = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        bits = _BITS.get(_type_name(tensor), whole)
        offset = int(entries.get("offset", 0))
        length = -(-math.prod(tensor.dims) * bits // 8)
        stated = int(entries.get("length", length))
    except (ValueError, KeyError) as error:
        raise InputError(f"{where}: bad type, offset or length: export the model again") from error
    if tensor.data_type == onnx.TensorProto.STRING or any(dim < 0 for dim in tensor.dims):
        raise InputError(f"{where}: no such tensor can be external: export the model again")
    if stated != length or offset < 0 or offset + length > path.stat().st_size:
        raise InputError(f"{where}: not {length} bytes at {offset} as its shape asks: export the model again")
    return Place(path, offset, length)


def _inside(location: str, folder: Path, tensor: str) -> Path:
    """The regular file that a location names, if it is one of the model's folder and of nobody else's."""
    where = f"tensor {tensor!r}: external data {location!r}"
    relative = PurePosixPath(location)
    hidden = "\0" in location or "\\" in location or ":" in location
    if not location or hidden or relative.is_absolute() or ".." in relative.parts:
        raise InputError(f"{where} is not a plain path inside the model's folder: export the model again")
    path = folder
    try:
        info = path.lstat()
        for part in relative.parts:
            path = path / part
            info = path.lstat()
            if stat.S_ISLNK(info.st_mode):
                raise InputError(
                    f"{where} is or goes through a symbolic link: copy the file beside the model"
                )
    except (OSError, ValueError) as error:
        raise InputError(f"{where} is missing: put it beside the model ({reason(error)})") from error
    if not stat.S_ISREG(info.st_mode):
        raise InputError(f"{where} is not a regular file: put the data beside the model")
    if info.st_nlink > 1:
        raise InputError(f"{where} is a hard link, shared with another name: copy it beside the model")
    return path


def reason(error: BaseException) -> str:
    """What an exception says, in one line of bearable length."""
    told = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = " ".join(str(told).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
