"""What clients notice when something breaks: two replicas under constant load, and one fault after the other.

    python benchmarks/serve_faults.py --json        (about 10 minutes)

A Ray cluster of this script's own serves three small models (16 float32 in, 16 out), one of them in two versions, from a registry of its
own, an `mlflow server` on 127.0.0.1; both replicas share one data port. The client is a process of its own, given precedence over the
server's where that is allowed, as it would be elsewhere: requests are due at a constant rate whatever the server does (open loop), over
32 connections that stay open, each with another row (they come again after --requests). It does what real clients do: 1 s for an answer,
connecting included, then one retry on a fresh connection. Every answer is compared with what the version named in it gives offline, so a
row of somebody else or of another version is `wrong`. A kind sends --requests at least, and goes on until its fault has healed; between
kinds both replicas are well again. Kinds:

calm: none, the control. rolling_update: redeployed with other arguments. promote, rollback: version 2 and back, in the registry.
load_unload: another model, five times, through the protocol. sigkill, sigstop: of a replica. slow_clients: 64 that send a byte a second
and 32 that ask and never read. registry_down: its server hangs for 12 s (longer than its clients wait), then is gone for 6, then is back.
controller_killed: SIGKILL of the Serve controller. overload: five times what a slow model was measured to give, its 503 not retried as
they are the right answer, then at once the usual load. sigstop_route: of a replica, while the load comes by Ray Serve's own proxy: as long
as the others, but at --route-rate, so fewer requests.

Figures. `wrong`: over all kinds. `failed_max_kind`: the most requests of a kind without a right answer after the retry; of all kinds but
overload, where more is offered than there is, and sigstop, which the kernel hides from clients: half of the new connections go to the
stopped process until it is gone. `failed_first_try`: the sum over those kinds. `shed_right_code_share`: of the overload's requests that
were refused, those by status 503 with Retry-After and {"error"}; what timed out is in overload_failed_first_try. `recovery_s_max`: the
longest of those kinds, from the fault to the end of the last request whose first try failed (0 where none did). By kind: KIND_failed,
KIND_failed_first_try, KIND_recovery_s, KIND_gap_s (the longest time without a right answer), KIND_replaced_s (from the signal until that
process is gone and another replica in its place); overload_offered (over capacity), overload_p99_ms (of what was answered),
overload_after_failed and overload_after_recovery_s (of the usual load right after). One run each, so low and high are the value.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import http.client
import json
import logging
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import ray
import uvloop
from onnx import TensorProto, helper, numpy_helper
from ray import serve
from ray.serve.context import _get_global_client

from portaisys import artifact, registry
from portaisys.engine import Options, cache
from portaisys.engine.cpu import device
from portaisys.serve.app import ServeArgs, build_app
from portaisys.spec import Storage

WIDTH = 16
TIMEOUT_S = 1.0
HEALED_S = 240.0  # what is not well again after this ends the benchmark
RIGHT, WRONG, TIMED_OUT, REFUSED, LOST, SHED, MISSHAPEN, STATUS, LOST_FRESH = range(9)
CAUSES = (
    "right",
    "wrong",
    "timed out",
    "connection refused",
    "kept connection lost",
    "shed",
    "shed in the wrong form",
    "another status",
    "fresh connection lost",
)

# --- the client, a process of its own -------------------------------------------------------------------------------


class Wire(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._got, self._answer = bytearray(), None
        self.closed = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError("closed before it answered"))

    def data_received(self, data: bytes) -> None:
        self._got += data
        reply = whole(self._got)
        if reply is not None and self._answer is not None and not self._answer.done():
            self._answer.set_result(reply)

    async def ask(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers, body. Raises ConnectionError."""
        if self.closed:
            raise ConnectionResetError("closed before it was asked")
        self._got.clear()
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        reply = await self._answer
        if reply[1].get("connection", "").lower() == "close":
            self.close()
        return reply

    def close(self) -> None:
        self.closed = True
        self._transport.abort()


def whole(got: bytearray) -> tuple[int, dict[str, str], bytes] | None:
    """A reply that has come whole, with lower-case header names."""
    end = got.find(b"\r\n\r\n")
    if end < 0:
        return None
    first, *lines = got[:end].decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    stop = end + 4 + int(headers["content-length"])
    return (int(first.split()[1]), headers, bytes(got[end + 4 : stop])) if len(got) >= stop else None


class Load:
    """One job: requests at a constant rate, and what became of each. `job`: see `Client.begin`; a line more on `lines` lets it end."""

    def __init__(self, job: dict[str, Any], lines: Any) -> None:
        self.job, self.lines = job, lines
        self.rows = np.load(job["rows"])
        self.right = {version: np.load(file) for version, file in job["right"].items()}
        head = json.dumps(
            {
                "inputs": [{"name": "x", "shape": [1, WIDTH], "datatype": "FP32", "parameters": {"binary_data_size": 4 * WIDTH}}],
                "parameters": {"binary_data_output": True},
            }
        ).encode()
        lines = f"POST {job['path']} HTTP/1.1\r\nHost: 127.0.0.1\r\nInference-Header-Content-Length: {len(head)}\r\nContent-Length: {len(head) + 4 * WIDTH}\r\n\r\n"
        self.head = lines.encode() + head
        self.free: asyncio.Queue[Wire | None] = asyncio.Queue()
        self.told: list[tuple[float, float, float, int, int]] = []  # due, sent, done, first try, after the retry

    async def run(self) -> None:
        for _ in range(self.job["connections"]):
            self.free.put_nowait(None)
        told_to_end = asyncio.get_running_loop().run_in_executor(None, self.lines.readline)
        begun, index, tasks = time.monotonic(), 0, set[asyncio.Task[None]]()
        while index < self.job["requests"] or not told_to_end.done():
            due = begun + index / self.job["rate"]
            if (left := due - time.monotonic()) > 0:
                await asyncio.sleep(left)
            slot = await self.free.get()  # one that waits for a connection stays due when it was
            task = asyncio.create_task(self._one(index, due, slot))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            index += 1
        await asyncio.gather(*tasks)

    async def _one(self, index: int, due: float, wire: Wire | None) -> None:
        sent, row = time.monotonic(), index % len(self.rows)
        first, wire = await self._try(row, wire)
        after = first
        if first != RIGHT and (first != SHED or self.job["retry_sheds"]):
            if wire is not None:
                wire.close()
            after, wire = await self._try(row, None)
        self.told.append((due, sent, time.monotonic(), first, after))
        self.free.put_nowait(wire)

    async def _try(self, row: int, wire: Wire | None) -> tuple[int, Wire | None]:
        """What became of it, and the connection if it can be used again."""
        fresh = wire is None or wire.closed
        try:
            async with asyncio.timeout(TIMEOUT_S):
                if fresh:
                    _, wire = await asyncio.get_running_loop().create_connection(Wire, "127.0.0.1", self.job["port"])
                found = self._judged(row, *await wire.ask(self.head + self.rows[row].tobytes()))
        except TimeoutError:
            found = TIMED_OUT
        except OSError as error:
            found = REFUSED if error.errno == errno.ECONNREFUSED else LOST_FRESH if fresh else LOST
        if found in (TIMED_OUT, REFUSED, LOST, LOST_FRESH) and wire is not None and not wire.closed:
            wire.close()
        return found, None if wire is None or wire.closed else wire

    def _judged(self, row: int, status: int, headers: dict[str, str], body: bytes) -> int:
        if status == 503:
            shaped = headers.get("retry-after", "").isdecimal() and b'{"error"' in body[:10]
            return SHED if shaped else MISSHAPEN
        if status != 200:
            print(f"status {status}: {body[:200]!r}", file=sys.stderr)
            return STATUS
        length = int(headers["inference-header-content-length"])
        version = json.loads(body[:length])["model_version"]
        named = headers["x-portaisys-lineage"].split()[0].endswith(f"/{version}")
        found = np.frombuffer(body[length:], np.float32)
        return RIGHT if named and np.abs(found - self.right[version][row]).max() < 1e-3 else WRONG


def client_main() -> None:
    """Jobs by line on the standard input, each answered by a line once its file is written; any line during a job lets it end."""
    with contextlib.suppress(PermissionError):  # clients are elsewhere as a rule: a replica that starts must not take their CPU
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    while line := sys.stdin.readline():
        load = Load(job := json.loads(line), sys.stdin)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(load.run())
        np.save(job["out"], np.array(load.told))
        print("done", flush=True)


class Client:
    """The client's process, seen from here."""

    def __init__(self, folder: Path) -> None:
        self._out = folder / "told.npy"
        self._process = subprocess.Popen([sys.executable, __file__, "--client"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def begin(self, model: Model, port: int, *, requests: int, rate: float, connections: int = 32, retry_sheds: bool = True) -> None:
        """Begin to ask `model`: `requests` at least, and until `end`. `rate`: a second; infinite: as many as the connections carry."""
        right = {version: str(file) for version, file in model.right.items()}
        self._say(
            {"model": model.name, "path": f"/v2/models/{model.name}/infer", "port": port, "rows": str(model.rows), "right": right, "rate": rate,
             "requests": requests, "connections": connections, "retry_sheds": retry_sheds, "out": str(self._out)}
        )  # fmt: skip

    def end(self) -> Told:
        """What was told, once all that was due is answered."""
        assert self._process.stdout
        self._say("end")
        if not self._process.stdout.readline():
            raise RuntimeError("the client failed")
        return Told(np.load(self._out))

    def _say(self, what: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)


@dataclass(frozen=True)
class Told:
    """Requests of one job: rows of due, sent and done (seconds, monotonic), first try, after the retry."""

    table: np.ndarray

    def count(self, column: int) -> Counter[int]:
        return Counter(int(code) for code in self.table[:, column])

    @property
    def first(self) -> Counter[int]:
        return self.count(3)

    @property
    def after(self) -> Counter[int]:
        return self.count(4)

    @property
    def wrong(self) -> int:
        return int(((self.table[:, 3] == WRONG) | (self.table[:, 4] == WRONG)).sum())

    def latency_ms(self, percent: float) -> float:
        """Of right answers, from when they were due."""
        right = self.table[self.table[:, 4] == RIGHT]
        return float(np.percentile(right[:, 2] - right[:, 0], percent) * 1e3) if len(right) else float("nan")

    def late_ms(self, percent: float) -> float:
        """How much later than due the client sent: its own delays, and waits for a free connection."""
        return float(np.percentile(self.table[:, 1] - self.table[:, 0], percent) * 1e3)

    def gap_s(self) -> float:
        """The longest time without a right answer."""
        done = np.sort(self.table[self.table[:, 4] == RIGHT, 2])
        return float(np.diff(np.concatenate([[self.table[:, 1].min()], done, [self.table[:, 2].max()]])).max())

    def recovery_s(self, fault_at: float) -> float:
        """From the fault to the end of the last request whose first try failed."""
        failed = self.table[self.table[:, 3] != RIGHT]
        return max(0.0, float(failed[:, 2].max()) - fault_at) if len(failed) else 0.0

    def rate(self) -> float:
        """Requests sent a second."""
        sent = self.table[:, 1]
        return (len(sent) - 1) / float(sent.max() - sent.min())


# --- models and their registry --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """`rows` [requests, WIDTH] and, by version, the `right` answers to them: files of numpy."""

    name: str
    rows: Path
    right: dict[str, Path]


def onnx_file(path: Path, seed: int, steps: int = 0) -> None:
    """x [-1, 16] -> y = x w; with `steps`, after so many products of 128 x 128 a row that cost time and add next to nothing."""
    rng, node = np.random.default_rng(seed), helper.make_node
    constants = {"w": rng.normal(size=(WIDTH, WIDTH))}
    nodes = [node("MatMul", ["x", "w"], ["y" if not steps else "light"])]
    if steps:
        constants |= {"up": rng.normal(size=(WIDTH, 128 * 128)) / 4, "v": rng.normal(size=(128, 128)) / 16, "small": np.array(1e-6)}
        nodes += [node("MatMul", ["x", "up"], ["wide"]), node("Reshape", ["wide", "shape"], ["h0"])]
        nodes += [node("MatMul", [f"h{step}", "v"], [f"h{step + 1}"]) for step in range(steps)]
        nodes += [node("ReduceSum", [f"h{steps}", "axes"], ["sum"], keepdims=0), node("Mul", ["sum", "small"], ["heavy"])]
        nodes += [node("Reshape", ["heavy", "column"], ["tiny"]), node("Add", ["light", "tiny"], ["y"])]
    weights = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()]
    numbers = {"shape": [-1, 128, 128], "axes": [1, 2], "column": [-1, 1]} if steps else {}
    weights += [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in numbers.items()]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in "xy")
    graph = helper.make_graph(nodes, "faults", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def published(
    opened: registry.Registry,
    storage: Storage,
    folder: Path,
    name: str,
    rows: np.ndarray,
    seeds: tuple[int, ...],
    max_batch: int = 32,
    steps: int = 0,
) -> Model:
    """A version a seed, the first in production."""
    np.save(folder / f"{name}.npy", rows)
    right = {}
    for seed in seeds:
        options = Options("fp32", opt_batch=min(8, max_batch), max_batch=max_batch)
        about = {
            "name": name, "labels": [], "backends": {"fp32": "onnxruntime"}, "precisions": ["fp32"], "opt_batch": options.opt_batch, "max_batch": max_batch,
            "tolerance": 1e-3, "verdicts": [{"precision": "fp32", "action": "pass"}], "lineage": {"data": "made"},
        }  # fmt: skip
        with artifact.writing(folder / f"{name}-{seed}", kind="version", key=f"{name}-{seed}", parents={}, spec={}) as draft:
            onnx_file(draft.path / "fp32.onnx", seed, steps)
            engine = cache.load(
                cache.get_or_build(draft.path / "fp32.onnx", "onnxruntime", options, cache.Cache(storage.cache_dir)), options
            )
            answers = np.concatenate([engine.run({"x": rows[start : start + max_batch]})["y"] for start in range(0, len(rows), max_batch)])
            engine.close()
            for file in ("golden.npz", "calibration.npz"):
                np.savez(draft.path / file, x=rows[:32], y_fp32=answers[:32])
            (draft.path / "version.json").write_text(json.dumps(about))
        run_id = opened.log_run(name, {}, {}, {}, {})
        made = opened.publish(name, folder / f"{name}-{seed}", run_id, {"data": "made"}, {"action": "pass", "because": "benchmark"})
        np.save(folder / f"{name}-{seed}.npy", answers)
        right[str(made.version)] = folder / f"{name}-{seed}.npy"
    opened.promote(name, 1, "benchmark")
    return Model(name, folder / f"{name}.npy", right)


class RegistryServer:
    """An `mlflow server` of our own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db", "--artifacts-destination", str(self._folder / "files"),
        ]  # fmt: skip
        # Job execution is nine more processes and 20 s of start-up on two cores; the registry uses none of it.
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        with (self._folder / "mlflow.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        until(self._answers, "the registry answers")

    def _answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200
        except (urllib.error.URLError, OSError):
            return False

    def signal(self, number: int) -> None:
        """To it and its worker: the session that it leads."""
        if self._process is not None:
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


# --- the cluster ----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def until(condition: Callable[[], Any], what: str, timeout_s: float = HEALED_S) -> float:
    """Seconds until it holds. Raises RuntimeError when it does not in time."""
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > timeout_s:
            raise RuntimeError(f"after {timeout_s:g} s it does not hold that {what}")
        time.sleep(0.1)
    return time.monotonic() - begun


@dataclass
class World:
    """What a fault can be done to, and the load meanwhile."""

    storage: Storage
    opened: registry.Registry
    server: RegistryServer
    client: Client
    fast: Model
    other: Model
    slow: Model
    data_port: int
    serve_port: int
    options: argparse.Namespace
    said: dict[str, str] = field(default_factory=dict)  # what a kind found beside its counts
    measured: dict[str, float] = field(default_factory=dict)

    def deploy(self, max_delay_ms: float = 0.0) -> None:
        """Returns when all its replicas run."""
        args = ServeArgs(
            model=("fast@production", "slow@production"), storage=self.storage, num_replicas=2, data_port=self.data_port, max_queue=32, max_delay_ms=max_delay_ms,
            num_cpus=0.1,
        )  # fmt: skip
        serve.run(build_app(args), name="faults", route_prefix="/")

    def replicas(self) -> dict[int, str]:
        """Process id -> state, as the controller says; nothing while it does not say."""
        try:
            (deployment,) = _get_global_client().get_serve_details()["applications"]["faults"]["deployments"].values()
        except (ray.exceptions.RayError, KeyError, ValueError):
            return {}
        return {replica.get("pid", 0): str(getattr(replica["state"], "value", replica["state"])) for replica in deployment["replicas"]}

    def well(self, without: set[int] = frozenset()) -> bool:  # type: ignore[assignment]
        """Two replicas run, none of them of those, and the data port answers."""
        replicas = self.replicas()
        return (
            list(replicas.values()) == ["RUNNING", "RUNNING"]
            and not without & set(replicas)
            and self.ask("GET", "/v2/health/ready")[0] == 200
        )

    def ask(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """Status and body over a fresh connection; (0, b"") for none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.data_port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            reply = connection.getresponse()
            return reply.status, reply.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def everywhere(self, name: str, wanted: Callable[[int, bytes], bool]) -> bool:
        """Whether 24 fresh connections in a row hear it of a model: that both replicas are of one mind (they differ unseen once in 16 million)."""
        return all(wanted(*self.ask("GET", f"/v2/models/{name}")) for _ in range(24))


@contextlib.contextmanager
def cluster(folder: Path, options: argparse.Namespace) -> Iterator[World]:
    """Everything, started; and stopped, each by its own handle."""
    server, client = RegistryServer(folder), Client(folder)
    temp = Path(tempfile.mkdtemp(prefix="faults", dir="/tmp"))  # Ray's sockets need a short path
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["MLFLOW_TRACKING_URI"] = server.uri
    storage = Storage(path=str(folder / "runs"), cache=str(folder / "cache"))
    try:
        server.start()
        opened = registry.open_registry(storage)
        rows = np.random.default_rng(5).normal(size=(options.requests, WIDTH)).astype(np.float32)
        fast = published(opened, storage, folder, "fast", rows, (1, 2))
        other = published(opened, storage, folder, "other", rows[:100], (3,))
        slow = published(opened, storage, folder, "slow", rows[:2000], (4,), max_batch=4, steps=options.slow_steps)
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=str(temp))
        serve.start(http_options={"host": "127.0.0.1", "port": (serve_port := free_port())})
        world = World(storage, opened, server, client, fast, other, slow, free_port(), serve_port, options)
        world.deploy()
        until(world.well, "both replicas run")
        yield world
        serve.shutdown()
    finally:
        ray.shutdown()
        client.close()
        server.kill()
        if options.keep_logs:
            shutil.copytree(
                temp,
                options.keep_logs,
                dirs_exist_ok=True,
                ignore=lambda _, names: [name for name in names if "sock" in name],
                ignore_dangling_symlinks=True,
            )
        shutil.rmtree(temp, ignore_errors=True)


# --- faults: each returns when it has healed ------------------------------------------------------------------------


def calm(world: World) -> None:
    pass


def rolling_update(world: World) -> None:
    old = set(world.replicas())
    world.deploy(max_delay_ms=0.1)
    until(lambda: world.well(without=old), "the new replicas run and the old ones are gone")


def promote(world: World) -> None:
    world.opened.promote("fast", 2, "benchmark")
    _served_everywhere(world, "2")


def rollback(world: World) -> None:
    world.opened.rollback("fast", "benchmark")
    _served_everywhere(world, "1")


def _served_everywhere(world: World, version: str) -> None:
    took = until(
        lambda: world.everywhere("fast", lambda status, body: status == 200 and json.loads(body)["versions"] == [version]),
        f"version {version} answers",
    )
    world.said["on both replicas"] = f"after {took:.1f} s"


def load_unload(world: World) -> None:
    for _ in range(5):
        for action, there in (("load", 200), ("unload", 404)):
            status, body = world.ask("POST", f"/v2/repository/models/other/{action}")
            if status != 200:
                raise RuntimeError(f"{action}: {status} {body!r}")
            if not world.everywhere("other", lambda status, _, there=there: status == there):  # type: ignore[misc]
                raise RuntimeError(f"{action} was answered before it was done on both replicas")


def sigkill(world: World) -> None:
    _signalled(world, signal.SIGKILL)


def sigstop(world: World) -> None:
    _signalled(world, signal.SIGSTOP)


def _signalled(world: World, number: int) -> None:
    victim = next(iter(world.replicas()))
    begun = time.monotonic()
    os.kill(victim, number)
    until(lambda: victim not in world.replicas(), "the replica is given up")
    gone = until(
        lambda: not Path(f"/proc/{victim}/stat").exists() or Path(f"/proc/{victim}/stat").read_text().rpartition(")")[2].split()[0] == "Z",
        "its process is gone",
    )
    world.said["process gone"] = f"after {time.monotonic() - begun:.1f} s ({gone:.1f} s after Ray gave it up)"
    until(lambda: world.well(without={victim}), "another replica runs in its place")
    world.measured["replaced_s"] = time.monotonic() - begun
    world.said["replaced"] = f"after {world.measured['replaced_s']:.1f} s"


def registry_down(world: World) -> None:
    world.server.signal(signal.SIGSTOP)
    time.sleep(12)  # longer than a request to it may take (10 s), and two looks of every replica
    world.server.kill()
    time.sleep(6)  # one look more (5 s apart), now refused at once
    world.server.start()


def controller_killed(world: World) -> None:
    before = set(world.replicas())
    controller = _get_global_client()._controller
    pid = ray.get(controller.__ray_call__.remote(lambda self: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists(), "the controller is gone")
    took = until(world.well, "the controller is back and both replicas run")
    kept = len(before & set(world.replicas()))
    world.said["controller back"] = f"after {took:.1f} s, {kept} of 2 replicas kept"


def slow_clients(world: World) -> None:
    """Until the server has ended them all, or for 45 s."""
    drip = f"POST /v2/models/fast/infer HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: {'a' * 200}\r\n\r\n".encode()
    unread = b"GET /v2/openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 50
    slow = {socket.create_connection(("127.0.0.1", world.data_port)): deque(drip) for _ in range(64)}
    deaf = [socket.create_connection(("127.0.0.1", world.data_port)) for _ in range(32)]
    begun, left = time.monotonic(), [*slow, *deaf]
    for one in left:
        one.setblocking(False)
    while left and time.monotonic() - begun < 45:
        left = [one for one in left if _still_open(one, bytes([slow[one].popleft()]) if one in slow else unread, reads=one in slow)]
        time.sleep(1)  # the pace of a client that sends a byte a second
    world.said["ended by the server"] = f"{96 - len(left)} of 96 within {time.monotonic() - begun:.0f} s"
    for one in [*slow, *deaf]:
        one.close()


def _still_open(one: socket.socket, data: bytes, *, reads: bool) -> bool:
    try:
        with contextlib.suppress(BlockingIOError):
            one.send(data)
        if reads:
            with contextlib.suppress(BlockingIOError):
                return one.recv(4096) != b""
    except OSError:
        return False
    return True


# --- kinds ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A kind's outcome."""

    kind: str
    told: Told
    fault_at: float
    said: dict[str, str]
    measured: dict[str, float]

    @property
    def allowed(self) -> set[int]:
        """A shed is a right answer where more is offered than there is."""
        return {RIGHT, SHED} if self.kind == "overload" else {RIGHT}

    def failed(self, counts: Counter[int]) -> int:
        return sum(count for code, count in counts.items() if code not in self.allowed)


FAULTS: dict[str, Callable[[World], None]] = {
    "calm": calm, "rolling_update": rolling_update, "promote": promote, "rollback": rollback, "load_unload": load_unload, "sigkill": sigkill, "slow_clients": slow_clients,
    "registry_down": registry_down, "controller_killed": controller_killed, "sigstop": sigstop, "sigstop_route": sigstop,
}  # fmt: skip
KINDS = (*list(FAULTS)[:-2], "overload", *list(FAULTS)[-2:])


def one_kind(world: World, kind: str) -> Found:
    """The fault under load, after a fifth of the requests or 3 s."""
    if kind == "overload":
        return overload(world)
    options = world.options
    port, rate = (world.serve_port, options.route_rate) if kind == "sigstop_route" else (world.data_port, options.rate)
    requests = int(min(options.requests, rate * options.requests / options.rate))
    world.client.begin(world.fast, port, requests=requests, rate=rate)
    time.sleep(min(3.0, requests / rate / 5))  # what is undisturbed, to compare with
    fault_at = time.monotonic()
    FAULTS[kind](world)
    time.sleep(2)  # what is well again must stay so
    return Found(kind, world.client.end(), fault_at, world.said, world.measured)


def overload(world: World) -> Found:
    """Five times the slow model's measured capacity; then at once the usual load, which must not notice."""
    world.client.begin(world.slow, world.data_port, requests=1000, rate=float("inf"))
    capacity = world.client.end().rate()
    fault_at = time.monotonic()
    world.client.begin(world.slow, world.data_port, requests=world.options.requests, rate=5 * capacity, connections=512, retry_sheds=False)
    told = world.client.end()
    over = time.monotonic()
    world.client.begin(world.fast, world.data_port, requests=2000, rate=world.options.rate)
    after = world.client.end()
    answered = told.after[RIGHT] / (told.table[:, 2].max() - told.table[:, 1].min())
    world.measured |= {
        "offered": told.rate() / capacity,
        "p99_ms": told.latency_ms(99),
        "after_failed": sum(after.first.values()) - after.first[RIGHT],
        "after_recovery_s": after.recovery_s(over),
    }
    world.said["capacity"] = f"{capacity:.0f}/s, offered {told.rate():.0f}/s, answered {answered:.0f}/s"
    world.said["right after it"] = f"{sum(after.first.values())} requests of the usual load: {named(after.first)}"
    return Found("overload", told, fault_at, world.said, world.measured)


def named(counts: Counter[int]) -> str:
    return ", ".join(f"{count:,} {CAUSES[code]}" for code, count in sorted(counts.items())) or "none"


def show(found: Found) -> None:
    told = found.told
    recovery = found.measured["after_recovery_s"] if found.kind == "overload" else told.recovery_s(found.fault_at)
    rows = {
        "requests": f"{len(told.table):,} at {told.rate():,.0f}/s", "first try": named(told.first), "after the retry": named(told.after), "wrong": f"{told.wrong}",
        "p50, p99, longest ms": ", ".join(f"{told.latency_ms(percent):.1f}" for percent in (50, 99, 100)), "sent late, p99 ms": f"{told.late_ms(99):.1f}", "longest without a right answer": f"{told.gap_s():.3f} s",
        "recovered": f"after {recovery:.2f} s", **found.said,
    }  # fmt: skip
    print(f"\n| {found.kind} | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |", flush=True)


def figures(all_found: list[Found]) -> dict[str, dict[str, float]]:
    """Those of the kinds that were run."""
    within = [found for found in all_found if found.kind not in ("overload", "sigstop")]
    values: dict[str, float] = {"wrong": sum(found.told.wrong for found in all_found)}
    if within:
        values["failed_max_kind"] = max(found.failed(found.told.after) for found in within)
        values["failed_first_try"] = sum(found.failed(found.told.first) for found in within)
        values["recovery_s_max"] = max(found.told.recovery_s(found.fault_at) for found in within)
    for found in all_found:
        told, kind = found.told, found.kind
        if kind == "overload":
            refused = told.first[SHED] + told.first[MISSHAPEN] + told.first[STATUS]
            values["shed_right_code_share"] = told.first[SHED] / refused if refused else float("nan")
        values[f"{kind}_failed"], values[f"{kind}_failed_first_try"] = found.failed(told.after), found.failed(told.first)
        values[f"{kind}_gap_s"] = told.gap_s()
        if kind != "overload":
            values[f"{kind}_recovery_s"] = told.recovery_s(found.fault_at)
        values |= {f"{kind}_{name}": value for name, value in found.measured.items()}
    return {name: {"value": value, "low": value, "high": value} for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--requests", type=int, default=30_000, help="of each kind, at least")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of " + ", ".join(KINDS))
    parser.add_argument("--rate", type=float, default=1000, help="requests a second")
    parser.add_argument("--route-rate", type=float, default=50, help="requests a second by way of Ray Serve's proxy")
    parser.add_argument("--slow-steps", type=int, default=60, help="how slow the slow model is")
    parser.add_argument("--keep-logs", default="", help="a folder for Ray's files, to look at afterwards")
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        client_main()
        return
    print(f"{device()}, {os.cpu_count()} CPUs, ray {ray.__version__}, python {platform.python_version()}; load {os.getloadavg()[0]:.1f}")
    begun, all_found = time.monotonic(), []
    logging.getLogger("ray").setLevel(logging.ERROR)  # what is killed here on purpose is no news
    with tempfile.TemporaryDirectory() as temp, cluster(Path(temp), options) as world:
        for kind in options.kinds.split(","):
            world.said, world.measured = {}, {}
            all_found.append(one_kind(world, kind))
            show(all_found[-1])
            until(world.well, "both replicas run")
    found = figures(all_found)
    print(f"\nload {os.getloadavg()[0]:.1f} at the end; {time.monotonic() - begun:.0f} s")
    for name, figure in found.items():
        print(f"{name}: {figure['value']:.3f}")
    if options.json:
        print(json.dumps({"benchmark": "serve_faults", "figures": found}))


if __name__ == "__main__":
    main()
