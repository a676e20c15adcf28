"""The data port: the protocol over HTTP/1.1, straight from the socket (uvloop, httptools), beside Ray Serve's own route.

A connection answers one request at a time, in order. Usual binary requests take the fast lane; all others become one task that
runs `protocol.handle`, the same code as on the Serve route. Limits here are those of a server that faces a network: header and
body sizes, time for a request to arrive and for an answer to be taken, connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import resource
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import httptools
import numpy as np
from numpy.typing import NDArray

from portaisys.serve import protocol
from portaisys.serve.batcher import Piece
from portaisys.serve.codec import MAX_BODY_BYTES, RefusedError
from portaisys.serve.fast import REMEMBERED, FastLane, Reply
from portaisys.serve.keys import ForbiddenError, Keys
from portaisys.serve.model import ServedModel
from portaisys.serve.protocol import Response
from portaisys.serve.repository import Repository, UnknownModelError

logger = logging.getLogger(__name__)

_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout", 409: "Conflict", 413: "Content Too Large", 414: "URI Too Long", 431: "Request Header Fields Too Large", 500: "Internal Server Error", 501: "Not Implemented", 503: "Service Unavailable"}  # fmt: skip
_LENGTH, _ENCODING, _ACCEPT, _EXPECT, _REQUEST_ID = b"inference-header-content-length", b"content-encoding", b"accept-encoding", b"expect", b"x-request-id"
MOST_URL = 256  # bytes of one that is remembered
BACKLOG = 1024
IDLE_DRAIN_S = 1.0
_JOINED_BYTES = 64 << 10  # smaller replies are copied into one write; larger ones are handed over as they are


@dataclass(frozen=True)
class Bounds:
    """What a client may take: bytes, seconds, connections."""

    header_bytes: int = 32 << 10
    body_bytes: int = MAX_BODY_BYTES
    request_s: float = 30.0  # for a request to arrive whole
    idle_s: float = 75.0  # between requests
    write_s: float = 30.0  # for an answer to be taken
    connections: int = 4096
    pipelined: int = 32


@dataclass(frozen=True, eq=False)
class _Headers:
    """Headers of a request as they are needed; a client's next request has the same ones as a rule, so they are read once."""

    raw: tuple[tuple[bytes, bytes], ...]
    named: Mapping[str, str]
    json_bytes: int | None  # of a body with binary tensors
    plain: bool  # nothing that the fast lane does not know
    request_id: bytes
    announced: int  # bytes of the body, 0 where that is not said
    expects: bool  # to be told to send the body
    host: bool


class Port:
    """A listening data port of one loop."""

    def __init__(self, models: Repository, bounds: Bounds | None = None, count: Callable[[int], None] = lambda status: None, keys: Keys | None = None) -> None:
        self.models, self.bounds, self.count, self.keys = models, bounds or Bounds(), count, keys
        self.lane = FastLane(models)
        self.connections: set[Connection] = set()
        self.draining = False
        self._paths: dict[bytes, tuple[str, str | None] | None] = {}
        self._servers: list[asyncio.Server] = []
        self._listeners: list[socket.socket] = []
        self._tls: ssl.SSLContext | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def listen(self, host: str, port: int, *, shared: bool = False, tls: ssl.SSLContext | None = None) -> int:
        """Begin to answer; returns the port number. `shared`: with other processes of this machine (SO_REUSEPORT). Raises OSError."""
        loop, self._tls = asyncio.get_running_loop(), tls
        self._listeners = await asyncio.to_thread(_listeners, host, port, shared)
        self._servers = [await loop.create_server(lambda: Connection(self), sock=listener, backlog=BACKLOG, ssl=tls) for listener in self._listeners]
        self._sweeper = loop.create_task(self._sweep())
        return int(self._listeners[0].getsockname()[1])

    def infer_path(self, url: bytes) -> tuple[str, str | None] | None:
        """Model and version of an inference request's URL, None of any other; remembered, since there are few."""
        if url in self._paths:
            return self._paths[url]
        found = _infer_path(_origin(url.decode("latin-1")))
        if len(url) <= MOST_URL:
            if len(self._paths) >= REMEMBERED:
                self._paths.clear()
            self._paths[url] = found
        return found

    async def drain(self, timeout_s: float = 30.0) -> None:
        """Lose nobody: the listener closes, answers end their connections from now on, and what is under way is finished.

        Idle connections get a moment for one request more: who asks on one while it is closed cannot tell whether he was heard.
        """
        begun = time.monotonic()
        await self._take_who_waits()
        self.draining = True
        while self.connections and time.monotonic() < begun + timeout_s:
            if time.monotonic() > begun + IDLE_DRAIN_S:
                for connection in list(self.connections):
                    connection.end_if_idle()
            await asyncio.sleep(0.01)
        await self.close()

    async def _take_who_waits(self) -> None:
        """Close the listeners. Whoever connected and was not accepted yet would be reset with them, so they are first."""
        accepted: list[socket.socket] = []
        for server, listener in zip(self._servers, self._listeners, strict=True):
            with contextlib.suppress(OSError):  # nobody is left, or it is closed already
                while True:
                    accepted.append(listener.accept()[0])
            server.close()
        self._servers, self._listeners = [], []
        loop = asyncio.get_running_loop()
        welcomed = [loop.connect_accepted_socket(lambda: Connection(self), one, ssl=self._tls) for one in accepted]
        with contextlib.suppress(TimeoutError):  # a TLS handshake may never come to an end; who has left again is no matter
            await asyncio.wait_for(asyncio.gather(*welcomed, return_exceptions=True), IDLE_DRAIN_S)

    async def close(self) -> None:
        """Stop now."""
        self.draining = True
        for server in self._servers:
            server.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self.connections):
            connection.abort()

    async def _sweep(self) -> None:
        """Once a second, end connections whose time is over: one timer for all of them."""
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            for connection in list(self.connections):
                connection.end_if_late(now)


def _listeners(host: str, port: int, shared: bool) -> list[socket.socket]:
    """Bound sockets, of every address that the host has, with numbers above those that connections will get.

    Of a process that is killed Linux closes the highest number first. Were that a connection, its client would come back at once and could
    meet the listener that is about to die: 14 of 24 kills lost a request so, none of 24 with the listener on top.
    """
    found = []
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    top = max(0, (1 << 16 if most == resource.RLIM_INFINITY else min(most, 1 << 16)) - 64)
    try:
        for family, *_, address in dict.fromkeys(socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)):
            with socket.create_server(address, family=family, backlog=BACKLOG, reuse_port=shared) as low:
                found.append(socket.socket(fileno=fcntl.fcntl(low.fileno(), fcntl.F_DUPFD_CLOEXEC, top)))
                found[-1].setblocking(False)
    except BaseException:
        for one in found:
            one.close()
        raise
    return found


class Connection(asyncio.Protocol):
    """One client. Parsed requests wait in `_waiting` while one is being answered."""

    def __init__(self, port: Port) -> None:
        self._port, self._bounds = port, port.bounds
        self._parser = httptools.HttpRequestParser(self)
        self._headers: list[tuple[bytes, bytes]] = []
        self._known: _Headers | None = None
        self._waiting: deque[tuple[str, bytes, _Headers, bytes, bool]] = deque()
        self._waiting_bytes = 0  # of their bodies
        self._swallowed = 0  # bytes that the parser has and has said nothing of
        self._busy, self._request_id = False, b""
        self._last: Response | None = None  # what ends the connection, once all that came before it is answered
        self._task: asyncio.Task[None] | None = None
        self._pieces: tuple[ServedModel, list[Piece]] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._keep_alive, self._writable, self._ended, self._deaf = True, True, False, False
        self._deadline = time.monotonic() + self._bounds.request_s
        self._reset()

    def _reset(self) -> None:
        self._url = b""
        self._head_bytes = 0
        self._headers = []
        self._body: bytes | bytearray = b""
        self._fresh = True
        self._expecting = False

    # --- from the socket ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport  # uvloop's is none of asyncio's classes
        self._port.connections.add(self)
        if len(self._port.connections) > self._bounds.connections:
            self._refuse(503, "too many connections", {"Retry-After": "1"})

    def connection_lost(self, error: Exception | None) -> None:
        """Whoever left needs no answer: what waits leaves the queue. One that only stopped sending is taken for gone too, as other servers do."""
        self._port.connections.discard(self)
        self._ended = True
        self._waiting.clear()
        self._waiting_bytes = 0
        self._reset()
        del self._parser  # which knows us: else what came of a body would stay until the collector looks
        self._forget()
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        if self._ended or self._deaf:
            return
        if self._fresh and not self._busy:
            self._fresh = False
            self._deadline = time.monotonic() + self._bounds.request_s
        headers, named, held = self._headers, len(self._headers), len(self._body)
        try:
            self._parser.feed_data(data)
            if headers is self._headers and named == len(headers) and held == len(self._body):
                self._swallow(len(data))
            else:
                self._swallowed = 0
        except httptools.HttpParserUpgrade:  # nobody need follow a wish for another protocol: the request is answered, what comes after it is not read
            self._keep_alive, self._deaf = False, True
        except _RefusedEarly as refused:
            self._refuse(refused.status, str(refused))
        except httptools.HttpParserCallbackError as error:
            early = error.__context__
            if isinstance(early, _RefusedEarly):
                self._refuse(early.status, str(early))
            else:
                logger.error("internal error", exc_info=early)
                self._refuse(500, "internal error; the server's log has the cause")
        except httptools.HttpParserError:
            self._refuse(400, "this is no HTTP/1.1 request")

    def pause_writing(self) -> None:
        self._writable = False
        self._deadline = time.monotonic() + self._bounds.write_s

    def resume_writing(self) -> None:
        self._writable = True
        self._next()

    def end_if_late(self, now: float) -> None:
        """Called once a second."""
        if self._ended or now < self._deadline:
            return
        if not self._writable:
            self.abort()
        elif not self._busy:
            if self._fresh:
                self._transport.close()
            else:
                self._refuse(408, f"the request did not arrive within {self._bounds.request_s:g} s")

    def end_if_idle(self) -> None:
        """Close, unless a request is under way, whose answer then does."""
        if not self._busy and self._fresh:
            self._transport.close()

    def abort(self) -> None:
        self._ended = True
        self._transport.abort()

    # --- from the parser ----------------------------------------------------------------------------------------------

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count(len(url), 414, "the URL")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > self._bounds.header_bytes:  # not through _count: this is called ten times a request
            self._count(0, 431, "the headers")

    def _count(self, size: int, status: int, what: str) -> None:
        self._head_bytes += size
        if self._head_bytes > self._bounds.header_bytes:
            raise _RefusedEarly(status, f"{what} exceed {self._bounds.header_bytes} bytes")

    def _swallow(self, size: int) -> None:
        """A header, a trailer or a chunk's line without an end: the parser keeps it, and tells of it only when it is whole."""
        self._swallowed += size
        if self._swallowed > self._bounds.header_bytes:
            raise _RefusedEarly(431, f"the headers exceed {self._bounds.header_bytes} bytes")

    def on_headers_complete(self) -> None:
        raw = tuple(self._headers)
        if self._known is None or self._known.raw != raw:
            self._known = _read_headers(raw)
        known = self._known
        if not known.host and self._parser.get_http_version() != "1.0":
            raise _RefusedEarly(400, "this is no HTTP/1.1 request: it names one Host (RFC 9112, 3.2)")
        if known.announced > self._bounds.body_bytes:
            raise _RefusedEarly(413, f"the body exceeds {self._bounds.body_bytes} bytes; send fewer samples a request")
        if known.expects:
            self._expecting = self._parser.get_http_version() == "1.1"
        self._continue()

    def _continue(self) -> None:
        """Tell who waits for it to send the body; after the answer that is under way, whose place it would take."""
        if self._expecting and not self._busy and not self._waiting:
            self._expecting = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, chunk: bytes) -> None:
        if not self._body:
            self._body = chunk
        else:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)  # a list of chunks of two bytes would take twenty times what they hold
            self._body += chunk
        if len(self._body) > self._bounds.body_bytes:
            raise _RefusedEarly(413, f"the body exceeds {self._bounds.body_bytes} bytes; send fewer samples a request")

    def on_message_complete(self) -> None:
        assert self._known is not None
        body = bytes(self._body)  # of bytes, no copy
        method = self._parser.get_method().decode("ascii", "replace")
        request = method, self._url, self._known, body, self._parser.should_keep_alive()
        self._reset()
        if self._busy or self._waiting or not self._writable:  # those that wait go first, also between two turns of the loop
            self._waiting.append(request)
            self._waiting_bytes += len(body)
            if self._crowded():
                self._transport.pause_reading()
        else:
            self._answer(*request)

    def _crowded(self) -> bool:
        """Whether no more is read until some of what waits is answered."""
        return len(self._waiting) >= self._bounds.pipelined or self._waiting_bytes >= self._bounds.body_bytes

    # --- answers ------------------------------------------------------------------------------------------------------

    def _answer(self, method: str, url: bytes, headers: _Headers, body: bytes, keep_alive: bool) -> None:
        self._busy, self._keep_alive, self._request_id = True, keep_alive, headers.request_id
        if headers.plain and headers.json_bytes and method == "POST" and (found := self._port.infer_path(url)):
            try:
                if self._port.keys is not None:
                    self._port.keys.check(headers.named, found[0])
                asked = self._port.lane.ask(*found, headers.named, headers.json_bytes, body, self._send_tensors, self._send_refusal)
            except RefusedError as refused:
                self._send_refusal(refused)
                return
            except ForbiddenError as forbidden:
                self._send_refusal(protocol.refused_key(forbidden))
                return
            except UnknownModelError as unknown:
                self._send_refusal(RefusedError(404, str(unknown)))
                return
            if asked is not None:
                model, pieces, timeout_s = asked
                self._pieces = model, pieces
                if timeout_s is not None:
                    self._timer = asyncio.get_running_loop().call_later(timeout_s, self._timed_out)
                return
        self._task = asyncio.get_running_loop().create_task(self._handle(method, url, headers, body))

    async def _handle(self, method: str, url: bytes, headers: _Headers, body: bytes) -> None:
        path = unquote(_origin(url.decode("latin-1")).partition("?")[0])
        try:
            reply = await protocol.handle(method, path, headers.named, body, self._port.models, self._port.keys)
        except asyncio.CancelledError:
            return
        self._task = None
        self._send(reply, head_only=method == "HEAD")

    def _timed_out(self) -> None:
        if self._pieces is not None:
            model, _ = self._pieces
            self._forget()
            self._send_refusal(protocol.refusal(model, TimeoutError()))

    def _forget(self) -> None:
        """Nobody waits for what was asked any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._pieces is not None:
            model, pieces = self._pieces
            self._pieces = None
            model.batcher.drop(pieces)

    def _send_tensors(self, reply: Reply, arrays: list[NDArray[Any]]) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._pieces = None
        if self._ended:
            return
        self._port.count(200)
        if not reply.lines:
            reply.lines = _lines(reply)
        first = b"%b%b%b\r\n%b" % (reply.lines, self._identified(), self._closing(), reply.head)
        blobs: list[Any] = [array.data if array.flags.c_contiguous else np.ascontiguousarray(array).data for array in arrays]
        if reply.size < _JOINED_BYTES:
            self._transport.write(b"".join([first, *blobs]))
        else:
            self._transport.writelines([first, *[blob.cast("B") for blob in blobs]])
        self._done()

    def _send_refusal(self, refused: RefusedError) -> None:
        self._pieces = None
        self._send(protocol.error(refused.status, str(refused), refused.headers))

    def _send(self, reply: Response, *, head_only: bool = False) -> None:
        if self._ended:
            return
        lines = [f"HTTP/1.1 {reply.status} {_REASONS.get(reply.status, 'Error')}", *(f"{name}: {value}" for name, value in reply.headers.items()), f"Content-Length: {len(reply.body)}"]
        head = "\r\n".join(lines).encode("latin-1") + b"\r\n" + self._identified() + self._closing() + b"\r\n"
        self._port.count(reply.status)
        self._transport.write(head if head_only else head + reply.body)
        self._done()

    def _identified(self) -> bytes:
        """The client's id of the request that is answered; of one behind it the headers may have been read already."""
        return b"X-Request-ID: %b\r\n" % self._request_id if self._request_id else b""

    def _closing(self) -> bytes:
        if self._port.draining:
            self._keep_alive = False
        return b"" if self._keep_alive else b"Connection: close\r\n"

    def _done(self) -> None:
        """The request is answered: the next one, or none."""
        self._busy, self._request_id = False, b""
        self._deadline = time.monotonic() + (self._bounds.idle_s if self._writable else self._bounds.write_s)
        if not self._keep_alive:
            self._ended = True
            self._transport.close()
            return
        self._continue()
        if self._last is not None and not self._waiting:
            self._keep_alive, last = False, self._last
            self._last = None
            self._send(last)
        elif self._waiting:
            asyncio.get_running_loop().call_soon(self._next)  # not from here: a thousand pipelined requests would be a thousand frames deep

    def _next(self) -> None:
        if self._waiting and not self._busy and self._writable and not self._ended:
            request = self._waiting.popleft()
            self._waiting_bytes -= len(request[3])
            if not self._crowded():
                with contextlib.suppress(RuntimeError):  # it was not paused
                    self._transport.resume_reading()
            self._answer(*request)

    def _refuse(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        """What came is no request that can be answered and gone on after. Requests that came whole before it are answered first."""
        if self._ended:
            return
        reply = protocol.error(status, message, headers)
        if self._busy or self._waiting:
            self._last, self._deaf = reply, True
        else:
            self._keep_alive = False
            self._send(reply)


class _RefusedEarly(Exception):
    """A request that is refused before it has come whole."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _lines(reply: Reply) -> bytes:
    """Status and headers of a reply, but for those that differ from one request to the next."""
    length = f"Inference-Header-Content-Length: {len(reply.head)}\r\nContent-Length: {reply.size}"
    return f"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n{length}\r\n{protocol.LINEAGE}: {reply.stamp}\r\n".encode()


_SMUGGLING = "a request has one Content-Length or one Transfer-Encoding, not both and neither twice"


def _read_headers(raw: tuple[tuple[bytes, bytes], ...]) -> _Headers:
    named: dict[str, str] = {}
    for name, value in raw:
        lower = name.decode("latin-1").lower()
        if lower in named and lower in ("content-length", "transfer-encoding", "content-encoding", "inference-header-content-length", "host", "authorization", "x-api-key"):
            raise _RefusedEarly(400, _SMUGGLING if lower in ("content-length", "transfer-encoding") else f"header {lower} stands twice")
        named[lower] = value.decode("latin-1")
    if "content-length" in named and "transfer-encoding" in named:
        raise _RefusedEarly(400, _SMUGGLING)
    if named.get("transfer-encoding", "chunked").strip().lower() != "chunked":  # the parser reads its chunks, and nobody would undo the rest
        raise _RefusedEarly(501, "the only Transfer-Encoding is chunked; compress with Content-Encoding")
    length = named.get("inference-header-content-length", "")
    json_bytes = int(length) if length.isdecimal() and len(length) < 10 else None
    plain = "content-encoding" not in named and named.get("accept-encoding", "identity") in ("identity", "*", "")
    request_id = named.get("x-request-id", "")
    safe = request_id.isprintable() and request_id.isascii() and len(request_id) <= 128
    announced = named.get("content-length", "")
    expects = named.get("expect", "").lower() == "100-continue"
    return _Headers(raw, named, json_bytes, plain, request_id.encode() if safe else b"", int(announced) if announced.isdecimal() else 0, expects, "host" in named)


def _origin(url: str) -> str:
    """The path of a URL; a client of a proxy sends the whole, which servers must take (RFC 9112, 3.2.2)."""
    if url.startswith("/") or "://" not in url:
        return url
    return "/" + url.partition("://")[2].partition("/")[2]


def _infer_path(url: str) -> tuple[str, str | None] | None:
    """Model and version out of the path of an inference request, as clients write it."""
    if not url.startswith("/v2/models/") or not url.endswith("/infer"):
        return None
    middle = url[11:-6]
    name, slash, version = middle.partition("/versions/")
    if "/" in name or "%" in middle or "?" in middle or (slash and not version.isdecimal()):
        return None
    return name, version or None
