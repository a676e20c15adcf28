"""What compression leaves on one GPU, the part of gpu.py that compresses: accuracy and speed of a pruned, distilled and quantized model's engines. Knows no Ray.

The residual CNN of jobs/specs/fashion_mnist.yaml is trained on the device, half of its multiply-accumulates are pruned (Taylor, all layers together), what is left is distilled from the whole,
and exported, cast and quantized with calibration rows. Every engine answers all test rows: accuracy, and what it loses against the dense torch model with Tango's bounds (95 % to either
side). Times are of whole calls, rows on the host to answers on the host, interleaved. Nothing is chosen by test rows.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from portaisys import data, evaluate, gate, models, spec
from portaisys.compress.cast import cast
from portaisys.compress.distill import distillation
from portaisys.compress.prune import prune
from portaisys.compress.quantize import quantize
from portaisys.distributed import Place
from portaisys.engine import Engine, Options
from portaisys.engine.cache import Cache
from portaisys.export import INPUT, OUTPUT, export
from portaisys.train import fit

RECIPE = Path(__file__).parents[1] / "jobs/specs/fashion_mnist.yaml"
DENSE = "dense torch"
# Arm -> the file it is built from and its precision; what is not between Q and DQ is fp16 where two are named.
ARMS = {
    "dense fp32": ("dense fp32", "fp32"), "dense fp16": ("dense fp16", "fp16"), "small fp32": ("small fp32", "fp32"), "small fp16": ("small fp16", "fp16"), "small int8": ("small int8", "int8"),
    "small int8+fp16": ("small int8+fp16", "int8"), "small fp8": ("small fp8", "fp8"), "small fp8+fp16": ("small fp8+fp16", "fp8"),
}  # fmt: skip
Opened = Callable[[str, str, Path, Options, Cache], Iterator[tuple[str, Engine]]]


@dataclass
class Compressed:
    """`right`: arm -> which test rows it answers rightly; `ms`: batch -> arm -> milliseconds [rounds]; `macs`: of the dense and the small model."""

    right: dict[str, np.ndarray] = field(default_factory=dict)
    ms: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    macs: tuple[int, int] = (0, 0)


def learnt(model: torch.nn.Module, splits: data.Splits, train: spec.Train, where: str, loss: Any = None) -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as work:
        return fit(model, splits.train, train, folder=Path(work), key="benchmark", loss=loss, note=print, place=Place(device=where)).cpu()


def files_of(dense: torch.nn.Module, small: torch.nn.Module, rows: np.ndarray, folder: Path, options: spec.Export) -> dict[str, Path]:
    """Every file, made of two fp32 exports."""
    paths = {name: folder / f"{name.replace(' ', '-')}.onnx" for name, _ in ARMS.values()}
    for name, model in (("dense", dense), ("small", small)):
        export(model, rows, options, paths[f"{name} fp32"])
        cast(paths[f"{name} fp32"], paths[f"{name} fp16"], "fp16")
    for name in ("int8", "fp8"):
        quantize(paths["small fp32"], paths[f"small {name}"], rows, spec.Quantize(reduce_range=False), name)
        cast(paths[f"small {name}"], paths[f"small {name}+fp16"], "fp16")
    return paths


def measure(source: Path, small: bool, where: str, opened: Opened) -> Compressed:
    """Train, compress, build and measure. `source`: folder of Fashion-MNIST's files."""
    shorter = ["train.epochs=1", "data.calibration_rows=500", "data.validation_rows=57500", "model.channels=[16,32,32]"] if small else []
    chosen = spec.load(RECIPE, [f"data.path={source}", f"train.use_gpu={str(where == 'cuda').lower()}", *shorter])
    splits, found = data.load(chosen.data), Compressed()
    torch.manual_seed(chosen.seed)
    dense = learnt(models.build(chosen.model, splits.shape, len(splits.labels), splits.mean, splits.std), splits, chosen.train, where)
    less = copy.deepcopy(dense)
    prune(less, splits.shape, spec.Prune(mac_cut=0.5, importance="taylor", scope="global"), len(splits.labels), splits)
    found.macs = models.count(dense, splits.shape)["macs"], models.count(less, splits.shape)["macs"]
    taught = chosen.train.model_copy(update={"learning_rate": chosen.train.learning_rate / 2})
    less = learnt(less, splits, taught, where, distillation(copy.deepcopy(dense).to(where), spec.Distill()))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        paths = files_of(dense, less, splits.calibration.x, folder, chosen.export.model_copy(update={"tolerance": 1e-2}))
        engines = dict(arms(paths, chosen.export, Cache(folder / "cache"), opened))
        test = splits.test
        found.right = {DENSE: evaluate.correct(evaluate.predict_rows(models.predictor(dense), test.x, 512), test.y)}
        found.right |= {arm: evaluate.correct(evaluate.predict_rows(lambda x, engine=engine: engine.run({INPUT: x})[OUTPUT], test.x, chosen.export.max_batch), test.y) for arm, engine in engines.items()}
        for batch, rounds in {1: 20 if small else 300, chosen.export.max_batch: 20 if small else 60}.items():
            x = np.ascontiguousarray(test.x[:batch])
            found.ms[batch] = evaluate.latency({arm: partial(engine.run, {INPUT: x}) for arm, engine in engines.items()}, rounds, 10, seed=batch)
        for engine in engines.values():
            engine.close()
    return found


def arms(paths: Mapping[str, Path], export_options: spec.Export, cache: Cache, opened: Opened) -> Iterator[tuple[str, Engine]]:
    """TensorRT's engines; where there is no GPU its plans are built, and ONNX Runtime's run."""
    for arm, (source, precision) in ARMS.items():
        options = Options(precision, export_options.opt_batch, export_options.max_batch)
        yield from opened(f"{arm}, tensorrt", "tensorrt", paths[source], options, cache)
        if not torch.cuda.is_available() and arm in ("dense fp32", "small fp32", "small int8"):
            yield from opened(f"{arm}, onnxruntime", "onnxruntime", paths[source], options, cache)


def drop(before: np.ndarray, now: np.ndarray) -> dict[str, float]:
    """Percent points lost over the same rows, with Tango's bounds, 95 % to either side."""
    lost, gained = int((before & ~now).sum()), int((~before & now).sum())
    low, high = gate.tango_bound(lost, gained, len(now), 0.95)
    return {"value": 100 * (lost - gained) / len(now), "low": 100 * low, "high": 100 * high}


def lines(found: Compressed) -> Iterator[str]:
    """A line an arm."""
    if not found.right:
        return
    yield f"  pruned from {found.macs[0]:,} to {found.macs[1]:,} multiply-accumulates; dense torch {found.right[DENSE].mean():.2%} of {len(found.right[DENSE]):,} test rows"
    for arm in (arm for arm in found.right if arm != DENSE):
        less, times = drop(found.right[DENSE], found.right[arm]), ", ".join(f"batch {batch} {np.median(ms[arm]):.3f} ms" for batch, ms in found.ms.items())
        yield f"  {arm}: {found.right[arm].mean():.2%}, loses {less['value']:.2f} points ({less['low']:.2f} to {less['high']:.2f}); {times}"


def figures_of(found: Compressed, paired: Callable[[np.ndarray, np.ndarray], dict[str, float]]) -> dict[str, dict[str, float]]:
    """Points lost by each quantized engine that ran, and the time of the dense fp32 engine over the fastest small one's."""
    figures = {f"compressed_{arm.partition(',')[0].removeprefix('small ').replace('+', '_')}_drop_points": drop(found.right[DENSE], found.right[arm]) for arm in found.right if arm.startswith(("small int8", "small fp8"))}
    for batch, ms in found.ms.items():
        dense = next((arm for arm in ms if arm.startswith("dense fp32")), "")
        small = [arm for arm in ms if arm.startswith("small")]
        if dense and small:
            figures[f"compressed_b{batch}_speedup"] = paired(ms[dense], ms[min(small, key=lambda arm: float(np.median(ms[arm])))])
    return figures
