"""What each weight was drawn from before training: the null hypothesis of everything that follows.

A null comes from a snapshot of the initial weights, from a distribution that the user or a framework default
names, or, weakest, is estimated from the trained weights themselves. docs/init.md is the user's side of it.
"""

from onnx_decomp.init_stats.load import InitStats, Match, load_nulls
from onnx_decomp.init_stats.names import module_scopes
from onnx_decomp.init_stats.nulls import Law, Null
from onnx_decomp.init_stats.presets import PRESETS

__all__ = ["PRESETS", "InitStats", "Law", "Match", "Null", "load_nulls", "module_scopes"]
