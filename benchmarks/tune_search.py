"""What our search is worth: hypervolume over random search at equal trials, and what Ray and Optuna cost beside the trials.

    python benchmarks/tune_search.py --json

`hypervolume_over_random`: the grid of prune_digits' kind, 6 x 5 x 5 x 4 = 600 points with a known front, our searcher (the
very one `portaisys tune` uses, through Ray Tune) against random choice of the same grid, 5 seeds, ratio of hypervolumes.
`tune_overhead`: wall / (sum of trial time / slots) - 1 on 200 one-second trials in two slots.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import optuna
import ray
from scipy import stats

from portaisys import cluster, spec, tune

WIDTHS, DEPTHS, RATIOS, RATES = (16, 24, 32, 48, 64, 96), (1, 2, 3, 4, 5), (0.0, 0.2, 0.4, 0.6, 0.8), (0.01, 0.03, 0.1, 0.3)
SPACE = {"width": WIDTHS, "depth": DEPTHS, "ratio": RATIOS, "rate": RATES}
OBJECTIVES = {"validation_error": "min", "latency_ms": "min"}


def truth(width: int, depth: int, ratio: float, rate: float) -> dict[str, float]:
    """A smooth stand-in for training, its shape taken from scaling laws: error falls with capacity and has a best learning rate; latency grows with what is left."""
    kept = width * (1 - ratio)
    error = 0.02 + 0.9 / (kept * depth) ** 0.7 + 0.03 * np.log10(rate / 0.08) ** 2 + 0.05 * ratio**4
    return {"validation_error": float(error), "latency_ms": float(0.2 + 0.004 * kept * depth + 0.05 * depth)}


def everything() -> list[dict[str, float]]:
    return [truth(*point) for point in itertools.product(*SPACE.values())]


def rows(points: list[dict[str, float]]) -> np.ndarray:
    return np.array([[point[name] for name in OBJECTIVES] for point in points])


@functools.cache
def yardstick() -> tuple[np.ndarray, float]:
    """The reference point, 1.1 times the worst of the true front in each objective (the usual choice: Ishibuchi et al. 2018), and the true front's volume."""
    points = rows(everything())
    reference = 1.1 * points[tune.front(points)].max(0)
    return reference, tune.hypervolume(points, reference)


def volume(points: list[dict[str, float]]) -> float:
    """Hypervolume as a fraction of the true front's."""
    reference, best = yardstick()
    return tune.hypervolume(rows(points), reference) / best


def ours(seed: int, trials: int, slots: int) -> float:
    def trial(params, report):  # type: ignore[no-untyped-def]
        return truth(**params)

    options = spec.Search(trials=trials, max_concurrent=slots, seed=seed, objectives=OBJECTIVES)
    with tempfile.TemporaryDirectory() as folder:
        ended = tune.search(trial, SPACE, options, Path(folder))
    return volume([dict(one.values or {}) for one in ended])


def at_random(seed: int, trials: int) -> float:
    grid = list(itertools.product(*SPACE.values()))
    return volume([truth(*point) for point in random.Random(seed).sample(grid, trials)])


def gain(seeds: int, trials: int, slots: int) -> dict[str, float]:
    # Random search is cheap, so its expectation is taken over many draws; ours is what 5 seeds gave.
    random_mean = float(np.mean([at_random(seed, trials) for seed in range(200)]))
    found = np.array([ours(seed, trials, slots) for seed in range(seeds)])
    ratios = found / random_mean
    low, high = stats.t.interval(0.95, len(ratios) - 1, ratios.mean(), stats.sem(ratios))
    print(f"hypervolume, {trials} trials: ours {found.mean():.3f} of the true front's (seeds: {', '.join(f'{v:.3f}' for v in found)}), random {random_mean:.3f}")
    return {"value": float(ratios.mean()), "low": float(low), "high": float(high)}


def overhead(trials: int, slots: int) -> dict[str, float]:
    def trial(params, report):  # type: ignore[no-untyped-def]
        time.sleep(1)
        return truth(**params)

    options = spec.Search(trials=trials, max_concurrent=slots, objectives=OBJECTIVES)
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        ended = tune.search(trial, SPACE, options, Path(folder))
        wall = time.monotonic() - started
    cost = wall / (sum(one.seconds for one in ended) / slots) - 1
    print(f"{len(ended)} one-second trials in {slots} slots: {wall:.1f} s, overhead {cost:.3f}")
    return {"value": cost, "low": cost, "high": cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=40, help="of each search on the grid of 600 (default: %(default)s)")
    parser.add_argument("--overhead-trials", type=int, default=200)
    options = parser.parse_args()
    slots = 2
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, ray {ray.__version__}, optuna {optuna.__version__}, python {platform.python_version()}")
    with cluster.on_ray(slots):
        figures = {"hypervolume_over_random": gain(options.seeds, options.trials, slots), "tune_overhead": overhead(options.overhead_trials, slots)}
    if options.json:
        print(json.dumps({"benchmark": "tune_search", "figures": figures}))


if __name__ == "__main__":
    main()
