"""What is seen of a training: rows within an epoch, time left, use of the device, traces; and the modes of determinism."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from portaisys import artifact, launch, metrics, models, report, spec
from portaisys.cli import main
from portaisys.determinism import determined
from portaisys.progress import Progress, line, mfu, traced, training_flops, use_of
from portaisys.spec import UserError
from portaisys.train import fit

ROOT = Path(__file__).parents[1]
STEPS = 13  # of an epoch of digits, 797 rows


pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(Exception):
    pass


class Seen:
    """A training that is watched by a clock on which every step takes `step_s`."""

    def __init__(self, step_s=1.0, every_s=2.0, stop=None, **others):
        self.now, self.step_s, self.stop, self.rows, self.reports = 0.0, step_s, stop, [], []
        self.progress = Progress(self.rows.append, stepped=self.tick, every_s=every_s, clock=lambda: self.now, **others)

    def tick(self):
        self.now += self.step_s

    def report(self, values, saved):
        self.reports.append(values)
        if values["step"] == self.stop:
            raise Killed


def train(digits, folder, seen=None, loss=None, **changes):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    options = spec.Train(**{"epochs": 2, "batch_size": 64, "learning_rate": 0.02, "checkpoint_every_steps": 1000, **changes})
    watched = {"report": seen.report, "progress": seen.progress} if seen else {}
    return fit(model, digits.train, options, folder=folder, key="k", seed=1, validation=digits.validation, loss=loss, **watched)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def short(folder, *overrides):
    return spec.load(ROOT / "jobs/specs/digits.yaml", ["train.num_workers=0", "train.epochs=1", "model.channels=[8,16]", "model.blocks=[1,1]", "compress=[]", f"storage.path={folder / 'runs'}", f"storage.cache={folder / 'cache'}", *overrides])


def quiet(stage, text="", fraction=None, state="running"):
    pass


# --- rows within an epoch -----------------------------------------------------------------------------------------


def test_rows_appear_within_an_epoch_and_the_time_left_falls(digits, tmp_path):
    seen = Seen()
    train(digits, tmp_path, seen)
    assert [row["step"] for row in seen.rows] == [3, 5, 7, 9, 11, 15, 17, 19, 21, 23, 25]  # the clock begins with the first step, and a report counts as a row
    assert [row["step"] for row in seen.reports] == [STEPS, 2 * STEPS]
    assert all(row["eta_s"] == 2 * STEPS - row["step"] for row in (*seen.rows, *seen.reports))
    assert all("validation_accuracy" in row for row in seen.reports) and not any("validation_accuracy" in row for row in seen.rows)
    assert [row["attempt_samples"] for row in seen.reports] == [len(digits.train), 2 * len(digits.train)] == [row["samples"] for row in seen.reports]
    assert all(row["samples_per_s"] > 0 and 0 < row["epoch"] < 2 for row in seen.rows)


def test_a_row_within_an_epoch_holds_the_mean_loss_since_the_report_before_it(digits, tmp_path):
    seen, each = Seen(every_s=4.0), []

    def loss(logits, x, y):
        each.append(torch.nn.functional.cross_entropy(logits, y))
        return each[-1]

    train(digits, tmp_path, seen, loss=loss)
    each = [value.item() for value in each]
    assert len(each) == 2 * STEPS and len(seen.rows) > 3
    for row in (*seen.rows, *seen.reports):
        begin = 0 if row["step"] <= STEPS else STEPS
        assert row["loss"] == pytest.approx(np.mean(each[begin : row["step"]]), rel=1e-5)


def test_after_a_resume_the_time_left_follows_from_this_attempts_steps(digits, tmp_path):
    slow, fast = Seen(step_s=10.0, stop=STEPS), Seen(step_s=1.0)
    with pytest.raises(Killed):
        train(digits, tmp_path, slow, checkpoint_every_steps=4)
    train(digits, tmp_path, fast, checkpoint_every_steps=4)
    first = fast.rows[0]
    start = first["step"] - first["attempt_steps"]
    assert start in (8, 12)  # the last checkpoint that was whole when it died
    assert all(row["eta_s"] == 2 * STEPS - row["step"] for row in fast.rows)
    assert fast.reports[-1]["attempt_steps"] == 2 * STEPS - start and fast.reports[-1]["samples"] == 2 * len(digits.train)
    assert slow.rows[0]["eta_s"] == 10.0 * (2 * STEPS - slow.rows[0]["step"])


def test_watching_changes_no_bit(digits, tmp_path):
    notes = []
    seen = Seen()
    with traced(tmp_path / "t.trace.json.gz", 4, notes.append) as stepped:
        seen.progress = Progress(seen.rows.append, stepped=stepped, every_s=0.0)
        watched = train(digits, tmp_path / "a", seen)
    assert same(watched, train(digits, tmp_path / "b")) and len(notes) == 1 and len(seen.rows) == 2 * STEPS - 2


def test_the_line_says_what_is_known():
    row = {"epoch": 1.52, "loss": 0.4321, "samples_per_s": 12345.6}
    assert line(row) == "epoch 1.5, loss 0.432, 12,346 rows/s"
    more = {"validation_accuracy": 0.9312, "eta_s": 80.2, "padding_waste": 0.123, "mfu": 0.41}
    assert line(row | more) == "epoch 1.5, loss 0.432, validation 93.12%, 12,346 rows/s, 1 min 21 s left, padding 12%, MFU 41%"
    assert "7 s left" in line(row | {"eta_s": 6.1}) and "2 h 3 min left" in line(row | {"eta_s": 7390.0}) and "left" not in line(row | {"eta_s": 0.0})


def test_the_newest_whole_row_of_a_log_is_read_from_its_end(tmp_path):
    log = tmp_path / "log.jsonl"
    for step in range(3000):
        metrics.append(log, {"step": step, "loss": 1 / (step + 1)})
    assert metrics.last(log)["step"] == 2999
    with log.open("a") as stream:
        stream.write('{"step": 3000, "lo')
    assert metrics.last(log)["step"] == 2999
    (tmp_path / "empty").write_text("")
    assert metrics.last(tmp_path / "empty") is None


def test_a_long_curve_is_drawn_with_few_points_its_ends_among_them():
    points = [(step / 10, 1.0) for step in range(43_201)]
    few = report._thinned(points)
    assert 400 < len(few) <= 501 and few[0] == points[0] and few[-1] == points[-1]
    assert report._thinned(points[:20]) == points[:20]


# --- use of the device --------------------------------------------------------------------------------------------


def test_utilization_is_what_a_linear_layer_needs_by_hand_over_the_peak():
    layer = torch.nn.Linear(30, 64)
    assert training_flops(layer, (30,)) == 3 * 2 * 30 * 64  # a multiply and an add a weight, three passes' worth
    # 1e9 rows a second of 11,520 operations are 11.52e12; an H100 does 989.4e12 in bf16, two of them twice that.
    assert mfu(11_520, 1e9, "NVIDIA H100 80GB HBM3", "bf16") == pytest.approx(11.52 / 989.4)
    assert mfu(11_520, 1e9, "NVIDIA H100 80GB HBM3", "bf16", world=2) == pytest.approx(11.52 / 989.4 / 2)
    assert mfu(11_520, 1e9, "NVIDIA H100 80GB HBM3", "fp32") == pytest.approx(11.52 / 66.9)


def test_an_unknown_device_or_precision_has_no_utilization(digits, tmp_path):
    assert mfu(1.0, 1.0, "a card of tomorrow", "fp32") is None and mfu(1.0, 1.0, "Tesla T4", "bf16") is None
    assert use_of(torch.nn.Linear(3, 3), (3,), "cpu", 1)(1.0, "fp32") == {}
    seen = Seen(use=lambda rows_per_s, precision: {"mfu": 0.5} if precision == "fp32" else {})
    train(digits, tmp_path, seen)
    assert all(row["mfu"] == 0.5 for row in (*seen.rows, *seen.reports))


def test_padding_of_texts_is_in_every_row(tmp_path):
    rng = np.random.default_rng(0)
    lines = ["text\tlabel"] + [f"{' '.join(rng.choice(['moon', 'ship', 'tree', 'wind'], rng.integers(1, 9)))}\t{label}" for label in "ab" for _ in range(60)]
    (tmp_path / "rows.tsv").write_text("\n".join(lines))
    tree = {
        "name": "words", "data": {"source": "text", "kind": "file", "path": str(tmp_path / "rows.tsv"), "max_tokens": 16, "vocabulary": 300, "test_rows": 20, "validation_rows": 10, "calibration_rows": 10},
        "model": {"name": "text_transformer", "dim": 16, "depth": 1, "heads": 2}, "train": {"epochs": 1, "batch_size": 16, "checkpoint_every_steps": 2}, "compress": [], "storage": {"path": str(tmp_path / "runs")},
        "gate": {"max_accuracy_drop": 0.9},
    }  # fmt: skip
    made = launch.train(spec.parse(tree), quiet)
    rows = metrics.read(launch.left_by(made)["log"])
    assert len(rows) > 1 and {row["padding_waste"] for row in rows} == {made.scores["padding_waste"]} and 0 < made.scores["padding_waste"] < 1


# --- traces -------------------------------------------------------------------------------------------------------


def test_a_traced_training_leaves_a_chrome_trace_and_the_same_artifact(tmp_path, capsys):
    plain = launch.train(short(tmp_path / "plain"), quiet)
    made = launch.train(short(tmp_path / "traced", "train.profile_steps=2"), quiet)
    assert made.digest == plain.digest and made.key == plain.key
    left = launch.left_by(made)
    events = json.loads(gzip.decompress(left["trace"].read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events]
    assert {"aten::conv2d", "aten::linear", "aten::cross_entropy_loss"} <= {*names}
    assert sorted(name for name in {*names} if str(name).startswith("ProfilerStep#")) == ["ProfilerStep#3", "ProfilerStep#4"]
    assert any(f"2 steps of rank 0 are in logs/{left['trace'].name}" in note for note in made.notes) and not plain.notes
    assert not [path for path in left["trace"].parent.iterdir() if path.name.startswith(".")]


def test_the_closing_table_of_a_training_says_where_its_files_are(tmp_path, capsys):
    folder = tmp_path / "runs"
    told = [str(ROOT / "jobs/specs/digits.yaml"), "train.num_workers=0", "train.epochs=1", "model.channels=[8,16]", "model.blocks=[1,1]", "compress=[]", f"storage.path={folder}"]
    assert main(["train", *told, "train.profile_steps=1"]) == 0
    said = "".join(capsys.readouterr().out.split())
    made = artifact.read(folder / "digits" / "train")
    for name, file in launch.left_by(made).items():
        assert f"{name}{file}" in said, said
    assert [*launch.left_by(made)] == ["weights", "log", "trace"] and "epoch1.0,loss" in said
    for file in (launch.left_by(made)["trace"],):
        file.unlink()
    assert main(["train", *told, "train.profile_steps=1"]) == 0
    assert "finished before, so train.profile_steps has nothing to trace" in capsys.readouterr().out


def test_an_attempt_too_short_for_a_trace_says_so(tmp_path):
    notes = []
    with traced(tmp_path / "t.trace.json.gz", 5, notes.append) as stepped:
        for _ in range(3):
            stepped()
    assert notes == ["train.profile_steps: nothing was traced: this attempt took 3 steps, and the first 3 are not traced"]
    with traced(tmp_path / "t.trace.json.gz", 5, notes.append) as stepped:
        for _ in range(5):
            torch.ones(2).sum()
            stepped()
    assert notes[-1].startswith("train.profile_steps: 2 steps of rank 0 are in") and (tmp_path / "t.trace.json.gz").exists()


# --- determinism --------------------------------------------------------------------------------------------------

UNPOOLING = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.last = torch.nn.Linear(64, 10)

    def forward(self, x):
        kept, where = torch.nn.functional.max_pool2d(x, 2, return_indices=True)
        return self.last(torch.nn.functional.max_unpool2d(kept, where, 2).flatten(1))
"""


def modes():
    return torch.get_deterministic_debug_mode(), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")


@pytest.fixture
def unpooling(tmp_path, monkeypatch):
    """The spec of a model with an operator that has no deterministic form."""
    (tmp_path / "unpooling.py").write_text(UNPOOLING)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda mode: spec.parse({
        "name": mode, "data": {"source": "digits"}, "model": {"name": "factory", "factory": "unpooling:Net"}, "compress": [],
        "train": {"epochs": 1, "batch_size": 64, "determinism": mode}, "storage": {"path": str(tmp_path / "runs")}, "gate": {"max_accuracy_drop": 0.5},
    })  # fmt: skip


def test_strict_names_the_operator_that_has_no_deterministic_form_and_leaves_the_process_as_it_was(unpooling):
    before = modes()
    with pytest.raises(UserError, match=r"train\.determinism: strict, and max_unpooling2d_forward_out has no deterministic form"):
        launch.train(unpooling("strict"), quiet)
    assert modes() == before


def test_warn_notes_each_such_operator_once_and_trains(unpooling):
    before = modes()
    made = launch.train(unpooling("warn"), quiet)
    told = [note for note in made.notes if "train.determinism" in note]
    assert len(told) == 1 and "max_unpooling2d_forward_out has no deterministic form" in told[0]
    assert modes() == before
    assert launch.train(unpooling("seeded"), quiet).notes == ()


def test_within_strict_everything_is_set_before_the_work_begins(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    with determined("strict", pytest.fail):
        assert modes() == (2, True, False, ":4096:8")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:2:16:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with determined("warn", pytest.fail):
        assert modes()[0] == 1 and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    with determined("seeded", pytest.fail):
        assert modes()[0] == 0


def test_determinism_is_part_of_a_stages_key_and_a_trace_is_not(tmp_path):
    stage = launch.plan(short(tmp_path))[0]
    plain = launch._sections(short(tmp_path), stage)
    assert launch._sections(short(tmp_path, "train.profile_steps=3"), stage) == plain
    assert launch._sections(short(tmp_path, "train.determinism=strict"), stage) != plain


def test_strict_trains_what_the_models_of_the_house_are_made_of(tmp_path):
    made = launch.train(short(tmp_path, "train.determinism=strict"), quiet)
    assert made.scores["validation_accuracy"] > 0.1 and models.load_weights(launch.left_by(made)["weights"])
