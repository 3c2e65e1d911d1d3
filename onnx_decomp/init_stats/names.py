"""What exporters and frameworks call a weight, brought to one form: the path of the module that holds it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from onnx_decomp.sites import GraphIndex, Site

Scope = tuple[str, ...]

_GENERATED = re.compile(
    r"onnx::\w+|val_\d+|node_\w+|t_\d+|\d+|_v_\d+|initializer_\d+|const_fold_opt__\d+|new_const\w*"
    r"|(MatMul|Gemm|Transpose|Constant|Identity|Cast|Add)(_\d+)?"
)
_OPERATOR = re.compile(r"(MatMul|Gemm|Tensordot|ReadVariableOp|Cast|Transpose|BiasAdd|Add|Einsum)(_\d+)?")
_WRAPPER = re.compile(r"(model|module|_orig_mod|layers|sequential|functional|StatefulPartitionedCall)(_\d+)?")
_NUMBERED = re.compile(r".*\d")

STORED_OUT_IN = frozenset({"weight"})
"""Leaf names of frameworks that store [outputs, inputs]: torch."""
STORED_IN_OUT = frozenset({"kernel", "w", "W", "vars/0"})
"""Leaf names of frameworks that store [inputs, outputs]: Keras (3: vars/0), Flax, Haiku."""
_BIASES = frozenset({"bias", "b", "beta", "vars/1"})


@dataclass(frozen=True)
class Names:
    """exact: names that identify a weight, the stored one's first; paths: modules that it may belong to."""

    exact: tuple[str, ...]
    paths: tuple[Scope, ...]


def is_generated(name: str) -> bool:
    """An exporter made this name up: it says nothing about another export."""
    return not name or _GENERATED.fullmatch(name) is not None


def split(name: str) -> tuple[Scope, str]:
    """Module path and leaf of a name: `/layers.0/fc1/MatMul` and `layers.0.fc1.weight` give (layers, 0, fc1).

    The leaf is "" where the name ends in the module itself.
    """
    scopes = [scope for scope in re.sub(r":\d+$", "", name).split("/") if scope]
    # TorchScript repeats the container in the name of its child: /net/net.0/Gemm is net.0
    nested = [a for a, b in pairwise([*scopes, ""]) if not b.startswith(a + ".")]
    parts = [part for scope in nested for part in scope.split(".") if part]
    operator = ""
    while len(parts) > 1 and _OPERATOR.fullmatch(parts[-1]):
        operator = parts.pop()
    if operator:
        return tuple(parts), "bias" if operator.startswith("BiasAdd") else ""
    leaf = ""
    if len(parts) > 2 and parts[-2] == "vars":
        leaf = f"vars/{parts[-1]}"
        del parts[-2:]
    elif len(parts) > 1 and parts[-1] in STORED_OUT_IN | STORED_IN_OUT | _BIASES:
        leaf = parts.pop()
    return tuple(parts), leaf


def site_names(site: Site, scope: str | None = None) -> Names:
    """Every name a site goes by; `scope` is the module that the exporter noted for it."""
    paths = [split(scope)[0]] if scope else []
    paths += [split(name)[0] for name in (site.weight, site.node) if not is_generated(name)]
    if not paths and site.bias and not is_generated(site.bias):
        # Only where nothing better is known: exporters let layers with equal biases share one.
        path, leaf = split(site.bias)
        if leaf in _BIASES:
            paths.append(path)
    exact = tuple(name for name in (site.weight, site.node) if name)
    return Names(exact, tuple(dict.fromkeys(path for path in paths if path)))


def agreement(a: Scope, b: Scope) -> tuple[int, bool]:
    """How well two module paths agree: (components in common from the end, equal); (0, False): they don't.

    What is left of the common end may only be a prefix: nothing on one side, a wrapper such as `model`, or
    another name for the whole (`bert`, `encoder`) where at least two components agree. Differing numbers are
    different layers.
    """
    common = 0
    for x, y in zip(reversed(a), reversed(b), strict=False):
        if x != y:
            break
        common += 1
    if all(part.isdigit() for part in a[len(a) - common :]):
        return (0, False)
    left, right = _unwrapped(a[: len(a) - common]), _unwrapped(b[: len(b) - common])
    if left and right and (common < 2 or _NUMBERED.fullmatch(left[-1]) or _NUMBERED.fullmatch(right[-1])):
        return (0, False)
    return (common, a == b)


def _unwrapped(head: Scope) -> Scope:
    start = 0
    while start < len(head) and _WRAPPER.fullmatch(head[start]):
        start += 1
    return head[start:]


def module_scopes(index: GraphIndex, sites: Sequence[Site]) -> Mapping[int, str]:
    """Module of each site (by Site.index) where the exporter noted it, as torch's dynamo exporter does."""
    scopes = {}
    for site in sites:
        if not site.nodes:
            continue
        for item in index.node(site.nodes[0]).metadata_props:
            if item.key == "pkg.torch.onnx.name_scopes":
                # "['', 'layers.0', 'layers.0.fc1', 'linear_2']": modules from the outermost in, then the call
                modules = re.findall(r"'([^']*)'", item.value)[:-1]
                if modules and modules[-1]:
                    scopes[site.index] = modules[-1]
    return scopes


def count_layers(paths: Sequence[Scope]) -> int:
    """Number of numbered layers that the paths run through: (h, 0, mlp), (h, 0, attn), (h, 1, mlp) -> 2."""
    layers = set()
    for path in paths:
        numbers = [position for position, part in enumerate(path) if part.isdigit()]
        if numbers:
            layers.add(path[: numbers[0] + 1])
    return len(layers)
