"""HTTP/1.1 as it is on the socket: requests as bytes, replies with every header, so that nothing a client library forgives is forgiven."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 20.0  # a server that says nothing for so long hangs
LENGTH = "Inference-Header-Content-Length"


class ClosedError(Exception):
    """The server ended the connection before a whole reply had come."""


@dataclass(frozen=True)
class Reply:
    """Headers by lower-case name; `raw`: the body as it was sent, `body`: without its content encoding."""

    status: int
    headers: Mapping[str, str]
    raw: bytes

    @property
    def body(self) -> bytes:
        encoding = self.headers.get("content-encoding", "identity")
        assert encoding in ("identity", "gzip", "deflate"), f"an answer in {encoding}, for which nobody asked"
        return self.raw if encoding == "identity" else zlib.decompress(self.raw, wbits=31 if encoding == "gzip" else 15)

    def json(self) -> Any:
        """The body, which must be JSON as RFC 8259 has it and be called so."""
        kind = self.headers.get("content-type", "")
        assert kind.partition(";")[0].strip().lower() == "application/json", f"JSON whose Content-Type is {kind!r}: {self.raw[:200]!r}"
        return strict(self.body)


def strict(text: bytes) -> Any:
    """JSON without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@dataclass(frozen=True)
class Target:
    """A server under test. `prefix`: path before /v2; `own_parser`: malformed HTTP too is answered by the server under test, not by one in front of it.

    `known`: tests that it is known to fail, with the reason.
    """

    url: str
    grpc: str | None = None
    model: str | None = None
    own_parser: bool = False
    known: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or "127.0.0.1"

    @property
    def port(self) -> int:
        parts = urlsplit(self.url)
        return parts.port or (443 if parts.scheme == "https" else 80)

    @property
    def tls(self) -> bool:
        return urlsplit(self.url).scheme == "https"

    @property
    def prefix(self) -> str:
        return urlsplit(self.url).path.rstrip("/")

    def connect(self) -> Connection:
        sock = socket.create_connection((self.host, self.port), timeout=TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.tls:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # what is tested is the protocol, on a server that the tester named
            sock = context.wrap_socket(sock)
        return Connection(sock)

    def bytes_of(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, *, framed: bool = True) -> bytes:
        """A request. `framed`: with the Content-Length of its body."""
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {self.host}:{self.port}", *(f"{name}: {value}" for name, value in (headers or {}).items())]
        if framed and (body or method == "POST"):
            lines.append(f"Content-Length: {len(body)}")
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body

    def ask(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Reply:
        """One request on a connection of its own."""
        with self.connect() as connection:
            connection.send(self.bytes_of(method, path, body, headers))
            return connection.reply(head_only=method == "HEAD")

    def get(self, path: str) -> Reply:
        return self.ask("GET", path)

    def extensions(self) -> list[str]:
        listed: list[str] = self.get("/v2").json()["extensions"]
        return listed

    def is_well(self) -> None:
        """Whether somebody who comes next is answered."""
        assert self.get("/v2").status == 200


class Connection:
    """A socket and what was read from it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.stream = sock, sock.makefile("rb")

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self.stream.close()
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def send_until_cut(self, data: bytes) -> None:
        """For a server that may refuse before it has read everything."""
        with contextlib.suppress(ConnectionError):
            self.sock.sendall(data)

    def no_more(self) -> None:
        """Tell the server that nothing comes after this."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def line(self) -> bytes:
        line = self.stream.readline(1 << 20)
        if not line.endswith(b"\n"):
            raise ClosedError
        assert line.endswith(b"\r\n"), f"a line of the head that ends in a bare LF: {line!r}"
        return line[:-2]

    def head(self) -> tuple[int, dict[str, str]]:
        try:
            version, status, _ = (self.line() + b" ").split(b" ", 2)
            assert version in (b"HTTP/1.1", b"HTTP/1.0"), version
            headers: dict[str, str] = {}
            while line := self.line():
                name, colon, value = line.decode("latin-1").partition(":")
                assert colon and name == name.strip(), f"no header: {line!r}"
                assert name.lower() not in headers or name.lower() in ("set-cookie", "vary"), f"{name} stands twice"
                headers[name.lower()] = value.strip()
            return int(status), headers
        except ConnectionError:
            raise ClosedError from None

    def reply(self, *, head_only: bool = False) -> Reply:
        """The next final reply, whole. Raises ClosedError."""
        status, headers = self.head()
        while status == 100:
            status, headers = self.head()
        if head_only or status in (204, 304):
            return Reply(status, headers, b"")
        return Reply(status, headers, self._body(headers))

    def _body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            assert "content-length" not in headers
            return b"".join(iter(self._chunk, b""))
        if "content-length" in headers:
            return self._exactly(int(headers["content-length"]))
        assert headers.get("connection", "").lower() == "close", "a body whose end nobody can find"
        return self.stream.read()

    def _chunk(self) -> bytes:
        size = int(self.line().partition(b";")[0], 16)
        data = self._exactly(size)
        assert self.line() == b""
        return data

    def _exactly(self, size: int) -> bytes:
        try:
            data = self.stream.read(size)
        except ConnectionError:
            raise ClosedError from None
        if len(data) < size:
            raise ClosedError
        return data

    def rest(self) -> list[Reply]:
        """Every reply until the server closes."""
        replies = []
        with contextlib.suppress(ClosedError):
            while True:
                replies.append(self.reply())
        return replies


def refused(reply: Reply, *statuses: int) -> str:
    """The message of a reply that must be a refusal as every client reads it; without statuses any 4xx."""
    assert reply.status in (statuses or range(400, 500)), f"{reply.status} where {statuses or '4xx'} was due: {reply.raw[:300]!r}"
    return error_of(reply)


def error_of(reply: Reply) -> str:
    """Exactly {"error": why}, and nothing of the server's inside in it."""
    tree = reply.json()
    assert isinstance(tree, dict) and list(tree) == ["error"] and isinstance(tree["error"], str) and tree["error"], f"an error body is {{'error': why}}, not {reply.raw[:300]!r}"
    for inside in ("Traceback", ".py", "site-packages", " at 0x"):
        assert inside not in tree["error"], f"the error tells of the inside: {tree['error']}"
    return tree["error"]
