"""Temporary files: of large arrays, and of what is written before it takes its place.

What holds an array for every site of a model would otherwise hold the model, several times over. Pages of a mapped file
can be dropped at any time and read again. The file has no name, so that it goes with the last array that uses it,
however the process ends.

What needs a name is locked by the process that made it. A process that is killed leaves it behind, without the lock:
the next one that works there removes it.
"""

from __future__ import annotations

import mmap
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnx_decomp.errors import InputError

try:
    import fcntl
    import resource
except ImportError:  # Windows has no such locks, there nothing is found to be left behind; and no such limits
    fcntl = resource = None  # type: ignore[assignment]

LARGE = 4 * 2**20
"""Bytes from which an array goes to a file."""

FOLDER, BESIDE = "onnx-decomp.", ".onnx-decomp."
"""What names of temporary folders, and of files beside an output, begin with."""

YOUNG = 60.0
"""Seconds for which a new file is left alone: it may be about to be locked."""

Scalar = TypeVar("Scalar", bound=np.generic)


def kept(array: NDArray[Scalar], least: int = LARGE) -> NDArray[Scalar]:
    """The same array, read-only and in a file if it has `least` bytes; as it is where a file holds it already.

    Raises InputError where no file can be written.
    """
    if array.nbytes < least or array.dtype.hasobject or mapped(array):
        return array
    _allow_many()
    try:
        with tempfile.TemporaryFile() as file:
            np.ascontiguousarray(array).tofile(file)
            held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        reason = f"{error.strerror or error}: free some space, or set TMPDIR"
        raise InputError(f"{tempfile.gettempdir()}: no temporary file can be written: {reason}") from error
    return np.ndarray(array.shape, array.dtype, held)


@cache
def _allow_many() -> None:
    """Every mapped file counts as an open one, and most systems allow a process only some hundreds unless it asks."""
    if resource is not None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(ValueError, OSError):  # some systems have a lower limit than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def mapped(array: NDArray[Any]) -> bool:
    """Whether an array is, or is a view of, a mapped file."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, mmap.mmap)


@contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder (in TMPDIR), removed after the block with all that it holds."""
    remove_abandoned(Path(tempfile.gettempdir()), FOLDER)
    with (
        tempfile.TemporaryDirectory(prefix=FOLDER, ignore_cleanup_errors=True) as made,
        claimed(Path(made)),
    ):
        yield Path(made)


def beside(final: Path) -> Path:
    """A name for a file that is to be renamed to `final` once it is whole."""
    return final.with_name(f"{BESIDE}{secrets.token_hex(8)}.tmp")


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """In the block, the file or folder is not abandoned. The claim ends with the process, however that ends."""
    handle = _locked(path)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove files and folders of such names that processes of this user made, were killed, and left behind."""
    if fcntl is None:
        return
    for path in parent.glob(f"{prefix}*"):
        with suppress(OSError):  # others may be at it, too
            found = path.lstat()
            if found.st_uid != os.getuid() or time.time() - found.st_mtime < YOUNG:
                continue
            handle = _locked(path)
            if handle is None:
                continue
            try:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            finally:
                os.close(handle)


def _locked(path: Path) -> int | None:
    """A lock on a file or folder, by what it is opened as; None where another process has it, or there are none."""
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
