"""A space and a function of its points in, ended trials out: Optuna chooses the points, Ray Tune runs the function at them.

The study (Optuna's journal) is the record: a driver that died goes on with it, finished trials are not run again and
those it had begun are asked for again. Knows nothing of what a trial does but the numbers it reports.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import random
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from pydantic import model_validator
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search.optuna import OptunaSearch
from ray.util import placement_group_table, remove_placement_group

from portaisys import cluster, spec
from portaisys.spec import Section, UserError

STUDY = "study.journal"
Params = Mapping[str, Any]
Report = Callable[[Mapping[str, float]], None]
Evaluate = Callable[[Params, Report], Mapping[str, Any]]
Show = Callable[[str, str, float], None]  # of what, how far in words, how far in [0, 1]

_log = logging.getLogger(__name__)


class Range(Section):
    """Numbers from low to high, both included; whole numbers when both are."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log: needs a low above 0 and no step")
        return self

    @property
    def ends(self) -> tuple[int | float, int | float]:
        return self.low, self.high


Choices = tuple[int | float | str | bool, ...]
Dimension = Range | Choices
Space = Mapping[str, Dimension]
State = Literal["done", "stopped", "failed", "invalid"]


@dataclass(frozen=True)
class Trial:
    """An ended trial. `values`: objective -> value when done; `seconds`: of its process; `because`: empty when done.

    `lost`, `gained`: validation rows that the dense model alone, and the trial alone, answered rightly, where there is a common dense model.
    """

    id: str
    state: State
    params: Params
    values: Mapping[str, float] | None
    seconds: float
    because: str
    lost: int | None = None
    gained: int | None = None


def trial_id(params: Params) -> str:
    """Names a trial after what it tries: the same values are the same trial, whenever and wherever they are tried."""
    return spec.digest(dict(params))[:10]


# --- a search -------------------------------------------------------------------------------------------------------


def search(
    evaluate: Evaluate, space: Space, options: spec.Search, folder: Path, *, resources: Mapping[str, float] | None = None,
    selector: Mapping[str, str] | None = None, tell: Show | None = None,
) -> list[Trial]:  # fmt: skip
    """Try until `options.trials` trials have ended, those of an earlier driver in `folder` counted; all ended ones, in order.

    `evaluate(params, report)` runs in a process of its own with `resources`, on a node with the labels of `selector`, and returns at least the objectives; what it
    reports per epoch (`validation_error`, `epoch`) is what early stopping sees. Needs a Ray cluster (cluster.on_ray).
    """
    study = _study(folder, options)
    again = _take_up(study)
    left = options.trials - len(_ended(study))
    if tell:
        tell("search", f"{len(_ended(study))} of {options.trials} trials ended before, {again} begun ones go on", len(_ended(study)) / options.trials)
    if left > 0:
        _run_tune(evaluate, space, options, folder, left, resources or {"CPU": 1}, selector or {}, tell)
    return _ended(_study(folder, options))


def _storage(folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(folder / STUDY)))


def _study(folder: Path, options: spec.Search) -> Any:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = ["minimize" if mode == "min" else "maximize" for mode in options.objectives.values()]
    return optuna.create_study(storage=_storage(folder), study_name="search", directions=directions, load_if_exists=True)


def _take_up(study: Any) -> int:
    """Trials that a dead driver had begun are asked for again, with their values; returns how many."""
    begun = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in begun:
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)
    return len(begun)


def _ended(study: Any) -> list[Trial]:
    """Trials that came to an end, not those that a dead driver left."""
    ends = [trial.user_attrs["ended"] for trial in study.get_trials(deepcopy=False) if "ended" in trial.user_attrs]
    return [Trial(trial_id(end["params"]), **end) for end in ends]


def _run_tune(evaluate: Evaluate, space: Space, options: spec.Search, folder: Path, count: int, resources: Mapping[str, float], selector: Mapping[str, str], tell: Show | None) -> None:
    # Early stopping reports its one metric and not the objectives, which only a finished trial has.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints tables whatever `verbose` says
    _check_room(options, resources, selector)
    groups = _placement_groups()
    trainable = tune.with_resources(
        tune.with_parameters(_trainable, evaluate=evaluate),
        tune.PlacementGroupFactory([dict(resources)], bundle_label_selector=[dict(selector)]),
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=_searcher(space, options, folder), scheduler=_scheduler(options.early_stop), num_samples=count,
            max_concurrent_trials=options.max_concurrent, reuse_actors=True, trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        # A new name every time: with an old one Ray would go on by itself. What goes on is our study.
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex[:8], storage_path=str((folder / "ray").resolve()), verbose=0, callbacks=[_Progress(tell, options.trials - count, options.trials)] if tell else [],
            failure_config=tune.FailureConfig(max_failures=1), checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
        ),
    )  # fmt: skip
    tuner.fit()
    _remove_leaked(groups)


def _check_room(options: spec.Search, resources: Mapping[str, float], selector: Mapping[str, str]) -> None:
    cluster.refuse_unplaceable(
        "search.max_concurrent", "trials at once", options.max_concurrent, resources, selector, cluster.nodes(), cluster.grows_to()
    )


def _trainable(config: Params, evaluate: Evaluate) -> None:
    """A trial in its process. What the user can put right ends the trial with its reason, not the search."""
    started = time.monotonic()
    try:
        found = dict(evaluate(config, lambda values: tune.report(dict(values))))
    except UserError as error:
        found = {"because": str(error)}
    tune.report({**found, "ended": True, "seconds": time.monotonic() - started})


class _Recorded(OptunaSearch):  # type: ignore[misc]
    """Ray's searcher leaves a trial without all its objectives (stopped, failed, NaN) open for ever; here each gets its end.

    And the sampler is asked again when it names what was tried before, which costs it a sixth of 40 trials on a small grid
    (docs/log.md, 2026-11-24). `space`: as the user wrote it; Optuna is given the index of a list of numbers, see `_distribution`.
    """

    _values: Space
    _tried: set[str]

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        for again in range(_ASKED_AGAIN + 1):
            if again == _ASKED_AGAIN:
                self._draw_untried()
            params = _decoded(self._values, super().suggest(trial_id) or {})
            if _name(params) not in self._tried:
                break
            if again < _ASKED_AGAIN:
                self._ot_study.tell(self._ot_trials.pop(trial_id), state=TrialState.FAIL)
        self._tried.add(_name(params))
        return params

    def _draw_untried(self) -> None:
        """The next trial asked for is drawn at random from what is left of a space of lists; an exhausted one begins again."""
        if all(not isinstance(values, Range) for values in self._values.values()):
            every = (dict(zip(self._values, point, strict=True)) for point in itertools.product(*self._values.values()))
            left = [params for params in itertools.islice(every, 10_000) if _name(params) not in self._tried]
            if left:
                self._ot_study.enqueue_trial(_encoded(self._values, random.Random(len(self._tried)).choice(left)))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self._ot_trials[trial_id]
        end = _end(result or {}, error, self.metric) | {"params": _decoded(self._values, trial.params)}
        trial.set_user_attr("ended", end)
        if end["values"] is None:
            self._ot_study.tell(trial, state=TrialState.FAIL)
        else:
            self._ot_study.tell(trial, list(end["values"].values()))


def _searcher(space: Space, options: spec.Search, folder: Path) -> OptunaSearch:
    searcher = _Recorded(
        {name: _distribution(values) for name, values in space.items()},
        metric=list(options.objectives), mode=list(options.objectives.values()), sampler=_sampler(options, folder), storage=_storage(folder), study_name="search",
    )  # fmt: skip
    searcher._values = space
    searcher._tried = {trial.id for trial in _ended(_study(folder, options))}
    return searcher


_ASKED_AGAIN = 10


def _name(params: Params) -> str:
    return trial_id(params)  # `trial_id` is a parameter of Ray's in the searcher's methods


def _ordered(values: Dimension) -> bool:
    return not isinstance(values, Range) and len(values) > 1 and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _encoded(space: Space, params: Params) -> dict[str, Any]:
    """Values as the sampler sees them."""
    return {name: sorted(space[name]).index(value) if _ordered(space[name]) else value for name, value in params.items()}


def _decoded(space: Space, params: Params) -> dict[str, Any]:
    """The reverse of `_encoded`."""
    return {name: sorted(space[name])[value] if _ordered(space[name]) else value for name, value in params.items()}


def _sampler(options: spec.Search, folder: Path) -> Any:
    """TPE (Bergstra et al. 2011; several objectives: Ozaki et al. 2022) that knows of trials still running."""
    begun = len(_study(folder, options).get_trials(deepcopy=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # Seeded anew on resumption, else a second driver would draw the first one's random trials again.
        return optuna.samplers.TPESampler(seed=options.seed + begun, n_startup_trials=max(4, options.trials // 4), multivariate=True, constant_liar=True)


def _distribution(values: Dimension) -> Any:
    """A list of numbers is given in order, as the index into it: TPE then knows that 0.03 lies between 0.01 and 0.1."""
    if not isinstance(values, Range):
        return IntDistribution(0, len(values) - 1) if _ordered(values) else CategoricalDistribution(values)
    if isinstance(values.low, int) and isinstance(values.high, int):
        return IntDistribution(values.low, values.high, log=values.log, step=int(values.step or 1))
    return FloatDistribution(values.low, values.high, log=values.log, step=values.step)


def _scheduler(early_stop: spec.EarlyStop | None) -> Any:
    if early_stop is None:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="epoch", metric="validation_error", mode="min", grace_period=early_stop.grace_epochs, reduction_factor=early_stop.reduction, max_t=10**6
    )


def _end(result: Mapping[str, Any], error: bool, objectives: Sequence[str]) -> dict[str, Any]:
    """How a trial ended, from its last report."""
    seconds = float(result.get("seconds", result.get("time_total_s", 0.0)))
    if error or not result:
        return {"state": "failed", "values": None, "seconds": seconds, "because": "its process failed or died; Ray's logs have the cause"}
    if result.get("because"):
        return {"state": "failed", "values": None, "seconds": seconds, "because": str(result["because"])}
    if not result.get("ended"):
        return {"state": "stopped", "values": None, "seconds": seconds, "because": f"stopped early at validation error {result.get('validation_error', math.nan):.4f}"}
    values = {name: float(result.get(name, math.nan)) for name in objectives}
    odd = [name for name, value in values.items() if not math.isfinite(value)]
    if odd:
        return {"state": "invalid", "values": None, "seconds": seconds, "because": f"{', '.join(odd)} is not a finite number, so the trial cannot be ranked"}
    return {"state": "done", "values": values, "seconds": seconds, "because": ""} | {name: result[name] for name in ("lost", "gained") if name in result}


class _Progress(tune.Callback):  # type: ignore[misc]
    """A line a trial that ended."""

    def __init__(self, tell: Show, ended: int, trials: int) -> None:
        self._tell, self._ended, self._trials = tell, ended, trials

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its callbacks to disk; a terminal does not go there

    def _one(self) -> None:
        self._ended += 1
        self._tell("search", f"{self._ended} of {self._trials} trials", self._ended / self._trials)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._one()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._one()


def _placement_groups() -> set[str]:
    return {name for name, about in placement_group_table().items() if about["state"] != "REMOVED"}


def _remove_leaked(before: set[str]) -> None:
    """Tune stopping a trial that runs Ray Train may leave its placement group (Ray 2.60); its GPUs would be lost for good."""
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup

    deadline = time.monotonic() + 10.0  # those that were not left are taken down a moment after their trials
    while (left := _placement_groups() - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    for name in left:
        _log.warning("placement group %s was left by a trial and is removed", name)
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))
