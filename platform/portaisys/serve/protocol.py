"""Open Inference Protocol V2 over HTTP: bytes in, named arrays to the model, bytes out.

https://github.com/kserve/open-inference-protocol, with the binary tensor and classification extensions of
https://github.com/triton-inference-server/server/tree/main/docs/protocol. What the written spec leaves open follows
the clients (tritonclient, KServe, perf_analyzer).

Knows neither Ray nor a web framework: `handle` is a function of a request. What a client got wrong is a 4xx whose
body is `{"error": ...}`; no message repeats what the client sent, nor names a path or an address of ours.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import struct
import time
import zlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

import portaisys
from portaisys import registry
from portaisys.engine import Tensor
from portaisys.serve.batcher import PRIORITY, ClosedError, EngineFailedError, Outputs, QueueFullError, TooManySamplesError
from portaisys.serve.keys import ForbiddenError, Keys
from portaisys.serve.model import BlockedError, ServedModel
from portaisys.serve.openapi import openapi
from portaisys.serve.repository import Repository, UnknownModelError
from portaisys.spec import UserError

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 << 20
# A JSON text can take 24 times its length in memory once parsed ("[{},{},..."), so its limit is lower.
MAX_JSON_BYTES = 16 << 20
IN_THREAD_BYTES = 256 << 10  # decoding more than this (about 2 ms) would hold up everybody else's requests
_COMPRESS_BYTES = 1024  # below, gzip costs more than it saves

_HEADER_LENGTH = "inference-header-content-length"
LINEAGE = "X-Portaisys-Lineage"
_EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "statistics", "model_repository", "lineage"]


@dataclass(frozen=True)
class _Datatype:
    """`kinds`, `typecode`: the Python types a JSON element may have and the array that holds them; none: no JSON form."""

    name: str
    typecode: str
    kinds: frozenset[type]


_BOOL, _INT, _REAL = frozenset({bool}), frozenset({int}), frozenset({int, float})
_DATATYPES = {
    "bool": _Datatype("BOOL", "b", _BOOL),
    "uint8": _Datatype("UINT8", "B", _INT),
    "uint16": _Datatype("UINT16", "H", _INT),
    "uint32": _Datatype("UINT32", "I", _INT),
    "uint64": _Datatype("UINT64", "Q", _INT),
    "int8": _Datatype("INT8", "b", _INT),
    "int16": _Datatype("INT16", "h", _INT),
    "int32": _Datatype("INT32", "i", _INT),
    "int64": _Datatype("INT64", "q", _INT),
    "float16": _Datatype("FP16", "", frozenset()),
    "float32": _Datatype("FP32", "f", _REAL),
    "float64": _Datatype("FP64", "d", _REAL),
}


class RefusedError(Exception):
    """A request that gets an error reply; the message is for the client, `reason` tells alike statuses apart."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.reason = reason


@dataclass(frozen=True)
class Response:
    """A whole HTTP reply."""

    status: int
    headers: Mapping[str, str]
    body: bytes


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
class _Call:
    method: str
    headers: Mapping[str, str]
    body: bytes


# --- dispatch -----------------------------------------------------------------------------------------------------


async def handle(method: str, path: str, headers: Mapping[str, str], body: bytes, models: Repository, keys: Keys | None = None) -> Response:
    """Answer one request. `path`: percent-decoded, without the query; `keys`: None asks for none. Raises nothing but cancellation."""
    call, parts = _Call(method, {name.lower(): value for name, value in headers.items()}, body), path.split("/")[1:]
    try:
        if keys is not None:
            authorize(keys, call.headers, parts)
        return await _route(call, parts, models)
    except RefusedError as refused:
        return error(refused.status, str(refused), refused.headers)
    except UnknownModelError as unknown:
        return error(404, str(unknown))
    except Exception:
        logger.exception("internal error")
        return error(500, "internal error; the server's log has the cause")


def authorize(keys: Keys, headers: Mapping[str, str], parts: Sequence[str]) -> None:
    """Raises RefusedError (401, 403) unless the key in `headers` may ask for this path; health is for everybody."""
    if parts in (["v2", "health", "live"], ["v2", "health", "ready"]):
        return
    # Whoever asks of all models at once needs a key for all.
    model = {"stats": "*"}.get(parts[2], parts[2]) if parts[:2] == ["v2", "models"] and len(parts) > 2 else None
    try:
        keys.check(headers, model, admin=parts[:2] == ["v2", "repository"])
    except ForbiddenError as forbidden:
        raise refused_key(forbidden) from None


def refused_key(forbidden: ForbiddenError) -> RefusedError:
    """How a key that does not do is answered."""
    return RefusedError(403, str(forbidden), reason="key") if forbidden.known else RefusedError(401, str(forbidden), {"WWW-Authenticate": "Bearer"}, "key")


def error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error reply as every client expects it."""
    return _json({"error": message}, status, headers)


async def _route(call: _Call, parts: Sequence[str], models: Repository) -> Response:
    match parts:
        case ["v2"]:
            return _get(call, {**server_metadata(), "ports": models.ports})
        case ["v2", "health", "live"]:
            return _get(call, {"live": True})
        case ["v2", "health", "ready"]:
            return _ready(call, models)
        case ["v2", "openapi.json"]:
            return _get(call, openapi(portaisys.__version__))
        case ["v2", "models", "stats"]:
            return _get(call, {"model_stats": [statistics(model) for model in models.all()]})
        case ["v2", "repository", "index"]:
            return _index(call, models)
        case ["v2", "repository", "models", name, ("load" | "unload") as action]:
            return await _change(call, models, name, action)
        case ["v2", "models", name, "versions", version, *action] if len(action) < 2:
            return await _infer(call, models, name, version) if action == ["infer"] else await _act(call, models, name, version, *action)
        case ["v2", "models", name, *action] if len(action) < 2:
            return await _infer(call, models, name, None) if action == ["infer"] else await _act(call, models, name, None, *action)
    raise RefusedError(404, "no such route; the protocol's are below the path v2")


async def wake(models: Repository, name: str) -> None:
    """Have a model that left memory back, which takes as long as loading it. Raises RefusedError (503) when it cannot be loaded any more."""
    try:
        await models.wake(name)
    except UserError:
        logger.exception("%s cannot be loaded again", name)
        raise RefusedError(
            503, "the model had left memory and cannot be loaded again now; the server's log has the cause", {"Retry-After": "5"}
        ) from None


async def _act(call: _Call, models: Repository, name: str, version: str | None, action: str | None = None) -> Response:
    await wake(models, name)
    model = models.pick(name, version)
    match action:
        case None:
            return _get(call, metadata(model, models.versions(model.name)))
        case "ready":
            return _ready(call, model)
        case "config":
            return _get(call, config(model))
        case "stats":
            return _get(call, {"model_stats": [statistics(model)]})
        case "lineage":
            return _get(call, {**model.lineage, "ladder": model.ladder.status()} if model.ladder else model.lineage)
        case "traffic":
            return _get(call, models.status(model.name))
    raise RefusedError(404, "no such route; a model has ready, config, stats, lineage, traffic and infer")


def _get(call: _Call, value: Any) -> Response:
    if call.method != "GET":
        raise RefusedError(405, "this route answers GET", {"Allow": "GET"})
    return _json(value)


def _post(call: _Call) -> dict[str, Any]:
    """The JSON of a request that changes or lists the repository; nothing is an empty object."""
    if call.method != "POST":
        raise RefusedError(405, "this route answers POST", {"Allow": "POST"})
    return _parse(memoryview(_inflate(call.headers.get("content-encoding", "identity"), call.body))) if call.body else {}


def _ready(call: _Call, whom: ServedModel | Repository) -> Response:
    reply = _get(call, {"ready": True})
    if not whom.ready:
        raise RefusedError(503, "not ready", {"Retry-After": "1"})
    return reply


def _index(call: _Call, models: Repository) -> Response:
    ready = _value(_post(call), "ready", bool, False)
    return _json([row for row in models.index() if not ready or row["state"] == "READY"])


async def _change(call: _Call, models: Repository, name: str, action: str) -> Response:
    """Load NAME (parameter `reference`: which of its versions, "production" by default) or unload it (`version`: only this one)."""
    await models.whole(change(models, name, action, _parameters(_post(call))))
    return _json({})


async def change(models: Repository, name: str, action: str, parameters: Mapping[str, Any], *, spread: bool = True) -> None:
    """Load or unload, as both protocols ask for it, here and, with `spread`, wherever else the models are.

    Raises RefusedError (400; 409 for what its gate did not pass; 503 when not all replicas did it) or UnknownModelError.
    """
    if not re.fullmatch("[a-z0-9][a-z0-9_-]{0,62}", name):
        raise RefusedError(400, "a model's name is of small letters, digits, - and _, at most 63")
    if action == "unload":
        try:
            await models.unload(name, _value(parameters, "version", str, None))
        except UnknownModelError:
            if not spread or name not in models.untold:  # else it is done here, and asked again for those that have not
                raise
        if spread:
            await _spread(models, name, action, parameters)
        return
    which = _value(parameters, "reference", str, "production")
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.,:-]{0,100}", which):
        raise RefusedError(400, "parameter reference is an alias, a number, numbers with commas, latest, latest:N or all")
    try:
        await models.load(f"{name}@{which}")
    except BlockedError as blocked:
        raise RefusedError(409, str(blocked)) from None
    except (registry.UnreachableError, registry.RefusedError):  # which name its address or folder
        logger.exception("%s@%s cannot be looked up", name, which)
        raise RefusedError(503, "the registry cannot be asked now; the server's log has the cause", {"Retry-After": "5"}) from None
    except UserError as problem:
        raise RefusedError(400, str(problem)) from None
    if spread:
        await _spread(models, name, action, parameters)


async def _spread(models: Repository, name: str, action: str, parameters: Mapping[str, Any]) -> None:
    try:
        await models.spread(name, action, parameters)
    except UserError as problem:
        raise RefusedError(503, str(problem), {"Retry-After": "5"}) from None


async def _infer(call: _Call, models: Repository, name: str, version: str | None) -> Response:
    model, request = await _decoded(call, models, name, version)
    outputs = await run(model, request, models)
    begun = time.perf_counter()
    body, headers = encode(request, outputs, model)
    reply = Response(200, *_compress(call.headers.get("accept-encoding", ""), headers, body))
    model.spent("deliver", time.perf_counter() - begun)
    return reply


async def _decoded(call: _Call, models: Repository, name: str, version: str | None) -> tuple[ServedModel, InferRequest]:
    while True:
        await wake(models, name)
        model = models.pick(name, version, call.headers)
        if call.method != "POST":
            raise RefusedError(405, "this route answers POST", {"Allow": "POST"})
        if not model.ready:
            raise RefusedError(503, "the model is not ready", {"Retry-After": "1"})
        arguments, begun = (call.headers, call.body, model.inputs, model.outputs), time.perf_counter()
        short = len(call.body) < IN_THREAD_BYTES and "content-encoding" not in call.headers
        request = decode(*arguments) if short else await asyncio.to_thread(decode, *arguments)
        if not model.closed:  # else another version took its place while a thread decoded
            model.spent("decode", time.perf_counter() - begun)
            return model, request


async def run(model: ServedModel, request: InferRequest, models: Repository) -> Outputs:
    """Outputs of a decoded request; a shadow is asked too. Raises RefusedError with the status that says why there are none."""
    try:
        async with asyncio.timeout(request.timeout_s):
            watching: list[Callable[[Outputs], None] | None] = []  # the shadow, asked what is run only
            outputs = await model.batcher.submit(request.feeds, request.priority, lambda: watching.append(models.watched(model, request.feeds)))
            if watching[0] is not None:
                watching[0](outputs)
            return outputs
    except (QueueFullError, TimeoutError, ClosedError, TooManySamplesError, EngineFailedError) as problem:
        raise refusal(model, problem) from None


def refusal(model: ServedModel, problem: Exception) -> RefusedError:
    """What a client is told when its request was not run or not answered; counted by reason."""
    match problem:
        case QueueFullError():
            model.stats.reject("queue_full")
            return RefusedError(503, str(problem), {"Retry-After": str(problem.retry_after_s)}, "queue_full")
        case TimeoutError():
            model.stats.reject("timeout")
            return RefusedError(503, "not answered within the request's timeout", {"Retry-After": "1"}, "timeout")
        case ClosedError():
            model.stats.reject("unloading")
            return RefusedError(503, str(problem), {"Retry-After": "1"})
        case TooManySamplesError():
            model.stats.reject("too_large")
            return RefusedError(400, str(problem))
    logger.error("%s: %s", model.name, problem, exc_info=problem.__cause__ or problem)
    return RefusedError(500, str(problem) if isinstance(problem, EngineFailedError) else "internal error; the server's log has the cause")


# --- what a model says of itself ----------------------------------------------------------------------------------


def server_metadata() -> dict[str, Any]:
    """Name, version and extensions of this server."""
    return {"name": "portaisys", "version": portaisys.__version__, "extensions": _EXTENSIONS}


def statistics(model: ServedModel) -> dict[str, Any]:
    """Triton's statistics of a version: counts and nanoseconds since it was loaded. inference_count: samples; execution_count: batches."""
    stats = model.stats
    hits, misses = (model.recall.hits, model.recall.misses) if model.recall else (0, 0)
    right, failed = stats.requests - stats.failed_requests + hits, stats.failed_requests + sum(stats.rejected.values())
    whole = stats.decode_s + stats.queue_s + stats.assembly_s + stats.engine_s + stats.deliver_s
    parts = {
        "queue": stats.queue_s,
        "compute_input": stats.decode_s + stats.assembly_s,
        "compute_infer": stats.engine_s,
        "compute_output": stats.deliver_s,
    }
    return {
        "name": model.name, "version": model.version, "last_inference": int(stats.last * 1e3), "inference_count": stats.samples, "execution_count": stats.batches,
        "inference_stats": {
            "success": _spent(right, whole), "fail": _spent(failed, 0), **{name: _spent(stats.requests, seconds) for name, seconds in parts.items()},
            "cache_hit": _spent(hits, 0), "cache_miss": _spent(misses, 0),
        },
        "batch_stats": [{"batch_size": size, "compute_infer": _spent(count, seconds)} for size, (count, seconds) in sorted(stats.by_size.items())],
    }  # fmt: skip


def _spent(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": round(seconds * 1e9)}


def metadata(model: ServedModel, versions: Sequence[str]) -> dict[str, Any]:
    """Name, versions, inputs and outputs; the labels stand in the parameters of the output that scores them."""
    outputs = [{**_describe(tensor), "parameters": {"labels": list(model.labels)}} for tensor in model.outputs]
    return {
        "name": model.name, "versions": list(versions), "platform": f"portaisys_{model.engine.backend}",
        "inputs": [_describe(tensor) for tensor in model.inputs], "outputs": outputs,
    }  # fmt: skip


def config(model: ServedModel) -> dict[str, Any]:
    """The subset of Triton's model configuration that perf_analyzer reads."""
    return {
        "name": model.name, "platform": f"portaisys_{model.engine.backend}", "backend": model.engine.backend,
        "max_batch_size": model.batcher.max_batch, "dynamic_batching": {},
        "input": [_configure(tensor) for tensor in model.inputs], "output": [_configure(tensor) for tensor in model.outputs],
    }  # fmt: skip


def _describe(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": _DATATYPES[tensor.dtype].name, "shape": list(tensor.shape)}


def _configure(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "data_type": f"TYPE_{_DATATYPES[tensor.dtype].name}", "dims": list(tensor.shape[1:])}


# --- decode -------------------------------------------------------------------------------------------------------


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


def decode(headers: Mapping[str, str], body: bytes, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> InferRequest:
    """Body to named arrays. `headers`: lower-case names. Raises RefusedError (400; 413 for a body over the limit)."""
    view = memoryview(_inflate(headers.get("content-encoding", "identity"), body))
    json_bytes = _header_length(headers.get(_HEADER_LENGTH), len(view))
    if json_bytes == 0:
        return _decode_raw(view, inputs, outputs)
    head = head_of(view[:json_bytes], inputs, outputs)
    return InferRequest(feeds_of(head, view[json_bytes:], inputs), head.wanted, head.id, head.timeout_s, head.priority)


def head_of(view: memoryview, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Head:
    """The JSON of a request. Raises RefusedError."""
    return head_from(_parse(view), inputs, outputs)


def head_from(tree: Mapping[str, Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Head:
    """A request as a tree, which gRPC's messages are made into too. Raises RefusedError."""
    parameters = _parameters(tree)
    entries: dict[str, tuple[Tensor, tuple[int, ...], int | None, Any]] = {}
    for entry in _list(tree, "inputs"):
        tensor = _named(entry, inputs, "input", entries)
        entries[tensor.name] = tensor, _shape(entry, tensor), _value(_parameters(entry), "binary_data_size", int, None), entry.get("data")
    return Head(
        tuple(entries.values()), _wanted(_list(tree, "outputs"), outputs, binary=_value(parameters, "binary_data_output", bool, False)), _value(tree, "id", str, None),
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
    datatype = _DATATYPES[tensor.dtype].name
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
    if not _DATATYPES[tensor.dtype].kinds:
        raise RefusedError(400, f"input {tensor.name!r}: {_DATATYPES[tensor.dtype].name} has no JSON form; send it in binary")
    return from_elements(tensor, shape, _flatten(tensor, data, len(shape)))


def from_elements(tensor: Tensor, shape: tuple[int, ...], flat: Sequence[Any]) -> NDArray[Any]:
    """Row major elements as an array. An `array` refuses what numpy would convert or let grow: strings, objects, overflow. Raises RefusedError."""
    datatype = _DATATYPES[tensor.dtype]
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
        parameters = _parameters(entry)
        classes = _value(parameters, "classification", int, 0)
        if classes < 0:
            raise RefusedError(400, f"output {name!r}: classification is a number of classes")
        wanted[name] = Wanted(name, _value(parameters, "binary_data", bool, binary), classes)
    return list(wanted.values()) or [Wanted(output.name, binary) for output in outputs]


def _timeout_s(parameters: Mapping[str, Any]) -> float | None:
    """Triton's request parameter `timeout`, in microseconds; 0 is none."""
    timeout_us = _value(parameters, "timeout", int, 0)
    if not 0 <= timeout_us < 1 << 53:
        raise RefusedError(400, "parameter timeout is a number of microseconds")
    return timeout_us / 1e6 or None


def _priority(parameters: Mapping[str, Any]) -> int:
    """Triton's request parameter `priority`: 1 goes first; 0 and none are the default."""
    priority = _value(parameters, "priority", int, 0)
    if not 0 <= priority <= 1000:
        raise RefusedError(400, "parameter priority is a number from 1, the highest, to 1000")
    return priority or PRIORITY


def _parameters(tree: Mapping[str, Any]) -> dict[str, Any]:
    parameters: dict[str, Any] = _value(tree, "parameters", dict, {})
    if "shared_memory_region" in parameters:
        raise RefusedError(400, "shared memory is not supported; send the tensors in the body")
    return parameters


def _list(tree: Mapping[str, Any], key: str) -> list[Any]:
    found: list[Any] = _value(tree, key, list, [])
    return found


def _value(tree: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    """`tree[key]`, which must be exactly of this type (a bool is no int); absent and null are the default."""
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


def encode(request: InferRequest, outputs: Mapping[str, NDArray[Any]], model: ServedModel) -> tuple[bytes, dict[str, str]]:
    """Reply body and headers. Raises RefusedError when JSON cannot carry an output."""
    blobs: list[bytes] = []
    entries = [_entry(wanted, outputs[wanted.name], model.labels, blobs) for wanted in request.wanted]
    head = reply_head(model, request.id, entries)
    if not any(wanted.binary for wanted in request.wanted):
        return head, {"Content-Type": "application/json", LINEAGE: model.stamp}
    return b"".join([head, *blobs]), {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head)), LINEAGE: model.stamp}


def reply_head(model: ServedModel, id: str | None, entries: Sequence[Mapping[str, Any]]) -> bytes:
    """The JSON of a reply."""
    tree = {"model_name": model.name, "model_version": model.version, "outputs": entries}
    return _dump({"id": id, **tree} if id is not None else tree)


def binary_entry(name: str, dtype: str, shape: Sequence[int], size: int) -> dict[str, Any]:
    """An output whose bytes follow the JSON."""
    return {"name": name, "datatype": _DATATYPES[dtype].name, "shape": list(shape), "parameters": {"binary_data_size": size}}


def _entry(wanted: Wanted, values: NDArray[Any], labels: Sequence[str], blobs: list[bytes]) -> dict[str, Any]:
    datatype = _DATATYPES[values.dtype.name]
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


def _compress(accepted: str, headers: dict[str, str], body: bytes) -> tuple[dict[str, str], bytes]:
    """gzip or deflate where the client names it. Inference-Header-Content-Length stays that of the uncompressed JSON."""
    names = [name.strip().lower() for name in accepted.split(",")]
    encoding = next((name for name in ("gzip", "deflate") if name in names), None)
    if encoding is None or len(body) < _COMPRESS_BYTES:
        return headers, body
    deflater = zlib.compressobj(1, wbits=31 if encoding == "gzip" else 15)
    return {**headers, "Content-Encoding": encoding}, deflater.compress(body) + deflater.flush()


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(status, {"Content-Type": "application/json", **(headers or {})}, _dump(value))


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
