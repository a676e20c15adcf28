"""What our search is worth: hypervolume over random search at equal trials, and what Ray and Optuna cost beside the trials.

    python benchmarks/tune_search.py --json

`hypervolume_over_random`: a grid of 432 points, every one trained (width, depth, learning rate, batch size, momentum of a CNN on
digits; `--measure` does it again), so its true front is known. Our searcher (the very one `portaisys tune` uses, through Ray Tune)
against random choice without repetition from the same grid, at equal trials, 5 seeds, ratio of hypervolumes.
`tune_overhead`: wall / (sum of trial time / slots) - 1 on 200 one-second trials in two slots.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import platform
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import optuna
import ray
import torch
from scipy import stats

from portaisys import cluster, data, evaluate, models, spec
from portaisys.pareto import costs, front, hypervolume
from portaisys.train import fit
from portaisys.trials import Evaluate, search
from portaisys.weights import fresh

GRID = Path(__file__).parent / "results/tune_grid_digits.json"
SPACE = {
    "width": (4, 8, 12, 16, 24, 32), "blocks": (1, 2, 3), "learning_rate": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0), "batch_size": (16, 64), "momentum": (0.0, 0.9),
}  # fmt: skip
OBJECTIVES = {"validation_error": "min", "parameters": "min", "macs": "min"}


def measure(point: tuple[float, ...]) -> dict[str, float]:
    """Train one point of the grid: 4 epochs on digits, validation error on 800 rows it has not seen."""
    values = dict(zip(SPACE, point, strict=True))
    torch.set_num_threads(1)
    tree = {
        "name": "grid", "data": {"validation_rows": 800, "test_rows": 100, "calibration_rows": 100}, "model": {"channels": [values["width"], 2 * values["width"]], "blocks": [values["blocks"]] * 2},
        "train": {name: values[name] for name in ("learning_rate", "batch_size", "momentum")} | {"epochs": 4, "clip_norm": None},
    }  # fmt: skip
    options = spec.parse(tree)
    splits = data.load(options.data)
    model = fresh(options, splits)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(spec.UserError):  # what diverges keeps the weights it has then
        fit(model, splits.train, options.train, folder=Path(folder), key="grid")
    error = 1 - evaluate.accuracy(np.nan_to_num(evaluate.predict_rows(models.predictor(model), splits.validation.x, 256)), splits.validation.y)
    return {"validation_error": error, **models.count(model, splits.shape)}


def measure_all() -> None:
    grid = list(itertools.product(*SPACE.values()))
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(measure, grid, chunksize=4))
    GRID.write_text(json.dumps({"space": SPACE, "points": [[list(point), values] for point, values in zip(grid, found, strict=True)]}))
    print(f"{len(grid)} points measured, written to {GRID}")


@functools.cache
def _measured() -> dict[tuple[float, ...], dict[str, float]]:
    return {tuple(point): values for point, values in json.loads(GRID.read_text())["points"]}


def trainer(seconds: float = 0.0) -> Evaluate:
    """What a trial does: say what training gave at its point, after `seconds`. Carries the table along: it runs in a process without this file."""
    measured, names = _measured(), tuple(SPACE)

    def trial(params, report):  # type: ignore[no-untyped-def]
        time.sleep(seconds)
        return measured[tuple(params[name] for name in names)]

    return trial


def everything() -> list[dict[str, float]]:
    return list(_measured().values())


@functools.cache
def yardstick() -> tuple[np.ndarray, float]:
    """The reference point, 1.1 times the worst of the true front in each objective (the usual choice: Ishibuchi et al. 2018), and the true front's volume."""
    points = costs(everything(), OBJECTIVES)
    reference = 1.1 * points[front(points)].max(0)
    return reference, hypervolume(points, reference)


def volume(points: list[dict[str, float]]) -> float:
    """Hypervolume as a fraction of the true front's."""
    reference, best = yardstick()
    return hypervolume(costs(points, OBJECTIVES), reference) / best


def ours(seed: int, trials: int, slots: int) -> float:
    options = spec.Search(trials=trials, max_concurrent=slots, seed=seed, objectives=OBJECTIVES)
    with tempfile.TemporaryDirectory() as folder:
        ended = search(trainer(), SPACE, options, Path(folder))
    assert {one.state for one in ended} == {"done"}, {one.because for one in ended}
    return volume([dict(one.values or {}) for one in ended])


def at_random(seed: int, trials: int) -> float:
    grid = list(itertools.product(*SPACE.values()))
    return volume([_measured()[point] for point in random.Random(seed).sample(grid, trials)])


def gain(seeds: int, trials: int, slots: int) -> dict[str, float]:
    # Random search is cheap, so its expectation is taken over many draws; ours is what 5 seeds gave.
    random_mean = float(np.mean([at_random(seed, trials) for seed in range(200)]))
    found = np.array([ours(seed, trials, slots) for seed in range(seeds)])
    ratios = found / random_mean
    low, high = stats.t.interval(0.95, len(ratios) - 1, ratios.mean(), stats.sem(ratios))
    print(f"hypervolume, {trials} trials: ours {found.mean():.3f} of the true front's (seeds: {', '.join(f'{v:.3f}' for v in found)}), random {random_mean:.3f}")
    return {"value": float(ratios.mean()), "low": float(low), "high": float(high)}


def overhead(trials: int, slots: int) -> dict[str, float]:
    options = spec.Search(trials=trials, max_concurrent=slots, objectives=OBJECTIVES)
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        ended = search(trainer(1.0), SPACE, options, Path(folder))
        wall = time.monotonic() - started
    assert len(ended) == trials and {one.state for one in ended} == {"done"}
    cost = wall / (sum(one.seconds for one in ended) / slots) - 1
    print(f"{len(ended)} one-second trials in {slots} slots: {wall:.1f} s, overhead {cost:.3f}")
    return {"value": cost, "low": cost, "high": cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=40, help="of each search on the grid (default: %(default)s)")
    parser.add_argument("--overhead-trials", type=int, default=200)
    parser.add_argument("--measure", action="store_true", help="train every point of the grid anew and write it down")
    options = parser.parse_args()
    slots = 2
    if options.measure:
        measure_all()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, ray {ray.__version__}, optuna {optuna.__version__}, python {platform.python_version()}")
    with cluster.on_ray(slots):
        figures = {"hypervolume_over_random": gain(options.seeds, options.trials, slots), "tune_overhead": overhead(options.overhead_trials, slots)}
    if options.json:
        print(json.dumps({"benchmark": "tune_search", "figures": figures}))


if __name__ == "__main__":
    main()
