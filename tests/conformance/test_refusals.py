"""What is wrong with a request is its sender's error: 400 with the reason, and whoever comes next is answered."""

from __future__ import annotations

import copy
import gzip
import json
import math
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from conformance.models import NO_JSON, Model, Tensor, framed, packed, unpacked
from conformance.wire import LENGTH, refused, strict

Tree = dict[str, Any]


# --- the JSON of a request, spoiled in one place ------------------------------------------------------------------------
# Each takes a good request whose first input is in JSON, and spoils it.


def at(*path: Any, value: Any) -> Callable[[Tree], None]:
    """Put `value` there."""

    def spoil(tree: Tree) -> None:
        inner: Any = tree
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = value(inner.get(path[-1])) if callable(value) else value

    return spoil


def without(*path: Any) -> Callable[[Tree], None]:
    def spoil(tree: Tree) -> None:
        inner: Any = tree
        for step in path[:-1]:
            inner = inner[step]
        del inner[path[-1]]

    return spoil


FIRST = ("inputs", 0)
SPOILED: dict[str, Callable[[Tree], None]] = {
    "no inputs": without("inputs"),
    "inputs null": at("inputs", value=None),
    "inputs empty": at("inputs", value=[]),
    "inputs an object": at("inputs", value={}),
    "inputs text": at("inputs", value="x"),
    "an input that is no object": at("inputs", value=lambda inputs: [*inputs, 7]),
    "an input twice": at("inputs", value=lambda inputs: [*inputs, copy.deepcopy(inputs[0])]),
    "an unknown input": at("inputs", value=lambda inputs: [*inputs, {**copy.deepcopy(inputs[0]), "name": "no-such-input"}]),
    "another name": at(*FIRST, "name", value="no-such-input"),
    "no name": without(*FIRST, "name"),
    "a name that is no text": at(*FIRST, "name", value=7),
    "an input missing": at("inputs", value=lambda inputs: inputs[:-1]),
    "no shape": without(*FIRST, "shape"),
    "shape null": at(*FIRST, "shape", value=None),
    "shape a number": at(*FIRST, "shape", value=1),
    "shape of text": at(*FIRST, "shape", value=lambda shape: [str(size) for size in shape]),
    "shape of reals": at(*FIRST, "shape", value=lambda shape: [size + 0.5 for size in shape]),
    "shape of booleans": at(*FIRST, "shape", value=lambda shape: [True for _ in shape]),
    "shape nested": at(*FIRST, "shape", value=lambda shape: [shape]),
    "one dimension more": at(*FIRST, "shape", value=lambda shape: [*shape, 1]),
    "one dimension less": at(*FIRST, "shape", value=lambda shape: shape[:-1]),
    "no dimension": at(*FIRST, "shape", value=[]),
    "a negative dimension": at(*FIRST, "shape", value=lambda shape: [-1, *shape[1:]]),
    "two negative dimensions": at(*FIRST, "shape", value=lambda shape: [-shape[0], -shape[1], *shape[2:]] if len(shape) > 1 else [-shape[0]]),
    "a dimension of zero": at(*FIRST, "shape", value=lambda shape: [0, *shape[1:]]),
    "a last dimension of zero": at(*FIRST, "shape", value=lambda shape: [*shape[:-1], 0]),
    "zero and no data": lambda tree: tree["inputs"][0].update(shape=[0, *tree["inputs"][0]["shape"][1:]], data=[]),
    "a dimension of 2^31": at(*FIRST, "shape", value=lambda shape: [1 << 31, *shape[1:]]),
    "a dimension of 2^63": at(*FIRST, "shape", value=lambda shape: [1 << 63, *shape[1:]]),
    "a product beyond 2^64": at(*FIRST, "shape", value=lambda shape: [(1 << 62) + 1, *[4 for _ in shape[1:]]]),
    "a dimension of 10^400": at(*FIRST, "shape", value=lambda shape: [10**400, *shape[1:]]),
    "a batch of one more than the data": at(*FIRST, "shape", value=lambda shape: [shape[0] + 1, *shape[1:]]),
    "no datatype": without(*FIRST, "datatype"),
    "another datatype": at(*FIRST, "datatype", value=lambda datatype: "INT16" if datatype != "INT16" else "FP32"),
    "an unknown datatype": at(*FIRST, "datatype", value="FLOAT"),
    "a datatype that is no text": at(*FIRST, "datatype", value=7),
    "no data": without(*FIRST, "data"),
    "data null": at(*FIRST, "data", value=None),
    "data a number": at(*FIRST, "data", value=1),
    "data text": at(*FIRST, "data", value="AAAA"),
    "data an object": at(*FIRST, "data", value={}),
    "an element too few": at(*FIRST, "data", value=lambda data: data[:-1]),
    "an element too many": at(*FIRST, "data", value=lambda data: [*data, data[0]]),
    "an element null": at(*FIRST, "data", value=lambda data: [None, *data[1:]]),
    "an element an object": at(*FIRST, "data", value=lambda data: [{}, *data[1:]]),
    "an element a list": at(*FIRST, "data", value=lambda data: [[], *data[1:]]),
    "an element out of any range": at(*FIRST, "data", value=lambda data: [10**400, *data[1:]]),
    "lists of other lengths": at(*FIRST, "data", value=lambda data: [[data[0]], data[1:]]),
    "lists nested too deep": at(*FIRST, "data", value=lambda data: [[[[[[[[data]]]]]]]]),
    "an unknown output": at("outputs", value=[{"name": "no-such-output"}]),
    "an output twice": at("outputs", value=lambda outputs: [*outputs, outputs[0]]),
    "an output that is no object": at("outputs", value=["x"]),
    "outputs an object": at("outputs", value={"name": "x"}),
    "parameters a list": at("parameters", value=[]),
    "an input's parameters text": at(*FIRST, "parameters", value="x"),
    "an id that is no text": at("id", value=7),
    "binary_data_size without binary": at(*FIRST, "parameters", value={"binary_data_size": 4}),
    "binary_data_size text": at(*FIRST, "parameters", value={"binary_data_size": "4"}),
    "binary_data_size negative": at(*FIRST, "parameters", value={"binary_data_size": -4}),
    "shared memory": at(*FIRST, "parameters", value={"shared_memory_region": "r", "shared_memory_byte_size": 4}),
}


def good(model: Model) -> tuple[Tree, list[bytes]]:
    """A request whose first input is in JSON, with the outputs named."""
    batch = min(model.largest, 2)
    tree, blobs = model.request(model.rows(batch))
    if "data" not in tree["inputs"][0]:
        pytest.skip("the first input has no JSON form")
    return {**tree, "outputs": [model.wanted(tensor) for tensor in model.outputs]}, blobs


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_a_request_spoiled_in_one_place_is_400(model: Model, spoil: Callable[[Tree], None]) -> None:
    tree, blobs = good(model)
    assert model.post(tree, blobs).status == 200
    spoil(tree)
    refused(model.post(tree, blobs), 400)
    assert model.post(*good(model)).status == 200


# --- elements -----------------------------------------------------------------------------------------------------------

BEYOND = {"INT8": [128, -129], "INT16": [1 << 15], "INT32": [1 << 31], "INT64": [1 << 63], "UINT8": [-1, 256], "UINT16": [-1, 1 << 16], "UINT32": [-1, 1 << 32], "UINT64": [-1, 1 << 64]}


def test_an_element_of_another_type_or_beyond_its_datatype_is_400(model: Model) -> None:
    for number, tensor in enumerate(model.inputs):
        if tensor.datatype in NO_JSON:
            continue
        wrong: list[Any] = ["1", [1, 2], None] if tensor.datatype != "BYTES" else [1, None]
        wrong += BEYOND.get(tensor.datatype, []) + ([1.5, True] if tensor.dtype.kind in "iu" else []) + ([2, 1, 0.0] if tensor.datatype == "BOOL" else [])
        wrong += [1e39] if tensor.datatype == "FP32" else []
        for element in wrong:
            tree, blobs = model.request(model.rows(1))
            tree["inputs"][number]["data"][0] = element
            reply = model.post(tree, blobs)
            assert reply.status == 400, f"{tensor.name}: {element!r} as {tensor.datatype} is answered {reply.status}: {reply.body[:200]!r}"
            refused(reply, 400)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_what_is_no_number_in_json_is_400(model: Model, literal: str) -> None:
    for number, tensor in enumerate(model.inputs):
        if tensor.datatype not in ("FP32", "FP64"):
            continue
        tree, blobs = model.request(model.rows(1))
        tree["inputs"][number]["data"][0] = "HERE"
        refused(model.post(json.dumps(tree).replace('"HERE"', literal).encode(), blobs), 400)


def test_a_nan_in_binary_is_refused_or_answered_but_never_makes_json_that_is_none(model: Model) -> None:
    model.need("binary_tensor_data")
    if not any(tensor.real for tensor in model.inputs):
        pytest.skip("the model takes no reals")
    for value in (math.nan, math.inf, -math.inf):
        feeds = model.rows(1)
        for tensor in model.inputs:
            if tensor.real:
                feeds[tensor.name].flat[0] = value
        reply = model.post(*model.request(feeds, binary=True, binary_outputs=False))
        if reply.status == 200:
            head = int(reply.headers.get(LENGTH.lower(), len(reply.body)))
            strict(reply.body[:head])
        else:
            refused(reply, 400)


def test_what_has_no_json_form_is_400_in_json(model: Model) -> None:
    kinds = [number for number, tensor in enumerate(model.inputs) if tensor.datatype in NO_JSON]
    if not kinds:
        pytest.skip("the model has no FP16 and no BF16")
    for number in kinds:
        tree, blobs = model.request(model.rows(1))
        entry = tree["inputs"][number]
        del blobs[[other for other in range(len(tree["inputs"])) if "data" not in tree["inputs"][other]].index(number)]
        entry["data"] = [1.0] * math.prod(entry["shape"])
        del entry["parameters"]
        refused(model.post(tree, blobs), 400)
    outputs = [{"name": tensor.name} for tensor in model.outputs if tensor.datatype in NO_JSON]
    if outputs:
        tree, blobs = model.request(model.rows(1))
        refused(model.post({**tree, "outputs": outputs}, blobs), 400)


def test_inputs_of_different_batches_are_400(model: Model) -> None:
    if len(model.inputs) < 2 or model.largest < 3:
        pytest.skip("the model has one input, or no batches")
    for binary in (False, True) if model.binary else (False,):
        feeds = model.rows(2) | {model.inputs[0].name: model.rows(3)[model.inputs[0].name]}
        refused(model.post(*model.request(feeds, binary=binary)), 400)


# --- binary framing -----------------------------------------------------------------------------------------------------


def sized(model: Model, change: int) -> tuple[Tree, list[bytes]]:
    tree, blobs = model.request(model.rows(1), binary=True)
    tree["inputs"][-1]["parameters"]["binary_data_size"] += change
    return tree, blobs


FRAMING: dict[str, Callable[[Model], tuple[Tree, list[bytes]]]] = {
    "a size above what is there": lambda model: sized(model, 1),
    "a size below what is there": lambda model: sized(model, -1),
    "a size of nothing": lambda model: sized(model, -len(model.request(model.rows(1), binary=True)[1][-1])),
    "a size beyond 2^64": lambda model: sized(model, 1 << 64),
    "a byte too many": lambda model: (model.request(model.rows(1), binary=True)[0], [*model.request(model.rows(1), binary=True)[1], b"\0"]),
    "a byte too few": lambda model: (model.request(model.rows(1), binary=True)[0], [*model.request(model.rows(1), binary=True)[1][:-1], model.request(model.rows(1), binary=True)[1][-1][:-1]]),
    "a size and bytes that are not the shape's": lambda model: (sized(model, 8)[0], [*sized(model, 8)[1][:-1], sized(model, 8)[1][-1] + bytes(8)]),
    "a size that is a boolean": lambda model: (_with_size(model, True), model.request(model.rows(1), binary=True)[1]),
    "a size that is a real": lambda model: (_with_size(model, 4.5), model.request(model.rows(1), binary=True)[1]),
    "a size that is text": lambda model: (_with_size(model, "4"), model.request(model.rows(1), binary=True)[1]),
    "a negative size": lambda model: (_with_size(model, -4), model.request(model.rows(1), binary=True)[1]),
}


def _with_size(model: Model, size: Any) -> Tree:
    tree, _ = model.request(model.rows(1), binary=True)
    tree["inputs"][-1]["parameters"]["binary_data_size"] = size
    return tree


@pytest.mark.parametrize("make", FRAMING.values(), ids=FRAMING.keys())
def test_binary_sizes_that_do_not_add_up_are_400(model: Model, make: Callable[[Model], tuple[Tree, list[bytes]]]) -> None:
    model.need("binary_tensor_data")
    refused(model.post(*make(model)), 400)
    assert model.post(*model.request(model.rows(1), binary=True)).status == 200


@pytest.mark.parametrize("change", [lambda head, body: str(body + 1), lambda head, body: str(head - 1), lambda head, body: str(head + 1), lambda head, body: "-1", lambda head, body: "x", lambda head, body: "", lambda head, body: f"+{head}", lambda head, body: f"0x{head:x}", lambda head, body: f"{head}.0", lambda head, body: "9" * 30, lambda head, body: f"{head}, {head}", lambda head, body: "1_0", lambda head, body: "\u00b2"], ids=["beyond the body", "one less", "one more", "negative", "no number", "empty", "signed", "hexadecimal", "real", "huge", "a list", "underscored", "superscript"])  # fmt: skip
def test_a_wrong_length_of_the_json_is_400(model: Model, change: Callable[[int, int], str]) -> None:
    model.need("binary_tensor_data")
    body, headers = framed(*model.request(model.rows(1), binary=True))
    refused(model.target.ask("POST", model.infer_path, body, {**headers, LENGTH: change(int(headers[LENGTH]), len(body))}), 400)


def test_the_length_of_the_json_given_twice_is_400(model: Model) -> None:
    model.need("binary_tensor_data")
    body, headers = framed(*model.request(model.rows(1), binary=True))
    refused(model.target.ask("POST", model.infer_path, body, {**headers, LENGTH.lower(): "0"}), 400)


def test_a_boolean_of_another_byte_than_0_and_1_is_400(model: Model) -> None:
    model.need("binary_tensor_data")
    kinds = [number for number, tensor in enumerate(model.inputs) if tensor.datatype == "BOOL"]
    if not kinds:
        pytest.skip("the model has no BOOL")
    tree, blobs = model.request(model.rows(1), binary=True)
    blobs[kinds[0]] = b"\2" * len(blobs[kinds[0]])
    refused(model.post(tree, blobs), 400)


def test_text_whose_lengths_do_not_add_up_is_400(model: Model) -> None:
    model.need("binary_tensor_data")
    kinds = [number for number, tensor in enumerate(model.inputs) if tensor.datatype == "BYTES"]
    if not kinds:
        pytest.skip("the model has no BYTES")
    tree, blobs = model.request(model.rows(1), binary=True)
    blobs[kinds[0]] = struct.pack("<I", 1 << 31) + blobs[kinds[0]][4:]
    refused(model.post(tree, blobs), 400)


# --- bodies -------------------------------------------------------------------------------------------------------------

BODIES: dict[str, bytes] = {
    "nothing": b"", "no JSON": b"hello", "half an object": b'{"inputs": [', "a list": b"[]", "null": b"null", "a number": b"7", "text": b'"x"', "an empty object": b"{}",
    "no UTF-8": b'{"inputs": "\xff\xfe"}', "UTF-16": '{"inputs": []}'.encode("utf-16"), "a byte order mark": b"\xef\xbb\xbf[]", "null bytes": bytes(1000), "two objects": b"{}{}",
    "lists 10^5 deep": b"[" * 100_000, "lists 10^5 deep and closed": b"[" * 100_000 + b"]" * 100_000, "objects 10^5 deep": b'{"a":' * 100_000, "a number of 10^5 digits": b'{"inputs": ' + b"9" * 100_000 + b"}",
    "a lone surrogate for inputs": b'{"inputs": "\\ud800"}', "a comment": b"{} // x", "single quotes": b"{'inputs': []}",
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_a_body_that_is_no_request_is_400(first: Model, body: bytes) -> None:
    refused(first.target.ask("POST", first.infer_path, body, {"Content-Type": "application/json"}), 400)
    assert first.post(*first.request(first.rows(1))).status == 200


def test_an_id_that_no_encoding_can_carry_back_is_answered_or_400(first: Model) -> None:
    tree, blobs = first.request(first.rows(1))
    reply = first.post(json.dumps({**tree, "id": "HERE"}).replace("HERE", "\\ud800").encode(), blobs)
    assert reply.status == 200 or refused(reply, 400)


PACKED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "not gzip": ("gzip", lambda body: body), "not deflate": ("deflate", lambda body: body), "gzip called deflate": ("deflate", gzip.compress), "deflate called gzip": ("gzip", zlib.compress),
    "half": ("gzip", lambda body: gzip.compress(body)[:-9]), "a wrong checksum": ("gzip", lambda body: gzip.compress(body)[:-8] + bytes(8)), "something after it": ("gzip", lambda body: gzip.compress(body) + b"x"),
    "nothing": ("gzip", lambda body: b""),
}  # fmt: skip


@pytest.mark.parametrize(("encoding", "pack"), PACKED.values(), ids=PACKED.keys())
def test_a_body_that_cannot_be_unpacked_is_400(first: Model, encoding: str, pack: Callable[[bytes], bytes]) -> None:
    body, headers = framed(*first.request(first.rows(1)))
    refused(first.target.ask("POST", first.infer_path, pack(body), {**headers, "Content-Encoding": encoding}), 400)


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, gzip", "nonsense"])
def test_an_encoding_that_is_not_understood_is_400_or_415(first: Model, encoding: str) -> None:
    body, headers = framed(*first.request(first.rows(1)))
    refused(first.target.ask("POST", first.infer_path, body, {**headers, "Content-Encoding": encoding}), 400, 415)


def bomb(megabytes: int) -> bytes:
    """gzip of so many zeros, made of one megabyte's; its checksum is wrong, which nobody should come to see."""
    packer = zlib.compressobj(9, wbits=-15)
    once = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + once * megabytes + b"\3\0" + bytes(8)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_bomb_is_refused(first: Model, encoding: str) -> None:
    body = bomb(2048)
    body = body if encoding == "gzip" else b"\x78\xda" + body[10:-8] + bytes(4)
    assert len(body) < 4 << 20
    refused(first.target.ask("POST", first.infer_path, body, {"Content-Encoding": encoding, "Content-Type": "application/json"}), 400, 413)
    assert first.post(*first.request(first.rows(1))).status == 200


def test_a_good_request_after_a_bad_one_on_the_same_connection_is_answered(model: Model) -> None:
    tree, blobs = good(model)
    bad = copy.deepcopy(tree)
    bad["inputs"][0]["name"] = "no-such-input"
    for binary in (False, True) if model.binary else (False,):
        with model.target.connect() as connection:
            for number in range(6):
                if number % 2:
                    connection.send(model.bytes_of(model.rows(1, number), binary=binary))
                    model.answer(connection.reply())
                else:
                    body, headers = framed(bad, blobs)
                    connection.send(model.target.bytes_of("POST", model.infer_path, body, headers))
                    reply = connection.reply()
                    refused(reply, 400)
                    assert reply.headers.get("connection", "").lower() != "close", "one wrong request costs the connection"


def test_a_refused_row_does_not_hurt_those_in_its_batch(model: Model) -> None:
    model.need("binary_tensor_data")
    feeds = model.rows(1)
    expected = {name: values.copy() for name, values in model.infer(feeds, binary=True).outputs.items()}
    spoiled, blobs = model.request(feeds, binary=True)
    blobs[-1] = blobs[-1][:-1]
    with model.target.connect() as right, model.target.connect() as wrong:
        body, headers = framed(spoiled, blobs)
        for _ in range(5):
            wrong.send(model.target.bytes_of("POST", model.infer_path, body, headers))
            right.send(model.bytes_of(feeds, binary=True))
            refused(wrong.reply(), 400)
            for name, values in model.answer(right.reply()).outputs.items():
                np.testing.assert_array_equal(values, expected[name])


def test_what_is_packed_is_what_is_unpacked() -> None:
    """The suite's own framing, against numpy's."""
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    tensor = Tensor("x", "FP32", (-1, 3))
    np.testing.assert_array_equal(unpacked(tensor, [2, 3], packed(tensor, values)), values)
    texts, tensor = np.array([b"a", b"", b"cde"], object), Tensor("t", "BYTES", (-1,))
    np.testing.assert_array_equal(unpacked(tensor, [3], packed(tensor, texts)), texts)
