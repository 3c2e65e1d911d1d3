"""What is done to a sound file: to its bytes, or to what they mean. Everything is drawn from one generator."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import TensorProto, helper

Arrays = dict[str, np.ndarray]

NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    16,
    255,
    65536,
    10**6,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32,
    2**62,
    2**63 - 1,
    -(2**63),
)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-38, 1e38, 3.4e38, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "", " ", "x", "y", "w", "a" * 5000, "\x1b[2J\x1b]0;owned\x07", "<script>alert(1)</script>", "{{ 7*7 }}",
    "[bold red]", "../../etc/passwd", "/dev/zero", "\u202egnp.exe", "\0", "\ud7ff\uffff", "%s%n", "name\nline",
    "ai.onnx.ml", "com.microsoft", "MatMul", "Loop", "(a+)+$", "__class__",
)  # fmt: skip
OPERATORS = tuple(sorted({schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}))

REFUSED = (Exception,)
"""What protobuf, numpy, zipfile, json and empty lists raise where a change can't be made."""


# Bytes


def bytes_changed(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """One to six changes: bits, single bytes, ranges cut, doubled, moved in from elsewhere, the end lost."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        rng.choice(_ON_BYTES)(made, rng, other or data)
    return bytes(made)


def _span(data: bytes | bytearray, rng: random.Random) -> slice:
    at = rng.randrange(len(data) + 1)
    return slice(at, at + rng.choice((1, 2, 4, 8, 32, 200)))


def _flip(data: bytearray, rng: random.Random, _: bytes) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set(data: bytearray, rng: random.Random, _: bytes) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _cut(data: bytearray, rng: random.Random, _: bytes) -> None:
    del data[_span(data, rng)]


def _double(data: bytearray, rng: random.Random, _: bytes) -> None:
    span = _span(data, rng)
    data[span.stop : span.stop] = data[span] * rng.choice((1, 1, 2, 50))


def _splice(data: bytearray, rng: random.Random, other: bytes) -> None:
    data[_span(data, rng)] = other[_span(other, rng)]


def _number(data: bytearray, rng: random.Random, _: bytes) -> None:
    at = rng.randrange(len(data) + 1)
    data[at : at + 8] = struct.pack("<q", rng.choice(NUMBERS))


def _end(data: bytearray, rng: random.Random, _: bytes) -> None:
    del data[rng.randrange(len(data) + 1) :]


_ON_BYTES: Sequence[Callable[[bytearray, random.Random, bytes], None]] = (
    _flip, _flip, _flip, _set, _set, _cut, _double, _splice, _number, _end,
)  # fmt: skip


# Models


def model_changed(model: onnx.ModelProto, rng: random.Random, donor: onnx.ModelProto) -> onnx.ModelProto:
    """One to four changes of what the model says. `donor`: another model, to take messages from."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        with suppress(*REFUSED):
            rng.choice(_ON_MODELS)(made, rng, donor)
    return made


def messages(message: Message) -> Iterator[Message]:
    """A message and all in it."""
    yield message
    for descriptor, content in message.ListFields():
        if descriptor.type == FieldDescriptor.TYPE_MESSAGE:
            for item in [content] if isinstance(content, Message) else content:
                yield from messages(item)


def _names(model: onnx.ModelProto) -> list[str]:
    found = [t.name for t in model.graph.initializer] + [v.name for v in model.graph.input]
    return found + [name for node in model.graph.node for name in node.output]


def _scalar(descriptor: FieldDescriptor, model: onnx.ModelProto, rng: random.Random, old: Any) -> Any:
    if descriptor.type == FieldDescriptor.TYPE_STRING:
        return rng.choice((rng.choice(TEXTS), rng.choice(_names(model) or [""]), rng.choice(OPERATORS)))
    if descriptor.type == FieldDescriptor.TYPE_BYTES:
        return bytes_changed(bytes(old or b"\0" * 8), rng)
    if descriptor.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return rng.choice(FLOATS)
    if descriptor.type == FieldDescriptor.TYPE_ENUM:
        return rng.choice([v.number for v in descriptor.enum_type.values])
    near = old if isinstance(old, int) else 0
    return rng.choice((rng.choice(NUMBERS), rng.randrange(-2, 30), near + rng.choice((-1, 1)), near * 2))


def _field(model: onnx.ModelProto, rng: random.Random, donor: onnx.ModelProto) -> None:
    """Any field of any message: a new value, no value, an element more or less, another message of its kind."""
    message = rng.choice(list(messages(model)))
    fields = [d for d, _ in message.ListFields()] if rng.random() < 0.85 else list(message.DESCRIPTOR.fields)
    descriptor = rng.choice(fields)
    held = getattr(message, descriptor.name)
    if descriptor.type == FieldDescriptor.TYPE_MESSAGE:
        _submessage(message, descriptor.name, held, rng, donor)
    elif not hasattr(held, "append"):
        if rng.random() < 0.15:
            message.ClearField(descriptor.name)
        else:
            setattr(message, descriptor.name, _scalar(descriptor, model, rng, held))
    else:
        action = rng.randrange(5)
        if action == 0 and held:
            del held[rng.randrange(len(held))]
        elif action == 1 and held:
            held[rng.randrange(len(held))] = _scalar(descriptor, model, rng, held[0])
        elif action == 2:
            held.append(_scalar(descriptor, model, rng, held[0] if held else None))
        elif action == 3 and held:
            held.extend(list(held) * rng.choice((1, 1, 500)))
        else:
            del held[:]


def _submessage(message: Message, name: str, held: Any, rng: random.Random, donor: onnx.ModelProto) -> None:
    if isinstance(held, Message):
        kin = [m for m in messages(donor) if m.DESCRIPTOR is held.DESCRIPTOR]
        if kin and rng.random() < 0.5:
            held.CopyFrom(rng.choice(kin))
        else:
            message.ClearField(name)
        return
    items = list(held)
    action = rng.randrange(5)
    if action == 0 and items:
        del held[rng.randrange(len(items))]
    elif action == 1 and items:
        held.append(copy.deepcopy(rng.choice(items)))
    elif action == 2 and len(items) > 1:
        rng.shuffle(items)
        kept = [copy.deepcopy(item) for item in items]
        del held[:]
        held.extend(kept)
    elif action == 3:
        kin = [m for m in messages(donor) if items and m.DESCRIPTOR is items[0].DESCRIPTOR]
        held.append(rng.choice(kin))
    elif rng.random() < 0.3:
        del held[:]


def _nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [message for message in messages(model) if isinstance(message, onnx.NodeProto)]


def _tensors(model: onnx.ModelProto) -> list[TensorProto]:
    return [message for message in messages(model) if isinstance(message, TensorProto)]


def _operator(model: onnx.ModelProto, rng: random.Random, _: onnx.ModelProto) -> None:
    rng.choice(_nodes(model)).op_type = rng.choice(OPERATORS)


def _wire(model: onnx.ModelProto, rng: random.Random, _: onnx.ModelProto) -> None:
    """An input from elsewhere: another order, a cycle, a name that nobody makes."""
    node = rng.choice(_nodes(model))
    node.input[rng.randrange(len(node.input))] = rng.choice([*_names(model), "nobody", ""])


def _output(model: onnx.ModelProto, rng: random.Random, _: onnx.ModelProto) -> None:
    node = rng.choice(_nodes(model))
    node.output[rng.randrange(len(node.output))] = rng.choice([*_names(model), ""])


def _swap(model: onnx.ModelProto, rng: random.Random, _: onnx.ModelProto) -> None:
    nodes = list(rng.choice([m for m in messages(model) if isinstance(m, onnx.GraphProto)]).node)
    a, b = rng.choice(nodes), rng.choice(nodes)
    kept = copy.deepcopy(a)
    a.CopyFrom(b)
    b.CopyFrom(kept)


def _opset(model: onnx.ModelProto, rng: random.Random, _: onnx.ModelProto) -> None:
    rng.choice(model.opset_import).version = rng.choice((*range(1, 26), *NUMBERS))


def _type(model: onnx.ModelProto, rng: random.Random, _: onnx.ModelProto) -> None:
    rng.choice(_tensors(model)).data_type = rng.choice((*range(27), -1, 1000))


def _dims(model: onnx.ModelProto, rng: random.Random, _: onnx.ModelProto) -> None:
    dims = rng.choice(_tensors(model)).dims
    dims[rng.randrange(len(dims))] = rng.choice((*NUMBERS, 0, 1, 4, 5))


def _resized(model: onnx.ModelProto, rng: random.Random, _: onnx.ModelProto) -> None:
    """A weight that is sound by itself and does not fit its neighbours."""
    tensor = rng.choice(list(model.graph.initializer))
    shape = [rng.choice((0, 1, 2, 4, 8, dim)) for dim in tensor.dims] + [3] * rng.choice((0, 0, 0, 1))
    kind = rng.choice((np.float32, np.float16, np.float64, np.int64, np.int8, np.bool_))
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(shape, kind), tensor.name))


def _values(model: onnx.ModelProto, rng: random.Random, _: onnx.ModelProto) -> None:
    tensor = rng.choice(list(model.graph.initializer))
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.flat[rng.randrange(array.size)] = rng.choice(FLOATS if array.dtype.kind == "f" else NUMBERS[:8])
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def _insert(model: onnx.ModelProto, rng: random.Random, _: onnx.ModelProto) -> None:
    """A further operator of any kind, in the middle, in a tensor's way."""
    node = rng.choice(list(model.graph.node))
    at = rng.randrange(len(node.input))
    schema = onnx.defs.get_schema(rng.choice(OPERATORS))
    inputs = [node.input[at], *rng.choices(_names(model), k=max(0, schema.min_input - 1))]
    made = helper.make_node(schema.name, inputs, [f"inserted{rng.randrange(100)}"], name="inserted")
    node.input[at] = made.output[0]
    model.graph.node.insert(rng.randrange(len(model.graph.node) + 1), made)


def _external(model: onnx.ModelProto, rng: random.Random, _: onnx.ModelProto) -> None:
    """An entry of external data changed, added, doubled; or a tensor said to be external at all."""
    tensor = rng.choice(_tensors(model))
    tensor.data_location = TensorProto.EXTERNAL
    keys = ("location", "offset", "length", "checksum", "basepath", "__class__", "to_array", "path")
    places = (
        "w.bin",
        "../w.bin",
        "/etc/passwd",
        "sub/../w.bin",
        ".",
        "in.onnx",
        "none.bin",
        "w.bin/x",
        "w.bin\0",
    )
    texts = (*map(str, NUMBERS), *places, *TEXTS, "1e3", "0x10", " 8", "+8", "8_0", "٣")
    if tensor.external_data and rng.random() < 0.6:
        rng.choice(tensor.external_data).value = rng.choice(texts)
    else:
        tensor.external_data.add(key=rng.choice(keys), value=rng.choice(texts))


def _nest(model: onnx.ModelProto, rng: random.Random, _: onnx.ModelProto) -> None:
    """The whole graph as a branch of an If, again and again."""
    for depth in range(rng.choice((1, 2, 8, 28))):
        inner = onnx.GraphProto()
        inner.CopyFrom(model.graph)
        del inner.input[:]
        inner.name = "inner"
        outputs = [f"{value.name}_{depth}" for value in inner.output]
        given = model.graph.input[0].name
        other = helper.make_graph(
            [helper.make_node("Identity", [given], [f"other{depth}"])],
            "other",
            [],
            [onnx.ValueInfoProto(name=f"other{depth}")],
        )
        yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
        nodes = [
            helper.make_node("Constant", [], [f"yes{depth}"], value=yes),
            helper.make_node("If", [f"yes{depth}"], outputs, then_branch=inner, else_branch=other),
        ]
        renamed = [copy.deepcopy(value) for value in model.graph.output]
        for value, name in zip(renamed, outputs, strict=True):
            value.name = name
        del model.graph.node[:], model.graph.initializer[:], model.graph.output[:]
        model.graph.node.extend(nodes)
        model.graph.output.extend(renamed)


def _bomb(model: onnx.ModelProto, rng: random.Random, _: onnx.ModelProto) -> None:
    """A few bytes that ask for gigabytes, or for an eternity."""
    size = rng.choice((10**3, 10**5, 2**31, 2**40))
    shape = helper.make_tensor("bomb_shape", TensorProto.INT64, [2], [size, size])
    kind = rng.choice(("ConstantOfShape", "Expand", "Tile", "Range", "Loop", "Resize", "Pad"))
    one = helper.make_tensor("bomb_one", TensorProto.FLOAT, [1, 1], [1.0])
    model.graph.initializer.extend([shape, one])
    if kind == "ConstantOfShape":
        nodes = [helper.make_node(kind, ["bomb_shape"], ["bomb"])]
    elif kind in ("Expand", "Tile"):
        nodes = [helper.make_node(kind, ["bomb_one", "bomb_shape"], ["bomb"])]
    elif kind == "Range":
        ends = [
            helper.make_tensor(f"bomb_{n}", TensorProto.INT64, [], [n and size**2 % 2**62]) for n in (0, 1)
        ]
        model.graph.initializer.extend([*ends, helper.make_tensor("bomb_2", TensorProto.INT64, [], [1])])
        nodes = [
            helper.make_node(kind, ["bomb_0", "bomb_1", "bomb_2"], ["bomb_range"]),
            helper.make_node("Cast", ["bomb_range"], ["bomb"], to=TensorProto.FLOAT),
        ]
    elif kind == "Pad":
        model.graph.initializer.append(
            helper.make_tensor("bomb_pads", TensorProto.INT64, [4], [0, 0, size, size])
        )
        nodes = [helper.make_node(kind, ["bomb_one", "bomb_pads"], ["bomb"])]
    elif kind == "Resize":
        nodes = [helper.make_node(kind, ["bomb_one", "", "", "bomb_shape"], ["bomb"])]
    else:
        nodes = _endless()
    used = rng.choice([node for node in model.graph.node if node.input])
    at = rng.randrange(len(used.input))
    nodes.append(helper.make_node("ReduceMax", ["bomb"], ["bomb_max"], keepdims=0))
    nodes.append(helper.make_node("Mul", [used.input[at], "bomb_max"], ["bombed"]))
    used.input[at] = "bombed"
    for node in reversed(nodes):
        model.graph.node.insert(0, node)


def _endless() -> list[onnx.NodeProto]:
    """A Loop whose condition never falls."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["bc"], ["bc1"]), helper.make_node("Mul", ["bs", "bs"], ["bt"])],
        "endless",
        [
            helper.make_tensor_value_info("bi", TensorProto.INT64, []),
            helper.make_tensor_value_info("bc", TensorProto.BOOL, []),
            helper.make_tensor_value_info("bs", TensorProto.FLOAT, [1, 1]),
        ],
        [
            helper.make_tensor_value_info("bc1", TensorProto.BOOL, []),
            helper.make_tensor_value_info("bt", TensorProto.FLOAT, [1, 1]),
        ],
    )
    yes = helper.make_tensor("bomb_yes", TensorProto.BOOL, [], [True])
    return [
        helper.make_node("Constant", [], ["bomb_yes"], value=yes),
        helper.make_node("Loop", ["", "bomb_yes", "bomb_one"], ["bomb"], body=body),
    ]


_ON_MODELS: Sequence[Callable[[onnx.ModelProto, random.Random, onnx.ModelProto], None]] = (
    *([_field] * 10), _operator, _operator, _wire, _wire, _output, _swap, _opset, _type, _dims, _dims,
    _resized, _resized, _resized, _values, _insert, _insert, _external, _nest, _bomb,
)  # fmt: skip


def external_changed(model: onnx.ModelProto, rng: random.Random) -> onnx.ModelProto:
    """A model with external data, whose entries are changed once or twice."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for _ in range(rng.choice((1, 1, 2))):
        with suppress(*REFUSED):
            rng.choice((_external, _external, _external, _dims, _type))(made, rng, made)
    return made


# Arrays


def arrays_changed(arrays: Arrays, rng: random.Random) -> Arrays:
    """Names, shapes, types and values of arrays changed."""
    made = dict(arrays)
    for _ in range(rng.choice((1, 1, 2))):
        if not made:
            break
        name = rng.choice(sorted(made))
        array = made.pop(name)
        if rng.random() < 0.15:
            name = rng.choice((*TEXTS, name.upper(), name + "_"))
        if rng.random() < 0.9:
            with suppress(*REFUSED), np.errstate(all="ignore"):
                made[name] = rng.choice(_ON_ARRAYS)(array, rng)
    return made


def _valued(array: np.ndarray, rng: random.Random) -> np.ndarray:
    made = array.copy()
    if made.size and made.dtype.kind == "f":
        made.flat[rng.randrange(made.size)] = rng.choice(FLOATS)
    elif made.size:
        made.flat[rng.randrange(made.size)] = rng.choice((-1, 100, 2**31 - 1, -(2**31)))
    return made


def _filled(array: np.ndarray, rng: random.Random) -> np.ndarray:
    return np.full_like(
        array, rng.choice(FLOATS) if array.dtype.kind == "f" else rng.choice((0, 1, -5, 1000))
    )


def _typed(array: np.ndarray, rng: random.Random) -> np.ndarray:
    kinds = ("f2", "f4", "f8", "g", "i1", "u1", "i8", "?", "c8", "S3", "U3", "O", "M8[s]", "i4,f4", ">f4")
    kind = rng.choice(kinds)
    if kind in ("M8[s]", "i4,f4"):
        return np.zeros(array.shape, kind)
    return np.nan_to_num(array).astype(kind)


def _shaped(array: np.ndarray, rng: random.Random) -> np.ndarray:
    choices = (
        array[:0],
        array[:1],
        array[:7],
        array.T,
        array.reshape(-1),
        array[None],
        array[..., :1],
        array[0],
    )
    grown = np.zeros((*array.shape[:-1], 40), array.dtype) if array.ndim else array
    deep = np.zeros((1,) * rng.choice((5, 20, 32)), array.dtype)
    none = np.zeros((0, rng.choice((0, 5, 2**40))), array.dtype)
    return rng.choice((*choices, grown, deep, none))


_ON_ARRAYS: Sequence[Callable[[np.ndarray, random.Random], np.ndarray]] = (_valued, _filled, _typed, _shaped)


def npz_changed(arrays: Arrays, rng: random.Random) -> bytes:
    """An archive of changed arrays, with lies in its headers, or with damaged bytes."""
    how = rng.randrange(4)
    if how == 0:
        return bytes_changed(_npz(arrays), rng)
    if how == 1:
        return _lying_npz(arrays, rng)
    if how == 2:
        return bytes_changed(_npz(arrays_changed(arrays, rng)), rng)
    return _npz(arrays_changed(arrays, rng))


def _npz(arrays: Arrays) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            part = io.BytesIO()
            np.lib.format.write_array(part, array, allow_pickle=True)
            archive.writestr(f"{name}.npy", part.getvalue())
    return file.getvalue()


def _lying_npz(arrays: Arrays, rng: random.Random) -> bytes:
    """Headers of arrays that promise something else, members twice, odd names, a bomb."""
    file = io.BytesIO()
    with zipfile.ZipFile(
        file, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    ) as zipped:
        for name, array in arrays.items():
            part = io.BytesIO()
            shape = tuple(rng.choice((dim, dim, *NUMBERS)) for dim in array.shape)
            kind = rng.choice(
                (array.dtype.str, array.dtype.str, "|O", ">f8", "<f0", "|V99999999", "(9999,9999)f8")
            )
            header = {"descr": kind, "fortran_order": rng.choice((False, True, 7)), "shape": shape}
            text = (
                repr(header)
                if rng.random() < 0.8
                else rng.choice(("{" * 3000, "__import__('os')", "(" * 9000))
            )
            packed = text.encode().ljust(117) + b"\n"
            part.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(packed) % 2**16) + packed)
            part.write(b"\0" * 10**7 if rng.random() < 0.1 else array.tobytes())
            zipped.writestr(
                rng.choice((f"{name}.npy", f"{name}.npy", f"../{name}.npy", name, "data.pkl")),
                part.getvalue(),
            )
    return file.getvalue()


def safetensors_changed(data: bytes, rng: random.Random) -> bytes:
    """The header's JSON changed, its length lied about, or any bytes."""
    if rng.random() < 0.3:
        return bytes_changed(data, rng)
    length = struct.unpack("<Q", data[:8])[0]
    header = json_changed(json.loads(data[8 : 8 + length]), rng).encode(errors="surrogatepass")
    stated = len(header) if rng.random() < 0.85 else rng.choice(NUMBERS) % 2**64
    return struct.pack("<Q", stated) + header + data[8 + length :]


# Text


def json_changed(value: Any, rng: random.Random) -> str:
    """A JSON text whose meaning was changed in one to three places, and sometimes its bytes."""
    holder = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        place, key = rng.choice(list(_places(holder)))
        action = rng.randrange(4)
        if action == 0 and place is not holder:
            del place[key]
        elif action == 1 and isinstance(place, dict):
            place[rng.choice(TEXTS)] = place.pop(key)
        else:
            place[key] = _any_value(place[key], rng)
    text = json.dumps(holder[0])
    if rng.random() < 0.15:
        text = bytes_changed(text.encode(), rng).decode(errors="replace")
    return text


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _any_value(old: Any, rng: random.Random) -> Any:
    if rng.random() < 0.15:
        deep: Any = old
        for _ in range(rng.choice((3, 100, 900))):
            deep = [deep]
        return deep
    plain = (
        None,
        True,
        [],
        {},
        [old],
        {"a": old},
        10**400,
        "1/0",
        "9**9**9",
        "re:(a*)*b",
        "fan_in" + "*9" * 90,
    )
    return rng.choice((rng.choice(plain), rng.choice(TEXTS), rng.choice(NUMBERS), rng.choice(FLOATS)))


def toml_changed(text: str, rng: random.Random, keys: Sequence[str]) -> str:
    """Lines dropped, doubled, other keys and values, other bytes."""
    lines = text.splitlines()
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(lines))
        values = (
            "true",
            "[]",
            "-1",
            "nan",
            "inf",
            "9" * 400,
            '"nan"',
            "[[1]]",
            "{a = 1}",
            "1979-05-27",
            '"("',
            "''",
        )
        action = rng.randrange(4)
        if action == 0 and len(lines) > 1:
            del lines[at]
        elif action == 1:
            lines.insert(at, f"{rng.choice(keys)} = {rng.choice(values)}")
        else:
            lines[at] = (
                f"{lines[at].partition(' =')[0]} = {rng.choice((*values, json.dumps(rng.choice(TEXTS))))}"
            )
    made = "\n".join(lines)
    return bytes_changed(made.encode(), rng).decode(errors="replace") if rng.random() < 0.3 else made
