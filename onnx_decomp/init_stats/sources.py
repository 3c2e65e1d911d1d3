"""Snapshots of initial weights: which tensors a file holds, without reading them yet, and never unpickling.

Every reader yields `Entry` values. Sizes are checked against budgets before anything is allocated.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import IO, Any, Literal, cast

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from onnx_decomp import model_io
from onnx_decomp.errors import InputError
from onnx_decomp.init_stats.names import STORED_IN_OUT, STORED_OUT_IN, Names, module_scopes, site_names, split
from onnx_decomp.sites import GraphIndex, Site, find_sites, read_affine

Layout = Literal["canonical", "out-in", "in-out", "unknown"]

MAX_ENTRIES = 200_000
MIN_BUDGET = 4 << 30
"""An archive may unpack to this many bytes, or to four times its own size where that is more."""

_FLOATS = frozenset({"float16", "float32", "float64", "bfloat16"})
_DAMAGED = (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, RuntimeError, SyntaxError)
_SAFETENSORS_TYPES = {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Entry:
    """One tensor of a snapshot, not read yet.

    layout: "canonical" is [K, N] for certain, the others are what the framework's naming suggests.
    """

    name: str
    names: Names
    shape: tuple[int, ...]
    dtype: str
    layout: Layout
    load: Callable[[], NDArray[Any]]
    file: Path

    @property
    def is_matrix(self) -> bool:
        """It can be the initial value of a weight at all."""
        return self.dtype in _FLOATS and len(self.shape) == 2

    def read(self) -> NDArray[np.float32]:
        """Its values as float32. Raises InputError if they can't be read, are no floats, NaN or infinite."""
        if self.dtype not in _FLOATS:
            raise InputError(
                f"{self.file}: entry {self.name!r} holds {self.dtype}, not floats; save it as float32"
            )
        array = np.asarray(self.load())
        with np.errstate(over="ignore"):  # what float32 can't hold is reported next
            values = array.astype(np.float32)
        if not np.isfinite(values).all():
            raise InputError(
                f"{self.file}: entry {self.name!r} holds NaN or infinity; save the weights before training"
            )
        return values


def read_entries(path: Path) -> list[Entry]:
    """Tensors of a `.npz`, `.safetensors` or `.onnx` snapshot, sorted by name: their order in it is moot.

    Raises InputError for a file that is missing, of another kind or damaged.
    """
    readers = {".npz": _npz, ".safetensors": _safetensors, ".onnx": _onnx}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"{path}: unknown kind of statistics; give .npz, .safetensors, .onnx or .json"
            " (a torch checkpoint: save its state dict with safetensors)"
        )
    if not path.is_file():
        raise InputError(f"{path}: no such file; check --init")
    return sorted(reader(path), key=lambda entry: entry.name)


def _named(
    path: Path, name: str, shape: tuple[int, ...], dtype: str, load: Callable[[], NDArray[Any]]
) -> Entry:
    scope, leaf = split(name)
    layout: Layout = "out-in" if leaf in STORED_OUT_IN else "in-out" if leaf in STORED_IN_OUT else "unknown"
    return Entry(name, Names((name,), (scope,)), shape, dtype, layout, load, path)


@contextmanager
def _unpacking(path: Path) -> Iterator[None]:
    """Whatever a damaged archive makes zipfile and numpy raise becomes one line."""
    try:
        yield
    except (
        zipfile.BadZipFile,
        zlib.error,
        ValueError,
        OSError,
        EOFError,
        RuntimeError,
        SyntaxError,
    ) as error:
        raise InputError(
            f"{path}: not a sound .npz archive ({_line(error)}); save it again with numpy.savez"
        ) from error


def _npz(path: Path) -> list[Entry]:
    with _unpacking(path), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        declared = sum(member.file_size for member in members)
        budget = max(MIN_BUDGET, 4 * path.stat().st_size)
        if len(members) > MAX_ENTRIES or declared > budget:
            raise InputError(
                f"{path}: {len(members)} entries that unpack to {declared} bytes, over the budget of"
                f" {MAX_ENTRIES} entries and {budget} bytes; save only weights, with numpy.savez"
            )
        if len({member.filename for member in members}) < len(members):
            raise InputError(f"{path}: two entries have the same name; save it again with numpy.savez")
        return [_npz_entry(path, archive, member) for member in members]


def _npz_entry(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Entry:
    name = member.filename.removesuffix(".npy")
    if name == member.filename:
        raise InputError(
            f"{path}: {name!r} is not an array; save the weights with numpy.savez"
            " (a torch checkpoint: with safetensors)"
        )
    with archive.open(member) as file:
        shape, dtype = _npy_header(file)
        if dtype.hasobject:
            raise InputError(
                f"{path}: entry {name!r} holds pickled objects, never read; save arrays of floats"
            )
        if min(shape, default=0) < 0 or file.tell() + prod(shape) * dtype.itemsize != member.file_size:
            raise InputError(f"{path}: entry {name!r} is not as long as its header says; save it again")
    return _named(path, name, shape, dtype.name, partial(_npz_read, path, member.filename))


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"array format {version}")
    return tuple(shape), dtype


def _npz_read(path: Path, member: str) -> NDArray[Any]:
    with _unpacking(path), zipfile.ZipFile(path) as archive, archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _safetensors(path: Path) -> list[Entry]:
    try:
        with safe_open(path, framework="numpy") as file:
            found = [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118  not a mapping
            headers = [(name, tuple(part.get_shape()), str(part.get_dtype())) for name, part in found]
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a sound .safetensors file ({_line(error)}); save it again") from error
    return [
        _named(
            path, name, shape, _SAFETENSORS_TYPES.get(dtype, dtype), partial(_safetensors_read, path, name)
        )
        for name, shape, dtype in headers
    ]


def _safetensors_read(path: Path, name: str) -> NDArray[Any]:
    with safe_open(path, framework="numpy") as file:
        array = file.get_tensor(name)
    # Releases without bfloat16 hand out its bits.
    return cast(NDArray[Any], array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array)


def _onnx(path: Path) -> list[Entry]:
    """The sites of the untrained export, one entry for each stored weight, in canonical view."""
    file = model_io.load(path)
    index = GraphIndex.build(file.proto, partial(model_io.read_tensor, file))
    sites = [site for site in find_sites(index) if site.obstacle not in ("nested-graph", "empty-weight")]
    scopes = module_scopes(index, sites)
    entries: dict[str, Entry] = {}
    for site in sites:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(index.stored[site.weight].data_type).name
        names, load = site_names(site, scopes.get(site.index)), partial(_onnx_read, path, index, site)
        entries.setdefault(site.weight, Entry(site.weight, names, site.shape, dtype, "canonical", load, path))
    return list(entries.values())


def _onnx_read(path: Path, index: GraphIndex, site: Site) -> NDArray[Any]:
    try:
        return read_affine(index, site).weight
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
