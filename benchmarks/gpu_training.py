"""Training on one GPU, the part of gpu.py that trains: every precision, each with every means of train.speed, and the time to an accuracy. Knows no Ray.

Measured is `fit()` itself, so whatever spec.SPEED names is measured as the loop does it. Every arm's fit() runs in a thread of its own that holds
still, in its audit hook, until its turn: a turn is a few steps, from rows on the host to new weights, and the device's work is waited for at its end.
The arms of a precision take turns with plain fp32, then make room for the next precision's. What an arm has loaded ahead at the end of its turn it
has at the beginning of the next, as in a run. MFU: 6 FLOPs a multiply-accumulate and row (2 forward, twice that backward; torch's counter) over
the card's dense peak. Time to an accuracy: of the test split, looked at after each epoch and not chosen by, with the train section of
jobs/specs/fashion_mnist.yaml and with the same in `auto`; loading data is left out, everything else, compiling too, is in it.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from portaisys import data, models, spec
from portaisys.data import Split
from portaisys.data.sources import Table
from portaisys.distributed import Place
from portaisys.precision import supported
from portaisys.progress import PEAK_TFLOPS
from portaisys.spec import UserError
from portaisys.train import fit

# Model, shape of a row, rows a batch.
FULL: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "cnn": (spec.ConvNet(stem=64, stem_stride=2, channels=(64, 128, 256, 512), blocks=(2, 2, 2, 2)), (3, 128, 128), 256),
    "transformer": (spec.Transformer(name="transformer", patch=16, dim=384, depth=12, heads=6), (3, 224, 224), 128),
}
SMALL: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "cnn": (spec.ConvNet(channels=(8, 16), blocks=(1, 1)), (1, 16, 16), 16),
    "transformer": (spec.Transformer(name="transformer", dim=32, depth=1, heads=2), (1, 16, 16), 16),
}
PLAIN = "fp32"
ORDER = ("bf16", "tf32", "fp16", "fp32")  # what is left out when the time is up comes last
TARGETS = (0.91, 0.94)
LEAST = 3  # rounds
CLASHING = ("compile", "cuda_graphs")  # a compiled model is not captured
RECIPE = Path(__file__).parents[1] / "jobs/specs/fashion_mnist.yaml"


@dataclass(frozen=True)
class Size:
    """How long it may take. `steps` a turn; `omitted`: means of train.speed that are not tried; after `budget_s` no more arms are opened but the plain ones."""

    steps: int
    rounds: int
    omitted: tuple[str, ...]
    budget_s: float


@dataclass
class Trained:
    """What one model came to. `rows_s`: precision -> arm -> rows a second [rounds], plain fp32 in each; `failed`: arm -> why; `opened_s`: until its first turn had ended."""

    macs: int
    rows_s: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    opened_s: dict[str, float] = field(default_factory=dict)


class _Enough(Exception):
    """Ends a fit() that has been measured."""


class Running:
    """A fit() in a thread, which does `steps` steps when it is told to. Raises what fit() raised."""

    def __init__(self, train: Callable[[Callable[..., None]], object], steps: int) -> None:
        self._steps, self._done, self._ends, self._failed = steps, 0, False, list[BaseException]()
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(train,), daemon=True)

    def open(self) -> float:
        """Seconds until the first turn has ended, whatever is compiled or captured included."""
        started = time.perf_counter()
        self._thread.start()
        self._wait()
        return time.perf_counter() - started

    def turn(self) -> float:
        """Seconds of `steps` steps."""
        started = time.perf_counter()
        self._go.release()
        self._wait()
        return time.perf_counter() - started

    def close(self) -> None:
        self._ends = True
        self._go.release()
        self._thread.join()

    def _wait(self) -> None:
        self._stands.acquire()
        if self._failed:
            raise self._failed[0]

    def _run(self, train: Callable[[Callable[..., None]], object]) -> None:
        try:
            train(self._audit)
            raise UserError("fit() came to its end: there are fewer steps in its plan than turns ask for")
        except _Enough:
            pass
        except BaseException as error:
            self._failed.append(error)
        self._stands.release()

    def _audit(self, step: int, rows: np.ndarray) -> None:
        self._done += 1
        if self._done % self._steps:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._stands.release()
        self._go.acquire()
        if self._ends:
            raise _Enough


def rows_of(shape: tuple[int, ...], count: int) -> Split:
    """Pictures of noise with random labels: speed does not depend on them."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (count, *shape), dtype=np.uint8), rng.integers(0, 10, count)
    return Split(Table(lambda indices: x[indices].astype(np.float32), y, tuple("0123456789"), shape, "noise"), np.arange(count))


def plan(rows: int, batch: int, steps: int) -> list[np.ndarray]:
    """One epoch that is long enough: nothing is reported or saved while it is timed."""
    return [np.arange(step * batch, (step + 1) * batch) % rows for step in range(steps)]


def trainer(name: str, chosen: dict[str, Any], split: Split, options: spec.Train, steps: int, where: str, folder: Path, note: Callable[[str], None]) -> Callable[[Callable[..., None]], object]:
    section, shape, batch = chosen[name]

    def train(audit: Callable[..., None]) -> object:
        torch.manual_seed(0)
        model = models.build(section, shape, 10, np.full(shape[0], 127.5, np.float32), np.full(shape[0], 73.9, np.float32))
        batches = plan(len(split), batch, steps)
        return fit(model, split, options, folder=folder, key="benchmark", batches=lambda epoch: batches, audit=audit, note=note, place=Place(device=where))

    return train


def variants(precision: str, size: Size, failed: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Arm and its train.speed: plain fp32, plain, each means alone, then all together of those that ran. `failed` is read when that is asked for."""
    yield from {PLAIN: (), precision: ()}.items()
    means = [one for one in spec.SPEED if one not in size.omitted]
    yield from ((f"{precision}, {one}", (one,)) for one in means)
    works = [one for one in means if f"{precision}, {one}" not in failed]
    clash = [one for one in CLASHING if one in works]
    for one in clash if len(clash) > 1 else [""]:
        yield f"{precision}, all but {one}" if one else f"{precision}, all", tuple(other for other in works if other != one)


def measure(name: str, small: bool, size: Size, where: str, deadline: float) -> Trained:
    chosen = SMALL if small else FULL
    section, shape, batch = chosen[name]
    found = Trained(models.count(models.build(section, shape, 10), shape)["macs"])
    split = rows_of(shape, 4 * batch)
    found.failed |= {precision: f"not to be had on this {where}" for precision in ORDER if precision not in supported(where)}
    found.failed |= {f"any, {one}": "left out of --small" for one in size.omitted if one in spec.SPEED}
    for precision in (one for one in ORDER if one in supported(where)):
        with tempfile.TemporaryDirectory() as folder:
            group = opened(name, chosen, split, variants(precision, size, found.failed), size, where, Path(folder), found, deadline)
            found.rows_s[precision] = take_turns(group, size, batch, found, deadline)
        del group
        gc.collect()
        if where == "cuda":
            torch.compiler.reset()
            torch.cuda.empty_cache()
        print(f"{name}, training in {precision}, batches of {batch}", *lines(precision, found), sep="\n", flush=True)
    return found


def opened(
    name: str, chosen: dict[str, Any], split: Split, arms: Iterable[tuple[str, tuple[str, ...]]], size: Size, where: str, folder: Path, found: Trained, deadline: float
) -> dict[str, Running]:
    """The arms that run, each after its first turn."""
    group = {}
    for number, (arm, means) in enumerate(arms):
        if time.monotonic() > deadline and arm not in (PLAIN, *ORDER):
            found.failed[arm] = "the time was up (--train-budget-s)"
            continue
        extra = {"optimizer": "adamw", "learning_rate": 1e-4} if name == "transformer" else {"learning_rate": 1e-3}
        options = spec.Train(epochs=1, batch_size=chosen[name][2], precision=arm.partition(",")[0], speed=means, checkpoint_every_steps=10**9, use_gpu=where == "cuda", **extra)
        one = Running(trainer(name, chosen, split, options, size.steps * (size.rounds + 2), where, folder / str(number), found.notes.setdefault(arm, []).append), size.steps)
        try:
            found.opened_s[arm] = one.open()
            group[arm] = one
        except (UserError, RuntimeError) as error:  # torch's own are RuntimeErrors, of memory and of compiling too
            found.failed[arm] = f"{error}".splitlines()[0][:300]
    return group


def take_turns(group: dict[str, Running], size: Size, batch: int, found: Trained, deadline: float) -> dict[str, np.ndarray]:
    """Rows a second of each arm, [rounds]; after the deadline LEAST rounds are enough."""
    rng, rows_s = np.random.default_rng(0), {arm: list[float]() for arm in group}
    for turn in range(size.rounds):
        if turn >= LEAST and time.monotonic() > deadline:
            break
        for arm in rng.permutation([*group]):
            try:
                rows_s[arm].append(size.steps * batch / group[arm].turn())
            except (UserError, RuntimeError) as error:
                found.failed[arm] = f"in round {turn + 1}: {error}".splitlines()[0][:300]
                del group[arm], rows_s[arm]
    for one in group.values():
        one.close()
    return {arm: np.array(speeds) for arm, speeds in rows_s.items()}


def mfu(arm: str, rows_s: float, macs: int) -> float | None:
    """Model FLOPs utilisation; None where the peak is not known."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = PEAK_TFLOPS.get(card, {}).get(arm.partition(",")[0])
    return rows_s * 6 * macs / (peak * 1e12) if peak else None


def lines(precision: str, found: Trained) -> Iterator[str]:
    rows_s = found.rows_s[precision]
    for arm, speeds in sorted(rows_s.items(), key=lambda item: -float(np.median(item[1]))):
        used, over = mfu(arm, float(np.median(speeds)), found.macs), np.median(speeds / rows_s[PLAIN])
        told = "no MFU: no peak of this device" if used is None else f"MFU {used:6.1%}"
        yield f"  {arm:22s} {np.median(speeds):10,.0f} rows/s ({speeds.min():,.0f} to {speeds.max():,.0f})  over plain fp32 {over:6.2f}  {told}  first turn {found.opened_s[arm]:.1f} s"


# --- time to an accuracy ----------------------------------------------------------------------------------------------


def to_accuracy(folder: Path | None, where: str) -> dict[str, list[tuple[float, float]]]:
    """Arm -> (seconds since fit() began, accuracy of the test split) after each epoch; nothing without data or a GPU, and why is printed."""
    if where != "cuda" or folder is None:
        print(f"time to an accuracy: not measured: {'no GPU here' if where != 'cuda' else 'no --data'}")
        return {}
    chosen = spec.load(RECIPE, [f"data.path={folder}", "train.use_gpu=true"])
    splits = data.load(chosen.data)
    arms = {"the recipe": chosen.train, "auto": chosen.train.model_copy(update={"precision": "auto", "speed": "auto"})}
    return {arm: curve(chosen, splits, options, where) for arm, options in arms.items()}


def curve(chosen: spec.Spec, splits: data.Splits, options: spec.Train, where: str) -> list[tuple[float, float]]:
    torch.manual_seed(chosen.seed)
    model = models.build(chosen.model, splits.shape, len(splits.labels), splits.mean, splits.std)
    found: list[tuple[float, float]] = []
    started = time.perf_counter()

    def report(metrics: dict[str, float], saved: Path | None) -> None:
        if "validation_accuracy" in metrics:
            found.append((time.perf_counter() - started, metrics["validation_accuracy"]))

    with tempfile.TemporaryDirectory() as folder:
        fit(model, splits.train, options, folder=Path(folder), key="benchmark", seed=chosen.seed, validation=splits.test, report=report, note=print, place=Place(device=where))
    return found


def reached_s(points: Sequence[tuple[float, float]], target: float) -> float | None:
    return next((seconds for seconds, accuracy in points if accuracy >= target), None)


def told(curves: dict[str, list[tuple[float, float]]]) -> Iterator[str]:
    for arm, points in curves.items():
        times = ((target, reached_s(points, target)) for target in TARGETS)
        each = ", ".join(f"{target:.0%} {'not reached' if seconds is None else f'after {seconds:.1f} s'}" for target, seconds in times)
        yield f"  Fashion-MNIST, {arm}: {each}; best {max(accuracy for _, accuracy in points):.2%}, {len(points)} epochs in {points[-1][0]:.1f} s"


# --- for gpu.py -------------------------------------------------------------------------------------------------------


def size_of(small: bool, budget_s: float) -> Size:
    """Compiling takes a minute on a CPU: not in the small form."""
    return Size(2, 3, ("compile",), budget_s) if small else Size(10, 8, (), budget_s)


def run(names: Sequence[str], options: argparse.Namespace, where: str) -> tuple[dict[str, Trained], dict[str, list[tuple[float, float]]]]:
    """What each model came to, and the curves of accuracy, which come first: they are short."""
    size = size_of(options.small, options.train_budget_s)
    curves = to_accuracy(options.data, where)
    print(*told(curves), sep="\n", end="\n" if curves else "", flush=True)
    ends, found = time.monotonic() + size.budget_s, {}
    for number, name in enumerate(names):
        left = ends - time.monotonic()
        found[name] = measure(name, options.small, size, where, time.monotonic() + left / (len(names) - number))
    for name, one in found.items():
        print(*(f"{name}, training: {arm}: not run: {why}" for arm, why in one.failed.items()), sep="\n")
    return found, curves


def figures_of(found: dict[str, Trained], curves: dict[str, list[tuple[float, float]]], paired: Callable[[np.ndarray, np.ndarray], dict[str, float]]) -> dict[str, dict[str, float]]:
    figures = {}
    for name, one in found.items():
        for precision, rows_s in one.rows_s.items():
            best = max((arm for arm in rows_s if arm.startswith(precision)), key=lambda arm: float(np.median(rows_s[arm])))
            figures[f"{name}_train_{precision}_over_fp32"] = paired(rows_s[best], rows_s[PLAIN])
            used = [mfu(best, float(value), one.macs) for value in (np.median(rows_s[best]), rows_s[best].min(), rows_s[best].max())]
            if used[0] is not None:
                figures[f"{name}_train_{precision}_mfu"] = dict(zip(("value", "low", "high"), used, strict=True))
    for arm, points in curves.items():
        for target in TARGETS:
            if (seconds := reached_s(points, target)) is not None:
                figures[f"{arm.split()[-1]}_to_{target:.2f}_s"] = dict.fromkeys(("value", "low", "high"), seconds)
    return figures


def report(found: dict[str, Trained], curves: dict[str, list[tuple[float, float]]]) -> str:
    """Markdown."""
    text = []
    for name, one in found.items():
        text += [f"## Training: {name}\n\n{one.macs / 1e6:,.1f} million multiply-accumulates a row forward.\n\n```", *(line for precision in one.rows_s for line in lines(precision, one)), "```\n"]
        text += [f"- {arm}: not run: {why}" for arm, why in one.failed.items()]
        text += [f"- {arm}: {note}" for arm, notes in one.notes.items() for note in notes]
    return "\n".join([*text, *told(curves)]) + "\n"
