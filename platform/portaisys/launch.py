"""Runs a spec: plan the stages, reuse what is finished, run the rest here or on Ray, publish the result.

A stage is finished when its folder holds an artifact whose key (options, spec sections, parents, data) is the one
asked for. So a run that died goes on where it was, and a second run of the same spec only reads.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from portaisys import artifact, checkpoint, cluster, data, distributed, gate, metrics, models, report, spec, store
from portaisys.artifact import Artifact
from portaisys.compress.quantize import refuse_calibration
from portaisys.data import Splits
from portaisys.distributed import Place
from portaisys.engine import TYPED, available, backend
from portaisys.progress import Row, line
from portaisys.registry import Registry, Version, open_registry
from portaisys.spec import Spec, Stopped, UserError
from portaisys.stages import FITS, NOTED, NOTES, RESTARTS, STAGES, WEIGHTS, Fit, Job, batches, carry_out, kept_notes, threads, trace_file
from portaisys.watch import notice

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
    """The stages of a spec, in order."""
    stages = [Stage("train", "train", {}, ("seed", "model", "train"))]
    small = "train"
    for number, step in enumerate((step for step in options.compress if step.kind != "quantize"), 1):
        parents = {"student": small} | ({"teacher": "train"} if step.kind == "distill" else {})
        small = f"{step.kind}-{number}"
        sections = ("seed", "model", "train") if step.kind == "distill" else ("model",)
        stages.append(Stage(small, step.kind, parents, sections, step.options.model_dump()))
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
    folder = run_folder(options)
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
        preflight(options, splits, 0 if (folder / "judge" / artifact.MANIFEST).exists() else registry.looks(splits.test_digest))
        _take_name(options, folder)
        artifacts: dict[str, Artifact] = {}
        reused = []
        for stage in plan(options):
            artifacts[stage.name], was_there = _one(options, stage, artifacts, splits, registry, folder, tell)
            reused += [stage.name] if was_there else []
        tell("publish", "writing version and report")
        logs = {name: metrics.read(_log_file(folder, name, made.key)) for name, made in artifacts.items()}
        version = _publish(options, artifacts, splits, registry, promote, _curves(logs))
        page = report.write(folder / "report.html", options, artifacts, logs, str(version))
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


def train(options: Spec, tell: Tell, *, resume: bool = False) -> Artifact:
    """The first stage alone, checked as `run` checks it: a job that trains and leaves the rest to `run`, which reuses it."""
    folder = run_folder(options)
    _refuse_used_name(options, folder, resume)
    splits = data.load(options.data)
    preflight(options, splits, 0)
    _take_name(options, folder)
    return produce(options, "train", tell, splits)


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
            _check_cluster(options)
    if options.train.augment != "none" and len(splits.shape) != 3:
        raise UserError(f"train.augment: {options.train.augment!r} moves pictures, and the rows are {splits.shape}; set train.augment=none")
    device(options)
    torch.manual_seed(options.seed)
    models.build(options.model, splits.shape, len(splits.labels), splits.mean, splits.std, splits.vocabulary)
    batches(options.train, splits.train, options.seed)
    low = {name for name in options.precisions if options.engine.backend == "auto" or name in spec.BACKEND_PRECISIONS[options.engine.backend]} - {"fp32"}
    if options.quantize:
        refuse_calibration(len(splits.calibration), options.quantize)
    candidates = sum(stage.kind == "export" and stage.name != "export-qat" for stage in plan(options)) + len(low)
    if candidates > 1:
        gate.refuse_undecidable(len(splits.test), options.gate.max_accuracy_drop, options.gate.confidence, looks + candidates)


def _one(
    options: Spec, stage: Stage, done: Mapping[str, Artifact], splits: Splits, registry: Registry | None, folder: Path, tell: Tell
) -> tuple[Artifact, bool]:
    parents = {role: done[name] for role, name in stage.parents.items()}
    sections = _sections(options, stage)
    digests = {role: parent.digest for role, parent in parents.items()}
    about = {"stage": stage.kind, "options": dict(stage.options), "spec": sections, "parents": digests, "data": splits.digest}
    key = spec.digest([*about.values()])
    place, uri = folder / stage.name, f"{options.storage.path}/{options.name}/{stage.name}"
    work = folder / f"{stage.name}.work"
    if options.storage.remote and not place.exists():
        store.pull(uri, place)
    found = artifact.find(place, key)
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
        options, stage.kind, key, stage.options, parents, splits, train=partial(_train, options, fit, partial(tell, stage.name)),
        looks=partial(_record_looks, registry, splits.test_digest), tell=partial(tell, stage.name),
    )  # fmt: skip
    tell(stage.name)
    logged = {"run": options.name, "stage": stage.name, "key": key[:12]}  # what JSON logs are searched by
    _log.info("stage begins", extra=logged)
    with artifact.writing(place, kind=stage.kind, key=key, parents=digests, spec=sections) as draft:
        STAGES[stage.kind](job, draft)
    made = artifact.read(place)
    _finish(options, made, uri, work)
    _log.info("stage ended after %.1f s", made.seconds, extra=logged | {"digest": made.digest[:12]})
    tell(stage.name, f"{made.seconds:.1f} s", 1.0, "done")
    return made, False


def _record_looks(registry: Registry | None, test_digest: str, candidates: Sequence[str]) -> int:
    assert registry, "only a run with a registry may look at the test split"
    return registry.record_looks(test_digest, candidates)


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
    if "train" in found:
        found["train"] = {name: value for name, value in found["train"].items() if name not in _NOT_IN_KEYS}
        if options.train.speed != "auto":  # means that change no bit may come and go
            found["train"]["speed"] = [] if options.train.speed == "exact" else [means for means in options.train.speed if means not in spec.EXACT]
        if options.train.ddp.sync_batchnorm:  # of how gradients are exchanged this alone changes what is learnt
            found["train"]["sync_batchnorm"] = True
    if "model" in found:
        found["model"] |= models.source_digest(options.model)
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
    job = cluster.submission_id()
    known = registry.of_digest(options.name, artifacts["version"].digest)
    run_id = known.run_id if known else registry.log_run(
        options.name, spec.dump(options), lineage, {f"{row['engine']} {row['backend']}": row for row in rows}, {"report": str(run_folder(options) / "report.html")} | ({"ray_job": job} if job else {}), curves,
    )  # fmt: skip
    cluster.note_in_job({"mlflow_run": run_id, "portaisys_run": options.name})
    action = "pass" if best["admissible"] else "fail"
    version = registry.publish(options.name, artifacts["version"].path, run_id, lineage, {"action": action, "because": best["because"]})
    # Once: a version that somebody took out of production since (a rollback) is not put back by a run that only reads.
    before = [entry for entry in registry.ledger(options.name) if entry.event == "promote" and entry.version == version.version]
    return registry.promote(options.name, version.version, because=best["because"]) if promote and not before else version


# --- training, here or on Ray -----------------------------------------------------------------------------------


def _train(options: Spec, fit: Fit, tell: Callable[..., None]) -> Path:
    """Carry out a Fit where `train.num_workers` says; returns the folder with the weights."""
    left = 0 if fit.remote else checkpoint.steps(Path(fit.work))
    if left:
        tell(f"goes on from step {left}, where an earlier run stopped")
    if options.train.num_workers == 0 or fit.kind == "qat":
        told = f"compress.quantize.method: qat trains in one process, so train.num_workers {options.train.num_workers} was not used for it"
        _alone(options, fit, tell, [told] if options.train.num_workers else [])
        return Path(fit.work)
    with cluster.on_ray(_own_cpus(options.train)):
        no_room = _check_cluster(options)
        if not no_room:
            with _watching(Path(fit.log), tell):
                _ray_train(options, fit)
    if no_room:
        _alone(options, fit, tell, [f"train.num_workers: {options.train.num_workers} were asked for and one process without workers trained, as train.min_workers=0 allows: {no_room}"])
    return Path(fit.work)


def _alone(options: Spec, fit: Fit, tell: Callable[..., None], began: Sequence[str] = ()) -> None:
    """Train in this process, which SIGTERM ends with a checkpoint."""
    here = options.train.model_copy(update={"num_workers": 0})
    place = Place(device=device(options.model_copy(update={"train": here})))
    write = partial(_write_log, fit, lambda row: tell(line(row), row["step"] / row["steps"]))
    with notice() as asked:
        carry_out(fit, place, write, write, leave=asked, began=began)


def _own_cpus(train: spec.Train) -> int:
    """Of a cluster of our own on this machine: as many as asked for, or what there is where fewer workers will do."""
    asked = train.num_workers * train.cpus_per_worker
    return asked if train.min_workers is None else min(asked, len(os.sched_getaffinity(0)))


def device(options: Spec) -> str:
    """The device of this process: a GPU where the spec asks for one. Raises UserError when there is none.

    With workers elsewhere this process needs none: the cluster is asked instead.
    """
    if options.train.use_gpu and not options.train.num_workers and not torch.cuda.is_available():
        raise UserError("train.use_gpu: torch sees no GPU here; install a CUDA build of torch (README, Installing) or set train.use_gpu=false")
    return "cuda" if options.train.use_gpu else "cpu"


def _write_log(fit: Fit, show: Callable[[Row], None], values: Row, saved: Path | None = None) -> None:
    """A row into the step log, with the seconds that a checkpoint took which is finished since; then shown."""
    row = {**values} | ({"checkpoint_s": artifact.read(saved).seconds} if saved else {})
    metrics.append(Path(fit.log), row)
    show(row)


@contextlib.contextmanager
def _watching(log: Path, tell: Callable[..., None]) -> Iterator[None]:
    """Show the lines that a worker elsewhere appends to its log."""
    stop = threading.Event()

    def size() -> int:
        return log.stat().st_size if log.exists() else 0

    def watch() -> None:
        seen = size()
        while not stop.wait(0.5):
            if (now := size()) > seen and (row := metrics.last(log)):
                seen = now
                tell(line(row), row["step"] / row["steps"])

    tell("starting workers")
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _ray_train(options: Spec, fit: Fit) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from portaisys import workers

    train = options.train
    least = train.num_workers if train.min_workers is None else max(1, train.min_workers)
    start_s = 300 if least == train.num_workers else 60  # what fails to start in that time is tried again with the workers there are then
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(start_s))
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"fit": asdict(fit), "use_gpu": train.use_gpu, "threads": train.cpus_per_worker},
        torch_config=TorchConfig(backend="nccl" if train.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers if least == train.num_workers else (least, train.num_workers), use_gpu=train.use_gpu, resources_per_worker=per_worker(train), label_selector=train.label_selector or None
        ),
        # The name is new every time: with an old one Ray Train resumes by itself, silently, even a finished run.
        # What is resumed is our own checkpoint, by its key.
        run_config=RunConfig(
            name=f"{options.name}-{fit.kind}-{uuid.uuid4().hex[:8]}", storage_path=_ray_storage(options, fit), callbacks=[workers.Notice(), workers.Failures(fit.work, fit.key)],
            failure_config=FailureConfig(max_failures=train.max_failures, controller_failure_limit=_WAIT_S // start_s),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise _cause(error) from error
    if fit.remote:
        for name in (WEIGHTS, NOTES):
            store.fetch_file(f"{fit.remote}/{name}", Path(fit.work) / name)
    notes, restarts = Path(fit.work) / NOTES, kept_notes(Path(fit.work) / RESTARTS, fit.key)
    artifact.write_text(notes, json.dumps([*json.loads(notes.read_text()), *restarts]))


_WAIT_S = 3600  # for room on the cluster, all attempts to start together


def _ray_storage(options: Spec, fit: Fit) -> str:
    return f"{options.storage.path}/{options.name}/ray" if options.storage.remote else f"{fit.work}/ray"


def _check_cluster(options: Spec) -> str:
    """Raises UserError for a cluster that cannot train this; where the spec is content with no worker, says why there is room for none."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) > 1 and not options.storage.remote and not options.storage.shared:
        raise UserError(
            f"storage.path: {options.storage.path!r} is a folder of this machine and the cluster has {len(nodes)} nodes; "
            "use s3://bucket/prefix, or a mount that all nodes share together with storage.shared=true"
        )
    if len(nodes) > 1 and os.environ.get("MLFLOW_TRACKING_URI", "sqlite").startswith("sqlite"):
        raise UserError("storage: the registry is a sqlite file and the cluster has several nodes; start `mlflow server` and set MLFLOW_TRACKING_URI")
    train = options.train
    least = train.num_workers if train.min_workers is None else train.min_workers
    where, or_else = ("train.num_workers", ", or allow fewer with train.min_workers (0: one process here)") if train.min_workers is None else ("train.min_workers", "")
    try:
        cluster.refuse_unplaceable(where, "workers", max(1, least), per_worker(train), train.label_selector, cluster.nodes(), cluster.grows_to(), or_else)
    except UserError as error:
        if least:
            raise
        return str(error)
    return ""


def per_worker(train: spec.Train) -> dict[str, float]:
    """Resources of one Ray Train worker."""
    return {"CPU": float(train.cpus_per_worker)} | ({"GPU": 1.0} if train.use_gpu else {})


def _cause(error: BaseException) -> UserError:
    """The user's own error, out of the layers that Ray put around it."""
    from portaisys.workers import cause_of

    failures = getattr(error, "worker_failures", None)
    if failures:
        told = cause_of(failures)
        return told if isinstance(told, UserError) else UserError(f"train: the workers failed: {told}")
    seen = getattr(error, "controller_failure", None) or error
    if isinstance(seen, UserError):
        return seen
    lines = str(seen).strip().splitlines() or [type(seen).__name__]
    return UserError(f"train: the workers failed: {lines[-1]}")


def _worker(config: Mapping[str, Any]) -> None:
    """What each Ray Train worker does: the same `carry_out`, with DDP and a report that Ray hears."""
    import ray.train
    import ray.train.torch

    from portaisys import workers
    from portaisys.training_metrics import TrainingMetrics

    fit = Fit(**config["fit"])
    torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    rank = context.get_world_rank()
    _log.info("worker begins", extra={"run": fit.spec["name"], "stage": Path(fit.work).stem, "key": fit.key[:12], "rank": rank})
    where = str(ray.train.torch.get_device()) if config["use_gpu"] else "cpu"
    if fit.remote:
        if context.get_local_rank() == 0:  # the workers of a machine share its folder
            _fetch(fit)
        distributed.total(torch.zeros((), device=where))  # nobody reads before all is there

    turns = itertools.cycle(checkpoint.by_turn(Path(fit.work)))  # here as in the store, from which they were fetched
    write = partial(_write_log, fit, TrainingMetrics(fit.spec["name"], Path(fit.work).stem).tell) if rank == 0 else None

    def report(values: Row, folder: Path | None) -> None:
        if write:
            write(values, folder)
            if fit.remote and folder:
                # Not by the name it has here: of two that were written since the last report one is passed over, and its turn with it.
                store.push(folder, f"{fit.remote}/{next(turns)}")
                store.send_file(Path(fit.work) / NOTED, f"{fit.remote}/{NOTED}")
        # Ray hears metrics only: the checkpoint is ours, already in its place, and every rank reports equally often.
        ray.train.report(dict(values))

    train, world = spec.parse(fit.spec).train, context.get_world_size()
    began = [f"train.num_workers: {train.num_workers} were asked for and {world} trained, for which there was room"] if world < train.num_workers else []
    place = Place(rank, world, where, partial(distributed.ddp, options=train.ddp))
    with workers.watched(rank, world, train.hang_timeout_s) as mark:
        try:
            carry_out(fit, place, report, write, workers.asked_to_leave, mark, began)
        except Stopped as stopped:
            raise workers.as_preemption(stopped) from None
    if fit.remote and rank == 0:
        for name in (WEIGHTS, NOTES):
            store.send_file(Path(fit.work) / name, f"{fit.remote}/{name}")


def _fetch(fit: Fit) -> None:
    _fetch_checkpoints(fit)
    store.fetch_file(f"{fit.remote}/{NOTED}", Path(fit.work) / NOTED)
    for parent in map(Path, fit.parents.values()):  # this may be another machine than the one that made them
        if not parent.exists():
            store.pull(f"{fit.remote.rpartition('/')[0]}/{parent.name}", parent)


def _fetch_checkpoints(fit: Fit) -> None:
    """All ranks start from what the store holds, or all from nothing: what only this machine has is not it.

    Raises UserError when nothing there is whole; one of the two that is not is passed over.
    """
    damage, fetched = [], False
    for slot in checkpoint.SLOTS:
        shutil.rmtree(Path(fit.work) / slot, ignore_errors=True)
        try:
            fetched |= store.pull(f"{fit.remote}/{slot}", Path(fit.work) / slot)
        except UserError as error:
            damage.append(error)
            _log.warning("a checkpoint in the store is passed over: %s", error)
    if damage and not fetched:
        raise damage[0]
