"""The original graph, run with other weights.

Every site of interest becomes MatMul + Add whose W and b are graph inputs of free size, so one ONNX Runtime session
serves every candidate: a rewrite is tried by feeding it, with fewer hidden units or copies of some if it has them.
What the probe computes with a rewrite's dense-equivalent weights is what
the written model must compute, up to float noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnx_decomp.axes import Region
from onnx_decomp.graph import is_standard, mentions
from onnx_decomp.graph_index import INITIALIZERS_APART, GraphIndex
from onnx_decomp.runtime import Device, Session, open_session
from onnx_decomp.scratch import kept
from onnx_decomp.sites import Affine, Site, read_affine

Feeds = Mapping[str, NDArray[Any]]


def probe_model(index: GraphIndex, sites: Sequence[Site], fetch: Iterable[str]) -> onnx.ModelProto:
    """The original with each site's affine map fed through inputs, and `fetch` as further outputs."""
    model = onnx.ModelProto()
    model.CopyFrom(index.proto)
    graph = model.graph
    replaced = {site.nodes[-1]: site for site in sites}
    dropped = {position for site in sites for position in site.nodes}
    dropped |= index.between([(site.operand, site.nodes[0]) for site in sites])
    nodes = []
    for position, node in enumerate(index.nodes):
        if position in replaced:
            nodes += _affine_nodes(replaced[position])
        elif position not in dropped:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(index.held(nodes))
    _only_apart(model)
    for site in sites:
        _add_weights(graph, site)
    del graph.value_info[:]  # a rewrite may have fewer hidden units, or copies of some
    _drop_unread(graph, {site.weight for site in sites})
    known = {value.name for value in graph.output}
    for name in dict.fromkeys(fetch):
        if name not in known:
            graph.output.append(onnx.ValueInfoProto(name=name))
    return model


def local_model(index: GraphIndex, region: Region, fetch: Iterable[str]) -> onnx.ModelProto:
    """The same for one region by itself: what enters it from outside is fed, `fetch` are the outputs."""
    positions = set(region.links) | _feeders(index, region)
    return part_model(index, region.sites, positions, outer_tensors(index, region), fetch)


def part_model(
    index: GraphIndex, sites: Sequence[Site], positions: set[int], fed: Sequence[str], fetch: Iterable[str]
) -> onnx.ModelProto:
    """Some sites, and operators (by position) beside them, as a model: `fed` are its inputs, `fetch` its outputs."""
    model = onnx.ModelProto(ir_version=max(index.proto.ir_version, INITIALIZERS_APART))
    model.opset_import.extend(index.proto.opset_import)
    model.functions.extend(index.proto.functions)
    graph = model.graph
    graph.name = "part"
    ends = {site.nodes[-1]: site for site in sites}
    for position in sorted(positions | set(ends)):
        graph.node.extend(_affine_nodes(ends[position]) if position in ends else [index.node(position)])
    read = set(mentions(graph.node))
    graph.initializer.extend(
        _named(tensor, name)
        for name, tensor in index.stored.items()
        if name in read and index.producer.get(name) not in positions
    )
    for name in fed:
        element = index.element_types.get(name) or onnx.helper.np_dtype_to_tensor_dtype(sites[0].dtype)
        graph.input.append(onnx.helper.make_tensor_value_info(name, element, None))
    for site in sites:
        _add_weights(graph, site)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(fetch))
    return model


def _named(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    """A copy of a stored tensor under a name; what lies in a file stays there, and may be larger than a message."""
    found = onnx.TensorProto()
    found.CopyFrom(tensor)
    found.name = name
    return found


def outer_tensors(index: GraphIndex, region: Region) -> tuple[str, ...]:
    """Tensors computed outside of a region that its operators read."""
    made = {name for position in region.nodes for name in index.node(position).output}
    reads = [site.input for site in region.sites]
    reads += [name for position in region.links for name in index.node(position).input if name]
    return tuple(name for name in dict.fromkeys(reads) if name not in made and index.resolve(name) is None)


def stream_of(index: GraphIndex, site: Site) -> str | None:
    """What a site's output is added to (a residual stream), if nothing else reads it; None where there is no such Add.

    A refit of the site may aim at the sum: what was lost before it in the stream is then made up for as well.
    """
    readers = index.consumers.get(site.output, [])
    if len(readers) != 1 or site.output in index.pinned_tensors:
        return None
    node = index.node(readers[0])
    if not is_standard(node, "Add"):
        return None
    others = [name for name in node.input if name != site.output]
    return others[0] if len(others) == 1 and others[0] not in index.constants.sources else None


def _feeders(index: GraphIndex, region: Region) -> set[int]:
    """Operators that only turn constants into what the region's links read."""
    found: set[int] = set()
    pending = [name for position in region.links for name in index.node(position).input if name]
    while pending:
        name = pending.pop()
        position = index.producer.get(name)
        if position is not None and name not in index.stored and index.resolve(name) is not None:
            found.add(position)
            pending += index.node(position).input
    return found


def _add_weights(graph: onnx.GraphProto, site: Site) -> None:
    element = onnx.helper.np_dtype_to_tensor_dtype(site.dtype)
    graph.input.append(onnx.helper.make_tensor_value_info(_weight(site), element, [None, None]))
    graph.input.append(onnx.helper.make_tensor_value_info(_bias(site), element, [None]))


def _affine_nodes(site: Site) -> list[onnx.NodeProto]:
    product = f"{_weight(site)}.product"
    return [
        onnx.helper.make_node(
            "MatMul", [site.input, _weight(site)], [product], name=f"{_weight(site)}/MatMul"
        ),
        onnx.helper.make_node("Add", [product, _bias(site)], [site.output], name=f"{_weight(site)}/Add"),
    ]


def _weight(site: Site) -> str:
    return f"onnx_decomp.probe.{site.index}.W"


def _bias(site: Site) -> str:
    return f"onnx_decomp.probe.{site.index}.b"


def _only_apart(model: onnx.ModelProto) -> None:
    """Old models list initializers among the inputs, where newer ones mean defaults that may be overridden."""
    if model.ir_version >= INITIALIZERS_APART:
        return
    model.ir_version = INITIALIZERS_APART
    stored = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in stored]
    copies = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
    del model.graph.input[:]
    model.graph.input.extend(copies)


def _drop_unread(graph: onnx.GraphProto, weights: set[str]) -> None:
    """Initializers that only the replaced nodes read would stay in memory for nothing."""
    read = set(mentions(graph.node)) | {value.name for value in graph.output}
    kept = [t for t in graph.initializer if t.name not in weights or t.name in read]
    if len(kept) < len(graph.initializer):
        copies = [onnx.TensorProto.FromString(t.SerializeToString()) for t in kept]
        del graph.initializer[:]
        graph.initializer.extend(copies)


@dataclass(frozen=True)
class Piece:
    """The operators at some positions, what is fed to them, and what they hand on."""

    positions: frozenset[int]
    entering: tuple[str, ...]
    leaving: tuple[str, ...]


class Probe:
    """A session of `probe_model`; `sites` are what can be fed anew, everything else is the original's.

    fetch: further tensors that can be asked for, beside inputs and outputs of the sites. region: by itself, fed with
    its `outer_tensors`; every run of the whole graph runs all of it, whatever is asked for. piece: by itself too.
    """

    def __init__(
        self,
        index: GraphIndex,
        sites: Sequence[Site],
        folder: Path | None,
        fetch: Sequence[str] = (),
        region: Region | None = None,
        piece: Piece | None = None,
        provider: Device = "cpu",
    ) -> None:
        self._index = index
        self.sites = tuple(sites)
        self._original: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}
        tensors = [*fetch, *(name for site in sites for name in (site.input, site.output))]
        if piece is not None:
            self._fed, self.outputs = set(piece.entering), piece.leaving
            model = part_model(index, sites, set(piece.positions), piece.entering, piece.leaving)
        elif region is not None:
            self._fed, self.outputs = set(outer_tensors(index, region)), region.exits
            model = local_model(index, region, self._fetchable([*tensors, *region.exits]))
        else:
            self._fed = set(index.inputs)
            # Nothing forbids to list an output twice.
            self.outputs = tuple(dict.fromkeys(value.name for value in index.proto.graph.output))
            model = probe_model(index, sites, self._fetchable(tensors))
        self._session: Session = open_session(model, provider=provider, folder=folder, prepack=False)

    def _fetchable(self, tensors: Iterable[str]) -> list[str]:
        return [name for name in dict.fromkeys(tensors) if name not in self._fed]

    def run(
        self, feeds: Feeds, affine: Mapping[int, Affine], fetch: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Outputs (or the tensors in `fetch`) with the given affine maps in place of the original's, by site index."""
        wanted = self.outputs if fetch is None else tuple(dict.fromkeys(fetch))
        given = {name: feeds[name] for name in wanted if name in feeds}
        asked = [name for name in wanted if name not in given]
        if not asked:
            return given
        inputs = {name: array for name, array in feeds.items() if name in self._fed}
        for site in self.sites:
            inputs[_weight(site)], inputs[_bias(site)] = self._stored(site, affine.get(site.index))
        return given | self._session.run(inputs, asked, partial=True)

    def _stored(self, site: Site, affine: Affine | None) -> tuple[NDArray[Any], NDArray[Any]]:
        if affine is not None:
            return _rounded(site, affine)
        if site.index not in self._original:
            weight, bias = _rounded(site, read_affine(self._index, site))
            self._original[site.index] = kept(weight), bias
        return self._original[site.index]


def _rounded(site: Site, affine: Affine) -> tuple[NDArray[Any], NDArray[Any]]:
    """As the written model will compute with them: of the type that it stores, a missing bias as zeros."""
    bias = np.zeros(affine.weight.shape[1], np.float32) if affine.bias is None else affine.bias
    weight = affine.weight.astype(site.storage, copy=False)
    return np.ascontiguousarray(weight, site.dtype), np.ascontiguousarray(bias, site.dtype)
