"""A teacher on Fashion-MNIST, the same with a quarter of its multiply-accumulates, and a student of under 100,000 parameters in int8.

    python benchmarks/compress_fashion_mnist.py --json [--folder runs/compress]        (two hours or so on two cores; --small: a minute, digits)

Goes on where it was stopped: everything stands in --folder, by digest, and the teacher is trained once for all of it. Three parts:
`cut`: the teacher, pruned by channels and distilled from itself; `student`: a smaller residual CNN that learns from the teacher, then int8; `gain`: the
student's architecture from the same first weights with and without the teacher, on the first rows of the train split, as many steps of the same batches.

Figures. `teacher_accuracy`, `under_100k_accuracy` (int8 where the gate admits it, else fp32): percent of the 10,000 test rows, with Wilson's 95 % interval. `int8_drop_points`: of
the student's int8 engine against its fp32 one, with Tango's interval over the paired rows, 95 % to either side, in percent points. `mac_cut`: the teacher's multiply-accumulates over the
student's, which are the fewer of the two; `mac_cut_drop_points`: of its fp32 engine against the teacher's. `realisation_ratio`: latency cut over MAC cut, both
in fp32 in ONNX Runtime on one thread, the lesser of batch 1 and 32, medians of interleaved rounds (low, high: bootstrap). `pruned_...`: the same of the pruned model. `distillation_gain_points`:
mean over five paired seeds, validation rows, with Student's 95 % interval. Beside them what the gate said. Nothing was chosen on test rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compress_runs import exact, options_of, realised, right, row, run, share, show, tell
from gpu_compress import drop
from scipy import stats

from portaisys import data, evaluate, launch, models, spec
from portaisys.compress.distill import distillation
from portaisys.engine.cpu import device
from portaisys.train import fit
from portaisys.weights import restore


@dataclass(frozen=True)
class Size:
    """Sections of the specs, and how long the parts train. `gain`: epochs, rows and seeds of the paired comparison."""

    data: dict[str, Any]
    teacher: dict[str, Any]
    student: dict[str, Any]
    train: dict[str, Any]
    cut_epochs: int
    student_epochs: int
    gain: tuple[int, int, int]
    margin: float = 0.005

    @property
    def base(self) -> dict[str, Any]:
        return {"data": self.data, "model": self.teacher, "train": self.train, "gate": {"max_accuracy_drop": self.margin}}


PICTURES = {"precision": "auto", "augment": "shift_flip_erase", "batch_size": 128, "learning_rate": 0.1, "ema_decay": 0.998, "cpus_per_worker": 2}
FULL = Size(
    {"source": "fashion_mnist"}, {"name": "convnet", "channels": [32, 64, 128], "blocks": [2, 2, 2], "strides": [1, 2, 2]},
    {"name": "convnet", "channels": [16, 32, 64], "blocks": [1, 2, 1], "strides": [1, 2, 2]}, {**PICTURES, "epochs": 30}, 12, 40, (2, 20_000, 5),
)  # fmt: skip
SMALL = Size(
    {"source": "digits"}, {"name": "convnet", "channels": [16, 32], "blocks": [1, 1]}, {"name": "convnet", "channels": [8, 16], "blocks": [1, 1]},
    {"epochs": 3, "cpus_per_worker": 1}, 1, 2, (1, 320, 2), 0.3,
)  # fmt: skip


def gained(size: Size, folder: Path) -> dict[str, float]:
    """Validation points that the teacher brings the student, by paired seed."""
    epochs, rows, seeds = size.gain
    options = options_of(size.base, "teacher", folder, [])
    splits = data.load(options.data)
    teacher = restore(options, splits, launch.run_folder(options) / "train")
    part = data.Split(splits.train.table, splits.train.indices[:rows])
    shorter = options.train.model_copy(update={"epochs": epochs, "ema_decay": None})
    points = []
    for seed in range(seeds):
        losses = {"alone": None, "distilled": distillation(teacher, spec.Distill(epochs=epochs))}
        found = {name: _learnt(size, splits, part, shorter, seed, loss) for name, loss in losses.items()}
        points.append(100 * (found["distilled"] - found["alone"]))
        print(f"seed {seed}: alone {found['alone']:.2%}, distilled {found['distilled']:.2%}", flush=True)
    low, high = stats.t.interval(0.95, len(points) - 1, statistics.mean(points), stats.sem(points))
    return {"value": statistics.mean(points), "low": float(low), "high": float(high)}


def _learnt(size: Size, splits: data.Splits, part: data.Split, train: spec.Train, seed: int, loss: Any) -> float:
    torch.manual_seed(seed)
    model = models.build(spec.parse({"name": "student", "model": size.student}).model, splits.shape, len(splits.labels), splits.mean, splits.std)
    with tempfile.TemporaryDirectory() as work:
        fit(model, part, train, folder=Path(work), key="gain", seed=seed, loss=loss)
    answers = evaluate.predict_rows(models.predictor(model), splits.validation.x, 512)
    return evaluate.accuracy(answers, splits.validation.y)


def lesser(prefix: str, outcome: launch.Outcome, answers: dict[str, Any], rows: Any) -> dict[str, dict[str, float]]:
    """How many times fewer MACs, what they cost and how much of them the latency shows."""
    return {
        f"{prefix}mac_cut": exact(row(outcome, "dense fp32")["macs"] / row(outcome, "small fp32")["macs"]),
        f"{prefix}mac_cut_drop_points": drop(answers["dense fp32"], answers["small fp32"]),
        f"{prefix}realisation_ratio": realised(outcome, rows, {1: 300, 32: 60}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--small", action="store_true", help="digits, a minute: whether it runs, not how good it is")
    parser.add_argument("--folder", type=Path, help="where everything is left and looked for (default: runs/compress, small: a temporary one)")
    asked = parser.parse_args()
    size, folder = (SMALL if asked.small else FULL), asked.folder or (Path(tempfile.mkdtemp()) if asked.small else Path("runs/compress"))
    torch.set_num_threads(size.train["cpus_per_worker"])
    print(f"{device()}, {os.cpu_count()} CPUs, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, python {platform.python_version()}", flush=True)
    cut = run(size.base, "cut", folder, [{"prune": {"mac_cut": 0.75, "importance": "taylor", "scope": "global"}}, {"distill": {"epochs": size.cut_epochs}}])
    tell(cut)
    student = run(size.base, "student", folder, [{"distill": {"student": size.student, "epochs": size.student_epochs, "learning_rate": 0.1}}, {"quantize": {}}])
    tell(student)
    answers, others, rows = right(cut), right(student), data.load(options_of(size.base, "teacher", folder, []).data).calibration.x
    figures = {
        "teacher_accuracy": share(answers["dense fp32"]),
        "under_100k_accuracy": share(others["int8" if row(student, "int8")["admissible"] else "small fp32"]),
        "student_parameters": exact(row(student, "small fp32")["parameters"]),
        "int8_drop_points": drop(others["small fp32"], others["int8"]),
        **lesser("", student, others, rows),
        "pruned_accuracy": share(answers["small fp32"]),
        **lesser("pruned_", cut, answers, rows),
        "distillation_gain_points": gained(size, folder),
    }
    found = show("compress_fashion_mnist", figures)
    if asked.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
