"""Why something was done or left alone: stable codes, which tests and other programs go by, and what each means."""

from __future__ import annotations

from collections.abc import Mapping

REASONS: Mapping[str, str] = {
    "already-compiled": "the model is already decomposed; --force compiles it again",
    "applied": "verified and kept",
    "attention-cache": "it keeps keys and values of earlier steps; compile the model as it was before that fusion",
    "attention-mask": "its mask is of an unknown layout, or of one that only it takes; give it as [batch, keys]",
    "attention-rotary": "it turns queries and keys by position; compile the model as it was before that fusion",
    "banned": "a gate undid this region in an earlier round",
    "cannot-verify": "the model can't be run here, so no change to it could be checked",
    "convolution": "a 1x1 convolution over more positions (1024) than are looked at, or over an unknown number",
    "empty-weight": "the weight has no entries",
    "estimated-null": "the initialization is only guessed from the weights; give --init or --init-preset",
    "excluded": "left out by --include or --exclude",
    "function": "it lies in a function of other operator sets than the model has, or one called too often or too deep",
    "fused-attention": "the weight is inside of a fused attention; compile the model as it was before that fusion",
    "fused-operator": "the product is fused with what follows it; compile the model as it was before that fusion",
    "overlapping-blocks": "groups of outputs read inputs of their own, some shared; the other weights are frozen",
    "independent-parts": "moving inputs shows parts that have nothing to do with each other",
    "influence-everywhere": "every part of the outputs needs every part of the inputs",
    "latency": "it was decomposed, measured, found not faster, and undone",
    "little-gain": "all that could be made smaller would save too little of the cost for what it changes",
    "nested-graph": "it lies in the body of an If, Loop or Scan, which is compiled only if it can be run by itself",
    "no-calibration": "there is no calibration data to compensate and verify on; --calib gives it",
    "no-redundancy": "every hidden unit is needed at this tolerance",
    "no-structure": "training connected all of it: no independent blocks were found",
    "not-better-than-shuffled": "blocks as good as these are found in shuffled weights too: they are chance",
    "not-faster": "the smaller form is predicted to be no faster than the dense one",
    "not-run": "the body that it lies in does not run, or not on arrays of one shape, in every part of the data",
    "null-does-not-fit": "the weights don't follow the given initialization, so nothing is decided from it",
    "off-block-evidence": "training left significant weights between the blocks",
    "off-block-influence": "inputs that would be left out move the outputs by too much",
    "old-opset": "the model's operators are of an opset before 7; convert it to a newer one",
    "overflow": "numbers in it are infinite, or so large that nothing can be computed from them",
    "overridable": "the weight is also an input, so callers may feed another; take it off the list of inputs",
    "permutation-cost": "bringing inputs and outputs into block order would cost more than it saves",
    "quantized": "the weight is quantized; compile the model first and quantize it then",
    "replay": "the replayed report did not keep it",
    "reshaped-weight": "a Reshape cuts an axis of the stored weight up, or the weight has more axes than its input",
    "rounding": "the written form differs from the dense one by more than rounding explains",
    "rounds-exhausted": "gates undid something in every round, and no more rounds are tried",
    "shared-weight": "the weight is used in several places, and not all of them can be rewritten alike",
    "tolerance": "even compensated, the rewrite changes the outputs by more than the tolerance",
    "weight-on-the-left": "the constant is the left operand, and the rank of the other one is not known",
    "weight-type": "the weight's type is not float32, float16, bfloat16 or double",
}


def explain(reason: str) -> str:
    """A reason code as a sentence for a busy engineer; a code that is not known stays as it is."""
    return REASONS.get(reason, reason)
