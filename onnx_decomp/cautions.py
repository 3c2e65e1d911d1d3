"""What the user should know of the data, in lines for the report."""

from __future__ import annotations

from onnx_decomp import verify
from onnx_decomp.metrics import Limits, wilson
from onnx_decomp.program import Program
from onnx_decomp.runtime import Session

MIXED = 0.01
"""Change of the outputs, when the same samples are run in two halves, beyond which they see one another."""

ROWS_PER_INPUT = 10
"""Calibration rows for each input of a site under which refits are known to suffer."""


def of_mixing(program: Program, original: Session) -> list[str]:
    """Samples that see one another are not independent: no figure holds for other sizes of a batch."""
    if program.data.kind != "calibration":
        return []
    change = verify.together(original, program.data)
    if change <= MIXED:
        return []
    many = min(program.data.samples("select"), verify.BATCH)
    return [
        f"outputs depend on which samples are run at once (by {change:.2g} for {many} or half of them): "
        "is the first axis of the inputs really that of samples? What is measured holds for such batches only"
    ]


def of_few_samples(program: Program) -> list[str]:
    """So few samples can't show that winners stay: not even if all of them do. One row of classes each."""
    if program.data.kind != "calibration":
        return []
    samples, limits = program.data.samples("select"), Limits.asked(program.options)
    least, said = wilson(0.0, samples), []
    for value in program.original.graph.output:
        metric, tolerance = limits.of(value.name)
        if metric == "top1" and len(value.type.tensor_type.shape.dim) == 2 and least > tolerance:
            said.append(
                f"{samples} samples to choose on can't show that fewer than {least:.2g} of the winners of "
                f"{value.name!r} change, and {tolerance:g} are allowed: give more samples, or allow more"
            )
    return said


def of_few_rows(program: Program) -> list[str]:
    """A refit on too few rows generalises badly; the select part will see it, the user should know why."""
    if program.data.kind != "calibration":
        return []
    samples, per_sample = program.data.samples("fit"), program.rows_per_sample
    short = [
        site
        for region in program.regions
        for site in region.sites
        if samples * per_sample[site.index] < ROWS_PER_INPUT * site.shape[0]
    ]
    if not short:
        return []
    widest = max(short, key=lambda site: site.shape[0])
    rows = samples * per_sample[widest.index]
    return [
        f"{rows} calibration rows to fit on are few for {widest.name} with {widest.shape[0]} inputs: "
        f"{ROWS_PER_INPUT} for each input let more be removed"
    ]
