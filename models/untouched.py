"""Whether a compilation has changed anything of a model that its report does not say it rewrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import onnx

from onnx_decomp.verify import interface_difference

MODEL = (
    "producer_name",
    "producer_version",
    "domain",
    "model_version",
    "doc_string",
    "functions",
    "training_info",
)
GRAPH = ("name", "doc_string", "sparse_initializer", "quantization_annotation", "metadata_props")


def difference(before: onnx.ModelProto, after: onnx.ModelProto, report: Mapping[str, Any]) -> str:
    """What is no longer as it was though nothing rewrote it, in words; empty if nothing is.

    report: of the compilation. Nodes may be gone, or read something else, only if they are sites of a kept region or
    joined to one by others of which that is true; stored tensors may be gone only if nothing else read them.
    """
    if problem := interface_difference(before, after):
        return problem
    fields = [name for name in MODEL if getattr(before, name) != getattr(after, name)]
    fields += [f"graph.{name}" for name in GRAPH if getattr(before.graph, name) != getattr(after.graph, name)]
    if fields:
        return f"{', '.join(fields)} of the model changed"
    kept, gone = _told_apart(before.graph.node, after.graph.node)
    strange = [*_far_from(gone, _rewritten(report)), *_altered(gone, after.graph.node)]
    if strange:
        return f"nodes have changed that no rewrite touches: {_named(node.name or node.output[0] for node in strange)}"
    return _changed_tensors(before.graph, after.graph, kept, gone)


def _told_apart(
    before: Iterable[onnx.NodeProto], after: Iterable[onnx.NodeProto]
) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """Nodes that are there as they were, in the same order, and those that are not."""
    places = {node.SerializeToString(deterministic=True): place for place, node in enumerate(after)}
    kept, gone, last = [], [], -1
    for node in before:
        place = places.get(node.SerializeToString(deterministic=True), -1)
        (kept if place > last else gone).append(node)
        last = max(last, place)
    return kept, gone


def _rewritten(report: Mapping[str, Any]) -> set[str]:
    """Names of nodes and weights of the kept regions' sites."""
    sites = [site for site in report["sites"] if site["region"] in report["kept"]]
    return {name for site in sites for name in (site["node"], site["weight"]) if name}


def _far_from(gone: list[onnx.NodeProto], rewritten: set[str]) -> list[onnx.NodeProto]:
    """Of the nodes that are gone those that no chain of others joins to a rewritten site."""
    near = [node for node in gone if node.name in rewritten or rewritten & set(node.input)]
    far = [node for node in gone if not any(node is other for other in near)]
    tensors = {name for node in near for name in (*node.input, *node.output) if name}
    while joined := [node for node in far if tensors & {*node.input, *node.output}]:
        far = [node for node in far if not any(node is other for other in joined)]
        tensors |= {name for node in joined for name in (*node.input, *node.output) if name}
    return far


def _altered(gone: list[onnx.NodeProto], after: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Of the nodes that are gone those that are there under their name, but not for what they read."""
    named = {node.name: node for node in after if node.name}
    return [node for node in gone if node.name in named and _unread(node) != _unread(named[node.name])]


def _unread(node: onnx.NodeProto) -> onnx.NodeProto:
    """A node without its inputs."""
    found = onnx.NodeProto()
    found.CopyFrom(node)
    del found.input[:]
    return found


def _changed_tensors(
    before: onnx.GraphProto, after: onnx.GraphProto, kept: list[onnx.NodeProto], gone: list[onnx.NodeProto]
) -> str:
    stored = {tensor.name: tensor for tensor in after.initializer}
    changed = [t.name for t in before.initializer if t.name in stored and stored[t.name] != t]
    if changed:
        return f"stored tensors have changed: {_named(changed)}"
    was_read = {name for node in gone for name in node.input}
    still_read = {name for node in kept for name in node.input}
    missing = [t.name for t in before.initializer if t.name not in stored]
    lost = [name for name in missing if name in still_read or name not in was_read]
    return f"stored tensors are gone: {_named(lost)}" if lost else ""


def _named(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
