"""What replaces a region, node by node: tensors joined as the outside sees them, or in `lanes`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnx_decomp.fused_attention import MultiHead
from onnx_decomp.graph_index import GraphIndex
from onnx_decomp.passes.folding import correction_widths, factors, in_heads
from onnx_decomp.passes.fragments import Fragment, Value
from onnx_decomp.passes.lanes import Batched, Branches, Cells, Correction
from onnx_decomp.passes.layouts import Crossing, Layout, members
from onnx_decomp.program import Rewrite, Segment
from onnx_decomp.runtime import Device


@dataclass
class Writer:
    """Writes one rewrite into a fragment, node by node of its region.

    A tensor is held *joined*, as the outside sees it, or in *lanes*: one piece for each block of a segment. Either is
    made from the other when it is first asked for.
    """

    index: GraphIndex
    rewrite: Rewrite
    fragment: Fragment
    layout: Layout
    target: Device
    joined: dict[str, Value] = field(default_factory=dict)
    lanes: dict[tuple[int, str], Any] = field(default_factory=dict)

    @property
    def flattened(self) -> bool:
        """Everything is computed on matrices, and the border reshaped.

        On a CPU every branch is then a plain Gemm, bias and all. On a GPU a bias is an operator by itself in any case.
        """
        batched = any(segment.form == "batched" for segment in self.layout.segments)
        wanted = batched or self.target == "cpu"
        return wanted and self.rewrite.region.flat and self.rewrite.region.sites[0].rank != 2

    def write(self) -> dict[int, tuple[int, int]]:
        """For each position of the model that is replaced, which nodes of the fragment stand there."""
        region, make = self.rewrite.region, self.fragment
        ends = {site.nodes[-1]: at for at, site in enumerate(region.sites)}
        segment_of = self._segments_of_links()
        spans: dict[int, tuple[int, int]] = {}
        for position in region.nodes:
            first = len(make.nodes)
            if position in ends:
                self._site(ends[position])
            elif position in segment_of:
                self._link(position, segment_of[position])
            for name in self.index.node(position).output:
                if name in region.exits and (position in ends or position in segment_of):
                    self._export(name)
            spans[position] = (first, len(make.nodes))
        return spans

    def _segments_of_links(self) -> dict[int, int | None]:
        """The segment in whose lanes each link runs; None for links between segments, which run joined.

        A link runs in lanes if something behind it does, or if it joins what would else be concatenated twice.
        """
        region, segments = self.rewrite.region, self.layout.segments
        of_site = {at: number for number, segment in enumerate(segments) for at in segment.sites}
        behind: dict[str, set[int]] = {}
        for at, site in enumerate(region.sites):
            behind.setdefault(site.input, set()).add(of_site[at])
        for position in reversed(region.links):
            node = self.index.node(position)
            after = set[int]().union(*(behind.get(name, set()) for name in node.output))
            for name in node.input:
                behind.setdefault(name, set()).update(after)
        made_by = {site.output: of_site[at] for at, site in enumerate(region.sites)}
        chosen: dict[int, int | None] = {}
        for position in region.links:
            node = self.index.node(position)
            before = [made_by[name] for name in node.input if name in made_by]
            after = set[int]().union(*(behind.get(name, set()) for name in node.output))
            found = {number for number in before if number in after or before.count(number) > 1}
            number = chosen[position] = found.pop() if len(found) == 1 else None
            if number is not None:
                made_by |= dict.fromkeys(node.output, number)
        return chosen

    # Sites and links

    def _site(self, at: int) -> None:
        site = self.rewrite.region.sites[at]
        number = next(n for n, segment in enumerate(self.layout.segments) if at in segment.sites)
        lane = self._lane(number)
        into = site.output if self._lands(site.output, number) else None
        value = lane.site(self._in_lanes(site.input, number), at, into)
        self.lanes[number, site.output] = value
        if into is not None:
            self.joined[site.output] = value[0]

    def _lands(self, tensor: str, number: int) -> bool:
        """A single lane of a matrix is what the outside reads, under the name that it knows."""
        whole = self.layout.segments[number].blocks == 1 and self._exported(tensor)
        return whole and self.layout.leaving(tensor, self.layout.segments[number]).index is None

    def _link(self, position: int, number: int | None) -> None:
        node = self.index.node(position)
        if number is not None:
            into = node.output[0] if self._lands(node.output[0], number) else None
            made = self._lane(number).link(node, lambda name: self._in_lanes(name, number), into)
            self.lanes |= {(number, name): value for name, value in made.items()}
            if into is not None:
                self.joined[into] = made[into][0]
            return
        inputs = []
        for name in node.input:
            if self.carried(name):
                inputs.append(self._joined(name))
            else:
                inputs.append(self.operand(name, None, partial(self.layout.stored, name), (-1,)))
        tag = "joined" if len(node.output) > 1 else f"axis_{self._axis(node.output[0])}"
        into = node.output[0] if self._exported(node.output[0]) else None
        self.joined |= self.copy(node, inputs, tag, self.layout.stored, into)

    def _exported(self, tensor: str) -> bool:
        """The outside reads this tensor as it is computed here."""
        return tensor in self.rewrite.region.exits and not self.flattened

    def _axis(self, tensor: str) -> int:
        return self.rewrite.region.order.index(self.rewrite.region.group_of[tensor])

    def carried(self, name: str) -> bool:
        """A tensor that is computed at run time and carries units."""
        region = self.rewrite.region
        return name in region.group_of and name not in region.constants

    def copy(
        self,
        node: onnx.NodeProto,
        inputs: Sequence[Value],
        tag: str,
        positions: Callable[[str], NDArray[Any]],
        into: str | None = None,
    ) -> dict[str, Value]:
        """An operator once more, over fewer units: shapes and sizes that it is told change with them."""
        stem = f"{node.name or node.op_type}/decomp/{tag}"
        attributes = {item.name: _attribute(item) for item in node.attribute}
        outputs = [name for name in node.output if name]
        if node.op_type == "Reshape":
            inputs = [inputs[0], self._new_shape(node, stem, positions)]
        several = MultiHead.of(node)
        if several is not None:
            attributes |= self._fewer_heads(several, attributes, positions)
        if node.op_type == "Split":
            inputs, attributes = self._new_sizes(node, stem, positions, inputs, attributes)
        made = self.fragment.apply(
            node.op_type,
            stem,
            inputs,
            outputs=len(outputs),
            into=into if len(outputs) == 1 else None,
            domain=node.domain or None,
            **attributes,
        )
        return dict(zip(outputs, made, strict=True))

    def _fewer_heads(
        self, several: MultiHead, attributes: Mapping[str, Any], positions: Callable[[str], NDArray[Any]]
    ) -> dict[str, Any]:
        """Scores are scaled as they were, however narrow heads are now."""
        units = self.rewrite.region.carriers[several.operands[0]].units
        heads = len(np.unique(units[positions(several.operands[0])]))
        scale = attributes.get("scale") or (several.heads / len(units)) ** 0.5
        return {"num_heads": heads, "scale": float(scale)}

    def _new_shape(self, node: onnx.NodeProto, stem: str, positions: Callable[[str], NDArray[Any]]) -> Value:
        found = self.index.constant(node.input[1])
        assert found is not None
        shape, region = found.copy(), self.rewrite.region
        axis = region.carriers[node.output[0]].axis
        if shape[axis] > 0:
            shape[axis] = len(positions(node.output[0]))
        for number, width in self.layout.segments[0].heads.items():
            axis = region.pairs[number].shapes.get(node.output[0], 0)
            if axis and shape[axis] > 0:
                shape[axis] = width
        return self.fragment.integers(f"{stem}/shape", shape)

    def _new_sizes(
        self,
        node: onnx.NodeProto,
        stem: str,
        positions: Callable[[str], NDArray[Any]],
        inputs: Sequence[Value],
        attributes: dict[str, Any],
    ) -> tuple[list[Value], dict[str, Any]]:
        rank = self.index.rank(node.input[0]) or 0
        carrier = self.rewrite.region.carriers[node.input[0]].axis
        if (attributes.get("axis", 0) - rank) % max(rank, 1) != carrier % max(rank, 1):
            return list(inputs), attributes
        sizes = [len(positions(name)) for name in node.output]
        if self.fragment.opset < 13:
            return [inputs[0]], attributes | {"split": sizes}
        attributes.pop("num_outputs", None)
        return [inputs[0], self.fragment.integers(f"{stem}/sizes", sizes)], attributes

    def operand(
        self, name: str, tag: str | None, positions: Callable[[], NDArray[Any]], shape: tuple[int, ...]
    ) -> Value:
        """A constant with one value for each unit, sliced; anything else as it stands."""
        if not name:
            return gs.Variable.empty()
        region = self.rewrite.region
        if name not in region.constants:
            scalar = self.index.constant(name)
            if self.flattened and scalar is not None and scalar.ndim > 2:
                # One value, of more axes than a matrix: it would make one of more axes of what it meets.
                return gs.Constant(self.fragment.unique(f"{name}.decomp"), scalar.reshape(-1))
            return self.fragment.read(name)
        constant = self.index.constant(name)
        assert constant is not None
        axis = region.carriers[name].axis
        sliced = np.take(constant, positions(), axis=axis)
        if region.flat:
            sliced = sliced.reshape(shape)
        label = f"{name}.decomp.{tag or f'axis_{self._axis(name)}'}"
        return gs.Constant(self.fragment.unique(label), np.ascontiguousarray(sliced))

    # Joined tensors and lanes

    def _lane(self, number: int) -> Branches | Batched:
        segment = self.layout.segments[number]
        kind = Batched if segment.form == "batched" else Branches
        return kind(self, segment, number)

    def _in_lanes(self, tensor: str, number: int) -> Any:
        if (number, tensor) not in self.lanes:
            lane = self._lane(number)
            crossing = self.layout.entering(tensor, self.layout.segments[number])
            value = self._gathered(self._joined(tensor), crossing, tensor, f"{self.stem(number, 0)}/in", None)
            self.lanes[number, tensor] = lane.enter(value, crossing, self._axis_of(tensor))
        return self.lanes[number, tensor]

    def _joined(self, tensor: str, into: str | None = None) -> Value:
        if tensor not in self.joined:
            number = next((n for n, name in self.lanes if name == tensor), None)
            if number is None:
                outer = self.fragment.read(tensor)
                self.joined[tensor] = self._flatten(outer, tensor) if self.flattened else outer
            else:
                self.joined[tensor] = self._left(tensor, number, into)
        return self.joined[tensor]

    def _left(self, tensor: str, number: int, into: str | None) -> Value:
        """Lanes joined, gathered into their order, and the bias that was left for the end added."""
        segment, late = self.layout.segments[number], self.late(tensor, number)
        crossing, name = self.layout.leaving(tensor, segment), None if late is not None else into
        lane, axis = self._lane(number), self._axis_of(tensor)
        whole = name if crossing.index is None else None
        value = lane.leave(self.lanes[number, tensor], crossing, axis, whole)
        value = self._gathered(value, crossing, tensor, f"{self.stem(number, 0)}/out", name)
        if late is None:
            return value
        site, bias = self.rewrite.region.sites[late], self.rewrite.affine[late].bias
        assert bias is not None
        stored = bias[self.layout.stored(tensor)]
        bias = self.fragment.weight(f"{site.bias or site.stem + '.bias'}.decomp", stored, site.dtype)
        return self.fragment.one("Add", f"{site.name}/decomp/Add", [value, bias], into=into)

    def late(self, tensor: str, number: int) -> int | None:
        """The site whose bias is added once its blocks were joined: nothing in the lanes reads its output.

        Branches on a CPU have it for nothing, in their Gemm.
        """
        region, segment = self.rewrite.region, self.layout.segments[number]
        if segment.blocks == 1 or (segment.form != "batched" and self.target == "cpu"):
            return None
        for at in segment.sites:
            if region.sites[at].output == tensor and self.rewrite.affine[at].bias is not None:
                inner = set(region.nodes)
                if not inner.intersection(self.index.consumers.get(tensor, [])):
                    return at
        return None

    def correction(self, at: int, segment: Segment) -> Correction | None:
        """The first product of the correction beside a site's blocks, made of what they read, joined.

        With it the second matrix [r, N], and what its names start with; None where there is no correction.
        """
        widths = correction_widths(self.rewrite.region, segment, at)
        if widths is None:
            return None
        rank, site = widths[1], self.rewrite.region.sites[at]
        joined = self._joined(site.input)
        down, up = factors(self.rewrite.corrections[at][self.layout.stored(site.input)], rank)
        name = f"{site.stem}.decomp.beside"
        side = self.fragment.stored(f"{name}.down", down, site)
        return self.fragment.one("MatMul", f"{site.name}/decomp/beside/Down", [joined, side]), up, name

    def cells(self, at: int, segment: Segment, block: int) -> Cells:
        """Rows and columns of one block at a site, in the order in which its tensors hold them."""
        region = self.rewrite.region
        found = []
        tensors = (region.sites[at].input, region.sites[at].output)
        for tensor, group, units in zip(tensors, region.ends[at], region.units[at], strict=True):
            labels = segment.labels[group]
            if group in segment.copies:
                order = self.layout.orders[group] if group in region.elastic else np.arange(len(labels))
                found.append(order[labels[order] == block])
            else:
                cells = members(units, self.layout.orders[group], labels, block)
                found.append(cells[in_heads(region, segment, tensor, cells)])
        return found[0], found[1]

    def _axis_of(self, tensor: str) -> int:
        return self.rewrite.region.carriers[tensor].axis

    def stem(self, number: int, end: int) -> str:
        """What names of the first (0) or last (-1) site of a segment start with."""
        return f"{self.rewrite.region.sites[self.layout.segments[number].sites[end]].name}/decomp"

    # Borders

    def _export(self, tensor: str) -> None:
        """Make the joined tensor under the name that the outside reads."""
        stem = f"{self.rewrite.region.sites[0].name}/decomp"
        value = self._joined(tensor, None if self.flattened else tensor)
        if self.flattened:
            self._unflatten(value, tensor, stem)
        elif value.name != tensor:
            self.fragment.one("Identity", f"{stem}/Identity", [value], into=tensor)

    def _flatten(self, value: Value, tensor: str) -> Value:
        """To 2-D, once: every branch is then a plain Gemm."""
        region = self.rewrite.region
        stem = f"{region.sites[0].name}/decomp"
        shape = self.fragment.integers(f"{stem}/rows", [-1, len(region.carriers[tensor].units)])
        return self.fragment.one("Reshape", f"{stem}/Flatten", [value, shape])

    def _unflatten(self, value: Value, tensor: str, prefix: str) -> None:
        """Back to the leading dimensions of the region's input."""
        region, make = self.rewrite.region, self.fragment
        width = len(region.carriers[tensor].units)
        known = self.index.shapes.get(region.entries[0])
        if known is not None and sum(dim is None for dim in known[:-1]) <= 1:
            lead = [-1 if dim is None else dim for dim in known[:-1]]
            shape: Value = make.integers(f"{prefix}/shape", [*lead, width])
        else:
            full = make.one("Shape", f"{prefix}/Shape", [make.read(region.entries[0])])
            bounds = [make.integers(f"{prefix}/{what}", [at]) for what, at in (("from", 0), ("to", -1))]
            lead_shape = make.one("Slice", f"{prefix}/Leading", [full, *bounds])
            size = make.integers(f"{prefix}/width", [width])
            shape = make.one("Concat", f"{prefix}/NewShape", [lead_shape, size], axis=0)
        make.one("Reshape", f"{prefix}/Unflatten", [value, shape], into=tensor)

    def _gathered(
        self, value: Value, crossing: Crossing, tensor: str, prefix: str, into: str | None
    ) -> Value:
        """One Gather, of runs of columns where the order moves such: far cheaper than single columns.

        Single columns go as rows of the transposed matrix on a CPU, where a Gather of columns copies one element at a
        time: measured 2 to 3 times cheaper (docs/benchmarks.md). On a GPU either is about one copy.
        """
        make, order, run = self.fragment, crossing.index, crossing.run
        if order is None:
            return value
        matrix = self.flattened or self.index.rank(tensor) == 2
        if run == 1 or not matrix:
            chosen = make.integers(f"{prefix}/columns", order)
            if self.target == "cuda" or not matrix:
                axis = 1 if matrix else self._axis_of(tensor)
                return make.one("Gather", f"{prefix}/Gather", [value, chosen], axis=axis, into=into)
            value = make.one("Transpose", f"{prefix}/Columns", [value], perm=[1, 0])
            value = make.one("Gather", f"{prefix}/Gather", [value, chosen], axis=0)
            return make.one("Transpose", f"{prefix}/Back", [value], perm=[1, 0], into=into)
        runs = make.integers(f"{prefix}/runs", order[::run] // run)
        apart = make.integers(f"{prefix}/apart", [-1, crossing.width // run, run])
        joined = make.integers(f"{prefix}/joined", [-1, len(order)])
        value = make.one("Reshape", f"{prefix}/Apart", [value, apart])
        value = make.one("Gather", f"{prefix}/Gather", [value, runs], axis=1)
        return make.one("Reshape", f"{prefix}/Joined", [value, joined], into=into)


def _attribute(item: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(item)
    return value.decode() if isinstance(value, bytes) else value
