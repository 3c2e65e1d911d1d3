"""Arrays in `.npz` archives of strangers: what an archive holds, before anything of it is unpacked.

Sizes are checked against a budget and against what the archive itself says before memory is asked for, and nothing
is ever unpickled.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from onnx_decomp.errors import InputError

MAX_MEMBERS = 200_000
MIN_BUDGET = 2**32
"""An archive may unpack to 4 GiB, or to four times its own size where that is more."""


@dataclass(frozen=True)
class Member:
    """One array of an archive, not read yet. shape, dtype: as its header says, which its length bears out.

    dtype may be that of Python objects, which only a pickle holds: such an array is never read.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def read(self) -> NDArray[Any]:
        """Its values. Raises InputError where the archive is damaged or the array holds objects."""
        self.refuse_objects()
        with _opened(self.path) as archive, archive.open(f"{self.name}.npy") as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    def refuse_objects(self) -> None:
        """Raises InputError where the array holds Python objects."""
        if self.dtype.hasobject:
            raise InputError(
                f"{self.path}: {self.name!r} holds pickled objects, never read; save arrays of numbers"
            )


def members(path: Path) -> list[Member]:
    """The arrays of an archive. Raises InputError for what is none, is damaged, or too large."""
    with _opened(path) as archive:
        entries = archive.infolist()
        declared = sum(entry.file_size for entry in entries)
        budget = max(MIN_BUDGET, 4 * path.stat().st_size)
        if len(entries) > MAX_MEMBERS or declared > budget:
            raise InputError(
                f"{path}: {len(entries)} arrays that unpack to {declared} bytes, over the budget of"
                f" {MAX_MEMBERS} arrays and {budget} bytes; save fewer with numpy.savez"
            )
        if len({entry.filename for entry in entries}) < len(entries):
            raise InputError(f"{path}: two entries have the same name; save it again with numpy.savez")
        return [_member(path, archive, entry) for entry in entries]


def _member(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Member:
    name = entry.filename.removesuffix(".npy")
    if name == entry.filename:
        raise InputError(
            f"{path}: {name!r} is not an array; save arrays with numpy.savez"
            " (a torch checkpoint: with safetensors)"
        )
    with archive.open(entry) as file:
        shape, dtype = _header(file)
        lies = file.tell() + prod(shape) * dtype.itemsize != entry.file_size
        if min(shape, default=0) < 0 or (lies and not dtype.hasobject):
            raise InputError(f"{path}: {name!r} is not as long as its header says; save it again")
    return Member(path, name, shape, dtype)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"array format {version}")
    return tuple(shape), dtype


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Whatever a damaged archive makes zipfile and numpy raise, which is almost anything, becomes one line."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except InputError:
        raise
    except Exception as error:
        told = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: not a sound .npz archive ({told[:200]}); save it again with numpy.savez"
        ) from error
