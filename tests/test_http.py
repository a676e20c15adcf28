"""The data port: real sockets against the real loop, with a small numpy engine behind the real batcher."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from test_protocol import Held, Linear
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from portaisys.serve import http
from portaisys.serve.batcher import Batcher
from portaisys.serve.core import Core, Listen
from portaisys.serve.http import Bounds, Connection
from portaisys.serve.model import ServedModel, Stats
from portaisys.serve.repository import Repository
from portaisys.spec import UserError

WEIGHTS = np.arange(24, dtype=np.float32).reshape(6, 4) / 10


def served(name: str, version: str, engine: Any = None, **limits: Any) -> ServedModel:
    engine, stats = engine or Linear(), Stats()
    batcher = Batcher(engine.run, **{"max_batch": 8, "max_queue": 64, "observe": stats.batch, **limits})
    return ServedModel(name, version, engine, batcher, (), {"digest": "d" * 64}, (), stats)


class Running:
    """A core with models that are made when they are loaded."""

    def __init__(self, *references: str, bounds: Bounds | None = None, engine: Any = None, **limits: Any) -> None:
        self.engine, self.limits, self.statuses = engine, limits, []

        def opener(reference: str) -> ServedModel:
            name, _, version = reference.partition("@")
            if version == "99":
                raise UserError("/secret/version.json is damaged")
            return served(name, version, self.engine, **self.limits)

        self.models = Repository(opener, lambda reference: reference.replace(",", f",{reference.partition('@')[0]}@").split(",")[::-1])
        self.core = Core(self.models, references or ("tiny@3",), Listen(http_port=0), self.statuses.append, bounds).start()
        self.port = self.core.ports["http"]

    def client(self) -> InferenceServerClient:
        return InferenceServerClient(f"127.0.0.1:{self.port}", network_timeout=20, connection_timeout=20)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: Any) -> None:
        self.core.stop(drain_s=1)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with Running() as running:
        yield running


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 2, 3)).astype(np.float32)


def infer(client: InferenceServerClient, x: np.ndarray, *, binary: bool = True, model: str = "tiny", **options: Any) -> np.ndarray:
    tensor = InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x, binary_data=binary)
    return client.infer(model, [tensor], outputs=[InferRequestedOutput("logits", binary_data=binary)], **options).as_numpy("logits")


def expected(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, 6) @ WEIGHTS


def raw(x: np.ndarray, *, path: str = "/v2/models/tiny/infer", headers: str = "", **tree: Any) -> bytes:
    head = json.dumps(
        {"inputs": [{"name": "x", "shape": list(x.shape), "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}], "parameters": {"binary_data_output": True}, **tree}
    ).encode()
    lines = f"POST {path} HTTP/1.1\r\nHost: a\r\nInference-Header-Content-Length: {len(head)}\r\nContent-Length: {len(head) + x.nbytes}\r\n{headers}\r\n"
    return lines.encode() + head + x.tobytes()


def reply(stream: Any) -> tuple[int, dict[str, str], bytes]:
    """One response off a socket's file."""
    status = int(stream.readline().split()[1])
    headers = {}
    while (line := stream.readline().strip()) != b"":
        name, _, value = line.decode().partition(": ")
        headers[name.lower()] = value
    return status, headers, stream.read(int(headers["content-length"]))


def tensors(body: bytes, headers: dict[str, str]) -> np.ndarray:
    return np.frombuffer(body[int(headers["inference-header-content-length"]) :], np.float32).reshape(-1, 4)


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_an_unmodified_client_gets_the_right_answers(server: Running, binary: bool, compression: str | None) -> None:
    client = server.client()
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny", "3")
    assert client.get_model_metadata("tiny")["versions"] == ["3"]
    for batch in (1, 2, 8, 20):
        x = rows(batch, batch)
        answers = infer(client, x, binary=binary, request_compression_algorithm=compression, response_compression_algorithm=compression)
        np.testing.assert_allclose(answers, expected(x), rtol=1e-5, atol=1e-6)


def test_a_repeated_request_takes_the_fast_lane_and_is_counted(server: Running) -> None:
    stream = server.connect().makefile("rwb")
    before = server.models.pick("tiny").stats.requests
    for seed in range(20):
        x = rows(2, seed)
        stream.write(raw(x, headers="X-Request-ID: r7\r\n", id="a"))
        stream.flush()
        status, headers, body = reply(stream)
        assert status == 200 and headers["x-portaisys-lineage"] == "tiny/3 fp32 dddddddddddd" and headers["x-request-id"] == "r7"
        assert json.loads(body[: int(headers["inference-header-content-length"])])["id"] == "a"
        np.testing.assert_allclose(tensors(body, headers), expected(x), rtol=1e-5, atol=1e-6)
    assert server.models.pick("tiny").stats.requests == before + 20
    assert any(known.head.id == "a" for known in server.core._port.lane._known.values())


def test_pipelined_requests_are_answered_in_order_fast_and_slow_ones_mixed(server: Running) -> None:
    stream = server.connect().makefile("rwb")
    xs = [rows(1, seed) for seed in range(60)]
    for number, x in enumerate(xs):
        stream.write(raw(x, headers="Accept-Encoding: gzip\r\n" if number % 3 == 0 else "") + b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n" * (number % 2))
    stream.flush()
    for number, x in enumerate(xs):
        status, headers, body = reply(stream)
        assert status == 200
        np.testing.assert_allclose(tensors(body, headers), expected(x), rtol=1e-5, atol=1e-6)
        if number % 2:
            assert reply(stream)[2] == b'{"live":true}'


@pytest.mark.parametrize("together", [True, False], ids=["in one write", "one after the other"])
def test_pipelined_answers_carry_the_ids_of_their_own_requests_in_order(server: Running, together: bool) -> None:
    kinds = [raw(X, headers="X-Request-ID: {0}\r\n"), raw(X, headers="X-Request-ID: {0}\r\nAccept-Encoding: gzip\r\n"), b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\nX-Request-ID: {0}\r\n\r\n"]
    requests = [kinds[number % 3].replace(b"{0}", b"r%d" % number) for number in range(300)]
    with server.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sending = threading.Thread(target=lambda: [sock.sendall(data) for data in ([b"".join(requests)] if together else requests)])
        sending.start()
        stream = sock.makefile("rb")
        answers = [reply(stream) for _ in requests]
        sending.join(10)
    assert [(status, headers["x-request-id"]) for status, headers, _ in answers] == [(200, f"r{number}") for number in range(300)]


def test_a_request_read_between_an_answer_and_the_next_waits_behind_those_that_wait(server: Running) -> None:
    sent: list[bytes] = []

    async def scene() -> None:
        connection = Connection(server.core._port)
        connection.connection_made(SimpleNamespace(write=sent.append, close=lambda: None, pause_reading=lambda: None, resume_reading=lambda: None))  # type: ignore[arg-type]
        get = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\nX-Request-ID: %d\r\n\r\n"
        connection.data_received(get % 0 + get % 1)
        while len(sent) == 0:
            await asyncio.sleep(0)
        connection.data_received(get % 2)  # the first is answered, the second waits for the loop's next turn
        while len(sent) < 3:
            await asyncio.sleep(0)
        server.core._port.connections.discard(connection)

    server.core.run(scene())
    assert [line for data in sent for line in data.split(b"\r\n") if line.startswith(b"X-Request-ID")] == [b"X-Request-ID: %d" % number for number in range(3)]


def test_many_clients_at_once_get_their_own_answers_in_shared_batches(server: Running) -> None:
    failed: list[Any] = []

    def ask(number: int) -> None:
        with server.connect() as sock:
            stream = sock.makefile("rwb")
            for turn in range(30):
                x = rows(1 + number % 3, 1000 * number + turn)
                stream.write(raw(x))
                stream.flush()
                status, headers, body = reply(stream)
                if status != 200 or not np.allclose(tensors(body, headers), expected(x), rtol=1e-5, atol=1e-6):
                    failed.append((number, turn, status))

    stats = server.models.pick("tiny").stats
    batches, requests = stats.batches, stats.requests
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == [] and stats.requests - requests == 720 and stats.batches - batches < 720


def test_a_body_in_a_thousand_chunks_is_put_together(server: Running) -> None:
    x = rows(3)
    head, _, body = raw(x).partition(b"\r\n\r\n")
    lines = b"\r\n".join(line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")) + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
    with server.connect() as sock:
        sock.sendall(lines)
        for byte in body:
            sock.sendall(b"1\r\n%c\r\n" % byte)
        sock.sendall(b"0\r\n\r\n")
        status, headers, answer = reply(sock.makefile("rb"))
    assert status == 200
    np.testing.assert_allclose(tensors(answer, headers), expected(x), rtol=1e-5, atol=1e-6)


def test_a_client_that_expects_a_continue_gets_it(server: Running) -> None:
    x = rows(1)
    head, _, body = raw(x, headers="Expect: 100-continue\r\n").partition(b"\r\n\r\n")
    with server.connect() as sock:
        sock.sendall(head + b"\r\n\r\n")
        stream = sock.makefile("rb")
        assert stream.readline() == b"HTTP/1.1 100 Continue\r\n" and stream.readline() == b"\r\n"
        sock.sendall(body)
        assert reply(stream)[0] == 200


# --- what is refused ------------------------------------------------------------------------------------------------


def asks(server: Running, data: bytes) -> tuple[int, str, bytes]:
    """Status and error of what came back, and what came after it until the connection closed."""
    with server.connect() as sock:
        sock.sendall(data)
        stream = sock.makefile("rb")
        status, _, body = reply(stream)
        sock.shutdown(socket.SHUT_WR)
        return status, json.loads(body)["error"], stream.read()


X = rows(1)


@pytest.mark.parametrize(
    ("data", "status", "says"),
    [
        (raw(X)[:-4] + b"\0\0\xc0\x7f", 400, "NaN"),
        (raw(X, path="/v2/models/other/infer"), 404, "unknown model; this server has tiny"),
        (raw(X, path="/v2/models/tiny/versions/9/infer"), 404, "unknown version"),
        (raw(X[:, :1]), 400, "has shape"),
        (raw(X, inputs=[]), 400, "missing input x"),
        (b"GET /v2/nothing HTTP/1.1\r\nHost: a\r\n\r\n", 404, "no such route"),
        (b"DELETE /v2 HTTP/1.1\r\nHost: a\r\n\r\n", 405, "this route answers GET"),
        (b"nonsense\r\n\r\n", 400, "this is no HTTP"),
        (b"GET /v2 HTTP/1.1\r\n\r\n", 400, "names one Host"),
        (b"GET /v2\r\n\r\n", 400, "this is no HTTP"),
        (b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501, "the only Transfer-Encoding is chunked"),
        (b"GET /v2 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400, ""),
        (b"POST /v2 HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, ""),
        (b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 4294967296\r\n\r\n", 413, "the body exceeds"),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414, "the URL exceed"),
        (b"GET /v2 HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 40_000 + b"\r\n\r\n", 431, "the headers exceed"),
    ],
)
def test_a_wrong_request_is_refused_with_a_reason_and_the_next_client_is_answered(server: Running, data: bytes, status: int, says: str) -> None:
    found, error, _ = asks(server, data)
    assert found == status and says in error
    np.testing.assert_allclose(infer(server.client(), X), expected(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("good", [1, 3])
@pytest.mark.parametrize("slow", [False, True], ids=["fast lane", "slow lane"])
def test_good_requests_before_a_broken_one_are_answered_before_it_is_refused(server: Running, good: int, slow: bool) -> None:
    requests = [raw(X, headers=f"X-Request-ID: {number}\r\n" + "Accept-Encoding: gzip\r\n" * slow) for number in range(good)]
    with server.connect() as sock:
        sock.sendall(b"".join(requests) + b"nonsense\r\n\r\n" + raw(X))
        stream = sock.makefile("rb")
        answers = [reply(stream) for _ in range(good + 1)]
        assert [(status, headers.get("x-request-id")) for status, headers, _ in answers] == [*((200, str(number)) for number in range(good)), (400, None)]
        assert answers[-1][1]["connection"] == "close" and stream.read() == b""


def test_a_wish_for_another_protocol_is_not_followed_and_ends_the_connection(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n" + raw(X))
        stream = sock.makefile("rb")
        status, headers, body = reply(stream)
        assert (status, body, headers["connection"], stream.read()) == (200, b'{"live":true}', "close", b"")


def test_a_header_that_smuggles_a_second_request_is_answered_once(server: Running) -> None:
    second = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n"
    for framing in (b"Content-Length: %d\r\nTransfer-Encoding: chunked" % len(second), b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", b"Content-Length: +%d" % len(second)):
        status, _, rest = asks(server, b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: a\r\n" + framing + b"\r\n\r\n" + second)
        assert status == 400 and rest == b""


def test_a_request_that_does_not_arrive_is_ended_in_time_and_an_idle_connection_too() -> None:
    with Running(bounds=Bounds(request_s=0.2, idle_s=0.2)) as server, server.connect() as slow, server.connect() as idle:
        slow.sendall(b"POST /v2/models/tiny/infer HTTP/1.1\r\nContent-")
        stream = idle.makefile("rwb")
        stream.write(raw(X))
        stream.flush()
        assert reply(stream)[0] == 200
        assert stream.read() == b""  # closed without a word: nothing was under way
        status, _, body = reply(slow.makefile("rb"))
        assert status == 408 and "did not arrive within 0.2 s" in json.loads(body)["error"]


def test_beyond_the_bound_of_connections_a_client_is_told_so_and_the_others_go_on() -> None:
    with Running(bounds=Bounds(connections=2)) as server, server.connect() as one, server.connect() as two:
        for sock in (one, two):
            sock.sendall(raw(X))
            assert reply(sock.makefile("rb"))[0] == 200
        with server.connect() as three:
            assert reply(three.makefile("rb"))[0] == 503
        one.sendall(raw(X))
        assert reply(one.makefile("rb"))[0] == 200


# --- load, time, leaving ---------------------------------------------------------------------------------------------


def until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_full_queue_is_503_with_a_time_to_come_back_and_a_timeout_fires_while_the_batch_runs() -> None:
    engine = Held()
    with Running(engine=engine, max_batch=1, max_queue=1) as server, server.connect() as one, server.connect() as two, server.connect() as three:
        model = server.models.pick("tiny")
        one.sendall(raw(X, parameters={"binary_data_output": True, "timeout": 300_000}))
        until(lambda: model.batcher.busy_s() > 0)
        two.sendall(raw(X))
        until(lambda: model.batcher.queued == 1)
        three.sendall(raw(X))
        status, headers, body = reply(three.makefile("rb"))
        assert status == 503 and int(headers["retry-after"]) >= 1 and "the queue is full" in json.loads(body)["error"]
        status, _, body = reply(one.makefile("rb"))
        assert status == 503 and "timeout" in json.loads(body)["error"]
        assert model.batcher.busy_s() > 0 and model.stats.rejected == {"queue_full": 1, "timeout": 1}
        engine.go.set()
        assert reply(two.makefile("rb"))[0] == 200


def test_a_client_that_leaves_takes_its_request_out_of_the_queue() -> None:
    engine = Held()
    with Running(engine=engine, max_batch=1) as server, server.connect() as one:
        model = server.models.pick("tiny")
        one.sendall(raw(X))
        until(lambda: model.batcher.busy_s() > 0)
        for fast in (True, False):
            with server.connect() as leaves:
                leaves.sendall(raw(X, headers="" if fast else "Accept-Encoding: gzip\r\n"))
                until(lambda: model.batcher.queued == 1)
            until(lambda: model.batcher.queued == 0)
        engine.go.set()
        assert reply(one.makefile("rb"))[0] == 200


def test_a_client_that_does_not_read_is_left_without_holding_anybody_up() -> None:
    with Running(bounds=Bounds(write_s=0.2), max_batch=4096, max_queue=100_000) as server, server.connect() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        big = rows(4096)
        sent = threading.Thread(target=lambda: _send_until_cut(lazy, raw(big)), daemon=True)
        sent.start()
        np.testing.assert_allclose(infer(server.client(), X), expected(X), rtol=1e-5, atol=1e-6)
        sent.join(20)
        assert not sent.is_alive()  # the server cut it off


def _send_until_cut(sock: socket.socket, data: bytes) -> None:
    try:
        for _ in range(2000):
            sock.sendall(data)
    except OSError:
        return


def test_draining_finishes_what_is_under_way_tells_clients_to_leave_and_closes_the_port() -> None:
    engine = Held()
    server = Running(engine=engine)
    with server.connect() as busy, server.connect() as idle:
        busy.sendall(raw(X))
        until(lambda: server.models.pick("tiny").batcher.busy_s() > 0)
        stopping = threading.Thread(target=server.core.stop)
        stopping.start()
        assert idle.recv(1) == b""  # nothing was under way there
        engine.go.set()
        stream = busy.makefile("rb")
        status, headers, _ = reply(stream)
        assert status == 200 and headers["connection"] == "close" and stream.read() == b""
    stopping.join(20)
    with pytest.raises(OSError):
        server.connect()


def test_clients_that_are_connected_and_not_accepted_yet_are_answered_by_a_drain() -> None:
    with Running() as server:
        blocked, go = threading.Event(), threading.Event()
        server.core._loop.call_soon_threadsafe(lambda: (blocked.set(), go.wait(20)))
        assert blocked.wait(10)
        waiting = [server.connect() for _ in range(20)]
        for one in waiting:
            one.sendall(raw(X))
        stopping = threading.Thread(target=server.core.stop, args=(10,))
        draining = asyncio.run_coroutine_threadsafe(server.core._port.drain(10), server.core._loop)  # is the first thing after it
        go.set()
        assert [reply(one.makefile("rb"))[0] for one in waiting] == [200] * 20
        draining.result(20)
        stopping.start()
        stopping.join(20)
        for one in waiting:
            one.close()


def test_the_listener_has_a_higher_descriptor_than_its_connections() -> None:
    """Of a killed process Linux closes the highest first: clients that come back must not meet a listener that is about to go."""
    with Running() as server, server.connect() as one:
        one.sendall(raw(X))
        assert reply(one.makefile("rb"))[0] == 200
        (listener,) = server.core._port._listeners
        (connection,) = server.core._port.connections
        assert listener.fileno() > connection._transport.get_extra_info("socket").fileno()


def test_two_processes_may_share_a_port_and_a_taken_one_is_refused() -> None:
    models = Repository(lambda reference: served("tiny", "3"), lambda reference: [reference])
    with Running() as server, pytest.raises(UserError, match=rf"data_port: cannot listen on 127\.0\.0\.1:{server.port}"):
        Core(models, ("tiny@3",), Listen(http_port=server.port)).start()
    cores = []
    try:
        port = 0
        for _ in range(2):
            models = Repository(lambda reference: served("tiny", "3"), lambda reference: [reference])
            cores.append(Core(models, ("tiny@3",), Listen(http_port=port, shared=True)).start())
            port = cores[-1].ports["http"]
        np.testing.assert_allclose(infer(InferenceServerClient(f"127.0.0.1:{port}"), X), expected(X), rtol=1e-5, atol=1e-6)
    finally:
        for core in cores:
            core.stop(drain_s=1)


# --- models and versions ---------------------------------------------------------------------------------------------


def post(server: Running, path: str, tree: Any = None) -> tuple[int, Any]:
    body = b"" if tree is None else json.dumps(tree).encode()
    with server.connect() as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        status, _, found = reply(sock.makefile("rb"))
    return status, json.loads(found)


def test_versions_are_chosen_in_the_url_and_the_first_named_answers_by_default() -> None:
    with Running("tiny@2,5", "other@1") as server:
        client = server.client()
        assert client.get_model_metadata("tiny")["versions"] == ["2", "5"]
        for version, lineage in (("", "5"), ("2", "2"), ("5", "5")):
            assert client.get_model_metadata("tiny", version)["name"] == "tiny"
            np.testing.assert_allclose(infer(client, X, model_version=version), expected(X), rtol=1e-5, atol=1e-6)
            with server.connect() as sock:
                sock.sendall(raw(X, path=f"/v2/models/tiny{'/versions/' + version if version else ''}/infer"))
                assert reply(sock.makefile("rb"))[1]["x-portaisys-lineage"].startswith(f"tiny/{lineage} ")
        with pytest.raises(InferenceServerException, match="this server has 2, 5"):
            client.get_model_metadata("tiny", "3")


def test_loading_and_unloading_touch_no_other_model_and_a_failing_version_keeps_the_old_one() -> None:
    with Running() as server:
        client = server.client()
        assert [(row["name"], row["version"], row["state"]) for row in client.get_model_repository_index()] == [("tiny", "3", "READY")]
        assert post(server, "/v2/repository/models/second/load", {"parameters": {"reference": "1"}}) == (200, {})
        np.testing.assert_allclose(infer(client, X, model="second"), expected(X), rtol=1e-5, atol=1e-6)
        status, said = post(server, "/v2/repository/models/tiny/load", {"parameters": {"reference": "99"}})
        assert status == 400 and "could not be loaded" in said["error"] and "secret" not in said["error"]
        np.testing.assert_allclose(infer(client, X), expected(X), rtol=1e-5, atol=1e-6)
        assert post(server, "/v2/repository/models/tiny/load", {"parameters": {"reference": "4"}})[0] == 200
        assert client.get_model_metadata("tiny")["versions"] == ["4"]
        client.unload_model("second")
        server.core.run(server.models.refresh())  # following the registry does not bring it back
        with pytest.raises(InferenceServerException, match="unknown model; this server has tiny"):
            infer(client, X, model="second")
        np.testing.assert_allclose(infer(client, X), expected(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["../x", "a" * 10_000, "x%00y", "TINY", "t%69ny/../..", "ti\u0148y"])
def test_a_name_that_is_none_is_refused(server: Running, name: str) -> None:
    for action in ("load", "unload"):
        status, said = post(server, f"/v2/repository/models/{quote(name, safe='/%')}/{action}", {})
        assert status in (400, 404) and set(said) == {"error"}


def test_requests_under_way_are_answered_when_their_model_is_unloaded() -> None:
    engine = Held()
    with Running(engine=engine) as server, server.connect() as one:
        model = server.models.pick("tiny")
        one.sendall(raw(X))
        until(lambda: model.batcher.busy_s() > 0)
        unloading = threading.Thread(target=lambda: post(server, "/v2/repository/models/tiny/unload", {}))
        unloading.start()
        until(lambda: not server.models.served)
        engine.go.set()
        unloading.join(10)
        assert reply(one.makefile("rb"))[0] == 200
        assert asks(server, raw(X))[0] == 404


def test_a_hundred_loads_and_unloads_leave_no_thread_and_no_descriptor_behind() -> None:
    descriptors = lambda: len(list(Path("/proc/self/fd").iterdir()))  # noqa: E731
    with Running() as server:
        for reference in ("1", "99"):
            post(server, "/v2/repository/models/other/load", {"parameters": {"reference": reference}})
        before, threads = descriptors(), threading.active_count()
        for _ in range(50):
            for reference in ("1", "99"):
                post(server, "/v2/repository/models/other/load", {"parameters": {"reference": reference}})
        assert threading.active_count() <= threads + 1 and descriptors() <= before + 2
        assert post(server, "/v2/repository/models/other/unload", {})[0] == 200


# --- statistics and documents ---------------------------------------------------------------------------------------


def test_statistics_count_samples_batches_and_nanoseconds() -> None:
    with Running() as server:
        client = server.client()
        for batch in (1, 2, 2):
            infer(client, rows(batch))
        (stats,) = client.get_inference_statistics("tiny")["model_stats"]
        assert (stats["inference_count"], stats["execution_count"], stats["inference_stats"]["success"]["count"]) == (5, 3, 3)
        assert [(row["batch_size"], row["compute_infer"]["count"]) for row in stats["batch_stats"]] == [(1, 1), (2, 2)]
        assert all(stats["inference_stats"][part]["ns"] > 0 for part in ("success", "queue", "compute_input", "compute_infer", "compute_output"))
        assert client.get_inference_statistics()["model_stats"][0]["name"] == "tiny"


def test_the_openapi_document_describes_the_routes_that_are_there(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(b"GET /v2/openapi.json HTTP/1.1\r\nHost: a\r\n\r\n")
        document = json.loads(reply(sock.makefile("rb"))[2])
    assert document["openapi"] == "3.1.0"
    for path, operations in document["paths"].items():
        concrete = path.replace("{model}", "tiny").replace("{version}", "3")
        for method, operation in operations.items():
            if "unload" in path or "/load" in path:
                continue
            data = f"{method.upper()} {concrete} HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{{}}".encode()
            with server.connect() as sock:
                sock.sendall(data)
                status = reply(sock.makefile("rb"))[0]
            assert str(status) in operation["responses"], (path, status)  # an empty inference request is one of its 400s
    reference = "#/components/schemas/"
    used = {part.split('"')[0] for part in json.dumps(document).split(reference)[1:]}
    assert used <= set(document["components"]["schemas"])


def test_over_tls_with_a_real_certificate(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate), "-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    models = Repository(lambda reference: served("tiny", "3"), lambda reference: [reference])
    core = Core(models, ("tiny@3",), Listen(http_port=0, tls_cert=str(certificate), tls_key=str(key))).start()
    try:
        context = ssl.create_default_context(cafile=str(certificate))
        with socket.create_connection(("127.0.0.1", core.ports["http"]), timeout=10) as plain, context.wrap_socket(plain, server_hostname="localhost") as sock:
            sock.sendall(raw(X))
            status, headers, body = reply(sock.makefile("rb"))
            assert status == 200
            np.testing.assert_allclose(tensors(body, headers), expected(X), rtol=1e-5, atol=1e-6)
    finally:
        core.stop(drain_s=1)


def test_wrong_tls_files_are_named(tmp_path: Path) -> None:
    models = Repository(lambda reference: served("tiny", "3"), lambda reference: [reference])
    with pytest.raises(UserError, match=r"tls_cert: .*none\.pem"):
        Core(models, ("tiny@3",), Listen(http_port=0, tls_cert=str(tmp_path / "none.pem"), tls_key=str(tmp_path / "none.key"))).start()


def test_gzip_is_undone_within_bounds(server: Running) -> None:
    bomb = gzip.compress(bytes(http.Bounds().body_bytes + 1), 9)
    data = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: a\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb
    status, error, _ = asks(server, data)
    assert status == 413 and "uncompressed" in error
