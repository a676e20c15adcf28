"""What a verdict rests on: the figures of each engine, bad candidates that are planted and caught, and a test split that nobody looks at before the judge."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from sklearn.metrics import f1_score, recall_score

from portaisys import artifact, cluster, data, evaluate, gate, launch, models, spec, tune
from portaisys.compress.quantize import quantize
from portaisys.data import Split
from portaisys.judge import DENSE, REFERENCE, Subject, baseline_of, judge, save_answers
from portaisys.registry import Registry, open_registry
from portaisys.spec import UserError
from portaisys.weights import restore

ROOT = Path(__file__).parents[1]


def quiet(stage, text="", fraction=None, state="running"):
    pass


def options_in(folder, name="bad", **changes):
    return spec.parse(
        {
            "name": name, "model": {"channels": [8, 16], "blocks": [1, 1]}, "train": {"epochs": 6},
            # Wide enough for 60 rows a class, and for a candidate that loses a whole class of ten.
            "gate": {"max_accuracy_drop": 0.15, "max_class_recall_drop": 0.25, "latency_pairs": 20},
            "storage": {"path": str(folder / "runs"), "cache": str(folder / "cache")}, **changes,
        }
    )  # fmt: skip


# --- planted candidates -------------------------------------------------------------------------------------------


def file_of(folder, name, write):
    """An artifact as `export` leaves one, with the model.onnx that `write` puts there."""
    with artifact.writing(folder / name, kind="export", key=name, parents={}, spec={}) as draft:
        write(draft.path / "model.onnx")
        draft.scores.update(parameters=1, macs=1)
    return artifact.read(folder / name)


def rewired(source, nodes, constants):
    """The graph of a file whose logits become `before`, followed by `nodes`, which make logits of it."""
    model = onnx.load(source)
    for node in model.graph.node:
        for index, output in enumerate(node.output):
            if output == "logits":
                node.output[index] = "before"
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items())
    return lambda path: onnx.save(model, path)


def nan_at_batch_seven(source):
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]), helper.make_node("Gather", ["shape", "zero"], ["rows"]),
        helper.make_node("Equal", ["rows", "seven"], ["is_seven"]), helper.make_node("Where", ["is_seven", "nan", "before"], ["logits"]),
    ]  # fmt: skip
    return rewired(source, nodes, {"zero": np.int64(0), "seven": np.int64(7), "nan": np.float32("nan")})


def nan_for_bright_pictures(source, brighter_than):
    nodes = [
        helper.make_node("ReduceSum", ["x", "all_but_rows"], ["sum_B111"], keepdims=1), helper.make_node("Reshape", ["sum_B111", "column"], ["sum_B1"]),
        helper.make_node("Greater", ["sum_B1", "bright"], ["is_bright"]), helper.make_node("Where", ["is_bright", "nan", "before"], ["logits"]),
    ]  # fmt: skip
    return rewired(source, nodes, {"all_but_rows": np.array([1, 2, 3]), "column": np.array([-1, 1]), "bright": np.float32(brighter_than), "nan": np.float32("nan")})


def of_neighbours(source):
    nodes = [helper.make_node("ReduceMean", ["before", "all_rows"], ["neighbours"], keepdims=1), helper.make_node("Mul", ["neighbours", "half"], ["less"]), helper.make_node("Sub", ["before", "less"], ["logits"])]
    return rewired(source, nodes, {"all_rows": np.array([0]), "half": np.float32(0.5)})


def without_class(source, index):
    """One logit forced down."""
    return rewired(source, [helper.make_node("Add", ["before", "down"], ["logits"])], {"down": np.where(np.arange(10) == index, -1e3, 0).astype(np.float32)})


def on_shuffled_labels(folder, digits, monkeypatch):
    """What the same training makes of labels that say nothing."""
    y = digits.train.table.y.copy()
    y[digits.train.indices] = np.random.default_rng(0).permutation(y[digits.train.indices])
    table = dataclasses.replace(digits.train.table, y=y)
    shuffled = dataclasses.replace(digits, **{name: Split(table, getattr(digits, name).indices) for name in data.NAMES})
    monkeypatch.setattr(data, "load", lambda options: shuffled)
    return launch.produce(options_in(folder, "shuffled", train={"epochs": 1}), "export-dense", quiet, shuffled)


@pytest.fixture(scope="module")
def planted(tmp_path_factory, digits):
    """One judgement of a trained model, the same file again, and six that are bad, each in its own way."""
    folder = tmp_path_factory.mktemp("planted")
    options = options_in(folder)
    dense = launch.produce(options, "export-dense", quiet, digits)
    model = restore(options, digits, folder / "runs/bad/train")
    onnx_file, sums = dense.file("model.onnx"), digits.test.x.sum((1, 2, 3))
    brighter_than = float(sums[:32].max())  # so that none of the rows that are tried for soundness is
    with pytest.MonkeyPatch.context() as monkeypatch:
        shuffled = on_shuffled_labels(folder, digits, monkeypatch)
    too_large = digits.calibration.x * 1000  # other rows than the model's: on digits, inverted ones or noise of the right size cost int8 nothing
    writers = {
        "the same": lambda path: path.write_bytes(onnx_file.read_bytes()),
        "wrongly calibrated": lambda path: quantize(onnx_file, path, too_large, spec.Quantize()),
        "shuffled labels": lambda path: path.write_bytes(shuffled.file("model.onnx").read_bytes()),
        "forgot a class": without_class(onnx_file, 3),
        "NaN at batch 7": nan_at_batch_seven(onnx_file),
        "NaN for some": nan_for_bright_pictures(onnx_file, brighter_than),
        "asks its neighbours": of_neighbours(onnx_file),
    }
    subjects = [Subject(DENSE, "fp32", dense, None, "onnxruntime")]
    subjects += [Subject(name, "int8" if "calibrated" in name else "fp32", file_of(folder, name, write), DENSE, "onnxruntime") for name, write in writers.items()]
    size = models.count(model, digits.shape) | {"size_bytes": 1}
    made = judge(options, subjects, models.predictor(model), size, digits.test, looks=len(subjects))
    return SimpleNamespace(folder=folder, options=options, model=model, made=made, rows={row.engine: row for row in made.rows}, bright=int((sums > brighter_than).sum()))


@pytest.mark.parametrize(
    ("name", "verdict", "says"),
    [
        ("wrongly calibrated", "accuracy", "lower bound"),
        ("shuffled labels", "accuracy", "lower bound"),
        ("forgot a class", "class recall", "worst class '3': recall drop"),
        ("NaN at batch 7", "soundness", "at batch 7 logits holds NaN"),
        ("NaN for some", "finite", "NaN or infinity in the answers to"),
        ("asks its neighbours", "soundness", "from what the same row gets alone"),
    ],
)
def test_a_bad_candidate_is_caught_and_the_verdict_says_why(planted, name, verdict, says):
    row = planted.rows[name]
    assert row.verdicts[verdict]["action"] == "fail" and says in row.verdicts[verdict]["because"]
    assert not row.admissible and name not in planted.made.admitted and says in row.because


def test_a_candidate_that_is_the_dense_model_passes_all_but_perhaps_speed(planted):
    assert {name: found["action"] for name, found in planted.rows["the same"].verdicts.items() if name != "latency"} == {"accuracy": "pass", "class recall": "pass"}


def test_what_accuracy_alone_would_have_let_pass_are_the_forgotten_class_and_the_nan_at_one_batch(planted):
    for name in ("forgot a class", "NaN at batch 7"):
        assert planted.rows[name].verdicts["accuracy"]["action"] == "pass", name
    assert planted.rows["forgot a class"].recall["3"] == 0.0
    assert planted.rows["NaN for some"].rows_not_finite == planted.bright > 0 and planted.rows["NaN at batch 7"].rows_not_finite == 0


def test_rows_hold_macro_f1_recall_parity_and_latency_as_plain_json(planted, digits):
    y = digits.test.y
    for name, answers in planted.made.answers.items():
        row = planted.rows[name]
        assert row.macro_f1 == pytest.approx(f1_score(y, answers, average="macro", labels=range(10), zero_division=0))
        assert [*row.recall.values()] == pytest.approx(recall_score(y, answers, average=None, labels=range(10), zero_division=0)) and [*row.recall] == list("0123456789")
        assert row.test_rows == 600 and row.latency_ms_p50 > 0 and row.agreement == pytest.approx((answers == planted.made.answers[REFERENCE]).mean())
    assert planted.rows[DENSE].max_abs < 1e-4 and planted.rows[REFERENCE].macro_f1_drop is None
    drop = planted.rows["forgot a class"].macro_f1_drop
    assert 0.05 < drop["low"] < drop["drop"] < drop["high"] < 0.2
    assert planted.rows["NaN for some"].max_abs is None
    json.dumps(planted.made.to_dict(), allow_nan=False)


def test_recall_is_reported_and_not_gated_unless_the_spec_asks(planted, digits):
    options = options_in(planted.folder, gate={"max_accuracy_drop": 0.15, "latency_pairs": 20})
    subjects = [Subject(name, "fp32", artifact.read(folder), rival, "onnxruntime") for name, folder, rival in ((DENSE, planted.folder / "runs/bad/export-dense", None), ("forgot a class", planted.folder / "forgot a class", DENSE))]
    made = judge(options, subjects, models.predictor(planted.model), models.count(planted.model, digits.shape) | {"size_bytes": 1}, digits.test, looks=2)
    assert made.rows[-1].verdicts.keys() == {"accuracy", "latency"} and made.rows[-1].recall["3"] == 0.0


def test_the_baseline_is_kept_with_its_answers_and_the_logits_of_some_rows(planted, digits, tmp_path):
    save_answers(tmp_path / "answers.npz", planted.made, digits.test)
    kept = baseline_of(tmp_path / "baseline.npz")
    logits = evaluate.predict_rows(models.predictor(planted.model), digits.test.x, 64)
    np.testing.assert_array_equal(kept.answers, logits.argmax(1))
    np.testing.assert_array_equal(kept.logits, logits[:64])


def test_a_row_of_nan_answers_nothing_and_lowers_macro_f1():
    logits = np.eye(3)[[0, 1, 2, 2]]
    logits[3] = np.nan
    assert [*evaluate.answered(logits)] == [0, 1, 2, -1]
    assert evaluate.macro_f1(evaluate.answered(logits), np.array([0, 1, 2, 2]), 4) == pytest.approx((1 + 1 + 2 / 3) / 3)


def test_the_interval_of_the_macro_f1_drop_is_that_of_a_bootstrap_over_rows():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 400)
    baseline, candidate = (np.where(rng.random(400) < share, y, rng.integers(0, 4, 400)) for share in (0.9, 0.8))
    found = gate.macro_f1_drop(y, baseline, candidate, 4, 0.95, seed=1)
    index = np.random.default_rng(2).integers(0, 400, (1000, 400))
    drops = [evaluate.macro_f1(baseline[rows], y[rows], 4) - evaluate.macro_f1(candidate[rows], y[rows], 4) for rows in index]
    assert found["drop"] == pytest.approx(evaluate.macro_f1(baseline, y, 4) - evaluate.macro_f1(candidate, y, 4))
    assert (found["low"], found["high"]) == pytest.approx(np.quantile(drops, (0.05, 0.95)), abs=0.006)
    assert found == gate.macro_f1_drop(y, baseline, candidate, 4, 0.95, seed=1)


# --- refused before the work --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder whose registry is made once: that takes seconds."""
    return tmp_path_factory.mktemp("shelf")


def test_a_class_with_too_few_test_rows_for_its_margin_is_refused_before_training(shelf):
    options = options_in(shelf, compress=[{"quantize": {}}], gate={"max_accuracy_drop": 0.15, "max_class_recall_drop": 0.05})
    with pytest.raises(UserError, match=r"gate\.max_class_recall_drop: 0\.05 cannot be decided for class '8', which has 58 test rows and needs 150 .* \(10 classes x 2 looks at this test split\); 10 classes have too few"):
        launch.run(options, quiet)
    assert not list(shelf.glob("runs/*/train*"))


def test_a_margin_that_nobody_set_leaves_keys_as_they_were(tmp_path):
    stage = launch.plan(options_in(tmp_path))[-2]
    without, asked = (launch._sections(options_in(tmp_path, gate=margin), stage)["gate"] for margin in ({}, {"max_class_recall_drop": 0.2}))
    assert "max_class_recall_drop" not in without and asked == without | {"max_class_recall_drop": 0.2}


# --- who looks at the test split ----------------------------------------------------------------------------------


@pytest.fixture
def reads(tmp_path, monkeypatch):
    """Lines of watched_digits: loads and reads of test rows, in whatever process."""
    monkeypatch.setenv("PORTAISYS_TEST_READS", str(tmp_path / "reads"))
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(data, "Splits", data.Splits)  # so that it is put back
    monkeypatch.delitem(sys.modules, "watched_digits", raising=False)
    yield lambda: (tmp_path / "reads").read_text().split("\n")[:-1]
    sys.modules.pop("watched_digits", None)


WATCHED = "data={source: factory, factory: 'watched_digits:digits', test_rows: 600}"


def test_no_stage_before_the_judge_reads_the_test_split(tmp_path, reads):
    overrides = [WATCHED, "train.num_workers=0", "train.epochs=1", "compress.1.distill.epochs=1", "compress.0.prune.round_to=4", "model.channels=[8,16]", "model.blocks=[1,1]", f"storage.path={tmp_path / 'runs'}", f"storage.cache={tmp_path / 'cache'}"]
    options = spec.load(ROOT / "jobs/specs/digits.yaml", [*overrides, "engine.backend=auto"])
    splits = data.load(options.data)
    before = [stage.name for stage in launch.plan(options) if stage.kind not in ("judge", "version")]
    assert {"train", "prune-1", "distill-2", "export-small", "quantize", "choose"} <= {*before}
    for name in before:
        launch.produce(options, name, quiet, splits)
    assert {line.split()[0] for line in reads()} == {"loaded"}  # more than once: a training loads its own
    with pytest.raises(AssertionError, match="only a run with a registry may look"):
        launch.produce(options, "judge", quiet, splits)
    # The watch sees: rows, labels, and rows asked of another split's table.
    splits.test.x, splits.test.y, splits.test.take(np.arange(2)), splits.train.table.rows(splits.test.indices[:1])
    assert [line for line in reads() if not line.startswith("loaded")] == ["x", "rows", "y", "take", "rows", "rows"]


@pytest.mark.cluster
def test_a_search_on_ray_never_reads_the_test_split(tmp_path, reads):
    overrides = [WATCHED, "train.epochs=1", "compress.1.distill.epochs=1", "search.trials=2", "search.latency_rounds=20", "model.blocks=[1,1,1]"]
    problem = tune.read(ROOT / "tune_spaces/prune_digits.yaml", [*overrides, f"storage.path={tmp_path / 'runs'}", f"storage.cache={tmp_path / 'cache'}"])
    with cluster.on_ray(2):
        found = tune.run(problem, quiet)
    assert {trial.state for trial in found.trials} == {"done"}
    lines = reads()
    assert {line.split()[0] for line in lines} == {"loaded"}
    assert {line.split()[1] for line in lines} - {str(os.getpid())}  # the trials' processes watched themselves


def test_the_ledger_knows_at_which_counts_a_versions_candidates_were_judged(shelf):
    opened: Registry = open_registry(options_in(shelf).storage)
    test, mine, other, third = (digit * 64 for digit in "0123")
    opened.record_looks(test, [mine, f"{mine} fp16"])
    opened.record_looks(test, [other])
    opened.record_looks("f" * 64, [third])
    opened.record_looks(test, [mine, f"{mine} fp16", third])
    assert opened.looks_of(test, [mine, "e" * 64]) == (2, 4)
    assert opened.looks_of(test, [mine, third]) == (4,)
    assert opened.looks_of(test, ["e" * 64]) == ()
