"""What is written for CUDA stays on the GPU, and can be captured in a CUDA graph: over every form that there is.

Checked on the graph, so no GPU is needed. What each rule is for, in ONNX Runtime's CUDA provider:

- An operator that has no kernel there runs on the CPU, its tensors copied both ways.
- A shape, sizes or indices that are no constants are copied to the host before a kernel can start.
- A Split into unequal parts has its sizes copied to the GPU at every run, and so has a product of a matrix with a stack
  of matrices the address of each: a captured graph would copy from memory that is gone.
- Integer tensors that are computed are those of shapes, for which there are kernels on the CPU only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.networks import build as build_network
from models.planted import Planted, build
from onnx_decomp.axes import Region, find_regions
from onnx_decomp.graph_index import GraphIndex
from onnx_decomp.passes.folding import compose, forms
from onnx_decomp.passes.splitting import emit
from onnx_decomp.program import Segment
from onnx_decomp.sites import find_sites
from tests.test_corrections import sliced, with_corrections
from tests.test_golden import CASES, rewritten
from tests.test_heads import Attention, narrowed
from tests.test_lowrank_forms import low_rank, with_ranks
from tests.test_splitting import index_of, only_region, true_structure
from tests.test_whole_networks import KINDS, masked_rewrite, true_structures

OURS = frozenset(
    {"Add", "Cast", "Concat", "Expand", "Gather", "Gemm", "MatMul", "Reshape", "Split", "Transpose"}
)
"""All that is written besides copies of the model's own operators. Each has a kernel of the CUDA provider for float,
half and bfloat16."""
SHAPES = frozenset({"Shape", "Slice", "Concat"})
"""Of the leading axes, where the graph leaves two or more of them open: ONNX Runtime keeps these on the host, with
nothing copied, and takes them for no obstacle to a capture."""
CONSTANT = {"Reshape": (1,), "Expand": (1,), "Gather": (1,), "Split": (1,), "Slice": (1, 2)}
"""Inputs that have to be constants."""


@dataclass
class Checked:
    """A written model, and the operators and names of the one that it was made from.

    uneven: it has blocks of several sizes that are not in one product, and no form without a Split of such.
    """

    before: onnx.ModelProto
    after: onnx.ModelProto
    uneven: bool = False

    def __post_init__(self) -> None:
        graph = onnx.shape_inference.infer_shapes(self.after).graph
        self.nodes = [node for node in graph.node if "/decomp/" in node.name]
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.stored[node.output[0]] = node.attribute[0].t
        values = [*graph.input, *graph.value_info, *graph.output]
        self.types = {value.name: value.type.tensor_type for value in values}
        self.own = {(node.domain, node.op_type) for node in self.before.graph.node}

    def problems(self) -> list[str]:
        shapes: set[str] = set()
        found = []
        for node in self.nodes:
            if node.op_type == "Shape" or (shapes.intersection(node.input) and node.op_type in SHAPES):
                shapes.update(node.output)
                if node.op_type == "Shape" and self._told(node.input[0]):
                    found.append(f"{node.name}: a shape is computed that the graph tells")
                continue
            found += [f"{node.name}: {problem}" for problem in self._problems(node, shapes)]
        return found

    def _told(self, name: str) -> bool:
        """One unknown length can be left for a Reshape to find."""
        return sum(not dim.HasField("dim_value") for dim in self.types[name].shape.dim[:-1]) <= 1

    def _problems(self, node: onnx.NodeProto, shapes: set[str]) -> Iterator[str]:
        if node.op_type not in OURS and (node.domain, node.op_type) not in self.own:
            yield "an operator that is not on the list"
        for at in CONSTANT.get(node.op_type, ()):
            if len(node.input) > at and node.input[at] not in self.stored.keys() | shapes:
                yield "what has to be a constant is computed"
        if any(self.types[name].elem_type in (TensorProto.INT64, TensorProto.INT32) for name in node.output):
            yield "integers are computed"
        if node.op_type == "Split" and not self.uneven and len(set(split_sizes(node, self.stored))) > 1:
            yield "a Split into unequal parts"
        if node.op_type == "MatMul" and len(self.stored.get(node.input[1], TensorProto()).dims) > 2:
            left = [dim.dim_value for dim in self.types[node.input[0]].shape.dim]
            if len(left) != 3 or left[0] != self.stored[node.input[1]].dims[0]:
                yield "a product with a stack of matrices, and none on the left for each"


def check_on_gpu(before: onnx.ModelProto, after: onnx.ModelProto, uneven: bool = False) -> None:
    checked = Checked(before, after, uneven)
    assert checked.nodes, "nothing was rewritten"
    assert checked.problems() == []


def split_sizes(node: onnx.NodeProto, stored: dict[str, TensorProto]) -> list[int]:
    if len(node.input) > 1:
        found: list[int] = numpy_helper.to_array(stored[node.input[1]]).tolist()
        return found
    (sizes,) = (list(helper.get_attribute_value(a)) for a in node.attribute if a.name == "split")
    return sizes


# --- all that there is --------------------------------------------------------------------------------------------


def shaped(region: Region, segments: Sequence[Segment]) -> Iterator[tuple[Segment, ...]]:
    """Each form of the segments in blocks, all in the same."""
    for form in {form: None for each in segments if each.blocks > 1 for form in forms(region, each)}:
        yield tuple(replace(each, form=form) if each.blocks > 1 else each for each in segments)


@pytest.mark.parametrize("name", CASES)
def test_the_forms_of_the_golden_files(name: str) -> None:
    index, rewrite, _ = rewritten(name)
    check_on_gpu(index.proto, emit(index, [rewrite], CASES[name].spec.opset, "cuda"))


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("hide", ["all", "hidden"])
@pytest.mark.parametrize("what", ["blocks", "low rank", "corrections", "slices"])
def test_blocks_with_all_that_may_stand_beside_them(what: str, hide: str, opset: int, rank: int) -> None:
    planted = build(
        Planted((24, 48, 36), blocks=3 if what != "slices" else 2, hide=hide, opset=opset, rank=rank)
    )
    index = index_of(planted.model)
    region = only_region(index)
    structure = sliced(region) if what == "slices" else true_structure(planted, region)
    segments = compose(region, [structure])
    if what == "low rank":
        segments = with_ranks(segments, {0: (2, 3, 2)})
    if what in ("corrections", "slices"):
        segments = with_corrections(segments, {0: 3, 1: 2})
    for each in shaped(region, segments):
        rewrite, _ = low_rank(index, region, each)
        check_on_gpu(index.proto, emit(index, [rewrite], opset, "cuda"))


@pytest.mark.parametrize("ranks", [{}, {0: (5,), 1: (7,)}])
def test_layers_in_one_piece(ranks: dict[int, tuple[int, ...]]) -> None:
    for rank in (2, 3):
        planted = build(Planted((24, 48, 36), rank=rank, hide="none"))
        index = index_of(planted.model)
        region = only_region(index)
        keep = {group: np.arange(region.groups[group].size) % 2 == 0 for group in region.elastic}
        rewrite, _ = low_rank(index, region, with_ranks(compose(region, (), keep), ranks))
        written = emit(index, [rewrite], 17, "cuda")
        check_on_gpu(index.proto, written)
        assert "Reshape" not in {node.op_type for node in written.graph.node}


@pytest.mark.parametrize("form", ["chain", "batched"])
def test_blocks_of_several_sizes(form: str) -> None:
    planted = build(Planted((24, 48, 36), blocks=3, uneven=True, hide="hidden", seed=2))
    index = index_of(planted.model)
    region = only_region(index)
    for each in shaped(region, compose(region, [true_structure(planted, region)])):
        if each[0].form == form:
            rewrite, _ = low_rank(index, region, each)
            check_on_gpu(index.proto, emit(index, [rewrite], 17, "cuda"), uneven=form == "chain")


@pytest.mark.parametrize("name", KINDS)
def test_whole_networks(name: str) -> None:
    network = build_network(KINDS[name])
    index = GraphIndex.build(network.model, numpy_helper.to_array)
    regions = find_regions(index, find_sites(index))
    structures = true_structures(network, regions)
    rewrites = []
    for region in regions:
        if region.name in structures:
            rewrite = masked_rewrite(index, region, structures[region.name])
            *_, last = shaped(region, rewrite.segments)  # batched where that is a form
            rewrites.append(replace(rewrite, segments=last))
    check_on_gpu(index.proto, emit(index, rewrites, network.spec.opset, "cuda"))


def test_narrow_heads() -> None:
    spec = Attention(causal=True)
    index = index_of(spec.model())
    (region,) = find_regions(index, find_sites(index))
    check_on_gpu(index.proto, emit(index, [narrowed(index, region, {0: 4, 1: 6}, 2)], spec.opset, "cuda"))


@pytest.mark.parametrize(
    ("op", "inputs", "outputs", "problem"),
    [
        ("Split", ("x", "uneven"), ("a", "b"), "unequal parts"),
        ("MatMul", ("x", "stack"), ("y",), "stack of matrices"),
        ("Tile", ("x", "uneven"), ("y",), "not on the list"),
        ("Reshape", ("x", "sizes"), ("y",), "computed"),
        ("Concat", ("uneven", "uneven"), ("y",), "integers"),
        ("Shape", ("x",), ("y",), "the graph tells"),
    ],
)
def test_the_rules_can_be_broken(
    op: str, inputs: Sequence[str], outputs: Sequence[str], problem: str
) -> None:
    """Else the tests above would show nothing."""
    attributes = {"Split": {"axis": 1}, "Concat": {"axis": 0}}.get(op, {})
    node = helper.make_node(op, inputs, outputs, name=f"layer/decomp/{op}", **attributes)
    stored = {"uneven": np.array([1, 3]), "stack": np.zeros((2, 4, 4), np.float32)}
    graph = helper.make_graph(
        [node],
        "broken",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4]),
            helper.make_tensor_value_info("sizes", TensorProto.INT64, [2]),
        ],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    (found,) = Checked(build(Planted((4, 4), blocks=2)).model, model).problems()
    assert problem in found
