"""Model files: bad and hostile ones are refused in one line, and nothing is left half-written."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnx_decomp import model_io
from onnx_decomp.errors import InputError
from onnx_decomp.model_io import digest, from_proto, load, read_tensor
from tests.small import mlp, model, value, weight, write, write_external


def refused(path: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_load_says_what_the_file_is(tmp_path: Path) -> None:
    path = write(mlp(), tmp_path / "m.onnx")
    file = load(path)
    assert (file.path, file.folder, file.size) == (path, tmp_path, path.stat().st_size)
    assert file.sha256 == digest(path)
    assert file.proto == mlp()
    assert file.external == ()
    assert model_io.opset(file.proto) == 17
    assert model_io.parameters(file.proto) == 72


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "empty"),
        (b"hello, this is not a model\n" * 30, "not an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not an ONNX model"),
        (mlp().SerializeToString()[:-90], "not an ONNX model"),
        (onnx.ModelProto(producer_name="x").SerializeToString(), "no graph or no opset"),
        (TensorProto(dims=[3], data_type=1, raw_data=b"\0" * 12).SerializeToString(), "not an ONNX model"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    refused(path, match)


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=300))
def test_random_bytes_never_crash(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("random") / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError):
        load(path)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(mlp().SerializeToString()) - 1), st.integers(0, 255))
def test_a_damaged_byte_loads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int
) -> None:
    content = bytearray(mlp().SerializeToString())
    content[at] = byte
    path = tmp_path_factory.mktemp("damaged") / "m.onnx"
    path.write_bytes(content)
    with suppress(InputError):
        file = load(path)
        for tensor in model_io.tensors(file.proto):
            read_tensor(file, tensor)


def test_missing_folder_device_and_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "none.onnx", "No such file")
    refused(tmp_path, "a folder")
    refused(Path(os.devnull), "not a file")
    monkeypatch.setattr(model_io, "MAX_PROTO", 100)
    refused(write(mlp(), tmp_path / "m.onnx"), "over 2 GB")


def test_the_checker_decides_what_is_valid(tmp_path: Path) -> None:
    broken = mlp()
    broken.graph.node[0].input[0] = "nobody"
    refused(write(broken, tmp_path / "m.onnx"), "not a valid ONNX model")


def test_custom_operators_load(tmp_path: Path) -> None:
    """Even com.microsoft without its import: ONNX Runtime runs that."""
    node = helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")
    proto = model([node], [value("x", ["N", 4])], [value("y", ["N", 4])])
    assert load(write(proto, tmp_path / "m.onnx")).proto == proto


def test_models_from_memory(tmp_path: Path) -> None:
    file = from_proto(mlp())
    assert file.path is None
    assert file.sha256 == load(write(mlp(), tmp_path / "m.onnx")).sha256
    outside = onnx.load(write_external(mlp(), tmp_path / "e.onnx"), load_external_data=False)
    with pytest.raises(InputError, match="pass its path"):
        from_proto(outside)


def test_external_data_is_mapped_not_loaded(tmp_path: Path) -> None:
    path = write_external(mlp(), tmp_path / "m.onnx")
    file = load(path)
    assert file.external == ("w.bin",)
    assert file.size == path.stat().st_size + (tmp_path / "w.bin").stat().st_size
    array = read_tensor(file, file.proto.graph.initializer[0])
    assert not array.flags.writeable
    np.testing.assert_array_equal(array, weight(mlp(), "W1"))


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.int4, ml_dtypes.float8_e4m3fn, np.bool_]
)
def test_every_type_reads_the_same_from_outside(tmp_path: Path, dtype: type) -> None:
    array = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 0]]).astype(dtype)
    inside = numpy_helper.from_array(array, "t")
    (tmp_path / "t.bin").write_bytes(b"pad" + inside.raw_data)
    outside = TensorProto(name="t", data_type=inside.data_type, dims=inside.dims, data_location=1)
    for key, text in (("location", "t.bin"), ("offset", "3"), ("length", str(len(inside.raw_data)))):
        outside.external_data.add(key=key, value=text)
    file = model_io.ModelFile(None, tmp_path, onnx.ModelProto(), "", 0)
    for tensor in (inside, outside):
        np.testing.assert_array_equal(read_tensor(file, tensor), array)


def entry(path: Path, key: str, text: str | None) -> None:
    """Give the model's first external tensor another entry in its external_data, or take it away."""
    proto = onnx.load(path, load_external_data=False)
    tensor = proto.graph.initializer[0]
    kept = [(item.key, item.value) for item in tensor.external_data if item.key != key]
    del tensor.external_data[:]
    for name, content in [*kept, *([(key, text)] if text is not None else [])]:
        tensor.external_data.add(key=name, value=content)
    write(proto, path)


def change(key: str, text: str | None) -> Callable[[Path], None]:
    return lambda path: entry(path, key, text)


def symlink(path: Path) -> None:
    (path.parent / "w.bin").rename(path.parent.parent / "out.bin")
    (path.parent / "w.bin").symlink_to(path.parent.parent / "out.bin")


def symlinked_folder(path: Path) -> None:
    (path.parent.parent / "elsewhere").mkdir()
    (path.parent / "w.bin").rename(path.parent.parent / "elsewhere" / "w.bin")
    (path.parent / "sub").symlink_to(path.parent.parent / "elsewhere")
    entry(path, "location", "sub/w.bin")


def hard_link(path: Path) -> None:
    os.link(path.parent / "w.bin", path.parent.parent / "other.bin")


def fifo(path: Path) -> None:
    (path.parent / "w.bin").unlink()
    os.mkfifo(path.parent / "w.bin")


@pytest.mark.parametrize(
    ("attack", "match"),
    [
        (change("location", "../w.bin"), "plain path"),
        (change("location", "/etc/passwd"), "plain path"),
        (change("location", "..\\w.bin"), "plain path"),
        (change("location", "C:w.bin"), "plain path"),
        (change("location", ""), "plain path"),
        (change("location", None), "plain path"),
        (change("location", "w\0.bin"), "plain path"),
        (change("location", "."), "not a regular file"),
        (change("location", "none.bin"), "'W1'.*'none.bin' is missing"),
        (change("offset", "-4"), "bytes at -4"),
        (change("offset", "1000000"), "bytes at 1000000"),
        (change("offset", "four"), "bad type, offset"),
        (change("length", "8"), "144 bytes"),
        (symlink, "symbolic link"),
        (symlinked_folder, "symbolic link"),
        (hard_link, "hard link"),
        (fifo, "not a regular file"),
    ],
)
def test_external_data_stays_in_the_models_folder(
    tmp_path: Path, attack: Callable[[Path], None], match: str
) -> None:
    (tmp_path / "in").mkdir()
    path = write_external(mlp(), tmp_path / "in" / "m.onnx")
    attack(path)
    refused(path, match)


def test_unknown_keys_of_external_data_are_ignored(tmp_path: Path) -> None:
    path = write_external(mlp(), tmp_path / "m.onnx")
    entry(path, "__class__", "os.system")
    assert load(path).external == ("w.bin",)


def test_hidden_tensors_are_guarded_too(tmp_path: Path) -> None:
    """A Constant in a branch of an If is as untrusted as an initializer."""
    tensor = TensorProto(name="c", data_type=1, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value="../secret")
    constant = helper.make_node("Constant", [], ["z"], value=tensor)
    branch = helper.make_graph([constant], "b", [], [value("z", [1])])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    proto = model([node], [value("c", [], TensorProto.BOOL)], [value("y", [1])])
    refused(write(proto, tmp_path / "m.onnx"), "plain path")
