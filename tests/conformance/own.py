"""A server of ours to run the suite against: small exact models behind the real batcher, on the data port and on an ASGI route.

    python -m conformance.own          prints its addresses as JSON and serves until its standard input ends

The route answers as the Ray Serve application does, without Ray: the whole body is read, then `Core.handle`. Below /NAME/v2 it has the
defect of that name (defects.py).
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import uvicorn

from conformance.defects import DEFECTS
from portaisys.engine import Tensor
from portaisys.serve import codec, protocol
from portaisys.serve.batcher import Batcher
from portaisys.serve.core import Core, Listen
from portaisys.serve.model import ServedModel, Stats
from portaisys.serve.repository import Repository
from portaisys.spec import UserError


class Linear:
    """x [-1, 2, 3] float32 -> logits [-1, 4] float32; every version has weights of its own."""

    backend, precision, device = "numpy", "fp32", "cpu"
    inputs = (Tensor("x", "float32", (-1, 2, 3)),)
    outputs = (Tensor("logits", "float32", (-1, 4)),)

    def __init__(self, version: int) -> None:
        self.weights = np.random.default_rng(version).normal(size=(6, 4)).astype(np.float32)

    def run(self, feeds: Any) -> dict[str, Any]:
        with np.errstate(over="ignore", invalid="ignore"):
            return {"logits": np.stack([row @ self.weights for row in feeds["x"].reshape(-1, 6)])}

    def close(self) -> None: ...


class Every(Linear):
    """Gives an input of every datatype back as an output of the same name."""

    TYPES = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
    inputs = tuple(Tensor(name, name, (-1, -1)) for name in TYPES)
    outputs = inputs

    def run(self, feeds: Any) -> dict[str, Any]:
        return dict(feeds)


KINDS = {"linear": Linear, "every": Every}


def opened(reference: str) -> ServedModel:
    """NAME@VERSION of either kind."""
    name, _, version = reference.partition("@")
    if name not in KINDS or not version.isdecimal():
        raise UserError(f"{name}: no such model")
    engine, stats = KINDS[name](int(version)), Stats()
    batcher = Batcher(engine.run, max_batch=64, max_queue=1024, observe=stats.batch)
    return ServedModel(name, version, engine, batcher, (), {"digest": "d" * 64}, (), stats)  # type: ignore[arg-type]


def expanded(reference: str) -> list[str]:
    """NAME@7,3 as NAME@7 and NAME@3."""
    name, _, versions = reference.partition("@")
    return [f"{name}@{version}" for version in versions.split(",")]


def core() -> Core:
    models = Repository(opened, expanded)
    listen = Listen(http_port=0, grpc_port=0)
    return Core(models, ("linear@7,3", "every@1"), listen).start()


def route(core: Core) -> Callable[..., Awaitable[None]]:
    """An ASGI application over `core`."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = bytearray(), True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                return
            body += event.get("body", b"")
            more = event.get("more_body", False)
            if len(body) > codec.MAX_BODY_BYTES:
                reply = protocol.error(413, "the body is too large")
                break
        else:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            reply = await answered(core, scope["method"], scope["path"], headers, bytes(body))
        lines = [(name.lower().encode(), value.encode("latin-1")) for name, value in reply.headers.items()]
        await send({"type": "http.response.start", "status": reply.status, "headers": [*lines, (b"content-length", b"%d" % len(reply.body))]})
        await send({"type": "http.response.body", "body": reply.body})

    return app


async def answered(core: Core, method: str, path: str, headers: dict[str, str], body: bytes) -> protocol.Response:
    name, slash, rest = path[1:].partition("/")
    if name not in DEFECTS:
        return await core.handle(method, path, headers, body)
    return await DEFECTS[name].handle(core.handle, method, slash + rest, headers, body)


class Route:
    """uvicorn in a thread."""

    def __init__(self, app: Any) -> None:
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off", http="httptools", loop="uvloop"))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()), daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            self._thread.join(0.005)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()


def main() -> None:
    running = core()
    asgi = Route(route(running))
    urls = {"data port": f"http://127.0.0.1:{running.ports['http']}", "route": f"http://127.0.0.1:{asgi.port}"}
    print(json.dumps({**urls, "grpc": f"127.0.0.1:{running.ports['grpc']}"}), flush=True)
    sys.stdin.read()
    asgi.stop()
    running.stop(drain_s=1)


if __name__ == "__main__":
    main()
