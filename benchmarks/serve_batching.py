"""What the batcher buys, and what the protocol costs beside full batches.

    python benchmarks/serve_batching.py --json        (about 5 minutes)

One server process (portaisys.serve.core.Core on the data port) holds one ONNX file twice, one engine thread each: `batched`, whose batches
reach 64 samples, the most that a version is verified up to by default, and `unbatched`, max_batch 1. The client (serve_load.py) is a
process of its own on the same cores; bodies are binary and connections stay open. The engine is three dense layers (784-2048-2048-10,
fp32, random weights: speed only): a row alone reads all 23 MB of weights, 64 rows read them once, so batches are worth something, as
with any engine that waits for memory; a row is dear enough that its 784 floats on the wire do not drown it. `--engine cnn` takes the
int8 convolutions of serve_overhead.py instead, for which batches buy next to nothing: the batcher must then cost nothing.

A round measures both arms in turn, in an order drawn anew. Closed loop, 128 connections of one row: what each gives at most. Then open
loop (Poisson) at rates between 0.2 and 1.2 times that, halving five times, the arms step by step in turn: the highest rate whose p99,
from the moment a request was due, keeps the limit. `rate_at_p99_over_unbatched`: batched over unbatched. `mean_batch`: samples a run of
the engine at that rate, by the server's own count. `served_over_in_process`: rows a second through the protocol, closed loop, 8 rows
a request on 32 connections, over the same engine in this process, without a server, at the mean batch that those requests had, the
two in turn, twice; `served_over_in_process_rows1`: the same with one row a request on 256 connections. Figures are medians over rounds; low and high
are the least and the largest round. Any reply that is not 200 and any wrong answer among those that are looked at end the benchmark.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serve_arms import stopped
from serve_overhead import cnn_file, free_port, spread
from torch import nn

from portaisys import spec
from portaisys.engine import Options, onnxruntime
from portaisys.engine.cpu import device
from portaisys.export import export
from portaisys.serve.batcher import Batcher
from portaisys.serve.core import Core, Listen
from portaisys.serve.model import ServedModel, Stats
from portaisys.serve.repository import of_models

SHAPE = (1, 28, 28)
MAX_BATCH = spec.Export().max_batch
ARMS = {"batched": MAX_BATCH, "unbatched": 1}
PRECISIONS = {"dense": "fp32", "cnn": "int8"}
HALVINGS = 5


@dataclass(frozen=True)
class Round:
    """Rates in rows a second; `rate`, `p99_ms` and `mean_batch` by arm, at the highest rate that keeps the limit."""

    rate: dict[str, float]
    p99_ms: dict[str, float]
    mean_batch: dict[str, float]
    served: dict[int, float]  # rows a request -> rows a second, closed loop
    batch: dict[int, float]
    alone: dict[int, float]  # the engine in this process at that batch


# --- the engine and its server --------------------------------------------------------------------------------------


def engine_file(name: str, folder: Path) -> Path:
    """What ONNX Runtime runs, built as a version's engine is."""
    if name == "cnn":
        return cnn_file(folder)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10)).eval()
    rows = np.random.default_rng(0).normal(size=(64, *SHAPE)).astype(np.float32)
    export(model, rows, spec.Export(tolerance=1e-2), folder / "fp32.onnx")
    onnxruntime.build(folder / "fp32.onnx", Options("fp32", provider="cpu"), folder / "dense.onnx")
    return folder / "dense.onnx"


def serve(file: Path, precision: str, port: int) -> None:
    """Both arms until SIGTERM."""
    stop = stopped()

    def served(name: str, max_batch: int) -> ServedModel:
        engine, stats = onnxruntime.load(file, Options(precision, provider="cpu")), Stats()
        return ServedModel(
            name, "1", engine, Batcher(engine.run, max_batch=max_batch, observe=stats.batch), (), {"digest": "0" * 64}, (), stats
        )

    running = Core(of_models(*(served(name, most) for name, most in ARMS.items())), (), Listen(http_port=port)).start()
    stop.wait()
    running.stop()


@contextlib.contextmanager
def child(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A script of this folder in a process of its own, ended with the block."""
    process = subprocess.Popen(
        [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


class Bench:
    """Server, client and engine. `alone_rps` runs the engine here, in this process."""

    def __init__(self, engine: Any, rows: np.ndarray, port: int, client: subprocess.Popen[str], seconds: float, limit_ms: float) -> None:
        self.engine, self.rows, self.port, self.client = engine, rows, port, client
        self.seconds, self.limit_ms = seconds, limit_ms

    def job(self, kind: str, model: str, rows: int, connections: int, **more: float) -> dict[str, float]:
        """What the client measured, with the mean batch meanwhile."""
        before = counts(self.port, model)
        self.tell({"kind": kind, "model": model, "rows": rows, "connections": connections, "seconds": self.seconds, **more})
        line = self.client.stdout.readline() if self.client.stdout else ""
        if not line:
            raise RuntimeError(f"the client failed: {kind} loop, {model}, {more}")
        samples, batches = (after - first for after, first in zip(counts(self.port, model), before, strict=True))
        return {**json.loads(line), "batch": samples / batches}

    def tell(self, what: dict[str, Any]) -> None:
        assert self.client.stdin
        self.client.stdin.write(json.dumps(what) + "\n")
        self.client.stdin.flush()

    def alone_rps(self, batch: int) -> float:
        """Rows a second of the engine at this batch, without a server; copies like the batcher's are not made."""
        x = np.ascontiguousarray(self.rows[np.arange(batch) % len(self.rows)])
        self.engine.run({"x": x})
        runs, begun = 0, time.perf_counter()
        while (spent := time.perf_counter() - begun) < self.seconds:
            self.engine.run({"x": x})
            runs += 1
        return runs * batch / spent


def counts(port: int, model: str) -> tuple[int, int]:
    """Samples and batches since the server's start."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", f"/v2/models/{model}/stats")
        (stats,) = json.loads(connection.getresponse().read())["model_stats"]
        return stats["inference_count"], stats["execution_count"]
    finally:
        connection.close()


def ready(port: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            counts(port, "batched")
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server did not start") from None
            time.sleep(0.1)


# --- rounds ---------------------------------------------------------------------------------------------------------


def highest(bench: Bench, most: dict[str, float], seed: int) -> dict[str, dict[str, float]]:
    """By halving, arms in turn: what the client saw at the highest rate whose p99 keeps the limit. `most`: rows a second in a closed loop."""
    bounds = {arm: (0.2, 1.2) for arm in most}
    found: dict[str, dict[str, float]] = {}
    for step in range(HALVINGS):
        for arm in random.Random(seed * 100 + step).sample(list(most), len(most)):
            low, high = bounds[arm]
            share = (low + high) / 2
            said = kept(bench, arm, share * most[arm], seed * 100 + step)
            bounds[arm] = (low, share) if said is None else (share, high)
            if said is not None:
                found[arm] = {**said, "rate": share * most[arm]}
    if missing := set(most) - set(found):
        raise RuntimeError(f"{', '.join(missing)}: no rate keeps {bench.limit_ms:g} ms at p99; give a larger --p99-ms")
    return found


def kept(bench: Bench, arm: str, rate: float, seed: int) -> dict[str, float] | None:
    """What the client saw at this rate; None where twice the limit was not kept."""
    for _ in range(2):
        said = bench.job("open", arm, 1, 256, rate=rate, seed=seed)
        print(
            f"  {arm}: {rate:,.0f}/s: p50 {said['p50_ms']:.1f} ms, p99 {said['p99_ms']:.1f} ms, mean batch {said['batch']:.1f}, sent late {said['late_ms_p99']:.1f} ms (p99)",
            flush=True,
        )
        if said["p99_ms"] <= bench.limit_ms:
            return said
    return None


def beside_the_engine(bench: Bench, rows: int, connections: int) -> tuple[float, float, float]:
    """Rows a second served, their mean batch, and rows a second of the engine alone at it; in turn, twice."""
    served, batch, alone = [], [], []
    for _ in range(2):
        said = bench.job("closed", "batched", rows, connections, warm_s=0.5)
        served.append(said["rps"] * rows)
        batch.append(said["batch"])
        alone.append(bench.alone_rps(round(said["batch"])))
    print(
        f"  {rows} rows a request: {np.mean(served):,.0f} rows/s, mean batch {np.mean(batch):.1f}; in process {np.mean(alone):,.0f} rows/s",
        flush=True,
    )
    return float(np.mean(served)), float(np.mean(batch)), float(np.mean(alone))


def one_round(bench: Bench, seed: int) -> Round:
    most = {arm: bench.job("closed", arm, 1, 128, warm_s=0.5)["rps"] for arm in random.Random(seed).sample(list(ARMS), len(ARMS))}
    print(f"closed loop, one row a request: {', '.join(f'{arm} {rps:,.0f}/s' for arm, rps in most.items())}", flush=True)
    found = highest(bench, most, seed)
    served, batch, alone = {}, {}, {}
    for rows, connections in random.Random(seed).sample([(8, 32), (1, 256)], 2):
        served[rows], batch[rows], alone[rows] = beside_the_engine(bench, rows, connections)
    by_arm = {key: {arm: found[arm][key] for arm in ARMS} for key in ("rate", "p99_ms", "batch")}
    return Round(by_arm["rate"], by_arm["p99_ms"], by_arm["batch"], served, batch, alone)


def figures(rounds: Sequence[Round]) -> dict[str, dict[str, float]]:
    return {
        "rate_at_p99_over_unbatched": spread([one.rate["batched"] / one.rate["unbatched"] for one in rounds]),
        "mean_batch": spread([one.mean_batch["batched"] for one in rounds]),
        "served_over_in_process": spread([one.served[8] / one.alone[8] for one in rounds]),
        "served_over_in_process_rows1": spread([one.served[1] / one.alone[1] for one in rounds]),
    }


def show(rounds: Sequence[Round], limit_ms: float) -> None:
    print(f"| arm | requests/s at p99 <= {limit_ms:g} ms | low to high | p99 ms | mean batch |\n|---|---|---|---|---|")
    for arm in ARMS:
        rate = spread([one.rate[arm] for one in rounds])
        p99, batch = (np.median([getattr(one, key)[arm] for one in rounds]) for key in ("p99_ms", "mean_batch"))
        print(f"| {arm} | {rate['value']:,.0f} | {rate['low']:,.0f} to {rate['high']:,.0f} | {p99:.1f} | {batch:.1f} |")
    print("\n| rows a request | rows/s served | in process | mean batch |\n|---|---|---|---|")
    for rows in (8, 1):
        served, alone, batch = (np.median([getattr(one, key)[rows] for one in rounds]) for key in ("served", "alone", "batch"))
        print(f"| {rows} | {served:,.0f} | {alone:,.0f} | {batch:.1f} |")


def measured(options: argparse.Namespace, folder: Path) -> list[Round]:
    file, precision, port = engine_file(options.engine, folder), PRECISIONS[options.engine], free_port()
    engine = onnxruntime.load(file, Options(precision, provider="cpu"))
    rows = np.random.default_rng(1).normal(size=(256, *SHAPE)).astype(np.float32)
    np.save(folder / "rows.npy", rows)
    np.save(folder / "right.npy", engine.run({"x": rows})["logits"])
    with (
        child("serve_batching.py", "--serve", str(file), str(port), "--engine", options.engine) as server,
        child("serve_load.py") as client,
    ):
        ready(port, server)
        bench = Bench(engine, rows, port, client, options.seconds, options.p99_ms)
        bench.tell({"port": port, "rows": str(folder / "rows.npy"), "right": str(folder / "right.npy")})
        return [one_round(bench, seed) for seed in range(options.rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.5, help="of each measurement")
    parser.add_argument("--p99-ms", type=float, default=50.0, help="the limit")
    parser.add_argument("--engine", choices=PRECISIONS, default="dense")
    parser.add_argument("--serve", nargs=2, metavar=("FILE", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(Path(options.serve[0]), PRECISIONS[options.engine], int(options.serve[1]))
        return
    print(f"{device()}, {os.cpu_count()} CPUs, {onnxruntime.version()}, python {platform.python_version()}; load {os.getloadavg()[0]:.1f}")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temp:
        rounds = measured(options, Path(temp))
    show(rounds, options.p99_ms)
    found = figures(rounds)
    for name, figure in found.items():
        print(f"{name}: {figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})")
    print(f"{time.monotonic() - begun:.0f} s; load {os.getloadavg()[0]:.1f}")
    if options.json:
        print(json.dumps({"benchmark": "serve_batching", "figures": found}))


if __name__ == "__main__":
    main()
