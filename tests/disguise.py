"""The same model with its products in forms that other exporters write."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_decomp.graph_index import GraphIndex

FUSED = ("Attention", "MultiHeadAttention")
"""Operators of com.microsoft that a whole attention may be."""

DISGUISES = ("none", "Cast", "ones", "Transpose", "left", "transA")


def disguised(model: onnx.ModelProto, rng: np.random.Generator, old: bool = False) -> onnx.ModelProto:
    """Each weight of a MatMul that nothing else reads in a form at random; stored names stay.

    old: as IR version 3, where every initializer is listed as an input.
    """
    index = GraphIndex.build(model, numpy_helper.to_array)
    made = onnx.ModelProto()
    made.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in made.graph.initializer}
    del made.graph.node[:]
    chosen: dict[str, str] = {}
    for node in model.graph.node:
        name = node.input[1] if len(node.input) > 1 else ""
        readers = [index.node(position).op_type for position in index.consumers.get(name, [])]
        if node.op_type != "MatMul" or name not in weights or set(readers) != {"MatMul"}:
            made.graph.node.append(node)
            continue
        if name not in chosen:
            rank = index.rank(node.input[0])
            last = 4 + (rank is not None) + (rank == 2)
            chosen[name] = str(rng.choice(DISGUISES[: 4 if len(readers) > 1 else last]))
            made.graph.node.extend(_store(weights[name], chosen[name]))
        made.graph.node.extend(_product(node, chosen[name], index.rank(node.input[0])))
    _disguise_vectors(made, rng)
    if old:
        made.ir_version = 3
        made.graph.input.extend(
            helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in made.graph.initializer
        )
    return made


def _disguise_vectors(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Biases, scales and the like: a list of numbers, in half as many bits, or with an axis more."""
    kinds = ["none", "Cast", "Squeeze"] + ["list"] * (model.opset_import[0].version >= 12)
    nodes: list[onnx.NodeProto] = []
    stored: list[onnx.TensorProto] = []
    for tensor in model.graph.initializer:
        vector = len(tensor.dims) == 1 and tensor.dims[0] > 1 and tensor.data_type == onnx.TensorProto.FLOAT
        kind, name = (str(rng.choice(kinds)) if vector else "none"), tensor.name
        array = numpy_helper.to_array(tensor)
        if kind == "list":
            nodes.append(helper.make_node("Constant", [], [name], value_floats=array.tolist()))
            continue
        if kind == "none":
            stored.append(numpy_helper.from_array(array, name))
            continue
        changed = array.astype(np.float16) if kind == "Cast" else array[None]
        stored.append(numpy_helper.from_array(changed, f"{name}.stored"))
        to = {"to": onnx.TensorProto.FLOAT} if kind == "Cast" else {}
        nodes.append(helper.make_node(kind, [f"{name}.stored"], [name], **to))
    nodes += [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(stored)


def _store(tensor: onnx.TensorProto, kind: str) -> list[onnx.NodeProto]:
    """Change how a weight is stored, and give the operators that make `<name>.made` of it."""
    name, array = tensor.name, numpy_helper.to_array(tensor)
    store = partial(_into, tensor)
    if kind == "Cast":
        store(array.astype(np.float16))
        to = int(helper.np_dtype_to_tensor_dtype(array.dtype))
        return [helper.make_node("Cast", [name], [f"{name}.made"], f"{name}/Cast", to=to)]
    if kind == "ones":
        store(array[None, :, None])
        return [helper.make_node("Squeeze", [name], [f"{name}.made"], f"{name}/Squeeze")]
    if kind == "Transpose":
        store(array.T[:, None])
        flat = helper.make_node("Flatten", [name], [f"{name}.flat"], f"{name}/Flatten", axis=1)
        turn = helper.make_node("Transpose", [f"{name}.flat"], [f"{name}.made"], f"{name}/T", perm=[1, 0])
        return [flat, turn]
    if kind == "left":
        store(array.T)
    return []


def _into(tensor: onnx.TensorProto, array: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))


def _product(node: onnx.NodeProto, kind: str, rank: int | None) -> list[onnx.NodeProto]:
    x, weight, y = node.input[0], node.input[1], node.output[0]

    def make(op: str, inputs: list[str], output: str, **rest: Any) -> onnx.NodeProto:
        return helper.make_node(op, inputs, [output], f"{node.name}/{output}", **rest)

    if kind == "none":
        return [node]
    if kind == "transA":
        turned = make("Transpose", [x], f"{y}.x", perm=[1, 0])
        return [turned, make("Gemm", [f"{y}.x", weight], y, transA=1)]
    if kind == "left":
        assert rank is not None
        swap = [*range(rank - 2), rank - 1, rank - 2]
        return [
            make("Transpose", [x], f"{y}.x", perm=swap),
            make("MatMul", [weight, f"{y}.x"], f"{y}.turned"),
            make("Transpose", [f"{y}.turned"], y, perm=swap),
        ]
    return [helper.make_node("MatMul", [x, f"{weight}.made"], [y], node.name)]


def fused(model: onnx.ModelProto, op: str) -> onnx.ModelProto:
    """A transformer of `models.networks` with each attention in one operator of com.microsoft, norms with their sums.

    op: Attention, which holds the weights of queries, keys and values, or MultiHeadAttention behind three products.
    """
    index = GraphIndex.build(model, numpy_helper.to_array)
    split = index.constant("attention.split")
    assert split is not None
    made = onnx.ModelProto()
    made.CopyFrom(model)
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    by_name = {node.name: node for node in model.graph.node}
    del made.graph.node[:]
    for node in model.graph.node:
        place, inside, step = node.name.partition(".attention.")
        product = op != "Attention" and step.endswith(("/Transpose", "/MatMul", "/Add"))
        if (
            not inside
            or step.startswith("output")
            or (product and step.startswith(("query", "key", "value")))
        ):
            made.graph.node.append(node)
        elif step == "mixed/Reshape":
            name, parts = f"{place}.attention", ("query", "key", "value")
            inputs = [by_name[f"{name}.{part}/Reshape"].input[0] for part in parts]
            if op == "Attention":
                inputs = [by_name[f"{name}.query/MatMul"].input[0], f"{name}.weight", f"{name}.bias"]
                for kind, axis in (("weight", 1), ("bias", 0)):
                    arrays = [_array(index, by_name, f"{name}.{part}", kind) for part in parts]
                    packed = numpy_helper.from_array(np.concatenate(arrays, axis), f"{name}.{kind}")
                    made.graph.initializer.append(packed)
            causal = int(f"{name}.scores/Add" in by_name)
            more = {"num_heads": int(split[2]), "unidirectional": causal, "domain": "com.microsoft"}
            made.graph.node.append(helper.make_node(op, inputs, list(node.output), name, **more))
    _fuse_norms(made)
    read = {name for node in made.graph.node for name in node.input}
    kept = [
        numpy_helper.from_array(numpy_helper.to_array(t), t.name)
        for t in made.graph.initializer
        if t.name in read
    ]
    del made.graph.initializer[:]
    made.graph.initializer.extend(kept)
    return made


def _fuse_norms(model: onnx.ModelProto) -> None:
    """A sum and the norm of it in one operator, which hands both on."""
    norms = {node.input[0]: node for node in model.graph.node if node.op_type == "LayerNormalization"}
    stored = {tensor.name for tensor in model.graph.initializer}
    nodes = list[onnx.NodeProto]()
    for node in model.graph.node:
        norm = norms.get(node.output[0])
        if node.op_type == "Add" and norm is not None and stored.isdisjoint(node.input):
            inputs, outputs = [*node.input, *norm.input[1:]], [norm.output[0], "", "", node.output[0]]
            more = {"domain": "com.microsoft", "epsilon": norm.attribute[-1].f}
            nodes.append(helper.make_node("SkipLayerNormalization", inputs, outputs, norm.name, **more))
            del norms[node.output[0]]
        elif node.op_type != "LayerNormalization" or node.input[0] in norms:
            nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _array(
    index: GraphIndex, by_name: Mapping[str, onnx.NodeProto], place: str, kind: str
) -> np.ndarray[Any, Any]:
    """The weight [K, N] or the bias [N] of a product; ONNX Runtime's own Attention does not run without a bias."""
    weight = index.constant(by_name[f"{place}/MatMul"].input[1])
    assert weight is not None
    bias = index.constant(f"{place}.bias")
    return weight if kind == "weight" else np.zeros(weight.shape[1], weight.dtype) if bias is None else bias
