"""The client of serve_batching.py, a process of its own: `python serve_load.py` takes one job a line of JSON and answers each with a line.

Speaks the binary form over connections that stay open. Open loop: requests are due at moments drawn before (Poisson), whatever the server
does, and a latency runs from the moment a request was due, also where it had to wait here for a free connection: nothing that is slow
delays what comes after it, so no wait is left out (coordinated omission). Closed loop: every connection asks again once it is answered.
Every status is looked at, and the numbers of one answer in sixteen. Timers are those of uvloop, whole milliseconds: `late_ms_p99` says
how late requests were sent though a connection was free. Knows nothing of batches.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvloop
from numpy.typing import NDArray

DRAIN_S = 20.0  # what is asked has to be answered within this
CHECK_EVERY = 16


@dataclass(frozen=True)
class Asked:
    """A request as it goes over the wire, and the answer that is right."""

    data: bytes
    right: NDArray[np.float32]


def asked(port: int, model: str, x: NDArray[np.float32], right: NDArray[np.float32]) -> Asked:
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}, separators=(",", ":")).encode()
    lines = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nInference-Header-Content-Length: {len(head)}\r\nContent-Length: {len(head) + x.nbytes}\r\n\r\n"
    return Asked(lines.encode() + head + x.tobytes(), right)


class Client(asyncio.Protocol):
    """One connection. `answered`: told of every answer, by the client that is free again."""

    def __init__(self, answered: Callable[[Client], None]) -> None:
        self._answered = answered
        self._got, self._count = b"", 0
        self.asked: Asked | None = None
        self.due = 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def ask(self, one: Asked, due: float) -> None:
        self.asked, self.due = one, due
        self._transport.write(one.data)

    def data_received(self, data: bytes) -> None:
        self._got += data
        end = self._got.find(b"\r\n\r\n")
        if end < 0:
            return
        begin = self._got.index(b"\r\nContent-Length: ") + 18
        stop = end + 4 + int(self._got[begin : self._got.index(b"\r", begin)])
        if len(self._got) >= stop:
            self._check(self._got[:stop])
            self._got = b""
            self._answered(self)

    def _check(self, reply: bytes) -> None:
        """Raises RuntimeError for another status than 200 and, of one answer in sixteen, for wrong numbers."""
        assert self.asked is not None
        if reply[9:12] != b"200":
            raise RuntimeError(f"answered {reply[:300]!r}")
        self._count += 1
        if self._count % CHECK_EVERY == 1:
            right = self.asked.right
            found = np.frombuffer(reply[-right.nbytes :], np.float32).reshape(right.shape)
            if not np.allclose(found, right, atol=1e-3):
                raise RuntimeError(f"answered {found.ravel()[:4]} where {right.ravel()[:4]} is right")


class Load:
    """Connections to one model, and what they were answered. `asks`: requests in turn."""

    def __init__(self, asks: Sequence[Asked]) -> None:
        self.clients: list[Client] = []
        self.asks, self.turn = asks, 0
        self.latencies_s: list[float] = []
        self.late_s: list[float] = []
        self.done = asyncio.get_running_loop().create_future()

    async def connect(self, port: int, connections: int, answered: Callable[[Client], None]) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self.fail(context.get("exception")))
        for _ in range(connections):
            _, client = await loop.create_connection(lambda: Client(answered), "127.0.0.1", port)
            self.clients.append(client)

    def next(self) -> Asked:
        self.turn += 1
        return self.asks[self.turn % len(self.asks)]

    def fail(self, error: BaseException | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or RuntimeError("a connection failed"))

    def close(self) -> None:
        for client in self.clients:
            client._transport.close()


async def open_loop(port: int, asks: Sequence[Asked], connections: int, rate: float, seconds: float, seed: int) -> dict[str, float]:
    """Requests at `rate` a second for `seconds`; milliseconds at the percentiles, and requests that were answered a second."""
    rng = np.random.default_rng(seed)
    due_s = np.cumsum(rng.exponential(1 / rate, int(rate * seconds * 1.5) + 100))
    due_s = due_s[due_s < seconds]
    load, waiting, free = Load(asks), deque[float](), list[Client]()

    def answered(client: Client) -> None:
        load.latencies_s.append(time.perf_counter() - client.due)
        if waiting:
            client.ask(load.next(), waiting.popleft())
        else:
            free.append(client)
        if len(load.latencies_s) == len(due_s) and not load.done.done():
            load.done.set_result(None)

    await load.connect(port, connections, answered)
    free.extend(load.clients)
    started = time.perf_counter() + 0.01
    for due in due_s:
        left = started + due - time.perf_counter()
        if left > 0:
            await asyncio.sleep(left)
        if free:
            load.late_s.append(time.perf_counter() - started - due)
            free.pop().ask(load.next(), started + due)
        else:
            waiting.append(started + due)
    try:
        await asyncio.wait_for(load.done, DRAIN_S)
    finally:
        load.close()
    spent = max(seconds, time.perf_counter() - started)
    p50, p99 = np.percentile(load.latencies_s, (50, 99)) * 1e3
    return {
        "requests": len(due_s),
        "rps": len(due_s) / spent,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "late_ms_p99": float(np.percentile(load.late_s, 99) * 1e3),
    }


async def closed_loop(port: int, asks: Sequence[Asked], connections: int, warm_s: float, seconds: float) -> dict[str, float]:
    """As many requests as `connections` have answered one after the other; the first `warm_s` do not count."""
    load, begin = Load(asks), time.perf_counter() + warm_s

    def answered(client: Client) -> None:
        now = time.perf_counter()
        if now >= begin:
            load.latencies_s.append(now - client.due)
        client.ask(load.next(), now)
        if now >= begin + seconds and not load.done.done():
            load.done.set_result(now - begin)

    await load.connect(port, connections, answered)
    begin = time.perf_counter() + warm_s
    for client in load.clients:
        client.ask(load.next(), time.perf_counter())
    try:
        spent = await asyncio.wait_for(load.done, warm_s + seconds + DRAIN_S)
    finally:
        load.close()
    p50, p99 = np.percentile(load.latencies_s, (50, 99)) * 1e3
    return {"requests": len(load.latencies_s), "rps": len(load.latencies_s) / spent, "p50_ms": float(p50), "p99_ms": float(p99)}


def main() -> None:
    """First line: the port and files of rows and right answers; then jobs."""
    about = json.loads(sys.stdin.readline())
    rows, right = np.load(about["rows"]), np.load(about["right"])
    for line in sys.stdin:
        job = json.loads(line)
        count = job.pop("rows")
        starts = range(0, len(rows) - count + 1, count)
        asks = [asked(about["port"], job["model"], rows[start : start + count], right[start : start + count]) for start in starts]
        kind, _ = job.pop("kind"), job.pop("model")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found = runner.run((open_loop if kind == "open" else closed_loop)(about["port"], asks, **job))
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
