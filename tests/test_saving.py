"""Model files are written whole or not at all, and large tensors beside them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from models.large import Large, calibration
from models.large import write as write_large
from onnx_decomp import compiler, saving
from onnx_decomp.errors import InputError, UsageError
from onnx_decomp.model_io import digest, load, read_tensor
from onnx_decomp.options import Options
from onnx_decomp.runtime import open_session
from onnx_decomp.saving import Aside, check_output, copy, rooted, save
from tests.small import mlp, weight, write, write_external


def test_save_is_deterministic_and_leaves_nothing_else(tmp_path: Path) -> None:
    source = load(write(mlp(), tmp_path / "m.onnx"))
    for name in ("a.onnx", "b.onnx"):
        save(mlp(seed=1), source, tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert load(tmp_path / "a.onnx").proto == mlp(seed=1)
    assert sorted(os.listdir(tmp_path)) == ["a.onnx", "b.onnx", "m.onnx"]


def test_copy_is_byte_for_byte(tmp_path: Path) -> None:
    source = load(write_external(mlp(), tmp_path / "m.onnx"))
    (tmp_path / "out").mkdir()
    copy(source, tmp_path / "out" / "o.onnx")
    for there, here in (("m.onnx", "out/o.onnx"), ("w.bin", "out/w.bin")):
        assert (tmp_path / there).read_bytes() == (tmp_path / here).read_bytes()
    copy(source, tmp_path / "beside.onnx")  # shares the data file
    copy(source, tmp_path / "out" / "o.onnx")  # again: the data file is there already
    assert load(tmp_path / "beside.onnx").external == ("w.bin",)


def test_data_of_another_model_is_not_overwritten(tmp_path: Path) -> None:
    source = load(write_external(mlp(), tmp_path / "m.onnx"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "w.bin").write_bytes(b"precious")
    with pytest.raises(InputError, match=r"w\.bin: the model's data has to go there"):
        save(source.proto, source, tmp_path / "out" / "o.onnx")
    assert os.listdir(tmp_path / "out") == ["w.bin"]
    assert (tmp_path / "out" / "w.bin").read_bytes() == b"precious"


def test_large_models_get_a_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "MAX_EMBEDDED", 200)
    monkeypatch.setattr(saving, "LARGE", 100)
    proto = mlp()
    source = load(write(proto, tmp_path / "m.onnx"))
    save(proto, source, tmp_path / "o.onnx")
    written = load(tmp_path / "o.onnx")
    assert written.external == ("o.onnx.data",)
    assert proto == mlp()  # the caller's model is not touched
    for tensor in written.proto.graph.initializer:
        np.testing.assert_array_equal(read_tensor(written, tensor), weight(proto, tensor.name))


def test_a_data_file_avoids_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "MAX_EMBEDDED", 200)
    monkeypatch.setattr(saving, "LARGE", 100)
    source = load(write_external(mlp(), tmp_path / "m.onnx", "o.onnx.data"))
    before = digest(tmp_path / "o.onnx.data")
    save(mlp(), source, tmp_path / "o.onnx")
    assert load(tmp_path / "o.onnx").external == ("o.onnx.decomp.data",)
    assert digest(tmp_path / "o.onnx.data") == before


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    path = write_external(mlp(), tmp_path / "m.onnx")
    (tmp_path / "link.onnx").symlink_to(path)
    (tmp_path / "folder").mkdir()
    for out, match in (
        (path, "input itself"),
        (tmp_path / "link.onnx", "input itself"),
        (tmp_path / "none" / "o.onnx", "does not exist"),
        (tmp_path / "folder", "not a regular file"),
        (Path(os.devnull), "not a regular file"),
    ):
        with pytest.raises(UsageError, match=match):
            check_output(path, out)
    check_output(tmp_path / "none.onnx", path)  # a missing input is for `load` to report
    with pytest.raises(UsageError, match="data file of the input"):
        copy(load(path), tmp_path / "w.bin")


def test_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root, which runs CI, may write anywhere
    with pytest.raises(UsageError, match="read-only"):
        check_output(None, tmp_path / "o.onnx")


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    source = load(write_external(mlp(), tmp_path / "m.onnx"))
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "o.onnx").write_bytes(b"old")

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(saving, "_sync", fail)
    expected = InputError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if expected is InputError else None):
        save(source.proto, source, folder / "o.onnx")
    assert os.listdir(folder) == ["o.onnx"]
    assert (folder / "o.onnx").read_bytes() == b"old"


# Data files of OUT's own


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "LARGE", 100)


def without(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """A model that no longer has one of its initializers, but a new one of another name."""
    found = onnx.ModelProto.FromString(proto.SerializeToString())
    (at,) = (n for n, tensor in enumerate(found.graph.initializer) if tensor.name == name)
    del found.graph.initializer[at]
    found.graph.initializer.append(numpy_helper.from_array(np.full((6, 6), 7, np.float32), f"new {name}"))
    for node in found.graph.node:
        node.input[:] = [f"new {name}" if read == name else read for read in node.input]
    return found


def external(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize("beside", [True, False])
def test_dead_weights_are_left_out(tmp_path: Path, beside: bool) -> None:
    """What is left of the file moves to one of OUT's own, its values the same; the input's is not touched."""
    path = write_external(mlp(), tmp_path / "m.onnx")
    proto = onnx.load(path, load_external_data=False)
    sha1 = hashlib.sha1((tmp_path / "w.bin").read_bytes()).hexdigest()
    for tensor in proto.graph.initializer:
        tensor.external_data.add(key="checksum", value=sha1)
    source, before = load(write(proto, path)), digest(tmp_path / "w.bin")
    out = tmp_path / "o.onnx" if beside else tmp_path / "out" / "o.onnx"
    out.parent.mkdir(exist_ok=True)
    returned = save(without(source.proto, "W1"), source, out)
    written = load(out)
    assert returned == written.proto
    assert written.external == ("o.onnx.data",)
    left, new = written.proto.graph.initializer
    np.testing.assert_array_equal(read_tensor(written, left), weight(mlp(), "W2"))
    assert (read_tensor(written, new) == 7).all()
    data = out.with_name("o.onnx.data")
    assert external(left)["checksum"] == hashlib.sha1(data.read_bytes()).hexdigest()
    assert data.stat().st_size == 4096 + 144
    assert digest(tmp_path / "w.bin") == before
    assert (out.parent / "w.bin").exists() == beside


@pytest.mark.usefixtures("small_is_large")
def test_little_waste_keeps_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "WASTE", 0.6)
    source = load(write_external(mlp(), tmp_path / "m.onnx"))
    (tmp_path / "out").mkdir()
    save(without(source.proto, "W1"), source, tmp_path / "out" / "o.onnx")
    written = load(tmp_path / "out" / "o.onnx")
    assert written.external == ("o.onnx.data", "w.bin")
    assert written.proto.graph.initializer[0] == source.proto.graph.initializer[1]
    assert digest(tmp_path / "out" / "w.bin") == digest(tmp_path / "w.bin")


@pytest.mark.usefixtures("small_is_large")
def test_a_file_that_nothing_reads_any_more_is_not_copied(tmp_path: Path) -> None:
    source = load(write_external(mlp(), tmp_path / "m.onnx"))
    (tmp_path / "out").mkdir()
    save(without(without(source.proto, "W1"), "W2"), source, tmp_path / "out" / "o.onnx")
    assert sorted(os.listdir(tmp_path / "out")) == ["o.onnx", "o.onnx.data"]


@pytest.mark.usefixtures("small_is_large")
def test_tensors_that_share_bytes_go_on_sharing_them(tmp_path: Path) -> None:
    path = write_external(mlp(), tmp_path / "m.onnx")
    proto = onnx.load(path, load_external_data=False)
    twin = proto.graph.initializer.add()
    twin.CopyFrom(proto.graph.initializer[1])
    twin.name = "twin"
    source = load(write(proto, path))
    written = save(without(source.proto, "W1"), source, tmp_path / "o.onnx")
    first, second, _ = written.graph.initializer
    assert external(first) == external(second)


@pytest.mark.usefixtures("small_is_large")
def test_new_tensors_wait_aside(tmp_path: Path) -> None:
    """ONNX Runtime reads them together with the model's own; saved, they are where the model's own are."""
    for folder in ("given", "aside", "out"):
        (tmp_path / folder).mkdir()
    source = load(write_external(mlp(), tmp_path / "given" / "m.onnx"))
    aside = Aside(tmp_path / "aside" / "new.data")
    changed = onnx.ModelProto()
    changed.CopyFrom(source.proto)
    other = mlp(seed=1).graph.initializer[0]
    changed.graph.initializer[0].CopyFrom(aside.taken(other))
    assert changed.graph.initializer[0].data_location == TensorProto.EXTERNAL
    expected = mlp()
    expected.graph.initializer[0].CopyFrom(other)
    x = {"x": np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)}
    wanted = open_session(expected).run(x)["y"]
    proto, folder = rooted(changed, source.folder)
    np.testing.assert_array_equal(open_session(proto, folder=folder).run(x)["y"], wanted)
    save(changed, source, tmp_path / "out" / "o.onnx")
    (tmp_path / "aside" / "new.data").unlink()
    np.testing.assert_array_equal(open_session(tmp_path / "out" / "o.onnx").run(x)["y"], wanted)


def test_a_compiled_model_has_no_dead_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From several external files: all of what is rewritten goes, what nothing reads stays, IN is not touched."""
    monkeypatch.setattr(saving, "LARGE", 1000)
    spec = Large(layers=2, width=64, blocks=4, file_bytes=20_000)  # the table shares a file with what will go
    path = write_large(spec, tmp_path / "in")
    np.savez(tmp_path / "calib.npz", **calibration(spec, 300))  # type: ignore[arg-type]
    given = {p: digest(p) for p in (tmp_path / "in").rglob("*.*")}
    assert len(given) == 3
    options = Options(
        init_preset="torch-linear",
        calib=tmp_path / "calib.npz",
        latency_gate=False,
        objective="flops",
        provider="cpu",
    )
    (tmp_path / "out").mkdir()
    result = compiler.compile_file(path, tmp_path / "out" / "o.onnx", options)
    assert result.report["kept"] == ["region_000", "region_001"]
    assert {p: digest(p) for p in (tmp_path / "in").rglob("*.*")} == given
    written, source = load(tmp_path / "out" / "o.onnx"), load(path)
    assert result.model == written.proto
    assert result.report["output"]["sha256"] == written.sha256
    stored = {tensor.name: tensor for tensor in written.proto.graph.initializer}
    assert not [name for name in stored if name.endswith("up.weight")]
    table = next(tensor for tensor in source.proto.graph.initializer if tensor.name == "table")
    np.testing.assert_array_equal(read_tensor(written, stored["table"]), read_tensor(source, table))
    dense = 4 * 64 * 64 * 4
    assert sum(p.stat().st_size for p in (tmp_path / "out").rglob("*.*")) < dense
    feeds: dict[str, Any] = calibration(Large(1, 64, seed=5), 20)
    before, after = (open_session(p).run(feeds)["y"] for p in (path, tmp_path / "out" / "o.onnx"))
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3)
