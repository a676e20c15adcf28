"""Everything that a GPU has to show, in one call and without Ray: torch, TensorRT or TensorRT-RTX in every precision, with and without CUDA graphs, and training.

    python benchmarks/gpu.py --json --data FOLDER --out benchmarks/results/gpu_h200_202611.md     # FOLDER: Fashion-MNIST's four files
    python benchmarks/gpu.py --small          # a minute on a CPU: engines that run there, plans that are only built

A residual CNN and a vision transformer with random weights: speed and the arithmetic's error, not accuracy. A time is that of a whole
call, rows on the host to answers on the host, for every arm alike; arms are interleaved round by round. Errors are of the largest
answer, against eager fp32 with tf32 off. `validity` is what RTX says of its plan on this card. Needs torch, onnx, onnxruntime (to
quantize), numpy, scipy, pydantic, filelock and pyyaml beside a TensorRT; nothing else of the platform's dependencies.
Figures, for each model: MODEL_b1_speedup (eager fp32 over the fastest TensorRT engine, batch 1), MODEL_b64_speedup, MODEL_graphs_b1
(fp16 without graphs over with), MODEL_parity_error (fp32's, the largest of any batch). Of compression (gpu_compress.py): compressed_PRECISION_drop_points, compressed_bBATCH_speedup. Of training (gpu_training.py says how): MODEL_train_PRECISION_over_fp32
(rows a second of the precision's fastest arm over plain fp32's), MODEL_train_PRECISION_mfu on a card whose peak is known, ARM_to_ACCURACY_s.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1] / "platform"))  # a lent machine has no installed package

import gpu_compress as compression
import gpu_training as training

from portaisys import engine, evaluate, models, spec
from portaisys.compress.cast import cast
from portaisys.compress.quantize import quantize
from portaisys.engine import CannotExecute, Engine, Options, Tensor
from portaisys.engine.cache import Cache, get_or_build, load
from portaisys.engine.cpu import device as cpu
from portaisys.engine.torch import TorchEngine
from portaisys.export import INPUT, OUTPUT, export
from portaisys.spec import UserError

FULL: dict[str, tuple[Any, tuple[int, ...]]] = {
    "cnn": (spec.ConvNet(stem=32, stem_stride=2, channels=(64, 128, 256, 512), blocks=(2, 2, 2, 2)), (3, 224, 224)),
    "transformer": (spec.Transformer(name="transformer", patch=16, dim=384, depth=12, heads=6), (3, 224, 224)),
}
SMALL: dict[str, tuple[Any, tuple[int, ...]]] = {
    "cnn": (spec.ConvNet(channels=(8, 16), blocks=(1, 1)), (1, 16, 16)),
    "transformer": (spec.Transformer(name="transformer", dim=32, depth=1, heads=2), (1, 16, 16)),
}
# Precision -> which file it is built from, and what it is called. int8+fp16: int8 between Q and DQ, fp16 elsewhere.
TENSORRT = {"fp32": "fp32", "tf32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "int8", "int8+fp16": "int8+fp16", "fp8": "fp8", "fp8+fp16": "fp8+fp16"}


@dataclass
class Found:
    """What one model came to. `ms`: batch -> arm -> milliseconds [rounds]; `errors`: arm -> largest of any batch; `built`: arm -> why it did not run."""

    ms: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    built: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    memory_mib: dict[str, float] = field(default_factory=dict)
    build_s: dict[str, float] = field(default_factory=dict)
    slots_rows_s: dict[int, float] = field(default_factory=dict)


def files_of(model: torch.nn.Module, rows: np.ndarray, folder: Path, options: spec.Export) -> dict[str, Path]:
    """Every type of file, made of the one fp32 export."""
    paths = {name: folder / f"{name}.onnx" for name in ("fp32", "fp16", "bf16", "int8", "fp8", "int8+fp16", "fp8+fp16")}
    export(model, rows, options, paths["fp32"])
    for name in ("int8", "fp8"):
        quantize(paths["fp32"], paths[name], rows[:64], spec.Quantize(reduce_range=False), name)
    for name, source, low in (("fp16", "fp32", "fp16"), ("bf16", "fp32", "bf16"), ("int8+fp16", "int8", "fp16"), ("fp8+fp16", "fp8", "fp16")):
        cast(paths[source], paths[name], low)
    return paths


def torch_arms(model: torch.nn.Module, shape: tuple[int, ...], where: str) -> dict[str, TorchEngine]:
    face = (Tensor(INPUT, "float32", (-1, *shape)),), (Tensor(OUTPUT, "float32", (-1, 10)),)
    low = ("bf16", "fp16") if where == "cuda" else ("bf16",)
    arms = {"eager fp32": TorchEngine(model, *face, device=where)} | {f"eager {name}": TorchEngine(model, *face, precision=name, device=where) for name in low}
    return arms | {f"torch.compile {name}": TorchEngine(model, *face, compiled=True, precision=name, device=where) for name in ("fp32", low[-1])}


def engine_arms(paths: dict[str, Path], options: Options, cache: Cache, found: Found) -> Iterator[tuple[str, Engine]]:
    """TensorRT in every precision, with and without graphs; where there is no GPU its plans are built, and the CPU's engines run."""
    for name, source in TENSORRT.items():
        precision = name.partition("+")[0]
        for graphs in (True, False) if torch.cuda.is_available() else (True,):
            arm = f"tensorrt {name}{'' if graphs else ', no graphs'}"
            yield from opened(arm, "tensorrt", paths[source], Options(precision, options.opt_batch, options.max_batch, cuda_graphs=graphs), cache, found)
    for backend, precision in (("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("openvino", "fp32"), ("openvino", "int8")) if not torch.cuda.is_available() else ():
        yield from opened(f"{backend} {precision}", backend, paths[precision], Options(precision, options.opt_batch, options.max_batch), cache, found)


def opened(arm: str, backend: str, path: Path, options: Options, cache: Cache, found: Found) -> Iterator[tuple[str, Engine]]:
    try:
        built = get_or_build(path, backend, options, cache)
        found.build_s[arm] = built.build_s
        made = load(built, options)
    except (UserError, CannotExecute) as error:
        found.built[arm] = str(error)
        return
    found.notes[arm] = [*built.notes, *getattr(made, "notes", [])]
    if hasattr(made, "memory_bytes"):
        found.memory_mib[arm] = made.memory_bytes / 2**20
    yield arm, made


def measure(name: str, chosen: dict[str, Any], folder: Path, batches: tuple[int, ...], rounds: dict[int, int], where: str) -> Found:
    options, shape = chosen[name]
    torch.manual_seed(0)
    model, found = models.build(options, shape, 10).eval(), Found()
    rows = np.random.default_rng(0).normal(size=(max(64, *batches), *shape)).astype(np.float32)
    folder.mkdir()
    paths = files_of(model, rows, folder, spec.Export(opt_batch=8 if max(batches) >= 8 else 2, max_batch=max(batches), tolerance=1e-2))
    arms: dict[str, Any] = torch_arms(model.to(where), shape, where)
    plan = Options(opt_batch=8 if max(batches) >= 8 else 2, max_batch=max(batches))
    arms |= dict(engine_arms(paths, plan, Cache(folder / "cache"), found))
    for batch in batches:
        x = np.ascontiguousarray(rows[:batch])
        compare(arms, x, found)
        calls: dict[str, Callable[[], object]] = {arm: partial(one.run, {INPUT: x}) for arm, one in arms.items()}
        found.ms[batch] = evaluate.latency(calls, rounds[batch], 10, seed=batch)
        show(name, batch, found)
    if where == "cuda":
        found.slots_rows_s = {slots: concurrent(paths["fp16"], plan, slots, rows[:8], Cache(folder / "cache")) for slots in (1, 2, 3)}
        print(f"  fp16 batches of 8 in flight at once: {', '.join(f'{slots}: {rate:,.0f} rows/s' for slots, rate in found.slots_rows_s.items())}")
    return found


def compare(arms: dict[str, Any], x: np.ndarray, found: Found) -> None:
    """Errors of every arm against eager fp32; an arm that fails is taken out and named."""
    right = arms["eager fp32"].run({INPUT: x})[OUTPUT].astype(np.float64)
    for arm in list(arms):
        try:
            error = float(np.abs(arms[arm].run({INPUT: x})[OUTPUT] - right).max() / np.abs(right).max())
        except (RuntimeError, UserError) as failed:
            found.built[arm] = f"at batch {len(x)}: {str(failed).splitlines()[0][:200]}"
            del arms[arm]
            continue
        found.errors[arm] = max(found.errors.get(arm, 0.0), error if np.isfinite(error) else float("inf"))


def concurrent(path: Path, plan: Options, slots: int, x: np.ndarray, cache: Cache, seconds: float = 2.0) -> float:
    """Rows a second with as many threads as slots."""
    options = Options("fp16", plan.opt_batch, plan.max_batch, slots=slots)
    made = load(get_or_build(path, "tensorrt", options, cache), options)
    counts, deadline = [0] * slots, time.perf_counter() + seconds

    def ask(number: int) -> None:
        while time.perf_counter() < deadline:
            made.run({INPUT: x})
            counts[number] += len(x)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(slots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made.close()
    return sum(counts) / seconds


def lines(batch: int, found: Found) -> Iterator[str]:
    base = found.ms[batch]["eager fp32"]
    for arm, times in sorted(found.ms[batch].items(), key=lambda item: float(np.median(item[1]))):
        p50, p99 = np.percentile(times, (50, 99))
        yield f"  batch {batch:2d}  {arm:26s} p50 {p50:8.3f} ms  p99 {p99:8.3f}  {batch / p50 * 1e3:9,.0f} rows/s  eager / this {np.median(base / times):6.2f}  error {found.errors[arm]:.1e}"


def show(name: str, batch: int, found: Found) -> None:
    print(f"{name}, batch {batch}", *lines(batch, found), sep="\n", flush=True)


def paired(above: np.ndarray, below: np.ndarray) -> dict[str, float]:
    """Median of the paired ratios with its 95 % interval from order statistics."""
    ratios = np.sort(above / below)
    low, high = stats.binom.interval(0.95, len(ratios), 0.5)
    return {"value": float(np.median(ratios)), "low": float(ratios[int(low)]), "high": float(ratios[min(int(high), len(ratios) - 1)])}


def figures_of(name: str, found: Found) -> dict[str, dict[str, float]]:
    figures = {}
    for batch in (min(found.ms), max(found.ms)):
        ms = found.ms[batch]
        ours = [arm for arm in ms if not arm.startswith(("eager", "torch.compile"))]
        best = min(ours, key=lambda arm: float(np.median(ms[arm])))
        figures[f"{name}_b{batch}_speedup"] = paired(ms["eager fp32"], ms[best])
    first = found.ms[min(found.ms)]
    if "tensorrt fp16, no graphs" in first and "tensorrt fp16" in first:
        figures[f"{name}_graphs_b1"] = paired(first["tensorrt fp16, no graphs"], first["tensorrt fp16"])
    exact = max(error for arm, error in found.errors.items() if arm.endswith("fp32") and "eager" not in arm)
    return figures | {f"{name}_parity_error": {"value": exact, "low": exact, "high": exact}}


def hardware() -> str:
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{card}, {cpu()}, {os.cpu_count()} CPUs, python {platform.python_version()}, torch {torch.__version__}, {engine.backend('tensorrt').version()}"


def validity(folder: Path) -> str:
    """What RTX says of a plan of its own on this card; "not RTX" where it cannot be asked."""
    trt = engine.backend("tensorrt")._trt()
    plans = sorted(folder.glob("*/cache/*/engine"), key=lambda path: path.stat().st_size)
    plans = [path for path in plans if '"backend": "tensorrt"' in path.with_name("manifest.json").read_text()]
    if not hasattr(trt.Runtime, "get_engine_validity") or not plans:
        return "not RTX" if plans else "no plan"
    verdict, reasons = trt.Runtime(engine.backend("tensorrt")._logger()).get_engine_validity(plans[0].read_bytes())
    return f"{verdict} {reasons}"


def report(found: dict[str, Found], about: str, said: str) -> str:
    text = [f"# GPU: torch and TensorRT in every precision\n\n{datetime.date.today()}, {about}. `python {' '.join(sys.argv)}`\nRTX says of its plan here: {said}. Times are of whole calls, host to host.\n"]
    for name, one in found.items():
        text += [f"## {name}\n\n```", *(line for batch in one.ms for line in lines(batch, one)), "```\n"]
        text += [f"- {arm}: not run: {why}" for arm, why in one.built.items()]
        text += [f"- {arm}: {note}" for arm, notes in one.notes.items() for note in notes]
        text += [f"- on the card, MiB: {', '.join(f'{arm} {size:.0f}' for arm, size in one.memory_mib.items())}"] if one.memory_mib else []
        text += [f"- batches in flight -> rows/s (fp16, batch 8): {one.slots_rows_s}"] if one.slots_rows_s else []
    return "\n".join(text) + "\n"


def compressed(options: argparse.Namespace, where: str) -> compression.Compressed:
    """The part that compresses; nothing without data, and why is printed."""
    if options.data is None:
        print("compression: not measured: no --data")
        return compression.Compressed()
    kept = Found()
    found = compression.measure(options.data, options.small, where, lambda arm, backend, path, asked, cache: opened(arm, backend, path, asked, cache, kept))
    print(*compression.lines(found), *(f"compression: {arm}: not run: {why}" for arm, why in kept.built.items()), sep="\n", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--small", action="store_true", help="small models, few rounds: runs anywhere")
    parser.add_argument("--model", action="append", choices=sorted(FULL), help="default: all; may be repeated")
    parser.add_argument("--part", choices=("engines", "training", "compression", "all"), default="all", help="(default %(default)s)")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's files, for the time to an accuracy and for compression")
    parser.add_argument("--train-budget-s", type=float, default=270, help="of training; after it only plain arms are opened (default %(default)s)")
    parser.add_argument("--out", type=Path, help="write the results here (markdown)")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # eager fp32 is the reference
    where = "cuda" if torch.cuda.is_available() else "cpu"
    if where == "cpu":
        torch.set_num_threads(1)
    batches = (1, 4) if options.small else (1, 8, 64)
    rounds = dict.fromkeys(batches, 20) if options.small else {1: 300, 8: 200, 64: 60}
    print(hardware())
    names, found, said = options.model or [*FULL], {}, "not asked"
    if options.part in ("engines", "all"):
        with tempfile.TemporaryDirectory() as folder:
            found = {name: measure(name, SMALL if options.small else FULL, Path(folder) / name, batches, rounds, where) for name in names}
            said = validity(Path(folder))
    for name, one in found.items():
        for arm, why in one.built.items():
            print(f"{name}: {arm}: not run: {why}")
    trained = training.run(names, options, where) if options.part in ("training", "all") else ({}, {})
    shrunk = compressed(options, where) if options.part in ("compression", "all") else compression.Compressed()
    figures = {figure: value for name, one in found.items() for figure, value in figures_of(name, one).items()} | training.figures_of(*trained, paired) | compression.figures_of(shrunk, paired)
    if options.out:
        options.out.write_text(report(found, hardware(), said) + training.report(*trained) + "\n".join(["\n## Compression", "", *compression.lines(shrunk), ""]))
    if options.json:
        print(json.dumps({"benchmark": "gpu", "figures": figures}))


if __name__ == "__main__":
    main()
