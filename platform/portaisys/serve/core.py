"""What one replica is, without Ray: a loop in a thread of its own (uvloop) with the models and the ports that answer for them.

Ray Serve's route and the ports run the same code on the same loop, so a batch holds requests of both. Replicas of one machine
share their ports (SO_REUSEPORT): each serves every model, and the kernel spreads the connections.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import ssl
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from portaisys.serve import protocol
from portaisys.serve.codec import RefusedError
from portaisys.serve.grpc import GrpcPort
from portaisys.serve.http import Bounds, Port
from portaisys.serve.keys import read_keys, refuse_open
from portaisys.serve.repository import Change, Repository, UnknownModelError
from portaisys.spec import UserError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Before = Callable[["Core"], Coroutine[Any, Any, object]]
DRAIN_S = 15.0
FOLLOW_S = 5.0  # between looks at the registry: a promotion is everywhere after this


@dataclass(frozen=True)
class Listen:
    """Where a replica listens itself. None: not at all; 0: any free port. `tls_cert`, `tls_key`: PEM files; empty: in the clear.

    `keys`: a file of API keys, which hold on every path; empty: none are asked for, which a port that others reach refuses.
    """

    host: str = "127.0.0.1"
    http_port: int | None = None
    grpc_port: int | None = None
    tls_cert: str = ""
    tls_key: str = ""
    keys: str = ""
    shared: bool = False


class Core:
    """A replica's loop. `before`: what is done once the models are loaded and nobody is answered yet. `ports`: protocol -> number, as they came to be. Raises UserError for keys that cannot be read, or none where others can reach a port."""

    def __init__(self, models: Repository, references: Sequence[str], listen: Listen, count: Callable[[int], None] = lambda status: None, bounds: Bounds | None = None, before: Before | None = None) -> None:
        self.models = models
        self._before = before
        self.ports: dict[str, int] = {}
        self._references, self._listen = references, listen
        self._keys = read_keys(Path(listen.keys)) if listen.keys else None
        if (listen.http_port, listen.grpc_port) != (None, None):
            refuse_open(listen.host, self._keys)
        self._port = Port(models, bounds, count, self._keys)
        self._grpc_port = GrpcPort(models, count, self._keys)
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="data_plane", daemon=True)
        self._stopped = False
        self._following: concurrent.futures.Future[None] | None = None

    def start(self) -> Core:
        """Load every model, then listen; returns itself when all are warm. Raises UserError for what cannot be, and nothing is left behind."""
        self._thread.start()
        try:
            for reference in self._references:
                self.run(self.models.load(reference))
            if self._before is not None:
                self.run(self._before(self))
            if self._listen.http_port is not None:
                self.ports["http"] = self.run(self._listened(self._listen.http_port))
            if self._listen.grpc_port is not None:
                self.ports["grpc"] = self.run(self._listened_grpc(self._listen.grpc_port))
        except BaseException:
            self.stop(drain_s=0)
            raise
        self.models.ports = self.ports
        self._following = asyncio.run_coroutine_threadsafe(self._follow(), self._loop)
        # What is there now stays: the collector need not look at it again while requests wait.
        gc.collect()
        gc.freeze()
        return self

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`, done on this loop; from any other thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def handle(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> protocol.Response:
        """Answer a request that came another way; from any other loop. Cancelling it cancels the request."""
        asked = asyncio.run_coroutine_threadsafe(protocol.handle(method, path, headers, body, self.models, self._keys), self._loop)
        return await asyncio.wrap_future(asked)

    async def follow_hand(self, name: str, change: Change) -> str:
        """Load or unload what another replica was asked to, unless something later was done already; on this loop. Returns why not, or nothing."""
        if not self.models.remember(name, change):
            return ""
        try:
            await protocol.change(self.models, name, change.action, change.parameters, spread=False)
        except UnknownModelError:
            return "" if change.action == "unload" else "unknown model"  # it is out already
        except RefusedError as refused:
            logger.warning("%s of %s, which another replica was asked: %s", change.action, name, refused)
            return str(refused)
        return ""

    def stop(self, drain_s: float = DRAIN_S) -> None:
        """Answer what is under way, then close everything; a second call does nothing."""
        if self._stopped:
            return
        self._stopped = True
        if self._following is not None:
            self._following.cancel()
        self.run(self._drained(drain_s))
        self.run(self.models.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(FOLLOW_S)
            try:
                await self.models.refresh()
            except Exception:  # whatever it is, requests are answered meanwhile, and the next look may succeed
                logger.exception("the registry could not be followed")

    async def _listened(self, port: int) -> int:
        try:
            return await self._port.listen(self._listen.host, port, shared=self._listen.shared, tls=_tls(self._listen))
        except OSError as error:
            raise UserError(f"data_port: cannot listen on {self._listen.host}:{port} ({error.strerror or error}); choose another") from error

    async def _listened_grpc(self, port: int) -> int:
        pair = None if _tls(self._listen) is None else _pem(self._listen)
        try:
            return await self._grpc_port.listen(self._listen.host, port, shared=self._listen.shared, tls=pair)
        except OSError as error:
            raise UserError(f"grpc_port: cannot listen on {self._listen.host}:{port} ({error}); choose another") from error

    async def _drained(self, drain_s: float) -> None:
        await asyncio.gather(self._port.drain(drain_s), self._grpc_port.drain(drain_s))


def _tls(listen: Listen) -> ssl.SSLContext | None:
    """Raises UserError when there is no certificate or key, or they do not belong together."""
    if not listen.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(listen.tls_cert, listen.tls_key or None)
    except OSError as error:  # ssl's own errors are OSErrors too
        raise UserError(f"tls_cert: {listen.tls_cert} with tls_key {listen.tls_key or '(in the same file)'} cannot be used ({error.strerror or error}); name PEM files that belong together") from error
    return context


def _pem(listen: Listen) -> tuple[bytes, bytes]:
    """Key and certificate."""
    return Path(listen.tls_key or listen.tls_cert).read_bytes(), Path(listen.tls_cert).read_bytes()
