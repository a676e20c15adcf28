"""Open Inference Protocol V2 as bytes: a request's body to named arrays, outputs to a reply's body.

With the binary tensor and classification extensions (protocol.py has their pages). Knows tensors by name, datatype and shape; no
model, no route and no Ray. What cannot be decoded or encoded is a RefusedError, whose message repeats nothing that the client sent.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portaisys.engine import Tensor
from portaisys.serve.batcher import PRIORITY

MAX_BODY_BYTES = 64 << 20
# A JSON text can take 24 times its length in memory once parsed ("[{},{},..."), so its limit is lower.
MAX_JSON_BYTES = 16 << 20
_COMPRESS_BYTES = 1024  # below, gzip costs more than it saves
_HEADER_LENGTH = "inference-header-content-length"


class RefusedError(Exception):
    """A request that gets an error reply; the message is for the client, `reason` tells alike statuses apart."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.reason = reason


@dataclass(frozen=True)
class Datatype:
    """`kinds`, `typecode`: the Python types a JSON element may have and the array that holds them; none: no JSON form."""

    name: str
    typecode: str
    kinds: frozenset[type]


_BOOL, _INT, _REAL = frozenset({bool}), frozenset({int}), frozenset({int, float})
DATATYPES = {
    "bool": Datatype("BOOL", "b", _BOOL),
    "uint8": Datatype("UINT8", "B", _INT),
    "uint16": Datatype("UINT16", "H", _INT),
    "uint32": Datatype("UINT32", "I", _INT),
    "uint64": Datatype("UINT64", "Q", _INT),
    "int8": Datatype("INT8", "b", _INT),
    "int16": Datatype("INT16", "h", _INT),
    "int32": Datatype("INT32", "i", _INT),
    "int64": Datatype("INT64", "q", _INT),
    "float16": Datatype("FP16", "", frozenset()),
    "float32": Datatype("FP32", "f", _REAL),
    "float64": Datatype("FP64", "d", _REAL),
}


@dataclass(frozen=True)
class Wanted:
    """An output the client asked for; `classes` > 0: the best so many, as "value:index:label"."""

    name: str
    binary: bool
    classes: int = 0


@dataclass(frozen=True)
class InferRequest:
    """A decoded request. `feeds`: views into the body, by input name; `timeout_s`: None waits as long as it takes."""

    feeds: Mapping[str, NDArray[Any]]
    wanted: Sequence[Wanted]
    id: str | None = None
    timeout_s: float | None = None
    priority: int = PRIORITY


@dataclass(frozen=True)
class Head:
    """The JSON of a request, checked: what is in the body behind it. `entries`: tensor, shape, its bytes in the body (None: `data` holds it)."""

    entries: tuple[tuple[Tensor, tuple[int, ...], int | None, Any], ...]
    wanted: Sequence[Wanted]
    id: str | None
    timeout_s: float | None
    priority: int

    @property
    def binary(self) -> bool:
        """Whether every tensor goes both ways in binary."""
        return all(size is not None for _, _, size, _ in self.entries) and all(wanted.binary and not wanted.classes for wanted in self.wanted)


# --- decode -------------------------------------------------------------------------------------------------------


def decode(headers: Mapping[str, str], body: bytes, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> InferRequest:
    """Body to named arrays. `headers`: lower-case names. Raises RefusedError (400; 413 for a body over the limit)."""
    view = memoryview(_inflate(headers.get("content-encoding", "identity"), body))
    json_bytes = _header_length(headers.get(_HEADER_LENGTH), len(view))
    if json_bytes == 0:
        return _decode_raw(view, inputs, outputs)
    head = head_of(view[:json_bytes], inputs, outputs)
    return InferRequest(feeds_of(head, view[json_bytes:], inputs), head.wanted, head.id, head.timeout_s, head.priority)


def tree_of(headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """The JSON object that a body is; none is an empty one. `headers`: lower-case names. Raises RefusedError (400, 413)."""
    return _parse(memoryview(_inflate(headers.get("content-encoding", "identity"), body))) if body else {}


def head_of(view: memoryview, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Head:
    """The JSON of a request. Raises RefusedError."""
    return head_from(_parse(view), inputs, outputs)


def head_from(tree: Mapping[str, Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Head:
    """A request as a tree, which gRPC's messages are made into too. Raises RefusedError."""
    parameters = parameters_of(tree)
    entries: dict[str, tuple[Tensor, tuple[int, ...], int | None, Any]] = {}
    for entry in _list(tree, "inputs"):
        tensor = _named(entry, inputs, "input", entries)
        entries[tensor.name] = tensor, _shape(entry, tensor), value_of(parameters_of(entry), "binary_data_size", int, None), entry.get("data")
    return Head(
        tuple(entries.values()), _wanted(_list(tree, "outputs"), outputs, binary=value_of(parameters, "binary_data_output", bool, False)), value_of(tree, "id", str, None),
        _timeout_s(parameters), _priority(parameters),
    )  # fmt: skip


def _inflate(encoding: str, body: bytes) -> bytes:
    """Undo the content encoding, never producing more than the limit whatever the body claims."""
    if len(body) > MAX_BODY_BYTES:
        raise RefusedError(413, f"the body exceeds {MAX_BODY_BYTES} bytes; send fewer samples a request")
    encoding = encoding.strip().lower().removeprefix("x-")  # of any case, and gzip has an older name (RFC 9110, 8.4.1)
    if encoding in ("identity", ""):
        return body
    if encoding not in ("gzip", "deflate"):
        raise RefusedError(400, "unsupported Content-Encoding; use identity, gzip or deflate")
    inflater = zlib.decompressobj(wbits=31 if encoding == "gzip" else 15)
    try:
        inflated = inflater.decompress(body, MAX_BODY_BYTES + 1)
    except zlib.error:
        raise RefusedError(400, f"the body is not valid {encoding}") from None
    if len(inflated) > MAX_BODY_BYTES:
        raise RefusedError(413, f"the uncompressed body exceeds {MAX_BODY_BYTES} bytes; send fewer samples a request")
    if not inflater.eof or inflater.unused_data:
        raise RefusedError(400, f"the body is not one whole {encoding} stream")
    return inflated


def _header_length(text: str | None, body_bytes: int) -> int:
    if text is None:
        return body_bytes or -1  # an empty body is empty JSON, not a raw tensor
    if not re.fullmatch("[0-9]{1,12}", text):
        raise RefusedError(400, "Inference-Header-Content-Length is not a number of bytes")
    if int(text) > body_bytes:
        raise RefusedError(400, f"Inference-Header-Content-Length exceeds the {body_bytes} bytes of the body")
    return int(text)


def _decode_raw(view: memoryview, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> InferRequest:
    """Header length 0: the body is the only input's one sample, and every output goes back in binary."""
    if len(inputs) != 1 or -1 in inputs[0].shape[1:]:
        raise RefusedError(400, "a raw body needs a model of one input with fixed dimensions; send a JSON header")
    tensor = inputs[0]
    feeds = {tensor.name: from_binary(tensor, (1, *tensor.shape[1:]), view)}
    return InferRequest(feeds, [Wanted(output.name, binary=True) for output in outputs])


def _parse(view: memoryview) -> dict[str, Any]:
    if len(view) > MAX_JSON_BYTES:
        raise RefusedError(413, f"the JSON exceeds {MAX_JSON_BYTES} bytes; send the tensors in binary")
    try:
        tree = json.loads(str(view, "utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise RefusedError(400, "the request is not valid JSON") from None
    if not isinstance(tree, dict):
        raise RefusedError(400, "the request is not a JSON object")
    return tree


def _no_constant(_: str) -> None:
    raise ValueError("NaN and Infinity are not JSON")


def feeds_of(head: Head, blobs: memoryview, inputs: Sequence[Tensor]) -> dict[str, NDArray[Any]]:
    """The tensors of a request whose JSON is `head`: views into `blobs` where they are binary. Raises RefusedError."""
    feeds: dict[str, NDArray[Any]] = {}
    for tensor, shape, size, data in head.entries:
        if size is None:
            feeds[tensor.name] = _from_json(tensor, shape, data)
        else:
            if not 0 <= size <= len(blobs):
                raise RefusedError(400, f"input {tensor.name!r}: binary_data_size exceeds what the body holds")
            feeds[tensor.name] = from_binary(tensor, shape, blobs[:size])
            blobs = blobs[size:]
    complete(feeds, inputs, left=len(blobs))
    return feeds


def complete(feeds: Mapping[str, NDArray[Any]], inputs: Sequence[Tensor], left: int = 0) -> None:
    """Raises RefusedError when an input is missing, when bytes are left over, or when the inputs share no batch."""
    missing = [tensor.name for tensor in inputs if tensor.name not in feeds]
    if missing:
        raise RefusedError(400, f"missing input {', '.join(missing)}")
    if left:
        raise RefusedError(400, f"{left} bytes of the body belong to no input; every binary_data_size together must add up to it")
    if len({len(values) for values in feeds.values()}) > 1:
        raise RefusedError(400, "the inputs differ in dimension 0, the batch")


def _named(entry: Any, tensors: Sequence[Tensor], kind: str, taken: Any) -> Tensor:
    if not isinstance(entry, dict):
        raise RefusedError(400, f"an {kind} is not a JSON object")
    tensor = next((tensor for tensor in tensors if tensor.name == entry.get("name")), None)
    if tensor is None:
        raise RefusedError(400, f"unknown {kind} name; the model has {', '.join(tensor.name for tensor in tensors)}")
    if tensor.name in taken:
        raise RefusedError(400, f"{kind} {tensor.name!r} stands twice in the request")
    return tensor


def _shape(entry: Mapping[str, Any], tensor: Tensor) -> tuple[int, ...]:
    """The declared shape, which must be what the model takes; positive throughout."""
    datatype = DATATYPES[tensor.dtype].name
    if entry.get("datatype") != datatype:
        raise RefusedError(400, f"input {tensor.name!r} has datatype {datatype}")
    shape = _list(entry, "shape")
    fits = len(shape) == len(tensor.shape) and all(
        type(size) is int and size > 0 and want in (-1, size) for size, want in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise RefusedError(400, f"input {tensor.name!r} has shape {list(tensor.shape)}; -1 is any size from 1 up")
    return tuple(shape)


def from_binary(tensor: Tensor, shape: tuple[int, ...], blob: memoryview) -> NDArray[Any]:
    """Little-endian bytes as an array, a view of them. Raises RefusedError."""
    dtype = np.dtype(tensor.dtype).newbyteorder("<")
    expected = math.prod(shape) * dtype.itemsize
    if len(blob) != expected:
        raise RefusedError(400, f"input {tensor.name!r}: {len(blob)} bytes where shape and datatype need {_count(expected)}")
    if dtype.kind == "b" and np.frombuffer(blob, np.uint8).max() > 1:
        raise RefusedError(400, f"input {tensor.name!r}: a BOOL is a byte of 0 or 1")
    return _finite(tensor, np.frombuffer(blob, dtype).reshape(shape))


def _from_json(tensor: Tensor, shape: tuple[int, ...], data: Any) -> NDArray[Any]:
    """Nested or flat lists, row major."""
    if not DATATYPES[tensor.dtype].kinds:
        raise RefusedError(400, f"input {tensor.name!r}: {DATATYPES[tensor.dtype].name} has no JSON form; send it in binary")
    return from_elements(tensor, shape, _flatten(tensor, data, len(shape)))


def from_elements(tensor: Tensor, shape: tuple[int, ...], flat: Sequence[Any]) -> NDArray[Any]:
    """Row major elements as an array. An `array` refuses what numpy would convert or let grow: strings, objects, overflow. Raises RefusedError."""
    datatype = DATATYPES[tensor.dtype]
    if len(flat) != math.prod(shape):
        raise RefusedError(400, f"input {tensor.name!r}: {len(flat)} elements where the shape needs {_count(math.prod(shape))}")
    try:
        if not set(map(type, flat)) <= datatype.kinds:
            raise TypeError
        values = np.frombuffer(array(datatype.typecode, flat), tensor.dtype)
    except (TypeError, OverflowError):
        raise RefusedError(400, f"input {tensor.name!r}: an element is not a {datatype.name}") from None
    return _finite(tensor, values.reshape(shape))


def _flatten(tensor: Tensor, data: Any, rank: int) -> list[Any]:
    if not isinstance(data, list):
        raise RefusedError(400, f"input {tensor.name!r} has neither data, as a list, nor binary_data_size")
    rows: list[Any] = data
    for _ in range(rank - 1):
        if not rows or not isinstance(rows[0], list):
            break
        if not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
            raise RefusedError(400, f"input {tensor.name!r}: the nested lists differ in length")
        rows = list(chain.from_iterable(rows))
    return rows


def _finite(tensor: Tensor, values: NDArray[Any]) -> NDArray[Any]:
    """One NaN makes its whole answer NaN, which JSON cannot carry back: refused where it came from."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise RefusedError(400, f"input {tensor.name!r} holds NaN, infinity or a number beyond its datatype")
    return values


def _wanted(entries: Sequence[Any], outputs: Sequence[Tensor], *, binary: bool) -> list[Wanted]:
    wanted: dict[str, Wanted] = {}
    for entry in entries:
        name = _named(entry, outputs, "output", wanted).name
        parameters = parameters_of(entry)
        classes = value_of(parameters, "classification", int, 0)
        if classes < 0:
            raise RefusedError(400, f"output {name!r}: classification is a number of classes")
        wanted[name] = Wanted(name, value_of(parameters, "binary_data", bool, binary), classes)
    return list(wanted.values()) or [Wanted(output.name, binary) for output in outputs]


def _timeout_s(parameters: Mapping[str, Any]) -> float | None:
    """Triton's request parameter `timeout`, in microseconds; 0 is none."""
    timeout_us = value_of(parameters, "timeout", int, 0)
    if not 0 <= timeout_us < 1 << 53:
        raise RefusedError(400, "parameter timeout is a number of microseconds")
    return timeout_us / 1e6 or None


def _priority(parameters: Mapping[str, Any]) -> int:
    """Triton's request parameter `priority`: 1 goes first; 0 and none are the default."""
    priority = value_of(parameters, "priority", int, 0)
    if not 0 <= priority <= 1000:
        raise RefusedError(400, "parameter priority is a number from 1, the highest, to 1000")
    return priority or PRIORITY


def parameters_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a request, an input or an output. Raises RefusedError."""
    parameters: dict[str, Any] = value_of(tree, "parameters", dict, {})
    if "shared_memory_region" in parameters:
        raise RefusedError(400, "shared memory is not supported; send the tensors in the body")
    return parameters


def _list(tree: Mapping[str, Any], key: str) -> list[Any]:
    found: list[Any] = value_of(tree, key, list, [])
    return found


def value_of(tree: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    """`tree[key]`, which must be exactly of this type (a bool is no int); absent and null are the default. Raises RefusedError."""
    value = tree.get(key)
    if value is None:
        return default
    if type(value) is not kind:
        names = {dict: "an object", list: "a list", str: "a string", int: "an integer", bool: "true or false"}
        raise RefusedError(400, f"{key} is not {names[kind]}")
    return value


def _count(number: int) -> str:
    return str(number) if number < 1 << 53 else "more than can be sent"  # str() of a huge int raises


# --- encode -------------------------------------------------------------------------------------------------------


def encode(request: InferRequest, outputs: Mapping[str, NDArray[Any]], model: str, version: str, labels: Sequence[str]) -> tuple[bytes, dict[str, str]]:
    """Reply body and the headers that say how to read it; `model`, `version`: who answers. Raises RefusedError when JSON cannot carry an output."""
    blobs: list[bytes] = []
    entries = [_entry(wanted, outputs[wanted.name], labels, blobs) for wanted in request.wanted]
    head = reply_head(model, version, request.id, entries)
    if not any(wanted.binary for wanted in request.wanted):
        return head, {"Content-Type": "application/json"}
    return b"".join([head, *blobs]), {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}


def reply_head(model: str, version: str, id: str | None, entries: Sequence[Mapping[str, Any]]) -> bytes:
    """The JSON of a reply."""
    tree = {"model_name": model, "model_version": version, "outputs": entries}
    return dump({"id": id, **tree} if id is not None else tree)


def binary_entry(name: str, dtype: str, shape: Sequence[int], size: int) -> dict[str, Any]:
    """An output whose bytes follow the JSON."""
    return {"name": name, "datatype": DATATYPES[dtype].name, "shape": list(shape), "parameters": {"binary_data_size": size}}


def _entry(wanted: Wanted, values: NDArray[Any], labels: Sequence[str], blobs: list[bytes]) -> dict[str, Any]:
    datatype = DATATYPES[values.dtype.name]
    if wanted.classes:
        return classes(wanted, values, labels, blobs)
    entry: dict[str, Any] = {"name": wanted.name, "datatype": datatype.name, "shape": list(values.shape)}
    if wanted.binary:
        blobs.append(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
        return {**entry, "parameters": {"binary_data_size": len(blobs[-1])}}
    if not datatype.kinds:
        raise RefusedError(400, f"output {wanted.name!r}: {datatype.name} has no JSON form; ask for binary_data")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise RefusedError(400, f"output {wanted.name!r} is not finite for these inputs, and JSON has no form for that; ask for binary_data")
    return {**entry, "data": values.ravel().tolist()}


def classes(wanted: Wanted, values: NDArray[Any], labels: Sequence[str], blobs: list[bytes]) -> dict[str, Any]:
    """Triton's classification extension: BYTES of shape [batch, classes], best first."""
    rows = values.reshape(len(values), -1)
    if rows.dtype.kind != "f":  # what has no sign cannot be turned round
        rows = rows.astype(np.float64)
    count = min(wanted.classes, rows.shape[1])
    best = np.argsort(-rows, axis=1, kind="stable")[:, :count]
    named = [f":{label}" for label in labels] if len(labels) == rows.shape[1] else [""] * rows.shape[1]
    texts = [f"{row[index]:f}:{index}{named[index]}" for row, top in zip(rows, best, strict=True) for index in top]
    entry = {"name": wanted.name, "datatype": "BYTES", "shape": [len(rows), count]}
    if not wanted.binary:
        return {**entry, "data": texts}
    blobs.append(b"".join(struct.pack("<I", len(text)) + text for text in map(str.encode, texts)))
    return {**entry, "parameters": {"binary_data_size": len(blobs[-1])}}


def compress(accepted: str, headers: dict[str, str], body: bytes) -> tuple[dict[str, str], bytes]:
    """gzip or deflate where the client names it. Inference-Header-Content-Length stays that of the uncompressed JSON."""
    names = [name.strip().lower() for name in accepted.split(",")]
    encoding = next((name for name in ("gzip", "deflate") if name in names), None)
    if encoding is None or len(body) < _COMPRESS_BYTES:
        return headers, body
    deflater = zlib.compressobj(1, wbits=31 if encoding == "gzip" else 15)
    return {**headers, "Content-Encoding": encoding}, deflater.compress(body) + deflater.flush()


def dump(value: Any) -> bytes:
    """Compact JSON. Raises ValueError for NaN and infinity."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
