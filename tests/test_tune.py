"""Searching a spec: what a space may hold, what is chosen, and real searches on Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from portaisys import artifact, cluster, spec, tune
from portaisys.compress.prune import prune
from portaisys.models import build
from portaisys.spec import SpecError, UserError
from portaisys.trials import Range, Trial, _placement_groups

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


# --- what is chosen -----------------------------------------------------------------------------------------------


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
    before = _placement_groups()
    found = tune.run(problem, lambda *_, **__: None)
    assert {trial.params["train.learning_rate"]: trial.state for trial in found.trials} == {0.1: "done", 1e-6: "stopped"}
    assert _placement_groups() == before
    assert artifact.read(tmp_path / "runs/digits/search/trials" / found.trials[0].id / "train").scores["validation_accuracy"] > 0.2
