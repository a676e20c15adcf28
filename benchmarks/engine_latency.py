"""Every CPU engine and precision against torch eager fp32: one thread, batch 1, 8, 32, all interleaved in the same rounds.

    python benchmarks/engine_latency.py --json

Two models with random weights (speed only: accuracy is the gate's): a residual CNN on 112 px (about 430 MMAC) and a vision
transformer of 100 tokens (about 490 MMAC). `auto` chooses from a measurement of its own, then stands in the same rounds.
`cnn_b1_speedup`, `transformer_b1_speedup`: eager over the best engine; `auto_over_best_max`: the worst of auto's rows over the
best engine's; `fp32_over_ort_max`: the worst of the chosen engine's rows over ONNX Runtime fp32, never above 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from portaisys import engine, evaluate, models, spec
from portaisys.compress.quantize import quantize
from portaisys.engine import Options, choose
from portaisys.engine.cache import get_or_build, load
from portaisys.engine.cpu import device
from portaisys.export import export
from portaisys.spec import UserError

MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "cnn": (spec.ConvNet(stem=32, stem_stride=2, channels=(32, 64, 128, 256), blocks=(2, 2, 2, 2)), (3, 112, 112)),
    "transformer": (spec.Transformer(name="transformer", patch=8, dim=192, depth=11, heads=3), (3, 80, 80)),
}
ROUNDS = {1: 100, 8: 30, 32: 12}
PRECISIONS = ("fp32", "bf16", "int8")


def files(name: str, folder: Path) -> tuple[Any, dict[str, Path], np.ndarray]:
    """The torch model, its ONNX files by precision (bf16 is fp32's, computed otherwise), and rows to feed."""
    options, shape = MODELS[name]
    torch.manual_seed(0)
    model = models.build(options, shape, 10).eval()
    rows = np.random.default_rng(0).normal(size=(64, *shape)).astype(np.float32)
    fp32, int8 = folder / f"{name}.onnx", folder / f"{name}.int8.onnx"
    export(model, rows, spec.Export(opt_batch=8, max_batch=32, tolerance=1e-2), fp32)
    quantize(fp32, int8, rows, spec.Quantize())
    return model, {"fp32": fp32, "bf16": fp32, "int8": int8}, rows


def engines(found: dict[str, Path], cache: Path) -> dict[str, Any]:
    """All that run here, by "backend precision"."""
    opened = {}
    for backend in engine.available():
        for precision, path in found.items():
            options = Options(precision, 8, 32)
            try:
                opened[f"{backend} {precision}"] = load(get_or_build(path, backend, options, cache), options)
            except UserError as error:
                print(f"  {backend} {precision}: not here: {str(error)[:120]}")
    return opened


def compare(name: str, folder: Path) -> dict[int, dict[str, np.ndarray]]:
    """Milliseconds [rounds] of eager, every engine and auto's choice, at each batch size."""
    model, found, rows = files(name, folder)
    predict, opened, ms = models.predictor(model), engines(found, folder / "cache"), {}
    print(f"{name}: {models.count(model, MODELS[name][1])['macs'] / 1e6:,.0f} MMAC")
    for batch, rounds in ROUNDS.items():
        table = choose.measure(found, rows, Options("fp32", 8, 32), folder / "cache", batches=(batch,), rounds=max(10, rounds // 2), seed=1)
        best, _ = choose.pick(table, "latency")
        x = np.ascontiguousarray(rows[:batch])
        calls = {key: partial(one.run, {one.inputs[0].name: x}) for key, one in opened.items()} | {"eager": partial(predict, x)}
        ms[batch] = evaluate.latency(calls, rounds, 3, seed=batch)
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
    return min((key for key in ms if key not in ("eager", "auto")), key=lambda key: float(np.median(ms[key])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{device()}, {os.cpu_count()} CPUs, torch {torch.__version__}, {', '.join(engine.available().values())}, python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder:
        found = {name: compare(name, Path(folder)) for name in MODELS}
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
