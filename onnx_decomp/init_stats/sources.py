"""Snapshots of initial weights: which tensors a file holds, without reading them yet, and never unpickling.

Every reader yields `Entry` values. Sizes are checked against budgets before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from onnx_decomp import archives, guards, model_io, trial
from onnx_decomp.errors import InputError
from onnx_decomp.init_stats.names import STORED_IN_OUT, STORED_OUT_IN, Names, module_scopes, site_names, split
from onnx_decomp.sites import GraphIndex, Site, find_sites, read_affine

Layout = Literal["canonical", "out-in", "in-out", "unknown"]

SECONDS = 600.0
"""Telling the shapes of a model may take."""

_FLOATS = frozenset({"float16", "float32", "float64", "bfloat16"})
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


def _npz(path: Path) -> list[Entry]:
    members = archives.members(path)
    for member in members:
        member.refuse_objects()
    return [_named(path, m.name, m.shape, m.dtype.name, m.read) for m in members]


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
    build = partial(GraphIndex.build, file.proto, partial(model_io.read_tensor, file))
    trial.attempt(build, str(path), SECONDS, guards.MAX_TENSOR)
    index = build()
    sites = [site for site in find_sites(index) if site.readable]
    scopes = module_scopes(index, sites)
    entries: dict[str, Entry] = {}
    for site in sites:
        stored = index.stored[site.weight]
        layout: Layout = "unknown" if site.packed else "canonical"
        dtype = onnx.helper.tensor_dtype_to_np_dtype(stored.data_type).name
        names, load = site_names(site, scopes.get(site.index)), partial(_onnx_read, path, index, site)
        if site.packed:
            load = partial(index.read, stored)
        shape = site.packed or site.shape
        entries.setdefault(site.weight, Entry(site.weight, names, shape, dtype, layout, load, path))
    return list(entries.values())


def _onnx_read(path: Path, index: GraphIndex, site: Site) -> NDArray[Any]:
    try:
        return read_affine(index, site).weight
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
