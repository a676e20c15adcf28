"""A training whose workers are killed again and again, against the same training left alone: what is lost, and whether the result is the same.

    python benchmarks/train_faults.py --json        (about 25 minutes on two cores; --kills 2 --seconds 10: about three)

`portaisys train` with two Ray Train workers, a residual CNN, a part of Fashion-MNIST, on a Ray cluster of this script's own; no setting of
Ray's beyond what it takes itself. First alone for one epoch, which tells how long a step takes; then alone for as many epochs as --kills times --seconds
and half a stretch more need; then once more, and a worker is SIGKILLed as it is about to compute the step that is reached after each further
--seconds of undisturbed training: rank 0 and rank 1 in turns.

What is judged is what the workers computed on: the model notes every training pass with its step and the numbers of its rows, which are written in the
pictures (train_probe.py). Figures. `goodput`: seconds from the first to the last step of the undisturbed run over those of the disturbed one, in
which every replay and restart is; the start of the first attempt is in neither. low and high: of the least and the best stretch of --seconds around
a kill. `samples_exactly_once`: 1 when, each step taken as it was last computed, every epoch holds each training row once over the two ranks, each rank
had the rows it had in the undisturbed run, and a replayed step those that it had before. `weights_equal`: 1 when the final weights are those
of the undisturbed run to the bit. Median, least and most over the kills: `recovery_s`, from the kill to the start of the first step that had not begun
before; `restart_s`, from the kill to the first step of the new workers; `lost_steps`, steps that were begun twice.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_probe import begun, cluster, command, ended, passes, record_of, write_spec

from portaisys import data, spec
from portaisys.engine.cpu import device

BATCH, RANKS = 64, 2
ROWS, OTHERS = 6400, {"validation_rows": 340, "calibration_rows": 100, "test_rows": 100}
STEPS = ROWS // BATCH  # of an epoch
CHANNELS = (16, 32, 64)
SHARE = BATCH // RANKS  # rows of a rank in a step


@dataclass(frozen=True)
class Kill:
    """When which process was killed before which step; `left`: the other one, `gone_s`: how long until it had ended too."""

    at: float
    rank: int
    pid: int
    left: int
    step: int
    gone_s: list[float]


class Killer:
    """Called again and again while a training runs: kills when its next step is due."""

    def __init__(self, folder: Path, due: Sequence[int]) -> None:
        self._folder, self._due, self.kills = folder, list(due), list[Kill]()

    def __call__(self) -> None:
        if self.kills and not self.kills[-1].gone_s and not Path(f"/proc/{self.kills[-1].left}").exists():
            self.kills[-1].gone_s.append(time.monotonic() - self.kills[-1].at)
        rank = len(self.kills) % RANKS
        pid, step, _ = begun(self._folder, rank, SHARE)
        if self._due and step >= self._due[0] and is_worker(pid):
            self._due.pop(0)
            left = begun(self._folder, 1 - rank, SHARE)[0]
            os.kill(pid, signal.SIGKILL)
            self.kills.append(Kill(time.monotonic(), rank, pid, left, step, []))


def is_worker(pid: int) -> bool:
    """Whether it is a training worker of Ray's still: a number may have gone to another process."""
    with contextlib.suppress(OSError):
        return b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def started(pid: int) -> float:
    """When a process started, on the monotonic clock; NaN when it has ended."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return float("nan")


# --- running --------------------------------------------------------------------------------------------------------------


def numbered(file: Path) -> spec.Npz:
    """Fashion-MNIST's first rows as .npz, float32 [rows, 2, 28, 28]: the picture, and the number of the row in every pixel of the second channel."""
    count = ROWS + sum(OTHERS.values())
    table = data.load(spec.FashionMnist(source="fashion_mnist")).train.table
    x = np.empty((count, 2, 28, 28), np.float32)
    x[:, :1] = table.rows(np.arange(count))
    x[:, 1] = np.arange(count, dtype=np.float32)[:, None, None]
    np.savez(file, x=x, y=table.y[:count])
    return spec.Npz(source="npz", path=str(file), **OTHERS)


def train(folder: Path, rows: spec.Npz, model: dict[str, Any], epochs: int, every: int, due: Sequence[int] = ()) -> list[Kill]:
    """Run `portaisys train` in a new folder, killing a worker at each step that is `due`."""
    options = {"epochs": epochs, "batch_size": BATCH, "checkpoint_every_steps": every, "max_failures": len(due)}
    file, log, killer = write_spec(folder / "spec.yaml", data=rows.model_dump(mode="json"), model=model, train=options), folder / "output.txt", Killer(folder / "passes", due)
    ended(command("-m", "portaisys.cli", "train", file, log=log), log, killer, every_s=0.02)
    if len(killer.kills) != len(due):
        raise RuntimeError(f"{len(killer.kills)} of {len(due)} kills happened:\n{log.read_text()[-3000:]}")
    return killer.kills


def model_of(rows: spec.Npz) -> dict[str, Any]:
    splits = data.load(rows)
    return {"channels": list(CHANNELS), "shape": [1, 28, 28], "classes": len(splits.labels), "rows": SHARE, "mean": float(splits.mean[1]), "std": float(splits.std[1])}


# --- what came of it ------------------------------------------------------------------------------------------------------


def first_begun(folder: Path) -> np.ndarray:
    """Seconds, on the monotonic clock, at which rank 0 began each step for the first time."""
    found = passes(folder / "passes", 0, SHARE)
    steps, first = np.unique(found["step"], return_index=True)
    assert (steps == np.arange(len(steps))).all()
    times: np.ndarray = found["at"][first]
    return times


def attempts(folder: Path) -> list[np.ndarray]:
    """Rank 0's passes, process by process."""
    each = [np.fromfile(file, record_of(SHARE)) for file in (folder / "passes").glob("0-*")]
    return sorted((found for found in each if len(found)), key=lambda found: found["at"][0])


def audit(cut: Path, whole: Path, wanted: np.ndarray) -> str:
    """What is wrong with the rows of the disturbed run, in words; empty when nothing is. `wanted`: the numbers of all training rows, sorted."""
    final = []
    for rank in range(RANKS):
        undisturbed, found = (passes(folder / "passes", rank, SHARE) for folder in (whole, cut))
        last = {int(record["step"]): record["rows"] for record in found}
        if sorted(last) != list(range(len(undisturbed))) or not (undisturbed["step"] == np.arange(len(undisturbed))).all():
            return f"rank {rank} computed {len(last)} different steps, and {len(undisturbed)} undisturbed"
        if any((record["rows"] != last[int(record["step"])]).any() for record in (*found, *undisturbed)):
            return f"rank {rank} was given other rows for the same step"
        final.append(np.stack([last[step] for step in range(len(last))]))
    for epoch, rows in enumerate(np.concatenate(final, axis=1).reshape(-1, ROWS)):
        if (np.sort(rows) != wanted).any():
            return f"epoch {epoch} holds {len(np.intersect1d(rows, wanted))} of {ROWS} training rows"
    return ""


def stretches(whole: np.ndarray, cut: np.ndarray, steps: int, kills: int) -> list[float]:
    """Goodput of each stretch of `steps` steps in whose middle a kill is."""
    edges = [round((kill + 0.5) * steps) for kill in range(kills)] + [min(round((kills + 0.5) * steps), len(whole) - 1)]
    return [float((whole[b] - whole[a]) / (cut[b] - cut[a])) for a, b in itertools.pairwise(edges)]


def recoveries(folder: Path, kills: Sequence[Kill]) -> list[dict[str, float]]:
    """Of each kill: seconds until the new workers began, until a step began that had not, and steps begun twice."""
    tried, first, found = attempts(folder), first_begun(folder), []
    if len(tried) != len(kills) + 1:
        raise RuntimeError(f"{len(kills)} kills and {len(tried)} attempts: something else failed too; see Ray's logs")
    for kill, before, after in zip(kills, tried, tried[1:], strict=False):
        lost = int(before["step"][-1]) + 1 - int(after["step"][0])
        found.append({"restart_s": float(after["at"][0]) - kill.at, "recovery_s": float(first[before["step"][-1] + 1]) - kill.at, "lost_steps": float(lost)})
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"value": statistics.median(values), "low": min(values), "high": max(values)}


def sure(value: bool) -> dict[str, float]:
    return dict.fromkeys(("value", "low", "high"), float(value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--kills", type=int, default=10, help="(default %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="of useful training before each (default %(default)s)")
    parser.add_argument("--checkpoint-steps", type=int, default=25, help="steps between checkpoints (default %(default)s)")
    asked = parser.parse_args()
    print(f"{device()}, {os.cpu_count()} CPUs, torch {torch.__version__}, python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as place, cluster():
        figures = compare(Path(place), asked.kills, asked.seconds, asked.checkpoint_steps)
    for name, figure in figures.items():
        print(f"{name}: {figure['value']:.4f} ({figure['low']:.4f} to {figure['high']:.4f})")
    if asked.json:
        print(json.dumps({"benchmark": "train_faults", "figures": figures}))


def compare(place: Path, kills: int, seconds: float, every: int) -> dict[str, dict[str, float]]:
    rows = numbered(place / "rows.npz")
    model = model_of(rows)
    train(place / "short", rows, model, 1, every)
    taken = np.diff(first_begun(place / "short"))
    steps = round(seconds / float(taken.mean()))
    epochs = -(-round((kills + 0.5) * steps) // STEPS)
    print(f"{taken.mean() * 1000:.1f} ms a step, so a kill every {steps} steps; {epochs} epochs of {STEPS} steps of {BATCH} rows, a checkpoint every {every}", flush=True)

    train(place / "whole", rows, model, epochs, every)
    whole = first_begun(place / "whole")
    print(f"undisturbed: {whole[-1] - whole[0]:.1f} s from the first to the last step", flush=True)
    done = train(place / "cut", rows, model, epochs, every, [(kill + 1) * steps for kill in range(kills)])
    cut = first_begun(place / "cut")
    print(f"disturbed: {cut[-1] - cut[0]:.1f} s", flush=True)

    found = recoveries(place / "cut", done)
    for kill, figures in zip(done, found, strict=True):
        gone = f"{kill.gone_s[0]:.1f} s" if kill.gone_s else "never seen"
        print(f"  rank {kill.rank} killed at step {kill.step}: the other worker gone after {gone}, first step after {figures['restart_s']:.1f} s, first new step after {figures['recovery_s']:.1f} s, {figures['lost_steps']:.0f} steps lost")
    wrong = audit(place / "cut", place / "whole", np.sort(data.load(rows).train.indices))
    print(f"audit: {wrong or 'each row of each epoch exactly once'}")
    weights = [(place / run / "runs/bench/train/model.safetensors").read_bytes() for run in ("whole", "cut")]
    each = stretches(whole, cut, steps, kills)
    return {
        "goodput": {"value": float((whole[-1] - whole[0]) / (cut[-1] - cut[0])), "low": min(each), "high": max(each)},
        "samples_exactly_once": sure(not wrong),
        "weights_equal": sure(weights[0] == weights[1]),
        **{name: spread([figures[name] for figures in found]) for name in ("recovery_s", "restart_s", "lost_steps")},
    }


if __name__ == "__main__":
    main()
