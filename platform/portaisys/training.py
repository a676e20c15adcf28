"""Carries a training out where the spec says: in this process, or in Ray Train workers, which share their checkpoints through a folder or a store.

Knows no stages and no order of them: it is given a Fit and leaves the weights and notes in its folder.
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
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from portaisys import artifact, checkpoint, cluster, distributed, metrics, spec, store
from portaisys.distributed import Place
from portaisys.fits import NOTED, NOTES, RESTARTS, Fit, carry_out, kept_notes
from portaisys.progress import Row, line
from portaisys.spec import Spec, Stopped, UserError
from portaisys.watch import notice
from portaisys.weights import WEIGHTS

_log = logging.getLogger(__name__)


def carry(options: Spec, fit: Fit, tell: Callable[..., None]) -> Path:
    """Carry out a Fit where `train.num_workers` says; returns the folder with the weights."""
    left = 0 if fit.remote else checkpoint.steps(Path(fit.work))
    if left:
        tell(f"goes on from step {left}, where an earlier run stopped")
    if options.train.num_workers == 0 or fit.kind == "qat":
        told = f"compress.quantize.method: qat trains in one process, so train.num_workers {options.train.num_workers} was not used for it"
        _alone(options, fit, tell, [told] if options.train.num_workers else [])
        return Path(fit.work)
    with cluster.on_ray(_own_cpus(options.train)):
        no_room = check_cluster(options)
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


def check_cluster(options: Spec) -> str:
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
