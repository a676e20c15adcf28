"""Batches by a token budget against random batches, padded to their longest row and to the longest there may be: one thread, real texts.

    python benchmarks/train_batching.py --json

WordNet's glosses (Debian's wordnet-base) by topic, and a small transformer. All arms have as many real tokens a batch on average, and
take turns in the same rounds: a round is a few optimiser steps of each, from reading the rows to new weights. Accuracy: `fit()` on the
same rows for the same epochs with either plan, the test split scored in the end. What is padded how changes no gradient of a random batch
(tests/test_models.py), so those are computed there in sorted parts, which takes a third of the time.
`tokens_per_s_over_random_batches`: real tokens a second over those of random batches padded to their longest, median of paired rounds;
`tokens_per_s_over_padded_to_max`: over those padded to data.max_tokens; `padding_waste`: of the plan, mean and range of its epochs;
`accuracy_difference`: token budget minus random in accuracy, mean over seeds, 95 % interval over test rows, paired.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats

from portaisys import data, evaluate, models, spec
from portaisys.data import Split, Splits
from portaisys.data.batches import Batch, Cut, cut, token_budget, waste
from portaisys.engine.cpu import device
from portaisys.rows import shuffled
from portaisys.step import make_optimizer
from portaisys.train import fit

TOKENS = 4096  # a batch, padded
MODEL = spec.TextTransformer(name="text_transformer", dim=64, depth=2, heads=4)
DATA = spec.Text(source="text", test_rows=8000)
ROUNDS, STEPS, WARMUP = 20, 2, 2
ROWS, EPOCHS, SEEDS = 20_000, 4, (0, 1)  # of the accuracy
LONGEST, MOST, BUDGET = "random, to the longest", f"random, to {DATA.max_tokens}", f"budget of {TOKENS}"


def build(splits: Splits, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return models.build(MODEL, splits.shape, len(splits.labels), vocabulary=splits.vocabulary)


def options(batch_size: int) -> spec.Train:
    return spec.Train(epochs=EPOCHS, batch_size=batch_size, optimizer="adamw", learning_rate=3e-3, weight_decay=0.01, checkpoint_every_steps=100_000)


# --- speed ------------------------------------------------------------------------------------------------------------


def stepper(splits: Splits, batches: Sequence[Batch], parts: Cut | None = None, width: int = 0) -> Callable[[], tuple[float, float]]:
    """A function that trains STEPS batches and returns real tokens and padded tokens a second. `parts`: cuts a batch; `width`: pad to it."""
    model = build(splits, 0).train()
    optimizer, upcoming = make_optimizer(model, options(1)), iter(batches)

    def run() -> tuple[float, float]:
        real = padded = 0
        started = time.perf_counter()
        for _ in range(STEPS):
            batch = next(upcoming)
            for part in parts(batch, 1) if parts else [batch]:
                x, y = splits.train.take(part)
                x = np.pad(x, ((0, 0), (0, width - x.shape[1]))) if width else x
                (F.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)) * (len(part) / len(batch))).backward()
                real, padded = real + int((x != 0).sum()), padded + x.size
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        return real / seconds, padded / seconds

    return run


def speeds(splits: Splits, by_budget: Sequence[Batch], at_random: Sequence[Batch]) -> dict[str, np.ndarray]:
    """Real and padded tokens a second, [2, ROUNDS] an arm."""
    assert splits.train.lengths is not None
    parts = cut(splits.train.lengths, TOKENS)
    arms = {BUDGET: stepper(splits, by_budget, parts), LONGEST: stepper(splits, at_random), MOST: stepper(splits, at_random, width=DATA.max_tokens)}
    rng, found = np.random.default_rng(0), {name: np.empty((2, WARMUP + ROUNDS)) for name in arms}
    for index in range(WARMUP + ROUNDS):
        for name in rng.permutation(list(arms)):
            found[name][:, index] = arms[name]()
    return {name: values[:, WARMUP:] for name, values in found.items()}


def paired(above: np.ndarray, below: np.ndarray) -> dict[str, float]:
    """Median of the paired ratios with its 95 % interval from order statistics."""
    ratios = np.sort(above / below)
    low, high = stats.binom.interval(0.95, len(ratios), 0.5)
    return {"value": float(np.median(ratios)), "low": float(ratios[int(low)]), "high": float(ratios[min(int(high), len(ratios) - 1)])}


# --- accuracy ---------------------------------------------------------------------------------------------------------


def right(splits: Splits, batch_size: int, seed: int, by_budget: bool) -> np.ndarray:
    """Which test rows a model gets right that was trained on the same ROWS rows EPOCHS times."""
    some = Split(splits.train.table, np.sort(np.random.default_rng(0).choice(splits.train.indices, ROWS, replace=False)))
    lengths, at_random = some.lengths, shuffled(ROWS, batch_size, seed)
    assert lengths is not None
    plan: Any = token_budget(lengths, TOKENS, seed) if by_budget else lambda epoch: [batch[np.argsort(-lengths[batch])] for batch in at_random(epoch)]
    with tempfile.TemporaryDirectory() as folder:
        model = fit(build(splits, seed), some, options(batch_size), folder=Path(folder), key="benchmark", seed=seed, batches=plan, cut=cut(lengths, TOKENS))
    run = models.predictor(model)
    order = np.argsort(splits.test.lengths)
    hits = [evaluate.correct(run(x), y) for x, y in (splits.test.take(part) for part in np.array_split(order, 40))]
    return np.concatenate(hits)


def accuracy(splits: Splits, batch_size: int) -> dict[str, float]:
    differences = []
    for seed in SEEDS:
        started = time.monotonic()
        budget = right(splits, batch_size, seed, True)
        between = time.monotonic()
        random = right(splits, batch_size, seed, False)
        print(f"  seed {seed}: {BUDGET} {budget.mean():.4f} in {between - started:.0f} s, random {random.mean():.4f} in {time.monotonic() - between:.0f} s, after {ROWS * EPOCHS:,} samples each")
        differences.append(budget.astype(float) - random)
    rows = np.mean(differences, 0)
    spread = 1.96 * rows.std(ddof=1) / len(rows) ** 0.5
    return {"value": float(rows.mean()), "low": float(rows.mean() - spread), "high": float(rows.mean() + spread)}


def padding(lengths: np.ndarray, batches: Sequence[Batch]) -> float:
    """Of an epoch by token budget, as it is cut."""
    parts = cut(lengths, TOKENS)
    return waste(lengths, [part for batch in batches for part in parts(batch, 1)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    splits = data.load(DATA)
    lengths = splits.train.lengths
    assert lengths is not None
    plan = token_budget(lengths, TOKENS, seed=0)
    batch_size = round(len(lengths) / len(plan(0)))
    at_random = shuffled(len(lengths), batch_size, seed=0)
    print(f"{device()}, {os.cpu_count()} CPUs, one thread, torch {torch.__version__}, python {platform.python_version()}")
    percentiles = ", ".join(f"{value:.0f}" for value in np.percentile(lengths, (10, 50, 90, 100)))
    print(f"{len(lengths):,} glosses, tokens p10, p50, p90, most: {percentiles}; {sum(p.numel() for p in build(splits, 0).parameters()):,} parameters")
    for name, batches, wasted in ((BUDGET, plan(0), padding(lengths, plan(0))), (LONGEST, at_random(0), waste(lengths, at_random(0)))):
        print(f"  {name:24s} {len(batches)} batches of {min(map(len, batches))} to {max(map(len, batches))} rows, {lengths.sum() / len(batches):.0f} real tokens each, {wasted:.3f} of what is computed is padding")
    print(f"  {MOST:24s} {1 - lengths.mean() / DATA.max_tokens:.3f} is padding")
    found = speeds(splits, plan(0), at_random(0))
    for name, (real, padded) in found.items():
        print(f"  {name:24s} {np.median(real):8.0f} real tokens/s ({real.min():.0f} to {real.max():.0f}), {np.median(padded):8.0f} with padding")
    each = [padding(lengths, plan(epoch)) for epoch in range(5)]
    figures = {
        "tokens_per_s_over_random_batches": paired(found[BUDGET][0], found[LONGEST][0]),
        "tokens_per_s_over_padded_to_max": paired(found[BUDGET][0], found[MOST][0]),
        "padding_waste": {"value": float(np.mean(each)), "low": min(each), "high": max(each)},
        "accuracy_difference": accuracy(splits, batch_size),
    }
    for name, figure in figures.items():
        print(f"{name}: {figure['value']:.4f} ({figure['low']:.4f} to {figure['high']:.4f})")
    if asked.json:
        print(json.dumps({"benchmark": "train_batching", "figures": figures}))


if __name__ == "__main__":
    main()
