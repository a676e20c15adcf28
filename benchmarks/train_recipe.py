"""The platform's recipe against plain SGD on Fashion-MNIST: time to 91 %, and what each has after equal time. Three seeds, one CPU thread a run.

    python benchmarks/train_recipe.py --json

Ours is the train section of jobs/specs/fashion_mnist_short.yaml, planned to end after its epochs. Plain SGD is what the field means by it: SGD with (Nesterov)
momentum 0.9 and a constant rate in fp32; no warm-up, weight decay, smoothing, clipping, average or augmentation. It gets the same model from the same
weights, the same batches, our layout of memory and fused steps (`speed`), so that its steps are as fast as ours, and the best of four rates. Both arms go
through `fit()`, which looks at the 5,000 validation rows six times an epoch; of ours the averaged weights are judged, which are what it returns. Seconds
are of the steps alone, as the loop reports them: evaluation is left out. Two runs are under way at any time, each in its own process with one thread, ours
among the others, so that all suffer alike (the last runs alone, and is one of plain SGD). The recipe was chosen on validation rows of seed 0.
`time_ratio_to_91`: seconds until an evaluation reaches 91 % and the next one holds it, ours over the best rate's, on validation rows; a run's last
evaluation needs no next. `time_ratio_to_91_touched`: the same where one evaluation is enough, so that plain SGD may use a lucky moment.
`points_at_equal_time`: test accuracy at the end of our plan, less that of plain SGD at its first evaluation after as many seconds, in percentage points.
Best is, for each figure, the rate of the least median time, or of the highest mean accuracy at that time, on validation rows: the test rows are read
when that is settled. A rate that does not get there by its last epoch counts with the time it was given. value, low, high: median, least, most of the seeds.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from portaisys import data, evaluate, models, spec
from portaisys.data import Split, Splits
from portaisys.engine.cpu import device
from portaisys.train import fit

SPEC = Path(__file__).parents[1] / "jobs/specs/fashion_mnist_short.yaml"
OURS, RATES, SEEDS = "ours", (0.01, 0.03, 0.1, 0.3), (0, 1, 2)
PLAIN = {"momentum": 0.9, "schedule": "constant", "warmup_fraction": 0.0, "weight_decay": 0.0, "clip_norm": None}
LOOKS = 6  # evaluations an epoch
Arm = str | float


@dataclass(frozen=True)
class Bench:
    """How large it is. `rows`, `held_out`: of training and validation, all by default; `longest`, `least`: epochs that plain SGD gets at most and at least."""

    rows: int | None = None
    held_out: int | None = None
    target: float = 0.91
    rates: Sequence[float] = RATES
    seeds: Sequence[int] = SEEDS
    least: float = 2.5
    longest: float = 5.0


@dataclass
class Run:
    """Training seconds, rows and validation accuracy at each evaluation, and the weights judged there (of ours, the last ones alone)."""

    seconds: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    weights: list[dict[str, np.ndarray]] = field(default_factory=list)

    def reached(self, target: float, looks: int) -> int | None:
        """The first evaluation from which so many in a row are at the target or above, as far as there are any."""
        above = [value >= target for value in self.accuracy]
        return next((index for index in range(len(above)) if all(above[index : index + looks])), None)

    def seconds_to(self, target: float, looks: int) -> float:
        index = self.reached(target, looks)
        return self.seconds[-1 if index is None else index]

    def rows_to(self, target: float, looks: int) -> int:
        index = self.reached(target, looks)
        return self.rows[-1 if index is None else index]

    def at(self, seconds: float) -> int:
        """The first evaluation after as much training, or the last there is."""
        return next((index for index, passed in enumerate(self.seconds) if passed >= seconds), len(self.seconds) - 1)


class Enough(Exception):
    """A run of plain SGD has shown what is asked of it."""


# --- a run, in a process of its own -----------------------------------------------------------------------------------


@functools.lru_cache
def load() -> Splits:
    return data.load(spec.load(SPEC).data)


def build(splits: Splits, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return models.build(spec.load(SPEC).model, splits.shape, len(splits.labels), splits.mean, splits.std)


def options(arm: Arm, bench: Bench) -> spec.Train:
    """An "epoch" of the loop is what lies between two looks."""
    recipe = spec.load(SPEC).train
    planned = {"epochs": round(LOOKS * (recipe.epochs if arm == OURS else bench.longest)), "checkpoint_every_steps": 10**9}
    if arm == OURS:
        return recipe.model_copy(update=planned)
    return spec.Train(batch_size=recipe.batch_size, speed=recipe.speed, learning_rate=float(arm), **PLAIN, **planned)


def between_looks(rows: int, batch_size: int, seed: int) -> Callable[[int], list[np.ndarray]]:
    """Batches from one look to the next: in every epoch each row once, in a new order, as the loop's own."""

    def batches(look: int) -> list[np.ndarray]:
        epoch, index = divmod(look, LOOKS)
        steps = np.array_split(np.random.default_rng((seed, epoch)).permutation(rows), -(-rows // batch_size))
        return steps[index * len(steps) // LOOKS : (index + 1) * len(steps) // LOOKS]

    return batches


def trained(arm: Arm, seed: int, bench: Bench) -> Run:
    torch.set_num_threads(1)
    splits, run, plain = load(), Run(), arm != OURS
    train, held_out = Split(splits.train.table, splits.train.indices[: bench.rows]), Split(splits.train.table, splits.validation.indices[: bench.held_out])
    model, asked = build(splits, seed), options(arm, bench)

    def report(metrics: dict[str, float], saved: Path | None) -> None:
        rows = int(metrics["samples"])
        run.seconds.append((run.seconds or [0.0])[-1] + (rows - (run.rows or [0])[-1]) / metrics["samples_per_s"])
        run.rows.append(rows)
        run.accuracy.append(metrics["validation_accuracy"])
        if plain:
            run.weights.append(state(model))
            if rows >= bench.least * len(train) and run.reached(bench.target, 2) not in (None, len(run.rows) - 1):
                raise Enough

    batches = between_looks(len(train), asked.batch_size, seed)
    with tempfile.TemporaryDirectory() as folder, suppress(Enough):
        fit(model, train, asked, folder=Path(folder), key="bench", seed=seed, validation=held_out, batches=batches, report=report, note=lambda text: None)
    if not plain:
        run.weights.append(state(model))
    told(arm, seed, run, len(train), bench.target)
    return run


def state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def told(arm: Arm, seed: int, run: Run, rows: int, target: float) -> None:
    index = run.reached(target, 2)
    when = "not reached" if index is None else f"in {run.seconds[index]:.1f} s, {run.rows[index] / rows:.3f} epochs"
    curve = " ".join(f"{accuracy:.4f}" for accuracy in run.accuracy)
    print(f"seed {seed} {arm}: {target:.0%} {when}; {run.rows[-1] / run.seconds[-1]:,.0f} rows/s, {run.seconds[-1]:.1f} s, {run.rows[-1] / rows:.2f} epochs: {curve}", flush=True)


# --- figures ----------------------------------------------------------------------------------------------------------


def time_ratio(runs: dict[tuple[Arm, int], Run], bench: Bench, looks: int) -> dict[str, float]:
    seconds = {rate: [runs[rate, seed].seconds_to(bench.target, looks) for seed in bench.seeds] for rate in bench.rates}
    best = min(bench.rates, key=lambda rate: statistics.median(seconds[rate]))
    missed = [seed for seed in bench.seeds if runs[best, seed].reached(bench.target, looks) is None]
    ours = [runs[OURS, seed].seconds_to(bench.target, looks) for seed in bench.seeds]
    medians = ", ".join(f"{rate}: {statistics.median(values):.1f}" for rate, values in seconds.items())
    print(f"to {bench.target:.0%} at {looks} look(s): ours {statistics.median(ours):.1f} s; plain SGD {medians}; best {best}{f', which did not get there with seeds {missed}' if missed else ''}")
    rows = [runs[OURS, seed].rows_to(bench.target, looks) / runs[best, seed].rows_to(bench.target, looks) for seed in bench.seeds]
    print(f"  in rows, which no other work on the machine changes: {', '.join(f'{ratio:.3f}' for ratio in rows)} of plain SGD's")
    return spread([own / other for own, other in zip(ours, seconds[best], strict=True)])


def points(runs: dict[tuple[Arm, int], Run], bench: Bench, splits: Splits) -> dict[str, float]:
    ends = {seed: runs[OURS, seed].seconds[-1] for seed in bench.seeds}
    places = {(rate, seed): runs[rate, seed].at(ends[seed]) for rate in bench.rates for seed in bench.seeds}
    found = {rate: statistics.mean(runs[rate, seed].accuracy[places[rate, seed]] for seed in bench.seeds) for rate in bench.rates}
    best = max(bench.rates, key=lambda rate: found[rate])
    print(f"after equal time, validation: ours {statistics.mean(runs[OURS, seed].accuracy[-1] for seed in bench.seeds):.4f}; plain SGD {', '.join(f'{rate}: {value:.4f}' for rate, value in found.items())}")
    gained = []
    for seed in bench.seeds:
        own, other = (on_test(splits, run.weights[place]) for run, place in ((runs[OURS, seed], -1), (runs[best, seed], places[best, seed])))
        print(f"seed {seed}, test: ours {own:.4f} after {ends[seed]:.1f} s; rate {best} {other:.4f} after {runs[best, seed].seconds[places[best, seed]]:.1f} s")
        gained.append(100 * (own - other))
    return spread(gained)


def on_test(splits: Splits, weights: dict[str, np.ndarray]) -> float:
    model = build(splits, 0)
    model.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
    predict = models.predictor(model)
    return evaluate.accuracy(np.concatenate([predict(part) for part in np.array_split(splits.test.x, 20)]), splits.test.y)


def spread(values: list[float]) -> dict[str, float]:
    return {"value": statistics.median(values), "low": min(values), "high": max(values)}


def all_runs(bench: Bench) -> dict[tuple[Arm, int], Run]:
    arms: tuple[Arm, ...] = (OURS, *bench.rates)
    jobs = [(arms[(index + seed) % len(arms)], seed) for seed in bench.seeds for index in range(len(arms))]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return dict(zip(jobs, pool.map(trained, *zip(*jobs, strict=True), [bench] * len(jobs)), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--small", action="store_true", help="12,800 rows, 80 %%, two rates, one seed: that it runs, no more")
    asked = parser.parse_args()
    bench = Bench(rows=12_800, held_out=1000, target=0.80, rates=(0.03, 0.1), seeds=(0,), least=2.0, longest=2.5) if asked.small else Bench()
    torch.set_num_threads(1)
    splits = load()
    print(f"{device()}, {os.cpu_count()} CPUs, one thread a run, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, python {platform.python_version()}")
    print(f"{sum(p.numel() for p in build(splits, 0).parameters()):,} parameters; ours: {spec.load(SPEC).train.model_dump(exclude_defaults=True)}")
    runs = all_runs(bench)
    late = [seed for seed in bench.seeds if runs[OURS, seed].reached(bench.target, 2) is None]
    if late:
        sys.exit(f"ours did not reach {bench.target:.0%} with seeds {late}: there is no time to compare")
    figures = {
        "time_ratio_to_91": time_ratio(runs, bench, 2),
        "time_ratio_to_91_touched": time_ratio(runs, bench, 1),
        "points_at_equal_time": points(runs, bench, splits),
    }
    for name, figure in figures.items():
        print(f"{name}: {figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})")
    if asked.json:
        print(json.dumps({"benchmark": "train_recipe", "figures": figures}))


if __name__ == "__main__":
    main()
