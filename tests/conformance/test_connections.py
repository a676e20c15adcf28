"""Connections: kept alive, pipelined, in chunks, byte by byte, many at once, left in the middle, and abused."""

from __future__ import annotations

import itertools
import json
import socket
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from conformance.models import Model, close, framed, same
from conformance.wire import ClosedError, Connection, Reply, Target, error_of, refused


def chunked(model: Model, pieces: list[bytes], headers: Mapping[str, str], *, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    """A request to infer whose body comes in these chunks."""
    head = model.target.bytes_of("POST", model.infer_path, b"", {**headers, "Transfer-Encoding": "chunked"}, framed=False)
    return head + b"".join(b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces) + b"0\r\n" + trailer + b"\r\n"


# --- one after the other ----------------------------------------------------------------------------------------------


def test_a_connection_stays_open_for_the_next_request(model: Model) -> None:
    with model.target.connect() as connection:
        for seed in range(10):
            feeds = model.rows(1, seed)
            connection.send(model.bytes_of(feeds, binary=model.binary, id=str(seed)))
            answer = model.answer(connection.reply())
            assert answer.tree["id"] == str(seed)
            same(answer, model.infer(feeds))


def test_pipelined_requests_are_answered_in_order(model: Model) -> None:
    """Of all kinds, so that a quick one could overtake."""
    target, expected = model.target, [model.infer(model.rows(1, seed)) for seed in range(12)]
    data, kinds = [], itertools.cycle(["json", "health", "binary", "unknown", "gzip"])
    order = [next(kinds) for _ in expected]
    for seed, kind in enumerate(order):
        match kind:
            case "health":
                data.append(target.bytes_of("GET", "/v2/health/live"))
            case "unknown":
                data.append(target.bytes_of("GET", "/v2/models/no-such-model"))
            case _:
                headers = {"Accept-Encoding": "gzip"} if kind == "gzip" else {}
                data.append(model.bytes_of(model.rows(1, seed), binary=model.binary and kind == "binary", id=str(seed), headers=headers))
    with target.connect() as connection:
        connection.send(b"".join(data))
        for seed, kind in enumerate(order):
            reply = connection.reply()
            match kind:
                case "health":
                    assert reply.json() == {"live": True}
                case "unknown":
                    refused(reply, 404)
                case _:
                    answer = model.answer(reply)
                    assert answer.tree["id"] == str(seed)
                    same(answer, expected[seed])


def test_hundreds_of_pipelined_requests_are_answered_in_order(first: Model) -> None:
    """By twenties: a client that never reads may be cut off."""
    expected = [first.infer(first.rows(1, seed)) for seed in range(20)]
    once = b"".join(first.bytes_of(first.rows(1, seed), binary=first.binary, id=str(seed)) for seed in range(20))
    with first.target.connect() as connection:
        for _ in range(15):
            connection.send(once)
            for seed, right in enumerate(expected):
                answer = first.answer(connection.reply())
                assert answer.tree["id"] == str(seed)
                same(answer, right)


def test_who_asks_to_close_is_answered_and_closed(first: Model) -> None:
    for headers in ({"Connection": "close"}, {"connection": "CLOSE"}):
        with first.target.connect() as connection:
            connection.send(first.bytes_of(first.rows(1), headers=headers))
            reply = connection.reply()
            first.answer(reply)
            assert reply.headers.get("connection", "").lower() == "close" and connection.stream.read() == b""


def test_http_1_0_is_answered_and_closed(first: Model) -> None:
    with first.target.connect() as connection:
        connection.send(first.bytes_of(first.rows(1)).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        first.answer(connection.reply())
        assert connection.stream.read() == b""


def test_a_head_request_has_no_body_so_the_next_reply_is_in_its_place(target: Target) -> None:
    with target.connect() as connection:
        connection.send(target.bytes_of("HEAD", "/v2/health/live") + target.bytes_of("GET", "/v2/health/ready"))
        assert connection.reply(head_only=True).status in (200, 405)
        assert connection.reply().json() == {"ready": True}


def test_an_absolute_url_is_the_path_it_holds(target: Target) -> None:
    """RFC 9112, 3.2.2: a server must take it, as it comes from clients of a proxy."""
    data = target.bytes_of("GET", "/v2/health/live").replace(b" /", f" http://{target.host}:{target.port}/".encode(), 1)
    with target.connect() as connection:
        connection.send(data)
        assert connection.reply().json() == {"live": True}


def test_names_of_headers_are_of_any_case(model: Model) -> None:
    model.need("binary_tensor_data")
    feeds = model.rows(1)
    body, headers = framed(*model.request(feeds, binary=True))
    for change in (str.lower, str.upper):
        same(model.answer(model.target.ask("POST", model.infer_path, body, {change(name): value for name, value in headers.items()})), model.infer(feeds))


# --- how a body arrives -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 100, 10**6])
@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
def test_a_body_in_chunks_is_the_body(model: Model, size: int, binary: bool) -> None:
    if binary:
        model.need("binary_tensor_data")
    feeds = model.rows(min(2, model.largest))
    body, headers = framed(*model.request(feeds, binary=binary))
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    with model.target.connect() as connection:
        for extension, trailer in ((b"", b""), (b';name="a;b"', b"X-Trailer: 1\r\n")):
            connection.send(chunked(model, pieces, headers, extension=extension, trailer=trailer))
            same(model.answer(connection.reply()), model.infer(feeds, binary=binary))


def test_a_request_that_comes_byte_by_byte_is_answered(model: Model) -> None:
    feeds = model.rows(1)
    data = model.bytes_of(feeds, binary=model.binary)
    with model.target.connect() as connection:
        for position in range(0, len(data) - 1):
            connection.send(data[position : position + 1])
        connection.send(data[-1:])
        same(model.answer(connection.reply()), model.infer(feeds))


def test_two_requests_cut_anywhere_are_two_requests(first: Model) -> None:
    feeds = first.rows(1)
    data, expected = first.bytes_of(feeds, binary=first.binary) * 2, first.infer(feeds)
    with first.target.connect() as connection:
        for cut in range(1, len(data), 5):
            connection.send(data[:cut])
            connection.send(data[cut:])
            same(first.answer(connection.reply()), expected)
            same(first.answer(connection.reply()), expected)


def test_who_expects_a_continue_is_told_to_go_on_or_answered_at_once(model: Model) -> None:
    feeds = model.rows(1)
    body, headers = framed(*model.request(feeds))
    head = model.target.bytes_of("POST", model.infer_path, b"", {**headers, "Expect": "100-continue", "Content-Length": str(len(body))}, framed=False)
    with model.target.connect() as connection:
        connection.send(head)
        status, _ = connection.head()
        assert status == 100
        connection.send(body)
        same(model.answer(connection.reply()), model.infer(feeds))


def test_who_expects_a_continue_while_another_answer_is_made_is_told_to_go_on_too(first: Model) -> None:
    feeds = first.rows(1)
    body, headers = framed(*first.request(feeds))
    head = first.target.bytes_of("POST", first.infer_path, b"", {**headers, "Expect": "100-continue", "Content-Length": str(len(body))}, framed=False)
    with first.target.connect() as connection:
        connection.sock.settimeout(2.0)
        connection.send(first.bytes_of(feeds) + head)
        first.answer(connection.reply())
        assert connection.head()[0] == 100
        connection.send(body)
        same(first.answer(connection.reply()), first.infer(feeds))


# --- many at once -----------------------------------------------------------------------------------------------------


def test_64_clients_at_once_each_get_their_own_answers(model: Model) -> None:
    clients, turns = 64, 4
    expected = [model.infer(model.rows(1, seed)) for seed in range(clients)]
    start = Barrier(clients)

    def ask(number: int) -> None:
        with model.target.connect() as connection:
            start.wait(30)
            for turn in range(turns):
                connection.send(model.bytes_of(model.rows(1, number), binary=model.binary and (number + turn) % 2 == 0, id=f"{number}/{turn}"))
                answer = model.answer(connection.reply())
                assert answer.tree["id"] == f"{number}/{turn}"
                for name, values in answer.outputs.items():
                    assert values.shape == expected[number].outputs[name].shape
                    assert close(values, expected[number].outputs[name]), f"client {number} got another's {name}"

    with ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(ask, number) for number in range(clients)]:
            done.result(60)


# --- who leaves -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_client_that_leaves_in_the_middle_disturbs_nobody(model: Model, reset: bool) -> None:
    feeds = model.rows(model.largest)
    data, expected = model.bytes_of(feeds, binary=model.binary), model.infer(feeds)
    with model.target.connect() as stays:
        for share in (0.1, 0.5, 0.99, 1.0):
            with model.target.connect() as leaves:
                leaves.send(data[: int(len(data) * share)])
                if reset:
                    leaves.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            stays.send(data)
            same(model.answer(stays.reply()), expected)
            same(model.infer(feeds), expected)


def test_a_client_that_stops_sending_in_the_middle_is_refused_or_closed(first: Model) -> None:
    data = first.bytes_of(first.rows(1))
    for cut in (1, 20, len(data) - 1):
        with first.target.connect() as connection:
            connection.send(data[:cut])
            connection.no_more()
            assert [reply.status for reply in connection.rest() if not 400 <= reply.status < 500] == []
        first.target.is_well()


# --- abuse --------------------------------------------------------------------------------------------------------------
# {second}: a request that must never be answered as if it had been sent openly. {n}: its length.

SECOND = b"GET /v2/health/ready HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST {infer} HTTP/1.1\r\nHost: a\r\n"
SMUGGLED: dict[str, bytes] = {
    "Content-Length twice": POST + b"Content-Length: 0\r\nContent-Length: {n}\r\n\r\n{second}",
    "Content-Length twice the other way": POST + b"Content-Length: {n}\r\nContent-Length: 0\r\n\r\n{second}",
    "Content-Length twice the same": POST + b"Content-Length: {n}\r\nContent-Length: {n}\r\n\r\n{second}",
    "Content-Length as a list": POST + b"Content-Length: 0, {n}\r\n\r\n{second}",
    "Content-Length signed": POST + b"Content-Length: +{n}\r\n\r\n{second}",
    "Content-Length negative": POST + b"Content-Length: -1\r\n\r\n{second}",
    "Content-Length hexadecimal": POST + b"Content-Length: 0x10\r\n\r\n{second}",
    "Content-Length with a space in it": POST + b"Content-Length: 1 0\r\n\r\n{second}",
    "Content-Length that is no number": POST + b"Content-Length: x\r\n\r\n{second}",
    "Content-Length beyond 2^64": POST + b"Content-Length: 18446744073709551616\r\n\r\n{second}",
    "Content-Length beyond 2^64 by the second's length": POST + b"Content-Length: 18446744073709551617\r\n\r\n{second}",
    "Content-Length empty": POST + b"Content-Length: \r\n\r\n{second}",
    "Content-Length with a space before the colon": POST + b"Content-Length : {n}\r\n\r\n{second}",
    "Content-Length with Transfer-Encoding": POST + b"Content-Length: {n}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{second}",
    "Transfer-Encoding with Content-Length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n{second}",
    "Transfer-Encoding twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{second}",
    "Transfer-Encoding twice, the last unknown": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: nonsense\r\n\r\n0\r\n\r\n{second}",
    "Transfer-Encoding not chunked last": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n{second}",
    "Transfer-Encoding unknown": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n{second}",
    "Transfer-Encoding with a space before the colon": POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n{second}",
    "Transfer-Encoding with a vertical tab": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n{second}",
    "Transfer-Encoding folded": POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n{second}",
    "Transfer-Encoding behind a null byte": POST + b"X: a\0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{second}",
    "Transfer-Encoding of a coding that nobody undoes": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "no Host": b"GET /v2/health/live HTTP/1.1\r\n\r\n",
    "a folded header": b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
    "a first header that is folded": b"GET /v2/health/live HTTP/1.1\r\n Host: a\r\n\r\n",
    "lines that end in a bare LF": b"GET /v2/health/live HTTP/1.1\nHost: a\n\n",
    "one header that ends in a bare LF": b"GET /v2/health/live HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
    "a bare CR in a header": b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\nX: b\rY: c\r\n\r\n",
    "an end of head in bare LF": b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\nX: b\r\n\r\n",
    "a null byte in a value": b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
    "a null byte in a name": b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\nX\0: a\r\n\r\n",
    "a null byte in the path": b"GET /v2/health\0/live HTTP/1.1\r\nHost: a\r\n\r\n",
    "a name with a space in it": b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\nX Y: a\r\n\r\n",
    "a header without a colon": b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\nX\r\n\r\n",
    "a header without a name": b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n: a\r\n\r\n",
    "a chunk's size with 0x": POST + b"Transfer-Encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n",
    "a chunk's size signed": POST + b"Transfer-Encoding: chunked\r\n\r\n+2\r\n{}\r\n0\r\n\r\n",
    "a chunk's size negative": POST + b"Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n",
    "a chunk's size beyond 2^64": POST + b"Transfer-Encoding: chunked\r\n\r\n10000000000000002\r\n{}\r\n0\r\n\r\n",
    "a chunk's size that is none": POST + b"Transfer-Encoding: chunked\r\n\r\nx\r\n{}\r\n0\r\n\r\n",
    "a chunk longer than its size": POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{}\r\n0\r\n\r\n",
    "a chunk's line that ends in a bare LF": POST + b"Transfer-Encoding: chunked\r\n\r\n2\n{}\r\n0\r\n\r\n",
    "a chunk that ends in a bare LF": POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\n0\r\n\r\n",
    "an extension that ends in a bare LF": POST + b"Transfer-Encoding: chunked\r\n\r\n2;a\n{}\r\n0\r\n\r\n",
    "no request at all": b"hello\r\n\r\n",
    "HTTP/0.9": b"GET /v2/health/live\r\n\r\n",
    "HTTP/3.0": b"GET /v2/health/live HTTP/3.0\r\nHost: a\r\n\r\n",
    "a protocol that is not HTTP": b"GET /v2/health/live HTTQ/1.1\r\nHost: a\r\n\r\n",
    "two spaces in the request": b"GET  /v2/health/live  HTTP/1.1\r\nHost: a\r\n\r\n",
    "a small-letter method": b"get /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n",
    "a method that is none": b"NONSENSE /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n",
    "a greeting of TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    "null bytes": bytes(1000),
}  # fmt: skip


# What is read in one way only, so that a server may answer it; once.
EITHER_WAY = {"HTTP/0.9", "two spaces in the request", "no Host", "Transfer-Encoding of a coding that nobody undoes"}


def replies_to(target: Target, data: bytes) -> list[Reply]:
    """All replies until the server closes; it is told that nothing more comes."""
    with target.connect() as connection:
        connection.send_until_cut(data)
        try:
            replies = [connection.reply()]
        except ClosedError:
            return []
        connection.no_more()
        return [*replies, *connection.rest()]


def is_a_refusal(target: Target, reply: Reply) -> None:
    """A server in front of the one under test refuses malformed HTTP in its own words."""
    assert 400 <= reply.status < 500 or reply.status in (501, 505), f"{reply.status}: {reply.raw[:200]!r}"
    if target.own_parser or reply.headers.get("content-type", "").startswith("application/json"):
        error_of(reply)


@pytest.mark.parametrize("name", SMUGGLED)
def test_a_request_of_two_readings_is_refused_and_what_follows_is_not_read(first: Model, name: str) -> None:
    data = SMUGGLED[name].replace(b"{infer}", (first.target.prefix + first.infer_path).encode()).replace(b"/v2/health", first.target.prefix.encode() + b"/v2/health")
    second = SECOND.replace(b"/v2/health", first.target.prefix.encode() + b"/v2/health")
    data = data.replace(b"{second}", second).replace(b"{n}", b"%d" % len(second))
    replies = replies_to(first.target, data)
    assert len(replies) <= 1, f"answered {[reply.status for reply in replies]}: a second request was read out of the first"
    for reply in replies:
        if reply.status != 200 or name not in EITHER_WAY:
            is_a_refusal(first.target, reply)
    first.target.is_well()


LARGE: dict[str, bytes] = {
    "a Content-Length of 4 GB": POST + b"Content-Length: 4294967296\r\n\r\n{}",
    "a chunk of 4 GB": POST + b"Transfer-Encoding: chunked\r\n\r\n100000000\r\n{}",
    "a URL of a megabyte": b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "a header of a megabyte": b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\nX: " + b"a" * (1 << 20) + b"\r\n\r\n",
    "a header's name of a megabyte": b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n" + b"a" * (1 << 20) + b": a\r\n\r\n",
    "ten thousand headers": b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n" + b"".join(b"X-%d: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n" % number for number in range(10_000)) + b"\r\n",
    "a request that never ends": b"GET /" + b"a" * (4 << 20),
    "a chunk's extension that never ends": POST + b"Transfer-Encoding: chunked\r\n\r\n2;" + b"a" * (4 << 20),
    "a trailer that never ends": POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n" + b"X: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n" * 100_000,
    "empty lines before the request": b"\r\n" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("data", LARGE.values(), ids=LARGE.keys())
def test_what_is_too_large_is_refused_or_closed(first: Model, data: bytes) -> None:
    data = data.replace(b"{infer}", (first.target.prefix + first.infer_path).encode()).replace(b"/v2/health", first.target.prefix.encode() + b"/v2/health")
    with first.target.connect() as connection:
        connection.send_until_cut(data)
        connection.no_more()
        for reply in connection.rest():
            is_a_refusal(first.target, reply)
    first.target.is_well()


def test_a_body_in_200_000_chunks_is_read_or_refused_and_others_are_answered_meanwhile(first: Model) -> None:
    with first.target.connect() as connection:
        connection.send_until_cut(chunked(first, [b" "] * 200_000, {}))
        first.target.is_well()
        refused(connection.reply())


def test_connections_that_say_nothing_hold_nobody_up(first: Model) -> None:
    idle: list[Connection] = []
    try:
        for number in range(200):
            idle.append(first.target.connect())
            idle[-1].send(b"" if number % 2 else first.target.bytes_of("POST", first.infer_path, b"", {"Content-Length": "100"}, framed=False))
        first.infer(first.rows(1))
    finally:
        for connection in idle:
            connection.close()
    first.target.is_well()


def large_bodies() -> Iterator[tuple[str, bytes]]:
    yield "JSON", json.dumps({"inputs": [], "parameters": {"x": "a" * (70 << 20)}}).encode()
    yield "lists", b'{"inputs": [' + b"[]," * (6 << 20) + b"[]]}"


def test_a_body_of_many_megabytes_is_refused_and_the_next_one_answered(first: Model) -> None:
    for name, body in large_bodies():
        with first.target.connect() as connection:
            connection.send_until_cut(first.target.bytes_of("POST", first.infer_path, body))
            try:
                refused(connection.reply(), 400, 413)
            except ClosedError:
                assert name  # a refusal may be lost when the server closes before everything was sent
        first.infer(first.rows(1))
