"""Every CPU engine and precision against torch eager fp32: one thread, batch 1, 8, 32, all interleaved in the same rounds.

    python benchmarks/engine_latency.py --json

Two models with random weights (speed only: accuracy is the gate's), a residual CNN on 112 px (about 430 MMAC) and a vision
transformer of 100 tokens (about 490 MMAC), and all-MiniLM-L6-v2 on 64 tokens (about 700 MMAC; benchmarks/minilm.py). torch.compile
stands beside eager for comparison. `auto` chooses from a measurement of its own, then stands in the same rounds.
`cnn_b1_speedup`, `transformer_b1_speedup`, `minilm_b1_speedup`: eager over the best engine; `auto_over_best_max`: the worst of auto's
rows over the best engine's; `fp32_over_ort_max`: the worst of the chosen engine's rows over ONNX Runtime fp32, never above 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import minilm
import numpy as np
import torch
from scipy import stats

from portaisys import engine, evaluate, models, spec
from portaisys.compress.quantize import quantize
from portaisys.engine import Arrays, Engine, Options, choose
from portaisys.engine.cache import Cache, get_or_build, load
from portaisys.engine.cpu import device
from portaisys.engine.torch import TorchEngine
from portaisys.export import export
from portaisys.spec import UserError

MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "cnn": (spec.ConvNet(stem=32, stem_stride=2, channels=(32, 64, 128, 256), blocks=(2, 2, 2, 2)), (3, 112, 112)),
    "transformer": (spec.Transformer(name="transformer", patch=8, dim=192, depth=11, heads=3), (3, 80, 80)),
}
LENGTH = 64  # MiniLM's tokens
NAMES = (*MODELS, "minilm")
ROUNDS = {1: 100, 8: 30, 32: 12}
PRECISIONS = ("fp32", "bf16", "int8")
OPTIONS = Options("fp32", 8, 32, dims=(("seq", 1, LENGTH, 2 * LENGTH),), provider="cpu")
TORCH = ("eager", "compiled")


def files(name: str, folder: Path) -> tuple[torch.nn.Module, dict[tuple[str, str], Path], Arrays]:
    """The torch model, its ONNX files by backend and precision (bf16 is fp32's, computed otherwise), and rows to feed."""
    fp32, int8 = folder / f"{name}.onnx", folder / f"{name}.int8.onnx"
    model, feeds = sentences(fp32) if name == "minilm" else pictures(name, fp32)
    quantize(fp32, int8, feeds, spec.Quantize())
    backends = [backend for backend in engine.available() if backend not in engine.TYPED]
    return model, {(backend, precision): int8 if precision == "int8" else fp32 for backend in backends for precision in PRECISIONS}, feeds


def pictures(name: str, path: Path) -> tuple[torch.nn.Module, Arrays]:
    options, shape = MODELS[name]
    torch.manual_seed(0)
    model = models.build(options, shape, 10).eval()
    rows = np.random.default_rng(0).normal(size=(64, *shape)).astype(np.float32)
    print(f"{name}: {models.count(model, shape)['macs'] / 1e6:,.0f} MMAC")
    export(model, rows, spec.Export(opt_batch=8, max_batch=32, tolerance=1e-2), path)
    return model, {"x": rows}


def sentences(path: Path) -> tuple[torch.nn.Module, Arrays]:
    print(f"minilm: {LENGTH} tokens")
    minilm.export(path)
    return minilm.model(), minilm.rows(64, LENGTH, 0)


def engines(found: Mapping[tuple[str, str], Path], cache: Cache) -> dict[str, Engine]:
    """All that run here, by "backend precision"."""
    opened = {}
    for (backend, precision), path in found.items():
        options = replace(OPTIONS, precision=precision)
        try:
            opened[f"{backend} {precision}"] = load(get_or_build(path, backend, options, cache), options)
        except UserError as error:
            print(f"  {backend} {precision}: not here: {str(error)[:120]}")
    return opened


def in_torch(model: torch.nn.Module, like: Engine) -> dict[str, Engine]:
    return {name: TorchEngine(model, like.inputs, like.outputs, compiled=name == "compiled") for name in TORCH}


def compare(name: str, folder: Path) -> dict[int, dict[str, np.ndarray]]:
    """Milliseconds [rounds] of torch, every engine and auto's choice, at each batch size."""
    model, found, feeds = files(name, folder)
    cache, ms = Cache(folder / "cache"), {}
    opened = engines(found, cache)
    opened |= in_torch(model, opened["onnxruntime fp32"])
    for batch, rounds in ROUNDS.items():
        table = choose.measure(found, feeds, OPTIONS, cache, batches=(batch,), rounds=max(10, rounds // 2), seed=1)
        best, _ = choose.pick(table, "latency")
        few = choose.batch_of(feeds, batch)
        ms[batch] = evaluate.latency({key: partial(one.run, few) for key, one in opened.items()}, rounds, 3, seed=batch)
        ms[batch]["auto"] = ms[batch][f"{best.backend} {best.precision}"]
        show(batch, ms[batch], f"{best.backend} {best.precision}")
    return ms


def show(batch: int, ms: dict[str, np.ndarray], chosen: str) -> None:
    for key, times in sorted(ms.items(), key=lambda item: float(np.median(item[1]))):
        if key != "auto":
            p50, p99 = np.percentile(times, (50, 99))
            print(f"  batch {batch:2d}  {key:18s} p50 {p50:8.3f} ms  p99 {p99:8.3f}  eager / this {np.median(ms['eager'] / times):5.2f}{'   <- auto' if key == chosen else ''}")


def paired(above: np.ndarray, below: np.ndarray) -> dict[str, float]:
    """Median of the paired ratios with its 95 % interval from order statistics."""
    ratios = np.sort(above / below)
    low, high = stats.binom.interval(0.95, len(ratios), 0.5)
    return {"value": float(np.median(ratios)), "low": float(ratios[int(low)]), "high": float(ratios[min(int(high), len(ratios) - 1)])}


def best_of(ms: dict[str, np.ndarray]) -> str:
    return min((key for key in ms if key not in (*TORCH, "auto")), key=lambda key: float(np.median(ms[key])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{device()}, {os.cpu_count()} CPUs, torch {torch.__version__}, {', '.join(engine.available().values())}, python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder:
        found = {name: compare(name, Path(folder)) for name in NAMES}
    figures = {f"{name}_b1_speedup": paired(ms[1]["eager"], ms[1][best_of(ms[1])]) for name, ms in found.items()}
    rows = [row for ms in found.values() for row in ms.values()]
    for figure, other in (("auto_over_best_max", best_of), ("fp32_over_ort_max", lambda row: "onnxruntime fp32")):
        figures[figure] = max((paired(row["auto"], row[other(row)]) for row in rows), key=lambda ratio: ratio["value"])
    for name, ratio in figures.items():
        print(f"{name}: {ratio['value']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})")
    if options.json:
        print(json.dumps({"benchmark": "engine_latency", "figures": figures}))


if __name__ == "__main__":
    main()
