"""Decompose trained ONNX models into smaller parallel blocks, verified and never slower."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_decomp.compiler import Result, decompose
    from onnx_decomp.frontiers import Frontier, frontier
    from onnx_decomp.options import Options

__all__ = ["Frontier", "Options", "Result", "decompose", "frontier"]


def __getattr__(name: str) -> Any:
    """Load the compiler when it is first asked for: `--help` need not wait for ONNX Runtime."""
    if name in ("Result", "decompose"):
        from onnx_decomp import compiler

        return getattr(compiler, name)
    if name in ("Frontier", "frontier"):
        from onnx_decomp import frontiers

        return getattr(frontiers, name)
    if name == "Options":
        from onnx_decomp.options import Options

        return Options
    raise AttributeError(name)
