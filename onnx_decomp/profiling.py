"""Which operators ONNX Runtime makes of a model, where they run and how long: its own profile, read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx

from onnx_decomp.graph import nested_graphs
from onnx_decomp.runtime import Arrays, Session

Opener = Callable[[Path], Session]
"""Opens a session whose profile goes to files that start like that."""


KERNEL, WRITTEN = "_kernel_time", "/decomp/"
"""What follows the name of a node in a profile, and in the name of what is written in its place."""


@dataclass(frozen=True)
class Kernels:
    """All nodes of one operator on one provider, and the microseconds of a run that they take together.

    On CUDA those of starting them: the GPU goes on by itself.
    """

    nodes: int = 0
    microseconds: float = 0.0


@dataclass(frozen=True)
class Profile:
    """operators: by operator and provider. nodes: microseconds of a run by name; what is written in place of a node
    counts as that node."""

    operators: Mapping[tuple[str, str], Kernels]
    nodes: Mapping[str, float]


def profile(opener: Opener, feeds: Arrays, runs: int) -> Profile:
    """Of the optimized model: medians over so many runs after a first one. Raises RunError where it fails to run."""
    times: dict[tuple[str, str], dict[tuple[str, str], list[float]]] = {}
    for event in kernel_events(opener, feeds, runs + 1):
        told = event["args"]
        key = told["op_name"], told["provider"].removesuffix("ExecutionProvider").lower()
        node = event["name"].removesuffix(KERNEL), told["node_index"]  # a name may be there twice
        times.setdefault(key, {}).setdefault(node, []).append(event["dur"])
    operators, by_name = dict[tuple[str, str], Kernels](), dict[str, float]()
    for key, nodes in times.items():
        # The first run also finds memory and algorithms.
        taken = {node: float(np.median(each[1:] or each)) for node, each in nodes.items()}
        operators[key] = Kernels(len(taken), sum(taken.values()))
        for (name, _), microseconds in taken.items():
            origin = _origin(name)
            by_name[origin] = by_name.get(origin, 0.0) + microseconds
    return Profile(operators, by_name)


def _origin(name: str) -> str:
    """The node of the model that a node stands for: ONNX Runtime fuses the next ones into it, and says so."""
    return name.removeprefix("fused ").removesuffix("/MatMulAddFusion").partition(WRITTEN)[0]


def kernel_events(opener: Opener, feeds: Arrays, runs: int) -> list[dict[str, Any]]:
    """What ONNX Runtime's own profile says of each operator in each of so many runs, in order."""
    with TemporaryDirectory() as folder:
        session = opener(Path(folder) / "profile")
        for _ in range(runs):
            session.run(feeds)
        events = json.loads(Path(session.handle.end_profiling()).read_text(encoding="utf-8"))
    return [event for event in events if event.get("cat") == "Node" and event["name"].endswith(KERNEL)]


@dataclass(frozen=True)
class Operator:
    """How many nodes of one operator the optimized models have on one provider.

    fused: neither model names it itself: ONNX Runtime makes it of others.
    """

    operator: str
    provider: str
    fused: bool
    before: int
    after: int


def side_by_side(models: Iterable[onnx.ModelProto], before: Profile, after: Profile) -> list[Operator]:
    """The operators of two profiles, those of the models that they are of told from what was made of them."""
    own = {name for model in models for name in _named(model)}
    none = Kernels()
    return [
        Operator(
            name,
            where,
            name not in own,
            *(found.operators.get((name, where), none).nodes for found in (before, after)),
        )
        for name, where in sorted({*before.operators, *after.operators})
    ]


def losses(operators: Iterable[Operator], provider: str) -> list[str]:
    """What the second model has lost of what makes the first one fast, in sentences."""
    said = []
    for each in operators:
        if each.fused and "Attention" in each.operator and each.after < each.before:
            said.append(
                f"ONNX Runtime fuses {each.operator} {each.after} times now, {each.before} times before"
            )
        if each.provider != provider and each.after > each.before:
            said.append(f"{each.after} {each.operator} run on the {each.provider}, {each.before} before")
    return said


def _named(model: onnx.ModelProto) -> set[str]:
    """Operators that a model itself names, in bodies and functions too."""
    found = set[str]()
    pending = [model.graph.node, *(function.node for function in model.functions)]
    while pending:
        for node in pending.pop():
            found.add(node.op_type)
            pending += [graph.node for graph in nested_graphs(node)]
    return found
