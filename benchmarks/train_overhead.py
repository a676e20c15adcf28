"""Training as `portaisys train` does it, with two Ray Train workers, against a plain script under torchrun: the same arithmetic, in turns.

    python benchmarks/train_overhead.py --json        (10 to 12 minutes on two cores with nothing else to do; --small: under two)

A residual CNN learns a part of Fashion-MNIST in fp32 on two processes of one thread, gloo between them: SGD with Nesterov momentum, warm-up
and cosine, clipped gradients, after each epoch a checkpoint and the validation rows (both on rank 0). The plain script is train_plain.py.
Both start from the same weights and see the same batches; the mean losses of all epochs must agree to 1e-5 and the final weights to 1e-4, or this
ends with an error. The same idle Ray cluster, with dashboard, is up in both arms. Arms are whole commands, in the order A B, B A, ...

The model itself notes when each training pass begins, in both arms (train_probe.py). Figures: `ray_over_torchrun`: rows a second of ours over
those of torchrun, from the start of the second epoch to the start of the last step, so with whatever lies between steps and epochs; median of
the paired ratios. `daemon_cpu_share`: CPU seconds that Ray's own processes (gcs_server, raylet, dashboard, agents, controllers, idle workers;
not the training workers, nor the command's own process) used per second of that time of ours. `startup_s_ray`, `startup_s_torchrun`: from the command to its first step.
The CPU time of the workers is printed beside it: it says what a step costs however busy the machine is.
low and high: the least and the most of the pairs, which for the six of a default run is a 97 % interval of the median.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from train_probe import begun, cluster, command, daemons, ended, passes, write_spec

from portaisys import data, metrics, spec
from portaisys.engine.cpu import device

RAY, TORCHRUN = "ray", "torchrun"
BATCH = 64


@dataclass(frozen=True)
class Size:
    """`data`: a section of which `rows` are left to train on; `epochs`, the first of which is left out; `pairs` of arms."""

    data: dict[str, Any]
    channels: tuple[int, ...]
    rows: int
    epochs: int
    pairs: int


FULL = Size({"source": "fashion_mnist", "validation_rows": 340, "calibration_rows": 53260}, (16, 32, 64), 6400, 5, 6)
SMALL = Size({"source": "digits", "validation_rows": 53, "calibration_rows": 120}, (16, 32, 64), 1024, 6, 2)


@dataclass(frozen=True)
class Arm:
    """What one command did. `cpu_ms`: of both workers a step; `weights`: by name; `shares`: CPU seconds a second of each of Ray's processes in its steady state."""

    startup_s: float
    rows_per_s: float
    cpu_ms: float
    losses: list[float]
    weights: dict[str, torch.Tensor]
    shares: dict[str, float]

    @property
    def daemon_share(self) -> float:
        return sum(self.shares.values())


class Sampler:
    """CPU time of Ray's processes at the first step of the second epoch, and at the last step."""

    def __init__(self, folder: Path, pid: int, first: int, last: int) -> None:
        self._folder, self._pid, self._due = folder, pid, [first, last]
        self._seen: list[tuple[float, dict[int, tuple[str, float]]]] = []

    def __call__(self) -> None:
        while self._due and begun(self._folder)[1] >= self._due[0]:
            self._due.pop(0)
            self._seen.append((time.monotonic(), daemons(self._pid)))

    def shares(self) -> dict[str, float]:
        """By name. What a process that ended in between had used since is lost: none does while a training runs."""
        (began, before), (over, after) = self._seen
        found: dict[str, float] = {}
        for pid, (name, seconds) in after.items():
            used = (seconds - before.get(pid, ("", 0.0))[1]) / (over - began)
            found[short(name)] = found.get(short(name), 0.0) + used
        return found


def short(name: str) -> str:
    """Of a command line: what Ray calls it, or its program and script."""
    words = name.split()
    return name if name.startswith("ray::") else " ".join(Path(word).name for word in words[:3] if not word.startswith("-")) or "?"


def measure(arm: str, folder: Path, size: Size, model: dict[str, Any]) -> Arm:
    train = {"epochs": size.epochs, "batch_size": BATCH, "checkpoint_every_steps": size.rows // BATCH}
    file, log = write_spec(folder / "spec.yaml", data=size.data, model=model, train=train), folder / "output.txt"
    steps = size.rows // BATCH
    words = {RAY: ["-m", "portaisys.cli", "train", file], TORCHRUN: ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "benchmarks/train_plain.py", file, folder]}
    began = time.monotonic()
    process = command(*words[arm], log=log)
    sample = Sampler(folder / "passes", process.pid, steps, size.epochs * steps - 2)
    ended(process, log, sample, every_s=0.1)
    sample()  # of a training so short that it ended in between
    each = [passes(folder / "passes", rank)[steps:] for rank in (0, 1)]
    assert len(each[0]) == len(each[1]) == (size.epochs - 1) * steps
    first, at = passes(folder / "passes", 0)["at"][0], each[0]["at"]
    weights = next(folder.glob("runs/bench/train/model.safetensors"), folder / "model.safetensors")
    rows = metrics.read(next(folder.glob("runs/bench/logs/train-*.jsonl"), folder / "log.jsonl"))
    lines = [row for row in rows if "validation_accuracy" in row]  # of whole epochs
    rate = (len(at) - 1) * BATCH / (at[-1] - at[0])
    return Arm(first - began, rate, 1000 * sum(map(cpu_s, each)), [line["loss"] for line in lines], load_file(weights), sample.shares())


def cpu_s(found: np.ndarray) -> float:
    """CPU seconds a step of one worker, all its threads."""
    return float(found["cpu"][-1] - found["cpu"][0]) / (len(found) - 1)


def same_work(ours: Arm, theirs: Arm) -> str:
    """In words. Raises RuntimeError when the arms computed different things."""
    losses = max(abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    apart = max(float((ours.weights[name].double() - weight.double()).abs().max()) for name, weight in theirs.weights.items())
    if ours.weights.keys() != theirs.weights.keys() or losses > 1e-5 or apart > 1e-4:
        raise RuntimeError(f"the arms do different work: losses {ours.losses} and {theirs.losses}, weights up to {apart} apart")
    equal = all(torch.equal(ours.weights[name], weight) for name, weight in theirs.weights.items())
    return f"final weights {'equal to the bit' if equal else f'up to {apart:.1e} apart'}, epochs' losses {'equal' if losses == 0 else f'within {losses:.1e}'}"


def spread(values: list[float]) -> dict[str, float]:
    return {"value": statistics.median(values), "low": min(values), "high": max(values)}


def model_of(size: Size) -> dict[str, Any]:
    """Options of the factory, from the data."""
    splits = data.load(spec.parse({"name": "bench", "data": size.data}).data)
    assert len(splits.train) == size.rows, f"{len(splits.train)} training rows"
    return {"channels": list(size.channels), "shape": list(splits.shape), "classes": len(splits.labels)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--small", action="store_true", help="two short pairs on digits: whether it runs, not how fast")
    parser.add_argument("--pairs", type=int, help="how many (default: 6, small 2)")
    asked = parser.parse_args()
    size = SMALL if asked.small else FULL
    print(f"{device()}, {os.cpu_count()} CPUs, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, python {platform.python_version()}")
    model = model_of(size)
    print(f"convnet {size.channels}, {size.rows:,} rows of {size.data['source']}, {size.epochs} epochs of {size.rows // BATCH} steps of {BATCH} rows", flush=True)
    found: dict[str, list[Arm]] = {RAY: [], TORCHRUN: []}
    with cluster(), tempfile.TemporaryDirectory() as folder:
        for pair in range(asked.pairs or size.pairs):
            for arm in (RAY, TORCHRUN) if pair % 2 == 0 else (TORCHRUN, RAY):
                found[arm].append(measure(arm, Path(folder) / f"{arm}-{pair}", size, model))
            ours, theirs = found[RAY][-1], found[TORCHRUN][-1]
            print(
                f"pair {pair + 1}: ray {ours.rows_per_s:.1f} rows/s ({BATCH / ours.rows_per_s * 1000:.1f} ms a step), torchrun {theirs.rows_per_s:.1f}, ratio {ours.rows_per_s / theirs.rows_per_s:.4f}; CPU of both workers {ours.cpu_ms:.1f} and {theirs.cpu_ms:.1f} ms a step; first step after "
                f"{ours.startup_s:.1f} and {theirs.startup_s:.1f} s; Ray's processes {ours.daemon_share:.4f} CPUs ({theirs.daemon_share:.4f} with torchrun); {same_work(ours, theirs)}",
                flush=True,
            )
    for name, share in sorted(found[RAY][-1].shares.items(), key=lambda item: -item[1])[:12]:
        print(f"  {share:.4f} CPUs {name}")
    figures = {
        "ray_over_torchrun": spread([ours.rows_per_s / theirs.rows_per_s for ours, theirs in zip(found[RAY], found[TORCHRUN], strict=True)]),
        "daemon_cpu_share": spread([ours.daemon_share for ours in found[RAY]]),
        "startup_s_ray": spread([ours.startup_s for ours in found[RAY]]),
        "startup_s_torchrun": spread([theirs.startup_s for theirs in found[TORCHRUN]]),
    }
    for name, figure in figures.items():
        print(f"{name}: {figure['value']:.4f} ({figure['low']:.4f} to {figure['high']:.4f})")
    if asked.json:
        print(json.dumps({"benchmark": "train_overhead", "figures": figures}))


if __name__ == "__main__":
    main()
