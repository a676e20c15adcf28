"""Training in bf16 against fp32, equal steps from equal weights, three seeds in turns; what train.precision=auto takes, and how long a checkpoint holds the steps up.

    python benchmarks/train_precision.py --json

A residual CNN and a vision transformer learn a part of Fashion-MNIST. Speed: rows a second of the steps alone, as the loop reports them.
`bf16_over_fp32_cnn`, `bf16_over_fp32_transformer`: speed of bf16 over that of fp32, the least and the most of three seeds around the
middle one; above 1 needs bf16 units (AVX512-BF16, AMX), without which a step takes ten times as long and this benchmark half an hour. `accuracy_lost_cnn`, `accuracy_lost_transformer`:
validation accuracy of fp32 less that of bf16, with its 95 % interval over the rows of all seeds. `auto_over_best_cnn`,
`auto_over_best_transformer`: speed of what auto took over the faster of the two. `checkpoint_blocked`: of the time of a synchronous
write of 200 MB, what a step waits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from portaisys import data, models, spec
from portaisys.checkpoint import Writer
from portaisys.data import Splits
from portaisys.engine.cpu import device
from portaisys.train import fit

MODELS = {
    "cnn": spec.ConvNet(channels=(32, 64), blocks=(1, 1)),
    "transformer": spec.Transformer(name="transformer", patch=4, dim=128, depth=4, heads=4),
}
OPTIMIZERS = {"cnn": {}, "transformer": {"optimizer": "adamw", "learning_rate": 1e-3}}
SEEDS = (0, 1, 2)


def trained(name: str, splits: Splits, rows: int, epochs: int, precision: str, seed: int) -> tuple[float, np.ndarray, list[str]]:
    """Rows a second (median of the epochs), which validation rows it gets right, and what fit() had to say."""
    torch.manual_seed(seed)
    model = models.build(MODELS[name], splits.shape, len(splits.labels), splits.mean, splits.std)
    options = spec.Train(epochs=epochs, batch_size=64, precision=precision, checkpoint_every_steps=10**9, **OPTIMIZERS[name])
    speeds, notes = [], []
    few = data.Split(splits.train.table, splits.train.indices[:rows])
    with tempfile.TemporaryDirectory() as folder:
        fit(model, few, options, folder=Path(folder), key="bench", seed=seed, report=lambda metrics, saved: speeds.append(metrics["samples_per_s"]), note=notes.append)
    logits = models.predictor(model)(splits.validation.x)
    return statistics.median(speeds), logits.argmax(1) == splits.validation.y, notes


def compare(name: str, splits: Splits, rows: int, epochs: int) -> dict[str, dict[str, float]]:
    ratios, differences, shares = [], [], []
    for seed in SEEDS:
        order = ("fp32", "bf16") if seed % 2 == 0 else ("bf16", "fp32")
        found = {precision: trained(name, splits, rows, epochs, precision, seed) for precision in order}
        auto, _, notes = trained(name, splits, rows, epochs, "auto", seed)
        (fp32, right, _), (bf16, also_right, _) = found["fp32"], found["bf16"]
        ratios.append(bf16 / fp32)
        shares.append(auto / max(fp32, bf16))
        differences.append(right.astype(float) - also_right)
        print(f"{name} seed {seed}: fp32 {fp32:,.0f} rows/s {right.mean():.2%}, bf16 {bf16:,.0f} rows/s {also_right.mean():.2%}, auto {auto:,.0f} rows/s ({notes[0]})", flush=True)
    lost = np.concatenate(differences)
    wide = 1.96 * lost.std(ddof=1) / len(lost) ** 0.5
    return {
        f"bf16_over_fp32_{name}": spread(ratios),
        f"accuracy_lost_{name}": {"value": float(lost.mean()), "low": float(lost.mean() - wide), "high": float(lost.mean() + wide)},
        f"auto_over_best_{name}": spread(shares),
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"value": statistics.median(values), "low": min(values), "high": max(values)}


def blocked(rounds: int = 7) -> dict[str, float]:
    """Share of a synchronous write that a step waits for, after the first, which also gets the memory."""
    tensors, shares = {str(number): torch.randn(1_000_000) for number in range(50)}, []
    with tempfile.TemporaryDirectory() as folder, Writer(Path(folder), "bench", {}) as writer:
        for step in range(rounds + 1):
            started = time.perf_counter()
            writer.save({"step": step}, tensors)
            copied = time.perf_counter()
            writer.wait()
            shares.append((copied - started) / (time.perf_counter() - started))
    return spread(shares[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", type=int, default=3200, help="training rows (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=1, help="(default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{device()}, {os.cpu_count()} CPUs, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, python {platform.python_version()}")
    splits = data.load(spec.FashionMnist(source="fashion_mnist"))
    figures = {figure: value for name in MODELS for figure, value in compare(name, splits, options.rows, options.epochs).items()}
    figures["checkpoint_blocked"] = blocked()
    for name, figure in figures.items():
        print(f"{name}: {figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})")
    if options.json:
        print(json.dumps({"benchmark": "train_precision", "figures": figures}))


if __name__ == "__main__":
    main()
