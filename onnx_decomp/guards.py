"""What has to hold of a model before anything looks into it: it may be the work of a stranger.

The checker of onnx says whether a model is valid. What stands here is what it leaves open and what can hurt even so:
names that are no text, a few bytes that ask for gigabytes, functions that call themselves or each other a million
times. What a model computes with is bounded as far as its shapes tell; running a model is still running it.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from onnx_decomp.errors import InputError

MAX_NODES = 1_000_000
"""Nodes of a model, those of nested graphs and of every call of a function included."""

MAX_TENSOR = 2**33
"""Bytes of one tensor that the model computes, where its shape is known: 8 GiB."""

_ELEMENTS = frozenset(onnx.TensorProto.DataType.values())

_FREE_TEXT = frozenset({"doc_string", "producer_name", "producer_version"})
"""Fields that nothing here reads; exporters do put odd bytes into them."""


def check_messages(proto: onnx.ModelProto, where: str) -> None:
    """Raises InputError for too many nodes, names that are no text, dims or types of elements that can't be."""
    nodes = 0
    for message in _messages(proto):
        if isinstance(message, onnx.NodeProto):
            nodes += 1
            if nodes > MAX_NODES:
                raise InputError(f"{where}: more than {MAX_NODES} nodes: split the model first")
        elif isinstance(message, onnx.TensorProto) and not _possible(message.dims):
            raise InputError(
                f"{where}: tensor {message.name!r} has impossible dims {list(message.dims)[:8]}: "
                "export the model again"
            )
        elif _element(message) not in _ELEMENTS:
            raise InputError(
                f"{where}: a tensor of element type {_element(message)}, which is none: export the model again"
            )


def _element(message: Message) -> int:
    """Element type that a tensor or the type of one states; 0 for any other message."""
    if isinstance(message, onnx.TensorProto):
        return int(message.data_type)
    if isinstance(message, onnx.TypeProto.Tensor):
        return int(message.elem_type)
    return 0


def _possible(dims: Sequence[int]) -> bool:
    """Lengths, of no more elements than 63 bits count."""
    return min(dims, default=0) >= 0 and math.prod(dims) < 2**63


def _messages(message: Message) -> Iterator[Message]:
    """A message and all in it. Recursion ends: protobuf itself refuses messages nested more than 100 deep.

    Raises InputError for a name that is not UTF-8: protobuf hands such a one out as bytes.
    """
    yield message
    for descriptor, content in message.ListFields():
        if descriptor.type == FieldDescriptor.TYPE_MESSAGE:
            for item in [content] if isinstance(content, Message) else content:
                yield from _messages(item)
        elif descriptor.type == FieldDescriptor.TYPE_STRING and descriptor.name not in _FREE_TEXT:
            for text in [content] if isinstance(content, str | bytes) else content:
                if not isinstance(text, str):
                    kind = f"{message.DESCRIPTOR.name}.{descriptor.name}"
                    raise InputError(
                        f"a name in the model is not text: {kind} {text[:40]!r}: export it again"
                    )


def check_functions(proto: onnx.ModelProto, where: str) -> None:
    """Raises InputError where functions of the model call each other in a circle, or too often.

    ONNX Runtime and shape inference put the body in the place of every call: ten functions that call each other ten
    times are ten thousand million nodes.
    """
    calls = {_key(function): Counter(_called(function.node)) for function in proto.functions}
    sizes: dict[tuple[str, str], int] = {}
    while pending := [name for name in calls if name not in sizes]:
        ready = [name for name in pending if all(other in sizes for other in calls[name] if other in calls)]
        if not ready:
            raise InputError(f"{where}: the function {pending[0][1]!r} calls itself: export the model again")
        for name in ready:
            sizes[name] = _expanded(calls[name], sizes)
    if _expanded(Counter(_called(proto.graph.node)), sizes) > MAX_NODES:
        raise InputError(
            f"{where}: its functions call each other so often that they are more than {MAX_NODES} nodes: "
            "inline them where it is exported"
        )


def _key(function: onnx.FunctionProto) -> tuple[str, str]:
    return function.domain, function.name


def _called(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, str]]:
    """Domain and operator of every node, those of nested graphs included."""
    for node in nodes:
        yield node.domain, node.op_type
        for item in node.attribute:
            for graph in [item.g, *item.graphs]:
                yield from _called(graph.node)


def _expanded(calls: Counter[tuple[str, str]], sizes: dict[tuple[str, str], int]) -> int:
    """Nodes once each call of a function is its body."""
    return sum(times * sizes.get(name, 1) for name, times in calls.items())


def check_sizes(values: Iterable[onnx.ValueInfoProto]) -> None:
    """Raises InputError for a tensor that is computed and, as far as its shape is known, far too large."""
    for value in values:
        tensor = value.type.tensor_type
        known = [dim.dim_value for dim in tensor.shape.dim if dim.HasField("dim_value")]
        size = math.prod(known) * _bytes_of(tensor.elem_type)
        if size > MAX_TENSOR:
            raise InputError(
                f"tensor {value.name!r} takes {size} bytes, {known} elements, and {MAX_TENSOR} is the most: "
                "look at how the model makes it"
            )


def _bytes_of(element: int) -> int:
    """Of one element; 1 for what has no fixed size."""
    try:
        return max(onnx.helper.tensor_dtype_to_np_dtype(element).itemsize, 1)
    except (KeyError, TypeError, ValueError):
        return 1


@contextmanager
def limited_memory(more: int) -> Iterator[None]:
    """In the block, the process can take `more` bytes beside what it holds, and gets MemoryError for the rest.

    For native code that a few bytes of a model can make allocate anything. Linux only; elsewhere it limits nothing.
    """
    statm = Path("/proc/self/statm")
    if sys.platform != "linux" or not statm.exists():
        yield
        return
    import resource

    held = int(statm.read_text().split()[5]) * resource.getpagesize()
    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = held + more
    if before == resource.RLIM_INFINITY or wanted < before:
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, most))
