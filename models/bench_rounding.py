"""What rounding alone does to the trained models: float16, and int8 as ONNX Runtime's own quantizer writes it.

A tolerance says little by itself. Here is what the two roundings that people take without much thought change, in the
same numbers, on the same held-back samples, and how much faster they are on this CPU.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from rich.table import Table

import models
from models.bench_common import Section, compare, table, times
from models.bench_independent import answer, interval, scores, spread
from onnx_decomp.metrics import compare_outputs

MODELS = ("digits", "ranker", "towers/dense", "charlm")
FORMS = ("float16", "int8")
TIMED, SECONDS = 64, 2.0
"""Samples of a timed run, and how long two models are compared."""


@dataclass(frozen=True)
class Row:
    """One model rounded in one way, against itself in float32, on the report inputs.

    cosine: mean over samples. top1, kl: of each choice among classes, several in a sample of towers. worse: what the
    task metric lost, in its own unit, with its paired 95 % interval. size: bytes of the file over those of the float32
    one. speedup: one thread, runs of `TIMED` samples.
    """

    model: str
    form: str
    samples: int
    rel_l2: float
    cosine: float
    top1: float | None
    kl: float | None
    metric: str
    before: float
    after: float
    worse: tuple[float, float, float]
    size: float
    speedup: float
    interval: tuple[float, float]


def measure(quick: bool) -> list[Row]:
    names, seconds = (MODELS[:1], 0.2) if quick else (MODELS, SECONDS)
    return [row for name in names for row in measure_one(name, seconds)]


def measure_one(name: str, seconds: float) -> list[Row]:
    trained = models.load(name)
    original = onnx.load(trained.model)
    with np.load(trained.report) as archive:
        feeds = dict(archive)
    target = feeds.pop("target")
    reference = answer(original, feeds)
    before = scores(trained, reference, target)
    few = {key: array[:TIMED] for key, array in feeds.items()}
    rows = []
    for form in FORMS:
        written = rounded(trained.model, form)
        made = answer(written, feeds)
        after = scores(trained, made, target)
        by_head = [{"y": logits.reshape(*target.shape, -1)} for logits in (reference, made)]
        change = compare_outputs([(by_head[0], by_head[1])], "rel-l2").outputs["y"]
        assert change.rel_l2 is not None
        assert change.cosine is not None
        speed = compare(original, written, few, threads=1, seconds=seconds)
        rows.append(
            Row(
                name,
                form,
                len(target),
                change.rel_l2,
                change.cosine,
                change.top1,
                change.kl,
                trained.meta["metric"],
                float(before.mean()),
                float(after.mean()),
                interval(models.worsening(trained, before, after)),  # type: ignore[arg-type]
                written.ByteSize() / original.ByteSize(),
                speed.speedup,
                speed.interval,
            )
        )
    return rows


def rounded(path: Path, form: str) -> onnx.ModelProto:
    """The model with float16 weights and arithmetic inside, or with int8 weights, one scale for each column."""
    if form == "float16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        return convert_float_to_float16(onnx.load(path), keep_io_types=True)
    from onnxruntime.quantization import QuantType, quantize_dynamic

    bare = onnx.load(path)
    del bare.graph.value_info[:]  # it turns weights of Gemm round, and trips over their recorded shapes
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "int8.onnx"
        logging.disable(logging.WARNING)  # it says, on the root logger, that shapes could be inferred first
        try:
            quantize_dynamic(bare, out, per_channel=True, weight_type=QuantType.QInt8)
        finally:
            logging.disable(logging.NOTSET)
        written = onnx.load(out)
    if not any(node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul") for node in written.graph.node):
        raise AssertionError(f"{path}: nothing of it became int8")
    return written


def tables(rows: Sequence[Row]) -> list[Table]:
    made = table(
        f"rounding: against float32, on held-back samples; speed with one thread, {TIMED} samples in a run",
        ["model", "form"],
        ["relative change", "1 - cosine", "winners changed", "KL", "metric", "lost", "bytes", "speed-up"],
    )
    for row in rows:
        made.add_row(
            row.model,
            row.form,
            f"{row.rel_l2:.2g}",
            f"{1 - row.cosine:.1g}",
            "-" if row.top1 is None else f"{1 - row.top1:.2%}",
            "-" if row.kl is None else f"{row.kl:.1g}",
            f"{row.metric} {row.before:.4f} -> {row.after:.4f}",
            spread(row.worse, row.metric),
            f"{row.size:.2f}x",
            times(row.speedup, row.interval),
        )
    return [made]


SECTION = Section("what float16 and int8 change", measure, tables)
