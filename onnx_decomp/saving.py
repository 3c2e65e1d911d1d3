"""Model files are written whole or not at all, with large tensors beside them.

External files that the model still needs are copied byte for byte, offsets and checksums as they are. What would make a
file of dead weights, or more than a message can hold, goes to a data file of OUT's own. The input's are never touched.
A run that is killed while it writes leaves temporary files beside OUT, which the next one there removes.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import onnx

from onnx_decomp import scratch
from onnx_decomp.errors import InputError, UsageError
from onnx_decomp.model_io import (
    ModelFile,
    Place,
    external_entries,
    is_external,
    locate,
    reason,
    serialize,
    tensors,
)

LARGE = 2**16
"""Bytes from which a tensor may lie beside the model; shapes and axes stay in it, where shape inference sees them."""

MAX_EMBEDDED = 3 * 2**29
"""Embedded bytes above which `save` moves all large tensors to a file beside the model (1.5 GiB)."""

WASTE = 0.1
"""Share of an external file's tensors that may be dead weight."""

PAGE = 4096
CHUNK = 2**24


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


def save(proto: onnx.ModelProto, source: ModelFile, out: Path) -> onnx.ModelProto:
    """Write a model made from `source` to `out`, and the external files it references, whole or not at all.

    Returns what was written: `proto` itself, or a copy where tensors were moved. The same `proto` gives the same bytes.
    Raises UsageError where OUT can't be, InputError if writing fails.
    """
    moving = _moving(proto, source)
    staying = {
        external_entries(tensor)["location"]
        for tensor, moves in zip(tensors(proto), moving, strict=True)
        if is_external(tensor) and not moves
    }
    with _staging(source, out, tuple(sorted(staying))) as stage:
        if any(moving):
            name = f"{out.name}.data"
            name = f"{out.name}.decomp.data" if name in source.external else name
            proto = _moved(proto, moving, source.folder, stage(out.with_name(name)), name)
        stage(out).write_bytes(serialize(proto))
    return proto


def copy(source: ModelFile, out: Path) -> None:
    """Write `source` itself, byte for byte, with its external files; otherwise as `save`."""
    with _staging(source, out, source.external) as stage:
        if source.path is None:
            stage(out).write_bytes(serialize(source.proto))
        else:
            shutil.copyfile(source.path, stage(out))


def as_it_stands(proto: onnx.ModelProto, source: ModelFile) -> bool:
    """Whether `save` would write the message as it is, moving nothing."""
    return not any(_moving(proto, source))


# --- new tensors that are not in memory ---------------------------------------------------------------------------


class Aside:
    """A temporary file for new large tensors, which refer to it by its absolute path until they are saved."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._path.unlink(missing_ok=True)  # another session may still map what was there before

    def taken(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        """A copy of the tensor, or if it is large, one that refers to its bytes here."""
        found = onnx.TensorProto()
        if not _embedded(tensor):
            found.CopyFrom(tensor)
            return found
        with self._path.open("ab") as file:
            offset, length = _append(file, tensor.raw_data)
        found = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        _refer(found, str(self._path), offset, length)
        return found


def rooted(proto: onnx.ModelProto, folder: Path) -> tuple[onnx.ModelProto, Path]:
    """A model and the one folder to which all its external data is relative, for ONNX Runtime, which knows only one.

    folder: that of the model's own files. The model itself where nothing lies elsewhere.
    """
    if not any(_is_aside(tensor) for tensor in tensors(proto)):
        return proto, folder
    root = Path(folder.absolute().anchor)
    found = onnx.ModelProto()
    found.CopyFrom(proto)
    for tensor in tensors(found):
        if is_external(tensor):
            path = (folder / external_entries(tensor)["location"]).resolve()
            _set(tensor, {"location": path.relative_to(root).as_posix()})
    return found, root


# --- which tensors move -------------------------------------------------------------------------------------------


def _moving(proto: onnx.ModelProto, source: ModelFile) -> list[bool]:
    """For each of `tensors(proto)` whether it goes to OUT's own data file."""
    stored = list(tensors(proto))
    wasteful = _wasteful(proto, source)
    moving = [
        is_external(tensor) and (_is_aside(tensor) or external_entries(tensor)["location"] in wasteful)
        for tensor in stored
    ]
    sizes = [_embedded(tensor) for tensor in stored]
    if sum(sizes) > MAX_EMBEDDED:
        return [moves or size > 0 for moves, size in zip(moving, sizes, strict=True)]
    if any(moving) or source.external:  # new ones go where the model keeps its large tensors
        own = {tensor.name for tensor in tensors(source.proto) if not is_external(tensor)}
        new = [size > 0 and tensor.name not in own for tensor, size in zip(stored, sizes, strict=True)]
        return [moves or fresh for moves, fresh in zip(moving, new, strict=True)]
    return moving


def _wasteful(proto: onnx.ModelProto, source: ModelFile) -> set[str]:
    """External files of `source` of which a rewrite has left a lot unread, but not all."""
    before, after = (_places(model, source.folder) for model in (source.proto, proto))
    found = set()
    for location, places in before.items():
        whole = sum(place.length for place in places)
        dead = whole - sum(place.length for place in after.get(location, ()))
        if dead >= LARGE and dead > WASTE * whole and location in after:
            found.add(location)
    return found


def _places(proto: onnx.ModelProto, folder: Path) -> dict[str, set[Place]]:
    """What is read of each of the model's own external files."""
    places: dict[str, set[Place]] = {}
    for tensor in tensors(proto):
        if is_external(tensor) and not _is_aside(tensor):
            location = external_entries(tensor)["location"]
            places.setdefault(location, set()).add(locate(tensor, folder))
    return places


def _embedded(tensor: onnx.TensorProto) -> int:
    """Bytes that a large tensor holds in the message itself, about; 0 for others."""
    size = int(tensor.ByteSize()) if tensor.HasField("raw_data") else 0
    return size if size >= LARGE else 0


def _is_aside(tensor: onnx.TensorProto) -> bool:
    """A model's own data never has an absolute path: it would not have been loaded."""
    return is_external(tensor) and Path(external_entries(tensor)["location"]).is_absolute()


# --- data files ---------------------------------------------------------------------------------------------------


def _moved(
    proto: onnx.ModelProto, moving: Sequence[bool], folder: Path, path: Path, name: str
) -> onnx.ModelProto:
    """A copy of `proto` whose moving tensors lie in `path`, to be called `name`, each on a page of its own.

    Tensors that share bytes go on sharing them. folder: of the model's own external data.
    """
    found = onnx.ModelProto()
    found.CopyFrom(proto)
    shared: dict[Place, tuple[int, int]] = {}
    signed: list[onnx.TensorProto] = []
    with path.open("wb") as file:
        for tensor, moves in zip(tensors(found), moving, strict=True):
            if not moves:
                continue
            if is_external(tensor):
                place = _place(tensor, folder)
                if place not in shared:
                    shared[place] = _append_from(file, place)
                offset, length = shared[place]
            else:
                offset, length = _append(file, tensor.raw_data)
            _refer(tensor, name, offset, length)
            if "checksum" in external_entries(tensor):
                signed.append(tensor)
    if signed:  # by the specification: SHA-1 of the whole file
        with path.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha1").hexdigest()
        for tensor in signed:
            _set(tensor, {"checksum": checksum})
    return found


def _place(tensor: onnx.TensorProto, folder: Path) -> Place:
    if not _is_aside(tensor):
        return locate(tensor, folder)
    entries = external_entries(tensor)
    return Place(Path(entries["location"]), int(entries["offset"]), int(entries["length"]))


def _append(file: IO[bytes], data: bytes) -> tuple[int, int]:
    """Write at the next page; gives offset and length."""
    file.seek(-(-file.seek(0, os.SEEK_END) // PAGE) * PAGE)
    return file.tell(), file.write(data)


def _append_from(file: IO[bytes], place: Place) -> tuple[int, int]:
    """The same from another file, a bit at a time."""
    offset, _ = _append(file, b"")
    with place.path.open("rb") as data:
        data.seek(place.offset)
        for start in range(0, place.length, CHUNK):
            file.write(data.read(min(CHUNK, place.length - start)))
    return offset, place.length


def _refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Make a tensor external, or move it; further entries that it has stay."""
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    _set(tensor, {"location": location, "offset": str(offset), "length": str(length)})


def _set(tensor: onnx.TensorProto, values: dict[str, str]) -> None:
    missing = dict(values)
    for entry in tensor.external_data:
        if entry.key in values:
            entry.value = values[entry.key]
            missing.pop(entry.key, None)
    for key, value in missing.items():
        tensor.external_data.add(key=key, value=value)


# --- whole or not at all ------------------------------------------------------------------------------------------


class _Stage(dict[Path, Path]):
    """Final path -> temporary path beside it. Called with a final path, it makes the temporary file, still empty."""

    def __init__(self, claims: ExitStack) -> None:
        super().__init__()
        self._claims = claims

    def __call__(self, final: Path) -> Path:
        if all(other.parent != final.parent for other in self):
            scratch.remove_abandoned(final.parent, scratch.BESIDE)
        self[final] = scratch.beside(final)
        self[final].open("xb").close()
        self._claims.enter_context(scratch.claimed(self[final]))
        return self[final]


@contextmanager
def _staging(source: ModelFile, out: Path, external: tuple[str, ...]) -> Iterator[_Stage]:
    """Files written under temporary names in the block appear together after it; none if anything fails.

    Copies of the `external` files of `source` come first, `out` last: nobody sees OUT without its data.
    """
    check_output(source.path, out)
    if any(_same(source.folder / name, out) for name in source.external):
        raise UsageError(f"{out}: the output is a data file of the input: choose another output")
    with ExitStack() as claims:
        stage = _Stage(claims)
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
            raise InputError(f"{out}: can't be written: {reason(error)}; nothing was written") from error
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
