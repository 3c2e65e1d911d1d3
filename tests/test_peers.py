"""The methods that the compiler is measured beside do what they say; the sentence transformer where it was fetched."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models import bench_frontier, minilm, peers
from models.bench_common import markdown
from onnx_decomp.runtime import open_session
from tests.small import mlp, model, value

needs_onnxsim = pytest.mark.skipif(find_spec("onnxsim") is None, reason="onnxsim is an extra: `bench`")
needs_minilm = pytest.mark.skipif(not minilm.cached(), reason="not fetched: python -m models.minilm")


def samples(count: int = 400, width: int = 12, seed: int = 1) -> dict[str, np.ndarray]:
    """Inputs that are correlated and not centred, so that plain and whitened truncation differ."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((width, width)) * np.logspace(0, -1.5, width)
    return {"x": (rng.standard_normal((count, width)) @ mix + 1).astype(np.float32)}


def one_layer(k: int = 12, n: int = 10) -> onnx.ModelProto:
    """x W, and a sum behind it, so that the layer is not one that makes an output."""
    weights = {"W": np.random.default_rng(0).standard_normal((k, n)).astype(np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["h"], name="layer"),
        helper.make_node("Neg", ["h"], ["y"], name="negative"),
    ]
    return model(nodes, [value("x", ["N", k])], [value("y", ["N", n])], weights)


def off(work: peers.Work, reached: peers.Reached, feeds: dict[str, np.ndarray]) -> float:
    before = work.answer(peers.Reached("original", 1.0), feeds)
    return float(np.linalg.norm(work.answer(reached, feeds) - before))


def test_svd_is_numpys() -> None:
    work = peers.Work.of(one_layer(), samples())
    reached = peers.low_rank(work, 0.5, "svd")
    left, values, right = np.linalg.svd(work.old(work.sites[0]).weight.astype(np.float64))
    rank = 12 * 10 // 2 // (12 + 10)
    assert reached.flops == pytest.approx(rank * (12 + 10) / (12 * 10))
    nearest = (left[:, :rank] * values[:rank]) @ right[:rank]
    np.testing.assert_allclose(reached.affine[0].weight, nearest, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.2])
def test_whitened_svd_is_no_worse_where_it_was_fitted(ratio: float) -> None:
    calib = samples()
    work = peers.Work.of(one_layer(), calib)
    plain, whitened = (peers.low_rank(work, ratio, method) for method in ("svd", "whitened"))
    assert whitened.flops == plain.flops
    assert off(work, whitened, calib) <= off(work, plain, calib) * (1 + 1e-6)


def test_a_regressions_nearest_low_rank_map_is_the_best_one() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((200, 6)) * np.arange(1, 7), rng.standard_normal((200, 5))
    moments = peers.Moments.of(x, y)
    solution, system = peers.regression(moments, np.zeros((6, 5)), 1e-9)
    found = peers.whitened(solution, system, 2)
    least = peers.error(moments, found)
    assert np.linalg.matrix_rank(found, tol=1e-8) == 2
    for _ in range(20):
        left = np.linalg.svd(found + 0.01 * rng.standard_normal((6, 5)))[0][:, :2]
        other = left @ np.linalg.lstsq(x @ left, y - y.mean(0), rcond=None)[0]
        assert least <= peers.error(moments, other) + 1e-6


@pytest.mark.parametrize("score", ["wanda", "obs"])
def test_all_units_change_nothing(score: peers.Score) -> None:
    work = peers.Work.of(mlp(12), samples())
    reached = peers.fewer_units(work, 1.0, score)
    assert reached.flops == 1.0
    assert off(work, reached, samples(seed=5)) == 0.0
    units = peers.obs_units(np.eye(12), np.ones((12, 3)), 12)
    np.testing.assert_array_equal(units, np.arange(12))


def test_a_copied_unit_goes_for_nothing() -> None:
    proto = mlp(12)
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    first = numpy_helper.to_array(stored["W1"]).copy()
    first[:, 7] = 2 * first[:, 3]
    stored["W1"].CopyFrom(numpy_helper.from_array(first, "W1"))
    calib = samples()
    work = peers.Work.of(proto, calib)
    before = work.answer(peers.Reached("original", 1.0), calib)
    reached = peers.fewer_units(work, 11.01 / 12, "obs")
    gone = np.flatnonzero(~reached.affine[1].weight.any(axis=1))
    assert set(gone) < {3, 7}
    assert off(work, reached, calib) < 1e-3 * np.linalg.norm(before)


def test_the_flops_of_units_count_both_sides() -> None:
    work = peers.Work.of(mlp(12), samples())
    assert [(pair.first.node, pair.second.node) for pair in work.pairs] == [("first", "second")]
    reached = peers.fewer_units(work, 0.5, "wanda")
    assert reached.flops == pytest.approx(0.5)
    assert (reached.affine[1].weight.any(axis=1)).sum() == 6


def test_multiplications_are_counted_in_the_file() -> None:
    assert peers.multiplications(mlp(12)) == 2 * 12 * 12
    work = peers.Work.of(mlp(12), samples())
    assert 2 * peers.multiplications(mlp(12)) == work.flops


def test_ranks_fit_their_budget() -> None:
    shapes, free = [(64, 512), (512, 512), (512, 10)], [True, True, False]
    total = sum(k * n for k, n in shapes)
    values = [np.linspace(3, 0.1, min(shape)) for shape in shapes]
    for ratio in (0.9, 0.5, 0.2):
        for ranks in (
            peers.uniform_ranks(shapes, free, ratio * total),
            peers.energy_ranks(shapes, free, values, ratio * total),
        ):
            spent = sum(k * n if r is None else r * (k + n) for (k, n), r in zip(shapes, ranks, strict=True))
            assert 0.9 * ratio * total < spent <= ratio * total
            assert ranks[2] is None


def test_too_few_flops_are_refused() -> None:
    work = peers.Work.of(one_layer(), samples())
    with pytest.raises(peers.OutOfReachError, match="svd"):
        peers.low_rank(work, 0.01, "svd")


def test_padding_takes_no_part_in_moments() -> None:
    weights = {"table": np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32), "W": np.eye(4)}
    weights["W"] = weights["W"].astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["h"]),
        helper.make_node("MatMul", ["h", "W"], ["m"], name="layer"),
        helper.make_node("Cast", ["mask"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["real", "last"], ["wide"]),
        helper.make_node("Mul", ["m", "wide"], ["y"]),
    ]
    inputs = [value(name, ["N", "S"], TensorProto.INT64) for name in ("ids", "mask")]
    proto = model(nodes, inputs, [value("y", ["N", "S", 4])], weights)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([-1]), "last"))
    ids, mask = np.array([[1, 2, 0], [3, 0, 0]]), np.array([[1, 1, 0], [1, 0, 0]])
    work = peers.Work.of(proto, {"ids": ids, "mask": mask}, mask="mask")
    ((fit, choose),) = work.moments(work.sites, {})
    assert (fit.rows, choose.rows) == (1, 2)
    np.testing.assert_allclose(
        peers.joined([fit, choose]).mean_x, weights["table"][[1, 2, 3]].mean(0), rtol=1e-6
    )


@needs_onnxsim
@pytest.mark.parametrize("score", ["wanda", "magnitude"])
def test_onnxsim_prunes_one_pair_after_another(score: str) -> None:
    calib = samples()
    work = peers.Work.of(mlp(12), calib)
    reached = peers.METHODS[f"onnxsim-{score}"](work, 0.5)
    assert reached.model is not None
    assert reached.flops == pytest.approx(0.5)
    widths = {tensor.name: tuple(tensor.dims) for tensor in reached.model.graph.initializer}
    assert widths == {"W1": (12, 6), "W2": (6, 12)}
    assert work.answer(reached, calib).shape == calib["x"].shape


def test_the_table_of_a_case() -> None:
    case = bench_frontier.Case("digits", "all", {0.25: 0.002})
    rows = list(bench_frontier.measure_case(case, bench_frontier.subject("digits"), {"wanda"}, False))
    (row,) = rows
    assert 0.24 < row.flops <= 0.25
    assert row.beyond is None
    assert row.after > 0.97
    (made,) = bench_frontier.tables(rows)
    assert markdown(made).count("| wanda |") == 1


def test_ours_is_the_largest_of_our_own_points_within_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [SimpleNamespace(method=method, flops=flops) for method, flops in POINTS]
    of = bench_frontier.subject("digits")
    written: list[float] = []
    asked: list[dict[str, Any]] = []

    def write(point: SimpleNamespace) -> onnx.ModelProto:
        written.append(point.flops)
        return onnx.load(of.model)

    def frontier(_path: Path, **given: Any) -> SimpleNamespace:
        asked.append(given)
        return SimpleNamespace(points=points, write=write)

    monkeypatch.setattr("onnx_decomp.frontier", frontier, raising=False)
    case = bench_frontier.Case("digits", "all", {0.25: 0.002})
    own, peer = bench_frontier.measure_case(case, of, {"wanda"}, True)
    assert (own.method, own.flops, own.beyond) == (bench_frontier.OURS, 1.0, None)
    assert written == [0.24]
    assert own.worse == (0.0, 0.0, 0.0)
    assert peer.beyond == peer.worse
    assert asked[0]["ratios"] == (0.25,)
    assert asked[0]["options"].include is None


POINTS = [("plan", 0.1), ("plan", 0.24), ("plan", 0.26), ("units", 0.25)]


# --- the sentence transformer -------------------------------------------------------------------------------------


def small_weights() -> dict[str, np.ndarray]:
    """The checkpoint's tensors with a small vocabulary, drawn anew."""
    rng = np.random.default_rng(0)
    wide, width = minilm.WIDE, minilm.WIDTH
    shapes = {f"embeddings.{name}_embeddings.weight": (size, width) for name, size in SIZES.items()}
    norms = ["embeddings.LayerNorm"]
    linear = {}
    for layer in range(minilm.LAYERS):
        name = f"encoder.layer.{layer}"
        norms += [f"{name}.attention.output.LayerNorm", f"{name}.output.LayerNorm"]
        linear |= {f"{name}.attention.self.{part}": (width, width) for part in ("query", "key", "value")}
        linear |= {f"{name}.attention.output.dense": (width, width)}
        linear |= {f"{name}.intermediate.dense": (wide, width), f"{name}.output.dense": (width, wide)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    made = {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}
    for name in norms:
        made |= {f"{name}.weight": np.ones(width, np.float32), f"{name}.bias": np.zeros(width, np.float32)}
    return made


SIZES = {"word": 40, "position": 16, "token_type": 2}


def test_the_built_transformer_computes_what_numpy_does() -> None:
    weights = small_weights()
    built = minilm.build(weights)
    rng = np.random.default_rng(1)
    mask = (np.arange(9) < np.array([[9], [4], [1]])).astype(np.int64)
    feeds = {"input_ids": rng.integers(40, size=(3, 9)) * mask, "attention_mask": mask}
    (made,) = open_session(built).run(feeds).values()
    np.testing.assert_allclose(made, minilm.embed(weights, feeds), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1.0, rtol=1e-5)
    work = peers.Work.of(built, feeds, "feed-forward", "attention_mask")
    assert [pair.units for pair in work.pairs] == [minilm.WIDE] * minilm.LAYERS
    assert work.include().count("dense/MatMul") == 2 * minilm.LAYERS


def test_sentences_are_prose() -> None:
    text = "Return the value.  Never\nNone.\n\n>>> Code here.\n\nValues | tables.\n\nx = f(a[0], b[1])."
    assert list(minilm.sentences([text])) == ["Return the value.", "Never None."]


def test_cosines_and_neighbours() -> None:
    a = np.eye(3) + 0.1 * np.array([[0, 1, 0], [1, 0, 0], [0, 1, 0]])
    assert minilm.cosine(a, 2 * a) == pytest.approx(1.0)
    assert minilm.neighbours_kept(a, a).all()
    assert not minilm.neighbours_kept(a, a[[2, 1, 0]]).all()


@needs_minilm
def test_the_cached_transformer_and_its_texts() -> None:
    made = minilm.load()
    feeds = {name: array[:8] for name, array in np.load(made.calib).items()}
    assert feeds["input_ids"].shape == feeds["attention_mask"].shape == (8, minilm.FULL[1])
    embedded = peers.run_model(onnx.load(made.model), feeds)
    np.testing.assert_allclose(
        embedded, minilm.embed(minilm.read_weights(made.model.parent), feeds), atol=1e-5
    )
    tokens = {
        kind: {tuple(row[row > 0]) for row in np.load(path)["input_ids"]}
        for kind, path in {"calib": made.calib, **made.reports}.items()
    }
    assert not tokens["calib"] & (tokens["report"] | tokens["lengths"] | tokens["domain"])
