"""Calibration data: what is read, how it is split, and what is refused in one line."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnx_decomp import Options, archives, decompose
from onnx_decomp.calibration import NO_DATA, Part, load, synthetic
from onnx_decomp.errors import CannotVerifyError, InputError
from onnx_decomp.runtime import open_session
from tests.small import mlp, model, value

PARTS: tuple[Part, ...] = ("fit", "select", "report")


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def rows(count: int, width: int = 6) -> np.ndarray:
    """Samples that can be told apart by their first entry."""
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


def refused(path: Path, match: str, proto: onnx.ModelProto | None = None) -> None:
    with pytest.raises(InputError, match=match) as caught:
        load(path, proto or mlp(), seed=0)
    assert "\n" not in str(caught.value)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(8, 60), fixed=st.sampled_from([None, 1, 2, 4]), seed=st.integers(0, 9))
def test_parts_share_out_the_samples(
    tmp_path_factory: pytest.TempPathFactory, count: int, fixed: int | None, seed: int
) -> None:
    path = save(tmp_path_factory.mktemp("split") / "c.npz", x=rows(count))
    proto = mlp(batch=fixed or "N")
    if fixed and count < 3 * fixed:
        return refused(path, "are needed", proto)
    data = load(path, proto, seed)
    found = np.concatenate([data.parts[part]["x"] for part in PARTS])
    np.testing.assert_array_equal(np.sort(found[:, 0]), rows(count)[:, 0])
    assert data.samples("select") == data.samples("report") > 0
    assert data.samples("fit") >= data.samples("select")
    for part in PARTS:
        sizes = [len(feeds["x"]) for feeds in data.batches(part, 7)]
        if fixed:
            assert set(sizes) == {fixed}
        else:
            assert sum(sizes) == data.samples(part)
    again = load(path, proto, seed)
    assert all(np.array_equal(data.parts[part]["x"], again.parts[part]["x"]) for part in PARTS)
    return None


def test_a_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    save(tmp_path / "b.npz", x=rows(10) + 1000)
    save(tmp_path / "a.npz", x=rows(10))
    data = load(tmp_path, mlp(), seed=0)
    assert sum(data.samples(part) for part in PARTS) == 20
    save(tmp_path / "c.npz", x=rows(10, 5))
    refused(tmp_path, r"c\.npz: 'x' has shape \(10, 5\), the model takes \(samples, 6\)")


def test_extra_arrays_are_ignored_with_a_warning(tmp_path: Path) -> None:
    path = save(tmp_path / "c.npz", x=rows(10), target=np.arange(10))
    data = load(path, mlp(), seed=0)
    assert "'target'" in data.warnings[0]
    assert set(data.parts["fit"]) == {"x"}


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"q": rows(10)}, "no array 'x': the model's inputs are 'x'"),
        ({"x": rows(10, 5)}, "has shape"),
        ({"x": rows(10)[:, 0]}, "has shape"),
        ({"x": np.float32(3)}, "has shape"),
        ({"x": rows(10).astype(np.int64)}, "is int64, the model takes float32"),
        ({"x": rows(10) > 3}, "is bool"),
        ({"x": rows(10).astype(np.complex64)}, "is complex64"),
        ({"x": np.full((10, 6), "a")}, "is <U1"),
        ({"x": np.where(rows(10) == 7, np.nan, 1).astype(np.float32)}, "c.npz: 'x' holds NaN or infinity"),
        ({"x": np.full((10, 6), 1e300)}, "holds NaN or infinity as float32"),
        ({"x": rows(7)}, "7 samples, at least 8 are needed"),
        ({"x": rows(0)}, "0 samples"),
        ({"x": np.full((10, 6), None)}, "pickled objects"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], match: str) -> None:
    refused(save(tmp_path / "c.npz", **arrays), match)


def test_types_are_cast_where_that_is_safe(tmp_path: Path) -> None:
    proto = model(
        [helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT)],
        [value("i", ["N", 3], TensorProto.INT32), value("x", ["N", 2])],
        [value("y", ["N", 3])],
    )
    path = save(tmp_path / "c.npz", i=np.ones((9, 3), np.int64), x=np.ones((9, 2), np.float64))
    feeds = load(path, proto, 0).parts["fit"]
    assert (feeds["i"].dtype, feeds["x"].dtype) == (np.int32, np.float32)
    refused(
        save(tmp_path / "c.npz", i=np.full((9, 3), 2**40), x=np.ones((9, 2))),
        "values that int32 can't",
        proto,
    )
    refused(
        save(tmp_path / "c.npz", i=np.ones((9, 3), int), x=np.ones((8, 2))),
        "different numbers of samples",
        proto,
    )


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    refused(tmp_path / "none.npz", "No such file")
    refused(tmp_path, "no .npz file")
    path = tmp_path / "c.npz"
    np.save(tmp_path / "plain.npy", rows(10))
    save(tmp_path / "whole.npz", x=rows(1000))
    for content in (
        b"",
        b"text",
        (tmp_path / "plain.npy").read_bytes(),
        (tmp_path / "whole.npz").read_bytes()[:-100],
        os.urandom(500),
    ):
        path.write_bytes(content)
        refused(path, "not a sound .npz")


def test_bombs_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MIN_BUDGET", 10_000)
    np.savez_compressed(tmp_path / "c.npz", x=np.zeros((10_000, 6), np.float32))
    refused(tmp_path / "c.npz", "over the budget")


def test_a_lying_header_is_refused(tmp_path: Path) -> None:
    """An array that says it has 2^50 rows and holds none."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        content, {"descr": "<f4", "fortran_order": False, "shape": (2**50, 6)}
    )
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("x.npy", content.getvalue())
    refused(tmp_path / "c.npz", "not as long as its header says")


def test_models_that_no_samples_fit(tmp_path: Path) -> None:
    path = save(tmp_path / "c.npz", x=rows(10))
    y = [value("y", ["N", 6])]
    node = [helper.make_node("Relu", ["x"], ["y"])]
    refused(path, "not an array of numbers", model(node, [value("x", ["N", 6], TensorProto.STRING)], y))
    refused(path, "not an array of numbers", model(node, [value("x", [])], y))
    refused(path, "no inputs", model(node, [], y))
    refused(path, "different first dims", model(node, [value("x", [2, 6]), value("z", [3, 6])], y))


def embedding_model() -> onnx.ModelProto:
    """ids [N, T] -> table of 5 rows, masked by a float mask [N, T], plus noise [N, T, 4]."""
    nodes = [
        helper.make_node("Cast", ["ids"], ["ids64"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "ids64"], ["e"]),
        helper.make_node("Unsqueeze", ["attention_mask", "last"], ["m"]),
        helper.make_node("Mul", ["e", "m"], ["em"]),
        helper.make_node("Add", ["em", "noise"], ["y"]),
    ]
    inputs = [
        value("ids", ["N", "T"], TensorProto.INT32),
        value("attention_mask", ["N", "T"]),
        value("noise", ["N", "T", 4]),
    ]
    weights = {"table": np.ones((5, 4), np.float32), "last": np.array([2])}
    return model(nodes, inputs, [value("y", ["N", "T", 4])], weights)


def test_synthetic_inputs_respect_the_graph() -> None:
    proto = embedding_model()
    data = synthetic(proto, 50, seed=1)
    feeds = data.parts["fit"]
    assert data.kind == "synthetic"
    assert set(np.unique(feeds["ids"])) == set(range(5))
    assert set(np.unique(feeds["attention_mask"])) == {0, 1}
    assert (feeds["attention_mask"][:, 0] == 1).all()
    assert abs(feeds["noise"].mean()) < 0.2
    session = open_session(proto)
    for part in PARTS:
        for batch in data.batches(part, 8):
            assert np.isfinite(session.run(batch)["y"]).all()
    again = synthetic(proto, 50, seed=1)
    assert all(np.array_equal(array, again.parts["fit"][name]) for name, array in feeds.items())


def test_synthetic_inputs_for_a_fixed_batch_and_none_at_all() -> None:
    data = synthetic(mlp(batch=16), 8, seed=0)
    assert [len(feeds["x"]) for feeds in data.batches("report", 4)] == [16]
    node = [helper.make_node("Identity", ["x"], ["y"])]
    strings = [value(name, ["N"], TensorProto.STRING) for name in "xy"]
    with pytest.raises(CannotVerifyError, match="no synthetic inputs"):
        synthetic(model(node, strings[:1], strings[1:]), 8, seed=0)
    assert NO_DATA.samples("fit") == 0
    assert list(NO_DATA.batches("fit", 4)) == []


def test_a_dim_of_minus_one_is_free() -> None:
    """Some exporters write it so, instead of a name."""
    proto = mlp(batch=-1)
    data = synthetic(proto, 16, seed=0)
    assert data.fixed is None
    assert data.samples("select") > 0
    assert not decompose(proto, options=Options(provider="cpu", latency_gate=False)).changed
