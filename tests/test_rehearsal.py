"""A training run is told before it is run: steps, shares, shapes and memory of any number of workers, in one process without them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from portaisys import spec
from portaisys.cli import main
from portaisys.rehearsal import Rehearsal, rehearse
from portaisys.spec import UserError


def told(**train: object) -> Rehearsal:
    return rehearse(spec.parse({"name": "r", "model": {"channels": [8, 16]}, "train": {"epochs": 3, "batch_size": 64, **train}}))


def test_sixteen_workers_see_every_row_once_an_epoch_and_as_many_steps_as_one() -> None:
    one, many = told(), told(num_workers=16)
    assert (many.rows_an_epoch, many.steps, many.batch_rows) == (one.rows_an_epoch, one.steps, one.batch_rows) and many.rows_an_epoch == many.rows
    assert (one.steps_per_epoch, one.steps) == (13, 39) and (one.micro_rows, many.micro_rows) == (62, 4)


@pytest.mark.parametrize(("workers", "micro_batch", "expected"), [(0, 16, 4), (2, 16, 2), (4, 16, 1), (4, 4, 4)])
def test_accumulation_follows_from_the_workers_and_the_rows_that_one_computes_at_once(workers: int, micro_batch: int, expected: int) -> None:
    found = told(num_workers=workers, micro_batch=micro_batch)
    assert found.micro_batches == expected and found.micro_rows <= micro_batch


def test_what_a_worker_holds_is_by_what_it_is_for() -> None:
    sgd, adamw, average = told(), told(optimizer="adamw", learning_rate=1e-3), told(ema_decay=0.9)
    weights = sgd.parameters * 4
    assert (sgd.bytes_by["gradients"], sgd.bytes_by["optimizer"], adamw.bytes_by["optimizer"]) == (weights, weights, 2 * weights)
    assert average.memory_bytes - sgd.memory_bytes == weights and told(momentum=0).bytes_by["optimizer"] == 0


def test_activations_grow_with_the_rows_that_are_computed_at_once() -> None:
    small, large = told(micro_batch=8), told(micro_batch=32)
    assert 3 < large.bytes_by["activations"] / small.bytes_by["activations"] < 5


MEASURE = """
import sys
from pathlib import Path
import torch
from portaisys import spec
from portaisys.models import build

def kib(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))

torch.set_num_threads(1)
model = build(spec.ConvNet(channels=(32, 64)), (1, 28, 28), 10)
x, y = torch.randn(int(sys.argv[1]), 1, 28, 28), torch.zeros(int(sys.argv[1]), dtype=torch.int64)
torch.nn.functional.cross_entropy(model(x[:2]), y[:2]).backward()
before = kib("VmRSS")
torch.nn.functional.cross_entropy(model(x), y).backward()
print((kib("VmHWM") - before) * 1024)
"""


def test_the_memory_told_is_about_what_a_step_takes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "rows.npz", x=rng.normal(size=(4000, 1, 28, 28)).astype(np.float32), y=np.arange(4000) % 10)
    options = {"name": "r", "data": {"source": "npz", "path": str(tmp_path / "rows.npz")}, "model": {"channels": [32, 64]}, "train": {"epochs": 1, "batch_size": 512}}
    found = rehearse(spec.parse(options))
    done = subprocess.run([sys.executable, "-c", MEASURE, str(found.micro_rows)], capture_output=True, text=True, check=True)
    # Beside what is kept for the backward pass there is what a layer needs while it computes.
    assert 0.9 < int(done.stdout) / found.bytes_by["activations"] < 2.2


def test_data_that_is_smaller_than_a_batch_is_refused_as_in_training() -> None:
    with pytest.raises(UserError, match=r"train\.batch_size: 1024 exceeds the 797 training rows"):
        told(batch_size=1024)


def test_the_verb_says_it_all_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    spec_file = Path(__file__).parents[1] / "jobs/specs/digits.yaml"
    assert main(["train", str(spec_file), "train.num_workers=16", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "over 16 workers" in shown and "nothing was trained" in shown and list(tmp_path.iterdir()) == []
