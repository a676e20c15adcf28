"""A base spec and a search space in; its trials, the Pareto front and the best spec out.

A trial sees the validation split only; the test split is the gate's. One that a dead driver had begun goes on from its own checkpoints.
Knows no training: a trial is `launch.run` up to its engine, in the trial's own process when it has one worker.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import yaml
from numpy.typing import NDArray
from pydantic import ValidationError

from portaisys import artifact, cluster, data, evaluate, launch, metrics, models, report, spec, store, training
from portaisys.engine import Engine, options_of
from portaisys.engine.cache import cache_of, get_or_build, load
from portaisys.export import INPUT, OUTPUT, export
from portaisys.launch import Tell
from portaisys.pareto import costs, front, hypervolume_history
from portaisys.spec import Section, Spec, SpecError, UserError
from portaisys.trials import Dimension, Params, Range, Report, Space, Trial, search, trial_id
from portaisys.weights import fresh, restore

_log = logging.getLogger(__name__)


# --- what is searched ---------------------------------------------------------------------------------------------


class SearchFile(Section):
    """A file of tune_spaces/: `spec` (a path from the file), `set` in it, `set_in_trials` only (shorter training, say), `search`, `space`."""

    spec: str
    set: dict[str, Any] = {}
    set_in_trials: dict[str, Any] = {}
    search: dict[str, Any] = {}
    space: dict[str, Range | list[int | float | str | bool]]


@dataclass(frozen=True)
class Problem:
    """A resolved search. `base`: what the best spec is made from; `shared`: dotted values that only the trials get.

    `values`: from what is tried to dotted values of the spec, where the two are not the same. `trained`: a spec whose finished training of
    the dense model is every trial's; with it a trial tells how its answers differ from the dense model's.
    """

    base: Spec
    shared: Mapping[str, Any]
    space: Space
    values: Callable[[Params], Mapping[str, Any]] = dict
    trained: Spec | None = None

    def trial_spec(self, params: Params, **changes: Any) -> Spec:
        """The spec of a trial. Raises SpecError when values do not go together."""
        return with_values(self.base, {**self.shared, **self.values(params), **changes})

    @property
    def digest(self) -> str:
        """What makes two searches the same: all but how long and how wide they search."""
        tree = spec.dump(self.base)
        tree["search"] = {name: value for name, value in tree["search"].items() if name not in ("trials", "max_concurrent")}
        return spec.digest([tree, dict(self.shared), {path: _plain(values) for path, values in self.space.items()}])


def with_values(base: Spec, values: Mapping[str, Any]) -> Spec:
    """The spec with dotted paths set. Raises SpecError naming the path."""
    tree = spec.dump(base)
    for path, value in values.items():
        spec.put(tree, path, value)
    return spec.parse(tree)


def read(path: Path, overrides: Sequence[str] = ()) -> Problem:
    """A file of tune_spaces/, with `section.key=value` overrides of its base spec. Raises SpecError naming the path."""
    try:
        file = SearchFile.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not valid YAML: {error}") from None
    except ValidationError as error:
        raise SpecError("\n".join(f"{path}: {'.'.join(map(str, item['loc'][:2])) or 'file'}: {item['msg']}" for item in error.errors())) from None
    space = {name: values if isinstance(values, Range) else tuple(values) for name, values in file.space.items()}
    settings = {**file.set, **{f"search.{name}": value for name, value in file.search.items()}}
    base = spec.load(path.parent / file.spec, [*(f"{name}={json.dumps(value)}" for name, value in settings.items()), *overrides])
    said = {override.partition("=")[0] for override in overrides}
    problem = Problem(base, {name: value for name, value in file.set_in_trials.items() if name not in said}, space)
    _check_space(problem, path)
    return problem


def _check_space(problem: Problem, path: Path) -> None:
    """Every end and choice of every dimension must stand in the spec by itself: a misspelt key is found now, not in a trial."""
    if not problem.space:
        raise SpecError(f"{path}: space: is empty; name at least one key of the spec with a range or a list")
    for name, values in problem.space.items():
        if not isinstance(values, Range) and not (values and len(set(values)) == len(values)):
            raise SpecError(f"{path}: space.{name}: a list needs at least one choice, and each of them once")
        for value in values.ends if isinstance(values, Range) else values:
            try:
                problem.trial_spec({name: value})
            except SpecError as error:
                raise SpecError(f"{path}: space.{name}: {value!r} cannot stand there: {error}") from None


def _plain(values: Dimension) -> Any:
    return values.model_dump() if isinstance(values, Range) else list(values)


# --- the search of a spec -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What a search left. `best`: a file that `portaisys run` takes, or None when no trial came to an end."""

    folder: Path
    trials: Sequence[Trial]
    front: Sequence[str]
    best: Path | None
    because: str
    report: Path


def run(problem: Problem, tell: Tell) -> Found:
    """Search, time what was found alone, write trials.jsonl, search.json, best.yaml and the report. Raises UserError."""
    options = problem.base.search
    folder = launch.run_folder(problem.base) / "search"
    _claim(problem, folder)
    resources, selector = _resources(problem), _selector(problem)
    with artifact.locked(folder), cluster.on_ray(math.ceil(options.max_concurrent * (resources["CPU"] + _workers(problem) * problem.base.train.cpus_per_worker))):
        _check_workers(problem)
        cluster.note_in_job({"portaisys_search": str(folder)})
        reference = _reference(problem, folder)
        trials = search(partial(evaluate_spec, problem=problem, folder=str(folder), reference=reference), problem.space, options, folder, resources=resources, selector=selector, tell=tell)
        tell("search", f"{len(trials)} trials ended", 1.0, "done")
        if "latency_ms" in options.objectives:
            trials = _timed_alone(problem, folder, trials, resources, selector, tell)
    return _write(problem, folder, trials)


def _claim(problem: Problem, folder: Path) -> None:
    """The folder belongs to one search: another one under the same name is refused, the same one goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"digest": problem.digest, "spec": spec.dump(problem.base), "set_in_trials": dict(problem.shared), "space": {n: _plain(v) for n, v in problem.space.items()}}
    file = folder / "problem.json"
    if file.exists() and json.loads(file.read_text())["digest"] != problem.digest:
        raise UserError(f"name: {problem.base.name!r} already holds another search ({file}); take another name (name=...), or delete {folder}")
    artifact.write_text(file, json.dumps(about, indent=1, sort_keys=True))


def _workers(problem: Problem) -> int:
    """Workers beside the trial's own process: one worker trains in it, which saves 15-20 s a trial."""
    workers = problem.trial_spec({}).train.num_workers
    return workers if workers > 1 else 0


def _resources(problem: Problem) -> dict[str, float]:
    train = problem.base.train
    here = _workers(problem) == 0
    return {"CPU": float(train.cpus_per_worker)} | ({"GPU": 1} if train.use_gpu and here else {})


def _selector(problem: Problem) -> Mapping[str, str]:
    """Where trials run: the labels of train.label_selector, in the trials' spec (set_in_trials may send them elsewhere)."""
    return problem.trial_spec({}).train.label_selector


def _check_workers(problem: Problem) -> None:
    """Trials with workers beside their own process: those of all trials at once must fit, or they wait for each other for ever."""
    train, at_once = problem.trial_spec({}).train, problem.base.search.max_concurrent
    what = f"workers ({at_once} trials at once x train.num_workers)"
    cluster.refuse_unplaceable(
        "search.max_concurrent", what, at_once * _workers(problem), training.per_worker(train), train.label_selector, cluster.nodes(), cluster.grows_to()
    )


def evaluate_spec(params: Params, report: Report, problem: Problem, folder: str, reference: bytes) -> dict[str, Any]:
    """One trial: its stages up to the last ONNX file, its engine scored on the validation split and timed against a fixed one."""
    options = trial_options(problem, params, Path(folder))
    _log.info("trial begins", extra={"run": problem.base.name, "trial": options.name})
    splits = data.load(options.data)
    if problem.trained:
        launch.take_over(options, problem.trained, ("train",))
    made = launch.produce(options, _target(options), _reporter(launch.run_folder(options), report), splits)
    file = made.file("model.onnx")
    engine = _engine(options, file)
    right = evaluate.correct(evaluate.predict_rows(_runner(engine), splits.validation.x, options.export.max_batch), splits.validation.y)
    error = 1 - float(right.mean())
    values: dict[str, float] = {"validation_error": error, "validation_accuracy": 1 - error, "size_bytes": file.stat().st_size, **{name: float(made.scores[name]) for name in ("parameters", "macs")}}
    if problem.trained:
        before = _right(options, splits)
        values |= {"lost": int((before & ~right).sum()), "gained": int((~before & right).sum())}
    if "latency_ms" in options.search.objectives:
        row = splits.calibration.x[:1]
        values["latency_ms"] = _relative_ms(options, engine, reference, row)
    engine.close()
    _log.info("trial ended", extra={"run": problem.base.name, "trial": options.name, **values})
    return values


def _right(options: Spec, splits: data.Splits) -> NDArray[np.bool_]:
    """Which validation rows the dense model of a run answers rightly."""
    dense = models.predictor(restore(options, splits, launch.run_folder(options) / "train"))
    return evaluate.correct(evaluate.predict_rows(dense, splits.validation.x, options.export.max_batch), splits.validation.y)


def trial_options(problem: Problem, params: Params, folder: Path) -> Spec:
    """The spec that a trial runs, under its own name and storage.path; `folder`: of the search."""
    base = problem.base.storage.path
    place = f"{base}/{problem.base.name}/search/trials" if problem.base.storage.remote else str(folder / "trials")
    alone = {} if _workers(problem) else {"train.num_workers": 0}
    return problem.trial_spec(params, **{"name": trial_id(params), "storage.path": place, **alone})


def _target(options: Spec) -> str:
    """The stage whose file would be served: int8 where the spec quantizes, else the smallest fp32."""
    return [stage.name for stage in launch.plan(options) if stage.kind in ("export", "quantize")][-1]


def _reporter(folder: Path, report: Report) -> Tell:
    """A `Tell` that reports each epoch's validation error, counted over all training stages, for early stopping."""
    seen = 0

    def tell(stage: str, text: str = "", fraction: float | None = None, state: str = "running") -> None:
        nonlocal seen
        rows = [row for log in sorted((folder / "logs").glob("*.jsonl"), key=lambda log: log.stat().st_mtime) for row in metrics.read(log) if "validation_accuracy" in row]
        for row in rows[seen:]:
            seen += 1
            report({"validation_error": 1 - row["validation_accuracy"], "epoch": seen})

    return tell


def _engine(options: Spec, onnx: Path) -> Engine:
    precision = "int8" if options.quantize and "int8" in options.precisions and onnx.parent.name == "quantize" else "fp32"
    settings = replace(options_of(options.engine, options.export, options.dims), precision=precision)
    # One backend for all trials, or their latencies would not compare; `auto` is for the run of the best spec.
    backend = "onnxruntime" if options.engine.backend == "auto" else options.engine.backend
    return load(get_or_build(onnx, backend, settings, cache_of(options.storage)), settings)


def _runner(engine: Engine) -> Callable[[NDArray[Any]], NDArray[Any]]:
    return lambda x: engine.run({INPUT: x})[OUTPUT]


# --- latency --------------------------------------------------------------------------------------------------------


def _reference(problem: Problem, folder: Path) -> bytes:
    """The base spec's model, untrained: the yardstick that every trial times its engine against. Its own milliseconds are taken now."""
    options = problem.trial_spec({})
    path = folder / "reference.onnx"
    if not path.exists():
        splits = data.load(options.data)
        export(fresh(options, splits), splits.calibration.x, options.export, path, seed=options.seed)
    return path.read_bytes()


def _relative_ms(options: Spec, engine: Engine, reference: bytes, row: NDArray[Any]) -> float:
    """Milliseconds of `engine` at batch 1 as the paired ratio to the yardstick: others may train on this machine meanwhile.

    In units of the yardstick. What the front is made from is timed again, alone, in milliseconds.
    """
    file = options.storage.cache_dir / f"reference-{spec.digest(reference.hex())[:16]}.onnx"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        artifact.write_bytes(file, reference)
    yardstick = _engine(options, file)
    calls = {"engine": partial(engine.run, {INPUT: row}), "yardstick": partial(yardstick.run, {INPUT: row})}
    ms = evaluate.latency(calls, options.search.latency_rounds, 10, options.seed)
    yardstick.close()
    return float(np.median(ms["engine"] / ms["yardstick"]))


def _timed_alone(
    problem: Problem, folder: Path, trials: Sequence[Trial], resources: Mapping[str, float], selector: Mapping[str, str], tell: Tell
) -> list[Trial]:
    """The engines of all finished trials once more, interleaved with each other, while nothing else of the search runs."""
    done = [trial for trial in trials if trial.state == "done"]
    if not done:
        return list(trials)
    tell("latency", f"{len(done)} engines, interleaved, alone")
    cpus, gpus = resources["CPU"], resources.get("GPU", 0)
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, label_selector=dict(selector))(_time_engines)
    found: dict[str, float] = ray.get(task.remote(problem, [trial.params for trial in done], str(folder)))
    tell("latency", f"{min(found.values()):.3f} to {max(found.values()):.3f} ms", 1.0, "done")
    return [_with_latency(trial, found) for trial in trials]


def _with_latency(trial: Trial, ms: Mapping[str, float]) -> Trial:
    if trial.values is None or trial.id not in ms:
        return trial
    return replace(trial, values={**trial.values, "latency_ms": ms[trial.id]})


def _time_engines(problem: Problem, params: Sequence[Params], folder: str) -> dict[str, float]:
    """Median milliseconds at batch 1 of each trial's engine, by trial id."""
    row = data.load(problem.trial_spec({}).data).calibration.x[:1]
    engines = {}
    for values in params:
        options = trial_options(problem, values, Path(folder))
        engines[options.name] = _engine(options, _onnx_of(options))
    calls = {name: partial(engine.run, {INPUT: row}) for name, engine in engines.items()}
    ms = evaluate.latency(calls, problem.base.search.latency_rounds, 10, problem.base.search.seed)
    for engine in engines.values():
        engine.close()
    return {name: statistics.median(times.tolist()) for name, times in ms.items()}


def _onnx_of(options: Spec) -> Path:
    name = _target(options)
    place = launch.run_folder(options) / name
    if options.storage.remote and not place.exists():
        store.pull(f"{options.storage.path}/{options.name}/{name}", place)
    return artifact.read(place).file("model.onnx")


# --- what is left behind --------------------------------------------------------------------------------------------


def choose(trials: Sequence[Trial], options: Spec) -> tuple[Trial, str]:
    """The best of a front: the fastest (else smallest) whose validation error is within `gate.max_accuracy_drop` of the lowest."""
    order = next((name for name in ("latency_ms", "macs", "parameters", "size_bytes") if name in options.search.objectives), None)
    errors = {trial.id: _error(trial) for trial in trials}
    lowest = min(errors.values())
    near = [trial for trial in trials if errors[trial.id] <= lowest + options.gate.max_accuracy_drop]
    best = min(near, key=lambda trial: ((trial.values or {})[order] if order else 0.0, errors[trial.id], trial.id))
    what = f"the least {order}" if order else "the lowest validation error"
    return best, f"{what} of the {len(near)} on the front within gate.max_accuracy_drop ({options.gate.max_accuracy_drop:g}) of the lowest validation error ({lowest:.4f})"


def _error(trial: Trial) -> float:
    values = trial.values or {}
    return values.get("validation_error", 1 - values["validation_accuracy"] if "validation_accuracy" in values else 0.0)


def _write(problem: Problem, folder: Path, trials: Sequence[Trial]) -> Found:
    options = problem.base.search
    done = _distinct([trial for trial in trials if trial.state == "done"])
    points = costs([trial.values or {} for trial in done], options.objectives)
    on_front = [done[index] for index in front(points)]
    reference = points.max(0) + 0.1 * np.abs(points.max(0)) + 1e-9 if len(done) else np.zeros(len(options.objectives))
    best, because = choose(on_front, problem.base) if on_front else (None, "no trial came to its end; the reasons stand with the trials")
    best_file = _write_best(problem, folder, best) if best else None
    artifact.write_text(folder / "trials.jsonl", "".join(json.dumps(asdict(trial), sort_keys=True) + "\n" for trial in trials))
    units = {"latency_ms": "ms", "size_bytes": "bytes", "validation_error": "fraction", "validation_accuracy": "fraction"}
    chosen = [trial.id for trial in on_front]
    found = {
        "name": problem.base.name, "seed": options.seed, "sampler": "TPE",
        "objectives": [{"name": name, "unit": units.get(name, ""), "mode": mode} for name, mode in options.objectives.items()],
        "space": {name: _plain(values) for name, values in problem.space.items()}, "set_in_trials": dict(problem.shared), "trials": [asdict(trial) for trial in trials],
        "front": chosen, "hypervolume": hypervolume_history(points, reference),
        "reference": dict(zip(options.objectives, reference.tolist(), strict=True)), "best": best.id if best else None, "because": because,
        "best_spec": str(best_file) if best_file else "",
    }  # fmt: skip
    artifact.write_text(folder / "search.json", json.dumps(found, indent=1, sort_keys=True))
    page = report.write_search(folder / "report.html", found)
    return Found(folder, trials, chosen, best_file, because, page)


def _distinct(trials: Sequence[Trial]) -> list[Trial]:
    """The sampler may try the same values twice; they are one trial."""
    return list({trial.id: trial for trial in trials}.values())


def _write_best(problem: Problem, folder: Path, best: Trial) -> Path:
    """The base spec with the best trial's values; what only the trials had stays out."""
    path = folder / "best.yaml"
    artifact.write_text(path, spec.to_yaml(with_values(problem.base, {**problem.values(best.params), "name": f"{problem.base.name}-best"[:63]})))
    return path
