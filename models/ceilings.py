"""What a machine reaches at most through ONNX Runtime: products, passes over memory, operators that do nothing.

The roofline that forms are held against is made of these, not of a data sheet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_decomp.calibrating import OPSET, numpy_type
from onnx_decomp.cost import CUDA
from onnx_decomp.latency import compare
from onnx_decomp.runtime import Arrays, Device, open_session

WIDTH, QUICK = 8192, 256
"""Of the square matrices that are multiplied and passed over."""
CHAIN = 64
"""Operators on next to nothing, one after another."""


@dataclass(frozen=True)
class Ceilings:
    """flops: per microsecond. bytes: that an elementwise operator reads and writes in one. kernel: microseconds of an
    operator that does nothing."""

    dtype: str
    cuda_graph: bool
    flops: float
    bytes: float
    kernel: float

    @property
    def roofline(self) -> CUDA:
        """A cost model of any form."""
        element = numpy_type(self.dtype).itemsize
        return CUDA(self.flops, self.bytes, self.bytes, self.kernel, self.kernel, element)


def measure(provider: Device, dtype: str, cuda_graph: bool, quick: bool, seconds: float) -> Ceilings:
    """Raises RunError where the provider can't run the type."""
    width, kind = QUICK if quick else WIDTH, numpy_type(dtype)
    large = np.random.default_rng(0).standard_normal((width, width), np.float32).astype(kind)

    def run(model: onnx.ModelProto, x: np.ndarray) -> float:
        session = open_session(model, provider=provider, cuda_graph=cuda_graph)
        feeds: Arrays = {"x": x}
        return compare(session, session, feeds, seconds=seconds).before_ms * 1e3

    product = run(_chain(["MatMul"], kind, width, [numpy_helper.from_array(large, "W")]), large)
    there = run(_chain(["Relu"], kind, width), large)
    nothing = run(_chain(["Tanh"] * CHAIN, kind, 1), large[:1, :1])
    once = run(_chain(["Tanh"], kind, 1), large[:1, :1])
    kernel = max((nothing - once) / (CHAIN - 1), 1e-3)
    # The call of the runtime itself is no part of the operator.
    call = max(once - kernel, 0.0)
    return Ceilings(
        dtype,
        cuda_graph,
        2 * width**3 / max(product - call, kernel),
        2 * large.nbytes / max(there - call, kernel),
        kernel,
    )


def _chain(
    operators: Sequence[str], kind: np.dtype, width: int, stored: Sequence[onnx.TensorProto] = ()
) -> onnx.ModelProto:
    """Operators one after another from x [N, width] to y; what is stored is their second input."""
    more = [tensor.name for tensor in stored]
    names = ["x", *(f"t{at}" for at in range(1, len(operators))), "y"]
    nodes = [
        helper.make_node(operator, [names[at], *more], [names[at + 1]], name=f"{operator}_{at}")
        for at, operator in enumerate(operators)
    ]
    element = helper.np_dtype_to_tensor_dtype(kind)
    ends = [helper.make_tensor_value_info(name, element, ["N", width]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "ceiling", ends[:1], ends[1:], list(stored))
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", OPSET)])
