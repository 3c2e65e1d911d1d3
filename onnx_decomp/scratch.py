"""Large arrays that would be needed again lie in temporary files, mapped read-only, and not in anonymous memory.

What holds an array for every site of a model would otherwise hold the model, several times over. Pages of a mapped file
can be dropped at any time and read again; they go with the last array that uses them.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import weakref
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnx_decomp.errors import InputError

LARGE = 4 * 2**20
"""Bytes from which an array goes to a file."""

Scalar = TypeVar("Scalar", bound=np.generic)


def kept(array: NDArray[Scalar], least: int = LARGE) -> NDArray[Scalar]:
    """The same array, read-only and in a file if it has `least` bytes; as it is where a file holds it already.

    Raises InputError where no file can be written.
    """
    if array.nbytes < least or array.dtype.hasobject or mapped(array):
        return array
    try:
        handle, path = tempfile.mkstemp(dir=_folder())
        with os.fdopen(handle, "wb") as file:
            np.ascontiguousarray(array).tofile(file)
        held = np.memmap(path, array.dtype, "r", shape=array.shape)
    except OSError as error:
        reason = f"{error.strerror or error}: free some space, or set TMPDIR"
        raise InputError(f"{tempfile.gettempdir()}: no temporary file can be written: {reason}") from error
    weakref.finalize(held, _remove, Path(path), os.getpid())
    return held.view(np.ndarray)


def mapped(array: NDArray[Any]) -> bool:
    """Whether an array is, or is a view of, a mapped file."""
    base: Any = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base
    return False


@cache
def _folder() -> Path:
    """Where temporary files go (TMPDIR); removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="onnx-decomp-"))
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(path: Path, owner: int) -> None:
    """Not from a process that was forked off: what it lets go of, its parent may still hold."""
    if os.getpid() != owner:
        return
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
