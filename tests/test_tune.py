"""Searching: what a space may hold, fronts and their volume, and real searches on Ray, killed and gone on with."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from portaisys import artifact, cluster, spec, tune
from portaisys.compress.prune import prune
from portaisys.models import build
from portaisys.spec import SpecError, UserError
from portaisys.tune import Range, Trial

ROOT = Path(__file__).parents[1]
SPACES = sorted((ROOT / "tune_spaces").glob("*.yaml"))


# --- what is searched ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.name)
def test_every_space_reads_and_its_corners_are_specs(path):
    problem = tune.read(path)
    low = {name: values.low if isinstance(values, Range) else values[0] for name, values in problem.space.items()}
    assert problem.trial_spec(low).digest("model", "train", "compress") != problem.base.digest("model", "train", "compress")


def space_file(folder, **changes):
    tree = yaml.safe_load((ROOT / "tune_spaces/prune_digits.yaml").read_text()) | {"spec": str(ROOT / "jobs/specs/digits.yaml")}
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return path


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"train.learnin_rate": [0.1]}, r"space\.train\.learnin_rate: 0\.1 cannot stand there: train\.learnin_rate: unknown key; did you mean 'learning_rate'"),
        ({"train.learning_rate": [0.1, -1]}, r"space\.train\.learning_rate: -1 cannot stand there"),
        ({"model.channels.7": [8]}, r"'7' is not an index of a list of 3"),
        ({"train.epochs": {"low": 3, "high": 3}}, r"space\.train\.epochs.*low 3 is not below high 3"),
        ({"train.epochs": {"low": 0, "high": 3, "log": True}}, "needs a low above 0"),
        ({"train.epochs": []}, "a list needs at least one choice"),
        ({"train.epochs": [2, 2]}, "each of them once"),
        ({}, "space: is empty"),
    ],
)
def test_a_space_that_does_not_fit_the_spec_is_refused_with_its_key(tmp_path, space, says):
    with pytest.raises(SpecError, match=says):
        tune.read(space_file(tmp_path, space=space))


@pytest.mark.parametrize(
    ("objectives", "says"),
    [
        ({"latency_ms": "max"}, r"search\.objectives.*latency_ms: max contradicts.*write latency_ms: min"),
        ({"validation_error": "min", "validation_accuracy": "max"}, "the same objective with opposite signs"),
        ({"speed": "max"}, "'speed' is not one of validation_error"),
        ({}, "at least one of"),
    ],
)
def test_objectives_that_contradict_are_refused(tmp_path, objectives, says):
    with pytest.raises(SpecError, match=says):
        tune.read(space_file(tmp_path, search={"objectives": objectives}))


def test_what_only_trials_get_stays_out_of_the_best_spec_and_the_user_has_the_last_word(tmp_path):
    problem = tune.read(space_file(tmp_path), ["search.trials=3", "train.epochs=7"])
    assert (problem.base.search.trials, problem.base.train.epochs, problem.trial_spec({}).train.epochs) == (3, 7, 7)
    problem = tune.read(space_file(tmp_path))
    assert (problem.base.train.epochs, problem.trial_spec({}).train.epochs) == (20, 4)


def test_a_ratio_a_stage_cuts_that_stage():
    cut = [prune(build(spec.ConvNet(channels=(16, 32)), (1, 8, 8), 10), (1, 8, 8), spec.Prune(ratios=ratios), 10) for ratios in ((0.5, 0.0), (0.0, 0.5))]
    assert cut[0]["mac_cut"] > 0.2 and cut[1]["parameter_cut"] > 0.4
    with pytest.raises(UserError, match=r"compress\.prune\.ratios: 3 ratios for a model of 2 stages"):
        prune(build(spec.ConvNet(channels=(16, 32)), (1, 8, 8), 10), (1, 8, 8), spec.Prune(ratios=(0.1, 0.1, 0.1)), 10)
    with pytest.raises(ValueError, match="leave those out"):
        spec.Prune(ratios=(0.1,), mac_cut=0.3)


# --- fronts -------------------------------------------------------------------------------------------------------


def test_the_front_holds_what_nothing_dominates_and_equal_points_once():
    points = np.array([[1, 3], [2, 2], [3, 1], [2, 3], [2, 2], [4, 4.0]])
    assert tune.front(points) == [0, 1, 2]
    assert tune.front(np.empty((0, 2))) == []


def test_hypervolume_is_the_volume_that_sampling_finds():
    rng = np.random.default_rng(0)
    points, reference = rng.random((12, 3)), np.ones(3)
    samples = rng.random((200_000, 3))
    covered = (points[None] <= samples[:, None]).all(2).any(1).mean()
    assert tune.hypervolume(points, reference) == pytest.approx(covered, abs=0.005)
    history = [row["value"] for row in tune.hypervolume_history(points, reference)]
    assert history == sorted(history) and history[-1] == pytest.approx(tune.hypervolume(points, reference))
    assert tune.hypervolume(points, np.zeros(3)) == 0.0


def ended(name, **values):
    return Trial(name, "done", {"train.epochs": 3}, values, 1.0, "")


def test_the_best_is_the_fastest_within_the_gates_drop_of_the_lowest_error():
    options = spec.parse({"name": "a", "gate": {"max_accuracy_drop": 0.01}})
    trials = [ended("slow", validation_error=0.02, latency_ms=3), ended("near", validation_error=0.029, latency_ms=2), ended("fast", validation_error=0.05, latency_ms=1)]
    best, because = tune.choose(trials, options)
    assert best.id == "near" and "within gate.max_accuracy_drop (0.01)" in because


# --- on Ray ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_cluster():
    with cluster.on_ray(2):
        yield


def make_formula():
    """Stands for training: what a trial reports and returns is real, what it computes is quick. Made here, so that it travels by value."""

    def formula(params, report):
        if params["a"] > 0.8:
            raise UserError("train.learning_rate: too large")
        for epoch in (1, 2, 3):
            # Those to be invalid are bad as well: the best of the others is then never stopped, in whatever order they report.
            report({"validation_error": params["a"] + 0.1 / epoch + (params["b"] == 2), "epoch": epoch})
        return {"validation_error": params["a"], "latency_ms": float("nan") if params["b"] == 2 else 1 - params["a"], "parameters": 5}

    return formula


@pytest.mark.cluster
def test_every_trial_ends_with_its_state_and_nothing_is_left_on_the_cluster(ray_cluster, tmp_path):
    options = spec.Search(trials=12, max_concurrent=2, early_stop=spec.EarlyStop())
    trials = tune.search(make_formula(), {"a": Range(low=0.0, high=1.0), "b": (0, 1, 2)}, options, tmp_path)
    by_state = {state: [trial for trial in trials if trial.state == state] for state in ("done", "stopped", "failed", "invalid")}
    assert len(trials) == 12 == sum(map(len, by_state.values()))
    assert by_state["done"] and all(trial.values["validation_error"] == trial.params["a"] for trial in by_state["done"])
    assert all("too large" in trial.because for trial in by_state["failed"])
    assert all("latency_ms is not a finite number" in trial.because and trial.params["b"] == 2 for trial in by_state["invalid"])
    assert all("stopped early" in trial.because for trial in by_state["stopped"])
    deadline = time.monotonic() + 30  # Ray takes groups down after the trial that held them
    while tune._placement_groups():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.cluster
def test_no_point_of_a_small_space_is_tried_twice_before_all_were(ray_cluster, tmp_path):
    space = {"a": (0.3, 0.1, 0.2), "b": (True, False), "c": ("only",)}

    def formula(params, report):
        assert params["c"] == "only"
        return {"validation_error": params["a"], "latency_ms": 1.0, "parameters": 1.0 + params["b"]}

    trials = tune.search(formula, space, spec.Search(trials=6), tmp_path)
    assert {(trial.params["a"], trial.params["b"]) for trial in trials} == set(itertools.product(*list(space.values())[:2]))
    assert {trial.state for trial in tune.search(formula, space, spec.Search(trials=7), tmp_path)} == {"done"}


@pytest.mark.cluster
def test_more_trials_at_once_than_the_cluster_can_hold_are_refused(ray_cluster, tmp_path):
    with pytest.raises(UserError, match=r"search\.max_concurrent: 64 trials at once need 64 CPUs and the cluster has 3"):
        tune.search(make_formula(), {"a": Range(low=0.0, high=1.0), "b": (0, 1)}, spec.Search(max_concurrent=64), tmp_path)


DRIVER = """
import sys, time
from pathlib import Path
from portaisys import cluster, spec, tune
folder = Path(sys.argv[1])
def trial(params, report):
    (folder / "begun").mkdir(exist_ok=True)
    (folder / "begun" / f"{tune.trial_id(params)}-{time.time_ns()}").touch()
    while not (folder / "go").exists() and len(list((folder / "begun").iterdir())) > 4:
        time.sleep(0.05)
    return {"validation_error": params["a"], "latency_ms": 1 - params["a"], "parameters": 1.0}
with cluster.on_ray(2):
    for ended in tune.search(trial, {"a": tune.Range(low=0.0, high=1.0)}, spec.Search(trials=8, max_concurrent=2), folder / "search"):
        print("ended", ended.id, ended.state)
"""


@pytest.mark.cluster
def test_a_killed_driver_is_gone_on_with_and_no_trial_is_lost_or_ended_twice(tmp_path):
    """The first driver is killed while two trials hang; the second runs those two again and what was still to come."""
    begun = tmp_path / "begun"
    first = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (begun.exists() and len(list(begun.iterdir())) >= 6):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = {path.name.partition("-")[0] for path in begun.iterdir()}
    (tmp_path / "go").touch()
    second = subprocess.run([sys.executable, "-c", DRIVER, str(tmp_path)], capture_output=True, text=True, timeout=300, check=True)
    ends = [line.split()[1:] for line in second.stdout.splitlines() if line.startswith("ended")]
    times_begun = [path.name.partition("-")[0] for path in begun.iterdir()]
    assert len(ends) == len({name for name, _ in ends}) == 8 and {state for _, state in ends} == {"done"}
    assert before <= {name for name, _ in ends}
    assert sum(times_begun.count(name) - 1 for name in set(times_begun)) == 2  # those that the killed driver had begun


@pytest.mark.cluster
def test_a_search_of_a_spec_leaves_trials_front_report_and_a_spec_that_runs(ray_cluster, tmp_path):
    overrides = ["train.epochs=1", "compress.1.distill.epochs=1", "search.trials=3", "search.latency_rounds=20", "data.validation_rows=100"]
    overrides += [f"storage.path={tmp_path / 'runs'}", f"storage.cache={tmp_path / 'cache'}", "model.blocks=[1,1,1]"]
    problem = tune.read(ROOT / "tune_spaces/prune_digits.yaml", overrides)
    said = []
    found = tune.run(problem, lambda stage, text="", fraction=None, state="running": said.append(text))
    left = json.loads((found.folder / "search.json").read_text())
    assert len(found.trials) == 3 and {trial.state for trial in found.trials} == {"done"}
    assert left["front"] and left["best"] in left["front"] and len(left["hypervolume"]) == 3
    best = spec.load(found.best)
    assert best.train.epochs == 1 and best.name == "digits-best" and best.compress[0].prune.ratios is not None
    assert best.storage == problem.base.storage
    # A trial is what `portaisys run` makes of its spec: the same stages, found again by their keys.
    trial = found.trials[0]
    made = artifact.read(tmp_path / "runs/digits/search/trials" / trial.id / "export-small")
    assert made.scores["parameters"] == trial.values["parameters"]
    # Asked again, everything is there already; another space under the same name is another search.
    again = tune.run(problem, lambda stage, text="", fraction=None, state="running": said.append(text))
    assert [one.id for one in again.trials] == [one.id for one in found.trials] and "3 of 3 trials ended before" in " ".join(said)
    with pytest.raises(UserError, match=r"name: 'digits' already holds another search"):
        tune.run(tune.read(ROOT / "tune_spaces/prune_digits.yaml", [*overrides, "seed=1"]), lambda *_, **__: None)


@pytest.mark.cluster
def test_trials_with_several_workers_train_under_ray_train_and_a_stopped_one_leaves_no_placement_group(ray_cluster, tmp_path):
    """One learning rate learns, the other cannot: the second trial is stopped while its workers train."""
    overrides = [
        "train.num_workers=2", "train.epochs=3", "compress=[]", "model.channels=[8,16]", "model.blocks=[1,1]", "search.trials=2", "search.max_concurrent=1", "search.seed=0",
        f"storage.path={tmp_path / 'runs'}", f"storage.cache={tmp_path / 'cache'}",
    ]  # fmt: skip
    base = spec.load(ROOT / "jobs/specs/digits.yaml", [*overrides, "search.early_stop={grace_epochs: 1, reduction: 2}", "search.objectives={validation_error: min, macs: min}"])
    problem = tune.Problem(base, {}, {"train.learning_rate": (0.1, 1e-6)})
    before = tune._placement_groups()
    found = tune.run(problem, lambda *_, **__: None)
    assert {trial.params["train.learning_rate"]: trial.state for trial in found.trials} == {0.1: "done", 1e-6: "stopped"}
    assert tune._placement_groups() == before
    assert artifact.read(tmp_path / "runs/digits/search/trials" / found.trials[0].id / "train").scores["validation_accuracy"] > 0.2
