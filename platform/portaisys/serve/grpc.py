"""The gRPC port: `inference.GRPCInferenceService` and `grpc.health.v1.Health` on the replica's loop, over the models and batchers of HTTP.

Messages are the Open Inference Protocol's (inference.proto, compiled into inference.binpb) in a descriptor pool of our own, so that a
client's generated classes of the same names may live in this process. What a request means is checked by codec.py and refused in
its words. A raw inference request goes from its bytes to the batcher unparsed where its head was met before. Knows no Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray

from portaisys.engine import Tensor
from portaisys.serve import codec, protocol
from portaisys.serve.batcher import Outputs
from portaisys.serve.codec import Head, InferRequest, RefusedError, Wanted
from portaisys.serve.keys import ForbiddenError, Keys
from portaisys.serve.model import ServedModel
from portaisys.serve.repository import Repository, RestingError, UnknownModelError

logger = logging.getLogger(__name__)

SERVICE, HEALTH = "inference.GRPCInferenceService", "grpc.health.v1.Health"
REMEMBERED = 1024  # heads; beyond that all are forgotten, which costs each one parse
MOST_HEAD = 4096
STREAM_WAITING = 128  # requests of one stream that are read and not answered; the next ones wait at the client
WATCH_S = 0.5  # between looks at a watched service: that an engine hangs is told by nobody
LINEAGE = protocol.LINEAGE.lower()

_OPTIONS = (
    ("grpc.max_receive_message_length", codec.MAX_BODY_BYTES),
    ("grpc.max_send_message_length", -1),  # what a batch within the limit gives may be larger than it
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.server_handshake_timeout_ms", 20_000),
    # A peer that vanished is noticed within 80 s; clients may ping every 10 s.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # Calls that came and were not taken up yet. By default gRPC ends some at random beyond 1,000, as CANCELLED, those of others that gave
    # up already counted too: a client that cancels a lot on a busy server would end the calls of the others. Not many more: each holds about
    # 16 KB, and at 65,536 clients that did nothing but cancel drove a replica to 1.4 GB.
    ("grpc.server.max_pending_requests", 1 << 12),
    ("grpc.server.max_pending_requests_hard_limit", 1 << 13),
)
_CONCURRENT = 4096  # calls at once, as connections of the data port

# HTTP's statuses as gRPC's; a reason is more exact where there is one.
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT, 401: grpc.StatusCode.UNAUTHENTICATED, 403: grpc.StatusCode.PERMISSION_DENIED, 404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.FAILED_PRECONDITION, 413: grpc.StatusCode.INVALID_ARGUMENT, 500: grpc.StatusCode.INTERNAL, 501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE, "queue_full": grpc.StatusCode.RESOURCE_EXHAUSTED, "timeout": grpc.StatusCode.DEADLINE_EXCEEDED,
}  # fmt: skip
# Which field of InferTensorContents holds a datatype; FP16 has none.
_CONTENTS = {
    "bool": "bool_contents", "uint8": "uint_contents", "uint16": "uint_contents", "uint32": "uint_contents", "uint64": "uint64_contents",
    "int8": "int_contents", "int16": "int_contents", "int32": "int_contents", "int64": "int64_contents", "float32": "fp32_contents", "float64": "fp64_contents",
}  # fmt: skip


def _pool() -> Any:
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(Path(__file__).with_name("inference.binpb").read_bytes()).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


_POOL = _pool()


def message(name: str) -> Any:
    """The class of a message by its full name."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(name))


_INFER, _REPLY, _STREAMED = message("inference.ModelInferRequest"), message("inference.ModelInferResponse"), message("inference.ModelStreamInferResponse")
_CHECK, _STATUS = message("grpc.health.v1.HealthCheckRequest"), message("grpc.health.v1.HealthCheckResponse")
# Serialized fields of those messages begin with these bytes: number << 3 | 2 (bytes).
_NAME, _VERSION, _ID, _RAW_IN, _RAW_OUT, _STREAMED_REPLY = 0x0A, 0x12, 0x1A, 0x3A, 0x32, 0x12
_HEAD = frozenset({_NAME, _VERSION, _ID, 0x22, 0x2A, 0x32})  # parameters, inputs and outputs, beside the three


class GrpcPort:
    """A listening gRPC port of one loop. `count`: told the HTTP status that goes with every answer; `keys`: None asks for none."""

    def __init__(self, models: Repository, count: Callable[[int], None] = lambda status: None, keys: Keys | None = None) -> None:
        self.models, self.count, self.keys = models, count, keys
        self.lane = Lane(models, keys)
        self._server: Any = None
        self._leaving = asyncio.Event()
        self._takers: set[asyncio.Task[None]] = set()

    async def listen(self, host: str, port: int, *, shared: bool = False, tls: tuple[bytes, bytes] | None = None) -> int:
        """Begin to answer; returns the port number. `tls`: key and certificate, PEM. Raises OSError when the address cannot be had."""
        self._server = grpc.aio.server(options=(*_OPTIONS, ("grpc.so_reuseport", int(shared))), maximum_concurrent_rpcs=_CONCURRENT)
        self._server.add_generic_rpc_handlers((_Handlers(self._methods()),))
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            number = self._server.add_insecure_port(address) if tls is None else self._server.add_secure_port(address, grpc.ssl_server_credentials([tls]))
        except RuntimeError:
            self._server = None
            raise OSError("the address is taken or is none of this machine's") from None
        await self._server.start()
        return int(number)

    async def drain(self, timeout_s: float = 30.0) -> None:
        """Take no new calls, end watches and streams once what was read of them is answered, and finish what is under way."""
        self._leaving.set()
        for taker in self._takers:
            taker.cancel()
        if self._server is not None:
            await self._server.stop(timeout_s)

    def _methods(self) -> dict[str, Any]:
        """Path -> handler. All take and give bytes: the usual request needs no parser."""
        says = {f"/{SERVICE}/{name}": self._unary(self._saying(name, say)) for name, say in _SAYS.items()}
        return {
            **says,
            f"/{SERVICE}/RepositoryModelLoad": self._unary(self._changing("load")),
            f"/{SERVICE}/RepositoryModelUnload": self._unary(self._changing("unload")),
            f"/{SERVICE}/ModelInfer": self._unary(self._infer),
            f"/{SERVICE}/ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._stream),
            f"/{HEALTH}/Check": self._unary(self._check),
            f"/{HEALTH}/Watch": grpc.unary_stream_rpc_method_handler(self._watch),
        }

    def _unary(self, act: Callable[[bytes, Any], Awaitable[bytes]]) -> Any:
        """A handler whose refusals become statuses. Cancellation, by the client or its deadline, passes through `act`."""

        async def handle(body: bytes, context: Any) -> bytes:
            try:
                reply = await act(body, context)
            except Exception as problem:
                await self._abort(context, problem)
                raise
            self.count(200)
            return reply

        return grpc.unary_unary_rpc_method_handler(handle)

    async def _abort(self, context: Any, problem: Exception) -> None:
        refused = _refused(problem)
        self.count(refused.status)
        told = [(name.lower(), value) for name, value in refused.headers.items()]
        await context.abort(_code(refused), str(refused), (*told, *_identified(_headers(context))))

    # --- what a server says of itself ---------------------------------------------------------------------------------

    def _saying(self, method: str, say: Callable[[Repository, Any], Any]) -> Callable[[bytes, Any], Awaitable[bytes]]:
        request, response = message(f"inference.{method}Request"), message(f"inference.{method}Response")

        async def answer(body: bytes, context: Any) -> bytes:
            asked = _parsed(request, body)
            if self.keys is not None and method not in _FOR_EVERYBODY:
                self.keys.check(_headers(context), _asked_of(method, asked), admin=method == "RepositoryIndex")
            if method.startswith("Model") and asked.name:
                await protocol.wake(self.models, asked.name)
            tree = say(self.models, asked)
            return bytes(json_format.ParseDict(tree, response(), ignore_unknown_fields=True).SerializeToString())

        return answer

    def _changing(self, action: str) -> Callable[[bytes, Any], Awaitable[bytes]]:
        request = message(f"inference.RepositoryModel{action.capitalize()}Request")

        async def answer(body: bytes, context: Any) -> bytes:
            asked = _parsed(request, body)
            if self.keys is not None:
                self.keys.check(_headers(context), asked.model_name, admin=True)
            await self.models.whole(protocol.change(self.models, asked.model_name, action, _values(asked.parameters)))
            return b""

        return answer

    async def _check(self, body: bytes, context: Any) -> bytes:
        service = _parsed(_CHECK, body).service
        self._may_watch(service, context)
        status = self._health(service)
        if status == "SERVICE_UNKNOWN":
            raise RefusedError(404, f"unknown service; there are {SERVICE}, the names of models, and the empty one for all of them")
        return bytes(_STATUS(status=status).SerializeToString())

    async def _watch(self, body: bytes, context: Any) -> None:
        try:
            service = _parsed(_CHECK, body).service
            self._may_watch(service, context)
        except (RefusedError, ForbiddenError) as refused:
            await self._abort(context, refused)
        said = ""
        while said != (status := self._health(service)) or not self._leaving.is_set():
            if status != said:
                await context.write(_STATUS(status=status).SerializeToString())
                said = status
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), WATCH_S)

    def _may_watch(self, service: str, context: Any) -> None:
        """The health of the server is for everybody, a model's for those who may ask it."""
        if self.keys is not None and service not in ("", SERVICE):
            self.keys.check(_headers(context), service)

    def _health(self, service: str) -> str:
        if service in ("", SERVICE):
            return "SERVING" if self.models.ready and not self._leaving.is_set() else "NOT_SERVING"
        models = [model for model in self.models.all() if model.name == service]
        if not models and not self.models.rests(service):  # one that rests answers: whoever asks it wakes it
            return "SERVICE_UNKNOWN"
        return "SERVING" if all(model.ready for model in models) and not self._leaving.is_set() else "NOT_SERVING"

    # --- inference ----------------------------------------------------------------------------------------------------

    async def _infer(self, body: bytes, context: Any) -> bytes:
        headers = _headers(context)
        reply, model = await self.lane.answer(body, headers, context.time_remaining())
        context.set_trailing_metadata(((LINEAGE, model.stamp), *_identified(headers)))
        return reply

    async def _stream(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """Answers in the order of the requests, which wait for the engine together."""
        headers, room = _headers(context), asyncio.Semaphore(STREAM_WAITING)
        answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
        async with asyncio.TaskGroup() as group:
            taker = group.create_task(self._take(requests, headers, room, answers, group))
            self._takers.add(taker)
            taker.add_done_callback(self._takers.discard)
            while (answer := await answers.get()) is not None:
                await context.write(await answer)
                room.release()
        if self._leaving.is_set():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is leaving; open the stream again")

    async def _take(self, requests: AsyncIterator[bytes], headers: Mapping[str, str], room: asyncio.Semaphore, answers: asyncio.Queue[Any], group: asyncio.TaskGroup) -> None:
        try:
            await room.acquire()
            async for body in requests:
                answers.put_nowait(group.create_task(self._streamed(body, headers)))
                await room.acquire()
        finally:
            answers.put_nowait(None)

    async def _streamed(self, body: bytes, headers: Mapping[str, str]) -> bytes:
        """A message of the stream; a refusal is one too, with the id of what is refused."""
        try:
            reply, _ = await self.lane.answer(body, headers, None)
        except Exception as problem:
            refused = _refused(problem)
            self.count(refused.status)
            return bytes(_STREAMED(error_message=str(refused), infer_response={"id": _id_of(body)}).SerializeToString())
        self.count(200)
        return _field(_STREAMED_REPLY, len(reply)) + reply


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Handlers by path."""

    def __init__(self, handlers: Mapping[str, Any]) -> None:
        self._handlers = handlers

    def service(self, details: Any) -> Any:
        return self._handlers.get(details.method)


# --- what a server says of itself -----------------------------------------------------------------------------------


def _server_ready(models: Repository, asked: Any) -> dict[str, Any]:
    return {"ready": models.ready}


def _model_ready(models: Repository, asked: Any) -> dict[str, Any]:
    """As Triton does, a model that is not here is not ready, which is no error."""
    try:
        return {"ready": _picked(models, asked).ready}
    except UnknownModelError:
        return {"ready": False}


def _metadata(models: Repository, asked: Any) -> dict[str, Any]:
    model = _picked(models, asked)
    return protocol.metadata(model, models.versions(model.name))


def _statistics(models: Repository, asked: Any) -> dict[str, Any]:
    chosen = [_picked(models, asked)] if asked.name else models.all()
    return {"model_stats": [protocol.statistics(model) for model in chosen]}


def _picked(models: Repository, asked: Any) -> ServedModel:
    return models.pick(asked.name, asked.version or None)


_FOR_EVERYBODY = ("ServerLive", "ServerReady")


def _asked_of(method: str, asked: Any) -> str | None:
    """The model that a key must be for; whoever asks of all at once needs a key for all."""
    return (asked.name or "*") if method.startswith("Model") else None


# Method -> its answer as a tree, which protobuf makes into the message.
_SAYS: dict[str, Callable[[Repository, Any], Any]] = {
    "ServerLive": lambda models, asked: {"live": True},
    "ServerReady": _server_ready,
    "ServerMetadata": lambda models, asked: protocol.server_metadata(),
    "ModelReady": _model_ready,
    "ModelMetadata": _metadata,
    "ModelConfig": lambda models, asked: {"config": protocol.config(_picked(models, asked))},
    "ModelStatistics": _statistics,
    "RepositoryIndex": lambda models, asked: {"models": [row for row in models.index() if not asked.ready or row["state"] == "READY"]},
}


# --- refusals -------------------------------------------------------------------------------------------------------


def _refused(problem: Exception) -> RefusedError:
    """What a client is told; the log has the cause of what is our fault."""
    match problem:
        case RefusedError():
            return problem
        case ForbiddenError():
            return protocol.refused_key(problem)
        case UnknownModelError():
            return RefusedError(404, str(problem))
    logger.error("internal error", exc_info=problem)
    return RefusedError(500, "internal error; the server's log has the cause")


def _code(refused: RefusedError) -> grpc.StatusCode:
    return _CODES.get(refused.reason) or _CODES.get(refused.status, grpc.StatusCode.UNKNOWN)


def _headers(context: Any) -> dict[str, str]:
    return {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}


def _identified(headers: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The client's id of the request, to be sent back."""
    request_id = headers.get("x-request-id", "")
    return (("x-request-id", request_id),) if request_id and request_id.isprintable() and request_id.isascii() and len(request_id) <= 128 else ()


# --- from bytes to arrays and back ----------------------------------------------------------------------------------


@dataclass(eq=False)
class Known:
    """What the head of a request, all but its id and raw tensors, means for one model. `replies`: head of the reply and of every output, by the outputs' shapes."""

    model: ServedModel
    head: Head
    replies: dict[tuple[tuple[int, ...], ...], tuple[bytes, list[bytes]]] = field(default_factory=dict)

    def feeds(self, blobs: Sequence[memoryview]) -> dict[str, NDArray[Any]]:
        """The inputs: views into `blobs`, one an input, or the head's own contents where there are none. Raises RefusedError."""
        entries = self.head.entries
        if blobs:
            if len(blobs) != len(entries):
                raise RefusedError(400, f"{len(blobs)} raw_input_contents for {len(entries)} inputs; give one an input, in their order")
            feeds = {tensor.name: codec.from_binary(tensor, shape, blob) for (tensor, shape, _, _), blob in zip(entries, blobs, strict=True)}
        else:
            feeds = {tensor.name: _from_contents(tensor, shape, contents) for tensor, shape, _, contents in entries}
        codec.complete(feeds, self.model.inputs)
        return feeds

    def reply(self, outputs: Outputs, id_field: bytes) -> bytes:
        """A ModelInferResponse; outputs are always raw."""
        wanted = self.head.wanted
        arrays = [outputs[one.name] for one in wanted]
        if any([one.classes for one in wanted]):
            return self._classified(arrays, id_field)
        shapes = tuple([array.shape for array in arrays])
        known = self.replies.get(shapes)
        if known is None:
            entries = [codec.binary_entry(one.name, array.dtype.name, array.shape, array.nbytes) for one, array in zip(wanted, arrays, strict=True)]
            known = self.replies[shapes] = self._reply_head(entries), [_field(_RAW_OUT, array.nbytes) for array in arrays]
        parts: list[Any] = [known[0], id_field]
        for start, array in zip(known[1], arrays, strict=True):
            parts += start, array.data if array.flags.c_contiguous else np.ascontiguousarray(array).data
        return b"".join(parts)

    def _classified(self, arrays: Sequence[NDArray[Any]], id_field: bytes) -> bytes:
        entries: list[Mapping[str, Any]] = []
        blobs: list[bytes] = []
        for one, array in zip(self.head.wanted, arrays, strict=True):
            if one.classes:
                entries.append(codec.classes(Wanted(one.name, True, one.classes), array, self.model.labels, blobs))
            else:
                entries.append(codec.binary_entry(one.name, array.dtype.name, array.shape, array.nbytes))
                blobs.append(array.tobytes())
        return b"".join([self._reply_head(entries), id_field, *[part for blob in blobs for part in (_field(_RAW_OUT, len(blob)), blob)]])

    def _reply_head(self, entries: Sequence[Mapping[str, Any]]) -> bytes:
        outputs = [{key: entry[key] for key in ("name", "datatype", "shape")} for entry in entries]
        return bytes(_REPLY(model_name=self.model.name, model_version=self.model.version, outputs=outputs).SerializeToString())


class Lane:
    """Answers inference requests of both kinds of call; remembers their heads until the models change."""

    def __init__(self, models: Repository, keys: Keys | None = None) -> None:
        self._models, self._keys = models, keys
        self._known: dict[tuple[ServedModel, bytes], Known] = {}
        self._generation = -1

    async def answer(self, body: bytes, headers: Mapping[str, str], remaining_s: float | None) -> tuple[bytes, ServedModel]:
        """A serialized ModelInferResponse and who made it. `remaining_s`: until the call's deadline. Raises RefusedError or UnknownModelError."""
        known, id_field, feeds = await self._decoded(body, headers)
        model, head = known.model, known.head
        timeouts = [timeout_s for timeout_s in (head.timeout_s, remaining_s) if timeout_s is not None]
        outputs = await protocol.run(model, InferRequest(feeds, head.wanted, None, min(timeouts, default=None), head.priority), self._models)
        begun = time.perf_counter()
        reply = known.reply(outputs, id_field)
        model.spent("deliver", time.perf_counter() - begun)
        return reply, model

    async def _decoded(self, body: bytes, headers: Mapping[str, str]) -> tuple[Known, bytes, dict[str, NDArray[Any]]]:
        while True:
            begun = time.perf_counter()
            try:
                known, id_field, blobs = self._asked(body, headers)
            except RestingError as resting:
                await protocol.wake(self._models, resting.name)
                continue
            feeds = known.feeds(blobs) if len(body) < protocol.IN_THREAD_BYTES else await asyncio.to_thread(known.feeds, blobs)
            if not known.model.closed:  # else another version took its place while a thread decoded
                known.model.spent("decode", time.perf_counter() - begun)
                return known, id_field, feeds

    def _asked(self, body: bytes, headers: Mapping[str, str]) -> tuple[Known, bytes, Sequence[memoryview]]:
        if self._generation != self._models.generation:
            self._known.clear()
            self._generation = self._models.generation
        cut = _cut(body)
        if cut is None:
            asked = _parsed(_INFER, body)
            known = _learned(self._ready(asked.model_name, asked.model_version, headers), asked)
            return known, _field(_ID, len(asked.id.encode())) + asked.id.encode(), [memoryview(blob) for blob in asked.raw_input_contents]
        model = self._ready(cut.name, cut.version, headers)
        known = self._known.get((model, cut.head)) or self._learn(model, cut.head, body)
        return known, cut.id_field, cut.blobs

    def _ready(self, name: str, version: str, headers: Mapping[str, str]) -> ServedModel:
        if self._keys is not None:
            self._keys.check(headers, name)
        model = self._models.pick(name, version or None, headers)
        if not model.ready:
            raise RefusedError(503, "the model is not ready", {"Retry-After": "1"})
        return model

    def _learn(self, model: ServedModel, head: bytes, body: bytes) -> Known:
        known = _learned(model, _parsed(_INFER, body))
        if len(head) <= MOST_HEAD:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[model, head] = known
        return known


def _learned(model: ServedModel, asked: Any) -> Known:
    """A request's head as codec.py sees it."""
    inputs = [
        # No contents are None, not an empty message: that one would keep the whole request in memory for as long as its head is known.
        {"name": one.name, "datatype": one.datatype, "shape": list(one.shape), "parameters": _values(one.parameters), "data": one.contents if one.HasField("contents") else None}
        for one in asked.inputs
    ]
    if asked.raw_input_contents and any(one["data"] is not None for one in inputs):
        raise RefusedError(400, "contents and raw_input_contents exclude each other; send every input in one of them")
    outputs = [{"name": one.name, "parameters": _values(one.parameters)} for one in asked.outputs]
    tree = {"parameters": _values(asked.parameters), "inputs": inputs, "outputs": outputs}
    return Known(model, codec.head_from(tree, model.inputs, model.outputs))


def _from_contents(tensor: Tensor, shape: tuple[int, ...], contents: Any) -> NDArray[Any]:
    name = _CONTENTS.get(tensor.dtype)
    if name is None:
        raise RefusedError(400, f"input {tensor.name!r}: its datatype has no form in contents; send it in raw_input_contents")
    if contents is None:
        raise RefusedError(400, f"input {tensor.name!r} has neither contents nor raw_input_contents")
    if any(filled.name != name for filled, _ in contents.ListFields()):
        raise RefusedError(400, f"input {tensor.name!r}: contents of its datatype stand in {name} alone")
    return codec.from_elements(tensor, shape, getattr(contents, name))


def _parsed(kind: Any, body: bytes) -> Any:
    try:
        return kind.FromString(body)
    except DecodeError:
        raise RefusedError(400, f"the request is no {kind.DESCRIPTOR.name}") from None


def _values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as plain values, whichever field of theirs holds them."""
    chosen = {name: one.WhichOneof("parameter_choice") for name, one in parameters.items()}
    return {name: getattr(parameters[name], choice) for name, choice in chosen.items() if choice}


def _id_of(body: bytes) -> str:
    try:
        return str(_parsed(_INFER, body).id)
    except RefusedError:
        return ""


class _Cut(NamedTuple):
    """A ModelInferRequest in parts. `head`: all but `id_field` and the raw tensors."""

    head: bytes
    name: str
    version: str
    id_field: bytes
    blobs: list[memoryview]


def _cut(body: bytes) -> _Cut | None:
    """Cut a request with raw tensors behind its head, as every writer puts them, without reading the head. None: it is not so, or not whole."""
    fields: dict[int, tuple[int, int, int]] = {}  # name, version, id: where the field begins, where its value does, where both end
    blobs: list[memoryview] = []
    view, at, end, head_end = memoryview(body), 0, len(body), 0
    try:
        while at < end:
            begin, tag = at, body[at]
            value, at = _extent(body, at + 1)
            if tag == _RAW_IN:
                blobs.append(view[value:at])
            elif blobs or tag in fields or tag not in _HEAD:
                return None
            else:
                head_end = at
                if tag <= _ID:
                    fields[tag] = begin, value, at
        name, version, _ = [str(body[value:stop], "utf-8") for _, value, stop in (fields.get(tag, (0, 0, 0)) for tag in (_NAME, _VERSION, _ID))]
    except (IndexError, UnicodeDecodeError):
        return None
    begin, _, stop = fields.get(_ID, (0, 0, 0))
    return _Cut(body[:begin] + body[stop:head_end], name, version, body[begin:stop], blobs) if blobs and at == end else None


def _extent(body: bytes, at: int) -> tuple[int, int]:
    """Where a field's value begins and ends, given where its length stands. Raises IndexError when there is no such length."""
    size, shift = body[at], 7
    while size >> shift:  # the highest bit so far says that there is more
        if shift > 28:
            raise IndexError
        at += 1
        size += (body[at] - 1) << shift
        shift += 7
    return at + 1, at + 1 + size


def _field(tag: int, size: int) -> bytes:
    """What stands before `size` bytes of a field."""
    start = [tag]
    while size > 127:
        start.append(size & 127 | 128)
        size >>= 7
    return bytes([*start, size])
