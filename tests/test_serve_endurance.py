"""What only shows after many repetitions: loads and unloads that leave something behind, answers that go astray, memory that creeps.

Real published versions on a replica in a process of its own. Every version has weights of its own and all have the same shapes, so an answer
that came from another model, version or row is a wrong one.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from published import FEATURES, Process, Shelf, descriptors, rss_kib, threads, weights_of
from test_http import raw, reply
from tritonclient.grpc import service_pb2

from portaisys.serve.grpc import SERVICE

# MLflow's own, of sqlalchemy's and others' ways that will go.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

MODELS = {"ant": {"1": 11, "2": 12, "3": 13}, "bee": {"1": 21, "2": 22}, "cat": {"1": 31}}  # version -> seed of its weights
WAYS = [(name, version, seed) for name, versions in MODELS.items() for version, seed in versions.items()]
WAYS += [(name, "", max(versions.values())) for name, versions in MODELS.items()]  # the first that is named answers by default: the newest
REFERENCES = [f"{name}@{','.join(versions)}" for name, versions in MODELS.items()]

HTTP_REQUESTS, GRPC_REQUESTS = 94_000, 6_000
SOAK_S = 600.0
MIB = 1024


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        shelf = Shelf(tmp_path_factory.mktemp("shelf"))
        for name, versions in MODELS.items():
            for seed in versions.values():
                shelf.publish(name, seed)
        shelf.publish("comes", 41)
        shelf.publish("comes", 42)
        shelf.damage(shelf.publish("damaged", 51))
        shelf.publish("failed", 61, verdict="fail")
        yield shelf


@pytest.fixture(scope="module")
def replica(shelf: Shelf) -> Iterator[Process]:
    with shelf.apart(*REFERENCES) as process:
        yield process


def rows_of(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, FEATURES)).astype(np.float32)


def path_of(name: str, version: str) -> str:
    return f"/v2/models/{name}{f'/versions/{version}' if version else ''}/infer"


def ask(port: int, method: str, path: str, tree: object = None) -> tuple[int, Any]:
    body = b"" if tree is None else json.dumps(tree).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        status, _, said = reply(sock.makefile("rb"))
    return status, json.loads(said)


def infer(stream: Any, name: str, version: str, seed: int, x: np.ndarray, headers: str = "") -> int:
    """The status of an answer, which is a right one if there is one."""
    stream.write(raw(x, path=path_of(name, version), headers=headers))
    stream.flush()
    status, fields, body = reply(stream)
    if status == 200:
        found = np.frombuffer(body[int(fields["inference-header-content-length"]) :], np.float32).reshape(len(x), -1)
        np.testing.assert_allclose(found, x @ weights_of(seed), atol=1e-5)
    return status


# --- loads and unloads ------------------------------------------------------------------------------------------------


def cycle(port: int, number: int) -> None:
    """Comes, is replaced by its other version, answers, goes; and two that cannot come."""
    first, second = ("1", 41), ("2", 42)
    for version, seed in (first, second) if number % 2 else (second, first):
        assert ask(port, "POST", "/v2/repository/models/comes/load", {"parameters": {"reference": version}}) == (200, {})
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
            assert infer(sock.makefile("rwb"), "comes", "", seed, rows_of(3, number)) == 200
    assert ask(port, "POST", "/v2/repository/models/damaged/load", {"parameters": {"reference": "1"}})[0] == 400
    assert ask(port, "POST", "/v2/repository/models/failed/load", {"parameters": {"reference": "1"}})[0] == 409
    assert ask(port, "POST", "/v2/repository/models/comes/unload", {}) == (200, {})
    assert ask(port, "GET", "/v2/models/comes")[0] == 404


def test_a_hundred_loads_and_unloads_with_failing_ones_among_them_leave_memory_descriptors_and_threads_as_they_were(
    replica: Process,
) -> None:
    port, pid = replica.ports["http"], replica.pid
    for number in range(20):
        cycle(port, number)
    memory, opened, running = rss_kib(pid), descriptors(pid), threads(pid)
    for number in range(20, 100):
        cycle(port, number)
    grown = (rss_kib(pid) - memory) / MIB
    print(f"{grown:.1f} MiB in 80 cycles; {len(opened)} descriptors, {running} threads")
    assert grown < 10, f"{grown:.1f} MiB more"
    more = kinds(descriptors(pid)) - kinds(opened)
    # The loop's threads for waiting work are made as they are needed, six on two CPUs, each with a connection to the registry of its own, and
    # gRPC's own come and go; one a cycle would be eighty.
    assert more.total() <= 8 and threads(pid) <= running + 8, (more, threads(pid), running)


def kinds(opened: Sequence[str]) -> Counter[str]:
    """How many descriptors of each kind; a connection of a client that just left may still be there."""
    return Counter(name.partition(":[")[0] for name in opened if not name.startswith("socket:"))


# --- whose answer ---------------------------------------------------------------------------------------------------


async def converse(port: int, number: int, requests: int, ways: Sequence[tuple[str, str, int]]) -> int:
    """Pipelined requests over one connection, sixteen at a time, each answer held against its own request's; how many were right."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    rng, right = random.Random(number), 0
    for start in range(0, requests, 16):
        asked = [
            (*rng.choice(ways), rows_of(1 + (start + turn) % 3, number * 1_000_000 + start + turn))
            for turn in range(min(16, requests - start))
        ]
        data = [
            raw(x, path=path_of(name, version), headers="Accept-Encoding: gzip\r\n" if turn == 5 else "")
            for turn, (name, version, _, x) in enumerate(asked)
        ]
        writer.write(b"".join(data))
        for name, version, seed, x in asked:
            head = await reader.readuntil(b"\r\n\r\n")
            lines = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:-2])
            body = await reader.readexactly(int(lines["Content-Length"]))
            assert head.startswith(b"HTTP/1.1 200 "), body
            assert lines["X-Portaisys-Lineage"].startswith(f"{name}/{version or max(MODELS[name], key=int)} ")
            found = np.frombuffer(body[int(lines["Inference-Header-Content-Length"]) :], np.float32).reshape(len(x), -1)
            right += found.shape == (len(x), 4) and bool((abs(found - x @ WEIGHTS[seed]) < 1e-4).all())
    writer.close()
    await writer.wait_closed()
    return right


WEIGHTS = {seed: weights_of(seed) for _, _, seed in WAYS}


def over_grpc(port: int, requests: int, ways: Sequence[tuple[str, str, int]]) -> int:
    """Sixty-four calls at a time; how many answers were right."""
    rng, right = random.Random(0), 0
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        for start in range(0, requests, 64):
            asked = [(*rng.choice(ways), rows_of(1 + turn % 3, start + turn)) for turn in range(min(64, requests - start))]
            for (name, version, seed, x), answer in [(one, call.future(grpc_request(*one), timeout=60)) for one in asked]:
                said = service_pb2.ModelInferResponse.FromString(answer.result())
                found = np.frombuffer(said.raw_output_contents[0], np.float32).reshape(len(x), -1)
                right += (
                    said.model_name == name
                    and said.model_version == (version or max(MODELS[name], key=int))
                    and bool((abs(found - x @ WEIGHTS[seed]) < 1e-4).all())
                )
    return right


def grpc_request(name: str, version: str, seed: int, x: np.ndarray) -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape)}
    return bytes(
        service_pb2.ModelInferRequest(
            model_name=name, model_version=version, inputs=[tensor], raw_input_contents=[x.tobytes()]
        ).SerializeToString()
    )


def test_of_a_hundred_thousand_mixed_requests_none_is_answered_by_another_model_version_or_row(replica: Process) -> None:
    connections = 20

    async def all_of_them() -> list[int]:
        return await asyncio.gather(
            *(converse(replica.ports["http"], number, HTTP_REQUESTS // connections, WAYS) for number in range(connections))
        )

    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(over_grpc, replica.ports["grpc"], GRPC_REQUESTS, WAYS)
        right = sum(asyncio.run(all_of_them()))
        assert (right, others.result(120)) == (HTTP_REQUESTS, GRPC_REQUESTS)


# --- ten minutes ------------------------------------------------------------------------------------------------------

BAD = [
    b"nonsense\r\n\r\n", b"POST /v2/models/ant/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 4294967296\r\n\r\n", raw(rows_of(1, 0)[:, :3], path=path_of("ant", "")), raw(rows_of(1, 0), path=path_of("nobody", "")),
    raw(rows_of(1, 0), path=path_of("ant", ""))[:-4] + b"\0\0\xc0\x7f", b"POST /v2/models/bee/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" + b"[" * 100_000,
    b"POST /v2/models/bee/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
]  # fmt: skip


def good_traffic(replica: Process, rng: random.Random) -> None:
    with socket.create_connection(("127.0.0.1", replica.ports["http"]), timeout=60) as sock:
        stream = sock.makefile("rwb")
        for turn in range(50):
            assert (
                infer(
                    stream, *rng.choice(WAYS), rows_of(1 + turn % 20, rng.randrange(10**6)), rng.choice(["", "Accept-Encoding: gzip\r\n"])
                )
                == 200
            )


def bad_traffic(replica: Process, rng: random.Random) -> None:
    with socket.create_connection(("127.0.0.1", replica.ports["http"]), timeout=60) as sock:
        sock.sendall(rng.choice(BAD))
        status, _, body = reply(sock.makefile("rb"))
        assert 400 <= status < 500 and set(json.loads(body)) == {"error"}


def clients_that_leave(replica: Process, rng: random.Random) -> None:
    name, version, seed = rng.choice(WAYS)
    data = raw(rows_of(16, 0), path=path_of(name, version))
    with socket.create_connection(("127.0.0.1", replica.ports["http"]), timeout=60) as sock:
        sock.sendall((data * 4)[: rng.randrange(len(data) * 4)])
    with grpc.insecure_channel(f"127.0.0.1:{replica.ports['grpc']}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        for answer in [call.future(grpc_request(name, version, seed, rows_of(16, 0)), timeout=60) for _ in range(20)]:
            answer.cancel()
        # Calls are taken up in the order they came: those given up are gone by then. Without it they would come faster than a busy replica takes
        # them up, and gRPC ends calls of others once thousands wait.
        assert call(grpc_request(name, version, seed, rows_of(16, 0)), timeout=60)


def loads(replica: Process, rng: random.Random) -> None:
    cycle(replica.ports["http"], rng.randrange(1000))


def grpc_traffic(replica: Process, rng: random.Random) -> None:
    assert over_grpc(replica.ports["grpc"], 200, WAYS) == 200


def until_the_end(work: Callable[[Process, random.Random], None], replica: Process, seed: int, over: threading.Event) -> int:
    """Again and again; how often."""
    rng, times = random.Random(seed), 0
    while not over.is_set():
        work(replica, rng)
        times += 1
    return times


LEAVER = """
import random, sys, threading
from published import Process
from test_serve_endurance import clients_that_leave, until_the_end

over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
print(until_the_end(clients_that_leave, Process(0, {"http": int(sys.argv[1]), "grpc": int(sys.argv[2])}), 0, over))
"""


def leaving(replica: Process, over: threading.Event) -> int:
    """Clients that leave, in a process of their own: in one with others, gRPC's client ends some of the others' calls as cancelled too."""
    command = [sys.executable, "-c", LEAVER, str(replica.ports["http"]), str(replica.ports["grpc"])]
    with subprocess.Popen(command, cwd=Path(__file__).parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        over.wait()
        return int(process.communicate(timeout=120)[0].splitlines()[-1])


@pytest.mark.slow
def test_ten_minutes_of_good_bad_and_abandoned_requests_with_loads_and_unloads_leave_memory_flat(shelf: Shelf) -> None:
    works = [good_traffic, good_traffic, bad_traffic, loads, grpc_traffic]
    memory, over = [], threading.Event()
    with shelf.apart(*REFERENCES) as replica, ThreadPoolExecutor(len(works) + 1) as pool:
        running = [pool.submit(until_the_end, work, replica, seed, over) for seed, work in enumerate(works)]
        running.append(pool.submit(leaving, replica, over))
        deadline = time.monotonic() + SOAK_S
        try:
            while (left_s := deadline - time.monotonic()) > 0 and not any(one.done() for one in running):
                memory.append(rss_kib(replica.pid) / MIB)
                over.wait(min(left_s, SOAK_S / 60))
        finally:
            over.set()
        times = [one.result(120) for one in running]
        opened, running_threads = descriptors(replica.pid), threads(replica.pid)
    warm, last = memory[len(memory) // 5 :][:12], memory[-12:]
    print(
        f"{dict(zip((*(work.__name__ for work in works), 'leaving'), times, strict=True))}; MiB {[round(one, 1) for one in memory]}; {len(opened)} descriptors, {running_threads} threads"
    )
    assert all(times) and np.median(last) - np.median(warm) < 10, f"{np.median(last) - np.median(warm):.1f} MiB more"
