"""`compress: auto`: tries recipes on Ray, judged on the validation split, and writes the explicit one it chose.

The dense model is trained once, as the first stage of the run, and is every trial's. What is chosen is reckoned to pass the gate; whether it
does, the run of the recipe finds out with its one look at the test split. Knows no training and no search: tune has those.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from portaisys import artifact, data, gate, launch, spec, tune
from portaisys.launch import Tell
from portaisys.registry import open_registry
from portaisys.spec import Spec, UserError
from portaisys.trials import Choices, Params, Trial
from portaisys.tune import Problem

RECIPE = "recipe.yaml"
CHOICE = "choice.json"
Recipe = list[dict[str, Any]]


def resolved(options: Spec, tell: Tell) -> Spec:
    """The spec with an explicit recipe: as it is, or what a search of recipes chose (written to recipe.yaml in the run's folder).

    Stages of the chosen recipe are the run's already. Raises UserError when no recipe tried is reckoned to pass the gate, naming the nearest.
    """
    if options.compress != "auto":
        return options
    problem, folder = problem_of(options), launch.run_folder(options)
    file = folder / "search" / CHOICE
    if not (before := _chosen_before(file, problem)):
        splits = data.load(options.data)
        looks = open_registry(options.storage).looks(splits.test_digest)
        launch.preflight(options, splits, looks)
        launch.train(options, tell)
        found = tune.run(problem, tell)
        best, because = choose(found.trials, options, len(splits.test), looks + len(launch.TYPICAL))
        before = {**_about(problem), "params": dict(best.params), "because": because}
        artifact.write_text(file, json.dumps(before, indent=1, sort_keys=True))
    return _written(problem, before, folder, tell)


def _about(problem: Problem) -> dict[str, Any]:
    return {"problem": problem.digest, "trials": problem.base.search.trials}


def _chosen_before(file: Path, problem: Problem) -> dict[str, Any]:
    """What this same search chose, else nothing. Chosen again after the gate's looks, it might come out otherwise."""
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found if found.items() >= _about(problem).items() else {}


def _written(problem: Problem, choice: Mapping[str, Any], folder: Path, tell: Tell) -> Spec:
    options, params = problem.base, choice["params"]
    recipe = recipe_of(params, options)
    explicit = launch.with_recipe(problem.trained or options, recipe)
    with artifact.locked(folder):
        launch.take_over(explicit, tune.trial_options(problem, params, folder / "search"), [stage.name for stage in launch.plan(explicit) if stage.kind not in ("choose", "judge", "version")])
        artifact.write_text(folder / RECIPE, f"# {choice['because']}\n{spec.to_yaml(explicit)}")
    tell("recipe", f"{told(recipe)}: {choice['because']}; {folder / RECIPE}", 1.0, "done")
    return explicit


def told(recipe: Recipe) -> str:
    """A recipe in one line."""
    return yaml.safe_dump(recipe, default_flow_style=True, width=10**6).strip() if recipe else "nothing to compress"


# --- what is tried ------------------------------------------------------------------------------------------------


def problem_of(options: Spec) -> Problem:
    """The search over recipes: how much is pruned, how long and how fast is distilled, how the file is quantized. Losers are stopped as `search.early_stop` says."""
    objectives = {"validation_error": "min", spec.GOALS[options.search.goal]: "min"}
    search = options.search.model_copy(update={"objectives": objectives, "early_stop": options.search.early_stop or spec.EarlyStop()})
    base = options.model_copy(update={"search": search})
    return Problem(base, {}, space(options), partial(values, options=options), options)


def space(options: Spec) -> dict[str, Choices]:
    """By name what there is to choose from. No search is without the recipes that cost nothing to train."""
    epochs = options.train.epochs
    found: dict[str, Choices] = {
        "mac_cut": (0.0, 0.3, 0.5, 0.65, 0.8),
        "epochs": tuple(sorted({max(1, epochs // 4), max(1, epochs // 2)})),
        "rate": (0.2, 0.5),
        "quantize": ("none", "auto", "mixed"),
    }
    return found


def values(params: Params, options: Spec) -> Mapping[str, Any]:
    """Dotted values of the spec for what is tried."""
    return {"compress": recipe_of(params, options)}


def recipe_of(params: Params, options: Spec) -> Recipe:
    """The compression steps that these choices mean; of nothing pruned nothing is distilled."""
    steps: Recipe = []
    if params.get("mac_cut"):
        steps.append({"prune": {"mac_cut": params["mac_cut"], "importance": "taylor", "scope": "global"}})  # lost least of all (docs/log.md)
        steps.append({"distill": {"epochs": params["epochs"], "learning_rate": params["rate"] * options.train.learning_rate}})
    if params.get("quantize", "none") != "none":
        steps.append({"quantize": {"calibration": "auto"} | ({"mixed": True} if params["quantize"] == "mixed" else {})})
    return steps


# --- what is chosen -----------------------------------------------------------------------------------------------


def choose(trials: Sequence[Trial], options: Spec, rows: int, looks: int) -> tuple[Trial, str]:
    """Of the trials reckoned to pass the gate, over `rows` test rows and at so many looks, the one that goes furthest towards the goal, and why.

    Reckoned: at the rates of rows lost and gained that validation showed, the bound of the accuracy drop that the gate would find over its own rows.
    """
    goal, margin = spec.GOALS[options.search.goal], options.gate.max_accuracy_drop
    done = [trial for trial in trials if trial.values is not None and trial.lost is not None]
    if not done:
        raise UserError(f"compress: none of {len(trials)} recipes came to its end: {'; '.join(dict.fromkeys(trial.because for trial in trials))[:500]}")
    bounds = {trial.id: _bound(trial, options, rows, looks) for trial in done}
    near = [trial for trial in done if bounds[trial.id] <= margin]
    if not near:
        best = min(done, key=lambda trial: bounds[trial.id])
        raise UserError(
            f"gate.max_accuracy_drop: {margin:g} would be kept by none of the {len(done)} recipes tried; the nearest, {told(recipe_of(best.params, options))}, "
            f"is reckoned to come to a bound of {bounds[best.id]:.4f}; allow that much, or try longer (search.trials, train.epochs)"
        )
    best = min(near, key=lambda trial: ((trial.values or {})[goal], bounds[trial.id], trial.id))
    because = f"the least {goal} of {len(near)} of {len(done)} recipes whose accuracy drop, as far as validation tells, the gate would bound within {margin:g} (here {bounds[best.id]:.4f})"
    return best, because


def _bound(trial: Trial, options: Spec, rows: int, looks: int) -> float:
    """Upper bound of the accuracy drop over `rows` test rows, were validation's rates theirs."""
    scale = rows / options.data.validation_rows
    return gate.tango_bound((trial.lost or 0) * scale, (trial.gained or 0) * scale, rows, gate.corrected(options.gate.confidence, looks))[1]
