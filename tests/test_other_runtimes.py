"""Every form that is written runs and agrees outside ONNX Runtime; those that aren't installed are skipped.

The trained models are `python -m models.bench runtimes`' business.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from models.bench_runtimes import RUNTIMES, disagreement
from models.planted import Planted, build, calibration
from onnx_decomp.passes.folding import compose
from onnx_decomp.program import Segment, Structure
from tests.test_golden import CASES, emitted
from tests.test_lowrank_forms import check_low_rank, with_ranks
from tests.test_splitting import index_of, only_region, true_structure

HALF = {"gemm_float16"}
FURTHER = ("low_rank_dense", "low_rank_chain", "slices")


def written(name: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model in that form, and inputs for it."""
    if name in CASES:
        return emitted(name)
    planted = build(Planted((8, 16, 8), blocks=2, hide="none" if name == "slices" else "hidden", seed=1))
    index = index_of(planted.model)
    region = only_region(index)
    segments: tuple[Segment, ...] = with_ranks(compose(region), {0: (2,)})
    if name != "low_rank_dense":
        structure = _overlapping() if name == "slices" else true_structure(planted, region)
        (whole,) = compose(region, [structure])
        segments = with_ranks([replace(whole, form="chain")], {1: (2, 9)})
    feeds = calibration(planted, 5, seed=1)
    return check_low_rank(index, [(region, segments)], feeds, 17), feeds


def _overlapping() -> Structure:
    """Two parts that both read the middle inputs and hidden units."""
    copies = {0: np.r_[0:6, 2:8], 1: np.r_[0:11, 5:16]}
    labels = {0: np.repeat([0, 1], 6), 1: np.repeat([0, 1], 11), 2: np.repeat([0, 1], 4)}
    return Structure(
        (0, 1), {g: found.astype(np.int32) for g, found in labels.items()}, 2, "influence", 0.0, 1.0, copies
    )


@pytest.mark.parametrize("name", [*CASES, *FURTHER])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_written_model_agrees_elsewhere(runtime: str, name: str) -> None:
    if runtime != "reference":
        pytest.importorskip(runtime)
    model, feeds = written(name)
    assert disagreement(RUNTIMES[runtime], model, feeds) < (5e-3 if name in HALF else 1e-5)


def test_another_runtime_that_computes_something_else_is_seen() -> None:
    """The comparison itself: one sign turned in one block is no rounding."""
    model, feeds = written("cpu_chain")
    wrong = onnx.ModelProto.FromString(model.SerializeToString())
    block = next(tensor for tensor in wrong.graph.initializer if ".decomp.block_00" in tensor.name)
    turned = onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(block), block.name)
    block.CopyFrom(turned)

    def elsewhere(_: onnx.ModelProto, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return RUNTIMES["reference"](wrong, given)

    assert disagreement(elsewhere, model, feeds) > 0.1
