"""Open Inference Protocol V2 over HTTP: which model a request is for, what becomes of it, what models say of themselves.

https://github.com/kserve/open-inference-protocol, with the binary tensor and classification extensions of
https://github.com/triton-inference-server/server/tree/main/docs/protocol. What the written spec leaves open follows
the clients (tritonclient, KServe, perf_analyzer).

How a body is read and written is codec.py's. Knows neither Ray nor a web framework: `handle` is a function of a request. What a client
got wrong is a 4xx whose body is `{"error": ...}`; no message repeats what the client sent, nor names a path or an address of ours.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import portaisys
from portaisys import registry
from portaisys.engine import Tensor
from portaisys.serve import codec
from portaisys.serve.batcher import ClosedError, EngineFailedError, Outputs, QueueFullError, TooManySamplesError
from portaisys.serve.codec import InferRequest, RefusedError
from portaisys.serve.keys import ForbiddenError, Keys
from portaisys.serve.model import BlockedError, ServedModel
from portaisys.serve.openapi import openapi
from portaisys.serve.repository import Repository, UnknownModelError
from portaisys.spec import UserError

logger = logging.getLogger(__name__)

IN_THREAD_BYTES = 256 << 10  # decoding more than this (about 2 ms) would hold up everybody else's requests
LINEAGE = "X-Portaisys-Lineage"
_EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "statistics", "model_repository", "lineage"]


@dataclass(frozen=True)
class Response:
    """A whole HTTP reply."""

    status: int
    headers: Mapping[str, str]
    body: bytes


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


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(status, {"Content-Type": "application/json", **(headers or {})}, codec.dump(value))


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
    return codec.tree_of(call.headers, call.body)


def _ready(call: _Call, whom: ServedModel | Repository) -> Response:
    reply = _get(call, {"ready": True})
    if not whom.ready:
        raise RefusedError(503, "not ready", {"Retry-After": "1"})
    return reply


def _index(call: _Call, models: Repository) -> Response:
    ready = codec.value_of(_post(call), "ready", bool, False)
    return _json([row for row in models.index() if not ready or row["state"] == "READY"])


async def _change(call: _Call, models: Repository, name: str, action: str) -> Response:
    """Load NAME (parameter `reference`: which of its versions, "production" by default) or unload it (`version`: only this one)."""
    await models.whole(change(models, name, action, codec.parameters_of(_post(call))))
    return _json({})


async def change(models: Repository, name: str, action: str, parameters: Mapping[str, Any], *, spread: bool = True) -> None:
    """Load or unload, as both protocols ask for it, here and, with `spread`, wherever else the models are.

    Raises RefusedError (400; 409 for what its gate did not pass; 503 when not all replicas did it) or UnknownModelError.
    """
    if not re.fullmatch("[a-z0-9][a-z0-9_-]{0,62}", name):
        raise RefusedError(400, "a model's name is of small letters, digits, - and _, at most 63")
    if action == "unload":
        try:
            await models.unload(name, codec.value_of(parameters, "version", str, None))
        except UnknownModelError:
            if not spread or name not in models.untold:  # else it is done here, and asked again for those that have not
                raise
        if spread:
            await _spread(models, name, action, parameters)
        return
    which = codec.value_of(parameters, "reference", str, "production")
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
    body, headers = codec.encode(request, outputs, model.name, model.version, model.labels)
    headers[LINEAGE] = model.stamp
    reply = Response(200, *codec.compress(call.headers.get("accept-encoding", ""), headers, body))
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
        request = codec.decode(*arguments) if short else await asyncio.to_thread(codec.decode, *arguments)
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
    return {"name": tensor.name, "datatype": codec.DATATYPES[tensor.dtype].name, "shape": list(tensor.shape)}


def _configure(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "data_type": f"TYPE_{codec.DATATYPES[tensor.dtype].name}", "dims": list(tensor.shape[1:])}
