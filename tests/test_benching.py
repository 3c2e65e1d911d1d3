"""`bench A B`: what it measures, the inputs that it makes up, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from models.planted import Planted, build
from models.planted import calibration as calibration_of
from onnx_decomp import Options, calibration, cli, decompose
from onnx_decomp.benching import Asked, bench_models, verdict
from onnx_decomp.errors import InputError
from onnx_decomp.runtime import cuda_problem
from tests.small import mlp, model, value, weight, write


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A network, and one of the same interface that does much less."""
    large = mlp(256, seed=1)
    tiny = model(
        [helper.make_node("MatMul", ["x", "W1"], ["y"], name="only")],
        [value("x", ["N", 256])],
        [value("y", ["N", 256])],
        {"W1": weight(large, "W1")},
    )
    return write(large, tmp_path / "a.onnx"), write(tiny, tmp_path / "b.onnx")


def test_two_models_side_by_side(pair: tuple[Path, Path]) -> None:
    shapes = ((("x", (1, 256)),), (("x", (64, 256)),))
    found = bench_models(*pair, Asked(shapes, provider="cpu", threads=1, seconds=0.3))
    assert [row["shape"] for row in found["shapes"]] == ["x:1x256", "x:64x256"]
    small, large = found["shapes"]
    assert (small["samples"], large["samples"]) == (1, 64)
    assert 1 < large["interval"][0] <= large["speedup"] <= large["interval"][1]
    assert large["samples_per_second"][1] == pytest.approx(64e3 / large["after_ms"])
    assert large["change"] > 0.1
    assert [model["parameters"] for model in found["models"]] == [2 * 256**2, 256**2]
    for described in found["models"]:
        assert described["peak_bytes"] is None or 20 * 2**20 < described["peak_bytes"] < 2**31
    counts = {row["operator"]: (row["before"]["nodes"], row["after"]["nodes"]) for row in found["operators"]}
    assert counts == {"MatMul": (2, 1), "Relu": (1, 0)}
    assert all(row["before"]["microseconds"] > 0 for row in found["operators"])
    assert {row["provider"] for row in found["operators"]} == {"cpu"}
    nodes = {row["node"]: (row["before"] > 0, row["after"] > 0) for row in found["nodes"]}
    assert nodes == {
        "first": (True, False),
        "relu": (True, False),
        "second": (True, False),
        "only": (False, True),
    }
    slow = min(found["shapes"], key=lambda row: row["interval"][0])
    assert f"at its worst shape, {slow['shape']}" in verdict(found)


def test_what_is_written_counts_as_the_node_that_it_replaces(tmp_path: Path) -> None:
    planted = build(Planted((256, 512, 256), off="zero", gain=3, hide="hidden"))
    np.savez(tmp_path / "calib.npz", **calibration_of(planted, 300))  # type: ignore[arg-type]
    asked = Options(provider="cpu", latency_gate=False, objective="flops", search=False)
    done = decompose(planted.model, calib=tmp_path / "calib.npz", options=asked)
    paths = [write(each, tmp_path / f"{at}.onnx") for at, each in enumerate((planted.model, done.model))]
    found = bench_models(*paths, Asked(provider="cpu", seconds=0.05))
    rows = {row["node"]: row for row in found["nodes"]}
    assert {site["node"] for site in done.report["sites"]} == {"layers.0/MatMul", "layers.1/MatMul"}
    for site in done.report["sites"]:
        assert 0 < rows[site["node"]]["after"] < rows[site["node"]]["before"]


def test_the_command(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    before, after = map(str, pair)
    arguments = [
        "bench",
        before,
        after,
        "--provider",
        "cpu",
        "--shape",
        "x:2x256,x:4x256",
        "--seconds",
        "0.05",
    ]
    assert cli.main([*arguments, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert [row["shape"] for row in json.loads(out)["shapes"]] == ["x:2x256", "x:4x256"]
    assert "operators, as optimized" in err
    assert "differ most" in err
    assert "times as fast as A" in err


def test_samples_of_the_user_are_run_as_they_are(pair: tuple[Path, Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((50, 256), np.float32))
    asked = Asked(calib=tmp_path / "x.npz", provider="cpu", seconds=0.05)
    (row,) = bench_models(*pair, asked)["shapes"]
    assert (row["shape"], row["change"]) == ("10 samples", 0.0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("x", "'x' is no shape: write INPUT:DIMS, as in x:32x128"),
        ("x:0x256", "is no shape"),
        ("x:2x-1", "is no shape"),
        ("z:2x256", "no input of the model is called that; it has 'x'"),
        ("x:2x255", "2x255 does not fit, the model takes Nx256"),
        ("x:2", "does not fit"),
    ],
)
def test_impossible_shapes(
    pair: tuple[Path, Path], shape: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *map(str, pair), "--provider", "cpu", "--shape", shape]) in (2, 3)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_models_that_can_not_be_compared(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = write(mlp(64), tmp_path / "c.onnx")
    renamed = onnx.load(pair[0])
    renamed.graph.node[-1].output[0] = renamed.graph.output[0].name = "z"
    with pytest.raises(InputError, match=r"'y' \(float32\) is an input or output of one of the models only"):
        bench_models(pair[0], write(renamed, tmp_path / "d.onnx"), Asked(provider="cpu"))
    assert cli.main(["bench", str(pair[0]), str(other), "--provider", "cpu", "--seconds", "0.05"]) == 5
    assert cli.main(["bench", str(pair[0]), str(tmp_path / "missing.onnx"), "--provider", "cpu"]) == 3


def test_inputs_follow_by_the_names_of_their_dims() -> None:
    proto = model(
        [helper.make_node("Identity", ["ids"], ["y"])],
        [
            value("ids", ["batch", "sequence"], onnx.TensorProto.INT64),
            value("mask", ["batch", "sequence"], onnx.TensorProto.INT64),
            value("extra", [None, 3, None]),
        ],
        [value("y", ["batch", "sequence"], onnx.TensorProto.INT64)],
    )
    feeds = calibration.shaped(proto, (("ids", (4, 16)),), 0)
    assert {name: array.shape for name, array in feeds.items()} == {
        "ids": (4, 16),
        "mask": (4, 16),
        "extra": (4, 3, 8),
    }
    told = calibration.shaped(proto, (("ids", (4, 16)), ("extra", (2, 3, 5))), 0)
    assert told["extra"].shape == (2, 3, 5)
    again = calibration.shaped(proto, (("ids", (4, 16)),), 0)
    assert all(np.array_equal(feeds[name], again[name]) for name in feeds)


def test_cuda_graphs_need_cuda(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["bench", *map(str, pair)], [str(pair[0]), str(pair[0].with_name("out.onnx"))]):
        assert cli.main([*command, "--provider", "cpu", "--cuda-graph"]) == 2
        assert "--cuda-graph: there are none on the CPU" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.skipif(cuda_problem() is not None, reason=f"no CUDA: {cuda_problem()}")
@pytest.mark.parametrize("graph", [False, True])
def test_on_a_gpu(pair: tuple[Path, Path], graph: bool) -> None:
    asked = Asked(((("x", (64, 256)),), (("x", (1, 256)),)), provider="cuda", seconds=0.3, cuda_graph=graph)
    found = bench_models(*pair, asked)
    assert found["provider"] == "cuda"
    assert {row["provider"] for row in found["operators"]} == {"cuda"}
    large, tiny = (described["device_bytes"] for described in found["models"])
    assert large is not None
    assert large >= tiny > 0
    assert "fall back" not in verdict(found)
