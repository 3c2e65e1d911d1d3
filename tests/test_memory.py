"""Anonymous memory is bounded by the largest matrices, not by the model."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from models.bench_large import MIB, anonymous, measure
from models.large import SLAB, Large, calibration
from models.large import write as write_large
from onnx_decomp.axes import find_regions
from onnx_decomp.errors import InputError
from onnx_decomp.graph_index import GraphIndex
from onnx_decomp.model_io import external_entries, is_external, load, read_tensor, tensors
from onnx_decomp.probe import part_model
from onnx_decomp.relay import Relay
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


def opened() -> int:
    """Files that this process holds open."""
    return len(os.listdir("/proc/self/fd"))


@linux
def test_files_go_with_the_last_array(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They have no name even before: nothing is left behind, however the process ends."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gc.collect()
    before = opened()
    whole = kept(np.arange(6.0).reshape(2, 3).T, 1)
    part = whole[1:]
    assert kept(part, 1) is part
    del whole
    assert opened() == before + 1
    assert not os.listdir(tmp_path)
    np.testing.assert_array_equal(part, [[1, 4], [2, 5]])
    del part
    gc.collect()
    assert opened() == before


MANY = """
import resource
import numpy as np
from onnx_decomp.scratch import kept, mapped
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
assert all(mapped(array) for array in [kept(np.ones(3), 1) for _ in range(200)])
"""


@linux
def test_more_arrays_than_files_that_may_be_open() -> None:
    """A model of a few hundred large matrices has a thousand of them."""
    subprocess.run([sys.executable, "-c", MANY], check=True)


def test_small_arrays_stay_as_they_are() -> None:
    array = np.ones(3)
    assert kept(array) is array


def test_no_room_for_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
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


def test_pieces_leave_external_data_in_its_files(tmp_path: Path) -> None:
    """A table of over 2 GB would not even fit into the message of one."""
    spec = Large(layers=2, width=64, blocks=4, words=100)
    file = load(write_large(spec, tmp_path))
    index = GraphIndex.build(file.proto, partial(read_tensor, file))
    sites, feeds = find_sites(index), calibration(spec, 5)
    made = part_model(index, sites[:1], {0, 1}, ["x", "words"], ["looked up"])
    assert [is_external(tensor) for tensor in made.graph.initializer if tensor.name == "table"] == [True]
    first = Relay(index, sites, find_regions(index, sites), file.folder).run(0, feeds, {})
    table = read_tensor(file, next(tensor for tensor in tensors(file.proto) if tensor.name == "table"))
    np.testing.assert_array_equal(first["looked up"], feeds["x"] + table[feeds["words"]])


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


@linux
@pytest.mark.slow
def test_more_than_two_gigabytes_are_written(tmp_path: Path) -> None:
    """A table that stays, 2.2 GB, shares a file with layers that go: it is moved to a data file of OUT's own."""
    spec = Large(layers=3, width=4096, words=2_200_000_000 // (4 * 4096), file_bytes=2_450_000_000)
    try:
        made = measure(spec, 40, tmp_path, ["--no-search", "-q"])
        source, written = (load(tmp_path / folder / "model.onnx") for folder in ("in", "out"))
        assert len(source.external) == 2
        assert (made.kept, made.regions) == (3, 3)
        assert made.output * MIB > 2**31
        assert written.external == ("model.onnx.data",)
        assert made.peak < 1500
        ends = [external_entries(tensor) for tensor in tensors(written.proto) if is_external(tensor)]
        assert max(int(entries["offset"]) for entries in ends) > 2**31
        onnx.checker.check_model(tmp_path / "out" / "model.onnx", full_check=True)
        before, after = (
            read_tensor(file, next(tensor for tensor in tensors(file.proto) if tensor.name == "table"))
            for file in (source, written)
        )
        for start in range(0, spec.words, SLAB):
            np.testing.assert_array_equal(after[start : start + SLAB], before[start : start + SLAB])
        del before, after
        feeds = calibration(replace(spec, seed=5), 20)
        outputs = [
            open_session(file.path, prepack=False).run(feeds)["y"] for file in (source, written) if file.path
        ]
        assert np.abs(outputs[1] - outputs[0]).max() < 1e-4 * np.abs(outputs[0]).max()
    finally:
        shutil.rmtree(tmp_path)  # pytest would keep it, and that of two runs more
