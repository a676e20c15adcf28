"""Runs a spec: plan the stages, reuse what is finished, run the rest here or on Ray, publish the result.

A stage is finished when its folder holds an artifact whose key (options, spec sections, parents, data) is the one
asked for. So a run that died goes on where it was, and a second run of the same spec only reads.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml

from portaisys import artifact, cluster, data, gate, metrics, models, report, spec, store, teachers, training
from portaisys.artifact import Artifact
from portaisys.compress.quantize import refuse_calibration
from portaisys.data import Splits
from portaisys.determinism import threads
from portaisys.engine import TYPED, available, backend
from portaisys.fits import FITS, Fit, batches, trace_file
from portaisys.judge import BASELINE
from portaisys.registry import Registry, Version, open_registry
from portaisys.rehearsal import rehearse_steps
from portaisys.spec import Spec, UserError
from portaisys.stages import STAGES, Job
from portaisys.weights import WEIGHTS

_log = logging.getLogger(__name__)


class Tell(Protocol):
    """Progress of a stage; `fraction` in [0, 1] where it is known; `state`: running, done or reused."""

    def __call__(self, stage: str, text: str = "", fraction: float | None = None, state: str = "running") -> None: ...


@dataclass(frozen=True)
class Stage:
    """One step of the plan. `parents`: role -> name of an earlier stage; `sections`: what of the spec it depends on."""

    name: str
    kind: str
    parents: Mapping[str, str] = field(default_factory=dict)
    sections: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a run left. `reused`: names of the stages that were finished before."""

    folder: Path
    artifacts: Mapping[str, Artifact]
    reused: tuple[str, ...]
    version: Version
    report: Path

    @property
    def left(self) -> dict[str, Path]:
        """Step logs and traces of the trainings, by stage and what they are."""
        return {f"{stage} {what}": file for stage, made in self.artifacts.items() for what, file in left_by(made).items()}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The lines of the closing table."""
        return list(self.artifacts["judge"].scores["rows"])


def plan(options: Spec) -> list[Stage]:
    """The stages of a spec, in order. Raises UserError while what to compress is left to a search."""
    if options.compress == "auto":
        raise UserError("compress: 'auto' is a search, which `portaisys run` makes first; here give the recipe that it wrote (recipe.yaml in the run's folder)")
    stages = [Stage("train", "train", {}, ("seed", "model", "train"))]
    small = "train"
    for number, step in enumerate((step for step in options.steps if step.kind != "quantize"), 1):
        parents = {"student": small}
        if step.distill:
            teacher = "train" if step.distill.teacher is None else f"teacher-{number}"
            if teacher != "train":
                stages.append(Stage(teacher, "teacher", {}, (), {"teacher": step.distill.model_dump()["teacher"]}))
            parents = ({} if step.distill.student else parents) | {"teacher": teacher}
        small = f"{step.kind}-{number}"
        sections = ("seed", "model", "train") if step.kind == "distill" else ("model",)
        # Of a distillation what is not asked for is no part of its key: it was made by the same steps before there were such things to ask for. Who teaches stands in its parents.
        stages.append(Stage(small, step.kind, parents, sections, step.options.model_dump(exclude_none=step.kind == "distill", exclude={"teacher"})))
    exported = {"dense": "export-dense"} | ({"small": "export-small"} if small != "train" else {})
    stages += [Stage(name, "export", {"model": small if role == "small" else "train"}, ("seed", "export", "model")) for role, name in exported.items()]
    smallest = list(exported.values())[-1]
    trained = {"model": smallest}
    if options.quantize and options.quantize.method == "qat" and {*QUANTIZES} & {*options.precisions}:
        stages.append(Stage("qat", "qat", {"student": small, "teacher": "train"}, ("seed", "model", "train"), options.quantize.training))
        stages.append(Stage("export-qat", "export", {"model": "qat"}, ("seed", "export", "model")))
        trained = {"model": "export-qat", "learnt": "qat"}
    for precision, kind in QUANTIZES.items():
        if options.quantize and precision in options.precisions:
            stages.append(Stage(kind, kind, trained, ("gate",) if options.quantize.searches else (), options.quantize.stage))
            exported[precision] = kind
    for name, (source, low) in _casts(options).items():
        stages.append(Stage(f"cast-{name}", "cast", {"model": exported.get(source, smallest)}, (), {"precision": low, "judged_as": name}))
        exported[f"typed-{name}"] = f"cast-{name}"
    chosen = {}
    if options.engine.backend == "auto":
        stages.append(Stage("choose", "choose", dict(exported), ("seed", "engine", "export"), available()))
        chosen = {"choice": "choose"}
    device = available() if chosen else {"device": backend(options.engine.backend).device(), "version": backend(options.engine.backend).version()}
    stages.append(Stage("judge", "judge", {"reference": "train"} | exported | chosen, ("seed", "engine", "gate", "export"), device))
    stages.append(Stage("version", "version", {"judge": "judge", "reference": "train"} | exported | chosen, ("name", "engine", "gate", "export")))
    return stages


# What a search of recipes ends with, as far as what is judged goes.
TYPICAL: tuple[Mapping[str, Any], ...] = ({"prune": {}}, {"distill": {}}, {"quantize": {}})


def with_recipe(options: Spec, recipe: Sequence[Mapping[str, Any]]) -> Spec:
    """The spec with these compression steps. Raises SpecError where they do not go together."""
    return spec.parse({**spec.dump(options), "compress": list(recipe)})


QUANTIZES = {"int8": "quantize", "fp8": "quantize-fp8"}


def _casts(options: Spec) -> dict[str, tuple[str, str]]:
    """Precision -> (what is cast, to which type), where a backend takes precision from the file: what is left between Q and DQ is fp16 where fp16 is asked for."""
    asked = options.precisions
    runs_here = {name for name in TYPED if options.engine.backend == "auto" and name in available()}
    if not {options.engine.backend, *options.engine.also_build, *runs_here} & {*TYPED}:
        return {}
    mixed = {name: (name, "fp16") for name in QUANTIZES if options.quantize and {name, "fp16"} <= {*asked}}
    return {name: ("", name) for name in ("bf16", "fp16") if name in asked} | mixed


def run(options: Spec, tell: Tell, *, promote: bool = True, resume: bool = False) -> Outcome:
    """Run every stage of a spec that is not finished; publish the version; write the report.

    A name belongs to one spec; `resume`: go on under a name that another spec has used, with all its stages that still hold.
    Raises UserError for anything the user can put right; what was finished before stays as it was.
    """
    folder, stages = run_folder(options), plan(options)
    # The number of threads decides in which order sums are rounded: from the spec, not from the machine, and for all stages.
    with artifact.locked(folder), threads(options.train.cpus_per_worker):
        artifact.sweep(folder)
        _refuse_used_name(options, folder, resume)
        tell("data", "reading and splitting")
        splits = data.load(options.data)
        tell("data", f"{len(splits.train):,} train, {len(splits.validation):,} validation, {len(splits.calibration):,} calibration, {len(splits.test):,} test rows", 1.0, "done")
        for note in splits.train.table.notes:
            tell("data", note, 1.0, "done")
        registry = open_registry(options.storage)
        done = _finished(options, stages, splits, folder)
        preflight(options, splits, 0 if "judge" in done else registry.looks(splits.test_digest, without={made.digest for made in done.values()}))
        _take_name(options, folder)
        artifacts: dict[str, Artifact] = {}
        reused = []
        for stage in stages:
            artifacts[stage.name], was_there = _one(options, stage, artifacts, splits, registry, folder, tell)
            reused += [stage.name] if was_there else []
        tell("publish", "writing version and report")
        logs = {name: metrics.read(_log_file(folder, name, made.key)) for name, made in artifacts.items()}
        version = _publish(options, artifacts, splits, registry, promote, _curves(logs))
        page = report.write(folder / "report.html", options, artifacts, logs, str(version), splits.test)
        tell("publish", f"{version} is {', '.join(version.aliases) or 'published'}", 1.0, "done")
    return Outcome(folder, artifacts, tuple(reused), version, page)


def produce(options: Spec, target: str, tell: Tell, splits: Splits) -> Artifact:
    """Run one stage of the plan and what it depends on, unless finished: no registry, no verdict, nothing published.

    `splits`: of options.data. Raises UserError as `run` does. What a search does per trial.
    """
    folder = run_folder(options)
    with artifact.locked(folder), threads(options.train.cpus_per_worker):
        artifact.sweep(folder)
        artifacts: dict[str, Artifact] = {}
        for stage in _lineage(plan(options), target):
            artifacts[stage.name], _ = _one(options, stage, artifacts, splits, None, folder, tell)
    return artifacts[target]


def take_over(options: Spec, of: Spec, names: Sequence[str]) -> None:
    """Copy finished stages of another run, with their step logs, to where this one looks for them; whether they hold here their keys tell, as ever."""
    here, there = run_folder(options), run_folder(of)
    for name in names:
        if of.storage.remote and not (there / name).exists():
            store.pull(f"{of.storage.path}/{of.name}/{name}", there / name)
        if (there / name).exists() and not (here / name).exists():
            draft = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=made_folder(here)))
            shutil.copytree(there / name, draft, dirs_exist_ok=True)
            artifact.replace(draft, here / name)
            for log in (there / "logs").glob(f"{name}-*"):
                shutil.copy2(log, made_folder(here / "logs") / log.name)


def made_folder(folder: Path) -> Path:
    """The folder, which is there then."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def train(options: Spec, tell: Tell, *, resume: bool = False) -> Artifact:
    """The first stage alone, checked as `run` checks it: a job that trains and leaves the rest to `run`, which reuses it."""
    folder = run_folder(options)
    _refuse_used_name(options, folder, resume)
    splits = data.load(options.data)
    preflight(options, splits, 0)
    _take_name(options, folder)
    return produce(options if options.compress != "auto" else with_recipe(options, ()), "train", tell, splits)


# What may differ between two runs of one name: it changes where and how a run is watched over, not what it computes.
_NOT_IN_NAMES = {"search", "serve", "storage"}


def _refuse_used_name(options: Spec, folder: Path, resume: bool) -> None:
    """A name that another spec has used is refused, or gone on with where the user says so."""
    file = folder / "spec.yaml"
    if options.storage.remote and not file.exists():
        store.fetch_file(f"{options.storage.path}/{options.name}/spec.yaml", file)
    if resume or not file.exists():
        return
    before, now = (
        {name: value for name, value in tree.items() if name not in _NOT_IN_NAMES}
        for tree in (_filled(yaml.safe_load(file.read_text())), spec.dump(options))
    )
    if "auto" in (before.get("compress"), now["compress"]):  # which any recipe may be the answer to
        before["compress"] = now["compress"]
    differ = [told for path, told in spec.changes(before, now).items() if not _NOT_IN_KEYS & {*path.split(".")}]
    if differ:
        told = ", ".join(differ[:3]) + (f" and {len(differ) - 3} more" if len(differ) > 3 else "")
        raise UserError(
            f"name: {options.name!r} was used by another spec ({told}); take another name (name=...), or go on under this one with --resume, which reuses what still holds"
        )


def _filled(tree: Any) -> Any:
    """A written spec with the defaults of keys that are newer than it; as it stands when it is no spec any more."""
    try:
        return spec.dump(spec.parse(tree))
    except spec.SpecError:
        return tree


def _take_name(options: Spec, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    artifact.write_text(folder / "spec.yaml", spec.to_yaml(options))
    if options.storage.remote:
        store.send_file(folder / "spec.yaml", f"{options.storage.path}/{options.name}/spec.yaml")


def settled(options: Spec) -> Spec:
    """The spec with a storage.path that outlives a submitted job, whose working directory Ray deletes: a relative one is put below ~/portaisys."""
    path = options.storage.path
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ or options.storage.remote or Path(path).expanduser().is_absolute():
        return options
    return options.model_copy(update={"storage": options.storage.model_copy(update={"path": str(Path.home() / "portaisys" / path)})})


def _lineage(stages: Sequence[Stage], target: str) -> list[Stage]:
    """The stage of that name and all it depends on, in the order of the plan."""
    wanted = {target}
    for stage in reversed(stages):
        wanted |= set(stage.parents.values()) if stage.name in wanted else set()
    return [stage for stage in stages if stage.name in wanted]


def run_folder(options: Spec) -> Path:
    """Where the run's artifacts stand on this machine."""
    root = options.storage.cache_dir / "runs" if options.storage.remote else Path(options.storage.path).expanduser().resolve()
    return root / options.name


def _log_file(folder: Path, stage: str, key: str) -> Path:
    """A log belongs to a stage and its key: another spec's steps are another curve."""
    return folder / "logs" / f"{stage}-{key[:12]}.jsonl"


def preflight(options: Spec, splits: Splits, looks: int) -> None:
    """Refuse, before any work is spent, what cannot end well. `looks`: candidates that saw this test split before. Raises UserError."""
    for name in {options.engine.backend, *options.engine.also_build} - {"auto", "torch"}:
        backend(name).version()
    if options.engine.backend != "auto" and backend(options.engine.backend).device() == "none":
        raise UserError(
            f"engine.backend: {options.engine.backend} cannot run on this machine, which has no GPU, so it could not be judged; "
            f"set engine.backend=onnxruntime, and engine.also_build=[{options.engine.backend}] to build it all the same"
        )
    if options.storage.remote:
        store.reachable(options.storage.path)
    if options.train.num_workers and (cluster.is_there() or os.environ.get("RAY_ADDRESS")):
        with cluster.on_ray(0):
            training.check_cluster(options)
    if options.train.augment != "none" and len(splits.shape) != 3:
        raise UserError(f"train.augment: {options.train.augment!r} moves pictures, and the rows are {splits.shape}; set train.augment=none")
    training.device(options)
    batches(options.train, splits.train, options.seed)
    rehearse_steps(options, splits)
    planned = options if options.compress != "auto" else with_recipe(options, TYPICAL)
    if planned.quantize:
        refuse_calibration(len(splits.calibration), planned.quantize)
    low = {name for name in planned.precisions if options.engine.backend == "auto" or name in spec.BACKEND_PRECISIONS[options.engine.backend]} - {"fp32"}
    candidates = sum(stage.kind == "export" and stage.name != "export-qat" for stage in plan(planned)) + len(low)
    if candidates > 1:
        gate.refuse_undecidable(len(splits.test), options.gate.max_accuracy_drop, options.gate.confidence, looks + candidates)
        if options.gate.max_class_recall_drop is not None:
            rows = np.bincount(splits.test.y, minlength=len(splits.labels))
            by_label = {label: int(count) for label, count in zip(splits.labels, rows, strict=True) if count}
            gate.refuse_undecidable_classes(by_label, options.gate.max_class_recall_drop, options.gate.confidence, looks + candidates)


def _one(
    options: Spec, stage: Stage, done: Mapping[str, Artifact], splits: Splits, registry: Registry | None, folder: Path, tell: Tell
) -> tuple[Artifact, bool]:
    parents = {role: done[name] for role, name in stage.parents.items()}
    about, place, work = _about(options, stage, done, splits), folder / stage.name, folder / f"{stage.name}.work"
    key, uri = _key(about), _uri(options, stage)
    found = _found(options, stage, key, folder)
    if found:
        _finish(options, found, uri, work)
        untraced = options.train.profile_steps and stage.kind in FITS and "trace" not in left_by(found)
        tell(stage.name, "finished before" + (", so train.profile_steps has nothing to trace" if untraced else ""), 1.0, "reused")
        return found, True
    fit = Fit(
        spec.dump(options), stage.kind, stage.options, {role: str(parent.path) for role, parent in parents.items()}, key, about,
        str(work), str(_log_file(folder, stage.name, key)), f"{uri}.work/{key[:16]}" if options.storage.remote else "",
    )  # fmt: skip
    job = Job(
        options, stage.options, parents, splits, train=partial(training.carry, options, fit, partial(tell, stage.name)),
        looks=partial(_record_looks, registry, splits), tell=partial(tell, stage.name),
    )  # fmt: skip
    tell(stage.name)
    logged = {"run": options.name, "stage": stage.name, "key": key[:12]}  # what JSON logs are searched by
    _log.info("stage begins", extra=logged)
    with artifact.writing(place, kind=stage.kind, key=key, parents=about["parents"], spec=about["spec"]) as draft:
        STAGES[stage.kind](job, draft)
    made = artifact.read(place)
    _finish(options, made, uri, work)
    _log.info("stage ended after %.1f s", made.seconds, extra=logged | {"digest": made.digest[:12]})
    tell(stage.name, f"{made.seconds:.1f} s", 1.0, "done")
    return made, False


def _about(options: Spec, stage: Stage, done: Mapping[str, Artifact], splits: Splits) -> dict[str, Any]:
    """All that a stage's artifact depends on."""
    parents = {role: done[name].digest for role, name in stage.parents.items()}
    return {"stage": stage.kind, "options": dict(stage.options), "spec": _sections(options, stage), "parents": parents, "data": splits.digest}


def _key(about: Mapping[str, Any]) -> str:
    return spec.digest([*about.values()])


def _uri(options: Spec, stage: Stage) -> str:
    return f"{options.storage.path}/{options.name}/{stage.name}"


def _found(options: Spec, stage: Stage, key: str, folder: Path) -> Artifact | None:
    """The stage's artifact when it is finished, here or in remote storage."""
    if options.storage.remote and not (folder / stage.name).exists():
        store.pull(_uri(options, stage), folder / stage.name)
    return artifact.find(folder / stage.name, key)


def _finished(options: Spec, stages: Sequence[Stage], splits: Splits, folder: Path) -> dict[str, Artifact]:
    """The stages, in order, that this run will only read."""
    done: dict[str, Artifact] = {}
    for stage in stages:
        if {*stage.parents.values()} <= done.keys() and (found := _found(options, stage, _key(_about(options, stage, done, splits)), folder)):
            done[stage.name] = found
    return done


def _record_looks(registry: Registry | None, splits: Splits, candidates: Sequence[str]) -> int:
    assert registry, "only a run with a registry may look at the test split"
    return registry.record_looks(splits.test_digest, candidates)


def _finish(options: Spec, made: Artifact, uri: str, work: Path) -> None:
    """What follows a finished stage, again where a killed run did not get to it."""
    if options.storage.remote and store.digest_at(uri) != made.digest:
        store.push(made.path, uri)
    shutil.rmtree(work, ignore_errors=True)


# They change how a run is watched over and shared among workers, not which rows a step takes: a run may go on with others.
_NOT_IN_KEYS = {"max_failures", "checkpoint_every_steps", "label_selector", "num_workers", "min_workers", "hang_timeout_s", "micro_batch", "ddp", "profile_steps"}


def _sections(options: Spec, stage: Stage) -> dict[str, Any]:
    """What of the spec a stage depends on; for a user's own model its code too."""
    tree = options.model_dump(mode="json")
    found = {name: tree[name] for name in stage.sections}
    if "gate" in found and found["gate"]["max_class_recall_drop"] is None:  # what was judged before there was such a gate stands
        del found["gate"]["max_class_recall_drop"]
    if "train" in found:
        found["train"] = {name: value for name, value in found["train"].items() if name not in _NOT_IN_KEYS}
        if options.train.speed != "auto":  # means that change no bit may come and go
            found["train"]["speed"] = [] if options.train.speed == "exact" else [means for means in options.train.speed if means not in spec.EXACT]
        if options.train.ddp.sync_batchnorm:  # of how gradients are exchanged this alone changes what is learnt
            found["train"]["sync_batchnorm"] = True
    if "model" in found:
        found["model"] |= models.source_digest(options.model)
    if stage.options.get("student") and (source := models.source_digest(spec.model_of(stage.options["student"]))):
        found["student"] = source
    if stage.kind == "teacher":
        found["teacher"] = teachers.digest(options, stage.options["teacher"])
    return found


def left_by(made: Artifact) -> dict[str, Path]:
    """What a finished training left, by what it is: its weights, and beside its artifact a step log and a trace of some steps; nothing for other stages."""
    log = _log_file(made.path.parent, made.path.name, made.key)
    files = {"weights": made.path / WEIGHTS, "log": log, "trace": trace_file(log)} if made.kind in FITS else {}
    return {name: file for name, file in files.items() if file.exists()}


# Columns of the step logs that have a history in MLflow; a column that is not told in all rows has fewer points.
_CURVES = ("loss", "validation_accuracy", "samples_per_s", "padding_waste", "mfu", "checkpoint_s")


def _curves(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[tuple[int, float]]]:
    """`stage/column` -> (step, value), of the stages that have a log."""
    return {f"{stage}/{column}": [(row["step"], row[column]) for row in rows if column in row] for stage, rows in logs.items() for column in _CURVES if rows}


def _publish(
    options: Spec, artifacts: Mapping[str, Artifact], splits: Splits, registry: Registry, promote: bool, curves: Mapping[str, Sequence[tuple[int, float]]]
) -> Version:
    rows = artifacts["judge"].scores["rows"]
    best = next(row for row in rows if row["engine"] == artifacts["version"].scores["admitted"][0])
    lineage = {name: found.digest for name, found in artifacts.items()}
    lineage |= {"spec": spec.digest(spec.dump(options)), "data": splits.digest, "test": splits.test_digest}
    if BASELINE in artifacts["version"].files:  # not in a version that was finished before there was an audit
        lineage["baseline"] = artifacts["version"].files[BASELINE]
    job = cluster.submission_id()
    known = registry.of_digest(options.name, artifacts["version"].digest)
    # Labels are a user's words, and not all of them may name a metric.
    scores = {f"{row['engine']} {row['backend']}": {key: value for key, value in row.items() if key != "recall"} for row in rows}
    run_id = known.run_id if known else registry.log_run(
        options.name, spec.dump(options), lineage, scores, {"report": str(run_folder(options) / "report.html")} | ({"ray_job": job} if job else {}), curves,
    )  # fmt: skip
    cluster.note_in_job({"mlflow_run": run_id, "portaisys_run": options.name})
    action = "pass" if best["admissible"] else "fail"
    version = registry.publish(options.name, artifacts["version"].path, run_id, lineage, {"action": action, "because": best["because"]})
    # Once: a version that somebody took out of production since (a rollback) is not put back by a run that only reads.
    before = [entry for entry in registry.ledger(options.name) if entry.event == "promote" and entry.version == version.version]
    return registry.promote(options.name, version.version, because=best["because"]) if promote and not before else version
