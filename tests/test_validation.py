"""Random planted models through the whole compiler: five seeds always, a hundred with `make validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from models.planted import Planted, PlantedModel, build, shuffled
from onnx_decomp.compiler import compile_file
from onnx_decomp.options import Options
from tests.recovery import oracle_recovers

SEEDS = [pytest.param(seed, marks=[pytest.mark.slow] if seed >= 5 else []) for seed in range(100)]

NOTHING = {"no-structure", "not-better-than-shuffled", "off-block-evidence"}


def random_spec(seed: int) -> Planted:
    """Any size, storage, type, decay and jitter; even blocks of 32 elements or more, uneven ones of 20 or more."""
    rng = np.random.default_rng(seed)
    widths = tuple(int(width) for width in rng.choice([256, 320, 512, 768, 1024], rng.integers(2, 5)))
    uneven = bool(rng.random() < 0.5)
    return Planted(
        widths=widths,
        blocks=int(rng.integers(2, min(16, min(widths) // (64 if uneven else 32)) + 1)),
        uneven=uneven,
        decay=float(rng.choice([1.0, 0.3, 0.01])),
        jitter=float(rng.choice([0.0, 0.1, 0.3, 0.6])),
        off=str(rng.choice(["zero", "shrunk", "untouched"])),  # type: ignore[arg-type]
        form=str(rng.choice(["MatMul", "Gemm", "Constant", "Transpose", "Identity"])),  # type: ignore[arg-type]
        dtype=str(rng.choice(["float32", "float16"])),  # type: ignore[arg-type]
        activation=str(rng.choice(["Relu", "Tanh", "ErfGelu"])),  # type: ignore[arg-type]
        seed=seed,
    )


def compiled(planted: PlantedModel, folder: Path) -> list[dict[str, Any]]:
    """The report's sites, from files as a user has them: the model and the snapshot of its initial weights."""
    onnx.save(planted.model, folder / "model.onnx")
    np.savez(folder / "init.npz", **planted.snapshot)
    options = Options(init=folder / "init.npz", provider="cpu", latency_gate=False)
    sites: list[dict[str, Any]] = compile_file(folder / "model.onnx", None, options).report["sites"]
    return sites


def check_recovered(planted: PlantedModel, sites: list[dict[str, Any]]) -> None:
    for layer, site in enumerate(sites):
        for side, labels in (("rows", planted.labels[layer]), ("cols", planted.labels[layer + 1])):
            found = {frozenset(block[side]) for block in site["structure"]["blocks"]}
            wanted = {frozenset(np.flatnonzero(labels == b).tolist()) for b in range(planted.spec.blocks)}
            assert found == wanted, (layer, side)


@pytest.mark.parametrize("seed", SEEDS)
def test_planted_blocks_are_found_exactly(seed: int, tmp_path: Path) -> None:
    planted = build(random_spec(seed))
    if planted.spec.jitter > 0.3 and not oracle_recovers(planted):
        pytest.skip(
            "not even the oracle, which knows the densities and all other labels, places every element"
        )
    check_recovered(planted, compiled(planted, tmp_path))


@pytest.mark.parametrize("seed", SEEDS)
def test_shuffled_weights_are_declined(seed: int, tmp_path: Path) -> None:
    planted = shuffled(build(random_spec(seed)), np.random.default_rng(seed))
    for site in compiled(planted, tmp_path):
        assert site["structure"] is None
        assert site["decision"] == "dense"
        assert {d["reason"] for d in site["decisions"]} & (NOTHING | {"null-does-not-fit"})
