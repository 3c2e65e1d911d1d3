"""Small graphs of new nodes, built with onnx-graphsurgeon, which never sees the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_decomp.graph import unique
from onnx_decomp.sites import Site

Value: TypeAlias = Any
"""A graphsurgeon tensor; its own annotations are not for type checkers."""


@dataclass
class Fragment:
    """A small graph under construction. Names are made unique against the model's own."""

    taken: set[str]
    opset: int
    nodes: list[gs.Node] = field(default_factory=list)
    outer: dict[str, Value] = field(default_factory=dict)
    """Tensors of the model's own that are read as they stand; graphsurgeon wants one object for each name."""
    weights: dict[str, list[gs.Constant]] = field(default_factory=dict)
    casts: dict[str, Value] = field(default_factory=dict)
    """What a weight that is stored in another type is once it was converted, by its name."""

    def unique(self, name: str) -> str:
        return unique(name, self.taken)

    def weight(self, name: str, array: NDArray[Any], dtype: np.dtype[Any]) -> gs.Constant:
        """A new constant; one of the same name and content is used again, so that a shared weight stays shared."""
        stored = np.ascontiguousarray(array, dtype)
        for other in self.weights.setdefault(name, []):
            if np.array_equal(other.values, stored):
                return other
        self.weights[name].append(gs.Constant(self.unique(name), stored))
        return self.weights[name][-1]

    def stored(self, name: str, array: NDArray[Any], site: Site) -> Value:
        """A new weight of a site, in the type that its own is stored in; a Cast leads to the type of the product."""
        constant = self.weight(name, array, site.storage)
        if site.storage == site.dtype:
            return constant
        if constant.name not in self.casts:
            to = int(onnx.helper.np_dtype_to_tensor_dtype(site.dtype))
            node = f"{site.name}/decomp/{name.rpartition('.decomp.')[2]}/Cast"
            self.casts[constant.name] = self.one("Cast", node, [constant], to=to)
        return self.casts[constant.name]

    def read(self, name: str) -> Value:
        return self.outer.setdefault(name, gs.Variable(name))

    def integers(self, name: str, values: Sequence[int] | NDArray[Any]) -> gs.Constant:
        return gs.Constant(self.unique(name), np.asarray(values, np.int64))

    def apply(
        self,
        op: str,
        name: str,
        inputs: Sequence[Value],
        outputs: int = 1,
        into: str | None = None,
        domain: str | None = None,
        **attributes: Any,
    ) -> list[Value]:
        """Append a node; its outputs are called after it, or `into` where the model already has a name for it."""
        name = self.unique(name)
        names = [into] if into else [self.unique(f"{name}_output_{i}") for i in range(outputs)]
        made = [gs.Variable(output) for output in names]
        self.nodes.append(
            gs.Node(op=op, name=name, attrs=attributes, inputs=list(inputs), outputs=made, domain=domain)
        )
        return made

    def one(self, op: str, name: str, inputs: Sequence[Value], **rest: Any) -> Value:
        return self.apply(op, name, inputs, **rest)[0]

    def messages(self) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """The fragment as messages to splice in: nodes in order, and the initializers they read."""
        graph = gs.Graph(nodes=self.nodes, opset=self.opset, name="fragment")
        exported = gs.export_onnx(graph, do_type_check=False).graph
        # Copies: as parts of the exported message they would keep all of its tensors in memory.
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in exported.node]
        return nodes, list(exported.initializer)
