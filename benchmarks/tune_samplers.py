"""Which sampler, and what asking again and ordered lists bring: hypervolume over random search on the measured grid, without Ray.

    python benchmarks/tune_samplers.py --json

One trial at a time, 40 trials, 20 seeds (5 for the Gaussian process), the grid and yardstick of tune_search.py. `again`:
a point that was tried is not tried a second time; the sampler hears its values or that it failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState
from tune_search import OBJECTIVES, SPACE, _measured, at_random, volume

TRIALS, TRIES = 40, 10
NAMES = tuple(SPACE)


def tpe(**options: Any) -> Callable[[int], Any]:
    return lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=TRIALS // 4, constant_liar=True, **options)


def gp(seed: int) -> Any:
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=TRIALS // 4)


# figure: sampler, lists in order?, what it hears of a point tried before (None: tries it again), seeds
CASES: dict[str, tuple[Callable[[int], Any], bool, str | None, int]] = {
    "tpe_categories": (tpe(multivariate=True), False, None, 20),
    "tpe_categories_again_values": (tpe(multivariate=True), False, "values", 20),
    "tpe_categories_again_failed": (tpe(multivariate=True), False, "failed", 20),
    "tpe_ordered_again_failed": (tpe(multivariate=True), True, "failed", 20),
    "tpe_ordered_again_failed_univariate": (tpe(), True, "failed", 20),
    "nsga2_ordered_again_failed": (lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=10), True, "failed", 20),
    "gp_ordered_again_failed": (gp, True, "failed", 5),
}


def point_of(params: dict[str, Any], ordered: bool) -> tuple[float, ...]:
    return tuple(SPACE[name][params[name]] if ordered else params[name] for name in NAMES)


def distributions(ordered: bool) -> dict[str, Any]:
    if ordered:
        return {name: optuna.distributions.IntDistribution(0, len(values) - 1) for name, values in SPACE.items()}
    return {name: optuna.distributions.CategoricalDistribution(values) for name, values in SPACE.items()}


def search(make: Callable[[int], Any], ordered: bool, hears: str | None, seed: int) -> float:
    study = optuna.create_study(directions=["minimize"] * len(OBJECTIVES), sampler=make(seed))
    known: dict[tuple[float, ...], list[float]] = {}
    draw = random.Random(seed)
    for _ in range(TRIALS):
        for again in range(TRIES + 1):
            if again == TRIES and hears:
                left = draw.choice([point for point in itertools.product(*SPACE.values()) if point not in known])
                study.enqueue_trial({name: SPACE[name].index(value) if ordered else value for name, value in zip(NAMES, left, strict=True)})
            trial = study.ask(distributions(ordered))
            point = point_of(trial.params, ordered)
            if point not in known or not hears:
                break
            study.tell(trial, **({"values": known[point]} if hears == "values" else {"state": TrialState.FAIL}))
        known[point] = [_measured()[point][name] for name in OBJECTIVES]
        study.tell(trial, known[point])
    return volume([_measured()[point] for point in known])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    by_chance = float(np.mean([at_random(seed, TRIALS) for seed in range(200)]))
    figures = {}
    for name, (make, ordered, hears, seeds) in CASES.items():
        ratios = np.array([search(make, ordered, hears, seed) for seed in range(seeds)]) / by_chance
        figures[name] = {"value": float(ratios.mean()), "low": float(ratios.min()), "high": float(ratios.max())}
        print(f"{name:38s} {ratios.mean():.3f} times random (seeds from {ratios.min():.3f} to {ratios.max():.3f})", flush=True)
    if options.json:
        print(json.dumps({"benchmark": "tune_samplers", "figures": figures}))


if __name__ == "__main__":
    main()
