"""The benchmark's own arithmetic, and that its sections run; the figures are docs/benchmarks.md's business."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from models import (
    bench,
    bench_compile,
    bench_cuda,
    bench_decision,
    bench_forms,
    bench_networks,
    bench_planted,
    bench_rounding,
    cuda_forms,
    cuda_musts,
)
from models.bench_common import machine, markdown, table
from models.networks import EVERY, Network
from models.planted import INPUT, Planted, build
from onnx_decomp.runtime import cuda_problem


def planted_row(share: float, flops: float, speedup: float) -> bench_planted.Row:
    return bench_planted.Row(
        (8, 8), 2, False, "none", "chain", 1, 1, 1.0, 1.0, flops, share, speedup, (speedup, speedup)
    )


def test_the_ideal_leaves_what_is_not_a_product() -> None:
    assert planted_row(1.0, 4.0, 3.0).ideal == 4.0
    assert planted_row(1.0, 4.0, 3.0).reached == 0.75
    assert planted_row(0.5, 4.0, 1.6).ideal == pytest.approx(1 / (0.5 + 0.5 / 4))


def test_nearly_all_of_a_planted_run_is_products() -> None:
    planted = build(Planted((256, 512, 256), 2, hide="none"))
    feeds = {INPUT: np.ones((64, 256), np.float32)}
    assert 0.5 < bench_planted.product_share(planted.model, feeds, 1) <= 1.0


def test_a_small_planted_run_goes_through_the_compiler() -> None:
    rows = list(bench_planted.measure_one(Planted((128, 512, 128), 2, off="zero", hide="hidden"), [64], 0.01))
    assert [row.threads for row in rows] == [1, None]
    assert all(row.flops == pytest.approx(2.0) for row in rows)
    assert {row.form for row in rows} <= {"chain", "batched"}


def test_a_small_network_goes_through_the_compiler() -> None:
    spec = Network("towers", width=128, hidden=512, blocks=2, layers=2, outputs=128, rank=2)
    rows = list(bench_networks.measure_one("two towers", spec, [64], 0.01))
    assert [row.threads for row in rows] == [1, None]
    assert all((row.right, row.sites, row.gathers) == (2, 2, 0) for row in rows)
    assert all(row.flops == pytest.approx(2.0) for row in rows)
    assert all(1.0 < row.ideal <= 2.0 for row in rows)
    (made,) = bench_networks.tables(rows)
    assert markdown(made).count("| two towers | 2 of 2 | 0 | 2.00x | 64 |") == 1


def test_the_ideal_of_a_network_shrinks_products_of_stored_weights_alone() -> None:
    spent = {
        ("fused up/MatMul/MatMulAddFusion", "FusedGemm"): 40.0,
        ("down/MatMul", "MatMul"): 40.0,
        ("head/MatMul", "MatMul"): 8.0,
        ("scores/MatMul", "MatMul"): 6.0,
        ("down/MatMul/bias", "Add"): 6.0,
    }
    kept = {"up/MatMul": 0.25, "down/MatMul": 0.25, "head/MatMul": 1.0}
    assert bench_networks.ideal_speedup(spent, kept) == pytest.approx(100 / (20 + 8 + 6 + 6))
    with pytest.raises(ValueError, match="gate/MatMul"):
        bench_networks.ideal_speedup(spent, kept | {"gate/MatMul": 0.25})


def test_a_site_is_right_with_exactly_the_planted_blocks() -> None:
    def site(*blocks: list[int], decision: str = "split") -> dict[str, object]:
        found = {"blocks": [{"rows": block, "cols": block} for block in blocks]}
        return {"decision": decision, "structure": found}

    labels, every = np.array([0, 1, 0, 1], np.int32), np.full(4, EVERY, np.int32)
    assert bench_networks.is_right(site([1, 3], [0, 2]), labels, labels)
    assert not bench_networks.is_right(site([0, 1], [2, 3]), labels, labels)
    assert not bench_networks.is_right(site([1, 3], [0, 2], decision="dense"), labels, labels)
    assert not bench_networks.is_right(site([1, 3], [0, 2]), labels, every)
    assert bench_networks.is_right({"decision": "dense", "structure": None}, labels, every)


def test_forms_are_measured_and_chosen_from() -> None:
    rows = list(bench_forms._measure(((64, 64),), (2,), (8,), 0.01))
    assert [row.form for row in rows] == ["parallel", "batched"]
    (choice,) = bench_forms.picks(rows).values()
    assert choice.regret >= 0
    assert len(bench_forms.tables(rows)) == 3


def test_regret_is_what_the_wrong_choice_costs() -> None:
    def row(form: str, predicted: float, measured: float) -> bench_forms.Row:
        return bench_forms.Row(64, 64, 2, 8, form, 1.0, 1.0, predicted, measured, (measured, measured))

    (choice,) = bench_forms.picks([row("parallel", 3.0, 2.0), row("batched", 2.0, 2.5)]).values()
    assert choice == ("parallel", "batched", pytest.approx(0.25))


def test_a_decision_in_a_process_of_its_own() -> None:
    row = bench_decision._measure(
        Planted((256, 256), 2, gain=3.0, unchanged=0.0, off="untouched"), "snapshot", True
    )
    assert row.blocks == 2
    assert row.recovered == 1.0
    assert row.whole >= row.criterion > 0
    assert row.peak > 2  # the weights and their initial values at least


def test_rounding_is_measured_in_the_terms_of_tolerances() -> None:
    rows = bench_rounding.measure_one("digits", 0.01)
    assert [row.form for row in rows] == ["float16", "int8"]
    half, int8 = rows
    assert 1e-5 < half.rel_l2 < 1e-3 < int8.rel_l2 < 0.05
    assert half.size == pytest.approx(0.5, abs=0.05)
    assert int8.size == pytest.approx(0.26, abs=0.05)
    assert all(row.worse[1] <= row.before - row.after <= row.worse[2] for row in rows)
    (made,) = bench_rounding.tables(rows)
    assert "| digits | float16 |" in markdown(made)


def test_stage_times_add_up_over_rounds() -> None:
    watch = bench_compile.StageTimes()
    for stage in ("reading", "planning, round 1", "measuring, round 1", "planning, round 2", ""):
        watch.stage(stage)
    assert list(watch.spent) == ["reading", "planning", "measuring"]
    assert watch.rounds == 2


def test_the_machine_is_described_without_names_of_hosts() -> None:
    assert set(machine()) == {"cpu", "cores", "python", "numpy", "onnxruntime", "provider", "load"}


def test_tables_become_markdown() -> None:
    made = table("title", ["name"], ["number"])
    made.add_row("a", "1")
    assert markdown(made) == "**title**\n\n| name | number |\n| --- | ---: |\n| a | 1 |\n"


def test_the_command_writes_figures_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = bench.Section("one row", lambda _: [planted_row(1.0, 4.0, 3.0)], bench_planted.tables)
    monkeypatch.setitem(bench.SECTIONS, "planted", section)
    figures, page = tmp_path / "figures.json", tmp_path / "tables.md"
    arguments = ["planted", "--quick", "--json", str(figures), "--markdown", str(page)]
    assert CliRunner().invoke(bench.main, arguments, catch_exceptions=False).exit_code == 0
    assert json.loads(figures.read_text())["sections"]["planted"][0]["speedup"] == 3.0
    assert "| 75% |" in page.read_text()


def test_every_section_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=160)
    section = bench.Section("nothing", lambda _: [], bench_compile.tables)
    monkeypatch.setattr(bench, "SECTIONS", {"compile": section})
    assert bench.run(["compile"], True, console).figures["sections"] == {"compile": []}


NAMES = ["chain", "chain + rank", "batched", "batched + rank", "reduced to 1/2"]


def test_every_form_is_timed_as_on_a_gpu() -> None:
    """The suite for CUDA, on the CPU provider: what is measured, not how fast it is."""
    sizes = cuda_forms.Sizes(((64, 128, 64),), (8,), (2,), ("float32",), 0.01, quick=True)
    rows = list(cuda_forms.measure("cpu", sizes))
    assert [row.form for row in rows] == NAMES
    assert {row.cuda_graph for row in rows} == {False}
    assert rows[0].ideal == 2.0
    assert rows[1].ideal == pytest.approx(2 * 64 * 128 / (64 * 128 + 2 * 4 * 192))
    assert rows[4].ideal == 2.0
    assert all(row.roofline_ms > 0 and row.dense_ms > 0 for row in rows)


def test_what_has_to_hold_on_a_gpu_is_measured_here_too() -> None:
    (near,) = cuda_musts.towers("cpu", quick=True)
    assert (near.form, near.flops) == ("chain", 1 / 8)
    assert near.roofline_ms is not None
    assert 0 < near.roofline_ms < near.after_ms < near.before_ms
    rows = list(cuda_musts.shapes("cpu", quick=True))
    assert [row.tokens for row in rows] == [1, 16]
    assert cuda_musts.tables(rows)[0].row_count == 2


def test_what_does_not_hold_on_a_gpu_is_told() -> None:
    row = cuda_musts.Timed("m", "float16", "batched", 0.25, 16, False, 1.0, 0.5, 2.0, (1.9, 2.1), 0.45)
    slow = replace(row, speedup=0.9, interval=(0.8, 0.95), roofline_ms=0.4)
    assert cuda_musts.below_roofline([row, slow]) == []
    assert cuda_musts.below_roofline([slow]) == ["planted towers reach 80% of the roofline, not 85%"]
    assert cuda_musts.slower([row, replace(slow, flops=1.0)]) == []
    assert cuda_musts.slower([slow]) == ["m (float16) is slower at 16 tokens: 0.90 [0.80, 0.95]"]
    assert cuda_musts.not_faster([row]) == []
    assert len(cuda_musts.not_faster([slow])) == 1


@pytest.mark.cuda
@pytest.mark.skipif(cuda_problem() is not None, reason=f"no CUDA: {cuda_problem()}")
def test_what_has_to_hold_on_a_gpu_holds() -> None:
    """At full size: minutes."""
    for section in bench_cuda.sections("cuda").values():
        if section.wrong is not None:
            assert section.wrong(section.measure(False)) == []


@pytest.mark.cuda
@pytest.mark.skipif(cuda_problem() is not None, reason=f"no CUDA: {cuda_problem()}")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_form_runs_on_a_gpu(dtype: str) -> None:
    sizes = cuda_forms.Sizes(((256, 512, 256),), (8, 64), (4,), (dtype,), 0.05, quick=True)
    rows = list(cuda_forms.measure("cuda", sizes))
    assert [row.form for row in rows] == [name for name in NAMES for _ in range(4)]
    assert [row.cuda_graph for row in rows] == [False, False, True, True] * 5


def test_without_a_gpu_the_reason_is_told() -> None:
    if cuda_problem() is not None:
        found = CliRunner().invoke(bench_cuda.main, ["--quick"])
        assert (found.exit_code, found.output.count("\n")) == (7, 1)
        assert "not measured: CUDA is not available" in found.output
