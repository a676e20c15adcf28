"""What the engine cache saves: a build against finding it again, and how many builds 8 processes make that ask at once.

    python benchmarks/engine_cache.py --json

`cold_over_warm`: the least over the backends that build here (get_or_build on an empty folder over get_or_build on a full one whose
files lie untouched, as they do after seconds: they are hashed once, not each time), median of 5 with the range; a residual CNN of 2.8 million parameters, fp32. `builds`: of 8 processes that
start together on one empty folder, how many built.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from portaisys import models, spec
from portaisys.engine import BACKENDS, Options, backend
from portaisys.engine.cache import SETTLED_S, Cache, get_or_build
from portaisys.engine.cpu import device
from portaisys.export import export

SHAPE = (3, 112, 112)
REPEATS = 5


def model_file(folder: Path) -> Path:
    torch.manual_seed(0)
    model = models.build(spec.ConvNet(stem=32, stem_stride=2, channels=(32, 64, 128, 256), blocks=(2, 2, 2, 2)), SHAPE, 10).eval()
    export(model, np.random.default_rng(0).normal(size=(64, *SHAPE)).astype(np.float32), spec.Export(max_batch=32, tolerance=1e-2), folder / "cnn.onnx")
    return folder / "cnn.onnx"


def timed(onnx: Path, name: str, cache: Path) -> tuple[float, bool]:
    started = time.perf_counter()
    reused = get_or_build(onnx, name, Options("fp32", 8, 32), Cache(cache)).reused
    return time.perf_counter() - started, reused


def ratio(onnx: Path, name: str, folder: Path) -> list[float]:
    caches = [folder / f"{name}-{repeat}" for repeat in range(REPEATS)]
    cold = [timed(onnx, name, cache) for cache in caches]
    time.sleep(SETTLED_S + 0.5)
    for cache in caches:  # the first that finds files untouched for long hashes them, and remembers
        timed(onnx, name, cache)
    warm = [timed(onnx, name, cache) for cache in caches]
    assert not any(reused for _, reused in cold) and all(reused for _, reused in warm)
    found = [before / after for (before, _), (after, _) in zip(cold, warm, strict=True)]
    cold_ms, warm_ms = (float(np.median([seconds for seconds, _ in times])) * 1e3 for times in (cold, warm))
    print(f"{name}: cold {cold_ms:.1f} ms, warm {warm_ms:.2f} ms, cold / warm {np.median(found):.1f} ({min(found):.1f} to {max(found):.1f})")
    return found


def ask(onnx: Path, name: str, cache: Path, gate: object) -> bool:
    gate.wait()  # type: ignore[attr-defined]
    return timed(onnx, name, cache)[1]


def builds(onnx: Path, name: str, cache: Path, processes: int = 8) -> int:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(processes) as pool:
        gate = manager.Barrier(processes)
        asked = [pool.apply_async(ask, (onnx, name, cache, gate)) for _ in range(processes)]
        return sum(not one.get() for one in asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    print(f"{device()}, {os.cpu_count()} CPUs, python {platform.python_version()}, {', '.join(backend(name).version() for name in BACKENDS)}")
    with tempfile.TemporaryDirectory() as folder:
        onnx = model_file(Path(folder))
        ratios = {name: ratio(onnx, name, Path(folder)) for name in BACKENDS}
        count = builds(onnx, "tensorrt", Path(folder) / "together")
    worst = min(ratios.values(), key=lambda found: float(np.median(found)))
    print(f"8 processes at once on an empty folder: {count} built")
    figures = {
        "cold_over_warm": {"value": float(np.median(worst)), "low": min(worst), "high": max(worst)},
        "builds": {"value": count, "low": count, "high": count},
    }
    if options.json:
        print(json.dumps({"benchmark": "engine_cache", "figures": figures}))


if __name__ == "__main__":
    main()
