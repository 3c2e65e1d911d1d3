"""Anonymous memory is bounded by the largest matrices, not by the model."""

from __future__ import annotations

import gc
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from models.bench_large import MIB, anonymous, measure
from models.large import Large
from onnx_decomp import scratch
from onnx_decomp.errors import InputError
from onnx_decomp.graph_index import GraphIndex
from onnx_decomp.model_io import load, read_tensor
from onnx_decomp.runtime import open_session
from onnx_decomp.scratch import kept, mapped
from onnx_decomp.sites import find_sites, read_affine
from tests.small import model, value, write_external

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what memory is anonymous")


def grown(before: int) -> float:
    """MiB of anonymous memory more than before."""
    return (anonymous(os.getpid()) - before) / MIB


@linux
def test_kept_arrays_are_no_anonymous_memory() -> None:
    before = anonymous(os.getpid())
    held = [kept(np.full((1024, 4096), number, np.float32)) for number in range(8)]
    assert grown(before) < 32
    assert [array[5, 7] for array in held] == list(range(8))
    assert all(mapped(array) and not array.flags.writeable for array in held)


def test_files_go_with_the_last_array(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scratch, "_folder", lambda: tmp_path)
    whole = kept(np.arange(6.0).reshape(2, 3).T, 1)
    part = whole[1:]
    assert kept(part, 1) is part
    del whole
    assert len(os.listdir(tmp_path)) == 1
    np.testing.assert_array_equal(part, [[1, 4], [2, 5]])
    del part
    gc.collect()
    assert not os.listdir(tmp_path)


def test_small_arrays_stay_as_they_are() -> None:
    array = np.ones(3)
    assert kept(array) is array


def test_no_room_for_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scratch, "_folder", lambda: tmp_path / "gone")
    with pytest.raises(
        InputError, match=r"no temporary file can be written: .*: free some space, or set TMPDIR"
    ):
        kept(np.ones(3), 1)


def chain(layers: int, width: int) -> onnx.ModelProto:
    """MatMuls, every other one behind a Transpose of its weight."""
    nodes, weights = [], {}
    for number in range(layers):
        weights[f"w{number}"] = np.full((width, width), 1 / width, np.float32)
        read = f"w{number}"
        if number % 2:
            nodes.append(helper.make_node("Transpose", [read], [read := f"t{number}"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", [f"h{number}", read], [f"h{number + 1}"]))
    return model(nodes, [value("h0", ["N", width])], [value(f"h{layers}", ["N", width])], weights)


@linux
def test_external_weights_stay_in_their_files(tmp_path: Path) -> None:
    path = write_external(chain(8, 1024), tmp_path / "m.onnx")
    gc.collect()
    before = anonymous(os.getpid())
    session = open_session(path, prepack=False)
    made = session.run({"h0": np.ones((3, 1024), np.float32)})["h8"]
    np.testing.assert_allclose(made, 1, rtol=1e-4)
    assert grown(before) < 10  # of 32


def test_a_mapped_weight_is_read_where_it_lies(tmp_path: Path) -> None:
    file = load(write_external(chain(2, 64), tmp_path / "m.onnx"))
    index = GraphIndex.build(file.proto, partial(read_tensor, file))
    plain, turned = (read_affine(index, site).weight for site in find_sites(index))
    assert mapped(plain)
    assert not mapped(turned)
    assert numpy_helper.to_array(chain(2, 64).graph.initializer[1]).shape == turned.shape


@linux
@pytest.mark.slow
def test_more_layers_take_no_more_memory(tmp_path: Path) -> None:
    """The whole command, with blocks planted, calibration data and the tolerance gate."""
    few, many = (
        measure(Large(layers, 1024), 40, tmp_path / str(layers), ["--no-search", "-q"]) for layers in (4, 20)
    )
    assert (few.kept, many.kept) == (4, 20)
    assert many.change < 1e-6
    assert many.peak - few.peak < 0.25 * (many.source - few.source)
