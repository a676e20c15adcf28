"""Requests of unlike lengths: batched by like length with padding, against batches of one exact length.

    python benchmarks/serve_lengths.py --json        (about a minute)

The engine is a small text transformer (ONNX Runtime, fp32, random weights: speed only), the requests are WordNet glosses as token ids, one a
request, `--connections` of them at a time in a closed loop, straight into the batcher: no protocol, which costs both arms the same. The
arms take turns, in an order drawn anew each round. `rate_over_exact`: requests a second over those of the other arm. `mean_batch`,
`mean_batch_exact`: requests a run of the engine. `p99_over_exact`: of the latency. Figures are medians over rounds; low and high are the least and
the largest. Every answer is compared with the one that the request gets alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from serve_overhead import spread

from portaisys import data, models, spec
from portaisys.engine import Engine, Options, onnxruntime
from portaisys.engine.cpu import device
from portaisys.export import INPUT, OUTPUT, export
from portaisys.serve.batcher import Batcher, BatchRecord

MOST = 64
ARMS = {"padded": {INPUT: 0}, "exact": {}}
TOLERANCE = 1e-3


def engine_and_texts(folder: Path, count: int) -> tuple[Engine, list[np.ndarray]]:
    """The engine, and glosses [1, T] without padding."""
    splits = data.load(spec.Text(source="text", kind="wordnet", max_tokens=MOST))
    torch.manual_seed(0)
    model = models.build(spec.TextTransformer(name="text_transformer", dim=128, depth=2, heads=4), splits.shape, len(splits.labels), vocabulary=splits.vocabulary)
    rows = splits.calibration.x
    export(model, rows, spec.Export(), folder / "model.onnx", most_tokens=MOST)
    options = Options(provider="cpu", dims=(("tokens", 1, MOST // 2, MOST),))
    onnxruntime.build(folder / "model.onnx", options, folder / "engine.onnx")
    return onnxruntime.load(folder / "engine.onnx", options), [row[None, : int((row != 0).sum())] for row in rows[:count]]


async def loop(engine: Engine, texts: list[np.ndarray], right: list[np.ndarray], pads: dict[str, int], connections: int, seconds: float) -> tuple[float, float, float]:
    """Requests a second, requests a batch, p99 in ms."""
    records: list[BatchRecord] = []
    batcher = Batcher(engine.run, max_batch=64, observe=records.append, pads=pads)
    latencies, ends = list[float](), time.perf_counter() + seconds

    async def ask(first: int) -> None:
        number = first
        while (begun := time.perf_counter()) < ends:
            logits = (await batcher.submit({INPUT: texts[number % len(texts)]}))[OUTPUT]
            latencies.append(time.perf_counter() - begun)
            if np.abs(logits - right[number % len(texts)]).max() > TOLERANCE:
                raise RuntimeError(f"request {number % len(texts)} got an answer that it does not get alone")
            number += connections

    await asyncio.gather(*(ask(number) for number in range(connections)))
    await batcher.close()
    return len(latencies) / seconds, float(np.mean([record.samples for record in records])), float(np.percentile(latencies, 99) * 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--connections", type=int, default=64)
    options = parser.parse_args()
    print(f"{device()}, {os.cpu_count()} CPUs, {onnxruntime.version()}, python {platform.python_version()}; load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        engine, texts = engine_and_texts(Path(folder), 1024)
        right = [engine.run({INPUT: text})[OUTPUT] for text in texts]
        print(f"{len(texts)} glosses of {min(t.shape[1] for t in texts)} to {max(t.shape[1] for t in texts)} tokens, median {np.median([t.shape[1] for t in texts]):.0f}")
        rounds = []
        for seed in range(options.rounds):
            order = random.Random(seed).sample(list(ARMS), len(ARMS))
            rounds.append({arm: asyncio.run(loop(engine, texts, right, ARMS[arm], options.connections, options.seconds)) for arm in order})
            print(", ".join(f"{arm}: {rate:,.0f}/s, {batch:.1f} a batch, p99 {p99:.0f} ms" for arm, (rate, batch, p99) in rounds[-1].items()), flush=True)
        engine.close()
    figures = {
        "rate_over_exact": spread([one["padded"][0] / one["exact"][0] for one in rounds]),
        "mean_batch": spread([one["padded"][1] for one in rounds]),
        "mean_batch_exact": spread([one["exact"][1] for one in rounds]),
        "p99_over_exact": spread([one["padded"][2] / one["exact"][2] for one in rounds]),
    }
    for name, figure in figures.items():
        print(f"{name}: {figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})")
    if options.json:
        print(json.dumps({"benchmark": "serve_lengths", "figures": figures}))


if __name__ == "__main__":
    main()
