"""`compress: auto`: which recipe is chosen, what is refused, and a real search on Ray whose answer is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from portaisys import artifact, data, launch, recipes, spec
from portaisys.cli import main
from portaisys.registry import open_registry
from portaisys.spec import SpecError, UserError
from portaisys.trials import Trial

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "jobs/specs/digits.yaml"


def auto(folder, *overrides):
    """digits with a wide margin, whose recipes are trained for an epoch or two."""
    shorter = ["compress=auto", "train.num_workers=0", "engine.also_build=[]", "train.epochs=4", "search.trials=4", "search.seed=1", "gate.max_accuracy_drop=0.2", "gate.latency_pairs=40", "search.latency_rounds=20"]
    return spec.load(DIGITS, [*shorter, f"storage.path={folder}/runs", f"storage.cache={folder}/cache", *overrides])


def trial(name, ms, lost, gained=0, state="done", **params):
    values = {"validation_error": 0.1, "latency_ms": ms} if state == "done" else None
    return Trial(name, state, {"mac_cut": 0.5, "epochs": 1, "rate": 0.5, "quantize": "none", **params}, values, 1.0, "" if values else "stopped early", lost if values else None, gained if values else None)


def test_choices_are_compression_steps_and_of_nothing_pruned_nothing_is_distilled(tmp_path):
    options = auto(tmp_path)
    both = recipes.recipe_of({"mac_cut": 0.5, "epochs": 2, "rate": 0.5, "quantize": "auto"}, options)
    assert both == [{"prune": {"mac_cut": 0.5, "importance": "taylor", "scope": "global"}}, {"distill": {"epochs": 2, "learning_rate": 0.5 * options.train.learning_rate}}, {"quantize": {"calibration": "auto"}}]
    assert recipes.recipe_of({"mac_cut": 0.0, "epochs": 2, "rate": 0.5, "quantize": "none"}, options) == []


def test_every_choice_of_the_space_makes_a_spec(tmp_path):
    options = auto(tmp_path)
    space = recipes.space(options)
    for name, choices in space.items():
        for choice in choices:
            params = {other: values[-1] for other, values in space.items()} | {name: choice}
            assert launch.plan(launch.with_recipe(options, recipes.recipe_of(params, options)))


def test_the_fastest_of_those_that_the_gate_would_pass_is_chosen(tmp_path):
    options = auto(tmp_path, "gate.max_accuracy_drop=0.05")
    trials = [trial("slow", 3.0, 0), trial("near", 2.0, 4, 4), trial("far", 1.0, 12), trial("gone", 0.5, 0, state="stopped")]
    best, because = recipes.choose(trials, options, rows=600, looks=3)
    assert best.id == "near" and "the least latency_ms of 2 of 3 recipes" in because


def test_a_margin_that_no_recipe_keeps_is_refused_with_the_nearest(tmp_path):
    options = auto(tmp_path, "gate.max_accuracy_drop=0.02")
    with pytest.raises(UserError, match=r"gate\.max_accuracy_drop: 0\.02 would be kept by none of the 2 recipes tried; the nearest, .*quantize.*, is reckoned to come to a bound of 0\.0\d+; allow that much"):
        recipes.choose([trial("a", 1.0, 8, quantize="mixed"), trial("b", 0.5, 20)], options, rows=600, looks=3)


def test_a_search_none_of_whose_recipes_ended_says_why(tmp_path):
    with pytest.raises(UserError, match=r"compress: none of 1 recipes came to its end: stopped early"):
        recipes.choose([trial("gone", 1.0, 0, state="stopped")], auto(tmp_path), rows=600, looks=3)


def test_auto_is_no_recipe_where_no_search_comes_first(tmp_path):
    with pytest.raises(UserError, match=r"compress: 'auto' is a search"):
        launch.run(auto(tmp_path), lambda *told, **more: None)
    with pytest.raises(SpecError, match=r"compress"):
        auto(tmp_path, "compress=best")


def test_a_margin_that_cannot_be_decided_is_refused_before_anything_is_tried(tmp_path):
    with pytest.raises(UserError, match=r"gate\.max_accuracy_drop: 0\.001 cannot be decided"):
        recipes.resolved(auto(tmp_path, "gate.max_accuracy_drop=0.001"), lambda *told, **more: None)
    assert not (tmp_path / "runs/digits").exists()


def test_too_few_calibration_rows_are_refused_before_anything_is_tried(tmp_path):
    with pytest.raises(UserError, match=r"data\.calibration_rows: 10 rows are too few"):
        recipes.resolved(auto(tmp_path, "data.calibration_rows=10"), lambda *told, **more: None)
    assert not (tmp_path / "runs/digits").exists()


@pytest.mark.cluster
def test_the_chosen_recipe_is_written_down_runs_on_what_the_search_left_and_is_chosen_again(tmp_path):
    options = auto(tmp_path)
    (tmp_path / "auto.yaml").write_text(spec.to_yaml(options))
    assert main(["run", str(tmp_path / "auto.yaml")]) == 0
    folder = launch.run_folder(options)
    explicit = spec.load(folder / recipes.RECIPE)
    found = json.loads((folder / "search/search.json").read_text())
    assert explicit.compress != "auto" and found["front"] and len({one["id"] for one in found["trials"]}) == 4
    # The dense model was trained once: every trial has the same artifact.
    dense = artifact.read(folder / "train").digest
    assert {artifact.read(place).digest for place in folder.glob("search/trials/*/train")} == {dense}
    # Only the candidates of the run itself have looked at the test split.
    judged = [row["engine"] for row in artifact.read(folder / "judge").scores["rows"] if row["backend"] != "torch"]
    assert open_registry(options.storage).looks(data.load(options.data).test_digest) == len(judged)
    told = []
    again = recipes.resolved(options, lambda stage, text="", *more, **rest: told.append((stage, text)))
    assert again == explicit and {stage for stage, _ in told} == {"recipe"}
    outcome = launch.run(spec.load(folder / recipes.RECIPE), lambda *told, **more: None)
    assert set(outcome.reused) == set(outcome.artifacts)
