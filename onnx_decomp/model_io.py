"""Model files: read without pulling external data into memory, written whole or not at all.

A model file is untrusted. Its external data may only be regular files inside the model's own folder,
and a tensor must fit in the file that it points to; both are checked before anything is read.
"""

from __future__ import annotations

import filecmp
import hashlib
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_decomp.errors import InputError, UsageError

MAX_NODES = 1_000_000
MAX_PROTO = 2**31 - 1  # bytes that one protobuf message can hold

MAX_EMBEDDED = 3 * 2**29
"""Embedded bytes above which `save` moves large tensors to a file beside the model (1.5 GiB)."""

MOVED = 2**20
"""Bytes from which a tensor is large; shapes and axes stay embedded, where shape inference sees them."""
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
class _Place:
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
    data = _serialize(proto)
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
    found = {_external(tensor).get("location", "") for tensor in tensors(proto) if _is_external(tensor)}
    return tuple(sorted(found))


def read_tensor(file: ModelFile, tensor: onnx.TensorProto) -> NDArray[Any]:
    """Values of a tensor of `file`, shaped as its dims; mapped read-only, not loaded, if external.

    bfloat16 and 8-bit floats come as ml_dtypes. Raises InputError where the bytes don't make the tensor.
    """
    try:
        if not _is_external(tensor):
            return np.asarray(onnx.numpy_helper.to_array(tensor))
        place = _locate(tensor, file.folder)
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
        reason = f"{_reason(error)}; export the model again"
        raise InputError(f"tensor {tensor.name!r} can't be read: {reason}") from error


def check_output(source: Path | None, out: Path) -> None:
    """Whether OUT can be written at all, to be asked before any work. Raises UsageError if not."""
    if not out.parent.is_dir():
        raise UsageError(f"{out}: its folder does not exist: create it or choose another output")
    if out.exists() and not out.is_file():
        raise UsageError(f"{out}: not a regular file: choose another output")
    if source is not None and _same(source, out):
        raise UsageError(f"{out}: the output is the input itself: choose another output")
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"{out}: its folder is read-only: choose another output")


def save(proto: onnx.ModelProto, source: ModelFile, out: Path) -> None:
    """Write a model made from `source` to `out`, and the external files it references, whole or not at all.

    The same `proto` gives the same bytes. Raises UsageError where OUT can't be, InputError if writing fails.
    """
    with _staging(source, out, external_files(proto)) as stage:
        embedded = [tensor for tensor in tensors(proto) if len(tensor.raw_data) >= MOVED]
        if sum(len(tensor.raw_data) for tensor in embedded) > MAX_EMBEDDED:
            name = f"{out.name}.data"
            name = f"{out.name}.decomp.data" if name in source.external else name
            proto = _move_out(proto, stage(out.with_name(name)), name)
        stage(out).write_bytes(_serialize(proto))


def copy(source: ModelFile, out: Path) -> None:
    """Write `source` itself, byte for byte, with its external files; otherwise as `save`."""
    with _staging(source, out, source.external) as stage:
        if source.path is None:
            stage(out).write_bytes(_serialize(source.proto))
        else:
            shutil.copyfile(source.path, stage(out))


class _Stage(dict[Path, Path]):
    """Final path -> temporary path beside it. Called with a final path, it makes the temporary one."""

    def __call__(self, final: Path) -> Path:
        self[final] = final.with_name(f".onnx-decomp-{secrets.token_hex(8)}.tmp")
        return self[final]


@contextmanager
def _staging(source: ModelFile, out: Path, external: tuple[str, ...]) -> Iterator[_Stage]:
    """Files written under temporary names in the block appear together after it; none if anything fails.

    Copies of the `external` files of `source` come first, `out` last: nobody sees OUT without its data.
    """
    check_output(source.path, out)
    if any(_same(source.folder / name, out) for name in source.external):
        raise UsageError(f"{out}: the output is a data file of the input: choose another output")
    stage = _Stage()
    try:
        for name in external:
            _stage_data(source.folder / name, out.parent / name, stage)
        if out in stage:
            raise UsageError(f"{out}: the model's own data file is called that: choose another output")
        yield stage
        for temporary in stage.values():
            _sync(temporary)
        for final, temporary in stage.items():
            os.replace(temporary, final)
        for folder in {final.parent for final in stage}:
            _sync(folder)
    except OSError as error:
        raise InputError(f"{out}: can't be written: {_reason(error)}; nothing was written") from error
    finally:
        for temporary in stage.values():
            temporary.unlink(missing_ok=True)


def _stage_data(data: Path, final: Path, stage: _Stage) -> None:
    """Stage a copy of an external file, unless it is there already."""
    if not final.exists():
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data, stage(final))
    elif not _same(data, final) and not filecmp.cmp(data, final, shallow=False):
        raise InputError(f"{final}: the model's data has to go there, another file is there: move that away")


def _same(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)


def _sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    if path.is_dir() and os.name != "posix":
        return  # other systems can't open a folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _move_out(proto: onnx.ModelProto, path: Path, name: str) -> onnx.ModelProto:
    """A copy of `proto` whose large tensors lie in `path`, to be called `name`, each on a page of its own."""
    moved = onnx.ModelProto()
    moved.CopyFrom(proto)
    with path.open("wb") as file:
        for tensor in tensors(moved):
            if len(tensor.raw_data) < MOVED:
                continue
            file.seek(-(-file.tell() // 4096) * 4096)
            offset, length = file.tell(), file.write(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", name), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
    return moved


def _read(path: Path) -> bytes:
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise InputError(f"{path}: a folder or a device, not a file: give an .onnx file")
        if not 0 < info.st_size <= MAX_PROTO:
            raise InputError(f"{path}: empty, or over 2 GB in one file: export it again, with external data")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read: {_reason(error)}: check the path") from error


def _serialize(proto: onnx.ModelProto) -> bytes:
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
    if len(proto.graph.node) > MAX_NODES:
        raise InputError(f"{where}: more than {MAX_NODES} nodes: split the model first")
    for tensor in tensors(proto):
        if _is_external(tensor):
            _locate(tensor, folder)


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
        raise InputError(f"{path or 'the model'}: not a valid ONNX model: {_reason(error)}") from error


def _is_external(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def _external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data if entry.key in _EXTERNAL_KEYS}


def _type_name(tensor: onnx.TensorProto) -> str:
    return str(onnx.TensorProto.DataType.Name(tensor.data_type))


def _locate(tensor: onnx.TensorProto, folder: Path) -> _Place:
    """Where an external tensor's bytes are. Raises InputError unless in a file of the model's own folder."""
    entries = _external(tensor)
    location = entries.get("location", "")
    path = _inside(location, folder, tensor.name)
    where = f"tensor {tensor.name!r} in {location!r}"
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
    return _Place(path, offset, length)


def _inside(location: str, folder: Path, tensor: str) -> Path:
    """The regular file that a location names, if it is one of the model's folder and of nobody else's."""
    where = f"tensor {tensor!r}: external data {location!r}"
    relative = PurePosixPath(location)
    hidden = "\0" in location or "\\" in location or ":" in location
    if not location or hidden or relative.is_absolute() or ".." in relative.parts:
        raise InputError(f"{where} is not a plain path inside the model's folder: export the model again")
    path = folder
    for part in relative.parts:
        path = path / part
        if path.is_symlink():
            raise InputError(f"{where} is or goes through a symbolic link: copy the file beside the model")
    try:
        info = path.lstat()
    except OSError as error:
        raise InputError(f"{where} is missing: put it beside the model ({_reason(error)})") from error
    if not stat.S_ISREG(info.st_mode):
        raise InputError(f"{where} is not a regular file: put the data beside the model")
    if info.st_nlink > 1:
        raise InputError(f"{where} is a hard link, shared with another name: copy it beside the model")
    return path


def _reason(error: BaseException) -> str:
    """What an exception says, in one line of bearable length."""
    told = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = " ".join(str(told).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
